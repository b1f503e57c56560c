//! Connections to workers: jobs go out, what became of them comes back.
//!
//! The engine connects to the worker socket and keeps the connections open, so that no job waits for a process to
//! start. The last one never applies: it reads bodies for peers, even while all others wait for bodies themselves. It
//! is opened when it is first needed.

use std::cell::Cell;
use std::sync::Arc;

use mio::Token;
use prost::Message;

use super::backoff::Backoff;
use super::bodies::Party;
use super::causes;
use super::connection::Connection;
use super::engine::{Close, Engine, Role};
use super::looks::LookJob;
use super::order::{Arrival, Release};
use super::poison::{Tried, CRASHES_MAX};
use super::questions::{AnswerJob, Unanswered};
use super::redo::RedoJob;
use super::torn;
use super::work::Received;
use crate::change::{self, ELSEWHERE_MAX, USER_BYTES_MAX};
use crate::journal::{Elsewhere, Failed, JournalError};
use crate::merge::rule::Rule;
use crate::wire::proto::frame::Kind;
use crate::wire::proto::op::What;
use crate::wire::proto::{self, Applied, Apply, Change, Frame, Refused, SeqOf, Span};

/// Encoded changes in one frame of a job; a single change may have more.
const APPLY_BYTES_MAX: usize = 60_000;
/// Users whose last refusal is remembered, so that its reason is logged once, and they share workers.
const REFUSALS_MAX: usize = 10_000;
/// Pauses between attempts to connect, and to make again what failed.
pub const RETRY_MS_MIN: u64 = 50;
pub const RETRY_MS_MAX: u64 = 5_000;
/// A connection that lasted this long was a good one: the pauses begin again.
const GOOD_CONNECTION_MS: u64 = 2_000;

/// A change in a job; its content is with the worker.
struct Item {
    /// Its number among those of the peer that sent it.
    epoch: u64,
    seq: u64,
    /// And among those of its origin.
    made: SeqOf,
    bytes: usize,
    /// GUID and path of its mailbox.
    mailbox: Vec<u8>,
    path: Vec<String>,
    /// GUIDs of the messages that it saves.
    saves: Vec<String>,
    /// Who has not heard of it must not delete the mailbox.
    keeps: bool,
    /// What it does to the list of mailboxes.
    of_list: Option<Box<Change>>,
    /// What it does to flags, if others may do it at the same time.
    flags: Option<Box<Change>>,
    /// What of it others may need from us.
    to_pass_on: Option<Box<Change>>,
    /// Who is sent it.
    given: Vec<String>,
    /// Encoded, if it failed before: it may have to be set aside.
    whole: Option<Vec<u8>>,
}

impl Item {
    fn of(received: &Received, keeps_flags: bool, to_pass_on: Option<Box<Change>>) -> Item {
        let Received { epoch, seq, bytes, ref change, .. } = *received;
        let of_list = change::is_of_list(change).then(|| Box::new(change.clone()));
        let (mailbox, path) = change.mailbox.as_ref().map(|m| (m.guid.clone(), m.path.clone())).unwrap_or_default();
        let flags = if keeps_flags { change::flags_of(change).map(Box::new) } else { None };
        let (made, given) = (received.made(), change.given.clone());
        let (saves, keeps) = (torn::saved(change), change::keeps_mailbox(change));
        Item { epoch, seq, made, bytes, mailbox, path, saves, keeps, of_list, flags, to_pass_on, given, whole: None }
    }

    fn tried(&self, peer: usize) -> Tried {
        Tried::Change((peer, self.epoch, self.seq))
    }

    /// The worker says how a mailbox is that it should have deleted: it has found something in there that nobody knew of. Its log
    /// goes on, and what waits for what was written there still waits.
    fn note_kept(&mut self, told: &Change) {
        let is_create = told.ops.iter().any(|op| matches!(&op.what, Some(What::Create(create)) if !create.directory));
        for op in self.of_list.iter_mut().filter(|_| is_create).flat_map(|change| &mut change.ops) {
            if let Some(What::Delete(delete)) = &mut op.what {
                delete.keeps = true;
            }
        }
    }
}

/// What a worker is applying: changes of one user and one origin from one peer.
pub struct Job {
    id: u64,
    user: Arc<str>,
    peer: usize,
    origin: Arc<str>,
    items: Vec<Item>,
    /// The first so many are applied.
    done: usize,
    /// Of a user whose changes could not be applied before.
    again: bool,
    /// Why the worker could not go on: it may go away over that.
    error: String,
}

#[derive(Default)]
pub enum Task {
    #[default]
    Idle,
    Apply(Job),
    /// Reads the body of this number.
    Read(u64),
    Look(LookJob),
    /// Asks the userdb who the users are.
    Ask,
    Redo(RedoJob),
    /// Answers a question, of a peer or a comparison.
    Answer(Box<AnswerJob>),
}

/// A connection to a worker, or the want of one.
pub struct Worker {
    pub token: Option<Token>,
    pub task: Task,
    only_reads: bool,
    /// The task waits for locks only briefly.
    pub is_brief: bool,
    /// It is to be connected.
    is_wanted: bool,
    connected_ms: u64,
    retry_at_ms: u64,
    backoff: Backoff,
}

impl Worker {
    pub fn all(applying: usize) -> Vec<Worker> {
        let worker = |index| Worker {
            token: None,
            task: Task::Idle,
            only_reads: index == applying,
            is_brief: false,
            is_wanted: index < applying,
            connected_ms: 0,
            retry_at_ms: 0,
            backoff: Backoff::new(RETRY_MS_MIN, RETRY_MS_MAX),
        };
        (0..=applying).map(worker).collect()
    }

    pub fn wake_up_ms(&self) -> Option<u64> {
        (self.token.is_none() && self.is_wanted).then_some(self.retry_at_ms)
    }

    pub fn is_applying(&self) -> bool {
        matches!(self.task, Task::Apply(_) | Task::Redo(_))
    }

    /// Who sent what it applies.
    pub fn applies_from(&self) -> Option<usize> {
        match &self.task {
            Task::Apply(job) => Some(job.peer),
            _ => None,
        }
    }

    /// Which body it reads.
    pub fn reads(&self) -> Option<u64> {
        match self.task {
            Task::Read(id) => Some(id),
            _ => None,
        }
    }

    /// Tries what failed before.
    fn tries_again(&self) -> bool {
        match &self.task {
            Task::Apply(job) => job.again,
            Task::Redo(job) => job.again,
            _ => false,
        }
    }

    fn may_wait_long(&self) -> bool {
        matches!(self.task, Task::Apply(_) | Task::Redo(_) | Task::Look(_)) && !self.is_brief
    }

    pub fn may_work(&self) -> bool {
        self.is_idle() && !self.only_reads
    }

    fn is_idle(&self) -> bool {
        self.token.is_some() && matches!(self.task, Task::Idle)
    }
}

impl Engine {
    /// Connects if it is time to.
    pub fn worker_tick(&mut self, index: usize) {
        let is_due = self.workers[index].wake_up_ms().is_some_and(|due| due <= self.now_ms);
        if !is_due || self.is_stopping() {
            return;
        }
        let connected = self.outside.connect_worker(&self.config.worker_socket);
        match connected.and_then(|stream| self.add(Connection::new(stream, None, false), Role::Worker(index))) {
            Ok(token) => {
                self.workers[index].token = Some(token);
                self.workers[index].connected_ms = self.now_ms;
                self.last_worker_error.clear();
            }
            Err(error) => {
                let socket = self.config.worker_socket.display();
                let text = format!("connect({socket}) to a worker failed: {error}");
                self.retry_worker(index, text);
            }
        }
    }

    /// Gives jobs to idle workers.
    pub fn dispatch_jobs(&mut self) {
        if self.is_stopping() {
            return;
        }
        self.dispatch_reads();
        self.dispatch_redos();
        self.dispatch_looks();
        while let Some(index) = self.workers.iter().position(Worker::may_work) {
            let (heals, redos, failed) = (&self.heals, &self.redos, Cell::new(None));
            let (poison, refusals, may_retry) = (&self.poison, &self.last_refusals, self.may_retry());
            let context = causes::Context {
                peers: &self.peers,
                journal: &self.journal,
                causes: &self.causes,
                user_peers: &self.user_peers,
            };
            let is_alone = |received: &Received| poison.is_counted(&received.tried());
            let waits = |received: &Received, before: Option<&Received>| {
                if before.is_some_and(|before| is_alone(before) || is_alone(received)) {
                    return true;
                }
                let unmet = causes::unmet(received, before, &context).map_err(|error| failed.set(Some(error)));
                matches!(unmet, Ok(Some(_)))
            };
            let has_to_wait = |user: &str| !may_retry && refusals.contains_key(user);
            let is_busy = |user: &str| heals.is_running(user) || redos.has(user) || has_to_wait(user);
            let job = self.work.next_job(self.now_ms, is_busy, waits);
            if let Some(error) = failed.into_inner() {
                return self.fail(error);
            }
            let Some((user, received)) = job else { break };
            self.begin_job(index, user, received);
        }
        self.dispatch_questions();
    }

    /// Whether a worker may try again what failed before. Each try may take as long as Dovecot waits for a lock: so there are
    /// always workers for those of whom nothing failed.
    pub fn may_retry(&self) -> bool {
        let trying = self.workers.iter().filter(|worker| worker.tries_again()).count() + self.heals.running_again();
        trying < (self.config.workers / 2).max(1)
    }

    /// Whether this worker's next job waits for locks only briefly: as many as may wait for long have a job. They can for three times
    /// what Dovecot waits for one lock, and who has to wait behind all of that may have nothing to do with it.
    pub fn begin_briefly(&mut self, index: usize) -> bool {
        let waiting = self.workers.iter().filter(|worker| worker.may_wait_long()).count();
        self.workers[index].is_brief = waiting >= (self.config.workers / 2).max(1);
        self.workers[index].is_brief
    }

    /// A worker for a body: the one that is kept for it, or an idle one, but half of the others at most, as a reader waits for who
    /// asked. If there is none, the one that is kept for it is to come.
    pub fn idle_reader(&mut self) -> Option<usize> {
        let reading = self.workers.iter().filter(|worker| !worker.only_reads && worker.reads().is_some()).count();
        let may_read = |worker: &Worker| worker.is_idle() && (worker.only_reads || reading < self.others_reading_max());
        let idle = self.workers.iter().rposition(may_read);
        if idle.is_none() {
            self.workers.iter_mut().for_each(|worker| worker.is_wanted = true);
        }
        idle
    }

    fn others_reading_max(&self) -> usize {
        (self.config.workers / 2).max(1)
    }

    /// Bodies that are read for one peer at once: a peer that does not take them holds up no other.
    pub fn reading_max_of_peer(&self) -> usize {
        ((1 + self.others_reading_max()) / self.peers.len().max(1)).max(1)
    }

    pub fn worker_frame(&mut self, index: usize, frame: Frame) -> Result<(), Close> {
        let from = Party::Worker(index);
        match frame.kind {
            Some(Kind::Applied(applied)) => {
                let is_its_end = !applied.more && !applied.error.is_empty();
                self.worker_applied(index, applied)?;
                return self.ends_if(index, is_its_end);
            }
            Some(Kind::BodyRequest(request)) => return self.body_request(from, request),
            Some(Kind::BodyChunk(chunk)) => return self.body_chunk(from, chunk),
            Some(Kind::BodyMore(more)) => return self.body_more(from, more),
            Some(Kind::BodyCancel(cancel)) => self.body_cancel(from, &cancel),
            Some(Kind::Looked(looked)) => {
                let is_its_end = !looked.more && !looked.error.is_empty();
                self.worker_looked(index, looked)?;
                return self.ends_if(index, is_its_end);
            }
            Some(Kind::Surveyed(surveyed)) => {
                let is_its_end = !surveyed.more && !surveyed.error.is_empty();
                self.worker_surveyed(index, surveyed)?;
                return self.ends_if(index, is_its_end);
            }
            Some(Kind::Attach(_)) => {}
            // What it wrote although it applied nothing.
            Some(Kind::Record(record)) => {
                change::check_spans(&record.spans).map_err(|error| Close::Malformed(error.to_string()))?;
                self.take_own_spans(index, record.spans);
            }
            _ => return Err(Close::Malformed("it sent a frame that a worker may not send".into())),
        }
        Ok(())
    }

    /// A worker ends after a job in which something failed: the next one is for another process.
    fn ends_if(&mut self, index: usize, has_failed: bool) -> Result<(), Close> {
        if !has_failed {
            return Ok(());
        }
        self.workers[index].backoff.reset();
        Err(Close::Ended("its job failed".into()))
    }

    pub fn worker_closed(&mut self, index: usize, why: &Close) {
        let was_idle = matches!(self.workers[index].task, Task::Idle);
        let error = format!("the worker went away ({})", why.reason());
        self.answered(index, Err(Unanswered { error, is_gone: true }));
        self.workers[index].token = None;
        self.workers[index].is_wanted = !self.workers[index].only_reads;
        match std::mem::take(&mut self.workers[index].task) {
            Task::Apply(mut job) => {
                let user = job.user.clone();
                let reason = why.reason();
                self.note_torn(&mut job);
                // What it said of a job that it could not go on with tells more, and that it went away over it is no crash.
                let said = std::mem::take(&mut job.error);
                let is_crash = said.is_empty();
                let error = if is_crash { format!("the worker that applied it went away ({reason})") } else { said };
                let with: Vec<Tried> = job.items[job.done..].iter().map(|item| item.tried(job.peer)).collect();
                match is_crash && self.poison.crash(&with) {
                    true => self.set_aside_next(job, &format!("{error}, as {CRASHES_MAX} did")),
                    false => self.refuse_rest(job, &error),
                }
                self.forget_partly_applied(&user);
                self.work.finish(&user);
                // What it wrote last was not told.
                self.heals.want_mailboxes(&user);
            }
            Task::Look(job) => self.look_ended(&job.user, Err(format!("the worker went away ({})", why.reason()))),
            Task::Redo(job) => {
                let is_last = self.poison.crash(&[Tried::Redo(job.user().into())]);
                self.redo_failed(&job, &format!("the worker went away ({})", why.reason()), is_last);
                self.forget_partly_applied(job.user());
            }
            Task::Ask => self.ask_again(),
            Task::Idle | Task::Read(_) | Task::Answer(_) => {}
        }
        self.bodies_without(Party::Worker(index), "the worker went away");
        if self.now_ms >= self.workers[index].connected_ms + GOOD_CONNECTION_MS {
            self.workers[index].backoff.reset();
        }
        if was_idle && !matches!(why, Close::Malformed(_)) {
            // Dovecot's master ends idle processes, and all of them at a reload: no trouble.
            self.workers[index].retry_at_ms = self.now_ms + self.workers[index].backoff.pause_ms();
            return;
        }
        self.retry_worker(index, format!("a worker went away in mid-job: {}", why.reason()));
    }

    fn retry_worker(&mut self, index: usize, error: String) {
        let pause_ms = self.workers[index].backoff.pause_ms();
        self.workers[index].retry_at_ms = self.now_ms + pause_ms;
        if self.last_worker_error != error {
            log::error!("{error} - trying again in {pause_ms} msecs; changes of the peers wait.");
            self.last_worker_error = error;
        }
    }

    fn begin_job(&mut self, index: usize, user: Arc<str>, received: Vec<Received>) {
        let Some(peer) = received.first().map(|first| first.peer) else {
            return self.work.finish(&user);
        };
        // Sent twice, when the connection broke while the first one was being applied.
        // Or by two servers.
        let (again, received): (Vec<_>, Vec<_>) = received
            .into_iter()
            .partition(|r| self.peers[peer].inbox.is_applied(r.epoch, r.seq) || self.has_seen(&r.change));
        for again in again {
            self.peers[peer].inbox.finish(again.bytes);
            self.peers[peer].inbox.apply(again.epoch, again.seq);
            self.torn.is_over((peer, again.epoch, again.seq));
            self.forget_coming(&again.change);
            self.acknowledge(peer, again.epoch, again.seq);
        }
        if received.is_empty() {
            return self.work.finish(&user);
        }
        if let Some(error) = received.first().and_then(|first| self.wait_is_over(first)) {
            for received in &received {
                self.peers[peer].inbox.finish(received.bytes);
            }
            if let Some(first) = received.first() {
                self.refuse(peer, first.epoch, first.seq, &user, &error);
            }
            return self.work.finish(&user);
        }
        let mut received = received;
        // As they were made.
        let to_pass_on: Vec<_> = received.iter().map(|received| self.to_pass_on(peer, &received.change)).collect();
        let reduced = self
            .reduce_flags(&user, received.iter_mut().map(|received| &mut received.change))
            .and_then(|()| self.reduce_list(&user, received.iter_mut().map(|received| &mut received.change)));
        if let Err(error) = reduced {
            return self.fail(error);
        }
        let keeps_flags = self.is_mesh();
        let mut items: Vec<Item> = (received.iter().zip(to_pass_on))
            .map(|(received, to_pass_on)| Item::of(received, keeps_flags, to_pass_on))
            .collect();
        for (item, received) in items.iter_mut().zip(&received) {
            item.whole = self.poison.is_counted(&received.tried()).then(|| received.change.encode_to_vec());
        }
        let Some(origin) = items.first().map(|item| Arc::from(item.made.origin.as_str())) else {
            return self.work.finish(&user);
        };
        self.last_job += 1;
        let told_before = match self.note_coming(&user, &items) {
            Ok(told_before) => told_before,
            Err(error) => return self.fail(error),
        };
        let elsewhere = match self.elsewhere(&user, received.iter().map(|received| &received.change)) {
            Ok(elsewhere) => elsewhere,
            Err(error) => return self.fail(error),
        };
        let aliases = self.lists.aliases(&user);
        let again = self.last_refusals.contains_key(&user);
        let job = Job { id: self.last_job, user, peer, origin, items, done: 0, again, error: String::new() };
        let resolves = match self.servers_of(&job.user) {
            // Whether this server is the acting resolver where UIDs clash: see [`crate::merge::uid`].
            Ok(servers) => servers.iter().all(|server| self.me.server < *server),
            Err(error) => return self.fail(error),
        };
        let from = self.peers[peer].name.clone();
        let (again, me) = (told_before, self.me.server.clone());
        let (brief, pair) = (self.begin_briefly(index), !self.is_mesh());
        let first = Apply { resolves, from, again, aliases, me, brief, pair, ..Default::default() };
        let frames = apply_frames(job.id, &job.user, first, elsewhere, received.into_iter().map(|r| r.change));
        self.workers[index].task = Task::Apply(job);
        let Some(token) = self.workers[index].token else { return };
        for frame in frames {
            self.send(token, &frame);
        }
    }

    /// Of the messages that the changes name, those that are not here at their UIDs there.
    pub fn elsewhere<'a>(
        &self,
        user: &str,
        changes: impl Iterator<Item = &'a Change>,
    ) -> Result<Vec<proto::Elsewhere>, JournalError> {
        let mut found = Vec::new();
        if !self.users_elsewhere.contains(user) {
            return Ok(found);
        }
        for change in changes {
            let Some(mailbox) = &change.mailbox else { continue };
            let guid = self.lists.canonical(user, &mailbox.guid);
            let (uids, guids) = (change::uids_of(change), change::guids_of(change));
            // A message that the origin did not have to give another UID has the one there that it has at its own origin.
            for peer in self.peers.iter().map(|peer| &peer.name).chain(&self.far) {
                let by_uid = uids.iter().map(|uids| self.journal.elsewhere(user, peer, guid, *uids));
                let by_guid = guids.iter().map(|of| self.journal.elsewhere_of(user, peer, guid, of));
                for known in by_uid.chain(by_guid) {
                    found.extend(known?.into_iter().map(|one| {
                        let Elsewhere { mailbox: mailbox_guid, uid, guid, here, moved, alone } = one;
                        proto::Elsewhere { mailbox_guid, uid, guid, here, moved, alone, server: peer.clone() }
                    }));
                }
            }
        }
        Ok(found)
    }

    fn note_elsewhere(
        &mut self,
        made_by: &str,
        user: &Arc<str>,
        elsewhere: proto::Elsewhere,
    ) -> Result<(), JournalError> {
        let now_us = self.outside.now_us();
        let proto::Elsewhere { mailbox_guid, uid, guid, moved, here, alone, .. } = elsewhere;
        let mailbox = self.lists.canonical(user, &mailbox_guid).to_vec();
        let noted = Elsewhere { mailbox, uid, guid, here, moved, alone };
        for origin in self.peers.iter().map(|peer| &peer.name).chain(&self.far) {
            if moved || origin == made_by {
                self.journal.note_elsewhere(user, origin, &noted, now_us)?;
            }
        }
        self.users_elsewhere.insert(user.clone());
        Ok(())
    }

    /// What the job does to the list of mailboxes must be known if its worker dies. Which of it was given to another before.
    fn note_coming(&mut self, user: &str, items: &[Item]) -> Result<Vec<u64>, JournalError> {
        let mut again = Vec::new();
        let mut any = false;
        for item in items {
            let Some(change) = &item.of_list else { continue };
            let SeqOf { origin, seq, .. } = &item.made;
            if self.journal.is_coming(user, origin, *seq)? {
                again.push(*seq);
                continue;
            }
            self.journal.note_coming(user, origin, *seq, &change.encode_to_vec())?;
            any = true;
        }
        if any {
            self.journal.commit()?;
        }
        Ok(again)
    }

    /// The change is applied, or never will be.
    pub fn forget_coming(&mut self, change: &Change) {
        let Some(stamp) = change.stamp.as_ref().filter(|_| change::is_of_list(change)) else { return };
        if let Err(error) = self.journal.forget_coming(&change.user, &stamp.origin, stamp.seq) {
            self.fail(error);
        }
    }

    fn worker_applied(&mut self, index: usize, applied: Applied) -> Result<(), Close> {
        let mut job = match std::mem::take(&mut self.workers[index].task) {
            Task::Apply(job) => job,
            Task::Redo(job) => return self.worker_redid(index, job, applied),
            _ => return Err(Close::Malformed(format!("it applied job {}, which it was not given", applied.job))),
        };
        if applied.more && !applied.error.is_empty() && applied.job == job.id {
            job.error = change::printable(&applied.error);
            self.workers[index].task = Task::Apply(job);
            return Ok(());
        }
        let outcome = self.advance_job(index, &mut job, &applied);
        let is_over = outcome.is_ok() && !applied.more;
        if !is_over {
            self.workers[index].task = Task::Apply(job);
            return outcome;
        }
        self.workers[index].backoff.reset();
        let user = job.user.clone();
        if !applied.error.is_empty() {
            // A maildir that could not commit to its index may have the messages all the same.
            self.note_torn(&mut job);
            self.fail_rest(job, &change::printable(&applied.error), applied.never);
        } else if job.done < job.items.len() {
            self.refuse_rest(job, "the worker ended the job without applying it");
        } else {
            self.poison.note_job();
        }
        self.forget_partly_applied(&user);
        self.work.finish(&user);
        Ok(())
    }

    /// Takes over what the worker has done since it last said so.
    fn advance_job(&mut self, index: usize, job: &mut Job, applied: &Applied) -> Result<(), Close> {
        let done = applied.done as usize;
        if applied.job != job.id || done < job.done || done > job.items.len() {
            let what = format!("it applied {done} changes of job {}", applied.job);
            return Err(Close::Malformed(format!(
                "{what}, but has job {} with {} changes, {} of them applied",
                job.id,
                job.items.len(),
                job.done
            )));
        }
        change::check_spans(&applied.spans).map_err(|error| Close::Malformed(error.to_string()))?;
        self.take_userdb(&job.user.clone(), applied.peers.clone());
        for change in applied.changes.iter().filter(|change| *change.user == *job.user) {
            change::check_change(change).map_err(|error| Close::Malformed(error.to_string()))?;
            // What is told comes after what gave rise to it, also if nothing was written.
            let cause = change.stamp.as_ref().and_then(|stamp| stamp.vector.first());
            if let Some(item) = job.items.iter_mut().find(|item| cause == Some(&item.made)) {
                self.note_part(&job.user, &item.made);
                item.note_kept(change);
            }
            // In one commit of the journal with the acknowledgement, or before it.
            let release =
                Release { user: job.user.clone(), change: Some(change.clone()), spans: Vec::new(), ack: None };
            self.ship_all(vec![release]);
        }
        for elsewhere in &applied.elsewhere {
            if let Err(error) = self.note_elsewhere(&job.origin, &job.user, elsewhere.clone()) {
                self.fail(error);
            }
        }
        for alias in &applied.aliases {
            if let Err(error) = self.take_alias(&job.user, alias) {
                self.fail(error);
            }
        }
        for item in &mut job.items[job.done..done] {
            self.peers[job.peer].inbox.finish(item.bytes);
            self.counts.counters.applied += 1;
            self.last_refusals.remove(&job.user);
            self.is_over(&job.user, job.peer, item);
            if item.keeps {
                let now_us = self.outside.now_us();
                self.lists.keeps(&job.user, &item.mailbox, &item.made, now_us);
            }
            if let Some(Err(error)) =
                item.to_pass_on.take().map(|change| self.pass_on(&job.user, *change, Some(job.peer)))
            {
                self.fail(error);
            }
            if let Some(Err(error)) = item.flags.as_ref().map(|change| self.keep_flags(&job.user, change)) {
                self.fail(error);
            }
            if let Some(change) = &item.of_list {
                if let Err(error) = self.note_list(&job.user, change) {
                    self.fail(error);
                }
                self.tell_of_list();
                self.forget_coming(change);
            }
        }
        let newly = job.done..done;
        job.done = done;
        for doubt in &applied.doubts {
            self.take_doubt(&job.user.clone(), doubt.clone());
        }
        for note in &applied.notes {
            self.counts.note(note, 1);
        }
        for conflict in &applied.conflicts {
            match Rule::named(&conflict.rule) {
                Some(rule) => self.counts.solved(&job.user, &conflict.path, rule),
                None => self.counts.note("other", 1),
            }
        }
        self.take_own_spans(index, applied.spans.clone());
        self.name_mailboxes(&job.user, &job.items[newly]);
        Ok(())
    }

    /// A change is applied, or is set aside for ever, after a worker has seen that its sender is a peer of the user.
    fn is_over(&mut self, user: &Arc<str>, via: usize, item: &Item) {
        let SeqOf { origin, epoch, seq } = &item.made;
        if let Some(origin) = self.peers.iter_mut().find(|peer| peer.name == *origin) {
            origin.inbox.came_through_another(*epoch, *seq, user);
        }
        self.note_seen(user, origin, *epoch, *seq);
        self.questions.note_change(user);
        self.tell_known(user, &item.made, &item.given, via);
        self.is_over_for_sender(via, item);
    }

    fn is_over_for_sender(&mut self, via: usize, item: &Item) {
        self.peers[via].inbox.apply(item.epoch, item.seq);
        self.torn.is_over((via, item.epoch, item.seq));
        self.poison.is_over(&item.tried(via));
        self.acknowledge(via, item.epoch, item.seq);
    }

    /// What was applied to a mailbox named it.
    fn name_mailboxes(&mut self, user: &str, items: &[Item]) {
        let mut last: &[u8] = &[];
        for item in items.iter().filter(|item| item.of_list.is_none() && !item.mailbox.is_empty()) {
            if item.mailbox != last {
                last = &item.mailbox;
                let mailbox = self.lists.canonical(user, &item.mailbox);
                if let Err(error) = self.journal.name_log(user, mailbox, &item.path) {
                    return self.fail(error);
                }
            }
        }
    }

    /// Our own commits tile the logs, too: what waits for them can go on.
    pub fn take_own_spans(&mut self, index: usize, spans: Vec<Span>) {
        self.counts.counters.spans += spans.len() as u64;
        self.note_where_flags_stand(&spans);
        self.note_partly_applied(&spans);
        let Some(token) = self.workers[index].token else { return };
        let Some(user) = spans.first().map(|span| span.user.as_str().into()) else { return };
        let mut released = Vec::new();
        self.arrive(Arrival { connection: token.0, user, change: None, ack: None }, spans, &mut released);
        self.ship_all(released);
    }

    /// What of the job is not applied may be in its mailboxes.
    fn note_torn(&mut self, job: &mut Job) {
        for item in &mut job.items[job.done..] {
            let sent = (job.peer, item.epoch, item.seq);
            self.torn.note(&job.user, sent, &item.mailbox, std::mem::take(&mut item.saves));
        }
    }

    /// The job's first change that is not applied could not be. Its peer is told and will send it and the user's later
    /// ones again, so these are dropped.
    fn refuse_rest(&mut self, job: Job, error: &str) {
        let Job { user, peer, items, done, .. } = job;
        for item in &items[done..] {
            self.peers[peer].inbox.finish(item.bytes);
        }
        if let Some(item) = items.get(done) {
            self.refuse(peer, item.epoch, item.seq, &user, error);
        }
    }

    /// The same. A change that can never be applied is set aside after some tries, so that the user's others go on.
    fn fail_rest(&mut self, job: Job, error: &str, never: bool) {
        let Some(tried) = job.items.get(job.done).map(|item| item.tried(job.peer)) else {
            return self.refuse_rest(job, error);
        };
        if never && self.poison.refuse(&tried) {
            return self.set_aside_next(job, error);
        }
        if !never {
            self.poison.fail(&tried);
        }
        self.refuse_rest(job, error);
    }

    /// The job's first change that is not applied never will be.
    fn set_aside_next(&mut self, mut job: Job, error: &str) {
        self.set_aside(&job, error);
        let done = job.items.remove(job.done);
        if let Some(change) = &done.of_list {
            self.forget_coming(change);
        }
        self.peers[job.peer].inbox.finish(done.bytes);
        self.is_over(&job.user, job.peer, &done);
        if job.done < job.items.len() {
            return self.refuse_rest(job, "a change before it was set aside");
        }
        self.last_refusals.remove(&job.user);
    }

    /// A peer's change that no worker is given: a newer version's, or a bug's.
    pub fn set_aside_malformed(&mut self, received: Received, error: &str) {
        let whole = Some(received.change.encode_to_vec());
        let item = Item { whole, ..Item::of(&received, false, None) };
        let user: Arc<str> = received.change.user.chars().take(USER_BYTES_MAX).collect::<String>().into();
        let origin = item.made.origin.as_str().into();
        let items = vec![item];
        let job = Job { id: 0, user, peer: received.peer, origin, items, done: 0, again: false, error: String::new() };
        self.set_aside(&job, &format!("malformed change: {error}"));
        match job.items[0].made.origin == self.peers[job.peer].name {
            true => self.is_over(&job.user, job.peer, &job.items[0]),
            // No worker has seen whether the sender may say so of this user. Its origin sends it, too.
            false => self.is_over_for_sender(job.peer, &job.items[0]),
        }
    }

    fn set_aside(&mut self, job: &Job, error: &str) {
        let item = &job.items[job.done];
        let SeqOf { origin, seq, .. } = item.made.clone();
        log::error!(
            "User {}: change {seq} of server {origin} can never be applied here and is set aside: {error}; the mailbox must be \
             compared (doveadm dovetail failed).",
            job.user,
        );
        let failed = Failed {
            peer: origin,
            user: job.user.to_string(),
            mailbox: item.mailbox.clone(),
            seq,
            at_us: self.outside.now_us(),
            error: error.to_owned(),
            change: item.whole.clone(),
        };
        self.remember_failed(&failed);
    }

    /// Refuses a change of a peer, which has left the queue.
    pub fn refuse(&mut self, peer: usize, epoch: u64, seq: u64, user: &Arc<str>, error: &str) {
        self.counts.counters.refused += 1;
        self.count_if_foreign(error);
        // A bad change may name anybody, at any length.
        let user_name: String = user.chars().take(USER_BYTES_MAX).collect();
        let name = &self.peers[peer].name;
        if self.last_refusals.len() >= REFUSALS_MAX {
            self.last_refusals.clear();
        }
        if self.last_refusals.insert(user.clone(), error.to_owned()).is_none_or(|last| last != error) {
            log::error!(
                "User {}: change {seq} of peer {name} could not be applied: {error} - it will be sent again, the user's \
                 later changes wait.",
                user_name.escape_debug()
            );
        }
        let mut seq = seq;
        for dropped in self.work.drop_user(user, peer) {
            self.peers[peer].inbox.finish(dropped.bytes);
            if self.peers[peer].inbox.is_applied(dropped.epoch, dropped.seq) {
                // Sent again over a new connection, and applied meanwhile: it will not come once more.
                self.acknowledge(peer, dropped.epoch, dropped.seq);
                continue;
            }
            // It waited for this one: both are to come again.
            seq = seq.min(dropped.seq);
        }
        let outcome = self.peers[peer].inbox.refuse(epoch, seq, user);
        let Some(link) = &mut self.peers[peer].link else { return };
        match outcome {
            Ok(()) => {
                let refused = Refused { epoch, seq, user: user_name, error: error.to_owned(), ..Default::default() };
                link.session.control(Kind::Refused(refused));
            }
            Err(error) => {
                let token = link.token;
                self.close(token, Close::Malformed(error.to_string()));
            }
        }
    }

    pub fn acknowledge(&mut self, peer: usize, epoch: u64, seq: u64) {
        if let Some(link) = self.peers[peer].link.as_mut().filter(|link| link.session.is_up()) {
            link.session.ack(epoch, seq);
        }
    }
}

/// The job as frames, none too long. `first`: what is said once.
pub fn apply_frames(
    job: u64,
    user: &str,
    first: Apply,
    elsewhere: Vec<proto::Elsewhere>,
    changes: impl Iterator<Item = Change>,
) -> Vec<Frame> {
    let empty = || Apply { job, user: user.to_owned(), more: true, ..Default::default() };
    let Apply { again, resolves, from, me, brief, pair, .. } = first;
    let mut frames = vec![Apply { again, resolves, from, me, brief, pair, ..empty() }];
    frames.extend(first.aliases.chunks(ELSEWHERE_MAX).map(|some| Apply { aliases: some.to_vec(), ..empty() }));
    if frames.len() > 1 {
        frames.push(empty());
    }
    if !elsewhere.is_empty() {
        frames.extend(elsewhere.chunks(ELSEWHERE_MAX).map(|some| Apply { elsewhere: some.to_vec(), ..empty() }));
        frames.push(empty());
    }
    let mut bytes = 0;
    for change in changes {
        // With the field's tag and length.
        let length = change.encoded_len() + 8;
        if bytes > 0 && bytes + length > APPLY_BYTES_MAX {
            frames.push(empty());
            bytes = 0;
        }
        bytes += length;
        if let Some(last) = frames.last_mut() {
            last.changes.push(change);
        }
    }
    if let Some(last) = frames.last_mut() {
        last.more = false;
    }
    frames.into_iter().map(|frame| Kind::Apply(frame).into()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{CHANGE_BYTES_MAX, MESSAGE_GUID_BYTES_MAX, USER_BYTES_MAX};
    use crate::wire::frame;

    #[test]
    fn a_job_of_any_changes_fits_into_frames() {
        let user = "u".repeat(USER_BYTES_MAX);
        let guid = "g".repeat(MESSAGE_GUID_BYTES_MAX);
        let one = proto::Elsewhere {
            mailbox_guid: vec![1; 16],
            uid: u32::MAX,
            guid,
            moved: true,
            here: u32::MAX,
            alone: false,
            server: "s".repeat(change::SERVER_BYTES_MAX),
        };
        let elsewhere = vec![one; 1_000];
        for length in [10, 1_000, 30_000, CHANGE_BYTES_MAX - 8] {
            let change = Change { user: "x".repeat(length), ..Default::default() };
            assert!(change.encoded_len() <= CHANGE_BYTES_MAX);
            let frames =
                apply_frames(u64::MAX, &user, Apply::default(), elsewhere.clone(), std::iter::repeat_n(change, 64));
            let (mut changes, mut others) = (0, 0);
            for (at, frame) in frames.iter().enumerate() {
                frame::encode(frame).unwrap();
                let Some(Kind::Apply(apply)) = &frame.kind else { panic!() };
                assert_eq!(apply.more, at + 1 < frames.len());
                changes += apply.changes.len();
                others += apply.elsewhere.len();
            }
            assert_eq!((changes, others), (64, elsewhere.len()));
        }
    }
}
