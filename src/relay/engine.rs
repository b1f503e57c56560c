//! The loop: polls, reads, lets each connection's role handle its frames, writes. The roles are in the files beside.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, TryRecvError};
use mio::Token;

use super::bodies::Bodies;
use super::causes::Causes;
use super::clock::Clock;
use super::compare::Comparisons;
use super::connection::{Connection, Incoming, Stream, READ_BYTES};
use super::flags::Races;
use super::heal::Heals;
use super::list::Lists;
use super::local::Local;
use super::order::Order;
use super::outside::Outside;
use super::passing::Told;
use super::peers::PeerState;
use super::poison::Poison;
use super::questions::Questions;
use super::redo::Redos;
use super::spans::Spans;
use super::status::Counts;
use super::subscribers::Subscribers;
use super::torn::Torn;
use super::unheard::Unheard;
use super::work::Work;
use super::workers::Worker;
use super::{Config, Connection as Kind};
use crate::journal::{Journal, JournalError, Start};
use crate::peer::{Identity, Session};
use crate::tls;
use crate::wire::proto::Frame;

pub const WAKER: Token = Token(0);
/// Buffers read from one connection before the others have their turn.
const READS_IN_TURN: usize = 8;
/// A peer's frames wait in their lanes while this much waits for its socket.
const OUT_BYTES_HIGH: usize = 256 << 10;
/// Time for the last acknowledgements at an orderly end.
const STOP_MS_MAX: u64 = 500;
/// Connections of peers that have not said who they are.
const STRANGERS_MAX: usize = 64;

/// What other threads ask for.
pub enum Command {
    Accept(OwnedFd, Kind),
    /// The addresses of a peer's host.
    Resolved(usize, io::Result<Vec<SocketAddr>>),
    Stop,
}

/// Why a connection is closed.
#[derive(Clone, Debug)]
pub enum Close {
    /// It ended, or failed.
    Ended(String),
    /// It sent what it must not send.
    Malformed(String),
    /// A peer that we do not want, or that does not want us.
    Refused { reason: String, tell: bool },
}

impl Close {
    pub fn reason(&self) -> &str {
        match self {
            Close::Ended(reason) | Close::Malformed(reason) | Close::Refused { reason, .. } => reason,
        }
    }
}

/// Why the engine cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    #[error("poll() failed: {0}")]
    Poll(io::Error),
    #[error("the journal fails: {0} - what is not in it is found again in the mailboxes' logs")]
    Journal(#[from] JournalError),
}

pub enum Role {
    Local(Local),
    /// A peer that has not said who it is.
    Stranger(Box<Session>),
    Peer(usize),
    Worker(usize),
}

pub struct Socket {
    pub connection: Connection,
    pub role: Role,
    is_accepted: bool,
}

/// See the module.
pub struct Engine {
    pub config: Config,
    pub me: Arc<Identity>,
    pub now_ms: u64,
    pub sockets: HashMap<Token, Socket>,
    pub peers: Vec<PeerState>,
    pub workers: Vec<Worker>,
    pub work: Work,
    pub causes: Causes,
    pub told: Told,
    /// Servers that are no peers, whose changes peers pass on.
    pub far: BTreeSet<String>,
    /// Users whose mail is replicated with these of the peers only.
    pub user_peers: HashMap<Arc<str>, Vec<String>>,
    pub bodies: Bodies,
    pub order: Order,
    pub spans: Spans,
    pub heals: Heals,
    /// Users up to this one have been looked at since the start; none: all.
    pub swept: Option<String>,
    pub unheard: Unheard,
    /// Whom the userdb has listed so far, and the journal does not know.
    pub asked: Vec<String>,
    pub races: Races,
    pub redos: Redos,
    pub questions: Questions,
    pub comparisons: Comparisons,
    /// Users with changes of flags that some peer may not have heard of, and the clock of the last.
    pub flags_clocks: HashMap<Arc<str>, u64>,
    pub flags_settled_ms: u64,
    /// What the journal knows of our clock.
    pub clock_noted: u64,
    /// Who has messages that are not here where a peer has them.
    pub users_elsewhere: HashSet<Arc<str>>,
    pub lists: Lists,
    /// Mailboxes without a name, and when it is time to look for it; the next one first.
    pub unnamed: VecDeque<(u64, Arc<str>, Vec<u8>)>,
    pub clock: Clock,
    pub journal: Journal,
    /// When the journal is looked at for what is too old.
    pub trim_at_ms: u64,
    pub last_job: u64,
    pub counts: Counts,
    /// Last reason for which a peer was turned away that is none of ours, logged once.
    pub last_stranger: String,
    pub poison: Poison,
    /// Why changes of users could not be applied last, logged once. They are tried again by some of the workers only.
    pub last_refusals: HashMap<Arc<str>, String>,
    pub subscribers: Subscribers,
    pub torn: Torn,
    /// Last reason for which there was no worker, logged once.
    pub last_worker_error: String,
    pub outside: Box<dyn Outside>,
    /// When the journal was last committed, after the beginning.
    pub committed: Duration,
    commands: Receiver<Command>,
    on_closed: Box<dyn Fn()>,
    last_token: usize,
    /// Connections whose role is, or was, [`Role::Stranger`].
    strangers: Vec<Token>,
    /// Connections that may have more to read than was read in their turn.
    read_again: Vec<Token>,
    /// Connections, but for peers', with something to write.
    to_write: Vec<Token>,
    buffer: Vec<u8>,
    /// Something was closed in this round: its end may have queued frames for others.
    has_closed: bool,
    stop_by_ms: Option<u64>,
    /// The journal's last commits may be lost.
    pub is_after_boot: bool,
    /// Why the journal cannot be used.
    pub failed: Option<JournalError>,
}

impl Engine {
    pub fn new(
        config: Config,
        mut outside: Box<dyn Outside>,
        commands: Receiver<Command>,
        on_closed: Box<dyn Fn()>,
        (journal, start): (Journal, Start),
    ) -> Result<Engine, Fatal> {
        let instance = outside.instance().map_err(Fatal::Poll)?;
        let me =
            Identity { server: config.server.clone(), instance, epoch: start.epoch, software: config.software.clone() };
        let mut engine = Engine {
            me: Arc::new(me),
            now_ms: 0,
            sockets: HashMap::new(),
            peers: PeerState::all(&config),
            workers: Worker::all(config.workers),
            work: Work::default(),
            causes: Causes::default(),
            told: Told::default(),
            far: BTreeSet::new(),
            user_peers: HashMap::new(),
            bodies: Bodies::default(),
            order: Order::default(),
            spans: Spans::default(),
            heals: Heals::default(),
            swept: Some(String::new()),
            unheard: start.unheard_since.map_or(Unheard::Done, Unheard::Ask),
            asked: Vec::new(),
            races: Races::default(),
            redos: Redos::default(),
            questions: Questions::default(),
            comparisons: Comparisons::default(),
            flags_clocks: HashMap::new(),
            flags_settled_ms: 0,
            clock_noted: 0,
            users_elsewhere: HashSet::new(),
            lists: Lists::default(),
            unnamed: VecDeque::new(),
            clock: Clock::default(),
            journal,
            is_after_boot: start.is_after_boot,
            trim_at_ms: 0,
            last_job: 0,
            counts: Counts::default(),
            last_stranger: String::new(),
            poison: Poison::default(),
            last_refusals: HashMap::new(),
            subscribers: Subscribers::default(),
            torn: Torn::default(),
            last_worker_error: String::new(),
            outside,
            committed: Duration::ZERO,
            commands,
            on_closed,
            last_token: WAKER.0,
            strangers: Vec::new(),
            read_again: Vec::new(),
            to_write: Vec::new(),
            buffer: vec![0; READ_BYTES],
            has_closed: false,
            stop_by_ms: None,
            failed: None,
            config,
        };
        engine.resume()?;
        Ok(engine)
    }

    /// Runs until it is stopped. A panic ends it with a line in the log. False: it did not end because it was asked to.
    pub fn run_guarded(mut self) -> bool {
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| self.run()));
        match &outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::error!("The relay ends: {error}."),
            Err(_) => log::error!("The relay ends because of a panic, which is a bug in Dovetail."),
        }
        let accepted = self.sockets.values().filter(|socket| socket.is_accepted).count();
        self.sockets.clear();
        (0..accepted).for_each(|_| (self.on_closed)());
        let was_asked_to = matches!(outcome, Ok(Ok(())));
        if was_asked_to {
            if let Err(error) = self.journal.close() {
                log::error!("The relay's journal could not be closed: {error}.");
            }
        }
        was_asked_to
    }

    fn run(&mut self) -> Result<(), Fatal> {
        if self.config.insecure_plaintext {
            log::warn!(
                "dovetail_insecure_plaintext is set: mail goes over the network unencrypted, and anybody who reaches the \
                 port can change it. It is meant for tests only."
            );
        }
        self.take_commands();
        let mut happened = Vec::new();
        while !self.is_at_end() {
            let timeout = self.round()?;
            self.outside.wait(timeout, &mut happened).map_err(Fatal::Poll)?;
            self.take(&mut happened);
        }
        self.keep_journal()
    }

    /// All that is to be done until something happens; how long that may be waited for.
    pub fn round(&mut self) -> Result<Option<Duration>, Fatal> {
        self.has_closed = false;
        self.read_in_turn();
        self.keep_time();
        self.dispatch_jobs();
        // Before anybody hears of it.
        self.keep_journal()?;
        self.write();
        Ok(self.timeout())
    }

    /// This has happened.
    pub fn take(&mut self, happened: &mut Vec<Token>) {
        self.now_ms = self.outside.elapsed().as_millis() as u64;
        for token in happened.drain(..) {
            match token {
                WAKER => self.take_commands(),
                token => self.look_at(token),
            }
        }
    }

    /// Does what was asked for while the journal was not open.
    pub fn take_waiting(&mut self, waiting: Vec<Command>) {
        waiting.into_iter().for_each(|command| self.take_command(command));
    }

    /// A new connection of ours; its token.
    pub fn add(&mut self, connection: Connection, role: Role) -> io::Result<Token> {
        self.insert(connection, false, role)
    }

    fn insert(&mut self, mut connection: Connection, is_accepted: bool, role: Role) -> io::Result<Token> {
        self.last_token += 1;
        let token = Token(self.last_token);
        self.outside.watch(connection.stream(), token)?;
        self.sockets.insert(token, Socket { connection, role, is_accepted });
        Ok(token)
    }

    /// Queues a frame for a connection that is not a peer's (those have lanes).
    pub fn send(&mut self, token: Token, frame: &Frame) {
        let Some(socket) = self.sockets.get_mut(&token) else {
            return;
        };
        match socket.connection.send(frame) {
            Ok(()) => self.to_write.push(token),
            Err(error) => log::error!("A frame cannot be sent, which is a bug in Dovetail: {error}."),
        }
    }

    /// Closes a connection and tells its role. One that is closed already is ignored.
    pub fn close(&mut self, token: Token, why: Close) {
        let Some(socket) = self.sockets.remove(&token) else {
            return;
        };
        self.has_closed = true;
        if matches!(why, Close::Malformed(_)) {
            self.counts.counters.malformed += 1;
        }
        match socket.role {
            Role::Local(local) => self.local_closed(local, &why),
            Role::Stranger(_) => self.stranger_closed(socket.connection, &why),
            Role::Peer(index) => self.peer_closed(index, token, socket.connection, &why),
            Role::Worker(index) => self.worker_closed(index, &why),
        }
        if socket.is_accepted {
            (self.on_closed)();
        }
    }

    pub fn is_stopping(&self) -> bool {
        self.stop_by_ms.is_some()
    }

    fn take_commands(&mut self) {
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.take_command(command),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            }
        }
    }

    fn take_command(&mut self, command: Command) {
        match command {
            Command::Accept(socket, kind) => self.accept(socket, kind),
            Command::Resolved(index, outcome) => self.peer_resolved(index, outcome),
            Command::Stop => self.begin_to_stop(),
        }
    }

    fn accept(&mut self, socket: OwnedFd, kind: Kind) {
        let outcome = match kind {
            Kind::Local { may_ask } => self.accept_local(socket, may_ask),
            Kind::Peer => self.accept_stranger(socket),
        };
        if let Err(error) = outcome {
            if self.last_stranger != error {
                log::error!("A connection was turned away: {error}.");
                self.last_stranger = error;
            }
            (self.on_closed)();
        }
    }

    fn accept_local(&mut self, socket: OwnedFd, may_ask: bool) -> Result<(), String> {
        let stream = std::os::unix::net::UnixStream::from(socket);
        stream.set_nonblocking(true).map_err(|e| format!("fcntl() failed: {e}"))?;
        self.take_local(Stream::Unix(mio::net::UnixStream::from_std(stream)), may_ask)
    }

    pub fn take_local(&mut self, stream: Stream, may_ask: bool) -> Result<(), String> {
        let connection = Connection::new(stream, None, false);
        self.insert(connection, true, Role::Local(Local::new(may_ask))).map_err(|e| format!("epoll failed: {e}"))?;
        Ok(())
    }

    fn accept_stranger(&mut self, socket: OwnedFd) -> Result<(), String> {
        let stream = std::net::TcpStream::from(socket);
        for address in [stream.peer_addr(), stream.local_addr()] {
            self.config.check_address(address.map_err(|e| format!("its address is not known: {e}"))?.ip())?;
        }
        stream.set_nonblocking(true).map_err(|e| format!("fcntl() failed: {e}"))?;
        stream.set_nodelay(true).map_err(|e| format!("setsockopt() failed: {e}"))?;
        let tls = self.config.tls.as_ref().map(|tls| tls.accept()).transpose()?;
        self.take_stranger(Stream::Tcp(mio::net::TcpStream::from_std(stream)), tls)
    }

    pub fn take_stranger(&mut self, stream: Stream, tls: Option<tls::Session>) -> Result<(), String> {
        if self.strangers.len() >= STRANGERS_MAX {
            self.turn_first_stranger_away();
        }
        let session = self.session_with_stranger();
        let role = Role::Stranger(Box::new(session));
        let connection = Connection::new(stream, tls, false);
        let token = self.insert(connection, true, role).map_err(|e| format!("epoll failed: {e}"))?;
        self.strangers.push(token);
        Ok(())
    }

    /// The one who has had the most time, so that a crowd that says nothing does not keep out a peer.
    fn turn_first_stranger_away(&mut self) {
        let sockets = &self.sockets;
        self.strangers.retain(|token| matches!(sockets.get(token), Some(Socket { role: Role::Stranger(_), .. })));
        if self.strangers.len() < STRANGERS_MAX {
            return;
        }
        if let Some(first) = self.strangers.iter().copied().min() {
            self.strangers.retain(|token| *token != first);
            self.close(first, Close::Ended(format!("more than {STRANGERS_MAX} have not said which peer they are")));
        }
    }

    /// Something happened on a connection.
    fn look_at(&mut self, token: Token) {
        let Some(socket) = self.sockets.get_mut(&token) else {
            return;
        };
        match socket.connection.finish_connect() {
            Ok(()) => {}
            Err(error) => return self.close(token, Close::Ended(format!("connect() failed: {error}"))),
        }
        self.to_write.push(token);
        self.read(token);
    }

    fn read_in_turn(&mut self) {
        for token in std::mem::take(&mut self.read_again) {
            self.read(token);
        }
    }

    fn read(&mut self, token: Token) {
        for _ in 0..READS_IN_TURN {
            let Some(socket) = self.sockets.get_mut(&token) else {
                return;
            };
            match socket.connection.read(&mut self.buffer) {
                Ok(Incoming::Bytes) => self.take_frames(token),
                Ok(Incoming::Nothing) => return,
                Ok(Incoming::End) => {
                    let where_ = if socket.connection.ended_in_frame() { " inside a frame" } else { "" };
                    return self.close(token, Close::Ended(format!("the connection was closed{where_}")));
                }
                // A connect under way; its end is an event.
                Err(error) if error.kind() == io::ErrorKind::NotConnected => return,
                // TLS has told it already.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    return self.close(token, Close::Refused { reason: error.to_string(), tell: false });
                }
                Err(error) => return self.close(token, Close::Ended(format!("read() failed: {error}"))),
            }
        }
        self.read_again.push(token);
    }

    fn take_frames(&mut self, token: Token) {
        while let Some(socket) = self.sockets.get_mut(&token) {
            let outcome = match socket.connection.next_frame() {
                Ok(None) => return,
                Ok(Some(frame)) => self.take_frame(token, frame),
                Err(error) => Err(Close::Malformed(error.to_string())),
            };
            if let Err(why) = outcome {
                self.close(token, why);
            }
        }
    }

    fn take_frame(&mut self, token: Token, frame: Frame) -> Result<(), Close> {
        match self.sockets.get_mut(&token).map(|socket| &mut socket.role) {
            Some(Role::Local(_)) => self.local_frame(token, frame),
            Some(Role::Stranger(session)) => {
                let event = session.receive(frame, self.now_ms);
                self.stranger_event(token, event)
            }
            Some(Role::Peer(index)) => {
                let index = *index;
                self.peer_frame(index, frame)
            }
            Some(Role::Worker(index)) => {
                let index = *index;
                self.worker_frame(index, frame)
            }
            None => Ok(()),
        }
    }

    fn write(&mut self) {
        if !self.journal.is_urgent() {
            for index in 0..self.peers.len() {
                self.write_to_peer(index);
            }
        }
        for token in std::mem::take(&mut self.to_write) {
            let Some(socket) = self.sockets.get_mut(&token) else {
                continue;
            };
            if let Err(error) = socket.connection.write() {
                self.close(token, Close::Ended(format!("write() failed: {error}")));
            }
        }
    }

    /// Moves frames from the lanes to the socket until it takes no more.
    fn write_to_peer(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        let Some(link) = &mut peer.link else { return };
        let token = link.token;
        let Some(socket) = self.sockets.get_mut(&token) else {
            return;
        };
        let failed = loop {
            let mut more = true;
            while more && socket.connection.waiting() < OUT_BYTES_HIGH {
                match link.session.next_frame(&mut peer.outbox, self.now_ms, socket.connection.out()) {
                    Ok(has_more) => more = has_more,
                    Err(error) => log::error!("A frame cannot be sent, which is a bug in Dovetail: {error}."),
                }
            }
            match socket.connection.write() {
                Ok(true) if more => {}
                Ok(_) => return,
                Err(error) => break error,
            }
        };
        self.close(token, Close::Ended(format!("write() failed: {failed}")));
    }

    /// Does what has become due.
    fn keep_time(&mut self) {
        if self.order.wake_up_ms().is_some_and(|due| due <= self.now_ms) {
            let (mut released, mut holes) = (Vec::new(), Vec::new());
            self.order.expire(self.now_ms, &mut self.spans, &mut released, &mut holes);
            self.ship_all(released);
            self.look_into_holes(holes);
        }
        self.look_for_names();
        self.forget_gone();
        self.look_at_lists();
        for index in 0..self.peers.len() {
            self.peer_tick(index);
        }
        for index in 0..self.workers.len() {
            self.worker_tick(index);
        }
        self.tick_strangers();
        self.tick_comparisons();
    }

    fn tick_strangers(&mut self) {
        let now_ms = self.now_ms;
        for at in (0..self.strangers.len()).rev() {
            let token = self.strangers[at];
            let error = match self.sockets.get_mut(&token).map(|socket| &mut socket.role) {
                Some(Role::Stranger(session)) => session.tick(now_ms).err(),
                _ => {
                    self.strangers.swap_remove(at);
                    continue;
                }
            };
            if let Some(error) = error {
                self.strangers.swap_remove(at);
                self.close(token, Close::Ended(error.to_string()));
            }
        }
    }

    fn timeout(&self) -> Option<Duration> {
        let is_loading = self.peers.iter().any(|peer| peer.is_up() && peer.outbox.wants().is_some());
        if !self.read_again.is_empty() || self.has_closed || is_loading {
            return Some(Duration::ZERO);
        }
        // At the end nothing is begun any more.
        let peers = self.peers.iter().filter(|peer| !self.is_stopping() || peer.link.is_some());
        let workers = self.workers.iter().filter(|_| !self.is_stopping());
        let strangers = self.strangers.iter().filter_map(|token| match &self.sockets.get(token)?.role {
            Role::Stranger(session) => Some(session.wake_up_ms()),
            _ => None,
        });
        let now = self.outside.elapsed();
        let until_commit = self.commit_due().map(|due| due.saturating_sub(now));
        let due_ms = strangers
            .chain(peers.filter_map(PeerState::wake_up_ms))
            .chain(workers.filter_map(Worker::wake_up_ms))
            .chain(self.order.wake_up_ms())
            .chain(self.heals.wake_up_ms())
            .chain(self.lists.wake_up_ms())
            .chain(self.work.wake_up_ms())
            .chain(self.redos.wake_up_ms(self.now_ms))
            .chain(self.questions.wake_up_ms(self.now_ms))
            .chain(self.comparisons.wake_up_ms(self.now_ms))
            .chain(self.unnamed.front().map(|(due_ms, ..)| *due_ms))
            .chain(self.stop_by_ms)
            .min();
        // One more, because the clock is read in whole milliseconds.
        let until_due = due_ms.map(|due_ms| Duration::from_millis(due_ms + 1).saturating_sub(now));
        until_commit.into_iter().chain(until_due).min()
    }

    fn begin_to_stop(&mut self) {
        self.stop_by_ms = Some(self.now_ms + STOP_MS_MAX);
        // What the local processes have sent is still taken. What they have not goes to the relay that comes next.
        for (token, socket) in &self.sockets {
            if matches!(socket.role, Role::Local(_)) && socket.connection.stop_reading().is_ok() {
                self.read_again.push(*token);
            }
        }
    }

    fn is_at_end(&self) -> bool {
        let Some(stop_by_ms) = self.stop_by_ms else {
            return false;
        };
        // What is still held for what is before it is found again by the relay that comes next.
        let is_read = self.read_again.is_empty();
        let is_written = self.sockets.values().all(|socket| socket.connection.is_sent());
        // A change must not be applied by an old worker and, sent again, by a new one at the same time.
        let is_applied = !self.workers.iter().any(Worker::is_applying);
        let is_settled = is_read && is_written && is_applied && self.peers.iter().all(PeerState::is_settled);
        is_settled || stop_by_ms <= self.now_ms
    }
}
