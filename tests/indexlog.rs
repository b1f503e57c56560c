//! The parser of `dovecot.index.log`: what it makes of logs by real Dovecots, told in words, and what holds for any bytes.
//!
//! tests/golden/indexlog/make.sh made the logs; the README beside it tells the story that each of them holds.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::PathBuf;

use dovetail::indexlog::{
    fold, Append, Attribute, Commit, Commits, Delta, ExpungeGuid, ExtIntro, FlagUpdate, Header, HeaderUpdate, LogError,
    Modify, ModseqUpdate, Record, UidRange, What,
};
use proptest::collection::vec;
use proptest::prelude::*;

fn golden(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/indexlog").join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The log's header and all its commits, which must tile the file.
fn commits(name: &str) -> (Header, Vec<Commit>) {
    let bytes = golden(name);
    let header = Header::parse(&bytes).unwrap();
    let begin = usize::from(header.hdr_size);
    let mut iterator = Commits::new(&header, &bytes[begin..], begin as u64);
    let commits: Vec<Commit> = iterator.by_ref().map(|commit| commit.unwrap()).collect();
    assert_eq!(iterator.end(), bytes.len() as u64, "{name}: the log is complete");
    let mut end = begin as u64;
    for commit in &commits {
        assert_eq!(commit.begin, end, "{name}: commits tile the log");
        end = commit.end;
    }
    assert_eq!(end, bytes.len() as u64);
    (header, commits)
}

fn uids(first: u32, last: u32) -> String {
    if first == last {
        first.to_string()
    } else {
        format!("{first}:{last}")
    }
}

fn ranges(ranges: &[UidRange]) -> String {
    ranges.iter().map(|range| uids(range.first, range.last)).collect::<Vec<_>>().join(",")
}

fn flags(sign: char, flags: u8) -> String {
    let names = [(1, "answered"), (2, "flagged"), (4, "deleted"), (8, "seen"), (16, "draft")];
    names.iter().filter(|(flag, _)| flags & flag != 0).map(|(_, name)| format!(" {sign}{name}")).collect()
}

fn words(delta: &Delta) -> String {
    match delta {
        Delta::Append { uid, flags: set } => format!("append {uid}{}", flags('+', *set)),
        Delta::Flags { first_uid, last_uid, add, remove } => {
            format!("flags {}{}{}", uids(*first_uid, *last_uid), flags('+', *add), flags('-', *remove))
        }
        Delta::Keywords { add, name, ranges: on } => {
            format!("keyword {} {}{name}", ranges(on), if *add { '+' } else { '-' })
        }
        Delta::KeywordsReset { ranges: on } => format!("no keywords {}", ranges(on)),
        Delta::Expunge { first_uid, last_uid, guid } => {
            format!("expunge {}{}", uids(*first_uid, *last_uid), if guid.is_some() { ", guid known" } else { "" })
        }
        Delta::Rebuilt => "rebuilt".into(),
        // It is a time: another one whenever the logs are made anew.
        Delta::UidValidity(uid_validity) => format!("uidvalidity{}", if *uid_validity == 0 { " 0" } else { "" }),
        Delta::NextUid(next) => format!("next uid {next}"),
    }
}

fn story(name: &str) -> Vec<String> {
    fold(commits(name).1, |_| false).iter().map(words).collect()
}

const VERSIONS: [&str; 2] = ["2.3", "2.4"];
const STORAGES: [&str; 3] = ["sdbox", "mdbox", "maildir"];

fn each_version_and_storage(check: impl Fn(&str)) {
    for version in VERSIONS {
        for storage in STORAGES {
            check(&format!("{version}-{storage}"));
        }
    }
}

/// `doveadm dump`'s words for it and for its flags.
fn dumped(record: &Record) -> String {
    let kind = match &record.what {
        What::Append(_) => "append",
        What::ExpungeGuid(_) => "expunge-guid",
        What::FlagUpdate(_) => "flag-update",
        What::KeywordUpdate { .. } => "keyword-update",
        What::HeaderUpdate(_) => "header-update",
        What::ExtIntro(_) => "ext-intro",
        What::ExtReset { .. } => "ext-reset",
        What::ExtHeaderUpdate(_) => "ext-hdr",
        What::ExtRecordUpdate => "ext-rec",
        What::ModseqUpdate(_) => "modseq-update",
        other => panic!("no golden log has {other:?}"),
    };
    let external = if record.external { " (ext)" } else { "" };
    let sync = if record.sync { " (sync)" } else { "" };
    format!("{} {kind}{external}{sync}", record.offset)
}

#[test]
fn dovecot_sees_the_same_records_at_the_same_places() {
    for version in VERSIONS {
        let witness = String::from_utf8(golden(&format!("{version}.records"))).unwrap();
        for storage in STORAGES {
            for part in ["", "-archive", "-rotated", "-synced", "-rebuilt"] {
                let log = format!("{version}-{storage}{part}");
                if log.ends_with("maildir-rebuilt") {
                    continue;
                }
                let prefix = format!("{log} ");
                let seen = witness.lines().filter_map(|line| line.strip_prefix(&prefix));
                let seen: Vec<&str> = seen.filter(|line| !line.contains("boundary")).collect();
                let (_, commits) = commits(&format!("{log}.log"));
                let ours: Vec<String> = commits.iter().flat_map(|commit| &commit.records).map(dumped).collect();
                assert!(!seen.is_empty());
                assert_eq!(ours, seen, "{log}");
            }
        }
    }
}

#[test]
fn dbox_logs_tell_what_the_clients_did() {
    each_version_and_storage(|log| {
        if log.ends_with("maildir") {
            return;
        }
        let expected = [
            "uidvalidity",
            "append 1",
            "append 2",
            "append 3",
            "append 4",
            "flags 1:2 +flagged +seen",
            "flags 2 -flagged",
            "flags 3 +answered -flagged -deleted -seen -draft",
            "keyword 1:3 +Work",
            "keyword 2 -Work",
            "expunge 2",
            "expunge 4",
        ];
        assert_eq!(story(&format!("{log}.log")), expected, "{log}");
    });
}

#[test]
fn a_maildir_log_tells_also_what_went_round_dovecot() {
    each_version_and_storage(|log| {
        if !log.ends_with("maildir") {
            return;
        }
        let expected = [
            "uidvalidity",
            "append 1",
            "append 2",
            "append 3",
            "append 4",
            "flags 1:2 +flagged +seen",
            "flags 2 -flagged",
            "flags 3 +answered -flagged -deleted -seen -draft",
            "keyword 1:3 +Work",
            "keyword 2 -Work",
            "expunge 2, guid known",
            "expunge 4, guid known",
            // A file that was dropped into new/, renamed to ":2,FS", and removed.
            "append 5",
            "flags 5 +flagged +seen -answered -deleted -draft",
            "expunge 5",
        ];
        assert_eq!(story(&format!("{log}.log")), expected, "{log}");
    });
}

#[test]
fn copies_come_with_their_flags_and_their_keywords() {
    each_version_and_storage(|log| {
        let expected = ["uidvalidity", "append 1 +flagged +seen", "keyword 1 +Work", "append 2 +seen"];
        assert_eq!(story(&format!("{log}-archive.log")), expected, "{log}");
    });
}

#[test]
fn a_rotated_log_goes_on_where_the_one_before_it_ended() {
    each_version_and_storage(|log| {
        let (before, _) = commits(&format!("{log}.log"));
        let (header, commits) = commits(&format!("{log}-rotated.log"));
        assert!(before.begins_anew() && !header.begins_anew(), "{log}");
        assert_eq!(header.indexid, before.indexid, "{log}");
        assert_eq!(header.file_seq, before.file_seq + 1, "{log}");
        assert_eq!(header.prev_file_seq, before.file_seq, "{log}");
        assert_eq!(u64::from(header.prev_file_offset), golden(&format!("{log}.log")).len() as u64, "{log}");
        assert!(header.initial_modseq > before.initial_modseq, "{log}");
        assert_eq!(commits[0].begin, 40, "{log}: no record stands behind the header but those of commits");
        let words: Vec<String> = fold(commits, |_| false).iter().map(words).collect();
        assert_eq!(words, ["flags 1 +draft", "flags 1 -draft", "expunge 3, guid known"], "{log}");
    });
}

#[test]
fn a_rebuilt_index_begins_anew_with_all_that_is_there() {
    each_version_and_storage(|log| {
        if log.ends_with("maildir") {
            return;
        }
        let (before, _) = commits(&format!("{log}-rotated.log"));
        let (header, commits) = commits(&format!("{log}-rebuilt.log"));
        assert!(header.begins_anew(), "{log}");
        assert_eq!(header.indexid, before.indexid, "{log}: the index id does not tell");
        assert_eq!(header.file_seq, before.file_seq + 1, "{log}");
        assert!(header.initial_modseq > before.initial_modseq, "{log}: modseqs go on");
        let told: Vec<String> = fold(commits, |_| false).iter().map(words).collect();
        assert_eq!(told, ["uidvalidity", "append 1 +deleted", "next uid 6"], "{log}");
    });
}

#[test]
fn an_expunge_names_the_guid_that_the_message_had() {
    each_version_and_storage(|log| {
        let text = String::from_utf8(golden(&format!("{log}.guids"))).unwrap();
        let known = text.lines().find_map(|line| line.strip_prefix("3\t")).unwrap();
        let guid = fold(commits(&format!("{log}-rotated.log")).1, |_| false)
            .into_iter()
            .find_map(|delta| match delta {
                Delta::Expunge { first_uid: 3, guid, .. } => guid,
                _ => None,
            })
            .unwrap();
        let guid: String = guid.iter().map(|byte| format!("{byte:02x}")).collect();
        // On maildir the GUID is the file's name, and the log has its hash.
        assert_eq!(guid == known, !log.ends_with("maildir"), "{log}: {guid}, {known}");
    });
}

#[test]
fn uidvalidity_is_that_of_the_mailbox() {
    each_version_and_storage(|log| {
        let text = String::from_utf8(golden(&format!("{log}.guids"))).unwrap();
        let known: u32 = text.lines().find_map(|line| line.strip_prefix("uidvalidity\t")).unwrap().parse().unwrap();
        let deltas = fold(commits(&format!("{log}.log")).1, |_| false);
        assert_eq!(deltas[0], Delta::UidValidity(known), "{log}");
    });
}

/// Where a record of this sort stands: (how many commits, has EXTERNAL).
fn places(commits: &[Commit], wanted: impl Fn(&What) -> bool) -> Vec<(usize, bool)> {
    let of = |(i, commit): (usize, &Commit)| {
        let records: Vec<(usize, bool)> =
            commit.records.iter().filter(|r| wanted(&r.what)).map(|r| (i, r.external)).collect();
        records
    };
    commits.iter().enumerate().flat_map(of).collect()
}

#[test]
fn saves_are_done_when_written_and_flags_are_asked_for() {
    each_version_and_storage(|log| {
        let (_, commits) = commits(&format!("{log}.log"));
        let saves = places(&commits, |what| matches!(what, What::Append(_)));
        assert!(saves.iter().all(|(_, external)| *external), "{log}: {saves:?}");
        let flags = places(&commits, |what| matches!(what, What::FlagUpdate(_)));
        assert!(flags[..3].iter().all(|(_, external)| !external), "{log}: {flags:?}");
        // Only the file that was renamed was not asked for.
        assert!(flags[3..].iter().all(|(_, external)| *external), "{log}: {flags:?}");
        assert!(commits.iter().all(|commit| commit.records.iter().all(|record| !record.sync)), "{log}");
    });
}

#[test]
fn an_expunge_is_asked_for_and_then_done_in_a_later_commit() {
    each_version_and_storage(|log| {
        let (_, commits) = commits(&format!("{log}.log"));
        let expunges = places(&commits, |what| matches!(what, What::ExpungeGuid(_)));
        let external: Vec<bool> = expunges.iter().map(|(_, external)| *external).collect();
        let done_only = if log.ends_with("maildir") { [true].as_slice() } else { &[] };
        assert_eq!(external, [&[false, true, false, true], done_only].concat(), "{log}");
        assert!(expunges.windows(2).all(|pair| pair[0].0 < pair[1].0), "{log}: {expunges:?}");
    });
}

#[test]
fn a_log_written_by_dsync_tells_what_the_other_side_did() {
    each_version_and_storage(|log| {
        // Version 2.3 begins a commit with the keyword where 2.4 ends it.
        let mut told = story(&format!("{log}-synced.log"));
        let changes = told.split_off(told.iter().position(|words| words.contains("+deleted")).unwrap());
        told.sort();
        let came = if log.ends_with("maildir") { "append 6" } else { "append 5" };
        let mut saves = vec!["append 1 +flagged +seen", came, "keyword 1 +Work", "uidvalidity"];
        if log.ends_with("sdbox") {
            saves.insert(3, "next uid 6");
        }
        assert_eq!(told, saves, "{log}");
        let gone = if log.ends_with("maildir") { "expunge 6, guid known" } else { "expunge 5, guid known" };
        assert_eq!(changes, ["flags 1 +deleted -flagged -seen", "keyword 1 -Work", gone], "{log}");
    });
}

#[test]
fn dsync_marks_what_it_asks_for_and_not_what_is_then_done() {
    each_version_and_storage(|log| {
        let (_, commits) = commits(&format!("{log}-synced.log"));
        let records = || commits.iter().flat_map(|commit| &commit.records);
        let saves: Vec<&Record> = records().filter(|record| matches!(record.what, What::Append(_))).collect();
        assert!(saves.iter().all(|record| record.sync && record.external), "{log}: {saves:?}");
        let expunges: Vec<(bool, bool)> = records()
            .filter(|record| matches!(record.what, What::ExpungeGuid(_)))
            .map(|record| (record.external, record.sync))
            .collect();
        assert_eq!(expunges, [(false, true), (true, false)], "{log}");
    });
}

/// No golden log numbers an extension that came after its first keyword: the number that `keywords` takes is not seen here.
#[test]
fn numbers_of_extensions_count_their_names() {
    for part in ["", "-archive", "-synced", "-rebuilt"] {
        each_version_and_storage(|log| {
            if part == "-rebuilt" && log.ends_with("maildir") {
                return;
            }
            let (_, commits) = commits(&format!("{log}{part}.log"));
            let mut named: Vec<ExtIntro> = Vec::new();
            for record in commits.into_iter().flat_map(|commit| commit.records) {
                let What::ExtIntro(intros) = record.what else { continue };
                for intro in intros {
                    match intro.ext_id {
                        None if named.iter().all(|known| known.name != intro.name) => named.push(intro),
                        None => {}
                        Some(id) => {
                            let known = &named[id as usize];
                            let (size, align) = (known.record_size, known.record_align);
                            assert_eq!(
                                (intro.record_size, intro.record_align),
                                (size, align),
                                "{log}{part}: {known:?}"
                            );
                        }
                    }
                }
            }
        });
    }
}

#[test]
fn commits_that_are_ours_are_left_out() {
    let (_, commits) = commits("2.3-sdbox.log");
    let asked = commits.iter().find(|commit| matches!(commit.records[0].what, What::ExpungeGuid(_))).unwrap().begin;
    let told: Vec<String> = fold(&commits, |commit| commit.begin <= asked).iter().map(words).collect();
    assert_eq!(told, ["expunge 4"], "that 2 is gone was asked for by us, whoever did it then");
}

#[test]
fn reading_may_begin_at_any_commit() {
    let bytes = golden("2.4-maildir.log");
    let (header, all) = commits("2.4-maildir.log");
    for (i, commit) in all.iter().enumerate() {
        let rest = &bytes[commit.begin as usize..];
        let read: Vec<Commit> = Commits::new(&header, rest, commit.begin).map(|commit| commit.unwrap()).collect();
        assert_eq!(read, all[i..]);
    }
    let inside = Commits::new(&header, &bytes[39..], 39).next().unwrap();
    assert!(matches!(inside, Err(LogError::Corrupted { offset: 39, .. })));
}

/// Bytes behind an ordinary header, read to the end, with what always holds.
fn read(bytes: &[u8]) -> (Vec<Commit>, Option<LogError>) {
    let header = Header::parse(&HEADER).unwrap();
    let mut iterator = Commits::new(&header, bytes, 40);
    let (mut commits, mut error) = (Vec::new(), None);
    for item in iterator.by_ref() {
        assert_eq!(error, None, "nothing comes after an error");
        match item {
            Ok(commit) => commits.push(commit),
            Err(e) => error = Some(e),
        }
    }
    let mut end = 40;
    for commit in &commits {
        assert!(commit.begin == end && commit.end > end && commit.end <= 40 + bytes.len() as u64);
        end = commit.end;
    }
    assert_eq!(iterator.end(), end);
    (commits, error)
}

/// Version 1.3, index id 1, file 2, little endian.
const HEADER: [u8; 40] = {
    let mut header = [0; 40];
    (header[0], header[1], header[2], header[4], header[8], header[32]) = (1, 3, 40, 1, 2, 1);
    header
};

/// The least that Dovecot's writer does: `mail_transaction_log_append_add()` and `mail_transaction_log_append_locked()`.
mod writer {
    use super::*;

    fn size(size: usize) -> [u8; 4] {
        let words = size as u32 / 4;
        [21, 14, 7, 0].map(|shift| (words >> shift & 0x7f) as u8 | 0x80)
    }

    pub fn record(kind: u32, contents: &[u8]) -> Vec<u8> {
        let mut contents = contents.to_vec();
        align(&mut contents);
        [&size(contents.len() + 8)[..], &kind.to_le_bytes(), &contents].concat()
    }

    pub fn group(records: &[u8]) -> Vec<u8> {
        let size = records.len() as u32 + 12;
        [record(0x1008_0000, &size.to_le_bytes()), records.to_vec()].concat()
    }

    /// As Dovecot does it: one record stands alone.
    pub fn commit(external: bool, sync: bool, whats: &[What]) -> Vec<u8> {
        let flags = u32::from(external) << 28 | u32::from(sync) << 29;
        let records: Vec<u8> = whats.iter().flat_map(|what| encode(flags, what)).collect();
        match whats.len() {
            1 => records,
            _ => group(&records),
        }
    }

    fn align(bytes: &mut Vec<u8>) {
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }

    fn ranges(ranges: &[UidRange]) -> Vec<u8> {
        ranges.iter().flat_map(|range| [range.first.to_le_bytes(), range.last.to_le_bytes()].concat()).collect()
    }

    fn header_updates(updates: &[HeaderUpdate], wide: bool) -> Vec<u8> {
        let mut out = Vec::new();
        for update in updates {
            if wide {
                out.extend(update.offset.to_le_bytes());
                out.extend((update.data.len() as u32).to_le_bytes());
            } else {
                out.extend((update.offset as u16).to_le_bytes());
                out.extend((update.data.len() as u16).to_le_bytes());
            }
            out.extend(&update.data);
            align(&mut out);
        }
        out
    }

    fn intro(intro: &ExtIntro) -> Vec<u8> {
        let mut out = Vec::new();
        for field in [intro.ext_id.unwrap_or(u32::MAX), intro.reset_id, intro.hdr_size] {
            out.extend(field.to_le_bytes());
        }
        for field in [intro.record_size, intro.record_align, intro.flags, intro.name.len() as u16] {
            out.extend(field.to_le_bytes());
        }
        out.extend(intro.name.as_bytes());
        align(&mut out);
        out
    }

    fn flag_update(update: &FlagUpdate) -> Vec<u8> {
        let rest = [update.add, update.remove, update.modseq_inc_flag, 0];
        [update.first_uid.to_le_bytes(), update.last_uid.to_le_bytes(), rest].concat()
    }

    fn attributes(attributes: &[Attribute]) -> Vec<u8> {
        let mut out = Vec::new();
        for attribute in attributes {
            out.push(if attribute.set { b'+' } else { b'-' });
            out.push(if attribute.private { b'p' } else { b's' });
            out.extend(attribute.key.as_bytes());
            out.push(0);
        }
        out.push(0);
        align(&mut out);
        // A time for each and, if it was set, the length of its value.
        for attribute in attributes {
            out.resize(out.len() + if attribute.set { 8 } else { 4 }, b'x');
        }
        out
    }

    fn keyword(modify: Modify, name: &str, on: &[UidRange]) -> Vec<u8> {
        let mut out = vec![modify as u8, 0];
        out.extend((name.len() as u16).to_le_bytes());
        out.extend(name.as_bytes());
        align(&mut out);
        out.extend(ranges(on));
        out
    }

    fn encode(flags: u32, what: &What) -> Vec<u8> {
        let (kind, contents) = match what {
            What::Append(appends) => (
                0x2,
                appends
                    .iter()
                    .flat_map(|append| [append.uid.to_le_bytes(), [append.flags, 0, 0, 0]].concat())
                    .collect(),
            ),
            What::Expunge(on) => (0xcd91, ranges(on)),
            What::ExpungeGuid(expunges) => {
                (0xed90, expunges.iter().flat_map(|one| [&one.uid.to_le_bytes()[..], &one.guid_128].concat()).collect())
            }
            What::FlagUpdate(updates) => (0x4, updates.iter().flat_map(flag_update).collect()),
            What::KeywordUpdate { modify, name, ranges: on } => (0x400, keyword(*modify, name, on)),
            What::KeywordReset(on) => (0x800, ranges(on)),
            What::HeaderUpdate(updates) => (0x20, header_updates(updates, false)),
            What::ExtIntro(intros) => (0x40, intros.iter().flat_map(intro).collect()),
            What::ExtReset { new_reset_id, preserve_data } => {
                (0x80, [new_reset_id.to_le_bytes(), [(*preserve_data).into(), 0, 0, 0]].concat())
            }
            What::ExtHeaderUpdate(updates) => {
                let wide = updates.iter().any(|update| update.offset > 0xffff);
                (if wide { 0x10000 } else { 0x100 }, header_updates(updates, wide))
            }
            What::ExtRecordUpdate => (0x200, vec![1, 0, 0, 0, 9, 9, 9, 9]),
            What::ExtAtomicInc => (0x1000, vec![1, 0, 0, 0, 255, 255, 255, 255]),
            What::ModseqUpdate(updates) => (
                0x8000,
                updates
                    .iter()
                    .flat_map(|one| [&one.uid.to_le_bytes()[..], &one.modseq.to_le_bytes()].concat())
                    .collect(),
            ),
            What::AttributeUpdate(changes) => (0x10_0000, attributes(changes)),
            What::IndexDeleted => (0x2_0000, vec![0; 4]),
            What::IndexUndeleted => (0x4_0000, vec![0; 4]),
            What::Other(kind) => (*kind, vec![7; 4]),
        };
        record(kind | flags, &contents)
    }
}

/// What Dovecot may write.
mod written {
    use super::*;

    fn name() -> impl Strategy<Value = String> {
        "[A-Za-z$/]{1,20}"
    }

    /// Sorted, without overlaps.
    fn ranges() -> impl Strategy<Value = Vec<UidRange>> {
        vec((1_u32..50, 0_u32..50), 1..5).prop_map(|steps| {
            let mut last = 0;
            steps
                .iter()
                .map(|(gap, length)| {
                    let first = last + gap;
                    last = first + length;
                    UidRange { first, last }
                })
                .collect()
        })
    }

    fn flag_updates() -> impl Strategy<Value = Vec<FlagUpdate>> {
        (ranges(), any::<u8>(), any::<u8>(), any::<u8>()).prop_map(|(ranges, add, remove, modseq_inc_flag)| {
            let update = |range: UidRange| {
                let UidRange { first: first_uid, last: last_uid } = range;
                FlagUpdate { first_uid, last_uid, add, remove, modseq_inc_flag }
            };
            ranges.into_iter().map(update).collect()
        })
    }

    fn header_updates(offset_max: u32) -> impl Strategy<Value = Vec<HeaderUpdate>> {
        let update = (0..offset_max, vec(any::<u8>(), 0..20));
        vec(update.prop_map(|(offset, data)| HeaderUpdate { offset, data }), 1..4)
    }

    /// Whole fields.
    fn index_header_updates() -> impl Strategy<Value = Vec<HeaderUpdate>> {
        let update = (0_u32..30, vec(any::<[u8; 4]>(), 1..4));
        vec(update.prop_map(|(field, data)| HeaderUpdate { offset: field * 4, data: data.concat() }), 1..4)
    }

    fn intros() -> impl Strategy<Value = Vec<ExtIntro>> {
        let named = name().prop_map(|name| (None, name));
        let numbered = (0..u32::MAX).prop_map(|ext_id| (Some(ext_id), String::new()));
        let rest = (any::<u32>(), any::<u32>(), any::<u16>(), any::<u16>(), any::<u16>());
        let intro = (prop_oneof![named, numbered], rest).prop_map(|((ext_id, name), rest)| {
            let (reset_id, hdr_size, record_size, record_align, flags) = rest;
            ExtIntro { ext_id, name, reset_id, hdr_size, record_size, record_align, flags }
        });
        vec(intro, 1..3)
    }

    fn attributes() -> impl Strategy<Value = Vec<Attribute>> {
        let attribute = (any::<bool>(), any::<bool>(), name());
        vec(attribute.prop_map(|(set, private, key)| Attribute { set, private, key }), 1..4)
    }

    fn of_messages() -> impl Strategy<Value = What> {
        let append = (1_u32.., any::<u8>()).prop_map(|(uid, flags)| Append { uid, flags });
        let expunge = (1_u32.., any::<[u8; 16]>()).prop_map(|(uid, guid_128)| ExpungeGuid { uid, guid_128 });
        let modseq = (any::<u32>(), any::<u64>()).prop_map(|(uid, modseq)| ModseqUpdate { uid, modseq });
        let modify = prop_oneof![Just(Modify::Add), Just(Modify::Remove), Just(Modify::Replace)];
        prop_oneof![
            vec(append, 1..5).prop_map(What::Append),
            ranges().prop_map(What::Expunge),
            vec(expunge, 1..5).prop_map(What::ExpungeGuid),
            flag_updates().prop_map(What::FlagUpdate),
            (modify, name(), ranges()).prop_map(|(modify, name, ranges)| What::KeywordUpdate { modify, name, ranges }),
            ranges().prop_map(What::KeywordReset),
            vec(modseq, 1..5).prop_map(What::ModseqUpdate),
        ]
    }

    fn of_the_index() -> impl Strategy<Value = What> {
        prop_oneof![
            index_header_updates().prop_map(What::HeaderUpdate),
            intros().prop_map(What::ExtIntro),
            (any::<u32>(), any::<bool>())
                .prop_map(|(new_reset_id, preserve_data)| What::ExtReset { new_reset_id, preserve_data }),
            header_updates(0x1_0000).prop_map(What::ExtHeaderUpdate),
            header_updates(u32::MAX).prop_map(What::ExtHeaderUpdate),
            Just(What::ExtRecordUpdate),
            Just(What::ExtAtomicInc),
            attributes().prop_map(What::AttributeUpdate),
            Just(What::IndexDeleted),
            Just(What::IndexUndeleted),
            Just(What::Other(0x0080_0000)),
        ]
    }

    pub type Written = (bool, bool, Vec<What>);

    pub fn commits() -> impl Strategy<Value = Vec<Written>> {
        let what = prop_oneof![of_messages(), of_the_index()];
        vec((any::<bool>(), any::<bool>(), vec(what, 1..5)), 0..6)
    }

    pub fn bytes(commits: &[Written]) -> Vec<u8> {
        commits.iter().flat_map(|(external, sync, whats)| writer::commit(*external, *sync, whats)).collect()
    }
}

/// Records whose sizes are right and whose contents are anything.
fn any_records() -> impl Strategy<Value = Vec<u8>> {
    let kind = (0_u32..32, prop_oneof![Just(0_u32), Just(0xcd90), any::<u32>()]);
    let record = (kind, vec(prop_oneof![any::<u8>(), Just(0)], 0..60), any::<bool>());
    vec(record, 0..8).prop_map(|records| {
        let record = |((bit, more), contents, grouped): ((u32, u32), Vec<u8>, bool)| {
            let record = writer::record(1 << bit | more, &contents);
            if grouped {
                writer::group(&record)
            } else {
                record
            }
        };
        records.into_iter().flat_map(record).collect()
    })
}

proptest! {
    #[test]
    fn what_was_written_is_read(written in written::commits()) {
        let (commits, error) = read(&written::bytes(&written));
        prop_assert_eq!(error, None);
        let read: Vec<Vec<(bool, bool, What)>> = commits
            .iter()
            .map(|commit| commit.records.iter().map(|r| (r.external, r.sync, r.what.clone())).collect())
            .collect();
        let expected: Vec<Vec<(bool, bool, What)>> = written
            .into_iter()
            .map(|(external, sync, whats)| whats.into_iter().map(|what| (external, sync, what)).collect())
            .collect();
        prop_assert_eq!(read, expected);
    }

    #[test]
    fn a_log_cut_anywhere_is_its_first_commits(written in written::commits()) {
        let bytes = written::bytes(&written);
        let (commits, _) = read(&bytes);
        for cut in 0..bytes.len() {
            let (left, error) = read(&bytes[..cut]);
            prop_assert_eq!(error, None);
            let whole = commits.iter().take_while(|commit| commit.end <= 40 + cut as u64).count();
            prop_assert_eq!(&left[..], &commits[..whole]);
        }
    }

    #[test]
    fn broken_logs_are_read_up_to_where_they_are_broken(
        written in written::commits(), flips in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = written::bytes(&written);
        let (before, _) = read(&bytes);
        let mut first = bytes.len();
        for (at, flip) in flips {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] ^= flip;
                first = first.min(at);
            }
        }
        let (after, _) = read(&bytes);
        let whole = before.iter().take_while(|commit| commit.end <= 40 + first as u64).count();
        prop_assert!(after.len() >= whole);
        prop_assert_eq!(&after[..whole], &before[..whole]);
    }

    #[test]
    fn any_bytes_are_read_in_bounded_memory(bytes in prop_oneof![vec(any::<u8>(), 0..300), any_records()]) {
        let _ = Header::parse(&bytes);
        let peak = peak_of(|| {
            let (commits, _) = read(&bytes);
            fold(&commits, |commit| commit.begin % 8 == 0);
        });
        prop_assert!(peak <= 64 * bytes.len() + 1024, "{} bytes took {}", bytes.len(), peak);
    }
}

#[test]
fn golden_logs_with_a_byte_flipped_never_panic() {
    each_version_and_storage(|log| {
        let bytes = golden(&format!("{log}-archive.log"));
        for at in 40..bytes.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut broken = bytes.clone();
                broken[at] ^= flip;
                fold(read(&broken[40..]).0, |_| false);
            }
        }
    });
}

#[test]
fn the_smallest_items_take_bounded_memory() {
    let deleted = writer::record(0x1002_0000, &[0; 4]);
    let append = [1, 0, 0, 0, 0, 0, 0, 0];
    for bytes in
        [deleted.repeat(10_000), writer::group(&deleted.repeat(10_000)), writer::record(2, &append.repeat(10_000))]
    {
        let peak = peak_of(|| drop(fold(read(&bytes).0, |_| false)));
        assert!(peak <= 64 * bytes.len(), "{} bytes took {peak}", bytes.len());
    }
}

/// What does not pass, and what it is told to be.
#[test]
fn corruption_is_told_with_its_place() {
    let fine = writer::commit(true, false, &[What::IndexUndeleted]);
    let refused = |broken: Vec<u8>| {
        let (commits, error) = read(&[fine.clone(), broken].concat());
        assert_eq!(commits.len(), 1);
        error.map(|error| error.to_string()).unwrap_or_default()
    };
    let at = |reason: &str| format!("the log is corrupted at offset 52: {reason}");
    assert_eq!(
        refused(writer::record(0x1000_0001, &[1, 0, 0, 0, 1, 0, 0, 0])),
        at("type 0x10000001: the record would expunge, but its protecting bits are missing")
    );
    assert_eq!(
        refused(vec![0x80, 0x80, 0x80, 0x81, 0, 0, 0, 0]),
        at("a record of 4 bytes is shorter than its own header")
    );
    assert_eq!(refused(writer::record(2, &[])), at("type 0x2: the record is empty"));
    assert_eq!(refused(writer::record(2, &[1; 12])), at("type 0x2: the record ends inside one of its items"));
    assert_eq!(refused(writer::record(0x800, &[0; 8])), at("type 0x800: 0:0 is not a range of UIDs"));
    assert_eq!(
        refused(writer::record(0x20, &[26, 0, 4, 0, 1, 2, 3, 4])),
        at("type 0x20: a part of the UIDVALIDITY is overwritten")
    );
    assert_eq!(refused(writer::record(0x1008_0000, &[8, 0, 0, 0])), at("a group cannot be 8 bytes long"));
    let short = [writer::record(0x1008_0000, &[20, 0, 0, 0]), fine.clone()].concat();
    assert_eq!(refused(short), at("a record reaches beyond the end of its group").replace("52", "64"));
    let nested = writer::group(&writer::group(&fine));
    assert_eq!(refused(nested), at("a boundary stands inside a group").replace("52", "64"));
}

#[test]
fn a_group_with_a_record_that_never_reached_the_disk_was_torn() {
    let mut group = writer::group(&writer::commit(true, false, &[What::IndexUndeleted]).repeat(3));
    group[24..28].fill(0);
    assert_eq!(read(&group), (vec![], None));
}

/// Counts what each thread has taken from the heap.
struct Counting;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: all is left to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.get().wrapping_add(layout.size());
        LIVE.set(live);
        PEAK.set(PEAK.get().max(live));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.set(LIVE.get().saturating_sub(layout.size()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// The most bytes that `work` had on the heap at once, beyond what was there before.
fn peak_of(work: impl FnOnce()) -> usize {
    let before = LIVE.get();
    PEAK.set(before);
    work();
    PEAK.get() - before
}
