//! A link of a given round-trip time and rate, made of a TCP proxy, for machines whose kernel cannot slow its loopback.
//!
//! Each direction is one wire that all connections share. What a connection sends is cut into pieces; a piece leaves when
//! the wire is free, takes its length over the rate to be sent, and arrives half a round trip later. A connection has one
//! piece waiting for the wire, so that all of them get their turn. A connection begins one round trip after it was
//! accepted, as if it had been made over the link; its end travels like its bytes.
//!
//! Not simulated: packets and their headers, loss, and TCP's slow start. A connection has its full window from the first
//! byte, so that whoever opens many of them is not punished for it.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::thread::ClockId;
use rustix::time::Timespec;

/// Most bytes that leave at once, and so what a connection may have to wait for each other one.
pub const PIECE_MAX: usize = 16 << 10;

/// Most connections at once; further ones are closed. Each costs four threads and at most two windows of memory.
pub const CONNECTIONS_MAX: u64 = 256;

/// By how much a late wake-up is made up for, in nanoseconds.
const LATE_MAX_NANOS: u64 = 5_000_000;

const NANOS: u64 = 1_000_000_000;

/// What the link is like.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Round-trip time, in nanoseconds: half of it in each direction.
    pub rtt_nanos: u64,
    /// Bits a second in each direction, above 0.
    pub bits_per_second: u64,
}

impl Settings {
    /// Bytes that a connection has under way in one direction at most: twice what fills the link, and some pieces.
    fn window(&self) -> usize {
        let filling = self.bits_per_second / 8 * (self.rtt_nanos / 1000) / 1_000_000;
        usize::try_from(2 * filling).unwrap_or(usize::MAX).max(4 * PIECE_MAX)
    }
}

/// When one piece is on the wire, in nanoseconds of the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    begin: u64,
    end: u64,
}

/// One direction: how long it is taken.
#[derive(Debug, Default)]
struct Wire {
    busy_until: u64,
}

impl Wire {
    /// The next time that `bytes` can be sent, which is taken from now on.
    fn book(&mut self, now: u64, bytes: usize, bits_per_second: u64) -> Slot {
        let begin = self.busy_until.max(now);
        self.busy_until = begin + bytes as u64 * 8 * NANOS / bits_per_second;
        Slot { begin, end: self.busy_until }
    }
}

/// What went over the link so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Connections accepted.
    pub connections: u64,
    /// Bytes from those who connected.
    pub up_bytes: u64,
    /// Bytes to those who connected.
    pub down_bytes: u64,
}

/// A link; any number of listeners may lead over it.
#[derive(Debug)]
pub struct Link {
    settings: Settings,
    up: Direction,
    down: Direction,
    accepted: AtomicU64,
    ended: AtomicU64,
    trace: Option<Mutex<File>>,
}

#[derive(Debug)]
struct Direction {
    name: &'static str,
    wire: Mutex<Wire>,
    bytes: AtomicU64,
}

impl Direction {
    fn new(name: &'static str) -> Self {
        Self { name, wire: Mutex::default(), bytes: AtomicU64::new(0) }
    }
}

impl Link {
    /// With a file as `trace`, a line goes to it for each piece: seconds of the monotonic clock at which it left who
    /// connected, or arrives there; number of the connection; direction; bytes; of HTTP the first line and the range.
    #[must_use]
    pub fn new(settings: Settings, trace: Option<File>) -> Self {
        let (up, down) = (Direction::new("up"), Direction::new("down"));
        Self { settings, up, down, accepted: AtomicU64::new(0), ended: AtomicU64::new(0), trace: trace.map(Mutex::new) }
    }

    /// Takes connections and leads them over the link to `to`, for ever.
    ///
    /// # Errors
    /// When the listener fails.
    pub fn serve(self: &Arc<Self>, listener: &TcpListener, to: SocketAddr) -> io::Result<()> {
        loop {
            let (client, _) = listener.accept()?;
            let number = self.accepted.fetch_add(1, Ordering::Relaxed) + 1;
            if number - self.ended.load(Ordering::Relaxed) > CONNECTIONS_MAX {
                self.ended.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let link = Arc::clone(self);
            thread::spawn(move || {
                // A connection that fails is closed, and that is all its ends would learn of it on a real link.
                let _closed = link.connection(number, &client, to);
                link.ended.fetch_add(1, Ordering::Relaxed);
            });
        }
    }

    /// What went over the link so far, in whole pieces.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters {
            connections: self.accepted.load(Ordering::Relaxed),
            up_bytes: self.up.bytes.load(Ordering::Relaxed),
            down_bytes: self.down.bytes.load(Ordering::Relaxed),
        }
    }

    fn connection(&self, number: u64, client: &TcpStream, to: SocketAddr) -> io::Result<()> {
        sleep_until(now() + self.settings.rtt_nanos)?;
        let server = &TcpStream::connect(to)?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        thread::scope(|scope| {
            for (direction, from, into) in [(&self.up, client, server), (&self.down, server, client)] {
                let queue = Arc::new(Queue::default());
                let arrivals = Arc::clone(&queue);
                scope.spawn(move || {
                    precise_timers();
                    // Whoever does not read any more need not be sent to.
                    if arrivals.write_to(into).is_err() {
                        arrivals.close();
                        let _gone = from.shutdown(Shutdown::Read);
                    }
                    let _gone = into.shutdown(Shutdown::Write);
                });
                scope.spawn(move || {
                    precise_timers();
                    let read = self.read_from(from, direction, number, &queue);
                    queue.push(Piece { arrival: now() + self.settings.rtt_nanos / 2, bytes: Vec::new() });
                    read
                });
            }
        });
        Ok(())
    }

    /// Takes what `from` sends piece by piece, until its end or until nobody wants it.
    fn read_from(&self, mut from: &TcpStream, direction: &Direction, number: u64, queue: &Queue) -> io::Result<()> {
        let mut buffer = vec![0; PIECE_MAX];
        // When the piece before went on the wire: what was there by then is offered as of then, or each late wake-up on a
        // loaded machine would leave the wire idle.
        let mut turn = 0;
        loop {
            let room = queue.wait_for_room(self.settings.window());
            let ready = rustix::net::recv(from, &mut buffer, RecvFlags::DONTWAIT);
            let (length, offered) = match (room, ready) {
                (Room::Unwanted, _) => return Ok(()),
                (Room::AtOnce, Ok((length, _))) => (length, turn.max(now().saturating_sub(LATE_MAX_NANOS))),
                (Room::Waited, Ok((length, _))) => (length, now()),
                (_, Err(Errno::AGAIN)) => (from.read(&mut buffer)?, now()),
                (_, Err(error)) => return Err(error.into()),
            };
            let bytes = buffer.get(..length).unwrap_or_default();
            let slot = lock(&direction.wire).book(offered, length, self.settings.bits_per_second);
            if length == 0 {
                return sleep_until(slot.end);
            }
            let arrival = slot.end + self.settings.rtt_nanos / 2;
            direction.bytes.fetch_add(length as u64, Ordering::Relaxed);
            self.trace(number, direction, arrival, bytes);
            queue.push(Piece { arrival, bytes: bytes.to_vec() });
            // The next piece is offered when this one is on the wire: later, the wire would be idle in between.
            sleep_until(slot.begin)?;
            turn = slot.begin;
        }
    }

    fn trace(&self, number: u64, direction: &Direction, arrival: u64, bytes: &[u8]) {
        let Some(file) = &self.trace else { return };
        let at = if direction.name == "up" { now() } else { arrival };
        let mut line = format!("{}.{:06} {number} {} {}", at / NANOS, at % NANOS / 1000, direction.name, bytes.len());
        for head in http_head(bytes) {
            let _infallible = write!(line, " {head}");
        }
        line.push('\n');
        // A trace is for people; the link goes on without it.
        let _lost = lock(file).write_all(line.as_bytes());
    }
}

/// The first line of an HTTP message and the value of its `range`, if this is the beginning of one.
fn http_head(bytes: &[u8]) -> Vec<&str> {
    const BEGINNINGS: [&[u8]; 5] = [b"GET ", b"POST ", b"PUT ", b"HEAD ", b"HTTP/"];
    if !BEGINNINGS.iter().any(|beginning| bytes.starts_with(beginning)) {
        return Vec::new();
    }
    let lines = bytes.split(|byte| *byte == b'\n').take_while(|line| line.len() > 1);
    let lines = lines.map(|line| std::str::from_utf8(line).unwrap_or_default().trim_end());
    let is_range = |line: &str| line.get(..6).is_some_and(|name| name.eq_ignore_ascii_case("range:"));
    lines.enumerate().filter(|(at, line)| *at == 0 || is_range(line)).map(|(_, line)| line).collect()
}

/// Bytes under way; none are the end of the connection.
struct Piece {
    arrival: u64,
    bytes: Vec<u8>,
}

/// Whether another piece may be under way.
enum Room {
    AtOnce,
    Waited,
    /// Nobody takes pieces any more.
    Unwanted,
}

/// What one direction of a connection has under way.
#[derive(Default)]
struct Queue {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    pieces: VecDeque<Piece>,
    /// Bytes taken from the one end and not yet by the other.
    bytes: usize,
    closed: bool,
}

impl Queue {
    /// Waits until another piece may be under way.
    fn wait_for_room(&self, window: usize) -> Room {
        let full = |inner: &mut Inner| inner.bytes + PIECE_MAX > window && !inner.closed;
        let mut inner = lock(&self.inner);
        let waited = full(&mut inner);
        let inner = self.changed.wait_while(inner, full).unwrap_or_else(PoisonError::into_inner);
        match (inner.closed, waited) {
            (true, _) => Room::Unwanted,
            (false, true) => Room::Waited,
            (false, false) => Room::AtOnce,
        }
    }

    fn push(&self, piece: Piece) {
        let mut inner = lock(&self.inner);
        inner.bytes += piece.bytes.len();
        inner.pieces.push_back(piece);
        self.changed.notify_all();
    }

    fn close(&self) {
        lock(&self.inner).closed = true;
        self.changed.notify_all();
    }

    /// Hands pieces over as they arrive, to the end of the connection.
    fn write_to(&self, mut into: &TcpStream) -> io::Result<()> {
        loop {
            let none = |inner: &mut Inner| inner.pieces.is_empty();
            let mut inner = self.changed.wait_while(lock(&self.inner), none).unwrap_or_else(PoisonError::into_inner);
            let Some(piece) = inner.pieces.pop_front() else { continue };
            drop(inner);
            sleep_until(piece.arrival)?;
            if piece.bytes.is_empty() {
                return Ok(());
            }
            into.write_all(&piece.bytes)?;
            lock(&self.inner).bytes -= piece.bytes.len();
            self.changed.notify_all();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Nanoseconds of the monotonic clock.
fn now() -> u64 {
    let time = rustix::time::clock_gettime(ClockId::Monotonic);
    let parts = (u64::try_from(time.tv_sec), u64::try_from(time.tv_nsec));
    parts.0.unwrap_or_default() * NANOS + parts.1.unwrap_or_default()
}

fn sleep_until(nanos: u64) -> io::Result<()> {
    let seconds = i64::try_from(nanos / NANOS).unwrap_or(i64::MAX);
    let time = Timespec { tv_sec: seconds, tv_nsec: (nanos % NANOS).cast_signed() };
    loop {
        match rustix::thread::clock_nanosleep_absolute(ClockId::Monotonic, &time) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Without it the kernel may let this thread sleep 50 us longer than asked.
fn precise_timers() {
    let _as_precise_as_it_is = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const MEGABIT_100: u64 = 100_000_000;
    const MILLI: u64 = 1_000_000;

    #[test]
    fn an_idle_wire_sends_at_once() {
        let mut wire = Wire::default();
        // 12,500 bytes take a millisecond.
        assert_eq!(wire.book(7 * MILLI, 12_500, MEGABIT_100), Slot { begin: 7 * MILLI, end: 8 * MILLI });
        assert_eq!(wire.book(20 * MILLI, 12_500, MEGABIT_100), Slot { begin: 20 * MILLI, end: 21 * MILLI });
        assert_eq!(wire.book(30 * MILLI, 0, MEGABIT_100), Slot { begin: 30 * MILLI, end: 30 * MILLI });
    }

    #[test]
    fn a_busy_wire_makes_wait() {
        let mut wire = Wire::default();
        wire.book(0, 25_000, MEGABIT_100);
        assert_eq!(wire.book(MILLI, 12_500, MEGABIT_100), Slot { begin: 2 * MILLI, end: 3 * MILLI });
        assert_eq!(wire.book(MILLI, 12_500, MEGABIT_100), Slot { begin: 3 * MILLI, end: 4 * MILLI });
    }

    /// Connections that each have one piece waiting share the wire, whatever the length of their pieces.
    #[test]
    fn the_rate_holds_for_all_together() {
        for connections in [1, 2, 8] {
            let (mut wire, mut sent, mut offered) = (Wire::default(), vec![0; connections], vec![0; connections]);
            while wire.busy_until < 1000 * MILLI {
                let next = (0..connections).min_by_key(|at| (offered[*at], *at)).unwrap_or_default();
                let length = PIECE_MAX - 1000 * next;
                offered[next] = wire.book(offered[next], length, MEGABIT_100).begin;
                sent[next] += length;
            }
            let (total, expected) = (sent.iter().sum::<usize>() as f64, 12_500_000.0);
            assert!((total / expected - 1.0).abs() < 0.01, "{connections}: {total}");
            let (least, most) = (sent.iter().min(), sent.iter().max());
            assert!(least.zip(most).is_some_and(|(least, most)| *most <= 2 * *least), "{sent:?}");
        }
    }

    #[test]
    fn what_a_window_holds() {
        assert_eq!(Settings { rtt_nanos: 20 * MILLI, bits_per_second: MEGABIT_100 }.window(), 500_000);
        assert_eq!(Settings { rtt_nanos: 0, bits_per_second: MEGABIT_100 }.window(), 4 * PIECE_MAX);
    }

    #[test]
    fn heads_of_requests() {
        assert_eq!(
            http_head(b"GET /a HTTP/1.1\r\nhost: b\r\nRange: bytes=1-2\r\n\r\n"),
            ["GET /a HTTP/1.1", "Range: bytes=1-2"]
        );
        assert_eq!(http_head(b"HTTP/1.1 200 OK\r\n\r\nrange: 1\n"), ["HTTP/1.1 200 OK"]);
        assert!(http_head(b"GETTING ON").is_empty());
        assert!(http_head(b"").is_empty());
    }

    /// Bytes and half-closes pass, no sooner than they may; how much later is up to the machine.
    #[test]
    fn bytes_and_ends_pass() -> io::Result<()> {
        let rtt_nanos = 2 * MILLI;
        let echo = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let to = echo.local_addr()?;
        thread::spawn(move || {
            let (mut stream, _) = echo.accept()?;
            let mut content = Vec::new();
            stream.read_to_end(&mut content)?;
            stream.write_all(&content)
        });
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let link = Arc::new(Link::new(Settings { rtt_nanos, bits_per_second: 8_000_000_000 }, None));
        let serving = Arc::clone(&link);
        thread::spawn(move || serving.serve(&listener, to));

        let sent: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
        let begun = now();
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(&sent)?;
        stream.shutdown(Shutdown::Write)?;
        let mut received = Vec::new();
        stream.read_to_end(&mut received)?;
        assert!(received == sent, "{} bytes of {}", received.len(), sent.len());
        // A round trip for the connection, one there and back, and 4 ms on the wire each way.
        assert!(now() - begun >= 2 * rtt_nanos + 8 * MILLI, "{}", now() - begun);
        let length = sent.len() as u64;
        assert_eq!(link.counters(), Counters { connections: 1, up_bytes: length, down_bytes: length });
        Ok(())
    }
}
