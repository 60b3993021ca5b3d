//! Frames that lie side by side, read in one range.

use std::ops::Range;

/// Largest single read, in bytes: several may run at once, and a waiter should not wait for much that is not its own.
const READ_MAX: u64 = 8 << 20;

/// A frame's place in its pack, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) offset: u32,
    pub(super) length: u32,
}

impl Span {
    fn end(self) -> u64 {
        u64::from(self.offset) + u64::from(self.length)
    }

    /// The bytes of the pack.
    pub(super) fn range(self) -> Range<u64> {
        u64::from(self.offset)..self.end()
    }
}

/// Groups spans of one pack, sorted by offset, into reads: each group's spans and the range that covers them.
pub(super) fn coalesce(spans: &[Span], gap_bytes: u64) -> Vec<(Range<u64>, Vec<Span>)> {
    let mut reads: Vec<(Range<u64>, Vec<Span>)> = Vec::new();
    for &span in spans {
        let start = u64::from(span.offset);
        match reads.last_mut() {
            Some((range, group)) if start <= range.end + gap_bytes && span.end() - range.start <= READ_MAX => {
                range.end = range.end.max(span.end());
                group.push(span);
            }
            _ => reads.push((start..span.end(), vec![span])),
        }
    }
    reads
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(spans: &[(u32, u32)], gap: u64, expect: &[(Range<u64>, usize)]) {
        let spans: Vec<Span> = spans.iter().map(|&(offset, length)| Span { offset, length }).collect();
        let reads: Vec<(Range<u64>, usize)> =
            coalesce(&spans, gap).into_iter().map(|(range, group)| (range, group.len())).collect();
        assert_eq!(reads, expect);
    }

    #[test]
    fn joins_what_touches() {
        check(&[], 0, &[]);
        check(&[(8, 10)], 0, &[(8..18, 1)]);
        check(&[(8, 10), (18, 2)], 0, &[(8..20, 2)]);
        check(&[(8, 10), (19, 2)], 0, &[(8..18, 1), (19..21, 1)]);
        check(&[(8, 10), (19, 2)], 1, &[(8..21, 2)]);
        check(&[(0, 8 << 20), (8 << 20, 1)], 0, &[(0..8 << 20, 1), (8 << 20..(8 << 20) + 1, 1)]);
    }
}
