//! The node table: stable, loud about damage, forgiving about what nobody was told.

use proptest::prelude::*;

use super::*;

fn key(seed: u16, content: u8) -> ObjectKey {
    let mut hash = [0; STORE_HASH_LEN];
    hash[..2].copy_from_slice(&seed.to_le_bytes());
    let path = StorePath { hash: StorePathHash::from_bytes(hash), name: format!("package-{seed}").parse().unwrap() };
    ObjectKey { path, manifest: ManifestId::of(&[content]), table: TableId::of(&[content]) }
}

fn table() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nodes");
    (dir, path)
}

#[test]
fn nodeids_split_into_what_they_were_made_of() {
    for (object, entry) in [(1, 0), (1, 1), (7, 9_999_999), (OBJECTS_MAX - 1, 5)] {
        assert_eq!(NodeId::new(ObjectNumber(object), entry).split(), Some((ObjectNumber(object), entry)));
    }
    for not_an_entry in [NodeId::ROOT, NodeId(0), NodeId(u64::MAX)] {
        assert_eq!(not_an_entry.split(), None);
    }
}

proptest! {
    /// Whatever is registered, in whatever batches, a table opened again gives the same numbers for the same objects.
    #[test]
    fn numbers_are_for_ever(batches in prop::collection::vec(prop::collection::vec((0_u16..40, 0_u8..2), 1..6), 1..8)) {
        let (_dir, path) = table();
        let mut given: HashMap<u64, ObjectKey> = HashMap::new();
        for batch in batches {
            let nodes = NodeTable::open(&path, false).unwrap();
            let keys: Vec<ObjectKey> = batch.iter().map(|(seed, content)| key(*seed, *content)).collect();
            for (key, number) in keys.iter().zip(nodes.register(&keys).unwrap()) {
                let before = given.insert(number.0, key.clone());
                prop_assert!(before.is_none_or(|before| before == *key));
            }
            let again = NodeTable::open(&path, false).unwrap();
            prop_assert_eq!(again.len(), nodes.len());
            for (number, key) in &given {
                let known = again.object(ObjectNumber(*number));
                prop_assert_eq!(known.as_ref(), Some(key));
            }
        }
    }

    /// A flipped bit anywhere is refused; its place is named.
    #[test]
    fn flipped_bits_are_refused(bit in 0..(HEADER_LEN + 3 * ROW_LEN) * 8) {
        let (_dir, path) = table();
        NodeTable::open(&path, false).unwrap().register(&[key(1, 0), key(2, 0), key(3, 0)]).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&path, &bytes).unwrap();
        match NodeTable::open(&path, false).err().expect("refused") {
            NodeTableError::Foreign { .. } => prop_assert!(bit / 8 < HEADER_LEN),
            NodeTableError::Damaged { offset, .. } => {
                let offset = usize::try_from(offset).unwrap();
                prop_assert!((offset..offset + ROW_LEN).contains(&(bit / 8)));
            }
            other => panic!("{other}"),
        }
    }

    /// A file cut anywhere keeps its whole rows.
    #[test]
    fn torn_ends_are_dropped(length in 0..HEADER_LEN + 3 * ROW_LEN) {
        let (_dir, path) = table();
        let keys = [key(1, 0), key(2, 0), key(3, 0)];
        NodeTable::open(&path, false).unwrap().register(&keys).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(length as u64).unwrap();
        let nodes = NodeTable::open(&path, false).unwrap();
        prop_assert_eq!(nodes.len(), length.saturating_sub(HEADER_LEN) / ROW_LEN);
        prop_assert_eq!(nodes.register(&keys).unwrap(), [ObjectNumber(1), ObjectNumber(2), ObjectNumber(3)]);
    }
}

/// After a power loss the last row can have its length and not its bytes.
#[test]
fn bad_rows_are_dropped_only_after_a_boot() {
    let (_dir, path) = table();
    NodeTable::open(&path, false).unwrap().register(&[key(1, 0), key(2, 0)]).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[0; ROW_LEN], row_offset(2)).unwrap();
    assert!(matches!(NodeTable::open(&path, false), Err(NodeTableError::Damaged { .. })));
    assert_eq!(NodeTable::open(&path, true).unwrap().len(), 1);
    file.write_all_at(&[9], row_offset(1)).unwrap();
    assert!(matches!(NodeTable::open(&path, false), Err(NodeTableError::Damaged { .. })));
    let table = NodeTable::open(&path, true).unwrap();
    assert_eq!(table.len(), 0);
    table.register(&[key(2, 0)]).unwrap();
    assert_eq!(NodeTable::open(&path, false).unwrap().len(), 1);
}

/// One path, other content: another object, and the old one keeps its number.
#[test]
fn content_that_changes_gets_a_number_of_its_own() {
    let (_dir, path) = table();
    let nodes = NodeTable::open(&path, false).unwrap();
    let first = nodes.register(&[key(1, 0)]).unwrap()[0];
    let second = nodes.register(&[key(1, 1)]).unwrap()[0];
    assert_ne!(first, second);
    assert_eq!(nodes.object(first), Some(key(1, 0)));
    assert_eq!(nodes.number(&key(1, 1)), Some(second));
    assert!(nodes.has_path(&key(1, 0).path));
    let renamed = StorePath { name: "other".parse().unwrap(), ..key(1, 0).path };
    assert!(!nodes.has_path(&renamed) && !nodes.has_path(&key(2, 0).path));
}

/// In one batch too: a key that comes again has its number, one of other content a new one.
#[test]
fn a_batch_numbers_each_object_once() {
    let (_dir, path) = table();
    let nodes = NodeTable::open(&path, false).unwrap();
    nodes.register(&[key(9, 0)]).unwrap();
    let numbers = nodes.register(&[key(1, 0), key(9, 0), key(1, 0), key(1, 1), key(1, 1)]).unwrap();
    assert_eq!(numbers, [2, 1, 2, 3, 3].map(ObjectNumber));
    assert_eq!(NodeTable::open(&path, false).unwrap().len(), 3);
}
