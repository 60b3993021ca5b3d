//! One file being filled: which chunks are there, and which one is being fetched by whom.

use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use narlake_format::id::ContentId;
use tokio::sync::{Notify, OnceCell};

use super::on_disk;
use crate::cache::{Cache, Partial};

/// A file that is not complete in the cache, and its readers' common knowledge of it.
pub(super) struct Fill {
    content: ContentId,
    size: u64,
    chunks: usize,
    /// Set once somebody has looked at the disk.
    opened: OnceCell<Option<Arc<Partial>>>,
    // Held for a look or a mark, never across an await.
    state: Mutex<State>,
    changed: Arc<Notify>,
}

struct State {
    chunks: Vec<Chunk>,
    /// Where present chunks are.
    data: Option<Arc<File>>,
    complete: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Chunk {
    Missing,
    Flying,
    Present,
}

/// What a reader finds of the chunks that it wants.
pub(super) struct Share {
    /// Those that are there.
    pub(super) present: Vec<usize>,
    /// Those that this reader is to fetch.
    pub(super) mine: Claim,
    /// Those that somebody else fetches.
    pub(super) others: Vec<usize>,
    /// Done when one of them has landed, or fallen.
    pub(super) changed: std::pin::Pin<Box<tokio::sync::futures::OwnedNotified>>,
}

/// Chunks that one reader fetches. What it has not kept when it is dropped is free for others.
pub(super) struct Claim {
    fill: Arc<Fill>,
    chunks: Vec<usize>,
}

impl Claim {
    pub(super) fn chunks(&self) -> &[usize] {
        &self.chunks
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut fell = false;
        let mut state = self.fill.state();
        for chunk in &self.chunks {
            if let Some(chunk) = state.chunks.get_mut(*chunk).filter(|chunk| **chunk == Chunk::Flying) {
                *chunk = Chunk::Missing;
                fell = true;
            }
        }
        drop(state);
        // Only then: a reader that waits has an empty claim, and would wake itself for ever.
        if fell {
            self.fill.changed.notify_waiters();
        }
    }
}

impl Fill {
    pub(super) fn new(content: ContentId, size: u64, chunks: usize) -> Self {
        let state = State { chunks: vec![Chunk::Missing; chunks], data: None, complete: false };
        let (opened, changed) = (OnceCell::new(), Arc::new(Notify::new()));
        Self { content, size, chunks, opened, state: Mutex::new(state), changed }
    }

    /// Looks at what the disk has; the first reader does, the others wait for it.
    pub(super) async fn open(self: &Arc<Self>, cache: &Arc<Cache>) {
        let open = || async {
            let (cache, content, size, chunks) = (Arc::clone(cache), self.content, self.size, self.chunks);
            // Completed between this reader's look and now: a partial file beside it would take its place.
            let hot = Arc::clone(&cache);
            if let Some(file) = on_disk(move || hot.open_hot(&content, size)).await {
                let mut state = self.state();
                state.data = Some(Arc::new(file));
                state.chunks.fill(Chunk::Present);
                state.complete = true;
                return None;
            }
            let (partial, present) = on_disk(move || Partial::open(&cache, &content, size, chunks)).await?;
            let mut state = self.state();
            state.data = Some(partial.data());
            for (chunk, present) in state.chunks.iter_mut().zip(present) {
                if present {
                    *chunk = Chunk::Present;
                }
            }
            Some(Arc::new(partial))
        };
        self.opened.get_or_init(open).await;
    }

    /// Divides the chunks that a reader wants, and claims for it those that nobody has.
    pub(super) fn share(self: &Arc<Self>, wanted: &[usize]) -> Share {
        let mut changed = Box::pin(Arc::clone(&self.changed).notified_owned());
        // Under the lock: a landing after it is not missed.
        let mut state = self.state();
        changed.as_mut().enable();
        let (mut present, mut mine, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for &number in wanted {
            match state.chunks.get_mut(number) {
                Some(Chunk::Present) => present.push(number),
                Some(Chunk::Flying) => others.push(number),
                Some(chunk) => {
                    *chunk = Chunk::Flying;
                    mine.push(number);
                }
                None => {}
            }
        }
        drop(state);
        Share { present, mine: Claim { fill: Arc::clone(self), chunks: mine }, others, changed }
    }

    /// Those of these chunks that are not there and that nobody fetches.
    pub(super) fn missing(&self, chunks: Range<usize>) -> Vec<usize> {
        let state = self.state();
        chunks.filter(|chunk| state.chunks.get(*chunk) == Some(&Chunk::Missing)).collect()
    }

    /// The file that holds the chunks which are present.
    pub(super) fn data(&self) -> Option<Arc<File>> {
        self.state().data.clone()
    }

    /// These chunks could not be read back: they count as missing, unless somebody fetches them already. True if the
    /// file was complete, so that it must go from the cache as a whole.
    pub(super) fn lost(&self, run: Range<usize>) -> bool {
        let mut state = self.state();
        let chunks = state.chunks.get_mut(run).into_iter().flatten();
        chunks.filter(|chunk| **chunk == Chunk::Present).for_each(|chunk| *chunk = Chunk::Missing);
        state.complete
    }

    /// Keeps a run of claimed chunks that lies at `offset`. If it cannot be kept, it stays claimed until the claim is
    /// dropped.
    pub(super) async fn keep(self: &Arc<Self>, cache: &Arc<Cache>, run: Range<usize>, offset: u64, content: Vec<u8>) {
        if self.state().complete {
            // It has its final name and is not written any more; what was lost of it is kept by the next fill.
            return;
        }
        let partial = self.opened.get().cloned().flatten();
        let (cache, id, whole) = (Arc::clone(cache), self.content, run == (0..self.chunks));
        let (first, count) = (run.start, run.len());
        let kept = on_disk(move || match partial {
            Some(partial) => partial.put(first, count, offset, &content).then(|| partial.data()),
            None if whole => cache.put_hot(&id, &content).map(Arc::new),
            None => None,
        });
        let Some(data) = kept.await else { return };
        let complete = {
            let mut state = self.state();
            state.data.get_or_insert(data);
            for chunk in state.chunks.get_mut(run).into_iter().flatten() {
                *chunk = Chunk::Present;
            }
            let complete = !state.complete && state.chunks.iter().all(|chunk| *chunk == Chunk::Present);
            state.complete |= complete;
            complete
        };
        self.changed.notify_waiters();
        if complete && let Some(partial) = self.opened.get().cloned().flatten() {
            on_disk(move || partial.complete()).await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
