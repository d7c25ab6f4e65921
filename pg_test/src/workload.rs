//! Random writers, with a seed, that remember what they did: every value they write is unique, and
//! each write notes which value it replaced. So it can be said afterwards whether a committed value
//! got lost: it must be in the table, or have been seen by whoever replaced it, or be in the
//! conflict history.
//!
//! What a transaction does is a [`Plan`]: rows of one plain table here, tables full of constraints in
//! [`crate::mixed`].

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::client::{Client, Failure};
use crate::node::{DATABASE, Node};
use crate::pair::Pair;
use crate::wait::{until, until_true};

/// Columns that the writers expect; keys are 1 to the workload's `keys`.
pub const COLUMNS: &str = "id int primary key, a text, b text";

/// Each writer's pause between transactions.
const THINKING: Duration = Duration::from_millis(5);

/// The seed of this run: `TANDEM_SEED`, or a new one; printed, so that a failure can be repeated.
pub fn seed() -> u64 {
    let given = std::env::var("TANDEM_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| rand::rng().random());
    eprintln!("TANDEM_SEED={seed}");
    seed
}

/// What a writer did.
#[derive(Default)]
pub struct Memory {
    /// Values whose commit was confirmed.
    pub committed: Vec<String>,
    /// Values that a later write, here or there, had seen when it replaced them.
    pub seen: HashSet<String>,
    /// Errors other than a lost connection or a lost race.
    errors: Vec<String>,
    /// (key, what was done), for the report on a lost value.
    pub story: Vec<(u32, String)>,
}

/// One table of a plan, its key being `id`: values of these columns are written once and never again.
#[derive(Clone, Copy)]
pub struct Watched {
    pub table: &'static str,
    pub columns: &'static [&'static str],
}

/// What the writers write.
#[derive(Clone)]
pub struct Plan {
    /// Names of tables begin with this.
    pub prefix: String,
    pub tables: &'static [Watched],
    /// One change within an open transaction.
    pub change: fn(&mut Writer, &mut Client, &mut Memory) -> Result<(), Failure>,
    /// SQLSTATEs of lost races that are part of the game.
    pub lost_races: &'static [&'static str],
}

const PLAIN: &[Watched] = &[Watched { table: "", columns: &["a", "b"] }];

/// Writers at work on both nodes.
pub struct Workload {
    plan: Plan,
    stop: Arc<AtomicBool>,
    commits: Arc<AtomicU64>,
    writers: Vec<JoinHandle<Memory>>,
}

impl Workload {
    /// Starts `writers` writers on each node, on a table with [`COLUMNS`].
    pub fn start(pair: &Pair, table: &str, writers: u32, keys: u32, seed: u64) -> Workload {
        let plan = Plan {
            prefix: table.to_string(),
            tables: PLAIN,
            change: Writer::change,
            lost_races: &["23505", "40001", "40P01"],
        };
        Workload::by_plan(pair, plan, writers, keys, seed)
    }

    /// The same by another plan.
    pub fn by_plan(pair: &Pair, plan: Plan, writers: u32, keys: u32, seed: u64) -> Workload {
        let mut workload =
            Workload { plan: plan.clone(), stop: Arc::default(), commits: Arc::default(), writers: Vec::new() };
        for node in pair.nodes() {
            for number in 0..writers {
                let writer = Writer::new(node, &plan, number, keys, seed);
                let (stop, commits) = (Arc::clone(&workload.stop), Arc::clone(&workload.commits));
                workload.writers.push(thread::spawn(move || writer.run(&stop, &commits)));
            }
        }
        workload
    }

    /// Transactions committed so far.
    pub fn commits(&self) -> u64 {
        self.commits.load(Ordering::Relaxed)
    }

    /// Waits until this many more transactions are committed.
    #[track_caller]
    pub fn wait_commits(&self, more: u64) {
        let goal = self.commits() + more;
        until_true(&format!("{more} more transactions"), || self.commits() >= goal);
    }

    /// Ends the writers, waits for both streams, and checks that the nodes agree and nothing is lost.
    #[track_caller]
    pub fn finish(self, pair: &Pair) {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Memory::default();
        for writer in self.writers {
            let memory = writer.join().expect("a writer doesn't panic");
            all.committed.extend(memory.committed);
            all.seen.extend(memory.seen);
            all.errors.extend(memory.errors);
            all.story.extend(memory.story);
        }
        assert!(all.errors.is_empty(), "writers failed: {:#?}", all.errors);
        pair.wait_streaming();
        pair.sync();
        let tables = self.plan.tables.iter();
        let tables: Vec<(String, &[&str])> =
            tables.map(|t| (format!("{}{}", self.plan.prefix, t.table), t.columns)).collect();
        // What a constraint keeps out is asked again just after the commits.
        for (table, _) in &tables {
            until(&format!("{table} to converge"), || {
                let displaced = |node: &Node| {
                    let query = "select relid::regclass, key, hlc, waits_for, constraint_name from tandem.displaced order by 1, 2";
                    format!("displaced on {}:\n{}\n", node.name, node.rows(query).join("\n"))
                };
                pair.compare(table).map_err(|why| format!("{why}\n{}{}", displaced(&pair.a), displaced(&pair.b)))
            });
        }
        pair.assert_quiet();
        let mut kept = HashSet::new();
        for (table, columns) in &tables {
            pair.assert_converged(table);
            pair.history(table);
            kept.extend(values_of(pair, table, columns));
        }
        let lost: BTreeSet<&String> =
            all.committed.iter().filter(|value| !all.seen.contains(*value) && !kept.contains(*value)).collect();
        if let Some(first) = lost.first() {
            panic!(
                "{} of {} committed values are lost without a record: {lost:?}\n{}",
                lost.len(),
                all.committed.len(),
                tables.iter().map(|(table, _)| story(pair, table, &all.story, first)).collect::<String>()
            );
        }
    }
}

/// What was done to the row of a value, around the time of that value, and what is on record of it.
fn story(pair: &Pair, table: &str, story: &[(u32, String)], value: &str) -> String {
    const AROUND: usize = 6;
    let quoted = format!("'{value}'");
    let Some((key, event)) = story.iter().find(|(_, event)| event.contains(&quoted)) else {
        return format!("nobody wrote {value}");
    };
    let mut events: Vec<&String> = story.iter().filter(|(other, _)| other == key).map(|(_, event)| event).collect();
    events.sort();
    let at = events.iter().position(|other| *other == event).unwrap_or(0);
    let mut text = format!("what was done to row {key} around {value} (times of the statements):\n");
    for event in &events[at.saturating_sub(AROUND)..(at + AROUND).min(events.len())] {
        text.push_str(&format!("  {event}\n"));
    }
    text.push_str("on record, by losing version:\n");
    let mut records = pair.history(table);
    records.retain(|record| record["key_tuple"]["id"] == *key);
    records.sort_by_key(|record| record["losing_version"].to_string());
    for record in records {
        let column = |name: &str| record[name].to_string();
        text.push_str(&format!(
            "  {} {} lost to {}: {} base {} a {} b {}\n",
            column("conflict_type"),
            column("losing_version"),
            column("winning_version"),
            column("cells"),
            column("base_tuple"),
            column("local_tuple"),
            column("remote_tuple")
        ));
    }
    text
}

/// Values in the table or in the images of its conflicts.
fn values_of(pair: &Pair, table: &str, columns: &[&str]) -> HashSet<String> {
    let mut kept = HashSet::new();
    for row in pair.a.rows(&format!("select {} from {table}", columns.join(", "))) {
        kept.extend(row.split('|').map(str::to_string));
    }
    for record in pair.a.conflicts(table) {
        for image in ["base_tuple", "local_tuple", "remote_tuple", "result_tuple"] {
            for column in columns {
                match &record[image][column] {
                    serde_json::Value::String(text) => drop(kept.insert(text.clone())),
                    serde_json::Value::Null => {}
                    other => drop(kept.insert(other.to_string())),
                }
            }
        }
    }
    kept
}

/// One session that writes.
pub struct Writer {
    conninfo: String,
    plan: Plan,
    pub name: String,
    pub keys: u32,
    pub random: StdRng,
    count: u64,
    memory: Memory,
}

impl Writer {
    fn new(node: &Node, plan: &Plan, number: u32, keys: u32, seed: u64) -> Writer {
        let own = seed ^ (u64::from(node.id) << 32) ^ u64::from(number);
        Writer {
            conninfo: node.cluster.conninfo(DATABASE),
            plan: plan.clone(),
            name: format!("{}{number}", node.name),
            keys,
            random: StdRng::seed_from_u64(own),
            count: 0,
            memory: Memory::default(),
        }
    }

    fn run(mut self, stop: &AtomicBool, commits: &AtomicU64) -> Memory {
        let mut client = None;
        while !stop.load(Ordering::Relaxed) {
            let Some(session) = client.as_mut() else {
                client = Client::connect(&self.conninfo).ok();
                continue;
            };
            // Time to think: applying must keep up, or every wait is for a backlog.
            thread::sleep(THINKING);
            match self.transaction(session) {
                Ok(()) => drop(commits.fetch_add(1, Ordering::Relaxed)),
                // Lost races are part of the game; a broken connection means a server in trouble.
                Err(failure) if self.plan.lost_races.contains(&failure.sqlstate.as_str()) => {
                    if session.try_exec("rollback").is_err() {
                        client = None;
                    }
                }
                Err(failure) if failure.sqlstate.is_empty() || failure.sqlstate.starts_with("57P") => {
                    client = None;
                }
                Err(failure) => {
                    self.memory.errors.push(format!("{}: {failure}", self.name));
                    client = None;
                    if self.memory.errors.len() > 5 {
                        break;
                    }
                }
            }
        }
        self.memory
    }

    /// One to three changes of random rows.
    fn transaction(&mut self, client: &mut Client) -> Result<(), Failure> {
        let mut done = Memory::default();
        client.try_exec("begin")?;
        for _ in 0..self.random.random_range(1..=3) {
            (self.plan.change)(self, client, &mut done)?;
        }
        let outcome = client.try_exec("commit");
        match &outcome {
            Ok(()) => self.memory.committed.extend(done.committed),
            Err(failure) if self.plan.lost_races.contains(&failure.sqlstate.as_str()) => return outcome,
            // Nobody knows whether this was committed: what it replaced may have been replaced.
            Err(_) => done.story.iter_mut().for_each(|(_, event)| event.push_str(" (in doubt)")),
        }
        self.memory.seen.extend(done.seen);
        self.memory.story.extend(done.story);
        outcome
    }

    /// Name of a table of the plan.
    pub fn table(&self, name: &str) -> String {
        format!("{}{name}", self.plan.prefix)
    }

    /// A value that is written once.
    pub fn next(&mut self, column: &str) -> String {
        self.count += 1;
        format!("{}.{}{column}", self.name, self.count)
    }

    /// Runs a statement and notes it.
    pub fn say(&self, client: &mut Client, done: &mut Memory, id: u32, sql: &str, was: &str) -> Result<(), Failure> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        client.try_exec(sql)?;
        done.story.push((id, format!("{:.6} {} {sql} -- was {was}", now.as_secs_f64(), self.name)));
        Ok(())
    }

    fn change(&mut self, client: &mut Client, done: &mut Memory) -> Result<(), Failure> {
        let (table, id) = (self.table(""), self.random.random_range(1..=self.keys));
        let old = client.try_cells(&format!("select a, b from {table} where id = {id} for update"))?;
        let (a, b) = (self.next("a"), self.next("b"));
        let old = old.into_iter().next();
        let choice = self.random.random_range(0..10);
        let (sql, wrote, replaced) = match (&old, choice) {
            (None, _) => (format!("insert into {table} values ({id}, '{a}', '{b}')"), vec![a, b], 0..0),
            (_, 0 | 1) => (format!("delete from {table} where id = {id}"), vec![], 0..2),
            (_, 2 | 3) => (format!("update {table} set a = '{a}', b = '{b}' where id = {id}"), vec![a, b], 0..2),
            (_, 4..7) => (format!("update {table} set a = '{a}' where id = {id}"), vec![a], 0..1),
            _ => (format!("update {table} set b = '{b}' where id = {id}"), vec![b], 1..2),
        };
        self.say(client, done, id, &sql, &format!("{old:?}"))?;
        done.seen.extend(old.into_iter().flat_map(|old| old[replaced.clone()].to_vec()).flatten());
        done.committed.extend(wrote);
        Ok(())
    }
}
