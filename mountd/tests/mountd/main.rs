//! mountd against a real lake in memory: without the kernel (`store`, `nix`, `ahead`, `server`, `direct`), and with it (`mounted`, `overlay`, `elsewhere`, `sealed`, `outage`, `stop`, `stuck`,
//! `survive`).
//!
//! Mounted tests need root and /dev/fuse. Where those are missing they say so in a line that starts with `SKIP:`, which
//! ops/test looks for.

mod ahead;
mod control;
mod direct;
mod elsewhere;
mod handed_on;
mod kit;
mod mounted;
mod nix;
mod outage;
mod overlay;
mod sealed;
mod server;
mod stop;
mod store;
mod stuck;
mod survive;
mod trees;
mod unprivileged;
mod views;
