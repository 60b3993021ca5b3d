//! The HTTP client, against servers that misbehave.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

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
    (remote(&format!("http://{address}/cache"), None, 2), count, heads)
}

fn remote(url: &str, token_file: Option<PathBuf>, deadline_s: u64) -> Remote {
    let settings = RemoteSettings {
        server: url.parse().unwrap(),
        token: Some("secret".into()),
        token_file,
        deadline: Duration::from_secs(deadline_s),
    };
    Remote::new(settings, StoreDir::default(), &Metrics::new()).unwrap()
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
async fn refusals_are_errors_at_once_and_nonsense_soon() {
    let hash = World::path("x").hash;
    for (bad, kind, times) in [
        (answer("401 Unauthorized", "", "no"), ErrorKind::Denied, 1),
        (answer("400 Bad Request", "", "no"), ErrorKind::Invalid, 1),
        (answer("200 OK", "", "no record"), ErrorKind::Corrupt, 3),
        (answer("500 Internal Server Error", "narlake-damaged: content\r\n", "no"), ErrorKind::Corrupt, 1),
        (answer("200 OK", "", &"x".repeat(2 << 20)), ErrorKind::TooLarge, 1),
    ] {
        let (remote, count, _) = server(vec![bad]).await;
        let error = remote.lookup(&hash).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error:?}");
        assert_eq!(count.load(Ordering::SeqCst), times);
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

/// A token that expires is an error that names its file; the file is read again, and the next request needs no restart.
#[tokio::test]
async fn tokens_are_renewed_from_their_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "secret\n").unwrap();
    let hash = World::path("x").hash;
    let (expired, absent) =
        (answer("401 Unauthorized", "", "expired"), answer("404 Not Found", "narlake-absent: path\r\n", ""));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = vec![0; 4096];
            let length = stream.read(&mut head).await.unwrap_or(0);
            count.fetch_add(1, Ordering::SeqCst);
            let head = String::from_utf8_lossy(&head[..length]).to_ascii_lowercase();
            let good = head.contains("authorization: bearer fresh");
            let _ = stream.write_all(if good { &absent } else { &expired }).await;
            let _ = stream.shutdown().await;
        }
    });
    let remote = remote(&url, Some(file.clone()), 2);
    let error = remote.lookup(&hash).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    let text = narlake_format::error::chain(&error);
    assert!(text.contains("401") && text.contains(file.to_str().unwrap()) && text.contains("expired"), "{text}");
    assert_eq!(asked.load(Ordering::SeqCst), 1, "the same token is not tried again");
    std::fs::write(&file, "fresh\n").unwrap();
    assert!(remote.lookup(&hash).await.unwrap().is_none());
    assert!(remote.lookup(&hash).await.unwrap().is_none());
    assert_eq!(asked.load(Ordering::SeqCst), 4);
    std::fs::remove_file(&file).unwrap();
    assert!(remote.lookup(&hash).await.unwrap().is_none(), "what is known is enough");
}

/// A server that sends a byte a second is left before the time is up, and a quick one found.
#[tokio::test]
async fn slow_answers_are_left_for_others() {
    let pack = "public/01j0000000000000000000000z".parse().unwrap();
    let good = answer("206 Partial Content", "content-range: bytes 0-3/99\r\n", "abcd");
    for quick_after in [1, usize::MAX] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let good = good.clone();
        tokio::spawn(async move {
            for number in 0.. {
                let (mut stream, _) = listener.accept().await.unwrap();
                let good = good.clone();
                tokio::spawn(async move {
                    let mut head = vec![0; 4096];
                    let _ = stream.read(&mut head).await;
                    if String::from_utf8_lossy(&head).contains("/url ") {
                        return;
                    }
                    // Its head at once, its body never to the end.
                    let start = if number >= quick_after { good.len() } else { good.len() - 4 };
                    let _ = stream.write_all(&good[..start]).await;
                    for byte in good.get(start..).unwrap_or_default() {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        if stream.write_all(&[*byte]).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        let (remote, began) = (remote(&url, None, 5), Instant::now());
        let read = remote.read(&pack, 0..4).await;
        let took = began.elapsed();
        if quick_after == 1 {
            assert_eq!(read.unwrap(), "abcd");
            assert!(took < Duration::from_secs(4), "{took:?}");
        } else {
            let error = read.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable);
            assert!(error.chain().contains("too little"), "{}", error.chain());
            assert!(took < Duration::from_secs(6), "{took:?}");
        }
    }
}

/// Bodies that break off are said to, and are tried again.
#[tokio::test]
async fn what_breaks_off_is_tried_again() {
    let pack = "public/01j0000000000000000000000z".parse().unwrap();
    let good = answer("206 Partial Content", "content-range: bytes 0-3/99\r\n", "abcd");
    let cut = good[..good.len() - 2].to_vec();
    let (remote, _, _) = server(vec![cut.clone(), cut.clone(), cut.clone(), good]).await;
    assert_eq!(remote.read(&pack, 0..4).await.unwrap(), "abcd");
    let (remote, count, _) = server(vec![cut]).await;
    let error = remote.read(&pack, 0..4).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.chain().contains("broke off after 2 bytes"), "{}", error.chain());
    assert!(count.load(Ordering::SeqCst) > 3);
}

/// A server whose certificate nobody here knows is refused at once, by an error that says so.
#[tokio::test]
async fn a_wrong_certificate_is_said_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-keyout", &path("key"), "-out", &path("certificate")])
        .stderr(Stdio::null())
        .status();
    if !made.is_ok_and(|made| made.success()) {
        eprintln!("SKIP: no openssl, cannot make a certificate");
        return;
    }
    let mut served = Command::new("timeout")
        .args(["60", "openssl", "s_server", "-quiet", "-www", "-accept", &format!("127.0.0.1:{port}")])
        .args(["-key", &path("key"), "-cert", &path("certificate")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
        assert!(Instant::now() < until, "the server does not listen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (remote, began) = (remote(&format!("https://127.0.0.1:{port}"), None, 20), Instant::now());
    let error = remote.lookup(&World::path("x").hash).await.unwrap_err();
    let (text, took) = (narlake_format::error::chain(&error), began.elapsed());
    let _ = Command::new("kill").arg(served.id().to_string()).status();
    let _ = served.wait();
    assert!(text.contains("certificate"), "{text}");
    assert!(took < Duration::from_secs(5), "{took:?}: {text}");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}
