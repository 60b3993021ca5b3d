//! Every byte layout and wire type of narlake; pure, no I/O.

pub mod api;
pub mod error;
pub mod id;
pub mod lake;
pub mod limits;
pub mod mountinfo;
pub mod nar;
pub mod nix;
