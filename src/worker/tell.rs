//! Tells what is here and not at a peer, as if it had been found in a log: the answers to a [`Tell`].
//!
//! Whoever has a message already knows it by its GUID, and who expunged it says so (`Save.found`). What of it holds no
//! more is not told. What was read is told before more is: a mailbox may be large.
use std::collections::HashSet;
use std::io::{Read, Write};

use super::apart;
use super::apply::{locate, Failure};
use super::body::Link;
use super::connection::Connection;
use super::guids::hash;
use super::job::{check_asker, end_question, send_spans_alone};
use super::look::{self, holding};
use super::mark::{Marks, Moved};
use super::name;
use super::storage::{Result, Storage};
use crate::change;
use crate::wire::proto::{self, frame::Kind, op::What, Looked, Mailbox, Tell, TellOf, UidRange};

/// Messages in one change: the peer does as much in one piece.
const OPS_MAX: usize = 64;

/// A body that may ride along.
const BODY_BYTES_MAX: usize = 32 << 10;

type Outcome = std::result::Result<(), Failure>;

/// Tells, and answers. False if that failed; fails only if the connection cannot be used any more.
pub fn tell<S: Storage, C: Read + Write>(storage: &mut S, connection: &mut Connection<C>, wanted: Tell) -> Link<bool> {
    storage.applying(&[]);
    let Tell { job, user, mailboxes, asker, inline_bytes: room, .. } = wanted;
    let outcome = match check_asker(storage, &user, &asker) {
        Ok(_) => Teller { storage, connection, job, user: &user, room, ops: Vec::new() }.tell_all(mailboxes),
        Err(reason) => Err(reason.into()),
    };
    let error = end_question(storage, connection, outcome)?;
    let is_done = error.is_empty();
    connection.send(Kind::Looked(Looked { job, error, ..Default::default() }))?;
    Ok(is_done)
}

/// The parts of one mailbox as one: it is read once.
fn joined(parts: Vec<TellOf>) -> Vec<TellOf> {
    let mut whole: Vec<TellOf> = Vec::new();
    for part in parts {
        let is_more = !part.create && !part.subscribed && part.was.is_empty();
        match whole.last_mut() {
            Some(last) if is_more && !last.subscribed && last.mailbox == part.mailbox => {
                last.saves.extend(part.saves);
                last.flags.extend(part.flags);
                last.apart.extend(part.apart);
            }
            _ => whole.push(part),
        }
    }
    whole
}

struct Teller<'a, S, C> {
    storage: &'a mut S,
    connection: &'a mut Connection<C>,
    job: u64,
    user: &'a str,
    /// Bytes of bodies that may ride along.
    room: u64,
    /// Of the next change.
    ops: Vec<What>,
}

impl<S: Storage, C: Read + Write> Teller<'_, S, C> {
    fn tell_all(&mut self, parts: Vec<TellOf>) -> Outcome {
        joined(parts).into_iter().try_for_each(|of| self.tell_of(of))
    }

    fn tell_of(&mut self, of: TellOf) -> Outcome {
        let named = of.mailbox.unwrap_or_default();
        if of.subscribed {
            let mailbox = Mailbox { path: named.path, ..Default::default() };
            let what = What::Subscription(proto::Subscription { subscribed: true });
            return Ok(self.send(vec![what], &mailbox)?);
        }
        let Some(vname) = locate(self.storage, &named)? else {
            // Its deletion is told by itself.
            return Ok(());
        };
        if !of.apart.is_empty() && !self.storage.lock_user(self.user)? {
            return Err("another worker still applies changes of this user".to_string().into());
        }
        if !self.storage.open(&vname, of.apart.is_empty())? {
            return Ok(());
        }
        let status = self.storage.status();
        let path = name::path(&vname, &self.storage.namespace()?).unwrap_or(named.path);
        let mailbox = Mailbox {
            guid: status.guid.to_vec(),
            path,
            uid_validity: status.uid_validity,
            uid_next: status.uid_next,
            highest_modseq: status.highest_modseq,
        };
        if !of.was.is_empty() {
            let rename = What::Rename(proto::MailboxRename { new_path: mailbox.path.clone(), back: vec![] });
            let was = Mailbox { path: of.was, ..mailbox.clone() };
            self.send(vec![rename], &was)?;
        }
        // Only the last says how the mailbox is behind all.
        let before = Mailbox { uid_next: 0, highest_modseq: 0, ..mailbox.clone() };
        if of.create {
            let create = What::Create(proto::MailboxCreate { had_mail: status.uid_next > 1, ..Default::default() });
            self.send(vec![create], &before)?;
        }
        self.tell_saves(of.saves, &before)?;
        for mut update in of.flags {
            let messages = std::mem::take(&mut update.messages);
            for holds in holding(self.storage, &messages, &update)? {
                self.say(What::Flags(holds), &before)?;
            }
        }
        self.tell_apart(of.apart, &before)?;
        // What was set apart has got a UID.
        let status = self.storage.status();
        let mailbox = Mailbox { uid_next: status.uid_next, highest_modseq: status.highest_modseq, ..mailbox };
        self.storage.close();
        let mut last = std::mem::take(&mut self.ops);
        if last.is_empty() {
            // UIDNEXT is what it is.
            last.push(change::nothing());
        }
        Ok(self.send(last, &mailbox)?)
    }

    /// Whoever is killed in between does it once more: what is named is gone only when what it was is there under its other GUID. If that was
    /// not told then, it is missing at the peer, as what is named is here; both are found.
    fn tell_apart(&mut self, messages: Vec<proto::MessageRange>, before: &Mailbox) -> Outcome {
        for message in messages {
            let uid = message.first_uid;
            let Some(own) = apart::own(self.storage, uid, &message.guid, uid)? else { continue };
            apart::keep(self.storage, &own)?;
            let Some(kept) = self.storage.find_messages(&own.guid)?.pop() else { continue };
            self.storage.expunge(uid, uid)?;
            apart::commit(self.storage)?;
            let Some((flags, keywords)) = self.storage.message_flags(kept)? else { continue };
            let Some(save) = look::save(self.storage, kept, flags as u8)? else { continue };
            let mut save = proto::Save { keywords, found: true, ..save };
            let_body_ride(self.storage, kept, &mut save, &mut self.room);
            let apart = proto::Apart { messages: vec![message] };
            self.send(vec![What::Save(save), What::Apart(apart)], before)?;
            send_spans_alone(self.storage, self.connection)?;
        }
        Ok(())
    }

    fn tell_saves(&mut self, mut ranges: Vec<UidRange>, before: &Mailbox) -> Outcome {
        if ranges.is_empty() {
            return Ok(());
        }
        ranges.sort_by_key(|range| range.first);
        let mut ranges = ranges.into_iter().peekable();
        let mut is_meant = |uid: u32| {
            while ranges.next_if(|range| range.last < uid).is_some() {}
            ranges.peek().is_some_and(|range| range.first <= uid)
        };
        let uids = self.storage.uids()?;
        let copied = copied(self.storage)?;
        let logs = match Marks::parse(&self.storage.mark()?).has_diverged() {
            true => self.storage.log_files()?,
            false => Vec::new(),
        };
        let moved = Moved::of(&logs);
        for uid in uids.into_iter().filter(|uid| is_meant(*uid)) {
            let Some((flags, keywords)) = self.storage.message_flags(uid)? else { continue };
            let Some(save) = look::save(self.storage, uid, flags as u8)? else { continue };
            // Of copies inside of the mailbox, a GUID does not say which is meant.
            let found = !copied.contains(&hash(&save.guid));
            let was = moved.before(uid);
            let mut save = proto::Save { keywords, found, found_beside: !found, was, ..save };
            let_body_ride(self.storage, uid, &mut save, &mut self.room);
            self.say(What::Save(save), before)?;
        }
        Ok(())
    }

    fn say(&mut self, what: What, before: &Mailbox) -> Link<()> {
        if self.ops.len() == OPS_MAX {
            let ops = std::mem::take(&mut self.ops);
            self.send(ops, before)?;
        }
        self.ops.push(what);
        Ok(())
    }

    fn send(&mut self, ops: Vec<What>, mailbox: &Mailbox) -> Link<()> {
        for change in change::split(ops, self.user, mailbox, 0) {
            let change = Some(change);
            self.connection.send(Kind::Looked(Looked { job: self.job, more: true, change, ..Default::default() }))?;
        }
        Ok(())
    }
}

/// Hashes of the GUIDs that more than one message has: of a large mailbox, the GUIDs would fill the memory.
fn copied<S: Storage>(storage: &mut S) -> Result<HashSet<u64>> {
    let mut hashes = Vec::new();
    storage.guids(0, &mut |_, guid| hashes.push(hash(guid)))?;
    hashes.sort_unstable();
    Ok(hashes.windows(2).filter(|two| two[0] == two[1]).map(|two| two[0]).collect())
}

/// Of a message of the open mailbox. `room`: bytes of bodies that may ride along.
pub fn let_body_ride<S: Storage>(storage: &mut S, uid: u32, save: &mut proto::Save, room: &mut u64) {
    if let Some(body) = small_body(storage, uid, save, *room) {
        *room -= body.len() as u64;
        (save.size, save.body_inline, save.body) = (body.len() as u64, true, body);
    }
}

/// Whether it could ride along, as far as its size is known.
pub fn is_small(save: &proto::Save) -> bool {
    save.size <= BODY_BYTES_MAX as u64
}

/// The bytes of a message that may ride along; the others are fetched one by one, each with a commit of its own. One that cannot be
/// read is left to that: it says why.
fn small_body<S: Storage>(storage: &mut S, uid: u32, save: &proto::Save, room: u64) -> Option<Vec<u8>> {
    let most = usize::try_from(room).unwrap_or(usize::MAX).min(BODY_BYTES_MAX);
    if save.size > most as u64 || most < BODY_BYTES_MAX || !storage.body_open(uid, &save.guid).unwrap_or(false) {
        return None;
    }
    let mut body = vec![0; BODY_BYTES_MAX + 1];
    let mut length = 0;
    let outcome = loop {
        match storage.body_read(&mut body[length..]) {
            Ok(0) => break Ok(()),
            Ok(read) => length += read,
            Err(error) => break Err(error),
        }
        if length > BODY_BYTES_MAX {
            break Ok(());
        }
    };
    storage.body_close();
    body.truncate(length);
    (outcome.is_ok() && length <= BODY_BYTES_MAX).then_some(body)
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FakeStorage, Script};
    use super::*;
    use crate::wire::proto::Change;

    const GUID: [u8; 16] = [7; 16];

    /// With messages 1 to `last`.
    fn storage(last: u32) -> FakeStorage {
        let guids: Vec<String> = (1..=last).map(|uid| format!("guid {uid}")).collect();
        let messages: Vec<(u32, &str)> = (1..).zip(guids.iter().map(String::as_str)).collect();
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &messages);
        storage
    }

    fn part(saves: &[(u32, u32)]) -> TellOf {
        let mailbox = Mailbox { guid: GUID.to_vec(), path: vec!["INBOX".into()], ..Default::default() };
        let saves = saves.iter().map(|(first, last)| UidRange { first: *first, last: *last }).collect();
        TellOf { mailbox: Some(mailbox), saves, ..Default::default() }
    }

    fn flagged(uid: u32) -> proto::FlagUpdate {
        let messages = vec![proto::MessageRange { first_uid: uid, last_uid: uid, ..Default::default() }];
        proto::FlagUpdate { messages, add: 1, ..Default::default() }
    }

    /// What is said: the changes, and the error.
    fn told(storage: &mut FakeStorage, mailboxes: Vec<TellOf>) -> (Vec<Change>, String) {
        let script = Script::default();
        let mut next = script.ear();
        let wanted = Tell { user: "jane".into(), mailboxes, ..Default::default() };
        let is_done = tell(storage, &mut Connection::new(script), wanted).unwrap();
        let mut changes = Vec::new();
        loop {
            let Some(Kind::Looked(looked)) = next() else { panic!("it is not said that it is the last") };
            changes.extend(looked.change);
            if !looked.more {
                assert_eq!(is_done, looked.error.is_empty());
                return (changes, looked.error);
            }
        }
    }

    fn whats(changes: &[Change]) -> impl Iterator<Item = &What> {
        changes.iter().flat_map(|change| &change.ops).flat_map(|op| &op.what)
    }

    /// The messages that are told, and whether each can be known by its GUID.
    fn saves(changes: &[Change]) -> Vec<(u32, bool)> {
        let save = |what: &What| match what {
            What::Save(save) => Some((save.birth.as_ref()?.uid, save.found)),
            _ => None,
        };
        whats(changes).filter_map(save).collect()
    }

    #[test]
    fn what_was_read_of_a_large_mailbox_is_told_before_the_rest_is_read() {
        let mut storage = storage(200);
        storage.unreadable = Some(150);
        let (changes, error) = told(&mut storage, vec![part(&[(1, u32::MAX)])]);
        assert_eq!(error, "its file cannot be read");
        assert_eq!(saves(&changes), (1..=128).map(|uid| (uid, true)).collect::<Vec<_>>());
        assert!(changes.iter().all(|change| change.ops.len() <= OPS_MAX));
    }

    #[test]
    fn only_the_last_change_says_how_the_mailbox_is_behind_all() {
        let (changes, error) = told(&mut storage(200), vec![part(&[(1, 200)])]);
        assert_eq!((saves(&changes).len(), error.as_str()), (200, ""));
        let uid_nexts = changes.iter().map(|change| change.mailbox.as_ref().unwrap().uid_next);
        assert_eq!(uid_nexts.collect::<Vec<_>>(), [0, 0, 0, 201]);
    }

    #[test]
    fn parts_of_one_mailbox_are_told_as_one() {
        let mut storage = storage(300);
        storage.flags.insert(4, (1, vec![]));
        storage.flags.insert(6, (1, vec![]));
        // As a peer may ask, too: not in order, and twice.
        let mut parts: Vec<TellOf> = (1..=300).rev().step_by(100).map(|uid| part(&[(uid - 1, uid)])).collect();
        parts.push(part(&[(250, 260), (255, 255), (9, 8)]));
        parts.extend([4, 5, 6].map(|uid| TellOf { flags: vec![flagged(uid)], ..part(&[]) }));
        let (changes, error) = told(&mut storage, parts);
        assert_eq!(error, "");
        let uids: Vec<u32> = saves(&changes).into_iter().map(|(uid, _)| uid).collect();
        assert_eq!(uids, [99, 100, 199, 200].into_iter().chain(250..=260).chain([299, 300]).collect::<Vec<_>>());
        let flags = whats(&changes).filter(|what| matches!(what, What::Flags(_))).count();
        // To find it by its GUID it is opened, too.
        assert_eq!((flags, storage.opened, storage.guids_read), (2, 2, 300));
    }

    #[test]
    fn what_is_set_apart_is_kept_under_another_guid_and_told_once() {
        let mut storage = storage(5);
        storage.flags.insert(2, (1, vec!["work".into()]));
        let named = |uid: u32, guid: &str| {
            let guid = guid.to_owned();
            proto::MessageRange { first_uid: uid, last_uid: uid, guid, ..Default::default() }
        };
        // The second one is another one by now.
        let apart = vec![named(2, "guid 2"), named(4, "guid of before")];
        let (changes, error) = told(&mut storage, vec![TellOf { apart: apart.clone(), ..part(&[]) }]);
        assert_eq!(error, "");
        let [What::Save(save), What::Apart(told_apart), What::Rebuilt(_)] = &whats(&changes).collect::<Vec<_>>()[..]
        else {
            panic!("{changes:?}")
        };
        assert_eq!((save.birth.as_ref().unwrap().uid, save.found, save.guid.len()), (6, true, 32));
        assert_eq!(told_apart.messages, apart[..1]);
        let uids: Vec<u32> = storage.messages("INBOX").into_iter().map(|(uid, _)| uid).collect();
        assert_eq!(uids, [1, 3, 4, 5, 6]);
        assert_eq!(changes.last().unwrap().mailbox.as_ref().unwrap().uid_next, 7);
        let (changes, _) = told(&mut storage, vec![TellOf { apart, ..part(&[]) }]);
        assert_eq!((saves(&changes), storage.messages("INBOX").len()), (vec![], 5));
    }

    #[test]
    fn a_worker_that_was_killed_before_it_expunged_what_it_set_apart_is_no_reason_to_keep_it_twice() {
        let message = proto::MessageRange { first_uid: 2, last_uid: 2, guid: "guid 2".into(), ..Default::default() };
        let mut before = storage(2);
        before.open("INBOX", false).unwrap();
        let kept = apart::own(&mut before, 2, "guid 2", 2).unwrap().unwrap().guid;
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "guid 1"), (2, "guid 2"), (3, &kept)]);
        let (changes, error) = told(&mut storage, vec![TellOf { apart: vec![message], ..part(&[]) }]);
        assert_eq!((saves(&changes), error.as_str()), (vec![(3, true)], ""));
        assert_eq!(storage.messages("INBOX"), [(1, "guid 1".into()), (3, kept)]);
    }

    #[test]
    fn nothing_is_set_apart_while_another_worker_applies_changes() {
        let mut storage = storage(1);
        storage.is_locked = true;
        let message = proto::MessageRange { first_uid: 1, last_uid: 1, guid: "guid 1".into(), ..Default::default() };
        let (changes, error) = told(&mut storage, vec![TellOf { apart: vec![message], ..part(&[]) }]);
        assert!(changes.is_empty() && error.starts_with("another worker"), "{error}");
    }

    #[test]
    fn copies_inside_of_a_mailbox_are_not_known_by_their_guid() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "one"), (2, "two"), (3, "one"), (4, "one")]);
        let (changes, _) = told(&mut storage, vec![part(&[(1, 3)])]);
        assert_eq!(saves(&changes), [(1, false), (2, true), (3, false)]);
    }
}
