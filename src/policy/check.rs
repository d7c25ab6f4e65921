//! Whether a policy can be set where it is wanted: the columns are there and are decided by themselves, the
//! type fits, the handler is what the table's owner may call.
use super::Wanted;
use crate::counter;
use crate::error::{Error, Result};
use crate::relation::{Column, SyncedRelation};
use pgrx::prelude::*;
use tandem_model::policy::{Misplaced, Policy, Target};

/// Errors: 0A000 for what a policy can't do there, 42703 and 42701 and 42P10 for columns, 42804 for a type,
/// 42883, 42P13 and 42501 for a handler, 22023 for part of a cell.
pub fn all(rel: &SyncedRelation, wanted: &Wanted) -> Result<()> {
    placed(wanted)?;
    let columns = columns(rel, &wanted.columns)?;
    for column in &columns {
        whole_cell(rel, wanted, column)?;
        type_fits(&wanted.policy, column)?;
    }
    match &wanted.policy {
        Policy::Custom(name) => handler(name, rel.owner).map(drop),
        _ => Ok(()),
    }
}

fn placed(wanted: &Wanted) -> Result<()> {
    let target = Target { columns: !wanted.columns.is_empty(), conflict_type: wanted.conflict_type };
    let fits = match &wanted.policy {
        // The way back from a policy that was set on a type.
        Policy::LastUpdateWins if target.conflict_type.is_some() => Policy::Manual.fits(target),
        // A handler says which columns to set: there must be two rows to choose from.
        Policy::Custom(_) => Policy::FirstUpdateWins.fits(target),
        policy => policy.fits(target),
    };
    fits.map_err(|why| {
        let hint = match why {
            Misplaced::NeedsColumns => "Name them: columns => '{balance}'.",
            Misplaced::NeedsTable => "Leave out columns.",
            Misplaced::NotByType => "Leave out conflict_type.",
            Misplaced::OtherType(_) => {
                "Its conflict types are insert_exists and update_origin_differs; manual is for the others, too."
            }
        };
        Error::operator(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("policy {} {why}", wanted.policy.name()),
            hint,
        )
    })
}

fn columns<'a>(rel: &'a SyncedRelation, names: &[String]) -> Result<Vec<&'a Column>> {
    let mut found: Vec<&Column> = Vec::new();
    for name in names {
        let Some(column) = rel.columns.iter().find(|c| c.name == *name) else {
            return Err(Error::operator(
                PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
                format!("column \"{name}\" of table {} does not exist", rel.display_name()),
                "Name columns of the table that are kept in sync; generated ones are not.",
            ));
        };
        if column.key_ordinal.is_some() {
            return Err(Error::operator(
                PgSqlErrorCode::ERRCODE_INVALID_COLUMN_REFERENCE,
                format!("column \"{name}\" belongs to the key of table {}", rel.display_name()),
                "A key is never in conflict with itself: name other columns.",
            ));
        }
        if found.iter().any(|c| c.attnum == column.attnum) {
            return Err(Error::operator(
                PgSqlErrorCode::ERRCODE_DUPLICATE_COLUMN,
                format!("column \"{name}\" is named twice"),
                "Name each column once.",
            ));
        }
        found.push(column);
    }
    Ok(found)
}

/// What is decided as one has one policy; what compares values wants a column by itself.
fn whole_cell(rel: &SyncedRelation, wanted: &Wanted, column: &Column) -> Result<()> {
    let others: Vec<&str> =
        rel.cell_columns(column.cell).map(|c| c.name.as_str()).filter(|n| *n != column.name).collect();
    let alone = matches!(wanted.policy, Policy::Greatest | Policy::Least | Policy::SetUnion | Policy::Counter);
    if alone && let Some(other) = others.first() {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("column \"{}\" is decided together with \"{other}\"", column.name),
            format!(
                "Policy {} is for a column that is a cell by itself: see cells in tandem.tables.",
                wanted.policy.name()
            ),
        ));
    }
    match others.iter().find(|name| !wanted.columns.iter().any(|c| c == *name)) {
        None => Ok(()),
        Some(missing) => Err(Error::operator(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("column \"{}\" is decided together with \"{missing}\"", column.name),
            "Name all columns of a cell: they have one policy.",
        )),
    }
}

fn type_fits(policy: &Policy, column: &Column) -> Result<()> {
    let wants = match policy {
        Policy::Greatest | Policy::Least if !has_order(column.typid) => "a type with an order",
        Policy::SetUnion if !is_set(column.typid) => "an array of comparable elements, or jsonb",
        Policy::Counter if !counter::is_number(column.typid) => "smallint, integer, bigint or numeric",
        _ => return Ok(()),
    };
    Err(Error::operator(
        PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
        format!("column \"{}\" is of type {}", column.name, column.type_name),
        format!("Policy {} wants {wants}.", policy.name()),
    ))
}

/// True if the type has a default order.
fn has_order(typid: pg_sys::Oid) -> bool {
    // SAFETY: an entry of this backend's cache.
    unsafe { (*pg_sys::lookup_type_cache(typid, pg_sys::TYPECACHE_CMP_PROC as i32)).cmp_proc != pg_sys::InvalidOid }
}

/// Elements are told apart by sorting or hashing them.
fn is_set(typid: pg_sys::Oid) -> bool {
    // SAFETY: a catalog lookup.
    let element = unsafe { pg_sys::get_element_type(typid) };
    typid == pg_sys::JSONBOID || (element != pg_sys::InvalidOid && has_order(element))
}

/// Finds the function of a name under the present search path, and returns its full name.
pub fn handler(name: &str, owner: pg_sys::Oid) -> Result<String> {
    const QUERY: &str = "
        select pg_catalog.quote_ident(n.nspname) operator(pg_catalog.||) '.' operator(pg_catalog.||) pg_catalog.quote_ident(p.proname),
               p.prokind operator(pg_catalog.=) 'f' and not p.proretset and p.pronargs operator(pg_catalog.=) 1
               and p.proargtypes[0] operator(pg_catalog.=) 'pg_catalog.json'::pg_catalog.regtype::pg_catalog.oid
               and p.prorettype operator(pg_catalog.=) 'pg_catalog.json'::pg_catalog.regtype::pg_catalog.oid,
               pg_catalog.has_function_privilege($2, p.oid, 'execute') and pg_catalog.has_schema_privilege($2, n.oid, 'usage')
        from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid operator(pg_catalog.=) p.pronamespace
        where p.oid operator(pg_catalog.=) coalesce(
            case when $1 operator(pg_catalog.~) '\\(' then pg_catalog.to_regprocedure($1)
                 else pg_catalog.to_regprocedure($1 operator(pg_catalog.||) '(pg_catalog.json)') end::pg_catalog.oid,
            case when $1 operator(pg_catalog.~) '\\(' then null else pg_catalog.to_regproc($1)::pg_catalog.oid end)";
    let found = Spi::connect(|client| -> std::result::Result<_, pgrx::spi::Error> {
        match client.select(QUERY, Some(1), &[name.into(), owner.into()])?.next() {
            None => Ok(None),
            Some(row) => Ok(row.get::<String>(1)?.map(|n| (n, row.get::<bool>(2).ok(), row.get::<bool>(3).ok()))),
        }
    })?;
    let hint = "It takes one json and returns json: CREATE FUNCTION app.merge(conflict json) RETURNS json …";
    let Some((full_name, fits, allowed)) = found else {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_UNDEFINED_FUNCTION,
            format!("function {name} does not exist"),
            hint,
        ));
    };
    if fits.flatten() != Some(true) {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_INVALID_FUNCTION_DEFINITION,
            format!("function {full_name} is not a handler of conflicts"),
            hint,
        ));
    }
    if allowed.flatten() != Some(true) {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            format!("the table's owner may not call function {full_name}"),
            format!("GRANT EXECUTE ON FUNCTION {full_name}(json) TO the owner, and USAGE on its schema."),
        ));
    }
    Ok(full_name)
}
