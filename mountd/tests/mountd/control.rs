//! The control socket, as the `narlake` command uses it.

use std::path::Path;

use narlake_format::api::control::{ControlErrorKind, ControlRequest, ControlResponse};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::kit::{Mood, World, file, noise, outside};

pub(crate) struct Client(BufReader<UnixStream>);

impl Client {
    pub(crate) async fn connect(dir: &Path) -> Self {
        Self(BufReader::new(UnixStream::connect(dir.join("control.sock")).await.unwrap()))
    }

    async fn line(&mut self, line: &str) -> Value {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        self.0.read_line(&mut answer).await.unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    pub(crate) async fn ask(&mut self, request: ControlRequest) -> ControlResponse {
        serde_json::from_value(self.line(&serde_json::to_string(&request).unwrap()).await).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_of_the_command() {
    let world = World::new().await;
    let leaf = world.push("leaf", &file(b"leaf"), &[]).await;
    let top = world.push("top", &file(noise(1, 50_000)), std::slice::from_ref(&leaf)).await;
    let Some(mounted) = world.mount().await else { return };
    let mut client = Client::connect(&mounted.dir).await;
    let base = mounted.dir.join("job");
    std::fs::create_dir_all(base.join("merged")).unwrap();
    let up = ControlRequest::OverlayUp {
        upper: base.join("u"),
        work: base.join("w"),
        merged: base.join("merged"),
        view: None,
    };
    let ControlResponse::Overlay(info) = client.ask(up).await else { panic!() };
    assert_eq!(info.lower, mounted.mount);
    let ensure = ControlRequest::Ensure { paths: vec![format!("/nix/store/{top}")], timeout_s: None };
    match client.ask(ensure).await {
        ControlResponse::Ensured { paths: 2, missing, nar_bytes } => assert!(missing.is_empty() && nar_bytes > 50_000),
        other => panic!("{other:?}"),
    }
    let at = info.merged.join(top.to_string());
    outside(move || assert_eq!(std::fs::read(at).unwrap(), noise(1, 50_000))).await;
    assert_eq!(client.ask(ControlRequest::Refresh { merged: None }).await, ControlResponse::Done);
    let ControlResponse::Overlays { overlays } = client.ask(ControlRequest::OverlayList).await else { panic!() };
    assert_eq!(overlays, std::slice::from_ref(&info));
    let ControlResponse::Status(status) = client.ask(ControlRequest::Status).await else { panic!() };
    assert_eq!((status.paths_known, status.objects, status.overlays.len()), (2, 2, 1));
    assert!(status.fetch_bytes > 50_000 && status.cache_files == 1 && status.cache_bytes >= 50_000, "{status:?}");
    let ControlResponse::Evicted { bytes } = client.ask(ControlRequest::Evict { keep_bytes: 0 }).await else {
        panic!()
    };
    assert!(bytes >= 50_000);
    let down = ControlRequest::OverlayDown { merged: info.merged, lazy: false };
    assert_eq!(client.ask(down.clone()).await, ControlResponse::Done);
    let again = client.ask(down).await;
    assert!(matches!(again, ControlResponse::Error { kind: ControlErrorKind::NotFound, .. }), "{again:?}");
    drop(client);
    mounted.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_say_what_to_do() {
    let mut world = World::new().await;
    world.deadline = std::time::Duration::from_secs(2);
    let Some(mounted) = world.mount().await else { return };
    let mut client = Client::connect(&mounted.dir).await;
    for (line, kind, part) in [
        ("", "invalid", "malformed"),
        ("{}", "invalid", "malformed"),
        (r#"{"op":"fly"}"#, "invalid", "fly"),
        (r#"{"op":"ensure","paths":["/etc/passwd"]}"#, "invalid", "/etc/passwd"),
        (r#"{"op":"overlay-down","merged":"/"}"#, "not-found", "not an overlay"),
        (r#"{"op":"refresh","merged":"/"}"#, "not-found", "not an overlay"),
        (r#"{"op":"overlay-adopt","merged":"/nonexistent"}"#, "failed", "/nonexistent"),
    ] {
        let answer = client.line(line).await;
        assert_eq!((&answer["result"], &answer["kind"]), (&json!("error"), &json!(kind)), "{line}: {answer}");
        assert!(answer["message"].as_str().unwrap().contains(part), "{line}: {answer}");
    }
    // Status needs neither server nor disk.
    world.source.set(Mood::Stalls);
    let ensure = ControlRequest::Ensure { paths: vec![World::path("absent").to_string()], timeout_s: Some(1) };
    let mut other = Client::connect(&mounted.dir).await;
    let (stuck, status) = tokio::join!(client.ask(ensure), other.ask(ControlRequest::Status));
    assert!(matches!(stuck, ControlResponse::Error { kind: ControlErrorKind::Unavailable, .. }), "{stuck:?}");
    assert!(matches!(status, ControlResponse::Status(_)));
    drop((client, other));
    mounted.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn closures_are_registered_whole() {
    let world = World::new().await;
    let leaf = world.push("leaf", &file(b"leaf"), &[]).await;
    let top = world.push("top", &file(noise(1, 5000)), std::slice::from_ref(&leaf)).await;
    let Some(mounted) = world.mount().await else { return };
    let mut client = Client::connect(&mounted.dir).await;
    let of = |path: String| ControlRequest::Registration { paths: vec![path], timeout_s: None };
    match client.ask(of(format!("/nix/store/{top}"))).await {
        ControlResponse::Registration { store_dir, text, left: 0 } => {
            let records =
                narlake_format::nix::registration::parse(&store_dir.parse().unwrap(), text.as_bytes()).unwrap();
            let paths: Vec<_> = records.iter().map(|record| record.path.clone()).collect();
            assert_eq!(paths, [leaf, top]);
        }
        other => panic!("{other:?}"),
    }
    let missing = client.ask(of(format!("{}-missing", "0".repeat(32)))).await;
    assert!(matches!(missing, ControlResponse::Error { kind: ControlErrorKind::NotFound, .. }), "{missing:?}");
    drop(client);
    mounted.stop().await;
}
