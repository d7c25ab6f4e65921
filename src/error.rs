//! Errors inside the extension: what happened, whose turn it is, and what to do. They become Postgres
//! errors only at the edge ([`Error::raise`]), or a line of `tandem.status`.
use pgrx::pg_sys::panic::CaughtError;
use pgrx::prelude::*;
use std::panic::AssertUnwindSafe;

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Goes away by itself: tried again with backoff.
    Retry,
    /// Waits for a person; the hint says what to do.
    Operator,
    /// Must not happen.
    Bug,
}

/// An error with its SQLSTATE, cause and remedy.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub class: Class,
    pub sqlstate: PgSqlErrorCode,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn retry(sqlstate: PgSqlErrorCode, message: impl Into<String>) -> Error {
        Error { class: Class::Retry, sqlstate, message: message.into(), detail: None, hint: None }
    }
    pub fn operator(sqlstate: PgSqlErrorCode, message: impl Into<String>, hint: impl Into<String>) -> Error {
        Error { class: Class::Operator, sqlstate, message: message.into(), detail: None, hint: Some(hint.into()) }
    }
    pub fn bug(message: impl Into<String>) -> Error {
        let sqlstate = PgSqlErrorCode::ERRCODE_INTERNAL_ERROR;
        Error { class: Class::Bug, sqlstate, message: message.into(), detail: None, hint: None }
    }
    pub fn detail(mut self, detail: impl Into<String>) -> Error {
        self.detail = Some(detail.into());
        self
    }
    pub fn hint(mut self, hint: impl Into<String>) -> Error {
        self.hint = Some(hint.into());
        self
    }
    /// Raises this as a Postgres ERROR.
    pub fn raise(self) -> ! {
        let mut report = pgrx::pg_sys::panic::ErrorReport::new(self.sqlstate, self.message, pgrx::function_name!());
        if let Some(detail) = self.detail {
            report = report.set_detail(detail);
        }
        if let Some(hint) = self.hint {
            report = report.set_hint(hint);
        }
        report.report(PgLogLevel::ERROR);
        unreachable!("an ERROR does not return")
    }
}

impl From<tandem_model::wire::DecodeError> for Error {
    fn from(e: tandem_model::wire::DecodeError) -> Error {
        Error::operator(
            PgSqlErrorCode::ERRCODE_PROTOCOL_VIOLATION,
            e.to_string(),
            "The sending side is damaged or speaks another protocol; see its server log.",
        )
    }
}

impl From<tandem_model::wire::EncodeError> for Error {
    fn from(e: tandem_model::wire::EncodeError) -> Error {
        Error::operator(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            e.to_string(),
            "A row of a synced table must be smaller than 1 GB on its way.",
        )
    }
}

impl From<pgrx::spi::Error> for Error {
    fn from(e: pgrx::spi::Error) -> Error {
        Error::bug(format!("query on the catalog failed: {e}"))
    }
}

/// SQLSTATEs after which the same work, done again, may well succeed.
fn is_transient(code: PgSqlErrorCode) -> bool {
    use PgSqlErrorCode::*;
    matches!(
        code,
        ERRCODE_LOCK_NOT_AVAILABLE
            | ERRCODE_T_R_DEADLOCK_DETECTED
            | ERRCODE_T_R_SERIALIZATION_FAILURE
            | ERRCODE_QUERY_CANCELED
            | ERRCODE_CONNECTION_FAILURE
            | ERRCODE_CONNECTION_EXCEPTION
            | ERRCODE_CONNECTION_DOES_NOT_EXIST
            | ERRCODE_ADMIN_SHUTDOWN
            | ERRCODE_CRASH_SHUTDOWN
            | ERRCODE_CANNOT_CONNECT_NOW
            | ERRCODE_TOO_MANY_CONNECTIONS
            | ERRCODE_DISK_FULL
            | ERRCODE_OUT_OF_MEMORY
    )
}

impl From<CaughtError> for Error {
    fn from(e: CaughtError) -> Error {
        let report = match e {
            CaughtError::PostgresError(r) | CaughtError::ErrorReport(r) => r,
            CaughtError::RustPanic { ereport, .. } => ereport,
        };
        let class = if is_transient(report.sql_error_code()) { Class::Retry } else { Class::Operator };
        Error {
            class,
            sqlstate: report.sql_error_code(),
            message: report.message().to_string(),
            detail: report.detail().map(str::to_string),
            hint: report.hint().map(str::to_string),
        }
    }
}

/// Runs `f` and turns a Postgres ERROR within into an [`Error`]. The (sub)transaction is left failed: the
/// caller must abort it.
pub fn catch<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    // What `f` leaves half done belongs to the transaction that the caller aborts.
    PgTryBuilder::new(AssertUnwindSafe(f)).catch_others(|e| Err(Error::from(e))).execute()
}
