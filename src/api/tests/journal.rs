//! What committed transactions leave in the journal: these tests need commits, so they run over sessions of
//! their own, each on tables of its own name, and clean up after themselves.

/// Runs statements, each in a transaction of its own, in a new session on the test server.
#[cfg(test)]
macro_rules! session {
    ($($statement:literal),+ $(,)?) => {{
        pgrx_tests::run_test("a_test_server_is_there", None, crate::pg_test::postgresql_conf_options()).expect("a server");
        let (mut session, _) = pgrx_tests::client().expect("a session");
        let node = ["begin"].into_iter().chain(NODE).chain(["commit"]);
        for statement in node.chain(SETUP).chain([$($statement),+]) {
            if let Err(e) = session.batch_execute(statement) {
                panic!("{statement}: {e:?}");
            }
        }
    }};
}

#[cfg(test)]
const SETUP: [&str; 3] = [
    "set search_path = public, tandem",
    "create or replace function pg_temp.journaled(since tandem.position) returns table (at tandem.position, bytes int, chunks int)
     language sql as $$
        select \"position\", length(payload), chunks from (
            select * from tandem.journal_0 union all select * from tandem.journal_1 union all
            select * from tandem.journal_2 union all select * from tandem.journal_3) j
        where \"position\" > since order by 1
     $$",
    "create or replace function pg_temp.says(needle text, since tandem.position) returns bool language sql as $$
        select exists (
            select from (
                select * from tandem.journal_0 union all select * from tandem.journal_1 union all
                select * from tandem.journal_2 union all select * from tandem.journal_3) j
            where \"position\" > since and position(convert_to(needle, 'UTF8') in payload) > 0)
     $$",
];

#[pgrx::pg_schema]
mod tests {
    #[cfg(test)]
    use super::SETUP;
    use crate::api::tests::*;

    #[pg_test]
    fn a_test_server_is_there() {
        assert_eq!(value::<i32>("select 1"), 1);
    }

    #[test]
    fn a_commit_leaves_one_row_and_a_rollback_none() {
        session!(
            "create table j_commit (id int primary key, a text)",
            "select tandem.add_table('j_commit')",
            "begin; insert into j_commit values (1, 'aaaone'), (2, 'aaatwo');
             update j_commit set a = 'aaathree' where id = 2; commit",
            "do $$ declare p tandem.position = tandem.last_position(); before tandem.position = (p::int8 - 1)::tandem.position;
             begin
                 assert (select count(*) from pg_temp.journaled(before) where at = p) = 1, 'one row';
                 assert pg_temp.says('aaaone', before), 'the first row';
                 assert pg_temp.says('aaathree', before) and not pg_temp.says('aaatwo', before), 'the net effect';
             end $$",
            "create temp table mark as select tandem.last_position() as p",
            "begin; insert into j_commit values (3, 'rolled back'); rollback",
            "insert into j_commit values (1, 'bbb') on conflict do nothing",
            "update j_commit set a = a",
            "do $$ begin
                 assert tandem.last_position() = (select p from mark), 'no position was taken';
                 assert not pg_temp.says('rolled back', (select p from mark)), 'nothing of it';
             end $$",
            "drop table j_commit",
        );
    }

    #[test]
    fn savepoints_cut_the_journal_back() {
        session!(
            "create table j_save (id int primary key, a text)",
            "select tandem.add_table('j_save')",
            "create temp table mark as select tandem.last_position() as p",
            "begin;
                 insert into j_save values (1, 'kept first');
                 savepoint x; insert into j_save values (2, 'cut away'); update j_save set a = 'cut too' where id = 1; rollback to x;
                 savepoint y; insert into j_save values (3, 'kept third'); release y;
                 do $in$ begin insert into j_save values (4, 'cut inside'); raise 'no'; exception when others then null; end $in$;
             commit",
            "do $$ declare since tandem.position = (select p from mark); begin
                 assert pg_temp.says('kept first', since) and pg_temp.says('kept third', since), 'kept';
                 assert not pg_temp.says('cut away', since) and not pg_temp.says('cut too', since), 'cut';
                 assert not pg_temp.says('cut inside', since), 'cut by a handler';
             end $$",
            "drop table j_save",
        );
    }

    #[test]
    fn a_decision_travels_with_its_write() {
        session!(
            "create table j_decide (id int primary key, a text)",
            "select tandem.add_table('j_decide')",
            "insert into j_decide values (1, 'present')",
            "insert into tandem.conflict
             select k::uuid, 'public', 'j_decide', 'update_origin_differs', null, '{\"id\":1}', '0', _hlc, '{a}', 'open', '0', now(),
                 null, null, null, null, 'last_update_wins', json_build_object('conflict_id', k, 'schema', 'public', 'table', 'j_decide',
                     'key', '{\"id\":1}'::json, 'conflict_type', 'update_origin_differs', 'constraint_name', null, 'losing', 66,
                     'winning', _hlc::int8, 'cells', array['a'], 'base', null,
                     'tuples', json_build_object('2', json_build_object('rank', json_build_array(1, 66), 'tuple', '{\"id\":1,\"a\":\"chosen\"}'::json)),
                     'result', json_build_object('rank', json_build_array(1, 66), 'tuple', '{\"id\":1,\"a\":\"present\"}'::json),
                     'policy', 'last_update_wins', 'detected_at', 0,
                     'decision', json_build_object('version', 0, 'status', 'open', 'by', null, 'at', null, 'resolution', null, 'note', null)), '{}'
             from j_decide, (select 'b5a0f7de-37c1-4f62-9b6a-0d6a64d4a001' as k) i",
            "create temp table mark as select tandem.last_position() as p",
            "select tandem.resolve('b5a0f7de-37c1-4f62-9b6a-0d6a64d4a001', 'remote', note => 'noted here')",
            "do $$ declare since tandem.position = (select p from mark); begin
                 assert (select a from j_decide) = 'chosen', 'written';
                 assert (select count(*) from pg_temp.journaled(since) where at = tandem.last_position()) = 1, 'one transaction';
                 assert pg_temp.says('noted here', since) and pg_temp.says('chosen', since), 'both travel';
             end $$",
            "delete from tandem.conflict where table_name = 'j_decide'",
            "drop table j_decide",
        );
    }

    #[test]
    fn waiting_for_a_position_sees_commits() {
        session!(
            "create table j_wait (id int primary key)",
            "select tandem.add_table('j_wait')",
            "insert into j_wait values (1)",
            "do $$ declare future tandem.position = (tandem.last_position()::int8 + (3600000::int8 << 22))::tandem.position; begin
                 assert tandem.last_position() > '0', 'a position';
                 assert tandem.wait_for(tandem.last_position(), '5s'), 'own commits show at once';
                 assert not tandem.wait_for(future, '100ms'), 'times out';
                 assert not tandem.wait_for((future::int8 + 1)::tandem.position, '100ms'), 'of the peer: times out';
             end $$",
            "drop table j_wait",
        );
    }

    #[test]
    fn add_table_wants_a_fresh_snapshot() {
        session!(
            "create table j_snapshot (id int primary key)",
            "begin isolation level repeatable read;
             do $$ begin perform tandem.add_table('j_snapshot'); assert false, 'it was added';
             exception when sqlstate '25001' then null; end $$;
             rollback",
            "drop table j_snapshot",
        );
    }
}
