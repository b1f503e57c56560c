//! Looks at mailboxes: which user's turn it is, what a worker found.

use std::sync::Arc;

use prost::Message;

use super::engine::{Close, Engine};
use super::heal::Look;
use super::order::{Release, HOLD_MS_MAX};
use super::spans::Need;
use super::unheard::Unheard;
use super::workers::{Task, Worker};
use crate::change;
use crate::journal::{Failed, JournalError, KnownLog};
use crate::wire::proto::frame::Kind;
use crate::wire::proto::op::What;
use crate::wire::proto::{self, Change, Doubt, Frame, LookAt, Looked, MessageRange, Span};

/// Encoded mailboxes in one frame of a look.
const LOOK_BYTES_MAX: usize = 48_000;
/// How long the name of a new mailbox is waited for (the first record of its log is held for a second), and for how many.
const NAME_MS: u64 = 2 * HOLD_MS_MAX;
const UNNAMED_MAX: usize = 100_000;
/// Users that one look into the journal brings.
const SWEEP_USERS: usize = 100;

/// What a worker is looking at.
pub struct LookJob {
    id: u64,
    pub user: Arc<str>,
    whole: bool,
    subscriptions: bool,
    owner: bool,
}

impl Engine {
    /// Gives looks to idle workers, but never to all of them, so that changes of the peers go on.
    pub fn dispatch_looks(&mut self) {
        let most = self.config.workers - 1 - usize::from(matches!(self.unheard, Unheard::Asking(..)));
        while self.heals.running() < most {
            let Some(index) = self.workers.iter().position(Worker::may_work) else { return };
            self.sweep();
            self.sweep_unheard();
            let (work, redos, questions) = (&self.work, &self.redos, &self.questions);
            let is_busy = |user: &str| work.is_busy(user) || redos.is_running(user) || questions.is_telling(user);
            let may_retry = self.may_retry();
            let Some((user, look)) = self.heals.next(self.now_ms, may_retry, is_busy) else {
                return self.ask_for_users();
            };
            if let Err(error) = self.begin_look(index, user, &look) {
                return self.fail(error);
            }
        }
    }

    /// After the start every user is looked at, a few at a time, when nothing else is to be looked at.
    fn sweep(&mut self) {
        let Some(after) = self.swept.clone().filter(|_| self.heals.is_idle()) else { return };
        match self.journal.users(&after, SWEEP_USERS) {
            Ok(users) => {
                users.iter().for_each(|user| self.heals.want_all(&user.as_str().into()));
                self.swept = users.last().cloned();
            }
            Err(error) => return self.fail(error),
        }
        if self.swept.is_none() && std::mem::take(&mut self.is_after_boot) {
            if let Err(error) = self.journal.is_looked_at() {
                self.fail(error);
            }
        }
    }

    /// Something was written to a mailbox whose name is not known: mostly its creation is told in the next breath.
    pub fn expect_name(&mut self, user: &str, mailbox: &[u8]) {
        if self.unnamed.len() < UNNAMED_MAX {
            self.unnamed.push_back((self.now_ms + NAME_MS, user.into(), mailbox.to_vec()));
        }
    }

    /// A mailbox was made here, which this change says. As long as it has no messages, another process may give it another UIDVALIDITY,
    /// or GUID, than was told: a maildir has them in its dovecot-uidlist, which was not written if its maker was killed, or the disk
    /// full. Then there may never be a message that would bring them to the peers.
    pub fn expect_message(&mut self, user: &Arc<str>, mailbox: &[u8], seq: u64) {
        if self.newborn.len() < UNNAMED_MAX {
            self.newborn.push_back((self.now_ms + NAME_MS, user.clone(), mailbox.to_vec(), seq));
        }
    }

    /// Looks at mailboxes that were made a moment ago, and are as empty as they were.
    pub fn look_at_newborn(&mut self) {
        while self.newborn.front().is_some_and(|(due_ms, ..)| *due_ms <= self.now_ms) {
            let Some((_, user, mailbox, seq)) = self.newborn.pop_front() else { return };
            match self.journal.named_mailbox(&user, &mailbox) {
                Ok(Some(named)) if named.own_seq <= seq => self.heals.want(&user, &mailbox, None),
                Ok(_) => {}
                Err(error) => self.fail(error),
            }
        }
    }

    /// Looks for mailboxes that have come into being and nobody told of: Dovecot may say that a CREATE failed when another
    /// process has just come upon the new mailbox. And for those that have the name of another one: its index was made anew.
    pub fn look_for_names(&mut self) {
        while self.unnamed.front().is_some_and(|(due_ms, ..)| *due_ms <= self.now_ms) {
            let Some((_, user, mailbox)) = self.unnamed.pop_front() else { return };
            match self.is_known_by_name(&user, &mailbox) {
                Ok(true) => {}
                Ok(false) => self.heals.want_mailboxes(&user),
                Err(error) => self.fail(error),
            }
        }
    }

    /// Whether the journal knows its name, and no other mailbox of that name.
    fn is_known_by_name(&self, user: &str, mailbox: &[u8]) -> Result<bool, JournalError> {
        let Some(log) = self.journal.log(user, mailbox, "")? else { return Ok(true) };
        let is_another = |other: &KnownLog| other.mailbox != log.mailbox && !other.mailbox.is_empty();
        let is_taken = self.journal.logs(user)?.iter().any(|other| is_another(other) && other.path == log.path);
        Ok(!log.path.is_empty() && !is_taken)
    }

    fn begin_look(&mut self, index: usize, user: Arc<str>, look: &Look) -> Result<(), JournalError> {
        let mut since = 0;
        let mut mailboxes = Vec::new();
        // Of another index, the one that is there is made anew.
        let known_as = |log: KnownLog| -> Result<LookAt, JournalError> {
            let index_id = if look.anew.contains(&log.mailbox) { u32::MAX } else { log.index_id };
            // Where its log is read from the beginning, it may yet hold what was told.
            let named = if log.log_seq == 0 { self.journal.named_mailbox(&user, &log.mailbox)? } else { None };
            let was_told = self.is_after_boot || log.was_told || named.is_some_and(|mailbox| mailbox.own_seq != 0);
            let expunged = look.expunged.get(&log.mailbox).cloned().unwrap_or_default();
            let (expunged_in_memory, in_memory_uid_next) = (expunged.messages, expunged.uid_next);
            Ok(LookAt { index_id, was_told, expunged_in_memory, in_memory_uid_next, ..look_at(log) })
        };
        if look.whole {
            for log in self.journal.logs(&user)? {
                match (log.mailbox.is_empty(), log.private_user.is_empty()) {
                    (true, _) => since = log.end as i64,
                    (false, true) => mailboxes.push(known_as(log)?),
                    (false, false) => {}
                }
            }
        } else {
            for (guid, until) in &look.mailboxes {
                let known = self.journal.log(&user, guid, "")?;
                let known = known.unwrap_or(KnownLog { mailbox: guid.clone(), ..Default::default() });
                let (until_seq, until) = until.unwrap_or_default();
                mailboxes.push(LookAt { until_seq, until, ..known_as(known)? });
            }
        }
        if look.subscriptions {
            let subscribed = self.journal.subscribed(&user)?.into_iter();
            mailboxes.extend(subscribed.map(|path| LookAt { path, subscribed: true, ..Default::default() }));
        } else {
            since = i64::MAX;
        }
        self.last_job += 1;
        let job = LookJob {
            id: self.last_job,
            user: user.clone(),
            whole: look.whole,
            subscriptions: look.subscriptions,
            owner: look.owner,
        };
        let list_only = look.whole && !look.logs && look.mailboxes.is_empty();
        let brief = self.begin_briefly(index);
        let first = proto::Look {
            since,
            list_only,
            written_since: look.written_since,
            owner: look.owner,
            brief,
            inline_bytes: self.inline_bytes_of_look(),
            ..Default::default()
        };
        let frames = look_frames(&job, mailboxes, &first);
        self.order.look_begins(&job.user);
        self.workers[index].task = Task::Look(job);
        let Some(token) = self.workers[index].token else { return Ok(()) };
        for frame in frames {
            self.send(token, &frame);
        }
        Ok(())
    }

    pub fn worker_looked(&mut self, index: usize, looked: Looked) -> Result<(), Close> {
        if matches!(self.workers[index].task, Task::Ask) {
            return self.worker_asked(index, looked);
        }
        if matches!(self.workers[index].task, Task::Answer(_)) {
            return self.worker_told(index, looked);
        }
        let Task::Look(job) = &self.workers[index].task else {
            return Err(Close::Malformed(format!("it looked for job {}, which it was not given", looked.job)));
        };
        let (user, whole, subscriptions, owner) = (job.user.clone(), job.whole, job.subscriptions, job.owner);
        if looked.job != job.id {
            return Err(Close::Malformed(format!("it looked for job {}, but has job {}", looked.job, job.id)));
        }
        if looked.more {
            return self.take_looked(index, &user, whole, looked);
        }
        self.workers[index].task = Task::Idle;
        let outcome = if looked.error.is_empty() { Ok(()) } else { Err(change::printable(&looked.error)) };
        if outcome.is_ok() {
            self.poison.note_job();
        }
        // None of him, if nothing was looked at.
        if outcome.is_ok() && subscriptions && looked.looked_at != 0 {
            let looked_at = KnownLog { user: user.to_string(), end: looked.looked_at as u64, ..Default::default() };
            if let Err(error) = self.journal.set_log(&looked_at) {
                self.fail(error);
            }
        }
        if outcome.is_ok() && owner {
            self.owner_asked(&user);
        }
        self.look_ended(&user, outcome);
        Ok(())
    }

    pub fn look_ended(&mut self, user: &Arc<str>, outcome: Result<(), String>) {
        let mut released = Vec::new();
        self.order.look_ends(user, self.now_ms, &self.spans, &mut released);
        self.ship_all(released);
        let error = outcome.clone().err().unwrap_or_default();
        if let Some(pause_ms) = self.heals.finish(user, outcome, self.now_ms) {
            log::warn!(
                "User {user}: the mailboxes could not be looked at for changes that nobody told of: {error} - trying again \
                 in {pause_ms} msecs."
            );
        }
    }

    fn take_looked(&mut self, index: usize, user: &Arc<str>, whole: bool, looked: Looked) -> Result<(), Close> {
        let malformed = |error: change::ChangeError| Close::Malformed(error.to_string());
        let (change, bad) = match looked.change.map(|change| (change::check_change(&change), change)) {
            Some((Ok(()), change)) => (Some(change), None),
            Some((Err(error), change)) => (None, Some((change.mailbox.unwrap_or_default(), error))),
            None => (None, None),
        };
        if let Some((mailbox, error)) = bad {
            let reason = format!("what its log says cannot be told to the peers: {error}");
            self.take_doubt(user, Doubt { guid: mailbox.guid, path: mailbox.path, reason, ..Default::default() });
        }
        self.take_userdb(user, looked.peers);
        let change = change.filter(|change| !self.is_known_of_list(change));
        if let Some(mut found) = change {
            self.torn
                .take_from(user, &mut found, |a, b| self.lists.canonical(user, a) == self.lists.canonical(user, b));
            if let Err(error) = self.take_known_messages(user, &mut found) {
                self.fail(error);
            }
            if found.ops.is_empty() {
                // Its UIDs are not free.
                found.ops.push(proto::Op { what: Some(change::nothing()) });
            }
            self.leave_out_expunged(user, &mut found);
            if found.ops.iter().any(|op| matches!(&op.what, Some(What::Rebuilt(rebuilt)) if rebuilt.uid_next > 1)) {
                let mailbox = found.mailbox.as_ref().map(|mailbox| &mailbox.guid[..]).unwrap_or_default();
                self.heals.note_rebuilt(user, mailbox, self.now_ms);
            }
            self.counts.counters.healed += 1;
            // Who made it may have been killed, and another process's record of the same may come late.
            if let (true, Some(mailbox)) = (change::is_of_list(&found), &found.mailbox) {
                self.subscribers.changed(user, &mailbox.path, usize::MAX, self.now_ms);
            }
            let mailbox = found.mailbox.as_ref().map(|mailbox| self.lists.canonical(user, &mailbox.guid));
            if let Some(Err(error)) = mailbox.map(|mailbox| self.journal.note_told(user, mailbox)) {
                self.fail(error);
            }
            self.ship_all(vec![Release { user: user.clone(), change: Some(found), spans: Vec::new(), ack: None }]);
        }
        if let Some(known) = looked.known {
            let known = Span { user: user.to_string(), ..known };
            change::check_spans(std::slice::from_ref(&known)).map_err(malformed)?;
            self.take_known(user, known, &looked.path);
        }
        change::check_spans(&looked.spans).map_err(malformed)?;
        self.take_own_spans(index, looked.spans);
        if let Some(doubt) = looked.doubt {
            self.take_doubt(user, doubt);
        }
        if !looked.missing.is_empty() {
            self.take_missing(user, whole, &looked.missing);
        }
        Ok(())
    }

    /// What a client expunged in memory since the look began was not lost with the index: the next look tells of it.
    fn leave_out_expunged(&self, user: &Arc<str>, found: &mut Change) {
        let mailbox = found.mailbox.as_ref().map(|mailbox| &mailbox.guid[..]).unwrap_or_default();
        for op in &mut found.ops {
            let Some(What::Rebuilt(rebuilt)) = &mut op.what else { continue };
            let uids = self.heals.still_expunged(user, mailbox).into_iter();
            rebuilt.present.extend(uids.map(|uid| MessageRange {
                first_uid: uid,
                last_uid: uid,
                ..Default::default()
            }));
        }
    }

    /// Takes out of what was found the messages of peers that are known to stand there: a killed worker had saved them, and its
    /// successor has said where they are.
    fn take_known_messages(&self, user: &Arc<str>, found: &mut Change) -> Result<(), JournalError> {
        if !self.users_elsewhere.contains(user) {
            return Ok(());
        }
        let Some(mailbox) = found.mailbox.as_ref().map(|mailbox| self.lists.canonical(user, &mailbox.guid)) else {
            return Ok(());
        };
        let mut known = Vec::new();
        for op in &found.ops {
            let Some(What::Save(save)) = &op.what else { continue };
            for peer in self.peers.iter().map(|peer| &peer.name).chain(&self.far) {
                let stands = self.journal.elsewhere_of(user, peer, mailbox, &save.guid)?;
                known.extend(stands.into_iter().map(|one| (one.guid, one.here)));
            }
        }
        found.ops.retain(|op| match &op.what {
            Some(What::Save(save)) => {
                let uid = save.birth.as_ref().map_or(0, |birth| birth.uid);
                save.found || !known.iter().any(|(guid, here)| *guid == save.guid && *here == uid)
            }
            _ => true,
        });
        Ok(())
    }

    /// An expunge is told of a mailbox whose index was made anew meanwhile, with the message or without it: what is there is told
    /// once more, behind the expunge.
    pub fn look_again_if_anew(&mut self, user: &Arc<str>, change: &Change) {
        let is_expunge = change.ops.iter().any(|op| matches!(op.what, Some(What::Expunge(_))));
        let Some(mailbox) = change.mailbox.as_ref().filter(|_| is_expunge) else { return };
        if !self.heals.is_anew(user, &mailbox.guid, self.now_ms) {
            return;
        }
        self.heals.want_anew(user, &mailbox.guid);
    }

    /// Whether what was found in the list of mailboxes is no news: it was told, or a worker that was killed did it for a
    /// peer. The list does not say who did it.
    fn is_known_of_list(&mut self, change: &proto::Change) -> bool {
        if !change::is_of_list(change) {
            return false;
        }
        match self.try_is_known_of_list(change) {
            Ok(is_known) => is_known,
            Err(error) => {
                self.fail(error);
                false
            }
        }
    }

    fn try_is_known_of_list(&mut self, change: &proto::Change) -> Result<bool, JournalError> {
        let coming = self.journal.coming(&change.user)?;
        let mut coming = coming.iter().filter_map(|bytes| Change::decode(&bytes[..]).ok());
        if let Some(coming) = coming.find(|coming| brings(coming, change)) {
            // What moved along with another mailbox may have to go back.
            if coming.mailbox.as_ref().map(|mailbox| &mailbox.guid) == change.mailbox.as_ref().map(|found| &found.guid)
            {
                let user = change.user.as_str().into();
                self.note_list(&user, &Change { stamp: coming.stamp, ..change.clone() })?;
                self.tell_of_list();
            }
            return Ok(true);
        }
        let [proto::Op { what: Some(What::Subscription(subscription)) }] = &change.ops[..] else { return Ok(false) };
        let path = change.mailbox.as_ref().map(|mailbox| mailbox.path.as_slice()).unwrap_or_default();
        let known = self.journal.subscription(&change.user, path)?;
        Ok(known.is_some_and(|(subscribed, _)| subscribed == subscription.subscribed))
    }

    /// A log was read up to there; what waited for it goes on.
    fn take_known(&mut self, user: &Arc<str>, known: Span, path: &[String]) {
        let need = Need::of(&known);
        self.recall_healed(&known, &need);
        match self.is_set_back(&known) {
            Ok(true) => self.spans.recall(&need, (known.log_seq, known.end), None),
            Ok(false) => {}
            Err(error) => self.fail(error),
        }
        self.spans.heal(&need, (known.prev_log_seq, known.prev_log_end), (known.log_seq, known.end));
        match self.order.drop_healed(user, &self.spans) {
            0 => {}
            told => self.counts.note("told_late", told),
        }
        let was_read = (known.prev_log_seq, known.prev_log_end) != (known.log_seq, known.end);
        let known = KnownLog { path: path.to_vec(), ..self.known_log(&known) };
        // What was told since it was read stays known; a log that was set back itself is known from its end on.
        let outcome = if was_read { self.journal.advance_log(&known) } else { self.journal.set_log(&known) };
        if let Err(error) = outcome {
            self.fail(error);
        }
        let mut released = Vec::new();
        self.order.look_again(user, &self.spans, &mut released);
        self.ship_all(released);
    }

    /// Whether the log ends before the place up to which it was known, and nothing of it was read.
    fn is_set_back(&self, known: &Span) -> Result<bool, JournalError> {
        if (known.prev_log_seq, known.prev_log_end) != (known.log_seq, known.end) {
            return Ok(false);
        }
        let before = self.journal.log(&known.user, &known.mailbox_guid, &known.private_user)?;
        Ok(before.is_some_and(|before| {
            before.index_id == known.index_id && (before.log_seq, before.end) > (known.log_seq, known.end)
        }))
    }

    /// What was read from the log before the last start, too, is not told a second time.
    fn recall_healed(&mut self, known: &Span, need: &Need) {
        if self.spans.knows(need) {
            return;
        }
        match self.journal.log(&known.user, &known.mailbox_guid, &known.private_user) {
            Ok(Some(log)) if log.index_id == known.index_id => {
                self.spans.recall(need, (log.log_seq, log.end), log.healed);
            }
            Ok(_) => {}
            Err(error) => self.fail(error),
        }
    }

    pub fn take_doubt(&mut self, user: &Arc<str>, doubt: Doubt) {
        let reason = change::printable(&doubt.reason);
        let path = change::printable(&doubt.path.join("/"));
        // A person is to know of what is wrong, and a whole server's mailboxes would fill the list.
        let mailbox = if doubt.expected {
            log::info!("User {user}: mailbox {path}: {reason}; it is compared with the peers.");
            Vec::new()
        } else {
            log::error!(
                "User {user}: mailbox {path}: {reason}; it must be compared with the peers (doveadm dovetail failed)."
            );
            doubt.guid
        };
        let failed = Failed {
            user: user.to_string(),
            mailbox,
            at_us: self.outside.now_us(),
            error: format!("mailbox {path}: {reason}"),
            ..Default::default()
        };
        self.remember_failed(&failed);
    }

    pub fn remember_failed(&mut self, failed: &Failed) {
        let compared_us = self.comparisons.running_since_us(&failed.user);
        match self.journal.fail(failed, compared_us) {
            Ok(is_new) => self.counts.counters.failed += u64::from(is_new),
            Err(error) => self.fail(error),
        }
    }

    fn take_missing(&mut self, user: &Arc<str>, whole: bool, guid: &[u8]) {
        if !whole {
            return self.heals.want_all(user);
        }
        if let Err(error) = self.journal.forget_mailbox(user, guid) {
            self.fail(error);
        }
        let mut released = Vec::new();
        self.order.forget_mailbox(user, guid, &mut self.spans, &mut released);
        self.ship_all(released);
    }
}

/// Whether applying a change to the list of mailboxes brings what was found there.
fn brings(applied: &Change, found: &Change) -> bool {
    let (Some(at), Some(there)) = (&applied.mailbox, &found.mailbox) else { return false };
    let pairs = applied.ops.iter().flat_map(|applied| found.ops.iter().map(|found| (&applied.what, &found.what)));
    let mut pairs = pairs.filter_map(|(applied, found)| applied.as_ref().zip(found.as_ref()));
    pairs.any(|pair| match pair {
        // It may not have had its GUID yet, or has the later name of one that it became.
        (What::Create(_), What::Create(_)) => at.path == there.path || (!at.guid.is_empty() && at.guid == there.guid),
        (What::Delete(applied), What::Delete(_)) => at.guid == there.guid && !applied.keeps,
        // Its messages were put into the one that had the name.
        (What::Rename(_), What::Delete(_)) => at.guid == there.guid,
        (What::Subscription(applied), What::Subscription(found)) => {
            at.path == there.path && applied.subscribed == found.subscribed
        }
        // What is below the mailbox is found renamed by itself.
        (What::Rename(applied), What::Rename(found)) => {
            let below = there.path.strip_prefix(&at.path[..]);
            below.is_some() && below == found.new_path.strip_prefix(&applied.new_path[..])
        }
        _ => false,
    })
}

pub fn look_at(log: KnownLog) -> LookAt {
    LookAt {
        guid: log.mailbox,
        path: log.path,
        index_id: log.index_id,
        log_seq: log.log_seq,
        end: log.end,
        tail: log.tail,
        ..Default::default()
    }
}

/// The look as frames, none too long.
fn look_frames(job: &LookJob, mailboxes: Vec<LookAt>, look: &proto::Look) -> Vec<Frame> {
    let empty = || proto::Look { job: job.id, user: job.user.to_string(), whole: job.whole, ..look.clone() };
    let mut frames = vec![empty()];
    let mut bytes = 0;
    for mailbox in mailboxes {
        bytes += mailbox.encoded_len() + 8;
        if bytes > LOOK_BYTES_MAX {
            frames.push(empty());
            bytes = mailbox.encoded_len() + 8;
        }
        if let Some(last) = frames.last_mut() {
            last.mailboxes.push(mailbox);
        }
    }
    let last = frames.len() - 1;
    frames[..last].iter_mut().for_each(|frame| frame.more = true);
    frames.into_iter().map(|frame| Kind::Look(frame).into()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::proto::{Mailbox, MailboxCreate, MailboxDelete, MailboxRename, Op};

    fn path(name: &str) -> Vec<String> {
        name.split('/').map(str::to_owned).collect()
    }

    fn change(guid: &[u8], name: &str, what: What) -> Change {
        let mailbox = Some(Mailbox { guid: guid.to_vec(), path: path(name), ..Default::default() });
        Change { mailbox, ops: vec![Op { what: Some(what) }], ..Default::default() }
    }

    fn rename(guid: &[u8], from: &str, to: &str) -> Change {
        change(guid, from, What::Rename(MailboxRename { new_path: path(to), back: vec![] }))
    }

    #[test]
    fn what_a_killed_job_did_to_the_list_is_no_news() {
        let create = |guid, name| change(guid, name, What::Create(MailboxCreate::default()));
        let delete = |guid, name| change(guid, name, What::Delete(MailboxDelete::default()));
        assert!(brings(&create(b"one", "x"), &create(b"one", "xr")), "it became one with another, named later");
        assert!(brings(&create(b"one", "x"), &create(b"other", "x")), "its GUID was not given yet");
        assert!(!brings(&create(b"one", "x"), &create(b"other", "xr")));
        let renamed = rename(b"one", "x", "xr");
        assert!(brings(&renamed, &renamed) && brings(&renamed, &rename(b"child", "x/of/it", "xr/of/it")));
        assert!(!brings(&renamed, &rename(b"one", "x", "z")), "a client has named it again");
        assert!(!brings(&renamed, &rename(b"child", "x/of/it", "xr/of")));
        assert!(brings(&renamed, &delete(b"one", "x")), "its messages were put into the one that had the name");
        assert!(!brings(&renamed, &delete(b"two", "x")));
    }
}
