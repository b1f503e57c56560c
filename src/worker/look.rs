//! Looks at a user's mailboxes for what nobody told of: what their logs say behind the place up to which they are known,
//! which mailboxes came, went or were renamed.
//!
//! What it finds are deltas, as if they had been told. Guarantees that saves of all mailboxes are told before expunges of
//! any (a MOVE is one of each, and the expunge alone would drop the only copy), that a log counts as known only after
//! everything in it was told, and that a log which does not go on where it should is a doubt, never a guess.
use std::collections::{BTreeSet, HashMap, HashSet};
use std::io::{Read, Write};

use super::apply::locate;
use super::body::Link;
use super::connection::Connection;
use super::mark::{is_ours, moves, stale_in, Marks, Place, Stale};
use super::name;
use super::storage::{Existence, Guid, Listed, Namespace, Result, Storage, Update};
use super::tell::{is_small, let_body_ride};
use crate::change;
use crate::indexlog::{fold, Commit, Commits, Delta, Header, UidRange, What as Written};
use crate::wire::proto::{self, frame::Kind, op::What, Doubt, LookAt, Looked, Mailbox, MessageRange};

/// Bytes of a log's end that tell it from another; see `Span.tail`.
const TAIL_BYTES: usize = 64;
/// For so long after it was made, an empty mailbox is told again by each look at all that the user has.
const YOUNG_SECS: i64 = 3_600;
/// Ranges in one operation.
const RANGES_MAX: usize = 512;
/// Changes of flags in one mailbox that name the message by its GUID, too: worth opening some files, but not all.
const NAMED_MAX: usize = 1_000;
/// The log of a new dbox has no higher number: it is reset once while the mailbox is created.
const FIRST_LOG_MAX: u32 = 2;
/// Users in one frame, whatever names they have.
const USERS_MAX: usize = 50;
/// Small bodies of one mailbox that the peers fetch one by one, with a commit each.
const FETCHED_MAX: usize = 64;
/// Deltas of one look; a log with more is compared instead.
const DELTAS_MAX: usize = 1_000_000;

/// What to look at, whole.
#[derive(Default)]
pub struct Wanted {
    pub job: u64,
    pub user: String,
    pub mailboxes: Vec<LookAt>,
    pub whole: bool,
    pub since: i64,
    pub list_only: bool,
    /// Nothing if nothing was written since then; 0: always.
    pub written_since: i64,
    /// Nothing else: who the users are.
    pub users: bool,
    /// Whose mail it is; perhaps nothing else.
    pub owner: bool,
    /// Locks are waited for only briefly.
    pub is_brief: bool,
    /// Bytes of small bodies that may ride along with messages of mailboxes whose logs were not known.
    pub inline_bytes: u64,
}

impl Wanted {
    fn is_for_owner_only(&self) -> bool {
        self.owner && !self.whole && self.mailboxes.is_empty()
    }
}

/// Looks, and answers. False if that failed; fails only if the connection cannot be used any more.
pub fn look<S: Storage, C: Read + Write>(
    storage: &mut S,
    connection: &mut Connection<C>,
    wanted: &Wanted,
    now_secs: i64,
) -> Link<bool> {
    storage.applying(&[]);
    if wanted.users {
        return list_users(storage, connection, wanted.job);
    }
    let mut found = Found { room: wanted.inline_bytes, ..Found::default() };
    let outcome = find(storage, wanted, now_secs, &mut found);
    let peers = storage.user_peers().ok().filter(|_| !found.is_idle || wanted.owner);
    storage.close_user();
    let job = wanted.job;
    if peers.is_some() {
        connection.send(Kind::Looked(Looked { job, more: true, peers, ..Default::default() }))?;
    }
    if outcome.is_ok() {
        for answer in found.answers(&wanted.user) {
            connection.send(Kind::Looked(Looked { job, more: true, ..answer }))?;
        }
    }
    for span in storage.take_spans() {
        // What the look itself wrote, or found written, is in what it told.
        if outcome.is_err() || !found.covers(&span) {
            connection.send(Kind::Looked(Looked { job, more: true, spans: vec![span], ..Default::default() }))?;
        }
    }
    let error: String =
        outcome.err().or(found.later).unwrap_or_default().chars().take(super::job::ERROR_CHARS_MAX).collect();
    let is_done = error.is_empty();
    let looked_at = if wanted.whole && !found.is_idle { now_secs } else { 0 };
    connection.send(Kind::Looked(Looked { job, error, looked_at, ..Default::default() }))?;
    Ok(is_done)
}

fn list_users<S: Storage, C: Read + Write>(storage: &mut S, connection: &mut Connection<C>, job: u64) -> Link<bool> {
    let mut outcome = storage.users();
    if let Ok(users) = &mut outcome {
        users.retain(|user| change::check_user(user).is_ok());
    }
    for users in outcome.as_deref().unwrap_or_default().chunks(USERS_MAX) {
        connection.send(Kind::Looked(Looked { job, more: true, users: users.to_vec(), ..Default::default() }))?;
    }
    let is_done = outcome.is_ok();
    connection.send(Kind::Looked(Looked { job, error: outcome.err().unwrap_or_default(), ..Default::default() }))?;
    Ok(is_done)
}

/// Of somebody whom only the userdb knows. What is wrong with him is no error of ours.
fn was_written<S: Storage>(storage: &mut S, wanted: &Wanted) -> bool {
    let was = match storage.open_user(&wanted.user) {
        Ok(true) => storage.was_written_since(&wanted.user, wanted.written_since),
        Ok(false) => Ok(false),
        Err(error) => Err(error),
    };
    was.unwrap_or_else(|error| {
        log::info!("User {}, of whom nothing was told yet, is not looked at: {error}", wanted.user);
        false
    })
}

fn find<S: Storage>(storage: &mut S, wanted: &Wanted, now_secs: i64, found: &mut Found) -> Result<()> {
    if wanted.written_since != 0 && !was_written(storage, wanted) {
        found.is_idle = true;
        return Ok(());
    }
    let is_there = storage.open_user(&wanted.user)?;
    if wanted.is_for_owner_only() {
        return Ok(());
    }
    if !is_there {
        found.doubt(&LookAt::default(), "the user has mailboxes in the journal, but does not exist here (any more)");
        return Ok(());
    }
    let namespace = storage.namespace()?;
    let targets = match wanted.whole {
        true => find_in_list(storage, wanted, &namespace, found)?,
        false => wanted.mailboxes.clone(),
    };
    for target in targets.iter().filter(|_| !wanted.list_only) {
        // Of a part of a log, not the mailbox is looked at.
        let young_from = if target.until_seq == 0 { now_secs - YOUNG_SECS } else { i64::MAX };
        let missing = found.missing.len();
        find_in_log(storage, target, young_from, found)?;
        storage.close();
        if wanted.whole && found.missing.len() > missing {
            // It was listed. Who deletes it just now may not tell, and then it has to be known until a look does.
            found.missing.truncate(missing);
            found.later = Some(format!("mailbox {} is being deleted", change::printable(&target.path.join("/"))));
        }
    }
    Ok(())
}

/// Everything that was found.
#[derive(Default)]
struct Found {
    /// Of mailboxes themselves: the first to be told.
    of_list: Vec<(Mailbox, What)>,
    /// Saves and flags, mailbox by mailbox.
    of_messages: Vec<(Mailbox, Vec<What>)>,
    expunges: Vec<(Mailbox, Vec<What>)>,
    /// With the mailbox's name.
    known: Vec<(proto::Span, Vec<String>)>,
    doubts: Vec<Doubt>,
    missing: Vec<Vec<u8>>,
    /// Why there must be another look soon.
    later: Option<String>,
    /// Nothing was written, and nothing is looked at.
    is_idle: bool,
    /// Bytes of bodies that may yet ride along.
    room: u64,
}

impl Found {
    /// In the order in which they must be told.
    fn answers<'a>(&'a mut self, user: &'a str) -> impl Iterator<Item = Looked> + 'a {
        let of_list = std::mem::take(&mut self.of_list).into_iter().map(|(mailbox, what)| (mailbox, vec![what]));
        let of_messages = std::mem::take(&mut self.of_messages);
        let changes = of_list
            .chain(of_messages)
            .chain(std::mem::take(&mut self.expunges))
            .flat_map(|(mailbox, ops)| change::split(ops, user, &mailbox, 0))
            .map(|change| Looked { change: Some(change), ..Default::default() });
        let known = self.known.iter().map(|(span, path)| Looked {
            known: Some(span.clone()),
            path: path.clone(),
            ..Default::default()
        });
        let doubts = self.doubts.iter().map(|doubt| Looked { doubt: Some(doubt.clone()), ..Default::default() });
        let missing = self.missing.iter().map(|guid| Looked { missing: guid.clone(), ..Default::default() });
        changes.chain(known).chain(doubts).chain(missing)
    }

    fn covers(&self, span: &proto::Span) -> bool {
        self.known.iter().any(|(known, _)| {
            known.mailbox_guid == span.mailbox_guid
                && span.old_mailbox_guid.is_empty()
                && span.private_user.is_empty()
                && (span.log_seq, span.end) <= (known.log_seq, known.end)
        })
    }

    fn creates(&self, guid: &Guid) -> bool {
        let is_it = |(mailbox, what): &(Mailbox, What)| matches!(what, What::Create(_)) && mailbox.guid[..] == guid[..];
        self.of_list.iter().any(is_it)
    }

    fn doubt(&mut self, target: &LookAt, reason: &str) {
        self.doubts.push(doubt(target, reason));
    }
}

fn doubt(target: &LookAt, reason: &str) -> Doubt {
    Doubt { guid: target.guid.clone(), path: target.path.clone(), reason: reason.into(), ..Default::default() }
}

// ---- The list of mailboxes ------------------------------------------------------------------------------------------

/// Compares what there is with what is known; the mailboxes whose logs are to be read.
fn find_in_list<S: Storage>(
    storage: &mut S,
    wanted: &Wanted,
    namespace: &Namespace,
    found: &mut Found,
) -> Result<Vec<LookAt>> {
    let mut listed = storage.mailboxes(wanted.since)?;
    let mut elsewhere = Vec::new();
    let mut replaced = Vec::new();
    // What is below another one went before it.
    let mut known: Vec<_> = wanted.mailboxes.iter().filter(|known| !known.subscribed).collect();
    known.sort_by_key(|known| std::cmp::Reverse(known.path.len()));
    for known in known {
        if listed.iter().any(|listed| listed.guid[..] == known.guid) {
            continue;
        }
        let guid: Guid = known.guid.as_slice().try_into().map_err(|_| "malformed look: a GUID is not 16 bytes")?;
        if replaced.contains(&guid) {
            found.missing.push(known.guid.clone());
            continue;
        }
        // In another namespace, or renamed while they were listed.
        if storage.find_guid(&guid)?.is_some() {
            elsewhere.push(known.clone());
            continue;
        }
        let of_name = |listed: &Listed| name::path(&listed.vname, namespace).is_some_and(|path| path == known.path);
        if let Some(anew) = listed.iter_mut().find(|listed| of_name(listed)) {
            // Dovecot keeps the GUID of a dbox in its index, and gives it another one when it makes that anew. Or a worker gave
            // it a peer's, and was killed before it could tell; then it does so again.
            if !storage.was_deleted(&guid)? {
                if let Some(goes_on) = give_guid(storage, &anew.vname, guid, known)? {
                    replaced.push(std::mem::replace(&mut anew.guid, guid));
                    if !goes_on {
                        // What stood in the index alone is gone; Dovecot may look for the messages' files only when told to
                        // resync it.
                        found.doubt(known, "its index was made anew, perhaps without all messages and flags");
                    }
                    continue;
                }
            }
        }
        if is_half_deleted(storage, &known.path, namespace, &listed)? {
            found.later = Some(format!("mailbox {} is half deleted", change::printable(&known.path.join("/"))));
            continue;
        }
        found.missing.push(known.guid.clone());
        if known.path.is_empty() {
            // It was never told of.
            continue;
        }
        if storage.was_deleted(&guid)? {
            remove_left_directory(storage, &known.path, namespace, &listed)?;
            let mailbox = Mailbox { guid: known.guid.clone(), path: known.path.clone(), ..Default::default() };
            found.of_list.push((mailbox, What::Delete(proto::MailboxDelete::default())));
        } else {
            found.doubt(known, "the mailbox is not there any more, and Dovecot does not know that it was deleted");
        }
    }
    let mut targets = elsewhere;
    for listed in &listed {
        let Some(path) = name::path(&listed.vname, namespace) else { continue };
        let known = wanted.mailboxes.iter().find(|known| listed.guid[..] == known.guid);
        find_in_entry(listed, &path, known, found);
        let target = known.cloned().unwrap_or_else(|| LookAt { guid: listed.guid.to_vec(), ..Default::default() });
        targets.push(LookAt { path, ..target });
    }
    if wanted.since != i64::MAX {
        find_subscriptions(storage, wanted, namespace, &listed, found)?;
    }
    Ok(targets)
}

/// Whether its log goes on from where it was known with this GUID; None if the mailbox is gone.
fn give_guid<S: Storage>(storage: &mut S, vname: &str, guid: Guid, known: &LookAt) -> Result<Option<bool>> {
    if !storage.open(vname, false)? {
        return Ok(None);
    }
    let files = storage.log_files()?;
    // Of a log that nothing was heard of, nothing is lost: two processes came to a new mailbox at the same time.
    let goes_on = known.log_seq == 0 || read_log(&files, known).is_ok_and(|read| !read.rebuilt);
    storage.update(&Update { guid, ..Update::default() })?;
    storage.close();
    Ok(Some(goes_on))
}

/// A process was killed while it deleted the mailbox: nobody can open it, until Dovecot brings it back after five minutes
/// (mailbox_try_undelete()).
fn is_half_deleted<S: Storage>(
    storage: &mut S,
    path: &[String],
    namespace: &Namespace,
    listed: &[Listed],
) -> Result<bool> {
    if path.is_empty() {
        return Ok(false);
    }
    let vname = name::vname(path, namespace)?;
    let is_another = listed.iter().any(|listed| listed.vname == vname);
    Ok(!is_another && storage.existence(&vname)? == Existence::Mailbox)
}

/// Who was killed in the deletion of a mailbox may have left its directory.
fn remove_left_directory<S: Storage>(
    storage: &mut S,
    path: &[String],
    namespace: &Namespace,
    listed: &[Listed],
) -> Result<()> {
    let vname = name::vname(path, namespace)?;
    let below = format!("{vname}{}", namespace.separator);
    if !listed.iter().any(|listed| listed.vname.starts_with(&below))
        && storage.existence(&vname)? == Existence::Directory
    {
        storage.delete(&vname)?;
    }
    Ok(())
}

/// Tells the names whose subscription was changed since the last look, those that are known as subscribed and are not, and the
/// other way round: who is killed between a change and its record in Dovecot's mailbox log leaves no trace there. The log has
/// hashes of names only, so a name that is not known, not subscribed and no mailbox is not found.
fn find_subscriptions<S: Storage>(
    storage: &mut S,
    wanted: &Wanted,
    namespace: &Namespace,
    listed: &[Listed],
    found: &mut Found,
) -> Result<()> {
    let mut tell = |path: Vec<String>, subscribed: bool| {
        let mailbox = Mailbox { path, ..Default::default() };
        found.of_list.push((mailbox, What::Subscription(proto::Subscription { subscribed })));
    };
    let known = wanted.mailboxes.iter().filter(|known| known.subscribed).map(|known| known.path.clone());
    let known: BTreeSet<Vec<String>> = known.collect();
    let mut subscribed: BTreeSet<Vec<String>> = BTreeSet::new();
    for name in storage.subscribed(wanted.since)? {
        let Some(path) = name::path(&name.vname, namespace) else { continue };
        if name.subscription_changed || !known.contains(&path) {
            tell(path.clone(), true);
        }
        subscribed.insert(path);
    }
    let of_mailboxes = listed.iter().filter(|listed| listed.subscription_changed);
    let of_mailboxes = of_mailboxes.filter_map(|listed| name::path(&listed.vname, namespace));
    let maybe: BTreeSet<Vec<String>> = of_mailboxes.chain(known).collect();
    maybe.difference(&subscribed).for_each(|path| tell(path.clone(), false));
    Ok(())
}

fn find_in_entry(listed: &Listed, path: &[String], known: Option<&LookAt>, found: &mut Found) {
    let mailbox = |path: &[String]| Mailbox {
        guid: listed.guid.to_vec(),
        path: path.to_vec(),
        uid_validity: listed.uid_validity,
        ..Default::default()
    };
    match known {
        Some(known) if known.path == path => {}
        Some(known) if !known.path.is_empty() => {
            let rename = What::Rename(proto::MailboxRename { new_path: path.to_vec(), back: vec![] });
            found.of_list.push((mailbox(&known.path), rename));
        }
        // It was not told of, only perhaps of what was written to it.
        _ => {
            let create = What::Create(proto::MailboxCreate::default());
            found.of_list.push((mailbox(path), create));
        }
    }
}

// ---- One mailbox ----------------------------------------------------------------------------------------------------

/// `young_from`: a higher UIDVALIDITY is that of a mailbox that was made just now.
fn find_in_log<S: Storage>(storage: &mut S, target: &LookAt, young_from: i64, found: &mut Found) -> Result<()> {
    let named = Mailbox { guid: target.guid.clone(), path: target.path.clone(), ..Default::default() };
    let vname = match (target.path.is_empty(), Guid::try_from(target.guid.as_slice())) {
        (true, Ok(guid)) => storage.find_guid(&guid)?,
        _ => locate(storage, &named)?,
    };
    let Some(vname) = vname else {
        found.missing.push(target.guid.clone());
        return Ok(());
    };
    let path = name::path(&vname, &storage.namespace()?).unwrap_or(target.path.clone());
    let target = &LookAt { path: path.clone(), ..target.clone() };
    let named = Mailbox { path, ..named };
    // Syncs it: what was put beside Dovecot's back is in the log then.
    if !storage.open(&vname, false)? {
        found.missing.push(target.guid.clone());
        return Ok(());
    }
    // Before the log is read: what UIDNEXT is by then must be told with it.
    let status = storage.status();
    let files = storage.log_files()?;
    // All that they tell must be seen in the mailbox.
    storage.sync()?;
    let target = &LookAt { expunged_in_memory: gone(storage, target)?, ..target.clone() };
    if !target.expunged_in_memory.is_empty() {
        let expunge = proto::Expunge { messages: target.expunged_in_memory.clone() };
        let mailbox = Mailbox { uid_validity: status.uid_validity, ..named.clone() };
        found.expunges.push((mailbox, vec![What::Expunge(expunge)]));
    }
    let read = match read_log(&files, target) {
        Ok(read) => read,
        Err(reason) => {
            found.doubt(target, &reason);
            found.known.extend(known_anyway(&files, target).map(|span| (span, target.path.clone())));
            return Ok(());
        }
    };
    // Maildir: dovecot-uidlist was lost, and the messages' files were found again as new ones.
    let renumbered = read.renumbered && storage.is_torn_when_killed();
    let rebuilt = match read.rebuilt {
        true => Some(rebuilt(&read.deltas)),
        false if renumbered => Some(all_present(storage, status.uid_next)?),
        false => None,
    };
    let as_named = Mailbox { uid_validity: status.uid_validity, ..named.clone() };
    let mailbox = match target.until_seq {
        0 => Mailbox {
            uid_next: status.uid_next.max(uid_next(&read.deltas)),
            highest_modseq: status.highest_modseq,
            ..named
        },
        // What comes behind is told by others, and finds its UIDs free.
        _ => Mailbox { uid_next: uid_next(&read.deltas), ..named },
    };
    let mailbox = Mailbox { uid_validity: status.uid_validity, ..mailbox };
    if status.uid_next == 1 && i64::from(status.uid_validity) > young_from && !found.creates(&status.guid) {
        // Who was killed while it made the mailbox may have told a UIDVALIDITY, or a GUID, that another process has given anew
        // since (maildir: what is in no dovecot-uidlist yet). There may never be a message that would bring it to the peers.
        let made = Mailbox { guid: status.guid.to_vec(), ..mailbox.clone() };
        found.of_list.push((made, What::Create(proto::MailboxCreate { again: true, ..Default::default() })));
    }
    let diverged = Marks::parse(&storage.mark()?).has_diverged();
    if diverged {
        let begin = (read.known.prev_log_seq, read.known.prev_log_end);
        let expunged = do_stale(storage, &files, begin, (read.known.log_seq, read.known.end))?;
        if !expunged.is_empty() {
            let expunge = What::Expunge(proto::Expunge { messages: expunged });
            found.expunges.push((as_named, vec![expunge]));
        }
    }
    let moves: Option<Vec<(u32, u32)>> = diverged.then(|| files.iter().flat_map(|file| moves(file)).collect());
    let mut deltas = read.deltas;
    deltas.retain(|delta| !is_end_of_move(delta, moves.as_deref().unwrap_or_default()));
    if renumbered {
        // What went there is told by the peers once more.
        deltas.retain(|delta| !matches!(delta, Delta::Expunge { guid: None, .. }));
    }
    let has_come = uid_next(&deltas) > 0;
    let (mut of_messages, expunges) = operations(storage, deltas, moves.as_deref(), target.was_told)?;
    let saves = of_messages.iter_mut().filter_map(|what| match what {
        What::Save(save) => Some(save),
        _ => None,
    });
    match (rebuilt.is_some(), read.anew_at) {
        (true, _) => mark_unless_copied(storage, saves.collect())?,
        // A rebuild of an mdbox makes the indexes anew, and then puts in what no mailbox has: a look may come between.
        (_, Some(at)) if !storage.is_torn_when_killed() => {
            mark_found(storage, target, saves.filter(|save| save.received_date <= i64::from(at)).collect())?;
        }
        _ => {}
    }
    if target.log_seq == 0 {
        // As with a comparison: it may be a whole server's mail that nobody has.
        let mut left = 0;
        for what in &mut of_messages {
            let What::Save(save) = what else { continue };
            let uid = save.birth.as_ref().map_or(0, |birth| birth.uid);
            let_body_ride(storage, uid, save, &mut found.room);
            left += usize::from(!save.body_inline && is_small(save));
        }
        if left > FETCHED_MAX {
            // Nor do looks wait for the peers, as a comparison does.
            let reason = "nobody has told of its messages, and the journal has no room for so many now";
            found.doubts.push(Doubt { expected: true, ..doubt(target, reason) });
            found.known.extend(known_anyway(&files, target).map(|span| (span, target.path.clone())));
            return Ok(());
        }
    }
    match rebuilt {
        Some(rebuilt) if rebuilt.present.len() > RANGES_MAX => {
            found.doubt(target, "its index was rebuilt, and there are too many messages to tell which");
        }
        rebuilt => of_messages.extend(rebuilt.map(What::Rebuilt)),
    }
    if has_come && of_messages.is_empty() && expunges.is_empty() {
        // What came is gone, but its UIDs name nothing else.
        of_messages.push(change::nothing());
    }
    if !of_messages.is_empty() {
        found.of_messages.push((mailbox.clone(), of_messages));
    }
    let has_guid = |expunge: &proto::Expunge| expunge.messages.iter().all(|range| !range.guid_128.is_empty());
    let is_named = |what: &What| matches!(what, What::Expunge(expunge) if !diverged || has_guid(expunge));
    let (named, unnamed): (Vec<What>, Vec<What>) = expunges.into_iter().partition(is_named);
    if !named.is_empty() {
        found.expunges.push((mailbox, named));
    }
    if !unnamed.is_empty() {
        found.doubt(target, "messages were expunged, and their UIDs are not the same everywhere");
    }
    found.known.push((read.known, target.path.clone()));
    Ok(())
}

/// What clients did by UIDs from which messages had been moved. Their processes do it where these are now when the clients have
/// their answers (see follow.h), but may be killed; and what this look has read of it they do not tell any more. What was expunged.
fn do_stale<S: Storage>(storage: &mut S, files: &[Vec<u8>], begin: Place, end: Place) -> Result<Vec<MessageRange>> {
    let mut expunged = Vec::new();
    for (uid, stale) in stale_in(files, begin, end) {
        let Some(info) = storage.message_info(uid)? else { continue };
        let none = proto::FlagUpdate::default();
        match stale {
            Stale::Flags { add, remove } => {
                storage.update_flags(
                    uid,
                    uid,
                    &proto::FlagUpdate { add: add.into(), remove: remove.into(), ..none },
                )?;
            }
            Stale::Keyword { add: true, name } => {
                storage.update_flags(uid, uid, &proto::FlagUpdate { add_keywords: vec![name], ..none })?;
            }
            Stale::Keyword { name, .. } => {
                storage.update_flags(uid, uid, &proto::FlagUpdate { remove_keywords: vec![name], ..none })?;
            }
            Stale::Expunge { guid_128 } if [[0; 16], info.guid_128].contains(&guid_128) => {
                storage.expunge(uid, uid)?;
                expunged.push(MessageRange { guid: info.guid, ..one(uid) });
            }
            Stale::Expunge { .. } => continue,
        }
        let (offset, bytes) = Marks::parse(&storage.mark()?).ours();
        storage.write_mark(offset, &bytes)?;
        storage.commit()?;
    }
    Ok(expunged)
}

/// Of the messages that clients expunged in memory those that are gone, by their UIDs and hashed GUIDs. It is in no log that somebody
/// asked for it, where they might be lost as well. Who has the GUID and was not there then may be the message itself, under another UID.
fn gone<S: Storage>(storage: &mut S, target: &LookAt) -> Result<Vec<MessageRange>> {
    let mut gone = Vec::new();
    let is_named = |message: &&MessageRange| !message.guid.is_empty() && !message.guid_128.is_empty();
    for message in target.expunged_in_memory.iter().filter(is_named) {
        let is_copy = |uid: &u32| *uid != message.first_uid && *uid < target.in_memory_uid_next;
        if storage.find_messages(&message.guid)?.iter().all(is_copy) {
            gone.push(MessageRange { guid: String::new(), ..message.clone() });
        }
    }
    Ok(gone)
}

/// A peer that has one of these messages has the same one, unless there are, or just were, copies of it in this mailbox.
fn mark_found<S: Storage>(storage: &mut S, target: &LookAt, saves: Vec<&mut proto::Save>) -> Result<()> {
    if saves.is_empty() {
        return Ok(());
    }
    let mut times: HashMap<String, u32> = HashMap::new();
    for uid in storage.uids()? {
        if let Some(guid) = storage.message_guid(uid)? {
            *times.entry(guid).or_default() += 1;
        }
    }
    let to_end = LookAt { until_seq: 0, until: 0, ..target.clone() };
    let read = read_log(&storage.log_files()?, &to_end);
    if read.is_ok_and(|read| !read.deltas.iter().any(|delta| matches!(delta, Delta::Expunge { .. }))) {
        saves.into_iter().for_each(|save| save.found = times.get(&save.guid) == Some(&1));
    }
    Ok(())
}

/// The same, where all that came may have been there before. What was there all the time is another message.
fn mark_unless_copied<S: Storage>(storage: &mut S, saves: Vec<&mut proto::Save>) -> Result<()> {
    let came: BTreeSet<u32> = saves.iter().filter_map(|save| save.birth.as_ref()).map(|birth| birth.uid).collect();
    let mut stayed = HashSet::new();
    for uid in storage.uids()?.into_iter().filter(|uid| !came.contains(uid)) {
        stayed.extend(storage.message_guid(uid)?);
    }
    saves.into_iter().for_each(|save| save.found = !stayed.contains(&save.guid));
    Ok(())
}

/// Whether the open mailbox's log says, behind the place up to which it is known, that somebody else put messages in.
pub fn has_untold_saves<S: Storage>(storage: &mut S, known: &LookAt) -> Result<bool> {
    let files = storage.log_files()?;
    // One that does not tell keeps nothing. One that is not known may be of a mailbox that was made just now.
    let read = read_log(&files, known);
    Ok(read.is_ok_and(|read| read.deltas.iter().any(|delta| matches!(delta, Delta::Append { .. }))))
}

/// What a log says.
struct LogRead {
    deltas: Vec<Delta>,
    rebuilt: bool,
    /// Messages may have been given other UIDs.
    renumbered: bool,
    /// When the index was made once more, if that is not longer ago than the log reaches: seconds since 1970.
    anew_at: Option<u32>,
    /// From where to where it was read.
    known: proto::Span,
}

/// Reads the logs (the oldest first) from where they are known. The error is why they do not tell.
fn read_log(files: &[Vec<u8>], target: &LookAt) -> std::result::Result<LogRead, String> {
    // The older one may be anything.
    let mut logs: Vec<(Header, &[u8])> =
        files.iter().filter_map(|bytes| Some((Header::parse(bytes).ok()?, bytes.as_slice()))).collect();
    if let Some(Err(error)) = files.last().map(|newest| Header::parse(newest)) {
        return Err(format!("its log cannot be read: {error}"));
    }
    // Rotated while they were read: the same file twice.
    logs.dedup_by_key(|(header, _)| header.file_seq);
    let (first, offset, mut rebuilt) = begin(&logs, target)?;
    let until = if target.until_seq == 0 { (u32::MAX, u64::MAX) } else { (target.until_seq, target.until) };
    let begin = (logs[first].0.file_seq, offset);
    let mut commits: Vec<Commit> = Vec::new();
    let mut end = begin;
    for (at, (header, bytes)) in logs.iter().enumerate().skip(first) {
        if header.file_seq > until.0 {
            break;
        }
        let from = if at == first { offset } else { u64::from(header.hdr_size) };
        if at > first {
            if header.begins_anew() {
                rebuilt = true;
                commits.clear();
            } else if (header.prev_file_seq, u64::from(header.prev_file_offset)) != end {
                return Err(format!("its log {} does not follow on {}:{}", header.file_seq, end.0, end.1));
            }
        }
        let rest = bytes.get(from as usize..).unwrap_or_default();
        let mut reader = Commits::new(header, rest, from);
        for commit in reader.by_ref() {
            let commit = commit.map_err(|error| format!("its log cannot be read: {error}"))?;
            if (header.file_seq, commit.end) > until {
                break;
            }
            end = (header.file_seq, commit.end);
            commits.push(commit);
        }
        end = end.max((header.file_seq, from));
    }
    let mut deltas = fold(&commits, is_ours);
    let mut asked_for = expunges_asked_for(&logs[first], offset);
    asked_for.extend(target.expunged_in_memory.iter().map(|message| message.first_uid));
    deltas.retain(|delta| match delta {
        Delta::Expunge { first_uid, last_uid, .. } => first_uid != last_uid || !asked_for.contains(first_uid),
        _ => true,
    });
    if deltas.len() > DELTAS_MAX {
        return Err(format!("its log says more than {DELTAS_MAX} things that nobody told of"));
    }
    let (header, _) = logs[first];
    let anew_at = (header.begins_anew() && header.file_seq > FIRST_LOG_MAX).then_some(header.create_stamp);
    let unasked = deltas.iter().filter_map(|delta| match delta {
        Delta::Expunge { first_uid, guid: None, .. } => Some(*first_uid),
        _ => None,
    });
    let unasked: BTreeSet<u32> = unasked.collect();
    let renumbered = commits.iter().any(|commit| is_renumbering(commit, &unasked));
    Ok(LogRead { deltas, rebuilt, renumbered, anew_at, known: known(&logs, target, begin, end) })
}

/// One sync that brings messages and takes others, without anybody having asked for it.
fn is_renumbering(commit: &Commit, unasked: &BTreeSet<u32>) -> bool {
    let is_taking = |what: &Written| match what {
        Written::ExpungeGuid(gone) => gone.iter().any(|gone| unasked.contains(&gone.uid)),
        _ => false,
    };
    let mut records = commit.records.iter().filter(|record| record.external);
    records.clone().any(|record| matches!(record.what, Written::Append(_)))
        && records.any(|record| is_taking(&record.what))
}

/// Who asks for an expunge tells of it; whose sync carries it out later does not matter. What was asked for before `end`.
fn expunges_asked_for((header, bytes): &(Header, &[u8]), end: u64) -> BTreeSet<u32> {
    let begin = u64::from(header.hdr_size);
    let before = bytes.get(begin as usize..end as usize).unwrap_or_default();
    let commits = Commits::new(header, before, begin).map_while(std::result::Result::ok);
    let mut uids = BTreeSet::new();
    for record in commits.flat_map(|commit| commit.records).filter(|record| !record.external) {
        if let Written::ExpungeGuid(expunges) = &record.what {
            uids.extend(expunges.iter().map(|expunge| expunge.uid));
        }
    }
    uids
}

/// The file and the place where reading begins, and whether the mailbox was made anew there.
fn begin(logs: &[(Header, &[u8])], target: &LookAt) -> std::result::Result<(usize, u64, bool), String> {
    let goes_on = |(header, bytes): &(Header, &[u8])| {
        let end = target.end as usize;
        header.file_seq == target.log_seq
            && (target.index_id == 0 || target.index_id == header.indexid)
            && end <= bytes.len()
            && bytes[..end].ends_with(&target.tail)
    };
    if target.log_seq != 0 {
        if let Some(at) = logs.iter().position(goes_on) {
            return Ok((at, target.end, false));
        }
    }
    let anew = logs.iter().rposition(|(header, _)| header.begins_anew());
    if anew.is_some_and(|at| is_earlier(&logs[at].0, target)) {
        return Err(
            "its log is an earlier one: the mailbox was restored from a copy, or a power failure took the log's end"
                .into(),
        );
    }
    match (anew, target.log_seq) {
        (Some(at), 0) => Ok((at, u64::from(logs[at].0.hdr_size), false)),
        (Some(at), _) => Ok((at, u64::from(logs[at].0.hdr_size), true)),
        (None, 0) => Err("its log does not reach back to its beginning".into()),
        (None, _) => Err("its log does not go on where it was known".into()),
    }
}

/// It is of the index that was known, or of one before, and was there when its end was known.
fn is_earlier(header: &Header, target: &LookAt) -> bool {
    let is_known = target.log_seq != 0 && !matches!(target.index_id, 0 | u32::MAX);
    is_known && header.indexid <= target.index_id && header.file_seq <= target.log_seq
}

fn known(logs: &[(Header, &[u8])], target: &LookAt, begin: (u32, u64), end: (u32, u64)) -> proto::Span {
    let file = logs.iter().find(|(header, _)| header.file_seq == end.0);
    let tail = file.and_then(|(_, bytes)| bytes.get(..end.1 as usize)).unwrap_or_default();
    proto::Span {
        mailbox_guid: target.guid.clone(),
        index_id: file.map_or(0, |(header, _)| header.indexid),
        log_seq: end.0,
        // Of the same file only; what is healed begins where the log was known.
        begin: if begin.0 == end.0 { begin.1 } else { 0 },
        end: end.1,
        prev_log_seq: begin.0,
        prev_log_end: begin.1,
        tail: tail[tail.len().saturating_sub(TAIL_BYTES)..].to_vec(),
        ..Default::default()
    }
}

/// A log that does not tell what happened is known from its present end on: a comparison does the rest.
fn known_anyway(files: &[Vec<u8>], target: &LookAt) -> Option<proto::Span> {
    let (header, bytes) = files.last().and_then(|bytes| Some((Header::parse(bytes).ok()?, bytes.as_slice())))?;
    let end = (header.file_seq, bytes.len() as u64);
    Some(known(&[(header, bytes)], target, end, end))
}

fn one(uid: u32) -> MessageRange {
    MessageRange { first_uid: uid, last_uid: uid, ..Default::default() }
}

fn all_present<S: Storage>(storage: &mut S, uid_next: u32) -> Result<proto::MailboxRebuilt> {
    let mut present: Vec<MessageRange> = Vec::new();
    storage.uids()?.into_iter().for_each(|uid| append(&mut present, one(uid)));
    Ok(proto::MailboxRebuilt { present, uid_next })
}

/// Which messages were there when the index was made anew, and are still.
fn rebuilt(deltas: &[Delta]) -> proto::MailboxRebuilt {
    let mut uids = BTreeSet::new();
    let mut next = 0;
    for delta in deltas {
        match delta {
            Delta::Append { uid, .. } => drop(uids.insert(*uid)),
            Delta::Expunge { first_uid, last_uid, .. } => uids.retain(|uid| !(*first_uid..=*last_uid).contains(uid)),
            Delta::NextUid(uid) => next = next.max(*uid),
            _ => {}
        }
    }
    let mut present: Vec<MessageRange> = Vec::new();
    uids.into_iter().for_each(|uid| append(&mut present, one(uid)));
    proto::MailboxRebuilt { present, uid_next: next.max(uid_next(deltas)) }
}

/// UIDNEXT behind the messages that came; 0: none came.
fn uid_next(deltas: &[Delta]) -> u32 {
    let uids = deltas.iter().filter_map(|delta| match delta {
        Delta::Append { uid, .. } => Some(uid.saturating_add(1)),
        _ => None,
    });
    uids.max().unwrap_or(0)
}

/// A message that we moved goes from its old UID when somebody's sync carries that out.
fn is_end_of_move(delta: &Delta, moves: &[(u32, u32)]) -> bool {
    match delta {
        Delta::Expunge { first_uid, last_uid, guid: None } => {
            (*first_uid..=*last_uid).all(|uid| moves.iter().any(|(from, _)| *from == uid))
        }
        _ => false,
    }
}

/// The UIDs that the message with this UID had before it was moved, the last one first.
fn moved_from(moves: &[(u32, u32)], uid: u32) -> Vec<u32> {
    let mut uids = Vec::new();
    for (from, to) in moves.iter().rev() {
        if *to == *uids.last().unwrap_or(&uid) {
            uids.push(*from);
        }
    }
    uids
}

/// The deltas as operations: what brings and changes messages, and what takes them. `moves`: UIDs alone do not name them, and
/// these messages were given others.
fn operations<S: Storage>(
    storage: &mut S,
    deltas: Vec<Delta>,
    moves: Option<&[(u32, u32)]>,
    was_told: bool,
) -> Result<(Vec<What>, Vec<What>)> {
    let (mut of_messages, mut expunges) = (Vec::new(), Vec::new());
    // They came and went. If nobody was told of them, a peer may have given these UIDs, or copies of these messages, to others.
    let mut gone = BTreeSet::new();
    let mut unnamed = NAMED_MAX;
    let flags =
        |add: u8, remove: u8| proto::FlagUpdate { add: add.into(), remove: remove.into(), ..Default::default() };
    for delta in deltas {
        match delta {
            Delta::Append { uid, flags } => match save(storage, uid, flags)? {
                Some(save) => of_messages.push(What::Save(save)),
                // Who has moved it has told where it is.
                None if moves.unwrap_or_default().iter().any(|(from, _)| *from == uid) => {}
                None => drop(gone.insert(uid)),
            },
            Delta::Flags { first_uid, last_uid, .. } if first_uid == last_uid && gone.contains(&first_uid) => {}
            Delta::Flags { first_uid, last_uid, add, remove } => {
                for messages in named(storage, &[UidRange { first: first_uid, last: last_uid }], moves, &mut unnamed)? {
                    of_messages.extend(holding(storage, &messages, &flags(add, remove))?.into_iter().map(What::Flags));
                }
            }
            Delta::Keywords { add, name, mut ranges } => {
                ranges.retain(|range| range.first != range.last || !gone.contains(&range.first));
                let (added, removed) = if add { (vec![name], vec![]) } else { (vec![], vec![name]) };
                let keyword = proto::FlagUpdate { add_keywords: added, remove_keywords: removed, ..Default::default() };
                for messages in named(storage, &ranges, moves, &mut unnamed)? {
                    of_messages.extend(holding(storage, &messages, &keyword)?.into_iter().map(What::Flags));
                }
            }
            Delta::Expunge { first_uid, last_uid, guid }
                if (guid.is_none() || !was_told) && (first_uid..=last_uid).all(|uid| gone.contains(&uid)) => {}
            Delta::Expunge { first_uid, last_uid, guid } => {
                let guid_128 = guid.map(|guid| guid.to_vec()).unwrap_or_default();
                let of = |first_uid, last_uid| MessageRange {
                    first_uid,
                    last_uid,
                    guid_128: guid_128.clone(),
                    ..Default::default()
                };
                let mut messages = vec![of(first_uid, last_uid)];
                if guid.is_some() {
                    // That it was moved here may not have been told: a peer knows it by the UID from which it came.
                    messages
                        .extend(moved_from(moves.unwrap_or_default(), first_uid).into_iter().map(|uid| of(uid, uid)));
                }
                expunges.push(What::Expunge(proto::Expunge { messages }));
            }
            // No client does it. The rest travels with the mailbox.
            Delta::KeywordsReset { .. } | Delta::Rebuilt | Delta::UidValidity(_) | Delta::NextUid(_) => {}
        }
    }
    Ok((of_messages, expunges))
}

/// The messages, as many at a time as fit into an operation; with their GUIDs if their UIDs do not name them, where they are
/// now.
fn named<S: Storage>(
    storage: &mut S,
    ranges: &[UidRange],
    moves: Option<&[(u32, u32)]>,
    unnamed: &mut usize,
) -> Result<Vec<Vec<MessageRange>>> {
    let Some(moves) = moves else {
        let mut messages = Vec::new();
        for mut range in without_gaps(storage, ranges)? {
            if range.first_uid == range.last_uid && *unnamed > 0 {
                *unnamed -= 1;
                // The peer may have given the UID to another one at the same time. One that is gone needs no flags.
                let Some(guid) = storage.message_guid(range.first_uid)? else { continue };
                range.guid = guid;
            }
            messages.push(range);
        }
        return Ok(messages.chunks(RANGES_MAX).map(<[_]>::to_vec).collect());
    };
    let is_meant = |uid: u32| is_in(ranges, uid);
    let mut uids: BTreeSet<u32> = storage.uids()?.into_iter().filter(|uid| is_meant(*uid)).collect();
    for (at, (_, to)) in moves.iter().enumerate().filter(|(_, (from, _))| is_meant(*from)) {
        uids.insert(moves[at..].iter().fold(*to, |to, next| if next.0 == to { next.1 } else { to }));
    }
    let mut messages = Vec::new();
    for uid in uids {
        if let Some(guid) = storage.message_guid(uid)? {
            messages.push(MessageRange { first_uid: uid, last_uid: uid, guid, ..Default::default() });
        }
    }
    Ok(messages.chunks(RANGES_MAX).map(<[_]>::to_vec).collect())
}

/// What of a change of flags still holds. It is told with a later clock than what a worker applied behind it, which would win
/// over that elsewhere, and not here.
pub fn holding<S: Storage>(
    storage: &mut S,
    messages: &[MessageRange],
    update: &proto::FlagUpdate,
) -> Result<Vec<proto::FlagUpdate>> {
    let mut holding: Vec<(proto::FlagUpdate, Vec<MessageRange>)> = Vec::new();
    for range in messages {
        for uid in range.first_uid..=range.last_uid {
            let Some((flags, keywords)) = storage.message_flags(uid)? else { continue };
            let has = |name: &String| keywords.iter().any(|keyword| keyword.eq_ignore_ascii_case(name));
            let mut update = update.clone();
            update.add &= flags;
            update.remove &= !flags;
            update.add_keywords.retain(has);
            update.remove_keywords.retain(|name| !has(name));
            if update == proto::FlagUpdate::default() {
                continue;
            }
            let message = MessageRange { first_uid: uid, last_uid: uid, ..range.clone() };
            match holding.last_mut() {
                Some((last, messages)) if *last == update && messages.len() < RANGES_MAX => append(messages, message),
                _ => holding.push((update, vec![message])),
            }
        }
    }
    Ok(holding.into_iter().map(|(update, messages)| proto::FlagUpdate { messages, ..update }).collect())
}

/// Ranges of messages that are named by their UIDs alone become one if there is none between them.
fn append(messages: &mut Vec<MessageRange>, next: MessageRange) {
    match messages.last_mut() {
        Some(last)
            if last.guid.is_empty() && next.guid.is_empty() && last.last_uid.wrapping_add(1) == next.first_uid =>
        {
            last.last_uid = next.last_uid;
        }
        _ => messages.push(next),
    }
}

/// The ranges of a log's record are in order.
fn is_in(ranges: &[UidRange], uid: u32) -> bool {
    let at = ranges.partition_point(|range| range.last < uid);
    ranges.get(at).is_some_and(|range| range.first <= uid)
}

/// Where a log's range has a gap, the peer may have a message.
fn without_gaps<S: Storage>(storage: &mut S, ranges: &[UidRange]) -> Result<Vec<MessageRange>> {
    let range = |first_uid, last_uid| MessageRange { first_uid, last_uid, ..Default::default() };
    if ranges.iter().all(|range| range.first == range.last) {
        return Ok(ranges.iter().map(|single| range(single.first, single.last)).collect());
    }
    let mut messages: Vec<MessageRange> = Vec::new();
    for uid in storage.uids()?.into_iter().filter(|uid| is_in(ranges, *uid)) {
        append(&mut messages, range(uid, uid));
    }
    Ok(messages)
}

/// None if the message has gone meanwhile, or if it is one that a peer sends again.
pub fn save<S: Storage>(storage: &mut S, uid: u32, flags: u8) -> Result<Option<proto::Save>> {
    let Some(info) = storage.message_info(uid)?.filter(|info| !info.is_stray) else { return Ok(None) };
    Ok(Some(proto::Save {
        birth: Some(proto::Birth { guid: info.guid_128.to_vec(), origin: String::new(), uid }),
        guid: info.guid,
        flags: flags.into(),
        received_date: info.received_date,
        save_date: info.save_date,
        size: info.size,
        ..Default::default()
    }))
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeStorage;
    use super::*;

    const GUID: Guid = [7; 16];
    const SDBOX: &[u8] = include_bytes!("../../tests/golden/indexlog/2.4-sdbox.log");
    const SDBOX_ROTATED: &[u8] = include_bytes!("../../tests/golden/indexlog/2.4-sdbox-rotated.log");
    const SDBOX_REBUILT: &[u8] = include_bytes!("../../tests/golden/indexlog/2.4-sdbox-rebuilt.log");
    const MAILDIR: &[u8] = include_bytes!("../../tests/golden/indexlog/2.3-maildir.log");

    fn storage(logs: &[&[u8]]) -> FakeStorage {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "one"), (3, "three")]);
        storage.set_logs("INBOX", logs);
        storage
    }

    fn inbox() -> LookAt {
        LookAt { guid: GUID.to_vec(), path: vec!["INBOX".into()], ..Default::default() }
    }

    /// Where the log is known up to, as a worker would have told.
    fn known_up_to(log: &[u8], end: u64) -> LookAt {
        let header = Header::parse(log).unwrap();
        let tail = log[..end as usize].to_vec();
        LookAt { index_id: header.indexid, log_seq: header.file_seq, end, tail, ..inbox() }
    }

    fn commits_of(log: &[u8]) -> impl Iterator<Item = Commit> + '_ {
        let header = Header::parse(log).unwrap();
        let first = u64::from(header.hdr_size);
        Commits::new(&header, &log[first as usize..], first)
            .map(|commit| commit.unwrap())
            .collect::<Vec<_>>()
            .into_iter()
    }

    /// Up to the first commit that does this.
    fn known_before(log: &[u8], is_it: impl Fn(&Delta) -> bool) -> LookAt {
        let commit =
            commits_of(log).find(|commit| fold([commit], |_| false).iter().any(&is_it)).expect("somebody does it");
        known_up_to(log, commit.begin)
    }

    fn known_before_expunge(log: &[u8], uid: u32) -> LookAt {
        known_before(log, |delta| matches!(delta, Delta::Expunge { first_uid, .. } if *first_uid == uid))
    }

    /// Seconds since 1970.
    const NOW: i64 = 10_000;

    fn look_at(storage: &mut FakeStorage, mailboxes: Vec<LookAt>, whole: bool) -> Vec<Looked> {
        let wanted = Wanted { job: 1, user: "jane".into(), mailboxes, whole, ..Default::default() };
        let mut found = Found::default();
        find(storage, &wanted, NOW, &mut found).unwrap();
        found.answers("jane").collect()
    }

    #[test]
    fn a_message_that_was_moved_is_known_by_each_uid_that_it_had() {
        let moves = [(5, 7), (6, 8), (7, 9), (9, 12)];
        assert_eq!(moved_from(&moves, 12), [9, 7, 5]);
        assert_eq!(moved_from(&moves, 8), [6]);
        assert_eq!(moved_from(&moves, 5), [0; 0]);
    }

    #[test]
    fn an_empty_mailbox_that_was_made_just_now_is_told_again() {
        let made_up_to = |uid_validity, messages: &[(u32, &str)], whole, until| {
            let mut storage = FakeStorage::default();
            storage.add("INBOX", GUID, uid_validity, messages);
            storage.set_logs("INBOX", &[SDBOX]);
            let known = LookAt { until_seq: until, ..known_up_to(SDBOX, SDBOX.len() as u64) };
            let answers = look_at(&mut storage, vec![known], whole);
            let changes = answers.into_iter().filter_map(|looked| looked.change);
            changes.map(|change| change.mailbox.unwrap().uid_validity).collect::<Vec<_>>()
        };
        let made = |uid_validity, messages: &[(u32, &str)], whole| made_up_to(uid_validity, messages, whole, 0);
        assert_eq!(made(9_000, &[], true), [9_000]);
        assert_eq!(made(9_000, &[(1, "one")], true), []);
        assert_eq!(made(9_000, &[], false), [9_000]);
        assert_eq!(made_up_to(9_000, &[], false, 2), [], "a part of its log is looked at");
        assert_eq!(made(5_000, &[], true), []);
    }

    /// In words.
    fn told(answers: &[Looked]) -> Vec<String> {
        let ranges = |messages: &[MessageRange]| {
            let range = |m: &MessageRange| match m.first_uid == m.last_uid {
                true => m.first_uid.to_string(),
                false => format!("{}:{}", m.first_uid, m.last_uid),
            };
            messages.iter().map(range).collect::<Vec<_>>().join(",")
        };
        let word = |op: &proto::Op| match op.what.as_ref().unwrap() {
            What::Save(save) => format!("save {}", save.birth.as_ref().unwrap().uid),
            What::Flags(flags) if !flags.add_keywords.is_empty() || !flags.remove_keywords.is_empty() => {
                format!("{} +{:?} -{:?}", ranges(&flags.messages), flags.add_keywords, flags.remove_keywords)
            }
            What::Flags(flags) => format!("{} +{:x} -{:x}", ranges(&flags.messages), flags.add, flags.remove),
            What::Expunge(expunge) => format!("expunge {}", ranges(&expunge.messages)),
            What::Rebuilt(rebuilt) => format!("rebuilt {} of {}", ranges(&rebuilt.present), rebuilt.uid_next),
            What::Create(_) => "create".into(),
            What::Delete(_) => "delete".into(),
            What::Rename(rename) => format!("rename to {}", rename.new_path.join("/")),
            What::Subscription(proto::Subscription { subscribed: true }) => "subscribe".into(),
            What::Subscription(_) => "unsubscribe".into(),
            What::Claim(_) | What::Nack(_) | What::Apart(_) => "a look does not tell it".into(),
        };
        let of_change = |change: &proto::Change| change.ops.iter().map(word).collect::<Vec<_>>();
        answers.iter().filter_map(|answer| answer.change.as_ref()).flat_map(of_change).collect()
    }

    fn doubts(answers: &[Looked]) -> Vec<&str> {
        answers.iter().filter_map(|answer| answer.doubt.as_ref()).map(|doubt| doubt.reason.as_str()).collect()
    }

    #[test]
    fn everything_behind_the_known_place_is_told_and_known_then() {
        let mut storage = storage(&[SDBOX]);
        let all = look_at(&mut storage, vec![inbox()], false);
        let words = told(&all);
        assert_eq!(words[..2], ["save 1", "save 3"], "2 and 4 are gone meanwhile");
        assert!(!words.iter().any(|word| word.starts_with("expunge")), "nobody knows of them: {words:?}");
        let known = all.iter().find_map(|answer| answer.known.clone()).unwrap();
        assert_eq!(known.end, SDBOX.len() as u64);
        assert!(SDBOX.ends_with(&known.tail));

        let again =
            LookAt { index_id: known.index_id, log_seq: known.log_seq, end: known.end, tail: known.tail, ..inbox() };
        assert_eq!(told(&look_at(&mut storage, vec![again], false)), Vec::<String>::new());
    }

    #[test]
    fn a_mailbox_whose_index_was_made_anew_gets_its_guid_back() {
        let mut storage = storage(&[SDBOX_REBUILT]);
        let vname = "INBOX";
        let old = LookAt { guid: vec![9; 16], ..known_up_to(SDBOX, SDBOX.len() as u64) };
        let answers = look_at(&mut storage, vec![old, inbox()], true);
        let words = told(&answers);
        assert_eq!(storage.guid(vname), [9; 16]);
        assert!(words.contains(&"save 1".to_string()) && words.last().unwrap().starts_with("rebuilt 1"), "{words:?}");
        assert_eq!(doubts(&answers), ["its index was made anew, perhaps without all messages and flags"]);
    }

    #[test]
    fn bodies_ride_along_with_the_messages_of_a_mailbox_that_nobody_knew() {
        for (is_known, inline_bytes, rides) in [(false, 1 << 20, true), (false, 0, false), (true, 1 << 20, false)] {
            let mut storage = storage(&[SDBOX]);
            let begin = known_up_to(SDBOX, u64::from(Header::parse(SDBOX).unwrap().hdr_size));
            let target = if is_known { begin } else { inbox() };
            let wanted = Wanted { mailboxes: vec![target], user: "jane".into(), inline_bytes, ..Wanted::default() };
            let mut found = Found { room: inline_bytes, ..Found::default() };
            find(&mut storage, &wanted, 0, &mut found).unwrap();
            let saves: Vec<bool> = found
                .of_messages
                .iter()
                .flat_map(|(_, ops)| ops)
                .filter_map(|what| match what {
                    What::Save(save) => Some(save.body_inline && save.body == save.guid.as_bytes()),
                    _ => None,
                })
                .collect();
            assert_eq!(saves, [rides; 2]);
        }
    }

    #[test]
    fn a_new_mailbox_that_another_session_gave_a_guid_gets_its_own_back() {
        let mut storage = storage(&[SDBOX]);
        let answers = look_at(&mut storage, vec![LookAt { guid: vec![9; 16], ..inbox() }], true);
        assert_eq!((storage.guid("INBOX"), doubts(&answers)), ([9; 16], vec![]));
    }

    #[test]
    fn a_log_that_is_an_earlier_one_is_doubted_and_known_from_its_end_on() {
        let Commit { begin, .. } = commits_of(SDBOX).last().unwrap();
        let earlier = &SDBOX[..begin as usize];
        let answers = look_at(&mut storage(&[earlier]), vec![known_up_to(SDBOX, SDBOX.len() as u64)], false);
        assert_eq!(told(&answers), Vec::<String>::new());
        assert!(doubts(&answers)[0].starts_with("its log is an earlier one"), "{answers:?}");
        let known = answers.iter().find_map(|answer| answer.known.clone()).unwrap();
        assert_eq!((known.end, known.prev_log_end), (begin, begin));

        // It has grown since.
        let mut other = SDBOX.to_vec();
        other[begin as usize..].iter_mut().for_each(|byte| *byte ^= 1);
        let known =
            LookAt { tail: other.split_off(SDBOX.len() - TAIL_BYTES), ..known_up_to(SDBOX, SDBOX.len() as u64) };
        assert!(
            doubts(&look_at(&mut storage(&[SDBOX]), vec![known], false))[0].starts_with("its log is an earlier one")
        );
    }

    #[test]
    fn a_mailbox_that_a_killed_worker_gave_another_guid_is_no_loss() {
        let mut storage = storage(&[SDBOX]);
        let old = LookAt { guid: vec![9; 16], ..known_up_to(SDBOX, SDBOX.len() as u64) };
        let answers = look_at(&mut storage, vec![old], true);
        assert_eq!((storage.guid("INBOX"), doubts(&answers)), ([9; 16], vec![]));
    }

    /// A look at all of a user of whom this mailbox is known.
    fn whole(known: LookAt) -> Wanted {
        let (user, mailboxes) = ("jane".into(), vec![known]);
        Wanted { job: 1, user, mailboxes, whole: true, since: i64::MAX, ..Default::default() }
    }

    #[test]
    fn a_half_deleted_mailbox_is_looked_at_later() {
        let mut storage = storage(&[SDBOX]);
        storage.deleted.push([9; 16]);
        storage.half_deleted.insert("Old".into());
        let old = LookAt { guid: vec![9; 16], path: vec!["Old".into()], ..Default::default() };
        let wanted = whole(old);
        let mut found = Found::default();
        find(&mut storage, &wanted, NOW, &mut found).unwrap();
        assert_eq!(found.later.as_deref(), Some("mailbox Old is half deleted"));
        assert!(found.missing.is_empty() && found.of_list.iter().all(|(_, what)| !matches!(what, What::Delete(_))));
        storage.half_deleted.clear();
        let mut found = Found::default();
        find(&mut storage, &wanted, NOW, &mut found).unwrap();
        assert!(found.later.is_none() && found.of_list.iter().any(|(_, what)| matches!(what, What::Delete(_))));
    }

    #[test]
    fn what_a_killed_worker_saved_without_its_guid_is_no_news() {
        let mut storage = storage(&[SDBOX]);
        storage.arriving = Some((3, "stray".into()));
        let words = told(&look_at(&mut storage, vec![inbox()], false));
        assert_eq!(words[0], "save 1");
        assert!(!words.contains(&"save 3".to_owned()), "{words:?}");
    }

    #[test]
    fn what_is_saved_while_the_log_is_read_keeps_its_uid_free() {
        let mut storage = storage(&[SDBOX]);
        storage.arriving = Some((9, "late".into()));
        let answers = look_at(&mut storage, vec![inbox()], false);
        let changes = answers.iter().filter_map(|answer| answer.change.as_ref()?.mailbox.as_ref());
        assert!(changes.map(|mailbox| mailbox.uid_next).all(|uid_next| uid_next <= 9));
    }

    #[test]
    fn where_uids_do_not_name_messages_their_guids_do() {
        let mut storage = storage(&[SDBOX, SDBOX_ROTATED]);
        storage.open("INBOX", false).unwrap();
        let (offset, bytes) = Marks::default().diverge();
        storage.write_mark(offset, &bytes).unwrap();
        storage.commit().unwrap();
        let answers = look_at(&mut storage, vec![known_up_to(SDBOX, SDBOX.len() as u64)], false);
        let name = |op: &proto::Op| match op.what.as_ref().unwrap() {
            What::Flags(flags) => flags.messages[0].guid.clone(),
            What::Expunge(expunge) => format!("{} bytes", expunge.messages[0].guid_128.len()),
            other => panic!("{other:?}"),
        };
        let names =
            answers.iter().filter_map(|answer| answer.change.as_ref()).flat_map(|change| change.ops.iter().map(name));
        assert_eq!(names.collect::<Vec<_>>(), ["one", "16 bytes"]);
        assert_eq!(doubts(&answers), Vec::<&str>::new());
    }

    #[test]
    fn what_was_done_to_a_message_before_it_moved_is_told_of_it_where_it_is() {
        let mut storage = storage(&[SDBOX]);
        storage.open("INBOX", false).unwrap();
        let range = |first, last| [UidRange { first, last }];
        let mut uids = |ranges: &[UidRange], moves: &[(u32, u32)]| -> Vec<u32> {
            named(&mut storage, ranges, Some(moves), &mut 9)
                .unwrap()
                .concat()
                .iter()
                .map(|range| range.first_uid)
                .collect()
        };
        assert_eq!(uids(&range(1, 3), &[]), [1, 3]);
        assert_eq!(uids(&range(5, 5), &[(5, 7), (7, 3)]), [3]);
        assert_eq!(uids(&range(7, 7), &[(5, 7), (7, 3)]), [3]);
        assert_eq!(uids(&range(5, 5), &[(5, 7)]), Vec::<u32>::new(), "expunged since");
    }

    #[test]
    fn what_was_done_to_a_message_that_came_and_moved_in_the_same_log_is_told() {
        let mut storage = storage(&[SDBOX]);
        storage.open("INBOX", false).unwrap();
        storage.flags.insert(3, (4, vec![]));
        let deltas = || {
            let changed = Delta::Flags { first_uid: 9, last_uid: 9, add: 4, remove: 0 };
            vec![Delta::Append { uid: 9, flags: 0 }, changed]
        };
        let mut told = |moves: &[(u32, u32)]| operations(&mut storage, deltas(), Some(moves), true).unwrap().0;
        let of_three = MessageRange { guid: "three".into(), ..one(3) };
        let flags = proto::FlagUpdate { messages: vec![of_three], add: 4, ..Default::default() };
        assert_eq!(told(&[(9, 3)]), [What::Flags(flags)]);
        assert_eq!(told(&[]), [], "it was expunged");
    }

    #[test]
    fn what_goes_from_its_old_uid_because_we_moved_it_is_no_news() {
        let gone = |first_uid, last_uid| Delta::Expunge { first_uid, last_uid, guid: None };
        let moves = [(3, 9), (4, 10)];
        assert!(is_end_of_move(&gone(3, 4), &moves) && is_end_of_move(&gone(4, 4), &moves));
        assert!(!is_end_of_move(&gone(3, 5), &moves) && !is_end_of_move(&gone(9, 9), &moves));
    }

    #[test]
    fn it_goes_on_in_the_file_that_follows() {
        let mut storage = storage(&[SDBOX, SDBOX_ROTATED]);
        let answers = look_at(&mut storage, vec![known_up_to(SDBOX, SDBOX.len() as u64)], false);
        assert_eq!(told(&answers), ["1 +0 -10", "expunge 3"]);
        let known = answers.iter().find_map(|answer| answer.known.clone()).unwrap();
        assert_eq!((known.log_seq, known.end), (3, SDBOX_ROTATED.len() as u64));
        assert_eq!((known.prev_log_seq, known.prev_log_end), (2, SDBOX.len() as u64));
    }

    #[test]
    fn flags_that_a_peer_has_changed_since_are_not_told_with_a_later_clock() {
        let mut storage = storage(&[SDBOX, SDBOX_ROTATED]);
        storage.flags.insert(1, (0x10, vec![]));
        let known = known_up_to(SDBOX, SDBOX.len() as u64);
        assert_eq!(told(&look_at(&mut storage, vec![known.clone()], false)), ["1 +10 -0", "expunge 3"]);
        storage.flags.insert(1, (0, vec![]));
        assert_eq!(told(&look_at(&mut storage, vec![known], false)), ["1 +0 -10", "expunge 3"]);
    }

    #[test]
    fn of_a_range_only_those_messages_are_told_whose_flags_hold() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "1"), (2, "2"), (3, "3"), (4, "4"), (5, "5")]);
        storage.open("INBOX", false).unwrap();
        for uid in [1, 2, 4] {
            storage.flags.insert(uid, (0x8, vec!["$Work".into()]));
        }
        let all = [MessageRange { first_uid: 1, last_uid: 5, ..Default::default() }];
        let update =
            proto::FlagUpdate { add: 0x8, remove: 0x2, add_keywords: vec!["$work".into()], ..Default::default() };
        let holding = holding(&mut storage, &all, &update).unwrap();
        let told = holding.iter().map(|update| {
            let ranges: Vec<_> = update.messages.iter().map(|range| (range.first_uid, range.last_uid)).collect();
            (ranges, update.add, update.remove, update.add_keywords.len())
        });
        let expected =
            [(vec![(1, 2)], 8, 2, 1), (vec![(3, 3)], 0, 2, 0), (vec![(4, 4)], 8, 2, 1), (vec![(5, 5)], 0, 2, 0)];
        assert_eq!(told.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn only_the_hole_is_read() {
        let header = Header::parse(SDBOX).unwrap();
        let commits: Vec<Commit> = Commits::new(&header, &SDBOX[header.hdr_size.into()..], header.hdr_size.into())
            .map(|commit| commit.unwrap())
            .collect();
        let save_of_3 = commits
            .iter()
            .find(|commit| matches!(&fold([*commit], |_| false)[..], [Delta::Append { uid: 3, .. }, ..]))
            .expect("mail 3 was saved");
        let hole = LookAt { until_seq: 2, until: save_of_3.end, ..known_up_to(SDBOX, save_of_3.begin) };
        let answers = look_at(&mut storage(&[SDBOX]), vec![hole], false);
        assert_eq!(told(&answers), ["save 3"]);
        let change = answers.iter().find_map(|answer| answer.change.as_ref()).unwrap();
        assert_eq!(change.mailbox.as_ref().unwrap().uid_next, 4, "others may still come");
        assert_eq!(answers.iter().find_map(|answer| answer.known.as_ref()).unwrap().end, save_of_3.end);
    }

    #[test]
    fn what_a_client_expunged_in_memory_is_told_if_it_is_gone() {
        let named = |uid, guid: &str| MessageRange { guid: guid.into(), guid_128: vec![uid as u8; 16], ..one(uid) };
        let expunged_in_memory = vec![named(1, "one"), named(2, "two"), named(4, "one"), named(7, "late"), one(8)];
        let mut storage = storage(&[SDBOX]);
        storage.add("INBOX", GUID, 9, &[(1, "one"), (3, "three"), (9, "late")]);
        storage.set_logs("INBOX", &[SDBOX]);
        let known = LookAt { expunged_in_memory, in_memory_uid_next: 9, ..known_up_to(SDBOX, SDBOX.len() as u64) };
        let answers = look_at(&mut storage, vec![known], false);
        let ops = answers.iter().filter_map(|answer| answer.change.as_ref()).flat_map(|change| &change.ops);
        let messages = ops.filter_map(|op| match &op.what {
            Some(What::Expunge(expunge)) => Some(&expunge.messages),
            _ => None,
        });
        let told: Vec<_> = messages.flatten().map(|m| (m.first_uid, &m.guid[..], m.guid_128[0])).collect();
        assert_eq!(told, [(2, "", 2), (4, "", 4)]);
    }

    #[test]
    fn an_expunge_that_was_asked_for_before_is_not_told_when_it_is_carried_out() {
        let header = Header::parse(SDBOX).unwrap();
        let commits: Vec<Commit> = Commits::new(&header, &SDBOX[header.hdr_size.into()..], header.hdr_size.into())
            .map(|c| c.unwrap())
            .collect();
        let request = commits
            .iter()
            .find(|commit| fold([*commit], |_| false) == [Delta::Expunge { first_uid: 4, last_uid: 4, guid: None }])
            .expect("4 was expunged");
        let words = told(&look_at(&mut storage(&[SDBOX]), vec![known_up_to(SDBOX, request.begin)], false));
        assert_eq!(words, ["expunge 4"]);
        let words = told(&look_at(&mut storage(&[SDBOX]), vec![known_up_to(SDBOX, request.end)], false));
        assert_eq!(words, Vec::<String>::new());
    }

    #[test]
    fn a_log_that_was_put_in_the_place_of_another_is_a_doubt() {
        let other = LookAt { tail: vec![1, 2, 3], ..known_up_to(SDBOX_ROTATED, 100) };
        let answers = look_at(&mut storage(&[SDBOX_ROTATED]), vec![other], false);
        assert_eq!(doubts(&answers), ["its log does not go on where it was known"]);
        assert_eq!(told(&answers), Vec::<String>::new());
        let answers = look_at(&mut storage(&[SDBOX_ROTATED]), vec![inbox()], false);
        assert_eq!(doubts(&answers), ["its log does not reach back to its beginning"]);
        let answers = look_at(&mut storage(&[b"garbage"]), vec![inbox()], false);
        assert!(doubts(&answers)[0].starts_with("its log cannot be read"), "{:?}", doubts(&answers));
    }

    #[test]
    fn a_rebuilt_index_tells_what_is_there() {
        let answers = look_at(&mut storage(&[SDBOX_REBUILT]), vec![known_up_to(SDBOX, SDBOX.len() as u64)], false);
        let words = told(&answers);
        assert!(words.contains(&"save 1".to_string()), "{words:?}");
        assert!(words.last().unwrap().starts_with("rebuilt 1"), "{words:?}");
        assert_eq!(doubts(&answers), Vec::<&str>::new());
    }

    #[test]
    fn what_a_rebuild_puts_in_after_a_first_look_is_what_the_peers_have() {
        // Cut behind the append: nothing is expunged yet.
        let behind = known_before(SDBOX, |delta| matches!(delta, Delta::Expunge { .. }));
        let mut log = SDBOX[..behind.end as usize].to_vec();
        log[8] = 3;
        let log = log.as_slice();
        let before = known_before(log, |delta| matches!(delta, Delta::Append { uid: 3, .. }));
        let found = |storage: &mut FakeStorage| {
            storage.is_dbox = true;
            let answers = look_at(storage, vec![before.clone()], false);
            let ops = answers.iter().filter_map(|answer| answer.change.as_ref()).flat_map(|change| &change.ops);
            let save = |op: &proto::Op| match &op.what {
                Some(What::Save(save)) if save.guid == "three" => Some(save.found),
                _ => None,
            };
            ops.filter_map(save).collect::<Vec<_>>()
        };
        assert_eq!(found(&mut storage(&[log])), [true]);
        let mut with_copy = storage(&[log]);
        with_copy.add("INBOX", GUID, 9, &[(1, "three"), (3, "three")]);
        with_copy.set_logs("INBOX", &[log]);
        assert_eq!(found(&mut with_copy), [false], "somebody copied it");
    }

    #[test]
    fn a_user_whose_mail_nobody_wrote_to_is_not_looked_at() {
        let mut storage = storage(&[SDBOX]);
        storage.written_at = 100;
        let mut look = |written_since| {
            let wanted = Wanted { user: "jane".into(), whole: true, written_since, ..Default::default() };
            let mut found = Found::default();
            find(&mut storage, &wanted, NOW, &mut found).unwrap();
            (found.is_idle, found.answers("jane").count() > 0)
        };
        assert_eq!(look(101), (true, false));
        assert_eq!(look(100), (false, true));
    }

    #[test]
    fn what_one_sync_finds_while_it_misses_others_may_be_the_same_messages() {
        use crate::indexlog::{Append, ExpungeGuid, Record};
        let record = |what| Record { offset: 0, external: true, sync: false, what };
        let commit = |records| Commit { begin: 0, end: 0, records };
        let comes = record(Written::Append(vec![Append { uid: 7, flags: 0 }]));
        let goes = record(Written::ExpungeGuid(vec![ExpungeGuid { uid: 1, guid_128: [0; 16] }]));
        let both = commit(vec![comes.clone(), goes.clone()]);
        let unasked = BTreeSet::from([1]);
        assert!(is_renumbering(&both, &unasked));
        assert!(!is_renumbering(&both, &BTreeSet::new()), "somebody asked for it");
        assert!([comes, goes].map(|record| commit(vec![record])).iter().all(|one| !is_renumbering(one, &unasked)));
    }

    #[test]
    fn what_was_put_beside_dovecots_back_is_told() {
        let mut storage = storage(&[MAILDIR]);
        let words = told(&look_at(&mut storage, vec![known_before_expunge(MAILDIR, 5)], false));
        assert_eq!(words, ["expunge 5"]);
    }

    #[test]
    fn what_came_and_went_untold_is_named_by_its_guid_if_at_all() {
        // A peer may have given these UIDs to other messages meanwhile.
        let words = told(&look_at(&mut storage(&[MAILDIR]), vec![inbox()], false));
        assert!(!words.iter().any(|word| word.contains('5')), "{words:?}");
        let known = LookAt { was_told: true, ..known_before_expunge(MAILDIR, 2) };
        let answers = look_at(&mut storage(&[MAILDIR]), vec![known], false);
        let ops = answers.iter().filter_map(|answer| answer.change.as_ref()).flat_map(|change| &change.ops);
        let guids: Vec<usize> = ops
            .filter_map(|op| match &op.what {
                Some(What::Expunge(expunge)) => Some(expunge.messages[0].guid_128.len()),
                _ => None,
            })
            .collect();
        assert_eq!(guids, [16, 16]);
    }

    #[test]
    fn flags_of_messages_that_are_gone_are_not_told() {
        let known = known_before(SDBOX, |delta| matches!(delta, Delta::Flags { .. }));
        let words = told(&look_at(&mut storage(&[SDBOX]), vec![known], false));
        let is_of_gone = |word: &&String| word.starts_with("2 ") || word.starts_with("4 ");
        assert_eq!(words.iter().find(is_of_gone), None, "{words:?}");
    }

    #[test]
    fn expunges_of_all_mailboxes_come_after_all_saves() {
        let mut storage = storage(&[SDBOX]);
        storage.add("Archive", [8; 16], 9, &[(1, "one")]);
        storage.set_logs("Archive", &[SDBOX]);
        let known = known_before_expunge(SDBOX, 2);
        let archive = LookAt { guid: vec![8; 16], path: vec!["Archive".into()], ..Default::default() };
        let words = told(&look_at(&mut storage, vec![known, archive], false));
        let last_save = words.iter().rposition(|word| word.starts_with("save")).unwrap();
        let first_expunge = words.iter().position(|word| word.starts_with("expunge")).unwrap();
        assert!(last_save < first_expunge, "{words:?}");
    }

    #[test]
    fn mailboxes_that_came_went_and_were_renamed_are_told() {
        let mut storage = storage(&[SDBOX]);
        storage.add("New", [1; 16], 9, &[]);
        storage.add("Fresh", [2; 16], 9, &[]);
        for name in ["New", "Fresh"] {
            storage.set_logs(name, &[SDBOX_ROTATED]);
        }
        storage.deleted.push([3; 16]);
        let known = |guid: u8, name: &str| LookAt { guid: vec![guid; 16], path: vec![name.into()], ..inbox() };
        let all =
            vec![known_up_to(SDBOX, SDBOX.len() as u64), known(1, "Old"), known(3, "Deleted"), known(4, "Vanished")];
        let answers = look_at(&mut storage, all, true);
        assert_eq!(told(&answers), ["delete", "create", "rename to New"]);
        assert!(doubts(&answers)[0].contains("not there any more"), "{:?}", doubts(&answers));
        let missing: Vec<u8> = answers.iter().filter_map(|answer| answer.missing.first().copied()).collect();
        assert_eq!(missing, [3, 4]);
    }

    #[test]
    fn a_mailbox_that_is_deleted_while_it_is_looked_at_is_not_forgotten() {
        let mut storage = storage(&[SDBOX]);
        storage.add("Going", [5; 16], 9, &[]);
        storage.half_deleted.insert("Going".into());
        let going = LookAt { guid: vec![5; 16], path: vec!["Going".into()], ..inbox() };
        let wanted = whole(going);
        let mut found = Found::default();
        find(&mut storage, &wanted, NOW, &mut found).unwrap();
        assert_eq!((found.missing.len(), found.later.as_deref()), (0, Some("mailbox Going is being deleted")));
    }

    #[test]
    fn of_mailboxes_that_were_deleted_the_lower_ones_are_told_first() {
        let mut storage = storage(&[SDBOX]);
        storage.deleted.extend([[2; 16], [3; 16]]);
        let known = |guid: u8, path: &[&str]| LookAt {
            guid: vec![guid; 16],
            path: path.iter().map(ToString::to_string).collect(),
            ..inbox()
        };
        let all = vec![known_up_to(SDBOX, SDBOX.len() as u64), known(2, &["Upper"]), known(3, &["Upper", "Lower"])];
        let answers = look_at(&mut storage, all, true);
        let paths: Vec<_> = answers.iter().filter_map(|a| Some(&a.change.as_ref()?.mailbox.as_ref()?.path)).collect();
        assert_eq!(paths, [&vec!["Upper", "Lower"], &vec!["Upper"]]);
    }

    #[test]
    fn subscriptions_are_told_whether_there_is_a_mailbox_or_not() {
        let mut storage = storage(&[SDBOX]);
        storage.subscribed.insert("Renamed since".into(), true);
        storage.subscribed.insert("Long ago".into(), false);
        storage.subscribed.insert("Not in the mailbox log".into(), false);
        let name = |name: &str| LookAt { path: vec![name.into()], subscribed: true, ..Default::default() };
        let known = vec![known_up_to(SDBOX, SDBOX.len() as u64), name("Long ago"), name("No more")];
        let answers = look_at(&mut storage, known.clone(), true);
        assert_eq!(told(&answers), ["subscribe", "subscribe", "unsubscribe"]);
        let paths: Vec<_> = answers.iter().filter_map(|a| a.change.as_ref()?.mailbox.as_ref()?.path.first()).collect();
        assert_eq!(paths, ["Not in the mailbox log", "Renamed since", "No more"]);
        let wanted =
            Wanted { user: "jane".into(), mailboxes: known, whole: true, since: i64::MAX, ..Default::default() };
        let mut found = Found::default();
        find(&mut storage, &wanted, NOW, &mut found).unwrap();
        assert!(found.of_list.is_empty(), "not asked for");
    }
}
