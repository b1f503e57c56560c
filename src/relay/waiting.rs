//! Users for whom something cannot go on now, and why: the answer to `doveadm dovetail waiting`, in short in the status.

use std::collections::HashSet;

use super::engine::Engine;
use crate::change;
use crate::wire::proto::WaitingEntry;

impl Engine {
    /// All of them. One may stand there several times, for different reasons.
    pub fn waiting(&self) -> Vec<WaitingEntry> {
        let for_peers = (0..self.peers.len()).flat_map(|index| self.waiting_for(index));
        for_peers.chain(self.waiting_here()).collect()
    }

    /// Whose changes the peer could not apply, and whose changes of the peer wait for others; who waits longest first.
    pub fn waiting_for(&self, index: usize) -> Vec<WaitingEntry> {
        let peer = &self.peers[index];
        let sent = peer.outbox.refused().into_iter().map(|refused| WaitingEntry {
            user: refused.user.to_owned(),
            peer: peer.name.clone(),
            what: "send".into(),
            reason: change::printable(refused.error),
            since_us: refused.at_us,
            next_us: refused.next_ms.map_or(0, |next_ms| self.at_us(next_ms)),
        });
        let received = self.work.waiting(index).filter_map(|received| {
            Some(WaitingEntry {
                user: received.change.user.clone(),
                peer: peer.name.clone(),
                what: "receive".into(),
                reason: self.waits_for(received)?,
                since_us: received.waits_since_ms.map_or(0, |since_ms| self.at_us(since_ms)),
                next_us: received.overdue_ms().map_or(0, |until_ms| self.at_us(until_ms)),
            })
        });
        sent.chain(received).collect()
    }

    /// Who could not be looked at, and whose flags could not be set once more; who waits longest first.
    pub fn waiting_here(&self) -> Vec<WaitingEntry> {
        let looks = self.heals.failed().map(|failing| (failing, "look"));
        let mut failing: Vec<_> = looks.chain(self.redos.failed().map(|failing| (failing, "flags"))).collect();
        failing.sort_by_key(|(failing, _)| (failing.since_ms, failing.user));
        let entry = |(failing, what): (super::heal::Failing, &str)| WaitingEntry {
            user: failing.user.to_owned(),
            peer: String::new(),
            what: what.to_owned(),
            reason: change::printable(failing.error),
            since_us: self.at_us(failing.since_ms),
            next_us: failing.next_ms.map_or(0, |next_ms| self.at_us(next_ms)),
        };
        failing.into_iter().map(entry).collect()
    }

    /// A time of the engine's clock, in microseconds since 1970.
    fn at_us(&self, ms: u64) -> u64 {
        let now_us = self.outside.now_us();
        match ms.checked_sub(self.now_ms) {
            Some(ahead_ms) => now_us.saturating_add(ahead_ms.saturating_mul(1_000)),
            None => now_us.saturating_sub((self.now_ms - ms).saturating_mul(1_000)),
        }
    }
}

/// The first one's reason, and how many other users wait. Empty: nobody does.
pub fn in_short<'a>(waiting: impl Iterator<Item = &'a WaitingEntry>) -> String {
    let mut waiting = waiting.peekable();
    let Some(WaitingEntry { user, reason, .. }) = waiting.peek().copied() else { return String::new() };
    let others: HashSet<&str> = waiting.map(|entry| entry.user.as_str()).filter(|other| other != user).collect();
    let first = change::printable(&format!("user {user}: {reason}"));
    match others.len() {
        0 => first,
        1 => format!("{first} (and 1 other user waits)"),
        count => format!("{first} (and {count} other users wait)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_short_it_is_who_waits_longest_and_how_many_others() {
        let entry =
            |user: &str, reason: &str| WaitingEntry { user: user.into(), reason: reason.into(), ..Default::default() };
        let all = [entry("jane", "disk full"), entry("jane", "locked"), entry("joe", "x"), entry("jim", "y")];
        assert_eq!(in_short([].iter()), "");
        assert_eq!(in_short(all[..2].iter()), "user jane: disk full");
        assert_eq!(in_short(all[..3].iter()), "user jane: disk full (and 1 other user waits)");
        assert_eq!(in_short(all.iter()), "user jane: disk full (and 2 other users wait)");
        let long = [entry("jane", &"x".repeat(10_000)), entry("joe", "x")];
        assert!(in_short(long.iter()).ends_with(" (and 1 other user waits)"));
    }
}
