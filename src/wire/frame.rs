//! Frames: one version byte, three bytes of payload length (big endian), then one encoded [`Frame`].
//!
//! Guarantees that no input, however broken, panics or takes more memory than one frame and what was pushed; a bad
//! frame is an error for good, because nothing behind it can be trusted to begin where it seems to.

use prost::Message;

use super::proto::{frame::Kind, BrokenFrame, BrokenStamp, Change, Frame, Stamp};

/// The version that we speak, the first byte of every frame.
pub const VERSION: u8 = 1;
/// Bytes in front of the payload.
pub const HEADER_BYTES: usize = 4;
/// Longest payload that is sent or taken.
pub const PAYLOAD_BYTES_MAX: usize = 65_536;

/// Why bytes are not a frame, or a record does not fit into one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FrameError {
    #[error("the frame is of version {0}, and only version {VERSION} is known here{hint}", hint = hint(*.0))]
    UnknownVersion(u8),
    #[error("the frame is {0} bytes long, and at most {PAYLOAD_BYTES_MAX} are allowed")]
    TooLong(usize),
    #[error("the frame cannot be decoded: {0}")]
    Undecodable(String),
    #[error("the frame is of a kind that is not known here")]
    UnknownKind,
}

/// What the other side may be that begins with this byte: RFC 8446, 5.1.
fn hint(first: u8) -> &'static str {
    match first {
        20..=23 => ": it speaks TLS",
        _ => "",
    }
}

impl From<Kind> for Frame {
    fn from(kind: Kind) -> Frame {
        Frame { kind: Some(kind) }
    }
}

/// The frame as bytes, header included.
pub fn encode(frame: &Frame) -> Result<Vec<u8>, FrameError> {
    let mut out = Vec::new();
    append(frame, &mut out)?;
    Ok(out)
}

/// Appends the frame's bytes to `out`, which stays as it was on an error.
pub fn append(frame: &Frame, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let length = frame.encoded_len();
    if length > PAYLOAD_BYTES_MAX {
        return Err(FrameError::TooLong(length));
    }
    let [_, high, middle, low] = (length as u32).to_be_bytes();
    out.reserve(HEADER_BYTES + length);
    out.extend_from_slice(&[VERSION, high, middle, low]);
    frame.encode_raw(out);
    Ok(())
}

/// Bytes in, frames out. After each [`push`](Decoder::push) call [`next`](Decoder::next) until it returns `None`:
/// then less than one frame is left in here.
#[derive(Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes at the buffer's begin that were taken already.
    taken: usize,
    failed: Option<FrameError>,
}

impl Decoder {
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Takes bytes as they came from the connection. After an error they are ignored.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.failed.is_some() {
            return;
        }
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete frame. An error stays: the connection must be closed.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.take().inspect_err(|error| {
            self.failed = Some(error.clone());
            self.buffer = Vec::new();
            self.taken = 0;
        })
    }

    /// True if the connection ended inside a frame.
    pub fn is_in_frame(&self) -> bool {
        self.buffer.len() > self.taken
    }

    fn take(&mut self) -> Result<Option<Frame>, FrameError> {
        let rest = &self.buffer[self.taken..];
        let Some(&version) = rest.first() else { return Ok(None) };
        if version != VERSION {
            return Err(FrameError::UnknownVersion(version));
        }
        let Some(header) = rest.get(1..HEADER_BYTES) else {
            return Ok(None);
        };
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
        if length > PAYLOAD_BYTES_MAX {
            return Err(FrameError::TooLong(length));
        }
        let Some(payload) = rest.get(HEADER_BYTES..HEADER_BYTES + length) else {
            return Ok(None);
        };
        let frame = Frame::decode(payload)
            .or_else(|error| salvage(payload).ok_or_else(|| FrameError::Undecodable(error.to_string())))?;
        if frame.kind.is_none() {
            return Err(FrameError::UnknownKind);
        }
        self.taken += HEADER_BYTES + length;
        Ok(Some(frame))
    }
}

/// Of a change that does not decode, whose and which it is. Without any operation it is malformed, but the connection goes
/// on: its sender would send it again over each new one, before what it has for others.
fn salvage(payload: &[u8]) -> Option<Frame> {
    let change = BrokenFrame::decode(payload).ok()?.change?;
    let BrokenStamp { origin, epoch, seq, clock } = change.stamp?;
    let stamp = Some(Stamp { origin, epoch, seq, clock, vector: vec![] });
    let user = String::from_utf8_lossy(&change.user).into_owned();
    Some(Kind::Change(Change { stamp, user, carrier: change.carrier, ..Default::default() }).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::proto::{op::What, BodyChunk, Op, Ping, Save};

    fn ping(id: u64) -> Frame {
        Kind::Ping(Ping { id, heard_clock: 0 }).into()
    }

    #[test]
    fn frames_survive_bytes_that_arrive_one_at_a_time() {
        let mut bytes = encode(&ping(7)).unwrap();
        append(&ping(8), &mut bytes).unwrap();
        let mut decoder = Decoder::new();
        let mut frames = Vec::new();
        for byte in bytes {
            decoder.push(&[byte]);
            while let Some(frame) = decoder.next().unwrap() {
                frames.push(frame);
            }
        }
        assert_eq!(frames, [ping(7), ping(8)]);
        assert!(!decoder.is_in_frame());
    }

    #[test]
    fn the_longest_frame_passes_and_one_byte_more_does_not() {
        let chunk =
            |length: usize| Frame::from(Kind::BodyChunk(BodyChunk { data: vec![0; length], ..Default::default() }));
        let overhead = chunk(65_000).encoded_len() - 65_000;
        let longest = chunk(PAYLOAD_BYTES_MAX - overhead);
        let mut decoder = Decoder::new();
        decoder.push(&encode(&longest).unwrap());
        assert_eq!(decoder.next().unwrap(), Some(longest));

        let mut out = vec![42];
        let error = append(&chunk(PAYLOAD_BYTES_MAX - overhead + 1), &mut out).unwrap_err();
        assert_eq!(error, FrameError::TooLong(PAYLOAD_BYTES_MAX + 1));
        assert_eq!(out, [42]);
    }

    #[test]
    fn bad_headers_are_refused_as_soon_as_they_are_seen() {
        let mut decoder = Decoder::new();
        decoder.push(&[9]);
        assert_eq!(decoder.next(), Err(FrameError::UnknownVersion(9)));
        decoder.push(&encode(&ping(1)).unwrap());
        assert_eq!(decoder.next(), Err(FrameError::UnknownVersion(9)), "an error stays");

        let mut decoder = Decoder::new();
        decoder.push(&[VERSION, 1, 0, 1]);
        assert_eq!(decoder.next(), Err(FrameError::TooLong(65_537)));
    }

    #[test]
    fn undecodable_and_unknown_payloads_are_errors() {
        let mut decoder = Decoder::new();
        decoder.push(&[VERSION, 0, 0, 2, 0xff, 0xff]);
        assert!(matches!(decoder.next(), Err(FrameError::Undecodable(_))));

        let mut decoder = Decoder::new();
        decoder.push(&[VERSION, 0, 0, 0]);
        assert_eq!(decoder.next(), Err(FrameError::UnknownKind));
    }

    #[test]
    fn of_a_change_that_does_not_decode_it_is_known_whose_it_is() {
        let stamp = Some(Stamp { origin: "a".into(), epoch: 5, seq: 7, clock: 9, vector: vec![] });
        let change = |keyword: &str| {
            let save = Save { keywords: vec![keyword.into()], ..Default::default() };
            let ops = vec![Op { what: Some(What::Save(save)) }];
            Change { stamp: stamp.clone(), user: "jane".into(), carrier: 3, ops, ..Default::default() }
        };
        let mut bytes = encode(&Kind::Change(change("keyword")).into()).unwrap();
        let at = bytes.windows(7).position(|some| some == b"keyword").unwrap();
        bytes[at] = 0xff;
        append(&ping(1), &mut bytes).unwrap();
        let mut decoder = Decoder::new();
        decoder.push(&bytes);
        let expected = Kind::Change(Change { ops: vec![], ..change("") });
        assert_eq!(decoder.next().unwrap(), Some(expected.into()));
        assert_eq!(decoder.next().unwrap(), Some(ping(1)), "the connection goes on");
    }

    #[test]
    fn garbage_never_panics_and_never_piles_up() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for round in 0..2000 {
            let mut decoder = Decoder::new();
            for _ in 0..20 {
                let mut bytes: Vec<u8> = (0..random() % 64).map(|_| random() as u8).collect();
                if round % 2 == 0 && !bytes.is_empty() {
                    // A plausible header lets the garbage reach the decoder.
                    bytes.splice(0..0, [VERSION, 0, 0, bytes.len() as u8]);
                }
                decoder.push(&bytes);
                while let Ok(Some(_)) = decoder.next() {}
                assert!(decoder.buffer.len() <= HEADER_BYTES + PAYLOAD_BYTES_MAX + 128);
            }
        }
    }
}
