//! The unavoidable parts of an ingest, each alone, on one thread: what the whole is held against.

use std::collections::HashSet;

use narlake_format::id::{BlobKind, ChunkId};
use narlake_format::lake::chunker::Chunker;
use narlake_format::lake::frame::{FrameContent, FrameEncoder};
use narlake_format::nar::{Event, NarError, Reader};
use sha2::{Digest, Sha256};

use crate::corpus::Item;
use crate::span::Timer;

/// Seconds of processor time that each part takes for a whole generation.
#[derive(Debug, Clone, Copy, Default)]
pub struct Parts {
    /// NarHash.
    pub sha256: f64,
    /// Finding cuts.
    pub cdc: f64,
    /// Chunk ids.
    pub blake3: f64,
    /// Compressing the chunks that differ, in frames.
    pub zstd: f64,
}

impl Parts {
    /// Time for a generation that is all new.
    #[must_use]
    pub fn new_data(&self) -> f64 {
        self.sha256 + self.cdc + self.blake3 + self.zstd
    }

    /// Time for a generation that is known.
    #[must_use]
    pub fn known_data(&self) -> f64 {
        self.sha256 + self.cdc + self.blake3
    }
}

/// Times the parts over a generation.
///
/// # Panics
/// Where a NAR is malformed.
#[must_use]
pub fn measure(items: &[Item], level: i32) -> Parts {
    let mut parts = Parts::default();
    let mut encoder = FrameEncoder::new(level);
    let mut seen: HashSet<ChunkId> = HashSet::new();
    for item in items {
        let timer = Timer::thread();
        std::hint::black_box(Sha256::digest(&item.nar));
        parts.sha256 += timer.stop().cpu;

        let files = files(&item.nar);
        let mut cuts: Vec<(usize, usize)> = Vec::new();
        let timer = Timer::thread();
        let mut chunker = Chunker::new();
        let mut offset = 0;
        for file in &files {
            chunker.begin(file.len() as u64);
            let mut on = |chunk: &[u8]| {
                cuts.push((offset, chunk.len()));
                offset += chunk.len();
                Ok::<(), ()>(())
            };
            chunker.cut(file, &mut on).expect("nothing fails");
            chunker.end();
        }
        parts.cdc += timer.stop().cpu;

        let flat = files.concat();
        let chunks: Vec<&[u8]> = cuts.iter().map(|(at, length)| &flat[*at..at + length]).collect();
        let timer = Timer::thread();
        let ids: Vec<ChunkId> = chunks.iter().map(|chunk| ChunkId::of(chunk)).collect();
        parts.blake3 += timer.stop().cpu;

        let mut frames = vec![FrameContent::default()];
        for (id, chunk) in ids.iter().zip(&chunks) {
            if seen.insert(*id) {
                if frames.last().is_some_and(|frame| frame.is_full_for(chunk.len())) {
                    frames.push(FrameContent::default());
                }
                if let Some(frame) = frames.last_mut() {
                    frame.push(BlobKind::Chunk, (*id).into(), chunk);
                }
            }
        }
        let timer = Timer::thread();
        for frame in frames.iter().filter(|frame| !frame.is_empty()) {
            std::hint::black_box(encoder.encode(frame));
        }
        parts.zstd += timer.stop().cpu;
    }
    parts
}

fn files(nar: &[u8]) -> Vec<Vec<u8>> {
    let mut files = Vec::new();
    let mut reader = Reader::new();
    reader
        .feed(nar, &mut |event| {
            match event {
                Event::File { .. } => files.push(Vec::new()),
                Event::Data(bytes) => files.last_mut().expect("data is in a file").extend_from_slice(bytes),
                _ => {}
            }
            Ok::<(), NarError>(())
        })
        .expect("a NAR");
    files
}
