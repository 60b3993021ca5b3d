//! The tree of a store object in memory, and how a path is followed through it.
//!
//! A tree comes from a listing, or where there is none from the NAR itself ([`TreeBuilder`]): JSON knows no bytes, so
//! an object with a name that is not UTF-8 has no listing. Paths are followed as the kernel would, symlinks included,
//! over the border of the object to another one, but never out of the store.

use std::collections::{BTreeMap, VecDeque};

use narlake_format::nar::{Event, NarError, Writer};
use narlake_format::nix::listing;
use narlake_format::nix::store_path::{StoreDir, StorePath};

use crate::output::printable;

/// Most symlinks on the way to one file, as in the kernel.
const LINKS_MAX: u32 = 40;

/// A node of the tree.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Node {
    /// A directory.
    Directory(BTreeMap<Vec<u8>, Node>),
    /// A file.
    File {
        /// Whether it is executable.
        executable: bool,
        /// Its length in bytes.
        size: u64,
        /// Where its content starts in the NAR; unknown in listings of other servers.
        nar_offset: Option<u64>,
    },
    /// A symlink.
    Symlink {
        /// Where it leads.
        target: Vec<u8>,
    },
}

impl From<listing::Node> for Node {
    fn from(node: listing::Node) -> Self {
        match node {
            listing::Node::Directory { entries } => {
                Self::Directory(entries.into_iter().map(|(name, node)| (name.into_bytes(), node.into())).collect())
            }
            listing::Node::Regular { size, executable, nar_offset } => Self::File { executable, size, nar_offset },
            listing::Node::Symlink { target } => Self::Symlink { target: target.into_bytes() },
        }
    }
}

/// Counts where in a NAR things are, by writing it again to nowhere: the event that announces a file does not tell.
#[derive(Default)]
pub struct Offsets {
    writer: Writer,
    scratch: Vec<u8>,
}

impl Offsets {
    /// Where the bytes of the next event end; for a file, where its content starts.
    ///
    /// # Errors
    /// When the event cannot come next.
    pub fn after(&mut self, event: Event<'_>) -> Result<u64, NarError> {
        match event {
            Event::Data(data) => self.writer.skip(data.len() as u64)?,
            event => self.writer.event(event, &mut self.scratch)?,
        }
        self.scratch.clear();
        Ok(self.writer.offset())
    }
}

/// Builds a tree from the events of a NAR.
#[derive(Default)]
pub struct TreeBuilder {
    offsets: Offsets,
    /// The directories that are open.
    open: Vec<BTreeMap<Vec<u8>, Node>>,
    /// The name of the next node in each of them.
    names: Vec<Vec<u8>>,
    root: Option<Node>,
}

impl TreeBuilder {
    /// Takes the next event.
    ///
    /// # Errors
    /// When it cannot come next.
    pub fn event(&mut self, event: Event<'_>) -> Result<(), NarError> {
        let offset = self.offsets.after(event)?;
        match event {
            Event::Directory => self.open.push(BTreeMap::new()),
            Event::Entry { name } => self.names.push(name.to_vec()),
            Event::EndDirectory => {
                let entries = self.open.pop().unwrap_or_default();
                self.place(Node::Directory(entries));
            }
            Event::File { executable, size } => {
                self.place(Node::File { executable, size, nar_offset: Some(offset) });
            }
            Event::Symlink { target } => self.place(Node::Symlink { target: target.to_vec() }),
            Event::Data(_) | Event::EndFile => {}
        }
        Ok(())
    }

    /// The tree, if it is complete.
    #[must_use]
    pub fn finish(self) -> Option<Node> {
        self.root
    }

    fn place(&mut self, node: Node) {
        match (self.open.last_mut(), self.names.pop()) {
            (Some(entries), Some(name)) => drop(entries.insert(name, node)),
            _ => self.root = Some(node),
        }
    }
}

/// Where a path led.
#[derive(PartialEq, Eq, Debug)]
pub enum Found<'a> {
    /// To this node of the tree.
    Here(&'a Node),
    /// To another store object, and on from its root by these names.
    Elsewhere {
        /// The object.
        path: StorePath,
        /// The names.
        rest: VecDeque<Vec<u8>>,
    },
}

/// Why a path leads nowhere.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// A name is not there.
    #[error("there is no {name} in {at}")]
    Missing {
        /// The name.
        name: String,
        /// Where it should be.
        at: String,
    },
    /// The path goes on below something that is no directory.
    #[error("{at} is not a directory")]
    NotDirectory {
        /// What it is.
        at: String,
    },
    /// The path or a symlink on it leads out of the store.
    #[error("{at} leads to {target}, which is not in the store")]
    Outside {
        /// The symlink, or how far the path is in the store.
        at: String,
        /// Where it leads.
        target: String,
    },
    /// The symlinks lead around.
    #[error("more than {LINKS_MAX} symlinks on the way, the last one {at}")]
    Links {
        /// The last one.
        at: String,
    },
}

/// Follows paths in one store.
pub struct Walk<'a> {
    dir: &'a StoreDir,
    /// Whether a symlink at the very end is followed too.
    follow_last: bool,
    links: u32,
}

impl<'a> Walk<'a> {
    /// A walk that has met no symlink yet.
    #[must_use]
    pub const fn new(dir: &'a StoreDir, follow_last: bool) -> Self {
        Self { dir, follow_last, links: 0 }
    }

    /// Follows `names` from the root of the object at `path`.
    ///
    /// # Errors
    /// When they lead nowhere.
    pub fn find<'t>(
        &mut self,
        path: &StorePath,
        root: &'t Node,
        mut names: VecDeque<Vec<u8>>,
    ) -> Result<Found<'t>, PathError> {
        // From the root to where we are, each with its name; empty in the store directory itself.
        let mut stack: Vec<(&'t Node, Vec<u8>)> = vec![(root, path.to_string().into_bytes())];
        loop {
            if let Some((Node::Symlink { target }, _)) = stack.last()
                && (self.follow_last || !names.is_empty())
            {
                let at = self.show(&stack);
                self.links += 1;
                if self.links > LINKS_MAX {
                    return Err(PathError::Links { at });
                }
                stack.pop();
                let relative = self.relative(target, &at, &mut stack)?;
                for name in relative.split(|byte| *byte == b'/').rev().filter(|name| !matches!(*name, b"" | b".")) {
                    names.push_front(name.to_vec());
                }
            }
            let Some(name) = names.pop_front() else {
                return match stack.last() {
                    Some((node, _)) if !(self.follow_last && matches!(node, Node::Symlink { .. })) => {
                        Ok(Found::Here(node))
                    }
                    Some(_) => continue,
                    None => Err(self.outside(&stack, self.dir.as_str())),
                };
            };
            if name == b".." {
                if stack.pop().is_none() {
                    return Err(self.outside(&stack, ".."));
                }
                continue;
            }
            match stack.last() {
                None if name == path.to_string().as_bytes() => stack.push((root, name)),
                None => {
                    let found = str::from_utf8(&name).ok().and_then(|name| name.parse().ok());
                    let path = found.ok_or_else(|| self.outside(&stack, &printable(&name)))?;
                    return Ok(Found::Elsewhere { path, rest: names });
                }
                Some((Node::Directory(entries), _)) => {
                    let Some(node) = entries.get(&name) else {
                        return Err(PathError::Missing { name: printable(&name), at: self.show(&stack) });
                    };
                    stack.push((node, name));
                }
                Some(_) => return Err(PathError::NotDirectory { at: self.show(&stack) }),
            }
        }
    }

    /// A target from where the stack is; an absolute one empties it.
    fn relative<'b>(
        &self,
        target: &'b [u8],
        at: &str,
        stack: &mut Vec<(&Node, Vec<u8>)>,
    ) -> Result<&'b [u8], PathError> {
        if target.first() != Some(&b'/') {
            return Ok(target);
        }
        stack.clear();
        let rest = target.strip_prefix(self.dir.as_str().as_bytes()).filter(|rest| rest.first() == Some(&b'/'));
        rest.ok_or_else(|| PathError::Outside { at: at.to_owned(), target: printable(target) })
    }

    fn outside(&self, stack: &[(&Node, Vec<u8>)], target: &str) -> PathError {
        PathError::Outside { at: self.show(stack), target: target.to_owned() }
    }

    fn show(&self, stack: &[(&Node, Vec<u8>)]) -> String {
        let mut text = self.dir.to_string();
        for (_, name) in stack {
            text.push('/');
            text.push_str(&printable(name));
        }
        text
    }
}

#[cfg(test)]
mod tests;
