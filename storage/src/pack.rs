//! Packs: filled by [`writer`], found and checked by their footers.

pub(crate) mod writer;

use std::ops::Range;

use bytes::Bytes;
use narlake_format::lake::pack::{FromTail, PackFooter, TAIL_LEN};

use crate::error::{Error, ErrorKind};

/// Reads a pack's footer: mostly one read of its end, two where the footer is large.
///
/// # Errors
/// `Corrupt` where the pack does not end in a footer.
pub(crate) async fn read_footer<F>(key: &str, size: u64, read: impl Fn(Range<u64>) -> F) -> Result<PackFooter, Error>
where
    F: Future<Output = Result<Bytes, Error>>,
{
    let mut range = size.saturating_sub(TAIL_LEN)..size;
    for _ in 0..2 {
        let tail = read(range).await?;
        match PackFooter::decode_from_tail(&tail, size).map_err(Error::format(key))? {
            FromTail::Footer(footer) => return Ok(footer),
            FromTail::Need(needed) => range = needed,
        }
    }
    Err(Error::Bucket {
        operation: "read the footer of",
        key: key.to_owned(),
        kind: ErrorKind::Corrupt,
        source: "the trailer leads nowhere".into(),
    })
}
