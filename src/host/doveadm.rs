//! The entries from src/shim/doveadm.c: asks the relay, hands rows to C.

use super::ffi;
use super::settings::read;
use crate::guard::guard;
use crate::relay::client;
use std::ffi::{c_char, c_int, c_void, CString};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(10);

#[no_mangle]
extern "C" fn dt_rs_status(
    row: extern "C" fn(*mut c_void, *const ffi::DtStatusRow),
    context: *mut c_void,
    error: *mut c_char,
    error_size: usize,
) -> c_int {
    let result = guard("doveadm dovetail status", Err("Internal error, see above".to_owned()), || {
        let settings = read(std::ptr::null_mut()).map_err(|errors| errors.join("; "))?;
        client::status(&settings.socket, TIMEOUT)
    });
    match result {
        Ok(status) => {
            let failed = status.counters.as_ref().map_or(0, |counters| counters.failed);
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
                    failed,
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
