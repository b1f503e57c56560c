//! What a peer says, of any bytes and at any time, while we have things to say ourselves: no panic, an end to what waits, and
//! what goes out are frames.

#![cfg_attr(fuzzing, no_main)]

use std::sync::Arc;

use dovetail::peer::{Admits, Event, Identity, Outbox, Session};
use dovetail::wire::frame::{self, Decoder};
use dovetail::wire::proto::frame::Kind;
use dovetail::wire::proto::Change;

/// More than any of what is said is answered by.
const OUT_BYTES_MAX: usize = 64 << 20;

pub fn run(bytes: &[u8]) {
    let Some((choice, mut bytes)) = bytes.split_first() else { return };
    let me = Identity { server: "b".into(), instance: vec![1; 16], epoch: 7, software: "fuzz".into() };
    let admits = match choice & 1 {
        0 => Admits::Only("a".into()),
        _ => Admits::OneOf { connecting: vec!["a".into()], others: vec!["c".into()] },
    };
    let mut session = Session::new(Arc::new(me), admits, 0);
    let mut outbox = Outbox::new(1 << 20);
    let user: Arc<str> = "jane".into();
    let change = frame::encode(&Kind::Change(Change::default()).into()).expect("a frame");
    (1..=20).for_each(|seq| outbox.append(&user, seq, change.clone().into(), seq));
    if choice & 2 != 0 {
        session.greet((0, 0), 1, 1, 1, Vec::new(), Default::default());
    }
    let (mut from_peer, mut now_ms, mut out_bytes) = (Decoder::new(), 0, 0);
    while let Some((step, rest)) = bytes.split_first() {
        let piece = rest.len().min(usize::from(step >> 2) * 4 + 1);
        let (piece, rest) = rest.split_at(piece);
        bytes = rest;
        now_ms += u64::from(step & 3) * 4_000;
        from_peer.push(piece);
        loop {
            let frame = match from_peer.next() {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(_) => return,
            };
            match session.receive(frame, now_ms) {
                Ok(Some(Event::Hello(_))) if choice & 2 == 0 => {
                    session.greet((0, 0), 1, 1, 1, Vec::new(), Default::default())
                }
                Ok(Some(Event::Ack(ack))) => ack.seqs.iter().for_each(|seq| _ = outbox.ack(*seq)),
                Ok(Some(Event::Refused(refused))) => drop(outbox.refuse(refused.seq, &refused.error, now_ms)),
                Ok(Some(Event::Change(change))) => {
                    let stamp = change.stamp.unwrap_or_default();
                    session.ack(stamp.epoch, stamp.seq);
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
        if session.tick(now_ms).is_err() {
            return;
        }
        let mut out = Vec::new();
        while session.next_frame(&mut outbox, now_ms, &mut out).expect("what we say fits into frames") {}
        out_bytes += out.len();
        assert!(out_bytes < OUT_BYTES_MAX);
        let mut to_peer = Decoder::new();
        to_peer.push(&out);
        while to_peer.next().expect("a frame").is_some() {}
        assert!(!to_peer.is_in_frame());
    }
}

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| run(bytes));
