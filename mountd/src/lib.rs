//! The narlake worker daemon: lazy FUSE views of a lake.
//!
//! | module | what |
//! |---|---|
//! | [`app`] | the daemon, its parts in start order |
//! | [`alive`] | that it is alive, for whoever would kill it |
//! | [`cli`], [`config`] | what it is told |
//! | [`kernel`], [`privilege`] | whether the kernel is new enough, and what this process may do |
//! | [`fuse`] | the kernel's side: mount, messages, unmount |
//! | [`fs`] | the file system: names and nodeids in, attributes and bytes out |
//! | [`view`] | which store paths there are, and what the kernel believes about them |
//! | [`views`] | further views, made through the control socket |
//! | [`reader`] | a file's range to its bytes |
//! | [`cache`], [`metadata`], [`pinning`] | file content, and what describes it, on the local disk; what stays there |
//! | [`remote`], [`trust`] | the server, and whether it is believed |
//! | [`overlay`], [`mountinfo`], [`mount_error`] | overlays over the mount, and mounts in general |
//! | [`mounter`], [`supervisor`] | who mounts; the process that keeps mounts when a daemon dies |
//! | [`sealed`] | images of closures for views that the kernel serves alone |
//! | [`nix_socket`] | what Nix asks its lower store |
//! | [`control`] | what the `narlake` command asks |
//! | [`metrics`], [`metrics_page`] | what it counts |
//!
//! A lazy read goes through [`fuse`], [`fs`], [`reader`], then [`cache`] or [`remote`]. Only [`fuse`] names fuser, and
//! nothing below it knows the kernel.

pub mod alive;
pub mod app;
pub mod cache;
pub mod cli;
pub mod config;
pub mod control;
pub mod error;
pub mod fs;
pub mod fuse;
pub mod kernel;
mod lru;
pub mod metadata;
pub mod metrics;
pub mod metrics_page;
pub mod mount_error;
pub mod mounter;
pub mod mountinfo;
pub mod nix_socket;
pub mod notify;
pub mod overlay;
pub mod pinning;
pub mod privilege;
pub mod pusher;
pub mod reader;
pub mod remote;
pub mod sealed;
pub mod shutdown;
pub mod supervisor;
pub mod trust;
pub mod view;
pub mod views;
