//! Scenarios 49 and 50: how long the history is kept, who sees it, who is told.

use tandem_pg_test::{Node, Pair, shared, tick, until};

/// A lost update of `a` in row `id`, met by both nodes.
fn lost_update(pair: &Pair, table: &str, id: u32) -> String {
    pair.a.exec(&format!("insert into {table} values ({id}, 'base')"));
    pair.sync();
    pair.partition();
    for node in pair.nodes() {
        node.exec(&format!("update {table} set a = 'secret of {}' where id = {id}", node.name));
        tick();
    }
    pair.heal();
    pair.a.one(&format!(
        "select conflict_id from tandem.conflicts where table_name = '{table}' and key_tuple->>'id' = '{id}'"
    ))
}

fn make_open(pair: &Pair, id: &str) {
    pair.exec(&format!(
        "update tandem.conflict set status = 'open',
             record = replace(record::text, '\"status\":\"auto\"', '\"status\":\"open\"')::json where conflict_id = '{id}'"
    ));
}

fn retention(pair: &Pair, value: &str) {
    pair.exec(&format!("alter system set tandem.conflict_retention = '{value}'"));
    pair.exec("select pg_reload_conf()");
}

fn count(node: &Node, id: &str) -> i64 {
    node.number(&format!("select count(*) from tandem.conflicts where conflict_id = '{id}'"))
}

#[test]
fn s49_retention_removes_closed_conflicts_and_no_open_ones() {
    let pair = Pair::new();
    pair.table("s49", "id int primary key, a text");
    let (closed, open) = (lost_update(&pair, "s49", 1), lost_update(&pair, "s49", 2));
    make_open(&pair, &open);
    retention(&pair, "2s");
    let left = "select conflict_id, status from tandem.conflicts";
    for node in pair.nodes() {
        node.wait_rows(left, &[&format!("{open}|open")]);
        assert_eq!(count(node, &closed), 0);
    }
    let counted =
        "select confl_update_origin_differs, conflicts, open from tandem.stat_conflicts where table_name = 's49'";
    pair.assert_rows(counted, &["2|2|1"]);
    pair.b.exec(&format!("select tandem.resolve('{open}', 'remote', note => 'decided')"));
    pair.sync();
    pair.assert_rows("select a from s49 where id = 2", &["secret of a"]);
    for node in pair.nodes() {
        node.wait_rows(left, &[]);
        node.wait_rows("select count(*) from tandem.conflict_removed where decision->>'note' = 'decided'", &["1"]);
        // The last of a part goes with its pages.
        let size = "select max(pg_relation_size(relid)) from pg_partition_tree('tandem.conflict')";
        node.wait_rows(size, &["0"]);
    }
    pair.assert_rows(counted, &["2|2|0"]);
    retention(&pair, "90d");
    lost_update(&pair, "s49", 3);
    pair.assert_rows(counted, &["3|3|0"]);
}

#[test]
fn s49_a_decision_is_not_removed_before_the_peer_has_it() {
    let pair = Pair::new();
    pair.table("s49_away", "id int primary key, a text");
    pair.a.exec("insert into s49_away values (1, 'base')");
    pair.sync();
    pair.partition();
    for node in pair.nodes() {
        node.exec(&format!("update s49_away set a = 'from {}'", node.name));
        tick();
    }
    // A gets B's change and meets the conflict; B does not hear of it yet.
    pair.b.line.heal();
    pair.a.wait_rows("select count(*) from tandem.conflicts", &["1"]);
    let id = pair.a.one("select conflict_id from tandem.conflicts");
    make_open(&pair, &id);
    pair.a.exec(&format!("select tandem.resolve('{id}', 'local', note => 'early')"));
    // What is removed is remembered for as long again: long enough to be looked at on both.
    retention(&pair, "10s");
    pair.a.wait_rows("select changed_at < now() - interval '12s' from tandem.conflict", &["t"]);
    assert_eq!(count(&pair.a, &id), 1, "B may still tell of it");
    pair.heal();
    for node in pair.nodes() {
        node.wait_rows("select decision->>'note' from tandem.conflict_removed", &["early"]);
        assert_eq!(node.one("select count(*) from tandem.conflicts"), "0");
    }
    pair.assert_rows("select a from s49_away", &["from a"]);
    pair.assert_converged("s49_away");
}

#[test]
fn s50_an_owner_sees_the_conflicts_of_own_tables_and_no_others() {
    let pair = shared();
    pair.exec("create role s50_owner login; create role s50_stranger login");
    for table in ["s50_own", "s50_other"] {
        pair.table(table, "id int primary key, a text");
        lost_update(&pair, table, 1);
    }
    pair.exec("alter table s50_own owner to s50_owner");
    pair.wait_active("s50_own");
    for node in pair.nodes() {
        let mut session = node.session();
        for (role, seen) in [("s50_owner", "s50_own"), ("s50_stranger", "")] {
            session.exec(&format!("set role {role}"));
            for view in ["conflicts", "stat_conflicts"] {
                let names =
                    session.one(&format!("select coalesce(string_agg(table_name, ','), '') from tandem.{view}"));
                assert_eq!(names, seen, "{role} in {view} on {}", node.name);
            }
            let hidden = ["conflict", "conflict_0", "conflict_11", "conflict_count", "conflict_removed"];
            for table in hidden {
                assert_eq!(
                    session.fails(&format!("select * from tandem.{table}")).sqlstate,
                    "42501",
                    "{role}: {table}"
                );
            }
            // No function of the caller's own sees rows that the view hides.
            let leaked = "do $$ begin
                create function pg_temp.leak(text) returns bool language plpgsql cost 0.0001 as
                    'begin if $1 = ''s50_other'' then raise ''leaked''; end if; return true; end'; end $$;
                select count(*) from tandem.conflicts where pg_temp.leak(table_name)";
            session.exec(leaked);
            session.exec("drop function pg_temp.leak(text); reset role");
        }
        let other = node.one("select conflict_id from tandem.conflicts where table_name = 's50_other'");
        session.exec("set role s50_owner");
        for call in [
            format!("resolve('{other}', 'local')"),
            format!("ignore('{other}')"),
            format!("show_conflict('{other}')"),
            "resolve_all('s50_other', 'local')".to_string(),
        ] {
            assert_eq!(session.fails(&format!("select tandem.{call}")).sqlstate, "42501", "{call}");
        }
        session.exec("select tandem.resolve_all('s50_own', 'local')");
    }
    let mut session = pair.b.session();
    session.exec("set role s50_owner");
    session.exec("select tandem.resolve(conflict_id, 'remote') from tandem.conflicts");
    pair.sync();
    pair.assert_rows("select a from s50_own", &["secret of a"]);
}

#[test]
fn the_log_tells_of_conflicts_in_postgres_own_form_without_values() {
    let pair = Pair::new();
    pair.table("logged", "id int primary key, a text");
    let id = lost_update(&pair, "logged", 77);
    for node in pair.nodes() {
        let log = until("the conflict to be logged", || {
            let log = node.cluster.log();
            let found = log.contains("conflict detected on relation \"public.logged\": conflict=update_origin_differs");
            if found { Ok(log) } else { Err("not there") }
        });
        let log: Vec<&str> = log.lines().skip_while(|line| !line.contains("conflict detected")).collect();
        assert!(log[1].contains("DETAIL:  Updating the row that was modified locally at"), "{log:?}");
        assert!(log[2].contains(&format!("conflict_id={id}")), "{log:?}");
        let values = log.iter().take(3).any(|line| line.contains("secret") || line.contains("(77)"));
        assert!(!values, "values in the log: {log:?}");
    }
    pair.exec("alter system set tandem.log_conflicts = 'key'");
    pair.exec("select pg_reload_conf()");
    pair.a.exec("insert into logged select i, 'base' from generate_series(1000, 1999) i");
    pair.sync();
    pair.partition();
    pair.exec("update logged set a = 'secret ' || id || ' ' || current_setting('port') where id >= 1000");
    pair.heal();
    for node in pair.nodes() {
        let log = until("the storm to be summed up", || {
            let log = node.cluster.log();
            if log.contains("more conflicts were detected") { Ok(log) } else { Err("not there") }
        });
        let lines = log.lines().filter(|line| line.contains("conflict detected on")).count();
        assert!((2..=100).contains(&lines), "{lines} lines on {}", node.name);
        assert!(log.contains("replica identity (id)=(1000)."), "the key, as asked for, on {}", node.name);
        assert_eq!(node.number("select count(*) from tandem.conflicts where table_name = 'logged'"), 1001);
    }
}
