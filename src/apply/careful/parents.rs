//! Foreign keys: children whose parent does not show, settled as `tandem_model::orphan` decides.
use super::super::row::{Work, key_of};
use super::super::table::{Row, Table};
use super::super::{conflict, image};
use super::rules::ForeignKey;
use super::{Scene, own, question, rank_of, unique};
use crate::displaced::{self, Displaced, WaitsFor};
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use crate::tombstone::{self, Tombstone};
use crate::value;
use pgrx::prelude::*;
use tandem_model::hlc::Hlc;
use tandem_model::orphan::{OnFk, Parent, Remedy, remedy};
use tandem_model::record::{ConflictType, Image};

/// Looks after these rows that were written, and those that point at rows that went.
pub fn settle(
    scene: &mut Scene<'_>,
    children: Vec<(pg_sys::Oid, pg_sys::HeapTuple)>,
    gone: Vec<(pg_sys::Oid, pg_sys::HeapTuple)>,
) -> Result<()> {
    let mut children = children;
    for (relid, tuple) in gone {
        children.extend(orphans_of(scene, relid, tuple)?);
    }
    for (relid, tuple) in children {
        child(scene, relid, tuple)?;
    }
    Ok(())
}

/// The rows that pointed at a row that is not there any more.
fn orphans_of(
    scene: &mut Scene<'_>,
    relid: pg_sys::Oid,
    tuple: pg_sys::HeapTuple,
) -> Result<Vec<(pg_sys::Oid, pg_sys::HeapTuple)>> {
    scene.open_table(relid)?;
    let Scene { tables, careful, .. } = scene;
    let table = tables.get_mut(&relid).ok_or_else(|| Error::bug("a table was closed too early"))?;
    let rules = careful.rules(table)?;
    let mut orphans = Vec::new();
    for key in &rules.pointed_at {
        let table = scene.open_table(relid)?;
        let places = {
            let _memory = table.enter_row_memory();
            let row = table.kept(tuple);
            question::places(table, &row, &key.orphans, false)?
        };
        if places.is_empty() {
            continue;
        }
        let Some(child) = scene.table(key.child)? else { return Err(unsynced(key)) };
        for place in places {
            let _memory = child.enter_row_memory();
            let row = child.lock_place(place)?;
            orphans.push((key.child, child.keep(&row)));
        }
    }
    Ok(orphans)
}

/// A table that points at a synced one, and is not synced itself, is not ours to change.
fn unsynced(key: &ForeignKey) -> Error {
    Error::operator(
        PgSqlErrorCode::ERRCODE_FOREIGN_KEY_VIOLATION,
        format!(
            "the peer deleted or changed a row that is still referenced by foreign key \"{}\" of a table that is not synced",
            key.name
        ),
        super::super::report::MEND,
    )
}

fn child(scene: &mut Scene<'_>, relid: pg_sys::Oid, tuple: pg_sys::HeapTuple) -> Result<()> {
    scene.open_table(relid)?;
    let Scene { tables, careful, .. } = scene;
    let table = tables.get_mut(&relid).ok_or_else(|| Error::bug("a table was closed too early"))?;
    let rules = careful.rules(table)?;
    let memory = table.enter_row_memory();
    let known = table.kept(tuple);
    // As it is now: another remedy may have had it already.
    let Some(row) = table.lock_row(&key_of(&table.synced, &known), true) else { return Ok(()) };
    let mut orphaned = None;
    for key in &rules.points_at {
        if question::holds(table, &[&row], &key.orphaned, false)? {
            orphaned = Some(key);
            break;
        }
    }
    let Some(key) = orphaned else { return Ok(()) };
    let kept = table.keep(&row);
    drop(memory);
    let on_fk = table.synced.on_fk;
    let parent = parent_of(scene, key, relid, kept)?;
    let state = match &parent {
        Some((_, tombstone)) if tombstone.versions.dead.node() == scene.work.own => Parent::DeletedHere,
        _ => Parent::Gone,
    };
    match (remedy(on_fk, state), &parent) {
        (Remedy::Revive, Some((parent_key, tombstone))) => {
            if revive(scene, key, relid, kept, parent_key, tombstone)? {
                // It may point at more than one that is gone.
                scene.careful.children.push((relid, kept));
                return Ok(());
            }
            wait(scene, key, relid, kept, true)
        }
        (Remedy::DeleteChild, _) => delete_child(scene, key, relid, kept),
        // Of a parent that the peer deleted: the peer settles it, and this row comes back with what it does.
        _ => wait(scene, key, relid, kept, on_fk == OnFk::Report || parent.is_none()),
    }
}

/// True if a row that waits for a parent may show by now, or can be helped; else the person is asked whom nobody
/// has asked yet.
pub fn may_show(scene: &mut Scene<'_>, relid: pg_sys::Oid, tuple: pg_sys::HeapTuple) -> Result<bool> {
    scene.open_table(relid)?;
    let Scene { tables, careful, .. } = scene;
    let table = tables.get_mut(&relid).ok_or_else(|| Error::bug("a table was closed too early"))?;
    let rules = careful.rules(table)?;
    let row = table.kept(tuple);
    for key in &rules.points_at {
        let table = scene.open_table(relid)?;
        if !question::holds(table, &[&row], &key.orphaned, false)? {
            continue;
        }
        let on_fk = table.synced.on_fk;
        let parent = parent_of(scene, key, relid, tuple)?;
        let own = scene.work.own;
        let here = parent.as_ref().is_some_and(|(_, tombstone)| tombstone.versions.dead.node() == own);
        let state = if here { Parent::DeletedHere } else { Parent::Gone };
        if remedy(on_fk, state) != Remedy::Wait {
            continue;
        }
        scene.open_table(relid)?;
        let Scene { tables, work, .. } = scene;
        let table = tables.get_mut(&relid).ok_or_else(|| Error::bug("a table was closed too early"))?;
        note(table, key, &row, on_fk == OnFk::Report || parent.is_none(), work)?;
        return Ok(false);
    }
    Ok(true)
}

/// The tombstone of the parent that a row points at, if the foreign key is over the parent's key.
fn parent_of(
    scene: &mut Scene<'_>,
    key: &ForeignKey,
    relid: pg_sys::Oid,
    child: pg_sys::HeapTuple,
) -> Result<Option<(Vec<u8>, Tombstone)>> {
    let child_table = scene.open_table(relid)?;
    let (child_rel, child_row) = (child_table.synced.clone(), child_table.kept(child));
    let Some(parent) = scene.table(key.parent)? else { return Ok(None) };
    let rel = parent.synced.clone();
    if rel.key.len() != key.columns.len() {
        return Ok(None);
    }
    let mut values = Vec::new();
    for place in &rel.key {
        let column = &rel.columns[*place];
        let Some((from, _)) = key.columns.iter().find(|(_, to)| *to == column.attnum) else { return Ok(None) };
        let Some(source) = child_rel.columns.iter().find(|c| c.attnum == *from) else { return Ok(None) };
        let Some(datum) = super::super::table::value_of(&child_row, *from) else { return Ok(None) };
        let same = source.typid == column.typid;
        let converted = if same { Some(datum) } else { value::convert(source, datum, column) };
        values.extend(converted);
    }
    let parent_key = super::super::row::key_bytes(&rel, &values);
    Ok(tombstone::find(key.parent, &parent_key).map(|tombstone| (parent_key, tombstone)))
}

/// Writes the parent anew from its image. False if it can't show either.
fn revive(
    scene: &mut Scene<'_>,
    key: &ForeignKey,
    relid: pg_sys::Oid,
    child: pg_sys::HeapTuple,
    parent_key: &[u8],
    tombstone: &Tombstone,
) -> Result<bool> {
    scene.open_table(key.parent)?;
    let Scene { tables, careful, work } = scene;
    let table = tables.get_mut(&key.parent).ok_or_else(|| Error::bug("a table was closed too early"))?;
    let memory = table.enter_row_memory();
    let row = unique::row_of(table, tombstone)?;
    if careful.is_contested(table, &row)? {
        return Ok(false);
    }
    {
        let _owner = ActingAs::owner(table.synced.owner);
        own::insert(table, &row)?;
    }
    work.writes_own = true;
    careful.wrote(table, &row)?;
    let rel = table.synced.clone();
    let parent_image = image::to_json(&rel, &image::of_row(&rel, &row))?;
    let parent_key = image::key_json(&rel, &super::key_values(table, parent_key)?)?;
    drop(memory);
    let child_table = scene.open_table(relid)?;
    let (winning, _) = child_table.versions_of(&child_table.kept(child))?;
    let dead = tombstone.versions.dead;
    let mut record =
        conflict::record_of(&rel, parent_key, ConflictType::ForeignKeyViolation, dead, winning, Default::default());
    record.constraint_name = Some(key.name.clone());
    record.result = Some(Image { rank: (0, winning), tuple: parent_image });
    record.policy = OnFk::Revive.name().to_string();
    let rel = scene.open_table(relid)?.synced.clone();
    let child_key = child_key_json(scene, &rel, relid, child)?;
    record.over(child_key);
    conflict::keep(record, scene.work)?;
    Ok(true)
}

fn child_key_json(
    scene: &mut Scene<'_>,
    rel: &crate::relation::SyncedRelation,
    relid: pg_sys::Oid,
    child: pg_sys::HeapTuple,
) -> Result<Box<serde_json::value::RawValue>> {
    let table = scene.open_table(relid)?;
    let _memory = table.enter_row_memory();
    let row = table.kept(child);
    image::key_json(rel, &key_of(rel, &row))
}

/// Deletes the child, which had not been seen when its parent was deleted.
fn delete_child(scene: &mut Scene<'_>, key: &ForeignKey, relid: pg_sys::Oid, child: pg_sys::HeapTuple) -> Result<()> {
    scene.open_table(relid)?;
    let Scene { tables, careful, work } = scene;
    let table = tables.get_mut(&relid).ok_or_else(|| Error::bug("a table was closed too early"))?;
    let _memory = table.enter_row_memory();
    let known = table.kept(child);
    let Some(row) = table.lock_row(&key_of(&table.synced, &known), true) else { return Ok(()) };
    {
        let _owner = ActingAs::owner(table.synced.owner);
        own::delete(table)?;
    }
    work.writes_own = true;
    careful.took(table, &row)?;
    let record = orphan_record(table, key, &row)?;
    conflict::keep(record, work)
}

/// Takes the child out until a parent shows. `told`: nobody else will settle it, so a person is asked.
fn wait(
    scene: &mut Scene<'_>,
    key: &ForeignKey,
    relid: pg_sys::Oid,
    child: pg_sys::HeapTuple,
    told: bool,
) -> Result<()> {
    scene.open_table(relid)?;
    let Scene { tables, careful, work } = scene;
    let table = tables.get_mut(&relid).ok_or_else(|| Error::bug("a table was closed too early"))?;
    let _memory = table.enter_row_memory();
    let known = table.kept(child);
    let Some(row) = table.lock_row(&key_of(&table.synced, &known), true) else { return Ok(()) };
    let rank = rank_of(table, &row)?;
    let waiting =
        Displaced { row: unique::stashed(table, &row)?, waits_for: WaitsFor::Parent, constraint: key.name.clone() };
    displaced::put(relid, &rank.key, &waiting);
    super::as_owner(table, Table::delete);
    work.queued |= table.has_checks();
    careful.took(table, &row)?;
    note(table, key, &row, told, work)
}

/// On record: what waits may be overwritten by somebody who doesn't see it.
fn note(table: &Table, key: &ForeignKey, row: &Row, told: bool, work: &mut Work) -> Result<()> {
    let record = orphan_record(table, key, row)?;
    if told { conflict::keep_open(record, work) } else { conflict::keep(record, work) }
}

/// The record of a child that lost its parent.
pub fn orphan_record(table: &Table, key: &ForeignKey, row: &Row) -> Result<tandem_model::record::Record> {
    let rel = &table.synced;
    let (hlc, _) = table.versions_of(row)?;
    let key_json = image::key_json(rel, &key_of(rel, row))?;
    let mut record =
        conflict::record_of(rel, key_json.clone(), ConflictType::ForeignKeyViolation, hlc, Hlc(0), Default::default());
    let tuple = image::to_json(rel, &image::of_row(rel, row))?;
    record.tuples.insert(hlc.node().0, Image { rank: (1, hlc), tuple });
    record.constraint_name = Some(key.name.clone());
    record.policy = rel.on_fk.name().to_string();
    record.over(key_json);
    Ok(record)
}
