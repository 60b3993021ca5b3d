//! Sealed views: closures whose metadata the kernel has for itself, so that it asks nobody about what is cached.
//!
//! A sealed view is an overlay of layers: an EROFS image of the tree of its closures ([`erofs`]), whose files redirect by
//! content to directories of complete files ([`kernel`]). docs/decisions/0012-own-erofs-writer.md says why the image is
//! written here.

pub mod erofs;
pub mod kernel;
