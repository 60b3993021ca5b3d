//! From a frame's stored bytes to its content, on a thread where that keeps nobody waiting.

use std::cell::RefCell;

use bytes::Bytes;
use narlake_format::error::FormatError;
use narlake_format::lake::frame::{FrameDecoder, FrameHeader};

use super::coalesce::Span;

thread_local! {
    /// A decompressor for each thread that decodes.
    static DECODER: RefCell<FrameDecoder> = RefCell::new(FrameDecoder::new());
}

/// Decodes a frame, against the contents of its base if it has one.
pub(super) fn decode_with(stored: &[u8], base: &[Vec<u8>]) -> Result<Vec<u8>, FormatError> {
    DECODER.with_borrow_mut(|decoder| {
        if base.is_empty() {
            decoder.decode(stored)
        } else {
            let base: Vec<&[u8]> = base.iter().map(Vec::as_slice).collect();
            decoder.decode_delta(stored, &base)
        }
    })
}

/// The whole plain frames that lie between those asked for in the bytes of a read, which begin at `start` of the pack.
/// Frames follow each other without gaps, and each says how long it is.
pub(super) fn between(bytes: &Bytes, start: u64, asked: &[Span]) -> Vec<(Span, Bytes)> {
    let mut found = Vec::new();
    for pair in asked.windows(2) {
        let [left, right] = pair else { continue };
        let mut at = left.end();
        while at < u64::from(right.offset) {
            let rest = usize::try_from(at - start).ok().and_then(|from| bytes.get(from..));
            let Some(header) = rest.and_then(|rest| FrameHeader::decode(rest).ok()) else { break };
            let (Ok(offset), length) = (u32::try_from(at), header.frame_length()) else { break };
            let span = Span { offset, length };
            // A base would have to be read: that is not for nothing.
            if header.base.is_some() || span.end() > u64::from(right.offset) {
                break;
            }
            let Ok(from) = usize::try_from(at - start) else { break };
            found.push((span, bytes.slice(from..from + length as usize)));
            at = span.end();
        }
    }
    found
}
