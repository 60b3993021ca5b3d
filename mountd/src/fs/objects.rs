//! Store objects in memory: trees with their string tables, loaded when first needed, bounded.

use std::sync::Arc;

use narlake_format::id::TableId;
use narlake_format::lake::strings::StringTable;
use narlake_storage::fetch::Fetcher;
use narlake_storage::manifest;
use quick_cache::sync::{Cache as Lru, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};

use super::error::FsError;
use super::nodes::{ObjectKey, ObjectNumber};
use super::tree::{Tree, TreeBuilder};
use crate::metrics::Metrics;
use crate::view::View;

/// A store object.
pub(super) struct Object {
    pub(super) tree: Tree,
    pub(super) table: StringTable,
}

pub(super) struct Objects {
    fetcher: Fetcher,
    view: View,
    loaded: Lru<ObjectNumber, Arc<Object>, ByBytes>,
    metrics: Metrics,
}

/// Weighs objects by their memory.
#[derive(Clone)]
struct ByBytes {
    max: u64,
}

impl Weighter<ObjectNumber, Arc<Object>> for ByBytes {
    fn weight(&self, _: &ObjectNumber, object: &Arc<Object>) -> u64 {
        // One tree larger than the whole budget must still be kept, else every page of it would load it anew.
        (object.tree.bytes() + object.table.encoded_len() as u64).min(self.max)
    }
}

impl Objects {
    pub(super) fn new(fetcher: Fetcher, view: View, bytes: u64, metrics: &Metrics) -> Self {
        let weighter = ByBytes { max: bytes / 2 };
        // One shard: split, no part of the budget would hold a large tree.
        let options = OptionsBuilder::new().shards(1).estimated_items_capacity(10_000).weight_capacity(bytes).build();
        // Absent numbers leave an untuned cache of that budget, which differs in speed alone.
        let loaded = match options {
            Ok(options) => {
                Lru::with_options(options, weighter, DefaultHashBuilder::default(), DefaultLifecycle::default())
            }
            Err(_) => Lru::with_weighter(10_000, bytes, weighter),
        };
        Self { fetcher, view, loaded, metrics: metrics.clone() }
    }

    /// The object of this number, which `key` describes. Those who ask at the same time wait for one load. Cancel safe.
    pub(super) async fn get(
        &self,
        number: ObjectNumber,
        key: impl FnOnce() -> Option<ObjectKey>,
    ) -> Result<Arc<Object>, FsError> {
        let load = async {
            let key = key().ok_or(FsError::Stale { node: super::NodeId::new(number, 0).0 })?;
            self.load(&key).await.map(Arc::new)
        };
        self.loaded.get_or_insert_async(&number, load).await
    }

    /// The object, if it is in memory.
    pub(super) fn peek(&self, number: ObjectNumber) -> Option<Arc<Object>> {
        self.loaded.peek(&number)
    }

    async fn load(&self, key: &ObjectKey) -> Result<Object, FsError> {
        let table = self.table(key).await?;
        let mut builder = TreeBuilder::default();
        let loaded = manifest::load(&self.fetcher, &key.manifest, |event| builder.event(event));
        loaded.await.map_err(FsError::Content)?;
        let tree = builder.finish().map_err(FsError::Restore)?;
        self.metrics.trees_loaded.inc();
        Ok(Object { tree, table })
    }

    /// A short table lies in the path's record, and nowhere else; a long one is content like any other.
    async fn table(&self, key: &ObjectKey) -> Result<StringTable, FsError> {
        let empty = StringTable::default();
        if is(&empty, &key.table) {
            return Ok(empty);
        }
        let known = self.view.known(&key.path);
        // Only a path whose record has since been replaced is asked for here.
        let record = match known {
            Some(record) if record.table() == key.table => Some(record),
            _ => self.view.find(&key.path).await.map_err(FsError::View)?,
        };
        let inline =
            record.filter(|record| record.table() == key.table).and_then(|record| record.inline_table().cloned());
        match inline {
            Some(table) => Ok(table),
            None => manifest::table(&self.fetcher, &key.table).await.map_err(FsError::Content),
        }
    }
}

fn is(table: &StringTable, id: &TableId) -> bool {
    table.id() == *id
}
