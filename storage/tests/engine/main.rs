//! The engine as its callers see it: one process, real threads, buckets in memory and in directories.
//!
//! What needs a faulty bucket or a crash is in `storage/sim/tests`.

mod bad_input;
mod damage;
mod dedup;
mod delta;
mod fetch;
mod kit;
mod local;
mod publish;
mod round_trip;
mod silence;
mod state;
mod upload;
