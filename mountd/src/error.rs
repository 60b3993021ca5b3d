//! Panics of tasks, handed on to who waits for them.

use tokio::task::JoinHandle;

/// What a task returns. Its panic goes on here.
pub(crate) async fn joined<T>(task: JoinHandle<T>) -> T {
    match task.await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(payload) => std::panic::resume_unwind(payload),
            // Nobody aborts these tasks but a runtime that stops, which drops whoever waits here too.
            Err(_) => std::future::pending().await,
        },
    }
}
