//! Scenarios 46 and 47: a person decides.

use tandem_pg_test::{Pair, shared, tick};

/// A conflict about `a` of row `id`, whose base is 'base', with 'from a' lost to 'from b'.
fn lost_update(pair: &Pair, table: &str, id: u32) -> String {
    pair.a.exec(&format!("insert into {table} values ({id}, 'base', 'b')"));
    pair.sync();
    pair.partition();
    pair.a.exec(&format!("update {table} set a = 'from a' where id = {id}"));
    tick();
    pair.b.exec(&format!("update {table} set a = 'from b' where id = {id}"));
    pair.heal();
    pair.a.one(&format!(
        "select conflict_id from tandem.conflicts where relation::text = '{table}' and key_tuple->>'id' = '{id}'"
    ))
}

/// The record reads the same on both nodes, and is settled.
fn assert_settled(pair: &Pair, id: &str, status: &str) {
    let query = format!(
        "select status, conflict_resolution, resolved_by, resolved_at is not null, note
         from tandem.conflicts where conflict_id = '{id}'"
    );
    let on_a = pair.a.rows(&query);
    assert_eq!(on_a, pair.b.rows(&query));
    let fields: Vec<&str> = on_a[0].split('|').collect();
    assert_eq!(fields[0], status, "{on_a:?}");
    assert!(fields[2].contains("postgres"), "who decided: {on_a:?}");
    assert_eq!(fields[3], "t", "when it was decided: {on_a:?}");
    let open = format!("select count(*) from tandem.open_conflicts where conflict_id = '{id}'");
    pair.assert_rows(&open, &["0"]);
}

#[test]
fn s46_resolving_replicates_the_decision() {
    let pair = shared();
    pair.table("s46", "id int primary key, a text, b text");
    let cases = [
        ("'local'", "from a"),
        ("'remote'", "from b"),
        ("'base'", "base"),
        ("'result'", "from b"),
        ("'a'", "from a"),
        (r#"with_tuple => '{"a": "by hand"}', note => 'asked the branch'"#, "by hand"),
    ];
    for (id, (how, expected)) in (1..).zip(cases) {
        let conflict = lost_update(&pair, "s46", id);
        pair.a.exec(&format!("select tandem.resolve('{conflict}', {how})"));
        pair.sync();
        pair.assert_rows(&format!("select a, b from s46 where id = {id}"), &[&format!("{expected}|b")]);
        pair.assert_converged("s46");
        assert_settled(&pair, &conflict, "resolved");
    }
    assert_eq!(pair.history("s46").len(), cases.len(), "resolving makes no conflicts");
}

#[test]
fn s46_resolving_on_the_other_node_reads_mirrored() {
    let pair = shared();
    pair.table("s46_b", "id int primary key, a text, b text");
    let conflict = lost_update(&pair, "s46_b", 1);
    pair.b.exec(&format!("select tandem.resolve('{conflict}', 'remote')"));
    pair.sync();
    pair.assert_rows("select a from s46_b", &["from a"]);
    assert_settled(&pair, &conflict, "resolved");
    let conflict = lost_update(&pair, "s46_b", 2);
    pair.b.exec(&format!("select tandem.resolve('{conflict}', 'local')"));
    pair.sync();
    pair.assert_rows("select a from s46_b where id = 2", &["from b"]);
    assert_settled(&pair, &conflict, "resolved");
}

#[test]
fn s46_keep_both_lets_the_loser_live_on() {
    let pair = shared();
    pair.table("s46_both", "id int primary key, a text");
    pair.partition();
    pair.a.exec("insert into s46_both values (1, 'from a')");
    tick();
    pair.b.exec("insert into s46_both values (1, 'from b')");
    pair.heal();
    let conflict = pair.a.one("select conflict_id from tandem.conflicts where relation::text = 's46_both'");
    pair.a.exec(&format!(r#"select tandem.resolve('{conflict}', 'keep_both', with_tuple => '{{"id": 18}}')"#));
    pair.sync();
    pair.assert_rows("select id, a from s46_both order by id", &["1|from b", "18|from a"]);
    pair.assert_converged("s46_both");
    assert_settled(&pair, &conflict, "resolved");
}

#[test]
fn s46_a_deleted_row_can_be_brought_back() {
    let pair = shared();
    pair.table("s46_deleted", "id int primary key, a text");
    pair.a.exec("insert into s46_deleted values (1, 'base')");
    pair.sync();
    pair.partition();
    pair.a.exec("update s46_deleted set a = 'from a'");
    tick();
    pair.b.exec("delete from s46_deleted");
    pair.heal();
    pair.assert_rows("select count(*) from s46_deleted", &["0"]);
    let conflict = pair.a.one("select conflict_id from tandem.conflicts where relation::text = 's46_deleted'");
    pair.a.exec(&format!("select tandem.resolve('{conflict}', 'local')"));
    pair.sync();
    pair.assert_rows("select id, a from s46_deleted", &["1|from a"]);
    pair.assert_converged("s46_deleted");
    assert_settled(&pair, &conflict, "resolved");
}

#[test]
fn s46_ignoring_and_resolving_all() {
    let pair = shared();
    pair.table("s46_all", "id int primary key, a text, b text");
    let ignored = lost_update(&pair, "s46_all", 1);
    pair.b.exec(&format!("select tandem.ignore('{ignored}', note => 'no matter')"));
    pair.sync();
    assert_settled(&pair, &ignored, "ignored");
    pair.assert_rows("select a from s46_all where id = 1", &["from b"]);
    let shown = pair.a.rows(&format!("select * from tandem.show_conflict('{ignored}')")).join("\n");
    for part in ["base", "from a", "from b"] {
        assert!(shown.contains(part), "{part:?} is not shown:\n{shown}");
    }
}

#[test]
fn s47_a_row_that_moved_on_is_not_overwritten() {
    let pair = shared();
    pair.table("s47", "id int primary key, a text, b text");
    let conflict = lost_update(&pair, "s47", 1);
    pair.b.exec("update s47 set a = 'moved on'");
    pair.sync();
    let failure = pair.a.fails(&format!("select tandem.resolve('{conflict}', 'local')"));
    assert!(failure.to_string().contains("moved on"), "what it holds now: {failure}");
    assert!(failure.hint.contains("force"), "{failure}");
    assert_ne!(failure.sqlstate, "XX000", "{failure}");
    pair.assert_rows("select a from s47", &["moved on"]);
    pair.a.exec(&format!("select tandem.resolve('{conflict}', 'local', force => true)"));
    pair.sync();
    pair.assert_rows("select a from s47", &["from a"]);
    pair.assert_converged("s47");
    assert_settled(&pair, &conflict, "resolved");
}

#[test]
fn s47_deciding_nonsense_is_refused() {
    let pair = shared();
    pair.table("s47_bad", "id int primary key, a text, b text");
    let conflict = lost_update(&pair, "s47_bad", 1);
    for call in [
        "resolve('00000000-0000-0000-0000-000000000000', 'local')".to_string(),
        format!("resolve('{conflict}', 'sideways')"),
        format!("resolve('{conflict}')"),
        format!(r#"resolve('{conflict}', with_tuple => '{{"nonesuch": 1}}')"#),
        format!("resolve('{conflict}', with_tuple => '[1]')"),
    ] {
        let failure = pair.a.fails(&format!("select tandem.{call}"));
        assert_ne!(failure.sqlstate, "XX000", "{call}: {failure}");
    }
    pair.assert_rows("select a from s47_bad", &["from b"]);
}
