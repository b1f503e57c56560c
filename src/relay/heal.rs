//! What has to be looked at in the mailboxes themselves: holes in a log, processes that ended without a goodbye, and at
//! every start all users.
//!
//! Guarantees that a user has one look at a time, that what fails is tried again after growing pauses, and that nothing
//! that was asked for is forgotten. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use prost::Message;

use super::spans::Place;
use crate::wire::proto::MessageRange;

/// Looks of one user that may find rebuilt indexes one after the other. Then there are pauses: Dovecot may make an mdbox's
/// indexes anew each time that it is opened, and every look would find news that it has made itself.
const RUSH_MAX: u32 = 8;
/// Users whose last looks found such are remembered, so many at most.
const REBUILT_MAX: usize = 10_000;
/// What was told of a mailbox before its index was made anew is there after so long, at the latest.
const ANEW_MS: u64 = 60_000;
/// Pauses after a look that failed, and after too many of those.
const PAUSE_MS_MIN: u64 = 1_000;
const PAUSE_MS_MAX: u64 = 60_000;

/// Of the messages of one user that were expunged in memory: less than what has room in a frame.
const EXPUNGED_BYTES_MAX: usize = 32_000;

/// Messages that clients expunged in memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Expunged {
    pub messages: Vec<MessageRange>,
    /// The lowest of their sessions.
    pub uid_next: u32,
}

/// What is to be looked at of one user.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Look {
    /// By GUID; up to which place of the log, or all of it.
    pub mailboxes: BTreeMap<Vec<u8>, Option<Place>>,
    /// All mailboxes, and which there are.
    pub whole: bool,
    /// Of these not only which there are.
    pub logs: bool,
    /// And what changed in the subscriptions.
    pub subscriptions: bool,
    /// Of these all that is there is to be told.
    pub anew: BTreeSet<Vec<u8>>,
    /// What clients expunged in them in memory.
    pub expunged: BTreeMap<Vec<u8>, Expunged>,
    /// Nothing, if nothing was written to them since then, in seconds since 1970; 0: always.
    pub written_since: i64,
    /// Whose mail it is, of a user who may have none.
    pub owner: bool,
}

impl Look {
    fn is_empty(&self) -> bool {
        self.has_no_mailboxes() && !self.owner
    }

    fn has_no_mailboxes(&self) -> bool {
        self.mailboxes.is_empty() && !self.whole
    }

    fn merge(&mut self, other: Look) {
        if self.has_no_mailboxes() {
            self.written_since = other.written_since;
        } else if other.written_since == 0 && !other.has_no_mailboxes() {
            self.written_since = 0;
        }
        self.whole |= other.whole;
        self.logs |= other.logs;
        self.subscriptions |= other.subscriptions;
        self.owner |= other.owner;
        self.anew.extend(other.anew);
        for (guid, until) in other.mailboxes {
            self.add(guid, until);
        }
        for (guid, expunged) in other.expunged {
            self.add_expunged(&guid, expunged);
        }
    }

    fn add_expunged(&mut self, guid: &[u8], expunged: Expunged) {
        let mut bytes: usize = self.expunged.values().flat_map(|known| &known.messages).map(Message::encoded_len).sum();
        let uid_next = expunged.uid_next;
        let known = self.expunged.entry(guid.to_vec()).or_insert(Expunged { messages: vec![], uid_next });
        known.uid_next = known.uid_next.min(uid_next);
        for message in expunged.messages {
            bytes += message.encoded_len();
            if bytes <= EXPUNGED_BYTES_MAX && !known.messages.contains(&message) {
                known.messages.push(message);
            }
        }
    }

    fn add(&mut self, guid: Vec<u8>, until: Option<Place>) {
        let known = self.mailboxes.entry(guid).or_insert(until);
        *known = known.zip(until).map(|(known, until)| known.max(until));
    }
}

#[derive(Default)]
struct User {
    wanted: Look,
    /// What the look under way is about.
    running: Option<Look>,
    /// It found an index that was made anew.
    found_rebuilt: bool,
    /// Nothing is begun before.
    wait_until_ms: Option<u64>,
    pause_ms: u64,
    error: String,
    /// Since when it fails.
    failed_since_ms: u64,
    /// The look under way is such a one.
    is_again: bool,
}

/// A user for whom something failed, and is tried again.
pub struct Failing<'a> {
    pub user: &'a str,
    pub error: &'a str,
    pub since_ms: u64,
    /// None: it is tried now.
    pub next_ms: Option<u64>,
}

/// Looks of a user that all found rebuilt indexes.
#[derive(Default)]
struct Rebuilt {
    ended_ms: u64,
    count: u32,
}

impl Rebuilt {
    fn pause_ms(&self) -> u64 {
        match self.count.checked_sub(RUSH_MAX) {
            Some(too_many) => (PAUSE_MS_MIN << too_many.min(10)).min(PAUSE_MS_MAX),
            None => 0,
        }
    }
}

/// See the module.
#[derive(Default)]
pub struct Heals {
    users: HashMap<Arc<str>, User>,
    rebuilt: HashMap<Arc<str>, Rebuilt>,
    /// Mailboxes whose index was made anew, and when that was found.
    anew: HashMap<(Arc<str>, Vec<u8>), u64>,
    line: VecDeque<Arc<str>>,
    waiting: BTreeSet<(u64, Arc<str>)>,
    running: usize,
    running_again: usize,
}

impl Heals {
    /// The mailbox's log is to be read, up to the place or all of it.
    pub fn want(&mut self, user: &Arc<str>, mailbox: &[u8], until: Option<Place>) {
        let wanted = &mut self.users.entry(user.clone()).or_default().wanted;
        wanted.add(mailbox.to_vec(), until);
        wanted.written_since = 0;
        self.line_up(user);
    }

    /// Clients expunged these messages while the mailbox's index was in memory: what of them is gone is to be told. Of more than is kept
    /// it may seem that they were lost, and they come back from the peers.
    pub fn want_expunged(&mut self, user: &Arc<str>, mailbox: &[u8], expunged: Expunged) {
        self.users.entry(user.clone()).or_default().wanted.add_expunged(mailbox, expunged);
        self.want(user, mailbox, None);
    }

    /// Of these messages, by UID: those for which no look was begun yet.
    pub fn still_expunged(&self, user: &Arc<str>, mailbox: &[u8]) -> Vec<u32> {
        let wanted = self.users.get(user).and_then(|user| user.wanted.expunged.get(mailbox));
        wanted.map(|wanted| wanted.messages.iter().map(|message| message.first_uid).collect()).unwrap_or_default()
    }

    /// All that is in the mailbox is to be told, as when its index was made anew.
    pub fn want_anew(&mut self, user: &Arc<str>, mailbox: &[u8]) {
        self.users.entry(user.clone()).or_default().wanted.anew.insert(mailbox.to_vec());
        self.want(user, mailbox, None);
    }

    /// All of the user's mailboxes are to be looked at, and the subscriptions.
    pub fn want_all(&mut self, user: &Arc<str>) {
        self.users.entry(user.clone()).or_default().wanted.subscriptions = true;
        self.want_mailboxes(user);
    }

    /// The same without the subscriptions: Dovecot does not know who changed them, and it was us.
    pub fn want_mailboxes(&mut self, user: &Arc<str>) {
        self.users.entry(user.clone()).or_default().wanted.logs = true;
        self.want_whole(user);
    }

    /// Which mailboxes and subscriptions there are, not what is in their logs: that is on its way.
    pub fn want_list(&mut self, user: &Arc<str>) {
        self.users.entry(user.clone()).or_default().wanted.subscriptions = true;
        self.want_whole(user);
    }

    /// All of a user of whom nobody has told yet, if something was written to his mail since then (seconds since 1970).
    pub fn want_written_since(&mut self, user: &Arc<str>, since: i64) {
        let is_heard = self.users.contains_key(user);
        self.want_all(user);
        if let Some(user) = self.users.get_mut(user).filter(|_| !is_heard) {
            user.wanted.written_since = since;
        }
    }

    /// Which system user's mail his is.
    pub fn want_owner(&mut self, user: &Arc<str>) {
        self.users.entry(user.clone()).or_default().wanted.owner = true;
        self.line_up(user);
    }

    fn want_whole(&mut self, user: &Arc<str>) {
        let wanted = &mut self.users.entry(user.clone()).or_default().wanted;
        wanted.whole = true;
        wanted.written_since = 0;
        self.line_up(user);
    }

    /// The next look, of a user who is not busy otherwise. Until [`Heals::finish`] he is busy with this. `may_retry`: also
    /// one that failed before.
    pub fn next(&mut self, now_ms: u64, may_retry: bool, is_busy: impl Fn(&str) -> bool) -> Option<(Arc<str>, Look)> {
        while self.waiting.first().is_some_and(|(until, _)| *until <= now_ms) {
            let Some((_, name)) = self.waiting.pop_first() else { break };
            if let Some(user) = self.users.get_mut(&name) {
                user.wait_until_ms = None;
            }
            self.line_up(&name);
        }
        for _ in 0..self.line.len() {
            let Some(name) = self.line.pop_front() else { break };
            if is_busy(&name) {
                self.line.push_back(name);
                continue;
            }
            let Some(user) = self.users.get_mut(&name) else { continue };
            if user.running.is_some() || user.wait_until_ms.is_some() || user.wanted.is_empty() {
                continue;
            }
            if let Some(until_ms) = self.rebuilt.get(&name).map(|rebuilt| rebuilt.ended_ms + rebuilt.pause_ms()) {
                if now_ms < until_ms {
                    user.wait_until_ms = Some(until_ms);
                    self.waiting.insert((until_ms, name));
                    continue;
                }
            }
            let is_again = !user.error.is_empty();
            if is_again && !may_retry {
                // Not in the line: others are not behind him.
                user.wait_until_ms = Some(now_ms + PAUSE_MS_MIN);
                self.waiting.insert((now_ms + PAUSE_MS_MIN, name));
                continue;
            }
            let look = std::mem::take(&mut user.wanted);
            user.running = Some(look.clone());
            user.is_again = is_again;
            self.running += 1;
            self.running_again += usize::from(is_again);
            return Some((name, look));
        }
        None
    }

    /// The user's look has found an index that was made anew.
    pub fn note_rebuilt(&mut self, name: &Arc<str>, mailbox: &[u8], now_ms: u64) {
        if let Some(user) = self.users.get_mut(name) {
            user.found_rebuilt = true;
        }
        if self.anew.len() >= REBUILT_MAX {
            self.anew.retain(|_, at_ms| *at_ms + ANEW_MS > now_ms);
        }
        if self.anew.len() < REBUILT_MAX {
            self.anew.insert((name.clone(), mailbox.to_vec()), now_ms);
        }
    }

    /// Whether the mailbox's index was made anew just now: what is told late may be of the one before.
    pub fn is_anew(&self, name: &Arc<str>, mailbox: &[u8], now_ms: u64) -> bool {
        if self.anew.is_empty() {
            return false;
        }
        self.anew.get(&(name.clone(), mailbox.to_vec())).is_some_and(|at_ms| at_ms + ANEW_MS > now_ms)
    }

    /// The user's look is over. The pause before the next attempt if it failed, and the reason is news.
    pub fn finish(&mut self, name: &Arc<str>, outcome: Result<(), String>, now_ms: u64) -> Option<u64> {
        let user = self.users.get_mut(name)?;
        let running = user.running.take()?;
        self.running -= 1;
        self.running_again -= usize::from(user.is_again);
        if std::mem::take(&mut user.found_rebuilt) {
            if self.rebuilt.len() >= REBUILT_MAX {
                self.rebuilt.clear();
            }
            let rebuilt = self.rebuilt.entry(name.clone()).or_default();
            *rebuilt = Rebuilt { ended_ms: now_ms, count: rebuilt.count + 1 };
        } else {
            self.rebuilt.remove(name);
        }
        let Err(error) = outcome else {
            user.pause_ms = 0;
            user.error.clear();
            if user.wanted.is_empty() {
                self.users.remove(name);
            } else {
                self.line_up(name);
            }
            return None;
        };
        user.wanted.merge(running);
        user.pause_ms = (user.pause_ms * 2).clamp(PAUSE_MS_MIN, PAUSE_MS_MAX);
        user.wait_until_ms = Some(now_ms + user.pause_ms);
        self.waiting.insert((now_ms + user.pause_ms, name.clone()));
        let is_news = user.error != error;
        if user.error.is_empty() {
            user.failed_since_ms = now_ms;
        }
        user.error = error;
        is_news.then_some(user.pause_ms)
    }

    pub fn wake_up_ms(&self) -> Option<u64> {
        self.waiting.first().map(|(until, _)| *until)
    }

    /// Whether nobody is to be looked at now but for users for whom it failed before.
    pub fn is_idle(&self) -> bool {
        self.line.is_empty() && self.running == self.running_again
    }

    /// Whether the user is to be looked at, or is.
    pub fn has(&self, user: &str) -> bool {
        self.users.contains_key(user)
    }

    pub fn is_running(&self, user: &str) -> bool {
        self.users.get(user).is_some_and(|user| user.running.is_some())
    }

    /// Looks under way.
    pub fn running(&self) -> usize {
        self.running
    }

    /// Of these, such as failed before.
    pub fn running_again(&self) -> usize {
        self.running_again
    }

    /// Users who are looked at, or will be.
    pub fn pending(&self) -> usize {
        self.users.len()
    }

    /// Users who could not be looked at, in no order.
    pub fn failed(&self) -> impl Iterator<Item = Failing<'_>> {
        let failed = self.users.iter().filter(|(_, user)| !user.error.is_empty());
        failed.map(|(name, user)| Failing {
            user: name,
            error: &user.error,
            since_ms: user.failed_since_ms,
            next_ms: user.wait_until_ms,
        })
    }

    /// Why a user who waits could not be looked at.
    pub fn error(&self) -> Option<(&str, &str)> {
        let (_, name) = self.waiting.first()?;
        self.users.get(name).map(|user| (&**name, user.error.as_str()))
    }

    fn line_up(&mut self, name: &Arc<str>) {
        if self.users.get(name).is_some_and(|user| user.running.is_none() && user.wait_until_ms.is_none()) {
            self.line.push_back(name.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(mailboxes: &[(u8, Option<Place>)], whole: bool) -> Look {
        let mailboxes = mailboxes.iter().map(|(guid, until)| (vec![*guid; 16], *until)).collect();
        Look { mailboxes, whole, logs: whole, subscriptions: whole, ..Default::default() }
    }

    #[test]
    fn one_look_takes_all_that_was_wanted_and_the_furthest_place() {
        let mut heals = Heals::default();
        let jane: Arc<str> = "jane".into();
        heals.want(&jane, &[1; 16], Some((2, 100)));
        heals.want(&jane, &[1; 16], Some((2, 50)));
        heals.want(&jane, &[2; 16], Some((2, 50)));
        heals.want(&jane, &[2; 16], None);
        assert_eq!(
            heals.next(0, true, |_| false),
            Some((jane.clone(), look(&[(1, Some((2, 100))), (2, None)], false)))
        );
        assert_eq!(heals.next(0, true, |user| user == "jane"), None);
        heals.want_all(&jane);
        assert_eq!(heals.next(0, true, |_| false), None, "one at a time");
        assert_eq!((heals.running(), heals.pending()), (1, 1));
        heals.finish(&jane, Ok(()), 0);
        assert_eq!(heals.next(0, true, |_| false), Some((jane.clone(), look(&[], true))));
        heals.finish(&jane, Ok(()), 0);
        assert_eq!((heals.running(), heals.pending()), (0, 0));
    }

    #[test]
    fn what_was_expunged_in_memory_is_kept_until_a_look_succeeds_but_not_any_number() {
        let mut heals = Heals::default();
        let jane: Arc<str> = "jane".into();
        let message = |uid| MessageRange { first_uid: uid, last_uid: uid, guid: "x".repeat(50), ..Default::default() };
        let all = |uids: &[u32], uid_next| Expunged { messages: uids.iter().copied().map(message).collect(), uid_next };
        let next = |heals: &mut Heals, now_ms| {
            let (_, look) = heals.next(now_ms, true, |_| false).expect("a look");
            let expunged = &look.expunged[&[1; 16][..]];
            (expunged.messages.len(), expunged.uid_next)
        };
        heals.want_expunged(&jane, &[1; 16], all(&[1, 2, 1], 9));
        assert_eq!(next(&mut heals, 0), (2, 9));
        heals.want_expunged(&jane, &[1; 16], all(&[3], 8));
        heals.finish(&jane, Err("no room".into()), 0);
        assert_eq!(next(&mut heals, 1_000), (3, 8));
        heals.finish(&jane, Ok(()), 1_000);
        heals.want_expunged(&jane, &[1; 16], all(&(1..=10_000).collect::<Vec<_>>(), 10_001));
        assert!(next(&mut heals, 2_000).0 < 1_000);
    }

    #[test]
    fn an_index_that_was_made_anew_is_remembered_for_a_while() {
        let mut heals = Heals::default();
        let jane: Arc<str> = "jane".into();
        heals.note_rebuilt(&jane, &[1; 16], 1_000);
        assert!(heals.is_anew(&jane, &[1; 16], 1_000 + ANEW_MS - 1));
        assert!(!heals.is_anew(&jane, &[2; 16], 1_000));
        assert!(!heals.is_anew(&jane, &[1; 16], 1_000 + ANEW_MS));
        heals.want_anew(&jane, &[1; 16]);
        let (_, look) = heals.next(0, true, |_| false).unwrap();
        assert!(look.anew.contains(&[1; 16][..]) && look.mailboxes.contains_key(&[1; 16][..]));
    }

    #[test]
    fn looks_that_feed_themselves_slow_down() {
        let mut heals = Heals::default();
        let (jane, joe): (Arc<str>, Arc<str>) = ("jane".into(), "joe".into());
        let mut look_for = |user: &Arc<str>, from_ms: u64, is_rebuilt: bool| {
            let mut looks = 0;
            for now_ms in (from_ms..from_ms + 600_000).step_by(10) {
                heals.want(user, &[1; 16], None);
                while let Some((user, _)) = heals.next(now_ms, true, |_| false) {
                    looks += 1;
                    if is_rebuilt {
                        heals.note_rebuilt(&user, &[1], now_ms);
                    }
                    heals.finish(&user, Ok(()), now_ms);
                }
            }
            looks
        };
        let looks = look_for(&jane, 0, true);
        assert!((15..40).contains(&looks), "{looks} looks in ten minutes");
        assert!(look_for(&joe, 600_000, false) > 50_000, "others are not held up");
        assert!(look_for(&jane, 2_000_000, false) > 50_000, "nor is who is well again");
    }

    #[test]
    fn what_fails_is_tried_again_with_what_was_wanted_meanwhile() {
        let mut heals = Heals::default();
        let (jane, joe): (Arc<str>, Arc<str>) = ("jane".into(), "joe".into());
        heals.want(&jane, &[1; 16], None);
        heals.next(0, true, |_| false);
        heals.want(&jane, &[2; 16], None);
        assert_eq!(heals.finish(&jane, Err("locked".into()), 0), Some(1_000));
        assert_eq!(heals.error(), Some(("jane", "locked")));
        heals.want(&joe, &[1; 16], None);
        assert_eq!(heals.next(999, true, |_| false).unwrap().0, joe, "others go on");
        assert_eq!(heals.next(1_000, true, |_| false), Some((jane.clone(), look(&[(1, None), (2, None)], false))));
        assert_eq!(heals.finish(&jane, Err("locked".into()), 1_000), None, "no news");
        assert_eq!(heals.wake_up_ms(), Some(3_000));
        let failed: Vec<_> = heals.failed().map(|failing| (failing.user, failing.error, failing.since_ms)).collect();
        assert_eq!(failed, [("jane", "locked", 0)]);
    }

    #[test]
    fn who_failed_before_holds_up_nobody_while_he_may_not_be_tried_again() {
        let mut heals = Heals::default();
        let (jane, joe): (Arc<str>, Arc<str>) = ("jane".into(), "joe".into());
        heals.want_all(&jane);
        heals.next(0, true, |_| false);
        heals.finish(&jane, Err("locked".into()), 0);
        heals.want_all(&joe);
        assert_eq!(heals.next(1_000, false, |_| false).map(|(user, _)| user), Some(joe.clone()));
        assert_eq!(heals.next(1_000, false, |_| false), None);
        heals.finish(&joe, Ok(()), 1_000);
        assert!(heals.is_idle());
        assert_eq!(heals.wake_up_ms(), Some(2_000));
        assert_eq!(heals.next(2_000, true, |_| false).map(|(user, _)| user), Some(jane.clone()));
        assert_eq!((heals.running(), heals.running_again()), (1, 1));
        heals.finish(&jane, Ok(()), 2_000);
        assert_eq!((heals.running(), heals.running_again(), heals.failed().count()), (0, 0, 0));
    }
}
