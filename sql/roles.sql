-- The roles, shared by all databases of the server: created if absent, and not dropped with the extension.
do $$
declare
    role text;
begin
    foreach role in array array['tandem_admin', 'tandem_peer', 'tandem_reader'] loop
        begin
            if not exists (select from pg_catalog.pg_roles where rolname = role) then
                execute format('create role %I nologin', role);
            end if;
        exception
            -- Another database was faster.
            when duplicate_object or unique_violation then null;
        end;
    end loop;
end $$;
