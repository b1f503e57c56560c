use std::path::{Path, PathBuf};

use super::*;
use crate::merge::mailbox::Named;

/// A folder that goes when the test ends.
pub struct Folder(pub PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("dovetail-journal-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn try_open(&self, boot: &str) -> Result<(Journal, Start), JournalError> {
        self.try_open_with(&["b", "c"], boot)
    }

    fn try_open_with(&self, peers: &[&str], boot: &str) -> Result<(Journal, Start), JournalError> {
        let peers: Vec<String> = peers.iter().map(|peer| (*peer).to_owned()).collect();
        let options = Options { folder: &self.0, server: "a", peers: &peers, boot, now_us: 77 };
        let lock = Lock::try_take(&self.0).unwrap().expect("nobody else has it");
        Journal::open(&options, lock)
    }

    fn open(&self) -> Journal {
        self.try_open("boot").unwrap().0
    }

    fn file(&self) -> PathBuf {
        self.0.join(open::FILE_NAME)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn append(journal: &mut Journal, user: &str, frame: &[u8]) -> u64 {
    let seq = journal.next_seq().unwrap();
    journal.append(user, seq * 1_000, frame, &["b", "c"]).unwrap();
    seq
}

fn seqs(journal: &Journal, peer: &str, user: Option<&str>) -> Vec<u64> {
    journal.unacknowledged(peer, user, 0, usize::MAX).unwrap().iter().map(|stored| stored.seq).collect()
}

#[test]
fn what_a_worker_was_given_for_the_list_of_mailboxes_is_known_at_the_next_start() {
    let folder = Folder::new("coming");
    let (mut journal, _) = folder.try_open("boot").unwrap();
    journal.note_coming("jane", "b", 1, b"one").unwrap();
    journal.note_coming("jane", "b", 2, b"two").unwrap();
    journal.note_coming("jane", "c", 2, b"three").unwrap();
    journal.note_coming("joe", "b", 3, b"four").unwrap();
    journal.forget_coming("jane", "b", 1).unwrap();
    journal.commit().unwrap();
    drop(journal);
    let (mut journal, _) = folder.try_open("boot").unwrap();
    assert_eq!(journal.coming("jane").unwrap(), [b"two".to_vec(), b"three".to_vec()]);
    assert!(journal.is_coming("jane", "b", 2).unwrap() && !journal.is_coming("jane", "b", 1).unwrap());
    journal.begin_epoch("b", 5).unwrap();
    assert_eq!(journal.coming("jane").unwrap(), [b"three".to_vec()]);
    assert!(journal.coming("joe").unwrap().is_empty());
}

#[test]
fn what_was_committed_is_there_at_the_next_start() {
    let folder = Folder::new("start");
    let (mut journal, start) = folder.try_open("boot").unwrap();
    assert_eq!(start, Start { epoch: 77, is_new: true, is_after_boot: false, unheard_since: None });
    append(&mut journal, "jane", b"one");
    append(&mut journal, "joe", b"two");
    append(&mut journal, "jane", b"three");
    journal.acknowledge("b", 1).unwrap();
    journal.set_applied("b", 1, Some(9)).unwrap();
    journal.begin_epoch("c", 5).unwrap();
    journal.commit().unwrap();
    append(&mut journal, "jane", b"not committed");
    drop(journal);

    let (mut journal, start) = folder.try_open("boot").unwrap();
    assert_eq!((start.epoch, start.is_new, start.is_after_boot), (77, false, false));
    assert_eq!(seqs(&journal, "b", None), [2, 3]);
    assert_eq!(seqs(&journal, "c", None), [1, 2, 3]);
    assert_eq!(seqs(&journal, "c", Some("jane")), [1, 3]);
    assert_eq!(journal.bytes(), 11);
    assert_eq!((journal.pending("b").unwrap(), journal.first_pending("b").unwrap()), ((2, 8), Some(2)));
    assert_eq!(journal.applied("b").unwrap(), (0, vec![(1, 9)]));
    assert_eq!(journal.applied("c").unwrap(), (5, vec![]));
    assert_eq!(append(&mut journal, "jane", b"four"), 4, "the next number");
}

#[test]
fn what_all_have_is_gone() {
    let folder = Folder::new("gone");
    let mut journal = folder.open();
    for _ in 0..3 {
        append(&mut journal, "jane", b"frame");
    }
    assert_eq!(journal.acknowledge_up_to("b", 2).unwrap(), 2);
    assert_eq!(journal.bytes(), 15);
    journal.acknowledge("c", 2).unwrap();
    journal.acknowledge("c", 2).unwrap();
    assert_eq!((seqs(&journal, "c", None), journal.bytes()), (vec![1, 3], 10));
}

#[test]
fn no_number_is_given_twice_after_a_power_failure() {
    let folder = Folder::new("power");
    let mut journal = folder.open();
    append(&mut journal, "jane", b"perhaps not on the disk");
    journal.commit().unwrap();
    drop(journal);
    let (mut journal, _) = folder.try_open("another boot").unwrap();
    assert!(append(&mut journal, "jane", b"x") > 1_000_000);
}

#[test]
fn a_peer_that_is_not_configured_any_more_holds_nothing_back() {
    let folder = Folder::new("peers");
    let mut journal = folder.open();
    append(&mut journal, "jane", b"frame");
    journal.acknowledge("b", 1).unwrap();
    journal.commit().unwrap();
    drop(journal);
    let peers = ["d".to_owned(), "b".to_owned()];
    let options = Options { folder: &folder.0, server: "a", peers: &peers, boot: "boot", now_us: 1 };
    let lock = Lock::try_take(&folder.0).unwrap().unwrap();
    let (journal, _) = Journal::open(&options, lock).unwrap();
    assert_eq!((seqs(&journal, "b", None), seqs(&journal, "d", None), journal.bytes()), (vec![], vec![], 0));
}

#[test]
fn the_numbers_that_a_power_failure_skipped_stay_skipped_at_the_start_after_next() {
    let folder = Folder::new("skipped");
    let mut journal = folder.open();
    append(&mut journal, "jane", b"frame");
    journal.commit().unwrap();
    drop(journal);
    let (journal, start) = folder.try_open("another boot").unwrap();
    assert!(start.is_after_boot);
    let skipped_to = journal.seq();
    assert!(skipped_to > 1);
    // Ended before it gave one away, but peers know which one is next.
    drop(journal);
    let (mut journal, start) = folder.try_open("another boot").unwrap();
    assert_eq!(journal.seq(), skipped_to);
    assert!(start.is_after_boot, "it was killed before it had looked at all");
    journal.is_looked_at().unwrap();
    journal.commit().unwrap();
    drop(journal);
    let (_, start) = folder.try_open("another boot").unwrap();
    assert!(!start.is_after_boot);
}

#[test]
fn after_a_peer_knew_more_new_numbers_are_behind_what_it_knew() {
    let folder = Folder::new("set-back");
    let mut journal = folder.open();
    append(&mut journal, "jane", b"before");
    journal.commit().unwrap();
    drop(journal);
    let mut journal = folder.open();
    append(&mut journal, "jane", b"again");
    let again = journal.skip_numbers(5_000_000).unwrap();
    assert_eq!(again.iter().map(|stored| (stored.seq, &stored.frame[..])).collect::<Vec<_>>(), [(2, &b"again"[..])]);
    assert_eq!(append(&mut journal, "jane", b"again"), 5_000_001);
    journal.commit().unwrap();
    drop(journal);
    let (journal, _) = folder.try_open("another boot").unwrap();
    assert_eq!(seqs(&journal, "b", None), [1, 5_000_001]);
    assert!(journal.seq() > 6_000_000);
}

#[test]
fn the_write_ahead_log_stays_bounded_while_commits_never_pause() {
    let folder = Folder::new("wal");
    let mut journal = folder.open();
    let wal = folder.file().with_extension("sqlite-wal");
    let mut largest = 0;
    for _ in 0..20_000 {
        let seq = append(&mut journal, "jane", &[7; 2_000]);
        journal.commit().unwrap();
        journal.acknowledge_up_to("b", seq).unwrap();
        journal.acknowledge_up_to("c", seq).unwrap();
        journal.commit().unwrap();
        largest = largest.max(std::fs::metadata(&wal).unwrap().len());
    }
    assert!(largest < 100 << 20, "{largest} bytes");
}

#[test]
fn two_at_once_are_impossible() {
    let folder = Folder::new("lock");
    let journal = folder.open();
    assert!(Lock::try_take(&folder.0).unwrap().is_none());
    drop(journal);
    assert!(Lock::try_take(&folder.0).unwrap().is_some());
}

#[test]
fn what_does_not_fit_is_dropped_for_the_slow_peer_alone() {
    let folder = Folder::new("trim");
    let mut journal = folder.open();
    for _ in 0..100 {
        append(&mut journal, "jane", &[0; 100]);
    }
    journal.acknowledge_up_to("b", 99).unwrap();
    assert_eq!(journal.trim(20_000, 0).unwrap(), None);
    let (peer, trimmed) = journal.trim(5_000, 0).unwrap().unwrap();
    assert_eq!(
        (peer.as_str(), trimmed),
        ("c", Trimmed { changes: 55, missing: 55, users: vec!["jane".into()], up_to: 55 })
    );
    assert_eq!(journal.trim(5_000, 0).unwrap(), None);
    assert_eq!((journal.dropped("c").unwrap(), journal.dropped("b").unwrap()), (55, 0));
    assert_eq!(seqs(&journal, "b", None), [100]);

    let (peer, trimmed) = journal.trim(5_000, 60_001).unwrap().unwrap();
    assert_eq!(
        (peer.as_str(), trimmed),
        ("c", Trimmed { changes: 5, missing: 5, users: vec!["jane".into()], up_to: 60 }),
        "older than may be"
    );
}

/// Where the log is known up to would be kept without the change that stands there.
#[test]
fn nothing_that_was_written_with_what_failed_is_kept() {
    for is_rolled_back in [false, true] {
        let folder = Folder::new(if is_rolled_back { "fails-whole" } else { "fails" });
        let mut journal = folder.open();
        let log = KnownLog { user: "jane".into(), mailbox: vec![7; 16], end: 400, ..Default::default() };
        journal.set_log(&log).unwrap();
        append(&mut journal, "jane", b"one");
        journal.commit().unwrap();
        // As on a full disk: SQLite does either.
        let what = if is_rolled_back { "ROLLBACK" } else { "FAIL" };
        let fails = format!(
            "CREATE TEMP TRIGGER full BEFORE INSERT ON changes BEGIN SELECT RAISE({what}, 'disk is full'); END"
        );
        journal.run(|db| db.execute_batch(&fails)).unwrap();
        journal.set_log(&KnownLog { end: 500, ..log.clone() }).unwrap();
        journal.next_seq().unwrap();
        assert!(journal.append("jane", 1, b"two", &["b"]).is_err());
        assert!(journal.set_log(&KnownLog { end: 600, ..log.clone() }).is_err(), "nor what comes behind it");
        assert!(journal.commit().is_err());
        drop(journal);
        let journal = folder.open();
        assert_eq!(journal.log("jane", &[7; 16], "").unwrap().map(|log| log.end), Some(400));
        assert_eq!(journal.unacknowledged("b", None, 0, 9).unwrap().len(), 1);
    }
}

#[test]
fn logs_are_known_by_user_and_mailbox() {
    let folder = Folder::new("logs");
    let mut journal = folder.open();
    let path = vec!["a".to_owned(), "b/c".to_owned()];
    let log = KnownLog {
        user: "jane".into(),
        mailbox: vec![1; 16],
        index_id: 3,
        log_seq: 2,
        end: 500,
        tail: vec![1, 2],
        path: path.clone(),
        ..Default::default()
    };
    let healed = Some(((1, 40), (2, 500)));
    journal.set_log(&KnownLog { healed, ..log.clone() }).unwrap();
    journal.set_log(&KnownLog { end: 600, path: vec![], ..log.clone() }).unwrap();
    journal.set_log(&KnownLog { user: "joe".into(), path: vec![], ..log.clone() }).unwrap();
    let known = journal.log("jane", &[1; 16], "").unwrap().unwrap();
    journal.advance_log(&KnownLog { end: 550, ..log.clone() }).unwrap();
    assert_eq!(journal.log("jane", &[1; 16], "").unwrap().unwrap(), known, "it is not set back");
    assert_eq!((known.end, &known.path, known.healed), (600, &path, healed));
    journal.advance_log(&KnownLog { end: 600, path: vec!["renamed".into()], ..log.clone() }).unwrap();
    assert_eq!(journal.log("jane", &[1; 16], "").unwrap().unwrap().path, path, "nobody told of that yet");
    assert_eq!(journal.log("jane", &[2; 16], "").unwrap(), None);
    assert_eq!(journal.users("", 10).unwrap(), ["jane", "joe"]);
    let was_told = |journal: &Journal, user| journal.log(user, &[1; 16], "").unwrap().unwrap().was_told;
    journal.note_told("jane", &[1; 16]).unwrap();
    journal.advance_log(&KnownLog { end: 550, ..log.clone() }).unwrap();
    assert_eq!((was_told(&journal, "jane"), was_told(&journal, "joe")), (true, false));
    journal.advance_log(&KnownLog { end: 650, ..log.clone() }).unwrap();
    assert!(!was_told(&journal, "jane"), "all of it is known");
    journal.forget_mailbox("jane", &[1; 16]).unwrap();
    assert_eq!(journal.logs("jane").unwrap(), []);
    assert_eq!(journal.logs("joe").unwrap().len(), 1);
}

#[test]
fn names_remember_when_and_by_whom_they_were_given() {
    let folder = Folder::new("names");
    let mut journal = folder.open();
    let path = |name: &str| vec![name.to_owned()];
    let named = |clock, origin: &str| Named { clock, origin: origin.into() };
    journal.set_path("jane", &[1; 16], &path("Work"), Some(&named(5, "a"))).unwrap();
    journal.note_own("jane", &[1; 16], 7).unwrap();
    // One above was renamed.
    journal.set_path("jane", &[1; 16], &path("Play"), None).unwrap();
    let expected = NamedMailbox { mailbox: vec![1; 16], path: path("Play"), named: named(5, "a"), own_seq: 7 };
    assert_eq!(journal.named_mailbox("jane", &[1; 16]).unwrap(), Some(expected.clone()));
    assert_eq!(journal.named_mailboxes("jane").unwrap(), [expected]);
    assert_eq!(journal.named_mailbox("jane", &[]).unwrap(), None);

    journal.set_subscription("jane", &path("Work"), true, &named(6, "b")).unwrap();
    assert_eq!(journal.subscription("jane", &path("Work")).unwrap(), Some((true, named(6, "b"))));
    assert_eq!(journal.subscribed("jane").unwrap(), [path("Work")]);
}

#[test]
fn a_mailbox_that_became_another_twice_is_the_last_one() {
    let folder = Folder::new("aliases");
    let mut journal = folder.open();
    let elsewhere =
        Elsewhere { mailbox: vec![1; 16], uid: 3, guid: "three".into(), here: 7, moved: false, alone: false };
    journal.note_elsewhere("jane", "b", &elsewhere, 10).unwrap();
    journal.note_alias("jane", &[1; 16], &[2; 16], 10).unwrap();
    journal.note_alias("jane", &[2; 16], &[3; 16], 20).unwrap();
    let alias =
        |mailbox: u8, is_now: u8| Alias { user: "jane".into(), mailbox: vec![mailbox; 16], is_now: vec![is_now; 16] };
    assert_eq!(journal.aliases().unwrap(), [alias(1, 3), alias(2, 3)]);
    assert_eq!(journal.elsewhere("jane", "b", &[3; 16], (1, 9)).unwrap()[0].here, 7);
    // And back.
    journal.note_alias("jane", &[3; 16], &[1; 16], 30).unwrap();
    assert_eq!(journal.aliases().unwrap(), [alias(2, 1), alias(3, 1)]);
    journal.forget_aliases(25).unwrap();
    assert_eq!(journal.aliases().unwrap(), [alias(3, 1)]);
}

#[test]
fn a_process_that_was_killed_while_it_made_the_journal_leaves_no_half_one() {
    let folder = Folder::new("half");
    std::fs::write(folder.file().with_extension("new"), "half").unwrap();
    let (mut journal, start) = folder.try_open("boot").unwrap();
    assert!(start.is_new);
    append(&mut journal, "jane", b"frame");
    assert!(!folder.file().with_extension("new").exists());
}

#[test]
fn foreign_files_are_refused_and_left_as_they_are() {
    let folder = Folder::new("foreign");
    let refusal = |write: &dyn Fn(&Path)| {
        let _ = std::fs::remove_file(folder.file());
        let _ = std::fs::remove_file(folder.0.join("journal.sqlite-wal"));
        write(&folder.file());
        let before = std::fs::read(folder.file()).unwrap();
        let error = folder.try_open("boot").err().expect("it was refused").to_string();
        assert_eq!(std::fs::read(folder.file()).unwrap(), before, "{error}");
        error
    };
    let with_sql = |sql: &'static str| move |path: &Path| Connection::open(path).unwrap().execute_batch(sql).unwrap();
    assert!(refusal(&|path| std::fs::write(path, "no database").unwrap()).contains("damaged"));
    assert!(refusal(&with_sql("CREATE TABLE x (y)")).contains("no journal of Dovetail"));
    assert!(refusal(&with_sql("PRAGMA application_id = 0x4476746c; PRAGMA user_version = 99; CREATE TABLE x (y)"))
        .contains("its format is 99"));
    assert!(refusal(&|path| {
        drop(folder.open());
        Connection::open(path).unwrap().execute_batch("UPDATE meta SET value = 'z' WHERE key = 'server'").unwrap();
    })
    .contains("belongs to server 'z'"));
}

#[test]
fn a_change_whose_bytes_are_not_what_was_written_is_never_sent() {
    let folder = Folder::new("flipped");
    let mut journal = folder.open();
    append(&mut journal, "jane", b"frame");
    journal.run(|db| db.execute("UPDATE changes SET frame = x'00'", [])).unwrap();
    let error = journal.unacknowledged("b", None, 0, 100).unwrap_err().to_string();
    assert!(error.contains("change 1 is not what was written"), "{error}");
}

/// A journal of 40 changes, each with its place in a log, as its files were while it was open: database and write-ahead log.
fn open_files(folder: &Folder) -> (Vec<u8>, Vec<u8>) {
    let mut journal = folder.open();
    for n in 1..=40 {
        append(&mut journal, "jane", format!("frame {n}").repeat(20).as_bytes());
        let log =
            KnownLog { user: "jane".into(), mailbox: vec![1; 16], log_seq: 2, end: n * 100, ..Default::default() };
        journal.advance_log(&log).unwrap();
        journal.commit().unwrap();
    }
    let wal = folder.file().with_extension("sqlite-wal");
    (std::fs::read(folder.file()).unwrap(), std::fs::read(wal).unwrap())
}

/// Puts the files there, as a crash left them.
fn put(folder: &Folder, db: &[u8], wal: &[u8]) {
    std::fs::write(folder.file(), db).unwrap();
    std::fs::write(folder.file().with_extension("sqlite-wal"), wal).unwrap();
    let _ = std::fs::remove_file(folder.file().with_extension("sqlite-shm"));
}

/// What is there must be what was written, from the first change on, and no log known behind the last of them. None: refused.
fn consistent_prefix(folder: &Folder) -> Option<usize> {
    let (journal, _) = folder.try_open("boot").ok()?;
    let stored = journal.unacknowledged("b", None, 0, usize::MAX).ok()?;
    for (n, change) in (1u64..).zip(&stored) {
        assert_eq!((change.seq, &change.frame[..]), (n, format!("frame {n}").repeat(20).as_bytes()));
    }
    let end = journal.log("jane", &[1; 16], "").ok()?.map_or(0, |log| log.end);
    assert_eq!(end, 100 * stored.len() as u64, "a change and its place in the log come and go together");
    Some(stored.len())
}

#[test]
fn a_write_ahead_log_that_is_cut_anywhere_gives_a_prefix() {
    let folder = Folder::new("cut");
    let (db, wal) = open_files(&folder);
    let mut lengths = std::collections::BTreeSet::new();
    for length in (0..=wal.len()).step_by(1021) {
        put(&folder, &db, &wal[..length]);
        lengths.insert(consistent_prefix(&folder).expect("a torn end is no damage"));
    }
    put(&folder, &db, &wal);
    assert_eq!(consistent_prefix(&folder), Some(40));
    assert!(lengths.len() > 30, "{lengths:?}");
}

#[test]
fn flipped_bits_in_the_write_ahead_log_give_a_prefix() {
    let folder = Folder::new("flip-wal");
    let (db, wal) = open_files(&folder);
    for at in (40..wal.len()).step_by(4099) {
        let mut flipped = wal.clone();
        flipped[at] ^= 0x10;
        put(&folder, &db, &flipped);
        let length = consistent_prefix(&folder).expect("what is behind is not looked at");
        assert!(length < 40, "the flipped bit at {at} was not noticed");
    }
}

/// What a peer lacks, in the journal of [`open_files`] as it is now.
fn lacks(folder: &Folder) -> Result<Vec<Stored>, JournalError> {
    folder.try_open("boot")?.0.unacknowledged("b", None, 0, usize::MAX)
}

#[test]
fn a_database_with_flipped_bits_or_cut_off_is_refused_or_has_all_changes_as_they_were_written() {
    let folder = Folder::new("flip-db");
    open_files(&folder);
    let whole = lacks(&folder).unwrap();
    assert_eq!(whole.len(), 40);
    let db = std::fs::read(folder.file()).unwrap();
    let mut refused = 0;
    let mut check = |bytes: &[u8], what: &str| {
        put(&folder, bytes, &[]);
        match lacks(&folder) {
            Ok(found) => assert!(found == whole, "{what}"),
            Err(_) => refused += 1,
        }
    };
    for at in (0..db.len()).step_by(509) {
        let mut flipped = db.clone();
        flipped[at] ^= 0x10;
        check(&flipped, &format!("byte {at}"));
    }
    for length in (1..db.len()).step_by(4096) {
        check(&db[..length], &format!("cut off at {length}"));
    }
    assert!(refused > 10, "{refused}");
}

/// For whom it is, as that changes with each acknowledgement, has no checksum (docs/PROTOCOL.md).
#[test]
fn each_flipped_bit_of_a_change_is_noticed_but_for_whom_it_is() {
    let folder = Folder::new("flip-change");
    open_files(&folder);
    let whole = lacks(&folder).unwrap();
    let db = std::fs::read(folder.file()).unwrap();
    // Of the last one there is no older copy in a page's unused part. User, time (40,000), peers (b and c), checksum, frame.
    let last = &whole[39].frame;
    let frame = db.windows(last.len()).position(|bytes| bytes == last).unwrap();
    let user = db[..frame].windows(4).rposition(|bytes| bytes == b"jane").unwrap();
    let peers = user + 7;
    assert_eq!((&db[user + 4..peers], db[peers]), (&40_000u32.to_be_bytes()[1..], 3));
    for at in (user..frame).chain((frame..frame + last.len()).step_by(35)).filter(|at| *at != peers) {
        for bit in 0..8 {
            let mut flipped = db.clone();
            flipped[at] ^= 1 << bit;
            put(&folder, &flipped, &[]);
            assert!(lacks(&folder).is_err(), "bit {bit} of byte {at}");
        }
    }
}

#[test]
fn what_is_elsewhere_is_known_by_its_uids_until_it_is_old() {
    let folder = Folder::new("elsewhere");
    let mut journal = folder.open();
    let one = |uid: u32, guid: &str| Elsewhere {
        mailbox: vec![1; 16],
        uid,
        guid: guid.into(),
        here: 100,
        moved: false,
        alone: false,
    };
    for (peer, entry, moved, at_us) in [
        ("b", one(5, "moved"), true, 10),
        ("b", one(5, "theirs"), false, 20),
        ("b", one(5, "moved again"), true, 30),
        ("b", one(9, "nine"), false, 40),
        ("c", one(6, "of c"), false, 40),
    ] {
        journal.note_elsewhere("jane", peer, &Elsewhere { moved, ..entry }, at_us).unwrap();
    }
    let known = |journal: &mut Journal, peer: &str, first, last| -> Vec<(u32, String)> {
        let found = journal.elsewhere("jane", peer, &[1; 16], (first, last)).unwrap();
        found.into_iter().map(|one| (one.uid, one.guid)).collect()
    };
    assert_eq!(known(&mut journal, "b", 1, 8), [(5, "theirs".to_owned())]);
    assert_eq!(known(&mut journal, "b", 5, u32::MAX).len(), 2);
    journal.forget_elsewhere(40).unwrap();
    assert_eq!(known(&mut journal, "b", 1, 9), [(9, "nine".to_owned())]);
    assert_eq!(journal.users_elsewhere().unwrap(), ["jane"]);
    journal.forget_elsewhere(41).unwrap();
    assert_eq!(journal.users_elsewhere().unwrap(), Vec::<String>::new());
}

#[test]
fn flags_are_kept_until_all_peers_have_heard_of_them() {
    let folder = Folder::new("flags");
    let mut journal = folder.open();
    let change = |clock: u64, origin: &str| FlagChange { clock, origin: origin.into(), change: vec![7; 100] };
    for (clock, origin) in [(10, "a"), (20, "b"), (20, "a"), (30, "a")] {
        journal.note_flags("jane", &change(clock, origin), clock).unwrap();
    }
    journal.note_flags("joe", &change(15, "a"), 15).unwrap();
    let from = |journal: &Journal, clock| journal.flags_from("jane", clock).unwrap();
    assert_eq!(from(&journal, 20), [change(20, "a"), change(20, "b"), change(30, "a")]);
    assert_eq!(journal.users_with_flags().unwrap(), [("jane".to_owned(), 30), ("joe".to_owned(), 15)]);
    journal.forget_flags(15).unwrap();
    assert_eq!((from(&journal, 0).len(), journal.users_with_flags().unwrap().len()), (3, 1));
    journal.trim_flags(300, 0).unwrap();
    assert_eq!(from(&journal, 0).len(), 3);
    journal.trim_flags(299, 0).unwrap();
    assert_eq!(from(&journal, 0), [change(30, "a")]);
    journal.trim_flags(299, 31).unwrap();
    assert_eq!(from(&journal, 0), []);
    journal.note_clock(77).unwrap();
    journal.commit().unwrap();
    drop(journal);
    assert_eq!(folder.open().clock().unwrap(), 77);
}

#[test]
fn of_each_server_the_last_change_of_a_user_is_known() {
    let folder = Folder::new("seen");
    let mut journal = folder.open();
    let seen = |origin: &str, epoch, seq| Seen { origin: origin.into(), epoch, seq };
    for (user, origin, epoch, seq) in
        [("jane", "b", 5, 7), ("jane", "b", 5, 6), ("jane", "c", 4, 9), ("joe", "b", 5, 8)]
    {
        journal.set_seen(user, &seen(origin, epoch, seq)).unwrap();
    }
    assert_eq!(journal.seen("jane", 9).unwrap(), [seen("b", 5, 7), seen("c", 4, 9)]);
    assert!(journal.has_seen("jane", "b", 5, 7).unwrap() && !journal.has_seen("jane", "b", 5, 8).unwrap());
    journal.set_seen("jane", &seen("b", 6, 1)).unwrap();
    assert!(!journal.has_seen("jane", "b", 5, 7).unwrap(), "what an older epoch had is not known any more");
    assert_eq!(journal.seen("jane", 1).unwrap(), [seen("b", 6, 1)]);
}

#[test]
fn of_what_is_set_aside_some_changes_are_kept() {
    let folder = Folder::new("failed");
    let mut journal = folder.open();
    let failed = |seq: u64| {
        let (error, change) = (format!("why, after {}", seq / 10), Some(vec![7; 100]));
        Failed { user: "jane".into(), seq, error, change, ..Default::default() }
    };
    (1..=1_010).for_each(|seq| assert!(journal.fail(&failed(seq), None).unwrap()));
    let sql = "SELECT count(*) FROM failed WHERE frame = ?";
    let kept: i64 = journal.run(|db| db.query_row(sql, [vec![7u8; 100]], |row| row.get(0))).unwrap();
    assert_eq!((kept, journal.failed_count().unwrap()), (1_000, 1_010));
    assert_eq!(journal.clear_failed(Some("joe")).unwrap(), 0);
    assert_eq!(journal.clear_failed(Some("jane")).unwrap(), 1_010);
    assert_eq!(journal.failed_count().unwrap(), 0);
}

/// Each comparison that does not help has it told once more.
#[test]
fn what_is_set_aside_again_and_again_is_listed_ten_times_and_compared_for_a_while() {
    let folder = Folder::new("same");
    let mut journal = folder.open();
    let failed = |user: &str, mailbox, seq| {
        let (user, error) = (user.to_owned(), "too long".to_owned());
        Failed { user, mailbox: vec![mailbox], seq, at_us: seq, error, ..Default::default() }
    };
    (1..=30).for_each(|seq| assert!(journal.fail(&failed("jane", 1, seq), None).is_ok()));
    assert_eq!(journal.failed_count().unwrap(), 10);
    journal.fail(&failed("jane", 2, 31), None).unwrap();
    journal.fail(&failed("joe", 1, 32), None).unwrap();
    (1..=2).for_each(|mailbox| assert!(journal.fail(&failed("jim", mailbox, 0), None).unwrap()));
    assert_eq!(journal.failed_count().unwrap(), 14);
    let users = |before_us, since_us| journal.users_to_compare(before_us, since_us, &[], 9).unwrap();
    assert_eq!(users(40, 0), ["jim", "jane", "joe"]);
    assert_eq!(users(31, 0), ["jim", "jane"], "joe's is too new");
    assert_eq!(users(40, 31), ["jim", "joe"], "jane's are too old, and need a person");
    assert!(journal.is_to_compare("jim", 40).unwrap() && journal.is_to_compare("joe", 31).unwrap());
    assert!(!journal.is_to_compare("jane", 31).unwrap());
}

#[test]
fn a_peer_that_was_removed_is_none_until_it_was_not_configured_for_once() {
    let folder = Folder::new("removed");
    let mut journal = folder.open();
    append(&mut journal, "jane", b"one");
    let failed = |peer: &str, seq| Failed { peer: peer.into(), user: "jane".into(), seq, ..Default::default() };
    for failed in [failed("b", 0), failed("c", 0), failed("c", 7)] {
        assert!(journal.fail(&failed, None).unwrap());
    }
    journal.remove_peer("c").unwrap();
    journal.commit().unwrap();
    drop(journal);

    let mut journal = folder.open();
    assert_eq!(journal.removed_peers().unwrap(), ["c"]);
    let left: Vec<(String, u64)> = journal.failed(9).unwrap().into_iter().map(|f| (f.peer, f.seq)).collect();
    assert_eq!(left.len(), 2, "what was to be compared with it is not any more: {left:?}");
    assert_eq!((seqs(&journal, "b", None), seqs(&journal, "c", None)), (vec![1], vec![]));
    journal.acknowledge("b", 1).unwrap();
    assert_eq!(journal.bytes(), 0, "nothing is kept for it");
    drop(journal);

    let (journal, _) = folder.try_open_with(&["b"], "boot").unwrap();
    assert!(journal.removed_peers().unwrap().is_empty());
    drop(journal);
    let mut journal = folder.open();
    append(&mut journal, "jane", b"two");
    assert_eq!(seqs(&journal, "c", None), [2]);
}

#[test]
fn with_a_peer_that_was_none_before_all_users_who_are_known_are_to_be_compared() {
    let folder = Folder::new("new-peer");
    let (mut journal, _) = folder.try_open_with(&["b"], "boot").unwrap();
    for (user, path) in [("jane", "INBOX"), ("jane", "Work"), ("joe", "INBOX")] {
        let known = KnownLog { user: user.into(), mailbox: path.into(), log_seq: 1, ..Default::default() };
        journal.advance_log(&known).unwrap();
    }
    assert_eq!(journal.to_compare(None, None).unwrap(), 0, "nobody is new to a new journal");
    journal.commit().unwrap();
    drop(journal);
    for _ in 0..2 {
        let listed = folder.open().failed(9).unwrap();
        let listed: Vec<(&str, &str, u64)> = listed.iter().map(|f| (f.peer.as_str(), f.user.as_str(), f.seq)).collect();
        assert_eq!(listed, [("c", "jane", 0), ("c", "joe", 0)], "once");
    }
}

#[test]
fn after_a_power_failure_all_users_who_are_known_are_to_be_compared_with_all_peers() {
    let folder = Folder::new("power-compare");
    let mut journal = folder.open();
    journal.set_seen("jane", &Seen { origin: "b".into(), epoch: 5, seq: 7 }).unwrap();
    journal.commit().unwrap();
    drop(journal);
    let listed = |journal: &Journal| -> Vec<(String, String, u64)> {
        journal.failed(9).unwrap().into_iter().map(|f| (f.peer, f.user, f.seq)).collect()
    };
    let journal = folder.open();
    assert_eq!(listed(&journal), [], "a relay that was killed has lost nothing");
    journal.close().unwrap();
    let (journal, start) = folder.try_open("after an orderly end").unwrap();
    assert!(start.is_after_boot);
    assert_eq!(listed(&journal), []);
    drop(journal);
    let (journal, _) = folder.try_open("after a power failure").unwrap();
    let both = ["b", "c"].map(|peer| (peer.to_owned(), "jane".to_owned(), 0));
    assert_eq!(listed(&journal), both);
}

#[test]
fn what_a_peer_lacks_of_a_user_up_to_a_number_is_known() {
    let folder = Folder::new("lacks");
    let mut journal = folder.open();
    for user in ["jane", "joe", "jane", "joe", "jane"] {
        append(&mut journal, user, b"change");
    }
    journal.acknowledge("b", 1).unwrap();
    let first = |journal: &Journal, user, from, up_to| journal.first_pending_of("b", user, from, up_to).unwrap();
    assert_eq!(first(&journal, Some("jane"), 0, 5), Some(3));
    assert_eq!(first(&journal, Some("jane"), 4, 4), None);
    assert_eq!(first(&journal, None, 0, 5), Some(2));
    let count = |user, up_to| journal.count_pending("b", user, up_to).unwrap();
    assert_eq!((count(Some("jane"), 4), count(Some("jane"), 5), count(None, 4)), (1, 2, 3));
}

#[test]
fn what_is_listed_is_over_when_its_peer_was_compared_and_the_rest_is_left_to_the_others() {
    let folder = Folder::new("compared");
    let mut journal = folder.open();
    let failed =
        |peer: &str, seq, at_us| Failed { peer: peer.into(), user: "jane".into(), seq, at_us, ..Default::default() };
    let list = |journal: &mut Journal| {
        journal.clear_failed(None).unwrap();
        for (peer, seq) in [("", 0), ("b", 0), ("b", 7), ("c", 8), ("x", 0), ("x", 9)] {
            assert!(journal.fail(&failed(peer, seq, 10), None).unwrap());
        }
    };
    let listed = |journal: &Journal| {
        let mut listed: Vec<_> = journal.failed(99).unwrap().into_iter().map(|f| (f.peer, f.seq, f.at_us)).collect();
        listed.sort();
        listed
    };
    let is_left = |journal: &Journal, expected: &[(&str, u64, u64)]| {
        let expected: Vec<_> = expected.iter().map(|(peer, seq, at_us)| ((*peer).to_owned(), *seq, *at_us)).collect();
        assert_eq!(listed(journal), expected);
    };
    list(&mut journal);
    journal.was_compared("joe", &["b"], &[], 10).unwrap();
    journal.was_compared("jane", &["b", "c"], &[], 9).unwrap();
    assert_eq!(listed(&journal).len(), 6);
    journal.was_compared("jane", &["b"], &["c"], 10).unwrap();
    is_left(&journal, &[("c", 0, 10), ("c", 8, 10), ("x", 9, 10)]);
    journal.was_compared("jane", &["b", "c"], &[], 10).unwrap();
    is_left(&journal, &[]);
    // Nobody was there: it is known with whom.
    list(&mut journal);
    journal.was_compared("jane", &[], &["b", "c"], 10).unwrap();
    is_left(&journal, &[("b", 0, 10), ("b", 7, 10), ("c", 0, 10), ("c", 8, 10), ("x", 9, 10)]);
    // It happened once more meanwhile.
    assert!(!journal.fail(&failed("b", 0, 11), None).unwrap());
    assert!(
        !journal.fail(&failed("c", 0, 11), Some(20)).unwrap() && journal.fail(&failed("", 0, 11), Some(20)).unwrap()
    );
    journal.was_compared("jane", &["b", "c"], &[], 20).unwrap();
    is_left(&journal, &[("", 0, 21), ("c", 0, 21)]);
}

#[test]
fn who_is_to_be_compared_with_peers_that_are_away_comes_later() {
    let folder = Folder::new("away");
    let mut journal = folder.open();
    for (user, peer, at_us) in [("jane", "b", 1), ("joe", "c", 2), ("jim", "", 3), ("jim", "c", 1), ("ann", "x", 4)] {
        let failed = Failed { peer: peer.into(), user: user.into(), at_us, ..Default::default() };
        assert!(journal.fail(&failed, None).unwrap());
    }
    let users = |journal: &Journal, away: &[&str]| journal.users_to_compare(4, 4, away, 9).unwrap();
    assert_eq!(users(&journal, &[]).len(), 4);
    assert_eq!(users(&journal, &["c"]), ["jane", "jim", "ann"]);
    assert_eq!(users(&journal, &["b"]), ["jim", "joe", "ann"]);
    let count = |journal: &Journal, user, peer| journal.to_compare(user, peer).unwrap();
    assert_eq!((count(&journal, None, None), count(&journal, Some("jim"), None)), (5, 2));
    assert_eq!((count(&journal, None, Some("c")), count(&journal, Some("jane"), Some("c"))), (2, 0));
    journal.compare_without("jim", "c").unwrap();
    assert_eq!((count(&journal, Some("jim"), None), count(&journal, Some("jim"), Some(""))), (1, 1));
}
