//! Conflict records: a replicated set with a join, so that both nodes hold the same history.
use crate::hlc::{Hlc, NodeId};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use uuid::Uuid;

/// Postgres's own names, and ours where it has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConflictType {
    InsertExists,
    UpdateOriginDiffers,
    UpdateExists,
    UpdateMissing,
    UpdateDeleted,
    DeleteOriginDiffers,
    DeleteMissing,
    MultipleUniqueConflicts,
    ForeignKeyViolation,
    CheckViolation,
    TruncateOriginDiffers,
    InitialDiffers,
}

impl ConflictType {
    pub const ALL: [ConflictType; 12] = [
        ConflictType::InsertExists,
        ConflictType::UpdateOriginDiffers,
        ConflictType::UpdateExists,
        ConflictType::UpdateMissing,
        ConflictType::UpdateDeleted,
        ConflictType::DeleteOriginDiffers,
        ConflictType::DeleteMissing,
        ConflictType::MultipleUniqueConflicts,
        ConflictType::ForeignKeyViolation,
        ConflictType::CheckViolation,
        ConflictType::TruncateOriginDiffers,
        ConflictType::InitialDiffers,
    ];

    /// The name that users see.
    pub fn name(self) -> &'static str {
        match self {
            ConflictType::InsertExists => "insert_exists",
            ConflictType::UpdateOriginDiffers => "update_origin_differs",
            ConflictType::UpdateExists => "update_exists",
            ConflictType::UpdateMissing => "update_missing",
            ConflictType::UpdateDeleted => "update_deleted",
            ConflictType::DeleteOriginDiffers => "delete_origin_differs",
            ConflictType::DeleteMissing => "delete_missing",
            ConflictType::MultipleUniqueConflicts => "multiple_unique_conflicts",
            ConflictType::ForeignKeyViolation => "foreign_key_violation",
            ConflictType::CheckViolation => "check_violation",
            ConflictType::TruncateOriginDiffers => "truncate_origin_differs",
            ConflictType::InitialDiffers => "initial_differs",
        }
    }

    /// The type of a name.
    pub fn of_name(name: &str) -> Option<ConflictType> {
        ConflictType::ALL.into_iter().find(|t| t.name() == name)
    }
}

/// Where a conflict stands. At detection `Auto` or `Open`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Decided by the policy.
    Auto,
    Open,
    Resolved,
    Ignored,
    Superseded,
}

/// An image of the row, as one node had it. Joined by rank: greatest wins.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Image {
    /// (1 if the node told its own image, else 0; version the image shows; then the text itself).
    pub rank: (u8, Hlc),
    pub tuple: Box<RawValue>,
}

/// A decision is a cell with its own version, 0 at detection, so that a late detection never reopens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Decision {
    pub version: Hlc,
    pub status: Status,
    pub by: Option<String>,
    /// Microseconds since the Unix epoch.
    pub at: Option<i64>,
    pub resolution: Option<String>,
    pub note: Option<String>,
}

/// One losing write.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    pub conflict_id: Uuid,
    pub schema: String,
    pub table: String,
    /// The key as a JSON object, columns in key order.
    pub key: Box<RawValue>,
    pub conflict_type: ConflictType,
    pub constraint_name: Option<String>,
    pub losing: Hlc,
    /// The greatest version that is known to have won against it.
    pub winning: Hlc,
    /// Key of the row that holds what this one may not hold with it (a unique value, the place of a parent);
    /// then the record is of this pair of rows, not of all that the losing write met.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rival: Option<Box<RawValue>>,
    /// Names of the cells lost, sorted; empty: the row's existence.
    pub cells: Vec<String>,
    /// What the losing write held, by column, united over the pairs in which it was met: an image shows one
    /// moment, and what was lost before or after would not be in it.
    #[serde(default)]
    pub lost: BTreeMap<String, Box<RawValue>>,
    /// What it had replaced, likewise.
    #[serde(default)]
    pub replaced: BTreeMap<String, Box<RawValue>>,
    /// What the write that won at first held, where the arbiter's later write took its place.
    #[serde(default)]
    pub overruled: BTreeMap<String, Box<RawValue>>,
    pub base: Option<Image>,
    /// By node id.
    pub tuples: BTreeMap<u8, Image>,
    pub result: Option<Image>,
    pub policy: String,
    /// Microseconds since the Unix epoch; the earliest detection.
    pub detected_at: i64,
    pub decision: Decision,
}

/// Namespace of our name-based ids (a random uuid, fixed for ever).
const NAMESPACE: Uuid = Uuid::from_u128(0x6d0f_3b9e_41c5_4a7d_9a54_2f1c_8e07_b3d2);

impl Record {
    /// The same on both nodes: derived from table, key and losing version.
    pub fn id(schema: &str, table: &str, key_json: &str, losing: Hlc) -> Uuid {
        let mut name = Vec::new();
        for part in [schema, table, key_json] {
            name.extend_from_slice(&(part.len() as u64).to_be_bytes());
            name.extend_from_slice(part.as_bytes());
        }
        name.extend_from_slice(&losing.0.to_be_bytes());
        Uuid::new_v5(&NAMESPACE, &name)
    }
    /// The id that a record must have.
    pub fn derived_id(&self) -> Uuid {
        let id = Record::id(&self.schema, &self.table, self.key.get(), self.losing);
        match &self.rival {
            None => id,
            Some(rival) => {
                let mut name = self.winning.0.to_be_bytes().to_vec();
                name.extend_from_slice(rival.get().as_bytes());
                Uuid::new_v5(&id, &name)
            }
        }
    }
    /// Makes it the record of a constraint: `rival` is the key of the row that stands in the way, and for each
    /// pair of rows and versions there is one record.
    pub fn over(&mut self, rival: Box<RawValue>) {
        self.rival = Some(rival);
        self.conflict_id = self.derived_id();
    }
    /// The node whose write lost.
    pub fn losing_node(&self) -> NodeId {
        self.losing.node()
    }
    /// The join: commutative, associative, idempotent. Of two records of one id; of another id: no change.
    pub fn join(&mut self, other: Record) {
        if self.conflict_id != other.conflict_id {
            return;
        }
        // Both nodes may have met the losing write through different winners: any fixed choice will do.
        self.conflict_type = self.conflict_type.min(other.conflict_type);
        raise(&mut self.constraint_name, other.constraint_name);
        raise(&mut self.winning, other.winning);
        raise(&mut self.policy, other.policy);
        self.detected_at = self.detected_at.min(other.detected_at);
        self.cells = unite(std::mem::take(&mut self.cells), other.cells);
        unite_values(&mut self.lost, other.lost);
        unite_values(&mut self.replaced, other.replaced);
        unite_values(&mut self.overruled, other.overruled);
        raise_image(&mut self.base, other.base);
        raise_image(&mut self.result, other.result);
        for (node, image) in other.tuples {
            match self.tuples.entry(node) {
                Entry::Vacant(free) => drop(free.insert(image)),
                Entry::Occupied(mut held) if image.order() > held.get().order() => drop(held.insert(image)),
                Entry::Occupied(_) => {}
            }
        }
        if other.decision.order() > self.decision.order() {
            self.decision = other.decision;
        }
    }

    /// The record as it is shown: the loser's image holds every value that was lost, the winner's every one that
    /// was overruled, the base what they replaced.
    pub fn settled(&self) -> Record {
        let mut shown = self.clone();
        if let Some(image) = shown.tuples.get_mut(&self.losing_node().0) {
            image.overlay(&self.lost);
        }
        let loser = self.losing_node().0;
        if let Some((_, image)) = shown.tuples.iter_mut().find(|(node, _)| **node != loser) {
            image.overlay(&self.overruled);
        }
        if let Some(base) = &mut shown.base {
            base.overlay(&self.replaced);
        }
        shown
    }
}

impl Image {
    fn order(&self) -> ((u8, Hlc), &str) {
        (self.rank, self.tuple.get())
    }

    /// Puts values over those of the same names; the order of columns stays.
    fn overlay(&mut self, values: &BTreeMap<String, Box<RawValue>>) {
        let Ok(mut columns) = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(self.tuple.get())
        else {
            return;
        };
        for (name, value) in values {
            if let Ok(value) = serde_json::from_str(value.get()) {
                columns.insert(name.clone(), value);
            }
        }
        if let Ok(tuple) = serde_json::value::to_raw_value(&columns) {
            self.tuple = tuple;
        }
    }
}

impl Decision {
    fn order(&self) -> impl Ord + '_ {
        (self.version, self.status, &self.by, self.at, &self.resolution, &self.note)
    }
}

fn raise<T: Ord>(held: &mut T, other: T) {
    if other > *held {
        *held = other;
    }
}

fn raise_image(held: &mut Option<Image>, other: Option<Image>) {
    if other.as_ref().map(Image::order) > held.as_ref().map(Image::order) {
        *held = other;
    }
}

/// A write holds one value of a column; should two be told, any fixed choice will do.
fn unite_values(held: &mut BTreeMap<String, Box<RawValue>>, other: BTreeMap<String, Box<RawValue>>) {
    for (name, value) in other {
        match held.entry(name) {
            Entry::Vacant(free) => drop(free.insert(value)),
            Entry::Occupied(mut same) if value.get() > same.get().get() => drop(same.insert(value)),
            Entry::Occupied(_) => {}
        }
    }
}

/// No cells stands for the whole row, so it takes in any other list.
fn unite(mut cells: Vec<String>, other: Vec<String>) -> Vec<String> {
    if cells.is_empty() || other.is_empty() {
        return Vec::new();
    }
    cells.extend(other);
    cells.sort_unstable();
    cells.dedup();
    cells
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn raw(text: &str) -> Box<RawValue> {
        RawValue::from_string(text.into()).expect("valid json")
    }
    fn json(record: &Record) -> String {
        serde_json::to_string(record).expect("a record is json")
    }

    #[test]
    fn a_type_has_one_name_in_records_and_in_sql() {
        for conflict_type in ConflictType::ALL {
            let json = serde_json::to_string(&conflict_type).expect("a type is json");
            assert_eq!(json, format!("\"{}\"", conflict_type.name()));
            assert_eq!(ConflictType::of_name(conflict_type.name()), Some(conflict_type));
        }
        assert_eq!(ConflictType::of_name("InsertExists"), None);
    }

    #[test]
    fn the_id_tells_parts_apart() {
        let id = Record::id("public", "t", r#"{"id":1}"#, Hlc(65));
        assert_eq!(id, Record::id("public", "t", r#"{"id":1}"#, Hlc(65)));
        for other in [
            Record::id("publi", "ct", r#"{"id":1}"#, Hlc(65)),
            Record::id("public", "t{", r#""id":1}"#, Hlc(65)),
            Record::id("public", "t", r#"{"id":2}"#, Hlc(65)),
            Record::id("public", "t", r#"{"id":1}"#, Hlc(66)),
        ] {
            assert_ne!(id, other);
        }
        assert_eq!(id.get_version_num(), 5);
        assert_eq!(
            id.to_string(),
            "3824241f-f48a-5cb6-a4a5-c84e4707f113",
            "ids are stored and compared between versions of the program"
        );
    }

    #[test]
    fn every_lost_value_is_shown() {
        // One write of two columns lost the first to one write, later the second to another.
        let record = |lost: &str, image: &str, version| Record {
            conflict_id: Uuid::nil(),
            schema: "s".into(),
            table: "t".into(),
            key: raw("{}"),
            conflict_type: ConflictType::UpdateOriginDiffers,
            constraint_name: None,
            losing: Hlc(65),
            winning: Hlc(version),
            rival: None,
            cells: vec![lost.into()],
            lost: BTreeMap::from([(lost.to_string(), raw("1.50"))]),
            replaced: BTreeMap::new(),
            overruled: BTreeMap::new(),
            base: None,
            tuples: BTreeMap::from([(1, Image { rank: (1, Hlc(version)), tuple: raw(image) })]),
            result: None,
            policy: "p".into(),
            detected_at: 0,
            decision: Decision {
                version: Hlc(0),
                status: Status::Auto,
                by: None,
                at: None,
                resolution: None,
                note: None,
            },
        };
        let first = record("b", r#"{"b":1.50,"a":1.50}"#, 100);
        let both = joined(first, &record("a", r#"{"b":7,"a":1.50}"#, 200));
        assert_eq!(both.settled().tuples[&1].tuple.get(), r#"{"b":1.50,"a":1.50}"#);
    }

    #[test]
    fn the_whole_row_takes_in_any_cells() {
        let names = |cells: &[&str]| cells.iter().map(|c| c.to_string()).collect::<Vec<_>>();
        assert_eq!(unite(names(&["b"]), names(&["a", "b"])), ["a", "b"]);
        assert!(unite(names(&["b"]), names(&[])).is_empty() && unite(names(&[]), names(&["b"])).is_empty());
    }

    fn image() -> impl Strategy<Value = Image> {
        (0u8..2, 0u64..3, 0u8..3)
            .prop_map(|(own, v, n)| Image { rank: (own, Hlc(v)), tuple: raw(&format!(r#"{{"a":{n}}}"#)) })
    }
    fn values() -> impl Strategy<Value = BTreeMap<String, Box<RawValue>>> {
        proptest::collection::btree_map("[ab]", (0u8..3).prop_map(|n| raw(&n.to_string())), 0..3)
    }
    fn text() -> impl Strategy<Value = Option<String>> {
        proptest::option::of("[ab]")
    }
    prop_compose! {
        fn decision()(
            version in 0u64..3,
            status in prop_oneof![Just(Status::Auto), Just(Status::Open), Just(Status::Ignored)],
            (by, resolution, note) in (text(), text(), text()),
            at in proptest::option::of(0i64..2),
        ) -> Decision {
            Decision { version: Hlc(version), status, by, at, resolution, note }
        }
    }
    prop_compose! {
        fn record()(
            conflict_type in prop_oneof![Just(ConflictType::InsertExists), Just(ConflictType::UpdateDeleted)],
            constraint_name in text(),
            winning in 0u64..3,
            cells in proptest::collection::btree_set("[abc]", 0..3),
            (lost, replaced, overruled) in (values(), values(), values()),
            (base, result) in (proptest::option::of(image()), proptest::option::of(image())),
            tuples in proptest::collection::btree_map(1u8..3, image(), 0..3),
            policy in "[xy]",
            detected_at in 0i64..3,
            decision in decision(),
        ) -> Record {
            Record {
                conflict_id: Uuid::nil(), schema: "s".into(), table: "t".into(), key: raw("{}"), conflict_type, constraint_name,
                losing: Hlc(65), winning: Hlc(winning), rival: None, cells: cells.into_iter().collect(), lost, replaced, overruled, base, tuples, result, policy, detected_at, decision,
            }
        }
    }
    fn joined(mut a: Record, b: &Record) -> Record {
        a.join(b.clone());
        a
    }

    proptest! {
        #[test]
        fn the_join_is_a_semilattice(a in record(), b in record(), c in record()) {
            prop_assert_eq!(json(&joined(a.clone(), &a)), json(&a));
            prop_assert_eq!(json(&joined(a.clone(), &b)), json(&joined(b.clone(), &a)));
            prop_assert_eq!(json(&joined(joined(a.clone(), &b), &c)), json(&joined(a, &joined(b, &c))));
        }
    }

    proptest! {
        #[test]
        fn a_record_survives_json(a in record()) {
            let back: Record = serde_json::from_str(&json(&a)).expect("it was written by us");
            prop_assert_eq!(json(&back), json(&a));
            prop_assert_eq!(back.losing_node(), NodeId(1));
        }
    }
}
