//! A NAR goes out: the exact inverse of `ingest`.
//!
//! Before the first byte, every chunk is looked up: a NAR that cannot be completed is refused, never cut short. Then the
//! manifest is read part by part; the chunks of the next stretches are fetched while the last one is being sent, patched,
//! and framed as a NAR. Memory is bounded by the stretches ahead: each has 2 MiB of content and structure, and its chunks
//! come out of at most 128 decoded frames of 256 KiB, mostly out of 8.

use bytes::Bytes;
use futures::stream::try_unfold;
use futures::{Stream, StreamExt, TryStreamExt};
use narlake_format::error::FormatError;
use narlake_format::id::{BlobId, BlobKind};
use narlake_format::lake::manifest::ManifestEvent;
use narlake_format::lake::scrub::{Patch, PatchList, Restorer};
use narlake_format::lake::strings::StringTable;
use narlake_format::nar::{Event, Writer};

use crate::error::Error;
use crate::fetch::Fetcher;
use crate::manifest::Manifest;

/// Bytes of a stretch: raw chunks, names and targets, and the memory of the steps themselves.
const STRETCH_BYTES: usize = 2 << 20;
/// Chunks fetched together, each of which may lie in a frame of its own.
const STRETCH_CHUNKS: usize = 128;
/// Stretches in memory: one being sent, the others on their way.
const STRETCHES_AHEAD: usize = 3;

/// What to write next, owned: a manifest's event with its patches joined to the chunk they start in.
enum Step {
    Directory,
    Entry(Vec<u8>),
    EndDirectory,
    Symlink(Vec<u8>, Vec<Patch>),
    BeginFile(bool, u64),
    /// The next chunk fetched, and the patches that start in it.
    Chunk(Vec<Patch>),
    EndFile,
}

/// The NAR of a tree, as buffers of up to a few megabytes, ending in an error where something does not verify.
///
/// Cancel safe: dropping the stream stops it.
pub(crate) fn nar(
    fetcher: Fetcher,
    manifest: Manifest,
    strings: &StringTable,
    path: String,
) -> impl Stream<Item = Result<Bytes, Error>> + Send + use<> {
    let mut assembler =
        Assembler { restorer: Restorer::new(strings), strings: strings.clone(), writer: Writer::new(), path };
    stretches(fetcher.clone(), manifest)
        .map(move |stretch| {
            let fetcher = fetcher.clone();
            async move {
                let stretch = stretch?;
                let chunks = fetcher.fetch(&stretch.chunks).await?;
                Ok((stretch.steps, chunks))
            }
        })
        .buffered(STRETCHES_AHEAD)
        .map(move |fetched| fetched.and_then(|(steps, chunks)| assembler.write(steps, chunks)))
}

/// A run of steps and the chunks they need, in order.
#[derive(Default)]
struct Stretch {
    steps: Vec<Step>,
    chunks: Vec<(BlobKind, BlobId)>,
    bytes: usize,
}

/// Cuts a manifest into stretches of about [`STRETCH_BYTES`].
fn stretches(fetcher: Fetcher, manifest: Manifest) -> impl Stream<Item = Result<Stretch, Error>> + Send {
    // A part may end between a chunk and its patches, so the last stretch of each part waits for the next part.
    let state = (fetcher, Some(manifest), Stretch::default());
    let batches = try_unfold(state, |(fetcher, manifest, open)| async move {
        let Some(mut manifest) = manifest else { return Ok::<_, Error>(None) };
        let mut stretches = vec![open];
        let more = manifest
            .next_part(&fetcher, |event| {
                match stretches.last_mut() {
                    Some(open) if open.has_room_for(&event) => open.take(event),
                    _ => {
                        let mut next = Stretch::default();
                        next.take(event);
                        stretches.push(next);
                    }
                }
                Ok(())
            })
            .await?;
        let open = if more { stretches.pop().unwrap_or_default() } else { Stretch::default() };
        Ok(Some((stretches, (fetcher, more.then_some(manifest), open))))
    });
    batches.map_ok(|stretches| futures::stream::iter(stretches.into_iter().map(Ok))).try_flatten()
}

impl Stretch {
    /// Whether this stretch takes the event. Patches stay with their chunk.
    fn has_room_for(&self, event: &ManifestEvent<'_>) -> bool {
        let open = self.bytes < STRETCH_BYTES && self.chunks.len() < STRETCH_CHUNKS;
        open || matches!(event, ManifestEvent::Patch(_))
    }

    fn take(&mut self, event: ManifestEvent<'_>) {
        self.bytes += match &event {
            ManifestEvent::Patch(_) => size_of::<Patch>(),
            ManifestEvent::Entry { name } => size_of::<Step>() + name.len(),
            ManifestEvent::Symlink { target, patches } => size_of::<Step>() + target.len() + size_of_val(*patches),
            ManifestEvent::Chunk { length, .. } => size_of::<Step>() + *length as usize,
            _ => size_of::<Step>(),
        };
        self.steps.push(match event {
            ManifestEvent::Directory => Step::Directory,
            ManifestEvent::Entry { name } => Step::Entry(name.to_vec()),
            ManifestEvent::EndDirectory => Step::EndDirectory,
            ManifestEvent::Symlink { target, patches } => Step::Symlink(target.to_vec(), patches.to_vec()),
            ManifestEvent::BeginFile { executable, size } => Step::BeginFile(executable, size),
            ManifestEvent::Chunk { id, .. } => {
                self.chunks.push((BlobKind::Chunk, id.into()));
                Step::Chunk(Vec::new())
            }
            ManifestEvent::Patch(patch) => {
                if let Some(Step::Chunk(patches)) = self.steps.last_mut() {
                    patches.push(patch);
                }
                return;
            }
            ManifestEvent::EndFile { .. } => Step::EndFile,
        });
    }
}

/// Restores and frames what the stretches bring.
struct Assembler {
    restorer: Restorer,
    strings: StringTable,
    writer: Writer,
    path: String,
}

impl Assembler {
    fn write(&mut self, steps: Vec<Step>, chunks: Vec<Bytes>) -> Result<Bytes, Error> {
        let mut out = Vec::with_capacity(chunks.iter().map(Bytes::len).sum::<usize>() + steps.len() * 128);
        let mut chunks = chunks.into_iter();
        for step in steps {
            let event = match &step {
                Step::Directory => Event::Directory,
                Step::Entry(name) => Event::Entry { name },
                Step::EndDirectory => Event::EndDirectory,
                Step::BeginFile(executable, size) => Event::File { executable: *executable, size: *size },
                Step::EndFile => {
                    let restorer = std::mem::replace(&mut self.restorer, Restorer::new(&self.strings));
                    restorer.finish().map_err(|e| self.wrong(e))?;
                    Event::EndFile
                }
                Step::Symlink(target, patches) => {
                    let mut target = target.clone();
                    let length = target.len() as u64;
                    let patches = PatchList::resolve(patches, &self.strings, length).map_err(|e| self.wrong(e))?;
                    patches.restore(0, &mut target);
                    self.writer.event(Event::Symlink { target: &target }, &mut out)?;
                    continue;
                }
                Step::Chunk(patches) => {
                    let chunk = chunks.next().unwrap_or_default();
                    let start = out.len();
                    self.writer.event(Event::Data(&chunk), &mut out)?;
                    let written = out.get_mut(start..).unwrap_or_default();
                    self.restorer
                        .chunk(written, patches)
                        .map_err(|e| Error::Format { key: self.path.clone(), source: e })?;
                    continue;
                }
            };
            self.writer.event(event, &mut out)?;
        }
        Ok(out.into())
    }

    fn wrong(&self, source: FormatError) -> Error {
        Error::Format { key: self.path.clone(), source }
    }
}
