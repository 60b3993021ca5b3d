//! `link --rtt-ms N --mbit N [--trace FILE] ADDRESS..`: a link of this round-trip time and rate to each of the addresses.
//!
//! Prints a line of JSON with the address to connect to for each of them, in their order, and a line of counters for each
//! line on standard input, whose end ends it: so it does not outlive who started it.
#![allow(clippy::print_stdout, reason = "the addresses and counters are its output")]

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::ExitCode;
use std::sync::Arc;

use narlake_bench::link::{Link, Settings};
use serde_json::json;

const USAGE: &str = "usage: link --rtt-ms N --mbit N [--trace FILE] ADDRESS..";

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("link: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut arguments: impl Iterator<Item = String>) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let (mut rtt_ms, mut mbit, mut trace, mut servers) = (0, 0, None, Vec::new());
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--rtt-ms" => rtt_ms = arguments.next().ok_or(USAGE)?.parse::<u32>()?,
            "--mbit" => mbit = arguments.next().ok_or(USAGE)?.parse::<u32>()?,
            "--trace" => trace = Some(File::create(arguments.next().ok_or(USAGE)?)?),
            server => servers.push(server.parse::<SocketAddr>().map_err(|_| USAGE)?),
        }
    }
    if mbit == 0 || servers.is_empty() {
        return Err(USAGE.into());
    }
    let settings = Settings { rtt_nanos: u64::from(rtt_ms) * 1_000_000, bits_per_second: u64::from(mbit) * 1_000_000 };
    let link = Arc::new(Link::new(settings, trace));
    for server in servers {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        println!("{}", json!({ "listen": listener.local_addr()?.to_string(), "to": server.to_string() }));
        let link = Arc::clone(&link);
        std::thread::spawn(move || {
            if let Err(error) = link.serve(&listener, server) {
                eprintln!("link: {error}");
                std::process::exit(1);
            }
        });
    }
    for line in std::io::stdin().lines() {
        line?;
        let counted = link.counters();
        println!(
            "{}",
            json!({ "connections": counted.connections, "up_bytes": counted.up_bytes, "down_bytes": counted.down_bytes })
        );
    }
    Ok(())
}
