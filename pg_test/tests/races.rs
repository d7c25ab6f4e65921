//! Scenarios 71 and 88 to 97: orders of events that broke drafts of the design.

use std::thread;
use std::time::{Duration, Instant};

use tandem_pg_test::conflict::missing_values;
use tandem_pg_test::proxy::Line;
use tandem_pg_test::wait::{full_size, until};
use tandem_pg_test::workload::{self, Workload};
use tandem_pg_test::{Pair, conflict, shared, tick};

#[test]
fn s71_two_transactions_in_one_commit_are_no_half_of_a_deadlock() {
    // What a deadlock would last: applying gives way after this time at the latest.
    let pair = Pair::builder().settings(&["deadlock_timeout = '60s'", "tandem.apply_lock_timeout = '20s'"]).start();
    pair.table("s71", "id int primary key, a text");
    pair.a.exec("insert into s71 values (1, 'new'), (2, 'new')");
    pair.sync();
    // Applying has seen it all before: what follows takes no time, and so is one commit.
    pair.a.exec("update s71 set a = 'old'");
    pair.sync();
    pair.set_lines(Line::Cut);
    pair.b.wait_state("connecting");
    pair.a.exec("update s71 set a = 'first' where id = 1");
    pair.a.exec("update s71 set a = 'second' where id = 2");
    let mut user = pair.b.session();
    user.exec("begin; update s71 set a = 'user' where id = 2");
    pair.heal_lines();
    pair.b.wait_blocked(pair.b.worker_pid());
    // The other way round than the two came. Each of them alone holds nothing that the user wants.
    let start = Instant::now();
    user.exec("update s71 set a = 'user' where id = 1; commit");
    assert!(start.elapsed() < Duration::from_secs(10), "the user waited for {:?}", start.elapsed());
    pair.sync();
    pair.assert_rows("select id, a from s71 order by id", &["1|user", "2|user"]);
    pair.assert_converged("s71");
    // Whether the user had seen the first one depends on who got its row first; the second was not seen.
    let lost: Vec<String> = pair.history("s71").iter().map(|record| record["key_tuple"].to_string()).collect();
    assert_eq!(lost.iter().filter(|key| *key == r#"{"id":2}"#).count(), 1, "{lost:?}");
}

#[test]
fn s88_early_stamps_and_late_commits() {
    let pair = shared();
    pair.table("s88", "id int primary key, a text, b text");
    pair.a.exec("insert into s88 select n, 'a0', 'b0' from generate_series(1, 4) n");
    pair.sync();
    let mut long = pair.a.session();
    // Stamped now, committed after three partitions.
    long.exec("begin; update s88 set a = 'long' where id = 1");
    tick();
    pair.b.exec("update s88 set a = 'b saw nothing' where id = 1");
    pair.partition();
    pair.b.exec("update s88 set b = 'b.1' where id = 2");
    long.exec("update s88 set a = 'long' where id = 2");
    pair.heal_lines();
    pair.a.exec("update s88 set a = 'short' where id = 4");
    pair.b.wait_rows("select a from s88 where id = 4", &["short"]);
    pair.partition();
    tick();
    long.exec("update s88 set a = 'long' where id = 3; insert into s88 values (5, 'long', 'long'); commit");
    tick();
    pair.b.exec("update s88 set a = 'b late' where id = 3");
    pair.heal();
    pair.assert_rows(
        "select id, a, b from s88 order by id",
        &["1|b saw nothing|b0", "2|long|b.1", "3|b late|b0", "4|short|b0", "5|long|long"],
    );
    pair.assert_converged("s88");
    pair.assert_conflicts(
        "s88",
        &[
            conflict("update_origin_differs")
                .key(r#"{"id": 1}"#)
                .base(r#"{"a": "a0"}"#)
                .a(r#"{"a": "long"}"#)
                .b(r#"{"a": "b saw nothing"}"#),
            conflict("update_origin_differs")
                .key(r#"{"id": 3}"#)
                .base(r#"{"a": "a0"}"#)
                .a(r#"{"a": "long"}"#)
                .b(r#"{"a": "b late"}"#),
        ],
    );
}

#[test]
fn s88_long_transactions_among_short_ones() {
    let pair = shared();
    pair.table("s88_random", workload::COLUMNS);
    let load = Workload::start(&pair, "s88_random", 2, 30, workload::seed());
    for round in 0..if full_size() { 30 } else { 5 } {
        let mut long = [pair.a.session(), pair.b.session()];
        for (i, session) in long.iter_mut().enumerate() {
            let _ = session.try_exec(&format!(
                "set lock_timeout = '5s'; begin; insert into s88_random values ({}, 'x', 'y')",
                1000 + round * 2 + i
            ));
        }
        pair.partition();
        load.wait_commits(50);
        pair.heal_lines();
        load.wait_commits(50);
        for session in &mut long {
            session.exec("commit");
        }
    }
    load.finish(&pair);
}

#[test]
fn s89_an_insert_that_waited_for_a_slow_delete() {
    let pair = shared();
    pair.table("s89", "id int primary key, a text");
    pair.a.exec("insert into s89 select n, 'old' from generate_series(1, 200) n");
    pair.sync();
    let mut deleting = pair.a.session();
    deleting.exec("begin; delete from s89 where id = 1");
    let inserting = pair.a.session();
    let pid = inserting.pid();
    let waiting = inserting.spawn("insert into s89 values (1, 'new')");
    pair.a.wait_blocked(pid);
    tick();
    // The delete goes on, with later versions than the insert's stamp.
    deleting.exec("delete from s89 where id <= 100; commit");
    waiting.join().expect("no panic").1.expect("the key is free now");
    pair.sync();
    pair.assert_rows("select id, a from s89 where id <= 101 order by id", &["1|new", "101|old"]);
    pair.assert_converged("s89");
    pair.assert_conflicts("s89", &[]);
}

#[test]
fn s90_delete_and_insert_in_one_statement() {
    let pair = shared();
    pair.table("s90", "id int primary key, a text");
    pair.a.exec("insert into s90 values (1, 'old'), (2, 'old')");
    pair.sync();
    pair.a.exec("with d as (delete from s90 where id = 1 returning id) insert into s90 select id, 'new' from d");
    pair.sync();
    pair.assert_rows("select id, a from s90 order by id", &["1|new", "2|old"]);
    pair.assert_converged("s90");
    pair.assert_conflicts("s90", &[]);
}

#[test]
fn s90_keys_that_move_through_each_other() {
    let pair = shared();
    pair.table("s90_keys", "id int primary key, a text");
    // Physically from high to low, so that each key is free when it is taken.
    pair.a.exec("insert into s90_keys select n, 'row ' || n from generate_series(20, 1, -1) n");
    pair.sync();
    pair.b.exec("update s90_keys set id = id + 1");
    pair.sync();
    pair.assert_rows("select count(*), bool_and(a = 'row ' || id - 1), min(id), max(id) from s90_keys", &["20|t|2|21"]);
    pair.assert_converged("s90_keys");
    pair.assert_conflicts("s90_keys", &[]);
}

#[test]
fn s90_an_insert_that_waits_on_another_index() {
    let pair = shared();
    pair.table("s90_index", "id int primary key, u text unique");
    pair.a.exec("insert into s90_index values (1, 'one'), (2, 'two')");
    pair.sync();
    let mut holder = pair.a.session();
    holder.exec("begin; delete from s90_index where id = 2");
    pair.a.exec("delete from s90_index where id = 1");
    let inserting = pair.a.session();
    let pid = inserting.pid();
    // Its key is free; it waits for the fate of 'two', and meanwhile its key is used and deleted.
    let waiting = inserting.spawn("insert into s90_index values (1, 'two')");
    pair.a.wait_blocked(pid);
    tick();
    holder.exec("commit");
    waiting.join().expect("no panic").1.expect("the value is free now");
    pair.sync();
    pair.assert_rows("select id, u from s90_index", &["1|two"]);
    pair.assert_converged("s90_index");
}

#[test]
fn s91_a_trigger_updates_a_row_before_its_capture() {
    let pair = shared();
    pair.exec(
        "create function s91() returns trigger language plpgsql as $$ begin
            if new.a = 'new' then update s91 set a = 'touched by ' || new.id where id <> new.id and a = 'new'; end if;
            return null; end $$",
    );
    pair.exec("create table s91 (id int primary key, a text)");
    // The user's trigger fires first by its name, whatever ours are called.
    pair.exec("create trigger \" first\" after insert or update on s91 for each row execute function s91()");
    pair.add_table("s91", "");
    pair.a.exec("insert into s91 values (1, 'new'), (2, 'new'), (3, 'new')");
    pair.sync();
    pair.assert_converged("s91");
    pair.assert_rows("select count(*) from s91", &["3"]);
    pair.b.exec("update s91 set a = 'new'");
    pair.sync();
    pair.assert_converged("s91");
    pair.assert_conflicts("s91", &[]);
}

#[test]
fn s92_never_columns_of_two_lives() {
    let pair = shared();
    pair.table("s92", "id int primary key, a text, b text, c text");
    pair.a.exec("insert into s92 select n, 'old', 'old', 'old' from generate_series(1, 3) n");
    pair.sync();
    pair.partition();
    pair.b.exec("update s92 set b = 'unseen' where id = 1");
    tick();
    pair.a.exec(
        "begin; delete from s92; insert into s92 select n, 'new', 'new', 'new' from generate_series(1, 3) n; commit",
    );
    tick();
    pair.b.exec("update s92 set c = 'unseen' where id = 2");
    pair.a.exec("update s92 set b = 'newer' where id = 3");
    pair.b.exec("update s92 set b = 'unseen' where id = 3");
    pair.heal();
    pair.assert_rows("select a, b, c from s92 order by id", &["new|new|new", "new|new|new", "new|newer|new"]);
    pair.assert_converged("s92");
    let history = pair.history("s92");
    assert_eq!(history.len(), 3, "{history:#?}");
    for record in &history {
        assert_eq!(missing_values(std::slice::from_ref(record), &["unseen"]), [""; 0], "{record:#}");
    }
}

#[test]
fn s93_a_merged_row_is_not_what_the_other_has_seen() {
    let pair = shared();
    pair.table("s93", "id int primary key, a text, b text");
    pair.a.exec("insert into s93 values (1, 'a0', 'b0')");
    pair.sync();
    // B can't read from A; A reads from B.
    pair.a.line.set(Line::Stalled);
    pair.a.exec("update s93 set a = 'own'");
    tick();
    pair.b.exec("update s93 set b = 'b.1'");
    pair.a.wait_rows("select a, b from s93", &["own|b.1"]);
    // A's row has the version of B's, and B hasn't seen A's cell.
    let version = pair.b.one("select _hlc from s93");
    assert_eq!(pair.a.one("select _hlc from s93"), version);
    tick();
    pair.b.exec("update s93 set a = 'b.2'");
    pair.heal();
    pair.assert_rows("select a, b from s93", &["b.2|b.1"]);
    pair.assert_converged("s93");
    pair.assert_conflicts(
        "s93",
        &[conflict("update_origin_differs")
            .base(r#"{"a": "a0"}"#)
            .a(r#"{"a": "own"}"#)
            .b(r#"{"a": "b.2"}"#)
            .result(r#"{"a": "b.2", "b": "b.1"}"#)],
    );
}

#[test]
fn s94_an_update_of_a_missing_key_meets_its_insert() {
    let pair = shared();
    pair.table("s94", "id int primary key, a text");
    for (id, commit) in [(1, true), (2, false)] {
        pair.a.exec(&format!("insert into s94 values ({id}, 'old')"));
        pair.sync();
        pair.partition();
        pair.b.exec(&format!("delete from s94 where id = {id}"));
        tick();
        pair.a.exec(&format!("update s94 set a = 'updated' where id = {id}"));
        let mut inserting = pair.b.session();
        tick();
        inserting.exec(&format!("begin; insert into s94 values ({id}, 'inserted')"));
        pair.heal_lines();
        // The apply meets the insert in progress; it must neither fail for good nor decide too early.
        let applied = pair.a.line.traffic().1;
        until("the update to have reached B", || {
            let now = pair.a.line.traffic().1;
            if now > applied { Ok(()) } else { Err(format!("{now} bytes")) }
        });
        inserting.exec(if commit { "commit" } else { "rollback" });
        pair.sync();
        pair.assert_converged("s94");
        let expected = if commit { "inserted" } else { "updated" };
        pair.assert_rows(&format!("select a from s94 where id = {id}"), &[expected]);
    }
    let history = pair.history("s94");
    assert_eq!(missing_values(&history, &["updated"]), [""; 0], "{history:#?}");
}

#[test]
fn s95_no_constraint_is_ever_violated() {
    let pair = shared();
    pair.table("s95", "id int primary key, u text unique deferrable initially deferred");
    pair.table("s95_parent", "id int primary key");
    pair.table("s95_child", "id int primary key, parent int references s95_parent");
    pair.a.exec("insert into s95_parent values (1)");
    pair.sync();

    // Two rows with one value: neither node ever shows both, not even to a statement of the applying itself.
    pair.partition();
    pair.a.exec("insert into s95 values (1, 'x')");
    tick();
    pair.b.exec("insert into s95 values (2, 'x')");
    pair.heal();
    for node in pair.nodes() {
        node.wait_rows("select id from s95", &["2"]);
    }
    pair.assert_converged("s95");

    // An orphan whose parent a local session is deleting: the parent comes back.
    pair.partition();
    pair.a.exec("insert into s95_child values (1, 1)");
    let mut deleting = pair.b.session();
    deleting.exec("begin; delete from s95_parent where id = 1");
    pair.set_lines(Line::Open);
    until("the apply to wait for the session", || {
        let waiting =
            "select 1 from pg_stat_activity where backend_type = 'tandem exchange' and wait_event_type = 'Lock'";
        let told = "select 1 from tandem.status where last_error is not null";
        match pair.b.rows(waiting).is_empty() && pair.b.rows(told).is_empty() {
            true => Err(pair.b.report()),
            false => Ok(()),
        }
    });
    assert_eq!(pair.b.rows("select count(*) from s95_child"), ["0"]);
    deleting.exec("commit");
    pair.heal();
    for node in pair.nodes() {
        node.wait_rows("select c.id, p.id from s95_child c join s95_parent p on p.id = c.parent", &["1|1"]);
    }
    pair.assert_converged("s95_child");
    pair.assert_converged("s95_parent");
}

#[test]
fn s96_a_long_reader_of_the_journal_stops_no_one() {
    let pair = shared();
    pair.table("s96", "id int primary key, a text");
    let mut reader = pair.a.session();
    reader.exec("begin isolation level repeatable read");
    for segment in 0..4 {
        reader.rows(&format!("select count(*) from tandem.journal_{segment}"));
    }
    let mut writer = pair.a.session();
    writer.exec("set statement_timeout = '10s'");
    for round in 0..10 {
        writer.exec(&format!(
            "insert into s96 select n, repeat(md5(n::text), 60) from generate_series({0} * 5000 + 1, ({0} + 1) * 5000) n",
            round
        ));
        pair.sync();
    }
    reader.exec("commit");
    pair.assert_rows("select count(*) from s96", &["50000"]);
    pair.assert_converged("s96");
}

#[test]
fn s97_under_one_way_load_the_journal_stays_small() {
    let rounds = if full_size() { 1000 } else { 120 };
    let pair = shared();
    pair.table("s97", "id int primary key, a text");
    let size = "select sum(pg_total_relation_size(c.oid)) from pg_class c
                where c.relnamespace = 'tandem'::regnamespace and c.relname ~ '^journal' and c.relkind = 'r'";
    let mut largest = [0; 2];
    for round in 0..rounds {
        pair.a.exec("insert into s97 select n, repeat(md5(random()::text), 60) from generate_series(1, 1000) n");
        pair.a.exec("delete from s97");
        pair.a.exec("select tandem.wait_for_peer('60s')");
        if round % 10 == 9 {
            // Autovacuum's part, at the pace of a load that passes hours in seconds.
            pair.exec("vacuum tandem.tombstone");
        }
        let part = &mut largest[usize::from(round * 2 >= rounds)];
        *part = (*part).max(pair.a.number(size)).max(pair.b.number(size));
    }
    let [first, second] = largest;
    let sizes = pair.nodes().map(|node| {
        node.rows(
            "select relname, pg_size_pretty(pg_total_relation_size(oid)) from pg_class
             where relnamespace = 'tandem'::regnamespace and relkind = 'r' and pg_total_relation_size(oid) > 1000000",
        )
    });
    assert!(
        second < first * 3 / 2,
        "under a steady load it grows on: {} MB, then {} MB: {sizes:#?}",
        first >> 20,
        second >> 20
    );
    for node in pair.nodes() {
        until(&format!("the tombstones of {} to go", node.name), || {
            pair.a.exec("insert into s97 values (0, 'x') on conflict (id) do update set a = md5(random()::text)");
            let left = node.number("select count(*) from tandem.tombstone where relid = 's97'::regclass");
            if left == 0 { Ok(()) } else { Err(format!("{left} tombstones")) }
        });
    }
    pair.sync();
    pair.assert_converged("s97");
}

#[test]
fn s71_a_user_never_loses_a_deadlock_with_the_apply() {
    let pair = shared();
    pair.table("s71", "id int primary key, a text");
    pair.a.exec("insert into s71 values (1, 'x'), (2, 'x')");
    pair.sync();
    let rounds = if full_size() { 50 } else { 5 };
    for round in 0..rounds {
        let mut local = pair.b.session();
        local.exec("begin; update s71 set a = 'local' where id = 2");
        thread::scope(|scope| {
            scope.spawn(|| {
                pair.a.exec(&format!(
                    "begin; update s71 set a = 'remote {round}' where id = 1;
                                                 update s71 set a = 'remote {round}' where id = 2; commit"
                ))
            });
        });
        until("the apply to wait for the local session", || {
            let query =
                "select 1 from pg_stat_activity where backend_type = 'tandem exchange' and wait_event_type = 'Lock'";
            if pair.b.rows(query).is_empty() { Err("not yet") } else { Ok(()) }
        });
        local.exec("update s71 set a = 'local' where id = 1; commit");
        pair.sync();
        pair.assert_converged("s71");
    }
}
