//! Reads the bytes of a `dovecot.index.log`: what was written to a mailbox's index, commit by commit.
//!
//! It is for reading a gap back: bytes from one known commit boundary to another that no process told us of. Dovecot's
//! own log view is not used there, because a view set to a remembered place may mark the whole log as corrupted.
//! [`Header`] reads the file's header, [`Commits`] the commits behind it, [`fold`] tells what they did to messages.
//!
//! Guarantees that no input, however broken, panics, loops, or takes more than a small multiple of its own size in
//! memory; that a commit is given whole or not at all; and that what Dovecot itself would refuse is refused. It must not
//! know of files, of mailboxes, or of what the product makes of a delta. The authority is Dovecot's
//! `mail-transaction-log.h` (formats of 2.3.19 and 2.4.1 are the same, version 1.3).
//!
//! # How the file is laid out
//!
//! Behind the header (`hdr_size` bytes, 40 so far) stand records without a gap: a size, a type with flags, and what
//! the type says. All is little endian except for the size, which is big endian with seven bits a byte. A `BOUNDARY`
//! record groups the records behind it into one commit; it is left out when the commit is a single record. Where a sync
//! wrote the commit, a header update of `log_file_tail_offset` follows *behind* the group: one span of the capture may
//! so be two [`Commit`]s, always in this order and without anybody else's between them.
//!
//! A file that begins an index anew (`prev_file_seq` 0, see [`Header::begins_anew`]) may have records behind its header
//! that no transaction committed: on sdbox 72 bytes, the extension `dbox-hdr` and its contents. A rotated file has none.
//!
//! # Requests and what was done
//!
//! A record with the flag `EXTERNAL` tells what was done to the mailbox already. One without is a request: the next sync
//! carries it out. Dovecot's index takes flags and keywords from both at once (`mail_index_sync_record()`), and a sync
//! that carries out a request for flags writes no second record. An expunge counts in the index only once it was done,
//! so it stands in the log twice: first as the request, then `EXTERNAL` (`mail_index_sync_record()` skips the first,
//! `mail_index_sync_add_expunge_guid()` reads it). Only the request may name the message's GUID: on maildir it always
//! did, on sdbox and mdbox where the GUID had been read or cached before; what was done has zeros. [`fold`] makes one
//! delta of the two. A request whose GUID is not that of the message is never carried out.

#![forbid(unsafe_code)]

mod commit;
mod delta;
mod fields;
mod header;
mod record;

pub use commit::{Commit, Commits};
pub use delta::{fold, Delta};
pub use header::Header;
pub use record::{
    Append, Attribute, ExpungeGuid, ExtIntro, FlagUpdate, HeaderUpdate, Modify, ModseqUpdate, Record, UidRange, What,
};

/// Why bytes are not a transaction log that can be read here. Nothing behind the place it names can be trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    #[error("the log has {length} bytes, and its header alone needs {needed}")]
    HeaderCut { length: usize, needed: usize },
    #[error("the log is of version {0}, and only version {known} is known here", known = header::MAJOR_VERSION)]
    UnknownVersion(u8),
    #[error("the log was written by a big-endian machine, and only little-endian logs are read here")]
    BigEndian,
    #[error("the log needs features that are not known here (compatibility flags {0:#x})")]
    UnknownFeatures(u8),
    #[error("the log's header says that it is {0} bytes long, and at least {min} are needed", min = header::BYTES_MIN)]
    HeaderTooSmall(u16),
    #[error("the log was marked as corrupted by Dovecot (its index id is 0)")]
    MarkedCorrupted,
    #[error("the log is corrupted at offset {offset}: {reason}")]
    Corrupted { offset: u64, reason: String },
}
