//! What differs, for people, and what each side must tell so that it does not any more.

use std::collections::BTreeSet;

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

/// What one side must tell of one mailbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Telling {
    /// As that side has it.
    pub mailbox: Mailbox,
    /// That it is there, and how.
    pub create: bool,
    pub saves: Vec<Range>,
    pub flags: Vec<MoreFlags>,
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
    is_cut_off: bool,
}

/// What a difference is about, to find it again.
pub type Key = (Vec<String>, What, u32);

impl Repair {
    pub fn is_empty(&self) -> bool {
        self.differences.is_empty() && !self.is_cut_off
    }

    /// There is more than is listed.
    pub fn is_cut_off(&self) -> bool {
        self.is_cut_off
    }

    pub fn differ(&mut self, path: &[String], what: What, uid: u32, detail: String) {
        if self.differences.len() == DIFFERENCES_MAX {
            self.is_cut_off = true;
            return;
        }
        self.differences.push(Difference { path: path.to_vec(), what, uid, detail });
    }

    /// Only what was found before, too: the rest may still be on its way. A message that is missing is told in any case: it is known
    /// again, and who expunged it says so.
    pub fn retain_known(&mut self, before: &BTreeSet<Key>) {
        if self.is_cut_off {
            return;
        }
        let is_known = |path: &[String], whats: &[What], uid: u32| {
            whats.iter().any(|what| before.contains(&(path.to_vec(), *what, uid)))
        };
        self.differences.retain(|difference| is_known(&difference.path, &[difference.what], difference.uid));
        for telling in self.ours.iter_mut().chain(&mut self.theirs) {
            let path = telling.mailbox.path.clone();
            telling.flags.retain(|more| is_known(&path, &[What::Flags], more.uid));
            telling.subscribed &= is_known(&path, &[What::SubscriptionHere, What::SubscriptionThere], 0);
            if telling.create
                && !is_known(&path, &[What::MailboxHere, What::MailboxThere, What::Guid, What::UidValidity], 0)
            {
                // It was made, or deleted, just now.
                *telling = Telling::default();
            }
        }
        let is_something = |telling: &Telling| *telling != Telling::default();
        self.ours.retain(is_something);
        self.theirs.retain(is_something);
    }

    pub fn keys(&self) -> BTreeSet<Key> {
        self.differences.iter().map(|difference| (difference.path.clone(), difference.what, difference.uid)).collect()
    }

    /// What was found of one mailbox, too.
    pub fn add(&mut self, other: Repair) {
        self.mails += other.mails;
        self.is_cut_off |= other.is_cut_off;
        for difference in other.differences {
            self.differ(&difference.path, difference.what, difference.uid, difference.detail);
        }
        self.ours.extend(other.ours);
        self.theirs.extend(other.theirs);
    }
}
