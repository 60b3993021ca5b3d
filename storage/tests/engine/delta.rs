//! Delta frames, which nothing writes yet and every reader reads.

use narlake_format::id::{BlobId, BlobKind, ChunkId, PackId, Ulid};
use narlake_format::lake::frame::{BaseWindow, Frame, FrameContent, FrameEncoder};
use narlake_format::lake::keys;
use narlake_format::lake::location::{Domain, PackRef};
use narlake_format::lake::pack::PackBuilder;
use narlake_storage::{Bucket, ErrorKind, Settings};

use crate::kit::{Kit, metrics, noise};

fn content(bytes: &[u8]) -> (BlobId, FrameContent) {
    let id = BlobId::from(ChunkId::of(bytes));
    let mut content = FrameContent::default();
    content.push(BlobKind::Chunk, id, bytes);
    (id, content)
}

/// A pack of three plain frames and one that is a delta of the first and the third.
fn pack() -> (Vec<u8>, [BlobId; 4], Frame) {
    let (one, two, three) = (noise(1, 60_000), noise(2, 60_000), noise(3, 60_000));
    let old = [&one[..50_000], b"changed", &three[..50_000]].concat();
    let mut encoder = FrameEncoder::new(3);
    let mut builder = PackBuilder::new();
    let contents = [&one, &two, &three].map(|bytes| content(bytes));
    for (_, content) in &contents {
        builder.push(encoder.encode(content));
    }
    let (id, content) = content(&old);
    let delta = encoder.encode_delta(&content, BaseWindow::new(0, 0b101).unwrap(), &[&one, &three]);
    assert!(delta.header.base.is_some() && delta.bytes.len() < 10_000, "it is a delta");
    builder.push(delta.clone());
    let [(a, _), (b, _), (c, _)] = contents;
    (builder.finish().0.concat(), [a, b, c, id], delta)
}

async fn fetch(bytes: Vec<u8>, id: BlobId) -> Result<Vec<bytes::Bytes>, narlake_storage::Error> {
    let bucket = Bucket::memory(&metrics());
    // An empty lake first: a bucket with packs and no lake is none.
    drop(Kit::over(bucket.clone(), Settings::default()).await);
    let pack = PackRef { domain: Domain::Public, id: PackId(Ulid::from(7)) };
    bucket.put_new(&keys::pack(&pack), bytes).await.unwrap();
    let kit = Kit::over(bucket, Settings::default()).await;
    kit.lake.fetcher(Domain::Public).fetch(&[(BlobKind::Chunk, id)]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn read_through_the_engine() {
    let (bytes, ids, _) = pack();
    for id in ids {
        let found = fetch(bytes.clone(), id).await.unwrap();
        assert_eq!(BlobId::of(BlobKind::Chunk, &found[0]), id);
    }
}

/// A flipped bit in the base, or in the delta, is an error of the delta's blob.
#[tokio::test(flavor = "multi_thread")]
async fn a_base_that_is_not_the_one() {
    let (bytes, ids, delta) = pack();
    let at = bytes.windows(delta.bytes.len()).position(|window| window == delta.bytes).unwrap();
    for flipped in [1_000, 130_000, at + delta.bytes.len() / 2] {
        let mut bytes = bytes.clone();
        bytes[flipped] ^= 0x10;
        let error = fetch(bytes, ids[3]).await.expect_err("not what was written");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", error.chain());
    }
}
