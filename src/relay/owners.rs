//! Whose mail it is: a local process may tell what happened to the mail of the system user that it runs as. Root's processes and
//! the relay's own user may tell of everybody.
//!
//! Which system user that is, workers say whenever they open the user, and are asked if nobody has said it: until then
//! nothing more is read from the process. What somebody else tells is not believed: the user's mailboxes are looked at, which
//! say themselves what is true of it.

use std::collections::HashMap;
use std::sync::Arc;

use mio::Token;

use super::engine::{Engine, Role, Socket};
use crate::change;

/// Users whose system user is remembered, at most.
const USERS_MAX: usize = 100_000;

/// The system user who is at the other end of a Unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// Root, or the relay's own user.
    Trusted,
    Uid(u32),
    /// It did not have the kernel say so.
    Unsaid,
}

impl Sender {
    /// What root tells is true of everybody.
    pub fn of(uid: u32) -> Sender {
        if uid == 0 {
            Sender::Trusted
        } else {
            Sender::Uid(uid)
        }
    }
}

/// Whether a process may tell of a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum May {
    Tell,
    /// It is another system user's mail.
    NotTell,
    /// There is no such user.
    NoUser,
    /// That is not known yet: a worker is asked.
    Wait,
}

/// See the module.
#[derive(Default)]
pub struct Owners {
    uids: HashMap<Arc<str>, u32>,
    /// Connections of which nothing is read until it is known whose this user's mail is; each waits for one user at a time.
    waiting: HashMap<Arc<str>, Vec<Token>>,
}

impl Engine {
    /// Whether the process behind the connection may tell of the user. After [`May::Wait`] its frame is to be held, and is not to wait
    /// for another one at the same time.
    pub fn may_tell(&mut self, token: Token, user: &str) -> May {
        let Some(Socket { role: Role::Local(local), .. }) = self.sockets.get(&token) else { return May::NoUser };
        let uid = match local.sender {
            Some(Sender::Trusted) => return May::Tell,
            Some(Sender::Uid(uid)) => Some(uid),
            Some(Sender::Unsaid) | None => None,
        };
        if change::check_user(user).is_err() {
            return May::NoUser;
        }
        if let Some(owner) = self.owners.uids.get(user) {
            return if uid == Some(*owner) { May::Tell } else { May::NotTell };
        }
        if local.absent.iter().any(|absent| **absent == *user) {
            return May::NoUser;
        }
        let user: Arc<str> = user.into();
        self.owners.waiting.entry(user.clone()).or_default().push(token);
        self.heals.want_owner(&user);
        May::Wait
    }

    /// A worker has opened the user, as this system user.
    pub fn take_owner(&mut self, user: &Arc<str>, uid: u32) {
        let owners = &mut self.owners;
        if owners.uids.len() >= USERS_MAX && !owners.uids.contains_key(user) {
            owners.uids.clear();
        }
        owners.uids.insert(user.clone(), uid);
        self.read_on.extend(owners.waiting.remove(user).unwrap_or_default());
    }

    /// A worker has looked whose mail it is. If it did not say, there is no such user.
    pub fn owner_asked(&mut self, user: &Arc<str>) {
        for token in self.owners.waiting.remove(user).unwrap_or_default() {
            if let Some(Role::Local(local)) = self.sockets.get_mut(&token).map(|socket| &mut socket.role) {
                local.absent.push(user.clone());
            }
            self.read_on.push(token);
        }
    }
}
