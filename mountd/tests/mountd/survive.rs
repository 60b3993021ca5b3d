//! Daemons that die, hang or are replaced under a supervisor: readers wait, and see nothing else.
//!
//! The supervisor is the real program. The daemons are this test program, started again by it with a lake of its own in
//! memory: what is pushed is the same each time, so that they are one daemon to the kernel.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use narlake_format::api::control::{ControlRequest, ControlResponse, MountStatus};
use narlake_format::lake::record::PathRecord;
use narlake_format::nix::realisation::{Realisation, RealisationKey};
use narlake_format::nix::store_path::StorePathHash;
use narlake_mountd::app::{Daemon, Sources};
use narlake_mountd::mounter::Mounter;
use narlake_mountd::remote::RemoteError;
use narlake_mountd::shutdown::StopSignals;
use narlake_mountd::view::RecordSource;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::kit::{World, can_mount, dir, file, noise, unmount_below};

/// Set for a daemon: where everything is.
const PLACE: &str = "NARLAKE_TEST_DAEMON";

/// Bounds every wait of these tests.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of the file that readers check.
const BIG: usize = 3_000_000;

/// A source of records that kills whoever asks for one of them.
struct Deadly(Arc<dyn RecordSource>);

#[async_trait]
impl RecordSource for Deadly {
    async fn lookup(&self, hash: &StorePathHash) -> Result<Option<PathRecord>, RemoteError> {
        if *hash == World::path("poison").hash {
            std::process::abort();
        }
        if *hash == World::path("slow").hash {
            tokio::time::sleep(Duration::from_millis(1500)).await;
        }
        self.0.lookup(hash).await
    }

    async fn closure(
        &self,
        roots: &[StorePathHash],
        on: &mut (dyn FnMut(PathRecord) + Send),
    ) -> Result<Vec<StorePathHash>, RemoteError> {
        self.0.closure(roots, on).await
    }

    async fn realisation(&self, key: &RealisationKey) -> Result<Option<Realisation>, RemoteError> {
        self.0.realisation(key).await
    }
}

/// Not a test by itself: what the supervisor starts.
#[test]
fn daemon_process() {
    let Some(place) = std::env::var_os(PLACE).map(PathBuf::from) else { return };
    if place.join("broken").exists() {
        std::process::exit(1);
    }
    if fs::remove_file(place.join("stuck")).is_ok() {
        std::thread::park_timeout(PATIENCE);
    }
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let done = runtime.block_on(daemon(&place));
    std::mem::forget(runtime);
    // At once: what is under way is the next one's.
    std::process::exit(i32::from(done.is_err()));
}

async fn daemon(place: &Path) -> anyhow::Result<()> {
    let world = World::new().await;
    world.push("small", &dir([("a", file("small")), ("b", file("other"))]), &[]).await;
    world.push("big", &file(noise(7, BIG)), &[]).await;
    world.push("slow", &file("at last"), &[]).await;
    let mut config = world.config();
    let at = |name: &str| place.join(name);
    (config.mount, config.cache_dir) = (at("mnt"), at("cache"));
    (config.nix_socket, config.control) = (at("nix.sock"), at("control.sock"));
    let mut signals = StopSignals::new()?;
    let takeover = std::env::var_os("NARLAKE_TEST_TAKEOVER").is_some();
    let socket = at("mounts.sock");
    let mounter = tokio::task::spawn_blocking(move || Mounter::supervised(&socket, takeover)).await??;
    let sources = Sources {
        blobs: Arc::clone(&world.source) as _,
        records: Arc::new(Deadly(Arc::clone(&world.source) as _)),
        keys: world.trusted(),
        key_names: vec!["test-1".into()],
        connect: world.connect(),
    };
    let daemon = Daemon::start(&config, mounter, sources, &world.metrics).await?;
    let mut ended = daemon.ended();
    tokio::select! {
        _ = signals.next() => {}
        _ = ended.wait_for(|ended| *ended) => {}
    }
    daemon.stop().await
}

/// A supervisor with its daemons.
struct Rig {
    dir: TempDir,
    supervisor: Child,
}

impl Rig {
    fn new(patience_s: u32, silence_s: u32, prefix: &[&str]) -> Option<Self> {
        if !can_mount() {
            return None;
        }
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let log = File::create(dir.path().join("log")).unwrap();
        let test = std::env::current_exe().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_narlake-mounts"));
        command.arg("--socket").arg(dir.path().join("mounts.sock"));
        command.args([format!("--patience-s={patience_s}"), format!("--silence-s={silence_s}"), "--".into()]);
        command.args(prefix).arg(test).args(["survive::daemon_process", "--exact", "--nocapture"]);
        command.env(PLACE, dir.path()).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let rig = Self { supervisor: command.spawn().unwrap(), dir };
        rig.wait_for("a daemon", || rig.status().is_some());
        Some(rig)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn of(&self, name: &str) -> PathBuf {
        self.at("mnt").join(World::path(name).to_string())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.at("log")).unwrap()
    }

    fn wait_for(&self, what: &str, mut done: impl FnMut() -> bool) {
        let until = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < until, "waited for {what}: {}", self.log());
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }

    fn ask(&self, request: &ControlRequest) -> Option<ControlResponse> {
        let mut stream = UnixStream::connect(self.at("control.sock")).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        stream.write_all(format!("{}\n", serde_json::to_string(request).ok()?).as_bytes()).ok()?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).ok()?;
        serde_json::from_str(&answer).ok()
    }

    fn status(&self) -> Option<MountStatus> {
        match self.ask(&ControlRequest::Status)? {
            ControlResponse::Status(status) => Some(*status),
            _ => None,
        }
    }

    fn pid(&self) -> u32 {
        self.status().unwrap().pid
    }

    fn signal(&self, pid: u32, signal: Signal) {
        let _ = kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal);
    }

    /// Kills the daemon, and waits for another one.
    fn kill(&self) {
        let pid = self.pid();
        self.signal(pid, Signal::KILL);
        self.wait_for("another daemon", || self.status().is_some_and(|status| status.pid != pid));
    }

    fn overlay(&self) -> PathBuf {
        let at = |name: &str| self.at("job").join(name);
        fs::create_dir_all(at("merged")).unwrap();
        let up = ControlRequest::OverlayUp { upper: at("u"), work: at("w"), merged: at("merged"), view: None };
        match self.ask(&up).unwrap() {
            ControlResponse::Overlay(info) => info.merged,
            other => panic!("{other:?}: {}", self.log()),
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.signal(self.supervisor.id(), Signal::TERM);
        let until = Instant::now() + Duration::from_secs(20);
        while matches!(self.supervisor.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::park_timeout(Duration::from_millis(10));
        }
        let _ = self.supervisor.kill();
        let _ = self.supervisor.wait();
        unmount_below(self.dir.path());
    }
}

/// People who read all the time.
struct Readers {
    stop: Arc<AtomicBool>,
    /// Operations so far, and the longest of them in microseconds.
    count: Arc<AtomicU64>,
    longest: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Vec<String>>>,
}

impl Readers {
    /// Through each of these directories: what is there, what is not, a listing, and content that the kernel has dropped.
    fn start(stores: &[PathBuf]) -> Self {
        let (stop, count, longest) = (Arc::default(), Arc::default(), Arc::default());
        let threads = stores.iter().map(|store| {
            let (stop, count, longest): (Arc<AtomicBool>, Arc<AtomicU64>, Arc<AtomicU64>) =
                (Arc::clone(&stop), Arc::clone(&count), Arc::clone(&longest));
            let store = store.clone();
            std::thread::spawn(move || {
                let big = noise(7, BIG);
                let mut errors = Vec::new();
                let mut round = 0_u64;
                while !stop.load(Ordering::SeqCst) {
                    let began = Instant::now();
                    if let Err(error) = read_all(&store, &big, round) {
                        errors.push(error);
                    }
                    let took = u64::try_from(began.elapsed().as_micros()).unwrap();
                    longest.fetch_max(took, Ordering::SeqCst);
                    count.fetch_add(1, Ordering::SeqCst);
                    round += 1;
                }
                errors
            })
        });
        let threads = threads.collect();
        Self { stop, count, longest, threads }
    }

    /// How many operations there were. Every one must have been right.
    fn finish(self) -> (u64, Duration) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads {
            let errors = thread.join().unwrap();
            assert!(errors.is_empty(), "{} errors, the first: {}", errors.len(), errors[0]);
        }
        (self.count.load(Ordering::SeqCst), Duration::from_micros(self.longest.load(Ordering::SeqCst)))
    }
}

fn read_all(store: &Path, big: &[u8], round: u64) -> Result<(), String> {
    use std::os::unix::fs::FileExt;
    let failed = |what: &str, error: std::io::Error| format!("{what} in {}: {error}", store.display());
    let at = |name: &str| store.join(World::path(name).to_string());
    let small = fs::read(at("small").join("a")).map_err(|error| failed("read a", error))?;
    let listed = fs::read_dir(at("small")).map_err(|error| failed("list", error))?.count();
    let absent = fs::metadata(at(&format!("absent-{round}"))).err().map(|error| error.kind());
    let opened = File::open(at("big")).map_err(|error| failed("open", error))?;
    rustix::fs::fadvise(&opened, 0, None, rustix::fs::Advice::DontNeed).map_err(|e| failed("forget", e.into()))?;
    let offset = round.wrapping_mul(7919 * 4096) % (BIG as u64 - 5000);
    let mut bytes = [0; 5000];
    opened.read_exact_at(&mut bytes, offset).map_err(|error| failed("read big", error))?;
    let from = usize::try_from(offset).unwrap();
    match () {
        () if small != b"small" || listed != 2 => Err(format!("{small:?}, {listed} listed")),
        () if absent != Some(std::io::ErrorKind::NotFound) => Err(format!("absent: {absent:?}")),
        () if bytes != big[from..from + 5000] => Err(format!("wrong bytes at {offset}")),
        () => Ok(()),
    }
}

fn read(path: PathBuf) -> JoinHandle<std::io::Result<Vec<u8>>> {
    std::thread::spawn(move || fs::read(path))
}

/// The heart of it: readers through the mount and through an overlay, a look-up under way, and a daemon that is killed again
/// and again.
#[test]
fn kill_9_is_a_pause() {
    let Some(rig) = Rig::new(30, 15, &[]) else { return };
    let merged = rig.overlay();
    let readers = Readers::start(&[rig.at("mnt"), merged.clone()]);
    let slow = read(rig.of("slow"));
    std::thread::park_timeout(Duration::from_millis(300));
    rig.kill();
    // Two deaths would make it a suspect.
    assert_eq!(slow.join().unwrap().unwrap(), b"at last");
    for _ in 1..10 {
        rig.kill();
    }
    let (rounds, longest) = readers.finish();
    eprintln!("10 kills, {rounds} rounds of reading, longest {} ms", longest.as_millis());
    assert!(rounds > 20 && longest < Duration::from_secs(10), "{rounds} rounds, {longest:?}");
    // The overlay is still in care, and writable.
    assert_eq!(rig.status().unwrap().overlays.len(), 1);
    fs::write(merged.join("new"), b"x").unwrap();
    let down = ControlRequest::OverlayDown { merged, lazy: false };
    assert_eq!(rig.ask(&down), Some(ControlResponse::Done), "{}", rig.log());
    assert!(rig.log().contains("going on with the mount of an earlier daemon"));
}

/// What did not exist through an overlay before a daemon died is seen when it does, though nobody remembers having said so.
#[test]
fn names_that_a_dead_daemon_denied_are_healed() {
    let Some(rig) = Rig::new(30, 15, &[]) else { return };
    let merged = rig.overlay();
    let name = World::path("absent").to_string();
    assert!(fs::metadata(merged.join(&name)).is_err());
    rig.kill();
    // Nobody remembers having denied it, so it has to be looked for: whoever calls a path valid finds it owed.
    rig.wait_for("the overlay", || rig.log().contains("overlay in care again"));
    assert_eq!(rig.status().unwrap().overlays.len(), 1);
}

/// A request that kills every daemon is tried twice and then fails; everybody else goes on.
#[test]
fn a_poison_request_is_answered_with_an_error() {
    let Some(rig) = Rig::new(30, 15, &[]) else { return };
    let readers = Readers::start(&[rig.at("mnt")]);
    let poisoned = read(rig.of("poison"));
    rig.wait_for("the poison to be found", || rig.log().contains("daemons have died with this request"));
    let error = poisoned.join().unwrap().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{error}");
    rig.wait_for("a daemon", || rig.status().is_some());
    let (rounds, _) = readers.finish();
    assert!(rounds > 0);
}

/// Daemons that do not come: readers get errors after the time that was set, and bytes again once one comes.
#[test]
fn a_daemon_that_never_comes_ends_in_errors() {
    let Some(rig) = Rig::new(1, 15, &[]) else { return };
    let merged = rig.overlay();
    assert_eq!(fs::read(rig.of("small").join("a")).unwrap(), b"small");
    fs::write(rig.at("broken"), "").unwrap();
    // One that dies within a second has not come.
    std::thread::park_timeout(Duration::from_millis(1100));
    // With one look-up read by the daemon that dies, and not answered.
    let slow = read(rig.of("slow"));
    std::thread::park_timeout(Duration::from_millis(300));
    rig.signal(rig.pid(), Signal::KILL);
    let began = Instant::now();
    for path in [rig.of("big"), merged.join(World::path("big").to_string())] {
        let error = read(path).join().unwrap().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{error}");
    }
    assert!(slow.join().unwrap().is_err());
    assert!(began.elapsed() > Duration::from_millis(900) && began.elapsed() < Duration::from_secs(20));
    // What the kernel has is read on.
    assert_eq!(fs::read(rig.of("small").join("a")).unwrap(), b"small");
    fs::remove_file(rig.at("broken")).unwrap();
    rig.wait_for("a daemon", || rig.status().is_some());
    assert_eq!(fs::read(rig.of("big")).unwrap(), noise(7, BIG));
    assert_eq!(fs::read(rig.of("slow")).unwrap(), b"at last");
}

/// A daemon that has stopped turning over is killed, and replaced.
#[test]
fn a_daemon_that_hangs_is_killed() {
    let Some(rig) = Rig::new(30, 1, &[]) else { return };
    let readers = Readers::start(&[rig.at("mnt")]);
    let pid = rig.pid();
    rig.signal(pid, Signal::STOP);
    rig.wait_for("another daemon", || {
        rig.log().contains("does not answer any more, killed") && rig.status().is_some_and(|status| status.pid != pid)
    });
    readers.finish();
}

/// One that hangs before it has asked for the mounts beats for nobody, and is killed and replaced all the same.
#[test]
fn a_daemon_that_hangs_at_its_start_is_killed() {
    let Some(rig) = Rig::new(1, 15, &[]) else { return };
    fs::write(rig.at("stuck"), "").unwrap();
    rig.kill();
    assert!(rig.log().contains("the daemon that was started here does not come, killed"), "{}", rig.log());
    assert!(!rig.at("stuck").exists());
    assert_eq!(fs::read(rig.of("small").join("a")).unwrap(), b"small");
}

/// Somebody detaches the mount while it is in use: the next daemon mounts it anew. What is mounted over it is no loss.
#[test]
fn a_detached_mount_is_made_anew() {
    let Some(rig) = Rig::new(30, 5, &[]) else { return };
    let (mount, over, pid) = (rig.at("mnt"), rig.at("over"), rig.pid());
    fs::create_dir(&over).unwrap();
    rustix::mount::mount_bind(&over, &mount).unwrap();
    let looked = Instant::now() + Duration::from_secs(4);
    rig.wait_for("some beats", || Instant::now() > looked);
    assert_eq!(rig.pid(), pid, "{}", rig.log());
    rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::empty()).unwrap();
    let held = File::open(rig.of("big")).unwrap();
    rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH).unwrap();
    rig.wait_for("another daemon", || rig.status().is_some_and(|status| status.pid != pid));
    assert_eq!(fs::read(rig.of("small").join("a")).unwrap(), b"small");
    assert!(rig.log().contains("a mount was taken away; it is made anew"), "{}", rig.log());
    drop(held);
}

/// An upgrade: the new daemon asks for the mounts, the old one goes in order.
#[test]
fn a_takeover_is_a_pause() {
    let Some(rig) = Rig::new(30, 15, &[]) else { return };
    let merged = rig.overlay();
    let readers = Readers::start(&[rig.at("mnt"), merged]);
    let old = rig.pid();
    let start = |takeover: bool| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["survive::daemon_process", "--exact", "--nocapture"]).env(PLACE, rig.dir.path());
        if takeover {
            command.env("NARLAKE_TEST_TAKEOVER", "1");
        }
        command.stdout(Stdio::null()).spawn().unwrap()
    };
    // Without being told to, nobody takes anything over.
    let status = start(false).wait().unwrap();
    assert!(!status.success());
    let mut new = start(true);
    rig.wait_for("the new daemon", || rig.status().is_some_and(|status| status.pid == new.id()));
    readers.finish();
    assert_eq!(rig.status().unwrap().overlays.len(), 1);
    assert!(!Path::new(&format!("/proc/{old}/exe")).exists());
    rig.signal(new.id(), Signal::KILL);
    new.wait().unwrap();
    // Now the supervisor starts one of its own again.
    rig.wait_for("a daemon", || rig.status().is_some_and(|status| status.pid != old));
}

/// A daemon in a mount namespace of its own, as a hardened service has it, mounts for everybody.
#[test]
fn a_daemon_in_its_own_namespace_mounts_for_all() {
    let Some(rig) = Rig::new(30, 15, &["unshare", "--mount", "--propagation", "slave"]) else { return };
    let merged = rig.overlay();
    assert_eq!(fs::read(rig.of("small").join("a")).unwrap(), b"small");
    assert_eq!(fs::read(merged.join(World::path("small").to_string()).join("b")).unwrap(), b"other");
    rig.kill();
    assert_eq!(fs::read(rig.of("big")).unwrap(), noise(7, BIG));
    let down = ControlRequest::OverlayDown { merged: merged.clone(), lazy: false };
    assert_eq!(rig.ask(&down), Some(ControlResponse::Done), "{}", rig.log());
    assert!(narlake_mountd::mountinfo::mount_on(&merged).unwrap().is_none());
}

/// A connection that is aborted by force is mounted anew by the next daemon; overlays over the old one are let go of.
#[test]
fn an_aborted_connection_is_mounted_anew() {
    let Some(rig) = Rig::new(30, 15, &[]) else { return };
    rig.overlay();
    let pid = rig.pid();
    // Held open, so that the mount is busy: what is forced then is the end of the connection.
    let held = File::open(rig.at("mnt")).unwrap();
    let _ = rustix::mount::unmount(rig.at("mnt"), rustix::mount::UnmountFlags::FORCE);
    rig.wait_for("another daemon", || rig.status().is_some_and(|status| status.pid != pid));
    drop(held);
    assert_eq!(fs::read(rig.of("small").join("a")).unwrap(), b"small");
    assert_eq!(rig.status().unwrap().overlays.len(), 0);
    assert!(rig.log().contains("a connection was aborted"));
}

/// A sealed view reads on while there is no daemon, as far as its content is cached; the next one answers for the rest.
#[test]
fn sealed_views_survive() {
    let Some(rig) = Rig::new(30, 15, &[]) else { return };
    let merged = rig.at("sealed");
    fs::create_dir_all(&merged).unwrap();
    let roots = ["small", "big"].map(|name| World::path(name).to_string()).to_vec();
    let up = ControlRequest::SealedUp { roots, upper: None, work: None, merged: merged.clone() };
    assert!(matches!(rig.ask(&up), Some(ControlResponse::Overlay(_))), "{}", rig.log());
    let small = merged.join(World::path("small").to_string());
    assert_eq!(fs::read(small.join("a")).unwrap(), b"small");
    let pid = rig.pid();
    rig.signal(pid, Signal::STOP);
    // Looked at and read for the first time while nobody answers: all but its content is with the kernel.
    assert_eq!(fs::read_dir(&small).unwrap().count(), 2);
    assert_eq!(fs::read(small.join("a")).unwrap(), b"small");
    rig.signal(pid, Signal::KILL);
    rig.wait_for("another daemon", || rig.status().is_some_and(|status| status.pid != pid));
    assert_eq!(rig.status().unwrap().overlays.len(), 1);
    assert_eq!(fs::read(merged.join(World::path("big").to_string())).unwrap(), noise(7, BIG));
    assert_eq!(fs::read(small.join("b")).unwrap(), b"other");
    let down = ControlRequest::OverlayDown { merged: merged.clone(), lazy: false };
    assert_eq!(rig.ask(&down), Some(ControlResponse::Done), "{}", rig.log());
    assert!(narlake_mountd::mountinfo::mount_on(&merged).unwrap().is_none());
}

/// Whoever stops the supervisor means it: nothing stays mounted.
#[test]
fn the_supervisor_takes_everything_down() {
    let Some(mut rig) = Rig::new(30, 15, &[]) else { return };
    let merged = rig.overlay();
    rig.signal(rig.supervisor.id(), Signal::TERM);
    assert!(rig.supervisor.wait().unwrap().success());
    for place in [rig.at("mnt"), merged] {
        assert!(narlake_mountd::mountinfo::mount_on(&place).unwrap().is_none(), "{}: {}", place.display(), rig.log());
    }
    assert!(!rig.at("mounts.sock").exists());
}
