//! `narlake push` against a cache in memory.

mod common;

use std::fs;

use common::cache::Cache;
use common::{Ran, Scratch, command, narlake, run};

fn push(cache: &Cache, arguments: &[&str]) -> Ran {
    narlake(&[&["push", "--server", &cache.url], arguments].concat())
}

fn text(path: impl AsRef<std::path::Path>) -> String {
    path.as_ref().to_str().unwrap().to_owned()
}

#[test]
fn a_directory_becomes_a_store_path() {
    let (scratch, cache) = (Scratch::new(), Cache::start("/nix/store"));
    scratch.file("tree/a", "hi\n");
    scratch.executable("tree/run", "#!/bin/sh\n");
    scratch.link("tree/l", "a");
    scratch.link("tree/sub/dangling", "/nope");
    scratch.file("tree/Z z", "x");
    scratch.directory("tree/e");
    let tree = text(scratch.path("tree"));
    // What `nix-store --add` printed for this tree, named `t`.
    let expected = "/nix/store/xnqglnfn7n1i396cph1q8lswy4lvzr2v-t";
    let ran = push(&cache, &["--name", "t", &tree]).good();
    assert_eq!(ran.stdout, format!("{expected}\n"));
    assert!(ran.stderr.contains("1 of 1 paths pushed"), "{}", ran.stderr);
    let puts = cache.take_requests("PUT");
    assert!(puts.len() == 2 && puts[0].starts_with("/nar/") && puts[1].ends_with(".narinfo"), "{puts:?}");

    // What is there is not sent again.
    let ran = push(&cache, &["--json", "--name", "t", &tree]).good();
    assert_eq!(ran.json()["roots"][0]["path"], expected);
    assert_eq!((ran.json()["present"].clone(), ran.json()["uploaded"].clone()), (1.into(), serde_json::json!([])));
    assert_eq!(cache.take_requests("PUT"), [""; 0]);

    // Under another name only the narinfo is new.
    let ran = push(&cache, &["--json", &tree]).good();
    assert_eq!(
        (ran.json()["uploaded"][0]["nar_sent"].clone(), ran.json()["bytes_sent"].clone()),
        (false.into(), 0.into())
    );
    assert_eq!(cache.take_requests("PUT").len(), 1);
}

#[test]
fn files_links_and_several_at_once() {
    let (scratch, cache) = (Scratch::new(), Cache::start("/nix/store"));
    let file = text(scratch.file("a file", "content"));
    scratch.link("link", "a file");
    let link = text(scratch.path("link"));
    let ran = push(&cache, &[&file, &link, &file]).good();
    let paths: Vec<_> = ran.stdout.lines().collect();
    assert!(paths.len() == 3 && paths[0] == paths[2] && paths[0].ends_with("-a-file") && paths[1].ends_with("-link"));
    assert!(
        ran.stderr.contains("is named a-file in the store") && ran.stderr.contains("2 of 2 paths"),
        "{}",
        ran.stderr
    );
    assert_eq!(cache.take_requests("POST").len(), 1, "one question for all");
}

#[test]
fn what_cannot_be_pushed() {
    let (scratch, cache) = (Scratch::new(), Cache::start("/nix/store"));
    push(&cache, &[&text(scratch.path("missing"))]).bad(1, &["find", "missing", "No such file"]);
    push(&cache, &["/dev/null"]).bad(1, &["/dev/null is a character device"]);
    push(&cache, &["/"]).bad(1, &["give one with --name"]);
    scratch.directory("tree");
    std::os::unix::net::UnixListener::bind(scratch.path("tree/socket")).unwrap();
    push(&cache, &[&text(scratch.path("tree"))]).bad(1, &["tree/socket is a socket"]);
    assert_eq!(cache.take_requests("PUT"), [""; 0]);
}

#[test]
fn tokens() {
    let (scratch, cache) = (Scratch::new(), Cache::start("/nix/store"));
    let file = text(scratch.file("file", "content"));
    cache.state().token = Some("secret".into());
    push(&cache, &[&file]).bad(1, &["pushing needs a token (status 401)", "--token-file", "NARLAKE_TOKEN"]);
    let token = text(scratch.file("token", "wrong\n"));
    let ran = push(&cache, &[&file, "--token-file", &token]).bad(1, &["status 401"]);
    assert!(!ran.stderr.contains("wrong"));
    fs::write(&token, "secret\n").unwrap();
    push(&cache, &[&file, "--token-file", &token]).good();
    push(&cache, &[&file, "--token-file", "/nonexistent"]).bad(1, &["read the token file /nonexistent"]);

    let other = text(scratch.file("other", "content"));
    let mut command = command();
    command.args(["push", "--server", &cache.url, &other]).env("NARLAKE_TOKEN", "secret");
    run(command).good();
}

#[test]
fn a_server_that_restarts_loses_no_push() {
    let (scratch, cache) = (Scratch::new(), Cache::start("/nix/store"));
    let file = text(scratch.file("file", vec![7; 1 << 20]));
    cache.state().failures = vec![
        ("POST /api".into(), 1, 503),
        ("HEAD /nar".into(), 1, 0),
        ("PUT /nar".into(), 1, 0),
        ("PUT /nar".into(), 1, 500),
        ("PUT /".into(), 1, 502),
    ];
    let ran = push(&cache, &["--json", &file]).good();
    assert_eq!(ran.json()["uploaded"][0]["nar_sent"], true);
    assert_eq!(cache.take_requests("PUT").len(), 5);
}

#[test]
fn a_refusal_is_final() {
    let (scratch, cache) = (Scratch::new(), Cache::start("/nix/store"));
    let file = text(scratch.file("file", "content"));
    cache.state().failures = vec![("PUT /nar".into(), 9, 413)];
    push(&cache, &[&file]).bad(1, &["push /nix/store/", "made to fail", "status 413", "docs/configuration.md"]);
    assert_eq!(cache.take_requests("PUT").len(), 1);
    cache.state().failures = vec![("GET /api/v1/info".into(), 1, 404)];
    push(&cache, &[&file]).bad(1, &["there is no narlake-server at", "--server"]);
}

/// A store with three paths, `top` -> `middle` -> `leaf`, and the programs of a Nix that knows them.
struct Store {
    scratch: Scratch,
    cache: Cache,
}

const PATHS: [(&str, &str); 3] = [
    ("0c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-leaf", ""),
    ("1c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-middle", "0c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-leaf"),
    ("2c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-top", "1c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-middle"),
];

impl Store {
    fn new() -> Self {
        let scratch = Scratch::new();
        let dir = text(scratch.directory("store"));
        let cache = Cache::start(&dir);
        for (path, _) in PATHS {
            scratch.file(&format!("store/{path}/file"), format!("content of {path}"));
        }
        let store = Self { scratch, cache };
        let all: Vec<_> = PATHS.iter().map(|(path, _)| format!("{dir}/{path}")).collect();
        store.program("nix-store", &format!(
            "case $* in --version) ;; *--dump-db*) cat {dir}/../db ;; *--query\\ --requisites*nothing*) echo \"error: path is not valid\" >&2; exit 1 ;; *) echo '{}' ;; esac",
            all.join("\n")
        ));
        store.know(|_| ());
        store
    }

    fn program(&self, name: &str, body: &str) {
        self.scratch.executable(
            &format!("bin/{name}"),
            &format!("#!/bin/sh\nPATH=/bin:/usr/bin\necho \"{name} $*\" >>\"$0.log\"\n{body}\n"),
        );
    }

    /// Has `nix path-info` say what is true of the paths, changed.
    fn know(&self, change: impl Fn(&mut serde_json::Value)) {
        let dir = text(self.scratch.path("store"));
        let (mut json, mut db) = (serde_json::json!({}), String::new());
        for (path, reference) in PATHS {
            let digest = narlake_cli::dump::measure(&self.scratch.path(&format!("store/{path}")), |_| ()).unwrap();
            let references: Vec<_> = reference.split_whitespace().map(|path| format!("{dir}/{path}")).collect();
            db += &format!("{dir}/{path}\n{}\n{}\n\n{}\n", digest.nar_hash.to_hex(), digest.nar_size, references.len());
            db += &references.iter().map(|path| format!("{path}\n")).collect::<String>();
            json[format!("{dir}/{path}")] = serde_json::json!({
                "narHash": digest.nar_hash.to_sri(), "narSize": digest.nar_size, "references": references,
                "deriver": null, "signatures": [], "ca": null,
            });
        }
        change(&mut json);
        self.scratch.file("db", db);
        let file = text(self.scratch.file("path-info", json.to_string()));
        self.program("nix", &format!(
            "case $* in --version) ;; *--json-format*) echo \"error: unrecognised flag '--json-format'\" >&2; exit 1 ;; *) cat {file} ;; esac"
        ));
    }

    fn push(&self, arguments: &[&str]) -> Ran {
        let mut command = command();
        command.args(["push", "--server", &self.cache.url]).args(arguments).env("PATH", self.scratch.path("bin"));
        run(command)
    }

    fn path(&self, index: usize) -> String {
        text(self.scratch.path(&format!("store/{}", PATHS[index].0)))
    }

    /// The names of the paths whose narinfos were put, in order.
    fn published(&self) -> Vec<&'static str> {
        let puts = self.cache.take_requests("PUT");
        let name = |url: &String| {
            let hash = url.strip_prefix('/')?.strip_suffix(".narinfo")?;
            PATHS.iter().find(|(path, _)| path.starts_with(hash)).map(|(path, _)| &path[33..])
        };
        puts.iter().filter_map(name).collect()
    }
}

#[test]
fn a_closure_references_first() {
    let store = Store::new();
    store.scratch.link("result", store.path(2));
    let ran = store.push(&[&text(store.scratch.path("result"))]).good();
    assert_eq!(ran.stdout.trim(), store.path(2));
    assert_eq!(store.published(), ["leaf", "middle", "top"]);
    assert_eq!(store.push(&["--json", &store.path(2)]).good().json()["present"], 3);
    // Of paths that are there nothing more is asked.
    let asked = fs::read_to_string(store.scratch.path("bin/nix.log")).unwrap();
    assert_eq!(asked.matches("path-info").count(), 2, "once with the format and once without: {asked}");
}

#[test]
fn only_what_is_missing() {
    let store = Store::new();
    store.cache.insert(&PATHS[0].0.parse().unwrap(), b"whatever");
    let ran = store.push(&["--json", &store.path(2)]).good();
    assert_eq!(ran.json()["present"], 1);
    assert_eq!(store.published(), ["middle", "top"]);
}

#[test]
fn a_nix_without_its_new_command() {
    let store = Store::new();
    fs::remove_file(store.scratch.path("bin/nix")).unwrap();
    store.push(&[&store.path(2)]).good();
    assert_eq!(store.published(), ["leaf", "middle", "top"]);
}

#[test]
fn content_that_is_not_what_nix_recorded() {
    let store = Store::new();
    store.scratch.file(&format!("store/{}/file", PATHS[1].0), "tampered with");
    store.push(&[&store.path(2)]).bad(1, &["push", "-middle", "has NAR hash"]);
    assert!(!store.published().contains(&"middle"));
}

#[test]
fn what_nix_says_is_not_believed() {
    let store = Store::new();
    let leaf = store.path(0);
    store.know(|json| json[&leaf]["references"] = serde_json::json!(["/elsewhere/x"]));
    store.push(&[&store.path(2)]).bad(1, &["read what nix path-info says", "/elsewhere/x"]);
    store.know(|json| json[&leaf] = serde_json::Value::Null);
    store.push(&[&store.path(2)]).bad(1, &["Nix says nothing about", "-leaf"]);
    let top = store.path(2);
    store.know(|json| json[&leaf]["references"] = serde_json::json!([top]));
    store.push(&[&store.path(2)]).bad(1, &["refers to itself by way of others"]);
    store.program("nix-store", "case $* in --version) ;; *) echo \"error: path 'x' is not valid\" >&2; exit 1 ;; esac");
    store.push(&[&store.path(2)]).bad(1, &["nix-store failed: error: path 'x' is not valid", "--by-content"]);
}

#[test]
fn store_paths_by_content() {
    let store = Store::new();
    let ran = store.push(&["--json", "--by-content", "--name", "other", &store.path(0)]).good();
    assert_eq!(ran.json()["roots"][0]["kind"], "source");
    assert!(ran.json()["roots"][0]["path"].as_str().unwrap().ends_with("-other"));
    store.push(&["--name", "other", &store.path(0)]).bad(1, &["keeps its name"]);
    // Without Nix nothing is known of references.
    let ran = push(&store.cache, &[&store.path(0)]).good();
    assert!(ran.stderr.contains("there is no nix-store here"), "{}", ran.stderr);
    assert!(ran.stdout.contains(&format!("-{}", PATHS[0].0)), "{}", ran.stdout);
}
