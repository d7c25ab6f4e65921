//! An installation of Postgres: where its programs are, which version it is, and as whom they run.
//!
//! `TANDEM_PG_CONFIG_A` and `TANDEM_PG_CONFIG_B` choose the installations of the two nodes; without
//! them the first private copy under `target/pg` serves both (`scripts/build 15` makes one).

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::{User, geteuid};

/// One Postgres that servers can be started from.
#[derive(Clone, Debug)]
pub struct Installation {
    /// Its programs: postgres, initdb, pgbench, …
    pub bindir: PathBuf,
    /// 15, 16, …
    pub major: u32,
    /// "PostgreSQL 15.20 (…)"
    pub version: String,
}

impl Installation {
    /// The installation that a pg_config belongs to.
    pub fn of(pg_config: &Path) -> Installation {
        let ask = |option: &str| {
            let output = Command::new(pg_config)
                .arg(option)
                .output()
                .unwrap_or_else(|e| panic!("can't run {}: {e}", pg_config.display()));
            String::from_utf8_lossy(&output.stdout).trim().to_string()
        };
        let version = ask("--version");
        let major = version
            .trim_start_matches("PostgreSQL ")
            .chars()
            .take_while(char::is_ascii_digit)
            .collect::<String>()
            .parse()
            .unwrap_or_else(|_| panic!("{}: what version is {version:?}?", pg_config.display()));
        Installation { bindir: PathBuf::from(ask("--bindir")), major, version }
    }

    /// The installation of node A.
    pub fn a() -> Installation {
        chosen("TANDEM_PG_CONFIG_A")
    }

    /// The installation of node B.
    pub fn b() -> Installation {
        chosen("TANDEM_PG_CONFIG_B")
    }

    /// All private copies, in the order of versions.
    pub fn all() -> Vec<Installation> {
        [15, 16, 17, 18]
            .iter()
            .map(|major| private_copies().join(format!("{major}/bin/pg_config")))
            .filter(|pg_config| pg_config.exists())
            .map(|pg_config| Installation::of(&pg_config))
            .collect()
    }

    /// Runs one of its programs to its end, as the account that runs servers; panics if it fails.
    pub fn run(&self, program: &str, args: &[&str]) -> String {
        let mut command = self.command(program);
        command.args(args);
        let output = command.output().unwrap_or_else(|e| panic!("can't run {program}: {e}"));
        assert!(
            output.status.success(),
            "{program} {args:?} failed ({}):\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// One of its programs, to be run as the account that runs servers, in a neutral environment.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bindir.join(program));
        as_server(&mut command);
        command
    }
}

/// Postgres refuses to run as root: drop to `postgres` then. Its settings come from us alone.
pub fn as_server(command: &mut Command) {
    if let Some(user) = server_account() {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        command.env("HOME", &user.dir).env("USER", &user.name);
    }
    command.current_dir("/").env("LC_ALL", "C.UTF-8").env("TZ", "UTC").env_remove("RUST_BACKTRACE");
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PG")) {
        command.env_remove(name);
    }
}

/// The account to drop to, if we are root.
pub fn server_account() -> Option<User> {
    geteuid().is_root().then(|| User::from_name("postgres").ok().flatten().expect("root needs an account `postgres`"))
}

fn chosen(variable: &str) -> Installation {
    match std::env::var_os(variable) {
        Some(pg_config) => Installation::of(Path::new(&pg_config)),
        None => Installation::all()
            .into_iter()
            .next()
            .unwrap_or_else(|| panic!("set {variable}, or run scripts/build 15 to have a copy under target/pg")),
    }
}

fn private_copies() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    target.join("pg")
}
