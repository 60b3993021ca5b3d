//! The `narlake-server` program itself, from its first line to its last signal.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);

fn program(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_narlake-server"));
    command.args(arguments).current_dir(dir).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // What the machine is set up for is none of the test's business.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("NARLAKE_") || name.to_string_lossy().starts_with("AWS_") {
            command.env_remove(name);
        }
    }
    command
}

fn run(dir: &Path, arguments: &[&str]) -> Output {
    program(dir, arguments).output().unwrap()
}

/// The lines that the program prints once it serves.
fn lines(child: &mut Child) -> Vec<String> {
    BufReader::new(child.stdout.as_mut().unwrap()).lines().take(2).map(Result::unwrap).collect()
}

fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn terminate(child: &Child) {
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
}

/// With nothing but an address it serves, says so to whoever started it and to systemd, and stops when told to.
#[test]
fn serve() {
    let dir = tempfile::tempdir().unwrap();
    let manager = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    manager.set_read_timeout(Some(SOON)).unwrap();
    let told = || {
        let mut buffer = [0; 64];
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let mut keys = Vec::new();
    for _ in 0..2 {
        let mut child = program(dir.path(), &["serve", "--listen", "127.0.0.1:0"])
            .env("NOTIFY_SOCKET", dir.path().join("notify"))
            .spawn()
            .unwrap();
        let lines = lines(&mut child);
        let address = lines[0].strip_prefix("serving http://").unwrap();
        let key = lines[1].strip_prefix("trusted-public-keys = ").unwrap().to_owned();
        assert_eq!(told(), "READY=1\n");
        assert!(get(address, "/nix-cache-info").ends_with("StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"));
        assert!(get(address, "/public-key").ends_with(&format!("{key}\n")));
        keys.push(key);
        terminate(&child);
        assert_eq!(told(), "STOPPING=1\n");
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(keys[0], keys[1], "the key outlives the process");
    for name in ["bucket", "state", "signing-key"] {
        assert!(dir.path().join("narlake-data").join(name).exists(), "{name}");
    }
    let done = run(dir.path(), &["reindex"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// What a client sends does not fill the log: a path may be as long as a head.
#[test]
fn log_lines_are_short() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = program(dir.path(), &["serve", "--listen", "127.0.0.1:0"]).spawn().unwrap();
    let lines = lines(&mut child);
    let address = lines[0].strip_prefix("serving http://").unwrap();
    let long = "x".repeat(50_000);
    for path in [format!("/{long}"), format!("/nar/{long}"), format!("/log/{long}"), format!("/{long}/{long}")] {
        // The last is longer than a head may be.
        let answer = get(address, &path);
        assert!(answer.contains(" 404 ") || answer.contains(" 431 ") || answer.contains(" 414 "), "{answer:.100}");
    }
    terminate(&child);
    let mut log = String::new();
    child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(log.contains("xxx"), "{log}");
    assert!(log.lines().all(|line| line.len() < 4096));
}

#[test]
fn mistakes_end_it_with_a_message() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("bad.toml"), "[limits]\nuploads = 3\n").unwrap();
    std::fs::write(dir.path().join("key"), "nonsense").unwrap();
    for (arguments, expect) in [
        (vec!["serve", "--listen", "0.0.0.0:0"], "--insecure"),
        (vec!["serve", "--config", "bad.toml"], "uploads"),
        (vec!["serve", "--config", "missing.toml"], "missing.toml"),
        (vec!["serve", "--set", "limits.uploads=3"], "there is no setting limits.uploads"),
        (vec!["serve", "--listen", "127.0.0.1:0", "--signing-key-file", "key"], "signing key key"),
        (vec!["serve", "--listen", "127.0.0.1:0", "--push-token-file", "none"], "push tokens none"),
        (vec!["serve", "--log-filter", "=="], "log.filter"),
        (vec!["sever"], "serve"),
    ] {
        let done = run(dir.path(), &arguments);
        let message = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(!done.status.success() && message.contains(expect), "{arguments:?}: {message}");
    }
    assert!(!dir.path().join("narlake-data/bucket/packs").exists());
}

#[test]
fn version() {
    let dir = tempfile::tempdir().unwrap();
    let expect = format!("narlake-server {}\n", env!("CARGO_PKG_VERSION"));
    for arguments in [["version"], ["--version"]] {
        assert_eq!(String::from_utf8_lossy(&run(dir.path(), &arguments).stdout), expect);
    }
}
