//! Tells what is here and not at a peer, as if it had been found in a log: the answers to a [`Tell`].
//!
//! Whoever has a message already knows it by its GUID, and who expunged it says so (`Save.found`). What of it holds no
//! more is not told.
use std::collections::HashMap;
use std::io::{Read, Write};

use super::apply::locate;
use super::body::Link;
use super::connection::Connection;
use super::job::{check_asker, send_spans_alone};
use super::look::{self, holding};
use super::name;
use super::storage::{Result, Storage};
use crate::change;
use crate::wire::proto::{self, frame::Kind, op::What, Change, Looked, Mailbox, Tell, TellOf, UidRange};

/// Messages in one change: the peer does as much in one piece.
const OPS_MAX: usize = 64;

/// A body that may ride along.
const BODY_BYTES_MAX: usize = 32 << 10;

/// Tells, and answers. False if that failed; fails only if the connection cannot be used any more.
pub fn tell<S: Storage, C: Read + Write>(storage: &mut S, connection: &mut Connection<C>, wanted: &Tell) -> Link<bool> {
    storage.applying(&[]);
    let mut outcome = check_asker(storage, &wanted.user, &wanted.asker).map(drop);
    let mut room = wanted.inline_bytes;
    for of in &wanted.mailboxes {
        let told = outcome.and_then(|()| tell_of(storage, &wanted.user, of, &mut room));
        for change in told.as_deref().unwrap_or_default() {
            let change = Some(change.clone());
            connection.send(Kind::Looked(Looked { job: wanted.job, more: true, change, ..Default::default() }))?;
        }
        outcome = told.map(drop);
    }
    storage.close_user();
    send_spans_alone(storage, connection)?;
    let is_done = outcome.is_ok();
    let error = outcome.err().unwrap_or_default().chars().take(1000).collect();
    connection.send(Kind::Looked(Looked { job: wanted.job, error, ..Default::default() }))?;
    Ok(is_done)
}

/// `room`: bytes of bodies that may ride along.
fn tell_of<S: Storage>(storage: &mut S, user: &str, of: &TellOf, room: &mut u64) -> Result<Vec<Change>> {
    let named = of.mailbox.clone().unwrap_or_default();
    if of.subscribed {
        let mailbox = Mailbox { path: named.path, ..Default::default() };
        let what = What::Subscription(proto::Subscription { subscribed: true });
        return Ok(change::split(vec![what], user, &mailbox, 0));
    }
    let Some(vname) = locate(storage, &named)? else {
        // Its deletion is told by itself.
        return Ok(Vec::new());
    };
    if !storage.open(&vname, true)? {
        return Ok(Vec::new());
    }
    let status = storage.status();
    let path = name::path(&vname, &storage.namespace()?).unwrap_or(named.path);
    let mailbox = Mailbox {
        guid: status.guid.to_vec(),
        path,
        uid_validity: status.uid_validity,
        uid_next: status.uid_next,
        highest_modseq: status.highest_modseq,
    };
    let mut changes = Vec::new();
    if !of.was.is_empty() {
        let rename = What::Rename(proto::MailboxRename { new_path: mailbox.path.clone(), back: vec![] });
        let was = Mailbox { path: of.was.clone(), ..mailbox.clone() };
        changes.extend(change::split(vec![rename], user, &was, 0));
    }
    if of.create {
        let create = What::Create(proto::MailboxCreate { had_mail: status.uid_next > 1, ..Default::default() });
        let made = Mailbox { uid_next: 0, highest_modseq: 0, ..mailbox.clone() };
        changes.extend(change::split(vec![create], user, &made, 0));
    }
    let mut ops = saves(storage, &of.saves, room)?;
    for update in &of.flags {
        ops.extend(holding(storage, &update.messages, update)?.into_iter().map(What::Flags));
    }
    if ops.is_empty() {
        // UIDNEXT is what it is.
        ops.push(change::nothing());
    }
    storage.close();
    // Only the last says how the mailbox is behind all.
    let before = Mailbox { uid_next: 0, highest_modseq: 0, ..mailbox.clone() };
    while ops.len() > OPS_MAX {
        let rest = ops.split_off(OPS_MAX);
        changes.extend(change::split(std::mem::replace(&mut ops, rest), user, &before, 0));
    }
    changes.extend(change::split(ops, user, &mailbox, 0));
    Ok(changes)
}

fn saves<S: Storage>(storage: &mut S, ranges: &[UidRange], room: &mut u64) -> Result<Vec<What>> {
    if ranges.is_empty() {
        return Ok(Vec::new());
    }
    let uids = storage.uids()?;
    // Of copies inside of the mailbox, a GUID does not say which is meant.
    let mut times: HashMap<String, u32> = HashMap::new();
    for uid in &uids {
        if let Some(guid) = storage.message_guid(*uid)? {
            *times.entry(guid).or_default() += 1;
        }
    }
    let mut saves = Vec::new();
    for uid in uids.into_iter().filter(|uid| ranges.iter().any(|range| (range.first..=range.last).contains(uid))) {
        let Some((flags, keywords)) = storage.message_flags(uid)? else { continue };
        let Some(save) = look::save(storage, uid, flags as u8)? else { continue };
        let found = times.get(&save.guid) == Some(&1);
        let mut save = proto::Save { keywords, found, ..save };
        if let Some(body) = small_body(storage, uid, &save, *room) {
            *room -= body.len() as u64;
            save = proto::Save { size: body.len() as u64, body_inline: true, body, ..save };
        }
        saves.push(What::Save(save));
    }
    Ok(saves)
}

/// The bytes of a message that may ride along; the others are fetched one by one, each with a commit of its own. One that cannot be
/// read is left to that: it says why.
fn small_body<S: Storage>(storage: &mut S, uid: u32, save: &proto::Save, room: u64) -> Option<Vec<u8>> {
    let most = usize::try_from(room).unwrap_or(usize::MAX).min(BODY_BYTES_MAX);
    if save.size > most as u64 || most < BODY_BYTES_MAX || !storage.body_open(uid, &save.guid).unwrap_or(false) {
        return None;
    }
    let mut body = vec![0; BODY_BYTES_MAX + 1];
    let mut length = 0;
    let outcome = loop {
        match storage.body_read(&mut body[length..]) {
            Ok(0) => break Ok(()),
            Ok(read) => length += read,
            Err(error) => break Err(error),
        }
        if length > BODY_BYTES_MAX {
            break Ok(());
        }
    };
    storage.body_close();
    body.truncate(length);
    (outcome.is_ok() && length <= BODY_BYTES_MAX).then_some(body)
}
