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
        let answer = answer.to_owned();
        Self::start_with(socket, move |_| answer.clone())
    }

    /// Answers each request with what this makes of it, then closes.
    pub(crate) fn start_with(socket: &Path, answer: impl Fn(&ControlRequest) -> String + Send + 'static) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let (sender, asked) = mpsc::channel();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                let request = serde_json::from_str(&line).unwrap();
                let _ = stream.write_all(answer(&request).as_bytes());
                let _ = sender.send(request);
            }
        });
        Self { socket: socket.to_owned(), asked }
    }

    pub(crate) fn asked(&self) -> ControlRequest {
        self.asked.recv_timeout(std::time::Duration::from_secs(10)).unwrap()
    }
    /// What it was asked next, if it was by now.
    pub(crate) fn asked_by_now(&self) -> Option<ControlRequest> {
        self.asked.recv_timeout(std::time::Duration::from_millis(100)).ok()
    }
}
