//! Reads the settings through src/shim/settings.c.

use super::ffi;
use crate::guard::guard;
use crate::settings::Settings;
use crate::wire::proto::UserPeers;
use std::ffi::{c_char, c_void, CStr};

/// The settings of a user (a `struct mail_user`), or of this process if it is null.
///
/// # Errors
///
/// Full sentences: what Dovecot said, or everything that is wrong.
pub fn read(user: *mut c_void) -> Result<Settings, Vec<String>> {
    let values = values(user)?;
    match user.is_null() {
        true => Settings::parse(&values, &hostname()),
        false => Settings::parse_of_user(&values, &hostname()),
    }
}

/// One setting of this process, unchecked; empty if it is not set.
///
/// # Errors
///
/// As [`read`].
pub fn value(name: &str) -> Result<String, Vec<String>> {
    let found = values(std::ptr::null_mut())?.into_iter().rev().find(|(found, _)| found == name);
    Ok(found.map(|(_, value)| value).unwrap_or_default())
}

fn values(user: *mut c_void) -> Result<Vec<(String, String)>, Vec<String>> {
    let mut values: Vec<(String, String)> = Vec::new();
    let mut error: *const c_char = std::ptr::null();
    // SAFETY: `collect` gets the address of `values` back, during this call only.
    let ret = unsafe { ffi::dt_settings_each(user, collect, (&raw mut values).cast(), &raw mut error) };
    match ret < 0 {
        true => Err(vec![format!("Can't read settings: {}", text(error))]),
        false => Ok(values),
    }
}

impl Settings {
    /// With whom this user's mail is replicated.
    pub fn user_peers(&self) -> UserPeers {
        UserPeers { all: self.user_peers.is_none(), servers: self.user_peers.clone().unwrap_or_default(), uid: None }
    }

    /// Nothing of this user is replicated.
    pub fn has_no_peers(&self) -> bool {
        self.user_peers.as_ref().map_or(self.peers.is_empty(), Vec::is_empty)
    }
}

extern "C" fn collect(context: *mut c_void, name: *const c_char, value: *const c_char) {
    guard("setting", (), || {
        // SAFETY: `values` passes the address of its vector, which nobody else uses meanwhile.
        let values = unsafe { &mut *context.cast::<Vec<(String, String)>>() };
        values.push((text(name), text(value)));
    });
}

/// An owned copy of a C string; bytes that are not UTF-8 are replaced. NULL is empty.
pub fn text(string: *const c_char) -> String {
    if string.is_null() {
        return String::new();
    }
    // SAFETY: the shim's strings are NUL-terminated and valid during the call.
    unsafe { CStr::from_ptr(string) }.to_string_lossy().into_owned()
}

fn hostname() -> String {
    let mut buffer = [0u8; 256];
    // SAFETY: the length is the buffer's; the last byte stays 0.
    let ret = unsafe { libc::gethostname(buffer.as_mut_ptr().cast(), buffer.len() - 1) };
    if ret != 0 {
        return String::new();
    }
    CStr::from_bytes_until_nul(&buffer).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
