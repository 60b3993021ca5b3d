//! Places of blobs, as far as they are remembered: bounded, and small.
//!
//! A pack's name is as long as all the rest of a location, and thousands of blobs lie in the same: packs are numbered
//! as they are met. A number is not used again before 4 billion others, so that one which is forgotten leads nowhere.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use narlake_format::id::BlobId;
use narlake_format::lake::location::{Location, PackRef};
use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, UnitWeighter};

/// Most packs that have a number; with the next one, all are forgotten. About 10 MB.
const PACKS_MAX: u32 = 1 << 16;

/// Share of places that is for those asked for again. The rest takes what has been learnt and is yet to be used.
const AGAIN_SHARE: f64 = 0.5;

pub(super) struct Places {
    known: Cache<BlobId, Place>,
    packs: RwLock<Packs>,
}

/// A location with its pack by number.
#[derive(Clone, Copy)]
struct Place {
    pack: u32,
    frame_offset: u32,
    frame_length: u32,
    offset: u32,
    length: u32,
}

#[derive(Default)]
struct Packs {
    /// The number of the first in `names`.
    first: u32,
    /// That of the next pack.
    next: u32,
    names: Vec<PackRef>,
    numbers: HashMap<PackRef, u32>,
}

impl Packs {
    fn name(&self, number: u32) -> Option<PackRef> {
        self.names.get(usize::try_from(number.checked_sub(self.first)?).ok()?).copied()
    }

    fn number(&mut self, pack: PackRef) -> u32 {
        if let Some(number) = self.numbers.get(&pack) {
            return *number;
        }
        if self.next.wrapping_sub(self.first) >= PACKS_MAX {
            self.first = self.next;
            self.names.clear();
            self.numbers.clear();
        }
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.names.push(pack);
        self.numbers.insert(pack, number);
        number
    }
}

impl Places {
    /// Remembers up to `max` places; none if that is 0.
    pub(super) fn new(max: usize) -> Self {
        let mut options = OptionsBuilder::new();
        options.hot_allocation(AGAIN_SHARE).estimated_items_capacity(max).weight_capacity(max as u64);
        let parts = (DefaultHashBuilder::default(), DefaultLifecycle::default());
        let known = match options.build() {
            Ok(options) => Cache::with_options(options, UnitWeighter, parts.0, parts.1),
            Err(_) => Cache::new(max),
        };
        Self { known, packs: RwLock::default() }
    }

    pub(super) fn get(&self, id: &BlobId) -> Option<Location> {
        let Place { pack, frame_offset, frame_length, offset, length } = self.known.get(id)?;
        let pack = self.packs.read().unwrap_or_else(PoisonError::into_inner).name(pack)?;
        Some(Location { pack, frame_offset, frame_length, offset, length })
    }

    pub(super) fn insert(&self, id: BlobId, place: &Location) {
        let known = self.packs.read().unwrap_or_else(PoisonError::into_inner).numbers.get(&place.pack).copied();
        let number = || self.packs.write().unwrap_or_else(PoisonError::into_inner).number(place.pack);
        let pack = known.unwrap_or_else(number);
        let Location { frame_offset, frame_length, offset, length, .. } = *place;
        self.known.insert(id, Place { pack, frame_offset, frame_length, offset, length });
    }

    pub(super) fn forget(&self, id: &BlobId) {
        self.known.remove(id);
    }
}

#[cfg(test)]
mod tests {
    use narlake_format::id::{ChunkId, PackId, Ulid};
    use narlake_format::lake::location::Domain;

    use super::*;

    fn place(pack: u32) -> Location {
        let pack = PackRef { domain: Domain::Public, id: PackId(Ulid::from(u128::from(pack))) };
        Location { pack, frame_offset: 1, frame_length: 2, offset: 3, length: 4 }
    }

    #[test]
    fn places_are_of_their_pack_or_forgotten() {
        let places = Places::new(100);
        let ids: Vec<BlobId> = (0..3_u8).map(|n| ChunkId::of(&[n]).into()).collect();
        for (id, pack) in ids.iter().zip([7, 8, 7]) {
            places.insert(*id, &place(pack));
        }
        assert_eq!(ids.iter().map(|id| places.get(id)).collect::<Vec<_>>(), [7, 8, 7].map(|pack| Some(place(pack))));
        places.forget(&ids[0]);
        assert_eq!(places.get(&ids[0]), None);
        // More packs than have numbers: those that went are not mistaken for the new ones.
        for pack in 100..100 + PACKS_MAX {
            places.insert(ids[2], &place(pack));
        }
        assert_eq!(places.get(&ids[1]), None);
        assert_eq!(places.get(&ids[2]), Some(place(99 + PACKS_MAX)));
    }

    #[test]
    fn none_are_kept_where_none_may_be() {
        let places = Places::new(0);
        let id = ChunkId::of(b"x").into();
        places.insert(id, &place(1));
        assert_eq!(places.get(&id), None);
    }
}
