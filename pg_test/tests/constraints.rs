//! Scenarios 30 to 43, 103, 104 and 106: unique, exclusion and CHECK constraints and foreign keys that merging would
//! violate. Nothing stops the stream, nothing is lost, both nodes show the same rows. Each goes both ways.

use tandem_pg_test::conflict::Record;
use tandem_pg_test::wait::full_size;
use tandem_pg_test::{Node, Pair, mixed, shared, tick, workload};

/// Runs a scenario with A as the first writer and then with B, on tables of their own.
fn both_ways(name: &str, scenario: impl Fn(&Pair, &Node, &Node, &str)) {
    let pair = shared();
    scenario(&pair, &pair.a, &pair.b, &format!("{name}_ab"));
    scenario(&pair, &pair.b, &pair.a, &format!("{name}_ba"));
}

/// Both nodes answer this once they have come to rest: displaced rows are asked again just after a commit.
fn settles(pair: &Pair, query: &str, expected: &[&str]) {
    for node in pair.nodes() {
        node.wait_rows(query, expected);
    }
    pair.sync();
    pair.assert_rows(query, expected);
}

fn open(pair: &Pair, table: &str) -> Vec<Record> {
    pair.history(table).into_iter().filter(|record| record["status"] == "open").collect()
}

#[test]
fn s30_one_value_for_two_new_rows() {
    both_ways("s30", |pair, first, second, t| {
        pair.table(t, "id int primary key, u text unique, n int");
        pair.partition();
        first.exec(&format!("insert into {t} values (1, 'x', 10)"));
        tick();
        second.exec(&format!("insert into {t} values (2, 'x', 20)"));
        pair.heal();
        settles(pair, &format!("select id, u, n from {t}"), &["2|x|20"]);
        pair.assert_converged(t);
        settles(
            pair,
            &format!("select waits_for, constraint_name from tandem.displaced where relid = '{t}'::regclass"),
            &[&format!("place|{t}_u_key")],
        );
        let records = open(pair, t);
        assert_eq!(records.len(), 1, "{records:?}");
        assert_eq!(records[0]["conflict_type"], "insert_exists");
        assert_eq!(records[0]["constraint_name"], format!("{t}_u_key"));
        assert_eq!(records[0]["key_tuple"]["id"], 1);
        // The stream goes on, also for the row that waits.
        first.exec(&format!("insert into {t} values (3, 'z', 30)"));
        // The place becomes free: by a local user.
        second.exec(&format!("delete from {t} where id = 2"));
        settles(pair, &format!("select id, u, n from {t} order by id"), &["1|x|10", "3|z|30"]);
        settles(pair, &format!("select count(*) from tandem.displaced where relid = '{t}'::regclass"), &["0"]);
        settles(pair, &format!("select status from tandem.conflicts where table_name = '{t}'"), &["superseded"]);
        pair.assert_converged(t);
    });
}

#[test]
fn s30_a_place_becomes_free_while_the_line_is_cut() {
    both_ways("s30_cut", |pair, first, second, t| {
        pair.table(t, "id int primary key, u text unique");
        pair.partition();
        first.exec(&format!("insert into {t} values (1, 'x')"));
        tick();
        second.exec(&format!("insert into {t} values (2, 'x')"));
        pair.heal();
        settles(pair, &format!("select id from {t}"), &["2"]);
        pair.partition();
        first.exec(&format!("update {t} set u = 'y' where id = 2"));
        first.wait_rows(&format!("select id, u from {t} order by id"), &["1|x", "2|y"]);
        // Meanwhile another row takes it on the other side, and the later one keeps it.
        tick();
        second.exec(&format!("begin; delete from {t} where id = 2; insert into {t} values (3, 'x'); commit"));
        pair.heal();
        settles(pair, &format!("select id, u from {t} order by id"), &["3|x"]);
        pair.assert_converged(t);
    });
}

#[test]
fn s31_one_value_for_two_old_rows() {
    both_ways("s31", |pair, first, second, t| {
        pair.table(t, "id int primary key, u text unique, n int");
        pair.a.exec(&format!("insert into {t} values (1, 'a', 1), (2, 'b', 2)"));
        pair.sync();
        pair.partition();
        first.exec(&format!("update {t} set u = 'x' where id = 1"));
        tick();
        second.exec(&format!("update {t} set u = 'x' where id = 2"));
        pair.heal();
        settles(pair, &format!("select id, u from {t}"), &["2|x"]);
        let records = open(pair, t);
        assert_eq!(records.len(), 1, "{records:?}");
        assert_eq!(records[0]["conflict_type"], "update_exists");
        // A change of the row that waits reaches it; a person settles it with other values.
        let id = records[0]["conflict_id"].as_str().expect("an id").to_string();
        first.exec(&format!("select tandem.resolve('{id}', 'keep_both', with_tuple => '{{\"u\": \"y\"}}')"));
        settles(pair, &format!("select id, u, n from {t} order by id"), &["1|y|1", "2|x|2"]);
        settles(pair, &format!("select status from tandem.conflicts where conflict_id = '{id}'"), &["resolved"]);
        pair.assert_converged(t);
    });
}

#[test]
fn s32_two_rows_on_two_unique_indexes() {
    both_ways("s32", |pair, first, second, t| {
        pair.table(t, "id int primary key, u int unique, v int unique");
        pair.partition();
        first.exec(&format!("insert into {t} values (1, 1, 10), (2, 2, 20)"));
        tick();
        second.exec(&format!("insert into {t} values (3, 1, 20)"));
        pair.heal();
        settles(pair, &format!("select id from {t} order by id"), &["3"]);
        pair.assert_converged(t);
        second.exec(&format!("delete from {t} where id = 3"));
        settles(pair, &format!("select id from {t} order by id"), &["1", "2"]);
        // The other way round: one row that hits two.
        pair.partition();
        first.exec(&format!("insert into {t} values (5, 7, 8)"));
        tick();
        second.exec(&format!("insert into {t} values (6, 7, 70), (7, 80, 8)"));
        pair.heal();
        settles(pair, &format!("select id from {t} order by id"), &["1", "2", "6", "7"]);
        let records = open(pair, t);
        assert_eq!(records.len(), 1, "{records:?}");
        assert_eq!(records[0]["conflict_type"], "multiple_unique_conflicts");
        pair.assert_converged(t);
    });
}

#[test]
fn s33_to_35_partial_expression_and_null() {
    both_ways("s33", |pair, first, second, t| {
        pair.exec(&format!("create table {t} (id int primary key, u text, n int unique, live bool)"));
        pair.exec(&format!("create unique index {t}_lower on {t} (lower(u)) where live"));
        pair.add_table(t, "");
        pair.partition();
        first.exec(&format!("insert into {t} values (1, 'X', null, true), (2, 'Y', null, false)"));
        tick();
        second
            .exec(&format!("insert into {t} values (3, 'x', null, true), (4, 'y', null, false), (5, 'y', null, true)"));
        pair.heal();
        settles(pair, &format!("select id from {t} order by id"), &["2", "3", "4", "5"]);
        let records = open(pair, t);
        assert_eq!(records.len(), 1, "{records:?}");
        assert_eq!(records[0]["constraint_name"], format!("{t}_lower"));
        pair.assert_converged(t);
    });
}

#[test]
fn s35_nulls_that_are_not_distinct() {
    both_ways("s35", |pair, first, second, t| {
        pair.table(t, "id int primary key, a int, b int, unique nulls not distinct (a, b)");
        pair.partition();
        first.exec(&format!("insert into {t} values (1, 1, null)"));
        tick();
        second.exec(&format!("insert into {t} values (2, 1, null), (3, 2, null)"));
        pair.heal();
        settles(pair, &format!("select id from {t} order by id"), &["2", "3"]);
        pair.assert_converged(t);
    });
}

#[test]
fn s36_values_that_change_places() {
    both_ways("s36", |pair, first, second, t| {
        pair.table(t, "id int primary key, u int unique deferrable initially deferred, v int unique");
        pair.a.exec(&format!("insert into {t} values (1, 1, 1), (2, 2, 2), (3, 3, 3)"));
        pair.sync();
        first.exec(&format!("update {t} set u = case u when 1 then 2 when 2 then 3 else 1 end"));
        second.exec("select 1");
        pair.sync();
        first.exec(&format!(
            "begin; update {t} set v = 0 where id = 1; update {t} set v = 1 where id = 2; update {t} set v = 2 where id = 1; commit"
        ));
        settles(pair, &format!("select id, u, v from {t} order by id"), &["1|2|2", "2|3|1", "3|1|3"]);
        pair.assert_conflicts(t, &[]);
        // And a deferrable one that is violated.
        pair.partition();
        first.exec(&format!("insert into {t} values (4, 9, 40)"));
        tick();
        second.exec(&format!("insert into {t} values (5, 9, 50)"));
        pair.heal();
        settles(pair, &format!("select id from {t} where u = 9"), &["5"]);
        pair.assert_converged(t);
    });
}

#[test]
fn s37_an_exclusion_constraint() {
    both_ways("s37", |pair, first, second, t| {
        pair.table(t, "id int primary key, during int4range, exclude using gist (during with &&)");
        pair.partition();
        first.exec(&format!("insert into {t} values (1, '[1,5)'), (2, '[5,9)'), (3, '[20,30)')"));
        tick();
        second.exec(&format!("insert into {t} values (4, '[4,6)')"));
        pair.heal();
        settles(pair, &format!("select id from {t} order by id"), &["3", "4"]);
        pair.assert_converged(t);
        first.exec(&format!("update {t} set during = '[40,41)' where id = 4"));
        settles(pair, &format!("select id from {t} order by id"), &["1", "2", "3", "4"]);
        pair.assert_converged(t);
    });
}

fn family(pair: &Pair, t: &str, on_fk: &str, action: &str) {
    pair.exec(&format!("create table {t}_p (id int primary key, a text)"));
    pair.exec(&format!("create table {t} (id int primary key, parent int references {t}_p {action}, a text)"));
    pair.add_table(&format!("{t}_p"), "");
    pair.add_table(t, &format!(", on_fk => '{on_fk}'"));
    pair.a.exec(&format!("insert into {t}_p values (1, 'parent'), (2, 'other')"));
    pair.sync();
}

#[test]
fn s38_a_parent_goes_and_a_child_comes() {
    for action in ["", "on delete cascade", "on delete set null"] {
        let name = format!("s38_{}", action.replace(' ', ""));
        both_ways(&name, |pair, first, second, t| {
            family(pair, t, "revive", action);
            pair.partition();
            first.exec(&format!("delete from {t}_p where id = 1"));
            tick();
            second.exec(&format!("insert into {t} values (7, 1, 'child')"));
            pair.heal();
            settles(pair, &format!("select id, a from {t}_p order by id"), &["1|parent", "2|other"]);
            settles(pair, &format!("select id, parent, a from {t}"), &["7|1|child"]);
            let records = pair.history(&format!("{t}_p"));
            assert_eq!(records.len(), 1, "{records:?}");
            assert_eq!(records[0]["conflict_type"], "foreign_key_violation");
            assert_eq!(records[0]["constraint_name"], format!("{t}_parent_fkey"));
            pair.assert_converged(t);
            pair.assert_converged(&format!("{t}_p"));
            settles(pair, &format!("select count(*) from tandem.displaced where relid = '{t}'::regclass"), &["0"]);
        });
    }
}

#[test]
fn s38_two_parents_of_one_child_go() {
    both_ways("s38_two", |pair, first, second, t| {
        let (one, other) = (format!("{t}_one"), format!("{t}_other"));
        pair.table(&one, "id int primary key, n text");
        pair.table(&other, "id int primary key, n text");
        pair.table(t, &format!("id int primary key, one_id int references {one}, other_id int references {other}"));
        first.exec(&format!("insert into {one} values (1, 'one')"));
        first.exec(&format!("insert into {other} values (1, 'other')"));
        pair.sync();
        pair.partition();
        first.exec(&format!("delete from {one}"));
        first.exec(&format!("delete from {other}"));
        tick();
        second.exec(&format!("insert into {t} values (7, 1, 1)"));
        pair.heal();
        settles(pair, &format!("select id, one_id, other_id from {t}"), &["7|1|1"]);
        settles(pair, &format!("select n from {one} union all select n from {other}"), &["one", "other"]);
        [t, one.as_str(), other.as_str()].into_iter().for_each(|table| pair.assert_converged(table));
        // Both parents are on record.
        for parent in [&one, &other] {
            let records = pair.history(parent);
            assert!(records.iter().any(|r| r["conflict_type"] == "foreign_key_violation"), "{records:?}");
        }
    });
}

#[test]
fn s38_cascade_deletes_the_child() {
    both_ways("s38_c", |pair, first, second, t| {
        family(pair, t, "cascade", "");
        pair.partition();
        first.exec(&format!("delete from {t}_p where id = 1"));
        tick();
        second.exec(&format!("insert into {t} values (7, 1, 'child'), (8, 2, 'other')"));
        pair.heal();
        settles(pair, &format!("select id from {t}_p"), &["2"]);
        settles(pair, &format!("select id from {t}"), &["8"]);
        let records = pair.history(t);
        assert_eq!(records.len(), 1, "{records:?}");
        assert_eq!(records[0]["conflict_type"], "foreign_key_violation");
        pair.assert_converged(t);
        pair.assert_quiet();
    });
}

#[test]
fn s38_report_lets_the_child_wait() {
    both_ways("s38_r", |pair, first, second, t| {
        family(pair, t, "report", "");
        pair.partition();
        first.exec(&format!("delete from {t}_p where id = 1"));
        tick();
        second.exec(&format!("insert into {t} values (7, 1, 'child')"));
        pair.heal();
        settles(pair, &format!("select count(*) from {t}"), &["0"]);
        settles(pair, &format!("select waits_for from tandem.displaced where relid = '{t}'::regclass"), &["parent"]);
        assert_eq!(open(pair, t).len(), 1);
        // A parent comes: the child is there again.
        second.exec(&format!("insert into {t}_p values (1, 'new parent')"));
        settles(pair, &format!("select id, parent, a from {t}"), &["7|1|child"]);
        settles(pair, &format!("select status from tandem.conflicts where table_name = '{t}'"), &["superseded"]);
        pair.assert_converged(t);
    });
}

#[test]
fn s38_chains_and_self_references() {
    both_ways("s38_s", |pair, first, second, t| {
        pair.table(
            t,
            &format!("a int, b int, up_a int, up_b int, primary key (a, b), foreign key (up_a, up_b) references {t}"),
        );
        pair.a.exec(&format!("insert into {t} values (1, 1, null, null), (2, 2, 1, 1)"));
        pair.sync();
        pair.partition();
        first.exec(&format!("delete from {t} where a = 2; delete from {t} where a = 1"));
        tick();
        second.exec(&format!("insert into {t} values (3, 3, 2, 2)"));
        pair.heal();
        settles(pair, &format!("select a from {t} order by a"), &["1", "2", "3"]);
        pair.assert_converged(t);
        pair.assert_quiet();
    });
}

#[test]
fn s39_parent_and_child_in_one_transaction() {
    both_ways("s39", |pair, first, _, t| {
        pair.exec(&format!("create table {t}_p (id int primary key)"));
        pair.exec(&format!(
            "create table {t} (id int primary key, parent int references {t}_p deferrable initially deferred)"
        ));
        // The child's table comes first.
        pair.exec(&format!("select tandem.add_table('{t}'); select tandem.add_table('{t}_p')"));
        pair.wait_active(t);
        pair.wait_active(&format!("{t}_p"));
        first.exec(&format!("begin; insert into {t} values (1, 1); insert into {t}_p values (1); commit"));
        pair.sync();
        pair.assert_rows(&format!("select id, parent from {t}"), &["1|1"]);
        first.exec(&format!("begin; delete from {t}_p; delete from {t}; commit"));
        pair.sync();
        pair.assert_rows(&format!("select count(*) from {t}"), &["0"]);
        pair.assert_conflicts(t, &[]);
    });
}

#[test]
fn s40_referential_actions_arrive_once() {
    for (action, left) in [("cascade", "0|0"), ("set null", "2|0")] {
        both_ways(&format!("s40_{}", action.replace(' ', "")), |pair, first, _, t| {
            family(pair, t, "revive", &format!("on delete {action}"));
            first.exec(&format!("insert into {t} values (1, 1, 'x'), (2, 1, 'y')"));
            pair.sync();
            first.exec(&format!("delete from {t}_p where id = 1"));
            pair.sync();
            pair.assert_rows(&format!("select count(*), count(parent) from {t}"), &[left]);
            pair.assert_converged(t);
            pair.assert_conflicts(t, &[]);
        });
    }
}

#[test]
fn s41_a_check_over_merged_columns() {
    both_ways("s41", |pair, first, second, t| {
        pair.table(t, "id int primary key, a int, b int, n text, check (a + b <= 10)");
        pair.a.exec(&format!("insert into {t} values (1, 1, 1, 'x')"));
        pair.sync();
        pair.partition();
        first.exec(&format!("update {t} set a = 9"));
        tick();
        second.exec(&format!("update {t} set b = 8"));
        pair.heal();
        // The arbiter's row stands: that of the node with the lower id.
        let standing = if first.id < second.id { "9|1|x" } else { "1|8|x" };
        settles(pair, &format!("select a, b, n from {t}"), &[standing]);
        settles(pair, &format!("select count(*) from tandem.displaced where relid = '{t}'::regclass"), &["0"]);
        let records = pair.history(t);
        assert!(!records.is_empty() && records.iter().all(|r| r["conflict_type"] == "check_violation"), "{records:?}");
        let text = format!("{records:?}");
        assert!(text.contains("Number(9)") && text.contains("Number(8)"), "both values are on record: {text}");
        pair.assert_converged(t);
        pair.assert_quiet();
    });
}

#[test]
fn what_is_not_enforced_keeps_no_row_away() {
    let pair = shared();
    if pair.nodes().iter().any(|node| node.number("show server_version_num") < 180_000) {
        return; // Constraints that are there and not enforced came with 18.
    }
    drop(pair);
    both_ways("unenforced", |pair, first, second, t| {
        pair.table(&format!("{t}_parent"), "id int primary key");
        let columns = "id int primary key, u text unique, a int check (a > 0) not enforced, parent int";
        pair.table(t, &format!("{columns}, foreign key (parent) references {t}_parent not enforced"));
        first.exec(&format!("insert into {t}_parent values (7); insert into {t} values (1, 'w', 1, 7)"));
        pair.sync();
        // One value for two rows, so that the table's constraints are looked at one by one.
        pair.partition();
        first.exec(&format!("insert into {t} values (2, 'x', -2, 9)"));
        tick();
        second.exec(&format!("delete from {t}_parent; insert into {t} values (3, 'x', -3, 9)"));
        first.exec(&format!("update {t} set a = -1 where id = 1"));
        pair.heal();
        settles(pair, &format!("select id, a, parent from {t} order by id"), &["1|-1|7", "3|-3|9"]);
        pair.assert_rows(&format!("select count(*) from {t}_parent"), &["0"]);
        let of_table = pair.history(t);
        assert_eq!(of_table.len(), 1, "{of_table:?}");
        assert_eq!(of_table[0]["constraint_name"], format!("{t}_u_key"));
        assert_eq!(pair.history(&format!("{t}_parent")).len(), 0);
        pair.assert_converged(t);
    });
}

#[test]
fn s42_two_rows_move_to_one_key() {
    both_ways("s42", |pair, first, second, t| {
        pair.table(t, "id int primary key, a text");
        pair.a.exec(&format!("insert into {t} values (3, 'three'), (4, 'four')"));
        pair.sync();
        pair.partition();
        first.exec(&format!("update {t} set id = 9 where id = 3"));
        tick();
        second.exec(&format!("update {t} set id = 9 where id = 4"));
        pair.heal();
        settles(pair, &format!("select id, a from {t}"), &["9|four"]);
        let records = pair.history(t);
        assert!(
            records.iter().any(|r| r["conflict_type"] == "insert_exists" && r["key_tuple"]["id"] == 9),
            "{records:?}"
        );
        pair.assert_converged(t);
    });
}

#[test]
fn s42_a_key_change_against_an_update_and_a_delete() {
    both_ways("s42_u", |pair, first, second, t| {
        pair.table(t, "id int primary key, a text");
        pair.a.exec(&format!("insert into {t} values (1, 'one'), (2, 'two')"));
        pair.sync();
        pair.partition();
        first.exec(&format!("update {t} set id = id + 10"));
        tick();
        second.exec(&format!("update {t} set a = 'changed' where id = 1; delete from {t} where id = 2"));
        pair.heal();
        // The update lives on under its key, the moved rows under theirs: nothing is lost.
        settles(pair, &format!("select id, a from {t} order by id"), &["1|changed", "11|one", "12|two"]);
        assert_eq!(pair.history(t).len(), 1, "{:?}", pair.history(t));
        pair.assert_converged(t);
    });
}

#[test]
fn s43_and_104_a_truncate_leaves_what_it_had_not_seen() {
    both_ways("s43", |pair, first, second, t| {
        pair.table(t, "id int primary key, a text, b text");
        pair.a.exec(&format!("insert into {t} values (1, 'x', 'b'), (2, 'y', 'b')"));
        pair.sync();
        pair.partition();
        first.exec(&format!("truncate {t}"));
        tick();
        second.exec(&format!("insert into {t} values (3, 'new', 'b'); update {t} set a = 'changed' where id = 2"));
        pair.heal();
        settles(pair, &format!("select id, a, b from {t} order by id"), &["2|changed|b", "3|new|b"]);
        let records = pair.history(t);
        assert!(records.iter().all(|record| record["key_tuple"]["id"] == 2), "{records:?}");
        assert!(records.iter().any(|record| record["conflict_type"] == "truncate_origin_differs"), "{records:?}");
        pair.assert_converged(t);
        pair.assert_quiet();
    });
}

#[test]
fn s103_rows_that_claim_in_a_ring() {
    both_ways("s103", |pair, first, second, t| {
        pair.table(t, "id int primary key, u int unique, v int unique, w int unique");
        pair.partition();
        first.exec(&format!("insert into {t} values (1, 1, 2, 10)"));
        tick();
        second.exec(&format!("insert into {t} values (2, 20, 2, 3)"));
        tick();
        first.exec(&format!("insert into {t} values (3, 1000, 200, 3)"));
        tick();
        second.exec(&format!("insert into {t} values (4, 1, 30, 300)"));
        pair.heal();
        settles(pair, &format!("select id from {t} order by id"), &["3", "4"]);
        pair.assert_converged(t);
        pair.assert_quiet();
    });
}

#[test]
fn s106_displaced_twice_by_different_winners() {
    both_ways("s106", |pair, first, second, t| {
        pair.table(t, "id int primary key, u text unique");
        for winner in [2, 3] {
            pair.partition();
            first.exec(&format!("insert into {t} values (1, 'x') on conflict do nothing"));
            tick();
            second.exec(&format!("delete from {t} where id = 1; insert into {t} values ({winner}, 'x')"));
            pair.heal();
            settles(pair, &format!("select id from {t}"), &[&winner.to_string()]);
            if winner == 2 {
                second.exec(&format!("delete from {t} where id = 2"));
                settles(pair, &format!("select id from {t}"), &["1"]);
                first.exec(&format!("delete from {t} where id = 1"));
                pair.sync();
            }
        }
        let records = pair.history(t);
        let displaced: Vec<_> = records.iter().filter(|r| r["conflict_type"] == "insert_exists").collect();
        assert_eq!(displaced.len(), 2, "{records:?}");
        pair.assert_converged(t);
    });
}

#[test]
#[ignore = "finds gaps that are not closed yet, in about one run of five: cargo test … -- --ignored"]
fn random_writers_over_constraints_lose_nothing() {
    let (cuts, commits) = if full_size() { (20, 5_000) } else { (5, 250) };
    let pair = Pair::new();
    mixed::create(&pair, "mixed_");
    let load = mixed::start(&pair, "mixed_", 2, 30, workload::seed());
    for _ in 0..cuts {
        load.wait_commits(commits / 2);
        pair.partition();
        load.wait_commits(commits / 2);
        pair.heal_lines();
        pair.wait_streaming();
    }
    load.finish(&pair);
    mixed::assert_constraints(&pair, "mixed_");
    let counts = pair.a.rows(
        "select conflict_type, status, count(*) from tandem.conflicts where table_name like 'mixed_%' group by 1, 2 order by 1, 2",
    );
    eprintln!("{}", counts.join("\n"));
    for kind in ["exists", "foreign_key_violation", "check_violation", "multiple_unique_conflicts"] {
        assert!(counts.iter().any(|count| count.contains(kind)), "no {kind} in {counts:?}");
    }
}
