//! What the world has been promised: for each path, what was tried and what was acknowledged.

use std::collections::BTreeMap;

use narlake_format::nix::hash::Sha256Hash;
use narlake_format::nix::store_path::{StorePath, StorePathHash};

use crate::object::Object;

/// Everything known of one path.
#[derive(Debug, Default)]
struct Entry {
    /// Every content that somebody tried to push.
    tried: Vec<Object>,
    /// The content that an acknowledged push found served. It never changes again.
    fixed: Option<Sha256Hash>,
}

/// The model that the lake is compared with.
#[derive(Debug, Default)]
pub struct Model {
    paths: BTreeMap<StorePathHash, Entry>,
}

impl Model {
    /// Takes note that a push has begun.
    pub fn trying(&mut self, object: &Object) {
        let tried = &mut self.paths.entry(object.path.hash).or_default().tried;
        if !tried.contains(object) {
            tried.push(object.clone());
        }
    }

    /// Takes note that a push was acknowledged and which content is served.
    ///
    /// # Panics
    /// Where another content was acknowledged before.
    pub fn acknowledged(&mut self, path: &StorePathHash, served: Sha256Hash) {
        let entry = self.paths.entry(*path).or_default();
        assert_eq!(*entry.fixed.get_or_insert(served), served, "{path} changed after it was acknowledged");
    }

    /// Every path that somebody tried to push.
    pub fn paths(&self) -> impl Iterator<Item = StorePathHash> {
        self.paths.keys().copied()
    }

    /// Paths that were acknowledged.
    #[must_use]
    pub fn all_acknowledged(&self) -> Vec<StorePath> {
        let fixed = self.paths.values().filter(|entry| entry.fixed.is_some());
        fixed.filter_map(|entry| entry.tried.first()).map(|object| object.path.clone()).collect()
    }

    /// Whether a push of this path was acknowledged.
    #[must_use]
    pub fn is_acknowledged(&self, path: &StorePathHash) -> bool {
        self.paths.get(path).is_some_and(|entry| entry.fixed.is_some())
    }

    /// The object that a path is allowed to be, given the NarHash that its record has.
    ///
    /// # Panics
    /// Where nobody pushed such a content, or another one was acknowledged.
    #[must_use]
    pub fn expect(&self, path: &StorePathHash, nar_hash: Sha256Hash) -> &Object {
        let entry = self.paths.get(path).unwrap_or_else(|| panic!("{path} was never pushed"));
        if let Some(fixed) = entry.fixed {
            assert_eq!(nar_hash, fixed, "{path} is served with other content than was acknowledged");
        }
        let object = entry.tried.iter().find(|object| Sha256Hash::of(&object.nar) == nar_hash);
        object.unwrap_or_else(|| panic!("{path} is served with a content that nobody pushed: {nar_hash}"))
    }
}
