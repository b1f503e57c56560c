//! Causal order: a change of a user is applied only after those of his that it comes after, whichever server made them.
//!
//! A change's stamp names, for each server, the last change of its user that was applied at its origin, and the origin's own
//! one before it. They come over different connections, and may come in any order. Of what is named only changes of
//! servers that we talk to are waited for, and not those that will never come.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::engine::Engine;
use super::peers::PeerState;
use super::work::{Received, WAIT_MS_MAX};
use crate::change::VECTOR_MAX;
use crate::journal::{Failed, Journal, JournalError, Seen};
use crate::wire::proto::{Change, SeqOf, Span, Stamp};

/// Users of whom it is known that something will not come, at most.
const ABANDONED_MAX: usize = 10_000;

/// What is known of users' changes that are not whole here.
#[derive(Default)]
pub struct Causes {
    /// A worker has committed a part of it: who has seen that comes after it.
    partly: HashMap<Arc<str>, SeqOf>,
    /// Users, and servers whose changes were waited for in vain since they were last connected.
    abandoned: HashSet<(Arc<str>, String)>,
}

impl Causes {
    /// The server is connected: what was missing may come now.
    pub fn hope_again(&mut self, origin: &str) {
        self.abandoned.retain(|(_, name)| name != origin);
    }
}

/// What decides whether a change has to wait.
pub struct Context<'a> {
    pub peers: &'a [PeerState],
    pub journal: &'a Journal,
    pub causes: &'a Causes,
    pub user_peers: &'a HashMap<Arc<str>, Vec<String>>,
}

/// Of the changes that this one comes after, one that may come and is not applied. `before`: it will be.
pub fn unmet(received: &Received, before: Option<&Received>, context: &Context) -> Result<Option<SeqOf>, JournalError> {
    let Context { peers, journal, causes, user_peers } = *context;
    let Some(stamp) = &received.change.stamp else { return Ok(None) };
    let user = &received.change.user;
    let before = before.and_then(|before| before.change.stamp.as_ref());
    let is_before = |cause: &SeqOf| {
        before.is_some_and(|Stamp { origin, epoch, seq, .. }| {
            (origin, epoch) == (&cause.origin, &cause.epoch) && *seq >= cause.seq
        })
    };
    for cause in &stamp.vector {
        let Some(origin) = peers.iter().position(|peer| peer.name == cause.origin) else { continue };
        let inbox = &peers[origin].inbox;
        // What its own connection leaves out is not to come.
        let is_known = origin == received.peer && cause.origin == stamp.origin
            || is_before(cause)
            || inbox.epoch() > cause.epoch
            || inbox.is_applied(cause.epoch, cause.seq)
            || user_peers.get(user.as_str()).is_some_and(|named| !named.contains(&cause.origin))
            || causes.abandoned.contains(&(user.as_str().into(), cause.origin.clone()));
        if !is_known && !journal.has_seen(user, &cause.origin, cause.epoch, cause.seq)? {
            return Ok(Some(cause.clone()));
        }
    }
    Ok(None)
}

impl Engine {
    fn context(&self) -> Context<'_> {
        Context { peers: &self.peers, journal: &self.journal, causes: &self.causes, user_peers: &self.user_peers }
    }

    /// Where there are only two servers, all order is that of their connection.
    pub fn is_mesh(&self) -> bool {
        self.peers.len() > 1 || !self.far.is_empty()
    }

    /// What the next change of the user here comes after.
    pub fn vector(&self, user: &str) -> Result<Vec<SeqOf>, JournalError> {
        let mut vector: Vec<SeqOf> = (self.journal.seen(user, VECTOR_MAX - 1)?.into_iter())
            .map(|Seen { origin, epoch, seq }| SeqOf { origin, epoch, seq })
            .collect();
        if let Some(partly) = self.causes.partly.get(user) {
            match vector.iter_mut().find(|seen| seen.origin == partly.origin) {
                Some(seen) if (seen.epoch, seen.seq) < (partly.epoch, partly.seq) => *seen = partly.clone(),
                Some(_) => {}
                None => vector.push(partly.clone()),
            }
        }
        Ok(vector)
    }

    /// The user's change is applied here, or was made here.
    pub fn note_seen(&mut self, user: &str, origin: &str, epoch: u64, seq: u64) {
        // Of two servers the other one gets our changes in their order.
        if !self.is_mesh() && origin == self.me.server {
            return;
        }
        if let Err(error) = self.journal.set_seen(user, &Seen { origin: origin.to_owned(), epoch, seq }) {
            self.fail(error);
        }
    }

    /// Whether the user's change is applied, from whomever it came.
    pub fn has_seen(&mut self, change: &Change) -> bool {
        let Some(stamp) = change.stamp.as_ref().filter(|_| self.is_mesh()) else { return false };
        match self.journal.has_seen(&change.user, &stamp.origin, stamp.epoch, stamp.seq) {
            Ok(has_seen) => has_seen,
            Err(error) => {
                self.fail(error);
                false
            }
        }
    }

    /// A worker said what it wrote, of changes that are perhaps not complete.
    pub fn note_partly_applied(&mut self, spans: &[Span]) {
        for span in spans {
            if let Some(last) = span.applied.last() {
                self.note_part(&span.user.as_str().into(), last);
            }
        }
    }

    /// A worker is applying the user's change.
    pub fn note_part(&mut self, user: &Arc<str>, change: &SeqOf) {
        let is_later =
            |known: &SeqOf| known.origin != change.origin || (known.epoch, known.seq) < (change.epoch, change.seq);
        if self.causes.partly.get(user).is_none_or(is_later) {
            self.causes.partly.insert(user.clone(), change.clone());
        }
    }

    /// The user's job is over.
    pub fn forget_partly_applied(&mut self, user: &str) {
        self.causes.partly.remove(user);
    }

    /// A change is begun that may have waited for others in vain: that is remembered, where it can be found. Some: it is to be
    /// refused instead, because they were, and will come again.
    pub fn wait_is_over(&mut self, received: &Received) -> Option<String> {
        if !received.is_overdue(self.now_ms) {
            return None;
        }
        let cause = match unmet(received, None, &self.context()) {
            Ok(cause) => cause?,
            Err(error) => {
                self.fail(error);
                return None;
            }
        };
        let origin = self.peers.iter().find(|peer| peer.name == cause.origin);
        if origin.is_some_and(|origin| origin.inbox.is_refused(&received.change.user)) {
            return Some(format!("it comes after change {} of server {}, which was refused", cause.seq, cause.origin));
        }
        self.give_up(received, cause);
        None
    }

    fn give_up(&mut self, received: &Received, cause: SeqOf) {
        let peer = &self.peers[received.peer].name;
        let secs = WAIT_MS_MAX / 1_000;
        let user = received.change.user.clone();
        let error = format!(
            "change {} of server {peer} was applied without change {} of server {}, which it comes after and which did not \
             come within {secs} secs",
            received.seq, cause.seq, cause.origin
        );
        log::error!("User {user}: {error}; the mailbox must be compared (doveadm dovetail failed).");
        let mailbox = received.change.mailbox.as_ref().map(|mailbox| mailbox.guid.clone()).unwrap_or_default();
        if self.causes.abandoned.len() >= ABANDONED_MAX {
            self.causes.abandoned.clear();
        }
        self.causes.abandoned.insert((user.as_str().into(), cause.origin.clone()));
        self.work.look_again(&user.as_str().into());
        self.remember_failed(&Failed {
            peer: cause.origin,
            user,
            mailbox,
            at_us: self.outside.now_us(),
            error,
            ..Default::default()
        });
    }

    /// For people: for what the change waits, if it does still.
    pub fn waits_for(&self, received: &Received) -> Option<String> {
        let SeqOf { origin, seq, .. } = unmet(received, None, &self.context()).ok()??;
        Some(format!("change {} waits for change {seq} of server {origin}, which has not come", received.seq))
    }
}
