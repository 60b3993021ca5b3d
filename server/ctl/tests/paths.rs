//! Names and paths of what is pushed by content: those that Nix gives.

mod common;

use std::fs;

use common::testdata;
use narlake_cli::dump::Digest;
use narlake_cli::push::{name_of, source_info};
use narlake_format::nix::content_address::ContentAddress;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::store_path::StoreDir;

/// The narinfos of paths that real Nix added by `nix-store --add`: NarHash and name lead to the same path and CA.
#[test]
fn paths_are_those_of_nix() {
    let dir = StoreDir::default();
    let mut names = Vec::new();
    for version in fs::read_dir(testdata("nix")).unwrap() {
        for file in fs::read_dir(version.unwrap().path().join("cache")).unwrap() {
            let file = file.unwrap().path();
            if file.extension().is_none_or(|extension| extension != "narinfo") {
                continue;
            }
            let info = NarInfo::parse(&dir, &fs::read(&file).unwrap()).unwrap();
            if !matches!(info.ca, Some(ContentAddress::NixArchive(_))) || !info.references.is_empty() {
                continue;
            }
            let digest = Digest { nar_hash: info.nar_hash, nar_size: info.nar_size };
            let ours = source_info(&dir, &info.store_path.name, &digest);
            assert_eq!((ours.store_path, ours.ca), (info.store_path.clone(), info.ca.clone()), "{}", file.display());
            names.push(info.store_path.name.to_string());
        }
    }
    for name in ["tree", "root-file", "root-symlink", "empty-directory"] {
        assert!(names.iter().any(|found| found == name), "no golden path named {name}");
    }
}

#[test]
fn names() {
    let check = |file: &[u8], expected: Option<&str>| {
        assert_eq!(name_of(file).as_ref().map(|name| name.as_str()), expected, "{}", file.escape_ascii());
    };
    check(b"hello-2.12", Some("hello-2.12"));
    check(b".hidden", Some(".hidden"));
    check(b"with space", Some("with-space"));
    check(b"a~b@c", Some("a-b-c"));
    check(b"\xff\xfe", None);
    check(b"~x~", Some("x"));
    check(b"..-x", Some("x"));
    check(b".", None);
    check(b"", None);
    check(&[b'a'; 300], Some(&"a".repeat(211)));
}
