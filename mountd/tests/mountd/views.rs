//! Views beside the daemon's own: what each may show, that they come back, and that hundreds cost little.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use narlake_format::api::control::{ControlErrorKind, ControlRequest, ControlResponse, ViewInfo, ViewSpec};
use narlake_format::nix::store_path::StorePath;
use narlake_format::nix::worker::{Reply, Request};

use crate::control::Client;
use crate::kit::{Mood, World, dir, file, outside};
use crate::nix::Client as Nix;

fn spec(world: &World, name: &str, roots: &[&StorePath]) -> ViewSpec {
    let roots = roots.iter().map(ToString::to_string).collect();
    ViewSpec {
        name: name.into(),
        mount: world.dir.path().join(format!("view-{name}")),
        roots,
        token_file: None,
        nix_socket: None,
    }
}

async fn create(client: &mut Client, spec: &ViewSpec) -> ViewInfo {
    match client.ask(ControlRequest::ViewCreate(spec.clone())).await {
        ControlResponse::View(info) => info,
        other => panic!("{}: {other:?}", spec.name),
    }
}

async fn refused(client: &mut Client, request: ControlRequest, expect: ControlErrorKind, part: &str) {
    match client.ask(request).await {
        ControlResponse::Error { kind, message } => {
            assert_eq!(kind, expect, "{message}");
            assert!(message.contains(part), "{message}");
        }
        other => panic!("{part}: {other:?}"),
    }
}

fn destroy(name: &str, lazy: bool) -> ControlRequest {
    ControlRequest::ViewDestroy { name: name.into(), lazy }
}

async fn read(path: PathBuf) -> Result<String, i32> {
    outside(move || fs::read_to_string(path).map_err(|error| error.raw_os_error().unwrap())).await
}

const ENOENT: i32 = 2;

#[tokio::test(flavor = "multi_thread")]
async fn a_view_shows_its_closures_and_nothing_else() {
    let world = World::new().await;
    let library = world.push("library", &file("library"), &[]).await;
    let program = world.push("program", &dir([("p", file("program"))]), std::slice::from_ref(&library)).await;
    let other = world.push("other", &file("other"), &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let mut client = Client::connect(&mounted.dir).await;
    let spec = spec(&world, "job", &[&program]);
    let info = create(&mut client, &spec).await;
    assert_eq!((info.paths, info.mounted, &info.spec), (Some(2), true, &spec));
    let at = |path: &StorePath| spec.mount.join(path.to_string());
    assert_eq!(read(at(&program).join("p")).await.unwrap(), "program");
    assert_eq!(read(at(&library)).await.unwrap(), "library");
    // The daemon's own view has it, in memory too; this one does not even ask.
    assert_eq!(read(mounted.at(&other)).await.unwrap(), "other");
    let asked = world.source.lookups.load(Ordering::SeqCst);
    for _ in 0..3 {
        assert_eq!(read(at(&other)).await, Err(ENOENT));
        assert_eq!(read(at(&World::path("unknown"))).await, Err(ENOENT));
    }
    assert_eq!(world.source.lookups.load(Ordering::SeqCst), asked);
    // One that shows everything.
    let all = ViewSpec { mount: world.dir.path().join("view-all"), name: "all".into(), roots: vec![], ..spec.clone() };
    assert_eq!(create(&mut client, &all).await.paths, None);
    assert_eq!(read(all.mount.join(other.to_string())).await.unwrap(), "other");
    assert_eq!(client.ask(destroy("all", false)).await, ControlResponse::Done);
    // What cannot be.
    let invalid = ControlErrorKind::Invalid;
    let with = |change: &dyn Fn(&mut ViewSpec)| {
        let mut spec = ViewSpec { name: "new".into(), mount: world.dir.path().join("view-new"), ..spec.clone() };
        change(&mut spec);
        ControlRequest::ViewCreate(spec)
    };
    let mount = spec.mount.clone();
    refused(&mut client, with(&|spec| spec.name = "job".into()), invalid, "exists already").await;
    refused(&mut client, with(&|spec| spec.name = "../x".into()), invalid, "names are").await;
    refused(&mut client, with(&|spec| spec.mount.clone_from(&mount)), invalid, "mount point already").await;
    refused(&mut client, with(&|spec| spec.mount = world.dir.path().into()), invalid, "").await;
    refused(&mut client, with(&|spec| spec.roots = vec!["x".into()]), invalid, "not a store path").await;
    let absent = World::path("absent").to_string();
    refused(&mut client, with(&|spec| spec.roots = vec![absent.clone()]), invalid, "not in the lake").await;
    refused(&mut client, with(&|spec| spec.token_file = Some("/nonexistent".into())), invalid, "token").await;
    refused(&mut client, destroy("new", false), ControlErrorKind::NotFound, "no view new").await;
    assert!(!world.dir.path().join("cache/views/new").exists(), "nothing is left of those");
    // In use.
    let open = fs::File::open(at(&library)).unwrap();
    refused(&mut client, destroy("job", false), ControlErrorKind::Busy, "in use").await;
    assert_eq!(read(at(&program).join("p")).await.unwrap(), "program");
    assert_eq!(client.ask(destroy("job", true)).await, ControlResponse::Done);
    drop(open);
    assert_eq!(client.ask(ControlRequest::ViewList).await, ControlResponse::Views { views: vec![] });
    drop(client);
    mounted.stop().await;
}

/// What one token may see is not answered to another from memory or disk, whatever the daemon's own view knows.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_its_own_sees_what_it_may() {
    let world = World::new().await;
    let (secret, open) = (world.push("secret", &file("s"), &[]).await, world.push("open", &file("o"), &[]).await);
    let Some(mounted) = world.mount().await else { return };
    let mut client = Client::connect(&mounted.dir).await;
    assert_eq!(read(mounted.at(&secret)).await.unwrap(), "s");
    let token = world.dir.path().join("token");
    fs::write(&token, "secret\n").unwrap();
    let spec = ViewSpec { token_file: Some(token), ..spec(&world, "guest", &[]) };
    create(&mut client, &spec).await;
    for mood in [Mood::Answers, Mood::Down] {
        world.source.set(mood);
        assert_eq!(read(spec.mount.join(secret.to_string())).await, Err(ENOENT));
    }
    world.source.set(Mood::Answers);
    assert_eq!(read(spec.mount.join(open.to_string())).await.unwrap(), "o");
    let limited = ViewSpec { name: "more".into(), mount: spec.mount.with_extension("more"), ..spec.clone() };
    let limited = ControlRequest::ViewCreate(ViewSpec { roots: vec![secret.to_string()], ..limited });
    refused(&mut client, limited, ControlErrorKind::Invalid, "not for this token").await;
    drop(client);
    mounted.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn views_come_back_with_the_next_daemon() {
    let world = World::new().await;
    let path = world.push("kept", &file("kept"), &[]).await;
    let spec = spec(&world, "job", &[&path]);
    {
        let Some(mounted) = world.mount().await else { return };
        let mut client = Client::connect(&mounted.dir).await;
        create(&mut client, &spec).await;
        assert_eq!(read(spec.mount.join(path.to_string())).await.unwrap(), "kept");
        drop(client);
        mounted.stop().await;
    }
    assert!(fs::read_dir(&spec.mount).unwrap().next().is_none() && !is_mounted(&spec.mount));
    world.source.set(Mood::Down);
    let mounted = world.mount().await.unwrap();
    assert_eq!(read(spec.mount.join(path.to_string())).await.unwrap(), "kept");
    assert_eq!(read(spec.mount.join(World::path("other").to_string())).await, Err(ENOENT));
    mounted.stop().await;
    // What is not what was written shows nothing.
    fs::write(world.dir.path().join("cache/views/job/view"), "{}").unwrap();
    let mounted = world.mount().await.unwrap();
    assert!(!is_mounted(&spec.mount));
    mounted.stop().await;
}

/// It answers for what the view shows, names itself to Nix, comes back, and goes.
#[tokio::test(flavor = "multi_thread")]
async fn a_view_has_a_nix_socket_of_its_own() {
    let world = World::new().await;
    let library = world.push("library", &file("library"), &[]).await;
    let program = world.push("program", &dir([("p", file("program"))]), std::slice::from_ref(&library)).await;
    let other = world.push("other", &file("other"), &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let mut client = Client::connect(&mounted.dir).await;
    let socket = world.dir.path().join("job.sock");
    let spec = ViewSpec { nix_socket: Some(socket.clone()), ..spec(&world, "job", &[&program]) };
    create(&mut client, &spec).await;
    // The daemon's own view knows the other one.
    assert_eq!(read(mounted.at(&other)).await.unwrap(), "other");
    let answers = || {
        let (socket, program, library, other) = (socket.clone(), program.clone(), library.clone(), other.clone());
        outside(move || {
            let mut nix = Nix::greet(&socket);
            let mut all = vec![program.clone(), library];
            all.sort();
            assert_eq!(nix.ask(&Request::QueryAllValidPaths), Reply::Paths(all));
            assert_eq!(nix.ask(&Request::IsValidPath(program)), Reply::Valid(true));
            assert_eq!(nix.ask(&Request::IsValidPath(other.clone())), Reply::Valid(false));
            assert_eq!(nix.ask(&Request::QueryPathInfo(other.clone())), Reply::PathInfo(None));
            assert_eq!(nix.ask(&Request::QueryPathFromHashPart(other.hash)), Reply::Path(None));
            assert!(matches!(nix.ask(&Request::NarFromPath(other)), Reply::Error(_)));
        })
    };
    answers().await;
    let at = |name: &str| world.dir.path().join(name);
    fs::create_dir(at("merged")).unwrap();
    let view = Some("job".into());
    let up = ControlRequest::OverlayUp { upper: at("upper"), work: at("work"), merged: at("merged"), view };
    let ControlResponse::Overlay(info) = client.ask(up).await else { panic!("no overlay") };
    let lower = format!("lower-store=unix://{}%3Freal={}", socket.display(), spec.mount.display());
    assert!(info.store_uri.ends_with(&lower), "{}", info.store_uri);
    let down = ControlRequest::OverlayDown { merged: at("merged"), lazy: false };
    assert_eq!(client.ask(down).await, ControlResponse::Done);
    // What cannot be.
    let with = |nix_socket: PathBuf| {
        let (name, mount) = ("new".into(), world.dir.path().join("view-new"));
        ControlRequest::ViewCreate(ViewSpec { name, mount, nix_socket: Some(nix_socket), ..spec.clone() })
    };
    let invalid = ControlErrorKind::Invalid;
    refused(&mut client, with("relative".into()), invalid, "Nix socket").await;
    refused(&mut client, with(world.dir.path().join("a b")), invalid, "Nix socket").await;
    refused(&mut client, with(world.dir.path().join("view-new/sock")), invalid, "own mount").await;
    refused(&mut client, with(socket.clone()), ControlErrorKind::Failed, "listen on").await;
    refused(&mut client, with(world.dir.path().join("nix.sock")), ControlErrorKind::Failed, "listen on").await;
    assert!(!is_mounted(&world.dir.path().join("view-new")));
    answers().await;
    drop(client);
    mounted.stop().await;
    assert!(!socket.exists());
    // Without a server, out of what is on disk.
    world.source.set(Mood::Down);
    let mounted = world.mount().await.unwrap();
    answers().await;
    let mut client = Client::connect(&mounted.dir).await;
    assert_eq!(client.ask(destroy("job", false)).await, ControlResponse::Done);
    assert!(!socket.exists());
    drop(client);
    mounted.stop().await;
}

fn is_mounted(dir: &Path) -> bool {
    narlake_mountd::mountinfo::mount_on(dir).unwrap().is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn overlays_lie_over_views_too() {
    let world = World::new().await;
    let path = world.push("lower", &dir([("f", file("lower"))]), &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let mut client = Client::connect(&mounted.dir).await;
    let spec = spec(&world, "job", &[]);
    create(&mut client, &spec).await;
    let at = |name: &str| world.dir.path().join(name);
    fs::create_dir(at("merged")).unwrap();
    let view = Some("job".into());
    let up = ControlRequest::OverlayUp { upper: at("upper"), work: at("work"), merged: at("merged"), view };
    let ControlResponse::Overlay(info) = client.ask(up).await else { panic!("no overlay") };
    assert_eq!((&info.lower, info.store_uri.as_str()), (&spec.mount, ""));
    let f = at("merged").join(path.to_string()).join("f");
    assert_eq!(read(f.clone()).await.unwrap(), "lower");
    outside(move || fs::remove_file(&f).and_then(|()| fs::write(&f, "upper"))).await.unwrap();
    assert_eq!(read(spec.mount.join(path.to_string()).join("f")).await.unwrap(), "lower");
    // A name that was absent and is pushed is seen after a refresh of this overlay.
    let late = World::path("late");
    assert_eq!(read(at("merged").join(late.to_string())).await, Err(ENOENT));
    world.push("late", &file("late"), &[]).await;
    assert_eq!(read(at("merged").join(late.to_string())).await, Err(ENOENT));
    let refresh = ControlRequest::Refresh { merged: Some(at("merged")) };
    assert_eq!(client.ask(refresh).await, ControlResponse::Done);
    assert_eq!(read(at("merged").join(late.to_string())).await.unwrap(), "late");
    refused(&mut client, destroy("job", false), ControlErrorKind::Busy, "in use").await;
    let down = ControlRequest::OverlayDown { merged: at("merged"), lazy: false };
    assert_eq!(client.ask(down).await, ControlResponse::Done);
    assert_eq!(client.ask(destroy("job", false)).await, ControlResponse::Done);
    assert_eq!(world.metrics.overlays.get(), 0);
    drop(client);
    mounted.stop().await;
}

fn count(dir: &str) -> usize {
    fs::read_dir(dir).unwrap().count()
}

fn resident_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() / 1024
}

const MANY: usize = 300;

/// In a process whose allocator is set up as `main` does it.
#[test]
fn hundreds_of_views_come_and_go() {
    let setting = "MALLOC_MMAP_THRESHOLD_";
    if std::env::var_os(setting).is_none() {
        let mut again = std::process::Command::new(std::env::current_exe().unwrap());
        again.args(["--exact", "--nocapture", "views::hundreds_of_views_come_and_go"]).env(setting, "131072");
        assert!(again.status().unwrap().success());
        return;
    }
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(hundreds_of_views());
}

async fn hundreds_of_views() {
    let world = World::new().await;
    let path = world.push("shared", &dir([("f", file("shared"))]), &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let mut client = Client::connect(&mounted.dir).await;
    // Whatever the first one costs once and for all.
    create(&mut client, &spec(&world, "first", &[&path])).await;
    assert_eq!(client.ask(destroy("first", false)).await, ControlResponse::Done);
    let mounts = || narlake_mountd::mountinfo::mounts().unwrap().len();
    let before = (count("/proc/self/fd"), mounts());
    let (threads, resident) = (count("/proc/self/task"), resident_mib());
    let mut at = Vec::new();
    for number in 0..MANY {
        let spec = spec(&world, &format!("job-{number}"), &[&path]);
        create(&mut client, &spec).await;
        at.push(spec.mount.join(path.to_string()).join("f"));
    }
    let ControlResponse::Views { views } = client.ask(ControlRequest::ViewList).await else { panic!("no list") };
    assert_eq!((views.len(), world.metrics.views.get()), (MANY, MANY as i64));
    let read = outside(move || at.iter().filter(|at| fs::read_to_string(at).unwrap() == "shared").count()).await;
    assert_eq!(read, MANY);
    let grown = resident_mib().saturating_sub(resident);
    eprintln!("{MANY} views: {grown} MiB more resident, {} threads more", count("/proc/self/task") - threads);
    assert!(grown < 100, "{grown} MiB");
    for view in views {
        assert_eq!(client.ask(destroy(&view.spec.name, false)).await, ControlResponse::Done);
    }
    assert_eq!((count("/proc/self/fd"), mounts()), before);
    // The runtime keeps some of its own for a while.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while count("/proc/self/task") > threads + 20 {
        assert!(std::time::Instant::now() < deadline, "{} threads, {threads} before", count("/proc/self/task"));
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    drop(client);
    mounted.stop().await;
}
