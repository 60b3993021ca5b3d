//! Pins of closures: from store paths to the cached files that are to stay ([`Cache::pin`]).
//!
//! A pin names content, so it outlives the view and the server it was found through. It fetches nothing: what is pinned
//! stays once it has been read.

use std::sync::Arc;

use narlake_format::api::control::PinInfo;
use narlake_format::id::ContentId;
use narlake_format::nix::store_path::StorePath;

use crate::cache::{Cache, PinError};
use crate::error::joined;
use crate::fs::error::FsError;
use crate::fs::nodes::ObjectKey;
use crate::fs::{LazyStore, Object};
use crate::view::{View, ViewError};

/// Why content is not pinned.
#[derive(Debug, thiserror::Error)]
pub enum PinningError {
    /// What the paths need is not known.
    #[error(transparent)]
    View(#[from] ViewError),
    /// One of the paths, or something it needs, is not in the lake.
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
    /// The cache refuses.
    #[error(transparent)]
    Cache(#[from] PinError),
}

/// Pins content in a cache.
#[derive(Clone)]
pub struct Pinning {
    /// The store whose files are pinned.
    pub store: LazyStore,
    /// Its view.
    pub view: View,
    /// The cache.
    pub cache: Arc<Cache>,
}

impl Pinning {
    /// Pins the files of the closures of these paths under a name; what was pinned under it before no longer is.
    ///
    /// # Errors
    /// When a path is not in the lake, its tree cannot be had, the name makes no sense, or it is too much to keep.
    pub async fn pin(&self, name: String, roots: &[StorePath]) -> Result<PinInfo, PinningError> {
        let closures = self.view.ensure(roots).await?;
        if let Some(path) = closures.missing.into_iter().next() {
            return Err(PinningError::Missing { path });
        }
        let mut files = Vec::new();
        for record in &closures.records {
            let failed = |source| {
                let path = record.info().store_path.to_string();
                PinningError::Load { path, source: Box::new(source) }
            };
            let (_, object) = self.store.load(ObjectKey::of(record)).await.map_err(failed)?;
            let found = joined(tokio::task::spawn_blocking(move || files_of(&object))).await;
            files.extend(found.map_err(failed)?);
        }
        files.sort_unstable_by_key(|(content, _)| *content.as_bytes());
        files.dedup();
        let cache = Arc::clone(&self.cache);
        joined(tokio::task::spawn_blocking(move || {
            cache.pin(&name, files)?;
            let pinned = cache.pinned().into_iter().find(|(other, ..)| *other == name);
            Ok(info(pinned.unwrap_or((name, 0, 0))))
        }))
        .await
    }

    /// Takes a set of pins away. False if there is none of this name.
    ///
    /// # Errors
    /// When it cannot be removed from the disk.
    pub async fn unpin(&self, name: String) -> Result<bool, PinningError> {
        let cache = Arc::clone(&self.cache);
        Ok(joined(tokio::task::spawn_blocking(move || cache.unpin(&name))).await?)
    }

    /// All sets, in order of their names.
    #[must_use]
    pub fn list(&self) -> Vec<PinInfo> {
        self.cache.pinned().into_iter().map(info).collect()
    }
}

fn info((name, files, bytes): (String, usize, u64)) -> PinInfo {
    PinInfo { name, files: files as u64, bytes }
}

/// What the cache calls the files of an object, and their sizes in bytes. An empty file has no content.
fn files_of(object: &Object) -> Result<Vec<(ContentId, u64)>, FsError> {
    let entries = (0..u32::try_from(object.tree.len()).unwrap_or(u32::MAX)).filter_map(|entry| object.tree.file(entry));
    let files = entries.filter(|file| file.size > 0);
    files.map(|file| Ok((file.content(&object.table).map_err(FsError::Restore)?, file.size))).collect()
}
