//! The relay's engine: the hub between local processes, workers and the peers' relays.
//!
//! One thread polls all sockets. Local processes tell of changes and spans; [`order`] and [`spans`] put them in order;
//! stamped, they go to every peer through its [`Outbox`](crate::peer::Outbox). What peers send goes to workers through
//! [`work`], and their outcome back. Guarantees that nothing here blocks for longer than a look into the journal, that
//! memory is bounded by the settings and windows, and that whatever a connection sends can at worst end that connection.
//! What must outlive it is in the [`journal`](crate::journal) before a peer or a process hears of it. It never opens a
//! mailbox and knows nothing of Dovecot.
#![forbid(unsafe_code)]

mod acks;
mod background;
mod backoff;
mod bodies;
mod bonds;
mod causes;
pub mod client;
mod clock;
mod compare;
#[doc(hidden)]
pub mod connection;
mod durable;
mod engine;
mod flags;
mod gates;
mod heal;
mod lines;
mod list;
mod local;
mod looks;
mod order;
pub mod outside;
mod owners;
mod passing;
mod peers;
mod poison;
mod questions;
mod redo;
mod spans;
mod status;
#[doc(hidden)]
pub mod stepped;
mod strangers;
mod subscribers;
mod torn;
mod unheard;
mod users;
mod waiting;
mod work;
mod workers;

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use mio::{Poll, Waker};

use crate::change::is_server;
use crate::tls::Credentials;
use engine::{Command, End, Engine, Fatal};
use outside::Sockets;

/// After a failure the process lives on for so long before it asks to be started again.
const FAILURE_PAUSE: Duration = Duration::from_secs(5);
/// Accepted connections that may wait for the engine.
const COMMANDS_MAX: usize = 16_384;

/// What the relay needs to know; checked by [`start`].
#[derive(Clone, Debug)]
pub struct Config {
    /// This server's name (dovetail_server).
    pub server: String,
    /// The other servers (dovetail_peers).
    pub peers: Vec<Peer>,
    /// Where the workers listen (dovetail_worker_socket), absolute.
    pub worker_socket: PathBuf,
    /// Connections to workers that apply changes (dovetail_workers). One more is kept for reading bodies, so that two
    /// servers whose workers all wait for each other's bodies cannot lock each other out.
    pub workers: usize,
    /// Memory for changes that peers have not acknowledged (dovetail_relay_queue_size), shared equally by the peers; what has
    /// no room waits in the journal.
    pub queue_bytes_max: usize,
    /// Folder of the journal; it exists (dovetail_state_dir).
    pub journal: PathBuf,
    /// What the journal may hold for peers that are away (dovetail_journal_size).
    pub journal_bytes_max: u64,
    /// And for how long (dovetail_journal_days), in microseconds.
    pub journal_age_us_max: u64,
    /// For how long a mailbox stands in the list of what failed until it is compared; None: until a person has it compared.
    pub compare_listed_after_us: Option<u64>,
    /// All users are compared once in that time (dovetail_compare_interval); None: only those who are listed or asked for.
    pub compare_interval_ms: Option<u64>,
    /// Connections that the host accepts at the same time, of local processes and peers together (client_limit).
    pub client_limit: usize,
    /// Of this boot of the machine.
    pub boot: String,
    /// What this server proves itself with, and whom it trusts (dovetail_cert and others). None: plaintext.
    pub tls: Option<Arc<Credentials>>,
    /// Allows plaintext that is not on loopback (dovetail_insecure_plaintext).
    pub insecure_plaintext: bool,
    /// "dovetail 0.1.0, Dovecot 2.4.1", for people.
    pub software: String,
}

impl Config {
    /// Without TLS, nothing but this machine is trusted.
    pub fn check_address(&self, ip: IpAddr) -> Result<(), String> {
        if is_loopback(ip) || self.tls.is_some() || self.insecure_plaintext {
            return Ok(());
        }
        Err(format!(
            "{ip} is not a loopback address, and without dovetail_cert connections between servers are neither encrypted nor \
             authenticated (dovetail_insecure_plaintext = yes would allow it, for tests)"
        ))
    }
}

fn is_loopback(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(v6.is_loopback(), |v4| v4.is_loopback()),
        IpAddr::V4(v4) => v4.is_loopback(),
    }
}

/// Another server. Of two servers the one with the lower name connects; the other one only listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub name: String,
    /// host:port
    pub address: String,
}

/// What an accepted connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    /// A Unix socket: a mail process or doveadm. The system user who connected; None: root or the relay's own user, who may tell of all
    /// users and ask what goes on with them.
    Local { uid: Option<u32> },
    /// A TCP socket: another server's relay.
    Peer,
}

/// Starts the engine in a thread of its own. `on_closed` is called from that thread each time an accepted connection
/// has been closed, `on_failed` when it has ended by itself, with the reason in the log, for the process to be started again.
///
/// The thread inherits the signal mask: the host blocks all signals around this call, so that they are delivered to its
/// own thread. It logs through the `log` crate only, from the engine's thread.
pub fn start(
    config: Config,
    on_closed: impl Fn() + Send + 'static,
    on_failed: impl FnOnce() + Send + 'static,
) -> io::Result<Handle> {
    check(&config).map_err(|error| io::Error::new(ErrorKind::InvalidInput, error))?;
    let (sender, receiver) = crossbeam_channel::bounded(COMMANDS_MAX);
    let poll = Poll::new()?;
    let waker = Arc::new(Waker::new(poll.registry(), engine::WAKER)?);
    let handle_sender = sender.clone();
    let handle_waker = waker.clone();
    let commands = receiver.clone();
    let run = move || {
        let end = match begin(config, (poll, waker), (sender, receiver), Box::new(on_closed)) {
            Ok(None) => End::Stopped,
            Ok(Some(engine)) => engine.run_guarded(),
            Err(error) => {
                log::error!("The relay cannot start: {error}. Nothing is replicated; trying again.");
                End::Failed
            }
        };
        if end == End::Anew || end == End::Failed && pause(&commands) {
            on_failed();
        }
    };
    let thread = std::thread::Builder::new().name("dovetail-relay".into()).spawn(run)?;
    Ok(Handle { commands: handle_sender, waker: handle_waker, thread })
}

/// What made the engine fail is probably still there. False: it is asked to stop meanwhile.
fn pause(commands: &Receiver<Command>) -> bool {
    let until = Instant::now() + FAILURE_PAUSE;
    loop {
        match commands.recv_deadline(until) {
            Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => return false,
            // The connection is closed.
            Ok(_) => {}
            Err(RecvTimeoutError::Timeout) => return true,
        }
    }
}

/// None: it was asked to stop before the relay that came before it had closed the journal.
fn begin(
    config: Config,
    (poll, waker): (Poll, Arc<Waker>),
    (sender, commands): (Sender<Command>, Receiver<Command>),
    on_closed: Box<dyn Fn() + Send>,
) -> Result<Option<Engine>, Fatal> {
    let outside = Sockets::new(poll, waker, sender);
    let durable::Opened { journal, waiting } = durable::open(&config, &commands, &outside)?;
    let Some(journal) = journal else {
        waiting.iter().filter(|command| matches!(command, Command::Accept(..))).for_each(|_| on_closed());
        return Ok(None);
    };
    let mut engine = Engine::new(config, Box::new(outside), commands, on_closed, journal)?;
    engine.take_waiting(waiting);
    Ok(Some(engine))
}

/// The running engine.
pub struct Handle {
    commands: Sender<Command>,
    waker: Arc<Waker>,
    thread: JoinHandle<()>,
}

impl Handle {
    /// Hands an accepted connection over. False if the engine cannot take it; it is closed then, without `on_closed`.
    pub fn accept(&self, socket: OwnedFd, kind: Connection) -> bool {
        self.commands.try_send(Command::Accept(socket, kind)).is_ok() && self.waker.wake().is_ok()
    }

    /// False after the engine has ended. By itself it does so because of a bug or because its journal fails, which it has
    /// logged then: the host should end its process, to be started again.
    pub fn is_running(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Ends the engine. Local processes can send nothing more to it, what they have sent is still taken: the rest goes
    /// to the relay that comes next. Then at most half a second for jobs to end and changes to be acknowledged.
    pub fn stop(self) {
        let Handle { commands, waker, thread } = self;
        // Both fail only if the engine has ended already.
        let _ = waker.wake();
        let _ = commands.send(Command::Stop);
        let _ = waker.wake();
        if thread.join().is_err() {
            log::error!("The relay's thread ended with a panic.");
        }
    }
}

fn check(config: &Config) -> Result<(), String> {
    if !is_server(&config.server) {
        return Err(format!("dovetail_server: '{}' is not a server's name", config.server.escape_debug()));
    }
    let mut names = HashSet::new();
    for peer in &config.peers {
        if !is_server(&peer.name) {
            return Err(format!("dovetail_peers: '{}' is not a server's name", peer.name.escape_debug()));
        }
        if peer.name == config.server {
            return Err(format!("dovetail_peers: '{}' is this server itself (dovetail_server)", peer.name));
        }
        if !names.insert(&peer.name) {
            return Err(format!("dovetail_peers: '{}' is there twice", peer.name));
        }
    }
    if config.workers < 2 {
        return Err("dovetail_workers: there must be at least 2".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_this_machine_alone_are_loopback() {
        for address in ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"] {
            assert!(is_loopback(address.parse().unwrap()), "{address}");
        }
        for address in ["0.0.0.0", "::", "10.0.0.1", "fe80::1", "::ffff:10.0.0.1", "::127.0.0.1"] {
            assert!(!is_loopback(address.parse().unwrap()), "{address}");
        }
    }
}
