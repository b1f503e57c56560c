//! What befalls a whole server once in a schedule, besides all else: the procedures of docs/OPERATIONS.md, between two phases of
//! writing or in the midst of one. What must hold afterwards is what is said there.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::time::Duration;

use super::dice::Dice;
use super::plan::{side_name, Event, Fault, Phase, Step, What, MAILBOXES};
use crate::cluster::backup::Backup;
use crate::cluster::{holds_within_slowly, wait_until, Format, Server, Setup};
use crate::scene::Scene;

/// From this one on, seeds have a great fault.
pub const FIRST: u64 = 1_000;

/// Which server comes or goes.
pub const THIRD: usize = 2;

/// How often a seeding is interrupted.
const INTERRUPTIONS: usize = 5;

/// Compared after half a minute, then one, two and four.
const BY_ITSELF: Duration = Duration::from_secs(600);
const SOON: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Great {
    /// A server is away for longer than the other one's journal goes back.
    Overflow { victim: usize },
    /// What its relay knew is gone when it comes back.
    StateLost { victim: usize },
    /// One mailbox, of each user, from a copy.
    MailboxRestored { victim: usize },
    /// All of it, only its mail, or only what its relay knows.
    ServerRestored { victim: usize, what: &'static [&'static str] },
    /// A third one, whose seeding is interrupted.
    Added,
    /// Of three, one is lost and removed.
    Removed,
}

const ALL: &[&str] = &["/home", "/state"];
const MAIL: &[&str] = &["/home"];
const STATE: &[&str] = &["/state"];

/// The mailbox that is restored.
const RESTORED: &str = MAILBOXES[1];

impl Great {
    /// Eight seeds in a row have each once.
    pub fn of(seed: u64) -> Option<Great> {
        let victim = Dice::new(seed, 9_000).between(0, 1);
        (seed >= FIRST).then_some(match seed % 8 {
            0 => Great::Overflow { victim },
            1 => Great::StateLost { victim },
            2 => Great::MailboxRestored { victim },
            3 => Great::ServerRestored { victim, what: ALL },
            4 => Great::ServerRestored { victim, what: MAIL },
            5 => Great::ServerRestored { victim, what: STATE },
            6 => Great::Added,
            _ => Great::Removed,
        })
    }

    fn victim(self) -> Option<usize> {
        match self {
            Great::Overflow { victim } | Great::StateLost { victim } | Great::MailboxRestored { victim } => {
                Some(victim)
            }
            Great::ServerRestored { victim, .. } => Some(victim),
            Great::Added | Great::Removed => None,
        }
    }

    /// The second of the three phases is played without it.
    fn is_away(self) -> bool {
        matches!(self, Great::Overflow { .. } | Great::StateLost { .. })
    }

    /// One mailbox of an mdbox cannot be restored by itself.
    pub fn allows(self, format: Format) -> bool {
        format != Format::Mdbox || !matches!(self, Great::MailboxRestored { .. })
    }

    /// What was moved out of a mailbox and back meanwhile is taken for what is there, which was saved at another time.
    pub fn mixes_save_dates(self) -> bool {
        self.brings_mailboxes_back() == Some(2) || matches!(self, Great::MailboxRestored { .. })
    }

    /// A mailbox that is deleted from that phase on may be back with what was in it: who compares deletes nothing, and who has
    /// forgotten what it has heard of takes no deletion for one of all that is there.
    pub fn brings_mailboxes_back(self) -> Option<usize> {
        match self {
            Great::ServerRestored { what: STATE, .. } => Some(3),
            Great::Overflow { .. } | Great::StateLost { .. } | Great::ServerRestored { .. } => Some(2),
            _ => None,
        }
    }

    /// Which server is written to in that phase, where only one is.
    pub fn writer(self, phase: u64) -> Option<usize> {
        self.victim().filter(|_| phase == 3 || phase == 2 && self.is_away()).map(|victim| 1 - victim)
    }

    pub fn adapt(self, seed: u64, number: u64, phase: &mut Phase) {
        let mut dice = Dice::new(seed, 9_000 + number);
        let steps: usize = phase.clients.iter().map(Vec::len).sum();
        let victim = self.victim();
        if number == 2 && victim.is_some() {
            // Otherwise few have a mailbox of their own to delete.
            for steps in &mut phase.clients {
                let at = dice.between(0, steps.len() - 1);
                let (user, pick) = (steps[at].user, dice.roll());
                steps.insert(at, Step { user, what: What::Delete { pick } });
            }
        }
        match (number, self) {
            (2, Great::Overflow { victim } | Great::StateLost { victim }) => {
                phase.both = false;
                phase.down = Some(victim);
                let restarts = |fault: &Fault| match fault {
                    Fault::Stop { side } | Fault::Start { side } | Fault::Reload { side } => *side == victim,
                    _ => false,
                };
                phase.events.retain(|event| !restarts(&event.fault));
            }
            // The older name may win, and a client knows one.
            (2, Great::ServerRestored { what: MAIL, .. }) => {
                phase
                    .clients
                    .iter_mut()
                    .for_each(|steps| steps.retain(|step| !matches!(step.what, What::Rename { .. })));
            }
            (2, Great::Added) => {
                for _ in 0..INTERRUPTIONS {
                    let after = dice.between(1, steps - 1);
                    phase.events.push(Event { after, fault: Fault::Seed { side: dice.between(0, 1) } });
                    let (side, applied) = (dice.between(0, THIRD), dice.between(0, 20) as u64);
                    phase.events.push(Event { after, fault: Fault::Interrupt { side, applied } });
                }
            }
            (3, Great::Added) => {
                phase.both = true;
                phase.other = THIRD;
            }
            (2, Great::Removed) => {
                let after = dice.between(1, steps - 1);
                phase.events.push(Event { after, fault: Fault::Lose { side: THIRD } });
            }
            // What its clients see may be older than what they have done, until it is compared: they only bring new mail.
            (3, _) if victim.is_some() && phase.both => {
                let sides: Vec<usize> = (0..phase.clients.len()).map(|number| phase.side_of(number)).collect();
                let all = phase.clients.iter_mut().zip(sides);
                for (steps, _) in all.filter(|(_, side)| Some(*side) == victim) {
                    steps.retain(|step| match step.what {
                        What::Append { mailbox, .. } => mailbox < MAILBOXES.len(),
                        What::Deliver { .. } => true,
                        _ => false,
                    });
                }
            }
            _ => {}
        }
        phase.events.sort_by_key(|event| event.after);
    }

    /// Adds what it needs.
    pub fn set_up(self, seed: u64, setups: &mut Vec<Setup>) {
        let third = |name: &str| Setup::new(name, setups[1].format);
        match self {
            Great::Overflow { .. } => {
                let small = "dovetail_journal_size = 1M\n";
                for setup in setups {
                    *setup = setup.clone().extra(&format!("plugin {{\n  {small}}}\n"), small);
                }
            }
            Great::Added => {
                let third = third("c").only_with(&[]);
                *setups = vec![setups[0].clone().only_with(&["b"]), setups[1].clone().only_with(&["a"]), third];
            }
            // If it has the lowest name, it is the one that decides where UIDs clash.
            Great::Removed => setups.push(third(if seed / 8 % 2 == 0 { "c" } else { "0c" })),
            _ => {}
        }
    }
}

impl Display for Great {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match self {
            Great::Overflow { victim } => write!(f, "{} is away until the journal is full", side_name(*victim)),
            Great::StateLost { victim } => write!(f, "{} is away and loses its state", side_name(*victim)),
            Great::MailboxRestored { victim } => write!(f, "{RESTORED} is restored on {}", side_name(*victim)),
            Great::ServerRestored { victim, what } => write!(f, "{what:?} of {} are restored", side_name(*victim)),
            Great::Added => write!(f, "a third server is added"),
            Great::Removed => write!(f, "one of three servers is lost and removed"),
        }
    }
}

/// A great fault on its way.
pub struct Procedure<'a> {
    pub great: Option<Great>,
    pub scene: &'a Scene,
    pub users: &'a [String],
    backups: Vec<Backup>,
}

impl<'a> Procedure<'a> {
    pub fn new(great: Option<Great>, scene: &'a Scene, users: &'a [String]) -> Procedure<'a> {
        let procedure = Procedure { great, scene, users, backups: Vec::new() };
        if great == Some(Great::Added) {
            scene.set_members(2);
            // All are to be found by who seeds.
            scene.servers().iter().for_each(|server| users.iter().for_each(|user| server.add_user(user)));
        }
        procedure
    }

    /// `fill`: brings a mail to that server, so large that a few of them fill its journal.
    pub fn before(&mut self, phase: usize, fill: impl Fn(&Server)) {
        let servers = self.scene.servers();
        match (phase, self.great) {
            (2, Some(Great::Overflow { victim } | Great::StateLost { victim })) => servers[victim].stop(),
            (2, Some(Great::MailboxRestored { victim } | Great::ServerRestored { victim, .. })) => {
                servers[victim].stop();
                self.backups = self.take(&servers[victim]);
                servers[victim].start();
            }
            (2, Some(Great::Added)) => {
                self.scene.set_members(3);
                self.scene.connect_members(SOON);
            }
            (3, Some(Great::Overflow { victim })) => {
                let keeps = &servers[1 - victim];
                let is_full = || {
                    fill(keeps);
                    let peers = keeps.try_status().unwrap_or_default().peers;
                    peers.iter().any(|peer| peer.dropped > 0)
                };
                assert!(holds_within_slowly(BY_ITSELF, is_full), "its journal is never full");
                servers[victim].start();
            }
            (3, Some(Great::StateLost { victim })) => {
                fs::remove_dir_all(servers[victim].outside("/state/dovetail")).expect("what the relay knows");
                servers[victim].start();
            }
            (3, Some(Great::MailboxRestored { victim } | Great::ServerRestored { victim, .. })) => {
                servers[victim].stop();
                self.backups.iter().for_each(Backup::restore);
                servers[victim].start();
            }
            _ => {}
        }
    }

    fn take(&self, server: &Server) -> Vec<Backup> {
        match self.great {
            Some(Great::ServerRestored { what, .. }) => what.iter().map(|below| Backup::of(server, below)).collect(),
            _ => self.users.iter().map(|user| Backup::of_mailbox(server, user, RESTORED)).collect(),
        }
    }

    /// What a person does when a phase is over.
    pub fn after(&self, phase: usize) {
        if (phase, self.great) != (2, Some(Great::Removed)) {
            return;
        }
        let gone = self.scene.servers()[THIRD].name();
        self.scene.set_members(2);
        for server in self.scene.members() {
            let is_removed = || server.try_doveadm(&["dovetail", "peer", "remove", gone]).status.success();
            wait_until(SOON, "it is removed", is_removed);
        }
        self.scene.connect_members(SOON);
        self.scene.members()[0].try_doveadm(&["dovetail", "resync", "-A"]);
    }

    /// Whether servers are to be the same when it is over.
    pub fn is_checked(&self, phase: usize) -> bool {
        phase != 2 || !self.great.is_some_and(Great::is_away)
    }

    /// What was noticed is repaired by itself, and nobody says that anything differs.
    pub fn check_repaired(&self) {
        if self.great.is_none() {
            return;
        }
        for server in self.scene.members() {
            let mut counters = None;
            let is_over = || {
                counters = server.try_status().and_then(|status| status.counters);
                counters.as_ref().is_some_and(|counters| counters.failed == 0 && counters.looking == 0)
            };
            let failed = || server.try_doveadm(&["dovetail", "failed"]).stdout;
            assert!(
                holds_within_slowly(BY_ITSELF, is_over),
                "{}: {}",
                server.name(),
                String::from_utf8_lossy(&failed())
            );
        }
        for user in self.users {
            for server in self.scene.members() {
                let differences = server.doveadm(&["-f", "tab", "dovetail", "compare", "-u", user]);
                assert_eq!(differences.lines().skip(1).count(), 0, "{}: {differences}", server.name());
            }
        }
    }
}
