//! `narlake inspect` on files of real Nix and on the frozen files of our formats.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Ran, Scratch, command, narlake, testdata};
use narlake_cli::cli::{Format, InspectOptions};
use narlake_cli::inspect;

fn ask(file: &Path, arguments: &[&str]) -> Ran {
    narlake(&[&["inspect", file.to_str().unwrap()], arguments].concat())
}

fn files_below(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files_below(&path, found) } else { found.push(path) }
    }
}

#[test]
fn every_file_of_nix() {
    let mut files = Vec::new();
    files_below(&testdata("nix"), &mut files);
    let mut formats = std::collections::BTreeSet::new();
    for file in files {
        let name = file.file_name().unwrap().to_str().unwrap();
        let expected = match name {
            "nix-cache-info" => "nix-cache-info",
            "secret-key" => "secret key",
            "public-key" => "public key",
            _ => match file.extension().and_then(|extension| extension.to_str()) {
                Some("nar") => "NAR",
                Some("narinfo") => "narinfo",
                Some("ls") => "listing",
                Some("doi") => "realisation",
                // Recorded conversations, for the tests of their own.
                _ => continue,
            },
        };
        let json = ask(&file, &["--json"]).good().json();
        assert_eq!(json["format"], expected, "{}", file.display());
        formats.insert(expected);
    }
    assert_eq!(formats.len(), 7, "{formats:?}");
}

#[test]
fn a_nar_and_its_listing_say_the_same() {
    let folder = testdata("nix/2.34.8/cache");
    let mut compared = 0;
    for file in fs::read_dir(&folder).unwrap() {
        let file = file.unwrap().path();
        if file.extension().is_none_or(|extension| extension != "ls") {
            continue;
        }
        let narinfo = ask(&file.with_extension("narinfo"), &["--json"]).good().json();
        let nar = ask(&folder.join(narinfo["url"].as_str().unwrap()), &["--json", "--entries"]).good().json();
        let listing = ask(&file, &["--json", "--entries"]).good().json();
        assert_eq!(nar["entries"], listing["entries"]);
        assert_eq!((&nar["nar_hash"], &nar["nar_size"]), (&narinfo["nar_hash"], &narinfo["nar_size"]));
        compared += 1;
    }
    assert!(compared > 0);
}

#[test]
fn our_formats() {
    for (file, format, key) in [
        ("pack-v1.bin", "pack", "frames"),
        ("segment-v1.bin", "index segment", "packs"),
        ("manifest-header-v1.bin", "manifest header", "parts"),
        ("manifest-part-v1.bin", "manifest part", "whole_tree"),
        ("strings-v1.bin", "string table", "strings"),
        ("record-v1.narinfo", "path record", "manifest"),
    ] {
        let file = testdata("lake").join(file);
        let json = ask(&file, &["--json"]).good().json();
        assert_eq!(json["format"], format);
        assert!(json.get(key).is_some(), "{json}");
        let text = ask(&file, &["--entries"]);
        if format == "pack" || format == "index segment" || format == "manifest part" {
            assert!(text.good().stdout.contains(format));
        }
    }
}

#[test]
fn a_pack_can_be_taken_apart() {
    let pack = testdata("lake/pack-v1.bin");
    let json = ask(&pack, &["--json", "--entries", "--verify"]).good().json();
    assert_eq!(json["verified"], "every blob");
    for blob in json["blobs"].as_array().unwrap() {
        let (id, length) = (blob["id"].as_str().unwrap(), blob["length"].as_u64().unwrap());
        assert_eq!(ask(&pack, &["--blob", id]).good().bytes.len() as u64, length);
    }
    ask(&pack, &["--blob", "nothing"]).bad(1, &["no blob of it"]);
    ask(&pack, &["--blob", ""]).bad(1, &["several of its blobs"]);
    ask(&testdata("lake/strings-v1.bin"), &["--verify"]).bad(2, &["are for packs"]);
}

#[test]
fn documents_of_a_lake() {
    use narlake_format::lake::config::{CacheDocument, Document as _, LakeDocument, Visibility};
    let scratch = Scratch::new();
    let lake = LakeDocument::new("/nix/store".parse().unwrap(), 1_700_000_000).encode();
    let cache = CacheDocument::new("default".parse().unwrap(), Visibility::Public).encode();
    for (bytes, format) in [(lake, "lake document"), (cache, "cache document")] {
        let file = scratch.file("document", &bytes);
        assert_eq!(ask(&file, &["--json"]).good().json()["format"], format);
        let text = String::from_utf8(bytes).unwrap();
        fs::write(&file, text.replacen('1', "2", 1)).unwrap();
        ask(&file, &[]).bad(1, &["is not a valid document of a lake", "read document"]);
        fs::write(&file, &text[..text.len() / 2]).unwrap();
        ask(&file, &[]).bad(1, &["EOF while parsing", "line"]);
    }
}

#[test]
fn damage_is_told_by_place_and_field() {
    let scratch = Scratch::new();
    let check = |golden: &str, change: &dyn Fn(&mut Vec<u8>), said: &[&str]| {
        let mut bytes = fs::read(testdata(golden)).unwrap();
        change(&mut bytes);
        ask(&scratch.file("damaged", bytes), &[]).bad(1, said);
    };
    let cut = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() - 1);
    check("nix/2.34.8/nar/tree.nar", &cut, &["is not a valid NAR", "truncated at offset"]);
    check("nix/2.34.8/nar/tree.nar", &|bytes| bytes[24] = 2, &["NAR has no \"(\" at offset 24"]);
    check("nix/2.34.8/nar/tree.nar", &|bytes| bytes.push(0), &["bytes follow the end"]);
    check("lake/pack-v1.bin", &cut, &["is not a valid pack", "trailer", "at offset"]);
    check("lake/segment-v1.bin", &cut, &["is not a valid index segment", "at offset"]);
    check("lake/manifest-header-v1.bin", &cut, &["is not a valid manifest header", "at offset"]);
    check("lake/record-v1.narinfo", &cut, &["is not a valid narinfo", "ends inside line"]);
    let append = |bytes: &mut Vec<u8>| bytes.extend_from_slice(b"X-Narlake-Other: x\n");
    check("lake/record-v1.narinfo", &append, &["lacks X-Narlake-Checksum"]);
    let forge = |bytes: &mut Vec<u8>| {
        let digit = bytes.len() - 2;
        bytes[digit] = if bytes[digit] == b'0' { b'1' } else { b'0' };
    };
    check("lake/record-v1.narinfo", &forge, &["X-Narlake-Checksum", "at offset"]);
}

#[test]
fn standard_input_and_files_of_no_format() {
    let mut piped = command();
    piped.args(["inspect", "-"]).stdin(fs::File::open(testdata("nix/2.34.8/nar/tree.nar")).unwrap());
    assert!(common::run(piped).good().stdout.starts_with("format:       NAR\n"));
    let scratch = Scratch::new();
    ask(&scratch.file("file", "hello\n"), &[]).bad(1, &["is of no format", "--format"]);
    ask(&scratch.file("file", ""), &[]).bad(1, &["is of no format"]);
    ask(&scratch.file("file", "hello\n"), &["--format", "pack"]).bad(1, &["is not a valid pack"]);
    ask(&scratch.file("file", "hello\n"), &["--format", "nar"]).bad(1, &["is not a valid NAR", "at offset"]);
    ask(&scratch.file("file", b"\xfd7zXZ\0..."), &[]).bad(1, &["is compressed; try: xz -dc"]);
    ask(&scratch.path("missing"), &[]).bad(1, &["open", "No such file"]);
    ask(&scratch.path(""), &[]).bad(1, &["read", "Is a directory"]);
}

/// Whatever the bytes: an answer or an error, and of secrets nothing.
#[test]
fn nothing_panics() {
    let options =
        |format| InspectOptions { file: "x".into(), format: Some(format), entries: true, verify: true, blob: None };
    let mut files = Vec::new();
    files_below(&testdata(""), &mut files);
    for file in files {
        let bytes = fs::read(&file).unwrap();
        let bytes = bytes.get(..4096).unwrap_or(&bytes);
        for format in <Format as clap::ValueEnum>::value_variants() {
            let _ = inspect::inspect(bytes, *format, &options(*format));
        }
        let Some(format) = inspect::recognise(bytes) else { continue };
        for at in (0..bytes.len()).step_by(bytes.len().div_ceil(300)) {
            let mut flipped = bytes.to_vec();
            flipped[at] ^= 0x41;
            let _ = inspect::inspect(&flipped, format, &options(format));
            let _ = inspect::recognise(&flipped);
        }
    }
    let secret = testdata("nix/2.34.8/secret-key");
    let shown = ask(&secret, &[]).good().stdout;
    let text = fs::read_to_string(secret).unwrap();
    assert!(!shown.contains(text.split(':').nth(1).unwrap().get(..20).unwrap()), "{shown}");
}
