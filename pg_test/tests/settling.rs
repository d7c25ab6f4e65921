//! Scenarios 46 to 48 and 105: people decide, on either side, at any time, one conflict or all of them.

use std::time::Instant;

use tandem_pg_test::{Node, Pair, conflict, shared, tick};

/// Nodes in the order in which they act.
fn orders(pair: &Pair) -> [[&Node; 2]; 2] {
    [[&pair.a, &pair.b], [&pair.b, &pair.a]]
}

/// One conflict for each id about `a`: what `first` wrote is lost to what `second` wrote.
fn lost_updates(pair: &Pair, table: &str, [first, second]: [&Node; 2], ids: &str) {
    pair.a.exec(&format!("insert into {table} (id, a, b) select i, 'base', 'b' from generate_series({ids}) i"));
    pair.sync();
    pair.partition();
    for node in [first, second] {
        node.exec(&format!("update {table} set a = 'from {}' where a = 'base'", node.name));
        tick();
    }
    pair.heal();
}

/// As if the policy had left them to a person.
fn make_open(pair: &Pair, table: &str) {
    pair.exec(&format!(
        "update tandem.conflict set status = 'open',
             record = replace(record::text, '\"status\":\"auto\"', '\"status\":\"open\"')::json
         where table_name = '{table}' and status = 'auto'"
    ));
}

fn id_of(node: &Node, table: &str, key: u32) -> String {
    node.one(&format!(
        "select conflict_id from tandem.conflicts where table_name = '{table}' and key_tuple->>'id' = '{key}'"
    ))
}

/// Closed on both nodes, with the same words.
fn assert_settled(pair: &Pair, table: &str, status: &str) {
    assert!(!pair.history(table).is_empty());
    let others = format!("select count(*) from tandem.conflicts where table_name = '{table}' and status <> '{status}'");
    pair.assert_rows(&others, &["0"]);
    let blank = format!(
        "select count(*) from tandem.conflicts where table_name = '{table}' and (resolved_by is null or resolved_at is null)"
    );
    pair.assert_rows(&blank, &["0"]);
}

#[test]
fn s46_every_resolution_from_either_side_in_either_order() {
    let pair = shared();
    for (turn, order) in orders(&pair).into_iter().enumerate() {
        for decider in pair.nodes() {
            let table = format!("s46_{turn}_{}", decider.name);
            pair.table(&table, "id int primary key, a text, b text");
            lost_updates(&pair, &table, order, "1, 7");
            make_open(&pair, &table);
            let (own, other) = if decider.name == "a" { ("from a", "from b") } else { ("from b", "from a") };
            let winner = format!("from {}", order[1].name);
            let cases = [
                ("'local'", own),
                ("'remote'", other),
                ("'base'", "base"),
                ("'result'", winner.as_str()),
                ("'a'", "from a"),
                ("'b'", "from b"),
                (r#"with_tuple => '{"a": "by hand"}', note => 'asked'"#, "by hand"),
            ];
            for (key, (how, expected)) in (1..).zip(cases) {
                let id = id_of(decider, &table, key);
                decider.exec(&format!("select tandem.resolve('{id}', {how})"));
                assert_eq!(decider.one(&format!("select a from {table} where id = {key}")), expected, "{how}");
            }
            pair.sync();
            for (key, (how, expected)) in (1..).zip(cases) {
                let row = format!("select a, b from {table} where id = {key}");
                assert_eq!(pair.a.one(&row.replace(", b", "")), expected, "{how} on {}", decider.name);
                pair.assert_rows(&row, &[&format!("{expected}|b")]);
            }
            pair.assert_converged(&table);
            assert_settled(&pair, &table, "resolved");
            assert_eq!(pair.history(&table).len(), cases.len(), "deciding makes no conflicts");
        }
    }
}

#[test]
fn s46_both_rows_are_kept_from_either_side() {
    let pair = shared();
    for (turn, [first, second]) in orders(&pair).into_iter().enumerate() {
        for decider in pair.nodes() {
            let table = format!("s46_both_{turn}_{}", decider.name);
            pair.table(&table, "id int primary key, a text");
            pair.partition();
            for node in [first, second] {
                node.exec(&format!("insert into {table} values (1, 'from {}')", node.name));
                tick();
            }
            pair.heal();
            make_open(&pair, &table);
            let id = id_of(decider, &table, 1);
            decider.exec(&format!(r#"select tandem.resolve('{id}', 'keep_both', with_tuple => '{{"id": 18}}')"#));
            pair.sync();
            let rows = [format!("1|from {}", second.name), format!("18|from {}", first.name)];
            pair.assert_rows(&format!("select id, a from {table} order by id"), &rows.each_ref().map(String::as_str));
            pair.assert_converged(&table);
            assert_settled(&pair, &table, "resolved");
        }
    }
}

#[test]
fn s46_a_decision_made_while_the_peer_is_away_reaches_it() {
    let pair = shared();
    for (turn, order) in orders(&pair).into_iter().enumerate() {
        let table = format!("s46_away_{turn}");
        pair.table(&table, "id int primary key, a text, b text");
        lost_updates(&pair, &table, order, "1, 1");
        make_open(&pair, &table);
        pair.partition();
        let [decider, away] = order;
        decider.exec(&format!("select tandem.resolve('{}', 'local')", id_of(decider, &table, 1)));
        assert_eq!(decider.one(&format!("select a from {table}")), format!("from {}", decider.name));
        assert_eq!(away.one(&format!("select a from {table}")), format!("from {}", away.name));
        pair.heal();
        pair.assert_rows(&format!("select a from {table}"), &[&format!("from {}", decider.name)]);
        pair.assert_converged(&table);
        assert_settled(&pair, &table, "resolved");
    }
}

/// Who decided last, by the record; the row has to say the same.
fn assert_rows_follow_decisions(pair: &Pair, table: &str, ids: &[String]) {
    for id in ids {
        let decided = pair.a.one(&format!("select note from tandem.conflicts where conflict_id = '{id}'"));
        let row = format!(
            "select t.a from {table} t join tandem.conflicts c on c.key_tuple->>'id' = t.id::text
             where c.conflict_id = '{id}'"
        );
        pair.assert_rows(&row, &[&decided]);
    }
}

#[test]
fn s46_of_two_decisions_that_cross_the_later_one_holds_also_after_crashes() {
    let pair = Pair::new();
    pair.table("s46_cross", "id int primary key, a text, b text");
    lost_updates(&pair, "s46_cross", [&pair.a, &pair.b], "1, 12");
    make_open(&pair, "s46_cross");
    let ids: Vec<String> = (1..=12).map(|key| id_of(&pair.a, "s46_cross", key)).collect();
    pair.partition();
    // The note is what the decider wants the row to be; 'result' wants it to stay.
    let decide = |node: &Node, i: usize| {
        let (how, wanted) = match (node.name, i % 3) {
            ("a", 0) => ("'local'".to_string(), "from a".to_string()),
            ("b", 1) => ("'result'".to_string(), "from b".to_string()),
            (name, _) => (format!(r#"with_tuple => '{{"a": "{name} {i}"}}'"#), format!("{name} {i}")),
        };
        node.exec(&format!("select tandem.resolve('{}', {how}, note => '{wanted}')", ids[i]));
        tick();
    };
    let order = |i: usize| if i.is_multiple_of(2) { [&pair.a, &pair.b] } else { [&pair.b, &pair.a] };
    (0..6).for_each(|i| order(i).into_iter().for_each(|node| decide(node, i)));
    // Begun first, committed last: it is the earlier decision all the same, in the record as in the row.
    let mut slow = pair.a.session();
    slow.exec(&format!(
        r#"begin; select tandem.resolve('{}', with_tuple => '{{"a": "slow"}}', note => 'slow')"#,
        ids[6]
    ));
    tick();
    pair.b.exec(&format!("select tandem.resolve('{}', 'base', note => 'base')", ids[6]));
    tick();
    slow.exec("commit");
    drop(slow);
    for node in pair.nodes() {
        node.kill_and_restart();
    }
    (7..12).for_each(|i| order(i).into_iter().for_each(|node| decide(node, i)));
    pair.a.kill_and_restart();
    pair.heal();
    pair.assert_converged("s46_cross");
    // A clock starts ahead after a crash: which of the decisions is later is then not for the wall clock to say.
    for (i, id) in ids.iter().enumerate().take(7) {
        let last = if i == 6 { "b" } else { order(i)[1].name };
        let by = pair
            .a
            .one(&format!("select tandem.hlc_node(decision_version) from tandem.conflict where conflict_id = '{id}'"));
        assert_eq!(by, if last == "a" { "1" } else { "2" }, "conflict {i} was decided last on {last}");
    }
    assert_rows_follow_decisions(&pair, "s46_cross", &ids);
    pair.history("s46_cross");
    pair.assert_rows("select count(*) from tandem.open_conflicts", &["0"]);
}

#[test]
fn s47_columns_that_were_renamed_added_or_dropped_since() {
    let pair = shared();
    for (turn, order) in orders(&pair).into_iter().enumerate() {
        let table = format!("s47_columns_{turn}");
        pair.table(&table, "id int primary key, a text, b text");
        lost_updates(&pair, &table, order, "1, 3");
        // A deleted row comes back whole, in columns that it didn't have.
        pair.a.exec(&format!("insert into {table} values (4, 'base', 'b')"));
        pair.sync();
        pair.partition();
        order[0].exec(&format!("update {table} set a = 'kept on record' where id = 4"));
        tick();
        order[1].exec(&format!("delete from {table} where id = 4"));
        pair.heal();
        make_open(&pair, &table);

        pair.exec(&format!("alter table {table} rename a to a2; alter table {table} add c int default 5"));
        pair.wait_active(&table);
        let [decider, _] = order;
        let own = format!("from {}", decider.name);
        let id = id_of(decider, &table, 1);
        decider.exec(&format!("select tandem.resolve('{id}', 'local')"));
        decider.exec(&format!("select tandem.resolve('{}', 'local')", id_of(decider, &table, 4)));
        pair.sync();
        pair.assert_rows(&format!("select a2, b, c from {table} where id = 1"), &[&format!("{own}|b|5")]);
        pair.assert_rows(&format!("select a2, b, c from {table} where id = 4"), &["kept on record|b|5"]);

        pair.exec(&format!("alter table {table} rename id to number"));
        pair.wait_active(&table);
        decider.exec(&format!("select tandem.resolve('{}', 'local')", id_of(decider, &table, 2)));
        pair.sync();
        pair.assert_rows(&format!("select a2 from {table} where number = 2"), &[&own]);

        pair.exec(&format!("alter table {table} drop a2"));
        pair.wait_active(&table);
        let id = id_of(decider, &table, 3);
        let failure = decider.fails(&format!("select tandem.resolve('{id}', 'local')"));
        assert_eq!(failure.sqlstate, "55000", "{failure}");
        assert!(failure.message.contains("column \"a\"") && failure.hint.contains("ignore"), "{failure}");
        decider.exec(&format!("select tandem.ignore('{id}')"));
        pair.sync();
        pair.assert_converged(&table);
        pair.assert_rows(&format!("select count(*) from tandem.open_conflicts where table_name = '{table}'"), &["0"]);
    }
}

#[test]
fn s48_ten_thousand_open_conflicts() {
    let pair = shared();
    for (turn, order) in orders(&pair).into_iter().enumerate() {
        let table = format!("s48_{turn}");
        pair.table(&table, "id int primary key, a text, b text");
        let started = Instant::now();
        lost_updates(&pair, &table, order, "1, 10000");
        make_open(&pair, &table);
        let met = started.elapsed();
        let started = Instant::now();
        let count = order[0].number(&format!("select tandem.resolve_all('{table}', 'local', 'in bulk')"));
        let resolved = started.elapsed();
        pair.sync();
        println!(
            "10,000 conflicts: met in {met:.1?}, resolved in {resolved:.1?}, on the peer after {:.1?}",
            started.elapsed()
        );
        assert_eq!(count, 10_000);
        assert!(resolved.as_secs() < 60, "{resolved:?}");
        let left = format!("select count(*) from {table} where a <> 'from {}'", order[0].name);
        pair.assert_rows(&left, &["0"]);
        pair.assert_rows(
            &format!("select status, note, count(*) from tandem.conflicts where table_name = '{table}' group by 1, 2"),
            &["resolved|in bulk|10000"],
        );
        pair.assert_converged(&table);
    }
}

#[test]
fn s48_a_filter_chooses_what_is_decided() {
    let pair = shared();
    pair.table("s48_filter", "id int primary key, a text, b text");
    lost_updates(&pair, "s48_filter", [&pair.a, &pair.b], "1, 2");
    pair.partition();
    for node in pair.nodes() {
        node.exec(&format!("insert into s48_filter values (3, 'from {}', 'new')", node.name));
        tick();
    }
    pair.heal();
    let between = pair.a.one("select clock_timestamp()");
    tick();
    pair.partition();
    for node in pair.nodes() {
        node.exec(&format!("update s48_filter set a = 'again {0}', b = 'again {0}' where id = 2", node.name));
        tick();
    }
    pair.heal();
    make_open(&pair, "s48_filter");
    let resolve = |filter: &str| pair.a.number(&format!("select tandem.resolve_all('s48_filter', 'local'{filter})"));
    assert_eq!(resolve(", conflict_type => 'delete_missing'"), 0);
    assert_eq!(resolve(", columns => '{b}'"), 0, "none lost nothing but b");
    assert_eq!(resolve(", conflict_type => 'insert_exists'"), 1);
    assert_eq!(pair.a.one("select a from s48_filter where id = 3"), "from a");
    assert_eq!(resolve(&format!(", columns => '{{a}}', detected_after => '{between}'")), 0, "the later one lost b too");
    assert_eq!(resolve(&format!(", columns => '{{a,b}}', detected_after => '{between}'")), 1);
    assert_eq!(pair.a.one("select a, b from s48_filter where id = 2"), "again a");
    assert_eq!(resolve(&format!(", detected_before => '{between}'")), 1, "the row of the other has changed since");
    assert_eq!(pair.a.one("select a from s48_filter where id = 1"), "from a");
    pair.sync();
    pair.assert_rows("select key_tuple->>'id' from tandem.open_conflicts where table_name = 's48_filter'", &["2"]);
    for (filter, sqlstate) in [("conflict_type => 'nonsense'", "22023"), ("columns => '{nonesuch}'", "42703")] {
        let failure = pair.a.fails(&format!("select tandem.resolve_all('s48_filter', 'local', {filter})"));
        assert_eq!(failure.sqlstate, sqlstate, "{failure}");
        assert!(!failure.hint.is_empty(), "{failure}");
    }
    pair.assert_converged("s48_filter");
}

#[test]
fn s105_a_late_detection_does_not_open_again_what_was_decided() {
    let pair = shared();
    for (turn, [early, late]) in orders(&pair).into_iter().enumerate() {
        let table = format!("s105_{turn}");
        pair.table(&table, "id int primary key, a text, b text");
        pair.a.exec(&format!("insert into {table} values (1, 'base', 'b')"));
        pair.sync();
        pair.partition();
        for node in [early, late] {
            node.exec(&format!("update {table} set a = 'from {}'", node.name));
            tick();
        }
        // Only the late node's changes pass: the early one meets the conflict alone, and decides it.
        late.line.heal();
        early.wait_rows(&format!("select count(*) from tandem.conflicts where table_name = '{table}'"), &["1"]);
        assert_eq!(late.one(&format!("select count(*) from tandem.conflicts where table_name = '{table}'")), "0");
        early.exec(&format!("select tandem.resolve('{}', 'local', note => 'early')", id_of(early, &table, 1)));
        pair.heal();
        pair.assert_rows(&format!("select a from {table}"), &[&format!("from {}", early.name)]);
        pair.assert_rows(
            &format!("select status, note from tandem.conflicts where table_name = '{table}'"),
            &["resolved|early"],
        );
        pair.assert_conflicts(&table, &[conflict("update_origin_differs").status("resolved")]);
        pair.assert_converged(&table);
    }
}
