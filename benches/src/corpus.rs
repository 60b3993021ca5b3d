//! NARs of a flat binary cache (`*.narinfo`, `nar/*.nar`, uncompressed), references before those who refer to them.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use bytes::Bytes;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::store_path::{StoreDir, StorePathHash};

/// One path of a generation.
pub struct Item {
    /// Its narinfo.
    pub info: NarInfo,
    /// Its NAR.
    pub nar: Bytes,
}

/// Reads a generation into memory.
///
/// # Panics
/// Where the directory is not a flat binary cache.
#[must_use]
pub fn load(directory: &Path) -> Vec<Item> {
    let dir = StoreDir::default();
    let mut items: HashMap<StorePathHash, Item> = HashMap::new();
    for entry in std::fs::read_dir(directory).expect("a directory of narinfos").flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|e| e != "narinfo") {
            continue;
        }
        let text = std::fs::read(&path).expect("a narinfo");
        let info = NarInfo::parse(&dir, &text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let nar = std::fs::read(directory.join(&info.url)).expect("a NAR").into();
        items.insert(info.store_path.hash, Item { info, nar });
    }
    let mut names: Vec<(String, StorePathHash)> =
        items.iter().map(|(hash, item)| (item.info.store_path.name.to_string(), *hash)).collect();
    names.sort();
    let (mut order, mut seen) = (Vec::new(), HashSet::new());
    for (_, hash) in names {
        visit(hash, &items, &mut seen, &mut order);
    }
    order.into_iter().filter_map(|hash| items.remove(&hash)).collect()
}

fn visit(
    hash: StorePathHash,
    items: &HashMap<StorePathHash, Item>,
    seen: &mut HashSet<StorePathHash>,
    order: &mut Vec<StorePathHash>,
) {
    if !seen.insert(hash) {
        return;
    }
    let Some(item) = items.get(&hash) else { return };
    for reference in &item.info.references {
        visit(reference.hash, items, seen, order);
    }
    order.push(hash);
}
