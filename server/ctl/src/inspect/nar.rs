//! NARs: what they hold, read as they come.

use std::io::{BufRead, ErrorKind};

use anyhow::Context as _;
use narlake_format::nar::{Event, MAGIC, NarError, Reader};
use narlake_format::nix::hash::Sha256Hasher;

use super::finding::{Finding, Value};
use crate::tree::Offsets;

/// Bytes that are read at once.
pub(super) const PIECE: usize = 256 * 1024;

/// Whether bytes start as a NAR does.
pub(super) fn is_nar(head: &[u8]) -> bool {
    head.strip_prefix(&(MAGIC.len() as u64).to_le_bytes()).is_some_and(|rest| rest.starts_with(MAGIC))
}

/// Reads a NAR to its end.
pub(super) fn inspect(source: &mut impl BufRead, entries: bool) -> anyhow::Result<Finding> {
    let (mut reader, mut hasher) = (Reader::new(), Sha256Hasher::new());
    let mut contents = Contents { rows: entries.then(Vec::new), ..Contents::default() };
    loop {
        let piece = match source.fill_buf() {
            Ok(piece) => piece,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("read"),
        };
        if piece.is_empty() {
            break;
        }
        hasher.update(piece);
        reader.feed(piece, &mut |event| contents.take(event))?;
        let length = piece.len();
        source.consume(length);
    }
    reader.finish()?;
    let hash = hasher.finish();
    let facts = vec![
        ("nar_hash", Value::text(hash)),
        ("nar_hash_sri", Value::text(hash.to_sri())),
        ("nar_size", reader.offset().into()),
        ("directories", contents.directories.into()),
        ("files", contents.files.into()),
        ("executables", contents.executables.into()),
        ("symlinks", contents.symlinks.into()),
        ("file_bytes", contents.bytes.into()),
        ("largest_file", contents.largest.into()),
    ];
    let finding = Finding::new("NAR", facts);
    Ok(match contents.rows {
        Some(rows) => finding.with("entries", &["path", "type", "size", "executable", "nar_offset", "target"], rows),
        None => finding,
    })
}

/// What was met so far.
#[derive(Default)]
struct Contents {
    directories: u64,
    files: u64,
    executables: u64,
    symlinks: u64,
    bytes: u64,
    largest: u64,
    offsets: Offsets,
    /// The path of the node that comes next, and the lengths of those of the directories that are open.
    path: Vec<u8>,
    open: Vec<usize>,
    rows: Option<Vec<Vec<Value>>>,
}

impl Contents {
    fn take(&mut self, event: Event<'_>) -> Result<(), NarError> {
        let offset = self.offsets.after(event)?;
        match event {
            Event::Directory => {
                self.directories += 1;
                self.row("directory", Value::None, false, Value::None, Value::None);
                self.open.push(self.path.len());
            }
            Event::Entry { name } => {
                self.path.truncate(self.open.last().copied().unwrap_or_default());
                if !self.path.is_empty() {
                    self.path.push(b'/');
                }
                self.path.extend_from_slice(name);
            }
            Event::EndDirectory => drop(self.open.pop()),
            Event::File { executable, size } => {
                self.files += 1;
                self.executables += u64::from(executable);
                self.bytes += size;
                self.largest = self.largest.max(size);
                self.row("regular", size.into(), executable, offset.into(), Value::None);
            }
            Event::Symlink { target } => {
                self.symlinks += 1;
                self.row("symlink", Value::None, false, Value::None, Value::text(String::from_utf8_lossy(target)));
            }
            Event::Data(_) | Event::EndFile => {}
        }
        Ok(())
    }

    fn row(&mut self, kind: &str, size: Value, executable: bool, offset: Value, target: Value) {
        let Some(rows) = &mut self.rows else { return };
        let path = if self.path.is_empty() { ".".into() } else { String::from_utf8_lossy(&self.path) };
        rows.push(vec![Value::text(path), Value::text(kind), size, executable.into(), offset, target]);
    }
}
