//! Errors as one line, for logs and for people; and panics, handed on to who waits.

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

/// The error and all its causes.
#[must_use]
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
