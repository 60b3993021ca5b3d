//! Each resource of a binary cache, as NIX clients use it.

use reqwest::Method;

use super::common::*;
use narlake_format::nix::compression::Compression;
use narlake_format::nix::realisation::{Realisation, RealisationKey};
use narlake_format::nix::store_path::StoreDir;

#[tokio::test]
async fn a_pushed_path_comes_back_byte_for_byte() {
    let server = Server::start().await;
    let base = server.push(&Object::file("base", b"hello").await).await;
    let paths = [base.path(), store_path("tree")];
    let tree = Object::new("tree", nar_of_tree(&paths), Compression::Zstd, &paths).await;
    server.push(&tree).await;

    for object in [&base, &tree] {
        let info = server.narinfo(object).await;
        assert_eq!(info.url, format!("nar/{}-{}.nar", object.hash(), object.info.nar_hash.to_base32()));
        assert_eq!(info.compression, Compression::None);
        assert_eq!((info.file_hash, info.file_size), (None, None));
        assert_eq!((info.nar_hash, info.nar_size), (object.info.nar_hash, object.info.nar_size));
        let mut references = object.info.references.clone();
        references.sort();
        assert_eq!(info.references, references);
        assert!(info.is_signed_by(&StoreDir::default(), server.app.public_keys()));
        assert!(server.nar(object).await == object.nar, "{}", object.path());
    }
}

#[tokio::test]
async fn a_cache_is_served_under_its_name_too() {
    let server = Server::with(|config| config.cache.name = "team-a".into()).await;
    let object = Object::file("named", b"contents").await;
    assert_eq!(server.put(&format!("team-a/{}", object.url), object.file.clone()).await.0, 201);
    assert_eq!(server.put(&format!("team-a/{}", object.narinfo_name()), object.narinfo()).await.0, 201);
    let narinfo = server.get(&object.narinfo_name()).await;
    assert_eq!(narinfo, server.get(&format!("team-a/{}", object.narinfo_name())).await);
    assert!(server.nar(&object).await == object.nar);
    let (status, text) = server.get(&format!("team-b/{}", object.narinfo_name())).await;
    assert_eq!((status.as_u16(), text.as_str()), (404, "there is no cache \"team-b\"\n"));
}

#[tokio::test]
async fn cache_info() {
    let server = Server::with(|config| config.cache.priority = 7).await;
    let text = "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 7\n";
    assert_eq!(server.get("nix-cache-info").await, (200.try_into().unwrap(), text.to_owned()));
    assert_eq!(server.get("default/nix-cache-info").await.1, text);
    for (body, expect) in
        [("StoreDir: /nix/store\n", 200), ("StoreDir: /gnu/store\n", 409), ("WantMassQuery: 1\n", 400), ("\u{0}", 400)]
    {
        assert_eq!(server.put("nix-cache-info", body).await.0, expect, "{body:?}");
    }
}

/// What is not there is 404, at once and not to be remembered.
#[tokio::test]
async fn absent() {
    let server = Server::start().await;
    let object = Object::new("absent", nar_of_file(b"x"), Compression::Xz, &[]).await;
    for path in [
        object.narinfo_name(),
        format!("{}.ls", object.hash()),
        object.url.clone(),
        format!("nar/{}-{}.nar", object.hash(), object.info.nar_hash.to_base32()),
        format!("log/{}.drv", object.path()),
        format!("realisations/{}!out.doi", object.info.nar_hash),
        format!("build-trace-v2/{}.drv/out.doi", object.path()),
        format!("debuginfo/{}", "0".repeat(40)),
        "nonsense".into(),
        "nar/nonsense".into(),
        "a/b/c/d".into(),
        "".into(),
    ] {
        for method in [Method::GET, Method::HEAD] {
            let response = server.request(method, &path).send().await.unwrap();
            assert_eq!(response.status(), 404, "{path}");
            assert_eq!(response.headers()["cache-control"], "no-store", "{path}");
            assert!(response.headers().contains_key("x-request-id"), "{path}");
        }
    }
}

#[tokio::test]
async fn head_says_what_get_says() {
    let server = Server::start().await;
    let object = server.push(&Object::new("head", nar_of_tree(&[]), Compression::Xz, &[]).await).await;
    let content = server.narinfo(&object).await.url;
    for path in ["nix-cache-info", &object.narinfo_name(), &format!("{}.ls", object.hash()), &content, &object.url] {
        let get = server.request(Method::GET, path).send().await.unwrap();
        let head = server.request(Method::HEAD, path).send().await.unwrap();
        assert_eq!((head.status(), get.status()), (200.try_into().unwrap(), 200.try_into().unwrap()), "{path}");
        assert_eq!(head.headers().get("content-type"), get.headers().get("content-type"), "{path}");
        assert!(head.bytes().await.unwrap().is_empty(), "{path}");
    }
    let head = server.request(Method::HEAD, &content).send().await.unwrap();
    assert_eq!(head.headers()["content-length"], object.nar.len().to_string());
}

#[tokio::test]
async fn a_listing_is_made_from_the_manifest() {
    let server = Server::start().await;
    let own = store_path("listed");
    let nar = nar_of_tree(std::slice::from_ref(&own));
    let at = |what: &[u8]| nar.windows(what.len()).position(|window| window == what).unwrap();
    let text = at(b"uses ");
    let tool = at(&sample(100));
    let object =
        server.push(&Object::new("listed", nar.clone(), Compression::None, std::slice::from_ref(&own)).await).await;
    let (status, listing) = server.get(&format!("{}.ls", object.hash())).await;
    assert_eq!(status, 200);
    let expect = format!(
        r#"{{"root":{{"entries":{{"link":{{"target":"/nix/store/{own}/bin","type":"symlink"}},"text":{{"narOffset":{text},"size":{},"type":"regular"}},"tool":{{"executable":true,"narOffset":{tool},"size":300000,"type":"regular"}}}},"type":"directory"}},"version":1}}"#,
        format!("uses /nix/store/{own}/bin\n").len(),
    );
    assert_eq!(listing, expect);
    // A client's own is not needed.
    for body in ["{}", "", listing.as_str()] {
        assert_eq!(server.put(&format!("{}.ls", object.hash()), body.to_owned()).await.0, 201, "{body}");
        assert_eq!(server.get(&format!("{}.ls", object.hash())).await.1, listing);
    }
}

#[tokio::test]
async fn logs() {
    let server = Server::start().await;
    let drv = format!("log/{}.drv", store_path("logged"));
    assert_eq!(server.put(&drv, "built\n").await.0, 201);
    assert_eq!(server.get(&drv).await.1, "built\n");
    assert_eq!(server.put(&format!("log/{}", store_path("no-derivation")), "").await.0, 404);
    assert_eq!(server.put("log/nonsense", "").await.0, 404);
}

#[tokio::test]
async fn realisations_under_both_urls() {
    let server = Server::start().await;
    let hex = "ab".repeat(32);
    let out = store_path("out");
    let by_hash =
        format!(r#"{{"dependentRealisations":{{}},"id":"sha256:{hex}!out","outPath":"{out}","signatures":[]}}"#);
    let by_path = format!(r#"{{"outPath":"{out}","signatures":[]}}"#);
    // Nix 2.26 sends the exclamation mark as it is, later ones encode it.
    for (put, get, body) in [
        (format!("realisations/sha256:{hex}!out.doi"), format!("realisations/sha256:{hex}%21out.doi"), &by_hash),
        (format!("realisations/sha256%3A{hex}%21out.doi"), format!("realisations/sha256:{hex}!out.doi"), &by_hash),
        (
            format!("build-trace-v2/{}.drv/out.doi", store_path("d")),
            format!("default/build-trace-v2/{}.drv/out.doi", store_path("d")),
            &by_path,
        ),
    ] {
        assert_eq!(server.put(&put, body.clone()).await.0, 201, "{put}");
        let (status, found) = server.get(&get).await;
        assert_eq!(status, 200, "{get}");
        // As it came, and signed.
        let key: RealisationKey = put.replace("%3A", ":").replace("%21", "!").parse().unwrap();
        let realisation = Realisation::parse(&key, found.as_bytes()).unwrap();
        assert!(realisation.is_signed_by(&key, server.app.public_keys()));
        let unsigned = Realisation { signatures: Vec::new(), ..realisation };
        assert_eq!(unsigned, Realisation::parse(&key, body.as_bytes()).unwrap());
        // Pushed again, it stays.
        assert_eq!(server.put(&put, found.clone()).await.0, 201, "{put}");
        assert_eq!(server.get(&get).await.1, found, "{get}");
    }
    for (path, body) in [
        (format!("realisations/sha256:{hex}!dev.doi"), by_hash.as_str()),
        (format!("realisations/sha256:{hex}!out.doi"), "{}"),
        (format!("realisations/sha256:{hex}!out.doi"), "not json"),
    ] {
        assert_eq!(server.put(&path, body.to_owned()).await.0, 400, "{path} {body}");
    }
    assert_eq!(server.put("realisations/nonsense", "{}").await.0, 404);
}

/// A page for people, and the health of the server for machines.
#[tokio::test]
async fn pages() {
    let server = Server::start().await;
    assert_eq!(server.get("public-key").await.1, format!("{}\n", server.app.public_keys()[0]));
    assert_eq!(server.get("health").await.1, "ok\n");
    assert_eq!(server.call(Method::DELETE, "health", "").await.0, 405);
}
