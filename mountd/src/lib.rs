//! The narlake worker daemon: lazy FUSE views of a lake.
