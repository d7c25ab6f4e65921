//! Two nodes that are kept in sync, each reaching the other through a proxy.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::client::{Client, Failure};
use crate::cluster::{Cluster, Stop};
use crate::conflict::{self, Expected, Record};
use crate::postgres::Installation;
use crate::proxy::{Line, Proxy};
use crate::wait::{until, until_true};

/// The database that is kept in sync.
pub const DATABASE: &str = "app";

/// Shorter than the defaults, so that tests don't wait for the pace of an idle pair.
const PACE: [&str; 3] =
    ["tandem.poll_interval = '1s'", "tandem.peer_timeout = '3s'", "tandem.max_reconnect_delay = '500ms'"];

/// One of the two servers, its database, and the line that the other one reaches it by.
pub struct Node {
    pub cluster: Cluster,
    /// In front of this server: cutting it keeps the *other* node from reading here.
    pub line: Proxy,
    pub name: &'static str,
    pub id: u32,
    client: Mutex<Option<Client>>,
}

/// The pair. Dropping it stops both servers.
pub struct Pair {
    pub a: Node,
    pub b: Node,
}

/// What a pair is to be like.
pub struct Builder {
    installations: [Installation; 2],
    settings: [Vec<String>; 2],
    connected: bool,
}

impl Pair {
    /// A pair of the chosen versions, connected and streaming.
    #[track_caller]
    #[expect(clippy::new_without_default, reason = "starting two servers is no default")]
    pub fn new() -> Pair {
        Pair::builder().start()
    }

    /// A pair to be described first.
    pub fn builder() -> Builder {
        Builder {
            installations: [Installation::a(), Installation::b()],
            settings: [Vec::new(), Vec::new()],
            connected: true,
        }
    }

    /// Both nodes, A first.
    pub fn nodes(&self) -> [&Node; 2] {
        [&self.a, &self.b]
    }

    /// Runs the same statements on both.
    #[track_caller]
    pub fn exec(&self, sql: &str) {
        self.a.exec(sql);
        self.b.exec(sql);
    }

    /// Makes each node the other's peer, and waits until both stream.
    #[track_caller]
    pub fn connect(&self) {
        for (node, peer) in [(&self.a, &self.b), (&self.b, &self.a)] {
            node.exec(&format!("select tandem.add_peer('{}', '{}')", peer.name, peer.conninfo_for_peer()));
        }
        self.wait_streaming();
    }

    /// Waits until both exchanges are in the state `streaming`.
    #[track_caller]
    pub fn wait_streaming(&self) {
        for node in self.nodes() {
            node.wait_state("streaming");
        }
    }

    /// Creates a table on both nodes, adds it on both, and waits until it is active.
    #[track_caller]
    pub fn table(&self, name: &str, columns: &str) {
        self.table_with(name, columns, "");
    }

    /// [`table`](Self::table) with further arguments of `add_table`: `", granularity => 'row'"`.
    #[track_caller]
    pub fn table_with(&self, name: &str, columns: &str, options: &str) {
        self.exec(&format!("create table {name} ({columns})"));
        self.add_table(name, options);
    }

    /// Adds a table that exists on both nodes, and waits until it is active.
    #[track_caller]
    pub fn add_table(&self, name: &str, options: &str) {
        self.exec(&format!("select tandem.add_table('{name}'{options})"));
        self.wait_active(name);
    }

    /// Waits until a table is active on both nodes.
    #[track_caller]
    pub fn wait_active(&self, name: &str) {
        for node in self.nodes() {
            node.wait_table(name, "active");
        }
    }

    /// Waits until everything committed so far on either node is visible on the other.
    #[track_caller]
    pub fn sync(&self) {
        // Twice: what is applied may lead to writes that go back.
        for node in [&self.a, &self.b, &self.a, &self.b] {
            match node.try_one("select tandem.wait_for_peer('60s')") {
                Ok(answer) if answer == "t" => {}
                answer => panic!("{}: waiting for the peer: {answer:?}\n{}", node.name, self.report()),
            }
        }
    }

    /// Nothing passes between the nodes until [`heal`](Self::heal); both go on writing.
    pub fn partition(&self) {
        self.set_lines(Line::Stalled);
    }

    pub fn set_lines(&self, line: Line) {
        self.a.line.set(line);
        self.b.line.set(line);
    }

    /// The lines are whole again; doesn't wait for anything.
    pub fn heal_lines(&self) {
        self.a.line.heal();
        self.b.line.heal();
    }

    /// The lines are whole again; returns when everything has been exchanged.
    #[track_caller]
    pub fn heal(&self) {
        self.heal_lines();
        self.wait_streaming();
        self.sync();
    }

    /// The table holds the same rows, with the same versions, on both nodes.
    #[track_caller]
    pub fn assert_converged(&self, table: &str) {
        let columns = self.a.one(&format!(
            "select string_agg(quote_ident(attname) || '::text', ', ' order by attnum) from pg_attribute
             where attrelid = '{table}'::regclass and attnum > 0 and not attisdropped and attname <> '_cells'"
        ));
        let key = self.a.one(&format!(
            "select coalesce(string_agg(quote_ident(attname), ', ' order by attnum), '1') from pg_index
             join pg_attribute on attrelid = indrelid and attnum = any(indkey)
             where indrelid = '{table}'::regclass and indisprimary"
        ));
        let query = format!("select {columns} from {table} order by {key}");
        let (on_a, on_b) = (self.a.rows(&query), self.b.rows(&query));
        if on_a != on_b {
            panic!("{table} differs ({columns}):\n{}\n{}", difference(&on_a, &on_b), self.report());
        }
    }

    /// The table holds exactly these rows (columns joined by `|`) on both nodes, and has converged.
    #[track_caller]
    pub fn assert_rows(&self, query: &str, expected: &[&str]) {
        for node in self.nodes() {
            assert_eq!(node.rows(query), expected, "on {}: {query}", node.name);
        }
    }

    /// The history of a table is the same on both nodes, mirrored, and is exactly this.
    #[track_caller]
    pub fn assert_conflicts(&self, table: &str, expected: &[Expected]) {
        let (on_a, on_b) = (self.a.conflicts(table), self.b.conflicts(table));
        if let Err(faults) = conflict::check(&on_a, &on_b, expected) {
            panic!("the conflicts of {table} are not as expected:\n{faults}");
        }
    }

    /// Nothing goes on any more: neither node writes anything once everything is exchanged.
    #[track_caller]
    pub fn assert_quiet(&self) {
        self.sync();
        let positions = || self.nodes().map(|node| node.one("select pg_current_wal_insert_lsn()"));
        until("both nodes to come to rest", || {
            let before = positions();
            // The time over which rest is observed, not a wait for something to happen.
            std::thread::sleep(std::time::Duration::from_secs(1));
            let after = positions();
            if before == after { Ok(()) } else { Err(format!("{before:?} became {after:?}")) }
        });
    }

    /// The history of a table as A has it, after checking that B's mirrors it.
    #[track_caller]
    pub fn history(&self, table: &str) -> Vec<Record> {
        let (on_a, on_b) = (self.a.conflicts(table), self.b.conflicts(table));
        if let Err(faults) = conflict::check_same(&on_a, &on_b) {
            panic!("the histories of {table} differ:\n{faults}");
        }
        on_a
    }

    /// What both nodes say of themselves, for a panic.
    pub fn report(&self) -> String {
        self.nodes().map(Node::report).join("\n")
    }
}

impl Builder {
    /// Other installations than the chosen ones.
    pub fn versions(mut self, a: Installation, b: Installation) -> Builder {
        self.installations = [a, b];
        self
    }

    /// Lines of postgresql.conf for both.
    pub fn settings(mut self, lines: &[&str]) -> Builder {
        for settings in &mut self.settings {
            settings.extend(lines.iter().map(ToString::to_string));
        }
        self
    }

    /// Two nodes that don't know of each other yet.
    pub fn unconnected(mut self) -> Builder {
        self.connected = false;
        self
    }

    /// Starts both servers.
    #[track_caller]
    pub fn start(self) -> Pair {
        let [a, b] = &self.installations;
        let pair = Pair { a: Node::start(a, "a", 1, &self.settings[0]), b: Node::start(b, "b", 2, &self.settings[1]) };
        if self.connected {
            pair.connect();
        }
        pair
    }
}

impl Node {
    fn start(installation: &Installation, name: &'static str, id: u32, settings: &[String]) -> Node {
        let settings: Vec<&str> = PACE.into_iter().chain(settings.iter().map(String::as_str)).collect();
        let cluster = Cluster::new(installation, name, &settings);
        cluster.start();
        cluster.connect("postgres").exec(&format!("create database {DATABASE}"));
        let line = Proxy::start(0, cluster.port());
        let node = Node { cluster, line, name, id, client: Mutex::new(None) };
        node.exec("create extension tandem");
        node.exec(&format!("select tandem.create_node('{name}', {id})"));
        node
    }

    /// A new session.
    #[track_caller]
    pub fn session(&self) -> Client {
        self.cluster.connect(DATABASE)
    }

    /// How the peer reaches this node: through the line.
    pub fn conninfo_for_peer(&self) -> String {
        format!(
            "host=127.0.0.1 port={} user=postgres dbname={DATABASE} sslmode=disable gssencmode=disable",
            self.line.port()
        )
    }

    /// Runs statements in the node's own session.
    #[track_caller]
    pub fn exec(&self, sql: &str) {
        self.with(|client| client.exec(sql));
    }

    pub fn try_exec(&self, sql: &str) -> Result<(), Failure> {
        self.with(|client| client.try_exec(sql))
    }

    /// The statement must fail; returns how.
    #[track_caller]
    pub fn fails(&self, sql: &str) -> Failure {
        self.with(|client| client.fails(sql))
    }

    #[track_caller]
    pub fn rows(&self, sql: &str) -> Vec<String> {
        self.with(|client| client.rows(sql))
    }

    #[track_caller]
    pub fn one(&self, sql: &str) -> String {
        self.with(|client| client.one(sql))
    }

    #[track_caller]
    pub fn number(&self, sql: &str) -> i64 {
        self.with(|client| client.query_one(sql))
    }

    #[track_caller]
    pub fn is_true(&self, sql: &str) -> bool {
        self.one(sql) == "t"
    }

    fn try_one(&self, sql: &str) -> Result<String, Failure> {
        Ok(self.with(|client| client.try_rows(sql))?.join("\n"))
    }

    /// The history of a table on this node.
    pub fn conflicts(&self, table: &str) -> Vec<Record> {
        self.with(|client| conflict::records(client, table))
    }

    /// Waits until the exchange with the peer is in this state.
    #[track_caller]
    pub fn wait_state(&self, state: &str) {
        until(&format!("the exchange of {} to be {state}", self.name), || {
            match self.try_one("select state from tandem.status") {
                Ok(seen) if seen == state => Ok(()),
                Ok(_) => Err(self.report()),
                Err(failure) => Err(failure.to_string()),
            }
        });
    }

    /// Waits until a synced table is in this state.
    #[track_caller]
    pub fn wait_table(&self, table: &str, state: &str) {
        let query = format!("select state, reason from tandem.tables where relation::text = '{table}'::regclass::text");
        until(&format!("table {table} of {} to be {state}", self.name), || match self.try_one(&query) {
            Ok(seen) if seen.split('|').next() == Some(state) => Ok(()),
            Ok(seen) => Err(format!("{seen}\n{}", self.report())),
            Err(failure) => Err(failure.to_string()),
        });
    }

    /// Waits until a query answers this.
    #[track_caller]
    pub fn wait_rows(&self, query: &str, expected: &[&str]) {
        until(&format!("{} to answer {expected:?} to: {query}", self.name), || {
            let seen = self.with(|client| client.try_rows(query)).map_err(|f| f.to_string())?;
            if seen == expected { Ok(()) } else { Err(format!("{seen:?}\n{}", self.report())) }
        });
    }

    /// Waits until some session waits for a lock (or, for an exchange worker, for anything) with `pid`.
    #[track_caller]
    pub fn wait_blocked(&self, pid: i32) {
        let query = format!("select 1 from pg_stat_activity where pid = {pid} and wait_event_type = 'Lock'");
        until_true(&format!("session {pid} of {} to wait for a lock", self.name), || !self.rows(&query).is_empty());
    }

    /// The exchange worker of this node.
    #[track_caller]
    pub fn worker_pid(&self) -> i32 {
        self.pid_of("backend_type = 'tandem exchange'")
    }

    /// The backend of this node that serves the peer's worker.
    #[track_caller]
    pub fn serving_pid(&self) -> i32 {
        self.pid_of("backend_type = 'client backend' and application_name = 'tandem'")
    }

    #[track_caller]
    fn pid_of(&self, condition: &str) -> i32 {
        let query = format!(
            "select pid from pg_stat_activity where datname = '{DATABASE}' and {condition} order by backend_start desc limit 1"
        );
        until(&format!("a process with {condition}"), || {
            let rows = self.with(|client| client.try_rows(&query)).map_err(|f| f.to_string())?;
            rows.first().and_then(|pid| pid.parse().ok()).ok_or_else(|| "none".to_string())
        })
    }

    /// Stops the server and starts it again.
    #[track_caller]
    pub fn restart(&self, how: Stop) {
        self.hang_up();
        self.cluster.restart(how);
    }

    /// kill -9 of the postmaster, and a new start.
    #[track_caller]
    pub fn kill_and_restart(&self) {
        self.hang_up();
        self.cluster.kill();
        self.cluster.start();
    }

    /// kill -9 of one process; the server restarts by itself.
    #[track_caller]
    pub fn kill_process(&self, pid: i32) {
        self.hang_up();
        self.cluster.kill_process(pid);
    }

    /// Ends the node's own session; the next use begins a new one.
    pub fn hang_up(&self) {
        *self.lock() = None;
    }

    /// Status, tables and the end of the log, for a panic.
    pub fn report(&self) -> String {
        let mut report = format!("--- node {} ({})\n", self.name, self.cluster.installation.version);
        let connection = Client::connect(&self.cluster.conninfo(DATABASE));
        if let Ok(mut client) = connection {
            for view in ["tandem.status", "tandem.tables"] {
                let rows = client.try_rows(&format!("select row_to_json(v) from {view} v"));
                let rows = rows.map_or_else(|failure| failure.to_string(), |rows| rows.join("\n"));
                report.push_str(&format!("{view}:\n{rows}\n"));
            }
        }
        report + "log:\n" + &self.cluster.log_tail(25)
    }

    #[track_caller]
    fn with<T>(&self, work: impl FnOnce(&mut Client) -> T) -> T {
        let mut client = self.lock();
        work(client.get_or_insert_with(|| self.session()))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Client>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The rows that only one side has.
fn difference(on_a: &[String], on_b: &[String]) -> String {
    const SHOWN: usize = 20;
    let only = |these: &[String], those: &[String], name: &str| {
        let those: std::collections::HashSet<&String> = those.iter().collect();
        let only: Vec<&String> = these.iter().filter(|row| !those.contains(row)).collect();
        let mut text = format!("{} rows on {name}, {} of them only there:", these.len(), only.len());
        for row in only.iter().take(SHOWN) {
            text.push_str(&format!("\n  {row}"));
        }
        text
    };
    only(on_a, on_b, "A") + "\n" + &only(on_b, on_a, "B")
}
