//! What a row lists of its versions: birth, dead and cells (the content of `_cells`).
//!
//! Sparse: a cell without an entry of its own was written by the birth (`cell()` gives `birth`, which
//! is 0 once it is forgotten). An entry may be an explicit 0: forgotten while the birth is not.
use crate::counter::Counter;
use crate::hlc::Hlc;
use crate::stable::Stable;
use crate::wire::DecodeError;
use serde::{Deserialize, Serialize};

/// A cell: the group of columns that is decided as one. 0 is the whole row (granularity `row`),
/// otherwise the smallest attribute number (of the node that uses it) of the group.
pub type CellId = u16;

/// The versions of one row or tombstone, or those that a change replaced.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Listed")]
pub struct Versions {
    /// Version of the INSERT that began this life; 0 if forgotten.
    pub birth: Hlc,
    /// Version of the DELETE that ended it (or was outlived); 0: none, or forgotten.
    pub dead: Hlc,
    /// Sorted by cell.
    pub cells: Vec<(CellId, Hlc)>,
    /// Of a row that outlived a delete under `update_wins`: the listed cells that some delete had seen,
    /// sorted. Unlisted ones were seen by every delete. A tombstone has none: all of it was seen.
    pub ended: Vec<CellId>,
    /// State of the cells that were added to, sorted by cell; never trimmed.
    pub counters: Vec<Counter>,
}

/// [`Versions`] as it arrives, before its order is checked.
#[derive(Deserialize)]
struct Listed {
    birth: Hlc,
    dead: Hlc,
    #[serde(deserialize_with = "crate::bounded::list")]
    cells: Vec<(CellId, Hlc)>,
    #[serde(deserialize_with = "crate::bounded::list")]
    ended: Vec<CellId>,
    #[serde(deserialize_with = "crate::bounded::list")]
    counters: Vec<Counter>,
}

impl TryFrom<Listed> for Versions {
    type Error = DecodeError;
    fn try_from(Listed { birth, dead, cells, ended, counters }: Listed) -> Result<Versions, DecodeError> {
        Versions { birth, dead, cells, ended, counters }.ordered()
    }
}

/// The first byte of the binary form tells what follows.
mod flag {
    /// 8 bytes of birth.
    pub const BIRTH: u8 = 1;
    /// 8 bytes of dead.
    pub const DEAD: u8 = 2;
    /// 8 bytes of version, then 2 bytes for each cell that has it, to the end.
    pub const UNIFORM: u8 = 4;
    /// 2 bytes of cell and 8 bytes of version, again and again, to the end.
    pub const EACH: u8 = 8;
    /// 2 bytes of count and 2 bytes for each ended cell; before the cells.
    pub const ENDED: u8 = 16;
    /// 4 bytes of length and the counters, as postcard writes them; before the cells.
    pub const COUNTERS: u8 = 32;
    /// All of them.
    pub const KNOWN: u8 = 63;
}

impl Versions {
    /// The version of a cell: its own entry, else the birth.
    pub fn cell(&self, cell: CellId) -> Hlc {
        self.entry(cell).unwrap_or(self.birth)
    }
    /// The entry of a cell, if it has one of its own.
    pub fn entry(&self, cell: CellId) -> Option<Hlc> {
        let at = self.cells.binary_search_by_key(&cell, |e| e.0).ok()?;
        self.cells.get(at).map(|e| e.1)
    }
    /// The cells that were written since the birth, as far as that is known.
    pub fn written(&self) -> impl Iterator<Item = CellId> {
        let added = self.counters.iter().map(|c| c.cell).filter(|cell| self.entry(*cell).is_none());
        self.cells.iter().map(|c| c.0).chain(added)
    }
    /// Sets a cell: its entry is this version, and nothing has been added to it.
    pub fn set(&mut self, cell: CellId, version: Hlc) {
        self.counters.retain(|counter| counter.cell != cell);
        self.set_entry(cell, version);
    }
    /// Sets the entry of a cell: a write that no delete has seen.
    pub(crate) fn set_entry(&mut self, cell: CellId, version: Hlc) {
        self.ended.retain(|ended| *ended != cell);
        match self.cells.binary_search_by_key(&cell, |e| e.0) {
            Ok(at) => self.cells[at].1 = version,
            Err(at) => self.cells.insert(at, (cell, version)),
        }
    }
    /// Ends the life: the versions of its tombstone, where nothing is left that the delete had not seen.
    pub fn end(&mut self, dead: Hlc) {
        self.dead = self.dead.max(dead);
        self.ended.clear();
    }
    /// Notes that a delete had seen a listed cell.
    pub fn end_cell(&mut self, cell: CellId) {
        if self.entry(cell).is_some()
            && let Err(at) = self.ended.binary_search(&cell)
        {
            self.ended.insert(at, cell);
        }
    }
    /// Forgets what is stable, without changing what any cell reads as under [`Stable`]. For living rows
    /// and bases; of a tombstone nothing is forgotten before all is ([`Versions::collectable`]).
    pub fn trim(&mut self, stable: &Stable) {
        self.birth = stable.read(self.birth);
        self.dead = stable.read(self.dead);
        // Every delete that may still come has seen what is stable.
        let cells = &self.cells;
        self.ended.retain(|id| cells.iter().any(|(cell, version)| cell == id && !stable.covers(*version)));
        self.counters.iter_mut().for_each(|counter| counter.base = stable.read(counter.base));
        let birth = self.birth;
        self.cells.retain_mut(|entry| {
            entry.1 = stable.read(entry.1);
            entry.1 != birth
        });
    }
    /// True when every version is stable: a tombstone with these goes.
    pub fn collectable(&self, stable: &Stable) -> bool {
        let added = self.counters.iter().flat_map(|c| c.tallies.iter().map(|t| t.last).chain([c.base]));
        let mut listed = self.cells.iter().map(|c| c.1).chain([self.birth, self.dead]).chain(added);
        listed.all(|version| stable.covers(version))
    }
    /// True when nothing is listed and nothing was added: `_cells` is NULL.
    pub fn is_empty(&self) -> bool {
        self.birth.is_zero() && self.dead.is_zero() && self.cells.is_empty() && self.counters.is_empty()
    }
    /// Appends the binary form that `tandem.cells` stores: 1 byte of flags, then as they say (big-endian).
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut flags = 0;
        let uniform = match self.cells.first() {
            None => None,
            Some(first) if self.cells.iter().all(|e| e.1 == first.1) => {
                flags |= flag::UNIFORM;
                Some(first.1)
            }
            Some(_) => {
                flags |= flag::EACH;
                None
            }
        };
        let present = |v: Hlc, bit| if v.is_zero() { 0 } else { bit };
        flags |= if self.ended.is_empty() { 0 } else { flag::ENDED };
        flags |= if self.counters.is_empty() { 0 } else { flag::COUNTERS };
        out.push(flags | present(self.birth, flag::BIRTH) | present(self.dead, flag::DEAD));
        for v in [self.birth, self.dead].into_iter().filter(|v| !v.is_zero()) {
            out.extend_from_slice(&v.0.to_be_bytes());
        }
        if !self.ended.is_empty() {
            // Cells are numbered by 16 bits, and each is listed once.
            out.extend_from_slice(&(self.ended.len() as u16).to_be_bytes());
            self.ended.iter().for_each(|cell| out.extend_from_slice(&cell.to_be_bytes()));
        }
        if !self.counters.is_empty() {
            let counters = encode_counters(&self.counters);
            // Far below 4 GB: `_cells` is one value of a row.
            out.extend_from_slice(&(counters.len() as u32).to_be_bytes());
            out.extend_from_slice(&counters);
        }
        if let Some(version) = uniform {
            out.extend_from_slice(&version.0.to_be_bytes());
        }
        for &(cell, version) in &self.cells {
            out.extend_from_slice(&cell.to_be_bytes());
            if uniform.is_none() {
                out.extend_from_slice(&version.0.to_be_bytes());
            }
        }
    }
    /// Reads the binary form; any bytes give a value or an error. What decodes encodes to the same bytes.
    pub fn decode(bytes: &[u8]) -> Result<Versions, DecodeError> {
        let (&flags, mut rest) = bytes.split_first().ok_or_else(|| malformed("no bytes"))?;
        if flags > flag::KNOWN || flags & (flag::UNIFORM | flag::EACH) == flag::UNIFORM | flag::EACH {
            return Err(malformed("unknown flags"));
        }
        let mut versions = Versions::default();
        for (bit, field) in [(flag::BIRTH, &mut versions.birth), (flag::DEAD, &mut versions.dead)] {
            if flags & bit != 0 {
                *field = take(&mut rest).map(|b| Hlc(u64::from_be_bytes(b)))?;
                if field.is_zero() {
                    return Err(malformed("a listed version is 0"));
                }
            }
        }
        if flags & flag::ENDED != 0 {
            for _ in 0..u16::from_be_bytes(take(&mut rest)?) {
                versions.ended.push(CellId::from_be_bytes(take(&mut rest)?));
            }
            if versions.ended.is_empty() {
                return Err(malformed("no cell ended"));
            }
        }
        if flags & flag::COUNTERS != 0 {
            let length = u32::from_be_bytes(take(&mut rest)?) as usize;
            let (counters, tail) = rest.split_at_checked(length).ok_or_else(|| malformed("too short"))?;
            (versions.counters, rest) = (decode_counters(counters)?, tail);
        }
        if flags & (flag::UNIFORM | flag::EACH) != 0 {
            let each = flags & flag::EACH != 0;
            let uniform = if each { Hlc(0) } else { Hlc(u64::from_be_bytes(take(&mut rest)?)) };
            versions.cells.reserve_exact(rest.len() / if each { 10 } else { 2 });
            while !rest.is_empty() || versions.cells.is_empty() {
                let cell = CellId::from_be_bytes(take(&mut rest)?);
                let version = if each { Hlc(u64::from_be_bytes(take(&mut rest)?)) } else { uniform };
                versions.cells.push((cell, version));
            }
            if each && versions.cells.iter().all(|e| e.1 == versions.cells[0].1) {
                return Err(malformed("one version listed for each cell"));
            }
        }
        if !rest.is_empty() {
            return Err(malformed("bytes left over"));
        }
        versions.ordered()
    }
    fn ordered(self) -> Result<Versions, DecodeError> {
        let ordered = self.cells.is_sorted_by(|a, b| a.0 < b.0)
            && self.ended.is_sorted_by(|a, b| a < b)
            && self.counters.is_sorted_by(|a, b| a.cell < b.cell);
        self.counters.iter().try_for_each(Counter::check)?;
        if !ordered {
            return Err(malformed("cells out of order"));
        }
        let listed = self.ended.iter().all(|cell| self.entry(*cell).is_some());
        if listed { Ok(self) } else { Err(malformed("an ended cell is not listed")) }
    }
}

#[derive(Serialize, Deserialize)]
struct Counters(#[serde(deserialize_with = "crate::bounded::list")] Vec<Counter>);

fn encode_counters(counters: &[Counter]) -> Vec<u8> {
    postcard::to_allocvec(counters).expect("counters have only types that always encode")
}

/// Reads what [`encode_counters`] writes, and nothing else that means the same.
fn decode_counters(bytes: &[u8]) -> Result<Vec<Counter>, DecodeError> {
    let Counters(counters) = postcard::from_bytes(bytes).map_err(|e| malformed(&e.to_string()))?;
    if counters.is_empty() || encode_counters(&counters) != bytes {
        return Err(malformed("counters that are not written so"));
    }
    Ok(counters)
}

fn malformed(why: &str) -> DecodeError {
    DecodeError { what: "versions", why: why.into() }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], DecodeError> {
    let (head, tail) = rest.split_first_chunk().ok_or_else(|| malformed("too short"))?;
    *rest = tail;
    Ok(*head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counter::Tally;
    use crate::hlc::NodeId;
    use proptest::prelude::*;

    fn v(counter: u64, node: u64) -> Hlc {
        Hlc(counter * 64 + node)
    }
    fn stable(own: u64, peer: u64) -> Stable {
        Stable { own: (NodeId(1), v(own, 63)), peer: (NodeId(2), v(peer, 63)) }
    }

    #[test]
    fn an_unlisted_cell_was_written_by_the_birth() {
        let mut versions = Versions { birth: v(3, 1), ..Versions::default() };
        versions.set(7, v(5, 1));
        versions.set(2, v(4, 1));
        versions.set(7, v(6, 1));
        assert_eq!(versions.cells, [(2, v(4, 1)), (7, v(6, 1))]);
        assert_eq!((versions.cell(2), versions.cell(3), versions.cell(7)), (v(4, 1), v(3, 1), v(6, 1)));
        assert_eq!((versions.entry(2), versions.entry(3)), (Some(v(4, 1)), None));
    }

    #[test]
    fn an_explicit_zero_stays_while_the_birth_is_listed() {
        let mut versions =
            Versions { birth: v(3, 2), dead: v(4, 1), cells: vec![(1, v(5, 1)), (2, v(9, 1))], ..Versions::default() };
        versions.trim(&stable(5, 0));
        assert_eq!(
            versions,
            Versions { birth: v(3, 2), dead: Hlc(0), cells: vec![(1, Hlc(0)), (2, v(9, 1))], ..Versions::default() }
        );
        versions.trim(&stable(5, 3));
        assert_eq!(versions, Versions { cells: vec![(2, v(9, 1))], ..Versions::default() });
        versions.trim(&stable(9, 3));
        assert!(versions.is_empty());
    }

    #[test]
    fn a_tombstone_goes_when_all_of_it_is_stable() {
        let tombstone = Versions { birth: v(3, 2), dead: v(8, 1), cells: vec![(1, v(5, 1))], ..Versions::default() };
        assert!(!tombstone.collectable(&stable(8, 2)));
        assert!(!tombstone.collectable(&stable(7, 3)));
        assert!(tombstone.collectable(&stable(8, 3)));
    }

    #[test]
    fn the_binary_form_is_small() {
        let length = |versions: &Versions| {
            let mut bytes = Vec::new();
            versions.encode(&mut bytes);
            bytes.len()
        };
        let mut versions = Versions { birth: v(3, 2), ..Versions::default() };
        assert_eq!(length(&versions), 9);
        versions.birth = Hlc(0);
        versions.set(1, v(4, 1));
        assert_eq!(length(&versions), 11);
        versions.set(2, v(4, 1));
        assert_eq!(length(&versions), 13);
        versions.set(3, v(5, 1));
        assert_eq!(length(&versions), 31);
    }

    fn any_versions() -> impl Strategy<Value = Versions> {
        let version = prop_oneof![Just(0u64), 1u64..4, any::<u64>()].prop_map(Hlc);
        let cells = proptest::collection::btree_map(any::<u16>(), (version.clone(), any::<bool>()), 0..6);
        let tallies =
            proptest::collection::btree_map((1u64..4, 0u32..3), (0u64..1 << 58, "-?[0-9]{1,9}(\\.[0-9]{1,3})?"), 1..4);
        let tallies = tallies.prop_map(|all| {
            let tally = |((node, epoch), (counter, sum)): ((u64, u32), (u64, String))| Tally {
                epoch,
                last: v(counter, node),
                sum,
            };
            all.into_iter().map(tally).collect::<Vec<_>>()
        });
        let counters = proptest::collection::btree_map(any::<u16>(), (version.clone(), tallies), 0..3);
        (version.clone(), version, cells, counters).prop_map(|(birth, dead, cells, counters)| Versions {
            birth,
            dead,
            cells: cells.iter().map(|(cell, (version, _))| (*cell, *version)).collect(),
            ended: cells.iter().filter(|(_, (_, ended))| *ended).map(|(cell, _)| *cell).collect(),
            counters: counters
                .into_iter()
                .map(|(cell, (base, tallies))| Counter { cell, base, value: "7".into(), tallies })
                .collect(),
        })
    }

    proptest! {
        #[test]
        fn versions_survive_the_binary_form(versions in any_versions()) {
            let mut bytes = Vec::new();
            versions.encode(&mut bytes);
            prop_assert_eq!(Versions::decode(&bytes), Ok(versions.clone()));
            let wired = postcard::to_allocvec(&versions).unwrap();
            prop_assert_eq!(postcard::from_bytes::<Versions>(&wired), Ok(versions));
        }

        #[test]
        fn any_bytes_decode_or_not(flags in 0u8..=flag::KNOWN, body in proptest::collection::vec(any::<u8>(), 0..50)) {
            let bytes: Vec<u8> = std::iter::once(flags).chain(body).collect();
            if let Ok(versions) = Versions::decode(&bytes) {
                let mut again = Vec::new();
                versions.encode(&mut again);
                prop_assert_eq!(&again, &bytes);
            }
            let _ = Versions::decode(&bytes[1..]);
        }

        #[test]
        fn trimming_changes_no_reading(versions in any_versions(), own in 0u64..9, peer in 0u64..9) {
            let versions = Versions {
                birth: Hlc(versions.birth.0 % 640),
                dead: Hlc(versions.dead.0 % 640),
                cells: versions.cells.iter().map(|&(c, v)| (c % 4, Hlc(v.0 % 640))).collect::<std::collections::BTreeMap<_, _>>().into_iter().collect(),
                ended: vec![],
                counters: vec![],
            };
            let stable = stable(own, peer);
            let mut trimmed = versions.clone();
            trimmed.trim(&stable);
            for cell in 0..5 {
                prop_assert_eq!(stable.read(versions.cell(cell)), trimmed.cell(cell));
            }
            prop_assert_eq!((stable.read(versions.birth), stable.read(versions.dead)), (trimmed.birth, trimmed.dead));
            prop_assert_eq!(versions.collectable(&stable), trimmed.is_empty());
        }
    }
}
