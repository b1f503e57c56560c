//! Which peers a user's mail is replicated with: all, or those that his userdb entry names.
//!
//! Mail processes say so before they write, and workers when they open the user; it is remembered. A peer that is not named
//! gets nothing of him. What comes from such a peer the worker refuses, because the userdb knows it first.

use std::sync::Arc;

use super::engine::Engine;
use crate::change::{self, VECTOR_MAX};
use crate::journal::{Failed, JournalError};
use crate::wire::proto::UserPeers;

impl Engine {
    /// Peers that this user's changes go to, and come from.
    pub fn peers_of<'a>(&'a self, user: &str) -> impl Iterator<Item = usize> + 'a {
        let named = self.user_peers.get(user);
        (0..self.peers.len()).filter(move |peer| named.is_none_or(|named| named.contains(&self.peers[*peer].name)))
    }

    /// Servers that are reached and, as far as is known, have this user's mail.
    pub fn servers_of(&self, user: &str) -> Result<Vec<String>, JournalError> {
        let reached = self.reach_without(None).into_keys();
        let Some(named) = self.user_peers.get(user) else { return Ok(reached.collect()) };
        let seen = self.journal.seen(user, VECTOR_MAX)?;
        let has_it = |server: &String| named.contains(server) || seen.iter().any(|seen| seen.origin == *server);
        Ok(reached.filter(has_it).collect())
    }

    /// A worker says what the userdb has of the user.
    pub fn take_userdb(&mut self, user: &Arc<str>, peers: Option<UserPeers>) {
        if let Some(uid) = peers.as_ref().and_then(|peers| peers.uid) {
            self.take_owner(user, uid);
        }
        self.take_user_peers(user, peers);
    }

    /// With whom the user's mail is replicated.
    pub fn take_user_peers(&mut self, user: &Arc<str>, peers: Option<UserPeers>) {
        let Some(UserPeers { all, servers, .. }) = peers else { return };
        let named = (!all).then_some(servers);
        let is_valid =
            |named: &Vec<String>| named.len() <= VECTOR_MAX && named.iter().all(|server| change::is_server(server));
        if named.as_ref() == self.user_peers.get(user) || !named.as_ref().is_none_or(is_valid) {
            return;
        }
        if let Err(error) = self.set_user_peers(user, named) {
            self.fail(error);
        }
    }

    fn set_user_peers(&mut self, user: &Arc<str>, named: Option<Vec<String>>) -> Result<(), JournalError> {
        let before: Vec<usize> = self.peers_of(user).collect();
        self.journal.set_user_peers(user, named.as_deref())?;
        match named {
            Some(named) => self.user_peers.insert(user.clone(), named),
            None => self.user_peers.remove(user),
        };
        let now: Vec<usize> = self.peers_of(user).collect();
        for peer in before.iter().filter(|peer| !now.contains(peer)) {
            self.take_back_from(*peer, user)?;
            self.journal.compare_without(user, &self.peers[*peer].name)?;
            self.counts.counters.failed = self.journal.failed_count()?;
        }
        for peer in now.iter().filter(|peer| !before.contains(peer)) {
            let peer = self.peers[*peer].name.clone();
            log::warn!("User {user}: server {peer} is a peer of his now: his mailboxes must be compared with it.");
            self.remember_failed(&Failed {
                peer,
                user: user.to_string(),
                at_us: self.outside.now_us(),
                error: "it was not a peer of the user before (dovetail_peers of the userdb)".to_owned(),
                ..Default::default()
            });
        }
        Ok(())
    }

    /// What waits for the peer is not for it any more.
    fn take_back_from(&mut self, peer: usize, user: &Arc<str>) -> Result<(), JournalError> {
        for seq in self.journal.pending_of_user(user, &self.peers[peer].name)? {
            if self.peers[peer].outbox.take_back(user, seq) {
                self.journal.acknowledge(&self.peers[peer].name, seq)?;
            }
        }
        Ok(())
    }
}
