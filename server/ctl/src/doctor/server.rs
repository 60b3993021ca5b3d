//! Checks of the server, as it is reached from here: that it answers, whom it lets in, and what time it is there.

use super::facts::Facts;
use super::finding::Finding;
use super::system::System;

/// How far two clocks may be apart, in seconds: half of what leases and tokens allow.
const APART_MAX_S: i64 = 30;

/// How far they may be apart before something fails, in seconds.
const APART_BAD_S: i64 = 300;

/// How long before its end a token is told of, in seconds.
const EXPIRY_SOON_S: i64 = 3 * 24 * 3600;

/// How a server answers.
#[derive(Clone, Debug, Default)]
pub(super) struct Answer {
    /// Its URL, without a password.
    pub(super) url: String,
    /// Whether it says which lake it has, or why it does not; none if it was not asked.
    pub(super) info: Option<Result<(), String>>,
    /// Whether the token can be read and may push; none if there is none.
    pub(super) token: Option<Result<(), String>>,
    /// Pushing needs a token, or a better one.
    pub(super) needs_token: bool,
    /// Seconds until the token ends, if that is in it.
    pub(super) expires_s: Option<i64>,
    /// Seconds that this host's clock is ahead.
    pub(super) ahead_s: Option<i64>,
}

pub(super) fn reach(_: &System, facts: &Facts) -> Vec<Finding> {
    let Some(server) = &facts.server else {
        let found = "which server is not known: mountd does not say, and --server was not given";
        return vec![Finding::warning("server", found, "narlake doctor --server URL")];
    };
    let mut findings = Vec::new();
    match &server.info {
        Some(Ok(())) => findings.push(Finding::ok("server", format!("{} answers", server.url))),
        Some(Err(error)) => {
            let mend = format!("curl -v {}api/v1/info; is narlake-server running, and that the right URL?", server.url);
            findings.push(Finding::problem("server", error.clone(), mend));
        }
        None => {}
    }
    let mend = "put a token that the server knows into the file given with --token-file (NARLAKE_TOKEN_FILE)";
    match &server.token {
        Some(Err(error)) => findings.push(Finding::problem("token", error.clone(), mend)),
        Some(Ok(())) => findings.push(Finding::ok("token", "the server lets it push")),
        None if server.needs_token => {
            findings.push(Finding::warning("token", "there is none, and the server wants one from who pushes", mend));
        }
        None => {}
    }
    match server.expires_s {
        Some(left) if left <= 0 => {
            findings.push(Finding::problem("token", format!("it ended {} s ago", left.unsigned_abs()), mend));
        }
        Some(left) if left < EXPIRY_SOON_S => {
            findings.push(Finding::warning("token", format!("it ends in {} h", left / 3600), mend));
        }
        _ => {}
    }
    findings
}

pub(super) fn clock(_: &System, facts: &Facts) -> Vec<Finding> {
    let Some(ahead) = facts.server.as_ref().and_then(|server| server.ahead_s) else { return Vec::new() };
    let which = if ahead < 0 { "behind" } else { "ahead of" };
    let apart = format!("this clock is {} s {which} the server's", ahead.unsigned_abs());
    let mend = "timedatectl set-ntp true";
    vec![match ahead.abs() {
        0..=APART_MAX_S => Finding::ok("clock", apart),
        ..=APART_BAD_S => Finding::warning("clock", apart, mend),
        _ => Finding::problem("clock", apart, mend),
    }]
}

/// Seconds since 1970 of `Sun, 06 Nov 1994 08:49:37 GMT`.
pub(super) fn http_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut words = text.split_once(", ")?.1.split(' ');
    let day: u64 = words.next()?.parse().ok().filter(|day| (1..=31).contains(day))?;
    let name = words.next()?;
    let month = MONTHS.iter().position(|month| *month == name)? as u64 + 1;
    let year: u64 = words.next()?.parse().ok().filter(|year| (1970..10_000).contains(year))?;
    let mut time = words.next()?.splitn(3, ':').map(|part| part.parse::<u64>().ok().filter(|part| *part < 61));
    let (hours, minutes, seconds) = (time.next()??, time.next()??, time.next()??);
    if words.next() != Some("GMT") {
        return None;
    }
    // Days of the civil calendar, counted in years that begin in March.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    Some((days - 719_468) * 86_400 + hours * 3600 + minutes * 60 + seconds)
}

/// When a token says that it ends, if it is of the kind that says so: three parts of base64, the second a document.
pub(super) fn expiry(token: &str) -> Option<i64> {
    #[derive(serde::Deserialize)]
    struct Claims {
        exp: i64,
    }
    let mut parts = token.split('.');
    let (_, claims, _) = (parts.next()?, parts.next()?, parts.next()?);
    serde_json::from_slice::<Claims>(&base64url(claims)?).ok().map(|claims| claims.exp)
}

fn base64url(text: &str) -> Option<Vec<u8>> {
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0_u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff).to_le_bytes()[0]);
        }
    }
    Some(bytes)
}
