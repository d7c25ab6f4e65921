//! The link to the peer over libpq: the only file that touches PQ*.
//!
//! Nothing in here blocks: every wait is on the process latch beside the socket, so that the worker can
//! be stopped at once. (Name resolution is libpq's, and does block, as everywhere in Postgres.) What goes
//! wrong comes back as an [`Error`] that never holds a password or a connection string.
use crate::clock::boot_ms;
use crate::error::{Error, Result};
use crate::exchange::process::{self, Socket};
use crate::exchange::refusal;
use pgrx::prelude::*;
use pq_sys::{ExecStatusType as Status, PGconn, PGresult};
use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr;

/// How long (ms) one attempt to connect may take, unless the connection string has a connect_timeout.
const CONNECT_TIMEOUT_MS: i64 = 10_000;

/// Defaults that the connection string may override: a dead peer is noticed by the kernel as well.
const BEFORE: [(&CStr, &CStr); 5] = [
    (c"keepalives", c"1"),
    (c"keepalives_idle", c"10"),
    (c"keepalives_interval", c"5"),
    (c"keepalives_count", c"3"),
    (c"tcp_user_timeout", c"20000"),
];
/// What it may not.
const AFTER: [(&CStr, &CStr); 2] = [(c"application_name", c"tandem"), (c"client_encoding", c"UTF8")];

/// A connection, closed when dropped.
pub struct Link {
    conn: *mut PGconn,
    /// Passwords of the connection string, to be blotted out of messages.
    secrets: Vec<String>,
    /// Counted among the descriptors that Postgres keeps within bounds.
    descriptor: bool,
}

impl Drop for Link {
    fn drop(&mut self) {
        // SAFETY: the connection is ours and not used afterwards.
        unsafe { pq_sys::PQfinish(self.conn) };
        if self.descriptor {
            // SAFETY: acquired in connect().
            unsafe { pg_sys::ReleaseExternalFD() };
        }
    }
}

/// A result, freed when dropped.
pub struct Reply(*mut PGresult);

impl Drop for Reply {
    fn drop(&mut self) {
        // SAFETY: the result is ours and not used afterwards.
        unsafe { pq_sys::PQclear(self.0) };
    }
}

impl Reply {
    pub fn rows(&self) -> i32 {
        // SAFETY: a live result.
        unsafe { pq_sys::PQntuples(self.0) }
    }

    /// A value as it came (binary or text, as asked for); `None` is NULL, or not there.
    pub fn bytes(&self, row: i32, column: i32) -> Option<&[u8]> {
        // SAFETY: a live result; libpq checks row and column; the value lives as long as the result.
        unsafe {
            if row >= self.rows()
                || column >= pq_sys::PQnfields(self.0)
                || pq_sys::PQgetisnull(self.0, row, column) != 0
            {
                return None;
            }
            let start = pq_sys::PQgetvalue(self.0, row, column).cast::<u8>();
            let length = pq_sys::PQgetlength(self.0, row, column).max(0) as usize;
            Some(std::slice::from_raw_parts(start, length))
        }
    }

    /// A text value.
    pub fn text(&self, row: i32, column: i32) -> Option<&str> {
        self.bytes(row, column).and_then(|b| std::str::from_utf8(b).ok())
    }

    fn status(&self) -> Status {
        // SAFETY: a live result.
        unsafe { pq_sys::PQresultStatus(self.0) }
    }

    fn field(&self, code: u8) -> Option<String> {
        // SAFETY: a live result; the text, if any, ends with a zero byte.
        unsafe { owned(pq_sys::PQresultErrorField(self.0, c_int::from(code))) }
    }
}

/// What arrived.
pub enum Event {
    /// A row (or, of a statement that isn't streamed, all its rows).
    Rows(Reply),
    /// A statement has ended well.
    Done,
    /// The server has answered everything up to one sync.
    Synced,
    /// The server refused a statement; the rest up to the next sync is passed over.
    Failed(Error),
}

/// Copies a C string. Null gives none, what isn't UTF-8 is replaced.
///
/// # Safety
/// `text` is null or ends with a zero byte.
unsafe fn owned(text: *const c_char) -> Option<String> {
    // SAFETY: see above.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

unsafe extern "C" fn ignore_notice(_: *mut std::ffi::c_void, _: *const PGresult) {}

impl Link {
    /// Connects, within `connect_timeout` of the connection string or ten seconds.
    pub fn connect(conninfo: &str) -> Result<Link> {
        let options = Options::parse(conninfo)?;
        let conninfo = CString::new(conninfo).map_err(|_| malformed())?;
        let pairs = BEFORE.into_iter().chain([(c"dbname", conninfo.as_c_str())]).chain(AFTER);
        let (mut keywords, mut values): (Vec<_>, Vec<_>) = pairs.map(|(k, v)| (k.as_ptr(), v.as_ptr())).unzip();
        keywords.push(ptr::null());
        values.push(ptr::null());
        // SAFETY: counts one descriptor; given back when the link is dropped.
        let descriptor = unsafe { pg_sys::AcquireExternalFD() };
        // SAFETY: two lists of the same length that end with null, of strings that outlive the call.
        let conn = unsafe { pq_sys::PQconnectStartParams(keywords.as_ptr(), values.as_ptr(), 1) };
        if conn.is_null() {
            return Err(Error::retry(PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY, "out of memory for a connection"));
        }
        let link = Link { conn, secrets: options.secrets, descriptor };
        // SAFETY: a live connection. Verbose messages carry the SQLSTATE, which libpq has no other way to tell.
        unsafe {
            pq_sys::PQsetErrorVerbosity(conn, pq_sys::PGVerbosity::PQERRORS_VERBOSE);
            pq_sys::PQsetNoticeReceiver(conn, Some(ignore_notice), ptr::null_mut());
        }
        link.finish_connecting(boot_ms() + options.connect_timeout_ms.unwrap_or(CONNECT_TIMEOUT_MS))?;
        Ok(link)
    }

    fn finish_connecting(&self, deadline: i64) -> Result<()> {
        use pq_sys::{ConnStatusType::CONNECTION_BAD, PostgresPollingStatusType::*};
        // SAFETY: a live connection.
        if unsafe { pq_sys::PQstatus(self.conn) } == CONNECTION_BAD {
            return Err(self.connect_error());
        }
        let mut next = PGRES_POLLING_WRITING;
        loop {
            let writable = next == PGRES_POLLING_WRITING;
            let left = deadline - boot_ms();
            if left <= 0 {
                let code = PgSqlErrorCode::ERRCODE_SQLCLIENT_UNABLE_TO_ESTABLISH_SQLCONNECTION;
                return Err(Error::retry(code, "the peer could not be reached in time")
                    .hint("Check that the peer is up and that the network lets this server reach it."));
            }
            if !process::wait(self.socket(!writable, writable), left) {
                continue;
            }
            // SAFETY: a live connection that is being established.
            next = unsafe { pq_sys::PQconnectPoll(self.conn) };
            match next {
                PGRES_POLLING_OK => break,
                PGRES_POLLING_FAILED => return Err(self.connect_error()),
                _ => {}
            }
        }
        // SAFETY: an established connection without a query.
        let ready = unsafe {
            pq_sys::PQsetErrorVerbosity(self.conn, pq_sys::PGVerbosity::PQERRORS_DEFAULT);
            pq_sys::PQsetnonblocking(self.conn, 1) == 0 && pq_sys::PQenterPipelineMode(self.conn) == 1
        };
        if ready { Ok(()) } else { Err(self.lost()) }
    }

    /// The socket may be another one each time.
    fn socket(&self, readable: bool, writable: bool) -> Option<Socket> {
        // SAFETY: a live connection.
        Some(Socket { fd: unsafe { pq_sys::PQsocket(self.conn) }, readable, writable })
    }

    fn message(&self) -> String {
        // SAFETY: a live connection; the message ends with a zero byte.
        let text = unsafe { owned(pq_sys::PQerrorMessage(self.conn)) }.unwrap_or_default();
        self.secrets.iter().fold(text, |text, secret| text.replace(secret.as_str(), "***"))
    }

    fn connect_error(&self) -> Error {
        refusal::of_connecting(&self.message())
    }

    /// The connection is no longer usable.
    fn lost(&self) -> Error {
        let text = self.message();
        let text = text.lines().next().unwrap_or("").trim();
        let text = if text.is_empty() { "connection closed" } else { text };
        Error::retry(PgSqlErrorCode::ERRCODE_CONNECTION_FAILURE, format!("lost the connection to the peer: {text}"))
    }

    /// Puts a statement and a sync after it into the pipeline, with parameters as text.
    pub fn send(&mut self, statement: &CStr, parameters: &[Option<&str>], binary: bool) -> Result<()> {
        let owned: Vec<Option<CString>> =
            parameters.iter().map(|p| p.map(|p| CString::new(p.replace('\0', "")).unwrap_or_default())).collect();
        let values: Vec<*const c_char> = owned.iter().map(|p| p.as_ref().map_or(ptr::null(), |p| p.as_ptr())).collect();
        // SAFETY: as many values as said, each null or ending with a zero byte; libpq copies them.
        let sent = unsafe {
            pq_sys::PQsendQueryParams(
                self.conn,
                statement.as_ptr(),
                values.len() as c_int,
                ptr::null(),
                values.as_ptr(),
                ptr::null(),
                ptr::null(),
                c_int::from(binary),
            ) == 1
                && pq_sys::PQpipelineSync(self.conn) == 1
        };
        if !sent {
            return Err(self.lost());
        }
        self.flush().map(|_| ())
    }

    /// Has the statement whose results come next give row by row, so that memory stays bounded.
    pub fn stream_rows(&mut self) {
        // SAFETY: a live connection; does nothing unless a statement's results are about to come.
        unsafe { pq_sys::PQsetSingleRowMode(self.conn) };
    }

    /// True if everything is sent.
    fn flush(&mut self) -> Result<bool> {
        // SAFETY: a live, non-blocking connection.
        match unsafe { pq_sys::PQflush(self.conn) } {
            0 => Ok(true),
            1 => Ok(false),
            _ => Err(self.lost()),
        }
    }

    /// What has arrived, if anything has; doesn't wait.
    pub fn poll(&mut self) -> Result<Option<Event>> {
        // A null result ends the results of one statement, or says that nothing was asked for: look twice.
        for _ in 0..2 {
            // SAFETY: a live connection.
            if unsafe { pq_sys::PQisBusy(self.conn) } != 0 {
                return Ok(None);
            }
            // SAFETY: not busy, so this doesn't block.
            let result = unsafe { pq_sys::PQgetResult(self.conn) };
            if !result.is_null() {
                return self.event(Reply(result)).map(Some);
            }
        }
        // SAFETY: a live connection.
        if unsafe { pq_sys::PQstatus(self.conn) } == pq_sys::ConnStatusType::CONNECTION_BAD {
            return Err(self.lost());
        }
        Ok(None)
    }

    fn event(&self, reply: Reply) -> Result<Event> {
        Ok(match reply.status() {
            Status::PGRES_SINGLE_TUPLE => Event::Rows(reply),
            Status::PGRES_TUPLES_OK if reply.rows() > 0 => Event::Rows(reply),
            Status::PGRES_TUPLES_OK | Status::PGRES_COMMAND_OK | Status::PGRES_PIPELINE_ABORTED => Event::Done,
            Status::PGRES_PIPELINE_SYNC => Event::Synced,
            _ => Event::Failed(self.server_error(&reply)),
        })
    }

    fn server_error(&self, reply: &Reply) -> Error {
        let Some(code) = reply.field(pq_sys::PG_DIAG_SQLSTATE) else { return self.lost() };
        let message = reply.field(pq_sys::PG_DIAG_MESSAGE_PRIMARY).unwrap_or_default();
        let mut error =
            refusal::classify(code, format!("the peer says: {message}"), reply.field(pq_sys::PG_DIAG_MESSAGE_HINT));
        error.detail = reply.field(pq_sys::PG_DIAG_MESSAGE_DETAIL);
        error
    }

    /// Waits (ms at most) until something may have arrived or the latch is set; reads what is there.
    pub fn wait(&mut self, timeout_ms: i64) -> Result<()> {
        let flushed = self.flush()?;
        if process::wait(self.socket(true, !flushed), timeout_ms) {
            self.read()?;
        }
        Ok(())
    }

    /// Takes what the socket has into libpq's buffer.
    fn read(&mut self) -> Result<()> {
        // SAFETY: a live connection.
        if unsafe { pq_sys::PQconsumeInput(self.conn) } != 1 {
            return Err(self.lost());
        }
        Ok(())
    }

    /// Runs one small statement to its end, within `timeout_ms`; nothing else may be in the pipeline.
    pub fn query(&mut self, statement: &CStr, parameters: &[Option<&str>], timeout_ms: i64) -> Result<Option<Reply>> {
        self.send(statement, parameters, false)?;
        let deadline = boot_ms() + timeout_ms;
        let (mut rows, mut failure) = (None, None);
        loop {
            match self.poll()? {
                Some(Event::Rows(reply)) => rows = Some(reply),
                Some(Event::Failed(error)) => failure = Some(error),
                Some(Event::Done) => {}
                Some(Event::Synced) => return failure.map_or(Ok(rows), Err),
                None if boot_ms() >= deadline => return Err(refusal::silent()),
                None => self.wait(deadline - boot_ms())?,
            }
        }
    }
}

fn malformed() -> Error {
    Error::operator(
        PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
        "the connection string of the peer is malformed",
        "SELECT tandem.remove_peer(...), then tandem.add_peer(...) with a libpq connection string.",
    )
}

/// Checks the form of a connection string. The message quotes names of options, never values.
pub fn check_conninfo(conninfo: &str) -> std::result::Result<(), String> {
    let Ok(text) = CString::new(conninfo) else { return Err("it has a zero byte".to_string()) };
    let mut message: *mut c_char = ptr::null_mut();
    // SAFETY: a string that ends with a zero byte; libpq allocates list and message.
    unsafe {
        let list = pq_sys::PQconninfoParse(text.as_ptr(), &mut message);
        if !list.is_null() {
            pq_sys::PQconninfoFree(list);
            return Ok(());
        }
        let why = owned(message).unwrap_or_default();
        pq_sys::PQfreemem(message.cast());
        let names_option = why.starts_with("invalid connection option") || why.starts_with("invalid URI query");
        Err(if names_option { why.trim().to_string() } else { without_quotes(why.trim()) })
    }
}

/// What stands between double quotes may be a piece of a password.
fn without_quotes(text: &str) -> String {
    text.split('"').enumerate().filter(|(i, part)| i % 2 == 0 || *part == "=").map(|(_, part)| part).collect()
}

/// What is to be known of a connection string.
struct Options {
    secrets: Vec<String>,
    connect_timeout_ms: Option<i64>,
}

impl Options {
    /// Errors without the parser's message: it quotes pieces of the string.
    fn parse(conninfo: &str) -> Result<Options> {
        let text = CString::new(conninfo).map_err(|_| malformed())?;
        // SAFETY: a string that ends with a zero byte; no message is asked for.
        let list = unsafe { pq_sys::PQconninfoParse(text.as_ptr(), ptr::null_mut()) };
        if list.is_null() {
            return Err(malformed());
        }
        let mut options = Options { secrets: Vec::new(), connect_timeout_ms: None };
        let mut next = list;
        // SAFETY: the list ends with an entry without a keyword; its strings end with a zero byte.
        while let Some(keyword) = unsafe { owned((*next).keyword) } {
            // SAFETY: as above.
            let value = unsafe { owned((*next).val) }.unwrap_or_default();
            match keyword.as_str() {
                "password" | "sslpassword" | "oauth_client_secret" if !value.is_empty() => options.secrets.push(value),
                "connect_timeout" => {
                    let seconds: Option<i64> = value.trim().parse().ok();
                    options.connect_timeout_ms = seconds.filter(|s| *s > 0).map(|s| s.clamp(2, 3600) * 1000);
                }
                _ => {}
            }
            // SAFETY: not yet at the last entry.
            next = unsafe { next.add(1) };
        }
        // SAFETY: allocated by PQconninfoParse.
        unsafe { pq_sys::PQconninfoFree(list) };
        Ok(options)
    }
}
