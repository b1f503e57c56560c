//! What cannot be applied, however often it is tried: counted, so that it is set aside in the end.
//!
//! What a worker says can never be applied has three tries. What workers die of has more, and a try counts only if some worker
//! did what it was given since the one before: where all of them die, it is not this. What a worker died with is tried alone
//! from then on, to find out what of it it was. Guarantees bounded memory: with too many all counts begin again. Pure.

use std::collections::HashMap;
use std::sync::Arc;

use super::torn::Sent;

/// Tries of what can never be applied.
pub const TRIES_MAX: u32 = 3;
/// Tries of what workers die of. With the pauses that the peer makes between them some two minutes.
pub const CRASHES_MAX: u32 = 8;
/// What is counted, at most.
const COUNTED_MAX: usize = 10_000;

/// What is tried.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Tried {
    Change(Sent),
    /// Flags of a user that are to be set once more.
    Redo(Arc<str>),
}

#[derive(Default)]
struct Count {
    refused: u32,
    crashes: u32,
    /// Jobs that were done before the last of them.
    jobs_before: u64,
}

/// See the module.
#[derive(Default)]
pub struct Poison {
    counts: HashMap<Tried, Count>,
    jobs: u64,
}

impl Poison {
    /// A worker did what it was given.
    pub fn note_job(&mut self) {
        self.jobs += 1;
    }

    /// It can never be applied. True: that was the last try.
    pub fn refuse(&mut self, tried: &Tried) -> bool {
        let count = self.count(tried);
        count.refused += 1;
        let is_last = count.refused >= TRIES_MAX;
        self.forget_if(is_last, tried)
    }

    /// It could not be applied for a reason that may go.
    pub fn fail(&mut self, tried: &Tried) {
        if let Some(count) = self.counts.get_mut(tried) {
            count.refused = 0;
        }
    }

    /// A worker went away with these. True: it had only one, and that was the last try of it.
    pub fn crash(&mut self, with: &[Tried]) -> bool {
        let [tried] = with else {
            for tried in with {
                self.count(tried);
            }
            return false;
        };
        let jobs = self.jobs;
        let count = self.count(tried);
        if count.crashes == 0 || count.jobs_before < jobs {
            (count.crashes, count.jobs_before) = (count.crashes + 1, jobs);
        }
        let is_last = count.crashes >= CRASHES_MAX;
        self.forget_if(is_last, tried)
    }

    /// It is to be tried alone.
    pub fn is_counted(&self, tried: &Tried) -> bool {
        self.counts.contains_key(tried)
    }

    /// It is applied, or never will be.
    pub fn is_over(&mut self, tried: &Tried) {
        self.counts.remove(tried);
    }

    fn count(&mut self, tried: &Tried) -> &mut Count {
        if self.counts.len() >= COUNTED_MAX && !self.counts.contains_key(tried) {
            self.counts.clear();
        }
        self.counts.entry(tried.clone()).or_default()
    }

    fn forget_if(&mut self, is_last: bool, tried: &Tried) -> bool {
        if is_last {
            self.counts.remove(tried);
        }
        is_last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(seq: u64) -> Tried {
        Tried::Change((0, 1, seq))
    }

    #[test]
    fn what_can_never_be_applied_has_some_tries_in_a_row() {
        let mut poison = Poison::default();
        assert!(!poison.refuse(&change(1)) && !poison.refuse(&change(1)));
        poison.fail(&change(1));
        assert!(!poison.refuse(&change(1)) && !poison.refuse(&change(1)) && !poison.refuse(&change(2)));
        assert!(poison.refuse(&change(1)));
        assert!(!poison.is_counted(&change(1)) && poison.is_counted(&change(2)));
    }

    #[test]
    fn what_workers_die_of_is_found_among_others_and_counted_only_while_workers_do_other_things() {
        let mut poison = Poison::default();
        assert!(!poison.crash(&[change(1), change(2)]));
        assert!(poison.is_counted(&change(1)) && poison.is_counted(&change(2)), "each is tried alone");
        poison.is_over(&change(1));
        for _ in 0..100 {
            assert!(!poison.crash(&[change(2)]), "all workers die");
        }
        for _ in 2..CRASHES_MAX {
            poison.note_job();
            assert!(!poison.crash(&[change(2)]));
        }
        poison.note_job();
        assert!(poison.crash(&[change(2)]));
        assert!(!poison.is_counted(&change(2)));
    }

    #[test]
    fn what_is_counted_is_bounded() {
        let mut poison = Poison::default();
        for seq in 0..2 * COUNTED_MAX as u64 {
            poison.refuse(&change(seq));
        }
        assert!(poison.counts.len() <= COUNTED_MAX);
    }
}
