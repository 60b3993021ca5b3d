//! Overlays: the writable stores that people and Nix see, over the read-only view.
//!
//! Any number of them may lie over one mount. Mounted by this daemon ([`Overlays::up`]) or by somebody else
//! ([`Overlays::adopt`]), an overlay is in care from then on: a clone of its mount is kept open, through which it is
//! refreshed and looked through from any mount namespace, with its flags kept.
//!
//! A refresh makes an overlay forget the names that did not exist. Refreshes coalesce: whoever asks for one shares the
//! next that begins, and there are at most five a second.
//!
//! Overlay options are fixed (docs/decisions/0007-overlay-options.md): what Nix's own check accepts, renames of lower
//! directories that work, a chmod that copies no content, and no index, which would tie an upper for ever to one lower.

mod checks;
mod kernel;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use narlake_format::api::control::OverlayInfo;
use tokio::time::Instant;

use self::kernel::Seen;
use crate::error::joined;
use crate::metrics::Metrics;
use crate::mountinfo;

/// Shortest time between the starts of two refreshes.
const REFRESH_EVERY: Duration = Duration::from_millis(200);

/// Why an overlay could not be had, or left.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// What was asked for cannot work, or would hurt.
    #[error("{path}: {reason}", path = path.display())]
    Refused {
        /// The directory at fault.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// There is no overlay in care here.
    #[error("{path} is not an overlay over this mount", path = path.display())]
    Unknown {
        /// Where it should be.
        path: PathBuf,
    },
    /// The overlay is in use.
    #[error("{path} is in use; stop what runs there, or detach it with --lazy", path = path.display())]
    Busy {
        /// Where it is mounted.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("{operation} {path}", path = path.display())]
    Kernel {
        /// The operation, as a verb.
        operation: &'static str,
        /// Where.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

impl OverlayError {
    fn kernel(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Kernel { operation, path, source }
    }
}

/// What the daemon itself needs, and must not hide under its own mounts.
#[derive(Clone, Debug)]
pub struct Own {
    /// The mount of the view: the lower of every overlay.
    pub lower: PathBuf,
    /// The store directory of its paths.
    pub store_dir: String,
    /// The Nix socket.
    pub nix_socket: PathBuf,
    /// What it opens by path while it runs: the cache directory.
    pub directories: Vec<PathBuf>,
    /// What it was started from: the executable, the configuration.
    pub files: Vec<PathBuf>,
}

/// The overlays in care.
pub struct Overlays {
    own: Own,
    // Held for a look or a change, never while the kernel works.
    table: Mutex<BTreeMap<PathBuf, Arc<Overlay>>>,
    // Mounting and unmounting take turns.
    changing: tokio::sync::Mutex<()>,
    refresher: Refresher,
    metrics: Metrics,
}

struct Overlay {
    info: OverlayInfo,
    /// A clone of the mount, attached nowhere.
    tree: OwnedFd,
}

#[derive(Default)]
struct Refresher {
    /// Refreshes asked for so far.
    asked: AtomicU64,
    /// All that were asked for up to this one have been done.
    done: AtomicU64,
    /// Held during a refresh; when the last one began.
    turn: tokio::sync::Mutex<Option<Instant>>,
}

impl Overlays {
    /// No overlays yet, over this daemon's mount.
    #[must_use]
    pub fn new(own: Own, metrics: &Metrics) -> Self {
        Self {
            own,
            table: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
            refresher: Refresher::default(),
            metrics: metrics.clone(),
        }
    }

    /// The overlays, in order of where they are mounted.
    #[must_use]
    pub fn list(&self) -> Vec<OverlayInfo> {
        self.table().values().map(|overlay| overlay.info.clone()).collect()
    }

    /// Mounts an overlay and takes it into care. Not cancel safe: run it to its end.
    ///
    /// # Errors
    /// When it would hurt, or the kernel refuses.
    pub async fn up(
        self: &Arc<Self>,
        upper: PathBuf,
        work: PathBuf,
        merged: PathBuf,
    ) -> Result<OverlayInfo, OverlayError> {
        let _turn = self.changing.lock().await;
        let this = Arc::clone(self);
        blocking(move || {
            let plan = checks::plan(&this.own, &upper, &work, &merged)?;
            match mountinfo::mount_on(&plan.merged).map_err(OverlayError::kernel("find mounts on", &plan.merged))? {
                Some(mount) if this.is_orphan(&mount) => {
                    tracing::warn!(merged = %plan.merged.display(), "detached the overlay of a daemon that is gone");
                    kernel::unmount(&plan.merged, true).map_err(OverlayError::kernel("detach", &plan.merged))?;
                }
                Some(mount) if mount.fs_type == "overlay" => {
                    let reason = "an overlay is mounted here already; adopt it, or unmount it first".into();
                    return Err(OverlayError::Refused { path: plan.merged, reason });
                }
                _ => {}
            }
            kernel::mount(&this.own.lower, &plan).map_err(|source| {
                // Three file systems on top of each other are one too many for the kernel.
                let operation = "mount an overlay (see the kernel's log; the upper may not lie on an overlay) on";
                OverlayError::Kernel { operation, path: plan.merged.clone(), source }
            })?;
            this.take(&plan.merged, plan.upper, Some(plan.work), false)
        })
        .await
    }

    /// Takes an overlay into care that somebody else has mounted over this daemon's mount.
    ///
    /// # Errors
    /// When there is none.
    pub async fn adopt(self: &Arc<Self>, merged: PathBuf) -> Result<OverlayInfo, OverlayError> {
        let _turn = self.changing.lock().await;
        let this = Arc::clone(self);
        blocking(move || {
            let merged = checks::canonical(&merged)?;
            let mount = mountinfo::mount_on(&merged).map_err(OverlayError::kernel("find mounts on", &merged))?;
            let mount = mount.filter(|mount| this.is_ours(mount));
            let mount = mount.ok_or_else(|| OverlayError::Unknown { path: merged.clone() })?;
            if mountinfo::is_dead(&merged) {
                let reason = "this overlay lies over the mount of a daemon that is gone; unmount it, and mount it anew";
                return Err(OverlayError::Refused { path: merged, reason: reason.into() });
            }
            let upper = mount.option("upperdir").ok_or_else(|| OverlayError::Refused {
                path: merged.clone(),
                reason: "a read-only overlay needs no care".into(),
            })?;
            this.take(&merged, upper, mount.option("workdir"), true)
        })
        .await
    }

    /// Unmounts an overlay, also one of a daemon that is gone. Not cancel safe: run it to its end.
    ///
    /// # Errors
    /// When there is none, or it is in use and `lazy` is not set.
    pub async fn down(self: &Arc<Self>, merged: PathBuf, lazy: bool) -> Result<(), OverlayError> {
        let _turn = self.changing.lock().await;
        let this = Arc::clone(self);
        blocking(move || this.down_blocking(&merged, lazy)).await
    }

    fn down_blocking(&self, merged: &Path, lazy: bool) -> Result<(), OverlayError> {
        let merged = checks::canonical(merged)?;
        let mount = mountinfo::mount_on(&merged).map_err(OverlayError::kernel("find mounts on", &merged))?;
        if !mount.as_ref().is_some_and(|mount| self.is_ours(mount)) {
            return self.down_elsewhere(merged, mount.as_ref());
        }
        let known = self.table().remove(&merged);
        match kernel::unmount(&merged, lazy) {
            Ok(()) => {
                self.show_count();
                Ok(())
            }
            Err(error) => {
                // Still there: still in care.
                if let Some(overlay) = known {
                    self.table().insert(merged.clone(), overlay);
                }
                if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) {
                    Err(OverlayError::Busy { path: merged })
                } else {
                    Err(OverlayError::kernel("unmount", &merged)(error))
                }
            }
        }
    }

    /// Takes down an overlay that is not what is seen where it was mounted.
    fn down_elsewhere(&self, merged: PathBuf, mount: Option<&mountinfo::MountInfo>) -> Result<(), OverlayError> {
        match mount {
            _ if !self.table().contains_key(&merged) => Err(OverlayError::Unknown { path: merged }),
            // Somebody has unmounted it already.
            None => {
                self.table().remove(&merged);
                self.show_count();
                Ok(())
            }
            Some(mount) => {
                let reason =
                    format!("a mount of type {} that is not the overlay is on it; unmount that first", mount.fs_type);
                Err(OverlayError::Refused { path: merged, reason })
            }
        }
    }

    /// Unmounts every overlay that this daemon mounted, detaching those in use. Blocks.
    pub fn down_all(&self) {
        let all: Vec<OverlayInfo> = self.list();
        for info in all.into_iter().filter(|info| !info.adopted) {
            let merged = info.merged.display();
            match self.down_blocking(&info.merged, false) {
                Ok(()) => {}
                Err(OverlayError::Busy { .. }) => {
                    tracing::warn!(%merged, "overlay is in use, detached");
                    if let Err(error) = self.down_blocking(&info.merged, true) {
                        tracing::error!(%merged, error = crate::error::chain(&error), "detach the overlay");
                    }
                }
                Err(error) => tracing::error!(%merged, error = crate::error::chain(&error), "unmount the overlay"),
            }
        }
        // Those of others stay where they are; only the clones go.
        self.table().clear();
        self.show_count();
    }

    /// Makes all overlays forget which names did not exist. Returns how many there are. Cancel safe.
    ///
    /// # Errors
    /// When one cannot be refreshed.
    pub async fn refresh(&self) -> Result<usize, OverlayError> {
        let ticket = self.refresher.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut began = self.refresher.turn.lock().await;
        if self.refresher.done.load(Ordering::SeqCst) >= ticket {
            return Ok(self.table().len());
        }
        if let Some(before) = *began {
            tokio::time::sleep_until(before + REFRESH_EVERY).await;
        }
        *began = Some(Instant::now());
        let covers = self.refresher.asked.load(Ordering::SeqCst);
        // Only now: whoever asks from here on, for an overlay that is not among these, gets a refresh of its own.
        let overlays = self.all();
        let count = overlays.len();
        self.metrics.overlay_refreshes.inc();
        blocking(move || {
            for overlay in overlays {
                kernel::refresh(&overlay.tree).map_err(OverlayError::kernel("refresh", &overlay.info.merged))?;
            }
            Ok(())
        })
        .await?;
        self.refresher.done.store(covers, Ordering::SeqCst);
        Ok(count)
    }

    /// Makes sure that these names, which the lower has now, are seen through every overlay. Returns the first that is
    /// not, when the time is up or when it never will be. Cancel safe.
    ///
    /// # Errors
    /// When an overlay cannot be looked through or refreshed.
    pub async fn show(&self, names: &[String], limit: Duration) -> Result<Option<String>, OverlayError> {
        let until = Instant::now() + limit;
        let mut hidden: Vec<(Arc<Overlay>, String)> = Vec::new();
        for overlay in self.all() {
            hidden.extend(names.iter().map(|name| (Arc::clone(&overlay), name.clone())));
        }
        loop {
            let looked = blocking(move || {
                let mut still = Vec::new();
                for (overlay, name) in hidden {
                    let seen = kernel::look(&overlay.info.upper, &overlay.tree, &name);
                    match seen.map_err(OverlayError::kernel("look through", &overlay.info.merged))? {
                        Seen::Yes => {}
                        Seen::Never => return Ok((Vec::new(), Some(name))),
                        Seen::NotYet => still.push((overlay, name)),
                    }
                }
                Ok((still, None))
            });
            let (still, never) = looked.await?;
            if never.is_some() {
                return Ok(never);
            }
            let Some((_, first)) = still.first() else { return Ok(None) };
            if Instant::now() >= until {
                return Ok(Some(first.clone()));
            }
            self.refresh().await?;
            hidden = still;
        }
    }

    fn take(
        &self,
        merged: &Path,
        upper: PathBuf,
        work: Option<PathBuf>,
        adopted: bool,
    ) -> Result<OverlayInfo, OverlayError> {
        let give_up = |_: &OverlayError| {
            if !adopted {
                let _ = kernel::unmount(merged, true);
            }
        };
        let tree = kernel::clone_tree(merged).map_err(OverlayError::kernel("clone the mount on", merged));
        let tree = tree.inspect_err(give_up)?;
        let store_uri = self.store_uri(merged, &upper);
        let (lower, at) = (self.own.lower.clone(), merged.to_owned());
        let info = OverlayInfo { merged: at, lower, upper, work, adopted, store_uri };
        let overlay = Arc::new(Overlay { info: info.clone(), tree });
        self.table().insert(merged.to_owned(), Arc::clone(&overlay));
        // A path may have been called valid while nobody looked through this overlay, which may have been told before
        // that it does not exist. From the table on it is looked through; what it believes of the time before goes.
        let refreshed = kernel::refresh(&overlay.tree).map_err(OverlayError::kernel("refresh", merged));
        let refreshed = refreshed.inspect_err(|error| {
            self.table().remove(merged);
            give_up(error);
        });
        self.show_count();
        refreshed.map(|()| info)
    }

    /// What Nix needs to use the overlay as its store.
    fn store_uri(&self, merged: &Path, upper: &Path) -> String {
        let lower = format!("unix://{}%3Freal={}", self.own.nix_socket.display(), self.own.lower.display());
        // On the store directory itself, or in a chroot at the same place below it.
        let root = merged.to_str().and_then(|merged| merged.strip_suffix(self.own.store_dir.as_str()));
        let place = match root {
            Some("") => String::new(),
            Some(root) => format!("root={root}&"),
            None => format!("real={}&", merged.display()),
        };
        format!("local-overlay://?{place}upper-layer={}&lower-store={lower}", upper.display())
    }

    /// Whether a mount is an overlay over this daemon's mount point.
    fn is_ours(&self, mount: &mountinfo::MountInfo) -> bool {
        mount.fs_type == "overlay" && mount.option("lowerdir").is_some_and(|lower| lower == self.own.lower)
    }

    /// Whether a mount is what a daemon before this one left behind.
    fn is_orphan(&self, mount: &mountinfo::MountInfo) -> bool {
        let in_care = self.table().contains_key(&mount.mount_point);
        !in_care && self.is_ours(mount) && mountinfo::is_dead(&mount.mount_point)
    }

    fn all(&self) -> Vec<Arc<Overlay>> {
        self.table().values().cloned().collect()
    }

    fn show_count(&self) {
        self.metrics.overlays.set(i64::try_from(self.table().len()).unwrap_or(i64::MAX));
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Arc<Overlay>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs work that may wait for the kernel, and through it for this daemon's own answers, away from the runtime.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, OverlayError> + Send + 'static,
) -> Result<T, OverlayError> {
    joined(tokio::task::spawn_blocking(work)).await
}
