//! What an operator should know of a table that was just added: the warnings of `tandem.check()` for it.
use crate::pg::identity::ActingAs;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

/// Raises a WARNING for everything that `tandem.table_advice` finds.
pub fn about(relid: pg_sys::Oid) {
    let found = {
        let _catalog = ActingAs::superuser();
        Spi::connect(|client| -> Result<Vec<(String, Option<String>)>, pgrx::spi::Error> {
            let query = "select detail, hint from tandem.table_advice($1)";
            client
                .select(query, None, &[relid.into()])?
                .map(|row| Ok((row.get::<String>(1)?.unwrap_or_default(), row.get::<String>(2)?)))
                .collect()
        })
    };
    for (message, hint) in found.unwrap_or_default() {
        warn(&message, hint.as_deref());
    }
}

pub fn warn(message: &str, hint: Option<&str>) {
    let mut report = ErrorReport::new(PgSqlErrorCode::ERRCODE_WARNING, message.to_string(), pgrx::function_name!());
    if let Some(hint) = hint {
        report = report.set_hint(hint.to_string());
    }
    report.report(PgLogLevel::WARNING);
}
