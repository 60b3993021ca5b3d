//! `worker` as far as it goes without mounting anything: what it refuses, and that it changes nothing then.

mod common;

use std::os::unix::fs::symlink;
use std::path::Path;

use common::{Ran, Scratch, command, narlake, run};

/// A machine below a directory, with a store and the programs.
struct Machine(Scratch);

impl Machine {
    fn new() -> Self {
        let scratch = Scratch::new();
        for program in ["bin/narlake-mounts", "bin/narlake-mountd"] {
            scratch.executable(program, "#!/bin/sh\nexit 1\n");
        }
        std::fs::create_dir_all(scratch.path("nix/store")).unwrap();
        Self(scratch)
    }

    fn up(&self, arguments: &[&str]) -> Ran {
        let mut command = command();
        command.env("PATH", self.0.path("bin")).args(["worker", "up"]);
        // Of an option that is given twice the last one would be an error; so these come where there is none.
        for (option, place) in
            [("--store-dir-mount", "nix/store"), ("--state-dir", "state"), ("--run-dir", "run"), ("--etc", "etc")]
        {
            if !arguments.contains(&option) {
                command.arg(option).arg(self.0.path(place));
            }
        }
        command.args(arguments);
        run(command)
    }

    fn check_refused(&self, said: &str, arguments: &[&str]) {
        // Whoever may not mount is told that first.
        let said = if rustix::process::geteuid().is_root() { said } else { "needs root" };
        self.up(arguments).bad(1, &[said]);
        for made in ["state", "run", "etc", "nix/store/state"] {
            assert!(!self.0.path(made).exists(), "{made} was made");
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn machines_that_cannot_join() {
    if Path::new("/run/systemd/system").exists() {
        // Other directories than its own are refused there before anything else.
        return;
    }
    let machine = Machine::new();
    const SERVER: &str = "http://127.0.0.1:1";
    let linked = machine.0.path("linked");
    symlink(machine.0.path("nix/store"), &linked).unwrap();
    machine.check_refused("symlink", &["--server", SERVER, "--store-dir-mount", text(&linked)]);
    let inside = machine.0.path("nix/store/state");
    machine.check_refused("lies in the store", &["--server", SERVER, "--state-dir", text(&inside)]);
    machine.check_refused("characters", &["--server", SERVER, "--etc", "/etc/a b"]);
    machine.check_refused("no --trusted-key", &["--server", "http://lake.example.org/"]);
    machine.check_refused("token", &["--server", SERVER, "--token-file", "/nowhere/token"]);
    machine.check_refused("no worker was up here before", &[]);
}

#[test]
fn command_lines_that_make_no_sense() {
    narlake(&["worker"]).bad(2, &[]);
    narlake(&["worker", "up", "--trusted-key", "lake-1:AAAA"]).bad(2, &["--server"]);
    narlake(&["worker", "up", "--server", "ftp://server"]).bad(2, &["http"]);
    narlake(&["worker", "detach"]).bad(2, &[]);
}

#[test]
fn nothing_is_up() {
    let scratch = Scratch::new();
    let state = scratch.path("state");
    let ran = narlake(&["worker", "status", "--json", "--state-dir", text(&state)]).bad(1, &[]);
    assert_eq!(ran.json(), serde_json::json!({"up": false, "steps": []}));
    if rustix::process::geteuid().is_root() {
        for _ in 0..2 {
            let ran = narlake(&["worker", "down", "--json", "--state-dir", text(&state)]).good();
            assert_eq!(ran.json()["steps"], serde_json::json!([]));
        }
    }
    assert!(!state.exists());
}

#[test]
fn daemons_leave_the_session() {
    let mut command = command();
    let words = ["worker", "detach", "--", "sh", "-c", "cut -d' ' -f1,5,6 /proc/$$/stat"];
    command.env("PATH", "/usr/bin:/bin").args(words);
    let ran = run(command).good();
    let numbers: Vec<&str> = ran.stdout.split_whitespace().collect();
    assert!(numbers.len() == 3 && numbers.iter().all(|number| number == &numbers[0]), "{numbers:?}");
    narlake(&["worker", "detach", "--", "/nowhere/program"]).bad(1, &["start /nowhere/program"]);
}
