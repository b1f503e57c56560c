//! What the engine needs of the world: clocks, connections, a wait for what happens next. Of the machine, or simulated.

use std::io::{self, ErrorKind, Read};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;
use mio::net::{TcpStream, UnixStream};
use mio::{Events, Poll, Token, Waker};

use super::connection::Stream;
use super::engine::Command;
use crate::time::{Clocks, Time};

const EVENTS_MAX: usize = 256;

/// See the module.
pub trait Outside: Time {
    /// Bytes that no other process has.
    fn instance(&mut self) -> io::Result<Vec<u8>>;
    /// From now on [`Outside::wait`] tells when something happens on the connection.
    fn watch(&mut self, stream: &mut Stream, token: Token) -> io::Result<()>;
    /// Until something happens, or for so long. What happened is added.
    fn wait(&mut self, timeout: Option<Duration>, happened: &mut Vec<Token>) -> io::Result<()>;
    /// The connect may be under way still.
    fn connect_peer(&mut self, address: SocketAddr) -> io::Result<Stream>;
    fn connect_worker(&mut self, socket: &Path) -> io::Result<Stream>;
    /// Finds out a peer's addresses; answers by [`Command::Resolved`].
    fn resolve(&mut self, index: usize, address: String) -> io::Result<()>;
}

/// Of the machine.
pub struct Sockets {
    clocks: Clocks,
    poll: Poll,
    events: Events,
    waker: Arc<Waker>,
    /// For threads that resolve names.
    sender: Sender<Command>,
}

impl Sockets {
    /// The poll's waker and the channel are made before, for those who talk to the engine while it is still waiting for
    /// its journal.
    pub fn new(poll: Poll, waker: Arc<Waker>, sender: Sender<Command>) -> Sockets {
        Sockets { clocks: Clocks::default(), poll, events: Events::with_capacity(EVENTS_MAX), waker, sender }
    }
}

impl Time for Sockets {
    fn elapsed(&self) -> Duration {
        self.clocks.elapsed()
    }

    fn now_us(&self) -> u64 {
        self.clocks.now_us()
    }
}

impl Outside for Sockets {
    fn instance(&mut self) -> io::Result<Vec<u8>> {
        let mut instance = vec![0; 16];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut instance)?;
        Ok(instance)
    }

    fn watch(&mut self, stream: &mut Stream, token: Token) -> io::Result<()> {
        stream.register(self.poll.registry(), token)
    }

    fn wait(&mut self, timeout: Option<Duration>, happened: &mut Vec<Token>) -> io::Result<()> {
        match self.poll.poll(&mut self.events, timeout) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        happened.extend(self.events.iter().map(|event| event.token()));
        Ok(())
    }

    fn connect_peer(&mut self, address: SocketAddr) -> io::Result<Stream> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        Ok(Stream::Tcp(stream))
    }

    fn connect_worker(&mut self, socket: &Path) -> io::Result<Stream> {
        UnixStream::connect(socket).map(Stream::Unix)
    }

    /// In a thread of its own, because it may take long.
    fn resolve(&mut self, index: usize, address: String) -> io::Result<()> {
        let (sender, waker) = (self.sender.clone(), self.waker.clone());
        let resolve = move || {
            let addresses = ToSocketAddrs::to_socket_addrs(&address).map(Iterator::collect);
            let _ = sender.send(Command::Resolved(index, addresses));
            let _ = waker.wake();
        };
        std::thread::Builder::new().name("dovetail-dns".into()).spawn(resolve).map(drop)
    }
}
