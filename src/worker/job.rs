//! The jobs that a relay gives, one after another.
use std::io::{Read, Write};
use std::time::Duration;

use super::apply::{Apply, Committed, Failure};
use super::body::{self, Link};
use super::connection::Connection;
use super::elsewhere::Elsewhere;
use super::look::{self, Wanted};
use super::storage::{self, Storage};
use super::{compare, tell};
use crate::change::{ELSEWHERE_MAX, NO_PEER};
use crate::time::{Clocks, Time};
use crate::wire::proto::{self, frame::Kind};

/// Changes in one job at most, over all of its frames.
const CHANGES_MAX: usize = 10_000;
/// Bytes of their frames at most.
const CHANGES_BYTES_MAX: usize = 64 << 20;
/// Spans are reported while a job goes on when they have waited that long, or are that many.
const SPANS_DELAY_MAX: Duration = Duration::from_millis(20);
/// Also the most that fit into a frame, each with the changes that it belongs to.
const SPANS_MAX: usize = 32;
/// Changes named by the spans of one frame at most.
const SPANS_APPLIED_MAX: usize = 512;
/// Conflicts told in one frame at most, each with its mailbox's name.
const CONFLICTS_MAX: usize = 32;

pub const ERROR_CHARS_MAX: usize = 1000;

/// What a connection has asked for so far.
pub struct Jobs {
    time: Box<dyn Time>,
    /// Frames of an Apply that are not all there yet.
    collecting: Option<Collecting>,
    /// Frames of a Look, the same.
    wanted: Option<Wanted>,
    /// And of a Tell.
    telling: Option<proto::Tell>,
    next_body: u64,
    has_failed: bool,
}

struct Collecting {
    job: u64,
    user: String,
    from: String,
    changes: Vec<proto::Change>,
    bytes: usize,
    resolves: bool,
    me: String,
    is_pair: bool,
    again: Vec<u64>,
    elsewhere: Vec<proto::Elsewhere>,
    aliases: Vec<proto::Alias>,
    error: Option<String>,
    is_brief: bool,
}

impl Default for Jobs {
    fn default() -> Jobs {
        Jobs::new(Box::new(Clocks::default()))
    }
}

impl Jobs {
    pub fn new(time: Box<dyn Time>) -> Jobs {
        Jobs { time, collecting: None, wanted: None, telling: None, next_body: 0, has_failed: false }
    }

    /// One failed: the relay gives this worker nothing more. Dovecot may have left a lock where nobody looks for it: that of a
    /// maildir which was renamed while it was taken is held for as long as this process lives.
    pub fn has_failed(&self) -> bool {
        self.has_failed
    }

    /// Does what the frame asks for. Fails only if the connection cannot be used any more.
    pub fn handle<S: Storage, C: Read + Write>(
        &mut self,
        storage: &mut S,
        connection: &mut Connection<C>,
        kind: Kind,
    ) -> Link<()> {
        storage.wait_briefly(false);
        match kind {
            Kind::Apply(apply) => {
                if let Some(whole) = self.collect(apply) {
                    let answer = self.apply(storage, connection, whole)?;
                    crate::guard::provoke("worker");
                    self.has_failed |= !answer.error.is_empty();
                    send_applied(storage, connection, answer)?;
                }
                Ok(())
            }
            Kind::Look(look) => match self.collect_look(look) {
                Some(wanted) => {
                    storage.wait_briefly(wanted.is_brief);
                    let now_secs = (self.time.now_us() / 1_000_000) as i64;
                    self.has_failed |= !look::look(storage, connection, &wanted, now_secs)?;
                    Ok(())
                }
                None => Ok(()),
            },
            Kind::BodyRequest(request) => {
                storage.applying(&[]);
                body::serve(storage, connection, &request)?;
                send_spans_alone(storage, connection)
            }
            Kind::Survey(survey) => {
                self.has_failed |= !compare::survey(storage, connection, &survey)?;
                Ok(())
            }
            Kind::Tell(tell) => match self.collect_tell(tell) {
                Some(whole) => {
                    self.has_failed |= !tell::tell(storage, connection, whole)?;
                    Ok(())
                }
                None => Ok(()),
            },
            // Of a body that has ended meanwhile.
            Kind::BodyChunk(_) | Kind::BodyMore(_) | Kind::BodyCancel(_) => Ok(()),
            _ => Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "unexpected kind of frame from the relay")),
        }
    }

    fn collect_look(&mut self, look: proto::Look) -> Option<Wanted> {
        let mut wanted = match self.wanted.take() {
            Some(wanted) if wanted.job == look.job => wanted,
            _ => Wanted::default(),
        };
        wanted.mailboxes.extend(look.mailboxes);
        let whole = Wanted {
            job: look.job,
            user: look.user,
            whole: look.whole,
            since: look.since,
            list_only: look.list_only,
            written_since: look.written_since,
            users: look.users,
            owner: look.owner,
            is_brief: look.brief,
            inline_bytes: look.inline_bytes,
            ..wanted
        };
        if look.more {
            self.wanted = Some(whole);
            return None;
        }
        Some(whole)
    }

    fn collect_tell(&mut self, tell: proto::Tell) -> Option<proto::Tell> {
        let mut whole = match self.telling.take() {
            Some(whole) if whole.job == tell.job => whole,
            _ => proto::Tell { mailboxes: vec![], ..tell.clone() },
        };
        whole.mailboxes.extend(tell.mailboxes);
        if tell.more {
            self.telling = Some(whole);
            return None;
        }
        Some(whole)
    }

    /// Returns the job once all of its frames are there.
    fn collect(&mut self, apply: proto::Apply) -> Option<Collecting> {
        use prost::Message;
        let bytes = apply.encoded_len();
        let mut whole = match self.collecting.take() {
            Some(whole) if whole.job == apply.job => whole,
            _ => Collecting {
                job: apply.job,
                user: apply.user.clone(),
                from: apply.from,
                changes: vec![],
                bytes: 0,
                resolves: apply.resolves,
                me: apply.me,
                is_pair: apply.pair,
                again: apply.again,
                elsewhere: vec![],
                aliases: vec![],
                error: None,
                is_brief: apply.brief,
            },
        };
        whole.bytes += bytes;
        if whole.user != apply.user {
            whole.error = Some("malformed job: of two users".into());
        }
        if whole.bytes > CHANGES_BYTES_MAX || whole.changes.len() + apply.changes.len() > CHANGES_MAX {
            whole.error = Some("malformed job: too large".into());
            whole.changes.clear();
        }
        if whole.error.is_none() {
            whole.changes.extend(apply.changes);
            whole.elsewhere.extend(apply.elsewhere);
            whole.aliases.extend(apply.aliases);
        }
        if apply.more {
            self.collecting = Some(whole);
            return None;
        }
        Some(whole)
    }

    fn apply<S: Storage, C: Read + Write>(
        &mut self,
        storage: &mut S,
        connection: &mut Connection<C>,
        mut whole: Collecting,
    ) -> Link<proto::Applied> {
        let mut answer = proto::Applied { job: whole.job, ..Default::default() };
        storage.applying(&[]);
        storage.wait_briefly(whole.is_brief);
        let result = match whole.error.take() {
            Some(error) => Err(Failure::User(error)),
            None => self.apply_changes(storage, connection, whole, &mut answer),
        };
        if let Err(Failure::User(reason) | Failure::Never(reason)) = &result {
            // Dovecot may panic over what it has open of the user then.
            let error = reason.chars().take(ERROR_CHARS_MAX).collect();
            connection.send(Kind::Applied(proto::Applied {
                job: answer.job,
                more: true,
                error,
                ..Default::default()
            }))?;
        }
        storage.close_user();
        storage.unlock_user();
        match result {
            Ok(()) => {}
            Err(Failure::User(reason)) => answer.error = reason,
            Err(Failure::Never(reason)) => (answer.error, answer.never) = (reason, true),
            Err(Failure::Link(error)) => return Err(error),
        }
        Ok(answer)
    }

    fn apply_changes<S: Storage, C: Read + Write>(
        &mut self,
        storage: &mut S,
        connection: &mut Connection<C>,
        whole: Collecting,
        answer: &mut proto::Applied,
    ) -> Result<(), Failure> {
        let Collecting { user, from, me, is_pair, changes, resolves, again, elsewhere, aliases, .. } = whole;
        if !storage.lock_user(&user)? {
            // Left behind by a relay that was killed: both would save the same mail.
            return Err("another worker still applies changes of this user".to_string().into());
        }
        if !storage.open_user(&user)? {
            return Err("unknown here".to_string().into());
        }
        let job = answer.job;
        let peers = storage.user_peers()?;
        let is_allowed = is_of(&peers, &from);
        if peers.all {
            answer.peers = Some(peers);
        } else {
            // Before what is told to them.
            connection.send(Kind::Applied(proto::Applied {
                job,
                more: true,
                peers: Some(peers),
                ..Default::default()
            }))?;
        }
        if !is_allowed {
            return Err(format!("server {from} {NO_PEER} (dovetail_peers of the userdb)").into());
        }
        let time = self.time.as_ref();
        let mut reported = time.elapsed();
        let mut unreported = Vec::new();
        let mut before = 0;
        let mut on_commit = |storage: &mut S, connection: &mut Connection<C>, committed: Committed| {
            let done = committed.done;
            unreported.extend(storage.take_spans());
            if !committed.aliases.is_empty() {
                send_job_spans(connection, job, before, std::mem::take(&mut unreported))?;
            }
            send_news(connection, job, std::mem::replace(&mut before, done), committed)?;
            if unreported.len() < SPANS_MAX && time.elapsed() < reported + SPANS_DELAY_MAX {
                return Ok(());
            }
            reported = time.elapsed();
            send_job_spans(connection, job, done, std::mem::take(&mut unreported))
        };
        let origin = changes.first().and_then(|change| change.stamp.as_ref()).map_or("", |stamp| &stamp.origin);
        let elsewhere = Elsewhere::of(elsewhere, origin);
        let mut apply =
            Apply::new(storage, connection, &user, resolves, elsewhere, &mut self.next_body, &mut on_commit)?;
        apply.again = again;
        apply.me = me;
        apply.is_pair = is_pair;
        apply.know_aliases(&aliases);
        let result = apply.run(&changes);
        answer.done = apply.done;
        answer.notes = std::mem::take(&mut apply.notes);
        answer.conflicts = std::mem::take(&mut apply.conflicts);
        answer.doubts = std::mem::take(&mut apply.doubts);
        let news = apply.take_news();
        if !news.aliases.is_empty() {
            unreported.extend(storage.take_spans());
            let spans = std::mem::take(&mut unreported);
            send_job_spans(connection, job, before, spans).map_err(Failure::Link)?;
        }
        send_news(connection, job, before, news).map_err(Failure::Link)?;
        answer.spans = unreported;
        result
    }
}

/// What the peers must be told, and what the relay must keep, is said before `done` counts what gave rise to it.
fn send_news<C: Read + Write>(connection: &mut Connection<C>, job: u64, done: u32, news: Committed) -> Link<()> {
    let empty = || proto::Applied { job, done, more: true, ..Default::default() };
    // With it the relay forgets what it knows of the mailbox's messages, and not what comes here.
    let is_reborn = |op: &proto::Op| matches!(&op.what, Some(proto::op::What::Create(create)) if create.reborn);
    let (reborn, tell): (Vec<_>, Vec<_>) = news.tell.into_iter().partition(|change| change.ops.iter().any(is_reborn));
    for change in reborn {
        connection.send(Kind::Applied(proto::Applied { changes: vec![change], ..empty() }))?;
    }
    for some in news.elsewhere.chunks(ELSEWHERE_MAX) {
        connection.send(Kind::Applied(proto::Applied { elsewhere: some.to_vec(), ..empty() }))?;
    }
    for some in news.aliases.chunks(ELSEWHERE_MAX) {
        connection.send(Kind::Applied(proto::Applied { aliases: some.to_vec(), ..empty() }))?;
    }
    for change in tell {
        connection.send(Kind::Applied(proto::Applied { changes: vec![change], ..empty() }))?;
    }
    Ok(())
}

/// Whether the user's mail is replicated with the server; no server: nobody asks for another.
pub fn is_of(peers: &proto::UserPeers, server: &str) -> bool {
    peers.all || server.is_empty() || peers.servers.iter().any(|peer| peer == server)
}

/// Opens the user for a server that asks, if it may.
pub fn check_asker<S: Storage>(storage: &mut S, user: &str, asker: &str) -> storage::Result<proto::UserPeers> {
    if !storage.open_user(user)? {
        return Err("unknown here".into());
    }
    let peers = storage.user_peers()?;
    match is_of(&peers, asker) {
        true => Ok(peers),
        false => Err(format!("server {asker} {NO_PEER} (dovetail_peers of the userdb)")),
    }
}

/// Reading may have written to logs as well.
pub fn send_spans_alone<S: Storage, C: Read + Write>(storage: &mut S, connection: &mut Connection<C>) -> Link<()> {
    for span in storage.take_spans() {
        connection.send(Kind::Record(proto::Record { spans: vec![span], ..Default::default() }))?;
    }
    Ok(())
}

/// Ends a survey or a telling: closes the user, says what was written meanwhile. What the last answer says of an error: nothing if
/// there was none.
pub fn end_question<S: Storage, C: Read + Write>(
    storage: &mut S,
    connection: &mut Connection<C>,
    outcome: Result<(), Failure>,
) -> Link<String> {
    storage.close_user();
    storage.unlock_user();
    send_spans_alone(storage, connection)?;
    match outcome {
        Ok(()) => Ok(String::new()),
        Err(Failure::User(reason) | Failure::Never(reason)) => Ok(reason.chars().take(ERROR_CHARS_MAX).collect()),
        Err(Failure::Link(error)) => Err(error),
    }
}

/// While the job goes on. They go before an alias: with that the relay forgets what it knows of a log under the old GUID, and a span
/// says that it is still the same log.
fn send_job_spans<C: Read + Write>(
    connection: &mut Connection<C>,
    job: u64,
    done: u32,
    spans: Vec<proto::Span>,
) -> Link<()> {
    send_spans(connection, proto::Applied { job, done, more: true, spans, ..Default::default() }).map(drop)
}

/// The last answer to a job; what does not fit goes ahead.
fn send_applied<S: Storage, C: Read + Write>(
    storage: &mut S,
    connection: &mut Connection<C>,
    mut answer: proto::Applied,
) -> Link<()> {
    answer.spans.extend(storage.take_spans());
    let notes = std::mem::take(&mut answer.notes);
    for some in std::mem::take(&mut answer.conflicts).chunks(CONFLICTS_MAX) {
        let (job, done, conflicts) = (answer.job, answer.done, some.to_vec());
        connection.send(Kind::Applied(proto::Applied { job, done, more: true, conflicts, ..Default::default() }))?;
    }
    let (error, never) = (std::mem::take(&mut answer.error), std::mem::take(&mut answer.never));
    for doubt in std::mem::take(&mut answer.doubts) {
        let (job, done, doubts) = (answer.job, answer.done, vec![doubt]);
        connection.send(Kind::Applied(proto::Applied { job, done, more: true, doubts, ..Default::default() }))?;
    }
    answer.more = true;
    let mut last = send_spans(connection, answer)?;
    last.more = false;
    last.never = never;
    last.error = error.chars().take(ERROR_CHARS_MAX).collect();
    last.notes = notes;
    last.notes.truncate(CHANGES_MAX / 10);
    connection.send(Kind::Applied(last))
}

/// Sends the spans in frames that are small enough; returns the answer without them.
fn send_spans<C: Read + Write>(connection: &mut Connection<C>, mut answer: proto::Applied) -> Link<proto::Applied> {
    let spans = std::mem::take(&mut answer.spans);
    let mut part = answer.clone();
    let mut applied = 0;
    for span in spans {
        let full = part.spans.len() == SPANS_MAX || applied + span.applied.len() > SPANS_APPLIED_MAX;
        if full && !part.spans.is_empty() {
            connection.send(Kind::Applied(std::mem::replace(&mut part, answer.clone())))?;
            applied = 0;
        }
        applied += span.applied.len();
        part.spans.push(span);
    }
    if !part.spans.is_empty() {
        connection.send(Kind::Applied(part))?;
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::fake::{FakeStorage, Script};

    fn collected(changes: Vec<proto::Change>) -> Collecting {
        Collecting {
            job: 1,
            user: "jane".into(),
            from: "a".into(),
            changes,
            bytes: 0,
            resolves: false,
            me: String::new(),
            is_pair: false,
            again: vec![],
            elsewhere: vec![],
            aliases: vec![],
            is_brief: false,
            error: None,
        }
    }

    #[test]
    fn that_a_log_is_of_another_mailbox_now_is_said_before_that_the_mailbox_became_it() {
        let mut storage = FakeStorage::default();
        storage.add("Work", [7; 16], 1, &[]);
        storage.spans.push(proto::Span { mailbox_guid: vec![7; 16], ..Default::default() });
        let create = proto::MailboxCreate { was: vec![vec![8; 16]], ..Default::default() };
        let mailbox = proto::Mailbox { guid: vec![7; 16], path: vec!["Work".into()], ..Default::default() };
        let stamp = proto::Stamp { origin: "a".into(), epoch: 1, seq: 1, ..Default::default() };
        let change = proto::Change {
            user: "jane".into(),
            mailbox: Some(mailbox),
            ops: vec![proto::Op { what: Some(proto::op::What::Create(create)) }],
            stamp: Some(stamp),
            ..Default::default()
        };
        let script = Script::default();
        let mut ear = script.ear();
        Jobs::default().apply(&mut storage, &mut Connection::new(script), collected(vec![change])).unwrap();
        let mut heard = Vec::new();
        while let Some(kind) = ear() {
            let Kind::Applied(applied) = kind else { continue };
            heard.extend(applied.spans.iter().map(|_| "span"));
            heard.extend(applied.aliases.iter().map(|_| "alias"));
        }
        assert_eq!(heard, ["span", "alias"]);
    }

    #[test]
    fn a_user_whom_a_left_behind_worker_still_applies_is_refused() {
        let mut storage = FakeStorage::default();
        storage.is_locked = true;
        let mut connection = Connection::new(Script::default());
        let whole = collected(vec![]);
        let answer = Jobs::default().apply(&mut storage, &mut connection, whole).unwrap();
        assert_eq!(answer.done, 0);
        assert!(answer.error.contains("another worker"), "{}", answer.error);
    }
}
