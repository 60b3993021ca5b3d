//! No bytes make the readers of packs and frames panic, or give content of another length than they say.
#![no_main]

use libfuzzer_sys::fuzz_target;
use narlake_format::lake::frame::{FrameDecoder, FrameHeader};
use narlake_format::lake::pack::{self, FromTail, PackFooter};

fuzz_target!(|input: (u32, &[u8])| {
    let (before, bytes) = input;
    let _ = pack::verify(bytes);
    let length = u64::from(before) + bytes.len() as u64;
    match PackFooter::decode_from_tail(bytes, length) {
        Ok(FromTail::Footer(footer)) => assert_eq!(footer.pack_length(), length),
        Ok(FromTail::Need(range)) => {
            assert!(range.end == length && length - range.start > bytes.len() as u64);
        }
        Err(_) => {}
    }
    let mut decoder = FrameDecoder::new();
    let raw = match FrameHeader::decode(bytes).map(|header| header.base) {
        Ok(Some((window, _))) => {
            let base = vec![&b"base"[..]; window.frames().count()];
            decoder.decode_delta(bytes, &base)
        }
        _ => decoder.decode(bytes),
    };
    if let (Ok(raw), Ok(header)) = (raw, FrameHeader::decode(bytes)) {
        assert_eq!(raw.len(), header.raw_length as usize);
        assert_eq!(bytes.len(), header.frame_length() as usize);
    }
});
