//! Overlays: the writable stores that people and Nix see, over the read-only view.
//!
//! Any number of them may lie over one mount. Mounted by this daemon ([`Overlays::up`]) or by somebody else
//! ([`Overlays::adopt`]), an overlay is in care from then on: a clone of its mount is kept open, through which it is
//! refreshed and looked through from any mount namespace, with its flags kept.
//!
//! A refresh makes an overlay forget the names that did not exist. Refreshes coalesce: whoever asks for one shares the
//! next that begins, and an overlay has at most five a second.
//!
//! Whatever is done to an overlay waits for the kernel, and through it perhaps for this daemon's own session, for a disk
//! or for another process. So every wait has an end for whoever waits, and the threads that may be stuck are counted
//! ([`gate`]): each overlay has its own, changes have one. One overlay that hangs keeps no other from being looked
//! through.
//!
//! Overlay options are fixed (docs/decisions/0007-overlay-options.md): what Nix's own check accepts, renames of lower
//! directories that work, a chmod that copies no content, and no index, which would tie an upper for ever to one lower.

mod care;
mod checks;
mod gate;
mod kernel;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use narlake_format::api::control::OverlayInfo;

use self::care::{LOOKS_MAX, Overlay};
use self::gate::{Gate, Limit};
use crate::metrics::Metrics;
use crate::mount_error::MountError;
use crate::mountinfo;

/// Overlays in care at once.
const OVERLAYS_MAX: usize = 64;

// With every overlay stuck, the 512 threads that the runtime has for such work still serve the cache.
const _: () = assert!(OVERLAYS_MAX * (LOOKS_MAX + 1) < 384, "threads are left");

/// Longest wait for an overlay to be mounted, adopted or unmounted. What was begun by then is still done.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// What the daemon itself needs, and must not hide under its own mounts.
#[derive(Clone, Debug)]
pub struct Own {
    /// The mount of the view: the lower of every overlay.
    pub lower: PathBuf,
    /// The store directory of its paths.
    pub store_dir: String,
    /// The Nix socket.
    pub nix_socket: PathBuf,
    /// What it, or whoever speaks to it, opens by path while it runs: the cache directory, the sockets.
    pub needed: Vec<PathBuf>,
    /// What it was started from: the executable, the configuration.
    pub files: Vec<PathBuf>,
}

/// The overlays in care.
pub struct Overlays {
    own: Own,
    // Held for a look or a change, never while the kernel works.
    table: Mutex<BTreeMap<PathBuf, Arc<Overlay>>>,
    // Mounting and unmounting take turns.
    changes: Gate,
    metrics: Metrics,
}

impl Overlays {
    /// No overlays yet, over this daemon's mount.
    #[must_use]
    pub fn new(own: Own, metrics: &Metrics) -> Self {
        Self { own, table: Mutex::default(), changes: Gate::new(1), metrics: metrics.clone() }
    }

    /// The overlays, in order of where they are mounted.
    #[must_use]
    pub fn list(&self) -> Vec<OverlayInfo> {
        self.table().values().map(|overlay| overlay.info.clone()).collect()
    }

    /// Mounts an overlay and takes it into care. Cancel safe: what has begun is done all the same.
    ///
    /// # Errors
    /// When it would hurt, the kernel refuses, or it takes too long.
    pub async fn up(
        self: &Arc<Self>,
        upper: PathBuf,
        work: PathBuf,
        merged: PathBuf,
    ) -> Result<OverlayInfo, MountError> {
        let (this, at) = (Arc::clone(self), merged.clone());
        self.change("mount an overlay on", &at, move || {
            let plan = checks::plan(&this.own, &upper, &work, &merged)?;
            match mountinfo::mount_on(&plan.merged).map_err(MountError::kernel("find mounts on", &plan.merged))? {
                Some(mount) if this.is_orphan(&mount) => {
                    tracing::warn!(merged = %plan.merged.display(), "detached the overlay of a daemon that is gone");
                    kernel::unmount(&plan.merged, true).map_err(MountError::kernel("detach", &plan.merged))?;
                }
                Some(mount) if mount.fs_type == "overlay" => {
                    let reason = "an overlay is mounted here already; adopt it, or unmount it first";
                    return Err(MountError::refused(&plan.merged, reason));
                }
                _ => {}
            }
            kernel::mount(&this.own.lower, &plan).map_err(|source| {
                // Three file systems on top of each other are one too many for the kernel.
                let operation = "mount an overlay (see the kernel's log; the upper may not lie on an overlay) on";
                MountError::Kernel { operation, path: plan.merged.clone(), source }
            })?;
            this.take(&plan.merged, plan.upper, Some(plan.work), false)
        })
        .await
    }

    /// Takes an overlay into care that somebody else has mounted over this daemon's mount.
    ///
    /// # Errors
    /// When there is none, or it takes too long.
    pub async fn adopt(self: &Arc<Self>, merged: PathBuf) -> Result<OverlayInfo, MountError> {
        let (this, at) = (Arc::clone(self), merged.clone());
        self.change("adopt", &at, move || {
            let merged = checks::canonical(&merged)?;
            let mount = mountinfo::mount_on(&merged).map_err(MountError::kernel("find mounts on", &merged))?;
            let mount = mount.filter(|mount| this.is_ours(mount));
            let mount = mount.ok_or_else(|| MountError::Unknown { path: merged.clone() })?;
            if mountinfo::is_dead(&merged) {
                let reason = "this overlay lies over the mount of a daemon that is gone; unmount it, and mount it anew";
                return Err(MountError::refused(&merged, reason));
            }
            let upper = mount.option("upperdir");
            let upper = upper.ok_or_else(|| MountError::refused(&merged, "a read-only overlay needs no care"))?;
            this.take(&merged, upper, mount.option("workdir"), true)
        })
        .await
    }

    /// Unmounts an overlay, also one of a daemon that is gone. Cancel safe: what has begun is done all the same.
    ///
    /// # Errors
    /// When there is none, it is in use and `lazy` is not set, or it takes too long.
    pub async fn down(self: &Arc<Self>, merged: PathBuf, lazy: bool) -> Result<(), MountError> {
        let (this, at) = (Arc::clone(self), merged.clone());
        self.change("unmount", &at, move || this.down_blocking(&merged, lazy)).await
    }

    /// Does this to an overlay once it has its turn.
    async fn change<T: Send + 'static>(
        &self,
        operation: &'static str,
        path: &Path,
        work: impl FnOnce() -> Result<T, MountError> + Send + 'static,
    ) -> Result<T, MountError> {
        let limit = Limit::new(CHANGE_TIMEOUT);
        self.changes.run(limit, work).await.unwrap_or_else(|| Err(limit.late(operation, path)))
    }

    fn down_blocking(&self, merged: &Path, lazy: bool) -> Result<(), MountError> {
        let merged = checks::canonical(merged)?;
        let mount = mountinfo::mount_on(&merged).map_err(MountError::kernel("find mounts on", &merged))?;
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
                    Err(MountError::Busy { path: merged })
                } else {
                    Err(MountError::kernel("unmount", &merged)(error))
                }
            }
        }
    }

    /// Takes down an overlay that is not what is seen where it was mounted.
    fn down_elsewhere(&self, merged: PathBuf, mount: Option<&mountinfo::MountInfo>) -> Result<(), MountError> {
        match mount {
            _ if !self.table().contains_key(&merged) => Err(MountError::Unknown { path: merged }),
            // Somebody has unmounted it already.
            None => {
                self.table().remove(&merged);
                self.show_count();
                Ok(())
            }
            Some(mount) => {
                let reason =
                    format!("a mount of type {} that is not the overlay is on it; unmount that first", mount.fs_type);
                Err(MountError::Refused { path: merged, reason })
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
                Err(MountError::Busy { .. }) => {
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
    /// When one cannot be refreshed, or not in time; the others are all the same.
    pub async fn refresh(&self, limit: Duration) -> Result<usize, MountError> {
        let limit = Limit::new(limit);
        let overlays = self.all();
        let refreshed = join_all(overlays.iter().map(|overlay| overlay.refresh(limit))).await;
        refreshed.into_iter().collect::<Result<(), _>>()?;
        Ok(overlays.len())
    }

    /// Makes sure that these names, which the lower has now, are seen through every overlay. Returns the first that is
    /// not, when the time is up or when it never will be. Cancel safe.
    ///
    /// # Errors
    /// When an overlay cannot be looked through or refreshed, or not in time; the others are all the same.
    pub async fn show(&self, names: &[String], limit: Duration) -> Result<Option<String>, MountError> {
        let limit = Limit::new(limit);
        let overlays = self.all();
        let shown = join_all(overlays.iter().map(|overlay| overlay.show(names.to_vec(), limit))).await;
        let hidden: Vec<Option<String>> = shown.into_iter().collect::<Result<_, _>>()?;
        Ok(hidden.into_iter().flatten().next())
    }

    fn take(
        &self,
        merged: &Path,
        upper: PathBuf,
        work: Option<PathBuf>,
        adopted: bool,
    ) -> Result<OverlayInfo, MountError> {
        let give_up = |_: &MountError| {
            if !adopted {
                let _ = kernel::unmount(merged, true);
            }
        };
        let is_full = self.table().len() >= OVERLAYS_MAX && !self.table().contains_key(merged);
        let full = is_full.then(|| MountError::refused(merged, format!("{OVERLAYS_MAX} overlays are in care already")));
        full.map_or(Ok(()), Err).inspect_err(give_up)?;
        let tree = kernel::clone_tree(merged).map_err(MountError::kernel("clone the mount on", merged));
        let tree = tree.inspect_err(give_up)?;
        let store_uri = self.store_uri(merged, &upper);
        let (lower, at) = (self.own.lower.clone(), merged.to_owned());
        let info = OverlayInfo { merged: at, lower, upper, work, adopted, store_uri };
        let overlay = Arc::new(Overlay::new(info.clone(), tree, &self.metrics));
        self.table().insert(merged.to_owned(), Arc::clone(&overlay));
        // A path may have been called valid while nobody looked through this overlay, which may have been told before
        // that it does not exist. From the table on it is looked through; what it believes of the time before goes.
        let refreshed = overlay.refresh_now().inspect_err(|error| {
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
