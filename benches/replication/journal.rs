//! What the journal costs, and what a relay remembers of many mailboxes. In this process, without Dovecot.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dovetail::journal::{Journal, KnownLog, Lock, Options};
use dovetail::relay::{client, start, Config, Connection, Peer};
use dovetail::wire::frame;
use dovetail::wire::proto::{frame::Kind, Attach, Record, Span};

use crate::cluster::holds_within;
use crate::processes::memory_kb;
use crate::report::{Report, Value};
use crate::variant::Variant;

const CHANGES: u64 = 20_000;
const CHANGE_BYTES: usize = 600;
const USERS: usize = 10_000;
const MAILBOXES_PER_USER: usize = 10;

pub fn measure(report: &mut Report) {
    let folder = std::env::temp_dir().join(format!("dovetail-bench-journal-{}", std::process::id()));
    std::fs::create_dir_all(folder.join("cost")).expect("a temporary folder");
    std::fs::create_dir_all(folder.join("relay")).expect("a temporary folder");
    println!("journal: {CHANGES} changes, then a relay with {USERS} users");
    cost(&folder.join("cost"), report);
    memory(&folder.join("relay"), report);
    let _ = std::fs::remove_dir_all(&folder);
}

/// Each change in a transaction of its own, with its place in a log, as when there is little to do; acknowledged at once.
fn cost(folder: &Path, report: &mut Report) {
    let peers = ["b".to_owned()];
    let options = Options { folder, server: "a", peers: &peers, boot: "bench", now_us: 1 };
    let lock = Lock::try_take(folder).expect("the lock").expect("nobody else has it");
    let (mut journal, _) = Journal::open(&options, lock).expect("the journal");
    let frame = [7; CHANGE_BYTES];
    let written_before = written_bytes();
    let begin = Instant::now();
    for n in 0..CHANGES {
        let seq = journal.next_seq().expect("a number");
        journal.append("jane", seq, &frame, &["b"]).expect("append");
        let log = KnownLog {
            user: "jane".into(),
            mailbox: vec![1; 16],
            log_seq: 2,
            end: n,
            tail: vec![0; 64],
            ..Default::default()
        };
        journal.advance_log(&log).expect("log");
        journal.commit().expect("commit");
        journal.acknowledge("b", seq).expect("acknowledge");
        journal.commit().expect("commit");
    }
    let per_change = begin.elapsed().as_secs_f64() * 1e6 / CHANGES as f64;
    drop(journal);
    let bytes = (written_bytes() - written_before) as f64 / CHANGES as f64;
    report.add("journal: a change stored and acknowledged", "us", Variant::Dovetail, Value::exact(per_change));
    report.add("  bytes written for it", "", Variant::Dovetail, Value::exact(bytes));
}

/// What this process has written to files so far.
fn written_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("wchar: ")?.parse().ok()).unwrap_or(0)
}

/// An engine in this process hears of one commit in each of 100,000 mailboxes.
fn memory(folder: &Path, report: &mut Report) {
    let config = Config {
        server: "a".into(),
        peers: vec![Peer { name: "b".into(), address: "127.0.0.1:9".into() }],
        worker_socket: PathBuf::from("/nonexistent"),
        workers: 2,
        queue_bytes_max: 64 << 20,
        journal: folder.into(),
        journal_bytes_max: 1 << 30,
        compare_listed_after_us: None,
        compare_interval_ms: None,
        journal_age_us_max: u64::MAX >> 1,
        client_limit: 10_000,
        boot: "bench".into(),
        tls: None,
        insecure_plaintext: false,
        software: "bench".into(),
    };
    let before = memory_kb(std::process::id()).1;
    let relay = start(config, || {}, || {}).expect("an engine");
    let (mut ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    assert!(relay.accept(theirs.into(), Connection::Local { uid: None }), "the engine takes no connection");
    let attach = Kind::Attach(Attach { process: "bench".into(), pid: 1 });
    ours.write_all(&frame::encode(&attach.into()).expect("a small frame")).expect("the engine reads");
    for user in 0..USERS {
        for mailbox in 0..MAILBOXES_PER_USER {
            let mut mailbox_guid = vec![mailbox as u8; 16];
            mailbox_guid[..4].copy_from_slice(&(user as u32).to_le_bytes());
            let span = Span {
                user: format!("user{user}@example.org"),
                mailbox_guid,
                log_seq: 2,
                begin: 40,
                end: 200,
                tail: vec![1; 64],
                ..Default::default()
            };
            let record = Kind::Record(Record { spans: vec![span], ..Default::default() });
            ours.write_all(&frame::encode(&record.into()).expect("a small frame")).expect("the engine reads");
        }
    }
    let (socket, theirs) = UnixStream::pair().expect("a pair of sockets");
    assert!(relay.accept(theirs.into(), Connection::Local { uid: None }), "the engine takes no connection");
    let count = (USERS * MAILBOXES_PER_USER) as u64;
    let heard = holds_within(Duration::from_secs(60), || {
        client::status_on(&socket, None, Duration::from_secs(10))
            .is_ok_and(|s| s.counters.unwrap_or_default().spans == count)
    });
    assert!(heard, "the engine never heard of all {count} mailboxes");
    let after = memory_kb(std::process::id()).1;
    relay.stop();
    let name = format!("relay: memory for {USERS} users with {count} mailboxes");
    report.add(&name, "MB", Variant::Dovetail, Value::exact(after.saturating_sub(before) as f64 / 1024.0));
}
