//! What the columns of a record are called today: a table may have been altered since the conflict. Columns
//! are followed by their number, through the shapes that the table has had.
use super::stored::Stored;
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use crate::relation::{Column, SyncedRelation};
use pgrx::prelude::*;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::rc::Rc;
use tandem_model::descriptor::Descriptor;

/// The shapes of a table, newest first.
pub struct Shapes(Vec<Descriptor>);

/// From the names in a record to those of today.
pub struct Columns {
    pub relation: Rc<SyncedRelation>,
    /// By the name of then; none: the column was dropped.
    now: HashMap<String, Option<String>>,
    /// By the name of now; a column that is not here was added since.
    then: HashMap<String, String>,
}

impl Shapes {
    pub fn of(relid: pg_sys::Oid) -> Result<Shapes> {
        let _catalog = ActingAs::superuser();
        let query = "select shape from tandem.descriptor where relid = $1 order by id desc";
        let texts = Spi::connect(|client| -> std::result::Result<Vec<String>, pgrx::spi::Error> {
            client.select(query, None, &[relid.into()])?.filter_map(|row| row.get::<String>(1).transpose()).collect()
        })?;
        let parse = |text: &String| {
            serde_json::from_str(text).map_err(|e| Error::bug(format!("a stored descriptor cannot be read: {e}")))
        };
        Ok(Shapes(texts.iter().map(parse).collect::<Result<_>>()?))
    }

    /// The shape that an image of the record is of; none if all are incomplete. An image lists the columns in
    /// the order of the table (of the node that made it): that tells a column from a later one of its name.
    fn of_record(&self, stored: &Stored) -> Option<&Descriptor> {
        let record = &stored.record;
        let images: Vec<Vec<String>> = record
            .tuples
            .values()
            .chain(&record.base)
            .chain(&record.result)
            .filter_map(|image| serde_json::from_str::<Map<String, Value>>(image.tuple.get()).ok())
            .map(|image| image.keys().cloned().collect())
            .collect();
        let names = |shape: &Descriptor| shape.columns.iter().map(|c| c.name.clone()).collect::<Vec<_>>();
        let sorted = |mut names: Vec<String>| {
            names.sort_unstable();
            names
        };
        let exact = self.0.iter().find(|shape| images.contains(&names(shape)));
        let sets: Vec<_> = images.iter().cloned().map(sorted).collect();
        exact.or_else(|| self.0.iter().find(|shape| sets.contains(&sorted(names(shape)))))
    }
}

impl Columns {
    pub fn of(stored: &Stored, relation: Rc<SyncedRelation>, shapes: &Shapes) -> Columns {
        let mut columns = Columns { now: HashMap::new(), then: HashMap::new(), relation };
        if let Some(shape) = shapes.of_record(stored) {
            for was in &shape.columns {
                columns.link(&was.name, was.attnum);
            }
            return columns;
        }
        // Nothing tells the shape of then: a name that is still there is taken for the same column, another for
        // the last column that was called so.
        let named: Vec<_> = columns.relation.columns.iter().map(|c| (c.name.clone(), c.attnum as u16)).collect();
        let past = shapes.0.iter().flat_map(|shape| shape.columns.iter().map(|c| (c.name.clone(), c.attnum)));
        for (name, attnum) in named.into_iter().chain(past) {
            if !columns.now.contains_key(&name) {
                columns.link(&name, attnum);
            }
        }
        columns
    }

    fn link(&mut self, then: &str, attnum: u16) {
        let now = self.relation.columns.iter().find(|c| c.attnum as u16 == attnum).map(|c| c.name.clone());
        if let Some(now) = &now {
            self.then.entry(now.clone()).or_insert_with(|| then.to_string());
        }
        self.now.insert(then.to_string(), now);
    }

    /// What a column of the record is called today; none if it was dropped.
    pub fn now(&self, then: &str) -> Option<&str> {
        self.now.get(then).and_then(Option::as_deref)
    }

    /// What a column of today was called; none if it was added since.
    pub fn then(&self, column: &Column) -> Option<&str> {
        self.then.get(&column.name).map(String::as_str)
    }

    /// The columns that a record's cell is made of, by their names of then. A cell is called by the names of
    /// its columns.
    pub fn in_cell(&self, cell: &str, column: &Column) -> bool {
        self.then(column).is_some_and(|then| names_column(cell, then))
    }
}

/// True if a cell of this name holds the column.
pub fn names_column(cell: &str, column: &str) -> bool {
    cell == "row" || cell == column || cell.split(',').any(|name| name == column)
}
