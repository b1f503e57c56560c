//! The loop: polls, reads, lets each connection's role handle its frames, writes. The roles are in the files beside.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, TryRecvError};
use mio::Token;

use super::acks::Acks;
use super::background::Background;
use super::bodies::Bodies;
use super::causes::Causes;
use super::clock::Clock;
use super::compare::Comparisons;
use super::connection::{Connection, Incoming, Stream, READ_BYTES};
use super::flags::Races;
use super::gates::Gates;
use super::heal::Heals;
use super::lines::Floods;
use super::list::Lists;
use super::local::{Local, OUT_BYTES_MAX};
use super::order::Order;
use super::outside::Outside;
use super::owners::Owners;
use super::passing::Told;
use super::peers::PeerState;
use super::poison::Poison;
use super::questions::Questions;
use super::redo::Redos;
use super::spans::Spans;
use super::status::Counts;
use super::strangers::Strangers;
use super::subscribers::Subscribers;
use super::torn::Torn;
use super::unheard::Unheard;
use super::work::Work;
use super::workers::Worker;
use super::{Config, Connection as Kind};
use crate::journal::{Journal, JournalError, Start};
use crate::peer::{Identity, Session};
use crate::tls;
use crate::wire::frame::FrameError;
use crate::wire::proto::{self, Frame};

pub const WAKER: Token = Token(0);
/// Buffers read from one connection before the others have their turn.
const READS_IN_TURN: usize = 8;
/// And frames: a flood of tiny ones must not hold up what others say.
const FRAMES_IN_TURN: usize = 64;
/// A frame with numbers of changes, for each of which the journal is asked, counts as one more for so many.
const NUMBERS_PER_FRAME: usize = 16;
/// A peer's frames wait in their lanes while this much waits for its socket.
const OUT_BYTES_HIGH: usize = 256 << 10;
/// Time for the last acknowledgements at an orderly end.
const STOP_MS_MAX: u64 = 500;
/// A process whom nobody trusts says so soon which it is.
const ATTACH_MS_MAX: u64 = 5_000;
/// Connections of peers that have not said who they are.
const STRANGERS_MAX: usize = 64;

/// What other threads ask for.
pub enum Command {
    Accept(OwnedFd, Kind),
    /// The addresses of a peer's host.
    Resolved(usize, io::Result<Vec<SocketAddr>>),
    Stop,
}

/// How an engine has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was asked to.
    Stopped,
    /// The next one is to begin at once.
    Anew,
    /// Because of an error, which is logged.
    Failed,
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
    /// A peer that is an earlier state of itself: it is told, with the epoch of its own that is known here, and comes again with a new one.
    SetBack { reason: String, epoch: u64 },
}

impl Close {
    pub fn reason(&self) -> &str {
        match self {
            Close::Ended(reason)
            | Close::Malformed(reason)
            | Close::Refused { reason, .. }
            | Close::SetBack { reason, .. } => reason,
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

impl Socket {
    /// Nothing is read from it before its last frame can be taken, nor before it has read what it was answered.
    fn is_held(&self) -> bool {
        matches!(&self.role, Role::Local(local) if local.held.is_some() || self.is_full())
    }

    fn is_full(&self) -> bool {
        self.connection.waiting() > OUT_BYTES_MAX
    }

    /// Before the first bytes are read. False: they have not come.
    fn note_sender(&mut self) -> bool {
        let Role::Local(local) = &mut self.role else { return true };
        local.sender = local.sender.or_else(|| self.connection.sender());
        local.sender.is_some()
    }

    fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if let Role::Local(local) = &mut self.role {
            if let Some(held) = local.held.take() {
                return Ok(Some(*held));
            }
            local.absent.clear();
        }
        self.connection.next_frame()
    }
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
    /// Servers that are no peers, whose changes peers pass on; the last that was named comes last.
    pub far: Vec<String>,
    /// Users whose mail is replicated with these of the peers only.
    pub user_peers: HashMap<Arc<str>, Vec<String>>,
    pub bodies: Bodies,
    pub order: Order,
    pub spans: Spans,
    pub heals: Heals,
    pub owners: Owners,
    /// Users up to this one have been looked at since the start; none: all.
    pub swept: Option<String>,
    pub unheard: Unheard,
    /// Whom the userdb has listed so far, and the journal does not know.
    pub asked: Vec<String>,
    pub races: Races,
    pub redos: Redos,
    pub questions: Questions,
    pub comparisons: Comparisons,
    pub background: Background,
    pub gates: Gates,
    pub acks: Acks,
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
    /// Mailboxes that were made here, by which change, and when they are to be looked at if they are still empty.
    pub newborn: VecDeque<(u64, Arc<str>, Vec<u8>, u64)>,
    pub clock: Clock,
    pub journal: Journal,
    /// When the journal is looked at for what is too old.
    pub trim_at_ms: u64,
    pub last_job: u64,
    pub counts: Counts,
    /// Last reason for which a peer was turned away that is none of ours, logged once.
    pub last_stranger: String,
    pub floods: Floods,
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
    stranger_rate: Strangers,
    /// Local processes that are to have said by then which they are; the next one first.
    unattached: VecDeque<(u64, Token)>,
    /// Connections that may have more to read than was read in their turn.
    read_again: Vec<Token>,
    /// Connections whose last frame can be taken now.
    pub read_on: Vec<Token>,
    /// Connections, but for peers', with something to write.
    to_write: Vec<Token>,
    buffer: Vec<u8>,
    /// Something was closed in this round: its end may have queued frames for others.
    has_closed: bool,
    /// A peer's lane of bodies has room again: what was not begun for that reason can be.
    has_room: bool,
    stop_by_ms: Option<u64>,
    /// It is to end in good order, for the next one to begin with what the journal says then; when who asked for it has the answer.
    pub begins_anew: bool,
    /// The journal's last commits may be lost.
    pub is_after_boot: bool,
    /// Why the journal cannot be used.
    pub failed: Option<JournalError>,
}

impl Engine {
    pub fn new(
        mut config: Config,
        mut outside: Box<dyn Outside>,
        commands: Receiver<Command>,
        on_closed: Box<dyn Fn()>,
        (journal, start): (Journal, Start),
    ) -> Result<Engine, Fatal> {
        let instance = outside.instance().map_err(Fatal::Poll)?;
        let removed = journal.removed_peers()?;
        for peer in config.peers.iter().filter(|peer| removed.contains(&peer.name)) {
            log::warn!(
                "Peer {0}: it was removed (doveadm dovetail peer remove {0}), and nothing is replicated with it: take it out of \
                 dovetail_peers. As a new server it can be put there again after a reload without it.",
                peer.name
            );
        }
        config.peers.retain(|peer| !removed.contains(&peer.name));
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
            far: Vec::new(),
            user_peers: HashMap::new(),
            bodies: Bodies::default(),
            order: Order::default(),
            spans: Spans::default(),
            heals: Heals::default(),
            owners: Owners::default(),
            swept: Some(String::new()),
            unheard: start.unheard_since.map_or(Unheard::Done, Unheard::Ask),
            asked: Vec::new(),
            races: Races::default(),
            redos: Redos::default(),
            questions: Questions::default(),
            comparisons: Comparisons::default(),
            background: Background::default(),
            gates: Gates::default(),
            acks: Acks::default(),
            flags_clocks: HashMap::new(),
            flags_settled_ms: 0,
            clock_noted: 0,
            users_elsewhere: HashSet::new(),
            lists: Lists::default(),
            unnamed: VecDeque::new(),
            newborn: VecDeque::new(),
            clock: Clock::default(),
            journal,
            is_after_boot: start.is_after_boot,
            trim_at_ms: 0,
            last_job: 0,
            counts: Counts::default(),
            last_stranger: String::new(),
            floods: Floods::default(),
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
            stranger_rate: Strangers::default(),
            unattached: VecDeque::new(),
            read_again: Vec::new(),
            read_on: Vec::new(),
            to_write: Vec::new(),
            buffer: vec![0; READ_BYTES],
            has_closed: false,
            has_room: false,
            stop_by_ms: None,
            begins_anew: false,
            failed: None,
            config,
        };
        engine.resume()?;
        Ok(engine)
    }

    /// Runs until it is stopped. A panic ends it with a line in the log.
    pub fn run_guarded(mut self) -> End {
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| self.run()));
        match &outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::error!("The relay ends: {error}."),
            Err(_) => log::error!("The relay ends because of a panic, which is a bug in Dovetail."),
        }
        let accepted = self.sockets.values().filter(|socket| socket.is_accepted).count();
        self.sockets.clear();
        (0..accepted).for_each(|_| (self.on_closed)());
        if !matches!(outcome, Ok(Ok(()))) {
            return End::Failed;
        }
        let end = if self.begins_anew { End::Anew } else { End::Stopped };
        if let Err(error) = self.journal.close() {
            log::error!("The relay's journal could not be closed: {error}.");
        }
        end
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
        (self.has_closed, self.has_room) = (false, false);
        self.read_in_turn();
        self.keep_time();
        self.dispatch_jobs();
        // Before anybody hears of it.
        self.keep_journal()?;
        self.answer_acks();
        self.write();
        if self.begins_anew && !self.is_stopping() {
            self.begin_to_stop();
        }
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
            Command::Stop => {
                self.begins_anew = false;
                self.begin_to_stop();
            }
        }
    }

    fn accept(&mut self, socket: OwnedFd, kind: Kind) {
        let outcome = match kind {
            Kind::Local { uid } => self.accept_local(socket, uid),
            Kind::Peer => self.accept_stranger(socket),
        };
        if let Err(error) = outcome {
            self.say_of_stranger(format!("A connection was turned away: {error}."));
            (self.on_closed)();
        }
    }

    /// Once, until there is another reason.
    pub fn say_of_stranger(&mut self, line: String) {
        if self.last_stranger == line {
            return;
        }
        if let Some(line) = self.floods.strangers.take(|| line.clone(), self.now_ms) {
            log::error!("{line}");
        }
        self.last_stranger = line;
    }

    fn accept_local(&mut self, socket: OwnedFd, uid: Option<u32>) -> Result<(), String> {
        let stream = std::os::unix::net::UnixStream::from(socket);
        stream.set_nonblocking(true).map_err(|e| format!("fcntl() failed: {e}"))?;
        self.take_local(Stream::Unix(mio::net::UnixStream::from_std(stream)), uid)
    }

    pub fn take_local(&mut self, stream: Stream, uid: Option<u32>) -> Result<(), String> {
        self.make_room(uid)?;
        let connection = Connection::new(stream, None, false);
        let role = Role::Local(Local::new(uid));
        let token = self.insert(connection, true, role).map_err(|e| format!("epoll failed: {e}"))?;
        if uid.is_some() {
            self.unattached.push_back((self.now_ms + ATTACH_MS_MAX, token));
        }
        Ok(())
    }

    /// Local processes leave room for peers, and no system user keeps out another one: where there is no room, the last connection
    /// goes of the one who has the most.
    fn make_room(&mut self, uid: Option<u32>) -> Result<(), String> {
        let kept = (STRANGERS_MAX + 2 * self.peers.len()).min(self.config.client_limit / 2);
        let locals_max = self.config.client_limit - kept;
        if self.sockets.len() < locals_max {
            return Ok(());
        }
        let (mut locals, mut of_users) = (0, HashMap::<u32, (usize, Token)>::new());
        for (token, socket) in &self.sockets {
            let Role::Local(local) = &socket.role else { continue };
            locals += 1;
            if let Some(uid) = local.uid {
                let (count, last) = of_users.entry(uid).or_insert((0, *token));
                (*count, *last) = (*count + 1, (*last).max(*token));
            }
        }
        if locals < locals_max {
            return Ok(());
        }
        // Root and the relay's own user have the right of way.
        let own = uid.map_or(0, |uid| of_users.get(&uid).map_or(0, |(count, _)| *count) + 1);
        let (uid, (count, last)) = of_users
            .into_iter()
            .max_by_key(|(_, (count, last))| (*count, *last))
            .filter(|(_, (count, _))| *count > own)
            .ok_or_else(|| format!("local processes have {locals_max} connections already"))?;
        let why = format!("system user {uid} has {count} connections, and others want one");
        self.close(last, Close::Malformed(why));
        Ok(())
    }

    fn accept_stranger(&mut self, socket: OwnedFd) -> Result<(), String> {
        let stream = std::net::TcpStream::from(socket);
        let unknown = |e: io::Error| format!("its address is not known: {e}");
        let (from, to) = (stream.peer_addr().map_err(unknown)?.ip(), stream.local_addr().map_err(unknown)?.ip());
        self.config.check_address(from)?;
        self.config.check_address(to)?;
        if !self.stranger_rate.may_begin(from, self.now_ms) {
            self.counts.note("turned_away", 1);
            return Err(format!("there are too many from {from} in a short time"));
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

    /// Whether all that was there to be read has been.
    pub fn has_read_all(&self) -> bool {
        self.read_again.is_empty()
    }

    fn read_in_turn(&mut self) {
        for token in std::mem::take(&mut self.read_on) {
            if self.take_frames(token, &mut 0) {
                self.read(token);
            }
        }
        for token in std::mem::take(&mut self.read_again) {
            self.read(token);
        }
    }

    fn read(&mut self, token: Token) {
        // What was left of the turn before comes first.
        let mut frames = 0;
        if self.is_held(token) || !self.take_frames(token, &mut frames) {
            return;
        }
        for _ in 0..READS_IN_TURN {
            let Some(socket) = self.sockets.get_mut(&token) else {
                return;
            };
            if socket.is_held() || !socket.note_sender() {
                return;
            }
            match socket.connection.read(&mut self.buffer) {
                Ok(Incoming::Bytes) => {
                    if !self.take_frames(token, &mut frames) {
                        return;
                    }
                }
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

    /// False: its turn is over.
    fn take_frames(&mut self, token: Token, frames: &mut usize) -> bool {
        while let Some(socket) = self.sockets.get_mut(&token) {
            if *frames >= FRAMES_IN_TURN {
                self.read_again.push(token);
                return false;
            }
            let outcome = match socket.next_frame() {
                Ok(None) => return true,
                Ok(Some(frame)) => {
                    *frames += 1 + numbers_in(&frame) / NUMBERS_PER_FRAME;
                    self.take_frame(token, frame)
                }
                Err(error) => Err(Close::Malformed(error.to_string())),
            };
            if let Err(why) = outcome {
                self.close(token, why);
            }
            if self.is_held(token) {
                return false;
            }
        }
        false
    }

    fn is_held(&self, token: Token) -> bool {
        self.sockets.get(&token).is_some_and(Socket::is_held)
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
            let was_full = socket.is_full();
            match socket.connection.write() {
                Ok(_) if was_full && !socket.is_full() => self.read_again.push(token),
                Ok(_) => {}
                Err(error) => self.close(token, Close::Ended(format!("write() failed: {error}"))),
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
        let (before, was_loaded) = (socket.connection.sent(), link.session.is_loaded());
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
                Ok(_) => {
                    let connection = &socket.connection;
                    link.session.wrote(connection.sent() > before, !connection.is_sent(), self.now_ms);
                    self.has_room |= was_loaded && !link.session.is_loaded();
                    return;
                }
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
        self.look_at_newborn();
        self.forget_gone();
        self.look_at_lists();
        for index in 0..self.peers.len() {
            self.peer_tick(index);
        }
        for index in 0..self.workers.len() {
            self.worker_tick(index);
        }
        self.tick_strangers();
        self.tick_unattached();
        self.tick_background();
        self.tick_comparisons();
        self.tick_gates();
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

    fn tick_unattached(&mut self) {
        while self.unattached.front().is_some_and(|(due_ms, _)| *due_ms <= self.now_ms) {
            let Some((_, token)) = self.unattached.pop_front() else { return };
            if matches!(self.sockets.get(&token), Some(Socket { role: Role::Local(local), .. }) if !local.is_attached) {
                let why = format!("it has not said within {} secs which process it is", ATTACH_MS_MAX / 1_000);
                self.close(token, Close::Malformed(why));
            }
        }
    }

    fn timeout(&self) -> Option<Duration> {
        let is_loading = self.peers.iter().any(|peer| peer.is_up() && peer.outbox.wants().is_some());
        if !self.read_again.is_empty() || !self.read_on.is_empty() || self.has_closed || self.has_room || is_loading {
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
            .chain(self.comparisons.wake_up_ms(self.now_ms).filter(|_| !self.is_stopping()))
            .chain(self.background.wake_up_ms())
            .chain(self.gates.wake_up_ms())
            .chain(self.acks.wake_up_ms(self.now_ms))
            .chain(self.unnamed.front().map(|(due_ms, ..)| *due_ms))
            .chain(self.newborn.front().map(|(due_ms, ..)| *due_ms))
            .chain(self.unattached.front().map(|(due_ms, _)| *due_ms))
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

    pub fn is_at_end(&self) -> bool {
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

fn numbers_in(frame: &Frame) -> usize {
    match &frame.kind {
        Some(proto::frame::Kind::Known(known)) => known.seqs.len(),
        Some(proto::frame::Kind::Ack(ack)) => ack.seqs.len(),
        _ => 0,
    }
}
