//! What differs, for people, and what each side must tell so that it does not any more.

use std::collections::{BTreeMap, BTreeSet};

use super::{Mailbox, Range};

/// Differences that are listed of one user; there may be more.
pub const DIFFERENCES_MAX: usize = 1_000;

/// What differs. "Here" is the server that compares, "there" its peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    MailboxHere,
    MailboxThere,
    Guid,
    Name,
    UidValidity,
    UidNext,
    MailHere,
    MailThere,
    Uid,
    Flags,
    Body,
    SubscriptionHere,
    SubscriptionThere,
}

impl What {
    /// For people: `..._missing_here` and so on.
    pub fn name(self) -> &'static str {
        match self {
            What::MailboxHere => "mailbox_missing_here",
            What::MailboxThere => "mailbox_missing_there",
            What::Guid => "mailbox_guid",
            What::Name => "mailbox_name",
            What::UidValidity => "uidvalidity",
            What::UidNext => "uidnext",
            What::MailHere => "mail_missing_here",
            What::MailThere => "mail_missing_there",
            What::Uid => "uid",
            What::Flags => "flags",
            What::Body => "body",
            What::SubscriptionHere => "subscription_missing_here",
            What::SubscriptionThere => "subscription_missing_there",
        }
    }
}

/// One thing that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    pub path: Vec<String>,
    pub what: What,
    /// 0: the mailbox.
    pub uid: u32,
    pub detail: String,
}

/// Flags that one message has on the side that tells of it, and not on the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoreFlags {
    pub uid: u32,
    pub guid: String,
    pub flags: u32,
    pub keywords: Vec<String>,
}

/// A message that has not the same contents on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Apart {
    pub uid: u32,
    pub guid: String,
}

/// What one side must tell of one mailbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Telling {
    /// As that side has it.
    pub mailbox: Mailbox,
    /// That it is there, and how.
    pub create: bool,
    pub saves: Vec<Range>,
    pub flags: Vec<MoreFlags>,
    /// One side is enough: whoever hears of it keeps what it has.
    pub apart: Vec<Apart>,
    /// Nothing else: that its name is subscribed to.
    pub subscribed: bool,
    /// Nothing else: that it has its name and not this one.
    pub was: Vec<String>,
}

/// What was found of one user.
#[derive(Clone, Debug, Default)]
pub struct Repair {
    pub differences: Vec<Difference>,
    pub ours: Vec<Telling>,
    pub theirs: Vec<Telling>,
    /// Messages that are missing on either side.
    pub mails: u64,
    /// Of all, also of those that are not listed.
    keys: Keys,
}

/// What differences are about, to find them again: for each path what, and which UID.
pub type Keys = BTreeMap<Vec<String>, BTreeSet<(What, u32)>>;

impl Repair {
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Differences, listed or not.
    pub fn count(&self) -> usize {
        self.keys.values().map(BTreeSet::len).sum()
    }

    /// There is more than is listed.
    pub fn is_cut_off(&self) -> bool {
        self.count() > self.differences.len()
    }

    pub fn differ(&mut self, path: &[String], what: What, uid: u32, detail: String) {
        match self.keys.get_mut(path) {
            Some(of_path) => of_path.insert((what, uid)),
            None => self.keys.entry(path.to_vec()).or_default().insert((what, uid)),
        };
        if self.differences.len() < DIFFERENCES_MAX {
            self.differences.push(Difference { path: path.to_vec(), what, uid, detail });
        }
    }

    /// Only what was found before, too: the rest may still be on its way. A message that is missing is told in any case: it is known
    /// again, and who expunged it says so.
    pub fn retain_known(&mut self, before: &Keys) {
        let is_known = |path: &[String], whats: &[What], uid: u32| {
            let of_path = before.get(path);
            of_path.is_some_and(|of_path| whats.iter().any(|what| of_path.contains(&(*what, uid))))
        };
        self.keys.retain(|path, keys| {
            keys.retain(|(what, uid)| is_known(path, &[*what], *uid));
            !keys.is_empty()
        });
        self.differences.retain(|difference| is_known(&difference.path, &[difference.what], difference.uid));
        let is_named = |path: &[String]| is_known(path, &[What::Name], 0);
        let is_to_be_told = |telling: &mut Telling| {
            let path = telling.mailbox.path.clone();
            let is_known = |whats: &[What], uid: u32| is_known(&path, whats, uid);
            if telling.create && !is_known(&[What::MailboxHere, What::MailboxThere, What::Guid, What::UidValidity], 0) {
                // It was made, or deleted, just now.
                return false;
            }
            telling.flags.retain(|more| is_known(&[What::Flags], more.uid));
            telling.apart.retain(|apart| is_known(&[What::Body], apart.uid));
            telling.subscribed &= is_known(&[What::SubscriptionHere, What::SubscriptionThere], 0);
            // Listed under the name that it has here.
            if !is_named(&path) && !is_named(&telling.was) {
                telling.was.clear();
            }
            let says_more = telling.create || telling.subscribed || !telling.was.is_empty();
            let of_messages = telling.saves.len() + telling.flags.len() + telling.apart.len();
            says_more || of_messages > 0 || is_known(&[What::UidNext], 0)
        };
        self.ours.retain_mut(is_to_be_told);
        self.theirs.retain_mut(is_to_be_told);
    }

    pub fn keys(&self) -> Keys {
        self.keys.clone()
    }

    /// What was found of one mailbox, too.
    pub fn add(&mut self, other: Repair) {
        self.mails += other.mails;
        for (path, keys) in other.keys {
            self.keys.entry(path).or_default().extend(keys);
        }
        let room = DIFFERENCES_MAX - self.differences.len();
        self.differences.extend(other.differences.into_iter().take(room));
        self.ours.extend(other.ours);
        self.theirs.extend(other.theirs);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::list::{self, List};
    use crate::merge::mailbox::Named;

    fn mailbox(guid: u8, name: &str) -> Mailbox {
        let (guid, path) = (vec![guid; 16], vec![name.into()]);
        Mailbox { guid, path, uid_validity: 1, uid_next: 3, messages: 2, digest: 7, ..Default::default() }
    }

    fn list(mailboxes: &[Mailbox], subscribed: &[&str]) -> List {
        let subscribed = subscribed.iter().map(|name| vec![(*name).to_owned()]).collect();
        List { mailboxes: mailboxes.to_vec(), subscribed }
    }

    fn found(ours: &List, theirs: &List) -> Repair {
        list::compare(ours, theirs, false).0
    }

    fn tells_nothing(repair: &Repair) -> bool {
        repair.is_empty() && repair.ours.is_empty() && repair.theirs.is_empty()
    }

    #[test]
    fn what_differs_only_the_second_time_is_not_told() {
        let before = list(&[mailbox(1, "Work")], &[]);
        let known = found(&before, &before).keys();
        for later in [
            list(&[mailbox(1, "Renamed")], &[]),
            list(&[], &[]),
            list(&[mailbox(1, "Work"), mailbox(2, "Made")], &[]),
            list(&[mailbox(1, "Work")], &["Work"]),
            list(&[Mailbox { uid_next: 4, ..mailbox(1, "Work") }], &[]),
        ] {
            for (ours, theirs) in [(&before, &later), (&later, &before)] {
                let mut repair = found(ours, theirs);
                assert!(!tells_nothing(&repair));
                repair.retain_known(&known);
                assert!(tells_nothing(&repair), "{repair:?}");
            }
        }
    }

    #[test]
    fn what_differs_twice_is_told() {
        let later = |name| Mailbox { named: Named { clock: 9, origin: "b".into() }, ..mailbox(4, name) };
        let ours = list(&[mailbox(1, "Work"), mailbox(2, "Here"), mailbox(4, "Old")], &["Work"]);
        let theirs = list(&[mailbox(1, "Renamed"), mailbox(3, "There"), later("New")], &["There"]);
        let known = found(&ours, &theirs).keys();
        let mut repair = found(&ours, &theirs);
        repair.retain_known(&known);
        let whole = found(&ours, &theirs);
        assert_eq!((repair.differences, repair.ours, repair.theirs), (whole.differences, whole.ours, whole.theirs));
    }

    #[test]
    fn of_more_differences_than_are_listed_all_must_be_there_twice() {
        let all: Vec<String> = (0..DIFFERENCES_MAX).map(|n| format!("{n:04}")).collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let (ours, before) = (list(&[mailbox(1, "Work")], &all), list(&[mailbox(1, "Work")], &[]));
        let deleted = list(&[], &[]);
        let known = found(&ours, &before).keys();
        let mut repair = found(&ours, &deleted);
        assert!(repair.is_cut_off());
        repair.retain_known(&known);
        assert_eq!((repair.count(), repair.ours.len()), (DIFFERENCES_MAX, DIFFERENCES_MAX), "it was deleted just now");
        assert!(repair.ours.iter().all(|telling| telling.subscribed));

        let mut other = found(&ours, &deleted);
        other.add(found(&ours, &deleted));
        assert_eq!((other.count(), other.differences.len()), (DIFFERENCES_MAX + 1, DIFFERENCES_MAX));
        let known = other.keys();
        other.retain_known(&known);
        assert!(other.is_cut_off() && other.ours.iter().any(|telling| telling.create), "it was deleted long ago");
    }
}
