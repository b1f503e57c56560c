//! What there is of a user, as digests or messages: the answers to a [`Survey`].
//!
//! Changes nothing, but what opening a mailbox does (a maildir's new files are taken in). Memory is bounded by a frame.
use std::io::{Read, Write};

use prost::Message as _;

use super::apart::{self, FLAGS};
use super::apply::{locate, printable, Failure};
use super::body::Link;
use super::connection::Connection;
use super::job::{check_asker, end_question};
use super::name;
use super::storage::{Result, Storage};
use crate::compare::digest::Digest;
use crate::compare::Message;
use crate::wire::proto::{self, frame::Kind, MailboxDigest, MessageDigest, RangeDigest, Survey, Surveyed, UidRange};

/// Ranges and messages in one answer: with GUIDs and keywords of any length they are split further.
const ANSWER_BYTES_MAX: usize = 48_000;
const GONE: &str = "it was renamed or deleted just now";

type Outcome = std::result::Result<(), Failure>;

/// Answers. False if that failed; fails only if the connection cannot be used any more.
pub fn survey<S: Storage, C: Read + Write>(
    storage: &mut S,
    connection: &mut Connection<C>,
    survey: &Survey,
) -> Link<bool> {
    storage.applying(&[]);
    let mut answers = Answers { connection, survey, next: Surveyed::default(), bytes: 0 };
    let outcome = answer(storage, &mut answers, survey).and_then(|()| Ok(answers.flush()?));
    let error = end_question(storage, connection, outcome)?;
    let is_done = error.is_empty();
    connection.send(Kind::Surveyed(Surveyed { job: survey.job, error, ..Default::default() }))?;
    Ok(is_done)
}

/// What is said, a frame at a time.
struct Answers<'a, C> {
    connection: &'a mut Connection<C>,
    survey: &'a Survey,
    next: Surveyed,
    bytes: usize,
}

impl<C: Read + Write> Answers<'_, C> {
    fn room_for(&mut self, bytes: usize) -> Link<&mut Surveyed> {
        if self.bytes > 0 && self.bytes + bytes > ANSWER_BYTES_MAX {
            self.flush()?;
        }
        self.bytes += bytes + 8;
        Ok(&mut self.next)
    }

    fn flush(&mut self) -> Link<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        self.bytes = 0;
        let next = std::mem::take(&mut self.next);
        let Survey { job, bodies, .. } = *self.survey;
        self.connection.send(Kind::Surveyed(Surveyed { job, bodies, more: true, ..next }))
    }
}

fn answer<S: Storage, C: Read + Write>(storage: &mut S, answers: &mut Answers<C>, survey: &Survey) -> Outcome {
    let peers = check_asker(storage, &survey.user, &survey.asker)?;
    answers.room_for(peers.encoded_len())?.peers = Some(peers.clone());
    match &survey.mailbox {
        None => answer_list(storage, answers),
        Some(mailbox) => answer_ranges(storage, answers, mailbox, survey),
    }
}

fn answer_list<S: Storage, C: Read + Write>(storage: &mut S, answers: &mut Answers<C>) -> Outcome {
    let namespace = storage.namespace()?;
    for listed in storage.mailboxes(i64::MAX)? {
        let Some(path) = name::path(&listed.vname, &namespace) else { continue };
        // Deleted meanwhile, if not.
        if !storage.open(&listed.vname, true)? {
            continue;
        }
        let status = storage.status();
        let mut digest = Digest::default();
        for uid in storage.uids()? {
            message(storage, uid, false)?.iter().for_each(|message| digest.add(message));
        }
        storage.close();
        let mailbox = proto::Mailbox {
            guid: status.guid.to_vec(),
            path,
            uid_validity: status.uid_validity,
            uid_next: status.uid_next,
            highest_modseq: 0,
        };
        let (messages, digest) = (digest.messages(), digest.value());
        let found = MailboxDigest { mailbox: Some(mailbox), messages, digest, ..Default::default() };
        answers.room_for(found.encoded_len())?.mailboxes.push(found);
    }
    for subscribed in storage.subscribed(i64::MAX)? {
        let Some(path) = name::path(&subscribed.vname, &namespace) else { continue };
        let name = proto::Name { path };
        answers.room_for(name.encoded_len())?.subscribed.push(name);
    }
    Ok(())
}

fn answer_ranges<S: Storage, C: Read + Write>(
    storage: &mut S,
    answers: &mut Answers<C>,
    mailbox: &proto::Mailbox,
    survey: &Survey,
) -> Outcome {
    let Some(vname) = locate(storage, mailbox)? else {
        return Err(GONE.to_string().into());
    };
    if !storage.open(&vname, true)? {
        return Err(GONE.to_string().into());
    }
    let uids = storage.uids()?;
    let in_mailbox = |error: String| format!("mailbox {}: {error}", printable(&mailbox.path.join("/")));
    for range in &survey.ranges {
        let begin = uids.partition_point(|uid| *uid < range.first);
        let in_range = uids[begin..].iter().take_while(|uid| **uid <= range.last);
        let mut digest = Digest::default();
        for uid in in_range {
            let Some(message) = message(storage, *uid, survey.bodies).map_err(in_mailbox)? else { continue };
            if !survey.messages {
                digest.add(&message);
                continue;
            }
            let Message { uid, guid, flags, keywords, body } = message;
            let body = body.map_or(vec![], |hash| hash.to_vec());
            let found = MessageDigest { uid, guid, flags, keywords, body };
            answers.room_for(found.encoded_len())?.messages.push(found);
        }
        if !survey.messages {
            let range = UidRange { first: range.first, last: range.last };
            let found = RangeDigest { range: Some(range), messages: digest.messages(), digest: digest.value() };
            answers.room_for(found.encoded_len())?.ranges.push(found);
        }
    }
    storage.close();
    Ok(())
}

/// None: it is gone.
fn message<S: Storage>(storage: &mut S, uid: u32, with_body: bool) -> Result<Option<Message>> {
    let Some(guid) = storage.message_guid(uid)? else { return Ok(None) };
    let Some((flags, keywords)) = storage.message_flags(uid)? else { return Ok(None) };
    let body = match with_body {
        true => match apart::hash(storage, uid, &guid)? {
            None => return Ok(None),
            hash => hash,
        },
        false => None,
    };
    Ok(Some(Message { uid, guid, flags: flags & FLAGS, keywords, body }))
}
