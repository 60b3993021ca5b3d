//! Every bound of the formats, in one place.

/// Longest file name in a NAR, in bytes.
pub const NAME_MAX: usize = 255;
/// Longest symlink target in a NAR, in bytes.
pub const TARGET_MAX: usize = 4095;
/// Deepest nesting of directories in a NAR.
pub const DEPTH_MAX: usize = 512;
/// Most entries (directories, files, symlinks) of one store object.
pub const ENTRIES_MAX: u64 = 10_000_000;
/// Largest store object, in bytes of NAR.
pub const NAR_SIZE_MAX: u64 = 1 << 40;
/// Largest narinfo or path record, in bytes.
pub const NARINFO_MAX: usize = 1 << 20;
/// Most references of one store object.
pub const REFERENCES_MAX: usize = 10_000;
/// Most paths of one closure.
pub const CLOSURE_MAX: usize = 100_000;
/// Longest store path name, in bytes (Nix's own limit).
pub const STORE_NAME_MAX: usize = 211;
/// Longest store directory, in bytes.
pub const STORE_DIR_MAX: usize = 1024;
/// Longest name of a signing key, in bytes.
pub const KEY_NAME_MAX: usize = 255;
/// Most signatures of one path.
pub const SIGNATURES_MAX: usize = 256;
/// Largest `nix-cache-info`, in bytes.
pub const CACHE_INFO_MAX: usize = 64 * 1024;
/// Largest realisation document, in bytes.
pub const REALISATION_MAX: usize = 1 << 20;
/// Longest string of a worker protocol message, in bytes.
pub const WORKER_STRING_MAX: usize = 64 * 1024;
/// Most strings of one list of a worker protocol message.
pub const WORKER_LIST_MAX: usize = CLOSURE_MAX;
/// Most features that a client of the worker protocol may name, and the longest name, in bytes.
pub const WORKER_FEATURES_MAX: usize = 256;
/// See [`WORKER_FEATURES_MAX`].
pub const WORKER_FEATURE_NAME_MAX: usize = 256;
/// Largest worker protocol request, in bytes: a closure's worth of paths of the longest name.
pub const WORKER_REQUEST_MAX: usize = 32 << 20;

/// Most distinct strings that scrubbing takes out of one store object; later ones stay in the content. Frozen under
/// scrub version 1.
pub const STRINGS_MAX: usize = 1 << 16;

/// Smallest chunk, in bytes, but for the last of a file. Frozen under chunker version 1, as are the next two.
pub const CHUNK_MIN: usize = 4 * 1024;
/// Average chunk, in bytes; a file up to this size is one chunk.
pub const CHUNK_AVG: usize = 16 * 1024;
/// Largest chunk, in bytes.
pub const CHUNK_MAX: usize = 64 * 1024;

/// Raw bytes at which ingest closes a frame.
pub const FRAME_TARGET: usize = 256 * 1024;
/// Largest raw content of a frame, in bytes, that a reader accepts.
pub const FRAME_RAW_MAX: usize = 16 << 20;
/// Most frames that a delta frame may have as its base.
pub const FRAME_BASE_MAX: usize = 4;
/// Largest part of a manifest body, in bytes.
pub const PART_MAX: usize = 256 * 1024;
/// Largest of the first [`PARTS_SMALL`] parts: most bodies have no others, and in a small part a file that changes
/// takes few unchanged ones along. Frozen with the manifest's format, as is their number.
pub const PART_SMALL_MAX: usize = 16 * 1024;
/// Number of parts that are small.
pub const PARTS_SMALL: usize = 64;
/// Largest header of a manifest body, in bytes: 24,000 parts, about 6 GB of body.
pub const MANIFEST_HEADER_MAX: usize = 1 << 20;
/// Largest string table, in bytes.
pub const TABLE_MAX: usize = STRINGS_MAX * (20 + 1 + STORE_NAME_MAX) + 16;
/// Largest table, in bytes, that a path record carries inline.
pub const TABLE_INLINE_MAX: usize = 2048;

/// Bytes at which a pack is sealed.
pub const PACK_TARGET: usize = 32 << 20;
/// Largest pack, in bytes, that a reader accepts.
pub const PACK_MAX: usize = 64 << 20;
/// Most blobs of one pack.
pub const PACK_BLOBS_MAX: usize = 1 << 20;

/// Largest JSON document of the bucket, in bytes.
pub const DOCUMENT_MAX: usize = 1 << 20;

/// Furthest that a host's clock may be from the bucket's, in seconds (rule 8).
pub const CLOCK_SKEW_MAX_S: u64 = 300;

const _: () = assert!(CHUNK_MIN < CHUNK_AVG && CHUNK_AVG < CHUNK_MAX && CHUNK_MAX <= FRAME_TARGET);
// The largest item, a chunk full of patches, is half of that.
const _: () = assert!(CHUNK_MAX / 32 * 4 * 2 <= PART_SMALL_MAX && PART_SMALL_MAX <= PART_MAX);
const _: () = assert!(PART_MAX <= FRAME_TARGET && FRAME_TARGET <= FRAME_RAW_MAX);
const _: () = assert!(MANIFEST_HEADER_MAX <= FRAME_RAW_MAX && TABLE_MAX <= FRAME_RAW_MAX);
const _: () = assert!(PACK_TARGET + 2 * FRAME_RAW_MAX <= PACK_MAX);
