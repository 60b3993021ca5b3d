//! Packs there and back, footers from any tail, and footers that lie.

use proptest::prelude::*;

use super::*;
use crate::id::{BlobKind, CacheId, PackId, Ulid};
use crate::lake::frame::{BaseWindow, FrameContent, FrameEncoder};
use crate::lake::location::Domain;
use crate::limits::FRAME_RAW_MAX;

fn frame(encoder: &mut FrameEncoder, blobs: &[&[u8]]) -> Frame {
    encoder.encode(&content(blobs))
}

fn content(blobs: &[&[u8]]) -> FrameContent {
    let mut content = FrameContent::default();
    for bytes in blobs {
        let kind = if bytes.starts_with(b"part") { BlobKind::Part } else { BlobKind::Chunk };
        content.push(kind, BlobId::of(kind, bytes), bytes);
    }
    content
}

fn pack_ref() -> PackRef {
    PackRef { domain: Domain::Cache(CacheId(Ulid::from_bytes([1; 16]))), id: PackId(Ulid::from_bytes([2; 16])) }
}

/// Bytes that zstd finds nothing in.
fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// A pack of a raw, a compressed and a delta frame.
fn example() -> (Vec<u8>, PackFooter, Vec<FramePlace>) {
    let mut encoder = FrameEncoder::new(3);
    let mut builder = PackBuilder::new();
    let base = noise(3000);
    let delta = [&base[1000..], b"new"].concat();
    let window = BaseWindow::new(0, 1).expect("a window");
    let frames = [
        frame(&mut encoder, &[&base]),
        frame(&mut encoder, &[&[b'x'; 500], b"part of a manifest", &[b'y'; 700]]),
        encoder.encode_delta(&content(&[&delta]), window, &[&base]),
    ];
    assert_eq!(frames.each_ref().map(|frame| frame.header.codec), [Codec::Raw, Codec::Zstd, Codec::Delta]);
    let mut places = Vec::new();
    for frame in frames {
        assert!(builder.fits(&frame));
        places.push(builder.push(frame));
    }
    assert_eq!(builder.blobs(), 5);
    let length = builder.len();
    let (parts, footer) = builder.finish();
    let bytes = parts.concat();
    assert_eq!(bytes.len() as u64, length);
    (bytes, footer, places)
}

#[test]
fn a_pack_leads_to_its_blobs() {
    let (pack, footer, places) = example();
    assert_eq!(verify(&pack), Ok(footer.clone()));
    assert_eq!(footer.pack_length(), pack.len() as u64);
    assert_eq!(footer.frames().iter().map(|frame| frame.place).collect::<Vec<_>>(), places);
    let mut decoder = FrameDecoder::new();
    let mut found = 0;
    for (id, location) in footer.locations(pack_ref()) {
        let range = location.frame_range();
        let frame = &pack[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
        let raw = match FrameHeader::decode(frame).expect("a frame").base {
            None => decoder.decode(frame),
            Some(_) => decoder.decode_delta(frame, &[&noise(3000)]),
        };
        let raw = raw.expect("a frame");
        let blob = location.slice(&raw).expect("a blob");
        let entry = footer.blobs()[found];
        assert_eq!((id, location.length), (entry.id, entry.length));
        assert_eq!(BlobId::of(entry.kind, blob), id);
        found += 1;
    }
    assert_eq!(found, 5);
}

/// Any tail that holds the trailer either holds the footer or says where it starts.
#[test]
fn the_footer_from_any_tail() {
    let (pack, footer, _) = example();
    let length = pack.len() as u64;
    for tail_length in 0..=pack.len() {
        let tail = &pack[pack.len() - tail_length..];
        match PackFooter::decode_from_tail(tail, length) {
            Ok(FromTail::Footer(read)) => assert_eq!(read, footer),
            Ok(FromTail::Need(range)) => {
                assert_eq!(range.end, length);
                let needed = &pack[usize::try_from(range.start).unwrap()..];
                assert!(needed.len() > tail_length);
                assert_eq!(PackFooter::decode_from_tail(needed, length), Ok(FromTail::Footer(footer.clone())));
            }
            Err(_) => assert!(tail_length < 64, "{tail_length}"),
        }
    }
    assert!(PackFooter::decode_from_tail(&pack, length - 1).is_err());
    assert!(PackFooter::decode_from_tail(&pack, length + 1).is_err());
    assert!(PackFooter::decode_from_tail(&pack, PACK_MAX as u64 + 1).is_err());
}

/// Only bits that the pack's content does not depend on may flip unseen: none but some of zstd's own.
#[test]
fn every_bit_counts() {
    let (pack, footer, places) = example();
    let compressed = places[1].offset as usize + 20..places[2].offset as usize;
    let delta = places[2].offset as usize + 56..(places[2].offset + places[2].length) as usize;
    for at in 0..pack.len() {
        assert!(verify(&pack[..at]).is_err(), "cut at {at}");
        // Noise is noise: one bit of each of its bytes will do.
        let bits = if at < places[0].length as usize { at % 8..at % 8 + 1 } else { 0..8 };
        for bit in bits {
            let mut bytes = pack.clone();
            bytes[at] ^= 1 << bit;
            if let Ok(read) = verify(&bytes) {
                let in_zstd = compressed.contains(&at) || delta.contains(&at);
                assert!(in_zstd, "bit {bit} of byte {at}");
                assert_eq!(read, footer);
            }
        }
    }
}

#[test]
fn a_delta_needs_a_plain_base_before_it() {
    let mut encoder = FrameEncoder::new(3);
    let base = noise(3000);
    let mut delta = |first, mask: u8| {
        let base = vec![base.as_slice(); mask.count_ones() as usize];
        encoder.encode_delta(&content(&[&base[0][1000..]]), BaseWindow::new(first, mask).expect("a window"), &base)
    };
    let deltas = [delta(0, 1), delta(1, 1), delta(2, 1), delta(0, 0b111)];
    let plain = encoder.encode(&content(&[&base]));
    for (number, delta) in deltas.into_iter().enumerate() {
        assert_eq!(delta.header.codec, Codec::Delta);
        let pushed = std::panic::catch_unwind(|| {
            let mut builder = PackBuilder::new();
            builder.push(plain.clone());
            // A delta of frame 0, so frame 1 is there but not plain.
            builder.push(encoder_delta(&base));
            builder.push(delta);
        });
        assert_eq!(pushed.is_ok(), number == 0);
    }
}

fn encoder_delta(base: &[u8]) -> Frame {
    let window = BaseWindow::new(0, 1).expect("a window");
    FrameEncoder::new(3).encode_delta(&content(&[&base[500..]]), window, &[base])
}

#[test]
fn packs_fill_up() {
    let mut encoder = FrameEncoder::new(1);
    let mut builder = PackBuilder::new();
    let large = encoder.encode(&content(&[&noise(FRAME_RAW_MAX)]));
    let mut frames = 0;
    while builder.fits(&large) {
        builder.push(large.clone());
        frames += 1;
    }
    assert_eq!(frames, 3, "headers and tables take some of 64 MiB");
    let (parts, footer) = builder.finish();
    let pack = parts.concat();
    assert!(pack.len() <= PACK_MAX);
    let tail = &pack[pack.len() - usize::try_from(TAIL_LEN).unwrap()..];
    assert_eq!(PackFooter::decode_from_tail(tail, pack.len() as u64), Ok(FromTail::Footer(footer)));
}

proptest! {
    #[test]
    fn reading_is_the_inverse_of_writing(
        frames in prop::collection::vec(prop::collection::vec("[a-c]{1,300}", 1..6), 1..6),
    ) {
        let mut encoder = FrameEncoder::new(3);
        let mut builder = PackBuilder::new();
        for blobs in &frames {
            let blobs: Vec<&[u8]> = blobs.iter().map(String::as_bytes).collect();
            builder.push(frame(&mut encoder, &blobs));
        }
        let (parts, footer) = builder.finish();
        prop_assert_eq!(verify(&parts.concat()), Ok(footer.clone()));
        // The footer's bytes are a function of what it says.
        prop_assert_eq!(parts.last(), Some(&footer.encode()));
    }

    /// A footer whose checksum is right is still checked.
    #[test]
    fn forged_footers(mutations in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 1..4)) {
        let (pack, footer, _) = example();
        let tables = footer.encode();
        let fields = tables.len() - 40;
        let mut forged = tables[..fields].to_vec();
        for (at, value) in mutations {
            let at = at.index(fields);
            forged[at] = value;
        }
        let checksum = crate::lake::wire::digest("narlake 2026-11 v1 pack footer", &[&forged]);
        forged.extend_from_slice(&checksum);
        forged.extend_from_slice(&MAGIC);
        let start = pack.len() - tables.len();
        let bytes = [&pack[..start], &forged].concat();
        if let Ok(FromTail::Footer(read)) = PackFooter::decode_from_tail(&bytes, bytes.len() as u64) {
            prop_assert_eq!(read.encode(), forged);
        }
        let _ = verify(&bytes);
    }
}
