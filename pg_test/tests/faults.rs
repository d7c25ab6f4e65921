//! Scenarios 64 to 67, 69, 70 and 74: servers that die, lines that break, peers that are not what
//! they should be. What is written before, during and after must arrive once, and nothing be lost.

use std::time::{Duration, Instant};

use tandem_pg_test::node::DATABASE;
use tandem_pg_test::proxy::Line;
use tandem_pg_test::tamper::Tamper;
use tandem_pg_test::wait::{full_size, until, until_true};
use tandem_pg_test::workload::{self, Workload};
use tandem_pg_test::{Node, Pair, Stop, shared};

fn loaded_pair(table: &str) -> (Pair, Workload) {
    let pair = Pair::new();
    pair.table(table, workload::COLUMNS);
    let load = Workload::start(&pair, table, 2, 50, workload::seed());
    load.wait_commits(50);
    (pair, load)
}

/// Rows that one node inserts and no one changes: each must be there once, on both nodes.
fn assert_no_crash(node: &Node) {
    let log = node.cluster.log();
    let crash = log.lines().find(|line| line.contains("was terminated by signal") || line.contains("PANIC"));
    assert_eq!(crash, None, "server {} crashed:\n{}", node.name, node.cluster.log_tail(60));
}

#[test]
fn s64_kill_9_of_any_process_on_either_side() {
    let rounds = if full_size() { 5 } else { 1 };
    let (pair, load) = loaded_pair("s64");
    for _ in 0..rounds {
        for node in pair.nodes() {
            node.kill_process(node.worker_pid());
            pair.wait_streaming();
            load.wait_commits(50);
            node.kill_process(node.serving_pid());
            pair.wait_streaming();
            load.wait_commits(50);
            node.kill_and_restart();
            pair.wait_streaming();
            load.wait_commits(50);
        }
    }
    load.finish(&pair);
}

#[test]
fn s64_both_postmasters_at_once() {
    let (pair, load) = loaded_pair("s64_both");
    for _ in 0..2 {
        pair.partition();
        load.wait_commits(100);
        for node in pair.nodes() {
            node.hang_up();
            node.cluster.kill();
        }
        pair.set_lines(Line::Open);
        pair.b.cluster.start();
        pair.a.cluster.start();
        load.wait_commits(50);
    }
    load.finish(&pair);
}

#[test]
fn s65_nothing_arrives_that_its_server_lost() {
    let pair = Pair::new();
    pair.table("s65", "id bigint generated always as identity primary key, a text");
    let rounds = if full_size() { 10 } else { 3 };
    for _ in 0..rounds {
        let mut writer = pair.a.session();
        let before = pair.b.number("select count(*) from s65");
        // Unflushed commits, as fast as they come, until the server is gone.
        writer.exec("set synchronous_commit = off");
        let writing = writer
            .spawn("do $$ begin for i in 1..10000000 loop insert into s65 (a) values ('x'); commit; end loop; end $$");
        until_true("some rows to arrive", || pair.b.number("select count(*) from s65") > before + 100);
        pair.a.restart(Stop::Immediate);
        writing.join().expect("no panic").1.expect_err("the server went down under it");
        pair.wait_streaming();
        let only_on_b = |pair: &Pair| {
            let on_a = pair.a.rows("select id from s65");
            let on_a: std::collections::HashSet<_> = on_a.into_iter().collect();
            pair.b.rows("select id from s65").into_iter().filter(|id| !on_a.contains(id)).count()
        };
        assert_eq!(only_on_b(&pair), 0, "B holds rows that A lost");
        pair.sync();
        pair.assert_converged("s65");
    }
}

#[test]
fn s66_lines_that_break_in_every_way() {
    let (pair, load) = loaded_pair("s66");
    for line in [Line::Cut, Line::Stalled, Line::OnlyToServer, Line::OnlyToClient, Line::Blackhole] {
        eprintln!("{line:?}");
        pair.set_lines(line);
        load.wait_commits(100);
        pair.set_lines(Line::Open);
        load.wait_commits(20);
        pair.wait_streaming();
        pair.sync();
        // Only one of the two.
        pair.a.line.set(line);
        load.wait_commits(100);
        pair.a.line.heal();
        pair.wait_streaming();
        pair.sync();
    }
    for node in pair.nodes() {
        node.line.delay(Duration::from_millis(100));
        node.line.throttle(20_000);
    }
    load.wait_commits(50);
    pair.a.line.heal();
    pair.b.line.heal();
    load.finish(&pair);
    for node in pair.nodes() {
        assert_no_crash(node);
    }
}

#[test]
fn s66_a_silent_peer_is_noticed() {
    // peer_timeout is 3 s here and poll_interval 1 s.
    let pair = Pair::new();
    pair.table("s66_silent", "id int primary key");
    pair.set_lines(Line::Blackhole);
    for node in pair.nodes() {
        node.wait_state("connecting");
    }
    pair.a.exec("insert into s66_silent values (1)");
    pair.b.exec("insert into s66_silent values (2)");
    pair.heal();
    pair.assert_converged("s66_silent");
    pair.assert_rows("select count(*) from s66_silent", &["2"]);
}

#[test]
fn s67_fast_shutdown_is_fast() {
    const LIMIT: Duration = Duration::from_secs(10);
    let pair = Pair::new();
    pair.table("s67", "id int primary key, a text");
    pair.a.exec("insert into s67 values (1, 'x')");
    pair.sync();
    let stop = |node: &Node, doing: &str| {
        node.hang_up();
        let start = Instant::now();
        node.cluster.stop(Stop::Fast);
        let took = start.elapsed();
        eprintln!("{} took {took:?} to stop while {doing}", node.name);
        assert!(took < LIMIT, "{} took {took:?} to stop while {doing}", node.name);
        node.cluster.start();
    };
    stop(&pair.a, "idle");
    pair.wait_streaming();
    for line in [Line::Stalled, Line::OnlyToServer, Line::Blackhole, Line::Cut] {
        pair.set_lines(line);
        pair.a.exec("update s67 set a = a || 'y'");
        stop(&pair.a, &format!("the line is {line:?}"));
        stop(&pair.b, &format!("the line is {line:?}"));
        pair.heal();
    }
    // While applying waits for a lock that a prepared transaction holds: no session to end it.
    pair.b.exec("begin; lock table s67 in access exclusive mode; prepare transaction 's67'");
    pair.a.exec("update s67 set a = 'behind the lock'");
    until_true("the apply to run into the lock", || {
        let log = "select 1 from tandem.status where last_error is not null or state <> 'streaming'";
        let waiting =
            "select 1 from pg_stat_activity where backend_type = 'tandem exchange' and wait_event_type = 'Lock'";
        !pair.b.rows(log).is_empty() || !pair.b.rows(waiting).is_empty()
    });
    stop(&pair.b, "applying waits for a lock");
    pair.b.exec("rollback prepared 's67'");
    pair.wait_streaming();
    pair.sync();
    pair.assert_rows("select a from s67", &["behind the lock"]);
    pair.assert_converged("s67");
}

/// Another database on each server, with the extension and a node, and no peer yet.
fn fresh_databases(pair: &Pair, database: &str, ids: [u32; 2]) -> [tandem_pg_test::Client; 2] {
    let mut clients = pair.nodes().map(|node| {
        node.cluster.connect("postgres").exec(&format!("create database {database}"));
        node.cluster.connect(database)
    });
    for (client, (id, name)) in clients.iter_mut().zip(ids.into_iter().zip(["a", "b"])) {
        client.exec(&format!("create extension tandem; select tandem.create_node('{name}', {id})"));
    }
    clients
}

/// Makes the two databases peers of each other.
fn add_peers(pair: &Pair, clients: [&mut tandem_pg_test::Client; 2], database: &str) {
    for (client, node) in clients.into_iter().zip([&pair.b, &pair.a]) {
        let port = node.line.port();
        client.exec(&format!(
            "select tandem.add_peer('other', 'host=127.0.0.1 port={port} user=postgres dbname={database}')"
        ));
    }
}

fn wait_error(client: &mut tandem_pg_test::Client, sqlstate: &str) -> String {
    until(&format!("status to tell of {sqlstate}"), || {
        let rows = client.rows("select sqlstate, state, reason, last_error from tandem.status");
        match rows.first() {
            Some(row) if row.starts_with(sqlstate) => Ok(row.clone()),
            _ => Err(format!("{rows:?}")),
        }
    })
}

#[test]
fn s69_two_nodes_with_one_id_are_refused() {
    let pair = shared();
    let [mut a, mut b] = fresh_databases(&pair, "s69", [7, 7]);
    add_peers(&pair, [&mut a, &mut b], "s69");
    for client in [&mut a, &mut b] {
        let reason = until("the pairing to be refused", || {
            let rows = client.rows("select state, reason from tandem.status");
            match rows[0].strip_prefix("refused|") {
                Some(reason) => Ok(reason.to_string()),
                None => Err(rows.join("\n")),
            }
        });
        assert!(reason.contains('7') && reason.contains("id"), "{reason}");
    }
    // The first pair is not concerned.
    pair.wait_streaming();
}

#[test]
fn s69_a_second_node_or_a_bad_id_is_refused() {
    let pair = shared();
    for call in ["create_node('again', 3)", "create_node('x', 0)", "create_node('x', 64)"] {
        let failure = pair.a.fails(&format!("select tandem.{call}"));
        assert_ne!(failure.sqlstate, "XX000", "{call}: {failure}");
    }
}

#[test]
fn s70_a_wrong_password() {
    let pair = shared();
    let [mut a, _] = fresh_databases(&pair, "s70_password", [1, 2]);
    let hba = pair.b.cluster.data().join("pg_hba.conf");
    let text = std::fs::read_to_string(&hba).expect("it is there");
    std::fs::write(&hba, format!("host all guarded 127.0.0.1/32 scram-sha-256\n{text}")).expect("root may");
    pair.b.exec("create role guarded superuser login password 'right'; select pg_reload_conf()");
    let port = pair.b.line.port();
    a.exec(&format!(
        "select tandem.add_peer('b', 'host=127.0.0.1 port={port} user=guarded password=wrong dbname=s70_password')"
    ));
    let row = wait_error(&mut a, "28P01");
    assert!(row.starts_with("28P01|connecting|"), "{row}");
    assert!(!row.contains("wrong"), "a password shows: {row}");
    assert!(!pair.a.cluster.log().contains("password=wrong"), "a password is in the log");
    pair.b.exec("alter role guarded password 'wrong'");
    wait_reached(&mut a);
}

/// The peer was reached: the two stream, or this one waits for the other to have a peer, too.
fn wait_reached(client: &mut tandem_pg_test::Client) {
    until("the peer to be reached", || {
        let row = client.rows("select state, reason, hint from tandem.status").join("\n");
        let waits_for_the_other = row.starts_with("handshake|") && row.contains("add_peer");
        if row.starts_with("streaming") || waits_for_the_other { Ok(()) } else { Err(row) }
    });
}

#[test]
fn s70_a_wrong_database_that_comes_to_be() {
    let pair = shared();
    let [mut a, _] = fresh_databases(&pair, "s70_database", [1, 2]);
    let port = pair.b.line.port();
    a.exec(&format!("select tandem.add_peer('b', 'host=127.0.0.1 port={port} user=postgres dbname=s70_later')"));
    let row = wait_error(&mut a, "3D000");
    assert!(row.contains("s70_later"), "{row}");
    // There, but without the extension.
    pair.b.cluster.connect("postgres").exec("create database s70_later");
    until("the missing extension to be named", || {
        let row = a.rows("select state, reason, hint from tandem.status").join("\n");
        if row.to_lowercase().contains("create extension") { Ok(()) } else { Err(row) }
    });
    let mut later = pair.b.cluster.connect("s70_later");
    later.exec("create extension tandem; select tandem.create_node('b', 2)");
    wait_reached(&mut a);
}

#[test]
fn s70_a_server_that_is_not_there_yet() {
    let pair = Pair::new();
    pair.table("s70", "id int primary key");
    pair.b.hang_up();
    pair.b.cluster.stop(Stop::Fast);
    pair.a.wait_state("connecting");
    let error = pair.a.one("select coalesce(last_error, '') from tandem.status");
    assert!(!error.is_empty(), "the reason shows");
    pair.a.exec("insert into s70 values (1)");
    assert!(!pair.a.is_true("select tandem.wait_for_peer('200ms')"), "it can't have arrived");
    pair.b.cluster.start_only();
    pair.b.cluster.wait_ready();
    pair.wait_streaming();
    pair.sync();
    pair.assert_rows("select count(*) from s70", &["1"]);
    // A working exchange doesn't go on showing an old error.
    pair.a.wait_rows("select state, last_error is null from tandem.status", &["streaming|t"]);
}

#[test]
fn s70_strange_connection_strings() {
    let pair = shared();
    let [mut a, _] = fresh_databases(&pair, "s70_strings", [1, 2]);
    let failure = a.fails("select tandem.add_peer('b', 'host=x nonsense=1')");
    assert_ne!(failure.sqlstate, "XX000", "{failure}");
    a.exec("select tandem.add_peer('b', 'host=no.such.host.invalid dbname=x connect_timeout=2')");
    until("the failure to show", || {
        let row = a.rows("select state, last_error from tandem.status").join("\n");
        if row.starts_with("connecting|") && row.contains("no.such.host") { Ok(()) } else { Err(row) }
    });
    a.exec("select tandem.remove_peer('b')");
    assert_eq!(a.rows("select * from tandem.status").len(), 0);
}

#[test]
fn s74_a_spoilt_stream_is_recovered_from() {
    let (pair, load) = loaded_pair("s74");
    for order in [
        Tamper::Noise { bytes: 100 },
        Tamper::Truncate { at_least: 20 },
        Tamper::Truncate { at_least: 200 },
        Tamper::Noise { bytes: 5 },
    ] {
        for node in pair.nodes() {
            node.line.tamper(order);
            until_true(&format!("{order:?} to happen"), || node.line.has_tampered());
            pair.wait_streaming();
            load.wait_commits(20);
        }
    }
    load.finish(&pair);
    for node in pair.nodes() {
        assert_no_crash(node);
    }
}

#[test]
fn s74_spoilt_values_crash_nothing() {
    // What such values lead to can't be known: an error, or (a bit of a text flipped) another text.
    // What must not happen is a crash, or a server that no longer works.
    let rounds = if full_size() { 50 } else { 10 };
    let (pair, load) = loaded_pair("s74_values");
    for _ in 0..rounds {
        pair.b.line.tamper(Tamper::Values { at_least: 8, rows: 3 });
        load.wait_commits(20);
    }
    pair.b.line.heal();
    for node in pair.nodes() {
        assert_no_crash(node);
        node.exec("create table s74_alive (id int); drop table s74_alive");
        assert_eq!(node.one(&format!("select count(*) from pg_stat_database where datname = '{DATABASE}'")), "1");
        node.exec("select count(*) from s74_values; analyze s74_values; select * from tandem.status");
    }
}
