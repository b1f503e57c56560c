//! Received changes on their way to the workers: one job per user at a time, users in turn.
//!
//! Guarantees that a user's changes of one origin are handed out in the order in which each peer sent them, and that he has
//! never two jobs at once. What waits for a change of another origin holds up its own origin's later ones of the user, and
//! what comes after it, and is handed out in the end whether that came or not. A rename begins a job: by then it is known what its
//! mailbox became before, and of a worker that was killed, which name it gave. Bounded by the peers' windows. Pure.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::poison::Tried;
use crate::change;
use crate::wire::proto::{Change, SeqOf, Stamp};

/// Changes in one job.
const JOB_CHANGES_MAX: usize = 64;
/// Messages in one job whose bodies have to be asked for: who is seeded is not to have a worker for long.
const JOB_BODIES_MAX: usize = 64;
/// Encoded bytes in one job; a single change may have more.
const JOB_BYTES_MAX: usize = 256 << 10;
/// How long a change waits for those that it comes after: longer than a peer takes to connect again.
pub const WAIT_MS_MAX: u64 = 60_000;

/// A change that came from a peer.
#[derive(Debug)]
pub struct Received {
    /// Which peer, as the engine counts them.
    pub peer: usize,
    /// Its number among those of the peer, whoever made it.
    pub epoch: u64,
    pub seq: u64,
    pub bytes: usize,
    pub change: Change,
    /// Since when it was found to wait for another peer's changes.
    pub waits_since_ms: Option<u64>,
}

impl Received {
    fn origin(&self) -> &str {
        self.change.stamp.as_ref().map_or("", |stamp| stamp.origin.as_str())
    }

    /// As it is counted when it fails.
    pub fn tried(&self) -> Tried {
        Tried::Change((self.peer, self.epoch, self.seq))
    }

    /// Its origin and its number there.
    pub fn made(&self) -> SeqOf {
        let stamp = self.change.stamp.as_ref();
        stamp
            .map(|Stamp { origin, epoch, seq, .. }| SeqOf { origin: origin.clone(), epoch: *epoch, seq: *seq })
            .unwrap_or_default()
    }

    /// Whether it comes after the other one.
    fn names(&self, other: &Received) -> bool {
        let vector = self.change.stamp.as_ref().map(|stamp| stamp.vector.as_slice()).unwrap_or_default();
        let Some(made) = &other.change.stamp else { return false };
        vector.iter().any(|seen| (&seen.origin, seen.epoch) == (&made.origin, made.epoch) && made.seq <= seen.seq)
    }

    /// Until when it waits, if it does.
    pub fn overdue_ms(&self) -> Option<u64> {
        self.waits_since_ms.map(|since_ms| since_ms + WAIT_MS_MAX)
    }

    /// It waited for as long as it may.
    pub fn is_overdue(&self, now_ms: u64) -> bool {
        self.overdue_ms().is_some_and(|until_ms| until_ms <= now_ms)
    }
}

#[derive(Default)]
struct UserWork {
    queue: VecDeque<Received>,
    is_busy: bool,
    /// All that could be next waits: until when.
    parked_ms: Option<u64>,
}

impl UserWork {
    /// The next change of each origin from each peer, but for those that come after others in the queue.
    fn firsts(&self) -> Vec<usize> {
        let mut firsts: Vec<usize> = Vec::new();
        let line = |received: &Received| (received.peer, received.origin().to_owned());
        let mut lines = HashSet::new();
        for (at, received) in self.queue.iter().enumerate() {
            let is_first = lines.insert(line(received));
            if is_first && !self.queue.iter().take(at).any(|earlier| received.names(earlier)) {
                firsts.push(at);
            }
        }
        firsts
    }

    /// Changes of one peer and one origin whose time has come, in order.
    fn take_job(&mut self, now_ms: u64, waits: impl Fn(&Received, Option<&Received>) -> bool) -> Vec<Received> {
        let goes = |received: &Received| received.is_overdue(now_ms) || !waits(received, None);
        if self.queue.front().is_some_and(goes) {
            return self.take_from(0, waits);
        }
        for first in self.firsts() {
            if goes(&self.queue[first]) {
                return self.take_from(first, waits);
            }
            self.queue[first].waits_since_ms.get_or_insert(now_ms);
        }
        Vec::new()
    }

    fn take_from(&mut self, first: usize, waits: impl Fn(&Received, Option<&Received>) -> bool) -> Vec<Received> {
        let peer = self.queue[first].peer;
        let (mut bytes, mut bodies) = (0, 0);
        let mut last: Option<&Received> = None;
        let length = (self.queue.iter().skip(first).filter(|received| received.peer == peer))
            .take(JOB_CHANGES_MAX)
            .take_while(|received| {
                bytes += received.bytes;
                bodies += change::bodies_to_fetch(&received.change);
                let fits = bytes <= JOB_BYTES_MAX && bodies <= JOB_BODIES_MAX && !change::is_rename(&received.change);
                let fits = fits || last.is_none();
                let goes = last.is_none_or(|last| last.origin() == received.origin() && !waits(received, Some(last)));
                last = Some(received);
                fits && goes
            })
            .count();
        let mut job = Vec::with_capacity(length);
        let mut at = first;
        while job.len() < length {
            match self.queue.get(at).map(|received| received.peer == peer) {
                Some(true) => job.extend(self.queue.remove(at)),
                Some(false) => at += 1,
                None => break,
            }
        }
        job
    }
}

/// See the module.
#[derive(Default)]
pub struct Work {
    users: HashMap<Arc<str>, UserWork>,
    /// Users with changes and without a job. One may stand here twice after his changes were dropped.
    line: VecDeque<Arc<str>>,
    /// Users whose changes all wait for those of other peers, by the end of their patience.
    parked: BTreeSet<(u64, Arc<str>)>,
}

impl Work {
    pub fn push(&mut self, user: &Arc<str>, received: Received) {
        let work = self.users.entry(user.clone()).or_default();
        work.queue.push_back(received);
        if work.queue.len() == 1 && !work.is_busy {
            self.line.push_back(user.clone());
        }
        self.look_again(user);
    }

    /// What the user's changes wait for may have come.
    pub fn look_again(&mut self, user: &Arc<str>) {
        let Some(work) = self.users.get_mut(user) else { return };
        if let Some(until_ms) = work.parked_ms.take() {
            self.parked.remove(&(until_ms, user.clone()));
            self.line.push_back(user.clone());
        }
    }

    /// The same for all users.
    pub fn look_at_all_again(&mut self) {
        let parked: Vec<Arc<str>> = self.parked.iter().map(|(_, user)| user.clone()).collect();
        parked.iter().for_each(|user| self.look_again(user));
    }

    /// When [`Work::next_job`] has something although nothing else happened.
    pub fn wake_up_ms(&self) -> Option<u64> {
        self.parked.first().map(|(until_ms, _)| *until_ms)
    }

    /// Of each user, a change from the peer that waits for those of others; who waits longest first.
    pub fn waiting(&self, peer: usize) -> impl Iterator<Item = &Received> {
        self.parked.iter().filter_map(move |(_, user)| {
            let mut queue = self.users.get(user)?.queue.iter();
            queue.find(|received| received.peer == peer && received.waits_since_ms.is_some())
        })
    }

    /// Whether something of the user waits, or is applied.
    pub fn has(&self, user: &str) -> bool {
        self.users.contains_key(user)
    }

    /// Whether the user has a job.
    pub fn is_busy(&self, user: &str) -> bool {
        self.users.get(user).is_some_and(|work| work.is_busy)
    }

    /// The next job: changes of one user from one peer. The user is busy until [`Work::finish`]. `is_busy`: otherwise.
    /// `waits`: whether a change comes after others that are not applied yet, or will be with the one that is in the job
    /// before it.
    pub fn next_job(
        &mut self,
        now_ms: u64,
        is_busy: impl Fn(&str) -> bool,
        waits: impl Fn(&Received, Option<&Received>) -> bool,
    ) -> Option<(Arc<str>, Vec<Received>)> {
        while let Some((_, user)) = self.parked.first().filter(|(until_ms, _)| *until_ms <= now_ms).cloned() {
            self.look_again(&user);
        }
        for _ in 0..self.line.len() {
            let Some(user) = self.line.pop_front() else { break };
            if is_busy(&user) {
                self.line.push_back(user);
                continue;
            }
            let Some(work) = self.users.get_mut(&user).filter(|work| !work.is_busy && work.parked_ms.is_none()) else {
                continue;
            };
            let job = work.take_job(now_ms, &waits);
            if job.is_empty() {
                self.park(user);
                continue;
            }
            work.is_busy = true;
            return Some((user, job));
        }
        None
    }

    /// Nothing of the user can go on now.
    fn park(&mut self, user: Arc<str>) {
        let Some(work) = self.users.get_mut(&user) else { return };
        let since_ms = work.firsts().into_iter().filter_map(|first| work.queue[first].waits_since_ms).min();
        match since_ms.map(|since_ms| since_ms + WAIT_MS_MAX) {
            Some(until_ms) => {
                work.parked_ms = Some(until_ms);
                self.parked.insert((until_ms, user));
            }
            None => drop(self.users.remove(&user)),
        }
    }

    /// The user's job is over, however it ended.
    pub fn finish(&mut self, user: &Arc<str>) {
        let Some(work) = self.users.get_mut(user) else { return };
        work.is_busy = false;
        if work.queue.is_empty() {
            self.users.remove(user);
        } else {
            self.line.push_back(user.clone());
        }
    }

    /// Takes out the user's changes from this peer that are in no job yet.
    pub fn drop_user(&mut self, user: &str, peer: usize) -> Vec<Received> {
        let Some(work) = self.users.get_mut(user) else {
            return Vec::new();
        };
        let (dropped, kept): (VecDeque<_>, _) =
            std::mem::take(&mut work.queue).into_iter().partition(|r| r.peer == peer);
        work.queue = kept;
        if !dropped.is_empty() {
            self.look_again(&user.into());
        }
        dropped.into()
    }

    /// The same for all users: the peer is gone and will send again.
    pub fn drop_peer(&mut self, peer: usize) -> Vec<Received> {
        let users: Vec<Arc<str>> = self.users.keys().cloned().collect();
        users.iter().flat_map(|user| self.drop_user(user, peer)).collect()
    }

    #[cfg(test)]
    fn is_idle(&self) -> bool {
        self.users.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::proto::op::What;
    use crate::wire::proto::{MailboxRename, Op};
    use proptest::prelude::*;

    fn received(peer: usize, seq: u64, bytes: usize) -> Received {
        Received { peer, epoch: 1, seq, bytes, change: Change::default(), waits_since_ms: None }
    }

    fn job(work: &mut Work) -> Option<(String, Vec<u64>)> {
        job_but(work, 0, &[])
    }

    /// While these wait.
    fn job_but(work: &mut Work, now_ms: u64, waiting: &[u64]) -> Option<(String, Vec<u64>)> {
        let job = work.next_job(now_ms, |_| false, |received, _| waiting.contains(&received.seq));
        job.map(|(user, job)| (user.to_string(), job.iter().map(|r| r.seq).collect()))
    }

    #[test]
    fn a_user_has_one_job_at_a_time_and_users_take_turns() {
        let mut work = Work::default();
        let (jane, joe): (Arc<str>, Arc<str>) = ("jane".into(), "joe".into());
        work.push(&jane, received(0, 1, 1));
        work.push(&jane, received(0, 2, 1));
        work.push(&joe, received(0, 3, 1));
        assert_eq!(job(&mut work), Some(("jane".into(), vec![1, 2])));
        work.push(&jane, received(0, 4, 1));
        assert_eq!(job(&mut work), Some(("joe".into(), vec![3])));
        assert_eq!(job(&mut work), None);
        work.finish(&jane);
        assert_eq!(job(&mut work), Some(("jane".into(), vec![4])));
        work.finish(&jane);
        work.finish(&joe);
        assert!(work.is_idle());
    }

    #[test]
    fn a_rename_begins_a_job() {
        let mut work = Work::default();
        let jane: Arc<str> = "jane".into();
        for seq in 1..8 {
            let ops = match seq {
                3 | 4 => vec![Op { what: Some(What::Rename(MailboxRename::default())) }],
                _ => vec![],
            };
            work.push(&jane, Received { change: Change { ops, ..Default::default() }, ..received(0, seq, 1) });
        }
        for seqs in [vec![1, 2], vec![3], vec![4, 5, 6, 7]] {
            assert_eq!(job(&mut work), Some(("jane".into(), seqs)));
            work.finish(&jane);
        }
    }

    #[test]
    fn jobs_are_bounded_and_of_one_peer() {
        let mut work = Work::default();
        let jane: Arc<str> = "jane".into();
        for seq in 0..70 {
            work.push(&jane, received(0, seq, 1));
        }
        work.push(&jane, received(1, 100, JOB_BYTES_MAX + 1));
        work.push(&jane, received(1, 101, JOB_BYTES_MAX));
        work.push(&jane, received(1, 102, 1));
        let mut lengths = Vec::new();
        while let Some((_, seqs)) = job(&mut work) {
            lengths.push(seqs.len());
            work.finish(&jane);
        }
        assert_eq!(lengths, [64, 6, 1, 1, 1]);
    }

    #[test]
    fn what_waits_is_overtaken_by_what_comes_from_others_and_by_other_users() {
        let mut work = Work::default();
        let (jane, joe): (Arc<str>, Arc<str>) = ("jane".into(), "joe".into());
        for seq in [1, 2, 3] {
            work.push(&jane, received(0, seq, 1));
        }
        assert_eq!(job_but(&mut work, 0, &[2]), Some(("jane".into(), vec![1])));
        work.finish(&jane);
        work.push(&joe, received(0, 4, 1));
        assert_eq!(job_but(&mut work, 0, &[2]), Some(("joe".into(), vec![4])));
        assert_eq!(job_but(&mut work, 0, &[2]), None, "3 comes after 2");
        assert_eq!(work.waiting(0).map(|received| received.seq).collect::<Vec<_>>(), [2]);
        work.push(&jane, received(1, 9, 1));
        assert_eq!(job_but(&mut work, 0, &[2]), Some(("jane".into(), vec![9])));
        work.finish(&jane);
        assert_eq!(job(&mut work), Some(("jane".into(), vec![2, 3])), "its time has come");
        work.finish(&jane);
        work.finish(&joe);
        assert!(work.is_idle() && work.wake_up_ms().is_none());
    }

    #[test]
    fn what_is_waited_for_may_come_behind_from_the_same_peer() {
        let of = |origin: &str, seq: u64, after: &[(&str, u64)]| {
            let seq_of = |(origin, seq): &(&str, u64)| SeqOf { origin: (*origin).into(), epoch: 1, seq: *seq };
            let stamp = Stamp {
                origin: origin.into(),
                epoch: 1,
                seq,
                vector: after.iter().map(seq_of).collect(),
                ..Default::default()
            };
            Received { change: Change { stamp: Some(stamp), ..Default::default() }, ..received(0, seq, 1) }
        };
        let mut work = Work::default();
        let jane: Arc<str> = "jane".into();
        for received in [of("a", 18, &[("b", 6)]), of("x", 30, &[("a", 18)]), of("b", 6, &[]), of("a", 19, &[])] {
            work.push(&jane, received);
        }
        assert_eq!(job_but(&mut work, 0, &[18]), Some(("jane".into(), vec![6])));
        work.finish(&jane);
        assert_eq!(job_but(&mut work, 0, &[18]), None, "others come after it");
        work.look_again(&jane);
        for next in [18, 30, 19] {
            assert_eq!(job(&mut work), Some(("jane".into(), vec![next])));
            work.finish(&jane);
        }
    }

    #[test]
    fn nobody_waits_for_ever() {
        let mut work = Work::default();
        let jane: Arc<str> = "jane".into();
        work.push(&jane, received(0, 1, 1));
        work.push(&jane, received(0, 2, 1));
        assert_eq!(job_but(&mut work, 5, &[1, 2]), None);
        assert_eq!(work.wake_up_ms(), Some(5 + WAIT_MS_MAX));
        assert_eq!(job_but(&mut work, 4 + WAIT_MS_MAX, &[1, 2]), None);
        assert_eq!(job_but(&mut work, 5 + WAIT_MS_MAX, &[1, 2]), Some(("jane".into(), vec![1])));
        work.finish(&jane);
        assert_eq!(job_but(&mut work, 5 + WAIT_MS_MAX, &[2]), None);
        work.drop_peer(0);
        assert_eq!(job(&mut work), None);
        assert!(work.is_idle());
    }

    #[test]
    fn what_is_dropped_leaves_the_rest_in_order() {
        let mut work = Work::default();
        let (jane, joe): (Arc<str>, Arc<str>) = ("jane".into(), "joe".into());
        for seq in 1..=4 {
            work.push(&jane, received(seq as usize % 2, seq, 1));
        }
        work.push(&joe, received(1, 5, 1));
        assert_eq!(work.drop_user("jane", 1).len(), 2);
        assert_eq!(work.drop_peer(1).len(), 1);
        assert_eq!(job(&mut work), Some(("jane".into(), vec![2, 4])));
        assert_eq!(job(&mut work), None);
        work.finish(&jane);
        assert!(work.is_idle());
    }

    /// Of each server, the last number that is applied.
    type Seen = [u64; 5];

    /// A server with what it received from the others.
    #[derive(Default)]
    struct Server {
        work: Work,
        seen: Seen,
    }

    fn name(server: usize) -> String {
        char::from(b'a' + server as u8).to_string()
    }

    impl Server {
        fn make(&mut self, me: usize) -> Change {
            let vector = (0..5).filter(|of| self.seen[*of] > 0);
            let vector = vector.map(|of| SeqOf { origin: name(of), epoch: 1, seq: self.seen[of] }).collect();
            self.seen[me] += 1;
            let stamp = Stamp { origin: name(me), epoch: 1, seq: self.seen[me], vector, ..Default::default() };
            Change { stamp: Some(stamp), ..Default::default() }
        }

        /// Applies all that may be.
        fn apply(&mut self) {
            let jane: Arc<str> = "jane".into();
            let index = |origin: &str| usize::from(origin.as_bytes()[0] - b'a');
            loop {
                let seen = self.seen;
                let waits = |received: &Received, before: Option<&Received>| {
                    let is_before = |cause: &SeqOf| before.is_some_and(|before| before.made() == *cause);
                    let stamp = received.change.stamp.as_ref().unwrap();
                    stamp.vector.iter().any(|cause| seen[index(&cause.origin)] < cause.seq && !is_before(cause))
                };
                let Some((_, job)) = self.work.next_job(0, |_| false, waits) else { return };
                for received in job {
                    let stamp = received.change.stamp.unwrap();
                    let comes_after = |cause: &SeqOf| self.seen[index(&cause.origin)] >= cause.seq;
                    assert!(stamp.vector.iter().all(comes_after), "an effect before its cause: {stamp:?}");
                    let last = &mut self.seen[index(&stamp.origin)];
                    *last = stamp.seq.max(*last);
                }
                self.work.finish(&jane);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, ..Default::default() })]
        /// Lines between each two servers keep their order, and nothing else is kept.
        #[test]
        fn causes_come_before_effects_and_nothing_waits_in_the_end(
            count in 3..=5usize,
            steps in proptest::collection::vec((any::<bool>(), 0..25usize), 0..150),
        ) {
            let jane: Arc<str> = "jane".into();
            let mut servers: Vec<Server> = (0..count).map(|_| Server::default()).collect();
            let mut lines: HashMap<(usize, usize), VecDeque<Change>> = HashMap::new();
            let deliver = |servers: &mut [Server], lines: &mut HashMap<_, VecDeque<Change>>, from: usize, to: usize| {
                let Some(change) = lines.get_mut(&(from, to)).and_then(VecDeque::pop_front) else { return false };
                let seq = change.stamp.as_ref().map_or(0, |stamp| stamp.seq);
                let received = Received { peer: from, epoch: 1, seq, bytes: 1, change, waits_since_ms: None };
                servers[to].work.push(&jane, received);
                servers[to].apply();
                true
            };
            for (makes, pick) in steps {
                let (from, to) = (pick % count, pick / count % count);
                if makes {
                    let change = servers[from].make(from);
                    (0..count).filter(|to| *to != from).for_each(|to| lines.entry((from, to)).or_default().push_back(change.clone()));
                } else {
                    deliver(&mut servers, &mut lines, from, to);
                }
            }
            for (from, to) in (0..count).flat_map(|from| (0..count).map(move |to| (from, to))) {
                while deliver(&mut servers, &mut lines, from, to) {}
            }
            for server in &mut servers {
                prop_assert!(server.work.is_idle());
            }
            prop_assert!(servers.iter().all(|server| server.seen == servers[0].seen));
        }
    }
}
