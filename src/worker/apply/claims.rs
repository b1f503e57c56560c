//! UIDs that clash: what [`crate::merge::uid`] decides is carried out.
//!
//! A message moves by a copy and an expunge. Guarantees that it is never there twice in the end, whatever is killed in
//! between (the mark says what is being moved), that nothing is lost of what clients do to it meanwhile, and that the peers
//! are told before what gave rise to it counts as done.
use std::collections::BTreeSet;
use std::io::{Read, Write};

use super::super::elsewhere::{Known, GONE};
use super::super::mark;
use super::super::storage::{Result, Storage};
use super::{Apply, Outcome, Pending, Reason, Standing, UID_MAX};
use crate::change;
use crate::indexlog::Delta;
use crate::merge::uid::{self, Here, Put, Tell, There};
use crate::wire::proto::{self, op::What};

impl<S: Storage, C: Read + Write> Apply<'_, S, C> {
    pub(super) fn here(&self, stands: Option<u32>) -> Here {
        Here { stands, next: self.open.as_ref().map_or(1, |open| open.uid_next), resolves: self.resolves }
    }

    /// Says to the peers what they must know of a message that is at `stands` here, if something. `was`: UIDs that it had here,
    /// and the one that it has where the change comes from (0: not known).
    pub(super) fn tell_uid(&mut self, guid: &str, stands: u32, there: There, (was, of_uid): (Vec<u32>, u32)) {
        let next = self.here(None).next;
        let There { uid, raised, .. } = there;
        let (guid, of) = (guid.to_owned(), self.current.origin.clone());
        self.tell_op(match uid::tell(stands, uid, self.resolves) {
            Tell::Nothing => return,
            Tell::Claim => {
                let raised = raised.saturating_add(1);
                What::Claim(proto::Claim { guid, uid: stands, was, raised, of, of_uid })
            }
            Tell::Nack => What::Nack(proto::Nack { guid, uid, stands, next, raised, of }),
        });
    }

    /// Not with others: claims on their way would not fit any more.
    pub(super) fn tell_uid_next(&mut self) {
        let uid_next = self.storage.status().uid_next;
        self.tell_with(change::nothing(), uid_next);
    }

    pub(super) fn tell_op(&mut self, what: What) {
        self.tell_with(what, 0);
    }

    fn tell_with(&mut self, what: What, uid_next: u32) {
        let Some(open) = &self.open else { return };
        let mailbox = proto::Mailbox {
            guid: open.guid.to_vec(),
            path: open.path.clone(),
            uid_validity: self.storage.status().uid_validity,
            uid_next,
            ..Default::default()
        };
        let mut changes = change::split(vec![what], self.user, &mailbox, 0);
        // They come behind what gave rise to them.
        let stamps = changes.iter_mut().filter_map(|change| change.stamp.as_mut());
        stamps.for_each(|stamp| stamp.vector = vec![self.current.clone()]);
        self.tell.extend(changes);
    }

    /// A message that is somewhere else is above.
    pub(super) fn tell_if_elsewhere(&mut self, guid: &str, wanted: u32) -> Outcome<()> {
        if wanted == 0 || self.is_same(wanted, guid)? {
            return Ok(());
        }
        if !self.has_diverged() {
            if !mark::is_saved_by_others(&self.storage.log_files()?, wanted) {
                return Ok(());
            }
            // Somebody took the UID in the same moment, and the worker was killed before it could mark that.
            self.diverge();
        }
        let stands = match self.given_another(wanted, guid, None)? {
            Standing::At(uid) => Some(uid),
            Standing::Expunged => {
                self.tell_expunge(wanted, guid);
                None
            }
            Standing::Unknown => match self.first_above(wanted, guid)? {
                Some((uid, Standing::Expunged)) => {
                    // The next of the copies is another one.
                    self.note_elsewhere(wanted, guid, uid, false);
                    self.tell_expunge(wanted, guid);
                    None
                }
                found => found.map(|(uid, _)| uid),
            },
        };
        if let Some(stands) = stands.filter(|uid| *uid > wanted) {
            self.note_elsewhere(wanted, guid, stands, false);
            self.tell_uid(guid, stands, There { uid: wanted, next: 0, raised: 0 }, (vec![], wanted));
        }
        Ok(())
    }

    /// Where it is, or was when somebody expunged it, though what was noted of it is lost. Of copies, the first that is no other of
    /// the peer's: they were saved in this order.
    fn first_above(&mut self, wanted: u32, guid: &str) -> Result<Option<(u32, Standing)>> {
        let mut uids = BTreeSet::from_iter(mark::saved_by_us(&self.storage.log_files()?));
        uids.extend(self.storage.find_messages(guid)?);
        for uid in uids.into_iter().filter(|uid| *uid > wanted) {
            if self.is_of_another(uid, guid) {
                continue;
            }
            match self.standing_here(uid, guid)? {
                Standing::Unknown => {}
                Standing::At(at) if self.is_of_another(at, guid) => {}
                Standing::At(at) => return Ok(Some((at, Standing::At(at)))),
                Standing::Expunged => return Ok(Some((uid, Standing::Expunged))),
            }
        }
        Ok(None)
    }

    pub(super) fn claim(&mut self, mailbox: &proto::Mailbox, claim: &proto::Claim) -> Outcome<()> {
        if claim.uid > UID_MAX {
            return Err(format!("malformed change: UID {}", claim.uid).into());
        }
        if !self.enter_for_claim(mailbox)? {
            return Ok(());
        }
        let there = There { uid: claim.uid, next: 0, raised: claim.raised };
        match self.claimed(claim)? {
            Standing::At(stands) => self.take_claim(&claim.guid, stands, there),
            missing => {
                self.drop_stray(&claim.guid)?;
                self.note_elsewhere(claim.uid, &claim.guid, self.or_gone(missing, &claim.of), false);
                self.reserve(there);
                Ok(())
            }
        }
    }

    /// Which message is meant: of copies inside of the mailbox, all have the GUID.
    fn claimed(&mut self, claim: &proto::Claim) -> Result<Standing> {
        let standing = self.standing_of(&claim.of, claim.of_uid, &claim.guid)?;
        let found = self.storage.find_messages(&claim.guid)?;
        if standing != Standing::Unknown || found.is_empty() {
            return Ok(standing);
        }
        let mut uids: Vec<u32> = [claim.uid].into_iter().chain(claim.was.iter().rev().copied()).collect();
        let mut is_expunged = false;
        for uid in &uids {
            is_expunged |= self.is_gone(*uid, &claim.guid);
            match self.standing(*uid, &claim.guid)? {
                Standing::At(uid) => return Ok(Standing::At(uid)),
                Standing::Expunged => is_expunged = true,
                Standing::Unknown => {}
            }
        }
        // Where it is not known to be elsewhere, it is where the others have it.
        uids.retain(|uid| !self.is_gone(*uid, &claim.guid));
        for uid in uids.into_iter().chain([claim.of_uid]).filter(|uid| *uid != 0) {
            match self.standing_here(uid, &claim.guid)? {
                Standing::At(uid) => return Ok(Standing::At(uid)),
                Standing::Expunged => is_expunged = true,
                Standing::Unknown => {}
            }
        }
        Ok(match found.last() {
            Some(uid) if !is_expunged => Standing::At(*uid),
            _ => Standing::Expunged,
        })
    }

    /// Of the message that this server has, or had, at this UID, if that is known exactly.
    fn standing_of(&mut self, server: &str, uid: u32, guid: &str) -> Result<Standing> {
        let Some(open) = self.open.as_ref().filter(|_| uid != 0 && !server.is_empty()) else {
            return Ok(Standing::Unknown);
        };
        if server == self.me {
            return self.standing_here(uid, guid);
        }
        match self.elsewhere.of_server(server, &open.guid, uid, guid) {
            Some(Known { here: GONE, .. }) => Ok(Standing::Expunged),
            Some(Known { here: 0, .. }) => Ok(Standing::Unknown),
            Some(Known { here, .. }) => self.standing_here(*here, guid),
            None if self.elsewhere.has_another(server, &open.guid, (uid, uid), guid) => Ok(Standing::Unknown),
            None => self.standing_here(uid, guid),
        }
    }

    /// Which one another server could not put where it was claimed.
    fn refused(&mut self, nack: &proto::Nack) -> Result<Standing> {
        let standing = self.standing_of(&nack.of, nack.uid, &nack.guid)?;
        if standing != Standing::Unknown {
            return Ok(standing);
        }
        let standing = self.standing(nack.stands, &nack.guid)?;
        if standing != Standing::Unknown {
            return Ok(standing);
        }
        if self.is_at(nack.uid, &nack.guid)? {
            return Ok(Standing::At(nack.uid));
        }
        Ok(self.storage.find_messages(&nack.guid)?.pop().map_or(Standing::Unknown, Standing::At))
    }

    /// Another server says that it has a message that is `stands` here.
    pub(super) fn take_claim(&mut self, guid: &str, stands: u32, there: There) -> Outcome<()> {
        let put = uid::place(self.here(Some(stands)), there);
        let now = self.put(guid, stands, put, there, there.uid)?;
        self.note_if_elsewhere(there.uid, guid, now);
        Ok(())
    }

    pub(super) fn nack(&mut self, mailbox: &proto::Mailbox, nack: &proto::Nack) -> Outcome<()> {
        if nack.uid > UID_MAX || nack.next > UID_MAX {
            return Err(format!("malformed change: UID {}, UIDNEXT {}", nack.uid, nack.next).into());
        }
        if !self.enter_for_claim(mailbox)? {
            return Ok(());
        }
        if !self.resolves {
            // Somebody else answers, but by this UID the sender names it until it hears of that.
            let here = match self.refused(nack)? {
                Standing::At(uid) => uid,
                missing => {
                    self.tell_gone_again(missing, nack);
                    self.or_gone(missing, &nack.of)
                }
            };
            self.note_if_elsewhere_there(nack.stands, &nack.guid, here);
            return Ok(());
        }
        let there = There { uid: nack.uid, next: nack.next, raised: nack.raised };
        let mut stands = match self.refused(nack)? {
            Standing::At(uid) => uid,
            missing => {
                self.drop_stray(&nack.guid)?;
                self.tell_gone_again(missing, nack);
                self.note_if_elsewhere_there(nack.stands, &nack.guid, self.or_gone(missing, &nack.of));
                return self.answer_without(&nack.guid, there);
            }
        };
        if let Some(put) = uid::answer(self.here(Some(stands)), there) {
            stands = self.put(&nack.guid, stands, put, there, nack.stands)?;
        }
        self.note_if_elsewhere_there(nack.stands, &nack.guid, stands);
        Ok(())
    }

    /// In the place of a UID of a message that is not here: ours was, and what was expunged; others may still come.
    fn or_gone(&self, missing: Standing, of: &str) -> u32 {
        if of == self.me || missing == Standing::Expunged {
            GONE
        } else {
            0
        }
    }

    /// Another server has saved a message of ours that was expunged here. It may have been told of the save after the expunge: a process
    /// that was stopped tells late, and what is told of a log by a look, when the relay was restarted, is not known to be the same.
    fn tell_gone_again(&mut self, missing: Standing, nack: &proto::Nack) {
        if missing == Standing::Expunged && nack.of == self.me {
            self.tell_expunge(nack.uid, &nack.guid);
        }
    }

    /// A nack of a message that was expunged here. Those that did not send it need not have heard of a UID that high.
    fn answer_without(&mut self, guid: &str, there: There) -> Outcome<()> {
        let uid_next = uid::reserve(there);
        let is_news = self.open.as_ref().is_some_and(|open| uid_next > open.uid_next.max(open.min_uid_next));
        self.reserve(there);
        if is_news {
            let (guid, raised) = (guid.to_owned(), there.raised);
            let claim = proto::Claim { guid, uid: uid_next - 1, raised, ..Default::default() };
            self.tell_op(What::Claim(claim));
        }
        Ok(())
    }

    /// The changes' origin has the message at this UID, and may name it so until it hears of ours.
    pub(super) fn note_if_elsewhere(&mut self, uid: u32, guid: &str, here: u32) {
        let was_known = self.known_as(uid, guid).is_some_and(|known| known.here != here);
        if uid != 0 && (uid != here || was_known) {
            self.note_elsewhere(uid, guid, here, false);
        }
    }

    /// The same, where no other server calls it so.
    fn note_if_elsewhere_there(&mut self, uid: u32, guid: &str, here: u32) {
        if uid != 0 && uid != here {
            if let Some(open) = &self.open {
                self.elsewhere.note_alone(&open.guid, uid, guid, here);
            }
        }
    }

    /// The message is not here. Also if it was expunged: UIDNEXT is to be the same everywhere in the end.
    fn reserve(&mut self, there: There) {
        if let Some(open) = &mut self.open {
            open.min_uid_next = open.min_uid_next.max(uid::reserve(there));
        }
    }

    /// Also if it was applied before: what it gave rise to may not have been told.
    fn enter_for_claim(&mut self, mailbox: &proto::Mailbox) -> Outcome<bool> {
        if !self.enter(mailbox, Reason::Change)? {
            self.note("mailbox_missing");
            return Ok(false);
        }
        self.flush()?;
        Ok(true)
    }

    /// `of_uid`: the UID that the message has where the change comes from. The one that it has here then; [`GONE`]: it was
    /// expunged meanwhile.
    pub(super) fn put(&mut self, guid: &str, stands: u32, put: Put, there: There, of_uid: u32) -> Outcome<u32> {
        let now = match put {
            Put::At(uid) if uid != stands => match self.renumber(guid, stands, uid)? {
                Some(uid) => uid,
                None => return Ok(GONE),
            },
            _ => stands,
        };
        let was = if now == stands { vec![] } else { vec![stands] };
        self.tell_uid(guid, now, there, (was, of_uid));
        Ok(now)
    }

    /// Gives the message another UID: the one that it got; None if it was expunged meanwhile.
    pub(super) fn renumber(&mut self, guid: &str, from: u32, to: u32) -> Outcome<Option<u32>> {
        let begin = mark::end(&self.storage.log_files()?);
        // Whatever others do to it is in what is copied, or behind this place.
        self.storage.sync()?;
        if let Some(open) = &mut self.open {
            open.guids.expire();
        }
        self.drop_stray(guid)?;
        if !self.storage.duplicate(from, to)? {
            return Ok(None);
        }
        self.note("uid_moved");
        self.diverge();
        self.note_moving(Some((from, to)))?;
        self.write_marks()?;
        let saved = self.storage.commit()?;
        let Some(uid) = saved.first().copied() else {
            return Err("a message was saved and got no UID".to_string().into());
        };
        if uid != to {
            self.note_moving(Some((from, uid)))?;
            self.storage.commit()?;
        }
        self.note_elsewhere(from, guid, uid, true);
        // What is told of it may be lost: when the change comes again, it is to be known as applied, and told again.
        if let Some(open) = self.open.as_mut().filter(|_| self.is_single) {
            open.complete = Some(self.current.clone());
        }
        self.expunge_moved(from)?;
        let is_there = self.redo_since(begin, from, uid)?;
        self.end_moving()?;
        if is_there {
            return Ok(Some(uid));
        }
        // A client has expunged it while it moved: its process may not find out any more which one it was.
        self.tell_expunge(from, guid);
        Ok(None)
    }

    /// Of a message that is gone here and not on the peers, who may not have heard of it, or not in time. By the UID that they know it
    /// by: what has this GUID at another one may be a copy, or was moved out of the mailbox and back since.
    pub(super) fn tell_expunge(&mut self, uid: u32, guid: &str) {
        let range = proto::MessageRange { first_uid: uid, last_uid: uid, guid: guid.to_owned(), ..Default::default() };
        self.tell_op(What::Expunge(proto::Expunge { messages: vec![range] }));
    }

    /// A copy, as a worker that was killed while the message moved left it. A client that expunged the message meant this one too.
    pub(super) fn drop_stray(&mut self, guid: &str) -> Outcome<()> {
        if let Some(stray) = self.storage.stray(guid)? {
            self.storage.expunge(stray, stray)?;
            self.pending = Pending::Changes;
            self.flush()?;
        }
        Ok(())
    }

    /// The message is at another UID, too: it goes from this one.
    fn expunge_moved(&mut self, from: u32) -> Outcome<()> {
        self.storage.expunge(from, from)?;
        self.pending = Pending::Changes;
        self.flush()
    }

    /// Not before what clients did to it meanwhile is done: who is killed in between leaves that to the next worker.
    fn end_moving(&mut self) -> Outcome<()> {
        self.note_moving(None)?;
        self.pending = Pending::Changes;
        self.flush()
    }

    /// What clients did to the message while it moved. (What they do later, they find out themselves: see follow.h.) False if
    /// they have expunged it.
    fn redo_since(&mut self, begin: mark::Place, from: u32, to: u32) -> Outcome<bool> {
        let mut is_there = true;
        for delta in mark::done_since(&self.storage.log_files()?, begin, from) {
            let none = proto::FlagUpdate::default();
            let update = match delta {
                Delta::Flags { add, remove, .. } => {
                    proto::FlagUpdate { add: add.into(), remove: remove.into(), ..none }
                }
                Delta::Keywords { add: true, name, .. } => proto::FlagUpdate { add_keywords: vec![name], ..none },
                Delta::Keywords { name, .. } => proto::FlagUpdate { remove_keywords: vec![name], ..none },
                _ => {
                    is_there = false;
                    none
                }
            };
            match is_there {
                true => self.storage.update_flags(to, to, &update)?,
                false => self.storage.expunge(to, to)?,
            }
            self.pending = Pending::Changes;
            self.flush()?;
        }
        Ok(is_there)
    }

    /// A worker was killed while it gave a message another UID.
    pub(super) fn finish_what_was_moving(&mut self) -> Outcome<()> {
        let Some((from, to)) = self.open.as_ref().and_then(|open| open.marks.moving()) else { return Ok(()) };
        let of_log = mark::move_of(&self.storage.log_files()?, (from, to));
        let (begin, to) = of_log.map_or((None, to), |(begin, copy)| (Some(begin), copy));
        let (old, new) = (self.storage.message_guid(from)?, self.storage.message_guid(to)?);
        let Some(guid) = old.filter(|old| new.as_ref() == Some(old)) else {
            return self.end_half_moved(begin, from, to);
        };
        self.expunge_moved(from)?;
        // Perhaps it was not told.
        self.note_elsewhere(from, &guid, to, true);
        if let Some(begin) = begin {
            self.redo_since(begin, from, to)?;
        }
        self.end_moving()?;
        if self.resolves {
            self.tell_uid(&guid, to, There { uid: from, next: 0, raised: 0 }, (vec![from], 0));
        }
        Ok(())
    }

    /// One of the two is gone: a client that expunged it, whichever it saw, meant the message.
    fn end_half_moved(&mut self, begin: Option<mark::Place>, from: u32, to: u32) -> Outcome<()> {
        if let (Some(begin), None) = (begin, self.storage.message_guid(from)?) {
            self.redo_since(begin, from, to)?;
        }
        let logs = self.storage.log_files()?;
        for (gone, left) in [(from, to), (to, from)] {
            let done = begin.map(|begin| mark::done_since(&logs, begin, gone)).unwrap_or_default();
            let expunged = done.iter().find_map(|delta| match delta {
                Delta::Expunge { guid, .. } => *guid,
                _ => None,
            });
            let info = self.storage.message_info(left)?;
            if let Some(info) = info.filter(|info| expunged == Some(info.guid_128)) {
                self.storage.expunge(left, left)?;
                self.tell_expunge(from, &info.guid);
            }
        }
        self.end_moving()
    }

    fn note_moving(&mut self, moving: Option<(u32, u32)>) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        let (offset, bytes) = open.marks.set_moving(moving);
        self.storage.write_mark(offset, &bytes)
    }
}
