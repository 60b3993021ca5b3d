//! Store objects: trees with their string tables, at hand when first needed, bounded, one for all views.

use std::sync::Arc;

use bytes::Bytes;
use narlake_format::id::{BlobId, BlobKind, ManifestId, TableId};
use narlake_format::lake::manifest::{ManifestHeader, ManifestReader};
use narlake_format::lake::strings::StringTable;

use super::error::FsError;
use super::nodes::{ObjectKey, ObjectNumber};
use super::tree::{Tree, TreeBuilder};
use super::trees::Trees;
use crate::error::joined;
use crate::lru::{Lru, Weigh, lru};
use crate::metadata::Blobs;
use crate::metrics::Metrics;
use crate::view::View;

/// A store object.
pub(crate) struct Object {
    pub(crate) tree: Tree,
    pub(crate) table: StringTable,
}

/// Parts of a manifest that are asked for at once.
const PARTS_AHEAD: usize = 16;

/// Where an object comes from that is not at hand: a view's right to it.
#[derive(Clone)]
pub(super) struct Origin {
    pub(super) blobs: Blobs,
    pub(super) view: View,
}

/// Whoever may ask for an object by its number has been told the number by a view that shows it. So all views share
/// what is here.
pub(super) struct Objects {
    trees: Arc<Trees>,
    loaded: Lru<ObjectNumber, Arc<Object>>,
    metrics: Metrics,
}

impl Weigh for Object {
    fn bytes(&self) -> u64 {
        self.tree.bytes() + self.table.encoded_len() as u64
    }
}

impl Objects {
    pub(super) fn new(trees: Arc<Trees>, bytes: u64, metrics: &Metrics) -> Self {
        Self { trees, loaded: lru(10_000, bytes), metrics: metrics.clone() }
    }

    /// The object of this number, which `key` describes. Those who ask at the same time wait for one load. Cancel safe.
    pub(super) async fn get(
        &self,
        number: ObjectNumber,
        origin: &Origin,
        key: impl FnOnce() -> Option<ObjectKey>,
    ) -> Result<Arc<Object>, FsError> {
        let load = async {
            let key = key().ok_or(FsError::Stale { node: super::NodeId::new(number, 0).0 })?;
            let table = table(origin, &key).await?;
            let tree = self.tree(&origin.blobs, key.manifest).await?;
            Ok(Arc::new(Object { tree, table }))
        };
        self.loaded.get_or_insert_async(&number, load).await
    }

    /// The object, if it is at hand.
    pub(super) fn peek(&self, number: ObjectNumber) -> Option<Arc<Object>> {
        self.loaded.peek(&number)
    }

    async fn tree(&self, blobs: &Blobs, id: ManifestId) -> Result<Tree, FsError> {
        let trees = Arc::clone(&self.trees);
        if let Some(tree) = joined(tokio::task::spawn_blocking(move || trees.load(&id))).await {
            return Ok(tree);
        }
        let head = blobs.one(BlobKind::Manifest, id.into()).await.map_err(FsError::Content)?;
        let header = ManifestHeader::decode(&head).map_err(FsError::Manifest)?;
        let (mut reader, mut builder) = (ManifestReader::new(&header), TreeBuilder::default());
        let parts: Vec<BlobId> = header.parts.iter().map(|part| part.id.into()).collect();
        for some in parts.chunks(PARTS_AHEAD) {
            for part in blobs.fetch(BlobKind::Part, some).await.map_err(FsError::Content)? {
                reader.part(&part, &mut |event| builder.event(event)).map_err(FsError::Manifest)?;
            }
        }
        reader.finish().map_err(FsError::Manifest)?;
        self.metrics.trees_loaded.inc();
        let trees = Arc::clone(&self.trees);
        let kept = tokio::task::spawn_blocking(move || {
            let bytes = builder.finish(&id).map_err(FsError::Manifest)?;
            trees.keep(&id, &bytes).map_err(FsError::Memory)
        });
        joined(kept).await
    }
}

/// A short table lies in the path's record, and nowhere else in the lake; a long one is content like any other. Once
/// used, either is on this disk.
async fn table(origin: &Origin, key: &ObjectKey) -> Result<StringTable, FsError> {
    let empty = StringTable::default();
    if is(&empty, &key.table) {
        return Ok(empty);
    }
    let Origin { blobs, view } = origin;
    let inline = |record: Option<crate::trust::TrustedRecord>| {
        let record = record.filter(|record| record.table() == key.table);
        record.and_then(|record| record.inline_table().cloned())
    };
    let id = BlobId::from(key.table);
    let kept = match inline(view.known(&key.path)) {
        Some(table) => return Ok(keep(blobs, id, table).await),
        None => blobs.kept(BlobKind::Table, id).await,
    };
    if let Some(table) = kept {
        return StringTable::decode(&table).map_err(FsError::Restore);
    }
    // Only a path of which this host has nothing but the nodeid is asked for here.
    match inline(view.find(&key.path).await.map_err(FsError::View)?) {
        Some(table) => Ok(keep(blobs, id, table).await),
        None => {
            let table = blobs.one(BlobKind::Table, id).await.map_err(FsError::Content)?;
            StringTable::decode(&table).map_err(FsError::Restore)
        }
    }
}

/// Keeps a table that came in a record: the next daemon answers for its object without asking for the record.
async fn keep(blobs: &Blobs, id: BlobId, table: StringTable) -> StringTable {
    if !blobs.absent(&[id]).is_empty() {
        blobs.keep(id, Bytes::from(table.encode())).await;
    }
    table
}

fn is(table: &StringTable, id: &TableId) -> bool {
    table.id() == *id
}
