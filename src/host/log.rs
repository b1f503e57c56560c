//! From the `log` crate to Dovecot's log. Dovecot's functions belong to its main thread: what other threads say waits
//! here until the main thread comes by. In a service it is woken for it.

use super::ffi;
use crate::guard::guard;
use ::log::{Level, LevelFilter, Log, Metadata, Record};
use crossbeam_channel::{bounded, Receiver, Sender};
use std::ffi::{c_int, CString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::OnceLock;
use std::thread::ThreadId;

const LINES_MAX: usize = 256;
/// Dovecot cuts lines at 8 kB.
const LINE_CHARS_MAX: usize = 2000;

#[allow(unused_doc_comments)]
/// cbindgen:ignore
extern "C" {
    fn dt_service_connection_closed();
    fn dt_service_stop();
    fn dt_service_watch(fd: c_int);
    fn dt_service_unwatch();
}

struct Logger {
    main: ThreadId,
    sender: Sender<(Level, String)>,
    receiver: Receiver<(Level, String)>,
    /// Lines that did not fit.
    dropped: AtomicU64,
    /// Of a service: connections that have ended and that its main thread does not know of yet.
    closed: AtomicU64,
    /// Of a service: it should end.
    stop: AtomicBool,
}

static LOGGER: OnceLock<Logger> = OnceLock::new();
/// An eventfd that the main thread's ioloop watches, in a service.
static WAKEUP: OnceLock<File> = OnceLock::new();

/// Once per process, on the main thread.
pub fn init() {
    let (sender, receiver) = bounded(LINES_MAX);
    let logger = LOGGER.get_or_init(|| Logger {
        main: std::thread::current().id(),
        sender,
        receiver,
        dropped: AtomicU64::new(0),
        closed: AtomicU64::new(0),
        stop: AtomicBool::new(false),
    });
    if ::log::set_logger(logger).is_ok() {
        ::log::set_max_level(LevelFilter::Info);
        // The guard logs the reason. Standard error, where Rust would tell the place, may be anything here.
        std::panic::set_hook(Box::new(|info| {
            if let Some(place) = info.location() {
                ::log::error!("Panic at {}:{}", place.file(), place.line());
            }
        }));
    }
}

/// Writes what other threads said. Main thread only.
pub fn drain() {
    if let Some(logger) = LOGGER.get() {
        for (level, line) in logger.receiver.try_iter() {
            write(level, &line);
        }
        match logger.dropped.swap(0, Ordering::Relaxed) {
            0 => {}
            n => write(Level::Warn, &format!("{n} log lines were too many at once and are lost")),
        }
    }
}

/// A service begins: its main thread is woken for what other threads say.
#[no_mangle]
extern "C" fn dt_rs_service_init() {
    guard("service_init", (), || {
        init();
        // SAFETY: takes numbers only.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd == -1 {
            ::log::error!("eventfd() failed: {}", std::io::Error::last_os_error());
            return;
        }
        // SAFETY: the fd is new and nobody else's.
        let wakeup = WAKEUP.get_or_init(|| unsafe { File::from_raw_fd(fd) });
        // SAFETY: the main thread, once; the fd stays open for ever.
        unsafe { dt_service_watch(wakeup.as_raw_fd()) };
    });
}

/// The service ends.
#[no_mangle]
extern "C" fn dt_rs_service_deinit() {
    guard("service_deinit", (), || {
        drain();
        // SAFETY: the main thread, after dt_rs_service_init().
        unsafe { dt_service_unwatch() };
    });
}

/// Another thread has something for the main thread.
#[no_mangle]
extern "C" fn dt_rs_service_wakeup() {
    guard("service_wakeup", (), || {
        if let Some(mut wakeup) = WAKEUP.get() {
            let _ = wakeup.read(&mut [0; 8]);
        }
        drain();
        let Some(logger) = LOGGER.get() else { return };
        for _ in 0..logger.closed.swap(0, Ordering::Relaxed) {
            // SAFETY: the main thread; one of its connections has ended.
            unsafe { dt_service_connection_closed() };
        }
        if logger.stop.load(Ordering::Relaxed) {
            // SAFETY: the main thread.
            unsafe { dt_service_stop() };
        }
    });
}

/// From any thread of a service: a connection that the main thread has accepted has ended.
pub fn connection_closed() {
    if let Some(logger) = LOGGER.get() {
        logger.closed.fetch_add(1, Ordering::Relaxed);
        wake();
    }
}

/// From any thread of a service: the process cannot go on.
pub fn stop_process() {
    if let Some(logger) = LOGGER.get() {
        logger.stop.store(true, Ordering::Relaxed);
        wake();
    }
}

fn wake() {
    if let Some(mut wakeup) = WAKEUP.get() {
        // It fails only if it is readable already.
        let _ = wakeup.write(&1u64.to_ne_bytes());
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= ::log::max_level()
    }

    fn log(&self, record: &Record) {
        let line = record.args().to_string();
        if std::thread::current().id() == self.main {
            write(record.level(), &line);
            return;
        }
        // A full queue loses lines, never the mail.
        if self.sender.try_send((record.level(), line)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        wake();
    }

    fn flush(&self) {}
}

fn write(level: Level, line: &str) {
    let level = match level {
        Level::Error => 3,
        Level::Warn => 2,
        Level::Info => 1,
        Level::Debug | Level::Trace => 0,
    };
    let line: String = line.chars().take(LINE_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if let Ok(line) = CString::new(line) {
        // SAFETY: a terminated string; the main thread.
        unsafe { ffi::dt_log(level, line.as_ptr()) };
    }
}
