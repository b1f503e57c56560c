//! The executable of the services `dovetail` and `dovetail-worker`: loads the plugin library and hands over.
//!
//! It links nothing of Dovecot: the library brings it along, in the version that it was built for.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, CStr, CString, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::ExitCode;

/// Dovecot's exit status for a fatal error that a restart does not mend.
const FATAL_DEFAULT: u8 = 89;
const LIBRARY: &str = concat!(env!("DOVETAIL_MODULEDIR"), "/lib20_dovetail_plugin.so");

fn main() -> ExitCode {
    match run() {
        Ok(status) => ExitCode::from(status as u8),
        Err(error) => {
            eprintln!("Fatal: dovetail: {error}");
            ExitCode::from(FATAL_DEFAULT)
        }
    }
}

fn run() -> Result<c_int, String> {
    let path = std::env::var_os("DOVETAIL_MODULE").unwrap_or_else(|| OsString::from(LIBRARY));
    let path = CString::new(path.as_bytes()).map_err(|_| "DOVETAIL_MODULE has a NUL character".to_string())?;
    // Dovecot may rewrite its arguments for the process title: they are never freed.
    let mut args: Vec<*mut c_char> = std::env::args_os()
        .map(|arg| CString::new(arg.into_vec()).expect("arguments have no NUL characters").into_raw())
        .collect();
    let argc = args.len() as c_int;
    args.push(std::ptr::null_mut());
    let argv = Box::leak(args.into_boxed_slice()).as_mut_ptr();

    // SAFETY: path is a string. Its constructors are Dovecot's and Rust's own.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if library.is_null() {
        return Err(dl_error());
    }
    // SAFETY: library is open, and the name is a string.
    let symbol = unsafe { libc::dlsym(library, c"dovetail_main".as_ptr()) };
    if symbol.is_null() {
        return Err(dl_error());
    }
    // SAFETY: host::service defines dovetail_main with this type.
    let main: extern "C" fn(c_int, *mut *mut c_char) -> c_int = unsafe { std::mem::transmute(symbol) };
    Ok(main(argc, argv))
}

fn dl_error() -> String {
    // SAFETY: after a failure dlerror() returns a string that is valid until the next call; this is the only thread.
    unsafe {
        match libc::dlerror() {
            error if error.is_null() => "dlopen() failed".into(),
            error => CStr::from_ptr(error).to_string_lossy().into_owned(),
        }
    }
}
