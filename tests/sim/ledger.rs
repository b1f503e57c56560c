//! What clients were told, against which all servers are checked.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use dovetail::worker::storage::Guid;

use super::mailbox::Mailbox;

/// A flag (its bit) or a keyword.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Flag {
    System(u8),
    Keyword(String),
}

/// A mail that a client was told is stored, and its copies in the same mailbox.
#[derive(Default)]
struct Mail {
    saved: usize,
    /// By whose clients.
    saved_on: BTreeSet<usize>,
    /// Two servers may have expunged the same one.
    expunged: usize,
    /// What clients made of its flags: by which server, in which order.
    flags: BTreeMap<Flag, Vec<(usize, bool)>>,
}

/// Who is named by UIDVALIDITY and UID.
type Names = HashMap<(u32, u32), String>;

/// See the module.
#[derive(Default)]
pub struct Ledger {
    mails: BTreeMap<(String, Guid, String), Mail>,
    names: HashMap<(usize, String, String), Names>,
    uid_nexts: HashMap<(usize, String, String, u32), u32>,
    /// Mailboxes that somebody deleted, with the mails that were in them there.
    deleted: BTreeMap<(String, Guid), BTreeSet<String>>,
    /// The first invariant that did not hold.
    pub broken: Option<String>,
}

impl Ledger {
    fn breaks(&mut self, why: String) {
        self.broken.get_or_insert(why);
    }

    pub fn is_saved(&mut self, server: usize, user: &str, mailbox: &Guid, guid: &str) {
        let mail = self.mails.entry((user.into(), *mailbox, guid.into())).or_default();
        mail.saved += 1;
        mail.saved_on.insert(server);
    }

    pub fn is_expunged(&mut self, user: &str, mailbox: &Guid, guid: &str) {
        self.mails.entry((user.into(), *mailbox, guid.into())).or_default().expunged += 1;
    }

    pub fn is_flagged(&mut self, server: usize, user: &str, mailbox: &Guid, guid: &str, flag: Flag, is_set: bool) {
        let mail = self.mails.entry((user.into(), *mailbox, guid.into())).or_default();
        mail.flags.entry(flag).or_default().push((server, is_set));
    }

    pub fn is_deleted(&mut self, user: &str, mailbox: &Mailbox) {
        let mails = self.deleted.entry((user.into(), mailbox.guid)).or_default();
        mails.extend(mailbox.messages.values().map(|message| message.guid.clone()));
    }

    /// (UIDVALIDITY, UID) never names two messages, UIDNEXT only rises. Not while a worker moves messages back to a mailbox whose name
    /// they had before (`in_job`): in a maildir, each has a commit of its own.
    pub fn look(&mut self, server: usize, user: &str, name: &str, mailbox: &Mailbox, in_job: bool) {
        let mut wrong = None;
        let names = self.names.entry((server, user.into(), name.into())).or_default();
        for (uid, message) in &mailbox.messages {
            match names.get(&(mailbox.uid_validity, *uid)) {
                None => drop(names.insert((mailbox.uid_validity, *uid), message.guid.clone())),
                Some(guid) if *guid == message.guid => {}
                Some(guid) => {
                    wrong = Some(format!(
                        "in {name}, UIDVALIDITY {} UID {uid} was {guid} and is {}",
                        mailbox.uid_validity, message.guid
                    ));
                }
            }
        }
        let last = self.uid_nexts.entry((server, user.into(), name.into(), mailbox.uid_validity)).or_default();
        if mailbox.uid_next < *last && !in_job {
            wrong.get_or_insert(format!("in {name}, UIDNEXT fell from {last} to {}", mailbox.uid_next));
        }
        *last = mailbox.uid_next.max(*last);
        if let Some(wrong) = wrong {
            self.breaks(wrong);
        }
    }

    /// Somebody expunged it, or deleted a mailbox that it was in.
    fn has_gone(&self, user: &str, guid: &str) -> bool {
        let mut same = self.mails.iter().filter(|((of, _, other), _)| of == user && other == guid);
        let mut deleted = self.deleted.iter().filter(|((of, _), _)| of == user);
        same.any(|(_, mail)| mail.expunged > 0) || deleted.any(|(_, mails)| mails.contains(guid))
    }

    /// Whether a server has in the end what the clients were told.
    pub fn check(&self, user: &str, mailboxes: &BTreeMap<String, Mailbox>) -> Result<(), String> {
        for ((of, mailbox_guid, guid), mail) in &self.mails {
            if of != user {
                continue;
            }
            if self.deleted.contains_key(&(of.clone(), *mailbox_guid)) {
                // A save wins over a deletion that did not know it, in whichever mailbox it is then; until it goes from there.
                let is_it = |mailbox: &Mailbox| mailbox.messages.values().any(|message| message.guid == *guid);
                if mail.saved > 0 && !self.has_gone(user, guid) && !mailboxes.values().any(is_it) {
                    return Err(format!("mail {guid} is gone with its mailbox, which was deleted without it"));
                }
                continue;
            }
            let Some((name, mailbox)) = mailboxes.iter().find(|(_, mailbox)| mailbox.guid == *mailbox_guid) else {
                // It has become one with another, which has the mail.
                let is_it = |mailbox: &Mailbox| mailbox.messages.values().any(|message| message.guid == *guid);
                match self.has_gone(user, guid) || mailboxes.values().any(is_it) {
                    true => continue,
                    false => return Err(format!("mail {guid} and its mailbox are not there")),
                }
            };
            let found: Vec<_> = mailbox.messages.values().filter(|message| message.guid == *guid).collect();
            let count = found.len();
            // What was saved into a mailbox that has become one with this may be in it, too.
            let is_gone = |guid: &Guid| mailboxes.values().all(|mailbox| mailbox.guid != *guid);
            let joined =
                self.mails.iter().filter(|((user, into, other), _)| user == of && other == guid && is_gone(into));
            let saved = mail.saved + joined.map(|(_, mail)| mail.saved).sum::<usize>();
            let least = match (mail.expunged, mail.saved_on.len()) {
                // Copies that two servers made at once may have got one UID: then they are one.
                (0, _) => mail.saved.min(1),
                (_, 2..) => 0,
                (expunged, _) => usize::from(mail.saved > expunged),
            };
            let most = saved - mail.expunged.min(saved).min(1);
            match (saved, count) {
                (1, 0) if least == 1 => return Err(format!("mail {guid} is missing in {name}")),
                (1, 1) if most == 0 => return Err(format!("mail {guid} in {name} was expunged and is there")),
                _ if (least..=most).contains(&count) => {}
                (saved, _) => return Err(format!("mail {guid} is in {name} {count} times, was saved {saved} times")),
            }
            if mail.saved != 1 || count == 0 {
                continue;
            }
            for (flag, changes) in &mail.flags {
                let is_set = match flag {
                    Flag::System(bit) => found[0].flags & bit != 0,
                    Flag::Keyword(keyword) => found[0].keywords.contains(keyword),
                };
                // What each server's clients did last; which of these holds, clocks decide.
                let lasts = changes
                    .iter()
                    .enumerate()
                    .filter(|(at, change)| changes[at + 1..].iter().all(|later| later.0 != change.0));
                if lasts.into_iter().all(|(_, change)| change.1 != is_set) {
                    return Err(format!("mail {guid} in {name}: {flag:?} is {is_set}, which nobody set last"));
                }
            }
        }
        Ok(())
    }
}
