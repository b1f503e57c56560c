//! The changes that one peer has not acknowledged yet, in order for each user.
//!
//! Guarantees that a user's changes leave in the order in which they were appended, that one user whose changes are
//! refused holds up no other, that no more than a window of them is on its way, and that the memory stays below the
//! limit (half of it for one user): what does not fit is dropped and counted. The encoded change is shared with the other peers' outboxes.
//! It lives in memory only; a durable journal takes its place behind the same few functions.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use super::{USER_WINDOW_BYTES, USER_WINDOW_CHANGES, WINDOW_BYTES, WINDOW_CHANGES};

/// First pause after a refusal; it doubles with each further one.
const PAUSE_MS_MIN: u64 = 1_000;
/// Longest pause after a refusal.
const PAUSE_MS_MAX: u64 = 60_000;
/// What a pending change takes beside its bytes.
const OVERHEAD_BYTES: usize = 160;

/// What became of an appended change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Append {
    Kept,
    /// It did not fit, the first since the peer last took something.
    FirstDropped,
    Dropped,
}

/// Counts for the status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutboxStats {
    pub pending: u64,
    pub pending_bytes: u64,
    /// Since when the oldest pending change waits.
    pub oldest_ms: Option<u64>,
    pub dropped: u64,
    pub acked: u64,
}

struct Pending {
    seq: u64,
    frame: Arc<[u8]>,
    appended_ms: u64,
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
    pending: usize,
    dropped: u64,
    dropped_in_outage: u64,
    acked: u64,
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
            dropped_in_outage: 0,
            acked: 0,
        }
    }

    /// Takes a change of `user`, as the encoded frame that will be sent. `seq` is higher than all before.
    pub fn append(&mut self, user: &Arc<str>, seq: u64, frame: Arc<[u8]>, now_ms: u64) -> Append {
        let pending = Pending { seq, frame, appended_ms: now_ms };
        let of_user = self.streams.get(user).map_or(0, |stream| stream.bytes);
        if self.bytes + pending.cost() > self.bytes_max || of_user + pending.cost() > self.bytes_max / 2 {
            self.dropped += 1;
            self.dropped_in_outage += 1;
            return if self.dropped_in_outage == 1 { Append::FirstDropped } else { Append::Dropped };
        }
        self.bytes += pending.cost();
        self.pending += 1;
        let stream = self.streams.entry(user.clone()).or_default();
        stream.bytes += pending.cost();
        stream.queue.push_back(pending);
        self.line_up(user);
        Append::Kept
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
            let frame = next.frame.clone();
            stream.sent += 1;
            stream.sent_bytes += next.cost();
            self.on_the_way_bytes += next.cost();
            self.on_the_way.insert(next.seq, user.clone());
            self.line_up(&user);
            return Some(frame);
        }
        None
    }

    /// The peer has applied this change. Numbers that are not on their way are ignored.
    pub fn ack(&mut self, seq: u64) {
        let Some(user) = self.on_the_way.remove(&seq) else {
            return;
        };
        let Some(stream) = self.streams.get_mut(&user) else {
            return;
        };
        let Some(at) = stream.queue.iter().take(stream.sent).position(|p| p.seq == seq) else {
            return;
        };
        let Some(done) = stream.queue.remove(at) else { return };
        stream.sent -= 1;
        stream.sent_bytes -= done.cost();
        stream.bytes -= done.cost();
        stream.pause_ms = 0;
        stream.error.clear();
        self.on_the_way_bytes -= done.cost();
        self.bytes -= done.cost();
        self.pending -= 1;
        self.acked += 1;
        if stream.queue.is_empty() {
            self.forget(&user);
        } else {
            self.line_up(&user);
        }
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
            stream.lined_up = false;
            if let Some(first) = stream.queue.front() {
                users.push((first.seq, user.clone()));
            }
        }
        users.sort();
        for (_, user) in users {
            self.line_up(&user);
        }
    }

    /// The peer says that it has applied everything up to `seq`, perhaps in a session whose acknowledgements were lost.
    /// Only to be called while nothing is on its way, after [`Outbox::restart`].
    pub fn ack_up_to(&mut self, seq: u64) {
        let users: Vec<Arc<str>> = self.streams.keys().cloned().collect();
        for user in users {
            let Some(stream) = self.streams.get_mut(&user) else {
                continue;
            };
            while stream.queue.front().is_some_and(|p| p.seq <= seq) {
                let Some(done) = stream.queue.pop_front() else { break };
                stream.bytes -= done.cost();
                self.bytes -= done.cost();
                self.pending -= 1;
                self.acked += 1;
            }
            if stream.queue.is_empty() {
                self.forget(&user);
            }
        }
    }

    /// How many were dropped since the peer last took something, once it takes again: to be logged by the caller.
    pub fn end_outage(&mut self) -> Option<u64> {
        let has_room = self.bytes <= self.bytes_max / 2;
        (self.dropped_in_outage > 0 && has_room).then(|| std::mem::take(&mut self.dropped_in_outage))
    }

    /// When [`Outbox::next`] may have something although nothing else happened.
    pub fn wake_up_ms(&self) -> Option<u64> {
        self.waiting.first().map(|(until, _)| *until)
    }

    /// True if everything is acknowledged but for users whose changes were refused.
    pub fn is_settled(&self) -> bool {
        self.line.is_empty() && self.on_the_way.is_empty()
    }

    /// Last reason for which a waiting user's changes were refused.
    pub fn refusal(&self) -> Option<(&str, &str)> {
        let (_, user) = self.waiting.first()?;
        self.streams.get(user).map(|stream| (&**user, stream.error.as_str()))
    }

    pub fn stats(&self) -> OutboxStats {
        OutboxStats {
            pending: self.pending as u64,
            pending_bytes: self.bytes as u64,
            oldest_ms: self.streams.values().filter_map(|s| s.queue.front()).map(|p| p.appended_ms).min(),
            dropped: self.dropped,
            acked: self.acked,
        }
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

        fn append(&mut self, user: &str) -> u64 {
            self.seq += 1;
            let frame: Arc<[u8]> = self.seq.to_be_bytes().as_slice().into();
            assert_eq!(self.outbox.append(&user.into(), self.seq, frame, 0), Append::Kept);
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
        assert_eq!(given.outbox.refuse(2, "disk full", 1000), None, "no news");
        assert_eq!(given.sent(2999), []);
        assert_eq!(given.sent(3000), [2, 3, 5], "the pause doubled");
        given.outbox.ack(2);
        assert_eq!(given.outbox.refuse(3, "disk full", 3000), Some(1000), "the pause began again");
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
        given.outbox.ack_up_to(1);
        assert_eq!(given.sent(0), [3, 4]);
        assert_eq!(given.outbox.stats().acked, 2);
    }

    #[test]
    fn what_does_not_fit_is_dropped_and_counted() {
        let mut outbox = Outbox::new(2000);
        let frame: Arc<[u8]> = vec![0; 800].into();
        assert_eq!(outbox.append(&"jane".into(), 1, frame.clone(), 5), Append::Kept);
        assert_eq!(outbox.append(&"jane".into(), 2, frame.clone(), 6), Append::FirstDropped, "half is for others");
        assert_eq!(outbox.append(&"joe".into(), 3, frame.clone(), 7), Append::Kept);
        assert_eq!(outbox.append(&"jim".into(), 4, frame.clone(), 8), Append::Dropped);
        let stats = outbox.stats();
        assert_eq!((stats.pending, stats.dropped, stats.oldest_ms), (2, 2, Some(5)));
        assert!(stats.pending_bytes <= 2000);
        assert_eq!(outbox.end_outage(), None, "still full");
        outbox.next(9);
        outbox.ack(1);
        assert_eq!(outbox.end_outage(), Some(2));
        assert_eq!(outbox.end_outage(), None, "said once");
        assert_eq!(outbox.append(&"jane".into(), 5, frame, 9), Append::Kept);
    }
}
