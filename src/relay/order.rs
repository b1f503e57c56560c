//! The order in which the changes of one user leave, although processes that race tell of them in any order.
//!
//! A record is held while something before one of its spans is missing, for a short time: two processes may race, a
//! process that was killed will never tell. Guarantees that records of one connection and of one log leave in their
//! order, and that nothing destructive overtakes a save that came before it: the expunge of a MOVE would drop the
//! only copy. When the time is over the record leaves and the hole is counted.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use prost::Message;

use super::spans::{Need, Spans};
use crate::change;
use crate::wire::proto::{Change, Span};

/// How long stragglers are waited for: on a busy machine a process may not run for a while between its commit and its
/// send, and what left in the wrong order is applied under other UIDs.
pub const HOLD_MS_MAX: u64 = 1_000;
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
}

/// A change that may leave now.
#[derive(Debug)]
pub struct Release {
    pub user: Arc<str>,
    pub change: Change,
}

struct Held {
    arrival: Arrival,
    needs: Vec<Need>,
    has_saves: bool,
    is_destructive: bool,
    bytes: usize,
    until_ms: u64,
}

impl Held {
    fn new(arrival: Arrival, needs: Vec<Need>, now_ms: u64) -> Held {
        Held {
            has_saves: arrival.change.as_ref().is_some_and(change::has_saves),
            is_destructive: arrival.change.as_ref().is_some_and(change::is_destructive),
            bytes: arrival.change.as_ref().map_or(0, Change::encoded_len) + 128 * (1 + needs.len()),
            until_ms: now_ms + HOLD_MS_MAX,
            arrival,
            needs,
        }
    }

    /// Whether this one must leave before `other`, which came `later` or earlier.
    fn goes_before(&self, other: &Held, came_first: bool) -> bool {
        if self.arrival.connection == other.arrival.connection {
            return came_first;
        }
        if came_first && self.has_saves && other.is_destructive {
            return true;
        }
        let first_in = |held: &Held, need: &Need| held.needs.iter().find(|n| n.log == need.log).map(|n| n.place);
        other.needs.iter().any(|need| match (first_in(self, need), first_in(other, need)) {
            (Some(mine), Some(others)) => mine < others,
            _ => false,
        })
    }
}

/// See the module.
#[derive(Default)]
pub struct Order {
    users: HashMap<Arc<str>, Vec<Held>>,
    /// Users by the time of their held records, which all wait equally long.
    deadlines: VecDeque<(u64, Arc<str>)>,
    bytes: usize,
}

impl Order {
    /// A record came. What may leave is added to `released`; the holes that were given up are returned.
    pub fn arrive(
        &mut self,
        arrival: Arrival,
        record_spans: &[Span],
        now_ms: u64,
        spans: &mut Spans,
        released: &mut Vec<Release>,
    ) -> u64 {
        let needs: Vec<Need> = record_spans.iter().map(Need::of).collect();
        let mut gaps = 0;
        for (span, need) in record_spans.iter().zip(&needs) {
            gaps += spans.insert(span, need);
        }
        let user = arrival.user.clone();
        if !self.users.contains_key(&user) && needs.iter().all(|need| spans.has(need)) {
            released.extend(arrival.change.map(|change| Release { user, change }));
            return gaps;
        }
        let held = Held::new(arrival, needs, now_ms);
        self.bytes += held.bytes;
        self.deadlines.push_back((held.until_ms, user.clone()));
        let of_user = self.users.entry(user.clone()).or_default();
        of_user.push(held);
        if of_user.len() > HELD_PER_USER_MAX {
            return gaps + self.give_up_oldest(&user, spans, released);
        }
        self.look_again(&user, spans, released);
        if self.bytes > HELD_BYTES_MAX {
            return gaps + self.expire(u64::MAX, spans, released);
        }
        gaps
    }

    /// Releases what of the user no longer has to wait, because other spans became known.
    pub fn look_again(&mut self, user: &Arc<str>, spans: &Spans, released: &mut Vec<Release>) {
        let Some(held) = self.users.get_mut(user) else { return };
        while let Some(ready) = (0..held.len()).find(|at| may_leave(held, *at, spans)) {
            let held = held.remove(ready);
            self.bytes -= held.bytes;
            released.extend(held.arrival.change.map(|change| Release { user: user.clone(), change }));
        }
        if held.is_empty() {
            self.users.remove(user);
        }
    }

    /// Releases what has waited long enough; the holes that were given up are returned.
    pub fn expire(&mut self, now_ms: u64, spans: &mut Spans, released: &mut Vec<Release>) -> u64 {
        let mut gaps = 0;
        while self.deadlines.front().is_some_and(|(until, _)| *until <= now_ms) {
            let Some((until_ms, user)) = self.deadlines.pop_front() else {
                break;
            };
            while self.users.get(&user).is_some_and(|held| held.iter().any(|h| h.until_ms <= until_ms)) {
                gaps += self.give_up_oldest(&user, spans, released);
            }
        }
        gaps
    }

    /// When [`Order::expire`] has something to do.
    pub fn wake_up_ms(&self) -> Option<u64> {
        self.deadlines.front().map(|(until, _)| *until)
    }

    /// The user's oldest record leaves whatever it waits for, and so does what waited only for it.
    fn give_up_oldest(&mut self, user: &Arc<str>, spans: &mut Spans, released: &mut Vec<Release>) -> u64 {
        let Some(held) = self.users.get_mut(user) else { return 0 };
        let oldest = held.remove(0);
        self.bytes -= oldest.bytes;
        let gaps = oldest.needs.iter().filter(|need| spans.give_up(need)).count() as u64;
        released.extend(oldest.arrival.change.map(|change| Release { user: user.clone(), change }));
        self.look_again(user, spans, released);
        gaps
    }
}

fn may_leave(held: &[Held], at: usize, spans: &Spans) -> bool {
    held[at].needs.iter().all(|need| spans.has(need))
        && held.iter().enumerate().all(|(other, h)| other == at || !h.goes_before(&held[at], other < at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::proto::{op::What, Expunge, FlagUpdate, Mailbox, Op, Save};

    #[derive(Default)]
    struct Given {
        order: Order,
        spans: Spans,
        gaps: u64,
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
            let arrival = Arrival { connection, user: "jane".into(), change };
            let mut released = Vec::new();
            self.gaps += self.order.arrive(arrival, spans, self.now_ms, &mut self.spans, &mut released);
            names(released)
        }

        fn later(&mut self, ms: u64) -> Vec<u32> {
            self.now_ms += ms;
            let mut released = Vec::new();
            self.gaps += self.order.expire(self.now_ms, &mut self.spans, &mut released);
            names(released)
        }
    }

    fn names(released: Vec<Release>) -> Vec<u32> {
        released.iter().map(|release| release.change.mailbox.as_ref().unwrap().uid_next).collect()
    }

    #[test]
    fn what_follows_leaves_at_once() {
        let mut given = Given::default();
        assert_eq!(given.arrives(1, save(), &[span(1, 100, 200)]), [1]);
        assert_eq!(given.arrives(2, flags(), &[span(1, 200, 250)]), [2]);
        assert_eq!(given.take(2, None, &[span(1, 250, 260)]), []);
        assert_eq!(given.arrives(1, expunge(), &[span(1, 260, 270), span(1, 270, 280)]), [3]);
        assert_eq!((given.gaps, given.order.users.len(), given.order.bytes), (0, 0, 0));
    }

    #[test]
    fn a_straggler_is_waited_for_and_leaves_first() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        assert_eq!(given.arrives(2, flags(), &[span(1, 300, 350)]), []);
        assert_eq!(given.arrives(1, save(), &[span(1, 200, 300)]), [3, 2]);
        assert_eq!(given.later(HOLD_MS_MAX), []);
        assert_eq!(given.gaps, 0);
    }

    #[test]
    fn a_hole_that_stays_is_counted_once_and_holds_up_for_a_moment_only() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        assert_eq!(given.arrives(2, flags(), &[span(1, 300, 350)]), []);
        assert_eq!(given.arrives(2, flags(), &[span(1, 350, 360)]), []);
        assert_eq!(given.later(HOLD_MS_MAX - 1), []);
        assert_eq!(given.later(1), [2, 3]);
        assert_eq!(given.gaps, 1);
        assert_eq!(given.order.bytes, 0);
    }

    #[test]
    fn spans_without_a_change_fill_holes_and_make_holes() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        given.take(2, None, &[span(1, 300, 350)]);
        assert_eq!(given.later(HOLD_MS_MAX), []);
        assert_eq!(given.gaps, 1);
        assert_eq!(given.arrives(1, flags(), &[span(1, 350, 360)]), [2]);
    }

    #[test]
    fn an_expunge_does_not_overtake_a_held_save_to_another_mailbox() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        given.arrives(1, save(), &[span(2, 100, 200)]);
        assert_eq!(given.arrives(1, save(), &[span(1, 300, 400)]), [], "a copy, held for a straggler");
        assert_eq!(given.arrives(2, flags(), &[span(2, 200, 210)]), [4], "flags of others may overtake");
        assert_eq!(given.arrives(2, expunge(), &[span(2, 210, 220)]), []);
        assert_eq!(given.take(3, None, &[span(1, 200, 300)]), [3, 5]);
    }

    #[test]
    fn one_connection_stays_in_order() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        assert_eq!(given.arrives(1, flags(), &[span(1, 300, 400)]), []);
        assert_eq!(given.arrives(1, flags(), &[span(2, 100, 200)]), []);
        assert_eq!(given.later(HOLD_MS_MAX), [2, 3]);
    }

    #[test]
    fn one_log_stays_in_order_when_its_straggler_is_held_itself() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        given.arrives(1, save(), &[span(2, 100, 200)]);
        assert_eq!(given.arrives(1, flags(), &[span(2, 300, 400)]), [], "held for a hole in the other mailbox");
        assert_eq!(given.arrives(2, flags(), &[span(1, 300, 350)]), []);
        assert_eq!(given.arrives(1, save(), &[span(1, 200, 300)]), [], "fills the hole, but waits for its connection");
        assert_eq!(given.take(3, None, &[span(2, 200, 300)]), [3, 5, 4]);
    }

    #[test]
    fn what_is_held_is_bounded() {
        let mut given = Given::default();
        given.arrives(1, save(), &[span(1, 100, 200)]);
        let mut released = 0;
        for n in 0..10 * HELD_PER_USER_MAX as u64 {
            released += given.arrives(1, flags(), &[span(1, 1000 + 10 * n, 1001 + 10 * n)]).len();
        }
        assert!(released >= 9 * HELD_PER_USER_MAX);
        assert!(given.order.users.values().all(|held| held.len() <= HELD_PER_USER_MAX));
        given.later(HOLD_MS_MAX);
        assert_eq!((given.order.bytes, given.order.users.len(), given.order.deadlines.len()), (0, 0, 0));
    }
}
