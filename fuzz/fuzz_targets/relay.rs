//! A whole relay, whose local processes, workers and peer say any records at any time: no panic, no end of the relay, no journal that
//! fails, no round after round for nothing, and what it says are frames. A process that is not trusted hears nothing but of its
//! own acknowledgements.
//!
//! The input is steps: one byte who and how much later, two bytes of length, a record without its frame's header.

#![cfg_attr(fuzzing, no_main)]

use std::cell::{Cell, RefCell};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use dovetail::relay::connection::{Pipe, Stream};
use dovetail::relay::outside::Outside;
use dovetail::relay::stepped::Stepped;
use dovetail::relay::{Config, Connection, Peer};
use dovetail::time::Time;
use dovetail::wire::frame::{self, Decoder, PAYLOAD_BYTES_MAX, VERSION};
use dovetail::wire::proto::frame::Kind;
use dovetail::wire::proto::{Attach, Frame, Hello};
use mio::Token;

/// More rounds in a row, each of which asks for the next one at once, do nothing.
const ROUNDS_MAX: usize = 3_000;
/// What the relay may say to one connection, from one step to the next.
const OUT_BYTES_MAX: usize = 32 << 20;

/// The two directions of one connection of the relay's.
#[derive(Default)]
struct Line {
    to_relay: Vec<u8>,
    from_relay: Vec<u8>,
    token: Option<Token>,
    /// Something has happened that the relay has not been told: once, as the machine tells it.
    has_news: bool,
    /// The other side is gone.
    is_ended: bool,
    /// The relay has closed it.
    is_closed: bool,
}

#[derive(Clone, Default)]
struct End(Rc<RefCell<Line>>);

impl Pipe for End {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut line = self.0.borrow_mut();
        if line.to_relay.is_empty() {
            return if line.is_ended { Ok(0) } else { Err(ErrorKind::WouldBlock.into()) };
        }
        let length = bytes.len().min(line.to_relay.len());
        bytes[..length].copy_from_slice(&line.to_relay[..length]);
        line.to_relay.drain(..length);
        Ok(length)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut line = self.0.borrow_mut();
        if line.is_ended {
            return Err(ErrorKind::BrokenPipe.into());
        }
        line.from_relay.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn connected(&self) -> Option<io::Result<()>> {
        Some(Ok(()))
    }

    fn stop_reading(&self) -> io::Result<()> {
        self.0.borrow_mut().is_ended = true;
        Ok(())
    }

    fn register(&mut self, token: Token) {
        let mut line = self.0.borrow_mut();
        line.token = Some(token);
        line.has_news = true;
    }
}

/// The relay's end: when it is dropped, the other side sees it.
struct Ours(End);

impl Pipe for Ours {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }
    fn connected(&self) -> Option<io::Result<()>> {
        self.0.connected()
    }
    fn stop_reading(&self) -> io::Result<()> {
        self.0.stop_reading()
    }
    fn register(&mut self, token: Token) {
        self.0.register(token);
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        self.0 .0.borrow_mut().is_closed = true;
    }
}

struct World {
    now_us: Rc<Cell<u64>>,
    /// Those that the relay has connected to.
    workers: Rc<RefCell<Vec<End>>>,
}

impl Time for World {
    fn elapsed(&self) -> Duration {
        Duration::from_micros(self.now_us.get())
    }

    fn now_us(&self) -> u64 {
        1_700_000_000_000_000 + self.now_us.get()
    }
}

impl Outside for World {
    fn instance(&mut self) -> io::Result<Vec<u8>> {
        Ok(vec![1; 16])
    }

    fn watch(&mut self, stream: &mut Stream, token: Token) -> io::Result<()> {
        match stream {
            Stream::Pipe(pipe) => pipe.register(token),
            _ => return Err(ErrorKind::Unsupported.into()),
        }
        Ok(())
    }

    fn wait(&mut self, _: Option<Duration>, _: &mut Vec<Token>) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }

    fn connect_peer(&mut self, _: SocketAddr) -> io::Result<Stream> {
        Err(ErrorKind::ConnectionRefused.into())
    }

    fn connect_worker(&mut self, _: &Path) -> io::Result<Stream> {
        let end = End::default();
        self.workers.borrow_mut().push(end.clone());
        Ok(Stream::Pipe(Box::new(Ours(end))))
    }

    fn resolve(&mut self, _: usize, _: String) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }
}

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn folder() -> Folder {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let folder = parent.join(format!("dovetail-fuzz-relay-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir(&folder).expect("a folder");
    Folder(folder)
}

/// Who speaks.
#[derive(Clone, Copy, PartialEq)]
enum Who {
    /// A mail process of root's, or doveadm.
    Trusted,
    Untrusted,
    Peer,
    Worker(usize),
}

struct Play {
    /// None: the next one is about to begin.
    relay: Option<Stepped>,
    config: Config,
    now_us: Rc<Cell<u64>>,
    workers: Rc<RefCell<Vec<End>>>,
    /// Of those who connect to the relay, with what they have heard.
    others: [Option<(End, Decoder)>; 3],
    worker_hears: Vec<Decoder>,
}

impl Play {
    fn begin(journal: &Path) -> Play {
        let (now_us, workers) = (Rc::new(Cell::new(1)), Rc::new(RefCell::new(Vec::new())));
        let config = Config {
            server: "b".into(),
            // They connect to us.
            peers: vec![Peer { name: "a".into(), address: "127.0.0.1:1".into() }],
            worker_socket: "/worker".into(),
            workers: 2,
            queue_bytes_max: 1 << 20,
            journal: journal.to_owned(),
            journal_bytes_max: 1 << 20,
            journal_age_us_max: 1 << 50,
            compare_listed_after_us: Some(1),
            compare_interval_ms: Some(5_000),
            client_limit: 10_000,
            boot: "boot".into(),
            tls: None,
            insecure_plaintext: false,
            software: "fuzz".into(),
        };
        let mut play =
            Play { relay: None, config, now_us, workers, others: [None, None, None], worker_hears: Vec::new() };
        play.start();
        play
    }

    fn start(&mut self) {
        self.relay = None;
        let world = World { now_us: self.now_us.clone(), workers: self.workers.clone() };
        self.relay = Some(Stepped::begin(self.config.clone(), Box::new(world)).expect("a relay"));
    }

    fn relay(&mut self) -> &mut Stepped {
        self.relay.as_mut().expect("a relay")
    }

    /// The connection of who speaks; a new one, and greeted, if there is none.
    fn end(&mut self, who: Who) -> Option<End> {
        let (slot, kind, greeting) = match who {
            Who::Worker(number) => {
                let workers = self.workers.borrow();
                let open: Vec<&End> = workers.iter().filter(|end| !end.0.borrow().is_closed).collect();
                return open.get(number % open.len().max(1)).map(|end| (*end).clone());
            }
            Who::Trusted => (0, Connection::Local { uid: None }, attach()),
            Who::Untrusted => (1, Connection::Local { uid: Some(2002) }, attach()),
            Who::Peer => (2, Connection::Peer, hello()),
        };
        if self.others[slot].as_ref().is_none_or(|(end, _)| end.0.borrow().is_closed) {
            let end = End::default();
            self.relay().accept(Box::new(Ours(end.clone())), kind).ok()?;
            end.0.borrow_mut().to_relay = frame::encode(&greeting).expect("a frame");
            self.others[slot] = Some((end, Decoder::new()));
        }
        self.others[slot].as_ref().map(|(end, _)| end.clone())
    }

    fn say(&mut self, who: Who, record: &[u8]) {
        let Some(end) = self.end(who) else { return };
        let mut line = end.0.borrow_mut();
        line.has_news = true;
        match record {
            // It ends.
            [] => line.is_ended = true,
            record => {
                let [_, high, middle, low] = (record.len() as u32).to_be_bytes();
                line.to_relay.extend_from_slice(&[VERSION, high, middle, low]);
                line.to_relay.extend_from_slice(record);
            }
        }
    }

    /// Rounds until it waits for something.
    fn rounds(&mut self) {
        for round in 0.. {
            assert!(round < ROUNDS_MAX, "it goes round and round");
            let mut happened = Vec::new();
            let workers = self.workers.borrow().clone();
            for end in workers.iter().chain(self.others.iter().flatten().map(|(end, _)| end)) {
                let mut line = end.0.borrow_mut();
                let has_news = std::mem::take(&mut line.has_news) && !line.is_closed;
                happened.extend(line.token.filter(|_| has_news));
            }
            let is_idle = happened.is_empty();
            let timeout = self.relay().round(happened).expect("no input makes the relay fail");
            self.hear();
            if self.relay().is_at_end() {
                self.start();
            }
            if is_idle && timeout != Some(Duration::ZERO) {
                return;
            }
        }
    }

    /// What the relay says are frames.
    fn hear(&mut self) {
        let workers = self.workers.borrow().clone();
        self.worker_hears.resize_with(workers.len(), Decoder::new);
        for (end, decoder) in workers.iter().zip(&mut self.worker_hears) {
            hear(end, decoder, |_| {});
        }
        for (slot, other) in self.others.iter_mut().enumerate() {
            let Some((end, decoder)) = other else { continue };
            hear(end, decoder, |kind| assert!(slot != 1 || matches!(kind, Kind::Acked(_)), "{kind:?}"));
        }
    }
}

fn hear(end: &End, decoder: &mut Decoder, check: impl Fn(&Kind)) {
    let bytes = std::mem::take(&mut end.0.borrow_mut().from_relay);
    assert!(bytes.len() <= OUT_BYTES_MAX);
    decoder.push(&bytes);
    while let Some(frame) = decoder.next().expect("a frame") {
        check(&frame.kind.expect("a known kind"));
    }
    assert!(!decoder.is_in_frame());
}

fn attach() -> Frame {
    Kind::Attach(Attach { process: "imap".into(), pid: 7 }).into()
}

fn hello() -> Frame {
    Kind::Hello(Hello { server: "a".into(), instance: vec![7; 16], epoch: 1, ..Default::default() }).into()
}

pub fn run(bytes: &[u8]) {
    let folder = folder();
    let mut play = Play::begin(&folder.0);
    play.rounds();
    let mut rest = bytes;
    while let [step, low, high, behind @ ..] = rest {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(behind.len()).min(PAYLOAD_BYTES_MAX);
        let (record, behind) = behind.split_at(length);
        rest = behind;
        let who = match step & 7 {
            0 | 1 => Who::Trusted,
            2 | 3 => Who::Untrusted,
            4 => Who::Peer,
            number => Who::Worker(usize::from(number) - 5),
        };
        let later_us = [0, 5_000, 1_100_000, 40_000_000][usize::from(step >> 3 & 3)];
        play.now_us.set(play.now_us.get() + later_us);
        play.say(who, record);
        // Sometimes the next one speaks before the relay has heard.
        if step & 0x80 == 0 {
            play.rounds();
        }
    }
    for _ in 0..4 {
        play.now_us.set(play.now_us.get() + 31_000_000);
        play.rounds();
    }
    let _ = (play.relay().status(), play.relay().failed().expect("the journal's list"));
}

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| run(bytes));
