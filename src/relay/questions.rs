//! Questions what there is of a user, and requests to tell of it: a peer's, and those of our own comparisons.
//!
//! Workers answer them when nothing else is to be done. Guarantees that an answer holds for one moment at which nothing of the
//! user was on its way to or from the peer that asks, or is an error; that no more than some of the workers are busy with
//! answers; and that what is told is told as one, between the user's other changes. Bounded by what a peer may ask at once.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use mio::Token;
use prost::Message;

use super::engine::{Close, Engine};
use super::order::Release;
use super::workers::{Task, Worker};
use crate::change::{self, GUID_BYTES, RANGES_MAX};
use crate::journal::JournalError;
use crate::wire::proto::frame::Kind;
use crate::wire::proto::{self, Answer, Looked, Question, Survey, Surveyed, Tell, TellOf};

/// Questions of one peer that wait.
const PER_PEER_MAX: usize = 64;
/// How long a question waits until nothing of the user is on its way any more.
const WAIT_MS_MAX: u64 = 60_000;
/// Between two looks whether that is so.
const POLL_MS: u64 = 50;
/// What is answered to one question.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// What one request to tell may have; and what we ask for, so that a peer never finds it too much.
const TELL_BYTES_MAX: usize = 16 << 20;
const TELL_BYTES_ASKED: usize = TELL_BYTES_MAX / 2;
/// Of bodies that ride along with what one request tells, so much at most, and this part of the journal's size.
const INLINE_BYTES_MAX: u64 = 8 << 20;
const INLINE_SHARE: u64 = 64;
/// Looks do not wait for the peers: nothing rides along with what they find while the journal is filled to more than this part.
const LOOKS_SHARE: u64 = 8;
/// Changes came in the middle of so many answers: the next one is an error.
const TRIES_MAX: u32 = 50;

const BUSY: &str = "changes of the user are still under way";

/// Who wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// A peer, over this connection, and its number for it.
    Peer(usize, Token, u64),
    /// The comparison with this number.
    Own(u64),
}

/// What is wanted.
#[derive(Clone, Debug)]
pub enum Wanted {
    Survey(Survey),
    Tell(Tell),
    /// Who the users are.
    Users,
}

/// Why there is no answer.
pub struct Unanswered {
    pub error: String,
    /// The worker went away: another one may have it.
    pub is_gone: bool,
}

impl From<String> for Unanswered {
    fn from(error: String) -> Unanswered {
        Unanswered { error, is_gone: false }
    }
}

impl From<&str> for Unanswered {
    fn from(error: &str) -> Unanswered {
        error.to_owned().into()
    }
}

/// Empty: there is none.
fn said(error: &str) -> Result<(), Unanswered> {
    match error {
        "" => Ok(()),
        error => Err(change::printable(error).into()),
    }
}

/// A question.
pub struct Job {
    asker: Asker,
    user: Arc<str>,
    /// Nothing of him must be on its way to or from it.
    peer: usize,
    wanted: Wanted,
    due_ms: u64,
    until_ms: u64,
    tries: u32,
}

/// What a worker answers.
pub struct AnswerJob {
    id: u64,
    job: Job,
    generation: u64,
    surveyed: Vec<Surveyed>,
    users: Vec<String>,
    bytes: usize,
}

impl AnswerJob {
    fn is_telling(&self) -> bool {
        matches!(self.job.wanted, Wanted::Tell(_))
    }
}

/// A request to tell, as far as it has come.
#[derive(Default)]
struct Collecting {
    mailboxes: Vec<TellOf>,
    bytes: usize,
}

/// See the module.
#[derive(Default)]
pub struct Questions {
    line: VecDeque<Job>,
    /// Parts of requests that are not all there yet.
    collecting: HashMap<(usize, u64), Collecting>,
    /// Of users who are compared: how often something of them was changed.
    watched: HashMap<Arc<str>, u64>,
    /// Users of whom something is told just now.
    telling: Vec<Arc<str>>,
}

impl Questions {
    /// Counts the user's changes from now on.
    pub fn watch(&mut self, user: &Arc<str>) -> u64 {
        *self.watched.entry(user.clone()).or_default()
    }

    pub fn forget(&mut self, user: &str) {
        self.watched.remove(user);
    }

    /// Something of the user was changed here.
    pub fn note_change(&mut self, user: &str) {
        if let Some(generation) = self.watched.get_mut(user) {
            *generation += 1;
        }
    }

    pub fn is_telling(&self, user: &str) -> bool {
        self.telling.iter().any(|telling| **telling == *user)
    }

    /// When a question is to be looked at although nothing else happened.
    pub fn wake_up_ms(&self, now_ms: u64) -> Option<u64> {
        self.line.iter().map(|job| job.due_ms).filter(|due_ms| *due_ms > now_ms).min()
    }
}

impl Engine {
    /// Whether nothing of the user is on its way to or from the peer.
    pub fn is_settled(&mut self, user: &str, peer: usize) -> bool {
        if self.work.has(user) || self.heals.has(user) || self.redos.has(user) || self.order.holds(user) {
            return false;
        }
        match self.first_pending_of_user(user, peer) {
            Ok(first) => first.is_none(),
            Err(error) => {
                self.fail(error);
                false
            }
        }
    }

    /// The first change of the user that the peer has not acknowledged.
    pub fn first_pending_of_user(&self, user: &str, peer: usize) -> Result<Option<u64>, JournalError> {
        self.journal.first_pending_of(&self.peers[peer].name, Some(user), 0, i64::MAX as u64)
    }

    /// A peer asks.
    pub fn take_question(&mut self, index: usize, question: Question) -> Result<(), Close> {
        let Some(token) = self.peers[index].link.as_ref().map(|link| link.token) else { return Ok(()) };
        let Question { id, survey, tell } = question;
        let asker = Asker::Peer(index, token, id);
        let wanted = match (survey, tell) {
            (Some(survey), None) => Wanted::Survey(survey),
            (None, Some(tell)) => match self.collect_tell(index, id, tell)? {
                Some(whole) => Wanted::Tell(whole),
                None => return Ok(()),
            },
            _ => return Err(Close::Malformed("it asked for nothing, or for two things at once".into())),
        };
        let user = match &wanted {
            Wanted::Survey(survey) => &survey.user,
            Wanted::Tell(tell) => &tell.user,
            Wanted::Users => return Ok(()),
        };
        change::check_user(user).map_err(|error| Close::Malformed(error.to_string()))?;
        if let Wanted::Survey(survey) = &wanted {
            check_survey(survey)?;
        }
        let user: Arc<str> = user.as_str().into();
        let is_of_peer = |job: &&Job| matches!(job.asker, Asker::Peer(peer, ..) if peer == index);
        if self.questions.line.iter().filter(is_of_peer).count() >= PER_PEER_MAX {
            if let Some(link) = &mut self.peers[index].link {
                // Not in the lane of bodies, whose length nobody limits but by not answering.
                let error = "it is asked too much at once".into();
                link.session.control(Kind::Answer(Answer { id, error, ..Default::default() }));
            }
            return Ok(());
        }
        self.want_answer(asker, user, index, wanted);
        Ok(())
    }

    fn collect_tell(&mut self, index: usize, id: u64, mut tell: Tell) -> Result<Option<Tell>, Close> {
        let collecting = &mut self.questions.collecting;
        let whole = collecting.entry((index, id)).or_default();
        whole.bytes += tell.encoded_len();
        whole.mailboxes.append(&mut tell.mailboxes);
        let is_too_much = whole.bytes > TELL_BYTES_MAX;
        if is_too_much || collecting.keys().filter(|(peer, _)| *peer == index).count() > PER_PEER_MAX {
            return Err(Close::Malformed("it wants too much to be told".into()));
        }
        if tell.more {
            return Ok(None);
        }
        Ok(collecting.remove(&(index, id)).map(|whole| Tell { mailboxes: whole.mailboxes, ..tell }))
    }

    pub fn want_answer(&mut self, asker: Asker, user: Arc<str>, peer: usize, wanted: Wanted) {
        let (due_ms, until_ms) = (self.now_ms, self.now_ms + WAIT_MS_MAX);
        self.questions.line.push_back(Job { asker, user, peer, wanted, due_ms, until_ms, tries: 0 });
    }

    /// The peer is gone, and what it asked with it.
    pub fn questions_without(&mut self, index: usize) {
        self.questions.line.retain(|job| !matches!(job.asker, Asker::Peer(peer, ..) if peer == index));
        self.questions.collecting.retain(|(peer, _), _| *peer != index);
    }

    /// Nobody waits for the comparison's answers any more.
    pub fn forget_questions_of(&mut self, run: u64) {
        self.questions.line.retain(|job| job.asker != Asker::Own(run));
    }

    /// Gives questions to workers that have nothing else to do.
    pub fn dispatch_questions(&mut self) {
        let most = (self.config.workers / 2).max(1);
        while self.workers.iter().filter(|worker| matches!(worker.task, Task::Answer(_))).count() < most {
            let Some(index) = self.workers.iter().position(Worker::may_work) else { return };
            let Some(job) = self.next_question() else { return };
            if let Err(error) = self.begin_answer(index, job) {
                return self.fail(error);
            }
        }
    }

    fn next_question(&mut self) -> Option<Job> {
        let now_ms = self.now_ms;
        for _ in 0..self.questions.line.len() {
            let mut job = self.questions.line.pop_front()?;
            if matches!(job.asker, Asker::Peer(peer, ..) if self.is_loaded(peer)) {
                // It is to read what it has asked for before.
                self.questions.line.push_back(job);
                continue;
            }
            let is_due = job.due_ms <= now_ms;
            let is_busy = || self.work.is_busy(&job.user) || self.heals.is_running(&job.user);
            let may_go = match job.wanted {
                _ if !is_due => false,
                Wanted::Users => true,
                Wanted::Tell(_) => !is_busy() && !self.redos.has(&job.user) && !self.questions.is_telling(&job.user),
                Wanted::Survey(_) => self.is_settled(&job.user.clone(), job.peer),
            };
            if may_go {
                return Some(job);
            }
            if is_due {
                if job.until_ms <= now_ms {
                    self.answer(job.asker, Err(BUSY.into()));
                    continue;
                }
                job.due_ms = now_ms + POLL_MS;
            }
            self.questions.line.push_back(job);
        }
        None
    }

    fn inline_bytes(&self) -> u64 {
        INLINE_BYTES_MAX.min(self.config.journal_bytes_max / INLINE_SHARE)
    }

    /// The same for what a look finds.
    pub fn inline_bytes_of_look(&self) -> u64 {
        match self.journal.bytes() < self.config.journal_bytes_max / LOOKS_SHARE {
            true => self.inline_bytes(),
            false => 0,
        }
    }

    fn begin_answer(&mut self, index: usize, mut job: Job) -> Result<(), JournalError> {
        self.last_job += 1;
        let id = self.last_job;
        let asker = match job.asker {
            Asker::Peer(peer, ..) => self.peers[peer].name.clone(),
            Asker::Own(_) => String::new(),
        };
        let frames: Vec<Kind> = match &mut job.wanted {
            Wanted::Survey(survey) => {
                let mut survey = Survey { job: id, asker, ..survey.clone() };
                if let Some(mailbox) = &mut survey.mailbox {
                    mailbox.guid = self.lists.canonical(&job.user, &mailbox.guid).to_vec();
                }
                vec![Kind::Survey(survey)]
            }
            Wanted::Tell(tell) => {
                let tell = Tell { job: id, asker, inline_bytes: self.inline_bytes(), ..std::mem::take(tell) };
                tell_frames(tell).into_iter().map(Kind::Tell).collect()
            }
            Wanted::Users => vec![Kind::Look(proto::Look { job: id, users: true, ..Default::default() })],
        };
        if matches!(job.wanted, Wanted::Tell(_)) {
            self.questions.telling.push(job.user.clone());
            self.order.look_begins(&job.user);
        }
        let generation = self.questions.watch(&job.user);
        let answer = AnswerJob { id, job, generation, surveyed: vec![], users: vec![], bytes: 0 };
        self.workers[index].task = Task::Answer(Box::new(answer));
        let Some(token) = self.workers[index].token else { return Ok(()) };
        for frame in frames {
            self.send(token, &frame.into());
        }
        Ok(())
    }

    pub fn worker_surveyed(&mut self, index: usize, mut surveyed: Surveyed) -> Result<(), Close> {
        let Task::Answer(answer) = &mut self.workers[index].task else {
            return Err(Close::Malformed("it answers what it was not asked".into()));
        };
        if surveyed.job != answer.id || !matches!(answer.job.wanted, Wanted::Survey(_)) {
            return Err(Close::Malformed("it answers what it was not asked".into()));
        }
        let (more, outcome, user) = (surveyed.more, said(&surveyed.error), answer.job.user.clone());
        let peers = surveyed.peers.clone();
        answer.bytes += surveyed.encoded_len();
        if answer.bytes <= ANSWER_BYTES_MAX && more {
            for found in &mut surveyed.mailboxes {
                let guid = found.mailbox.as_ref().map_or(&[][..], |mailbox| &mailbox.guid);
                match self.journal.named_mailbox(&user, self.lists.canonical(&user, guid)) {
                    Ok(Some(known)) => (found.named_clock, found.named_by) = (known.named.clock, known.named.origin),
                    Ok(None) => {}
                    Err(error) => {
                        self.fail(error);
                        return Ok(());
                    }
                }
            }
            // Only for this server.
            answer.surveyed.push(Surveyed { job: 0, peers: None, ..surveyed });
        }
        self.take_userdb(&user, peers);
        if !more {
            self.answered(index, outcome);
        }
        Ok(())
    }

    /// What a worker tells because it was asked to, or the users that it lists.
    pub fn worker_told(&mut self, index: usize, looked: Looked) -> Result<(), Close> {
        let Task::Answer(answer) = &mut self.workers[index].task else { return Ok(()) };
        if looked.job != answer.id || matches!(answer.job.wanted, Wanted::Survey(_)) {
            return Err(Close::Malformed("it tells what it was not asked".into()));
        }
        answer.users.extend(looked.users);
        let user = answer.job.user.clone();
        if let Some(told) = looked.change.filter(|_| answer.is_telling()) {
            change::check_change(&told).map_err(|error| Close::Malformed(error.to_string()))?;
            if told.user != *user {
                return Err(Close::Malformed("it tells of another user than it was asked".into()));
            }
            self.ship_all(vec![Release { user, change: Some(told), spans: Vec::new(), ack: None }]);
        }
        if !looked.more {
            self.answered(index, said(&looked.error));
        }
        Ok(())
    }

    /// The worker has said all, or went away.
    pub fn answered(&mut self, index: usize, outcome: Result<(), Unanswered>) {
        if !matches!(self.workers[index].task, Task::Answer(_)) {
            return;
        }
        let Task::Answer(answer) = std::mem::take(&mut self.workers[index].task) else { return };
        let is_telling = answer.is_telling();
        let AnswerJob { mut job, generation, surveyed, users, bytes, .. } = *answer;
        let user = job.user.clone();
        if is_telling {
            self.questions.telling.retain(|telling| *telling != user);
            let mut released = Vec::new();
            self.order.look_ends(&user, self.now_ms, &self.spans, &mut released);
            self.ship_all(released);
        }
        if outcome.is_ok() {
            self.poison.note_job();
        }
        let is_survey = matches!(job.wanted, Wanted::Survey(_));
        if is_survey && outcome.is_ok() {
            let was_quiet = self.questions.watch(&user) == generation && self.is_settled(&user, job.peer);
            if !was_quiet {
                job.tries += 1;
                job.due_ms = self.now_ms + POLL_MS;
                if job.tries >= TRIES_MAX || job.until_ms <= self.now_ms {
                    return self.answer(job.asker, Err(BUSY.into()));
                }
                return self.questions.line.push_back(job);
            }
        }
        if bytes > ANSWER_BYTES_MAX {
            return self.answer(job.asker, Err("there is too much to answer at once".into()));
        }
        let users = Surveyed { subscribed: vec![proto::Name { path: users }], ..Default::default() };
        let said = match job.wanted {
            Wanted::Users => vec![users],
            _ => surveyed,
        };
        self.answer(job.asker, outcome.map(|()| said));
        self.forget_watched(&user);
    }

    /// Of whom nobody asks any more.
    fn forget_watched(&mut self, user: &Arc<str>) {
        let is_his = |job: &Job| job.user == *user;
        let is_asked = self.questions.line.iter().any(is_his)
            || self.workers.iter().any(|worker| matches!(&worker.task, Task::Answer(answer) if is_his(&answer.job)));
        if !is_asked && !self.comparisons.is_running(user) {
            self.questions.forget(user);
        }
    }

    fn answer(&mut self, asker: Asker, outcome: Result<Vec<Surveyed>, Unanswered>) {
        let (index, token, id) = match asker {
            Asker::Own(run) => return self.ours_are_known(run, outcome),
            Asker::Peer(index, token, id) => (index, token, id),
        };
        if self.peers[index].link.as_ref().is_none_or(|link| link.token != token) {
            return;
        }
        let (said, Unanswered { error, is_gone }) = match outcome {
            Ok(said) => (said, "".into()),
            Err(why) => (Vec::new(), why),
        };
        self.count_if_foreign(&error);
        let Some(link) = self.peers[index].link.as_mut() else { return };
        for surveyed in said {
            let surveyed = Some(surveyed);
            link.session.bulk(Kind::Answer(Answer { id, more: true, surveyed, ..Default::default() }));
        }
        link.session.bulk(Kind::Answer(Answer { id, error, gone: is_gone, ..Default::default() }));
    }
}

/// Ranges in order, so that each message is read once.
fn check_survey(survey: &Survey) -> Result<(), Close> {
    let in_order = survey.ranges.windows(2).all(|two| two[0].last < two[1].first);
    let are_ranges = survey.ranges.iter().all(|range| range.first <= range.last);
    if survey.ranges.len() > RANGES_MAX || !in_order || !are_ranges {
        return Err(Close::Malformed("it asked for ranges of UIDs that are none".into()));
    }
    let Some(mailbox) = &survey.mailbox else { return Ok(()) };
    if mailbox.guid.len() != GUID_BYTES {
        return Err(Close::Malformed("it asked for a mailbox without a GUID".into()));
    }
    change::check_path(&mailbox.path).map_err(|error| Close::Malformed(error.to_string()))
}

/// Bytes of one frame with a part of a request.
const FRAME_BYTES_MAX: usize = 48_000;

/// As much as is asked for at once. The comparison behind it finds the rest.
pub fn at_once(parts: impl Iterator<Item = TellOf>) -> Vec<TellOf> {
    let mut bytes = 0;
    let fits = |of: &TellOf| {
        bytes += of.encoded_len() + 8;
        bytes <= TELL_BYTES_ASKED
    };
    parts.take_while(fits).collect()
}

/// The request in parts that fit into frames. One mailbox may be in several.
pub fn tell_frames(mut tell: Tell) -> Vec<Tell> {
    let mailboxes = std::mem::take(&mut tell.mailboxes);
    let empty = || Tell { more: true, ..tell.clone() };
    let mut frames = vec![empty()];
    let mut bytes = 0;
    for of in mailboxes.into_iter().flat_map(pieces) {
        let length = of.encoded_len() + 8;
        if bytes > 0 && bytes + length > FRAME_BYTES_MAX {
            frames.push(empty());
            bytes = 0;
        }
        bytes += length;
        if let Some(last) = frames.last_mut() {
            last.mailboxes.push(of);
        }
    }
    if let Some(last) = frames.last_mut() {
        last.more = false;
    }
    frames
}

/// A part that does not fit into a frame, as keywords can be long.
fn pieces(mut of: TellOf) -> Vec<TellOf> {
    if of.encoded_len() <= FRAME_BYTES_MAX || of.flags.len() < 2 {
        return vec![of];
    }
    let flags = of.flags.split_off(of.flags.len() / 2);
    let rest = TellOf { mailbox: of.mailbox.clone(), flags, ..Default::default() };
    [of, rest].into_iter().flat_map(pieces).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame;
    use crate::wire::proto::{FlagUpdate, Mailbox, MessageRange};

    /// Flags and keywords of 64 of one mailbox's messages.
    fn part(keywords: usize) -> TellOf {
        let message = MessageRange { first_uid: 1, last_uid: 1, guid: "g".repeat(255), ..Default::default() };
        let add_keywords = vec!["k".repeat(100); keywords];
        let update = FlagUpdate { messages: vec![message], add: 1, add_keywords, ..Default::default() };
        let mailbox = Mailbox { path: vec!["INBOX".into()], ..Default::default() };
        TellOf { mailbox: Some(mailbox), flags: vec![update; 64], ..Default::default() }
    }

    fn frames_of(mailboxes: Vec<TellOf>) -> Vec<Tell> {
        let frames = tell_frames(Tell { user: "jane".into(), mailboxes, ..Default::default() });
        let last = frames.len() - 1;
        for (number, frame) in frames.iter().enumerate() {
            assert_eq!(frame.more, number != last);
            frame::encode(&Kind::Tell(frame.clone()).into()).unwrap();
        }
        frames
    }

    #[test]
    fn what_is_asked_for_at_once_is_never_too_much_for_a_peer() {
        let many = 2 * TELL_BYTES_MAX / part(0).encoded_len();
        let asked = at_once(std::iter::repeat_with(|| part(0)).take(many));
        let frames = frames_of(asked.clone());
        let bytes: usize = frames.iter().map(Tell::encoded_len).sum();
        assert!((TELL_BYTES_MAX / 4..TELL_BYTES_MAX).contains(&bytes), "{bytes}");
        assert_eq!(frames.into_iter().flat_map(|frame| frame.mailboxes).collect::<Vec<_>>(), asked);
        assert_eq!(at_once(std::iter::once(part(0))), [part(0)]);
    }

    #[test]
    fn flags_with_many_keywords_fit_into_frames() {
        let asked = part(20);
        assert!(asked.encoded_len() > frame::PAYLOAD_BYTES_MAX);
        let flags: Vec<_> = frames_of(vec![asked.clone()])
            .into_iter()
            .flat_map(|frame| frame.mailboxes)
            .inspect(|piece| assert_eq!(piece.mailbox, asked.mailbox))
            .flat_map(|piece| piece.flags)
            .collect();
        assert_eq!(flags, asked.flags);
    }
}
