//! `overlay`, `ensure` and `status` against a mountd that says what it was told to.

mod common;

use common::cache::Cache;
use common::mountd::Mountd;
use common::{Ran, Scratch, narlake};
use narlake_format::api::control::{
    ControlErrorKind, ControlRequest, ControlResponse, MountStatus, OverlayInfo, ViewInfo, ViewSpec,
};

const PATH: &str = "0c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-x";

fn overlay(merged: &str) -> OverlayInfo {
    OverlayInfo {
        merged: merged.into(),
        lower: "/lower".into(),
        upper: "/upper".into(),
        work: Some("/work".into()),
        adopted: false,
        sealed: None,
        store_uri: "local-overlay://?upper-layer=/upper".into(),
    }
}

fn status(server_up: bool) -> MountStatus {
    MountStatus {
        version: "0.1.0".into(),
        pid: 7,
        mount: "/lower".into(),
        store_dir: "/nix/store".into(),
        server: "http://server/".into(),
        server_up,
        trusted_keys: vec!["lake-1".into()],
        nix_socket: "/run/nix.sock".into(),
        cache_dir: "/cache".into(),
        cache_bytes: 3 << 20,
        cache_bytes_max: 1 << 30,
        cache_files: 4,
        paths_known: 5,
        objects: 6,
        negative_names: 8,
        fetch_requests: 9,
        fetch_bytes: 10 << 20,
        fuse_requests: vec![("lookup".into(), 11)],
        overlays: vec![overlay("/merged")],
        push: None,
    }
}

/// Runs a command against a mountd with this answer; what it was asked and what came of it.
fn ask(answer: &ControlResponse, arguments: &[&str]) -> (ControlRequest, Ran) {
    let scratch = Scratch::new();
    let mountd = Mountd::start(&scratch.path("socket"), answer);
    let ran = narlake(&[arguments, &["--control", mountd.socket.to_str().unwrap()]].concat());
    (mountd.asked(), ran)
}

#[test]
fn overlays() {
    let up = ["overlay", "up", "--upper", "/u/", "--work", "/w", "--merged", "/nix/store/"];
    let (asked, ran) = ask(&ControlResponse::Overlay(overlay("/nix/store")), &up);
    let expected =
        ControlRequest::OverlayUp { upper: "/u".into(), work: "/w".into(), merged: "/nix/store".into(), view: None };
    assert_eq!(asked, expected);
    assert!(asked_text(&asked).contains(r#""merged":"/nix/store""#), "no slash at the end");
    let ran = ran.good();
    assert!(ran.stdout.contains("--store 'local-overlay://?upper-layer=/upper'"), "{}", ran.stdout);

    let (asked, ran) = ask(&ControlResponse::Done, &["overlay", "down", "/m", "--lazy"]);
    assert_eq!(asked, ControlRequest::OverlayDown { merged: "/m".into(), lazy: true });
    assert_eq!(ran.good().stdout, "");
    let (asked, _) = ask(&ControlResponse::Done, &["overlay", "refresh"]);
    assert_eq!(asked, ControlRequest::Refresh { merged: None });
    let (asked, _) = ask(&ControlResponse::Overlay(overlay("/m")), &["overlay", "adopt", "/m"]);
    assert_eq!(asked, ControlRequest::OverlayAdopt { merged: "/m".into() });

    let both = ControlResponse::Overlays { overlays: vec![overlay("/a"), overlay("/b")] };
    let (asked, ran) = ask(&both, &["overlay", "list"]);
    assert_eq!(asked, ControlRequest::OverlayList);
    assert!(ran.good().stdout.contains("merged:     /b"));
    assert_eq!(ask(&both, &["overlay", "list", "--json"]).1.good().json()["overlays"][1]["merged"], "/b");
}

#[test]
fn views() {
    let spec = ViewSpec {
        name: "job-1".into(),
        mount: "/v".into(),
        roots: vec!["r".into()],
        token_file: None,
        nix_socket: None,
    };
    let info = ViewInfo { spec: spec.clone(), paths: Some(3), overlays: 0, mounted: true };
    let with_socket = ViewSpec { nix_socket: Some("/run/job.sock".into()), ..spec.clone() };
    let shown = ControlResponse::View(ViewInfo { spec: with_socket.clone(), ..info.clone() });
    let create = ["view", "create", "job-1", "--mount", "/v", "--root", "r", "--nix-socket", "/run/job.sock"];
    let (asked, ran) = ask(&shown, &create);
    assert_eq!(asked, ControlRequest::ViewCreate(with_socket));
    assert!(ran.good().stdout.contains("/run/job.sock"));
    let (asked, ran) =
        ask(&ControlResponse::View(info.clone()), &["view", "create", "job-1", "--mount", "/v/", "--root", "r"]);
    assert_eq!(asked, ControlRequest::ViewCreate(spec));
    assert!(ran.good().stdout.contains("closures of 1 path, 3 paths"));
    let (asked, ran) = ask(&ControlResponse::Views { views: vec![info] }, &["view", "list", "--json"]);
    assert_eq!(asked, ControlRequest::ViewList);
    assert_eq!(ran.good().json()["views"][0]["name"], "job-1");
    let (asked, _) = ask(&ControlResponse::Done, &["view", "destroy", "job-1", "--lazy"]);
    assert_eq!(asked, ControlRequest::ViewDestroy { name: "job-1".into(), lazy: true });
}

fn asked_text(asked: &ControlRequest) -> String {
    serde_json::to_string(asked).unwrap()
}

#[test]
fn paths_are_made_absolute() {
    let (asked, _) = ask(&ControlResponse::Done, &["overlay", "down", "here/."]);
    let here = std::env::current_dir().unwrap().join("here");
    assert_eq!(asked, ControlRequest::OverlayDown { merged: here, lazy: false });
}

#[test]
fn ensuring() {
    let there = ControlResponse::Ensured { paths: 3, nar_bytes: 2048, missing: vec![] };
    let (asked, ran) = ask(&there, &["ensure", &format!("/nix/store/{PATH}/bin/x"), "--timeout", "5"]);
    assert_eq!(asked, ControlRequest::Ensure { paths: vec![PATH.into()], timeout_s: Some(5) });
    assert_eq!(ran.good().stdout, "3 paths of 2.00 KiB are there\n");
    let lacking = ControlResponse::Ensured { paths: 0, nar_bytes: 0, missing: vec![PATH.into()] };
    let (_, ran) = ask(&lacking, &["ensure", PATH]);
    assert!(ran.bad(1, &[]).stdout.contains(&format!("missing: {PATH}")));
    let (_, ran) = ask(&lacking, &["ensure", "--json", PATH]);
    assert_eq!(ran.bad(1, &[]).json()["missing"][0], PATH);
}

#[test]
fn pinning() {
    use narlake_format::api::control::PinInfo;
    let pins = ControlResponse::Pins { pins: vec![PinInfo { name: "ci".into(), files: 12, bytes: 3 << 20 }] };
    let (asked, ran) = ask(&pins, &["pin", "add", "ci", PATH]);
    assert_eq!(asked, ControlRequest::Pin { name: "ci".into(), paths: vec![PATH.into()] });
    assert_eq!(ran.good().stdout, "ci: 12 files, 3.00 MiB\n");
    let (asked, ran) = ask(&pins, &["pin", "list", "--json"]);
    assert_eq!((asked, ran.good().json()["pins"][0]["files"].as_u64()), (ControlRequest::PinList, Some(12)));
    let (asked, _) = ask(&ControlResponse::Done, &["pin", "remove", "ci"]);
    assert_eq!(asked, ControlRequest::Unpin { name: "ci".into() });
    narlake(&["pin", "add", "ci"]).bad(2, &["STORE-PATH"]);
}

#[test]
fn evicting() {
    let freed = ControlResponse::Evicted { bytes: 3 << 20 };
    let (asked, ran) = ask(&freed, &["evict", "--all"]);
    assert_eq!(asked, ControlRequest::Evict { keep_bytes: 0 });
    assert_eq!(ran.good().stdout, "3.00 MiB freed\n");
    let (asked, ran) = ask(&freed, &["evict", "--json", "--keep", "1000"]);
    assert_eq!(asked, ControlRequest::Evict { keep_bytes: 1000 });
    assert_eq!(ran.good().json()["bytes"], 3 << 20);
    // How much is never left to chance.
    for odd in [&["evict"][..], &["evict", "--all", "--keep", "1"]] {
        narlake(odd).bad(2, &["--keep"]);
    }
}

#[test]
fn status_of_worker_and_server() {
    let up = ControlResponse::Status(Box::new(status(true)));
    let (asked, ran) = ask(&up, &["status"]);
    assert_eq!(asked, ControlRequest::Status);
    let ran = ran.good();
    for line in ["http://server/ answers", "10.00 MiB in 9 requests", "11 messages: lookup 11", "merged:     /merged"] {
        assert!(ran.stdout.contains(line), "{line}: {}", ran.stdout);
    }
    let cache = Cache::start("/nix/store");
    let (_, ran) = ask(&up, &["status", "--json", "--server", &cache.url]);
    let json = ran.good().json();
    assert_eq!(json["worker"]["fetch_bytes"], 10 << 20);
    assert_eq!(
        (json["server"]["store_dir"].as_str(), json["server"]["api_version"].as_u64()),
        (Some("/nix/store"), Some(1))
    );

    // A worker that was not asked for and is not there is none of a server's troubles.
    let ran = narlake(&["status", "--server", &cache.url]).good();
    assert!(ran.stdout.starts_with("server:") && !ran.stdout.contains("worker"), "{}", ran.stdout);

    let (_, ran) = ask(&ControlResponse::Status(Box::new(status(false))), &["status"]);
    assert!(ran.bad(1, &[]).stdout.contains("DOES NOT ANSWER"));
    let (_, ran) = ask(&up, &["status", "--server", "http://127.0.0.1:1"]);
    let ran = ran.bad(1, &[]);
    assert!(
        ran.stdout.contains("server does not answer: connect to") && ran.stdout.contains("worker:"),
        "{}",
        ran.stdout
    );
    let ran = narlake(&["status", "--json", "--control", "/nonexistent"]).bad(1, &[]);
    assert!(ran.json()["worker"]["error"].as_str().unwrap().contains("is narlake-mountd running?"));
}

#[test]
fn a_worker_that_refuses() {
    let no = |kind, message: &str| ControlResponse::Error { kind, message: message.into() };
    let (_, ran) = ask(&no(ControlErrorKind::Busy, "/m is in use by 17"), &["overlay", "down", "/m"]);
    ran.bad(1, &["narlake: /m is in use by 17"]);
    let (_, ran) = ask(&no(ControlErrorKind::Unavailable, "the server is away"), &["ensure", PATH]);
    ran.bad(1, &["the server is away", "narlake status"]);
    let (_, ran) = ask(&no(ControlErrorKind::Failed, "red \x1b[31m"), &["ensure", PATH]);
    ran.bad(1, &["red \\u{1b}[31m"]);
    let (_, ran) = ask(&ControlResponse::Done, &["ensure", PATH]);
    ran.bad(1, &["answered another question", "same version"]);
}

#[test]
fn a_worker_that_is_not_there_or_makes_no_sense() {
    narlake(&["ensure", PATH, "--control", "/nonexistent"])
        .bad(1, &["connect to narlake-mountd at /nonexistent", "--control"]);
    for (answer, said) in [
        ("", "unexpected end of file"),
        ("{}", "unexpected end of file"),
        ("{}\n", "read the answer"),
        ("x\n", "read the answer"),
    ] {
        let scratch = Scratch::new();
        let mountd = Mountd::start_raw(&scratch.path("socket"), answer);
        narlake(&["ensure", PATH, "--control", mountd.socket.to_str().unwrap()]).bad(1, &["narlake-mountd", said]);
    }
}
