//! Who may push. Pulling is open; pushing needs a token as soon as one is configured.
//!
//! A token is any line of a token file. Clients show it as a bearer token, or as the password of HTTP basic
//! authentication, since that is all that Nix can send (from a netrc file); the user name is not looked at. Only hashes
//! of tokens are kept, and hashes are compared, in constant time: how long a comparison takes tells nothing.
//!
//! This file knows headers as text, and no HTTP types.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

/// Most tokens: each request is compared with all of them.
const TOKENS_MAX: usize = 1024;

/// The push tokens.
#[derive(Debug, Clone, Default)]
pub struct Tokens {
    // `blake3::Hash` compares in constant time.
    hashes: Vec<blake3::Hash>,
}

/// Whether a request may push.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It may.
    Granted,
    /// It shows no token, and needs one.
    Missing,
    /// It shows a token that is none of ours.
    Wrong,
}

/// Tokens that cannot be used, or a lack of them.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The file cannot be read.
    #[error("read push tokens {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file was configured, so somebody means pushes to be guarded, but it has no token.
    #[error("{path} has no push token; put one on a line of its own")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// There are more tokens than the limit.
    #[error("{count} push tokens are configured, the limit is {TOKENS_MAX}")]
    TooMany {
        /// How many there are.
        count: usize,
    },
    /// Anyone who reaches the address could push.
    #[error(
        "refusing to listen on {listen}, where anyone could push: configure auth.push_token_files, listen on 127.0.0.1, \
         or pass --insecure"
    )]
    Open {
        /// The address.
        listen: SocketAddr,
    },
}

impl Tokens {
    /// Reads the token files: one token a line; empty lines and those that start with `#` are passed over.
    ///
    /// # Errors
    /// Names the file.
    pub fn open(files: &[PathBuf]) -> Result<Self, AuthError> {
        let mut hashes = Vec::new();
        for path in files {
            let before = hashes.len();
            hashes.extend(read(path)?.lines().map(str::trim).filter(|line| is_token(line)).map(hash));
            if hashes.len() == before {
                return Err(AuthError::Empty { path: path.clone() });
            }
        }
        if hashes.len() > TOKENS_MAX {
            return Err(AuthError::TooMany { count: hashes.len() });
        }
        Ok(Self { hashes })
    }

    /// Whether a request with this `Authorization` header may push.
    #[must_use]
    pub fn may_push(&self, authorization: Option<&str>) -> Access {
        if self.hashes.is_empty() {
            return Access::Granted;
        }
        let Some(token) = authorization.and_then(presented) else { return Access::Missing };
        let shown = hash(&token);
        // All of them, so that the time does not tell which.
        let found = self.hashes.iter().fold(false, |found, known| found | (*known == shown));
        if found { Access::Granted } else { Access::Wrong }
    }

    /// Refuses to offer pushing to everyone who reaches an address, unless told that this is meant.
    ///
    /// # Errors
    /// The refusal.
    pub fn guard(&self, listen: SocketAddr, insecure: bool) -> Result<(), AuthError> {
        if listen.ip().is_loopback() || insecure || !self.hashes.is_empty() {
            Ok(())
        } else {
            Err(AuthError::Open { listen })
        }
    }
}

fn read(path: &Path) -> Result<String, AuthError> {
    std::fs::read_to_string(path).map_err(|source| AuthError::Read { path: path.to_owned(), source })
}

fn is_token(line: &str) -> bool {
    !line.is_empty() && !line.starts_with('#')
}

fn hash(token: &str) -> blake3::Hash {
    blake3::hash(token.as_bytes())
}

/// The token in an `Authorization` header: a bearer token, or the password of basic authentication.
fn presented(header: &str) -> Option<String> {
    let (scheme, rest) = header.split_once(' ')?;
    let rest = rest.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(rest.to_owned());
    }
    if scheme.eq_ignore_ascii_case("basic") {
        let text = String::from_utf8(BASE64.decode(rest).ok()?).ok()?;
        return text.split_once(':').map(|(_, password)| password.to_owned());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(text: &str) -> Result<Tokens, AuthError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        std::fs::write(&path, text).unwrap();
        Tokens::open(&[path])
    }

    #[test]
    fn a_header_grants_or_not() {
        let tokens = tokens("# CI\nfirst-token\n\n  second-token  \n").unwrap();
        let basic = |text: &str| format!("Basic {}", BASE64.encode(text));
        let check = |header: Option<&str>, expect: Access| assert_eq!(tokens.may_push(header), expect, "{header:?}");
        check(Some("Bearer first-token"), Access::Granted);
        check(Some("bearer second-token"), Access::Granted);
        check(Some(&basic("anyone:first-token")), Access::Granted);
        check(Some(&basic(":second-token")), Access::Granted);
        check(Some("Bearer # CI"), Access::Wrong);
        check(Some("Bearer "), Access::Wrong);
        check(Some("Bearer first-token2"), Access::Wrong);
        check(Some(&basic("first-token:")), Access::Wrong);
        check(Some(&basic("first-token")), Access::Missing);
        check(Some("Basic %%%"), Access::Missing);
        check(Some("Digest x"), Access::Missing);
        check(Some(""), Access::Missing);
        check(None, Access::Missing);
        assert_eq!(Tokens::default().may_push(None), Access::Granted);
    }

    #[test]
    fn files_that_guard_nothing_are_refused() {
        assert!(matches!(tokens(""), Err(AuthError::Empty { .. })));
        assert!(matches!(tokens("# none yet\n\n"), Err(AuthError::Empty { .. })));
        assert!(matches!(Tokens::open(&["/nonexistent/tokens".into()]), Err(AuthError::Read { .. })));
        assert!(matches!(tokens(&"t\n".repeat(TOKENS_MAX + 1)), Err(AuthError::TooMany { .. })));
    }

    #[test]
    fn only_loopback_is_open() {
        let check = |listen: &str, tokens: &Tokens, insecure: bool, expect: bool| {
            assert_eq!(tokens.guard(listen.parse().unwrap(), insecure).is_ok(), expect, "{listen} {insecure}");
        };
        let (none, some) = (Tokens::default(), tokens("t").unwrap());
        check("127.0.0.1:1", &none, false, true);
        check("[::1]:1", &none, false, true);
        check("0.0.0.0:1", &none, false, false);
        check("[::]:1", &none, false, false);
        check("192.0.2.1:1", &none, false, false);
        check("0.0.0.0:1", &none, true, true);
        check("0.0.0.0:1", &some, false, true);
    }
}
