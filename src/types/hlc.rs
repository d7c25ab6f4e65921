//! `tandem.hlc` and `tandem.position`: text and binary input and output, and their parts.
//! Comparison, hashing and sorting are Postgres's own int8 functions (see `sql/types.sql`): both values
//! keep the top bit clear until the year 2093.
use pgrx::Internal;
use pgrx::callconv::{Arg, ArgAbi, BoxRet, FcInfo};
use pgrx::datum::Datum;
use pgrx::nullable::Nullable;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use pgrx::prelude::*;
use std::ffi::{CStr, CString};
use tandem_model::hlc::{Hlc, Position};

/// A version as SQL sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SqlHlc(pub Hlc);

/// A position as SQL sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SqlPosition(pub Position);

macro_rules! eight_bytes_by_value {
    ($rust:ident, $inner:ident, $sql:literal, $type_name:literal) => {
        impl IntoDatum for $rust {
            fn into_datum(self) -> Option<pg_sys::Datum> {
                Some(pg_sys::Datum::from(self.0.0 as i64))
            }
            fn type_oid() -> pg_sys::Oid {
                crate::pg::names::type_oid($type_name)
            }
        }

        impl FromDatum for $rust {
            unsafe fn from_polymorphic_datum(datum: pg_sys::Datum, is_null: bool, _: pg_sys::Oid) -> Option<Self> {
                (!is_null).then(|| $rust($inner(datum.value() as u64)))
            }
        }

        // SAFETY: the SQL type is 8 bytes by value, exactly what the datum holds.
        unsafe impl<'fcx> ArgAbi<'fcx> for $rust {
            unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
                // SAFETY: the caller has checked that the argument is not null.
                match unsafe { arg.unbox_arg_using_from_datum::<$rust>() } {
                    Some(value) => value,
                    None => pgrx::error!(concat!("argument of type ", $sql, " must not be null")),
                }
            }
            unsafe fn unbox_nullable_arg(arg: Arg<'_, 'fcx>) -> Nullable<Self> {
                // SAFETY: null is a case of its own.
                unsafe { arg.unbox_arg_using_from_datum::<$rust>() }.into()
            }
        }

        // SAFETY: as above.
        unsafe impl BoxRet for $rust {
            unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> Datum<'fcx> {
                // SAFETY: a by-value datum needs no memory.
                unsafe { fcinfo.return_raw_datum(pg_sys::Datum::from(self.0.0 as i64)) }
            }
        }

        // SAFETY: the mapping names a type that the extension creates.
        unsafe impl SqlTranslatable for $rust {
            const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!($rust);
            const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
            const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal($sql));
            const RETURN_SQL: Result<ReturnsRef, ReturnsError> = Ok(ReturnsRef::One(SqlMappingRef::literal($sql)));
        }
    };
}

eight_bytes_by_value!(SqlHlc, Hlc, "tandem.hlc", "hlc");
eight_bytes_by_value!(SqlPosition, Position, "tandem.position", "position");

fn text(input: &CStr) -> &str {
    input.to_str().unwrap_or("")
}

/// Raises 22P02 as Postgres's own types do.
fn invalid_text(type_name: &str, input: &CStr) -> ! {
    ereport!(
        ERROR,
        PgSqlErrorCode::ERRCODE_INVALID_TEXT_REPRESENTATION,
        format!("invalid input syntax for type {type_name}: \"{}\"", input.to_string_lossy()),
        "The form is \"2026-11-23 15:45:12.345Z/17@1\": time in UTC, counter, node; or 0."
    );
}

#[pg_extern(immutable, strict, parallel_safe)]
fn hlc_in(input: &CStr) -> SqlHlc {
    match text(input).parse() {
        Ok(v) => SqlHlc(v),
        Err(_) => invalid_text("tandem.hlc", input),
    }
}

#[pg_extern(immutable, strict, parallel_safe)]
fn hlc_out(v: SqlHlc) -> CString {
    CString::new(v.0.to_string()).unwrap_or_default()
}

#[pg_extern(immutable, strict, parallel_safe)]
fn hlc_recv(mut message: Internal) -> SqlHlc {
    SqlHlc(Hlc(receive(&mut message, "tandem.hlc")))
}

#[pg_extern(immutable, strict, parallel_safe)]
fn hlc_send(v: SqlHlc) -> Vec<u8> {
    v.0.0.to_be_bytes().to_vec()
}

#[pg_extern(immutable, strict, parallel_safe)]
fn position_in(input: &CStr) -> SqlPosition {
    match text(input).parse() {
        Ok(v) => SqlPosition(v),
        Err(_) => invalid_text("tandem.position", input),
    }
}

#[pg_extern(immutable, strict, parallel_safe)]
fn position_out(v: SqlPosition) -> CString {
    CString::new(v.0.to_string()).unwrap_or_default()
}

#[pg_extern(immutable, strict, parallel_safe)]
fn position_recv(mut message: Internal) -> SqlPosition {
    SqlPosition(Position(receive(&mut message, "tandem.position")))
}

#[pg_extern(immutable, strict, parallel_safe)]
fn position_send(v: SqlPosition) -> Vec<u8> {
    v.0.0.to_be_bytes().to_vec()
}

/// The message of a receive function, read to its end.
pub(super) fn message_bytes(message: &mut Internal) -> Vec<u8> {
    // SAFETY: a receive function's first argument is a StringInfo, says the type's definition.
    let buffer = unsafe { message.get_mut::<pg_sys::StringInfoData>() };
    let Some(buffer) = buffer else { return Vec::new() };
    let (start, end) = (buffer.cursor.max(0) as usize, buffer.len.max(0) as usize);
    // SAFETY: data holds len bytes, and the cursor is within them.
    let bytes = unsafe { std::slice::from_raw_parts(buffer.data.cast::<u8>().add(start), end - start) }.to_vec();
    buffer.cursor = buffer.len;
    bytes
}

fn receive(message: &mut Internal, type_name: &str) -> u64 {
    let bytes = message_bytes(message);
    match <[u8; 8]>::try_from(bytes.as_slice()).map(u64::from_be_bytes) {
        Ok(v) if v >> 63 == 0 => v,
        _ => {
            ereport!(
                ERROR,
                PgSqlErrorCode::ERRCODE_INVALID_BINARY_REPRESENTATION,
                format!("invalid binary value for type {type_name}")
            );
        }
    }
}

/// Wall-clock part, to the millisecond.
#[pg_extern(immutable, strict, parallel_safe)]
fn hlc_time(v: SqlHlc) -> TimestampWithTimeZone {
    unix_millis(v.0.unix_millis())
}

/// Wall-clock part, to the millisecond.
#[pg_extern(immutable, strict, parallel_safe)]
fn position_time(v: SqlPosition) -> TimestampWithTimeZone {
    unix_millis(Hlc(v.0.0).unix_millis())
}

#[pg_extern(immutable, strict, parallel_safe)]
fn hlc_counter(v: SqlHlc) -> i32 {
    v.0.counter() as i32
}

#[pg_extern(immutable, strict, parallel_safe)]
fn hlc_node(v: SqlHlc) -> i32 {
    i32::from(v.0.node().0)
}

/// Milliseconds since the Unix epoch as Postgres's microseconds since 2000-01-01.
pub fn unix_millis(ms: i64) -> TimestampWithTimeZone {
    const UNIX_TO_POSTGRES_MS: i64 = 946_684_800_000;
    TimestampWithTimeZone::try_from((ms - UNIX_TO_POSTGRES_MS) * 1000)
        .unwrap_or_else(|_| TimestampWithTimeZone::negative_infinity())
}
