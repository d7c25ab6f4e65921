//! How each synced table stands to its counterpart on the peer: named states that end by themselves.
use crate::error::Result;
use crate::pg::identity::ActingAs;
use crate::relation::{self, SyncedRelation};
use pgrx::prelude::*;
use std::rc::Rc;
use tandem_model::descriptor::Descriptor;
use tandem_model::orphan::OnFk;

/// State of a table towards the peer. Only in [`State::Active`] are its changes applied; otherwise they wait
/// in `tandem.held`. Derived anew from both shapes whenever one of them may have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Active,
    /// The peer has not called add_table for it, or has not been reached yet.
    MissingOnPeer,
    MissingHere,
    /// Columns, types or key differ.
    SchemaDiffers,
    /// The columns are decided in other groups or by other policies, or foreign keys in another way.
    PolicyDiffers,
    /// Both held rows when they were added, and not the same ones.
    JoinRequired,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            State::Active => "active",
            State::MissingOnPeer => "missing_on_peer",
            State::MissingHere => "missing_here",
            State::SchemaDiffers => "schema_differs",
            State::PolicyDiffers => "policy_differs",
            State::JoinRequired => "join_required",
        }
    }
}

/// What `add_table` found: number of rows, and their digest (as text: it is only compared).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Initial {
    pub rows: i64,
    pub digest: String,
}

/// One of the peer's tables.
pub struct PeerTable {
    pub shape: Descriptor,
    pub initial: Initial,
}

/// A table of this node that is kept in sync.
pub struct OwnTable {
    pub relid: pg_sys::Oid,
    pub schema: String,
    pub table: String,
    pub initial: Initial,
    /// What is wrong with it, if it can't be described any more.
    pub relation: std::result::Result<Rc<SyncedRelation>, String>,
}

/// Judges a table that both sides have.
pub fn compare(own: &OwnTable, peer: &PeerTable) -> (State, String) {
    match &own.relation {
        Ok(relation) => compare_shapes(&relation.shape(), &own.initial, peer),
        Err(why) => (State::SchemaDiffers, why.clone()),
    }
}

/// The same by the local shape.
pub fn compare_shapes(own: &Descriptor, initial: &Initial, peer: &PeerTable) -> (State, String) {
    let one_cell = |shape: &Descriptor| {
        let mut shape = shape.clone();
        shape.columns.iter_mut().for_each(|c| c.cell = 0);
        shape.policies.clear();
        shape.on_fk = OnFk::default();
        shape
    };
    if let Err(difference) = one_cell(own).agrees(&one_cell(&peer.shape)) {
        return (State::SchemaDiffers, difference.0);
    }
    if let Err(difference) = own.agrees(&peer.shape) {
        return (State::PolicyDiffers, difference.0);
    }
    if *initial != peer.initial {
        let why = format!(
            "the table held {} rows here and {} on the peer when it was added, and not the same ones",
            initial.rows, peer.initial.rows
        );
        return (State::JoinRequired, why);
    }
    (State::Active, String::new())
}

/// This node's synced tables. A table that was dropped since is left out.
pub fn own() -> Result<Vec<OwnTable>> {
    const QUERY: &str = "
        select s.relid::oid, n.nspname::text, c.relname::text, s.initial_rows, s.initial_digest::text
        from tandem.synced_table s
        join pg_catalog.pg_class c on c.oid = s.relid join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        order by 2, 3";
    let _superuser = ActingAs::superuser();
    let mut tables = Spi::connect(|client| -> Result<Vec<OwnTable>> {
        let mut tables = Vec::new();
        for row in client.select(QUERY, None, &[])? {
            let Some(relid) = row.get::<pg_sys::Oid>(1)? else { continue };
            let text = |i| -> Result<String> { Ok(row.get::<String>(i)?.unwrap_or_default()) };
            let initial = Initial { rows: row.get::<i64>(4)?.unwrap_or(0), digest: text(5)? };
            tables.push(OwnTable { relid, schema: text(2)?, table: text(3)?, initial, relation: Err(String::new()) });
        }
        Ok(tables)
    })?;
    tables.retain_mut(|table| match relation::synced_by_oid(table.relid) {
        // Dropped since the query.
        Err(e) if e.sqlstate == PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE => false,
        described => {
            table.relation = described.map_err(|e| e.message);
            true
        }
    });
    Ok(tables)
}

/// The tables of a peer as it described them last. A description that can't be read counts as none.
pub fn of_peer(peer: &str) -> Result<Vec<PeerTable>> {
    const QUERY: &str = "
        select shape, initial_rows, initial_digest::text, schema_name, table_name from tandem.peer_table
        where peer = $1 order by schema_name, table_name";
    let _superuser = ActingAs::superuser();
    Spi::connect(|client| {
        let mut tables = Vec::new();
        for row in client.select(QUERY, None, &[peer.into()])? {
            let text = |i| -> Result<String> { Ok(row.get::<String>(i)?.unwrap_or_default()) };
            let Ok(mut shape) = serde_json::from_str::<Descriptor>(&text(1)?) else { continue };
            (shape.schema, shape.table) = (text(4)?, text(5)?);
            let initial = Initial { rows: row.get::<i64>(2)?.unwrap_or(0), digest: text(3)? };
            tables.push(PeerTable { shape, initial });
        }
        Ok(tables)
    })
}

/// One line of `tandem.tables`.
pub struct Line {
    pub schema: String,
    pub table: String,
    pub state: State,
    /// Why it is not active; empty if it is.
    pub reason: String,
}

/// State of every table that either side keeps in sync. Usable in any session; needs a snapshot.
pub fn states() -> Result<Vec<Line>> {
    let peer = peer_name()?;
    let theirs = match &peer {
        Some((name, _)) => of_peer(name)?,
        None => Vec::new(),
    };
    let ours = own()?;
    let mut lines = Vec::new();
    for table in &ours {
        let counterpart = theirs.iter().find(|t| t.shape.schema == table.schema && t.shape.table == table.table);
        let (state, reason) = match (counterpart, &peer) {
            (Some(their), _) => compare(table, their),
            (None, None) => (State::MissingOnPeer, "there is no peer: call tandem.add_peer()".to_string()),
            (None, Some((name, false))) => (State::MissingOnPeer, format!("peer \"{name}\" has not been reached yet")),
            (None, Some((name, true))) => (
                State::MissingOnPeer,
                format!("call tandem.add_table() on peer \"{name}\"; changes are kept until then"),
            ),
        };
        lines.push(Line { schema: table.schema.clone(), table: table.table.clone(), state, reason });
    }
    for their in &theirs {
        let shape = &their.shape;
        if !ours.iter().any(|t| t.schema == shape.schema && t.table == shape.table) {
            lines.push(Line {
                schema: shape.schema.clone(),
                table: shape.table.clone(),
                state: State::MissingHere,
                reason: "call tandem.add_table() here; the peer's changes are kept until then".to_string(),
            });
        }
    }
    lines.sort_by(|a, b| (&a.schema, &a.table).cmp(&(&b.schema, &b.table)));
    Ok(lines)
}

/// The peer's name, and whether it was ever reached.
fn peer_name() -> Result<Option<(String, bool)>> {
    let _superuser = ActingAs::superuser();
    Spi::connect(|client| {
        let row = client.select("select name, node_id is not null from tandem.peer limit 1", Some(1), &[])?.first();
        if row.is_empty() {
            return Ok(None);
        }
        Ok(row.get::<String>(1)?.map(|name| (name, row.get::<bool>(2).ok().flatten().unwrap_or(false))))
    })
}
