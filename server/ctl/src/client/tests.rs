//! The parts of the client that need no server.

use futures::TryStreamExt as _;

use super::*;
use crate::cli::SERVER_DEFAULT;

fn access() -> AccessOptions {
    AccessOptions { token_file: None, timeout: Duration::from_secs(1) }
}

#[test]
fn urls_lead_below_the_server() {
    let check = |server: &str, relative: &str, expected: &str| {
        let client = Client::new(&server.parse().unwrap(), &access()).unwrap();
        assert_eq!(client.join(relative).unwrap().as_str(), expected);
    };
    check(SERVER_DEFAULT, "x.narinfo", "http://127.0.0.1:8080/x.narinfo");
    check("http://h", "nar/y.nar", "http://h/nar/y.nar");
    check("http://h/cache", "nar/y.nar", "http://h/cache/nar/y.nar");
    check("http://h/cache/", "http://other/y.nar", "http://other/y.nar");
}

#[test]
fn passwords_are_not_shown() {
    let client = Client::new(&"http://user:secret@h/".parse().unwrap(), &access()).unwrap();
    assert_eq!(client.url(), "http://h/");
}

#[test]
fn the_token_stays_with_its_server() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "# push\n\n  secret \n").unwrap();
    let access = AccessOptions { token_file: Some(file.path().to_owned()), ..access() };
    let client = Client::new(&"http://h".parse().unwrap(), &access).unwrap();
    let shows = |url: &str| {
        let request = client.request(Method::GET, &client.join(url).unwrap()).build().unwrap();
        request.headers().get("authorization").map(|value| value.to_str().unwrap().to_owned())
    };
    assert_eq!(shows("nar/x").as_deref(), Some("Bearer secret"));
    assert_eq!(shows("http://other/nar/x"), None);
    assert_eq!(shows("https://h/nar/x"), None);
    std::fs::write(file.path(), "\n").unwrap();
    assert!(matches!(Client::new(&"http://h".parse().unwrap(), &access), Err(ClientError::Token { .. })));
}

#[tokio::test]
async fn ranges_are_cut_out_of_what_comes() {
    async fn cut(pieces: &[&'static str], skip: u64, length: Option<u64>) -> Option<String> {
        let pieces: Vec<_> = pieces.iter().map(|piece| Ok(Bytes::from_static(piece.as_bytes()))).collect();
        let stream = exactly(futures::stream::iter(pieces), "url".into(), skip, length);
        let got: Result<Vec<Bytes>, _> = stream.try_collect().await;
        got.ok().map(|got| String::from_utf8(got.concat()).unwrap())
    }
    assert_eq!(cut(&["abc", "def"], 0, None).await.as_deref(), Some("abcdef"));
    assert_eq!(cut(&["abc", "def"], 0, Some(6)).await.as_deref(), Some("abcdef"));
    assert_eq!(cut(&["abc", "def"], 2, Some(2)).await.as_deref(), Some("cd"));
    assert_eq!(cut(&["abc", "def"], 3, Some(0)).await.as_deref(), Some(""));
    assert_eq!(cut(&["abc", "def"], 4, Some(3)).await, None);
    assert_eq!(cut(&["abc"], 0, Some(4)).await, None);
}

#[test]
fn messages_of_servers() {
    let check =
        |text: &str, expected: &str| assert_eq!(error::message(StatusCode::NOT_FOUND, text.as_bytes()), expected);
    check("it is not here\n", "it is not here");
    check(r#"{"error":"no such path"}"#, "no such path");
    check(r#"{"error":"internal error","detail":"request 1-2"}"#, "internal error (request 1-2)");
    check("", "not found");
    check("<html>404</html>", "not found");
    check("red \x1b[31m", "red \\u{1b}[31m");
}
