-- The surface: views, tandem.check(), rights, comments. Comes last: it speaks of everything else.

-- Watching ------------------------------------------------------------------------------------------

create view status as
select p.name as peer,
       case when s.state is null then 'stopped' else s.state end as state,
       coalesce(s.reason, case when s.state is null then 'no worker has been started yet' end) as reason,
       s.hint, s.since, p.paused,
       p.node_name, p.node_id, s.lag,
       s.received, s.applied, s.acknowledged,
       s.transactions, s.bytes, s.transactions_per_second, s.bytes_per_second,
       -- An error that is over is in the server log, not here.
       e.last_error, e.sqlstate, e.error_class, e.last_error_at,
       s.pid, s.blocked_by,
       (select sum(pg_catalog.pg_total_relation_size(c.oid))::int8 from pg_catalog.pg_class c
        where c.relnamespace = 'tandem'::regnamespace and c.relkind = 'r' and c.relname ~ '^journal_') as journal_bytes,
       pg_catalog.pg_total_relation_size('tandem.tombstone') as tombstone_bytes,
       (select count(*) from tandem.displaced) as displaced,
       (select count(*) from tandem.held h where h.peer = p.name) as held,
       (select count(*) from tandem.conflict c where c.status = 'open') as open_conflicts,
       (select sum(pg_catalog.pg_total_relation_size(t.relid))::int8 from pg_catalog.pg_partition_tree('tandem.conflict') t) as history_bytes
from tandem.peer p
left join tandem.peer_status() s on s.peer = p.name
left join lateral (
    select s.last_error, s.last_error_sqlstate as sqlstate, s.last_error_class as error_class, s.last_error_at
    where s.state <> 'streaming') e on true;

create view policies as
select p.relid as relation, nullif(p.columns, '{}') as columns, p.conflict_type, p.policy, s.state, p.refused as reason,
       p.version, p.set_by, p.set_at
from tandem.policy p left join tandem.policy_states() s on s.version operator(tandem.=) p.version
where not p.reset;

create view tables as
select c.oid::regclass as relation, t.schema_name, t.table_name, t.state, t.reason, s.granularity, s.cells, s.on_fk,
       coalesce(p.policy, 'last_update_wins') as policy,
       s.initial_rows,
       (select count(*) from tandem.held h
        where h.schema_name = t.schema_name and h.table_name = t.table_name) as held,
       (select count(*) from tandem.tombstone d where d.relid = s.relid) as tombstones,
       (select count(*) from tandem.displaced d where d.relid = s.relid) as displaced,
       (select count(*) from tandem.conflict f
        where f.schema_name = t.schema_name and f.table_name = t.table_name) as conflicts,
       (select count(*) from tandem.conflict f
        where f.schema_name = t.schema_name and f.table_name = t.table_name and f.status = 'open') as open_conflicts,
       s.added_at
from tandem.table_states() t
left join pg_catalog.pg_namespace n on n.nspname = t.schema_name
left join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = t.table_name
left join tandem.synced_table s on s.relid = c.oid
left join lateral (
    select string_agg(coalesce(array_to_string(p.columns, ', ') || ': ', '') || p.policy || coalesce(' on ' || p.conflict_type, ''),
                      '; ' order by p.columns is not null, p.columns, p.version) as policy
    from tandem.policies p where p.relation = s.relid and p.state = 'in force') p on true;

-- A security barrier: a table's owner sees that table's conflicts, readers and administrators see all.
create view conflicts with (security_barrier) as
select f.conflict_id, f.detected_at, c.oid::regclass as relation, f.conflict_type, f.constraint_name,
       f.key_tuple, f.cells,
       f.images -> 'base' as base_tuple,
       f.images -> n.id::text as local_tuple,
       f.images -> o.id::text as remote_tuple,
       f.images -> 'result' as result_tuple,
       f.losing_version, f.winning_version,
       tandem.hlc_node(f.losing_version) as losing_node,
       n.id::int4 as local_node, o.id as remote_node,
       f.policy, f.conflict_resolution, f.status, f.resolved_by, f.resolved_at, f.note,
       f.schema_name, f.table_name
from tandem.conflict f
left join tandem.node n on true
left join lateral (
    select coalesce(
        (select k::int4 from pg_catalog.json_object_keys(f.record -> 'tuples') k
         where k::int4 <> n.id order by k::int4 limit 1),
        nullif(nullif(tandem.hlc_node(f.losing_version), n.id), 0),
        nullif(nullif(tandem.hlc_node(f.winning_version), n.id), 0),
        (select node_id::int4 from tandem.peer limit 1)) as id
) o on true
left join pg_catalog.pg_namespace s on s.nspname = f.schema_name
left join pg_catalog.pg_class c on c.relnamespace = s.oid and c.relname = f.table_name
where (select pg_catalog.pg_has_role('tandem_reader', 'usage') or pg_catalog.pg_has_role('tandem_admin', 'usage'))
   or pg_catalog.pg_has_role(c.relowner, 'usage');

create view open_conflicts with (security_barrier) as
select * from tandem.conflicts where status = 'open' order by detected_at, conflict_id;

-- Named as in pg_stat_subscription_stats. They don't fall when retention removes a record.
create view stat_conflicts with (security_barrier) as
select relation, schema_name, table_name,
       coalesce(sum(number) filter (where conflict_type = 'insert_exists'), 0)::int8 as confl_insert_exists,
       coalesce(sum(number) filter (where conflict_type = 'update_origin_differs'), 0)::int8 as confl_update_origin_differs,
       coalesce(sum(number) filter (where conflict_type = 'update_exists'), 0)::int8 as confl_update_exists,
       coalesce(sum(number) filter (where conflict_type = 'update_deleted'), 0)::int8 as confl_update_deleted,
       coalesce(sum(number) filter (where conflict_type = 'update_missing'), 0)::int8 as confl_update_missing,
       coalesce(sum(number) filter (where conflict_type = 'delete_origin_differs'), 0)::int8 as confl_delete_origin_differs,
       coalesce(sum(number) filter (where conflict_type = 'delete_missing'), 0)::int8 as confl_delete_missing,
       coalesce(sum(number) filter (where conflict_type = 'multiple_unique_conflicts'), 0)::int8 as confl_multiple_unique_conflicts,
       coalesce(sum(number) filter (where conflict_type = 'foreign_key_violation'), 0)::int8 as confl_foreign_key_violation,
       coalesce(sum(number) filter (where conflict_type = 'check_violation'), 0)::int8 as confl_check_violation,
       coalesce(sum(number) filter (where conflict_type = 'truncate_origin_differs'), 0)::int8 as confl_truncate_origin_differs,
       coalesce(sum(number) filter (where conflict_type = 'initial_differs'), 0)::int8 as confl_initial_differs,
       sum(number)::int8 as conflicts,
       sum(open)::int8 as open,
       max(last_detected_at) as last_detected_at
from (
    select relation, schema_name, table_name, conflict_type, count(*) as number,
           count(*) filter (where status = 'open') as open, max(detected_at) as last_detected_at
    from tandem.conflicts group by 1, 2, 3, 4
    union all
    select c.oid::regclass, r.schema_name, r.table_name, r.conflict_type, r.removed, 0, r.last_detected_at
    from tandem.conflict_count r
    left join pg_catalog.pg_namespace s on s.nspname = r.schema_name
    left join pg_catalog.pg_class c on c.relnamespace = s.oid and c.relname = r.table_name
    where (select pg_catalog.pg_has_role('tandem_reader', 'usage') or pg_catalog.pg_has_role('tandem_admin', 'usage'))
       or pg_catalog.pg_has_role(c.relowner, 'usage')
) f
group by relation, schema_name, table_name;

-- Preflight -----------------------------------------------------------------------------------------

create function check_peers()
returns table (item text, level text, detail text, hint text)
language sql volatile set search_path = pg_catalog, pg_temp as $$
    select 'peer ' || peer,
           case when state in ('streaming', 'catchup', 'joining', 'handshake', 'paused') then 'ok'
                when state = 'refused' then 'error' else 'warning' end,
           state || coalesce(': ' || reason, ''), hint
    from tandem.status
    union all
    select 'peer', 'warning', 'there is no peer yet', 'SELECT tandem.add_peer(''osaka'', ''host=db2 dbname=bank'');'
    where not exists (select from tandem.peer)
    union all
    select format('table %I.%I', schema_name, table_name), 'warning', state || coalesce(': ' || reason, ''),
           case state
               when 'missing_on_peer' then format('On the peer: SELECT tandem.add_table(%L);', format('%I.%I', schema_name, table_name))
               when 'missing_here' then format('SELECT tandem.add_table(%L);', format('%I.%I', schema_name, table_name))
               when 'schema_differs' then 'Bring columns, types and key of both sides together; it goes on by itself.'
               when 'policy_differs' then 'Set the policies of the other side with tandem.set_policy(); or remove the table on one side and add it with the granularity or cells of the other.'
               when 'join_required' then 'Remove the table on both sides, make their rows equal (or empty one), and add it again.'
           end
    from tandem.table_states() where state <> 'active' and exists (select from tandem.peer)
$$;

-- Reads what its caller may not: settings, the peer's state.
create function "check"()
returns table (item text, level text, detail text, hint text)
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
    select * from tandem.check_server() union all
    select * from tandem.check_tables() union all
    -- Without the library nothing of this can be asked.
    select p.* from (select count(*) as errors from tandem.check_server() where level = 'error' and item = 'shared_preload_libraries') s,
         lateral (select * from tandem.check_peers() where s.errors = 0) p
$$;

-- A dropped table is no longer kept in sync.
create function forget_dropped() returns event_trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    delete from tandem.synced_table s using pg_event_trigger_dropped_objects() d
    where d.classid = 'pg_class'::regclass and d.objsubid = 0 and s.relid = d.objid;
    if found then
        delete from tandem.tombstone t using pg_event_trigger_dropped_objects() d
        where d.classid = 'pg_class'::regclass and d.objsubid = 0 and t.relid = d.objid;
        delete from tandem.displaced t using pg_event_trigger_dropped_objects() d
        where d.classid = 'pg_class'::regclass and d.objsubid = 0 and t.relid = d.objid;
        delete from tandem.policy p using pg_event_trigger_dropped_objects() d
        where d.classid = 'pg_class'::regclass and d.objsubid = 0 and p.relid = d.objid;
    end if;
end $$;
create event trigger tandem_forget_dropped on sql_drop when tag in ('DROP TABLE', 'DROP SCHEMA', 'DROP OWNED')
    execute function forget_dropped();

-- Dumps ---------------------------------------------------------------------------------------------

select pg_catalog.pg_extension_config_dump('node', '');
select pg_catalog.pg_extension_config_dump('peer', '');
select pg_catalog.pg_extension_config_dump('synced_table', '');
select pg_catalog.pg_extension_config_dump('policy', '');
do $$
begin
    for i in 0..11 loop
        perform pg_catalog.pg_extension_config_dump(format('conflict_%s', i), '');
    end loop;
end $$;
select pg_catalog.pg_extension_config_dump('conflict_count', '');
select pg_catalog.pg_extension_config_dump('conflict_removed', '');

-- Rights --------------------------------------------------------------------------------------------

revoke all on all functions in schema tandem from public;
revoke all on all procedures in schema tandem from public;
revoke all on all tables in schema tandem from public;
revoke all on all sequences in schema tandem from public;
-- Names of the schema may be used: a table's owner asks for its conflicts, an application for a position.
grant usage on schema tandem to public;

-- What a value of these types needs wherever it stands in a table.
do $$
declare
    f regprocedure;
begin
    for f in
        select p.oid::regprocedure from pg_catalog.pg_proc p
        where p.pronamespace = 'tandem'::regnamespace
          and (p.proname ~ '^(hlc|position|cells)_' or (p.proname in ('min', 'max') and p.prokind = 'a'))
    loop
        execute format('grant execute on function %s to public', f);
    end loop;
end $$;

-- These look at rights themselves: the owner of a table decides about it.
grant execute on function
    resolve(uuid, text, json, text, bool),
    resolve_all(regclass, text, text, text, timestamptz, timestamptz, text[]),
    ignore(uuid, text), show_conflict(uuid),
    last_position(), wait_for("position", interval), wait_for_peer(interval)
to public;
grant select on conflicts, open_conflicts, stat_conflicts to public;

grant execute on function
    "check"(), create_node(text, int4), accept_skew(),
    add_table(regclass, text, jsonb, text), add_tables_in_schema(text), remove_table(regclass),
    set_policy(regclass, text, text[], text, text),
    add_peer(text, text), remove_peer(text), pause(), resume(), skip(text),
    stagger_sequence(regclass), stamp(), stamp_delete(), capture(), capture_truncate(),
    peer_status(), table_states(), policy_states()
to tandem_admin;
grant select on status, tables, policies, policy, node, synced_table, peer_table, skipped, displaced, conflict, incarnation to tandem_admin;
-- All but the connection string, which may hold a password.
grant select (name, paused, node_id, node_name, nonce, skip_position, added_at) on peer to tandem_admin;

grant execute on function "check"(), peer_status(), table_states(), policy_states() to tandem_reader;
grant select on status, tables, policies, node to tandem_reader;

-- Comments ------------------------------------------------------------------------------------------

comment on schema tandem is 'keeps two databases in sync while applications write to both';
comment on view status is 'one row per peer: state, reason, lag, positions, rates, last error, sizes';
comment on column status.state is 'stopped, connecting, handshake, joining, catchup, streaming, paused or refused';
comment on column status.reason is 'why it is in that state';
comment on column status.hint is 'what to do about it';
comment on column status.lag is 'how long ago this database held all that the peer had; 0 while streaming';
comment on column status.received is 'position in the peer''s stream up to which it has arrived';
comment on column status.applied is 'position in the peer''s stream up to which it shows here';
comment on column status.acknowledged is 'position in this node''s stream up to which the peer has it for good';
comment on column status.error_class is 'retry: goes away by itself; operator: waits for a person; bug';
comment on column status.blocked_by is 'pid of a session that holds a lock the applying waits for';
comment on column status.displaced is 'rows that are alive and cannot show because of a constraint';
comment on column status.held is 'changes of the peer that wait until their table can take them';
comment on view tables is 'one row per table that either side keeps in sync: how it is kept, and how it stands with the peer''s';
comment on column tables.state is 'active, missing_on_peer, missing_here, schema_differs, policy_differs or join_required';
comment on column tables.policy is 'how conflicts are decided: of the table, then of columns and types of conflict; see tandem.policies';
comment on view policies is 'the policy log: how conflicts are decided, from which version on, on both nodes alike';
comment on column policies.columns is 'the columns that it is about; NULL: the whole table';
comment on column policies.state is 'in force; pending: the other node has not answered; refused: the reason says why; superseded';
comment on view conflicts is 'one row per losing write, the same on both nodes; local is this node, remote the peer. '
    'A NULL for a tuple says that there was no row, or that it is not on record';
comment on column conflicts.cells is 'the cells that were lost; empty: the row as a whole';
comment on column conflicts.base_tuple is 'the row that both writes started from';
comment on column conflicts.local_tuple is 'the row as this node had it';
comment on column conflicts.remote_tuple is 'the row as the peer had it';
comment on column conflicts.result_tuple is 'the row as the conflict left it, on both nodes';
comment on column conflicts.status is 'auto: decided by the policy; open: waits for a person; resolved; ignored; superseded';
comment on view open_conflicts is 'conflicts that wait for a person: decide each with tandem.resolve() or tandem.ignore()';
comment on view stat_conflicts is 'number of conflicts per table and type, with those that retention has removed';

comment on function "check"() is 'preflight: what stands in the way of keeping this database in sync';
comment on function create_node(text, int4) is 'makes this database a node: its name, and an id from 1 to 63 that the peer must not have';
comment on function accept_skew() is 'believes the wall clock as it is, after a jump that has been looked into';
comment on function add_table(regclass, text, jsonb, text) is
    'keeps a table in sync from now on; granularity ''column'' or ''row'', or cells: groups of columns that are decided as one; '
    'on_fk: what becomes of a row whose parent was deleted unseen: ''revive'' the parent, ''cascade'' to the row, or ''report'' it and let it wait';
comment on function add_tables_in_schema(text) is 'adds every table of a schema that can be kept in sync; returns those that were added';
comment on function remove_table(regclass) is 'stops keeping a table in sync and drops what Tandem added to it; its rows stay';
comment on function set_policy(regclass, text, text[], text, text) is
    'decides conflicts of a table, of some columns or of one type by another policy from now on, on both nodes; ''in force'', or ''pending'' until the other node has written it';
comment on function add_peer(text, text) is 'names the other database and how to reach it, and starts the exchange; for superusers';
comment on function remove_peer(text) is 'ends the exchange with the other database';
comment on function pause() is 'stops applying the peer''s changes here until resume(); survives a restart';
comment on function resume() is 'goes on applying the peer''s changes';
comment on function skip(text) is 'passes over the one transaction of the peer that cannot be applied; it stays whole in tandem.skipped';
comment on function stagger_sequence(regclass) is
    'lets a sequence count in steps of 64 from this node''s own offset, above all present values, so that both nodes never draw the same; returns the next value';
comment on function resolve(uuid, text, json, text, bool) is
    'decides a conflict by a new write: ''local'', ''remote'', ''base'', ''result'' or ''keep_both'', or columns to set; force overwrites a row that has changed since';
comment on function resolve_all(regclass, text, text, text, timestamptz, timestamptz, text[]) is
    'decides the open conflicts of a table alike and returns how many; conflict_type, detected_after, detected_before (not itself) '
    'and columns choose among them: columns takes those that lost nothing but these';
comment on function ignore(uuid, text) is 'closes a conflict and leaves the row as it is';
comment on function show_conflict(uuid) is 'a conflict as text: base, local, remote and result side by side';
comment on function last_position() is 'position of this session''s last commit that changed synced tables';
comment on function wait_for("position", interval) is 'waits until everything up to a position of either node shows here; false at the timeout';
comment on function wait_for_peer(interval) is 'waits until everything committed here so far shows on the peer; false at the timeout';
comment on function policy_states() is 'where each entry of the policy log stands';
comment on function table_states() is 'how each synced table stands with the peer''s';
comment on function table_advice(regclass) is 'warnings about one synced table';
comment on function check_server() is 'the part of tandem.check() about the server';
comment on function check_tables() is 'the part of tandem.check() about tables';
comment on function check_peers() is 'the part of tandem.check() about the peer';
comment on function has_usable_key(oid) is 'true if a table has a key that can tell its rows apart on both sides';
comment on table journal_trim is 'how far the journal has been cleared: what the peer has, for good';
comment on function forget_dropped() is 'event trigger: a dropped table is no longer kept in sync';
comment on event trigger tandem_forget_dropped is 'a dropped table is no longer kept in sync';
