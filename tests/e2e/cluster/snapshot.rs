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
        let doveadm = |args: &[&str]| {
            let output = server.try_doveadm(args);
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            match output.status.success() {
                true => Ok(text(&output.stdout)),
                false => Err(format!("{}: doveadm {args:?}: {}", server.name(), text(&output.stderr))),
            }
        };
        let listed = |args: &[&str]| -> Result<Vec<String>, String> {
            let mut names: Vec<String> = doveadm(args)?.lines().map(|name| server.common_name(name)).collect();
            names.sort();
            // Below a prefix there may be INBOX twice: once as what is above its children.
            names.dedup();
            Ok(names)
        };
        let names = listed(&["mailbox", "list", "-u", user])?;
        let subscriptions = listed(&["mailbox", "list", "-s", "-u", user])?;

        let fields = "guid uidvalidity uidnext highestmodseq";
        let patterns = server.all_mailboxes();
        let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
        let status = doveadm(&[&["-f", "tab", "mailbox", "status", "-u", user, fields], &patterns[..]].concat())?;
        let mut mailboxes: BTreeMap<String, Mailbox> = table(&status)
            .map(|row| {
                let mailbox = Mailbox {
                    guid: row["guid"].clone(),
                    uid_validity: row["uidvalidity"].clone(),
                    uid_next: row["uidnext"].clone(),
                    highest_modseq: row["highestmodseq"].parse().unwrap_or(0),
                    messages: BTreeMap::new(),
                };
                (server.common_name(&row["mailbox"]), mailbox)
            })
            .collect();

        let fields = "mailbox uid guid flags date.received.unixtime date.saved.unixtime size.virtual";
        let fetch = |pattern: &&str| doveadm(&["-f", "tab", "fetch", "-u", user, fields, "mailbox", pattern, "all"]);
        let fetched = patterns.iter().map(fetch).collect::<Result<Vec<String>, String>>()?;
        for row in fetched.iter().flat_map(|fetched| table(fetched)) {
            let mut flags: Vec<String> =
                row["flags"].split(' ').filter(|f| !f.is_empty() && *f != "\\Recent").map(str::to_owned).collect();
            flags.sort();
            let saved = if with_save_dates { row["date.saved.unixtime"].clone() } else { String::new() };
            let message = Message {
                guid: row["guid"].clone(),
                flags,
                received: row["date.received.unixtime"].clone(),
                saved,
                virtual_size: row["size.virtual"].clone(),
            };
            // A mailbox that came into being between the two questions is seen the next time.
            if let Some(mailbox) = mailboxes.get_mut(&server.common_name(&row["mailbox"])) {
                mailbox.messages.insert(row["uid"].parse().expect("UID"), message);
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
        let fields = "text mailbox uid size.physical";
        let mut bodies = Vec::new();
        for pattern in &server.all_mailboxes() {
            let args = ["-f", "tab", "fetch", "-u", user, fields, "mailbox", pattern, "all"];
            bodies.extend(Body::read_all(server, &server.doveadm_bytes(&args, b"")));
        }
        bodies.sort();
        bodies
    }

    fn read_all(server: &Server, output: &[u8]) -> Vec<Body> {
        let mut bodies = Vec::new();
        // The text comes first in each row and may hold anything; the row's end tells its size. So: from the end.
        let mut rest = output;
        while let Some(stripped) = rest.strip_suffix(b"\n") {
            let row_start = stripped.len() - tail_fields(stripped, 3);
            let tail = String::from_utf8_lossy(&stripped[row_start..]).into_owned();
            let fields: Vec<&str> = tail.split('\t').collect();
            let [_, mailbox, uid, size] = fields[..] else { break };
            let (Ok(uid), Ok(size)) = (uid.parse(), size.parse::<usize>()) else {
                break;
            };
            let text_start = row_start.checked_sub(size).expect("the text is in front of its size");
            let mut hasher = DefaultHasher::new();
            stripped[text_start..row_start].hash(&mut hasher);
            bodies.push(Body { mailbox: server.common_name(mailbox), uid, size, hash: hasher.finish() });
            rest = &rest[..text_start];
        }
        assert!(
            rest.is_empty() || rest == b"text\tmailbox\tuid\tsize.physical\n",
            "{}: cannot read doveadm's answer from {:?} back",
            server.name(),
            String::from_utf8_lossy(&rest[rest.len().saturating_sub(100)..])
        );
        bodies
    }
}

/// Length of the last `count` tab-separated fields of `bytes`, their leading tab included.
fn tail_fields(bytes: &[u8], count: usize) -> usize {
    let tabs = bytes.iter().enumerate().rev().filter(|(_, b)| **b == b'\t').map(|(i, _)| i);
    bytes.len() - tabs.take(count).last().unwrap_or(0)
}

pub fn compare_bodies(a: &str, mine: &[Body], b: &str, theirs: &[Body]) {
    for (mine, theirs) in mine.iter().zip(theirs) {
        assert_eq!(mine, theirs, "the bytes of a mail differ between {a} (left) and {b} (right)");
    }
    assert_eq!(mine.len(), theirs.len(), "{a} and {b} do not have the same number of mails");
}
