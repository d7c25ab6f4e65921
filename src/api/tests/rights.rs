//! Who may do what.
#[pgrx::pg_schema]
mod tests {
    use crate::api::tests::*;

    /// Values of synced tables are compared and shown by everybody; the rest of these look at rights themselves.
    const FOR_ALL: &str = "^(hlc|position|cells)_|^(min|max|resolve|resolve_all|ignore|show_conflict|last_position|wait_for|wait_for_peer)$";

    #[pg_test]
    fn nothing_is_for_everybody_but_what_must_be() {
        run("create role passer_by");
        let open = format!(
            "select coalesce(string_agg(oid::regprocedure::text, ', '), '') from pg_proc where pronamespace = 'tandem'::regnamespace
             and has_function_privilege('passer_by', oid, 'execute') and proname !~ '{FOR_ALL}'"
        );
        assert_eq!(value::<String>(&open), "");
        let readable = "select coalesce(string_agg(relname, ', ' order by relname), '') from pg_class
            where relnamespace = 'tandem'::regnamespace and relkind in ('r', 'v', 'S')
              and has_table_privilege('passer_by', oid, 'select, insert, update, delete, truncate')";
        assert_eq!(value::<String>(readable), "conflicts, open_conflicts, stat_conflicts");
    }

    #[pg_test]
    fn security_definers_have_a_fixed_search_path() {
        let loose = "select coalesce(string_agg(oid::regprocedure::text, ', '), '') from pg_proc
            where pronamespace = 'tandem'::regnamespace and prosecdef
              and not exists (select from unnest(proconfig) c where c like 'search_path=%')";
        assert_eq!(value::<String>(loose), "");
    }

    #[pg_test]
    fn everything_for_users_has_a_comment() {
        let silent = "select coalesce(string_agg(what, ', '), '') from (
                select oid::regprocedure::text as what from pg_proc where pronamespace = 'tandem'::regnamespace
                  and proname !~ '^(hlc|position|cells)_' and prokind <> 'a' and prorettype <> 'trigger'::regtype
                  and obj_description(oid, 'pg_proc') is null
                union all
                select relname from pg_class where relnamespace = 'tandem'::regnamespace and relkind in ('r', 'v')
                  and obj_description(oid, 'pg_class') is null) s";
        assert_eq!(value::<String>(silent), "");
    }

    #[pg_test]
    fn an_administrator_adds_own_tables_and_no_peer() {
        ready();
        let _ = refusal("select 1 / 0");
        run("create role head in role tandem_admin; create role other; grant create on schema public to head, other");
        run("create table public.not_theirs (id int primary key)");
        run("set local role head");
        run("create table public.theirs (id int primary key, a int); select tandem.add_table('public.theirs')");
        run(
            "insert into public.theirs values (1, 1); update public.theirs set a = 2; delete from public.theirs; truncate public.theirs",
        );
        refused("42501", "select tandem.add_table('public.not_theirs')");
        refused("42501", "select tandem.add_peer('osaka', 'host=db2')");
        assert!(value::<i64>("select count(*) from tandem.check()") > 5);
        assert_eq!(value::<i64>("select count(*) from tandem.tables where relation = 'public.theirs'::regclass"), 1);
        assert_eq!(refusal("select conninfo from tandem.peer").sqlstate, "42501");
        assert_eq!(value::<i64>("select count(name) from tandem.peer"), 0);
        run("reset role; grant insert, select on public.theirs to other; set local role other");
        run("insert into public.theirs values (3, 3)");
        assert!(value::<bool>(
            "select _hlc > '0' and _hlc::timestamptz > now() - interval '1 hour' from public.theirs"
        ));
        assert_eq!(refusal("select tandem.add_table('public.theirs')").sqlstate, "42501");
        assert_eq!(refusal("select * from tandem.tombstone").sqlstate, "42501");
        run("reset role; set local role head; select tandem.remove_table('public.theirs')");
    }

    #[pg_test]
    fn an_operator_of_the_callers_making_does_not_run_as_superuser() {
        ready();
        run(
            "create role trickster in role tandem_admin; create schema trap authorization trickster; set local role trickster",
        );
        run("create table trap.victims (who name);
             create function trap.spring(regclass, oid) returns bool language plpgsql as $$
                 begin insert into trap.victims values (current_user); return pg_catalog.oideq($1, $2); end $$;
             create operator trap.= (leftarg = regclass, rightarg = oid, function = trap.spring);
             create table trap.goods (id int primary key)");
        run("set local search_path = trap, pg_catalog");
        run(
            "select tandem.add_table('trap.goods'); select count(*) from tandem.tables; select tandem.remove_table('trap.goods')",
        );
        run("reset role");
        assert_eq!(value::<i64>("select count(*) from trap.victims where who <> 'trickster'"), 0);
    }
}
