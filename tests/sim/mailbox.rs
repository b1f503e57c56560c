//! A model of Dovecot's mailboxes (as sdbox has them) of the users of one server. It follows IMAP's rules: UIDs rise, a UID
//! below UIDNEXT is never given. Each commit is written to a log as Dovecot writes dovecot.index.log.

use std::collections::{BTreeMap, BTreeSet};

use dovetail::capture::{Written, TAIL_MAX};
use dovetail::worker::storage::{Guid, MARK_BYTES};

/// A log that is longer is rotated before the next commit.
const LOG_BYTES_MAX: usize = 16_000;
/// Where records begin.
const LOG_HEADER_BYTES: u16 = 40;

mod kind {
    pub const APPEND: u32 = 0x0000_0002;
    pub const FLAG_UPDATE: u32 = 0x0000_0004;
    pub const HEADER_UPDATE: u32 = 0x0000_0020;
    pub const EXT_INTRO: u32 = 0x0000_0040;
    pub const EXT_HDR_UPDATE: u32 = 0x0000_0100;
    pub const EXT_REC_UPDATE: u32 = 0x0000_0200;
    pub const KEYWORD_UPDATE: u32 = 0x0000_0400;
    pub const EXPUNGE_GUID: u32 = 0x0000_2000 | 0x0000_cd90;
    pub const BOUNDARY: u32 = 0x0008_0000;
    pub const EXTERNAL: u32 = 0x1000_0000;
    pub const SYNC: u32 = 0x2000_0000;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub guid: String,
    pub flags: u8,
    pub keywords: BTreeSet<String>,
    pub received_date: i64,
    pub save_date: i64,
    pub body: Vec<u8>,
}

/// What a transaction does to messages.
#[derive(Clone, Debug)]
pub enum Act {
    /// At this UID if it is free; 0: the next one.
    Save(u32, Message),
    Flags {
        uid: u32,
        add: u8,
        remove: u8,
    },
    Keyword {
        uid: u32,
        name: String,
        add: bool,
    },
    Expunge(u32),
    Mark(usize, Vec<u8>),
}

/// The two logs that Dovecot keeps.
#[derive(Clone, Default)]
struct Log {
    index_id: u32,
    seq: u32,
    previous: Option<Vec<u8>>,
    current: Vec<u8>,
}

impl Log {
    fn new(index_id: u32) -> Log {
        Log { index_id, seq: 2, previous: None, current: header(index_id, 2, 0, 0) }
    }

    /// Where it was written: the file's number, from, to.
    fn write(&mut self, records: &[Vec<u8>]) -> (u32, u64, u64) {
        if self.current.len() > LOG_BYTES_MAX {
            let new = header(self.index_id, self.seq + 1, self.seq, self.current.len() as u32);
            self.previous = Some(std::mem::replace(&mut self.current, new));
            self.seq += 1;
        }
        let begin = self.current.len() as u64;
        if records.len() > 1 {
            let size = 12 + records.iter().map(Vec::len).sum::<usize>();
            self.current.extend(record(kind::BOUNDARY, &(size as u32).to_le_bytes()));
        }
        records.iter().for_each(|record| self.current.extend(record));
        (self.seq, begin, self.current.len() as u64)
    }

    /// The file before this one, and where it ended.
    fn before(&self) -> (u32, u64) {
        match &self.previous {
            Some(previous) => (self.seq - 1, previous.len() as u64),
            None => (0, 0),
        }
    }
}

fn header(index_id: u32, seq: u32, previous_seq: u32, previous_end: u32) -> Vec<u8> {
    let mut bytes = vec![1, 3];
    bytes.extend(LOG_HEADER_BYTES.to_le_bytes());
    for number in [index_id, seq, previous_seq, previous_end, index_id] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(0u64.to_le_bytes());
    bytes.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    bytes
}

fn record(kind: u32, contents: &[u8]) -> Vec<u8> {
    let mut contents = contents.to_vec();
    contents.resize(contents.len().next_multiple_of(4), 0);
    // mail_index_uint32_to_offset()
    let size = (8 + contents.len() as u32) >> 2;
    let mut bytes: Vec<u8> = [21, 14, 7, 0].iter().map(|shift| 0x80 | (size >> shift & 0x7f) as u8).collect();
    bytes.extend(kind.to_le_bytes());
    bytes.extend(contents);
    bytes
}

fn header_update(offset: u16, number: u32) -> Vec<u8> {
    let mut contents = offset.to_le_bytes().to_vec();
    contents.extend(4u16.to_le_bytes());
    contents.extend(number.to_le_bytes());
    record(kind::HEADER_UPDATE | kind::EXTERNAL, &contents)
}

/// What a commit wrote, and what became of it.
pub struct Committed {
    pub written: Vec<Written>,
    /// UIDs of the saved messages.
    pub saved: Vec<u32>,
    /// What was expunged.
    pub expunged: Vec<(u32, String)>,
}

#[derive(Clone)]
pub struct Mailbox {
    pub guid: Guid,
    pub uid_validity: u32,
    pub uid_next: u32,
    pub modseq: u64,
    pub messages: BTreeMap<u32, Message>,
    /// As they were when they went.
    pub expunged: BTreeMap<u32, Message>,
    pub mark: [u8; MARK_BYTES],
    log: Log,
}

impl Mailbox {
    fn new(guid: Guid, uid_validity: u32, index_id: u32) -> Mailbox {
        let mut log = Log::new(index_id);
        // With the file itself: of no commit.
        log.write(&[padding(64)]);
        Mailbox {
            guid,
            uid_validity,
            uid_next: 1,
            modseq: 1,
            messages: BTreeMap::new(),
            expunged: BTreeMap::new(),
            mark: [0; MARK_BYTES],
            log,
        }
    }

    /// What sdbox writes to a new mailbox.
    fn begin(&mut self, user: &str) -> Vec<Written> {
        let first = [header_update(24, self.uid_validity), padding(80)];
        vec![self.written(user, &first, 0, false), self.written(user, &[padding(56)], 0, false)]
    }

    /// The oldest first.
    pub fn log_files(&self) -> Vec<Vec<u8>> {
        self.log.previous.iter().chain([&self.log.current]).cloned().collect()
    }

    fn written(&mut self, user: &str, records: &[Vec<u8>], appends: u32, adds_or_changes: bool) -> Written {
        let (log_seq, begin, end) = self.log.write(records);
        self.modseq += 1;
        let (prev_log_seq, prev_log_end) = self.log.before();
        let tail_size = TAIL_MAX.min(end as usize);
        let mut tail = [0; TAIL_MAX];
        tail[..tail_size].copy_from_slice(&self.log.current[end as usize - tail_size..end as usize]);
        Written {
            user: user.into(),
            private_user: None,
            mailbox_guid: self.guid,
            old_mailbox_guid: Guid::default(),
            index_id: self.log.index_id,
            log_seq,
            begin,
            end,
            prev_log_seq,
            prev_log_end,
            tail,
            tail_size,
            appends,
            adds_or_changes,
            expunges: false,
        }
    }

    /// One transaction, and the sync behind it that carries its expunges out.
    pub fn commit(&mut self, user: &str, acts: Vec<Act>, is_sync: bool) -> Committed {
        let sync = if is_sync { kind::SYNC } else { 0 };
        let mut committed = Committed { written: Vec::new(), saved: Vec::new(), expunged: Vec::new() };
        let (mut appends, mut requests, mut executed) = (Vec::new(), Vec::new(), Vec::new());
        let mut records = Vec::new();
        let mut changes = false;
        for act in acts {
            match act {
                Act::Save(uid, message) => {
                    let uid = uid.max(self.uid_next);
                    self.uid_next = uid + 1;
                    appends.extend(uid.to_le_bytes());
                    appends.extend([message.flags, 0, 0, 0]);
                    for name in &message.keywords {
                        records.push(keyword(name, uid, true, sync | kind::EXTERNAL));
                    }
                    self.messages.insert(uid, message);
                    committed.saved.push(uid);
                }
                Act::Flags { uid, add, remove } => {
                    let Some(message) = self.message_or_gone_mut(uid) else { continue };
                    let flags = message.flags & !remove | add;
                    // Dovecot writes nothing that changes nothing.
                    if std::mem::replace(&mut message.flags, flags) == flags {
                        continue;
                    }
                    let mut contents = [uid.to_le_bytes(), uid.to_le_bytes()].concat();
                    contents.extend([add, remove, 0, 0]);
                    records.push(record(kind::FLAG_UPDATE | sync, &contents));
                    changes = true;
                }
                Act::Keyword { uid, name, add } => {
                    let Some(message) = self.message_or_gone_mut(uid) else { continue };
                    let is_changed = match add {
                        true => message.keywords.insert(name.clone()),
                        false => message.keywords.remove(&name),
                    };
                    if is_changed {
                        records.push(keyword(&name, uid, add, sync));
                        changes = true;
                    }
                }
                Act::Expunge(uid) => {
                    let Some(message) = self.message_or_gone_mut(uid) else { continue };
                    requests.extend(uid.to_le_bytes());
                    requests.extend(hashed(&message.guid));
                    let Some(message) = self.messages.remove(&uid) else { continue };
                    executed.extend(uid.to_le_bytes());
                    executed.extend([0; 16]);
                    self.expunged.insert(uid, message.clone());
                    committed.expunged.push((uid, message.guid));
                }
                Act::Mark(offset, bytes) => {
                    self.mark[offset..offset + bytes.len()].copy_from_slice(&bytes);
                    records.push(intro());
                    let mut contents = (offset as u16).to_le_bytes().to_vec();
                    contents.extend((bytes.len() as u16).to_le_bytes());
                    contents.extend(&bytes);
                    records.push(record(kind::EXT_HDR_UPDATE | sync, &contents));
                }
            }
        }
        let saved = committed.saved.len() as u32;
        if !appends.is_empty() {
            records.insert(0, record(kind::APPEND | kind::EXTERNAL | sync, &appends));
            records.push(padding(40));
        }
        if !requests.is_empty() {
            records.push(record(kind::EXPUNGE_GUID | sync, &requests));
        }
        if !records.is_empty() {
            committed.written.push(self.written(user, &records, saved, saved > 0 || changes));
        }
        if !executed.is_empty() {
            let done = record(kind::EXPUNGE_GUID | kind::EXTERNAL, &executed);
            committed.written.push(self.written(user, &[done], 0, false));
        }
        committed
    }

    /// A session may not have heard yet that a message is gone. Then Dovecot writes what it does to it, which does nothing.
    pub fn message_or_gone(&self, uid: u32) -> Option<&Message> {
        self.messages.get(&uid).or(self.expunged.get(&uid))
    }

    fn message_or_gone_mut(&mut self, uid: u32) -> Option<&mut Message> {
        self.messages.get_mut(&uid).or(self.expunged.get_mut(&uid))
    }

    pub fn set_uid_validity(&mut self, user: &str, uid_validity: u32) -> Written {
        self.uid_validity = uid_validity;
        self.written(user, &[header_update(24, uid_validity)], 0, false)
    }

    pub fn set_uid_next(&mut self, user: &str, uid_next: u32) -> Written {
        self.uid_next = self.uid_next.max(uid_next);
        self.written(user, &[header_update(28, self.uid_next)], 0, false)
    }

    /// The commit belongs to the old GUID's log; what follows says that it has another one.
    pub fn set_guid(&mut self, user: &str, guid: Guid) -> Vec<Written> {
        let old = self.guid;
        let committed = self.written(user, &[intro()], 0, false);
        self.guid = guid;
        let mut renamed = committed.clone();
        renamed.mailbox_guid = guid;
        renamed.old_mailbox_guid = old;
        (renamed.log_seq, renamed.begin, renamed.end) = (0, 0, 0);
        (renamed.prev_log_seq, renamed.prev_log_end, renamed.tail_size) = (0, 0, 0);
        vec![committed, renamed]
    }
}

/// What other extensions keep of messages, so many bytes.
fn padding(bytes: usize) -> Vec<u8> {
    record(kind::EXT_REC_UPDATE | kind::EXTERNAL, &vec![0; bytes])
}

/// Introduces our header extension.
fn intro() -> Vec<u8> {
    let name = b"dovetail";
    let mut contents = u32::MAX.to_le_bytes().to_vec();
    contents.extend(0u32.to_le_bytes());
    contents.extend((MARK_BYTES as u32).to_le_bytes());
    contents.extend([0u16, 1, 0, name.len() as u16].iter().flat_map(|number| number.to_le_bytes()));
    contents.extend(name);
    record(kind::EXT_INTRO, &contents)
}

fn keyword(name: &str, uid: u32, add: bool, flags: u32) -> Vec<u8> {
    let mut contents = vec![if add { 0 } else { 1 }, 0];
    contents.extend((name.len() as u16).to_le_bytes());
    contents.extend(name.as_bytes());
    contents.resize(contents.len().next_multiple_of(4), 0);
    contents.extend([uid.to_le_bytes(), uid.to_le_bytes()].concat());
    record(kind::KEYWORD_UPDATE | flags, &contents)
}

/// As mail_generate_guid_128_hash() makes it of a GUID that is one of 128 bits itself.
pub fn hashed(guid: &str) -> Guid {
    let mut bytes = Guid::default();
    for (byte, hex) in bytes.iter_mut().zip(guid.as_bytes().chunks(2)) {
        *byte = std::str::from_utf8(hex).ok().and_then(|hex| u8::from_str_radix(hex, 16).ok()).unwrap_or(0);
    }
    bytes
}

/// The mailboxes of one user.
#[derive(Clone, Default)]
pub struct User {
    pub mailboxes: BTreeMap<String, Mailbox>,
    pub subscribed: BTreeSet<String>,
    /// Dovecot's mailbox log: GUIDs of mailboxes that were deleted, names whose subscription was changed and when.
    pub deleted: Vec<Guid>,
    pub subscription_log: Vec<(String, i64)>,
    last_uid_validity: u32,
    created: u32,
}

impl User {
    pub fn find(&self, guid: &Guid) -> Option<&String> {
        self.mailboxes.iter().find(|(_, mailbox)| mailbox.guid == *guid).map(|(name, _)| name)
    }

    /// Counted on from the time of the first.
    pub fn next_uid_validity(&mut self, first: u32) -> u32 {
        self.last_uid_validity = if self.last_uid_validity == 0 { first } else { self.last_uid_validity + 1 };
        self.last_uid_validity
    }

    /// What was written to the new mailbox; None if it exists.
    pub fn create(
        &mut self,
        user: &str,
        name: &str,
        guid: Guid,
        uid_validity: u32,
        now_secs: u32,
    ) -> Option<Vec<Written>> {
        if self.mailboxes.contains_key(name) {
            return None;
        }
        self.created += 1;
        let mut mailbox = Mailbox::new(guid, uid_validity, now_secs + self.created);
        let written = mailbox.begin(user);
        self.mailboxes.insert(name.into(), mailbox);
        Some(written)
    }

    /// With what is below it. False if `from` does not exist or `to` does.
    pub fn rename(&mut self, from: &str, to: &str) -> bool {
        let below = format!("{from}/");
        if !self.mailboxes.contains_key(from) || self.mailboxes.contains_key(to) || to.starts_with(&below) {
            return false;
        }
        let names: Vec<String> =
            self.mailboxes.keys().filter(|name| *name == from || name.starts_with(&below)).cloned().collect();
        for name in names {
            if let Some(mailbox) = self.mailboxes.remove(&name) {
                self.mailboxes.insert(format!("{to}{}", &name[from.len()..]), mailbox);
            }
        }
        true
    }

    pub fn delete(&mut self, name: &str) -> Option<Mailbox> {
        let mailbox = self.mailboxes.remove(name)?;
        self.deleted.push(mailbox.guid);
        Some(mailbox)
    }

    pub fn subscribe(&mut self, name: &str, subscribed: bool, now_secs: i64) {
        match subscribed {
            true => self.subscribed.insert(name.into()),
            false => self.subscribed.remove(name),
        };
        self.subscription_log.push((name.into(), now_secs));
    }
}
