//! Views handed on to containers and virtual machines, as docs/containers-and-vms.md says.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use narlake_format::api::control::{ControlRequest, ControlResponse, ViewSpec};

use crate::control::Client;
use crate::kit::{World, dir, file, outside};

/// Longest wait for a process.
const LIMIT: Duration = Duration::from_secs(20);

/// A process that ends with the test.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn sh(script: &str, arguments: &[&Path]) -> Command {
    let mut command = Command::new("unshare");
    command.args(["-m", "--propagation", "slave", "sh", "-ec", script, "sh"]).args(arguments);
    command
}

/// A root directory of tmpfs, with the host's programs, into which a container goes.
const ENTER: &str = r#"
root=$1; mount -t tmpfs none "$root"; cd "$root"
mkdir -p nix/store views usr old proc dev; mount --rbind /proc proc; mount --rbind /dev dev; ln -s usr/bin bin; ln -s usr/lib lib; ln -s usr/lib64 lib64; mount --bind /usr usr
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_container_has_a_view_bound_into_it() {
    let world = World::new().await;
    let path = world.push("bound", &dir([("f", file("bound"))]), &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let root = world.dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let script = format!(
        r#"{ENTER}
        mount --bind "$2" nix/store; pivot_root . old; umount -l /old
        cat /nix/store/{path}/f; if touch /nix/store/x 2>/dev/null; then exit 9; fi"#
    );
    let done = {
        let (root, mount) = (root.clone(), mounted.mount.clone());
        outside(move || sh(&script, &[&root, &mount]).output().unwrap()).await
    };
    assert_eq!((done.status.code(), done.stdout.as_slice()), (Some(0), b"bound".as_slice()), "{done:?}");
    mounted.stop().await;
}

/// The directory of the views is shared, and bound with rslave: what is mounted later shows up, what is unmounted goes.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_sees_views_that_are_made_later() {
    let world = World::new().await;
    let path = world.push("later", &dir([("f", file("later"))]), &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let (root, views) = (world.dir.path().join("root"), world.dir.path().join("views"));
    fs::create_dir(&root).unwrap();
    fs::create_dir(&views).unwrap();
    for arguments in [["--bind", views.to_str().unwrap()].as_slice(), &["--make-shared"]] {
        assert!(Command::new("mount").args(arguments).arg(&views).status().unwrap().success());
    }
    let script = format!(
        r#"{ENTER}
        mount --rbind "$2" views; mount --make-rslave views; pivot_root . old; umount -l /old; echo in
        until cat /views/job/{path}/f 2>/dev/null; do sleep 0.05; done; echo
        while test -e /views/job/{path}; do sleep 0.05; done; echo gone"#
    );
    let container = sh(&script, &[&root, &views]).stdout(Stdio::piped()).spawn().unwrap();
    let mut container = Ends(container);
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(container.0.stdout.take().unwrap()));
    let (send, said) = std::sync::mpsc::channel();
    std::thread::spawn(move || lines.by_ref().map_while(Result::ok).try_for_each(|line| send.send(line)));
    let said = std::sync::Arc::new(std::sync::Mutex::new(said));
    let next = || {
        let said = std::sync::Arc::clone(&said);
        outside(move || said.lock().unwrap().recv_timeout(LIMIT).unwrap())
    };
    assert_eq!(next().await, "in");
    let mut client = Client::connect(&mounted.dir).await;
    let spec =
        ViewSpec { name: "job".into(), mount: views.join("job"), roots: vec![], token_file: None, nix_socket: None };
    let made = client.ask(ControlRequest::ViewCreate(spec)).await;
    assert!(matches!(made, ControlResponse::View(_)), "{made:?}");
    assert_eq!(next().await, "later");
    let until = Instant::now() + LIMIT;
    let destroy = ControlRequest::ViewDestroy { name: "job".into(), lazy: false };
    // Busy for as long as the container looks at it just then.
    while client.ask(destroy.clone()).await != ControlResponse::Done {
        assert!(Instant::now() < until, "the view is never idle");
    }
    assert_eq!(next().await, "gone");
    drop(client);
    mounted.stop().await;
}

/// virtiofsd starts on a view, in its sandbox, and answers a vhost-user front end. No guest is needed for that, and none
/// is run: what lies behind the handshake is virtiofsd reading the directory, like any process of this host.
#[tokio::test(flavor = "multi_thread")]
async fn virtiofsd_starts_on_a_view() {
    let Some(virtiofsd) = virtiofsd() else {
        eprintln!("SKIP: no virtiofsd");
        return;
    };
    let world = World::new().await;
    world.push("guest", &file("guest"), &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let socket = world.dir.path().join("vhost.sock");
    let source = format!("source={}", mounted.mount.display());
    let mut command = Command::new(virtiofsd);
    command.arg(format!("--socket-path={}", socket.display()));
    command.args(["-o", &source, "-o", "sandbox=namespace,cache=always,xattr"]);
    let mut running = Ends(command.stderr(Stdio::piped()).spawn().unwrap());
    let until = Instant::now() + LIMIT;
    let mut stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let answer = outside(move || {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        // VHOST_USER_GET_FEATURES, version 1, no payload; the answer carries 64 bits.
        stream.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        let mut answer = [0; 20];
        stream.read_exact(&mut answer).unwrap();
        answer
    });
    let answer = answer.await;
    assert_eq!((answer[0], answer[4] & 0b111, answer[8]), (1, 0b101, 8), "{answer:?}");
    // VIRTIO_F_VERSION_1, bit 32.
    assert_eq!(answer[16] & 1, 1);
    let _ = running.0.kill();
    drop(running);
    mounted.stop().await;
}

fn virtiofsd() -> Option<PathBuf> {
    let named = std::env::var_os("NARLAKE_VIRTIOFSD").map(PathBuf::from);
    named.or_else(|| {
        ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"].map(PathBuf::from).into_iter().find(|at| at.exists())
    })
}
