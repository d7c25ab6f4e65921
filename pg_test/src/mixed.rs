//! Writers over three tables full of constraints: unique values that both sides take, parents that one side
//! deletes while a child comes on the other, and a CHECK over columns that merge. Every watched value is written
//! once, so that none can get lost unnoticed (see [`crate::workload`]).

use rand::Rng;

use crate::client::{Client, Failure};
use crate::pair::Pair;
use crate::workload::{Memory, Plan, Watched, Workload, Writer};

const TABLES: &[Watched] = &[
    Watched { table: "customer", columns: &["name", "phone"] },
    Watched { table: "purchase", columns: &["note"] },
    // Not low and high: of values that a broken CHECK holds back one may still be lost without a record.
    Watched { table: "stock", columns: &["tag"] },
];

/// Values of the unique columns: few, so that they are contested.
const UNIQUE_VALUES: u32 = 40;

/// The tables on both nodes, synced.
#[track_caller]
pub fn create(pair: &Pair, prefix: &str) {
    pair.exec(&format!(
        "create table {prefix}customer (id int primary key, email text unique, name text, phone text);
         create table {prefix}purchase (id int primary key, customer int not null references {prefix}customer,
             code text unique, day int4range, note text, exclude using gist (day with &&));
         create index on {prefix}purchase (customer);
         create table {prefix}stock (id int primary key, low bigint, high bigint, tag text, check (low <= high))"
    ));
    for table in TABLES {
        pair.add_table(&format!("{prefix}{}", table.table), "");
    }
}

/// Starts the writers.
pub fn start(pair: &Pair, prefix: &str, writers: u32, keys: u32, seed: u64) -> Workload {
    let plan = Plan {
        prefix: prefix.to_string(),
        tables: TABLES,
        change,
        lost_races: &["23505", "23503", "23514", "23P01", "40001", "40P01"],
    };
    Workload::by_plan(pair, plan, writers, keys, seed)
}

/// Adds every constraint once more: it must hold for what the tables hold.
#[track_caller]
pub fn assert_constraints(pair: &Pair, prefix: &str) {
    for node in pair.nodes() {
        let constraints = node.rows(&format!(
            "select format('alter table %s add constraint %I %s', conrelid::regclass, conname || '_again', pg_get_constraintdef(oid))
             from pg_constraint where conrelid in
                 ('{prefix}customer'::regclass, '{prefix}purchase'::regclass, '{prefix}stock'::regclass)
             and contype in ('u', 'f', 'c', 'x')"
        ));
        assert_eq!(constraints.len(), 5, "{constraints:?}");
        for again in constraints {
            node.exec(&format!("begin; {again}; rollback"));
        }
    }
}

fn change(writer: &mut Writer, client: &mut Client, done: &mut Memory) -> Result<(), Failure> {
    match writer.random.random_range(0..9) {
        0..3 => customer(writer, client, done),
        3..6 => purchase(writer, client, done),
        _ => stock(writer, client, done),
    }
}

/// The row as it is, locked: what a writer who replaces it has seen.
fn seen(client: &mut Client, table: &str, columns: &str, id: u32) -> Result<Option<Vec<String>>, Failure> {
    let rows = client.try_cells(&format!("select {columns} from {table} where id = {id} for update"))?;
    Ok(rows.into_iter().next().map(|row| row.into_iter().map(Option::unwrap_or_default).collect()))
}

fn customer(writer: &mut Writer, client: &mut Client, done: &mut Memory) -> Result<(), Failure> {
    let (table, id) = (writer.table("customer"), writer.random.random_range(1..=writer.keys));
    let old = seen(client, &table, "name, phone", id)?;
    let (name, phone) = (writer.next("n"), writer.next("p"));
    let email = writer.random.random_range(0..UNIQUE_VALUES);
    let choice = writer.random.random_range(0..10);
    let (sql, wrote, replaced) = match (&old, choice) {
        (None, _) => {
            (format!("insert into {table} values ({id}, 'e{email}', '{name}', '{phone}')"), vec![name, phone], 0..0)
        }
        (_, 0..3) => (format!("delete from {table} where id = {id}"), vec![], 0..2),
        (_, 3..5) => (format!("update {table} set email = 'e{email}' where id = {id}"), vec![], 0..0),
        (_, 5..7) => (format!("update {table} set name = '{name}' where id = {id}"), vec![name], 0..1),
        _ => (format!("update {table} set phone = '{phone}', email = 'e{email}' where id = {id}"), vec![phone], 1..2),
    };
    writer.say(client, done, id, &sql, &format!("{old:?}"))?;
    done.seen.extend(old.into_iter().flat_map(|old| old[replaced.clone()].to_vec()));
    done.committed.extend(wrote);
    Ok(())
}

fn purchase(writer: &mut Writer, client: &mut Client, done: &mut Memory) -> Result<(), Failure> {
    let (table, id) = (writer.table("purchase"), writer.random.random_range(1..=writer.keys));
    let old = seen(client, &table, "note", id)?;
    let note = writer.next("o");
    let customer = writer.random.random_range(1..=writer.keys);
    let code = writer.random.random_range(0..UNIQUE_VALUES);
    let day = writer.random.random_range(0..300);
    let choice = writer.random.random_range(0..10);
    let (sql, wrote, replaced) = match (&old, choice) {
        (None, _) => (
            format!("insert into {table} values ({id}, {customer}, 'c{code}', '[{day},{})', '{note}')", day + 3),
            vec![note],
            0..0,
        ),
        (_, 0..3) => (format!("delete from {table} where id = {id}"), vec![], 0..1),
        (_, 3..5) => (format!("update {table} set customer = {customer} where id = {id}"), vec![], 0..0),
        (_, 5..7) => (format!("update {table} set code = 'c{code}' where id = {id}"), vec![], 0..0),
        _ => (format!("update {table} set note = '{note}' where id = {id}"), vec![note], 0..1),
    };
    writer.say(client, done, id, &sql, &format!("{old:?}"))?;
    done.seen.extend(old.into_iter().flat_map(|old| old[replaced.clone()].to_vec()));
    done.committed.extend(wrote);
    Ok(())
}

fn stock(writer: &mut Writer, client: &mut Client, done: &mut Memory) -> Result<(), Failure> {
    let (table, id) = (writer.table("stock"), writer.random.random_range(1..=writer.keys));
    let old = seen(client, &table, "tag", id)?;
    let (low, high) = (writer.random.random_range(0..1u64 << 50), writer.random.random_range(0..1u64 << 50));
    let tag = writer.next("t");
    let choice = writer.random.random_range(0..10);
    let (sql, wrote, replaced) = match (&old, choice) {
        (None, _) => {
            let (low, high) = (low.min(high), low.max(high));
            let sql = format!("insert into {table} values ({id}, {low}, {high}, '{tag}')");
            (sql, vec![tag], 0..0)
        }
        // No deletes here: an update that revives a row and breaks its CHECK still stops the stream.
        (_, 0..5) => (format!("update {table} set low = {low} where id = {id}"), vec![], 0..0),
        (_, 5..9) => (format!("update {table} set high = {high} where id = {id}"), vec![], 0..0),
        _ => (format!("update {table} set tag = '{tag}' where id = {id}"), vec![tag], 0..1),
    };
    writer.say(client, done, id, &sql, &format!("{old:?}"))?;
    done.seen.extend(old.into_iter().flat_map(|old| old[replaced.clone()].to_vec()));
    done.committed.extend(wrote);
    Ok(())
}
