//! Settings, right and wrong, and the page that describes them.

use super::*;

fn load(file: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("narlake.toml");
    std::fs::write(&path, file).unwrap();
    let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let flags: Vec<Assignment> = flags
        .iter()
        .map(|(key, value)| Assignment { origin: format!("--set {key}"), key: (*key).into(), value: (*value).into() })
        .collect();
    Config::load(Some(&path), environment, &flags).map_err(|error| {
        let cause = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
        format!("{error}{cause}")
    })
}

#[test]
fn nothing_given_is_the_embedded_default_on_loopback() {
    let config = load("", &[], &[]).unwrap();
    assert_eq!(config, Config::default());
    assert!(config.listen.ip().is_loopback());
    assert_eq!(config.bucket_dir(), Path::new("./narlake-data/bucket"));
    assert_eq!(config.state_dir(), Path::new("./narlake-data/state"));
}

#[test]
fn flags_win_over_environment_and_environment_over_file() {
    let file = "listen = '127.0.0.1:1'\n[cache]\npriority = 1\n[limits]\nuploads_max = 1\n";
    let environment = [("NARLAKE_CACHE_PRIORITY", "2"), ("NARLAKE_LIMITS_UPLOADS_MAX", "2")];
    let config = load(file, &environment, &[("limits.uploads_max", "3")]).unwrap();
    assert_eq!((config.listen.port(), config.cache.priority, config.limits.uploads_max), (1, 2, 3));
}

#[test]
fn values_have_the_types_of_their_keys() {
    let config = load("", &[("NARLAKE_AUTH_PUSH_TOKEN_FILES", "/a,/b")], &[("insecure", "true")]).unwrap();
    assert_eq!(config.auth.push_token_files, [PathBuf::from("/a"), PathBuf::from("/b")]);
    assert!(config.insecure);
}

#[test]
fn the_usual_aws_variables_are_read() {
    let environment = [
        ("AWS_ACCESS_KEY_ID", "id"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "eu-1"),
        ("AWS_DEFAULT_REGION", "eu-2"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9"),
        ("NARLAKE_S3_BUCKET", "lake"),
    ];
    let config = load("", &environment, &[]).unwrap();
    assert_eq!((config.s3.region.as_str(), config.s3.endpoint.as_str()), ("eu-1", "http://127.0.0.1:9"));
    assert_eq!(config.credentials.access_key_id.as_deref(), Some("id"));
    assert!(!format!("{config:?}").contains("secret\""));
    // Without a bucket they are about some other service.
    assert_eq!(load("", &environment[..5], &[]).unwrap().s3.endpoint, "");
}

#[test]
fn mistakes_are_named() {
    let check = |file: &str, environment: &[(&str, &str)], flags: &[(&str, &str)], expect: &str| {
        let error = load(file, environment, flags).unwrap_err();
        assert!(error.contains(expect), "{error}\n does not contain {expect}");
    };
    check("lisen = '127.0.0.1:1'", &[], &[], "lisen");
    check("[limits]\nnar_max = 1", &[], &[], "nar_max");
    check("[limit]\nuploads_max = 1", &[], &[], "limit");
    check("listen = 8080", &[], &[], "listen");
    check("listen = 'example.org:80'", &[], &[], "listen");
    check("", &[("NARLAKE_LIMITS_NAR_MAX", "1")], &[], "NARLAKE_LIMITS_NAR_MAX: there is no setting limits.nar_max");
    check("", &[("NARLAKE_CACHE_PRIORITY", "high")], &[], "NARLAKE_CACHE_PRIORITY: \"high\" is not a whole number");
    check("", &[], &[("s3.buckets", "x")], "there is no setting s3.buckets");
    check("", &[], &[("s3", "x")], "there is no setting s3");
    check("", &[], &[("insecure", "maybe")], "true or false");
    check("", &[], &[("cache.name", "nar")], "cache.name");
    check("", &[], &[("cache.name", "A")], "cache.name");
    check("", &[], &[("storage.zstd_level", "40")], "between 1 and 19");
    check("", &[], &[("limits.uploads_max", "0")], "limits.uploads_max: must not be 0");
    check("", &[], &[("limits.uploads_max", "129")], "limits.uploads_max: 129 is more than 128: each upload keeps two");
    check(
        "",
        &[],
        &[("limits.buffers_bytes_max", "1000000")],
        "limits.buffers_bytes_max: 1000000 is not between 67108864",
    );
    check("", &[], &[("limits.connections_max", "9223372036854775807")], "is more than 4294967295");
    check("", &[], &[("limits.hold_s", "0")], "limits.hold_s: must not be 0");
    check("", &[], &[("s3.endpoint", "localhost:9000")], "not an http(s) URL");
    check("", &[], &[("s3.endpoint", "http://localhost:9000")], "no bucket");
    check("", &[], &[("log.format", "xml")], "xml");
}

/// The first cell of each row of the tables in docs/configuration.md is a key, the second its default.
#[test]
fn every_key_is_documented_with_its_default() {
    let page = include_str!("../../../docs/configuration.md");
    let (page, _) = page.split_once("\n## narlake-mountd\n").unwrap();
    let cell = |cell: &str| cell.trim().strip_prefix('`')?.strip_suffix('`').map(str::to_owned);
    let documented: Vec<(String, String)> = page
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix('|')?.split('|');
            Some((cell(cells.next()?)?, cell(cells.next()?)?))
        })
        .collect();
    let mut keys: Vec<(String, String)> =
        Config::keys().into_iter().map(|(key, value)| (key, value.to_string())).collect();
    keys.sort();
    let mut sorted = documented.clone();
    sorted.sort();
    assert_eq!(sorted, keys);
}
