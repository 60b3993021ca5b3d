//! Every byte layout and wire type of narlake; pure, no I/O.

pub mod error;
pub mod id;
pub mod limits;
pub mod lake;
pub mod nar;
pub mod nix;
pub mod api;
