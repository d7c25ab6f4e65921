//! Deciding conflicts, on records made by hand.
use super::*;
use std::collections::BTreeMap;
use tandem_model::hlc::{Hlc, NodeId};
use tandem_model::record::{ConflictType, Decision, Image, Record, Status};

/// A conflict about column `a` of a row that need not be there.
pub fn met(table: &str, key: i32, status: Status) -> Record {
    let winning = crate::clock::tick();
    let losing = Hlc::from_parts(winning.unix_millis() - 1, winning.counter(), NodeId(2)).expect("a time of today");
    let key = raw(&format!("{{\"id\":{key}}}"));
    Record {
        conflict_id: Record::id("public", table, key.get(), losing),
        schema: "public".to_string(),
        table: table.to_string(),
        key,
        conflict_type: ConflictType::UpdateOriginDiffers,
        constraint_name: None,
        rival: None,
        overruled: BTreeMap::new(),
        losing,
        winning,
        cells: vec!["a".to_string()],
        lost: BTreeMap::new(),
        replaced: BTreeMap::new(),
        base: None,
        tuples: BTreeMap::new(),
        result: None,
        policy: "last_update_wins".to_string(),
        detected_at: crate::clock::wall_ms() * 1000,
        decision: Decision { version: Hlc(0), status, by: None, at: None, resolution: None, note: None },
    }
}

/// A conflict on `table` with key `{"id":1}` that the peer (node 2) has lost, recorded as if just met.
/// Images are (base, local, remote, result).
fn record(
    table: &str,
    conflict_type: ConflictType,
    cells: &[&str],
    status: Status,
    images: [Option<&str>; 4],
) -> String {
    let met = met(table, 1, status);
    let winning = met.winning;
    let image = |text: &str| Image { rank: (1, winning), tuple: raw(text) };
    let [base, local, remote, result] = images.map(|text| text.map(image));
    let tuples: BTreeMap<u8, Image> =
        [(1, local), (2, remote)].into_iter().filter_map(|(n, i)| Some((n, i?))).collect();
    let cells = cells.iter().map(|c| c.to_string()).collect();
    let record = Record { conflict_type, cells, base, tuples, result, ..met };
    store(&record);
    record.conflict_id.to_string()
}

fn raw(text: &str) -> Box<serde_json::value::RawValue> {
    serde_json::value::RawValue::from_string(text.to_string()).expect(text)
}

pub fn store(record: &Record) {
    assert!(crate::apply::history::upsert(record.clone()).expect("the record is stored"), "it is new");
}

const BASE: &str = "{\"id\":1,\"a\":10,\"b\":\"base\"}";
const LOCAL: &str = "{\"id\":1,\"a\":20,\"b\":\"base\"}";
const REMOTE: &str = "{\"id\":1,\"a\":30,\"b\":\"base\"}";

/// A table whose row holds what the conflict left: the local value of `a`; the remote one was lost.
fn update_conflict(table: &str, status: Status) -> String {
    ready();
    run(&format!(
        "create table public.{table} (id int primary key, a int, b text); select tandem.add_table('public.{table}')"
    ));
    run(&format!("insert into public.{table} values (1, 20, 'base')"));
    record(
        table,
        ConflictType::UpdateOriginDiffers,
        &["a"],
        status,
        [Some(BASE), Some(LOCAL), Some(REMOTE), Some(LOCAL)],
    )
}

fn row(table: &str) -> String {
    value(&format!("select coalesce((select format('%s %s', a, b) from public.{table} where id = 1), 'none')"))
}

#[pgrx::pg_schema]
mod tests {
    use super::*;

    #[pg_test]
    fn resolve_writes_the_chosen_side() {
        for (i, (side, expected)) in [
            ("remote", "30 base"),
            ("base", "10 base"),
            ("local", "20 base"),
            ("result", "20 base"),
            ("tokyo", "20 base"),
        ]
        .into_iter()
        .enumerate()
        {
            let table = format!("side_{i}");
            let id = update_conflict(&table, Status::Open);
            let before: i64 = value(&format!("select _hlc::int8 from public.{table}"));
            run(&format!("select tandem.resolve('{id}', '{side}', note => 'asked the branch')"));
            assert_eq!(row(&table), expected, "{side}");
            let after: i64 = value(&format!("select _hlc::int8 from public.{table}"));
            assert!(after > before, "a decision is a write also where it leaves the row as it is: {side}");
            let decided: i64 =
                value(&format!("select decision_version::int8 from tandem.conflict where conflict_id = '{id}'"));
            assert_eq!(decided, after, "the record follows the same order as the row: {side}");
            let closed = format!(
                "select status || ' ' || resolved_by || ' ' || note from tandem.conflicts
                 where conflict_id = '{id}' and resolved_at is not null and conflict_resolution is not null"
            );
            assert_eq!(value::<String>(&closed), "resolved postgres asked the branch");
        }
    }

    #[pg_test]
    fn resolve_sets_given_columns() {
        let id = update_conflict("given", Status::Auto);
        refused("42703", &format!("select tandem.resolve('{id}', with_tuple => '{{\"c\": 1}}')"));
        refused("42703", &format!("select tandem.resolve('{id}', with_tuple => '{{\"_hlc\": \"0\"}}')"));
        refused("22023", &format!("select tandem.resolve('{id}', with_tuple => '[1]')"));
        refused("22023", &format!("select tandem.resolve('{id}', 'sideways')"));
        refused("22023", &format!("select tandem.resolve('{id}')"));
        refused("22023", &format!("select tandem.resolve('{id}', 'keep_both', with_tuple => '{{\"id\": 2}}')"));
        assert_eq!(
            refusal(&format!("select tandem.resolve('{id}', with_tuple => '{{\"a\": \"x\"}}')")).sqlstate,
            "22P02"
        );
        run(&format!("select tandem.resolve('{id}', 'remote', with_tuple => '{{\"b\": \"both\"}}')"));
        assert_eq!(row("given"), "30 both");
        refused("42704", "select tandem.resolve('00000000-0000-0000-0000-000000000000', 'local')");
    }

    #[pg_test]
    fn a_closed_conflict_stays_closed_unless_forced() {
        let id = update_conflict("closed", Status::Open);
        run(&format!("select tandem.ignore('{id}', 'not worth it')"));
        assert_eq!(row("closed"), "20 base");
        let refusal = refused("55000", &format!("select tandem.resolve('{id}', 'remote')"));
        assert!(refusal.message.contains("already ignored by postgres"), "{refusal:?}");
        refused("55000", &format!("select tandem.ignore('{id}')"));
        run(&format!("select tandem.resolve('{id}', 'remote', force => true)"));
        assert_eq!(row("closed"), "30 base");
    }

    #[pg_test]
    fn a_row_that_changed_since_is_not_overwritten() {
        let id = update_conflict("moving", Status::Open);
        run("update public.moving set b = 'another cell'");
        run(&format!("select tandem.resolve('{id}', 'remote')"));
        assert_eq!(row("moving"), "30 another cell", "another cell's change is no obstacle");

        let id = update_conflict("moved", Status::Open);
        run("update public.moved set a = 77");
        let refusal = refused("55000", &format!("select tandem.resolve('{id}', 'remote')"));
        assert!(refusal.detail.contains("\"a\": 77") && refusal.hint.contains("force => true"), "{refusal:?}");
        assert_eq!(value::<String>(&format!("select status from tandem.conflicts where conflict_id = '{id}'")), "open");
        run(&format!("select tandem.resolve('{id}', 'remote', force => true)"));
        assert_eq!(row("moved"), "30 base");

        let id = update_conflict("removed", Status::Open);
        run("delete from public.removed");
        let refusal = refused("55000", &format!("select tandem.resolve('{id}', 'remote')"));
        assert_eq!(refusal.detail, "The row is gone.");
        run(&format!("select tandem.resolve('{id}', 'remote', force => true)"));
        assert_eq!(row("removed"), "30 base", "the row is born again from its image");
    }

    #[pg_test]
    fn a_lost_delete_can_be_made_good() {
        update_conflict("undead", Status::Auto);
        let id = record(
            "undead",
            ConflictType::UpdateDeleted,
            &[],
            Status::Auto,
            [Some(BASE), Some(LOCAL), None, Some(LOCAL)],
        );
        run(&format!("select tandem.resolve('{id}', 'remote')"));
        assert_eq!(row("undead"), "none");
        let id = record("undead", ConflictType::DeleteMissing, &[], Status::Auto, [None, None, None, None]);
        refused("55000", &format!("select tandem.resolve('{id}', 'base')"));
        refused("55000", &format!("select tandem.resolve('{id}', with_tuple => '{{\"a\": 1}}')"));
    }

    #[pg_test]
    fn both_rows_of_an_insert_conflict_can_be_kept() {
        update_conflict("doubled", Status::Auto);
        let id = record(
            "doubled",
            ConflictType::InsertExists,
            &[],
            Status::Auto,
            [None, Some(LOCAL), Some(REMOTE), Some(LOCAL)],
        );
        refused("22023", &format!("select tandem.resolve('{id}', 'keep_both')"));
        assert_eq!(
            refusal(&format!("select tandem.resolve('{id}', 'keep_both', with_tuple => '{{\"b\": \"x\"}}')")).sqlstate,
            "23505"
        );
        run(&format!("select tandem.resolve('{id}', 'keep_both', with_tuple => '{{\"id\": 18}}')"));
        assert_eq!(
            value::<String>("select string_agg(format('%s:%s', id, a), ' ' order by id) from public.doubled"),
            "1:20 18:30"
        );
    }

    #[pg_test]
    fn resolve_all_leaves_changed_rows_open() {
        update_conflict("many", Status::Open);
        record(
            "many",
            ConflictType::UpdateOriginDiffers,
            &["b"],
            Status::Open,
            [Some(BASE), Some(LOCAL), Some("{\"id\":1,\"a\":20,\"b\":\"lost\"}"), Some(LOCAL)],
        );
        assert_eq!(value::<i64>("select open_conflicts from tandem.tables where relation = 'many'::regclass"), 2);
        run("update public.many set a = 99");
        assert_eq!(value::<i64>("select tandem.resolve_all('many', 'remote')"), 1);
        assert_eq!(row("many"), "99 lost");
        assert_eq!(value::<i64>("select count(*) from tandem.open_conflicts where relation = 'many'::regclass"), 1);
    }

    #[pg_test]
    fn resolve_works_with_deferred_constraints_and_odd_names() {
        ready();
        run("create schema \"My Shop\"");
        run("create table public.parent_row (id int primary key);
             create table public.deferred (id int generated always as identity primary key,
                 \"A\" int references public.parent_row deferrable initially deferred, g int generated always as (id * 2) stored)");
        run("insert into public.parent_row values (1), (2); select tandem.add_table('public.deferred')");
        run("insert into public.deferred (\"A\") values (1)");
        let id = record(
            "deferred",
            ConflictType::UpdateOriginDiffers,
            &["A"],
            Status::Open,
            [None, Some("{\"id\":1,\"A\":1}"), Some("{\"id\":1,\"A\":2}"), Some("{\"id\":1,\"A\":1}")],
        );
        run(&format!("select tandem.resolve('{id}', 'remote')"));
        assert_eq!(value::<i32>("select \"A\" from public.deferred"), 2);
        let id = record(
            "deferred",
            ConflictType::UpdateOriginDiffers,
            &["A"],
            Status::Open,
            [None, Some("{\"id\":1,\"A\":1}"), Some("{\"id\":1,\"A\":7}"), Some("{\"id\":1,\"A\":2}")],
        );
        assert_eq!(refusal(&format!("select tandem.resolve('{id}', 'remote')")).sqlstate, "23503");
    }

    #[pg_test]
    fn a_conflict_reads_well() {
        let id = update_conflict("shown", Status::Open);
        let text: String = value(&format!("select string_agg(l, E'\\n') from tandem.show_conflict('{id}') l"));
        for part in [
            "what      update_origin_differs on public.shown",
            "key       {\"id\":1}",
            "kept      tokyo (local) updated at 20",
            "lost      node 2 (remote) updated at 20",
            ": column a",
            "status    open",
            "> a",
            "* 20",
            "* 30",
            "local (tokyo)",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let long = format!("{{\"id\":1,\"a\":30,\"b\":\"{}\"}}", "長い値 ".repeat(60));
        let id = record(
            "shown",
            ConflictType::UpdateOriginDiffers,
            &["b"],
            Status::Open,
            [None, Some(LOCAL), Some(&long), Some(LOCAL)],
        );
        let widest: i32 = value(&format!("select max(length(l)) from tandem.show_conflict('{id}') l"));
        assert!(widest <= 98, "{widest}");
    }

    #[pg_test]
    fn long_values_are_shown_once_and_where_they_differ() {
        update_conflict("wordy", Status::Open);
        let tuple = |end: &str| format!("{{\"id\":1,\"a\":10,\"b\":\"{}{end}\"}}", "the same beginning ".repeat(30));
        let (base, local, remote) = (tuple("of both"), tuple("of mine"), tuple("of theirs"));
        let id = record(
            "wordy",
            ConflictType::UpdateOriginDiffers,
            &["b"],
            Status::Open,
            [Some(&base), Some(&local), Some(&remote), Some(&local)],
        );
        let text: String = value(&format!("select string_agg(l, E'\\n') from tandem.show_conflict('{id}') l"));
        for part in ["of mine", "of theirs", "(as local)", "* \u{2026}"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(text.matches("of mine").count(), 1, "{text}");
        assert!(text.lines().count() < 25, "{text}");
    }

    #[pg_test]
    fn a_row_that_row_level_security_hides_from_its_owner_is_decided_all_the_same() {
        let id = update_conflict("hidden", Status::Open);
        run("create role tenant; alter table public.hidden owner to tenant;
             alter table public.hidden enable row level security; alter table public.hidden force row level security;
             create policy nobody on public.hidden using (false)");
        run("set local role tenant");
        assert_eq!(value::<i64>("select count(*) from public.hidden"), 0, "hidden");
        run(&format!("select tandem.resolve('{id}', 'remote')"));
        assert_eq!(value::<i64>("select count(*) from public.hidden"), 0, "and still so for everything else");
        run("reset role");
        assert_eq!(row("hidden"), "30 base");
    }

    #[pg_test]
    fn the_history_follows_columns_that_got_another_name() {
        let id = update_conflict("renamed", Status::Open);
        run("alter table public.renamed rename a to amount; alter table public.renamed add c int default 5");
        run(&format!("select tandem.resolve('{id}', 'remote')"));
        assert_eq!(value::<String>("select format('%s %s %s', amount, b, c) from public.renamed"), "30 base 5");

        let id = update_conflict("dropped", Status::Open);
        run("alter table public.dropped drop a");
        let refusal = refused("55000", &format!("select tandem.resolve('{id}', 'remote')"));
        assert!(refusal.message.contains("column \"a\""), "{refusal:?}");
        run(&format!("select tandem.ignore('{id}')"));

        // Another column of the old name is another column.
        let id = update_conflict("replaced", Status::Open);
        run("alter table public.replaced drop a; alter table public.replaced add a int default 7");
        refused("55000", &format!("select tandem.resolve('{id}', 'remote')"));
        assert_eq!(value::<i32>("select a from public.replaced"), 7);
    }

    #[pg_test]
    fn what_was_decided_and_removed_does_not_come_back_open() {
        let id = update_conflict("forgotten", Status::Open);
        let text: String = value(&format!("select record::text from tandem.conflict where conflict_id = '{id}'"));
        let told: Record = serde_json::from_str(&text).expect("a record");
        run(&format!("select tandem.resolve('{id}', 'remote', note => 'decided')"));
        run(&format!(
            "with gone as (delete from tandem.conflict where conflict_id = '{id}' returning *)
             insert into tandem.conflict_removed (conflict_id, decision) select conflict_id, record -> 'decision' from gone"
        ));
        run("insert into tandem.conflict_count values ('public', 'forgotten', 'update_origin_differs', 1, now())");
        store(&told);
        let status = format!("select status || ' ' || note from tandem.conflicts where conflict_id = '{id}'");
        assert_eq!(value::<String>(&status), "resolved decided");
        let counted = "select conflicts from tandem.stat_conflicts where relation = 'forgotten'::regclass";
        assert_eq!(value::<i64>(counted), 1, "and it counts once");
    }

    #[pg_test]
    fn only_some_of_the_open_conflicts_are_decided_by_a_filter() {
        update_conflict("some", Status::Open);
        let all = "select count(*) from tandem.open_conflicts where relation = 'some'::regclass";
        let resolve =
            |filter: &str| value::<i64>(&format!("select tandem.resolve_all('some', 'remote', null, {filter})"));
        assert_eq!(resolve("'insert_exists'"), 0);
        assert_eq!(resolve("detected_after => now() + interval '1 hour'"), 0);
        assert_eq!(resolve("detected_before => '-infinity'"), 0);
        assert_eq!(resolve("columns => '{b}'"), 0);
        assert_eq!(value::<i64>(all), 1);
        refused("22023", "select tandem.resolve_all('some', 'remote', conflict_type => 'nonsense')");
        refused("42703", "select tandem.resolve_all('some', 'remote', columns => '{nonesuch}')");
        assert_eq!(resolve("'update_origin_differs', now() - interval '1 hour', 'infinity', '{b,a}'"), 1);
        assert_eq!(value::<i64>(all), 0);
        assert_eq!(row("some"), "30 base");
    }

    #[pg_test]
    fn conflicts_are_counted_by_type() {
        update_conflict("counted", Status::Open);
        record(
            "counted",
            ConflictType::InsertExists,
            &[],
            Status::Auto,
            [None, Some(LOCAL), Some(REMOTE), Some(LOCAL)],
        );
        let counts = "select format('%s %s %s %s', confl_update_origin_differs, confl_insert_exists, conflicts, open)
                      from tandem.stat_conflicts where relation = 'counted'::regclass";
        assert_eq!(value::<String>(counts), "1 1 2 1");
        let sides = "select format('%s %s %s %s', local_node, remote_node, losing_node, local_tuple->>'a') from tandem.conflicts
                     where relation = 'counted'::regclass and status = 'open'";
        assert_eq!(value::<String>(sides), "1 2 2 20");
    }

    #[pg_test]
    fn owners_see_and_decide_their_tables_only() {
        let id = update_conflict("owned", Status::Open);
        update_conflict("foreign_to_them", Status::Open);
        run("create role shopkeeper; alter table public.owned owner to shopkeeper; create role auditor in role tandem_reader;
             create role dba in role tandem_admin; create role stranger; create role shop_group; grant shopkeeper to shop_group");
        let seen = |role: &str| {
            run(&format!("set local role {role}"));
            let count: i64 = value("select count(*) from tandem.conflicts");
            run("reset role");
            count
        };
        assert_eq!(seen("shopkeeper"), 1);
        assert_eq!(seen("shop_group"), 1);
        assert_eq!(seen("stranger"), 0);
        assert!(seen("auditor") >= 2 && seen("dba") >= 2);
        run("set local role stranger");
        for statement in [
            format!("select tandem.resolve('{id}', 'remote')"),
            format!("select tandem.show_conflict('{id}')"),
            format!("select tandem.ignore('{id}')"),
        ] {
            refused("42501", &statement);
        }
        run("reset role; set local role shopkeeper");
        run(&format!("select tandem.resolve('{id}', 'remote')"));
        run("reset role");
        assert_eq!(row("owned"), "30 base");
        let id: String =
            value("select conflict_id::text from tandem.conflicts where relation = 'foreign_to_them'::regclass");
        run("set local role dba");
        run(&format!("select tandem.resolve('{id}', 'remote')"));
        run("reset role");
        assert_eq!(row("foreign_to_them"), "30 base", "an administrator decides without a grant on the table");
    }
}
