//! The network between the nodes: a TCP proxy in front of one server, that can be cut, stalled,
//! slowed down and made to lie, and healed.
//!
//! One thread accepts; each connection has a thread per direction. They look at the proxy's state
//! between reads, at least every `TICK`.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use socket2::SockRef;

use crate::tamper::{Stream, Tamper};

const TICK: Duration = Duration::from_millis(10);

/// What happens to the traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// It passes.
    Open,
    /// Connections are reset, new ones refused: a cable pulled, with the peers told.
    Cut,
    /// Nothing passes and nobody is told; what was sent arrives when the line is open again.
    Stalled,
    /// Requests pass, answers don't (until the line is open again).
    OnlyToServer,
    /// Answers pass, requests don't (until the line is open again).
    OnlyToClient,
    /// Nothing passes and nobody is told, and the connections of this time stay dead for ever:
    /// half-open, as after a firewall forgot them.
    Blackhole,
}

/// How the traffic passes, when it does.
#[derive(Clone, Copy, Debug, Default)]
struct Quality {
    delay: Duration,
    bytes_per_second: Option<u64>,
}

struct State {
    line: Line,
    quality: Quality,
    tamper: Option<Tamper>,
}

struct Shared {
    state: Mutex<State>,
    closing: AtomicBool,
    to_server: AtomicU64,
    to_client: AtomicU64,
    open: AtomicU64,
}

/// A proxy in front of one server.
pub struct Proxy {
    shared: Arc<Shared>,
    port: u16,
}

impl Proxy {
    /// Listens on `port` (0: any) and passes everything on to `target`.
    pub fn start(port: u16, target: u16) -> Proxy {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("the proxy's port is free");
        let port = listener.local_addr().expect("it is bound").port();
        let state = State { line: Line::Open, quality: Quality::default(), tamper: None };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            closing: AtomicBool::new(false),
            to_server: AtomicU64::new(0),
            to_client: AtomicU64::new(0),
            open: AtomicU64::new(0),
        });
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, target));
        let acceptor = Arc::clone(&shared);
        thread::spawn(move || acceptor.accept(&listener, server));
        Proxy { shared, port }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Changes what happens to the traffic.
    pub fn set(&self, line: Line) {
        self.shared.state().line = line;
    }

    /// Everything passes again, at full speed and unchanged.
    pub fn heal(&self) {
        *self.shared.state() = State { line: Line::Open, quality: Quality::default(), tamper: None };
    }

    /// Each piece of traffic waits this long.
    pub fn delay(&self, delay: Duration) {
        self.shared.state().quality.delay = delay;
    }

    /// Limits each direction of each connection.
    pub fn throttle(&self, bytes_per_second: u64) {
        self.shared.state().quality.bytes_per_second = Some(bytes_per_second);
    }

    /// Spoils what the server sends next.
    pub fn tamper(&self, order: Tamper) {
        self.shared.state().tamper = Some(order);
    }

    /// Has the order to spoil been carried out?
    pub fn has_tampered(&self) -> bool {
        self.shared.state().tamper.is_none()
    }

    /// Bytes passed so far: to the server, to the client.
    pub fn traffic(&self) -> (u64, u64) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (read(&self.shared.to_server), read(&self.shared.to_client))
    }

    /// How many connections there are.
    pub fn connections(&self) -> u64 {
        self.shared.open.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        self.set(Line::Cut);
        // Wakes the acceptor, which then ends.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToServer,
    ToClient,
}

/// What one turn of a pump may do.
enum Turn {
    Pass,
    Hold,
    Reset,
}

/// How sending went.
enum Sent {
    All,
    Closed,
    Reset,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener, server: SocketAddr) {
        for client in listener.incoming() {
            if self.closing.load(Ordering::Relaxed) {
                return;
            }
            let Ok(client) = client else { continue };
            if self.state().line == Line::Cut {
                reset(&client);
                continue;
            }
            let this = Arc::clone(self);
            thread::spawn(move || this.serve(client, server));
        }
    }

    fn serve(self: Arc<Self>, client: TcpStream, server: SocketAddr) {
        let dead = Arc::new(AtomicBool::new(false));
        // A line that carries no request carries no SYN either. It matters: a connection that says nothing, opened
        // while the server shuts down, keeps Postgres before 18 from ending for all of authentication_timeout.
        loop {
            match self.turn(Direction::ToServer, &dead) {
                Turn::Pass => break,
                Turn::Hold => thread::sleep(TICK),
                Turn::Reset => return reset(&client),
            }
        }
        let Ok(server) = TcpStream::connect(server) else {
            return reset(&client);
        };
        let pair = (client.try_clone(), server.try_clone());
        let (Ok(other_client), Ok(other_server)) = pair else {
            return;
        };
        self.open.fetch_add(1, Ordering::Relaxed);
        let (back, dead_too) = (Arc::clone(&self), Arc::clone(&dead));
        let answers = thread::spawn(move || back.pump(&other_server, &other_client, Direction::ToClient, &dead_too));
        self.pump(&client, &server, Direction::ToServer, &dead);
        let _ = answers.join();
        self.open.fetch_sub(1, Ordering::Relaxed);
    }

    /// Carries one direction of one connection until it ends. `dead`: it fell into a blackhole.
    fn pump(&self, mut from: &TcpStream, to: &TcpStream, direction: Direction, dead: &AtomicBool) {
        let _ = from.set_read_timeout(Some(TICK));
        let _ = to.set_write_timeout(Some(TICK));
        let _ = to.set_nodelay(true);
        let mut stream = Stream::default();
        let mut random = StdRng::seed_from_u64(1);
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match self.turn(direction, dead) {
                Turn::Pass => {}
                Turn::Hold => {
                    thread::sleep(TICK);
                    continue;
                }
                Turn::Reset => {
                    reset(from);
                    return reset(to);
                }
            }
            let count = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    continue;
                }
                Err(_) => break,
            };
            self.slow_down(count);
            let mut bytes = buffer[..count].to_vec();
            let mut then_cut = false;
            if direction == Direction::ToClient {
                let order = self.state().tamper;
                let passed = stream.pass(&bytes, order, &mut || random.random());
                if passed.left != order {
                    self.state().tamper = passed.left;
                }
                (bytes, then_cut) = (passed.bytes, passed.then_cut);
            }
            match self.send(to, &bytes, direction, dead) {
                Sent::All if then_cut => {}
                Sent::All => continue,
                Sent::Closed => break,
                Sent::Reset => {}
            }
            reset(from);
            return reset(to);
        }
        let _ = to.shutdown(Shutdown::Write);
        let _ = from.shutdown(Shutdown::Read);
    }

    /// Sends as the line allows: what was read before it went bad stays here until it is healed.
    fn send(&self, mut to: &TcpStream, mut bytes: &[u8], direction: Direction, dead: &AtomicBool) -> Sent {
        let counter = match direction {
            Direction::ToServer => &self.to_server,
            Direction::ToClient => &self.to_client,
        };
        while !bytes.is_empty() {
            match self.turn(direction, dead) {
                Turn::Pass => {}
                Turn::Hold => {
                    thread::sleep(TICK);
                    continue;
                }
                Turn::Reset => return Sent::Reset,
            }
            match to.write(bytes) {
                Ok(count) => {
                    counter.fetch_add(count as u64, Ordering::Relaxed);
                    bytes = &bytes[count..];
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(_) => return Sent::Closed,
            }
        }
        Sent::All
    }

    fn turn(&self, direction: Direction, dead: &AtomicBool) -> Turn {
        let line = self.state().line;
        if line == Line::Blackhole {
            dead.store(true, Ordering::Relaxed);
        }
        match line {
            Line::Cut => Turn::Reset,
            _ if dead.load(Ordering::Relaxed) => Turn::Hold,
            Line::Open => Turn::Pass,
            Line::OnlyToServer if direction == Direction::ToServer => Turn::Pass,
            Line::OnlyToClient if direction == Direction::ToClient => Turn::Pass,
            _ => Turn::Hold,
        }
    }

    fn slow_down(&self, bytes: usize) {
        let quality = self.state().quality;
        let mut pause = quality.delay;
        if let Some(rate) = quality.bytes_per_second {
            pause += Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        }
        let until = Instant::now() + pause;
        // In steps, so that healing or cutting the line shows at once.
        while Instant::now() < until && self.state().line != Line::Cut {
            thread::sleep(TICK.min(until - Instant::now()));
        }
    }
}

/// Has the stream closed with RST instead of FIN, when its last handle goes.
fn reset(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}
