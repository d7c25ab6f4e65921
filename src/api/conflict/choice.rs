//! What a decision asks for, worked out against the record: which columns take which values, or that the
//! row goes. Looks at no row.
use super::columns::{Columns, names_column};
use super::stored::{Side, Stored};
use crate::error::{Error, Result};
use crate::relation::{Column, SyncedRelation};
use pgrx::Json;
use pgrx::prelude::*;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use tandem_model::record::{ConflictType, Image};

/// What the caller said.
pub struct Request {
    resolution: Option<String>,
    with_tuple: Option<Map<String, Value>>,
}

/// What is to be written.
pub enum Choice {
    /// The row is to hold these values.
    Row {
        /// Set if the row is there, by column name.
        set: Map<String, Value>,
        /// The row whole, to be born if it isn't there; none if the request doesn't tell enough.
        whole: Option<Map<String, Value>>,
    },
    /// The row is to go.
    Nothing,
    /// This row is to live beside the one that won.
    Beside(Map<String, Value>),
}

impl Request {
    /// Errors (22023) if nothing is asked for, or `with_tuple` is no object.
    pub fn new(resolution: Option<&str>, with_tuple: Option<Json>) -> Result<Request> {
        let with_tuple = match with_tuple.map(|json| json.0) {
            None => None,
            Some(Value::Object(columns)) if !columns.is_empty() => Some(columns),
            Some(_) => {
                return Err(invalid(
                    "with_tuple is not an object of columns and values",
                    "For example with_tuple => '{\"balance\": 70}'.",
                ));
            }
        };
        if resolution.is_none() && with_tuple.is_none() {
            return Err(invalid(
                "nothing to resolve the conflict with",
                "Name one of 'local', 'remote', 'base', 'result', 'keep_both', or give columns with with_tuple => '{…}'.",
            ));
        }
        Ok(Request { resolution: resolution.map(str::to_string), with_tuple })
    }

    /// How the decision is called on record. "local" means something else on the other node: its name doesn't.
    pub fn label(&self, stored: &Stored) -> String {
        match self.resolution.as_deref() {
            None => "with_tuple".to_string(),
            Some("local") => stored.around.own_name.clone(),
            Some("remote") => stored.around.peer_name.clone().unwrap_or_else(|| "remote".to_string()),
            Some(other) => other.to_string(),
        }
    }
}

impl Choice {
    /// Errors: 22023 for a resolution that is not known, 55000 for an image that is not, 42703.
    pub fn of(request: &Request, stored: &Stored, columns: &Columns) -> Result<Choice> {
        let relation = &*columns.relation;
        let given = request.with_tuple.as_ref();
        if let Some(name) = given.into_iter().flat_map(Map::keys).find(|name| column(relation, name).is_none()) {
            return Err(Error::operator(
                PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
                format!("column \"{name}\" of table {} does not exist", relation.display_name()),
                "with_tuple names columns of the table; generated ones cannot be set.",
            ));
        }
        let mut choice = match request.resolution.as_deref() {
            None => Choice::Row { set: Map::new(), whole: None },
            Some("keep_both") => return keep_both(given, stored, columns),
            Some(side) => side_of(side, stored, columns)?,
        };
        for (name, value) in given.into_iter().flatten() {
            match &mut choice {
                Choice::Row { set, whole } => {
                    set.insert(name.clone(), value.clone());
                    whole.iter_mut().for_each(|w| drop(w.insert(name.clone(), value.clone())));
                }
                _ => return Err(invalid("the chosen side has no row to set columns of", "Leave with_tuple out.")),
            }
        }
        Ok(choice)
    }
}

/// The values of one image: of the cells that were lost, or of the row if it was lost whole.
fn side_of(side: &str, stored: &Stored, columns: &Columns) -> Result<Choice> {
    let known = match side {
        "local" => stored.local(),
        "remote" => stored.remote(),
        "base" => stored.base(),
        "result" => stored.result(),
        name if name == stored.around.own_name => stored.local(),
        name if Some(name) == stored.around.peer_name.as_deref() => stored.remote(),
        other => {
            return Err(invalid(
                &format!("resolution \"{other}\" is not known"),
                "It is one of 'local', 'remote', 'base', 'result', 'keep_both', or the name of a node.",
            ));
        }
    };
    let tuple = match known {
        Side::Row(image) => content(image, columns)?,
        Side::NoRow => return Ok(Choice::Nothing),
        Side::Unknown => return Err(unknown(side, "row")),
    };
    let lost = lost_columns(stored, columns);
    if lost.is_empty() && !stored.record.cells.is_empty() {
        return Err(all_dropped(stored, columns));
    }
    if let Some(name) = lost.iter().find(|name| !tuple.contains_key(**name)) {
        return Err(unknown(side, name));
    }
    let set = tuple.iter().filter(|(name, _)| lost.contains(name.as_str()));
    let set = set.map(|(name, value)| (name.clone(), value.clone())).collect();
    Ok(Choice::Row { set, whole: Some(tuple) })
}

fn keep_both(given: Option<&Map<String, Value>>, stored: &Stored, columns: &Columns) -> Result<Choice> {
    if !matches!(
        stored.record.conflict_type,
        ConflictType::InsertExists | ConflictType::UpdateExists | ConflictType::MultipleUniqueConflicts
    ) {
        return Err(invalid(
            "'keep_both' is for conflicts of two rows over one key or unique value",
            "Choose a side, or give the columns with with_tuple.",
        ));
    }
    let Some(given) = given else {
        return Err(invalid(
            "'keep_both' needs other values for the row that lost",
            "For example tandem.resolve(conflict_id, 'keep_both', with_tuple => '{\"id\": 18}').",
        ));
    };
    let Side::Row(loser) = stored.loser() else {
        return Err(unknown("the losing side", "row"));
    };
    let mut tuple = content(loser, columns)?;
    given.iter().for_each(|(name, value)| drop(tuple.insert(name.clone(), value.clone())));
    Ok(Choice::Beside(tuple))
}

/// The columns of an image that the table still has, by their names of today.
pub fn content(image: &Image, columns: &Columns) -> Result<Map<String, Value>> {
    let then: Map<String, Value> =
        serde_json::from_str(image.tuple.get()).map_err(|e| Error::bug(format!("an image cannot be read: {e}")))?;
    Ok(then.into_iter().filter_map(|(name, value)| Some((columns.now(&name)?.to_string(), value))).collect())
}

/// Columns outside the key that were lost and are still there: those of the record's cells, all if the row was
/// lost whole.
pub fn lost_columns<'a>(stored: &Stored, columns: &'a Columns) -> BTreeSet<&'a str> {
    let cells = &stored.record.cells;
    let lost = |c: &&Column| match cells.is_empty() {
        true => columns.then(c).is_some(),
        false => cells.iter().any(|cell| columns.in_cell(cell, c)),
    };
    let outside_key = columns.relation.columns.iter().filter(|c| c.key_ordinal.is_none());
    outside_key.filter(lost).map(|c| c.name.as_str()).collect()
}

/// Names, of then, of the columns that were lost and have been dropped since.
pub fn dropped_columns(stored: &Stored, columns: &Columns) -> Vec<String> {
    let cells = &stored.record.cells;
    let lost = |name: &str| cells.is_empty() || cells.iter().any(|cell| names_column(cell, name));
    let named = cells.iter().flat_map(|cell| cell.split(',')).filter(|name| *name != "row").map(str::to_string);
    let images = [stored.local(), stored.remote(), stored.base()];
    let imaged = images.iter().filter_map(|side| match side {
        Side::Row(image) => serde_json::from_str::<Map<String, Value>>(image.tuple.get()).ok(),
        Side::NoRow | Side::Unknown => None,
    });
    let mut names: BTreeSet<String> = named.collect();
    names.extend(imaged.flat_map(|image| image.keys().cloned().collect::<Vec<_>>()).filter(|name| lost(name)));
    names.into_iter().filter(|name| columns.now(name).is_none()).collect()
}

fn all_dropped(stored: &Stored, columns: &Columns) -> Error {
    let names = dropped_columns(stored, columns).join("\", \"");
    Error::operator(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        format!("what was lost is no longer in table {}: column \"{names}\"", columns.relation.display_name()),
        format!("SELECT tandem.ignore('{}'); closes the conflict.", stored.record.conflict_id),
    )
}

pub fn column<'a>(relation: &'a SyncedRelation, name: &str) -> Option<&'a Column> {
    relation.columns.iter().find(|c| c.name == name)
}

fn invalid(message: &str, hint: &str) -> Error {
    Error::operator(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message, hint)
}

fn unknown(side: &str, what: &str) -> Error {
    Error::operator(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        format!("the record does not know the {what} of '{side}'"),
        "SELECT tandem.show_conflict(conflict_id); shows what it knows. Give the columns with with_tuple => '{…}'.",
    )
}
