//! Lists with a limit on the wire: a hostile length is an error before anything is allocated for it.
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// Postgres's own limit on the columns of a target list is 1,664; nothing per column is longer.
pub const MAX_COLUMNS: usize = 1_664;

struct Limited<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Limited<T> {
    type Value = Vec<T>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {MAX_COLUMNS} elements")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let hint = seq.size_hint().unwrap_or(0);
        if hint > MAX_COLUMNS {
            return Err(A::Error::invalid_length(hint, &self));
        }
        let mut list = Vec::with_capacity(hint);
        while let Some(element) = seq.next_element()? {
            if list.len() == MAX_COLUMNS {
                return Err(A::Error::invalid_length(list.len() + 1, &self));
            }
            list.push(element);
        }
        Ok(list)
    }
}

/// For `#[serde(deserialize_with)]`: a `Vec` of at most [`MAX_COLUMNS`] elements.
pub fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    from.deserialize_seq(Limited(PhantomData))
}

/// The same for an optional list.
pub fn optional<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<Vec<T>>, D::Error> {
    #[derive(serde::Deserialize)]
    #[serde(bound(deserialize = "T: Deserialize<'de>"))]
    struct List<T>(#[serde(deserialize_with = "list")] Vec<T>);
    Ok(Option::<List<T>>::deserialize(from)?.map(|list| list.0))
}
