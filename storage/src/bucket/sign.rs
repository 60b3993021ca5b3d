//! URLs with which others read an object straight from the bucket, without its keys.
//!
//! Only an S3 service signs. A URL is made without asking it, and says nothing about whether the object is there.

use std::sync::Arc;
use std::time::Duration;

use object_store::path::Path;
use object_store::signer::{Method, Signer as Sign};

use super::{Bucket, bucket_error, path};
use crate::error::Error;

/// What signs for a bucket.
#[derive(Clone)]
pub(super) struct Signer {
    pub(super) keys: Arc<dyn Sign>,
    /// Prefix of every key.
    pub(super) prefix: Option<Path>,
}

impl Bucket {
    /// A URL that reads this object for so long, ranges included; `None` where the bucket signs nothing.
    ///
    /// # Errors
    /// Where the host's credentials cannot be had.
    pub async fn signed_url(&self, key: &str, valid: Duration) -> Result<Option<String>, Error> {
        let Some(Signer { keys, prefix }) = &self.signer else { return Ok(None) };
        let mut at = path(key)?;
        if let Some(prefix) = prefix {
            at = prefix.parts().chain(at.parts()).collect();
        }
        let url = keys.signed_url(Method::GET, &at, valid).await;
        url.map(|url| Some(url.into())).map_err(|error| bucket_error("sign a URL of", key, error))
    }
}
