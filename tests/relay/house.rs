//! Servers for the tests: each an engine with its listeners, in a folder that goes with the test.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustls::{ClientConnection, StreamOwned};

use dovetail::relay::{client, start, Config, Connection, Handle, Peer};
use dovetail::wire::frame::{self, Decoder};
use dovetail::wire::proto::frame::Kind;
use dovetail::wire::proto::op::What;
use dovetail::wire::proto::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for a condition.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

pub fn address(listener: &TcpListener) -> String {
    listener.local_addr().unwrap().to_string()
}

/// UIDNEXT tells the tests' changes apart.
pub fn uid_of(change: &Change) -> u32 {
    change.mailbox.as_ref().unwrap().uid_next
}

pub struct House {
    folder: PathBuf,
}

impl House {
    pub fn new() -> House {
        static HOUSES: AtomicUsize = AtomicUsize::new(0);
        let number = HOUSES.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("dovetail-relay-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        House { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub fn listener(&self) -> TcpListener {
        TcpListener::bind("127.0.0.1:0").unwrap()
    }

    /// Servers a and b, connected.
    pub fn pair(&self) -> (Server, Server) {
        self.pair_with(|_| {})
    }

    pub fn pair_with(&self, edit: impl Fn(&mut Config)) -> (Server, Server) {
        let (for_a, for_b) = (self.listener(), self.listener());
        let (at_a, at_b) = (address(&for_a), address(&for_b));
        let b = Server::start(self, "b", &[("a", at_a)], for_b, &edit);
        let a = Server::start(self, "a", &[("b", at_b)], for_a, &edit);
        until("a and b are connected", || a.peer("b").state == "connected" && b.peer("a").state == "connected");
        (a, b)
    }

    /// Servers of these names, every one a peer of every other, connected.
    pub fn mesh<const N: usize>(&self, names: [&str; N]) -> [Server; N] {
        let all = names.map(|name| names.into_iter().filter(|peer| *peer != name).collect());
        self.connected(names, all)
    }

    /// Servers, each with the peers that it is to have.
    pub fn connected<const N: usize>(&self, names: [&str; N], peers: [Vec<&str>; N]) -> [Server; N] {
        let mut listeners = names.map(|_| Some(self.listener()));
        let at: Vec<(&str, String)> =
            names.into_iter().zip(&listeners).map(|(name, l)| (name, address(l.as_ref().unwrap()))).collect();
        let mut number = 0;
        let servers = names.map(|name| {
            let of_server: Vec<_> = at.iter().filter(|(peer, _)| peers[number].contains(peer)).cloned().collect();
            number += 1;
            Server::start(self, name, &of_server, listeners[number - 1].take().unwrap(), |_| {})
        });
        for server in &servers {
            until("all are connected", || server.status().peers.iter().all(|peer| peer.state == "connected"));
        }
        servers
    }

    pub fn server(&self, name: &str, peers: &[(&str, String)]) -> Server {
        self.server_with(name, peers, |_| {})
    }

    pub fn server_with(&self, name: &str, peers: &[(&str, String)], edit: impl FnOnce(&mut Config)) -> Server {
        Server::start(self, name, peers, self.listener(), edit)
    }
}

impl Drop for House {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// An engine with its listeners. Its workers are played by the test, one job at a time.
pub struct Server {
    handle: Option<Arc<Handle>>,
    is_ending: Arc<AtomicBool>,
    listeners: Vec<JoinHandle<()>>,
    local: PathBuf,
    worker_socket: PathBuf,
    peer_address: String,
    closed: Arc<AtomicUsize>,
    jobs: Mutex<Receiver<(Wire, Kind)>>,
}

impl Server {
    fn start(
        house: &House,
        name: &str,
        peers: &[(&str, String)],
        for_peers: TcpListener,
        edit: impl FnOnce(&mut Config),
    ) -> Server {
        let worker_socket = house.path(&format!("{name}-worker"));
        let local = house.path(&format!("{name}-local"));
        let peer_address = address(&for_peers);
        // Of the one before, which the test has ended.
        for socket in [&worker_socket, &local] {
            let _ = std::fs::remove_file(socket);
        }
        let (workers, for_local) = (UnixListener::bind(&worker_socket).unwrap(), UnixListener::bind(&local).unwrap());
        let mut config = Config {
            server: name.into(),
            peers: peers
                .iter()
                .map(|(name, address)| Peer { name: (*name).into(), address: address.clone() })
                .collect(),
            worker_socket: worker_socket.clone(),
            workers: 2,
            queue_bytes_max: 16 << 20,
            tls: None,
            insecure_plaintext: false,
            software: "test".into(),
            journal: house.path(&format!("{name}-journal")),
            journal_bytes_max: 1 << 30,
            compare_listed_after_us: None,
            compare_interval_ms: None,
            journal_age_us_max: 1 << 40,
            client_limit: 10_000,
            boot: "boot".into(),
        };
        std::fs::create_dir_all(&config.journal).unwrap();
        edit(&mut config);
        let closed = Arc::new(AtomicUsize::new(0));
        let count = closed.clone();
        let on_closed = move || {
            count.fetch_add(1, Ordering::SeqCst);
        };
        let handle = start(config, on_closed, || {}).unwrap();
        let handle = Arc::new(handle);
        let is_ending = Arc::new(AtomicBool::new(false));
        let (to_test, jobs) = channel();
        let accept = |kind: Connection| {
            let (handle, is_ending) = (Arc::downgrade(&handle), is_ending.clone());
            move |socket: OwnedFd| {
                if let (false, Some(handle)) = (is_ending.load(Ordering::SeqCst), handle.upgrade()) {
                    assert!(handle.accept(socket, kind));
                }
            }
        };
        let (take_local, take_peer) = (accept(Connection::Local { uid: None }), accept(Connection::Peer));
        let (ends, ending) = (is_ending.clone(), is_ending.clone());
        let listeners = vec![
            listen(ending.clone(), move || for_local.accept().unwrap().0, move |s| take_local(s.into())),
            listen(ending, move || for_peers.accept().unwrap().0, move |s| take_peer(s.into())),
            listen(ends, move || workers.accept().unwrap().0, move |s| listen_to_engine(s, to_test.clone())),
        ];
        Server {
            handle: Some(handle),
            is_ending,
            listeners,
            local,
            worker_socket,
            peer_address,
            closed,
            jobs: Mutex::new(jobs),
        }
    }

    pub fn status(&self) -> Status {
        client::status(&self.local, None, PATIENCE).unwrap()
    }

    /// How often what has this name was counted.
    pub fn noted(&self, name: &str) -> u64 {
        let notes = self.status().counters.unwrap().notes;
        notes.iter().find(|note| note.name == name).map_or(0, |note| note.count)
    }

    pub fn peer(&self, name: &str) -> PeerStatus {
        self.status().peers.into_iter().find(|peer| peer.peer == name).unwrap()
    }

    /// Whether the engine has ended by itself.
    pub fn has_failed(&self) -> bool {
        self.handle.as_ref().is_some_and(|handle| !handle.is_running())
    }

    /// What needs a comparison or a person.
    pub fn failed(&self) -> Vec<FailedEntry> {
        client::failed(&self.local, PATIENCE).unwrap()
    }

    /// Users for whom something cannot go on.
    pub fn waiting(&self) -> Vec<WaitingEntry> {
        client::waiting(&self.local, PATIENCE).unwrap()
    }

    /// What failed is forgotten, of one user or all; how many entries there were.
    pub fn clear_failed(&self, user: Option<&str>) -> u64 {
        client::clear_failed(&self.local, user, PATIENCE).unwrap()
    }

    /// The user is compared with all peers until nothing differs.
    pub fn resync(&self, user: &str) -> Result<(), String> {
        client::compare(&self.local, Some(user), (true, false), PATIENCE, |_| {})
    }

    /// The same, with all that is in the mails.
    pub fn resync_bodies(&self, user: &str) -> Result<(), String> {
        client::compare(&self.local, Some(user), (true, true), PATIENCE, |_| {})
    }

    pub fn progress(&self) -> Progress {
        client::progress(&self.local, PATIENCE).unwrap()
    }

    /// What peers lack of what the user did until now, without patience if that is known at once.
    pub fn wait_for_peers(&self, user: &str) -> Vec<Lack> {
        client::wait(&self.local, Some(user), Duration::from_millis(1), PATIENCE).unwrap()
    }

    /// A person says that this peer is to be let in again.
    pub fn accept_peer(&self, name: &str) {
        client::accept_peer(&self.local, name, PATIENCE).unwrap();
    }

    /// Accepted connections that were closed, those of status requests included.
    pub fn closed(&self) -> usize {
        self.closed.load(Ordering::SeqCst)
    }

    /// A mail process that has attached.
    pub fn process(&self, name: &str) -> Wire {
        let mut wire = Wire::new(UnixStream::connect(&self.local).unwrap());
        wire.send(Kind::Attach(Attach { process: name.into(), pid: 4711 }));
        wire
    }

    /// A process that the relay trusts with nothing, and that has said this before it is looked at: so the kernel tells nobody's uid.
    pub fn untrusted(&self, uid: u32, said: &[Kind]) -> Wire {
        let (its, relays) = UnixStream::pair().unwrap();
        let mut wire = Wire::new(its);
        said.iter().for_each(|kind| wire.send(kind.clone()));
        let handle = self.handle.as_ref().unwrap();
        assert!(handle.accept(relays.into(), Connection::Local { uid: Some(uid) }));
        wire
    }

    pub fn connect(&self) -> Wire {
        Wire::new(self.connect_raw())
    }

    pub fn address(&self) -> String {
        self.peer_address.clone()
    }

    pub fn connect_raw(&self) -> TcpStream {
        TcpStream::connect(&self.peer_address).unwrap()
    }

    /// A peer that has greeted and was greeted.
    pub fn connect_as_peer(&self, name: &str) -> Wire {
        let mut wire = self.connect();
        wire.greet(name);
        wire
    }

    /// The next job for one of the workers, and that worker.
    pub fn next_job(&self) -> (Wire, Apply) {
        self.try_next_job(PATIENCE).expect("a job")
    }

    /// The same, if one comes in time. Looks at mailboxes find nothing meanwhile.
    pub fn try_next_job(&self, patience: Duration) -> Option<(Wire, Apply)> {
        loop {
            match self.jobs.lock().unwrap().recv_timeout(patience).ok()? {
                (wire, Kind::Apply(apply)) => return Some((wire, apply)),
                (wire, Kind::Look(look)) => wire.finish(Kind::Looked(Looked { job: look.job, ..Default::default() })),
                (_, other) => panic!("{other:?}"),
            }
        }
    }

    /// The next mailboxes that a worker is to look at.
    pub fn next_look(&self) -> (Wire, Look) {
        match self.jobs.lock().unwrap().recv_timeout(PATIENCE).expect("a look") {
            (wire, Kind::Look(look)) => (wire, look),
            (_, other) => panic!("{other:?}"),
        }
    }

    /// The next request to tell, the first of its frames.
    pub fn next_tell(&self) -> (Wire, Tell) {
        match self.jobs.lock().unwrap().recv_timeout(PATIENCE).expect("a request to tell") {
            (wire, Kind::Tell(tell)) => (wire, tell),
            (_, other) => panic!("{other:?}"),
        }
    }

    /// The next question what there is of a user.
    pub fn next_survey(&self) -> (Wire, Survey) {
        self.try_next_survey(PATIENCE).expect("a question")
    }

    /// The same, if one comes in time. Looks at mailboxes find nothing meanwhile.
    pub fn try_next_survey(&self, patience: Duration) -> Option<(Wire, Survey)> {
        loop {
            match self.jobs.lock().unwrap().recv_timeout(patience).ok()? {
                (wire, Kind::Survey(survey)) => return Some((wire, survey)),
                (wire, Kind::Look(look)) => wire.finish(Kind::Looked(Looked { job: look.job, ..Default::default() })),
                (_, other) => panic!("{other:?}"),
            }
        }
    }

    /// The next request to read a body.
    pub fn next_read(&self) -> (Wire, BodyRequest) {
        self.try_next_read(PATIENCE).expect("a request to read")
    }

    /// The same, if one comes in time.
    pub fn try_next_read(&self, patience: Duration) -> Option<(Wire, BodyRequest)> {
        match self.jobs.lock().unwrap().recv_timeout(patience).ok()? {
            (wire, Kind::BodyRequest(request)) => Some((wire, request)),
            (_, other) => panic!("{other:?}"),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_ending.store(true, Ordering::SeqCst);
        // Wakes the listeners.
        let _ = UnixStream::connect(&self.local);
        let _ = UnixStream::connect(&self.worker_socket);
        let _ = TcpStream::connect(&self.peer_address);
        for listener in self.listeners.drain(..) {
            let _ = listener.join();
        }
        if let Some(handle) = self.handle.take().and_then(Arc::into_inner) {
            handle.stop();
        }
    }
}

fn listen<S: 'static>(
    is_ending: Arc<AtomicBool>,
    accept: impl Fn() -> S + Send + 'static,
    take: impl Fn(S) + Send + 'static,
) -> JoinHandle<()> {
    std::thread::spawn(move || loop {
        let socket = accept();
        if is_ending.load(Ordering::SeqCst) {
            return;
        }
        take(socket);
    })
}

/// A worker's connection: its first frame goes to the test, with the connection. The test gives it back for the next
/// job by [`Wire::finish`].
fn listen_to_engine(stream: UnixStream, to_test: Sender<(Wire, Kind)>) {
    let mut wire = Wire::new(stream);
    wire.to_test = Some(to_test);
    wire.wait_for_job();
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<TlsStream>),
}

pub type TlsStream = StreamOwned<ClientConnection, TcpStream>;

impl From<TlsStream> for Stream {
    fn from(stream: TlsStream) -> Stream {
        stream.sock.set_read_timeout(Some(PATIENCE)).unwrap();
        Stream::Tls(Box::new(stream))
    }
}

impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Stream {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Stream::Unix(stream)
    }
}

impl From<TcpStream> for Stream {
    fn from(stream: TcpStream) -> Stream {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Stream::Tcp(stream)
    }
}

/// Stamp of a change, as far as the tests look at it.
pub struct Seq {
    pub epoch: u64,
    pub seq: u64,
}

/// The test's end of a connection.
pub struct Wire {
    stream: Stream,
    decoder: Decoder,
    to_test: Option<Sender<(Wire, Kind)>>,
}

impl Wire {
    pub fn tls(stream: TlsStream) -> Wire {
        Wire::new(stream)
    }

    fn new(stream: impl Into<Stream>) -> Wire {
        Wire { stream: stream.into(), decoder: Decoder::new(), to_test: None }
    }

    pub fn accept(listener: &TcpListener) -> Wire {
        Wire::new(listener.accept().unwrap().0)
    }

    /// If somebody connects just now.
    pub fn try_accept(listener: &TcpListener) -> Option<Wire> {
        listener.set_nonblocking(true).unwrap();
        let accepted = listener.accept().ok();
        listener.set_nonblocking(false).unwrap();
        accepted.map(|(stream, _)| Wire::new(stream))
    }

    pub fn send(&mut self, kind: Kind) {
        self.send_bytes(&frame::encode(&kind.into()).unwrap());
    }

    pub fn send_bytes(&mut self, bytes: &[u8]) {
        match &mut self.stream {
            Stream::Unix(stream) => stream.write_all(bytes).unwrap(),
            Stream::Tcp(stream) => stream.write_all(bytes).unwrap(),
            Stream::Tls(stream) => stream.write_all(bytes).unwrap(),
        }
    }

    /// Sends as many as the socket takes now, of those that it is given.
    pub fn send_while_there_is_room(&mut self, mut next: impl FnMut() -> Kind) {
        let Stream::Unix(stream) = &mut self.stream else { panic!("not of a local connection") };
        stream.set_nonblocking(true).unwrap();
        loop {
            match stream.write(&frame::encode(&next().into()).unwrap()) {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        stream.set_nonblocking(false).unwrap();
    }

    /// Whether the engine is still there to hear it or not.
    pub fn try_send(&mut self, kind: Kind) -> bool {
        self.try_send_bytes(&frame::encode(&kind.into()).unwrap())
    }

    pub fn try_send_bytes(&mut self, bytes: &[u8]) -> bool {
        let outcome = match &mut self.stream {
            Stream::Unix(stream) => stream.write_all(bytes),
            Stream::Tcp(stream) => stream.write_all(bytes),
            Stream::Tls(stream) => stream.write_all(bytes),
        };
        outcome.is_ok()
    }

    /// All bytes up to the connection's end.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let Stream::Tcp(stream) = &mut self.stream else { panic!("not of a plain connection") };
        let _ = stream.read_to_end(&mut bytes);
        bytes
    }

    pub fn next(&mut self) -> Kind {
        self.try_next().expect("a frame, not the connection's end")
    }

    /// Whether the engine closed the connection, whatever it said before.
    pub fn is_closed(&mut self) -> bool {
        while self.try_next().is_some() {}
        true
    }

    /// Whether the engine says who it is, before the connection's end.
    pub fn is_greeted(&mut self) -> bool {
        matches!(self.try_next(), Some(Kind::Hello(_)))
    }

    fn try_next(&mut self) -> Option<Kind> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(frame) = self.decoder.next().unwrap() {
                return frame.kind;
            }
            let outcome = match &mut self.stream {
                Stream::Unix(stream) => stream.read(&mut buffer),
                Stream::Tcp(stream) => stream.read(&mut buffer),
                Stream::Tls(stream) => stream.read(&mut buffer),
            };
            match outcome {
                Ok(0) => return None,
                Ok(length) => self.decoder.push(&buffer[..length]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(_) if matches!(self.stream, Stream::Tls(_)) => return None,
                Err(error) => panic!("waited in vain for the engine: {error}"),
            }
        }
    }

    // ---- A mail process.

    pub fn save(&mut self, user: &str, uid: u32) {
        self.send(Kind::Record(Record { change: Some(save(user, uid)), ..Default::default() }));
    }

    /// False if the relay takes nothing more.
    pub fn try_save(&mut self, user: &str, uid: u32) -> bool {
        let record = Record { change: Some(save(user, uid)), ..Default::default() };
        self.try_send(Kind::Record(record))
    }

    pub fn save_with_span(&mut self, user: &str, uid: u32, (begin, end): (u64, u64)) {
        let span = Span { user: user.into(), mailbox_guid: vec![1; 16], log_seq: 2, begin, end, ..Default::default() };
        self.send(Kind::Record(Record { change: Some(save(user, uid)), spans: vec![span], ..Default::default() }));
    }

    // ---- A worker.

    /// Everything in the job is applied. The worker is free for the next one.
    pub fn applied(self, apply: &Apply) {
        let done = apply.changes.len() as u32;
        self.finish(Kind::Applied(Applied { job: apply.job, done, ..Default::default() }));
    }

    /// Was looked for and found, and the log of the test's mailbox was read from one place to the other.
    pub fn found(mut self, job: u64, changes: Vec<Change>, read: Option<((u32, u64), (u32, u64))>) {
        for change in changes {
            self.send(Kind::Looked(Looked { job, more: true, change: Some(change), ..Default::default() }));
        }
        if let Some((from, to)) = read {
            let known = Span {
                mailbox_guid: vec![1; 16],
                log_seq: to.0,
                begin: from.1,
                end: to.1,
                prev_log_seq: from.0,
                prev_log_end: from.1,
                ..Default::default()
            };
            self.send(Kind::Looked(Looked { job, more: true, known: Some(known), ..Default::default() }));
        }
        self.finish(Kind::Looked(Looked { job, ..Default::default() }));
    }

    /// This ends the job. The worker is free for the next one.
    pub fn finish(mut self, answer: Kind) {
        self.send(answer);
        self.wait_for_job();
    }

    fn wait_for_job(mut self) {
        std::thread::spawn(move || {
            let Stream::Unix(stream) = &self.stream else { return };
            stream.set_read_timeout(None).unwrap();
            let Some(mut kind) = self.try_next() else { return };
            // All frames of a job are one for the test.
            while let Kind::Apply(Apply { more: true, .. }) = &kind {
                let (Kind::Apply(first), Some(Kind::Apply(next))) = (&mut kind, self.try_next()) else { return };
                first.more = next.more;
                first.changes.extend(next.changes);
                first.elsewhere.extend(next.elsewhere);
                first.aliases.extend(next.aliases);
            }
            let Stream::Unix(stream) = &self.stream else { return };
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let to_test = self.to_test.clone();
            if let Some(to_test) = to_test {
                let _ = to_test.send((self, kind));
            }
        });
    }

    // ---- A peer.

    pub fn greet_linked(&mut self, server: &str, linked: &[&str]) {
        let linked = linked.iter().map(|server| (*server).to_owned()).collect();
        let (server, instance) = (server.to_owned(), server.as_bytes().to_vec());
        self.send(Kind::Hello(Hello { server, instance, epoch: 5, linked, ..Default::default() }));
        assert!(matches!(self.next(), Kind::Hello(_)));
    }

    /// The first of its changes that it will send has this number.
    pub fn greet_without(&mut self, server: &str, first_pending: u64) {
        let (server, instance) = (server.to_owned(), server.as_bytes().to_vec());
        self.send(Kind::Hello(Hello { server, instance, epoch: 5, first_pending, ..Default::default() }));
        assert!(matches!(self.next(), Kind::Hello(_)));
    }

    pub fn say_hello(&mut self, server: &str) {
        self.say_hello_of(server, 5);
    }

    pub fn say_hello_of(&mut self, server: &str, epoch: u64) {
        let instance = format!("{server}{epoch}").into_bytes();
        self.send(Kind::Hello(Hello { server: server.into(), instance, epoch, ..Default::default() }));
    }

    pub fn greet(&mut self, server: &str) -> Hello {
        self.say_hello(server);
        match self.next() {
            Kind::Hello(hello) => hello,
            other => panic!("{other:?}"),
        }
    }

    /// Says that all of the other's changes up to this one are applied.
    pub fn greet_knowing(&mut self, server: &str, applied_epoch: u64, applied_seq: u64) {
        self.say_hello_knowing(server, applied_epoch, applied_seq);
        assert!(matches!(self.next(), Kind::Hello(_)));
    }

    pub fn say_hello_knowing(&mut self, server: &str, applied_epoch: u64, applied_seq: u64) {
        let hello = Hello {
            server: server.into(),
            instance: vec![9; 16],
            epoch: 7,
            applied_epoch,
            applied_seq,
            ..Default::default()
        };
        self.send(Kind::Hello(hello));
    }

    pub fn next_change(&mut self) -> Seq {
        loop {
            match self.next() {
                Kind::Change(change) => {
                    let stamp = change.stamp.unwrap();
                    return Seq { epoch: stamp.epoch, seq: stamp.seq };
                }
                Kind::Ping(_) | Kind::Linked(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub fn next_question(&mut self) -> Question {
        loop {
            match self.next() {
                Kind::Question(question) => return question,
                Kind::Ack(_) | Kind::Ping(_) | Kind::Linked(_) | Kind::Known(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub fn next_ack(&mut self, seq: u64) {
        loop {
            match self.next() {
                Kind::Ack(ack) => return assert_eq!((ack.epoch, ack.seqs), (5, vec![seq])),
                Kind::Ping(_) | Kind::Linked(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub fn next_refusal(&mut self) -> Refused {
        loop {
            match self.next() {
                Kind::Refused(refused) => return refused,
                Kind::Ack(_) | Kind::Ping(_) | Kind::Linked(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub fn send_change(&mut self, user: &str, seq: u64) {
        self.send_change_of("a", user, seq);
    }

    pub fn send_change_of(&mut self, origin: &str, user: &str, seq: u64) {
        self.send_change_after(origin, user, seq, &[]);
    }

    /// One that is sent to these servers, or (with its number there) is passed on by another one.
    pub fn send_given(&mut self, origin: &str, user: &str, seq: u64, given: &[&str], carrier: u64) {
        let mut change = save(user, seq as u32);
        change.stamp = Some(Stamp { origin: origin.into(), epoch: 5, seq, clock: 1, vector: vec![] });
        change.given = given.iter().map(|server| (*server).to_owned()).collect();
        change.carrier = carrier;
        self.send(Kind::Change(change));
    }

    /// The next change, of whomever.
    pub fn next_whole_change(&mut self) -> Change {
        loop {
            match self.next() {
                Kind::Change(change) => return change,
                Kind::Ping(_) | Kind::Linked(_) | Kind::Ack(_) | Kind::Known(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// One that comes after others.
    pub fn send_change_after(&mut self, origin: &str, user: &str, seq: u64, causes: &[(&str, u64)]) {
        let mut change = save(user, seq as u32);
        let vector =
            causes.iter().map(|(origin, seq)| SeqOf { origin: (*origin).into(), epoch: 5, seq: *seq }).collect();
        change.stamp = Some(Stamp { origin: origin.into(), epoch: 5, seq, clock: 1, vector });
        self.send(Kind::Change(change));
    }
}

pub fn save(user: &str, uid: u32) -> Change {
    let body = format!("Subject: mail {uid}\n\n").into_bytes();
    let save = Save { size: body.len() as u64, body_inline: true, body, ..Default::default() };
    Change {
        user: user.into(),
        mailbox: Some(Mailbox { guid: vec![1; 16], path: vec!["INBOX".into()], uid_next: uid, ..Default::default() }),
        ops: vec![Op { what: Some(What::Save(save)) }],
        ..Default::default()
    }
}

pub fn change(user: &str, mailbox: Mailbox, what: What) -> Change {
    Change { user: user.into(), mailbox: Some(mailbox), ops: vec![Op { what: Some(what) }], ..Default::default() }
}
