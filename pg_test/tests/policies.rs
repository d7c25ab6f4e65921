//! Scenarios 29 and 98: how conflicts are decided, by other rules than the later write. Node A has the lower
//! id: it is the arbiter.

use tandem_pg_test::wait::until;
use tandem_pg_test::workload::{self, Workload};
use tandem_pg_test::{Pair, conflict, shared, tick};

/// A table on both nodes with column `v`, decided by this policy, whose rows all hold `base`.
fn table(pair: &Pair, name: &str, column: &str, policy: &str, base: &str) {
    pair.table(name, &format!("id int primary key, v {column}, other text"));
    let columns = ["first_update_wins", "custom", "manual"].iter().all(|table| !policy.contains(table));
    let columns = if columns { ", columns => '{v}'" } else { "" };
    assert_eq!(pair.a.one(&format!("select tandem.set_policy('{name}', {policy}{columns})")), "in force");
    pair.a.exec(&format!("insert into {name} select n, {base}, 'other' from generate_series(1, 4) n"));
    pair.sync();
}

/// Row 1: A writes before B. Row 2: B before A. Row 3: both write twice in turn, A last. Row 4: B last.
/// Then the lines are healed, and both nodes hold what is expected, the record in every row once and its `policy` named.
fn decide(pair: &Pair, table: &str, a: [&str; 2], b: [&str; 2], expected: [&str; 4]) {
    pair.partition();
    let set = |on_a: bool, value: &str, id: u32| {
        let node = if on_a { &pair.a } else { &pair.b };
        node.exec(&format!("update {table} set v = {value} where id = {id}"));
        tick();
    };
    for (id, turns) in [(1, vec![(true, a[0]), (false, b[0])]), (2, vec![(false, b[0]), (true, a[0])])] {
        turns.into_iter().for_each(|(on_a, value)| set(on_a, value, id));
    }
    for (on_a, value) in [(false, b[0]), (true, a[0]), (false, b[1]), (true, a[1])] {
        set(on_a, value, 3);
    }
    for (on_a, value) in [(true, a[0]), (false, b[0]), (true, a[1]), (false, b[1])] {
        set(on_a, value, 4);
    }
    pair.heal();
    pair.assert_rows(&format!("select v from {table} order by id"), &expected);
    pair.assert_converged(table);
    pair.assert_quiet();
    pair.assert_converged(table);
}

/// The policies named in a table's history, which is the same on both nodes.
fn policies_on_record(pair: &Pair, table: &str) -> Vec<String> {
    let history = pair.history(table);
    let mut names: Vec<String> = history.iter().map(|r| r["policy"].as_str().unwrap_or_default().to_string()).collect();
    let query = format!("select conflict_id, policy from tandem.conflicts where table_name = '{table}' order by 1");
    assert_eq!(pair.a.rows(&query), pair.b.rows(&query));
    names.sort();
    names.dedup();
    names
}

#[test]
fn s29_greatest() {
    let pair = shared();
    table(&pair, "s29_greatest", "int", "'greatest'", "0");
    decide(&pair, "s29_greatest", ["7", "9"], ["4", "5"], ["7", "7", "9", "9"]);
    assert_eq!(policies_on_record(&pair, "s29_greatest"), ["greatest"]);
    pair.a.exec("select tandem.set_policy('s29_greatest', 'last_update_wins', columns => '{v}')");
    pair.sync();
    decide(&pair, "s29_greatest", ["17", "19"], ["14", "15"], ["14", "17", "19", "15"]);
}

#[test]
fn s29_greatest_takes_the_peers_value_as_well() {
    let pair = shared();
    table(&pair, "s29_greatest_b", "text collate \"C\"", "'greatest'", "null");
    decide(&pair, "s29_greatest_b", ["'b'", "'c'"], ["'x'", "'y'"], ["x", "x", "y", "y"]);
}

#[test]
fn s29_least() {
    let pair = shared();
    table(&pair, "s29_least", "timestamptz", "'least'", "now()");
    let time = |hour: u32| format!("'2026-01-01 {hour:02}:00Z'");
    let shown = |hour: u32| pair.a.one(&format!("select {}::timestamptz", time(hour)));
    let (five, six) = (shown(5), shown(6));
    decide(&pair, "s29_least", [&time(9), &time(8)], [&time(6), &time(5)], [&six, &six, &five, &five]);
}

#[test]
fn s29_first_update_wins() {
    let pair = shared();
    table(&pair, "s29_first", "text", "'first_update_wins'", "'base'");
    // Where B's first was the earliest, what B wrote over it goes on from there.
    decide(&pair, "s29_first", ["'a1'", "'a2'"], ["'b1'", "'b2'"], ["a1", "b1", "b2", "b2"]);
    assert_eq!(policies_on_record(&pair, "s29_first"), ["first_update_wins"]);
    // Nothing that stood for another is remembered once both nodes have it.
    until("the reinstated writes to be forgotten", || {
        pair.exec("update s29_first set other = md5(random()::text) where id = 1");
        let left = pair.a.number("select count(*) from tandem.reinstated");
        if left == 0 { Ok(()) } else { Err(format!("{left} left")) }
    });
}

#[test]
fn s29_set_union() {
    let pair = shared();
    table(&pair, "s29_array", "text[]", "'set_union'", "'{x}'");
    let sets = ["'{x,a}'", "'{x,a,c}'", "'{x,b}'", "'{x,b,d}'"];
    decide(
        &pair,
        "s29_array",
        [sets[0], sets[1]],
        [sets[2], sets[3]],
        ["{x,b,a}", "{x,a,b}", "{x,a,c,b,d}", "{x,a,c,b,d}"],
    );
    table(&pair, "s29_jsonb", "jsonb", "'set_union'", "'[1]'");
    decide(
        &pair,
        "s29_jsonb",
        ["'[1, 2]'", "'[1, 2, 3]'"],
        ["'[1, \"b\"]'", "'[1, \"b\", null]'"],
        ["[1, \"b\", 2]", "[1, 2, \"b\"]", "[1, 2, 3, \"b\", null]", "[1, 2, 3, \"b\", null]"],
    );
}

const SUM: &str = "create function {} (c json) returns json language sql as $$
    select json_build_object('v', (c->'local'->>'v')::int + (c->'remote'->>'v')::int - (c->'base'->>'v')::int) $$";

#[test]
fn s29_a_handler_decides() {
    let pair = shared();
    pair.exec(&SUM.replace("{}", "add_up"));
    table(&pair, "s29_custom", "int", "'custom', handler => 'add_up'", "10");
    // Each side takes off: 3, then 2 more; 1, then 3 more.
    decide(&pair, "s29_custom", ["7", "5"], ["9", "6"], ["6", "6", "1", "1"]);
    assert_eq!(policies_on_record(&pair, "s29_custom"), ["custom(public.add_up)"]);
}

#[test]
fn s29_a_handler_that_fails_leaves_the_conflict_open() {
    let pair = shared();
    pair.exec("create table s29_diary (note text)");
    pair.exec(
        "create function troubled (c json) returns json language plpgsql as $$ begin
             case c->'key'->>'id'
                 when '1' then raise 'no idea';
                 when '2' then insert into public.s29_diary values ('written');
                 when '3' then perform pg_sleep(60);
                 else return '{\"id\": 7}';
             end case;
             return null;
         end $$",
    );
    table(&pair, "s29_troubled", "int", "'custom', handler => 'public.troubled(json)'", "0");
    pair.partition();
    pair.a.exec("update s29_troubled set v = 1");
    tick();
    pair.b.exec("update s29_troubled set v = 2");
    pair.heal();
    pair.assert_rows("select v from s29_troubled", &["2"; 4]);
    pair.assert_converged("s29_troubled");
    let notes =
        "select key_tuple->>'id', status, note from tandem.conflicts where table_name = 's29_troubled' order by 1";
    for node in pair.nodes() {
        let rows = node.rows(notes);
        assert_eq!(rows.len(), 4, "{rows:?}");
        for (row, why) in rows.iter().zip(["no idea", "read-only", "timeout", "belongs to the key"]) {
            assert!(row.contains("|open|") && row.contains(why), "{why}: {row}");
        }
    }
    pair.assert_rows("select count(*) from s29_diary", &["0"]);
    // A person decides instead.
    let id = pair.b.one(
        "select conflict_id from tandem.open_conflicts where table_name = 's29_troubled' and key_tuple->>'id' = '1'",
    );
    pair.b.exec(&format!("select tandem.resolve('{id}', 'a')"));
    pair.sync();
    pair.assert_rows("select v from s29_troubled where id = 1", &["1"]);
}

#[test]
fn s29_what_a_policy_writes_must_satisfy_the_table() {
    let pair = shared();
    pair.table("s29_checked", "id int primary key, v int check (v <> 9), w int");
    pair.exec(&SUM.replace("{}", "add_up_checked"));
    pair.a.exec("select tandem.set_policy('s29_checked', 'custom', handler => 'add_up_checked')");
    pair.a.exec("insert into s29_checked values (1, 10)");
    pair.sync();
    pair.partition();
    pair.a.exec("update s29_checked set v = 11");
    tick();
    pair.b.exec("update s29_checked set v = 8");
    pair.heal();
    pair.assert_rows("select v from s29_checked", &["8"]);
    pair.assert_conflicts("s29_checked", &[conflict("update_origin_differs").status("open")]);
}

#[test]
fn s29_manual_waits_for_a_person() {
    let pair = shared();
    table(&pair, "s29_manual", "int", "'manual'", "0");
    decide(&pair, "s29_manual", ["1", "2"], ["3", "4"], ["3", "1", "2", "4"]);
    assert_eq!(policies_on_record(&pair, "s29_manual"), ["manual"]);
    let open = "select count(*) = count(*) filter (where status = 'open') and count(*) > 3 from tandem.conflicts
                where table_name = 's29_manual'";
    pair.assert_rows(open, &["t"]);
    let id = pair.a.one(
        "select conflict_id from tandem.open_conflicts where table_name = 's29_manual' and key_tuple->>'id' = '1'",
    );
    pair.b.exec(&format!("select tandem.resolve('{id}', 'a')"));
    pair.sync();
    pair.assert_rows("select v from s29_manual where id = 1", &["1"]);
    pair.assert_rows(&format!("select status from tandem.conflicts where conflict_id = '{id}'"), &["resolved"]);
}

#[test]
fn s29_a_policy_of_one_type_of_conflict() {
    let pair = shared();
    pair.table("s29_type", "id int primary key, v int");
    pair.a.exec("select tandem.set_policy('s29_type', 'manual', conflict_type => 'insert_exists')");
    pair.a.exec("select tandem.set_policy('s29_type', 'manual', conflict_type => 'update_deleted')");
    pair.a.exec("select tandem.set_policy('s29_type', 'greatest', columns => '{v}')");
    pair.a.exec("insert into s29_type values (1, 0), (2, 0)");
    pair.sync();
    pair.partition();
    pair.a.exec("update s29_type set v = 9 where id = 1; insert into s29_type values (3, 9)");
    pair.b.exec("delete from s29_type where id = 2");
    tick();
    pair.b.exec("update s29_type set v = 5 where id = 1; insert into s29_type values (3, 5)");
    pair.a.exec("update s29_type set v = 1 where id = 2");
    pair.heal();
    pair.assert_rows("select v from s29_type order by id", &["9", "1", "9"]);
    pair.assert_converged("s29_type");
    pair.assert_conflicts(
        "s29_type",
        &[
            conflict("update_origin_differs").status("auto").result(r#"{"id": 1, "v": 9}"#),
            conflict("update_deleted").status("open"),
            // The column's own policy comes before that of the table's conflict type.
            conflict("insert_exists").status("auto").result(r#"{"id": 3, "v": 9}"#),
        ],
    );
}

#[test]
fn the_other_node_asks_the_arbiter() {
    let pair = shared();
    pair.table("s98_asked", "id int primary key, v int, w int");
    pair.a.exec("insert into s98_asked values (1, 0, 0)");
    pair.sync();
    assert_eq!(pair.b.one("select tandem.set_policy('s98_asked', 'greatest', columns => '{v}')"), "pending");
    for node in pair.nodes() {
        node.wait_rows(
            "select columns, policy, state, tandem.hlc_node(version) from tandem.policies where relation = 's98_asked'::regclass",
            &["{v}|greatest|in force|1"],
        );
        node.wait_rows("select policy from tandem.tables where relation = 's98_asked'::regclass", &["v: greatest"]);
    }
    pair.partition();
    pair.a.exec("update s98_asked set v = 2, w = 2");
    tick();
    pair.b.exec("update s98_asked set v = 1, w = 1");
    pair.heal();
    pair.assert_rows("select v, w from s98_asked", &["2|1"]);
    pair.assert_converged("s98_asked");
}

#[test]
fn what_the_arbiter_refuses_says_why() {
    let pair = shared();
    pair.table("s98_refused", "id int primary key, v int");
    pair.b.exec(&SUM.replace("{}", "only_on_b"));
    pair.b.exec("select tandem.set_policy('s98_refused', 'custom', handler => 'only_on_b')");
    for node in pair.nodes() {
        node.wait_rows(
            "select state, reason from tandem.policies where relation = 's98_refused'::regclass",
            &["refused|function public.only_on_b does not exist"],
        );
        assert_eq!(
            node.one("select policy from tandem.tables where relation = 's98_refused'::regclass"),
            "last_update_wins"
        );
    }
}

#[test]
fn a_policy_of_before_the_pairing_holds_after_it() {
    let pair = Pair::builder().unconnected().start();
    pair.exec("create table s98_before (id int primary key, v int, w int)");
    pair.exec("select tandem.add_table('s98_before')");
    assert_eq!(pair.a.one("select tandem.set_policy('s98_before', 'greatest', columns => '{v}')"), "in force");
    // Nobody knows yet that this is the other node.
    assert_eq!(pair.b.one("select tandem.set_policy('s98_before', 'least', columns => '{w}')"), "in force");
    pair.connect();
    pair.wait_active("s98_before");
    for node in pair.nodes() {
        node.wait_rows(
            "select columns, policy, state from tandem.policies where relation = 's98_before'::regclass order by 1",
            &["{v}|greatest|in force", "{w}|least|in force"],
        );
    }
    // A table that comes back begins without policies, on both nodes.
    pair.a.exec("select tandem.remove_table('s98_before'); select tandem.add_table('s98_before')");
    for node in pair.nodes() {
        node.wait_rows(
            "select policy from tandem.tables where relation = 's98_before'::regclass",
            &["last_update_wins"],
        );
    }
}

#[test]
fn s98_policies_change_while_both_write() {
    let pair = shared();
    pair.exec("create function s98_keep (c json) returns json language sql as $$ select json_build_object('b', c->'remote'->>'b') $$");
    pair.table("s98", workload::COLUMNS);
    let load = Workload::start(&pair, "s98", 2, 10, workload::seed());
    for policy in [
        "'manual', conflict_type => 'insert_exists'",
        "'greatest', columns => '{a}'",
        "'first_update_wins'",
        "'custom', handler => 's98_keep', columns => '{b}'",
        "'manual'",
        "'least', columns => '{a}'",
    ] {
        load.wait_commits(40);
        pair.partition();
        load.wait_commits(30);
        assert_eq!(pair.a.one(&format!("select tandem.set_policy('s98', {policy})")), "in force");
        load.wait_commits(30);
        pair.heal_lines();
        load.wait_commits(20);
        assert_eq!(pair.b.one("select tandem.set_policy('s98', 'last_update_wins', columns => '{b}')"), "pending");
    }
    load.finish(&pair);
    let query = "select conflict_id, policy, status from tandem.conflicts where table_name = 's98' order by 1";
    assert_eq!(pair.a.rows(query), pair.b.rows(query), "both nodes judged by the same policy");
    assert!(policies_on_record(&pair, "s98").len() > 4);
    for node in pair.nodes() {
        node.wait_rows(
            "select count(*) from tandem.policies where relation = 's98'::regclass and state = 'pending'",
            &["0"],
        );
    }
}

#[test]
fn what_a_user_inserts_while_a_conflict_is_settled_is_not_overruled_unseen() {
    let pair = shared();
    pair.table("s98_reborn", "id int primary key, v int");
    pair.a.exec("select tandem.set_policy('s98_reborn', 'greatest', columns => '{v}')");
    for round in 0..4 {
        let (row, other) = (round * 2, round * 2 + 1);
        pair.a.exec(&format!("insert into s98_reborn values ({row}, 1), ({other}, 1)"));
        pair.sync();
        pair.partition();
        pair.a.exec(&format!("delete from s98_reborn where id = {row}; insert into s98_reborn values ({row}, 2)"));
        pair.a.exec(&format!("delete from s98_reborn where id = {row}"));
        // Greater than all, of a life that is over; the other row holds up what comes after it.
        pair.b.exec(&format!("begin; update s98_reborn set v = 9 where id = {row}; update s98_reborn set v = 9 where id = {other}; commit"));
        // So that the peer finds nothing of the 9 when the deleted life comes, and adds nothing to its record.
        pair.b.exec(&format!("update s98_reborn set v = 3 where id = {row}"));
        let mut busy = pair.a.session();
        busy.exec(&format!("begin; select from s98_reborn where id = {other} for update"));
        pair.heal_lines();
        pair.a.wait_blocked(pair.a.worker_pid());
        pair.a.exec(&format!("insert into s98_reborn values ({row}, 7)"));
        busy.exec("commit");
        pair.sync();
        // If the worker gave way, the pair was judged anew with the insert in it.
        let shown = pair.a.one(&format!("select v from s98_reborn where id = {row}"));
        let seven = format!(
            "select count(*) from tandem.conflicts where table_name = 's98_reborn'
            and (key_tuple->>'id')::int = {row} and '7' in (local_tuple->>'v', remote_tuple->>'v')"
        );
        assert!(
            shown == "7" || pair.a.number(&seven) > 0,
            "{shown}, and 7 is not on record\n{:?}",
            pair.history("s98_reborn")
        );
    }
    pair.assert_converged("s98_reborn");
}

#[test]
fn a_policy_waits_for_open_writers_and_not_for_ever() {
    let pair = shared();
    pair.table("s98_busy", "id int primary key, v int");
    let mut writer = pair.a.session();
    writer.exec("begin; insert into s98_busy values (1, 1)");
    let set = "set lock_timeout = '200ms'; select tandem.set_policy('s98_busy', 'greatest', columns => '{v}')";
    let refused = pair.a.fails(set);
    assert_eq!(refused.sqlstate, "55P03", "{refused}");
    assert!(refused.to_string().contains("is being written to"), "{refused}");
    // A wish waits.
    pair.b.exec("select tandem.set_policy('s98_busy', 'least', columns => '{v}')");
    let pending = "select state from tandem.policies where relation = 's98_busy'::regclass";
    pair.a.wait_rows(pending, &["pending"]);
    writer.exec("commit");
    for node in pair.nodes() {
        node.wait_rows(pending, &["in force"]);
    }
}

/// A table that both nodes decide at once by this policy, set before it was added on the other side.
fn fixed(pair: &Pair, name: &str, columns: &str, policy: &str) {
    pair.exec(&format!("create table {name} ({columns})"));
    pair.a.exec(&format!("select tandem.add_table('{name}')"));
    assert_eq!(pair.a.one(&format!("select tandem.set_policy('{name}', {policy})")), "in force");
    pair.b.exec(&format!("select tandem.add_table('{name}')"));
    for node in pair.nodes() {
        node.wait_table(name, "policy_differs");
    }
    assert_eq!(pair.b.one(&format!("select tandem.set_policy('{name}', {policy})")), "in force");
    pair.wait_active(name);
}

#[test]
fn s29_policies_that_decide_at_once_are_set_on_both_sides_first() {
    let pair = shared();
    fixed(&pair, "s29_fixed", "id int primary key, v text", "'delete_wins'");
    for node in pair.nodes() {
        assert_eq!(node.one("select policy from tandem.tables where relation = 's29_fixed'::regclass"), "delete_wins");
        let failure = node.fails("select tandem.set_policy('s29_fixed', 'update_wins')");
        assert_eq!(failure.sqlstate, "55000", "{failure}");
        let failure = node.fails("select tandem.set_policy('s29_fixed', 'last_update_wins')");
        assert_eq!(failure.sqlstate, "55000", "{failure}");
    }
    // What the arbiter writes later is another matter.
    assert_eq!(pair.a.one("select tandem.set_policy('s29_fixed', 'manual', columns => '{v}')"), "in force");
}

#[test]
fn s29_delete_wins() {
    let pair = shared();
    fixed(&pair, "s29_delete", "id int primary key, v text", "'delete_wins'");
    pair.a.exec("insert into s29_delete values (1, 'base'), (2, 'base')");
    pair.sync();
    pair.partition();
    pair.a.exec("delete from s29_delete where id = 1");
    pair.b.exec("delete from s29_delete where id = 2");
    tick();
    pair.b.exec("update s29_delete set v = 'from b' where id = 1");
    pair.a.exec("update s29_delete set v = 'from a' where id = 2");
    pair.heal();
    pair.assert_rows("select count(*) from s29_delete", &["0"]);
    pair.assert_conflicts(
        "s29_delete",
        &[
            conflict("delete_origin_differs").b(r#"{"v": "from b"}"#),
            conflict("delete_origin_differs").a(r#"{"v": "from a"}"#),
        ],
    );
    assert_eq!(policies_on_record(&pair, "s29_delete"), ["delete_wins"]);
}

#[test]
fn s29_update_wins() {
    let pair = shared();
    fixed(&pair, "s29_update", "id int primary key, v text", "'update_wins'");
    pair.a.exec("insert into s29_update values (1, 'base'), (2, 'base')");
    pair.sync();
    pair.partition();
    pair.a.exec("update s29_update set v = 'from a' where id = 1");
    pair.b.exec("update s29_update set v = 'from b' where id = 2");
    tick();
    pair.b.exec("delete from s29_update where id = 1");
    pair.a.exec("delete from s29_update where id = 2");
    pair.heal();
    pair.assert_rows("select id, v from s29_update order by id", &["1|from a", "2|from b"]);
    pair.assert_converged("s29_update");
    pair.assert_conflicts("s29_update", &[conflict("update_deleted"), conflict("update_deleted")]);
    assert_eq!(policies_on_record(&pair, "s29_update"), ["update_wins"]);
}

#[test]
fn s29_node_priority() {
    let pair = shared();
    fixed(&pair, "s29_node", "id int primary key, v text, other text", "'node_priority(2)'");
    pair.a.exec("insert into s29_node select n, 'base', 'other' from generate_series(1, 4) n");
    pair.sync();
    decide(&pair, "s29_node", ["'a1'", "'a2'"], ["'b1'", "'b2'"], ["b1", "b1", "b2", "b2"]);
    assert_eq!(policies_on_record(&pair, "s29_node"), ["node_priority(2)"]);
}

#[test]
fn s98_a_pair_is_judged_by_what_was_in_force_at_the_arbiters_write() {
    let pair = shared();
    pair.table("s98_pair", "id int primary key, v int");
    pair.a.exec("insert into s98_pair select n, 0 from generate_series(1, 4) n");
    pair.sync();
    pair.partition();
    // Rows 1 and 2 are written by the arbiter before the policy, 3 and 4 after it; 1 and 3 later by B.
    pair.b.exec("update s98_pair set v = 1 where id in (2, 4)");
    pair.a.exec("update s98_pair set v = 9 where id in (1, 2)");
    pair.a.exec("select tandem.set_policy('s98_pair', 'greatest', columns => '{v}')");
    pair.a.exec("update s98_pair set v = 9 where id in (3, 4)");
    tick();
    pair.b.exec("update s98_pair set v = 1 where id in (1, 3)");
    pair.heal();
    pair.assert_rows("select v from s98_pair order by id", &["1", "9", "9", "9"]);
    pair.assert_converged("s98_pair");
    pair.assert_rows(
        "select key_tuple->>'id', policy from tandem.conflicts where table_name = 's98_pair' order by 1",
        &["1|last_update_wins", "2|last_update_wins", "3|greatest", "4|greatest"],
    );
}
