//! What hangs, and what goes on beside it.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use narlake_mountd::mount_error::MountError;

use crate::kit::{Mood, World, file, outside};

/// Somebody makes a directory in one overlay, for which the kernel asks the lower, whose server does not answer: until
/// it does, nobody else can look into that overlay. Who waits for it goes away in time, and the others are looked through.
#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_overlay_holds_up_no_other() {
    let mut world = World::new().await;
    world.deadline = Duration::from_secs(8);
    let Some(mounted) = world.mount().await else { return };
    let overlays = mounted.daemon.as_ref().unwrap().overlays().clone();
    let mut merged: Vec<PathBuf> = Vec::new();
    for name in ["a", "b"] {
        let base = mounted.dir.join(name);
        fs::create_dir_all(base.join("merged")).unwrap();
        let up = overlays.up(base.join("upper"), base.join("work"), base.join("merged")).await.unwrap();
        merged.push(up.merged);
    }
    let later = World::path("later").to_string();
    let looks: Vec<PathBuf> = merged.iter().map(|merged| merged.join(&later)).collect();
    let looked = looks.clone();
    outside(move || looked.iter().for_each(|path| assert!(!path.exists()))).await;
    world.push("later", &file(b"x"), &[]).await;

    let asked = world.source.lookups.load(Ordering::SeqCst);
    world.source.set(Mood::Stalls);
    let stuck = merged[0].join(World::path("new").to_string());
    let making = tokio::task::spawn_blocking(move || fs::create_dir(stuck).map_err(|error| error.raw_os_error()));
    while world.source.lookups.load(Ordering::SeqCst) == asked {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    world.source.set(Mood::Answers);

    let began = Instant::now();
    let names = [later];
    let limit = Duration::from_secs(1);
    let shown = futures::future::join_all((0..12).map(|_| overlays.show(&names, limit))).await;
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    for shown in shown {
        assert!(matches!(&shown, Err(MountError::Late { path, .. }) if *path == merged[0]), "{shown:?}");
    }
    // The other one was refreshed, and is looked through at once.
    let at = looks[1].clone();
    outside(move || assert!(at.exists())).await;
    assert!(!making.is_finished());
    assert!(making.await.unwrap().is_err());
    assert_eq!(overlays.show(&names, limit).await.unwrap(), None);
    let at = looks[0].clone();
    outside(move || assert!(at.exists())).await;
    mounted.stop().await;
}
