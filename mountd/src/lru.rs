//! Caches in memory that are bounded in bytes.

use std::hash::Hash;

use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, Lifecycle, OptionsBuilder, Weighter};

/// Something that knows about how many bytes of memory, or of disk, it stands for.
pub(crate) trait Weigh {
    fn bytes(&self) -> u64;
}

impl<T: Weigh> Weigh for std::sync::Arc<T> {
    fn bytes(&self) -> u64 {
        self.as_ref().bytes()
    }
}

/// Weighs values by their bytes.
#[derive(Clone)]
pub(crate) struct ByBytes {
    max: u64,
}

impl<K, V: Weigh> Weighter<K, V> for ByBytes {
    fn weight(&self, _: &K, value: &V) -> u64 {
        // One value larger than the whole budget must still be kept, else every use of it would load it anew.
        value.bytes().clamp(1, self.max)
    }
}

/// A cache whose values take at most about `bytes`, `items` of them being usual.
pub(crate) type Lru<K, V, L = DefaultLifecycle<K, V>> = Cache<K, V, ByBytes, DefaultHashBuilder, L>;

/// See [`Lru`].
pub(crate) fn lru<K: Eq + Hash, V: Weigh + Clone>(items: usize, bytes: u64) -> Lru<K, V> {
    lru_with(items, bytes, DefaultLifecycle::default())
}

/// The same, told of evictions.
pub(crate) fn lru_with<K: Eq + Hash, V: Weigh + Clone, L: Lifecycle<K, V> + Clone>(
    items: usize,
    bytes: u64,
    lifecycle: L,
) -> Lru<K, V, L> {
    let weighter = ByBytes { max: (bytes / 2).max(1) };
    // One shard: split, no part of the budget would hold a large value.
    let options = OptionsBuilder::new().shards(1).estimated_items_capacity(items).weight_capacity(bytes).build();
    // Absent numbers leave an untuned cache of that budget, which differs in speed alone.
    match options {
        Ok(options) => Cache::with_options(options, weighter, DefaultHashBuilder::default(), lifecycle),
        Err(_) => Cache::with(items, bytes, weighter, DefaultHashBuilder::default(), lifecycle),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone)]
    struct Of(u64);

    impl Weigh for Of {
        fn bytes(&self) -> u64 {
            self.0
        }
    }

    #[test]
    fn values_are_bounded_by_their_bytes() {
        let cache = lru::<u32, Of>(100, 10_000);
        for number in 0..1000 {
            cache.insert(number, Of(1000));
        }
        assert!(cache.len() <= 10 && cache.weight() <= 10_000, "{}", cache.len());
        // One that is larger than all is kept, alone if need be.
        cache.insert(5000, Of(1 << 40));
        assert!(cache.get(&5000).is_some());
        assert!(cache.weight() <= 10_000);
    }
}
