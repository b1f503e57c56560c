//! The executable's unsafe half: the relay's engine inside of a Dovecot service.
//!
//! The engine has its own thread, which never calls Dovecot; the main thread accepts connections and hands them over.
use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_uint};
use std::fs::DirBuilder;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use super::settings::{read, text};
use super::{ffi, thread};
use crate::guard::guard;
use crate::relay;
use crate::tls::Credentials;

/// Dovecot's exit status for a fatal error.
const FATAL_DEFAULT: c_int = 89;
/// Most of what leads into the list of what failed is still going on at first.
const COMPARE_LISTED_AFTER_US: u64 = 30_000_000;

#[allow(unused_doc_comments)]
/// cbindgen:ignore
extern "C" {
    fn dt_service_main(argc: c_int, argv: *mut *mut c_char) -> c_int;
}

/// The relay of this process.
enum Relay {
    None,
    Configured(relay::Config),
    Running(relay::Handle),
}

/// TCP sockets on which the master listens for the relay, and which it must not use.
#[derive(Default)]
struct Refused(Vec<c_int>);

impl Refused {
    /// Of `count` sockets from `first` on; each of the refused is logged.
    fn of(config: &relay::Config, first: c_int, count: c_int) -> Refused {
        let refused = (first..first + count).filter(|fd| {
            // Unix sockets have no such address.
            let Some(address) = address_of(*fd) else { return false };
            let checked = config.check_address(address.ip());
            if let Err(error) = &checked {
                log::error!("The relay refuses to listen on {address}, an inet_listener of its service: {error}");
            }
            checked.is_err()
        });
        Refused(refused.collect())
    }
}

/// The TCP address of a listening socket.
fn address_of(fd: c_int) -> Option<SocketAddr> {
    // SAFETY: the fd stays open as long as the process lives.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    TcpListener::from(fd.try_clone_to_owned().ok()?).local_addr().ok()
}

thread_local! {
    static RELAY: RefCell<Relay> = const { RefCell::new(Relay::None) };
    static REFUSED: RefCell<Refused> = const { RefCell::new(Refused(Vec::new())) };
}

/// What the executable `dovetail` calls.
///
/// # Safety
/// As main()'s arguments, and they are never freed.
/// cbindgen:ignore
#[no_mangle]
pub unsafe extern "C" fn dovetail_main(argc: c_int, argv: *mut *mut c_char) -> c_int {
    // SAFETY: the caller's. Errors in there end the process or come back as status.
    guard("dovetail_main", FATAL_DEFAULT, || unsafe { dt_service_main(argc, argv) })
}

/// Reads the settings and makes the journal's folder, while the process may. `uid` and `gid` are those that it will have,
/// or -1; it will have so many connections at the same time. 0 if ok; otherwise it was logged what is wrong.
#[no_mangle]
extern "C" fn dt_rs_relay_configure(uid: libc::uid_t, gid: libc::gid_t, client_limit: c_uint) -> c_int {
    guard("relay_configure", -1, || match read(std::ptr::null_mut()) {
        Ok(settings) => {
            if let Err(error) = make_folder(&settings.state_dir, uid, gid) {
                let folder = settings.state_dir.display();
                log::error!("dovetail_state_dir: {folder}: {error} - mail goes on, nothing is replicated");
                return -1;
            }
            let names: Vec<&str> = settings.peers.iter().map(|peer| peer.name.as_str()).collect();
            let tls = settings.tls.as_ref().map(|tls| Credentials::load(tls, &settings.server, &names)).transpose();
            let tls = match tls {
                Ok(tls) => tls.map(Arc::new),
                Err(error) => {
                    log::error!("{error} - mail goes on, nothing is replicated");
                    return -1;
                }
            };
            let config = relay::Config {
                server: settings.server,
                peers: settings
                    .peers
                    .into_iter()
                    .map(|peer| relay::Peer { name: peer.name, address: peer.address })
                    .collect(),
                worker_socket: settings.worker_socket,
                workers: settings.workers,
                queue_bytes_max: usize::try_from(settings.relay_queue_size).unwrap_or(usize::MAX),
                journal: settings.state_dir,
                journal_bytes_max: settings.journal_size,
                compare_listed_after_us: Some(COMPARE_LISTED_AFTER_US),
                compare_interval_ms: settings.compare_interval_ms,
                journal_age_us_max: settings.journal_days * 86_400 * 1_000_000,
                client_limit: client_limit as usize,
                boot: std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().into(),
                tls,
                insecure_plaintext: settings.insecure_plaintext,
                software: software(),
            };
            RELAY.with_borrow_mut(|relay| *relay = Relay::Configured(config));
            0
        }
        Err(errors) => {
            for error in errors {
                log::error!("{error} - mail goes on, nothing is replicated");
            }
            -1
        }
    })
}

/// Starts the engine. The master listens for it on `listener_count` sockets from `first_listener` on. 0 if ok; otherwise the
/// reason was logged.
#[no_mangle]
extern "C" fn dt_rs_relay_start(first_listener: c_int, listener_count: c_int) -> c_int {
    guard("relay_start", -1, || {
        RELAY.with_borrow_mut(|relay| {
            let Relay::Configured(config) = std::mem::replace(relay, Relay::None) else { return -1 };
            REFUSED.set(Refused::of(&config, first_listener, listener_count));
            // The engine's thread inherits the mask: signals are the main thread's.
            match thread::with_signals_blocked(|| {
                relay::start(config, super::log::connection_closed, super::log::stop_process)
            }) {
                Ok(handle) => {
                    *relay = Relay::Running(handle);
                    0
                }
                Err(error) => {
                    log::error!("Can't start the relay: {error} - mail goes on, nothing is replicated");
                    -1
                }
            }
        })
    })
}

/// A connection to `listener` begins; the fd is ours. `is_peer`: it did not come over a Unix socket.
#[no_mangle]
extern "C" fn dt_rs_relay_accept(fd: c_int, listener: c_int, is_peer: bool) {
    guard("relay_accept", (), || {
        // SAFETY: the shim gives the fd away.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        if REFUSED.with_borrow(|refused| refused.0.contains(&listener)) {
            drop(fd);
            return super::log::connection_closed();
        }
        let kind = match is_peer {
            true => relay::Connection::Peer,
            false => relay::Connection::Local { uid: Some(uid_of(&fd)).filter(|uid| ![0, own_uid()].contains(uid)) },
        };
        RELAY.with_borrow(|relay| {
            let accepted = match relay {
                Relay::Running(handle) => handle.accept(fd, kind),
                _ => false,
            };
            if !accepted {
                super::log::connection_closed();
            }
            if let Relay::Running(handle) = relay {
                if !handle.is_running() {
                    super::log::stop_process();
                }
            }
        })
    })
}

/// The system user at the other end of a Unix socket.
pub fn uid_of(fd: &impl AsRawFd) -> u32 {
    let mut other = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the fd is open, and what is written fits.
    let ret = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut other).cast(), &raw mut length)
    };
    if ret == 0 {
        other.uid
    } else {
        u32::MAX
    }
}

/// This process is of this one.
fn own_uid() -> u32 {
    // SAFETY: it only returns a number.
    unsafe { libc::geteuid() }
}

/// The process ends: says goodbye to whom it can.
#[no_mangle]
extern "C" fn dt_rs_relay_stop() {
    guard("relay_stop", (), || {
        if let Relay::Running(handle) = RELAY.with_borrow_mut(|relay| std::mem::replace(relay, Relay::None)) {
            handle.stop();
        }
    })
}

/// Nobody but the relay's user may look into it: mails are in there.
fn make_folder(folder: &Path, uid: libc::uid_t, gid: libc::gid_t) -> io::Result<()> {
    if let Some(parent) = folder.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let id = |id: u32| (id != u32::MAX).then_some(id);
    std::os::unix::fs::chown(folder, id(uid), id(gid))
}

/// For the peers' people.
fn software() -> String {
    let dovecot = text(&raw const ffi::dt_dovecot_version);
    format!("dovetail {}, Dovecot {dovecot}", env!("CARGO_PKG_VERSION"))
}
