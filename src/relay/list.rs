//! A user's list of mailboxes, when servers change it before they have heard of each other: [`crate::merge::mailbox`] decides.
//!
//! What a peer did to names is compared with what was done here later, before a worker gets it. A mailbox that was deleted by
//! who had not heard of what was put into it here stays. And what a GUID means that a mailbox does not have any more.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::engine::Engine;
use super::looks::look_at;
use super::order::Release;
use crate::change;
use crate::journal::{self, JournalError, NamedMailbox};
use crate::merge::mailbox::{along, Along, Named};
use crate::merge::rule::Rule;
use crate::wire::proto::op::What;
use crate::wire::proto::{Alias, BodyRequest, Change, Mailbox, MailboxRename, Op, SeqOf, Span, Stamp};

/// So long after a peer's change was applied, one of ours that is only now told may have been made before it.
const RACE_MS: u64 = 5_000;
/// After the last of these changes, what came of them is looked at.
const LOOK_MS: u64 = 2_000;
/// Users of whom that is remembered, and changes of each.
const USERS_MAX: usize = 10_000;
const KEPT_MAX: usize = 64;

/// Which of a user's mailboxes is which now, and whose list was changed last by a peer.
#[derive(Default)]
pub struct Lists {
    aliases: HashMap<Arc<str>, HashMap<Vec<u8>, Vec<u8>>>,
    applied_ms: HashMap<Arc<str>, u64>,
    kept: HashMap<Arc<str>, VecDeque<Kept>>,
    /// Users whose list is to be looked at, and when.
    to_look_at: HashMap<Arc<str>, u64>,
    /// Names that the peers do not know yet.
    to_tell: Vec<(Arc<str>, Change)>,
    /// Mailboxes that were deleted in this round.
    gone: Vec<(Arc<str>, Vec<u8>)>,
    /// Those that this server's clients have deleted.
    deleted: HashMap<Arc<str>, VecDeque<Deleted>>,
    /// Logs that went with mailboxes whose messages were put into others: GUID and index.
    gone_logs: HashMap<Arc<str>, VecDeque<(Vec<u8>, u32)>>,
}

struct Deleted {
    mailbox: Vec<u8>,
    /// In microseconds since 1970.
    made_us: u64,
}

/// A change of another server that put something into a mailbox, or named it.
struct Kept {
    mailbox: Vec<u8>,
    made: SeqOf,
    /// When it was applied here, in microseconds since 1970.
    applied_us: u64,
}

impl Lists {
    /// All that the journal has.
    pub fn set_aliases(&mut self, aliases: Vec<journal::Alias>) {
        self.aliases.clear();
        for journal::Alias { user, mailbox, is_now } in aliases {
            self.aliases.entry(user.into()).or_default().insert(mailbox, is_now);
        }
    }

    /// The mailbox's GUID now.
    pub fn canonical<'a>(&'a self, user: &str, mailbox: &'a [u8]) -> &'a [u8] {
        self.aliases.get(user).and_then(|of_user| of_user.get(mailbox)).map_or(mailbox, Vec::as_slice)
    }

    /// All of the user.
    pub fn aliases(&self, user: &str) -> Vec<Alias> {
        let of_user = self.aliases.get(user).into_iter().flatten();
        of_user.map(|(guid, is)| Alias { guid: guid.clone(), is: is.clone(), index_id: 0 }).collect()
    }

    fn add_alias(&mut self, user: &Arc<str>, mailbox: &[u8], is_now: &[u8]) {
        let of_user = self.aliases.entry(user.clone()).or_default();
        of_user.values_mut().filter(|is| *is == mailbox).for_each(|is| *is = is_now.to_vec());
        of_user.insert(mailbox.to_vec(), is_now.to_vec());
        of_user.remove(is_now);
    }

    fn is_applied(&mut self, user: &Arc<str>, now_ms: u64) {
        if self.applied_ms.len() >= USERS_MAX {
            self.applied_ms.retain(|_, at_ms| *at_ms + RACE_MS > now_ms);
        }
        self.applied_ms.insert(user.clone(), now_ms);
    }

    /// A change that keeps a mailbox is applied.
    pub fn keeps(&mut self, user: &Arc<str>, mailbox: &[u8], made: &SeqOf, applied_us: u64) {
        let oldest_us = applied_us.saturating_sub(RACE_MS * 1_000);
        if self.kept.len() >= USERS_MAX {
            self.kept.retain(|_, kept| kept.back().is_some_and(|last| last.applied_us > oldest_us));
        }
        let mailbox = self.canonical(user, mailbox).to_vec();
        let of_user = self.kept.entry(user.clone()).or_default();
        while of_user.len() >= KEPT_MAX || of_user.front().is_some_and(|first| first.applied_us < oldest_us) {
            of_user.pop_front();
        }
        of_user.push_back(Kept { mailbox, made: made.clone(), applied_us });
    }

    /// A deletion that is told only now may have been made before something was applied: who made it had not heard of that.
    fn unhear(&self, user: &str, mailbox: &[u8], deleted_us: u64, vector: &mut Vec<SeqOf>) {
        let of_user = self.kept.get(user).into_iter().flatten();
        for kept in of_user.filter(|kept| kept.mailbox == mailbox && kept.applied_us >= deleted_us) {
            let is_it = |heard: &&mut SeqOf| {
                (&heard.origin, heard.epoch) == (&kept.made.origin, kept.made.epoch) && heard.seq >= kept.made.seq
            };
            vector.iter_mut().filter(is_it).for_each(|heard| heard.seq = kept.made.seq - 1);
        }
        vector.retain(|heard| heard.seq > 0);
    }

    /// A change of this server is told. What its other processes did to the mailbox before they tell later, if at all: after the relay
    /// was away, and a worker has found that the mailbox is gone. `made_us` is when that was found, then.
    pub fn note_deleted(&mut self, user: &Arc<str>, change: &Change, made_us: u64) {
        let is_delete = change.ops.iter().any(|op| matches!(op.what, Some(What::Delete(_))));
        let Some(mailbox) = change.mailbox.as_ref().filter(|mailbox| is_delete && !mailbox.guid.is_empty()) else {
            return;
        };
        let oldest_us = made_us.saturating_sub(RACE_MS * 1_000);
        if self.deleted.len() >= USERS_MAX {
            self.deleted.retain(|_, of_user| of_user.back().is_some_and(|last| last.made_us > oldest_us));
        }
        let of_user = self.deleted.entry(user.clone()).or_default();
        while of_user.len() >= KEPT_MAX || of_user.front().is_some_and(|first| first.made_us < oldest_us) {
            of_user.pop_front();
        }
        of_user.push_back(Deleted { mailbox: mailbox.guid.clone(), made_us });
    }

    /// Whether what was done to the mailbox, and is told late, has gone with it. A subscription is one to a name.
    pub fn has_gone_with_mailbox(&self, user: &str, change: &Change) -> bool {
        let made_us = change.stamp.as_ref().map_or(0, |stamp| stamp.clock);
        let Some(mailbox) = change.mailbox.as_ref().filter(|mailbox| made_us > 0 && !mailbox.guid.is_empty()) else {
            return false;
        };
        let mut deleted = self.deleted.get(user).into_iter().flatten();
        deleted.any(|deleted| deleted.mailbox == mailbox.guid && made_us <= deleted.made_us)
    }

    fn note_gone_log(&mut self, user: &Arc<str>, mailbox: &[u8], index_id: u32) {
        if self.gone_logs.len() >= USERS_MAX {
            self.gone_logs.clear();
        }
        let of_user = self.gone_logs.entry(user.clone()).or_default();
        if of_user.len() >= KEPT_MAX {
            of_user.pop_front();
        }
        of_user.push_back((mailbox.to_vec(), index_id));
    }

    /// Whether what was written there has gone with its mailbox, whose messages are in another one.
    pub fn is_log_gone(&self, span: &Span) -> bool {
        let mut of_user = self.gone_logs.get(span.user.as_str()).into_iter().flatten();
        of_user.any(|(mailbox, index_id)| *mailbox == span.mailbox_guid && *index_id == span.index_id)
    }

    pub fn to_be_looked_at(&self) -> usize {
        self.to_look_at.len()
    }

    pub fn is_to_be_looked_at(&self, user: &str) -> bool {
        self.to_look_at.contains_key(user)
    }

    pub fn wake_up_ms(&self) -> Option<u64> {
        self.to_look_at.values().min().copied()
    }

    fn may_race(&self, user: &str, now_ms: u64) -> bool {
        self.applied_ms.get(user).is_some_and(|at_ms| at_ms + RACE_MS > now_ms)
    }
}

fn named(stamp: &Stamp) -> Named {
    Named { clock: stamp.clock, origin: stamp.origin.clone() }
}

/// Those below a name, and what comes behind it in theirs.
fn below<'a>(all: &'a [NamedMailbox], path: &'a [String]) -> impl Iterator<Item = (&'a NamedMailbox, &'a [String])> {
    let rest = |known: &'a NamedMailbox| Some((known, known.path.strip_prefix(path)?));
    all.iter().filter_map(rest).filter(|(_, rest)| !rest.is_empty())
}

impl Engine {
    /// A change of this server, whatever GUID its mailbox had when its process opened it.
    pub fn canonical_change(&self, user: &str, change: &mut Change) {
        let canonical = |mailbox: &mut Mailbox| mailbox.guid = self.lists.canonical(user, &mailbox.guid).to_vec();
        if !self.lists.aliases.contains_key(user) {
            return;
        }
        let told_of = change.mailbox.as_ref().map(|mailbox| mailbox.guid.clone());
        change.mailbox.iter_mut().for_each(canonical);
        if let Some(mailbox) = change.mailbox.as_mut().filter(|mailbox| Some(&mailbox.guid) != told_of.as_ref()) {
            // Who has made a mailbox that has become another one does not know which UIDVALIDITY that has.
            if change.ops.iter().any(|op| matches!(op.what, Some(What::Create(_)))) {
                mailbox.uid_validity = 0;
            }
        }
        for op in &mut change.ops {
            if let Some(What::Save(save)) = &mut op.what {
                save.copied_from.iter_mut().filter_map(|from| from.mailbox.as_mut()).for_each(canonical);
            }
        }
    }

    /// Whoever asks for a body may know the mailbox by the GUID that it had.
    pub fn canonical_request(&self, request: &mut BodyRequest) {
        if let Some(mailbox) = &mut request.mailbox {
            mailbox.guid = self.lists.canonical(&request.user, &mailbox.guid).to_vec();
        }
    }

    pub fn canonical_spans(&self, spans: &mut [Span]) {
        for span in spans.iter_mut().filter(|span| self.lists.aliases.contains_key(span.user.as_str())) {
            span.mailbox_guid = self.lists.canonical(&span.user, &span.mailbox_guid).to_vec();
        }
    }

    /// The mailbox has another GUID now; it is still the same one, or was put into the one that has it.
    pub fn note_alias(&mut self, user: &Arc<str>, mailbox: &[u8], is_now: &[u8]) -> Result<(), JournalError> {
        if mailbox == is_now || self.lists.canonical(user, mailbox) == is_now {
            return Ok(());
        }
        let was = self.journal.named_mailbox(user, mailbox)?;
        let now = self.journal.named_mailbox(user, is_now)?;
        if let Some(was) = was.filter(|was| now.is_some_and(|now| now.named < was.named)) {
            self.journal.set_path(user, is_now, &was.path, Some(&was.named))?;
        }
        self.lists.add_alias(user, mailbox, is_now);
        self.journal.note_alias(user, mailbox, is_now, self.outside.now_us())
    }

    /// What a worker found of two mailboxes of one name: the first is gone, if it was ever here.
    pub fn take_alias(&mut self, user: &Arc<str>, alias: &Alias) -> Result<(), JournalError> {
        let Alias { guid, is, index_id } = alias;
        if guid != is {
            self.note_alias(user, guid, is)?;
            self.forget_log(user, guid)?;
        }
        if *index_id != 0 {
            self.lists.note_gone_log(user, guid, *index_id);
            let mut released = Vec::new();
            self.order.forget_log(user, (guid, *index_id), &mut self.spans, &mut released);
            self.ship_all(released);
        }
        Ok(())
    }

    /// Looks at lists of mailboxes that two servers have changed at once, when that is over.
    pub fn look_at_lists(&mut self) {
        let now_ms = self.now_ms;
        let heals = &mut self.heals;
        self.lists.to_look_at.retain(|user, due_ms| {
            let is_due = *due_ms <= now_ms;
            if is_due {
                heals.want_list(user);
            }
            !is_due
        });
    }

    /// What is known of the logs of deleted mailboxes: one with the same GUID may come again, and has another log.
    pub fn forget_gone(&mut self) {
        let mut released = Vec::new();
        for (user, mailbox) in std::mem::take(&mut self.lists.gone) {
            self.order.forget_mailbox(&user, &mailbox, &mut self.spans, &mut released);
        }
        self.ship_all(released);
    }

    /// What is known of the mailbox's log is of another one.
    pub fn forget_log(&mut self, user: &Arc<str>, mailbox: &[u8]) -> Result<(), JournalError> {
        if self.journal.log(user, mailbox, "")?.is_none() {
            return Ok(());
        }
        self.journal.forget_mailbox(user, mailbox)?;
        let mut released = Vec::new();
        self.order.forget_mailbox(user, mailbox, &mut self.spans, &mut released);
        self.ship_all(released);
        Ok(())
    }

    /// Takes out of a peer's changes what later ones have decided. To be called before they are applied.
    pub fn reduce_list<'a>(
        &mut self,
        user: &Arc<str>,
        changes: impl Iterator<Item = &'a mut Change>,
    ) -> Result<(), JournalError> {
        for change in changes.filter(|change| change::is_of_list(change)) {
            let (Some(stamp), Some(mailbox)) = (&change.stamp, &change.mailbox) else { continue };
            self.lists.is_applied(user, self.now_ms);
            let mut rules = Vec::new();
            for op in &mut change.ops {
                match &mut op.what {
                    Some(What::Subscription(theirs)) => {
                        let known = self.journal.subscription(user, &mailbox.path)?;
                        let later = known.filter(|(_, at)| *at > named(stamp)).map(|(subscribed, _)| subscribed);
                        if let Some(ours) = later.filter(|ours| *ours != theirs.subscribed) {
                            theirs.subscribed = ours;
                            rules.push(Rule::LaterSubscription);
                        }
                    }
                    Some(What::Create(theirs)) => {
                        theirs.later_name = self.later_name(user, stamp, mailbox, &theirs.was)?.unwrap_or_default();
                    }
                    Some(What::Rename(theirs)) => rules.extend(self.reduce_rename(user, stamp, mailbox, theirs)?),
                    Some(What::Delete(theirs)) => {
                        let guid = self.lists.canonical(user, &mailbox.guid);
                        let known = self.journal.named_mailbox(user, guid)?;
                        theirs.keeps = known.is_some_and(|known| known.own_seq > self.heard_of_us(stamp));
                        theirs.known = self.journal.log(user, guid, "")?.map(look_at);
                        rules.extend(theirs.keeps.then_some(Rule::MailStays));
                    }
                    _ => {}
                }
            }
            rules.into_iter().for_each(|rule| self.counts.solved(user, &mailbox.path, rule));
        }
        Ok(())
    }

    /// The last of our changes that the origin of a change had applied.
    fn heard_of_us(&self, stamp: &Stamp) -> u64 {
        let is_us = |of: &&SeqOf| of.origin == self.me.server && of.epoch == self.me.epoch;
        stamp.vector.iter().find(is_us).map_or(0, |of| of.seq)
    }

    /// Of mailboxes that become one the later name holds.
    fn later_name(
        &self,
        user: &str,
        stamp: &Stamp,
        mailbox: &Mailbox,
        was: &[Vec<u8>],
    ) -> Result<Option<Vec<String>>, JournalError> {
        let known = self.journal.named_mailbox(user, self.lists.canonical(user, &mailbox.guid))?;
        let mut last = known.map_or(named(stamp), |known| known.named);
        let mut name = None;
        for was in was {
            let known = self.journal.named_mailbox(user, was)?;
            if let Some(known) = known.filter(|known| known.named > last && known.path != mailbox.path) {
                (last, name) = (known.named, Some(known.path));
            }
        }
        Ok(name)
    }

    fn reduce_rename(
        &self,
        user: &str,
        stamp: &Stamp,
        mailbox: &Mailbox,
        rename: &mut MailboxRename,
    ) -> Result<Option<Rule>, JournalError> {
        let theirs = named(stamp);
        let known = self.journal.named_mailbox(user, self.lists.canonical(user, &mailbox.guid))?;
        if let Some(ours) = known.as_ref().filter(|ours| ours.named > theirs) {
            // It stays, or goes back, where it was put later.
            let is_other = ours.path != rename.new_path;
            rename.new_path.clone_from(&ours.path);
            return Ok(is_other.then_some(Rule::LaterName));
        }
        let all = self.journal.named_mailboxes(user)?;
        let from = known.as_ref().map_or(&mailbox.path, |known| &known.path);
        let is_later = |child: &NamedMailbox| along(&child.named, false, &theirs) == Along::Back;
        let children = below(&all, from).map(|(child, _)| child).filter(|child| is_later(child));
        let back = |child: &NamedMailbox| Mailbox {
            guid: child.mailbox.clone(),
            path: child.path.clone(),
            ..Default::default()
        };
        rename.back = children.take(change::MAILBOXES_MAX).map(back).collect();
        Ok((!rename.back.is_empty()).then_some(Rule::NamedBack))
    }

    /// What a change of this server comes after, which its process made at this time (0: not known).
    pub fn vector_of(&self, user: &str, change: &Change, made_us: u64) -> Result<Vec<SeqOf>, JournalError> {
        let mut vector = self.vector(user)?;
        let is_delete = change.ops.iter().any(|op| matches!(op.what, Some(What::Delete(_))));
        if let Some(mailbox) = change.mailbox.as_ref().filter(|_| is_delete && made_us > 0) {
            // A time that is yet to come was taken before the clock was set back: nobody knows what came first.
            let deleted_us = if made_us > self.outside.now_us() { 0 } else { made_us };
            self.lists.unhear(user, &mailbox.guid, deleted_us, &mut vector);
        }
        Ok(vector)
    }

    /// Keeps what a change did to the list. To be called with each that is told, or applied.
    pub fn note_list(&mut self, user: &Arc<str>, change: &Change) -> Result<(), JournalError> {
        let (Some(stamp), Some(mailbox)) = (&change.stamp, &change.mailbox) else { return Ok(()) };
        let at = named(stamp);
        let is_ours = stamp.origin == self.me.server;
        let guid = self.lists.canonical(user, &mailbox.guid).to_vec();
        for op in &change.ops {
            match &op.what {
                Some(What::Subscription(subscription)) => {
                    let is_news = self.journal.subscription(user, &mailbox.path)?.is_none_or(|(_, known)| known < at);
                    if is_news {
                        self.journal.set_subscription(user, &mailbox.path, subscription.subscribed, &at)?;
                    }
                }
                Some(What::Rename(rename)) => {
                    self.note_rename(user, stamp, &Mailbox { guid: guid.clone(), ..mailbox.clone() }, rename)?
                }
                // A directory.
                _ if guid.is_empty() => {}
                Some(What::Create(create)) if is_ours && create.reborn => self.journal.forget_messages(user, &guid)?,
                // Says only how it is.
                Some(What::Create(create)) if create.again => {}
                Some(What::Create(_)) => match self.journal.named_mailbox(user, &guid)? {
                    None => self.journal.set_path(user, &guid, &mailbox.path, Some(&at))?,
                    // Of one that is known its creator says only how it is, not that it was named again. One who has found it,
                    // as it did not know what its killed worker did, takes its old name for a later one: ours is told again.
                    Some(known)
                        if !is_ours && guid == mailbox.guid && known.named < at && known.path != mailbox.path =>
                    {
                        let rename = MailboxRename { new_path: known.path, back: vec![] };
                        self.lists.to_tell.push((user.clone(), renamed(user, mailbox.clone(), rename)));
                    }
                    Some(_) => {}
                },
                Some(What::Delete(delete)) if !delete.keeps => {
                    self.journal.forget_mailbox(user, &guid)?;
                    self.lists.gone.push((user.clone(), guid.clone()));
                }
                _ => {}
            }
        }
        if is_ours && change::keeps_mailbox(change) && !guid.is_empty() {
            self.journal.note_own(user, &guid, stamp.seq)?;
        }
        let is_birth = |op: &Op| matches!(&op.what, Some(What::Create(create)) if !create.again && !create.had_mail);
        if is_ours && !guid.is_empty() && change.ops.iter().any(is_birth) {
            self.expect_message(user, &guid, stamp.seq);
        }
        if is_ours && change::is_of_list(change) && self.lists.may_race(user, self.now_ms) {
            // A peer's may have been applied behind it.
            self.lists.to_look_at.insert(user.clone(), self.now_ms + LOOK_MS);
        }
        Ok(())
    }

    fn note_rename(
        &mut self,
        user: &Arc<str>,
        stamp: &Stamp,
        mailbox: &Mailbox,
        rename: &MailboxRename,
    ) -> Result<(), JournalError> {
        let at = named(stamp);
        let is_ours = stamp.origin == self.me.server;
        let known = self.journal.named_mailbox(user, &mailbox.guid)?;
        if known.as_ref().is_some_and(|known| known.named > at) {
            return Ok(());
        }
        let all = self.journal.named_mailboxes(user)?;
        let from = known.as_ref().map_or(&mailbox.path, |known| &known.path);
        if !mailbox.guid.is_empty() {
            self.journal.set_path(user, &mailbox.guid, &rename.new_path, Some(&at))?;
        }
        let heard = self.heard_of_us(stamp);
        let mut tell = Vec::new();
        for (child, rest) in below(&all, from) {
            if rename.back.iter().any(|back| back.guid == child.mailbox) {
                continue;
            }
            let path = [&rename.new_path[..], rest].concat();
            self.journal.set_path(user, &child.mailbox, &path, None)?;
            // A directory has no GUID by which the later name could be found.
            let of_directory = is_ours && mailbox.guid.is_empty();
            // One that should have gone back was named while the worker did this.
            let is_unheard = !is_ours && along(&child.named, child.own_seq > heard, &at) != Along::Moves;
            if of_directory || is_unheard {
                let from = Mailbox { guid: child.mailbox.clone(), path: child.path.clone(), ..Default::default() };
                tell.push((from, path));
            }
        }
        for (from, new_path) in tell {
            let rename = MailboxRename { new_path, back: vec![] };
            self.lists.to_tell.push((user.clone(), renamed(user, from, rename)));
        }
        Ok(())
    }

    /// What [`Engine::note_list`] found out: not in the middle of what it was called for.
    pub fn tell_of_list(&mut self) {
        for (user, change) in std::mem::take(&mut self.lists.to_tell) {
            self.ship_all(vec![Release { user, change: Some(change), spans: vec![], ack: None }]);
        }
    }
}

fn renamed(user: &str, mailbox: Mailbox, rename: MailboxRename) -> Change {
    let ops = vec![Op { what: Some(What::Rename(rename)) }];
    Change { user: user.to_owned(), mailbox: Some(mailbox), ops, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::proto::{MailboxDelete, MailboxRename, Save};

    fn change(mailbox: u8, what: What, made_us: u64) -> Change {
        Change {
            user: "jane".into(),
            mailbox: Some(Mailbox { guid: vec![mailbox; 16], ..Default::default() }),
            ops: vec![Op { what: Some(what) }],
            stamp: Some(Stamp { clock: made_us, ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn a_log_that_went_with_its_mailbox_is_known_to_be_gone() {
        let jane: Arc<str> = "jane".into();
        let mut lists = Lists::default();
        let span = |mailbox, index_id| Span {
            user: "jane".into(),
            mailbox_guid: vec![mailbox; 16],
            index_id,
            ..Default::default()
        };
        lists.note_gone_log(&jane, &[1; 16], 7);
        assert!(lists.is_log_gone(&span(1, 7)));
        assert!(!lists.is_log_gone(&span(1, 8)), "that of the mailbox which has the GUID now");
        assert!(!lists.is_log_gone(&span(2, 7)) && !lists.is_log_gone(&Span { user: "joe".into(), ..span(1, 7) }));
        for index_id in 0..1_000 {
            lists.note_gone_log(&jane, &[1; 16], index_id);
        }
        assert_eq!(lists.gone_logs[&jane].len(), KEPT_MAX);
    }

    #[test]
    fn a_save_that_is_told_after_its_mailbox_was_deleted_has_gone_with_it() {
        let jane: Arc<str> = "jane".into();
        let mut lists = Lists::default();
        let save = |mailbox, made_us| change(mailbox, What::Save(Save::default()), made_us);
        assert!(!lists.has_gone_with_mailbox("jane", &save(1, 5)));
        let deleted = change(1, What::Delete(MailboxDelete::default()), 7);
        lists.note_deleted(&jane, &deleted, 7);
        assert!(lists.has_gone_with_mailbox("jane", &save(1, 5)));
        assert!(!lists.has_gone_with_mailbox("jane", &save(1, 8)), "a peer has brought it back");
        assert!(!lists.has_gone_with_mailbox("jane", &save(1, 0)), "it was found in the mailbox");
        assert!(!lists.has_gone_with_mailbox("jane", &save(2, 5)));
        let renamed = |made_us| change(1, What::Rename(MailboxRename::default()), made_us);
        assert!(lists.has_gone_with_mailbox("jane", &renamed(5)) && !lists.has_gone_with_mailbox("jane", &renamed(8)));
        assert!(lists.has_gone_with_mailbox("jane", &deleted), "a worker has told of it");
        for n in 0..1_000 {
            lists.note_deleted(&jane, &deleted, n);
        }
        assert_eq!(lists.deleted[&jane].len(), KEPT_MAX);
    }
}
