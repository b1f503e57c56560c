//! The descent into one mailbox whose messages differ: which ranges to look at next, and what differs in the end.
//!
//! Both sides are asked the same. A range that is empty on one side is not looked into: all of it is told. Where bodies are compared, nothing
//! is known of them at first, and one question is about so many messages as are read in a short time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::digest::sorted_keywords;
use super::repair::{Apart, MoreFlags, Repair, Telling, What};
use super::{BodyHash, InRange, Mailbox, Message, Range};

/// A range that differs is divided into so many.
const PARTS: u32 = 16;
/// A range with no more messages than that on either side is listed.
const LISTED_MAX: u32 = 128;
/// Ranges in one question.
const ASKED_MAX: usize = 256;
/// Messages that one question brings at most, of ranges that did not grow.
const MESSAGES_ASKED_MAX: u32 = 4_096;
/// The same if their bodies are read, and UIDs in one question for digests of these.
const BODIES_ASKED_MAX: u32 = 1_024;
/// Ranges to which such a question leads at first, so that memory is bounded; then they are larger.
const PIECES_MAX: u32 = 65_536;

/// A question to both sides; its ranges are in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    Digests(Vec<Range>),
    Messages(Vec<Range>),
}

/// See the module.
#[derive(Debug)]
pub struct Descent {
    ours: Mailbox,
    theirs: Mailbox,
    /// Not known yet what is in there.
    unknown: VecDeque<Range>,
    /// They differ, and are short.
    short: VecDeque<(Range, u32)>,
    /// Only one side has something in them.
    only_ours: Vec<InRange>,
    only_theirs: Vec<InRange>,
    /// Messages that the other side does not have at this UID.
    unmatched_ours: Vec<Message>,
    unmatched_theirs: Vec<Message>,
    /// The same message at the same UID with other flags.
    flags: Vec<(Message, Message)>,
    /// And with other contents.
    apart: Vec<(Message, Message)>,
    bodies: bool,
}

impl Descent {
    /// `bodies`: contents are compared, too.
    pub fn new(ours: Mailbox, theirs: Mailbox, bodies: bool) -> Descent {
        // A UID that is not below UIDNEXT may have come meanwhile; it will be told by itself.
        let last = ours.uid_next.max(theirs.uid_next).saturating_sub(1).max(1);
        let whole = Range { first: 1, last };
        let mut descent = Descent {
            unknown: VecDeque::new(),
            short: VecDeque::new(),
            only_ours: Vec::new(),
            only_theirs: Vec::new(),
            unmatched_ours: Vec::new(),
            unmatched_theirs: Vec::new(),
            flags: Vec::new(),
            apart: Vec::new(),
            bodies,
            ours,
            theirs,
        };
        if bodies && descent.ours.messages > 0 && descent.theirs.messages > 0 {
            descent.unknown = pieces(whole, BODIES_ASKED_MAX.max(last.div_ceil(PIECES_MAX))).into();
            return descent;
        }
        let of = |mailbox: &Mailbox| InRange { range: whole, messages: mailbox.messages, digest: mailbox.digest };
        let (our, their) = (of(&descent.ours), of(&descent.theirs));
        descent.take_range(our, their);
        descent
    }

    /// The mailbox, as we have it.
    pub fn ours(&self) -> &Mailbox {
        &self.ours
    }

    /// And as they do.
    pub fn theirs(&self) -> &Mailbox {
        &self.theirs
    }

    /// Both are asked for bodies, too.
    pub fn has_bodies(&self) -> bool {
        self.bodies
    }

    /// What to ask both sides next; None: all is known.
    pub fn ask(&self) -> Option<Ask> {
        if !self.unknown.is_empty() {
            let mut uids = 0;
            let fits = |(at, range): &(usize, &Range)| {
                uids += u64::from(range.last - range.first) + 1;
                *at == 0 || !self.bodies || uids <= u64::from(BODIES_ASKED_MAX)
            };
            let ranges = self.unknown.iter().take(ASKED_MAX).enumerate().take_while(fits);
            let mut ranges: Vec<Range> = ranges.map(|(_, range)| *range).collect();
            ranges.sort();
            return Some(Ask::Digests(ranges));
        }
        let messages_max = if self.bodies { BODIES_ASKED_MAX } else { MESSAGES_ASKED_MAX };
        let mut messages = 0;
        let fits = |(at, (_, count)): &(usize, &(Range, u32))| {
            messages += count;
            *at == 0 || messages <= messages_max
        };
        let mut short: Vec<Range> =
            self.short.iter().take(ASKED_MAX).enumerate().take_while(fits).map(|(_, (range, _))| *range).collect();
        short.sort();
        (!short.is_empty()).then_some(Ask::Messages(short))
    }

    /// The answers to [`Ask::Digests`]. False: they do not fit to what was asked.
    pub fn take_digests(&mut self, ours: &[InRange], theirs: &[InRange]) -> bool {
        let Some(Ask::Digests(asked)) = self.ask() else { return false };
        let fit = |answers: &[InRange]| answers.iter().map(|answer| &answer.range).eq(asked.iter());
        if !fit(ours) || !fit(theirs) {
            return false;
        }
        self.unknown.drain(..asked.len());
        ours.iter().zip(theirs).for_each(|(our, their)| self.take_range(*our, *their));
        true
    }

    fn take_range(&mut self, our: InRange, their: InRange) {
        match (our.messages, their.messages) {
            _ if (our.messages, our.digest) == (their.messages, their.digest) => {}
            (_, 0) => self.only_ours.push(our),
            (0, _) => self.only_theirs.push(their),
            (ours, theirs) if ours.max(theirs) <= LISTED_MAX || our.range.first == our.range.last => {
                self.short.push_back((our.range, ours.max(theirs)));
            }
            _ => self.unknown.extend(divide(our.range)),
        }
    }

    /// The answers to [`Ask::Messages`], in order of their UIDs. False: they do not fit to what was asked.
    pub fn take_messages(&mut self, ours: &[Message], theirs: &[Message]) -> bool {
        let Some(Ask::Messages(asked)) = self.ask() else { return false };
        let is_asked = |uid: u32| asked.iter().any(|range| (range.first..=range.last).contains(&uid));
        let fit = |messages: &[Message]| {
            messages.windows(2).all(|two| two[0].uid < two[1].uid) && messages.iter().all(|m| is_asked(m.uid))
        };
        if !fit(ours) || !fit(theirs) {
            return false;
        }
        self.short.drain(..asked.len());
        let mut at_theirs: BTreeMap<u32, &Message> = theirs.iter().map(|message| (message.uid, message)).collect();
        for our in ours {
            match at_theirs.remove(&our.uid) {
                Some(their) if their.guid == our.guid => {
                    if has_other_contents(our, their) {
                        // They become two, each with its own flags.
                        self.apart.push((our.clone(), their.clone()));
                    } else if !has_same_flags(our, their) {
                        self.flags.push((our.clone(), their.clone()));
                    }
                }
                their => {
                    self.unmatched_ours.push(our.clone());
                    self.unmatched_theirs.extend(their.cloned());
                }
            }
        }
        self.unmatched_theirs.extend(at_theirs.into_values().cloned());
        true
    }

    /// What differs, when there is nothing more to ask.
    pub fn finish(mut self) -> Repair {
        let mut repair = Repair::default();
        let mut our = Telling { mailbox: self.ours.clone(), ..Default::default() };
        let mut their = Telling { mailbox: self.theirs.clone(), ..Default::default() };
        let path = self.ours.path.clone();
        self.match_by_guid(&path, &mut repair, &mut our, &mut their);
        for (ours, theirs) in &self.flags {
            compare_flags(&path, ours, theirs, (&mut our, &mut their), &mut repair);
        }
        for (ours, theirs) in &self.apart {
            let (here, there) = (short(&ours.body), short(&theirs.body));
            let detail = format!("GUID {}, SHA-256 {here} here and {there} there", ours.guid);
            repair.differ(&path, What::Body, ours.uid, detail);
            our.apart.push(Apart { uid: ours.uid, guid: ours.guid.clone() });
        }
        let sides = [
            (What::MailThere, &self.only_ours, &self.unmatched_ours, &mut our),
            (What::MailHere, &self.only_theirs, &self.unmatched_theirs, &mut their),
        ];
        for (what, ranges, messages, telling) in sides {
            for range in ranges {
                let Range { first, last } = range.range;
                repair.differ(&path, what, first, format!("{} messages, UIDs {first} to {last}", range.messages));
                repair.mails += u64::from(range.messages);
                telling.saves.push(range.range);
            }
            for message in messages {
                repair.differ(&path, what, message.uid, format!("GUID {}", message.guid));
                repair.mails += 1;
                telling.saves.push(Range { first: message.uid, last: message.uid });
            }
            telling.saves = joined(std::mem::take(&mut telling.saves));
        }
        let says = |telling: &Telling| telling.saves.len() + telling.flags.len() + telling.apart.len() > 0;
        repair.ours.extend(says(&our).then_some(our));
        repair.theirs.extend(says(&their).then_some(their));
        repair
    }

    /// A message that both have, at different UIDs. Of the copies that somebody made inside of the mailbox, the first is the
    /// first.
    fn match_by_guid(&mut self, path: &[String], repair: &mut Repair, our: &mut Telling, their: &mut Telling) {
        let mut theirs: BTreeMap<&str, VecDeque<&Message>> = BTreeMap::new();
        for message in &self.unmatched_theirs {
            theirs.entry(&message.guid).or_default().push_back(message);
        }
        let mut met_ours = BTreeSet::new();
        let mut met_theirs = BTreeSet::new();
        for ours in &self.unmatched_ours {
            let Some(theirs) = theirs.get_mut(ours.guid.as_str()).and_then(VecDeque::pop_front) else { continue };
            met_ours.insert(ours.uid);
            met_theirs.insert(theirs.uid);
            repair.differ(path, What::Uid, ours.uid, format!("GUID {}, and {} there", ours.guid, theirs.uid));
            let (telling, uid) = match ours.uid > theirs.uid {
                true => (&mut *our, ours.uid),
                false => (&mut *their, theirs.uid),
            };
            telling.saves.push(Range { first: uid, last: uid });
            if !has_same_flags(ours, theirs) {
                compare_flags(path, ours, theirs, (our, their), repair);
            }
        }
        self.unmatched_ours.retain(|message| !met_ours.contains(&message.uid));
        self.unmatched_theirs.retain(|message| !met_theirs.contains(&message.uid));
    }
}

fn divide(range: Range) -> Vec<Range> {
    pieces(range, (range.last - range.first).saturating_add(1).div_ceil(PARTS))
}

fn pieces(range: Range, length: u32) -> Vec<Range> {
    let length = u64::from(length.max(1));
    let mut parts = Vec::new();
    let mut first = u64::from(range.first);
    while first <= u64::from(range.last) {
        let last = (first + length - 1).min(u64::from(range.last));
        parts.push(Range { first: first as u32, last: last as u32 });
        first = last + 1;
    }
    parts
}

fn joined(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort();
    let mut joined: Vec<Range> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.first <= last.last.saturating_add(1) => last.last = last.last.max(range.last),
            _ => joined.push(range),
        }
    }
    joined
}

/// As far as both are known.
fn has_other_contents(one: &Message, other: &Message) -> bool {
    matches!((one.body, other.body), (Some(one), Some(other)) if one != other)
}

/// For people.
fn short(hash: &Option<BodyHash>) -> String {
    hash.iter().flat_map(|hash| &hash[..6]).map(|byte| format!("{byte:02x}")).collect()
}

fn has_same_flags(one: &Message, other: &Message) -> bool {
    one.flags == other.flags && sorted_keywords(&one.keywords) == sorted_keywords(&other.keywords)
}

/// Whose change was the last is not known any more: both get what either has.
fn compare_flags(
    path: &[String],
    ours: &Message,
    theirs: &Message,
    (our, their): (&mut Telling, &mut Telling),
    repair: &mut Repair,
) {
    let more = |one: &Message, other: &Message| {
        let known = sorted_keywords(&other.keywords);
        MoreFlags {
            uid: one.uid,
            guid: one.guid.clone(),
            flags: one.flags & !other.flags,
            keywords: (one.keywords.iter())
                .filter(|keyword| !known.contains(&keyword.to_ascii_lowercase()))
                .cloned()
                .collect(),
        }
    };
    let (here, there) = (more(ours, theirs), more(theirs, ours));
    let mut details = Vec::new();
    for (side, more, telling) in [("here", here, our), ("there", there, their)] {
        if more.flags == 0 && more.keywords.is_empty() {
            continue;
        }
        details.push(format!("only {side}: {}", names(&more)));
        telling.flags.push(more);
    }
    repair.differ(path, What::Flags, ours.uid, details.join(", "));
}

fn names(more: &MoreFlags) -> String {
    const NAMES: [&str; 5] = ["\\Answered", "\\Flagged", "\\Deleted", "\\Seen", "\\Draft"];
    let flags = NAMES.iter().enumerate().filter(|(bit, _)| more.flags & (1 << bit) != 0).map(|(_, name)| *name);
    flags.chain(more.keywords.iter().map(String::as_str)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
