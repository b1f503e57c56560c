//! The worker's unsafe half: its storage is Dovecot's, through src/shim/worker.c.
//!
//! Everything here runs on the main thread, called from the ioloop.
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::ffi::{c_char, c_int, c_void, CString};
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::OnceLock;
use std::time::Duration;

use super::ffi;
use super::service::uid_of;
use super::settings::{read, text};
use crate::guard::{catch, guard};
use crate::wire::proto;
use crate::worker::connection::{self, Connection};
use crate::worker::job::Jobs;
use crate::worker::storage::{
    Body, Existence, Guid, Listed, MessageInfo, Namespace, NewMessage, Result, Status, Storage, Update, MARK_BYTES,
};

/// The folder of the relay's journal, and whose it was while the process could see it.
static STATE_DIR: OnceLock<(Option<u32>, PathBuf)> = OnceLock::new();
static HAS_TURNED_AWAY: AtomicBool = AtomicBool::new(false);

/// The relay answers at once, or forwards chunks of a body. Longer silence in the middle of a job: it hangs.
const RELAY_TIMEOUT: Duration = Duration::from_secs(30);

/// State of the open mailbox as of the last sync.
#[repr(C)]
#[derive(Default)]
pub struct DtMailboxStatus {
    pub guid: [u8; 16],
    pub uid_validity: u32,
    pub uid_next: u32,
    pub messages: u32,
    pub highest_modseq: u64,
}

/// What to set of a mailbox; zero leaves it as it is.
#[repr(C)]
pub struct DtMailboxUpdate {
    pub guid: [u8; 16],
    pub uid_validity: u32,
    pub min_uid_next: u32,
    pub min_highest_modseq: u64,
}

/// A message that the worker saves or copies.
#[repr(C)]
pub struct DtWorkerSave {
    pub guid: *const c_char,
    /// 0: the next one.
    pub uid: u32,
    pub flags: u32,
    /// NULL-terminated.
    pub keywords: *const *const c_char,
    /// Seconds since 1970, like `save_date`. There 0: now.
    pub received_date: i64,
    pub save_date: i64,
}

/// What to change of messages.
#[repr(C)]
pub struct DtWorkerFlags {
    pub add: u32,
    pub remove: u32,
    /// NULL-terminated, like `remove_keywords`.
    pub add_keywords: *const *const c_char,
    pub remove_keywords: *const *const c_char,
}

/// A mailbox in the list, or (without a GUID) a name that is subscribed to.
#[repr(C)]
pub struct DtListed {
    pub vname: *const c_char,
    pub guid: [u8; 16],
    pub uid_validity: u32,
    /// Since the time that was asked for.
    pub subscription_changed: bool,
}

/// What a message is, as far as the index's log does not tell.
#[repr(C)]
pub struct DtMessageInfo {
    pub guid: *const c_char,
    /// As mail_generate_guid_128_hash() makes it.
    pub guid_128: [u8; 16],
    /// Seconds since 1970, like `save_date`. There 0: not known.
    pub received_date: i64,
    pub save_date: i64,
    pub size: u64,
    /// See stray.h.
    pub is_stray: bool,
}

/// Bytes that the mailbox's index keeps for us.
#[allow(dead_code)] // Rust 1.85 does not see that it is used just below.
pub const DT_MARK_SIZE: usize = 200;
const _: () = assert!(DT_MARK_SIZE == MARK_BYTES);

#[allow(unused_doc_comments)]
/// cbindgen:ignore
extern "C" {
    fn dt_worker_list(since: i64, each: extern "C" fn(*const DtListed, *mut c_void), context: *mut c_void) -> c_int;
    fn dt_worker_list_subscribed(
        since: i64,
        each: extern "C" fn(*const DtListed, *mut c_void),
        context: *mut c_void,
    ) -> c_int;
    fn dt_worker_deletions(guid: *const u8, count: *mut u32) -> c_int;
    fn dt_worker_log_path() -> *const c_char;
    fn dt_worker_uids(each: extern "C" fn(u32, u32, *mut c_void), context: *mut c_void);
    fn dt_worker_message_info(uid: u32, info_r: *mut DtMessageInfo) -> c_int;
    fn dt_worker_is_maildir() -> bool;
    fn dt_worker_is_saved_alone(guid: *const c_char) -> bool;
    fn dt_worker_message_flags(uid: u32, flags_r: *mut u32, keywords_r: *mut *const c_char) -> c_int;
    fn dt_worker_stray(guid: *const c_char, uid_r: *mut u32) -> c_int;
    fn dt_worker_may_be_ours(uid: u32, guid: *const c_char) -> bool;
    fn dt_worker_adopt(uid: u32, guid: *const c_char) -> c_int;
    fn dt_worker_mark_read(mark_r: *mut u8);
    fn dt_worker_mark_write(offset: u32, data: *const u8, size: usize);
    fn dt_worker_allow_plugins(plugins: *const c_char);
    fn dt_worker_error() -> *const c_char;
    fn dt_worker_connection_closed();
    fn dt_worker_user_open(username: *const c_char, brief: bool) -> c_int;
    fn dt_worker_user() -> *mut c_void;
    fn dt_worker_user_close();
    fn dt_worker_users(each: extern "C" fn(*const c_char, *mut c_void), context: *mut c_void) -> c_int;
    fn dt_worker_was_written_since(username: *const c_char, since: i64) -> c_int;
    fn dt_worker_namespace_prefix() -> *const c_char;
    fn dt_worker_namespace_separator() -> c_char;
    fn dt_worker_namespace_storage_separator() -> c_char;
    fn dt_worker_foreign_prefixes(each: extern "C" fn(*const c_char, *mut c_void), context: *mut c_void);
    fn dt_worker_inbox_guid(guid_r: *mut u8);
    fn dt_worker_temp_file() -> c_int;
    fn dt_worker_existence(vname: *const c_char, existence_r: *mut c_int) -> c_int;
    fn dt_worker_guid_of(vname: *const c_char, guid_r: *mut u8) -> c_int;
    fn dt_worker_list_guids(each: extern "C" fn(*const DtListed, *mut c_void), context: *mut c_void) -> c_int;
    fn dt_worker_create(vname: *const c_char, directory: bool, update: *const DtMailboxUpdate) -> c_int;
    fn dt_worker_rename(from: *const c_char, to: *const c_char) -> c_int;
    fn dt_worker_delete(vname: *const c_char) -> c_int;
    fn dt_worker_delete_empty(vname: *const c_char) -> c_int;
    fn dt_uidlist_may_have_left_lock() -> bool;
    fn dt_worker_set_subscribed(vname: *const c_char, subscribed: bool) -> c_int;
    fn dt_worker_open(vname: *const c_char, readonly: bool) -> c_int;
    fn dt_worker_close();
    fn dt_worker_sync() -> c_int;
    fn dt_worker_status(status_r: *mut DtMailboxStatus);
    fn dt_worker_update(update: *const DtMailboxUpdate) -> c_int;
    fn dt_worker_message_guid(uid: u32, guid_r: *mut *const c_char) -> c_int;
    fn dt_worker_guids(
        first_uid: u32,
        each: extern "C" fn(u32, *const c_char, *mut c_void),
        context: *mut c_void,
    ) -> c_int;
    fn dt_worker_find_messages(
        guid: *const c_char,
        each: extern "C" fn(u32, u32, *mut c_void),
        context: *mut c_void,
    ) -> c_int;
    fn dt_worker_was_expunged(uid: u32, guid: *const c_char) -> c_int;
    fn dt_worker_save(save: *const DtWorkerSave, data: *const u8, size: usize, fd: c_int) -> c_int;
    fn dt_worker_copy(save: *const DtWorkerSave, source: *const c_char, source_uid: u32) -> c_int;
    fn dt_worker_duplicate(uid: u32, new_uid: u32) -> c_int;
    fn dt_worker_update_flags(first_uid: u32, last_uid: u32, flags: *const DtWorkerFlags) -> c_int;
    fn dt_worker_expunge(first_uid: u32, last_uid: u32) -> c_int;
    fn dt_worker_commit(saved: extern "C" fn(u32, u32, *mut c_void), context: *mut c_void) -> c_int;
    fn dt_worker_body_open(uid: u32, guid: *const c_char) -> c_int;
    fn dt_worker_body_read(buffer: *mut u8, size: usize) -> isize;
    fn dt_worker_body_close();
}

/// What of Dovecot's storage is open; there is only one in the process, as there is only one in worker.c.
struct DovecotStorage {
    locked_user: Option<String>,
    user_open: bool,
    /// Locks are waited for only briefly.
    is_brief: bool,
    /// Names of the user's mailboxes, as they were when they were last listed.
    names: HashMap<Guid, String>,
    /// GUIDs that none of them had: what the peers tell of, they knew of before the job began.
    missing: HashSet<Guid>,
    mailbox_open: bool,
    body_open: bool,
}

/// Spans arrive in the middle of our own calls.
struct Spans {
    applying: Vec<proto::SeqOf>,
    spans: Vec<proto::Span>,
    /// The mailbox that gets another GUID is none that becomes another one.
    made_anew: bool,
}

/// Locks a user against other workers: one byte of this file each, by an open file description lock, which the kernel
/// drops with the process. Users that share a byte merely wait for each other.
static LOCK_FILE: OnceLock<File> = OnceLock::new();

/// Opens it, while the process may.
fn open_lock_file(path: &Path) -> std::result::Result<(), String> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| format!("{}: open() failed: {error}", path.display()))?;
    LOCK_FILE.get_or_init(|| file);
    Ok(())
}

fn set_user_lock(user: &str, kind: c_int) -> std::io::Result<()> {
    let Some(file) = LOCK_FILE.get() else { return Err(ErrorKind::NotFound.into()) };
    let mut hasher = DefaultHasher::new();
    user.hash(&mut hasher);
    // SAFETY: a plain struct of integers.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = (hasher.finish() >> 2) as libc::off_t;
    lock.l_len = 1;
    // SAFETY: an open file and a lock that lives during the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

struct Worker {
    connection: Connection<UnixStream>,
    jobs: Jobs,
    storage: DovecotStorage,
}

thread_local! {
    static WORKER: RefCell<Option<Worker>> = const { RefCell::new(None) };
    static SPANS: RefCell<Spans> = const { RefCell::new(Spans { applying: Vec::new(), spans: Vec::new(), made_anew: false }) };
}

// ---- Called by the shim ---------------------------------------------------------------------------------------------

/// Reads the settings, while the process may. 0 if ok; otherwise it was logged what is wrong.
#[no_mangle]
extern "C" fn dt_rs_worker_configure() -> c_int {
    guard("worker_configure", -1, || {
        let plugins = match read(std::ptr::null_mut()) {
            Ok(settings) => {
                let _ = STATE_DIR.set((owner(&settings.state_dir), settings.state_dir));
                if let Err(error) = open_lock_file(&settings.worker_socket.with_extension("lock")) {
                    log::error!("{error} - changes of other servers are not applied");
                    return -1;
                }
                settings.worker_plugins.join(" ")
            }
            Err(errors) => {
                for error in errors {
                    log::error!("{error} - changes of other servers are not applied");
                }
                return -1;
            }
        };
        let Ok(plugins) = c_string(&plugins) else { return -1 };
        // SAFETY: a string, which is copied.
        unsafe { dt_worker_allow_plugins(plugins.as_ptr()) };
        0
    })
}

/// Whether it is the relay that has connected: root, or the owner of its journal's folder. Whatever the mode of our socket is, nobody else may
/// have mail read and changed. What is wrong is logged once.
#[no_mangle]
extern "C" fn dt_rs_worker_is_relay(fd: c_int) -> bool {
    guard("worker_is_relay", false, || {
        let uid = uid_of(&fd);
        let relay = STATE_DIR.get().and_then(|(owner_then, dir)| owner(dir).or(*owner_then));
        let is_relay = uid == 0 || relay == Some(uid);
        if !is_relay && !HAS_TURNED_AWAY.swap(true, Ordering::Relaxed) {
            log::error!(
                "A process of system user {uid} wants to be served, which only root and the relay's own user may: look at the \
                 unix_listener of service dovetail-worker."
            );
        }
        is_relay
    })
}

fn owner(folder: &Path) -> Option<u32> {
    std::fs::metadata(folder).ok().map(|folder| folder.uid())
}

/// A connection from the relay begins; there is none so far.
#[no_mangle]
extern "C" fn dt_rs_worker_connected(fd: c_int) {
    guard("worker_connected", (), || {
        // SAFETY: the shim gives the fd away.
        let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let ready = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_read_timeout(Some(RELAY_TIMEOUT)))
            .and_then(|()| stream.set_write_timeout(Some(RELAY_TIMEOUT)));
        let worker = Worker {
            connection: Connection::new(stream),
            jobs: Jobs::default(),
            storage: DovecotStorage {
                locked_user: None,
                user_open: false,
                is_brief: false,
                names: HashMap::new(),
                missing: HashSet::new(),
                mailbox_open: false,
                body_open: false,
            },
        };
        WORKER.with_borrow_mut(|slot| *slot = Some(worker));
        if let Err(error) = ready {
            log::error!("relay connection: cannot set it up: {error} - closing it");
            disconnect();
        }
    })
}

/// There is input from the relay, or its end.
#[no_mangle]
extern "C" fn dt_rs_worker_input() {
    let open = catch("worker_input", || {
        WORKER.with_borrow_mut(|slot| match slot {
            Some(worker) => worker.input(),
            None => false,
        })
    });
    if open.is_none() {
        // Who knows in what state the panic left the storage: the next job is another process's.
        super::log::stop_process();
    }
    if open != Some(true) {
        guard("worker_input", (), disconnect);
    }
}

/// The process ends.
#[no_mangle]
extern "C" fn dt_rs_worker_disconnect() {
    guard("worker_disconnect", (), disconnect)
}

/// One of our commits has written something.
///
/// # Safety
/// The span is valid during the call.
#[no_mangle]
unsafe extern "C" fn dt_rs_worker_span(span: *const ffi::DtSpan) {
    guard("worker_span", (), || {
        // SAFETY: the caller's.
        let span = unsafe { &*span };
        // SAFETY: as above.
        let record = unsafe { span.written(text(span.user).into()) }.to_span();
        SPANS.with_borrow_mut(|spans| {
            let untold = span.touched != 0 || (spans.made_anew && span.old_mailbox_guid != [0; 16]);
            // What was found in the mailbox is not what we apply.
            let applied = if untold { Vec::new() } else { spans.applying.clone() };
            spans.spans.push(proto::Span { applied, untold, ..record });
        });
    })
}

fn disconnect() {
    let worker = WORKER.with_borrow_mut(Option::take);
    if let Some(mut worker) = worker {
        worker.storage.close_user();
        worker.storage.unlock_user();
        // The fd is watched: first that ends, then it is closed.
        // SAFETY: on the main thread, once per connection.
        unsafe { dt_worker_connection_closed() };
        drop(worker);
    }
}

impl Worker {
    /// False at the connection's end.
    fn input(&mut self) -> bool {
        let result = self.connection.fill().and_then(|open| {
            while let Some(kind) = self.connection.next_frame()? {
                self.jobs.handle(&mut self.storage, &mut self.connection, kind)?;
            }
            Ok(open)
        });
        match result {
            // The next job is another process's.
            // SAFETY: it only reads.
            Ok(_) if self.jobs.has_failed() || unsafe { dt_uidlist_may_have_left_lock() } => {
                super::log::stop_process();
                false
            }
            Ok(open) => open,
            Err(error) if connection::is_end(&error) => {
                log::debug!("relay connection: {error}: the relay has ended, and says why - closing it");
                false
            }
            Err(error) => {
                log::error!("relay connection: {error} - closing it");
                false
            }
        }
    }
}

// ---- Conversions ----------------------------------------------------------------------------------------------------

/// 0: there is none that matters.
pub(super) fn storage_separator(separator: c_char) -> Option<char> {
    Some(char::from(separator as u8)).filter(|separator| *separator != '\0')
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| "malformed text: it has a NUL character".into())
}

/// A NULL-terminated list of strings.
pub(super) struct StringList {
    _strings: Vec<CString>,
    pointers: Vec<*const c_char>,
}

impl StringList {
    pub(super) fn new(texts: &[String]) -> Result<StringList> {
        let strings = texts.iter().map(|t| c_string(t)).collect::<Result<Vec<_>>>()?;
        let mut pointers: Vec<_> = strings.iter().map(|s| s.as_ptr()).collect();
        pointers.push(std::ptr::null());
        Ok(StringList { _strings: strings, pointers })
    }

    pub(super) fn as_ptr(&self) -> *const *const c_char {
        self.pointers.as_ptr()
    }
}

impl From<&Update> for DtMailboxUpdate {
    fn from(update: &Update) -> Self {
        DtMailboxUpdate {
            guid: update.guid,
            uid_validity: update.uid_validity,
            min_uid_next: update.min_uid_next,
            min_highest_modseq: update.min_highest_modseq,
        }
    }
}

/// What the shim's functions return.
fn check(ret: c_int) -> Result<bool> {
    match ret {
        0 => Ok(false),
        ret if ret > 0 => Ok(true),
        // SAFETY: a string that is valid until the next call.
        _ => Err(text(unsafe { dt_worker_error() })),
    }
}

extern "C" fn collect_saved(first_uid: u32, last_uid: u32, context: *mut c_void) {
    guard("saved", (), || {
        // SAFETY: commit() passes its Vec.
        let saved = unsafe { &mut *context.cast::<Vec<u32>>() };
        saved.extend(first_uid..=last_uid);
    });
}

extern "C" fn tell_guid(uid: u32, guid: *const c_char, context: *mut c_void) {
    guard("guids", (), || {
        // SAFETY: guids() passes its closure, the shim a string.
        let (each, guid) = unsafe { (&mut *context.cast::<&mut dyn FnMut(u32, &str)>(), text(guid)) };
        each(uid, &guid);
    });
}

extern "C" fn collect_text(string: *const c_char, context: *mut c_void) {
    // SAFETY: the caller passes its Vec, the shim a string.
    guard("text", (), || unsafe { (&mut *context.cast::<Vec<String>>()).push(text(string)) });
}

extern "C" fn collect_listed(listed: *const DtListed, context: *mut c_void) {
    guard("listed", (), || {
        // SAFETY: mailboxes() passes its Vec, the shim a valid struct.
        let (all, listed) = unsafe { (&mut *context.cast::<Vec<Listed>>(), &*listed) };
        all.push(Listed {
            vname: text(listed.vname),
            guid: listed.guid,
            uid_validity: listed.uid_validity,
            subscription_changed: listed.subscription_changed,
        });
    });
}

/// So often the mailboxes are listed when one vanishes each time.
const LISTINGS_MAX: u32 = 3;

/// Logs are rotated long before they are that long.
const LOG_BYTES_MAX: u64 = 256 << 20;

pub(super) fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    File::open(path)?.take(LOG_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Calls `f` with the message as the shim knows it.
fn with_save<T>(message: &NewMessage, f: impl FnOnce(&DtWorkerSave) -> T) -> Result<T> {
    let guid = c_string(message.guid)?;
    let keywords = StringList::new(message.keywords)?;
    Ok(f(&DtWorkerSave {
        guid: guid.as_ptr(),
        uid: message.uid,
        flags: message.flags,
        keywords: keywords.as_ptr(),
        received_date: message.received_date,
        save_date: message.save_date,
    }))
}

impl DovecotStorage {
    fn need_user(&self) -> Result<()> {
        match self.user_open {
            true => Ok(()),
            false => Err("no user is open".into()),
        }
    }

    fn need_mailbox(&self) -> Result<()> {
        match self.mailbox_open {
            true => Ok(()),
            false => Err("no mailbox is open".into()),
        }
    }

    fn list_guids(&mut self) -> Result<()> {
        // A mailbox that is renamed meanwhile may be met under neither name.
        for _ in 0..LISTINGS_MAX {
            let mut listed: Vec<Listed> = Vec::new();
            // SAFETY: a user is open; the callback gets the Vec only during the call.
            let all = check(unsafe { dt_worker_list_guids(collect_listed, (&raw mut listed).cast()) })?;
            self.names = listed.into_iter().map(|listed| (listed.guid, listed.vname)).collect();
            if all {
                return Ok(());
            }
        }
        Ok(())
    }
}

// Each function checks that what the shim takes for granted is open, and passes strings that live during the call.
impl Storage for DovecotStorage {
    fn lock_user(&mut self, user: &str) -> Result<bool> {
        self.unlock_user();
        match set_user_lock(user, libc::F_WRLCK) {
            Ok(()) => {
                self.locked_user = Some(user.to_owned());
                Ok(true)
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            Err(error) => Err(format!("locking the user failed: {error}")),
        }
    }

    fn unlock_user(&mut self) {
        if let Some(user) = self.locked_user.take() {
            if let Err(error) = set_user_lock(&user, libc::F_UNLCK) {
                log::error!("user {user}: unlocking failed: {error}");
            }
        }
    }

    fn wait_briefly(&mut self, is_brief: bool) {
        self.is_brief = is_brief;
    }

    fn open_user(&mut self, user: &str) -> Result<bool> {
        self.close_user();
        let user = c_string(user)?;
        // SAFETY: no user is open.
        self.user_open = check(unsafe { dt_worker_user_open(user.as_ptr(), self.is_brief) })?;
        Ok(self.user_open)
    }

    fn users(&mut self) -> Result<Vec<String>> {
        self.close_user();
        let mut users: Vec<String> = Vec::new();
        // SAFETY: no user is open; the callback gets the Vec only during the call.
        check(unsafe { dt_worker_users(collect_text, (&raw mut users).cast()) })?;
        Ok(users)
    }

    fn was_written_since(&mut self, user: &str, since: i64) -> Result<bool> {
        self.need_user()?;
        let user = c_string(user)?;
        // SAFETY: a user is open.
        check(unsafe { dt_worker_was_written_since(user.as_ptr(), since) })
    }

    fn user_peers(&self) -> Result<proto::UserPeers> {
        self.need_user()?;
        // SAFETY: a user is open.
        let user = unsafe { dt_worker_user() };
        let settings = read(user).map_err(|errors| errors.join("; "))?;
        // SAFETY: it only returns a number. Opening the user has made it his.
        let uid = unsafe { libc::geteuid() };
        Ok(proto::UserPeers { uid: Some(uid), ..settings.user_peers() })
    }

    fn close_user(&mut self) {
        self.body_open = false;
        self.mailbox_open = false;
        self.user_open = false;
        self.names.clear();
        self.missing.clear();
        // SAFETY: closes what there is.
        unsafe { dt_worker_user_close() }
    }

    fn namespace(&self) -> Result<Namespace> {
        self.need_user()?;
        let mut foreign: Vec<String> = Vec::new();
        // SAFETY: a user is open; the prefix lives as long, and the callback gets the Vec only during the call.
        unsafe {
            dt_worker_foreign_prefixes(collect_text, (&raw mut foreign).cast());
            Ok(Namespace {
                prefix: text(dt_worker_namespace_prefix()),
                separator: char::from(dt_worker_namespace_separator() as u8),
                storage_separator: storage_separator(dt_worker_namespace_storage_separator()),
                foreign,
            })
        }
    }

    fn inbox_guid(&self) -> Result<Guid> {
        self.need_user()?;
        let mut guid = [0; 16];
        // SAFETY: a user is open; there is room for a GUID.
        unsafe { dt_worker_inbox_guid(guid.as_mut_ptr()) };
        Ok(guid)
    }

    fn temp_file(&mut self) -> Result<File> {
        self.need_user()?;
        // SAFETY: a user is open.
        let fd = unsafe { dt_worker_temp_file() };
        check(if fd < 0 { -1 } else { 1 })?;
        // SAFETY: the shim gives the fd away.
        Ok(unsafe { File::from_raw_fd(fd) })
    }

    fn existence(&mut self, vname: &str) -> Result<Existence> {
        self.need_user()?;
        let vname = c_string(vname)?;
        let mut existence = 0;
        // SAFETY: a user is open.
        check(unsafe { dt_worker_existence(vname.as_ptr(), &mut existence) })?;
        Ok(match existence {
            0 => Existence::None,
            1 => Existence::Directory,
            _ => Existence::Mailbox,
        })
    }

    fn find_guid(&mut self, guid: &Guid) -> Result<Option<String>> {
        self.need_user()?;
        if let Some(vname) = self.names.get(guid) {
            let (c_vname, mut has) = (c_string(vname)?, [0; 16]);
            // SAFETY: a user is open; there is room for a GUID.
            if check(unsafe { dt_worker_guid_of(c_vname.as_ptr(), has.as_mut_ptr()) })? && has == *guid {
                return Ok(Some(vname.clone()));
            }
        }
        if self.missing.contains(guid) {
            return Ok(None);
        }
        // It may have been created, or have got this name, since.
        self.list_guids()?;
        let vname = self.names.get(guid).cloned();
        if vname.is_none() {
            self.missing.insert(*guid);
        }
        Ok(vname)
    }

    fn create(&mut self, vname: &str, directory: bool, update: &Update) -> Result<bool> {
        self.need_user()?;
        self.missing.clear();
        let vname = c_string(vname)?;
        // SAFETY: a user is open.
        check(unsafe { dt_worker_create(vname.as_ptr(), directory, &update.into()) })
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<bool> {
        self.need_user()?;
        self.missing.clear();
        let (from, to) = (c_string(from)?, c_string(to)?);
        // SAFETY: a user is open.
        check(unsafe { dt_worker_rename(from.as_ptr(), to.as_ptr()) })
    }

    fn delete(&mut self, vname: &str) -> Result<bool> {
        self.need_user()?;
        let vname = c_string(vname)?;
        // SAFETY: a user is open.
        check(unsafe { dt_worker_delete(vname.as_ptr()) })
    }

    fn delete_empty(&mut self, vname: &str) -> Result<bool> {
        self.need_user()?;
        let vname = c_string(vname)?;
        // SAFETY: a user is open.
        check(unsafe { dt_worker_delete_empty(vname.as_ptr()) })
    }

    fn set_subscribed(&mut self, vname: &str, subscribed: bool) -> Result<()> {
        self.need_user()?;
        let vname = c_string(vname)?;
        // SAFETY: a user is open.
        check(unsafe { dt_worker_set_subscribed(vname.as_ptr(), subscribed) }).map(drop)
    }

    fn open(&mut self, vname: &str, readonly: bool) -> Result<bool> {
        self.need_user()?;
        let vname = c_string(vname)?;
        self.mailbox_open = false;
        self.body_open = false;
        // SAFETY: a user is open.
        self.mailbox_open = check(unsafe { dt_worker_open(vname.as_ptr(), readonly) })?;
        Ok(self.mailbox_open)
    }

    fn close(&mut self) {
        self.mailbox_open = false;
        self.body_open = false;
        // SAFETY: closes what there is.
        unsafe { dt_worker_close() }
    }

    fn sync(&mut self) -> Result<()> {
        self.need_mailbox()?;
        // SAFETY: a mailbox is open.
        check(unsafe { dt_worker_sync() }).map(drop)
    }

    fn status(&mut self) -> Status {
        if !self.mailbox_open {
            return Status::default();
        }
        let mut status = DtMailboxStatus::default();
        // SAFETY: a mailbox is open.
        unsafe { dt_worker_status(&mut status) };
        Status {
            guid: status.guid,
            uid_validity: status.uid_validity,
            uid_next: status.uid_next,
            messages: status.messages,
            highest_modseq: status.highest_modseq,
        }
    }

    fn update(&mut self, update: &Update) -> Result<()> {
        self.need_mailbox()?;
        let guid = &update.guid;
        // If it had this GUID before, it lost it with its index.
        let made_anew = *guid != [0; 16] && self.find_guid(guid)?.is_none() && !self.was_deleted(guid)?;
        SPANS.with_borrow_mut(|spans| spans.made_anew = made_anew);
        self.missing.clear();
        // SAFETY: a mailbox is open.
        let updated = check(unsafe { dt_worker_update(&update.into()) });
        SPANS.with_borrow_mut(|spans| spans.made_anew = false);
        updated.map(drop)
    }

    fn uids(&mut self) -> Result<Vec<u32>> {
        self.need_mailbox()?;
        let mut uids: Vec<u32> = Vec::new();
        // SAFETY: a mailbox is open; the callback gets the Vec only during the call.
        unsafe { dt_worker_uids(collect_saved, (&raw mut uids).cast()) };
        Ok(uids)
    }

    fn message_guid(&mut self, uid: u32) -> Result<Option<String>> {
        self.need_mailbox()?;
        let mut guid = std::ptr::null();
        // SAFETY: a mailbox is open; the GUID is valid until the next call.
        unsafe { Ok(check(dt_worker_message_guid(uid, &mut guid))?.then(|| text(guid))) }
    }

    fn guids(&mut self, first_uid: u32, mut each: &mut dyn FnMut(u32, &str)) -> Result<()> {
        self.need_mailbox()?;
        // SAFETY: a mailbox is open; the callback gets the closure only during the call.
        check(unsafe { dt_worker_guids(first_uid, tell_guid, (&raw mut each).cast()) }).map(drop)
    }

    fn find_messages(&mut self, guid: &str) -> Result<Vec<u32>> {
        self.need_mailbox()?;
        let guid = c_string(guid)?;
        let mut uids: Vec<u32> = Vec::new();
        // SAFETY: a mailbox is open; the callback gets the Vec only during the call.
        check(unsafe { dt_worker_find_messages(guid.as_ptr(), collect_saved, (&raw mut uids).cast()) })?;
        Ok(uids)
    }

    fn was_expunged(&mut self, uid: u32, guid: &str) -> Result<bool> {
        self.need_mailbox()?;
        let guid = c_string(guid)?;
        // SAFETY: a mailbox is open.
        check(unsafe { dt_worker_was_expunged(uid, guid.as_ptr()) })
    }

    fn save(&mut self, message: &NewMessage, body: Body) -> Result<()> {
        self.need_mailbox()?;
        let (bytes, fd) = match body {
            Body::Bytes(bytes) => (bytes, -1),
            Body::File(file) => (&[][..], file.as_raw_fd()),
        };
        // SAFETY: a mailbox is open; bytes and fd live during the call.
        let ret = with_save(message, |save| unsafe { dt_worker_save(save, bytes.as_ptr(), bytes.len(), fd) })?;
        check(ret).map(drop)
    }

    fn copy(&mut self, message: &NewMessage, source: &str, source_uid: u32) -> Result<bool> {
        self.need_mailbox()?;
        let source = c_string(source)?;
        // SAFETY: a mailbox is open.
        check(with_save(message, |save| unsafe { dt_worker_copy(save, source.as_ptr(), source_uid) })?)
    }

    fn duplicate(&mut self, uid: u32, new_uid: u32) -> Result<bool> {
        self.need_mailbox()?;
        // SAFETY: a mailbox is open.
        check(unsafe { dt_worker_duplicate(uid, new_uid) })
    }

    fn update_flags(&mut self, first_uid: u32, last_uid: u32, update: &proto::FlagUpdate) -> Result<()> {
        self.need_mailbox()?;
        let add_keywords = StringList::new(&update.add_keywords)?;
        let remove_keywords = StringList::new(&update.remove_keywords)?;
        let flags = DtWorkerFlags {
            add: update.add,
            remove: update.remove,
            add_keywords: add_keywords.as_ptr(),
            remove_keywords: remove_keywords.as_ptr(),
        };
        // SAFETY: a mailbox is open.
        check(unsafe { dt_worker_update_flags(first_uid, last_uid, &flags) }).map(drop)
    }

    fn expunge(&mut self, first_uid: u32, last_uid: u32) -> Result<()> {
        self.need_mailbox()?;
        // SAFETY: a mailbox is open.
        check(unsafe { dt_worker_expunge(first_uid, last_uid) }).map(drop)
    }

    fn commit(&mut self) -> Result<Vec<u32>> {
        self.need_mailbox()?;
        let mut saved: Vec<u32> = Vec::new();
        // SAFETY: a mailbox is open; the callback gets the Vec only during the call.
        check(unsafe { dt_worker_commit(collect_saved, (&raw mut saved).cast()) })?;
        Ok(saved)
    }

    fn mailboxes(&mut self, since: i64) -> Result<Vec<Listed>> {
        self.need_user()?;
        let mut listed: Vec<Listed> = Vec::new();
        // SAFETY: a user is open; the callback gets the Vec only during the call.
        check(unsafe { dt_worker_list(since, collect_listed, (&raw mut listed).cast()) })?;
        Ok(listed)
    }

    fn subscribed(&mut self, since: i64) -> Result<Vec<Listed>> {
        self.need_user()?;
        let mut listed: Vec<Listed> = Vec::new();
        // SAFETY: as above.
        check(unsafe { dt_worker_list_subscribed(since, collect_listed, (&raw mut listed).cast()) })?;
        Ok(listed)
    }

    fn deletions(&mut self, guid: &Guid) -> Result<u32> {
        self.need_user()?;
        let mut count = 0;
        // SAFETY: a user is open; a GUID has 16 bytes.
        check(unsafe { dt_worker_deletions(guid.as_ptr(), &raw mut count) })?;
        Ok(count)
    }

    fn log_files(&mut self) -> Result<Vec<Vec<u8>>> {
        self.need_mailbox()?;
        // SAFETY: a mailbox is open, and the path lives as long.
        let path = text(unsafe { dt_worker_log_path() });
        // The newer one first: what is rotated meanwhile is then there twice, and not missing.
        let mut files = Vec::new();
        for path in [path.clone(), format!("{path}.2")] {
            match read_bounded(Path::new(&path)) {
                Ok(bytes) => files.push(bytes),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(format!("{path}: {error}")),
            }
        }
        files.reverse();
        Ok(files)
    }

    fn message_info(&mut self, uid: u32) -> Result<Option<MessageInfo>> {
        self.need_mailbox()?;
        let mut info = DtMessageInfo {
            guid: std::ptr::null(),
            guid_128: [0; 16],
            received_date: 0,
            save_date: 0,
            size: 0,
            is_stray: false,
        };
        // SAFETY: a mailbox is open; the GUID is valid until the next call.
        let found = check(unsafe { dt_worker_message_info(uid, &raw mut info) })?;
        Ok(found.then(|| MessageInfo {
            guid: text(info.guid),
            guid_128: info.guid_128,
            received_date: info.received_date,
            save_date: info.save_date,
            size: info.size,
            is_stray: info.is_stray,
        }))
    }

    fn is_torn_when_killed(&self) -> bool {
        // SAFETY: a mailbox is open.
        self.mailbox_open && unsafe { dt_worker_is_maildir() }
    }

    fn is_saved_alone(&mut self, guid: &str) -> Result<bool> {
        self.need_mailbox()?;
        let guid = c_string(guid)?;
        // SAFETY: a mailbox is open.
        Ok(unsafe { dt_worker_is_saved_alone(guid.as_ptr()) })
    }

    fn message_flags(&mut self, uid: u32) -> Result<Option<(u32, Vec<String>)>> {
        self.need_mailbox()?;
        let (mut flags, mut keywords) = (0, std::ptr::null());
        // SAFETY: a mailbox is open; the keywords are valid until the next call.
        let found = check(unsafe { dt_worker_message_flags(uid, &raw mut flags, &raw mut keywords) })?;
        Ok(found.then(|| (flags, text(keywords).split_whitespace().map(str::to_owned).collect())))
    }

    fn stray(&mut self, guid: &str) -> Result<Option<u32>> {
        self.need_mailbox()?;
        let guid = c_string(guid)?;
        let mut uid = 0;
        // SAFETY: a mailbox is open.
        let found = check(unsafe { dt_worker_stray(guid.as_ptr(), &raw mut uid) })?;
        Ok(found.then_some(uid))
    }

    fn may_be_ours(&mut self, uid: u32, guid: &str) -> Result<bool> {
        self.need_mailbox()?;
        let guid = c_string(guid)?;
        // SAFETY: a mailbox is open.
        Ok(unsafe { !dt_worker_is_maildir() || dt_worker_may_be_ours(uid, guid.as_ptr()) })
    }

    fn adopt(&mut self, uid: u32, guid: &str) -> Result<()> {
        self.need_mailbox()?;
        let guid = c_string(guid)?;
        // SAFETY: a mailbox is open, and stray() found the message in it.
        check(unsafe { dt_worker_adopt(uid, guid.as_ptr()) }).map(drop)
    }

    fn mark(&mut self) -> Result<[u8; MARK_BYTES]> {
        self.need_mailbox()?;
        let mut mark = [0; MARK_BYTES];
        // SAFETY: a mailbox is open; the array is as long as told.
        unsafe { dt_worker_mark_read(mark.as_mut_ptr()) };
        Ok(mark)
    }

    fn write_mark(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.need_mailbox()?;
        if offset + bytes.len() > MARK_BYTES {
            return Err("a mark beyond its place".into());
        }
        // SAFETY: a mailbox is open, the bytes are copied and fit.
        unsafe { dt_worker_mark_write(offset as u32, bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn body_open(&mut self, uid: u32, guid: &str) -> Result<bool> {
        self.need_mailbox()?;
        let guid = c_string(guid)?;
        // SAFETY: a mailbox is open.
        self.body_open = check(unsafe { dt_worker_body_open(uid, guid.as_ptr()) })?;
        Ok(self.body_open)
    }

    fn body_read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        if !self.body_open {
            return Err("no body is open".into());
        }
        // SAFETY: a body is open; the buffer is as long as told.
        let ret = unsafe { dt_worker_body_read(buffer.as_mut_ptr(), buffer.len()) };
        check(if ret < 0 { -1 } else { 1 })?;
        Ok(ret as usize)
    }

    fn body_close(&mut self) {
        self.body_open = false;
        // SAFETY: closes what there is.
        unsafe { dt_worker_body_close() }
    }

    fn applying(&mut self, changes: &[proto::SeqOf]) {
        SPANS.with_borrow_mut(|spans| spans.applying = changes.to_vec());
    }

    fn take_spans(&mut self) -> Vec<proto::Span> {
        SPANS.with_borrow_mut(|spans| std::mem::take(&mut spans.spans))
    }
}
