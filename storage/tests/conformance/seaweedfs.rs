//! An S3 service of one's own: SeaweedFS, as `ops/setup` installs it, on loopback.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use narlake_storage::bucket::S3Settings;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

const KEY: &str = "conformance";
const SECRET: &str = "conformance-secret";
const BUCKET: &str = "conformance";

/// How long its parts may take to find each other.
const START_LIMIT: Duration = Duration::from_secs(90);

/// Ends it, if nobody else does.
const LIFE_SECONDS: &str = "600";

/// Its gRPC ports are its HTTP ports and this.
const GRPC: u16 = 10_000;

/// A running service. Dropped, it stops.
pub(crate) struct SeaweedFs {
    process: Child,
    endpoint: String,
    data: TempDir,
}

impl SeaweedFs {
    pub(crate) async fn start() -> Self {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the target directory");
        let program = target.join("venv/bin/weed");
        assert!(program.exists(), "{} is missing: run ops/setup tools", program.display());
        let data = tempfile::tempdir().unwrap();
        let identity = format!(
            r#"{{"identities":[{{"name":"test","credentials":[{{"accessKey":"{KEY}","secretKey":"{SECRET}"}}],
            "actions":["Admin","Read","Write","List","Tagging"]}}]}}"#
        );
        let config = data.path().join("s3.json");
        std::fs::write(&config, identity).unwrap();
        let [master, volume, filer, s3] = ports();
        let log = std::fs::File::create(data.path().join("log")).unwrap();
        let process = Command::new("timeout")
            .arg(LIFE_SECONDS)
            .arg(program)
            .args(["server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", "-master.volumeSizeLimitMB=256"])
            .args(["-volume.max=32", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"])
            .args([format!("-dir={}", data.path().display()), format!("-s3.config={}", config.display())])
            .args([format!("-master.port={master}"), format!("-volume.port={volume}")])
            .args([format!("-filer.port={filer}"), format!("-s3.port={s3}")])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let started = Self { process, endpoint: format!("http://127.0.0.1:{s3}"), data };
        started.make_bucket().await;
        started
    }

    pub(crate) fn client(&self) -> AmazonS3 {
        AmazonS3Builder::new()
            .with_endpoint(&self.endpoint)
            .with_allow_http(true)
            .with_bucket_name(BUCKET)
            .with_region("us-east-1")
            .with_access_key_id(KEY)
            .with_secret_access_key(SECRET)
            .build()
            .unwrap()
    }

    /// The same bucket, for the engine.
    pub(crate) fn settings(&self, prefix: Option<&str>) -> S3Settings {
        S3Settings {
            bucket: BUCKET.into(),
            prefix: prefix.map(Into::into),
            endpoint: Some(self.endpoint.clone()),
            region: None,
            access_key_id: Some(KEY.into()),
            secret_access_key: Some(SECRET.into()),
            session_token: None,
        }
    }

    /// Its first requests are refused while it starts.
    async fn make_bucket(&self) {
        let start = Instant::now();
        loop {
            let made = Command::new("curl")
                .args(["--silent", "--fail", "--max-time", "10", "--aws-sigv4", "aws:amz:us-east-1:s3", "-X", "PUT"])
                .args(["--user", &format!("{KEY}:{SECRET}"), &format!("{}/{BUCKET}", self.endpoint)])
                .stdout(Stdio::null())
                .status()
                .expect("curl runs");
            if made.success() {
                return;
            }
            let log = || std::fs::read_to_string(self.data.path().join("log")).unwrap_or_default();
            assert!(start.elapsed() < START_LIMIT, "SeaweedFS does not start:\n{}", log());
            sleep(Duration::from_millis(200)).await;
        }
    }
}

impl Drop for SeaweedFs {
    fn drop(&mut self) {
        // By `timeout`, which passes it on; SIGKILL would end that alone.
        let _ = Command::new("kill").arg(self.process.id().to_string()).status();
        let _ = self.process.wait();
    }
}

/// Ports that are free, with those of gRPC.
fn ports() -> [u16; 4] {
    let free = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    // Tests of other runs look for ports as well, so not all begin at the same.
    let first = 20_000 + (std::process::id() % 1000) as u16 * 16;
    let mut found = (first..first + 4_000).filter(|port| free(*port) && free(port + GRPC));
    [(); 4].map(|()| found.next().expect("a free port"))
}
