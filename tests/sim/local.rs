//! What runs on one server beside its relay: Dovecot's mailboxes, and mail processes that tell the relay what they do with the
//! plugin's own code.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use dovetail::capture::records::Records;
use dovetail::capture::{mailbox_change, Commit, Done, Known, Place, Saved, Transaction, Written};
use dovetail::relay::connection::Pipe;
use dovetail::wire::frame;
use dovetail::wire::proto::{self, frame::Kind, op::What};
use dovetail::worker::mark::{moves_at, Marks};
use dovetail::worker::storage::Guid;

use super::chance::Chance;
use super::ledger::{Flag, Ledger};
use super::mailbox::{hashed, Act, Committed, Mailbox, Message, User};
use super::net::{Event, Network, Owner, PipeEnd};
use super::story::tell;

/// Microseconds since 1970 when a run begins.
const BEGIN_US: u64 = 1_700_000_000_000_000;
/// A process that finds no relay tries again.
const RETRY_US: u64 = 200_000;
/// The process's queue.
const QUEUE_BYTES: usize = 8 << 20;

/// What a client does. Mailboxes by name, messages by any number: the one that it leads to. `stale`: in the mailbox as the client's
/// session saw it last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Do {
    Save { mailbox: String, flags: u8, keyword: Option<String>, inline: bool },
    Flags { mailbox: String, pick: u64, count: u64, add: u8, remove: u8, named: bool, stale: bool },
    Keyword { mailbox: String, pick: u64, name: String, add: bool, stale: bool },
    Expunge { mailbox: String, pick: u64, count: u64, stale: bool },
    Copy { from: String, to: String, pick: u64, expunge: bool },
    Create { mailbox: String },
    Rename { from: String, to: String },
    Delete { mailbox: String },
    Subscribe { mailbox: String, subscribed: bool },
}

/// What a process did and has not told yet: as `capture::Notes` keeps it.
enum Note {
    Begin(Guid),
    Commit(Place, Transaction, Commit),
    Mailbox(proto::Change),
    Written(Written),
}

/// A mail process.
struct Process {
    notes: Vec<Note>,
    /// Mailboxes as its client sees them: their GUIDs, and which messages they have.
    views: BTreeMap<String, (Guid, BTreeMap<u32, String>)>,
    records: Records,
    intents: BTreeSet<(String, Guid)>,
    connection: Option<PipeEnd>,
    /// Encoded frames that are not written yet, and how much of the first is.
    waiting: VecDeque<Vec<u8>>,
    written: usize,
    last_logs: BTreeMap<Guid, u32>,
    is_ending: bool,
}

impl Process {
    fn new() -> Process {
        Process {
            notes: Vec::new(),
            views: BTreeMap::new(),
            records: Records::new(|guid| hashed(guid).to_vec()),
            intents: BTreeSet::new(),
            connection: None,
            waiting: VecDeque::new(),
            written: 0,
            last_logs: BTreeMap::new(),
            is_ending: false,
        }
    }

    fn note(&mut self, mut written: Written) {
        let last = self.last_logs.insert(written.mailbox_guid, written.log_seq);
        if last == Some(written.log_seq) {
            (written.prev_log_seq, written.prev_log_end) = (0, 0);
        }
        self.notes.push(Note::Written(written));
    }

    /// What was noted becomes records.
    fn tell_notes(&mut self) {
        for note in std::mem::take(&mut self.notes) {
            match note {
                Note::Begin(guid) => self.records.begin(guid),
                Note::Commit(place, transaction, commit) => self.records.commit(&place, transaction, &commit),
                Note::Mailbox(change) => self.records.mailbox(change),
                Note::Written(written) => self.records.written(&written),
            }
        }
    }
}

/// See the module.
pub struct Local {
    pub server: usize,
    pub name: String,
    network: Network,
    chance: Chance,
    users: BTreeMap<String, User>,
    processes: BTreeMap<u64, Process>,
    /// The process that serves a client.
    slots: BTreeMap<usize, u64>,
    last_process: u64,
    /// By which the machine's clock is wrong.
    pub offset_us: i64,
    in_between: VecDeque<(usize, Do)>,
    /// A worker dies at this moment of its work.
    pub kill_worker_in: Option<u64>,
    is_locked: bool,
    pub is_disk_full: bool,
    guids: u64,
    follow_wrote: Vec<Written>,
    /// Its mail processes may take longer than the relay waits for them.
    pub is_slow: bool,
    pub ledger: Rc<RefCell<Ledger>>,
}

impl Local {
    pub fn new(server: usize, name: String, network: Network, seed: u64, ledger: Rc<RefCell<Ledger>>) -> Local {
        Local {
            server,
            name,
            network,
            chance: Chance::new(seed, 100 + server as u64),
            users: BTreeMap::new(),
            processes: BTreeMap::new(),
            slots: BTreeMap::new(),
            last_process: 0,
            offset_us: 0,
            in_between: VecDeque::new(),
            kill_worker_in: None,
            is_locked: false,
            is_disk_full: false,
            guids: 0,
            follow_wrote: Vec::new(),
            is_slow: false,
            ledger,
        }
    }

    pub fn inbox_guid(user: &str) -> Guid {
        let mut guid = [b'I'; 16];
        guid.iter_mut().zip(user.bytes()).for_each(|(to, from)| *to = from);
        guid
    }

    /// The machine's clock.
    pub fn now_us(&self) -> u64 {
        (BEGIN_US + self.network.borrow().now_us).saturating_add_signed(self.offset_us)
    }

    /// The user's next one. On two servers he did not get his first mailbox in the same second. Where he does, both may count the same
    /// ones, and one can be that of two mailboxes that had one name; see docs/PROTOCOL.md.
    pub fn next_uid_validity(&mut self, user: &str) -> u32 {
        let first = self.now_secs() + 1_000 * self.server as u32;
        self.user(user).next_uid_validity(first)
    }

    pub fn now_secs(&self) -> u32 {
        (self.now_us() / 1_000_000) as u32
    }

    pub fn new_guid(&mut self) -> Guid {
        self.guids += 1;
        let mut guid = [0; 16];
        guid[..8].copy_from_slice(&self.chance.next().to_be_bytes());
        guid[8] = self.name.as_bytes()[0];
        guid[12..].copy_from_slice(&(self.guids as u32).to_be_bytes());
        guid
    }

    pub fn user(&mut self, user: &str) -> &mut User {
        self.users.entry(user.into()).or_default()
    }

    pub fn users(&self) -> &BTreeMap<String, User> {
        &self.users
    }

    /// INBOX is born on every server by itself.
    pub fn make_inbox(&mut self, user: &str) -> Option<Vec<Written>> {
        let (uid_validity, now_secs) = (self.next_uid_validity(user), self.now_secs());
        let guid = Local::inbox_guid(user);
        self.user(user).create(user, "INBOX", guid, uid_validity, now_secs)
    }

    pub fn lock(&mut self, _user: &str) -> bool {
        !std::mem::replace(&mut self.is_locked, true)
    }

    pub fn unlock(&mut self) {
        self.is_locked = false;
        let mut ledger = self.ledger.borrow_mut();
        for (user, of_user) in &self.users {
            for (name, mailbox) in &of_user.mailboxes {
                ledger.look(self.server, user, name, mailbox, false);
            }
        }
    }

    pub fn check_disk(&self) -> Result<(), String> {
        match self.is_disk_full {
            true => Err("write() failed: No space left on device".into()),
            false => Ok(()),
        }
    }

    pub fn is_worker_killed_now(&mut self) -> bool {
        match &mut self.kill_worker_in {
            Some(0) => {
                self.kill_worker_in = None;
                tell(|| format!("{}: a worker is killed in the middle of a job", self.name));
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }

    /// A commit of anybody on this server.
    pub fn is_committed(
        &mut self,
        user: &str,
        name: &str,
        who: &str,
        committed: &Committed,
        applying: &[proto::SeqOf],
    ) {
        let Some(mailbox) = self.users.get(user).and_then(|user| user.mailboxes.get(name)) else { return };
        tell(|| {
            let saved: Vec<String> = committed
                .saved
                .iter()
                .map(|uid| format!("{uid}={}", mailbox.messages.get(uid).map_or("?", |message| short(&message.guid))))
                .collect();
            let gone: Vec<String> =
                committed.expunged.iter().map(|(uid, guid)| format!("{uid}={}", short(guid))).collect();
            let applied: Vec<String> = applying.iter().map(|of| format!("{}{}", of.origin, of.seq)).collect();
            let places: Vec<String> =
                committed.written.iter().map(|w| format!("{}:{}..{}", w.log_seq, w.begin, w.end)).collect();
            format!(
                "{}: {who} commits to {name} [{}]{}{}{}",
                self.name,
                places.join(" "),
                if saved.is_empty() { String::new() } else { format!(" saved {}", saved.join(" ")) },
                if gone.is_empty() { String::new() } else { format!(" expunged {}", gone.join(" ")) },
                if applied.is_empty() { String::new() } else { format!(", applying {}", applied.join(" ")) },
            )
        });
        self.ledger.borrow_mut().look(self.server, user, name, mailbox, self.is_locked);
    }

    // ---- Clients.

    /// To be done while a worker is in the middle of its work.
    pub fn do_in_between(&mut self, slot: usize, what: Do) {
        self.in_between.push_back((slot, what));
    }

    pub fn act_in_between(&mut self) {
        if let Some((slot, what)) = self.in_between.pop_front() {
            tell(|| format!("{}: while a worker works,", self.name));
            self.act(slot, &what);
        }
    }

    /// What found no worker at work.
    pub fn act_all(&mut self) {
        while !self.in_between.is_empty() {
            self.act_in_between();
        }
    }

    /// The process of this client, a new one if there is none.
    fn process_of(&mut self, slot: usize) -> u64 {
        if let Some(number) = self.slots.get(&slot) {
            return *number;
        }
        self.last_process += 1;
        self.processes.insert(self.last_process, Process::new());
        self.slots.insert(slot, self.last_process);
        self.last_process
    }

    /// A client does something, and has its answer.
    pub fn act(&mut self, slot: usize, what: &Do) {
        let user = "jane";
        let number = self.process_of(slot);
        let Some(mut process) = self.processes.remove(&number) else { return };
        self.carry_out(&mut process, number, user, what);
        self.processes.insert(number, process);
        let delay = match self.chance.below(20) {
            // The first that is heard of a log waits for a second only.
            0 => self.chance.below(if self.is_slow { 1_500_000 } else { 900_000 }),
            1..=3 => self.chance.below(50_000),
            _ => self.chance.below(5_000),
        };
        self.network.borrow_mut().after(delay, Event::Flush(self.server, number));
    }

    fn carry_out(&mut self, process: &mut Process, number: u64, user: &str, what: &Do) {
        match what {
            Do::Save { mailbox, flags, keyword, inline } => {
                if !self.open(process, number, user, mailbox) {
                    return;
                }
                let guid = hex(&self.new_guid());
                let now_secs = i64::from(self.now_secs());
                let message = Message {
                    body: format!("mail {guid}").into_bytes(),
                    guid,
                    flags: *flags,
                    keywords: keyword.iter().cloned().collect(),
                    received_date: now_secs,
                    save_date: now_secs,
                };
                self.save(process, number, user, mailbox, message, None, *inline);
            }
            Do::Flags { mailbox, pick, count, add, remove, named, stale } => {
                let Some(mut uids) = self.pick(process, user, mailbox, *pick, *count, *stale) else { return };
                // notify tells only what changes.
                let Some(of_name) = self.user(user).mailboxes.get(mailbox) else { return };
                let flags = |uid: u32| of_name.message_or_gone(uid).map(|message| message.flags);
                uids.retain(|(uid, _)| flags(*uid).is_some_and(|flags| flags & !remove | add != flags));
                if uids.is_empty() {
                    return;
                }
                let mut transaction = Transaction::new(QUEUE_BYTES);
                let delta = proto::FlagUpdate { add: (*add).into(), remove: (*remove).into(), ..Default::default() };
                let mut acts = Vec::new();
                for (uid, guid) in &uids {
                    transaction.flags(*uid, None, delta.clone());
                    acts.push(Act::Flags { uid: *uid, add: *add, remove: *remove });
                    let flags = (0..5).map(|bit| 1u8 << bit).filter(|bit| (add | remove) & bit != 0);
                    for bit in flags {
                        self.is_flagged(user, mailbox, guid, Flag::System(bit), add & bit != 0);
                    }
                }
                if *named {
                    transaction.name(|uid| match uids.iter().find(|(of, _)| *of == uid) {
                        Some((_, guid)) => Known::As(guid.clone()),
                        None => Known::Gone,
                    });
                }
                tell(|| {
                    format!("{}: process {number} changes flags +{add:x} -{remove:x} of {}", self.name, list(&uids))
                });
                self.commit(process, number, user, mailbox, transaction, acts);
            }
            Do::Keyword { mailbox, pick, name, add, stale } => {
                let Some(uids) = self.pick(process, user, mailbox, *pick, 1, *stale) else { return };
                let mut transaction = Transaction::new(QUEUE_BYTES);
                let (added, removed) = if *add { (vec![name.clone()], vec![]) } else { (vec![], vec![name.clone()]) };
                let delta = proto::FlagUpdate { add_keywords: added, remove_keywords: removed, ..Default::default() };
                let mut acts = Vec::new();
                for (uid, guid) in &uids {
                    let mailbox = self.user(user).mailboxes.get(mailbox);
                    let has = mailbox.and_then(|m| m.message_or_gone(*uid)).is_some_and(|m| m.keywords.contains(name));
                    if has == *add {
                        // The same.
                        return;
                    }
                    transaction.flags(*uid, Some(guid.clone()), delta.clone());
                    acts.push(Act::Keyword { uid: *uid, name: name.clone(), add: *add });
                }
                for (_, guid) in &uids {
                    self.is_flagged(user, mailbox, guid, Flag::Keyword(name.clone()), *add);
                }
                tell(|| {
                    let sign = if *add { '+' } else { '-' };
                    format!("{}: process {number} changes keyword {sign}{name} of {}", self.name, list(&uids))
                });
                self.commit(process, number, user, mailbox, transaction, acts);
            }
            Do::Expunge { mailbox, pick, count, stale } => {
                let Some(uids) = self.pick(process, user, mailbox, *pick, *count, *stale) else { return };
                self.expunge(process, number, user, mailbox, &uids);
            }
            Do::Copy { from, to, pick, expunge } => {
                let Some(uids) = self.pick(process, user, from, *pick, 1, false) else { return };
                let source = self.user(user).mailboxes.get(from).map(|m| (m.guid, m.messages.get(&uids[0].0).cloned()));
                let Some((source, Some(message))) = source else { return };
                if !self.user(user).mailboxes.contains_key(to) {
                    return;
                }
                let from_mailbox = proto::Mailbox { guid: source.to_vec(), path: path(from), ..Default::default() };
                let copied = proto::CopiedFrom { mailbox: Some(from_mailbox), uid: uids[0].0 };
                self.save(process, number, user, to, message, Some(copied), false);
                if *expunge {
                    self.expunge(process, number, user, from, &uids);
                }
            }
            Do::Create { mailbox } => {
                self.intend(
                    process,
                    number,
                    user,
                    &Place { user: user.into(), guid: Guid::default(), path: path(mailbox) },
                );
                let (guid, uid_validity) = (self.new_guid(), self.next_uid_validity(user));
                let now_secs = self.now_secs();
                let Some(written) = self.user(user).create(user, mailbox, guid, uid_validity, now_secs) else { return };
                written.into_iter().for_each(|written| process.note(written));
                tell(|| format!("{}: process {number} creates mailbox {mailbox}", self.name));
                self.tell_list(process, user, mailbox, What::Create(proto::MailboxCreate::default()));
            }
            Do::Rename { from, to } => {
                self.intend(
                    process,
                    number,
                    user,
                    &Place { user: user.into(), guid: Guid::default(), path: path(from) },
                );
                if !self.user(user).rename(from, to) {
                    return;
                }
                tell(|| format!("{}: process {number} renames mailbox {from} to {to}", self.name));
                let guid = self.user(user).mailboxes.get(to).map(|mailbox| mailbox.guid).unwrap_or_default();
                let mailbox = proto::Mailbox { guid: guid.to_vec(), path: path(from), ..Default::default() };
                let what = What::Rename(proto::MailboxRename { new_path: path(to), back: vec![] });
                process.notes.push(Note::Mailbox(mailbox_change(user, mailbox, what, self.now_us())));
            }
            Do::Delete { mailbox } => {
                self.intend(
                    process,
                    number,
                    user,
                    &Place { user: user.into(), guid: Guid::default(), path: path(mailbox) },
                );
                let Some(deleted) = self.user(user).delete(mailbox) else { return };
                tell(|| format!("{}: process {number} deletes mailbox {mailbox}", self.name));
                self.ledger.borrow_mut().is_deleted(user, &deleted);
                let of = proto::Mailbox { guid: deleted.guid.to_vec(), path: path(mailbox), ..Default::default() };
                let what = What::Delete(proto::MailboxDelete::default());
                process.notes.push(Note::Mailbox(mailbox_change(user, of, what, self.now_us())));
            }
            Do::Subscribe { mailbox, subscribed } => {
                let now_secs = self.now_secs().into();
                self.intend(
                    process,
                    number,
                    user,
                    &Place { user: user.into(), guid: Guid::default(), path: path(mailbox) },
                );
                self.user(user).subscribe(mailbox, *subscribed, now_secs);
                tell(|| format!("{}: process {number} sets subscription of {mailbox} to {subscribed}", self.name));
                let of = proto::Mailbox { path: path(mailbox), ..Default::default() };
                let what = What::Subscription(proto::Subscription { subscribed: *subscribed });
                process.notes.push(Note::Mailbox(mailbox_change(user, of, what, self.now_us())));
            }
        }
    }

    /// False if there is no such mailbox.
    fn open(&mut self, process: &mut Process, number: u64, user: &str, name: &str) -> bool {
        let made = if name == "INBOX" { self.make_inbox(user) } else { None };
        if let Some(written) = made {
            tell(|| format!("{}: process {number} makes INBOX", self.name));
            let place = Place { user: user.into(), guid: Guid::default(), path: path(name) };
            self.intend(process, number, user, &place);
            written.into_iter().for_each(|written| process.note(written));
            self.tell_list(process, user, name, What::Create(proto::MailboxCreate::default()));
        }
        self.user(user).mailboxes.contains_key(name)
    }

    /// A change of a mailbox as it is now.
    fn tell_list(&mut self, process: &mut Process, user: &str, name: &str, what: What) {
        let now_us = self.now_us();
        let Some(mailbox) = self.user(user).mailboxes.get(name) else { return };
        process.notes.push(Note::Mailbox(mailbox_change(user, described(name, mailbox), what, now_us)));
    }

    /// The messages from the one that is picked on. `stale`: as the client saw the mailbox last.
    fn pick(
        &mut self,
        process: &mut Process,
        user: &str,
        name: &str,
        pick: u64,
        count: u64,
        stale: bool,
    ) -> Option<Vec<(u32, String)>> {
        let mailbox = self.user(user).mailboxes.get(name)?;
        let is_seen = process.views.get(name).is_some_and(|(guid, _)| *guid == mailbox.guid);
        if !stale || !is_seen {
            let messages = mailbox.messages.iter().map(|(uid, message)| (*uid, message.guid.clone())).collect();
            process.views.insert(name.into(), (mailbox.guid, messages));
        }
        let (_, messages) = process.views.get(name)?;
        let first = pick.checked_rem(messages.len() as u64)?;
        let picked = messages.iter().skip(first as usize).take(count as usize);
        Some(picked.map(|(uid, guid)| (*uid, guid.clone())).collect())
    }

    fn is_flagged(&mut self, user: &str, name: &str, guid: &str, flag: Flag, is_set: bool) {
        let server = self.server;
        let Some(mailbox) = self.users.get(user).and_then(|user| user.mailboxes.get(name)) else { return };
        self.ledger.borrow_mut().is_flagged(server, user, &mailbox.guid, guid, flag, is_set);
    }

    #[allow(clippy::too_many_arguments)]
    fn save(
        &mut self,
        process: &mut Process,
        number: u64,
        user: &str,
        name: &str,
        message: Message,
        copied_from: Option<proto::CopiedFrom>,
        inline: bool,
    ) {
        let mut transaction = Transaction::new(QUEUE_BYTES);
        transaction.save(proto::Save {
            guid: message.guid.clone(),
            flags: message.flags.into(),
            keywords: message.keywords.iter().cloned().collect(),
            received_date: message.received_date,
            save_date: message.save_date,
            size: message.body.len() as u64,
            body_inline: inline,
            body: if inline { message.body.clone() } else { Vec::new() },
            copied_from,
            ..Default::default()
        });
        if let Some(mailbox) = self.user(user).mailboxes.get(name) {
            let guid = mailbox.guid;
            self.ledger.borrow_mut().is_saved(self.server, user, &guid, &message.guid);
        }
        self.commit(process, number, user, name, transaction, vec![Act::Save(0, message)]);
    }

    fn expunge(&mut self, process: &mut Process, number: u64, user: &str, name: &str, uids: &[(u32, String)]) {
        let mut transaction = Transaction::new(QUEUE_BYTES);
        let Some(mailbox) = self.user(user).mailboxes.get(name).map(|mailbox| mailbox.guid) else { return };
        for (uid, guid) in uids {
            transaction.expunge(*uid, Some(guid.clone()));
            self.ledger.borrow_mut().is_expunged(user, &mailbox, guid);
        }
        let acts = uids.iter().map(|(uid, _)| Act::Expunge(*uid)).collect();
        self.commit(process, number, user, name, transaction, acts);
        // Its client has heard that they are gone.
        process.views.remove(name);
    }

    /// Commits, and notes it as the plugin does.
    fn commit(
        &mut self,
        process: &mut Process,
        number: u64,
        user: &str,
        name: &str,
        transaction: Transaction,
        acts: Vec<Act>,
    ) {
        let Some(guid) = self.user(user).mailboxes.get(name).map(|mailbox| mailbox.guid) else { return };
        let place = Place { user: user.into(), guid, path: path(name) };
        self.intend(process, number, user, &place);
        let Some(mailbox) = self.user(user).mailboxes.get_mut(name) else { return };
        let committed = mailbox.commit(user, acts, false);
        let (uid_validity, uid_next, highest_modseq) = (mailbox.uid_validity, mailbox.uid_next, mailbox.modseq);
        self.is_committed(user, name, &format!("process {number}"), &committed, &[]);
        process.notes.push(Note::Begin(guid));
        let mut written = committed.written.into_iter();
        if let Some(of_transaction) = written.next() {
            process.note(of_transaction);
        }
        let saved = committed.saved.iter().map(|uid| Saved { uid: *uid, guid: None }).collect();
        let commit = Commit { guid, uid_validity, uid_next, highest_modseq, saved, clock: self.now_us(), ack: None };
        process.notes.push(Note::Commit(place, transaction, commit));
        // Of the sync.
        written.for_each(|written| process.note(written));
    }

    /// What was done to messages that a worker has moved is done where they are now, when the client has its answer: see
    /// src/shim/follow.c.
    fn follow_all(&mut self, process: &mut Process) {
        let mut notes = std::mem::take(&mut process.notes);
        let mut written = BTreeMap::new();
        for note in &mut notes {
            match note {
                Note::Written(span) => drop(written.insert(span.mailbox_guid, (span.log_seq, span.begin))),
                Note::Commit(place, transaction, _) => {
                    let at = written.remove(&place.guid).unwrap_or((u32::MAX, u64::MAX));
                    transaction.follow(|range, done| self.follow(place, at, range, done));
                }
                _ => {}
            }
        }
        process.notes = notes;
        for mut written in std::mem::take(&mut self.follow_wrote) {
            // What it did is told already.
            (written.adds_or_changes, written.expunges, written.appends) = (false, false, 0);
            process.note(written);
        }
    }

    /// The GUID of a message that its UID names no more.
    fn follow(&mut self, place: &Place, at: (u32, u64), range: &proto::MessageRange, done: Done) -> Option<String> {
        let name = self.user(&place.user).find(&place.guid).cloned()?;
        let mailbox = self.user(&place.user).mailboxes.get_mut(&name)?;
        if !Marks::parse(&mailbox.mark).has_diverged() {
            return None;
        }
        let moves: Vec<_> = mailbox.log_files().iter().flat_map(|log| moves_at(log)).collect();
        let is_unnamed = range.guid.is_empty() && range.first_uid == range.last_uid;
        let mut guid = None;
        let is_meant = |from: &u32| (range.first_uid..=range.last_uid).contains(from);
        for (_, from, to) in moves.iter().filter(|(moved_at, from, _)| is_meant(from) && *moved_at <= at) {
            let to = moves.iter().fold(*to, |to, next| if next.1 == to { next.2 } else { to });
            let mailbox = self.user(&place.user).mailboxes.get_mut(&name)?;
            let Some(message) = mailbox.messages.get(&to) else { continue };
            if !is_unnamed && mailbox.messages.contains_key(from) {
                continue;
            }
            guid = Some(message.guid.clone());
            let committed = mailbox.commit(&place.user, acts_of(done, to), false);
            self.is_committed(&place.user, &name, "the process, which follows a move,", &committed, &[]);
            self.follow_wrote.extend(committed.written);
        }
        guid
    }

    // ---- What processes say.

    /// Before the first write.
    fn intend(&mut self, process: &mut Process, number: u64, user: &str, place: &Place) {
        if process.intents.insert((user.into(), place.guid)) {
            let is_new = process.connection.is_none();
            if is_new {
                self.connect(process, number);
            } else {
                process.waiting.push_back(intent(user, place));
            }
            self.write(process);
            if process.connection.is_none() {
                // It finds out only now that the relay is another one.
                process.waiting.retain(|frame| is_record(frame));
                self.connect(process, number);
                self.write(process);
            }
        }
    }

    /// False if there is no relay.
    fn connect(&mut self, process: &mut Process, number: u64) -> bool {
        let mut net = self.network.borrow_mut();
        if !net.is_listening[self.server] {
            return false;
        }
        let (here, there) = net.pair(Owner::Process(self.server, number), Owner::Relay(self.server), true);
        net.accepting.push((self.server, there));
        drop(net);
        process.connection = Some(PipeEnd { network: self.network.clone(), end: here });
        process.written = 0;
        let attach = proto::Attach { process: "imap".into(), pid: number as u32 };
        let intents = process
            .intents
            .iter()
            .map(|(user, guid)| intent(user, &Place { user: user.clone(), guid: *guid, path: Vec::new() }));
        let said: Vec<Vec<u8>> = std::iter::once(encoded(Kind::Attach(attach))).chain(intents).collect();
        said.into_iter().rev().for_each(|frame| process.waiting.push_front(frame));
        true
    }

    fn write(&mut self, process: &mut Process) {
        let Some(connection) = &mut process.connection else { return };
        while let Some(first) = process.waiting.front() {
            match connection.write(&first[process.written..]) {
                Ok(length) => process.written += length,
                Err(_) => {
                    process.connection = None;
                    return;
                }
            }
            if process.written == first.len() {
                process.waiting.pop_front();
                process.written = 0;
            }
        }
    }

    /// The client has its answer: what could wait is told.
    pub fn flush(&mut self, number: u64) {
        let Some(mut process) = self.processes.remove(&number) else { return };
        if process.connection.as_ref().is_some_and(|c| self.network.borrow().is_broken(c.end)) {
            process.connection = None;
        }
        // Of a connection that is gone, what says who we are is said again.
        if process.connection.is_none() {
            process.waiting.retain(|frame| is_record(frame));
        }
        self.follow_all(&mut process);
        process.tell_notes();
        for record in process.records.take() {
            process.waiting.push_back(encoded(Kind::Record(record)));
        }
        let has_relay = process.connection.is_some() || self.connect(&mut process, number);
        if process.is_ending && process.waiting.iter().all(|frame| is_record(frame)) {
            process.waiting.push_back(encoded(Kind::Goodbye(proto::Goodbye::default())));
        }
        self.write(&mut process);
        let is_left = !process.waiting.is_empty();
        if process.is_ending {
            // It waits no longer.
            return;
        }
        if is_left || !has_relay {
            self.network.borrow_mut().after(RETRY_US, Event::Flush(self.server, number));
        }
        self.processes.insert(number, process);
    }

    /// Its connection broke.
    pub fn lost_relay(&mut self, number: u64) {
        let Some(process) = self.processes.get_mut(&number) else { return };
        if process.connection.as_ref().is_some_and(|c| self.network.borrow().is_broken(c.end)) {
            process.connection = None;
            self.network.borrow_mut().after(RETRY_US, Event::Flush(self.server, number));
        }
    }

    /// It ends as it should.
    pub fn end_process(&mut self, slot: usize) {
        let Some(number) = self.slots.remove(&slot) else { return };
        tell(|| format!("{}: process {number} ends", self.name));
        if let Some(process) = self.processes.get_mut(&number) {
            process.is_ending = true;
        }
        self.flush(number);
    }

    /// Not one that has not told its relay of itself yet, because that is a new one: what it does until its next record, nobody
    /// would look for.
    pub fn kill_process(&mut self, slot: usize) {
        let process = self.slots.get(&slot).and_then(|number| self.processes.get(number));
        let connection = process.and_then(|process| process.connection.as_ref());
        if connection.is_none_or(|connection| self.network.borrow().is_lost(connection.end)) {
            return;
        }
        let Some(number) = self.slots.remove(&slot) else { return };
        tell(|| format!("{}: process {number} is killed", self.name));
        self.processes.remove(&number);
    }

    pub fn kill_all_processes(&mut self) {
        self.slots.clear();
        self.processes.clear();
    }

    /// Whether all is said.
    pub fn is_quiet(&self) -> bool {
        let has_told = |process: &Process| process.waiting.is_empty() && process.notes.is_empty();
        self.in_between.is_empty() && self.processes.values().all(has_told)
    }
}

/// What was done to a message, done to that at `uid`.
fn acts_of(done: Done, uid: u32) -> Vec<Act> {
    let Done::Flags(update) = done else { return vec![Act::Expunge(uid)] };
    let mut acts = Vec::new();
    if update.add | update.remove != 0 {
        acts.push(Act::Flags { uid, add: update.add as u8, remove: update.remove as u8 });
    }
    acts.extend(update.add_keywords.iter().map(|name| Act::Keyword { uid, name: name.clone(), add: true }));
    acts.extend(update.remove_keywords.iter().map(|name| Act::Keyword { uid, name: name.clone(), add: false }));
    acts
}

fn encoded(kind: Kind) -> Vec<u8> {
    frame::encode(&kind.into()).expect("a small frame")
}

/// Others are said again on another connection.
fn is_record(frame: &[u8]) -> bool {
    use prost::Message;
    let frame = proto::Frame::decode(&frame[frame::HEADER_BYTES..]).expect("our own frame");
    matches!(frame.kind, Some(Kind::Record(_)))
}

fn intent(user: &str, place: &Place) -> Vec<u8> {
    encoded(Kind::Intent(proto::Intent { user: user.into(), mailbox: Some(place.mailbox()), peers: None }))
}

pub fn path(name: &str) -> Vec<String> {
    name.split('/').map(str::to_owned).collect()
}

fn described(name: &str, mailbox: &Mailbox) -> proto::Mailbox {
    proto::Mailbox {
        guid: mailbox.guid.to_vec(),
        path: path(name),
        uid_validity: mailbox.uid_validity,
        uid_next: mailbox.uid_next,
        highest_modseq: mailbox.modseq,
    }
}

pub fn hex(guid: &Guid) -> String {
    guid.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Enough of a GUID to know it by: who made it, and its number.
pub fn short(guid: &str) -> &str {
    guid.get(16..).unwrap_or(guid)
}

fn list(uids: &[(u32, String)]) -> String {
    uids.iter().map(|(uid, guid)| format!("{uid}={}", short(guid))).collect::<Vec<_>>().join(" ")
}
