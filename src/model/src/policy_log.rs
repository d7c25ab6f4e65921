//! The policy log: which policy was in force at which version.
//!
//! Written by one node, the arbiter (the lower id), and replicated in its stream ahead of every write that an
//! entry applies to. A pair of writes is judged by the entry in force at the arbiter node's version of that
//! pair, so both nodes judge it alike, whenever they meet it. What the other node sets is a *wish*: an entry
//! under a version of its own, which counts for nothing until the arbiter has written one that grants it.
use crate::hlc::{Hlc, NodeId};
use crate::policy::{Policies, Policy, Subject};
use crate::record::ConflictType;
use crate::versions::CellId;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One call of `tandem.set_policy`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// In force from here on; of a wish, its name.
    pub version: Hlc,
    /// Names of the columns that it is about; empty: the table.
    pub columns: Vec<String>,
    /// Conflicts of this type only.
    pub conflict_type: Option<ConflictType>,
    #[serde(serialize_with = "to_text", deserialize_with = "from_text")]
    pub policy: Policy,
    /// Every entry before this one is void: the table was taken out of sync.
    #[serde(default)]
    pub reset: bool,
    /// Set before the table was paired: part of its shape, for every version, and not sent in the stream.
    #[serde(default)]
    pub fixed: bool,
    /// The wish that this answers; 0: none.
    #[serde(default)]
    pub wish: Hlc,
    /// Why the wish is not granted; such an entry is never in force.
    #[serde(default)]
    pub refused: Option<String>,
    pub set_by: String,
    /// Microseconds since the Unix epoch.
    pub set_at: i64,
}

fn to_text<S: Serializer>(policy: &Policy, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(policy)
}

fn from_text<'de, D: Deserializer<'de>>(from: D) -> Result<Policy, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map_err(|why| serde::de::Error::custom(format!("{why}: {text:?}")))
}

/// The node whose log counts, of a pair.
pub fn arbiter(own: NodeId, peer: NodeId) -> NodeId {
    own.min(peer)
}

/// The arbiter's version of a pair of writes, by which the pair is judged. (Where a key was missing there is
/// no pair, and nobody else who judges it.)
pub fn version_of_pair(arbiter: NodeId, a: Hlc, b: Hlc) -> Hlc {
    if a.node() == arbiter { a } else { b }
}

/// A version of this node above all others: what is in force now.
pub fn latest(node: NodeId) -> Hlc {
    Hlc(!63 | u64::from(node.0))
}

/// The entries of one table, by version. It is asked with versions of the arbiter: entries of another node are
/// wishes, and count for nothing.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct PolicyLog {
    entries: Vec<Entry>,
}

impl PolicyLog {
    /// Takes what is stored of a table. What was refused doesn't count, what is fixed is another matter.
    pub fn new(mut entries: Vec<Entry>) -> PolicyLog {
        entries.retain(|e| e.refused.is_none() && !e.fixed);
        entries.sort_by_key(|e| e.version);
        PolicyLog { entries }
    }

    /// The policy of a cell, named by one of its columns: that of its columns before that of the table, and
    /// that of a conflict type before that of all. Without a type: what decides who wins.
    pub fn of_cell(&self, column: Option<&str>, conflict_type: Option<ConflictType>, at: Hlc) -> &Policy {
        let columns = column.map(Some).into_iter().chain([None]);
        let mut places = columns.flat_map(|column| by_type(conflict_type).map(move |t| (column, t)));
        places.find_map(|(column, t)| self.at(column, t, Subject::Cells, at)).unwrap_or(&Policy::LastUpdateWins)
    }

    /// The policy of whether rows exist.
    pub fn of_existence(&self, conflict_type: Option<ConflictType>, at: Hlc) -> &Policy {
        let mut places = by_type(conflict_type);
        places.find_map(|t| self.at(None, t, Subject::Existence, at)).unwrap_or(&Policy::LastUpdateWins)
    }

    /// The last entry for exactly this place, if it has a say in the subject.
    fn at(&self, column: Option<&str>, t: Option<ConflictType>, subject: Subject, at: Hlc) -> Option<&Policy> {
        let of_arbiter = self.entries.iter().rev().filter(|e| e.version.node() == at.node());
        let known = of_arbiter.skip_while(|e| e.version > at).take_while(|e| !e.reset);
        let mut here = known.filter(|e| {
            e.conflict_type == t
                && match column {
                    Some(name) => e.columns.iter().any(|c| c == name),
                    None => e.columns.is_empty(),
                }
        });
        here.find(|e| e.policy.decides(subject)).map(|e| &e.policy)
    }

    /// True if the entry, one of this log, is the last word on something.
    pub fn is_in_force(&self, entry: &Entry) -> bool {
        let at = latest(entry.version.node());
        let named = |column, subject| {
            let found = self.at(column, entry.conflict_type, subject, at);
            let own = self.entries.iter().find(|e| e.version == entry.version).map(|e| &e.policy);
            found.zip(own).is_some_and(|(found, own)| std::ptr::eq(found, own))
        };
        if entry.columns.is_empty() {
            named(None, Subject::Cells) || named(None, Subject::Existence)
        } else {
            entry.columns.iter().any(|column| named(Some(column), Subject::Cells))
        }
    }
}

/// The lattice policies of a table. They say who wins at once, on both nodes, so they can't change while one of
/// two unseen writes is older than the change: they are fixed before the first change is applied, as cells are.
/// `cell` gives the cell of a column.
pub fn fixed(entries: &[Entry], cell: impl Fn(&str) -> Option<CellId>) -> Policies {
    let mut policies = Policies::default();
    for entry in entries.iter().filter(|e| e.fixed) {
        for column in &entry.columns {
            if let Some(cell) = cell(column) {
                policies.cells.insert(cell, entry.policy.clone());
            }
        }
        if entry.columns.is_empty() {
            if entry.policy.decides(Subject::Existence) {
                policies.existence = entry.policy.clone();
            }
            if entry.policy.decides(Subject::Cells) {
                policies.others = entry.policy.clone();
            }
        }
    }
    policies
}

/// A type, then all types.
fn by_type(conflict_type: Option<ConflictType>) -> impl Iterator<Item = Option<ConflictType>> + Clone {
    conflict_type.map(Some).into_iter().chain([None])
}

#[cfg(test)]
mod tests {
    use super::*;
    use ConflictType::*;

    fn v(counter: u64, node: u64) -> Hlc {
        Hlc(counter * 64 + node)
    }
    fn entry(counter: u64, columns: &[&str], conflict_type: Option<ConflictType>, policy: Policy) -> Entry {
        Entry {
            version: v(counter, 1),
            columns: columns.iter().map(ToString::to_string).collect(),
            conflict_type,
            policy,
            reset: false,
            fixed: false,
            wish: Hlc(0),
            refused: None,
            set_by: "postgres".into(),
            set_at: 0,
        }
    }
    fn log(entries: Vec<Entry>) -> PolicyLog {
        PolicyLog::new(entries)
    }

    #[test]
    fn an_entry_is_in_force_from_its_version_on() {
        let log = log(vec![entry(20, &["a"], None, Policy::Least), entry(10, &["a"], None, Policy::Greatest)]);
        let at = |counter| log.of_cell(Some("a"), Some(UpdateOriginDiffers), v(counter, 1)).clone();
        assert_eq!((at(9), at(10), at(19)), (Policy::LastUpdateWins, Policy::Greatest, Policy::Greatest));
        assert_eq!((at(20), at(99)), (Policy::Least, Policy::Least));
        assert_eq!(log.of_cell(Some("b"), None, v(99, 1)), &Policy::LastUpdateWins);
    }

    #[test]
    fn what_is_closer_comes_first() {
        let log = log(vec![
            entry(1, &["a"], None, Policy::Greatest),
            entry(2, &["a"], Some(InsertExists), Policy::Manual),
            entry(3, &[], None, Policy::FirstUpdateWins),
            entry(4, &[], Some(UpdateOriginDiffers), Policy::Custom("app.merge".into())),
        ]);
        let at = |column, t| log.of_cell(Some(column), t, v(9, 1)).to_string();
        assert_eq!(at("a", Some(UpdateOriginDiffers)), "greatest");
        assert_eq!(at("a", Some(InsertExists)), "manual");
        assert_eq!(at("b", Some(InsertExists)), "first_update_wins");
        assert_eq!(at("b", Some(UpdateOriginDiffers)), "custom(app.merge)");
    }

    #[test]
    fn existence_and_cells_of_a_table_are_set_apart() {
        // Neither takes away what the other decides.
        let log = log(vec![entry(1, &[], None, Policy::FirstUpdateWins), entry(2, &[], None, Policy::DeleteWins)]);
        assert_eq!(log.of_cell(Some("a"), None, v(9, 1)), &Policy::FirstUpdateWins);
        assert_eq!(log.of_existence(None, v(9, 1)), &Policy::DeleteWins);
        assert_eq!(log.of_existence(Some(UpdateDeleted), v(1, 1)), &Policy::LastUpdateWins);
    }

    #[test]
    fn wishes_and_refusals_and_what_was_reset_count_for_nothing() {
        let wish = Entry { version: v(5, 2), ..entry(0, &[], None, Policy::Manual) };
        let refused = Entry { refused: Some("no".into()), ..entry(6, &[], None, Policy::Manual) };
        let asked = log(vec![wish, refused]);
        assert_eq!(asked.of_cell(Some("a"), None, v(9, 1)), &Policy::LastUpdateWins);
        let reset = Entry { reset: true, ..entry(7, &[], None, Policy::LastUpdateWins) };
        let log = log(vec![entry(5, &["a"], None, Policy::Greatest), reset, entry(8, &["b"], None, Policy::Least)]);
        let at = |column, counter| log.of_cell(Some(column), None, v(counter, 1)).clone();
        assert_eq!((at("a", 6), at("a", 7)), (Policy::Greatest, Policy::LastUpdateWins));
        assert_eq!((at("a", 9), at("b", 9)), (Policy::LastUpdateWins, Policy::Least));
    }

    #[test]
    fn a_later_entry_for_the_same_place_supersedes() {
        let entries = vec![
            entry(1, &["a", "b"], None, Policy::Greatest),
            entry(2, &["a"], None, Policy::Least),
            entry(3, &["b"], None, Policy::Least),
            entry(4, &[], None, Policy::FirstUpdateWins),
            entry(5, &[], None, Policy::DeleteWins),
            entry(6, &["b"], Some(InsertExists), Policy::Manual),
        ];
        let log = log(entries.clone());
        let in_force: Vec<_> = entries.iter().map(|e| log.is_in_force(e)).collect();
        assert_eq!(in_force, [false, true, true, true, true, true]);
        assert!(PolicyLog::new(entries[..2].to_vec()).is_in_force(&entries[0]), "column b has no other");
    }

    #[test]
    fn what_is_fixed_holds_for_every_version() {
        let fixed_entry = |columns, policy| Entry { fixed: true, ..entry(1, columns, None, policy) };
        let node = NodeId(2);
        let entries = [
            fixed_entry(&[], Policy::NodePriority(node)),
            fixed_entry(&[], Policy::DeleteWins),
            fixed_entry(&["a"], Policy::LastUpdateWins),
            entry(2, &["b"], None, Policy::Manual),
        ];
        let policies = fixed(&entries, |name| ["a", "b"].iter().position(|n| *n == name).map(|i| i as CellId + 2));
        assert_eq!((&policies.existence, policies.cell(3)), (&Policy::DeleteWins, &Policy::NodePriority(node)));
        assert_eq!(policies.cell(2), &Policy::LastUpdateWins);
        assert_eq!(log(entries.to_vec()).of_existence(None, v(9, 1)), &Policy::LastUpdateWins);
    }

    #[test]
    fn a_pair_is_judged_by_the_arbiters_version() {
        let (own, peer) = (v(9, 1), v(5, 2));
        assert_eq!(version_of_pair(NodeId(1), own, peer), own);
        assert_eq!(version_of_pair(NodeId(1), peer, own), own);
        assert_eq!(arbiter(NodeId(2), NodeId(1)), NodeId(1));
    }

    #[test]
    fn an_entry_survives_json_and_nonsense_does_not() {
        let entry = entry(7, &["a"], Some(InsertExists), Policy::Custom("app.f(json)".into()));
        let json = serde_json::to_string(&entry).expect("json");
        assert_eq!(serde_json::from_str::<Entry>(&json).expect("it was written by us"), entry);
        let wrong = json.replace("custom(app.f(json))", "sideways");
        assert!(serde_json::from_str::<Entry>(&wrong).is_err_and(|e| e.to_string().contains("sideways")));
    }
}
