//! A mountd that says what it was told to, and remembers what it was asked.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use narlake_format::api::control::{ControlRequest, ControlResponse};

pub(crate) struct Mountd {
    pub(crate) socket: PathBuf,
    asked: mpsc::Receiver<ControlRequest>,
}

impl Mountd {
    pub(crate) fn start(socket: &Path, answer: &ControlResponse) -> Self {
        Self::start_raw(socket, &(serde_json::to_string(answer).unwrap() + "\n"))
    }

    /// Answers every request with these bytes, then closes.
    pub(crate) fn start_raw(socket: &Path, answer: &str) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let (sender, asked) = mpsc::channel();
        let answer = answer.to_owned();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                let _ = sender.send(serde_json::from_str(&line).unwrap());
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        Self { socket: socket.to_owned(), asked }
    }

    pub(crate) fn asked(&self) -> ControlRequest {
        self.asked.recv_timeout(std::time::Duration::from_secs(10)).unwrap()
    }
}
