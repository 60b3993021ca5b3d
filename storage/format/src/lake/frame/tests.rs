//! Frames there and back, deltas, and content that lies about itself.

use proptest::prelude::*;

use super::*;

fn content(blobs: &[&[u8]]) -> FrameContent {
    let mut content = FrameContent::default();
    for bytes in blobs {
        content.push(BlobKind::Chunk, BlobId::of(BlobKind::Chunk, bytes), bytes);
    }
    content
}

/// Bytes that zstd finds nothing in.
fn noise(seed: u8, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

fn text(length: usize) -> Vec<u8> {
    (0..).flat_map(|n: u32| format!("line {n}\n").into_bytes()).take(length).collect()
}

#[test]
fn plain_frames() {
    let mut encoder = FrameEncoder::new(3);
    let mut decoder = FrameDecoder::new();
    let blobs: [(&[u8], Codec); 5] = [
        (b"a", Codec::Raw),
        (&noise(1, 100_000), Codec::Raw),
        (&text(100_000), Codec::Zstd),
        (&vec![0; FRAME_RAW_MAX], Codec::Zstd),
        (&noise(2, FRAME_RAW_MAX), Codec::Raw),
    ];
    for (bytes, codec) in blobs {
        let frame = encoder.encode(&content(&[bytes]));
        assert_eq!(frame.header.codec, codec);
        assert_eq!(frame.header.frame_length() as usize, frame.bytes.len());
        assert_eq!(FrameHeader::decode(&frame.bytes), Ok(frame.header));
        assert!(decoder.decode(&frame.bytes).expect("a frame") == bytes);
        assert!(decoder.decode_delta(&frame.bytes, &[]).is_err());
    }
}

#[test]
fn blobs_lie_end_to_end() {
    let frame = FrameEncoder::new(3).encode(&content(&[b"first", b"2", b"third"]));
    let raw = FrameDecoder::new().decode(&frame.bytes).expect("a frame");
    assert_eq!(raw, b"first2third");
    let places: Vec<_> = frame.blobs.iter().map(|blob| (blob.offset, blob.length)).collect();
    assert_eq!(places, [(0, 5), (5, 1), (6, 5)]);
}

#[test]
fn contents_fill_up() {
    let mut frame = FrameContent::default();
    assert!(frame.is_empty() && !frame.is_full_for(FRAME_RAW_MAX));
    let bytes = text(FRAME_TARGET - 10);
    frame.push(BlobKind::Part, BlobId::of(BlobKind::Part, &bytes), &bytes);
    assert!(!frame.is_full_for(10) && frame.is_full_for(11));
    frame.clear();
    assert!(frame.is_empty());
}

#[test]
fn windows() {
    let frames = |first, mask| BaseWindow::new(first, mask).map(|window| window.frames().collect::<Vec<_>>());
    assert_eq!(frames(5, 0b0001), Some(vec![5]));
    assert_eq!(frames(5, 0b1011), Some(vec![5, 6, 8]));
    assert_eq!(frames(u32::MAX - 3, 0b1111), Some(vec![u32::MAX - 3, u32::MAX - 2, u32::MAX - 1, u32::MAX]));
    for (first, mask) in [(5, 0), (5, 0b0010), (5, 0b1_0001), (u32::MAX, 0b0011)] {
        assert_eq!(frames(first, mask), None, "{first} {mask:b}");
    }
}

#[test]
fn delta_frames() {
    let old = [noise(3, 200_000), noise(4, 100_000)];
    let base: Vec<&[u8]> = old.iter().map(Vec::as_slice).collect();
    let new = [&old[0][50_000..], b"something new", &old[1][..70_000]].concat();
    let window = BaseWindow::new(7, 0b101).expect("a window");
    let mut encoder = FrameEncoder::new(3);
    let mut decoder = FrameDecoder::new();
    let frame = encoder.encode_delta(&content(&[&new]), window, &base);
    assert_eq!(frame.header.codec, Codec::Delta);
    assert_eq!(frame.header.base.map(|(window, _)| window), Some(window));
    assert!(frame.bytes.len() < 1000, "{} bytes", frame.bytes.len());
    assert_eq!(FrameHeader::decode(&frame.bytes), Ok(frame.header));
    assert_eq!(decoder.decode_delta(&frame.bytes, &base), Ok(new.clone()));
    assert_eq!(decoder.decode_delta(&frame.bytes, &base), Ok(new), "again, by the same decoder");
    // Only ever against the base it was made of, and never as a base itself.
    let refused: [&[&[u8]]; 5] =
        [&[], &base[..1], &[base[1], base[0]], &[base[0], &base[1][1..]], &[base[0], base[1], &[]]];
    for base in refused {
        assert!(decoder.decode_delta(&frame.bytes, base).is_err());
    }
    assert!(decoder.decode(&frame.bytes).is_err());
    // What has nothing in common with the base is stored without it.
    let other = encoder.encode_delta(&content(&[&noise(5, 1000)]), window, &base);
    assert_eq!(other.header.codec, Codec::Raw);
}

/// A base as long as bases may be is of use to its first byte.
#[test]
fn deltas_of_long_bases() {
    let base = noise(6, FRAME_RAW_MAX);
    let window = BaseWindow::new(0, 1).expect("a window");
    let frame = FrameEncoder::new(3).encode_delta(&content(&[&base[..100_000]]), window, &[&base]);
    assert_eq!(frame.header.codec, Codec::Delta);
    assert!(FrameDecoder::new().decode_delta(&frame.bytes, &[&base]).expect("a delta") == base[..100_000]);
}

/// A frame of this header and content, with the right checksum.
fn forged(header: FrameHeader, stored: &[u8]) -> Vec<u8> {
    [&header.encode()[..], stored].concat()
}

#[test]
fn decoding_is_bounded_and_strict() {
    let mut decoder = FrameDecoder::new();
    let zstd = zstd::bulk::compress(&text(5000), 3).expect("zstd");
    let header = |raw_length: usize, stored: &[u8]| FrameHeader {
        codec: Codec::Zstd,
        raw_length: to_u32(raw_length),
        stored_length: to_u32(stored.len()),
        base: None,
    };
    assert_eq!(decoder.decode(&forged(header(5000, &zstd), &zstd)), Ok(text(5000)));
    let twice = [zstd.clone(), zstd.clone()].concat();
    let skippable = [&zstd[..], &[0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0]].concat();
    let unsized_content = {
        let mut compressor = zstd::bulk::Compressor::new(3).expect("zstd");
        compressor.include_contentsize(false).expect("zstd");
        compressor.compress(&text(5000)).expect("zstd")
    };
    let bomb = zstd::bulk::compress(&vec![0; FRAME_RAW_MAX + 1], 3).expect("zstd");
    let refused = [
        ("longer than promised", forged(header(4999, &zstd), &zstd)),
        ("shorter than promised", forged(header(5001, &zstd), &zstd)),
        ("two frames of zstd", forged(header(10_000, &twice), &twice)),
        ("something skipped", forged(header(5000, &skippable), &skippable)),
        ("no content size", forged(header(5000, &unsized_content), &unsized_content)),
        ("not zstd", forged(header(5000, b"hello"), b"hello")),
        ("a bomb", forged(header(FRAME_RAW_MAX + 1, &bomb), &bomb)),
        ("a bomb that promises less", forged(header(FRAME_RAW_MAX, &bomb), &bomb)),
        ("compression that does not shrink", forged(header(zstd.len(), &zstd), &zstd)),
        ("no content", forged(header(0, &zstd), &zstd)),
        ("raw content of another length", forged(FrameHeader { codec: Codec::Raw, ..header(5, b"four") }, b"four")),
        ("bytes behind", forged(header(5000, &zstd), &[&zstd[..], &[0]].concat())),
        ("bytes missing", forged(header(5000, &zstd), &zstd[..zstd.len() - 1])),
    ];
    for (what, frame) in refused {
        assert!(decoder.decode(&frame).is_err(), "{what}");
    }
}

#[test]
fn every_bit_counts() {
    let mut decoder = FrameDecoder::new();
    let raw = text(3000);
    let base = noise(8, 4000);
    let window = BaseWindow::new(1, 1).expect("a window");
    let mut encoder = FrameEncoder::new(3);
    let plain = encoder.encode(&content(&[&raw]));
    let edited = [&base[..3000], b"new"].concat();
    let delta = encoder.encode_delta(&content(&[&edited]), window, &[&base]);
    assert_eq!(delta.header.codec, Codec::Delta);
    for (frame, raw) in [(plain, raw), (delta, edited)] {
        let id = frame.blobs[0].id;
        let header_length = frame.header.codec.header_length() as usize;
        for at in 0..frame.bytes.len() {
            assert!(decode_any(&mut decoder, &frame.bytes[..at], &base).is_err(), "cut at {at}");
            for bit in 0..8 {
                let mut bytes = frame.bytes.clone();
                bytes[at] ^= 1 << bit;
                if let Ok(content) = decode_any(&mut decoder, &bytes, &base) {
                    // A bit of zstd's that means nothing, or content that its id gives away.
                    assert!(at >= header_length, "bit {bit} of header byte {at}");
                    assert_eq!(content.len(), raw.len());
                    assert_eq!(content == raw, BlobId::of(BlobKind::Chunk, &content) == id, "bit {bit} of byte {at}");
                }
            }
        }
    }
}

fn decode_any(decoder: &mut FrameDecoder, frame: &[u8], base: &[u8]) -> Result<Vec<u8>, FormatError> {
    match FrameHeader::decode(frame)?.base {
        None => decoder.decode(frame),
        Some(_) => decoder.decode_delta(frame, &[base]),
    }
}

proptest! {
    #[test]
    fn decoding_is_the_inverse_of_encoding(
        blobs in prop::collection::vec(prop::collection::vec(0..4_u8, 1..2000), 1..8),
        level in 1..7_i32,
    ) {
        let blobs: Vec<&[u8]> = blobs.iter().map(Vec::as_slice).collect();
        let frame = FrameEncoder::new(level).encode(&content(&blobs));
        prop_assert_eq!(FrameDecoder::new().decode(&frame.bytes), Ok(blobs.concat()));
    }

    #[test]
    fn any_bytes(stored in prop::collection::vec(any::<u8>(), 1..200), raw_length in 1..5000_u32, delta in any::<bool>()) {
        let base = delta.then(|| (BaseWindow::new(0, 1).expect("a window"), BaseDigest::of(b"base")));
        let codec = if delta { Codec::Delta } else { Codec::Zstd };
        let header = FrameHeader { codec, raw_length, stored_length: to_u32(stored.len()), base };
        let stored = [&ZSTD_MAGIC[..], &stored].concat();
        let _ = decode_any(&mut FrameDecoder::new(), &forged(header, &stored), b"base");
    }
}
