//! Answers for a daemon that does not come: every request ends in `EIO`.
//!
//! Better than to wait for ever: whoever reads a mount whose daemon cannot be started would hang, unkillably in some
//! calls (docs/semantics.md). First the kernel is asked for what the last daemon had read and not answered.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use crate::fuse::init::IN_HEADER;
use crate::fuse::resume::ask_again;

/// Requests that expect no answer: FORGET, BATCH_FORGET and INTERRUPT of `include/uapi/linux/fuse.h`.
const UNANSWERED: [u32; 3] = [2, 42, 36];

/// How long it may take to be noticed that a daemon has come.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// Bytes of the largest message: the kernel wants room for a write, which never comes.
pub(super) const MESSAGE_MAX: usize = 128 * 1024;

/// A thread that answers.
pub(super) struct Answering {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Answering {
    pub(super) fn start(devices: Vec<File>) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let mut devices = devices;
        let work = move || {
            // The flag is the open file's, which the next daemon has too: it expects to wait.
            devices.iter().for_each(|device| wait_in_reads(device, false));
            for device in &devices {
                if let Err(error) = ask_again(device) {
                    tracing::warn!(%error, "ask for what the last daemon left undone");
                }
            }
            let mut answered = 0_u64;
            while !told.load(Ordering::SeqCst) {
                answered += answer_all(&mut devices);
            }
            devices.iter().for_each(|device| wait_in_reads(device, true));
            tracing::warn!(requests = answered, "readers got errors for want of a daemon");
        };
        let thread = std::thread::Builder::new().name("answer".into()).spawn(work)?;
        Ok(Self { stop, thread })
    }

    /// Stops, and waits for it.
    pub(super) fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = self.thread.join();
    }
}

/// Answers what has come, after waiting a moment for it. Returns how many those were. A device that was aborted, or whose
/// mount is gone, will never have anything to say, and is struck off.
fn answer_all(devices: &mut Vec<File>) -> u64 {
    let mut polled: Vec<PollFd<'_>> =
        devices.iter().map(|device| PollFd::from_borrowed_fd(device.as_fd(), PollFlags::IN)).collect();
    if !matches!(poll(&mut polled, Some(&TICK)), Ok(found) if found > 0) {
        return 0;
    }
    let dead: Vec<bool> = polled.iter().map(|device| device.revents().contains(PollFlags::ERR)).collect();
    drop(polled);
    let mut dead = dead.into_iter();
    devices.retain(|_| dead.next() == Some(false));
    let mut buffer = vec![0; MESSAGE_MAX];
    let mut answered = 0;
    for device in devices {
        while let Some(length) = receive(device, &mut buffer) {
            answered += u64::from(answer(device, buffer.get(..length).unwrap_or_default()));
        }
    }
    answered
}

/// A message, if there is one.
pub(super) fn receive(mut device: &File, buffer: &mut [u8]) -> Option<usize> {
    loop {
        match device.read(buffer) {
            Ok(length) => return Some(length),
            // Interrupted while it was being read: there may be another.
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}

/// Answers a message with `EIO`, if it expects an answer.
pub(super) fn answer(mut device: &File, message: &[u8]) -> bool {
    let (Some(opcode), Some(unique)) = (message.get(4..8), message.get(8..16)) else { return false };
    let opcode = u32::from_le_bytes(opcode.try_into().unwrap_or_default());
    if message.len() < IN_HEADER || UNANSWERED.contains(&opcode) {
        return false;
    }
    let mut reply = Vec::with_capacity(16);
    reply.extend_from_slice(&16_u32.to_le_bytes());
    reply.extend_from_slice(&(-Errno::IO.raw_os_error()).to_le_bytes());
    reply.extend_from_slice(unique);
    // Gone already is as good.
    device.write_all(&reply).is_ok()
}

/// The thread that waits for the answer to a message.
pub(super) fn asker(message: &[u8]) -> Option<u32> {
    // fuse_in_header: length, opcode, unique, nodeid, uid, gid, pid
    let pid = message.get(32..36)?;
    Some(u32::from_le_bytes(pid.try_into().ok()?))
}

/// Whether reads of a device wait for a message.
pub(super) fn wait_in_reads(device: &File, wait: bool) {
    let set = fcntl_getfl(device).and_then(|mut flags| {
        flags.set(OFlags::NONBLOCK, !wait);
        fcntl_setfl(device, flags)
    });
    if let Err(error) = set {
        tracing::error!(%error, "set how a device is read");
    }
}
