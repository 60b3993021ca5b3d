//! Store objects in memory: trees with their string tables, loaded when first needed, bounded.

use std::sync::Arc;

use narlake_format::id::{BlobId, BlobKind, ManifestId, TableId};
use narlake_format::lake::manifest::{ManifestHeader, ManifestReader};
use narlake_format::lake::strings::StringTable;

use super::error::FsError;
use super::nodes::{ObjectKey, ObjectNumber};
use super::tree::{Tree, TreeBuilder};
use crate::lru::{Lru, Weigh, lru};
use crate::metadata::Blobs;
use crate::metrics::Metrics;
use crate::view::View;

/// A store object.
pub(super) struct Object {
    pub(super) tree: Tree,
    pub(super) table: StringTable,
}

/// Parts of a manifest that are asked for at once.
const PARTS_AHEAD: usize = 16;

pub(super) struct Objects {
    blobs: Blobs,
    view: View,
    loaded: Lru<ObjectNumber, Arc<Object>>,
    metrics: Metrics,
}

impl Weigh for Object {
    fn bytes(&self) -> u64 {
        self.tree.bytes() + self.table.encoded_len() as u64
    }
}

impl Objects {
    pub(super) fn new(blobs: Blobs, view: View, bytes: u64, metrics: &Metrics) -> Self {
        Self { blobs, view, loaded: lru(10_000, bytes), metrics: metrics.clone() }
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
        let tree = self.tree(&key.manifest).await?;
        self.metrics.trees_loaded.inc();
        Ok(Object { tree, table })
    }

    async fn tree(&self, id: &ManifestId) -> Result<Tree, FsError> {
        let head = self.blobs.one(BlobKind::Manifest, (*id).into()).await.map_err(FsError::Content)?;
        let header = ManifestHeader::decode(&head).map_err(FsError::Manifest)?;
        let (mut reader, mut builder) = (ManifestReader::new(&header), TreeBuilder::default());
        let parts: Vec<BlobId> = header.parts.iter().map(|part| part.id.into()).collect();
        for some in parts.chunks(PARTS_AHEAD) {
            for part in self.blobs.fetch(BlobKind::Part, some).await.map_err(FsError::Content)? {
                reader.part(&part, &mut |event| builder.event(event)).map_err(FsError::Manifest)?;
            }
        }
        reader.finish().map_err(FsError::Manifest)?;
        builder.finish().map_err(FsError::Manifest)
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
            None => {
                let table = self.blobs.one(BlobKind::Table, key.table.into()).await.map_err(FsError::Content)?;
                StringTable::decode(&table).map_err(FsError::Restore)
            }
        }
    }
}

fn is(table: &StringTable, id: &TableId) -> bool {
    table.id() == *id
}
