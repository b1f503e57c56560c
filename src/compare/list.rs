//! Which mailboxes and subscriptions two servers have of a user.

use std::collections::BTreeSet;

use super::repair::{Repair, Telling, What};
use super::{Mailbox, Range};

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

/// What differs at a glance, and where to look closer. A mailbox that is missing needs no closer look.
pub fn compare(ours: &List, theirs: &List) -> (Repair, Pairs) {
    let mut repair = Repair::default();
    let mut pairs = Vec::new();
    let mut met = BTreeSet::new();
    for our in &ours.mailboxes {
        let same_guid = theirs.mailboxes.iter().find(|their| their.guid == our.guid);
        let same_name = || theirs.mailboxes.iter().find(|their| their.path == our.path && !has(ours, &their.guid));
        match same_guid.or_else(same_name) {
            Some(their) => {
                met.insert(&their.guid);
                compare_pair(our, their, &mut repair, &mut pairs);
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

fn has(list: &List, guid: &[u8]) -> bool {
    list.mailboxes.iter().any(|mailbox| mailbox.guid == guid)
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

fn compare_pair(our: &Mailbox, their: &Mailbox, repair: &mut Repair, pairs: &mut Pairs) {
    let mut how = false;
    if our.path != their.path {
        repair.differ(&our.path, What::Name, 0, their.path.join("/"));
        let mailbox = our.clone();
        repair.ours.push(Telling { mailbox, was: their.path.clone(), ..Default::default() });
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
    if our.digest != their.digest || our.messages != their.messages {
        pairs.push((our.clone(), their.clone()));
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

    fn mailbox(guid: u8, name: &str, digest: u64) -> Mailbox {
        Mailbox { guid: vec![guid; 16], path: vec![name.into()], uid_validity: 1, uid_next: 3, messages: 2, digest }
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
        let (repair, pairs) = compare(&both, &both);
        assert!(repair.is_empty() && pairs.is_empty() && repair.ours.is_empty() && repair.theirs.is_empty());
    }

    #[test]
    fn what_is_missing_is_told_by_who_has_it() {
        let ours = list(&[mailbox(1, "INBOX", 7), mailbox(2, "Work", 8)], &["Work"]);
        let theirs = list(&[mailbox(1, "INBOX", 9), mailbox(3, "Play", 8)], &["Play"]);
        let (repair, pairs) = compare(&ours, &theirs);
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
        let (repair, pairs) = compare(&ours, &theirs);
        assert_eq!((found(&repair), pairs.len()), (vec![("Work".into(), What::Guid)], 0));
        assert!(repair.ours[0].create && repair.theirs[0].create);
    }

    #[test]
    fn a_name_that_is_taken_by_another_pair_is_no_match() {
        let ours = list(&[mailbox(1, "Work", 7)], &[]);
        let theirs = list(&[mailbox(2, "Work", 7), mailbox(1, "Old", 7)], &[]);
        let (repair, _) = compare(&ours, &theirs);
        assert_eq!(found(&repair), [("Work".into(), What::Name), ("Work".into(), What::MailboxHere)]);
    }

    #[test]
    fn the_higher_uidnext_is_told() {
        let ours = list(&[mailbox(1, "INBOX", 7)], &[]);
        let theirs = list(&[Mailbox { uid_next: 9, ..mailbox(1, "INBOX", 7) }], &[]);
        let (repair, _) = compare(&ours, &theirs);
        assert_eq!(found(&repair), [("INBOX".into(), What::UidNext)]);
        assert!(repair.ours.is_empty() && !repair.theirs[0].create && repair.theirs[0].saves.is_empty());
    }
}
