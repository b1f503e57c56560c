//! From the `log` crate to Dovecot's log and events. Dovecot's functions belong to its main thread: what other threads say
//! waits here until the main thread comes by. In a service it is woken for it.
//!
//! What is logged with key-values is an event: its target is the event's name, they are its fields. Dovecot's `metric`,
//! `event_exporter` and `log_debug` decide what becomes of it.

use super::ffi;
use crate::guard::guard;
use ::log::kv::{self, Key, Value, VisitSource};
use ::log::{Level, LevelFilter, Log, Metadata, Record};
use crossbeam_channel::{bounded, Receiver, Sender};
use std::ffi::{c_char, c_int, CString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::OnceLock;
use std::thread::ThreadId;

const LINES_MAX: usize = 256;
/// In a service: a mailbox whose two halves become one brings an event for each message.
const SERVICE_LINES_MAX: usize = 4096;
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

struct Line {
    level: Level,
    text: String,
    event: Option<Event>,
}

struct Event {
    name: String,
    fields: Vec<(String, String)>,
}

struct Logger {
    main: ThreadId,
    sender: Sender<Line>,
    receiver: Receiver<Line>,
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

/// On the main thread. What comes first in a process decides.
pub fn init() {
    init_for(LINES_MAX);
}

fn init_for(lines_max: usize) {
    let (sender, receiver) = bounded(lines_max);
    let logger = LOGGER.get_or_init(|| Logger {
        main: std::thread::current().id(),
        sender,
        receiver,
        dropped: AtomicU64::new(0),
        closed: AtomicU64::new(0),
        stop: AtomicBool::new(false),
    });
    if ::log::set_logger(logger).is_ok() {
        ::log::set_max_level(LevelFilter::Debug);
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
        for line in logger.receiver.try_iter() {
            write(&line);
        }
        match logger.dropped.swap(0, Ordering::Relaxed) {
            0 => {}
            n => {
                let text = format!("{n} log lines were too many at once and are lost");
                write(&Line { level: Level::Warn, text, event: None });
            }
        }
    }
}

/// A service begins: its main thread is woken for what other threads say.
#[no_mangle]
extern "C" fn dt_rs_service_init() {
    guard("service_init", (), || {
        init_for(SERVICE_LINES_MAX);
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
        let line = Line { level: record.level(), text: record.args().to_string(), event: event(record) };
        // Whatever else a library says at this level is not for Dovecot's log.
        if line.level >= Level::Debug && line.event.is_none() {
            return;
        }
        if std::thread::current().id() == self.main {
            write(&line);
            return;
        }
        // A full queue loses lines, never the mail.
        if self.sender.try_send(line).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        wake();
    }

    fn flush(&self) {}
}

struct Fields(Vec<(String, String)>);

impl<'kvs> VisitSource<'kvs> for Fields {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        self.0.push((key.to_string(), value.to_string()));
        Ok(())
    }
}

fn event(record: &Record) -> Option<Event> {
    let mut fields = Fields(Vec::new());
    record.key_values().visit(&mut fields).ok()?;
    (!fields.0.is_empty()).then(|| Event { name: record.target().into(), fields: fields.0 })
}

fn write(line: &Line) {
    let level = match line.level {
        Level::Error => 3,
        Level::Warn => 2,
        Level::Info => 1,
        Level::Debug | Level::Trace => 0,
    };
    let Some(text) = c_string(&line.text) else { return };
    let Some(event) = &line.event else {
        // SAFETY: a terminated string; the main thread.
        return unsafe { ffi::dt_log(level, text.as_ptr()) };
    };
    let Some(name) = c_string(&event.name) else { return };
    let fields: Option<Vec<_>> = event.fields.iter().map(|(key, value)| c_string(key).zip(c_string(value))).collect();
    let Some(fields) = fields else { return };
    let pairs: Vec<*const c_char> = fields.iter().flat_map(|(key, value)| [key.as_ptr(), value.as_ptr()]).collect();
    // SAFETY: terminated strings, which are copied, and as many as are said; the main thread.
    unsafe { ffi::dt_event(name.as_ptr(), pairs.as_ptr(), fields.len(), text.as_ptr()) };
}

fn c_string(text: &str) -> Option<CString> {
    let text: String = text.chars().take(LINE_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect();
    CString::new(text).ok()
}
