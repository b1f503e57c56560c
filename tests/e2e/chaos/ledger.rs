//! What the clients know of their mails: how often each must be where, and may at most be.
//!
//! A mail has a token that nothing else has, and one client that copies, moves and expunges it. An answer that was not
//! received widens the range of what is right: such a mail may even appear later, when Dovecot finds its file. What is
//! outside of the range is a fault, told with the mail's story.

use std::collections::{BTreeMap, BTreeSet};

pub const TOKEN_HEADER: &str = "X-Chaos-Token";

/// What became of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    Refused,
    /// The answer was lost.
    Unknown,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Range {
    min: u32,
    max: u32,
}

impl Range {
    fn add(&mut self, count: u32, outcome: Outcome) {
        match outcome {
            Outcome::Done => *self = Range { min: self.min + count, max: self.max + count },
            Outcome::Unknown => self.max += count,
            Outcome::Refused => {}
        }
    }

    fn take(&mut self, count: u32, outcome: Outcome) {
        let less = self.min.saturating_sub(count);
        match outcome {
            Outcome::Done => *self = Range { min: less, max: self.max.saturating_sub(count) },
            Outcome::Unknown => self.min = less,
            Outcome::Refused => {}
        }
    }

    fn has(&self, count: u32) -> bool {
        (self.min..=self.max).contains(&count)
    }
}

pub struct Mail {
    pub user: usize,
    owner: usize,
    text: Vec<u8>,
    /// By the mailbox's id.
    places: BTreeMap<String, Range>,
    total: Range,
    story: Vec<String>,
}

/// A mailbox that a client made for itself.
#[derive(Clone)]
pub struct Extra {
    /// The name that it was made with; it may have another one now.
    pub id: String,
    pub user: usize,
    pub owner: usize,
    pub name: String,
    /// It was deleted, or what became of its deletion is not known.
    pub gone: bool,
}

#[derive(Default)]
pub struct Ledger {
    mails: BTreeMap<String, Mail>,
    pub extras: Vec<Extra>,
    next: u64,
    /// Of mailboxes that are not there any more, and may come back with all that was in them.
    may_be_back: BTreeSet<String>,
}

/// What a look into a mailbox should not have found.
pub struct Fault {
    pub text: String,
    /// A mail is there too often, and none is lost.
    pub is_more: bool,
}

impl Ledger {
    /// A mail of about this size; its text holds the token.
    pub fn write_mail(&mut self, user: usize, owner: usize, size: usize) -> (String, Vec<u8>) {
        self.next += 1;
        let token = format!("token-{:05}-{owner}", self.next);
        let mut text = format!(
            "From: sender@client.test\r\nTo: you@client.test\r\nSubject: chaos {token}\r\n\
             {TOKEN_HEADER}: {token}\r\n\r\nThis is {token}.\r\n"
        );
        for line in 0.. {
            if text.len() >= size {
                break;
            }
            text += &format!("{token} line {line} of a mail that is to arrive as it is, and once.\r\n");
        }
        let text = text.into_bytes();
        let (places, total, story) = Default::default();
        self.mails.insert(token.clone(), Mail { user, owner, text: text.clone(), places, total, story });
        (token, text)
    }

    /// Shares all mails and extra mailboxes out among the clients of a phase.
    pub fn share_out(&mut self, clients: usize) {
        self.mails.values_mut().enumerate().for_each(|(n, mail)| mail.owner = n % clients);
        self.extras.iter_mut().enumerate().for_each(|(n, extra)| extra.owner = n % clients);
    }

    pub fn owns(&self, owner: usize, token: &str) -> bool {
        self.mails.get(token).is_some_and(|mail| mail.owner == owner)
    }

    fn mail(&mut self, token: &str) -> &mut Mail {
        self.mails.get_mut(token).unwrap_or_else(|| panic!("{token} was never sent"))
    }

    pub fn arrives(&mut self, token: &str, count: u32, mailbox: &str, how: &str, outcome: Outcome) {
        let mail = self.mail(token);
        mail.places.entry(mailbox.to_owned()).or_default().add(count, outcome);
        mail.total.add(count, outcome);
        mail.story.push(format!("{how} to {mailbox}, {count}: {outcome:?}"));
    }

    pub fn moves(&mut self, token: &str, count: u32, from: &str, to: &str, outcome: Outcome) {
        let mail = self.mail(token);
        mail.places.entry(from.to_owned()).or_default().take(count, outcome);
        mail.places.entry(to.to_owned()).or_default().add(count, outcome);
        if outcome == Outcome::Unknown {
            // Dovecot itself, killed in between, has copied and not yet expunged.
            mail.total.max += count;
        }
        mail.story.push(format!("move from {from} to {to}, {count}: {outcome:?}"));
    }

    pub fn leaves(&mut self, token: &str, count: u32, mailbox: &str, outcome: Outcome) {
        let mail = self.mail(token);
        mail.places.entry(mailbox.to_owned()).or_default().take(count, outcome);
        mail.total.take(count, outcome);
        mail.story.push(format!("expunge in {mailbox}, {count}: {outcome:?}"));
    }

    /// A mailbox went with all that is in it.
    pub fn deleted(&mut self, id: &str, outcome: Outcome) {
        for mail in self.mails.values_mut() {
            let Some(range) = mail.places.get(id).copied().filter(|range| range.max > 0) else { continue };
            mail.places.entry(id.to_owned()).or_default().take(range.max, outcome);
            let sum = |of: fn(&Range) -> u32| mail.places.values().map(of).sum::<u32>();
            let (min, max) = (sum(|r| r.min), sum(|r| r.max));
            if outcome != Outcome::Refused {
                mail.total =
                    Range { min: mail.total.min.saturating_sub(range.max).max(min), max: mail.total.max.min(max) };
            }
            mail.story.push(format!("{id} deleted: {outcome:?}"));
        }
    }

    /// A look into a mailbox, by the only one who changes these mails: what is there is known then.
    pub fn seen(&mut self, user: usize, owner: usize, mailbox: &str, tokens: &[String]) -> Result<(), Fault> {
        let counts = count(tokens);
        if let Some(token) = counts.keys().find(|token| !self.mails.contains_key(**token)) {
            let text = format!("{mailbox} has {token}, which was never sent");
            return Err(Fault { text, is_more: false });
        }
        for (token, mail) in self.mails.iter_mut().filter(|(_, mail)| mail.user == user && mail.owner == owner) {
            let count = counts.get(token.as_str()).copied().unwrap_or(0);
            let range = mail.places.entry(mailbox.to_owned()).or_default();
            if !range.has(count) {
                let text = format!(
                    "{token} is {count} times in {mailbox} where it is written to, not {range:?}: {:#?}",
                    mail.story
                );
                return Err(Fault { text, is_more: count > range.max });
            }
            range.min = count;
            let (min, max) = mail.places.values().fold((0, 0), |(min, max), r| (min + r.min, max + r.max));
            mail.total = Range { min: mail.total.min.max(min), max: mail.total.max.min(max) };
        }
        Ok(())
    }

    /// What was deleted since these were gone may come back.
    pub fn brings_back(&mut self, since: &BTreeSet<String>) {
        self.may_be_back = self.gone().difference(since).cloned().collect();
    }

    /// Mailboxes that were deleted.
    pub fn gone(&self) -> BTreeSet<String> {
        self.extras.iter().filter(|extra| extra.gone).map(|extra| extra.id.clone()).collect()
    }

    /// All that a user has on a server, as (mailbox, token, text).
    pub fn check(&self, server: &str, user: usize, found: &[(String, String, Vec<u8>)]) {
        let mut faults = Vec::new();
        let mut by_token: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (mailbox, token, text) in found {
            if self.is_back(mailbox) {
                eprintln!("{token} is back on {server} in {mailbox}, which was deleted");
                continue;
            }
            by_token.entry(token).or_default().push(mailbox);
            match self.mails.get(token).filter(|mail| mail.user == user) {
                None => faults.push(format!("{mailbox} has {token:?}, which was never sent to this user")),
                // LMTP puts headers in front.
                Some(mail) if !text.ends_with(&mail.text) => {
                    faults.push(format!("{token} in {mailbox} has other bytes"))
                }
                Some(_) => {}
            }
        }
        for (token, mail) in self.mails.iter().filter(|(_, mail)| mail.user == user) {
            let mailboxes = by_token.remove(token.as_str()).unwrap_or_default();
            let mut wrong = !mail.total.has(mailboxes.len() as u32);
            let mut places = mail.places.clone();
            for name in &mailboxes {
                places.entry(self.id_of(user, name)).or_default();
            }
            for (id, range) in &places {
                let count = mailboxes.iter().filter(|name| self.id_of(user, name) == *id).count();
                wrong |= !range.has(count as u32);
            }
            if wrong {
                let Mail { places, total, story, .. } = mail;
                faults.push(format!("{token} is in {mailboxes:?}; must be: {places:?}, in all {total:?}; {story:#?}"));
            }
        }
        assert!(faults.is_empty(), "user {user} on {server}:\n{}", faults.join("\n"));
    }

    /// What is lost. For a user whose indexes Dovecot made anew: it may have found mails that were expunged, or some twice.
    pub fn lost(&self, user: usize, found: &[(String, String, Vec<u8>)]) -> Vec<String> {
        let of_user = self.mails.iter().filter(|(_, mail)| mail.user == user && mail.total.min > 0);
        of_user
            .filter(|(token, _)| !found.iter().any(|(mailbox, found, _)| found == *token && !self.is_back(mailbox)))
            .map(|(token, mail)| format!("{token}: {:#?}", mail.story))
            .collect()
    }

    /// Each name that a mailbox had is its id, with an end of its own.
    fn is_back(&self, name: &str) -> bool {
        self.may_be_back.contains(name.trim_end_matches('r'))
    }

    fn id_of(&self, user: usize, name: &str) -> String {
        let extra = self.extras.iter().find(|extra| extra.user == user && extra.name == name);
        extra.map_or(name, |extra| &extra.id).to_owned()
    }
}

fn count(tokens: &[String]) -> BTreeMap<&str, u32> {
    let mut counts = BTreeMap::new();
    tokens.iter().for_each(|token| *counts.entry(token.as_str()).or_default() += 1);
    counts
}
