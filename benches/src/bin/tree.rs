//! `tree [--rounds N] [--program PATH] NAME=DIRECTORY..`: how long programs take over copies of one tree of files.
//!
//! Copies are measured in turn, round by round, so that what disturbs the machine disturbs all of them; a figure is the
//! median of the rounds, with the least and the greatest beside it. The first copy is the yardstick; if one is called
//! `overlay`, ratios to it are printed too, and judged by the goals for copies called `sealed` and `live`.
//! *Warm* is after a round that does not count, which begins without anything in the kernel's caches. *Cold* is with the kernel's caches dropped before each operation, which
//! needs root: what a file system keeps on disk is there still.
#![allow(clippy::print_stdout, reason = "the result of a benchmark is its output")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use narlake_bench::tree::{Compiler, Operation, Tree};
use serde_json::json;

/// Rounds that count, if nothing else is said.
const ROUNDS: usize = 7;

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
    for cold in [false, true] {
        let operations = if cold { COLD.to_vec() } else { tree.operations() };
        // Pages of a file that was written lie in memory in another way than those of one that was read.
        drop_caches()?;
        // A round before the first warms up.
        for round in 0..=rounds {
            for operation in &operations {
                for number in 0..copies.len() {
                    // Nobody is always the first.
                    let Some((name, root)) = copies.get((number + round) % copies.len()) else { continue };
                    if cold {
                        drop_caches()?;
                    }
                    let took = time(tree, *operation, root)?;
                    if round > 0 || cold {
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
