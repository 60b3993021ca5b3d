//! Who reads when: what somebody waits for, before what somebody may want next.
//!
//! Reads ahead have a few turns of their own, so that they never fill the line, and take one only while few reads are
//! under way that somebody waits for. A read ahead that somebody comes to wait for is *lifted*: it goes on as if it had
//! been asked for. One that has waited for long, or that nobody cares about any more, is dropped unread.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, SemaphorePermit};

/// Reads under way that somebody waits for, from which on reads ahead are held back: as many keep a line busy.
const BUSY: usize = 4;

/// Longest wait of a read ahead for its turn. By then whoever it was for has asked for it, or gone elsewhere.
const STALE: Duration = Duration::from_secs(2);

/// Whoever a read ahead is for keeps this; reads whose turn comes when it is gone are dropped.
#[derive(Debug, Clone, Default)]
pub struct Interest(Arc<()>);

impl Interest {
    fn watch(&self) -> Weak<()> {
        Arc::downgrade(&self.0)
    }
}

const QUEUED: u8 = 0;
const STARTED: u8 = 1;
const LIFTED: u8 = 2;
const DROPPED: u8 = 3;

/// A read ahead, from when it is wanted to when it starts.
pub(super) struct Ticket {
    state: AtomicU8,
    lifted: Notify,
    interest: Weak<()>,
}

impl Ticket {
    pub(super) fn new(interest: &Interest) -> Self {
        Self { state: AtomicU8::new(QUEUED), lifted: Notify::new(), interest: interest.watch() }
    }

    /// Somebody waits for it now. False if it has been dropped and will never be read.
    pub(super) fn lift(&self) -> bool {
        self.leave_queue(LIFTED);
        let alive = self.state.load(Ordering::Acquire) != DROPPED;
        if alive {
            self.lifted.notify_one();
        }
        alive
    }

    /// Done when somebody waits for it.
    pub(super) async fn lifted(&self) {
        self.lifted.notified().await;
    }

    fn leave_queue(&self, state: u8) -> bool {
        self.state.compare_exchange(QUEUED, state, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

/// The turns of one fetch engine.
pub(super) struct Turns {
    all: Semaphore,
    ahead: Semaphore,
    under_way: AtomicUsize,
    calm: Notify,
}

/// Leave to read, until dropped.
pub(super) struct Turn<'a> {
    _permit: SemaphorePermit<'a>,
    counted: Option<&'a Turns>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(turns) = self.counted {
            turns.one_less();
        }
    }
}

impl Turns {
    pub(super) fn new(parallel: usize, ahead_parallel: usize) -> Self {
        Self {
            all: Semaphore::new(parallel.max(1)),
            ahead: Semaphore::new(ahead_parallel),
            under_way: AtomicUsize::new(0),
            calm: Notify::new(),
        }
    }

    fn one_less(&self) {
        self.under_way.fetch_sub(1, Ordering::AcqRel);
        self.calm.notify_waiters();
    }

    /// A turn for what somebody waits for. `None` never comes while the engine lives.
    pub(super) async fn demand(&self) -> Option<Turn<'_>> {
        // Counted while it waits as well: that is when reads ahead are most in the way.
        self.under_way.fetch_add(1, Ordering::AcqRel);
        let mut waiting = Uncount(Some(self));
        let permit = self.all.acquire().await.ok()?;
        waiting.0 = None;
        Some(Turn { _permit: permit, counted: Some(self) })
    }

    /// A turn for a read ahead; `None` if it is to be dropped.
    pub(super) async fn ahead(&self, ticket: &Ticket) -> Option<Turn<'_>> {
        let turn = async {
            let permit = self.ahead.acquire().await.ok()?;
            loop {
                let mut calm = std::pin::pin!(self.calm.notified());
                calm.as_mut().enable();
                if self.under_way.load(Ordering::Acquire) < BUSY {
                    return Some(Turn { _permit: permit, counted: None });
                }
                calm.await;
            }
        };
        let turn = tokio::select! {
            biased;
            () = ticket.lifted.notified() => None,
            turn = tokio::time::timeout(STALE, turn) => turn.ok().flatten(),
        };
        let wanted = turn.is_some() && ticket.interest.strong_count() > 0;
        if ticket.leave_queue(if wanted { STARTED } else { DROPPED }) {
            return turn.filter(|_| wanted);
        }
        drop(turn);
        self.demand().await
    }
}

/// Counts one less when dropped, unless told otherwise.
struct Uncount<'a>(Option<&'a Turns>);

impl Drop for Uncount<'_> {
    fn drop(&mut self) {
        if let Some(turns) = self.0 {
            turns.one_less();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn reads_ahead_wait_while_the_line_is_busy() {
        let (turns, interest) = (Turns::new(16, 2), Interest::default());
        let mut busy = Vec::new();
        for _ in 0..BUSY {
            busy.push(turns.demand().await.unwrap());
        }
        let ticket = Ticket::new(&interest);
        let waiting = turns.ahead(&ticket);
        let mut waiting = std::pin::pin!(waiting);
        assert!(tokio::time::timeout(STALE / 2, &mut waiting).await.is_err());
        busy.pop();
        assert!(waiting.await.is_some());
        assert!(ticket.lift(), "it has started");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_lifted_waits_for_nobody() {
        let (turns, interest) = (Turns::new(16, 0), Interest::default());
        let ticket = Ticket::new(&interest);
        let waiting = turns.ahead(&ticket);
        let mut waiting = std::pin::pin!(waiting);
        assert!(tokio::time::timeout(STALE / 2, &mut waiting).await.is_err());
        assert!(ticket.lift());
        assert!(waiting.await.is_some_and(|turn| turn.counted.is_some()));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_nobody_wants_is_dropped() {
        let (turns, interest) = (Turns::new(16, 1), Interest::default());
        let ticket = Ticket::new(&interest);
        drop(interest);
        assert!(turns.ahead(&ticket).await.is_none());
        assert!(!ticket.lift());
        let (none, interest) = (Turns::new(16, 0), Interest::default());
        let stale = Ticket::new(&interest);
        assert!(none.ahead(&stale).await.is_none());
        assert!(!stale.lift());
    }
}
