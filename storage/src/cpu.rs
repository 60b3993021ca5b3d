//! Threads for work that is all computation: compressing frames. Kept apart from the runtime's threads, which must
//! always be free to move bytes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use narlake_format::lake::frame::FrameEncoder;

use crate::error::Error;

type Job = Box<dyn FnOnce(&mut FrameEncoder) + Send>;

/// A fixed number of threads, each with a compressor of its own, and a short queue in front.
pub(crate) struct CpuPool {
    jobs: Option<SyncSender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl CpuPool {
    /// Starts the threads.
    ///
    /// # Errors
    /// Where the system gives no more threads.
    pub(crate) fn start(threads: usize, zstd_level: i32) -> Result<Self, Error> {
        let threads = threads.max(1);
        let (jobs, queue) = sync_channel::<Job>(threads * 2);
        let queue = Arc::new(Mutex::new(queue));
        let spawn = |n| {
            let queue = Arc::clone(&queue);
            std::thread::Builder::new().name(format!("compress-{n}")).spawn(move || work(&queue, zstd_level))
        };
        let threads = (0..threads).map(spawn).collect::<std::io::Result<Vec<_>>>().map_err(|e| Error::State {
            operation: "start",
            path: "compression threads".to_owned(),
            source: e,
        })?;
        Ok(Self { jobs: Some(jobs), threads })
    }

    /// Hands a job to the next free thread; waits while the queue is full. Only for threads that may block.
    ///
    /// A job may end without having run to its end: it panicked, or no thread was left to run it. Whoever waits for it
    /// puts a guard into it that says so when it is dropped.
    ///
    /// # Errors
    /// `Stopped` where all threads are gone.
    pub(crate) fn run(&self, job: impl FnOnce(&mut FrameEncoder) + Send + 'static) -> Result<(), Error> {
        let jobs = self.jobs.as_ref().ok_or(Error::Stopped("compression"))?;
        jobs.send(Box::new(job)).map_err(|_| Error::Stopped("compression"))
    }

    /// How many threads there are.
    pub(crate) fn threads(&self) -> usize {
        self.threads.len()
    }
}

fn work(queue: &Mutex<Receiver<Job>>, zstd_level: i32) {
    let mut encoder = FrameEncoder::new(zstd_level);
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match job {
            // A job that panics takes its own push down, not the thread that all pushes share.
            Ok(job) => {
                if catch_unwind(AssertUnwindSafe(|| job(&mut encoder))).is_err() {
                    tracing::error!("a compression job panicked; its push fails");
                    encoder = FrameEncoder::new(zstd_level);
                }
            }
            Err(_) => return,
        }
    }
}

impl Drop for CpuPool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn a_panic_ends_the_job_alone() {
        let pool = CpuPool::start(1, 3).unwrap();
        let (ended, end) = mpsc::channel::<&str>();
        let guard = ended.clone();
        pool.run(move |_| {
            let _guard = guard;
            panic!("injected");
        })
        .unwrap();
        pool.run(move |_| ended.send("the next").unwrap()).unwrap();
        assert_eq!(end.recv_timeout(PATIENCE), Ok("the next"));
        // What the job that panicked held is gone.
        assert_eq!(end.recv_timeout(PATIENCE), Err(mpsc::RecvTimeoutError::Disconnected));
    }
}
