//! Signs of life, for whoever would kill a daemon that hangs; and whether its mount is still where people look for it.
//!
//! A beat says that the runtime turns over and that the file system answers: before each one a `statfs` goes through the
//! mount, which the kernel always asks this daemon about.
//!
//! A mount that somebody detaches (`umount -l`) while a file of it is open lives on, and answers; but its directory is an
//! empty one from then on, whose names all do not exist. So it is looked for among the mounts, by whoever made it and has
//! it in its namespace: this process, or the supervisor, which answers a beat with what it misses. If it is gone, the
//! daemon ends as it does when its connection was cut.

use std::path::Path;
use std::time::Duration;

use narlake_format::error::chain;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::error::joined;
use crate::fuse::mount::Mount;
use crate::fuse::session::Seat;
use crate::mounter::Mounter;
use crate::mountinfo::Watch;
use crate::notify::{notify, watchdog};

/// Longest time for the file system to answer. Later than that there is no beat.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// How often the mount is looked for if nobody wants beats.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Beats until told to stop: to the supervisor, the service manager or both, if they listen; and looks after the mount.
pub async fn beat(mounter: Mounter, seat: Seat, mut mounts: Watch, stop: CancellationToken) {
    // Twice in the time that the service manager gives.
    let wanted = [mounter.beat_every(), watchdog().map(|limit| limit / 2)].into_iter().flatten().min();
    let mut ticks = tokio::time::interval(wanted.unwrap_or(LOOK_EVERY));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut heard, mut gone) = (true, false);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let mut missed = Vec::new();
        if let Some(mount) = seat.mount.clone().filter(|_| !gone) {
            let found;
            (mounts, found) = joined(tokio::task::spawn_blocking(move || look(mounts, &mount))).await;
            missed.extend((!found).then(|| seat.name.clone()));
        }
        if wanted.is_some() {
            if !answers(&seat.dir).await {
                tracing::error!(mount = %seat.dir.display(), "the file system does not answer");
                continue;
            }
            let _ = notify("WATCHDOG=1");
            let mounter = mounter.clone();
            match joined(tokio::task::spawn_blocking(move || mounter.beat())).await {
                Ok(connections) => {
                    heard = true;
                    missed.extend(connections);
                }
                Err(error) => {
                    if std::mem::take(&mut heard) {
                        let error = chain(&error);
                        tracing::error!(error, "the supervisor does not answer; mounts end with this daemon");
                    }
                }
            }
        }
        if !gone && missed.contains(&seat.name) {
            gone = true;
            tracing::error!(
                mount = %seat.dir.display(),
                "the mount is not on its directory any more; somebody has unmounted it while it was in use"
            );
            seat.vacate();
        }
    }
}

/// Whether a mount is on its directory, as far as the kernel tells.
fn look(mut mounts: Watch, mount: &Mount) -> (Watch, bool) {
    let found = match mounts.changed() {
        Ok(Some(all)) => mount.is_among(&all),
        Ok(None) => true,
        Err(error) => {
            tracing::warn!(mount = %mount.dir().display(), %error, "look for the mount");
            true
        }
    };
    (mounts, found)
}

/// Whether the file system says anything, be it an error.
async fn answers(mount: &Path) -> bool {
    let mount = mount.to_owned();
    let asked = tokio::task::spawn_blocking(move || drop(rustix::fs::statvfs(&mount)));
    tokio::time::timeout(ANSWER_MAX, asked).await.is_ok()
}
