//! Random pairs of mailboxes: what differs is found, and nothing else, and when both have told both are equal.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::digest::Digest;
use super::*;

/// By UID.
type Box = BTreeMap<u32, Message>;

fn message(uid: u32, guid: &str, flags: u32) -> Message {
    Message { uid, guid: guid.into(), flags, ..Default::default() }
}

fn mailbox(messages: &Box) -> Mailbox {
    let found = in_range(messages, Range { first: 1, last: u32::MAX });
    Mailbox {
        guid: vec![1; 16],
        path: vec!["INBOX".into()],
        uid_validity: 1,
        uid_next: messages.keys().last().map_or(1, |uid| uid + 1),
        messages: found.messages,
        digest: found.digest,
        ..Default::default()
    }
}

fn in_range(messages: &Box, range: Range) -> InRange {
    let mut digest = Digest::default();
    messages.range(range.first..=range.last).for_each(|(_, message)| digest.add(message));
    InRange { range, messages: digest.messages(), digest: digest.value() }
}

fn listed(messages: &Box, ranges: &[Range]) -> Vec<Message> {
    ranges.iter().flat_map(|range| messages.range(range.first..=range.last)).map(|(_, m)| m.clone()).collect()
}

/// What is found; and how many digests and messages crossed the wire for it.
fn compare(ours: &Box, theirs: &Box) -> (Repair, usize) {
    compare_with(ours, theirs, false)
}

fn compare_with(ours: &Box, theirs: &Box, bodies: bool) -> (Repair, usize) {
    let mut descent = Descent::new(mailbox(ours), mailbox(theirs), bodies);
    let mut crossed = 0;
    while let Some(ask) = descent.ask() {
        let is_taken = match ask {
            Ask::Digests(ranges) => {
                assert!(ranges.windows(2).all(|two| two[0].last < two[1].first), "{ranges:?}");
                crossed += ranges.len();
                let digests = |messages| ranges.iter().map(|range| in_range(messages, *range)).collect::<Vec<_>>();
                descent.take_digests(&digests(ours), &digests(theirs))
            }
            Ask::Messages(ranges) => {
                let theirs = listed(theirs, &ranges);
                crossed += theirs.len();
                descent.take_messages(&listed(ours, &ranges), &theirs)
            }
        };
        assert!(is_taken);
    }
    (descent.finish(), crossed)
}

/// As a worker does: what is there already by its GUID goes to the higher UID, what cannot have its UID goes behind.
fn tell(from: &Box, to: &mut Box, tellings: &[Telling]) {
    for telling in tellings {
        for (_, save) in telling.saves.iter().flat_map(|range| from.range(range.first..=range.last)) {
            let stands = to.values().find(|message| message.guid == save.guid).map(|message| message.uid);
            let (uid, message) = match stands.and_then(|uid| to.remove(&uid)) {
                Some(message) => (message.uid.max(save.uid), message),
                None => (save.uid, save.clone()),
            };
            let uid = if to.contains_key(&uid) { to.keys().last().map_or(1, |last| last + 1) } else { uid };
            to.insert(uid, Message { uid, ..message });
        }
        for more in &telling.flags {
            for message in to.values_mut().filter(|message| message.guid == more.guid) {
                message.flags |= more.flags;
                message.keywords.extend(more.keywords.clone());
            }
        }
    }
}

fn all(box_: &Box) -> Vec<(String, u32)> {
    let mut all: Vec<_> = box_.values().map(|message| (message.guid.clone(), message.flags)).collect();
    all.sort();
    all
}

fn boxes() -> impl Strategy<Value = (Box, Box)> {
    proptest::collection::btree_map(1u32..600, (0u32..32, 0u32..12), 0..400).prop_map(|all| {
        let (mut ours, mut theirs) = (Box::new(), Box::new());
        for (uid, (flags, kind)) in all {
            let guid = format!("g{uid}");
            if kind != 0 {
                ours.insert(uid, message(uid, &guid, flags));
            }
            match kind {
                1 => {}
                2 => drop(theirs.insert(uid, message(uid, &guid, flags ^ 8))),
                3 => drop(theirs.insert(uid + 700, message(uid + 700, &guid, flags))),
                4 => drop(theirs.insert(uid, message(uid, &format!("h{uid}"), flags))),
                _ => drop(theirs.insert(uid, message(uid, &guid, flags))),
            }
        }
        (ours, theirs)
    })
}

proptest! {
    #[test]
    fn what_both_tell_makes_both_equal_and_nothing_is_lost((ours, theirs) in boxes()) {
        let (repair, _) = compare(&ours, &theirs);
        let guids = |box_: &Box| box_.values().map(|m| m.guid.clone()).collect::<BTreeSet<_>>();
        let wanted: BTreeSet<String> = guids(&ours).union(&guids(&theirs)).cloned().collect();
        let (mut a, mut b) = (ours.clone(), theirs.clone());
        tell(&ours, &mut b, &repair.ours);
        tell(&theirs, &mut a, &repair.theirs);
        prop_assert_eq!(guids(&a), wanted.clone());
        prop_assert_eq!(guids(&b), wanted);
        prop_assert_eq!(all(&a), all(&b));
        for (uid, message) in &ours {
            // Flags are never taken away.
            let now = a.values().find(|m| m.guid == message.guid).expect("nothing is lost");
            prop_assert_eq!(now.flags & message.flags, message.flags, "{}", uid);
        }
        prop_assert_eq!(repair.is_empty(), ours == theirs);
    }

    #[test]
    fn what_is_found_differs((ours, theirs) in boxes()) {
        let (repair, _) = compare(&ours, &theirs);
        for difference in repair.differences.iter().filter(|difference| difference.detail.starts_with("GUID")) {
            let (ours, theirs) = (ours.get(&difference.uid), theirs.get(&difference.uid));
            prop_assert_ne!(ours, theirs, "{:?}", difference);
        }
    }
}

#[test]
fn one_flag_of_a_hundred_thousand_messages_is_found_with_little_on_the_wire() {
    let ours: Box = (1..=100_000).map(|uid| (uid, message(uid, &format!("g{uid}"), 0))).collect();
    let mut theirs = ours.clone();
    theirs.get_mut(&77_777).unwrap().flags = 8;
    let (repair, crossed) = compare(&ours, &theirs);
    let found: Vec<_> = repair.differences.iter().map(|d| (d.what, d.uid, d.detail.as_str())).collect();
    assert_eq!(found, [(What::Flags, 77_777, "only there: \\Seen")]);
    assert!((repair.ours.is_empty(), repair.theirs[0].flags.len()) == (true, 1));
    assert!(crossed < 200, "{crossed}");
}

#[test]
fn differences_all_over_a_large_mailbox_are_asked_for_in_order() {
    let ours: Box = (1..=60_000).map(|uid| (uid, message(uid, &format!("g{uid}"), 0))).collect();
    let mut theirs = ours.clone();
    theirs.values_mut().filter(|message| message.uid % 301 == 0).for_each(|message| message.flags = 1);
    let (repair, _) = compare(&ours, &theirs);
    assert_eq!(repair.differences.len(), 60_000 / 301);
}

#[test]
fn what_one_side_lacks_is_not_listed_message_by_message() {
    let ours: Box = (1..=50_000).map(|uid| (uid, message(uid, &format!("g{uid}"), 0))).collect();
    let (repair, crossed) = compare(&ours, &Box::new());
    assert_eq!((crossed, repair.mails, repair.differences.len()), (0, 50_000, 1));
    assert_eq!(repair.ours[0].saves, [Range { first: 1, last: 50_000 }]);
}

#[test]
fn a_copy_inside_of_the_mailbox_is_another_message() {
    let both: Box = [(1, message(1, "g", 0))].into();
    let mut ours = both.clone();
    ours.insert(5, message(5, "g", 0));
    let (repair, _) = compare(&ours, &both);
    let found: Vec<_> = repair.differences.iter().map(|d| (d.what, d.uid)).collect();
    assert_eq!(found, [(What::MailThere, 5)]);
}

#[test]
fn answers_that_were_not_asked_for_are_not_taken() {
    let ours: Box = (1..=10).map(|uid| (uid, message(uid, "g", 0))).collect();
    let theirs: Box = (1..=9).map(|uid| (uid, message(uid, "h", 0))).collect();
    let mut descent = Descent::new(mailbox(&ours), mailbox(&theirs), false);
    assert!(!descent.take_digests(&[], &[]));
    assert!(!descent.take_messages(&[message(99, "g", 0)], &[]));
    assert!(!descent.take_messages(&[message(2, "g", 0), message(1, "g", 0)], &[]));
    assert!(descent.take_messages(&listed(&ours, &[Range { first: 1, last: 10 }]), &[]));
}

/// Whose contents are their GUIDs, unless they are said.
fn with_bodies(messages: &Box, others: &[u32]) -> Box {
    let hash = |message: &Message| {
        let mut contents = crate::compare::digest::Contents::default();
        contents.push(message.guid.as_bytes());
        contents.push(if others.contains(&message.uid) { b" " } else { b"" });
        contents.finish()
    };
    messages.iter().map(|(uid, m)| (*uid, Message { body: Some(hash(m)), ..m.clone() })).collect()
}

#[test]
fn one_body_of_many_is_found_and_one_side_sets_it_apart() {
    let all: Box = (1..=5_000).map(|uid| (uid, message(uid, &format!("g{uid}"), 0))).collect();
    let (ours, mut theirs) = (with_bodies(&all, &[]), with_bodies(&all, &[3_333]));
    // Who has other contents has other flags by itself.
    theirs.get_mut(&3_333).unwrap().flags = 8;
    theirs.get_mut(&17).unwrap().flags = 8;
    let (repair, crossed) = compare_with(&ours, &theirs, true);
    let found: Vec<_> = repair.differences.iter().map(|d| (d.what, d.uid)).collect();
    assert_eq!(found, [(What::Flags, 17), (What::Body, 3_333)]);
    let detail = &repair.differences[1].detail;
    assert!(detail.starts_with("GUID g3333, SHA-256 ") && detail.ends_with(" there"), "{detail}");
    assert_eq!(repair.ours[0].apart, [Apart { uid: 3_333, guid: "g3333".into() }]);
    assert!(repair.theirs[0].apart.is_empty(), "one side is enough");
    assert!(crossed < 300, "{crossed}");

    let (repair, _) = compare_with(&ours, &with_bodies(&all, &[]), true);
    assert!(repair.is_empty());
    let (repair, _) = compare_with(&ours, &all, true);
    assert!(repair.is_empty(), "what is not known differs in nothing");
}

/// Who has no bodies has the same digests.
#[test]
fn without_bodies_nothing_is_asked_of_what_is_equal() {
    let all: Box = (1..=5_000).map(|uid| (uid, message(uid, &format!("g{uid}"), 0))).collect();
    let (repair, crossed) = compare(&all, &all.clone());
    assert_eq!((repair.is_empty(), crossed), (true, 0));
}

#[test]
fn questions_for_bodies_are_short_whatever_uids_there_are() {
    let few: Box = [1, 2, UID_HIGH].map(|uid| (uid, message(uid, &format!("g{uid}"), 0))).into();
    let mut descent = Descent::new(mailbox(&few), mailbox(&few), true);
    let mut questions = 0;
    while let Some(Ask::Digests(ranges)) = descent.ask() {
        let digests: Vec<InRange> = ranges.iter().map(|range| in_range(&few, *range)).collect();
        assert!(descent.take_digests(&digests, &digests));
        questions += 1;
    }
    assert!(questions <= PIECES_MAX as usize + 1, "{questions}");
    assert!(descent.finish().is_empty());
}

const UID_HIGH: u32 = u32::MAX - (1 << 21);
