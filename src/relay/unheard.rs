//! Users of whom nobody has told yet: the first mail of one may have come while the relay was away, and no process that
//! could tell of it is left.
//!
//! After every start, when all users in the journal were looked at, a worker asks the userdb who the users are. The others are
//! looked at if something was written to their mail since the relay ran first. Nothing is concluded from whom it does not
//! list: of several userdbs, some may list nobody, and Dovecot does not say so. The next start asks again for the same time.

use super::engine::{Close, Engine};
use super::workers::{Task, Worker};
use crate::change;
use crate::journal::JournalError;
use crate::wire::proto::frame::Kind;
use crate::wire::proto::{self, Looked};

/// Users who are wanted to be looked at, at a time.
const USERS_MAX: usize = 100;

/// How far the search is.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum Unheard {
    /// A worker is to ask who there is; since when (seconds since 1970).
    Ask(i64),
    /// It does: the number of its job.
    Asking(i64, u64),
    /// These are left.
    Left(i64, Vec<String>),
    #[default]
    Done,
}

impl Engine {
    /// What of the sweeps after the start is not over.
    pub fn sweeping(&self) -> usize {
        usize::from(self.swept.is_some()) + usize::from(self.unheard != Unheard::Done)
    }

    /// The next of them are looked at, when nobody else is to be.
    pub fn sweep_unheard(&mut self) {
        let Unheard::Left(since, users) = &mut self.unheard else { return };
        if self.swept.is_some() || !self.heals.is_idle() {
            return;
        }
        let since = *since;
        if users.is_empty() {
            self.unheard = Unheard::Done;
            return;
        }
        let next = users.split_off(users.len().saturating_sub(USERS_MAX));
        next.iter().for_each(|user| self.heals.want_written_since(&user.as_str().into(), since));
    }

    /// Has an idle worker ask the userdb, once all known users were looked at.
    pub fn ask_for_users(&mut self) {
        let Unheard::Ask(since) = self.unheard else { return };
        if self.swept.is_some() || !self.heals.is_idle() {
            return;
        }
        let Some(index) = self.workers.iter().position(Worker::may_work) else { return };
        let Some(token) = self.workers[index].token else { return };
        self.last_job += 1;
        self.unheard = Unheard::Asking(since, self.last_job);
        self.workers[index].task = Task::Ask;
        self.send(token, &Kind::Look(proto::Look { job: self.last_job, users: true, ..Default::default() }).into());
    }

    /// The worker that asked went away.
    pub fn ask_again(&mut self) {
        if let Unheard::Asking(since, _) = self.unheard {
            self.unheard = Unheard::Ask(since);
            self.asked.clear();
        }
    }

    pub fn worker_asked(&mut self, index: usize, looked: Looked) -> Result<(), Close> {
        let Unheard::Asking(since, job) = self.unheard else {
            return Err(Close::Malformed("it tells of users, and was not asked".into()));
        };
        if looked.job != job {
            return Err(Close::Malformed(format!("it tells of users for job {}, but has job {job}", looked.job)));
        }
        if let Err(error) = self.take_users(looked.users) {
            self.fail(error);
        }
        if looked.more {
            return Ok(());
        }
        self.workers[index].task = Task::Idle;
        let users = std::mem::take(&mut self.asked);
        self.unheard = match looked.error.is_empty() {
            true => Unheard::Left(since, users),
            false => {
                log::info!(
                    "Users who had their first mail while the relay was away are not looked for: {}. Their mail is sent when \
                     it changes next.",
                    change::printable(&looked.error)
                );
                Unheard::Done
            }
        };
        Ok(())
    }

    fn take_users(&mut self, users: Vec<String>) -> Result<(), JournalError> {
        for user in users.into_iter().filter(|user| change::check_user(user).is_ok()) {
            if !self.journal.was_looked_at(&user)? {
                self.asked.push(user);
            }
        }
        Ok(())
    }
}
