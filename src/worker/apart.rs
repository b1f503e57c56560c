//! Messages whose contents are not the same on all servers are set apart: an [`Apart`](crate::wire::proto::Apart) names them.
//!
//! IMAP says that a message never changes (RFC 3501, 2.3.1.1), and nobody knows which contents are right. So each server that has the
//! message saves its own under another GUID, tells of that, and only then expunges the one that is named: no contents are lost, on no
//! server. The GUID is made of what is named and of the contents: servers with the same contents make the same, and so does who
//! does it once more because it was killed.
use std::fmt::Write;

use super::body::Fetched;
use super::mark::Marks;
use super::storage::{NewMessage, Result, Storage};
use crate::compare::digest::Contents;
use crate::compare::BodyHash;
use crate::wire::proto;

/// Without MAIL_RECENT, which a session has, and no mailbox.
pub const FLAGS: u32 = 0x1f;
const PIECE_BYTES: usize = 64 << 10;

/// A message as this server has it, with the GUID that it gets.
pub struct Own {
    pub guid: String,
    body: Fetched,
    flags: u32,
    keywords: Vec<String>,
    received_date: i64,
    save_date: i64,
}

/// Of the message in the open mailbox that is called `guid`. `named`: the UID by which it is meant on all servers. None: it is gone.
pub fn own<S: Storage>(storage: &mut S, uid: u32, guid: &str, named: u32) -> Result<Option<Own>> {
    let Some(info) = storage.message_info(uid)?.filter(|info| info.guid == guid) else { return Ok(None) };
    let Some((flags, keywords)) = storage.message_flags(uid)? else { return Ok(None) };
    let mut body = Fetched::Memory(Vec::new());
    let Some(hash) = read(storage, uid, guid, |storage, bytes| body.push(storage, bytes))? else { return Ok(None) };
    Ok(Some(Own {
        guid: guid_of(guid, named, &hash),
        body,
        flags: flags & FLAGS,
        keywords,
        received_date: info.received_date,
        save_date: info.save_date,
    }))
}

/// In the open mailbox, for which nothing is pending. False: it was there.
pub fn keep<S: Storage>(storage: &mut S, own: &Own) -> Result<bool> {
    let Some(body) = own.body.body() else { return Ok(false) };
    if !storage.find_messages(&own.guid)?.is_empty() {
        return Ok(false);
    }
    if let Some(uid) = stray(storage, own)? {
        // A worker was killed while it did this.
        let (add, add_keywords) = (own.flags, own.keywords.clone());
        storage.adopt(uid, &own.guid)?;
        storage.update_flags(uid, uid, &proto::FlagUpdate { add, add_keywords, ..Default::default() })?;
        return commit(storage).map(|()| true);
    }
    let message = NewMessage {
        guid: &own.guid,
        uid: 0,
        flags: own.flags,
        keywords: &own.keywords,
        received_date: own.received_date,
        save_date: own.save_date,
    };
    storage.save(&message, body)?;
    commit(storage).map(|()| true)
}

fn stray<S: Storage>(storage: &mut S, own: &Own) -> Result<Option<u32>> {
    match storage.is_torn_when_killed() {
        true => storage.stray(&own.guid),
        false => Ok(None),
    }
}

/// Marked as ours: no look tells it as what a client did.
pub fn commit<S: Storage>(storage: &mut S) -> Result<()> {
    let (offset, bytes) = Marks::parse(&storage.mark()?).ours();
    storage.write_mark(offset, &bytes)?;
    storage.commit().map(drop)
}

/// 128 bits in hexadecimal digits, as Dovecot's own GUIDs are. The UID tells copies inside of a mailbox from each other.
fn guid_of(guid: &str, uid: u32, hash: &BodyHash) -> String {
    let named = [&uid.to_be_bytes()[..], hash, guid.as_bytes()].concat();
    let hash = ring::digest::digest(&ring::digest::SHA256, &named);
    hash.as_ref()[..16].iter().fold(String::new(), |mut digits, byte| {
        let _ = write!(digits, "{byte:02x}");
        digits
    })
}

/// The contents of a message in the open mailbox. None: it is gone.
pub fn hash<S: Storage>(storage: &mut S, uid: u32, guid: &str) -> Result<Option<BodyHash>> {
    read(storage, uid, guid, |_, _| Ok(()))
}

fn read<S: Storage>(
    storage: &mut S,
    uid: u32,
    guid: &str,
    mut each: impl FnMut(&mut S, &[u8]) -> Result<()>,
) -> Result<Option<BodyHash>> {
    let unreadable = |error| format!("UID {uid} cannot be read: {error}");
    if !storage.body_open(uid, guid).map_err(unreadable)? {
        return Ok(None);
    }
    let mut contents = Contents::default();
    let mut buffer = vec![0; PIECE_BYTES];
    let outcome = loop {
        let piece = match storage.body_read(&mut buffer) {
            Ok(0) => break Ok(Some(contents.finish())),
            Ok(read) => &buffer[..read],
            Err(error) => break Err(unreadable(error)),
        };
        contents.push(piece);
        if let Err(error) = each(storage, piece) {
            break Err(error);
        }
    };
    storage.body_close();
    outcome
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeStorage;
    use super::*;

    /// Servers of different versions must agree.
    #[test]
    fn a_guid_is_what_it_has_always_been_and_each_part_of_what_is_named_counts() {
        let one = guid_of("guid", 7, &[1; 32]);
        assert_eq!(one, "4fd1752f22e5ce9e62ccc18141ee37e3");
        for other in [guid_of("guie", 7, &[1; 32]), guid_of("guid", 8, &[1; 32]), guid_of("guid", 7, &[2; 32])] {
            assert_ne!(one, other);
        }
    }

    #[test]
    fn it_is_kept_once() {
        let mut storage = FakeStorage::default();
        storage.add("INBOX", [7; 16], 9, &[(4, "four"), (5, "five")]);
        storage.open("INBOX", false).unwrap();
        assert!(own(&mut storage, 4, "five", 4).unwrap().is_none(), "another one");
        let first = own(&mut storage, 5, "five", 5).unwrap().unwrap();
        assert!(keep(&mut storage, &first).unwrap());
        let again = own(&mut storage, 5, "five", 5).unwrap().unwrap();
        assert!(!keep(&mut storage, &again).unwrap());
        let all = storage.messages("INBOX");
        assert_eq!(all[2], (6, guid_of("five", 5, &hash(&mut storage, 5, "five").unwrap().unwrap())));
    }
}
