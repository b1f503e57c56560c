//! Bytes as they come from a connection, in pieces of any size: no panic, the same frames however they are cut, and none that
//! the checks of a change would choke on.

#![cfg_attr(fuzzing, no_main)]

use dovetail::change;
use dovetail::wire::frame::{self, Decoder, FrameError};
use dovetail::wire::proto::frame::Kind;
use dovetail::wire::proto::{Change, Frame};

fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Frame>, Option<FrameError>) {
    let (mut decoder, mut frames) = (Decoder::new(), Vec::new());
    for piece in pieces {
        decoder.push(piece);
        loop {
            match decoder.next() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
    }
    (frames, None)
}

pub fn run(bytes: &[u8]) {
    let Some((size, bytes)) = bytes.split_first() else { return };
    let (frames, error) = decode(bytes.chunks(usize::from(*size) + 1));
    let at_once = decode(std::iter::once(bytes));
    assert_eq!((&frames, &error), (&at_once.0, &at_once.1));
    for frame in frames {
        let mut again = Vec::new();
        if frame::append(&frame, &mut again).is_ok() {
            assert_eq!(decode(std::iter::once(&again[..])), (vec![frame.clone()], None));
        }
        let changes: Vec<Change> = match frame.kind {
            Some(Kind::Change(change)) => vec![change],
            Some(Kind::Record(record)) => {
                let _ = change::check_spans(&record.spans);
                [record.change, record.expunged_in_memory].into_iter().flatten().collect()
            }
            Some(Kind::Apply(apply)) => apply.changes,
            Some(Kind::Looked(looked)) => looked.change.into_iter().collect(),
            Some(Kind::Intent(intent)) => {
                let _ = change::check_user(&intent.user);
                let _ = change::check_path(&intent.mailbox.unwrap_or_default().path);
                Vec::new()
            }
            Some(Kind::Refused(refused)) => {
                assert!(change::printable(&refused.error).chars().count() <= change::ERROR_CHARS_MAX);
                Vec::new()
            }
            _ => Vec::new(),
        };
        for change in changes {
            let is_good = change::check_change(&change).is_ok();
            let _ = change::check_spans(&change.spans);
            if is_good {
                change::uids_of(&change);
                change::guids_of(&change);
                change::flags_of(&change);
                change::bodies_to_fetch(&change);
            }
        }
    }
}

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| run(bytes));
