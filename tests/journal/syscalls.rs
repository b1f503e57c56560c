//! The system calls that change files, in place of libc's: whatever in this program wants one comes here first, SQLite too.
//! What is done to the watched folder is told before it is done, the write of a page in two halves. Whoever is told may end
//! the process.
//!
//! Nothing waits for the disk.

use std::ffi::{c_char, c_int, c_void, CStr, OsStr};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use libc::{mode_t, off64_t};

/// What is about to be done. Files by their names within the folder.
pub enum Call {
    Create(String),
    Write { file: String, at: usize, bytes: Vec<u8> },
    Truncate { file: String, length: usize },
    Rename { from: String, to: String },
    Unlink(String),
    Sync(String),
    SyncFolder,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Call::Create(file) => write!(f, "create {file}"),
            Call::Write { file, at, bytes } => write!(f, "write {} bytes to {file} at {at}", bytes.len()),
            Call::Truncate { file, length } => write!(f, "truncate {file} to {length} bytes"),
            Call::Rename { from, to } => write!(f, "rename {from} to {to}"),
            Call::Unlink(file) => write!(f, "unlink {file}"),
            Call::Sync(file) => write!(f, "sync {file}"),
            Call::SyncFolder => write!(f, "sync the folder"),
        }
    }
}

/// Bytes that are written at once: half a page.
const PART: usize = 2048;

type Told = Box<dyn FnMut(Call) + Send>;

static WATCHED: Mutex<Option<(PathBuf, Told)>> = Mutex::new(None);

/// Tells of what is done to the files in the folder from now on, by whichever thread.
pub fn watch(folder: &Path, told: impl FnMut(Call) + Send + 'static) {
    *WATCHED.lock().unwrap() = Some((folder.to_owned(), Box::new(told)));
}

pub fn unwatch() {
    WATCHED.lock().unwrap().take();
}

fn tell(path: impl FnOnce() -> PathBuf, call: impl FnOnce(String) -> Option<Call>) {
    let mut watched = WATCHED.lock().unwrap();
    let Some((folder, told)) = watched.as_mut() else { return };
    let path = path();
    let Ok(file) = path.strip_prefix(folder) else { return };
    if let Some(call) = call(file.to_string_lossy().into_owned()) {
        told(call);
    }
}

fn path_of(fd: c_int) -> PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default()
}

/// # Safety
///
/// It is a C string.
unsafe fn path_at(path: *const c_char) -> PathBuf {
    // SAFETY: the caller says so.
    OsStr::from_bytes(unsafe { CStr::from_ptr(path) }.to_bytes()).into()
}

/// # Safety
///
/// As of the function in C; a third argument that was not given is not looked at.
#[no_mangle]
unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: open() gets a C string.
    let of = unsafe { path_at(path) };
    if flags & libc::O_CREAT != 0 && !of.exists() {
        tell(|| of, |file| Some(Call::Create(file)));
    }
    // SAFETY: the same call.
    unsafe { libc::openat(libc::AT_FDCWD, path, flags, mode) }
}

/// # Safety
///
/// As of the function in C.
#[no_mangle]
unsafe extern "C" fn pwrite64(fd: c_int, bytes: *const c_void, count: usize, at: off64_t) -> isize {
    // SAFETY: pwrite() gets so many bytes.
    let bytes = unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), count) };
    let mut written = 0;
    for part in bytes.chunks(PART) {
        let at = at + written;
        tell(|| path_of(fd), |file| Some(Call::Write { file, at: at as usize, bytes: part.to_vec() }));
        // SAFETY: the same call for some of the bytes.
        match unsafe { libc::pwrite(fd, part.as_ptr().cast(), part.len(), at) } {
            ..0 if written == 0 => return -1,
            ..0 => break,
            more => written += more as off64_t,
        }
    }
    written as isize
}

#[no_mangle]
extern "C" fn ftruncate64(fd: c_int, length: off64_t) -> c_int {
    tell(|| path_of(fd), |file| Some(Call::Truncate { file, length: length as usize }));
    // SAFETY: the same call.
    unsafe { libc::ftruncate(fd, length) }
}

/// # Safety
///
/// As of the function in C.
#[no_mangle]
unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    // SAFETY: rename() gets C strings.
    let (old, new) = unsafe { (path_at(from), path_at(to)) };
    let to_file = new.file_name().unwrap_or_default().to_string_lossy().into_owned();
    tell(|| old, |from| Some(Call::Rename { from, to: to_file }));
    // SAFETY: the same call.
    unsafe { libc::renameat(libc::AT_FDCWD, from, libc::AT_FDCWD, to) }
}

/// # Safety
///
/// As of the function in C.
#[no_mangle]
unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    // SAFETY: unlink() gets a C string.
    let of = unsafe { path_at(path) };
    if of.exists() {
        tell(|| of, |file| Some(Call::Unlink(file)));
    }
    // SAFETY: the same call.
    unsafe { libc::unlinkat(libc::AT_FDCWD, path, 0) }
}

#[no_mangle]
extern "C" fn fsync(fd: c_int) -> c_int {
    tell(|| path_of(fd), |file| Some(if file.is_empty() { Call::SyncFolder } else { Call::Sync(file) }));
    0
}
