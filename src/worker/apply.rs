//! Applying another server's changes of one user, in order.
//!
//! Applying a change again does nothing. What cannot be done exactly because this server has something else in the
//! place is solved so that no mail is lost, and noted; the notes are counted in the status.
mod claims;
mod mailboxes;

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};

use super::apart::{self, Own};
use super::body::{self, Fetched};
use super::connection::Connection;
use super::elsewhere::{Elsewhere, Known, Resolved, GONE};
use super::guids::Guids;
use super::look;
use super::mark::{self, Marks, Moved};
use super::name;
use super::storage::{Body, Existence, Guid, Namespace, NewMessage, Result, Storage, Update};
use crate::change;
use crate::indexlog::Delta;
use crate::merge::rule::Rule;
use crate::merge::uid::{self, Put, There};
use crate::wire::proto::{self, op::What};

/// Messages saved in one transaction at most: their files wait for the commit.
const SAVES_MAX: usize = 128;
/// Changes in one transaction at most: its spans name them all.
const CHANGES_MAX: usize = 128;
/// Messages that a server lost and that are told to it again; it is to be compared where there are more.
const GONE_MAX: usize = 1_000;
const UNKNOWN: &str = "a server told of a message that never came here";
/// UIDs above would leave no room for new messages; Dovecot panics at the end of its numbers.
const UID_MAX: u32 = u32::MAX - (1 << 20);
const NO_GUID: Guid = [0; 16];
/// Reasons that begin so will not go away by themselves: ours, and (dt_worker_set_box_error()) the storage's.
const NEVER: [&str; 2] = ["malformed ", "impossible here: "];

/// Why a job ended early.
#[derive(Debug)]
pub enum Failure {
    /// Something about the user or his mailboxes; the relay is told.
    User(String),
    /// The change can never be applied here; the same.
    Never(String),
    /// The connection to the relay failed.
    Link(std::io::Error),
}

impl Failure {
    /// Says in which mailbox it was.
    fn in_mailbox(self, change: &proto::Change) -> Failure {
        match self {
            Failure::User(reason) => Failure::User(in_mailbox(change, &reason)),
            other => other,
        }
    }
}

fn in_mailbox(change: &proto::Change, reason: &str) -> String {
    let mailbox = change.mailbox.as_ref().map(|mailbox| printable(&mailbox.path.join("/")));
    format!("mailbox {}: {reason}", mailbox.unwrap_or_default())
}

impl From<String> for Failure {
    fn from(reason: String) -> Self {
        Failure::User(reason)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::Link(error)
    }
}

type Outcome<T> = std::result::Result<T, Failure>;

/// The mailbox's virtual name: where its path says, or wherever the mailbox with its GUID is now. None if it is nowhere.
pub fn locate<S: Storage>(storage: &mut S, mailbox: &proto::Mailbox) -> Result<Option<String>> {
    let vname = name::vname(&mailbox.path, &storage.namespace()?)?;
    let guid = guid_of(mailbox)?;
    let exists = storage.existence(&vname)? != Existence::None;
    if guid == NO_GUID {
        return Ok(exists.then_some(vname));
    }
    // Looking for a GUID may list all mailboxes: mostly it is where it was.
    if exists && storage.open(&vname, true)? && storage.status().guid == guid {
        storage.close();
        return Ok(Some(vname));
    }
    storage.close();
    storage.find_guid(&guid)
}

fn guid_of(mailbox: &proto::Mailbox) -> Result<Guid> {
    match mailbox.guid.len() {
        0 => Ok(NO_GUID),
        _ => mailbox.guid.as_slice().try_into().map_err(|_| "malformed mailbox: its GUID is not 16 bytes".to_string()),
    }
}

/// The mailbox that is open for changes.
struct Open {
    /// As it is named in the changes.
    mailbox: (Vec<u8>, Vec<String>),
    /// As it is here.
    guid: Guid,
    path: Vec<String>,
    /// As the changes say; 0 as long as they don't.
    uid_validity: u32,
    /// UIDNEXT including the saves that are not committed yet.
    uid_next: u32,
    reason: Reason,
    /// Its GUID or UIDVALIDITY is not theirs.
    differs: bool,
    /// What of the peers is applied to it.
    marks: Marks,
    /// The last change that is complete with what is pending.
    complete: Option<proto::SeqOf>,
    /// A message gets another UID than it had.
    diverges: bool,
    /// What is pending expunges what a client expunged elsewhere.
    expunges: bool,
    /// What the changes said that it must reach.
    min_uid_next: u32,
    min_highest_modseq: u64,
    /// Of its messages.
    guids: Guids,
}

/// Why a mailbox is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    /// It gets a message: it is created, and theirs has one.
    Save,
    /// It was created there: it is created here, and both may be empty.
    Create,
    /// Its messages change.
    Change,
}

/// What is in the transaction that is being built.
enum Pending {
    Nothing,
    Saves(Vec<Asked>),
    Changes,
}

/// A message that is being saved.
struct Asked {
    guid: String,
    /// The UID that it has elsewhere; 0: none that matters here.
    there: u32,
    /// Those that it had there before.
    was: Vec<u32>,
    /// That it is to get here; 0: the next one.
    uid: u32,
    /// UIDNEXT when it was saved.
    uid_next: u32,
    /// Its flags and keywords.
    flags: proto::FlagUpdate,
}

/// What the committed changes gave rise to.
pub struct Committed {
    /// So many of them are done.
    pub done: u32,
    /// The peers must be told.
    pub tell: Vec<proto::Change>,
    /// The relay must keep it.
    pub elsewhere: Vec<proto::Elsewhere>,
    pub aliases: Vec<proto::Alias>,
}

type OnCommit<'a, S, C> = &'a mut dyn FnMut(&mut S, &mut Connection<C>, Committed) -> body::Link<()>;

/// One Apply of one user.
pub struct Apply<'a, S, C> {
    storage: &'a mut S,
    connection: &'a mut Connection<C>,
    user: &'a str,
    namespace: Namespace,
    open: Option<Open>,
    pending: Pending,
    /// Keywords that are pending: true if added, false if removed.
    pending_keywords: HashMap<String, bool>,
    /// Changes whose writing has been begun and not been committed, the current one included.
    seqs: Vec<proto::SeqOf>,
    current: proto::SeqOf,
    /// The current change has one operation.
    is_single: bool,
    /// Changes that are complete but for the commit of what is pending.
    complete: u32,
    next_body: &'a mut u64,
    /// Changes that are applied durably.
    pub done: u32,
    pub notes: Vec<String>,
    /// What was solved on the way.
    pub conflicts: Vec<proto::Conflict>,
    /// What must be compared.
    pub doubts: Vec<proto::Doubt>,
    /// This server's name.
    pub me: String,
    /// There is no third server.
    pub is_pair: bool,
    /// This server decides where UIDs clash.
    resolves: bool,
    /// Numbers of changes that a worker was given before: what it made and did not complete is not ours to keep.
    pub again: Vec<u64>,
    /// What the peers must be told because of what is applied.
    pub tell: Vec<proto::Change>,
    /// Messages that are not where the changes' origin has them.
    pub elsewhere: Elsewhere,
    /// Mailboxes that have become one with another.
    pub aliases: HashMap<Guid, Guid>,
    /// Those of which the relay does not know yet.
    new_aliases: Vec<proto::Alias>,
    /// UIDs that messages got here in this job, in the open mailbox.
    saved: HashSet<u32>,
    /// What became one of two mailboxes in this job: the relay did not know of it when it looked at the job's changes.
    merged: HashSet<Guid>,
    /// The mailbox that is being created had mail where it comes from.
    creates_with_mail: bool,
    /// The mailbox that is being entered was deleted here, and is made anew.
    is_reborn: bool,
    /// Messages come from a mailbox that goes: each is looked for, whatever was applied.
    moves: bool,
    /// Called after each commit while the job goes on.
    on_commit: OnCommit<'a, S, C>,
}

impl<'a, S: Storage, C: Read + Write> Apply<'a, S, C> {
    /// The user is open.
    pub fn new(
        storage: &'a mut S,
        connection: &'a mut Connection<C>,
        user: &'a str,
        resolves: bool,
        elsewhere: Elsewhere,
        next_body: &'a mut u64,
        on_commit: OnCommit<'a, S, C>,
    ) -> Result<Self> {
        let namespace = storage.namespace()?;
        Ok(Apply {
            storage,
            connection,
            user,
            namespace,
            open: None,
            pending: Pending::Nothing,
            pending_keywords: HashMap::new(),
            seqs: Vec::new(),
            current: proto::SeqOf::default(),
            is_single: false,
            complete: 0,
            next_body,
            done: 0,
            notes: Vec::new(),
            conflicts: Vec::new(),
            doubts: Vec::new(),
            me: String::new(),
            is_pair: false,
            resolves,
            again: Vec::new(),
            tell: Vec::new(),
            elsewhere,
            aliases: HashMap::new(),
            new_aliases: Vec::new(),
            saved: HashSet::new(),
            merged: HashSet::new(),
            creates_with_mail: false,
            is_reborn: false,
            moves: false,
            on_commit,
        })
    }

    /// Applies the changes. If one fails, those before it are applied nevertheless; `done` tells.
    pub fn run(&mut self, changes: &[proto::Change]) -> Outcome<()> {
        let failure = match self.run_batched(changes) {
            Err(failure @ (Failure::User(_) | Failure::Never(_)))
                if self.done < self.complete && (self.complete as usize) < changes.len() =>
            {
                failure
            }
            result => return result,
        };
        // They shared a transaction with what failed. Without it they must not fail for ever.
        let before = &changes[self.done as usize..self.complete as usize];
        self.storage.close();
        self.open = None;
        self.pending = Pending::Nothing;
        self.pending_keywords.clear();
        self.seqs.clear();
        self.complete = self.done;
        match self.run_batched(before) {
            Err(Failure::Link(error)) => Err(Failure::Link(error)),
            _ => Err(failure),
        }
    }

    fn run_batched(&mut self, changes: &[proto::Change]) -> Outcome<()> {
        for change in changes {
            self.change(change).map_err(|failure| match failure {
                Failure::User(reason) if NEVER.iter().any(|never| reason.starts_with(never)) => {
                    Failure::Never(in_mailbox(change, &reason))
                }
                other => other.in_mailbox(change),
            })?;
            self.complete += 1;
            if self.seqs.len() >= CHANGES_MAX {
                self.flush().map_err(|failure| failure.in_mailbox(change))?;
            }
            if let Pending::Nothing = self.pending {
                self.raise_uid_next()?;
                self.done = self.complete;
                self.seqs.clear();
            }
        }
        self.leave().map_err(|failure| match changes.last() {
            Some(last) => failure.in_mailbox(last),
            None => failure,
        })?;
        self.done = self.complete;
        Ok(())
    }

    fn change(&mut self, change: &proto::Change) -> Outcome<()> {
        let stamp = change.stamp.as_ref().ok_or("malformed change: no stamp".to_string())?;
        let mailbox = change.mailbox.as_ref().ok_or("malformed change: no mailbox".to_string())?;
        if change.user != self.user {
            return Err(format!("malformed change: it is of user {}", printable(&change.user)).into());
        }
        change::check_change(change).map_err(|error| format!("malformed change: {error}"))?;
        if mailbox.uid_next > UID_MAX {
            return Err(format!("malformed change: UIDNEXT {}", mailbox.uid_next).into());
        }
        self.current = proto::SeqOf { origin: stamp.origin.clone(), epoch: stamp.epoch, seq: stamp.seq };
        self.is_single = change.ops.len() == 1;
        self.seqs.push(self.current.clone());
        self.storage.applying(&self.seqs);

        for op in &change.ops {
            match op.what.as_ref().ok_or("malformed change: unknown operation".to_string())? {
                What::Save(save) => self.save(stamp, mailbox, save)?,
                What::Flags(update) => self.update_flags(mailbox, update)?,
                What::Expunge(expunge) => self.expunge(mailbox, expunge)?,
                What::Apart(apart) => self.set_apart(mailbox, apart)?,
                What::Claim(claim) => self.claim(mailbox, claim)?,
                What::Nack(nack) => self.nack(mailbox, nack)?,
                What::Create(create) => self.create(stamp, mailbox, create)?,
                What::Rename(rename) => self.rename(stamp, mailbox, rename)?,
                What::Delete(delete) => self.delete(mailbox, delete)?,
                What::Subscription(subscription) => self.subscribe(mailbox, subscription)?,
                What::Rebuilt(rebuilt) => self.compare_rebuilt(mailbox, rebuilt)?,
            }
        }
        if let Some(open) = self.open.as_mut().filter(|open| is_of(open, mailbox)) {
            open.min_uid_next = open.min_uid_next.max(mailbox.uid_next);
            open.min_highest_modseq = open.min_highest_modseq.max(mailbox.highest_modseq);
            // What this server makes again comes in no order.
            open.complete = Some(&self.current).filter(|current| current.origin != self.me).cloned();
        }
        Ok(())
    }

    fn note(&mut self, note: &str) {
        self.notes.push(note.into());
    }

    /// A conflict in the open mailbox was solved.
    fn solved(&mut self, rule: Rule) {
        let path = self.open.as_ref().map(|open| open.path.clone()).unwrap_or_default();
        self.solved_in(path, rule);
    }

    fn solved_in(&mut self, path: Vec<String>, rule: Rule) {
        self.conflicts.push(proto::Conflict { rule: rule.name().into(), path });
    }

    // ---- Transactions ------------------------------------------------------------------------------------------------

    /// Commits what is pending.
    fn flush(&mut self) -> Outcome<()> {
        let pending = std::mem::replace(&mut self.pending, Pending::Nothing);
        self.pending_keywords.clear();
        if let Pending::Nothing = pending {
            return Ok(());
        }
        self.write_marks()?;
        let saved = self.storage.commit()?;
        if let Some(open) = &mut self.open {
            open.uid_next = self.storage.status().uid_next;
            open.guids.expire();
        }
        if let Pending::Saves(asked) = pending {
            self.saved.extend(&saved);
            self.look_where_saved(&asked, &saved)?;
        }
        self.raise_uid_next()?;
        self.done = self.complete;
        self.seqs = vec![self.current.clone()];
        self.storage.applying(&self.seqs);
        self.report()
    }

    /// Says what is done, and before that what it gave rise to.
    fn report(&mut self) -> Outcome<()> {
        let committed = self.take_news();
        Ok((self.on_commit)(self.storage, self.connection, committed)?)
    }

    /// Since the last call.
    pub fn take_news(&mut self) -> Committed {
        Committed {
            done: self.done,
            tell: std::mem::take(&mut self.tell),
            elsewhere: self.elsewhere.take_new(),
            aliases: std::mem::take(&mut self.new_aliases),
        }
    }

    /// Before changes that say so count as done.
    fn raise_uid_next(&mut self) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        if open.min_uid_next > open.uid_next {
            self.storage.update(&Update { min_uid_next: open.min_uid_next, ..Update::default() })?;
            open.uid_next = self.storage.status().uid_next;
        }
        Ok(())
    }

    /// Tells of messages that have another UID than elsewhere.
    fn look_where_saved(&mut self, asked: &[Asked], saved: &[u32]) -> Outcome<()> {
        let stand = self.drop_saved_again(asked, saved)?;
        // Another process may have taken a UID since we looked.
        if asked.iter().zip(&stand).any(|(asked, uid)| asked.uid != 0 && asked.uid != *uid) {
            self.diverge();
            self.write_marks()?;
            self.storage.commit()?;
        }
        for (asked, uid) in asked.iter().zip(stand).filter(|(asked, _)| asked.there != 0) {
            self.note_was(&asked.guid, &asked.was, uid);
            if asked.there == uid {
                self.note_if_elsewhere(uid, &asked.guid, uid);
                continue;
            }
            self.solved(Rule::UidTaken);
            self.note_elsewhere(asked.there, &asked.guid, uid, false);
            self.tell_uid(&asked.guid, uid, There { uid: asked.there, next: 0, raised: 0 }, (vec![], asked.there));
        }
        Ok(())
    }

    /// Only the sync in our commit has found the message's file: a worker that was killed had put it into its place, or the index had lost it
    /// in a power failure. Ours goes again. Returns the UIDs where the messages stand then.
    fn drop_saved_again(&mut self, asked: &[Asked], saved: &[u32]) -> Outcome<Vec<u32>> {
        let mut stand = saved.to_vec();
        for ((asked, saved_at), stands) in asked.iter().zip(saved).zip(&mut stand) {
            let Some(found) = self.found_by_sync(asked, *saved_at, saved)? else { continue };
            self.storage.expunge(*saved_at, *saved_at)?;
            self.storage.update_flags(found, found, &asked.flags)?;
            *stands = found;
        }
        if stand != saved {
            // Or a look would tell it as somebody's expunge.
            self.write_marks()?;
            self.storage.commit()?;
            // Ours has used up a UID.
            self.tell_uid_next();
        }
        Ok(stand)
    }

    /// The UID of the message if it has come just before it was saved.
    fn found_by_sync(&mut self, asked: &Asked, saved_at: u32, saved: &[u32]) -> Result<Option<u32>> {
        let came = match asked.uid {
            0 if self.storage.is_torn_when_killed() => asked.uid_next..saved_at,
            uid if uid != 0 && uid != saved_at => uid..uid.saturating_add(1),
            _ => return Ok(None),
        };
        for uid in came {
            if !saved.contains(&uid) && self.is_same(uid, &asked.guid)? {
                return Ok(Some(uid));
            }
        }
        Ok(None)
    }

    /// The changes' origin has the message at `uid` of the open mailbox, and it is at `here` (0: not there yet, or GONE). `moved`: it was at
    /// `uid` here, too.
    fn note_elsewhere(&mut self, uid: u32, guid: &str, here: u32, moved: bool) {
        if let Some(open) = &self.open {
            self.elsewhere.note(&open.guid, uid, guid, here, moved);
        }
    }

    /// What comes by one of these UIDs is the message that stands here.
    fn note_was(&mut self, guid: &str, was: &[u32], stands: u32) {
        was.iter().for_each(|uid| self.note_elsewhere(*uid, guid, stands, false));
    }

    /// The same, of one that is here already.
    fn is_known_to_have_been(&mut self, save: &proto::Save, stands: u32) {
        if !save.was.is_empty() {
            self.note_was(&save.guid, &save.was, stands);
            // With it, that UIDs are not the same any more.
            self.pending = Pending::Changes;
        }
    }

    /// What is known of the message that the changes' origin has, or had, at this UID. A mailbox may have several with one GUID:
    /// copies that somebody made inside of it.
    fn standing(&mut self, there: u32, guid: &str) -> Result<Standing> {
        match self.known_as(there, guid).and_then(Known::uid) {
            Some(here) => self.standing_here(here, guid),
            None => Ok(Standing::Unknown),
        }
    }

    /// The same, of one that the changes' origin names by this UID. Where several servers have copies with one UID, it is known of some of
    /// them that the origin has them at another.
    fn named(&mut self, there: u32, guid: &str) -> Result<Standing> {
        let stands = self.standing(there, guid)?;
        if stands != Standing::Unknown && self.known_own(there, guid).is_some() {
            return Ok(stands);
        }
        let all = [stands, self.standing_here(there, guid)?];
        let is_another = |standing: &Standing| match standing {
            Standing::At(here) => self.has_another_there((*here, there), guid),
            Standing::Expunged | Standing::Unknown => false,
        };
        let known = || all.iter().filter(|standing| **standing != Standing::Unknown);
        Ok(match known().find(|standing| !is_another(standing)) {
            Some(meant) => *meant,
            None if self.is_gone_of_others(there, guid) => Standing::Expunged,
            None => known().next().copied().unwrap_or(Standing::Unknown),
        })
    }

    fn known_as(&self, there: u32, guid: &str) -> Option<&Known> {
        self.open.as_ref().and_then(|open| self.elsewhere.named(&open.guid, there, guid))
    }

    /// Not what it only may have there, because others have.
    fn known_own(&self, there: u32, guid: &str) -> Option<&Known> {
        self.open.as_ref().and_then(|open| self.elsewhere.own(&open.guid, there, guid))
    }

    /// Whether the message that the changes' origin has at this UID is gone here.
    fn is_gone(&self, there: u32, guid: &str) -> bool {
        self.known_own(there, guid).is_some_and(|known| known.here == GONE)
    }

    /// Whether some other server's message at this UID is gone here.
    fn is_gone_of_others(&self, there: u32, guid: &str) -> bool {
        let all = self.open.as_ref().map(|open| self.elsewhere.all_at(&open.guid, there)).unwrap_or_default();
        all.into_iter().any(|known| known.guid == guid && known.here == GONE)
    }

    /// Whether the message that has this UID here has another one where the changes come from.
    fn is_of_another(&self, here: u32, guid: &str) -> bool {
        self.open.as_ref().is_some_and(|open| self.elsewhere.is_of_another(&open.guid, here, guid))
    }

    /// Whether the message that has the first UID here is known to have another than the second one there.
    fn has_another_there(&self, uids: (u32, u32), guid: &str) -> bool {
        let origin = &self.current.origin;
        self.open.as_ref().is_some_and(|open| self.elsewhere.has_another(origin, &open.guid, uids, guid))
    }

    /// The UID that the message has where the changes come from, as far as that is known here.
    fn uid_there(&self, logs: &[Vec<u8>], here: u32, guid: &str) -> Option<u32> {
        let open = self.open.as_ref()?;
        // In the place of another mailbox, UIDs were given anew.
        let is_merged = self.aliases.values().any(|is| *is == open.guid);
        let as_it_came = || (!is_merged && mark::is_saved_by_us(logs, here)).then_some(here);
        self.elsewhere.uid_there(&open.guid, here, guid).or_else(as_it_came)
    }

    /// Of the message that had this UID here.
    fn standing_here(&mut self, uid: u32, guid: &str) -> Result<Standing> {
        if self.is_at(uid, guid)? {
            return Ok(Standing::At(uid));
        }
        let uid = mark::follow(&self.storage.log_files()?, uid);
        if self.is_at(uid, guid)? {
            return Ok(Standing::At(uid));
        }
        Ok(if self.storage.was_expunged(uid, guid)? { Standing::Expunged } else { Standing::Unknown })
    }

    /// With the transaction: what it completes, and that UIDs are not the same any more.
    fn write_marks(&mut self) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        // A claim is looked at again whenever it comes; what comes behind it may be applied already, and stays so.
        let completed = open.complete.take().filter(|change| !open.marks.has(change));
        let completed = completed.map(|change| open.marks.set(&change));
        let diverged = std::mem::take(&mut open.diverges).then(|| open.marks.diverge());
        let expunges = std::mem::take(&mut open.expunges).then(|| open.marks.expunges());
        let is_said = completed.is_some() || diverged.is_some() || expunges.is_some();
        let ours = (!is_said).then(|| open.marks.ours());
        // The last one of those that are written to one place holds.
        for (offset, bytes) in completed.into_iter().chain(diverged).chain(expunges).chain(ours) {
            self.storage.write_mark(offset, &bytes)?;
        }
        Ok(())
    }

    fn diverge(&mut self) {
        if let Some(open) = &mut self.open {
            open.diverges = !open.marks.has_diverged();
        }
    }

    /// Messages of the open mailbox got other UIDs than they had.
    fn has_diverged(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.marks.has_diverged())
    }

    /// Whether the current change was applied to the open mailbox before.
    fn is_applied(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.marks.has(&self.current))
    }

    /// Commits, raises what has to be raised, and closes the open mailbox.
    fn leave(&mut self) -> Outcome<()> {
        self.flush()?;
        // Not before: behind a mark, what a killed worker had saved before it is not looked for any more.
        if self.open.as_ref().is_some_and(|open| open.diverges) {
            self.pending = Pending::Changes;
            self.flush()?;
        }
        self.saved.clear();
        if let Some(open) = self.open.take() {
            let status = self.storage.status();
            let mut update = Update::default();
            if open.min_uid_next > status.uid_next {
                update.min_uid_next = open.min_uid_next;
            }
            if open.min_highest_modseq > status.highest_modseq {
                update.min_highest_modseq = open.min_highest_modseq;
            }
            if update.min_uid_next > 0 || update.min_highest_modseq > 0 {
                self.storage.update(&update)?;
            }
            self.storage.close();
        }
        Ok(())
    }

    // ---- Messages ----------------------------------------------------------------------------------------------------

    fn save(&mut self, stamp: &proto::Stamp, mailbox: &proto::Mailbox, save: &proto::Save) -> Outcome<()> {
        let wanted = save.birth.as_ref().map_or(0, |birth| birth.uid);
        if let Some(uid) = save.was.iter().chain([&wanted]).find(|uid| **uid > UID_MAX) {
            return Err(format!("malformed change: UID {uid}").into());
        }
        name::check_message_guid(&save.guid)?;
        self.enter(mailbox, Reason::Save)?;
        if self.is_applied() && !self.moves {
            // It may not have been said where it stands.
            return self.tell_if_elsewhere(&save.guid, wanted);
        }
        if let Pending::Changes = self.pending {
            self.flush()?;
        }
        if !save.was.is_empty() {
            self.diverge();
        }
        if wanted != 0 && self.has_uid(wanted) && self.complete_torn(save, wanted)? {
            return Ok(());
        }
        let Some(uid) = self.place(mailbox, wanted, save)? else {
            return Ok(());
        };
        let is_pending =
            matches!(&self.pending, Pending::Saves(all) if all.iter().any(|asked| asked.guid == save.guid));
        if is_pending {
            self.flush()?;
        }
        let is_alone = self.storage.is_saved_alone(&save.guid)?;
        if is_alone {
            self.flush()?;
        }
        let message = NewMessage {
            guid: &save.guid,
            uid,
            flags: save.flags,
            keywords: &save.keywords,
            received_date: save.received_date,
            save_date: save.save_date,
        };
        if !self.copy(&message, save)? {
            if save.body_inline {
                self.storage.save(&message, Body::Bytes(&save.body))?;
            } else {
                // Storage may hold locks while a transaction has saves: not while we wait for a body.
                self.flush()?;
                let fetched = self.fetch(stamp, mailbox, save)?;
                let Some(body) = fetched.body() else {
                    // It was expunged there; that comes next, and means no copy of it.
                    self.note("body_gone");
                    self.note_elsewhere(wanted, &save.guid, GONE, false);
                    // No other message may get its UID. (Where it could not be had, none was used up here.)
                    if let Some(open) = &mut self.open {
                        open.min_uid_next = open.min_uid_next.max(wanted.saturating_add(1));
                    }
                    return Ok(self.raise_uid_next()?);
                };
                self.storage.save(&message, body)?;
            }
        }
        let uid_next = self.open.as_ref().map_or(0, |open| open.uid_next);
        if let Some(open) = &mut self.open {
            open.uid_next = open.uid_next.max(uid.saturating_add(1));
        }
        let (guid, was, flags) = (save.guid.clone(), save.was.clone(), all_flags(save));
        let asked = Asked { guid, there: wanted, was, uid, uid_next, flags };
        match &mut self.pending {
            Pending::Saves(all) => all.push(asked),
            pending => *pending = Pending::Saves(vec![asked]),
        }
        let is_full = matches!(&self.pending, Pending::Saves(all) if all.len() >= SAVES_MAX);
        match is_full || is_alone {
            true => self.flush(),
            false => Ok(()),
        }
    }

    /// Whether some message here has this UID, had it, or can not have it any more.
    fn has_uid(&self, uid: u32) -> bool {
        self.open.as_ref().is_some_and(|open| uid < open.uid_next)
    }

    /// Whether the message is neither in the mailbox nor about to be.
    fn is_nowhere(&mut self, guid: &str) -> Outcome<bool> {
        let is_pending = matches!(&self.pending, Pending::Saves(all) if all.iter().any(|asked| asked.guid == guid));
        match &mut self.open {
            Some(open) if !is_pending => Ok(!open.guids.may_have(self.storage, guid)?),
            _ => Ok(false),
        }
    }

    /// True if a worker that was killed has saved the message, but perhaps not all that belongs to it.
    fn complete_torn(&mut self, save: &proto::Save, wanted: u32) -> Outcome<bool> {
        if !self.storage.is_torn_when_killed() {
            return Ok(false);
        }
        self.flush()?;
        let uid = match self.is_same(wanted, &save.guid)? {
            true => wanted,
            false => match self.storage.stray(&save.guid)? {
                Some(stray) if self.storage.find_messages(&save.guid)?.is_empty() => stray,
                Some(_) => {
                    // Another message has its GUID: a copy is saved, or what was saved has moved since.
                    self.drop_stray(&save.guid)?;
                    return Ok(false);
                }
                None => return Ok(false),
            },
        };
        if !self.is_at(uid, &save.guid)? {
            self.storage.adopt(uid, &save.guid)?;
            if let Some(open) = &mut self.open {
                // The message had another one.
                open.guids = Guids::default();
            }
        }
        self.storage.update_flags(uid, uid, &all_flags(save))?;
        self.note_was(&save.guid, &save.was, uid);
        self.pending = Pending::Changes;
        if uid != wanted {
            self.diverge();
            self.solved(Rule::UidTaken);
            self.note_elsewhere(wanted, &save.guid, uid, false);
            self.tell_uid(&save.guid, uid, There { uid: wanted, next: 0, raised: 0 }, (vec![], wanted));
        }
        self.flush()?;
        Ok(true)
    }

    /// The UID to save the message with, 0 for the next one; None if it was saved already.
    fn place(&mut self, mailbox: &proto::Mailbox, wanted: u32, save: &proto::Save) -> Outcome<Option<u32>> {
        let guid = &save.guid;
        let is_told_again = save.found || save.kept;
        if wanted != 0 && !self.has_uid(wanted) && (!is_told_again || self.is_nowhere(guid)?) {
            return Ok(Some(wanted));
        }
        // What is pending must be seen.
        self.flush()?;
        // One that is kept may have got the UID that it was given here.
        if wanted != 0 && (self.is_same(wanted, guid)? || save.kept && self.is_at(wanted, guid)?) {
            if mark::is_saved_by_others(&self.storage.log_files()?, wanted) {
                // Two servers have made a copy with one UID, which may have had other flags on each.
                self.storage.update_flags(wanted, wanted, &all_flags(save))?;
                self.pending = Pending::Changes;
            }
            self.is_known_to_have_been(save, wanted);
            return Ok(None);
        }
        if is_told_again {
            let mut found = self.storage.find_messages(guid)?;
            if save.kept {
                let logs = self.storage.log_files()?;
                found.retain(|uid| !self.is_kept_beside(&logs, (*uid, wanted), guid));
            }
            if let Some(stands) = found.pop() {
                self.is_known_to_have_been(save, stands);
                if wanted != 0 && !self.moves {
                    self.take_claim(guid, stands, There { uid: wanted, next: 0, raised: 0 })?;
                }
                return Ok(None);
            }
            if !self.has_uid(wanted) {
                return Ok(Some(wanted));
            }
        }
        let is_found = save.found || save.found_beside;
        let was_expunged = match is_told_again || is_found {
            // It may also have gone with a worker that deleted its mailbox, or took the index's loss for an expunge. The UID is the one
            // that it has there now, whatever it had before.
            true => self.was_expunged_at(wanted, guid)? && self.is_expunged_by_client(wanted)?,
            false => self.was_expunged_from(wanted, guid)?,
        };
        let standing = match was_expunged && !self.has_diverged() {
            true => Standing::Unknown,
            false => self.given_another(wanted, guid, save.copied_from.as_ref())?,
        };
        match standing {
            Standing::At(stands) => {
                if stands < wanted {
                    // A message that is elsewhere is above.
                    let next = self.here(None).next;
                    self.renumber(guid, stands, next)?;
                } else if wanted != 0 && !self.has_diverged() {
                    // What a killed worker left in a maildir: nobody has said where it stands, and until now it did not matter.
                    self.diverge();
                    self.solved(Rule::UidTaken);
                    self.note_elsewhere(wanted, guid, stands, false);
                    self.tell_uid(guid, stands, There { uid: wanted, next: 0, raised: 0 }, (vec![], wanted));
                    return Ok(None);
                }
                self.tell_if_elsewhere(guid, wanted)?;
                return Ok(None);
            }
            Standing::Unknown if !was_expunged => {}
            // A worker that was killed had saved it, and nobody there knows the UID by which a client's expunge named it. Or a copy
            // that was made here with the same UID came and went, of which nobody was told.
            Standing::Expunged | Standing::Unknown => {
                self.tell_expunge(wanted, guid);
                return Ok(None);
            }
        }
        if wanted == 0 {
            return Ok(Some(0));
        }
        // Given to another message here, or jumped over. Where it goes is noted when it is there.
        self.note_elsewhere(wanted, guid, 0, false);
        self.diverge();
        Ok(match uid::place(self.here(None), There { uid: wanted, next: mailbox.uid_next, raised: 0 }) {
            Put::At(uid) => Some(uid),
            Put::Stay | Put::Next => Some(0),
        })
    }

    /// Whether the message that has the first UID here is another copy of the one that was kept there with the second: of those, each is
    /// told.
    fn is_kept_beside(&self, logs: &[Vec<u8>], (here, wanted): (u32, u32), guid: &str) -> bool {
        if self.saved.contains(&here) || self.has_another_there((here, wanted), guid) {
            return true;
        }
        // A third server may have given it the one that is known.
        self.is_pair && self.uid_there(logs, here, guid).is_some_and(|there| there != wanted)
    }

    /// What is known of a message that was saved before, where its UID was taken. Another one with the same GUID is none of it:
    /// somebody copied it inside of the mailbox.
    fn given_another(&mut self, wanted: u32, guid: &str, twin: Option<&proto::CopiedFrom>) -> Result<Standing> {
        if wanted == 0 {
            return Ok(self.storage.find_messages(guid)?.pop().map_or(Standing::Unknown, Standing::At));
        }
        // Files that a killed worker left in a maildir get UIDs in any order, before anybody knows.
        if !self.has_diverged() && !self.storage.is_torn_when_killed() {
            return Ok(Standing::Unknown);
        }
        // One that was moved from this UID is another one.
        match if self.known_own(wanted, guid).is_some() { self.standing(wanted, guid)? } else { Standing::Unknown } {
            Standing::Unknown => {}
            known => return Ok(known),
        }
        // Copies that two servers made with one UID are one.
        let born = self.open.as_ref().and_then(|open| self.elsewhere.saved_with(&open.guid, wanted, guid));
        // Unless that one stands beside it there.
        let born = born.filter(|here| !self.has_another_there((*here, wanted), guid));
        match born.map_or(Ok(Standing::Unknown), |here| self.standing_here(here, guid))? {
            Standing::Unknown => self.saved_by_killed_worker(wanted, guid, twin),
            known => Ok(known),
        }
    }

    /// A worker was killed in the middle of the change: what it had saved is there, or a client has expunged it since.
    fn saved_by_killed_worker(
        &mut self,
        wanted: u32,
        guid: &str,
        twin: Option<&proto::CopiedFrom>,
    ) -> Result<Standing> {
        let logs = self.storage.log_files()?;
        // Where files are put into their places first, the next sync of whomever finds them.
        let by_any = self.storage.is_torn_when_killed();
        let Some(open) = &self.open else { return Ok(Standing::Unknown) };
        let is_here = |from: &&proto::CopiedFrom| from.mailbox.as_ref().is_some_and(|of| of.guid == open.guid);
        let twin = twin.filter(is_here).map_or(0, |from| from.uid);
        for (uid, is_ours) in open.marks.saved_since(&logs, &self.current.origin, by_any) {
            // Where it was placed, it had to go above.
            let is_below = uid < wanted && is_ours;
            if is_below || self.saved.contains(&uid) || self.is_of_another(uid, guid) {
                continue;
            }
            // What a client saved or copied, and what the peer has made a copy of, is none of it.
            if !is_ours && (uid == twin || !self.storage.may_be_ours(uid, guid)?) {
                continue;
            }
            match self.standing_here(uid, guid)? {
                Standing::Unknown => {}
                // It was saved there with another UID, and has moved here since.
                Standing::At(uid) if self.has_another_there((uid, wanted), guid) => {}
                known => return Ok(known),
            }
        }
        Ok(Standing::Unknown)
    }

    /// Of this server, or of another one that told of it.
    fn is_expunged_by_client(&mut self, uid: u32) -> Result<bool> {
        let logs = self.storage.log_files()?;
        let done = mark::done_since(&logs, (0, 0), uid);
        let is_own = done.iter().any(|delta| matches!(delta, Delta::Expunge { .. }));
        Ok(is_own || mark::is_expunged_for_client(&logs, uid))
    }

    /// Whether the message that the changes' origin saved with this UID is at it here, and no copy of it.
    fn is_same(&mut self, uid: u32, guid: &str) -> Result<bool> {
        Ok(!self.is_of_another(uid, guid) && self.is_at(uid, guid)?)
    }

    /// Whether it was expunged from this UID, and not moved from it.
    fn was_expunged_from(&mut self, uid: u32, guid: &str) -> Result<bool> {
        Ok(!self.is_of_another(uid, guid) && self.was_expunged_at(uid, guid)?)
    }

    fn was_expunged_at(&mut self, uid: u32, guid: &str) -> Result<bool> {
        Ok(self.storage.was_expunged(uid, guid)? && mark::follow(&self.storage.log_files()?, uid) == uid)
    }

    fn is_at(&mut self, uid: u32, guid: &str) -> Result<bool> {
        Ok(self.storage.message_guid(uid)?.as_deref() == Some(guid))
    }

    /// Copies the message inside of the user if it is here. False if it isn't.
    fn copy(&mut self, message: &NewMessage, save: &proto::Save) -> Outcome<bool> {
        let Some(from) = &save.copied_from else {
            return Ok(false);
        };
        let Some(source) = &from.mailbox else {
            return Ok(false);
        };
        let vname = name::vname(&source.path, &self.namespace)?;
        if self.storage.existence(&vname)? == Existence::Mailbox && self.storage.copy(message, &vname, from.uid)? {
            return Ok(true);
        }
        match self.find_guid(&guid_of(source)?)? {
            Some(found) if found != vname => Ok(self.storage.copy(message, &found, from.uid)?),
            _ => Ok(false),
        }
    }

    fn fetch(&mut self, stamp: &proto::Stamp, mailbox: &proto::Mailbox, save: &proto::Save) -> Outcome<Fetched> {
        *self.next_body += 1;
        let request = proto::BodyRequest {
            id: *self.next_body,
            origin: stamp.origin.clone(),
            user: self.user.into(),
            mailbox: Some(mailbox.clone()),
            uid: save.birth.as_ref().map_or(0, |birth| birth.uid),
            guid: save.guid.clone(),
            window: body::WINDOW_BYTES,
            asker: String::new(),
        };
        let fetched = body::fetch(self.storage, self.connection, request)?;
        Ok(fetched.map_err(|error| {
            format!(
                "cannot fetch the body of GUID {} from {}: {error}",
                printable(&save.guid),
                printable(&stamp.origin)
            )
        })?)
    }

    /// The UIDs here of the messages meant, as ranges.
    fn find(&mut self, messages: &[proto::MessageRange]) -> Outcome<Found> {
        let mut found = Found::default();
        for range in messages {
            if range.guid.is_empty() && range.guid_128.is_empty() {
                self.find_by_uid(range, &mut found)?;
                continue;
            }
            if range.guid.is_empty() {
                let uid = self.find_hashed(range)?.map(|uid| (uid, uid));
                // It may be named by several UIDs that it had.
                found.sure.extend(uid.filter(|uid| !found.sure.contains(uid)));
                continue;
            }
            if self.is_gone(range.first_uid, &range.guid) {
                continue;
            }
            match self.named(range.first_uid, &range.guid)? {
                Standing::At(uid) => found.sure.push((uid, uid)),
                Standing::Expunged => {}
                // It was given another UID here.
                Standing::Unknown => {
                    let all = self.storage.find_messages(&range.guid)?;
                    let logs = self.storage.log_files()?;
                    let is_it = |uid: &&u32| match self.uid_there(&logs, **uid, &range.guid) {
                        // A third server may have given it the one that is known.
                        _ if !self.is_pair => all.len() == 1 || !self.is_of_another(**uid, &range.guid),
                        Some(_) => false,
                        None => true,
                    };
                    // It was given another one there, which is a higher one, and nobody has said so yet.
                    let is_below = |uid: &&u32| {
                        self.uid_there(&logs, **uid, &range.guid).is_some_and(|there| there < range.first_uid)
                    };
                    let mut below = all.iter().filter(is_below);
                    let only = below.next().filter(|_| self.is_pair && below.next().is_none());
                    match all.iter().rfind(is_it).or(only) {
                        Some(uid) => found.guessed.push((*uid, *uid)),
                        None => self.doubt_unknown(),
                    }
                }
            }
        }
        Ok(found)
    }

    /// A third server can have told of a message before who passes it on to us has told that it is there: a session of a
    /// client found its file before our worker there was done. What was told is not done here, and must be found.
    fn doubt_unknown(&mut self) {
        self.note("messages_unknown");
        let Some(open) = self.open.as_ref().filter(|_| !self.is_pair) else { return };
        let is_known = |doubt: &proto::Doubt| doubt.guid == open.guid && doubt.reason == UNKNOWN;
        if !self.doubts.iter().any(is_known) {
            let path = open.path.clone();
            self.doubts.push(proto::Doubt {
                guid: open.guid.to_vec(),
                path,
                reason: UNKNOWN.into(),
                ..Default::default()
            });
        }
    }

    /// The message with this hashed GUID. The one that has the UID here may have been saved at the same time.
    fn find_hashed(&mut self, range: &proto::MessageRange) -> Result<Option<u32>> {
        let guid = Guid::try_from(&range.guid_128[..]).map_err(|_| "malformed change: a GUID is not 16 bytes")?;
        let open = self.open.as_ref();
        if open.and_then(|open| self.elsewhere.own_at(&open.guid, range.first_uid)).is_some_and(|own| own.here == GONE)
        {
            // What has the UID here is a copy of it, whose UID there nobody has said yet.
            return Ok(None);
        }
        let there = self.storage.message_info(range.first_uid)?.filter(|info| info.guid_128 == guid);
        if there.is_some_and(|info| !self.is_of_another(range.first_uid, &info.guid)) {
            return Ok(Some(range.first_uid));
        }
        // Where it has another UID, that is known, or the log says that it was moved. Otherwise it never came: any other one with
        // the GUID is a copy, or was moved out of the mailbox and back.
        let logs = self.storage.log_files()?;
        for here in self.may_be_at(range.first_uid) {
            let uid = mark::follow(&logs, here);
            if self.storage.message_info(uid)?.is_some_and(|info| info.guid_128 == guid) {
                return Ok(Some(uid));
            }
        }
        Ok(None)
    }

    /// The UIDs here of messages of which the changes' origin may have one at this UID.
    fn may_be_at(&self, there: u32) -> Vec<u32> {
        let known = self.open.as_ref().map(|open| self.elsewhere.all_at(&open.guid, there)).unwrap_or_default();
        let mut uids: Vec<u32> = known.into_iter().map(|known| known.uid().unwrap_or(there)).collect();
        if uids.is_empty() {
            uids.push(there);
        }
        uids
    }

    /// Of messages that the origin names by their UIDs alone.
    fn find_by_uid(&mut self, range: &proto::MessageRange, found: &mut Found) -> Result<()> {
        let Some(open) = &self.open else { return Ok(()) };
        let Resolved { uids, elsewhere } = self.elsewhere.resolve(&open.guid, range.first_uid, range.last_uid);
        found.sure.extend(uids);
        let elsewhere: Vec<Known> = elsewhere.into_iter().filter(|known| known.here != GONE).cloned().collect();
        for Known { guid, here, .. } in elsewhere {
            match self.standing_here(here, &guid)? {
                Standing::At(uid) => found.sure.push((uid, uid)),
                Standing::Expunged => {}
                Standing::Unknown => {
                    let uid = self.storage.find_messages(&guid)?.pop();
                    found.guessed.extend(uid.map(|uid| (uid, uid)));
                }
            }
        }
        Ok(())
    }

    fn update_flags(&mut self, mailbox: &proto::Mailbox, update: &proto::FlagUpdate) -> Outcome<()> {
        if !self.enter_for_change(mailbox)? {
            return Ok(());
        }
        self.flush_other_keywords(update)?;
        let Found { sure, guessed } = self.find(&update.messages)?;
        for (first, last) in sure.into_iter().chain(guessed) {
            self.storage.update_flags(first, last, update)?;
            self.pending = Pending::Changes;
        }
        Ok(())
    }

    /// Dovecot drops keyword updates that change nothing, by what is committed (`keyword_update_has_changes`): in one
    /// transaction with its opposite the later one would be lost.
    fn flush_other_keywords(&mut self, update: &proto::FlagUpdate) -> Outcome<()> {
        let added = update.add_keywords.iter().map(|name| (name, true));
        let keywords: Vec<(&String, bool)> =
            added.chain(update.remove_keywords.iter().map(|name| (name, false))).collect();
        if keywords.iter().any(|(name, add)| self.pending_keywords.get(*name).is_some_and(|pending| pending != add)) {
            self.flush()?;
        }
        self.pending_keywords.extend(keywords.into_iter().map(|(name, add)| (name.clone(), add)));
        Ok(())
    }

    fn expunge(&mut self, mailbox: &proto::Mailbox, expunge: &proto::Expunge) -> Outcome<()> {
        if !self.enter_for_change(mailbox)? {
            return Ok(());
        }
        let Found { sure, guessed } = self.find(&expunge.messages)?;
        for (first, last) in sure {
            self.storage.expunge(first, last)?;
            self.pending = Pending::Changes;
            self.open.iter_mut().for_each(|open| open.expunges = true);
        }
        // Perhaps another copy was meant. If the peer still has this one, it shall come back.
        if !guessed.is_empty() {
            self.flush()?;
            for (first, last) in guessed {
                self.storage.expunge(first, last)?;
            }
            self.pending = Pending::Changes;
            self.flush()?;
        }
        Ok(())
    }

    /// Not all servers have the same contents under these GUIDs. Those that we have stay, and are told, under other ones.
    fn set_apart(&mut self, mailbox: &proto::Mailbox, apart: &proto::Apart) -> Outcome<()> {
        if !self.enter_for_change(mailbox)? {
            return Ok(());
        }
        for message in &apart.messages {
            let Found { sure, guessed } = self.find(std::slice::from_ref(message))?;
            for (uid, _) in sure.into_iter().chain(guessed) {
                let Some(own) = apart::own(self.storage, uid, &message.guid, message.first_uid)? else { continue };
                self.keep_apart(own)?;
                self.storage.expunge(uid, uid)?;
                self.pending = Pending::Changes;
            }
        }
        Ok(())
    }

    /// It is told before the other one goes: whoever is killed behind that does not come here again.
    fn keep_apart(&mut self, own: Own) -> Outcome<()> {
        self.flush()?;
        let is_new = apart::keep(self.storage, &own)?;
        if let Some(open) = &mut self.open {
            open.uid_next = self.storage.status().uid_next;
        }
        // Otherwise the peer has the same, or a worker was killed.
        if is_new || self.again.contains(&self.current.seq) {
            if let Some(uid) = self.storage.find_messages(&own.guid)?.pop() {
                if let Some(save) = self.save_again(uid)? {
                    self.note("set_apart");
                    self.tell_op(What::Save(save));
                    self.report()?;
                }
            }
        }
        Ok(())
    }

    /// Nothing is taken away because it went there when an index was made anew: that may be a loss. It is told again.
    fn compare_rebuilt(&mut self, mailbox: &proto::Mailbox, rebuilt: &proto::MailboxRebuilt) -> Outcome<()> {
        if !self.enter_for_change(mailbox)? {
            return Ok(());
        }
        self.flush()?;
        let is_there = |uid: &u32| {
            *uid >= rebuilt.uid_next || rebuilt.present.iter().any(|r| (r.first_uid..=r.last_uid).contains(uid))
        };
        let gone: Vec<u32> = self.storage.uids()?.into_iter().filter(|uid| !is_there(uid)).collect();
        if gone.len() > GONE_MAX {
            let gone = gone.len();
            let origin = printable(&self.current.origin);
            self.doubts.push(proto::Doubt {
                guid: mailbox.guid.clone(),
                path: mailbox.path.clone(),
                reason: format!("{gone} of its messages are not on server {origin} since its index was rebuilt there"),
                ..Default::default()
            });
            return Ok(());
        }
        let moved = Moved::of(&self.storage.log_files()?);
        for uid in gone {
            if let Some(save) = self.save_again(uid)? {
                self.note("told_again");
                self.tell_op(What::Save(proto::Save { was: moved.before(uid), ..save }));
            }
        }
        Ok(())
    }

    /// A message that is here, for who has lost it.
    fn save_again(&mut self, uid: u32) -> Result<Option<proto::Save>> {
        let Some((flags, keywords)) = self.storage.message_flags(uid)? else { return Ok(None) };
        let Some(save) = look::save(self.storage, uid, 0)? else { return Ok(None) };
        Ok(Some(proto::Save { flags, keywords, found: true, ..save }))
    }

    fn enter_for_change(&mut self, mailbox: &proto::Mailbox) -> Outcome<bool> {
        if !self.enter(mailbox, Reason::Change)? {
            self.note("mailbox_missing");
            return Ok(false);
        }
        if self.is_applied() {
            return Ok(false);
        }
        if let Pending::Saves(_) = self.pending {
            self.flush()?;
        }
        Ok(true)
    }
}

/// Messages that a change names, as ranges of their UIDs here.
#[derive(Default)]
struct Found {
    sure: Vec<(u32, u32)>,
    /// By nothing but its GUID: perhaps another copy is meant, which never came.
    guessed: Vec<(u32, u32)>,
}

/// What is known of a message that has, or had, another UID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    At(u32),
    Expunged,
    Unknown,
}

fn all_flags(save: &proto::Save) -> proto::FlagUpdate {
    proto::FlagUpdate { add: save.flags, add_keywords: save.keywords.clone(), ..Default::default() }
}

fn is_of(open: &Open, mailbox: &proto::Mailbox) -> bool {
    open.mailbox.0 == mailbox.guid && open.mailbox.1 == mailbox.path
}

/// For messages to people: text from outside without control characters, cut.
pub fn printable(text: &str) -> String {
    text.chars().take(200).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::super::fake::{gone, FakeStorage, Script, HASHED_GUID, INBOX_GUID};
    use super::*;
    use crate::wire::proto::SeqOf;

    const GUID: [u8; 16] = [7; 16];

    fn inbox() -> proto::Mailbox {
        proto::Mailbox { guid: GUID.to_vec(), path: vec!["INBOX".into()], uid_validity: 9, ..Default::default() }
    }

    fn change(seq: u64, what: What) -> proto::Change {
        proto::Change {
            stamp: Some(proto::Stamp { origin: "a".into(), epoch: 1, seq, ..Default::default() }),
            user: "jane".into(),
            mailbox: Some(inbox()),
            ops: vec![proto::Op { what: Some(what) }],
            ..Default::default()
        }
    }

    fn save(seq: u64, uid: u32, guid: &str) -> proto::Change {
        change(
            seq,
            What::Save(proto::Save {
                birth: Some(proto::Birth { guid: vec![1; 16], uid, ..Default::default() }),
                guid: guid.into(),
                size: guid.len() as u64,
                body_inline: true,
                body: guid.into(),
                ..Default::default()
            }),
        )
    }

    fn expunge(seq: u64, uid: u32, guid: &str) -> proto::Change {
        let range = proto::MessageRange { first_uid: uid, last_uid: uid, guid: guid.into(), ..Default::default() };
        change(seq, What::Expunge(proto::Expunge { messages: vec![range] }))
    }

    #[derive(Debug)]
    struct Outcome {
        done: u32,
        notes: Vec<String>,
        error: Option<String>,
        told: Vec<What>,
        causes: Vec<SeqOf>,
        doubts: usize,
    }

    fn apply(storage: &mut FakeStorage, script: Script, changes: &[proto::Change]) -> Outcome {
        apply_as(false, storage, script, changes)
    }

    fn apply_as(resolves: bool, storage: &mut FakeStorage, script: Script, changes: &[proto::Change]) -> Outcome {
        apply_among(true, resolves, storage, script, changes)
    }

    /// There are more than two servers.
    fn apply_in_mesh(resolves: bool, storage: &mut FakeStorage, changes: &[proto::Change]) -> Outcome {
        apply_among(false, resolves, storage, Script::default(), changes)
    }

    fn apply_among(
        is_pair: bool,
        resolves: bool,
        storage: &mut FakeStorage,
        script: Script,
        changes: &[proto::Change],
    ) -> Outcome {
        let mut connection = Connection::new(script);
        let (mut next_body, mut told, mut elsewhere) = (0, Vec::new(), Vec::new());
        let mut on_commit = |_: &mut FakeStorage, _: &mut Connection<Script>, committed: Committed| {
            told.extend(committed.tell);
            elsewhere.extend(committed.elsewhere);
            Ok(())
        };
        let peer = changes.first().and_then(|change| change.stamp.as_ref()).map_or("", |stamp| &stamp.origin);
        // As the relay gives them back.
        let mut known = std::mem::take(&mut storage.elsewhere);
        known.iter_mut().filter(|one| one.server.is_empty()).for_each(|one| one.server = peer.to_owned());
        let known = Elsewhere::of(known, peer);
        let (again, me) = (std::mem::take(&mut storage.again), storage.me.clone());
        let aliases = std::mem::take(&mut storage.aliases);
        let mut apply =
            Apply::new(storage, &mut connection, "jane", resolves, known, &mut next_body, &mut on_commit).unwrap();
        (apply.again, apply.me, apply.is_pair) = (again, me, is_pair);
        apply.know_aliases(&aliases);
        let result = apply.run(changes);
        let (done, mut notes, rest) = (apply.done, apply.notes.clone(), std::mem::take(&mut apply.tell));
        let doubts = apply.doubts.len();
        notes.extend(apply.conflicts.iter().map(|conflict| conflict.rule.clone()));
        let noted = apply.elsewhere.take_new();
        told.extend(rest);
        elsewhere.extend(noted);
        storage.elsewhere = elsewhere;
        storage.close();
        let error = match result {
            Ok(()) => None,
            Err(Failure::User(reason) | Failure::Never(reason)) => Some(reason),
            Err(Failure::Link(error)) => Some(format!("link: {error}")),
        };
        let causes = told.iter().flat_map(|change| change.stamp.clone().unwrap().vector).collect();
        let told = told.iter().flat_map(|change| &change.ops).map(|op| op.what.clone().unwrap()).collect();
        Outcome { done, notes, error, told, causes, doubts }
    }

    fn apart(seq: u64, uid: u32, guid: &str) -> proto::Change {
        let range = proto::MessageRange { first_uid: uid, last_uid: uid, guid: guid.into(), ..Default::default() };
        change(seq, What::Apart(proto::Apart { messages: vec![range] }))
    }

    /// The GUID that the message gets, as its server has it.
    fn guid_apart(uid: u32, guid: &str, body: &[u8]) -> String {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(uid, guid)]);
        storage.bodies.insert(uid, body.to_vec());
        storage.open("INBOX", false).unwrap();
        apart::own(&mut storage, uid, guid, uid).unwrap().unwrap().guid
    }

    #[test]
    fn whoever_hears_that_contents_differ_keeps_its_own_and_tells_of_them() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(4, "four"), (5, "five")]);
        let (theirs, ours) = (guid_apart(5, "five", b"theirs"), guid_apart(5, "five", b"five"));
        let outcome = apply(&mut storage, Script::default(), &[save(1, 6, &theirs), apart(2, 5, "five")]);
        assert_eq!((outcome.done, outcome.error.as_deref()), (2, None));
        assert_eq!(storage.messages("INBOX"), [(4, "four".into()), (6, theirs), (7, ours.clone())]);
        let [What::Save(told)] = &outcome.told[..] else { panic!("{outcome:?}") };
        assert_eq!((told.guid.as_str(), told.birth.as_ref().unwrap().uid, told.found), (ours.as_str(), 7, true));
        assert_eq!(outcome.causes[0].seq, 2);
    }

    #[test]
    fn whoever_has_the_same_contents_as_who_tells_has_them_once() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(5, "five")]);
        let theirs = guid_apart(5, "five", b"five");
        let outcome = apply(&mut storage, Script::default(), &[save(1, 6, &theirs), apart(2, 5, "five")]);
        assert_eq!((storage.messages("INBOX"), outcome.told.len()), (vec![(6, theirs)], 0));
    }

    #[test]
    fn a_worker_that_was_killed_while_it_set_apart_is_no_reason_to_keep_it_twice() {
        let mut storage = FakeStorage::default();
        let ours = guid_apart(5, "five", b"five");
        storage.add("INBOX", GUID, 9, &[(5, "five"), (6, &ours)]);
        storage.again = vec![2];
        let outcome = apply(&mut storage, Script::default(), &[apart(2, 5, "five")]);
        assert_eq!(storage.messages("INBOX"), [(6, ours)]);
        // Nobody may have heard of it.
        assert!(matches!(&outcome.told[..], [What::Save(_)]), "{outcome:?}");
    }

    #[test]
    fn what_cannot_be_read_is_not_expunged() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(5, "five")]);
        storage.unreadable = Some(5);
        let outcome = apply(&mut storage, Script::default(), &[apart(2, 5, "five")]);
        assert!(outcome.done == 0 && outcome.error.is_some(), "{outcome:?}");
        assert_eq!(storage.messages("INBOX").len(), 1);
    }

    #[test]
    fn of_two_empty_mailboxes_the_higher_uidvalidity_stays_on_both_sides() {
        for (ours, theirs, expected) in [(5, 7, 7), (7, 5, 7)] {
            let mut storage = FakeStorage::default();
            storage.add("INBOX", GUID, ours, &[]);
            let mut create = change(1, What::Create(proto::MailboxCreate::default()));
            create.mailbox.as_mut().unwrap().uid_validity = theirs;
            let outcome = apply(&mut storage, Script::default(), &[create]);
            assert_eq!((outcome.error, outcome.notes), (None, vec![]));
            assert_eq!(storage.uid_validity("INBOX"), expected);
        }
    }

    fn of(mailbox: (u8, &str), uid_validity: u32, change: proto::Change) -> proto::Change {
        let (guid, name) = mailbox;
        let mailbox =
            proto::Mailbox { guid: vec![guid; 16], path: vec![name.into()], uid_validity, ..Default::default() };
        proto::Change { mailbox: Some(mailbox), ..change }
    }

    fn create(had_mail: bool) -> What {
        create_of(had_mail, &[])
    }

    fn create_of(had_mail: bool, was: &[u8]) -> What {
        let was = was.iter().map(|guid| vec![*guid; 16]).collect();
        What::Create(proto::MailboxCreate { had_mail, was, ..Default::default() })
    }

    /// Only that the mailbox with this GUID has become it.
    fn became_again(was: u8) -> What {
        What::Create(proto::MailboxCreate { was: vec![vec![was; 16]], again: true, ..Default::default() })
    }

    #[test]
    fn a_mailbox_that_is_told_again_is_not_made_where_it_is_gone() {
        let again = |uid_validity| {
            let create = What::Create(proto::MailboxCreate { again: true, ..Default::default() });
            of((4, "Work"), uid_validity, change(1, create))
        };
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[]);
        apply(&mut storage, Script::default(), &[again(7)]);
        assert_eq!(storage.existence("Work").unwrap(), Existence::None);
        storage.add("Work", [4; 16], 5, &[]);
        apply(&mut storage, Script::default(), &[again(7)]);
        assert_eq!(storage.uid_validity("Work"), 7);
    }

    #[test]
    fn of_two_mailboxes_of_one_name_with_mail_both_sides_keep_the_same() {
        // Whoever hears of the other, and whichever of its mails or its creation comes first.
        for creates_first in [true, false] {
            let mut storage = FakeStorage::default();
            storage.add("Work", [3; 16], 20, &[(1, "ours")]);
            let theirs = of((4, "Work"), 10, save(2, 1, "theirs"));
            let created = of((4, "Work"), 10, change(1, create(false)));
            let changes = if creates_first { vec![created, theirs] } else { vec![theirs] };
            let outcome = apply(&mut storage, Script::default(), &changes);
            assert_eq!(outcome.error, None);
            assert_eq!((storage.guid("Work"), storage.uid_validity("Work")), ([3; 16], 20));
            assert_eq!(storage.messages("Work"), named(&[(1, "ours"), (2, "theirs")]));
            let became = create_of(true, &[4]);
            assert!(outcome.told.contains(&became), "{:?}", outcome.told);

            let mut storage = FakeStorage::default();
            storage.add("Work", [4; 16], 10, &[(1, "theirs")]);
            let ours = of((3, "Work"), 20, save(1, 1, "ours"));
            let outcome = apply_as(true, &mut storage, Script::default(), &[ours]);
            assert_eq!(outcome.error, None);
            assert_eq!((storage.guid("Work"), storage.uid_validity("Work")), ([3; 16], 20));
            assert_eq!(storage.messages("Work"), named(&[(1, "theirs"), (2, "ours")]));
        }
    }

    #[test]
    fn an_empty_mailbox_that_stays_is_told_once() {
        let mut storage = FakeStorage::default();
        storage.add("Work", [9; 16], 10, &[]);
        let created = of((4, "Work"), 10, change(1, create(false)));
        let outcome = apply(&mut storage, Script::default(), std::slice::from_ref(&created));
        assert_eq!((storage.guid("Work"), outcome.told), ([9; 16], vec![create_of(false, &[4])]));
    }

    #[test]
    fn a_mailbox_that_is_renamed_onto_another_goes_into_it() {
        let mut storage = FakeStorage::default();
        storage.add("Work", [5; 16], 10, &[(1, "one"), (4, "two")]);
        storage.add("Play", [4; 16], 10, &[(1, "three")]);
        let rename = What::Rename(proto::MailboxRename { new_path: vec!["Play".into()], back: vec![] });
        let changes = [of((5, "Work"), 10, change(1, rename))];
        for _ in 0..2 {
            let outcome = apply_as(true, &mut storage, Script::default(), &changes);
            assert_eq!(outcome.error, None);
            assert_eq!((storage.existence("Work").unwrap(), storage.guid("Play")), (Existence::None, [5; 16]));
            assert_eq!(storage.messages("Play"), named(&[(1, "three"), (2, "one"), (4, "two")]));
        }
    }

    #[test]
    fn what_was_applied_since_loses_no_message_of_a_mailbox_that_goes() {
        let mut storage = FakeStorage::default();
        storage.add("Work", [5; 16], 10, &[(1, "one")]);
        storage.add("Play", [4; 16], 10, &[(1, "three")]);
        // A later change of the same server is applied already, and this one is sent again.
        apply(&mut storage, Script::default(), &[of((4, "Play"), 10, save(9, 2, "four"))]);
        let rename = What::Rename(proto::MailboxRename { new_path: vec!["Play".into()], back: vec![] });
        apply(&mut storage, Script::default(), &[of((5, "Work"), 10, change(1, rename))]);
        let mut guids: Vec<String> = storage.messages("Play").into_iter().map(|(_, guid)| guid).collect();
        guids.sort();
        assert_eq!(guids, ["four", "one", "three"]);
    }

    #[test]
    fn a_mailbox_that_moved_along_goes_back() {
        let mut storage = FakeStorage::default();
        storage.add("Clan/New", [6; 16], 10, &[(1, "one")]);
        storage.add("Clan", [5; 16], 10, &[]);
        let back =
            proto::Mailbox { guid: vec![6; 16], path: vec!["Family".into(), "New".into()], ..Default::default() };
        let rename = What::Rename(proto::MailboxRename { new_path: vec!["Clan".into()], back: vec![back] });
        let outcome = apply(&mut storage, Script::default(), &[of((5, "Family"), 10, change(1, rename))]);
        assert_eq!(outcome.error, None);
        assert_eq!(storage.messages("Family/New"), named(&[(1, "one")]));
    }

    #[test]
    fn a_deleted_mailbox_that_is_used_here_stays_and_is_told_again() {
        let mut storage = FakeStorage::default();
        storage.add("Work", [5; 16], 10, &[(1, "one"), (2, "two")]);
        let deleted = |keeps| What::Delete(proto::MailboxDelete { keeps, ..Default::default() });
        let outcome = apply(&mut storage, Script::default(), &[of((5, "Work"), 10, change(1, deleted(true)))]);
        let saved = |what: &What| matches!(what, What::Save(save) if save.kept);
        assert_eq!((outcome.error, outcome.told.iter().filter(|what| saved(what)).count()), (None, 2));
        assert_eq!(storage.messages("Work"), named(&[(1, "one"), (2, "two")]));

        apply(&mut storage, Script::default(), &[of((5, "Work"), 10, change(2, deleted(false)))]);
        assert_eq!(storage.existence("Work").unwrap(), Existence::None);
    }

    fn told_again(seq: u64, uid: u32, guid: &str) -> proto::Change {
        let mut told = save(seq, uid, guid);
        let Some(What::Save(save)) = &mut told.ops[0].what else { unreachable!() };
        save.kept = true;
        told
    }

    #[test]
    fn what_is_told_again_is_not_saved_beside_itself() {
        for told in [2, 8] {
            let mut storage = FakeStorage::default();
            storage.add("INBOX", GUID, 9, &[(1, "one"), (3, "three")]);
            let outcome = apply(&mut storage, Script::default(), &[told_again(1, told, "one")]);
            let guids: Vec<String> = storage.messages("INBOX").into_iter().map(|(_, guid)| guid).collect();
            assert_eq!((outcome.error, guids.iter().filter(|guid| *guid == "one").count()), (None, 1), "{guids:?}");
        }
    }

    #[test]
    fn what_is_told_again_by_the_uid_that_it_was_given_here_is_not_saved_beside_itself() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "one"), (2, "two")]);
        for (seq, uid) in [(1, 1), (2, 3)] {
            let outcome = apply(&mut storage, Script::default(), &[told_again(seq, uid, "three")]);
            assert_eq!(outcome.error, None);
            assert_eq!(storage.messages("INBOX"), named(&[(1, "one"), (2, "two"), (3, "three")]));
        }
    }

    /// Each message would be looked for in all that are there, and committed alone.
    #[test]
    fn what_is_told_of_a_whole_mailbox_reads_each_guid_once_and_is_committed_together() {
        let mut storage = FakeStorage::default();
        let guids: Vec<String> = (1..=200).map(|uid| format!("guid {uid}")).collect();
        let messages: Vec<(u32, &str)> = (1..).zip(guids.iter().map(String::as_str)).collect();
        storage.add("INBOX", GUID, 9, &messages[..100]);
        let found = |uid: u32| {
            let mut told = save(1, uid, &guids[uid as usize - 1]);
            let Some(What::Save(save)) = &mut told.ops[0].what else { unreachable!() };
            save.found = true;
            told.ops.remove(0)
        };
        let mut all = save(1, 1, "");
        // One that is there already is among them.
        all.ops = (101..=150).chain([50]).chain(151..=200).map(found).collect();
        assert_eq!(apply(&mut storage, Script::default(), &[all]).error, None);
        assert_eq!(storage.messages("INBOX").len(), 200);
        assert!(storage.guids_read <= 300, "{} were read", storage.guids_read);
        assert!(storage.commits <= 8, "{} commits", storage.commits);
    }

    /// It moved while the process that had saved it was still to tell so.
    #[test]
    fn what_was_told_again_before_it_was_told_is_not_saved_beside_itself() {
        let all = [&[][..], &[(1, "other")], &[(1, "other"), (2, "two")], &[(2, "one")], &[(1, "other"), (3, "one")]];
        for (here, kept) in all.into_iter().flat_map(|here| [(here, true), (here, false)]) {
            let mut storage = FakeStorage::default();
            storage.add("INBOX", GUID, 9, here);
            let mut told = told_again(1, 2, "one");
            let Some(What::Save(save_again)) = &mut told.ops[0].what else { unreachable!() };
            (save_again.was, save_again.kept, save_again.found) = (vec![1], kept, !kept);
            apply(&mut storage, Script::default(), &[told, save(2, 1, "one")]);
            let guids: Vec<String> = storage.messages("INBOX").into_iter().map(|(_, guid)| guid).collect();
            assert_eq!(guids.iter().filter(|guid| *guid == "one").count(), 1, "{here:?} became {guids:?}");
        }
    }

    #[test]
    fn copies_that_are_kept_with_their_mailbox_are_all_there_again() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[]);
        let kept = [told_again(1, 1, "one"), told_again(2, 2, "one"), told_again(3, 2, "one")];
        apply(&mut storage, Script::default(), &kept);
        assert_eq!(storage.messages("INBOX"), named(&[(1, "one"), (2, "one")]));
    }

    #[test]
    fn what_a_client_expunged_does_not_come_back_with_its_mailbox() {
        // In this log a client expunges the second message.
        let log: &[u8] = include_bytes!("../../tests/golden/indexlog/2.4-sdbox.log");
        for (logs, left) in [(&[log][..], &[][..]), (&[], &[(3, "two")])] {
            let mut storage = FakeStorage::default();
            apply(&mut storage, Script::default(), &[save(1, 2, "two"), expunge(2, 2, "two")]);
            storage.set_logs("INBOX", logs);
            apply(&mut storage, Script::default(), &[told_again(3, 2, "two")]);
            assert_eq!(storage.messages("INBOX"), named(left));
        }
    }

    #[test]
    fn a_rename_of_what_became_another_in_the_same_job_is_asked_about_first() {
        let mut storage = FakeStorage::default();
        storage.add("Work", [4; 16], 20, &[]);
        let rename = What::Rename(proto::MailboxRename { new_path: vec!["Play".into()], back: vec![] });
        let changes = [of((3, "Work"), 10, change(1, create(false))), of((3, "Work"), 0, change(2, rename))];
        let outcome = apply(&mut storage, Script::default(), &changes);
        assert_eq!(
            (outcome.done, outcome.error.as_deref()),
            (1, Some("mailbox Work: it has become another mailbox just now"))
        );
        assert_eq!(storage.guid("Work"), [4; 16]);
    }

    #[test]
    fn of_mailboxes_that_become_one_the_later_name_holds() {
        let mut storage = FakeStorage::default();
        storage.add("Play", [3; 16], 10, &[]);
        storage.add("Work", [4; 16], 10, &[(1, "one")]);
        let was = vec![vec![3; 16]];
        let create =
            proto::MailboxCreate { had_mail: true, was, later_name: vec!["Play".into()], ..Default::default() };
        let outcome = apply(&mut storage, Script::default(), &[of((4, "Work"), 10, change(1, What::Create(create)))]);
        assert_eq!((outcome.error, storage.existence("Work").unwrap()), (None, Existence::None));
        assert_eq!((storage.guid("Play"), storage.messages("Play")), ([4; 16], named(&[(1, "one")])));
    }

    /// It may have been its name before.
    #[test]
    fn under_the_uidvalidity_that_comes_with_other_messages_their_uids_name_no_others() {
        let mut storage = FakeStorage::default();
        storage.add("Work", [4; 16], 10, &[(1, "ours")]);
        storage.add("Play", [3; 16], 20, &[(1, "one"), (2, "two")]);
        let became = change(1, create_of(true, &[3]));
        let outcome = apply_as(true, &mut storage, Script::default(), &[of((4, "Work"), 10, became)]);
        assert_eq!((outcome.error, storage.uid_validity("Work")), (None, 20));
        let uids: Vec<u32> =
            storage.messages("Work").into_iter().filter(|(uid, _)| *uid > 2).map(|(uid, _)| uid).collect();
        assert_eq!((uids.len(), storage.messages("Work").len()), (3, 3), "{:?}", storage.messages("Work"));
        let is_told = |what: &What| matches!(what, What::Claim(claim) if claim.guid == "ours" && claim.was == [1]);
        assert!(outcome.told.iter().any(is_told), "{:?}", outcome.told);
    }

    #[test]
    fn what_became_one_with_a_mailbox_that_is_deleted_next_stays() {
        for guid in [3, 5] {
            let mut storage = FakeStorage::default();
            storage.add("Work", [4; 16], 10, &[]);
            let deleted = What::Delete(proto::MailboxDelete::default());
            let changes = [change(1, create(false)), change(2, deleted)];
            let outcome = apply(&mut storage, Script::default(), &changes.map(|change| of((guid, "Work"), 10, change)));
            assert_eq!((outcome.error, storage.guid("Work")), (None, [guid.max(4); 16]));
        }
    }

    /// Whenever that was.
    #[test]
    fn who_deletes_a_mailbox_by_the_guid_that_it_had_has_not_heard_of_the_other() {
        let mut storage = FakeStorage::default();
        storage.add("Work", [4; 16], 10, &[]);
        storage.aliases = vec![proto::Alias { guid: vec![3; 16], is: vec![4; 16], index_id: 0 }];
        let deleted = What::Delete(proto::MailboxDelete::default());
        let outcome = apply(&mut storage, Script::default(), &[of((3, "Work"), 10, change(1, deleted))]);
        assert!(matches!(outcome.told[0], What::Create(_)), "the peer gets it again: {:?}", outcome.told);
        assert_eq!((outcome.error, storage.guid("Work")), (None, [4; 16]));
    }

    #[test]
    fn a_session_that_comes_upon_a_new_mailbox_does_not_give_it_its_guid() {
        let mut storage = FakeStorage::default();
        storage.other_guid = Some([9; 16]);
        let outcome = apply(&mut storage, Script::default(), &[of((3, "Work"), 10, change(1, create(false)))]);
        assert_eq!((outcome.error, storage.guid("Work")), (None, [3; 16]));
        assert_eq!(outcome.told, [became_again(9)], "nobody makes it because of that");
    }

    /// A maildir's GUID is known without opening it.
    #[test]
    fn a_deletion_that_failed_half_way_is_done_when_it_is_sent_again() {
        let mut storage = FakeStorage::default();
        storage.add("Work", [5; 16], 10, &[]);
        storage.half_deleted.insert("Work".into());
        let deleted = What::Delete(proto::MailboxDelete::default());
        let outcome = apply(&mut storage, Script::default(), &[of((5, "Work"), 10, change(1, deleted))]);
        assert_eq!((outcome.error, storage.existence("Work").unwrap()), (None, Existence::None));
    }

    #[test]
    fn a_mailbox_that_is_born_again_has_no_uidvalidity_that_it_had_before() {
        let mut storage = FakeStorage::default();
        for lives in 1..=3 {
            storage.delete("Work").unwrap();
            storage.deleted.push([5; 16]);
            let outcome = apply(&mut storage, Script::default(), &[of((5, "Work"), 10, save(lives, 1, "one"))]);
            assert_eq!((outcome.error, storage.uid_validity("Work")), (None, 10 + lives as u32));
            assert_eq!(storage.messages("Work"), named(&[(1, "one")]));
            let is_told = |what: &What| matches!(what, What::Create(create) if create.reborn && create.had_mail);
            assert_eq!(outcome.told.iter().filter(|what| is_told(what)).count(), 1);
        }
    }

    /// Who deleted it may have been killed before it told.
    #[test]
    fn what_is_in_a_mailbox_that_was_born_again_on_a_peer_is_told_again() {
        let mut storage = FakeStorage::default();
        storage.add("Work", [5; 16], 10, &[(1, "one"), (2, "two")]);
        let reborn = proto::MailboxCreate { had_mail: true, reborn: true, ..Default::default() };
        let outcome = apply(&mut storage, Script::default(), &[of((5, "Work"), 11, change(1, What::Create(reborn)))]);
        let kept = |what: &What| matches!(what, What::Save(save) if save.kept);
        assert_eq!((outcome.error, outcome.told.iter().filter(|what| kept(what)).count()), (None, 2));
        assert_eq!(storage.uid_validity("Work"), 11);
    }

    #[test]
    fn a_save_that_nobody_has_told_yet_keeps_a_deleted_mailbox() {
        let mut storage = FakeStorage::default();
        storage.add("Work", [5; 16], 10, &[(1, "one")]);
        // It begins with an append.
        let log: &[u8] = include_bytes!("../../tests/golden/indexlog/2.4-sdbox.log");
        let header = crate::indexlog::Header::parse(log).unwrap();
        let known = proto::LookAt { log_seq: header.file_seq, end: u64::from(header.hdr_size), ..Default::default() };
        storage.set_logs("Work", &[log]);
        let deleted = What::Delete(proto::MailboxDelete { known: Some(known), ..Default::default() });
        let outcome = apply(&mut storage, Script::default(), &[of((5, "Work"), 10, change(1, deleted))]);
        assert_eq!((outcome.error, outcome.notes), (None, vec!["mail_stays".to_owned()]));
        assert_eq!(storage.messages("Work"), named(&[(1, "one")]));
    }

    #[test]
    fn applying_again_does_nothing() {
        let mut storage = FakeStorage::default();
        let changes = [save(1, 1, "one"), save(2, 2, "two"), expunge(3, 1, "one")];
        for _ in 0..2 {
            let outcome = apply(&mut storage, Script::default(), &changes);
            assert_eq!((outcome.done, outcome.error), (3, None));
            assert_eq!(storage.messages("INBOX"), [(2, "two".to_string())]);
        }
        assert_eq!(storage.guid("INBOX"), GUID);
    }

    #[test]
    fn what_this_server_makes_again_comes_in_no_order() {
        for (me, left) in [("a", vec![]), ("b", vec![(1, "one".to_string())])] {
            let mut storage = FakeStorage::default();
            storage.me = me.into();
            storage.add("INBOX", GUID, 9, &[(1, "one"), (2, "two")]);
            for change in [expunge(7, 2, "two"), expunge(3, 1, "one")] {
                apply(&mut storage, Script::default(), &[change]);
            }
            assert_eq!(storage.messages("INBOX"), left, "the changes are of a, this is {me}");
        }
    }

    #[test]
    fn a_message_that_was_given_another_uid_here_is_expunged_by_its_guid() {
        let mut storage = FakeStorage::default();
        let outcome =
            apply(&mut storage, Script::default(), &[save(1, 2, "two"), save(2, 1, "one"), expunge(3, 1, "one")]);
        assert_eq!(outcome.notes, ["uid_taken"]);
        assert_eq!(storage.messages("INBOX"), [(2, "two".to_string())]);
    }

    #[test]
    fn what_names_a_message_by_its_uid_there_finds_it_where_it_is_here() {
        // Their 5 is our 6, and their 7 is our 7.
        let ours = || {
            let mut storage = FakeStorage::default();
            storage.add("INBOX", GUID, 9, &[(5, "ours")]);
            storage
        };
        let saves = [save(1, 5, "theirs"), save(2, 7, "both")];
        let mut together = ours();
        apply(&mut together, Script::default(), &[&saves[..], &[expunge(3, 5, "")]].concat());
        let mut later = ours();
        apply(&mut later, Script::default(), &saves);
        apply(&mut later, Script::default(), &[expunge(3, 5, "")]);
        for mut storage in [together, later] {
            assert_eq!(storage.messages("INBOX"), named(&[(5, "ours"), (7, "both")]));
            apply(&mut storage, Script::default(), &[expunge(4, 7, "")]);
            assert_eq!(storage.messages("INBOX"), named(&[(5, "ours")]));
        }
    }

    #[test]
    fn what_names_a_message_that_could_not_be_had_takes_no_other() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(5, "ours")]);
        let mut large = save(1, 5, "theirs");
        let Some(What::Save(save)) = &mut large.ops[0].what else { unreachable!() };
        (save.body_inline, save.body) = (false, Vec::new());
        apply(&mut storage, gone(1), &[large]);
        apply(&mut storage, Script::default(), &[expunge(2, 5, "")]);
        assert_eq!(storage.messages("INBOX"), named(&[(5, "ours")]));
    }

    #[test]
    fn a_message_that_moved_here_is_found_by_its_old_uid() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(5, "one"), (6, "two")]);
        apply(&mut storage, Script::default(), &[claim(1, "one", 9, &[5])]);
        apply(&mut storage, Script::default(), &[expunge(2, 5, "")]);
        assert_eq!(storage.messages("INBOX"), named(&[(6, "two")]));
    }

    fn claim(seq: u64, guid: &str, uid: u32, was: &[u32]) -> proto::Change {
        change(
            seq,
            What::Claim(proto::Claim { guid: guid.into(), uid, was: was.to_vec(), raised: 1, ..Default::default() }),
        )
    }

    /// The server "a" has it at `of_uid`.
    fn raised(guid: &str, uid: u32, was: &[u32], of_uid: u32) -> What {
        What::Claim(proto::Claim { guid: guid.into(), uid, was: was.to_vec(), raised: 1, of: "a".into(), of_uid })
    }

    fn nack(seq: u64, guid: &str, uid: u32, stands: u32, next: u32) -> proto::Change {
        change(seq, What::Nack(proto::Nack { guid: guid.into(), uid, stands, next, ..Default::default() }))
    }

    fn named(messages: &[(u32, &str)]) -> Vec<(u32, String)> {
        messages.iter().map(|(uid, guid)| (*uid, guid.to_string())).collect()
    }

    #[test]
    fn of_two_messages_with_one_uid_theirs_is_raised_by_the_resolver_and_nacked_by_the_other() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(5, "ours")]);
        let outcome = apply_as(true, &mut storage, Script::default(), &[save(1, 5, "theirs")]);
        assert_eq!(outcome.told, [raised("theirs", 6, &[], 5)]);
        assert_eq!(storage.messages("INBOX"), named(&[(5, "ours"), (6, "theirs")]));

        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(5, "ours")]);
        let changes = [save(1, 5, "theirs")];
        let outcome = apply(&mut storage, Script::default(), &changes);
        let cannot = proto::Nack { guid: "theirs".into(), uid: 5, stands: 6, next: 7, of: "a".into(), raised: 0 };
        assert_eq!(outcome.told, [What::Nack(cannot.clone())]);
        // Its worker may have been killed before it could say so.
        let outcome = apply(&mut storage, Script::default(), &changes);
        assert_eq!(outcome.told, [What::Nack(cannot)]);
        assert_eq!(storage.messages("INBOX"), named(&[(5, "ours"), (6, "theirs")]));
    }

    #[test]
    fn a_claimed_message_moves_and_a_nacked_one_is_raised_above_both() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(5, "one"), (6, "two")]);
        let outcome = apply(&mut storage, Script::default(), &[claim(1, "one", 9, &[5])]);
        assert_eq!((outcome.told, outcome.error), (vec![], None));
        assert_eq!(storage.messages("INBOX"), named(&[(6, "two"), (9, "one")]));

        let outcome = apply_as(true, &mut storage, Script::default(), &[nack(2, "one", 9, 14, 15)]);
        assert_eq!(outcome.told, [raised("one", 15, &[9], 14)]);
        assert_eq!(storage.messages("INBOX"), named(&[(6, "two"), (15, "one")]));
        let outcome = apply_as(true, &mut storage, Script::default(), &[nack(3, "one", 9, 14, 15)]);
        assert_eq!(
            outcome.told,
            [raised("one", 15, &[], 14)],
            "it was raised since, which that one may not have heard"
        );

        let outcome = apply(&mut storage, Script::default(), &[claim(4, "two", 8, &[6])]);
        let cannot = proto::Nack { guid: "two".into(), uid: 8, stands: 6, next: 16, raised: 1, of: "a".into() };
        assert_eq!(outcome.told, [What::Nack(cannot)]);
        assert_eq!(storage.messages("INBOX"), named(&[(6, "two"), (15, "one")]));
    }

    #[test]
    fn a_claim_that_comes_again_and_moves_a_message_now_does_not_make_the_saves_behind_it_new() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(5, "ours"), (6, "other")]);
        let changes = [nack(1, "ours", 5, 9, 10), save(2, 6, "theirs")];
        apply(&mut storage, Script::default(), &changes);
        assert_eq!(storage.messages("INBOX"), named(&[(5, "ours"), (6, "other"), (7, "theirs")]));
        // The relay was killed before it heard of that; now it is this server that raises UIDs.
        storage.elsewhere.clear();
        apply_as(true, &mut storage, Script::default(), &changes);
        assert_eq!(storage.messages("INBOX"), named(&[(6, "other"), (7, "theirs"), (10, "ours")]));
    }

    #[test]
    fn what_a_log_says_was_expunged_is_no_other_message() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(5, "ours")]);
        let gone = |guid_128: [u8; 16]| {
            let range =
                proto::MessageRange { first_uid: 5, last_uid: 5, guid_128: guid_128.to_vec(), ..Default::default() };
            What::Expunge(proto::Expunge { messages: vec![range] })
        };
        apply(&mut storage, Script::default(), &[change(1, gone([9; 16]))]);
        assert_eq!(storage.messages("INBOX"), named(&[(5, "ours")]));
        // Theirs at that UID is gone here: ours is a copy of it.
        storage.elsewhere = vec![proto::Elsewhere {
            mailbox_guid: GUID.to_vec(),
            uid: 5,
            guid: "ours".into(),
            here: GONE,
            ..Default::default()
        }];
        apply(&mut storage, Script::default(), &[change(2, gone(HASHED_GUID))]);
        assert_eq!(storage.messages("INBOX"), named(&[(5, "ours")]));
        storage.elsewhere.clear();
        apply(&mut storage, Script::default(), &[change(2, gone(HASHED_GUID))]);
        assert_eq!(storage.messages("INBOX"), []);
    }

    #[test]
    fn a_message_that_cannot_be_where_it_is_claimed_is_meant_by_that_uid() {
        let ours = [(5, "ours"), (6, "theirs"), (9, "other")];
        let claimed = [claim(1, "theirs", 9, &[5]), expunge(2, 9, "")];
        let nacked = [nack(1, "theirs", 6, 9, 10), expunge(2, 9, "")];
        for (resolves, changes) in [(false, claimed), (true, nacked)] {
            let mut storage = FakeStorage::default();
            storage.add("INBOX", GUID, 9, &ours);
            apply_as(resolves, &mut storage, Script::default(), &changes);
            assert_eq!(storage.messages("INBOX"), named(&[(5, "ours"), (9, "other")]));
        }
    }

    #[test]
    fn uidnext_reaches_what_was_given_to_a_message_that_is_expunged_here() {
        for change in [claim(4, "one", 8, &[1]), nack(4, "one", 1, 7, 9)] {
            let mut storage = FakeStorage::default();
            apply(&mut storage, Script::default(), &[save(1, 1, "one"), expunge(2, 1, "one")]);
            apply_as(true, &mut storage, Script::default(), &[change]);
            assert_eq!(storage.uid_next("INBOX"), 9);
        }
    }

    #[test]
    fn who_saves_a_message_of_ours_that_was_expunged_is_told_so_again() {
        for resolves in [true, false] {
            let nacked = |of: &str| {
                let mut storage = FakeStorage::default();
                storage.add("INBOX", GUID, 9, &[(1, "one")]);
                storage.me = "b".into();
                apply(&mut storage, Script::default(), &[expunge(1, 1, "one")]);
                let nack = proto::Nack { guid: "one".into(), uid: 1, stands: 7, next: 8, of: of.into(), raised: 0 };
                let told = apply_as(resolves, &mut storage, Script::default(), &[change(2, What::Nack(nack))]).told;
                told.into_iter().filter(|what| matches!(what, What::Expunge(_))).collect::<Vec<_>>()
            };
            let one = proto::MessageRange { first_uid: 1, last_uid: 1, guid: "one".into(), ..Default::default() };
            assert_eq!(nacked("b"), [What::Expunge(proto::Expunge { messages: vec![one] })]);
            assert_eq!(nacked("c"), [], "that server says so");
        }
    }

    #[test]
    fn a_copy_that_two_servers_made_with_one_uid_goes_from_both_if_one_has_expunged_it() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "one"), (2, "one"), (3, "last")]);
        storage.open("INBOX", false).unwrap();
        storage.expunge(2, 2).unwrap();
        storage.commit().unwrap();
        storage.close();
        // No look has told of what came and went here.
        let outcome = apply(&mut storage, Script::default(), &[save(1, 2, "one")]);
        let two = proto::MessageRange { first_uid: 2, last_uid: 2, guid: "one".into(), ..Default::default() };
        assert_eq!(outcome.told, [What::Expunge(proto::Expunge { messages: vec![two] })]);
        assert_eq!(storage.messages("INBOX"), named(&[(1, "one"), (3, "last")]));
    }

    #[test]
    fn a_message_copied_inside_of_its_mailbox_stays_there_twice() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "one"), (2, "ours")]);
        apply(&mut storage, Script::default(), &[save(1, 2, "one")]);
        assert_eq!(storage.messages("INBOX"), named(&[(1, "one"), (2, "ours"), (3, "one")]));
        apply(&mut storage, Script::default(), &[claim(2, "one", 7, &[2, 3])]);
        assert_eq!(storage.messages("INBOX"), named(&[(1, "one"), (2, "ours"), (7, "one")]));
    }

    #[test]
    fn a_mailbox_with_a_message_of_which_a_third_server_told_too_early_is_to_be_compared() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "one")]);
        let early = [expunge(1, 2, "to come"), expunge(2, 3, "to come, too")];
        assert_eq!(apply_in_mesh(false, &mut storage, &early).doubts, 1);
        assert_eq!(apply(&mut storage, Script::default(), &early).doubts, 0, "there is no third one");
    }

    #[test]
    fn a_copy_of_a_message_that_was_given_another_uid_is_not_taken_for_it() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "ours"), (2, "ours too")]);
        // Theirs, and the copy that somebody made of it there.
        apply(&mut storage, Script::default(), &[save(1, 1, "one"), save(2, 2, "one")]);
        assert_eq!(storage.messages("INBOX")[2..], named(&[(3, "one"), (4, "one")]));
        // Each is known by the UID that it has there.
        let claims = [claim(3, "one", 9, &[2]), claim(4, "one", 12, &[1])];
        let known = storage.elsewhere.clone();
        apply(&mut storage, Script::default(), &claims);
        assert_eq!(storage.messages("INBOX")[2..], named(&[(9, "one"), (12, "one")]));
        storage.elsewhere.splice(..0, known);
        apply(&mut storage, Script::default(), &[expunge(5, 12, "one")]);
        assert_eq!(storage.messages("INBOX")[2..], named(&[(9, "one")]));
    }

    /// What c has at this UID.
    fn of_c(uid: u32, here: u32) -> proto::Elsewhere {
        let (guid, server) = ("one".into(), "c".into());
        proto::Elsewhere { mailbox_guid: GUID.to_vec(), uid, guid, here, server, ..Default::default() }
    }

    #[test]
    fn of_copies_of_one_message_a_third_servers_is_known_by_its_uid_there() {
        let ours = [(9, "one"), (10, "one")];
        let mut refused = proto::Nack { guid: "one".into(), uid: 5, stands: 9, next: 10, ..Default::default() };
        refused.of = "c".into();
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &ours);
        storage.elsewhere = vec![of_c(5, 9)];
        let outcome = apply_in_mesh(true, &mut storage, &[change(1, What::Nack(refused))]);
        assert_eq!(outcome.told, [raised("one", 9, &[], 9)], "it was claimed there before");

        let claimed = proto::Claim { guid: "one".into(), uid: 12, of: "c".into(), of_uid: 5, ..Default::default() };
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &ours);
        storage.elsewhere = vec![of_c(5, 9)];
        apply_in_mesh(false, &mut storage, &[change(1, What::Claim(claimed.clone()))]);
        assert_eq!(storage.messages("INBOX"), named(&[(10, "one"), (12, "one")]));

        // It is gone, and the copy is another one.
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &ours);
        storage.expunge_now("INBOX", 9);
        storage.elsewhere = vec![of_c(5, 9)];
        apply_in_mesh(false, &mut storage, &[change(1, What::Claim(claimed)), expunge(2, 12, "one")]);
        assert_eq!(storage.messages("INBOX"), named(&[(10, "one")]));
    }

    #[test]
    fn copies_that_two_servers_made_with_one_uid_are_one_also_where_it_has_another() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(4, "other")]);
        apply_in_mesh(false, &mut storage, &[save(1, 4, "one")]);
        storage.elsewhere = vec![of_c(4, 5)];
        let outcome = apply_in_mesh(false, &mut storage, &[save(2, 4, "one")]);
        assert_eq!(storage.messages("INBOX"), named(&[(4, "other"), (5, "one")]));
        assert!(matches!(&outcome.told[..], [What::Nack(nack)] if (nack.uid, nack.stands) == (4, 5)), "{outcome:?}");
    }

    #[test]
    fn by_a_uid_that_is_another_servers_copy_and_was_a_message_here_too_the_message_is_meant() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(9, "one"), (16, "one")]);
        storage.expunge_now("INBOX", 9);
        // Theirs has that copy at another UID.
        let of_a = proto::Elsewhere { alone: true, server: "a".into(), ..of_c(15, 16) };
        storage.elsewhere = vec![of_c(9, 16), of_a.clone()];
        apply_in_mesh(true, &mut storage, &[expunge(1, 9, "one")]);
        assert_eq!(storage.messages("INBOX"), named(&[(16, "one")]));
        storage.elsewhere = vec![of_c(9, GONE), of_a.clone(), proto::Elsewhere { moved: true, ..of_c(9, 16) }];
        apply_in_mesh(true, &mut storage, &[expunge(2, 9, "one")]);
        assert_eq!(storage.messages("INBOX"), named(&[(16, "one")]), "which was at that one here");
        storage.elsewhere = vec![of_c(9, 16)];
        apply_in_mesh(true, &mut storage, &[expunge(3, 9, "one")]);
        assert_eq!(storage.messages("INBOX"), [], "what nobody knows to be elsewhere is where it was saved");
    }

    #[test]
    fn what_is_gone_by_the_uid_that_several_servers_have_it_at_is_no_doubt() {
        for (known, doubts) in [(vec![of_c(3, GONE)], 0), (vec![], 1)] {
            let mut storage = FakeStorage::default();
            storage.add("INBOX", GUID, 9, &[(1, "other")]);
            storage.elsewhere = known;
            let outcome = apply_in_mesh(false, &mut storage, &[expunge(1, 3, "one")]);
            assert_eq!((outcome.error, outcome.doubts), (None, doubts));
        }
    }

    #[test]
    fn a_hashed_guid_is_looked_for_wherever_the_uid_may_lead() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(13, "one")]);
        // It was moved here; a third server had another one there, which is gone.
        let moved = proto::Elsewhere { moved: true, server: String::new(), ..of_c(9, 13) };
        storage.elsewhere = vec![moved, proto::Elsewhere { guid: "other".into(), ..of_c(9, 10) }];
        let range =
            proto::MessageRange { first_uid: 9, last_uid: 9, guid_128: HASHED_GUID.to_vec(), ..Default::default() };
        let expunge = What::Expunge(proto::Expunge { messages: vec![range] });
        apply_in_mesh(true, &mut storage, &[change(1, expunge)]);
        assert_eq!(storage.messages("INBOX"), []);
    }

    #[test]
    fn what_is_told_names_the_change_that_gave_rise_to_it() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(5, "ours")]);
        storage.me = "b".into();
        let outcome = apply(&mut storage, Script::default(), &[expunge(1, 4, "other"), save(2, 5, "theirs")]);
        assert_eq!(outcome.told.len(), 1);
        assert_eq!(outcome.causes, [SeqOf { origin: "a".into(), epoch: 1, seq: 2 }]);
    }

    #[test]
    fn a_message_that_is_gone_is_not_taken_for_its_copy_which_has_that_uid_here() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "one"), (2, "one")]);
        storage.expunge_now("INBOX", 1);
        storage.me = "b".into();
        let claimed = proto::Claim { guid: "one".into(), uid: 2, of: "b".into(), of_uid: 1, ..Default::default() };
        apply(&mut storage, Script::default(), &[change(1, What::Claim(claimed))]);
        let seen = |uid| {
            let range = proto::MessageRange { first_uid: uid, last_uid: uid, guid: "one".into(), ..Default::default() };
            What::Flags(proto::FlagUpdate { messages: vec![range], add: 1, ..Default::default() })
        };
        let known = storage.elsewhere.clone();
        apply(&mut storage, Script::default(), &[change(2, seen(2))]);
        assert_eq!(storage.flagged, [], "theirs is gone, and the copy is not known there as 2");
        // Until it is.
        storage.elsewhere = known;
        let claimed = proto::Claim { guid: "one".into(), uid: 3, of: "b".into(), of_uid: 2, ..Default::default() };
        apply(&mut storage, Script::default(), &[change(3, What::Claim(claimed)), change(4, seen(3))]);
        assert_eq!(storage.messages("INBOX"), named(&[(3, "one")]));
        assert_eq!(storage.flagged, [(3, 3)]);
    }

    #[test]
    fn an_expunge_of_a_message_that_never_came_does_not_take_its_copy() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(7, "ours"), (8, "ours too")]);
        // What was at 7 there was copied, and expunged before anybody told of it.
        apply(&mut storage, Script::default(), &[save(1, 8, "one")]);
        assert_eq!(storage.messages("INBOX")[2..], named(&[(9, "one")]));
        apply(&mut storage, Script::default(), &[expunge(2, 7, "one")]);
        assert_eq!(storage.messages("INBOX")[2..], named(&[(9, "one")]));
    }

    #[test]
    fn an_expunge_by_a_uid_that_nobody_has_told_of_yet_takes_the_message() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(7, "ours"), (8, "ours too")]);
        apply(&mut storage, Script::default(), &[save(1, 4, "one")]);
        assert_eq!(storage.messages("INBOX")[2..], named(&[(9, "one")]));
        // A worker there gave it another UID, and a client's process was faster to tell than that worker.
        apply(&mut storage, Script::default(), &[expunge(2, 12, "one")]);
        assert_eq!(storage.messages("INBOX")[2..], []);
    }

    #[test]
    fn who_does_not_answer_a_nack_remembers_how_its_sender_calls_the_message() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(3, "one"), (4, "one")]);
        apply(&mut storage, Script::default(), &[nack(1, "one", 3, 4, 5), nack(2, "one", 4, 5, 6)]);
        let noted: Vec<_> = storage.elsewhere.iter().map(|one| (one.uid, one.here, one.alone)).collect();
        assert_eq!(noted, [(4, 3, true), (5, 4, true)]);
    }

    #[test]
    fn a_claim_that_may_not_have_been_told_is_told_again() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(5, "one")]);
        let nacked = [nack(1, "one", 5, 9, 10)];
        let outcome = apply_as(true, &mut storage, Script::default(), &nacked);
        assert_eq!(outcome.told, [raised("one", 10, &[5], 9)]);
        // The mailbox has no log here that says that it was moved.
        storage.forget_expunges();
        let outcome = apply_as(true, &mut storage, Script::default(), &nacked);
        assert!(matches!(&outcome.told[..], [What::Claim(claim)] if claim.uid == 10), "{outcome:?}");
    }

    #[test]
    fn what_a_killed_worker_was_moving_is_there_once() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "one"), (4, "one")]);
        storage.open("INBOX", false).unwrap();
        let (offset, bytes) = Marks::default().set_moving(Some((1, 4)));
        storage.write_mark(offset, &bytes).unwrap();
        storage.commit().unwrap();
        apply(&mut storage, Script::default(), &[claim(1, "one", 4, &[1])]);
        assert_eq!(storage.messages("INBOX"), named(&[(4, "one")]));
    }

    #[test]
    fn a_copy_that_a_killed_worker_left_goes_with_a_message_that_a_client_expunged_since() {
        for changes in [[claim(1, "one", 6, &[1])], [nack(1, "one", 1, 5, 6)]] {
            let mut storage = FakeStorage::default();
            storage.add("INBOX", GUID, 9, &[(2, "other"), (3, "stray one")]);
            apply_as(true, &mut storage, Script::default(), &changes);
            assert_eq!(storage.messages("INBOX"), named(&[(2, "other")]));
        }
    }

    #[test]
    fn files_that_a_killed_worker_left_are_not_saved_again_whatever_uids_they_got() {
        // In this log somebody else appends 1, 2 and 3.
        let log: &[u8] = include_bytes!("../../tests/golden/indexlog/2.4-sdbox.log");
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "two"), (2, "one")]);
        storage.set_logs("INBOX", &[log]);
        let outcome = apply(&mut storage, Script::default(), &[save(1, 1, "one"), save(2, 2, "two")]);
        assert_eq!(outcome.error, None);
        assert_eq!(storage.messages("INBOX"), named(&[(2, "one"), (3, "two")]));
    }

    #[test]
    fn neither_a_clients_copy_nor_what_it_is_a_copy_of_is_taken_for_a_file_that_a_killed_worker_left() {
        let log: &[u8] = include_bytes!("../../tests/golden/indexlog/2.4-sdbox.log");
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "one"), (2, "one"), (3, "other")]);
        storage.set_logs("INBOX", &[log]);
        storage.of_clients.insert(2);
        let mut theirs = save(1, 3, "one");
        let What::Save(copy) = theirs.ops[0].what.as_mut().unwrap() else { panic!("{theirs:?}") };
        let mailbox = proto::Mailbox { guid: GUID.to_vec(), path: vec!["INBOX".into()], ..Default::default() };
        copy.copied_from = Some(proto::CopiedFrom { mailbox: Some(mailbox), uid: 1 });
        let outcome = apply(&mut storage, Script::default(), &[theirs]);
        assert_eq!(outcome.error, None);
        assert_eq!(storage.messages("INBOX"), named(&[(1, "one"), (2, "one"), (3, "other"), (4, "one")]));
    }

    #[test]
    fn a_file_that_a_killed_worker_left_and_that_got_a_higher_uid_is_told_to_stand_there() {
        // Dovecot gives it another one if dovecot-uidlist has the file, and the index has not.
        let log: &[u8] = include_bytes!("../../tests/golden/indexlog/2.4-sdbox.log");
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(2, "one")]);
        storage.set_logs("INBOX", &[log]);
        let outcome = apply(&mut storage, Script::default(), &[save(1, 1, "one")]);
        assert_eq!(storage.messages("INBOX"), named(&[(2, "one")]));
        assert_eq!(outcome.notes, ["uid_taken"]);
        assert_eq!(outcome.told.len(), 1, "{:?}", outcome.told);
        storage.open("INBOX", false).unwrap();
        assert!(Marks::parse(&storage.mark().unwrap()).has_diverged());
    }

    #[test]
    fn a_file_that_the_sync_of_our_own_commit_finds_is_not_there_twice() {
        for (found_at, there) in [(3, 3), (4, 1)] {
            let mut storage = FakeStorage::default();
            storage.add("INBOX", GUID, 9, &[(2, "other")]);
            if there == 1 {
                // Somebody's has its UID: it gets the next one.
                storage.add("INBOX", GUID, 9, &[(1, "another"), (3, "other")]);
            }
            storage.lacking = Some((found_at, "one".into()));
            let outcome = apply(&mut storage, Script::default(), &[save(1, there, "one")]);
            assert_eq!(outcome.error, None);
            let messages = storage.messages("INBOX");
            let copies: Vec<u32> = messages.iter().filter(|(_, guid)| guid == "one").map(|(uid, _)| *uid).collect();
            assert_eq!(copies, [found_at], "{messages:?}");
            assert!(outcome.told.len() == 1 || there == 1, "{:?}", outcome.told);
            let is_known = |one: &proto::Elsewhere| (one.uid, one.here) == (there, found_at);
            assert_eq!(storage.elsewhere.iter().any(is_known), there == 1, "{:?}", storage.elsewhere);
        }
    }

    #[test]
    fn what_a_client_expunged_that_a_killed_worker_had_saved_is_told_by_the_uid_that_the_peer_knows() {
        let log: &[u8] = include_bytes!("../../tests/golden/indexlog/2.4-sdbox.log");
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "other"), (2, "one")]);
        storage.expunge_now("INBOX", 2);
        storage.set_logs("INBOX", &[log]);
        let outcome = apply(&mut storage, Script::default(), &[save(1, 1, "one")]);
        assert_eq!(storage.messages("INBOX"), named(&[(1, "other")]));
        let [What::Expunge(told)] = &outcome.told[..] else { panic!("{outcome:?}") };
        assert_eq!((told.messages[0].first_uid, told.messages[0].guid.as_str()), (1, "one"));
    }

    #[test]
    fn a_save_that_comes_late_is_not_lost() {
        let mut storage = FakeStorage::default();
        apply(&mut storage, Script::default(), &[save(1, 2, "two")]);
        let outcome = apply(&mut storage, Script::default(), &[save(2, 1, "one")]);
        assert_eq!(outcome.notes, ["uid_taken"]);
        assert_eq!(storage.messages("INBOX"), [(2, "two".to_string()), (3, "one".to_string())]);
    }

    #[test]
    fn two_mails_with_one_uid_both_stay_and_each_is_found_by_its_guid() {
        let mut storage = FakeStorage::default();
        apply(&mut storage, Script::default(), &[save(1, 1, "ours")]);
        let outcome = apply(&mut storage, Script::default(), &[save(2, 1, "theirs")]);
        assert_eq!(outcome.notes, ["uid_taken"]);
        assert_eq!(storage.messages("INBOX"), [(1, "ours".to_string()), (2, "theirs".to_string())]);

        apply(&mut storage, Script::default(), &[expunge(3, 1, "theirs")]);
        assert_eq!(storage.messages("INBOX"), [(1, "ours".to_string())]);
    }

    #[test]
    fn what_another_mailbox_of_that_name_has_comes_in_and_is_still_found_by_its_uid() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", [9; 16], 9, &[(1, "ours")]);
        let outcome = apply(&mut storage, Script::default(), &[save(1, 1, "theirs"), expunge(2, 1, "")]);
        assert_eq!(outcome.notes, ["uid_taken"]);
        assert_eq!(storage.messages("INBOX"), named(&[(1, "ours")]));
    }

    #[test]
    fn an_empty_mailbox_of_that_name_becomes_theirs() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", [9; 16], 8, &[]);
        apply(&mut storage, Script::default(), &[save(1, 1, "theirs")]);
        assert_eq!(storage.guid("INBOX"), GUID);
        assert_eq!(storage.messages("INBOX"), [(1, "theirs".to_string())]);
    }

    #[test]
    fn inbox_gets_the_guid_that_it_is_born_with_even_if_it_has_messages() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", [9; 16], 9, &[(1, "ours")]);
        let mut theirs = save(1, 2, "theirs");
        theirs.mailbox.as_mut().unwrap().guid = INBOX_GUID.to_vec();
        let outcome = apply(&mut storage, Script::default(), &[theirs]);
        assert_eq!((outcome.error, outcome.notes), (None, vec!["one_name".to_string()]));
        assert_eq!(storage.guid("INBOX"), INBOX_GUID);
        assert_eq!(storage.messages("INBOX"), [(1, "ours".to_string()), (2, "theirs".to_string())]);
    }

    #[test]
    fn a_message_mends_what_the_creation_left() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", [9; 16], 10, &[]);
        let create = change(1, What::Create(proto::MailboxCreate::default()));
        apply(&mut storage, Script::default(), &[create, save(2, 1, "one")]);
        assert_eq!((storage.guid("INBOX"), storage.uid_validity("INBOX")), (GUID, 9));
        assert_eq!(storage.messages("INBOX"), [(1, "one".to_string())]);
    }

    #[test]
    fn a_uidvalidity_that_is_told_only_with_the_first_mail_is_taken() {
        let mut storage = FakeStorage::default();
        let mut create = change(1, What::Create(proto::MailboxCreate::default()));
        create.mailbox.as_mut().unwrap().uid_validity = 0;
        apply(&mut storage, Script::default(), &[create, save(2, 1, "one")]);
        assert_eq!(storage.uid_validity("INBOX"), 9);
    }

    #[test]
    fn what_a_server_lost_when_its_index_was_rebuilt_is_told_to_it_again() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "one"), (2, "two"), (3, "three")]);
        storage.flags.insert(2, (1, vec!["keyword".into()]));
        let present = vec![proto::MessageRange { first_uid: 1, last_uid: 1, ..Default::default() }];
        let rebuilt = What::Rebuilt(proto::MailboxRebuilt { present, uid_next: 3 });
        let outcome = apply(&mut storage, Script::default(), &[change(1, rebuilt)]);
        let [What::Save(save)] = &outcome.told[..] else { panic!("{outcome:?}") };
        assert_eq!((save.guid.as_str(), save.birth.as_ref().unwrap().uid, save.found), ("two", 2, true));
        assert_eq!((save.flags, &save.keywords), (1, &vec!["keyword".to_owned()]));
    }

    #[test]
    fn a_mailbox_that_a_killed_worker_half_made_becomes_theirs() {
        let create = change(1, What::Create(proto::MailboxCreate::default()));
        for (again, expected) in [(vec![], [9; 16]), (vec![1], GUID)] {
            let mut storage = FakeStorage::default();
            storage.add("INBOX", [9; 16], 9, &[]);
            storage.again = again;
            let outcome = apply(&mut storage, Script::default(), std::slice::from_ref(&create));
            assert_eq!(storage.guid("INBOX"), expected);
            // It may also be one that was renamed to here meanwhile.
            assert_eq!(outcome.told == [became_again(9)], expected == GUID, "{outcome:?}");
        }
    }

    #[test]
    fn uidnext_is_raised_before_what_says_so_is_done() {
        let mut storage = FakeStorage::default();
        let mut seen = change(2, change::nothing());
        seen.mailbox.as_mut().unwrap().uid_next = 9;
        let outcome = apply(&mut storage, Script::default(), &[save(1, 1, "one"), seen, save(3, 10, "../two")]);
        assert_eq!(outcome.done, 2);
        assert_eq!(storage.uid_next("INBOX"), 9);
    }

    #[test]
    fn what_a_rebuilt_index_found_again_comes_back() {
        let mut storage = FakeStorage::default();
        let saves = [save(1, 1, "one"), save(2, 2, "two")];
        apply(&mut storage, Script::default(), &[&saves[..], &[expunge(3, 1, "one")]].concat());
        let mut found = save(4, 1, "one");
        let Some(What::Save(save)) = &mut found.ops[0].what else { unreachable!() };
        save.found = true;
        apply(&mut storage, Script::default(), &[found]);
        assert_eq!(storage.messages("INBOX"), named(&[(2, "two"), (3, "one")]));
    }

    /// restores::a_log_has_lost_its_end_in_a_power_failure, one of eight times.
    #[test]
    fn what_an_index_finds_again_while_it_comes_is_there_once() {
        let mut storage = FakeStorage::default();
        storage.is_dbox = true;
        apply(&mut storage, Script::default(), &[save(1, 1, "one")]);
        storage.lacking = Some((2, "two".into()));
        let mut found = save(2, 2, "two");
        let Some(What::Save(save)) = &mut found.ops[0].what else { unreachable!() };
        save.found = true;
        let outcome = apply(&mut storage, Script::default(), &[found]);
        assert_eq!(storage.messages("INBOX"), named(&[(1, "one"), (2, "two")]));
        assert_eq!(outcome.notes, Vec::<String>::new());
    }

    /// A client expunged its message 2.
    const EXPUNGED: &[u8] = include_bytes!("../../tests/golden/indexlog/2.4-sdbox.log");

    /// The peer tells that it has "two" at UID 2, as `found` says; what is told then.
    fn found_again(storage: &mut FakeStorage, found: impl FnOnce(&mut proto::Save)) -> Vec<What> {
        storage.set_logs("INBOX", &[EXPUNGED]);
        let mut told = save(9, 2, "two");
        let Some(What::Save(save)) = &mut told.ops[0].what else { unreachable!() };
        found(save);
        apply(storage, Script::default(), &[told]).told
    }

    fn expunges(told: &[What], guid: &str) -> bool {
        told.iter().any(|what| matches!(what, What::Expunge(expunge) if expunge.messages[0].guid == guid))
    }

    #[test]
    fn what_a_rebuilt_index_found_again_does_not_come_back_if_a_client_expunged_it() {
        let mut storage = FakeStorage::default();
        apply(&mut storage, Script::default(), &[save(1, 2, "two"), expunge(2, 2, "two")]);
        let told = found_again(&mut storage, |save| save.found = true);
        assert_eq!(storage.messages("INBOX"), []);
        assert!(expunges(&told, "two"), "{told:?}");
    }

    /// Where it has got a higher UID, of which nobody has told yet, and copies of it are there that have another one for sure.
    #[test]
    fn what_is_done_to_a_message_that_was_moved_meanwhile_finds_it_among_its_copies() {
        let flagged = |(first_uid, guid): (u32, &str)| {
            let message =
                proto::MessageRange { first_uid, last_uid: first_uid, guid: guid.into(), ..Default::default() };
            change(1, What::Flags(proto::FlagUpdate { messages: vec![message], add: 8, ..Default::default() }))
        };
        let found = |copies: &[(u32, u32)]| {
            let mut storage = FakeStorage::default();
            let messages: Vec<(u32, &str)> = copies.iter().map(|(here, _)| (*here, "two")).collect();
            storage.add("INBOX", GUID, 9, &messages);
            let known = |(here, uid): &(u32, u32)| proto::Elsewhere {
                mailbox_guid: GUID.to_vec(),
                uid: *uid,
                guid: "two".into(),
                here: *here,
                ..Default::default()
            };
            storage.elsewhere = copies.iter().map(known).collect();
            apply(&mut storage, Script::default(), &[flagged((4, "two"))]);
            storage.flagged
        };
        assert_eq!(found(&[(2, 1)]), [(2, 2)]);
        assert_eq!(found(&[(2, 1), (17, 5)]), [(2, 2)], "UIDs only rise");
        assert_eq!(found(&[(2, 1), (17, 3)]), [], "it may be either");
    }

    /// This server was set back, and has never had the copy: what it expunges instead comes back from the peer.
    #[test]
    fn only_an_expunge_of_what_is_surely_meant_is_said_to_be_a_clients() {
        for (named_by, is_sure) in [(12, true), (19, false)] {
            let mut storage = FakeStorage::default();
            apply(&mut storage, Script::default(), &[save(1, 12, "two"), expunge(2, named_by, "two")]);
            assert_eq!(storage.messages("INBOX"), []);
            assert!(storage.open("INBOX", false).unwrap());
            let mark = storage.mark().unwrap();
            assert_eq!(mark[..8] == Marks::default().expunges().1[..], is_sure, "{mark:?}");
        }
    }

    /// It was moved out and back: the one that is here is another one.
    #[test]
    fn what_a_client_expunged_goes_there_too_if_another_one_has_its_guid() {
        let mut storage = FakeStorage::default();
        apply(&mut storage, Script::default(), &[save(1, 2, "two"), expunge(2, 2, "two"), save(3, 5, "two")]);
        let told = found_again(&mut storage, |save| save.found_beside = true);
        assert_eq!(storage.messages("INBOX"), named(&[(5, "two")]));
        assert!(expunges(&told, "two"), "{told:?}");
    }

    /// Before it had this UID on both, the peer had given it another one.
    #[test]
    fn what_a_client_expunged_does_not_come_back_from_where_it_had_another_uid_first() {
        let mut storage = FakeStorage::default();
        apply(&mut storage, Script::default(), &[save(1, 2, "two"), expunge(2, 2, "two")]);
        let mailbox_guid = storage.guid("INBOX").to_vec();
        let (guid, server) = ("two".to_owned(), "a".to_owned());
        storage.elsewhere =
            vec![proto::Elsewhere { mailbox_guid, uid: 1, guid, here: 2, server, ..Default::default() }];
        let told = found_again(&mut storage, |save| save.found = true);
        assert_eq!(storage.messages("INBOX"), []);
        assert!(expunges(&told, "two"), "{told:?}");
    }

    #[test]
    fn what_a_killed_worker_saved_without_its_guid_is_not_saved_again() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "stray one")]);
        let outcome = apply(&mut storage, Script::default(), &[save(1, 1, "one"), save(2, 2, "two")]);
        assert_eq!((outcome.notes, outcome.told), (vec![], vec![]));
        assert_eq!(storage.messages("INBOX"), named(&[(1, "one"), (2, "two")]));

        storage.add("INBOX", GUID, 9, &[(1, "other"), (2, "stray one")]);
        let outcome = apply(&mut storage, Script::default(), &[save(3, 1, "one")]);
        assert_eq!(outcome.notes, ["uid_taken"]);
        assert_eq!(storage.messages("INBOX"), named(&[(1, "other"), (2, "one")]));
    }

    #[test]
    fn a_copy_that_a_killed_worker_saved_without_its_guid_is_not_there_twice() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(1, "one"), (2, "stray one")]);
        let outcome = apply(&mut storage, Script::default(), &[save(3, 2, "one")]);
        assert_eq!(outcome.error, None);
        assert_eq!(storage.messages("INBOX"), named(&[(1, "one"), (3, "one")]));
    }

    #[test]
    fn what_comes_before_a_failure_is_applied() {
        let mut storage = FakeStorage::default();
        let changes = [save(1, 1, "one"), expunge(2, 1, "one"), save(3, 2, "../two"), save(4, 3, "three")];
        let outcome = apply(&mut storage, Script::default(), &changes);
        assert_eq!(outcome.done, 2);
        assert!(outcome.error.unwrap().contains("GUID"));
        assert_eq!(storage.messages("INBOX"), []);
    }

    /// It may have waited long for a lock.
    #[test]
    fn a_commit_that_fails_is_not_tried_twice_in_a_job_and_its_mailbox_is_named() {
        let mut storage = FakeStorage::default();
        storage.commit_error = Some("Commit: timeout".into());
        let outcome = apply(&mut storage, Script::default(), &[save(1, 1, "one"), save(2, 2, "two")]);
        assert_eq!((outcome.done, outcome.error.as_deref()), (0, Some("mailbox INBOX: Commit: timeout")));
        assert_eq!(storage.commits_failed, 1);
    }

    #[test]
    fn a_body_that_is_gone_is_skipped_but_its_uid_is_not_used_again() {
        let mut storage = FakeStorage::default();
        let mut large = save(1, 5, "large");
        let Some(What::Save(save)) = &mut large.ops[0].what else { unreachable!() };
        (save.body_inline, save.body) = (false, Vec::new());
        large.mailbox.as_mut().unwrap().uid_next = 6;
        let outcome = apply(&mut storage, gone(1), &[large]);
        assert_eq!((outcome.done, outcome.notes), (1, vec!["body_gone".to_string()]));
        assert_eq!(storage.messages("INBOX"), []);
        assert_eq!(storage.uid_next("INBOX"), 6);
    }

    #[test]
    fn a_body_that_is_gone_uses_up_no_uid_that_others_do_not_know() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", GUID, 9, &[(5, "ours")]);
        let mut large = save(1, 5, "large");
        let Some(What::Save(save)) = &mut large.ops[0].what else { unreachable!() };
        (save.body_inline, save.body) = (false, Vec::new());
        apply_as(true, &mut storage, gone(1), &[large]);
        assert_eq!(storage.uid_next("INBOX"), 6);
    }

    #[test]
    fn uids_at_the_end_of_the_numbers_are_refused() {
        let outcome = apply(&mut FakeStorage::default(), Script::default(), &[save(1, u32::MAX, "one")]);
        assert!(outcome.error.unwrap().contains("UID 4294967295"));
    }
}
