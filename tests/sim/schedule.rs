//! What happens when: made of a seed, told in words, made smaller.

use super::chance::Chance;
use super::local::Do;

pub const SERVERS: [&str; 5] = ["a", "b", "c", "d", "e"];

/// With three and more, about one seed in a thousand fails (docs/PERFORMANCE.md has which).
pub const SERVERS_MAX: u64 = 2;
/// Clashes of mailboxes: two of one name with mail in both, rename against rename, delete against save.
pub const HAS_CLASHES: bool = true;

/// Changes of flags that name messages by their UIDs alone, as behind the first hundred of a transaction: which of two such
/// changes on two servers holds is decided by UIDs, whether these name the same message on both or not.
pub const HAS_UNNAMED_FLAGS: bool = false;

/// A session's client acts on messages as it saw them last: they may have another UID since, or be gone.
pub const HAS_STALE_VIEWS: bool = true;

/// The client that makes, renames and subscribes.
const LIST_SLOT: usize = 0;
/// A power failure takes so many commits of the journal at most. What workers told the relay, and no log knows (where a message
/// got its UID), goes with them.
const LOST_COMMITS_MAX: u64 = 0;
/// Clocks are wrong by so much at most.
const HOURS_US_MAX: u64 = 12 * 3_600 * 1_000_000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A client of a server does something, `in_between`: as soon as a worker is in the middle of its work.
    Act {
        server: usize,
        slot: usize,
        what: Do,
        in_between: bool,
    },
    EndProcess {
        server: usize,
        slot: usize,
    },
    KillProcess {
        server: usize,
        slot: usize,
    },
    /// After so many moments of a worker's work.
    KillWorker {
        server: usize,
        after: u64,
    },
    KillRelay {
        server: usize,
        down_us: u64,
    },
    PowerFailure {
        server: usize,
        commits: usize,
        down_us: u64,
    },
    Cut {
        one: usize,
        two: usize,
    },
    Block {
        from: usize,
        to: usize,
        blocked: bool,
    },
    Clock {
        server: usize,
        by_us: i64,
    },
    Disk {
        server: usize,
        is_full: bool,
    },
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    pub seed: u64,
    pub servers: usize,
    /// With their times, in microseconds.
    pub steps: Vec<(u64, Step)>,
    /// The first so many stay: with them the relays know the user.
    pub begin: usize,
    /// Mail processes may take longer than a relay waits for them.
    pub is_slow: bool,
    /// By which each server's clock is wrong from the beginning.
    pub offsets_us: Vec<i64>,
}

/// What a seed's run may have.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub servers_max: u64,
    pub has_clashes: bool,
}

impl Default for Kind {
    fn default() -> Kind {
        Kind { servers_max: SERVERS_MAX, has_clashes: HAS_CLASHES }
    }
}

struct Maker {
    chance: Chance,
    staleness: Chance,
    kind: Kind,
    servers: usize,
    /// The relays know the user before it goes on. Of one whom they do not know, nothing is found if they are killed just
    /// then.
    is_known: bool,
    /// Faults of this run.
    has_blocks: bool,
    has_cuts: bool,
    has_kills: bool,
    has_clocks: bool,
    has_full_disks: bool,
    has_lists: bool,
    has_power_failures: bool,
    /// Mailboxes that each server has made, by their present name.
    made: Vec<Vec<String>>,
    names: u64,
}

impl Schedule {
    pub fn of_seed(seed: u64, kind: Kind) -> Schedule {
        let mut chance = Chance::new(seed, 3);
        let servers = (2 + chance.below(kind.servers_max - 1)) as usize;
        let is_known = chance.percent(70);
        let mut maker = Maker {
            is_known,
            has_blocks: chance.percent(50),
            has_cuts: chance.percent(40),
            has_kills: chance.percent(50),
            has_clocks: chance.percent(20),
            has_full_disks: is_known && chance.percent(10),
            has_lists: chance.percent(40),
            has_power_failures: is_known && chance.percent(15),
            made: vec![Vec::new(); servers],
            names: 0,
            chance,
            staleness: Chance::new(seed, 4),
            kind,
            servers,
        };
        let steps = maker.steps();
        let begin = if is_known { servers } else { 0 };
        let offsets_us = offsets_us(seed, servers);
        Schedule { seed, servers, steps, begin, is_slow: is_known && !maker.has_lists, offsets_us }
    }
}

/// In some runs hours.
fn offsets_us(seed: u64, servers: usize) -> Vec<i64> {
    let mut chance = Chance::new(seed, 5);
    let is_wrong = chance.percent(20);
    let mut offset = || if is_wrong { chance.below(2 * HOURS_US_MAX) as i64 - HOURS_US_MAX as i64 } else { 0 };
    (0..servers).map(|_| offset()).collect()
}

impl Maker {
    fn server(&mut self) -> usize {
        self.chance.below(self.servers as u64) as usize
    }

    fn two(&mut self) -> (usize, usize) {
        let one = self.server();
        let two = (one + 1 + self.chance.below(self.servers as u64 - 1) as usize) % self.servers;
        (one, two)
    }

    fn steps(&mut self) -> Vec<(u64, Step)> {
        let count = 10 + self.chance.below(50);
        // From hurry to leisure.
        let pause_us = *self.chance.pick(&[300, 3_000, 30_000, 300_000]);
        let mut steps = Vec::new();
        // All relays have started by then.
        let mut at_us = 150_000 + self.chance.below(400_000);
        if self.is_known {
            for server in 0..self.servers {
                let what = Do::Save { mailbox: "INBOX".into(), flags: 0, keyword: None, inline: true };
                steps.push((at_us, Step::Act { server, slot: 0, what, in_between: false }));
                at_us += 1_700_000;
            }
        }
        for _ in 0..count {
            at_us += self.chance.delay_us(pause_us);
            match self.chance.below(100) {
                0..=79 => {
                    let step = self.act();
                    steps.push((at_us, step));
                }
                _ => self.fault(at_us, pause_us, &mut steps),
            }
        }
        steps.sort_by_key(|(at_us, _)| *at_us);
        steps
    }

    fn fault(&mut self, at_us: u64, pause_us: u64, steps: &mut Vec<(u64, Step)>) {
        let server = self.server();
        let slot = self.chance.below(3) as usize;
        let (one, two) = self.two();
        let long_us = self.chance.delay_us(pause_us * 10);
        match self.chance.below(10) {
            0 | 1 if self.has_blocks => {
                let both = self.chance.percent(70);
                for (from, to) in [(one, two), (two, one)].into_iter().take(if both { 2 } else { 1 }) {
                    steps.push((at_us, Step::Block { from, to, blocked: true }));
                    steps.push((at_us + long_us, Step::Block { from, to, blocked: false }));
                }
            }
            2 if self.has_cuts => steps.push((at_us, Step::Cut { one, two })),
            3 if self.has_kills && self.is_known => steps.push((at_us, Step::KillRelay { server, down_us: long_us })),
            4 if self.has_kills => {
                let after = self.chance.below(12);
                steps.push((at_us, Step::KillWorker { server, after }));
            }
            5 if self.has_kills => steps.push((at_us, Step::KillProcess { server, slot })),
            6 if self.has_clocks => {
                let by_us = match self.chance.below(3) {
                    0 => self.chance.below(2_000_000) as i64 - 1_000_000,
                    1 => self.chance.below(7_200_000_000) as i64 - 3_600_000_000,
                    _ => self.chance.below(100_000) as i64 - 50_000,
                };
                steps.push((at_us, Step::Clock { server, by_us }));
            }
            7 if self.has_full_disks => {
                steps.push((at_us, Step::Disk { server, is_full: true }));
                steps.push((at_us + long_us, Step::Disk { server, is_full: false }));
            }
            8 if self.has_power_failures => {
                let commits = self.chance.below(LOST_COMMITS_MAX + 1) as usize;
                steps.push((at_us, Step::PowerFailure { server, commits, down_us: long_us }));
            }
            _ => steps.push((at_us, Step::EndProcess { server, slot })),
        }
    }

    /// One that some server has, most likely.
    fn mailbox(&mut self) -> String {
        let made: Vec<&String> = self.made.iter().flatten().collect();
        match self.has_lists && !made.is_empty() && self.chance.percent(40) {
            true => (*self.chance.pick(&made)).clone(),
            false => "INBOX".into(),
        }
    }

    fn act(&mut self) -> Step {
        let server = self.server();
        let slot = self.chance.below(3) as usize;
        let in_between = self.chance.percent(15);
        let mailbox = self.mailbox();
        // Mostly the last ones, on which everybody is at work.
        let pick = match self.chance.percent(60) {
            true => u64::MAX - self.chance.below(3),
            false => self.chance.below(1 << 20),
        };
        let count = if self.chance.percent(80) { 1 } else { 1 + self.chance.below(5) };
        let named = self.chance.percent(75);
        let flag = 1u8 << self.chance.below(5);
        let stale = HAS_STALE_VIEWS && self.staleness.percent(40);
        let keyword = self.chance.pick(&["Work", "Home", "$Forwarded"]).to_string();
        let what = match self.chance.below(100) {
            0..=44 => {
                let keyword = self.chance.percent(20).then_some(keyword);
                let flags = if self.chance.percent(30) { flag } else { 0 };
                let inline = self.chance.percent(85);
                Do::Save { mailbox, flags, keyword, inline }
            }
            45..=64 => {
                let (add, remove) = if self.chance.percent(50) { (flag, 0) } else { (0, flag) };
                Do::Flags { mailbox, pick, count, add, remove, named: named || !HAS_UNNAMED_FLAGS, stale }
            }
            65..=71 => {
                let add = self.chance.percent(60);
                Do::Keyword { mailbox, pick, name: keyword, add, stale }
            }
            // The plugin names all that it can.
            72..=85 => Do::Expunge { mailbox, pick, count, stale },
            _ if !self.has_lists => Do::Save { mailbox, flags: 0, keyword: None, inline: true },
            86..=90 => {
                let to = self.mailbox();
                let expunge = self.chance.percent(60);
                Do::Copy { from: mailbox, to, pick, expunge }
            }
            91..=95 => self.create(server),
            96..=97 => self.rename(server),
            98 if self.kind.has_clashes && mailbox != "INBOX" => Do::Delete { mailbox },
            _ => {
                let subscribed = self.chance.percent(60);
                // Each server its own: which of two changes is the later one is not what is tested here.
                Do::Subscribe { mailbox: format!("{} list", SERVERS[server]), subscribed }
            }
        };
        // No log says in which order mailboxes are made and renamed: one process does.
        let is_of_list =
            matches!(what, Do::Create { .. } | Do::Rename { .. } | Do::Subscribe { .. } | Do::Delete { .. });
        Step::Act { server, slot: if is_of_list { LIST_SLOT } else { slot }, what, in_between }
    }

    fn new_name(&mut self, server: usize) -> String {
        if self.kind.has_clashes && self.chance.percent(50) {
            return self.chance.pick(&["Archive", "Drafts"]).to_string();
        }
        self.names += 1;
        format!("{}{}", SERVERS[server], self.names)
    }

    fn create(&mut self, server: usize) -> Do {
        let name = self.new_name(server);
        let above = self.made[server].first().cloned();
        let name = match above.filter(|_| self.chance.percent(30)) {
            Some(above) => format!("{above}/{name}"),
            None => name,
        };
        self.made[server].push(name.clone());
        Do::Create { mailbox: name }
    }

    /// Only who made it, or it would be a clash.
    fn rename(&mut self, server: usize) -> Do {
        let Some(from) = self.made[server].last().cloned() else { return self.create(server) };
        let to = self.new_name(server);
        if let Some(last) = self.made[server].last_mut() {
            last.clone_from(&to);
        }
        Do::Rename { from, to }
    }
}

impl Schedule {
    /// The smallest that still fails, found by leaving out steps: halves first, then single ones.
    pub fn shrink(self, mut fails: impl FnMut(&Schedule) -> bool) -> Schedule {
        let mut smallest = self;
        let mut length = (smallest.steps.len() / 2).max(1);
        loop {
            let mut at = smallest.begin;
            let mut is_smaller = false;
            while at < smallest.steps.len() {
                let mut without = smallest.clone();
                without.steps.drain(at..(at + length).min(smallest.steps.len()));
                if fails(&without) {
                    smallest = without;
                    is_smaller = true;
                } else {
                    at += length;
                }
            }
            match length {
                1 if !is_smaller => return smallest,
                1 => {}
                _ => length = length.div_ceil(2),
            }
        }
    }
}

#[test]
fn the_smallest_that_fails_has_the_steps_that_it_needs_and_no_others() {
    let whole = (1..).map(|seed| Schedule::of_seed(seed, Kind::default())).find(|s| s.begin > 0 && s.steps.len() > 20);
    let whole = whole.expect("a seed of many steps");
    // Given that it takes two steps, wherever they are.
    let [one, two] = [2, 3].map(|server| Step::Disk { server, is_full: true });
    for (first, second) in [(whole.begin, whole.steps.len()), (whole.begin + 7, whole.begin + 8)] {
        let mut schedule = whole.clone();
        schedule.steps.insert(first, (1, one.clone()));
        schedule.steps.insert(second, (2, two.clone()));
        let is_there = |schedule: &Schedule, step: &Step| schedule.steps.iter().any(|(_, other)| other == step);
        let smallest = schedule.shrink(|schedule| is_there(schedule, &one) && is_there(schedule, &two));
        let begin = whole.steps[..whole.begin].to_vec();
        assert_eq!(smallest.steps, [begin, vec![(1, one.clone()), (2, two.clone())]].concat());
    }
    // And one that fails in any case.
    assert_eq!(whole.clone().shrink(|_| true).steps.len(), whole.begin);
}
