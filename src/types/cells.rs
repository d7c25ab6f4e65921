//! `tandem.cells`: text `birth=…,dead=…,3=…` (0 for an explicit 0), binary as the model encodes it. Of a cell
//! that a delete had seen `3.ended=` follows, of one that was added to `3.base=` (its version), `3.value=`
//! (the number) and for each node `3.sum=number epoch version`.
use super::hlc::message_bytes;
use pgrx::Internal;
use pgrx::callconv::{Arg, ArgAbi, BoxRet, FcInfo};
use pgrx::datum::Datum;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use pgrx::prelude::*;
use std::ffi::{CStr, CString};
use tandem_model::counter::{Counter, Tally};
use tandem_model::versions::{CellId, Versions};

/// The bytes of a `tandem.cells` value: a varlena with the layout of bytea.
pub struct SqlCells(Vec<u8>);

// SAFETY: the SQL type is a varlena without alignment, as bytea is.
unsafe impl<'fcx> ArgAbi<'fcx> for SqlCells {
    unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
        // SAFETY: strict functions only; Postgres detoasts within.
        SqlCells(unsafe { arg.unbox_arg_using_from_datum::<Vec<u8>>() }.unwrap_or_default())
    }
}

// SAFETY: as above.
unsafe impl BoxRet for SqlCells {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> Datum<'fcx> {
        // SAFETY: bytea's datum is a palloc'd varlena.
        unsafe { self.0.box_into(fcinfo) }
    }
}

// SAFETY: the mapping names a type that the extension creates.
unsafe impl SqlTranslatable for SqlCells {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(SqlCells);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("tandem.cells"));
    const RETURN_SQL: Result<ReturnsRef, ReturnsError> = Ok(ReturnsRef::One(SqlMappingRef::literal("tandem.cells")));
}

fn checked(bytes: Vec<u8>) -> SqlCells {
    if let Err(e) = Versions::decode(&bytes) {
        ereport!(
            ERROR,
            PgSqlErrorCode::ERRCODE_INVALID_BINARY_REPRESENTATION,
            format!("invalid value for type tandem.cells: {e}")
        );
    }
    SqlCells(bytes)
}

#[pg_extern(immutable, strict, parallel_safe)]
fn cells_in(input: &CStr) -> SqlCells {
    match input.to_str().ok().and_then(parse) {
        Some(versions) => {
            let mut out = Vec::new();
            versions.encode(&mut out);
            SqlCells(out)
        }
        None => {
            ereport!(
                ERROR,
                PgSqlErrorCode::ERRCODE_INVALID_TEXT_REPRESENTATION,
                format!("invalid input syntax for type tandem.cells: \"{}\"", input.to_string_lossy()),
                "The form is \"birth=VERSION,dead=VERSION,3=VERSION\"; each part may be left out."
            );
        }
    }
}

/// Reads the text form; `None` if it is none.
pub fn parse(input: &str) -> Option<Versions> {
    let mut versions = Versions::default();
    for part in input.split(',').filter(|p| !p.is_empty()) {
        let (name, value) = part.split_once('=')?;
        if let Some((cell, what)) = name.split_once('.') {
            parse_part(&mut versions, cell.parse().ok()?, what, value)?;
            continue;
        }
        let value = value.parse().ok()?;
        match name {
            "birth" => versions.birth = value,
            "dead" => versions.dead = value,
            cell => versions.set(cell.parse().ok()?, value),
        }
    }
    let mut bytes = Vec::new();
    versions.encode(&mut bytes);
    Versions::decode(&bytes).ok()
}

/// Reads what a list says of a cell besides its version.
fn parse_part(versions: &mut Versions, cell: CellId, what: &str, value: &str) -> Option<()> {
    match what {
        "ended" => versions.ended.push(cell),
        "base" => {
            let base = value.parse().ok()?;
            versions.counters.push(Counter { cell, base, value: String::new(), tallies: Vec::new() });
        }
        "value" => versions.counters.last_mut()?.value = value.to_string(),
        "sum" => {
            let mut parts = value.splitn(3, ' ');
            let (sum, epoch, last) =
                (parts.next()?.to_string(), parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
            versions.counters.last_mut()?.tallies.push(Tally { epoch, last, sum });
        }
        _ => return None,
    }
    Some(())
}

#[pg_extern(immutable, strict, parallel_safe)]
fn cells_out(value: SqlCells) -> CString {
    let mut parts = Vec::new();
    match Versions::decode(&value.0) {
        Ok(v) => {
            if v.birth.0 != 0 {
                parts.push(format!("birth={}", v.birth));
            }
            if v.dead.0 != 0 {
                parts.push(format!("dead={}", v.dead));
            }
            parts.extend(v.cells.iter().map(|(cell, version)| format!("{cell}={version}")));
            parts.extend(v.ended.iter().map(|cell| format!("{cell}.ended=")));
            for counter in &v.counters {
                let cell = counter.cell;
                parts.push(format!("{cell}.base={},{cell}.value={}", counter.base, counter.value));
                let sum = |t: &Tally| format!("{cell}.sum={} {} {}", t.sum, t.epoch, t.last);
                parts.extend(counter.tallies.iter().map(sum));
            }
        }
        Err(e) => {
            ereport!(ERROR, PgSqlErrorCode::ERRCODE_DATA_CORRUPTED, format!("stored tandem.cells cannot be read: {e}"));
        }
    }
    CString::new(parts.join(",")).unwrap_or_default()
}

#[pg_extern(immutable, strict, parallel_safe)]
fn cells_recv(mut message: Internal) -> SqlCells {
    checked(message_bytes(&mut message))
}

#[pg_extern(immutable, strict, parallel_safe)]
fn cells_send(value: SqlCells) -> Vec<u8> {
    value.0
}
