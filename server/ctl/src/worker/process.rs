//! Daemons that this command starts itself, where systemd does not: each in a session of its own, with a file that tells
//! which process it is.
//!
//! Invariant: a process is only taken for ours if the time at which it started is the recorded one, in the recorded boot.
//! A number that another process has by now never gets a signal.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, setsid};

use super::error::WorkerError;
use super::record::write;

/// Most of a log that is repeated in a message, in bytes.
const TAIL: usize = 2000;

/// One run of one process.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Process {
    pub(super) pid: u32,
    /// In ticks of the kernel's since the boot.
    started: u64,
    boot: String,
}

impl Process {
    /// The process that has this number now, if one has.
    pub(super) fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything, a parenthesis too.
        let mut words = stat.rsplit_once(')')?.1.split_whitespace();
        let state = words.next()?;
        let started = words.nth(18)?.parse().ok()?;
        // What has ended and was not waited for is gone.
        (!matches!(state, "Z" | "X")).then_some(Self { pid, started, boot: boot()? })
    }

    /// Whether it still runs.
    pub(super) fn is_alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    /// Reads the file of a process that runs; `None` if there is none, or it has ended.
    pub(super) fn read(file: &Path) -> Option<Self> {
        let text = fs::read_to_string(file).ok()?;
        let mut words = text.split_whitespace();
        let process = Self {
            pid: words.next()?.parse().ok()?,
            started: words.next()?.parse().ok()?,
            boot: words.next()?.to_owned(),
        };
        process.is_alive().then_some(process)
    }

    pub(super) fn write(&self, file: &Path) -> Result<(), WorkerError> {
        write(file, &format!("{} {} {}\n", self.pid, self.started, self.boot), 0o644)
    }

    /// Asks it to end, and waits until it has. Blocks.
    pub(super) fn stop(&self, limit: Duration) -> io::Result<bool> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(true) };
        let handle = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(rustix::io::Errno::SRCH) => return Ok(true),
            handle => handle?,
        };
        // Only now is it certain whose handle that is: the number cannot change hands any more.
        if !self.is_alive() {
            return Ok(true);
        }
        match pidfd_send_signal(&handle, Signal::TERM) {
            Err(rustix::io::Errno::SRCH) => return Ok(true),
            sent => sent?,
        }
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        let ended = poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&limit))?;
        Ok(ended > 0)
    }
}

/// This boot.
fn boot() -> Option<String> {
    Some(fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned())
}

/// A daemon that is started by this command.
pub(super) struct Daemon {
    /// What people call it.
    pub(super) name: &'static str,
    /// Program and arguments.
    pub(super) command: Vec<OsString>,
    /// Which process it is.
    pub(super) pid_file: PathBuf,
    /// Where its output goes.
    pub(super) log: PathBuf,
}

impl Daemon {
    pub(super) fn running(&self) -> Option<Process> {
        Process::read(&self.pid_file)
    }

    /// Starts it, through this program, which leaves its session and becomes the daemon.
    pub(super) fn start(&self, narlake: &Path) -> Result<Process, WorkerError> {
        let failed = || WorkerError::system("start a daemon with output to", &self.log);
        let log = File::options().create(true).append(true).open(&self.log).map_err(failed())?;
        let child = Command::new(narlake)
            .args(["worker", "detach", "--"])
            .args(&self.command)
            .current_dir("/")
            // Where Nix's daemon is to be found is no setting for the daemon itself.
            .env_remove("NIX_REMOTE")
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(failed())?)
            .stderr(log)
            .spawn()
            .map_err(WorkerError::system("start", narlake))?;
        let process = Process::of(child.id()).ok_or_else(|| self.ended())?;
        process.write(&self.pid_file)?;
        Ok(process)
    }

    /// Stops it, if it runs.
    pub(super) async fn stop(&self, limit: Duration) -> Result<(), WorkerError> {
        if let Some(process) = self.running() {
            let stopped = tokio::task::spawn_blocking(move || process.stop(limit)).await.map_err(io::Error::other);
            match stopped.flatten().map_err(WorkerError::system("stop the process of", &self.pid_file))? {
                true => {}
                false => {
                    let what = format!("{} ends when it is told to", self.name);
                    return Err(WorkerError::Late { what, seconds: limit.as_secs() });
                }
            }
        }
        match fs::remove_file(&self.pid_file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(WorkerError::system("remove", &self.pid_file)(error))
            }
            _ => Ok(()),
        }
    }

    /// It has ended, which it should not.
    pub(super) fn ended(&self) -> WorkerError {
        WorkerError::Program { program: self.name.to_owned(), ended: "ended".to_owned(), said: self.tail() }
    }

    /// It does not come.
    pub(super) fn late(&self, seconds: u64) -> WorkerError {
        let what = format!("{} answers (its last words: {})", self.name, self.tail());
        WorkerError::Late { what, seconds }
    }

    /// The end of its log.
    fn tail(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let from = text.len().saturating_sub(TAIL);
        crate::output::printable(text.get(from..).unwrap_or_default().trim_ascii())
    }
}

/// Becomes a program in a session of its own.
///
/// # Errors
/// When it cannot be started; otherwise this does not return.
pub(super) fn detach(command: &[OsString]) -> Result<std::convert::Infallible, WorkerError> {
    let (program, arguments) = command.split_first().map_or((OsString::new(), &[][..]), |(p, a)| (p.clone(), a));
    // Fails where this process leads a group already, and so has left whoever started it.
    let _ = setsid();
    let error = Command::new(&program).args(arguments).exec();
    Err(WorkerError::system("start", Path::new(&program))(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process of the test's, that ends with it.
    struct Sleeper(std::process::Child);

    impl Sleeper {
        fn start() -> Self {
            Self(Command::new("sleep").arg("60").spawn().unwrap())
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_process_comes_back_from_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let (file, sleeper) = (dir.path().join("pid"), Sleeper::start());
        assert_eq!(Process::read(&file), None);
        let process = Process::of(sleeper.0.id()).unwrap();
        process.write(&file).unwrap();
        assert_eq!(Process::read(&file), Some(process));
        drop(sleeper);
        assert_eq!(Process::read(&file), None);
    }

    #[test]
    fn a_number_that_was_used_again_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let (file, mut sleeper) = (dir.path().join("pid"), Sleeper::start());
        let process = Process::of(sleeper.0.id()).unwrap();
        for other in [
            Process { started: process.started - 1, ..process.clone() },
            Process { boot: "another".into(), ..process.clone() },
        ] {
            other.write(&file).unwrap();
            assert_eq!(Process::read(&file), None);
            assert!(other.stop(Duration::from_secs(1)).unwrap());
            assert!(sleeper.0.try_wait().unwrap().is_none(), "another process was stopped");
        }
        for nonsense in ["", "x", "1", "1 2", "-1 2 3"] {
            fs::write(&file, nonsense).unwrap();
            assert_eq!(Process::read(&file), None, "{nonsense}");
        }
    }

    #[test]
    fn what_has_ended_is_gone() {
        let mut sleeper = Sleeper::start();
        let process = Process::of(sleeper.0.id()).unwrap();
        assert!(process.stop(Duration::from_secs(10)).unwrap());
        // Nobody has waited for it yet.
        assert!(!process.is_alive());
        sleeper.0.wait().unwrap();
        assert!(process.stop(Duration::from_secs(1)).unwrap());
    }
}
