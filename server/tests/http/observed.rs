//! What an operator sees.

use std::collections::BTreeSet;

use reqwest::Method;

use super::common::*;
use narlake_format::nix::compression::Compression;

#[tokio::test]
async fn requests_are_counted_by_pattern_in_both_places() {
    let server = Server::start().await;
    let object = server.push(&Object::new("counted", nar_of_tree(&[]), Compression::Xz, &[]).await).await;
    server.nar(&object).await;
    server.get(&format!("default/{}", object.narinfo_name())).await;
    server.get("no/such/url/at/all").await;
    let requests = |labels: &str| format!("narlake_server_requests_total{{{labels}}}");
    for (labels, expect) in [
        (r#"method="PUT",route="/nar/{file}",status="201""#, 1.0),
        (r#"method="PUT",route="/{hash}.narinfo",status="201""#, 1.0),
        (r#"method="GET",route="/{hash}.narinfo",status="200""#, 2.0),
        (r#"method="GET",route="/nar/{file}",status="200""#, 1.0),
        (r#"method="GET",route="other",status="404""#, 1.0),
    ] {
        assert!(server.metric(&requests(labels)).await.total_cmp(&expect).is_eq(), "{labels}");
    }
    let sent = server.metric("narlake_server_sent_bytes_total{route=\"/nar/{file}\"}").await;
    assert!(sent.total_cmp(&(object.nar.len() as f64)).is_eq(), "{sent}");
    let received = server.metric("narlake_server_received_bytes_total{route=\"/nar/{file}\"}").await;
    assert!(received.total_cmp(&(object.file.len() as f64)).is_eq(), "{received}");
    assert!(server.metric("narlake_ingest_nar_bytes_total").await > 0.0, "the engine's are on the same page");
    assert!(server.metric("process_resident_memory_bytes").await > 0.0, "and the process's");
    assert!(server.metric(r#"narlake_server_responses_aborted_total{by="client",route="/nar/{file}"}"#).await < 1.0);
}

/// docs/metrics.md has a row for each metric that is exposed, and ops/grafana/narlake.json a query for each row.
#[tokio::test]
async fn every_metric_is_documented_and_on_the_dashboard() {
    let server = Server::start().await;
    server.push(&Object::new("documented", nar_of_tree(&[]), Compression::Xz, &[]).await).await;
    let (_, text) = server.get("metrics").await;
    let exposed: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .filter(|name| name.starts_with("narlake_"))
        .collect();
    let page = include_str!("../../../docs/metrics.md");
    let documented: BTreeSet<&str> =
        page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    let undocumented: Vec<_> = exposed.difference(&documented).collect();
    assert!(undocumented.is_empty(), "{undocumented:?}");
    // One without a series yet is not exposed; the server's own all have theirs from the start.
    let gone: Vec<_> = documented.difference(&exposed).filter(|name| name.starts_with("narlake_server_")).collect();
    assert!(gone.is_empty(), "{gone:?}");

    let dashboard = include_str!("../../../ops/grafana/narlake.json");
    let unseen: Vec<_> = documented.iter().filter(|name| !dashboard.contains(*name)).collect();
    assert!(unseen.is_empty(), "{unseen:?}");
}

/// Whoever may not see a cause gets a number to ask about.
#[tokio::test]
async fn each_answer_has_a_request_id_of_its_own() {
    let server = Server::start().await;
    let mut ids = Vec::new();
    for path in ["nix-cache-info", "nonsense", "api/v1/info"] {
        let response = server.request(Method::GET, path).send().await.unwrap();
        ids.push(response.headers()["x-request-id"].to_str().unwrap().to_owned());
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 3);
}
