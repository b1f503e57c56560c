//! What came from one peer: which of its changes are applied here, which were refused, how much is not finished.
//!
//! Guarantees that an applied change is never applied a second time as long as its number is remembered, that behind
//! a refused change nothing of its user passes until it comes again, and that a peer that sends more than it may is
//! noticed. Forgetting a number only costs applying it again, which changes nothing.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::{WINDOW_BYTES, WINDOW_CHANGES};

/// Separate runs of applied numbers that are remembered; a number that never comes costs one.
const RUNS_MAX: usize = 10_000;
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
}

/// Why the connection must be closed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InboxError {
    #[error("it sent {changes} changes of {bytes} bytes without waiting for acknowledgements")]
    TooMuch { changes: usize, bytes: usize },
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
    refused: HashMap<Arc<str>, u64>,
    unfinished: usize,
    unfinished_bytes: usize,
}

impl Inbox {
    /// A new session begins: the peer will send again whatever was not acknowledged.
    pub fn begin(&mut self, epoch: u64) {
        if self.epoch != epoch {
            self.epoch = epoch;
            self.applied.clear();
        }
        self.refused.clear();
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

    /// A change came. If it is to be applied, it counts as unfinished until [`Inbox::finish`].
    pub fn receive(&mut self, epoch: u64, seq: u64, user: &str, bytes: usize) -> Result<Verdict, InboxError> {
        if epoch != self.epoch {
            return Err(InboxError::Epoch { seq, epoch, expected: self.epoch });
        }
        if self.is_applied(epoch, seq) {
            return Ok(Verdict::Acknowledge);
        }
        match self.refused.get(user) {
            Some(refused) if *refused == seq => drop(self.refused.remove(user)),
            Some(_) => return Ok(Verdict::Ignore),
            None => {}
        }
        if self.unfinished >= 2 * WINDOW_CHANGES || self.unfinished_bytes + bytes > 2 * WINDOW_BYTES {
            return Err(InboxError::TooMuch { changes: self.unfinished + 1, bytes: self.unfinished_bytes + bytes });
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
        let last = self.applied.remove(&(seq + 1)).unwrap_or(seq);
        match self.applied.range_mut(..seq).next_back() {
            Some((_, before)) if *before + 1 == seq => *before = last,
            _ => drop(self.applied.insert(seq, last)),
        }
        if self.applied.len() > RUNS_MAX {
            let second = self.applied.keys().nth(1).copied();
            second.map(|first| self.applied.remove(&first));
        }
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
        inbox.begin(9);
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
    fn a_new_epoch_forgets_what_was_applied_and_a_new_session_does_not() {
        let mut inbox = inbox();
        inbox.apply(9, 1);
        inbox.begin(9);
        assert!(inbox.is_applied(9, 1));
        inbox.begin(10);
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
    fn more_than_twice_the_window_is_too_much() {
        let mut inbox = inbox();
        for seq in 1..=2 * WINDOW_CHANGES as u64 {
            assert_eq!(inbox.receive(9, seq, "jane", 1), Ok(Verdict::Apply));
        }
        assert!(matches!(inbox.receive(9, 100_000, "jane", 1), Err(InboxError::TooMuch { .. })));
        inbox.finish(1);
        assert_eq!(inbox.receive(9, 100_000, "jane", 1), Ok(Verdict::Apply));
    }

    #[test]
    fn the_runs_are_bounded() {
        let mut inbox = inbox();
        for seq in 0..RUNS_MAX as u64 + 50 {
            inbox.apply(9, 1 + 2 * seq);
        }
        assert_eq!(inbox.applied.len(), RUNS_MAX);
    }
}
