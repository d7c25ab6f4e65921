//! Server processes: starting them so that they never outlive the tests, killing them, and knowing
//! when they are really gone.
//!
//! A postmaster is started from a thread that lives as long as this process, with a parent-death
//! signal: whatever ends the tests (a panic, ^C, kill -9), the servers go down too. What ends
//! normally also removes the data directories.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait::until;

type Job = Box<dyn FnOnce() + Send>;

/// Starts a server that goes down (immediate shutdown) when this process ends.
pub fn spawn_bound(mut command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, queue) = channel::<Job>();
        thread::spawn(move || queue.into_iter().for_each(|job| job()));
        jobs
    });
    // SAFETY: between fork and exec only prctl is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| set_pdeathsig(Signal::SIGQUIT).map_err(io::Error::from));
    }
    let (answer, result) = channel();
    spawner
        .send(Box::new(move || {
            let _ = answer.send(command.spawn());
        }))
        .expect("the spawning thread lives as long as the process");
    result.recv().expect("the spawning thread answers")
}

/// Sends a signal; a process that is already gone is fine.
pub fn signal(pid: i32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid), signal);
}

/// Is it there, and not just a zombie that nobody has reaped?
pub fn is_running(pid: i32) -> bool {
    stat(pid).is_some_and(|(state, _)| state != 'Z')
}

/// The direct children of a process.
pub fn children(pid: i32) -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&child| stat(child).is_some_and(|(_, parent)| parent == pid))
        .collect()
}

/// Waits until none of these processes is left.
pub fn wait_gone(pids: &[i32]) {
    until("processes to be gone", || match pids.iter().find(|&&pid| is_running(pid)) {
        Some(pid) => Err(format!("{pid} is still there")),
        None => Ok(()),
    });
}

/// (state, parent) of a process.
fn stat(pid: i32) -> Option<(char, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may hold anything.
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// Data directories to remove, and the postmasters in them to stop, when this process exits.
static LITTER: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Has the directory (of one cluster) removed at the end of this process.
pub fn remove_at_exit(dir: &Path) {
    static ARMED: OnceLock<()> = OnceLock::new();
    ARMED.get_or_init(|| {
        // SAFETY: the handler is a plain function; it takes locks that no one holds for long.
        unsafe { atexit(clean_up) };
    });
    LITTER.lock().unwrap_or_else(PoisonError::into_inner).push(dir.to_path_buf());
}

/// The directory is gone, or is to stay.
pub fn forget(dir: &Path) {
    LITTER.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| other != dir);
}

unsafe extern "C" {
    fn atexit(handler: extern "C" fn()) -> i32;
}

extern "C" fn clean_up() {
    let dirs = std::mem::take(&mut *LITTER.lock().unwrap_or_else(PoisonError::into_inner));
    for dir in &dirs {
        let pid = fs::read_to_string(dir.join("data/postmaster.pid"))
            .ok()
            .and_then(|text| text.lines().next()?.trim().parse::<i32>().ok());
        if let Some(pid) = pid {
            let mut all = children(pid);
            all.push(pid);
            signal(pid, Signal::SIGQUIT);
            for _ in 0..200 {
                if !all.iter().any(|&pid| is_running(pid)) {
                    break;
                }
                thread::sleep(std::time::Duration::from_millis(25));
            }
        }
        let _ = fs::remove_dir_all(dir);
    }
}
