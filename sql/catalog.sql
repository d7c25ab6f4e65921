-- The catalog. What pg_dump keeps: node, peer, synced_table, policy, conflict and what is counted of it. What
-- lives and dies with this server: descriptors, journal, progress, tombstones, held changes.

create table node (
    singleton bool primary key default true check (singleton),
    name text not null,
    id int2 not null check (id between 1 and 63),
    created_at timestamptz not null default now()
);
comment on table node is 'this database as a member of a pair';

-- One row per start of the server (a nonce), recorded before anything is shipped under it.
create table incarnation (
    nonce uuid primary key,
    ordinal int8 generated always as identity,
    started_at timestamptz not null default now(),
    -- greatest position that the start before this one may have shipped
    previous_end "position" not null
);
comment on table incarnation is 'starts of this server, and where the previous one ended';

create table peer (
    name text primary key,
    conninfo text not null,
    paused bool not null default false,
    -- what the peer said of itself when it was last reached
    node_id int2,
    node_name text,
    nonce uuid,
    skip_position "position",
    added_at timestamptz not null default now()
);
comment on table peer is 'the other database: how to reach it, and what it is';

create table synced_table (
    relid regclass primary key,
    granularity text not null check (granularity in ('column', 'row', 'cells')),
    -- groups of columns that are decided as one, [["city","zip"],["lat","lon"]]
    cells jsonb,
    -- what becomes of a row whose parent was deleted unseen
    on_fk text not null default 'revive' check (on_fk in ('revive', 'cascade', 'report')),
    -- content at add_table: rows of version 0, and an order-independent digest of them
    initial_rows int8 not null,
    initial_digest numeric not null,
    added_at timestamptz not null default now()
);
comment on table synced_table is 'tables that are kept in sync';

create sequence descriptor_id as int4;
create table descriptor (
    id int4 primary key,
    relid oid not null,
    -- serde_json of the table's shape
    shape text not null
);
create index on descriptor (relid);
comment on table descriptor is 'shapes that synced tables have had; what a change in the journal refers to';

-- The clock's reservation: no version above it is handed out before it is raised (non-transactional).
create sequence clock_reservation as int8 minvalue 0 start 0;

-- What this node knows of the peer's tables; rewritten at each contact.
create table peer_table (
    peer text not null references peer on delete cascade,
    schema_name text not null,
    table_name text not null,
    -- shape of today, serde_json of a Descriptor
    shape text not null,
    initial_rows int8 not null,
    initial_digest numeric not null,
    primary key (peer, schema_name, table_name)
);
comment on table peer_table is 'the peer''s synced tables, as it described them at the last contact';

-- The journal: a ring of segments. A transaction is one row; a large one is preceded by its chunks.
do $$
begin
    for i in 0..3 loop
        execute format('create table journal_%s (
            "position" "position" not null, low hlc not null,
            seen "position" not null, seen_low hlc not null,
            stable hlc not null, first hlc not null, chunks int4 not null,
            payload bytea not null)', i);
        execute format('create unique index journal_%1$s_position on journal_%1$s ("position")', i);
        execute format('alter table journal_%s alter payload set storage external', i);
        execute format('create table journal_chunk_%s (first hlc not null, ordinal int4 not null, payload bytea not null)', i);
        execute format('create unique index journal_chunk_%1$s_first on journal_chunk_%1$s (first, ordinal)', i);
        execute format('alter table journal_chunk_%s alter payload set storage external', i);
        execute format('comment on table journal_%s is %L', i, 'segment of the journal: one row per transaction that changed synced tables');
        execute format('comment on table journal_chunk_%s is %L', i, 'parts of the large transactions of a journal segment');
    end loop;
end $$;

-- Journal rows at or below this position are gone; a reader that asks from below needs state sync.
create table journal_trim (
    singleton bool primary key default true check (singleton),
    trimmed_to "position" not null,
    stable hlc not null
);
insert into journal_trim values (true, 0::int8::"position", 0::int8::hlc);

-- Progress in the peer's stream: inserted by each apply commit, into one of two tables used in turn.
do $$
begin
    for i in 0..1 loop
        execute format('create table progress_%s (
            peer text not null, nonce uuid not null,
            "position" "position" not null, low hlc not null,
            seen "position" not null, seen_low hlc not null,
            acked "position" not null,
            stable_own hlc not null, stable_peer hlc not null)', i);
        execute format('comment on table progress_%s is %L', i,
            'how far the peer''s stream is applied here; the greatest row counts');
    end loop;
end $$;

create table tombstone (
    relid oid not null,
    -- key values as they travel (bytes of the codec), so that any key type works
    key bytea not null,
    hlc hlc not null,
    cells cells not null,
    -- the row's last content, one value per column as it travels
    image bytea not null,
    descriptor int4 not null,
    primary key (relid, key)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);
create index on tombstone (hlc);
comment on table tombstone is 'deleted rows, remembered until the deletion is known and settled on both nodes';

-- Columns as in tombstone: a row that comes and goes is stored alike.
create table displaced (
    relid oid not null,
    key bytea not null,
    hlc hlc not null,
    cells cells not null,
    image bytea not null,
    descriptor int4 not null,
    waits_for text not null check (waits_for in ('place', 'parent', 'check')),
    constraint_name text not null,
    since timestamptz not null,
    primary key (relid, key)
);
comment on table displaced is 'rows that are alive and cannot show, because a constraint forbids it; they come back by themselves once it does not';

-- The policy log: entries of the arbiter (the node with the lower id), wishes of the other one.
create table policy (
    -- in force from here on; of a wish, its name
    version hlc primary key,
    relid regclass not null,
    -- empty: the whole table
    columns text[] not null,
    -- the same by number: what a renamed column is found by
    attnums int2[] not null,
    conflict_type text,
    policy text not null,
    -- entries before this one are void: the table was taken out of sync by the arbiter
    reset bool not null,
    -- a policy that decides at once: part of the table's shape, set on each node before the table is paired
    fixed bool not null,
    -- the wish that this one answers
    wish hlc not null,
    -- why the wish was not granted
    refused text,
    set_by text not null,
    set_at timestamptz not null
);
create index on policy (relid);
comment on table policy is 'how conflicts are decided, from which version on; look at it through tandem.policies';

create table reinstated (
    version hlc not null,
    cell int4 not null,
    -- the write whose value was written again
    original hlc not null,
    primary key (version, cell)
);
comment on table reinstated is 'writes of first_update_wins that stand for an earlier one, until both nodes have them';

create table held (
    ordinal int8 generated always as identity primary key,
    peer text not null,
    "position" "position" not null,
    low hlc not null,
    schema_name text not null,
    table_name text not null,
    descriptor text not null,
    item bytea not null
);
create index on held (peer, schema_name, table_name, ordinal);
comment on table held is 'changes of the peer to tables that cannot take them yet (missing, or of another shape)';

create table skipped (
    peer text not null,
    "position" "position" not null,
    skipped_at timestamptz not null default now(),
    skipped_by text not null default current_user,
    error text,
    items bytea not null,
    primary key (peer, "position")
);
comment on table skipped is 'transactions that were passed over with tandem.skip(), whole';

-- A ring of parts by the time of the losing write, thirty days each, which never changes for an id: so an id
-- is unique, and a part that has run its time is truncated whole. (Partitions that come and go by the month
-- would not survive pg_dump as parts of an extension.)
create table conflict (
    conflict_id uuid not null,
    schema_name text not null,
    table_name text not null,
    conflict_type text not null,
    constraint_name text,
    key_tuple json not null,
    losing_version hlc not null,
    winning_version hlc not null,
    cells text[] not null,
    status text not null check (status in ('auto', 'open', 'resolved', 'ignored', 'superseded')),
    decision_version hlc not null,
    detected_at timestamptz not null,
    resolved_by text,
    resolved_at timestamptz,
    conflict_resolution text,
    note text,
    policy text not null,
    -- the record whole, as it travels (serde_json of tandem_model::record::Record)
    record json not null,
    -- what of it is shown: "base", "result", and one image by node id
    images json not null,
    -- by the losing version; that of version 0 is 0
    part int2 not null default 0,
    -- last change here: what retention counts from
    changed_at timestamptz not null default clock_timestamp(),
    primary key (conflict_id, part)
) partition by list (part);
create index on conflict (schema_name, table_name);
create index on conflict (detected_at);
create index on conflict (schema_name, table_name, detected_at, conflict_id) where status = 'open';
create index on conflict (changed_at) where status <> 'open';
comment on table conflict is 'one row per losing write, the same on both nodes; look at it through tandem.conflicts';
do $$
begin
    for i in 0..11 loop
        execute format('create table conflict_%1$s partition of conflict for values in (%1$s)', i);
        execute format('comment on table conflict_%s is %L', i, 'part of tandem.conflict: the losing writes of thirty days in a year');
    end loop;
end $$;

create table conflict_count (
    schema_name text not null,
    table_name text not null,
    conflict_type text not null,
    removed int8 not null,
    last_detected_at timestamptz not null,
    primary key (schema_name, table_name, conflict_type)
);
comment on table conflict_count is 'conflicts that retention has removed; counted on in tandem.stat_conflicts';

create table conflict_removed (
    conflict_id uuid primary key,
    -- serde_json of tandem_model::record::Decision
    decision json not null,
    removed_at timestamptz not null default clock_timestamp()
);
create index on conflict_removed (removed_at);
comment on table conflict_removed is 'what was decided about conflicts that retention has removed, should one be told again';
