//! Bodies that are held whole in memory do not add up, and nobody holds that memory by being slow.

use std::time::Duration;

use reqwest::{Body, Method};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::clients::{SOON, connect, rest};
use super::common::*;
use narlake_format::api::{LocateResponse, MissingRequest, encode_locate};
use narlake_format::id::BlobId;
use narlake_format::lake::record::PathRecord;
use narlake_format::nix::compression::Compression;
use narlake_format::nix::store_path::StoreDir;

const A_MOMENT: Duration = Duration::from_millis(300);

/// Announces a body and waits to be asked for it.
async fn announce(server: &Server, method: &str, path: &str, length: usize) -> TcpStream {
    let mut stream = connect(server).await;
    let head = format!(
        "{method} /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n\
         Content-Length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

async fn asked_for(stream: &mut TcpStream) {
    let mut interim = [0; 25];
    timeout(SOON, stream.read_exact(&mut interim)).await.unwrap().unwrap();
    assert_eq!(str::from_utf8(&interim).unwrap(), "HTTP/1.1 100 Continue\r\n\r\n");
}

fn log(name: &str) -> String {
    format!("log/{}.drv", store_path(name))
}

/// Two logs of 40 MiB do not fit into 64 MiB: the second is not asked for before the first has gone.
#[tokio::test]
async fn a_push_too_large_waits() {
    let server = Server::start().await;
    let mut first = announce(&server, "PUT", &log("first"), 40 << 20).await;
    asked_for(&mut first).await;
    let mut second = announce(&server, "PUT", &log("second"), 40 << 20).await;
    assert!(timeout(A_MOMENT, second.read_u8()).await.is_err());
    // What fits goes past nobody: it waits its turn, and comes.
    drop(first);
    asked_for(&mut second).await;
    server.push(&Object::file("small", b"small").await).await;
}

/// Held for too long it is told so, and never with the 503 that older Nix takes for the end.
#[tokio::test]
async fn a_push_is_not_held_for_ever() {
    let server = Server::with(|config| config.limits.hold_s = 1).await;
    let mut first = announce(&server, "PUT", &log("first"), 40 << 20).await;
    asked_for(&mut first).await;
    let answer = rest(announce(&server, "PUT", &log("second"), 40 << 20).await).await;
    assert!(answer.starts_with("HTTP/1.1 500") && answer.contains("busy"), "{answer}");
}

/// Readers wait for a moment, are told to come back, and keep no push waiting.
#[tokio::test]
async fn questions_wait_and_keep_no_push_waiting() {
    let server = Server::with(|config| config.limits.wait_s = 1).await;
    let object = server.push(&Object::file("asked-about", b"x").await).await;
    let mut first = announce(&server, "POST", "api/v1/missing", 24 << 20).await;
    asked_for(&mut first).await;
    let answer = rest(announce(&server, "POST", "api/v1/missing", 24 << 20).await).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after: 1"), "{answer}");
    server.push(&Object::file("pushed", b"y").await).await;
    assert_eq!(server.get(&object.narinfo_name()).await.0, 200);
    drop(first);
    let question = serde_json::to_vec(&MissingRequest { paths: vec![object.path()] }).unwrap();
    assert_eq!(server.call(Method::POST, "api/v1/missing", question).await.0, 200);
}

/// Long questions are read like short ones.
#[tokio::test]
async fn a_long_question() {
    let server = Server::start().await;
    let paths: Vec<_> = (0..3000).map(|number| store_path(&format!("n{number}"))).collect();
    let question = serde_json::to_vec(&MissingRequest { paths }).unwrap();
    assert!(question.len() > 100_000);
    let (status, text) = server.call(Method::POST, "api/v1/missing", question.clone()).await;
    assert_eq!(status, 200);
    assert_eq!(text, String::from_utf8(question).unwrap().replace("paths", "missing"));
}

#[tokio::test]
async fn questions_have_no_content_coding() {
    let server = Server::start().await;
    for path in ["closure", "missing", "locate"] {
        for coding in ["zstd", "gzip", "deflate"] {
            let request = server.request(Method::POST, &format!("api/v1/{path}")).header("content-encoding", coding);
            let response = request.body("{}").send().await.unwrap();
            assert_eq!(response.status(), 415, "{path} {coding}");
            assert_eq!(response.headers()["accept-encoding"], "identity");
        }
    }
}

/// A decoder for a few bytes of text is not given the memory that one for a NAR may take.
#[tokio::test]
async fn a_coded_narinfo_gets_a_small_decoder() {
    let server = Server::start().await;
    let path = Object::file("windowed", b"x").await.narinfo_name();
    // A zstd frame of one empty block, whose header asks for a window of 64 MiB, then of 8 MiB.
    for (window, expect) in [(16_u8 << 3, "not a whole zstd stream"), (13 << 3, "narinfo")] {
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, window, 1, 0, 0];
        let request = server.request(Method::PUT, &path).header("content-encoding", "zstd");
        let response = request.body(frame.to_vec()).send().await.unwrap();
        assert_eq!(response.status(), 400);
        let text = response.text().await.unwrap();
        assert!(text.contains(expect), "{window}: {text}");
    }
}

/// Sends a byte now and then until it is answered.
async fn drip(server: &Server, path: &str, body: Vec<u8>) -> String {
    let mut stream = connect(server).await;
    let head = format!("PUT /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100000\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    let dripping = tokio::spawn(async move {
        for byte in body {
            write.write_u8(byte).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let mut answer = [0; 12];
    timeout(SOON, read.read_exact(&mut answer)).await.unwrap().unwrap();
    dripping.abort();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn a_body_that_is_held_has_a_deadline() {
    let server = Server::with(|config| config.limits.body_timeout_s = 1).await;
    assert_eq!(drip(&server, &format!("{}.narinfo", store_path("drip").hash), vec![b'S'; 1000]).await, "HTTP/1.1 408");
}

/// A byte in every idle time is no progress: it would hold one of the places for uploads for ever.
#[tokio::test]
async fn an_upload_that_drips_is_idle() {
    let server = Server::with(|config| config.limits.body_idle_timeout_s = 1).await;
    let object = Object::file("drip", &sample(100_000)).await;
    assert_eq!(drip(&server, &object.url, object.file).await, "HTTP/1.1 408");
}

/// One who asks for much of a pack and takes none of it holds that memory for a time, and no longer.
#[tokio::test]
async fn a_reader_that_takes_nothing_is_closed() {
    let server = Server::with(|config| config.limits.body_timeout_s = 1).await;
    let mut state = 1_u64;
    let random: Vec<u8> = (0..10 << 20)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        })
        .collect();
    let object = Object::new("large", nar_of_file(&random), Compression::None, &[]).await;
    server.push(&object).await;
    let (_, text) = server.get(&format!("api/v1/paths/{}", object.hash())).await;
    let record = PathRecord::parse(&StoreDir::default(), text.as_bytes()).unwrap();
    let ids = [BlobId::from(record.manifest())];
    let (_, text) = server.call(Method::POST, "api/v1/locate", encode_locate(&ids)).await;
    let place = serde_json::from_str::<LocateResponse>(&text).unwrap().locations().unwrap()[0].unwrap();

    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(server.app.address()).await.unwrap();
    let head = format!(
        "GET /api/v1/packs/{} HTTP/1.1\r\nHost: x\r\nRange: bytes=0-{}\r\n\r\n",
        place.pack,
        place.frame_offset - 1
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // It reads so little that the server keeps trying.
    let mut buffer = vec![0; 64 << 10];
    let mut received = 0;
    loop {
        match timeout(SOON, stream.read(&mut buffer)).await.unwrap() {
            Ok(0) | Err(_) => break,
            Ok(length) => received += length,
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(received < place.frame_offset as usize, "{received} of {}", place.frame_offset);
    let aborted = "narlake_server_responses_aborted_total{by=\"client\",route=\"/api/v1/packs/{domain}/{id}\"}";
    assert!(server.metric(aborted).await > 0.0);
}

/// A log leaves as it came, in one piece or in many.
#[tokio::test]
async fn a_log_of_some_megabytes() {
    let server = Server::start().await;
    let text = sample(3 << 20);
    let request = server.request(Method::PUT, &log("large")).header("content-encoding", "zstd");
    let response = request.body(Body::from(compress(&text, Compression::Zstd).await)).send().await.unwrap();
    assert_eq!(response.status(), 201);
    let response = server.request(Method::GET, &log("large")).send().await.unwrap();
    assert_eq!(response.headers()["content-length"], text.len().to_string());
    assert!(response.bytes().await.unwrap() == text);
}
