//! Mailboxes themselves: which one a change means, and what becomes of two that servers made or named before they had talked.
//!
//! What [`crate::merge::mailbox`] decides is carried out. Guarantees that a mailbox is never deleted before all of its messages
//! are in the one that it becomes, and that the peers are told if something stays here that is not as they have it.
use std::io::{Read, Write};

use super::super::guids::Guids;
use super::super::look;
use super::super::mark::{self, Moved};
use super::super::name;
use super::super::storage::{Existence, Guid, Result, Storage, Update};
use super::{guid_of, locate, Apply, Marks, Open, Outcome, Pending, Reason, GONE_MAX, NO_GUID};
use crate::merge::mailbox::{merge, Identity};
use crate::merge::rule::Rule;
use crate::merge::uid::{Put, There};
use crate::wire::proto::{self, op::What};

impl<S: Storage, C: Read + Write> Apply<'_, S, C> {
    // ---- Finding the mailbox -----------------------------------------------------------------------------------------

    /// What the relay knows.
    pub fn know_aliases(&mut self, aliases: &[proto::Alias]) {
        let guid = |bytes: &[u8]| Guid::try_from(bytes).ok();
        self.aliases.extend(aliases.iter().filter_map(|alias| guid(&alias.guid).zip(guid(&alias.is))));
    }

    /// Where it is now, under whichever GUID.
    fn locate(&mut self, mailbox: &proto::Mailbox) -> Result<Option<String>> {
        match (locate(self.storage, mailbox)?, self.aliases.get(&guid_of(mailbox)?)) {
            (None, Some(is)) => locate(self.storage, &proto::Mailbox { guid: is.to_vec(), ..mailbox.clone() }),
            (found, _) => Ok(found),
        }
    }

    /// Opens the mailbox, creates it if wanted. False if it doesn't exist.
    pub(super) fn enter(&mut self, mailbox: &proto::Mailbox, reason: Reason) -> Outcome<bool> {
        if let Some(open) = &self.open {
            let same_uids = mailbox.uid_validity == 0 || mailbox.uid_validity == open.uid_validity;
            // Ours stood against a creation; against a message it may give way.
            let again = open.differs && open.reason == Reason::Create && reason == Reason::Save;
            if !again && same_uids && super::is_of(open, mailbox) {
                return Ok(true);
            }
        }
        self.leave()?;
        let vname = name::vname(&mailbox.path, &self.namespace)?;
        let guid = guid_of(mailbox)?;

        // By name first: looking for a GUID may list all mailboxes. Opening it before looking whether it exists would
        // create those that are configured to appear by themselves, with a GUID of their own.
        let is_there = self.storage.existence(&vname)? == Existence::Mailbox && self.storage.open(&vname, false)?;
        if is_there && (guid == NO_GUID || self.storage.status().guid == guid) {
            return self.entered(mailbox, &vname, reason, false);
        }
        self.storage.close();
        if let Some(found) = self.find_guid(&guid)? {
            let is_open = self.storage.open(&found, false)?;
            let is = self.storage.status().guid;
            return match is_open && (is == guid || self.aliases.get(&guid) == Some(&is)) {
                true => self.entered(mailbox, &found, reason, false),
                // It was there a moment ago. If it is not any more, it is not to be made a second time.
                false => Err("it was renamed or deleted just now".to_string().into()),
            };
        }
        if !is_there && reason == Reason::Change {
            return Ok(false);
        }
        self.is_reborn = guid != NO_GUID && self.storage.was_deleted(&guid)?;
        if self.is_reborn {
            self.elsewhere.forget(&guid);
        }
        if !is_there {
            // Not its UIDNEXT: messages that belong below may still come.
            let uid_validity = self.uid_validity_anew(&guid, mailbox.uid_validity)?;
            let update = Update { guid, uid_validity, ..Update::default() };
            // Dovecot also says that it was there already if a session came upon the maildir while it was being made.
            self.storage.create(&vname, false, &update)?;
            if self.is_reborn && self.storage.open(&vname, false)? {
                // So it counts as one that had messages.
                let (offset, bytes) = Marks::default().diverge();
                self.storage.write_mark(offset, &bytes)?;
                self.storage.commit()?;
            }
        }
        if !self.storage.open(&vname, false)? {
            return Err("it disappeared".to_string().into());
        }
        let outcome = self.entered(mailbox, &vname, reason, !is_there);
        self.is_reborn = false;
        outcome
    }

    /// A mailbox is made, or becomes one that has its name: under its own UIDVALIDITY, its UIDs may have named other messages here
    /// before it was deleted, each time.
    fn uid_validity_anew(&mut self, guid: &Guid, theirs: u32) -> Result<u32> {
        Ok(match theirs != 0 && *guid != NO_GUID {
            true => theirs.saturating_add(self.storage.deletions(guid)?),
            false => theirs,
        })
    }

    /// The mailbox with this GUID, or the one that it has become.
    pub(super) fn find_guid(&mut self, guid: &Guid) -> Result<Option<String>> {
        if *guid == NO_GUID {
            return Ok(None);
        }
        match (self.storage.find_guid(guid)?, self.aliases.get(guid)) {
            (None, Some(is)) => self.storage.find_guid(is),
            (found, _) => Ok(found),
        }
    }

    /// The mailbox that is meant is open, or another one of its name: they are one from now on. `is_new`: it was not there a
    /// moment ago.
    fn entered(&mut self, mailbox: &proto::Mailbox, vname: &str, reason: Reason, is_new: bool) -> Outcome<bool> {
        let guid = guid_of(mailbox)?;
        let status = self.storage.status();
        let marks = Marks::parse(&self.storage.mark()?);
        // A worker may have been killed before it had marked what was born again.
        let had_mail = status.uid_next > 1
            || marks.has_diverged()
            || status.guid != NO_GUID && self.storage.was_deleted(&status.guid)?;
        // Nobody knows what a worker that was killed had begun to make. And a session that comes upon a new maildir gives it a
        // GUID of its own.
        let was_given_another = is_new && status.guid != guid;
        let is_again = reason == Reason::Create && self.again.contains(&self.current.seq);
        let is_half_made = !had_mail && (was_given_another || is_again);
        let is_half_made = is_half_made && guid != NO_GUID;
        let ours = match is_half_made {
            true => Identity { guid: NO_GUID, uid_validity: 0, had_mail },
            false => Identity { guid: status.guid, uid_validity: status.uid_validity, had_mail },
        };
        let theirs = Identity {
            guid,
            uid_validity: match [guid, NO_GUID].contains(&status.guid) || status.uid_validity == mailbox.uid_validity {
                true => mailbox.uid_validity,
                false => self.uid_validity_anew(&guid, mailbox.uid_validity)?,
            },
            had_mail: reason != Reason::Create || mailbox.uid_next > 1 || self.creates_with_mail,
        };
        let is_known = self.aliases.get(&guid) == Some(&status.guid);
        let is_other = ![guid, ours.guid].contains(&NO_GUID) && ours.guid != guid;
        let merged = self.become_one(vname, ours, theirs)?;
        let was = [guid, ours.guid].into_iter().find(|was| is_other && *was != merged.guid);
        let differs = (guid != NO_GUID && merged.guid != guid)
            || (mailbox.uid_validity != 0 && merged.uid_validity != mailbox.uid_validity);
        let path = name::path(vname, &self.namespace).unwrap_or_else(|| mailbox.path.clone());
        // Theirs were given in another mailbox's place, whichever of the two it was.
        let is_other_place = mailbox.uid_validity != 0 && status.uid_validity != mailbox.uid_validity;
        let diverges = (is_other_place || (guid != NO_GUID && guid != status.guid)) && status.messages > 0;
        self.open = Some(Open {
            mailbox: (mailbox.guid.clone(), mailbox.path.clone()),
            guid: merged.guid,
            path,
            uid_validity: mailbox.uid_validity,
            uid_next: self.storage.status().uid_next,
            reason,
            differs,
            marks: Marks::parse(&self.storage.mark()?),
            complete: None,
            diverges: false,
            expunges: false,
            guids: Guids::default(),
            min_uid_next: 0,
            min_highest_modseq: 0,
        });
        if diverges && reason != Reason::Create && !self.has_diverged() {
            self.diverge();
            self.pending = Pending::Changes;
            self.flush()?;
        }
        // Who still calls it so may not have heard yet what it was told.
        let is_told = is_known && merged.guid == status.guid;
        if (differs || is_other) && !is_told {
            self.tell_identity(had_mail, was);
        } else if is_half_made && ![NO_GUID, guid].contains(&status.guid) {
            // Or it is another one, empty, that was renamed to here just now: who knows that must hear what became of it.
            let was = vec![status.guid.to_vec()];
            self.tell_op(What::Create(proto::MailboxCreate { had_mail, was, again: true, ..Default::default() }));
        }
        self.finish_what_was_moving()?;
        Ok(true)
    }

    /// The open mailbox becomes what it and another one are together.
    fn become_one(&mut self, vname: &str, ours: Identity, theirs: Identity) -> Outcome<Identity> {
        let born = (vname == "INBOX").then(|| self.storage.inbox_guid()).transpose()?;
        let merged = merge(ours, theirs, born);
        let (guid, uid_validity) = (merged.guid, merged.uid_validity);
        let mut update = Update::default();
        let path = name::path(vname, &self.namespace).unwrap_or_default();
        if guid != ours.guid {
            update.guid = guid;
            match ours.guid {
                NO_GUID => self.note("guid_adopted"),
                _ => self.solved_in(path.clone(), Rule::OneName),
            }
        }
        if uid_validity != ours.uid_validity {
            update.uid_validity = uid_validity;
            if ours.had_mail {
                self.solved_in(path, Rule::HigherUidValidity);
            }
        }
        if update.guid != NO_GUID && !self.new_aliases.is_empty() {
            // What became what before is to be said before the span that says what this becomes.
            self.report()?;
        }
        if update.guid != NO_GUID || update.uid_validity != 0 {
            self.storage.update(&update)?;
        }
        if update.uid_validity != 0 && !self.storage.open(vname, false)? {
            return Err("it disappeared".to_string().into());
        }
        for loser in [theirs.guid, ours.guid].into_iter().filter(|loser| ![NO_GUID, guid].contains(loser)) {
            self.note_alias(loser, guid);
            self.merged.insert(guid);
            // Of a mailbox that is here the relay hears by itself that it got another GUID.
            if loser == theirs.guid {
                self.new_aliases.push(proto::Alias { guid: loser.to_vec(), is: guid.to_vec(), index_id: 0 });
            }
        }
        Ok(merged)
    }

    fn note_alias(&mut self, loser: Guid, guid: Guid) {
        self.aliases.values_mut().filter(|is| **is == loser).for_each(|is| *is = guid);
        self.aliases.insert(loser, guid);
        self.aliases.remove(&guid);
        self.elsewhere.rename(&loser, &guid);
    }

    /// The open mailbox is not as the peer has it, so it may hear how it is. `was`: another one has become it, also where they
    /// have not met under one name.
    fn tell_identity(&mut self, had_mail: bool, was: Option<Guid>) {
        let was = was.map(|guid| guid.to_vec()).into_iter().collect();
        let reborn = self.is_reborn;
        self.tell_op(What::Create(proto::MailboxCreate { had_mail, was, reborn, ..Default::default() }));
    }

    /// Other mailboxes have become the open one on a peer.
    fn take_in(&mut self, stamp: &proto::Stamp, mailbox: &proto::Mailbox, was: &[Vec<u8>]) -> Outcome<()> {
        for was in was {
            let was = Guid::try_from(&was[..]).map_err(|_| "malformed change: a GUID is not 16 bytes".to_string())?;
            let Some(open) = &self.open else { return Ok(()) };
            let (guid, path) = (open.guid, open.path.clone());
            if was == guid {
                // Which of the two GUIDs stays is known by then.
                continue;
            }
            self.leave()?;
            let from = self.storage.find_guid(&was)?;
            match from.zip(Some(name::vname(&path, &self.namespace)?)) {
                Some((from, to)) if from != to => self.move_messages(stamp, &from, &to)?,
                _ => {
                    self.note_alias(was, guid);
                    self.new_aliases.push(proto::Alias { guid: was.to_vec(), is: guid.to_vec(), index_id: 0 });
                }
            }
            self.enter(mailbox, Reason::Create)?;
        }
        Ok(())
    }

    // ---- Operations --------------------------------------------------------------------------------------------------

    pub(super) fn create(
        &mut self,
        stamp: &proto::Stamp,
        mailbox: &proto::Mailbox,
        create: &proto::MailboxCreate,
    ) -> Outcome<()> {
        if create.again && self.is_gone_meanwhile(mailbox)? {
            return Ok(());
        }
        if !create.directory {
            self.creates_with_mail = create.had_mail;
            let outcome = self.enter(mailbox, Reason::Create);
            let outcome = outcome.and_then(|_| self.take_in(stamp, mailbox, &create.was));
            self.creates_with_mail = false;
            outcome?;
            if create.reborn {
                self.keep(mailbox)?;
            }
            if !create.later_name.is_empty() {
                let new_path = create.later_name.clone();
                return self.rename(stamp, mailbox, &proto::MailboxRename { new_path, back: vec![] });
            }
            return Ok(());
        }
        self.leave()?;
        let vname = name::vname(&mailbox.path, &self.namespace)?;
        if self.storage.existence(&vname)? == Existence::None {
            self.storage.create(&vname, true, &Update::default())?;
        }
        Ok(())
    }

    /// Neither the mailbox nor another one of its name is here, or it was deleted here.
    fn is_gone_meanwhile(&mut self, mailbox: &proto::Mailbox) -> Outcome<bool> {
        self.leave()?;
        let guid = guid_of(mailbox)?;
        if self.find_guid(&guid)?.is_some() {
            return Ok(false);
        }
        let vname = name::vname(&mailbox.path, &self.namespace)?;
        Ok(self.storage.existence(&vname)? != Existence::Mailbox || self.storage.was_deleted(&guid)?)
    }

    pub(super) fn rename(
        &mut self,
        stamp: &proto::Stamp,
        mailbox: &proto::Mailbox,
        rename: &proto::MailboxRename,
    ) -> Outcome<()> {
        self.leave()?;
        let to = name::vname(&rename.new_path, &self.namespace)?;
        if self.aliases.get(&guid_of(mailbox)?).is_some_and(|is| self.merged.contains(is)) {
            // The other one may have been named later, which the relay asks when it knows of both.
            return Err("it has become another mailbox just now".to_string().into());
        }
        let from = self.locate(mailbox)?;
        match &from {
            Some(from) => self.rename_to(stamp, from, &to)?,
            None if self.storage.existence(&to)? == Existence::None => self.note("mailbox_missing"),
            None => {}
        }
        for back in &rename.back {
            let name = name::vname(&back.path, &self.namespace)?;
            // Dovecot's list may still have it under its old name, so it is looked for where it must have gone.
            let gone = from.as_ref().and_then(|from| name.strip_prefix(from)).map(|rest| format!("{to}{rest}"));
            let path = gone.and_then(|gone| name::path(&gone, &self.namespace)).unwrap_or_else(|| back.path.clone());
            if let Some(gone) = self.locate(&proto::Mailbox { path, ..back.clone() })? {
                self.rename_to(stamp, &gone, &name)?;
            }
        }
        Ok(())
    }

    /// With its children. If something has the name already, the two become one.
    fn rename_to(&mut self, stamp: &proto::Stamp, from: &str, to: &str) -> Outcome<()> {
        if from == to || self.storage.rename(from, to)? {
            return Ok(());
        }
        if to.strip_prefix(from).is_some_and(|rest| rest.starts_with(self.namespace.separator)) {
            // Dovecot does not put a mailbox below itself: what is below stays behind.
            let aside = format!("{from}~");
            if !self.storage.rename(from, &aside)? {
                return Err(format!("it cannot be renamed to {aside}").into());
            }
            self.rename_children(stamp, &aside, from)?;
            return self.rename_to(stamp, &aside, to);
        }
        self.solved_in(name::path(to, &self.namespace).unwrap_or_default(), Rule::NameTaken);
        self.rename_children(stamp, from, to)?;
        match self.storage.existence(from)? {
            Existence::Mailbox => self.move_messages(stamp, from, to),
            Existence::Directory => self.storage.delete(from).map(drop).map_err(Into::into),
            Existence::None => Ok(()),
        }
    }

    fn rename_children(&mut self, stamp: &proto::Stamp, from: &str, to: &str) -> Outcome<()> {
        for child in self.storage.mailboxes(i64::MAX)? {
            let rest = child.vname.strip_prefix(from).filter(|rest| rest.starts_with(self.namespace.separator));
            if let Some(rest) = rest.map(str::to_owned) {
                self.rename_to(stamp, &child.vname, &format!("{to}{rest}"))?;
            }
        }
        Ok(())
    }

    /// All of its messages go to another mailbox, which is the same from now on.
    fn move_messages(&mut self, stamp: &proto::Stamp, from: &str, to: &str) -> Outcome<()> {
        let Some(path) = name::path(to, &self.namespace) else { return Ok(()) };
        loop {
            let Some(source) = self.identity_of(from)? else { return Ok(()) };
            let uid_next = self.storage.status().uid_next;
            let index_id = mark::index_id(&self.storage.log_files()?);
            let uids = self.storage.uids()?;
            let mut saves = Vec::with_capacity(uids.len());
            for uid in &uids {
                saves.extend(self.save_again(*uid)?);
            }
            self.storage.close();
            // By its name, whichever GUID that has.
            let target = proto::Mailbox { path: path.clone(), ..Default::default() };
            self.make_room(&target, source, uid_next)?;
            let target = proto::Mailbox { uid_validity: source.uid_validity, ..target };
            self.creates_with_mail = source.had_mail;
            let entered = self.enter(&target, Reason::Create);
            self.creates_with_mail = false;
            entered?;
            let from_path = name::path(from, &self.namespace).unwrap_or_default();
            for mut save in saves {
                let uid = save.birth.as_ref().map_or(0, |birth| birth.uid);
                let mailbox = proto::Mailbox { path: from_path.clone(), ..Default::default() };
                save.copied_from = Some(proto::CopiedFrom { mailbox: Some(mailbox), uid });
                self.moves = true;
                let saved = self.save(stamp, &target, &save);
                self.moves = false;
                saved?;
            }
            self.flush()?;
            // Before the other one is gone, which has this GUID, too.
            let status = self.storage.status();
            let had_mail = status.uid_next > 1;
            let ours = Identity { guid: status.guid, uid_validity: status.uid_validity, had_mail };
            let merged = self.become_one(to, ours, source)?;
            if let Some(open) = &mut self.open {
                open.guid = merged.guid;
                // Also those of messages that are gone name no others.
                open.min_uid_next = open.min_uid_next.max(uid_next);
            }
            let was = [source.guid, status.guid].into_iter().find(|was| *was != merged.guid);
            self.tell_identity(merged.had_mail, was);
            // Who has put something into it meanwhile tells so when its log is gone.
            let (guid, is) = (source.guid.to_vec(), merged.guid.to_vec());
            self.new_aliases.push(proto::Alias { guid, is, index_id });
            self.leave()?;
            // The relay must know what it was before it can miss it.
            self.report()?;
            if self.identity_of(from)?.is_none() {
                return Ok(());
            }
            self.expunge_here(&uids)?;
            self.storage.close();
            if self.storage.delete_empty(from)? {
                return Ok(());
            }
        }
    }

    /// The mailbox gets the UIDVALIDITY of the other one, which may have had its name before: under that, UIDs below `uid_next` have named
    /// the other one's messages.
    fn make_room(&mut self, target: &proto::Mailbox, source: Identity, uid_next: u32) -> Outcome<()> {
        self.enter(target, Reason::Save)?;
        let status = self.storage.status();
        let ours = Identity { guid: status.guid, uid_validity: status.uid_validity, had_mail: status.uid_next > 1 };
        if merge(ours, source, None).uid_validity == ours.uid_validity {
            return Ok(());
        }
        for uid in self.storage.uids()?.into_iter().filter(|uid| *uid < uid_next) {
            let Some(guid) = self.storage.message_guid(uid)? else { continue };
            let to = self.here(None).next.max(uid_next);
            self.put(&guid, uid, Put::At(to), There { uid, next: 0, raised: 0 }, uid)?;
        }
        Ok(())
    }

    /// Opens the mailbox. None if it is not there.
    fn identity_of(&mut self, vname: &str) -> Result<Option<Identity>> {
        if !self.storage.open(vname, false)? {
            return Ok(None);
        }
        let status = self.storage.status();
        let (guid, uid_validity) = (status.guid, status.uid_validity);
        Ok(Some(Identity { guid, uid_validity, had_mail: status.uid_next > 1 }))
    }

    pub(super) fn delete(&mut self, mailbox: &proto::Mailbox, delete: &proto::MailboxDelete) -> Outcome<()> {
        let guid = guid_of(mailbox)?;
        if delete.keeps {
            return self.keep(mailbox);
        }
        // Who deleted one of the two had not heard of the other: he would name it by the GUID that stayed.
        if self.aliases.contains_key(&guid) || self.merged.contains(&guid) {
            self.solved_in(mailbox.path.clone(), Rule::MailStays);
            return self.keep(mailbox);
        }
        self.leave()?;
        let Some(vname) = self.locate(mailbox)? else {
            return self.finish_delete(&name::vname(&mailbox.path, &self.namespace)?);
        };
        if delete.directory || self.storage.existence(&vname)? != Existence::Mailbox {
            // A mailbox that has come into being under a directory's name is not the one that was deleted.
            let is_directory = self.storage.existence(&vname)? != Existence::Mailbox;
            return if is_directory { self.storage.delete(&vname).map(drop).map_err(Into::into) } else { Ok(()) };
        }
        if !self.storage.open(&vname, false)? {
            return self.finish_delete(&vname);
        }
        let known = delete.known.clone().unwrap_or_default();
        if !look::has_untold_saves(self.storage, &known)? {
            // Only what is known to be known: something may come in meanwhile.
            let uids = self.storage.uids()?;
            self.expunge_here(&uids)?;
            self.storage.close();
            if self.storage.delete_empty(&vname)? || self.storage.existence(&vname)? == Existence::None {
                return Ok(());
            }
        }
        self.solved_in(mailbox.path.clone(), Rule::MailStays);
        self.storage.close();
        self.keep(mailbox)
    }

    /// All these messages of the open mailbox.
    fn expunge_here(&mut self, uids: &[u32]) -> Result<()> {
        for uid in uids {
            self.storage.expunge(*uid, *uid)?;
        }
        let (offset, bytes) = Marks::parse(&self.storage.mark()?).ours();
        self.storage.write_mark(offset, &bytes)?;
        self.storage.commit().map(drop)
    }

    /// Who was killed while it deleted the mailbox, or had no room for that, has left one that nobody can open, and that Dovecot would
    /// bring back.
    fn finish_delete(&mut self, vname: &str) -> Outcome<()> {
        let is_half_deleted =
            self.storage.existence(vname)? == Existence::Mailbox && !self.storage.open(vname, true)?;
        self.storage.close();
        if is_half_deleted {
            self.storage.delete(vname)?;
        }
        Ok(())
    }

    /// Who deleted it did not know all that is in it. So it stays, and the others get it again.
    fn keep(&mut self, mailbox: &proto::Mailbox) -> Outcome<()> {
        // By the GUID that it has: nothing is learned of the one that was deleted.
        let guid = self.aliases.get(&guid_of(mailbox)?).map_or(mailbox.guid.clone(), |is| is.to_vec());
        let mailbox = &proto::Mailbox { guid, ..mailbox.clone() };
        if !self.enter(mailbox, Reason::Change)? {
            return Ok(());
        }
        self.flush()?;
        let had_mail = self.storage.status().uid_next > 1;
        self.tell_identity(had_mail, None);
        let uids = self.storage.uids()?;
        if uids.len() > GONE_MAX {
            let origin = super::printable(&self.current.origin);
            self.doubts.push(proto::Doubt {
                guid: mailbox.guid.clone(),
                path: mailbox.path.clone(),
                reason: format!(
                    "server {origin} has deleted it while it was used here, and it has too many messages to tell"
                ),
                ..Default::default()
            });
            return Ok(());
        }
        let moved = Moved::of(&self.storage.log_files()?);
        for uid in uids {
            if let Some(save) = self.save_again(uid)? {
                let was = moved.before(uid);
                self.tell_op(What::Save(proto::Save { found: false, kept: true, was, ..save }));
            }
        }
        // There may have been more.
        self.tell_uid_next();
        Ok(())
    }

    pub(super) fn subscribe(&mut self, mailbox: &proto::Mailbox, subscription: &proto::Subscription) -> Outcome<()> {
        let vname = name::vname(&mailbox.path, &self.namespace)?;
        Ok(self.storage.set_subscribed(&vname, subscription.subscribed)?)
    }
}
