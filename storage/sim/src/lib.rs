//! Seeded fault simulation of the narlake storage engine.
//!
//! A [`World`] is one bucket in memory, one clock, one source of randomness and a [`Model`] of what was acknowledged, all
//! from one seed. A lake lives in it one [`life`](World::life) at a time, on a runtime of its own with paused time, over
//! a [`FaultStore`] that fails as its [`Plan`] says. When a life ends, by crash or in peace, nothing of it goes on; the
//! next one opens the same bucket with the state directory that was left, an older one, or none. Between lives
//! [`World::check`] compares the bucket with the model.
//!
//! ```text
//! tests -> World -> life -> actors (push, read) -> Lake -> Bucket (retries, metering) -> FaultStore -> InMemory
//!            \-> Model: store path -> NAR
//! ```
//!
//! What a seed fixes: the objects pushed, the faults, the ids, the clock. What it does not: the engine cuts, hashes and
//! compresses on threads of its own, so two pushes that run at once may meet the bucket in another order each time.
//! Faults are therefore drawn per request (operation, key, how often it was asked before), not from one running stream,
//! and with one push at a time a seed gives the same requests in the same order, which `tests/replay.rs` asserts; with
//! two at once it gives the same content but for ids.

mod clock;
mod damage;
mod fault;
mod model;
mod object;
mod rng;
mod seeds;
mod store;
mod world;

pub use clock::{SimClock, SimEntropy};
pub use damage::Damage;
pub use fault::{Fault, Plan};
pub use model::Model;
pub use object::{Node, Object, Objects};
pub use rng::Rng;
pub use seeds::{At, for_each_seed};
pub use store::{FaultStore, Request};
pub use world::{Actor, Life, StateDir, World};
