//! The wire codec. Any bytes decode to a value or an error: no panic, no unbounded allocation.
use crate::change::Item;
use crate::descriptor::Descriptor;
use crate::hlc::{Hlc, Mark, Position};
use serde::{Deserialize, Serialize};

/// Version of the protocol; a handshake with another is refused by name.
pub const PROTOCOL: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed {what}: {why}")]
pub struct DecodeError {
    pub what: &'static str,
    pub why: String,
}

/// One element of a node's stream, as `tandem.pull` returns it (one row each).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Frame<'a> {
    /// Comes before the first change that refers to it, once per connection.
    Descriptor(Descriptor),
    /// A transaction. With `chunks` > 0 its items follow in that many `Chunk` frames and `items` is empty.
    Transaction {
        mark: Mark,
        seen: Mark,
        stable: Hlc,
        chunks: u32,
        #[serde(borrow)]
        items: &'a serde_bytes::Bytes,
    },
    /// A part of the transaction at `position`, numbered from 0.
    Chunk { position: Position, index: u32, items: &'a serde_bytes::Bytes },
    /// Ends a reply: nothing at or below `mark` is still to come.
    Watermark { mark: Mark, seen: Mark, stable: Hlc },
}

impl<'a> Frame<'a> {
    pub fn encode(&self) -> Vec<u8> {
        todo!()
    }
    pub fn decode(bytes: &'a [u8]) -> Result<Frame<'a>, DecodeError> {
        todo!("{bytes:?}")
    }
}

/// Appends one item, length first, to the body of a transaction.
pub fn push_item(body: &mut Vec<u8>, item: &Item<'_>) {
    todo!("{body:?}{item:?}")
}

/// The items of a body (or of a chunk of one: an item never spans two).
pub fn items(body: &[u8]) -> impl Iterator<Item = Result<Item<'_>, DecodeError>> {
    let _ = body;
    std::iter::empty()
}
