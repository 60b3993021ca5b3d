//! Frames that lie side by side, read in one range.

use std::ops::Range;

/// Largest single read, in bytes: several may run at once, and a waiter should not wait for much that is not its own.
pub(super) const READ_MAX: u64 = 8 << 20;

/// A frame's place in its pack, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) offset: u32,
    pub(super) length: u32,
}

impl Span {
    pub(super) fn end(self) -> u64 {
        u64::from(self.offset) + u64::from(self.length)
    }

    /// The bytes of the pack.
    pub(super) fn range(self) -> Range<u64> {
        u64::from(self.offset)..self.end()
    }
}

/// Groups spans of one pack, sorted by offset, into reads of at most `read_max` bytes where they have several spans:
/// each group's spans and the range that covers them. A read runs over at most `gap_bytes` that nobody asked for in one
/// place, and in all over no more than was asked for, so that joining never moves twice what is wanted.
pub(super) fn coalesce(spans: &[Span], gap_bytes: u64, read_max: u64) -> Vec<(Range<u64>, Vec<Span>)> {
    let mut reads: Vec<(Range<u64>, Vec<Span>)> = Vec::new();
    let (mut wanted, mut idle) = (0, 0);
    for &span in spans {
        let (start, length) = (u64::from(span.offset), u64::from(span.length));
        if let Some((range, group)) = reads.last_mut() {
            let gap = start.saturating_sub(range.end);
            if gap <= gap_bytes && idle + gap <= wanted + length && span.end() - range.start <= read_max {
                range.end = range.end.max(span.end());
                group.push(span);
                (wanted, idle) = (wanted + length, idle + gap);
                continue;
            }
        }
        reads.push((span.range(), vec![span]));
        (wanted, idle) = (length, 0);
    }
    reads
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(spans: &[(u32, u32)], gap: u64, expect: &[(Range<u64>, usize)]) {
        let spans: Vec<Span> = spans.iter().map(|&(offset, length)| Span { offset, length }).collect();
        let reads: Vec<(Range<u64>, usize)> =
            coalesce(&spans, gap, READ_MAX).into_iter().map(|(range, group)| (range, group.len())).collect();
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

    #[test]
    fn what_lies_between_is_never_most_of_a_read() {
        // The gap is allowed, and larger than what it joins.
        check(&[(0, 10), (31, 10)], 100, &[(0..10, 1), (31..41, 1)]);
        check(&[(0, 10), (30, 10)], 100, &[(0..40, 2)]);
        // Gaps add up.
        check(&[(0, 10), (20, 10), (50, 10)], 100, &[(0..60, 3)]);
        check(&[(0, 10), (20, 10), (51, 10)], 100, &[(0..30, 2), (51..61, 1)]);
    }
}
