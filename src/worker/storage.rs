//! What the worker needs of a mail storage: one user and one mailbox open at a time.
//!
//! Errors are sentences for people, without the user's and mailbox's name, which the caller adds.
use std::fs::File;

use crate::wire::proto::{self, UserPeers};

/// The reason of a failure, for people.
pub type Result<T> = std::result::Result<T, String>;

/// 16 bytes, of a mailbox.
pub type Guid = [u8; 16];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existence {
    None,
    /// `\NoSelect`: exists for its children only.
    Directory,
    Mailbox,
}

/// State of the open mailbox as of the last sync.
#[derive(Clone, Copy, Debug, Default)]
pub struct Status {
    pub guid: Guid,
    pub uid_validity: u32,
    pub uid_next: u32,
    pub messages: u32,
    pub highest_modseq: u64,
}

/// What to set of a mailbox; zero leaves it as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Update {
    pub guid: Guid,
    pub uid_validity: u32,
    pub min_uid_next: u32,
    pub min_highest_modseq: u64,
}

/// A mailbox that exists, or (without a GUID) a name that is subscribed to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    pub vname: String,
    pub guid: Guid,
    pub uid_validity: u32,
    /// Since the time that was asked for.
    pub subscription_changed: bool,
}

/// What a message is, as far as the index's log does not tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MessageInfo {
    pub guid: String,
    /// As Dovecot hashes it (mail_generate_guid_128_hash()).
    pub guid_128: Guid,
    /// Seconds since 1970, like `save_date`. There 0: not known.
    pub received_date: i64,
    pub save_date: i64,
    /// Bytes of its body.
    pub size: u64,
    /// A worker was killed before it could give the message its GUID (maildir).
    pub is_stray: bool,
}

/// Bytes that a mailbox's index keeps for us, see [`crate::worker::mark`].
pub const MARK_BYTES: usize = 200;

/// How the private namespace with the INBOX names its mailboxes.
#[derive(Clone, Debug, Default)]
pub struct Namespace {
    pub prefix: String,
    pub separator: char,
    /// By what the storage separates, where that is another one and cannot be in a name: the dot of a maildir, mostly.
    pub storage_separator: Option<char>,
    /// Prefixes of namespaces whose mailboxes are others': shared and public ones.
    pub foreign: Vec<String>,
}

/// A message to be saved.
#[derive(Clone, Debug)]
pub struct NewMessage<'a> {
    pub guid: &'a str,
    /// 0: the next one.
    pub uid: u32,
    pub flags: u32,
    pub keywords: &'a [String],
    pub received_date: i64,
    /// 0: now.
    pub save_date: i64,
}

/// The bytes of a message.
#[derive(Debug)]
pub enum Body<'a> {
    Bytes(&'a [u8]),
    /// All of the file.
    File(&'a File),
}

/// Mailboxes are named by their virtual name in UTF-8, see [`crate::worker::name`].
///
/// Messages are changed in a transaction that begins with the first call and ends with [`Storage::commit`]; saving and
/// changing are never mixed in one.
pub trait Storage {
    /// From now on no other worker applies changes of this user. False if one does.
    fn lock_user(&mut self, user: &str) -> Result<bool>;
    fn unlock_user(&mut self);
    /// Whether locks of users who are opened from now on are waited for only briefly.
    fn wait_briefly(&mut self, _is_brief: bool) {}
    /// False if there is no such user.
    fn open_user(&mut self, user: &str) -> Result<bool>;
    /// All whom the userdb lists.
    fn users(&mut self) -> Result<Vec<String>>;
    /// Whether something was written to one of his mailboxes since then, in seconds since 1970. Opens none. False if the
    /// userdb calls him otherwise.
    fn was_written_since(&mut self, user: &str, since: i64) -> Result<bool>;
    /// With whom his mail is replicated.
    fn user_peers(&self) -> Result<UserPeers>;
    /// Closes all that is open of the user, gives his privileges back.
    fn close_user(&mut self);
    fn namespace(&self) -> Result<Namespace>;
    /// The GUID with which the INBOX of the user is born on every server.
    fn inbox_guid(&self) -> Result<Guid>;
    /// A new file without a name, for the user's temporary data.
    fn temp_file(&mut self) -> Result<File>;

    fn existence(&mut self, vname: &str) -> Result<Existence>;
    fn find_guid(&mut self, guid: &Guid) -> Result<Option<String>>;
    /// False if it exists already.
    fn create(&mut self, vname: &str, directory: bool, update: &Update) -> Result<bool>;
    /// With its children. False if `from` doesn't exist or `to` does.
    fn rename(&mut self, from: &str, to: &str) -> Result<bool>;
    /// False if it doesn't exist.
    fn delete(&mut self, vname: &str) -> Result<bool>;
    /// The same for a mailbox without messages. False if it has some: it stays.
    fn delete_empty(&mut self, vname: &str) -> Result<bool>;
    fn set_subscribed(&mut self, vname: &str, subscribed: bool) -> Result<()>;

    /// Opens and syncs instead of the mailbox open so far. False if it doesn't exist.
    fn open(&mut self, vname: &str, readonly: bool) -> Result<bool>;
    /// Rolls back what is not committed.
    fn close(&mut self);
    /// Takes over what others did to the open mailbox.
    fn sync(&mut self) -> Result<()>;
    fn status(&mut self) -> Status;
    /// With another UIDVALIDITY the mailbox must be opened anew.
    fn update(&mut self, update: &Update) -> Result<()>;
    /// Of all messages, in order.
    fn uids(&mut self) -> Result<Vec<u32>>;
    fn message_guid(&mut self, uid: u32) -> Result<Option<String>>;
    /// Of all messages from this UID on, in order, without those that go meanwhile.
    fn guids(&mut self, first_uid: u32, each: &mut dyn FnMut(u32, &str)) -> Result<()> {
        for uid in self.uids()?.into_iter().filter(|uid| *uid >= first_uid) {
            if let Some(guid) = self.message_guid(uid)? {
                each(uid, &guid);
            }
        }
        Ok(())
    }
    /// UIDs of the messages with this GUID, rising; more than one if it was copied inside of the mailbox. Looks at every
    /// message.
    fn find_messages(&mut self, guid: &str) -> Result<Vec<u32>>;
    /// Whether the mailbox's log knows that the message was expunged here.
    fn was_expunged(&mut self, uid: u32, guid: &str) -> Result<bool>;

    fn save(&mut self, message: &NewMessage, body: Body) -> Result<()>;
    /// Saves a copy of the message with this GUID in another (or the same) mailbox of the user. False if it isn't there.
    fn copy(&mut self, message: &NewMessage, source: &str, source_uid: u32) -> Result<bool>;
    /// Saves the open mailbox's own message once more, as it is, at another UID. False if it isn't there.
    fn duplicate(&mut self, uid: u32, new_uid: u32) -> Result<bool>;
    /// Missing UIDs are fine.
    fn update_flags(&mut self, first_uid: u32, last_uid: u32, update: &proto::FlagUpdate) -> Result<()>;
    /// Missing UIDs are fine.
    fn expunge(&mut self, first_uid: u32, last_uid: u32) -> Result<()>;
    /// Durable when it returns, expunges executed. Returns the UIDs given to the saved messages.
    fn commit(&mut self) -> Result<Vec<u32>>;

    /// The mailboxes below the user's namespace. `since`: seconds since 1970.
    fn mailboxes(&mut self, since: i64) -> Result<Vec<Listed>>;
    /// The names in all private namespaces that are subscribed to, whether there is a mailbox or not.
    fn subscribed(&mut self, since: i64) -> Result<Vec<Listed>>;
    /// How many deletions of the mailbox the mailbox log has, as far as it goes back. A client's stands there twice: our plugin says it
    /// before Dovecot does.
    fn deletions(&mut self, guid: &Guid) -> Result<u32>;
    fn was_deleted(&mut self, guid: &Guid) -> Result<bool> {
        Ok(self.deletions(guid)? > 0)
    }
    /// The open mailbox's transaction logs, the oldest first.
    fn log_files(&mut self) -> Result<Vec<Vec<u8>>>;
    fn message_info(&mut self, uid: u32) -> Result<Option<MessageInfo>>;
    /// System flags and keywords.
    fn message_flags(&mut self, uid: u32) -> Result<Option<(u32, Vec<String>)>>;
    /// Whether a commit that is killed can leave messages without all that belongs to them (maildir).
    fn is_torn_when_killed(&self) -> bool;
    /// A message with this GUID must be committed alone, or it could not be known again if this worker were killed then.
    fn is_saved_alone(&mut self, guid: &str) -> Result<bool>;
    /// The message that has not got this GUID yet because a worker was killed.
    fn stray(&mut self, guid: &str) -> Result<Option<u32>>;
    /// Whether a worker may have saved this message: in a maildir, its file's name says.
    fn may_be_ours(&mut self, uid: u32, guid: &str) -> Result<bool>;
    /// Gives a stray its GUID.
    fn adopt(&mut self, uid: u32, guid: &str) -> Result<()>;
    /// What the open mailbox's index keeps for us; all zero: nothing.
    fn mark(&mut self) -> Result<[u8; MARK_BYTES]>;
    /// In the transaction that is being built; begins one.
    fn write_mark(&mut self, offset: usize, bytes: &[u8]) -> Result<()>;

    /// False if there is no such message.
    fn body_open(&mut self, uid: u32, guid: &str) -> Result<bool>;
    /// 0 at the end.
    fn body_read(&mut self, buffer: &mut [u8]) -> Result<usize>;
    fn body_close(&mut self);

    /// All that is written from now on is written for these changes.
    fn applying(&mut self, changes: &[proto::SeqOf]);
    /// What was written since the last call, as [`Storage::applying`] told.
    fn take_spans(&mut self) -> Vec<proto::Span>;
}
