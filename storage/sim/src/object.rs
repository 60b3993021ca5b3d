//! Store objects to push: small trees with all that makes a NAR hard to store and to give back.
//!
//! Files hold references to other paths, in full and as bare hashes, inside text and binary bytes and across the cuts of
//! chunks; some files are shared by several objects, some are empty, some are larger than a frame; there are symlinks
//! into the store, executables, deep folders and names that are not UTF-8.

use std::collections::BTreeMap;

use narlake_format::limits::{CHUNK_MAX, FRAME_TARGET};
use narlake_format::nar::{Event, Writer};
use narlake_format::nix::compression::Compression;
use narlake_format::nix::hash::Sha256Hash;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::store_path::{StoreDir, StorePath, StorePathHash};
use narlake_storage::UploadName;

use crate::rng::Rng;

/// One entry of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A file.
    File {
        /// Its executable bit.
        executable: bool,
        /// Its content.
        bytes: Vec<u8>,
    },
    /// A symlink and its target.
    Symlink(Vec<u8>),
    /// A directory.
    Directory(BTreeMap<Vec<u8>, Node>),
}

impl Node {
    /// The NAR of the tree.
    ///
    /// # Panics
    /// Where the tree has a name that no NAR may have.
    #[must_use]
    pub fn nar(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        let mut out = Vec::new();
        self.write(&mut writer, &mut out);
        writer.finish().expect("a tree is one NAR");
        out
    }

    fn write(&self, writer: &mut Writer, out: &mut Vec<u8>) {
        let mut event = |event: Event<'_>, out: &mut Vec<u8>| writer.event(event, out).expect("a valid tree");
        match self {
            Self::File { executable, bytes } => {
                event(Event::File { executable: *executable, size: bytes.len() as u64 }, out);
                if !bytes.is_empty() {
                    event(Event::Data(bytes), out);
                }
                event(Event::EndFile, out);
            }
            Self::Symlink(target) => event(Event::Symlink { target }, out),
            Self::Directory(entries) => {
                event(Event::Directory, out);
                for (name, node) in entries {
                    writer.event(Event::Entry { name }, out).expect("a valid tree");
                    node.write(writer, out);
                }
                writer.event(Event::EndDirectory, out).expect("a valid tree");
            }
        }
    }
}

/// A store object as a client holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Its path.
    pub path: StorePath,
    /// Its NAR.
    pub nar: Vec<u8>,
    /// The paths it refers to.
    pub references: Vec<StorePath>,
}

impl Object {
    /// The name it is uploaded under, uncompressed.
    #[must_use]
    pub fn upload(&self) -> UploadName {
        UploadName { file_hash: Sha256Hash::of(&self.nar), compression: Compression::None }
    }

    /// What the client says of it.
    #[must_use]
    pub fn info(&self) -> NarInfo {
        let nar_hash = Sha256Hash::of(&self.nar);
        NarInfo {
            store_path: self.path.clone(),
            url: format!("nar/{}.nar", nar_hash.to_base32()),
            compression: Compression::None,
            file_hash: None,
            file_size: None,
            nar_hash,
            nar_size: self.nar.len() as u64,
            references: self.references.clone(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
            extra: Vec::new(),
        }
    }
}

/// Makes objects.
#[derive(Debug)]
pub struct Objects {
    rng: Rng,
    dir: StoreDir,
    /// Files that several objects hold.
    shared: Vec<Vec<u8>>,
    made: usize,
}

impl Objects {
    /// The objects of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::part(seed, "objects");
        let shared = [100, CHUNK_MAX + 10_000, FRAME_TARGET + 50_000].map(|size| filling(&mut rng, size)).into();
        Self { rng, dir: StoreDir::default(), shared, made: 0 }
    }

    /// A new path that may refer to these.
    pub fn object(&mut self, may_refer_to: &[StorePath]) -> Object {
        self.made += 1;
        let mut hash = [0; 20];
        self.rng.fill(&mut hash);
        let name = format!("object-{}", self.made);
        let path =
            StorePath { hash: StorePathHash::from_bytes(hash), name: name.parse().expect("a valid store path name") };
        let references: Vec<StorePath> =
            may_refer_to.iter().filter(|_| self.rng.per_mille(600)).chain([&path]).cloned().collect();
        self.fill(path, references)
    }

    /// The same path with other content: a build that is not reproducible.
    pub fn other_build(&mut self, of: &Object) -> Object {
        self.fill(of.path.clone(), of.references.clone())
    }

    /// A path whose content is that of another but for the hashes in it: a mass rebuild.
    pub fn rebuild(&mut self, of: &Object, references: &[(StorePath, StorePath)]) -> Object {
        let mut hash = [0; 20];
        self.rng.fill(&mut hash);
        let path = StorePath { hash: StorePathHash::from_bytes(hash), name: of.path.name.clone() };
        let mut nar = of.nar.clone();
        let mut renamed = references.to_vec();
        renamed.push((of.path.clone(), path.clone()));
        for (old, new) in &renamed {
            replace(&mut nar, &old.hash.to_ascii(), &new.hash.to_ascii());
        }
        let renamed_to = |path: &StorePath| {
            renamed.iter().find(|(old, _)| old == path).map_or_else(|| path.clone(), |(_, new)| new.clone())
        };
        let references = of.references.iter().map(renamed_to).collect();
        Object { path, nar, references }
    }

    fn fill(&mut self, path: StorePath, mut references: Vec<StorePath>) -> Object {
        references.sort_unstable();
        references.dedup();
        let nar = self.tree(&references).nar();
        Object { path, nar, references }
    }

    fn tree(&mut self, references: &[StorePath]) -> Node {
        if self.rng.per_mille(50) {
            return self.file(references);
        }
        let mut root = BTreeMap::new();
        for n in 0..2 + self.rng.below(5) {
            let node = self.node(references, 0);
            root.insert(format!("entry-{n}").into_bytes(), node);
        }
        root.insert(b"\xff\xfe not text".to_vec(), self.file(references));
        Node::Directory(root)
    }

    fn node(&mut self, references: &[StorePath], depth: usize) -> Node {
        match self.rng.below(10) {
            0 => Node::File { executable: true, bytes: Vec::new() },
            1 => Node::Symlink(self.text(references)),
            2 | 3 => Node::File { executable: false, bytes: self.rng.pick(&self.shared.clone()).clone() },
            4 | 5 if depth < 3 => {
                let entries = self.rng.below(4);
                Node::Directory(
                    (0..entries).map(|n| (format!("{n}").into_bytes(), self.node(references, depth + 1))).collect(),
                )
            }
            _ => self.file(references),
        }
    }

    fn file(&mut self, references: &[StorePath]) -> Node {
        let size = match self.rng.below(12) {
            0 => 1,
            1..=6 => self.rng.below(3_000),
            7..=9 => self.rng.below(100_000),
            _ => self.rng.below(2 * FRAME_TARGET),
        };
        let mut bytes = filling(&mut self.rng, size);
        for _ in 0..self.rng.below(6) {
            let text = self.text(references);
            let at = self.rng.below(bytes.len() + 1);
            bytes.splice(at..at, text);
        }
        Node::File { executable: self.rng.per_mille(300), bytes }
    }

    /// A store path, or part of one, or something like it.
    fn text(&mut self, references: &[StorePath]) -> Vec<u8> {
        if references.is_empty() {
            return b"plain".to_vec();
        }
        let path = self.rng.pick(references).clone();
        match self.rng.below(5) {
            0 => path.hash.to_string(),
            1 => format!("{}/{}-cut", self.dir, path.hash),
            2 => format!("{}/not-a-path", self.dir),
            3 => format!("{}/bin:{}", path.display_in(&self.dir), path.display_in(&self.dir)),
            _ => format!("{}/bin/x", path.display_in(&self.dir)),
        }
        .into_bytes()
    }
}

/// Bytes of which some stretches compress and some do not.
fn filling(rng: &mut Rng, size: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        let length = (1 + rng.below(4_000)).min(size - bytes.len());
        let start = bytes.len();
        bytes.resize(start + length, b'a' + u8::try_from(rng.below(26)).expect("a letter"));
        if rng.per_mille(500) {
            rng.fill(&mut bytes[start..]);
        }
    }
    bytes
}

fn replace(bytes: &mut [u8], old: &[u8], new: &[u8]) {
    let mut at = 0;
    while let Some(found) = bytes[at..].windows(old.len()).position(|window| window == old) {
        bytes[at + found..at + found + old.len()].copy_from_slice(new);
        at += found + old.len();
    }
}
