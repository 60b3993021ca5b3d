//! String tables: their one encoding.

use proptest::prelude::*;

use super::*;

/// A table of these strings.
pub(in crate::lake) fn table(strings: &[&str]) -> StringTable {
    let mut builder = StringTableBuilder::default();
    for string in strings {
        builder.push(&[string.as_bytes()]);
    }
    builder.finish()
}

const A: &str = "0123456789abcdfghijklmnpqrsvwxyz-glibc-2.40";
const B: &str = "zyxwvsrqpnmlkjihgfdcba9876543210-bash-5.2+p37?=_.";

#[test]
fn strings_by_number() {
    let table = table(&[A, B]);
    assert_eq!(table.len(), 2);
    assert_eq!(table.get(0), Some(A.as_bytes()));
    assert_eq!(table.get(1), Some(B.as_bytes()));
    assert_eq!(table.get(2), None);
    assert_eq!(table.get(u32::MAX), None);
    assert_eq!(table.span(1, true), Some((43, 32)));
    assert_eq!(table.hashes().map(|hash| hash.to_string()).collect::<Vec<_>>(), [&A[..32], &B[..32]]);
}

#[test]
fn the_empty_table_has_bytes_and_a_name() {
    let empty = StringTable::default();
    assert!(empty.is_empty());
    assert_eq!(empty.encode(), [1, 0]);
    assert_eq!(StringTable::decode(&[1, 0]), Ok(empty));
}

#[test]
fn refuses_what_it_would_not_write() {
    let hash = [7; 20];
    let entry = |name: &[u8]| [&hash[..], &[u8::try_from(name.len()).expect("short")], name].concat();
    let with = |count: u8, entries: &[Vec<u8>]| [&[1, count][..], &entries.concat()].concat();
    assert!(StringTable::decode(&with(1, &[entry(b"ok")])).is_ok());
    let refused = [
        ("no bytes", vec![]),
        ("another version", vec![2, 0]),
        ("a longer spelling of the count", vec![1, 0x80, 0]),
        ("too few strings", with(2, &[entry(b"ok")])),
        ("bytes behind", with(0, &[entry(b"ok")])),
        ("an empty name", with(1, &[entry(b"")])),
        ("a byte that no name has", with(1, &[entry(b"a/b")])),
        ("a name too long", with(1, &[entry(&[b'a'; 212])])),
        ("the same string twice", with(2, &[entry(b"ok"), entry(b"ok")])),
        ("too many strings", [&[1, 0x81, 0x80, 0x04][..], &entry(b"ok")].concat()),
    ];
    for (what, bytes) in refused {
        assert!(StringTable::decode(&bytes).is_err(), "{what}");
    }
    assert!(StringTable::decode(&with(2, &[entry(b"a"), entry(b"b")])).is_ok(), "one hash, two names");
}

proptest! {
    #[test]
    fn decode_is_the_inverse_of_encode(
        strings in prop::collection::btree_set("[0-9a-df-np-sv-z]{32}-[A-Za-z0-9+._?=-]{1,211}", 0..20),
    ) {
        let strings: Vec<&str> = strings.iter().map(String::as_str).collect();
        let table = table(&strings);
        let bytes = table.encode();
        prop_assert_eq!(bytes.len(), table.encoded_len());
        prop_assert_eq!(StringTable::decode(&bytes), Ok(table));
    }

    /// Bytes that decode are the encoding of what they decode to, so other bytes have another id.
    #[test]
    fn one_encoding(mutation in any::<(prop::sample::Index, u8, bool)>()) {
        let mut bytes = table(&[A, B]).encode();
        let (at, value, truncate) = mutation;
        let at = at.index(bytes.len());
        if truncate { bytes.truncate(at) } else { bytes[at] = value }
        if let Ok(table) = StringTable::decode(&bytes) {
            prop_assert_eq!(table.encode(), bytes);
        }
    }
}
