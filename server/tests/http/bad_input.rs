//! What must be refused, clearly, with nothing published and the server going on.

use std::sync::Arc;

use bytes::Bytes;
use futures::stream;
use reqwest::{Body, Method};

use super::common::*;
use narlake_format::nix::compression::Compression;
use narlake_format::nix::hash::Sha256Hash;
use narlake_format::nix::store_path::StoreDir;

/// A NAR from words, as the format spells them.
fn words(words: &[&[u8]]) -> Vec<u8> {
    let mut nar = Vec::new();
    for word in words {
        nar.extend((word.len() as u64).to_le_bytes());
        nar.extend(*word);
        nar.resize(nar.len().next_multiple_of(8), 0);
    }
    nar
}

fn directory(entries: &[(&[u8], &[&[u8]])]) -> Vec<u8> {
    let mut all: Vec<&[u8]> = vec![b"nix-archive-1", b"(", b"type", b"directory"];
    for (name, node) in entries {
        all.extend([b"entry".as_slice(), b"(", b"name", name, b"node", b"("]);
        all.extend(*node);
        all.extend([b")".as_slice(), b")"]);
    }
    all.push(b")");
    words(&all)
}

const LINK: &[&[u8]] = &[b"type", b"symlink", b"target", b"x"];

#[tokio::test]
async fn nars_that_are_none() {
    let server = Server::start().await;
    let good = nar_of_tree(&[]);
    let mut padding = nar_of_file(b"12345");
    let at = padding.windows(5).position(|window| window == b"12345").unwrap();
    padding[at + 6] = 1;
    let mut bad: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("text", b"<html>Sign in to continue</html>".to_vec()),
        ("other magic", words(&[b"nix-archive-2", b"(", b"type", b"directory", b")"])),
        ("truncated", good[..good.len() - 1].to_vec()),
        ("cut in the middle", good[..good.len() / 2].to_vec()),
        ("more after the end", [good.as_slice(), &[0; 8]].concat()),
        ("two archives", [good.as_slice(), good.as_slice()].concat()),
        ("padding", padding),
        ("unsorted", directory(&[(b"b", LINK), (b"a", LINK)])),
        ("a name twice", directory(&[(b"a", LINK), (b"a", LINK)])),
        ("a name of 256 bytes", directory(&[(&[b'a'; 256], LINK)])),
        ("a target of 4096 bytes", directory(&[(b"a", &[b"type", b"symlink", b"target", &[b'a'; 4096]])])),
        (
            "a word of 2^63 bytes",
            [words(&[b"nix-archive-1", b"(", b"type"]), (1_u64 << 63).to_le_bytes().to_vec()].concat(),
        ),
    ];
    for name in [b"".as_slice(), b".", b"..", b"a/b", b"/", b"a\0b", b"../../etc/passwd"] {
        bad.push(("a name that escapes", directory(&[(name, LINK)])));
    }
    for (what, nar) in bad {
        let path = format!("nar/{}.nar", Sha256Hash::of(&nar).to_base32());
        let (status, text) = server.put(&path, nar.clone()).await;
        assert_eq!(status, 400, "{what}: {text}");
        assert!(text.contains("NAR") && text.contains("offset"), "{what}: {text}");
        assert_eq!(server.request(Method::HEAD, &path).send().await.unwrap().status(), 404, "{what}");
        // The same, compressed.
        let object = Object::new("bad", nar, Compression::Zstd, &[]).await;
        assert_eq!(server.put(&object.url, object.file).await.0, 400, "{what}");
    }
    // And the server goes on.
    server.push(&Object::file("after", b"fine").await).await;
}

/// The body is not the file that the URL names: accepted, it would answer another pusher's HEAD with the wrong NAR.
#[tokio::test]
async fn a_body_that_is_not_what_its_url_says() {
    let server = Server::start().await;
    for compression in [Compression::None, Compression::Xz, Compression::Gzip, Compression::Zstd] {
        let object = Object::new("right", nar_of_tree(&[]), compression, &[]).await;
        let other = Object::new("wrong", nar_of_file(b"other"), compression, &[]).await;
        let (status, text) = server.put(&object.url, other.file).await;
        assert_eq!(status, 400, "{compression}");
        assert!(text.contains(&object.info.file_hash.unwrap().to_base32()), "{text}");
        assert_eq!(server.request(Method::HEAD, &object.url).send().await.unwrap().status(), 404, "{compression}");
    }
}

#[tokio::test]
async fn compressed_files_that_are_none() {
    let server = Server::start().await;
    for compression in [Compression::Brotli, Compression::Bzip2, Compression::Xz, Compression::Zstd] {
        let whole = compress(&nar_of_tree(&[]), compression).await;
        let cut = whole[..whole.len() - 2].to_vec();
        let followed = [whole.as_slice(), b"rest"].concat();
        for (what, file) in [("plain", nar_of_tree(&[])), ("cut", cut), ("followed", followed), ("empty", Vec::new())] {
            let path = format!("nar/{}.nar{}", Sha256Hash::of(&file).to_base32(), compression.suffix());
            let (status, text) = server.put(&path, file).await;
            assert_eq!(status, 400, "{compression} {what}: {text}");
        }
    }
}

#[tokio::test]
async fn narinfos_that_lie() {
    let server = Server::start().await;
    let base = server.push(&Object::file("base", b"base").await).await;
    let object = Object::new("claimed", nar_of_tree(&[]), Compression::Xz, &[base.path()]).await;
    assert_eq!(server.put(&object.url, object.file.clone()).await.0, 201);
    let text = object.narinfo();
    let with = |from: &str, to: &str| {
        let changed = text.replace(from, to);
        assert_ne!(changed, text, "{from}");
        changed
    };
    let nar_hash = object.info.nar_hash.to_string();
    let size = format!("NarSize: {}", object.info.nar_size);
    let references = format!("References: {}", base.path());
    let lies = [
        ("another NarHash", with(&nar_hash, &Sha256Hash::of(b"").to_string()), 400, "NarHash"),
        ("another NarSize", with(&size, "NarSize: 7"), 400, "NarSize"),
        (
            "a reference that is not here",
            with(&references, &format!("References: {}", store_path("gone"))),
            400,
            "gone",
        ),
        (
            "a NAR that was never sent",
            with(&object.info.file_hash.unwrap().to_base32(), &Sha256Hash::of(b"").to_base32()),
            400,
            "upload",
        ),
        ("a URL elsewhere", with(&object.url, "https://example.org/x.nar"), 400, "URL"),
        ("a URL above", with(&object.url, "../x.nar"), 400, "URL"),
        ("another path", with(&object.hash(), &base.hash()), 400, "the URL is of"),
        ("no NarHash", with(&format!("NarHash: {nar_hash}\n"), ""), 400, "NarHash"),
        ("no newline at the end", text.trim_end().to_owned(), 400, "line"),
        ("a field twice", format!("{text}{size}\n"), 400, "repeats"),
        ("a store elsewhere", with("/nix/store", "/gnu/store"), 400, "StorePath"),
        ("a CA that is not its own", format!("{text}CA: fixed:r:{nar_hash}\n"), 400, "CA"),
        ("a signature that is none", format!("{text}Sig: nonsense\n"), 400, "Sig"),
        ("no narinfo", "hello".into(), 400, "narinfo"),
        ("nothing", String::new(), 400, "narinfo"),
    ];
    for (what, narinfo, status, expect) in lies {
        let (found, answer) = server.put(&object.narinfo_name(), narinfo).await;
        assert_eq!(found, status, "{what}: {answer}");
        assert!(answer.contains(expect), "{what}: {answer}");
        assert_eq!(server.get(&object.narinfo_name()).await.0, 404, "{what}");
    }
    assert_eq!(server.put("nonsense.narinfo", text.clone()).await.0, 404);
    assert_eq!(server.put(&object.narinfo_name(), vec![b'x'; 2 << 20]).await.0, 413);
    // Lines of our own that a client sends mean nothing.
    let forged = format!("{text}X-Narlake-Manifest: {}\n", "0".repeat(64));
    assert_eq!(server.put(&object.narinfo_name(), forged).await.0, 201);
    assert!(server.nar(&object).await == object.nar);
}

/// The file that a narinfo names is what its other lines say of it, in every form that Nix sends one.
#[tokio::test]
async fn narinfos_that_contradict_their_file() {
    let server = Server::start().await;
    let xz = Object::new("xz", nar_of_tree(&[]), Compression::Xz, &[]).await;
    let gzip = Object::new("gzip", nar_of_file(b"gzip"), Compression::Gzip, &[]).await;
    let plain = Object::new("plain", nar_of_file(b"plain"), Compression::None, &[]).await;
    let other = Sha256Hash::of(b"other").to_string();
    let hash = |object: &Object| object.info.file_hash.unwrap().to_string();
    let plain_size = plain.nar.len().to_string();
    for (object, field, lie, also) in [
        (&xz, "FileHash", other.clone(), hash(&xz)),
        (&xz, "FileHash", xz.info.nar_hash.to_string(), hash(&xz)),
        (&xz, "Compression", "zstd".into(), "xz".into()),
        (&xz, "Compression", "none".into(), "xz".into()),
        (&gzip, "FileHash", other.clone(), hash(&gzip)),
        (&gzip, "Compression", "none".into(), gzip.info.nar_hash.to_string()),
        (&gzip, "Compression", "bzip2".into(), "none".into()),
        (&plain, "FileHash", other, hash(&plain)),
        (&plain, "Compression", "gzip".into(), hash(&plain)),
        (&plain, "Compression", "xz".into(), "none".into()),
        (&plain, "FileSize", "7".into(), plain_size),
    ] {
        assert_eq!(server.put(&object.url, object.file.clone()).await.0, 201);
        let narinfo = object.narinfo();
        let lines = narinfo.lines().map(|line| match line.split_once(": ") {
            Some((name, _)) if name == field => format!("{field}: {lie}\n"),
            _ => format!("{line}\n"),
        });
        let (status, text) = server.put(&object.narinfo_name(), lines.collect::<String>()).await;
        assert_eq!(status, 400, "{field}: {lie}: {text}");
        assert!(text.contains(field) && text.contains(&lie) && text.contains(&also), "{field}: {lie}: {text}");
        assert_eq!(server.get(&object.narinfo_name()).await.0, 404, "{field}: {lie}");
    }
    // Neither line need be there.
    for mut object in [xz, gzip, plain] {
        (object.info.file_hash, object.info.file_size) = (None, None);
        let narinfo = object.narinfo();
        assert_eq!(server.put(&object.narinfo_name(), narinfo).await.0, 201);
        // A client that adds a signature sends back what it was served.
        let info = server.narinfo(&object).await;
        assert_eq!(server.put(&object.narinfo_name(), info.to_text(&StoreDir::default())).await.0, 200);
    }
}

#[tokio::test]
async fn a_nar_that_never_ends() {
    let server = Server::with(|config| config.limits.nar_bytes_max = 1 << 20).await;
    let head = &nar_of_file(&[0; 4096])[..4096];
    // A file that says it is as large as may be.
    let endless = stream::iter([Ok::<_, std::io::Error>(Bytes::copy_from_slice(head))])
        .chain_forever(Bytes::from_static(&[0; 65536]));
    let path = format!("nar/{}.nar", Sha256Hash::of(b"endless").to_base32());
    let response = server.request(Method::PUT, &path).body(Body::wrap_stream(endless)).send().await.unwrap();
    let status = response.status();
    assert!(status == 413 || status == 400, "{status}");

    // One that says so beforehand is not read at all.
    let object = Object::file("large", &sample(2 << 20)).await;
    let (status, text) = server.put(&object.url, object.file).await;
    assert_eq!((status.as_u16(), text.as_str()), (413, "the body may have at most 1048576 bytes\n"));
}

trait ChainForever: futures::Stream<Item = std::io::Result<Bytes>> + Sized {
    /// This stream, then the same bytes again and again.
    fn chain_forever(self, bytes: Bytes) -> impl futures::Stream<Item = std::io::Result<Bytes>> {
        futures::StreamExt::chain(self, stream::repeat_with(move || Ok(bytes.clone())))
    }
}
impl<S: futures::Stream<Item = std::io::Result<Bytes>>> ChainForever for S {}

#[tokio::test]
async fn bombs() {
    let server = Server::with(|config| config.limits.nar_bytes_max = 256 << 20).await;
    let nar = nar_of_file(&vec![0; 100 << 20]);
    for compression in [Compression::Zstd, Compression::Xz, Compression::Brotli] {
        let object = Object::new("bomb", nar.clone(), compression, &[]).await;
        assert!(object.file.len() < 1 << 16, "{compression}: {}", object.file.len());
        let (status, text) = server.put(&object.url, object.file.clone()).await;
        assert_eq!(status, 413, "{compression}: {text}");
        assert!(text.contains("expands"), "{text}");
        assert_eq!(server.request(Method::HEAD, &object.url).send().await.unwrap().status(), 404);
    }
    // As a content coding, where even a narinfo can be one.
    let bomb = compress(&vec![b'x'; 8 << 20], Compression::Zstd).await;
    let request = server.request(Method::PUT, &Object::file("i", b"").await.narinfo_name());
    assert_eq!(request.header("content-encoding", "zstd").body(bomb).send().await.unwrap().status(), 413);
}

/// A pack that lost or changed bytes under a running lake: an error, never wrong bytes and never a short 200.
#[tokio::test]
async fn a_damaged_bucket() {
    for damage in ["missing", "truncated", "flipped"] {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let server = Server::in_dir(&dir).await;
        let object = server.push(&Object::new("damaged", nar_of_tree(&[]), Compression::None, &[]).await).await;
        let url = server.narinfo(&object).await.url;
        server.app.stop().await.unwrap();

        for pack in walk(&dir.path().join("bucket/packs")) {
            let mut bytes = std::fs::read(&pack).unwrap();
            match damage {
                "missing" => {
                    std::fs::remove_file(&pack).unwrap();
                    continue;
                }
                "truncated" => bytes.truncate(bytes.len() / 2),
                _ => bytes.iter_mut().skip(100).step_by(1000).for_each(|byte| *byte ^= 1),
            }
            std::fs::write(&pack, bytes).unwrap();
        }
        let server = Server::in_dir(&dir).await;
        let response = server.request(Method::GET, &url).send().await.unwrap();
        let status = response.status();
        let body = response.bytes().await;
        assert!(status.is_server_error() || body.is_err(), "{damage}: {status}");
        if let Ok(text) = body {
            let text = String::from_utf8_lossy(&text).into_owned();
            assert!(text.contains("request") && !text.contains("bucket"), "{damage}: {text}");
        }
        assert_eq!(server.get("health").await.0, 200);
        // A client that asks what is there is told to push it, and that heals.
        assert_eq!(server.get(&object.narinfo_name()).await.0, 404, "{damage}");
        let object = server.push(&Object::new("damaged", nar_of_tree(&[]), Compression::None, &[]).await).await;
        assert_eq!(server.get(&object.narinfo_name()).await.0, 200, "{damage}");
        assert_eq!(server.nar(&object).await, nar_of_tree(&[]), "{damage}");
        server.app.stop().await.unwrap();
    }
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() { files.extend(walk(&entry.path())) } else { files.push(entry.path()) }
    }
    files
}
