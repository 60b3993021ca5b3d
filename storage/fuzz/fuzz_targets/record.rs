//! What reads as a path record, a key or a document of the bucket has one spelling.
#![no_main]

use libfuzzer_sys::fuzz_target;
use narlake_format::lake::config::{CacheDocument, Document, FileDocument, LakeDocument, UploadDocument};
use narlake_format::lake::keys::Key;
use narlake_format::lake::record::PathRecord;
use narlake_format::nix::store_path::StoreDir;

fn document<D: Document + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(document) = D::decode(bytes) {
        assert_eq!(D::decode(&document.encode()).expect("a document"), document);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let dir = StoreDir::default();
    if let Ok(record) = PathRecord::parse(&dir, bytes) {
        assert_eq!(record.to_text(&dir).as_bytes(), bytes);
    }
    if let Some((text, key)) = std::str::from_utf8(bytes).ok().and_then(|text| Some((text, text.parse::<Key>().ok()?)))
    {
        assert_eq!(key.to_string(), text);
    }
    document::<LakeDocument>(bytes);
    document::<CacheDocument>(bytes);
    document::<UploadDocument>(bytes);
    document::<FileDocument>(bytes);
});
