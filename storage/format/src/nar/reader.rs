//! Reads a NAR that arrives in pieces of any size.
//!
//! A push parser: the caller feeds what it has and is called back with [`Event`]s. File content is handed on as slices
//! of the input, never copied; every other token is at most a few kilobytes and is held back only when a piece ends
//! inside it. Each token is refused as soon as its length word is there and is wrong, so nothing that a NAR claims makes
//! the reader wait for, or allocate, more than a token of the grammar may have.
//!
//! Invariant: the events do not depend on how the input was cut, except that [`Event::Data`] is cut where the input is.

use crate::limits::{NAME_MAX, NAR_SIZE_MAX, TARGET_MAX};

use super::order::{Tree, check_size, check_target, limit};
use super::{Event, MAGIC, NarError, padding};

/// What the next bytes must be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expect {
    Magic,
    /// `(`, then `type`, then the kind of the node.
    NodeOpen,
    NodeType,
    NodeKind,
    /// `executable` or `contents`.
    FileField,
    /// The empty string that follows `executable`.
    ExecutableMark,
    Contents,
    /// The length word of the content.
    ContentLength {
        executable: bool,
    },
    /// This much content.
    Content {
        remaining: u64,
        size: u64,
    },
    ContentPadding {
        length: u64,
    },
    FileClose,
    TargetField,
    Target,
    SymlinkClose,
    /// `entry`, or the `)` of the directory.
    EntryOrClose,
    EntryOpen,
    NameField,
    Name,
    NodeField,
    /// The `)` of the entry whose node has just ended.
    EntryClose,
    End,
    Failed,
}

/// A NAR parser. See the module's text for how it works; [`super`] for what it accepts.
pub struct Reader {
    expect: Expect,
    tree: Tree,
    /// Bytes of the NAR that are behind us; a token that is held back in part is not.
    offset: u64,
    /// The start of a token whose end has not arrived.
    held: Vec<u8>,
}

impl Default for Reader {
    fn default() -> Self {
        Self::new()
    }
}

impl Reader {
    /// A reader at the start of a NAR.
    #[must_use]
    pub fn new() -> Self {
        Self { expect: Expect::Magic, tree: Tree::default(), offset: 0, held: Vec::new() }
    }

    /// Bytes taken so far.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset + self.held.len() as u64
    }

    /// Whether the whole NAR has been read.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.expect == Expect::End
    }

    /// Takes the next bytes of the NAR and reports the events that they complete.
    ///
    /// After an error, the reader's or the callback's, every further call fails.
    pub fn feed<E: From<NarError>>(
        &mut self,
        mut input: &[u8],
        on: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let result = self.run(&mut input, on);
        if result.is_err() {
            self.expect = Expect::Failed;
        }
        result
    }

    /// Checks that the input did not end early.
    pub fn finish(&self) -> Result<(), NarError> {
        match self.expect {
            Expect::End => Ok(()),
            Expect::Failed => Err(NarError::Failed { offset: self.offset() }),
            _ => Err(NarError::Truncated { offset: self.offset() }),
        }
    }

    fn run<E: From<NarError>>(
        &mut self,
        input: &mut &[u8],
        on: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        loop {
            match self.expect {
                Expect::Failed => return Err(NarError::Failed { offset: self.offset() }.into()),
                Expect::End if input.is_empty() => return Ok(()),
                Expect::End => return Err(NarError::Trailing { offset: self.offset }.into()),
                Expect::Content { remaining: 0, size } => {
                    self.expect = Expect::ContentPadding { length: padding(size) };
                }
                Expect::Content { remaining, size } => {
                    let length = usize::try_from(remaining).map_or(input.len(), |remaining| remaining.min(input.len()));
                    let (data, rest) = input.split_at(length);
                    if data.is_empty() {
                        return Ok(());
                    }
                    *input = rest;
                    self.offset += length as u64;
                    self.expect = Expect::Content { remaining: remaining - length as u64, size };
                    on(Event::Data(data))?;
                }
                _ => {
                    // The buffer is lent to the token, so that the token may be looked at while the state moves on.
                    let mut held = std::mem::take(&mut self.held);
                    let token = self.token(&mut held, input)?;
                    let Some((token, length)) = token else {
                        self.held = held;
                        return Ok(());
                    };
                    self.expect = self.step(token, on)?;
                    self.offset += length;
                    limit("size", self.offset, NAR_SIZE_MAX, self.offset)?;
                    held.clear();
                    self.held = held;
                }
            }
        }
    }

    /// The content of the next token and the bytes it takes in all, or nothing while it is incomplete; what there is of
    /// it is then in `held`.
    fn token<'a, 'i: 'a>(
        &self,
        held: &'a mut Vec<u8>,
        input: &mut &'i [u8],
    ) -> Result<Option<(&'a [u8], u64)>, NarError> {
        // Take what the token still lacks into `held` only if it has begun there or does not end in this input.
        if held.is_empty() {
            match self.split(input)? {
                Split::Token { content, length } => {
                    let (token, rest) = input.split_at(length);
                    *input = rest;
                    return Ok(Some((token.get(content).unwrap_or_default(), length as u64)));
                }
                Split::Lacks(_) => {
                    held.extend_from_slice(input);
                    *input = &[];
                    return Ok(None);
                }
            }
        }
        loop {
            match self.split(held)? {
                Split::Token { content, length } => {
                    let token: &'a [u8] = held;
                    return Ok(Some((token.get(content).unwrap_or_default(), length as u64)));
                }
                Split::Lacks(lacks) => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let (more, rest) = input.split_at(lacks.min(input.len()));
                    held.extend_from_slice(more);
                    *input = rest;
                }
            }
        }
    }

    /// Finds the token that starts `bytes`, checking its length and its padding.
    fn split(&self, bytes: &[u8]) -> Result<Split, NarError> {
        if let Expect::ContentPadding { length } = self.expect {
            // At most 7; one spelling for the zeros after content and after strings.
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            return match bytes.get(..length) {
                Some(zeros) => {
                    self.check_zeros(zeros, 0)?;
                    Ok(Split::Token { content: 0..0, length })
                }
                None => {
                    self.check_zeros(bytes, 0)?;
                    Ok(Split::Lacks(length - bytes.len()))
                }
            };
        }
        let Some((word, rest)) = bytes.split_first_chunk::<WORD>() else { return Ok(Split::Lacks(WORD - bytes.len())) };
        if let Expect::ContentLength { .. } = self.expect {
            return Ok(Split::Token { content: 0..WORD, length: WORD });
        }
        let declared = u64::from_le_bytes(*word);
        let content = self.check_length(declared)?;
        let padded = content + usize::try_from(padding(declared)).unwrap_or_default();
        match rest.get(content..padded) {
            Some(zeros) => {
                self.check_zeros(zeros, WORD + content)?;
                Ok(Split::Token { content: WORD..WORD + content, length: WORD + padded })
            }
            None => Ok(Split::Lacks(padded - rest.len())),
        }
    }

    /// Checks the length of the string that comes next.
    fn check_length(&self, length: u64) -> Result<usize, NarError> {
        let (what, max) = match self.expect {
            Expect::Name => ("length of entry name", NAME_MAX),
            Expect::Target => ("length of symlink target", TARGET_MAX),
            // Every other string is one of the grammar's words.
            _ => {
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                if self.words().iter().all(|word| word.len() != length) {
                    return Err(self.unexpected());
                }
                return Ok(length);
            }
        };
        limit(what, length, max as u64, self.offset)?;
        // Not above `max`, so it fits.
        Ok(usize::try_from(length).unwrap_or(max))
    }

    fn check_zeros(&self, zeros: &[u8], at: usize) -> Result<(), NarError> {
        match zeros.iter().position(|byte| *byte != 0) {
            None => Ok(()),
            Some(place) => {
                Err(NarError::Syntax { expected: "zero padding", offset: self.offset + (at + place) as u64 })
            }
        }
    }

    /// The words that may come next; empty where it is not a word of the grammar.
    const fn words(&self) -> &'static [&'static [u8]] {
        match self.expect {
            Expect::Magic => &[MAGIC],
            Expect::NodeOpen | Expect::EntryOpen => &[b"("],
            Expect::NodeType => &[b"type"],
            Expect::NodeKind => &[b"regular", b"symlink", b"directory"],
            Expect::FileField => &[b"executable", b"contents"],
            Expect::ExecutableMark => &[b""],
            Expect::Contents => &[b"contents"],
            Expect::FileClose | Expect::SymlinkClose | Expect::EntryClose => &[b")"],
            Expect::TargetField => &[b"target"],
            Expect::EntryOrClose => &[b"entry", b")"],
            Expect::NameField => &[b"name"],
            Expect::NodeField => &[b"node"],
            Expect::ContentLength { .. }
            | Expect::Content { .. }
            | Expect::ContentPadding { .. }
            | Expect::Target
            | Expect::Name
            | Expect::End
            | Expect::Failed => &[],
        }
    }

    const fn unexpected(&self) -> NarError {
        let expected = match self.expect {
            Expect::Magic => "\"nix-archive-1\"",
            Expect::NodeOpen | Expect::EntryOpen => "\"(\"",
            Expect::NodeType => "\"type\"",
            Expect::NodeKind => "\"regular\", \"symlink\" or \"directory\"",
            Expect::FileField => "\"executable\" or \"contents\"",
            Expect::ExecutableMark => "empty string",
            Expect::Contents => "\"contents\"",
            Expect::FileClose | Expect::SymlinkClose | Expect::EntryClose => "\")\"",
            Expect::TargetField => "\"target\"",
            Expect::EntryOrClose => "\"entry\" or \")\"",
            Expect::NameField => "\"name\"",
            Expect::NodeField => "\"node\"",
            Expect::ContentLength { .. } | Expect::Content { .. } => "content",
            Expect::ContentPadding { .. } => "zero padding",
            Expect::Target => "symlink target",
            Expect::Name => "entry name",
            Expect::End | Expect::Failed => "end",
        };
        NarError::Syntax { expected, offset: self.offset }
    }

    /// Takes a whole token and says what must follow it.
    fn step<E: From<NarError>>(
        &mut self,
        token: &[u8],
        on: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Result<Expect, E> {
        let offset = self.offset;
        Ok(match (self.expect, token) {
            (Expect::Magic, MAGIC) => Expect::NodeOpen,
            (Expect::NodeOpen, b"(") => {
                self.tree.node(offset)?;
                Expect::NodeType
            }
            (Expect::NodeType, b"type") => Expect::NodeKind,
            (Expect::NodeKind, b"regular") => Expect::FileField,
            (Expect::NodeKind, b"symlink") => Expect::TargetField,
            (Expect::NodeKind, b"directory") => {
                self.tree.open(offset)?;
                on(Event::Directory)?;
                Expect::EntryOrClose
            }

            (Expect::FileField, b"executable") => Expect::ExecutableMark,
            (Expect::FileField, b"contents") => Expect::ContentLength { executable: false },
            (Expect::ExecutableMark, b"") => Expect::Contents,
            (Expect::Contents, b"contents") => Expect::ContentLength { executable: true },
            (Expect::ContentLength { executable }, word) => {
                let size = u64::from_le_bytes(word.try_into().map_err(|_| self.unexpected())?);
                check_size(size, offset)?;
                on(Event::File { executable, size })?;
                Expect::Content { remaining: size, size }
            }
            (Expect::ContentPadding { .. }, _) => Expect::FileClose,
            (Expect::FileClose, b")") => {
                on(Event::EndFile)?;
                self.after_node()
            }

            (Expect::TargetField, b"target") => Expect::Target,
            (Expect::Target, target) => {
                check_target(target, offset)?;
                on(Event::Symlink { target })?;
                Expect::SymlinkClose
            }
            (Expect::SymlinkClose, b")") => self.after_node(),

            (Expect::EntryOrClose, b"entry") => Expect::EntryOpen,
            (Expect::EntryOpen, b"(") => Expect::NameField,
            (Expect::NameField, b"name") => Expect::Name,
            (Expect::Name, name) => {
                self.tree.entry(name, offset)?;
                on(Event::Entry { name })?;
                Expect::NodeField
            }
            (Expect::NodeField, b"node") => Expect::NodeOpen,
            (Expect::EntryClose, b")") => Expect::EntryOrClose,
            (Expect::EntryOrClose, b")") => {
                self.tree.close();
                on(Event::EndDirectory)?;
                self.after_node()
            }
            _ => return Err(self.unexpected().into()),
        })
    }

    fn after_node(&self) -> Expect {
        if self.tree.is_inside() { Expect::EntryClose } else { Expect::End }
    }
}

/// Bytes of a length word.
const WORD: usize = size_of::<u64>();

/// What the next bytes are, as far as they are there.
enum Split {
    /// A whole token of `length` bytes, its content at `content`.
    Token { content: std::ops::Range<usize>, length: usize },
    /// At least this many bytes are missing.
    Lacks(usize),
}
