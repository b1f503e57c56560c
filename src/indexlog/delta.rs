//! What commits did to messages, in the order in which they were written.
//!
//! Guarantees that nothing is told twice: an expunge stands in the log as a request and as done, and is one [`Delta`].
//! Only what a client can see is told; Dovecot's own bookkeeping is not.

use std::borrow::Borrow;
use std::collections::BTreeMap;

use super::record::{Append, ExpungeGuid, FlagUpdate, HeaderUpdate, Modify, NEXT_UID_AT, UID_VALIDITY_AT};
use super::{Commit, Record, UidRange, What};

/// `MAIL_FLAGS_NONRECENT`: \Answered 0x01, \Flagged 0x02, \Deleted 0x04, \Seen 0x08, \Draft 0x10. The others are \Recent,
/// which is nobody's to set, and Dovecot's internal ones.
const SYSTEM_FLAGS: u8 = 0x1f;

/// One change, as far as the log knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delta {
    /// A message came. Its GUID, dates and body are in the mailbox, its keywords in deltas of the same commit.
    Append { uid: u32, flags: u8 },
    /// Flags become (flags & !remove) | add; one of the two is not 0.
    Flags { first_uid: u32, last_uid: u32, add: u8, remove: u8 },
    /// A keyword was added to the messages or, if not `add`, taken away.
    Keywords { add: bool, name: String, ranges: Vec<UidRange> },
    /// All keywords were taken away.
    KeywordsReset { ranges: Vec<UidRange> },
    /// Messages went, or were asked to go and will. UIDs in between need not have existed. The GUID is only there for
    /// a single message whose expunge was asked for with one.
    Expunge { first_uid: u32, last_uid: u32, guid: Option<[u8; 16]> },
    /// The mailbox's index was deleted at the end of the commits: everything before is void. An index that was reset has
    /// a new file instead, see [`Header::begins_anew`](super::Header::begins_anew).
    Rebuilt,
    /// The mailbox got this UIDVALIDITY, its first one or a new one: UIDs before it name other messages.
    UidValidity(u32),
    /// No message before it will come any more. Dovecot ignores one that is lower than what it had.
    NextUid(u32),
}

/// What the commits did to messages, in the order in which they were written, without those that are ours.
///
/// An expunge that a commit of ours asked for is known, also where another process's sync carried it out. Where the
/// request stands before the first commit, what was done is told (once more); that is no harm, a UID goes only once.
pub fn fold<C: Borrow<Commit>>(commits: impl IntoIterator<Item = C>, is_ours: impl Fn(&Commit) -> bool) -> Vec<Delta> {
    let mut fold = Fold::default();
    for commit in commits {
        let commit = commit.borrow();
        fold.ours = is_ours(commit);
        for record in &commit.records {
            fold.record(record);
        }
    }
    if fold.deleted {
        fold.deltas.push(Delta::Rebuilt);
    }
    fold.deltas
}

#[derive(Default)]
struct Fold {
    deltas: Vec<Delta>,
    expunged: UidSet,
    deleted: bool,
    /// Whether the commit that is being read is ours.
    ours: bool,
}

impl Fold {
    fn record(&mut self, record: &Record) {
        match &record.what {
            What::Append(appends) => appends.iter().for_each(|append| self.append(append)),
            What::Expunge(ranges) => ranges.iter().for_each(|range| self.expunge(*range, None)),
            What::ExpungeGuid(expunges) => expunges.iter().for_each(|expunge| self.expunge_guid(expunge)),
            What::FlagUpdate(updates) => updates.iter().for_each(|update| self.flags(update)),
            What::KeywordUpdate { modify, name, ranges } => self.keywords(*modify, name, ranges),
            What::KeywordReset(ranges) => self.tell(Delta::KeywordsReset { ranges: ranges.clone() }),
            What::HeaderUpdate(updates) => updates.iter().for_each(|update| self.header(update)),
            // Without EXTERNAL somebody asks for it, and may still find that the mailbox cannot go.
            What::IndexDeleted if record.external => self.deleted |= !self.ours,
            What::IndexUndeleted if record.external => self.deleted = false,
            _ => {}
        }
    }

    fn tell(&mut self, delta: Delta) {
        if !self.ours {
            self.deltas.push(delta);
        }
    }

    fn append(&mut self, append: &Append) {
        self.tell(Delta::Append { uid: append.uid, flags: append.flags & SYSTEM_FLAGS });
    }

    fn flags(&mut self, update: &FlagUpdate) {
        let FlagUpdate { first_uid, last_uid, .. } = *update;
        let (add, remove) = (update.add & SYSTEM_FLAGS, update.remove & SYSTEM_FLAGS);
        if add | remove != 0 {
            self.tell(Delta::Flags { first_uid, last_uid, add, remove });
        }
    }

    fn keywords(&mut self, modify: Modify, name: &str, ranges: &[UidRange]) {
        if modify == Modify::Replace {
            self.tell(Delta::KeywordsReset { ranges: ranges.to_vec() });
        }
        self.tell(Delta::Keywords { add: modify != Modify::Remove, name: name.into(), ranges: ranges.to_vec() });
    }

    fn expunge_guid(&mut self, expunge: &ExpungeGuid) {
        let guid = Some(expunge.guid_128).filter(|guid| *guid != [0; 16]);
        self.expunge(UidRange { first: expunge.uid, last: expunge.uid }, guid);
    }

    fn expunge(&mut self, range: UidRange, guid: Option<[u8; 16]>) {
        for UidRange { first, last } in self.expunged.insert(range) {
            self.tell(Delta::Expunge { first_uid: first, last_uid: last, guid });
        }
    }

    fn header(&mut self, update: &HeaderUpdate) {
        if let Some(uid_validity) = update.field(UID_VALIDITY_AT) {
            self.expunged = UidSet::default();
            self.tell(Delta::UidValidity(uid_validity));
        }
        if let Some(next_uid) = update.field(NEXT_UID_AT) {
            self.tell(Delta::NextUid(next_uid));
        }
    }
}

/// UIDs as ranges that neither overlap nor touch: first to last.
#[derive(Default)]
struct UidSet(BTreeMap<u32, u32>);

impl UidSet {
    /// Inserts the range. What of it was not in here, in order.
    fn insert(&mut self, range: UidRange) -> Vec<UidRange> {
        let mut new = Vec::new();
        let mut merged = range;
        // The first UID of the range that was not looked at. `None` if that is none of its own any more.
        let mut next = Some(range.first);
        for (first, last) in self.take_touched(range) {
            merged = UidRange { first: merged.first.min(first), last: merged.last.max(last) };
            if let Some(gap) = next.filter(|next| *next < first && *next <= range.last) {
                new.push(UidRange { first: gap, last: range.last.min(first - 1) });
            }
            next = next.and_then(|next| Some(next.max(last.checked_add(1)?)));
        }
        if let Some(gap) = next.filter(|next| *next <= range.last) {
            new.push(UidRange { first: gap, last: range.last });
        }
        self.0.insert(merged.first, merged.last);
        new
    }

    /// Takes out the ranges that overlap the given one, or that touch it.
    fn take_touched(&mut self, range: UidRange) -> Vec<(u32, u32)> {
        let mut touched = Vec::new();
        let before = range.first.saturating_sub(1);
        if let Some((&first, &last)) = self.0.range(..range.first).next_back().filter(|(_, last)| **last >= before) {
            touched.push((first, last));
        }
        touched.extend(self.0.range(range.first..=range.last.saturating_add(1)).map(|(first, last)| (*first, *last)));
        for (first, _) in &touched {
            self.0.remove(first);
        }
        touched
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u32, last: u32) -> UidRange {
        UidRange { first, last }
    }

    fn commit(external: bool, what: What) -> Commit {
        Commit { begin: 40, end: 60, records: vec![Record { offset: 40, external, sync: false, what }] }
    }

    fn expunge(external: bool, uid: u32, guid: u8) -> Commit {
        commit(external, What::ExpungeGuid(vec![ExpungeGuid { uid, guid_128: [guid; 16] }]))
    }

    fn expunged(first_uid: u32, last_uid: u32, guid: Option<[u8; 16]>) -> Delta {
        Delta::Expunge { first_uid, last_uid, guid }
    }

    #[test]
    fn an_expunge_that_was_asked_for_and_done_is_told_once() {
        let commits = [expunge(false, 5, 9), expunge(true, 5, 0), expunge(true, 6, 0)];
        assert_eq!(fold(&commits, |_| false), [expunged(5, 5, Some([9; 16])), expunged(6, 6, None)]);
    }

    #[test]
    fn an_expunge_that_we_asked_for_is_not_news_when_it_is_done() {
        let commits = [expunge(false, 5, 9), expunge(true, 5, 0)];
        assert_eq!(fold(&commits, |commit| !commit.records[0].external), []);
    }

    #[test]
    fn uids_are_new_again_under_another_uidvalidity() {
        let uid_validity = HeaderUpdate { offset: 24, data: vec![7, 0, 0, 0] };
        let commits = [expunge(true, 5, 0), commit(true, What::HeaderUpdate(vec![uid_validity])), expunge(true, 5, 0)];
        assert_eq!(fold(&commits, |_| false), [expunged(5, 5, None), Delta::UidValidity(7), expunged(5, 5, None)]);
    }

    #[test]
    fn a_range_tells_only_what_was_not_told() {
        let mut set = UidSet::default();
        assert_eq!(set.insert(range(5, 6)), [range(5, 6)]);
        assert_eq!(set.insert(range(9, 9)), [range(9, 9)]);
        assert_eq!(set.insert(range(1, u32::MAX)), [range(1, 4), range(7, 8), range(10, u32::MAX)]);
        assert_eq!(set.insert(range(u32::MAX, u32::MAX)), []);
        assert_eq!(set.0.len(), 1);
    }

    #[test]
    fn a_set_knows_what_a_set_of_single_uids_knows() {
        let mut state = 7_u32;
        for _ in 0..200 {
            let (mut set, mut single) = (UidSet::default(), std::collections::BTreeSet::new());
            for _ in 0..20 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let first = 1 + (state >> 16) % 40;
                let given = range(first, first + (state >> 8) % 8);
                let new: Vec<u32> = set.insert(given).into_iter().flat_map(|new| new.first..=new.last).collect();
                let expected: Vec<u32> = (given.first..=given.last).filter(|uid| single.insert(*uid)).collect();
                assert_eq!(new, expected);
            }
        }
    }

    #[test]
    fn internal_flags_are_not_told() {
        let update = |add, remove| FlagUpdate { first_uid: 1, last_uid: 2, add, remove, modseq_inc_flag: 1 };
        let told = |add, remove| fold([commit(true, What::FlagUpdate(vec![update(add, remove)]))], |_| false);
        assert_eq!(told(0x80, 0x60), []);
        assert_eq!(told(0xc8, 0xff), [Delta::Flags { first_uid: 1, last_uid: 2, add: 0x08, remove: 0x1f }]);
    }

    #[test]
    fn a_deleted_index_is_void_unless_it_stays_after_all() {
        let deleted = |external| commit(external, What::IndexDeleted);
        assert_eq!(fold([deleted(true)], |_| false), [Delta::Rebuilt]);
        assert_eq!(fold([deleted(false)], |_| false), []);
        assert_eq!(fold([deleted(true), commit(true, What::IndexUndeleted)], |_| false), []);
    }

    #[test]
    fn a_replaced_keyword_is_the_only_one() {
        let ranges = vec![range(1, 3)];
        let what = What::KeywordUpdate { modify: Modify::Replace, name: "Work".into(), ranges: ranges.clone() };
        let added = Delta::Keywords { add: true, name: "Work".into(), ranges: ranges.clone() };
        assert_eq!(fold([commit(true, what)], |_| false), [Delta::KeywordsReset { ranges }, added]);
    }
}
