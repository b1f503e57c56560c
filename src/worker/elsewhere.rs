//! Messages that are not here where the peer has them: what it names by these UIDs is at others here, or not here.
//!
//! Until a peer knows that a message got another UID here, it may name it by the old one. On the peer this one never names
//! another message, so what is noted here is never wrong, only no longer needed. Pure.
use std::collections::BTreeMap;

use crate::wire::proto;

/// Of all servers, for changes of one of them: the peer.
#[derive(Default)]
pub struct Elsewhere {
    peer: String,
    /// By mailbox and UID there.
    known: BTreeMap<(Vec<u8>, u32), Vec<OfServer>>,
    new: Vec<proto::Elsewhere>,
}

struct OfServer {
    /// Empty: all.
    server: String,
    /// Only that server calls it so.
    alone: bool,
    known: Known,
}

/// In the place of a UID here: the message is gone, and a copy of it is not meant.
pub const GONE: u32 = u32::MAX;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub guid: String,
    /// Its UID here; 0: it was not here yet; or [`GONE`].
    pub here: u32,
    /// It had the peer's here, too: the peer may have given that to another one.
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
    pub fn of(all: Vec<proto::Elsewhere>, peer: &str) -> Elsewhere {
        let mut known = Elsewhere { peer: peer.to_owned(), ..Elsewhere::default() };
        for one in all {
            let proto::Elsewhere { mailbox_guid, uid, guid, moved, here, alone, server } = one;
            known.put(mailbox_guid, uid, OfServer { server, alone, known: Known { guid, here, moved } });
        }
        known
    }

    /// In the place of what was known before.
    fn put(&mut self, mailbox_guid: Vec<u8>, uid: u32, new: OfServer) {
        let all = self.known.entry((mailbox_guid, uid)).or_default();
        let is_other = |one: &OfServer| {
            (&one.server, one.known.moved) != (&new.server, new.known.moved)
                || new.known.moved && one.known.guid != new.known.guid
        };
        all.retain(is_other);
        all.push(new);
    }

    /// The peer's message `uid` of the mailbox is the one with this GUID, which has the UID `here`. `moved`: it had the peer's
    /// here, too.
    pub fn note(&mut self, mailbox_guid: &[u8], uid: u32, guid: &str, here: u32, moved: bool) {
        // Where it was says more than that it is gone.
        let is_known = |known: &Known| known.uid().is_some();
        if [0, GONE].contains(&here) && self.own(mailbox_guid, uid, guid).is_some_and(is_known) {
            return;
        }
        if moved {
            let of_mailbox = self.known.iter_mut().filter(|((mailbox, _), _)| mailbox == mailbox_guid);
            let is_it = |one: &&mut OfServer| one.known.guid == guid && one.known.here == uid;
            of_mailbox.flat_map(|(_, all)| all).filter(is_it).for_each(|one| one.known.here = here);
        }
        let server = if moved { String::new() } else { self.peer.clone() };
        let known = Known { guid: guid.to_owned(), here, moved };
        self.put(mailbox_guid.to_vec(), uid, OfServer { server, alone: false, known });
        let (mailbox_guid, guid) = (mailbox_guid.to_vec(), guid.to_owned());
        self.new.push(proto::Elsewhere { mailbox_guid, uid, guid, moved, here, ..Default::default() });
    }

    /// The mailbox has another GUID from now on.
    pub fn rename(&mut self, old: &[u8], new: &[u8]) {
        let of_old: Vec<u32> = self.known.keys().filter(|(mailbox, _)| mailbox == old).map(|(_, uid)| *uid).collect();
        for uid in of_old {
            let all = self.known.remove(&(old.to_vec(), uid)).unwrap_or_default();
            self.known.entry((new.to_vec(), uid)).or_default().extend(all);
        }
    }

    /// The mailbox is made anew: what is known is of messages that went with it.
    pub fn forget(&mut self, mailbox_guid: &[u8]) {
        self.known.retain(|(mailbox, _), _| mailbox != mailbox_guid);
    }

    /// What was noted since the last call.
    pub fn take_new(&mut self) -> Vec<proto::Elsewhere> {
        std::mem::take(&mut self.new)
    }

    fn all(&self, mailbox_guid: &[u8], uid: u32) -> &[OfServer] {
        self.known.get(&(mailbox_guid.to_vec(), uid)).map_or(&[], Vec::as_slice)
    }

    /// What the server itself has said, or given rise to.
    fn is_own(server: &str, one: &OfServer) -> bool {
        one.server == server && !one.known.moved
    }

    /// A message that a server did not have to give another UID has the one there that it has at its own origin.
    fn may_be_of(server: &str, one: &OfServer) -> bool {
        one.server == server || !one.alone
    }

    /// What the peer means by the UID, if that is known to be elsewhere here. First what it has there itself.
    pub fn at(&self, mailbox_guid: &[u8], uid: u32) -> Option<&Known> {
        self.meant(mailbox_guid, uid, |_| true)
    }

    /// What it has there itself.
    pub fn own_at(&self, mailbox_guid: &[u8], uid: u32) -> Option<&Known> {
        self.all(mailbox_guid, uid).iter().find(|one| Self::is_own(&self.peer, one)).map(|one| &one.known)
    }

    /// All that it may mean: several servers may have given the UID to different messages.
    pub fn all_at(&self, mailbox_guid: &[u8], uid: u32) -> Vec<&Known> {
        let all = self.all(mailbox_guid, uid);
        if let Some(own) = self.own_at(mailbox_guid, uid) {
            return vec![own];
        }
        let others = all.iter().rev().filter(|one| Self::may_be_of(&self.peer, one));
        others.map(|one| &one.known).collect()
    }

    /// The same, where it says which GUID it means.
    pub fn named(&self, mailbox_guid: &[u8], uid: u32, guid: &str) -> Option<&Known> {
        self.meant(mailbox_guid, uid, |known| known.guid == guid).filter(|known| known.guid == guid)
    }

    fn meant(&self, mailbox_guid: &[u8], uid: u32, is_it: impl Fn(&Known) -> bool) -> Option<&Known> {
        let all = self.all(mailbox_guid, uid);
        let own = all.iter().find(|one| Self::is_own(&self.peer, one));
        let others = || all.iter().rev().filter(|one| Self::may_be_of(&self.peer, one));
        own.or_else(|| others().find(|one| is_it(&one.known))).map(|one| &one.known)
    }

    /// The same, of what it has there itself only.
    pub fn own(&self, mailbox_guid: &[u8], uid: u32, guid: &str) -> Option<&Known> {
        let mut all = self.all(mailbox_guid, uid).iter().filter(|one| one.known.guid == guid);
        all.find(|one| Self::is_own(&self.peer, one)).map(|one| &one.known)
    }

    /// What any server means by it, as far as that is known for sure.
    pub fn of_server(&self, server: &str, mailbox_guid: &[u8], uid: u32, guid: &str) -> Option<&Known> {
        let all = || self.all(mailbox_guid, uid).iter().filter(|one| one.known.guid == guid);
        let own = all().find(|one| Self::is_own(server, one));
        let moved = || all().find(|one| one.known.moved && (one.server == server || one.server.is_empty()));
        own.or_else(moved).map(|one| &one.known)
    }

    /// Where the message is here that some server saved with this UID: of all that it had anywhere, that is the lowest one.
    pub fn saved_with(&self, mailbox_guid: &[u8], uid: u32, guid: &str) -> Option<u32> {
        let known = self.all(mailbox_guid, uid).iter().filter(|one| one.known.guid == guid);
        let here = known.filter_map(|one| one.known.uid());
        let is_lowest = |here: &u32| self.standing_at(mailbox_guid, *here, guid).all(|(other, _)| other >= uid);
        here.into_iter().find(|here| *here >= uid && is_lowest(here))
    }

    /// Whether the message that has the first UID here has, for sure, another than the second one on that server.
    pub fn has_another(&self, server: &str, mailbox_guid: &[u8], (here, there): (u32, u32), guid: &str) -> bool {
        self.standing_at(mailbox_guid, here, guid).any(|(uid, one)| uid != there && Self::is_own(server, one))
    }

    /// Whether the message that has this UID here has another one on the peer.
    pub fn is_of_another(&self, mailbox_guid: &[u8], here: u32, guid: &str) -> bool {
        let all = || self.standing_at(mailbox_guid, here, guid);
        match all().find(|(_, one)| Self::is_own(&self.peer, one)) {
            Some(_) => self.has_another(&self.peer, mailbox_guid, (here, here), guid),
            None => all().any(|(uid, one)| uid != here && Self::may_be_of(&self.peer, one)),
        }
    }

    /// The last UID that the message which has this one here is known to have on the peer.
    pub fn uid_there(&self, mailbox_guid: &[u8], here: u32, guid: &str) -> Option<u32> {
        let all = self.standing_at(mailbox_guid, here, guid);
        all.filter(|(_, one)| Self::may_be_of(&self.peer, one)).map(|(uid, _)| uid).max()
    }

    /// What is known of the message that has this UID here, by UIDs there.
    fn standing_at<'a>(
        &'a self,
        mailbox_guid: &'a [u8],
        here: u32,
        guid: &'a str,
    ) -> impl Iterator<Item = (u32, &'a OfServer)> {
        let of_mailbox = self.known.iter().filter(move |((mailbox, _), _)| mailbox == mailbox_guid);
        let all = of_mailbox.flat_map(|((_, uid), all)| all.iter().map(|one| (*uid, one)));
        all.filter(move |(_, one)| one.known.guid == guid && one.known.here == here)
    }

    /// Notes it, for this peer alone: others never call the message so, if they did not before.
    pub fn note_alone(&mut self, mailbox_guid: &[u8], uid: u32, guid: &str, here: u32) {
        let is_shared = |one: &OfServer| Self::is_own(&self.peer, one) && one.known.guid == guid && !one.alone;
        let alone = !self.all(mailbox_guid, uid).iter().any(is_shared);
        let noted = self.new.len();
        self.note(mailbox_guid, uid, guid, here, false);
        self.new[noted..].iter_mut().for_each(|one| one.alone = alone);
        let noted = self.known.get_mut(&(mailbox_guid.to_vec(), uid)).into_iter().flatten();
        noted.filter(|one| Self::is_own(&self.peer, one)).for_each(|one| one.alone = alone);
    }

    /// What the peer means by the UIDs from `first` to `last`.
    pub fn resolve(&self, mailbox_guid: &[u8], first: u32, last: u32) -> Resolved<'_> {
        let mut resolved = Resolved::default();
        let mut next = Some(first);
        let key = |uid| (mailbox_guid.to_vec(), uid);
        let inside = (first <= last).then(|| self.known.range(key(first)..=key(last)));
        for (_, uid) in inside.into_iter().flatten().map(|(key, _)| key) {
            let Some(known) = self.at(mailbox_guid, *uid) else { continue };
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
        Elsewhere::of(all.iter().map(one).collect(), "")
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
    fn of_a_mailbox_that_is_made_anew_nothing_is_known() {
        let mut elsewhere = known(&[(1, 3, "three"), (2, 4, "other")]);
        elsewhere.forget(&[1; 16]);
        assert_eq!(elsewhere.at(&[1; 16], 3), None);
        assert_eq!(elsewhere.at(&[2; 16], 4).map(|known| known.guid.as_str()), Some("other"));
    }

    #[test]
    fn each_server_means_its_own_message_by_a_uid() {
        let of = |server: &str, uid, guid: &str, here, alone| proto::Elsewhere {
            mailbox_guid: vec![1; 16],
            uid,
            guid: guid.into(),
            here,
            server: server.into(),
            alone,
            ..Default::default()
        };
        let mut elsewhere = Elsewhere::of(
            vec![of("b", 1, "one", 4, false), of("c", 1, "other", 2, false), of("c", 3, "one", 9, true)],
            "b",
        );
        let here = |known: Option<&Known>| known.map(|known| known.here);
        assert_eq!(here(elsewhere.of_server("c", &[1; 16], 3, "one")), Some(9));
        assert_eq!(here(elsewhere.of_server("b", &[1; 16], 3, "one")), None);
        assert_eq!(here(elsewhere.named(&[1; 16], 3, "one")), None, "only c calls it so");
        assert!(elsewhere.is_of_another(&[1; 16], 4, "one"), "also where c has another one at that UID");
        elsewhere.note(&[1; 16], 4, "one", 7, true);
        assert_eq!(here(elsewhere.own(&[1; 16], 1, "one")), Some(7));
        for server in ["b", "c"] {
            assert_eq!(here(elsewhere.of_server(server, &[1; 16], 4, "one")), Some(7), "all may call it so");
        }
        assert!(elsewhere.has_another("b", &[1; 16], (7, 4), "one"));
        assert!(!elsewhere.has_another("b", &[1; 16], (7, 1), "one"));
    }

    #[test]
    fn a_message_was_saved_with_the_lowest_uid_that_it_had_anywhere() {
        let mut elsewhere = Elsewhere::of(Vec::new(), "b");
        elsewhere.note(&[1; 16], 4, "one", 6, true);
        assert_eq!(elsewhere.saved_with(&[1; 16], 4, "one"), Some(6));
        assert_eq!(elsewhere.saved_with(&[1; 16], 6, "one"), None, "it is there");
        elsewhere.note(&[1; 16], 2, "one", 6, false);
        assert_eq!(elsewhere.saved_with(&[1; 16], 4, "one"), None, "it was moved to 4");
        elsewhere.note(&[1; 16], 9, "two", 5, false);
        assert_eq!(elsewhere.saved_with(&[1; 16], 9, "two"), None, "it was claimed there");
    }

    #[test]
    fn what_others_call_so_too_is_not_of_one_peer_alone() {
        let mut elsewhere = Elsewhere::of(Vec::new(), "b");
        elsewhere.note(&[1; 16], 2, "one", 3, false);
        elsewhere.note_alone(&[1; 16], 2, "one", 7);
        elsewhere.note_alone(&[1; 16], 5, "one", 7);
        let noted: Vec<_> = elsewhere.take_new().into_iter().map(|one| (one.uid, one.here, one.alone)).collect();
        assert_eq!(noted, [(2, 3, false), (2, 7, false), (5, 7, true)]);
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
