//! The processes of a server that do the replication: what they are, what they take, and holding them.

use std::collections::HashSet;
use std::fs;

use crate::cluster::server::signal;
use crate::cluster::Server;
use crate::variant::Variant;

/// Finds them, again and again, cheaply.
pub struct Processes {
    master: String,
    variant: Variant,
    /// Those that are none: a process stays what it is long enough not to be asked each time.
    others: HashSet<String>,
}

impl Processes {
    pub fn of(server: &Server, variant: Variant) -> Processes {
        let master = fs::read_to_string(server.outside("/run/master.pid")).expect("master.pid").trim().to_owned();
        Processes { master, variant, others: HashSet::new() }
    }

    /// Their ids now.
    pub fn list(&mut self) -> Vec<u32> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").expect("/proc").flatten() {
            let Ok(pid) = entry.file_name().into_string() else { continue };
            let Ok(number) = pid.parse() else { continue };
            if self.others.contains(&pid) {
                continue;
            }
            let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
            let (name, parent) = name_and_parent(&stat);
            if parent == self.master && self.variant.is_replication_process(name) {
                found.push(number);
            } else if parent != self.master || name != "dovecot" {
                // Between fork and exec a child still has its master's name.
                self.others.insert(pid);
            }
        }
        found
    }
}

/// From /proc/PID/stat: `pid (name) state parent ...`.
fn name_and_parent(stat: &str) -> (&str, &str) {
    let (start, end) = (stat.find('(').map_or(0, |i| i + 1), stat.rfind(')').unwrap_or(0));
    let parent = stat.get(end + 1..).unwrap_or("").split_whitespace().nth(1).unwrap_or("");
    (stat.get(start..end).unwrap_or(""), parent)
}

/// What it has spent of the CPU's time, in user and in system mode: ms, in the kernel's ticks of 10.
pub fn cpu_ms(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let rest = stat.rfind(')').and_then(|end| stat.get(end + 1..)).unwrap_or("");
    let ticks = rest.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok());
    10.0 * ticks.sum::<u64>() as f64
}

/// (PSS, RSS) in kB.
pub fn memory_kb(pid: u32) -> (u64, u64) {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let field = |name| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0)
    };
    (field("Pss:"), field("Rss:"))
}

/// Stops processes until it is dropped.
pub struct Held {
    pids: Vec<u32>,
}

impl Held {
    pub fn hold(pids: Vec<u32>) -> Held {
        for pid in &pids {
            signal(*pid, "STOP");
        }
        Held { pids }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for pid in &self.pids {
            signal(*pid, "CONT");
        }
    }
}
