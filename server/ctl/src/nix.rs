//! Nix's own programs, run with a deadline.
//!
//! What changes a Nix store, or reads its database, is left to the Nix that is there: the schema is its own, and so are
//! its locks. Nothing that a program says is believed to be short, or fit for a terminal.

use std::ffi::OsStr;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use crate::output::printable;

/// Longest that a program may take that reads or writes a database: a hundred thousand paths take two minutes.
pub const DATABASE: Duration = Duration::from_secs(600);

/// Most paths on one command line: far from what the kernel allows, and few enough calls.
pub const ARGUMENTS: usize = 1000;

/// Most that a program may print, in bytes: far more than is to be said of all paths of a store.
pub const PRINTED_MAX: usize = 1 << 30;

/// Most of what a program said that is repeated, in bytes.
const MESSAGE_MAX: usize = 2000;

/// Why a program of Nix did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum NixError {
    /// It could not be started.
    #[error("run {program}")]
    Run {
        /// The program.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It took too long.
    #[error("{program} did not end within {seconds} s")]
    Late {
        /// The program.
        program: String,
        /// How long.
        seconds: u64,
    },
    /// It ended with an error.
    #[error("{program} failed: {message}")]
    Failed {
        /// The program.
        program: String,
        /// What it said.
        message: String,
    },
    /// It did not stop printing.
    #[error("{program} prints more than {max} bytes")]
    TooLong {
        /// The program.
        program: String,
        /// How many it may.
        max: usize,
    },
    /// What it printed is not what it prints.
    #[error("read the output of {program}")]
    Output {
        /// The program.
        program: String,
        /// What is wrong with it.
        #[source]
        source: narlake_format::error::FormatError,
    },
}

impl NixError {
    /// Whether there is no such program.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Run { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// What the user can do about it.
    #[must_use]
    pub fn advice(&self) -> Option<String> {
        match self {
            error if error.is_absent() => Some("is Nix installed, and on the search path?".to_owned()),
            Self::Late { .. } => Some("another process may hold the lock of Nix's database".to_owned()),
            Self::Run { .. } | Self::Failed { .. } | Self::TooLong { .. } | Self::Output { .. } => None,
        }
    }
}

/// Runs a program to its end, with this on its standard input; what it printed.
///
/// Not cancel safe: the program is killed.
///
/// # Errors
/// When it cannot be run, fails, prints more than [`PRINTED_MAX`] bytes, or takes too long.
pub async fn run(
    program: &str,
    arguments: &[impl AsRef<OsStr>],
    input: &[u8],
    limit: Duration,
) -> Result<Vec<u8>, NixError> {
    let printed = start_of(program, arguments, input, limit, PRINTED_MAX + 1).await?;
    if printed.len() > PRINTED_MAX {
        return Err(NixError::TooLong { program: program.to_owned(), max: PRINTED_MAX });
    }
    Ok(printed)
}

/// The same, of what it printed at most `max` bytes. A program that prints more is ended there, which is no failure.
///
/// # Errors
/// When it cannot be run, fails before that, or takes too long.
pub async fn start_of(
    program: &str,
    arguments: &[impl AsRef<OsStr>],
    input: &[u8],
    limit: Duration,
    max: usize,
) -> Result<Vec<u8>, NixError> {
    let work = communicate(program, arguments, input, max);
    let done = tokio::time::timeout(limit, work).await;
    let done = done.map_err(|_| NixError::Late { program: program.to_owned(), seconds: limit.as_secs() })?;
    let (status, printed, said) = done.map_err(|source| NixError::Run { program: program.to_owned(), source })?;
    if printed.len() < max && !status.success() {
        return Err(NixError::Failed { program: program.to_owned(), message: last_words(&said) });
    }
    Ok(printed)
}

async fn communicate(
    program: &str,
    arguments: &[impl AsRef<OsStr>],
    input: &[u8],
    max: usize,
) -> io::Result<(ExitStatus, Vec<u8>, Vec<u8>)> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn()?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let feed = async {
        if let Some(mut stdin) = stdin {
            // One that ends before it has read everything says why by itself.
            let _ = stdin.write_all(input).await;
        }
    };
    let listen = async {
        let mut printed = Vec::new();
        if let Some(stdout) = stdout {
            stdout.take(max as u64).read_to_end(&mut printed).await?;
        }
        Ok::<_, io::Error>(printed)
    };
    let overhear = async {
        let (mut said, mut part) = (Vec::new(), [0; 4096]);
        if let Some(mut stderr) = stderr {
            while let length @ 1.. = stderr.read(&mut part).await? {
                said.extend_from_slice(part.get(..length).unwrap_or_default());
                said.drain(..said.len().saturating_sub(MESSAGE_MAX));
            }
        }
        Ok::<_, io::Error>(said)
    };
    let ((), printed, said) = tokio::join!(feed, listen, overhear);
    Ok((child.wait().await?, printed?, said?))
}

/// What a program said last, on one line.
fn last_words(said: &[u8]) -> String {
    let lines: Vec<String> =
        said.trim_ascii().split(|byte| *byte == b'\n').map(|line| printable(line.trim_ascii())).collect();
    lines.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn programs_end_in_time_or_say_why() {
        let second = Duration::from_secs(10);
        // More than a pipe holds, read while it is written.
        let input = vec![b'x'; 1 << 20];
        assert_eq!(run("cat", &[] as &[&str], &input, second).await.unwrap(), input);
        // One that reads nothing of it.
        assert_eq!(run("true", &[] as &[&str], &input, second).await.unwrap(), b"");
        let error = run("sh", &["-c", "printf 'a\\nred \\033[31m\\n' >&2; exit 3"], b"", second).await.unwrap_err();
        assert_eq!(error.to_string(), "sh failed: a; red \\u{1b}[31m");
        assert!(run("/nonexistent", &[] as &[&str], b"", second).await.unwrap_err().is_absent());
        let late = run("sleep", &["60"], b"", Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(late, NixError::Late { .. }), "{late}");
    }

    #[tokio::test]
    async fn what_is_printed_is_bounded() {
        let second = Duration::from_secs(10);
        let start = start_of("sh", &["-c", "yes; exit 1"], b"", second, 100_000).await.unwrap();
        assert!(start.len() == 100_000 && start.starts_with(b"y\ny\n"));
        let noisy = "head -c 300000 /dev/zero >&2; echo the end >&2; exit 1";
        let error = run("sh", &["-c", noisy], b"", second).await.unwrap_err().to_string();
        assert!(error.ends_with("the end") && error.len() < 10 * MESSAGE_MAX, "{}", error.len());
        assert!(start_of("false", &[] as &[&str], b"", second, 10).await.is_err());
    }
}
