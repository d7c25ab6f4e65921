//! A conflict as the catalog holds it: read with the question whether the caller may see it, closed with a
//! decision that travels.
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use crate::relation::SyncedRelation;
use crate::{apply, capture, clock};
use pgrx::prelude::*;
use std::rc::Rc;
use tandem_model::change::Item;
use tandem_model::hlc::{Hlc, NodeId};
use tandem_model::record::{ConflictType, Decision, Image, Record, Status};

/// A record and what this node knows around it.
pub struct Stored {
    pub record: Record,
    /// The same with every lost value in the loser's image.
    shown: Record,
    /// The table of today; none if it was dropped or renamed.
    pub relid: Option<pg_sys::Oid>,
    /// This node and the other one.
    pub around: Rc<Around>,
}

/// Who decides, and between whom.
pub struct Around {
    pub own: NodeId,
    pub own_name: String,
    /// The other node's name: as it calls itself, else as the peer was added.
    pub peer_name: Option<String>,
    session_user: String,
}

/// Which of a table's open conflicts are meant.
pub struct Filter {
    pub schema: String,
    pub table: String,
    pub conflict_type: Option<String>,
    pub detected_after: Option<TimestampWithTimeZone>,
    pub detected_before: Option<TimestampWithTimeZone>,
    /// Those that lost nothing but these.
    pub columns: Option<Vec<String>>,
}

/// What the record knows of one side.
#[derive(Clone, Copy)]
pub enum Side<'a> {
    Row(&'a Image),
    NoRow,
    Unknown,
}

const READ: &str = "
    select c.record::text, t.oid
    from tandem.conflict c
    left join lateral (
        select r.oid from pg_class r join pg_namespace s on s.oid = r.relnamespace
        where s.nspname = c.schema_name and r.relname = c.table_name) t on true
    where c.conflict_id = $1";

impl Stored {
    /// Reads a conflict that the caller may see. Errors: 42704 if there is none, 42501.
    pub fn read(id: pgrx::Uuid) -> Result<Stored> {
        Stored::fetch(READ, id)
    }

    /// The same, locked until the end of the transaction: two decisions never cross.
    pub fn locked(id: pgrx::Uuid) -> Result<Stored> {
        Stored::fetch(&format!("{READ} for update of c"), id)
    }

    fn fetch(query: &str, id: pgrx::Uuid) -> Result<Stored> {
        let around = Rc::new(Around::read()?);
        let found = {
            let _catalog = ActingAs::superuser();
            Spi::connect_mut(|client| -> Result<Option<Stored>> {
                let rows = client.update(query, Some(1), &[id.into()])?;
                rows.into_iter().next().map(|row| Stored::from_row(&row, around)).transpose()
            })?
        };
        let stored = found.ok_or_else(|| {
            Error::operator(
                PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
                format!("conflict {} does not exist", uuid::Uuid::from_bytes(*id.as_bytes())),
                "SELECT conflict_id FROM tandem.conflicts; shows those there are.",
            )
        })?;
        require_rights(stored.relid, &stored.table_name())?;
        Ok(stored)
    }

    fn from_row(row: &pgrx::spi::SpiHeapTupleData<'_>, around: Rc<Around>) -> Result<Stored> {
        let text: String = row.get(1)?.unwrap_or_default();
        let record: Record =
            serde_json::from_str(&text).map_err(|e| Error::bug(format!("a conflict record cannot be read: {e}")))?;
        Ok(Stored { shown: record.settled(), record, relid: row.get(2)?, around })
    }

    pub fn table_name(&self) -> String {
        format!("{}.{}", self.record.schema, self.record.table)
    }

    pub fn table_is_gone(&self) -> Error {
        Error::operator(
            PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
            format!("table {} does not exist", self.table_name()),
            format!("SELECT tandem.ignore('{}'); closes the conflict.", self.record.conflict_id),
        )
    }

    /// The row as this node had it.
    pub fn local(&self) -> Side<'_> {
        self.side(self.shown.tuples.get(&self.around.own.0))
    }

    /// The row as the other node had it.
    pub fn remote(&self) -> Side<'_> {
        self.side(self.shown.tuples.iter().find(|(node, _)| **node != self.around.own.0).map(|(_, image)| image))
    }

    /// The row as the node had it whose write lost.
    pub fn loser(&self) -> Side<'_> {
        self.side(self.shown.tuples.get(&self.record.losing_node().0))
    }

    /// The row as the conflict left it.
    pub fn result(&self) -> Side<'_> {
        self.side(self.record.result.as_ref())
    }

    /// The row that both started from: two inserts met where there was none.
    pub fn base(&self) -> Side<'_> {
        match (&self.shown.base, self.record.conflict_type) {
            (Some(image), _) => Side::Row(image),
            (None, ConflictType::InsertExists) => Side::NoRow,
            (None, _) => Side::Unknown,
        }
    }

    /// Where a delete is involved, the side that has no image had no row.
    fn side<'a>(&self, image: Option<&'a Image>) -> Side<'a> {
        use ConflictType::*;
        match (image, self.record.conflict_type) {
            (Some(image), _) => Side::Row(image),
            (None, UpdateDeleted | UpdateMissing | DeleteOriginDiffers | DeleteMissing | TruncateOriginDiffers) => {
                Side::NoRow
            }
            (None, _) => Side::Unknown,
        }
    }

    /// Raises 55000 for a conflict that somebody has closed, unless forced.
    pub fn require_open(&self, force: bool) -> Result<()> {
        let decision = &self.record.decision;
        if force || matches!(decision.status, Status::Open | Status::Auto) {
            return Ok(());
        }
        let by = decision.by.as_deref().map(|by| format!(" by {by}")).unwrap_or_default();
        let how = decision.resolution.as_deref().map(|r| format!(" ({r})")).unwrap_or_default();
        Err(Error::operator(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("conflict {} is already {}{by}{how}", self.record.conflict_id, status_name(decision.status)),
            "tandem.resolve(conflict_id, …, force => true) decides it once more.",
        ))
    }

    /// Writes the decision here and into this transaction's journal row, so that the peer closes it too.
    /// `version`: that of the write that it became.
    pub fn close(
        &mut self,
        status: Status,
        resolution: Option<&str>,
        note: Option<&str>,
        version: Option<Hlc>,
    ) -> Result<()> {
        let before = self.record.decision.version;
        let version = match version.filter(|v| *v > before) {
            Some(version) => version,
            None => clock::tick(),
        };
        self.record.decision = Decision {
            version,
            status,
            by: Some(self.around.session_user.clone()),
            at: Some(clock::wall_ms() * 1000),
            resolution: resolution.map(str::to_string),
            note: note.map(str::to_string).or_else(|| self.record.decision.note.take()),
        };
        apply::history::decide(&self.record)?;
        let bytes = serde_json::to_vec(&self.record).map_err(|e| Error::bug(e.to_string()))?;
        capture::emit(&Item::Record(serde_bytes::Bytes::new(&bytes)));
        Ok(())
    }
}

impl Around {
    fn read() -> Result<Around> {
        let query = "select n.id::int4, n.name, (select coalesce(node_name, name) from tandem.peer limit 1),
                     session_user::text from tandem.node n";
        let _catalog = ActingAs::superuser();
        Spi::connect(|client| -> Result<Around> {
            let row = client.select(query, Some(1), &[])?.first();
            if row.is_empty() {
                return Err(Error::operator(
                    PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                    "this database is not a node",
                    "SELECT tandem.create_node('tokyo', 1);",
                ));
            }
            Ok(Around {
                own: NodeId(row.get::<i32>(1)?.unwrap_or(0) as u8),
                own_name: row.get(2)?.unwrap_or_default(),
                peer_name: row.get(3)?,
                session_user: row.get(4)?.unwrap_or_default(),
            })
        })
    }
}

impl Filter {
    /// Errors: 42501 if the caller may not decide about the table, 22023 or 42703 if it has no such conflicts.
    pub fn check(&self, relation: &SyncedRelation) -> Result<()> {
        require_rights(Some(relation.relid), &relation.display_name())?;
        if let Some(name) = &self.conflict_type
            && serde_json::from_value::<ConflictType>(name.as_str().into()).is_err()
        {
            return Err(Error::operator(
                PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
                format!("conflict type \"{name}\" is not known"),
                "SELECT DISTINCT conflict_type FROM tandem.open_conflicts; shows those there are.",
            ));
        }
        let is_column = |name: &&String| relation.columns.iter().any(|c| c.name == **name);
        match self.columns.iter().flatten().find(|name| !is_column(name)) {
            None => Ok(()),
            Some(name) => Err(Error::operator(
                PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
                format!("column \"{name}\" of table {} does not exist", relation.display_name()),
                "columns names columns of the table, for example columns => '{balance}'.",
            )),
        }
    }

    /// The next of them after this time (µs) and id, oldest first, locked until the end of the transaction.
    pub fn page(&self, relid: pg_sys::Oid, after: Option<(i64, uuid::Uuid)>, limit: i64) -> Result<Vec<Stored>> {
        const QUERY: &str = "
            select record::text, $3::oid from tandem.conflict
            where schema_name = $1 and table_name = $2 and status = 'open'
              and ($4 is null or conflict_type = $4)
              and ($5 is null or detected_at >= $5) and ($6 is null or detected_at < $6)
              and ($7 is null or (cells <> '{}' and string_to_array(array_to_string(cells, ','), ',') <@ $7))
              and (detected_at, conflict_id) > (coalesce('epoch'::timestamptz + $8 * interval '1 microsecond', '-infinity'),
                   coalesce($9, '00000000-0000-0000-0000-000000000000'))
            order by detected_at, conflict_id limit $10 for update";
        let around = Rc::new(Around::read()?);
        let (time, id) = after.unzip();
        let arguments = [
            self.schema.as_str().into(),
            self.table.as_str().into(),
            relid.into(),
            self.conflict_type.as_deref().into(),
            self.detected_after.into(),
            self.detected_before.into(),
            self.columns.clone().into(),
            time.into(),
            id.map(|id| pgrx::Uuid::from_bytes(*id.as_bytes())).into(),
            limit.into(),
        ];
        let _catalog = ActingAs::superuser();
        Spi::connect_mut(|client| {
            let rows = client.update(QUERY, None, &arguments)?;
            rows.into_iter().map(|row| Stored::from_row(&row, around.clone())).collect()
        })
    }
}

/// The table's owner, or a member of tandem_admin.
fn require_rights(relid: Option<pg_sys::Oid>, table: &str) -> Result<()> {
    let query = "select pg_catalog.pg_has_role('tandem_admin', 'usage') or exists (
        select from pg_catalog.pg_class where oid = $1 and pg_catalog.pg_has_role(relowner, 'usage'))";
    if Spi::get_one_with_args::<bool>(query, &[relid.into()])? == Some(true) {
        return Ok(());
    }
    Err(Error::operator(
        PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
        format!("must be owner of table {table} or a member of tandem_admin"),
        "GRANT tandem_admin TO …; or let the table's owner decide.",
    ))
}

pub fn status_name(status: Status) -> &'static str {
    match status {
        Status::Auto => "auto",
        Status::Open => "open",
        Status::Resolved => "resolved",
        Status::Ignored => "ignored",
        Status::Superseded => "superseded",
    }
}
