//! A mail process's connection to its relay: one non-blocking write when the relay keeps up; otherwise a bounded queue, and
//! a thread that empties it and reconnects.
//!
//! The process's own thread never waits and never fails: what does not fit into the queue is dropped and counted, and
//! the relay is told how many as soon as it takes records again, or at the process's end. Our thread never calls Dovecot and
//! never writes to the log itself. It is started when it is first needed: while a second thread lives, each change of the uid
//! in lmtp interrupts it.

use super::INTENTS_MAX;
use crate::wire::frame::Decoder;
use crate::wire::{frame, proto};
use crossbeam_channel::{bounded, Receiver, Sender, TryRecvError};
use mio::net::UnixStream;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use nix::sys::socket::{setsockopt, sockopt::PassCred};
use prost::Message as _;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Records that the queue holds at most, whatever their size.
const QUEUE_RECORDS_MAX: usize = 16 * 1024;
/// Frames that one system call writes, at most.
const FRAMES_PER_WRITE: usize = 64;
/// Encoded bytes that wait for the socket; the rest stays in the queue.
const OUTPUT_BYTES_AIM: usize = 256 << 10;
const RECONNECT_MIN: Duration = Duration::from_millis(50);
const RECONNECT_MAX: Duration = Duration::from_secs(10);
const STACK_SIZE: usize = 128 << 10;

const SOCKET: Token = Token(0);
const WAKE: Token = Token(1);

/// After an answer that did not come, none is waited for so long, and twice as long after the next.
const SILENCE_MIN: Duration = Duration::from_secs(1);
const SILENCE_MAX: Duration = Duration::from_secs(32);
/// Between two looks whether the thread has connected again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Starts a thread.
pub type Spawn = fn(std::thread::Builder, Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>;

/// What the link needs to know.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// The relay's Unix socket.
    pub socket: PathBuf,
    /// Bytes of unsent records that may wait.
    pub queue_size: u64,
    /// Dovecot's service name, for the relay's log.
    pub process: String,
    /// How long `finish` may take.
    pub finish_timeout: Duration,
    /// Starts the thread; the host blocks signals around it.
    pub spawn: Spawn,
}

/// The process's end of the connection.
pub struct Link {
    config: LinkConfig,
    shared: Arc<Shared>,
    sender: Sender<proto::Record>,
    /// Until the thread is started.
    receiver: Option<Receiver<proto::Record>>,
    waker: Option<Arc<Waker>>,
    thread: Option<JoinHandle<()>>,
    unusable: bool,
    /// What the relay says, if it is ever waited for.
    answers: Option<Answers>,
    /// It said nothing the last time: nobody waits for it before.
    silent_until: Option<Instant>,
    silence: Duration,
}

/// The relay's half of the connection. Read by the process's own thread, and only while that waits.
struct Answers {
    poll: Poll,
    events: Events,
    decoder: Decoder,
    /// Whose bytes they are.
    connection: u64,
}

struct Shared {
    queued_bytes: AtomicU64,
    finishing: AtomicBool,
    /// Records that were dropped, and that the relay was not told of.
    dropped: AtomicU64,
    output: Mutex<Output>,
}

/// An encoded frame.
struct Waiting {
    frame: Vec<u8>,
    /// That are lost, or not counted, if it is not written: itself, and those that it says were dropped.
    records: u64,
}

/// The socket and what waits for it. Locked by both threads for the length of a non-blocking write.
#[derive(Default)]
struct Output {
    stream: Option<UnixStream>,
    /// Who we are and what we intend: first on every connection.
    preamble: Vec<u8>,
    /// Encoded frames. The first one is partly written.
    frames: VecDeque<Waiting>,
    /// Bytes of `frames`.
    bytes: usize,
    /// Bytes already written of the preamble, or else of the first frame.
    written: usize,
    /// How often it was connected.
    connections: u64,
    /// What the relay must know after a reconnect.
    intents: Vec<proto::Intent>,
}

impl Output {
    fn push(&mut self, kind: proto::frame::Kind) {
        let records = match &kind {
            proto::frame::Kind::Record(record) => {
                record.dropped + u64::from(record.change.is_some() || !record.spans.is_empty())
            }
            proto::frame::Kind::Goodbye(goodbye) => goodbye.dropped,
            _ => 0,
        };
        match frame::encode(&proto::Frame { kind: Some(kind) }) {
            Ok(frame) => {
                self.bytes += frame.len();
                self.frames.push_back(Waiting { frame, records });
            }
            Err(error) => log::error!("A record can't be sent to the relay: {error}"),
        }
    }

    fn is_empty(&self) -> bool {
        self.preamble.is_empty() && self.frames.is_empty()
    }

    /// Writes what the socket takes. `Ok(true)`: all is written.
    fn flush(&mut self) -> io::Result<bool> {
        loop {
            let Some(stream) = &mut self.stream else { return Err(ErrorKind::NotConnected.into()) };
            if self.preamble.is_empty() && self.frames.is_empty() {
                return Ok(true);
            }
            let frames = self.frames.iter().take(FRAMES_PER_WRITE).map(|waiting| IoSlice::new(&waiting.frame));
            let mut slices: Vec<IoSlice> = Some(IoSlice::new(&self.preamble))
                .filter(|slice| !slice.is_empty())
                .into_iter()
                .chain(frames)
                .collect();
            slices[0].advance(self.written);
            match stream.write_vectored(&slices) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => self.written += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            self.forget_written();
        }
    }

    /// Drops what was written whole.
    fn forget_written(&mut self) {
        if !self.preamble.is_empty() && self.written >= self.preamble.len() {
            self.written -= self.preamble.len();
            self.preamble.clear();
        }
        while let (true, Some(Waiting { frame, .. })) = (self.preamble.is_empty(), self.frames.front()) {
            if self.written < frame.len() {
                return;
            }
            self.written -= frame.len();
            self.bytes -= frame.len();
            self.frames.pop_front();
        }
    }

    fn connect(&mut self, config: &LinkConfig) -> io::Result<()> {
        let stream = UnixStream::connect(&config.socket)?;
        // The kernel tells the relay with each byte who we really are; lmtp is one user and then another.
        setsockopt(&stream, PassCred, &true)?;
        self.stream = Some(stream);
        self.connections += 1;
        let intents = self.intents.iter().cloned().map(proto::frame::Kind::Intent);
        self.preamble = std::iter::once(attach(config))
            .chain(intents)
            .filter_map(|kind| frame::encode(&proto::Frame { kind: Some(kind) }).ok())
            .flatten()
            .collect();
        self.written = 0;
        Ok(())
    }

    /// A frame that was written in part is written again, whole.
    fn disconnect(&mut self) {
        self.stream = None;
        self.preamble.clear();
        self.written = 0;
    }
}

impl Link {
    /// Nothing is opened yet.
    pub fn new(config: LinkConfig) -> Link {
        let (sender, receiver) = bounded(QUEUE_RECORDS_MAX);
        let shared = Shared {
            queued_bytes: AtomicU64::new(0),
            finishing: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
            output: Mutex::default(),
        };
        Link {
            config,
            shared: Arc::new(shared),
            sender,
            receiver: Some(receiver),
            waker: None,
            thread: None,
            unusable: false,
            answers: None,
            silent_until: None,
            silence: SILENCE_MIN,
        }
    }

    /// Tells the relay before the write happens: in the socket's buffer it survives this process.
    pub fn intent(&mut self, intent: proto::Intent) {
        let shared = Arc::clone(&self.shared);
        let mut output = lock(&shared.output);
        if output.intents.len() >= INTENTS_MAX {
            output.intents.clear();
        }
        output.intents.push(intent.clone());
        let has_room = (output.bytes as u64) < self.config.queue_size;
        if output.stream.is_some() && has_room {
            output.push(proto::frame::Kind::Intent(intent));
        } else if output.stream.is_none() && self.thread.is_none() {
            // The very first write. If the relay is down the thread goes on trying.
            let _ = output.connect(&self.config);
        }
        let written = output.flush();
        if written.is_err() {
            output.disconnect();
        }
        drop(output);
        self.hand_over_unless(matches!(written, Ok(true)));
    }

    /// What was not written at once is the thread's business.
    fn hand_over_unless(&mut self, written: bool) {
        if !written {
            self.start();
            self.wake();
        }
    }

    /// The short way, when nothing waits before them: one non-blocking write, without the thread. Gives the records back
    /// if they must queue.
    fn write_through(&mut self, records: Vec<proto::Record>) -> Vec<proto::Record> {
        let shared = Arc::clone(&self.shared);
        let Ok(mut output) = shared.output.try_lock() else { return records };
        if output.stream.is_none() && self.thread.is_none() {
            // The very first record, as for the very first intent.
            let _ = output.connect(&self.config);
            let _ = output.flush();
        }
        let has_dropped = shared.dropped.load(Ordering::Relaxed) > 0;
        if has_dropped || output.stream.is_none() || !output.is_empty() || !self.sender.is_empty() {
            return records;
        }
        records.into_iter().for_each(|record| output.push(proto::frame::Kind::Record(record)));
        let written = output.flush();
        if written.is_err() {
            output.disconnect();
        }
        drop(output);
        self.hand_over_unless(matches!(written, Ok(true)));
        Vec::new()
    }

    /// Writes the records, or queues them, or drops them and remembers how many were dropped.
    pub fn send(&mut self, records: Vec<proto::Record>) {
        for record in self.write_through(records) {
            self.queue(record);
        }
    }

    /// Waits until the relay says that this record is as safe as it should be. Does not wait if it said nothing the last time.
    ///
    /// # Errors
    ///
    /// Why it is not, or not yet.
    pub fn await_ack(&mut self, id: u64, timeout: Duration) -> Result<(), String> {
        let deadline = Instant::now() + timeout;
        if self.silent_until.is_some_and(|until| Instant::now() < until) {
            return Err("the relay did not answer the last time".into());
        }
        self.silent_until = None;
        loop {
            match self.read_answer(id) {
                Ok(Some(acked)) => {
                    self.silence = SILENCE_MIN;
                    return if acked.error.is_empty() { Ok(()) } else { Err(acked.error) };
                }
                Ok(None) => {}
                Err(error) => return Err(format!("the connection to the relay failed: {error}")),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.silent_until = Some(Instant::now() + self.silence);
                self.silence = (2 * self.silence).min(SILENCE_MAX);
                return Err(format!("the relay did not answer within {} msecs", timeout.as_millis()));
            }
            let is_connected = lock(&self.shared.output).stream.is_some();
            let Some(answers) = &mut self.answers else { continue };
            let wait = if is_connected { left } else { left.min(LOOK_AGAIN) };
            match answers.poll.poll(&mut answers.events, Some(wait)) {
                Err(error) if error.kind() != ErrorKind::Interrupted => return Err(format!("poll() failed: {error}")),
                _ => {}
            }
        }
    }

    /// Reads what is there. None: the answer is not among it.
    fn read_answer(&mut self, id: u64) -> io::Result<Option<proto::Acked>> {
        let answers = match &mut self.answers {
            Some(answers) => answers,
            none => none.insert(Answers {
                poll: Poll::new()?,
                events: Events::with_capacity(4),
                decoder: Decoder::new(),
                connection: 0,
            }),
        };
        let shared = Arc::clone(&self.shared);
        let mut output = lock(&shared.output);
        let connection = output.connections;
        let Some(stream) = &mut output.stream else { return Ok(None) };
        if answers.connection != connection {
            // A closed one leaves the poll by itself.
            let fd = stream.as_raw_fd();
            answers.poll.registry().register(&mut SourceFd(&fd), SOCKET, Interest::READABLE)?;
            (answers.connection, answers.decoder) = (connection, Decoder::new());
        }
        let mut buffer = [0; 4096];
        loop {
            // Those before are to questions that nobody asks any more.
            while let Some(frame) = answers.decoder.next().map_err(|error| io::Error::other(error.to_string()))? {
                match frame.kind {
                    Some(proto::frame::Kind::Acked(acked)) if acked.id == id => return Ok(Some(acked)),
                    _ => {}
                }
            }
            match stream.read(&mut buffer) {
                Ok(0) => {
                    output.disconnect();
                    drop(output);
                    self.hand_over_unless(false);
                    return Err(io::Error::new(ErrorKind::UnexpectedEof, "it was closed"));
                }
                Ok(size) => answers.decoder.push(&buffer[..size]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn queue(&mut self, record: proto::Record) {
        self.start();
        let (size, dropped) = (record.encoded_len() as u64, record.dropped);
        let queued = self.shared.queued_bytes.fetch_add(size, Ordering::Relaxed);
        if queued + size > self.config.queue_size || self.unusable || self.sender.try_send(record).is_err() {
            self.shared.queued_bytes.fetch_sub(size, Ordering::Relaxed);
            if self.shared.dropped.fetch_add(dropped.max(1), Ordering::Relaxed) == 0 {
                log::error!(
                    "{}: the queue of {} bytes to the relay is full (dovetail_process_queue_size) - \
                     changes are dropped until it takes them again, and are then read from the mailboxes' logs",
                    self.config.socket.display(),
                    self.config.queue_size
                );
                // It may have emptied the queue meanwhile: then it is to tell.
                self.wake();
            }
            return;
        }
        self.wake();
    }

    /// Sends what is left within the deadline, says goodbye and ends the thread.
    pub fn finish(&mut self) {
        if self.thread.is_none() && !self.say_goodbye() {
            self.start();
        }
        self.shared.finishing.store(true, Ordering::Release);
        self.wake();
        if let Some(thread) = self.thread.take() {
            if thread.join().is_err() {
                log::error!("Internal error: the thread that talks to the relay panicked");
            }
        }
        let waiting: u64 = lock(&self.shared.output).frames.iter().map(|waiting| waiting.records).sum();
        let unsent = self.shared.dropped.load(Ordering::Acquire) + waiting;
        if unsent > 0 {
            log::error!(
                "{}: {unsent} changes could not be handed to the relay before this process ended - \
                 they are read from the mailboxes' logs when it is back",
                self.config.socket.display()
            );
            self.leave_count(unsent);
        }
    }

    /// The relay does not read. Dovecot's master listens for it, also while it is being started: a connection of its own can
    /// wait there until it does.
    fn leave_count(&self, dropped: u64) {
        let goodbye = proto::frame::Kind::Goodbye(proto::Goodbye { dropped });
        let frames = [attach(&self.config), goodbye];
        let encoded = frames.into_iter().filter_map(|kind| frame::encode(&proto::Frame { kind: Some(kind) }).ok());
        let text: Vec<u8> = encoded.flatten().collect();
        // Without anybody who listens there is nobody who counts: the log has it.
        let _ = UnixStream::connect(&self.config.socket).and_then(|mut stream| stream.write_all(&text));
    }

    /// True: it is said, or there was nobody to say it to.
    fn say_goodbye(&mut self) -> bool {
        let mut output = lock(&self.shared.output);
        if output.stream.is_none() {
            return true;
        }
        let dropped = self.shared.dropped.swap(0, Ordering::Relaxed);
        output.push(proto::frame::Kind::Goodbye(proto::Goodbye { dropped }));
        let said = matches!(output.flush(), Ok(true));
        if said {
            output.disconnect();
        }
        said
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
            let _ = waker.wake();
        }
    }

    fn start(&mut self) {
        let Some(receiver) = self.receiver.take() else { return };
        if let Err(error) = self.try_start(receiver) {
            self.unusable = true;
            log::error!(
                "Can't start the thread that talks to the relay: {error} - changes of this process are dropped"
            );
        }
    }

    fn try_start(&mut self, receiver: Receiver<proto::Record>) -> io::Result<()> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
        let mut pump = Pump {
            config: self.config.clone(),
            shared: Arc::clone(&self.shared),
            receiver,
            poll,
            pause: RECONNECT_MIN,
            connect_at: Instant::now(),
            registered: false,
            failing: false,
            is_refused: false,
            finish_by: None,
        };
        let builder = std::thread::Builder::new().name("dovetail".into()).stack_size(STACK_SIZE);
        self.thread = Some((self.config.spawn)(builder, Box::new(move || pump.run()))?);
        self.waker = Some(waker);
        Ok(())
    }
}

fn attach(config: &LinkConfig) -> proto::frame::Kind {
    proto::frame::Kind::Attach(proto::Attach { process: config.process.clone(), pid: std::process::id() })
}

fn lock(output: &Mutex<Output>) -> MutexGuard<'_, Output> {
    output.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread: moves records from the queue to the socket and keeps the connection up.
struct Pump {
    config: LinkConfig,
    shared: Arc<Shared>,
    receiver: Receiver<proto::Record>,
    poll: Poll,
    pause: Duration,
    connect_at: Instant,
    registered: bool,
    failing: bool,
    /// Nobody listens. Dovecot does so for the relay, also while that is being started: there is nobody to wait for.
    is_refused: bool,
    finish_by: Option<Instant>,
}

impl Pump {
    fn run(&mut self) {
        let mut events = Events::with_capacity(8);
        loop {
            if self.finish_by.is_none() && self.shared.finishing.load(Ordering::Acquire) {
                self.finish_by = Some(Instant::now() + self.config.finish_timeout);
                self.connect_at = Instant::now();
            }
            let done = self.step();
            if let Some(finish_by) = self.finish_by {
                if done || self.is_refused || Instant::now() >= finish_by {
                    break;
                }
            }
            let timeout = self.timeout();
            if let Err(error) = self.poll.poll(&mut events, timeout) {
                if error.kind() != ErrorKind::Interrupted {
                    break;
                }
            }
            if events.iter().any(|event| event.token() == SOCKET && (event.is_read_closed() || event.is_error())) {
                self.disconnect(&io::Error::from(ErrorKind::ConnectionReset));
            }
        }
        lock(&self.shared.output).disconnect();
        self.shared.dropped.fetch_add(self.receiver.len() as u64, Ordering::Release);
    }

    fn timeout(&self) -> Option<Duration> {
        let now = Instant::now();
        let connected = lock(&self.shared.output).stream.is_some();
        let connect = (!connected).then(|| self.connect_at.saturating_duration_since(now));
        let finish = self.finish_by.map(|by| by.saturating_duration_since(now));
        match (connect, finish) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Does all that can be done now. True: nothing is left.
    fn step(&mut self) -> bool {
        if let Err(error) = self.connect().and_then(|()| self.pump()) {
            self.disconnect(&error);
        }
        self.receiver.is_empty() && lock(&self.shared.output).is_empty()
    }

    fn connect(&mut self) -> io::Result<()> {
        let mut output = lock(&self.shared.output);
        if output.stream.is_none() {
            if Instant::now() < self.connect_at {
                return Ok(());
            }
            let connected = output.connect(&self.config);
            self.is_refused = connected.is_err();
            connected?;
            self.registered = false;
        }
        if !self.registered {
            if let Some(stream) = &mut output.stream {
                self.poll.registry().register(stream, SOCKET, Interest::READABLE | Interest::WRITABLE)?;
                self.registered = true;
            }
        }
        Ok(())
    }

    fn pump(&mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        loop {
            let mut output = lock(&shared.output);
            if output.stream.is_none() || !output.flush()? {
                return Ok(());
            }
            self.pause = RECONNECT_MIN;
            if std::mem::take(&mut self.failing) {
                log::info!("{}: connected to the relay again", self.config.socket.display());
            }
            while output.bytes < OUTPUT_BYTES_AIM {
                match self.receiver.try_recv() {
                    Ok(record) => {
                        shared.queued_bytes.fetch_sub(record.encoded_len() as u64, Ordering::Relaxed);
                        output.push(proto::frame::Kind::Record(record));
                    }
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                }
            }
            if !output.is_empty() {
                continue;
            }
            // The relay takes records again: those that were dropped are behind it.
            let dropped = shared.dropped.swap(0, Ordering::Relaxed);
            if self.finish_by.is_some() {
                output.push(proto::frame::Kind::Goodbye(proto::Goodbye { dropped }));
                output.flush()?;
                return Ok(());
            }
            if dropped == 0 {
                return Ok(());
            }
            output.push(proto::frame::Kind::Record(proto::Record { dropped, ..Default::default() }));
        }
    }

    /// Records that the old relay had not read are lost with the socket: their spans' gap tells the new one.
    fn disconnect(&mut self, error: &io::Error) {
        let mut output = lock(&self.shared.output);
        output.disconnect();
        self.registered = false;
        if !std::mem::replace(&mut self.failing, true) {
            log::warn!(
                "{}: no connection to the relay: {error} - mail goes on, changes wait in memory",
                self.config.socket.display()
            );
        }
        self.connect_at = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(RECONNECT_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::Decoder;
    use std::io::Read;
    use std::os::unix::net::UnixListener;
    use std::path::Path;

    /// A directory that goes when the test ends.
    struct TempDir(PathBuf);

    impl TempDir {
        fn new(name: &str) -> TempDir {
            let path = std::env::temp_dir().join(format!("dovetail-link-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir_all(&path).unwrap();
            TempDir(path)
        }

        fn socket(&self) -> PathBuf {
            self.0.join("dovetail")
        }
    }

    impl Drop for TempDir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn link(socket: &Path, queue_size: u64) -> Link {
        Link::new(LinkConfig {
            socket: socket.to_owned(),
            queue_size,
            process: "imap".into(),
            finish_timeout: Duration::from_secs(20),
            spawn: |builder, run| builder.spawn(run),
        })
    }

    fn intent() -> proto::Intent {
        proto::Intent { user: "u".into(), ..Default::default() }
    }

    fn record(user: &str) -> proto::Record {
        let change = proto::Change { user: user.into(), ..Default::default() };
        proto::Record { change: Some(change), ..Default::default() }
    }

    /// Everything that is said on the next connection, up to its end or `enough`.
    fn hear(listener: &UnixListener, enough: impl Fn(&[proto::frame::Kind]) -> bool) -> Vec<proto::frame::Kind> {
        let (mut stream, _) = listener.accept().unwrap();
        let mut decoder = Decoder::new();
        let mut heard = Vec::new();
        let mut buffer = [0; 4096];
        while !enough(&heard) {
            let size = stream.read(&mut buffer).unwrap();
            if size == 0 {
                break;
            }
            decoder.push(&buffer[..size]);
            while let Some(frame) = decoder.next().unwrap() {
                heard.extend(frame.kind);
            }
        }
        heard
    }

    fn users(heard: &[proto::frame::Kind]) -> Vec<String> {
        heard
            .iter()
            .filter_map(|kind| match kind {
                proto::frame::Kind::Record(record) => Some(record.change.as_ref()?.user.clone()),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn the_intent_comes_first_and_the_goodbye_last() {
        let dir = TempDir::new("order");
        let listener = UnixListener::bind(dir.socket()).unwrap();
        let mut link = link(&dir.socket(), 1 << 20);
        link.intent(intent());
        link.send(vec![record("a")]);
        link.send(vec![record("b")]);
        let hearing = std::thread::spawn(move || hear(&listener, |_| false));
        link.finish();
        let heard = hearing.join().unwrap();
        assert!(matches!(heard[0], proto::frame::Kind::Attach(_)));
        assert!(matches!(heard[1], proto::frame::Kind::Intent(_)));
        assert_eq!(users(&heard), ["a", "b"]);
        assert!(matches!(heard.last(), Some(proto::frame::Kind::Goodbye(_))));
    }

    #[test]
    fn the_intent_is_in_the_socket_before_intent_returns() {
        let dir = TempDir::new("intent");
        let listener = UnixListener::bind(dir.socket()).unwrap();
        let mut link = link(&dir.socket(), 1 << 20);
        link.intent(intent());
        let (stream, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut buffer = [0; 4096];
        let size = (&stream).read(&mut buffer).expect("the intent was not there yet");
        let mut decoder = Decoder::new();
        decoder.push(&buffer[..size]);
        assert!(matches!(decoder.next().unwrap().unwrap().kind, Some(proto::frame::Kind::Attach(_))));
        assert!(matches!(decoder.next().unwrap().unwrap().kind, Some(proto::frame::Kind::Intent(_))));
    }

    #[test]
    fn without_a_relay_the_end_waits_for_nobody() {
        let dir = TempDir::new("alone");
        let mut link = link(&dir.socket(), 1 << 20);
        link.intent(intent());
        link.send(vec![record("lost")]);
        let start = Instant::now();
        link.finish();
        assert!(start.elapsed() < link.config.finish_timeout / 2);
        assert_eq!(link.shared.dropped.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn intents_are_bounded_while_the_relay_takes_none() {
        let dir = TempDir::new("intents");
        let listener = UnixListener::bind(dir.socket()).unwrap();
        let mut link = link(&dir.socket(), 1 << 16);
        (0..3 * INTENTS_MAX).for_each(|_| link.intent(intent()));
        let output = lock(&link.shared.output);
        assert!(output.intents.len() <= INTENTS_MAX);
        assert!(output.bytes <= (1 << 16) + 1_000, "{}", output.bytes);
        drop(listener);
    }

    #[test]
    fn what_was_sent_while_the_relay_was_down_arrives_when_it_is_up() {
        let dir = TempDir::new("down");
        let mut link = link(&dir.socket(), 1 << 20);
        link.intent(intent());
        link.send(vec![record("early")]);
        let listener = UnixListener::bind(dir.socket()).unwrap();
        let heard = hear(&listener, |heard| !users(heard).is_empty());
        assert!(matches!(heard[1], proto::frame::Kind::Intent(_)));
        assert_eq!(users(&heard), ["early"]);
    }

    fn dropped(heard: &[proto::frame::Kind]) -> u64 {
        let of = |kind: &proto::frame::Kind| match kind {
            proto::frame::Kind::Record(record) => record.dropped,
            proto::frame::Kind::Goodbye(goodbye) => goodbye.dropped,
            _ => 0,
        };
        heard.iter().map(of).sum()
    }

    #[test]
    fn what_a_full_queue_dropped_is_told_as_soon_as_the_relay_takes_records_again() {
        let dir = TempDir::new("full");
        let size = record("x").encoded_len() as u64;
        let mut link = link(&dir.socket(), 3 * size);
        for _ in 0..10 {
            link.send(vec![record("x")]);
        }
        assert_eq!(link.shared.dropped.load(Ordering::Relaxed), 7);
        let listener = UnixListener::bind(dir.socket()).unwrap();
        // The process does nothing more.
        let heard = hear(&listener, |heard| dropped(heard) > 0);
        assert_eq!((users(&heard).len(), dropped(&heard)), (3, 7));
        drop(link);
    }

    #[test]
    fn what_the_relay_did_not_take_before_the_end_is_counted_on_a_connection_that_waits_for_it() {
        let dir = TempDir::new("hung");
        let listener = UnixListener::bind(dir.socket()).unwrap();
        let mut link =
            Link::new(LinkConfig { finish_timeout: Duration::ZERO, ..link(&dir.socket(), 1 << 20).config.clone() });
        // Much more than a socket takes.
        let large = "x".repeat(50_000);
        (0..30).for_each(|_| link.send(vec![record(&large)]));
        link.finish();
        let heard = hear(&listener, |_| false);
        assert!(!matches!(heard.last(), Some(proto::frame::Kind::Goodbye(_))), "not all was said");
        let count = hear(&listener, |_| false);
        assert!(matches!(count.first(), Some(proto::frame::Kind::Attach(_))));
        assert_eq!(users(&heard).len() as u64 + dropped(&count), 30);
    }

    #[test]
    fn the_goodbye_tells_what_was_dropped_last() {
        let dir = TempDir::new("goodbye");
        let listener = UnixListener::bind(dir.socket()).unwrap();
        let mut link = link(&dir.socket(), 1 << 20);
        link.intent(intent());
        link.shared.dropped.store(3, Ordering::Relaxed);
        link.finish();
        let heard = hear(&listener, |_| false);
        assert_eq!(heard.last(), Some(&proto::frame::Kind::Goodbye(proto::Goodbye { dropped: 3 })));
    }

    /// A relay that reads so many records and says this about each.
    fn answering(listener: UnixListener, records: usize, answer: fn(u64) -> Vec<proto::Acked>) -> JoinHandle<()> {
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut decoder, mut buffer, mut left) = (Decoder::new(), [0; 4096], records);
            while left > 0 {
                let size = stream.read(&mut buffer).unwrap();
                decoder.push(&buffer[..size]);
                while let Some(frame) = decoder.next().unwrap() {
                    let Some(proto::frame::Kind::Record(record)) = frame.kind else { continue };
                    left -= 1;
                    for acked in answer(record.ack.unwrap().id) {
                        let answer = frame::encode(&proto::frame::Kind::Acked(acked).into()).unwrap();
                        stream.write_all(&answer).unwrap();
                    }
                }
            }
        })
    }

    fn record_with_ack(id: u64) -> Vec<proto::Record> {
        vec![proto::Record { ack: Some(proto::AckWanted { id, ..Default::default() }), ..record("u") }]
    }

    #[test]
    fn the_relays_answer_is_waited_for() {
        let dir = TempDir::new("ack");
        let relay = answering(UnixListener::bind(dir.socket()).unwrap(), 3, |id| {
            if id == 3 {
                // It ends.
                return vec![];
            }
            // To a question of before, then to this one.
            let before = proto::Acked { id: id - 1, error: "late".into() };
            vec![before, proto::Acked { id, error: if id == 2 { "no peer".into() } else { String::new() } }]
        });
        let mut link = link(&dir.socket(), 1 << 20);
        for (id, outcome) in [(1, Ok(())), (2, Err("no peer".to_owned()))] {
            link.send(record_with_ack(id));
            assert_eq!(link.await_ack(id, Duration::from_secs(20)), outcome);
        }
        link.send(record_with_ack(3));
        let error = link.await_ack(3, Duration::from_secs(20)).unwrap_err();
        relay.join().unwrap();
        assert!(error.contains("connection to the relay failed"), "{error}");
    }

    #[test]
    fn a_relay_that_says_nothing_is_not_waited_for_again_and_again() {
        let dir = TempDir::new("silent");
        let _listener = UnixListener::bind(dir.socket()).unwrap();
        let mut link = link(&dir.socket(), 1 << 20);
        link.send(record_with_ack(1));
        assert!(link.await_ack(1, Duration::from_millis(10)).unwrap_err().contains("within 10 msecs"));
        let began = Instant::now();
        let error = link.await_ack(1, Duration::from_secs(3600)).unwrap_err();
        assert!(error.contains("the last time") && began.elapsed() < Duration::from_secs(60), "{error}");
    }
}
