//! The narlake server: a Nix binary cache and lake API over one bucket.
//!
//! The engine is `narlake-storage`; here is what surrounds it. A start reads [`config`] and [`cli`], then [`app`] puts
//! the parts together: tokens ([`auth`]), keys ([`signing`]), the lake, [`metrics`], and [`http`], where each resource
//! has a file. [`coding`] compresses and decompresses what goes over the wire; [`shutdown`] knows when to stop.

pub mod app;
pub mod auth;
pub mod cli;
pub mod coding;
pub mod config;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod shutdown;
pub mod signing;
