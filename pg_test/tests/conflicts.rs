//! Scenarios 16 to 28: what happens when both sides write the same row without having seen each other.
//! Later writes are later by the clock of this machine, which both servers share.

use tandem_pg_test::conflict::missing_values;
use tandem_pg_test::wait::until;
use tandem_pg_test::workload::{self, Workload};
use tandem_pg_test::{Pair, conflict, shared, tick};

const COLUMNS: &str = "id int primary key, a text, b text";

/// A table with one row (1, 'a0', 'b0') on both nodes, and the lines stalled.
fn parted_row(pair: &Pair, table: &str, options: &str) {
    pair.table_with(table, COLUMNS, options);
    pair.a.exec(&format!("insert into {table} values (1, 'a0', 'b0')"));
    pair.sync();
    pair.partition();
}

#[test]
fn s16_same_key_different_content() {
    let pair = shared();
    pair.table("s16", COLUMNS);
    pair.partition();
    pair.a.exec("insert into s16 values (1, 'from a', 'x')");
    tick();
    pair.b.exec("insert into s16 values (1, 'from b', 'y')");
    pair.heal();
    pair.assert_rows("select id, a, b from s16", &["1|from b|y"]);
    pair.assert_converged("s16");
    pair.assert_conflicts(
        "s16",
        &[conflict("insert_exists")
            .key(r#"{"id": 1}"#)
            .base("null")
            .a(r#"{"id": 1, "a": "from a", "b": "x"}"#)
            .b(r#"{"id": 1, "a": "from b", "b": "y"}"#)
            .result(r#"{"id": 1, "a": "from b", "b": "y"}"#)
            .status("auto")],
    );
}

#[test]
fn s17_same_key_same_content() {
    let pair = shared();
    pair.table("s17", COLUMNS);
    pair.partition();
    pair.exec("insert into s17 values (1, 'same', 'same')");
    pair.heal();
    pair.assert_rows("select id, a, b from s17", &["1|same|same"]);
    pair.assert_converged("s17");
    pair.assert_conflicts("s17", &[]);
}

#[test]
fn s18_different_columns_merge() {
    let pair = shared();
    parted_row(&pair, "s18", "");
    pair.a.exec("update s18 set a = 'a1'");
    pair.b.exec("update s18 set b = 'b1'");
    pair.heal();
    pair.assert_rows("select id, a, b from s18", &["1|a1|b1"]);
    pair.assert_converged("s18");
    pair.assert_conflicts("s18", &[]);
}

#[test]
fn s19_different_columns_of_a_row_that_is_one_cell() {
    let pair = shared();
    parted_row(&pair, "s19", ", granularity => 'row'");
    pair.a.exec("update s19 set a = 'a1'");
    tick();
    pair.b.exec("update s19 set b = 'b1'");
    pair.heal();
    pair.assert_rows("select id, a, b from s19", &["1|a0|b1"]);
    pair.assert_converged("s19");
    pair.assert_conflicts(
        "s19",
        &[conflict("update_origin_differs")
            .key(r#"{"id": 1}"#)
            .base(r#"{"a": "a0", "b": "b0"}"#)
            .a(r#"{"a": "a1", "b": "b0"}"#)
            .b(r#"{"a": "a0", "b": "b1"}"#)
            .result(r#"{"a": "a0", "b": "b1"}"#)
            .status("auto")],
    );
}

#[test]
fn s19_named_cells_are_decided_as_one() {
    let pair = shared();
    pair.table_with(
        "s19_cells",
        "id int primary key, street text, city text, note text",
        r#", granularity => 'cells', cells => '[["street", "city"]]'"#,
    );
    pair.a.exec("insert into s19_cells values (1, 's0', 'c0', 'n0')");
    pair.sync();
    pair.partition();
    pair.a.exec("update s19_cells set street = 's1', note = 'n1'");
    tick();
    pair.b.exec("update s19_cells set city = 'c1'");
    pair.heal();
    pair.assert_rows("select street, city, note from s19_cells", &["s0|c1|n1"]);
    pair.assert_converged("s19_cells");
    pair.assert_conflicts(
        "s19_cells",
        &[conflict("update_origin_differs").a(r#"{"street": "s1"}"#).b(r#"{"city": "c1"}"#)],
    );
}

#[test]
fn s20_same_column_the_later_write_wins() {
    let pair = shared();
    parted_row(&pair, "s20", "");
    pair.b.exec("update s20 set a = 'from b'");
    tick();
    pair.a.exec("update s20 set a = 'from a'");
    pair.heal();
    pair.assert_rows("select id, a, b from s20", &["1|from a|b0"]);
    pair.assert_converged("s20");
    pair.assert_conflicts(
        "s20",
        &[conflict("update_origin_differs")
            .key(r#"{"id": 1}"#)
            .base(r#"{"a": "a0"}"#)
            .a(r#"{"a": "from a"}"#)
            .b(r#"{"a": "from b"}"#)
            .result(r#"{"a": "from a"}"#)
            .status("auto")],
    );
}

#[test]
fn s21_updated_to_the_same_value() {
    let pair = shared();
    parted_row(&pair, "s21", "");
    pair.exec("update s21 set a = 'same'");
    pair.heal();
    pair.assert_rows("select id, a, b from s21", &["1|same|b0"]);
    pair.assert_converged("s21");
    pair.assert_conflicts("s21", &[]);
}

#[test]
fn s22_setting_what_is_there_makes_no_version() {
    let pair = shared();
    pair.table("s22", COLUMNS);
    pair.a.exec("insert into s22 values (1, 'a0', 'b0')");
    pair.sync();
    let before = pair.a.one("select _hlc from s22");
    pair.a.exec("update s22 set a = a, b = 'b0'");
    pair.b.exec("update s22 set a = 'a0'");
    pair.sync();
    pair.assert_rows("select _hlc from s22", &[&before]);
    // Nor does it win against a real change.
    pair.partition();
    pair.a.exec("update s22 set a = 'a1'");
    tick();
    pair.b.exec("update s22 set a = a");
    pair.heal();
    pair.assert_rows("select a from s22", &["a1"]);
    pair.assert_conflicts("s22", &[]);
}

#[test]
fn s23_interleaved_updates_leave_every_lost_value_on_record() {
    let pair = shared();
    parted_row(&pair, "s23", "");
    for (node, change) in [
        (&pair.a, "a = 'a.1'"),
        (&pair.b, "a = 'b.1', b = 'b.1'"),
        (&pair.a, "a = 'a.2', b = 'a.2'"),
        (&pair.b, "b = 'b.2'"),
        (&pair.a, "a = 'a.3'"),
        (&pair.b, "a = 'b.3'"),
    ] {
        node.exec(&format!("update s23 set {change}"));
        tick();
    }
    pair.heal();
    pair.assert_rows("select a, b from s23", &["b.3|b.2"]);
    pair.assert_converged("s23");
    let history = pair.history("s23");
    // Each side's last values that don't show: whoever overwrote them had not seen them.
    assert_eq!(missing_values(&history, &["a.3", "a.2"]), [""; 0], "{history:#?}");
    assert!(history.iter().all(|record| record["conflict_type"] == "update_origin_differs"), "{history:#?}");
}

#[test]
fn s24_an_update_after_the_delete_revives_the_row() {
    let pair = shared();
    parted_row(&pair, "s24", "");
    pair.b.exec("delete from s24");
    tick();
    pair.a.exec("update s24 set a = 'a1'");
    pair.heal();
    pair.assert_rows("select id, a, b from s24", &["1|a1|b0"]);
    pair.assert_converged("s24");
    pair.assert_conflicts(
        "s24",
        &[conflict("update_deleted")
            .key(r#"{"id": 1}"#)
            .base(r#"{"a": "a0", "b": "b0"}"#)
            .a(r#"{"a": "a1", "b": "b0"}"#)
            .b("null")
            .result(r#"{"a": "a1", "b": "b0"}"#)
            .status("auto")],
    );
}

#[test]
fn s25_a_delete_after_the_update_wins_and_keeps_its_values() {
    let pair = shared();
    parted_row(&pair, "s25", "");
    pair.a.exec("update s25 set a = 'a1'");
    tick();
    pair.b.exec("delete from s25");
    pair.heal();
    pair.assert_rows("select count(*) from s25", &["0"]);
    pair.assert_conflicts(
        "s25",
        &[conflict("delete_origin_differs")
            .key(r#"{"id": 1}"#)
            .base(r#"{"a": "a0", "b": "b0"}"#)
            .a(r#"{"a": "a1", "b": "b0"}"#)
            .b("null")
            .result("null")
            .status("auto")],
    );
}

#[test]
fn s26_both_delete() {
    let pair = shared();
    parted_row(&pair, "s26", "");
    pair.exec("delete from s26");
    pair.heal();
    pair.assert_rows("select count(*) from s26", &["0"]);
    pair.assert_conflicts("s26", &[]);
}

#[test]
fn s27_two_lives_never_mix() {
    // The update comes before or after the re-insert: the later life wins whole, either way.
    for (table, update_last) in [("s27_before", false), ("s27_after", true)] {
        let pair = shared();
        parted_row(&pair, table, "");
        let update = format!("update {table} set a = 'a of the old life'");
        if !update_last {
            pair.b.exec(&update);
            tick();
        }
        pair.a.exec(&format!("delete from {table}"));
        pair.a.exec(&format!("insert into {table} values (1, 'a of the new life', 'b of the new life')"));
        if update_last {
            tick();
            pair.b.exec(&update);
        }
        pair.heal();
        pair.assert_rows(&format!("select a, b from {table}"), &["a of the new life|b of the new life"]);
        pair.assert_converged(table);
        let history = pair.history(table);
        // An update after the delete also has won against that, before the new life came.
        assert_eq!(history.len(), if update_last { 2 } else { 1 }, "{history:#?}");
        assert_eq!(missing_values(&history, &["a of the old life"]), [""; 0], "{history:#?}");
    }
}

#[test]
fn s28_what_is_long_deleted_stays_deleted() {
    let pair = shared();
    pair.table("s28", COLUMNS);
    pair.a.exec("insert into s28 select n, 'x', 'y' from generate_series(1, 100) n");
    pair.sync();
    pair.b.exec("delete from s28 where id <= 99");
    pair.sync();
    for node in pair.nodes() {
        until(&format!("the tombstones of {} to be collected", node.name), || {
            // Something goes on, so that both streams advance.
            pair.exec("update s28 set b = md5(random()::text) where id = 100");
            let left = node.number("select count(*) from tandem.tombstone where relid = 's28'::regclass");
            if left == 0 { Ok(()) } else { Err(format!("{left} tombstones")) }
        });
    }
    pair.sync();
    pair.a.exec("insert into s28 values (1, 'reborn', 'reborn')");
    pair.b.exec("insert into s28 values (2, 'reborn', 'reborn')");
    pair.assert_quiet();
    pair.assert_rows("select id, a from s28 where id < 100 order by id", &["1|reborn", "2|reborn"]);
    pair.assert_converged("s28");
}

#[test]
fn random_writers_lose_nothing() {
    let rounds = if tandem_pg_test::wait::full_size() { 20 } else { 3 };
    let seed = workload::seed();
    let pair = shared();
    for round in 0..rounds {
        let table = format!("random_{round}");
        pair.table(&table, workload::COLUMNS);
        let load = Workload::start(&pair, &table, 2, 20, seed + round);
        load.wait_commits(100);
        pair.partition();
        load.wait_commits(200);
        pair.heal();
        load.wait_commits(100);
        load.finish(&pair);
    }
}
