//! Connections of local processes: what they did becomes changes for the peers; doveadm asks for the status.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use mio::Token;

use super::engine::{Close, Engine, Role, Socket};
use super::order::{Arrival, Hole, Release};
use super::spans::Need;
use crate::change::{self, ChangeError, GUID_BYTES};
use crate::journal::{JournalError, KnownLog};
use crate::wire::proto::{
    frame::Kind, op::What, Change, ClearFailed, Doubt, FailedCleared, FailedEntry, FailedList, Frame, Record, Span,
    WaitingList,
};

/// Answers that may wait for a process that does not read them.
pub const OUT_BYTES_MAX: usize = 1 << 20;

/// Of what failed, and of who waits, so much is listed.
const FAILED_MAX: usize = 10_000;
const WAITING_MAX: usize = 10_000;
/// Mailboxes of one user that one process is about to write to; with more, all of them count.
const INTENTS_PER_USER_MAX: usize = 100;

/// Mailboxes by user and GUID; an empty GUID stands for all.
type Intents = HashMap<Arc<str>, HashSet<Vec<u8>>>;

/// One local process.
#[derive(Default)]
pub struct Local {
    may_ask: bool,
    is_attached: bool,
    process: String,
    pid: u32,
    /// What it was about to write to, and has not said goodbye since.
    intents: Intents,
    /// A change of its was bad; said once.
    has_bad_change: bool,
}

impl Local {
    pub fn new(may_ask: bool) -> Local {
        Local { may_ask, ..Local::default() }
    }

    fn intend(&mut self, user: &str, mailbox: Vec<u8>) {
        let mailboxes = self.intents.entry(user.into()).or_default();
        // Without a GUID, all of the user's mailboxes.
        let is_one = mailbox.len() == GUID_BYTES && mailboxes.len() < INTENTS_PER_USER_MAX;
        mailboxes.insert(if is_one { mailbox } else { Vec::new() });
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
        );
        let may_ask =
            matches!(self.sockets.get(&token), Some(Socket { role: Role::Local(local), .. }) if local.may_ask);
        if is_question && !may_ask {
            return Err(Close::Malformed("it asks what only root and the relay's own user may know".into()));
        }
        if let Kind::StatusRequest(_) = kind {
            return self.answer_status(token);
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
                local.intend(&intent.user, intent.mailbox.unwrap_or_default().guid);
                self.take_user_peers(&intent.user.as_str().into(), intent.peers);
            }
            Kind::Goodbye(goodbye) => {
                self.take_dropped(token, goodbye.dropped);
                if let Some(Role::Local(local)) = self.sockets.get_mut(&token).map(|socket| &mut socket.role) {
                    local.intents.clear();
                }
            }
            Kind::Record(record) => return self.take_record(token, record),
            _ => return Err(Close::Malformed("it sent a frame that a local process may not send".into())),
        }
        Ok(())
    }

    pub fn local_closed(&mut self, local: Local, why: &Close) {
        match why {
            // It is us who ended it.
            Close::Ended(_) if self.is_stopping() => return,
            Close::Malformed(reason) => {
                log::error!("Local process {}: {reason} - closing its connection.", local.name());
            }
            _ => {}
        }
        if local.intents.is_empty() {
            return;
        }
        self.counts.counters.unclean_ends += 1;
        log::info!(
            "Local process {} ended without a goodbye after it was about to write: {}. Its mailboxes are looked at.",
            local.name(),
            why.reason()
        );
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

    fn look_into_intents(&mut self, intents: &Intents) {
        for (user, mailboxes) in intents {
            match mailboxes.contains(&Vec::new()) {
                true => self.heals.want_all(user),
                false => mailboxes.iter().for_each(|guid| self.heals.want(user, guid, None)),
            }
        }
    }

    fn answer_status(&mut self, token: Token) -> Result<(), Close> {
        let status = self.status();
        self.send(token, &Kind::Status(status).into());
        match self.sockets.get(&token).map_or(0, |socket| socket.connection.waiting()) {
            waiting if waiting > OUT_BYTES_MAX => Err(Close::Malformed("it does not read its answers".into())),
            _ => Ok(()),
        }
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

    fn take_record(&mut self, token: Token, record: Record) -> Result<(), Close> {
        change::check_spans(&record.spans).map_err(|error| Close::Malformed(error.to_string()))?;
        crate::guard::provoke("relay");
        self.counts.counters.records += 1;
        self.counts.counters.spans += record.spans.len() as u64;
        self.take_dropped(token, record.dropped);
        let mut change = record.change;
        if let Some(error) = change.as_ref().and_then(|change| change::check_change(change).err()) {
            self.skip_bad_change(token, &change.take().unwrap_or_default(), &error);
        }
        let user = match (&change, record.spans.first()) {
            (Some(change), _) => change.user.as_str().into(),
            (None, Some(span)) => span.user.as_str().into(),
            (None, None) => return Ok(()),
        };
        if let Some(change) = &mut change {
            self.counts.counters.changes += 1;
            change.spans.clone_from(&record.spans);
            // For this server only.
            change.spans.iter_mut().for_each(|span| span.tail.clear());
        }
        let is_doubtful = change.as_ref().is_some_and(|change| self.is_doubtful_subscription(token, &user, change));
        let arrival = Arrival { connection: token.0, user: user.clone(), change };
        let mut released = Vec::new();
        self.arrive(arrival, record.spans, &mut released);
        self.ship_all(released);
        if is_doubtful {
            self.heals.want_all(&user);
        }
        Ok(())
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
            return;
        }
        let (untold, told): (Vec<Span>, Vec<Span>) =
            spans.into_iter().partition(|span| span.untold && span.private_user.is_empty());
        for span in untold {
            self.look_into(&arrival.user, &span);
        }
        let mut holes = Vec::new();
        self.order.arrive(arrival, told, self.now_ms, &mut self.spans, released, &mut holes);
        self.look_into_holes(holes);
    }

    fn take_new_guid(&mut self, span: &Span) -> Result<(), JournalError> {
        let user: Arc<str> = span.user.as_str().into();
        match self.made_anew(&user, span)? {
            Some(known) => {
                let reason = "its index was made anew, perhaps without all messages and flags".to_owned();
                self.take_doubt(&user, Doubt { guid: known.mailbox, path: known.path, reason });
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
        Ok(self.journal.log(user, &span.mailbox_guid, "")?.filter(|known| known.log_seq != 0))
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
            self.ship_all(vec![Release { user: user.clone(), change: None, spans: vec![begin] }]);
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
        if !std::mem::replace(&mut local.has_bad_change, true) {
            log::error!(
                "Local process {}, user {}: a change cannot be sent to the peers: {error}.",
                local.name(),
                change.user.escape_debug()
            );
        }
    }
}
