//! NARs in: every form that clients send them in.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use reqwest::{Body, Method, StatusCode};
use tokio::sync::mpsc;

use super::common::*;
use narlake_format::nix::compression::Compression;

const COMPRESSIONS: [Compression; 6] =
    [Compression::None, Compression::Brotli, Compression::Bzip2, Compression::Gzip, Compression::Xz, Compression::Zstd];

#[tokio::test]
async fn every_compression() {
    let server = Server::start().await;
    for compression in COMPRESSIONS {
        let name = format!("compressed-{compression}");
        let object = Object::new(&name, nar_of_tree(&[store_path(&name)]), compression, &[store_path(&name)]).await;
        // As Nix asks, sends, and asks again.
        assert_eq!(server.request(Method::HEAD, &object.url).send().await.unwrap().status(), 404, "{compression}");
        server.push(&object).await;
        assert_eq!(server.request(Method::HEAD, &object.url).send().await.unwrap().status(), 200, "{compression}");
        assert!(server.nar(&object).await == object.nar, "{compression}");
    }
}

/// `compression=none` together with a content coding, and `narinfo-compression=`, `ls-compression=`, `log-compression=`.
#[tokio::test]
async fn every_content_coding_on_every_resource() {
    let server = Server::start().await;
    for coding in COMPRESSIONS.into_iter().filter(|coding| *coding != Compression::None) {
        let put = async |path: &str, body: &[u8]| {
            let request = server.request(Method::PUT, path).header("content-encoding", coding.name());
            let response = request.body(compress(body, coding).await).send().await.unwrap();
            assert!(response.status().is_success(), "{coding} {path} {}", response.text().await.unwrap());
        };
        let object = Object::file(&format!("coded-{coding}"), coding.name().as_bytes()).await;
        put(&object.url, &object.file).await;
        put(&object.narinfo_name(), object.narinfo().as_bytes()).await;
        assert!(server.nar(&object).await == object.nar, "{coding}");
        let listing = server.get(&format!("{}.ls", object.hash())).await.1;
        put(&format!("{}.ls", object.hash()), listing.as_bytes()).await;
        let log = format!("log/{}.drv", object.path());
        put(&log, b"built").await;
        assert_eq!(server.get(&log).await.1, "built", "{coding}");
    }
}

#[tokio::test]
async fn forms_that_cannot_be_read_are_refused_by_name() {
    let server = Server::start().await;
    let object = Object::file("refused", b"x").await;
    let lzma = [b"\x5d\x00\x00\x80\x00".as_slice(), &[0xff; 8], &[0; 16]].concat();
    let digits = object.info.nar_hash.to_base32();
    for (path, body, expect) in [
        (format!("nar/{digits}.nar.lz4"), vec![1], "lz4"),
        (format!("nar/{digits}.nar.lzip"), vec![1], "lzip"),
        (format!("nar/{digits}.nar"), lzma, "lzma"),
    ] {
        let (status, text) = server.put(&path, body).await;
        assert_eq!(status, StatusCode::UNSUPPORTED_MEDIA_TYPE, "{path}");
        assert!(text.contains(expect) && text.contains("zstd"), "{text}");
    }
    let request = server.request(Method::PUT, &object.url).header("content-encoding", "deflate");
    assert_eq!(request.body(object.file).send().await.unwrap().status(), 415);
}

/// The second of two pushes of one path, at the same time or later, succeeds and changes nothing.
#[tokio::test]
async fn two_pushes_at_once() {
    let server = Arc::new(Server::start().await);
    let zstd = Object::new("twice", nar_of_tree(&[]), Compression::Zstd, &[]).await;
    let xz = Object::new("twice", nar_of_tree(&[]), Compression::Xz, &[]).await;
    let pushes = (0..8).map(|number| {
        let (server, object) = (Arc::clone(&server), if number % 2 == 0 { zstd.clone() } else { xz.clone() });
        tokio::spawn(async move { server.push(&object).await })
    });
    for push in futures::future::join_all(pushes).await {
        push.unwrap();
    }
    assert!(server.nar(&zstd).await == zstd.nar);
    assert_eq!(server.put(&zstd.narinfo_name(), zstd.narinfo()).await.0, 200);

    // Other content under the same path: first wins, and the client does not fail.
    let other = Object::new("twice", nar_of_file(b"other"), Compression::None, &[]).await;
    server.push(&other).await;
    assert_eq!(server.narinfo(&other).await.nar_hash, zstd.info.nar_hash);
}

/// A path uploaded before a restart is published after it.
#[tokio::test]
async fn narinfo_after_a_restart() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let object = Object::new("restarted", nar_of_tree(&[]), Compression::Xz, &[]).await;
    let server = Server::in_dir(&dir).await;
    assert_eq!(server.put(&object.url, object.file.clone()).await.0, 201);
    server.app.stop().await.unwrap();

    let server = Server::in_dir(&dir).await;
    assert_eq!(server.request(Method::HEAD, &object.url).send().await.unwrap().status(), 200);
    assert_eq!(server.put(&object.narinfo_name(), object.narinfo()).await.0, 201);
    assert!(server.nar(&object).await == object.nar);
    server.app.stop().await.unwrap();
}

/// Beyond `uploads_max` an upload is held until another ends: never refused, which would end Nix 2.26's copy.
#[tokio::test]
async fn an_upload_too_many_waits() {
    let server = Arc::new(Server::with(|config| config.limits.uploads_max = 1).await);
    let object = Object::new("slow", nar_of_tree(&[]), Compression::None, &[]).await;
    let (head, tail) = object.file.split_at(1000);
    let (send, receive) = mpsc::channel::<std::io::Result<Bytes>>(2);
    send.send(Ok(Bytes::copy_from_slice(head))).await.unwrap();
    let body = Body::wrap_stream(stream::unfold(receive, async |mut receive| Some((receive.recv().await?, receive))));
    let slow = tokio::spawn(server.request(Method::PUT, &object.url).body(body).send());
    while server.metric("narlake_server_uploads_in_flight").await < 1.0 {
        tokio::task::yield_now().await;
    }

    let quick = Object::file("quick", b"quick").await;
    let waiting = tokio::spawn(server.request(Method::PUT, &quick.url).body(quick.file.clone()).send());
    while server.metric("narlake_server_uploads_waiting").await < 1.0 {
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished());

    send.send(Ok(Bytes::copy_from_slice(tail))).await.unwrap();
    drop(send);
    assert_eq!(slow.await.unwrap().unwrap().status(), 201);
    assert_eq!(waiting.await.unwrap().unwrap().status(), 201);
}
