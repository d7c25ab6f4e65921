//! Settings under which a value's text is the same on both servers, whoever asks.
use crate::pg::settings::Local;

/// Pins them; undone when the result is dropped.
pub fn canonical() -> Local {
    Local::new(&[
        (c"search_path", c"pg_catalog"),
        (c"DateStyle", c"ISO, YMD"),
        (c"IntervalStyle", c"postgres"),
        (c"TimeZone", c"UTC"),
        (c"bytea_output", c"hex"),
        (c"extra_float_digits", c"1"),
        (c"xmlbinary", c"base64"),
        (c"lc_monetary", c"C"),
        // A policy must not hide rows from a comparison: better an error.
        (c"row_security", c"off"),
    ])
}
