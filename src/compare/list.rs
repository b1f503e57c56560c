//! Which mailboxes and subscriptions two servers have of a user.

use std::collections::{BTreeMap, BTreeSet};

use super::repair::{Repair, Telling, What};
use super::{Guid, Mailbox, Range};

/// All UIDs.
const ALL: Range = Range { first: 1, last: u32::MAX };

/// What one side has of a user.
#[derive(Clone, Debug, Default)]
pub struct List {
    pub mailboxes: Vec<Mailbox>,
    pub subscribed: BTreeSet<Vec<String>>,
}

/// Mailboxes that are one, or are to become one, and whose messages differ: ours and theirs.
pub type Pairs = Vec<(Mailbox, Mailbox)>;

/// What differs at a glance, and where to look closer: with `bodies`, at all that both have. A mailbox that is missing needs no closer
/// look.
pub fn compare(ours: &List, theirs: &List, bodies: bool) -> (Repair, Pairs) {
    let mut repair = Repair::default();
    let mut pairs = Vec::new();
    let mut met = BTreeSet::new();
    let our_guids: BTreeSet<&Guid> = ours.mailboxes.iter().map(|our| &our.guid).collect();
    let mut by_guid = BTreeMap::new();
    let mut by_name = BTreeMap::new();
    for their in &theirs.mailboxes {
        by_guid.entry(&their.guid).or_insert(their);
        if !our_guids.contains(&their.guid) {
            by_name.entry(&their.path).or_insert(their);
        }
    }
    for our in &ours.mailboxes {
        match by_guid.get(&our.guid).or_else(|| by_name.get(&our.path)) {
            Some(their) => {
                met.insert(&their.guid);
                compare_pair(our, their, &mut repair);
                let differs = our.digest != their.digest || our.messages != their.messages;
                if differs || bodies && our.messages > 0 {
                    pairs.push(((*our).clone(), (*their).clone()));
                }
            }
            None => missing(our, What::MailboxThere, &mut repair),
        }
    }
    for their in theirs.mailboxes.iter().filter(|their| !met.contains(&their.guid)) {
        missing(their, What::MailboxHere, &mut repair);
    }
    compare_subscriptions(ours, theirs, &mut repair);
    (repair, pairs)
}

fn missing(mailbox: &Mailbox, what: What, repair: &mut Repair) {
    repair.differ(&mailbox.path, what, 0, format!("{} messages", mailbox.messages));
    repair.mails += u64::from(mailbox.messages);
    let telling = Telling { mailbox: mailbox.clone(), create: true, saves: vec![ALL], ..Default::default() };
    match what {
        What::MailboxThere => repair.ours.push(telling),
        _ => repair.theirs.push(telling),
    }
}

fn compare_pair(our: &Mailbox, their: &Mailbox, repair: &mut Repair) {
    let mut how = false;
    if our.path != their.path {
        repair.differ(&our.path, What::Name, 0, their.path.join("/"));
        // The later name holds, whoever compares. If none is known to be, it is ours.
        let (side, last, other) = match their.named > our.named {
            true => (&mut repair.theirs, their, our),
            false => (&mut repair.ours, our, their),
        };
        side.push(Telling { mailbox: last.clone(), was: other.path.clone(), ..Default::default() });
    }
    if our.guid != their.guid {
        repair.differ(&our.path, What::Guid, 0, format!("{} and {}", hex(&our.guid), hex(&their.guid)));
        how = true;
    }
    if our.uid_validity != their.uid_validity {
        let detail = format!("{} and {}", our.uid_validity, their.uid_validity);
        repair.differ(&our.path, What::UidValidity, 0, detail);
        how = true;
    }
    if how {
        // Which of them stays is decided where it is told.
        for (side, mailbox) in [(&mut repair.ours, our), (&mut repair.theirs, their)] {
            side.push(Telling { mailbox: mailbox.clone(), create: true, ..Default::default() });
        }
    }
    if our.uid_next != their.uid_next && our.digest == their.digest && our.messages == their.messages {
        repair.differ(&our.path, What::UidNext, 0, format!("{} and {}", our.uid_next, their.uid_next));
        let (side, mailbox) = match our.uid_next > their.uid_next {
            true => (&mut repair.ours, our),
            false => (&mut repair.theirs, their),
        };
        side.push(Telling { mailbox: mailbox.clone(), ..Default::default() });
    }
}

fn compare_subscriptions(ours: &List, theirs: &List, repair: &mut Repair) {
    let telling = |path: &Vec<String>| Telling {
        mailbox: Mailbox { path: path.clone(), ..Default::default() },
        subscribed: true,
        ..Default::default()
    };
    for path in ours.subscribed.difference(&theirs.subscribed) {
        repair.differ(path, What::SubscriptionThere, 0, String::new());
        repair.ours.push(telling(path));
    }
    for path in theirs.subscribed.difference(&ours.subscribed) {
        repair.differ(path, What::SubscriptionHere, 0, String::new());
        repair.theirs.push(telling(path));
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::mailbox::Named;

    fn mailbox(guid: u8, name: &str, digest: u64) -> Mailbox {
        let (guid, path) = (vec![guid; 16], vec![name.into()]);
        Mailbox { guid, path, uid_validity: 1, uid_next: 3, messages: 2, digest, ..Default::default() }
    }

    fn list(mailboxes: &[Mailbox], subscribed: &[&str]) -> List {
        let subscribed = subscribed.iter().map(|name| vec![(*name).to_owned()]).collect();
        List { mailboxes: mailboxes.to_vec(), subscribed }
    }

    fn found(repair: &Repair) -> Vec<(String, What)> {
        repair.differences.iter().map(|difference| (difference.path.join("/"), difference.what)).collect()
    }

    #[test]
    fn equal_lists_do_not_differ() {
        let both = list(&[mailbox(1, "INBOX", 7), mailbox(2, "Work", 8)], &["Work"]);
        let (repair, pairs) = compare(&both, &both, false);
        assert!(repair.is_empty() && pairs.is_empty() && repair.ours.is_empty() && repair.theirs.is_empty());
    }

    #[test]
    fn what_is_missing_is_told_by_who_has_it() {
        let ours = list(&[mailbox(1, "INBOX", 7), mailbox(2, "Work", 8)], &["Work"]);
        let theirs = list(&[mailbox(1, "INBOX", 9), mailbox(3, "Play", 8)], &["Play"]);
        let (repair, pairs) = compare(&ours, &theirs, false);
        assert_eq!(pairs, [(mailbox(1, "INBOX", 7), mailbox(1, "INBOX", 9))]);
        assert_eq!(
            found(&repair),
            [
                ("Work".into(), What::MailboxThere),
                ("Play".into(), What::MailboxHere),
                ("Work".into(), What::SubscriptionThere),
                ("Play".into(), What::SubscriptionHere),
            ]
        );
        let names = |side: &[Telling]| side.iter().map(|t| t.mailbox.path.join("/")).collect::<Vec<_>>();
        assert_eq!((names(&repair.ours), names(&repair.theirs)), (vec!["Work".into(); 2], vec!["Play".into(); 2]));
        assert_eq!(repair.mails, 4);
    }

    #[test]
    fn two_mailboxes_of_one_name_are_compared_as_one_and_both_are_told() {
        let ours = list(&[mailbox(1, "Work", 7)], &[]);
        let theirs = list(&[mailbox(2, "Work", 7)], &[]);
        let (repair, pairs) = compare(&ours, &theirs, false);
        assert_eq!((found(&repair), pairs.len()), (vec![("Work".into(), What::Guid)], 0));
        assert!(repair.ours[0].create && repair.theirs[0].create);
    }

    #[test]
    fn a_name_that_is_taken_by_another_pair_is_no_match() {
        let ours = list(&[mailbox(1, "Work", 7)], &[]);
        let theirs = list(&[mailbox(2, "Work", 7), mailbox(1, "Old", 7)], &[]);
        let (repair, _) = compare(&ours, &theirs, false);
        assert_eq!(found(&repair), [("Work".into(), What::Name), ("Work".into(), What::MailboxHere)]);
    }

    /// The relay's thread has nothing else to do meanwhile; each against each takes minutes.
    #[test]
    fn as_many_names_as_a_peer_may_send_are_compared_in_a_moment() {
        let named = |side: &str, guid_from: u32| {
            let mailbox = |n: u32| Mailbox {
                guid: (guid_from + n).to_be_bytes().repeat(4),
                path: vec![format!("{side}{n}")],
                ..Default::default()
            };
            List { mailboxes: (0..100_000).map(mailbox).collect(), ..Default::default() }
        };
        let (repair, pairs) = compare(&named("Work", 0), &named("Play", 500_000), false);
        assert_eq!((repair.ours.len(), repair.theirs.len(), pairs.len()), (100_000, 100_000, 0));
    }

    #[test]
    fn of_two_names_the_later_is_told() {
        let named = |name, clock, origin: &str| {
            let named = Named { clock, origin: origin.into() };
            list(&[Mailbox { named, ..mailbox(1, name, 7) }], &[])
        };
        let told = |ours, theirs| {
            let (repair, _) = compare(&ours, &theirs, false);
            assert_eq!(found(&repair)[0].1, What::Name);
            let told = |side: &[Telling]| side.iter().map(|t| (t.mailbox.path.join("/"), t.was.join("/"))).collect();
            let (ours, theirs): (Vec<_>, Vec<_>) = (told(&repair.ours), told(&repair.theirs));
            assert_eq!(ours.len() + theirs.len(), 1);
            [ours, theirs].concat().remove(0)
        };
        let (new, old) = (|| named("New", 9, "a"), || named("Old", 5, "b"));
        for (name, was) in [told(new(), old()), told(old(), new())] {
            assert_eq!((name.as_str(), was.as_str()), ("New", "Old"));
        }
        // Of the same time, and if nothing is known.
        assert_eq!(told(named("Ours", 5, "a"), named("Theirs", 5, "a")), ("Ours".into(), "Theirs".into()));
        assert_eq!(told(named("Ours", 0, ""), named("Theirs", 5, "a")), ("Theirs".into(), "Ours".into()));
    }

    #[test]
    fn the_higher_uidnext_is_told() {
        let ours = list(&[mailbox(1, "INBOX", 7)], &[]);
        let theirs = list(&[Mailbox { uid_next: 9, ..mailbox(1, "INBOX", 7) }], &[]);
        let (repair, _) = compare(&ours, &theirs, false);
        assert_eq!(found(&repair), [("INBOX".into(), What::UidNext)]);
        assert!(repair.ours.is_empty() && !repair.theirs[0].create && repair.theirs[0].saves.is_empty());
    }
}
