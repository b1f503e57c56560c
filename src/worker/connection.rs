//! The worker's side of its connection to the relay: frames in, frames out, each wait with an end.
use std::collections::VecDeque;
use std::io::{self, Read, Write};

use crate::wire::frame::{self, Decoder};
use crate::wire::proto::{self, frame::Kind};

/// Frames that may arrive while a job waits for an answer; the relay gives one job at a time.
const WAITING_MAX: usize = 64;
const READ_BYTES: usize = 65_536 + 16;

/// Frames over a stream that blocks, and whose reads and writes time out.
pub struct Connection<S> {
    stream: S,
    decoder: Decoder,
    /// Came while a job waited for something else.
    waiting: VecDeque<Kind>,
    buffer: Vec<u8>,
}

/// Whether the relay has ended, as at each reload of Dovecot.
pub fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof)
}

impl<S: Read + Write> Connection<S> {
    pub fn new(stream: S) -> Self {
        Connection { stream, decoder: Decoder::new(), waiting: VecDeque::new(), buffer: vec![0; READ_BYTES] }
    }

    /// Sends the frame or fails.
    pub fn send(&mut self, kind: Kind) -> io::Result<()> {
        let bytes = frame::encode(&proto::Frame { kind: Some(kind) })
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
        self.stream.write_all(&bytes)
    }

    /// Reads what there is; blocks until there is something. False at the end of the stream.
    pub fn fill(&mut self) -> io::Result<bool> {
        loop {
            match self.stream.read(&mut self.buffer) {
                Ok(0) => return Ok(false),
                Ok(n) => {
                    self.decoder.push(&self.buffer[..n]);
                    return Ok(true);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "timed out"));
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn decode(&mut self) -> io::Result<Option<Kind>> {
        loop {
            return match self.decoder.next() {
                Ok(None) => Ok(None),
                Ok(Some(frame)) => match frame.kind {
                    Some(kind) => Ok(Some(kind)),
                    // A kind that this version doesn't know.
                    None => continue,
                },
                Err(e) => Err(io::Error::new(io::ErrorKind::InvalidData, format!("malformed frame: {e}"))),
            };
        }
    }

    /// The next frame that has arrived.
    pub fn next_frame(&mut self) -> io::Result<Option<Kind>> {
        match self.waiting.pop_front() {
            Some(kind) => Ok(Some(kind)),
            None => self.decode(),
        }
    }

    /// Waits for a frame that is wanted; keeps the others for later.
    pub fn wait(&mut self, wanted: impl Fn(&Kind) -> bool) -> io::Result<Kind> {
        loop {
            while let Some(kind) = self.decode()? {
                if wanted(&kind) {
                    return Ok(kind);
                }
                if self.waiting.len() == WAITING_MAX {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "too many frames during a job"));
                }
                self.waiting.push_back(kind);
            }
            if !self.fill()? {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "connection closed"));
            }
        }
    }
}
