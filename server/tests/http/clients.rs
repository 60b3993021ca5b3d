//! Clients that die, stall, or talk something else; and what becomes of them when the server stops.

use std::sync::{Arc, Barrier};
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use reqwest::{Body, Method};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::common::*;
use narlake_format::nix::compression::Compression;
use narlake_server::app::{BLOCKING_THREADS, UPLOAD_THREADS, runtime};
use narlake_server::config::{Config, UPLOADS_MAX};

pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) async fn connect(server: &Server) -> TcpStream {
    TcpStream::connect(server.app.address()).await.unwrap()
}

/// Everything until the server closes the connection.
pub(crate) async fn rest(mut stream: TcpStream) -> String {
    let mut answer = Vec::new();
    timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap().unwrap_or_default();
    String::from_utf8_lossy(&answer).into_owned()
}

pub(crate) async fn settled(server: &Server, sample: &str, value: f64) {
    let start = Instant::now();
    while server.metric(sample).await.total_cmp(&value).is_ne() {
        assert!(start.elapsed() < SOON, "{sample} is {}", server.metric(sample).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_client_that_dies_in_the_middle_of_a_put() {
    let server = Server::start().await;
    let object = Object::new("dying", nar_of_tree(&[]), Compression::Zstd, &[]).await;
    for sent in [0, 1, object.file.len() / 2, object.file.len() - 1] {
        let mut stream = connect(&server).await;
        let head = format!("PUT /{} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", object.url, object.file.len());
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&object.file[..sent]).await.unwrap();
        drop(stream);
        settled(&server, "narlake_server_uploads_in_flight", 0.0).await;
        assert_eq!(server.request(Method::HEAD, &object.url).send().await.unwrap().status(), 404, "{sent}");
    }
    server.push(&object).await;
    assert!(server.nar(&object).await == object.nar);
}

#[tokio::test]
async fn a_client_that_stalls_is_told_so() {
    let server = Server::with(|config| config.limits.body_idle_timeout_s = 1).await;
    let object = Object::file("stalled", b"x").await;
    let mut stream = connect(&server).await;
    let head = format!("PUT /{} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", object.url, object.file.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&object.file[..10]).await.unwrap();
    let answer = rest(stream).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    settled(&server, "narlake_server_uploads_in_flight", 0.0).await;
}

#[tokio::test]
async fn a_client_that_never_begins_is_closed() {
    let server = Server::with(|config| config.limits.header_timeout_s = 1).await;
    let silent = connect(&server).await;
    assert_eq!(rest(silent).await, "");
    let mut slow = connect(&server).await;
    slow.write_all(b"GET /nix-cache-info HTTP/1.1\r\nHo").await.unwrap();
    let answer = rest(slow).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    // Nor may one that has been served sit there for ever.
    let mut idle = connect(&server).await;
    idle.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    assert!(rest(idle).await.ends_with("ok\n"));
    settled(&server, "narlake_server_connections", 1.0).await;
}

#[tokio::test]
async fn a_head_without_end_is_refused() {
    let server = Server::start().await;
    let mut stream = connect(&server).await;
    stream.write_all(b"GET / HTTP/1.1\r\nX: ").await.unwrap();
    // The server may close before all of it is written.
    let _ = stream.write_all(&vec![b'x'; 1 << 20]).await;
    let answer = rest(stream).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    assert_eq!(server.get("health").await.0, 200);
}

/// curl sends no body before it has been told to go on, for which it waits a second.
#[tokio::test]
async fn expect_100_continue() {
    let server = Server::start().await;
    let object = Object::file("expected", b"contents").await;
    let mut stream = connect(&server).await;
    let head = format!(
        "PUT /{} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
        object.url,
        object.file.len(),
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut interim = [0; 25];
    timeout(SOON, stream.read_exact(&mut interim)).await.unwrap().unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(&object.file).await.unwrap();
    let answer = rest(stream).await;
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");

    // A refusal comes instead of the invitation.
    let mut stream = connect(&server).await;
    let head = "PUT /nar/nonsense HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = rest(stream).await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
}

/// A client that is sending when it is refused gets to read why.
#[tokio::test]
async fn a_refusal_reaches_a_client_that_is_still_sending() {
    let server = Server::start().await;
    for _ in 0..20 {
        let body = stream::iter((0..200).map(|_| Ok::<_, std::io::Error>(Bytes::from_static(&[0; 65536]))));
        let request = server.request(Method::PUT, "nar/nonsense.nar").body(Body::wrap_stream(body));
        assert_eq!(request.send().await.unwrap().status(), 404);
    }
}

#[tokio::test]
async fn a_stop_waits_for_what_is_under_way_but_not_for_ever() {
    let server = Server::start().await;
    let object = server.push(&Object::file("stop", &sample(4 << 20)).await).await;
    let url = server.narinfo(&object).await.url;
    let response = server.request(Method::GET, &url).send().await.unwrap();
    let mut stalled = connect(&server).await;
    let head = format!("PUT /{} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", object.url);
    stalled.write_all(head.as_bytes()).await.unwrap();
    settled(&server, "narlake_server_uploads_in_flight", 1.0).await;

    let start = Instant::now();
    let reading = tokio::spawn(async move { response.bytes().await });
    let address = server.app.address();
    timeout(SOON, server.app.stop()).await.unwrap().unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1), "the stalled one is given its time");
    assert!(reading.await.unwrap().unwrap() == object.nar);
    assert!(TcpStream::connect(address).await.is_err());
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap();
    [&length.to_be_bytes()[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// What a client of HTTP/2 begins with.
fn http2() -> Vec<u8> {
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &frame(4, 0, 0, &[])].concat()
}

/// GET, as the head of a stream and the end of it.
fn http2_get(stream: u32, path: &str) -> Vec<u8> {
    // By numbers of HPACK's table: the method, the scheme, then path and authority as text.
    let path = [&[0x82, 0x86, 0x04, u8::try_from(path.len()).unwrap()], path.as_bytes(), &[0x01, 1, b'x']].concat();
    frame(1, 5, stream, &path)
}

/// Answers pings until the server closes the connection, and gives what else came.
async fn answer_pings(mut stream: TcpStream) -> String {
    let mut all = Vec::new();
    let mut head = [0; 9];
    while timeout(SOON, stream.read_exact(&mut head)).await.expect("it is closed").is_ok() {
        let [a, b, c, kind, flags, ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        stream.read_exact(&mut payload).await.unwrap();
        if (kind, flags) == (6, 0) {
            // It may be closed meanwhile.
            let _ = stream.write_all(&frame(6, 1, 0, &payload)).await;
        }
        all.extend(payload);
    }
    String::from_utf8_lossy(&all).into_owned()
}

/// In HTTP/2 a connection lives on pings, which are answered below everything that we see.
#[tokio::test]
async fn an_idle_connection_of_http2_is_closed() {
    let server = Server::with(|config| config.limits.header_timeout_s = 1).await;
    let mut idle = connect(&server).await;
    idle.write_all(&http2()).await.unwrap();
    answer_pings(idle).await;
    let mut used = connect(&server).await;
    used.write_all(&[http2(), http2_get(1, "/health")].concat()).await.unwrap();
    assert!(answer_pings(used).await.contains("ok\n"));
    settled(&server, "narlake_server_connections", 1.0).await;
}

/// A stream whose window its client keeps shut.
#[tokio::test]
async fn an_answer_that_http2_cannot_send_is_broken_off() {
    let server = Server::with(|config| config.limits.body_idle_timeout_s = 1).await;
    let object = server.push(&Object::file("shut", &sample(1 << 20)).await).await;
    let url = format!("/{}", server.narinfo(&object).await.url);
    let mut shut = connect(&server).await;
    shut.write_all(&[http2(), http2_get(1, &url), http2_get(3, "/health")].concat()).await.unwrap();
    let answer = answer_pings(shut).await;
    assert!(answer.contains("ok\n") && answer.len() < 1 << 20, "{}", answer.len());
    settled(&server, "narlake_server_requests_in_flight", 1.0).await;
}

/// A handler that takes long is not a client that does: nobody who waits for an answer is cut off.
#[tokio::test]
async fn a_client_that_waits_is_not_idle() {
    let server = Server::with(|config| {
        (config.limits.uploads_max, config.limits.header_timeout_s, config.limits.body_idle_timeout_s) = (1, 1, 1);
        config.limits.hold_s = 3;
    })
    .await;
    let object = Object::file("waits", &sample(1 << 20)).await;
    let mut slow = connect(&server).await;
    let head = format!("PUT /{} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", object.url, object.file.len());
    slow.write_all(head.as_bytes()).await.unwrap();
    let mut pieces = object.file.chunks(70_000);
    slow.write_all(pieces.next().unwrap()).await.unwrap();
    settled(&server, "narlake_server_uploads_in_flight", 1.0).await;
    let sending = tokio::spawn(async move {
        let object = Object::file("waits", &sample(1 << 20)).await;
        for piece in object.file.chunks(70_000).skip(1) {
            tokio::time::sleep(Duration::from_millis(200)).await;
            slow.write_all(piece).await.unwrap();
        }
        slow
    });
    let quick = Object::file("quick", b"quick").await;
    let start = Instant::now();
    assert_eq!(server.put(&quick.url, quick.file.clone()).await.0, 201);
    assert!(start.elapsed() > Duration::from_secs(2), "{:?}", start.elapsed());
    drop(sending.await.unwrap());
}

/// Uploads at their limit, each with its threads, leave enough for all that a bucket on disk and the codecs ask for.
#[test]
fn uploads_leave_threads_for_others() {
    let mut config = Config::default();
    config.limits.uploads_max = UPLOADS_MAX;
    let runtime = runtime(&config).unwrap();
    let threads = UPLOAD_THREADS * UPLOADS_MAX + BLOCKING_THREADS;
    let met = Arc::new(Barrier::new(threads + 1));
    for _ in 0..threads {
        let met = Arc::clone(&met);
        runtime.spawn_blocking(move || met.wait());
    }
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        met.wait();
        send.send(()).unwrap();
    });
    receive.recv_timeout(SOON).expect("they all run at once");
}
