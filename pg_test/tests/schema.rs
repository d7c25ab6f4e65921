//! Scenarios 77 and 79, and tables that exist on one side only: schemas that differ for a while.

use tandem_pg_test::{Pair, shared};

/// Changes A's table first, writes on both, checks the named state, then changes B's.
fn one_side_first(pair: &Pair, table: &str, change: &str, insert_on_a: &str) {
    pair.table(table, "id int primary key, a int, b text");
    pair.a.exec(&format!("insert into {table} values (1, 10, 'x')"));
    pair.sync();
    pair.a.exec(&format!("alter table {table} {change}"));
    pair.a.exec(insert_on_a);
    pair.b.exec(&format!("insert into {table} values (3, 30, 'from b')"));
    pair.b.wait_table(table, "schema_differs");
    let reason =
        pair.b.one(&format!("select coalesce(reason, '') from tandem.tables where relation::text = '{table}'"));
    assert!(!reason.is_empty(), "the difference is named");
    // Other tables go on.
    pair.a.exec(&format!("insert into {table}_other values (1, 'goes on')"));
    pair.b.wait_rows(&format!("select a from {table}_other"), &["goes on"]);
    pair.b.exec(&format!("alter table {table} {change}"));
    pair.wait_active(table);
    pair.sync();
    pair.assert_rows(&format!("select count(*) from {table}"), &["3"]);
    pair.assert_converged(table);
    pair.assert_conflicts(table, &[]);
}

fn other_table(pair: &Pair, table: &str) {
    pair.table(&format!("{table}_other"), "id int primary key, a text");
}

#[test]
fn s77_a_column_added_on_one_side_first() {
    let pair = shared();
    other_table(&pair, "s77_add");
    one_side_first(
        &pair,
        "s77_add",
        "add c text default 'c'",
        "insert into s77_add (id, a, b, c) values (2, 20, 'from a', 'not the default')",
    );
    pair.assert_rows("select c from s77_add order by id", &["c", "not the default", "c"]);
}

#[test]
fn s77_a_column_dropped_on_one_side_first() {
    let pair = shared();
    other_table(&pair, "s77_drop");
    one_side_first(&pair, "s77_drop", "drop b", "insert into s77_drop values (2, 20)");
}

#[test]
fn s77_a_column_renamed_on_one_side_first() {
    let pair = shared();
    other_table(&pair, "s77_rename");
    one_side_first(&pair, "s77_rename", "rename b to c", "insert into s77_rename (id, a, c) values (2, 20, 'from a')");
    pair.assert_rows("select c from s77_rename order by id", &["x", "from a", "from b"]);
}

#[test]
fn s77_a_column_retyped_on_one_side_first() {
    let pair = shared();
    other_table(&pair, "s77_type");
    one_side_first(&pair, "s77_type", "alter a type bigint", "insert into s77_type values (2, 9000000000, 'from a')");
    pair.assert_rows("select a from s77_type order by id", &["10", "9000000000", "30"]);
}

#[test]
fn s77_a_table_added_on_one_side_first() {
    let pair = shared();
    pair.a.exec("create table s77_missing (id int primary key, a text); select tandem.add_table('s77_missing')");
    pair.a.exec("insert into s77_missing values (1, 'early'); update s77_missing set a = 'changed early'");
    pair.a.wait_table("s77_missing", "missing_on_peer");
    pair.b.exec("create table s77_missing (id int primary key, a text)");
    pair.b.exec("select tandem.add_table('s77_missing')");
    pair.wait_active("s77_missing");
    pair.sync();
    pair.assert_rows("select id, a from s77_missing", &["1|changed early"]);
    pair.assert_converged("s77_missing");
}

#[test]
fn s77_other_cells_are_a_named_state() {
    let pair = shared();
    pair.exec("create table s77_cells (id int primary key, a text, b text)");
    pair.a.exec("select tandem.add_table('s77_cells', granularity => 'row')");
    pair.b.exec("select tandem.add_table('s77_cells')");
    pair.a.wait_table("s77_cells", "policy_differs");
    pair.b.wait_table("s77_cells", "policy_differs");
    pair.b.exec("select tandem.remove_table('s77_cells'); select tandem.add_table('s77_cells', granularity => 'row')");
    pair.wait_active("s77_cells");
    pair.a.exec("insert into s77_cells values (1, 'x', 'y')");
    pair.sync();
    pair.assert_converged("s77_cells");
}

#[test]
fn tables_that_hold_equal_rows_go_on_and_others_wait() {
    let pair = shared();
    pair.exec("create table joined_equal (id int primary key, a text); create table joined_other (id int primary key)");
    pair.exec("insert into joined_equal select n, 'same' from generate_series(1, 1000) n");
    pair.a.exec("insert into joined_other values (1)");
    pair.b.exec("insert into joined_other values (2)");
    pair.exec("select tandem.add_table('joined_equal'); select tandem.add_table('joined_other')");
    pair.wait_active("joined_equal");
    pair.a.wait_table("joined_other", "join_required");
    pair.b.wait_table("joined_other", "join_required");
    pair.b.exec("update joined_equal set a = 'changed' where id = 7");
    pair.sync();
    pair.assert_rows("select a from joined_equal where id in (6, 7) order by id", &["same", "changed"]);
    pair.assert_converged("joined_equal");
    pair.exec("select tandem.remove_table('joined_other')");
}

#[test]
fn s79_generated_and_identity_columns() {
    let pair = shared();
    pair.table(
        "s79",
        "id bigint generated always as identity primary key, a int, twice int generated always as (a * 2) stored,
         n int generated by default as identity, s serial",
    );
    pair.exec(
        "select tandem.stagger_sequence('s79_id_seq'); select tandem.stagger_sequence('s79_n_seq');
         select tandem.stagger_sequence('s79_s_seq')",
    );
    pair.partition();
    pair.a.exec("insert into s79 (a) select n from generate_series(1, 50) n");
    pair.b.exec("insert into s79 (a) select n from generate_series(101, 150) n");
    pair.heal();
    pair.a.exec("update s79 set a = a + 1000 where a = 101");
    pair.sync();
    pair.assert_rows(
        "select count(*), count(distinct n), count(distinct s), bool_and(twice = a * 2) from s79",
        &["100|100|100|t"],
    );
    pair.assert_converged("s79");
    pair.assert_conflicts("s79", &[]);
}

#[test]
fn s63_a_table_that_leaves_is_clean() {
    let pair = shared();
    pair.table("s63", "id int primary key, a text");
    pair.a.exec("insert into s63 values (1, 'x')");
    pair.sync();
    pair.exec("select tandem.remove_table('s63')");
    pair.assert_rows("select * from s63", &["1|x"]);
    pair.assert_rows("select count(*) from pg_trigger where tgrelid = 's63'::regclass", &["0"]);
    pair.a.exec("insert into s63 values (2, 'mine alone')");
    pair.sync();
    assert_eq!(pair.b.rows("select count(*) from s63"), ["1"]);
}

#[test]
fn a_table_that_is_dropped_meanwhile_is_left_out() {
    let pair = shared();
    pair.table("dropped_meanwhile", "id int primary key");
    let mut dropping = pair.a.session();
    dropping.exec("begin; drop table dropped_meanwhile");
    // New sessions, which have not looked at the table before.
    let asking = ["tables", "check()", "peer_tables()"].map(|what| {
        let session = pair.a.session();
        let pid = session.pid();
        let answer = session.spawn(&format!("select * from tandem.{what}"));
        pair.a.wait_blocked(pid);
        answer
    });
    dropping.exec("commit");
    for answer in asking {
        answer.join().expect("no panic").1.expect("what is there is shown");
    }
    pair.b.exec("drop table dropped_meanwhile");
    pair.wait_streaming();
}
