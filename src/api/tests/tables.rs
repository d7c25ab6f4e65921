//! Taking tables in and letting them go.
#[pgrx::pg_schema]
mod tests {
    use crate::api::tests::*;

    const LEFTOVERS: &str = "select (select count(*) from pg_attribute where attrelid = 'visited'::regclass
            and attname in ('_hlc', '_cells')) + (select count(*) from pg_trigger where tgrelid = 'visited'::regclass)
        + (select count(*) from tandem.synced_table where relid = 'visited'::regclass)
        + (select count(*) from tandem.tombstone where relid = 'visited'::regclass::oid)";

    #[pg_test]
    fn a_removed_table_is_clean() {
        ready();
        run("create table visited (id int primary key, a text); insert into visited values (1, 'x')");
        run("select tandem.add_table('visited')");
        assert_eq!(value::<i64>(LEFTOVERS), 2 + 4 + 1);
        assert_eq!(
            value::<i64>("select count(*) from pg_trigger where tgrelid = 'visited'::regclass and tgenabled = 'A'"),
            4
        );
        assert_eq!(value::<i64>("select count(*) from visited where _hlc = '0' and _cells is null"), 1);
        run("update visited set a = 'y'; insert into visited values (2, 'z'); delete from visited where id = 1");
        run("select tandem.remove_table('visited')");
        assert_eq!(value::<i64>(LEFTOVERS), 0);
        assert_eq!(value::<String>("select string_agg(id || a, ',') from visited"), "2z");
        run("insert into visited values (3, 'free')");
    }

    #[pg_test]
    fn the_digest_does_not_depend_on_order_or_settings() {
        ready();
        run("create table first (id int primary key, a timestamptz, b float8, c bytea, d interval)");
        run("create table second (d interval, c bytea, b float8, id int primary key, a timestamptz)");
        run("insert into first select i, timestamptz '2026-01-01Z' + i * interval '1 s', i / 3.0, decode(md5(i::text), 'hex'),
             i * interval '1 day 2 seconds' from generate_series(1, 100) i");
        run("insert into second select d, c, b, id, a from first order by id desc");
        run("select tandem.add_table('first')");
        run("set local datestyle = 'German'; set local timezone = 'Asia/Tokyo'; set local bytea_output = 'escape';
             set local extra_float_digits = -10; set local intervalstyle = 'iso_8601'");
        run("select tandem.add_table('second')");
        let distinct = "select count(distinct (initial_rows, initial_digest)) from tandem.synced_table
                        where relid in ('first'::regclass, 'second'::regclass) and initial_rows = 100";
        assert_eq!(value::<i64>(distinct), 1);
        run("create table third (like first including all)");
        run("alter table third drop column _hlc, drop column _cells; insert into third (id) values (1)");
        run("select tandem.add_table('third')");
        assert_eq!(value::<i64>(&distinct.replace("'second'", "'third'").replace("and initial_rows = 100", "")), 2);
    }

    #[pg_test]
    fn a_table_with_hundreds_of_columns_can_be_added() {
        ready();
        let columns: Vec<String> = (0..300).map(|i| format!("\"Column {i}\" int default {i}")).collect();
        run(&format!("create table wide (id int primary key, {})", columns.join(", ")));
        run("insert into wide values (1); select tandem.add_table('wide', 'row')");
        assert_eq!(value::<i64>("select initial_rows from tandem.tables where relation = 'wide'::regclass"), 1);
    }

    #[pg_test]
    fn all_tables_of_a_schema_are_added() {
        ready();
        run("create schema \"The Shop\"; set local search_path = \"The Shop\"");
        run("create table goods (id int primary key); create table \"Odd Name\" (id uuid primary key);
             create table log (line text); create view v as select 1 as one");
        assert_eq!(value::<i64>("select count(*) from tandem.add_tables_in_schema('The Shop')"), 2);
        assert_eq!(value::<i64>("select count(*) from tandem.add_tables_in_schema('The Shop')"), 0);
        assert_eq!(value::<String>("select string_agg(relation::text || ' ' || state, ', ' order by relation::text collate \"C\") from tandem.tables
                    where relation::oid in (select oid from pg_class where relnamespace = '\"The Shop\"'::regnamespace)"),
            "\"Odd Name\" missing_on_peer, goods missing_on_peer");
    }

    #[pg_test]
    fn a_dropped_table_is_forgotten() {
        ready();
        run("create table gone (id int primary key); select tandem.add_table('gone')");
        run("insert into gone values (1); delete from gone; drop table gone");
        assert_eq!(
            value::<i64>(
                "select count(*) from tandem.synced_table s where not exists (select from pg_class where oid = relid)"
            ),
            0
        );
    }

    #[pg_test]
    fn a_change_of_nothing_makes_no_version() {
        ready();
        run(
            "create table calm (id int primary key, a int, b text); select tandem.add_table('calm'); insert into calm values (1, 1, 'x')",
        );
        let before: i64 = value("select _hlc::int8 from calm");
        run("update calm set a = a, b = 'x'");
        assert_eq!(value::<i64>("select _hlc::int8 from calm"), before);
        run("update calm set _hlc = '0', _cells = null");
        assert_eq!(value::<i64>("select _hlc::int8 from calm"), before);
        run("update calm set a = 2");
        assert!(value::<i64>("select _hlc::int8 from calm") > before);
    }

    #[pg_test]
    fn check_names_what_is_wrong() {
        ready();
        run("create table parent_aside (id int primary key);
             create table child_in (id int primary key, parent int references parent_aside); create table no_key_here (a int)");
        run("select tandem.add_table('child_in')");
        let found = |item: &str, detail: &str| {
            let query = format!(
                "select count(*) from tandem.check() where level <> 'ok' and item like '{item}' and detail like '{detail}'"
            );
            value::<i64>(&query)
        };
        assert_eq!(found("table public.no_key_here", "%no usable key%"), 1);
        assert_eq!(found("foreign key%", "%child_in refers to table public.parent_aside%"), 1);
        assert_eq!(found("foreign key%", "%child_in has no index%"), 1);
        run("create index on child_in (parent); select tandem.add_table('parent_aside')");
        assert_eq!(found("foreign key%", "%child_in%"), 0);
        run("alter table child_in disable trigger \"!tandem_capture\"");
        assert_eq!(found("table public.child_in", "%disabled%"), 1);
        assert_eq!(
            value::<i64>(
                "select count(*) from tandem.check() where item = 'shared_preload_libraries' and level = 'ok'"
            ),
            1
        );
        assert_eq!(
            value::<i64>(
                "select count(*) from tandem.check() where level not in ('ok', 'warning', 'error') or detail is null"
            ),
            0
        );
    }
}
