//! Sealed views: closures whose metadata the kernel has for itself, so that it asks nobody about what is cached.
//!
//! A sealed view is an overlay of layers ([`kernel`]): an EROFS image of the tree of its closures ([`erofs`], kept by
//! [`images`]), whose files redirect by content; the cache's directory of complete files; and, for what that does not
//! hold, a file system that answers for content by its name (`fs::contents`), mounted where only root gets. It is a
//! list of layers for a mount of its own, never a mount to stack on: the kernel allows one overlay on top of another.
//!
//! Its root lists, and its paths are fixed: a Nix store that collects garbage takes what is listed for its own, so it is
//! given no `--store` (docs/semantics.md). docs/decisions/0012-own-erofs-writer.md says why the image is written here.
//!
//! An overlay holds what it has opened. When the cache evicts, these overlays are refreshed, so that the space comes
//! free ([`Sealed::release`]).

pub mod erofs;
mod images;
pub mod kernel;

use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use narlake_format::api::control::OverlayInfo;
use narlake_format::error::chain;
use narlake_format::nix::store_path::StorePath;
use tokio::runtime::Handle;
use tokio::sync::{OnceCell, mpsc};

use self::erofs::ImageError;
use self::images::{Image, ImageId, Images};
use crate::cache::Cache;
use crate::error::joined;
use crate::fs::LazyStore;
use crate::fs::error::FsError;
use crate::fs::nodes::ObjectKey;
use crate::fuse::Shim;
use crate::fuse::session::Serving;
use crate::metrics::Metrics;
use crate::mount_error::MountError;
use crate::mounter::Mounter;
use crate::overlay::{Own, refresh};
use crate::privilege;
use crate::trust::TrustedRecord;
use crate::view::{View, ViewError};

/// Most sealed views mounted at once.
const MOUNTED_MAX: usize = 512;

/// Objects that are loaded ahead of the thread that writes them.
const LOADED_AHEAD: usize = 16;

/// Longest wait for the cache to have verified what an unclean boot left doubtful.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(600);

/// Longest wait for the kernel to mount or unmount.
const MOUNT_TIMEOUT: Duration = Duration::from_secs(30);

/// The supervisor's name for the connection that answers for content, and how its keys of sealed views begin.
const CONTENT: &str = "content";
const KEY: &str = "sealed ";

/// Why a sealed view is not mounted.
#[derive(Debug, thiserror::Error)]
pub enum SealedError {
    /// What its roots need is not known.
    #[error(transparent)]
    View(#[from] ViewError),
    /// A root, or something it needs, is not in the lake.
    #[error("{path} is not in the lake")]
    Missing {
        /// The path, or its hash part.
        path: String,
    },
    /// An object cannot be loaded.
    #[error("load {path}")]
    Load {
        /// The store path.
        path: String,
        /// Why.
        #[source]
        source: Box<FsError>,
    },
    /// The image.
    #[error("make the image of the closure")]
    Image(#[from] ImageError),
    /// The mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The cache is not yet sure of what it holds.
    #[error("the cache is still verifying its files after an unclean shutdown; try again")]
    Unverified,
}

/// What sealed views are made of.
pub struct Parts {
    /// The store whose content they show.
    pub store: LazyStore,
    /// Its view.
    pub view: View,
    /// The cache.
    pub cache: Arc<Cache>,
    /// The daemon's own places.
    pub own: Own,
    /// Who mounts.
    pub mounter: Mounter,
    /// The metrics.
    pub metrics: Metrics,
}

struct Mounted {
    info: OverlayInfo,
    /// A clone of the mount.
    tree: OwnedFd,
}

/// The sealed views of this daemon.
pub struct Sealed {
    parts: Parts,
    images: Arc<Images>,
    /// Answers for content that the cache does not hold, from the first view on.
    content: OnceCell<Mutex<Serving>>,
    // Held for a look or a change, never across an await.
    table: Mutex<BTreeMap<PathBuf, Arc<Mounted>>>,
    // Making and unmaking take turns.
    changes: tokio::sync::Mutex<()>,
}

impl Sealed {
    /// None yet.
    ///
    /// # Errors
    /// When the directory for images cannot be made.
    pub fn new(parts: Parts) -> std::io::Result<Arc<Self>> {
        let images = Arc::new(Images::open_dir(parts.cache.dir().join("sealed"))?);
        let this = Self {
            parts,
            images,
            content: OnceCell::new(),
            table: Mutex::default(),
            changes: tokio::sync::Mutex::default(),
        };
        Ok(Arc::new(this))
    }

    /// Takes those into care again that an earlier daemon had.
    pub async fn restore(self: &Arc<Self>) {
        let keys: Vec<String> = self.parts.mounter.kept().iter().filter(|key| key.starts_with(KEY)).cloned().collect();
        if keys.is_empty() {
            return;
        }
        if let Err(error) = self.serve_content().await {
            tracing::error!(error = chain(&error), "answer for the content of sealed views again");
        }
        let this = Arc::clone(self);
        joined(tokio::task::spawn_blocking(move || {
            for key in keys {
                match this.restore_one(&key) {
                    Ok(info) => tracing::info!(merged = %info.merged.display(), "sealed view in care again"),
                    Err(error) => {
                        tracing::error!(view = key, error = chain(&error), "take the sealed view into care again");
                    }
                }
            }
        }))
        .await;
    }

    fn restore_one(&self, key: &str) -> Result<OverlayInfo, MountError> {
        let (text, descriptors) = self.parts.mounter.take(key)?;
        let odd = || MountError::refused(Path::new(key), "what is kept of this view cannot be read");
        let info: OverlayInfo = serde_json::from_str(&text).map_err(|_| odd())?;
        let [tree] = <[OwnedFd; 1]>::try_from(descriptors).map_err(|_| odd())?;
        let id = info.sealed.as_deref().and_then(ImageId::parse).ok_or_else(odd)?;
        let loaded = self.images.load(id).map_err(MountError::kernel("open the image of", &info.merged))?;
        loaded
            .ok_or_else(|| MountError::refused(&info.merged, "its image is gone: what is not cached cannot be read"))?;
        self.table().insert(info.merged.clone(), Arc::new(Mounted { info: info.clone(), tree }));
        Ok(info)
    }

    /// The sealed views, in order of where they are mounted.
    #[must_use]
    pub fn list(&self) -> Vec<OverlayInfo> {
        self.table().values().map(|mounted| mounted.info.clone()).collect()
    }

    /// Mounts the closures of these paths. `upper` is the directory that takes what is written, and the kernel's; without
    /// it the view is read-only.
    ///
    /// # Errors
    /// When a path is not in the lake, the image cannot be made, or the kernel refuses.
    pub async fn up(
        self: &Arc<Self>,
        roots: &[StorePath],
        upper: Option<(PathBuf, PathBuf)>,
        merged: PathBuf,
    ) -> Result<OverlayInfo, SealedError> {
        if !self.parts.mounter.outlives() && !privilege::may_mount() {
            let reason = "sealed views need root: the kernel mounts no images for others; use a live view";
            return Err(MountError::refused(&merged, reason).into());
        }
        if self.table().len() >= MOUNTED_MAX {
            return Err(MountError::refused(&merged, format!("{MOUNTED_MAX} sealed views are mounted already")).into());
        }
        let closures = self.parts.view.ensure(roots).await?;
        if let Some(path) = closures.missing.into_iter().next() {
            return Err(SealedError::Missing { path });
        }
        let cache = Arc::clone(&self.parts.cache);
        if !joined(tokio::task::spawn_blocking(move || cache.wait_verified(VERIFY_TIMEOUT))).await {
            return Err(SealedError::Unverified);
        }
        self.serve_content().await?;
        let _turn = self.changes.lock().await;
        let (id, image) = self.image(closures.records).await?;
        let this = Arc::clone(self);
        let at = merged.clone();
        let mounted = tokio::task::spawn_blocking(move || this.mount(id, &image, upper, &merged));
        self.limited("mount a sealed view on", &at, joined(mounted)).await
    }

    /// Unmounts one. `None` if there is none on this directory.
    ///
    /// # Errors
    /// When it is in use and `lazy` is not set, or the kernel refuses.
    pub async fn down(self: &Arc<Self>, merged: &Path, lazy: bool) -> Option<Result<(), SealedError>> {
        let mounted = self.table().get(merged).cloned()?;
        let this = Arc::clone(self);
        let unmounted = tokio::task::spawn_blocking(move || this.unmount(&mounted.info.merged, lazy));
        Some(self.limited("unmount", merged, joined(unmounted)).await)
    }

    /// Makes the views let go of content that nobody reads. Blocks.
    pub fn release(&self) {
        let mounted: Vec<Arc<Mounted>> = self.table().values().cloned().collect();
        for one in mounted {
            if let Err(error) = refresh(&one.tree) {
                tracing::warn!(merged = %one.info.merged.display(), %error, "have a sealed view let go of content");
            }
        }
    }

    /// Unmounts all, detaching those in use, and what answers for them. Blocks.
    pub fn stop(&self) {
        for info in self.list() {
            if let Err(error) = self.unmount(&info.merged, true) {
                tracing::error!(merged = %info.merged.display(), error = chain(&error), "unmount a sealed view");
            }
        }
        let Some(content) = self.content.get() else { return };
        if let Err(error) = content.lock().unwrap_or_else(PoisonError::into_inner).leave(true) {
            tracing::error!(error = chain(&error), "unmount what answers for content");
        }
    }

    /// Answers for content from now on.
    async fn serve_content(&self) -> Result<(), MountError> {
        let start = || async {
            let store = self.parts.store.of_contents(Arc::clone(&self.images) as _);
            let shim = Shim::new(store, Handle::current(), &self.parts.metrics);
            let (mounter, dir) = (self.parts.mounter.clone(), self.content_dir());
            let started = tokio::task::spawn_blocking(move || Serving::start(mounter, CONTENT, &dir, shim));
            joined(started).await.map(Mutex::new)
        };
        self.content.get_or_try_init(start).await.map(drop)
    }

    fn content_dir(&self) -> PathBuf {
        self.parts.cache.dir().join("content")
    }

    /// The image of these objects, made if it is not there.
    async fn image(&self, mut records: Vec<TrustedRecord>) -> Result<(ImageId, Arc<Image>), SealedError> {
        records.sort_unstable_by_key(|record| record.info().store_path.to_string());
        let keys: Vec<ObjectKey> = records.iter().map(ObjectKey::of).collect();
        let id = ImageId::of(self.parts.own.store_dir.as_str(), &keys);
        let images = Arc::clone(&self.images);
        let loaded = joined(tokio::task::spawn_blocking(move || images.load(id))).await;
        if let Some(image) = loaded.map_err(ImageError::Io)? {
            return Ok((id, image));
        }
        let (send, mut receive) = mpsc::channel(LOADED_AHEAD);
        let images = Arc::clone(&self.images);
        let writing =
            tokio::task::spawn_blocking(move || images.make(id, std::iter::from_fn(move || receive.blocking_recv())));
        for key in keys {
            let path = key.path.to_string();
            let loaded = self.parts.store.load(key.clone()).await;
            let (number, object) = loaded.map_err(|source| SealedError::Load { path, source: Box::new(source) })?;
            if send.send((key, number, object)).await.is_err() {
                break;
            }
        }
        drop(send);
        let image = joined(writing).await?;
        self.parts.metrics.images_made.inc();
        Ok((id, image))
    }

    fn mount(
        &self,
        id: ImageId,
        image: &Image,
        upper: Option<(PathBuf, PathBuf)>,
        merged: &Path,
    ) -> Result<OverlayInfo, SealedError> {
        let content = [self.parts.cache.dir().join("hot"), self.content_dir()];
        let (merged, tree) =
            self.parts.mounter.sealed_up(&self.parts.own, &image.path, &content, upper.as_ref(), merged)?;
        let (upper, work) = upper.map_or_else(Default::default, |(upper, work)| (upper, Some(work)));
        let info = OverlayInfo {
            merged: merged.clone(),
            lower: image.path.clone(),
            upper,
            work,
            adopted: false,
            store_uri: String::new(),
            sealed: Some(id.to_string()),
        };
        let text =
            serde_json::to_string(&info).map_err(|error| MountError::kernel("describe", &merged)(error.into()))?;
        let kept = self.parts.mounter.keep(&format!("{KEY}{}", merged.display()), text, &[tree.as_fd()]);
        self.table().insert(merged.clone(), Arc::new(Mounted { info: info.clone(), tree }));
        if let Err(error) = kept {
            let _ = self.unmount(&merged, true);
            return Err(error.into());
        }
        Ok(info)
    }

    fn unmount(&self, merged: &Path, lazy: bool) -> Result<(), SealedError> {
        // The clone is a user of the mount, but not one that keeps it busy.
        self.parts.mounter.sealed_down(merged, lazy)?;
        self.table().remove(merged);
        self.parts.mounter.forget(&format!("{KEY}{}", merged.display()))?;
        let mounted: HashSet<String> =
            self.table().values().filter_map(|mounted| mounted.info.sealed.clone()).collect();
        self.images.retain(&mounted);
        Ok(())
    }

    async fn limited<T>(
        &self,
        operation: &'static str,
        path: &Path,
        work: impl Future<Output = Result<T, SealedError>>,
    ) -> Result<T, SealedError> {
        let limit_ms = u64::try_from(MOUNT_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
        let late = || MountError::Late { operation, path: path.to_owned(), limit_ms };
        tokio::time::timeout(MOUNT_TIMEOUT, work).await.unwrap_or_else(|_| Err(late().into()))
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Arc<Mounted>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
