//! Reads that nobody waits for, and second ones of those that somebody does.

use narlake_storage::fetch::{Ahead, FetchStats, Interest, Nearness};
use tokio::time::Instant;

use super::*;

/// Reads ahead whatever is asked.
fn plan(ids: &[BlobId], interest: &Interest) -> Ahead {
    Ahead {
        blobs: ids.to_vec(),
        beside: Vec::new(),
        bytes_max: 1 << 20,
        read_max: 1 << 20,
        suspicion: false,
        interest: interest.clone(),
    }
}

async fn a_while() {
    tokio::time::sleep(Duration::from_millis(500)).await;
}

#[tokio::test(start_paused = true)]
async fn what_was_read_ahead_is_there() {
    let shelf = Arc::new(Shelf::default());
    let content = blobs(8);
    let ids = shelf.put(1, &content);
    let (fetcher, interest) = (fetcher(&shelf), Interest::default());
    assert_eq!(fetcher.nearness(&ids[3]), Nearness::Away);
    fetcher.ahead(plan(&ids[2..6], &interest));
    a_while().await;
    assert_eq!(fetcher.nearness(&ids[3]), Nearness::Ahead);
    let asked = (shelf.reads(), shelf.locates.load(Ordering::SeqCst));
    assert_eq!(asked, (1, 1));
    assert!(fetcher.fetch(&chunks(&ids[3..5])).await.unwrap() == content[3..5]);
    assert_eq!(fetcher.nearness(&ids[3]), Nearness::Here);
    assert_eq!((shelf.reads(), shelf.locates.load(Ordering::SeqCst)), asked);
    let FetchStats { ahead_bytes, ahead_used_bytes, bytes, .. } = fetcher.stats();
    assert!(ahead_bytes == bytes && ahead_used_bytes * 2 == ahead_bytes, "{:?}", fetcher.stats());
}

/// Reads ahead have no turn here, so that only somebody who waits makes them go on.
#[tokio::test(start_paused = true)]
async fn who_comes_to_wait_lifts_a_read() {
    let shelf = Arc::new(Shelf::default());
    let content = blobs(4);
    let ids = shelf.put(1, &content);
    let settings = FetchSettings { ahead_parallel: 0, ..FetchSettings::default() };
    let fetcher = Fetcher::new(Arc::clone(&shelf) as _, settings);
    let interest = Interest::default();
    fetcher.ahead(plan(&ids, &interest));
    a_while().await;
    assert_eq!(shelf.reads(), 0);
    let began = Instant::now();
    assert!(fetcher.fetch(&chunks(&ids[1..2])).await.unwrap() == content[1..2]);
    assert!(began.elapsed() < Duration::from_millis(50));
    assert_eq!(shelf.reads(), 1, "all four, which were one read");
    // One that waits for too long is dropped, and whoever needs it reads it.
    let more = shelf.put(2, &blobs(12)[4..]);
    fetcher.ahead(plan(&more, &interest));
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(fetcher.nearness(&more[0]), Nearness::Away);
    assert!(fetcher.fetch(&chunks(&more[..1])).await.is_ok());
    assert_eq!(shelf.reads(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_nobody_wants_any_more_is_not_read() {
    let shelf = Arc::new(Shelf::default());
    let ids = shelf.put(1, &blobs(4));
    let fetcher = fetcher(&shelf);
    let interest = Interest::default();
    fetcher.ahead(plan(&ids, &interest));
    drop(interest);
    a_while().await;
    assert_eq!((shelf.reads(), fetcher.stats().ahead_bytes), (0, 0));
}

/// A read ahead that fails is nobody's error.
#[tokio::test(start_paused = true)]
async fn who_joins_a_read_that_fails_reads_for_himself() {
    let shelf = Arc::new(Shelf::default());
    let content = blobs(4);
    let ids = shelf.put(1, &content);
    let (fetcher, interest) = (fetcher(&shelf), Interest::default());
    fetcher.locate(&chunks(&ids)).await.unwrap();
    shelf.stall_next.store(true, Ordering::SeqCst);
    fetcher.ahead(plan(&ids, &interest));
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(shelf.reads(), 1);
    // It ends at its own deadline, before this one's.
    assert!(fetcher.fetch(&chunks(&ids[1..2])).await.unwrap() == content[1..2]);
    assert_eq!(shelf.reads(), 2);
}

/// Guesses that bring nothing end soon; those that are right go on.
#[tokio::test(start_paused = true)]
async fn guesses_are_covered_by_what_is_asked_for() {
    let shelf = Arc::new(Shelf::default());
    let content: Vec<Vec<u8>> = (0..40).map(|seed| noise(seed + 1, 64 << 10)).collect();
    let ids = shelf.put(1, &content);
    let (fetcher, interest) = (fetcher(&shelf), Interest::default());
    let guess = |ids: &[BlobId]| Ahead { suspicion: true, ..plan(ids, &interest) };
    for some in ids.chunks(4) {
        fetcher.ahead(guess(some));
        a_while().await;
    }
    let lost = fetcher.stats().ahead_bytes;
    assert!((256 << 10..=512 << 10).contains(&lost), "{lost}");
    // What is used pays for twice as much.
    fetcher.fetch(&chunks(&ids[..4])).await.unwrap();
    for some in ids[8..].chunks(4) {
        fetcher.ahead(guess(some));
        a_while().await;
    }
    let stats = fetcher.stats();
    assert!(stats.ahead_bytes > lost + (256 << 10), "{stats:?}");
    assert!(stats.bytes <= stats.ahead_used_bytes * 2 + (512 << 10), "{stats:?}");
}

/// Frames between two that are wanted are kept, since they have come anyway.
#[tokio::test(start_paused = true)]
async fn what_lies_between_is_kept() {
    let shelf = Arc::new(Shelf::default());
    let content = blobs(3);
    let ids = shelf.put(1, &content);
    let settings = FetchSettings { gap_bytes: 256 << 10, ..FetchSettings::default() };
    let fetcher = Fetcher::new(Arc::clone(&shelf) as _, settings);
    let found = fetcher.fetch(&chunks(&[ids[0], ids[2]])).await.unwrap();
    assert!(found == [content[0].clone(), content[2].clone()]);
    assert!(fetcher.fetch(&chunks(&ids[1..2])).await.unwrap() == content[1..2]);
    assert_eq!(shelf.reads(), 1);
    let stats = fetcher.stats();
    assert!(stats.ahead_bytes > 10_000 && stats.ahead_used_bytes == stats.ahead_bytes, "{stats:?}");
}

/// One read in a hundred is lost: it is asked for again long before the deadline, and no others are.
#[tokio::test(start_paused = true)]
async fn a_lost_read_is_asked_for_again() {
    let shelf = Arc::new(Shelf::default());
    let content = blobs(60);
    let mut ids = Vec::new();
    for (n, bytes) in content.iter().enumerate() {
        ids.extend(shelf.put(n as u128 + 1, std::slice::from_ref(bytes)));
    }
    let fetcher = fetcher(&shelf);
    for id in &ids[..50] {
        fetcher.fetch(&chunks(&[*id])).await.unwrap();
    }
    assert_eq!(fetcher.stats().hedges, 0);
    let began = Instant::now();
    shelf.stall_next.store(true, Ordering::SeqCst);
    assert!(fetcher.fetch(&chunks(&ids[50..51])).await.unwrap() == content[50..51]);
    assert!(began.elapsed() < Duration::from_millis(100), "{:?}", began.elapsed());
    assert_eq!((fetcher.stats().hedges, shelf.reads()), (1, 52));
    // So is one that was read ahead, once somebody waits for it.
    for (n, bytes) in blobs(90)[60..].iter().enumerate() {
        let more = shelf.put(n as u128 + 100, std::slice::from_ref(bytes));
        fetcher.fetch(&chunks(&more)).await.unwrap();
    }
    let interest = Interest::default();
    let reads = shelf.reads();
    shelf.stall_next.store(true, Ordering::SeqCst);
    fetcher.ahead(plan(&ids[58..59], &interest));
    a_while().await;
    assert_eq!(shelf.reads(), reads + 1, "nobody is in a hurry");
    let began = Instant::now();
    assert!(fetcher.fetch(&chunks(&ids[58..59])).await.unwrap() == content[58..59]);
    assert!(began.elapsed() < Duration::from_millis(100), "{:?}", began.elapsed());
    // Where none is answered, few are asked for twice, and the deadline holds.
    shelf.silent.store(true, Ordering::SeqCst);
    let all = ids[51..58].iter().map(|id| async { fetcher.fetch(&chunks(&[*id])).await.unwrap_err() });
    let began = Instant::now();
    futures::future::join_all(all).await;
    assert_eq!(began.elapsed(), Duration::from_secs(5));
    assert!(fetcher.stats().hedges * 20 <= fetcher.stats().requests, "{:?}", fetcher.stats());
}
