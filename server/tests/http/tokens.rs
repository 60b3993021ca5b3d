//! Who may push.

use std::path::PathBuf;
use std::sync::Arc;

use reqwest::{Method, RequestBuilder};

use super::common::*;
use narlake_server::app::{App, Parts};
use narlake_server::config::Config;
use narlake_server::metrics::Metrics;
use narlake_storage::{Bucket, OsEntropy, SystemClock};

type Credential = fn(RequestBuilder) -> RequestBuilder;

#[tokio::test]
async fn pushing_needs_a_token_and_pulling_does_not() {
    let keep = tempfile::tempdir().unwrap();
    let file = keep.path().join("tokens");
    std::fs::write(&file, "# CI\nsecret-1\nsecret-2\n").unwrap();
    let server = Server::with(|config| config.auth.push_token_files = vec![file]).await;
    let object = Object::file("guarded", b"x").await;
    let log = format!("log/{}.drv", object.path());
    let cases: [(&str, Credential, bool); 8] = [
        ("none", |request| request, false),
        ("wrong bearer", |request| request.bearer_auth("secret-3"), false),
        ("wrong password", |request| request.basic_auth("any", Some("secret-3")), false),
        ("as the user name", |request| request.basic_auth("secret-1", Some("")), false),
        ("a comment", |request| request.bearer_auth("# CI"), false),
        ("garbage", |request| request.header("authorization", "Basic ***"), false),
        ("bearer", |request| request.bearer_auth("secret-1"), true),
        ("password, as in a netrc file", |request| request.basic_auth("any", Some("secret-2")), true),
    ];
    for (what, credential, granted) in cases {
        for (path, body) in [
            (object.url.as_str(), object.file.clone()),
            (&object.narinfo_name(), object.narinfo().into_bytes()),
            (&log, b"built".to_vec()),
            ("nix-cache-info", b"StoreDir: /nix/store\n".to_vec()),
        ] {
            let response = credential(server.request(Method::PUT, path)).body(body).send().await.unwrap();
            assert_eq!(response.status().is_success(), granted, "{what} {path} {}", response.status());
            if !granted {
                assert_eq!(response.status(), 401);
                assert_eq!(response.headers()["www-authenticate"], "Basic realm=\"narlake\"");
            }
        }
    }
    assert!(server.nar(&object).await == object.nar);
    assert!(server.metric("narlake_server_pushes_refused_total{reason=\"no_token\"}").await >= 8.0);
    assert!(server.metric("narlake_server_pushes_refused_total{reason=\"wrong_token\"}").await >= 12.0);
    // Even a wrong token does not hinder reading.
    let response = server.request(Method::GET, &object.narinfo_name()).bearer_auth("secret-3").send().await.unwrap();
    assert_eq!(response.status(), 200);
}

async fn start(listen: &str, insecure: bool, tokens: Option<&str>) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let file: PathBuf = dir.path().join("tokens");
    let mut config =
        Config { listen: listen.parse().unwrap(), data_dir: dir.path().into(), insecure, ..Config::default() };
    if let Some(tokens) = tokens {
        std::fs::write(&file, tokens).unwrap();
        config.auth.push_token_files = vec![file];
    }
    let metrics = Metrics::new();
    let bucket = Bucket::memory(metrics.storage());
    let parts = Parts { bucket, clock: Arc::new(SystemClock), entropy: Arc::new(OsEntropy), metrics };
    match App::start(&config, parts).await {
        Ok(app) => app.stop().await.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

#[tokio::test]
async fn an_address_that_others_reach_needs_a_token() {
    assert_eq!(start("127.0.0.1:0", false, None).await, Ok(()));
    assert_eq!(start("0.0.0.0:0", false, Some("secret")).await, Ok(()));
    assert_eq!(start("0.0.0.0:0", true, None).await, Ok(()));
    let refused = start("0.0.0.0:0", false, None).await.unwrap_err();
    assert!(refused.contains("--insecure") && refused.contains("push_token_files"), "{refused}");
    assert!(start("127.0.0.1:0", false, Some("\n")).await.unwrap_err().contains("no push token"));
}
