//! Changes of flags of this server that a worker makes once more, because an earlier one of a peer stands behind them in the
//! mailbox ([`super::flags`]).
//!
//! Nothing else is applied to the user's mail meanwhile: what the peers made after they had heard of it would be undone.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use prost::Message;

use super::backoff::Backoff;
use super::engine::{Close, Engine};
use super::heal::Failing;
use super::poison::{Tried, TRIES_MAX};
use super::workers::{apply_frames, Task, Worker, RETRY_MS_MAX, RETRY_MS_MIN};
use crate::change;
use crate::journal::{Failed, JournalError};
use crate::merge::rule::Rule;
use crate::wire::proto::op::What;
use crate::wire::proto::{Applied, Apply, Change};

/// Changes in one job.
const JOB_CHANGES_MAX: usize = 64;

struct User {
    /// Not above any one's.
    clock: u64,
    /// Those that no worker was given yet, encoded.
    waiting: HashSet<Vec<u8>>,
    is_running: bool,
    due_ms: u64,
    backoff: Backoff,
    tries: u32,
    /// Why the last of them failed.
    error: String,
    failed_since_ms: u64,
}

/// Users for whom some are to be made.
#[derive(Default)]
pub struct Redos {
    users: BTreeMap<Arc<str>, User>,
}

impl Redos {
    /// False if it waits already.
    pub fn want(&mut self, user: &Arc<str>, clock: u64, change: Vec<u8>) -> bool {
        let new = || User {
            clock,
            waiting: HashSet::new(),
            is_running: false,
            due_ms: 0,
            backoff: Backoff::new(RETRY_MS_MIN, RETRY_MS_MAX),
            tries: 0,
            error: String::new(),
            failed_since_ms: 0,
        };
        let user = self.users.entry(user.clone()).or_insert_with(new);
        user.clock = user.clock.min(clock);
        user.waiting.insert(change)
    }

    /// Whether the user's other changes wait for some.
    pub fn has(&self, user: &str) -> bool {
        self.users.contains_key(user)
    }

    pub fn is_running(&self, user: &str) -> bool {
        self.users.get(user).is_some_and(|user| user.is_running)
    }

    /// Of the first of all.
    pub fn first_clock(&self) -> Option<u64> {
        self.users.values().map(|user| user.clock).min()
    }

    /// When a pause is over. Whose is over already waits for a worker, or for the user's job or look to end.
    pub fn wake_up_ms(&self, now_ms: u64) -> Option<u64> {
        let waiting = self.users.values().filter(|user| !user.is_running);
        waiting.map(|user| user.due_ms).filter(|due_ms| *due_ms > now_ms).min()
    }

    /// `may_retry`: also what failed before.
    fn next(&mut self, now_ms: u64, may_retry: bool, is_busy: impl Fn(&str) -> bool) -> Option<Arc<str>> {
        let is_due = |user: &User| !user.is_running && user.due_ms <= now_ms && (may_retry || user.tries == 0);
        let is_next = |(name, user): &(&Arc<str>, &mut User)| is_due(user) && !is_busy(name);
        let (name, user) = self.users.iter_mut().find(is_next)?;
        user.is_running = true;
        user.waiting.clear();
        Some(name.clone())
    }

    fn are_made(&mut self, name: &str, is_all: bool) {
        match self.users.get_mut(name) {
            Some(user) if !is_all => (user.is_running, user.tries) = (false, 0),
            _ => drop(self.users.remove(name)),
        }
    }

    /// Users for whom it failed; next: None while it is tried.
    pub fn failed(&self) -> impl Iterator<Item = Failing<'_>> {
        let failed = self.users.iter().filter(|(_, user)| user.tries > 0);
        failed.map(|(name, user)| Failing {
            user: name,
            error: &user.error,
            since_ms: user.failed_since_ms,
            next_ms: (!user.is_running).then_some(user.due_ms),
        })
    }

    /// How often it was tried. There is a pause until the next time.
    fn has_failed(&mut self, name: &str, error: &str, now_ms: u64) -> u32 {
        let Some(user) = self.users.get_mut(name) else { return 0 };
        if user.tries == 0 {
            user.failed_since_ms = now_ms;
        }
        error.clone_into(&mut user.error);
        user.is_running = false;
        user.due_ms = now_ms + user.backoff.pause_ms();
        user.tries += 1;
        user.tries
    }
}

/// What a worker makes again.
pub struct RedoJob {
    id: u64,
    user: Arc<str>,
    /// Up to this one, as the journal counts them.
    last: i64,
    /// It failed before.
    pub again: bool,
}

impl RedoJob {
    pub fn user(&self) -> &str {
        &self.user
    }
}

impl Engine {
    /// Takes over those that were not made before the last end.
    pub fn resume_redos(&mut self) -> Result<(), JournalError> {
        for (user, change) in self.journal.all_redos()? {
            let clock = Change::decode(&change[..]).ok().and_then(|change| change.stamp).map_or(0, |stamp| stamp.clock);
            self.redos.want(&user.into(), clock, change);
        }
        Ok(())
    }

    /// The change of flags, with its stamp, is to be made once more.
    pub fn want_redone(&mut self, user: &Arc<str>, change: &Change) -> Result<(), JournalError> {
        let encoded = change.encode_to_vec();
        let clock = change.stamp.as_ref().map_or(0, |stamp| stamp.clock);
        if !self.redos.want(user, clock, encoded.clone()) {
            return Ok(());
        }
        let path = change.mailbox.as_ref().map(|mailbox| &mailbox.path[..]).unwrap_or_default();
        self.counts.solved(user, path, Rule::FlagMadeAgain);
        self.journal.note_redo(user, &encoded)
    }

    /// Gives those whose time has come to idle workers.
    pub fn dispatch_redos(&mut self) {
        while let Some(index) = self.workers.iter().position(Worker::may_work) {
            let (work, heals) = (&self.work, &self.heals);
            let is_busy = |user: &str| work.is_busy(user) || heals.is_running(user);
            let Some(user) = self.redos.next(self.now_ms, self.may_retry(), is_busy) else { return };
            if let Err(error) = self.begin_redo(index, user) {
                return self.fail(error);
            }
        }
    }

    fn begin_redo(&mut self, index: usize, user: Arc<str>) -> Result<(), JournalError> {
        let rows = self.journal.redos(&user, JOB_CHANGES_MAX)?;
        let Some((last, _)) = rows.last() else {
            self.redos.are_made(&user, true);
            return Ok(());
        };
        let last = *last;
        let mut changes: Vec<Change> = rows.iter().filter_map(|(_, change)| Change::decode(&change[..]).ok()).collect();
        // A client may have changed the same flags since.
        self.reduce_flags(&user, changes.iter_mut())?;
        let is_left = |change: &Change| change.ops.iter().any(|op| matches!(op.what, Some(What::Flags(_))));
        changes.retain(is_left);
        if changes.is_empty() {
            return self.are_redone(&user, last);
        }
        let me = self.me.server.clone();
        let mut elsewhere = self.elsewhere(&user, changes.iter())?;
        // It is our own UIDs that they name.
        elsewhere.retain(|one| one.moved);
        self.last_job += 1;
        let frames = {
            let brief = self.begin_briefly(index);
            let first = Apply { aliases: self.lists.aliases(&user), me, brief, ..Default::default() };
            apply_frames(self.last_job, &user, first, elsewhere, changes.into_iter())
        };
        let again = self.redos.failed().any(|failing| *failing.user == *user);
        self.workers[index].task = Task::Redo(RedoJob { id: self.last_job, user, last, again });
        let Some(token) = self.workers[index].token else { return Ok(()) };
        for frame in frames {
            self.send(token, &frame);
        }
        Ok(())
    }

    pub fn worker_redid(&mut self, index: usize, job: RedoJob, applied: Applied) -> Result<(), Close> {
        if applied.job != job.id {
            return Err(Close::Malformed(format!("it applied job {}, but has job {}", applied.job, job.id)));
        }
        change::check_spans(&applied.spans).map_err(|error| Close::Malformed(error.to_string()))?;
        self.take_own_spans(index, applied.spans);
        if applied.more {
            self.workers[index].task = Task::Redo(job);
            return Ok(());
        }
        if !applied.error.is_empty() {
            self.redo_failed(&job, &change::printable(&applied.error), applied.never);
        } else if let Err(error) = self.are_redone(&job.user, job.last) {
            self.fail(error);
        }
        self.forget_partly_applied(&job.user);
        Ok(())
    }

    fn are_redone(&mut self, user: &Arc<str>, last: i64) -> Result<(), JournalError> {
        self.journal.forget_redos(user, last)?;
        self.poison.note_job();
        self.poison.is_over(&Tried::Redo(user.clone()));
        let is_all = self.journal.redos(user, 1)?.is_empty();
        self.redos.are_made(user, is_all);
        Ok(())
    }

    pub fn redo_failed(&mut self, job: &RedoJob, error: &str, never: bool) {
        let user = &job.user;
        let tries = self.redos.has_failed(user, error, self.now_ms);
        if never && tries >= TRIES_MAX {
            let error = format!("a change of flags that a peer's has undone cannot be made again: {error}");
            log::error!("User {user}: {error}; the mailbox must be compared (doveadm dovetail failed).");
            let at_us = self.outside.now_us();
            self.remember_failed(&Failed { user: user.to_string(), at_us, error, ..Default::default() });
            let forgotten = self.are_redone(user, job.last);
            return forgotten.unwrap_or_else(|error| self.fail(error));
        }
        if tries == 1 {
            log::error!(
                "User {user}: a change of flags that a peer's has undone cannot be made again: {error} - the user's \
                 changes wait."
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_tried_again_after_a_pause_and_nobody_spins_for_it() {
        let jane: Arc<str> = "jane".into();
        let mut redos = Redos::default();
        assert!(redos.want(&jane, 7, vec![1]));
        assert!(!redos.want(&jane, 9, vec![1]), "it waits already");
        assert_eq!((redos.first_clock(), redos.wake_up_ms(0)), (Some(7), None));
        assert_eq!(redos.next(0, true, |_| true), None, "he is busy otherwise");
        assert_eq!(redos.next(0, true, |_| false), Some(jane.clone()));
        assert!(redos.is_running("jane") && redos.next(0, true, |_| false).is_none());
        assert_eq!(redos.has_failed("jane", "full", 100), 1);
        assert_eq!((redos.next(100, true, |_| false), redos.wake_up_ms(100)), (None, Some(100 + RETRY_MS_MIN)));
        assert_eq!(redos.wake_up_ms(100 + RETRY_MS_MIN), None, "a job's end wakes up, too");
        assert_eq!(redos.next(100 + RETRY_MS_MIN, true, |_| false), Some(jane.clone()));
        redos.are_made("jane", false);
        assert!(redos.has("jane"), "more came meanwhile");
        redos.are_made("jane", true);
        assert!(!redos.has("jane"));
    }
}
