//! The server over real HTTP on a free loopback port, over a bucket in memory or in a temporary directory.

mod bad_input;
mod clients;
mod common;
mod downloads;
mod lake_api;
mod memory;
mod observed;
mod resources;
mod tokens;
mod uploads;
