//! Overlays: the writable stores that people and Nix see, over the read-only view.
//!
//! Any number of them may lie over one mount. Mounted by this daemon ([`Overlays::up`]) or by somebody else
//! ([`Overlays::adopt`]), also in another mount namespace ([`handed`]), an overlay is in care from then on: a clone of its mount is kept open, through which it is
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
mod handed;
mod kernel;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use narlake_format::api::control::OverlayInfo;
use narlake_format::error::chain;

use self::care::{LOOKS_MAX, Overlay};
use self::gate::{Gate, Limit};
pub use self::handed::{HANDED, Handed};
use crate::metrics::Metrics;
use crate::mount_error::MountError;
use crate::mountinfo::{self, MountInfo};

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

/// What tells an overlay from others.
#[derive(PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Place {
    /// Mounted here, as this process sees it.
    Here(PathBuf),
    /// Handed over from another mount namespace, in which another overlay may be mounted on the same path: its device.
    Elsewhere(u64),
}

/// The overlays in care.
pub struct Overlays {
    own: Own,
    // Held for a look or a change, never while the kernel works.
    table: Mutex<BTreeMap<Place, Arc<Overlay>>>,
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

    /// Takes an overlay into care that somebody else has mounted over this daemon's mount: one that is seen from here, or
    /// one of another mount namespace, for which what is needed is handed over.
    ///
    /// # Errors
    /// When there is none, or it takes too long.
    pub async fn adopt(self: &Arc<Self>, merged: PathBuf, handed: Option<Handed>) -> Result<OverlayInfo, MountError> {
        let (this, at) = (Arc::clone(self), merged.clone());
        self.change("adopt", &at, move || {
            if let Some(handed) = handed
                && !this.is_here(&merged, &handed)?
            {
                return this.adopt_from_elsewhere(&merged, handed);
            }
            let merged = checks::canonical(&merged)?;
            let mount = mountinfo::mount_on(&merged).map_err(MountError::kernel("find mounts on", &merged))?;
            let upper = this.upper_of(&merged, mount.as_ref(), &merged)?;
            this.take(&merged, upper, mount.and_then(|mount| mount.option("workdir")), true)
        })
        .await
    }

    fn adopt_from_elsewhere(&self, merged: &Path, handed: Handed) -> Result<OverlayInfo, MountError> {
        let mount = handed.mount_on(merged)?;
        let upper = self.upper_of(merged, mount.as_ref(), &handed.path())?;
        let device = handed.device().map_err(MountError::kernel("look at", merged))?;
        let opened = handed.open(&upper).map_err(MountError::kernel("open the upper directory of", merged))?;
        let info = self.describe(merged, upper, mount.and_then(|mount| mount.option("workdir")), true);
        self.enter(Place::Elsewhere(device), info, opened)
    }

    /// Whether the overlay that is handed over is the one that is seen from here.
    fn is_here(&self, merged: &Path, handed: &Handed) -> Result<bool, MountError> {
        use std::os::unix::fs::MetadataExt;
        let mount = mountinfo::mount_on(merged).map_err(MountError::kernel("find mounts on", merged))?;
        let device = handed.device().map_err(MountError::kernel("look at", merged))?;
        // Only what is ours is looked at: nothing else says when it answers.
        Ok(mount.is_some_and(|mount| self.is_ours(&mount))
            && std::fs::metadata(merged).is_ok_and(|metadata| metadata.dev() == device))
    }

    /// The upper directory of what is mounted, if it is an overlay that can be adopted. It is reached by `at`.
    fn upper_of(&self, merged: &Path, mount: Option<&MountInfo>, at: &Path) -> Result<PathBuf, MountError> {
        let mount = mount.filter(|mount| self.is_ours(mount));
        let mount = mount.ok_or_else(|| MountError::Unknown { path: merged.to_owned() })?;
        if mountinfo::is_dead(at) {
            let reason = "this overlay lies over the mount of a daemon that is gone; unmount it, and mount it anew";
            return Err(MountError::refused(merged, reason));
        }
        mount.option("upperdir").ok_or_else(|| MountError::refused(merged, "a read-only overlay needs no care"))
    }

    /// Unmounts an overlay, also one of a daemon that is gone; or lets go of one that was handed over, which is for
    /// whoever sees it to unmount. Cancel safe: what has begun is done all the same.
    ///
    /// # Errors
    /// When there is none, it is in use and `lazy` is not set, or it takes too long.
    pub async fn down(self: &Arc<Self>, merged: PathBuf, lazy: bool, handed: Option<Handed>) -> Result<(), MountError> {
        let (this, at) = (Arc::clone(self), merged.clone());
        self.change("unmount", &at, move || {
            if let Some(handed) = handed {
                let device = handed.device().map_err(MountError::kernel("look at", &merged))?;
                if this.table().remove(&Place::Elsewhere(device)).is_some() {
                    this.show_count();
                    return Ok(());
                }
            }
            this.down_blocking(&merged, lazy)
        })
        .await
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
        let known = self.table().remove(&Place::Here(merged.clone()));
        match kernel::unmount(&merged, lazy) {
            Ok(()) => {
                self.show_count();
                Ok(())
            }
            Err(error) => {
                // Still there: still in care.
                if let Some(overlay) = known {
                    self.table().insert(Place::Here(merged.clone()), overlay);
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
    fn down_elsewhere(&self, merged: PathBuf, mount: Option<&MountInfo>) -> Result<(), MountError> {
        match mount {
            _ if !self.table().contains_key(&Place::Here(merged.clone())) => Err(MountError::Unknown { path: merged }),
            // Somebody has unmounted it already.
            None => {
                self.table().remove(&Place::Here(merged));
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
                        tracing::error!(%merged, error = chain(&error), "detach the overlay");
                    }
                }
                Err(error) => {
                    tracing::error!(%merged, error = chain(&error), "unmount the overlay");
                }
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

    /// Takes an overlay into care that is seen from here.
    fn take(
        &self,
        merged: &Path,
        upper: PathBuf,
        work: Option<PathBuf>,
        adopted: bool,
    ) -> Result<OverlayInfo, MountError> {
        let opened = (|| Ok((kernel::clone_tree(merged)?, kernel::open_upper(&upper)?)))();
        let opened = opened.map_err(MountError::kernel("clone the mount, and open its upper directory, of", merged));
        let info = self.describe(merged, upper, work, adopted);
        let entered = opened.and_then(|opened| self.enter(Place::Here(merged.to_owned()), info, opened));
        entered.inspect_err(|_| {
            if !adopted {
                let _ = kernel::unmount(merged, true);
            }
        })
    }

    /// Enters an overlay in the table, and refreshes it.
    fn enter(&self, place: Place, info: OverlayInfo, opened: (OwnedFd, OwnedFd)) -> Result<OverlayInfo, MountError> {
        let overlay = Arc::new(Overlay::new(info.clone(), opened, &self.metrics));
        {
            let mut table = self.table();
            if table.len() >= OVERLAYS_MAX && !table.contains_key(&place) {
                return Err(MountError::refused(&info.merged, format!("{OVERLAYS_MAX} overlays are in care already")));
            }
            table.insert(place, Arc::clone(&overlay));
        }
        // A path may have been called valid while nobody looked through this overlay, which may have been told before
        // that it does not exist. From the table on it is looked through; what it believes of the time before goes.
        let refreshed = overlay.refresh_now();
        if refreshed.is_err() {
            self.table().retain(|_, other| !Arc::ptr_eq(other, &overlay));
        }
        self.show_count();
        refreshed.map(|()| info)
    }

    fn describe(&self, merged: &Path, upper: PathBuf, work: Option<PathBuf>, adopted: bool) -> OverlayInfo {
        let store_uri = self.store_uri(merged, &upper);
        let (lower, merged) = (self.own.lower.clone(), merged.to_owned());
        OverlayInfo { merged, lower, upper, work, adopted, store_uri }
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
    fn is_ours(&self, mount: &MountInfo) -> bool {
        mount.fs_type == "overlay" && mount.option("lowerdir").is_some_and(|lower| lower == self.own.lower)
    }

    /// Whether a mount is what a daemon before this one left behind.
    fn is_orphan(&self, mount: &MountInfo) -> bool {
        let in_care = self.table().contains_key(&Place::Here(mount.mount_point.clone()));
        !in_care && self.is_ours(mount) && mountinfo::is_dead(&mount.mount_point)
    }

    fn all(&self) -> Vec<Arc<Overlay>> {
        self.table().values().cloned().collect()
    }

    fn show_count(&self) {
        self.metrics.overlays.set(i64::try_from(self.table().len()).unwrap_or(i64::MAX));
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<Place, Arc<Overlay>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
