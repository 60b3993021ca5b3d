//! What every source file must look like.

use tidy::{files, root, rust, shipped};

const SHIPPED: [&str; 5] = ["storage/src", "storage/format/src", "server/src", "server/ctl/src", "mountd/src"];

/// Modules that may hold `unsafe`: each maps memory or makes a system call that no safe crate covers.
const UNSAFE_ISLANDS: [&str; 3] = ["storage/src/index/map.rs", "mountd/src/cache/resident.rs", "mountd/src/fuse/"];

/// Files that only tests compile.
fn is_test(file: &str) -> bool {
    file.ends_with("/tests.rs") || file.contains("/tests/") || file.ends_with("/strategies.rs")
}

#[test]
fn modules_open_with_what_they_are() {
    for folder in SHIPPED {
        for (file, text) in rust(folder) {
            assert!(is_test(&file) || text.starts_with("//!"), "{file} does not say what it is");
        }
    }
}

#[test]
fn unsafe_stays_on_its_islands() {
    for folder in ["storage", "server", "mountd", "benches", "ops"] {
        for (file, text) in rust(folder) {
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            let uses = code.filter(|line| line.contains("unsafe {") || line.contains("allow(unsafe_code)")).count();
            let island = UNSAFE_ISLANDS.iter().any(|island| file.starts_with(island));
            assert!(uses == 0 || island || file.starts_with("ops/tidy/"), "{file} is no unsafe island");
        }
    }
}

/// A panic on bytes from outside is a way to stop a farm. `expect` is left for what the program itself promises.
#[test]
fn nothing_that_ships_unwraps() {
    for folder in SHIPPED {
        for (file, text) in rust(folder) {
            if is_test(&file) {
                continue;
            }
            for (number, line) in shipped(&text).lines().enumerate() {
                let comment = line.trim_start().starts_with("//");
                for word in [".unwrap()", "todo!(", "unimplemented!(", "thread::sleep"] {
                    assert!(comment || !line.contains(word), "{file}:{}: {word}", number + 1);
                }
            }
        }
    }
}

#[test]
fn files_stay_small() {
    for folder in SHIPPED {
        for (file, text) in rust(folder) {
            let lines = shipped(&text).lines().count();
            assert!(lines <= 520 || is_test(&file), "{file} has {lines} lines: split it by noun");
        }
    }
}

/// Registry hosts and paths of one machine have no place in a tree that others clone.
#[test]
fn nothing_names_one_machine() {
    let this = "ops/tidy/tests/source.rs";
    for file in files().iter().filter(|file| *file != this && !file.ends_with(".lock")) {
        let Ok(text) = std::fs::read_to_string(root().join(file)) else { continue };
        for word in ["/work/", "crates.io", "pypi.org", "deb.debian.org", "registry.npmjs.org"] {
            assert!(!text.contains(word), "{file} names {word}");
        }
    }
}

#[test]
fn texts_are_ascii() {
    for file in files().iter().filter(|file| file.ends_with(".rs") || file.ends_with(".md") || file.ends_with(".toml"))
    {
        let text = std::fs::read(root().join(file)).expect("a listed file is there");
        let line = text.split(|byte| *byte == b'\n').position(|line| !line.is_ascii());
        assert!(line.is_none(), "{file}:{}: not ASCII", line.unwrap_or(0) + 1);
    }
}
