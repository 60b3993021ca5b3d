//! Compressing and decompressing streams: uploads in whatever form Nix sends them, downloads in the form asked for.
//!
//! The codecs of `async-compression` are state machines over a reader. Here they are given a feed, which holds one
//! buffer and answers "not yet" when that is used up, and are run on the blocking pool, one step at a time: a step takes
//! what was fed and yields at most 128 KiB. So no codec ever runs on a runtime thread, none holds a blocking
//! thread while its client is slow, and none can be made to fill memory: what a few bytes expand to comes out step by
//! step, against the limits of [`Bounds`], and only as fast as it is taken.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use async_compression::Level;
use async_compression::tokio::bufread as codec;
use async_compression::zstd::DParameter;
use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream, StreamExt as _};
use narlake_format::nix::compression::Compression;
use tokio::io::{AsyncBufRead, AsyncRead, ReadBuf};

/// Most bytes that one step of a codec yields.
const STEP_BYTES: usize = 128 * 1024;

/// Bytes that may come out of a decoder before the ratio counts: a small NAR of zeros is no attack.
const EXPANSION_FREE_BYTES: u64 = 64 << 20;

/// Most memory that the decoder of a NAR may take for its window or dictionary, in bytes. `xz -9` needs 65 MiB, and
/// `zstd --ultra -22` makes windows of just this size; those of `--long=31` are larger.
pub const DECODER_BYTES_MAX: u64 = 128 << 20;

/// A stream of bytes that may break off.
pub type ByteStream = BoxStream<'static, io::Result<Bytes>>;

/// What may come out of a stream at most.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Most bytes.
    pub bytes_max: u64,
    /// Most bytes for each byte that went in, beyond the first 64 MiB.
    pub expansion_max: u64,
    /// Most memory that the decoder may take for its window or dictionary, in bytes.
    pub decoder_bytes_max: u64,
}

/// What is wrong with a compressed stream. It travels inside an [`io::Error`].
#[derive(Debug, thiserror::Error)]
pub enum CodingError {
    /// The bytes are not of that compression, are damaged or end early, or ask for more memory than allowed.
    #[error("the body is not a whole {compression} stream, after {output} decompressed bytes")]
    Malformed {
        /// The compression it should have.
        compression: Compression,
        /// Bytes that had come out before.
        output: u64,
        /// What the decoder said.
        #[source]
        source: io::Error,
    },
    /// More came out than is allowed.
    #[error("the body has more than {bytes_max} bytes")]
    TooLarge {
        /// The limit, in bytes.
        bytes_max: u64,
    },
    /// Few bytes expand to very many.
    #[error("the body expands more than {expansion_max} times: {input} bytes to over {output}")]
    Expansion {
        /// Bytes received.
        input: u64,
        /// Bytes they expanded to so far.
        output: u64,
        /// The limit.
        expansion_max: u64,
    },
}

impl CodingError {
    /// The error inside an I/O error, if it is one of these.
    #[must_use]
    pub fn within(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

/// Whether streams of this compression can be read and written here.
#[must_use]
pub const fn is_supported(compression: Compression) -> bool {
    match compression {
        Compression::None
        | Compression::Brotli
        | Compression::Bzip2
        | Compression::Gzip
        | Compression::Xz
        | Compression::Zstd => true,
        Compression::Lz4 | Compression::Lzip | Compression::Lzma => false,
    }
}

/// Decompresses a stream, within bounds. Concatenated streams count as one, as for the command-line tools.
///
/// # Panics
/// Where the compression is not [supported](is_supported); the caller refuses such a stream beforehand.
#[must_use]
pub fn decode(input: ByteStream, compression: Compression, bounds: Bounds) -> ByteStream {
    if compression == Compression::None {
        return bound(input, None, bounds);
    }
    let (feed, slot) = Feed::new();
    let reader: Box<dyn AsyncRead + Send + Unpin> = match compression {
        Compression::Brotli => members(codec::BrotliDecoder::new(feed), codec::BrotliDecoder::multiple_members),
        Compression::Bzip2 => members(codec::BzDecoder::new(feed), codec::BzDecoder::multiple_members),
        Compression::Gzip => members(codec::GzipDecoder::new(feed), codec::GzipDecoder::multiple_members),
        Compression::Xz => members(
            codec::XzDecoder::with_mem_limit(feed, bounds.decoder_bytes_max),
            codec::XzDecoder::multiple_members,
        ),
        Compression::Zstd => members(
            codec::ZstdDecoder::with_params(feed, &[DParameter::window_log_max(window_log(bounds.decoder_bytes_max))]),
            codec::ZstdDecoder::multiple_members,
        ),
        Compression::None | Compression::Lz4 | Compression::Lzip | Compression::Lzma => {
            panic!("{compression} streams are refused before they are decoded")
        }
    };
    let received = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&received);
    let counted = input.inspect(move |item| {
        if let Ok(bytes) = item {
            counter.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
    });
    let codec = Codec { reader, slot, decodes: Some(compression), output: 0 };
    bound(run(counted.boxed(), codec), Some(received), bounds)
}

/// The largest window, as a power of two, that a zstd decoder may be asked for.
fn window_log(bytes_max: u64) -> u32 {
    // Those are the bounds of zstd itself.
    bytes_max.max(1).ilog2().clamp(10, 31)
}

/// Compresses a stream at a level that favours speed: it is done anew for each download.
///
/// # Panics
/// Where the compression is not [supported](is_supported); no URL with such a suffix exists.
#[must_use]
pub fn encode(input: ByteStream, compression: Compression) -> ByteStream {
    let (feed, slot) = Feed::new();
    let reader: Box<dyn AsyncRead + Send + Unpin> = match compression {
        Compression::None => return input,
        Compression::Brotli => Box::new(codec::BrotliEncoder::with_quality(feed, Level::Precise(1))),
        Compression::Bzip2 => Box::new(codec::BzEncoder::with_quality(feed, Level::Fastest)),
        Compression::Gzip => Box::new(codec::GzipEncoder::with_quality(feed, Level::Fastest)),
        Compression::Xz => Box::new(codec::XzEncoder::with_quality(feed, Level::Precise(0))),
        Compression::Zstd => Box::new(codec::ZstdEncoder::with_quality(feed, Level::Precise(1))),
        Compression::Lz4 | Compression::Lzip | Compression::Lzma => {
            panic!("{compression} streams are never offered")
        }
    };
    run(input, Codec { reader, slot, decodes: None, output: 0 })
}

fn members<D: AsyncRead + Send + Unpin + 'static>(
    mut decoder: D,
    multiple_members: fn(&mut D, bool),
) -> Box<dyn AsyncRead + Send + Unpin> {
    multiple_members(&mut decoder, true);
    Box::new(decoder)
}

/// What a codec reads from: one buffer, then "not yet" until the next one.
struct Feed {
    slot: Arc<Mutex<Slot>>,
    current: Bytes,
}

/// Where the next buffer is left for a feed.
enum Slot {
    Empty,
    Full(Bytes),
    End,
}

impl Feed {
    fn new() -> (Self, Arc<Mutex<Slot>>) {
        let slot = Arc::new(Mutex::new(Slot::Empty));
        (Self { slot: Arc::clone(&slot), current: Bytes::new() }, slot)
    }
}

impl AsyncRead for Feed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let available = std::task::ready!(self.as_mut().poll_fill_buf(cx))?;
        let length = available.len().min(buf.remaining());
        buf.put_slice(available.get(..length).unwrap_or_default());
        self.consume(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncBufRead for Feed {
    fn poll_fill_buf(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let feed = self.get_mut();
        if feed.current.is_empty() {
            let mut slot = feed.slot.lock().unwrap_or_else(PoisonError::into_inner);
            match std::mem::replace(&mut *slot, Slot::Empty) {
                // Nobody waits on the context: a step ends here, and the next one begins once there is more.
                Slot::Empty => return Poll::Pending,
                Slot::Full(bytes) => feed.current = bytes,
                Slot::End => *slot = Slot::End,
            }
        }
        Poll::Ready(Ok(&feed.current))
    }

    fn consume(self: Pin<&mut Self>, length: usize) {
        let current = &mut self.get_mut().current;
        let _ = current.split_to(length.min(current.len()));
    }
}

/// A codec and where its input is left.
struct Codec {
    reader: Box<dyn AsyncRead + Send + Unpin>,
    slot: Arc<Mutex<Slot>>,
    decodes: Option<Compression>,
    output: u64,
}

/// How a step ended.
enum Step {
    /// These bytes came out, and more may without further input.
    Output(Bytes),
    /// These bytes came out, then the input was used up.
    Starved(Bytes),
    /// These bytes came out, and they were the last.
    End(Bytes),
}

impl Codec {
    fn feed(&self, next: Slot) {
        *self.slot.lock().unwrap_or_else(PoisonError::into_inner) = next;
    }

    /// Runs the codec over what it was fed, on the thread of the caller.
    fn step(&mut self) -> io::Result<Step> {
        let mut output = BytesMut::zeroed(STEP_BYTES);
        let mut buffer = ReadBuf::new(&mut output);
        let mut context = Context::from_waker(Waker::noop());
        let end = loop {
            let before = buffer.filled().len();
            match Pin::new(&mut self.reader).poll_read(&mut context, &mut buffer) {
                Poll::Pending => break Step::Starved as fn(Bytes) -> Step,
                Poll::Ready(Err(error)) => return Err(self.explain(error)),
                Poll::Ready(Ok(())) if buffer.filled().len() == before => break Step::End,
                Poll::Ready(Ok(())) if buffer.remaining() == 0 => break Step::Output,
                Poll::Ready(Ok(())) => {}
            }
        };
        let length = buffer.filled().len();
        output.truncate(length);
        self.output += length as u64;
        Ok(end(output.freeze()))
    }

    fn explain(&self, source: io::Error) -> io::Error {
        match self.decodes {
            Some(compression) => io::Error::other(CodingError::Malformed { compression, output: self.output, source }),
            None => source,
        }
    }
}

/// The driver of a codec: feeds it from the input, one step after the other.
fn run(input: ByteStream, codec: Codec) -> ByteStream {
    // `None` stands for "the stream has ended", after the last bytes or an error.
    stream::try_unfold((input, Some((codec, true))), |(mut input, state)| async move {
        let Some((mut codec, mut starved)) = state else { return Ok(None) };
        loop {
            if starved {
                let next = match input.next().await.transpose()? {
                    Some(bytes) if bytes.is_empty() => continue,
                    Some(bytes) => Slot::Full(bytes),
                    None => Slot::End,
                };
                codec.feed(next);
            }
            let (returned, step) = tokio::task::spawn_blocking(move || {
                let step = codec.step();
                (codec, step)
            })
            .await
            .map_err(io::Error::other)?;
            codec = returned;
            match step? {
                Step::Output(bytes) => return Ok(Some((bytes, (input, Some((codec, false)))))),
                Step::Starved(bytes) if bytes.is_empty() => starved = true,
                Step::Starved(bytes) => return Ok(Some((bytes, (input, Some((codec, true)))))),
                Step::End(bytes) if bytes.is_empty() => return Ok(None),
                Step::End(bytes) => return Ok(Some((bytes, (input, None)))),
            }
        }
    })
    .boxed()
}

/// Ends a stream with an error once it goes beyond its bounds; `received` counts what a decoder was given.
fn bound(input: ByteStream, received: Option<Arc<AtomicU64>>, bounds: Bounds) -> ByteStream {
    let Bounds { bytes_max, expansion_max, .. } = bounds;
    let mut output = 0_u64;
    input
        .map(move |item| {
            let bytes = item?;
            output += bytes.len() as u64;
            if output > bytes_max {
                return Err(io::Error::other(CodingError::TooLarge { bytes_max }));
            }
            let input = received.as_ref().map_or(u64::MAX, |received| received.load(Ordering::Relaxed));
            if output > EXPANSION_FREE_BYTES && output / expansion_max > input {
                return Err(io::Error::other(CodingError::Expansion { input, output, expansion_max }));
            }
            Ok(bytes)
        })
        .boxed()
}

#[cfg(test)]
mod tests;
