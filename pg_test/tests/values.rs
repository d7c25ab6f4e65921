//! Scenarios 44 and 45: values arrive bit by bit, large ones too.

use tandem_pg_test::{conflict, shared, tick};

#[test]
fn s44_an_unchanged_large_value_survives() {
    let pair = shared();
    pair.table("s44", "id int primary key, large text, small int");
    pair.exec("alter table s44 alter large set storage external");
    pair.a.exec("insert into s44 select 1, string_agg(md5(n::text), ''), 0 from generate_series(1, 10000) n");
    pair.sync();
    let digest = pair.a.one("select md5(large) from s44");
    pair.partition();
    pair.a.exec("update s44 set small = 1");
    pair.heal();
    pair.b.exec("update s44 set small = small + 1");
    pair.sync();
    pair.assert_rows("select md5(large), small from s44", &[&format!("{digest}|2")]);
    pair.assert_converged("s44");
    pair.assert_conflicts("s44", &[]);
}

#[test]
fn s44_a_large_value_in_conflict_is_whole_in_the_record() {
    let pair = shared();
    pair.table("s44_conflict", "id int primary key, large text, small int");
    pair.a.exec("insert into s44_conflict values (1, repeat('base', 100000), 0)");
    pair.sync();
    pair.partition();
    pair.a
        .exec("update s44_conflict set large = (select string_agg(md5(n::text), '') from generate_series(1, 5000) n)");
    tick();
    pair.b.exec("update s44_conflict set large = 'short'");
    pair.heal();
    pair.assert_rows("select large, small from s44_conflict", &["short|0"]);
    pair.assert_converged("s44_conflict");
    pair.assert_conflicts("s44_conflict", &[conflict("update_origin_differs").b(r#"{"large": "short"}"#)]);
    for (node, image) in [(&pair.a, "local"), (&pair.b, "remote")] {
        let sizes = format!(
            "select length(base_tuple->>'large'), length({image}_tuple->>'large'), md5({image}_tuple->>'large') =
                md5((select string_agg(md5(n::text), '') from generate_series(1, 5000) n))
             from tandem.conflicts where relation::text = 's44_conflict'"
        );
        assert_eq!(node.rows(&sizes), ["400000|160000|t"], "on {}", node.name);
    }
}

#[test]
fn s45_every_type_round_trips() {
    let pair = shared();
    pair.exec(
        "create type s45_mood as enum ('sad', 'it''s ok', 'happy');
         create domain s45_positive as numeric check (value > 0);
         create type s45_point as (x int, y text);
         create domain s45_points as s45_point[]",
    );
    let columns = [
        ("jsonb", r#"'{"a": [1, null, "ü\u0001"], "b": {"c": 1.50}}'"#),
        ("json", r#"'{"b" : 1,  "b": 2}'"#),
        ("int[]", "'[0:1][2:3]={{1,NULL},{3,4}}'"),
        ("text[]", r#"array['a,b', '"', '\', null, '', 'NULL']"#),
        ("int4range", "'[1,5)'"),
        ("numrange", "'(,2.50]'"),
        ("tstzrange", "'[2024-01-01 00:00:00+00,infinity)'"),
        ("int4multirange", "'{[1,3),[5,9)}'"),
        ("s45_mood", "'it''s ok'"),
        ("s45_mood[]", "'{sad,happy}'"),
        ("s45_positive", "0.10"),
        ("s45_point", "row(1, 'a \"b\", (c)')"),
        ("s45_points", "array[row(1, null)::s45_point, null]"),
        ("bytea", r"'\x00ff5c27'"),
        ("numeric", "'NaN'"),
        ("numeric", "'-Infinity'"),
        ("numeric", "1.5000"),
        ("numeric(30,10)", "12345678901234567890.0123456789"),
        ("float8", "1.7976931348623157e308"),
        ("float8", "5e-324"),
        ("float8", "'-0'"),
        ("float8", "'NaN'"),
        ("float8", "'-Infinity'"),
        ("float8", "0.1::float8 + 0.2::float8"),
        ("float4", "3.4028235e38"),
        ("timestamptz", "'infinity'"),
        ("timestamp", "'-infinity'"),
        ("timestamptz", "'4713-01-01 00:00:00+00 BC'"),
        ("timestamp(3)", "'2024-02-29 23:59:59.999'"),
        ("date", "'infinity'"),
        ("date", "'0044-03-15 BC'"),
        ("time", "'24:00:00'"),
        ("timetz", "'12:34:56.789012+05:30'"),
        ("interval", "'-1 year 2 mons -3 days 04:05:06.789'"),
        ("interval day to second", "'1 day -00:00:01'"),
        ("inet", "'2001:db8::1/64'"),
        ("cidr", "'10.1.0.0/16'"),
        ("macaddr", "'08:00:2b:01:02:03'"),
        ("macaddr8", "'08:00:2b:01:02:03:04:05'"),
        ("xml", "xml '<a b=\"c\">é</a>'"),
        ("tsvector", "'fat:2,4 cat:3A'"),
        ("tsquery", "'fat & (rat | !cat:*)'"),
        ("bit(5)", "B'10110'"),
        ("varbit", "B''"),
        ("uuid", "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"),
        ("money", "'-12.34'"),
        ("boolean", "false"),
        ("smallint", "-32768"),
        ("bigint", "9223372036854775807"),
        ("oid", "4294967295"),
        ("char(5)", "'ab'"),
        ("\"char\"", "'x'"),
        ("name", "'a name'"),
        ("varchar(3)", "'äöü'"),
        ("text", "E'tab\\t nl\\n quote'' backslash\\\\ 🐘'"),
        ("text", "''"),
        ("text", "null"),
        ("point", "'(1.5,-2)'"),
        ("line", "'{1,2,3}'"),
        ("lseg", "'[(0,0),(1,1)]'"),
        ("box", "'(1,1),(0,0)'"),
        ("path", "'((0,0),(1,1),(2,0))'"),
        ("polygon", "'((0,0),(1,1),(2,0))'"),
        ("circle", "'<(1,2),3>'"),
        ("pg_lsn", "'16/B374D848'"),
        ("jsonpath", "'$.a[*] ? (@ > 1)'"),
        ("regclass", "'pg_class'"),
    ];
    // The wheels' builds of 16 and 18 have no libxml.
    let has_xml = pair.nodes().iter().all(|node| node.try_exec("select xml '<a/>'").is_ok());
    let columns: Vec<_> = columns.into_iter().filter(|(kind, _)| has_xml || *kind != "xml").collect();
    let list = |piece: &dyn Fn(usize, (&'static str, &'static str)) -> String| -> String {
        columns.iter().enumerate().map(|(i, column)| piece(i, *column)).collect::<Vec<_>>().join(", ")
    };
    pair.table("s45", &format!("id int primary key, {}", list(&|i, (kind, _)| format!("c{i} {kind}"))));
    let values = list(&|_, (_, value)| value.to_string());

    // Inserted on one side, under settings that change how values read.
    pair.a.exec(
        "set datestyle = 'sql, dmy'; set intervalstyle = 'iso_8601'; set bytea_output = 'escape';
                 set extra_float_digits = 0; set timezone = 'Asia/Tokyo'",
    );
    pair.a.exec(&format!("insert into s45 values (1, {values})"));
    // Updated from null on the other.
    pair.b.exec("insert into s45 (id) values (2)");
    pair.sync();
    pair.b.exec(&format!("update s45 set ({}) = row({values}) where id = 2", list(&|i, _| format!("c{i}"))));
    pair.sync();
    pair.a.hang_up();
    pair.assert_rows("select count(*) from s45", &["2"]);
    pair.assert_converged("s45");
    for id in [1, 2] {
        for (i, (kind, value)) in columns.iter().enumerate() {
            // Compared by the output of a fresh session and, as a record image, bit by bit.
            let query = format!(
                "select (select r from (select s45.c{i} as v) r) *= (select r from (select ({value})::{kind} as v) r),
                     c{i}::text is not distinct from (({value})::{kind})::text
                 from s45 where id = {id}"
            );
            for node in pair.nodes() {
                assert_eq!(node.rows(&query), ["t|t"], "{kind} {value} of row {id} on {}", node.name);
            }
        }
    }
    pair.assert_conflicts("s45", &[]);
}

#[test]
fn s45_the_sessions_encoding_does_not_matter() {
    let pair = shared();
    pair.table("s45_encoding", "k text primary key, a text, v varchar(5), c char(4)");
    let mut session = pair.a.session();
    // Characters that latin9 has at other places than Unicode, and some that it hasn't at all.
    session.exec("set client_encoding = 'latin9'");
    session.exec(r"insert into s45_encoding values (U&'\20ac\+01F418', U&'\00e4\20ac', U&'\4e2d\6587', U&'\0417')");
    session.exec(r"update s45_encoding set a = U&'\+01F418' || a");
    pair.sync();
    pair.assert_rows("select k, a, v, trim(c) from s45_encoding", &["€🐘|🐘ä€|中文|З"]);
    pair.assert_converged("s45_encoding");
}
