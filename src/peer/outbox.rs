//! The changes that one peer has not acknowledged yet, in order for each user.
//!
//! Guarantees that a user's changes leave in the order in which they were appended, that one user whose changes are
//! refused holds up no other, that no more than a window of them is on its way, and that the memory stays below the
//! limit (half of it for one user): what does not fit stays in the journal, and [`Outbox::wants`] says what of it should
//! be loaded when there is room. The encoded change is shared with the other peers' outboxes.
//!
//! A change of another server that is passed on may reach the peer by itself as well. While that is to be expected it is
//! held back for a while, and the user's later ones with it: mostly the peer says meanwhile that it has it.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::{USER_WINDOW_BYTES, USER_WINDOW_CHANGES, WINDOW_BYTES, WINDOW_CHANGES};

/// First pause after a refusal; it doubles with each further one.
const PAUSE_MS_MIN: u64 = 1_000;
/// Longest pause after a refusal.
const PAUSE_MS_MAX: u64 = 60_000;
/// Changes of a user that stay in memory after a refusal.
const REFUSED_KEPT: usize = 16;
/// What a pending change takes beside its bytes.
const OVERHEAD_BYTES: usize = 160;
/// How long a change is held back that the peer should get from another server.
const EXPECT_MS_MAX: u64 = 10_000;

/// What should be loaded from the journal: what follows a number, of all users or of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    pub user: Option<Arc<str>>,
    pub after: u64,
}

/// A change as the journal gave it.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub user: Arc<str>,
    pub seq: u64,
    pub frame: Arc<[u8]>,
    pub at_us: u64,
    /// Who sends it to the peer as well.
    pub expected: Option<Arc<str>>,
}

/// Counts for the status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutboxStats {
    pub pending: u64,
    pub pending_bytes: u64,
    /// Since when the oldest change in memory waits, in microseconds since 1970.
    pub oldest_us: Option<u64>,
    pub dropped: u64,
    pub acked: u64,
}

/// A user whose changes wait after a refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedUser<'a> {
    pub user: &'a str,
    /// The last reason.
    pub error: &'a str,
    /// When the first of them was made, in microseconds since 1970.
    pub at_us: u64,
    /// None: it is tried now.
    pub next_ms: Option<u64>,
}

struct Pending {
    seq: u64,
    frame: Arc<[u8]>,
    at_us: u64,
    expected: Option<Arc<str>>,
}

impl Pending {
    fn cost(&self) -> usize {
        self.frame.len() + OVERHEAD_BYTES
    }
}

/// One user's pending changes; the first `sent` of them are on their way.
#[derive(Default)]
struct Stream {
    queue: VecDeque<Pending>,
    sent: usize,
    sent_bytes: usize,
    bytes: usize,
    /// Set while nothing may be sent, after a refusal.
    wait_until_ms: Option<u64>,
    /// The last pause; 0 if the last change was not refused.
    pause_ms: u64,
    error: String,
    /// This one was refused and was not sent again.
    refused: Option<u64>,
    /// The next one is held back, or was, until then.
    held_until_ms: Option<(u64, u64)>,
    /// One was held back in vain: none up to this number is.
    not_held: u64,
    /// In the line of users who have something to send.
    lined_up: bool,
}

impl Stream {
    fn may_send(&self) -> bool {
        self.wait_until_ms.is_none()
            && self.sent < self.queue.len()
            && self.sent < USER_WINDOW_CHANGES
            && self.sent_bytes < USER_WINDOW_BYTES
    }
}

/// See the module.
pub struct Outbox {
    bytes_max: usize,
    streams: HashMap<Arc<str>, Stream>,
    /// Users who may send, each once.
    line: VecDeque<Arc<str>>,
    /// Users who wait after a refusal, by the end of their pause.
    waiting: BTreeSet<(u64, Arc<str>)>,
    /// Whose change is on its way under this number.
    on_the_way: HashMap<u64, Arc<str>>,
    on_the_way_bytes: usize,
    bytes: usize,
    /// Also those that are in the journal only.
    pending: u64,
    dropped: u64,
    acked: u64,
    /// What follows this number is in the journal only, for all users.
    tail: Option<u64>,
    /// The same for users with more than their share, up to where the tail begins.
    behind: HashMap<Arc<str>, u64>,
    /// Of these, who has room again.
    hungry: BTreeSet<Arc<str>>,
    /// Servers that the peer is connected with.
    linked: HashSet<Arc<str>>,
    /// The highest number so far.
    last: u64,
}

impl Outbox {
    /// An outbox that takes at most `bytes_max` of memory.
    pub fn new(bytes_max: usize) -> Outbox {
        Outbox {
            bytes_max,
            streams: HashMap::new(),
            line: VecDeque::new(),
            waiting: BTreeSet::new(),
            on_the_way: HashMap::new(),
            on_the_way_bytes: 0,
            bytes: 0,
            pending: 0,
            dropped: 0,
            acked: 0,
            tail: None,
            behind: HashMap::new(),
            hungry: BTreeSet::new(),
            linked: HashSet::new(),
            last: 0,
        }
    }

    /// The peer is connected with these servers and no others: only from those something is to be expected.
    pub fn set_linked(&mut self, servers: impl IntoIterator<Item = Arc<str>>) {
        self.linked = servers.into_iter().collect();
        let users: Vec<Arc<str>> = self.streams.keys().cloned().collect();
        for user in users {
            self.end_hold(&user);
        }
    }

    /// The journal has that many changes from the last start; `dropped` are missing at the peer for good.
    pub fn resume(&mut self, pending: u64, dropped: u64) {
        self.pending = pending;
        self.dropped = dropped;
        self.tail = (pending > 0).then_some(0);
    }

    /// Takes a change of `user`, as the encoded frame that will be sent. `seq` is higher than all before. The journal has
    /// it already, so that it may stay there.
    pub fn append(&mut self, user: &Arc<str>, seq: u64, frame: Arc<[u8]>, at_us: u64) {
        self.append_expected(user, seq, frame, at_us, None);
    }

    /// The same for one that is passed on, if the peer should get it from this server as well.
    pub fn append_expected(
        &mut self,
        user: &Arc<str>,
        seq: u64,
        frame: Arc<[u8]>,
        at_us: u64,
        expected: Option<Arc<str>>,
    ) {
        self.pending += 1;
        self.last = seq;
        if self.tail.is_some() || self.behind.contains_key(user) {
            return;
        }
        let pending = Pending { seq, frame, at_us, expected };
        if self.bytes + pending.cost() > self.bytes_max {
            self.tail = Some(seq - 1);
        } else if !self.has_room(user, &pending) {
            self.behind.insert(user.clone(), seq - 1);
        } else {
            self.push(user, pending);
        }
    }

    /// What of the journal should be loaded now.
    pub fn wants(&self) -> Option<Want> {
        if self.bytes > self.bytes_max / 2 {
            return None;
        }
        if let Some(user) = self.hungry.first() {
            let after = self.behind.get(user).copied().unwrap_or(0);
            return Some(Want { user: Some(user.clone()), after });
        }
        self.tail.map(|after| Want { user: None, after })
    }

    /// Takes what the journal has of what was wanted; `is_all`: it has no more.
    pub fn load(&mut self, want: &Want, loaded: Vec<Loaded>, is_all: bool) {
        match &want.user {
            Some(user) => self.load_of_user(user, loaded, is_all),
            None => self.load_of_all(want.after, loaded, is_all),
        }
    }

    fn load_of_user(&mut self, user: &Arc<str>, loaded: Vec<Loaded>, is_all: bool) {
        self.hungry.remove(user);
        for Loaded { seq, frame, at_us, expected, .. } in loaded {
            if self.tail.is_some_and(|tail| seq > tail) {
                self.behind.remove(user);
                return;
            }
            let pending = Pending { seq, frame, at_us, expected };
            if !self.has_room(user, &pending) {
                self.behind.insert(user.clone(), seq - 1);
                return;
            }
            self.behind.insert(user.clone(), seq);
            self.push(user, pending);
        }
        if is_all {
            self.behind.remove(user);
        } else {
            self.look_for_room(user);
        }
    }

    fn load_of_all(&mut self, after: u64, loaded: Vec<Loaded>, is_all: bool) {
        let mut tail = after;
        for Loaded { user, seq, frame, at_us, expected } in loaded {
            let pending = Pending { seq, frame, at_us, expected };
            if self.bytes > 0 && self.bytes + pending.cost() > self.bytes_max {
                self.tail = Some(tail);
                return;
            }
            tail = seq;
            if self.behind.contains_key(&user) {
                continue;
            }
            if self.has_room(&user, &pending) {
                self.push(&user, pending);
            } else {
                self.behind.insert(user, seq - 1);
            }
        }
        self.tail = (!is_all).then_some(tail);
    }

    /// Whether the change is within the user's share. The first one always is.
    fn has_room(&self, user: &Arc<str>, pending: &Pending) -> bool {
        self.streams.get(user).is_none_or(|stream| stream.bytes + pending.cost() <= self.bytes_max / 2)
    }

    fn push(&mut self, user: &Arc<str>, pending: Pending) {
        self.bytes += pending.cost();
        let stream = self.streams.entry(user.clone()).or_default();
        stream.bytes += pending.cost();
        stream.queue.push_back(pending);
        self.line_up(user);
    }

    /// A user with more in the journal gets it when half of his share is free.
    fn look_for_room(&mut self, user: &Arc<str>) {
        let has_room = match self.streams.get(user) {
            Some(stream) => stream.wait_until_ms.is_none() && stream.bytes <= self.bytes_max / 4,
            None => true,
        };
        if self.behind.contains_key(user) && has_room {
            self.hungry.insert(user.clone());
        }
    }

    /// The next frame to send, if the window has room and some user has one.
    pub fn next(&mut self, now_ms: u64) -> Option<Arc<[u8]>> {
        self.end_pauses(now_ms);
        if self.on_the_way.len() >= WINDOW_CHANGES || self.on_the_way_bytes >= WINDOW_BYTES {
            return None;
        }
        while let Some(user) = self.line.pop_front() {
            let Some(stream) = self.streams.get_mut(&user) else {
                continue;
            };
            stream.lined_up = false;
            if !stream.may_send() {
                continue;
            }
            let next = &stream.queue[stream.sent];
            let is_expected =
                next.seq > stream.not_held && next.expected.as_ref().is_some_and(|server| self.linked.contains(server));
            let hold = stream.held_until_ms.filter(|(seq, _)| *seq == next.seq);
            if is_expected && hold.is_none_or(|(_, until_ms)| now_ms < until_ms) {
                let until_ms = hold.map_or(now_ms + EXPECT_MS_MAX, |(_, until_ms)| until_ms);
                stream.held_until_ms = Some((next.seq, until_ms));
                stream.wait_until_ms = Some(until_ms);
                self.waiting.insert((until_ms, user));
                continue;
            }
            if is_expected {
                // The peer may have said of others before that it has them, and was not heard.
                stream.not_held = self.last.max(next.seq);
            }
            let next = &stream.queue[stream.sent];
            let frame = next.frame.clone();
            stream.sent += 1;
            stream.refused.take_if(|refused| *refused == next.seq);
            stream.sent_bytes += next.cost();
            self.on_the_way_bytes += next.cost();
            self.on_the_way.insert(next.seq, user.clone());
            self.line_up(&user);
            return Some(frame);
        }
        None
    }

    /// The peer has applied this change. False for numbers that are not on their way, which are ignored.
    pub fn ack(&mut self, seq: u64) -> bool {
        let Some(user) = self.on_the_way.remove(&seq) else {
            return false;
        };
        let Some(stream) = self.streams.get_mut(&user) else {
            return false;
        };
        let Some(at) = stream.queue.iter().take(stream.sent).position(|p| p.seq == seq) else {
            return false;
        };
        let Some(done) = stream.queue.remove(at) else { return false };
        stream.sent -= 1;
        stream.sent_bytes -= done.cost();
        stream.bytes -= done.cost();
        stream.pause_ms = 0;
        stream.error.clear();
        self.on_the_way_bytes -= done.cost();
        self.bytes -= done.cost();
        self.pending = self.pending.saturating_sub(1);
        self.acked += 1;
        if stream.queue.is_empty() {
            self.forget(&user);
        } else {
            self.line_up(&user);
        }
        self.look_for_room(&user);
        true
    }

    /// The peer has this change from another server: it need not be sent. False if it was, or must be sent again after a
    /// refusal, because the peer goes on with that one: it will be acknowledged.
    pub fn take_back(&mut self, user: &Arc<str>, seq: u64) -> bool {
        let Some(stream) = self.streams.get_mut(user) else {
            self.pending = self.pending.saturating_sub(1);
            return true;
        };
        let at = stream.queue.iter().position(|pending| pending.seq == seq);
        if at.is_some_and(|at| at < stream.sent) || stream.refused == Some(seq) {
            return false;
        }
        self.pending = self.pending.saturating_sub(1);
        let Some(taken) = at.and_then(|at| stream.queue.remove(at)) else { return true };
        stream.bytes -= taken.cost();
        self.bytes -= taken.cost();
        if stream.queue.is_empty() {
            self.forget(user);
        } else {
            self.end_hold(user);
            self.line_up(user);
        }
        self.look_for_room(user);
        true
    }

    /// The next of the user's changes is looked at again, if it was held back.
    fn end_hold(&mut self, user: &Arc<str>) {
        let Some(stream) = self.streams.get_mut(user) else { return };
        let Some((_, until_ms)) = stream.held_until_ms.filter(|(_, until_ms)| stream.wait_until_ms == Some(*until_ms))
        else {
            return;
        };
        stream.wait_until_ms = None;
        self.waiting.remove(&(until_ms, user.clone()));
        self.line_up(user);
    }

    /// The peer could not apply this change: it and the user's later ones are sent again after a pause, which is
    /// returned if the reason is news. Numbers that are not on their way are ignored.
    pub fn refuse(&mut self, seq: u64, error: &str, now_ms: u64) -> Option<u64> {
        let user = self.on_the_way.get(&seq)?.clone();
        let stream = self.streams.get_mut(&user)?;
        let at = stream.queue.iter().position(|p| p.seq == seq)?;
        for pending in stream.queue.iter().take(stream.sent).skip(at) {
            self.on_the_way.remove(&pending.seq);
            self.on_the_way_bytes -= pending.cost();
            stream.sent_bytes -= pending.cost();
        }
        stream.sent = at;
        stream.refused = Some(seq);
        if let Some(last) = stream.queue.get(at + REFUSED_KEPT - 1).map(|kept| kept.seq) {
            // They wait in the journal: users who are stuck must not take the memory of the others.
            let left: usize = stream.queue.drain(at + REFUSED_KEPT..).map(|p| p.cost()).sum();
            stream.bytes -= left;
            self.bytes -= left;
            if left > 0 || self.behind.contains_key(&user) {
                self.behind.insert(user.clone(), last);
            }
            self.hungry.remove(&user);
        }
        stream.pause_ms = (stream.pause_ms * 2).clamp(PAUSE_MS_MIN, PAUSE_MS_MAX);
        if let Some(until) = stream.wait_until_ms.replace(now_ms + stream.pause_ms) {
            self.waiting.remove(&(until, user.clone()));
        }
        self.waiting.insert((now_ms + stream.pause_ms, user));
        if stream.error == error {
            return None;
        }
        stream.error = error.to_owned();
        Some(stream.pause_ms)
    }

    /// A new session begins: everything that is not acknowledged is sent again, in order.
    pub fn restart(&mut self) {
        self.on_the_way.clear();
        self.on_the_way_bytes = 0;
        self.waiting.clear();
        self.line.clear();
        let mut users: Vec<(u64, Arc<str>)> = Vec::with_capacity(self.streams.len());
        for (user, stream) in &mut self.streams {
            stream.sent = 0;
            stream.sent_bytes = 0;
            stream.wait_until_ms = None;
            stream.refused = None;
            stream.lined_up = false;
            if let Some(first) = stream.queue.front() {
                users.push((first.seq, user.clone()));
            }
        }
        users.sort();
        for (_, user) in users {
            self.line_up(&user);
        }
        let behind: Vec<Arc<str>> = self.behind.keys().cloned().collect();
        behind.iter().for_each(|user| self.look_for_room(user));
    }

    /// The first `count` changes, up to `seq`, need not be sent any more: the peer says, after a reconnect, that it has
    /// applied them, or the journal had no room for them. Only to be called while nothing is on its way, after
    /// [`Outbox::restart`].
    pub fn skip_up_to(&mut self, seq: u64, count: u64) {
        let users: Vec<Arc<str>> = self.streams.keys().cloned().collect();
        for user in users {
            let Some(stream) = self.streams.get_mut(&user) else {
                continue;
            };
            while stream.queue.front().is_some_and(|p| p.seq <= seq) {
                let Some(done) = stream.queue.pop_front() else { break };
                stream.bytes -= done.cost();
                self.bytes -= done.cost();
            }
            if stream.queue.is_empty() {
                self.forget(&user);
            }
            self.look_for_room(&user);
        }
        self.pending = self.pending.saturating_sub(count);
    }

    /// Those that are missing at the peer for good do not matter any more: it was compared.
    pub fn forget_dropped(&mut self) {
        self.dropped = 0;
    }

    /// That many are missing at the peer for good.
    pub fn note_dropped(&mut self, count: u64) {
        self.dropped += count;
    }

    /// When [`Outbox::next`] may have something although nothing else happened.
    pub fn wake_up_ms(&self) -> Option<u64> {
        self.waiting.first().map(|(until, _)| *until)
    }

    /// True if everything is acknowledged but for users whose changes were refused.
    pub fn is_settled(&self) -> bool {
        self.line.is_empty() && self.on_the_way.is_empty()
    }

    /// The users whose changes wait after a refusal, who waits longest first; also while they are tried again.
    pub fn refused(&self) -> Vec<RefusedUser<'_>> {
        let mut refused: Vec<_> = self.streams.iter().filter(|(_, stream)| !stream.error.is_empty()).collect();
        refused.sort_by_key(|(_, stream)| stream.queue.front().map(|first| first.seq));
        let refused = refused.into_iter().map(|(user, stream)| RefusedUser {
            user,
            error: &stream.error,
            at_us: stream.queue.front().map_or(0, |first| first.at_us),
            next_ms: stream.wait_until_ms,
        });
        refused.collect()
    }

    /// Whether the user's changes wait after a refusal, or are tried again.
    pub fn is_refused(&self, user: &str) -> bool {
        self.streams.get(user).is_some_and(|stream| !stream.error.is_empty())
    }

    /// Whether the peer lacks something, here or in the journal.
    pub fn has_pending(&self) -> bool {
        self.pending > 0
    }

    pub fn stats(&self) -> OutboxStats {
        OutboxStats {
            pending: self.pending,
            pending_bytes: self.bytes as u64,
            oldest_us: self.streams.values().filter_map(|s| s.queue.front()).map(|p| p.at_us).min(),
            dropped: self.dropped,
            acked: self.acked,
        }
    }

    /// Since when the user's first change that is not acknowledged waits.
    pub fn oldest_us_of(&self, user: &str) -> Option<u64> {
        self.streams.get(user)?.queue.front().map(|pending| pending.at_us)
    }

    fn line_up(&mut self, user: &Arc<str>) {
        let Some(stream) = self.streams.get_mut(user) else {
            return;
        };
        if !stream.lined_up && stream.may_send() {
            stream.lined_up = true;
            self.line.push_back(user.clone());
        }
    }

    /// Lets users go on whose pause is over; to be called when [`Outbox::wake_up_ms`] has come.
    pub fn end_pauses(&mut self, now_ms: u64) {
        while self.waiting.first().is_some_and(|(until, _)| *until <= now_ms) {
            let Some((_, user)) = self.waiting.pop_first() else {
                return;
            };
            if let Some(stream) = self.streams.get_mut(&user) {
                stream.wait_until_ms = None;
            }
            self.line_up(&user);
            self.look_for_room(&user);
        }
    }

    fn forget(&mut self, user: &Arc<str>) {
        if let Some(Stream { wait_until_ms: Some(until), .. }) = self.streams.remove(user) {
            self.waiting.remove(&(until, user.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Given {
        outbox: Outbox,
        seq: u64,
    }

    impl Given {
        fn outbox() -> Given {
            Given { outbox: Outbox::new(1 << 20), seq: 0 }
        }

        fn refused(&self) -> Vec<(&str, &str, Option<u64>)> {
            self.outbox.refused().into_iter().map(|refused| (refused.user, refused.error, refused.next_ms)).collect()
        }

        fn append(&mut self, user: &str) -> u64 {
            self.seq += 1;
            let frame: Arc<[u8]> = self.seq.to_be_bytes().as_slice().into();
            self.outbox.append(&user.into(), self.seq, frame, 0);
            self.seq
        }

        fn sent(&mut self, now_ms: u64) -> Vec<u64> {
            let mut sent = Vec::new();
            while let Some(frame) = self.outbox.next(now_ms) {
                sent.push(u64::from_be_bytes((&*frame).try_into().unwrap()));
            }
            sent
        }
    }

    #[test]
    fn users_take_turns_and_each_stays_in_order() {
        let mut given = Given::outbox();
        for user in ["jane", "jane", "jane", "joe"] {
            given.append(user);
        }
        assert_eq!(given.sent(0), [1, 4, 2, 3]);
        assert!(!given.outbox.is_settled());
        for seq in 1..=4 {
            given.outbox.ack(seq);
        }
        assert!(given.outbox.is_settled());
        assert_eq!(given.outbox.stats(), OutboxStats { acked: 4, ..Default::default() });
        assert!(given.outbox.streams.is_empty());
    }

    #[test]
    fn a_refused_user_is_sent_again_from_there_after_growing_pauses_and_holds_up_nobody() {
        let mut given = Given::outbox();
        for user in ["jane", "jane", "jane", "joe"] {
            given.append(user);
        }
        given.sent(0);
        given.outbox.ack(1);
        assert_eq!(given.outbox.refuse(2, "disk full", 0), Some(1000));
        given.append("jane");
        given.append("joe");
        assert_eq!(given.sent(999), [6], "joe goes on");
        assert_eq!(given.outbox.wake_up_ms(), Some(1000));
        assert_eq!(given.sent(1000), [2, 3, 5], "jane again from there, in order");
        assert_eq!(given.refused(), [("jane", "disk full", None)], "the try may take its time");
        assert_eq!(given.outbox.refuse(2, "disk full", 1000), None, "no news");
        assert_eq!(given.sent(2999), Vec::<u64>::new());
        assert_eq!(given.sent(3000), [2, 3, 5], "the pause doubled");
        given.outbox.ack(2);
        assert!(given.refused().is_empty());
        assert_eq!(given.outbox.refuse(3, "disk full", 3000), Some(1000), "the pause began again");
    }

    #[test]
    fn of_users_who_are_refused_the_one_who_waits_longest_is_named() {
        let mut given = Given::outbox();
        for user in ["joe", "jane", "jim"] {
            given.append(user);
        }
        given.sent(0);
        for (seq, error) in [(3, "no mailbox"), (2, "disk full")] {
            given.outbox.refuse(seq, error, 0);
        }
        assert_eq!(given.refused(), [("jane", "disk full", Some(1000)), ("jim", "no mailbox", Some(1000))]);
        given.sent(1000);
        assert_eq!(given.refused(), [("jane", "disk full", None), ("jim", "no mailbox", None)]);
        given.outbox.ack(2);
        assert_eq!(given.refused(), [("jim", "no mailbox", None)]);
    }

    #[test]
    fn pauses_end_at_a_minute() {
        let mut given = Given::outbox();
        given.append("jane");
        let mut now_ms = 0;
        for _ in 0..10 {
            assert_eq!(given.sent(now_ms), [1]);
            given.outbox.refuse(1, "no", now_ms);
            now_ms = given.outbox.wake_up_ms().unwrap();
        }
        assert_eq!(given.outbox.wake_up_ms().unwrap() - now_ms, 0);
        given.sent(now_ms);
        given.outbox.refuse(1, "no", now_ms);
        assert_eq!(given.outbox.wake_up_ms().unwrap() - now_ms, PAUSE_MS_MAX);
    }

    #[test]
    fn one_user_takes_only_his_share_of_the_window() {
        let mut given = Given::outbox();
        for _ in 0..USER_WINDOW_CHANGES + 10 {
            given.append("jane");
        }
        let joe = given.append("joe");
        let sent = given.sent(0);
        assert_eq!(sent.len(), USER_WINDOW_CHANGES + 1);
        assert!(sent.contains(&joe));
        given.outbox.ack(1);
        assert_eq!(given.sent(0), [USER_WINDOW_CHANGES as u64 + 1]);
    }

    #[test]
    fn the_window_ends_and_opens_again() {
        let mut given = Given::outbox();
        for n in 0..WINDOW_CHANGES + 1 {
            given.append(&format!("user{n}"));
        }
        assert_eq!(given.sent(0).len(), WINDOW_CHANGES);
        given.outbox.ack(7);
        assert_eq!(given.sent(0).len(), 1);
    }

    #[test]
    fn a_new_session_sends_again_what_was_not_acknowledged() {
        let mut given = Given::outbox();
        for user in ["jane", "joe", "jane", "joe"] {
            given.append(user);
        }
        given.sent(0);
        given.outbox.ack(2);
        given.outbox.refuse(1, "no", 0);
        given.outbox.restart();
        given.outbox.skip_up_to(1, 1);
        assert_eq!(given.sent(0), [3, 4]);
        assert_eq!(given.outbox.stats().pending, 2);
    }

    /// A journal of which an outbox holds a part.
    struct Journaled {
        outbox: Outbox,
        journal: Vec<Loaded>,
        /// Per load.
        most: usize,
    }

    impl Journaled {
        fn append(&mut self, user: &str) {
            let seq = self.journal.last().map_or(1, |last| last.seq + 1);
            let mut frame = vec![0; 800];
            frame[..8].copy_from_slice(&seq.to_be_bytes());
            let stored = Loaded { user: user.into(), seq, frame: frame.into(), at_us: seq, expected: None };
            self.outbox.append(&stored.user, seq, stored.frame.clone(), seq);
            self.journal.push(stored);
        }

        fn load(&mut self) {
            while let Some(want) = self.outbox.wants() {
                let matches = |stored: &&Loaded| {
                    stored.seq > want.after && want.user.as_ref().is_none_or(|user| *user == stored.user)
                };
                let all: Vec<Loaded> = self.journal.iter().filter(matches).cloned().collect();
                let is_all = all.len() <= self.most;
                self.outbox.load(&want, all.into_iter().take(self.most).collect(), is_all);
            }
            assert!(self.outbox.bytes <= self.outbox.bytes_max);
        }

        fn sent(&mut self) -> Vec<u64> {
            self.load();
            let mut sent = Vec::new();
            while let Some(frame) = self.outbox.next(0) {
                sent.push(u64::from_be_bytes(frame[..8].try_into().unwrap()));
            }
            sent
        }
    }

    #[test]
    fn what_does_not_fit_is_loaded_from_the_journal_in_order_for_each_user() {
        for most in [1, 2, 7, 1000] {
            let mut given = Journaled { outbox: Outbox::new(5_000), journal: Vec::new(), most };
            for n in 0..60 {
                given.append(if n % 3 == 0 { "joe" } else { "jane" });
            }
            let mut sent = Vec::new();
            while sent.len() < 60 {
                let now = given.sent();
                assert!(!now.is_empty(), "stuck after {sent:?}");
                for seq in &now {
                    given.outbox.ack(*seq);
                    given.journal.retain(|stored| stored.seq != *seq);
                }
                sent.extend(now);
                if sent.len() == 30 {
                    given.append("joe");
                }
            }
            let of_joe: Vec<u64> = sent.iter().copied().filter(|seq| seq % 3 == 1).collect();
            assert!(of_joe.is_sorted() && sent.iter().filter(|seq| *seq % 3 != 1).is_sorted(), "{sent:?}");
            sent.sort();
            assert_eq!(sent, (1..=60).collect::<Vec<u64>>());
        }
    }

    #[test]
    fn a_user_who_is_stuck_does_not_fill_the_memory() {
        let mut given = Journaled { outbox: Outbox::new(10_000), journal: Vec::new(), most: 3 };
        for _ in 0..20 {
            given.append("jane");
        }
        given.append("joe");
        let sent = given.sent();
        assert!(sent.contains(&21), "{sent:?}");
        given.outbox.refuse(1, "no", 0);
        assert_eq!(given.outbox.stats().pending, 21);
        given.outbox.restart();
        assert_eq!(given.sent().first(), Some(&1));
    }

    #[test]
    fn a_start_begins_with_what_the_journal_has() {
        let mut given = Journaled { outbox: Outbox::new(10_000), journal: Vec::new(), most: 3 };
        for user in ["jane", "joe", "jane"] {
            given.append(user);
        }
        given.outbox = Outbox::new(10_000);
        given.outbox.resume(3, 5);
        assert_eq!(given.sent(), [1, 2, 3]);
        let stats = given.outbox.stats();
        assert_eq!((stats.pending, stats.dropped, stats.oldest_us), (3, 5, Some(1)));
    }

    #[test]
    fn what_the_peer_should_get_from_another_server_is_held_back_for_a_while() {
        let mut given = Given::outbox();
        let from_a: Arc<str> = "a".into();
        let expected = |given: &mut Given, user: &str| {
            given.seq += 1;
            let frame: Arc<[u8]> = given.seq.to_be_bytes().as_slice().into();
            given.outbox.append_expected(&user.into(), given.seq, frame, 0, Some(from_a.clone()));
        };
        given.outbox.set_linked([from_a.clone()]);
        given.append("jane");
        expected(&mut given, "jane");
        given.append("jane");
        given.append("joe");
        assert_eq!(given.sent(0), [1, 4], "the user's next ones come behind it");
        assert!(given.refused().is_empty());
        assert!(!given.outbox.take_back(&"jane".into(), 1), "it is on its way");
        assert!(given.outbox.take_back(&"jane".into(), 2));
        assert_eq!(given.sent(1), [3]);
        expected(&mut given, "joe");
        expected(&mut given, "jim");
        assert!(given.sent(2).is_empty());
        assert_eq!(given.sent(EXPECT_MS_MAX + 2), [6, 5], "it does not come");
        expected(&mut given, "jim");
        assert!(given.sent(EXPECT_MS_MAX + 3).is_empty());
        given.outbox.set_linked([]);
        assert_eq!(given.sent(EXPECT_MS_MAX + 3), [7], "it will not come");
        given.outbox.refuse(7, "disk full", EXPECT_MS_MAX + 4);
        assert!(!given.outbox.take_back(&"jim".into(), 7), "the peer waits for it");
    }
}
