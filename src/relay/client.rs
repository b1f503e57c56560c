//! The other end of the relay's local socket, for doveadm and tests: asks and waits for the answer.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::wire::frame::{self, Decoder};
use crate::wire::proto::{frame::Kind, Frame, Status, StatusRequest};

/// Asks the relay that listens on `socket` for its status. Blocks for at most about `timeout`; the error is a full sentence.
pub fn status(socket: &Path, timeout: Duration) -> Result<Status, String> {
    let fail = |what: &str, error: &dyn std::fmt::Display| format!("{what}({}) failed: {error}", socket.display());
    let deadline = Instant::now() + timeout;
    let mut stream = UnixStream::connect(socket).map_err(|e| fail("connect", &e))?;
    stream.set_write_timeout(Some(timeout)).map_err(|e| fail("setsockopt", &e))?;
    let request = frame::encode(&Kind::StatusRequest(StatusRequest {}).into()).map_err(|e| fail("encode", &e))?;
    stream.write_all(&request).map_err(|e| fail("write", &e))?;

    let mut decoder = Decoder::new();
    let mut buffer = [0; 16 << 10];
    loop {
        if let Some(frame) = decoder.next().map_err(|e| fail("read", &e))? {
            return match frame {
                Frame { kind: Some(Kind::Status(status)) } => Ok(status),
                _ => Err(fail("read", &"the relay answered something else than its status")),
            };
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(fail("read", &format!("the relay did not answer within {} msecs", timeout.as_millis())));
        }
        stream.set_read_timeout(Some(left)).map_err(|e| fail("setsockopt", &e))?;
        match stream.read(&mut buffer) {
            Ok(0) => return Err(fail("read", &"the relay closed the connection without an answer")),
            Ok(length) => decoder.push(&buffer[..length]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(fail("read", &error)),
        }
    }
}
