//! Received changes on their way to the workers: one job per user at a time, users in turn.
//!
//! Guarantees that a user's changes are handed out in the order in which they came, and that he has never two jobs at
//! once. Bounded by the peers' windows. Pure.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::wire::proto::Change;

/// Changes in one job.
const JOB_CHANGES_MAX: usize = 64;
/// Encoded bytes in one job; a single change may have more.
const JOB_BYTES_MAX: usize = 256 << 10;

/// A change that came from a peer.
#[derive(Debug)]
pub struct Received {
    /// Which peer, as the engine counts them.
    pub peer: usize,
    pub epoch: u64,
    pub seq: u64,
    pub bytes: usize,
    pub change: Change,
}

#[derive(Default)]
struct UserWork {
    queue: VecDeque<Received>,
    is_busy: bool,
}

/// See the module.
#[derive(Default)]
pub struct Work {
    users: HashMap<Arc<str>, UserWork>,
    /// Users with changes and without a job. One may stand here twice after his changes were dropped.
    line: VecDeque<Arc<str>>,
}

impl Work {
    pub fn push(&mut self, user: &Arc<str>, received: Received) {
        let work = self.users.entry(user.clone()).or_default();
        work.queue.push_back(received);
        if work.queue.len() == 1 && !work.is_busy {
            self.line.push_back(user.clone());
        }
    }

    /// Whether the user has a job.
    pub fn is_busy(&self, user: &str) -> bool {
        self.users.get(user).is_some_and(|work| work.is_busy)
    }

    /// The next job: changes of one user from one peer. The user is busy until [`Work::finish`]. `is_busy`: otherwise.
    pub fn next_job(&mut self, is_busy: impl Fn(&str) -> bool) -> Option<(Arc<str>, Vec<Received>)> {
        for _ in 0..self.line.len() {
            let Some(user) = self.line.pop_front() else { break };
            if is_busy(&user) {
                self.line.push_back(user);
                continue;
            }
            let Some(work) = self.users.get_mut(&user).filter(|work| !work.is_busy) else {
                continue;
            };
            let job = take_job(&mut work.queue);
            if job.is_empty() {
                self.users.remove(&user);
                continue;
            }
            work.is_busy = true;
            return Some((user, job));
        }
        None
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
        let (dropped, kept) = std::mem::take(&mut work.queue).into_iter().partition(|r| r.peer == peer);
        work.queue = kept;
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

fn take_job(queue: &mut VecDeque<Received>) -> Vec<Received> {
    let Some(first) = queue.front() else { return Vec::new() };
    let peer = first.peer;
    let mut bytes = 0;
    let length = queue
        .iter()
        .take(JOB_CHANGES_MAX)
        .take_while(|received| {
            bytes += received.bytes;
            received.peer == peer && (bytes <= JOB_BYTES_MAX || bytes == received.bytes)
        })
        .count();
    queue.drain(..length).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(peer: usize, seq: u64, bytes: usize) -> Received {
        Received { peer, epoch: 1, seq, bytes, change: Change::default() }
    }

    fn job(work: &mut Work) -> Option<(String, Vec<u64>)> {
        work.next_job(|_| false).map(|(user, job)| (user.to_string(), job.iter().map(|r| r.seq).collect()))
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
}
