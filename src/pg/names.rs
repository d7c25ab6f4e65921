//! Oids of the extension's own objects, by name, cached per backend.
use pgrx::prelude::*;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;

thread_local! {
    static RELATIONS: RefCell<HashMap<String, pg_sys::Oid>> = RefCell::default();
    static TYPES: RefCell<HashMap<&'static str, pg_sys::Oid>> = RefCell::default();
}

/// Oid of schema `tandem`; invalid if there is none.
pub fn schema_oid() -> pg_sys::Oid {
    // SAFETY: a catalog lookup with missing_ok.
    unsafe { pg_sys::get_namespace_oid(c"tandem".as_ptr(), true) }
}

/// Oid of one of the extension's types.
pub fn type_oid(name: &'static str) -> pg_sys::Oid {
    TYPES.with_borrow_mut(|types| {
        *types.entry(name).or_insert_with(|| {
            let c_name = CString::new(name).unwrap_or_default();
            // SAFETY: a syscache lookup by (name, namespace).
            unsafe {
                pg_sys::GetSysCacheOid(
                    pg_sys::SysCacheIdentifier::TYPENAMENSP as i32,
                    pg_sys::Anum_pg_type_oid as i16,
                    pg_sys::Datum::from(c_name.as_ptr()),
                    pg_sys::Datum::from(schema_oid()),
                    pg_sys::Datum::from(0usize),
                    pg_sys::Datum::from(0usize),
                )
            }
        })
    })
}

/// Oid of one of the extension's tables, sequences or indexes; raises if it is not there.
pub fn relation_oid(name: &str) -> pg_sys::Oid {
    if let Some(oid) = RELATIONS.with_borrow(|r| r.get(name).copied()) {
        return oid;
    }
    let c_name = CString::new(name).unwrap_or_default();
    // SAFETY: a syscache lookup.
    let oid = unsafe { pg_sys::get_relname_relid(c_name.as_ptr(), schema_oid()) };
    if oid == pg_sys::InvalidOid {
        crate::error::Error::operator(
            PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
            format!("relation tandem.{name} does not exist"),
            "The extension is not installed in this database, or damaged: CREATE EXTENSION tandem.",
        )
        .raise();
    }
    RELATIONS.with_borrow_mut(|r| r.insert(name.to_string(), oid));
    oid
}

/// Forgets all cached oids: the extension was dropped or created.
pub fn forget() {
    RELATIONS.with_borrow_mut(HashMap::clear);
    TYPES.with_borrow_mut(HashMap::clear);
}
