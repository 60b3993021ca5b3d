//! Uploads: for each path the NAR, then the narinfo, references before referrers.
//!
//! A few paths at a time. They are started references first, and a narinfo waits until those of its references are
//! there; one that waits was started after what it waits for, so the first of them never waits, and none does for ever.
//! The first failure ends the push: what has been published stays, and the next push goes on from there.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use narlake_format::nix::store_path::{StoreDir, StorePath};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::{Object, Uploaded};
use crate::client::{Client, ClientError};
use crate::dump::{self, Digest, DumpError};
use crate::output::{Output, Progress};

/// Paths uploaded at once.
const UPLOADS: usize = 4;

/// Blocks of a NAR that are read ahead of the connection.
const BLOCKS_AHEAD: usize = 4;

/// Uploads these objects, none of which the lake has, and gives what became of each and how many bytes were sent.
///
/// Not cancel safe: some of them may be there afterwards, each with all that it refers to.
pub(super) async fn all(
    client: &Client,
    dir: &StoreDir,
    objects: Vec<Object>,
    output: &Output,
) -> anyhow::Result<(Vec<Uploaded>, u64)> {
    let objects = references_first(objects)?;
    let (published, mut announce): (HashMap<_, _>, HashMap<_, _>) = objects
        .iter()
        .map(|object| {
            let (sender, receiver) = watch::channel(false);
            let path = object.info.store_path.clone();
            ((path.clone(), receiver), (path, sender))
        })
        .unzip();
    let progress = output.progress("pushing", objects.iter().map(|object| object.info.nar_size).sum());
    let upload = Upload { client, dir, published, progress: progress.clone(), sent: AtomicU64::new(0) };
    let uploaded = stream::iter(objects)
        .map(|object| {
            let announce = announce.remove(&object.info.store_path);
            upload.one(object, announce)
        })
        .buffer_unordered(UPLOADS)
        .try_collect()
        .await;
    progress.finish();
    Ok((uploaded?, upload.sent.into_inner()))
}

struct Upload<'a> {
    client: &'a Client,
    dir: &'a StoreDir,
    /// Turns true when the path is published; of those that are being pushed.
    published: HashMap<StorePath, watch::Receiver<bool>>,
    progress: Progress,
    sent: AtomicU64,
}

impl Upload<'_> {
    async fn one(&self, object: Object, announce: Option<watch::Sender<bool>>) -> anyhow::Result<Uploaded> {
        let path = object.info.store_path.display_in(self.dir).to_string();
        let uploaded = self.content(&object).await.with_context(|| format!("push {path}"))?;
        for reference in object.info.references.iter().filter(|reference| **reference != object.info.store_path) {
            if let Some(published) = self.published.get(reference) {
                // It fails only when the reference's upload has, which ends the push with that error.
                published.clone().wait_for(|published| *published).await?;
            }
        }
        let kept = self.client.put_nar_info(self.dir, &object.info).await.with_context(|| format!("publish {path}"))?;
        if let Some(announce) = announce {
            announce.send_replace(true);
        }
        Ok(Uploaded {
            path,
            nar_hash: object.info.nar_hash.to_string(),
            nar_size: object.info.nar_size,
            nar_sent: uploaded,
            differs: kept.nar_hash != object.info.nar_hash,
        })
    }

    /// Has the server have the NAR; false if it had it already.
    async fn content(&self, object: &Object) -> anyhow::Result<bool> {
        let digest = Digest { nar_hash: object.info.nar_hash, nar_size: object.info.nar_size };
        let mut pauses = Client::pauses();
        loop {
            if self.client.has_nar(&digest.nar_hash).await? {
                self.progress.add(digest.nar_size);
                return Ok(false);
            }
            self.progress.say(&object.info.store_path.name);
            let sent = Arc::new(AtomicU64::new(0));
            let error = match self.attempt(object, &digest, &sent).await {
                Ok(()) => {
                    self.sent.fetch_add(digest.nar_size, Ordering::Relaxed);
                    return Ok(true);
                }
                Err(error) => error,
            };
            let transient = error.downcast_ref::<ClientError>().is_some_and(ClientError::is_transient);
            let Some(pause) = pauses.next().filter(|_| transient) else { return Err(error) };
            self.progress.take_back(sent.load(Ordering::Relaxed));
            tokio::time::sleep(pause).await;
        }
    }

    async fn attempt(&self, object: &Object, digest: &Digest, sent: &Arc<AtomicU64>) -> anyhow::Result<()> {
        let (blocks, reading) = read(object, *digest);
        let progress = self.progress.clone();
        let nar = stream::unfold(blocks, async |mut blocks| Some((blocks.recv().await?, blocks)))
            .inspect(move |block| progress.add(block.as_ref().map_or(0, |block: &Bytes| block.len() as u64)));
        let outcome = self.client.put_nar(&digest.nar_hash, digest.nar_size, nar, sent).await;
        match (outcome, reading.await.context("read a tree")?) {
            (outcome, Ok(()) | Err(DumpError::Stopped)) => Ok(outcome?),
            // That the tree could not be read is why the request broke off.
            (_, Err(error)) => Err(error.into()),
        }
    }
}

/// Reads a tree on a thread of its own.
fn read(
    object: &Object,
    digest: Digest,
) -> (mpsc::Receiver<std::io::Result<Bytes>>, JoinHandle<Result<(), DumpError>>) {
    let (sender, receiver) = mpsc::channel(BLOCKS_AHEAD);
    let file = object.file.clone();
    let reading = tokio::task::spawn_blocking(move || {
        let mut send = |block: Vec<u8>| sender.blocking_send(Ok(block.into())).map_err(|_| DumpError::Stopped);
        let outcome = dump::dump_known(&file, &digest, &mut send);
        if let Err(error) = &outcome {
            // Breaks the request off; nobody may be there to hear it any more.
            let _ = sender.blocking_send(Err(std::io::Error::other(error.to_string())));
        }
        outcome
    });
    (receiver, reading)
}

/// Sorts objects so that each comes after those it refers to.
fn references_first(objects: Vec<Object>) -> anyhow::Result<Vec<Object>> {
    let mut waiting: BTreeMap<StorePath, (Object, usize)> = BTreeMap::new();
    let mut referrers: HashMap<StorePath, Vec<StorePath>> = HashMap::new();
    let here: std::collections::HashSet<StorePath> =
        objects.iter().map(|object| object.info.store_path.clone()).collect();
    let mut ready = Vec::new();
    for object in objects {
        let path = object.info.store_path.clone();
        let own = object.info.references.iter().filter(|reference| **reference != path && here.contains(reference));
        let count = own.map(|reference| referrers.entry(reference.clone()).or_default().push(path.clone())).count();
        if count == 0 {
            ready.push(object);
        } else {
            waiting.insert(path, (object, count));
        }
    }
    let mut next = 0;
    while let Some(object) = ready.get(next) {
        next += 1;
        for referrer in referrers.remove(&object.info.store_path).unwrap_or_default() {
            if let Some((_, count)) = waiting.get_mut(&referrer) {
                *count -= 1;
                if *count == 0
                    && let Some((object, _)) = waiting.remove(&referrer)
                {
                    ready.push(object);
                }
            }
        }
    }
    match waiting.into_keys().next() {
        None => Ok(ready),
        // No store can hold such a thing, but what we read is text.
        Some(path) => Err(anyhow!("{path} refers to itself by way of others")),
    }
}

#[cfg(test)]
mod tests {
    use narlake_format::nix::hash::Sha256Hash;

    use super::*;
    use crate::push::source_info;

    /// Objects by one-letter names, each with the names it refers to.
    fn order(graph: &[(&str, &str)]) -> Option<String> {
        let dir = StoreDir::default();
        let digest = Digest { nar_hash: Sha256Hash::of(b""), nar_size: 1 };
        let info = |name: &str| source_info(&dir, &name.parse().unwrap(), &digest);
        let objects = graph.iter().map(|(name, references)| {
            let references = references.chars().map(|name| info(&name.to_string()).store_path).collect();
            let info = narlake_format::nix::narinfo::NarInfo { references, ..info(name) };
            Object { info, file: "/".into() }
        });
        let sorted = references_first(objects.collect()).ok()?;
        Some(sorted.iter().map(|object| object.info.store_path.name.as_str()).collect())
    }

    #[test]
    fn references_come_first() {
        let check = |graph: &[(&str, &str)], expected: Option<&str>| assert_eq!(order(graph).as_deref(), expected);
        check(&[], Some(""));
        check(&[("a", "a")], Some("a"));
        check(&[("a", "bc"), ("b", "c"), ("c", "")], Some("cba"));
        check(&[("a", "x"), ("b", "ax")], Some("ab"));
        check(&[("a", "bd"), ("b", "cd"), ("d", "d"), ("c", "")], Some("dcba"));
        check(&[("a", "b"), ("b", "a")], None);
    }
}
