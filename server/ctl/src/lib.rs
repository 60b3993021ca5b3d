//! The `narlake` command: what people and scripts do with a lake, from pushing to looking inside its files.
//!
//! | module | what |
//! |---|---|
//! | [`cli`] | the command line |
//! | [`output`] | what is printed, for people or as JSON, and progress on a terminal |
//! | [`client`] | the server over HTTP: lake API and Nix binary cache |
//! | [`control`] | the worker's mountd over its control socket |
//! | [`nix`], [`store_uri`] | Nix's own programs, and how they are told which store |
//! | [`dump`] | a file tree on disk as a NAR |
//! | [`spool`] | pushes that wait on disk |
//! | [`place`], [`tree`], [`object`] | a place in a store object: how it is written, found, fetched |
//! | [`preload`] | the database of an overlay's Nix, filled at once |
//! | [`push`], [`hook`], [`pusher`], [`ls`], [`cat`], [`inspect`], [`overlay`], [`view`], [`ensure`], [`registration`], [`evict`], [`status`], [`doctor`], [`worker`], [`completions`] | one command each |
//!
//! A command takes its arguments, asks, and gives a [`Report`](output::Report) that is printed once at its end; what it
//! has to say meanwhile goes to standard error. Of our own crates it knows the formats alone.

use std::fmt;

pub mod cat;
pub mod cli;
pub mod client;
pub mod completions;
pub mod control;
pub mod doctor;
pub mod dump;
pub mod ensure;
pub mod evict;
pub mod hook;
pub mod inspect;
pub mod ls;
pub mod nix;
pub mod object;
pub mod output;
pub mod overlay;
pub mod pin;
pub mod place;
pub mod preload;
pub mod push;
pub mod pusher;
pub mod registration;
pub mod spool;
pub mod status;
pub mod store_uri;
pub mod tree;
pub mod view;
pub mod worker;

/// How a command ended that was carried out and said what there was to say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// All is well: exit code 0.
    Good,
    /// What was asked about is not as it should be, as the report says: exit code 1.
    Bad,
}

/// A command line that makes no sense beyond what the parser sees: exit code 2.
#[derive(Debug)]
pub struct UsageError(pub String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}
