//! The fetch engine over a source that a test controls.

mod ahead;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use narlake_format::id::{BlobId, BlobKind, ChunkId, PackId, Ulid};
use narlake_format::lake::frame::{FrameContent, FrameEncoder};
use narlake_format::lake::location::{Domain, Location, PackRef};
use narlake_format::lake::pack::PackBuilder;
use narlake_storage::fetch::{BlobSource, FetchSettings, Fetcher};
use narlake_storage::{Error, ErrorKind};

use crate::kit::noise;

/// Packs on a shelf, and what was asked of it.
#[derive(Default)]
struct Shelf {
    packs: Mutex<HashMap<PackRef, Bytes>>,
    /// Places of each blob, the one that is told first.
    places: Mutex<HashMap<BlobId, Vec<Location>>>,
    reads: Mutex<Vec<Range<u64>>>,
    locates: AtomicUsize,
    reported: Mutex<Vec<(PackRef, u32)>>,
    silent: AtomicBool,
    /// Harm done to the next read, and to no other.
    flip_next: AtomicBool,
    /// The next read is never answered.
    stall_next: AtomicBool,
    /// What the next read answers with, instead of what it should.
    lie_next: Mutex<Option<Bytes>>,
}

fn pack(n: u128) -> PackRef {
    PackRef { domain: Domain::Public, id: PackId(Ulid::from(n)) }
}

impl Shelf {
    /// Puts a pack of frames of one blob each on the shelf.
    fn put(&self, n: u128, blobs: &[Vec<u8>]) -> Vec<BlobId> {
        let mut builder = PackBuilder::new();
        let mut encoder = FrameEncoder::new(1);
        let mut ids = Vec::new();
        for bytes in blobs {
            let id = BlobId::from(ChunkId::of(bytes));
            let mut content = FrameContent::default();
            content.push(BlobKind::Chunk, id, bytes);
            builder.push(encoder.encode(&content));
            ids.push(id);
        }
        let (parts, footer) = builder.finish();
        self.packs.lock().unwrap().insert(pack(n), parts.concat().into());
        for (id, place) in footer.locations(pack(n)) {
            self.places.lock().unwrap().entry(id).or_default().push(place);
        }
        ids
    }

    fn flip(&self, n: u128, at: usize) {
        let mut packs = self.packs.lock().unwrap();
        let mut bytes = packs[&pack(n)].to_vec();
        bytes[at] ^= 0x20;
        packs.insert(pack(n), bytes.into());
    }

    fn reads(&self) -> usize {
        self.reads.lock().unwrap().len()
    }
}

#[async_trait]
impl BlobSource for Shelf {
    async fn locate(&self, ids: &[BlobId]) -> Result<Vec<Option<Location>>, Error> {
        self.locates.fetch_add(1, Ordering::SeqCst);
        let places = self.places.lock().unwrap();
        let reported = self.reported.lock().unwrap();
        let good = |place: &&Location| !reported.contains(&(place.pack, place.frame_offset));
        Ok(ids.iter().map(|id| places.get(id).and_then(|all| all.iter().find(good).or(all.first())).copied()).collect())
    }

    async fn read(&self, pack: &PackRef, range: Range<u64>) -> Result<Bytes, Error> {
        self.reads.lock().unwrap().push(range.clone());
        if self.silent.load(Ordering::SeqCst) || self.stall_next.swap(false, Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        if let Some(lie) = self.lie_next.lock().unwrap().take() {
            return Ok(lie);
        }
        let bytes = self.packs.lock().unwrap().get(pack).cloned().ok_or_else(|| Error::Bucket {
            operation: "read",
            key: pack.to_string(),
            kind: ErrorKind::NotFound,
            source: "no such pack".into(),
        })?;
        let bytes = bytes.slice(usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap());
        if self.flip_next.swap(false, Ordering::SeqCst) {
            let mut bytes = bytes.to_vec();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            return Ok(bytes.into());
        }
        Ok(bytes)
    }

    async fn size(&self, pack: &PackRef) -> Result<u64, Error> {
        Ok(self.packs.lock().unwrap()[pack].len() as u64)
    }

    async fn damaged(&self, pack: &PackRef, frame_offset: u32, _: &Error) {
        self.reported.lock().unwrap().push((*pack, frame_offset));
    }
}

fn fetcher(shelf: &Arc<Shelf>) -> Fetcher {
    Fetcher::new(Arc::clone(shelf) as _, FetchSettings { deadline: Duration::from_secs(5), ..FetchSettings::default() })
}

fn chunks(ids: &[BlobId]) -> Vec<(BlobKind, BlobId)> {
    ids.iter().map(|id| (BlobKind::Chunk, *id)).collect()
}

fn blobs(n: u64) -> Vec<Vec<u8>> {
    (0..n).map(|seed| noise(seed + 1, 10_000)).collect()
}

#[tokio::test(start_paused = true)]
async fn one_flight_for_all_who_ask() {
    let shelf = Arc::new(Shelf::default());
    let content = blobs(3);
    let ids = shelf.put(1, &content);
    let fetcher = fetcher(&shelf);
    let all = (0..50).map(|_| async { fetcher.fetch(&chunks(&ids[1..2])).await.unwrap() });
    for found in futures::future::join_all(all).await {
        assert_eq!(found, [content[1].clone()]);
    }
    assert_eq!(shelf.reads(), 1);
    assert_eq!((fetcher.stats().requests, fetcher.stats().frames), (1, 1));
    // And none for who comes later.
    fetcher.fetch(&chunks(&ids[1..2])).await.unwrap();
    assert_eq!(shelf.reads(), 1);
}

#[tokio::test(start_paused = true)]
async fn neighbours_in_one_read_and_the_order_asked() {
    let shelf = Arc::new(Shelf::default());
    let content = blobs(6);
    let ids = shelf.put(1, &content);
    let fetcher = fetcher(&shelf);
    let order = [ids[3], ids[2], ids[0], ids[3], ids[1]];
    let found = fetcher.fetch(&chunks(&order)).await.unwrap();
    for (bytes, n) in found.iter().zip([3, 2, 0, 3, 1]) {
        assert!(*bytes == content[n]);
    }
    assert_eq!((shelf.reads(), shelf.locates.load(Ordering::SeqCst)), (1, 1));
    // What is there already is not read again; the two others do not touch.
    shelf.reads.lock().unwrap().clear();
    let other = Fetcher::new(Arc::clone(&shelf) as _, FetchSettings::default());
    other.fetch(&chunks(&[ids[1]])).await.unwrap();
    other.fetch(&chunks(&[ids[0], ids[1], ids[2], ids[5]])).await.unwrap();
    assert_eq!(shelf.reads(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_never_answers() {
    let shelf = Arc::new(Shelf::default());
    let content = blobs(1);
    let ids = shelf.put(1, &content);
    shelf.silent.store(true, Ordering::SeqCst);
    let fetcher = fetcher(&shelf);
    let start = tokio::time::Instant::now();
    let error = fetcher.fetch(&chunks(&ids)).await.expect_err("no answer");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", error.chain());
    assert_eq!(start.elapsed(), Duration::from_secs(5));
    // Nothing of it lingers when the source is back.
    shelf.silent.store(false, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert!(fetcher.fetch(&chunks(&ids)).await.unwrap() == [content[0].clone()]);
}

/// A bit that flips on the way does no lasting harm, with places remembered and without.
#[tokio::test(start_paused = true)]
async fn a_bit_flips_once() {
    for locations_max in [0, 1000] {
        let shelf = Arc::new(Shelf::default());
        let content = blobs(1);
        let ids = shelf.put(1, &content);
        let settings = FetchSettings { locations_max, ..FetchSettings::default() };
        let fetcher = Fetcher::new(Arc::clone(&shelf) as _, settings);
        shelf.flip_next.store(true, Ordering::SeqCst);
        assert!(fetcher.fetch(&chunks(&ids)).await.unwrap() == [content[0].clone()]);
        assert_eq!(shelf.reads(), 2);
        assert!(shelf.reported.lock().unwrap().is_empty(), "once is no damage");
    }
}

/// A source that answers with fewer bytes, more, others or none is asked again, and believed in nothing.
#[tokio::test(start_paused = true)]
async fn a_source_that_lies() {
    let content = blobs(3);
    for lie in [Vec::new(), vec![0; 5], content[0].clone(), noise(9, 10_000), noise(9, 50_000), vec![0xf1; 10_100]] {
        let shelf = Arc::new(Shelf::default());
        let ids = shelf.put(1, &content);
        let fetcher = fetcher(&shelf);
        *shelf.lie_next.lock().unwrap() = Some(lie.clone().into());
        let found = fetcher.fetch(&chunks(&ids)).await.unwrap();
        assert!(found.iter().zip(&content).all(|(found, content)| found == content), "{} bytes", lie.len());
        // The same at every read is an error, in time.
        let other = Fetcher::new(Arc::clone(&shelf) as _, FetchSettings::default());
        for _ in 0..4 {
            *shelf.lie_next.lock().unwrap() = Some(lie.clone().into());
            let _ = other.fetch(&chunks(&ids[..1])).await.map(|found| assert!(found == [content[0].clone()]));
        }
    }
}

/// Rule 13: a pack that is gone is looked up anew, within the same call.
#[tokio::test(start_paused = true)]
async fn a_pack_that_moved() {
    let shelf = Arc::new(Shelf::default());
    let content = blobs(4);
    let ids = shelf.put(1, &content);
    let fetcher = fetcher(&shelf);
    fetcher.locate(&chunks(&ids)).await.unwrap();
    shelf.places.lock().unwrap().clear();
    shelf.put(2, &content);
    shelf.packs.lock().unwrap().remove(&pack(1));
    let found = fetcher.fetch(&chunks(&ids)).await.unwrap();
    assert!(found.iter().zip(&content).all(|(found, content)| found == content));
    assert!(shelf.reported.lock().unwrap().is_empty(), "once is no damage");
}

/// Rule 7: what fails twice is reported, and the other copy is used.
#[tokio::test(start_paused = true)]
async fn a_second_copy() {
    let shelf = Arc::new(Shelf::default());
    let content = blobs(3);
    let ids = shelf.put(1, &content);
    shelf.put(2, &content);
    let place = shelf.places.lock().unwrap()[&ids[1]][0];
    shelf.flip(1, place.frame_offset as usize + 200);
    let fetcher = fetcher(&shelf);
    let found = fetcher.fetch(&chunks(&ids)).await.unwrap();
    assert!(found.iter().zip(&content).all(|(found, content)| found == content));
    assert_eq!(*shelf.reported.lock().unwrap(), [(pack(1), place.frame_offset)]);
}

/// Wherever a bit is flipped, what comes is right or an error; and the frames beside the harmed one are unharmed.
#[tokio::test(start_paused = true)]
async fn never_other_bytes() {
    let content = vec![noise(1, 2_000), vec![7; 5_000], noise(2, 2_000)];
    let length = {
        let shelf = Shelf::default();
        shelf.put(1, &content);
        shelf.packs.lock().unwrap()[&pack(1)].len()
    };
    for at in (0..length).step_by(13) {
        let shelf = Arc::new(Shelf::default());
        let ids = shelf.put(1, &content);
        shelf.flip(1, at);
        let fetcher = fetcher(&shelf);
        let mut good = 0;
        let together = fetcher.fetch(&chunks(&ids)).await.is_ok();
        for (id, content) in ids.iter().zip(&content) {
            match fetcher.fetch(&chunks(&[*id])).await {
                Ok(found) => {
                    assert!(found == [content.clone()], "flipped at {at}");
                    good += 1;
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", error.chain()),
            }
        }
        assert!(good >= 2, "flipped at {at}: {good} of 3");
        assert_eq!(together, good == 3);
    }
}

#[tokio::test(start_paused = true)]
async fn a_blob_that_is_nowhere() {
    let shelf = Arc::new(Shelf::default());
    let ids = shelf.put(1, &blobs(1));
    let fetcher = fetcher(&shelf);
    let nowhere = BlobId::from(ChunkId::of(b"nowhere"));
    for result in [
        fetcher.fetch(&chunks(&[ids[0], nowhere])).await.map(|_| ()),
        fetcher.locate(&chunks(&[ids[0], nowhere])).await,
    ] {
        let error = result.expect_err("it is nowhere");
        assert!(matches!(error, Error::MissingBlob { id, .. } if id == nowhere), "{error}");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
}
