//! Tables that are kept in sync: taking one in, and letting it go.
use super::{advice, answer, digest, node};
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use crate::relation::{self, SyncedRelation};
use pgrx::prelude::*;
use pgrx::spi::{quote_identifier, quote_qualified_identifier};
use pgrx::{JsonB, PgRelation};
use tandem_model::orphan::OnFk;

/// Adds a table: its rows of today count as version 0, its changes are captured from this commit on.
#[pg_extern]
fn add_table(
    rel: PgRelation,
    granularity: default!(&str, "'column'"),
    cells: default!(Option<JsonB>, "null"),
    on_fk: default!(&str, "'revive'"),
) {
    let relid = rel.oid();
    // ALTER TABLE refuses a table that this session holds open.
    drop(rel);
    answer(add(relid, granularity, cells.as_ref(), on_fk));
    advice::about(relid);
    crate::shmem::entry().bump_generation();
}

/// Adds every table of a schema that can be kept in sync and is not yet; warns of those that cannot.
#[pg_extern(sql = "create function add_tables_in_schema(schema text) returns setof regclass
    strict language c as 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn add_tables_in_schema(schema: &str) -> SetOfIterator<'static, pg_sys::Oid> {
    SetOfIterator::new(answer(add_schema(schema)))
}

/// Lets a table go: triggers and columns of Tandem are dropped, its rows and its history stay.
#[pg_extern]
fn remove_table(rel: PgRelation) {
    let (relid, name) = (rel.oid(), quote_qualified_identifier(rel.namespace(), rel.name()));
    drop(rel);
    answer(remove(relid, &name));
    crate::shmem::entry().bump_generation();
}

const TRIGGERS: [(&str, &str, &str); 4] = [
    ("~tandem_stamp", "before insert or update on {} for each row", "stamp"),
    ("~tandem_delete", "before delete on {} for each row", "stamp_delete"),
    ("!tandem_capture", "after insert or update or delete on {} for each row", "capture"),
    ("!tandem_truncate", "after truncate on {} for each statement", "capture_truncate"),
];

fn add(relid: pg_sys::Oid, granularity: &str, cells: Option<&JsonB>, on_fk: &str) -> Result<()> {
    node::require()?;
    let on_fk: OnFk = on_fk.parse().map_err(|_| {
        Error::operator(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("on_fk \"{on_fk}\" is not known"),
            "It is 'revive' (the parent lives again), 'cascade' (the row is deleted) or 'report' (the row waits).",
        )
    })?;
    require_read_committed()?;
    let granularity = match cells {
        Some(_) => "cells",
        None => granularity,
    };
    let describe = || relation::describe(relid, granularity, cells.map(|c| &c.0));
    let name = describe().map(|r| qualified(&r))?;
    require_owner(relid, &name)?;
    if is_synced(relid)? {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_DUPLICATE_OBJECT,
            format!("table {name} is already kept in sync"),
            format!("To change how, take it out first, on both servers: SELECT tandem.remove_table('{name}');"),
        ));
    }
    Spi::run(&format!("lock table only {name} in share mode"))?;
    // Again, now that nobody can change it.
    let relation = describe()?;
    require_unmarked(&relation)?;
    let content = digest::of(&relation)?;
    install(&name)?;
    let _catalog = ActingAs::superuser();
    Spi::run_with_args(
        "insert into tandem.synced_table (relid, granularity, cells, initial_rows, initial_digest, on_fk)
         values ($1, $2, $3, $4, $5, $6)",
        &[
            relid.into(),
            granularity.into(),
            cells.map(|c| JsonB(c.0.clone())).into(),
            content.rows.into(),
            content.sum.into(),
            on_fk.name().into(),
        ],
    )?;
    Ok(())
}

/// The columns and triggers of a synced table, made by its owner.
fn install(name: &str) -> Result<()> {
    Spi::run(&format!(
        "alter table {name} add column _hlc tandem.hlc not null default '0', add column _cells tandem.cells"
    ))?;
    for (trigger, event, function) in TRIGGERS {
        let trigger = quote_identifier(trigger);
        let event = event.replace("{}", name);
        Spi::run(&format!("create trigger {trigger} {event} execute function tandem.{function}()"))?;
        Spi::run(&format!("alter table {name} enable always trigger {trigger}"))?;
    }
    Ok(())
}

fn add_schema(schema: &str) -> Result<Vec<pg_sys::Oid>> {
    node::require()?;
    let mut added = Vec::new();
    for relid in candidates(schema)? {
        match add(relid, "column", None, OnFk::default().name()) {
            Ok(()) => added.push(relid),
            Err(e) => advice::warn(&format!("skipped: {}", e.message), e.hint.as_deref()),
        }
    }
    // Only now is it known which of them are in.
    added.iter().for_each(|relid| advice::about(*relid));
    crate::shmem::entry().bump_generation();
    Ok(added)
}

/// Tables of a schema that are not in sync; views and the like are not meant.
fn candidates(schema: &str) -> Result<Vec<pg_sys::Oid>> {
    let _catalog = ActingAs::superuser();
    if Spi::get_one_with_args::<bool>("select exists (select from pg_namespace where nspname = $1)", &[schema.into()])?
        != Some(true)
    {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_INVALID_SCHEMA_NAME,
            format!("schema \"{schema}\" does not exist"),
            "SELECT tandem.add_tables_in_schema('public');",
        ));
    }
    let query = "select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace
                 where n.nspname = $1 and c.relkind in ('r', 'p') and not c.relispartition
                   and not exists (select from tandem.synced_table s where s.relid = c.oid)
                 order by c.relname collate \"C\"";
    let found = Spi::connect(|client| -> std::result::Result<Vec<_>, pgrx::spi::Error> {
        let rows = client.select(query, None, &[schema.into()])?;
        rows.filter_map(|row| row.get::<pg_sys::Oid>(1).transpose()).collect()
    })?;
    Ok(found)
}

fn remove(relid: pg_sys::Oid, name: &str) -> Result<()> {
    require_owner(relid, name)?;
    if !is_synced(relid)? {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("table {name} is not kept in sync"),
            "SELECT * FROM tandem.tables; shows those that are.",
        ));
    }
    let removed_by = Spi::get_one::<String>("select session_user::text")?.unwrap_or_default();
    crate::policy::reset(relid, &removed_by)?;
    for (trigger, ..) in TRIGGERS {
        Spi::run(&format!("drop trigger if exists {} on {name}", quote_identifier(trigger)))?;
    }
    Spi::run(&format!("alter table {name} drop column if exists _hlc, drop column if exists _cells"))?;
    let _catalog = ActingAs::superuser();
    let displaced = "select count(*) from tandem.displaced where relid = $1";
    let displaced = Spi::get_one_with_args::<i64>(displaced, &[relid.into()])?.unwrap_or(0);
    if displaced > 0 {
        advice::warn(
            &format!("{displaced} rows of table {name} that a constraint kept out of it are not in it now"),
            Some("Their content stands in tandem.conflicts."),
        );
    }
    for forget in [
        "delete from tandem.held h using pg_class c, pg_namespace n
         where c.oid = $1 and n.oid = c.relnamespace and h.schema_name = n.nspname and h.table_name = c.relname",
        "delete from tandem.tombstone where relid = $1",
        "delete from tandem.displaced where relid = $1",
        "delete from tandem.synced_table where relid = $1",
    ] {
        Spi::run_with_args(forget, &[relid.into()])?;
    }
    Ok(())
}

fn qualified(relation: &SyncedRelation) -> String {
    quote_qualified_identifier(&relation.schema, &relation.table)
}

fn is_synced(relid: pg_sys::Oid) -> Result<bool> {
    let _catalog = ActingAs::superuser();
    let query = "select exists (select from tandem.synced_table where relid = $1)";
    Ok(Spi::get_one_with_args::<bool>(query, &[relid.into()])? == Some(true))
}

/// A snapshot older than the lock would miss rows.
fn require_read_committed() -> Result<()> {
    // SAFETY: a plain variable of this backend.
    if unsafe { pg_sys::XactIsoLevel } <= pg_sys::XACT_READ_COMMITTED as i32 {
        return Ok(());
    }
    Err(Error::operator(
        PgSqlErrorCode::ERRCODE_ACTIVE_SQL_TRANSACTION,
        "a table cannot be added in a transaction that keeps its snapshot",
        "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; first.",
    ))
}

/// Raises 42501 unless the caller has the rights of the table's owner.
pub fn require_owner(relid: pg_sys::Oid, name: &str) -> Result<()> {
    let query = "select pg_catalog.pg_has_role(relowner, 'usage') from pg_catalog.pg_class where oid = $1";
    match Spi::get_one_with_args::<bool>(query, &[relid.into()])? {
        Some(true) => Ok(()),
        _ => Err(Error::operator(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            format!("must be owner of table {name}"),
            "SET ROLE to the table's owner, who must be a member of tandem_admin as well.",
        )),
    }
}

/// Columns of these names are ours alone.
fn require_unmarked(relation: &SyncedRelation) -> Result<()> {
    if relation.hlc_attnum == 0 && relation.cells_attnum == 0 {
        return Ok(());
    }
    let name = qualified(relation);
    Err(Error::operator(
        PgSqlErrorCode::ERRCODE_DUPLICATE_COLUMN,
        format!("table {name} has a column _hlc or _cells already"),
        format!(
            "ALTER TABLE {name} DROP COLUMN IF EXISTS _hlc, DROP COLUMN IF EXISTS _cells; if it is a copy of a synced table."
        ),
    ))
}
