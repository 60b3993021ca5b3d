//! Work in the kernel that may not come back: a bounded number at a time, and nobody waits beyond his limit.
//!
//! A system call on an overlay can wait for this daemon's own session, for a disk, or for another process that holds a
//! directory. It cannot be called off. So each runs on a thread of its own that keeps its turn until the kernel lets go
//! of it, while whoever asked goes away at the deadline; what is stuck takes up turns of its own gate alone.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use crate::error::joined;
use crate::mount_error::MountError;

/// Until when something is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit {
    pub(super) until: Instant,
    length: Duration,
}

impl Limit {
    pub(super) fn new(length: Duration) -> Self {
        Self { until: Instant::now() + length, length }
    }

    pub(super) fn is_over(&self) -> bool {
        Instant::now() >= self.until
    }

    /// What a caller is told whose time is up.
    pub(super) fn late(&self, operation: &'static str, path: &Path) -> MountError {
        let limit_ms = u64::try_from(self.length.as_millis()).unwrap_or(u64::MAX);
        MountError::Late { operation, path: path.to_owned(), limit_ms }
    }
}

/// Threads that may be in the kernel for one purpose.
pub(super) struct Gate {
    turns: Arc<Semaphore>,
}

impl Gate {
    pub(super) fn new(threads: usize) -> Self {
        Self { turns: Arc::new(Semaphore::new(threads)) }
    }

    /// What the work returns; `None` when the time is up. Work that has not begun by then never begins; what has begun
    /// goes on.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        limit: Limit,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let done = async {
            let turn = Arc::clone(&self.turns).acquire_owned().await.ok()?;
            joined(tokio::task::spawn_blocking(move || {
                let done = (!limit.is_over()).then(work);
                drop(turn);
                done
            }))
            .await
        };
        timeout_at(limit.until, done).await.ok().flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    /// Work that hangs takes up its gate's threads and nothing else: callers end in time, others are served.
    #[tokio::test(flavor = "multi_thread")]
    async fn stuck_work_is_left_behind() {
        let (gate, other) = (Gate::new(2), Gate::new(2));
        let began = Arc::new(AtomicUsize::new(0));
        let (release, stuck) = mpsc::channel::<()>();
        let stuck = Arc::new(std::sync::Mutex::new(stuck));
        let limit = Limit::new(Duration::from_millis(300));
        let hang = || {
            let (began, stuck) = (Arc::clone(&began), Arc::clone(&stuck));
            gate.run(limit, move || {
                began.fetch_add(1, Ordering::SeqCst);
                let _ = stuck.lock().map(|stuck| stuck.recv());
            })
        };
        let all = futures::future::join_all((0..20).map(|_| hang())).await;
        assert!(all.iter().all(Option::is_none));
        assert!(limit.until.elapsed() < Duration::from_secs(5));
        assert_eq!(began.load(Ordering::SeqCst), 2);
        assert_eq!(other.run(Limit::new(Duration::from_secs(10)), || 7).await, Some(7));
        assert_eq!(gate.run(Limit::new(Duration::from_millis(50)), || 7).await, None);
        drop(release);
        assert_eq!(gate.run(Limit::new(Duration::from_secs(10)), || 7).await, Some(7));
        // The others had their time and never began.
        assert_eq!(began.load(Ordering::SeqCst), 2);
    }
}
