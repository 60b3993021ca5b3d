//! The lake API, as mountd and the `narlake` command use it.

use reqwest::Method;

use super::common::*;
use narlake_format::api::{
    ClosureLine, ClosureRequest, Info, LocateResponse, MissingRequest, MissingResponse, PackUrl, encode_locate,
};
use narlake_format::id::BlobId;
use narlake_format::lake::record::PathRecord;
use narlake_format::nix::compression::Compression;
use narlake_format::nix::store_path::{StoreDir, StorePathHash};

async fn chain(server: &Server) -> [Object; 3] {
    let a = server.push(&Object::file("a", b"a").await).await;
    let b = Object::new("b", nar_of_tree(&[a.path()]), Compression::Zstd, &[a.path(), store_path("b")]).await;
    server.push(&b).await;
    let c = Object::new("c", nar_of_tree(&[b.path()]), Compression::Zstd, &[b.path()]).await;
    server.push(&c).await;
    [a, b, c]
}

async fn post<T: serde::Serialize>(server: &Server, path: &str, body: &T) -> (u16, String) {
    let body = serde_json::to_vec(body).unwrap();
    let (status, text) = server.call(Method::POST, &format!("api/v1/{path}"), body).await;
    (status.as_u16(), text)
}

#[tokio::test]
async fn info() {
    let server = Server::start().await;
    let (_, text) = server.get("api/v1/info").await;
    let info: Info = serde_json::from_str(&text).unwrap();
    assert_eq!((info.api_version, info.store_dir), (1, StoreDir::default()));
    assert_eq!(info.public_keys, server.app.public_keys());
}

#[tokio::test]
async fn a_record_is_signed_for_the_lake() {
    let server = Server::start().await;
    let [a, ..] = chain(&server).await;
    let (status, text) = server.get(&format!("api/v1/paths/{}", a.hash())).await;
    assert_eq!(status, 200);
    let record = PathRecord::parse(&StoreDir::default(), text.as_bytes()).unwrap();
    assert_eq!(record.info().store_path, a.path());
    assert!(record.is_signed_by(&StoreDir::default(), server.app.public_keys()));
    for (hash, expect) in [("0".repeat(32), 404), ("nonsense".into(), 400)] {
        let (status, text) = server.get(&format!("api/v1/paths/{hash}")).await;
        assert_eq!(status, expect);
        assert!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["error"].is_string(), "{text}");
    }
}

#[tokio::test]
async fn a_closure_comes_references_first() {
    let server = Server::start().await;
    let [a, b, c] = chain(&server).await;
    let gone: StorePathHash = "0".repeat(32).parse().unwrap();
    let hash = |object: &Object| object.info.store_path.hash;
    for (roots, have, expect) in [
        (vec![hash(&c)], vec![], vec![Some(a.path()), Some(b.path()), Some(c.path())]),
        (vec![hash(&c)], vec![hash(&a)], vec![Some(b.path()), Some(c.path())]),
        (vec![hash(&b), hash(&c), gone], vec![], vec![Some(a.path()), Some(b.path()), Some(c.path()), None]),
        (vec![], vec![], vec![]),
    ] {
        let (status, text) = post(&server, "closure", &ClosureRequest { roots, have }).await;
        assert_eq!(status, 200);
        let mut lines: Vec<ClosureLine> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.pop(), Some(ClosureLine::Done(expect.len() as u64)));
        let found: Vec<_> = lines
            .into_iter()
            .map(|line| match line {
                ClosureLine::Record(text) => {
                    Some(PathRecord::parse(&StoreDir::default(), text.as_bytes()).unwrap().info().store_path.clone())
                }
                ClosureLine::Missing(hash) => {
                    assert_eq!(hash, gone);
                    None
                }
                ClosureLine::Done(_) => panic!("it is the last"),
            })
            .collect();
        assert_eq!(found, expect);
    }
    assert_eq!(server.call(Method::POST, "api/v1/closure", "{").await.0, 400);
}

#[tokio::test]
async fn missing() {
    let server = Server::start().await;
    let [a, b, c] = chain(&server).await;
    let mut renamed = a.path();
    renamed.name = "renamed".parse().unwrap();
    let gone = [store_path("x"), renamed, store_path("y")];
    let paths = vec![a.path(), gone[0].clone(), b.path(), gone[1].clone(), c.path(), gone[2].clone()];
    let (status, text) = post(&server, "missing", &MissingRequest { paths }).await;
    assert_eq!(status, 200);
    assert_eq!(serde_json::from_str::<MissingResponse>(&text).unwrap().missing, gone);
}

/// A manifest, found and read as a worker does.
#[tokio::test]
async fn locate_and_read() {
    let server = Server::start().await;
    let [a, ..] = chain(&server).await;
    let (_, text) = server.get(&format!("api/v1/paths/{}", a.hash())).await;
    let record = PathRecord::parse(&StoreDir::default(), text.as_bytes()).unwrap();
    let ids = [BlobId::from(record.manifest()), BlobId::from_bytes([0; 32])];
    let (status, text) = server.call(Method::POST, "api/v1/locate", encode_locate(&ids)).await;
    assert_eq!(status, 200);
    let locations = serde_json::from_str::<LocateResponse>(&text).unwrap().locations().unwrap();
    assert_eq!((locations.len(), locations[1]), (2, None));
    let location = locations[0].unwrap();
    let range = location.frame_range();

    let path = format!("api/v1/packs/{}", location.pack);
    let get = async |range: &str| server.request(Method::GET, &path).header("range", range).send().await.unwrap();
    let response = get(&format!("bytes={}-{}", range.start, range.end - 1)).await;
    assert_eq!(response.status(), 206);
    assert_eq!(response.bytes().await.unwrap().len() as u64, range.end - range.start);
    // The first byte alone is how a worker asks for the length.
    let response = get("bytes=0-0").await;
    let total = response.headers()["content-range"].to_str().unwrap().strip_prefix("bytes 0-0/").unwrap().to_owned();
    let total: u64 = total.parse().unwrap();
    assert!(total >= range.end, "{total}");
    assert_eq!(get(&format!("bytes=0-{}", total - 1)).await.status(), 206);
    for beyond in
        [format!("bytes=0-{total}"), format!("bytes={total}-{total}"), format!("bytes={}-{}", total * 2, total * 3)]
    {
        let response = get(&beyond).await;
        assert_eq!(response.status(), 416, "{beyond}");
        assert_eq!(response.headers()["content-range"], format!("bytes */{total}"));
        // To a worker this means that the location was wrong, and that it should ask for another.
        assert_eq!(response.headers()["narlake-damaged"], "content");
    }
    for range in ["", "bytes=0-", "bytes=-5", "bytes=0-1,2-3", "bytes=0-99999999999"] {
        let response = get(range).await;
        assert!(response.status().is_client_error(), "{range} {}", response.status());
    }
    assert_eq!(server.get("api/v1/packs/public/nonsense").await.0, 400);
    for body in [vec![0; 31], vec![0; 33]] {
        assert_eq!(server.call(Method::POST, "api/v1/locate", body).await.0, 400);
    }
}

/// A directory as a bucket signs nothing: that is an answer, and says for how long it is one.
#[tokio::test]
async fn no_urls_of_packs_without_s3() {
    let server = Server::start().await;
    let (status, text) = server.get("api/v1/packs/public/01arz3ndektsv4rrffq69g5fav/url").await;
    let answer: PackUrl = serde_json::from_str(&text).unwrap();
    assert_eq!((status.as_u16(), answer.url), (200, None));
    assert!(answer.valid_s >= 60);
    assert_eq!(server.get("api/v1/packs/public/nonsense/url").await.0, 400);
    let other = "api/v1/packs/01arz3ndektsv4rrffq69g5fav/01arz3ndektsv4rrffq69g5fav/url";
    assert_eq!(server.get(other).await.0, 404, "of another domain");
}

/// A pack of another domain is not there, whether it is or not.
#[tokio::test]
async fn packs_of_other_domains_are_not_there() {
    let server = Server::start().await;
    let id = "01arz3ndektsv4rrffq69g5fav";
    for domain in [id, "public"] {
        let request = server.request(Method::GET, &format!("api/v1/packs/{domain}/{id}")).header("range", "bytes=0-1");
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 404, "{domain}");
    }
}
