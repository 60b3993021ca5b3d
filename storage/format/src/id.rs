//! Names of content, and names of objects.
//!
//! Content is named by BLAKE3 in `derive_key` mode, a context of its own for each kind, so that bytes crafted to be the
//! preimage of one kind of id can never stand for another (docs/consistency.md, rule 17). Objects of the bucket that
//! are not named by content are named by a ULID, which sorts by time.

use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

pub use ulid::Ulid;

use crate::error::FormatError;

/// Bytes of every content id.
pub const ID_LEN: usize = 32;

macro_rules! content_id {
    ($(#[$doc:meta])* $name:ident, $context:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name([u8; ID_LEN]);

        impl $name {
            /// The BLAKE3 `derive_key` context, frozen with format version 1.
            pub const CONTEXT: &'static str = $context;

            /// The id of these bytes.
            #[must_use]
            pub fn of(bytes: &[u8]) -> Self {
                // Deriving the key from the context costs as much as hashing a kilobyte: done once.
                static KEYED: LazyLock<blake3::Hasher> = LazyLock::new(|| blake3::Hasher::new_derive_key($context));
                Self(*KEYED.clone().update(bytes).finalize().as_bytes())
            }

            /// An id read from a format that already carries its own check.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; ID_LEN]) -> Self {
                Self(bytes)
            }

            /// The 32 bytes of the id.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; ID_LEN] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = FormatError;

            /// Parses 64 lower-case hexadecimal digits.
            fn from_str(text: &str) -> Result<Self, FormatError> {
                parse_hex(text).map(Self).ok_or(FormatError::Syntax { field: stringify!($name), offset: 0 })
            }
        }
    };
}

content_id! {
    /// A chunk: a span of one file's scrubbed bytes.
    ChunkId, "narlake 2026-11 v1 chunk"
}
content_id! {
    /// One part of a manifest body (`lake::manifest`).
    PartId, "narlake 2026-11 v1 manifest part"
}
content_id! {
    /// A manifest body: one store object's tree without anything that a rebuild changes.
    ManifestId, "narlake 2026-11 v1 manifest"
}
content_id! {
    /// A string table: the store hashes and names that scrubbing took out of one store object.
    TableId, "narlake 2026-11 v1 string table"
}
content_id! {
    /// A digest of the concatenated base frames of a delta frame (`lake::frame`).
    BaseDigest, "narlake 2026-11 v1 delta base"
}

/// A whole file's scrubbed bytes.
///
/// A file of at most [`FILE_ID_INLINE_MAX`] bytes is named by the hash of the [`ChunkId`] of its whole content, a longer
/// one by the hash of its bytes. Both depend on the content alone, never on how it was cut, and a short file, which is
/// one chunk under chunker version 1, needs no second id in its manifest (docs/decisions/0002-file-ids.md).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId([u8; ID_LEN]);

/// The longest file, in bytes, whose [`FileId`] is derived from the [`ChunkId`] of its content. Frozen.
pub const FILE_ID_INLINE_MAX: u64 = 16 * 1024;

const FILE_SHORT_CONTEXT: &str = "narlake 2026-11 v1 short file";
const FILE_LONG_CONTEXT: &str = "narlake 2026-11 v1 file";

impl FileId {
    /// The id of a file with these scrubbed bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        if bytes.len() as u64 <= FILE_ID_INLINE_MAX {
            Self::of_short(&ChunkId::of(bytes))
        } else {
            Self(*blake3::Hasher::new_derive_key(FILE_LONG_CONTEXT).update(bytes).finalize().as_bytes())
        }
    }

    /// The id of a file of at most [`FILE_ID_INLINE_MAX`] bytes, from the [`ChunkId`] of its whole content. An empty
    /// file counts as the chunk of no bytes.
    #[must_use]
    pub fn of_short(whole: &ChunkId) -> Self {
        static KEYED: LazyLock<blake3::Hasher> = LazyLock::new(|| blake3::Hasher::new_derive_key(FILE_SHORT_CONTEXT));
        Self(*KEYED.clone().update(whole.as_bytes()).finalize().as_bytes())
    }

    /// An id read from a format that already carries its own check.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; ID_LEN]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the id.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; ID_LEN] {
        &self.0
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileId({self})")
    }
}

/// Hashes a file longer than [`FILE_ID_INLINE_MAX`] as its bytes arrive.
#[derive(Clone)]
pub struct LongFileHasher(blake3::Hasher);

impl LongFileHasher {
    /// The size of pieces, in bytes, that are hashed at full speed: a power of two, so that pieces of that size that follow
    /// each other are whole subtrees.
    pub const PIECE: usize = 64 << 10;

    /// A hasher that has seen no bytes.
    #[must_use]
    pub fn new() -> Self {
        static KEYED: LazyLock<blake3::Hasher> = LazyLock::new(|| blake3::Hasher::new_derive_key(FILE_LONG_CONTEXT));
        Self(KEYED.clone())
    }

    /// Takes the next bytes of the file. Fastest in pieces of [`Self::PIECE`] bytes, the last one aside: BLAKE3 hashes
    /// many blocks at once only where whole subtrees of its tree are there.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The id of the bytes seen, which the caller knows to be more than [`FILE_ID_INLINE_MAX`].
    #[must_use]
    pub fn finish(&self) -> FileId {
        FileId(*self.0.finalize().as_bytes())
    }
}

impl Default for LongFileHasher {
    fn default() -> Self {
        Self::new()
    }
}

/// The name of a file's restored bytes in a local cache: its [`FileId`] where nothing was scrubbed, else its
/// patched-file id, the hash of the [`FileId`] and of every restored string with its place (rule 17).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentId([u8; ID_LEN]);

impl ContentId {
    /// The 32 bytes of the id.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; ID_LEN] {
        &self.0
    }
}

impl From<FileId> for ContentId {
    fn from(id: FileId) -> Self {
        Self(id.0)
    }
}

impl fmt::Display for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ContentId({self})")
    }
}

impl FromStr for ContentId {
    type Err = FormatError;

    /// Parses 64 lower-case hexadecimal digits.
    fn from_str(text: &str) -> Result<Self, FormatError> {
        parse_hex(text).map(Self).ok_or(FormatError::Syntax { field: "ContentId", offset: 0 })
    }
}

/// Computes the [`ContentId`] of a file that has patches.
pub struct PatchedFileHasher(blake3::Hasher);

impl PatchedFileHasher {
    /// Starts from the id of the scrubbed bytes.
    #[must_use]
    pub fn new(file: &FileId) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("narlake 2026-11 v1 patched file");
        hasher.update(file.as_bytes());
        Self(hasher)
    }

    /// Takes the next restored span, in order: its offset in the file and its bytes.
    pub fn patch(&mut self, offset: u64, bytes: &[u8]) {
        self.0.update(&offset.to_le_bytes());
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    /// The id of the restored file.
    #[must_use]
    pub fn finish(&self) -> ContentId {
        ContentId(*self.0.finalize().as_bytes())
    }
}

/// What a blob of a pack is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum BlobKind {
    /// A chunk of file data, named by its [`ChunkId`].
    Chunk = 1,
    /// A part of a manifest body, named by its [`PartId`].
    Part = 2,
    /// The header of a manifest body, named by its [`ManifestId`].
    Manifest = 3,
    /// A string table, named by its [`TableId`].
    Table = 4,
}

impl BlobKind {
    /// The kind that this byte stands for.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Chunk),
            2 => Some(Self::Part),
            3 => Some(Self::Manifest),
            4 => Some(Self::Table),
            _ => None,
        }
    }
}

/// The id of anything that packs hold and the index finds. Kinds hash under contexts of their own, so ids of two kinds
/// never meet and the kind need not be part of the key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobId([u8; ID_LEN]);

impl BlobId {
    /// The id that bytes of this kind have.
    #[must_use]
    pub fn of(kind: BlobKind, bytes: &[u8]) -> Self {
        match kind {
            BlobKind::Chunk => ChunkId::of(bytes).into(),
            BlobKind::Part => PartId::of(bytes).into(),
            BlobKind::Manifest => ManifestId::of(bytes).into(),
            BlobKind::Table => TableId::of(bytes).into(),
        }
    }

    /// An id read from a format that already carries its own check.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; ID_LEN]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the id.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; ID_LEN] {
        &self.0
    }
}

macro_rules! into_blob_id {
    ($($name:ident)*) => {$(
        impl From<$name> for BlobId {
            fn from(id: $name) -> Self {
                Self(id.0)
            }
        }
    )*};
}
into_blob_id!(ChunkId PartId ManifestId TableId);

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobId({self})")
    }
}

impl FromStr for BlobId {
    type Err = FormatError;

    /// Parses 64 lower-case hexadecimal digits.
    fn from_str(text: &str) -> Result<Self, FormatError> {
        parse_hex(text).map(Self).ok_or(FormatError::Syntax { field: "BlobId", offset: 0 })
    }
}

macro_rules! ulid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub struct $name(pub Ulid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                // Lower case throughout the bucket: one spelling for one key.
                for byte in self.0.to_string().bytes() {
                    fmt::Write::write_char(f, char::from(byte.to_ascii_lowercase()))?;
                }
                Ok(())
            }
        }

        impl FromStr for $name {
            type Err = FormatError;

            /// Parses the 26 characters that `Display` writes, and nothing else.
            fn from_str(text: &str) -> Result<Self, FormatError> {
                let id = Ulid::from_string(text)
                    .map(Self)
                    .map_err(|_| FormatError::Syntax { field: stringify!($name), offset: 0 })?;
                if id.to_string() == text { Ok(id) } else { Err(FormatError::Syntax { field: stringify!($name), offset: 0 }) }
            }
        }
    };
}

ulid_id! {
    /// A lake: what one bucket holds.
    LakeId
}
ulid_id! {
    /// A cache of a lake. Records live under this id, never under the cache's name (rule 22).
    CacheId
}
ulid_id! {
    /// A pack.
    PackId
}
ulid_id! {
    /// An index segment.
    SegmentId
}
ulid_id! {
    /// One generation of a path record.
    GenerationId
}
ulid_id! {
    /// One upload that waits for its narinfo.
    UploadId
}
ulid_id! {
    /// One version of a cache's configuration.
    ConfigId
}
ulid_id! {
    /// One entry of the journal of commits.
    JournalId
}
ulid_id! {
    /// One batch of condemned packs.
    CondemnationId
}
ulid_id! {
    /// One tombstone of a path.
    TombstoneId
}
ulid_id! {
    /// A lease.
    LeaseId
}
ulid_id! {
    /// A pin.
    PinId
}
ulid_id! {
    /// A run of a server process.
    ReplicaId
}
ulid_id! {
    /// One flush of access times.
    AccessId
}
ulid_id! {
    /// An access token.
    TokenId
}

fn write_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn parse_hex(text: &str) -> Option<[u8; ID_LEN]> {
    let text = text.as_bytes();
    if text.len() != 2 * ID_LEN {
        return None;
    }
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let mut out = [0; ID_LEN];
    for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(out)
}
