//! Who changed a subscription last.
//!
//! Guarantees that two processes which change one at the same time are noticed: their records may arrive in another order
//! than the changes were made, and nothing in them says which was the last (Dovecot's mailbox log counts in seconds). Then
//! the subscriptions must be looked at. Bounded. Pure.

use std::collections::HashMap;
use std::sync::Arc;

/// Longer than any process takes from a change to its record.
const LATE_MS_MAX: u64 = 10_000;
/// Names that are remembered.
const NAMES_MAX: usize = 1_000;

/// See the module.
#[derive(Default)]
pub struct Subscribers {
    /// By user and path: the connection of the process, and when its record came.
    last: HashMap<(Arc<str>, Vec<String>), (usize, u64)>,
}

impl Subscribers {
    /// A process says that it changed the subscription. True: another one may have done so just before or after. What was told
    /// to the relay before this one is not known.
    pub fn changed(&mut self, user: &Arc<str>, path: &[String], connection: usize, now_ms: u64) -> bool {
        if self.last.len() >= NAMES_MAX {
            self.last.retain(|_, (_, at_ms)| *at_ms + LATE_MS_MAX > now_ms);
        }
        if self.last.len() >= NAMES_MAX {
            return true;
        }
        let before = self.last.insert((user.clone(), path.to_vec()), (connection, now_ms));
        now_ms < LATE_MS_MAX || before.is_some_and(|(other, at_ms)| other != connection && at_ms + LATE_MS_MAX > now_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_processes_that_change_one_subscription_are_noticed() {
        let mut subscribers = Subscribers::default();
        let (jane, joe): (Arc<str>, Arc<str>) = ("jane".into(), "joe".into());
        let (work, news) = (["Work".to_owned()], ["News".to_owned()]);
        assert!(!subscribers.changed(&jane, &work, 1, 20_000));
        assert!(!subscribers.changed(&jane, &work, 1, 20_001), "in the order of the process");
        assert!(!subscribers.changed(&jane, &news, 2, 20_001) && !subscribers.changed(&joe, &work, 2, 20_001));
        assert!(subscribers.changed(&jane, &work, 2, 20_002));
        assert!(!subscribers.changed(&jane, &work, 3, 60_000), "long ago");
        for n in 0..2 * NAMES_MAX {
            subscribers.changed(&jane, &[n.to_string()], 1, 60_000);
        }
        assert!(subscribers.last.len() <= NAMES_MAX);
        assert!(!subscribers.changed(&jane, &work, 1, 120_000), "forgotten");
    }

    #[test]
    fn what_was_told_to_the_relay_before_may_have_been_the_last() {
        let mut subscribers = Subscribers::default();
        let jane: Arc<str> = "jane".into();
        assert!(subscribers.changed(&jane, &["Work".to_owned()], 1, LATE_MS_MAX - 1));
        assert!(!subscribers.changed(&jane, &["News".to_owned()], 1, LATE_MS_MAX));
    }
}
