//! The entries from src/shim/doveadm.c: asks the relay, hands rows to C.

use super::ffi;
use super::settings::{read, text, value};
use crate::change;
use crate::guard::guard;
use crate::relay::client;
use crate::tls::authority;
use crate::wire::proto::{Lack, NamedCount, Progress};
use std::ffi::{c_char, c_int, c_void, CString};
use std::path::{Path, PathBuf};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(10);

/// `user`: NULL: of all users.
///
/// # Safety
/// `user` is NUL-terminated or null.
#[no_mangle]
unsafe extern "C" fn dt_rs_status(
    user: *const c_char,
    row: extern "C" fn(*mut c_void, *const ffi::DtStatusRow),
    context: *mut c_void,
    error: *mut c_char,
    error_size: usize,
) -> c_int {
    let result = guard("doveadm dovetail status", Err("Internal error, see above".to_owned()), || {
        let settings = read(std::ptr::null_mut()).map_err(|errors| errors.join("; "))?;
        let user = (!user.is_null()).then(|| text(user));
        client::status(&settings.socket, user.as_deref(), TIMEOUT)
    });
    match result {
        Ok(status) => {
            let counters = status.counters.unwrap_or_default();
            let conflicts = c_string(&conflicts(&counters.notes));
            for peer in &status.peers {
                let (name, state, last_error) =
                    (c_string(&peer.peer), c_string(&peer.state), c_string(&peer.last_error));
                let values = ffi::DtStatusRow {
                    peer: name.as_ptr(),
                    state: state.as_ptr(),
                    last_error: last_error.as_ptr(),
                    pending: peer.pending,
                    behind_secs: peer.behind_secs,
                    dropped: peer.dropped,
                    process_dropped: counters.dropped_by_processes,
                    unacknowledged: counters.unacknowledged,
                    failed: counters.failed,
                    conflicts: conflicts.as_ptr(),
                };
                row(context, &raw const values);
            }
            0
        }
        Err(message) => {
            copy_out(&message, error, error_size);
            -1
        }
    }
}

#[no_mangle]
extern "C" fn dt_rs_failed(
    row: extern "C" fn(*mut c_void, *const ffi::DtFailedRow),
    context: *mut c_void,
    error: *mut c_char,
    error_size: usize,
) -> c_int {
    let result = guard("doveadm dovetail failed", Err("Internal error, see above".to_owned()), || {
        let settings = read(std::ptr::null_mut()).map_err(|errors| errors.join("; "))?;
        client::failed(&settings.socket, TIMEOUT)
    });
    match result {
        Ok(entries) => {
            for entry in &entries {
                let guid: String = entry.mailbox_guid.iter().map(|byte| format!("{byte:02x}")).collect();
                let (peer, user, guid, text) =
                    (c_string(&entry.peer), c_string(&entry.user), c_string(&guid), c_string(&entry.error));
                let values = ffi::DtFailedRow {
                    peer: peer.as_ptr(),
                    user: user.as_ptr(),
                    mailbox_guid: guid.as_ptr(),
                    error: text.as_ptr(),
                    seq: entry.seq,
                    since: entry.at_us / 1_000_000,
                };
                row(context, &raw const values);
            }
            0
        }
        Err(message) => {
            copy_out(&message, error, error_size);
            -1
        }
    }
}

#[no_mangle]
extern "C" fn dt_rs_waiting(
    row: extern "C" fn(*mut c_void, *const ffi::DtWaitingRow),
    context: *mut c_void,
    error: *mut c_char,
    error_size: usize,
) -> c_int {
    let result = guard("doveadm dovetail waiting", Err("Internal error, see above".to_owned()), || {
        let settings = read(std::ptr::null_mut()).map_err(|errors| errors.join("; "))?;
        client::waiting(&settings.socket, TIMEOUT)
    });
    match result {
        Ok(entries) => {
            for entry in &entries {
                let (user, peer) = (c_string(&entry.user), c_string(&entry.peer));
                let (what, reason) = (c_string(&entry.what), c_string(&entry.reason));
                let values = ffi::DtWaitingRow {
                    user: user.as_ptr(),
                    peer: peer.as_ptr(),
                    what: what.as_ptr(),
                    reason: reason.as_ptr(),
                    since: entry.since_us / 1_000_000,
                    next_try: entry.next_us / 1_000_000,
                };
                row(context, &raw const values);
            }
            0
        }
        Err(message) => {
            copy_out(&message, error, error_size);
            -1
        }
    }
}

/// `user`: NULL: all users. `bodies`: every mail is read.
///
/// # Safety
/// `user` is NUL-terminated or null.
#[no_mangle]
unsafe extern "C" fn dt_rs_compare(
    user: *const c_char,
    repair: bool,
    bodies: bool,
    row: extern "C" fn(*mut c_void, *const ffi::DtDifferenceRow),
    context: *mut c_void,
    error: *mut c_char,
    error_size: usize,
) -> c_int {
    let result = guard("doveadm dovetail compare", Err("Internal error, see above".to_owned()), || {
        let settings = read(std::ptr::null_mut()).map_err(|errors| errors.join("; "))?;
        let user = (!user.is_null()).then(|| text(user));
        client::compare(&settings.socket, user.as_deref(), (repair, bodies), TIMEOUT, |difference| {
            let (user, peer) = (c_string(&difference.user), c_string(&difference.peer));
            let mailbox = c_string(&change::printable(&difference.path.join("/")));
            let (what, detail) = (c_string(&difference.what), c_string(&difference.detail));
            let values = ffi::DtDifferenceRow {
                user: user.as_ptr(),
                peer: peer.as_ptr(),
                mailbox: mailbox.as_ptr(),
                what: what.as_ptr(),
                detail: detail.as_ptr(),
                uid: difference.uid,
            };
            row(context, &raw const values);
        })
    });
    match result {
        Ok(()) => 0,
        Err(message) => {
            copy_out(&message, error, error_size);
            -1
        }
    }
}

/// # Safety
/// `progress` can be written to.
#[no_mangle]
unsafe extern "C" fn dt_rs_progress(progress: *mut ffi::DtProgress, error: *mut c_char, error_size: usize) -> c_int {
    let result = guard("doveadm dovetail progress", Err("Internal error, see above".to_owned()), || {
        let settings = read(std::ptr::null_mut()).map_err(|errors| errors.join("; "))?;
        client::progress(&settings.socket, TIMEOUT)
    });
    match result {
        Ok(answer) => {
            let values = ffi::DtProgress {
                is_running: answer.is_running,
                users: answer.users,
                users_done: answer.users_done,
                mails: answer.mails,
                mails_done: answer.mails_done,
                secs: answer.elapsed_ms / 1_000,
                mails_per_sec: (answer.mails_done * 1_000).checked_div(answer.elapsed_ms).unwrap_or(0),
                secs_left: secs_left(&answer),
                background_users: answer.background_users,
                background_users_done: answer.background_users_done,
                background_secs_left: answer.background_left_ms / 1_000,
            };
            // SAFETY: the caller's.
            unsafe { *progress = values };
            0
        }
        Err(message) => {
            copy_out(&message, error, error_size);
            -1
        }
    }
}

/// The longest that doveadm can be told to wait: what is longer is meant to be for ever.
const PATIENCE_SECS_MAX: u64 = 365 * 24 * 3600;
/// If it is not said.
const PATIENCE_SECS: u64 = 60;

/// Waits until all peers have applied what was done here until now. `user`: NULL: by all users. `secs`: for how long at most; NULL: as usual.
/// 0: they have. 1: somebody lacks something, and the error says who and what. -1: it could not be asked. -2: `secs` is no number.
///
/// # Safety
/// The strings are NUL-terminated or null.
#[no_mangle]
unsafe extern "C" fn dt_rs_wait(
    user: *const c_char,
    secs: *const c_char,
    error: *mut c_char,
    error_size: usize,
) -> c_int {
    let secs = (!secs.is_null()).then(|| text(secs));
    let Ok(patience) = secs.as_deref().map_or(Ok(PATIENCE_SECS), str::parse) else {
        copy_out("The time-out must be a number of seconds", error, error_size);
        return -2;
    };
    let patience = Duration::from_secs(patience.min(PATIENCE_SECS_MAX));
    let result = guard("doveadm dovetail wait", internal_error(), || {
        let settings = read(std::ptr::null_mut()).map_err(|errors| errors.join("; "))?;
        let user = (!user.is_null()).then(|| text(user));
        client::wait(&settings.socket, user.as_deref(), patience, TIMEOUT)
    });
    let (message, outcome) = match result {
        Ok(lacks) if lacks.is_empty() => return 0,
        Ok(lacks) => (lacks.iter().map(lack).collect::<Vec<_>>().join("; "), 1),
        Err(message) => (message, -1),
    };
    copy_out(&message, error, error_size);
    outcome
}

fn lack(lack: &Lack) -> String {
    let what = match (lack.peer.as_str(), lack.changes) {
        ("", _) => return lack.reason.clone(),
        (peer, 1) => format!("Peer {peer} lacks 1 change"),
        (peer, count) => format!("Peer {peer} lacks {count} changes"),
    };
    if lack.reason.is_empty() {
        what
    } else {
        format!("{what} ({})", lack.reason)
    }
}

/// Forgets a peer that is gone for good; `changes`: how many it had not acknowledged.
///
/// # Safety
/// `peer` is NUL-terminated, `changes` can be written to.
#[no_mangle]
unsafe extern "C" fn dt_rs_peer_remove(
    peer: *const c_char,
    changes: *mut u64,
    error: *mut c_char,
    error_size: usize,
) -> c_int {
    let result = guard("doveadm dovetail peer remove", internal_error(), || {
        let settings = read(std::ptr::null_mut()).map_err(|errors| errors.join("; "))?;
        client::remove_peer(&settings.socket, &text(peer), TIMEOUT)
    });
    match result {
        Ok(count) => {
            // SAFETY: the caller's.
            unsafe { *changes = count };
            0
        }
        Err(message) => {
            copy_out(&message, error, error_size);
            -1
        }
    }
}

/// Lets a peer in again of which there were two.
///
/// # Safety
/// `peer` is NUL-terminated.
#[no_mangle]
unsafe extern "C" fn dt_rs_peer_accept(peer: *const c_char, error: *mut c_char, error_size: usize) -> c_int {
    let result = guard("doveadm dovetail peer accept", internal_error(), || {
        let settings = read(std::ptr::null_mut()).map_err(|errors| errors.join("; "))?;
        client::accept_peer(&settings.socket, &text(peer), TIMEOUT)
    });
    match result {
        Ok(()) => 0,
        Err(message) => {
            copy_out(&message, error, error_size);
            -1
        }
    }
}

/// As long as the rest takes if it goes on as it went: by users, as the mails of those who come are not known yet.
fn secs_left(progress: &Progress) -> u64 {
    let left = progress.users.saturating_sub(progress.users_done);
    (progress.elapsed_ms.saturating_mul(left) / 1_000).checked_div(progress.users_done).unwrap_or(0)
}

/// `user`: NULL: of all users.
///
/// # Safety
/// `user` is NUL-terminated or null, `cleared` can be written to.
#[no_mangle]
unsafe extern "C" fn dt_rs_failed_clear(
    user: *const c_char,
    cleared: *mut u64,
    error: *mut c_char,
    error_size: usize,
) -> c_int {
    let result = guard("doveadm dovetail failed clear", Err("Internal error, see above".to_owned()), || {
        let settings = read(std::ptr::null_mut()).map_err(|errors| errors.join("; "))?;
        let user = (!user.is_null()).then(|| text(user));
        client::clear_failed(&settings.socket, user.as_deref(), TIMEOUT)
    });
    match result {
        Ok(count) => {
            // SAFETY: the caller's.
            unsafe { *cleared = count };
            0
        }
        Err(message) => {
            copy_out(&message, error, error_size);
            -1
        }
    }
}

/// Such as `flags:2,uid:7`; docs/PROTOCOL.md has the rules.
fn conflicts(notes: &[NamedCount]) -> String {
    let kinds =
        notes.iter().filter_map(|note| Some(format!("{}:{}", note.name.strip_suffix("_conflict")?, note.count)));
    kinds.collect::<Vec<_>>().join(",")
}

/// Makes an authority. `folder`: NULL: that of dovetail_ca, or the usual one. Each certificate that was made is a row.
///
/// # Safety
/// `folder` is NUL-terminated or null.
#[no_mangle]
unsafe extern "C" fn dt_rs_cert_init(
    folder: *const c_char,
    row: extern "C" fn(*mut c_void, *const ffi::DtCertRow),
    context: *mut c_void,
    error: *mut c_char,
    error_size: usize,
) -> c_int {
    let result = guard("doveadm dovetail cert init", internal_error(), || authority::init(&authority_folder(folder)?));
    tell_certificates(result, row, context, error, error_size)
}

/// The same for certificates of servers; `names` ends with NULL.
///
/// # Safety
/// As of `dt_rs_cert_init`; `names` are NUL-terminated.
#[no_mangle]
unsafe extern "C" fn dt_rs_cert_issue(
    folder: *const c_char,
    names: *const *const c_char,
    row: extern "C" fn(*mut c_void, *const ffi::DtCertRow),
    context: *mut c_void,
    error: *mut c_char,
    error_size: usize,
) -> c_int {
    let result = guard("doveadm dovetail cert issue", internal_error(), || {
        // SAFETY: the caller's: what is read lies before the NULL, or is it.
        let name = |at: usize| Some(unsafe { *names.add(at) }).filter(|name| !name.is_null());
        let servers: Vec<String> = (0..).map_while(name).map(text).collect();
        authority::issue(&authority_folder(folder)?, &servers)
    });
    tell_certificates(result, row, context, error, error_size)
}

/// Each certificate in the folder is a row.
///
/// # Safety
/// As of `dt_rs_cert_init`.
#[no_mangle]
unsafe extern "C" fn dt_rs_cert_show(
    folder: *const c_char,
    row: extern "C" fn(*mut c_void, *const ffi::DtCertRow),
    context: *mut c_void,
    error: *mut c_char,
    error_size: usize,
) -> c_int {
    let result = guard("doveadm dovetail cert show", internal_error(), || authority::show(&authority_folder(folder)?));
    tell_certificates(result, row, context, error, error_size)
}

fn internal_error<T>() -> Result<T, String> {
    Err("Internal error, see above".into())
}

fn tell_certificates(
    result: Result<Vec<authority::Entry>, String>,
    row: extern "C" fn(*mut c_void, *const ffi::DtCertRow),
    context: *mut c_void,
    error: *mut c_char,
    error_size: usize,
) -> c_int {
    match result {
        Ok(entries) => {
            for entry in &entries {
                let (name, file) = (c_string(&entry.name), c_string(&entry.file.to_string_lossy()));
                let fingerprint = c_string(&entry.fingerprint);
                let values = ffi::DtCertRow {
                    name: name.as_ptr(),
                    fingerprint: fingerprint.as_ptr(),
                    file: file.as_ptr(),
                    not_after: entry.not_after,
                };
                row(context, &raw const values);
            }
            0
        }
        Err(message) => {
            copy_out(&message, error, error_size);
            -1
        }
    }
}

/// Where the authority is: if it is not said, where the settings say. Mistakes in others are no obstacle.
fn authority_folder(said: *const c_char) -> Result<PathBuf, String> {
    if !said.is_null() {
        return Ok(text(said).into());
    }
    let ca = value("dovetail_ca").map_err(|errors| errors.join("; "))?;
    let folder = Path::new(&ca).parent().filter(|folder| folder.is_absolute());
    Ok(folder.unwrap_or(Path::new(authority::FOLDER)).to_owned())
}

fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', " ")).unwrap_or_default()
}

/// Into C's buffer, cut off where it ends.
fn copy_out(message: &str, buffer: *mut c_char, size: usize) {
    let message = c_string(message);
    let bytes = message.as_bytes();
    let length = bytes.len().min(size.saturating_sub(1));
    if size > 0 {
        // SAFETY: C's buffer has `size` bytes; length + 1 fits.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), buffer, length);
            *buffer.add(length) = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conflicts_are_counted_by_kind() {
        let note = |name: &str, count| NamedCount { name: name.into(), count };
        let notes = [note("flags_conflict", 2), note("uid_conflict", 7), note("uid_moved", 9)];
        assert_eq!(conflicts(&notes), "flags:2,uid:7");
        assert_eq!(conflicts(&[]), "");
    }
}
