//! Which seeds a test runs, how a failing one is run again, and where in a loop a test has failed.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Runs a scenario for each seed: the one of `NARLAKE_SIM_SEED`, else as many as `NARLAKE_SIM_SEEDS` says, else
/// `default`. A seed that fails is printed with the command that runs it alone.
///
/// # Panics
/// As the scenario does.
pub fn for_each_seed(test: &str, default: u64, scenario: impl Fn(u64)) {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seeds = match number("NARLAKE_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("NARLAKE_SIM_SEEDS").unwrap_or(default),
    };
    for seed in seeds {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| scenario(seed))) {
            eprintln!("seed {seed} failed; replay: NARLAKE_SIM_SEED={seed} cargo nextest run -p narlake-sim {test}");
            resume_unwind(panic);
        }
    }
}

/// Says where a test was if it panics while this lives.
#[derive(Debug)]
pub struct At(pub String);

impl Drop for At {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("at {}", self.0);
        }
    }
}
