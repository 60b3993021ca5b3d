//! Documents against their text.

use super::*;
use crate::id::{PackId, Ulid};
use crate::nix::signature::SecretKey;

const HASH32: &str = "0123456789abcdfghijklmnpqrsvwxyz";

/// The document whose JSON without its checksum is this.
fn sealed(text: &str) -> Vec<u8> {
    seal(text.trim_end().as_bytes())
}

/// Checks a document against its text without the checksum, both ways, and that nothing else is taken for one.
#[track_caller]
fn check<D: Document + PartialEq + fmt::Debug>(document: &D, text: &str, version: &str) {
    let bytes = sealed(text);
    assert_eq!(document.encode(), bytes);
    assert_eq!(&D::decode(&bytes).expect("a document"), document);
    let newer = text.replacen(&format!("\"{version}\": 1"), &format!("\"{version}\": 2"), 1);
    assert!(matches!(D::decode(&sealed(&newer)), Err(DocumentError::Value(FormatError::Version { .. }))), "{newer}");
    let more = text.replacen('{', "{\"unknown\": 1,", 1);
    assert!(matches!(D::decode(&sealed(&more)), Err(DocumentError::Json(_))), "{more}");
    for end in 0..bytes.len() {
        assert!(D::decode(&bytes[..end]).is_err(), "cut at {end}");
    }
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(D::decode(&flipped).is_err(), "bit {bit} flipped");
    }
    let long = [&bytes[..], &b" ".repeat(DOCUMENT_MAX)].concat();
    assert!(matches!(D::decode(&long), Err(DocumentError::TooLong { .. })));
}

#[test]
fn lakes() {
    let text = "{\n  \"format\": 1,\n  \"chunker\": 1,\n  \"scrub\": 1,\n  \"store_dir\": \"/nix/store\",\n  \"created\": 5\n}\n";
    check(&LakeDocument::new(StoreDir::default(), 5), text, "format");
    for wrong in ["\"chunker\": 1", "\"scrub\": 1"] {
        let wrong = text.replace(wrong, &wrong.replace('1', "2"));
        assert!(LakeDocument::decode(&sealed(&wrong)).is_err(), "{wrong}");
    }
    assert!(LakeDocument::decode(&sealed(&text.replace("/nix/store", "nix/store"))).is_err());
}

#[test]
fn caches() {
    let mut cache = CacheDocument::new("main".parse().expect("a name"), Visibility::Public);
    let key = SecretKey::generate("main-1", [7; 32]).expect("a key").public();
    cache.public_keys.push(key.clone());
    let text = format!(
        "{{\n  \"version\": 1,\n  \"name\": \"main\",\n  \"visibility\": \"public\",\n  \"shares_public_packs\": false,\n  \
         \"public_keys\": [\n    \"{key}\"\n  ],\n  \"priority\": 30,\n  \"on_conflict\": \"keep\"\n}}\n"
    );
    check(&cache, &text, "version");
    let id = CacheId(Ulid::from_bytes([1; 16]));
    assert_eq!(cache.domain(id), Domain::Public);
    cache.visibility = Visibility::Private;
    assert_eq!(cache.domain(id), Domain::Cache(id));
    cache.shares_public_packs = true;
    assert_eq!(cache.domain(id), Domain::Public);
}

#[test]
fn names_of_caches() {
    for name in ["main", "a", "0-9", "-", &"x".repeat(64)] {
        assert_eq!(name.parse::<CacheName>().map(|parsed| parsed.to_string()), Ok(name.to_owned()));
    }
    for name in ["", "Main", "a_b", "a/b", "a.b", "caf\u{e9}", &"x".repeat(65), "api", "nar", "metrics"] {
        assert!(name.parse::<CacheName>().is_err(), "{name}");
    }
}

#[test]
fn uploads() {
    let pack = PackRef { domain: Domain::Public, id: PackId(Ulid::from_bytes([2; 16])) };
    let (hash, manifest, table) = (Sha256Hash::of(b""), ManifestId::of(b""), TableId::of(b""));
    let text = format!(
        "{{\n  \"version\": 1,\n  \"nar_hash\": \"{hash}\",\n  \"nar_size\": 96,\n  \"manifest\": \"{manifest}\",\n  \
         \"table\": \"{table}\",\n  \"packs\": [\n    \"{pack}\"\n  ]\n}}\n"
    );
    check(&UploadDocument::new(hash, 96, manifest, table, vec![pack], None), &text, "version");
    // A short table is in the document, and is the one that its id says.
    let empty = StringTable::default();
    let inline = UploadDocument::new(hash, 96, manifest, empty.id(), vec![pack], Some(empty.clone()));
    let text = text.replace(&table.to_string(), &empty.id().to_string());
    let text = text.replace("]\n}", "],\n  \"inline_table\": \"AQA=\"\n}");
    check(&inline, &text, "version");
    let other = text.replace(&empty.id().to_string(), &table.to_string());
    assert!(matches!(UploadDocument::decode(&sealed(&other)), Err(DocumentError::Value(FormatError::Checksum { .. }))));
    assert!(matches!(UploadDocument::decode(&sealed(&text.replace("AQA=", "AQ=="))), Err(DocumentError::Json(_))));
}

#[test]
fn files() {
    let (path, hash) = (HASH32.parse().expect("a hash part"), Sha256Hash::of(b""));
    let text = format!(
        "{{\n  \"version\": 1,\n  \"path\": \"{HASH32}\",\n  \"nar_hash\": \"{hash}\",\n  \"compression\": \"xz\"\n}}\n"
    );
    check(&FileDocument::new(path, hash, Compression::Xz), &text, "version");
}
