//! Lines of the control socket, with the descriptors that came along with them.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use narlake_format::api::control::LINE_MAX;
use rustix::cmsg_space;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::overlay::HANDED;

/// Bytes that are read at once.
const READ: usize = 64 * 1024;

pub(super) enum Line {
    /// With the descriptors that came since the line before.
    Whole(Vec<u8>, Vec<OwnedFd>),
    TooLong,
}

pub(super) struct Lines {
    stream: UnixStream,
    /// What has arrived and is not yet used; up to here there is no end of a line in it.
    buffer: Vec<u8>,
    searched: usize,
    /// Bounded: more than an overlay needs are closed.
    descriptors: Vec<OwnedFd>,
}

impl Lines {
    pub(super) const fn new(stream: UnixStream) -> Self {
        Self { stream, buffer: Vec::new(), searched: 0, descriptors: Vec::new() }
    }

    pub(super) const fn stream(&mut self) -> &mut UnixStream {
        &mut self.stream
    }

    /// The next line; `None` when the client has closed. Cancel safe.
    pub(super) async fn next(&mut self) -> io::Result<Option<Line>> {
        loop {
            let fresh = self.buffer.get(self.searched..).unwrap_or_default();
            if let Some(end) = fresh.iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(self.searched + end + 1);
                let line = std::mem::replace(&mut self.buffer, rest);
                self.searched = 0;
                return Ok(Some(Line::Whole(line, std::mem::take(&mut self.descriptors))));
            }
            self.searched = self.buffer.len();
            if self.searched > LINE_MAX {
                return Ok(Some(Line::TooLong));
            }
            if self.read().await? == 0 {
                // What was begun and not ended is nobody's request.
                return Ok(None);
            }
        }
    }

    async fn read(&mut self) -> io::Result<usize> {
        let Self { stream, buffer, descriptors, .. } = self;
        let socket = &*stream;
        stream
            .async_io(Interest::READABLE, || {
                let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(HANDED))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let mut bytes = vec![0; READ];
                let parts = &mut [IoSliceMut::new(&mut bytes)];
                let received = recvmsg(socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
                for message in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(fds) = message {
                        descriptors.extend(fds);
                    }
                }
                // More than are asked for are of no use to anybody.
                descriptors.truncate(HANDED);
                buffer.extend_from_slice(bytes.get(..received.bytes).unwrap_or_default());
                Ok(received.bytes)
            })
            .await
    }
}
