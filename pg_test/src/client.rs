//! A session for tests: short calls that panic with the statement and everything the server said.
//! Values come back as text, so that any type can be compared.

use std::fmt::{self, Display};
use std::str::FromStr;
use std::thread::{self, JoinHandle};

use postgres::{NoTls, SimpleQueryMessage};

/// How a NULL reads in [`Client::rows`].
pub const NULL: &str = "∅";

/// One session with a server.
pub struct Client {
    inner: postgres::Client,
    conninfo: String,
    pid: i32,
}

/// What a statement failed with.
#[derive(Debug, Clone)]
pub struct Failure {
    /// "23505"; empty if the connection broke.
    pub sqlstate: String,
    pub message: String,
    pub detail: String,
    pub hint: String,
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {}", self.sqlstate, self.message)?;
        for (name, text) in [("detail", &self.detail), ("hint", &self.hint)] {
            if !text.is_empty() {
                write!(f, "\n  {name}: {text}")?;
            }
        }
        Ok(())
    }
}

impl From<postgres::Error> for Failure {
    fn from(error: postgres::Error) -> Failure {
        match error.as_db_error() {
            Some(db) => Failure {
                sqlstate: db.code().code().to_string(),
                message: db.message().to_string(),
                detail: db.detail().unwrap_or_default().to_string(),
                hint: db.hint().unwrap_or_default().to_string(),
            },
            None => Failure {
                sqlstate: String::new(),
                message: format!("{error} ({:?})", std::error::Error::source(&error)),
                detail: String::new(),
                hint: String::new(),
            },
        }
    }
}

impl Client {
    /// Connects, once.
    pub fn connect(conninfo: &str) -> Result<Client, Failure> {
        let mut inner = postgres::Client::connect(conninfo, NoTls)?;
        let pid = inner.query_one("select pg_backend_pid()", &[])?.get(0);
        Ok(Client { inner, conninfo: conninfo.to_string(), pid })
    }

    /// The process that serves this session.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Runs statements; several may be given, separated by semicolons.
    #[track_caller]
    pub fn exec(&mut self, sql: &str) {
        if let Err(failure) = self.try_exec(sql) {
            panic!("{failure}\n  statement: {}", shortened(sql));
        }
    }

    /// [`exec`](Self::exec) that may fail.
    pub fn try_exec(&mut self, sql: &str) -> Result<(), Failure> {
        Ok(self.inner.batch_execute(sql)?)
    }

    /// The rows of a query, columns joined by `|`.
    #[track_caller]
    pub fn rows(&mut self, sql: &str) -> Vec<String> {
        match self.try_rows(sql) {
            Ok(rows) => rows,
            Err(failure) => panic!("{failure}\n  query: {}", shortened(sql)),
        }
    }

    /// [`rows`](Self::rows) that may fail.
    pub fn try_rows(&mut self, sql: &str) -> Result<Vec<String>, Failure> {
        let cells = self.try_cells(sql)?;
        let text = |cell: Option<String>| cell.unwrap_or_else(|| NULL.to_string());
        Ok(cells.into_iter().map(|row| row.into_iter().map(text).collect::<Vec<_>>().join("|")).collect())
    }

    /// The rows of a query, column by column.
    pub fn try_cells(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, Failure> {
        let mut rows = Vec::new();
        for message in self.inner.simple_query(sql)? {
            if let SimpleQueryMessage::Row(row) = message {
                rows.push((0..row.len()).map(|i| row.get(i).map(str::to_string)).collect());
            }
        }
        Ok(rows)
    }

    /// The rows of a query as a table for people.
    pub fn table(&mut self, sql: &str) -> Result<String, Failure> {
        let mut lines: Vec<Vec<String>> = Vec::new();
        for message in self.inner.simple_query(sql)? {
            if let SimpleQueryMessage::Row(row) = message {
                if lines.is_empty() {
                    lines.push(row.columns().iter().map(|column| column.name().to_string()).collect());
                }
                lines.push((0..row.len()).map(|i| row.get(i).unwrap_or("").to_string()).collect());
            }
        }
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..lines.first().map_or(0, Vec::len)).map(width).collect();
        let mut text = String::new();
        for (number, line) in lines.iter().enumerate() {
            let padded = line.iter().zip(&widths).map(|(cell, width)| format!(" {cell:<width$} "));
            text.push_str(padded.collect::<Vec<_>>().join("|").trim_end());
            text.push('\n');
            if number == 0 {
                let rule: Vec<String> = widths.iter().map(|width| "-".repeat(width + 2)).collect();
                text.push_str(&(rule.join("+") + "\n"));
            }
        }
        Ok(text)
    }

    /// The first column of the only row.
    #[track_caller]
    pub fn query_one<T>(&mut self, sql: &str) -> T
    where
        T: FromStr,
        T::Err: fmt::Debug,
    {
        let mut rows = match self.try_cells(sql) {
            Ok(rows) => rows,
            Err(failure) => panic!("{failure}\n  query: {}", shortened(sql)),
        };
        assert_eq!(rows.len(), 1, "expected one row from: {}", shortened(sql));
        let text = rows.remove(0).into_iter().next().flatten();
        let text = text.unwrap_or_else(|| panic!("got null from: {}", shortened(sql)));
        match text.parse() {
            Ok(value) => value,
            Err(error) => panic!("{text:?} is not as expected ({error:?}): {}", shortened(sql)),
        }
    }

    /// The first column of the only row, as text.
    #[track_caller]
    pub fn one(&mut self, sql: &str) -> String {
        self.query_one(sql)
    }

    /// A boolean.
    #[track_caller]
    pub fn is_true(&mut self, sql: &str) -> bool {
        self.one(sql) == "t"
    }

    /// The statement must fail; returns how.
    #[track_caller]
    pub fn fails(&mut self, sql: &str) -> Failure {
        match self.try_exec(sql) {
            Ok(()) => panic!("this should have been refused: {}", shortened(sql)),
            Err(failure) => failure,
        }
    }

    /// Runs statements in a thread of their own, and hands the session back with the outcome: for
    /// statements that are expected to wait.
    pub fn spawn(mut self, sql: &str) -> JoinHandle<(Client, Result<(), Failure>)> {
        let sql = sql.to_string();
        thread::spawn(move || {
            let outcome = self.try_exec(&sql);
            (self, outcome)
        })
    }

    /// Another session with the same server and database.
    #[track_caller]
    pub fn another(&self) -> Client {
        match Client::connect(&self.conninfo) {
            Ok(client) => client,
            Err(failure) => panic!("can't connect: {failure}"),
        }
    }

    /// Is this session still usable?
    pub fn is_alive(&mut self) -> bool {
        !self.inner.is_closed() && self.inner.simple_query("select 1").is_ok()
    }
}

fn shortened(sql: &str) -> String {
    const LIMIT: usize = 2000;
    match sql.char_indices().nth(LIMIT) {
        Some((end, _)) => format!("{} … ({} bytes)", &sql[..end], sql.len()),
        None => sql.to_string(),
    }
}
