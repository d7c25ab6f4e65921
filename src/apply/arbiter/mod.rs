//! Arbitrated policies: the rows converge by last-update-wins at once; where a policy wants another outcome
//! the arbiter makes a later write, in the transaction that met the conflict (I11).
//!
//! While changes are applied, what is to be settled is only noted ([`consider`]): the values of the two
//! writes are at hand there. It is settled when the source transaction is whole ([`settle`]), each row in a
//! subtransaction: what fails there (a handler, a constraint) leaves the conflict open with the error as its
//! note, and the stream goes on.
mod handler;
mod value;

use super::conflict::{self, Pair};
use super::image;
use super::row::{self, Work};
use super::table::{Row, Table, set_value, value_of};
use crate::capture;
use crate::error::{Class, Error, Result};
use crate::pg::heap;
use crate::pg::identity::ActingAs;
use crate::pg::subtransaction;
use crate::relation::SyncedRelation;
use crate::shmem;
use crate::value as codec;
use pgrx::prelude::*;
use serde_json::value::RawValue;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering::Acquire;
use tandem_model::arbiter::{Own, first_update_wins};
use tandem_model::hlc::Hlc;
use tandem_model::judge::{Loss, Side};
use tandem_model::policy::{Kind, Policy, Subject};
use tandem_model::policy_log::{arbiter, latest, version_of_pair};
use tandem_model::record::{ConflictType, Image, Record, Status};
use tandem_model::versions::CellId;
use uuid::Uuid;

/// The policies that decide what a loss is about.
pub struct Decided {
    /// Of each of its cells; nothing if it is about the row's existence.
    cells: Vec<(CellId, Policy)>,
    existence: Option<Policy>,
}

/// What the applying of a change leaves to be settled on one row.
pub struct Ruling {
    relid: pg_sys::Oid,
    /// In key order, as values travel.
    key: Vec<Vec<u8>>,
    /// The conflict that it is about.
    record: Uuid,
    /// The birth of the life that it is about.
    life: Hlc,
    cells: Vec<CellRuling>,
    calls: Vec<handler::Call>,
}

/// One cell in conflict.
struct CellRuling {
    cell: CellId,
    policy: Policy,
    loser: Side,
    /// The losing write's values, by local column.
    lost: Vec<(usize, Option<Vec<u8>>)>,
    own: Hlc,
    peer: Hlc,
    /// What the peer's write replaced.
    base: Hlc,
}

/// Finds the policies in force for a loss, at the arbiter's version of the pair: the arbiter's, if it has one,
/// else the one by which the pair was judged.
pub fn decided(pair: &Pair<'_>, loss: &Loss, work: &Work) -> Decided {
    let writer = arbiter(work.own, work.peer);
    let log = &pair.rel.policies;
    let kind = Some(loss.conflict);
    if !matches!(loss.conflict, ConflictType::InsertExists | ConflictType::UpdateOriginDiffers) {
        let at = match loss.winning.is_zero() {
            true => latest(writer),
            false => version_of_pair(writer, loss.losing, loss.winning),
        };
        // A handler says what a row holds, not whether it is there.
        let policy = match log.of_existence(kind, at) {
            Policy::Custom(_) | Policy::LastUpdateWins => &pair.rel.judged_by.existence,
            policy => policy,
        };
        return Decided { cells: Vec::new(), existence: Some(policy.clone()) };
    }
    let of_cell = |cell: &CellId| {
        let (own, peer) = versions_of(pair, *cell);
        let at = version_of_pair(writer, own, peer);
        // Both nodes know columns by their names.
        let column = pair.rel.cell_columns(*cell).map(|c| c.name.as_str()).min();
        let policy = match log.of_cell(column, kind, at) {
            Policy::LastUpdateWins => pair.rel.judged_by.cell(*cell),
            policy => policy,
        };
        (*cell, policy.clone())
    };
    Decided { cells: loss.cells.iter().map(of_cell).collect(), existence: None }
}

/// This node's version of a cell and the peer's, of the pair that met.
fn versions_of(pair: &Pair<'_>, cell: CellId) -> (Hlc, Hlc) {
    let change = &pair.local.change;
    let peer = change.cells.iter().find(|c| c.cell == cell).map_or(change.version, |c| c.version);
    (pair.state.versions.cell(cell), peer)
}

impl Decided {
    fn policies(&self) -> impl Iterator<Item = &Policy> {
        self.cells.iter().map(|(_, policy)| policy).chain(&self.existence)
    }

    /// As the record names them.
    pub fn name(&self) -> String {
        let names: BTreeSet<String> = self.policies().map(Policy::to_string).collect();
        names.into_iter().collect::<Vec<_>>().join(", ")
    }

    /// Whether the conflict waits for a person.
    pub fn status(&self) -> Status {
        if self.policies().any(|p| *p == Policy::Manual) { Status::Open } else { Status::Auto }
    }
}

/// As the arbiter, notes what of a loss is to be settled.
pub fn consider(pair: &Pair<'_>, loss: &Loss, decided: &Decided, record: &Record, work: &mut Work) -> Result<()> {
    let arbitrated = |policy: &Policy| {
        policy.kind() == Kind::Arbitrated && policy.decides(Subject::Cells) && *policy != Policy::Manual
    };
    let due: Vec<&(CellId, Policy)> = decided.cells.iter().filter(|(_, policy)| arbitrated(policy)).collect();
    if due.is_empty() || arbiter(work.own, work.peer) != work.own {
        return Ok(());
    }
    let mut ruling = Ruling {
        relid: pair.rel.relid,
        key: row::encoded_key(pair.rel, &pair.local.key),
        record: record.conflict_id,
        life: pair.state.versions.birth.max(pair.verdict.versions.birth),
        cells: Vec::new(),
        calls: Vec::new(),
    };
    for (cell, policy) in due {
        match policy {
            Policy::Custom(name) => handler::call(&mut ruling.calls, name, pair.rel, *cell, record, work)?,
            _ => ruling.cells.push(CellRuling::new(pair, loss, *cell, policy)),
        }
    }
    work.rulings.push(ruling);
    Ok(())
}

impl CellRuling {
    fn new(pair: &Pair<'_>, loss: &Loss, cell: CellId, policy: &Policy) -> CellRuling {
        let (own, peer) = versions_of(pair, cell);
        let held = match loss.loser {
            Side::Local => pair.stored.clone(),
            Side::Remote => image::of_arrived(pair.rel, &[], &pair.local.new),
        };
        let known = pair.rel.columns.iter().enumerate().zip(held);
        let of_cell = known.filter(|((_, column), _)| column.cell == cell && column.key_ordinal.is_none());
        let lost = of_cell.filter_map(|((i, column), known)| Some((i, known?.map(|v| row::encoded(column, v)))));
        let base = pair.local.change.base.cell(cell);
        CellRuling { cell, policy: policy.clone(), loser: loss.loser, lost: lost.collect(), own, peer, base }
    }
}

/// Settles what the source transaction has met.
pub fn settle(work: &mut Work) -> Result<()> {
    for ruling in std::mem::take(&mut work.rulings) {
        let mut gone = Vec::new();
        let settled = subtransaction::run(|| write(&ruling, &mut gone));
        match settled {
            Ok(None) => {}
            Ok(Some(written)) => {
                work.gone.append(&mut gone);
                work.writes_own = true;
                work.queued = true;
                conflict::amend(ruling.record, work, |record| {
                    record.result = Some(written.result);
                    record.overruled = written.overruled;
                })?;
            }
            Err(error) if error.class == Class::Retry => return Err(error),
            Err(error) => leave_open(&ruling, &error, work)?,
        }
    }
    Ok(())
}

fn leave_open(ruling: &Ruling, error: &Error, work: &mut Work) -> Result<()> {
    pgrx::log!("tandem: conflict {} is left open: {error}", ruling.record);
    conflict::amend(ruling.record, work, |record| {
        record.decision.status = Status::Open;
        record.decision.note = Some(format!("the policy could not settle it: {error}"));
    })
}

/// What a later write left, and what it took the place of.
struct Written {
    result: Image,
    overruled: BTreeMap<String, Box<RawValue>>,
}

/// Writes the row as the policies want it, as a later write; none if it is so already, or doesn't show.
fn write(ruling: &Ruling, gone: &mut Vec<super::parents::Gone>) -> Result<Option<Written>> {
    let Some(mut table) = Table::open(ruling.relid)? else { return Ok(None) };
    let written = write_in(&mut table, ruling, gone);
    // After an error the subtransaction's end closes it.
    if written.is_ok() {
        table.close();
    }
    written
}

fn write_in(table: &mut Table, ruling: &Ruling, gone: &mut Vec<super::parents::Gone>) -> Result<Option<Written>> {
    let rel = table.synced.clone();
    let _owner = ActingAs::owner(rel.owner);
    let key: Vec<_> = ruling.key.iter().zip(&rel.key).map(|(v, i)| codec::decode(&rel.columns[*i], v)).collect();
    let Some(old) = table.lock_row(&key, false) else { return Ok(None) };
    let (_, mut versions) = table.versions_of(&old)?;
    // What didn't show was not locked: a local user may have inserted the key since, and has never met this pair.
    if versions.birth > ruling.life {
        return Ok(None);
    }
    let mut row = old.clone();
    let mut reinstated = Vec::new();
    for cell in &ruling.cells {
        let wanted = cell.wanted(&rel, &old)?;
        reinstated.extend(wanted.stands_for.map(|original| (cell.cell, original)));
        for (i, value) in wanted.values {
            set_value(&mut row, &rel.columns[i], value);
        }
    }
    for call in &ruling.calls {
        for (i, value) in call.run(&rel)? {
            set_value(&mut row, &rel.columns[i], value);
        }
    }
    let cells = capture::changed_cells(&rel, &old, &row);
    if cells.is_empty() {
        return Ok(None);
    }
    let version = capture::own_update(&rel, &mut versions, cells.clone(), &old, &row);
    table.set_versions(&mut row, version, &versions);
    for parent in &table.parents_of {
        gone.extend(parent.gone(&rel, &old, Some(&row)));
    }
    table.update(&row);
    for (cell, original) in reinstated.into_iter().filter(|(cell, _)| cells.contains(cell)) {
        let _superuser = ActingAs::superuser();
        let rows = heap::Table::open("reinstated", pg_sys::RowExclusiveLock);
        rows.insert(&[heap::int8(version.0), Some(pg_sys::Datum::from(i32::from(cell))), heap::int8(original.0)]);
    }
    let changed = rel
        .columns
        .iter()
        .filter(|c| c.key_ordinal.is_none() && !codec::equal(c, value_of(&old, c.attnum), value_of(&row, c.attnum)));
    let overruled = changed.map(|c| Ok((c.name.clone(), image::literal(c, value_of(&old, c.attnum))?)));
    let overruled = overruled.collect::<Result<BTreeMap<_, _>>>()?;
    let tuple = image::to_json(&rel, &image::of_row(&rel, &row))?;
    Ok(Some(Written { result: Image { rank: (0, version), tuple }, overruled }))
}

/// What a policy wants a cell to hold; no values: what it holds.
#[derive(Default)]
struct Wanted {
    values: Vec<(usize, Option<pg_sys::Datum>)>,
    /// The write that the values are of.
    stands_for: Option<Hlc>,
}

impl CellRuling {
    fn wanted(&self, rel: &SyncedRelation, shown: &Row) -> Result<Wanted> {
        let lost = self.lost.iter().map(|(i, v)| (*i, v.as_deref().map(|v| codec::decode(&rel.columns[*i], v))));
        let lost: Vec<_> = lost.collect();
        if self.policy == Policy::FirstUpdateWins {
            let own = Own { version: self.own, stands_for: stands_for(self.own, self.cell)? };
            let (side, original) = first_update_wins(own, self.peer, self.base);
            return Ok(match side == self.loser {
                true => Wanted { values: lost, stands_for: Some(original) },
                false => Wanted::default(),
            });
        }
        let [(i, lost)] = lost[..] else { return Err(Error::bug("a policy of values on more than one")) };
        let column = &rel.columns[i];
        let shown = value_of(shown, column.attnum);
        let value = match self.policy {
            Policy::Greatest => value::beyond(rel, column, shown, lost, std::cmp::Ordering::Greater)?,
            Policy::Least => value::beyond(rel, column, shown, lost, std::cmp::Ordering::Less)?,
            Policy::SetUnion => value::union(column, shown, lost)?,
            _ => None,
        };
        Ok(Wanted { values: value.into_iter().map(|v| (i, Some(v))).collect(), stands_for: None })
    }
}

/// The write whose value a write of ours reinstated; of any other, itself.
fn stands_for(version: Hlc, cell: CellId) -> Result<Hlc> {
    let _superuser = ActingAs::superuser();
    let query = "select original::int8 from tandem.reinstated where version = $1::int8::tandem.hlc and cell = $2";
    let found: Option<i64> = crate::pg::query::value(query, &[(version.0 as i64).into(), i32::from(cell).into()])?;
    Ok(found.map_or(version, |v| Hlc(v as u64)))
}

/// Forgets up to `limit` writes that stood for others and that nobody can meet unseen any more.
pub fn forget(limit: usize) -> Result<()> {
    let _superuser = ActingAs::superuser();
    let stable = shmem::database().stable_own.load(Acquire);
    let due = "select exists (select from tandem.reinstated where version <= $1::int8::tandem.hlc)";
    if crate::pg::query::value::<bool>(due, &[(stable as i64).into()])? != Some(true) {
        return Ok(());
    }
    Spi::run_with_args(
        "delete from tandem.reinstated where version in
             (select version from tandem.reinstated where version <= $1::int8::tandem.hlc order by version limit $2)",
        &[(stable as i64).into(), (limit as i64).into()],
    )?;
    Ok(())
}
