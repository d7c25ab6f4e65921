//! Changes that wait: their table is missing here, or has another shape than on the peer. They are kept
//! whole and in order, and applied when the table is ready.
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use pgrx::prelude::*;
use tandem_model::change::Item;
use tandem_model::descriptor::Descriptor;
use tandem_model::hlc::{Hlc, Mark, Position};
use tandem_model::wire;

/// Held changes that are read at a time while draining.
const PAGE: i64 = 500;

/// A held change.
pub struct Held {
    pub ordinal: i64,
    pub mark: Mark,
    pub descriptor: Descriptor,
    /// As [`wire::push_item`] writes it.
    pub item: Vec<u8>,
}

/// Keeps a change for later.
pub fn put(peer: &str, mark: Mark, descriptor: &Descriptor, item: &Item<'_>) -> Result<()> {
    const QUERY: &str = "
        insert into tandem.held (peer, \"position\", low, schema_name, table_name, descriptor, item)
        values ($1, $2::int8::tandem.position, $3::int8::tandem.hlc, $4, $5, $6, $7)";
    let mut bytes = Vec::new();
    wire::push_item(&mut bytes, item).map_err(|e| Error::bug(e.to_string()))?;
    let shape = serde_json::to_string(descriptor).map_err(|e| Error::bug(e.to_string()))?;
    let _superuser = ActingAs::superuser();
    Spi::connect_mut(|client| {
        let arguments = [
            peer.into(),
            (mark.position.0 as i64).into(),
            (mark.low.0 as i64).into(),
            descriptor.schema.as_str().into(),
            descriptor.table.as_str().into(),
            shape.into(),
            bytes.into(),
        ];
        client.update(QUERY, None, &arguments).map(drop)
    })?;
    Ok(())
}

/// The peer's tables (oids there) that have held changes.
pub fn relids(peer: &str) -> Result<Vec<u32>> {
    let _superuser = ActingAs::superuser();
    let query = "select distinct descriptor from tandem.held where peer = $1";
    Spi::connect(|client| {
        let mut relids = Vec::new();
        for row in client.select(query, None, &[peer.into()])? {
            let text = row.get::<String>(1)?.unwrap_or_default();
            relids.push(parse(&text)?.relid);
        }
        relids.sort_unstable();
        relids.dedup();
        Ok(relids)
    })
}

fn parse(text: &str) -> Result<Descriptor> {
    serde_json::from_str(text).map_err(|e| Error::bug(format!("a held change's descriptor cannot be read: {e}")))
}

/// The next page of held changes after `ordinal`, in order.
pub fn page(peer: &str, ordinal: i64) -> Result<Vec<Held>> {
    const QUERY: &str = "
        select ordinal, \"position\"::int8, low::int8, descriptor, item from tandem.held
        where peer = $1 and ordinal > $2 order by ordinal limit $3";
    let _superuser = ActingAs::superuser();
    Spi::connect(|client| {
        let mut page = Vec::new();
        for row in client.select(QUERY, None, &[peer.into(), ordinal.into(), PAGE.into()])? {
            let number = |i| -> Result<i64> { Ok(row.get::<i64>(i)?.unwrap_or(0)) };
            page.push(Held {
                ordinal: number(1)?,
                mark: Mark { position: Position(number(2)? as u64), low: Hlc(number(3)? as u64) },
                descriptor: parse(&row.get::<String>(4)?.unwrap_or_default())?,
                item: row.get::<Vec<u8>>(5)?.unwrap_or_default(),
            });
        }
        Ok(page)
    })
}

/// Forgets changes that were applied.
pub fn delete(ordinals: &[i64]) -> Result<()> {
    let _superuser = ActingAs::superuser();
    let query = "delete from tandem.held where ordinal = any($1)";
    Spi::connect_mut(|client| client.update(query, None, &[ordinals.to_vec().into()]).map(drop))?;
    Ok(())
}
