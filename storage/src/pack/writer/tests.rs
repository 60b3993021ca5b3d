//! When packs are sealed, and waits that must end though the put they wait for does not come to its end.

use std::path::Path;
use std::sync::mpsc;

use narlake_format::id::{BlobKind, ChunkId, LakeId, Ulid};
use narlake_format::lake::frame::{FrameContent, FrameEncoder};

use super::*;
use crate::clock::{OsEntropy, SystemClock};
use crate::kv::Kv;

const PATIENCE: Duration = Duration::from_secs(10);

/// A writer to a bucket in memory.
pub(crate) async fn writer(state: &Path) -> PackWriter {
    writer_sealing_after(state, Duration::from_millis(10)).await
}

async fn writer_sealing_after(state: &Path, seal_after: Duration) -> PackWriter {
    let metrics = Metrics::new(&prometheus::Registry::new());
    let bucket = Bucket::memory(&metrics);
    let (kv, _) = Kv::open(state, LakeId(Ulid::nil())).unwrap();
    let mint = Mint::new(Arc::new(SystemClock), Arc::new(OsEntropy));
    let index = Index::open(state, bucket.clone(), kv, mint.clone(), metrics.clone()).await.unwrap();
    PackWriter::new(bucket, index, mint, metrics, seal_after)
}

/// The index that it enters packs in.
pub(crate) fn index(writer: &PackWriter) -> Arc<Index> {
    Arc::clone(&writer.shared.index)
}

fn frame(bytes: &[u8]) -> Frame {
    let mut content = FrameContent::default();
    content.push(BlobKind::Chunk, ChunkId::of(bytes).into(), bytes);
    FrameEncoder::new(1).encode(&content)
}

/// A pack without frames makes the builder panic.
#[tokio::test]
async fn a_put_that_panics_is_an_error_of_those_who_wait() {
    let state = tempfile::tempdir().unwrap();
    let writer = writer(state.path()).await;
    let session = writer.begin(Domain::Public);
    let pending = session.append(frame(b"lost"));
    {
        let mut domains = writer.shared.lock();
        let open = domains.by_domain.get_mut(&Domain::Public).and_then(|state| state.open.as_mut()).unwrap();
        open.builder = PackBuilder::new();
    }
    let committed = tokio::time::timeout(PATIENCE, session.commit(vec![pending])).await.expect("an end");
    assert!(matches!(committed, Err(Error::Stopped(_))), "{committed:?}");
    {
        let domains = writer.shared.lock();
        assert_eq!((domains.sealed, domains.sealed_bytes), (0, 0), "room for the next pack");
        assert!(domains.by_domain.values().all(|state| state.pending.is_empty()), "nobody relies on what is lost");
    }
    let session = writer.begin(Domain::Public);
    let pending = session.append(frame(b"kept"));
    assert_eq!(session.commit(vec![pending]).await.unwrap().len(), 1);
}

/// Nothing runs the puts, and then the runtime goes: a thread that waits for room gets on, and hears that it is over.
#[test]
fn the_end_of_the_runtime_ends_waits() {
    let state = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let writer = runtime.block_on(writer(state.path()));
    let (tell, told) = mpsc::channel();
    let other = writer.clone();
    let appending = std::thread::spawn(move || {
        let session = other.begin(Domain::Public);
        let mut packs: Vec<PendingPack> = Vec::new();
        for number in 0..=SEALED_MAX {
            tell.send(number).unwrap();
            packs.push(session.append(frame(&number.to_le_bytes())));
            let sealed = other.seal(&mut other.shared.lock(), Domain::Public);
            sealed.into_iter().for_each(Sealed::start);
        }
        packs
    });
    while told.recv_timeout(PATIENCE).unwrap() < SEALED_MAX {}
    assert_eq!(writer.shared.lock().sealed, SEALED_MAX);
    drop(runtime);
    assert!(told.recv_timeout(PATIENCE).is_err(), "the thread has ended");
    let packs = appending.join().unwrap();
    let after = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for pack in packs {
        let outcome = after.block_on(landed(pack));
        assert!(matches!(outcome, Err(Error::Stopped(_))), "{outcome:?}");
    }
    assert_eq!(writer.shared.lock().sealed, 0);
}

/// Bytes that hardly compress, 256 KiB of them.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (word ^ word >> 27).to_le_bytes()
    });
    words.take(1 << 15).flatten().collect()
}

/// A commit does not wait for those who still write where its pack is worth a put of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_pack_is_put_while_others_write() {
    let state = tempfile::tempdir().unwrap();
    let writer = writer_sealing_after(state.path(), Duration::from_secs(3600)).await;
    let large = writer.begin(Domain::Public);
    let fill = |from: u64| {
        let frames = AWAITED_TARGET / (256 << 10) + 1;
        (from..from + frames).for_each(|seed| drop(large.append(frame(&noise(seed << 32)))));
    };
    // Large before the commit comes.
    let small = writer.begin(Domain::Public);
    let pending = small.append(frame(b"first"));
    fill(0);
    assert!(writer.shared.lock().by_domain.values().all(|state| state.open.is_some()), "nobody waits for it");
    let packs = tokio::time::timeout(PATIENCE, small.commit(vec![pending])).await.expect("put at once").unwrap();
    assert_eq!(packs.len(), 1);
    // Large after it.
    let small = writer.begin(Domain::Public);
    let pending = small.append(frame(b"second"));
    let mut commit = Box::pin(small.commit(vec![pending]));
    tokio::time::timeout(Duration::from_millis(50), &mut commit).await.expect_err("too small to be put alone");
    fill(1000);
    let packs = tokio::time::timeout(PATIENCE, commit).await.expect("put at once").unwrap();
    assert_eq!(packs.len(), 1);
}
