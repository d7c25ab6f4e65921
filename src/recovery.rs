//! What shared memory must know again after a start: the node, the clock's floor, the stable points and
//! how far both streams were, read back from the catalog at a database's first use.
use crate::clock;
use crate::error::Error;
use crate::pg::identity::ActingAs;
use crate::pg::names;
use crate::shmem::{self, Database};
use pgrx::prelude::*;
use std::sync::atomic::Ordering::*;
use tandem_model::hlc::{Hlc, Mark, Position};

const RECOVER: &str = "
    with journals as (
        select \"position\", stable from tandem.journal_0 union all
        select \"position\", stable from tandem.journal_1 union all
        select \"position\", stable from tandem.journal_2 union all
        select \"position\", stable from tandem.journal_3
    ), progress as (
        select * from tandem.progress_0 union all select * from tandem.progress_1
    ), latest as (
        select * from progress order by \"position\" desc, seen desc, acked desc limit 1
    )
    select (select id::int4 from tandem.node),
           (select last_value from tandem.clock_reservation),
           greatest((select max(stable) from journals)::int8, (select max(stable_own) from progress)::int8,
                    (select stable from tandem.journal_trim)::int8, 0),
           coalesce((select max(stable_peer) from progress)::int8, 0),
           coalesce((select max(acked) from progress)::int8, 0),
           (select seen::int8 from latest), (select seen_low::int8 from latest),
           (select \"position\"::int8 from latest),
           greatest((select max(\"position\") from journals)::int8, (select trimmed_to from tandem.journal_trim)::int8, 0),
           (select max(node_id)::int8 from tandem.peer),
           (select max(\"position\")::int8 from tandem.journal_0),
           (select max(\"position\")::int8 from tandem.journal_1),
           (select max(\"position\")::int8 from tandem.journal_2),
           (select max(\"position\")::int8 from tandem.journal_3),
           (select count(*) from (select from tandem.displaced limit 1) d)";

/// Fills a database's entry. Safe to run in several sessions at once: every field only rises.
pub fn load(database: &Database) {
    if names::schema_oid() == pg_sys::InvalidOid {
        Error::operator(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "extension tandem is not installed in this database",
            "CREATE EXTENSION tandem;",
        )
        .raise();
    }
    let _superuser = ActingAs::superuser();
    let row = Spi::connect(|client| -> Result<[Option<i64>; 15], pgrx::spi::Error> {
        let table = client.select(RECOVER, Some(1), &[])?.first();
        let mut row = [None; 15];
        row[0] = table.get::<i32>(1)?.map(i64::from);
        for (i, field) in row.iter_mut().enumerate().skip(1) {
            *field = table.get::<i64>(i + 1)?;
        }
        Ok(row)
    });
    let row = row.unwrap_or_else(|e| Error::from(e).raise());
    let [node, reserved, stable_own, stable_peer, acked, seen, seen_low, applied, last, peer, segments @ .., displaced] =
        row.map(|v| v.unwrap_or(0) as u64);
    let clock = &shmem::region().clock;
    for floor in [reserved, last, stable_own] {
        clock.observe(clock::now_ms(), floor);
    }
    database.reserved.fetch_max(reserved, AcqRel);
    database.raise_stable_own(Hlc(stable_own));
    database.raise_stable_peer(Hlc(stable_peer));
    database.acked.fetch_max(acked, AcqRel);
    // Before a session can take a position of this start: it has to pass here first.
    database.set_recovered_end(last);
    database.last_position.fetch_max(last, AcqRel);
    database.applied.fetch_max(applied, AcqRel);
    if seen != 0 {
        database.publish_seen(Mark { position: Position(seen), low: Hlc(seen_low) });
    }
    for (held, last) in database.segment_last.iter().zip(segments) {
        held.fetch_max(last, AcqRel);
    }
    database.has_displaced.fetch_or(displaced != 0, AcqRel);
    // The segment that was written last goes on being written.
    let newest = (0u32..).zip(segments).max_by_key(|(_, last)| *last).map_or(0, |(number, _)| number);
    let _ = database.segment.compare_exchange(0, newest, AcqRel, Acquire);
    database.peer_node.store(peer as u32, Release);
    database.node.store(node as u32, Release);
    // Without a node nothing was loaded that lasts: look again next time.
    database.loaded.store(node != 0, Release);
}
