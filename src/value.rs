//! Values on their way: Postgres datums to bytes and back, to JSON for the conflict record and back.
//!
//! Text-like types travel as their bytes in the server's encoding (their send functions would convert to
//! the session's client_encoding); built-in types whose send function depends on nothing travel in
//! binary; all others as text under pinned settings, since their oids differ between servers.
use crate::error::{Error, Result};
use crate::pg::settings::Local;
use crate::relation::Column;
use pgrx::prelude::*;
use std::cell::RefCell;
use std::ffi::{CStr, CString};
use tandem_model::descriptor::Transport;

/// How the values of a type are written and read, with the functions looked up once.
pub struct Codec {
    pub transport: Transport,
    /// Text form depends on settings that must be pinned.
    pinned: bool,
    typid: pg_sys::Oid,
    length: i16,
    by_value: bool,
    category: u8,
    ioparam: pg_sys::Oid,
    receive_ioparam: pg_sys::Oid,
    functions: RefCell<Functions>,
}

struct Functions {
    output: pg_sys::FmgrInfo,
    input: pg_sys::FmgrInfo,
    /// Only for binary transport.
    send: pg_sys::FmgrInfo,
    receive: pg_sys::FmgrInfo,
}

const RAW: &[pg_sys::Oid] = &[pg_sys::TEXTOID, pg_sys::VARCHAROID, pg_sys::BPCHAROID];

/// Built-in types whose send function depends on no setting and no encoding.
const BINARY: &[pg_sys::Oid] = &[
    pg_sys::BOOLOID,
    pg_sys::BYTEAOID,
    pg_sys::INT2OID,
    pg_sys::INT4OID,
    pg_sys::INT8OID,
    pg_sys::OIDOID,
    pg_sys::FLOAT4OID,
    pg_sys::FLOAT8OID,
    pg_sys::NUMERICOID,
    pg_sys::MONEYOID,
    pg_sys::UUIDOID,
    pg_sys::DATEOID,
    pg_sys::TIMEOID,
    pg_sys::TIMETZOID,
    pg_sys::TIMESTAMPOID,
    pg_sys::TIMESTAMPTZOID,
    pg_sys::INTERVALOID,
    pg_sys::INETOID,
    pg_sys::CIDROID,
    pg_sys::MACADDROID,
    pg_sys::MACADDR8OID,
    pg_sys::BITOID,
    pg_sys::VARBITOID,
    pg_sys::POINTOID,
    pg_sys::LSEGOID,
    pg_sys::PATHOID,
    pg_sys::BOXOID,
    pg_sys::POLYGONOID,
    pg_sys::LINEOID,
    pg_sys::CIRCLEOID,
    pg_sys::PG_LSNOID,
    pg_sys::INT4RANGEOID,
    pg_sys::INT8RANGEOID,
    pg_sys::NUMRANGEOID,
    pg_sys::TSRANGEOID,
    pg_sys::TSTZRANGEOID,
    pg_sys::DATERANGEOID,
    pg_sys::INT4MULTIRANGEOID,
    pg_sys::INT8MULTIRANGEOID,
    pg_sys::NUMMULTIRANGEOID,
    pg_sys::TSMULTIRANGEOID,
    pg_sys::TSTZMULTIRANGEOID,
    pg_sys::DATEMULTIRANGEOID,
];

/// Types that travel as text and whose text depends on no setting.
const PLAIN_TEXT: &[pg_sys::Oid] = &[
    pg_sys::JSONOID,
    pg_sys::JSONBOID,
    pg_sys::NAMEOID,
    pg_sys::TEXTARRAYOID,
    pg_sys::VARCHARARRAYOID,
    pg_sys::TSVECTOROID,
    pg_sys::TSQUERYOID,
    pg_sys::CHAROID,
    pg_sys::XMLOID,
];

impl Codec {
    /// Looks up a type. Errors (0A000) for one without input and output functions.
    pub fn of(typid: pg_sys::Oid) -> Result<Codec> {
        let mut length = 0;
        let mut by_value = false;
        let mut category = 0;
        let mut preferred = false;
        // SAFETY: catalog lookups that write to the given places and raise if the type is gone.
        let element = unsafe {
            pg_sys::get_typlenbyval(typid, &mut length, &mut by_value);
            pg_sys::get_type_category_preferred(typid, &mut category, &mut preferred);
            pg_sys::get_element_type(typid)
        };
        let binary_element = element != pg_sys::InvalidOid && BINARY.contains(&element);
        let transport = if RAW.contains(&typid) {
            Transport::Raw
        } else if BINARY.contains(&typid) || binary_element {
            Transport::Binary
        } else {
            Transport::Text
        };
        // SAFETY: a catalog lookup.
        let is_enum = unsafe { pg_sys::get_typtype(typid) } as u8 == pg_sys::TYPTYPE_ENUM;
        let (functions, ioparam, receive_ioparam) = Functions::of(typid, transport)?;
        Ok(Codec {
            transport,
            pinned: transport == Transport::Text && !PLAIN_TEXT.contains(&typid) && !is_enum,
            typid,
            length,
            by_value,
            category: category as u8,
            ioparam,
            receive_ioparam,
            functions: RefCell::new(functions),
        })
    }
}

impl Functions {
    fn of(typid: pg_sys::Oid, transport: Transport) -> Result<(Functions, pg_sys::Oid, pg_sys::Oid)> {
        let mut functions = Functions {
            output: pg_sys::FmgrInfo::default(),
            input: pg_sys::FmgrInfo::default(),
            send: pg_sys::FmgrInfo::default(),
            receive: pg_sys::FmgrInfo::default(),
        };
        let (mut varlena, mut ioparam, mut receive_ioparam) = (false, pg_sys::InvalidOid, pg_sys::InvalidOid);
        let mut oid = pg_sys::InvalidOid;
        // SAFETY: catalog lookups that raise if the type has no such function; what fmgr_info keeps lives as
        // long as the backend, like the relation cache that owns this.
        unsafe {
            let keep = pg_sys::TopMemoryContext;
            pg_sys::getTypeOutputInfo(typid, &mut oid, &mut varlena);
            pg_sys::fmgr_info_cxt(oid, &mut functions.output, keep);
            pg_sys::getTypeInputInfo(typid, &mut oid, &mut ioparam);
            pg_sys::fmgr_info_cxt(oid, &mut functions.input, keep);
            if transport == Transport::Binary {
                pg_sys::getTypeBinaryOutputInfo(typid, &mut oid, &mut varlena);
                pg_sys::fmgr_info_cxt(oid, &mut functions.send, keep);
                pg_sys::getTypeBinaryInputInfo(typid, &mut oid, &mut receive_ioparam);
                pg_sys::fmgr_info_cxt(oid, &mut functions.receive, keep);
            }
        }
        Ok((functions, ioparam, receive_ioparam))
    }
}

/// Settings that the text of some types depends on, pinned until dropped.
fn pinned() -> Local {
    Local::new(&[
        (c"datestyle", c"ISO, YMD"),
        (c"intervalstyle", c"postgres"),
        (c"timezone", c"UTC"),
        (c"bytea_output", c"hex"),
        (c"extra_float_digits", c"3"),
        (c"xmloption", c"content"),
    ])
}

fn output_text<R>(codec: &Codec, datum: pg_sys::Datum, f: impl FnOnce(&CStr) -> R) -> R {
    // SAFETY: the output function of the datum's type; the C string lives in the current context.
    unsafe {
        let function = &raw mut codec.functions.borrow_mut().output;
        let text = pg_sys::OutputFunctionCall(function, datum);
        let result = f(CStr::from_ptr(text));
        pg_sys::pfree(text.cast());
        result
    }
}

/// The bytes of a varlena, detoasted.
fn varlena_bytes<R>(datum: pg_sys::Datum, f: impl FnOnce(&[u8]) -> R) -> R {
    // SAFETY: the datum is a non-null varlena; the detoasted copy lives in the current context.
    unsafe {
        let original = datum.cast_mut_ptr::<pg_sys::varlena>();
        let plain = pg_sys::pg_detoast_datum_packed(original);
        let result = f(pgrx::varlena_to_byte_slice(plain));
        if plain != original {
            pg_sys::pfree(plain.cast());
        }
        result
    }
}

/// Appends a non-null value as it travels.
pub fn encode(column: &Column, datum: pg_sys::Datum, out: &mut Vec<u8>) {
    let codec = &column.codec;
    match codec.transport {
        Transport::Raw => varlena_bytes(datum, |bytes| out.extend_from_slice(bytes)),
        Transport::Binary => {
            // SAFETY: the send function of the datum's type returns a bytea in the current context.
            unsafe {
                let function = &raw mut codec.functions.borrow_mut().send;
                let sent = pg_sys::SendFunctionCall(function, datum);
                out.extend_from_slice(pgrx::varlena_to_byte_slice(sent));
                pg_sys::pfree(sent.cast());
            }
        }
        Transport::Text => {
            let _pinned = codec.pinned.then(pinned);
            output_text(codec, datum, |text| out.extend_from_slice(text.to_bytes()));
        }
    }
}

fn to_c_string(bytes: &[u8]) -> CString {
    CString::new(bytes).unwrap_or_else(|_| {
        Error::operator(
            PgSqlErrorCode::ERRCODE_INVALID_BINARY_REPRESENTATION,
            "a value of the peer holds a zero byte where text is expected",
            "The sending side is damaged or speaks another protocol.",
        )
        .raise()
    })
}

fn verify_encoding(bytes: &[u8]) {
    // SAFETY: reads `len` bytes; raises 22021 if they are not text in the server's encoding.
    unsafe { pg_sys::pg_verifymbstr(bytes.as_ptr().cast(), bytes.len() as i32, false) };
}

fn input_text(codec: &Codec, typmod: i32, text: &CStr) -> pg_sys::Datum {
    let _pinned = pinned();
    // SAFETY: the input function of the type; raises on text that it does not accept.
    unsafe {
        let function = &raw mut codec.functions.borrow_mut().input;
        pg_sys::InputFunctionCall(function, text.as_ptr().cast_mut(), codec.ioparam, typmod)
    }
}

/// The value of bytes that travelled, in the current memory context. Raises on bytes that are no value of
/// the column's type (22P03, 22021, 22P02, 23514 …).
pub fn decode(column: &Column, bytes: &[u8]) -> pg_sys::Datum {
    let codec = &column.codec;
    match codec.transport {
        Transport::Raw => {
            verify_encoding(bytes);
            if column.typmod >= 0 {
                return input_text(codec, column.typmod, &to_c_string(bytes));
            }
            // SAFETY: copies `len` bytes into a new varlena.
            unsafe { pg_sys::cstring_to_text_with_len(bytes.as_ptr().cast(), bytes.len() as i32) }.into()
        }
        Transport::Binary => receive(codec, column.typmod, bytes),
        Transport::Text => {
            verify_encoding(bytes);
            input_text(codec, column.typmod, &to_c_string(bytes))
        }
    }
}

fn receive(codec: &Codec, typmod: i32, bytes: &[u8]) -> pg_sys::Datum {
    // SAFETY: a StringInfo of our own with a terminating zero, as receive functions expect.
    unsafe {
        let mut buffer = pg_sys::StringInfoData::default();
        pg_sys::initStringInfo(&mut buffer);
        pg_sys::appendBinaryStringInfo(&mut buffer, bytes.as_ptr().cast(), bytes.len() as i32);
        let function = &raw mut codec.functions.borrow_mut().receive;
        let datum = pg_sys::ReceiveFunctionCall(function, &mut buffer, codec.receive_ioparam, typmod);
        let rest = buffer.len - buffer.cursor;
        pg_sys::pfree(buffer.data.cast());
        if rest != 0 {
            Error::operator(
                PgSqlErrorCode::ERRCODE_INVALID_BINARY_REPRESENTATION,
                "a value of the peer is longer than its type allows",
                "The sending side is damaged or speaks another protocol.",
            )
            .raise();
        }
        datum
    }
}

/// A value that was sent under another type (the column was retyped on both sides since): through text.
pub fn decode_as(type_name: &str, transport: Transport, column: &Column, bytes: &[u8]) -> pg_sys::Datum {
    if type_name == column.type_name {
        return decode(column, bytes);
    }
    if transport != Transport::Binary {
        verify_encoding(bytes);
        return input_text(&column.codec, column.typmod, &to_c_string(bytes));
    }
    let (mut typid, mut typmod) = (pg_sys::InvalidOid, -1);
    let name = to_c_string(type_name.as_bytes());
    // SAFETY: parses a type name; raises 42704 if there is none.
    #[cfg(feature = "pg15")]
    unsafe {
        pg_sys::parseTypeString(name.as_ptr(), &mut typid, &mut typmod, false)
    };
    // SAFETY: as above, with errors raised.
    #[cfg(any(feature = "pg16", feature = "pg17", feature = "pg18"))]
    unsafe {
        pg_sys::parseTypeString(name.as_ptr(), &mut typid, &mut typmod, std::ptr::null_mut())
    };
    let codec = Codec::of(typid).unwrap_or_else(|e| e.raise());
    if codec.transport != Transport::Binary {
        Error::operator(
            PgSqlErrorCode::ERRCODE_PROTOCOL_VIOLATION,
            format!("type {type_name} does not travel in binary"),
            "The sending side is damaged or speaks another protocol.",
        )
        .raise();
    }
    let datum = receive(&codec, typmod, bytes);
    let _pinned = pinned();
    output_text(&codec, datum, |text| input_text(&column.codec, column.typmod, text))
}

/// A value of one column as a value of another, through text.
pub fn convert(from: &Column, datum: pg_sys::Datum, to: &Column) -> Option<pg_sys::Datum> {
    let _pinned = pinned();
    Some(output_text(&from.codec, datum, |text| input_text(&to.codec, to.typmod, text)))
}

/// The value as a JSON literal: numbers, booleans and JSON as they are, all else as text.
pub fn to_json(column: &Column, datum: Option<pg_sys::Datum>) -> String {
    let Some(datum) = datum else { return "null".to_string() };
    let _pinned = pinned();
    output_text(&column.codec, datum, |text| {
        let text = text.to_string_lossy();
        let bare = match column.codec.typid {
            pg_sys::BOOLOID => return if text == "t" { "true".to_string() } else { "false".to_string() },
            pg_sys::JSONOID | pg_sys::JSONBOID => true,
            _ => column.codec.category == pg_sys::TYPCATEGORY_NUMERIC && is_json_number(&text),
        };
        if bare { text.into_owned() } else { serde_json::Value::from(text.as_ref()).to_string() }
    })
}

fn is_json_number(text: &str) -> bool {
    serde_json::from_str::<serde_json::Number>(text).is_ok()
}

/// The value that a JSON literal of [`to_json`] (or of a person) stands for. Raises if it is none.
pub fn from_json(column: &Column, value: &serde_json::Value) -> Option<pg_sys::Datum> {
    let is_json = matches!(column.codec.typid, pg_sys::JSONOID | pg_sys::JSONBOID);
    let text = match value {
        serde_json::Value::Null => return None,
        serde_json::Value::String(text) if !is_json => text.clone(),
        other => other.to_string(),
    };
    Some(input_text(&column.codec, column.typmod, &to_c_string(text.as_bytes())))
}

/// The same bits, detoasted only if it must be.
pub fn equal(column: &Column, a: Option<pg_sys::Datum>, b: Option<pg_sys::Datum>) -> bool {
    let codec = &column.codec;
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => {
            // SAFETY: both are values of the column's type.
            (codec.by_value && a == b)
                || (!codec.by_value
                    && unsafe {
                        same_toast_pointer(codec.length, a, b)
                            || datum_image_eq(a, b, codec.by_value, i32::from(codec.length))
                    })
        }
        _ => false,
    }
}

unsafe extern "C-unwind" {
    /// Of Postgres's utils/adt/datum.c, which the bindings leave out.
    fn datum_image_eq(a: pg_sys::Datum, b: pg_sys::Datum, by_value: bool, length: i32) -> bool;
}

/// Both values are stored out of line, in the same place: equal without reading them.
unsafe fn same_toast_pointer(length: i16, a: pg_sys::Datum, b: pg_sys::Datum) -> bool {
    let (a, b) = (a.cast_mut_ptr::<pg_sys::varlena>(), b.cast_mut_ptr::<pg_sys::varlena>());
    // SAFETY: length -1 says varlena; an external one is as long as VARSIZE_EXTERNAL tells.
    unsafe {
        if length != -1 || !pgrx::varatt_is_1b_e(a) || !pgrx::varatt_is_1b_e(b) {
            return false;
        }
        let size = pgrx::varsize_external(a);
        size == pgrx::varsize_external(b)
            && std::slice::from_raw_parts(a.cast::<u8>(), size) == std::slice::from_raw_parts(b.cast::<u8>(), size)
    }
}

/// The bytes by which a key is known in the catalog: its values as they travel, each with its length.
pub fn encode_key(values: &[Option<&[u8]>]) -> Vec<u8> {
    let mut out = Vec::new();
    for value in values {
        let bytes = value.unwrap_or_default();
        out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
        out.extend_from_slice(bytes);
    }
    out
}

/// The content of a row, by attribute number.
pub fn encode_image(values: &[(u16, Option<&[u8]>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (attnum, value) in values {
        out.extend_from_slice(&attnum.to_be_bytes());
        out.extend_from_slice(&value.map_or(-1, |v| v.len() as i32).to_be_bytes());
        out.extend_from_slice(value.unwrap_or_default());
    }
    out
}

/// The inverse of [`encode_image`]. Errors on bytes that it did not write.
pub fn decode_image(bytes: &[u8]) -> Result<Vec<(u16, Option<Vec<u8>>)>> {
    let broken = || Error::bug("a stored row image cannot be read");
    let mut rest = bytes;
    let mut values = Vec::new();
    while !rest.is_empty() {
        let (head, tail) = rest.split_at_checked(6).ok_or_else(broken)?;
        let attnum = u16::from_be_bytes([head[0], head[1]]);
        let length = i32::from_be_bytes([head[2], head[3], head[4], head[5]]);
        let (value, tail) = match usize::try_from(length) {
            Ok(length) => tail.split_at_checked(length).map(|(v, t)| (Some(v.to_vec()), t)).ok_or_else(broken)?,
            Err(_) => (None, tail),
        };
        values.push((attnum, value));
        rest = tail;
    }
    Ok(values)
}

/// The inverse of [`encode_key`], for keys without NULLs. Errors on bytes that it did not write.
pub fn decode_key(bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    let broken = || Error::bug("a stored key cannot be read");
    let mut rest = bytes;
    let mut values = Vec::new();
    while !rest.is_empty() {
        let (length, tail) = rest.split_first_chunk::<4>().ok_or_else(broken)?;
        let (value, tail) = tail.split_at_checked(u32::from_be_bytes(*length) as usize).ok_or_else(broken)?;
        values.push(value.to_vec());
        rest = tail;
    }
    Ok(values)
}
