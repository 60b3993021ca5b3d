//! One overlay in care: looked through and refreshed, by a bounded number of threads of its own.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use narlake_format::api::control::OverlayInfo;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::gate::{Gate, Limit};
use super::kernel::{self, Seen};
use crate::error::joined;
use crate::metrics::Metrics;
use crate::mount_error::MountError;

/// Shortest time between the starts of two refreshes of an overlay.
pub(super) const REFRESH_EVERY: Duration = Duration::from_millis(200);

/// Threads that may look through an overlay at once. One more may refresh it.
pub(super) const LOOKS_MAX: usize = 4;

pub(super) struct Overlay {
    pub(super) info: OverlayInfo,
    /// A clone of the mount, attached nowhere.
    tree: OwnedFd,
    /// Its upper directory.
    upper: OwnedFd,
    looks: Gate,
    /// Refreshes asked for so far.
    asked: AtomicU64,
    /// All that were asked for up to this one have been done.
    done: AtomicU64,
    /// Held during a refresh, by the thread that is in the kernel for it; when the last one began.
    turn: Arc<Mutex<Option<Instant>>>,
    metrics: Metrics,
}

/// What was seen of some names.
enum Looked {
    /// These are not seen yet, the others are.
    Hidden(Vec<String>),
    /// This one was deleted through the overlay.
    Never(String),
}

impl Overlay {
    pub(super) fn new(info: OverlayInfo, (tree, upper): (OwnedFd, OwnedFd), metrics: &Metrics) -> Self {
        Self {
            info,
            tree,
            upper,
            looks: Gate::new(LOOKS_MAX),
            asked: AtomicU64::new(0),
            done: AtomicU64::new(0),
            turn: Arc::default(),
            metrics: metrics.clone(),
        }
    }

    /// The clone of the mount, and its upper directory.
    pub(super) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.tree.as_fd(), self.upper.as_fd()]
    }

    /// Refreshes it on this thread, out of turn. Blocks.
    pub(super) fn refresh_now(&self) -> Result<(), MountError> {
        kernel::refresh(&self.tree).map_err(MountError::kernel("refresh", &self.info.merged))
    }

    /// Makes it forget which names did not exist. Whoever asks shares the next refresh that begins. Cancel safe.
    pub(super) async fn refresh(self: &Arc<Self>, limit: Limit) -> Result<(), MountError> {
        let ticket = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let refreshed = async {
            let mut began = Arc::clone(&self.turn).lock_owned().await;
            if self.done.load(Ordering::SeqCst) >= ticket {
                return Ok(());
            }
            if let Some(before) = *began {
                sleep_until(before + REFRESH_EVERY).await;
            }
            *began = Some(Instant::now());
            let covers = self.asked.load(Ordering::SeqCst);
            self.metrics.overlay_refreshes.inc();
            let this = Arc::clone(self);
            // The turn goes with the work: whoever stops waiting leaves it to the thread, and no second one joins it.
            joined(tokio::task::spawn_blocking(move || {
                let refreshed = this.refresh_now();
                if refreshed.is_ok() {
                    this.done.store(covers, Ordering::SeqCst);
                }
                drop(began);
                refreshed
            }))
            .await
        };
        timeout_at(limit.until, refreshed).await.unwrap_or_else(|_| Err(self.late(limit, "refresh")))
    }

    /// Makes sure that these names, which the lower has now, are seen through it. Returns the first that is not, when the
    /// time is up or when it never will be. Cancel safe.
    pub(super) async fn show(self: &Arc<Self>, names: Vec<String>, limit: Limit) -> Result<Option<String>, MountError> {
        let mut names = names;
        loop {
            let hidden = match self.look(names, limit).await? {
                Looked::Hidden(hidden) => hidden,
                Looked::Never(name) => return Ok(Some(name)),
            };
            let Some(first) = hidden.first() else { return Ok(None) };
            // Not one more refresh, which would end late: that the name stays hidden says more.
            if Instant::now() + REFRESH_EVERY >= limit.until {
                return Ok(Some(first.clone()));
            }
            self.refresh(limit).await?;
            names = hidden;
        }
    }

    async fn look(self: &Arc<Self>, names: Vec<String>, limit: Limit) -> Result<Looked, MountError> {
        let this = Arc::clone(self);
        let looked = self.looks.run(limit, move || {
            let mut hidden = Vec::new();
            for name in names {
                // Nobody waits any more.
                if limit.is_over() {
                    return Err(limit.late("look through", &this.info.merged));
                }
                let seen = kernel::look(&this.upper, &this.tree, &name);
                match seen.map_err(MountError::kernel("look through", &this.info.merged))? {
                    Seen::Yes => {}
                    Seen::Never => return Ok(Looked::Never(name)),
                    Seen::NotYet => hidden.push(name),
                }
            }
            Ok(Looked::Hidden(hidden))
        });
        looked.await.unwrap_or_else(|| Err(self.late(limit, "look through")))
    }

    fn late(&self, limit: Limit, operation: &'static str) -> MountError {
        self.metrics.deadline_expirations.inc();
        limit.late(operation, &self.info.merged)
    }
}
