//! One connection: a socket that never blocks, the frames that come in, the bytes that wait to go out.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, Shutdown};
use std::os::fd::AsRawFd;

use mio::net::{TcpStream, UnixStream};
use mio::{Interest, Registry, Token};
use nix::errno::Errno;
use nix::sys::socket::sockopt::PassCred;
use nix::sys::socket::{recvmsg, setsockopt, ControlMessageOwned, MsgFlags, UnixCredentials};

use super::owners::Sender;
use crate::tls;
use crate::wire::frame::{self, Decoder, FrameError};
use crate::wire::proto::Frame;

/// Bytes taken from a socket at once.
pub const READ_BYTES: usize = 64 << 10;

pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Pipe(Box<dyn Pipe>),
}

/// A simulated connection: like a socket that never blocks.
pub trait Pipe {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize>;
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// The outcome of a connect: `None` if it is still under way.
    fn connected(&self) -> Option<io::Result<()>>;
    /// As `shutdown(SHUT_RD)`.
    fn stop_reading(&self) -> io::Result<()>;
    /// What happens on it happens to this token.
    fn register(&mut self, token: Token);
}

impl Stream {
    pub fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let interests = Interest::READABLE | Interest::WRITABLE;
        match self {
            Stream::Tcp(stream) => registry.register(stream, token, interests),
            Stream::Unix(stream) => registry.register(stream, token, interests),
            Stream::Pipe(pipe) => {
                pipe.register(token);
                Ok(())
            }
        }
    }

    /// The outcome of a connect that was begun: `None` if it is still under way.
    fn connected(&self) -> Option<io::Result<()>> {
        let (error, is_connected) = match self {
            Stream::Tcp(stream) => (stream.take_error(), stream.peer_addr().map(drop)),
            Stream::Unix(stream) => (stream.take_error(), stream.peer_addr().map(drop)),
            Stream::Pipe(pipe) => return pipe.connected(),
        };
        match error {
            Ok(None) => {}
            Ok(Some(error)) | Err(error) => return Some(Err(error)),
        }
        match is_connected {
            Err(error) if error.kind() == ErrorKind::NotConnected => None,
            outcome => Some(outcome),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(bytes),
            Stream::Unix(stream) => stream.read(bytes),
            Stream::Pipe(pipe) => pipe.read(bytes),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write(bytes),
            Stream::Unix(stream) => stream.write(bytes),
            Stream::Pipe(pipe) => pipe.write(bytes),
        }
    }

    fn write_vectored(&mut self, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write_vectored(bytes),
            Stream::Unix(stream) => stream.write_vectored(bytes),
            Stream::Pipe(pipe) => pipe.write(bytes.first().map_or(&[], |first| first)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What one look at the socket brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incoming {
    Bytes,
    Nothing,
    End,
}

/// See the module.
pub struct Connection {
    stream: Stream,
    /// Of a TCP connection to us.
    from: Option<IpAddr>,
    /// None: plaintext.
    tls: Option<Box<tls::Session>>,
    decoder: Decoder,
    out: Vec<u8>,
    written: usize,
    /// Bytes of plaintext that the socket took.
    sent: u64,
    connecting: bool,
}

impl Connection {
    /// `connecting` if its connect is still under way.
    pub fn new(stream: Stream, tls: Option<tls::Session>, connecting: bool) -> Connection {
        let from = match &stream {
            Stream::Tcp(stream) => stream.peer_addr().ok().map(|address| address.ip()),
            _ => None,
        };
        let tls = tls.map(Box::new);
        Connection { stream, from, tls, decoder: Decoder::new(), out: Vec::new(), written: 0, sent: 0, connecting }
    }

    /// To be watched.
    pub fn stream(&mut self) -> &mut Stream {
        &mut self.stream
    }

    /// Looks whether a connect that was under way has come to an end; its error, if it failed.
    pub fn finish_connect(&mut self) -> io::Result<()> {
        if self.connecting {
            if let Some(outcome) = self.stream.connected() {
                outcome?;
                self.connecting = false;
            }
        }
        Ok(())
    }

    /// Takes what has come, at most one buffer; its frames are then to be fetched by [`Connection::next_frame`].
    ///
    /// # Errors
    ///
    /// As the socket's, and as those of [`tls::Session::read`].
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<Incoming> {
        loop {
            let decoder = &mut self.decoder;
            let outcome = match &mut self.tls {
                Some(tls) => tls.read(&mut self.stream, buffer, |bytes| decoder.push(bytes)),
                None => self.stream.read(buffer).map(|length| {
                    decoder.push(&buffer[..length]);
                    length > 0
                }),
            };
            match outcome {
                Ok(true) => return Ok(Incoming::Bytes),
                Ok(false) => return Ok(Incoming::End),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Incoming::Nothing),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Who sends the next bytes, as the kernel says: a process's real user, whatever it is at the moment. None before they have come.
    pub fn sender(&self) -> Option<Sender> {
        let Stream::Unix(stream) = &self.stream else { return Some(Sender::Unsaid) };
        if setsockopt(stream, PassCred, &true).is_err() {
            return Some(Sender::Unsaid);
        }
        let mut space = nix::cmsg_space!(UnixCredentials);
        let mut byte = [0];
        let mut bytes = [IoSliceMut::new(&mut byte)];
        let peeked = recvmsg::<()>(stream.as_raw_fd(), &mut bytes, Some(&mut space), MsgFlags::MSG_PEEK);
        let message = match peeked {
            Ok(message) => message,
            Err(Errno::EAGAIN) => return None,
            // As reading will say.
            Err(_) => return Some(Sender::Unsaid),
        };
        let mut credentials = message.cmsgs().into_iter().flatten();
        let sender = credentials.find_map(|one| match one {
            // Without a process, the kernel was not asked for them when this was sent.
            ControlMessageOwned::ScmCredentials(sender) if sender.pid() != 0 => Some(Sender::of(sender.uid())),
            _ => None,
        });
        Some(sender.unwrap_or(Sender::Unsaid))
    }

    /// From where it came, for people.
    pub fn from(&self) -> String {
        self.from.map_or("somewhere".into(), |address| address.to_string())
    }

    /// Whether the other side has proven to be this server, where that is asked for. The error: why not.
    pub fn proves(&self, server: &str) -> Result<(), String> {
        self.tls.as_ref().map_or(Ok(()), |tls| tls.proves(server))
    }

    /// The other side can send nothing more, and notices when it tries; what it has sent can still be read.
    pub fn stop_reading(&self) -> io::Result<()> {
        match &self.stream {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Read),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Read),
            Stream::Pipe(pipe) => pipe.stop_reading(),
        }
    }

    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        self.decoder.next()
    }

    pub fn ended_in_frame(&self) -> bool {
        self.decoder.is_in_frame()
    }

    /// Bytes that wait to go out.
    pub fn waiting(&self) -> usize {
        self.out.len() - self.written
    }

    /// Bytes that the socket took so far.
    pub fn sent(&self) -> u64 {
        self.tls.as_ref().map_or(self.sent, |tls| tls.sent())
    }

    /// Whether all is with the machine.
    pub fn is_sent(&self) -> bool {
        self.waiting() == 0 && !self.tls.as_ref().is_some_and(|tls| tls.is_waiting())
    }

    /// Adds a frame to what goes out with the next [`Connection::write`].
    pub fn send(&mut self, frame: &Frame) -> Result<(), FrameError> {
        frame::append(frame, self.out())
    }

    /// Where encoded frames may be appended.
    pub fn out(&mut self) -> &mut Vec<u8> {
        if self.written > 0 {
            self.out.drain(..self.written);
            self.written = 0;
        }
        &mut self.out
    }

    /// Writes what the socket takes. True if nothing is left.
    pub fn write(&mut self) -> io::Result<bool> {
        match self.connecting {
            true => Ok(false),
            false => match self.write_connected() {
                Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
                outcome => outcome,
            },
        }
    }

    fn write_connected(&mut self) -> io::Result<bool> {
        while self.waiting() > 0 {
            let bytes = &self.out[self.written..];
            let outcome = match &mut self.tls {
                Some(tls) => tls.write(&mut self.stream, bytes),
                None => self.stream.write(bytes).inspect(|length| self.sent += *length as u64),
            };
            match outcome {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(length) => self.written += length,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.written = 0;
        // A large body must not leave its buffer behind for ever.
        self.out.shrink_to(READ_BYTES);
        match &mut self.tls {
            Some(tls) => tls.flush(&mut self.stream),
            None => Ok(true),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.say_end(&mut self.stream);
        }
    }
}
