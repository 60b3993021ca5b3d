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
pub(crate) mod hands;
mod kernel;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use narlake_format::api::control::OverlayInfo;
use narlake_format::error::chain;
use serde::{Deserialize, Serialize};

use self::care::{LOOKS_MAX, Overlay};
use self::gate::{Gate, Limit};
pub use self::handed::{HANDED, Handed};
use self::hands::{Down, Mounted};
pub(crate) use self::kernel::refresh;
use crate::metrics::Metrics;
use crate::mount_error::MountError;
use crate::mounter::Mounter;
use crate::mountinfo;
use crate::privilege;

/// Overlays in care at once.
const OVERLAYS_MAX: usize = 64;

// With every overlay stuck, the 512 threads that the runtime has for such work still serve the cache.
const _: () = assert!(OVERLAYS_MAX * (LOOKS_MAX + 1) < 384, "threads are left");

/// Longest wait for an overlay to be mounted, adopted or unmounted. What was begun by then is still done.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// What the daemon itself needs, and must not hide under its own mounts.
#[derive(Clone, Debug, Serialize, Deserialize)]
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

/// What the supervisor keeps of an overlay, beside its descriptors.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    info: OverlayInfo,
    device: Option<u64>,
}

/// How the supervisor's keys of overlays begin.
const KEY: &str = "overlay ";

impl Place {
    fn key(&self) -> String {
        match self {
            Self::Here(path) => format!("{KEY}{}", path.display()),
            Self::Elsewhere(device) => format!("{KEY}{device:#x}"),
        }
    }

    fn kept(&self, info: &OverlayInfo) -> Result<String, MountError> {
        let device = if let Self::Elsewhere(device) = self { Some(*device) } else { None };
        let kept = serde_json::to_string(&Kept { info: info.clone(), device });
        kept.map_err(|error| MountError::kernel("describe", &info.merged)(error.into()))
    }
}

/// The overlays in care.
pub struct Overlays {
    own: Own,
    // Held for a look or a change, never while the kernel works.
    table: Mutex<BTreeMap<Place, Arc<Overlay>>>,
    // Mounting and unmounting take turns.
    changes: Arc<Gate>,
    /// Overlays in care over all views, and how many of them are those in the table.
    in_all: Arc<AtomicUsize>,
    counted: AtomicUsize,
    mounter: Mounter,
    metrics: Metrics,
}

impl Overlays {
    /// No overlays yet, over this daemon's mount.
    #[must_use]
    pub fn new(own: Own, mounter: Mounter, metrics: &Metrics) -> Self {
        Self {
            own,
            table: Mutex::default(),
            changes: Arc::new(Gate::new(1)),
            in_all: Arc::default(),
            counted: AtomicUsize::new(0),
            mounter,
            metrics: metrics.clone(),
        }
    }

    /// Overlays over the mount of another view. They count with these, and take turns with them. Where Nix cannot ask
    /// about that view, for want of a socket, it is not told of its overlays either.
    #[must_use]
    pub fn of_view(&self, lower: PathBuf, nix_socket: Option<PathBuf>) -> Self {
        let mut needed = self.own.needed.clone();
        needed.extend(nix_socket.clone());
        Self {
            own: Own { lower, nix_socket: nix_socket.unwrap_or_default(), needed, ..self.own.clone() },
            table: Mutex::default(),
            changes: Arc::clone(&self.changes),
            in_all: Arc::clone(&self.in_all),
            counted: AtomicUsize::new(0),
            mounter: self.mounter.clone(),
            metrics: self.metrics.clone(),
        }
    }

    /// What the daemon itself needs.
    #[must_use]
    pub const fn own(&self) -> &Own {
        &self.own
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
        if !self.mounter.outlives() && !privilege::may_mount() {
            let reason = "this daemon may mount no overlays: they need root, or a user namespace (unshare -Urm)";
            return Err(MountError::refused(&merged, reason));
        }
        let (this, at) = (Arc::clone(self), merged.clone());
        self.change("mount an overlay on", &at, move || {
            let mounted = this.mounter.overlay_up(&this.own, &upper, &work, &merged)?;
            let place = mounted.merged.clone();
            this.take(mounted, false).inspect_err(|_| {
                let _ = this.mounter.overlay_down(&this.own, &place, true);
            })
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
            this.take(this.mounter.overlay_adopt(&this.own, &merged)?, true)
        })
        .await
    }

    fn adopt_from_elsewhere(&self, merged: &Path, handed: Handed) -> Result<OverlayInfo, MountError> {
        let mount = handed.mount_on(merged)?;
        let upper = hands::upper_of(&self.own, merged, mount.as_ref(), &handed.path())?;
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
        Ok(mount.is_some_and(|mount| hands::is_ours(&self.own, &mount))
            && std::fs::metadata(merged).is_ok_and(|metadata| metadata.dev() == device))
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
                if this.leave(&Place::Elsewhere(device)) {
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
        let Down { merged, unmounted, found } = self.mounter.overlay_down(&self.own, merged, lazy)?;
        let place = Place::Here(merged.clone());
        match found {
            // Also where somebody else has unmounted it already.
            None => (self.leave(&place) || unmounted).then_some(()).ok_or(MountError::Unknown { path: merged }),
            Some(_) if !self.table().contains_key(&place) => Err(MountError::Unknown { path: merged }),
            Some(kind) => {
                let reason =
                    format!("it is not the overlay that is mounted on it any more, but a mount of type {kind}");
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
    fn take(&self, mounted: Mounted, adopted: bool) -> Result<OverlayInfo, MountError> {
        let Mounted { merged, upper, work, tree, upper_dir } = mounted;
        let info = self.describe(&merged, upper, work, adopted);
        self.enter(Place::Here(merged), info, (tree, upper_dir))
    }

    /// Enters an overlay in the table, and refreshes it.
    fn enter(&self, place: Place, info: OverlayInfo, opened: (OwnedFd, OwnedFd)) -> Result<OverlayInfo, MountError> {
        let overlay = Arc::new(Overlay::new(info, opened, &self.metrics));
        let info = &overlay.info;
        if self.in_all.load(Ordering::SeqCst) >= OVERLAYS_MAX && !self.table().contains_key(&place) {
            return Err(MountError::refused(&info.merged, format!("{OVERLAYS_MAX} overlays are in care already")));
        }
        // Whoever mounts outlives this daemon: the next one is to find it.
        self.mounter.keep(&place.key(), place.kept(info)?, &overlay.descriptors())?;
        let key = place.key();
        self.table().insert(place, Arc::clone(&overlay));
        // A path may have been called valid while nobody looked through this overlay, which may have been told before
        // that it does not exist. From the table on it is looked through; what it believes of the time before goes.
        let refreshed = overlay.refresh_now();
        if refreshed.is_err() {
            self.table().retain(|_, other| !Arc::ptr_eq(other, &overlay));
            self.let_go(&key);
        }
        self.show_count();
        refreshed.map(|()| info.clone())
    }

    /// Takes the overlays over this lower into care that were in a daemon's before this one. Blocks.
    pub fn restore(&self) {
        for key in self.mounter.kept().iter().filter(|key| key.starts_with(KEY)) {
            match self.restore_one(key) {
                Ok(None) => {}
                Ok(Some(info)) => tracing::info!(merged = %info.merged.display(), "overlay in care again"),
                Err(error) => tracing::error!(overlay = key, error = chain(&error), "take the overlay into care again"),
            }
        }
    }

    fn restore_one(&self, key: &str) -> Result<Option<OverlayInfo>, MountError> {
        let (text, descriptors) = self.mounter.take(key)?;
        let odd = || MountError::refused(Path::new(key), "what is kept of this overlay cannot be read");
        let Kept { info, device } = serde_json::from_str(&text).map_err(|_| odd())?;
        if info.lower != self.own.lower {
            return Ok(None);
        }
        let opened = <[OwnedFd; 2]>::try_from(descriptors).map_err(|_| odd())?.into();
        let place = device.map_or_else(|| Place::Here(info.merged.clone()), Place::Elsewhere);
        self.enter(place, info, opened).map(Some)
    }

    /// Takes an overlay out of care. False if it was not in.
    fn leave(&self, place: &Place) -> bool {
        let known = self.table().remove(place).is_some();
        if known {
            self.let_go(&place.key());
            self.show_count();
        }
        known
    }

    /// The daemon after this one is not to find it.
    fn let_go(&self, key: &str) {
        if let Err(error) = self.mounter.forget(key) {
            tracing::warn!(overlay = key, error = chain(&error), "have the supervisor forget an overlay");
        }
    }

    fn describe(&self, merged: &Path, upper: PathBuf, work: Option<PathBuf>, adopted: bool) -> OverlayInfo {
        let store_uri = self.store_uri(merged, &upper);
        let (lower, merged) = (self.own.lower.clone(), merged.to_owned());
        OverlayInfo { merged, lower, upper, work, adopted, store_uri, sealed: None }
    }

    /// What Nix needs to use the overlay as its store.
    fn store_uri(&self, merged: &Path, upper: &Path) -> String {
        if self.own.nix_socket.as_os_str().is_empty() {
            return String::new();
        }
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

    fn all(&self) -> Vec<Arc<Overlay>> {
        self.table().values().cloned().collect()
    }

    fn show_count(&self) {
        let table = self.table();
        let (now, before) = (table.len(), self.counted.swap(table.len(), Ordering::SeqCst));
        self.in_all.fetch_add(now, Ordering::SeqCst);
        let in_all = self.in_all.fetch_sub(before, Ordering::SeqCst) - before;
        drop(table);
        self.metrics.overlays.set(i64::try_from(in_all).unwrap_or(i64::MAX));
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<Place, Arc<Overlay>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
