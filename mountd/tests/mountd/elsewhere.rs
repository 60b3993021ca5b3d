//! Overlays of other mount namespaces, handed over through the control socket.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use narlake_format::api::control::{ControlErrorKind, ControlRequest, ControlResponse};
use narlake_mountd::mountinfo;
use rustix::fs::{CWD, Mode, OFlags, open};
use rustix::mount::{
    MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, open_tree, unmount,
};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::kit::{World, file, outside};

/// A thread with a mount namespace of its own. Both end with this.
struct Elsewhere(mpsc::Sender<Box<dyn FnOnce() + Send>>);

impl Elsewhere {
    fn new() -> Self {
        let (work, works) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        std::thread::spawn(move || {
            #[expect(deprecated, reason = "unsound for the table of descriptors alone, which stays shared")]
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNS).unwrap();
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            works.iter().for_each(|work| work());
        });
        Self(work)
    }

    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        self.0.send(Box::new(move || drop(done.send(work())))).unwrap();
        outside(move || result.recv_timeout(Duration::from_secs(30)).unwrap()).await
    }
}

/// As `narlake overlay` asks, from the namespace of the thread that calls this.
fn ask(dir: &Path, request: &ControlRequest, descriptors: &[OwnedFd]) -> ControlResponse {
    let mut stream = UnixStream::connect(dir.join("control.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let line = format!("{}\n", serde_json::to_string(request).unwrap());
    let (first, rest) = line.as_bytes().split_at(5);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    assert_eq!(sendmsg(&stream, &[IoSlice::new(first)], &mut control, SendFlags::empty()), Ok(5));
    stream.write_all(rest).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

fn handed(merged: &Path) -> Vec<OwnedFd> {
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, merged, clone).unwrap();
    let root = open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    vec![File::open("/proc/thread-self/mountinfo").map(Into::into).unwrap(), tree, root]
}

/// An overlay that only this namespace sees, like the file system that its upper is on.
fn mount_overlay(lower: &Path, base: &Path) {
    let private = base.join("private");
    mount("tmpfs", &private, "tmpfs", MountFlags::empty(), None).unwrap();
    for name in ["upper", "work"] {
        fs::create_dir(private.join(name)).unwrap();
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        private.join("upper").display(),
        private.join("work").display()
    );
    let options = CString::new(options).unwrap();
    mount("overlay", base.join("merged"), "overlay", MountFlags::empty(), options.as_c_str()).unwrap();
}

fn error_of(response: ControlResponse) -> (ControlErrorKind, String) {
    match response {
        ControlResponse::Error { kind, message } => (kind, message),
        other => panic!("{other:?}"),
    }
}

/// Two containers, each with an overlay on the same path: names that did not exist show up in both.
#[tokio::test(flavor = "multi_thread")]
async fn overlays_of_other_namespaces_are_handed_over() {
    let world = World::new().await;
    let Some(mounted) = world.mount().await else { return };
    let (dir, lower) = (mounted.dir.clone(), mounted.mount.clone());
    let base = dir.join("container");
    for name in ["private", "merged"] {
        fs::create_dir_all(base.join(name)).unwrap();
    }
    let merged = base.join("merged");
    let adopt = ControlRequest::OverlayAdopt { merged: merged.clone() };
    let path = World::path("later");
    let at: PathBuf = merged.join(path.to_string());
    let namespaces = [Elsewhere::new(), Elsewhere::new()];
    for namespace in &namespaces {
        let (dir, lower, base, adopt) = (dir.clone(), lower.clone(), base.clone(), adopt.clone());
        let (at, there) = (at.clone(), merged.clone());
        let upper = base.join("private/upper");
        let response = namespace.run(move || {
            mount_overlay(&lower, &base);
            assert!(!at.exists());
            ask(&dir, &adopt, &handed(&there))
        });
        let info = match response.await {
            ControlResponse::Overlay(info) => info,
            other => panic!("{other:?}"),
        };
        assert!(info.adopted && info.merged == merged && info.upper == upper, "{info:?}");
    }
    // From here there is nothing to be seen.
    assert!(mountinfo::mount_on(&merged).unwrap().is_none());
    assert_eq!(error_of(ask(&dir, &adopt, &[])).0, ControlErrorKind::NotFound);
    let overlays = mounted.daemon.as_ref().unwrap().overlays().clone();
    assert_eq!(overlays.list().len(), 2);

    let looked = at.clone();
    namespaces[0].run(move || assert!(!looked.exists())).await;
    let looked = at.clone();
    namespaces[1].run(move || assert!(!looked.exists())).await;
    world.push("later", &file(b"x"), &[]).await;
    let view = mounted.daemon.as_ref().unwrap().view().clone();
    view.valid(&path).await.unwrap().unwrap();
    for namespace in &namespaces {
        let at = at.clone();
        namespace.run(move || assert_eq!(fs::read(at).unwrap(), b"x")).await;
    }
    // What one of them built itself needs no refresh there.
    let built = World::path("built");
    let refreshes = world.metrics.overlay_refreshes.get();
    for namespace in &namespaces {
        let at = merged.join(built.to_string());
        namespace
            .run(move || {
                assert!(!at.exists());
                fs::write(at, b"built").unwrap();
            })
            .await;
    }
    world.push("built", &file(b"built"), &[]).await;
    view.valid(&built).await.unwrap().unwrap();
    assert_eq!(world.metrics.overlay_refreshes.get(), refreshes);

    // Let go of, one by one, by whoever can unmount it.
    for (left, namespace) in [1, 0].into_iter().zip(&namespaces) {
        let (dir, merged) = (dir.clone(), merged.clone());
        let response = namespace.run(move || {
            let descriptors = handed(&merged);
            unmount(&merged, UnmountFlags::empty()).unwrap();
            ask(&dir, &ControlRequest::OverlayDown { merged, lazy: false }, &descriptors)
        });
        assert_eq!(response.await, ControlResponse::Done);
        assert_eq!(overlays.list().len(), left);
    }
    drop(view);
    mounted.stop().await;
}

/// Descriptors of something else, too few, too many: refused, and nothing is left open.
#[tokio::test(flavor = "multi_thread")]
async fn other_descriptors_are_refused() {
    let world = World::new().await;
    let Some(mounted) = world.mount().await else { return };
    let (dir, mount) = (mounted.dir.clone(), mounted.mount.clone());
    let adopt = ControlRequest::OverlayAdopt { merged: dir.clone() };
    let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
    let count = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = count();
    for descriptors in [
        vec![open("/dev/null"), open("/"), open("/")],
        vec![open("/proc/self/mountinfo"), open("/"), open("/")],
        vec![open("/proc/self/mountinfo"), open("/dev/null"), open("/dev/null")],
        vec![open("/")],
        (0..8).map(|_| open("/")).collect(),
    ] {
        let (kind, message) = error_of(ask(&dir, &adopt, &descriptors));
        assert!(matches!(kind, ControlErrorKind::NotFound | ControlErrorKind::Invalid), "{message}");
    }
    // The view itself is no overlay over itself.
    let (kind, _) = error_of(ask(&dir, &ControlRequest::OverlayAdopt { merged: mount.clone() }, &handed(&mount)));
    assert_eq!(kind, ControlErrorKind::NotFound);
    assert_eq!(
        ask(&dir, &ControlRequest::OverlayList, &handed(&mount)),
        ControlResponse::Overlays { overlays: vec![] }
    );
    let until = std::time::Instant::now() + Duration::from_secs(10);
    while count() > before {
        assert!(std::time::Instant::now() < until, "descriptors are left open");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    mounted.stop().await;
}
