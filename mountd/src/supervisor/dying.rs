//! A daemon that has been killed and cannot end, because a thread of its own waits for an answer that only it could give.
//!
//! A daemon looks through its own mounts: at overlays, and at whether it is alive. Killed in the middle, with the question
//! read and not answered, the thread that asked waits in the kernel for as long as the connection lives, which the
//! supervisor sees to; and with it the process, its locks and its memory. So the kernel is asked for what was not
//! answered, and what the dying process itself wanted is answered with an error. What others want is left alone: they get
//! it from the next daemon, which asks for it again.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::answer::{self, wait_in_reads};
use crate::fuse::resume::ask_again;

/// Bit of SIGKILL in the masks of `/proc/<pid>/status`.
const SIGKILL_PENDING: u64 = 1 << 8;

/// Whether a process has been killed, though it has not ended yet.
pub(super) fn is_dying(pid: u32) -> bool {
    let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { return false };
    let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    let pending = |name| value(name).and_then(|mask| u64::from_str_radix(mask, 16).ok()).unwrap_or(0);
    value("State").is_some_and(|state| state.starts_with(['Z', 'X']))
        || pending("SigPnd") & SIGKILL_PENDING != 0
        || pending("ShdPnd") & SIGKILL_PENDING != 0
}

/// Answers what the threads of a dying process wait for. Nobody else may be reading these devices. Returns how many
/// requests those were.
pub(super) fn free(pid: u32, devices: &[File]) -> io::Result<u64> {
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        threads.extend(task?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    let mut freed = 0;
    for device in devices {
        let mut polled = [PollFd::from_borrowed_fd(device.as_fd(), PollFlags::empty())];
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut polled, Some(&none)).is_err() || polled.iter().any(|one| one.revents().contains(PollFlags::ERR)) {
            continue;
        }
        ask_again(device)?;
        wait_in_reads(device, false);
        let mut buffer = vec![0; answer::MESSAGE_MAX];
        while let Some(length) = answer::receive(device, &mut buffer) {
            let message = buffer.get(..length).unwrap_or_default();
            if answer::asker(message).is_some_and(|asker| threads.contains(&asker)) {
                freed += u64::from(answer::answer(device, message));
            }
        }
        wait_in_reads(device, true);
    }
    Ok(freed)
}
