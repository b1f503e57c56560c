//! Where the fuzzer begins: each record that can come in a frame, with all of its fields, is among its seeds.
//!
//! With `DOVETAIL_WRITE_SEEDS` set, writes those that are missing. What the fuzzer does with them is done here, too, with each.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use dovetail::wire::frame::{self, Decoder};
use dovetail::wire::proto::frame::Kind;
use dovetail::wire::proto::{Frame, Hello};
use prost::Message;
use protox::prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind as FieldKind, MessageDescriptor, OneofDescriptor, Value,
};

#[path = "../fuzz/fuzz_targets"]
mod targets {
    pub mod frame;
    pub mod indexlog;
    pub mod journal;
    pub mod relay;
    pub mod session;
    pub mod settings;
}

/// As deep as records are within records.
const DEPTH_MAX: usize = 6;

fn descriptor() -> MessageDescriptor {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/wire");
    let files = protox::compile([root.join("dovetail.proto")], [root]).unwrap();
    let pool = DescriptorPool::from_file_descriptor_set(files).unwrap();
    pool.get_message_by_name("dovetail.v1.Frame").unwrap()
}

/// One value of a field's type; of a server's name, that of the peer in the session's target.
fn value(field: &FieldDescriptor, depth: usize) -> Value {
    let one = match field.kind() {
        FieldKind::Bool => Value::Bool(true),
        FieldKind::String => Value::String("a".into()),
        FieldKind::Bytes => Value::Bytes(vec![7; 16].into()),
        FieldKind::Uint32 | FieldKind::Fixed32 => Value::U32(1),
        FieldKind::Uint64 | FieldKind::Fixed64 => Value::U64(1),
        FieldKind::Int32 | FieldKind::Sint32 | FieldKind::Sfixed32 => Value::I32(1),
        FieldKind::Int64 | FieldKind::Sint64 | FieldKind::Sfixed64 => Value::I64(1),
        FieldKind::Enum(_) => Value::EnumNumber(1),
        FieldKind::Message(message) => Value::Message(filled(&message, depth + 1)),
        other => panic!("{}: {other:?}", field.full_name()),
    };
    match field.is_list() {
        // Of what can be one of several, each.
        true => match field.kind() {
            FieldKind::Message(message) if message.oneofs().any(|oneof| is_choice(&oneof)) => {
                Value::List(all_kinds(&message, depth + 1).into_iter().map(Value::Message).collect())
            }
            _ => Value::List(vec![one.clone(), one]),
        },
        false => one,
    }
}

/// Not what an optional field is turned into.
fn is_choice(oneof: &OneofDescriptor) -> bool {
    !oneof.name().starts_with('_')
}

/// With all fields; of those of which only one can be there, the last.
fn filled(descriptor: &MessageDescriptor, depth: usize) -> DynamicMessage {
    let mut message = DynamicMessage::new(descriptor.clone());
    let is_leaf = |field: &FieldDescriptor| !matches!(field.kind(), FieldKind::Message(_));
    for field in descriptor.fields().filter(|field| depth < DEPTH_MAX || is_leaf(field)) {
        message.set_field(&field, value(&field, depth));
    }
    message
}

/// One for each of the fields of which only one can be there.
fn all_kinds(descriptor: &MessageDescriptor, depth: usize) -> Vec<DynamicMessage> {
    let of_one = |field: &FieldDescriptor| field.containing_oneof().is_some_and(|oneof| is_choice(&oneof));
    let kind = |field: FieldDescriptor| {
        let mut message = DynamicMessage::new(descriptor.clone());
        message.set_field(&field, value(&field, depth));
        message
    };
    descriptor.fields().filter(of_one).map(kind).collect()
}

/// Each kind's name and its frame.
fn frames() -> Vec<(String, Frame)> {
    let kinds = all_kinds(&descriptor(), 0);
    let frame = |message: DynamicMessage| {
        let name = message.fields().next().unwrap().0.name().to_owned();
        (name, Frame::decode(&message.encode_to_vec()[..]).unwrap())
    };
    kinds.into_iter().map(frame).collect()
}

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target)
}

/// Which kinds of frames are in a target's seeds; `frames_of` takes away what the target adds to them.
fn kinds_in(target: &str, frames_of: fn(&[u8]) -> Vec<u8>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for file in std::fs::read_dir(folder(target)).unwrap() {
        let mut decoder = Decoder::new();
        decoder.push(&frames_of(&std::fs::read(file.unwrap().path()).unwrap()));
        while let Ok(Some(frame)) = decoder.next() {
            let text = format!("{:?}", frame.kind.unwrap());
            found.insert(text.split('(').next().unwrap().to_owned());
        }
    }
    found
}

fn write_missing(target: &str, name: &str, bytes: &[u8]) {
    if std::env::var_os("DOVETAIL_WRITE_SEEDS").is_some() {
        std::fs::write(folder(target).join(name), bytes).unwrap();
    }
}

fn kind_of(frame: &Frame) -> String {
    format!("{:?}", frame.kind.as_ref().unwrap()).split('(').next().unwrap().to_owned()
}

#[test]
fn each_record_is_among_the_seeds_of_the_frames() {
    let mut all = BTreeSet::new();
    for (name, frame) in frames() {
        let mut bytes = vec![0xff];
        frame::append(&frame, &mut bytes).unwrap();
        write_missing("frame", &name, &bytes);
        all.insert(kind_of(&frame));
    }
    assert!(all.len() > 40);
    let missing: Vec<_> = all.difference(&kinds_in("frame", |seed| seed[1..].to_vec())).cloned().collect();
    assert!(missing.is_empty(), "DOVETAIL_WRITE_SEEDS=1 cargo test --test fuzz adds {missing:?}");
}

/// What only local processes and workers say as well: it must end the session.
#[test]
fn each_record_is_among_the_seeds_of_the_session() {
    let hello = Hello { server: "a".into(), instance: vec![7; 16], epoch: 1, ..Default::default() };
    let hello: Frame = Kind::Hello(hello).into();
    let mut all = BTreeSet::new();
    for (name, frame) in frames() {
        let mut bytes = Vec::new();
        frame::append(&hello, &mut bytes).unwrap();
        frame::append(&frame, &mut bytes).unwrap();
        // At no time, in the longest pieces; to who connected, and to who listens and has greeted or not.
        let pieces: Vec<u8> = bytes.chunks(PIECE).flat_map(|piece| [&[STEP][..], piece].concat()).collect();
        for (choice, who) in [(0, ""), (1, "-listening"), (2, "-greeted"), (3, "-listening-greeted")] {
            write_missing("session", &format!("{name}{who}"), &[&[choice], &pieces[..]].concat());
        }
        all.insert(kind_of(&frame));
    }
    let frames_of = |seed: &[u8]| {
        let mut frames = Vec::new();
        let mut rest = &seed[1..];
        while let Some((step, piece)) = rest.split_first() {
            let (piece, behind) = piece.split_at(piece.len().min(usize::from(step >> 2) * 4 + 1));
            frames.extend_from_slice(piece);
            rest = behind;
        }
        frames
    };
    let missing: Vec<_> = all.difference(&kinds_in("session", frames_of)).cloned().collect();
    assert!(missing.is_empty(), "DOVETAIL_WRITE_SEEDS=1 cargo test --test fuzz adds {missing:?}");
}

/// Said by each of those who speak with a relay: most of them must not, and that ends their connection alone.
#[test]
fn each_record_is_among_the_seeds_of_the_relay() {
    let mut all = BTreeSet::new();
    for (name, frame) in frames() {
        let record = frame.encode_to_vec();
        let length = u16::try_from(record.len()).unwrap().to_le_bytes();
        let steps = WHO.into_iter().flat_map(|who| [&[who][..], &length, &record].concat());
        write_missing("relay", &name, &steps.collect::<Vec<u8>>());
        all.insert(kind_of(&frame));
    }
    let frames_of = |seed: &[u8]| {
        let mut frames = Vec::new();
        let mut rest = seed;
        while let [_, low, high, behind @ ..] = rest {
            let (record, behind) = behind.split_at(usize::from(u16::from_le_bytes([*low, *high])).min(behind.len()));
            frame::append(&Frame::decode(record).unwrap(), &mut frames).unwrap();
            rest = behind;
        }
        frames
    };
    let missing: Vec<_> = all.difference(&kinds_in("relay", frames_of)).cloned().collect();
    assert!(missing.is_empty(), "DOVETAIL_WRITE_SEEDS=1 cargo test --test fuzz adds {missing:?}");
}

/// Runs what the fuzzer runs, without it.
fn replay(folder: &Path, run: fn(&[u8])) {
    let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    assert!(!files.is_empty());
    for file in files.iter().filter(|file| file.is_file()) {
        let outcome = std::panic::catch_unwind(|| run(&std::fs::read(file).unwrap()));
        assert!(outcome.is_ok(), "{}", file.display());
    }
}

#[test]
fn seeds_of_the_frames_are_replayed() {
    replay(&folder("frame"), targets::frame::run);
}

#[test]
fn seeds_of_the_session_are_replayed() {
    replay(&folder("session"), targets::session::run);
}

#[test]
fn seeds_of_the_relay_are_replayed() {
    replay(&folder("relay"), targets::relay::run);
}

#[test]
fn seeds_of_the_journal_are_replayed() {
    replay(&folder("journal"), targets::journal::run);
}

#[test]
fn seeds_of_the_settings_are_replayed() {
    replay(&folder("settings"), targets::settings::run);
}

#[test]
fn logs_of_dovecot_are_replayed() {
    replay(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/indexlog"), targets::indexlog::run);
}

/// As fuzz_targets/relay.rs has them: one that is trusted, a worker with its answer, a peer, one that is not trusted, and time
/// goes on.
const WHO: [u8; 5] = [0, 5, 4, 2, 16];

/// As fuzz_targets/session.rs has them.
const STEP: u8 = 63 << 2;
const PIECE: usize = 63 * 4 + 1;
