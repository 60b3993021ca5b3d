//! Condemnations: packs that are about to be deleted, irrevocably (docs/consistency.md, rule 4).
//!
//! `condemned/<ulid>` is a batch of them, one `<domain>/<pack>` a line, sorted, each line ended by a newline. Whoever
//! commits a push reads every batch after its record is written.

use super::location::PackRef;
use crate::error::FormatError;

/// The bytes of a batch.
#[must_use]
pub fn encode(packs: &[PackRef]) -> Vec<u8> {
    let mut sorted = packs.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    sorted.iter().flat_map(|pack| format!("{pack}\n").into_bytes()).collect()
}

/// The packs of a batch.
///
/// # Errors
/// Where a line is no pack, the lines are not in order, or the last one is cut off.
pub fn decode(bytes: &[u8]) -> Result<Vec<PackRef>, FormatError> {
    let mut packs: Vec<PackRef> = Vec::new();
    let mut offset = 0;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let Some(line_body) = line.strip_suffix(b"\n") else {
            return Err(FormatError::Truncated { field: "condemned pack", offset: bytes.len() as u64 });
        };
        let wrong = FormatError::Syntax { field: "condemned pack", offset };
        let pack = std::str::from_utf8(line_body).ok().and_then(|text| text.parse().ok()).ok_or(wrong.clone())?;
        if packs.last().is_some_and(|last| *last >= pack) {
            return Err(wrong);
        }
        packs.push(pack);
        offset += line.len() as u64;
    }
    Ok(packs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{PackId, Ulid};
    use crate::lake::location::Domain;

    #[test]
    fn round_trip_and_truncation() {
        let pack = |n: u128| PackRef { domain: Domain::Public, id: PackId(Ulid::from(n)) };
        let bytes = encode(&[pack(2), pack(1), pack(2)]);
        assert_eq!(decode(&bytes), Ok(vec![pack(1), pack(2)]));
        assert_eq!(decode(b""), Ok(Vec::new()));
        for end in 1..bytes.len() {
            let cut = bytes.get(..end).unwrap_or_default();
            assert!(decode(cut).is_err() || cut.ends_with(b"\n"));
        }
    }
}
