//! Memory for bodies that are held whole: counted before it is filled, so that many at once do not add up.
//!
//! There are two pools, each of `limits.buffers_bytes_max`: one for pushes, one for the questions and answers of
//! readers, who need no token and must never keep a push waiting. Whoever is about to hold a body takes a [`Buffer`] of
//! the most that it may come to, and waits for it, for a time; what turns out not to be needed is given back. A buffer
//! that was joined to its bytes lives as long as they do, in whatever queue they stand.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::HttpError;

/// A pool of memory.
pub struct Buffers {
    pool: Arc<Semaphore>,
    bytes_max: usize,
    wait: Duration,
}

impl Buffers {
    /// A pool of so many bytes, for which requests wait so long.
    #[must_use]
    pub fn new(bytes_max: u64, wait: Duration) -> Self {
        let bytes_max = usize::try_from(bytes_max).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Self { pool: Arc::new(Semaphore::new(bytes_max)), bytes_max, wait }
    }

    /// Takes memory, first come, first served. More than the whole pool counts as the whole pool: what cannot be
    /// known to fit is at least alone.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// 503 where there is none within the time.
    pub async fn take(&self, bytes: usize) -> Result<Buffer, HttpError> {
        let permits = u32::try_from(bytes.min(self.bytes_max)).unwrap_or(u32::MAX);
        let taken = tokio::time::timeout(self.wait, Arc::clone(&self.pool).acquire_many_owned(permits)).await;
        match taken {
            Ok(Ok(permit)) => Ok(Buffer(permit)),
            // Never closed, so the time is up.
            _ => Err(HttpError::busy("too many bodies are held in memory")),
        }
    }
}

/// Memory of a pool, which is given back when this is dropped.
#[derive(Debug)]
pub struct Buffer(OwnedSemaphorePermit);

impl Buffer {
    /// Gives back what is beyond so many bytes.
    pub fn shrink(&mut self, bytes: usize) {
        if let Some(surplus) = self.0.num_permits().checked_sub(bytes) {
            drop(self.0.split(surplus));
        }
    }

    /// These bytes, which hold this memory until the last of them is dropped.
    #[must_use]
    pub fn join(mut self, bytes: impl AsRef<[u8]> + Send + 'static) -> Bytes {
        self.shrink(bytes.as_ref().len());
        Bytes::from_owner(Joined { bytes, _buffer: self })
    }
}

struct Joined<B> {
    bytes: B,
    _buffer: Buffer,
}

impl<B: AsRef<[u8]>> AsRef<[u8]> for Joined<B> {
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn memory_comes_back_when_the_bytes_are_gone() {
        let buffers = Buffers::new(100, Duration::from_secs(1));
        let free = || buffers.pool.available_permits();
        let bytes = buffers.take(60).await.unwrap().join(vec![0; 10]);
        assert_eq!(free(), 90, "what is not needed comes back at once");
        let part = bytes.slice(3..4);
        drop(bytes);
        assert_eq!(free(), 90);
        drop(part);
        assert_eq!(free(), 100);
        // More than there is means all of it.
        drop(buffers.take(1000).await.unwrap());
        assert_eq!(free(), 100);
    }

    #[tokio::test]
    async fn waiting_ends() {
        let buffers = Buffers::new(100, Duration::from_millis(70));
        let held = buffers.take(50).await.unwrap();
        let start = tokio::time::Instant::now();
        assert!(buffers.take(51).await.is_err());
        assert!(start.elapsed() >= Duration::from_millis(70));
        let (taken, ()) = tokio::join!(buffers.take(51), async { drop(held) });
        assert!(taken.is_ok());
    }
}
