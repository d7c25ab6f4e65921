//! Table descriptors: what a change refers to, so that it outlives DDL.
use crate::orphan::OnFk;
use crate::versions::CellId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Number of a stored descriptor, unique on the node that sends it.
pub type DescriptorId = u32;

/// How values of a column travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// The bytes of a text-like varlena in the server's encoding.
    Raw,
    /// The type's send and receive functions.
    Binary,
    /// The type's output and input functions, under pinned settings.
    Text,
}

/// One column of a table, as its changes describe it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnShape {
    /// Attribute number on the sending node: the column's identity across renames.
    pub attnum: u16,
    pub name: String,
    /// `format_type` with typmod, schema-qualified: what must agree on both sides.
    pub type_name: String,
    pub transport: Transport,
    pub cell: CellId,
}

/// A table as its changes describe it. Stored once, named by its id in every change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    pub id: DescriptorId,
    /// Oid of the table on the sending node (the identity across renames of the table).
    pub relid: u32,
    pub schema: String,
    pub table: String,
    /// Without generated and dropped columns and without `_hlc` and `_cells`; by attnum.
    #[serde(deserialize_with = "crate::bounded::list")]
    pub columns: Vec<ColumnShape>,
    /// Attribute numbers of the key, in key order.
    #[serde(deserialize_with = "crate::bounded::list")]
    pub key: Vec<u16>,
    /// How conflicts are decided at once, where not by the later write: what (rows, cells, columns) → policy.
    #[serde(default)]
    pub policies: BTreeMap<String, String>,
    /// What becomes of a row whose parent was deleted unseen.
    #[serde(default)]
    pub on_fk: OnFk,
}

/// Why two descriptors of one table name don't go together; text for `tandem.tables`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference(pub String);

impl Descriptor {
    /// Compares by names: columns, types, key, cells (as sets of column names). Order and numbers don't
    /// matter. `self` is this node's, `other` the peer's; the first difference found is told.
    pub fn agrees(&self, other: &Descriptor) -> Result<(), Difference> {
        let (mine, theirs) = (self.types(), other.types());
        for (name, ours) in &mine {
            match theirs.get(name) {
                None => return differs(format!("column \"{name}\" is missing on the peer")),
                Some(their) if their != ours => {
                    return differs(format!("column \"{name}\" is {ours} here and {their} on the peer"));
                }
                Some(_) => {}
            }
        }
        if let Some(name) = theirs.keys().find(|name| !mine.contains_key(*name)) {
            return differs(format!("column \"{name}\" is missing here"));
        }
        let (mine, theirs) = (self.key_names(), other.key_names());
        if mine != theirs {
            return differs(format!("the key is {} here and {} on the peer", list(&mine), list(&theirs)));
        }
        let (mine, theirs) = (self.cell_names(), other.cell_names());
        if let Some(cell) = mine.difference(&theirs).next() {
            return differs(format!("{} is decided as one cell here but not on the peer", list(cell)));
        }
        if let Some(cell) = theirs.difference(&mine).next() {
            return differs(format!("{} is decided as one cell on the peer but not here", list(cell)));
        }
        for what in self.policies.keys().chain(other.policies.keys()) {
            let by = |shape: &Descriptor| shape.policies.get(what).cloned().unwrap_or("last_update_wins".into());
            if by(self) != by(other) {
                let (ours, theirs) = (by(self), by(other));
                return differs(format!("{what} decided by {ours} here and by {theirs} on the peer"));
            }
        }
        if self.on_fk != other.on_fk {
            return differs(format!("on_fk is '{}' here and '{}' on the peer", self.on_fk, other.on_fk));
        }
        Ok(())
    }
    /// The columns of a cell in attnum order, key columns excluded.
    pub fn cell_columns(&self, cell: CellId) -> impl Iterator<Item = &ColumnShape> {
        self.columns.iter().filter(move |c| c.cell == cell && !self.key.contains(&c.attnum))
    }
    fn types(&self) -> BTreeMap<&str, &str> {
        self.columns.iter().map(|c| (c.name.as_str(), c.type_name.as_str())).collect()
    }
    fn key_names(&self) -> BTreeSet<&str> {
        self.columns.iter().filter(|c| self.key.contains(&c.attnum)).map(|c| c.name.as_str()).collect()
    }
    fn cell_names(&self) -> BTreeSet<BTreeSet<&str>> {
        let mut cells = BTreeMap::<CellId, BTreeSet<&str>>::new();
        for column in self.columns.iter().filter(|c| !self.key.contains(&c.attnum)) {
            cells.entry(column.cell).or_default().insert(&column.name);
        }
        cells.into_values().collect()
    }
}

fn differs(why: String) -> Result<(), Difference> {
    Err(Difference(why))
}

fn list(names: &BTreeSet<&str>) -> String {
    format!("({})", names.iter().copied().collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(columns: &[(&str, &str, CellId)], key: &[u16]) -> Descriptor {
        let columns = (1..).zip(columns).map(|(attnum, &(name, type_name, cell))| ColumnShape {
            attnum,
            name: name.into(),
            type_name: type_name.into(),
            transport: Transport::Binary,
            cell,
        });
        Descriptor {
            id: 1,
            relid: 16_384,
            schema: "public".into(),
            table: "t".into(),
            columns: columns.collect(),
            key: key.to_vec(),
            policies: BTreeMap::new(),
            on_fk: OnFk::default(),
        }
    }
    fn why(a: &Descriptor, b: &Descriptor) -> String {
        a.agrees(b).expect_err("they differ").0
    }

    #[test]
    fn order_and_numbers_do_not_matter() {
        let a = table(&[("id", "integer", 1), ("lat", "real", 2), ("lon", "real", 2), ("n", "text", 4)], &[1]);
        let b = table(&[("n", "text", 1), ("lon", "real", 2), ("id", "integer", 3), ("lat", "real", 2)], &[3]);
        assert_eq!(a.agrees(&b), Ok(()));
        assert_eq!(b.agrees(&a), Ok(()));
    }

    #[test]
    fn every_difference_is_told() {
        let base = [("id", "integer", 1), ("a", "text", 2), ("b", "text", 3)];
        let a = table(&base, &[1]);
        assert_eq!(why(&a, &table(&base[..2], &[1])), "column \"b\" is missing on the peer");
        assert_eq!(why(&table(&base[..2], &[1]), &a), "column \"b\" is missing here");
        let mut other = table(&base, &[1]);
        other.columns[1].type_name = "bigint".into();
        assert_eq!(why(&a, &other), "column \"a\" is text here and bigint on the peer");
        assert_eq!(why(&a, &table(&base, &[1, 2])), "the key is (id) here and (a, id) on the peer");
        let mut other = table(&base, &[1]);
        other.on_fk = OnFk::Report;
        assert_eq!(why(&a, &other), "on_fk is 'revive' here and 'report' on the peer");
        let grouped = table(&[base[0], base[1], ("b", "text", 2)], &[1]);
        assert_eq!(why(&a, &grouped), "(a) is decided as one cell here but not on the peer");
        assert_eq!(why(&grouped, &a), "(a, b) is decided as one cell here but not on the peer");
        let mut other = table(&base, &[1]);
        other.policies.insert("rows are".into(), "delete_wins".into());
        assert_eq!(why(&a, &other), "rows are decided by last_update_wins here and by delete_wins on the peer");
        assert_eq!(why(&other, &a), "rows are decided by delete_wins here and by last_update_wins on the peer");
    }

    #[test]
    fn the_cell_of_a_key_column_does_not_matter() {
        let a = table(&[("id", "integer", 0), ("a", "text", 0)], &[1]);
        let b = table(&[("id", "integer", 1), ("a", "text", 2)], &[1]);
        assert_eq!(a.agrees(&b), Ok(()));
        assert_eq!(a.cell_columns(0).map(|c| c.attnum).collect::<Vec<_>>(), [2]);
    }
}
