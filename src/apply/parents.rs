//! Parents whose foreign key acts on its children (cascade, set null, set default). The source's children
//! come with its stream, so nothing acts here; at the end of the source transaction it is only looked
//! whether a child is left that the source knew nothing of.
use super::constraints::acts_on_children;
use super::table::{Row, value_of};
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use crate::relation::SyncedRelation;
use pgrx::prelude::*;
use std::ffi::CStr;

/// A foreign key that points at a table and acts (cascade, set null, set default) when its parent goes.
#[derive(Debug, Clone)]
pub struct Referenced {
    pub constraint: pg_sys::Oid,
    /// The referenced columns of the parent.
    pub attnums: Vec<i16>,
}

/// The acting foreign keys that point at `rel`.
///
/// # Safety
/// `rel` is open.
pub unsafe fn referenced(rel: pg_sys::Relation) -> Vec<Referenced> {
    let mut found: Vec<Referenced> = Vec::new();
    // SAFETY: the relcache's own triggers, read only.
    let triggers = unsafe {
        match (*rel).trigdesc.as_ref() {
            None => return found,
            Some(desc) => std::slice::from_raw_parts(desc.triggers, desc.numtriggers as usize),
        }
    };
    for trigger in triggers {
        let acts = trigger.tgisinternal
            && acts_on_children(trigger.tgfoid.to_u32())
            && trigger.tgenabled as u8 != pg_sys::TRIGGER_DISABLED;
        if acts && !found.iter().any(|f| f.constraint == trigger.tgconstraint) {
            found.push(Referenced { constraint: trigger.tgconstraint, attnums: Vec::new() });
        }
    }
    for key in &mut found {
        key.attnums = referenced_columns(key.constraint);
    }
    found.retain(|key| !key.attnums.is_empty());
    found
}

fn referenced_columns(constraint: pg_sys::Oid) -> Vec<i16> {
    let query = "select confkey from pg_catalog.pg_constraint where oid = $1";
    Spi::connect(|client| -> std::result::Result<_, pgrx::spi::Error> {
        client.select(query, Some(1), &[constraint.into()])?.first().get_one::<Vec<i16>>()
    })
    .ok()
    .flatten()
    .unwrap_or_default()
}

/// A parent's values that are gone: looked up at the end of the source transaction.
pub struct Gone {
    constraint: pg_sys::Oid,
    /// The values as text, in the order of the constraint.
    values: Vec<String>,
}

impl Referenced {
    /// What has to be looked for when `old` gave way to `new` (or to nothing); none if the key stays.
    pub fn gone(&self, rel: &SyncedRelation, old: &Row, new: Option<&Row>) -> Option<Gone> {
        let mut values = Vec::new();
        let mut changed = new.is_none();
        for attnum in &self.attnums {
            let column = rel.columns.iter().find(|c| c.attnum == *attnum)?;
            let value = value_of(old, *attnum)?;
            changed |= new.is_some_and(|new| !crate::value::equal(column, Some(value), value_of(new, *attnum)));
            values.push(output(column.typid, value));
        }
        changed.then_some(Gone { constraint: self.constraint, values })
    }
}

fn output(typid: pg_sys::Oid, value: pg_sys::Datum) -> String {
    let (mut function, mut varlena) = (pg_sys::InvalidOid, false);
    // SAFETY: the output function of the value's type gives a C string.
    unsafe {
        pg_sys::getTypeOutputInfo(typid, &mut function, &mut varlena);
        let text = pg_sys::OidOutputFunctionCall(function, value);
        let owned = CStr::from_ptr(text).to_string_lossy().into_owned();
        pg_sys::pfree(text.cast());
        owned
    }
}

struct Names {
    name: String,
    child: String,
    parent: String,
    child_owner: pg_sys::Oid,
    /// Of each column pair: child column, parent column, type of the parent column.
    columns: Vec<(String, String, String)>,
}

fn names(constraint: pg_sys::Oid) -> Result<Option<Names>> {
    let query = "
        select c.conname::text, c.conrelid::regclass::text, c.confrelid::regclass::text, r.relowner,
               array_agg(quote_ident(k.attname) order by i)::text[], array_agg(quote_ident(p.attname) order by i)::text[],
               array_agg(format_type(p.atttypid, p.atttypmod) order by i)::text[]
        from pg_catalog.pg_constraint c
        join pg_catalog.pg_class r on r.oid = c.conrelid
        cross join lateral generate_subscripts(c.conkey, 1) i
        join pg_catalog.pg_attribute k on k.attrelid = c.conrelid and k.attnum = c.conkey[i]
        join pg_catalog.pg_attribute p on p.attrelid = c.confrelid and p.attnum = c.confkey[i]
        where c.oid = $1
        group by c.oid, r.oid, c.conname, c.conrelid, c.confrelid, r.relowner";
    Spi::connect(|client| {
        let row = client.select(query, Some(1), &[constraint.into()])?.first();
        if row.is_empty() {
            return Ok(None);
        }
        let text = |i| -> Result<String> { Ok(row.get::<String>(i)?.unwrap_or_default()) };
        let list = |i| -> Result<Vec<String>> { Ok(row.get::<Vec<String>>(i)?.unwrap_or_default()) };
        let columns = list(5)?.into_iter().zip(list(6)?).zip(list(7)?).map(|((k, p), t)| (k, p, t)).collect();
        Ok(Some(Names {
            name: text(1)?,
            child: text(2)?,
            parent: text(3)?,
            child_owner: row.get::<pg_sys::Oid>(4)?.unwrap_or(pg_sys::InvalidOid),
            columns,
        }))
    })
}

impl Gone {
    /// Errors (23503) if a child still points at the values and no parent has them again.
    pub fn check(&self) -> Result<()> {
        let Some(names) = names(self.constraint)? else { return Ok(()) };
        let pairs = |prefix: &str, pick: fn(&(String, String, String)) -> &str| {
            let mut conditions = Vec::new();
            for (i, column) in names.columns.iter().enumerate() {
                conditions.push(format!("{prefix}.{} = ${}::text::{}", pick(column), i + 1, column.2));
            }
            conditions.join(" and ")
        };
        let query = format!(
            "select 1 from only {} c where {} and not exists (select 1 from {} p where {}) limit 1 for key share of c",
            names.child,
            pairs("c", |c| &c.0),
            names.parent,
            pairs("p", |c| &c.1),
        );
        let arguments: Vec<_> = self.values.iter().map(|v| v.as_str().into()).collect();
        let orphan = {
            let _owner = ActingAs::owner(names.child_owner);
            // An update, as far as SPI goes: so that it looks with a new snapshot.
            Spi::connect_mut(|client| client.update(query.as_str(), Some(1), &arguments).map(|t| !t.is_empty()))?
        };
        if !orphan {
            return Ok(());
        }
        let columns: Vec<_> = names.columns.iter().map(|c| c.1.as_str()).collect();
        Err(Error::operator(
            PgSqlErrorCode::ERRCODE_FOREIGN_KEY_VIOLATION,
            format!(
                "the peer deleted or changed a row of table {} that is still referenced from table {} by foreign key \"{}\"",
                names.parent, names.child, names.name
            ),
            super::report::MEND,
        )
        .detail(format!("Key ({})=({}).", columns.join(", "), self.values.join(", "))))
    }
}
