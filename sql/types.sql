-- The types: tandem.hlc (a version), tandem.position (a commit), tandem.cells (what a row lists of its
-- versions). hlc and position are 8-byte integers by value and use Postgres's own int8 support functions.

create type hlc (
    input = hlc_in, output = hlc_out, receive = hlc_recv, send = hlc_send, like = pg_catalog.int8
);
comment on type hlc is
    'hybrid logical clock version of a row: milliseconds since 2024-01-01, counter, node; 0 is "before pairing"';

create type "position" (
    input = position_in, output = position_out, receive = position_recv, send = position_send, like = pg_catalog.int8
);
comment on type "position" is
    'place of a transaction in the stream of its node: the hybrid logical clock reading of its commit';

create type cells (
    input = cells_in, output = cells_out, receive = cells_recv, send = cells_send,
    internallength = variable, storage = extended, alignment = int4
);
comment on type cells is
    'the versions of a row that are not yet stable: birth, dead, and one per cell';

create function hlc_eq(hlc, hlc) returns bool language internal immutable strict parallel safe as 'int8eq';
create function hlc_ne(hlc, hlc) returns bool language internal immutable strict parallel safe as 'int8ne';
create function hlc_lt(hlc, hlc) returns bool language internal immutable strict parallel safe as 'int8lt';
create function hlc_le(hlc, hlc) returns bool language internal immutable strict parallel safe as 'int8le';
create function hlc_gt(hlc, hlc) returns bool language internal immutable strict parallel safe as 'int8gt';
create function hlc_ge(hlc, hlc) returns bool language internal immutable strict parallel safe as 'int8ge';
create function hlc_cmp(hlc, hlc) returns int4 language internal immutable strict parallel safe as 'btint8cmp';
create function hlc_hash(hlc) returns int4 language internal immutable strict parallel safe as 'hashint8';
create function hlc_hash_extended(hlc, int8) returns int8 language internal immutable strict parallel safe as 'hashint8extended';
create function position_eq("position", "position") returns bool language internal immutable strict parallel safe as 'int8eq';
create function position_ne("position", "position") returns bool language internal immutable strict parallel safe as 'int8ne';
create function position_lt("position", "position") returns bool language internal immutable strict parallel safe as 'int8lt';
create function position_le("position", "position") returns bool language internal immutable strict parallel safe as 'int8le';
create function position_gt("position", "position") returns bool language internal immutable strict parallel safe as 'int8gt';
create function position_ge("position", "position") returns bool language internal immutable strict parallel safe as 'int8ge';
create function position_cmp("position", "position") returns int4 language internal immutable strict parallel safe as 'btint8cmp';
create function position_hash("position") returns int4 language internal immutable strict parallel safe as 'hashint8';
create function position_hash_extended("position", int8) returns int8 language internal immutable strict parallel safe as 'hashint8extended';

create operator = (leftarg = hlc, rightarg = hlc, function = hlc_eq, commutator = =, negator = <>,
                   restrict = eqsel, join = eqjoinsel, hashes, merges);
create operator <> (leftarg = hlc, rightarg = hlc, function = hlc_ne, commutator = <>, negator = =,
                    restrict = neqsel, join = neqjoinsel);
create operator < (leftarg = hlc, rightarg = hlc, function = hlc_lt, commutator = >, negator = >=,
                   restrict = scalarltsel, join = scalarltjoinsel);
create operator <= (leftarg = hlc, rightarg = hlc, function = hlc_le, commutator = >=, negator = >,
                    restrict = scalarlesel, join = scalarlejoinsel);
create operator > (leftarg = hlc, rightarg = hlc, function = hlc_gt, commutator = <, negator = <=,
                   restrict = scalargtsel, join = scalargtjoinsel);
create operator >= (leftarg = hlc, rightarg = hlc, function = hlc_ge, commutator = <=, negator = <,
                    restrict = scalargesel, join = scalargejoinsel);
create operator class hlc_ops default for type hlc using btree as
    operator 1 <, operator 2 <=, operator 3 =, operator 4 >=, operator 5 >, function 1 hlc_cmp(hlc, hlc);
create operator class hlc_ops default for type hlc using hash as
    operator 1 =, function 1 hlc_hash(hlc), function 2 hlc_hash_extended(hlc, int8);

create operator = (leftarg = "position", rightarg = "position", function = position_eq, commutator = =, negator = <>,
                   restrict = eqsel, join = eqjoinsel, hashes, merges);
create operator <> (leftarg = "position", rightarg = "position", function = position_ne, commutator = <>, negator = =,
                    restrict = neqsel, join = neqjoinsel);
create operator < (leftarg = "position", rightarg = "position", function = position_lt, commutator = >, negator = >=,
                   restrict = scalarltsel, join = scalarltjoinsel);
create operator <= (leftarg = "position", rightarg = "position", function = position_le, commutator = >=, negator = >,
                    restrict = scalarlesel, join = scalarlejoinsel);
create operator > (leftarg = "position", rightarg = "position", function = position_gt, commutator = <, negator = <=,
                   restrict = scalargtsel, join = scalargtjoinsel);
create operator >= (leftarg = "position", rightarg = "position", function = position_ge, commutator = <=, negator = <,
                    restrict = scalargesel, join = scalargejoinsel);
create operator class position_ops default for type "position" using btree as
    operator 1 <, operator 2 <=, operator 3 =, operator 4 >=, operator 5 >, function 1 position_cmp("position", "position");
create operator class position_ops default for type "position" using hash as
    operator 1 =, function 1 position_hash("position"), function 2 position_hash_extended("position", int8);

create function hlc_max(hlc, hlc) returns hlc language internal immutable strict parallel safe as 'int8larger';
create function hlc_min(hlc, hlc) returns hlc language internal immutable strict parallel safe as 'int8smaller';
create function position_max("position", "position") returns "position" language internal immutable strict parallel safe as 'int8larger';
create function position_min("position", "position") returns "position" language internal immutable strict parallel safe as 'int8smaller';
create aggregate max(hlc) (sfunc = hlc_max, stype = hlc, combinefunc = hlc_max, sortop = >, parallel = safe);
create aggregate min(hlc) (sfunc = hlc_min, stype = hlc, combinefunc = hlc_min, sortop = <, parallel = safe);
create aggregate max("position") (sfunc = position_max, stype = "position", combinefunc = position_max, sortop = >, parallel = safe);
create aggregate min("position") (sfunc = position_min, stype = "position", combinefunc = position_min, sortop = <, parallel = safe);

create cast (hlc as int8) without function;
create cast (int8 as hlc) without function;
create cast ("position" as int8) without function;
create cast (int8 as "position") without function;
create cast (hlc as timestamptz) with function hlc_time(hlc);
create cast ("position" as timestamptz) with function position_time("position");

comment on function hlc_time(hlc) is 'wall-clock part of a version, to the millisecond';
comment on function hlc_counter(hlc) is 'counter part of a version';
comment on function hlc_node(hlc) is 'id of the node that wrote a version; 0 for "before pairing"';
