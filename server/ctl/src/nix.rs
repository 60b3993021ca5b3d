//! Nix's own programs, run with a deadline.
//!
//! What changes a Nix store, or reads its database, is left to the Nix that is there: the schema is its own, and so are
//! its locks. Nothing that a program says is believed to be short, or fit for a terminal.

use std::ffi::OsStr;
use std::io;
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::output::printable;

/// Longest that a program may take that reads or writes a database: a hundred thousand paths take two minutes.
pub const DATABASE: Duration = Duration::from_secs(600);

/// Most paths on one command line: far from what the kernel allows, and few enough calls.
pub const ARGUMENTS: usize = 1000;

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
            Self::Run { .. } | Self::Failed { .. } | Self::Output { .. } => None,
        }
    }
}

/// Runs a program to its end, with this on its standard input; what it printed.
///
/// Not cancel safe: the program is killed.
///
/// # Errors
/// When it cannot be run, fails, or takes too long.
pub async fn run(
    program: &str,
    arguments: &[impl AsRef<OsStr>],
    input: &[u8],
    limit: Duration,
) -> Result<Vec<u8>, NixError> {
    let done = complete(program, arguments, input, limit).await?;
    if done.status.success() {
        return Ok(done.stdout);
    }
    Err(NixError::Failed { program: program.to_owned(), message: last_words(&done.stderr) })
}

/// The same for a program that says something by failing.
///
/// # Errors
/// When it cannot be run or takes too long.
pub async fn complete(
    program: &str,
    arguments: &[impl AsRef<OsStr>],
    input: &[u8],
    limit: Duration,
) -> Result<Output, NixError> {
    let failed = |source| NixError::Run { program: program.to_owned(), source };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(failed)?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // One that ends before it has read everything says why by itself.
            let _ = stdin.write_all(input).await;
        }
    };
    let both = async { tokio::join!(feed, child.wait_with_output()).1 };
    let done = tokio::time::timeout(limit, both).await;
    let done = done.map_err(|_| NixError::Late { program: program.to_owned(), seconds: limit.as_secs() })?;
    done.map_err(failed)
}

/// The end of what a program said, on one line.
#[must_use]
pub fn last_words(said: &[u8]) -> String {
    let said = said.trim_ascii();
    let end = said.get(said.len().saturating_sub(MESSAGE_MAX)..).unwrap_or_default();
    let lines: Vec<String> = end.split(|byte| *byte == b'\n').map(|line| printable(line.trim_ascii())).collect();
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
}
