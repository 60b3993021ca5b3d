//! The token that is sent to the server, which may be replaced in its file while the daemon runs.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use super::Cause;

/// Longest wait for the token's file.
const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest token, in bytes; a file with more is something else.
const TOKEN_MAX: usize = 64 * 1024;

pub(super) struct Token {
    current: RwLock<Option<Arc<str>>>,
    file: Option<PathBuf>,
}

impl Token {
    pub(super) fn new(token: Option<String>, file: Option<PathBuf>) -> Self {
        Self { current: RwLock::new(token.map(Arc::from)), file }
    }

    pub(super) fn current(&self) -> Option<Arc<str>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The server did not take `shown`. True if there is another one now.
    pub(super) async fn renew(&self, shown: Option<Arc<str>>) -> bool {
        let Some(file) = &self.file else { return false };
        if self.current() != shown {
            return true;
        }
        let read = tokio::time::timeout(READ_TIMEOUT, tokio::fs::read_to_string(file)).await;
        let token = match read {
            // Perhaps just being written.
            Ok(Ok(text)) if text.trim().is_empty() => {
                tracing::warn!(file = %file.display(), "the token's file holds no token, keeping the one that was read");
                return false;
            }
            Ok(Ok(text)) if text.len() <= TOKEN_MAX => Some(Arc::from(text.trim())),
            Ok(Ok(_)) | Err(_) => return false,
            Ok(Err(error)) => {
                tracing::warn!(file = %file.display(), %error, "read the token again");
                return false;
            }
        };
        let changed = token != shown;
        if changed {
            *self.current.write().unwrap_or_else(PoisonError::into_inner) = token;
            tracing::info!(file = %file.display(), "the token has changed");
        }
        changed
    }

    /// The error that says which token was not taken.
    pub(super) fn refused(&self, text: String) -> Cause {
        match self.file.clone() {
            Some(file) => Cause::Token { file, text },
            None => Cause::Status { status: 401, text },
        }
    }
}
