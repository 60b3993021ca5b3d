//! What can go wrong with a request to the bucket, and when it does.

use crate::rng::{Rng, hash};

/// One way for a request to go wrong.
///
/// A listing that does not show the last write is none of them: the engine refuses a bucket that is not consistent
/// (docs/consistency.md, rule 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The request never arrives.
    Before,
    /// It is carried out, and the answer is lost: an ambiguous put or delete.
    After,
    /// The request arrives late.
    Slow,
    /// It is carried out, and the answer takes longer than an attempt may.
    Stuck,
    /// A body ends early and nobody says so.
    Truncated,
    /// One bit of a body is another.
    Flipped,
    /// A body or listing breaks off with an error.
    Reset,
    /// The server dies before the request.
    CrashBefore,
    /// The server dies when the request is done.
    CrashAfter,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Before,
        Self::After,
        Self::Slow,
        Self::Stuck,
        Self::Truncated,
        Self::Flipped,
        Self::Reset,
        Self::CrashBefore,
        Self::CrashAfter,
    ];

    /// Those that a server lives through.
    const PASSING: [Self; 7] =
        [Self::Before, Self::After, Self::Slow, Self::Stuck, Self::Truncated, Self::Flipped, Self::Reset];
}

/// When requests of one life go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Never.
    Calm,
    /// At one request, counted from 0.
    At(u64, Fault),
    /// At the first try of each request whose name starts with the one text and has the other in it.
    First(&'static str, &'static str, Fault),
    /// At every request whose name starts with this.
    Always(&'static str, Fault),
    /// This many times in a thousand, each in a way of its own; and the server dies at a request, if it comes to that.
    Random {
        /// Of the draws.
        seed: u64,
        /// Faults in a thousand requests.
        per_mille: u64,
        /// The last request.
        crash_at: Option<u64>,
    },
}

impl Plan {
    /// What goes wrong with a request: the number of it in this life, its name, and how often that was asked before.
    pub(crate) fn fault(&self, number: u64, name: &str, repeat: u64) -> Option<Fault> {
        match *self {
            Self::Calm => None,
            Self::At(at, fault) => (number == at).then_some(fault),
            Self::Always(start, fault) => name.starts_with(start).then_some(fault),
            Self::First(start, end, fault) => {
                (repeat == 0 && name.starts_with(start) && name.contains(end)).then_some(fault)
            }
            Self::Random { seed, crash_at: Some(at), .. } if number == at => {
                Some(if seed % 2 == 0 { Fault::CrashBefore } else { Fault::CrashAfter })
            }
            Self::Random { seed, per_mille, .. } => {
                let mut rng = Rng::new(seed ^ hash(name.as_bytes()) ^ repeat.wrapping_mul(0x2545_f491_4f6c_dd1d));
                rng.per_mille(per_mille).then(|| *rng.pick(&Fault::PASSING))
            }
        }
    }
}
