//! `narlake ls` and `narlake cat` against a cache in memory.

mod common;

use common::cache::Cache;
use common::{Ran, Scratch, narlake};
use narlake_cli::dump;

const OWN: &str = "0c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-own";
const OTHER: &str = "1c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-other";

/// A cache with two objects that lead into each other.
fn cache() -> Cache {
    let (scratch, cache) = (Scratch::new(), Cache::start("/nix/store"));
    scratch.file("own/bin/text", "some text\n");
    scratch.executable("own/bin/run", "#!/bin/sh\n");
    scratch.file("own/empty", "");
    scratch.file("own/large", (0..700_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
    scratch.link("own/link", "bin/text");
    scratch.link("own/away", format!("/nix/store/{OTHER}/file"));
    scratch.link("own/host", "/etc/hostname");
    scratch.file("other/file", "elsewhere\n");
    insert(&cache, &scratch, "own", OWN);
    insert(&cache, &scratch, "other", OTHER);
    cache
}

fn insert(cache: &Cache, scratch: &Scratch, tree: &str, path: &str) {
    let mut nar = Vec::new();
    dump::dump(&scratch.path(tree), &mut |block| {
        nar.append(block);
        Ok(())
    })
    .unwrap();
    cache.insert(&path.parse().unwrap(), &nar);
}

fn ask(cache: &Cache, arguments: &[&str]) -> Ran {
    narlake(&[arguments, &["--server", &cache.url]].concat())
}

#[test]
fn listings() {
    let cache = cache();
    let own = &format!("/nix/store/{OWN}");
    let names =
        |arguments: &[&str]| ask(&cache, arguments).good().stdout.lines().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(names(&["ls", own]), ["away", "bin", "empty", "host", "large", "link"]);
    assert_eq!(names(&["ls", OWN]), names(&["ls", own]));
    assert_eq!(names(&["ls", "-R", &format!("{own}/bin/..")])[..4], ["away", "bin", "bin/run", "bin/text"]);
    assert_eq!(names(&["ls", "-l", &format!("{own}/bin/run")]), ["-r-xr-xr-x           10 run"]);
    assert_eq!(names(&["ls", "-l", &format!("{own}/link")]), ["lrwxrwxrwx            0 link -> bin/text"]);
    let json = ask(&cache, &["ls", "--json", &format!("{own}/bin")]).good().json();
    let expected = serde_json::json!({"path": format!("{own}/bin"), "entries": [
        {"name": "run", "type": "regular", "size": 10, "executable": true},
        {"name": "text", "type": "regular", "size": 10},
    ]});
    assert_eq!(json, expected);
}

#[test]
fn contents() {
    let cache = cache();
    let check = |path: &str, expected: &[u8]| assert!(ask(&cache, &["cat", path]).good().bytes == expected, "{path}");
    let large: Vec<u8> = (0..700_000_u32).flat_map(u32::to_le_bytes).collect();
    for no_ranges in [false, true] {
        cache.state().no_ranges = no_ranges;
        check(&format!("{OWN}/bin/text"), b"some text\n");
        check(&format!("/nix/store/{OWN}/link"), b"some text\n");
        check(&format!("{OWN}/away"), b"elsewhere\n");
        check(&format!("{OWN}/empty"), b"");
        check(&format!("{OWN}/large"), &large);
    }
}

/// Where there is no listing, because a name is no text for instance, the tree is read from the NAR.
#[test]
fn without_listings() {
    let cache = cache();
    let scratch = Scratch::new();
    let name = std::os::unix::ffi::OsStrExt::from_bytes(b"no\xfftext");
    let name: &std::ffi::OsStr = name;
    std::fs::create_dir(scratch.path("odd")).unwrap();
    std::fs::write(scratch.path("odd").join(name), "odd").unwrap();
    let odd = "2c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-odd";
    insert(&cache, &scratch, "odd", odd);
    let ran = ask(&cache, &["ls", odd]).good();
    assert_eq!(ran.bytes, b"no\xfftext\n");

    cache.state().no_listings = true;
    assert_eq!(ask(&cache, &["cat", &format!("{OWN}/bin/text")]).good().stdout, "some text\n");
    let nar = cache
        .state()
        .files
        .iter_mut()
        .find(|(url, _)| url.contains("/nar/2c4p"))
        .map(|(_, nar)| *nar.last_mut().unwrap() ^= 1);
    assert!(nar.is_some());
    ask(&cache, &["ls", odd]).bad(1, &["read the NAR of", "at offset"]);
}

#[test]
fn what_is_not_there() {
    let cache = cache();
    let check = |command: &str, path: &str, said: &[&str]| drop(ask(&cache, &[command, path]).bad(1, said));
    check("ls", "2c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-x", &["is not in the lake at http://"]);
    check("ls", &OWN.replace("own", "another"), &["the path of this hash is", OWN]);
    check("ls", &format!("/gnu/store/{OWN}"), &["is not in the store", "/nix/store"]);
    check("ls", &format!("{OWN}/nothing"), &["there is no nothing in /nix/store/"]);
    check("cat", &format!("{OWN}/bin"), &["is a directory", "narlake ls"]);
    check("cat", &format!("{OWN}/bin/text/x"), &["bin/text is not a directory"]);
    check("cat", &format!("{OWN}/host"), &["leads to /etc/hostname, which is not in the store"]);
}

#[test]
fn a_server_that_sends_nonsense() {
    let cache = cache();
    let narinfo = format!("/{}.narinfo", &OWN[..32]);
    let good = cache.state().files.get(&narinfo).cloned().unwrap();
    let check = |text: &str, said: &[&str]| {
        cache.state().files.insert(narinfo.clone(), text.into());
        ask(&cache, &["cat", &format!("{OWN}/bin/text")]).bad(1, said);
    };
    let text = String::from_utf8(good).unwrap();
    check("", &["narinfo lacks StorePath"]);
    check(&text.replace("NarSize", "NarWeight"), &["narinfo lacks NarSize"]);
    check(&text.replace("NarHash: sha256", "NarHash: sha1"), &["line 4 of narinfo: invalid NarHash"]);
    cache.state().files.insert(narinfo.clone(), vec![b'x'; 2 << 20]);
    ask(&cache, &["ls", OWN]).bad(1, &["has more than 1048576 bytes"]);
}
