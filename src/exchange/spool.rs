//! A temporary file for one large transaction of the peer: it is spooled whole before its first row is
//! applied, so that no apply transaction waits for the network.
use crate::error::{Error, Result};
use pgrx::prelude::*;
use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Seek, Write};
use tandem_model::hlc::{Hlc, Mark};

/// Where Postgres keeps temporary files, below the data directory (a worker's working directory), and how
/// they are named: what a crash leaves behind goes at the next start.
const DIRECTORY: &str = "base/pgsql_tmp";
const PREFIX: &str = "pgsql_tmp";

/// A transaction that is being received in parts.
pub struct Spool {
    pub mark: Mark,
    pub seen: Mark,
    pub stable: Hlc,
    file: BufWriter<File>,
}

impl Spool {
    /// Opens an empty file without a name: it is gone when it is closed.
    pub fn create(mark: Mark, seen: Mark, stable: Hlc) -> Result<Spool> {
        fs::create_dir_all(DIRECTORY).map_err(failed)?;
        let path = format!("{DIRECTORY}/{PREFIX}{}.tandem", super::process::pid());
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).map_err(failed)?;
        fs::remove_file(&path).map_err(failed)?;
        Ok(Spool { mark, seen, stable, file: BufWriter::new(file) })
    }

    /// Appends a part: its length in 4 bytes, most significant first, then itself.
    pub fn append(&mut self, chunk: &[u8]) -> Result<()> {
        let length = u32::try_from(chunk.len()).map_err(|_| {
            Error::operator(
                PgSqlErrorCode::ERRCODE_PROTOCOL_VIOLATION,
                "a part of more than 4 GB",
                "See the peer's server log.",
            )
        })?;
        self.file.write_all(&length.to_be_bytes()).map_err(failed)?;
        self.file.write_all(chunk).map_err(failed)
    }

    /// The file, whole and rewound.
    pub fn finish(self) -> Result<File> {
        let mut file = self.file.into_inner().map_err(|e| failed(e.into_error()))?;
        file.rewind().map_err(failed)?;
        Ok(file)
    }
}

fn failed(error: std::io::Error) -> Error {
    let code = match error.kind() {
        std::io::ErrorKind::StorageFull => PgSqlErrorCode::ERRCODE_DISK_FULL,
        _ => PgSqlErrorCode::ERRCODE_IO_ERROR,
    };
    Error::retry(code, format!("could not spool a large transaction to {DIRECTORY}: {error}"))
        .hint("Check the space and the rights of the data directory.")
}
