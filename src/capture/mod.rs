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
pub use transaction::{mailbox_change, Done, Saved, Transaction, Untold};

use crate::wire::proto;
use records::Records;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

/// Notes that wait for the client's answer, at most, and what they take as records.
const NOTES_MAX: usize = 256;
const NOTES_BYTES_MAX: usize = 1 << 20;

/// Mailboxes that the relay was told of, at most: then they are told again.
const INTENTS_MAX: usize = 10_000;

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
    CommitInMemory(Guid),
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
    pub fn name(&mut self, mut guid_of: impl FnMut(&Guid, u32) -> Option<String>) {
        for note in &mut self.0 {
            if let Note::Commit(place, transaction, _) = note {
                transaction.name(|uid| guid_of(&place.guid, uid));
            }
        }
    }

    /// See [`Transaction::follow`].
    pub fn follow(&mut self, mut follow: impl FnMut(&Guid, &proto::MessageRange, Done) -> Option<String>) {
        for note in &mut self.0 {
            if let Note::Commit(place, transaction, _) = note {
                transaction.follow(|range, done| follow(&place.guid, range, done));
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

    /// The transaction was committed to an index in memory, which ends with the session. What of it lasts, as maildir's files do, is to be
    /// looked for: told as a change it would be on the peers alone.
    pub fn commit_in_memory(&mut self, begun: Begun, place: &Place) {
        if begun == self.begun() {
            self.notes.push(Note::CommitInMemory(place.guid));
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
                Note::CommitInMemory(guid) => self.records.commit_in_memory(guid),
                Note::Rollback(guid) => self.records.rollback(guid),
                Note::Mailbox(change) => self.records.mailbox(change),
                Note::Written(written) => self.records.written(&written),
            }
        }
        let records = self.records.take();
        if !records.is_empty() {
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
