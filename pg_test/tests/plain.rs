//! Scenarios 1 to 9 and 11 to 15: what is written on one side arrives on the other, exactly.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use tandem_pg_test::{Client, Node, Pair, shared};

#[test]
fn s01_insert_arrives() {
    let pair = shared();
    pair.table("s01", "id int primary key, a text");
    pair.a.exec("insert into s01 values (1, 'one')");
    pair.sync();
    pair.assert_rows("select id, a from s01", &["1|one"]);
    pair.assert_converged("s01");
}

#[test]
fn s02_update_arrives() {
    let pair = shared();
    pair.table("s02", "id int primary key, a text");
    pair.a.exec("insert into s02 values (1, 'one')");
    pair.sync();
    pair.b.exec("update s02 set a = 'uno'");
    pair.sync();
    pair.assert_rows("select id, a from s02", &["1|uno"]);
    pair.assert_converged("s02");
    pair.assert_conflicts("s02", &[]);
}

#[test]
fn s03_delete_arrives() {
    let pair = shared();
    pair.table("s03", "id int primary key, a text");
    pair.a.exec("insert into s03 values (1, 'one'), (2, 'two')");
    pair.sync();
    pair.a.exec("delete from s03 where id = 1");
    pair.sync();
    pair.assert_rows("select id, a from s03", &["2|two"]);
    pair.assert_converged("s03");
    pair.assert_conflicts("s03", &[]);
}

#[test]
fn s04_different_rows_on_both_are_no_conflict() {
    let pair = shared();
    pair.table("s04", "id int primary key, a text");
    pair.partition();
    pair.a.exec("insert into s04 select n, 'a' from generate_series(1, 100) n");
    pair.b.exec("insert into s04 select n, 'b' from generate_series(101, 200) n");
    pair.heal();
    pair.assert_rows("select a, count(*) from s04 group by a order by a", &["a|100", "b|100"]);
    pair.assert_converged("s04");
    pair.assert_conflicts("s04", &[]);
}

#[test]
fn s05_what_came_from_the_peer_is_not_sent_back() {
    const SIZE: u64 = 2_000_000;
    let pair = shared();
    pair.table("s05", "id int primary key, a text");
    pair.sync();
    let (_, from_a) = pair.a.line.traffic();
    let (_, from_b) = pair.b.line.traffic();
    pair.a.exec(&format!(
        "insert into s05 select n, (select string_agg(md5(random()::text), '') from generate_series(1, 32))
         from generate_series(1, {}) n",
        SIZE / 1024
    ));
    pair.assert_quiet();
    let (_, from_a_after) = pair.a.line.traffic();
    let (_, from_b_after) = pair.b.line.traffic();
    assert!(from_a_after - from_a > SIZE * 9 / 10, "A sent only {} bytes", from_a_after - from_a);
    assert!(from_b_after - from_b < SIZE / 10, "B sent {} bytes back", from_b_after - from_b);
    pair.assert_converged("s05");
}

#[test]
fn s06_only_whole_transactions_show() {
    let pair = shared();
    pair.table("s06", "id int primary key, n int");
    pair.a.exec("insert into s06 select n, 0 from generate_series(1, 10) n");
    pair.sync();
    let done = AtomicBool::new(false);
    let mut reader = pair.b.session();
    thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let mut seen = 0;
            while !done.load(Ordering::Relaxed) {
                let rows = reader.rows("select count(distinct n), min(n) from s06");
                let (distinct, n) = rows[0].split_once('|').expect("two columns");
                assert_eq!(distinct, "1", "B shows a part of a transaction");
                let n: i32 = n.parse().expect("a number");
                assert!(n >= seen, "B went back from {seen} to {n}");
                assert_eq!(n % 5, 0, "B shows a value that was never committed");
                seen = n;
            }
        });
        for _ in 0..60 {
            pair.a.exec("begin");
            for _ in 0..5 {
                pair.a.exec("update s06 set n = n + 1");
            }
            pair.a.exec("commit");
        }
        pair.sync();
        done.store(true, Ordering::Relaxed);
        watching.join().expect("the reader saw nothing wrong");
    });
    pair.assert_rows("select distinct n from s06", &["300"]);
    pair.assert_converged("s06");
}

#[test]
fn s07_exactly_what_committed_arrives() {
    let pair = shared();
    pair.exec(
        "create function s07_log() returns trigger language plpgsql as $$ begin
        insert into s07_log values (new.id, 'deferred ' || new.a); return null; end $$",
    );
    pair.table("s07_log", "id int primary key, a text");
    pair.table("s07", "id int primary key, a text");
    pair.exec(
        "create constraint trigger log after insert on s07 deferrable initially deferred
         for each row when (new.a = 'log') execute function s07_log()",
    );
    let a = &pair.a;
    a.exec(
        "begin; insert into s07 values (1, 'kept'); savepoint s; insert into s07 values (2, 'dropped');
            update s07 set a = 'dropped' where id = 1; rollback to s; insert into s07 values (3, 'kept');
            savepoint t; insert into s07 values (4, 'kept'); release t; commit",
    );
    a.exec("begin; insert into s07 values (5, 'aborted'); update s07 set a = 'aborted'; delete from s07; rollback");
    a.exec("insert into s07 values (1, 'ignored'), (6, 'new') on conflict do nothing");
    a.exec("insert into s07 values (3, 'upserted'), (7, 'new') on conflict (id) do update set a = excluded.a || '!'");
    a.exec(
        "merge into s07 using (values (4, 'merged'), (8, 'merged')) v (id, a) on s07.id = v.id
            when matched then update set a = v.a when not matched then insert values (v.id, v.a)",
    );
    a.exec("copy s07 (id, a) from program 'printf ''9\\tcopied\\n10\\tcopied\\n'''");
    a.rows("update s07 set a = 'returned' where id = 10 returning a");
    a.exec("begin; insert into s07 values (11, 'log'); update s07 set a = 'log!' where id = 11; commit");
    a.exec(
        "do $$ begin insert into s07 values (12, 'block');
            begin insert into s07 values (13, 'lost'); raise 'no'; exception when others then null; end; end $$",
    );
    pair.sync();
    pair.assert_rows(
        "select id, a from s07 order by id",
        &[
            "1|kept",
            "3|upserted!",
            "4|merged",
            "6|new",
            "7|new",
            "8|merged",
            "9|copied",
            "10|returned",
            "11|log!",
            "12|block",
        ],
    );
    pair.assert_rows("select id, a from s07_log", &["11|deferred log"]);
    pair.assert_converged("s07");
    pair.assert_converged("s07_log");
    pair.assert_conflicts("s07", &[]);
}

/// The most memory that a process ever had, in bytes.
fn peak_memory(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("the kernel says it");
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<u64>().ok()).expect("a number") * 1024
}

#[test]
fn s08_one_large_transaction_in_bounded_memory() {
    const BOUND: u64 = 400 << 20;
    let rows = 1_000_000;
    let pair = shared();
    pair.table("s08", "id int primary key, a text");
    let (serving, worker) = (pair.a.serving_pid(), pair.b.worker_pid());
    let mut writer = pair.a.session();
    writer
        .exec(&format!("insert into s08 select n, md5(n::text) || repeat('x', 100) from generate_series(1, {rows}) n"));
    pair.sync();
    for (node, pid) in [("the writer", writer.pid()), ("A, serving", serving), ("B, applying", worker)] {
        let peak = peak_memory(pid);
        assert!(peak < BOUND, "{node} took {} MB for {rows} rows", peak >> 20);
    }
    pair.assert_rows("select count(*) from s08", &[&rows.to_string()]);
    let digest = "select sum(hashtextextended(id || a || _hlc::text, 0)) from s08";
    assert_eq!(pair.a.one(digest), pair.b.one(digest));
    pair.exec("drop table s08");
}

#[test]
fn s08_many_small_transactions() {
    let transactions = 100_000;
    let pair = shared();
    pair.table("s08_small", "id int primary key, a text");
    pair.b.exec("set synchronous_commit = off");
    pair.b.exec(&format!(
        "do $$ begin for i in 1..{transactions} loop insert into s08_small values (i, 'x'); commit; end loop; end $$"
    ));
    pair.b.exec("reset synchronous_commit");
    pair.sync();
    pair.assert_rows("select count(*) from s08_small", &[&transactions.to_string()]);
    pair.assert_converged("s08_small");
}

#[test]
fn s08_one_large_row() {
    let megabytes = 50;
    let pair = shared();
    pair.table("s08_row", "id int primary key, a text, b int");
    pair.a.exec(&format!(
        "insert into s08_row select 1, string_agg(md5(n::text), ''), 0 from generate_series(1, {}) n",
        megabytes * 32 * 1024
    ));
    pair.sync();
    pair.b.exec("update s08_row set b = 1");
    pair.sync();
    let digest = "select length(a), md5(a), b, _hlc from s08_row";
    assert_eq!(pair.a.rows(digest), pair.b.rows(digest));
    assert!(pair.a.one(digest).starts_with(&format!("{}", megabytes << 20)));
}

#[test]
fn s09_a_thousand_tables() {
    let tables = 1000;
    let pair = shared();
    pair.exec("create schema s09");
    pair.exec(&format!(
        "do $$ begin for i in 1..{tables} loop
             execute format('create table s09.t%s (id int primary key, a text)', i);
             if i % 100 = 0 then commit; end if;
         end loop; end $$"
    ));
    pair.exec("select tandem.add_tables_in_schema('s09')");
    for node in pair.nodes() {
        node.wait_rows(
            "select state, count(*) from tandem.tables where relation::text like 's09.%' group by state",
            &[&format!("active|{tables}")],
        );
    }
    pair.a.exec(&format!(
        "do $$ begin for i in 1..{tables} loop
             execute format('insert into s09.t%s values (1, %L)', i, 'a' || i);
         end loop; end $$"
    ));
    pair.sync();
    pair.b.exec("update s09.t7 set a = 'seven'");
    pair.sync();
    for table in ["s09.t1", "s09.t7", &format!("s09.t{tables}")] {
        pair.assert_converged(table);
        pair.assert_rows(&format!("select count(*) from {table}"), &["1"]);
    }
    pair.assert_rows("select a from s09.t7", &["seven"]);
}

#[test]
fn s11_keys_of_every_kind() {
    let pair = shared();
    pair.exec("create type s11_enum as enum ('low', 'high'); create domain s11_domain as text check (value <> '')");
    let kinds = [
        ("composite", "k1 int, k2 text, primary key (k2, k1)", "(1, 'x')", "(2, 'x')"),
        ("text", "k text primary key", "('')", "('Ä ''quoted'' \\ \"x\"')"),
        (
            "uuid",
            "k uuid primary key",
            "('00000000-0000-0000-0000-000000000001')",
            "('ffffffff-ffff-ffff-ffff-ffffffffffff')",
        ),
        ("timestamptz", "k timestamptz primary key", "('2024-02-29 12:00:00.123456+02')", "('infinity')"),
        ("numeric", "k numeric primary key", "(1.10)", "(123456789012345678901234567890.5)"),
        ("enumerated", "k s11_enum primary key", "('low')", "('high')"),
        ("domain", "k s11_domain primary key", "('d1')", "('d2')"),
        ("bytes", "k bytea primary key", "('\\x00')", "('\\x00ff')"),
        ("big", "k bigint primary key", "(-9223372036854775808)", "(9223372036854775807)"),
    ];
    for (name, columns, first, second) in kinds {
        let table = format!("s11_by_{name}");
        pair.table(&table, &format!("{columns}, a text default 'new'"));
        pair.a.exec(&format!("insert into {table} values {first}"));
        pair.b.exec(&format!("insert into {table} values {second}"));
        pair.sync();
        pair.b.exec(&format!("update {table} set a = 'changed'"));
        pair.sync();
        pair.assert_rows(&format!("select a from {table}"), &["changed", "changed"]);
        pair.assert_converged(&table);
        pair.a.exec(&format!("delete from {table}"));
        pair.sync();
        pair.assert_rows(&format!("select count(*) from {table}"), &["0"]);
        pair.assert_conflicts(&table, &[]);
    }
}

#[test]
fn s12_a_key_update_moves_the_row() {
    let pair = shared();
    pair.table("s12", "id int primary key, a text");
    pair.a.exec("insert into s12 values (1, 'one'), (5, 'five')");
    pair.sync();
    pair.b.exec("update s12 set id = 2 where id = 1");
    pair.sync();
    pair.a.exec("update s12 set id = id + 10, a = a || '!'");
    pair.sync();
    pair.assert_rows("select id, a from s12 order by id", &["12|one!", "15|five!"]);
    pair.assert_converged("s12");
    pair.assert_conflicts("s12", &[]);
}

#[test]
fn s13_a_table_without_a_key_is_refused_with_a_hint() {
    let pair = shared();
    pair.a.exec("create table s13 (id int, a text); create table s13_late (id int primary key deferrable)");
    for table in ["s13", "s13_late"] {
        let failure = pair.a.fails(&format!("select tandem.add_table('{table}')"));
        assert!(failure.message.contains(table), "{failure}");
        assert!(failure.hint.to_lowercase().contains("primary key"), "{failure}");
        assert_ne!(failure.sqlstate, "XX000", "{failure}");
    }
    // A replica identity will do.
    pair.exec(
        "create table s13_index (id int not null, a text); create unique index s13_i on s13_index (id);
               alter table s13_index replica identity using index s13_i",
    );
    pair.add_table("s13_index", "");
    pair.a.exec("insert into s13_index values (1, 'one')");
    pair.sync();
    pair.b.exec("update s13_index set a = 'uno' where id = 1");
    pair.sync();
    pair.assert_rows("select id, a from s13_index", &["1|uno"]);
}

#[test]
fn s14_what_cannot_be_synced_is_refused_by_name() {
    let pair = shared();
    pair.a.exec(
        "create unlogged table s14_unlogged (id int primary key);
         create temporary table s14_temp (id int primary key);
         create table s14_parent (id int primary key); create table s14_child (primary key (id)) inherits (s14_parent);
         create view s14_view as select 1 as id;
         create materialized view s14_matview as select 1 as id;
         create sequence s14_sequence;
         create foreign data wrapper s14_wrapper; create server s14_server foreign data wrapper s14_wrapper;
         create foreign table s14_foreign (id int) server s14_server",
    );
    let kinds = ["unlogged", "temp", "child", "view", "matview", "sequence", "foreign"];
    for relation in kinds.map(|kind| format!("s14_{kind}")) {
        let failure = pair.a.fails(&format!("select tandem.add_table('{relation}')"));
        assert!(failure.message.contains(&relation), "{failure}");
        assert_ne!(failure.sqlstate, "XX000", "{failure}");
    }
    let failure = pair.a.fails("select tandem.add_table('tandem.node')");
    assert_ne!(failure.sqlstate, "XX000", "{failure}");
    pair.a.hang_up();
}

/// A second pair of databases in the same two servers.
fn second_pair(pair: &Pair, database: &str) -> [Client; 2] {
    let names = ["Tokyo, \"east\"", "l'Osaka"];
    let open = |node: &Node| {
        node.cluster.connect("postgres").exec(&format!("create database \"{database}\""));
        let mut client = node.cluster.connect(&format!("'{database}'"));
        client.exec("create extension tandem");
        client
    };
    let mut clients = pair.nodes().map(open);
    for (i, client) in clients.iter_mut().enumerate() {
        let (own, peer) = (names[i].replace('\'', "''"), names[1 - i].replace('\'', "''"));
        let port = pair.nodes()[1 - i].line.port();
        client.exec(&format!("select tandem.create_node('{own}', {})", i + 1));
        client.exec(&format!(
            "select tandem.add_peer('{peer}', $$host=127.0.0.1 port={port} user=postgres dbname='{database}'$$)"
        ));
    }
    clients
}

#[test]
fn s15_two_databases_and_names_that_need_quoting() {
    let pair = shared();
    pair.table("s15", "id int primary key, a text");
    let [mut a, mut b] = second_pair(&pair, "Odd db");
    let table = "\"Odd Schema\".\"Select\"";
    for client in [&mut a, &mut b] {
        client.exec(&format!(
            "create schema \"Odd Schema\";
             create table {table} (\"the Id\" int primary key, \"or\"\"der\" text, \"group\" text);
             select tandem.add_table('{table}')"
        ));
    }
    a.exec(&format!("insert into {table} values (1, 'x', 'y')"));
    assert!(a.is_true("select tandem.wait_for_peer('60s')"));
    b.exec(&format!("update {table} set \"or\"\"der\" = 'z'"));
    assert!(b.is_true("select tandem.wait_for_peer('60s')"));
    for client in [&mut a, &mut b] {
        assert_eq!(client.rows(&format!("select \"the Id\", \"or\"\"der\", \"group\" from {table}")), ["1|z|y"]);
    }
    // The first pair is not concerned.
    pair.a.exec("insert into s15 values (1, 'mine')");
    pair.sync();
    pair.assert_rows("select a from s15", &["mine"]);
    // One peer a database, for now.
    let failure = a.fails("select tandem.add_peer('third', 'host=nowhere')");
    assert_eq!(failure.sqlstate, "0A000", "{failure}");
}
