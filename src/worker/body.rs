//! Bodies between servers: reading one for another server, and fetching one from the server where it is.
//!
//! Never more than the window is on its way, so that nobody has to hold more.
use std::fs::File;
use std::io::{self, Read, Write};

use super::apply::locate;
use super::connection::Connection;
use super::job::is_of;
use super::name;
use super::storage::{Body, Existence, Result, Storage};
use crate::change::NO_PEER;
use crate::wire::proto::{self, frame::Kind};

/// Bytes that we let the other side send before we allow more.
pub const WINDOW_BYTES: u32 = 1 << 20;
/// We allow more whenever so much was consumed.
const MORE_BYTES: u32 = WINDOW_BYTES / 2;
/// A larger window is not used.
const WINDOW_BYTES_MAX: u64 = 16 << 20;
/// Data in a chunk at most.
pub const CHUNK_BYTES_MAX: usize = 48 << 10;
/// Up to that a fetched body stays in memory.
const MEMORY_BYTES_MAX: usize = 256 << 10;
/// Dovecot's own limits on a mail's size are below.
const BODY_BYTES_MAX: u64 = 4 << 30;

/// A job's end that is not about the user: the connection to the relay failed.
pub type Link<T> = std::result::Result<T, io::Error>;

/// Answers the request: sends the body, or that it is gone, or why it cannot be read.
pub fn serve<S: Storage, C: Read + Write>(
    storage: &mut S,
    connection: &mut Connection<C>,
    request: &proto::BodyRequest,
) -> Link<()> {
    let sent = send(storage, connection, request);
    storage.close_user();
    let last = match sent? {
        Sent::All | Sent::Cancelled => return Ok(()),
        Sent::Gone => proto::BodyChunk { gone: true, ..Default::default() },
        Sent::Failed(error) => {
            let mailbox = request.mailbox.as_ref().map(|m| m.path.join("/")).unwrap_or_default();
            let error = format!("user {}: mailbox {mailbox}: UID {}: {error}", request.user, request.uid);
            log::error!("Cannot read a body: {error}");
            proto::BodyChunk { error, ..Default::default() }
        }
    };
    connection.send(Kind::BodyChunk(proto::BodyChunk { id: request.id, last: true, ..last }))
}

enum Sent {
    All,
    Cancelled,
    Gone,
    Failed(String),
}

fn send<S: Storage, C: Read + Write>(
    storage: &mut S,
    connection: &mut Connection<C>,
    request: &proto::BodyRequest,
) -> Link<Sent> {
    match open(storage, request) {
        Ok(true) => {}
        Ok(false) => return Ok(Sent::Gone),
        Err(error) => return Ok(Sent::Failed(error)),
    }
    let mut credit = u64::from(request.window).min(WINDOW_BYTES_MAX);
    let mut buffer = vec![0; CHUNK_BYTES_MAX];
    loop {
        while credit == 0 {
            let id = request.id;
            let answer = connection.wait(|kind| match kind {
                Kind::BodyMore(more) => more.id == id,
                Kind::BodyCancel(cancel) => cancel.id == id,
                _ => false,
            })?;
            match answer {
                Kind::BodyMore(more) => credit = u64::from(more.bytes).min(WINDOW_BYTES_MAX),
                _ => return Ok(Sent::Cancelled),
            }
        }
        let size = buffer.len().min(credit as usize);
        let read = match fill(storage, &mut buffer[..size]) {
            Ok(read) => read,
            Err(error) => return Ok(Sent::Failed(error)),
        };
        credit -= read as u64;
        // A full chunk may have been the last; then an empty one follows.
        let last = read < size;
        let data = buffer[..read].to_vec();
        connection.send(Kind::BodyChunk(proto::BodyChunk { id: request.id, data, last, ..Default::default() }))?;
        if last {
            return Ok(Sent::All);
        }
    }
}

fn open<S: Storage>(storage: &mut S, request: &proto::BodyRequest) -> Result<bool> {
    if !storage.open_user(&request.user)? {
        return Err("unknown here".into());
    }
    if !is_of(&storage.user_peers()?, &request.asker) {
        return Err(format!("server {} {NO_PEER}", request.asker));
    }
    let Some(mailbox) = &request.mailbox else {
        return Err("malformed request: no mailbox".into());
    };
    // Under its name it may have become one with another.
    let vname = match locate(storage, mailbox)? {
        Some(vname) => vname,
        None => name::vname(&mailbox.path, &storage.namespace()?)?,
    };
    if storage.existence(&vname)? != Existence::Mailbox || !storage.open(&vname, true)? {
        return Ok(false);
    }
    if storage.body_open(request.uid, &request.guid)? {
        return Ok(true);
    }
    // It may have been given another UID.
    match storage.find_messages(&request.guid)?.first() {
        Some(uid) => storage.body_open(*uid, &request.guid),
        None => Ok(false),
    }
}

fn fill<S: Storage>(storage: &mut S, buffer: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match storage.body_read(&mut buffer[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

/// A body that was fetched.
#[derive(Debug)]
pub enum Fetched {
    Memory(Vec<u8>),
    File(File),
    /// The message does not exist there any more.
    Gone,
}

impl Fetched {
    /// None if it is gone.
    pub fn body(&self) -> Option<Body<'_>> {
        match self {
            Fetched::Memory(bytes) => Some(Body::Bytes(bytes)),
            Fetched::File(file) => Some(Body::File(file)),
            Fetched::Gone => None,
        }
    }

    pub(super) fn push<S: Storage>(&mut self, storage: &mut S, data: &[u8]) -> Result<()> {
        if let Fetched::Memory(bytes) = self {
            if bytes.len() + data.len() <= MEMORY_BYTES_MAX {
                bytes.extend_from_slice(data);
                return Ok(());
            }
            let mut file = storage.temp_file()?;
            file.write_all(bytes).map_err(write_error)?;
            *self = Fetched::File(file);
        }
        if let Fetched::File(file) = self {
            file.write_all(data).map_err(write_error)?;
        }
        Ok(())
    }
}

fn write_error(error: io::Error) -> String {
    format!("cannot write the fetched body to a temporary file: {error}")
}

/// Fetches a body through the relay. The inner error is about this body only.
pub fn fetch<S: Storage, C: Read + Write>(
    storage: &mut S,
    connection: &mut Connection<C>,
    request: proto::BodyRequest,
) -> Link<Result<Fetched>> {
    let id = request.id;
    connection.send(Kind::BodyRequest(request))?;
    let mut fetched = Fetched::Memory(Vec::new());
    let mut size: u64 = 0;
    let mut consumed: u32 = 0;
    loop {
        let next = match connection.wait(|kind| matches!(kind, Kind::BodyChunk(chunk) if chunk.id == id)) {
            // Who reads it may wait for a lock. It is no reason for this process to go: that would look like a crash.
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                connection.send(Kind::BodyCancel(proto::BodyCancel { id }))?;
                return Ok(Err("it did not come in time".into()));
            }
            next => next?,
        };
        let Kind::BodyChunk(chunk) = next else { continue };
        if !chunk.error.is_empty() {
            return Ok(Err(chunk.error));
        }
        if chunk.gone {
            return Ok(Ok(Fetched::Gone));
        }
        size += chunk.data.len() as u64;
        let pushed = match size {
            0..=BODY_BYTES_MAX => fetched.push(storage, &chunk.data),
            _ => Err(format!("the body is larger than {BODY_BYTES_MAX} bytes")),
        };
        if let Err(error) = pushed {
            if !chunk.last {
                connection.send(Kind::BodyCancel(proto::BodyCancel { id }))?;
            }
            return Ok(Err(error));
        }
        if chunk.last {
            return Ok(Ok(fetched));
        }
        consumed += chunk.data.len() as u32;
        if consumed >= MORE_BYTES {
            connection.send(Kind::BodyMore(proto::BodyMore { id, bytes: consumed }))?;
            consumed = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeStorage;
    use super::*;
    use crate::wire::frame::Decoder;

    /// A relay that hears and says nothing.
    #[derive(Default)]
    struct Silent {
        heard: Vec<u8>,
    }

    impl Read for &mut Silent {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }
    }

    impl Write for &mut Silent {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.heard.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_body_that_does_not_come_is_an_error_of_its_change() {
        let mut relay = Silent::default();
        let request = proto::BodyRequest { id: 7, ..Default::default() };
        let fetched = fetch(&mut FakeStorage::default(), &mut Connection::new(&mut relay), request);
        assert_eq!(fetched.unwrap().unwrap_err(), "it did not come in time");
        let mut decoder = Decoder::new();
        decoder.push(&relay.heard);
        assert!(matches!(decoder.next().unwrap().unwrap().kind, Some(Kind::BodyRequest(_))));
        assert_eq!(decoder.next().unwrap().unwrap().kind, Some(Kind::BodyCancel(proto::BodyCancel { id: 7 })));
    }
}
