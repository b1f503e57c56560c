//! From a mailbox transaction in a mail process to a record on its way to the relay.
//!
//! While a client waits for its answer, [`Capture`] only notes what happened. When it has its answer, [`records`] makes
//! records of the notes (it keeps the spans until their change is known) and [`link`] sends them. Nothing here waits: what
//! does not fit is dropped and counted, and the spans' gap tells the relay where.

mod link;
#[doc(hidden)]
pub mod records;
pub mod transaction;

pub use link::{Link, LinkConfig};
pub use transaction::{mailbox_change, Done, Known, Saved, Transaction, Untold};

use crate::wire::proto;
use records::Records;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::time::Duration;

/// Notes that wait for the client's answer, at most, and what they take as records.
const NOTES_MAX: usize = 256;
const NOTES_BYTES_MAX: usize = 1 << 20;

/// Mailboxes that the relay was told of, at most: then they are told again.
const INTENTS_MAX: usize = 10_000;

/// An answer of the relay's is on its way no longer than that.
const ANSWER_MARGIN: Duration = Duration::from_millis(200);

/// Bytes of a log that a span carries to be recognized by, at most.
pub const TAIL_MAX: usize = 64;

/// A GUID, all zero if it is not known.
pub type Guid = [u8; 16];

/// A mailbox, as it was called when a transaction on it began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The mailbox's owner.
    pub user: String,
    /// The mailbox's.
    pub guid: Guid,
    /// Parts of its name.
    pub path: Vec<String>,
}

impl Place {
    /// As it stands in records, without its state.
    pub fn mailbox(&self) -> proto::Mailbox {
        proto::Mailbox { guid: known(self.guid), path: self.path.clone(), ..Default::default() }
    }
}

fn known(guid: Guid) -> Vec<u8> {
    if guid == Guid::default() {
        Vec::new()
    } else {
        guid.to_vec()
    }
}

/// How a transaction ended.
#[derive(Debug, Clone, Default)]
pub struct Commit {
    /// The mailbox's GUID and state behind it; 0: not known.
    pub guid: Guid,
    pub uid_validity: u32,
    pub uid_next: u32,
    pub highest_modseq: u64,
    /// UIDs (and GUIDs) in the order of the saves.
    pub saved: Vec<Saved>,
    /// Its client is answered when the relay says so.
    pub ack: Option<proto::AckWanted>,
    /// Microseconds since 1970.
    pub clock: u64,
}

/// What a commit wrote to an index's log: [`proto::Span`], as it is noted: without allocations, but for the rare private user.
#[derive(Debug, Clone)]
pub struct Written {
    pub user: Rc<str>,
    pub private_user: Option<Rc<str>>,
    pub mailbox_guid: Guid,
    pub old_mailbox_guid: Guid,
    pub index_id: u32,
    pub log_seq: u32,
    pub begin: u64,
    pub end: u64,
    pub prev_log_seq: u32,
    pub prev_log_end: u64,
    pub tail: [u8; TAIL_MAX],
    pub tail_size: usize,
    /// Messages that it added.
    pub appends: u32,
    /// It added messages or changed flags.
    pub adds_or_changes: bool,
    /// It expunged messages that nobody spoke of.
    pub expunges: bool,
}

/// What happened, in its order.
enum Note {
    Begin(Guid),
    Commit(Rc<Place>, Transaction, Commit),
    CommitInMemory(Rc<Place>, Transaction, u32),
    Rollback(Guid),
    Mailbox(proto::Change),
    Written(Written),
}

/// Notes in their order.
pub struct Notes(Vec<Note>, Begun);

/// A transaction that was announced, for its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begun {
    /// How often we gave up before.
    given_up: u64,
}

impl Notes {
    /// Asks for the GUIDs of messages whose flags were changed: mailbox and UID.
    pub fn name(&mut self, mut known: impl FnMut(&Guid, u32) -> Known) {
        for note in &mut self.0 {
            if let Note::Commit(place, transaction, _) = note {
                transaction.name(|uid| known(&place.guid, uid));
            }
        }
    }

    /// See [`Transaction::follow`]. With where what was done stands in the log: the file's number, and the offset in it; at its end if
    /// that is not known.
    pub fn follow(&mut self, mut follow: impl FnMut(&Guid, (u32, u64), &proto::MessageRange, Done) -> Option<String>) {
        let mut written = HashMap::new();
        for note in &mut self.0 {
            match note {
                Note::Written(span) => drop(written.insert(span.mailbox_guid, (span.log_seq, span.begin))),
                Note::Commit(place, transaction, _) => {
                    let at = written.remove(&place.guid).unwrap_or((u32::MAX, u64::MAX));
                    transaction.follow(|range, done| follow(&place.guid, at, range, done));
                }
                _ => {}
            }
        }
    }
}

/// The transactions and spans of one mail process.
pub struct Capture {
    link: Link,
    /// (user, mailbox GUID) that the relay knows we write to.
    intents: HashSet<(String, Guid)>,
    /// The last of them.
    intended: Option<Rc<Place>>,
    /// With whom users' mail is replicated.
    peers: HashMap<String, proto::UserPeers>,
    /// What is told when the client has its answer.
    notes: Vec<Note>,
    notes_bytes: usize,
    records: Records,
    given_up: u64,
    /// The last record that the relay is to say something about, and whether it was told.
    ack: (u64, bool),
}

impl Capture {
    /// Nothing is connected before the first write. `birth_guid` makes 16 bytes of a message's GUID.
    pub fn new(config: LinkConfig, birth_guid: fn(&str) -> Vec<u8>) -> Capture {
        Capture {
            link: Link::new(config),
            intents: HashSet::new(),
            peers: HashMap::new(),
            intended: None,
            notes: Vec::new(),
            notes_bytes: 0,
            records: Records::new(birth_guid),
            given_up: 0,
            ack: (0, false),
        }
    }

    /// A transaction on this mailbox is about to write. The first one tells the relay, before anything is committed.
    pub fn begin(&mut self, place: &Rc<Place>) -> Begun {
        if !self.intended.as_ref().is_some_and(|intended| Rc::ptr_eq(intended, place)) {
            self.intend(place);
            self.intended = Some(Rc::clone(place));
        }
        self.notes.push(Note::Begin(place.guid));
        self.begun()
    }

    fn begun(&self) -> Begun {
        Begun { given_up: self.given_up }
    }

    /// After a panic of ours nobody knows what the notes are worth: they go, and so does what the open transactions will do.
    /// The relay is told that something is missing, and looks at all that this process was about to write to.
    pub fn give_up(&mut self) {
        self.given_up += 1;
        self.notes.clear();
        self.notes_bytes = 0;
        self.records.forget();
        self.link.send(self.records.take());
    }

    /// Says that this process may write to this mailbox, once.
    pub fn intend(&mut self, place: &Place) {
        if self.intents.len() >= INTENTS_MAX {
            self.intents.clear();
        }
        if self.intents.insert((place.user.clone(), place.guid)) {
            let peers = self.peers.get(&place.user).cloned();
            self.link.intent(proto::Intent { user: place.user.clone(), mailbox: Some(place.mailbox()), peers });
        }
    }

    /// With whom the user's mail is replicated: said with what is intended for it.
    pub fn set_peers(&mut self, user: &str, peers: proto::UserPeers) {
        if self.peers.len() >= INTENTS_MAX {
            self.peers.clear();
        }
        if self.peers.insert(user.to_owned(), peers.clone()).is_some_and(|before| before != peers) {
            self.intents.retain(|(name, _)| name != user);
            self.intended = None;
        }
    }

    /// The transaction that `begin` announced was committed.
    ///
    /// Of this and of what follows nothing is sent before [`Capture::flush`], which the caller is to call as soon as its
    /// client has its answer, or when it [is full](Capture::is_full).
    pub fn commit(&mut self, begun: Begun, place: Rc<Place>, transaction: Transaction, commit: Commit) {
        if begun != self.begun() {
            return;
        }
        self.notes_bytes += transaction.size();
        self.notes.push(Note::Commit(place, transaction, commit));
    }

    /// For [`Commit::ack`], before [`Capture::await_ack`].
    pub fn next_ack(&mut self, peers: u32, timeout: Duration) -> proto::AckWanted {
        self.ack = (self.ack.0 + 1, false);
        // So that the answer is here when the time is over.
        let timeout = timeout - (timeout / 4).min(ANSWER_MARGIN);
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        proto::AckWanted { id: self.ack.0, peers, timeout_ms }
    }

    /// Tells what was noted, and waits until the last save is as safe as it should be.
    ///
    /// # Errors
    ///
    /// Why it is not, or not yet. The relay is told to count it.
    pub fn await_ack(&mut self, timeout: Duration) -> Result<(), String> {
        self.flush();
        let outcome = match self.ack {
            (id, true) => self.link.await_ack(id, timeout),
            _ => Err("it could not be told to the relay".into()),
        };
        if outcome.is_err() {
            self.link.send(vec![proto::Record { unacknowledged: 1, ..Default::default() }]);
        }
        outcome
    }

    /// The transaction was committed to an index in memory, which ends with the session. What of it lasts, as maildir's files do, is to be
    /// looked for: told as a change it would be on the peers alone.
    pub fn commit_in_memory(&mut self, begun: Begun, place: Rc<Place>, transaction: Transaction, uid_next: u32) {
        if begun == self.begun() {
            self.notes_bytes += transaction.size();
            self.notes.push(Note::CommitInMemory(place, transaction, uid_next));
        }
    }

    /// The transaction that `begin` announced did not happen.
    pub fn rollback(&mut self, begun: Begun, place: &Place) {
        if begun == self.begun() {
            self.notes.push(Note::Rollback(place.guid));
        }
    }

    /// A change without a transaction: of a mailbox itself.
    pub fn mailbox(&mut self, change: proto::Change) {
        self.notes.push(Note::Mailbox(change));
    }

    /// A commit wrote this. It belongs to the mailbox's open transactions; without any, nobody will tell what it did.
    pub fn written(&mut self, written: Written) {
        self.notes.push(Note::Written(written));
    }

    /// It is time to flush.
    pub fn is_full(&self) -> bool {
        self.notes.len() >= NOTES_MAX || self.notes_bytes >= NOTES_BYTES_MAX
    }

    /// What waits, to be named by [`Notes::name`] and given back.
    pub fn take_notes(&mut self) -> Notes {
        Notes(std::mem::take(&mut self.notes), self.begun())
    }

    /// In front of what was noted since.
    pub fn give_back(&mut self, notes: Notes) {
        if notes.1 != self.begun() {
            return;
        }
        let since = std::mem::replace(&mut self.notes, notes.0);
        self.notes.extend(since);
    }

    /// Sends what could wait.
    pub fn flush(&mut self) {
        self.notes_bytes = 0;
        for note in self.notes.drain(..) {
            match note {
                Note::Begin(guid) => self.records.begin(guid),
                Note::Commit(place, transaction, commit) => self.records.commit(&place, transaction, &commit),
                Note::CommitInMemory(place, transaction, uid_next) => {
                    self.records.commit_in_memory(&place, transaction, uid_next)
                }
                Note::Rollback(guid) => self.records.rollback(guid),
                Note::Mailbox(change) => self.records.mailbox(change),
                Note::Written(written) => self.records.written(&written),
            }
        }
        let records = self.records.take();
        if !records.is_empty() {
            let wants = |record: &proto::Record| record.ack.as_ref().is_some_and(|ack| ack.id == self.ack.0);
            self.ack.1 |= records.iter().any(wants);
            self.link.send(records);
        }
    }

    /// Sends what is left within the link's deadline, says goodbye and ends the thread.
    pub fn finish(mut self) {
        self.flush();
        self.records.give_up_waiting();
        self.flush();
        self.link.finish();
    }
}
