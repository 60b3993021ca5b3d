//! The worker's mountd, over its control socket: a line of JSON there, a line of JSON back, or several of a long answer.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use narlake_format::api::control::{ControlErrorKind, ControlRequest, ControlResponse, LINE_MAX};
use rustix::cmsg_space;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Interest};
use tokio::net::UnixStream;

use crate::output::printable;

/// How long each further part of an answer of several may take.
const PART: Duration = Duration::from_secs(30);

/// Most descriptors that go along with one question.
const DESCRIPTORS_MAX: usize = 3;

/// Why mountd did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody could be reached.
    #[error("connect to narlake-mountd at {}", .socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The conversation broke off.
    #[error("talk to narlake-mountd at {}", .socket.display())]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It said nothing for too long.
    #[error("narlake-mountd at {} gave no answer for {seconds} s", .socket.display())]
    Deadline {
        /// The socket.
        socket: PathBuf,
        /// How long.
        seconds: u64,
    },
    /// What came is not an answer.
    #[error("read the answer of narlake-mountd")]
    Answer {
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The answer is one to another question.
    #[error("narlake-mountd answered another question")]
    Mismatch,
    /// It said no.
    #[error("{message}")]
    Refused {
        /// Why, for a program.
        kind: ControlErrorKind,
        /// Why, for people.
        message: String,
    },
}

impl ControlError {
    /// What the user can do about it.
    #[must_use]
    pub fn advice(&self) -> Option<String> {
        let advice = match self {
            Self::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "mountd's socket is for root; run this as root"
            }
            Self::Connect { .. } => "is narlake-mountd running? give its socket with --control or NARLAKE_CONTROL",
            Self::Answer { .. } | Self::Mismatch => "are narlake and narlake-mountd of the same version?",
            Self::Refused { kind: ControlErrorKind::Unavailable, .. } => {
                "it may work later; `narlake status` shows whether the worker reaches its server"
            }
            Self::Broken { .. } | Self::Deadline { .. } | Self::Refused { .. } => return None,
        };
        Some(advice.to_owned())
    }

    /// Whether nobody listens at the socket.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Connect { .. })
    }
}

/// Asks one question. An answer that is an error becomes one here.
///
/// Not cancel safe: what was asked for may or may not be done.
///
/// # Errors
/// When mountd cannot be reached, does not answer in time, or refuses.
pub async fn ask(socket: &Path, request: &ControlRequest, limit: Duration) -> Result<ControlResponse, ControlError> {
    ask_with(socket, request, &[], limit).await
}

/// The same, with descriptors that go along with the question.
///
/// # Errors
/// As [`ask`].
pub async fn ask_with(
    socket: &Path,
    request: &ControlRequest,
    descriptors: &[BorrowedFd<'_>],
    limit: Duration,
) -> Result<ControlResponse, ControlError> {
    let late = |_| ControlError::Deadline { socket: socket.to_owned(), seconds: limit.as_secs() };
    accepted(tokio::time::timeout(limit, converse(socket, request, descriptors)).await.map_err(late)??)
}

/// Sends the start of a line with descriptors; returns how much of it.
async fn hand_over(stream: &UnixStream, line: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            Ok(sendmsg(stream, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?)
        })
        .await
}

/// Asks a question that is answered with several lines, the first of them within the limit.
///
/// # Errors
/// When mountd cannot be reached, or does not take the question.
pub async fn ask_for_parts(socket: &Path, request: &ControlRequest, limit: Duration) -> Result<Parts, ControlError> {
    let late = |_| ControlError::Deadline { socket: socket.to_owned(), seconds: limit.as_secs() };
    let sent = tokio::time::timeout(limit, send(socket, request, &[])).await;
    Ok(Parts { socket: socket.to_owned(), reader: sent.map_err(late)??, limit })
}

/// An answer of several lines, as it comes.
pub struct Parts {
    socket: PathBuf,
    reader: BufReader<UnixStream>,
    /// For the next one.
    limit: Duration,
}

impl Parts {
    /// The next line. Whoever asks knows by the one before whether there is one.
    ///
    /// # Errors
    /// When it does not come in time, or mountd refuses.
    pub async fn next(&mut self) -> Result<ControlResponse, ControlError> {
        let late = |_| ControlError::Deadline { socket: self.socket.clone(), seconds: self.limit.as_secs() };
        let response = tokio::time::timeout(self.limit, receive(&self.socket, &mut self.reader)).await;
        let response = response.map_err(late)??;
        self.limit = PART;
        accepted(response)
    }
}

async fn converse(
    socket: &Path,
    request: &ControlRequest,
    descriptors: &[BorrowedFd<'_>],
) -> Result<ControlResponse, ControlError> {
    let mut reader = send(socket, request, descriptors).await?;
    receive(socket, &mut reader).await
}

/// What it says, unless it says no.
fn accepted(response: ControlResponse) -> Result<ControlResponse, ControlError> {
    match response {
        ControlResponse::Error { kind, message } => {
            Err(ControlError::Refused { kind, message: printable(message.as_bytes()) })
        }
        response => Ok(response),
    }
}

async fn send(
    socket: &Path,
    request: &ControlRequest,
    descriptors: &[BorrowedFd<'_>],
) -> Result<BufReader<UnixStream>, ControlError> {
    let connect = |source| ControlError::Connect { socket: socket.to_owned(), source };
    let broken = |source| ControlError::Broken { socket: socket.to_owned(), source };
    let mut line = serde_json::to_vec(request).map_err(|source| ControlError::Answer { source })?;
    line.push(b'\n');
    let mut stream = UnixStream::connect(socket).await.map_err(connect)?;
    // Descriptors arrive with the byte that they are sent with.
    let sent = if descriptors.is_empty() { 0 } else { hand_over(&stream, &line, descriptors).await.map_err(broken)? };
    stream.write_all(line.get(sent..).unwrap_or_default()).await.map_err(broken)?;
    Ok(BufReader::new(stream))
}

async fn receive(socket: &Path, reader: &mut BufReader<UnixStream>) -> Result<ControlResponse, ControlError> {
    let broken = |source| ControlError::Broken { socket: socket.to_owned(), source };
    let mut answer = Vec::new();
    reader.take(LINE_MAX as u64 + 1).read_until(b'\n', &mut answer).await.map_err(broken)?;
    if answer.last() != Some(&b'\n') {
        let kind = if answer.len() > LINE_MAX { io::ErrorKind::InvalidData } else { io::ErrorKind::UnexpectedEof };
        return Err(broken(kind.into()));
    }
    serde_json::from_slice(&answer).map_err(|source| ControlError::Answer { source })
}
