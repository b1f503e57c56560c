//! Connections of local processes: what they did becomes changes for the peers; doveadm asks for the status.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use mio::Token;

use super::engine::{Close, Engine, Role, Socket};
use super::heal::Expunged;
use super::order::{Arrival, Hole, Release};
use super::owners::{May, Sender};
use super::spans::Need;
use crate::change::{self, ChangeError, GUID_BYTES};
use crate::journal::{JournalError, KnownLog};
use crate::wire::proto::{
    frame::Kind, op::What, Change, ClearFailed, Doubt, FailedCleared, FailedEntry, FailedList, Frame, Intent, Mailbox,
    Record, Span, WaitingList,
};

/// Answers that may wait for a process; while more do, nothing is read from it.
pub const OUT_BYTES_MAX: usize = 1 << 20;

/// Of what failed, and of who waits, so much is listed.
const FAILED_MAX: usize = 10_000;
const WAITING_MAX: usize = 10_000;
/// Users of whom one record tells; a process has one at a time, and may be writing to the mailbox of another.
const RECORD_USERS_MAX: usize = 4;
/// Mailboxes of one user that one process is about to write to; with more, all of them count.
const INTENTS_PER_USER_MAX: usize = 100;

/// Mailboxes by user and GUID; an empty GUID stands for all.
pub type Intents = HashMap<Arc<str>, HashSet<Vec<u8>>>;

/// One local process.
#[derive(Default)]
pub struct Local {
    /// Who connected, if it is nobody whom the relay trusts.
    pub uid: Option<u32>,
    /// The kernel says so with the first bytes.
    pub sender: Option<Sender>,
    /// A frame that is to be taken as soon as it is known whose mail it tells of.
    pub held: Option<Box<Frame>>,
    /// Users of whom that one tells, and whom there is not: they may be there the next time.
    pub absent: Vec<Arc<str>>,
    pub is_attached: bool,
    process: String,
    pid: u32,
    /// What it was about to write to, and has not said goodbye since.
    intents: Intents,
    /// A change of its was bad; said once.
    has_bad_change: bool,
    /// It told of another's mail; said once.
    has_told_of_others: bool,
}

impl Local {
    pub fn new(uid: Option<u32>) -> Local {
        let sender = uid.is_none().then_some(Sender::Trusted);
        Local { uid, sender, ..Local::default() }
    }

    fn intend(&mut self, user: &str, mailbox: Vec<u8>) {
        let mailboxes = self.intents.entry(user.into()).or_default();
        // Without a GUID, all of the user's mailboxes.
        let is_one = mailbox.len() == GUID_BYTES && mailboxes.len() < INTENTS_PER_USER_MAX;
        mailboxes.insert(if is_one { mailbox } else { Vec::new() });
    }

    /// Mailboxes that it may be writing to: of users, by GUID; an empty one stands for all.
    pub fn intents(&self) -> &Intents {
        &self.intents
    }

    fn name(&self) -> String {
        match self.is_attached {
            true => format!("{}({})", self.process.escape_debug(), self.pid),
            false => "unknown".into(),
        }
    }
}

impl Engine {
    pub fn local_frame(&mut self, token: Token, frame: Frame) -> Result<(), Close> {
        let Some(kind) = frame.kind else { return Ok(()) };
        let is_question = matches!(
            kind,
            Kind::StatusRequest(_)
                | Kind::FailedRequest(_)
                | Kind::WaitingRequest(_)
                | Kind::ClearFailed(_)
                | Kind::CompareRequest(_)
                | Kind::ProgressRequest(_)
                | Kind::WaitRequest(_)
                | Kind::RemovePeer(_)
                | Kind::AcceptPeer(_)
        );
        let Some(Socket { role: Role::Local(local), .. }) = self.sockets.get_mut(&token) else { return Ok(()) };
        if is_question && local.sender != Some(Sender::Trusted) {
            return Err(Close::Malformed("it asks what only root and the relay's own user may know".into()));
        }
        if let Kind::StatusRequest(request) = kind {
            return self.answer_status(token, &request.user);
        }
        if let Kind::FailedRequest(_) = kind {
            return self.answer_failed(token);
        }
        if let Kind::WaitingRequest(_) = kind {
            return self.answer_waiting(token);
        }
        if let Kind::CompareRequest(request) = kind {
            self.compare(token, &request);
            return Ok(());
        }
        if let Kind::ProgressRequest(_) = kind {
            let progress = self.progress();
            self.send(token, &Kind::Progress(progress).into());
            return Ok(());
        }
        if let Kind::WaitRequest(request) = kind {
            return self.open_gate(token, &request);
        }
        if let Kind::RemovePeer(request) = kind {
            self.remove_peer(token, &request.peer);
            return Ok(());
        }
        if let Kind::AcceptPeer(request) = kind {
            self.accept_peer(token, &request);
            return Ok(());
        }
        if let Kind::ClearFailed(clear) = kind {
            return self.clear_failed(token, &clear);
        }
        let Some(Role::Local(local)) = self.sockets.get_mut(&token).map(|socket| &mut socket.role) else {
            return Ok(());
        };
        match kind {
            Kind::Attach(attach) if !local.is_attached => {
                local.is_attached = true;
                local.process = attach.process.chars().take(64).collect();
                local.pid = attach.pid;
            }
            _ if !local.is_attached => {
                return Err(Close::Malformed("its first frame does not say which process it is".into()))
            }
            Kind::Intent(intent) => {
                change::check_user(&intent.user).map_err(|error| Close::Malformed(error.to_string()))?;
                self.take_intent(token, intent);
            }
            Kind::Goodbye(goodbye) => {
                self.take_dropped(token, goodbye.dropped);
                if let Some(Role::Local(local)) = self.sockets.get_mut(&token).map(|socket| &mut socket.role) {
                    local.intents.clear();
                }
            }
            Kind::Record(record) => {
                let malformed = |error: ChangeError| Close::Malformed(error.to_string());
                change::check_spans(&record.spans).map_err(malformed)?;
                record.expunged_in_memory.iter().try_for_each(change::check_change).map_err(malformed)?;
                if let Some(record) = self.check_sender(token, record)? {
                    self.take_record(token, record);
                }
            }
            _ => return Err(Close::Malformed("it sent a frame that a local process may not send".into())),
        }
        Ok(())
    }

    pub fn local_closed(&mut self, local: Local, why: &Close) {
        match why {
            // It is us who ended it.
            Close::Ended(_) if self.is_stopping() => return,
            Close::Malformed(reason) => {
                let line = || format!("Local process {}: {reason} - closing its connection.", local.name());
                if let Some(line) = self.floods.locals.take(line, self.now_ms) {
                    log::error!("{line}");
                }
            }
            _ => {}
        }
        if local.intents.is_empty() {
            return;
        }
        self.counts.counters.unclean_ends += 1;
        let line = || {
            format!(
                "Local process {} ended without a goodbye after it was about to write: {}. Its mailboxes are looked at.",
                local.name(),
                why.reason()
            )
        };
        if let Some(line) = self.floods.unclean_ends.take(line, self.now_ms) {
            log::info!("{line}");
        }
        self.look_into_intents(&local.intents);
    }

    /// The process had no room for so much of what it did.
    fn take_dropped(&mut self, token: Token, count: u64) {
        if count == 0 {
            return;
        }
        let counted = &mut self.counts.counters.dropped_by_processes;
        *counted = counted.saturating_add(count);
        let Some(Role::Local(local)) = self.sockets.get(&token).map(|socket| &socket.role) else {
            return;
        };
        let intents = local.intents.clone();
        self.look_into_intents(&intents);
    }

    fn take_expunged_in_memory(&mut self, expunged: Change) {
        let user = expunged.user.as_str().into();
        let Mailbox { guid, uid_next, .. } = expunged.mailbox.unwrap_or_default();
        let messages = expunged.ops.into_iter().filter_map(|op| match op.what {
            Some(What::Expunge(expunge)) => Some(expunge.messages),
            _ => None,
        });
        let expunged = Expunged { messages: messages.flatten().collect(), uid_next };
        self.heals.want_expunged(&user, &guid, expunged);
    }

    pub fn look_into_intents(&mut self, intents: &Intents) {
        for (user, mailboxes) in intents {
            match mailboxes.contains(&Vec::new()) {
                true => self.heals.want_all(user),
                false => mailboxes.iter().for_each(|guid| self.heals.want(user, guid, None)),
            }
        }
    }

    fn answer_status(&mut self, token: Token, user: &str) -> Result<(), Close> {
        let status = match user {
            "" => self.status(),
            user => match self.status_of(user) {
                Ok(status) => status,
                Err(error) => {
                    self.fail(error);
                    return Ok(());
                }
            },
        };
        self.send(token, &Kind::Status(status).into());
        Ok(())
    }

    fn answer_failed(&mut self, token: Token) -> Result<(), Close> {
        let failed = match self.journal.failed(FAILED_MAX) {
            Ok(failed) => failed,
            Err(error) => {
                self.fail(error);
                return Ok(());
            }
        };
        let entries = failed.into_iter().map(|failed| FailedEntry {
            peer: failed.peer,
            user: failed.user,
            mailbox_guid: failed.mailbox,
            seq: failed.seq,
            at_us: failed.at_us,
            error: failed.error,
        });
        for entry in entries {
            self.send(token, &Kind::FailedList(FailedList { entries: vec![entry], more: true }).into());
        }
        self.send(token, &Kind::FailedList(FailedList::default()).into());
        Ok(())
    }

    fn answer_waiting(&mut self, token: Token) -> Result<(), Close> {
        for entry in self.waiting().into_iter().take(WAITING_MAX) {
            self.send(token, &Kind::WaitingList(WaitingList { entries: vec![entry], more: true }).into());
        }
        self.send(token, &Kind::WaitingList(WaitingList::default()).into());
        Ok(())
    }

    /// A person has compared what is listed.
    fn clear_failed(&mut self, token: Token, clear: &ClearFailed) -> Result<(), Close> {
        let user = (!clear.all).then_some(clear.user.as_str());
        let outcome = self.journal.clear_failed(user).and_then(|cleared| Ok((cleared, self.journal.failed_count()?)));
        let (count, left) = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                self.fail(error);
                return Ok(());
            }
        };
        self.counts.counters.failed = left;
        if clear.all {
            self.peers.iter_mut().for_each(|peer| peer.outbox.forget_dropped());
        }
        let whose = user.map_or("all users".to_owned(), |user| format!("user {}", user.escape_debug()));
        log::info!("What had failed of {whose} is cleared, as doveadm was asked to: {count} entries.");
        self.send(token, &Kind::FailedCleared(FailedCleared { count }).into());
        Ok(())
    }

    fn take_intent(&mut self, token: Token, intent: Intent) {
        let may = self.may_tell(token, &intent.user);
        let Some(Role::Local(local)) = self.sockets.get_mut(&token).map(|socket| &mut socket.role) else { return };
        match may {
            May::Wait => local.held = Some(Box::new(Kind::Intent(intent).into())),
            May::NoUser => {}
            May::Tell | May::NotTell => {
                // If it ends without a goodbye, a look does no harm.
                local.intend(&intent.user, intent.mailbox.unwrap_or_default().guid);
                if may == May::Tell {
                    self.take_user_peers(&intent.user.as_str().into(), intent.peers);
                }
            }
        }
    }

    /// The record, if the process may tell of whom it tells.
    fn check_sender(&mut self, token: Token, record: Record) -> Result<Option<Record>, Close> {
        let changes = record.change.iter().chain(&record.expunged_in_memory).map(|change| change.user.as_str());
        let users: BTreeSet<&str> = changes.chain(record.spans.iter().map(|span| span.user.as_str())).collect();
        if users.len() > RECORD_USERS_MAX {
            return Err(Close::Malformed(format!("one record tells of {} users", users.len())));
        }
        let mut may: Vec<(Arc<str>, May)> = Vec::new();
        // One is waited for at a time.
        let must_wait = users.into_iter().any(|user| {
            let of_user = self.may_tell(token, user);
            may.push((user.into(), of_user));
            of_user == May::Wait
        });
        if must_wait {
            if let Some(Role::Local(local)) = self.sockets.get_mut(&token).map(|socket| &mut socket.role) {
                local.held = Some(Box::new(Kind::Record(record).into()));
            }
            return Ok(None);
        }
        let mut is_his = true;
        for (user, may) in may.into_iter().filter(|(_, may)| *may != May::Tell) {
            is_his = false;
            self.disbelieve(token, &user);
            if may == May::NotTell {
                self.heals.want_all(&user);
            }
        }
        if let (false, Some(wanted)) = (is_his, &record.ack) {
            let user = record.change.as_ref().map(|change| change.user.as_str()).unwrap_or_default().into();
            let id = self.want_ack(token, &user, wanted);
            self.acks
                .settle(id, "it is another system user's mail, so what was done is read in the mailbox's log first");
        }
        Ok(is_his.then_some(record))
    }

    fn disbelieve(&mut self, token: Token, user: &str) {
        self.counts.note("told_of_others", 1);
        let Some(Role::Local(local)) = self.sockets.get_mut(&token).map(|socket| &mut socket.role) else { return };
        if std::mem::replace(&mut local.has_told_of_others, true) {
            return;
        }
        let line = || {
            format!(
                "Local process {}{} tells of user {}, whose mail belongs to another system user, if to any: what is true of it is \
                 read from the mailboxes' logs.",
                local.name(),
                match local.sender {
                    Some(Sender::Uid(uid)) => format!(" of system user {uid}"),
                    _ => String::new(),
                },
                user.escape_debug()
            )
        };
        if let Some(line) = self.floods.locals.take(line, self.now_ms) {
            log::warn!("{line}");
        }
    }

    fn take_record(&mut self, token: Token, record: Record) {
        crate::guard::provoke("relay");
        self.counts.counters.records += 1;
        self.counts.counters.spans += record.spans.len() as u64;
        if let Some(expunged) = record.expunged_in_memory {
            self.take_expunged_in_memory(expunged);
        }
        self.take_dropped(token, record.dropped);
        let unacknowledged = &mut self.counts.counters.unacknowledged;
        *unacknowledged = unacknowledged.saturating_add(record.unacknowledged);
        let mut change = record.change;
        if let Some(error) = change.as_ref().and_then(|change| change::check_change(change).err()) {
            self.skip_bad_change(token, &change.take().unwrap_or_default(), &error);
        }
        let user = match (&change, record.spans.first()) {
            (Some(change), _) => change.user.as_str().into(),
            (None, Some(span)) => span.user.as_str().into(),
            (None, None) => return,
        };
        if let Some(change) = &mut change {
            self.counts.counters.changes += 1;
            change.spans.clone_from(&record.spans);
            // For this server only.
            change.spans.iter_mut().for_each(|span| span.tail.clear());
        }
        let is_doubtful = change.as_ref().is_some_and(|change| self.is_doubtful_subscription(token, &user, change));
        let ack = record.ack.as_ref().map(|wanted| self.want_ack(token, &user, wanted));
        if let (Some(id), None) = (ack, &change) {
            self.acks.settle(id, "the change cannot be sent to the peers");
        }
        let arrival = Arrival { connection: token.0, user: user.clone(), change, ack };
        let mut released = Vec::new();
        self.arrive(arrival, record.spans, &mut released);
        self.ship_all(released);
        if is_doubtful {
            self.heals.want_list(&user);
        }
    }

    fn is_doubtful_subscription(&mut self, token: Token, user: &Arc<str>, change: &Change) -> bool {
        let is_subscription = change.ops.iter().any(|op| matches!(op.what, Some(What::Subscription(_))));
        let path = change.mailbox.as_ref().map(|mailbox| &mailbox.path[..]).unwrap_or_default();
        is_subscription && self.subscribers.changed(user, path, token.0, self.now_ms)
    }

    /// Puts what came in its order.
    pub fn arrive(&mut self, mut arrival: Arrival, spans: Vec<Span>, released: &mut Vec<Release>) {
        let (renamed, mut spans): (Vec<Span>, Vec<Span>) =
            spans.into_iter().partition(|span| !span.old_mailbox_guid.is_empty());
        for span in renamed {
            if let Err(error) = self.take_new_guid(&span) {
                self.fail(error);
            }
        }
        // Of a log that nobody can read any more nothing is missing.
        let is_there = |span: &Span| !self.lists.is_log_gone(span);
        spans.retain(is_there);
        if let Some(change) = &mut arrival.change {
            change.spans.retain(is_there);
        }
        // Who had opened a mailbox before calls it as it was called then.
        self.canonical_spans(&mut spans);
        if let Some(change) = &mut arrival.change {
            self.canonical_change(&arrival.user, change);
            self.canonical_spans(&mut change.spans);
        }
        for span in &spans {
            self.recall_log(span);
        }
        // No log says what happened to mailboxes themselves, whatever was written with it.
        let of_messages = arrival.change.as_ref().is_none_or(change::is_of_messages);
        if of_messages && !spans.is_empty() && spans.iter().all(|span| self.spans.is_healed(span, &Need::of(span))) {
            // It was on its way while a worker read of it in the log.
            if arrival.change.take().is_some() {
                self.counts.note("told_late", 1);
            }
            if let Some(id) = arrival.ack {
                self.acks.found(id, self.journal.seq());
            }
            return;
        }
        self.look_at_earlier(&spans);
        let (untold, told): (Vec<Span>, Vec<Span>) =
            spans.into_iter().partition(|span| span.untold && span.private_user.is_empty());
        for span in untold {
            self.look_into(&arrival.user, &span);
        }
        let mut holes = Vec::new();
        self.order.arrive(arrival, told, self.now_ms, &mut self.spans, released, &mut holes);
        self.look_into_holes(holes);
    }

    /// What is written where all is known, and was not read there: the log may be an earlier one, put in the place of the one that was
    /// known. A look tells by its bytes.
    fn look_at_earlier(&mut self, spans: &[Span]) {
        for span in spans.iter().filter(|span| span.private_user.is_empty()) {
            let need = Need::of(span);
            if self.spans.is_known(span, &need) && !self.spans.is_healed(span, &need) {
                self.counts.note("told_again", 1);
                self.heals.want(&span.user.as_str().into(), &span.mailbox_guid, None);
            }
        }
    }

    fn take_new_guid(&mut self, span: &Span) -> Result<(), JournalError> {
        let user: Arc<str> = span.user.as_str().into();
        match self.made_anew(&user, span)? {
            Some(known) => {
                let reason = "its index was made anew, perhaps without all messages and flags".to_owned();
                self.take_doubt(&user, Doubt { guid: known.mailbox, path: known.path, reason, ..Default::default() });
                self.journal.forget_mailbox(&user, &span.old_mailbox_guid)?;
                self.spans.lose(&Need::of(span));
                self.heals.want_anew(&user, &span.mailbox_guid);
            }
            None => {
                self.forget_log(&user, &span.mailbox_guid)?;
                self.journal.rename_mailbox(&user, &span.old_mailbox_guid, &span.mailbox_guid)?;
            }
        }
        self.note_alias(&user, &span.old_mailbox_guid, &span.mailbox_guid)
    }

    /// What was known of the mailbox's log, if it gets back the GUID that it had before Dovecot made its index anew. A look that
    /// gives it back says so itself.
    fn made_anew(&self, user: &str, span: &Span) -> Result<Option<KnownLog>, JournalError> {
        if !span.untold || self.heals.is_running(user) {
            return Ok(None);
        }
        // If the log goes on, a session that came upon a new maildir had given it another GUID. An index's id is the second in which
        // it was made, so that it alone does not tell.
        let goes_on = |known: &KnownLog| {
            (known.index_id, known.log_seq) == (span.index_id, span.log_seq) && known.end <= span.begin
        };
        let is_another = |known: &KnownLog| known.log_seq != 0 && !goes_on(known);
        Ok(self.journal.log(user, &span.mailbox_guid, "")?.filter(is_another))
    }

    /// Nobody tells what was written there.
    fn look_into(&mut self, user: &Arc<str>, span: &Span) {
        let need = Need::of(span);
        if self.spans.is_known(span, &need) {
            return;
        }
        self.counts.counters.gaps += 1;
        if !self.spans.knows(&need) {
            // The log was never heard of: it is known up to here, as far as we can know.
            self.spans.recall(&need, need.place, None);
            let begin = Span { end: span.begin, tail: Vec::new(), ..span.clone() };
            self.ship_all(vec![Release { user: user.clone(), change: None, spans: vec![begin], ack: None }]);
        }
        self.heals.want(user, &span.mailbox_guid, Some((span.log_seq, span.end)));
    }

    pub fn look_into_holes(&mut self, holes: Vec<Hole>) {
        self.counts.counters.gaps += holes.len() as u64;
        for Hole { user, mailbox } in holes {
            match mailbox {
                Some((guid, place)) => self.heals.want(&user, &guid, Some(place)),
                None => self.heals.want_all(&user),
            }
        }
    }

    /// What the journal knows of a log that is not in memory (any more).
    fn recall_log(&mut self, span: &Span) {
        let need = Need::of(span);
        if self.spans.knows(&need) {
            return;
        }
        let known = self.journal.log(&span.user, &span.mailbox_guid, &span.private_user);
        if let (Ok(known), true) = (&known, span.private_user.is_empty()) {
            if known.as_ref().is_none_or(|log| log.path.is_empty()) {
                self.expect_name(&span.user, &span.mailbox_guid);
            }
        }
        match known {
            Ok(Some(log)) if log.index_id == span.index_id => {
                self.spans.recall(&need, (log.log_seq, log.end), log.healed);
            }
            Ok(Some(log)) if span.private_user.is_empty() && log.log_seq != 0 => {
                // Another index is in the place of the one that was known: made anew, or put there.
                self.spans.lose(&need);
                self.heals.want(&span.user.as_str().into(), &span.mailbox_guid, None);
            }
            Ok(_) => {}
            Err(error) => self.fail(error),
        }
    }

    /// One bad change does not cost the process its connection: the others on it are other people's mail.
    fn skip_bad_change(&mut self, token: Token, change: &Change, error: &ChangeError) {
        self.counts.note("bad_change", 1);
        let mailbox = change.mailbox.as_ref().map(|mailbox| mailbox.guid.clone()).unwrap_or_default();
        self.fail_to_tell(&change.user, mailbox, &error.to_string());
        let Some(Role::Local(local)) = self.sockets.get_mut(&token).map(|socket| &mut socket.role) else {
            return;
        };
        if std::mem::replace(&mut local.has_bad_change, true) {
            return;
        }
        let line = || {
            let user = change.user.escape_debug();
            format!("Local process {}, user {user}: a change cannot be sent to the peers: {error}.", local.name())
        };
        if let Some(line) = self.floods.locals.take(line, self.now_ms) {
            log::error!("{line}");
        }
    }
}
