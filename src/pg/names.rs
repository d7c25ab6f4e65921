//! Oids of the extension's own objects, by name, cached per backend.
use pgrx::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::CString;

thread_local! {
    static RELATIONS: RefCell<HashMap<String, pg_sys::Oid>> = RefCell::default();
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
}

/// A relation of ours was dropped or created anew: its name is looked up again.
#[pg_guard]
unsafe extern "C-unwind" fn invalidate(_arg: pg_sys::Datum, relid: pg_sys::Oid) {
    RELATIONS.with(|relations| {
        // An invalidation that arrives during a look-up finds nothing of it here yet.
        if let Ok(mut relations) = relations.try_borrow_mut() {
            relations.retain(|_, oid| relid != pg_sys::InvalidOid && *oid != relid);
        }
    });
}

/// Oid of schema `tandem`; invalid if there is none.
pub fn schema_oid() -> pg_sys::Oid {
    // SAFETY: a catalog lookup with missing_ok.
    unsafe { pg_sys::get_namespace_oid(c"tandem".as_ptr(), true) }
}

/// Oid of one of the extension's types.
pub fn type_oid(name: &'static str) -> pg_sys::Oid {
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
    if !REGISTERED.replace(true) {
        // SAFETY: registered once per backend.
        unsafe { pg_sys::CacheRegisterRelcacheCallback(Some(invalidate), pg_sys::Datum::from(0usize)) };
    }
    RELATIONS.with_borrow_mut(|r| r.insert(name.to_string(), oid));
    oid
}
