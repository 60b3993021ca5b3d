//! The first exchange with the kernel, after which a connection lives for as long as its mount.
//!
//! The kernel's first message on a new connection is INIT; the answer fixes for ever what the two sides may do. It is
//! given once, by whoever makes the mount ([`super::mount`]), and kept beside the descriptor: a daemon that takes the
//! connection over later cannot ask again, and has to keep to it. Layout: `fuse_init_in` and `fuse_init_out` of the
//! kernel's `include/uapi/linux/fuse.h`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

/// Bytes of `fuse_in_header`, which every message of the kernel begins with.
pub(crate) const IN_HEADER: usize = 40;

/// Bytes of `fuse_out_header`.
const OUT_HEADER: usize = 16;

/// Bytes of `fuse_init_out`.
const INIT_OUT: usize = 64;

const OPCODE_INIT: u32 = 26;

/// The protocol that is spoken here.
const MAJOR: u32 = 7;

/// The kernel lays out nothing differently for a newer minor version, and is told this one if it has a newer one.
const MINOR: u32 = 41;

/// Oldest minor version whose INIT has the second word of flags.
const MINOR_MIN: u32 = 36;

/// Reads that the kernel may have under way ahead of readers, and from when on it holds back.
const BACKGROUND_MAX: u16 = 64;
const CONGESTION: u16 = 48;

/// Nothing is written; the kernel wants a page at least, and no buffer smaller than that plus a header.
const WRITE_MAX: u32 = 64 << 10;

/// Most pages of one read: 1 MiB, what the kernel allows without being told otherwise.
const PAGES_MAX: u16 = 256;

/// Times are seconds here; the kernel wants the granularity in nanoseconds.
const TIME_GRANULARITY: u32 = 1;

const MAX_PAGES: u64 = 1 << 22;
const INIT_EXT: u64 = 1 << 30;
/// Requests that a daemon took with it can be had again ([`super::resume`]).
pub(crate) const HAS_RESEND: u64 = 1 << 39;

/// What the kernel is asked for. Most save messages.
const CAPABILITIES: &[(u64, &str)] = &[
    (1 << 17, "open without a message"),
    (1 << 24, "opendir without a message"),
    (1 << 13, "listings with attributes"),
    (1 << 23, "cached symlinks"),
    (1 << 25, "pages that stay"),
    (1, "reads side by side"),
    (1 << 18, "look-ups side by side"),
    (MAX_PAGES, "reads of a megabyte"),
    (HAS_RESEND, "requests that outlive a daemon"),
];

/// Longest wait for the kernel's INIT, which it sends by itself when the mount is made.
const INIT_TIMEOUT: Duration = Duration::from_secs(10);

/// What was agreed on when a connection was made.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Agreement {
    /// The kernel's message, as it came.
    request: Vec<u8>,
    /// What it was granted: the flags that both sides have.
    flags: u64,
}

impl Agreement {
    /// Answers the INIT of a fresh connection. Blocks, for a short time.
    ///
    /// # Errors
    /// When the kernel sends something else, or nothing.
    pub fn make(mut device: &File) -> io::Result<Self> {
        let wait = Timespec::try_from(INIT_TIMEOUT).map_err(io::Error::other)?;
        if poll(&mut [PollFd::new(device, PollFlags::IN)], Some(&wait))? == 0 {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel does not begin"));
        }
        // The kernel refuses to fill a buffer that no message would fit in.
        let mut buffer = vec![0; WRITE_MAX as usize + 8192];
        let length = device.read(&mut buffer)?;
        buffer.truncate(length);
        let (this, reply) = Self::answer(buffer).map_err(|what| io::Error::new(io::ErrorKind::InvalidData, what))?;
        device.write_all(&reply)?;
        Ok(this)
    }

    /// The kernel's message, for a session that wants to see one.
    #[must_use]
    pub fn request(&self) -> &[u8] {
        &self.request
    }

    /// Whether requests that a daemon took with it can be had again.
    #[must_use]
    pub const fn has_resend(&self) -> bool {
        self.flags & HAS_RESEND != 0
    }

    /// What is agreed on, and the message that says so.
    fn answer(request: Vec<u8>) -> Result<(Self, Vec<u8>), &'static str> {
        let word = |at: usize| -> Result<u32, &'static str> {
            let bytes = request.get(at..at + 4).ok_or("the kernel's INIT is cut short")?;
            Ok(u32::from_le_bytes(bytes.try_into().unwrap_or_default()))
        };
        if word(4)? != OPCODE_INIT {
            return Err("the kernel begins with something else than INIT");
        }
        let unique = request.get(8..16).ok_or("the kernel's INIT is cut short")?.to_vec();
        let (major, minor) = (word(IN_HEADER)?, word(IN_HEADER + 4)?);
        if major != MAJOR || minor < MINOR_MIN {
            return Err("the kernel speaks another version of FUSE");
        }
        let readahead = word(IN_HEADER + 8)?;
        let offered = u64::from(word(IN_HEADER + 12)?) | u64::from(word(IN_HEADER + 16)?) << 32;
        let wanted = CAPABILITIES.iter().fold(INIT_EXT, |all, (flag, _)| all | flag);
        let flags = offered & wanted;
        for (flag, what) in CAPABILITIES {
            if offered & flag == 0 {
                tracing::warn!(capability = what, "this kernel lacks a capability; docs/kernels.md says what is lost");
            }
        }
        let taken: Vec<&str> =
            CAPABILITIES.iter().filter(|(flag, _)| flags & flag != 0).map(|(_, what)| *what).collect();
        tracing::info!(minor, offered = format_args!("{offered:#x}"), ?taken, "the kernel's FUSE");
        let low = |word: u64| u32::try_from(word & u64::from(u32::MAX)).unwrap_or_default();
        let mut reply = Vec::with_capacity(OUT_HEADER + INIT_OUT);
        let length = u32::try_from(OUT_HEADER + INIT_OUT).unwrap_or_default();
        reply.extend_from_slice(&length.to_le_bytes());
        reply.extend_from_slice(&[0; 4]); // no error
        reply.extend_from_slice(&unique);
        for word in [MAJOR, minor.min(MINOR), readahead, low(flags)] {
            reply.extend_from_slice(&word.to_le_bytes());
        }
        reply.extend_from_slice(&BACKGROUND_MAX.to_le_bytes());
        reply.extend_from_slice(&CONGESTION.to_le_bytes());
        reply.extend_from_slice(&WRITE_MAX.to_le_bytes());
        reply.extend_from_slice(&TIME_GRANULARITY.to_le_bytes());
        reply.extend_from_slice(&PAGES_MAX.to_le_bytes());
        reply.extend_from_slice(&[0; 2]); // no alignment of mappings
        reply.extend_from_slice(&low(flags >> 32).to_le_bytes());
        reply.resize(OUT_HEADER + INIT_OUT, 0);
        Ok((Self { request, flags }, reply))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn init(opcode: u32, major: u32, minor: u32, flags: u64) -> Vec<u8> {
        let mut bytes = vec![0; IN_HEADER + 64];
        let mut put = |at: usize, word: u32| bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        put(0, 104);
        put(4, opcode);
        put(8, 2);
        put(40, major);
        put(44, minor);
        put(48, 131_072);
        put(52, u32::try_from(flags & 0xffff_ffff).unwrap());
        put(56, u32::try_from(flags >> 32).unwrap());
        bytes
    }

    #[test]
    fn only_what_is_offered_is_taken() {
        let (all, reply) = Agreement::answer(init(OPCODE_INIT, 7, 45, u64::MAX)).unwrap();
        assert!(all.has_resend());
        assert_eq!(reply.len(), 80);
        assert_eq!(reply[..16], [80, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(reply[16..24], [7, 0, 0, 0, 41, 0, 0, 0]);
        // Second word of flags: HAS_RESEND and nothing else.
        assert_eq!(reply[16 + 32..16 + 36], [1 << 7, 0, 0, 0]);
        let (none, reply) = Agreement::answer(init(OPCODE_INIT, 7, 38, 0)).unwrap();
        assert!(!none.has_resend());
        assert_eq!(reply[28..32], [0; 4]);
        assert_eq!(reply[20], 38);
    }

    #[test]
    fn anything_else_is_refused() {
        for (bytes, part) in [
            (init(1, 7, 45, 0), "something else"),
            (init(OPCODE_INIT, 8, 0, 0), "another version"),
            (init(OPCODE_INIT, 7, 35, 0), "another version"),
            (Vec::new(), "cut short"),
            (init(OPCODE_INIT, 7, 45, 0)[..50].to_vec(), "cut short"),
        ] {
            let error = Agreement::answer(bytes).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
