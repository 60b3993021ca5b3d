//! A segment that opens finds all it holds, and is the one that its entries make.
#![no_main]

use libfuzzer_sys::fuzz_target;
use narlake_format::lake::segment::{Segment, SegmentBuilder};

fuzz_target!(|bytes: &[u8]| {
    // The checksum is put right, since libFuzzer will not guess it.
    let mut segment = bytes.to_vec();
    let checksum = blake3::derive_key("narlake 2026-11 v1 segment", bytes);
    segment.extend_from_slice(&checksum);
    let _ = Segment::open(bytes);
    if let Ok(opened) = Segment::open(&segment) {
        let mut builder = SegmentBuilder::new();
        opened.packs().iter().for_each(|pack| builder.cover(*pack));
        for (id, location) in opened.iter() {
            assert!(opened.get_all(&id).any(|found| found == location));
            builder.add(id, &location);
        }
        assert_eq!(builder.finish(), segment);
    }
});
