//! Every refusal has its SQLSTATE and says what to do.
#[pgrx::pg_schema]
mod tests {
    use crate::api::tests::*;

    #[pg_test]
    fn create_node_is_for_once() {
        refused("22023", "select tandem.create_node('tokyo', 0)");
        refused("22023", "select tandem.create_node('tokyo', 64)");
        refused("22023", "select tandem.create_node('', 1)");
        refused("22023", &format!("select tandem.create_node('{}', 1)", "x".repeat(64)));
        ready();
        let again = refused("55000", "select tandem.create_node('osaka', 2)");
        assert!(again.message.contains("tokyo (id 1)"), "{again:?}");
    }

    #[pg_test]
    fn add_table_refuses_what_cannot_be_synced() {
        ready();
        run("create schema kinds; set local search_path = kinds, public, tandem");
        run("create table keyless (a int); create table deferrable_key (a int primary key deferrable);
             create table partial_key (a int not null); create unique index on partial_key (a) where a > 0;
             create unlogged table unlogged_table (a int primary key); create temp table temporary_table (a int primary key);
             create view some_view as select 1 as a; create materialized view some_matview as select 1 as a;
             create table partitioned (a int primary key) partition by range (a);
             create table a_partition partition of partitioned default;
             create table parent (a int primary key); create table child () inherits (parent);
             create table copied (a int primary key, _hlc int)");
        for table in ["keyless", "deferrable_key", "partial_key"] {
            refused("55000", &format!("select tandem.add_table('{table}')"));
        }
        for table in [
            "unlogged_table",
            "temporary_table",
            "some_view",
            "some_matview",
            "partitioned",
            "a_partition",
            "parent",
            "child",
            "pg_catalog.pg_class",
            "tandem.node",
        ] {
            refused("0A000", &format!("select tandem.add_table('{table}')"));
        }
        refused("42701", "select tandem.add_table('copied')");
        assert_eq!(refusal("select tandem.add_table('no_such_table')").sqlstate, "42P01");
    }

    #[cfg(feature = "pg18")]
    #[pg_test]
    fn add_table_refuses_temporal_keys() {
        ready();
        run("create table booked (room int4range, during daterange, primary key (room, during without overlaps));
             create table priced (id int primary key, room int4range, during daterange,
                 unique (room, during without overlaps))");
        let keyless = refused("55000", "select tandem.add_table('booked')");
        assert!(keyless.message.contains("no key"), "{keyless:?}");
        run("create table stay (id int primary key, room int4range, during daterange,
                 foreign key (room, period during) references booked (room, period during))");
        for table in ["stay", "booked"] {
            refused("0A000", &format!("select tandem.add_table('{table}')"));
        }
        run("select tandem.add_table('priced')");
    }

    #[pg_test]
    fn add_table_refuses_wrong_cells() {
        ready();
        run("create table layout (id int primary key, a int, b int)");
        refused("22023", "select tandem.add_table('layout', 'table')");
        refused("22023", "select tandem.add_table('layout', cells => '{\"a\": 1}')");
        refused("42703", "select tandem.add_table('layout', cells => '[[\"a\", \"c\"]]')");
        refused("42703", "select tandem.add_table('layout', cells => '[[\"a\", \"id\"]]')");
        refused("42701", "select tandem.add_table('layout', cells => '[[\"a\", \"b\"], [\"b\"]]')");
        run("select tandem.add_table('layout', cells => '[[\"a\", \"b\"]]')");
        refused("42710", "select tandem.add_table('layout')");
    }

    #[pg_test]
    fn tables_that_are_not_synced_cannot_be_removed() {
        ready();
        run("create table aside (id int primary key)");
        refused("55000", "select tandem.remove_table('aside')");
        refused("3F000", "select tandem.add_tables_in_schema('no_such_schema')");
    }

    #[pg_test]
    fn peers_are_checked_for_syntax_and_number() {
        ready();
        refused("42601", "select tandem.add_peer('osaka', 'not a connection string')");
        refused("22023", "select tandem.add_peer('', 'host=db2')");
        refused("55000", "select tandem.pause()");
        refused("55000", "select tandem.wait_for_peer('1ms')");
        refused("42704", "select tandem.skip('osaka')");
        run("select tandem.add_peer('osaka', 'host=no.such.host.invalid dbname=bank')");
        refused("42710", "select tandem.add_peer('osaka', 'host=db2')");
        refused("0A000", "select tandem.add_peer('kyoto', 'host=db3')");
        refused("55000", "select tandem.skip('osaka')");
        run("select tandem.pause()");
        assert!(value::<bool>("select paused from tandem.status where peer = 'osaka'"));
        run("select tandem.resume()");
        assert!(!value::<bool>("select paused from tandem.status where peer = 'osaka'"));
        refused("42704", "select tandem.remove_peer('kyoto')");
        run("select tandem.remove_peer('osaka')");
        assert_eq!(value::<i64>("select count(*) from tandem.status"), 0);
    }

    #[pg_test]
    fn sequences_are_staggered() {
        ready();
        run("create table orders (id serial primary key, n int generated always as identity unique, note text)");
        run("insert into orders (id, note) values (1000, 'by hand')");
        let next: i64 = value("select tandem.stagger_sequence('orders_id_seq')");
        assert!(next > 1000 && next % 64 == 1, "{next}");
        assert_eq!(value::<i64>("select nextval('orders_id_seq')"), next);
        assert_eq!(value::<i64>("select nextval('orders_id_seq')"), next + 64);
        assert_eq!(value::<i64>("select tandem.stagger_sequence('orders_id_seq')"), next + 128);
        run("select tandem.add_table('orders')");
        let advice = "select count(*) from tandem.check() where item like 'sequence public.orders%'";
        assert_eq!(value::<i64>(advice), 1);
        run("select tandem.stagger_sequence('orders_n_seq')");
        assert_eq!(value::<i64>(advice), 0);
        refused("42809", "select tandem.stagger_sequence('orders')");
        run("create sequence small as int2; select setval('small', 32767)");
        refused("2200H", "select tandem.stagger_sequence('small')");
        run("create sequence down increment -1");
        refused("0A000", "select tandem.stagger_sequence('down')");
    }
}
