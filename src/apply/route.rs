//! From the sender's columns and cells to the local ones.
//!
//! A change names a descriptor: the sender's table as it was then. Its columns are followed by attribute
//! number to the table as it is at the sender now, and from there by name to the local table.
use crate::error::{Error, Result};
use crate::relation::SyncedRelation;
use crate::value;
use pgrx::prelude::*;
use serde_bytes::Bytes;
use std::collections::HashMap;
use std::rc::Rc;
use tandem_model::change::{CellChange, Change, Op};
use tandem_model::descriptor::{ColumnShape, Descriptor};
use tandem_model::versions::CellId;

/// A value that arrived: the index of its local column, and what it is (`None`: NULL).
pub type Arrived = Vec<(usize, Option<pg_sys::Datum>)>;

/// How one of the sender's columns is stored here.
struct Column {
    shape: ColumnShape,
    /// Index into the local columns; none: the sender has dropped it since.
    local: Option<usize>,
}

/// The way from one descriptor of the sender to a local table.
pub struct Route {
    pub descriptor: Descriptor,
    pub local: Rc<SyncedRelation>,
    /// Looked up beforehand: it is wanted when an error was raised.
    pub key_index_name: String,
    /// The sender's key columns with their local counterparts, in the sender's order.
    key: Vec<Column>,
    /// Of each of the sender's cells: its columns in the sender's order.
    cells: HashMap<CellId, Vec<Column>>,
    /// The local cell for each of the sender's; a cell that was dropped since has none.
    cell_ids: HashMap<CellId, CellId>,
}

/// A change in local terms: what the model judges, and the values by local column.
pub struct Local<'a> {
    pub change: Change<'a>,
    /// In the local key's order.
    pub key: Vec<pg_sys::Datum>,
    pub new: Arrived,
    route: &'a Route,
    sent: &'a Change<'a>,
}

impl Route {
    /// Builds the way, given the sender's table as it is now. Errors tell a person why there is none.
    pub fn new(
        descriptor: &Descriptor,
        current: &Descriptor,
        local: Rc<SyncedRelation>,
    ) -> std::result::Result<Route, String> {
        let column = |shape: &ColumnShape| {
            let now = current.columns.iter().find(|c| c.attnum == shape.attnum);
            let local = match now {
                None => None,
                Some(now) => Some(
                    local
                        .columns
                        .iter()
                        .position(|c| c.name == now.name)
                        .ok_or_else(|| format!("column \"{}\" is missing here", now.name))?,
                ),
            };
            Ok::<Column, String>(Column { shape: shape.clone(), local })
        };
        let by_attnum = |attnum: &u16| {
            descriptor
                .columns
                .iter()
                .find(|c| c.attnum == *attnum)
                .ok_or_else(|| "the peer's description names a key column that it does not have".to_string())
        };
        let key =
            descriptor.key.iter().map(|a| by_attnum(a).and_then(column)).collect::<std::result::Result<Vec<_>, _>>()?;
        let same_key =
            key.len() == local.key.len() && local.key.iter().all(|l| key.iter().any(|k| k.local == Some(*l)));
        if !same_key {
            return Err("the key has other columns here than on the peer".to_string());
        }
        let mut cells: HashMap<CellId, Vec<Column>> = HashMap::new();
        for shape in descriptor.columns.iter().filter(|c| !descriptor.key.contains(&c.attnum)) {
            cells.entry(shape.cell).or_default().push(column(shape)?);
        }
        let mut cell_ids = HashMap::new();
        for (cell, columns) in &cells {
            let mut targets: Vec<CellId> =
                columns.iter().filter_map(|c| c.local).map(|i| local.columns[i].cell).collect();
            targets.sort_unstable();
            targets.dedup();
            match targets[..] {
                [] => {}
                [target] => drop(cell_ids.insert(*cell, target)),
                _ => return Err("columns that are decided as one on the peer are not so here".to_string()),
            }
        }
        let key_index_name = relation_name(local.key_index);
        Ok(Route { descriptor: descriptor.clone(), local, key_index_name, key, cells, cell_ids })
    }

    /// What a column of the sender is called here.
    pub fn local_name(&self, name: &str) -> Option<String> {
        let shape = self.descriptor.columns.iter().find(|c| c.name == name)?;
        let mut columns = self.key.iter().chain(self.cells.values().flatten());
        let local = columns.find(|c| c.shape.attnum == shape.attnum)?.local?;
        Some(self.local.columns[local].name.clone())
    }

    /// Translates a change. Values are decoded into the current memory context; bad bytes raise.
    pub fn translate<'a>(&'a self, sent: &'a Change<'a>) -> Result<Local<'a>> {
        if sent.key.len() != self.key.len() {
            return Err(malformed(format!("a key of {} values where {} are expected", sent.key.len(), self.key.len())));
        }
        let key = self.key_values(&sent.key)?;
        let mut new = Vec::new();
        let mut cells = Vec::with_capacity(sent.cells.len());
        for cell in &sent.cells {
            let Some(columns) = self.cells.get(&cell.cell) else {
                return Err(malformed(format!("a change of cell {}, which its table does not have", cell.cell)));
            };
            let old_fits = if sent.op == Op::Update { cell.old.len() == columns.len() } else { cell.old.is_empty() };
            if cell.new.len() != columns.len() || !old_fits {
                return Err(malformed("a change has more or fewer values than its cell has columns".to_string()));
            }
            let Some(id) = self.cell_ids.get(&cell.cell) else { continue };
            self.decode(columns, &cell.new, &mut new);
            let (version, delta) = (cell.version, cell.delta);
            cells.push(CellChange { cell: *id, version, new: Vec::new(), old: Vec::new(), delta });
        }
        let change = Change {
            descriptor: sent.descriptor,
            op: sent.op,
            key: Vec::new(),
            version: sent.version,
            life: sent.life,
            base: sent.base.translated(|cell| self.cell_ids.get(&cell).copied()),
            cells,
            moved: None,
        };
        Ok(Local { change, key, new, route: self, sent })
    }

    /// Key values in the local order.
    fn key_values(&self, sent: &[Option<&Bytes>]) -> Result<Vec<pg_sys::Datum>> {
        self.local
            .key
            .iter()
            .map(|local| {
                let found = self.key.iter().zip(sent).find(|(column, _)| column.local == Some(*local));
                match found {
                    Some((column, Some(bytes))) => Ok(self.value(column, *local, bytes)),
                    _ => Err(malformed("a change with a NULL in its key".to_string())),
                }
            })
            .collect()
    }

    fn decode(&self, columns: &[Column], values: &[Option<&Bytes>], out: &mut Arrived) {
        for (column, value) in columns.iter().zip(values) {
            if let Some(local) = column.local {
                out.push((local, value.map(|bytes| self.value(column, local, bytes))));
            }
        }
    }

    fn value(&self, column: &Column, local: usize, bytes: &[u8]) -> pg_sys::Datum {
        let target = &self.local.columns[local];
        if column.shape.type_name == target.type_name && column.shape.transport == target.transport {
            value::decode(target, bytes)
        } else {
            value::decode_as(&column.shape.type_name, column.shape.transport, target, bytes)
        }
    }
}

impl Local<'_> {
    /// The values that the change replaced at its sender, of the given local cells.
    pub fn old_values(&self, cells: &[CellId]) -> Arrived {
        let mut old = Vec::new();
        for cell in &self.sent.cells {
            let wanted = self.route.cell_ids.get(&cell.cell).is_some_and(|id| cells.contains(id));
            if let (true, false, Some(columns)) = (wanted, cell.old.is_empty(), self.route.cells.get(&cell.cell)) {
                self.route.decode(columns, &cell.old, &mut old);
            }
        }
        old
    }
}

fn relation_name(oid: pg_sys::Oid) -> String {
    // SAFETY: a catalog lookup; null if there is none, else a C string in the current context.
    unsafe {
        let name = pg_sys::get_rel_name(oid);
        if name.is_null() { String::new() } else { std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned() }
    }
}

fn malformed(why: String) -> Error {
    Error::operator(
        PgSqlErrorCode::ERRCODE_PROTOCOL_VIOLATION,
        format!("the peer sent {why}"),
        "The sending side is damaged or speaks another protocol; see its server log.",
    )
}
