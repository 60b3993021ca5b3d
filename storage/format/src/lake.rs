//! The lake's own formats: how a store object is cut, named, packed and found again.
//!
//! On the way in, the events of a NAR pass through [`scrub`] (store paths out, [`strings`] kept beside), [`chunker`]
//! (spans of a file's bytes) and [`manifest`] (the tree over them). Chunks, manifest parts and string tables are the
//! *blobs* that [`frame`] compresses together and [`pack`] lays end to end in one object of the bucket; [`segment`] is
//! the index from a blob's id to its [`location`]. [`record`] is the commit point of a path, [`keys`] names every
//! object of the bucket, and [`config`] holds the small JSON documents among them.
//!
//! Everything here is a pure function on slices. The bytes are described in `docs/format/`, one page for each format,
//! and frozen by the golden files in `testdata/lake`.

pub mod chunker;
pub mod condemned;
pub mod config;
pub mod frame;
pub(crate) mod json;
pub mod keys;
pub mod location;
pub mod manifest;
pub mod pack;
pub mod record;
pub mod scrub;
pub mod segment;
pub mod strings;
mod wire;
