//! All users whom the relay knows are compared with the connected peers, one after the other, now and then (`dovetail_compare_interval`):
//! what differs although nobody noticed is found and repaired.
//!
//! Guarantees that it takes its time: one user at once, spread over the interval, when nothing else is to be compared or looked for, and
//! somebody is there to compare him with. It goes on behind the last user after a restart.

use std::sync::Arc;

use super::engine::Engine;
use super::peers::PeerState;
use crate::journal::JournalError;

/// When something else has to be done first.
const BUSY_MS: u64 = 1_000;

/// See the module.
#[derive(Default)]
pub struct Background {
    /// When the next user's turn is.
    at_ms: Option<u64>,
    /// The last one who was compared.
    after: String,
    pub users: u64,
    pub done: u64,
    pause_ms: u64,
}

impl Background {
    pub fn wake_up_ms(&self) -> Option<u64> {
        self.at_ms
    }

    /// Until all of this pass were compared.
    pub fn left_ms(&self, now_ms: u64) -> u64 {
        let next_ms = self.at_ms.unwrap_or(now_ms).saturating_sub(now_ms);
        next_ms + self.users.saturating_sub(self.done + 1) * self.pause_ms
    }
}

impl Engine {
    pub fn tick_background(&mut self) {
        let Some(interval_ms) = self.config.compare_interval_ms.filter(|_| !self.peers.is_empty()) else { return };
        if self.is_stopping() || self.background.at_ms.is_some_and(|at_ms| at_ms > self.now_ms) {
            return;
        }
        if let Err(error) = self.go_on_in_background(interval_ms) {
            self.fail(error);
        }
    }

    fn go_on_in_background(&mut self, interval_ms: u64) -> Result<(), JournalError> {
        if self.background.at_ms.is_none() {
            let after = self.journal.compared_in_background()?;
            return self.begin_pass(after, interval_ms);
        }
        let is_alone = !self.peers.iter().any(PeerState::is_up);
        if is_alone || self.sweeping() > 0 || !self.heals.is_idle() || !self.comparisons.is_idle(self.now_ms) {
            self.background.at_ms = Some(self.now_ms + BUSY_MS);
            return Ok(());
        }
        let Some(user) = self.journal.users(&self.background.after, 1)?.pop() else {
            return self.begin_pass(String::new(), interval_ms);
        };
        self.journal.note_compared_in_background(&user)?;
        self.comparisons.want_in_background(&Arc::from(user.as_str()), self.now_ms);
        self.background.after = user;
        self.background.done += 1;
        self.background.users = self.background.users.max(self.background.done);
        self.background.at_ms = Some(self.now_ms + self.background.pause_ms);
        Ok(())
    }

    fn begin_pass(&mut self, after: String, interval_ms: u64) -> Result<(), JournalError> {
        let (done, users) = self.journal.count_users(&after)?;
        let pause_ms = (interval_ms / users.max(1)).max(1);
        self.background = Background { at_ms: Some(self.now_ms + pause_ms), after, users, done, pause_ms };
        Ok(())
    }
}
