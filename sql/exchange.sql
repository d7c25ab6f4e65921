-- What the exchange of the peer calls here, and who may. Everything else in this schema is closed to it.

do $$
begin
    if not exists (select from pg_catalog.pg_roles where rolname = 'tandem_peer') then
        create role tandem_peer nologin;
    end if;
end $$;

-- SECURITY INVOKER and without SET, or its COMMIT would fail; it reads nothing but shared memory.
create procedure wait_for_commit(after "position", timeout_ms int4)
    language c as 'MODULE_PATHNAME', 'tandem_wait_for_commit';

revoke all on procedure wait_for_commit("position", int4) from public;
revoke all on function handshake(int4, int4, text, uuid, uuid, "position") from public;
revoke all on function peer_tables() from public;
revoke all on function pull("position", int4, int4) from public;
revoke all on function peer_status() from public;

grant usage on schema tandem to tandem_peer;
grant execute on procedure wait_for_commit("position", int4) to tandem_peer;
grant execute on function handshake(int4, int4, text, uuid, uuid, "position") to tandem_peer;
grant execute on function peer_tables() to tandem_peer;
grant execute on function pull("position", int4, int4) to tandem_peer;

comment on procedure wait_for_commit("position", int4) is
    'called by the peer: waits until there is something to pull above a position, or for this many milliseconds';
comment on function handshake(int4, int4, text, uuid, uuid, "position") is
    'called by the peer: checks that the two nodes go together, and tells what this one is';
comment on function peer_tables() is 'called by the peer: the synced tables of this node as they are today';
comment on function pull("position", int4, int4) is
    'called by the peer: the stream of this node above a position, as frames of the wire codec';
comment on function peer_status() is 'what the exchange worker of this database is doing; see the view tandem.status';
