//! The entries from src/shim/capture.c: C structs become records of the protocol.

use super::ffi;
use super::settings::{read, text};
use super::worker::{read_bounded, storage_separator, StringList};
use crate::capture::{mailbox_change, Begun, Capture, Commit, Done, Known, LinkConfig, Place, Saved, Transaction};
use crate::guard;
use crate::settings::{Ack, Settings};
use crate::time::now_us;
use crate::wire::proto;
use crate::worker::mark::moves_at;
use crate::worker::name;
use crate::worker::storage::Namespace;
use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_void, CStr};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// Waiting longer for the relay would hold up the end of the process.
const FINISH_TIMEOUT: Duration = Duration::from_millis(500);

/// What this process captures. A mail process has one thread of Dovecot's; our own never gets here.
struct Process {
    capture: Capture,
    inline_body_size: u64,
    process_queue_size: u64,
    ack: Option<AckPolicy>,
    last: Last,
}

/// dovetail_ack, if it is not async.
#[derive(Clone, Copy)]
struct AckPolicy {
    /// 0: that it is journaled is enough.
    peers: u32,
    timeout: Duration,
    may_fail: bool,
    /// The last one was not acknowledged: the log has it.
    is_warned: bool,
}

impl AckPolicy {
    fn of(settings: &Settings) -> Option<AckPolicy> {
        let peers = match settings.ack {
            Ack::Async => return None,
            Ack::Relay => 0,
            Ack::Peers(peers) => peers,
        };
        let timeout = Duration::from_millis(settings.ack_timeout_ms);
        Some(AckPolicy { peers, timeout, may_fail: settings.ack_may_fail, is_warned: false })
    }
}

/// The names that came last: most often the next ones are the same.
#[derive(Default)]
struct Last {
    user: Option<Rc<str>>,
    /// With the name and the separators that it was made of.
    place: Option<(Rc<Place>, Vec<u8>, [c_char; 2])>,
}

thread_local! {
    static PROCESS: RefCell<Option<Process>> = const { RefCell::new(None) };
}

/// An open transaction, owned by C as a pointer.
struct OpenTransaction {
    begun: Begun,
    place: Rc<Place>,
    transaction: Transaction,
}

impl Last {
    /// # Safety
    ///
    /// NUL-terminated or null.
    unsafe fn user(&mut self, user: *const c_char) -> Rc<str> {
        // SAFETY: see above.
        let bytes = unsafe { bytes(user) };
        match &self.user {
            Some(last) if last.as_bytes() == bytes => Rc::clone(last),
            _ => Rc::clone(self.user.insert(text(user).into())),
        }
    }

    /// # Safety
    ///
    /// The strings are NUL-terminated.
    unsafe fn place(&mut self, mailbox: &ffi::DtMailbox) -> Rc<Place> {
        // SAFETY: see above.
        let (user, name) = unsafe { (bytes(mailbox.user), bytes(mailbox.name)) };
        let separators = [mailbox.separator, mailbox.storage_separator];
        if let Some((place, last_name, last_separators)) = &self.place {
            let same = place.guid == mailbox.guid && *last_separators == separators;
            if same && last_name == name && place.user.as_bytes() == user {
                return Rc::clone(place);
            }
        }
        let place =
            Rc::new(Place { user: text(mailbox.user), guid: mailbox.guid, path: path(&text(mailbox.name), mailbox) });
        self.place = Some((Rc::clone(&place), name.to_vec(), separators));
        place
    }
}

/// As the other guard; what was noted until the panic is not trusted any more.
fn guard<T>(what: &str, failure: T, f: impl FnOnce() -> T) -> T {
    guard::catch(what, f).unwrap_or_else(|| {
        guard::guard("give_up", (), || {
            // The look that this leads to may be over before an expunge that was requested is executed.
            // SAFETY: the thread is the one that calls the hooks.
            unsafe { ffi::dt_spans_forget_told() };
            with_process(|process| process.capture.give_up());
        });
        failure
    })
}

/// True: it is full.
fn note(f: impl FnOnce(&mut Capture)) -> bool {
    let is_full = |process: &mut Process| {
        f(&mut process.capture);
        process.capture.is_full()
    };
    with_process(is_full).unwrap_or(false)
}

fn with_process<T>(f: impl FnOnce(&mut Process) -> T) -> Option<T> {
    PROCESS.with(|process| process.try_borrow_mut().ok()?.as_mut().map(f))
}

/// A user of this process. But for his peers, the settings of the first one decide for the process.
#[no_mangle]
extern "C" fn dt_rs_capture_init(user: *mut c_void, username: *const c_char, process: *const c_char) {
    guard("capture_init", (), || {
        let settings = match read(user) {
            Ok(settings) => settings,
            Err(errors) => {
                for error in errors {
                    log::error!("{error} - mail goes on, changes of this session are not replicated");
                }
                // Rather too few get his mail than one that must not.
                with_process(|process| process.capture.set_peers(&text(username), proto::UserPeers::default()));
                return;
            }
        };
        let peers = settings.user_peers();
        let is_begun = with_process(|process| process.capture.set_peers(&text(username), peers.clone())).is_some();
        if is_begun || settings.has_no_peers() {
            return;
        }
        let ack = AckPolicy::of(&settings);
        let config = LinkConfig {
            socket: settings.socket,
            queue_size: settings.process_queue_size,
            process: text(process),
            finish_timeout: FINISH_TIMEOUT,
            spawn: super::thread::spawn_with_signals_blocked,
        };
        let process = Process {
            capture: Capture::new(config, birth_guid),
            inline_body_size: settings.inline_body_size,
            process_queue_size: settings.process_queue_size,
            ack,
            last: Last::default(),
        };
        let mut process = process;
        process.capture.set_peers(&text(username), peers);
        PROCESS.with(|slot| *slot.borrow_mut() = Some(process));
    });
}

#[no_mangle]
extern "C" fn dt_rs_capture_deinit() {
    guard("capture_deinit", (), || {
        if let Some(process) = PROCESS.with(|slot| slot.borrow_mut().take()) {
            process.capture.finish();
        }
        super::log::drain();
    });
}

#[no_mangle]
extern "C" fn dt_rs_inline_body_size() -> u64 {
    guard("inline_body_size", 0, || with_process(|process| process.inline_body_size).unwrap_or(0))
}

#[no_mangle]
extern "C" fn dt_rs_transaction_begin(mailbox: *const ffi::DtMailbox) -> *mut c_void {
    guard("transaction_begin", std::ptr::null_mut(), || {
        let open = with_process(|process| {
            // SAFETY: the shim passes a valid struct for the duration of the call.
            let place = unsafe { process.last.place(&*mailbox) };
            let begun = process.capture.begin(&place);
            let limit = usize::try_from(process.process_queue_size).unwrap_or(usize::MAX);
            OpenTransaction { begun, place, transaction: Transaction::new(limit) }
        });
        open.map_or(std::ptr::null_mut(), |open| Box::into_raw(Box::new(open)).cast())
    })
}

/// The transaction behind C's pointer; none if nothing is captured.
///
/// # Safety
///
/// `txn` comes from `dt_rs_transaction_begin()` and was not given to commit or rollback.
unsafe fn open_transaction<'a>(txn: *mut c_void) -> Option<&'a mut OpenTransaction> {
    // SAFETY: see above; C uses it from one thread only.
    unsafe { txn.cast::<OpenTransaction>().as_mut() }
}

#[no_mangle]
extern "C" fn dt_rs_save(txn: *mut c_void, save: *const ffi::DtSave) {
    guard("save", (), || {
        // SAFETY: the shim passes an open transaction and a valid struct.
        let (Some(open), save) = (unsafe { open_transaction(txn) }, unsafe { &*save }) else { return };
        // SAFETY: as above.
        open.transaction.save(unsafe { owned_save(save) });
    });
}

#[no_mangle]
extern "C" fn dt_rs_flags(txn: *mut c_void, uid: u32, guid: *const c_char, add: u32, remove: u32) {
    guard("flags", (), || {
        // SAFETY: the shim passes an open transaction.
        let Some(open) = (unsafe { open_transaction(txn) }) else { return };
        let delta = proto::FlagUpdate { add, remove, ..Default::default() };
        open.transaction.flags(uid, optional_text(guid), delta);
    });
}

#[no_mangle]
extern "C" fn dt_rs_keywords(
    txn: *mut c_void,
    uid: u32,
    guid: *const c_char,
    old: *const *const c_char,
    new: *const *const c_char,
) {
    guard("keywords", (), || {
        // SAFETY: the shim passes an open transaction and NULL-terminated lists.
        let (Some(open), old, new) = (unsafe { open_transaction(txn) }, unsafe { list(old) }, unsafe { list(new) })
        else {
            return;
        };
        let missing = |from: &[String], list: &[String]| -> Vec<String> {
            list.iter().filter(|keyword| !from.contains(keyword)).cloned().collect()
        };
        let (add_keywords, remove_keywords) = (missing(&old, &new), missing(&new, &old));
        if add_keywords.is_empty() && remove_keywords.is_empty() {
            return;
        }
        let delta = proto::FlagUpdate { add_keywords, remove_keywords, ..Default::default() };
        open.transaction.flags(uid, optional_text(guid), delta);
    });
}

#[no_mangle]
extern "C" fn dt_rs_expunge(txn: *mut c_void, uid: u32, guid: *const c_char) {
    guard("expunge", (), || {
        // SAFETY: the shim passes an open transaction.
        if let Some(open) = unsafe { open_transaction(txn) } {
            open.transaction.expunge(uid, optional_text(guid));
        }
    });
}

/// Called inside of a commit: only notes. dt_rs_flush() is to be called soon; true: so much waits that it is to be called now.
/// wants_ack: dt_rs_await_ack() will be called.
#[no_mangle]
extern "C" fn dt_rs_commit(
    txn: *mut c_void,
    mailbox: *const ffi::DtMailbox,
    saved: *const ffi::DtSaved,
    saved_count: usize,
    wants_ack: bool,
) -> bool {
    guard("commit", false, || {
        if txn.is_null() {
            return false;
        }
        // SAFETY: from dt_rs_transaction_begin(); C forgets it now.
        let open = unsafe { Box::from_raw(txn.cast::<OpenTransaction>()) };
        // SAFETY: valid during the call.
        let mailbox = unsafe { &*mailbox };
        let saved: Vec<Saved> = if saved_count == 0 {
            Vec::new()
        } else {
            // SAFETY: an array of that many, valid during the call.
            let saved = unsafe { std::slice::from_raw_parts(saved, saved_count) };
            saved.iter().map(|s| Saved { uid: s.uid, guid: optional_text(s.guid) }).collect()
        };
        let commit = Commit {
            guid: mailbox.guid,
            uid_validity: mailbox.uid_validity,
            uid_next: mailbox.uid_next,
            highest_modseq: mailbox.highest_modseq,
            saved,
            clock: now_us(),
            ack: wants_ack.then(next_ack).flatten(),
        };
        note(|capture| capture.commit(open.begun, open.place, open.transaction, commit))
    })
}

/// The same, for a mailbox whose index is in memory only because its disk is full. UIDNEXT as the session has it, or 0.
#[no_mangle]
extern "C" fn dt_rs_commit_in_memory(txn: *mut c_void, uid_next: u32) -> bool {
    guard("commit_in_memory", false, || {
        if txn.is_null() {
            return false;
        }
        // SAFETY: from dt_rs_transaction_begin(); C forgets it now.
        let open = unsafe { Box::from_raw(txn.cast::<OpenTransaction>()) };
        // Nobody will say anything about it.
        let _ = next_ack();
        note(|capture| capture.commit_in_memory(open.begun, open.place, open.transaction, uid_next))
    })
}

/// Notes it, as dt_rs_commit() does.
#[no_mangle]
extern "C" fn dt_rs_rollback(txn: *mut c_void) -> bool {
    guard("rollback", false, || {
        if txn.is_null() {
            return false;
        }
        // SAFETY: from dt_rs_transaction_begin(); C forgets it now.
        let open = unsafe { Box::from_raw(txn.cast::<OpenTransaction>()) };
        note(|capture| capture.rollback(open.begun, &open.place))
    })
}

#[no_mangle]
extern "C" fn dt_rs_mailbox_op(op: c_int, mailbox: *const ffi::DtMailbox, new_name: *const c_char, directory: bool) {
    guard("mailbox_op", (), || {
        // SAFETY: valid during the call.
        let names = unsafe { &*mailbox };
        // SAFETY: as above.
        let (user, mailbox) = unsafe { owned_mailbox(names) };
        let what = match op {
            ffi::DT_MAILBOX_CREATE => proto::op::What::Create(proto::MailboxCreate { directory, ..Default::default() }),
            ffi::DT_MAILBOX_DELETE => proto::op::What::Delete(proto::MailboxDelete { directory, ..Default::default() }),
            ffi::DT_MAILBOX_RENAME => {
                let new_path = path(&text(new_name), names);
                proto::op::What::Rename(proto::MailboxRename { new_path, back: vec![] })
            }
            ffi::DT_MAILBOX_SUBSCRIBE => proto::op::What::Subscription(proto::Subscription { subscribed: true }),
            ffi::DT_MAILBOX_UNSUBSCRIBE => proto::op::What::Subscription(proto::Subscription { subscribed: false }),
            other => return log::error!("Internal error: unknown mailbox operation {other}"),
        };
        with_process(|process| process.capture.mailbox(mailbox_change(&user, mailbox, what, now_us())));
    });
}

/// The user's list of mailboxes is about to be changed.
#[no_mangle]
extern "C" fn dt_rs_intend(mailbox: *const ffi::DtMailbox) {
    guard("intend", (), || {
        with_process(|process| {
            // SAFETY: valid during the call.
            let place = unsafe { process.last.place(&*mailbox) };
            process.capture.intend(&place);
        });
    });
}

/// Notes it, as dt_rs_commit() does.
#[no_mangle]
extern "C" fn dt_rs_span(span: *const ffi::DtSpan) -> bool {
    guard("span", false, || {
        // SAFETY: valid during the call.
        let span = unsafe { &*span };
        with_process(|process| {
            // SAFETY: as above.
            let written = unsafe { span.written(process.last.user(span.user)) };
            process.capture.written(written);
            process.capture.is_full()
        })
        .unwrap_or(false)
    })
}

/// GUID of a message in an open mailbox, valid until the next call. Empty if the message is gone; NULL if nothing is known of it.
pub type DtGuidOf = extern "C" fn(mailbox_guid: *const u8, uid: u32) -> *const c_char;

/// Does it to the message where it is now, see follow.h.
pub type DtFollow = extern "C" fn(mailbox_guid: *const u8, stale: *const ffi::DtStale) -> *const c_char;

/// A message was moved from a UID to another, by the commit at that place of the log.
pub type DtMove = extern "C" fn(from: u32, to: u32, log_seq: u32, log_offset: u64, context: *mut c_void);

/// Asks for the GUIDs of messages whose flags were changed, before it is told. They are not looked up while the client
/// waits: dbox may have to open a file for each.
#[no_mangle]
extern "C" fn dt_rs_name(guid_of: DtGuidOf) {
    guard("name", (), || {
        let Some(mut notes) = with_process(|process| process.capture.take_notes()) else { return };
        // Dovecot may commit meanwhile, which is noted as well.
        notes.name(|mailbox, uid| {
            let guid = guid_of(mailbox.as_ptr(), uid);
            match optional_text(guid) {
                Some(guid) => Known::As(guid),
                None if guid.is_null() => Known::Nothing,
                None => Known::Gone,
            }
        });
        with_process(|process| process.capture.give_back(notes));
    });
}

/// Calls `follow` with what clients did to messages that were there before; see follow.h.
#[no_mangle]
extern "C" fn dt_rs_follow(follow: DtFollow) {
    guard("follow", (), || {
        let Some(mut notes) = with_process(|process| process.capture.take_notes()) else { return };
        notes.follow(|mailbox, place, range, done| {
            let none = proto::FlagUpdate::default();
            let update = match done {
                Done::Flags(update) => update,
                Done::Expunge => &none,
            };
            let add_keywords = StringList::new(&update.add_keywords).ok()?;
            let remove_keywords = StringList::new(&update.remove_keywords).ok()?;
            let stale = ffi::DtStale {
                first_uid: range.first_uid,
                last_uid: range.last_uid,
                log_seq: place.0,
                log_offset: place.1,
                unnamed: range.guid.is_empty() && range.first_uid == range.last_uid,
                expunge: matches!(done, Done::Expunge),
                add: update.add,
                remove: update.remove,
                add_keywords: add_keywords.as_ptr(),
                remove_keywords: remove_keywords.as_ptr(),
            };
            optional_text(follow(mailbox.as_ptr(), &raw const stale))
        });
        with_process(|process| process.capture.give_back(notes));
    });
}

/// Calls `each` with the moves that the index's log, and the one before it, tell of: from which UID to which.
#[no_mangle]
extern "C" fn dt_rs_moves(path: *const c_char, each: DtMove, context: *mut c_void) {
    guard("moves", (), || {
        let path = text(path);
        for path in [format!("{path}.2"), path] {
            let Ok(log) = read_bounded(Path::new(&path)) else { continue };
            moves_at(&log).into_iter().for_each(|((log_seq, begin), from, to)| each(from, to, log_seq, begin, context));
        }
    });
}

fn next_ack() -> Option<proto::AckWanted> {
    with_process(|process| Some(process.capture.next_ack(process.ack?.peers, process.ack?.timeout))).flatten()
}

/// Whether clients' answers wait for more than the commit.
#[no_mangle]
extern "C" fn dt_rs_acks() -> bool {
    guard("acks", false, || with_process(|process| process.ack.is_some()).unwrap_or(false))
}

/// What is said of a save that was committed.
pub const DT_ACK_OK: c_int = 0;
/// It is to be taken back, and has failed then.
pub const DT_ACK_FAIL: c_int = -1;

/// Sends what was noted, and waits until the save that was committed last is as safe as dovetail_ack wants, or the time is over.
/// `user` and `mailbox`: for the log. `can_fail`: it can be taken back.
#[no_mangle]
extern "C" fn dt_rs_await_ack(user: *const c_char, mailbox: *const c_char, can_fail: bool) -> c_int {
    guard("await_ack", DT_ACK_OK, || {
        let await_ack = |process: &mut Process| {
            let policy = process.ack.as_mut()?;
            let outcome = process.capture.await_ack(policy.timeout);
            let is_news = outcome.is_err() && !policy.is_warned;
            policy.is_warned = outcome.is_err();
            Some((outcome, policy.may_fail && can_fail, is_news))
        };
        let Some((Err(error), may_fail, is_news)) = with_process(await_ack).flatten() else { return DT_ACK_OK };
        if is_news {
            let then = if may_fail {
                "it is taken back, and its sender is told to try again"
            } else {
                "its sender is told OK"
            };
            log::warn!(
                "user {}: mailbox {}: a saved mail is not acknowledged as dovetail_ack wants: {error} - {then}",
                text(user),
                text(mailbox)
            );
        }
        super::log::drain();
        if may_fail {
            DT_ACK_FAIL
        } else {
            DT_ACK_OK
        }
    })
}

/// The client has its answer: what could wait until then is sent.
#[no_mangle]
extern "C" fn dt_rs_flush() {
    guard("flush", (), || {
        super::log::drain();
        with_process(|process| process.capture.flush());
    });
}

/// # Safety
///
/// NUL-terminated and valid as long as it is used, or null.
unsafe fn bytes<'a>(string: *const c_char) -> &'a [u8] {
    if string.is_null() {
        return &[];
    }
    // SAFETY: see above.
    unsafe { CStr::from_ptr(string) }.to_bytes()
}

/// # Safety
///
/// The strings are NUL-terminated.
unsafe fn owned_mailbox(mailbox: &ffi::DtMailbox) -> (String, proto::Mailbox) {
    let guid = if mailbox.guid == [0; 16] { Vec::new() } else { mailbox.guid.to_vec() };
    let owned = proto::Mailbox {
        guid,
        path: path(&text(mailbox.name), mailbox),
        uid_validity: mailbox.uid_validity,
        uid_next: mailbox.uid_next,
        highest_modseq: mailbox.highest_modseq,
    };
    (text(mailbox.user), owned)
}

/// # Safety
///
/// The strings are NUL-terminated, the keywords NULL-terminated, and `body` has `size` bytes if it is not null.
unsafe fn owned_save(save: &ffi::DtSave) -> proto::Save {
    let copied_from = (!save.copied_from.is_null()).then(|| {
        // SAFETY: see above.
        let (_, mailbox) = unsafe { owned_mailbox(&*save.copied_from) };
        proto::CopiedFrom { mailbox: Some(mailbox), uid: save.copied_from_uid }
    });
    let body = if save.body.is_null() {
        Vec::new()
    } else {
        // SAFETY: see above.
        unsafe { std::slice::from_raw_parts(save.body, save.size as usize) }.to_vec()
    };
    proto::Save {
        guid: text(save.guid),
        flags: save.flags,
        // SAFETY: see above.
        keywords: unsafe { list(save.keywords) },
        received_date: save.received_date,
        save_date: save.save_date,
        size: save.size,
        body_inline: !save.body.is_null(),
        body,
        copied_from,
        ..Default::default()
    }
}

/// # Safety
///
/// A NULL-terminated list of NUL-terminated strings, or null.
unsafe fn list(strings: *const *const c_char) -> Vec<String> {
    let mut owned = Vec::new();
    if strings.is_null() {
        return owned;
    }
    for i in 0.. {
        // SAFETY: within the list, which ends with NULL.
        let string = unsafe { *strings.add(i) };
        if string.is_null() {
            break;
        }
        owned.push(text(string));
    }
    owned
}

fn optional_text(string: *const c_char) -> Option<String> {
    (!string.is_null()).then(|| text(string)).filter(|s| !s.is_empty())
}

/// The parts of a name in the mailbox's namespace, without its prefix.
fn path(name: &str, mailbox: &ffi::DtMailbox) -> Vec<String> {
    let namespace = Namespace {
        separator: char::from(mailbox.separator as u8),
        storage_separator: storage_separator(mailbox.storage_separator),
        ..Default::default()
    };
    name::path(name, &namespace).unwrap_or_default()
}

fn birth_guid(guid: &str) -> Vec<u8> {
    let mut hash = [0u8; 16];
    let mut terminated = guid.as_bytes().to_vec();
    terminated.push(0);
    if let Ok(guid) = CStr::from_bytes_with_nul(&terminated) {
        // SAFETY: a terminated string and room for 16 bytes.
        unsafe { ffi::mail_generate_guid_128_hash(guid.as_ptr(), hash.as_mut_ptr()) };
    }
    hash.to_vec()
}
