//! A mail process's connection to its relay: one non-blocking write when the relay keeps up; otherwise a bounded queue, and
//! a thread that empties it and reconnects.
//!
//! The process's own thread never waits and never fails: what does not fit into the queue is dropped and counted, and
//! the count travels with the next record. Our thread never calls Dovecot and never writes to the log itself. It is
//! started when it is first needed: while a second thread lives, each change of the uid in lmtp interrupts it.

use super::INTENTS_MAX;
use crate::wire::{frame, proto};
use crossbeam_channel::{bounded, Receiver, Sender, TryRecvError};
use mio::net::UnixStream;
use mio::{Events, Interest, Poll, Token, Waker};
use prost::Message as _;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Write};
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
    /// Dropped since the last record that was queued.
    dropped: u64,
    unusable: bool,
}

struct Shared {
    queued_bytes: AtomicU64,
    finishing: AtomicBool,
    unsent: AtomicU64,
    output: Mutex<Output>,
}

/// The socket and what waits for it. Locked by both threads for the length of a non-blocking write.
#[derive(Default)]
struct Output {
    stream: Option<UnixStream>,
    /// Who we are and what we intend: first on every connection.
    preamble: Vec<u8>,
    /// Encoded frames. The first one is partly written.
    frames: VecDeque<Vec<u8>>,
    /// Bytes of `frames`.
    bytes: usize,
    /// Bytes already written of the preamble, or else of the first frame.
    written: usize,
    /// What the relay must know after a reconnect.
    intents: Vec<proto::Intent>,
}

impl Output {
    fn push(&mut self, kind: proto::frame::Kind) {
        match frame::encode(&proto::Frame { kind: Some(kind) }) {
            Ok(frame) => {
                self.bytes += frame.len();
                self.frames.push_back(frame);
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
            let frames = self.frames.iter().take(FRAMES_PER_WRITE).map(|frame| IoSlice::new(frame));
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
        while let (true, Some(frame)) = (self.preamble.is_empty(), self.frames.front()) {
            if self.written < frame.len() {
                return;
            }
            self.written -= frame.len();
            self.bytes -= frame.len();
            self.frames.pop_front();
        }
    }

    fn connect(&mut self, config: &LinkConfig) -> io::Result<()> {
        self.stream = Some(UnixStream::connect(&config.socket)?);
        let attach = proto::Attach { process: config.process.clone(), pid: std::process::id() };
        let intents = self.intents.iter().cloned().map(proto::frame::Kind::Intent);
        self.preamble = std::iter::once(proto::frame::Kind::Attach(attach))
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
            unsent: AtomicU64::new(0),
            output: Mutex::default(),
        };
        Link {
            config,
            shared: Arc::new(shared),
            sender,
            receiver: Some(receiver),
            waker: None,
            thread: None,
            dropped: 0,
            unusable: false,
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
        if self.dropped > 0 || output.stream.is_none() || !output.is_empty() || !self.sender.is_empty() {
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

    fn queue(&mut self, mut record: proto::Record) {
        self.start();
        let size = record.encoded_len() as u64;
        let queued = self.shared.queued_bytes.fetch_add(size, Ordering::Relaxed);
        record.dropped = self.dropped;
        if queued + size > self.config.queue_size || self.unusable || self.sender.try_send(record).is_err() {
            self.shared.queued_bytes.fetch_sub(size, Ordering::Relaxed);
            if self.dropped == 0 {
                log::error!(
                    "{}: the queue of {} bytes to the relay is full (dovetail_process_queue_size) - \
                     changes are dropped until it takes them again, and are then read from the mailboxes' logs",
                    self.config.socket.display(),
                    self.config.queue_size
                );
            }
            self.dropped += 1;
            return;
        }
        self.dropped = 0;
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
        let unsent = self.shared.unsent.load(Ordering::Acquire) + self.dropped;
        if unsent > 0 {
            log::error!(
                "{}: {unsent} changes could not be handed to the relay before this process ended - \
                 they are read from the mailboxes' logs when it is back",
                self.config.socket.display()
            );
        }
    }

    /// True: it is said, or there was nobody to say it to.
    fn say_goodbye(&mut self) -> bool {
        let mut output = lock(&self.shared.output);
        if output.stream.is_none() {
            return true;
        }
        output.push(proto::frame::Kind::Goodbye(proto::Goodbye {}));
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
        let mut output = lock(&self.shared.output);
        let unsent = self.receiver.len() + output.frames.len();
        output.disconnect();
        self.shared.unsent.store(unsent as u64, Ordering::Release);
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
                        shared.queued_bytes.fetch_sub(queued_len(&record), Ordering::Relaxed);
                        output.push(proto::frame::Kind::Record(record));
                    }
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                }
            }
            if output.is_empty() {
                if self.finish_by.is_some() {
                    output.push(proto::frame::Kind::Goodbye(proto::Goodbye {}));
                    output.flush()?;
                }
                return Ok(());
            }
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

/// The size that `Link::send` counted: before `dropped` was set.
fn queued_len(record: &proto::Record) -> u64 {
    let dropped = proto::Record { change: None, spans: Vec::new(), dropped: record.dropped }.encoded_len();
    (record.encoded_len() - dropped) as u64
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
        assert_eq!(link.shared.unsent.load(Ordering::Relaxed), 1);
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

    #[test]
    fn a_full_queue_drops_and_the_next_record_tells_how_many() {
        let dir = TempDir::new("full");
        let size = record("x").encoded_len() as u64;
        let mut link = link(&dir.socket(), 3 * size);
        for _ in 0..10 {
            link.send(vec![record("x")]);
        }
        assert_eq!(link.dropped, 7);
        let listener = UnixListener::bind(dir.socket()).unwrap();
        let (heard, link) = std::thread::scope(|scope| {
            let hearing = scope.spawn(|| hear(&listener, |heard| users(heard).contains(&"last".to_owned())));
            // The queue empties as soon as the thread has connected.
            while link.shared.queued_bytes.load(Ordering::Relaxed) > 0 {
                std::thread::yield_now();
            }
            link.send(vec![record("last")]);
            (hearing.join().unwrap(), link)
        });
        let Some(proto::frame::Kind::Record(last)) = heard.last() else { panic!("{heard:?}") };
        assert_eq!(last.dropped, 7);
        drop(link);
    }
}
