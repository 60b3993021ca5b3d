//! `lake GEN1 GEN2 [THREADS]`: how fast a generation goes in and out, and what it and its mass rebuild take.
//!
//! Everything is measured in one process and run, so that the figures are ratios of each other. The parts of an ingest
//! run alone, on one thread; the engine takes several pushes at once, as clients send them, and uses THREADS for
//! compressing. For figures per core run it pinned to one (`taskset -c 0`).
//!
//! `ratio` is the share of the limit by the clock on the wall, and `cpu_ratio` the processor time of the parts over that
//! of the engine, which says the same of one core where other processes disturb the run. Parts and ingests are medians of
//! several runs, new data each time in a lake of its own.
#![allow(clippy::print_stdout, reason = "the result of a benchmark is its output")]

use std::path::Path;

use narlake_bench::corpus::{self, Item};
use narlake_bench::engine::{Engine, PUSHES, bucket_bytes, pack_bytes};
use narlake_bench::parts::{self, Parts};
use narlake_bench::rate;
use narlake_bench::span::Span;
use serde_json::json;

/// Level of new frames and of the whole-NAR comparison.
const LEVEL: i32 = 3;
/// Times that parts and ingests are measured.
const ROUNDS: usize = 5;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [first, second, rest @ ..] = arguments.as_slice() else {
        eprintln!("usage: lake GEN1 GEN2 [THREADS]");
        std::process::exit(2);
    };
    let threads = rest.first().and_then(|n| n.parse().ok()).unwrap_or(1);
    let (first, second) = (corpus::load(Path::new(first)), corpus::load(Path::new(second)));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build();
    let report = runtime.expect("a runtime").block_on(run(&first, &second, threads));
    println!("{}", serde_json::to_string_pretty(&report).expect("a report is JSON"));
}

async fn run(first: &[Item], second: &[Item], threads: usize) -> serde_json::Value {
    let bytes: u64 = first.iter().map(|item| item.nar.len() as u64).sum();
    let measured: Vec<Parts> = (0..ROUNDS).map(|_| parts::measure(first, LEVEL)).collect();
    let alone = Parts {
        sha256: median(measured.iter().map(|parts| parts.sha256)),
        cdc: median(measured.iter().map(|parts| parts.cdc)),
        blake3: median(measured.iter().map(|parts| parts.blake3)),
        zstd: median(measured.iter().map(|parts| parts.zstd)),
    };
    let mut new = Vec::new();
    for _ in 1..ROUNDS {
        let directory = directory();
        new.push(Engine::open(directory.path(), threads).await.ingest(first).await);
    }
    let directory = directory();
    let engine = Engine::open(directory.path(), threads).await;
    new.push(engine.ingest(first).await);
    engine.publish(first).await;
    let mut known = Vec::new();
    for _ in 0..ROUNDS {
        known.push(engine.ingest(first).await);
    }
    let export = engine.export(first).await;
    engine.close().await;
    let tables_first = engine.table_bytes(first).await;
    let packs_first_bytes = stored(directory.path());
    let stored_first = packs_first_bytes + tables_first;
    let packs_first = pack_bytes(directory.path());
    engine.ingest(second).await;
    engine.publish(second).await;
    engine.close().await;
    let tables_second = engine.table_bytes(second).await;
    let stored_second = stored(directory.path()) - packs_first_bytes + tables_second;
    let packs = pack_bytes(directory.path());
    let zstd = |items: &[Item]| -> u64 {
        items.iter().map(|item| zstd::bulk::compress(&item.nar, LEVEL).map_or(0, |z| z.len() as u64)).sum()
    };
    let ingest = |spans: Vec<Span>, limit: f64| {
        let (wall, cpu) = (median(spans.iter().map(|span| span.wall)), median(spans.iter().map(|span| span.cpu)));
        json!({
            "mb_s": round(rate(bytes, wall)), "limit_mb_s": round(rate(bytes, limit)), "ratio": round(limit / wall),
            "cpu_ratio": round(limit / cpu), "cores_used": round(cpu / wall),
        })
    };
    json!({
        "paths": first.len(),
        "nar_mb": round(bytes as f64 / 1e6),
        "threads": threads,
        "alone_mb_s": {
            "sha256": round(rate(bytes, alone.sha256)),
            "cdc": round(rate(bytes, alone.cdc)),
            "blake3": round(rate(bytes, alone.blake3)),
            "zstd": round(rate(bytes, alone.zstd)),
        },
        "pushes": PUSHES,
        "ingest_new": ingest(new, alone.new_data()),
        "ingest_known": ingest(known, alone.known_data()),
        "export_mb_s": round(rate(bytes, export)),
        "stored_mb": { "first": round(stored_first as f64 / 1e6), "rebuild": round(stored_second as f64 / 1e6) },
        "rebuild_percent_of_first": round(stored_second as f64 * 100.0 / stored_first.max(1) as f64),
        "zstd_per_nar_mb": { "first": round(zstd(first) as f64 / 1e6), "rebuild": round(zstd(second) as f64 / 1e6) },
        "rebuild_kb": {
            "data": round((packs.data - packs_first.data) as f64 / 1e3),
            "metadata": round((packs.metadata - packs_first.metadata) as f64 / 1e3),
            "string_tables": round(tables_second as f64 / 1e3),
            "pack_tables": round((packs.tables - packs_first.tables) as f64 / 1e3),
        },
        "bucket": bucket_bytes(directory.path()).into_iter().collect::<std::collections::BTreeMap<_, _>>(),
    })
}

/// In memory where there is such a place: the engine is measured here, not the disk.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory")
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Bytes of all packs. String tables are kept in path records where they are short, and are added where this is used;
/// the rest of a record and upload documents are texts about content, shown under `bucket`.
fn stored(directory: &Path) -> u64 {
    bucket_bytes(directory).iter().filter(|(folder, _)| folder == "packs").map(|(_, bytes)| bytes).sum()
}
