//! The other end of the relay's local socket, for doveadm and tests: asks and waits for the answer.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::wire::frame::{self, Decoder};
use crate::wire::proto::{
    frame::Kind, AcceptPeer, ClearFailed, CompareRequest, Difference, FailedEntry, FailedRequest, Lack, PeerAccepted,
    PeerRemoved, Progress, ProgressRequest, RemovePeer, Status, StatusRequest, WaitRequest, WaitingEntry,
    WaitingRequest,
};

/// Asks the relay that listens on `socket` for its status; what is pending, and to be looked at, of one user or of all. Blocks
/// for at most about `timeout`; the error is a full sentence.
pub fn status(socket: &Path, user: Option<&str>, timeout: Duration) -> Result<Status, String> {
    status_on(&connect(socket)?, user, timeout).map_err(|error| format!("{}: {error}", socket.display()))
}

/// The same on a connection to it, which can be used again.
pub fn status_on(stream: &UnixStream, user: Option<&str>, timeout: Duration) -> Result<Status, String> {
    let mut status = None;
    let request = StatusRequest { user: user.unwrap_or_default().to_owned() };
    ask_on(stream, timeout, Kind::StatusRequest(request), |kind| match kind {
        Kind::Status(answer) => {
            status = Some(answer);
            Some(true)
        }
        _ => None,
    })?;
    Ok(status.unwrap_or_default())
}

/// Asks it for what needs a comparison or a person, the same way.
pub fn failed(socket: &Path, timeout: Duration) -> Result<Vec<FailedEntry>, String> {
    let mut entries = Vec::new();
    ask_on(&connect(socket)?, timeout, Kind::FailedRequest(FailedRequest {}), |kind| match kind {
        Kind::FailedList(list) => {
            entries.extend(list.entries);
            Some(!list.more)
        }
        _ => None,
    })
    .map_err(|error| format!("{}: {error}", socket.display()))?;
    Ok(entries)
}

/// Asks it for the users who wait, the same way.
pub fn waiting(socket: &Path, timeout: Duration) -> Result<Vec<WaitingEntry>, String> {
    let mut entries = Vec::new();
    ask_on(&connect(socket)?, timeout, Kind::WaitingRequest(WaitingRequest {}), |kind| match kind {
        Kind::WaitingList(list) => {
            entries.extend(list.entries);
            Some(!list.more)
        }
        _ => None,
    })
    .map_err(|error| format!("{}: {error}", socket.display()))?;
    Ok(entries)
}

/// Has it forget what failed, of one user or (None) all; how many entries there were.
pub fn clear_failed(socket: &Path, user: Option<&str>, timeout: Duration) -> Result<u64, String> {
    let mut cleared = 0;
    let clear = ClearFailed { user: user.unwrap_or_default().to_owned(), all: user.is_none() };
    ask_on(&connect(socket)?, timeout, Kind::ClearFailed(clear), |kind| match kind {
        Kind::FailedCleared(answer) => {
            cleared = answer.count;
            Some(true)
        }
        _ => None,
    })
    .map_err(|error| format!("{}: {error}", socket.display()))?;
    Ok(cleared)
}

/// Has it compare one user, or (None) all, with the peers, and hands out what differs as it is found. `repair`: until nothing does.
pub fn compare(
    socket: &Path,
    user: Option<&str>,
    (repair, bodies): (bool, bool),
    timeout: Duration,
    mut each: impl FnMut(&Difference),
) -> Result<(), String> {
    let mut error = String::new();
    let request = CompareRequest { user: user.unwrap_or_default().to_owned(), all: user.is_none(), repair, bodies };
    ask_on(&connect(socket)?, timeout, Kind::CompareRequest(request), |kind| match kind {
        Kind::CompareList(list) => {
            list.differences.iter().for_each(&mut each);
            error = list.error;
            Some(!list.more)
        }
        _ => None,
    })
    .map_err(|error| format!("{}: {error}", socket.display()))?;
    if error.is_empty() {
        Ok(())
    } else {
        Err(error)
    }
}

/// Asks it how far its comparisons are.
pub fn progress(socket: &Path, timeout: Duration) -> Result<Progress, String> {
    let mut progress = Progress::default();
    ask_on(&connect(socket)?, timeout, Kind::ProgressRequest(ProgressRequest {}), |kind| match kind {
        Kind::Progress(answer) => {
            progress = answer;
            Some(true)
        }
        _ => None,
    })
    .map_err(|error| format!("{}: {error}", socket.display()))?;
    Ok(progress)
}

/// Waits until all peers have applied what was done here until now, by one user or (None) all, for at most `patience`; `timeout` more
/// for the answer. Who lacks what then; empty: nobody lacks anything.
pub fn wait(socket: &Path, user: Option<&str>, patience: Duration, timeout: Duration) -> Result<Vec<Lack>, String> {
    let mut lacks = Vec::new();
    let timeout_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
    let request = WaitRequest { user: user.unwrap_or_default().to_owned(), all: user.is_none(), timeout_ms };
    ask_on(&connect(socket)?, patience.saturating_add(timeout), Kind::WaitRequest(request), |kind| match kind {
        Kind::Waited(answer) => {
            lacks = answer.lacks;
            Some(true)
        }
        _ => None,
    })
    .map_err(|error| format!("{}: {error}", socket.display()))?;
    Ok(lacks)
}

/// Has it forget a peer that is gone for good; how many changes that had not acknowledged.
pub fn remove_peer(socket: &Path, peer: &str, timeout: Duration) -> Result<u64, String> {
    let mut removed = PeerRemoved::default();
    ask_on(&connect(socket)?, timeout, Kind::RemovePeer(RemovePeer { peer: peer.to_owned() }), |kind| match kind {
        Kind::PeerRemoved(answer) => {
            removed = answer;
            Some(true)
        }
        _ => None,
    })
    .map_err(|error| format!("{}: {error}", socket.display()))?;
    if removed.error.is_empty() {
        Ok(removed.changes)
    } else {
        Err(removed.error)
    }
}

/// Has it let a peer in again of which there were two.
pub fn accept_peer(socket: &Path, peer: &str, timeout: Duration) -> Result<(), String> {
    let mut accepted = PeerAccepted::default();
    ask_on(&connect(socket)?, timeout, Kind::AcceptPeer(AcceptPeer { peer: peer.to_owned() }), |kind| match kind {
        Kind::PeerAccepted(answer) => {
            accepted = answer;
            Some(true)
        }
        _ => None,
    })
    .map_err(|error| format!("{}: {error}", socket.display()))?;
    if accepted.error.is_empty() {
        Ok(())
    } else {
        Err(accepted.error)
    }
}

fn connect(socket: &Path) -> Result<UnixStream, String> {
    UnixStream::connect(socket).map_err(|error| format!("connect({}) failed: {error}", socket.display()))
}

/// Sends the request and hands out the answers until one is the last (`true`). `None`: it is no answer. Waits for so long for each.
fn ask_on(
    mut stream: &UnixStream,
    timeout: Duration,
    request: Kind,
    mut answer: impl FnMut(Kind) -> Option<bool>,
) -> Result<(), String> {
    let fail = |what: &str, error: &dyn std::fmt::Display| format!("{what}() failed: {error}");
    let mut deadline = Instant::now() + timeout;
    stream.set_write_timeout(Some(timeout)).map_err(|e| fail("setsockopt", &e))?;
    let request = frame::encode(&request.into()).map_err(|e| fail("encode", &e))?;
    stream.write_all(&request).map_err(|e| fail("write", &e))?;

    let mut decoder = Decoder::new();
    let mut buffer = [0; 16 << 10];
    loop {
        if let Some(frame) = decoder.next().map_err(|e| fail("read", &e))? {
            match frame.kind.and_then(&mut answer) {
                Some(true) => return Ok(()),
                Some(false) => {
                    deadline = Instant::now() + timeout;
                    continue;
                }
                None => return Err(fail("read", &"the relay answered something else than what it was asked for")),
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(fail("read", &format!("the relay did not answer within {} msecs", timeout.as_millis())));
        }
        stream.set_read_timeout(Some(left)).map_err(|e| fail("setsockopt", &e))?;
        match stream.read(&mut buffer) {
            Ok(0) => {
                return Err(fail(
                    "read",
                    &"the relay closed the connection without an answer; it has one for root and its own user only",
                ))
            }
            Ok(length) => decoder.push(&buffer[..length]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(fail("read", &error)),
        }
    }
}
