//! Starts threads inside of Dovecot's processes: signals are Dovecot's main thread's business.

use std::io;
use std::thread::{Builder, JoinHandle};

/// The new thread inherits a mask that blocks all signals; the caller's own mask stays.
pub fn spawn_with_signals_blocked(builder: Builder, run: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
    with_signals_blocked(|| builder.spawn(run))
}

/// Runs `f` with all signals blocked in this thread, and thereby in threads that it starts.
pub fn with_signals_blocked<T>(f: impl FnOnce() -> T) -> T {
    // SAFETY: the sets are initialised before use; the calls cannot fail with these arguments.
    let old = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
        old
    };
    let result = f();
    // SAFETY: restores what was there.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const old, std::ptr::null_mut()) };
    result
}
