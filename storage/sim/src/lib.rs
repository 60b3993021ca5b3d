//! Seeded fault simulation of the narlake storage engine.
