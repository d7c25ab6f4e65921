//! Images of rows: from tombstones, and as JSON for the conflict record.
use super::table::{Row, value_of};
use crate::error::{Error, Result};
use crate::relation::SyncedRelation;
use crate::tombstone::Tombstone;
use crate::value;
use pgrx::prelude::*;
use serde_json::value::RawValue;
use tandem_model::descriptor::Descriptor;

/// What is known of a row: by index of the local column; outside `None`: not known, inside: NULL.
pub type Content = Vec<Option<Option<pg_sys::Datum>>>;

/// All columns of a stored row.
pub fn of_row(rel: &SyncedRelation, row: &Row) -> Content {
    rel.columns.iter().map(|c| Some(value_of(row, c.attnum))).collect()
}

/// The row that a tombstone remembers, under the table's shape of today.
pub fn of_tombstone(rel: &SyncedRelation, tombstone: &Tombstone) -> Result<Content> {
    let values = value::decode_image(&tombstone.image)?;
    let shape = if tombstone.descriptor == rel.descriptor { None } else { Some(own_shape(tombstone.descriptor)?) };
    let mut content = vec![None; rel.columns.len()];
    for (attnum, bytes) in &values {
        let Some(i) = rel.columns.iter().position(|c| c.attnum as u16 == *attnum) else { continue };
        let column = &rel.columns[i];
        let was = shape.as_ref().and_then(|s| s.columns.iter().find(|c| c.attnum == *attnum));
        content[i] = Some(bytes.as_deref().map(|bytes| match was {
            Some(was) if was.type_name != column.type_name => {
                value::decode_as(&was.type_name, was.transport, column, bytes)
            }
            _ => value::decode(column, bytes),
        }));
    }
    Ok(content)
}

/// A descriptor that this node stored.
fn own_shape(id: u32) -> Result<Descriptor> {
    let query = "select shape from tandem.descriptor where id = $1";
    let shape =
        Spi::connect(|client| client.select(query, Some(1), &[(id as i32).into()])?.first().get_one::<String>())?;
    shape
        .and_then(|shape| serde_json::from_str(&shape).ok())
        .ok_or_else(|| Error::bug(format!("descriptor {id} is not stored")))
}

/// The bytes that a tombstone stores.
pub fn to_bytes(rel: &SyncedRelation, content: &Content) -> Vec<u8> {
    let values: Vec<(u16, Option<Vec<u8>>)> = rel
        .columns
        .iter()
        .zip(content)
        .filter_map(|(column, known)| {
            let value = (*known)?.map(|datum| {
                let mut out = Vec::new();
                value::encode(column, datum, &mut out);
                out
            });
            Some((column.attnum as u16, value))
        })
        .collect();
    value::encode_image(&values.iter().map(|(a, v)| (*a, v.as_deref())).collect::<Vec<_>>())
}

/// Only what arrived, and the key.
pub fn of_arrived(rel: &SyncedRelation, key: &[pg_sys::Datum], arrived: &[(usize, Option<pg_sys::Datum>)]) -> Content {
    let mut content = vec![None; rel.columns.len()];
    for (value, column) in key.iter().zip(&rel.key) {
        content[*column] = Some(Some(*value));
    }
    overlay(&mut content, arrived);
    content
}

/// Puts values over what is known.
pub fn overlay(content: &mut Content, arrived: &[(usize, Option<pg_sys::Datum>)]) {
    for (column, value) in arrived {
        content[*column] = Some(*value);
    }
}

/// A JSON object of what is known, columns in the table's order.
pub fn to_json(rel: &SyncedRelation, content: &Content) -> Result<Box<RawValue>> {
    object(rel.columns.iter().zip(content).filter_map(|(column, known)| Some((column, (*known)?))))
}

/// A JSON object of the key, columns in key order.
pub fn key_json(rel: &SyncedRelation, key: &[pg_sys::Datum]) -> Result<Box<RawValue>> {
    object(rel.key.iter().zip(key).map(|(i, value)| (&rel.columns[*i], Some(*value))))
}

/// A JSON literal of one value.
pub fn literal(column: &crate::relation::Column, value: Option<pg_sys::Datum>) -> Result<Box<RawValue>> {
    RawValue::from_string(value::to_json(column, value))
        .map_err(|e| Error::bug(format!("a value of a row is not JSON: {e}")))
}

fn object<'a>(
    fields: impl Iterator<Item = (&'a crate::relation::Column, Option<pg_sys::Datum>)>,
) -> Result<Box<RawValue>> {
    let fields: Vec<String> = fields
        .map(|(column, value)| {
            format!("{}:{}", serde_json::Value::from(column.name.as_str()), value::to_json(column, value))
        })
        .collect();
    RawValue::from_string(format!("{{{}}}", fields.join(",")))
        .map_err(|e| Error::bug(format!("the image of a row is not JSON: {e}")))
}
