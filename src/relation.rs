//! What a synced table looks like to capture and apply: columns, key, cells and how each value travels.
//! Cached per backend, rebuilt after a relcache invalidation.
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use crate::value::Codec;
use pgrx::prelude::*;
use pgrx::{PgRelation, PgTupleDesc};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::ffi::CStr;
use std::rc::Rc;
use tandem_model::descriptor::{ColumnShape, Descriptor, DescriptorId, Transport};
use tandem_model::orphan::OnFk;
use tandem_model::policy::{Policies, Policy};
use tandem_model::policy_log::PolicyLog;
use tandem_model::versions::CellId;

/// A column that is kept in sync.
pub struct Column {
    pub attnum: i16,
    pub name: String,
    pub typid: pg_sys::Oid,
    pub typmod: i32,
    /// As `format_type` writes it, schema-qualified where it must be.
    pub type_name: String,
    pub transport: Transport,
    pub cell: CellId,
    /// Place in the key, if it belongs to it.
    pub key_ordinal: Option<usize>,
    pub codec: Codec,
}

/// A synced table.
pub struct SyncedRelation {
    pub relid: pg_sys::Oid,
    pub schema: String,
    pub table: String,
    pub owner: pg_sys::Oid,
    pub descriptor: DescriptorId,
    /// By attribute number; without generated and dropped columns, `_hlc` and `_cells`.
    pub columns: Vec<Column>,
    /// Indexes into `columns`, in key order.
    pub key: Vec<usize>,
    pub key_index: pg_sys::Oid,
    pub hlc_attnum: i16,
    pub cells_attnum: i16,
    pub natts: usize,
    /// How conflicts are decided at once.
    pub judged_by: Policies,
    /// What becomes of a row whose parent was deleted unseen.
    pub on_fk: OnFk,
    /// How the arbiter settles conflicts by a later write.
    pub policies: PolicyLog,
}

impl SyncedRelation {
    /// The shape as it is sent to the peer.
    pub fn shape(&self) -> Descriptor {
        let column = |c: &Column| ColumnShape {
            attnum: c.attnum as u16,
            name: c.name.clone(),
            type_name: c.type_name.clone(),
            transport: c.transport,
            cell: c.cell,
        };
        Descriptor {
            id: self.descriptor,
            relid: self.relid.to_u32(),
            schema: self.schema.clone(),
            table: self.table.clone(),
            columns: self.columns.iter().map(column).collect(),
            key: self.key.iter().map(|i| self.columns[*i].attnum as u16).collect(),
            policies: self.fixed_policies(),
            on_fk: self.on_fk,
        }
    }

    /// What both nodes must agree on, in words.
    fn fixed_policies(&self) -> BTreeMap<String, String> {
        let judged_by = &self.judged_by;
        let mut policies = BTreeMap::new();
        for (what, policy) in [("rows are", &judged_by.existence), ("cells are", &judged_by.others)] {
            if *policy != Policy::LastUpdateWins {
                policies.insert(what.to_string(), policy.to_string());
            }
        }
        for (cell, policy) in &judged_by.cells {
            let mut names: Vec<_> = self.cell_columns(*cell).map(|c| c.name.as_str()).collect();
            names.sort_unstable();
            // Named even if it is the default: the table may have another.
            policies.insert(format!("column {} is", names.join(", ")), policy.to_string());
        }
        policies
    }

    /// The cells of the columns outside the key, ascending.
    pub fn cell_ids(&self) -> Vec<CellId> {
        let mut ids: Vec<_> = self.columns.iter().filter(|c| c.key_ordinal.is_none()).map(|c| c.cell).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// The columns of a cell, by attribute number, without key columns.
    pub fn cell_columns(&self, cell: CellId) -> impl Iterator<Item = &Column> {
        self.columns.iter().filter(move |c| c.cell == cell && c.key_ordinal.is_none())
    }

    /// `schema.table`, for messages.
    pub fn display_name(&self) -> String {
        format!("{}.{}", self.schema, self.table)
    }
}

thread_local! {
    static CACHE: RefCell<HashMap<pg_sys::Oid, Rc<SyncedRelation>>> = RefCell::default();
    /// Set when a descriptor was stored by a transaction that is not committed.
    static UNCOMMITTED: Cell<bool> = const { Cell::new(false) };
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
}

#[pg_guard]
unsafe extern "C-unwind" fn invalidate(_arg: pg_sys::Datum, relid: pg_sys::Oid) {
    CACHE.with(|cache| {
        // An invalidation can arrive while the cache is being filled: then the entry is not in it yet.
        if let Ok(mut cache) = cache.try_borrow_mut() {
            if relid == pg_sys::InvalidOid {
                cache.clear();
            } else {
                cache.remove(&relid);
            }
        }
    });
}

/// A (sub)transaction was rolled back: descriptors that it stored are gone.
pub fn at_abort() {
    if UNCOMMITTED.replace(false) {
        CACHE.with_borrow_mut(HashMap::clear);
    }
}

/// A transaction was committed: what it stored stays.
pub fn at_commit() {
    UNCOMMITTED.set(false);
}

/// The synced relation behind an open one.
pub fn synced(rel: pg_sys::Relation) -> Result<Rc<SyncedRelation>> {
    // SAFETY: the caller holds the relation open.
    let relid = unsafe { (*rel).rd_id };
    match CACHE.with_borrow(|cache| cache.get(&relid).cloned()) {
        Some(found) => Ok(found),
        None => build(relid),
    }
}

/// The same by oid; takes and keeps no more than an AccessShareLock.
pub fn synced_by_oid(relid: pg_sys::Oid) -> Result<Rc<SyncedRelation>> {
    match CACHE.with_borrow(|cache| cache.get(&relid).cloned()) {
        Some(found) => Ok(found),
        None => build(relid),
    }
}

fn build(relid: pg_sys::Oid) -> Result<Rc<SyncedRelation>> {
    if !REGISTERED.replace(true) {
        // SAFETY: registered once per backend.
        unsafe { pg_sys::CacheRegisterRelcacheCallback(Some(invalidate), pg_sys::Datum::from(0usize)) };
    }
    let _superuser = ActingAs::superuser();
    let settings = Spi::connect(|client| -> std::result::Result<_, pgrx::spi::Error> {
        let query = "select granularity, cells, on_fk from tandem.synced_table where relid = $1";
        let row = client.select(query, Some(1), &[relid.into()])?.first();
        if row.is_empty() {
            return Ok(None);
        }
        let on_fk = row.get::<String>(3)?.unwrap_or_default();
        Ok(row.get::<String>(1)?.map(|g| (g, row.get::<pgrx::JsonB>(2).ok().flatten(), on_fk)))
    })?;
    let Some((granularity, cells, on_fk)) = settings else {
        let name = relation_name(relid);
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("table {name} is not kept in sync"),
            format!("SELECT tandem.add_table('{name}');"),
        ));
    };
    let mut relation = describe(relid, &granularity, cells.as_ref().map(|j| &j.0))?;
    relation.on_fk = on_fk.parse().map_err(|e| Error::bug(format!("on_fk: {e}")))?;
    crate::policy::describe(&mut relation)?;
    relation.descriptor = descriptor_id(&relation)?;
    let relation = Rc::new(relation);
    CACHE.with_borrow_mut(|cache| cache.insert(relid, relation.clone()));
    Ok(relation)
}

fn relation_name(relid: pg_sys::Oid) -> String {
    // SAFETY: returns a palloc'd name or null.
    let name = unsafe { pg_sys::get_rel_name(relid) };
    if name.is_null() {
        return relid.to_u32().to_string();
    }
    // SAFETY: a C string in the current context.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

/// Finds or stores the descriptor of a relation's shape of today.
fn descriptor_id(relation: &SyncedRelation) -> Result<DescriptorId> {
    let mut shape = relation.shape();
    shape.id = 0;
    let shape = serde_json::to_string(&shape).map_err(|e| Error::bug(e.to_string()))?;
    let found: Option<i32> = Spi::connect(|client| -> std::result::Result<_, pgrx::spi::Error> {
        let query = "select id from tandem.descriptor where relid = $1 and shape = $2 order by id limit 1";
        client.select(query, Some(1), &[relation.relid.into(), shape.clone().into()])?.first().get_one()
    })
    .or_else(|e| if matches!(e, pgrx::spi::Error::InvalidPosition) { Ok(None) } else { Err(e) })?;
    if let Some(id) = found {
        return Ok(id as DescriptorId);
    }
    let query = "insert into tandem.descriptor (id, relid, shape) \
                 values (nextval('tandem.descriptor_id'), $1, $2) returning id";
    let id: Option<i32> = Spi::get_one_with_args(query, &[relation.relid.into(), shape.into()])?;
    UNCOMMITTED.set(true);
    id.map(|id| id as DescriptorId).ok_or_else(|| Error::bug("no descriptor id"))
}

/// Describes a table and checks that it can be kept in sync.
///
/// Errors: 42P01 if it is gone, 0A000 for a kind of relation that cannot, 55000 without a usable key, 42703/22023 for a wrong
/// cell layout. The descriptor is 0: [`synced`] gives the stored one.
pub fn describe(relid: pg_sys::Oid, granularity: &str, cells: Option<&serde_json::Value>) -> Result<SyncedRelation> {
    // SAFETY: takes a lock whether the relation is there or not, and looks into the catalog after.
    let gone = unsafe {
        pg_sys::LockRelationOid(relid, pg_sys::AccessShareLock as pg_sys::LOCKMODE);
        pg_sys::get_rel_name(relid).is_null()
    };
    if gone {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
            format!("the table with OID {} has been dropped", relid.to_u32()),
            "SELECT relation FROM tandem.tables; shows those that are there.",
        ));
    }
    // SAFETY: AccessShareLock is held until the end of the transaction (close keeps it).
    let rel = unsafe { PgRelation::with_lock(relid, pg_sys::AccessShareLock as pg_sys::LOCKMODE) };
    check_kind(&rel)?;
    let (key_index, key_attnums) = find_key(&rel)?;
    let tuple_desc: PgTupleDesc = rel.tuple_desc();
    let (mut columns, mut hlc_attnum, mut cells_attnum) = (Vec::new(), 0, 0);
    for attribute in tuple_desc.iter().filter(|a| !a.attisdropped) {
        let name = attribute.name().to_string();
        match name.as_str() {
            "_hlc" => hlc_attnum = attribute.attnum,
            "_cells" => cells_attnum = attribute.attnum,
            _ if attribute.attgenerated != 0 => {}
            _ => columns.push(describe_column(attribute, name, &key_attnums)?),
        }
    }
    let key = key_attnums
        .iter()
        .map(|attnum| columns.iter().position(|c| c.attnum == *attnum))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| {
            Error::operator(
                PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                format!("the key of table {} has a generated column", rel.name()),
                "Give the table a primary key of ordinary columns.",
            )
        })?;
    assign_cells(&mut columns, granularity, cells)?;
    Ok(SyncedRelation {
        relid,
        schema: rel.namespace().to_string(),
        table: rel.name().to_string(),
        // SAFETY: rd_rel is set for an open relation.
        owner: unsafe { (*rel.rd_rel).relowner },
        descriptor: 0,
        columns,
        key,
        key_index,
        hlc_attnum,
        cells_attnum,
        natts: tuple_desc.len(),
        judged_by: Policies::default(),
        on_fk: OnFk::default(),
        policies: PolicyLog::default(),
    })
}

fn describe_column(attribute: &pg_sys::FormData_pg_attribute, name: String, key: &[i16]) -> Result<Column> {
    let codec = Codec::of(attribute.atttypid)?;
    // SAFETY: returns a palloc'd C string.
    let type_name = unsafe {
        let flags = (pg_sys::FORMAT_TYPE_TYPEMOD_GIVEN | pg_sys::FORMAT_TYPE_FORCE_QUALIFY) as u16;
        CStr::from_ptr(pg_sys::format_type_extended(attribute.atttypid, attribute.atttypmod, flags))
    };
    Ok(Column {
        attnum: attribute.attnum,
        name,
        typid: attribute.atttypid,
        typmod: attribute.atttypmod,
        // Versions of Postgres differ in which of their own types they qualify.
        type_name: type_name.to_string_lossy().trim_start_matches("pg_catalog.").to_string(),
        transport: codec.transport,
        cell: 0,
        key_ordinal: key.iter().position(|k| *k == attribute.attnum),
        codec,
    })
}

fn check_kind(rel: &PgRelation) -> Result<()> {
    // SAFETY: rd_rel is set for an open relation.
    let form = unsafe { &*rel.rd_rel };
    let refuse = |what: &str| {
        Err(Error::operator(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("{} is {what}, which cannot be kept in sync", rel.name()),
            "Only ordinary permanent tables can: give each of them to tandem.add_table().",
        ))
    };
    match form.relkind as u8 {
        pg_sys::RELKIND_RELATION => {}
        pg_sys::RELKIND_PARTITIONED_TABLE => return refuse("a partitioned table"),
        pg_sys::RELKIND_VIEW | pg_sys::RELKIND_MATVIEW => return refuse("a view"),
        pg_sys::RELKIND_FOREIGN_TABLE => return refuse("a foreign table"),
        _ => return refuse("not a table"),
    }
    match form.relpersistence as u8 {
        pg_sys::RELPERSISTENCE_PERMANENT => {}
        pg_sys::RELPERSISTENCE_TEMP => return refuse("a temporary table"),
        _ => return refuse("an unlogged table"),
    }
    if form.relispartition {
        return refuse("a partition");
    }
    let related = "select exists (select from pg_catalog.pg_inherits where inhrelid = $1 or inhparent = $1)";
    if crate::pg::query::value::<bool>(related, &[rel.oid().into()])? == Some(true) {
        return refuse("part of an inheritance tree");
    }
    #[cfg(feature = "pg18")]
    {
        let of_a_period = "select exists (select from pg_catalog.pg_constraint where contype = 'f' and conperiod
                           and (conrelid = $1 or confrelid = $1))";
        if crate::pg::query::value::<bool>(of_a_period, &[rel.oid().into()])? == Some(true) {
            return refuse("part of a foreign key with PERIOD");
        }
    }
    if rel.namespace() == "tandem" || rel.oid().to_u32() < pg_sys::FirstNormalObjectId {
        return refuse("a system table");
    }
    Ok(())
}

/// The primary key, else the replica-identity index: its oid and columns in index order.
fn find_key(rel: &PgRelation) -> Result<(pg_sys::Oid, Vec<i16>)> {
    // SAFETY: the relation is open.
    let replica_index = unsafe { pg_sys::RelationGetReplicaIndex(rel.as_ptr()) };
    // SAFETY: as above.
    #[cfg(any(feature = "pg15", feature = "pg16", feature = "pg17"))]
    let primary = unsafe { pg_sys::RelationGetPrimaryKeyIndex(rel.as_ptr()) };
    // SAFETY: as above.
    #[cfg(feature = "pg18")]
    let primary = unsafe { pg_sys::RelationGetPrimaryKeyIndex(rel.as_ptr(), false) };
    for oid in [primary, replica_index].into_iter().filter(|oid| *oid != pg_sys::InvalidOid) {
        // SAFETY: an index of a table we hold open.
        let index = unsafe { PgRelation::with_lock(oid, pg_sys::AccessShareLock as pg_sys::LOCKMODE) };
        // SAFETY: rd_index is set for an index.
        let form = unsafe { &*index.rd_index };
        // From 18 on a primary key may be WITHOUT OVERLAPS, which is an exclusion: equality doesn't find its rows.
        if !form.indimmediate || !form.indisvalid || !form.indisunique || form.indisexclusion {
            continue;
        }
        // SAFETY: indkey holds indnkeyatts entries and more.
        let attnums = unsafe { form.indkey.values.as_slice(form.indnkeyatts as usize) };
        if attnums.iter().all(|a| *a > 0) {
            return Ok((oid, attnums.to_vec()));
        }
    }
    Err(Error::operator(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        format!("table {} has no key that can tell its rows apart on both sides", rel.name()),
        format!(
            "ALTER TABLE {0} ADD PRIMARY KEY (...); or ALTER TABLE {0} REPLICA IDENTITY USING INDEX ...; \
             (unique, not null, not deferrable, not partial, not WITHOUT OVERLAPS)",
            rel.name()
        ),
    ))
}

/// Gives each column its cell: the smallest attribute number of its group, 0 for the whole row.
fn assign_cells(columns: &mut [Column], granularity: &str, cells: Option<&serde_json::Value>) -> Result<()> {
    match granularity {
        "row" => columns.iter_mut().for_each(|c| c.cell = 0),
        "column" | "cells" => columns.iter_mut().for_each(|c| c.cell = c.attnum as CellId),
        other => {
            return Err(Error::operator(
                PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
                format!("granularity \"{other}\" is not known"),
                "It is 'column' or 'row'; groups of columns are given with cells => '[[\"a\",\"b\"]]'.",
            ));
        }
    }
    let Some(cells) = cells.filter(|_| granularity == "cells") else { return Ok(()) };
    let groups: Vec<Vec<String>> = serde_json::from_value(cells.clone()).map_err(|_| {
        Error::operator(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            "cells is not a list of lists of column names",
            "For example cells => '[[\"city\",\"zip\",\"street\"],[\"lat\",\"lon\"]]'.",
        )
    })?;
    let mut taken = Vec::new();
    for group in &groups {
        let mut members = Vec::new();
        for name in group {
            let Some(i) = columns.iter().position(|c| c.name == *name && c.key_ordinal.is_none()) else {
                return Err(Error::operator(
                    PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
                    format!("cells names \"{name}\", which is not a column outside the key"),
                    "Name columns of the table that do not belong to its key.",
                ));
            };
            if taken.contains(&i) {
                return Err(Error::operator(
                    PgSqlErrorCode::ERRCODE_DUPLICATE_COLUMN,
                    format!("cells names \"{name}\" twice"),
                    "A column belongs to one cell.",
                ));
            }
            taken.push(i);
            members.push(i);
        }
        if let Some(cell) = members.iter().map(|i| columns[*i].attnum as CellId).min() {
            members.iter().for_each(|i| columns[*i].cell = cell);
        }
    }
    Ok(())
}
