//! The `Range` header (RFC 9110, section 14): one range of bytes. Several at once, and other units, are as if there
//! were no such header, which the RFC allows.

use std::ops::Range;

/// What a range header asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// Everything.
    Whole,
    /// These bytes, at least one.
    Part(Range<u64>),
    /// Bytes that are not there.
    Unsatisfiable,
}

/// Reads the header against a length.
#[must_use]
pub fn parse(header: &str, length: u64) -> Asked {
    let Some(range) = header.trim().strip_prefix("bytes=").map(str::trim).filter(|range| !range.contains(',')) else {
        return Asked::Whole;
    };
    let Some((first, last)) = range.split_once('-') else { return Asked::Whole };
    let number = |text: &str| {
        (!text.is_empty() && text.bytes().all(|c| c.is_ascii_digit())).then(|| {
            // Digits that do not fit are beyond any length.
            text.parse::<u64>().unwrap_or(u64::MAX)
        })
    };
    match (number(first), number(last)) {
        (Some(first), Some(last)) if last < first => Asked::Whole,
        (Some(first), _) if first >= length => {
            if last.is_empty() || number(last).is_some() {
                Asked::Unsatisfiable
            } else {
                Asked::Whole
            }
        }
        (Some(first), Some(last)) => Asked::Part(first..length.min(last.saturating_add(1))),
        (Some(first), None) if last.is_empty() => Asked::Part(first..length),
        (None, Some(suffix)) if first.is_empty() => {
            if suffix == 0 || length == 0 {
                Asked::Unsatisfiable
            } else {
                Asked::Part(length.saturating_sub(suffix)..length)
            }
        }
        _ => Asked::Whole,
    }
}

/// The range of a header that names both ends, for content whose length is not known.
#[must_use]
pub fn closed(header: &str) -> Option<Range<u64>> {
    let (first, last) = header.trim().strip_prefix("bytes=")?.split_once('-')?;
    let number = |text: &str| text.bytes().all(|c| c.is_ascii_digit()).then(|| text.parse::<u64>().ok())?;
    let (first, last) = (number(first)?, number(last)?);
    (first <= last).then(|| Some(first..last.checked_add(1)?))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends() {
        assert_eq!(closed("bytes=3-5"), Some(3..6));
        assert_eq!(closed("bytes=0-0"), Some(0..1));
        for header in ["bytes=3-", "bytes=-5", "bytes=5-3", "bytes=0-18446744073709551615", "bytes=0-1,3-4", "3-5", ""]
        {
            assert_eq!(closed(header), None, "{header}");
        }
    }

    #[test]
    fn headers() {
        let check = |header: &str, expect: Asked| assert_eq!(parse(header, 100), expect, "{header}");
        check("bytes=0-0", Asked::Part(0..1));
        check("bytes=0-", Asked::Part(0..100));
        check("bytes=10-19", Asked::Part(10..20));
        check("bytes=99-", Asked::Part(99..100));
        check("bytes=10-1000", Asked::Part(10..100));
        check("bytes=10-99999999999999999999", Asked::Part(10..100));
        check("bytes=-1", Asked::Part(99..100));
        check("bytes=-1000", Asked::Part(0..100));
        check(" bytes= 5-6 ", Asked::Part(5..7));
        check("bytes=100-", Asked::Unsatisfiable);
        check("bytes=100-200", Asked::Unsatisfiable);
        check("bytes=99999999999999999999-", Asked::Unsatisfiable);
        check("bytes=-0", Asked::Unsatisfiable);
        for ignored in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=a-b",
            "bytes=5-4",
            "bytes=+1-2",
            "bytes=0-1,3-4",
            "items=0-1",
            "bytes=100-x",
        ] {
            check(ignored, Asked::Whole);
        }
        assert_eq!(parse("bytes=0-0", 0), Asked::Unsatisfiable);
        assert_eq!(parse("bytes=-5", 0), Asked::Unsatisfiable);
    }
}
