//! What is going on, for people: the answer to `doveadm dovetail status`.

use std::collections::BTreeMap;

use super::engine::Engine;
use super::peers::PeerState;
use super::waiting;
use crate::change;
use crate::journal::JournalError;
use crate::merge::rule::Rule;
use crate::wire::proto::{Counters, NamedCount, PeerStatus, Status, WaitingEntry};

/// Kinds of notes that are counted apart; further ones count as "other".
const NOTES_MAX: usize = 64;
/// Its name in Dovecot.
const CONFLICT_EVENT: &str = "dovetail_conflict_resolved";

/// Counts since the start.
#[derive(Default)]
pub struct Counts {
    pub counters: Counters,
    notes: BTreeMap<String, u64>,
}

impl Counts {
    /// Counts something that was noticed and solved, or skipped.
    pub fn note(&mut self, name: &str, count: u64) {
        let is_known = self.notes.contains_key(name) || self.notes.len() < NOTES_MAX && name.len() <= 64;
        *self.notes.entry(if is_known { name } else { "other" }.to_owned()).or_default() += count;
    }

    /// Counts a conflict by its kind, and tells of it: the host makes an event of what is logged so.
    pub fn solved(&mut self, user: &str, path: &[String], rule: Rule) {
        let (kind, mailbox) = (rule.kind(), change::printable(&path.join("/")));
        self.note(&format!("{kind}_conflict"), 1);
        log::debug!(
            target: CONFLICT_EVENT, user = user, mailbox = mailbox.as_str(), kind = kind, rule = rule.name();
            "User {user}: mailbox {mailbox}: a conflict was resolved: {kind}: {}", rule.name()
        );
    }
}

impl Engine {
    pub fn status(&self) -> Status {
        let look_error = self.heals.error().map(|(user, error)| format!("user {user}: {error}")).unwrap_or_default();
        let here = self.waiting_here();
        let notes = self.counts.notes.iter().map(|(name, count)| NamedCount { name: name.clone(), count: *count });
        Status {
            peers: (self.peers.iter().enumerate()).map(|(index, peer)| self.peer_status(index, peer, &here)).collect(),
            counters: Some(Counters {
                notes: notes.collect(),
                looking: (self.heals.pending() + self.lists.to_be_looked_at() + self.sweeping()) as u64,
                look_error,
                ..self.counts.counters.clone()
            }),
            server: self.me.server.clone(),
            epoch: self.me.epoch,
        }
    }

    /// The same; what is pending, and what is to be looked at, of this user.
    pub fn status_of(&self, user: &str) -> Result<Status, JournalError> {
        let mut status = self.status();
        let held = self.order.held_of(user) as u64;
        for (peer, row) in self.peers.iter().zip(&mut status.peers) {
            row.pending = self.journal.count_pending(&peer.name, Some(user), self.journal.seq())? + held;
            row.behind_secs = self.secs_since(peer.outbox.oldest_us_of(user));
        }
        if let Some(counters) = &mut status.counters {
            counters.looking = u64::from(self.is_to_be_looked_at(user)) + self.sweeping() as u64;
        }
        Ok(status)
    }

    fn is_to_be_looked_at(&self, user: &str) -> bool {
        self.heals.has(user) || self.lists.is_to_be_looked_at(user)
    }

    fn secs_since(&self, at_us: Option<u64>) -> u64 {
        at_us.map_or(0, |at_us| self.outside.now_us().saturating_sub(at_us) / 1_000_000)
    }

    fn peer_status(&self, index: usize, peer: &PeerState, here: &[WaitingEntry]) -> PeerStatus {
        // What is held waits for others, and then for every peer.
        let held = self.order.held() as u64;
        let stats = peer.outbox.stats();
        let of_users = waiting::in_short(self.waiting_for(index).iter().chain(here));
        let is_missing = match stats.dropped {
            0 => String::new(),
            count => format!("{count} changes did not fit into the journal: compare it (doveadm dovetail failed)"),
        };
        let errors = [is_missing, change::printable(&peer.last_error), of_users, change::printable(&peer.clock_error)];
        let last_error = errors.into_iter().find(|error| !error.is_empty()).unwrap_or_default();
        PeerStatus {
            peer: peer.name.clone(),
            state: peer.state().into(),
            pending: stats.pending + held,
            behind_secs: self.secs_since(stats.oldest_us),
            dropped: stats.dropped,
            last_error,
            pending_bytes: stats.pending_bytes,
            acked: stats.acked,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_bounded() {
        let mut counts = Counts::default();
        for n in 0..1000 {
            counts.note(&format!("note{n}"), 1);
        }
        counts.note(&"x".repeat(65), 1);
        assert_eq!(counts.notes.len(), NOTES_MAX + 1);
        assert_eq!(counts.notes["other"], 1000 - NOTES_MAX as u64 + 1);
    }
}
