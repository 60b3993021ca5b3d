//! `tree [--rounds N] [--program PATH] NAME=DIRECTORY..`: how long programs take over copies of one tree of files.
//!
//! Copies are measured round by round, each round in an order of its own, so that what disturbs the machine, be it every
//! so many seconds or bytes, disturbs all of them; a figure is the median of the rounds, with the least and the greatest
//! beside it. The first copy is the yardstick; if one is called
//! `overlay`, ratios to it are printed too, and judged by the goals for copies called `sealed` and `live`.
//! *Warm* is with everything in the kernel's caches, *cold* with those dropped before each operation, which needs root: what
//! a file system keeps on disk is there still. Both begin with a round that does not count. Before each cold operation the
//! first copy's is done, for who reads into memory that another has left in small pieces takes longer; and cold rounds
//! are more, since a virtual disk takes twice as long for every eighth gigabyte or so.
#![allow(clippy::print_stdout, reason = "the result of a benchmark is its output")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use narlake_bench::tree::{Compiler, Operation, Tree, numbers};
use serde_json::json;

/// Rounds that count, if nothing else is said.
const ROUNDS: usize = 7;

/// Cold rounds for each warm one.
const COLD_ROUNDS: usize = 3;

/// Operations that are measured cold: those that read.
const COLD: [Operation; 3] = [Operation::Small, Operation::Random, Operation::Sequential];

/// Goals: a copy's name, whether cold, the operation, and the largest ratio to `overlay`.
const GOALS: &[(&str, bool, Operation, f64)] = &[
    ("sealed", false, Operation::Stat, 1.15),
    ("sealed", false, Operation::Open, 1.15),
    ("sealed", false, Operation::Absent, 1.15),
    ("sealed", false, Operation::Small, 1.15),
    ("sealed", false, Operation::Map, 1.15),
    ("sealed", false, Operation::Exec, 1.15),
    ("sealed", false, Operation::Sequential, 1.15),
    ("sealed", false, Operation::Random, 1.15),
    ("sealed", false, Operation::RandomMap, 1.15),
    ("sealed", false, Operation::Compile(Compiler::Gcc), 1.05),
    ("sealed", false, Operation::Compile(Compiler::Gxx), 1.05),
    ("sealed", false, Operation::Compile(Compiler::Rustc), 1.05),
    ("sealed", true, Operation::Small, 1.5),
    ("sealed", true, Operation::Random, 1.15),
    ("sealed", true, Operation::Sequential, 1.15),
    ("live", false, Operation::Stat, 1.5),
    ("live", false, Operation::Open, 1.5),
    ("live", false, Operation::Small, 1.5),
    ("live", false, Operation::Exec, 1.1),
    ("live", false, Operation::Compile(Compiler::Gcc), 1.15),
    ("live", false, Operation::Compile(Compiler::Gxx), 1.15),
    ("live", false, Operation::Compile(Compiler::Rustc), 1.15),
];

type Seconds = BTreeMap<(String, bool, Operation), Vec<f64>>;

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tree: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut arguments: impl Iterator<Item = String>) -> Result<(), String> {
    let usage = || "usage: tree [--rounds N] [--program PATH] NAME=DIRECTORY..".to_owned();
    let (mut rounds, mut program, mut copies) = (ROUNDS, None, Vec::new());
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--rounds" => rounds = arguments.next().and_then(|n| n.parse().ok()).ok_or_else(usage)?,
            "--program" => program = Some(arguments.next().map(PathBuf::from).ok_or_else(usage)?),
            copy => {
                let (name, directory) = copy.split_once('=').ok_or_else(usage)?;
                copies.push((name.to_owned(), PathBuf::from(directory)));
            }
        }
    }
    let (_, first) = copies.first().ok_or_else(usage)?;
    let tree = Tree::learn(first, program).map_err(|error| format!("{}: {error}", first.display()))?;
    let seconds = measure(&tree, &copies, rounds)?;
    let report = report(&tree, &copies, &seconds, rounds);
    println!("{}", serde_json::to_string_pretty(&report).map_err(|error| error.to_string())?);
    Ok(())
}

fn measure(tree: &Tree, copies: &[(String, PathBuf)], rounds: usize) -> Result<Seconds, String> {
    let mut seconds = Seconds::new();
    let Some((_, first)) = copies.first() else { return Ok(seconds) };
    let mut order = numbers();
    for cold in [false, true] {
        let operations = if cold { COLD.to_vec() } else { tree.operations() };
        // Pages of a file that was written lie in memory in another way than those of one that was read.
        drop_caches()?;
        let rounds = if cold { COLD_ROUNDS * rounds } else { rounds };
        // The one before the first warms up, be it a cache below this machine.
        for round in 0..=rounds {
            for operation in &operations {
                let mut turns: Vec<_> = order.by_ref().zip(copies).collect();
                turns.sort_unstable_by_key(|(number, _)| *number);
                for (_, (name, root)) in turns {
                    if cold {
                        drop_caches()?;
                        time(tree, *operation, first)?;
                        drop_caches()?;
                    }
                    let took = time(tree, *operation, root)?;
                    if round > 0 {
                        seconds.entry((name.clone(), cold, *operation)).or_default().push(took);
                    }
                }
            }
        }
    }
    Ok(seconds)
}

fn time(tree: &Tree, operation: Operation, root: &Path) -> Result<f64, String> {
    let took = tree.time(operation, root);
    took.map(|took| took.as_secs_f64()).map_err(|error| format!("{} in {}: {error}", operation.name(), root.display()))
}

fn drop_caches() -> Result<(), String> {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").map_err(|error| format!("drop the kernel's caches: {error}"))
}

fn report(tree: &Tree, copies: &[(String, PathBuf)], seconds: &Seconds, rounds: usize) -> serde_json::Value {
    let median_of = |name: &str, cold, operation| {
        let mut all = seconds.get(&(name.to_owned(), cold, operation))?.clone();
        all.sort_by(f64::total_cmp);
        Some((*all.get(all.len() / 2)?, *all.first()?, *all.last()?))
    };
    let native = copies.first().map(|(name, _)| name.as_str()).unwrap_or_default();
    let mut rows = Vec::new();
    for ((name, cold, operation), all) in seconds {
        let Some((median, least, greatest)) = median_of(name, *cold, *operation) else { continue };
        let to = |other: &str| median_of(other, *cold, *operation).map(|(base, ..)| round(median / base.max(1e-9)));
        let goal = GOALS.iter().find(|(who, when, what, _)| who == name && when == cold && what == operation);
        let verdict = goal.and_then(|(.., most)| Some((most, to("overlay")? <= *most)));
        rows.push(json!({
            "copy": name,
            "cold": cold,
            "operation": operation.name(),
            "seconds": [round(median), round(least), round(greatest)],
            "rounds": all.iter().map(|seconds| round(*seconds)).collect::<Vec<f64>>(),
            "to_native": to(native),
            "to_overlay": to("overlay"),
            "goal": verdict.map(|(most, _)| most),
            "met": verdict.map(|(_, met)| met),
        }));
    }
    json!({ "files": tree.files(), "rounds": rounds, "rows": rows })
}

/// To what can be told apart.
fn round(number: f64) -> f64 {
    (number * 10_000.0).round() / 10_000.0
}
