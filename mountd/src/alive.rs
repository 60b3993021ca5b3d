//! Signs of life, for whoever would kill a daemon that hangs.
//!
//! A beat says that the runtime turns over and that the file system answers: before each one a `statfs` goes through the
//! mount, which the kernel always asks this daemon about.

use std::path::{Path, PathBuf};
use std::time::Duration;

use narlake_format::error::chain;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::mounter::Mounter;
use crate::notify::{notify, watchdog};

/// Longest time for the file system to answer. Later than that there is no beat.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Beats until told to stop, if anybody listens: the supervisor, the service manager or both.
pub async fn beat(mounter: Mounter, mount: PathBuf, stop: CancellationToken) {
    // Twice in the time that the service manager gives.
    let every = [mounter.beat_every(), watchdog().map(|limit| limit / 2)].into_iter().flatten().min();
    let Some(every) = every else { return };
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = true;
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        if !answers(&mount).await {
            tracing::error!(mount = %mount.display(), "the file system does not answer");
            continue;
        }
        let _ = notify("WATCHDOG=1");
        let mounter = mounter.clone();
        match crate::error::joined(tokio::task::spawn_blocking(move || mounter.beat())).await {
            Ok(()) => heard = true,
            Err(error) => {
                if std::mem::take(&mut heard) {
                    let error = chain(&error);
                    tracing::error!(error, "the supervisor does not answer; mounts end with this daemon");
                }
            }
        }
    }
}

/// Whether the file system says anything, be it an error.
async fn answers(mount: &Path) -> bool {
    let mount = mount.to_owned();
    let asked = tokio::task::spawn_blocking(move || drop(rustix::fs::statvfs(&mount)));
    tokio::time::timeout(ANSWER_MAX, asked).await.is_ok()
}
