//! NARs out: ranges, variants, the names they were uploaded by.

use reqwest::{Method, Response};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;

use super::common::*;
use narlake_format::nix::compression::Compression;

async fn get(server: &Server, path: &str, headers: &[(&str, &str)]) -> Response {
    let request =
        headers.iter().fold(server.request(Method::GET, path), |request, (name, value)| request.header(*name, *value));
    request.send().await.unwrap()
}

fn header<'a>(response: &'a Response, name: &str) -> &'a str {
    response.headers().get(name).map_or("", |value| value.to_str().unwrap())
}

#[tokio::test]
async fn ranges() {
    let server = Server::start().await;
    let object = server.push(&Object::new("ranged", nar_of_tree(&[]), Compression::Zstd, &[]).await).await;
    let url = server.narinfo(&object).await.url;
    let length = object.nar.len();
    let end = length - 1;
    let etag = header(&get(&server, &url, &[]).await, "etag").to_owned();
    for (range, expect) in [
        ("bytes=0-0", 0..1),
        ("bytes=0-", 0..length),
        ("bytes=1000-299999", 1000..300_000),
        (&format!("bytes={end}-"), end..length),
        (&format!("bytes={end}-{}", length * 2), end..length),
        ("bytes=-17", length - 17..length),
        (&format!("bytes=-{}", length * 2), 0..length),
    ] {
        let response = get(&server, &url, &[("range", range)]).await;
        assert_eq!(response.status(), 206, "{range}");
        assert_eq!(header(&response, "content-range"), format!("bytes {}-{}/{length}", expect.start, expect.end - 1));
        assert_eq!(header(&response, "content-length"), expect.len().to_string());
        assert_eq!(header(&response, "etag"), etag);
        assert!(response.bytes().await.unwrap() == object.nar[expect], "{range}");
    }
    for range in [format!("bytes={length}-"), format!("bytes={length}-{}", length + 5), "bytes=-0".into()] {
        let response = get(&server, &url, &[("range", &range)]).await;
        assert_eq!(response.status(), 416, "{range}");
        assert_eq!(header(&response, "content-range"), format!("bytes */{length}"));
    }
    // Several ranges, other units and nonsense are answered with the whole.
    for range in ["bytes=0-1,3-4", "lines=0-1", "bytes=5-1", "bytes=", "x"] {
        let response = get(&server, &url, &[("range", range)]).await;
        assert_eq!(response.status(), 200, "{range}");
        assert!(response.bytes().await.unwrap() == object.nar);
    }
    let same = get(&server, &url, &[("range", "bytes=0-1"), ("if-range", &etag)]).await;
    assert_eq!(same.status(), 206);
    let other = get(&server, &url, &[("range", "bytes=0-1"), ("if-range", "\"other\"")]).await;
    assert_eq!(other.status(), 200);
}

#[tokio::test]
async fn the_zstd_variant_is_for_those_who_ask() {
    let server = Server::start().await;
    let object = server.push(&Object::new("variant", nar_of_tree(&[]), Compression::None, &[]).await).await;
    let url = server.narinfo(&object).await.url;

    let plain = get(&server, &url, &[]).await;
    assert_eq!(header(&plain, "content-length"), object.nar.len().to_string());
    assert_eq!((header(&plain, "accept-ranges"), header(&plain, "vary")), ("bytes", "accept-encoding"));
    assert_eq!(header(&plain, "content-type"), "application/x-nix-nar");
    let etag = header(&plain, "etag").to_owned();

    let zstd = get(&server, &url, &[("accept-encoding", "zstd, br, gzip, deflate, bzip2, xz")]).await;
    assert_eq!(header(&zstd, "content-encoding"), "zstd");
    assert_eq!((header(&zstd, "content-length"), header(&zstd, "accept-ranges")), ("", ""));
    assert_ne!(header(&zstd, "etag"), etag);
    let body = zstd.bytes().await.unwrap();
    assert!(body.len() < object.nar.len() * 3 / 4);
    assert!(decompress(&body, Compression::Zstd).await == object.nar);

    // A range is of the NAR itself.
    let part = get(&server, &url, &[("accept-encoding", "zstd"), ("range", "bytes=3-5")]).await;
    assert_eq!((part.status().as_u16(), header(&part, "content-encoding")), (206, ""));
    assert_eq!(part.bytes().await.unwrap(), object.nar[3..6]);

    for tags in [etag.clone(), format!("\"other\", {etag}"), format!("W/{etag}"), "*".to_owned()] {
        let known = get(&server, &url, &[("if-none-match", &tags)]).await;
        assert_eq!(known.status(), 304, "{tags}");
        assert!(known.bytes().await.unwrap().is_empty());
    }
    assert_eq!(get(&server, &url, &[("if-none-match", "\"other\"")]).await.status(), 200);
}

/// A slow reader holds what of a NAR is on its way, so there are only so many, and one too many is held for a time.
#[tokio::test]
async fn a_download_too_many_waits() {
    let server = Server::with(|config| (config.limits.downloads_max, config.limits.hold_s) = (1, 1)).await;
    let object = server.push(&Object::file("large", &vec![0; 32 << 20]).await).await;
    let url = server.narinfo(&object).await.url;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut slow = socket.connect(server.app.address()).await.unwrap();
    slow.write_all(format!("GET /{url} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
    slow.read_u8().await.unwrap();

    let refused = get(&server, &url, &[]).await;
    assert_eq!((refused.status().as_u16(), header(&refused, "retry-after")), (503, "1"));
    assert_eq!(server.request(Method::HEAD, &url).send().await.unwrap().status(), 200);
    let waiting = tokio::spawn(server.request(Method::GET, &url).send());
    drop(slow);
    assert_eq!(waiting.await.unwrap().unwrap().status(), 200);
}

/// A client that uploaded `nar/<hash>.nar.xz` remembers that URL for 30 days.
#[tokio::test]
async fn the_name_of_an_upload_leads_to_the_nar_in_its_format() {
    let server = Server::start().await;
    for compression in [
        Compression::None,
        Compression::Brotli,
        Compression::Bzip2,
        Compression::Gzip,
        Compression::Xz,
        Compression::Zstd,
    ] {
        // Contents of its own: one name leads to one path.
        let nar = nar_of_file(&[sample(100_000), compression.to_string().into_bytes()].concat());
        let object = Object::new(&format!("kept-{compression}"), nar, compression, &[]).await;
        server.push(&object).await;
        let response = get(&server, &object.url, &[("accept-encoding", "zstd;q=0")]).await;
        assert_eq!(response.status(), 200, "{compression}");
        assert_eq!(header(&response, "content-encoding"), "", "{compression}");
        let ranges = if compression == Compression::None { "bytes" } else { "" };
        assert_eq!(header(&response, "accept-ranges"), ranges, "{compression}");
        let body = response.bytes().await.unwrap();
        assert!(decompress(&body, compression).await == object.nar, "{compression}");
        assert_eq!(server.request(Method::HEAD, &object.url).send().await.unwrap().status(), 200, "{compression}");
    }
}

#[tokio::test]
async fn a_nar_url_is_of_one_path_and_one_nar() {
    let server = Server::start().await;
    let object = server.push(&Object::file("one", b"1").await).await;
    let other = server.push(&Object::file("two", b"2").await).await;
    let crossed = format!("nar/{}-{}.nar", object.hash(), other.info.nar_hash.to_base32());
    assert_eq!(server.get(&crossed).await.0, 404);
}
