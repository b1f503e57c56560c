//! What is known of each index's transaction log: the byte ranges that commits said they wrote.
//!
//! The ranges of one log tile it, so a range that does not begin where the known ones end means that something was
//! written that nobody told us of, yet or ever. Guarantees bounded memory: the logs longest unused are forgotten, and
//! a forgotten log begins anew with whatever comes next. Pure; waiting is [`super::order`]'s job.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::wire::proto::Span;

/// Logs that are remembered, at most.
const LOGS_MAX: usize = 100_000;
/// Ranges of one log that are kept while something before them is missing.
const AHEAD_MAX: usize = 1_024;
/// Parts of one log that were read from the log itself, and are remembered.
const HEALED_MAX: usize = 8;
/// A first span that begins before this offset begins the file: the header (40 bytes on every version so far) and what
/// the storage writes with the file itself (72 bytes for sdbox) belong to no commit.
const FILE_BEGIN_MAX: u64 = 256;
/// With a file that follows on another nothing but the header is written.
const FILE_HEADER_MAX: u64 = 40;

/// The end of a log of which nothing is known.
const UNHEARD: Place = (0, 0);

/// Names one transaction log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LogId {
    user: String,
    pub mailbox_guid: Vec<u8>,
    private_user: String,
    pub index_id: u32,
}

impl LogId {
    /// A private (.pvt) index: nothing of it is replicated.
    pub fn is_private(&self) -> bool {
        !self.private_user.is_empty()
    }
}

/// File number and offset.
pub type Place = (u32, u64);

/// What must be known before something may go on: the log up to this place.
#[derive(Clone, Debug)]
pub struct Need {
    pub log: Arc<LogId>,
    pub place: Place,
    /// What was written there changed messages.
    pub touches: bool,
}

impl Need {
    pub fn of(span: &Span) -> Need {
        let log = LogId {
            user: span.user.clone(),
            mailbox_guid: span.mailbox_guid.clone(),
            private_user: span.private_user.clone(),
            index_id: span.index_id,
        };
        Need { log: Arc::new(log), place: (span.log_seq, span.begin), touches: span.touches }
    }
}

struct Ahead {
    end: u64,
    /// End of the previous file, if this range is the first in its own.
    previous: Option<Place>,
}

/// One log: known up to `end`, and what is known behind a hole.
struct Log {
    end: Place,
    ahead: BTreeMap<Place, Ahead>,
    /// What was read from the log itself, the last one last: whatever is told of it later is known.
    healed: Vec<(Place, Place)>,
    /// Nothing is known before it is read.
    is_lost: bool,
}

impl Log {
    fn insert(&mut self, span: &Span) {
        let previous = (span.prev_log_seq != 0).then_some((span.prev_log_seq, span.prev_log_end));
        let ahead = self.ahead.entry((span.log_seq, span.begin)).or_insert(Ahead { end: span.end, previous });
        ahead.end = ahead.end.max(span.end);
        self.advance();
    }

    fn advance(&mut self) {
        if self.is_lost {
            return;
        }
        while let Some((place, next)) = self.ahead.first_key_value() {
            if !self.follows(*place, next) {
                return;
            }
            self.end = self.end.max((place.0, next.end));
            self.ahead.pop_first();
        }
    }

    fn follows(&self, place: Place, next: &Ahead) -> bool {
        if place <= self.end {
            return true;
        }
        match next.previous {
            // Another process may have been the first to write to the new file.
            Some(previous) => place.0 > self.end.0 && previous <= self.end && place.1 <= FILE_HEADER_MAX,
            None => place.0 > self.end.0 && place.1 <= FILE_BEGIN_MAX,
        }
    }

    fn skip_to(&mut self, place: Place) {
        self.end = self.end.max(place);
        self.advance();
    }
}

/// See the module. Two generations of logs make the bound: when the young one is half of it, the old one goes.
pub struct Spans {
    young: HashMap<Arc<LogId>, Log>,
    old: HashMap<Arc<LogId>, Log>,
    logs_max: usize,
}

impl Default for Spans {
    fn default() -> Spans {
        Spans { young: HashMap::new(), old: HashMap::new(), logs_max: LOGS_MAX }
    }
}

impl Spans {
    /// Takes a span; its own [`Need`] is given along. The number of holes that were given up, for want of memory.
    pub fn insert(&mut self, span: &Span, need: &Need) -> u64 {
        if !self.knows(need) {
            // Somebody else may have written to a new mailbox before, who told nobody.
            let is_first = span.begin <= FILE_BEGIN_MAX && span.prev_log_seq == 0;
            let begins = is_first || !span.private_user.is_empty();
            self.recall(need, if begins { need.place } else { UNHEARD }, None);
        }
        let Some(log) = self.get(&need.log) else { return 0 };
        log.insert(span);
        if log.ahead.len() <= AHEAD_MAX {
            return 0;
        }
        if let Some(place) = log.ahead.first_key_value().map(|(place, _)| *place) {
            log.skip_to(place);
        }
        1
    }

    /// Whether the log is in memory.
    pub fn knows(&self, need: &Need) -> bool {
        self.young.contains_key(&need.log) || self.old.contains_key(&need.log)
    }

    /// The log is known up to `end` from the last start, and what of it was read from the log itself.
    pub fn recall(&mut self, need: &Need, end: Place, healed: Option<(Place, Place)>) {
        let healed = healed.into_iter().collect();
        self.young.insert(need.log.clone(), Log { end, ahead: BTreeMap::new(), healed, is_lost: false });
    }

    /// The log was read from one place to the other.
    pub fn heal(&mut self, need: &Need, from: Place, to: Place) {
        if !self.knows(need) {
            self.recall(need, to, None);
        }
        let Some(log) = self.get(&need.log) else { return };
        match log.healed.last_mut().filter(|(_, healed_to)| *healed_to >= from) {
            Some(last) => *last = (last.0.min(from), to),
            None => log.healed.push((from, to)),
        }
        if log.healed.len() > HEALED_MAX {
            log.healed.remove(0);
        }
        log.is_lost = false;
        log.skip_to(to);
    }

    /// What was last read from the log itself.
    pub fn healed(&self, need: &Need) -> Option<(Place, Place)> {
        self.young.get(&need.log).or_else(|| self.old.get(&need.log)).and_then(|log| log.healed.last().copied())
    }

    /// Whether the span is in a part that was read from the log.
    pub fn is_healed(&self, span: &Span, need: &Need) -> bool {
        let log = self.young.get(&need.log).or_else(|| self.old.get(&need.log));
        let mut healed = log.map_or(&[][..], |log| &log.healed).iter();
        healed.any(|(from, to)| *from <= need.place && (span.log_seq, span.end) <= *to)
    }

    /// Whether the log is known up to the span's end.
    pub fn is_known(&self, span: &Span, need: &Need) -> bool {
        let log = self.young.get(&need.log).or_else(|| self.old.get(&need.log));
        log.is_some_and(|log| log.end >= (span.log_seq, span.end))
    }

    /// What was told from this place on is given up: it is to be read from the log. Nothing is, of private indexes.
    pub fn set_back(&mut self, need: &Need) {
        if need.log.is_private() {
            self.give_up(need);
        } else if let Some(log) = self.get(&need.log) {
            log.end = log.end.min(need.place);
            log.ahead.clear();
        }
    }

    /// Another log is in the place of the one that was known: nothing of it is, until it is read.
    pub fn lose(&mut self, need: &Need) {
        self.recall(need, (0, 0), None);
        if let Some(log) = self.get(&need.log) {
            log.is_lost = true;
        }
    }

    /// Whether everything before the needed place is known. Of a log that was never seen nothing is missing.
    pub fn has(&self, need: &Need) -> bool {
        let log = self.young.get(&need.log).or_else(|| self.old.get(&need.log));
        log.is_none_or(|log| !log.is_lost && log.end >= need.place)
    }

    /// Gives up what is missing before the needed place. True if something was.
    pub fn give_up(&mut self, need: &Need) -> bool {
        if self.has(need) {
            return false;
        }
        if let Some(log) = self.get(&need.log) {
            log.skip_to(need.place);
        }
        true
    }

    fn get(&mut self, id: &Arc<LogId>) -> Option<&mut Log> {
        if self.young.len() >= self.logs_max / 2 {
            self.old = std::mem::take(&mut self.young);
        }
        if let Some((id, log)) = self.old.remove_entry(id) {
            self.young.insert(id, log);
        }
        self.young.get_mut(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(log_seq: u32, begin: u64, end: u64) -> Span {
        Span { user: "jane".into(), mailbox_guid: vec![1; 16], index_id: 5, log_seq, begin, end, ..Default::default() }
    }

    fn rotated(log_seq: u32, begin: u64, end: u64, prev_log_end: u64) -> Span {
        Span { prev_log_seq: log_seq - 1, prev_log_end, ..span(log_seq, begin, end) }
    }

    fn insert(spans: &mut Spans, span: &Span) -> bool {
        let need = Need::of(span);
        spans.insert(span, &need);
        spans.has(&need)
    }

    #[test]
    fn spans_follow_each_other_across_files() {
        let mut spans = Spans::default();
        assert!(insert(&mut spans, &span(2, 112, 600)), "a file's begin");
        assert!(insert(&mut spans, &span(2, 600, 700)));
        assert!(insert(&mut spans, &rotated(3, 40, 90, 700)));
        assert!(insert(&mut spans, &span(3, 90, 95)));
        assert!(insert(&mut spans, &span(4, 112, 120)), "a file's begin, without a link");
        assert!(insert(&mut spans, &span(2, 650, 700)), "a range that was known already");
    }

    #[test]
    fn the_first_that_a_process_writes_to_a_new_file_may_have_something_before_it() {
        let mut spans = Spans::default();
        insert(&mut spans, &span(2, 112, 600));
        let second = rotated(3, 90, 95, 600);
        assert!(!insert(&mut spans, &second), "whoever rotated it has not told");
        insert(&mut spans, &rotated(3, 40, 90, 600));
        assert!(spans.has(&Need::of(&second)));
    }

    #[test]
    fn what_was_read_from_a_log_stays_known_when_more_of_it_is_read() {
        let mut spans = Spans::default();
        insert(&mut spans, &span(2, 112, 600));
        let is_healed = |spans: &Spans, span: Span| spans.is_healed(&span, &Need::of(&span));
        spans.heal(&Need::of(&span(2, 600, 700)), (2, 600), (2, 700));
        insert(&mut spans, &span(2, 700, 900));
        spans.heal(&Need::of(&span(2, 900, 950)), (2, 900), (2, 950));
        assert!(is_healed(&spans, span(2, 650, 700)) && is_healed(&spans, span(2, 900, 950)));
        assert!(!is_healed(&spans, span(2, 700, 900)), "it was told");
        assert_eq!(spans.healed(&Need::of(&span(2, 0, 0))), Some(((2, 900), (2, 950))));
        for n in 1_000..2_000 {
            spans.heal(&Need::of(&span(2, 2 * n, 2 * n + 1)), (2, 2 * n), (2, 2 * n + 1));
        }
        assert!(!is_healed(&spans, span(2, 650, 700)), "it is bounded");
    }

    #[test]
    fn a_hole_is_noticed_and_filled_by_its_straggler() {
        let mut spans = Spans::default();
        insert(&mut spans, &span(2, 112, 600));
        let late = span(2, 700, 800);
        assert!(!insert(&mut spans, &late));
        assert!(insert(&mut spans, &span(2, 600, 700)));
        assert!(spans.has(&Need::of(&late)));
        assert!(!insert(&mut spans, &rotated(3, 40, 90, 900)), "the end of the previous file is missing");
        assert!(!insert(&mut spans, &span(4, 5000, 5100)), "the begin of the file is missing");
        assert!(insert(&mut spans, &span(2, 800, 900)));
        assert!(spans.has(&Need::of(&span(3, 90, 91))));
        assert!(!spans.has(&Need::of(&span(4, 5000, 5100))));
    }

    #[test]
    fn a_hole_that_is_given_up_holds_up_nothing_behind_it() {
        let mut spans = Spans::default();
        insert(&mut spans, &span(2, 112, 600));
        insert(&mut spans, &span(2, 700, 800));
        insert(&mut spans, &span(2, 800, 900));
        assert!(spans.give_up(&Need::of(&span(2, 700, 800))));
        assert!(!spans.give_up(&Need::of(&span(2, 800, 900))));
    }

    #[test]
    fn private_indexes_and_other_users_are_logs_of_their_own() {
        let mut spans = Spans::default();
        insert(&mut spans, &span(2, 112, 600));
        assert!(insert(&mut spans, &Span { private_user: "joe".into(), ..span(2, 900, 901) }));
        assert!(insert(&mut spans, &Span { user: "joe".into(), ..span(2, 40, 901) }));
        assert!(insert(&mut spans, &Span { index_id: 6, ..span(2, 40, 901) }));
        assert!(!insert(&mut spans, &span(2, 900, 901)));
    }

    #[test]
    fn what_is_first_heard_of_a_log_may_have_something_before_it() {
        let mut spans = Spans::default();
        let second = span(2, 500, 600);
        assert!(!insert(&mut spans, &second));
        assert!(insert(&mut spans, &span(2, 112, 500)));
        assert!(spans.has(&Need::of(&second)));
        let other = Span { user: "joe".into(), ..second };
        assert!(!insert(&mut spans, &other));
        spans.give_up(&Need::of(&other));
        assert!(spans.has(&Need::of(&other)));
        let rotated = Span { user: "jim".into(), prev_log_seq: 1, prev_log_end: 900, ..span(2, 40, 100) };
        assert!(!insert(&mut spans, &rotated));
    }

    #[test]
    fn memory_is_bounded() {
        let mut spans = Spans { logs_max: 100, ..Default::default() };
        for n in 0..1000 {
            insert(&mut spans, &Span { user: format!("user{n}"), ..span(2, 112, 600) });
            insert(&mut spans, &span(2, 112, 600));
        }
        assert!(spans.young.len() + spans.old.len() <= 101);
        assert!(!insert(&mut spans, &span(2, 601, 602)), "what is used is not forgotten");

        let mut given_up = 0;
        for n in 0..2 * AHEAD_MAX as u64 {
            let span = span(2, 10_000 + 10 * n, 10_001 + 10 * n);
            given_up += spans.insert(&span, &Need::of(&span));
        }
        assert_eq!(given_up, AHEAD_MAX as u64 + 1);
    }
}
