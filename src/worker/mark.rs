//! What a mailbox's own index says of the changes that were applied to it: for each origin, up to which number.
//!
//! It is written in the transaction that applies a change, so that one is never there without the other, whatever is
//! killed: a change that is sent again is recognized, even if the user has undone it meanwhile. And in the mailbox's log
//! it tells our own commits from others. A rebuilt index has lost it; then applying twice does what it can.
//!
//! Pure: bytes in, bytes out. An entry is written whole, and alone.
#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap};

use super::storage::MARK_BYTES;
use crate::change::WAS_MAX;
use crate::indexlog::{fold, Append, Commit, Commits, Delta, Header, HeaderUpdate, Modify, UidRange, What};
use crate::wire::proto::SeqOf;

/// Begins the header and each entry.
const MAGIC: [u8; 4] = *b"Dvtl";
/// Magic, hash of the origin's name, epoch, seq; the header has magic and flags.
const ENTRY_BYTES: usize = 24;
const HEADER_BYTES: usize = 8;
/// Behind the entries is one for a message that is being moved to another UID.
const ENTRIES: usize = (MARK_BYTES - HEADER_BYTES) / ENTRY_BYTES - 1;
const MOVE_AT: usize = HEADER_BYTES + ENTRIES * ENTRY_BYTES;
/// Begins it. Magic, the UID that it had, the one that it gets.
const MOVE_MAGIC: [u8; 4] = *b"Dvmv";
/// A message here has another UID than where it came from: UIDs alone do not name messages.
const DIVERGED: u32 = 1;
/// Says something of the commit that writes it, and nothing afterwards: it expunges what a client expunged on another server.
const EXPUNGES: u32 = 2;

/// Bytes to write, and where.
pub type Write = (usize, Vec<u8>);

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    diverged: bool,
    moving: Option<(u32, u32)>,
    entries: [Option<Entry>; ENTRIES],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    origin: u32,
    epoch: u64,
    seq: u64,
}

impl Marks {
    pub fn parse(bytes: &[u8; MARK_BYTES]) -> Marks {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let mut marks = Marks { diverged: bytes[..4] == MAGIC && word(4) & DIVERGED != 0, ..Default::default() };
        if bytes[MOVE_AT..MOVE_AT + 4] == MOVE_MAGIC && word(MOVE_AT + 4) != 0 {
            marks.moving = Some((word(MOVE_AT + 4), word(MOVE_AT + 8)));
        }
        for (n, entry) in marks.entries.iter_mut().enumerate() {
            let at = HEADER_BYTES + n * ENTRY_BYTES;
            if bytes[at..at + 4] == MAGIC {
                *entry = Some(Entry { origin: word(at + 4), epoch: long(at + 8), seq: long(at + 16) });
            }
        }
        marks
    }

    /// Whether bytes that a commit wrote to our header are ours.
    pub fn is_ours(written: &[u8]) -> bool {
        written.starts_with(&MAGIC) || written.starts_with(&MOVE_MAGIC)
    }

    pub fn has_diverged(&self) -> bool {
        self.diverged
    }

    /// The message that was at the first UID is also at the second one, and is to go from the first.
    pub fn moving(&self) -> Option<(u32, u32)> {
        self.moving
    }

    /// Written with the message's second copy; and None with the expunge of the first.
    pub fn set_moving(&mut self, moving: Option<(u32, u32)>) -> Write {
        self.moving = moving;
        let (from, to) = moving.unwrap_or_default();
        (MOVE_AT, [MOVE_MAGIC, from.to_le_bytes(), to.to_le_bytes()].concat())
    }

    /// Whether this change was applied to the mailbox.
    pub fn has(&self, change: &SeqOf) -> bool {
        let origin = hash(&change.origin);
        self.entries.iter().flatten().any(|e| e.origin == origin && e.epoch == change.epoch && e.seq >= change.seq)
    }

    /// The change is applied.
    pub fn set(&mut self, change: &SeqOf) -> Write {
        let new = Entry { origin: hash(&change.origin), epoch: change.epoch, seq: change.seq };
        let of_origin = self.entries.iter().position(|e| e.is_some_and(|e| e.origin == new.origin));
        let free = || self.entries.iter().position(Option::is_none);
        let oldest = || (0..ENTRIES).min_by_key(|n| self.entries[*n].map_or(0, |e| e.epoch)).unwrap_or(0);
        let n = of_origin.or_else(free).unwrap_or_else(oldest);
        self.entries[n] = Some(new);
        let mut bytes = MAGIC.to_vec();
        bytes.extend(new.origin.to_le_bytes());
        bytes.extend(new.epoch.to_le_bytes());
        bytes.extend(new.seq.to_le_bytes());
        (HEADER_BYTES + n * ENTRY_BYTES, bytes)
    }

    /// The UIDs that our commits gave since the one that says which change of this origin was applied last: among them is what a
    /// worker that was killed had saved of the next one. None of them if that place is not in the logs any more. `by_any`: or
    /// other commits, which found what it had saved. With each UID, whether it was ours that gave it.
    pub fn saved_since(&self, logs: &[Vec<u8>], origin: &str, by_any: bool) -> Vec<(u32, bool)> {
        let commits = logs.iter().flat_map(|log| commits(log));
        self.saved_in(commits.filter(|commit| by_any || is_ours(commit)), hash(origin))
    }

    fn saved_in(&self, commits: impl Iterator<Item = Commit>, origin: u32) -> Vec<(u32, bool)> {
        let mut is_behind = !self.entries.iter().flatten().any(|entry| entry.origin == origin);
        let mut saved = Vec::new();
        for commit in commits {
            if updates_of(&commit).any(|update| names(update, origin)) {
                // Perhaps of that change, perhaps the first of the next one.
                saved.clear();
                is_behind = true;
            }
            // What was moved, its own commit had saved; what is marked as another server's is of none of this one.
            let is_of_another = updates_of(&commit).any(|update| names_other(update, origin));
            if is_behind && !is_of_another && wanted_moves_of(&commit).next().is_none() {
                saved.extend(appends_of(&commit).map(|append| (append.uid, is_ours(&commit))));
            }
        }
        saved
    }

    /// A message got another UID.
    pub fn diverge(&mut self) -> Write {
        self.diverged = true;
        self.ours()
    }

    /// Says nothing but that a commit is ours.
    pub fn ours(&self) -> Write {
        self.header(0)
    }

    /// And that a client wanted its expunges.
    pub fn expunges(&self) -> Write {
        self.header(EXPUNGES)
    }

    fn header(&self, more: u32) -> Write {
        let flags = if self.diverged { DIVERGED } else { 0 } | more;
        (0, [MAGIC, flags.to_le_bytes()].concat())
    }
}

/// Which messages a log of the mailbox's index says that were moved: from which UID to which, in that order. What cannot be
/// read is left out.
pub fn moves(log: &[u8]) -> Vec<(u32, u32)> {
    commits(log).iter().flat_map(moves_of).collect()
}

/// The same, with where the commits of the copies begin.
pub fn moves_at(log: &[u8]) -> Vec<(Place, u32, u32)> {
    let file_seq = Header::parse(log).map_or(0, |header| header.file_seq);
    let of_commit =
        |commit: &Commit| moves_of(commit).map(|(from, to)| ((file_seq, commit.begin), from, to)).collect::<Vec<_>>();
    commits(log).iter().flat_map(of_commit).collect()
}

/// The UID to which the logs say that a message was moved from this one; the same if it was not.
pub fn follow(logs: &[Vec<u8>], uid: u32) -> u32 {
    logs.iter().flat_map(|log| moves(log)).fold(uid, |at, (from, to)| if from == at { to } else { at })
}

/// From which UIDs the logs say that messages were moved, by those to which they were.
pub struct Moved(HashMap<u32, u32>);

impl Moved {
    pub fn of(logs: &[Vec<u8>]) -> Moved {
        Moved(logs.iter().flat_map(|log| moves(log)).map(|(from, to)| (to, from)).collect())
    }

    /// The UIDs that the message had before this one, the last first; not more than may be told.
    pub fn before(&self, uid: u32) -> Vec<u32> {
        // A UID is given once, but a log is read as it is.
        let is_lower = |from: &u32, to: u32| *from < to;
        std::iter::successors(Some(uid), |to| self.0.get(to).copied().filter(|from| is_lower(from, *to)))
            .skip(1)
            .take(WAS_MAX)
            .collect()
    }
}

/// Whether the logs say that somebody else saved the message with this UID.
pub fn is_saved_by_others(logs: &[Vec<u8>], uid: u32) -> bool {
    let all = logs.iter().flat_map(|log| commits(log)).filter(|commit| !is_ours(commit));
    all.into_iter().any(|commit| appends_of(&commit).any(|append| append.uid == uid))
}

/// The UIDs of all messages that the logs say we saved, or moved there.
pub fn saved_by_us(logs: &[Vec<u8>]) -> Vec<u32> {
    let ours = logs.iter().flat_map(|log| commits(log)).filter(is_ours);
    ours.flat_map(|commit| appends_of(&commit).map(|append| append.uid).collect::<Vec<_>>()).collect()
}

/// Whether the logs say that we saved the message with this UID, for a peer. (Not that we moved it there.)
pub fn is_saved_by_us(logs: &[Vec<u8>], uid: u32) -> bool {
    let all = logs.iter().flat_map(|log| commits(log)).filter(is_ours);
    let is_it = |commit: &Commit| appends_of(commit).any(|append| append.uid == uid);
    all.into_iter().any(|commit| is_it(&commit) && moves_of(&commit).all(|(_, to)| to != uid))
}

/// Whether the logs say that we expunged the message with this UID because a client of another server had done so.
pub fn is_expunged_for_client(logs: &[Vec<u8>], uid: u32) -> bool {
    logs.iter().flat_map(|log| commits(log)).any(|commit| expunges_for_client(&commit, uid))
}

fn expunges_for_client(commit: &Commit, uid: u32) -> bool {
    let says_so = |update: &HeaderUpdate| match update.data.get(..HEADER_BYTES) {
        Some(header) if update.offset == 0 && header.starts_with(&MAGIC) => u32::from(header[4]) & EXPUNGES != 0,
        _ => false,
    };
    let is_it =
        |what: &What| matches!(what, What::ExpungeGuid(expunges) if expunges.iter().any(|gone| gone.uid == uid));
    updates_of(commit).any(says_so) && commit.records.iter().any(|record| is_it(&record.what))
}

/// A place in a log: the file's number, and the offset in it.
pub type Place = (u32, u64);

/// Where the logs end, the oldest of which is the first.
pub fn end(logs: &[Vec<u8>]) -> Place {
    let log = logs.last().map_or(&[][..], Vec::as_slice);
    (Header::parse(log).map_or(0, |header| header.file_seq), log.len() as u64)
}

/// Of the index to which the logs belong; 0: it has none.
pub fn index_id(logs: &[Vec<u8>]) -> u32 {
    logs.last().and_then(|log| Header::parse(log).ok()).map_or(0, |header| header.indexid)
}

/// Where the log says that the message was moved, the last time, and the UID that its copy got.
pub fn move_of(logs: &[Vec<u8>], moved: (u32, u32)) -> Option<(Place, u32)> {
    let of_log = |log: &Vec<u8>| {
        let file_seq = Header::parse(log).map_or(0, |header| header.file_seq);
        commits(log).iter().rev().find_map(|commit| Some(((file_seq, commit.begin), moved_in(commit, moved)?)))
    };
    logs.iter().rev().find_map(of_log)
}

/// The UID that the copy got, if the message was moved there: the one that was wanted, or that is known.
fn moved_in(commit: &Commit, (from, to): (u32, u32)) -> Option<u32> {
    let copy = copy_of(commit)?;
    wanted_moves_of(commit).any(|wanted| wanted.0 == from && [wanted.1, copy].contains(&to)).then_some(copy)
}

/// What others did to the message with this UID behind the place.
pub fn done_since(logs: &[Vec<u8>], place: Place, uid: u32) -> Vec<Delta> {
    let behind = |log: &Vec<u8>| {
        let file_seq = Header::parse(log).map_or(0, |header| header.file_seq);
        commits(log).into_iter().filter(move |commit| (file_seq, commit.begin) >= place)
    };
    let is_it = |first: u32, last: u32| (first..=last).contains(&uid);
    let mut deltas = fold(logs.iter().flat_map(behind), is_ours);
    deltas.retain(|delta| match delta {
        Delta::Flags { first_uid, last_uid, .. } | Delta::Expunge { first_uid, last_uid, .. } => {
            is_it(*first_uid, *last_uid)
        }
        Delta::Keywords { ranges, .. } => ranges.iter().any(|range| is_it(range.first, range.last)),
        _ => false,
    });
    deltas
}

/// What a client did to a message by a UID from which that had gone before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stale {
    Flags { add: u8, remove: u8 },
    Keyword { add: bool, name: String },
    Expunge { guid_128: [u8; 16] },
}

impl Stale {
    fn touches(&self, other: &Stale) -> bool {
        match (self, other) {
            (Stale::Flags { add, remove }, Stale::Flags { add: other_add, remove: other_remove }) => {
                (add | remove) & (other_add | other_remove) != 0
            }
            (Stale::Keyword { name, .. }, Stale::Keyword { name: other, .. }) => name.eq_ignore_ascii_case(other),
            _ => false,
        }
    }
}

/// What clients did by UIDs from which messages had been moved before: their sessions had not heard of it. With where these messages
/// are now. What somebody has touched there since is left out. Only what stands from `begin` to `end`; what was done before a
/// message was gone from its old UID, the worker that moved it has done where it is.
pub fn stale_in(logs: &[Vec<u8>], begin: Place, end: Place) -> Vec<(u32, Stale)> {
    let all = logs.iter().flat_map(|log| {
        let file_seq = Header::parse(log).map_or(0, |header| header.file_seq);
        commits(log).into_iter().map(move |commit| ((file_seq, commit.begin), commit))
    });
    stale_of(all, begin, end)
}

fn stale_of(commits: impl Iterator<Item = (Place, Commit)>, begin: Place, end: Place) -> Vec<(u32, Stale)> {
    let follow =
        |moved: &[(u32, u32)], uid| moved.iter().fold(uid, |at, (from, to)| if *from == at { *to } else { at });
    let (mut moved, mut gone) = (Vec::new(), BTreeSet::new());
    let mut found: Vec<(u32, Stale)> = Vec::new();
    for (place, commit) in commits {
        if is_ours(&commit) {
            moved.extend(moves_of(&commit));
        } else if begin <= place && place < end {
            for (UidRange { first, last }, done) in done_by(&commit) {
                let is_there = |uid: u32| (first..=last).contains(&follow(&moved, uid));
                found.retain(|(uid, earlier)| !is_there(*uid) || !done.touches(earlier));
                found.extend(gone.range(first..=last).map(|uid| (*uid, done.clone())));
            }
        }
        let is_moved = |uid: &u32| moved.iter().any(|(from, _)| from == uid);
        gone.extend(gone_by(&commit).filter(is_moved));
    }
    found.into_iter().map(|(uid, done)| (follow(&moved, uid), done)).collect()
}

/// What a commit does to messages, or asks for.
fn done_by(commit: &Commit) -> Vec<(UidRange, Stale)> {
    let one = |uid| UidRange { first: uid, last: uid };
    let mut done = Vec::new();
    for record in &commit.records {
        match &record.what {
            What::FlagUpdate(updates) => done.extend(updates.iter().map(|update| {
                let range = UidRange { first: update.first_uid, last: update.last_uid };
                (range, Stale::Flags { add: update.add, remove: update.remove })
            })),
            What::KeywordUpdate { modify, name, ranges } => {
                let keyword = Stale::Keyword { add: *modify != Modify::Remove, name: name.clone() };
                done.extend(ranges.iter().map(|range| (*range, keyword.clone())));
            }
            What::ExpungeGuid(expunges) if !record.external => {
                done.extend(expunges.iter().map(|gone| (one(gone.uid), Stale::Expunge { guid_128: gone.guid_128 })))
            }
            _ => {}
        }
    }
    done.retain(|(range, _)| range.first <= range.last);
    done
}

/// UIDs of messages that a commit took.
fn gone_by(commit: &Commit) -> impl Iterator<Item = u32> + '_ {
    let taken = commit.records.iter().filter(|record| record.external).filter_map(|record| match &record.what {
        What::ExpungeGuid(expunges) => Some(expunges),
        _ => None,
    });
    taken.flatten().map(|expunge| expunge.uid)
}

/// Whether a commit is ours: those name what they applied.
pub fn is_ours(commit: &Commit) -> bool {
    updates_of(commit).any(|update| Marks::is_ours(&update.data))
}

fn commits(log: &[u8]) -> Vec<Commit> {
    let Ok(header) = Header::parse(log) else { return Vec::new() };
    let first = usize::from(header.hdr_size);
    Commits::new(&header, log.get(first..).unwrap_or_default(), first as u64).map_while(Result::ok).collect()
}

/// Where the copy got another UID than it was to get, because some process had used that up, it is where the commit put it.
fn moves_of(commit: &Commit) -> impl Iterator<Item = (u32, u32)> + '_ {
    let copy = copy_of(commit);
    wanted_moves_of(commit).map(move |(from, to)| (from, copy.unwrap_or(to)))
}

/// The UID of a message that the commit brought.
fn copy_of(commit: &Commit) -> Option<u32> {
    appends_of(commit).last().map(|append| append.uid)
}

fn wanted_moves_of(commit: &Commit) -> impl Iterator<Item = (u32, u32)> + '_ {
    updates_of(commit).filter_map(move_in)
}

fn appends_of(commit: &Commit) -> impl Iterator<Item = &Append> {
    let appends = commit.records.iter().filter_map(|record| match &record.what {
        What::Append(appends) => Some(appends),
        _ => None,
    });
    appends.flatten()
}

/// Of headers of extensions, ours among them.
fn updates_of(commit: &Commit) -> impl Iterator<Item = &HeaderUpdate> {
    let updates = commit.records.iter().filter_map(|record| match &record.what {
        What::ExtHeaderUpdate(updates) => Some(updates),
        _ => None,
    });
    updates.flatten()
}

/// Whether it writes an entry of this origin.
fn names(update: &HeaderUpdate, origin: u32) -> bool {
    origins_in(update).any(|of| of == origin.to_le_bytes())
}

fn names_other(update: &HeaderUpdate, origin: u32) -> bool {
    origins_in(update).any(|of| of != origin.to_le_bytes())
}

/// Of the entries that it writes. Those that are beside each other may be written together.
fn origins_in(update: &HeaderUpdate) -> impl Iterator<Item = &[u8]> {
    let entries = (0..ENTRIES)
        .filter_map(|n| update.data.get((HEADER_BYTES + n * ENTRY_BYTES).checked_sub(update.offset as usize)?..));
    entries.filter(|entry| entry.starts_with(&MAGIC)).filter_map(|entry| entry.get(4..8))
}

fn move_in(update: &HeaderUpdate) -> Option<(u32, u32)> {
    let data = update.data.get(MOVE_AT.checked_sub(update.offset as usize)?..)?;
    let word = |at: usize| Some(u32::from_le_bytes(data.get(at..at + 4)?.try_into().ok()?));
    let (from, to) = (word(4)?, word(8)?);
    (data.starts_with(&MOVE_MAGIC) && from != 0).then_some((from, to))
}

fn hash(origin: &str) -> u32 {
    crc32fast::hash(origin.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(origin: &str, epoch: u64, seq: u64) -> SeqOf {
        SeqOf { origin: origin.into(), epoch, seq }
    }

    fn write(bytes: &mut [u8; MARK_BYTES], (at, written): Write) {
        assert!(Marks::is_ours(&written));
        bytes[at..at + written.len()].copy_from_slice(&written);
    }

    #[test]
    fn what_was_written_is_read() {
        let mut bytes = [0; MARK_BYTES];
        assert_eq!(Marks::parse(&bytes), Marks::default());
        let mut marks = Marks::default();
        write(&mut bytes, marks.set(&change("a", 9, 5)));
        write(&mut bytes, marks.set(&change("b", 1 << 40, 7)));
        write(&mut bytes, marks.set(&change("a", 9, 6)));
        assert!(!marks.has_diverged());
        write(&mut bytes, marks.diverge());
        write(&mut bytes, marks.set_moving(Some((3, 9))));
        assert_eq!(Marks::parse(&bytes), marks);
        assert_eq!(marks.moving(), Some((3, 9)));
        write(&mut bytes, marks.set_moving(None));
        assert_eq!(Marks::parse(&bytes), marks);
        assert!(marks.has_diverged());
        for (origin, epoch, seq, has) in [("a", 9, 6, true), ("a", 9, 7, false), ("a", 8, 1, false), ("c", 9, 1, false)]
        {
            assert_eq!(marks.has(&change(origin, epoch, seq)), has, "{origin} {epoch} {seq}");
        }
        assert!(marks.has(&change("b", 1 << 40, 7)));
    }

    #[test]
    fn a_message_moved_to_where_its_copy_is() {
        use crate::indexlog::Record;
        let (offset, data) = Marks::default().set_moving(Some((5, 7)));
        let mark = What::ExtHeaderUpdate(vec![HeaderUpdate { offset: offset as u32, data }]);
        let copy = What::Append(vec![Append { uid: 9, flags: 0 }]);
        let commit = |all: &[&What]| {
            let record = |what: &&What| Record { offset: 40, external: true, sync: true, what: (*what).clone() };
            Commit { begin: 40, end: 60, records: all.iter().map(record).collect() }
        };
        let moves = |all: &[&What]| moves_of(&commit(all)).collect::<Vec<_>>();
        assert_eq!(moves(&[&copy, &mark]), [(5, 9)]);
        assert_eq!(moves(&[&mark]), [(5, 7)], "said once more");
        let of = |moved| [&[&copy, &mark][..], &[&mark]].map(|all| moved_in(&commit(all), moved));
        assert_eq!(of((5, 7)), [Some(9), None]);
        assert_eq!(of((5, 9)), [Some(9), None], "it was said where the copy is before the worker was killed");
        assert_eq!(of((5, 8)), [None, None]);
        assert_eq!(moves(&[&copy]), []);
    }

    #[test]
    fn an_expunge_for_a_client_is_told_from_others() {
        use crate::indexlog::{ExpungeGuid, Record};
        let mut marks = Marks::default();
        marks.diverge();
        let mut entry = marks.set(&change("a", 9, 5)).1;
        let commit = |(offset, data): Write| {
            let gone = What::ExpungeGuid(vec![ExpungeGuid { uid: 5, guid_128: [1; 16] }]);
            let mark = What::ExtHeaderUpdate(vec![HeaderUpdate { offset: offset as u32, data }]);
            let record = |what| Record { offset: 40, external: false, sync: true, what };
            Commit { begin: 40, end: 60, records: vec![record(gone), record(mark)] }
        };
        assert!(expunges_for_client(&commit(marks.expunges()), 5));
        assert!(!expunges_for_client(&commit(marks.expunges()), 6));
        assert!(!expunges_for_client(&commit(marks.ours()), 5));
        assert!(!expunges_for_client(&commit((HEADER_BYTES, entry.clone())), 5));
        // Beside each other, they are written together.
        let mut both = marks.expunges().1;
        both.append(&mut entry);
        assert!(expunges_for_client(&commit((0, both.clone())), 5));
        let mut bytes = [0; MARK_BYTES];
        write(&mut bytes, (0, both));
        assert_eq!(Marks::parse(&bytes), marks, "it says nothing of the mailbox");
    }

    #[test]
    fn what_a_client_does_by_an_old_uid_is_done_where_the_message_is() {
        use crate::indexlog::{ExpungeGuid, FlagUpdate, Record};
        let commit = |external: bool, all: Vec<What>| {
            let record = |what| Record { offset: 40, external, sync: true, what };
            Commit { begin: 40, end: 60, records: all.into_iter().map(record).collect() }
        };
        let flags = |uid, add, remove| {
            let update = FlagUpdate { first_uid: uid, last_uid: uid, add, remove, modseq_inc_flag: 0 };
            commit(false, vec![What::FlagUpdate(vec![update])])
        };
        let expunge =
            |external, uid| commit(external, vec![What::ExpungeGuid(vec![ExpungeGuid { uid, guid_128: [7; 16] }])]);
        let moved = |from, to| {
            let (offset, data) = Marks::default().set_moving(Some((from, to)));
            let mark = What::ExtHeaderUpdate(vec![HeaderUpdate { offset: offset as u32, data }]);
            commit(true, vec![What::Append(vec![Append { uid: to, flags: 0 }]), mark])
        };
        let stale = |commits: Vec<Commit>| {
            let places = commits.into_iter().enumerate().map(|(at, commit)| ((2, at as u64), commit));
            stale_of(places, (2, 0), (2, 99))
        };
        let set = Stale::Flags { add: 8, remove: 0 };
        assert_eq!(stale(vec![moved(5, 9), expunge(true, 5), flags(5, 8, 0)]), [(9, set.clone())]);
        assert_eq!(stale(vec![moved(5, 9), expunge(true, 5), flags(5, 8, 0), moved(9, 12)]), [(12, set)]);
        assert_eq!(stale(vec![flags(5, 8, 0), moved(5, 9), flags(5, 1, 0), expunge(true, 5)]), [], "the worker did it");
        assert_eq!(stale(vec![moved(5, 9), expunge(true, 5), flags(5, 8, 0), flags(9, 0, 8)]), [], "undone since");
        assert_eq!(stale(vec![expunge(true, 5), flags(5, 8, 0)]), [], "it was not moved");
        let gone = Stale::Expunge { guid_128: [7; 16] };
        assert_eq!(stale(vec![moved(5, 9), expunge(true, 5), expunge(false, 5)]), [(9, gone)]);
    }

    #[test]
    fn what_a_killed_worker_saved_of_a_change_comes_behind_the_change_before_it() {
        use crate::indexlog::Record;
        let commit = |uid: u32, mark: Option<Write>| {
            let append = What::Append(vec![Append { uid, flags: 0 }]);
            let mark = mark.map(|(at, data)| What::ExtHeaderUpdate(vec![HeaderUpdate { offset: at as u32, data }]));
            let record = |what| Record { offset: 40, external: true, sync: true, what };
            Commit { begin: 40, end: 60, records: [Some(append), mark].into_iter().flatten().map(record).collect() }
        };
        let mut marks = Marks::default();
        let ours = || Some(Marks::default().ours());
        let torn = [commit(1, None), commit(2, ours()), commit(3, ours())];
        assert_eq!(
            marks.saved_in(torn.iter().filter(|commit| is_ours(commit)).cloned(), hash("a")),
            [(2, true), (3, true)],
            "its first change"
        );
        let mut written =
            vec![commit(4, Some(marks.set(&change("b", 1, 1)))), commit(5, Some(marks.set(&change("a", 1, 1))))];
        let behind = [commit(6, ours()), commit(7, None)];
        written.extend(torn.into_iter().chain(behind.clone()));
        let by_us = |uids: [u32; 4]| uids.map(|uid| (uid, true));
        assert_eq!(marks.saved_in(written.clone().into_iter().filter(is_ours), hash("a")), by_us([5, 2, 3, 6]));
        let by_any = [(5, true), (1, false), (2, true), (3, true), (6, true), (7, false)];
        assert_eq!(marks.saved_in(written.into_iter(), hash("a")), by_any);
        assert_eq!(
            marks.saved_in(behind.into_iter().filter(is_ours), hash("a")),
            [],
            "the log does not reach back to it"
        );

        let mut moved = commit(11, ours());
        let (offset, data) = Marks::default().set_moving(Some((5, 11)));
        let move_of = What::ExtHeaderUpdate(vec![HeaderUpdate { offset: offset as u32, data }]);
        moved.records.push(Record { offset: 40, external: true, sync: true, what: move_of });
        let since = [
            commit(5, Some(marks.set(&change("a", 1, 2)))),
            commit(10, Some(marks.set(&change("c", 1, 1)))),
            moved,
            commit(12, ours()),
        ];
        assert_eq!(
            marks.saved_in(since.into_iter(), hash("a")),
            [(5, true), (12, true)],
            "another server's is none of it, nor what was moved"
        );

        let (at, entry) = marks.set(&change("b", 1, 2));
        let both = (0, [Marks::default().ours().1, entry].concat());
        assert_eq!(at, HEADER_BYTES);
        assert_eq!(
            marks.saved_in([commit(8, ours()), commit(9, Some(both))].into_iter(), hash("b")),
            [(9, true)],
            "in one write"
        );
    }

    #[test]
    fn when_there_is_no_room_the_oldest_epoch_goes() {
        let mut marks = Marks::default();
        for n in 0..ENTRIES as u64 + 1 {
            marks.set(&change(&format!("server{n}"), 100 + n, 1));
        }
        assert!(!marks.has(&change("server0", 100, 1)));
        assert!((1..=ENTRIES as u64).all(|n| marks.has(&change(&format!("server{n}"), 100 + n, 1))));
    }
}
