//! Whether the kernel has a file's content in memory: cachestat(2), for which no safe crate has a wrapper.
//!
//! Files that sealed views read leave no other trace of use: no message, no access time. Before 6.5 the system call is
//! not there, and a file counts as not in memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;

/// Number of the system call, on all architectures that Rust and FUSE share.
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range` of linux/mman.h. A length of 0 means to the end.
#[repr(C)]
struct Range {
    offset: u64,
    length: u64,
}

/// `struct cachestat` of linux/mman.h, in pages.
#[repr(C)]
#[derive(Default)]
struct Pages {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Bytes of the file that are in the page cache; `None` where the kernel does not say.
pub(super) fn resident_bytes(file: &File) -> Option<u64> {
    let range = Range { offset: 0, length: 0 };
    let mut pages = Pages::default();
    // SAFETY: the descriptor is open for as long as `file` is borrowed; both pointers are to live structs laid out as
    // the kernel defines them, and the kernel writes to none but `pages`.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut pages, 0_u32) };
    (result == 0).then(|| pages.cached * rustix::param::page_size() as u64)
}
