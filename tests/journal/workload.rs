//! What relays do to a journal, always the same, and what must be in it after each commit.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::time::{Duration, Instant};

use dovetail::journal::{
    Elsewhere, Failed, FlagChange, Journal, JournalError, KnownLog, Lock, Options, PassedOn, Seen, Start,
};
use dovetail::merge::mailbox::Named;
use rusqlite::types::Value;
use rusqlite::{Connection, OpenFlags};

/// Epoch of the journal.
const EPOCH: u64 = 77;
const FILE: &str = "journal.sqlite";
/// Commits that make the checkpoint's thread begin.
const COMMITS: u64 = 1_000;
/// Of these, those that opening a new journal takes.
const COMMITS_OF_OPENING: u64 = 1;
const PATIENCE: Duration = Duration::from_secs(60);

/// How a relay opens the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct How {
    pub peers: &'static [&'static str],
    pub boot: &'static str,
}

const FIRST: How = How { peers: &["b", "c", "d"], boot: "first" };
const WITHOUT_D: How = How { peers: &["e", "c", "b"], boot: "first" };
pub const NEXT_BOOT: How = How { boot: "second", ..WITHOUT_D };

pub fn open(folder: &Path, how: How) -> Result<(Journal, Start), JournalError> {
    let peers: Vec<String> = how.peers.iter().map(|name| name.to_string()).collect();
    let options = Options { folder, server: "a", peers: &peers, boot: how.boot, now_us: EPOCH };
    Journal::open(&options, Lock::try_take(folder).unwrap().expect("nobody else has the lock"))
}

/// What is in an open journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub how: How,
    pub seq: u64,
    /// All rows but those that each opening writes anew.
    pub rows: Vec<String>,
}

impl State {
    pub fn of(journal: &Journal, folder: &Path, how: How) -> State {
        for peer in how.peers {
            journal.unacknowledged(peer, None, 0, usize::MAX).expect("all changes are what was written");
        }
        State { how, seq: journal.seq(), rows: rows(folder) }
    }

    /// In words, what another one has more and less.
    pub fn unlike(&self, other: &State) -> String {
        let lacks = |one: &State, other: &State| -> String {
            one.rows.iter().filter(|row| !other.rows.contains(row)).map(|row| format!("\n    {row}")).collect()
        };
        format!(
            "{:?}, last number {} and not {}\n  less:{}\n  more:{}",
            self.how,
            other.seq,
            self.seq,
            lacks(self, other),
            lacks(other, self)
        )
    }
}

fn rows(folder: &Path) -> Vec<String> {
    let db = read(folder);
    let mut names = db.prepare("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name").unwrap();
    let names: Vec<String> = names.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    let mut found = Vec::new();
    for name in names {
        let rest = match name.as_str() {
            "meta" => "WHERE key NOT IN ('boot', 'clean', 'reserved', 'seq', 'unheard_since', 'unlooked')",
            // What a power failure adds.
            "failed" => "WHERE error NOT LIKE '%power%'",
            _ => "",
        };
        let mut query = db.prepare(&format!("SELECT * FROM {name} {rest}")).unwrap();
        let columns = query.column_count();
        let mut rows = query.query([]).unwrap();
        while let Some(row) = rows.next().unwrap() {
            let values = (0..columns).map(|column| match row.get(column).unwrap() {
                Value::Blob(bytes) => format!(" {} bytes {:x}", bytes.len(), hash(&bytes)),
                value => format!(" {value:?}"),
            });
            found.push(format!("{name}:{}", values.collect::<String>()));
        }
    }
    found
}

pub fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

fn read(folder: &Path) -> Connection {
    Connection::open_with_flags(folder.join(FILE), OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap()
}

fn named(clock: u64) -> Named {
    Named { clock, origin: "a".into() }
}

fn log(user: &str, end: u64) -> KnownLog {
    let path = vec!["INBOX".to_owned()];
    KnownLog { user: user.into(), mailbox: vec![1; 16], log_seq: 2, end, tail: vec![9; 32], path, ..Default::default() }
}

/// Who uses the journal. `committed` hears of each commit when it has returned.
struct Relay<'a> {
    folder: &'a Path,
    how: How,
    journal: Journal,
    committed: &'a mut dyn FnMut(&Journal, How),
}

impl<'a> Relay<'a> {
    fn open(folder: &'a Path, how: How, committed: &'a mut dyn FnMut(&Journal, How)) -> Relay<'a> {
        let (journal, _) = open(folder, how).unwrap();
        committed(&journal, how);
        Relay { folder, how, journal, committed }
    }

    /// In the order of the relay: everything of one change is committed with it.
    fn ship(&mut self, user: &str, bytes: usize) -> u64 {
        let journal = &mut self.journal;
        let seq = journal.next_seq().unwrap();
        journal.advance_log(&log(user, 100 * seq)).unwrap();
        journal.append(user, seq * 1_000, &vec![seq as u8; bytes], self.how.peers).unwrap();
        journal.set_seen(user, &Seen { origin: "a".into(), epoch: EPOCH, seq }).unwrap();
        journal.note_clock(seq * 10).unwrap();
        seq
    }

    /// A change of b is applied, and passed on to c.
    fn apply(&mut self, seq: u64) {
        let journal = &mut self.journal;
        let seen = Seen { origin: "b".into(), epoch: 5, seq };
        journal.forget_coming("jane", "b", seq).unwrap();
        journal.set_seen("jane", &seen).unwrap();
        let flags = FlagChange { clock: seq, origin: "b".into(), change: vec![seq as u8; 60] };
        journal.note_flags("jane", &flags, seq).unwrap();
        journal.set_applied("b", 1, Some(seq)).unwrap();
        journal.next_seq().unwrap();
        let passed_on = PassedOn { change: &seen, via: "b", given: &["c"] };
        journal.pass_on("jane", seq, &[7; 300], &["c"], &passed_on).unwrap();
    }

    fn commit(&mut self) {
        self.journal.commit().unwrap();
        (self.committed)(&self.journal, self.how);
    }

    fn reopen(self, how: How) -> Relay<'a> {
        let Relay { folder, journal, committed, .. } = self;
        drop(journal);
        Relay::open(folder, how, committed)
    }

    fn close_and_reopen(self, how: How) -> Relay<'a> {
        let Relay { folder, journal, committed, .. } = self;
        journal.close().unwrap();
        Relay::open(folder, how, committed)
    }

    /// Numbers that may be given away before the disk is told.
    fn numbers_left(&self) -> u64 {
        let sql = "SELECT value FROM meta WHERE key = 'reserved'";
        read(self.folder).query_row(sql, [], |row| row.get::<_, u64>(0)).unwrap() - self.journal.seq()
    }
}

/// As the checkpoint's thread does it, but here and now.
fn checkpoint(db: &Connection, mode: &str) -> bool {
    let is_busy: bool = db.query_row(&format!("PRAGMA wal_checkpoint({mode})"), [], |row| row.get(0)).unwrap();
    !is_busy
}

/// A bit of everything.
pub fn everything(folder: &Path, committed: &mut dyn FnMut(&Journal, How)) {
    let mut relay = Relay::open(folder, FIRST, committed);
    relay.ship("jane", 200);
    relay.commit();
    for user in ["jane", "joe", "jane"] {
        relay.ship(user, 500);
    }
    relay.commit();
    relay.ship("joe", 9_000);
    relay.commit();
    mailboxes_of_others(&mut relay);

    // The write-ahead log is begun anew behind a checkpoint that found nobody in its way.
    let db = Connection::open(folder.join(FILE)).unwrap();
    for mode in ["PASSIVE", "RESTART"] {
        assert!(checkpoint(&db, mode));
        let seq = relay.ship("jane", 1_000);
        relay.commit();
        relay.journal.acknowledge_up_to("b", seq).unwrap();
        relay.journal.acknowledge_up_to("d", seq - 1).unwrap();
        relay.journal.acknowledge("c", seq - 1).unwrap();
        relay.commit();
    }
    drop(db);

    relay = relay.reopen(FIRST);
    relay = relay.close_and_reopen(FIRST).reopen(WITHOUT_D);
    relay.ship("jane", 300);
    relay.commit();
    relay = relay.reopen(NEXT_BOOT);
    relay.ship("jane", 300);
    relay.commit();
    numbers(&mut relay);
    relay.close_and_reopen(NEXT_BOOT);
}

/// Somebody is known, and the journal is closed and opened once more.
pub fn closed(folder: &Path, committed: &mut dyn FnMut(&Journal, How)) {
    let mut relay = Relay::open(folder, FIRST, committed);
    relay.ship("jane", 200);
    relay.commit();
    relay.close_and_reopen(FIRST);
}

fn mailboxes_of_others(relay: &mut Relay) {
    let journal = &mut relay.journal;
    journal.begin_epoch("b", 5).unwrap();
    journal.note_origin("far").unwrap();
    journal.set_user_peers("joe", Some(&["c".to_owned()])).unwrap();
    relay.commit();
    relay.journal.note_coming("jane", "b", 1, b"create").unwrap();
    relay.commit();
    relay.apply(1);
    relay.commit();
    relay.apply(2);
    relay.apply(3);
    relay.ship("jane", 100);
    relay.commit();

    let journal = &mut relay.journal;
    journal.set_path("jane", &[2; 16], &["Work".to_owned()], Some(&named(30))).unwrap();
    journal.note_own("jane", &[2; 16], 3).unwrap();
    journal.set_subscription("jane", &["Work".to_owned()], true, &named(31)).unwrap();
    journal.note_alias("jane", &[2; 16], &[3; 16], 40).unwrap();
    journal.rename_mailbox("jane", &[2; 16], &[3; 16]).unwrap();
    let elsewhere =
        Elsewhere { mailbox: vec![3; 16], uid: 3, guid: "three".into(), here: 7, moved: false, alone: false };
    journal.note_elsewhere("jane", "b", &elsewhere, 10).unwrap();
    journal.note_redo("jane", b"flags").unwrap();
    journal.fail(&Failed { user: "joe".into(), error: "why".into(), ..Default::default() }, None).unwrap();
    relay.commit();
    let journal = &mut relay.journal;
    journal.forget_redos("jane", i64::MAX).unwrap();
    journal.forget_flags(2).unwrap();
    journal.trim(0, 2_500).unwrap();
    relay.commit();
}

/// A peer knows of more numbers than were given away, and what is reserved of them comes to its end in mid-commit.
fn numbers(relay: &mut Relay) {
    let far = relay.journal.seq() + relay.numbers_left() + 2;
    let again = relay.journal.skip_numbers(far).unwrap();
    assert!(!again.is_empty());
    for stored in again {
        relay.ship(&stored.user, stored.frame.len());
    }
    relay.commit();
    for left in [2, 1 << 16] {
        let nearly = relay.journal.seq() + relay.numbers_left() - left;
        relay.journal.skip_numbers(nearly).unwrap();
        for _ in 0..3 {
            relay.ship("jane", 100);
        }
        relay.commit();
    }
}

/// The journal of `everything` is opened after a crash.
pub fn recovery(folder: &Path, committed: &mut dyn FnMut(&Journal, How)) {
    let mut relay = Relay::open(folder, How { boot: "third", ..NEXT_BOOT }, committed);
    relay.ship("jane", 300);
    relay.commit();
}

/// How much there is in the write-ahead log, and how much of that is in the database as well (sqlite.org/walformat.html: mxFrame,
/// nBackfill). Nobody but this process wants the locks that are given back here.
fn frames(folder: &Path) -> (u32, u32) {
    let index = std::fs::read(folder.join(FILE).with_extension("sqlite-shm")).unwrap();
    let number = |at: usize| u32::from_ne_bytes(index[at..at + 4].try_into().unwrap());
    (number(16), number(96))
}

/// By the journal's thread, but for what a commit at the same moment may have kept it from.
fn is_checkpointed(folder: &Path, db: &Connection) -> bool {
    let has_begun = frames(folder).1 > 0;
    // Then somebody else may do it, and finds little or nothing left to do.
    has_begun && checkpoint(db, "PASSIVE") && frames(folder).0 == frames(folder).1
}

/// So many commits that the checkpoint's thread does its work.
pub fn thread(folder: &Path, committed: &mut dyn FnMut(&Journal, How)) {
    let (journal, _) = open(folder, FIRST).unwrap();
    let mut relay = Relay { folder, how: FIRST, journal, committed };
    let last = (0..3).map(|_| relay.ship("jane", 3_000)).last().unwrap();
    for clock in COMMITS_OF_OPENING + 1..COMMITS - 2 {
        relay.journal.note_clock(clock).unwrap();
        relay.journal.commit().unwrap();
    }
    relay.ship("joe", 300);
    relay.commit();
    relay.journal.acknowledge_up_to("b", last).unwrap();
    relay.commit();
    relay.journal.acknowledge_up_to("c", last).unwrap();
    relay.commit();
    let deadline = Instant::now() + PATIENCE;
    let db = Connection::open(folder.join(FILE)).unwrap();
    while !is_checkpointed(folder, &db) {
        assert!(
            Instant::now() < deadline,
            "waited in vain for the checkpoint: does opening take {COMMITS_OF_OPENING} commits?"
        );
        std::thread::yield_now();
    }
    drop(db);
    relay.ship("joe", 300);
    relay.commit();
    relay.reopen(FIRST);
}
