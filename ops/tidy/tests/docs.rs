//! What the documents say is what the code does.

use std::collections::BTreeSet;

use tidy::{files, root, rust};

/// Names between backquotes or quotes that start with `narlake_` and look like metrics.
fn metric_names(text: &str, quote: char) -> BTreeSet<String> {
    text.split(quote)
        .filter(|word| {
            word.starts_with("narlake_")
                && word.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit())
        })
        .filter(|word| {
            ["_total", "_bytes", "_seconds"].iter().any(|unit| word.ends_with(unit)) || word.matches('_').count() >= 2
        })
        .map(str::to_owned)
        .collect()
}

#[test]
fn metrics_are_documented() {
    let documented =
        metric_names(&std::fs::read_to_string(root().join("docs/metrics.md")).expect("docs/metrics.md"), '`');
    let mut defined = BTreeSet::new();
    for folder in ["storage/src", "server/src", "mountd/src"] {
        for (_, text) in rust(folder).into_iter().filter(|(file, _)| file.ends_with("/metrics.rs")) {
            defined.extend(metric_names(&text, '"'));
        }
    }
    assert!(!defined.is_empty(), "no metric found in the code");
    assert_eq!(defined, documented, "docs/metrics.md and the metrics.rs files differ");
}

#[test]
fn links_lead_somewhere() {
    for file in files().iter().filter(|file| file.ends_with(".md")) {
        let text = std::fs::read_to_string(root().join(file)).expect("documents are UTF-8");
        let folder = root().join(file).parent().expect("a file is in a folder").to_owned();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = target.split('#').next().unwrap_or_default();
            if path.is_empty() || path.contains("://") || path.contains(' ') {
                continue;
            }
            assert!(folder.join(path).exists(), "{file} links to {target}, which is not there");
        }
    }
}
