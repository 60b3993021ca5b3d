//! The command line itself: what makes sense, exit codes, completions.

mod common;

use common::{Scratch, command, narlake, run};

#[test]
fn help_and_version() {
    let help = narlake(&["--help"]).good();
    for word in ["push", "ls", "cat", "inspect", "overlay", "ensure", "status", "completions", "Exit codes"] {
        assert!(help.stdout.contains(word), "{word}");
    }
    assert!(narlake(&["--version"]).good().stdout.starts_with("narlake "));
    for name in ["push", "ls", "cat", "inspect", "overlay", "registration", "ensure", "status", "doctor", "completions"]
    {
        narlake(&[name, "--help"]).good();
    }
}

#[test]
fn command_lines_that_make_no_sense() {
    let check = |arguments: &[&str], said: &str| drop(narlake(arguments).bad(2, &[said]));
    check(&[], "Usage");
    check(&["sing"], "unrecognized subcommand");
    check(&["push"], "PATH");
    check(&["push", "--name", "x", "/a", "/b"], "push them one by one");
    check(&["push", "--name", "a b", "/a"], "names are 1 to 211 characters");
    check(&["push", "--server", "localhost:8080", "/a"], "expected http://HOST");
    check(&["push", "--timeout", "0", "/a"], "whole number of seconds");
    check(&["ls"], "give a store path");
    check(&["ls", "/nix/store"], "expected /nix/store/<hash>-<name>");
    check(&["cat", "hello"], "expected /nix/store/<hash>-<name>");
    check(&["ensure"], "STORE-PATH");
    check(&["ensure", "./result"], "expected /nix/store/<hash>-<name>");
    check(&["overlay"], "Usage");
    check(&["overlay", "up", "--upper", "/u"], "--work");
    check(&["completions", "tea"], "invalid value");
    check(&["inspect", "--blob", "00", "--entries", "x"], "cannot be used with");
}

#[test]
fn completions_for_the_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let script = narlake(&["completions", shell]).good().stdout;
        for word in ["overlay", "ensure", "--json"] {
            // fish spells its options without the dashes.
            assert!(script.contains(word.trim_start_matches('-')), "{word} for {shell}");
        }
    }
}

#[test]
fn an_unreachable_server_is_an_error_that_helps() {
    let path = "/nix/store/0c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-x";
    let server = "http://user:secret@127.0.0.1:1";
    for arguments in [["ls", path], ["cat", path], ["push", "/etc"]] {
        let ran = narlake(&[&arguments[..], &["--server", server]].concat()).bad(1, &["connect to", "--server"]);
        assert!(!ran.stderr.contains("secret"), "{}", ran.stderr);
    }
}

#[test]
fn a_server_that_says_nothing_is_not_waited_for() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let start = std::time::Instant::now();
    let path = "/nix/store/0c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-x";
    narlake(&["ls", path, "--server", &url, "--timeout", "1"]).bad(1, &["gave no answer for 1 s", "--timeout"]);
    assert!(start.elapsed() < std::time::Duration::from_secs(10));
}

/// A host without any certificates can still talk to a server that needs none.
#[test]
fn plain_http_needs_no_certificates() {
    let cache = common::cache::Cache::start("/nix/store");
    let mut command = command();
    command.args(["status", "--server", &cache.url]);
    command.env("SSL_CERT_FILE", "/nonexistent").env("SSL_CERT_DIR", "/nonexistent");
    run(command).good();
}

#[test]
fn output_that_nobody_reads_is_no_error() {
    let scratch = Scratch::new();
    let mut command = command();
    command.args(["completions", "bash"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    command.stdout(writer).stderr(std::fs::File::create(scratch.path("err")).unwrap());
    assert_eq!(command.status().unwrap().code(), Some(0));
    assert_eq!(std::fs::read_to_string(scratch.path("err")).unwrap(), "");
}
