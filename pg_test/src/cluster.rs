//! A throw-away cluster: made from a template, started, stopped, killed and started again on the
//! same port. When it is dropped the server stops and its directory goes; when that happens in a
//! panic, the end of its log is printed.

use std::fs::{self, OpenOptions};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::client::Client;
use crate::postgres::{Installation, as_server, server_account};
use crate::process;
use crate::wait::until;

/// How to stop a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Sessions are ended, everything is written: `pg_ctl stop -m fast`.
    Fast,
    /// As in a crash, but all processes are told: `pg_ctl stop -m immediate`.
    Immediate,
}

/// One cluster and its server.
pub struct Cluster {
    pub installation: Installation,
    name: String,
    dir: PathBuf,
    port: u16,
    detached: bool,
    server: Mutex<Option<Child>>,
}

impl Cluster {
    /// Makes a cluster; `settings` are lines of postgresql.conf. It isn't started yet.
    pub fn new(installation: &Installation, name: &str, settings: &[&str]) -> Cluster {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = PathBuf::from(format!("/tmp/tandem-{}-{number}", std::process::id()));
        let template = template(installation);
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap_or_else(|e| panic!("can't make {}: {e}", dir.display()));
        give_to_server(&dir);
        process::remove_at_exit(&dir);
        copy(&template, &dir.join("data"));

        let cluster = Cluster {
            installation: installation.clone(),
            name: name.to_string(),
            port: free_port(),
            dir,
            detached: false,
            server: Mutex::new(None),
        };
        cluster.configure(&[
            "shared_preload_libraries = 'tandem'",
            "listen_addresses = '127.0.0.1'",
            &format!("port = {}", cluster.port),
            &format!("unix_socket_directories = '{}'", cluster.dir.display()),
            "log_line_prefix = '%m %p %a: '",
            "log_lock_waits = on",
            "lc_messages = 'C'",
            "timezone = 'UTC'",
            "shared_buffers = '64MB'",
            "max_connections = 60",
            "max_worker_processes = 16",
            "max_prepared_transactions = 4",
        ]);
        cluster.configure(settings);
        cluster
    }

    /// Leaves the server running when this process ends.
    pub fn detach(&mut self) {
        self.detached = true;
        process::forget(&self.dir);
    }

    /// Appends to postgresql.conf; later lines win. In force at the next start or reload.
    pub fn configure(&self, settings: &[&str]) {
        use std::io::Write;
        let path = self.data().join("postgresql.conf");
        let mut file = OpenOptions::new().append(true).open(path).expect("postgresql.conf is there");
        for line in settings {
            writeln!(file, "{line}").expect("postgresql.conf can be written");
        }
    }

    /// Starts the server and waits until it accepts connections.
    #[track_caller]
    pub fn start(&self) {
        self.start_only();
        self.wait_ready();
    }

    /// Starts the server without waiting for it.
    pub fn start_only(&self) {
        let mut server = self.lock();
        assert!(server.is_none(), "{} is already running", self.name);
        let log = OpenOptions::new().create(true).append(true).open(self.log_path());
        let log = log.expect("the log can be written");
        let mut command = self.installation.command("postgres");
        command.arg("-D").arg(self.data());
        command.stdin(std::process::Stdio::null());
        command.stdout(log.try_clone().expect("a second handle of the log")).stderr(log);
        let child = if self.detached {
            use std::os::unix::process::CommandExt;
            command.process_group(0).spawn()
        } else {
            process::spawn_bound(command)
        };
        *server = Some(child.unwrap_or_else(|e| panic!("can't start {}: {e}", self.name)));
    }

    /// Waits until the server accepts connections.
    #[track_caller]
    pub fn wait_ready(&self) {
        until(&format!("server {} to accept connections", self.name), || {
            if let Some(child) = self.lock().as_mut()
                && let Ok(Some(status)) = child.try_wait()
            {
                panic!("server {} ended with {status}:\n{}", self.name, self.log_tail(40));
            }
            Client::connect(&self.conninfo("postgres")).map(drop)
        });
    }

    /// Stops the server, and returns when all its processes are gone.
    #[track_caller]
    pub fn stop(&self, how: Stop) {
        self.end(match how {
            Stop::Fast => Signal::SIGINT,
            Stop::Immediate => Signal::SIGQUIT,
        });
    }

    /// kill -9 of the postmaster; returns when its processes are gone, so that it can start again.
    #[track_caller]
    pub fn kill(&self) {
        self.end(Signal::SIGKILL);
    }

    /// Stops and starts.
    #[track_caller]
    pub fn restart(&self, how: Stop) {
        self.stop(how);
        self.start();
    }

    /// kill -9 of one process of the server: a crash, after which the postmaster restarts by itself.
    /// Returns when it accepts connections again.
    #[track_caller]
    pub fn kill_process(&self, pid: i32) {
        process::signal(pid, Signal::SIGKILL);
        process::wait_gone(&[pid]);
        self.wait_ready();
    }

    fn end(&self, how: Signal) {
        let Some(mut child) = self.lock().take() else {
            return;
        };
        let pid = child.id() as i32;
        let mut all = process::children(pid);
        process::signal(pid, how);
        until(&format!("server {} to stop on {how}", self.name), || match child.try_wait() {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(format!("still running; its log:\n{}", self.log_tail(15))),
            Err(error) => Err(error.to_string()),
        });
        // Reaped, so the pid may be reused: only the children count now.
        all.retain(|&child| child != pid);
        process::wait_gone(&all);
    }

    /// The process id of the postmaster.
    pub fn pid(&self) -> Option<i32> {
        self.lock().as_ref().map(|child| child.id() as i32)
    }

    /// Is the server meant to be running?
    pub fn is_started(&self) -> bool {
        self.lock().is_some()
    }

    /// How to connect, as the superuser.
    pub fn conninfo(&self, database: &str) -> String {
        format!("host=127.0.0.1 port={} user=postgres dbname={database}", self.port)
    }

    /// A session, as the superuser.
    #[track_caller]
    pub fn connect(&self, database: &str) -> Client {
        let client = Client::connect(&self.conninfo(database));
        client.unwrap_or_else(|failure| panic!("can't connect to {}: {failure}\n{}", self.name, self.log_tail(20)))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Everything of this cluster: data, log, socket.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The server's log.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// The last lines of the server's log.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = self.log();
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join("log")
    }

    fn lock(&self) -> MutexGuard<'_, Option<Child>> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of server {} ---\n{}\n---", self.name, self.log_tail(60));
        }
        if self.detached {
            return;
        }
        if let Some(mut child) = self.lock().take() {
            let mut all = process::children(child.id() as i32);
            process::signal(child.id() as i32, Signal::SIGQUIT);
            let _ = child.wait();
            all.retain(|&pid| process::is_running(pid));
            for pid in all {
                process::signal(pid, Signal::SIGKILL);
            }
        }
        if std::env::var_os("TANDEM_KEEP_DATA").is_none() {
            let _ = fs::remove_dir_all(&self.dir);
        }
        process::forget(&self.dir);
    }
}

/// The initialized, never started cluster that all others of this installation are copied from.
fn template(installation: &Installation) -> PathBuf {
    // One thread of this process at a time; other processes have their own `fresh`.
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let home = installation.bindir.ancestors().find(|dir| dir.join("origin").is_file());
    let home = home.unwrap_or(Path::new("/tmp")).join("templates");
    let template = home.join(format!("pg{}", installation.major));
    if !template.join("PG_VERSION").is_file() {
        fs::create_dir_all(&home).expect("the folder of templates can be made");
        give_to_server(&home);
        let fresh = home.join(format!("new-{}", std::process::id()));
        let _ = fs::remove_dir_all(&fresh);
        let path = fresh.to_str().expect("the path is UTF-8");
        installation
            .run("initdb", &["-D", path, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N"]);
        // Whoever renames first wins; the other one's is as good.
        if fs::rename(&fresh, &template).is_err() {
            let _ = fs::remove_dir_all(&fresh);
        }
    }
    template
}

fn copy(from: &Path, to: &Path) {
    let mut command = Command::new("cp");
    command.arg("-a").arg("--reflink=auto").arg(from).arg(to);
    as_server(&mut command);
    assert!(command.status().expect("cp runs").success(), "can't copy {}", from.display());
}

fn give_to_server(dir: &Path) {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).expect("our own directory");
    if let Some(user) = server_account() {
        chown(dir, Some(user.uid.as_raw()), Some(user.gid.as_raw())).expect("root may chown");
    }
}

/// A port that is free and stays so while a server is down: below the range that the system gives to
/// outgoing connections.
fn free_port() -> u16 {
    const FIRST: u16 = 20_000;
    const COUNT: u32 = 12_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let start = std::process::id().wrapping_mul(97);
    for _ in 0..COUNT {
        let offset = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let port = FIRST + offset as u16;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("no free port");
}

/// A free port for something else than a server.
pub fn any_free_port() -> u16 {
    free_port()
}
