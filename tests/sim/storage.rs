//! The storage that the real worker code works on: the model of this server's mailboxes. At its commits and syncs clients may
//! come in between, and the worker may be killed.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write as _;
use std::rc::Rc;

use dovetail::wire::proto;
use dovetail::worker::storage::{
    Body, Existence, Guid, Listed, MessageInfo, Namespace, NewMessage, Result, Status, Storage, Update, MARK_BYTES,
};

use super::local::Local;
use super::mailbox::{hashed, Act, Mailbox, Message, User};

/// See the module.
pub struct ModelStorage {
    local: Rc<RefCell<Local>>,
    user: Option<String>,
    open: Option<String>,
    acts: Vec<Act>,
    applying: Vec<proto::SeqOf>,
    spans: Vec<proto::Span>,
    /// The last log that was told of, by mailbox.
    last_logs: Vec<(Guid, u32)>,
    has_lock: bool,
    body: Vec<u8>,
    /// It was killed: nothing works any more.
    pub is_dead: bool,
}

const KILLED: &str = "this worker was killed";

impl ModelStorage {
    pub fn new(local: Rc<RefCell<Local>>) -> ModelStorage {
        ModelStorage {
            local,
            user: None,
            open: None,
            acts: Vec::new(),
            applying: Vec::new(),
            spans: Vec::new(),
            last_logs: Vec::new(),
            has_lock: false,
            body: Vec::new(),
            is_dead: false,
        }
    }

    /// A moment in which others may act, or this process may be killed.
    fn moment(&mut self) -> Result<()> {
        self.alive()?;
        if self.local.borrow_mut().is_worker_killed_now() {
            self.is_dead = true;
            return Err(KILLED.into());
        }
        self.local.borrow_mut().act_in_between();
        Ok(())
    }

    fn alive(&self) -> Result<()> {
        match self.is_dead {
            true => Err(KILLED.into()),
            false => Ok(()),
        }
    }

    fn user<T>(&self, look: impl FnOnce(&mut User) -> T) -> Result<T> {
        self.alive()?;
        let user = self.user.as_ref().ok_or("no user is open")?;
        Ok(look(self.local.borrow_mut().user(user)))
    }

    fn mailbox<T>(&self, look: impl FnOnce(&mut Mailbox) -> T) -> Result<T> {
        let name = self.open.as_ref().ok_or("no mailbox is open")?;
        self.user(|user| user.mailboxes.get_mut(name).map(look))?.ok_or_else(|| "the mailbox was deleted".into())
    }

    fn note(&mut self, written: Vec<dovetail::capture::Written>) {
        for mut written in written {
            let last = self.last_logs.iter_mut().find(|(guid, _)| *guid == written.mailbox_guid);
            match last {
                Some((_, seq)) if *seq == written.log_seq => (written.prev_log_seq, written.prev_log_end) = (0, 0),
                Some((_, seq)) => *seq = written.log_seq,
                None => self.last_logs.push((written.mailbox_guid, written.log_seq)),
            }
            // It is we who write.
            (written.adds_or_changes, written.expunges, written.appends) = (false, false, 0);
            self.spans.push(proto::Span { applied: self.applying.clone(), ..written.to_span() });
        }
    }

    fn message(&self, uid: u32) -> Result<Option<Message>> {
        self.mailbox(|mailbox| mailbox.messages.get(&uid).cloned())
    }

    fn uids_with(&self, is_it: impl Fn(&Message) -> bool) -> Result<Vec<u32>> {
        self.mailbox(|mailbox| {
            mailbox.messages.iter().filter(|(_, message)| is_it(message)).map(|(uid, _)| *uid).collect()
        })
    }
}

fn new_message(message: &NewMessage, body: Vec<u8>, now_secs: i64) -> Message {
    Message {
        guid: message.guid.into(),
        flags: message.flags as u8 & 0x1f,
        keywords: message.keywords.iter().cloned().collect(),
        received_date: message.received_date,
        save_date: if message.save_date == 0 { now_secs } else { message.save_date },
        body,
    }
}

impl Storage for ModelStorage {
    fn lock_user(&mut self, user: &str) -> Result<bool> {
        self.alive()?;
        self.has_lock = self.local.borrow_mut().lock(user);
        self.user = None;
        Ok(self.has_lock)
    }
    fn unlock_user(&mut self) {
        if std::mem::take(&mut self.has_lock) {
            self.local.borrow_mut().unlock();
        }
    }
    fn open_user(&mut self, user: &str) -> Result<bool> {
        self.alive()?;
        self.user = Some(user.into());
        self.local.borrow_mut().user(user);
        Ok(true)
    }
    fn close_user(&mut self) {
        self.close();
        self.last_logs.clear();
        self.user = None;
    }
    fn users(&mut self) -> Result<Vec<String>> {
        Ok(vec![])
    }
    fn was_written_since(&mut self, _user: &str, _since: i64) -> Result<bool> {
        Ok(false)
    }
    fn user_peers(&self) -> Result<proto::UserPeers> {
        Ok(proto::UserPeers { all: true, ..Default::default() })
    }
    fn namespace(&self) -> Result<Namespace> {
        Ok(Namespace { separator: '/', ..Default::default() })
    }
    fn inbox_guid(&self) -> Result<Guid> {
        Ok(Local::inbox_guid(self.user.as_deref().unwrap_or_default()))
    }
    fn temp_file(&mut self) -> Result<File> {
        Err("bodies are small here".into())
    }
    fn existence(&mut self, vname: &str) -> Result<Existence> {
        let is_there = self.user(|user| user.mailboxes.contains_key(vname))?;
        // It is made when it is opened.
        Ok(if is_there || vname == "INBOX" { Existence::Mailbox } else { Existence::None })
    }
    fn find_guid(&mut self, guid: &Guid) -> Result<Option<String>> {
        self.user(|user| user.find(guid).cloned())
    }
    fn create(&mut self, vname: &str, _directory: bool, update: &Update) -> Result<bool> {
        self.moment()?;
        let now_secs = self.local.borrow().now_secs();
        let guid = match update.guid {
            guid if guid == Guid::default() => self.local.borrow_mut().new_guid(),
            guid => guid,
        };
        let name = self.user.clone().unwrap_or_default();
        let uid_validity = match update.uid_validity {
            0 => self.local.borrow_mut().next_uid_validity(&name),
            given => given,
        };
        let written = self.user(|user| user.create(&name, vname, guid, uid_validity, now_secs))?;
        let is_new = written.is_some();
        self.note(written.unwrap_or_default());
        Ok(is_new)
    }
    fn rename(&mut self, from: &str, to: &str) -> Result<bool> {
        self.moment()?;
        self.user(|user| user.rename(from, to))
    }
    fn delete(&mut self, vname: &str) -> Result<bool> {
        self.moment()?;
        let deleted = self.user(|user| user.delete(vname))?;
        if let (Some(mailbox), Some(user)) = (&deleted, &self.user) {
            self.local.borrow().ledger.borrow_mut().is_deleted(user, mailbox);
        }
        Ok(deleted.is_some())
    }
    fn delete_empty(&mut self, vname: &str) -> Result<bool> {
        let is_empty = self.user(|user| user.mailboxes.get(vname).is_none_or(|mailbox| mailbox.messages.is_empty()))?;
        Ok(is_empty && self.delete(vname)?)
    }
    fn set_subscribed(&mut self, vname: &str, subscribed: bool) -> Result<()> {
        let now_secs = self.local.borrow().now_secs();
        self.user(|user| user.subscribe(vname, subscribed, now_secs.into()))
    }
    fn open(&mut self, vname: &str, _readonly: bool) -> Result<bool> {
        self.close();
        self.moment()?;
        if vname == "INBOX" {
            let user = self.user.clone().unwrap_or_default();
            let written = self.local.borrow_mut().make_inbox(&user);
            self.note(written.unwrap_or_default());
        }
        let is_there = self.user(|user| user.mailboxes.contains_key(vname))?;
        self.open = is_there.then(|| vname.into());
        Ok(is_there)
    }
    fn close(&mut self) {
        self.open = None;
        self.acts.clear();
    }
    fn sync(&mut self) -> Result<()> {
        self.moment()
    }
    fn status(&mut self) -> Status {
        let status = |mailbox: &mut Mailbox| Status {
            guid: mailbox.guid,
            uid_validity: mailbox.uid_validity,
            uid_next: mailbox.uid_next,
            messages: mailbox.messages.len() as u32,
            highest_modseq: mailbox.modseq,
        };
        self.mailbox(status).unwrap_or_default()
    }
    fn update(&mut self, update: &Update) -> Result<()> {
        self.moment()?;
        let user = self.user.clone().unwrap_or_default();
        let update = *update;
        let made_anew = self.find_guid(&update.guid)?.is_none() && !self.was_deleted(&update.guid)?;
        let written = self.mailbox(|mailbox| {
            let mut written = Vec::new();
            if update.guid != Guid::default() && update.guid != mailbox.guid {
                written.extend(mailbox.set_guid(&user, update.guid));
            }
            if update.uid_validity != 0 {
                written.push(mailbox.set_uid_validity(&user, update.uid_validity));
            }
            if update.min_uid_next > mailbox.uid_next {
                written.push(mailbox.set_uid_next(&user, update.min_uid_next));
            }
            mailbox.modseq = mailbox.modseq.max(update.min_highest_modseq);
            written
        })?;
        self.note(written);
        // As in host/worker.rs.
        let renamed = self.spans.iter_mut().filter(|span| !span.old_mailbox_guid.is_empty());
        renamed.filter(|span| span.mailbox_guid == update.guid).for_each(|span| span.untold = made_anew);
        Ok(())
    }
    fn uids(&mut self) -> Result<Vec<u32>> {
        self.mailbox(|mailbox| mailbox.messages.keys().copied().collect())
    }
    fn message_guid(&mut self, uid: u32) -> Result<Option<String>> {
        Ok(self.message(uid)?.map(|message| message.guid))
    }
    fn find_messages(&mut self, guid: &str) -> Result<Vec<u32>> {
        self.uids_with(|message| message.guid == guid)
    }
    fn was_expunged(&mut self, uid: u32, guid: &str) -> Result<bool> {
        self.mailbox(|mailbox| mailbox.expunged.get(&uid).is_some_and(|message| message.guid == guid))
    }
    fn save(&mut self, message: &NewMessage, body: Body) -> Result<()> {
        self.alive()?;
        let Body::Bytes(bytes) = body else { return Err("bodies are small here".into()) };
        let now_secs = self.local.borrow().now_secs();
        self.acts.push(Act::Save(message.uid, new_message(message, bytes.to_vec(), now_secs.into())));
        Ok(())
    }
    fn copy(&mut self, message: &NewMessage, source: &str, source_uid: u32) -> Result<bool> {
        let found = self.user(|user| {
            let mailbox = user.mailboxes.get(source)?;
            let at_uid = mailbox.messages.get(&source_uid).filter(|found| found.guid == message.guid);
            at_uid.or_else(|| mailbox.messages.values().find(|found| found.guid == message.guid)).cloned()
        })?;
        let Some(found) = found else { return Ok(false) };
        let now_secs = self.local.borrow().now_secs();
        self.acts.push(Act::Save(message.uid, new_message(message, found.body, now_secs.into())));
        Ok(true)
    }
    fn duplicate(&mut self, uid: u32, new_uid: u32) -> Result<bool> {
        let found = self.message(uid)?;
        Ok(found.map(|message| self.acts.push(Act::Save(new_uid, message))).is_some())
    }
    fn update_flags(&mut self, first_uid: u32, last_uid: u32, update: &proto::FlagUpdate) -> Result<()> {
        let uids = self.mailbox(|mailbox| -> Vec<u32> {
            let in_order = first_uid <= last_uid;
            let range = in_order.then(|| mailbox.messages.range(first_uid..=last_uid));
            range.into_iter().flatten().map(|(uid, _)| *uid).collect()
        })?;
        for uid in uids {
            let (add, remove) = (update.add as u8 & 0x1f, update.remove as u8 & 0x1f);
            if add | remove != 0 {
                // Two updates, as in worker.c: what is removed behind what is added.
                self.acts.push(Act::Flags { uid, add: add & !remove, remove });
            }
            for name in &update.add_keywords {
                self.acts.push(Act::Keyword { uid, name: name.clone(), add: true });
            }
            for name in &update.remove_keywords {
                self.acts.push(Act::Keyword { uid, name: name.clone(), add: false });
            }
        }
        Ok(())
    }
    fn expunge(&mut self, first_uid: u32, last_uid: u32) -> Result<()> {
        let uids = self.uids()?;
        let uids = uids.into_iter().filter(|uid| (first_uid..=last_uid).contains(uid));
        self.acts.extend(uids.map(Act::Expunge));
        Ok(())
    }
    fn commit(&mut self) -> Result<Vec<u32>> {
        self.moment()?;
        self.local.borrow_mut().check_disk()?;
        let acts = std::mem::take(&mut self.acts);
        if acts.is_empty() {
            return Ok(Vec::new());
        }
        let user = self.user.clone().unwrap_or_default();
        let committed = self.mailbox(|mailbox| mailbox.commit(&user, acts, true))?;
        let name = self.open.clone().unwrap_or_default();
        self.local.borrow_mut().is_committed(&user, &name, "the worker", &committed, &self.applying);
        self.note(committed.written);
        Ok(committed.saved)
    }
    fn mailboxes(&mut self, since: i64) -> Result<Vec<Listed>> {
        self.moment()?;
        self.user(|user| {
            let listed = |(name, mailbox): (&String, &Mailbox)| Listed {
                vname: name.clone(),
                guid: mailbox.guid,
                uid_validity: mailbox.uid_validity,
                subscription_changed: user.subscription_log.iter().any(|(of, at)| of == name && *at >= since),
            };
            user.mailboxes.iter().map(listed).collect()
        })
    }
    fn subscribed(&mut self, since: i64) -> Result<Vec<Listed>> {
        self.user(|user| {
            let listed = |name: &String| Listed {
                vname: name.clone(),
                subscription_changed: user.subscription_log.iter().any(|(of, at)| of == name && *at >= since),
                ..Default::default()
            };
            user.subscribed.iter().map(listed).collect()
        })
    }
    fn deletions(&mut self, guid: &Guid) -> Result<u32> {
        self.user(|user| user.deleted.iter().filter(|deleted| *deleted == guid).count() as u32)
    }
    fn log_files(&mut self) -> Result<Vec<Vec<u8>>> {
        self.mailbox(|mailbox| mailbox.log_files())
    }
    fn message_info(&mut self, uid: u32) -> Result<Option<MessageInfo>> {
        Ok(self.message(uid)?.map(|message| MessageInfo {
            guid_128: hashed(&message.guid),
            guid: message.guid,
            received_date: message.received_date,
            save_date: message.save_date,
            size: message.body.len() as u64,
            is_stray: false,
        }))
    }
    fn message_flags(&mut self, uid: u32) -> Result<Option<(u32, Vec<String>)>> {
        Ok(self.message(uid)?.map(|message| (message.flags.into(), message.keywords.into_iter().collect())))
    }
    fn is_torn_when_killed(&self) -> bool {
        false
    }
    fn is_saved_alone(&mut self, _guid: &str) -> Result<bool> {
        Ok(false)
    }
    fn may_be_ours(&mut self, _uid: u32, _guid: &str) -> Result<bool> {
        Ok(true)
    }
    fn stray(&mut self, _guid: &str) -> Result<Option<u32>> {
        Ok(None)
    }
    fn adopt(&mut self, _uid: u32, _guid: &str) -> Result<()> {
        Err("there are no strays in a dbox".into())
    }
    fn mark(&mut self) -> Result<[u8; MARK_BYTES]> {
        self.mailbox(|mailbox| mailbox.mark)
    }
    fn write_mark(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.alive()?;
        self.acts.push(Act::Mark(offset, bytes.to_vec()));
        Ok(())
    }
    fn body_open(&mut self, uid: u32, guid: &str) -> Result<bool> {
        let found = self.message(uid)?.filter(|message| message.guid == guid);
        self.body = found.as_ref().map(|message| message.body.clone()).unwrap_or_default();
        Ok(found.is_some())
    }
    fn body_read(&mut self, mut buffer: &mut [u8]) -> Result<usize> {
        let length = buffer.write(&self.body).map_err(|error| error.to_string())?;
        self.body.drain(..length);
        Ok(length)
    }
    fn body_close(&mut self) {
        self.body.clear();
    }
    fn applying(&mut self, changes: &[proto::SeqOf]) {
        self.applying = changes.to_vec();
    }
    fn take_spans(&mut self) -> Vec<proto::Span> {
        std::mem::take(&mut self.spans)
    }
}
