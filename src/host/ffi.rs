//! What crosses the boundary: the structs (include/dovetail.h is made of them) and the shim's functions.

use std::ffi::{c_char, c_int, c_void};
use std::rc::Rc;

use super::settings::text;
use crate::capture::{Written, TAIL_MAX};

/// A mailbox, as the relay knows it.
///
/// Strings everywhere here are NUL-terminated and valid for the duration of the call only.
#[repr(C)]
pub struct DtMailbox {
    /// Its owner.
    pub user: *const c_char,
    /// All zero: not known.
    pub guid: [u8; 16],
    /// Below the owner's inbox namespace.
    pub name: *const c_char,
    /// Between the parts of `name`.
    pub separator: c_char,
    /// By what the storage separates, if that cannot be in a name; otherwise 0.
    pub storage_separator: c_char,
    /// 0: not known, like the next two.
    pub uid_validity: u32,
    pub uid_next: u32,
    pub highest_modseq: u64,
}

/// A message that is being saved or copied.
#[repr(C)]
pub struct DtSave {
    /// NULL: known only after the commit.
    pub guid: *const c_char,
    pub flags: u32,
    /// NULL-terminated.
    pub keywords: *const *const c_char,
    /// Seconds since 1970, like `save_date`. 0: not known.
    pub received_date: i64,
    pub save_date: i64,
    /// 0 without a body: not known.
    pub size: u64,
    /// NULL: not sent along.
    pub body: *const u8,
    /// NULL: not a copy.
    pub copied_from: *const DtMailbox,
    pub copied_from_uid: u32,
}

/// A saved message got its UID.
#[repr(C)]
pub struct DtSaved {
    pub uid: u32,
    /// NULL: as told in dt_save.
    pub guid: *const c_char,
}

/// What a client did to messages, perhaps at UIDs that they do not have any more.
#[repr(C)]
pub struct DtStale {
    pub first_uid: u32,
    pub last_uid: u32,
    /// Where it stands in the index's log.
    pub log_seq: u32,
    pub log_offset: u64,
    /// It could not be found out which message it is: it may be on its way.
    pub unnamed: bool,
    /// Otherwise flags and keywords were changed.
    pub expunge: bool,
    pub add: u32,
    pub remove: u32,
    /// NULL-terminated.
    pub add_keywords: *const *const c_char,
    pub remove_keywords: *const *const c_char,
}

/// What a commit wrote to the transaction log of a mailbox's index.
#[repr(C)]
pub struct DtSpan {
    /// The mailbox's owner.
    pub user: *const c_char,
    /// All zero if it could not be found out.
    pub mailbox_guid: [u8; 16],
    /// Whose private (.pvt) index was written; NULL for the mailbox's main index.
    pub private_user: *const c_char,
    /// mail_index_header.indexid
    pub index_id: u32,
    /// Written: bytes begin..end-1 of the log file log_seq.
    pub log_seq: u32,
    pub begin: u64,
    pub end: u64,
    /// Where the file before this one ended, if this is the first span of its file that this process reports for the
    /// open mailbox; otherwise (and if there is no file before) 0.
    pub prev_log_seq: u32,
    pub prev_log_end: u64,
    /// DT_SPAN_APPENDS and so on: what it did to messages.
    pub touched: u32,
    /// Messages that it added.
    pub appends: u32,
    /// The last bytes of the log before `end`.
    pub tail: [u8; DT_SPAN_TAIL_SIZE],
    pub tail_size: usize,
    /// If not all zero, nothing was written: the mailbox had this GUID before, until the log was as long as `end`.
    pub old_mailbox_guid: [u8; 16],
    /// The `struct mailbox`; NULL if the span could only be reported after the mailbox was gone.
    pub mailbox: *mut c_void,
}

impl DtSpan {
    /// As it is noted.
    ///
    /// # Safety
    ///
    /// The strings are NUL-terminated or null.
    pub unsafe fn written(&self, user: Rc<str>) -> Written {
        Written {
            user,
            private_user: (!self.private_user.is_null()).then(|| text(self.private_user).into()),
            mailbox_guid: self.mailbox_guid,
            old_mailbox_guid: self.old_mailbox_guid,
            index_id: self.index_id,
            log_seq: self.log_seq,
            begin: self.begin,
            end: self.end,
            prev_log_seq: self.prev_log_seq,
            prev_log_end: self.prev_log_end,
            tail: self.tail,
            tail_size: self.tail_size,
            appends: self.appends,
            adds_or_changes: self.touched & (DT_SPAN_APPENDS | DT_SPAN_FLAGS) != 0,
            expunges: self.touched & DT_SPAN_EXPUNGES != 0,
        }
    }
}

/// A row of `doveadm dovetail status`.
#[repr(C)]
pub struct DtStatusRow {
    pub peer: *const c_char,
    pub state: *const c_char,
    pub last_error: *const c_char,
    pub pending: u64,
    pub behind_secs: u64,
    pub dropped: u64,
    /// Changes that this server's mail processes could not tell the relay, since it was started.
    pub process_dropped: u64,
    /// Of this server, in each row.
    pub unacknowledged: u64,
    /// What needs a comparison or a person, of all peers and of this server.
    pub failed: u64,
    /// Changes of two servers that did not go together, by kind, of all peers, since the relay was started.
    pub conflicts: *const c_char,
}

/// A row of `doveadm dovetail failed`.
#[repr(C)]
pub struct DtFailedRow {
    /// Whose change; empty: a mailbox of this server.
    pub peer: *const c_char,
    pub user: *const c_char,
    /// In hexadecimal digits.
    pub mailbox_guid: *const c_char,
    pub error: *const c_char,
    /// 0: no change but a mailbox.
    pub seq: u64,
    /// Since when, in seconds since 1970.
    pub since: u64,
}

/// A row of `doveadm dovetail compare`.
#[repr(C)]
pub struct DtDifferenceRow {
    pub user: *const c_char,
    pub peer: *const c_char,
    pub mailbox: *const c_char,
    pub what: *const c_char,
    pub detail: *const c_char,
    pub uid: u32,
}

/// What `doveadm dovetail progress` prints.
#[repr(C)]
pub struct DtProgress {
    pub is_running: bool,
    pub users: u64,
    pub users_done: u64,
    pub mails: u64,
    pub mails_done: u64,
    pub secs: u64,
    pub mails_per_sec: u64,
    pub secs_left: u64,
    /// Of the pass over all users; none: there is none.
    pub background_users: u64,
    pub background_users_done: u64,
    pub background_secs_left: u64,
}

/// A row of `doveadm dovetail waiting`.
#[repr(C)]
pub struct DtWaitingRow {
    pub user: *const c_char,
    /// To or from whom; empty: it is this server's own business.
    pub peer: *const c_char,
    pub what: *const c_char,
    pub reason: *const c_char,
    /// Seconds since 1970.
    pub since: u64,
    /// The same; 0: now.
    pub next_try: u64,
}

/// A row of `doveadm dovetail cert`.
#[repr(C)]
pub struct DtCertRow {
    /// The server's; the authority's is empty.
    pub name: *const c_char,
    /// SHA-256, in hexadecimal digits.
    pub fingerprint: *const c_char,
    pub file: *const c_char,
    /// Seconds since 1970; 0: not known.
    pub not_after: u64,
}

/// Bytes of `dt_span.tail`.
pub const DT_SPAN_TAIL_SIZE: usize = 64;
const _: () = assert!(DT_SPAN_TAIL_SIZE == TAIL_MAX);
/// Messages were added.
pub const DT_SPAN_APPENDS: u32 = 1;
/// Flags or keywords were changed.
pub const DT_SPAN_FLAGS: u32 = 2;
/// Messages went or are asked to, and dt_spans_tell_expunge() was not told before.
pub const DT_SPAN_EXPUNGES: u32 = 4;

pub const DT_MAILBOX_CREATE: c_int = 0;
pub const DT_MAILBOX_DELETE: c_int = 1;
pub const DT_MAILBOX_RENAME: c_int = 2;
pub const DT_MAILBOX_SUBSCRIBE: c_int = 3;
pub const DT_MAILBOX_UNSUBSCRIBE: c_int = 4;

/// Called with each setting.
pub type DtSettingEach = extern "C" fn(context: *mut c_void, name: *const c_char, value: *const c_char);

#[allow(unused_doc_comments)]
/// cbindgen:ignore
extern "C" {
    pub fn dt_settings_each(
        user: *mut c_void,
        each: DtSettingEach,
        context: *mut c_void,
        error_r: *mut *const c_char,
    ) -> c_int;
    pub fn dt_capture_init(module: *mut c_void);
    pub fn dt_capture_deinit();
    pub fn dt_spans_forget_told();
    pub fn dt_doveadm_init();
    pub fn dt_log(level: c_int, text: *const c_char);
    /// `fields`: keys and values in turn.
    pub fn dt_event(name: *const c_char, fields: *const *const c_char, count: usize, text: *const c_char);
    /// `mail_generate_guid_128_hash()`.
    pub fn mail_generate_guid_128_hash(guid: *const c_char, guid_128_r: *mut u8);
    pub static dt_abi_version: c_char;
    pub static dt_dovecot_version: c_char;
    pub static dovetail_setting_parser_info: c_char;
}
