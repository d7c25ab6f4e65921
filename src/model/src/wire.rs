//! The wire codec. Any bytes decode to a value or an error: no panic, no unbounded allocation.
use crate::change::Item;
use crate::descriptor::Descriptor;
use crate::hlc::{Hlc, Mark, Position};
use serde::{Deserialize, Serialize};

/// Version of the protocol; a handshake with another is refused by name.
pub const PROTOCOL: u32 = 3;

/// Bytes that are not what they should be. From a peer: the stream stops, by name.
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

/// An item that can't be written: longer than 4 GB.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a change of {0} bytes is too large to be sent")]
pub struct EncodeError(pub usize);

/// Bytes of the length before each item.
const PREFIX: usize = 4;

impl<'a> Frame<'a> {
    /// The bytes of one row of `tandem.pull`.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_allocvec(self).expect("frames have only types that always encode")
    }
    /// Reads one frame, without copying its items.
    pub fn decode(bytes: &'a [u8]) -> Result<Frame<'a>, DecodeError> {
        decode("frame", bytes)
    }
}

/// Appends one item, length first, to the body of a transaction. On an error the body is as it was.
pub fn push_item(body: &mut Vec<u8>, item: &Item<'_>) -> Result<(), EncodeError> {
    let start = body.len();
    let mut out = std::mem::take(body);
    out.extend_from_slice(&[0; PREFIX]);
    *body = postcard::to_extend(item, out).expect("items have only types that always encode");
    let length = body.len() - start - PREFIX;
    match u32::try_from(length) {
        Ok(prefix) => body[start..start + PREFIX].copy_from_slice(&prefix.to_be_bytes()),
        Err(_) => {
            body.truncate(start);
            return Err(EncodeError(length));
        }
    }
    Ok(())
}

/// The items of a body (or of a chunk of one: an item never spans two). Ends after the first error.
pub fn items(body: &[u8]) -> impl Iterator<Item = Result<Item<'_>, DecodeError>> {
    let mut rest = body;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let item = split_item(&mut rest).and_then(|bytes| decode("item", bytes));
        if item.is_err() {
            rest = &[];
        }
        Some(item)
    })
}

fn split_item<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], DecodeError> {
    let (prefix, body) = rest.split_first_chunk::<PREFIX>().ok_or_else(|| malformed("item", "no length"))?;
    let length = u32::from_be_bytes(*prefix) as usize;
    let (item, tail) = body.split_at_checked(length).ok_or_else(|| malformed("item", "longer than what holds it"))?;
    *rest = tail;
    Ok(item)
}

/// One value, which takes all of the bytes. What borrows costs nothing; lists are limited by
/// [`crate::bounded`]; none of the types is recursive, so the depth is that of the types.
fn decode<'a, T: Deserialize<'a>>(what: &'static str, bytes: &'a [u8]) -> Result<T, DecodeError> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(malformed(what, "bytes left over")),
        Err(error) => Err(malformed(what, error)),
    }
}

fn malformed(what: &'static str, why: impl ToString) -> DecodeError {
    DecodeError { what, why: why.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Change, Op};
    use crate::versions::Versions;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use serde_bytes::Bytes;

    fn delete(key: &[Option<&'static [u8]>]) -> Item<'static> {
        Item::Change(Change {
            descriptor: 7,
            op: Op::Delete,
            key: key.iter().map(|k| k.map(Bytes::new)).collect(),
            version: Hlc(129),
            life: Hlc(65),
            base: Versions { birth: Hlc(65), dead: Hlc(0), cells: vec![(3, Hlc(66))], ..Versions::default() },
            cells: vec![],
            moved: Some(vec![None]),
        })
    }

    #[test]
    fn a_body_gives_back_its_items() {
        let record = Bytes::new(b"{}");
        let all = [
            delete(&[Some(b"k"), None]),
            Item::Record(record),
            Item::Truncate { descriptor: 1, version: Hlc(9) },
            Item::Policy { descriptor: 7, entry: record },
        ];
        let mut body = Vec::new();
        for item in &all {
            push_item(&mut body, item).expect("it is small");
        }
        let back: Vec<_> = items(&body).collect();
        assert_eq!(back, all.map(Ok));
        // Cut anywhere but between items it ends with one error.
        let cuts = (0..body.len()).filter(|&n| items(&body[..n]).any(|i| i.is_err())).count();
        assert_eq!(cuts, body.len() - 4);
    }

    #[test]
    fn a_hostile_length_allocates_nothing() {
        let mut body = Vec::new();
        push_item(&mut body, &delete(&[Some(b"k")])).expect("it is small");
        // A key said to have 2^28 columns, then as many NULLs as a chunk can hold.
        let mut item = vec![0, 7, 2, 0x80, 0x80, 0x80, 0x80, 1];
        item.resize(16 << 20, 0);
        let error = decode::<Item>("item", &item).expect_err("too long");
        assert_eq!(error.what, "item");
        // The length of an item beyond its body.
        assert!(items(&[255, 255, 255, 255, 0]).next().is_some_and(|i| i.is_err()));
        // Within the limit it is the content that decides.
        assert!(items(&body).all(|i| i.is_ok()));
    }

    #[test]
    fn a_list_holds_as_many_as_a_table_has_columns() {
        for (columns, fits) in [(crate::bounded::MAX_COLUMNS, true), (crate::bounded::MAX_COLUMNS + 1, false)] {
            let mut body = Vec::new();
            push_item(&mut body, &delete(&vec![None; columns])).expect("it is small");
            assert!(items(&body).all(|i| i.is_ok() == fits), "{columns}");
        }
    }

    #[test]
    fn nothing_may_be_left_over() {
        let mut bytes = Frame::Watermark { mark: Mark::default(), seen: Mark::default(), stable: Hlc(1) }.encode();
        assert!(Frame::decode(&bytes).is_ok());
        bytes.push(0);
        assert_eq!(Frame::decode(&bytes).expect_err("a byte too many").to_string(), "malformed frame: bytes left over");
    }

    proptest! {
        #[test]
        fn frames_survive(a: u64, b: u64, chunks: u32, body in vec(any::<u8>(), 0..40), kind in 0..3) {
            let mark = Mark { position: Position(a), low: Hlc(b) };
            let items = Bytes::new(&body);
            let frame = match kind {
                0 => Frame::Transaction { mark, seen: Mark::default(), stable: Hlc(b), chunks, items },
                1 => Frame::Chunk { position: Position(a), index: chunks, items },
                _ => Frame::Watermark { mark, seen: mark, stable: Hlc(a) },
            };
            let bytes = frame.encode();
            prop_assert_eq!(Frame::decode(&bytes), Ok(frame));
        }

        #[test]
        fn any_bytes_decode_or_not(bytes in vec(prop_oneof![3 => 0u8..9, 1 => any::<u8>()], 0..80)) {
            if let Ok(frame) = Frame::decode(&bytes) {
                let again = frame.encode();
                prop_assert_eq!(Frame::decode(&again), Ok(frame));
            }
            for item in items(&bytes) {
                drop(item);
            }
            let _ = decode::<Item>("item", &bytes);
        }
    }
}
