//! Arbitrary values of Nix's types, for property tests.

use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;

use super::compression::Compression;
use super::content_address::ContentAddress;
use super::hash::Sha256Hash;
use super::narinfo::NarInfo;
use super::signature::{SecretKey, Signature};
use super::store_path::{StorePath, StorePathHash, StorePathName};
use crate::limits::NAR_SIZE_MAX;

pub(crate) fn sha256() -> impl Strategy<Value = Sha256Hash> {
    any::<[u8; 32]>().prop_map(Sha256Hash::from_bytes)
}

pub(crate) fn name() -> impl Strategy<Value = StorePathName> {
    "[A-Za-z0-9+_?=][A-Za-z0-9+._?=-]{0,30}".prop_map(|name| name.parse().unwrap())
}

pub(crate) fn store_path() -> impl Strategy<Value = StorePath> {
    (any::<[u8; 20]>(), name()).prop_map(|(hash, name)| StorePath { hash: StorePathHash::from_bytes(hash), name })
}

pub(crate) fn store_paths() -> impl Strategy<Value = Vec<StorePath>> {
    btree_set(store_path(), 0..5).prop_map(|paths| paths.into_iter().collect())
}

pub(crate) fn signature() -> impl Strategy<Value = Signature> {
    ("[!-9;-~]{1,20}", any::<[u8; 32]>(), any::<[u8; 4]>())
        .prop_map(|(name, seed, message)| SecretKey::generate(&name, seed).unwrap().sign(&message))
}

pub(crate) fn content_address() -> impl Strategy<Value = ContentAddress> {
    let other = (any::<[u8; 20]>(), prop_oneof![Just(""), Just("r:"), Just("git:")])
        .prop_map(|(digest, method)| format!("fixed:{method}sha1:{}", super::base32::encode(&digest)).parse().unwrap());
    prop_oneof![
        sha256().prop_map(ContentAddress::Text),
        sha256().prop_map(ContentAddress::Flat),
        sha256().prop_map(ContentAddress::NixArchive),
        other,
    ]
}

pub(crate) fn narinfo() -> impl Strategy<Value = NarInfo> {
    let file = (
        "[!-~]{1,20}",
        proptest::sample::select(Compression::ALL.to_vec()),
        option::of(sha256()),
        option::of(1..=NAR_SIZE_MAX),
    );
    let nar = (sha256(), 1..=NAR_SIZE_MAX, store_paths(), option::of(store_path()));
    let rest =
        (btree_set(signature(), 0..3), option::of(content_address()), vec(("X-[A-Za-z]{1,5}", "[ -~]{0,9}"), 0..3));
    (store_path(), file, nar, rest).prop_map(
        |(
            store_path,
            (url, compression, file_hash, file_size),
            (nar_hash, nar_size, references, deriver),
            (signatures, ca, extra),
        )| NarInfo {
            store_path,
            url,
            compression,
            file_hash,
            file_size,
            nar_hash,
            nar_size,
            references,
            deriver,
            signatures: signatures.into_iter().collect(),
            ca,
            extra,
        },
    )
}
