//! The order in which the changes of one user leave, although processes that race tell of them in any order.
//!
//! A record is held while something before one of its spans is missing, for a short time: two processes may race, a
//! process that was killed will never tell. Guarantees that records of one connection and of one log leave in their
//! order, and that nothing destructive overtakes a save that came before it: the expunge of a MOVE would drop the
//! only copy. When the time is over the hole is to be read from the log itself, and the record waits for that. Where too
//! many wait, they are given up, and the log is to be read behind the last place that is known.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::acks::AckId;
use super::spans::{Need, Place, Spans};
use crate::change;
use crate::wire::proto::{Change, Span};

/// How long stragglers are waited for: on a busy machine a process may not run for a while between its commit and its
/// send, and what left in the wrong order is applied under other UIDs.
pub const HOLD_MS_MAX: u64 = 1_000;
/// A hole that is to be read from the log: of this mailbox, up to this place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hole {
    pub user: Arc<str>,
    /// None: all of the user's mailboxes must be looked at, their records were given up.
    pub mailbox: Option<(Vec<u8>, Place)>,
}

/// How long a record waits for its hole to be read from the log, and how often.
const SAID_MS_MAX: u64 = 60_000;
const SAID_MAX: u32 = 3;
/// Records held for one user, at most.
const HELD_PER_USER_MAX: usize = 256;
/// Bytes of all held records, at most.
const HELD_BYTES_MAX: usize = 32 << 20;

/// What a local process said in one record.
pub struct Arrival {
    /// Names the connection it came on.
    pub connection: usize,
    pub user: Arc<str>,
    pub change: Option<Change>,
    /// Its process waits for it to be safe.
    pub ack: Option<AckId>,
}

/// What may leave now: a change, the places in the logs that are known with it, or both.
#[derive(Debug)]
pub struct Release {
    pub user: Arc<str>,
    pub change: Option<Change>,
    pub spans: Vec<Span>,
    pub ack: Option<AckId>,
}

struct Held {
    arrival: Arrival,
    /// Its own, and behind those what it took over from others.
    spans: Vec<Span>,
    /// Of its own spans.
    needs: Vec<Need>,
    has_saves: bool,
    is_destructive: bool,
    bytes: usize,
    until_ms: u64,
    /// How often its holes were said.
    said: u32,
}

impl Held {
    fn new(arrival: Arrival, spans: Vec<Span>, needs: Vec<Need>, now_ms: u64) -> Held {
        Held {
            has_saves: arrival.change.as_ref().is_some_and(change::has_saves),
            is_destructive: arrival.change.as_ref().is_some_and(change::is_destructive),
            bytes: arrival.change.as_ref().map_or(0, change::memory_of) + 256 * (1 + needs.len()),
            until_ms: now_ms + HOLD_MS_MAX,
            said: 0,
            arrival,
            spans,
            needs,
        }
    }

    fn release(self) -> Release {
        Release { user: self.arrival.user, change: self.arrival.change, spans: self.spans, ack: self.arrival.ack }
    }

    /// Whether this one's change happened before the one of `other`, which came later or earlier.
    fn goes_before(&self, other: &Held, came_first: bool) -> bool {
        if self.arrival.change.is_none() || other.arrival.change.is_none() {
            return false;
        }
        if self.arrival.connection == other.arrival.connection {
            return came_first;
        }
        other.needs.iter().any(|need| match (self.first_in(need), other.first_in(need)) {
            (Some(mine), Some(others)) => mine < others,
            _ => false,
        })
    }

    /// Where in the log its change was written. Its other spans may lie anywhere.
    fn first_in(&self, need: &Need) -> Option<Place> {
        let any_touches = self.needs.iter().any(|need| need.touches);
        let found = self.needs.iter().filter(|n| n.log == need.log && n.touches == any_touches);
        found.map(|n| n.place).min()
    }

    /// A log does not count as known behind a change that is still held: such places are known with that one.
    fn hand_over(&mut self, rest: &mut [Held]) {
        self.spans.retain(|span| {
            let need = Need::of(span);
            let is_behind = |held: &&mut Held| {
                let mut needs = held.needs.iter();
                held.arrival.change.is_some() && needs.any(|n| n.log == need.log && n.place < need.place)
            };
            let behind = rest.iter_mut().rfind(is_behind);
            let is_free = behind.is_none();
            if let Some(held) = behind {
                held.take_over(span, &need);
            }
            is_free
        });
    }

    /// Of each log the furthest place is enough.
    fn take_over(&mut self, span: &Span, need: &Need) {
        let own = self.needs.len();
        let taken = self.spans[own..].iter_mut().find(|taken| Need::of(taken).log == need.log);
        match taken {
            Some(taken) if (taken.log_seq, taken.end) < (span.log_seq, span.end) => *taken = span.clone(),
            Some(_) => {}
            None => self.spans.push(span.clone()),
        }
    }
}

fn count_changes(held: &[Held]) -> usize {
    held.iter().filter(|held| held.arrival.change.is_some()).count()
}

/// See the module.
#[derive(Default)]
pub struct Order {
    users: HashMap<Arc<str>, Vec<Held>>,
    /// Users whose logs a worker is reading: what they do now may be in what it tells later.
    looked_at: HashSet<Arc<str>>,
    /// Users by the ends of their held records' patience.
    deadlines: BTreeSet<(u64, Arc<str>)>,
    bytes: usize,
}

impl Order {
    /// A record came. What may leave is added to `released`, what has to be read from the log to `holes`.
    pub fn arrive(
        &mut self,
        arrival: Arrival,
        record_spans: Vec<Span>,
        now_ms: u64,
        spans: &mut Spans,
        released: &mut Vec<Release>,
        holes: &mut Vec<Hole>,
    ) {
        let needs: Vec<Need> = record_spans.iter().map(Need::of).collect();
        for (span, need) in record_spans.iter().zip(&needs) {
            spans.insert(span, need);
        }
        let user = arrival.user.clone();
        let is_free = !self.users.contains_key(&user) && !self.looked_at.contains(&user);
        if is_free && needs.iter().all(|need| spans.has(need)) {
            released.push(Release { user, change: arrival.change, spans: record_spans, ack: arrival.ack });
            return;
        }
        let held = Held::new(arrival, record_spans, needs, now_ms);
        self.bytes += held.bytes;
        self.deadlines.insert((held.until_ms, user.clone()));
        let of_user = self.users.entry(user.clone()).or_default();
        of_user.push(held);
        if of_user.iter().filter(|held| held.arrival.change.is_some()).count() > HELD_PER_USER_MAX {
            self.give_up(&user, spans, holes);
        }
        self.look_again(&user, spans, released);
        if self.bytes > HELD_BYTES_MAX {
            let users: Vec<Arc<str>> = self.users.keys().cloned().collect();
            users.iter().for_each(|user| self.give_up(user, spans, holes));
        }
    }

    /// The user's records are given up: they will be read from the logs.
    fn give_up(&mut self, user: &Arc<str>, spans: &mut Spans, holes: &mut Vec<Hole>) {
        for held in self.users.remove(user).unwrap_or_default() {
            self.bytes -= held.bytes;
            held.needs.iter().for_each(|need| spans.set_back(need));
        }
        holes.push(Hole { user: user.clone(), mailbox: None });
    }

    /// Releases what of the user no longer has to wait, because other spans became known.
    pub fn look_again(&mut self, user: &Arc<str>, spans: &Spans, released: &mut Vec<Release>) {
        if self.looked_at.contains(user) {
            return;
        }
        let Some(held) = self.users.get_mut(user) else { return };
        while let Some(ready) =
            (0..held.len()).find(|at| may_leave(held, *at, spans)).or_else(|| in_circle(held, spans))
        {
            let mut ready = held.remove(ready);
            self.bytes -= ready.bytes;
            ready.hand_over(held);
            released.push(ready.release());
        }
        if held.is_empty() {
            self.users.remove(user);
        }
    }

    /// A worker reads the user's logs: until [`Order::look_ends`] nothing of the user leaves, or what the worker read would
    /// be told again, behind what came after it.
    pub fn look_begins(&mut self, user: &Arc<str>) {
        self.looked_at.insert(user.clone());
    }

    /// What still waits for a hole then says so again, soon.
    pub fn look_ends(&mut self, user: &Arc<str>, now_ms: u64, spans: &Spans, released: &mut Vec<Release>) {
        self.looked_at.remove(user);
        self.look_again(user, spans, released);
        for held in self.users.get_mut(user).into_iter().flatten().filter(|held| held.said > 0) {
            held.until_ms = now_ms + HOLD_MS_MAX;
            self.deadlines.insert((held.until_ms, user.clone()));
        }
    }

    /// What a worker has read in the log itself is not told a second time by what waits. How many changes that were.
    pub fn drop_healed(&mut self, user: &Arc<str>, spans: &Spans) -> u64 {
        let held = self.users.get_mut(user).map(Vec::as_mut_slice).unwrap_or_default();
        let is_healed = |held: &Held| {
            // No log says what happened to mailboxes themselves.
            let of_messages = held.arrival.change.as_ref().is_none_or(change::is_of_messages);
            of_messages
                && !held.spans.is_empty()
                && held.spans.iter().zip(&held.needs).all(|(span, need)| spans.is_healed(span, need))
        };
        let told = held.iter_mut().filter(|held| is_healed(held)).filter_map(|held| held.arrival.change.take());
        told.count() as u64
    }

    /// Says which holes have been waited for long enough. Those of private indexes are of no interest.
    pub fn expire(&mut self, now_ms: u64, spans: &mut Spans, released: &mut Vec<Release>, holes: &mut Vec<Hole>) {
        while self.deadlines.first().is_some_and(|(until, _)| *until <= now_ms) {
            let Some((until_ms, user)) = self.deadlines.pop_first() else {
                break;
            };
            if self.looked_at.contains(&user) {
                // Its end says what comes next.
                self.deadlines.insert((now_ms + HOLD_MS_MAX, user));
                continue;
            }
            let Some(all) = self.users.get_mut(&user) else { continue };
            if all.iter().any(|held| held.said >= SAID_MAX && held.until_ms <= until_ms) {
                // The log does not fill them. It will be read from the last place that is known.
                self.give_up(&user, spans, holes);
                continue;
            }
            for held in all.iter_mut().filter(|held| held.until_ms <= until_ms) {
                held.said += 1;
                held.until_ms = now_ms + SAID_MS_MAX;
                self.deadlines.insert((held.until_ms, user.clone()));
                for need in &held.needs {
                    if need.log.is_private() {
                        spans.give_up(need);
                    } else if !spans.has(need) {
                        let mailbox = Some((need.log.mailbox_guid.clone(), need.place));
                        holes.push(Hole { user: user.clone(), mailbox });
                    }
                }
            }
            self.look_again(&user, spans, released);
        }
    }

    /// The mailbox's holes will never be filled: it is gone.
    pub fn forget_mailbox(&mut self, user: &Arc<str>, mailbox: &[u8], spans: &mut Spans, released: &mut Vec<Release>) {
        self.forget(user, |need| need.log.mailbox_guid == mailbox, spans, released);
    }

    /// The same for one of its logs: GUID and index.
    pub fn forget_log(
        &mut self,
        user: &Arc<str>,
        (mailbox, index_id): (&[u8], u32),
        spans: &mut Spans,
        released: &mut Vec<Release>,
    ) {
        let is_it = |need: &Need| need.log.mailbox_guid == mailbox && need.log.index_id == index_id;
        self.forget(user, is_it, spans, released);
    }

    fn forget(
        &mut self,
        user: &Arc<str>,
        is_it: impl Fn(&Need) -> bool,
        spans: &mut Spans,
        released: &mut Vec<Release>,
    ) {
        let Some(held) = self.users.get(user) else { return };
        let needs: Vec<Need> = held.iter().flat_map(|held| held.needs.clone()).collect();
        for need in needs.iter().filter(|need| is_it(need)) {
            spans.give_up(need);
        }
        self.look_again(user, spans, released);
    }

    /// Whether something of the user is held.
    pub fn holds(&self, user: &str) -> bool {
        self.users.contains_key(user)
    }

    /// Changes that are held.
    pub fn held(&self) -> usize {
        self.users.values().map(|held| count_changes(held)).sum()
    }

    /// The same, of one user.
    pub fn held_of(&self, user: &str) -> usize {
        self.users.get(user).map_or(0, |held| count_changes(held))
    }

    /// When [`Order::expire`] has something to do.
    pub fn wake_up_ms(&self) -> Option<u64> {
        self.deadlines.first().map(|(until, _)| *until)
    }
}

fn may_leave(held: &[Held], at: usize, spans: &Spans) -> bool {
    is_complete(held, at, spans) && !(0..held.len()).any(|other| waits_for(held, at, other))
}

fn is_complete(held: &[Held], at: usize, spans: &Spans) -> bool {
    held[at].needs.iter().all(|need| spans.has(need))
}

/// What is before it, and, if it takes something away, saves that came before it. The order of arrival says less than that
/// of the logs: a save that itself has to wait for this one does not hold it.
fn waits_for(held: &[Held], at: usize, other: usize) -> bool {
    let is_save_before = || held[at].is_destructive && other < at && held[other].has_saves;
    other != at && (held[other].goes_before(&held[at], other < at) || is_save_before() && !follows(held, at, other))
}

/// The first to come of some that wait only for each other: a record can hold several places of a log, and so come both
/// before and after another. One that takes nothing away is preferred.
fn in_circle(held: &[Held], spans: &Spans) -> Option<usize> {
    let stuck = |at: &usize| {
        let mut reached = vec![false; held.len()];
        let mut to_visit = vec![*at];
        while let Some(next) = to_visit.pop() {
            if !is_complete(held, next, spans) {
                return false;
            }
            let new: Vec<usize> =
                (0..held.len()).filter(|other| !reached[*other] && waits_for(held, next, *other)).collect();
            new.iter().for_each(|other| reached[*other] = true);
            to_visit.extend(new);
        }
        reached[*at]
    };
    let stuck: Vec<usize> = (0..held.len()).filter(stuck).collect();
    stuck.iter().find(|at| !held[**at].is_destructive).or(stuck.first()).copied()
}

/// Whether `last` happened after `first`, maybe with others in between.
fn follows(held: &[Held], first: usize, last: usize) -> bool {
    let mut reached = vec![false; held.len()];
    let mut to_visit = vec![first];
    while let Some(at) = to_visit.pop() {
        for next in 0..held.len() {
            if next != at && !reached[next] && held[at].goes_before(&held[next], at < next) {
                reached[next] = true;
                to_visit.push(next);
            }
        }
    }
    reached[last]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::proto::{op::What, Expunge, FlagUpdate, Mailbox, Op, Save};

    #[derive(Default)]
    struct Given {
        order: Order,
        spans: Spans,
        holes: Vec<Hole>,
        now_ms: u64,
        names: u64,
    }

    fn span(mailbox: u8, begin: u64, end: u64) -> Span {
        Span { user: "jane".into(), mailbox_guid: vec![mailbox; 16], log_seq: 2, begin, end, ..Default::default() }
    }

    fn save() -> What {
        What::Save(Save::default())
    }

    fn expunge() -> What {
        What::Expunge(Expunge::default())
    }

    fn flags() -> What {
        What::Flags(FlagUpdate::default())
    }

    impl Given {
        /// A record with a change; what is released because of it, by the order of arrival from 1.
        fn arrives(&mut self, connection: usize, what: What, spans: &[Span]) -> Vec<u32> {
            self.names += 1;
            let mailbox = Mailbox { uid_next: self.names as u32, ..Default::default() };
            let change = Change { mailbox: Some(mailbox), ops: vec![Op { what: Some(what) }], ..Default::default() };
            self.take(connection, Some(change), spans)
        }

        fn take(&mut self, connection: usize, change: Option<Change>, spans: &[Span]) -> Vec<u32> {
            let arrival = Arrival { connection, user: "jane".into(), change, ack: None };
            let mut released = Vec::new();
            let Given { order, spans: known, holes, now_ms, .. } = self;
            order.arrive(arrival, spans.to_vec(), *now_ms, known, &mut released, holes);
            names(released)
        }

        /// The log was read up to there.
        fn healed(&mut self, mailbox: u8, from: u64, to: u64) -> Vec<u32> {
            let need = Need::of(&span(mailbox, from, to));
            self.spans.heal(&need, (2, from), (2, to));
            let mut released = Vec::new();
            self.order.look_again(&"jane".into(), &self.spans, &mut released);
            names(released)
        }

        /// The holes that were said since the last call, by mailbox and end.
        fn holes(&mut self) -> Vec<Option<(u8, u64)>> {
            let holes = std::mem::take(&mut self.holes);
            holes.into_iter().map(|hole| hole.mailbox.map(|(guid, place)| (guid[0], place.1))).collect()
        }

        fn later(&mut self, ms: u64) -> Vec<u32> {
            self.now_ms += ms;
            let mut released = Vec::new();
            self.order.expire(self.now_ms, &mut self.spans, &mut released, &mut self.holes);
            names(released)
        }
    }

    fn names(released: Vec<Release>) -> Vec<u32> {
        released.iter().filter_map(|release| Some(release.change.as_ref()?.mailbox.as_ref()?.uid_next)).collect()
    }

    #[test]
    fn what_follows_leaves_at_once() {
        let mut given = Given::default();
        assert_eq!(given.arrives(1, save(), &[span(1, 100, 200)]), [1]);
        assert_eq!(given.arrives(2, flags(), &[span(1, 200, 250)]), [2]);
        assert_eq!(given.take(2, None, &[span(1, 250, 260)]), Vec::<u32>::new());
        assert_eq!(given.arrives(1, expunge(), &[span(1, 260, 270), span(1, 270, 280)]), [3]);
        assert_eq!((given.holes.len(), given.order.users.len(), given.order.bytes), (0, 0, 0));
    }

    #[test]
    fn a_straggler_is_waited_for_and_leaves_first() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        assert_eq!(given.arrives(2, flags(), &[span(1, 300, 350)]), Vec::<u32>::new());
        assert_eq!(given.arrives(1, save(), &[span(1, 200, 300)]), [3, 2]);
        assert_eq!(given.later(HOLD_MS_MAX), Vec::<u32>::new());
        assert_eq!(given.holes(), vec![]);
    }

    #[test]
    fn a_hole_that_stays_is_to_be_read_and_holds_until_then() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        assert_eq!(given.arrives(2, flags(), &[span(1, 300, 350)]), Vec::<u32>::new());
        assert_eq!(given.arrives(2, flags(), &[span(1, 350, 360)]), Vec::<u32>::new());
        given.later(HOLD_MS_MAX - 1);
        assert_eq!(given.holes(), vec![]);
        assert_eq!(given.later(1), Vec::<u32>::new());
        assert_eq!(given.holes(), vec![Some((1, 300)), Some((1, 350))]);
        assert_eq!(given.later(SAID_MS_MAX - 1), Vec::<u32>::new());
        assert_eq!(given.holes(), vec![], "said once");
        assert_eq!(given.healed(1, 200, 300), [2, 3]);
        assert_eq!(given.order.bytes, 0);
    }

    #[test]
    fn records_whose_hole_cannot_be_read_are_given_up_and_read_later() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        given.arrives(2, flags(), &[span(1, 300, 350)]);
        given.later(HOLD_MS_MAX);
        assert_eq!(given.holes(), vec![Some((1, 300))]);
        for _ in 1..SAID_MAX {
            assert_eq!(given.later(SAID_MS_MAX), Vec::<u32>::new());
            assert_eq!(given.holes(), vec![Some((1, 300))]);
        }
        assert_eq!(given.later(SAID_MS_MAX), Vec::<u32>::new());
        assert_eq!((given.holes(), given.order.bytes, given.order.users.len()), (vec![None], 0, 0));
        assert_eq!(given.healed(1, 200, 360), Vec::<u32>::new());
        assert_eq!(given.arrives(1, flags(), &[span(1, 360, 370)]), [3]);
    }

    #[test]
    fn what_was_written_to_a_log_that_is_gone_waits_for_nothing() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        assert_eq!(given.arrives(2, save(), &[span(1, 300, 350)]), Vec::<u32>::new());
        let mut released = Vec::new();
        let jane: Arc<str> = "jane".into();
        given.order.forget_log(&jane, (&[1; 16], 7), &mut given.spans, &mut released);
        assert!(released.is_empty(), "that of another index");
        given.order.forget_log(&jane, (&[1; 16], 0), &mut given.spans, &mut released);
        assert_eq!(names(released), [2]);
    }

    #[test]
    fn holes_in_private_indexes_are_of_no_interest() {
        let mut given = Given::default();
        let private = |begin, end| Span { private_user: "joe".into(), ..span(1, begin, end) };
        given.take(1, None, &[private(100, 200)]);
        assert_eq!(given.arrives(2, flags(), &[private(300, 400)]), Vec::<u32>::new());
        assert_eq!(given.later(HOLD_MS_MAX), [1]);
        assert_eq!(given.holes(), vec![]);
    }

    #[test]
    fn spans_without_a_change_fill_holes_and_make_holes() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        given.take(2, None, &[span(1, 300, 350)]);
        given.later(HOLD_MS_MAX);
        assert_eq!(given.holes(), vec![Some((1, 300))]);
        assert_eq!(given.healed(1, 200, 300), Vec::<u32>::new());
        assert_eq!(given.arrives(1, flags(), &[span(1, 350, 360)]), [2]);
    }

    #[test]
    fn an_expunge_does_not_overtake_a_held_save_to_another_mailbox() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        given.arrives(1, save(), &[span(2, 100, 200)]);
        assert_eq!(given.arrives(1, save(), &[span(1, 300, 400)]), Vec::<u32>::new(), "a copy, held for a straggler");
        assert_eq!(given.arrives(2, flags(), &[span(2, 200, 210)]), [4], "flags of others may overtake");
        assert_eq!(given.arrives(2, expunge(), &[span(2, 210, 220)]), Vec::<u32>::new());
        assert_eq!(given.take(3, None, &[span(1, 200, 300)]), [3, 5]);
    }

    #[test]
    fn what_is_given_up_while_a_worker_reads_is_not_known() {
        let mut given = Given::default();
        let jane: Arc<str> = "jane".into();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        given.order.look_begins(&jane);
        for n in 0..HELD_PER_USER_MAX as u64 + 1 {
            given.arrives(1, save(), &[span(1, 200 + 10 * n, 210 + 10 * n)]);
        }
        assert_eq!(given.holes(), vec![None]);
        let end = 210 + 10 * HELD_PER_USER_MAX as u64;
        given.arrives(1, save(), &[span(1, end, end + 10)]);
        let mut released = Vec::new();
        given.order.look_ends(&jane, given.now_ms, &given.spans, &mut released);
        assert_eq!(names(released), Vec::<u32>::new(), "what was given up is a hole before it");
        assert_eq!(given.healed(1, 200, end), [HELD_PER_USER_MAX as u32 + 3]);
    }

    #[test]
    fn what_is_told_while_a_worker_reads_waits_and_is_not_told_twice() {
        let mut given = Given::default();
        let jane: Arc<str> = "jane".into();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        given.order.look_begins(&jane);
        assert_eq!(given.arrives(1, save(), &[span(1, 200, 300)]), Vec::<u32>::new());
        assert_eq!(given.arrives(2, expunge(), &[span(1, 300, 400)]), Vec::<u32>::new());
        // It read to 300.
        given.spans.heal(&Need::of(&span(1, 100, 300)), (2, 100), (2, 300));
        assert_eq!(given.order.drop_healed(&jane, &given.spans), 1);
        let mut released = Vec::new();
        given.order.look_ends(&jane, given.now_ms, &given.spans, &mut released);
        assert_eq!(names(released), [3]);
        assert_eq!(given.arrives(2, flags(), &[span(1, 400, 500)]), [4]);
    }

    #[test]
    fn an_expunge_does_not_wait_for_a_save_that_waits_for_it() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        assert_eq!(given.arrives(1, save(), &[span(1, 300, 400)]), Vec::<u32>::new());
        assert_eq!(given.arrives(2, expunge(), &[span(1, 200, 300)]), [3, 2]);
        // With one in between.
        assert_eq!(given.arrives(1, save(), &[span(1, 500, 600)]), Vec::<u32>::new());
        given.arrives(3, flags(), &[span(2, 100, 200)]);
        assert_eq!(given.arrives(3, expunge(), &[span(2, 200, 210)]), Vec::<u32>::new());
        assert_eq!(given.arrives(3, flags(), &[span(1, 400, 500)]), [6, 7, 4]);
    }

    #[test]
    fn one_connection_stays_in_order() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        assert_eq!(given.arrives(1, flags(), &[span(1, 300, 400)]), Vec::<u32>::new());
        assert_eq!(given.arrives(1, flags(), &[span(2, 100, 200)]), Vec::<u32>::new());
        given.later(HOLD_MS_MAX);
        assert_eq!(given.healed(1, 200, 300), [2, 3]);
    }

    #[test]
    fn one_log_stays_in_order_when_its_straggler_is_held_itself() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        given.arrives(1, save(), &[span(2, 100, 200)]);
        assert_eq!(
            given.arrives(1, flags(), &[span(2, 300, 400)]),
            Vec::<u32>::new(),
            "held for a hole in the other mailbox"
        );
        assert_eq!(given.arrives(2, flags(), &[span(1, 300, 350)]), Vec::<u32>::new());
        assert_eq!(
            given.arrives(1, save(), &[span(1, 200, 300)]),
            Vec::<u32>::new(),
            "fills the hole, but waits for its connection"
        );
        assert_eq!(given.take(3, None, &[span(2, 200, 300)]), [3, 5, 4]);
    }

    #[test]
    fn the_first_that_is_heard_of_a_log_may_not_be_its_first() {
        let mut given = Given::default();
        assert_eq!(given.arrives(1, save(), &[span(1, 400, 500)]), Vec::<u32>::new());
        assert_eq!(given.arrives(2, save(), &[span(1, 100, 400)]), [2, 1]);
        // Of a mailbox that was there before us, or whose first mails nobody told of.
        assert_eq!(given.arrives(1, save(), &[span(2, 4000, 4100)]), Vec::<u32>::new());
        assert_eq!(given.arrives(2, save(), &[span(2, 4100, 4200)]), Vec::<u32>::new());
        assert_eq!(given.later(HOLD_MS_MAX), Vec::<u32>::new());
        assert_eq!(given.holes()[0], Some((2, 4000)));
        assert_eq!(given.healed(2, 40, 4000), [3, 4]);
    }

    #[test]
    fn only_what_touches_messages_orders_changes() {
        let mut given = Given::default();
        let jane: Arc<str> = "jane".into();
        let touching = |mailbox, begin, end| Span { touches: true, ..span(mailbox, begin, end) };
        given.arrives(1, save(), &[touching(1, 100, 200)]);
        given.order.look_begins(&jane);
        given.arrives(1, save(), &[span(1, 200, 210), touching(1, 220, 230)]);
        given.arrives(2, save(), &[touching(1, 210, 220)]);
        let mut released = Vec::new();
        given.order.look_ends(&jane, given.now_ms, &given.spans, &mut released);
        assert_eq!(names(released), [3, 2]);
    }

    #[test]
    fn a_log_is_not_known_behind_a_change_that_is_held() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        given.arrives(1, save(), &[span(2, 100, 200)]);
        // Held by a hole in the other mailbox, on one connection.
        given.arrives(2, flags(), &[span(2, 300, 400)]);
        given.arrives(2, flags(), &[span(1, 200, 300)]);
        let arrival = Arrival { connection: 3, user: "jane".into(), change: None, ack: None };
        let mut released = Vec::new();
        let Given { order, spans, holes, now_ms, .. } = &mut given;
        order.arrive(arrival, vec![span(1, 300, 400)], *now_ms, spans, &mut released, holes);
        assert!(released.iter().all(|release| release.spans.is_empty()), "{released:?}");
        let mut released = Vec::new();
        let arrival = Arrival { connection: 3, user: "jane".into(), change: None, ack: None };
        order.arrive(arrival, vec![span(2, 200, 300)], *now_ms, spans, &mut released, holes);
        let last = released
            .iter()
            .flat_map(|release| &release.spans)
            .map(|span| (span.mailbox_guid[0], span.end))
            .max_by_key(|(m, end)| (*m == 1, *end));
        assert_eq!(last, Some((1, 400)));
    }

    #[test]
    fn what_a_held_change_takes_over_is_bounded() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        given.arrives(1, save(), &[span(2, 100, 200)]);
        given.arrives(2, flags(), &[span(2, 300, 400)]);
        given.arrives(2, flags(), &[span(1, 200, 300)]);
        for n in 0..10_000 {
            given.take(3, None, &[span(1, 300 + n, 301 + n)]);
        }
        let held = given.order.users.values().flatten();
        assert_eq!(held.map(|held| held.spans.len()).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(given.take(3, None, &[span(2, 200, 300)]), [3, 4]);
    }

    #[test]
    fn records_that_wait_for_each_other_leave() {
        let mut given = Given::default();
        let jane: Arc<str> = "jane".into();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        given.arrives(1, save(), &[span(2, 100, 200)]);
        given.order.look_begins(&jane);
        given.arrives(1, flags(), &[span(2, 210, 220)]);
        given.arrives(1, expunge(), &[span(1, 200, 210), span(1, 220, 230)]);
        given.arrives(2, save(), &[span(1, 210, 220)]);
        given.arrives(2, flags(), &[span(2, 200, 210)]);
        let mut released = Vec::new();
        given.order.look_ends(&jane, given.now_ms, &given.spans, &mut released);
        assert_eq!(names(released), [3, 4, 5, 6]);
        assert_eq!(given.order.bytes, 0);
    }

    #[test]
    fn where_too_many_wait_they_are_given_up_to_be_read() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        for n in 0..HELD_PER_USER_MAX as u64 + 1 {
            given.arrives(1, flags(), &[span(1, 1000 + 10 * n, 1001 + 10 * n)]);
        }
        assert_eq!(given.holes(), vec![None]);
        assert_eq!((given.order.bytes, given.order.users.len()), (0, 0));
        given.later(HOLD_MS_MAX);
        assert_eq!((given.holes(), given.order.deadlines.len()), (vec![], 0));
        assert_eq!(given.healed(1, 200, 9000), Vec::<u32>::new());
        assert_eq!(given.arrives(1, flags(), &[span(1, 9000, 9010)]).len(), 1);
    }
}
