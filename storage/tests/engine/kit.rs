//! An open lake and what a client does with it.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use narlake_format::nix::signature::SecretKey;
use narlake_format::nix::store_path::{StorePath, StorePathHash};
use narlake_sim::{Node, Object};
use narlake_storage::{
    Bucket, Cache, Components, Error, Ingested, Lake, Metrics, OsEntropy, Published, Settings, SystemClock,
};
use prometheus::Registry;
use tempfile::TempDir;

/// Bytes of a NAR that are sent at a time: a number that divides nothing.
const SEND_BYTES: usize = 7_919;

/// A lake, its bucket and its state directory.
pub(crate) struct Kit {
    pub(crate) lake: Lake,
    pub(crate) cache: Cache,
    pub(crate) bucket: Bucket,
    pub(crate) key: SecretKey,
    pub(crate) state: TempDir,
}

pub(crate) fn metrics() -> Metrics {
    Metrics::new(&Registry::new())
}

pub(crate) fn key() -> SecretKey {
    SecretKey::generate("kit-1", [1; 32]).unwrap()
}

pub(crate) async fn open(bucket: &Bucket, state_dir: &Path, settings: Settings) -> Result<Lake, Error> {
    let settings = Settings { state_dir: state_dir.to_owned(), cpu_threads: 2, ..settings };
    let components = Components {
        bucket: bucket.clone(),
        clock: Arc::new(SystemClock),
        entropy: Arc::new(OsEntropy),
        metrics: metrics(),
    };
    Lake::open(settings, components).await
}

impl Kit {
    /// A new lake in memory.
    pub(crate) async fn memory() -> Self {
        Self::over(Bucket::memory(&metrics()), Settings::default()).await
    }

    /// The lake of a bucket, with no local state.
    pub(crate) async fn over(bucket: Bucket, settings: Settings) -> Self {
        let state = tempfile::tempdir().unwrap();
        let lake = open(&bucket, state.path(), settings).await.unwrap();
        let cache = lake.default_cache("default", &[key().public()]).await.unwrap();
        Self { lake, cache, bucket, key: key(), state }
    }

    pub(crate) async fn ingest(&self, nar: &[u8]) -> Result<Ingested, Error> {
        self.lake.ingest(&self.cache, stream(nar)).await
    }

    /// Sends the NAR.
    pub(crate) async fn send(&self, object: &Object) -> Ingested {
        let ingested = self.ingest(&object.nar).await.unwrap();
        self.lake.keep_upload(&self.cache, &object.upload(), &ingested).await.unwrap();
        ingested
    }

    /// Sends the narinfo.
    pub(crate) async fn publish(&self, object: &Object) -> Result<Published, Error> {
        self.lake.publish(&self.cache, object.info(), std::slice::from_ref(&self.key)).await
    }

    pub(crate) async fn push(&self, object: &Object) -> Published {
        self.send(object).await;
        self.publish(object).await.unwrap()
    }

    /// The NAR of a path that is there.
    pub(crate) async fn nar(&self, path: &StorePathHash) -> Result<Vec<u8>, Error> {
        let record = self.lake.lookup(&self.cache, path).await?.expect("the path is there");
        let parts: Vec<Bytes> = self.lake.export(&self.cache, &record).await?.try_collect().await?;
        Ok(parts.concat())
    }

    /// Bytes that the packs of the bucket take.
    pub(crate) async fn stored(&self) -> u64 {
        self.bucket.list("packs/", None).await.unwrap().iter().map(|object| object.size).sum()
    }
}

/// A NAR as a client sends it.
pub(crate) fn stream(nar: &[u8]) -> impl Stream<Item = io::Result<Bytes>> + Unpin + use<> {
    let pieces: Vec<_> = nar.chunks(SEND_BYTES).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    futures::stream::iter(pieces)
}

pub(crate) fn path(name: &str) -> StorePath {
    let digest = narlake_format::nix::hash::Sha256Hash::of(name.as_bytes());
    let mut hash = [0; 20];
    hash.copy_from_slice(&digest.as_bytes()[..20]);
    StorePath { hash: StorePathHash::from_bytes(hash), name: name.parse().unwrap() }
}

/// An object of one path and tree.
pub(crate) fn object(name: &str, tree: &Node, references: &[&StorePath]) -> Object {
    let mut references: Vec<StorePath> = references.iter().map(|path| (*path).clone()).collect();
    references.sort_unstable();
    Object { path: path(name), nar: tree.nar(), references }
}

pub(crate) fn file(bytes: impl Into<Vec<u8>>) -> Node {
    Node::File { executable: false, bytes: bytes.into() }
}

pub(crate) fn directory<const N: usize>(entries: [(&str, Node); N]) -> Node {
    Node::Directory(
        entries.into_iter().map(|(name, node)| (name.as_bytes().to_vec(), node)).collect::<BTreeMap<_, _>>(),
    )
}

/// Bytes that hardly compress, the same for one seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    narlake_sim::Rng::new(seed).fill(&mut bytes);
    bytes
}
