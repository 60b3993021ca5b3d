//! Segments: finding what is there and nothing else, and segments that lie.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn pack(domain: u8, id: u8) -> PackRef {
    let cache = CacheId(Ulid::from_bytes([domain; 16]));
    let domain = if domain == 0 { Domain::Public } else { Domain::Cache(cache) };
    PackRef { domain, id: PackId(Ulid::from_bytes([id; 16])) }
}

fn location(pack: PackRef, frame_offset: u32, offset: u32) -> Location {
    Location { pack, frame_offset, frame_length: 300, offset, length: 77 }
}

fn id(number: u32) -> BlobId {
    BlobId::from_bytes(*blake3::hash(&number.to_le_bytes()).as_bytes())
}

fn build(entries: &[(BlobId, Location)]) -> Vec<u8> {
    let mut builder = SegmentBuilder::new();
    for (id, location) in entries {
        builder.add(*id, location);
    }
    assert_eq!((builder.len(), builder.is_empty()), (entries.len(), entries.is_empty()));
    builder.finish()
}

#[test]
fn the_empty_segment() {
    let mut builder = SegmentBuilder::new();
    builder.cover(pack(0, 3));
    let segment = Segment::open(builder.finish()).expect("a segment");
    assert!(segment.is_empty());
    assert_eq!(segment.packs(), [pack(0, 3)]);
    assert_eq!(segment.get(&id(1)), None);
    assert!(Segment::open(SegmentBuilder::new().finish()).is_ok());
}

#[test]
fn finds_what_it_holds_and_nothing_else() {
    for count in [1, 2, 63, 64, 127, 128, 5000, 20_000] {
        let entries: Vec<_> =
            (0..count).map(|n| (id(n), location(pack(0, n.to_le_bytes()[0] % 3), n, n + 1))).collect();
        let bytes = build(&entries);
        let segment = Segment::open(&bytes).expect("a segment");
        assert_eq!(segment.len(), count as usize);
        for (id, location) in &entries {
            assert_eq!(segment.get(id), Some(*location));
        }
        assert!((count..count + 1000).all(|n| segment.get(&id(n)).is_none()));
        let mut sorted = entries.clone();
        sorted.sort_unstable();
        assert_eq!(segment.iter().collect::<Vec<_>>(), sorted);
    }
}

#[test]
fn a_blob_in_several_packs() {
    let places = [
        location(pack(1, 1), 5, 0),
        location(pack(0, 9), 5, 0),
        location(pack(0, 9), 4, 7),
        location(pack(0, 2), 6, 0),
    ];
    let mut entries: Vec<_> = places.iter().map(|place| (id(1), *place)).collect();
    entries.push((id(1), places[0]));
    entries.push((id(2), places[0]));
    let bytes = build(&entries);
    let segment = Segment::open(&bytes).expect("a segment");
    // Once each, in the order of packs, then of places.
    let expected = [places[3], places[2], places[1], places[0]];
    assert_eq!(segment.get_all(&id(1)).collect::<Vec<_>>(), expected);
    assert_eq!(segment.get(&id(1)), Some(places[3]));
    entries.reverse();
    assert_eq!(build(&entries), bytes, "whatever the order they come in");
}

#[test]
fn locations_at_their_limits() {
    let pack_max = u32::try_from(PACK_MAX).expect("fits");
    let raw_max = u32::try_from(FRAME_RAW_MAX).expect("fits");
    let header_max = u32::try_from(FRAME_HEADER_MAX).expect("fits");
    let largest = Location {
        pack: pack(9, 9),
        frame_offset: pack_max - 1,
        frame_length: raw_max + header_max,
        offset: raw_max - 1,
        length: raw_max,
    };
    let smallest = Location { pack: pack(0, 0), frame_offset: 0, frame_length: 0, offset: 0, length: 1 };
    let bytes = build(&[(id(1), largest), (id(2), smallest)]);
    let segment = Segment::open(&bytes).expect("a segment");
    assert_eq!(segment.get(&id(1)), Some(largest));
    assert_eq!(segment.get(&id(2)), Some(smallest));
    for beyond in [
        Location { length: 0, ..largest },
        Location { length: raw_max + 1, ..largest },
        Location { offset: raw_max, ..largest },
        Location { frame_offset: pack_max, ..largest },
    ] {
        assert!(std::panic::catch_unwind(|| build(&[(id(1), beyond)])).is_err(), "{beyond:?}");
    }
}

#[test]
fn every_bit_counts() {
    let entries: Vec<_> = (0..130).map(|n| (id(n), location(pack(n.to_le_bytes()[0] % 2, 1), n, 0))).collect();
    let bytes = build(&entries);
    for at in 0..bytes.len() {
        assert!(Segment::open(&bytes[..at]).is_err(), "cut at {at}");
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        assert!(Segment::open(flipped).is_err(), "byte {at}");
    }
}

proptest! {
    #[test]
    fn reading_is_the_inverse_of_writing(
        entries in prop::collection::btree_set((0..200_u32, 0..3_u8, 0..4_u8, 0..1_u32 << 26, 0..1_u32 << 24), 0..300),
    ) {
        let place = |&(n, domain, number, frame_offset, offset): &(u32, u8, u8, u32, u32)| {
            (id(n), location(pack(domain, number), frame_offset, offset))
        };
        let entries: BTreeSet<_> = entries.iter().map(place).collect();
        let bytes = build(&entries.iter().copied().collect::<Vec<_>>());
        let segment = Segment::open(&bytes).expect("a segment");
        prop_assert_eq!(segment.iter().collect::<BTreeSet<_>>(), entries.clone());
        for n in 0..200 {
            let expected: Vec<_> = entries.iter().filter(|(found, _)| *found == id(n)).map(|(_, at)| *at).collect();
            prop_assert_eq!(segment.get_all(&id(n)).collect::<Vec<_>>(), expected);
        }
    }

    /// A segment whose checksum is right is still checked, and one that passes is the one that would be written.
    #[test]
    fn forged_segments(mutations in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 1..4)) {
        let entries: Vec<_> = (0..130).map(|n| (id(n), location(pack(n.to_le_bytes()[0] % 2, 1), n, 0))).collect();
        let mut bytes = build(&entries);
        let body = bytes.len() - CHECKSUM_LEN;
        bytes.truncate(body);
        for (at, value) in mutations {
            // Half of them in what stands before the entries.
            let at = if value % 2 == 0 { at.index(body) } else { at.index(HEADER_LEN + 2 * PACK_LEN + 8) };
            bytes[at] = value;
        }
        let checksum = digest(CONTEXT, &[&bytes]);
        bytes.extend_from_slice(&checksum);
        if let Ok(segment) = Segment::open(&bytes) {
            let mut builder = SegmentBuilder::new();
            segment.packs().iter().for_each(|pack| builder.cover(*pack));
            segment.iter().for_each(|(id, location)| builder.add(id, &location));
            prop_assert!(builder.finish() == bytes);
        }
    }
}
