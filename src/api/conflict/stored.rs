//! A conflict as the catalog holds it: read with the question whether the caller may see it, closed with a
//! decision that travels.
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use crate::{apply, capture, clock};
use pgrx::prelude::*;
use tandem_model::change::Item;
use tandem_model::hlc::NodeId;
use tandem_model::record::{ConflictType, Decision, Image, Record, Status};

/// A record and what this node knows around it.
pub struct Stored {
    pub record: Record,
    /// The same with every lost value in the loser's image.
    shown: Record,
    /// The table of today; none if it was dropped or renamed.
    pub relid: Option<pg_sys::Oid>,
    pub own: NodeId,
    pub own_name: String,
    /// The other node's name: as it calls itself, else as the peer was added.
    pub peer_name: Option<String>,
}

/// What the record knows of one side.
#[derive(Clone, Copy)]
pub enum Side<'a> {
    Row(&'a Image),
    NoRow,
    Unknown,
}

const READ: &str = "
    select c.record::text, t.oid, n.id::int4, n.name, p.name
    from tandem.conflict c cross join tandem.node n
    left join lateral (select coalesce(node_name, name) as name from tandem.peer limit 1) p on true
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
        let found = {
            let _catalog = ActingAs::superuser();
            Spi::connect_mut(|client| -> Result<Option<Stored>> {
                let rows = client.update(query, Some(1), &[id.into()])?;
                rows.into_iter().next().map(|row| Stored::from_row(&row)).transpose()
            })?
        };
        let stored = found.ok_or_else(|| {
            Error::operator(
                PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
                format!("conflict {} does not exist", uuid::Uuid::from_bytes(*id.as_bytes())),
                "SELECT conflict_id FROM tandem.conflicts; shows those there are.",
            )
        })?;
        stored.require_rights()?;
        Ok(stored)
    }

    fn from_row(row: &pgrx::spi::SpiHeapTupleData<'_>) -> Result<Stored> {
        let text: String = row.get(1)?.unwrap_or_default();
        let record: Record =
            serde_json::from_str(&text).map_err(|e| Error::bug(format!("a conflict record cannot be read: {e}")))?;
        Ok(Stored {
            shown: record.settled(),
            record,
            relid: row.get(2)?,
            own: NodeId(row.get::<i32>(3)?.unwrap_or(0) as u8),
            own_name: row.get(4)?.unwrap_or_default(),
            peer_name: row.get(5)?,
        })
    }

    /// The table's owner, or a member of tandem_admin.
    fn require_rights(&self) -> Result<()> {
        let query = "select pg_catalog.pg_has_role('tandem_admin', 'usage') or exists (
            select from pg_catalog.pg_class where oid = $1 and pg_catalog.pg_has_role(relowner, 'usage'))";
        if Spi::get_one_with_args::<bool>(query, &[self.relid.into()])? == Some(true) {
            return Ok(());
        }
        Err(Error::operator(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            format!("must be owner of table {} or a member of tandem_admin", self.table_name()),
            "GRANT tandem_admin TO …; or let the table's owner decide.",
        ))
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
        self.side(self.shown.tuples.get(&self.own.0))
    }

    /// The row as the other node had it.
    pub fn remote(&self) -> Side<'_> {
        self.side(self.shown.tuples.iter().find(|(node, _)| **node != self.own.0).map(|(_, image)| image))
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
    pub fn close(&mut self, status: Status, resolution: Option<&str>, note: Option<&str>) -> Result<()> {
        let session_user = Spi::get_one::<String>("select session_user::text")?;
        self.record.decision = Decision {
            version: clock::tick(),
            status,
            by: session_user,
            at: Some(clock::wall_ms() * 1000),
            resolution: resolution.map(str::to_string),
            note: note.map(str::to_string).or_else(|| self.record.decision.note.take()),
        };
        apply::conflict::upsert(self.record.clone())?;
        let bytes = serde_json::to_vec(&self.record).map_err(|e| Error::bug(e.to_string()))?;
        capture::emit(&Item::Record(serde_bytes::Bytes::new(&bytes)));
        Ok(())
    }
}

/// Open conflicts of a table, oldest first.
pub fn open_ids(schema: &str, table: &str) -> Result<Vec<pgrx::Uuid>> {
    let _catalog = ActingAs::superuser();
    let query = "select conflict_id from tandem.conflict
                 where schema_name = $1 and table_name = $2 and status = 'open' order by detected_at, conflict_id";
    let ids = Spi::connect(|client| -> std::result::Result<Vec<_>, pgrx::spi::Error> {
        let rows = client.select(query, None, &[schema.into(), table.into()])?;
        rows.filter_map(|row| row.get::<pgrx::Uuid>(1).transpose()).collect()
    })?;
    Ok(ids)
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
