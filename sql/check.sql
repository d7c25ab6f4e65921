-- What tandem.check() looks at, in parts. Each part returns (item, level, detail, hint); level is 'ok',
-- 'warning' or 'error'.

-- A table's key as Tandem needs it: the primary key, else the replica-identity index.
create function has_usable_key(rel oid) returns bool
language sql stable set search_path = pg_catalog, pg_temp as $$
    select exists (
        select from pg_index
        where indrelid = rel and (indisprimary or indisreplident) and indisunique and indimmediate and indisvalid
          and indpred is null and 0 <> all (indkey::int2[]))
$$;

-- Warnings about one synced table: what add_table says, and check() again.
create function table_advice(rel regclass)
returns table (item text, level text, detail text, hint text)
language sql stable set search_path = pg_catalog, pg_temp as $$
    -- Sequences that feed a column which must be unique, and don't count in steps of their own.
    select 'sequence ' || q.seq::regclass, 'warning',
           format('sequence %s feeds %s.%I, and both nodes may draw the same values from it',
                  q.seq::regclass, rel, q.attname),
           format('SELECT tandem.stagger_sequence(%L); on both nodes', q.seq::regclass::text)
    from (
        select distinct s.seqrelid as seq, a.attname
        from pg_attribute a
        left join pg_attrdef f on f.adrelid = a.attrelid and f.adnum = a.attnum
        join pg_depend d on
            -- identity
            (d.classid = 'pg_class'::regclass and d.refclassid = 'pg_class'::regclass
             and d.refobjid = a.attrelid and d.refobjsubid = a.attnum and d.deptype = 'i')
            -- a default with nextval
            or (d.classid = 'pg_attrdef'::regclass and d.objid = f.oid and d.refclassid = 'pg_class'::regclass)
        join pg_sequence s on s.seqrelid = case when d.deptype = 'i' then d.objid else d.refobjid end
        where a.attrelid = rel
          and exists (select from pg_index i where i.indrelid = rel and i.indisunique and a.attnum = any (i.indkey::int2[]))
          and not exists (select from tandem.node n where s.seqincrement = 64 and mod(s.seqstart, 64) = n.id)
    ) q
    union all
    select 'foreign key ' || conname, 'warning',
           format('foreign key %s of %s refers to table %s, which is not kept in sync', conname, rel, confrelid::regclass),
           format('SELECT tandem.add_table(%L);', confrelid::regclass::text)
    from pg_constraint c
    where c.contype = 'f' and c.conrelid = rel and c.conparentid = 0
      and not exists (select from tandem.synced_table s where s.relid = c.confrelid)
    union all
    select 'foreign key ' || conname, 'warning',
           format('foreign key %s of table %s, which is not kept in sync, refers to %s', conname, conrelid::regclass, rel),
           format('SELECT tandem.add_table(%L);', conrelid::regclass::text)
    from pg_constraint c
    where c.contype = 'f' and c.confrelid = rel and c.conparentid = 0
      and not exists (select from tandem.synced_table s where s.relid = c.conrelid)
    union all
    select 'foreign key ' || conname, 'warning',
           format('foreign key %s of %s has no index on its columns: each delete of a row it refers to reads the whole table',
                  conname, rel),
           format('CREATE INDEX ON %s (%s);', rel, (
               select string_agg(quote_ident(a.attname), ', ' order by k.place)
               from unnest(c.conkey) with ordinality k(attnum, place)
               join pg_attribute a on a.attrelid = c.conrelid and a.attnum = k.attnum))
    from pg_constraint c
    where c.contype = 'f' and c.conrelid = rel
      and not exists (
          select from pg_index i
          where i.indrelid = rel and i.indisvalid and i.indpred is null
            and (i.indkey::int2[])[0:cardinality(c.conkey) - 1] @> c.conkey)
$$;

create function check_server()
returns table (item text, level text, detail text, hint text)
language sql volatile set search_path = pg_catalog, pg_temp as $$
    select 'shared_preload_libraries', case when loaded then 'ok' else 'error' end,
           case when loaded then 'tandem is preloaded' else 'tandem is not preloaded' end,
           case when not loaded then 'Add tandem to shared_preload_libraries and restart the server.' end
    from (select 'tandem' = any (regexp_split_to_array(
              replace(current_setting('shared_preload_libraries'), '"', ''), '\s*,\s*')) as loaded) s
    union all
    select 'max_worker_processes', case when workers >= 4 then 'ok' else 'warning' end,
           format('%s, of which Tandem takes one for the server and one for each paired database', workers),
           case when workers < 4 then 'Raise max_worker_processes and restart the server.' end
    from (select current_setting('max_worker_processes')::int as workers) s
    union all
    select 'node', case when n.id is null then 'warning' else 'ok' end,
           coalesce(n.name || ' (id ' || n.id || ')', 'this database is not a node yet'),
           case when n.id is null then 'SELECT tandem.create_node(''tokyo'', 1); with another id (1 to 63) on each server' end
    from (select) s left join tandem.node n on true
    union all
    select 'encoding', case when encoding = 'SQL_ASCII' then 'warning' else 'ok' end,
           encoding || ', which must be the peer''s as well',
           case when encoding = 'SQL_ASCII' then 'Text of SQL_ASCII is of no certain encoding: prefer a database in UTF8.' end
    from (select current_setting('server_encoding') as encoding) s
    union all
    select 'collation',
           case when datcollversion is distinct from pg_database_collation_actual_version(oid) then 'warning' else 'ok' end,
           format('%s, provider %s, version %s; it should be the peer''s as well', datcollate,
                  case datlocprovider when 'c' then 'libc' when 'i' then 'icu' else datlocprovider::text end,
                  coalesce(datcollversion, 'none')),
           case when datcollversion is distinct from pg_database_collation_actual_version(oid) then
               format('Rebuild the indexes on text, then ALTER DATABASE %I REFRESH COLLATION VERSION;', datname) end
    from pg_database where datname = current_database()
    union all
    select 'clock', case when ahead > skew then 'warning' else 'ok' end,
           case when ahead > skew
                then format('the wall clock is %s behind the last version that was written here', ahead)
                else format('at %s; versions follow it', clock_timestamp()) end,
           case when ahead > skew then 'Set the clock right (with NTP, say): versions count on from where they were.' end
    from (select tandem.hlc_time(last_value::tandem.hlc) - clock_timestamp() as ahead,
                 coalesce(current_setting('tandem.max_clock_skew', true), '10s')::interval as skew
          from tandem.clock_reservation) s
    union all
    select 'fsync', case when current_setting('fsync')::bool then 'ok' else 'error' end, current_setting('fsync'),
           case when not current_setting('fsync')::bool then
               'A crash may take back what the peer already has: ALTER SYSTEM SET fsync = on;' end
    union all
    select 'full_page_writes', case when current_setting('full_page_writes')::bool then 'ok' else 'warning' end,
           current_setting('full_page_writes'),
           case when not current_setting('full_page_writes')::bool then
               'Safe only on storage that never tears a page: ALTER SYSTEM SET full_page_writes = on;' end
    union all
    select 'synchronous_commit', 'ok', current_setting('synchronous_commit') || '; only flushed commits leave this server', null
    union all
    select 'deadlock_timeout', case when apply_wait >= deadlock then 'warning' else 'ok' end,
           format('%s; applying waits for a lock for %s', deadlock, apply_wait),
           case when apply_wait >= deadlock then
               'Keep tandem.apply_lock_timeout below deadlock_timeout: then a local user is never the victim.' end
    from (select current_setting('deadlock_timeout')::interval as deadlock,
                 coalesce(current_setting('tandem.apply_lock_timeout', true), '500ms')::interval as apply_wait) s
    union all
    select 'recovery', 'warning', 'this server is a standby: it takes no part until it is promoted', null
    where pg_is_in_recovery()
$$;

create function check_tables()
returns table (item text, level text, detail text, hint text)
language sql stable set search_path = pg_catalog, pg_temp as $$
    select 'table ' || c.oid::regclass, 'warning', 'has no usable key and cannot be kept in sync',
           format('ALTER TABLE %s ADD PRIMARY KEY (…); or REPLICA IDENTITY USING INDEX … (unique, not null, not deferrable, not partial)',
                  c.oid::regclass)
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind = 'r' and c.relpersistence = 'p' and n.nspname not in ('pg_catalog', 'information_schema', 'tandem')
      and not exists (select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e')
      and not tandem.has_usable_key(c.oid)
    union all
    select 'table ' || s.relid::oid, 'error', 'was dropped and is still listed as kept in sync',
           format('DELETE FROM tandem.synced_table WHERE relid = %s; as a superuser', s.relid::oid)
    from tandem.synced_table s where not exists (select from pg_class c where c.oid = s.relid)
    union all
    select 'table ' || s.relid, 'error', format('trigger %s is missing or disabled: changes are not captured', w.name),
           format('SELECT tandem.remove_table(%L); and add it again, or ALTER TABLE %s ENABLE ALWAYS TRIGGER %I;',
                  s.relid::text, s.relid, w.name)
    from tandem.synced_table s
    join pg_class c on c.oid = s.relid
    cross join unnest(array['~tandem_stamp', '~tandem_delete', '!tandem_capture', '!tandem_truncate']) as w(name)
    where not exists (select from pg_trigger t where t.tgrelid = s.relid and t.tgname = w.name and t.tgenabled = 'A')
    union all
    select 'table ' || s.relid, 'warning',
           format('column %I of its key has a collation by which different texts are equal', a.attname),
           'Give the key column a deterministic collation.'
    from tandem.synced_table s
    join pg_index i on i.indrelid = s.relid and (i.indisprimary or i.indisreplident)
    join pg_attribute a on a.attrelid = s.relid and a.attnum = any (i.indkey::int2[])
    join pg_collation l on l.oid = a.attcollation and not l.collisdeterministic
    union all
    select a.item, a.level, a.detail, a.hint
    from tandem.synced_table s join pg_class c on c.oid = s.relid, tandem.table_advice(s.relid) a
    union all
    select 'tables', case when count(*) = 0 then 'warning' else 'ok' end, count(*) || ' kept in sync',
           case when count(*) = 0 then 'SELECT tandem.add_table(''accounts''); on both servers' end
    from tandem.synced_table
$$;
