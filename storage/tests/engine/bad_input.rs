//! What a client sends that is no NAR, too much, or never ends. Nothing of it is visible, and the lake goes on.

use std::io;
use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use narlake_storage::{Bucket, Error, ErrorKind, Settings};

use crate::kit::{Kit, directory, file, metrics, noise, object, stream};

async fn check_goes_on(kit: &Kit) {
    let good = object("good", &directory([("f", file(noise(1, 100_000)))]), &[]);
    kit.push(&good).await;
    assert!(kit.nar(&good.path.hash).await.unwrap() == good.nar);
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_nars() {
    let kit = Kit::memory().await;
    let good = directory([("a", file("text")), ("b", file(noise(1, 300_000)))]).nar();
    let swap = |from: &[u8], to: &[u8]| {
        let at = good.windows(from.len()).position(|window| window == from).unwrap();
        [&good[..at], to, &good[at + from.len()..]].concat()
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("not a NAR", b"hello world, this is no archive".to_vec()),
        ("cut in half", good[..good.len() / 2].to_vec()),
        ("cut at the end", good[..good.len() - 8].to_vec()),
        ("something behind", [&good[..], &[0; 8]].concat()),
        ("twice", [&good[..], &good[..]].concat()),
        ("names out of order", swap(b"\x01\0\0\0\0\0\0\0a", b"\x01\0\0\0\0\0\0\0c")),
        ("a name twice", swap(b"\x01\0\0\0\0\0\0\0b", b"\x01\0\0\0\0\0\0\0a")),
        ("a name with a slash", swap(b"\x01\0\0\0\0\0\0\0a", b"\x01\0\0\0\0\0\0\0/")),
        ("a name that escapes", swap(b"\x01\0\0\0\0\0\0\0a\0", b"\x02\0\0\0\0\0\0\0..")),
        ("padding that is not zero", swap(b"text\0", b"text\x01")),
        ("an unknown token", swap(b"contents", b"kontents")),
        ("a file of a petabyte", swap(b"\x04\0\0\0\0\0\0\0text", b"\0\0\0\0\0\0\x04\0text")),
    ];
    for (name, nar) in cases {
        let error = kit.ingest(&nar).await.expect_err(name);
        let kind = error.kind();
        assert!(matches!(error, Error::Nar(_) | Error::TooLarge { .. }), "{name}: {}", error.chain());
        assert!(matches!(kind, ErrorKind::Invalid | ErrorKind::TooLarge), "{name}: {kind:?}");
    }
    check_goes_on(&kit).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn too_large() {
    let settings = Settings { nar_size_max: 1 << 20, ..Settings::default() };
    let kit = Kit::over(Bucket::memory(&metrics()), settings).await;
    let error = kit.ingest(&file(noise(1, 2 << 20)).nar()).await.expect_err("beyond the limit");
    assert_eq!(error.kind(), ErrorKind::TooLarge);
    check_goes_on(&kit).await;
}

/// A client that never stops sending is stopped, also inside one file whose size says that it will.
#[tokio::test(flavor = "multi_thread")]
async fn a_nar_that_never_ends() {
    let settings = Settings { nar_size_max: 4 << 20, ..Settings::default() };
    let kit = Kit::over(Bucket::memory(&metrics()), settings).await;
    let mut head = file(Vec::new()).nar();
    let at = head.windows(8).position(|window| window == b"contents").unwrap() + 8;
    head.truncate(at);
    head.extend_from_slice(&(1_u64 << 39).to_le_bytes());
    let endless = futures::stream::iter(
        std::iter::once(Ok(Bytes::from(head))).chain(std::iter::repeat_with(|| Ok(Bytes::from(vec![7; 60_000])))),
    );
    let error = kit.lake.ingest(&kit.cache, endless).await.expect_err("beyond the limit");
    assert_eq!(error.kind(), ErrorKind::TooLarge, "{}", error.chain());
    check_goes_on(&kit).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away() {
    let kit = Kit::memory().await;
    let object = object("half", &file(noise(1, 3 << 20)), &[]);
    let pieces: Vec<io::Result<Bytes>> = object.nar[..1 << 20]
        .chunks(50_000)
        .map(|piece| Ok(Bytes::copy_from_slice(piece)))
        .chain([Err(io::Error::from(io::ErrorKind::ConnectionReset))])
        .collect();
    let error = kit.lake.ingest(&kit.cache, futures::stream::iter(pieces)).await.expect_err("it broke off");
    assert_eq!(error.kind(), ErrorKind::Closed, "{}", error.chain());
    // Dropped in the middle, as when the connection's task is cancelled.
    let first = stream(&object.nar[..500_000]);
    let silent = futures::StreamExt::chain(first, futures::stream::pending());
    let ingest = kit.lake.ingest(&kit.cache, silent);
    assert!(tokio::time::timeout(std::time::Duration::from_millis(200), ingest).await.is_err());
    assert!(!kit.lake.has_upload(&kit.cache, &object.upload()).await.unwrap());
    // What was left behind does no harm to who comes next, and may even be of use.
    kit.push(&object).await;
    assert!(kit.nar(&object.path.hash).await.unwrap() == object.nar);
    check_goes_on(&kit).await;
}

/// A client that goes silent is given up by dropping its push; the runtime, which waits for its threads, can then end.
#[test]
fn a_push_given_up_leaves_no_thread() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let nar = file(noise(6, 6 << 20)).nar();
    runtime.block_on(async {
        let kit = Kit::memory().await;
        let (tell, silent) = tokio::sync::oneshot::channel();
        let silence = futures::stream::once(async move {
            tell.send(()).unwrap();
            std::future::pending().await
        });
        let (lake, cache) = (kit.lake.clone(), kit.cache.clone());
        let body = stream(&nar[..nar.len() - 8]).chain(Box::pin(silence));
        let push = tokio::spawn(async move { lake.ingest(&cache, body).await.map(|_| ()) });
        silent.await.unwrap();
        push.abort();
        assert!(push.await.unwrap_err().is_cancelled());
        check_goes_on(&kit).await;
    });
    let (tell, ended) = mpsc::channel();
    std::thread::spawn(move || {
        drop(runtime);
        tell.send(()).unwrap();
    });
    ended.recv_timeout(Duration::from_secs(10)).expect("no thread is left");
}
