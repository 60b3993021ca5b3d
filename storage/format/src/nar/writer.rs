//! Writes a NAR from events.
//!
//! Checks what the reader checks, so that nothing it has written is ever refused on the way back in. The caller may
//! send file content past the writer ([`Writer::skip`]), which is how a NAR's size, or the place of a file in it, is
//! found without the content.

use super::order::{Tree, check_size, check_target, limit};
use super::{Event, MAGIC, NarError, padding};
use crate::limits::NAR_SIZE_MAX;

/// What may come next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// A node: the root, or that of an entry.
    Node,
    /// An entry of the open directory, or its end.
    Entries,
    /// Content of the open file, or its end when none remains.
    Content {
        remaining: u64,
        size: u64,
    },
    Done,
    Failed,
}

/// A NAR serialiser.
pub struct Writer {
    state: State,
    tree: Tree,
    offset: u64,
}

impl Default for Writer {
    fn default() -> Self {
        Self::new()
    }
}

impl Writer {
    /// A writer at the start of a NAR.
    #[must_use]
    pub fn new() -> Self {
        Self { state: State::Node, tree: Tree::default(), offset: 0 }
    }

    /// Bytes of NAR so far, skipped content included.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Appends the bytes of an event to `out`.
    ///
    /// After an error every further call fails, and what was written is of no use.
    pub fn event(&mut self, event: Event<'_>, out: &mut Vec<u8>) -> Result<(), NarError> {
        let start = out.len();
        let result = self.write(event, out);
        self.offset += (out.len() - start) as u64;
        self.guard(result.and_then(|()| limit("size", self.offset, NAR_SIZE_MAX, self.offset)))
    }

    /// Counts content of the open file that the caller puts behind the bytes written so far by other means.
    pub fn skip(&mut self, length: u64) -> Result<(), NarError> {
        let result = self.take(length);
        self.offset += length;
        self.guard(result)
    }

    /// Checks that the tree is complete.
    pub fn finish(&self) -> Result<(), NarError> {
        match self.state {
            State::Done => Ok(()),
            State::Failed => Err(NarError::Failed { offset: self.offset }),
            _ => Err(NarError::Event { event: "end", offset: self.offset }),
        }
    }

    fn guard(&mut self, result: Result<(), NarError>) -> Result<(), NarError> {
        if result.is_err() {
            self.state = State::Failed;
        }
        result
    }

    fn write(&mut self, event: Event<'_>, out: &mut Vec<u8>) -> Result<(), NarError> {
        let offset = self.offset;
        match (self.state, event) {
            (State::Failed, _) => return Err(NarError::Failed { offset }),
            (State::Node, Event::Directory) => {
                self.tree.open(offset)?;
                self.node(b"directory", out)?;
                self.state = State::Entries;
            }
            (State::Node, Event::File { executable, size }) => {
                self.node(b"regular", out)?;
                if executable {
                    strings(&[b"executable", b""], out);
                }
                strings(&[b"contents"], out);
                // From the start of this event's bytes, which is near enough for a limit.
                check_size(size, offset)?;
                out.extend_from_slice(&size.to_le_bytes());
                self.state = State::Content { remaining: size, size };
            }
            (State::Node, Event::Symlink { target }) => {
                check_target(target, offset)?;
                self.node(b"symlink", out)?;
                strings(&[b"target", target, b")"], out);
                self.after_node(out);
            }
            (State::Entries, Event::Entry { name }) => {
                self.tree.entry(name, offset)?;
                strings(&[b"entry", b"(", b"name", name, b"node"], out);
                self.state = State::Node;
            }
            (State::Entries, Event::EndDirectory) => {
                self.tree.close();
                strings(&[b")"], out);
                self.after_node(out);
            }
            (State::Content { .. }, Event::Data(data)) => {
                self.take(data.len() as u64)?;
                out.extend_from_slice(data);
            }
            (State::Content { remaining: 0, size }, Event::EndFile) => {
                zeros(size, out);
                strings(&[b")"], out);
                self.after_node(out);
            }
            _ => return Err(NarError::Event { event: event.name(), offset }),
        }
        Ok(())
    }

    fn take(&mut self, length: u64) -> Result<(), NarError> {
        match self.state {
            State::Failed => Err(NarError::Failed { offset: self.offset }),
            State::Content { remaining, size } if length <= remaining => {
                self.state = State::Content { remaining: remaining - length, size };
                Ok(())
            }
            _ => Err(NarError::Event { event: "data", offset: self.offset }),
        }
    }

    fn node(&mut self, kind: &[u8], out: &mut Vec<u8>) -> Result<(), NarError> {
        self.tree.node(self.offset)?;
        if self.offset == 0 {
            strings(&[MAGIC], out);
        }
        strings(&[b"(", b"type", kind], out);
        Ok(())
    }

    fn after_node(&mut self, out: &mut Vec<u8>) {
        if self.tree.is_inside() {
            strings(&[b")"], out);
            self.state = State::Entries;
        } else {
            self.state = State::Done;
        }
    }
}

fn strings(strings: &[&[u8]], out: &mut Vec<u8>) {
    for string in strings {
        let length = string.len() as u64;
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(string);
        zeros(length, out);
    }
}

/// The zeros that follow a string of this length.
fn zeros(length: u64, out: &mut Vec<u8>) {
    out.extend((0..padding(length)).map(|_| 0));
}
