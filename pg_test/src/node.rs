//! One node of a pair: its server, its database, and the line that the other one reaches it by.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::client::{Client, Failure};
use crate::cluster::{Cluster, Stop};
use crate::conflict::{self, Record};
use crate::postgres::Installation;
use crate::proxy::Proxy;
use crate::wait::{until, until_true};

/// The database that is kept in sync.
pub const DATABASE: &str = "app";

/// Shorter than the defaults, so that tests don't wait for the pace of an idle pair.
const PACE: [&str; 3] =
    ["tandem.poll_interval = '1s'", "tandem.peer_timeout = '3s'", "tandem.max_reconnect_delay = '500ms'"];

/// A node.
pub struct Node {
    pub cluster: Cluster,
    /// In front of this server: cutting it keeps the *other* node from reading here.
    pub line: Proxy,
    pub name: &'static str,
    pub id: u32,
    client: Mutex<Option<Client>>,
}

impl Node {
    pub(crate) fn start(
        installation: &Installation,
        name: &'static str,
        id: u32,
        settings: &[String],
        kept: bool,
    ) -> Node {
        let settings: Vec<&str> = PACE.into_iter().chain(settings.iter().map(String::as_str)).collect();
        let mut cluster = Cluster::new(installation, name, &settings);
        if kept {
            cluster.detach();
        }
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

    pub fn try_one(&self, sql: &str) -> Result<String, Failure> {
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
