//! The constraints of a table as questions in SQL, asked only where a source transaction has run into one.
//!
//! Each takes a row that is not in the table as a parameter of the table's row type. Expressions and
//! predicates are the owner's code: they run with the owner's rights; all else is Postgres's own operators.
use crate::error::Result;
use crate::pg::identity::ActingAs;
use pgrx::prelude::*;
use pgrx::spi::quote_qualified_identifier;

/// All of them, of one table.
pub struct Rules {
    pub uniques: Vec<Unique>,
    pub checks: Vec<Check>,
    /// Foreign keys of this table's rows, and those that point at them.
    pub points_at: Vec<ForeignKey>,
    pub pointed_at: Vec<ForeignKey>,
}

/// A unique or exclusion constraint (or unique index) beside the key.
pub struct Unique {
    pub name: String,
    /// The stored rows that stand in the way of $1: `ctid`.
    pub rivals: String,
    /// A row if $1 and $2 can't both be stored.
    pub excludes: String,
    /// It runs code of the table's owner.
    pub owners_code: bool,
}

/// A CHECK constraint.
pub struct Check {
    pub name: String,
    /// A row if $1 breaks it.
    pub broken: String,
}

/// A foreign key.
#[derive(Debug, Clone)]
pub struct ForeignKey {
    pub name: String,
    pub child: pg_sys::Oid,
    pub parent: pg_sys::Oid,
    /// Attribute numbers of both sides, pair by pair.
    pub columns: Vec<(i16, i16)>,
    /// A row if $1, a row of the child's table, points at a parent that is not stored.
    pub orphaned: String,
    /// The stored rows that point at $1, a row of the parent's table, and at no stored parent: `ctid`.
    pub orphans: String,
}

impl Rules {
    /// Reads them from the catalog.
    pub fn of(relid: pg_sys::Oid, key_index: pg_sys::Oid) -> Result<Rules> {
        let _superuser = ActingAs::superuser();
        let candidate = Candidate::of(relid)?;
        Ok(Rules {
            uniques: uniques(&candidate, relid, key_index)?,
            checks: checks(&candidate, relid)?,
            points_at: foreign_keys("conrelid", relid)?,
            pointed_at: foreign_keys("confrelid", relid)?,
        })
    }
}

/// A table's name, and how a parameter of its row type is looked at as a table of one row.
struct Candidate {
    name: String,
    /// Columns to select from `($n).*`, generated ones computed.
    columns: String,
}

impl Candidate {
    fn of(relid: pg_sys::Oid) -> Result<Candidate> {
        let query = "
            select n.nspname::text, c.relname::text,
                   string_agg(case a.attgenerated when '' then quote_ident(a.attname)
                              else pg_get_expr(d.adbin, d.adrelid) || ' as ' || quote_ident(a.attname) end,
                              ', ' order by a.attnum)
            from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
            join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
            left join pg_catalog.pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
            where c.oid = $1 group by 1, 2";
        Spi::connect(|client| {
            let row = client.select(query, Some(1), &[relid.into()])?.first();
            let text = |i| -> Result<String> { Ok(row.get::<String>(i)?.unwrap_or_default()) };
            Ok(Candidate { name: quote_qualified_identifier(text(1)?, text(2)?), columns: text(3)? })
        })
    }

    /// Parameter `n` as a table.
    fn parameter(&self, n: usize) -> String {
        format!("(select {} from (select (${n}::{}).*) given)", self.columns, self.name)
    }
}

fn uniques(candidate: &Candidate, relid: pg_sys::Oid, key_index: pg_sys::Oid) -> Result<Vec<Unique>> {
    const QUERY: &str = "
        select coalesce(x.conname, r.relname)::text,
               array_agg('(' || pg_get_indexdef(i.indexrelid, k::int, false) || ')' || coalesce(
                   (select format(' collate %I.%I', n.nspname, l.collname) from pg_catalog.pg_collation l
                    join pg_catalog.pg_namespace n on n.oid = l.collnamespace where l.oid = (i.indcollation)[k - 1]), '')
                   order by k)::text[],
               array_agg((select format('operator(%I.%s)', n.nspname, o.oprname) from pg_catalog.pg_operator o
                   join pg_catalog.pg_namespace n on n.oid = o.oprnamespace
                   where o.oid = coalesce((x.conexclop)[k],
                       (select a.amopopr from pg_catalog.pg_opclass c join pg_catalog.pg_amop a
                        on a.amopfamily = c.opcfamily and a.amoplefttype = c.opcintype
                        and a.amoprighttype = c.opcintype and a.amopstrategy = 3
                        where c.oid = (i.indclass)[k - 1]))) order by k)::text[],
               i.indnullsnotdistinct, pg_get_expr(i.indpred, i.indrelid), i.indexprs is not null or i.indpred is not null
        from pg_catalog.pg_index i
        join pg_catalog.pg_class r on r.oid = i.indexrelid
        left join pg_catalog.pg_constraint x on x.conindid = i.indexrelid and x.contype in ('p', 'u', 'x')
             and x.conrelid = i.indrelid
        cross join lateral generate_series(1, i.indnkeyatts) k
        where i.indrelid = $1 and (i.indisunique or i.indisexclusion) and i.indislive and i.indexrelid <> $2
        group by i.indexrelid, x.conname, r.relname, x.conexclop, i.indnullsnotdistinct, i.indpred, i.indrelid, i.indexprs
        order by 1";
    Spi::connect(|client| {
        let mut found = Vec::new();
        for row in client.select(QUERY, None, &[relid.into(), key_index.into()])? {
            let text = |i| -> Result<String> { Ok(row.get::<String>(i)?.unwrap_or_default()) };
            let expressions = row.get::<Vec<String>>(2)?.unwrap_or_default();
            let operators = row.get::<Vec<String>>(3)?.unwrap_or_default();
            let nulls_equal = row.get::<bool>(4)? == Some(true);
            let predicate = row.get::<String>(5)?;
            let given = candidate.parameter(1);
            let only_if = predicate.as_ref().map(|p| format!(" where ({p})")).unwrap_or_default();
            let mut terms: Vec<String> = predicate.iter().map(|p| format!("({p})")).collect();
            for (e, operator) in expressions.iter().zip(&operators) {
                let equal = format!("{e} {operator} (select {e} from {given} given{only_if})");
                terms.push(match nulls_equal {
                    false => equal,
                    true => format!("({equal} or ({e} is null and (select {e} is null from {given} given{only_if})))"),
                });
            }
            let terms = terms.join(" and ");
            found.push(Unique {
                name: text(1)?,
                rivals: format!("select stored.ctid from only {} stored where {terms}", candidate.name),
                excludes: format!("select 1 from {} stored where {terms}", candidate.parameter(2)),
                owners_code: row.get::<bool>(6)? == Some(true),
            });
        }
        Ok(found)
    })
}

/// What a constraint `c` has to be to count: from 18 on it may be there and not be enforced.
const ENFORCED: &str = if cfg!(feature = "pg18") { "c.conenforced" } else { "true" };

fn checks(candidate: &Candidate, relid: pg_sys::Oid) -> Result<Vec<Check>> {
    let query = format!(
        "select c.conname::text, pg_get_expr(c.conbin, c.conrelid) from pg_catalog.pg_constraint c
         where c.conrelid = $1 and c.contype = 'c' and {ENFORCED} order by 1"
    );
    Spi::connect(|client| {
        let mut found = Vec::new();
        for row in client.select(query.as_str(), None, &[relid.into()])? {
            let text = |i| -> Result<String> { Ok(row.get::<String>(i)?.unwrap_or_default()) };
            let broken = format!("select 1 from {} given where not ({})", candidate.parameter(1), text(2)?);
            found.push(Check { name: text(1)?, broken });
        }
        Ok(found)
    })
}

fn foreign_keys(side: &str, relid: pg_sys::Oid) -> Result<Vec<ForeignKey>> {
    let query = format!(
        "select c.conname::text, c.conrelid, c.confrelid, c.conkey, c.confkey,
                string_agg(format('parent.%I %s child.%I', p.attname, o.name, k.attname), ' and ' order by i),
                string_agg(format('child.%I is not null', k.attname), ' and ' order by i),
                format('%I.%I', cn.nspname, cr.relname), format('%I.%I', pn.nspname, pr.relname)
         from pg_catalog.pg_constraint c
         cross join lateral generate_subscripts(c.conkey, 1) i
         join pg_catalog.pg_attribute k on k.attrelid = c.conrelid and k.attnum = c.conkey[i]
         join pg_catalog.pg_attribute p on p.attrelid = c.confrelid and p.attnum = c.confkey[i]
         join lateral (select format('operator(%I.%s)', n.nspname, o.oprname) as name from pg_catalog.pg_operator o
                       join pg_catalog.pg_namespace n on n.oid = o.oprnamespace where o.oid = c.conpfeqop[i]) o on true
         join pg_catalog.pg_class cr on cr.oid = c.conrelid join pg_catalog.pg_namespace cn on cn.oid = cr.relnamespace
         join pg_catalog.pg_class pr on pr.oid = c.confrelid join pg_catalog.pg_namespace pn on pn.oid = pr.relnamespace
         where c.{side} = $1 and c.contype = 'f' and c.conparentid = 0 and {ENFORCED}
         group by c.oid, c.conname, c.conrelid, c.confrelid, c.conkey, c.confkey, cn.nspname, cr.relname, pn.nspname,
                  pr.relname
         order by 1"
    );
    Spi::connect(|client| {
        let mut found = Vec::new();
        for row in client.select(query.as_str(), None, &[relid.into()])? {
            let text = |i| -> Result<String> { Ok(row.get::<String>(i)?.unwrap_or_default()) };
            let oid = |i| -> Result<pg_sys::Oid> { Ok(row.get::<pg_sys::Oid>(i)?.unwrap_or(pg_sys::InvalidOid)) };
            let keys = |i| -> Result<Vec<i16>> { Ok(row.get::<Vec<i16>>(i)?.unwrap_or_default()) };
            let (matches, given, child, parent) = (text(6)?, text(7)?, text(8)?, text(9)?);
            found.push(ForeignKey {
                name: text(1)?,
                child: oid(2)?,
                parent: oid(3)?,
                columns: keys(4)?.into_iter().zip(keys(5)?).collect(),
                orphaned: format!(
                    "select 1 from (select ($1::{child}).*) child where {given} \
                     and not exists (select from {parent} parent where {matches})"
                ),
                orphans: format!(
                    "select child.ctid from only {child} child, (select ($1::{parent}).*) parent where {matches} \
                     and not exists (select from {parent} parent where {matches})"
                ),
            });
        }
        Ok(found)
    })
}
