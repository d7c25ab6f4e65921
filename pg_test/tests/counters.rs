//! Scenario 29, counters: what both sides add counts on both, and what does not count is on record.

use tandem_pg_test::{Pair, shared, tick};

/// A table on both nodes whose column `n` is a counter, on each before it is paired.
fn counter(pair: &Pair, name: &str, columns: &str) {
    pair.exec(&format!("create table {name} ({columns})"));
    for node in pair.nodes() {
        // In one transaction: the other node has nothing to pair it with yet.
        node.exec(&format!(
            "begin; select tandem.add_table('{name}');
             select tandem.set_policy('{name}', 'counter', columns => '{{n}}'); commit"
        ));
    }
    pair.wait_active(name);
}

#[test]
fn s29_counter() {
    let pair = shared();
    counter(&pair, "s29_counter", "id int primary key, n int, other text");
    pair.a.exec("insert into s29_counter values (1, 10, 'base'), (2, 10, 'base')");
    pair.sync();
    pair.partition();
    pair.a.exec("update s29_counter set n = n - 3 where id = 1");
    pair.b.exec("update s29_counter set n = n - 4 where id = 2");
    tick();
    pair.b.exec("update s29_counter set n = n - 4, other = 'from b' where id = 1");
    pair.a.exec("update s29_counter set n = n - 3, other = 'from a' where id = 2");
    pair.heal();
    pair.assert_rows("select id, n, other from s29_counter order by id", &["1|3|from b", "2|3|from a"]);
    pair.assert_converged("s29_counter");
    assert!(pair.history("s29_counter").is_empty(), "nothing was lost");
    // It goes on from there, on both sides.
    pair.exec("update s29_counter set n = n + 1");
    pair.sync();
    pair.assert_rows("select n from s29_counter order by id", &["5", "5"]);
    pair.assert_converged("s29_counter");
}

#[test]
fn s29_counter_counts_what_was_committed() {
    let pair = shared();
    counter(&pair, "s29_counter_tx", "id int primary key, n numeric(20, 4)");
    pair.a.exec("begin; insert into s29_counter_tx values (1, 0.1); update s29_counter_tx set n = n + 0.2; commit");
    pair.sync();
    pair.assert_rows("select n from s29_counter_tx", &["0.3000"]);
    pair.partition();
    pair.a.exec(
        "begin;
         update s29_counter_tx set n = n + 1;
         savepoint s;
         update s29_counter_tx set n = n + 100;
         rollback to s;
         update s29_counter_tx set n = n * 2;
         commit;
         begin; update s29_counter_tx set n = n + 1000; rollback",
    );
    pair.b.exec("update s29_counter_tx set n = n + 12345678901234.5678");
    pair.b.exec("update s29_counter_tx set n = n - 0.0001");
    pair.heal();
    // 0.3 + 1, doubled: 2.3 more.
    pair.assert_rows("select n from s29_counter_tx", &["12345678901237.1677"]);
    pair.assert_converged("s29_counter_tx");
    assert!(pair.history("s29_counter_tx").is_empty(), "nothing was lost");
}

#[test]
fn s29_counter_that_is_set_is_a_new_base() {
    let pair = shared();
    counter(&pair, "s29_counter_set", "id int primary key, n bigint");
    pair.a.exec("insert into s29_counter_set select g, 10 from generate_series(1, 3) g");
    pair.sync();
    pair.partition();
    pair.b.exec("update s29_counter_set set n = n - 4");
    tick();
    // A life that begins, a number that is forgotten, and a row that ends, none of which had seen it.
    pair.a.exec("begin; delete from s29_counter_set where id = 1; insert into s29_counter_set values (1, 50); commit");
    pair.a.exec("update s29_counter_set set n = null where id = 2");
    pair.a.exec("update s29_counter_set set n = 70 where id = 2");
    pair.a.exec("delete from s29_counter_set where id = 3");
    pair.heal();
    pair.assert_rows("select id, n from s29_counter_set order by id", &["1|50", "2|70"]);
    pair.assert_converged("s29_counter_set");
    let history = pair.history("s29_counter_set");
    let mut types: Vec<_> = history.iter().map(|r| r["conflict_type"].as_str().unwrap_or_default()).collect();
    types.sort_unstable();
    assert_eq!(types, ["delete_origin_differs", "update_origin_differs", "update_origin_differs"]);
    // What counts after that counts on both.
    pair.partition();
    pair.exec("update s29_counter_set set n = n + 1");
    pair.heal();
    pair.assert_rows("select id, n from s29_counter_set order by id", &["1|52", "2|72"]);
    pair.assert_converged("s29_counter_set");
}

#[test]
fn s29_counter_is_kept_when_everything_is_forgotten() {
    let pair = shared();
    counter(&pair, "s29_counter_kept", "id int primary key, n smallint");
    pair.a.exec("insert into s29_counter_kept values (1, 0)");
    pair.sync();
    for turn in 1..=5 {
        pair.partition();
        pair.exec("update s29_counter_kept set n = n + 1");
        pair.b.exec("update s29_counter_kept set n = n + 1");
        pair.heal();
        pair.sync();
        pair.assert_rows("select n from s29_counter_kept", &[&(3 * turn).to_string()]);
    }
    pair.assert_converged("s29_counter_kept");
    // The list of its versions is read back as it is written.
    let query = "select _cells::text::tandem.cells::text = _cells::text and _cells::text like '%.sum=10 0 %' from s29_counter_kept";
    pair.assert_rows(query, &["t"]);
}

#[test]
fn s29_counter_while_both_write() {
    let pair = shared();
    counter(&pair, "s29_counter_load", "id int primary key, n bigint, other int");
    pair.a.exec("insert into s29_counter_load select g, 0, 0 from generate_series(1, 3) g");
    pair.sync();
    for turn in 0..100 {
        pair.a.exec(&format!("update s29_counter_load set n = n + 1, other = {turn} where id <= {}", turn % 3 + 1));
        pair.b.exec(&format!("update s29_counter_load set n = n + 10 where id >= {}", turn % 3 + 1));
    }
    pair.sync();
    pair.assert_rows("select n from s29_counter_load order by id", &["440", "736", "1033"]);
    pair.assert_converged("s29_counter_load");
    assert!(pair.history("s29_counter_load").is_empty(), "nothing was lost");
}

#[test]
fn s29_counter_that_a_check_forbids_is_settled() {
    let pair = shared();
    counter(&pair, "s29_counter_check", "id int primary key, n int check (n >= 0)");
    pair.a.exec("insert into s29_counter_check values (1, 10)");
    pair.sync();
    pair.partition();
    pair.exec("update s29_counter_check set n = n - 8");
    pair.heal();
    pair.sync();
    // Both cannot count: that of the arbiter does.
    pair.assert_rows("select n from s29_counter_check", &["2"]);
    pair.assert_converged("s29_counter_check");
    let history = pair.history("s29_counter_check");
    assert!(history.iter().any(|r| r["conflict_type"] == "check_violation"), "{history:?}");
    pair.a.exec("update s29_counter_check set n = n + 5");
    pair.sync();
    pair.assert_rows("select n from s29_counter_check", &["7"]);
}
