//! `registration` and `overlay up --preload` against a mountd that says what it was told to, and a Nix that writes down
//! what it was given.

mod common;

use std::path::Path;

use common::mountd::Mountd;
use common::{Ran, Scratch, command, run};
use narlake_format::api::control::{ControlErrorKind, ControlRequest, ControlResponse, OverlayInfo};

const LEAF: &str = "/nix/store/0c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-leaf";
const TOP: &str = "/nix/store/1c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-top";

fn record(path: &str, references: &[&str]) -> String {
    let references: String = references.iter().map(|reference| format!("{reference}\n")).collect();
    format!("{path}\n{}\n120\n\n{}\n{references}", "0a".repeat(32), references.lines().count())
}

fn whole() -> String {
    record(LEAF, &[]) + &record(TOP, &[LEAF, TOP])
}

fn line(text: &str, left: u64) -> String {
    let part = ControlResponse::Registration { store_dir: "/nix/store".into(), text: text.into(), left };
    serde_json::to_string(&part).unwrap() + "\n"
}

fn registration(answer: &str, more: &[&str]) -> Ran {
    let scratch = Scratch::new();
    let mountd = Mountd::start_raw(&scratch.path("socket"), answer);
    let mut command = command();
    command.args(["registration", TOP, "--control"]).arg(&mountd.socket).args(more);
    run(command)
}

#[test]
fn a_closure_in_parts() {
    let parts = line(&record(LEAF, &[]), 1) + &line(&record(TOP, &[LEAF, TOP]), 0);
    assert_eq!(registration(&parts, &[]).good().stdout, whole());
    assert_eq!(registration(&line(&whole(), 0), &[]).good().stdout, whole());
    let json = registration(&parts, &["--json"]).good().json();
    assert_eq!(
        (json["paths"][1]["path"].as_str(), json["paths"][1]["references"][0].as_str()),
        (Some(TOP), Some(LEAF))
    );
    assert_eq!((json["paths"][0]["nar_size"].as_u64(), json["paths"][0]["deriver"].is_null()), (Some(120), true));
}

/// Whatever is not whole is not printed, not even in part: Nix would take it for a shorter closure.
#[test]
fn nothing_of_what_is_not_whole() {
    let (leaf, top) = (record(LEAF, &[]), record(TOP, &[LEAF, TOP]));
    for (answer, said) in [
        // The connection ends between parts, and inside one.
        (line(&leaf, 1), "unexpected end of file"),
        (line(&leaf, 1) + r#"{"result":"registration","store_dir":"/nix"#, "unexpected end of file"),
        // mountd gives up in the middle.
        (line(&leaf, 1) + "{\"result\":\"error\",\"kind\":\"failed\",\"message\":\"no more\"}\n", "no more"),
        // Not as many as were announced.
        (line(&leaf, 2) + &line(&top, 0), "another question"),
        // The root is missing, a reference is, or comes too late, or the text is none.
        (line(&leaf, 0), "is not in the registration"),
        (line(&top, 0), "is not whole"),
        (line(&(top.clone() + &leaf), 0), "is not whole"),
        (line(leaf.trim_end(), 0), "read the registration"),
        (line("", 0), "is not in the registration"),
    ] {
        let ran = registration(&answer, &[]).bad(1, &[said]);
        assert_eq!(ran.stdout, "", "{said}");
    }
    let missing = ControlResponse::Error { kind: ControlErrorKind::NotFound, message: "2 paths are not there".into() };
    let ran = registration(&(serde_json::to_string(&missing).unwrap() + "\n"), &[]).bad(1, &["2 paths are not there"]);
    assert_eq!(ran.stdout, "");
}

#[test]
fn a_reader_that_leaves_is_a_failure() {
    let scratch = Scratch::new();
    let many: String = (0..20_000).map(|_| whole()).collect();
    let mountd = Mountd::start_raw(&scratch.path("socket"), &line(&many, 0));
    let mut command = command();
    command.args(["registration", TOP, "--control"]).arg(&mountd.socket).stdout(std::process::Stdio::piped());
    let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), said.contains("not read to its end")), (Some(1), true), "{said}");
}

/// A `nix-store` that has these paths, and keeps what it is given.
fn nix_store(scratch: &Scratch, known: &[&str], load_db: &str) {
    scratch.file("known", known.iter().map(|path| format!("{path}\n")).collect::<String>());
    let dir = scratch.path("");
    let script = format!(
        "#!/bin/sh\ncd {}\necho \"$@\" >> calls\ncase $1 in\n\
         --check-validity) shift; for path; do case $path in /nix/store/*) grep -qxF \"$path\" known || echo \"$path\";; esac; done;;\n\
         --load-db) {load_db};;\n*) exit 9;;\nesac\n",
        dir.display()
    );
    scratch.executable("bin/nix-store", &script);
}

fn overlay(scratch: &Scratch) -> OverlayInfo {
    OverlayInfo {
        merged: scratch.directory("merged"),
        lower: "/lower".into(),
        upper: scratch.directory("upper"),
        work: Some(scratch.directory("work")),
        adopted: false,
        sealed: None,
        store_uri: "local-overlay://?root=/job&upper-layer=/u&lower-store=unix:///s%3Freal=/lower".into(),
    }
}

/// Runs `overlay up --preload`; what came of it, and which requests there were.
fn preload(scratch: &Scratch, is_up: bool, answer: &str) -> (Ran, Vec<ControlRequest>) {
    let (info, answer) = (overlay(scratch), answer.to_owned());
    let mountd = Mountd::start_with(&scratch.path("socket"), move |request| {
        let response = match request {
            ControlRequest::OverlayList => {
                ControlResponse::Overlays { overlays: if is_up { vec![info.clone()] } else { vec![] } }
            }
            ControlRequest::OverlayUp { .. } => ControlResponse::Overlay(info.clone()),
            ControlRequest::Registration { .. } => return answer.clone(),
            _ => ControlResponse::Done,
        };
        serde_json::to_string(&response).unwrap() + "\n"
    });
    let mut command = command();
    command.env("PATH", format!("{}:/usr/bin:/bin", scratch.path("bin").display()));
    command.args(["overlay", "up", "--preload", TOP, "--control"]).arg(&mountd.socket);
    for (option, dir) in [("--upper", "upper"), ("--work", "work"), ("--merged", "merged")] {
        command.arg(option).arg(scratch.path(dir));
    }
    let ran = run(command);
    std::fs::remove_file(&mountd.socket).unwrap();
    let requests = std::iter::from_fn(|| mountd.asked_by_now()).collect();
    (ran, requests)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn an_overlay_whose_nix_knows_the_closure() {
    let scratch = Scratch::new();
    nix_store(&scratch, &[LEAF], "cat > loaded");
    let (ran, requests) = preload(&scratch, false, &line(&whole(), 0));
    assert!(ran.good().stdout.contains("Nix knows 2 paths, 1 of them new"));
    assert!(requests.iter().any(|request| matches!(request, ControlRequest::OverlayUp { .. })), "{requests:?}");
    // Only what is new is loaded, into the database alone.
    assert_eq!(read(&scratch.path("loaded")), record(TOP, &[LEAF, TOP]));
    assert!(read(&scratch.path("calls")).contains("--load-db --store local?root=/job\n"));

    // Once more: it is up, and all is known.
    std::fs::remove_file(scratch.path("loaded")).unwrap();
    nix_store(&scratch, &[LEAF, TOP], "cat > loaded");
    let (ran, requests) = preload(&scratch, true, &line(&whole(), 0));
    assert!(ran.good().stdout.contains("Nix knows 2 paths, 0 of them new"));
    assert!(!requests.iter().any(|request| matches!(request, ControlRequest::OverlayUp { .. })), "{requests:?}");
    assert!(!scratch.path("loaded").exists());
}

#[test]
fn an_overlay_is_not_left_half_ready() {
    let down = |requests: &[ControlRequest]| {
        requests.iter().any(|request| matches!(request, ControlRequest::OverlayDown { .. }))
    };
    let scratch = Scratch::new();
    nix_store(&scratch, &[], "cat > /dev/null; echo 'database is locked' >&2; exit 1");
    let (ran, requests) = preload(&scratch, false, &line(&whole(), 0));
    ran.bad(1, &["enter the closure", "database is locked"]);
    assert!(down(&requests), "{requests:?}");
    // What was there before stays there.
    let (ran, requests) = preload(&scratch, true, &line(&whole(), 0));
    ran.bad(1, &["database is locked"]);
    assert!(!down(&requests), "{requests:?}");
    let (ran, requests) = preload(&scratch, false, &line(&record(LEAF, &[]), 0));
    ran.bad(1, &["is not in the registration"]);
    assert!(down(&requests), "{requests:?}");

    std::fs::remove_file(scratch.path("bin/nix-store")).unwrap();
    let (ran, requests) = preload(&scratch, false, &line(&whole(), 0));
    ran.bad(1, &["run nix-store", "is Nix installed"]);
    assert!(down(&requests), "{requests:?}");
}
