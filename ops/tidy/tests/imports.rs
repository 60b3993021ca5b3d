//! What must never import what (docs/architecture.md, "Direction").

use tidy::{dependencies, rust, shipped};

/// Names of a heavy library in code, outside the only places that may name it.
fn check_home(library: &str, folders: &[&str], homes: &[&str]) {
    let mut found = Vec::new();
    for folder in folders {
        for (file, text) in rust(folder) {
            let tests = file.contains("/tests/") || file.ends_with("/tests.rs");
            if tests || homes.iter().any(|home| file.starts_with(home)) {
                continue;
            }
            let named = |line: &&str| !line.trim_start().starts_with("//") && line.contains(&format!("{library}::"));
            found.extend(shipped(&text).lines().filter(named).map(|line| format!("{file}: {}", line.trim())));
        }
    }
    assert!(found.is_empty(), "{library} is named outside {homes:?}:\n{}", found.join("\n"));
}

#[test]
fn one_home_per_heavy_library() {
    check_home("object_store", &["storage/src", "server", "mountd"], &["storage/src/bucket"]);
    check_home("sled", &["storage/src", "server", "mountd"], &["storage/src/kv.rs"]);
    check_home("axum", &["server/src"], &["server/src/http", "server/src/app.rs"]);
    check_home("fuser", &["mountd"], &["mountd/src/fuse"]);
    check_home(
        "prometheus",
        &["storage/src", "server/src", "mountd/src"],
        &["storage/src/metrics.rs", "server/src/metrics.rs", "mountd/src/metrics.rs"],
    );
}

#[test]
fn packages_depend_downwards() {
    let ours = ["narlake-format", "narlake-storage", "narlake-sim", "narlake-server", "narlake-cli", "narlake-mountd"];
    let allowed = |package: &str| -> &[&str] {
        match package {
            "narlake-format" | "tidy" => &[],
            "narlake-storage" | "narlake-cli" => &["narlake-format"],
            "narlake-server" | "narlake-mountd" | "narlake-sim" => &["narlake-format", "narlake-storage"],
            _ => &ours,
        }
    };
    for (package, direct) in dependencies() {
        for dependency in direct.iter().filter(|dependency| ours.contains(&dependency.as_str())) {
            assert!(allowed(&package).contains(&dependency.as_str()), "{package} must not depend on {dependency}");
        }
    }
}

#[test]
fn formats_are_pure() {
    let banned = ["tokio", "object_store", "sled", "axum", "fuser", "prometheus", "reqwest", "rustix", "getrandom"];
    let direct = dependencies().into_iter().find(|(package, _)| package == "narlake-format").map(|(_, d)| d);
    let direct = direct.expect("narlake-format is a package of the workspace");
    assert!(direct.iter().all(|dependency| !banned.contains(&dependency.as_str())), "{direct:?}");
    for (file, text) in rust("storage/format/src") {
        for word in ["std::fs", "std::net", "std::time::SystemTime", "std::time::Instant", "std::thread"] {
            assert!(!shipped(&text).contains(word), "{file} names {word}: formats do no I/O and read no clock");
        }
        if file.contains("/nix/") || file.contains("/nar/") {
            assert!(!shipped(&text).contains("crate::lake"), "{file}: Nix's formats know nothing of ours");
        }
    }
}

#[test]
fn the_engine_knows_no_front_end() {
    for (file, text) in rust("storage/src") {
        for word in ["axum", "fuser", "hyper::", "clap::"] {
            assert!(!shipped(&text).contains(word), "{file} names {word}");
        }
    }
    for (file, text) in rust("mountd/src/fs") {
        assert!(!shipped(&text).contains("fuser"), "{file} names fuser: replies belong to the shim");
    }
}

#[test]
fn no_fakes_in_what_ships() {
    for folder in ["storage/src", "storage/format/src", "server/src", "server/ctl/src", "mountd/src"] {
        for (file, text) in rust(folder) {
            if file.ends_with("/tests.rs") || file.contains("/tests/") {
                continue;
            }
            for word in ["struct Fake", "struct Mock", "FaultStore"] {
                assert!(!shipped(&text).contains(word), "{file} has a {word}: fakes live in storage/sim or tests");
            }
        }
    }
}
