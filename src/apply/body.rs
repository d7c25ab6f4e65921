//! A source transaction as the exchange hands it over, in memory or spooled.
use crate::error::{Error, Result};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use tandem_model::change::Item;
use tandem_model::hlc::{Hlc, Mark};
use tandem_model::wire;

/// Bytes of a spooled transaction that [`Body::read_whole`] still takes (a value of Postgres is below 1 GB).
const MAX_WHOLE: u64 = 1 << 30;
/// Bytes of one chunk: what a value of Postgres can hold.
const MAX_CHUNK: usize = 1 << 30;

/// A transaction of the peer.
#[derive(Debug)]
pub struct Transaction {
    pub mark: Mark,
    /// What of our stream its node had applied when it committed.
    pub seen: Mark,
    /// Its node's stable point, in force from before its changes.
    pub stable: Hlc,
    pub body: Body,
}

/// Its items.
#[derive(Debug)]
pub enum Body {
    Inline(Vec<u8>),
    /// Chunks of whole items, each after its length (4 bytes, big-endian).
    Spooled(File),
}

impl Body {
    /// Shows every item to `f`, in order; may be called again.
    pub fn for_each(&mut self, mut f: impl FnMut(&Item<'_>) -> Result<()>) -> Result<()> {
        match self {
            Body::Inline(bytes) => each(bytes, &mut f),
            Body::Spooled(file) => {
                file.seek(SeekFrom::Start(0)).map_err(unreadable)?;
                let mut reader = BufReader::new(file);
                let mut chunk = Vec::new();
                while next_chunk(&mut reader, &mut chunk)? {
                    each(&chunk, &mut f)?;
                }
                Ok(())
            }
        }
    }

    /// All items in one piece, for the record of a skipped transaction.
    pub fn read_whole(&mut self) -> Result<Vec<u8>> {
        match self {
            Body::Inline(bytes) => Ok(bytes.clone()),
            Body::Spooled(file) => {
                let length = file.metadata().map_err(unreadable)?.len();
                if length >= MAX_WHOLE {
                    return Err(Error::operator(
                        pgrx::PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
                        format!("a transaction of {length} bytes is too large to be kept on record"),
                        "Remove what keeps it from being applied instead of skipping it.",
                    ));
                }
                file.seek(SeekFrom::Start(0)).map_err(unreadable)?;
                let mut reader = BufReader::new(file);
                let (mut whole, mut chunk) = (Vec::new(), Vec::new());
                while next_chunk(&mut reader, &mut chunk)? {
                    whole.extend_from_slice(&chunk);
                }
                Ok(whole)
            }
        }
    }
}

fn each(bytes: &[u8], f: &mut impl FnMut(&Item<'_>) -> Result<()>) -> Result<()> {
    for item in wire::items(bytes) {
        f(&item?)?;
    }
    Ok(())
}

/// Reads the next chunk; false at the end.
fn next_chunk(reader: &mut impl Read, chunk: &mut Vec<u8>) -> Result<bool> {
    let mut length = [0; 4];
    match reader.read_exact(&mut length) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
        Err(e) => return Err(unreadable(e)),
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_CHUNK {
        return Err(Error::bug("a spooled transaction is damaged"));
    }
    chunk.resize(length, 0);
    reader.read_exact(chunk).map_err(unreadable)?;
    Ok(true)
}

fn unreadable(e: std::io::Error) -> Error {
    Error::retry(pgrx::PgSqlErrorCode::ERRCODE_IO_ERROR, format!("a spooled transaction cannot be read: {e}"))
}
