//! The harness itself: servers that start, die and come back, and a line that does as it is told.
//! These need no extension.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use tandem_pg_test::postgres::Installation;
use tandem_pg_test::proxy::{Line, Proxy};
use tandem_pg_test::wait::until_true;
use tandem_pg_test::{Client, Cluster, Stop, process};

fn plain() -> Cluster {
    let cluster = Cluster::new(&Installation::a(), "plain", &["shared_preload_libraries = ''"]);
    cluster.start();
    cluster
}

#[test]
fn a_cluster_survives_whatever_ends_it() {
    let cluster = plain();
    cluster.connect("postgres").exec("create table t (n int); insert into t values (1)");
    for end in 0..4 {
        let before = cluster.pid();
        match end {
            0 => cluster.restart(Stop::Fast),
            1 => cluster.restart(Stop::Immediate),
            2 => {
                cluster.kill();
                assert!(!cluster.is_started());
                cluster.start();
            }
            _ => {
                let victim = cluster.connect("postgres");
                cluster.kill_process(victim.pid());
                assert_eq!(cluster.pid(), before, "the postmaster restarts its children");
            }
        }
        assert_eq!(cluster.connect("postgres").rows("select n from t"), ["1"]);
    }
}

#[test]
fn a_cluster_leaves_nothing_behind() {
    let cluster = plain();
    let (pid, data) = (cluster.pid().expect("it runs"), cluster.data());
    let mut all = process::children(pid);
    assert!(!all.is_empty());
    all.push(pid);
    drop(cluster);
    process::wait_gone(&all);
    assert!(!data.exists());
}

#[test]
fn a_session_says_what_went_wrong() {
    let cluster = plain();
    let mut client = cluster.connect("postgres");
    assert_eq!(client.fails("select 1/0").sqlstate, "22012");
    assert_eq!(client.rows("select 1, null, 'x'"), ["1|∅|x"]);
    assert_eq!(client.query_one::<i32>("select 41 + 1"), 42);
    client.exec("create table t (n int primary key); insert into t values (1)");
    client.exec("begin; update t set n = 2");
    let waiting = client.another();
    let pid = waiting.pid();
    let update = waiting.spawn("update t set n = 3 where n = 1");
    until_true("the update to wait", || {
        let query = format!("select wait_event_type from pg_stat_activity where pid = {pid}");
        client.rows(&query) == ["Lock"]
    });
    client.exec("rollback");
    update.join().expect("no panic").1.expect("the update goes through");
    assert_eq!(client.rows("select n from t"), ["3"]);
}

/// A server that sends back what it gets.
fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut from = stream.try_clone().expect("a second handle");
                let mut to = stream;
                let _ = std::io::copy(&mut from, &mut to);
            });
        }
    });
    port
}

/// A message of the Postgres protocol, which the proxy expects from a server.
const MESSAGE: &[u8] = b"R\0\0\0\x08\0\0\0\0";

fn answered(stream: &mut TcpStream, patience: Duration) -> std::io::Result<bool> {
    stream.set_read_timeout(Some(patience))?;
    let mut answer = [0; MESSAGE.len()];
    match stream.read_exact(&mut answer) {
        Ok(()) => Ok(answer == *MESSAGE),
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
        Err(e) => Err(e),
    }
}

const SHORT: Duration = Duration::from_millis(200);
const LONG: Duration = Duration::from_secs(20);

#[test]
fn a_line_passes_stalls_and_heals() {
    let proxy = Proxy::start(0, echo());
    let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).expect("it listens");
    stream.write_all(MESSAGE).expect("open");
    assert!(answered(&mut stream, LONG).expect("open"));
    for line in [Line::Stalled, Line::OnlyToServer, Line::OnlyToClient] {
        proxy.set(line);
        stream.write_all(MESSAGE).expect("the kernel takes it");
        assert!(!answered(&mut stream, SHORT).expect("not closed"), "{line:?}");
        proxy.heal();
        assert!(answered(&mut stream, LONG).expect("healed"), "{line:?}");
    }
    let start = Instant::now();
    proxy.delay(SHORT);
    stream.write_all(MESSAGE).expect("open");
    assert!(answered(&mut stream, LONG).expect("slow"));
    assert!(start.elapsed() >= SHORT);
}

#[test]
fn a_line_that_carries_no_request_opens_no_connection() {
    let server = TcpListener::bind("127.0.0.1:0").expect("a free port");
    server.set_nonblocking(true).expect("it can");
    let proxy = Proxy::start(0, server.local_addr().expect("bound").port());
    for line in [Line::Stalled, Line::OnlyToClient, Line::Blackhole] {
        proxy.set(line);
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).expect("it listens");
        assert!(!answered(&mut stream, SHORT).expect("not closed"), "{line:?}");
        assert!(server.accept().is_err(), "the server was reached: {line:?}");
        proxy.heal();
        if line != Line::Blackhole {
            until_true("the server to be reached", || server.accept().is_ok());
        }
    }
}

#[test]
fn a_cut_line_resets_and_refuses() {
    let proxy = Proxy::start(0, echo());
    let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).expect("it listens");
    stream.write_all(MESSAGE).expect("open");
    assert!(answered(&mut stream, LONG).expect("open"));
    proxy.set(Line::Cut);
    assert!(answered(&mut stream, LONG).is_err(), "the connection is gone");
    let refused = TcpStream::connect(("127.0.0.1", proxy.port()));
    assert!(refused.and_then(|mut stream| answered(&mut stream, LONG)).is_err());
    proxy.heal();
    let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).expect("it listens");
    stream.write_all(MESSAGE).expect("open");
    assert!(answered(&mut stream, LONG).expect("healed"));
}

#[test]
fn a_blackhole_keeps_what_fell_into_it() {
    let proxy = Proxy::start(0, echo());
    let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).expect("it listens");
    stream.write_all(MESSAGE).expect("open");
    assert!(answered(&mut stream, LONG).expect("open"));
    proxy.set(Line::Blackhole);
    stream.write_all(MESSAGE).expect("the kernel takes it");
    assert!(!answered(&mut stream, SHORT).expect("not closed"));
    proxy.heal();
    assert!(!answered(&mut stream, SHORT).expect("still not closed, and still silent"));
    let mut fresh = TcpStream::connect(("127.0.0.1", proxy.port())).expect("it listens");
    fresh.write_all(MESSAGE).expect("open");
    assert!(answered(&mut fresh, LONG).expect("a new connection works"));
}

#[test]
fn sessions_pass_through_a_line() {
    let cluster = plain();
    let proxy = Proxy::start(0, cluster.port());
    let conninfo = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", proxy.port());
    let mut client = Client::connect(&conninfo).expect("through the proxy");
    assert_eq!(client.one("select length(repeat('x', 3000000))"), "3000000");
    assert_eq!(client.rows("select repeat('x', 3000000)")[0].len(), 3_000_000);
    proxy.set(Line::Cut);
    until_true("the session to break", || client.try_exec("select 1").is_err());
}
