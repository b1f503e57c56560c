//! What happens to the servers while the clients write: by the number of steps that the clients have done, never by time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use super::plan::{Event, Fault};
use crate::cluster::server::signal;
use crate::cluster::{Cluster, Line, Server};

/// What is paused, stopped or full goes on when no client has got an answer for so long: they may all wait for its locks.
const STALL: Duration = Duration::from_secs(5);

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
    had_no_room: [AtomicBool; 2],
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
    full: BTreeSet<(usize, &'static str)>,
}

impl<'a> Faults<'a> {
    pub fn on(cluster: &'a Cluster) -> Faults<'a> {
        Faults {
            servers: cluster.servers(),
            line: &cluster.lines[0],
            paused: BTreeMap::new(),
            stopped: [false; 2],
            full: BTreeSet::new(),
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
        }
    }

    fn resume(&mut self, side: usize, service: &'static str) {
        let pids = self.paused.remove(&(side, service)).unwrap_or_default();
        pids.iter().for_each(|pid| signal(*pid, "CONT"));
    }

    fn pids(&self, side: usize, service: &str) -> Vec<u32> {
        if self.stopped[side] {
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
        for side in 0..self.servers.len() {
            if std::mem::take(&mut self.stopped[side]) && !std::thread::panicking() {
                self.servers[side].start();
            }
        }
    }
}
