//! What Dovecot's module loader looks up (module-dir.c): C symbols linked into a Rust library are not exported, so these
//! are Rust's.

use super::ffi;
use crate::guard::guard;
use std::ffi::{c_char, c_void};

/// A pointer to constant C data, to be exported.
#[repr(transparent)]
pub struct Exported<T>(T);

// SAFETY: what it points to is constant, in this library, and never freed.
unsafe impl<T> Sync for Exported<T> {}

/// Compared with Dovecot's own by module_dir_load().
/// cbindgen:ignore
#[no_mangle]
pub static dovetail_plugin_version: Exported<*const c_char> = Exported(&raw const ffi::dt_abi_version);

/// The same, under the name that belongs to the doveadm plugin's file name.
/// cbindgen:ignore
#[no_mangle]
pub static doveadm_dovetail_plugin_version: Exported<*const c_char> = Exported(&raw const ffi::dt_abi_version);

/// The same, for libdovetail_settings.so, which Dovecot 2.4's config process loads.
/// cbindgen:ignore
#[no_mangle]
pub static dovetail_settings_version: Exported<*const c_char> = Exported(&raw const ffi::dt_abi_version);

/// The settings that exist (config_parse_load_modules() in Dovecot 2.4).
/// cbindgen:ignore
#[no_mangle]
pub static dovetail_settings_set_infos: Exported<[*const c_char; 2]> =
    Exported([&raw const ffi::dovetail_setting_parser_info, std::ptr::null()]);

/// Plugins that have to be in mail_plugins as well.
/// cbindgen:ignore
#[no_mangle]
pub static dovetail_plugin_dependencies: Exported<[*const c_char; 2]> =
    Exported([c"notify".as_ptr(), std::ptr::null()]);

/// Loaded by mail_plugins.
#[no_mangle]
pub extern "C" fn dovetail_plugin_init(module: *mut c_void) {
    guard("dovetail_plugin_init", (), || {
        super::log::init();
        // SAFETY: Dovecot's main thread, with the module that it is loading.
        unsafe { ffi::dt_capture_init(module) }
    });
}

/// The process ends.
#[no_mangle]
pub extern "C" fn dovetail_plugin_deinit() {
    // SAFETY: Dovecot's main thread; paired with dovetail_plugin_init().
    guard("dovetail_plugin_deinit", (), || unsafe { ffi::dt_capture_deinit() });
}

/// Loaded by doveadm.
#[no_mangle]
pub extern "C" fn doveadm_dovetail_plugin_init(_module: *mut c_void) {
    // SAFETY: doveadm's main thread.
    guard("doveadm_dovetail_plugin_init", (), || unsafe { ffi::dt_doveadm_init() });
}

/// Nothing is to be undone: doveadm frees its commands itself.
#[no_mangle]
pub extern "C" fn doveadm_dovetail_plugin_deinit() {}
