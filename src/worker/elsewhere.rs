//! Messages that are not here where the peer has them: what it names by these UIDs is at others here, or not here.
//!
//! Until a peer knows that a message got another UID here, it may name it by the old one. On the peer this one never names
//! another message, so what is noted here is never wrong, only no longer needed. Pure.
use std::collections::BTreeMap;

use crate::wire::proto;

/// Of the peer whose changes are applied.
#[derive(Default)]
pub struct Elsewhere {
    known: BTreeMap<(Vec<u8>, u32), Known>,
    new: Vec<proto::Elsewhere>,
}

/// In the place of a UID here: the message is gone, and a copy of it is not meant.
pub const GONE: u32 = u32::MAX;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub guid: String,
    /// Its UID here; 0: it was not here yet; or [`GONE`].
    pub here: u32,
    /// It had the peer's here, too, or has it on a third server: the peer may have given that to another one.
    pub moved: bool,
}

impl Known {
    /// Where it is here, or was.
    pub fn uid(&self) -> Option<u32> {
        Some(self.here).filter(|here| ![0, GONE].contains(here))
    }
}

/// A range of the peer's UIDs, resolved.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Resolved<'a> {
    /// These are the same messages here.
    pub uids: Vec<(u32, u32)>,
    /// Those that are elsewhere.
    pub elsewhere: Vec<&'a Known>,
}

impl Elsewhere {
    /// What the relay knows.
    pub fn of(known: Vec<proto::Elsewhere>) -> Elsewhere {
        let of = |one: proto::Elsewhere| {
            ((one.mailbox_guid, one.uid), Known { guid: one.guid, here: one.here, moved: one.moved })
        };
        // What the peer itself has there is meant first.
        let (weak, own): (Vec<_>, Vec<_>) = known.into_iter().partition(|one| one.moved);
        let known = weak.into_iter().chain(own).map(of).collect();
        Elsewhere { known, new: Vec::new() }
    }

    /// The peer's message `uid` of the mailbox is the one with this GUID, which has the UID `here`. `moved`: it had the peer's
    /// here, too.
    pub fn note(&mut self, mailbox_guid: &[u8], uid: u32, guid: &str, here: u32, moved: bool) {
        let key = (mailbox_guid.to_vec(), uid);
        // Where it was says more than that it is gone.
        let is_known = |known: &Known| known.guid == guid && known.uid().is_some();
        if [0, GONE].contains(&here) && self.known.get(&key).is_some_and(is_known) {
            return;
        }
        let is_it = |known: &Known| known.guid == guid && known.here == uid;
        if moved {
            let of_mailbox =
                self.known.iter_mut().filter(|((mailbox, _), known)| mailbox == mailbox_guid && is_it(known));
            of_mailbox.for_each(|(_, known)| known.here = here);
        }
        // Where the peer's own message has this UID, that is meant.
        if !moved || !self.known.contains_key(&key) {
            self.known.insert(key, Known { guid: guid.to_owned(), here, moved });
        }
        let (mailbox_guid, guid) = (mailbox_guid.to_vec(), guid.to_owned());
        self.new.push(proto::Elsewhere { mailbox_guid, uid, guid, moved, here });
    }

    /// The mailbox has another GUID from now on.
    pub fn rename(&mut self, old: &[u8], new: &[u8]) {
        let known = std::mem::take(&mut self.known).into_iter();
        let renamed = |mailbox: Vec<u8>| if mailbox == old { new.to_vec() } else { mailbox };
        self.known = known.map(|((mailbox, uid), known)| ((renamed(mailbox), uid), known)).collect();
    }

    /// What was noted since the last call.
    pub fn take_new(&mut self) -> Vec<proto::Elsewhere> {
        std::mem::take(&mut self.new)
    }

    /// What the peer means by the UID, if that is known to be elsewhere here.
    pub fn at(&self, mailbox_guid: &[u8], uid: u32) -> Option<&Known> {
        self.known.get(&(mailbox_guid.to_vec(), uid))
    }

    /// Whether the message that has this UID here has another one on the peer.
    pub fn is_of_another(&self, mailbox_guid: &[u8], here: u32, guid: &str) -> bool {
        let mut known = self.known.iter().filter(|((mailbox, uid), _)| mailbox == mailbox_guid && *uid != here);
        known.any(|(_, known)| known.guid == guid && known.here == here)
    }

    /// What the peer means by the UIDs from `first` to `last`.
    pub fn resolve(&self, mailbox_guid: &[u8], first: u32, last: u32) -> Resolved<'_> {
        let mut resolved = Resolved::default();
        let mut next = Some(first);
        let key = |uid| (mailbox_guid.to_vec(), uid);
        let inside = (first <= last).then(|| self.known.range(key(first)..=key(last)));
        for ((_, uid), known) in inside.into_iter().flatten() {
            resolved.uids.extend(next.filter(|next| next < uid).map(|next| (next, uid - 1)));
            resolved.elsewhere.push(known);
            next = uid.checked_add(1);
        }
        resolved.uids.extend(next.filter(|next| *next <= last).map(|next| (next, last)));
        resolved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(all: &[(u8, u32, &str)]) -> Elsewhere {
        let one = |(mailbox, uid, guid): &(u8, u32, &str)| proto::Elsewhere {
            mailbox_guid: vec![*mailbox; 16],
            uid: *uid,
            guid: guid.to_string(),
            ..Default::default()
        };
        Elsewhere::of(all.iter().map(one).collect())
    }

    #[test]
    fn a_range_is_what_is_there_and_what_is_elsewhere() {
        let elsewhere = known(&[(1, 3, "three"), (1, 5, "five"), (1, u32::MAX, "last"), (2, 4, "other")]);
        let resolve = |first, last| {
            let Resolved { uids, elsewhere } = elsewhere.resolve(&[1; 16], first, last);
            (uids, elsewhere.into_iter().map(|known| known.guid.as_str()).collect::<Vec<_>>())
        };
        assert_eq!(resolve(1, 2), (vec![(1, 2)], vec![]));
        assert_eq!(resolve(3, 3), (vec![], vec!["three"]));
        assert_eq!(resolve(1, 9), (vec![(1, 2), (4, 4), (6, 9)], vec!["three", "five"]));
        assert_eq!(resolve(7, u32::MAX), (vec![(7, u32::MAX - 1)], vec!["last"]));
        assert_eq!(resolve(9, 7), (vec![], vec![]));
    }

    #[test]
    fn the_peers_own_message_is_meant_before_one_that_was_moved_here() {
        let mut elsewhere = Elsewhere::default();
        for (guid, moved) in [("moved", true), ("theirs", false), ("moved again", true)] {
            elsewhere.note(&[1; 16], 5, guid, 7, moved);
        }
        let known = Known { guid: "theirs".into(), here: 7, moved: false };
        assert_eq!(elsewhere.at(&[1; 16], 5), Some(&known));
        elsewhere.note(&[1; 16], 5, "theirs", GONE, false);
        assert_eq!(elsewhere.at(&[1; 16], 5), Some(&known), "it is gone");
        assert_eq!(elsewhere.take_new().len(), 3);
        assert_eq!(elsewhere.take_new(), []);
    }
}
