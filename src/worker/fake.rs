//! A storage in memory, and a relay that says what it is told to: for tests of the logic.
use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::rc::Rc;

use super::storage::{
    Body, Existence, Guid, Listed, MessageInfo, Namespace, NewMessage, Result, Status, Storage, Update, MARK_BYTES,
};
use crate::wire::frame::{self, Decoder};
use crate::wire::proto::{self, frame::Kind, UserPeers};

/// With which the INBOX of the only user is born.
pub const INBOX_GUID: Guid = [5; 16];

/// Of all messages.
pub const HASHED_GUID: Guid = [3; 16];

#[derive(Default)]
struct FakeMailbox {
    guid: Guid,
    uid_validity: u32,
    uid_next: u32,
    messages: BTreeMap<u32, String>,
    expunged: HashSet<(u32, String)>,
    mark: Option<[u8; MARK_BYTES]>,
    logs: Vec<Vec<u8>>,
}

enum Step {
    Save(u32, String),
    Expunge(u32),
    Mark(usize, Vec<u8>),
}

#[derive(Default)]
pub struct FakeStorage {
    mailboxes: BTreeMap<String, FakeMailbox>,
    open: Option<String>,
    steps: Vec<Step>,
    reading: Vec<u8>,
    /// Otherwise it is a maildir.
    pub is_dbox: bool,
    /// UIDs of messages whose files have names that clients gave them.
    pub of_clients: HashSet<u32>,
    /// Another worker applies changes of the user.
    pub is_locked: bool,
    pub spans: Vec<proto::Span>,
    pub deleted: Vec<Guid>,
    /// Names, and whether that is new.
    pub subscribed: BTreeMap<String, bool>,
    /// Names of mailboxes that are there and cannot be opened.
    pub half_deleted: HashSet<String>,
    /// Changes that a worker was given before.
    pub again: Vec<u64>,
    /// What the relay knows of mailboxes that became one.
    pub aliases: Vec<proto::Alias>,
    /// What a session that comes upon the next mailbox gives it.
    pub other_guid: Option<Guid>,
    /// Whom the userdb lists; None: it lists nobody.
    pub users: Option<Vec<String>>,
    /// When something was last written to his mail.
    pub written_at: i64,
    /// This server.
    pub me: String,
    /// What the relay keeps.
    pub elsewhere: Vec<proto::Elsewhere>,
    /// Flags and keywords of messages that have some, in all mailboxes.
    pub flags: BTreeMap<u32, (u32, Vec<String>)>,
    /// Ranges whose flags were changed.
    pub flagged: Vec<(u32, u32)>,
    /// Another process saves it to the open mailbox just before that is synced.
    pub arriving: Option<(u32, String)>,
    /// The index lacks it, and the next commit finds its file.
    pub lacking: Option<(u32, String)>,
    /// Why nothing can be committed; and the commits that failed.
    pub commit_error: Option<String>,
    pub commits_failed: u32,
    pub commits: u32,
    /// A message whose file cannot be read.
    pub unreadable: Option<u32>,
    /// Of messages, by UID: what their bodies are instead of their GUIDs.
    pub bodies: BTreeMap<u32, Vec<u8>>,
    /// How often a mailbox was opened, and the GUID of a message read.
    pub opened: usize,
    pub guids_read: usize,
}

fn is_stray(guid: &str) -> bool {
    guid.starts_with("stray")
}

impl FakeStorage {
    pub fn add(&mut self, vname: &str, guid: Guid, uid_validity: u32, messages: &[(u32, &str)]) {
        let messages: BTreeMap<_, _> = messages.iter().map(|(uid, guid)| (*uid, guid.to_string())).collect();
        let uid_next = messages.keys().last().map_or(1, |uid| uid + 1);
        let mailbox = FakeMailbox { guid, uid_validity, uid_next, messages, ..Default::default() };
        self.mailboxes.insert(vname.into(), mailbox);
    }

    pub fn set_logs(&mut self, vname: &str, logs: &[&[u8]]) {
        let logs = logs.iter().map(|log| log.to_vec()).collect();
        self.mailboxes.get_mut(vname).expect("it was added").logs = logs;
    }

    pub fn messages(&self, vname: &str) -> Vec<(u32, String)> {
        self.mailboxes[vname].messages.clone().into_iter().collect()
    }

    pub fn guid(&self, vname: &str) -> Guid {
        self.mailboxes[vname].guid
    }

    pub fn uid_validity(&self, vname: &str) -> u32 {
        self.mailboxes[vname].uid_validity
    }

    /// By a client.
    pub fn expunge_now(&mut self, vname: &str, uid: u32) {
        let Some(mailbox) = self.mailboxes.get_mut(vname) else { return };
        let gone = mailbox.messages.remove(&uid);
        mailbox.expunged.extend(gone.map(|guid| (uid, guid)));
    }

    pub fn forget_expunges(&mut self) {
        self.mailboxes.values_mut().for_each(|mailbox| mailbox.expunged.clear());
    }

    pub fn uid_next(&self, vname: &str) -> u32 {
        self.mailboxes[vname].uid_next
    }

    fn mailbox(&mut self) -> &mut FakeMailbox {
        let vname = self.open.as_ref().expect("a mailbox is open");
        self.mailboxes.get_mut(vname).expect("the open mailbox exists")
    }
}

impl Storage for FakeStorage {
    fn lock_user(&mut self, _user: &str) -> Result<bool> {
        Ok(!self.is_locked)
    }
    fn unlock_user(&mut self) {}
    fn users(&mut self) -> Result<Vec<String>> {
        self.users.clone().ok_or_else(|| "the userdb does not list them".into())
    }
    fn was_written_since(&mut self, _user: &str, since: i64) -> Result<bool> {
        Ok(self.written_at >= since)
    }
    fn user_peers(&self) -> Result<UserPeers> {
        Ok(UserPeers { all: true, ..Default::default() })
    }

    fn open_user(&mut self, _user: &str) -> Result<bool> {
        Ok(true)
    }
    fn close_user(&mut self) {
        self.close();
    }
    fn namespace(&self) -> Result<Namespace> {
        Ok(Namespace { separator: '/', ..Default::default() })
    }
    fn inbox_guid(&self) -> Result<Guid> {
        Ok(INBOX_GUID)
    }
    fn temp_file(&mut self) -> Result<File> {
        Err("no files here".into())
    }
    fn existence(&mut self, vname: &str) -> Result<Existence> {
        let is_there = self.mailboxes.contains_key(vname) || self.half_deleted.contains(vname);
        Ok(if is_there { Existence::Mailbox } else { Existence::None })
    }
    fn find_guid(&mut self, guid: &Guid) -> Result<Option<String>> {
        Ok(self.mailboxes.iter().find(|(_, mailbox)| mailbox.guid == *guid).map(|(vname, _)| vname.clone()))
    }
    fn create(&mut self, vname: &str, _directory: bool, update: &Update) -> Result<bool> {
        if self.mailboxes.contains_key(vname) {
            return Ok(false);
        }
        let other = self.other_guid.take();
        self.add(vname, other.unwrap_or(update.guid), update.uid_validity, &[]);
        // As a maildir that a session comes upon while it is being made.
        Ok(other.is_none())
    }
    fn rename(&mut self, from: &str, to: &str) -> Result<bool> {
        if self.mailboxes.contains_key(to) {
            return Ok(false);
        }
        Ok(self.mailboxes.remove(from).map(|mailbox| self.mailboxes.insert(to.into(), mailbox)).is_some())
    }
    fn delete(&mut self, vname: &str) -> Result<bool> {
        self.half_deleted.remove(vname);
        Ok(self.mailboxes.remove(vname).is_some())
    }
    fn delete_empty(&mut self, vname: &str) -> Result<bool> {
        let is_empty = self.mailboxes.get(vname).is_none_or(|mailbox| mailbox.messages.is_empty());
        Ok(is_empty && self.delete(vname)?)
    }
    fn set_subscribed(&mut self, _vname: &str, _subscribed: bool) -> Result<()> {
        Ok(())
    }
    fn open(&mut self, vname: &str, _readonly: bool) -> Result<bool> {
        self.close();
        let is_whole = self.mailboxes.contains_key(vname) && !self.half_deleted.contains(vname);
        self.open = is_whole.then(|| vname.into());
        self.opened += 1;
        Ok(self.open.is_some())
    }
    fn close(&mut self) {
        self.open = None;
        self.steps.clear();
    }
    fn sync(&mut self) -> Result<()> {
        if let Some((uid, guid)) = self.arriving.take() {
            self.mailbox().messages.insert(uid, guid);
            self.mailbox().uid_next = uid + 1;
        }
        Ok(())
    }
    fn status(&mut self) -> Status {
        let FakeMailbox { guid, uid_validity, uid_next, ref messages, .. } = *self.mailbox();
        Status { guid, uid_validity, uid_next, messages: messages.len() as u32, highest_modseq: 1 }
    }
    fn update(&mut self, update: &Update) -> Result<()> {
        let mailbox = self.mailbox();
        if update.guid != Guid::default() {
            mailbox.guid = update.guid;
        }
        if update.uid_validity != 0 {
            mailbox.uid_validity = update.uid_validity;
        }
        mailbox.uid_next = mailbox.uid_next.max(update.min_uid_next);
        Ok(())
    }
    fn uids(&mut self) -> Result<Vec<u32>> {
        Ok(self.mailbox().messages.keys().copied().collect())
    }
    fn message_guid(&mut self, uid: u32) -> Result<Option<String>> {
        self.guids_read += 1;
        Ok(self.mailbox().messages.get(&uid).cloned())
    }
    fn find_messages(&mut self, guid: &str) -> Result<Vec<u32>> {
        Ok(self.mailbox().messages.iter().filter(|(_, g)| *g == guid).map(|(uid, _)| *uid).collect())
    }
    fn was_expunged(&mut self, uid: u32, guid: &str) -> Result<bool> {
        Ok(self.mailbox().expunged.contains(&(uid, guid.into())))
    }
    fn save(&mut self, message: &NewMessage, _body: Body) -> Result<()> {
        self.steps.push(Step::Save(message.uid, message.guid.into()));
        Ok(())
    }
    fn copy(&mut self, message: &NewMessage, source: &str, source_uid: u32) -> Result<bool> {
        let is_there = self.mailboxes.get(source).and_then(|source| source.messages.get(&source_uid));
        if is_there.is_none_or(|guid| guid != message.guid) {
            return Ok(false);
        }
        self.steps.push(Step::Save(message.uid, message.guid.into()));
        Ok(true)
    }
    fn duplicate(&mut self, uid: u32, new_uid: u32) -> Result<bool> {
        let guid = self.mailbox().messages.get(&uid).cloned();
        Ok(guid.map(|guid| self.steps.push(Step::Save(new_uid, guid))).is_some())
    }
    fn update_flags(&mut self, first_uid: u32, last_uid: u32, _update: &proto::FlagUpdate) -> Result<()> {
        self.flagged.push((first_uid, last_uid));
        Ok(())
    }
    fn expunge(&mut self, first_uid: u32, last_uid: u32) -> Result<()> {
        self.steps.extend((first_uid..=last_uid).map(Step::Expunge));
        Ok(())
    }
    fn commit(&mut self) -> Result<Vec<u32>> {
        let mut saved = Vec::new();
        let steps = std::mem::take(&mut self.steps);
        if let Some(error) = &self.commit_error {
            self.commits_failed += 1;
            return Err(error.clone());
        }
        self.commits += 1;
        if let Some((uid, guid)) = self.lacking.take() {
            self.mailbox().messages.insert(uid, guid);
            self.mailbox().uid_next = uid + 1;
        }
        for step in steps {
            let mailbox = self.mailbox();
            match step {
                Step::Save(uid, guid) => {
                    let uid = uid.max(mailbox.uid_next);
                    mailbox.uid_next = uid + 1;
                    mailbox.messages.insert(uid, guid);
                    saved.push(uid);
                }
                Step::Mark(offset, bytes) => {
                    let mark = mailbox.mark.get_or_insert([0; MARK_BYTES]);
                    mark[offset..offset + bytes.len()].copy_from_slice(&bytes);
                }
                Step::Expunge(uid) => {
                    if let Some(guid) = mailbox.messages.remove(&uid) {
                        mailbox.expunged.insert((uid, guid));
                    }
                }
            }
        }
        Ok(saved)
    }
    fn mailboxes(&mut self, _since: i64) -> Result<Vec<Listed>> {
        let listed = |(vname, mailbox): (&String, &FakeMailbox)| Listed {
            vname: vname.clone(),
            guid: mailbox.guid,
            uid_validity: mailbox.uid_validity,
            ..Default::default()
        };
        Ok(self.mailboxes.iter().map(listed).collect())
    }
    fn subscribed(&mut self, _since: i64) -> Result<Vec<Listed>> {
        let listed = |(vname, changed): (&String, &bool)| Listed {
            vname: vname.clone(),
            subscription_changed: *changed,
            ..Default::default()
        };
        Ok(self.subscribed.iter().map(listed).collect())
    }
    fn deletions(&mut self, guid: &Guid) -> Result<u32> {
        Ok(self.deleted.iter().filter(|deleted| *deleted == guid).count() as u32)
    }
    fn log_files(&mut self) -> Result<Vec<Vec<u8>>> {
        Ok(self.mailbox().logs.clone())
    }
    fn message_info(&mut self, uid: u32) -> Result<Option<MessageInfo>> {
        if self.unreadable == Some(uid) {
            return Err("its file cannot be read".into());
        }
        let info = |guid: &String| MessageInfo {
            guid: guid.clone(),
            guid_128: HASHED_GUID,
            received_date: 7,
            save_date: 8,
            size: 9,
            is_stray: is_stray(guid),
        };
        Ok(self.mailbox().messages.get(&uid).map(info))
    }
    fn message_flags(&mut self, uid: u32) -> Result<Option<(u32, Vec<String>)>> {
        Ok(self.mailbox().messages.contains_key(&uid).then(|| self.flags.get(&uid).cloned().unwrap_or_default()))
    }
    fn is_torn_when_killed(&self) -> bool {
        !self.is_dbox
    }
    fn is_saved_alone(&mut self, _guid: &str) -> Result<bool> {
        Ok(false)
    }
    fn may_be_ours(&mut self, uid: u32, _guid: &str) -> Result<bool> {
        Ok(!self.of_clients.contains(&uid))
    }
    fn stray(&mut self, guid: &str) -> Result<Option<u32>> {
        let name = format!("stray {guid}");
        Ok(self.mailbox().messages.iter().find(|(_, guid)| **guid == name).map(|(uid, _)| *uid))
    }
    fn adopt(&mut self, uid: u32, guid: &str) -> Result<()> {
        self.mailbox().messages.insert(uid, guid.into());
        Ok(())
    }
    fn mark(&mut self) -> Result<[u8; MARK_BYTES]> {
        Ok(self.mailbox().mark.unwrap_or([0; MARK_BYTES]))
    }
    fn write_mark(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.steps.push(Step::Mark(offset, bytes.to_vec()));
        Ok(())
    }
    /// A body is the message's GUID, mostly.
    fn body_open(&mut self, uid: u32, guid: &str) -> Result<bool> {
        let is_there = self.mailbox().messages.get(&uid).is_some_and(|there| there == guid);
        let body = self.bodies.get(&uid).cloned().unwrap_or_else(|| guid.into());
        self.reading = if is_there { body } else { Vec::new() };
        Ok(is_there)
    }
    fn body_read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let length = buffer.len().min(self.reading.len());
        buffer[..length].copy_from_slice(&self.reading[..length]);
        self.reading.drain(..length);
        Ok(length)
    }
    fn body_close(&mut self) {
        self.reading.clear();
    }
    fn applying(&mut self, _changes: &[proto::SeqOf]) {}
    fn take_spans(&mut self) -> Vec<proto::Span> {
        std::mem::take(&mut self.spans)
    }
}

/// The relay's side of a connection: says its lines, keeps what it hears.
#[derive(Default)]
pub struct Script {
    lines: io::Cursor<Vec<u8>>,
    heard: Rc<RefCell<Decoder>>,
}

impl Script {
    /// What is said to it, as often as one looks.
    pub fn ear(&self) -> impl FnMut() -> Option<Kind> {
        let heard = self.heard.clone();
        move || heard.borrow_mut().next().expect("a frame").map(|frame| frame.kind.expect("a kind that is known"))
    }
}

impl Read for Script {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.lines.read(buffer)
    }
}

impl Write for Script {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.heard.borrow_mut().push(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Answers the body request `id`: it is gone.
pub fn gone(id: u64) -> Script {
    let chunk = proto::BodyChunk { id, last: true, gone: true, ..Default::default() };
    let frame = frame::encode(&proto::Frame { kind: Some(Kind::BodyChunk(chunk)) }).expect("a small frame");
    Script { lines: io::Cursor::new(frame), ..Default::default() }
}
