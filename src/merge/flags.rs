//! Which of two changes to the same flags holds, when servers made them before they had talked.
//!
//! Changes are deltas: flags and keywords added and removed. Of different ones all hold; of the same one on the same message the
//! change with the later clock, or, of one clock, the one of the server whose name sorts last. The clocks are hybrid logical
//! clocks: who had seen a change has a later one. So a server that gets a change applies what of it no later change has
//! touched, whatever order they come in.

use std::collections::BTreeSet;

/// Messages: from one UID to another, or one with its GUID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    pub first: u32,
    pub last: u32,
    /// Empty: the UIDs name them.
    pub guid: String,
}

/// What happens to the flags of some messages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Update {
    pub messages: Vec<Range>,
    pub add: u32,
    pub remove: u32,
    pub add_keywords: BTreeSet<String>,
    pub remove_keywords: BTreeSet<String>,
}

impl Range {
    /// The part of it that is also in the other. A message with a GUID stays one.
    fn common(&self, other: &Range) -> Option<Range> {
        match (self.guid.is_empty(), other.guid.is_empty()) {
            (false, false) => (self.guid == other.guid).then(|| self.clone()),
            (false, true) => (other.first..=other.last).contains(&self.first).then(|| self.clone()),
            (true, false) => (self.first..=self.last).contains(&other.first).then(|| other.clone()),
            (true, true) => {
                let (first, last) = (self.first.max(other.first), self.last.min(other.last));
                (first <= last).then(|| Range { first, last, guid: String::new() })
            }
        }
    }

    /// What is left of it.
    fn without(&self, other: &Range) -> Vec<Range> {
        let Some(common) = self.common(other) else { return vec![self.clone()] };
        if !self.guid.is_empty() {
            return vec![];
        }
        let below = common.first.checked_sub(1).filter(|last| self.first <= *last).map(|last| (self.first, last));
        let above = common.last.checked_add(1).filter(|first| *first <= self.last).map(|first| (first, self.last));
        let range = |(first, last)| Range { first, last, guid: String::new() };
        below.into_iter().chain(above).map(range).collect()
    }
}

impl Update {
    fn touches_nothing(&self) -> bool {
        self.add | self.remove == 0 && self.add_keywords.is_empty() && self.remove_keywords.is_empty()
    }

    /// This one's values of the flags for which `of` is true.
    fn masked(&self, messages: Vec<Range>, flags: u32, keyword: impl Fn(&String) -> bool) -> Update {
        let some = |keywords: &BTreeSet<String>| keywords.iter().filter(|name| keyword(name)).cloned().collect();
        Update {
            messages,
            add: self.add & flags,
            remove: self.remove & flags,
            add_keywords: some(&self.add_keywords),
            remove_keywords: some(&self.remove_keywords),
        }
    }

    fn touches(&self, keyword: &String) -> bool {
        self.add_keywords.contains(keyword) || self.remove_keywords.contains(keyword)
    }

    /// What this one does to the flags that the other one touches, too, of messages that both name. None: nothing.
    pub fn common(&self, other: &Update) -> Option<Update> {
        let common = self.masked(vec![], other.add | other.remove, |keyword| other.touches(keyword));
        if common.touches_nothing() {
            return None;
        }
        let pairs = self.messages.iter().flat_map(|mine| other.messages.iter().map(move |theirs| (mine, theirs)));
        let messages: Vec<Range> = pairs.filter_map(|(mine, theirs)| mine.common(theirs)).collect();
        (!messages.is_empty()).then_some(Update { messages, ..common })
    }

    /// What is left of it where `later` holds, which came after it.
    pub fn without(self, later: &Update) -> Vec<Update> {
        let Some(Update { messages: both, .. }) = self.common(later) else { return vec![self] };
        let apart = both
            .iter()
            .fold(self.messages.clone(), |left, range| left.iter().flat_map(|mine| mine.without(range)).collect());
        let rest = self.masked(both, !(later.add | later.remove), |keyword| !later.touches(keyword));
        let apart = Update { messages: apart, ..self };
        [apart, rest].into_iter().filter(|update| !update.messages.is_empty() && !update.touches_nothing()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn uids(first: u32, last: u32) -> Range {
        Range { first, last, guid: String::new() }
    }

    fn named(uid: u32, guid: &str) -> Range {
        Range { first: uid, last: uid, guid: guid.into() }
    }

    fn keywords(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn of_different_flags_both_hold() {
        let earlier = Update { messages: vec![uids(1, 9)], add: 1, ..Default::default() };
        let later = Update { messages: vec![uids(1, 9)], remove: 2, ..Default::default() };
        assert_eq!(earlier.clone().without(&later), [earlier]);
    }

    #[test]
    fn of_the_same_flag_the_later_holds_on_the_messages_that_it_names() {
        let earlier = Update { messages: vec![uids(1, 9), named(20, "x")], add: 3, ..Default::default() };
        let later =
            Update { messages: vec![uids(4, 5), named(8, "eight"), named(30, "x")], remove: 1, ..Default::default() };
        assert_eq!(
            earlier.without(&later),
            [
                Update { messages: vec![uids(1, 3), uids(6, 7), uids(9, 9)], add: 3, ..Default::default() },
                Update { messages: vec![uids(4, 5), named(8, "eight"), named(20, "x")], add: 2, ..Default::default() },
            ]
        );
    }

    #[test]
    fn keywords_are_flags_like_any_other() {
        let earlier = Update {
            messages: vec![uids(1, 1)],
            add_keywords: keywords(&["a", "b"]),
            remove_keywords: keywords(&["c"]),
            ..Default::default()
        };
        let later = Update { messages: vec![uids(1, 1)], remove_keywords: keywords(&["b", "c"]), ..Default::default() };
        let left = Update { messages: vec![uids(1, 1)], add_keywords: keywords(&["a"]), ..Default::default() };
        assert_eq!(earlier.clone().without(&later), [left]);
        assert_eq!(earlier.common(&later).unwrap().add_keywords, keywords(&["b"]));
        assert_eq!(earlier.without(&Update { messages: vec![uids(1, 1)], ..later.clone() }).len(), 1);
        assert_eq!(later.common(&Update::default()), None);
    }

    /// The flags of messages 1 to 6.
    type State = BTreeMap<(u32, u32), bool>;

    fn apply(state: &mut State, update: &Update) {
        for range in &update.messages {
            for uid in range.first..=range.last {
                for bit in (0..3).map(|n| 1 << n).filter(|bit| (update.add | update.remove) & bit != 0) {
                    state.insert((uid, bit), update.add & bit != 0);
                }
            }
        }
    }

    fn any_update() -> impl Strategy<Value = Update> {
        (1..=6u32, 0..4u32, 0..8u32, 0..8u32).prop_map(|(first, more, add, remove)| Update {
            messages: vec![uids(first, (first + more).min(6))],
            add: add & !remove,
            remove,
            ..Default::default()
        })
    }

    /// A change with its clock and the server that made it.
    type Made = (u64, usize, Update);

    /// By server, in the order in which it made them. Two servers may have one clock; one never has a clock twice.
    fn made(changes: Vec<(usize, bool, Update)>, servers: usize) -> Vec<Vec<Made>> {
        let (mut clock, mut of) = (0, vec![Vec::<Made>::new(); servers]);
        for (at, is_later, update) in changes {
            let at = at % servers;
            clock += u64::from(is_later || of[at].last().is_some_and(|(last, ..)| *last == clock));
            of[at].push((clock, at, update));
        }
        of
    }

    /// What a server has in the end that gets all changes in the order of these choices: whose next one, or an earlier one again.
    fn in_the_end(of: &[Vec<Made>], choices: impl Iterator<Item = (usize, bool)>) -> State {
        let (mut state, mut had, mut next) = (State::new(), Vec::<Made>::new(), vec![0; of.len()]);
        for (whose, again) in choices {
            let at = next[whose];
            let Some(change) = of[whose].get(if again { at / 2 } else { at }).filter(|_| !again || at > 0) else {
                continue;
            };
            let (clock, origin, update) = change.clone();
            let later = had.iter().filter(|(other, of, _)| (*other, *of) > (clock, origin));
            let left = later.fold(vec![update], |left, (_, _, later)| {
                left.into_iter().flat_map(|update| update.without(later)).collect()
            });
            left.iter().for_each(|update| apply(&mut state, update));
            if !again {
                next[whose] += 1;
                had.push(change.clone());
            }
        }
        assert_eq!(had.len(), of.iter().map(Vec::len).sum::<usize>());
        state
    }

    proptest! {
        /// Servers with changes of their own, each in order of its clock, which get the others' in any interleaving, some of them
        /// again.
        #[test]
        fn all_servers_end_equal(
            servers in 2..=5usize,
            changes in proptest::collection::vec((0..5usize, any::<bool>(), any_update()), 1..12),
            choices in proptest::collection::vec((0..5usize, proptest::bool::weighted(0.2)), 200),
        ) {
            let of = made(changes, servers);
            let mut in_order: Vec<Made> = of.concat();
            in_order.sort_by_key(|(clock, origin, _)| (*clock, *origin));
            let mut expected = State::new();
            in_order.iter().for_each(|(_, _, update)| apply(&mut expected, update));
            for server in 0..servers {
                let rest = (0..servers).cycle().take(servers * 12).map(|whose| (whose, false));
                let choices = choices.iter().map(|(whose, again)| ((whose + server) % servers, *again));
                prop_assert_eq!(&in_the_end(&of, choices.chain(rest)), &expected);
            }
        }
    }
}
