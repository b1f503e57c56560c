//! What happens to the servers while the clients write: by the number of steps that the clients have done, never by time.

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use super::great::THIRD;
use super::plan::{Event, Fault};
use crate::cluster::server::signal;
use crate::cluster::{holds_within, Cluster, Line, Server};

/// What is paused, stopped or full goes on when no client has got an answer for so long: they may all wait for its locks.
const STALL: Duration = Duration::from_secs(5);
/// What seeds does so within this time, or is interrupted nevertheless.
const SEEDED: Duration = Duration::from_secs(10);
/// It has half of a minute for those who were away, and the users after each other.
const SEED_DEADLINE: Duration = Duration::from_secs(120);

#[derive(Default)]
struct Done {
    steps: usize,
    clients: usize,
}

/// How far the clients are.
#[derive(Default)]
pub struct Progress {
    done: Mutex<Done>,
    changed: Condvar,
    had_no_room: [AtomicBool; 3],
}

impl Progress {
    /// A client works until the guard is dropped, be it by a panic.
    pub fn client(&self) -> impl Drop + '_ {
        struct Guard<'a>(&'a Progress);
        impl Drop for Guard<'_> {
            fn drop(&mut self) {
                self.0.change(|done| done.clients -= 1);
            }
        }
        Guard(self)
    }

    /// Before their threads are started.
    pub fn expect_clients(&self, count: usize) {
        self.change(|done| done.clients = count);
    }

    pub fn step(&self) {
        self.change(|done| done.steps += 1);
    }

    /// Waits for a step behind so many; how many there are then. None: the clients are at their end.
    pub fn next(&self, steps: usize) -> Option<usize> {
        let done = self.done.lock().unwrap_or_else(|e| e.into_inner());
        let nothing_new = |done: &mut Done| done.steps <= steps && done.clients > 0;
        let done = self.changed.wait_while(done, nothing_new).unwrap_or_else(|e| e.into_inner());
        (done.clients > 0).then_some(done.steps)
    }

    /// Whether the mail of this server had no room in this phase. Sessions that Dovecot went on with in memory remain.
    pub fn had_no_room(&self, side: usize) -> bool {
        self.had_no_room[side].load(Ordering::Relaxed)
    }

    fn change(&self, change: impl FnOnce(&mut Done)) {
        change(&mut self.done.lock().unwrap_or_else(|e| e.into_inner()));
        self.changed.notify_all();
    }

    /// Waits until so many steps are done, or the clients are at their end, or (if it may) nothing moves.
    fn wait_for(&self, steps: usize, or_stalled: bool) {
        let mut done = self.done.lock().unwrap_or_else(|e| e.into_inner());
        while done.steps < steps && done.clients > 0 {
            let before = done.steps;
            let (now, waited) = self.changed.wait_timeout(done, STALL).unwrap_or_else(|e| e.into_inner());
            done = now;
            if or_stalled && waited.timed_out() && done.steps == before {
                eprintln!("no client has got an answer for {STALL:?}, after {before} steps");
                return;
            }
        }
    }
}

pub struct Faults<'a> {
    servers: &'a [Server],
    line: &'a Line,
    paused: BTreeMap<(usize, &'static str), Vec<u32>>,
    stopped: [bool; 2],
    down: Option<usize>,
    full: BTreeSet<(usize, &'static str)>,
    seedings: Vec<Child>,
    /// How many changes the third server had applied when the last one began.
    applied: u64,
}

impl<'a> Faults<'a> {
    /// `down`: is stopped all the time.
    pub fn on(cluster: &'a Cluster, down: Option<usize>) -> Faults<'a> {
        Faults {
            servers: cluster.servers(),
            line: &cluster.lines[0],
            paused: BTreeMap::new(),
            stopped: [false; 2],
            down,
            full: BTreeSet::new(),
            seedings: Vec::new(),
            applied: 0,
        }
    }

    pub fn play(&mut self, events: &[Event], progress: &Progress) {
        for Event { after, fault } in events {
            let anything_rests = !self.paused.is_empty() || self.stopped.contains(&true) || !self.full.is_empty();
            progress.wait_for(*after, anything_rests);
            if let Fault::Fill { side, disk: "home", .. } = fault {
                progress.had_no_room[*side].store(true, Ordering::Relaxed);
            }
            self.cause(fault);
        }
    }

    fn cause(&mut self, fault: &Fault) {
        match fault {
            Fault::Kill { side, service, one } => {
                let pids = self.pids(*side, service);
                let first = one.map_or(0, |pick| pick as usize % pids.len().max(1));
                let count = if one.is_some() { 1 } else { pids.len() };
                pids.iter().skip(first).take(count).for_each(|pid| signal(*pid, "KILL"));
                eprintln!("{fault}: {}", pids.len().min(count));
                if one.is_none() {
                    self.paused.remove(&(*side, *service));
                }
            }
            Fault::Pause { side, service } => {
                let pids = self.pids(*side, service);
                pids.iter().for_each(|pid| signal(*pid, "STOP"));
                self.paused.entry((*side, service)).or_default().extend(pids);
            }
            Fault::Resume { side, service } => self.resume(*side, service),
            Fault::Stop { side } => {
                ["dovetail", "dovetail-worker"].iter().for_each(|service| self.resume(*side, service));
                self.stopped[*side] = true;
                self.servers[*side].stop();
            }
            Fault::Start { side } => {
                if std::mem::take(&mut self.stopped[*side]) {
                    self.servers[*side].start();
                }
            }
            Fault::Cut => self.line.cut(),
            Fault::Hang { hangs } => self.line.hang(*hangs),
            Fault::Slow { millis } => self.line.delay(Duration::from_millis(*millis)),
            Fault::Reload { side } => {
                if !self.stopped[*side] {
                    self.servers[*side].try_doveadm(&["reload"]);
                }
            }
            Fault::Fill { side, disk, room } => {
                self.full.insert((*side, disk));
                self.servers[*side].fill(disk, *room);
                eprintln!("{fault}");
            }
            Fault::Free { side, disk } => {
                self.full.remove(&(*side, *disk));
                self.servers[*side].free(disk);
            }
            Fault::Seed { side } => self.seed(*side),
            Fault::Interrupt { side, applied } => {
                // A new relay there counts anew.
                let since = |now: u64| now.checked_sub(self.applied).unwrap_or(now);
                let is_reached = holds_within(SEEDED, || since(self.applied_by_third()) >= *applied);
                let pids = self.pids(*side, "dovetail");
                pids.iter().for_each(|pid| signal(*pid, "KILL"));
                eprintln!("{fault}{}", if is_reached { "" } else { ", which did not come" });
            }
            Fault::Lose { side } => {
                self.servers[*side].kill_all();
                eprintln!("{fault}");
            }
        }
    }

    fn seed(&mut self, side: usize) {
        if self.stopped[side] {
            return;
        }
        self.applied = self.applied_by_third();
        let server = &self.servers[side];
        let mut doveadm = server.command("doveadm");
        doveadm.args(["-c", &server.conf(), "dovetail", "resync", "-A"]);
        doveadm.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.seedings.push(doveadm.spawn().expect("nsenter"));
    }

    fn applied_by_third(&self) -> u64 {
        let status = self.servers[THIRD].try_status().unwrap_or_default();
        status.counters.unwrap_or_default().applied
    }

    fn resume(&mut self, side: usize, service: &'static str) {
        let pids = self.paused.remove(&(side, service)).unwrap_or_default();
        pids.iter().for_each(|pid| signal(*pid, "CONT"));
    }

    fn pids(&self, side: usize, service: &str) -> Vec<u32> {
        if self.down == Some(side) || self.stopped.get(side) == Some(&true) {
            return Vec::new();
        }
        self.servers[side].pids(service)
    }
}

impl Drop for Faults<'_> {
    /// Everything runs again.
    fn drop(&mut self) {
        self.line.hang(false);
        self.line.delay(Duration::ZERO);
        std::mem::take(&mut self.full).iter().for_each(|(side, disk)| self.servers[*side].free(disk));
        for ((side, service), _) in self.paused.clone() {
            self.resume(side, service);
        }
        for side in 0..self.stopped.len() {
            if std::mem::take(&mut self.stopped[side]) && !std::thread::panicking() {
                self.servers[side].start();
            }
        }
        for mut doveadm in std::mem::take(&mut self.seedings) {
            let is_over = || !matches!(doveadm.try_wait(), Ok(None));
            if !holds_within(SEED_DEADLINE, is_over) {
                let _ = doveadm.kill();
                let _ = doveadm.wait();
            }
        }
    }
}
