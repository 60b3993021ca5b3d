//! The HTTP client, against servers that misbehave.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use narlake_format::id::{BlobId, ChunkId};
use narlake_format::nix::store_path::StoreDir;
use narlake_mountd::metrics::Metrics;
use narlake_mountd::remote::{Remote, RemoteSettings};
use narlake_mountd::view::RecordSource;
use narlake_storage::ErrorKind;
use narlake_storage::fetch::BlobSource;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::kit::World;

/// A server that gives these answers, one a connection, the last one for ever. Counts what it was asked.
async fn server(answers: Vec<Vec<u8>>) -> (Remote, Arc<AtomicUsize>, Arc<tokio::sync::Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (count, heads) = (Arc::new(AtomicUsize::new(0)), Arc::new(tokio::sync::Mutex::new(Vec::new())));
    let (counted, kept) = (Arc::clone(&count), Arc::clone(&heads));
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.windows(4).any(|end| end == b"\r\n\r\n") {
                if stream.read_buf(&mut head).await.unwrap_or(0) == 0 {
                    break;
                }
            }
            kept.lock().await.push(String::from_utf8_lossy(&head).into_owned());
            let number = counted.fetch_add(1, Ordering::SeqCst);
            let _ = stream.write_all(&answers[number.min(answers.len() - 1)]).await;
            let _ = stream.shutdown().await;
        }
    });
    let settings = RemoteSettings {
        server: format!("http://{address}/cache").parse().unwrap(),
        token: Some("secret".into()),
        token_file: None,
        deadline: Duration::from_secs(2),
    };
    (Remote::new(settings, StoreDir::default(), &Metrics::new()).unwrap(), count, heads)
}

fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n{body}").into_bytes()
}

#[tokio::test]
async fn absence_is_said_once_and_trouble_is_tried_again() {
    let hash = World::path("x").hash;
    let absent = answer("404 Not Found", "narlake-absent: path\r\n", "");
    let (remote, count, heads) = server(vec![absent.clone()]).await;
    assert!(remote.lookup(&hash).await.unwrap().is_none());
    assert_eq!(count.load(Ordering::SeqCst), 1);
    let head = heads.lock().await[0].to_ascii_lowercase();
    assert!(head.starts_with(&format!("get /cache/api/v1/paths/{hash} http/1.1")), "{head}");
    assert!(head.contains("authorization: bearer secret"), "{head}");
    // A restart is a delay: 503s, then a connection that breaks.
    let busy = answer("503 Service Unavailable", "", "later");
    let (remote, count, _) =
        server(vec![busy.clone(), busy.clone(), b"HTTP/1.1 200 OK\r\ncontent-le".to_vec(), absent]).await;
    assert!(remote.lookup(&hash).await.unwrap().is_none());
    assert_eq!(count.load(Ordering::SeqCst), 4);
    // Until the time is up. A 404 that the server did not mark is a proxy's word, and no answer either; so is a 500.
    let unmarked = ["404 Not Found", "500 Internal Server Error"].map(|status| answer(status, "", "nothing here"));
    for trouble in [busy].into_iter().chain(unmarked) {
        let (remote, count, _) = server(vec![trouble]).await;
        let error = remote.lookup(&hash).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(count.load(Ordering::SeqCst) > 3);
    }
}

#[tokio::test]
async fn refusals_and_nonsense_are_errors_at_once() {
    let hash = World::path("x").hash;
    for (bad, kind) in [
        (answer("401 Unauthorized", "", "no"), ErrorKind::Denied),
        (answer("400 Bad Request", "", "no"), ErrorKind::Invalid),
        (answer("200 OK", "", "no record"), ErrorKind::Corrupt),
        (answer("500 Internal Server Error", "narlake-damaged: content\r\n", "no"), ErrorKind::Corrupt),
        (answer("200 OK", "", &"x".repeat(2 << 20)), ErrorKind::TooLarge),
    ] {
        let (remote, count, _) = server(vec![bad]).await;
        let error = remote.lookup(&hash).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error:?}");
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }
}

/// An answer without its last line was cut off: nothing of it counts.
#[tokio::test]
async fn closures_are_whole_or_nothing() {
    let hash = World::path("x").hash;
    let missing = format!("{{\"missing\":\"{hash}\"}}\n");
    let (remote, _, _) = server(vec![answer("200 OK", "", &format!("{missing}{{\"done\":1}}\n"))]).await;
    assert_eq!(remote.closure(&[hash], &mut |_| ()).await.unwrap(), [hash]);
    for body in [missing.clone(), String::new(), format!("{missing}{{\"done\":2}}\n")] {
        let (remote, _, _) = server(vec![answer("200 OK", "", &body)]).await;
        assert_eq!(remote.closure(&[hash], &mut |_| ()).await.unwrap_err().kind(), ErrorKind::Unavailable, "{body}");
    }
    let (remote, _, _) = server(vec![answer("200 OK", "", "{\"x\":1}\n")]).await;
    assert_eq!(remote.closure(&[hash], &mut |_| ()).await.unwrap_err().kind(), ErrorKind::Corrupt);
}

#[tokio::test]
async fn ranges_are_exact() {
    let pack = "public/01j0000000000000000000000z".parse().unwrap();
    let (remote, _, heads) =
        server(vec![answer("206 Partial Content", "content-range: bytes 5-8/99\r\n", "abcd")]).await;
    assert_eq!(remote.read(&pack, 5..9).await.unwrap(), "abcd");
    assert!(heads.lock().await[0].to_ascii_lowercase().contains("range: bytes=5-8"));
    assert_eq!(remote.size(&pack).await.unwrap(), 99);
    for bad in [
        answer("206 Partial Content", "", "abc"),
        answer("200 OK", "", "abcd"),
        answer("206 Partial Content", "", "abcde"),
        answer("404 Not Found", "", ""),
    ] {
        let (remote, _, _) = server(vec![bad]).await;
        assert!(remote.read(&pack, 5..9).await.is_err());
    }
}

#[tokio::test]
async fn locations_answer_every_id() {
    let ids: Vec<BlobId> = vec![ChunkId::of(b"a").into(), ChunkId::of(b"b").into()];
    let good = r#"{"packs":["public/01j0000000000000000000000z"],"locations":[[0,8,100,0,10],null]}"#;
    let (remote, _, _) = server(vec![answer("200 OK", "", good)]).await;
    let found = remote.locate(&ids).await.unwrap();
    assert_eq!((found[0].unwrap().frame_range(), found[1]), (8..108, None));
    for bad in [r#"{"packs":[],"locations":[[0,8,100,0,10],null]}"#, r#"{"packs":[],"locations":[null]}"#, "[]"] {
        let (remote, _, _) = server(vec![answer("200 OK", "", bad)]).await;
        assert!(remote.locate(&ids).await.is_err(), "{bad}");
    }
}
