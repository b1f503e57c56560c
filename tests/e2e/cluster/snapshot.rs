//! A user's whole mail state on one server, to compare it with another's.

use std::collections::hash_map::DefaultHasher;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::hash::{Hash, Hasher};

use super::Server;

/// Everything but the bytes of the bodies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    server: String,
    /// Existing names, also those that hold only children; all as [`Server::common_name`] says them.
    pub names: Vec<String>,
    pub subscriptions: Vec<String>,
    pub mailboxes: BTreeMap<String, Mailbox>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mailbox {
    pub guid: String,
    pub uid_validity: String,
    pub uid_next: String,
    pub highest_modseq: u64,
    pub messages: BTreeMap<u32, Message>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub guid: String,
    /// Flags and keywords without \Recent, sorted.
    pub flags: Vec<String>,
    pub received: String,
    /// Empty when it is not compared.
    pub saved: String,
    pub virtual_size: String,
}

impl Snapshot {
    pub fn take(server: &Server, user: &str, with_save_dates: bool) -> Snapshot {
        Snapshot::try_take(server, user, with_save_dates).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Fails where doveadm does: on a mailbox whose deletion was killed half-way, for the five minutes after which Dovecot
    /// brings it back (mailbox_try_undelete()).
    pub fn try_take(server: &Server, user: &str, with_save_dates: bool) -> Result<Snapshot, String> {
        let failed = |error: std::io::Error| format!("{}: doveadm: {error}", server.name());
        let mut doveadm = server.doveadm_process().map_err(failed)?;
        let mut ask = |args: &[&str], columns: usize| -> Result<Vec<Vec<String>>, String> {
            let text = |value: Vec<u8>| String::from_utf8_lossy(&value).into_owned();
            let rows = doveadm.run(user, args, columns).map_err(failed)?;
            Ok(rows.into_iter().map(|row| row.into_iter().map(text).collect()).collect())
        };
        let listed = |rows: Vec<Vec<String>>| -> Vec<String> {
            let mut names: Vec<String> = rows.iter().map(|row| server.common_name(&row[0])).collect();
            names.sort();
            // Below a prefix there may be INBOX twice: once as what is above its children.
            names.dedup();
            names
        };
        let names = listed(ask(&["mailbox list"], 1)?);
        let subscriptions = listed(ask(&["mailbox list", "-s"], 1)?);

        // In this order it prints them, however they are asked for.
        let fields = "uidnext uidvalidity highestmodseq guid";
        let patterns = server.all_mailboxes();
        let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
        let mut mailboxes = BTreeMap::new();
        for row in ask(&[&["mailbox status", fields], &patterns[..]].concat(), 5)? {
            let [name, uid_next, uid_validity, highest_modseq, guid] = row.try_into().expect("five columns");
            let highest_modseq = highest_modseq.parse().unwrap_or(0);
            let mailbox = Mailbox { guid, uid_validity, uid_next, highest_modseq, messages: BTreeMap::new() };
            mailboxes.insert(server.common_name(&name), mailbox);
        }

        let fields = "mailbox uid guid flags date.received.unixtime date.saved.unixtime size.virtual";
        for pattern in patterns {
            for row in ask(&["fetch", fields, "mailbox", pattern, "all"], 7)? {
                let [name, uid, guid, flags, received, saved, virtual_size] = row.try_into().expect("seven columns");
                let mut flags: Vec<String> =
                    flags.split(' ').filter(|f| !f.is_empty() && *f != "\\Recent").map(str::to_owned).collect();
                flags.sort();
                let saved = if with_save_dates { saved } else { String::new() };
                // A mailbox that came into being between the two questions is seen the next time.
                if let Some(mailbox) = mailboxes.get_mut(&server.common_name(&name)) {
                    let message = Message { guid, flags, received, saved, virtual_size };
                    mailbox.messages.insert(uid.parse().expect("UID"), message);
                }
            }
        }
        Ok(Snapshot { server: server.name().to_owned(), names, subscriptions, mailboxes })
    }

    /// Of names that are no mailboxes, only those stay that have one below them.
    pub fn forget_empty_folders(&mut self) {
        let mailboxes = &self.mailboxes;
        let holds = |name: &str, mailbox: &str| mailbox.strip_prefix(name).is_some_and(|rest| rest.starts_with('/'));
        self.names.retain(|name| mailboxes.keys().any(|mailbox| mailbox == name || holds(name, mailbox)));
    }

    pub fn messages(&self, mailbox: &str) -> Vec<&Message> {
        self.mailboxes.get(mailbox).map(|m| m.messages.values().collect()).unwrap_or_default()
    }

    /// What differs, a line each; empty if nothing does. HIGHESTMODSEQ is each server's own and not compared.
    pub fn difference(&self, other: &Snapshot) -> String {
        let (a, b) = (&self.server, &other.server);
        let mut out = String::new();
        let mut say = |what: &str, mine: &dyn std::fmt::Debug, theirs: &dyn std::fmt::Debug| {
            let _ = writeln!(out, "  {what}: {a} has {mine:?}, {b} has {theirs:?}");
        };
        if self.names != other.names {
            say("mailbox names", &self.names, &other.names);
        }
        if self.subscriptions != other.subscriptions {
            say("subscriptions", &self.subscriptions, &other.subscriptions);
        }
        let only_theirs = other.mailboxes.keys().filter(|name| !self.mailboxes.contains_key(*name));
        only_theirs.for_each(|name| say("a mailbox", &"none", name));
        for (name, mine) in &self.mailboxes {
            let Some(theirs) = other.mailboxes.get(name) else {
                say("a mailbox", &name, &"none");
                continue;
            };
            if mine.guid != theirs.guid {
                say(&format!("{name}: GUID"), &mine.guid, &theirs.guid);
            }
            if mine.uid_validity != theirs.uid_validity {
                say(&format!("{name}: UIDVALIDITY"), &mine.uid_validity, &theirs.uid_validity);
            }
            if mine.uid_next != theirs.uid_next {
                say(&format!("{name}: UIDNEXT"), &mine.uid_next, &theirs.uid_next);
            }
            let mut uids: Vec<u32> = mine.messages.keys().chain(theirs.messages.keys()).copied().collect();
            uids.sort_unstable();
            uids.dedup();
            for uid in uids {
                let (mine, theirs) = (mine.messages.get(&uid), theirs.messages.get(&uid));
                if mine != theirs {
                    say(&format!("{name}: UID {uid}"), &mine, &theirs);
                }
            }
        }
        out
    }
}

/// The rows of doveadm's `tab` format, by the header's names.
pub fn table(text: &str) -> impl Iterator<Item = BTreeMap<String, String>> + '_ {
    let mut lines = text.lines();
    let header: Vec<&str> = lines.next().unwrap_or_default().split('\t').collect();
    lines.map(move |line| header.iter().map(|h| (*h).to_owned()).zip(line.split('\t').map(str::to_owned)).collect())
}

/// The bytes of one mail as Dovecot stores them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Body {
    pub mailbox: String,
    pub uid: u32,
    pub size: usize,
    pub hash: u64,
}

impl Body {
    /// All mails of a user, ordered by mailbox and UID.
    pub fn fetch_all(server: &Server, user: &str) -> Vec<Body> {
        let fetched = server.doveadm_process().and_then(|mut doveadm| {
            let patterns = server.all_mailboxes();
            let fetch =
                |pattern: &String| doveadm.run(user, &["fetch", "mailbox uid text", "mailbox", pattern, "all"], 3);
            patterns.iter().map(fetch).collect::<std::io::Result<Vec<_>>>()
        });
        let fetched = fetched.unwrap_or_else(|error| panic!("{}: doveadm: {error}", server.name()));
        let read = |row: &Vec<Vec<u8>>| {
            let mut hasher = DefaultHasher::new();
            row[2].hash(&mut hasher);
            let text = |at: usize| String::from_utf8_lossy(&row[at]);
            let uid = text(1).parse().expect("UID");
            Body { mailbox: server.common_name(&text(0)), uid, size: row[2].len(), hash: hasher.finish() }
        };
        let mut bodies: Vec<Body> = fetched.iter().flatten().map(read).collect();
        bodies.sort();
        bodies
    }
}

pub fn compare_bodies(a: &str, mine: &[Body], b: &str, theirs: &[Body]) {
    for (mine, theirs) in mine.iter().zip(theirs) {
        assert_eq!(mine, theirs, "the bytes of a mail differ between {a} (left) and {b} (right)");
    }
    assert_eq!(mine.len(), theirs.len(), "{a} and {b} do not have the same number of mails");
}
