//! What verifies, and what a record weighs.

use narlake_format::id::ManifestId;
use narlake_format::nix::compression::Compression;
use narlake_format::nix::hash::Sha256Hash;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::signature::SecretKey;

use super::*;

/// A narinfo with nothing in it that need not be.
pub(crate) fn info(store_path: StorePath, references: Vec<StorePath>) -> NarInfo {
    NarInfo {
        store_path,
        url: String::new(),
        compression: Compression::None,
        file_hash: None,
        file_size: None,
        nar_hash: Sha256Hash::of(b"nar"),
        nar_size: 120,
        references,
        deriver: None,
        signatures: Vec::new(),
        ca: None,
        extra: Vec::new(),
    }
}

fn path(number: usize) -> StorePath {
    let mut hash = [7; 20];
    hash[..8].copy_from_slice(&number.to_le_bytes());
    let hash = narlake_format::nix::store_path::StorePathHash::from_bytes(hash);
    StorePath { hash, name: format!("library-of-some-length-{number}").parse().unwrap() }
}

/// What bounds the memory of records is no smaller than what they take, a record of many references among them.
#[test]
fn records_weigh_what_they_hold() {
    let key = SecretKey::generate("test-1", [7; 32]).unwrap();
    let keys = TrustedKeys::new(StoreDir::default(), vec![key.public()]);
    for references in [0, 10, 10_000] {
        let info = info(path(0), (1..=references).map(path).collect());
        let mut record = PathRecord::new(info, ManifestId::of(b"manifest"), &StringTable::default());
        record.sign(keys.store_dir(), &key);
        let text = record.to_text(keys.store_dir()).len() as u64;
        let bytes = keys.verify(record).unwrap().bytes();
        assert!((text * 2 / 3..text * 3 + 2048).contains(&bytes), "{references}: {bytes} for {text} of text");
    }
}
