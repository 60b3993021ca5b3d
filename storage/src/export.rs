//! A NAR goes out: the exact inverse of `ingest`.
//!
//! Before the first byte, every chunk is looked up: a NAR that cannot be completed is refused, never cut short. Then the
//! manifest is read part by part; the chunks of the next stretch are fetched while the last one is being sent, patched,
//! and framed as a NAR. Memory is bounded by two stretches.

use std::collections::HashSet;

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

/// Raw bytes of chunks fetched together.
const STRETCH_BYTES: usize = 2 << 20;
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

/// Looks every blob of a tree up. `sound` says whether a chunk that has a place may be relied on.
///
/// # Errors
/// `Corrupt` where one is nowhere or not sound, naming it.
pub(crate) async fn check_complete(
    fetcher: &Fetcher,
    mut manifest: Manifest,
    sound: impl Fn(&BlobId) -> bool,
) -> Result<(), Error> {
    loop {
        let mut chunks = HashSet::new();
        let more = manifest
            .next_part(fetcher, |event| {
                if let ManifestEvent::Chunk { id, .. } = event {
                    chunks.insert(BlobId::from(id));
                }
                Ok(())
            })
            .await?;
        if !more {
            return Ok(());
        }
        let chunks: Vec<BlobId> = chunks.into_iter().collect();
        fetcher.locate(BlobKind::Chunk, &chunks).await?;
        if let Some(id) = chunks.iter().find(|id| !sound(id)) {
            return Err(Error::MissingBlob { kind: BlobKind::Chunk, id: *id });
        }
    }
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
        self.bytes < STRETCH_BYTES || matches!(event, ManifestEvent::Patch(_))
    }

    fn take(&mut self, event: ManifestEvent<'_>) {
        self.steps.push(match event {
            ManifestEvent::Directory => Step::Directory,
            ManifestEvent::Entry { name } => Step::Entry(name.to_vec()),
            ManifestEvent::EndDirectory => Step::EndDirectory,
            ManifestEvent::Symlink { target, patches } => Step::Symlink(target.to_vec(), patches.to_vec()),
            ManifestEvent::BeginFile { executable, size } => Step::BeginFile(executable, size),
            ManifestEvent::Chunk { id, length } => {
                self.bytes += length as usize;
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
