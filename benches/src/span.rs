//! How long something took: by the clock on the wall, and in processor time, which other processes hardly disturb.

use std::time::Instant;

use rustix::time::{ClockId, clock_gettime};

/// What something took, in seconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Span {
    /// By the clock on the wall.
    pub wall: f64,
    /// Processor time, the kernel's work for it included.
    pub cpu: f64,
}

/// A measurement that runs.
pub struct Timer {
    start: Instant,
    clock: ClockId,
    cpu: f64,
}

impl Timer {
    /// Measures all threads.
    #[must_use]
    pub fn process() -> Self {
        Self::new(ClockId::ProcessCPUTime)
    }

    /// Measures this thread.
    #[must_use]
    pub fn thread() -> Self {
        Self::new(ClockId::ThreadCPUTime)
    }

    fn new(clock: ClockId) -> Self {
        Self { start: Instant::now(), clock, cpu: seconds(clock) }
    }

    /// What was taken since the start.
    #[must_use]
    pub fn stop(&self) -> Span {
        Span { wall: self.start.elapsed().as_secs_f64(), cpu: seconds(self.clock) - self.cpu }
    }
}

fn seconds(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
