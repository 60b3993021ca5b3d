//! The program itself: how it starts, stops, and what it leaves when it is killed. The server it is given is not there,
//! which it has to do without.

use std::fs::{self, File};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use narlake_mountd::mountinfo;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::kit::{can_mount, unmount_below};

/// A public key that nothing is signed with.
const KEY: &str = "test-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

struct Program {
    dir: TempDir,
    child: Option<Child>,
}

impl Program {
    /// None, with a line, where this host cannot mount.
    fn new() -> Option<Self> {
        can_mount().then(|| Self { dir: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(), child: None })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_narlake-mountd"));
        command.arg("run").args(arguments).stdin(Stdio::null()).stderr(File::create(self.at("log")).unwrap());
        for (flag, name) in
            [("--mount", "mnt"), ("--cache-dir", "cache"), ("--nix-socket", "nix.sock"), ("--control", "control.sock")]
        {
            command.arg(flag).arg(self.at(name));
        }
        command
    }

    /// Starts the program, whose server is not there, and waits for it to say that it is ready.
    fn start(&mut self) {
        self.start_with(&["--server", "http://127.0.0.1:1", "--trusted-key", KEY, "--fetch-deadline-s", "1"]);
    }

    fn start_with(&mut self, arguments: &[&str]) {
        let notify = self.at("notify");
        let _ = fs::remove_file(&notify);
        let socket = UnixDatagram::bind(&notify).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        self.child = Some(self.command(arguments).env("NOTIFY_SOCKET", &notify).spawn().unwrap());
        let mut line = [0; 64];
        let length = socket.recv(&mut line).unwrap_or_else(|error| panic!("{error}: {}", self.log()));
        assert_eq!(&line[..length], b"READY=1");
    }

    fn log(&self) -> String {
        fs::read_to_string(self.at("log")).unwrap()
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(self.child.as_ref().unwrap());
        kill_process(pid, signal).unwrap();
    }

    fn wait(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "{}", self.log());
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    fn is_mounted(&self) -> bool {
        mountinfo::mount_on(&self.at("mnt")).unwrap().is_some()
    }

    /// An overlay by our own hands, as the last daemon's would look.
    fn overlay(&self, name: &str) -> PathBuf {
        let base = self.at(name);
        for part in ["upper", "work", "merged"] {
            fs::create_dir_all(base.join(part)).unwrap();
        }
        base.join("merged")
    }

    fn control(&self, line: &str) -> String {
        use std::io::{BufRead, BufReader, Write};
        let mut stream = std::os::unix::net::UnixStream::connect(self.at("control.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        writeln!(stream, "{line}").unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        answer
    }

    fn overlay_up(&self, merged: &Path) -> String {
        let base = merged.parent().unwrap();
        let path = |name: &str| base.join(name).display().to_string();
        self.control(&format!(
            r#"{{"op":"overlay-up","upper":"{}","work":"{}","merged":"{}"}}"#,
            path("upper"),
            path("work"),
            path("merged")
        ))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        unmount_below(self.dir.path());
    }
}

#[test]
fn signals_end_it_in_order() {
    for signal in [Signal::TERM, Signal::INT] {
        let Some(mut program) = Program::new() else { return };
        program.start();
        assert!(program.is_mounted());
        let merged = program.overlay("job");
        let answer = program.overlay_up(&merged);
        assert!(answer.contains(r#""result":"overlay""#), "{answer}");
        program.signal(signal);
        let status = program.wait();
        assert!(status.success(), "{status}: {}", program.log());
        assert!(!program.is_mounted() && mountinfo::mount_on(&merged).unwrap().is_none());
        let mark = fs::read_to_string(program.at("cache/boot")).unwrap();
        assert!(mark.ends_with(" clean\n"), "{mark}");
    }
}

/// Somebody sits in the mount: it goes all the same, in time, and says so.
#[test]
fn a_busy_mount_is_detached() {
    let Some(mut program) = Program::new() else { return };
    program.start();
    let held = File::open(program.at("mnt")).unwrap();
    program.signal(Signal::TERM);
    let status = program.wait();
    assert!(status.success(), "{status}: {}", program.log());
    assert!(!program.is_mounted());
    assert!(program.log().contains("in use"), "{}", program.log());
    drop(held);
}

/// A server that takes questions and never answers, with people waiting for it: it ends in time all the same.
#[test]
fn a_stuck_server_does_not_keep_it() {
    let Some(mut program) = Program::new() else { return };
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", server.local_addr().unwrap());
    program.start_with(&["--server", &url, "--trusted-key", KEY, "--fetch-deadline-s", "600"]);
    let name = "00000000000000000000000000000000-absent";
    let looked = program.at("mnt").join(name);
    let look = std::thread::spawn(move || fs::metadata(looked).unwrap_err().raw_os_error());
    let mut ensure = std::os::unix::net::UnixStream::connect(program.at("control.sock")).unwrap();
    std::io::Write::write_all(&mut ensure, format!("{{\"op\":\"ensure\",\"paths\":[\"{name}\"]}}\n").as_bytes())
        .unwrap();
    std::thread::park_timeout(Duration::from_millis(300));
    let began = Instant::now();
    program.signal(Signal::TERM);
    let status = program.wait();
    assert!(status.success() && began.elapsed() < Duration::from_secs(10), "{status}: {}", program.log());
    assert!(look.join().unwrap().is_some());
    assert!(!program.is_mounted() && !program.at("control.sock").exists());
    drop(server);
}

/// What was killed leaves a dead mount and dead overlays. The next one takes over.
#[test]
fn what_was_killed_is_cleaned_up() {
    let Some(mut program) = Program::new() else { return };
    program.start();
    let merged = program.overlay("job");
    program.overlay_up(&merged);
    program.signal(Signal::KILL);
    program.wait();
    assert!(program.is_mounted());
    // The kernel still answers what it remembers, and nothing else.
    fs::metadata(program.at("mnt")).unwrap();
    let error = fs::metadata(program.at("mnt").join("x")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::NOTCONN.raw_os_error()));
    program.start();
    assert!(program.log().contains("detached the mount of a daemon that is gone"), "{}", program.log());
    assert_eq!(fs::read_dir(program.at("mnt")).unwrap().count(), 0);
    // What the kernel is and offers is in the log.
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(program.log().contains(release.trim()) && program.log().contains("open without a message"));
    // An overlay over the dead mount is refused to whoever adopts it, and replaced for whoever mounts it.
    let adopt = program.control(&format!(r#"{{"op":"overlay-adopt","merged":"{}"}}"#, merged.display()));
    assert!(adopt.contains("daemon that is gone"), "{adopt}");
    let answer = program.overlay_up(&merged);
    assert!(answer.contains(r#""result":"overlay""#), "{answer}");
    program.signal(Signal::TERM);
    assert!(program.wait().success());
    assert!(!program.is_mounted() && mountinfo::mount_on(&merged).unwrap().is_none());
}

/// Something newer on the same directory is not ours to unmount.
#[test]
fn a_newer_mount_is_left_alone() {
    use rustix::mount::{MountFlags, mount};
    let Some(mut program) = Program::new() else { return };
    program.start();
    mount("tmpfs", program.at("mnt"), "tmpfs", MountFlags::empty(), None).unwrap();
    program.signal(Signal::TERM);
    program.wait();
    let on_top = mountinfo::mount_on(&program.at("mnt")).unwrap().unwrap();
    assert_eq!(on_top.fs_type, "tmpfs");
}

#[test]
fn a_second_one_is_refused() {
    let Some(mut program) = Program::new() else { return };
    program.start();
    let server = ["--server", "http://127.0.0.1:1", "--trusted-key", KEY];
    for (flag, name, part) in
        [("--mount", "other", "in use by another daemon"), ("--cache-dir", "other-cache", "mount point already")]
    {
        let mut command = program.command(&server);
        // A flag given twice is an error of its own, so the other one is replaced.
        let arguments: Vec<_> = command.get_args().map(std::ffi::OsStr::to_owned).collect();
        let at = arguments.iter().position(|argument| argument == flag).unwrap();
        let mut replaced = arguments.clone();
        replaced[at + 1] = program.at(name).into();
        command = Command::new(env!("CARGO_BIN_EXE_narlake-mountd"));
        let out = command.args(replaced).output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && text.contains(part), "{text}");
    }
    program.signal(Signal::TERM);
    assert!(program.wait().success());
}

/// What the daemon needs may not lie in its own mount, in whatever way it is spelled: it would wait for itself.
#[test]
fn its_own_things_are_not_in_its_mount() {
    let Some(program) = Program::new() else { return };
    fs::create_dir_all(program.at("mnt/made")).unwrap();
    std::os::unix::fs::symlink(program.at("mnt/made"), program.at("elsewhere")).unwrap();
    let arguments = ["--server", "http://127.0.0.1:1", "--trusted-key", KEY];
    let file = program.at("mnt/made/mountd.toml");
    fs::write(&file, "").unwrap();
    for (flag, place) in [
        ("--cache-dir", "elsewhere/cache"),
        ("--nix-socket", "mnt/nix.sock"),
        ("--control", "elsewhere/deep/control.sock"),
        ("--config", "mnt/made/mountd.toml"),
    ] {
        let command = program.command(&arguments);
        let mut replaced: Vec<_> = command.get_args().map(std::ffi::OsStr::to_owned).collect();
        match replaced.iter().position(|argument| argument == flag) {
            Some(at) => replaced[at + 1] = program.at(place).into(),
            None => replaced.extend([flag.into(), program.at(place).into()]),
        }
        let out = Command::new(env!("CARGO_BIN_EXE_narlake-mountd")).args(replaced).output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && text.contains("wait for itself"), "{flag}: {text}");
        assert!(!program.is_mounted() && !program.at(place).with_file_name("cache").exists());
    }
}

/// Keys of a server on another host are not taken on trust.
#[test]
fn keys_are_not_fetched_from_afar() {
    let Some(program) = Program::new() else { return };
    let status = program.command(&["--server", "http://192.0.2.1:1"]).status().unwrap();
    assert!(!status.success());
    assert!(program.log().contains("no --trusted-key is given"), "{}", program.log());
    assert!(!program.is_mounted());
}
