//! Signals for a server's processes, all of them: the postmaster and its children.

use std::fs;
use std::process::Command;

use pgtandem::servers::Server;

/// Stopped processes; they go on when this is dropped, whatever became of the test.
pub(crate) struct Stopped(Vec<u32>);

impl Drop for Stopped {
    fn drop(&mut self) {
        signal("CONT", &self.0);
    }
}

/// SIGSTOP for a server.
pub(crate) fn stop(server: &Server) -> Stopped {
    let postmaster = server.pid().unwrap();
    // The postmaster first, so that no child is born unseen.
    signal("STOP", &[postmaster]);
    let children = children_of(postmaster);
    signal("STOP", &children);
    Stopped(children.into_iter().chain([postmaster]).collect())
}

/// SIGSTOP for one process.
pub(crate) fn pause(pid: u32) -> Stopped {
    signal("STOP", &[pid]);
    Stopped(vec![pid])
}

/// `kill -9`, without a word to anybody.
pub(crate) fn kill(server: &Server) {
    let postmaster = server.pid().unwrap();
    signal("STOP", &[postmaster]);
    let mut all = children_of(postmaster);
    all.push(postmaster);
    signal("KILL", &all);
}

fn children_of(parent: u32) -> Vec<u32> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // It may have ended meanwhile.
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // pid (name) state parent …; a name may hold anything.
        let after_name = stat.rsplit(") ").next().unwrap_or_default();
        if after_name.split(' ').nth(1) == Some(&parent.to_string()) {
            children.push(pid);
        }
    }
    children
}

/// By the shell's own `kill`: the program of that name is not on every machine.
fn signal(name: &str, pids: &[u32]) {
    for pid in pids {
        // One that has ended by itself is as good.
        Command::new("sh")
            .args(["-c", &format!("kill -{name} {pid} 2>/dev/null")])
            .status()
            .unwrap();
    }
}
