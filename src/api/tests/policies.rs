//! What set_policy accepts, what it refuses and why, and what it leaves in the log.
#[pgrx::pg_schema]
mod tests {
    use crate::api::tests::*;

    /// A synced table of every type that matters.
    fn shop() {
        ready();
        run(
            "create table public.shop (id int primary key, n int, t text, tags text[], spots point[], j jsonb, p point,
                 lat real, lon real, twice int generated always as (id * 2) stored)",
        );
        run("select tandem.add_table('public.shop', cells => '[[\"lat\", \"lon\"]]')");
    }

    #[pg_test]
    fn a_policy_is_in_force_at_once_on_the_only_node() {
        shop();
        let set = "select tandem.set_policy('shop', 'greatest', columns => '{n,t}')";
        assert_eq!(value::<String>(set), "in force");
        run("select tandem.set_policy('shop', 'manual', conflict_type => 'update_deleted');
             select tandem.set_policy('shop', 'set_union', '{tags}', 'insert_exists');
             select tandem.set_policy('shop', 'set_union', '{j}');
             select tandem.set_policy('shop', 'least', '{n}')");
        assert_eq!(
            value::<String>("select policy from tandem.tables where relation = 'shop'::regclass"),
            "manual on update_deleted; j: set_union; n: least; n, t: greatest; tags: set_union on insert_exists"
        );
        run(
            "select tandem.set_policy('shop', 'last_update_wins', '{t}'); select tandem.set_policy('shop', 'least', '{n}')",
        );
        let log = "select string_agg(policy || ' ' || state, ', ' order by version) from tandem.policies
                   where relation = 'shop'::regclass and 'n' = any(columns)";
        assert_eq!(value::<String>(log), "greatest superseded, least superseded, least in force");
        assert!(value::<bool>("select bool_and(set_by = session_user) from tandem.policies"));
    }

    #[pg_test]
    fn a_renamed_column_keeps_its_policy() {
        shop();
        run("select tandem.set_policy('shop', 'greatest', '{n}'); alter table shop rename n to stock");
        run("select tandem.set_policy('shop', 'least', '{stock}')");
        assert_eq!(value::<i64>("select count(*) from tandem.policies where state = 'superseded'"), 1);
    }

    #[pg_test]
    fn what_is_not_known_is_refused_by_name() {
        shop();
        let unknown = refused("22023", "select tandem.set_policy('shop', 'sideways')");
        assert!(unknown.hint.contains("first_update_wins"), "{unknown:?}");
        refused("22023", "select tandem.set_policy(null, 'manual')");
        refused("22023", "select tandem.set_policy('shop', null)");
        refused("22023", "select tandem.set_policy('shop', 'manual', conflict_type => 'sideways')");
        refused("22023", "select tandem.set_policy('shop', 'manual', columns => '{null}')");
        refused("22023", "select tandem.set_policy('shop', 'manual', handler => 'f')");
        refused("22023", "select tandem.set_policy('shop', 'custom')");
        refused("22023", "select tandem.set_policy('shop', 'node_priority')");
        refused("42703", "select tandem.set_policy('shop', 'manual', columns => '{nowhere}')");
        refused("42703", "select tandem.set_policy('shop', 'manual', columns => '{twice}')");
        refused("42703", "select tandem.set_policy('shop', 'manual', columns => '{_hlc}')");
        refused("42P10", "select tandem.set_policy('shop', 'manual', columns => '{id}')");
        refused("42701", "select tandem.set_policy('shop', 'manual', columns => '{n,n}')");
        run("create table aside (id int primary key)");
        refused("55000", "select tandem.set_policy('aside', 'manual')");
        assert_eq!(refusal("select tandem.set_policy('no_such_table', 'manual')").sqlstate, "42P01");
        assert_eq!(value::<i64>("select count(*) from tandem.policies"), 0);
    }

    #[pg_test]
    fn a_policy_is_refused_where_it_cannot_decide() {
        shop();
        refused("0A000", "select tandem.set_policy('shop', 'greatest')");
        refused("0A000", "select tandem.set_policy('shop', 'delete_wins', columns => '{n}')");
        refused("0A000", "select tandem.set_policy('shop', 'greatest', '{n}', 'update_deleted')");
        refused("0A000", "select tandem.set_policy('shop', 'manual', '{n}', 'update_deleted')");
        refused("0A000", "select tandem.set_policy('shop', 'delete_wins', conflict_type => 'update_deleted')");
        // One of a group of columns that are decided as one.
        refused("0A000", "select tandem.set_policy('shop', 'greatest', '{lat}')");
        refused("22023", "select tandem.set_policy('shop', 'manual', '{lat}')");
        run("select tandem.set_policy('shop', 'manual', '{lat,lon}')");
        for (policy, column) in [("greatest", "p"), ("set_union", "n"), ("set_union", "spots")] {
            let refusal = refused("42804", &format!("select tandem.set_policy('shop', '{policy}', '{{{column}}}')"));
            assert!(refusal.message.contains(column), "{refusal:?}");
        }
    }

    #[pg_test]
    fn a_handler_is_a_function_that_the_owner_may_call() {
        shop();
        run("create schema app; create function app.merge(json) returns json language sql as 'select null::json';
             create function app.merge(text) returns json language sql as 'select null::json';
             create function app.wrong(json) returns text language sql as 'select null::text';
             create function app.many(json) returns setof json language sql as 'select null::json'");
        refused("42883", "select tandem.set_policy('shop', 'custom', handler => 'app.nowhere')");
        refused("42P13", "select tandem.set_policy('shop', 'custom', handler => 'app.wrong')");
        refused("42P13", "select tandem.set_policy('shop', 'custom', handler => 'app.many(json)')");
        refused("0A000", "select tandem.set_policy('shop', 'custom', '{}', 'update_deleted', 'app.merge')");
        run("select tandem.set_policy('shop', 'custom', handler => 'app.merge')");
        run(
            "set local search_path = app, public, tandem; select tandem.set_policy('public.shop', 'custom', handler => 'merge')",
        );
        assert_eq!(value::<i64>("select count(*) from tandem.policies where policy = 'custom(app.merge)'"), 2);
        run("create role shopper; alter table public.shop owner to shopper");
        refused("42501", "select tandem.set_policy('public.shop', 'custom', handler => 'app.merge')");
    }

    #[pg_test]
    fn only_an_administrator_with_the_rights_of_the_owner_sets_a_policy() {
        shop();
        run("create role keeper; create role clerk in role tandem_admin; alter table shop owner to keeper");
        run("set local role keeper");
        assert_eq!(refusal("select tandem.set_policy('shop', 'manual')").sqlstate, "42501");
        run("reset role; set local role clerk");
        refused("42501", "select tandem.set_policy('shop', 'manual')");
        assert_eq!(value::<i64>("select count(*) from tandem.policies"), 0);
        run("reset role; grant keeper to clerk; set local role clerk; select tandem.set_policy('shop', 'manual')");
    }

    #[pg_test]
    fn policies_that_decide_at_once_are_part_of_the_tables_shape() {
        shop();
        let shape = "select shape from tandem.peer_tables() where table_name = 'shop'";
        run("select tandem.set_policy('shop', 'node_priority(2)'); select tandem.set_policy('shop', 'delete_wins');
             select tandem.set_policy('shop', 'last_update_wins', '{n}')");
        let told = value::<String>(shape);
        assert!(
            told.contains("\"rows are\":\"delete_wins\"") && told.contains("\"cells are\":\"node_priority(2)\""),
            "{told}"
        );
        run("select tandem.set_policy('shop', 'last_update_wins')");
        assert!(!value::<String>(shape).contains("delete_wins"));
        run("select tandem.set_policy('shop', 'delete_wins'); select tandem.remove_table('shop')");
        assert_eq!(value::<i64>("select count(*) from tandem.policy"), 0);
    }

    #[pg_test]
    fn a_dropped_table_leaves_no_policy() {
        shop();
        run("select tandem.set_policy('shop', 'manual'); drop table shop");
        assert_eq!(value::<i64>("select count(*) from tandem.policy"), 0);
    }
}
