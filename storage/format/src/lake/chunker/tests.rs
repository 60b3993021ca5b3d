//! Cuts against those of the algorithm on a file in memory, whatever the pushes.

use proptest::prelude::*;

use super::*;

/// Bytes without a pattern, the same for the same seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    };
    let mut bytes: Vec<u8> =
        std::iter::repeat_with(|| next().to_le_bytes()).take(length.div_ceil(8)).flatten().collect();
    bytes.truncate(length);
    bytes
}

/// The lengths of a file's chunks when it arrives in pieces of these lengths, over and over.
fn cuts(chunker: &mut Chunker, file: &[u8], pieces: &[usize]) -> Vec<usize> {
    let mut lengths = Vec::new();
    chunker.begin(file.len() as u64);
    let (mut cut, mut arrived) = (0_usize, 0_usize);
    for piece in pieces.iter().cycle() {
        arrived = arrived.saturating_add(*piece).min(file.len());
        let mut at = cut;
        let mut on = |chunk: &[u8]| {
            lengths.push(chunk.len());
            assert_eq!(chunk, &file[at..at + chunk.len()], "chunks end to end are the file");
            at += chunk.len();
            Ok::<(), ()>(())
        };
        cut += chunker.cut(&file[cut..arrived], &mut on).unwrap();
        assert!(arrived - cut < CHUNK_MAX, "what the caller keeps");
        if arrived == file.len() {
            break;
        }
    }
    chunker.end();
    assert_eq!(cut, file.len());
    lengths
}

/// The same from the iterator that the algorithm's crate offers for a file in memory.
fn reference(file: &[u8]) -> Vec<usize> {
    if file.len() <= CHUNK_AVG {
        return if file.is_empty() { Vec::new() } else { vec![file.len()] };
    }
    fastcdc::v2020::FastCDC::new(file, CHUNK_MIN, CHUNK_AVG, CHUNK_MAX).map(|chunk| chunk.length).collect()
}

#[test]
fn short_files_are_one_chunk() {
    for length in [1, 100, CHUNK_MIN, CHUNK_MIN + 1, CHUNK_AVG - 1, CHUNK_AVG] {
        let file = noise(1, length);
        assert_eq!(cuts(&mut Chunker::new(), &file, &[1000]), [length]);
    }
    assert_eq!(cuts(&mut Chunker::new(), &[], &[1000]), [0_usize; 0]);
}

#[test]
fn cuts_are_those_of_the_algorithm() {
    let mut chunker = Chunker::new();
    for length in [CHUNK_AVG + 1, CHUNK_MAX - 1, CHUNK_MAX, CHUNK_MAX + 1, 1 << 20, (1 << 20) + 3] {
        for file in [noise(2, length), vec![0; length]] {
            let expected = reference(&file);
            for pieces in [&[usize::MAX][..], &[1 << 16], &[4096], &[65537, 1], &[100_000, 7, 3000]] {
                assert_eq!(cuts(&mut chunker, &file, pieces), expected, "{length} bytes in {pieces:?}");
            }
            assert!(expected.iter().all(|length| *length <= CHUNK_MAX));
            let (_, but_last) = expected.split_last().expect("a chunk");
            assert!(but_last.iter().all(|length| *length >= CHUNK_MIN));
        }
    }
}

/// An insertion moves the cuts near it and no others.
#[test]
fn edits_are_local() {
    let file = noise(3, 4 << 20);
    let edited = [&file[..2 << 20], b"an insertion", &file[2 << 20..]].concat();
    let ends = |file: &[u8]| -> std::collections::BTreeSet<usize> {
        let length = file.len();
        let mut at = 0;
        let from_end = |chunk: usize| {
            at += chunk;
            length - at
        };
        reference(file).into_iter().map(from_end).collect()
    };
    let (before, after) = (ends(&file), ends(&edited));
    let behind = |ends: &std::collections::BTreeSet<usize>| -> Vec<usize> {
        ends.iter().copied().filter(|end| *end < (2 << 20) - 8 * CHUNK_MAX).collect()
    };
    assert_eq!(behind(&before), behind(&after));
}

#[test]
#[should_panic(expected = "as many bytes as it began with")]
fn more_bytes_than_announced() {
    let mut chunker = Chunker::new();
    chunker.begin(3);
    let _ = chunker.cut(b"four", &mut |_| Ok::<(), ()>(()));
}

#[test]
#[should_panic(expected = "as many bytes as it began with")]
fn fewer_bytes_than_announced() {
    let mut chunker = Chunker::new();
    chunker.begin(5);
    assert_eq!(chunker.cut(b"four", &mut |_| Ok::<(), ()>(())), Ok(0), "the rest may still come");
    chunker.end();
}

#[test]
fn the_first_error_ends_it() {
    let mut chunker = Chunker::new();
    chunker.begin(1 << 20);
    let mut calls = 0;
    let mut refuse = |_: &[u8]| {
        calls += 1;
        Err("no")
    };
    assert_eq!(chunker.cut(&noise(4, 1 << 20), &mut refuse), Err("no"));
    assert_eq!(calls, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn cuts_do_not_depend_on_pushes(
        seed in any::<u64>(),
        length in 0..400_000_usize,
        // Long runs of one byte have no places to cut at.
        flat in 0..200_000_usize,
        pieces in prop::collection::vec(1..150_000_usize, 1..6),
    ) {
        let mut file = noise(seed, length);
        let flat = flat.min(length);
        file[length - flat..].fill(7);
        prop_assert_eq!(cuts(&mut Chunker::new(), &file, &pieces), reference(&file));
    }
}
