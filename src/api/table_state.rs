//! How each synced table stands with the peer's table of the same name, as the peer described it at the
//! last contact: what `tandem.tables` shows.
use super::answer;
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use crate::relation;
use pgrx::JsonB;
use pgrx::prelude::*;
use tandem_model::descriptor::Descriptor;

/// Named states of a table, in the order in which they are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The peer has not been reached yet, or there is none.
    NotPaired,
    /// The peer has not added it; goes on when it does.
    MissingOnPeer,
    /// Columns, types, key or cells differ; goes on when they agree.
    SchemaDiffers,
    /// Both held rows, and not the same ones, when they were added.
    JoinRequired,
    Active,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::NotPaired => "not_paired",
            State::MissingOnPeer => "missing_on_peer",
            State::SchemaDiffers => "schema_differs",
            State::JoinRequired => "join_required",
            State::Active => "active",
        }
    }
}

/// What the catalog holds of one synced table and of its counterpart.
struct Pair {
    relid: pg_sys::Oid,
    granularity: String,
    cells: Option<JsonB>,
    contacted: bool,
    peer_shape: Option<String>,
    same_content: bool,
}

#[pg_extern(volatile, parallel_unsafe)]
fn table_states() -> TableIterator<
    'static,
    (name!(relid, pg_sys::Oid), name!(state, &'static str), name!(reason, Option<String>)),
> {
    let _catalog = ActingAs::superuser();
    let rows = answer(pairs()).into_iter().map(|pair| {
        let (state, reason) = judge(&pair);
        (pair.relid, state.name(), reason)
    });
    TableIterator::new(rows.collect::<Vec<_>>())
}

fn pairs() -> Result<Vec<Pair>> {
    let query = "select s.relid::oid, s.granularity, s.cells,
            exists (select from tandem.peer where nonce is not null or exists (select from tandem.peer_table)),
            t.shape,
            coalesce(t.initial_rows = s.initial_rows and t.initial_digest = s.initial_digest, false)
        from tandem.synced_table s join pg_class c on c.oid = s.relid join pg_namespace n on n.oid = c.relnamespace
        left join tandem.peer_table t on t.schema_name = n.nspname and t.table_name = c.relname";
    Spi::connect(|client| -> std::result::Result<Vec<Pair>, pgrx::spi::Error> {
        let rows = client.select(query, None, &[])?;
        rows.map(|row| {
            Ok(Pair {
                relid: row.get(1)?.unwrap_or(pg_sys::InvalidOid),
                granularity: row.get(2)?.unwrap_or_default(),
                cells: row.get(3)?,
                contacted: row.get(4)?.unwrap_or(false),
                peer_shape: row.get(5)?,
                same_content: row.get(6)?.unwrap_or(false),
            })
        })
        .collect()
    })
    .map_err(Error::from)
}

fn judge(pair: &Pair) -> (State, Option<String>) {
    let own = match relation::describe(pair.relid, &pair.granularity, pair.cells.as_ref().map(|c| &c.0)) {
        Ok(relation) => relation.shape(),
        Err(e) => return (State::SchemaDiffers, Some(e.message)),
    };
    let Some(shape) = &pair.peer_shape else {
        return match pair.contacted {
            true => (State::MissingOnPeer, Some("the peer has not added a table of this name".to_string())),
            false => (State::NotPaired, Some("the peer has not been reached yet".to_string())),
        };
    };
    let theirs: Descriptor = match serde_json::from_str(shape) {
        Ok(theirs) => theirs,
        Err(e) => return (State::SchemaDiffers, Some(format!("the peer's description cannot be read: {e}"))),
    };
    if let Err(difference) = own.agrees(&theirs) {
        return (State::SchemaDiffers, Some(difference.0));
    }
    match pair.same_content {
        true => (State::Active, None),
        false => (State::JoinRequired, Some("the two sides held other rows when they were added".to_string())),
    }
}
