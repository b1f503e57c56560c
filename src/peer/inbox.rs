//! What came from one peer: which of its changes are applied here, which were refused, how much is not finished.
//!
//! Guarantees that an applied change is never applied a second time as long as its number is remembered, that behind
//! a refused change nothing of its user passes until it comes again, and that a peer that sends more than it may is
//! noticed. Forgetting a number only costs applying it again, which changes nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::{WINDOW_BYTES, WINDOW_CHANGES};

/// Separate runs of applied numbers that are remembered; a number that never comes costs one.
const RUNS_MAX: usize = 10_000;
/// Memory of what is not finished. Changes of many small operations take far more than their bytes, which the sender's window
/// counts; so the rest is asked to come again.
const MEMORY_BYTES_MAX: usize = 8 * WINDOW_BYTES;
/// Users with a refused change that has not come again.
const REFUSED_USERS_MAX: usize = 100_000;

/// What to do with a change that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Apply,
    /// It is applied already: acknowledge it again.
    Acknowledge,
    /// An earlier change of its user was refused: both will come again.
    Ignore,
    /// There is no room for it: it is to be refused.
    Later,
}

/// Why the connection must be closed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InboxError {
    #[error("it sent {0} changes without waiting for acknowledgements")]
    TooMuch(usize),
    #[error("changes of {0} users were refused and did not come again")]
    TooManyRefused(usize),
    #[error("it sent change {seq} of epoch {epoch}, but its epoch is {expected}")]
    Epoch { seq: u64, epoch: u64, expected: u64 },
}

/// See the module.
#[derive(Default)]
pub struct Inbox {
    epoch: u64,
    /// Runs of applied numbers, first to last.
    applied: BTreeMap<u64, u64>,
    /// Beginnings of runs that have changed since they were last taken for the journal.
    changed: BTreeSet<u64>,
    refused: HashMap<Arc<str>, u64>,
    unfinished: usize,
    unfinished_bytes: usize,
}

impl Inbox {
    /// What the journal remembers of the last start.
    pub fn resume(&mut self, epoch: u64, runs: impl IntoIterator<Item = (u64, u64)>) {
        self.epoch = epoch;
        self.applied = runs.into_iter().collect();
    }

    /// A new session begins: the peer will send again whatever was not acknowledged, beginning with `first_pending`. What
    /// lies before will never come (again). True: it is a new epoch.
    pub fn begin(&mut self, epoch: u64, first_pending: u64) -> bool {
        let is_new = self.epoch != epoch;
        if is_new {
            self.epoch = epoch;
            self.applied.clear();
            self.changed.clear();
        }
        self.refused.clear();
        if first_pending > 1 {
            self.join_up_to(first_pending - 1);
        }
        is_new
    }

    /// All up to `last` count as applied.
    fn join_up_to(&mut self, last: u64) {
        if self.is_applied(self.epoch, last) && self.applied_up_to() >= last {
            return;
        }
        let joined: Vec<u64> = self.applied.range(..=last + 1).map(|(first, _)| *first).collect();
        let end = joined.last().and_then(|first| self.applied.get(first)).map_or(last, |end| last.max(*end));
        for first in joined {
            self.applied.remove(&first);
            self.changed.insert(first);
        }
        self.applied.insert(1, end);
        self.changed.insert(1);
    }

    /// Runs that have changed since the last call: their beginning, and their end if they are still there.
    pub fn take_changed(&mut self) -> Vec<(u64, Option<u64>)> {
        let changed = std::mem::take(&mut self.changed);
        changed.into_iter().map(|first| (first, self.applied.get(&first).copied())).collect()
    }

    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// All numbers up to this one are applied.
    pub fn applied_up_to(&self) -> u64 {
        match self.applied.first_key_value() {
            Some((1, last)) => *last,
            _ => 0,
        }
    }

    pub fn is_applied(&self, epoch: u64, seq: u64) -> bool {
        epoch == self.epoch && self.applied.range(..=seq).next_back().is_some_and(|(_, last)| *last >= seq)
    }

    /// A change came that takes so many bytes of memory. If it is to be applied, it counts as unfinished until [`Inbox::finish`].
    pub fn receive(&mut self, epoch: u64, seq: u64, user: &str, bytes: usize) -> Result<Verdict, InboxError> {
        if epoch != self.epoch {
            return Err(InboxError::Epoch { seq, epoch, expected: self.epoch });
        }
        let is_refused = match self.refused.get(user) {
            // It was applied since, and does not come again.
            Some(refused) if *refused == seq || self.is_applied(epoch, *refused) => self.refused.remove(user).is_none(),
            refused => refused.is_some(),
        };
        if self.is_applied(epoch, seq) {
            return Ok(Verdict::Acknowledge);
        }
        if is_refused {
            return Ok(Verdict::Ignore);
        }
        if self.unfinished >= 2 * WINDOW_CHANGES {
            return Err(InboxError::TooMuch(self.unfinished + 1));
        }
        if self.unfinished_bytes + bytes > MEMORY_BYTES_MAX {
            return Ok(Verdict::Later);
        }
        self.unfinished += 1;
        self.unfinished_bytes += bytes;
        Ok(Verdict::Apply)
    }

    /// A change that was to be applied left the queue, whatever became of it.
    pub fn finish(&mut self, bytes: usize) {
        self.unfinished = self.unfinished.saturating_sub(1);
        self.unfinished_bytes = self.unfinished_bytes.saturating_sub(bytes);
    }

    /// The change is applied durably.
    pub fn apply(&mut self, epoch: u64, seq: u64) {
        if epoch != self.epoch || self.is_applied(epoch, seq) {
            return;
        }
        let last = match self.applied.remove(&(seq + 1)) {
            Some(last) => {
                self.changed.insert(seq + 1);
                last
            }
            None => seq,
        };
        match self.applied.range_mut(..seq).next_back() {
            Some((first, before)) if *before + 1 == seq => {
                *before = last;
                self.changed.insert(*first);
            }
            _ => {
                self.applied.insert(seq, last);
                self.changed.insert(seq);
            }
        }
        if self.applied.len() > RUNS_MAX {
            if let Some(first) = self.applied.keys().nth(1).copied() {
                self.applied.remove(&first);
                self.changed.insert(first);
            }
        }
    }

    /// The change came through another server, and is applied: if it was refused here, it may not come again. That server's word
    /// is good for this user only, so the number does not count as applied.
    pub fn came_through_another(&mut self, epoch: u64, seq: u64, user: &str) {
        if epoch == self.epoch && self.refused.get(user) == Some(&seq) {
            self.refused.remove(user);
        }
    }

    /// Whether a change of the user was refused and has not come again.
    pub fn is_refused(&self, user: &str) -> bool {
        self.refused.contains_key(user)
    }

    /// The change could not be applied.
    pub fn refuse(&mut self, epoch: u64, seq: u64, user: &Arc<str>) -> Result<(), InboxError> {
        if epoch != self.epoch {
            return Ok(());
        }
        if self.refused.len() >= REFUSED_USERS_MAX {
            return Err(InboxError::TooManyRefused(self.refused.len()));
        }
        self.refused.insert(user.clone(), seq);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inbox() -> Inbox {
        let mut inbox = Inbox::default();
        inbox.begin(9, 1);
        inbox
    }

    #[test]
    fn applied_numbers_are_remembered_as_runs() {
        let mut inbox = inbox();
        for seq in [3, 1, 5, 4, 2, 7] {
            inbox.apply(9, seq);
        }
        assert_eq!(inbox.applied, BTreeMap::from([(1, 5), (7, 7)]));
        assert_eq!(inbox.applied_up_to(), 5);
        assert!(inbox.is_applied(9, 4) && inbox.is_applied(9, 7) && !inbox.is_applied(9, 6) && !inbox.is_applied(8, 4));
        assert_eq!(inbox.receive(9, 4, "jane", 1), Ok(Verdict::Acknowledge));
        assert_eq!(inbox.receive(9, 6, "jane", 1), Ok(Verdict::Apply));
    }

    #[test]
    fn what_is_applied_and_was_refused_nevertheless_holds_up_nothing() {
        let mut inbox = inbox();
        let jane: Arc<str> = "jane".into();
        inbox.refuse(9, 1, &jane).unwrap();
        assert_eq!(inbox.receive(9, 2, "jane", 1), Ok(Verdict::Ignore));
        inbox.apply(9, 1);
        assert_eq!(inbox.receive(9, 2, "jane", 1), Ok(Verdict::Apply));
    }

    #[test]
    fn a_new_epoch_forgets_what_was_applied_and_a_new_session_does_not() {
        let mut inbox = inbox();
        inbox.apply(9, 1);
        inbox.begin(9, 1);
        assert!(inbox.is_applied(9, 1));
        inbox.begin(10, 1);
        assert!(!inbox.is_applied(10, 1));
        inbox.apply(9, 2);
        assert!(!inbox.is_applied(10, 2), "an old job's end means nothing in the new epoch");
        assert!(matches!(inbox.receive(9, 3, "jane", 1), Err(InboxError::Epoch { .. })));
    }

    #[test]
    fn behind_a_refused_change_nothing_of_its_user_passes() {
        let mut inbox = inbox();
        inbox.receive(9, 1, "jane", 10).unwrap();
        inbox.finish(10);
        inbox.refuse(9, 1, &"jane".into()).unwrap();
        assert_eq!(inbox.receive(9, 2, "jane", 10), Ok(Verdict::Ignore));
        assert_eq!(inbox.receive(9, 3, "joe", 10), Ok(Verdict::Apply));
        assert_eq!(inbox.receive(9, 1, "jane", 10), Ok(Verdict::Apply));
        assert_eq!(inbox.receive(9, 2, "jane", 10), Ok(Verdict::Apply));
    }

    #[test]
    fn a_refused_change_that_came_through_another_server_holds_up_nothing() {
        let mut inbox = inbox();
        let (jane, joe): (Arc<str>, Arc<str>) = ("jane".into(), "joe".into());
        inbox.refuse(9, 1, &jane).unwrap();
        inbox.refuse(9, 2, &joe).unwrap();
        inbox.came_through_another(9, 2, "jane");
        assert_eq!(inbox.receive(9, 3, "jane", 10), Ok(Verdict::Ignore), "that is another one's");
        inbox.came_through_another(9, 1, "jane");
        assert_eq!(inbox.receive(9, 3, "jane", 10), Ok(Verdict::Apply));
        assert!(!inbox.is_applied(9, 1) && inbox.is_refused("joe"));
    }

    #[test]
    fn more_than_twice_the_window_is_too_much() {
        let mut inbox = inbox();
        for seq in 1..=2 * WINDOW_CHANGES as u64 {
            assert_eq!(inbox.receive(9, seq, "jane", 1), Ok(Verdict::Apply));
        }
        assert!(matches!(inbox.receive(9, 100_000, "jane", 1), Err(InboxError::TooMuch(_))));
        inbox.finish(1);
        assert_eq!(inbox.receive(9, 100_000, "jane", 1), Ok(Verdict::Apply));
    }

    #[test]
    fn what_there_is_no_memory_for_is_to_come_later() {
        let mut inbox = inbox();
        assert_eq!(inbox.receive(9, 1, "jane", MEMORY_BYTES_MAX - 1), Ok(Verdict::Apply));
        assert_eq!(inbox.receive(9, 2, "joe", 2), Ok(Verdict::Later));
        inbox.finish(MEMORY_BYTES_MAX - 1);
        assert_eq!(inbox.receive(9, 2, "joe", 2), Ok(Verdict::Apply));
    }

    #[test]
    fn the_runs_are_bounded() {
        let mut inbox = inbox();
        for seq in 0..RUNS_MAX as u64 + 50 {
            inbox.apply(9, 1 + 2 * seq);
        }
        assert_eq!(inbox.applied.len(), RUNS_MAX);
    }

    #[test]
    fn changes_of_the_runs_are_told_to_the_journal() {
        let mut inbox = inbox();
        for seq in [1, 3, 7] {
            inbox.apply(9, seq);
        }
        assert_eq!(inbox.take_changed(), [(1, Some(1)), (3, Some(3)), (7, Some(7))]);
        inbox.apply(9, 2);
        assert_eq!(inbox.take_changed(), [(1, Some(3)), (3, None)]);
        assert_eq!(inbox.take_changed(), []);
    }

    #[test]
    fn numbers_that_will_never_come_leave_no_hole() {
        let mut inbox = inbox();
        for seq in [1, 3, 8, 12] {
            inbox.apply(9, seq);
        }
        inbox.take_changed();
        assert!(!inbox.begin(9, 8));
        assert_eq!(inbox.applied, BTreeMap::from([(1, 8), (12, 12)]));
        assert_eq!(inbox.take_changed(), [(1, Some(8)), (3, None), (8, None)]);
        assert!(inbox.begin(10, 1_000));
        assert_eq!(inbox.applied_up_to(), 999);
    }
}
