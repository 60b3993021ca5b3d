//! Packs read straight from the bucket: when that is done, and what happens when it fails.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use narlake_format::lake::location::PackRef;
use narlake_format::nix::store_path::StoreDir;
use narlake_mountd::metrics::Metrics;
use narlake_mountd::remote::{Remote, RemoteSettings};
use narlake_storage::fetch::BlobSource;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const PACK: &str = "public/01j0000000000000000000000z";

/// An HTTP server whose answers a test decides, request by request.
struct Site {
    url: String,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Site {
    async fn new(answer: impl Fn(&str) -> Vec<u8> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let heads = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&heads);
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = Vec::new();
                while !head.windows(4).any(|end| end == b"\r\n\r\n") {
                    if stream.read_buf(&mut head).await.unwrap_or(0) == 0 {
                        break;
                    }
                }
                let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
                let bytes = answer(&head);
                kept.lock().unwrap().push(head);
                let _ = stream.write_all(&bytes).await;
                let _ = stream.shutdown().await;
            }
        });
        Self { url, heads }
    }

    /// How many requests had this in their head.
    fn count(&self, text: &str) -> usize {
        self.heads.lock().unwrap().iter().filter(|head| head.contains(text)).count()
    }
}

fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n{body}").into_bytes()
}

fn part(body: &str) -> Vec<u8> {
    answer("206 Partial Content", "content-range: bytes 0-3/99\r\n", body)
}

/// A server that answers reads itself, and questions for URLs with these, the last one for ever.
async fn server(urls: Vec<String>) -> Site {
    let urls = Mutex::new(VecDeque::from(urls));
    Site::new(move |head| {
        if !head.starts_with(&format!("get /api/v1/packs/{PACK}/url ")) {
            return part("abcd");
        }
        let mut urls = urls.lock().unwrap();
        let url = if urls.len() > 1 { urls.pop_front() } else { urls.front().cloned() };
        answer("200 OK", "", &url.unwrap())
    })
    .await
}

fn offer(url: &str, valid_s: u64) -> String {
    format!("{{\"url\":\"{url}\",\"valid_s\":{valid_s}}}")
}

fn remote(server: &Site) -> (Remote, Metrics) {
    let metrics = Metrics::new();
    let settings = RemoteSettings {
        server: server.url.parse().unwrap(),
        token: Some("secret".into()),
        token_file: None,
        deadline: Duration::from_secs(5),
    };
    (Remote::new(settings, StoreDir::default(), &metrics).unwrap(), metrics)
}

async fn read(remote: &Remote) {
    let pack: PackRef = PACK.parse().unwrap();
    assert_eq!(remote.read(&pack, 0..4).await.unwrap(), "abcd");
}

/// Waits until the server has been asked for a URL so often, and the answer has been noted.
async fn asked(server: &Site, times: usize) {
    for _ in 0..100 {
        if server.count("/url ") >= times {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(server.count("/url "), times);
}

const THROUGH: &str = "/api/v1/packs/public/01j0000000000000000000000z http";

#[tokio::test]
async fn reads_go_to_the_bucket_once_there_is_a_url() {
    let bucket = Site::new(|_| part("abcd")).await;
    let server = server(vec![offer(&format!("{}/pack?sign=1", bucket.url), 600)]).await;
    let (remote, metrics) = remote(&server);
    read(&remote).await;
    asked(&server, 1).await;
    for _ in 0..3 {
        read(&remote).await;
    }
    assert_eq!((server.count(THROUGH), server.count("/url "), bucket.count("get /pack?sign=1 ")), (1, 1, 3));
    assert_eq!(bucket.count("range: bytes=0-3"), 3);
    assert_eq!((bucket.count("secret"), bucket.count("authorization")), (0, 0), "the token is the server's");
    assert!(server.count("authorization: bearer secret") > 0);
    assert_eq!(metrics.remote_requests.with_label_values(&["read from the bucket", "ok"]).get(), 3);
}

#[tokio::test]
async fn a_server_that_offers_none_is_not_asked_again() {
    for none in ["{\"url\":null,\"valid_s\":600}", "nonsense"] {
        let server = server(vec![none.into()]).await;
        let (remote, _) = remote(&server);
        read(&remote).await;
        asked(&server, 1).await;
        for _ in 0..3 {
            read(&remote).await;
        }
        asked(&server, 1).await;
        assert_eq!(server.count(THROUGH), 4);
    }
}

/// An expired URL is asked for anew, and the read goes on with the new one.
#[tokio::test]
async fn an_expired_url_is_renewed() {
    let bucket =
        Site::new(|head| if head.contains("sign=old") { answer("403 Forbidden", "", "") } else { part("abcd") }).await;
    let urls = ["old", "new"].map(|sign| offer(&format!("{}/pack?sign={sign}", bucket.url), 600));
    let server = server(urls.to_vec()).await;
    let (remote, _) = remote(&server);
    read(&remote).await;
    asked(&server, 1).await;
    read(&remote).await;
    read(&remote).await;
    assert_eq!((server.count(THROUGH), bucket.count("sign=old"), bucket.count("sign=new")), (1, 1, 2));
    // One that the server itself says is about to end is not used.
    let server = self::server(vec![offer(&format!("{}/pack?sign=late", bucket.url), 0)]).await;
    let (remote, _) = self::remote(&server);
    read(&remote).await;
    asked(&server, 1).await;
    read(&remote).await;
    assert_eq!((server.count(THROUGH), bucket.count("sign=late")), (2, 0));
}

/// Whatever the bucket does, the bytes come; and it is not asked again at once.
#[tokio::test]
async fn every_failure_of_the_bucket_goes_through_the_server() {
    let elsewhere = Site::new(|_| part("abcd")).await;
    let moved = format!("location: {}/secret\r\n", elsewhere.url);
    for bad in [
        answer("403 Forbidden", "", "never"),
        answer("404 Not Found", "", "gone"),
        answer("500 Internal Server Error", "", ""),
        answer("200 OK", "", "abcd"),
        answer("307 Temporary Redirect", &moved, ""),
        part("abc"),
        part("abcde"),
        part("abcd")[..60].to_vec(),
        b"SSH-2.0-OpenSSH\r\n".to_vec(),
    ] {
        let text = String::from_utf8_lossy(&bad).into_owned();
        let bucket = Site::new(move |_| bad.clone()).await;
        let server = server(vec![offer(&format!("{}/pack", bucket.url), 600)]).await;
        let (remote, _) = remote(&server);
        read(&remote).await;
        asked(&server, 1).await;
        for _ in 0..3 {
            read(&remote).await;
        }
        assert_eq!(server.count(THROUGH), 4, "{text}");
        assert!((1..=2).contains(&bucket.count("get /pack ")), "{text}");
    }
    assert!(elsewhere.heads.lock().unwrap().is_empty(), "nobody follows a redirection");
}
