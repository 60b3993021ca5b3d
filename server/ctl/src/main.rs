//! The narlake command.
fn main() {}
