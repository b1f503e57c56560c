//! What a seed does: who writes where, what each client does, what is killed when. Nothing here looks at a clock or at a
//! server, so that a seed always gives the same schedule.

use std::fmt::{self, Display, Formatter};

use super::dice::Dice;
use super::great::Great;
use crate::cluster::Format;

/// Mailboxes that every user has; the number behind them stands for one of the client's own.
pub const MAILBOXES: [&str; 3] = ["INBOX", "Work", "Archive"];

const FLAGS: [&str; 7] = ["\\Seen", "\\Flagged", "\\Answered", "\\Draft", "$Label1", "Junk", "project-x"];

#[derive(Debug)]
pub struct Plan {
    pub seed: u64,
    pub formats: (Format, Format),
    /// Each server in a network of its own.
    pub apart: bool,
    pub users: usize,
    pub great: Option<Great>,
    pub phases: Vec<Phase>,
}

#[derive(Debug)]
pub struct Phase {
    /// Index of the server that is written to.
    pub writer: usize,
    /// Both are: every second client writes to the other one.
    pub both: bool,
    /// That one.
    pub other: usize,
    /// This one is stopped before it begins, and still when it is over.
    pub down: Option<usize>,
    /// What each client does, one step after the other.
    pub clients: Vec<Vec<Step>>,
    pub events: Vec<Event>,
}

#[derive(Debug)]
pub struct Step {
    pub user: usize,
    pub what: What,
}

/// `mailbox`, `from`, `to` are indexes of [`MAILBOXES`]; `pick` chooses among what there is then.
#[derive(Debug)]
pub enum What {
    Deliver { size: usize },
    Append { mailbox: usize, flags: String, sizes: Vec<usize> },
    Flags { mailbox: usize, pick: u64, count: usize, change: String },
    Copy { from: usize, to: usize, pick: u64, count: usize },
    Move { from: usize, to: usize, pick: u64, count: usize },
    Expunge { mailbox: usize, pick: u64, count: usize },
    Create { below: bool, subscribe: bool },
    Rename { pick: u64 },
    Delete { pick: u64 },
    Subscribe { pick: u64, on: bool },
}

/// Something that happens to the servers once the clients have done so many steps together.
#[derive(Debug)]
pub struct Event {
    pub after: usize,
    pub fault: Fault,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `one`: a process of this service; otherwise all.
    Kill {
        side: usize,
        service: &'static str,
        one: Option<u64>,
    },
    /// SIGSTOP to all processes of a service.
    Pause {
        side: usize,
        service: &'static str,
    },
    Resume {
        side: usize,
        service: &'static str,
    },
    Stop {
        side: usize,
    },
    Start {
        side: usize,
    },
    Reload {
        side: usize,
    },
    /// The disk of its mail, or of its relay's journal, has only so much room left.
    Fill {
        side: usize,
        disk: &'static str,
        room: u64,
    },
    /// It has room again.
    Free {
        side: usize,
        disk: &'static str,
    },
    /// The line between the relays breaks in the middle of a frame.
    Cut,
    /// Nothing passes, and nobody is told.
    Hang {
        hangs: bool,
    },
    /// Each chunk takes so much longer.
    Slow {
        millis: u64,
    },
    /// `doveadm dovetail resync -A`
    Seed {
        side: usize,
    },
    /// Once it has brought the third server so many changes, a relay is killed.
    Interrupt {
        side: usize,
        applied: u64,
    },
    /// All of a server is killed, and does not come back.
    Lose {
        side: usize,
    },
}

impl Plan {
    pub fn of(seed: u64) -> Plan {
        use Format::{Maildir, Mdbox, Sdbox};
        let pairs = [(Sdbox, Sdbox), (Mdbox, Mdbox), (Maildir, Maildir), (Sdbox, Maildir)];
        let mut dice = Dice::new(seed, 0);
        let users = dice.between(1, 3);
        let phases = dice.between(1, 3);
        let great = Great::of(seed);
        let traits = traits(seed);
        let phases = if great.is_some() { 3 } else { phases };
        let both = Plan::has_two_writers(seed);
        let phases = (1..=phases).map(|phase| Phase::of(seed, phase as u64, users, both, great)).collect();
        let is_allowed = |formats: &&(Format, Format)| great.is_none_or(|great| great.allows(formats.0));
        let pairs: Vec<_> = pairs.iter().filter(is_allowed).collect();
        let formats = *pairs[traits as usize % pairs.len()];
        Plan { seed, formats, apart: traits / 4 % 2 == 1, users, great, phases }
    }

    /// Whether both servers are written to at once; otherwise one is, and the other one in the next phase perhaps.
    pub fn has_two_writers(seed: u64) -> bool {
        traits(seed) / 8 % 2 == 1
    }

    /// Whether one of a server's disks is filled some time.
    pub fn fills(&self, server: usize) -> bool {
        let mut events = self.phases.iter().flat_map(|phase| &phase.events);
        events.any(|event| matches!(event.fault, Fault::Fill { side, .. } if side == server))
    }
}

/// What chooses the formats, the line and the writers of a schedule.
fn traits(seed: u64) -> u64 {
    match Great::of(seed) {
        // In the order of the seeds, great faults would meet the same ones again and again.
        Some(_) => Dice::new(seed, 8_000).roll(),
        None => seed,
    }
}

impl Phase {
    fn of(seed: u64, phase: u64, users: usize, both: bool, great: Option<Great>) -> Phase {
        let mut dice = Dice::new(seed, phase * 100);
        let rolled = dice.between(0, 1);
        let writer = great.and_then(|great| great.writer(phase)).unwrap_or(rolled);
        let clients: Vec<Vec<Step>> = (1..=dice.between(2, 4) as u64)
            .map(|client| {
                let mut dice = Dice::new(seed, phase * 100 + client);
                (0..dice.between(15, 40)).map(|_| Step::of(&mut dice, users)).collect()
            })
            .collect();
        let steps = clients.iter().map(Vec::len).sum();
        let mut events = Vec::new();
        for _ in 0..dice.between(2, 7) {
            Fault::add(&mut dice, writer, steps, &mut events);
        }
        // Dice of their own: what was there before stays as it was.
        let mut dice = Dice::new(seed, phase * 100 + 50);
        for _ in 0..dice.between(1, 3) {
            Fault::add_to_servers(&mut dice, writer, steps, &mut events);
        }
        events.sort_by_key(|event| event.after);
        let mut it = Phase { writer, both, other: 1 - writer, down: None, clients, events };
        if let Some(great) = great {
            great.adapt(seed, phase, &mut it);
        }
        it
    }

    /// The server that a client writes to.
    pub fn side_of(&self, client: usize) -> usize {
        if self.both && client % 2 == 1 {
            self.other
        } else {
            self.writer
        }
    }
}

impl Step {
    fn of(dice: &mut Dice, users: usize) -> Step {
        let user = dice.between(0, users - 1);
        let mut mailbox = || if dice.percent(15) { MAILBOXES.len() } else { dice.between(0, 2) };
        let (mailbox, other) = (mailbox(), mailbox());
        let other = if mailbox == other { (mailbox + 1) % MAILBOXES.len() } else { other };
        let (from, to) = (mailbox, other);
        let (pick, count) = (dice.roll(), dice.between(1, 3));
        let what = match dice.between(0, 99) {
            0..=19 => What::Deliver { size: size(dice) },
            20..=36 => {
                let count = if dice.percent(25) { dice.between(2, 4) } else { 1 };
                let flags = if dice.percent(50) { dice.pick(&FLAGS).to_owned() } else { String::new() };
                What::Append { mailbox, flags, sizes: (0..count).map(|_| size(dice)).collect() }
            }
            37..=56 => {
                let sign = dice.pick(&["+", "-", "+", ""]);
                let silent = dice.pick(&["", ".SILENT"]);
                let change = format!("{sign}FLAGS{silent} ({} {})", dice.pick(&FLAGS), dice.pick(&FLAGS));
                What::Flags { mailbox, pick, count, change }
            }
            57..=66 => What::Copy { from, to, pick, count },
            67..=78 => What::Move { from, to, pick, count },
            79..=89 => What::Expunge { mailbox, pick, count },
            90..=93 => What::Create { below: dice.percent(30), subscribe: dice.percent(50) },
            94..=95 => What::Rename { pick },
            96 => What::Delete { pick },
            _ => What::Subscribe { pick, on: dice.percent(60) },
        };
        Step { user, what }
    }
}

/// Most mails are small, some have bodies that do not ride along.
fn size(dice: &mut Dice) -> usize {
    match dice.between(0, 99) {
        0..=84 => dice.between(0, 3_000),
        85..=97 => dice.between(30_000, 120_000),
        _ => dice.between(300_000, 600_000),
    }
}

impl Fault {
    fn add(dice: &mut Dice, writer: usize, steps: usize, events: &mut Vec<Event>) {
        let after = dice.between(1, steps - 1);
        let until = dice.between(after, steps.min(after + 20));
        let side = dice.between(0, 1);
        let peer = 1 - writer;
        let mut push = |after, fault| events.push(Event { after, fault });
        let one = if dice.percent(70) { Some(dice.roll()) } else { None };
        match dice.between(0, 119) {
            0..=17 => push(after, Fault::Kill { side: writer, service: "imap", one }),
            18..=27 => push(after, Fault::Kill { side: writer, service: "lmtp", one }),
            28..=42 => push(after, Fault::Kill { side, service: "dovetail-worker", one }),
            43..=57 => push(after, Fault::Kill { side, service: "dovetail", one: None }),
            // The relay and a mail process in one breath: what the one had not taken from the other is lost.
            58..=65 => {
                push(after, Fault::Pause { side: writer, service: "dovetail" });
                push(until, Fault::Kill { side: writer, service: dice.pick(&["imap", "lmtp"]), one: None });
                push(until, Fault::Kill { side: writer, service: "dovetail", one: None });
            }
            66..=83 => {
                let service = dice.pick(&["dovetail", "dovetail-worker"]);
                push(after, Fault::Pause { side, service });
                push(until, Fault::Resume { side, service });
            }
            84..=91 => {
                push(after, Fault::Stop { side: peer });
                push(until, Fault::Start { side: peer });
            }
            92..=99 => push(after, Fault::Reload { side }),
            100..=107 => push(after, Fault::Cut),
            108..=113 => {
                push(after, Fault::Hang { hangs: true });
                push(until, Fault::Hang { hangs: false });
            }
            _ => {
                push(after, Fault::Slow { millis: dice.between(1, 50) as u64 });
                push(until, Fault::Slow { millis: 0 });
            }
        }
    }

    fn add_to_servers(dice: &mut Dice, writer: usize, steps: usize, events: &mut Vec<Event>) {
        let after = dice.between(1, steps - 1);
        let until = (after + dice.between(3, 25)).min(steps);
        let side = dice.between(0, 1);
        // In pages, of which some are enough for a small mail.
        let room = dice.between(0, 8) as u64 * 4096;
        let one = if dice.percent(70) { Some(dice.roll()) } else { None };
        let mut push = |after, fault| events.push(Event { after, fault });
        match dice.between(0, 99) {
            0..=24 => {
                push(after, Fault::Stop { side: writer });
                push(until, Fault::Start { side: writer });
            }
            25..=74 => {
                let disk = dice.pick(&["home", "home", "home", "state"]);
                push(after, Fault::Fill { side, disk, room });
                push(until, Fault::Free { side, disk });
            }
            _ => push(after, Fault::Kill { side: 1 - writer, service: dice.pick(&["imap", "imap", "lmtp"]), one }),
        }
    }
}

pub fn side_name(side: usize) -> &'static str {
    ["a", "b", "the third"][side]
}

impl Display for Fault {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match self {
            Fault::Kill { side, service, one: None } => write!(f, "kill -9 all {service} on {}", side_name(*side)),
            Fault::Kill { side, service, one: Some(_) } => write!(f, "kill -9 one {service} on {}", side_name(*side)),
            Fault::Pause { side, service } => write!(f, "SIGSTOP to {service} on {}", side_name(*side)),
            Fault::Resume { side, service } => write!(f, "SIGCONT to {service} on {}", side_name(*side)),
            Fault::Stop { side } => write!(f, "stop {}", side_name(*side)),
            Fault::Start { side } => write!(f, "start {}", side_name(*side)),
            Fault::Seed { side } => write!(f, "{} begins to seed", side_name(*side)),
            Fault::Interrupt { side, applied } => {
                write!(f, "{applied} changes later, kill -9 the relay on {}", side_name(*side))
            }
            Fault::Lose { side } => write!(f, "kill -9 all of {}", side_name(*side)),
            Fault::Cut => write!(f, "the line is cut"),
            Fault::Hang { hangs } => write!(f, "the line {}", if *hangs { "hangs" } else { "works again" }),
            Fault::Slow { millis } => write!(f, "the line takes {millis} ms longer"),
            Fault::Reload { side } => write!(f, "doveadm reload on {}", side_name(*side)),
            Fault::Fill { side, disk, room } => {
                write!(f, "the disk of {disk} on {} is full but for {room} bytes", side_name(*side))
            }
            Fault::Free { side, disk } => write!(f, "the disk of {disk} on {} has room again", side_name(*side)),
        }
    }
}

impl Display for Plan {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let network = if self.apart { "in networks of their own" } else { "on one loopback" };
        writeln!(
            f,
            "seed {}: {:?} and {:?} {network}, {} users",
            self.seed, self.formats.0, self.formats.1, self.users
        )?;
        if let Some(great) = self.great {
            writeln!(f, "once: {great}")?;
        }
        for (n, phase) in self.phases.iter().enumerate() {
            let steps: Vec<usize> = phase.clients.iter().map(Vec::len).collect();
            let writers = match phase.both {
                true => format!("{} and {} are", side_name(phase.writer), side_name(phase.other)),
                false => format!("{} is", side_name(phase.writer)),
            };
            writeln!(f, "phase {}: {writers} written to, clients with {steps:?} steps", n + 1)?;
            for event in &phase.events {
                writeln!(f, "  after {} steps: {}", event.after, event.fault)?;
            }
        }
        Ok(())
    }
}
