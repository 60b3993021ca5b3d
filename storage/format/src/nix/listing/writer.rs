//! The text of a listing from the events of a tree.

use std::io::Write as _;

use super::{Event, ListingError};
use crate::nar::Writer;

/// Writes a listing while a tree is walked.
///
/// [`Event::Data`] may be left out: a file's end stands for all of its content, which a listing only needs the length
/// of.
pub struct ListingWriter {
    /// Counts the offsets, and refuses what is no tree.
    nar: Writer,
    /// Takes the bytes of NAR that nobody wants.
    scratch: Vec<u8>,
    /// Whether each open directory has had an entry.
    open: Vec<bool>,
    /// Content of the open file that has not been seen.
    unseen: u64,
}

impl Default for ListingWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl ListingWriter {
    /// A writer before the root.
    #[must_use]
    pub fn new() -> Self {
        Self { nar: Writer::new(), scratch: Vec::new(), open: Vec::new(), unseen: 0 }
    }

    /// Appends the text of an event to `out`. After an error the text is of no use.
    pub fn event(&mut self, event: Event<'_>, out: &mut Vec<u8>) -> Result<(), ListingError> {
        let first = self.nar.offset() == 0;
        match event {
            Event::Data(data) => {
                self.unseen = self.unseen.saturating_sub(data.len() as u64);
                return Ok(self.nar.skip(data.len() as u64)?);
            }
            Event::EndFile if self.unseen > 0 => self.nar.skip(std::mem::take(&mut self.unseen))?,
            _ => {}
        }
        self.nar.event(event, &mut self.scratch)?;
        self.scratch.clear();
        if first {
            out.extend_from_slice(b"{\"root\":");
        }
        match event {
            Event::Directory => {
                out.extend_from_slice(b"{\"entries\":{");
                self.open.push(false);
            }
            Event::Entry { name } => {
                if let Some(had_entry) = self.open.last_mut()
                    && std::mem::replace(had_entry, true)
                {
                    out.push(b',');
                }
                put_text(name, out)?;
                out.push(b':');
            }
            Event::EndDirectory => {
                self.open.pop();
                out.extend_from_slice(b"},\"type\":\"directory\"}");
            }
            Event::File { executable, size } => {
                self.unseen = size;
                let executable = if executable { "\"executable\":true," } else { "" };
                let offset = self.nar.offset();
                // Writing to a vector does not fail.
                let _ = write!(out, "{{{executable}\"narOffset\":{offset},\"size\":{size},\"type\":\"regular\"}}");
            }
            Event::Symlink { target } => {
                out.extend_from_slice(b"{\"target\":");
                put_text(target, out)?;
                out.extend_from_slice(b",\"type\":\"symlink\"}");
            }
            Event::Data(_) | Event::EndFile => {}
        }
        if self.nar.finish().is_ok() {
            out.extend_from_slice(b",\"version\":1}");
        }
        Ok(())
    }

    /// Checks that the tree is complete.
    pub fn finish(&self) -> Result<(), ListingError> {
        Ok(self.nar.finish()?)
    }
}

fn put_text(text: &[u8], out: &mut Vec<u8>) -> Result<(), ListingError> {
    let valid = str::from_utf8(text).map_err(|_| ListingError::NotUtf8 { text: text.into() })?;
    // Serialising a string to a vector does not fail.
    let _ = serde_json::to_writer(out, valid);
    Ok(())
}
