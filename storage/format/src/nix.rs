//! What Nix defines: names, hashes, and the texts and messages of its binary caches and daemons.
//!
//! Everything here is a pure function between bytes and a value. Parsers are strict: where Nix has one spelling for a
//! value they accept that one only, so that a parsed value written again gives the bytes it came from, but for fields
//! that Nix itself reorders (references and signatures, which it keeps as sets). Nothing here knows narlake's own
//! formats; those live in `lake` and are built from these types.
//!
//! | module | what |
//! |---|---|
//! | [`base32`] | Nix's base-32 spelling of digests |
//! | [`hash`] | SHA-256 digests as Nix writes them |
//! | [`store_path`] | store directory, hash part, name |
//! | [`content_address`] | the CA field, and how a store path follows from content |
//! | [`signature`] | ed25519 keys and signatures |
//! | [`compression`] | the compressions of an uploaded NAR |
//! | [`narinfo`] | metadata of one store path, and the fingerprint that is signed |
//! | [`registration`] | what Nix's database says, as text |
//! | [`cache_info`] | `nix-cache-info` |
//! | [`listing`] | `.ls` |
//! | [`realisation`] | `.doi` |
//! | [`worker`] | the daemon's worker protocol |

pub mod base32;
pub mod cache_info;
pub mod compression;
pub mod content_address;
pub mod hash;
pub mod hash_modulo;
pub mod listing;
pub mod narinfo;
pub mod realisation;
pub mod registration;
pub mod signature;
pub mod store_path;
pub mod worker;

#[cfg(test)]
pub(crate) mod strategies;
