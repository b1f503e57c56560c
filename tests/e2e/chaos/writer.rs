//! A client at work: it plays its steps and writes down what it knows of their outcome.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard};

use super::client::{deliver, literal, Answer, Appended, Imap, Lost};
use super::faults::Progress;
use super::ledger::{Extra, Ledger, Outcome, TOKEN_HEADER};
use super::plan::{Step, What, MAILBOXES};
use crate::cluster::Server;

pub struct Writer<'a> {
    pub server: &'a Server,
    /// All of them: what Dovecot makes of an index on one comes to the others.
    pub servers: &'a [Server],
    pub users: &'a [String],
    pub ledger: &'a Mutex<Ledger>,
    pub progress: &'a Progress,
    pub number: usize,
    /// Index of the server.
    pub side: usize,
    /// The other server is written to as well.
    pub both: bool,
    pub connections: BTreeMap<usize, Imap>,
}

/// A mailbox as the ledger and as the server know it.
struct Mailbox {
    id: String,
    name: String,
}

fn outcome(answer: &Result<Answer, Lost>, what: &str) -> Outcome {
    match answer {
        Ok(answer) if answer.is_ok() => Outcome::Done,
        // Nothing that these clients ask for is forbidden; an error inside of the server may have come at any moment.
        Ok(answer) => {
            eprintln!("{what} was answered {}", answer.result);
            Outcome::Unknown
        }
        Err(Lost) => Outcome::Unknown,
    }
}

impl Writer<'_> {
    pub fn play(mut self, steps: &[Step]) {
        let _at_the_end = self.progress.client();
        for step in steps {
            self.step(step);
            self.progress.step();
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The same connection goes on until it is lost.
    fn ask<T>(&mut self, user: usize, command: impl FnOnce(&mut Imap) -> Result<T, Lost>) -> Result<T, Lost> {
        let (server, name) = (self.server, &self.users[user]);
        let imap = self.connections.entry(user).or_insert_with(|| Imap::login(server, name));
        let answer = command(imap);
        if answer.is_err() {
            self.connections.remove(&user);
        }
        answer
    }

    fn step(&mut self, Step { user, what }: &Step) {
        let user = *user;
        match what {
            What::Deliver { size } => self.deliver(user, *size),
            What::Append { mailbox, flags, sizes } => self.append(user, *mailbox, flags, sizes),
            What::Flags { mailbox, pick, count, change } => {
                let mailbox = self.mailbox(user, *mailbox, *pick);
                let Some(mails) = self.select(user, &mailbox) else { return };
                if let Some((uids, _)) = chosen(&mails, *pick, *count) {
                    let answer = self.ask(user, |imap| imap.command(&format!("UID STORE {uids} {change}")));
                    outcome(&answer, "STORE");
                }
            }
            What::Copy { from, to, pick, count } => self.copy(user, (*from, *to), *pick, *count, "COPY"),
            What::Move { from, to, pick, count } => self.copy(user, (*from, *to), *pick, *count, "MOVE"),
            What::Expunge { mailbox, pick, count } => self.expunge(user, *mailbox, *pick, *count),
            What::Create { below, subscribe } => self.create(user, *below, *subscribe),
            What::Rename { pick } => self.rename(user, *pick),
            What::Delete { pick } => self.delete(user, *pick),
            What::Subscribe { pick, on } => {
                let name = self.mailbox(user, (*pick % 4) as usize, *pick).name;
                let verb = if *on { "SUBSCRIBE" } else { "UNSUBSCRIBE" };
                outcome(&self.ask(user, |imap| imap.command(&format!("{verb} {name}"))), verb);
            }
        }
    }

    pub fn deliver(&mut self, user: usize, size: usize) {
        let (token, text) = self.ledger().write_mail(user, self.number, size);
        let outcome = match deliver(self.server, &self.users[user], &text) {
            Ok(reply) if reply.starts_with("250") => Outcome::Done,
            Ok(reply) => {
                eprintln!("LMTP: {reply}");
                Outcome::Unknown
            }
            Err(Lost) => Outcome::Unknown,
        };
        self.ledger().arrives(&token, 1, "INBOX", "delivery", outcome);
    }

    fn append(&mut self, user: usize, mailbox: usize, flags: &str, sizes: &[usize]) {
        let mailbox = self.mailbox(user, mailbox, sizes[0] as u64);
        let mails: Vec<_> = sizes.iter().map(|size| self.ledger().write_mail(user, self.number, *size)).collect();
        let appended: Vec<Appended> = mails.iter().map(|(_, text)| Appended { flags, date: "", mail: text }).collect();
        let answer = self.ask(user, |imap| imap.append(&mailbox.name, &appended));
        let outcome = outcome(&answer, &format!("APPEND {}", mailbox.name));
        for (token, _) in &mails {
            self.ledger().arrives(token, 1, &mailbox.id, "append", outcome);
        }
    }

    fn copy(&mut self, user: usize, (from, to): (usize, usize), pick: u64, count: usize, verb: &str) {
        let (from, to) = (self.mailbox(user, from, pick), self.mailbox(user, to, pick));
        if from.id == to.id {
            return;
        }
        let Some(mails) = self.select(user, &from) else { return };
        let Some((uids, tokens)) = chosen(&mails, pick, count) else { return };
        let answer = self.ask(user, |imap| imap.command(&format!("UID {verb} {uids} {}", to.name)));
        let all = outcome(&answer, &format!("UID {verb} {uids} {}", to.name));
        let copied = answer.as_ref().ok().filter(|_| self.both && all == Outcome::Done).map(copied);
        let mut ledger = self.ledger();
        for (uid, token) in uids.split(',').zip(&tokens) {
            // Without an error a UID is left out that names nothing any more: the mail was given another one.
            let is_left_out = copied.as_ref().is_some_and(|copied| !uid.parse().is_ok_and(|uid| copied.contains(&uid)));
            let outcome = if is_left_out { Outcome::Refused } else { all };
            match verb {
                "COPY" => ledger.arrives(token, 1, &to.id, &format!("copy from {}", from.id), outcome),
                _ => ledger.moves(token, 1, &from.id, &to.id, outcome),
            }
        }
    }

    fn expunge(&mut self, user: usize, mailbox: usize, pick: u64, count: usize) {
        let mailbox = self.mailbox(user, mailbox, pick);
        let Some(mails) = self.select(user, &mailbox) else { return };
        let Some((uids, tokens)) = chosen(&mails, pick, count) else { return };
        let marked = self.ask(user, |imap| imap.command(&format!("UID STORE {uids} +FLAGS.SILENT (\\Deleted)")));
        if outcome(&marked, "STORE") != Outcome::Done {
            return;
        }
        let answer = self.ask(user, |imap| imap.command(&format!("UID EXPUNGE {uids}")));
        // Marked in a session that was lost, and expunged by one that never knew: then it is still there.
        let outcome = outcome(&answer, "UID EXPUNGE");
        // A mail that was given another UID just before is still there.
        let left = if self.both { self.select(user, &mailbox) } else { None };
        let is_left = |token: &String| left.iter().flatten().any(|(_, left)| left == token);
        for token in &tokens {
            let outcome = if is_left(token) { Outcome::Unknown } else { outcome };
            self.ledger().leaves(token, 1, &mailbox.id, outcome);
        }
    }

    fn create(&mut self, user: usize, below: bool, subscribe: bool) {
        let number = self.ledger().extras.len();
        let name = format!("{}x{number}of{}", if below { "Work/" } else { "" }, self.number);
        let answer = self.ask(user, |imap| imap.command(&format!("CREATE {name}")));
        if outcome(&answer, &format!("CREATE {name}")) == Outcome::Done || self.exists(user, &name) {
            let extra = Extra { id: name.clone(), user, owner: self.number, name: name.clone(), gone: false };
            self.ledger().extras.push(extra);
            if subscribe {
                outcome(&self.ask(user, |imap| imap.command(&format!("SUBSCRIBE {name}"))), "SUBSCRIBE");
            }
        }
    }

    fn rename(&mut self, user: usize, pick: u64) {
        let Some(extra) = self.extra(user, pick) else { return };
        let new = format!("{}r", extra.name);
        let answer = self.ask(user, |imap| imap.command(&format!("RENAME {} {new}", extra.name)));
        let renamed = outcome(&answer, &format!("RENAME {} {new}", extra.name)) == Outcome::Done;
        if renamed || self.exists(user, &new) {
            self.change_extra(&extra.id, |extra| extra.name = new);
        } else {
            assert!(self.exists(user, &extra.name), "{} and {new} are both gone after a RENAME", extra.name);
        }
    }

    fn delete(&mut self, user: usize, pick: u64) {
        let Some(extra) = self.extra(user, pick) else { return };
        let answer = self.ask(user, |imap| imap.command(&format!("DELETE {}", extra.name)));
        let outcome = outcome(&answer, &format!("DELETE {}", extra.name));
        self.ledger().deleted(&extra.id, outcome);
        self.change_extra(&extra.id, |extra| extra.gone = true);
    }

    fn change_extra(&mut self, id: &str, change: impl FnOnce(&mut Extra)) {
        self.ledger().extras.iter_mut().filter(|extra| extra.id == id).take(1).for_each(change_once(change));
    }

    /// One of the mailboxes that this client made and has not deleted.
    fn extra(&self, user: usize, pick: u64) -> Option<Extra> {
        let ledger = self.ledger();
        let mine = |extra: &&Extra| extra.user == user && extra.owner == self.number && !extra.gone;
        let mine: Vec<&Extra> = ledger.extras.iter().filter(mine).collect();
        mine.get(pick as usize % mine.len().max(1)).map(|extra| (*extra).clone())
    }

    fn mailbox(&self, user: usize, index: usize, pick: u64) -> Mailbox {
        match MAILBOXES.get(index) {
            Some(name) => Mailbox { id: (*name).into(), name: (*name).into() },
            None => match self.extra(user, pick) {
                Some(extra) => Mailbox { id: extra.id, name: extra.name },
                None => Mailbox { id: "INBOX".into(), name: "INBOX".into() },
            },
        }
    }

    fn exists(&mut self, user: usize, name: &str) -> bool {
        // A look needs an answer.
        for _ in 0..20 {
            let answer = self.ask(user, |imap| imap.command(&format!("LIST \"\" {name}")));
            if let Some(answer) = answer.ok().filter(Answer::is_ok) {
                // Who is killed while he creates it may leave its folder.
                return !answer.untagged.is_empty()
                    && !answer.untagged.iter().any(|line| String::from_utf8_lossy(line).contains("\\Noselect"));
            }
        }
        panic!("20 times in a row a LIST was not answered OK");
    }

    /// Selects a mailbox: (UID, token) of this client's mails in it. None if the connection was lost.
    fn select(&mut self, user: usize, mailbox: &Mailbox) -> Option<Vec<(u32, String)>> {
        let selected = self.ask(user, |imap| imap.command(&format!("SELECT {}", mailbox.name))).ok()?;
        if !selected.is_ok() && self.progress.had_no_room(self.side) {
            return None;
        }
        // Who is stopped waits for a lock no longer.
        let was_interrupted = || self.server.log().contains("F_SETLKW) locking failed: Interrupted system call");
        if !selected.is_ok() && was_interrupted() {
            return None;
        }
        assert!(selected.is_ok(), "SELECT {} was answered {}", mailbox.name, selected.result);
        let fields = format!("UID FETCH 1:* (BODY.PEEK[HEADER.FIELDS ({TOKEN_HEADER})])");
        let fetched = self.ask(user, |imap| imap.command(&fields)).ok()?;
        if !fetched.is_ok() && self.progress.had_no_room(self.side) {
            return None;
        }
        assert!(fetched.is_ok(), "UID FETCH in {} was answered {}", mailbox.name, fetched.result);
        let mut all: Vec<(u32, String)> = fetched.untagged.iter().filter_map(|line| uid_and_token(line)).collect();
        let mut ledger = self.ledger();
        if self.both {
            // One that is given another UID may be there twice for a moment.
            let mut met = BTreeSet::new();
            all.retain(|(_, token)| met.insert(token.clone()));
        } else {
            let tokens: Vec<String> = all.iter().map(|(_, token)| token.clone()).collect();
            if let Err(fault) = ledger.seen(user, self.number, &mailbox.id, &tokens) {
                let user = &self.users[user];
                let may_be_more = |server| was_rebuilt(server, user) || has_lost_uids(server, user);
                let is_still_listed = fault.is_more && was_in_memory(self.server, user);
                assert!(is_still_listed || self.servers.iter().any(may_be_more), "{}", fault.text);
            }
        }
        Some(all.into_iter().filter(|(_, token)| ledger.owns(self.number, token)).collect())
    }
}

/// Whether Dovecot made a user's indexes anew from the files that it found, after a process was killed in the middle of
/// writing: whatever lies there becomes a mail then.
pub fn was_rebuilt(server: &Server, user: &str) -> bool {
    let of_user = format!("({user})");
    let is_it = |line: &str| line.to_lowercase().contains("rebuilding index") || line.contains(CORRUPTED);
    server.log().lines().any(|line| line.contains(&of_user) && is_it(line))
}

/// Whether Dovecot has lost save dates: they are in the index's cache, for which the disk may have been too full, and in an mdbox's map,
/// which may have been made anew. Then a file's last change stands for them.
pub fn loses_save_dates(server: &Server, user: &str) -> bool {
    let of_user = format!("({user})");
    let is_it = |line: &str| line.contains("/dovecot.index.cache: No space left");
    was_rebuilt(server, user) || server.log().lines().any(|line| line.contains(&of_user) && is_it(line))
}

/// A dbox whose index was broken, in 2.3 also by a full disk: the next one knows no mail before somebody asks for a resync.
const CORRUPTED: &str = "dovecot.index.log: marked corrupted";

/// What a person does about what stands in the list of what failed.
pub fn resync_what_is_corrupted(server: &Server, user: &str) {
    let of_user = format!("({user})");
    if server.log().lines().any(|line| line.contains(&of_user) && line.contains(CORRUPTED)) {
        server.try_doveadm(&["force-resync", "-u", user, "*"]);
    }
}

/// Whether the disk was too full for a maildir's dovecot-uidlist. Dovecot then goes on with one that lacks messages
/// (maildir_uidlist_reset()), takes them for expunged, and finds their files as new ones later; who expunges one meanwhile may
/// miss it, and a peer may tell it again.
pub fn has_lost_uids(server: &Server, user: &str) -> bool {
    let of_user = format!("({user})");
    let is_it = |line: &str| line.contains("/dovecot-uidlist") && line.contains("No space left");
    server.log().lines().any(|line| line.contains(&of_user) && is_it(line))
}

/// Whether the disk was too full for an index's log. Who wrote it then has its index in memory, is answered that its messages are
/// expunged, and takes their files away; everybody else still lists them, until a worker tells of it.
fn was_in_memory(server: &Server, user: &str) -> bool {
    let of_user = format!("({user})");
    let is_it = |line: &str| line.contains("/dovecot.index.log: No space left");
    server.log().lines().any(|line| line.contains(&of_user) && is_it(line))
}

fn change_once(change: impl FnOnce(&mut Extra)) -> impl FnMut(&mut Extra) {
    let mut change = Some(change);
    move |extra| {
        if let Some(change) = change.take() {
            change(extra)
        }
    }
}

pub fn uid_and_token(line: &[u8]) -> Option<(u32, String)> {
    let text = String::from_utf8_lossy(line);
    let uid = text.split_once("FETCH (")?.1.split_once("UID ")?.1;
    let uid = uid.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    Some((uid, token(literal(line)?)))
}

/// The token in a header; what has none is a mail of nobody's.
pub fn token(header: &[u8]) -> String {
    let text = String::from_utf8_lossy(header);
    let line = text.lines().find_map(|line| line.strip_prefix(TOKEN_HEADER)?.strip_prefix(": "));
    line.unwrap_or("no token").trim().to_owned()
}

/// The UIDs that were copied or moved, as the response code COPYUID (RFC 4315) says.
fn copied(answer: &Answer) -> BTreeSet<u32> {
    let untagged = answer.untagged.iter().map(|line| String::from_utf8_lossy(line));
    let lines: Vec<String> = untagged.map(Into::into).chain([answer.result.clone()]).collect();
    let sets = lines.iter().filter_map(|line| line.split_once("[COPYUID ")?.1.split(' ').nth(1));
    let range = |range: &str| {
        let (first, last) = range.split_once(':').unwrap_or((range, range));
        Some(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?)
    };
    sets.flat_map(|set| set.split(',')).filter_map(range).flatten().collect()
}

/// Up to `count` mails in a row: their UIDs as a set, their tokens.
fn chosen(mails: &[(u32, String)], pick: u64, count: usize) -> Option<(String, Vec<String>)> {
    let first = pick as usize % mails.len().max(1);
    let mails: Vec<&(u32, String)> = mails.iter().skip(first).take(count).collect();
    let uids: Vec<String> = mails.iter().map(|(uid, _)| uid.to_string()).collect();
    (!uids.is_empty()).then(|| (uids.join(","), mails.iter().map(|(_, token)| token.clone()).collect()))
}
