//! Every compression there and back, and everything that is none.

use futures::TryStreamExt as _;

use super::*;

const SUPPORTED: [Compression; 6] =
    [Compression::None, Compression::Brotli, Compression::Bzip2, Compression::Gzip, Compression::Xz, Compression::Zstd];

const WIDE: Bounds = Bounds { bytes_max: u64::MAX, expansion_max: u64::MAX, decoder_bytes_max: DECODER_BYTES_MAX };

/// A stream of pieces of this size.
fn pieces(bytes: &[u8], size: usize) -> ByteStream {
    let pieces: Vec<io::Result<Bytes>> = bytes.chunks(size).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    stream::iter(pieces).boxed()
}

async fn collect(stream: ByteStream) -> Result<Vec<u8>, io::Error> {
    stream
        .try_fold(Vec::new(), |mut all, bytes| async move {
            all.extend_from_slice(&bytes);
            Ok(all)
        })
        .await
}

async fn encoded(bytes: &[u8], compression: Compression) -> Vec<u8> {
    collect(encode(pieces(bytes, 10_000), compression)).await.unwrap()
}

/// Text that compresses, but not to nothing.
fn sample(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    (0..length)
        .map(|at| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if at % 3 == 0 { state.to_le_bytes()[3] } else { b'x' }
        })
        .collect()
}

#[test]
fn what_is_supported_is_what_is_tested() {
    for compression in Compression::ALL {
        assert_eq!(is_supported(compression), SUPPORTED.contains(&compression), "{compression}");
    }
}

#[tokio::test]
async fn every_compression_round_trips_whatever_the_pieces() {
    for compression in SUPPORTED {
        for length in [0, 1, STEP_BYTES, 700_001] {
            let plain = sample(length);
            let packed = encoded(&plain, compression).await;
            for size in [1 << 20, 4093, 1].into_iter().filter(|size| packed.len() / size < 10_000) {
                let unpacked = collect(decode(pieces(&packed, size), compression, WIDE)).await.unwrap();
                assert!(unpacked == plain, "{compression}, {length} bytes in pieces of {size}");
            }
        }
    }
}

#[tokio::test]
async fn concatenated_streams_are_one() {
    for compression in [Compression::Bzip2, Compression::Gzip, Compression::Xz, Compression::Zstd] {
        let (first, second) = (sample(5000), sample(70_000));
        let packed = [encoded(&first, compression).await, encoded(&second, compression).await].concat();
        let unpacked = collect(decode(pieces(&packed, 999), compression, WIDE)).await.unwrap();
        assert!(unpacked == [first, second].concat(), "{compression}");
    }
}

#[tokio::test]
async fn what_is_cut_short_or_damaged_or_followed_by_something_else_is_an_error() {
    for compression in SUPPORTED.into_iter().filter(|compression| *compression != Compression::None) {
        let packed = encoded(&sample(50_000), compression).await;
        let mut damaged = packed.clone();
        damaged.truncate(packed.len() / 2);
        damaged.resize(packed.len(), 0xa5);
        let cut = &packed[..packed.len() - 1];
        let followed = [packed.as_slice(), b"and then some"].concat();
        for (what, bytes) in
            [("damaged", damaged.as_slice()), ("cut", cut), ("followed", &followed), ("other", b"plain")]
        {
            let error = collect(decode(pieces(bytes, 1000), compression, WIDE)).await.expect_err(what);
            assert!(matches!(CodingError::within(&error), Some(CodingError::Malformed { .. })), "{compression} {what}");
        }
    }
}

#[tokio::test]
async fn a_bomb_ends_at_the_ratio_or_at_the_limit() {
    let zeros = vec![0; 4 << 20];
    for compression in [Compression::Zstd, Compression::Xz, Compression::Brotli] {
        // Streams may be concatenated, so a large bomb is a small one repeated.
        let mut packed = encoded(&zeros, compression).await;
        if compression != Compression::Brotli {
            packed = packed.repeat(32);
        }
        let bounds = Bounds { bytes_max: 1 << 20, expansion_max: u64::MAX, decoder_bytes_max: DECODER_BYTES_MAX };
        let error = collect(decode(pieces(&packed, 1000), compression, bounds)).await.unwrap_err();
        assert!(matches!(CodingError::within(&error), Some(CodingError::TooLarge { .. })), "{error}");
    }
    let packed = encoded(&zeros, Compression::Zstd).await.repeat(32);
    let bounds = Bounds { bytes_max: u64::MAX, expansion_max: 1000, decoder_bytes_max: DECODER_BYTES_MAX };
    let error = collect(decode(pieces(&packed, 1000), Compression::Zstd, bounds)).await.unwrap_err();
    assert!(matches!(CodingError::within(&error), Some(CodingError::Expansion { .. })), "{error}");
}

#[tokio::test]
async fn an_error_of_the_input_comes_out_as_it_went_in() {
    for compression in SUPPORTED {
        let packed = encoded(&sample(50_000), compression).await;
        let broken = pieces(&packed[..packed.len() / 2], 1000)
            .chain(stream::iter([Err(io::Error::new(io::ErrorKind::TimedOut, "idle"))]))
            .boxed();
        let error = collect(decode(broken, compression, WIDE)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{compression}");
    }
}
