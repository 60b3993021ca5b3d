//! What real Nix wrote, read and written again: every file of `testdata/nix`, one folder for each version of Nix.
//!
//! `ops/golden` makes the files. The folder of a version holds `nar/` (`nix-store --dump`), `cache/` (a binary cache by
//! `nix copy`, signed with `secret-key`), and `worker/` (what a client and a daemon said to each other).

use std::fs;
use std::path::{Path, PathBuf};

use narlake_format::nar::{Event, NarError, Reader, Writer};
use narlake_format::nix::cache_info::CacheInfo;
use narlake_format::nix::content_address::ContentAddress;
use narlake_format::nix::hash::Sha256Hash;
use narlake_format::nix::hash_modulo::HashModulo;
use narlake_format::nix::listing::{Listing, ListingWriter, Node};
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::realisation::{Realisation, RealisationKey};
use narlake_format::nix::signature::{PublicKey, SecretKey};
use narlake_format::nix::store_path::StoreDir;
use narlake_format::nix::worker::handshake::{MAGIC_CLIENT, MAGIC_SERVER};
use narlake_format::nix::worker::{
    Decoded, Features, Handshake, Operation, PathInfo, Reply, Request, Session, Trust, Version,
};

/// The folders of the Nix versions.
fn versions() -> Vec<PathBuf> {
    let versions = children(&Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/nix"));
    assert!(!versions.is_empty());
    versions
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// The files of a folder with this extension, each with its content; there must be some.
fn files(dir: &Path, extension: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let files: Vec<_> = children(dir)
        .into_iter()
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .map(|path| (path.clone(), fs::read(&path).unwrap()))
        .collect();
    assert!(!files.is_empty(), "{}", dir.display());
    files
}

/// The narinfos of a version's cache, each with its text and its NAR.
fn narinfos(version: &Path) -> Vec<(NarInfo, String, Vec<u8>)> {
    let cache = version.join("cache");
    let read = |(path, text): (PathBuf, Vec<u8>)| {
        let info = NarInfo::parse(&StoreDir::default(), &text).unwrap();
        assert_eq!(path.file_stem().unwrap().to_str().unwrap(), info.store_path.hash.to_string());
        let nar = fs::read(cache.join(&info.url)).unwrap();
        (info, String::from_utf8(text).unwrap(), nar)
    };
    files(&cache, "narinfo").into_iter().map(read).collect()
}

#[test]
fn nars() {
    for version in versions() {
        for folder in ["nar", "cache/nar"] {
            for (path, nar) in files(&version.join(folder), "nar") {
                for size in [1, 7, 4096, nar.len()] {
                    let (mut reader, mut writer, mut copy) = (Reader::new(), Writer::new(), Vec::new());
                    for piece in nar.chunks(size) {
                        let write = &mut |event: Event<'_>| writer.event(event, &mut copy);
                        reader.feed(piece, write).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                    }
                    reader.finish().unwrap();
                    writer.finish().unwrap();
                    assert!(copy == nar, "{} in pieces of {size}", path.display());
                }
            }
        }
    }
}

#[test]
fn the_tree_of_a_nar() {
    for version in versions() {
        let nar = fs::read(version.join("nar/tree.nar")).unwrap();
        let (mut names, mut executable, mut depth) = (Vec::new(), 0, 0);
        let mut reader = Reader::new();
        let result: Result<(), NarError> = reader.feed(&nar, &mut |event| {
            match event {
                Event::Directory => depth += 1,
                Event::EndDirectory => depth -= 1,
                Event::Entry { name } if depth == 1 => names.push(String::from_utf8(name.into()).unwrap()),
                Event::File { executable: true, .. } => executable += 1,
                _ => {}
            }
            Ok(())
        });
        assert_eq!((result, reader.finish()), (Ok(()), Ok(())));
        let expected = [
            "7-bytes",
            "8-bytes",
            "9-bytes",
            "Upper",
            "a-b",
            "a.b",
            "aXb",
            "empty-directory",
            "empty-file",
            "empty-script",
            "link",
            "run",
            "sub",
            "\u{e4} \"quoted\"\t",
        ];
        assert_eq!(names, expected);
        assert_eq!(executable, 2);
    }
}

#[test]
fn narinfos_are_written_as_nix_does() {
    let dir = StoreDir::default();
    for version in versions() {
        let mut referring = 0;
        for (info, text, nar) in narinfos(&version) {
            assert_eq!(info.to_text(&dir), text);
            assert_eq!(info.nar_hash, Sha256Hash::of(&nar));
            assert_eq!(info.nar_size, nar.len() as u64);
            assert_eq!(info.file_hash, Some(info.nar_hash));
            referring += usize::from(info.references.len() > 1);
        }
        assert!(referring > 0);
        let info = CacheInfo::parse(&fs::read(version.join("cache/nix-cache-info")).unwrap()).unwrap();
        assert_eq!(info.store_dir, dir);
    }
}

#[test]
fn signatures_are_those_of_nix() {
    let dir = StoreDir::default();
    for version in versions() {
        let secret: SecretKey = fs::read_to_string(version.join("secret-key")).unwrap().parse().unwrap();
        let public: PublicKey = fs::read_to_string(version.join("public-key")).unwrap().parse().unwrap();
        assert_eq!(secret.public(), public);
        for (info, _, _) in narinfos(&version) {
            assert!(info.is_signed_by(&dir, std::slice::from_ref(&public)));
            let mut again = NarInfo { signatures: vec![], ..info.clone() };
            again.sign(&dir, &secret);
            assert_eq!(again, info);
        }
    }
}

#[test]
fn store_paths_follow_from_content() {
    let dir = StoreDir::default();
    for version in versions() {
        // Text, flat and NAR; SHA-256, SHA-1 and SHA-512; references to others and to itself.
        let (mut kinds, mut itself) = ([0; 4], 0);
        for (info, _, nar) in narinfos(&version) {
            let Some(ca) = &info.ca else { continue };
            assert!(info.content_address_holds(&dir), "{}", info.store_path);
            if let ContentAddress::NixArchive(hash) = ca {
                let mut modulo = HashModulo::new(&info.store_path.hash.to_ascii());
                modulo.update(&nar);
                assert!(modulo.is(hash), "{}", info.store_path);
            }
            let renamed = NarInfo {
                store_path: format!("{}-other", info.store_path.hash).parse().unwrap(),
                references: vec![],
                ..info.clone()
            };
            assert!(!renamed.content_address_holds(&dir));
            kinds[match ca {
                ContentAddress::Text(_) => 0,
                ContentAddress::Flat(_) => 1,
                ContentAddress::NixArchive(_) => 2,
                ContentAddress::Other(_) => 3,
            }] += 1;
            itself += usize::from(info.references.contains(&info.store_path));
        }
        assert!(kinds.iter().all(|count| *count > 0), "{kinds:?}");
        assert!(itself > 0);
    }
}

#[test]
fn listings_are_written_as_nix_does() {
    for version in versions() {
        for (info, _, nar) in narinfos(&version) {
            let path = version.join(format!("cache/{}.ls", info.store_path.hash));
            let expected = String::from_utf8(fs::read(&path).unwrap()).unwrap();
            let (mut reader, mut writer, mut text) = (Reader::new(), ListingWriter::new(), Vec::new());
            let write = &mut |event: Event<'_>| {
                writer.event(event, &mut text).unwrap();
                Ok::<(), NarError>(())
            };
            reader.feed(&nar, write).unwrap();
            writer.finish().unwrap();
            assert_eq!(String::from_utf8(text).unwrap(), expected);

            let listing = Listing::parse(expected.as_bytes()).unwrap();
            if let Some(Node::Regular { size, executable, nar_offset }) = listing.root.get("run") {
                let start = usize::try_from(nar_offset.unwrap()).unwrap();
                assert_eq!(&nar[start..][..usize::try_from(*size).unwrap()], b"#!/bin/sh\necho run\n");
                assert!(executable);
            }
        }
    }
}

#[test]
fn realisations() {
    for version in versions() {
        let mut found = 0;
        for path in children(&version.join("cache/realisations")) {
            let url = format!("realisations/{}", path.file_name().unwrap().to_str().unwrap());
            let key: RealisationKey = url.parse().unwrap();
            assert_eq!(key.to_string(), url);
            let document = fs::read(&path).unwrap();
            let realisation = Realisation::parse(&key, &document).unwrap();
            assert_eq!(realisation.to_document(&key).as_bytes(), document);
            // Nix signs the document as it writes it, without the signatures.
            let unsigned = String::from_utf8(document).unwrap().replace(",\"signatures\":[]", "");
            assert_eq!(realisation.fingerprint(&key), unsigned);
            let narinfo = version.join(format!("cache/{}.narinfo", realisation.out_path.hash));
            assert!(narinfo.exists());
            found += 1;
        }
        assert!(found >= 3);
    }
}

/// Takes a number off the front.
fn take(bytes: &mut &[u8]) -> u64 {
    let (word, rest) = bytes.split_first_chunk().unwrap();
    *bytes = rest;
    u64::from_le_bytes(*word)
}

/// Takes a string off the front.
fn take_string<'a>(bytes: &mut &'a [u8]) -> &'a [u8] {
    let length = usize::try_from(take(bytes)).unwrap();
    let (text, rest) = bytes.split_at(length.next_multiple_of(8));
    *bytes = rest;
    &text[..length]
}

/// Drops the log messages before a reply, which our own server never sends.
fn drop_log(bytes: &mut &[u8]) {
    const START_ACTIVITY: u64 = 0x5354_5254;
    const STOP_ACTIVITY: u64 = 0x5354_4f50;
    loop {
        let before = *bytes;
        match take(bytes) {
            START_ACTIVITY => {
                for _ in 0..3 {
                    take(bytes);
                }
                take_string(bytes);
                assert_eq!((take(bytes), take(bytes)), (0, 0), "fields and parent");
            }
            STOP_ACTIVITY => drop(take(bytes)),
            _ => {
                *bytes = before;
                return;
            }
        }
    }
}

#[test]
fn a_conversation_with_a_daemon() {
    let dir = StoreDir::default();
    for version in versions() {
        let read = |name| fs::read(version.join("worker").join(name)).unwrap();
        let (client, server) = (read("client"), read("server"));
        let (mut client, mut server) = (&client[..], &server[..]);

        // Our side of the handshake takes this client's.
        assert_eq!(take(&mut { client }), MAGIC_CLIENT);
        let (mut handshake, mut out) = (Handshake::new("narlake", Trust::Trusted), Vec::new());
        let spoken = loop {
            match handshake.step(client, &mut out).unwrap() {
                Decoded::Complete { value, length } => {
                    client = &client[length..];
                    if let Some(version) = value {
                        break version;
                    }
                }
                Decoded::Incomplete { .. } => panic!("{}", version.display()),
            }
        };
        assert_eq!(spoken, Session { version: Version::MAX, features: Features::default() });
        // The daemon's side has ours but for names: magic, version, features, name, trust, end.
        assert_eq!(take(&mut server), MAGIC_SERVER);
        assert_eq!(take(&mut server), Version::MAX.0);
        for _ in 0..take(&mut server) {
            take_string(&mut server);
        }
        assert_eq!(take_string(&mut server), version.file_name().unwrap().as_encoded_bytes());
        assert_eq!(take(&mut server), Trust::Trusted as u64);
        assert_eq!(take(&mut server), 0x616c_7473);

        let infos = narinfos(&version);
        let mut asked = 0;
        while !client.is_empty() {
            let Ok(Decoded::Complete { value: Ok(request), length }) = Request::decode(&dir, spoken.features, client)
            else {
                panic!("{:?}", Request::decode(&dir, spoken.features, client));
            };
            let mut copy = Vec::new();
            request.encode(&dir, &mut copy);
            assert_eq!(copy, &client[..length]);
            client = &client[length..];

            drop_log(&mut server);
            let reply = Reply::decode(&dir, spoken.features, request.operation(), server).unwrap();
            let Decoded::Complete { value: reply, length } = reply else {
                panic!("no whole reply to {request:?}");
            };
            let mut copy = Vec::new();
            reply.encode(&dir, &mut copy);
            assert_eq!(copy, &server[..length]);
            server = &server[length..];

            if let (Request::QueryPathInfo(path), Reply::PathInfo(Some(found))) = (&request, &reply) {
                let (info, _, _) = infos.iter().find(|(info, _, _)| info.store_path == *path).unwrap();
                // What the daemon knows beyond the narinfo, or does not: it built the path, and nobody signed it there.
                let expected = PathInfo {
                    ultimate: found.ultimate,
                    signatures: found.signatures.clone(),
                    ..PathInfo::of(info, found.registration_time)
                };
                assert_eq!(found, &expected);
                asked += 1;
            }
        }
        assert!(server.is_empty());
        assert!(asked >= 4);
        assert_eq!(Operation::QueryPathInfo.name(), "QueryPathInfo");
    }
}
