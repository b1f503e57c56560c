//! `dovetail_ack`: mail processes that answer their clients only when a save is journaled, or when peers have applied it.
//!
//! A record that wants it is followed by its number through the order and the journal until enough peers have acknowledged the change, or
//! until it is clear that they will not in time: a peer that has been away for longer than the process would wait, or that could
//! not apply what the user did, is not waited for, so a dead peer costs nobody that time again and again. Guarantees one answer to
//! each, at the latest when its time is over, and none before the change is in the journal.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use mio::Token;

use super::engine::{Engine, Role};
use crate::change;
use crate::journal::JournalError;
use crate::wire::proto::{frame::Kind, AckWanted, Acked};

/// Who may wait at the same time, all and of one connection (a process waits for one record, and has given up those before it).
const ACKS_MAX: usize = 65_536;
const ACKS_PER_CONNECTION_MAX: usize = 64;
/// And for how long.
const WAIT_MS_MAX: u64 = 60_000;
/// Between two looks at a change that a worker has told of before its process did.
const POLL_MS: u64 = 20;

/// A connection, and its number for it.
pub type AckId = (Token, u64);

/// How it is known what peers have of it.
enum Follows {
    /// It is held, for what is before it.
    Nothing,
    /// By its number.
    Seq(u64),
    /// It was found in a log meanwhile, under a number up to this one.
    UpTo(u64),
}

struct Ack {
    user: Arc<str>,
    peers_wanted: u32,
    wait_ms: u64,
    until_ms: u64,
    follows: Follows,
    /// Bits of the peers that have applied it.
    applied: u64,
    /// And of those that could not.
    refused: u64,
}

/// See the module.
#[derive(Default)]
pub struct Acks {
    waiting: BTreeMap<AckId, Ack>,
    by_seq: HashMap<u64, AckId>,
    /// Answers that wait for the journal's commit.
    answers: Vec<(AckId, String)>,
    has_news: bool,
}

impl Acks {
    /// Follows one more record, or answers at once that too many are followed.
    fn want(&mut self, id: AckId, ack: Ack) {
        // Its answer would be taken for this one's.
        self.settle(id, "its number was used again");
        let of_connection = self.waiting.range((id.0, 0)..=(id.0, u64::MAX)).count();
        if self.waiting.len() < ACKS_MAX && of_connection < ACKS_PER_CONNECTION_MAX {
            self.waiting.insert(id, ack);
        } else {
            self.answers.push((id, "too many wait already".to_owned()));
        }
    }

    /// This number is shipped for the record.
    pub fn shipped(&mut self, id: AckId, seq: u64) {
        if let Some(ack) = self.waiting.get_mut(&id) {
            ack.follows = Follows::Seq(seq);
            self.by_seq.insert(seq, id);
            self.has_news = true;
        }
    }

    /// A worker has read it in the log before it was told; all of that has numbers up to this one.
    pub fn found(&mut self, id: AckId, up_to: u64) {
        if let Some(ack) = self.waiting.get_mut(&id) {
            ack.follows = Follows::UpTo(up_to);
            self.has_news = true;
        }
    }

    /// There is nothing that peers could lack, or they will never get it, for this reason.
    pub fn settle(&mut self, id: AckId, error: &str) {
        if let Some(ack) = self.waiting.remove(&id) {
            if let Follows::Seq(seq) = ack.follows {
                self.by_seq.remove(&seq);
            }
            self.answers.push((id, error.to_owned()));
        }
    }

    /// The peer has applied this change.
    pub fn applied(&mut self, peer: usize, seq: u64) {
        if let Some(ack) = self.by_seq.get(&seq).and_then(|id| self.waiting.get_mut(id)) {
            ack.applied |= 1 << peer;
            self.has_news = true;
        }
    }

    /// And all before.
    pub fn applied_up_to(&mut self, peer: usize, seq: u64) {
        for ack in self.waiting.values_mut() {
            if matches!(ack.follows, Follows::Seq(own) if own <= seq) {
                ack.applied |= 1 << peer;
                self.has_news = true;
            }
        }
    }

    /// The peer could not apply what the user did. What it acknowledges later may be set aside there.
    pub fn refused(&mut self, peer: usize, user: &str) {
        for ack in self.waiting.values_mut().filter(|ack| *ack.user == *user) {
            ack.refused |= 1 << peer;
            self.has_news = true;
        }
    }

    pub fn wake_up_ms(&self, now_ms: u64) -> Option<u64> {
        let due_ms = |ack: &Ack| match ack.follows {
            Follows::UpTo(_) => ack.until_ms.min(now_ms + POLL_MS),
            _ => ack.until_ms,
        };
        self.waiting.values().map(due_ms).min()
    }
}

impl Engine {
    /// A process wants to know when its record is safe.
    pub fn want_ack(&mut self, token: Token, user: &Arc<str>, wanted: &AckWanted) -> AckId {
        let id = (token, wanted.id);
        let wait_ms = wanted.timeout_ms.min(WAIT_MS_MAX);
        let ack = Ack {
            user: user.clone(),
            peers_wanted: wanted.peers,
            wait_ms,
            until_ms: self.now_ms + wait_ms,
            follows: Follows::Nothing,
            applied: 0,
            refused: 0,
        };
        self.acks.want(id, ack);
        id
    }

    /// Answers what is decided; to be called when the journal was given the time to commit.
    pub fn answer_acks(&mut self) {
        let is_due = self.acks.wake_up_ms(self.now_ms).is_some_and(|due_ms| due_ms <= self.now_ms);
        let has_found = self.acks.waiting.values().any(|ack| matches!(ack.follows, Follows::UpTo(_)));
        if std::mem::take(&mut self.acks.has_news) || is_due || has_found {
            let decided: Result<Vec<(AckId, String)>, JournalError> = self.decided_acks();
            match decided {
                Ok(decided) => decided.iter().for_each(|(id, error)| self.acks.settle(*id, error)),
                Err(error) => return self.fail(error),
            }
        }
        if self.acks.answers.is_empty() || self.journal.is_urgent() {
            return;
        }
        for ((token, id), error) in std::mem::take(&mut self.acks.answers) {
            if self.sockets.get(&token).is_some_and(|socket| matches!(socket.role, Role::Local(_))) {
                self.send(token, &Kind::Acked(Acked { id, error }).into());
            }
        }
    }

    /// Those about which no more is to be learned, and why they are not acknowledged.
    fn decided_acks(&self) -> Result<Vec<(AckId, String)>, JournalError> {
        let mut decided = Vec::new();
        for (id, ack) in &self.acks.waiting {
            if !self.sockets.contains_key(&id.0) {
                decided.push((*id, String::new()));
                continue;
            }
            let peers: Vec<usize> = self.peers_of(&ack.user).collect();
            let wanted = peers.len().min(ack.peers_wanted as usize);
            let mut applied = 0;
            for peer in &peers {
                applied += usize::from(match ack.follows {
                    Follows::Nothing => false,
                    Follows::Seq(_) => ack.applied & 1 << peer != 0,
                    Follows::UpTo(up_to) => {
                        let name = &self.peers[*peer].name;
                        self.journal.first_pending_of(name, Some(&ack.user), 0, up_to)?.is_none()
                    }
                });
            }
            if applied >= wanted && !matches!(ack.follows, Follows::Nothing) {
                decided.push((*id, String::new()));
                continue;
            }
            let has_it = |peer: &usize| ack.applied & 1 << *peer != 0;
            let may_come = |peer: &&usize| has_it(peer) || self.may_apply_soon(**peer, ack);
            if ack.until_ms <= self.now_ms || peers.iter().filter(may_come).count() < wanted {
                let left = peers.iter().copied().filter(|peer| !has_it(peer));
                decided.push((*id, self.why_not_acked(applied, wanted, left)));
            }
        }
        Ok(decided)
    }

    fn may_apply_soon(&self, peer: usize, ack: &Ack) -> bool {
        let state = &self.peers[peer];
        let is_expected = state.is_up() || self.now_ms.saturating_sub(state.down_since_ms) < ack.wait_ms;
        is_expected && ack.refused & 1 << peer == 0 && !state.outbox.is_refused(&ack.user)
    }

    fn why_not_acked(&self, applied: usize, wanted: usize, left: impl Iterator<Item = usize>) -> String {
        if wanted == 0 {
            return "this server's relay could not journal it in time".to_owned();
        }
        let left = left.map(|peer| match self.why_behind(peer) {
            reason if reason.is_empty() => self.peers[peer].name.clone(),
            reason => format!("{} ({reason})", self.peers[peer].name),
        });
        let left = change::printable(&left.collect::<Vec<_>>().join(", "));
        format!("{applied} peers of {wanted} have applied it, and these have not: {left}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack() -> Ack {
        Ack {
            user: "jane".into(),
            peers_wanted: 1,
            wait_ms: 1_000,
            until_ms: 1_000,
            follows: Follows::Nothing,
            applied: 0,
            refused: 0,
        }
    }

    #[test]
    fn one_connection_keeps_nobody_else_from_waiting() {
        let mut acks = Acks::default();
        (0..100_000).for_each(|n| acks.want((Token(1), n), ack()));
        acks.want((Token(2), 0), ack());
        assert_eq!(acks.waiting.len(), ACKS_PER_CONNECTION_MAX + 1);
        assert!(acks.waiting.contains_key(&(Token(2), 0)));
        assert_eq!(acks.answers.len(), 100_000 - ACKS_PER_CONNECTION_MAX);
    }

    #[test]
    fn of_a_number_that_is_used_again_nothing_is_left() {
        let mut acks = Acks::default();
        for seq in 1..=1_000 {
            acks.want((Token(1), 7), ack());
            acks.shipped((Token(1), 7), seq);
        }
        assert_eq!((acks.waiting.len(), acks.by_seq.len(), acks.answers.len()), (1, 1, 999));
        acks.settle((Token(1), 7), "");
        assert_eq!((acks.waiting.len(), acks.by_seq.len()), (0, 0));
    }
}
