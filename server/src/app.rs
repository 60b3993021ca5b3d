//! Puts the parts together in the order they need each other, and takes them apart in reverse.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use narlake_format::nix::signature::PublicKey;
use narlake_storage::bucket::{Bucket, S3Settings};
use narlake_storage::{Clock, Components, Entropy, Lake, OsEntropy, Settings, SystemClock};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::Tokens;
use crate::config::Config;
use crate::http;
use crate::http::buffers::Buffers;
use crate::metrics::Metrics;
use crate::shutdown::{self, Phase, Signals};
use crate::signing::Signers;

/// Threads for blocking work beside those that uploads keep: requests to a local bucket, of which the engine has 128
/// under way at most, steps of codecs and decoders, and the local state. They must always find one, since uploads wait
/// for what they do.
pub const BLOCKING_THREADS: usize = 512;

/// Threads that an upload keeps as long as it lasts: one hashes, one cuts.
pub const UPLOAD_THREADS: usize = 2;

/// Least time that closing the lake is given, however little requests get.
const CLOSE_MIN: Duration = Duration::from_secs(5);

/// The runtime that a server needs.
///
/// # Errors
/// Where the system gives it no threads.
pub fn runtime(config: &Config) -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(UPLOAD_THREADS * config.limits.uploads_max + BLOCKING_THREADS)
        .build()
        .context("start the runtime")
}

/// What a server is made of that is not settings.
pub struct Parts {
    /// The bucket.
    pub bucket: Bucket,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
    /// The source of keys and unique names.
    pub entropy: Arc<dyn Entropy>,
    /// Where everything is counted.
    pub metrics: Metrics,
}

impl Parts {
    /// The parts that the settings ask for.
    ///
    /// # Errors
    /// Where the bucket cannot be opened.
    pub fn of(config: &Config) -> anyhow::Result<Self> {
        let metrics = Metrics::new();
        let bucket = bucket(config, &metrics)?;
        Ok(Self { bucket, clock: Arc::new(SystemClock), entropy: Arc::new(OsEntropy), metrics })
    }
}

/// A server that is running.
pub struct App {
    address: SocketAddr,
    public_keys: Vec<PublicKey>,
    lake: Lake,
    stop: CancellationToken,
    serving: JoinHandle<()>,
    commits: TaskTracker,
    drain: Duration,
}

impl App {
    /// Opens the lake and starts to serve it.
    ///
    /// # Errors
    /// Where a part cannot be had: a file, the bucket, the state, the address.
    pub async fn start(config: &Config, parts: Parts) -> anyhow::Result<Self> {
        let tokens = Tokens::open(&config.auth.push_token_files)?;
        tokens.guard(config.listen, config.insecure)?;
        let signers = Signers::open(&config.cache.signing_key_files, &config.data_dir, parts.entropy.as_ref())?;
        let public_keys = signers.public_keys();
        // Before the lake is opened: a second server by mistake should fail here, not at the state's lock.
        let listener =
            TcpListener::bind(config.listen).await.with_context(|| format!("listen on {}", config.listen))?;
        let address = listener.local_addr().context("listen")?;

        let mut run = [0; 4];
        parts.entropy.fill(&mut run);
        let metrics = parts.metrics.clone();
        let lake = open(config, parts).await?;
        let name = &config.cache.name;
        let cache = if config.cache.signing_key_files.is_empty() {
            let own = lake.default_cache(name, &public_keys).await;
            own.context("open the cache; name a key of it with cache.signing_key_files, or this server's to add it")?
        } else {
            lake.default_cache_adding(name, &public_keys).await.context("open the cache")?
        };
        let commits = TaskTracker::new();
        let shared = Arc::new(http::State {
            lake: lake.clone(),
            cache,
            cache_name: config.cache.name.clone(),
            priority: config.cache.priority,
            signers,
            tokens,
            limits: config.limits.clone(),
            uploads: Semaphore::new(config.limits.uploads_max),
            downloads: Arc::new(Semaphore::new(config.limits.downloads_max)),
            pack_url_valid: (config.s3.pack_url_s > 0).then(|| Duration::from_secs(config.s3.pack_url_s)),
            pushes: Buffers::new(config.limits.buffers_bytes_max, config.limits.hold()),
            answers: Buffers::new(config.limits.buffers_bytes_max, config.limits.wait()),
            logs: Semaphore::new(http::log::READS_MAX),
            commits: commits.clone(),
            metrics: metrics.clone(),
            run: u32::from_le_bytes(run),
        });
        let stop = CancellationToken::new();
        let router = http::router(&shared);
        let serving = http::serve::serve(listener, router, config.limits.clone(), metrics, stop.clone());
        let serving = tokio::spawn(serving);
        Ok(Self { address, public_keys, lake, stop, serving, commits, drain: config.limits.drain() })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// What clients put into `trusted-public-keys`.
    #[must_use]
    pub fn public_keys(&self) -> &[PublicKey] {
        &self.public_keys
    }

    /// Lets requests and commits under way end, within `limits.drain_s`, then closes the lake, within as long again.
    /// What does not end in time is left, and said in the log.
    ///
    /// # Errors
    /// Where something that was accepted could not be kept; what was answered 2xx is not affected.
    pub async fn stop(self) -> anyhow::Result<()> {
        let until = Instant::now() + self.drain;
        self.stop.cancel();
        self.serving.await.context("serve")?;
        self.commits.close();
        if tokio::time::timeout_at(until, self.commits.wait()).await.is_err() {
            tracing::warn!(commits = self.commits.len(), "leaving commits that did not end in time");
        }
        let lake = self.lake;
        match shutdown::in_time(self.drain.max(CLOSE_MIN), async move { lake.close().await }).await {
            Some(closed) => closed.context("close the lake"),
            None => {
                tracing::warn!(
                    "leaving the lake open: its bucket or disk does not answer; the next start takes longer"
                );
                Ok(())
            }
        }
    }
}

/// `narlake-server serve`: runs until told to stop.
///
/// # Errors
/// Where it cannot start, or not stop cleanly.
pub async fn serve(config: &Config) -> anyhow::Result<()> {
    let mut signals = Signals::listen().context("listen for signals")?;
    let parts = Parts::of(config)?;
    let bucket = parts.bucket.name().to_owned();
    let app = App::start(config, parts).await?;
    announce(&app);
    let pushing = if config.auth.push_token_files.is_empty() { "open to all" } else { "by token" };
    tracing::info!(
        url = format!("http://{}", app.address()),
        bucket,
        cache = config.cache.name,
        pushing,
        version = env!("CARGO_PKG_VERSION"),
        "serving"
    );
    shutdown::notify(Phase::Ready);

    let signal = signals.next().await;
    tracing::info!(signal, "stopping");
    shutdown::notify(Phase::Stopping);
    tokio::select! {
        stopped = app.stop() => stopped?,
        signal = signals.next() => anyhow::bail!("{signal} again: not waiting for requests under way"),
    }
    tracing::info!("stopped");
    Ok(())
}

/// Prints what a person, or a script that started the server, needs to use it.
#[expect(clippy::print_stdout, reason = "for the one who started it, whatever the log is set to")]
fn announce(app: &App) {
    println!("serving http://{}", app.address());
    let keys: Vec<String> = app.public_keys().iter().map(PublicKey::to_string).collect();
    println!("trusted-public-keys = {}", keys.join(" "));
}

/// `narlake-server reindex`: rebuilds the local state from the bucket.
///
/// # Errors
/// Where bucket or state do not serve.
pub async fn reindex(config: &Config) -> anyhow::Result<()> {
    let parts = Parts::of(config)?;
    Lake::set_state_aside(&config.state_dir()).context("set the state aside")?;
    let lake = open(config, parts).await?;
    let stats = lake.stats().context("count what there is")?;
    tracing::info!(packs = stats.packs, stored_bytes = stats.stored_bytes, "state rebuilt");
    lake.close().await.context("close the lake")
}

async fn open(config: &Config, parts: Parts) -> anyhow::Result<Lake> {
    let defaults = Settings::default();
    let settings = Settings {
        state_dir: config.state_dir(),
        zstd_level: config.storage.zstd_level,
        cpu_threads: match config.storage.cpu_threads {
            0 => defaults.cpu_threads,
            threads => threads,
        },
        seal_after: Duration::from_millis(config.storage.seal_after_ms),
        nar_size_max: config.limits.nar_bytes_max,
        ..defaults
    };
    let components = Components {
        bucket: parts.bucket,
        clock: parts.clock,
        entropy: parts.entropy,
        metrics: parts.metrics.storage().clone(),
    };
    Lake::open(settings, components).await.context("open the lake")
}

fn bucket(config: &Config, metrics: &Metrics) -> anyhow::Result<Bucket> {
    let metrics = metrics.storage();
    if config.s3.bucket.is_empty() {
        return Bucket::local(&config.bucket_dir(), metrics).context("open the bucket");
    }
    let given = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
    let settings = S3Settings {
        bucket: config.s3.bucket.clone(),
        prefix: given(&config.s3.prefix),
        endpoint: given(&config.s3.endpoint),
        region: given(&config.s3.region),
        access_key_id: config.credentials.access_key_id.clone(),
        secret_access_key: config.credentials.secret_access_key.clone(),
        session_token: config.credentials.session_token.clone(),
    };
    Bucket::s3(&settings, metrics).context("open the bucket")
}
