//! The simulator's model of a mailbox (tests/sim/mailbox.rs) beside a real sdbox: clients do the same to both, at random. Messages, UIDs, flags and
//! mailboxes must be the same in the end, and so must be what the logs say, as a look reads it.
//!
//! Clients have sessions that do not hear at once what others expunged: what they do to such messages must be written as in reality.

#[path = "../sim/chance.rs"]
#[allow(dead_code)]
mod chance;
#[path = "../sim/mailbox.rs"]
#[allow(dead_code)]
mod mailbox;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use dovetail::indexlog::{fold, Commit, Commits, Delta, Header, What};

use crate::cluster::imap::{Answer, Appended, Imap};
use crate::cluster::snapshot::table;
use crate::cluster::{Cluster, Format, Server, Setup};
use crate::scene::Scene;
use chance::Chance;
use mailbox::{Act, Mailbox, Message, User};

const HISTORIES: u64 = 12;
const STEPS: u64 = 60;
const SESSIONS: u64 = 2;
/// In the order of their bits.
const FLAGS: [&str; 5] = ["\\Answered", "\\Flagged", "\\Deleted", "\\Seen", "\\Draft"];
const DELETED: u8 = 4;
const KEYWORDS: [&str; 3] = ["Work", "Home", "$Forwarded"];

/// A client's, with the mailbox as it last saw it.
struct Session {
    imap: Imap,
    view: Vec<u32>,
}

struct History<'a> {
    server: &'a Server,
    user: String,
    /// Its mailbox.
    name: String,
    chance: Chance,
    sessions: Vec<Session>,
    model: User,
    mails: u64,
    /// What was done, for who reads why it failed.
    story: Vec<String>,
}

#[test]
fn the_simulators_mailbox_is_as_dovecots() {
    let t = Scene::on(Cluster::start(vec![Setup::new("a", Format::Sdbox)]), "story-model");
    for seed in 1..=HISTORIES {
        let mut history = History::new(t.here(), &t.user, seed);
        (0..STEPS).for_each(|_| history.step());
        history.compare();
    }
    let mut lists = Lists { server: t.here(), user: t.user.clone(), chance: Chance::new(1, 2), model: User::default() };
    lists.play();
}

impl Session {
    /// It hears what is gone in many an answer.
    fn hear(&mut self, answer: &Answer) {
        for line in answer.lines() {
            if let Some(number) = line.strip_suffix(" EXPUNGE").and_then(|number| number.parse::<usize>().ok()) {
                // Otherwise one that it had not asked for yet.
                if number <= self.view.len() {
                    self.view.remove(number - 1);
                }
            }
        }
    }

    fn look(&mut self) {
        self.imap.ok("NOOP");
        self.view = self.imap.uids();
    }
}

impl<'a> History<'a> {
    fn new(server: &'a Server, user: &str, seed: u64) -> History<'a> {
        let name = format!("history{seed}");
        server.imap(user).ok(&format!("CREATE {name}"));
        let mut model = User::default();
        assert!(model.create(user, &name, [1; 16], 0, 1_700_000_000).is_some());
        let open = || Session { imap: server.imap(user).select(&name), view: Vec::new() };
        let sessions = (0..SESSIONS).map(|_| open()).collect();
        let chance = Chance::new(seed, 1);
        History { server, user: user.into(), name, chance, sessions, model, mails: 0, story: Vec::new() }
    }

    fn mailbox(&mut self) -> &mut Mailbox {
        self.model.mailboxes.get_mut(&self.name).expect("the model's mailbox")
    }

    fn commit(&mut self, acts: Vec<Act>) {
        let user = self.user.clone();
        self.mailbox().commit(&user, acts, false);
    }

    fn step(&mut self) {
        let at = self.chance.below(SESSIONS) as usize;
        // Otherwise it sees the mailbox as before, and may mean what is gone.
        if self.chance.percent(50) {
            self.sessions[at].look();
            let view = self.sessions[at].view.clone();
            let has: Vec<u32> = self.mailbox().messages.keys().copied().collect();
            assert_eq!(view, has, "{}", self.story.join("\n"));
        }
        match self.chance.below(10) {
            0..=3 => self.save(at),
            4..=6 => self.change_flags(at),
            7 => self.change_keyword(at),
            8 => self.expunge(at),
            _ => self.copy(at),
        }
    }

    fn save(&mut self, at: usize) {
        let flags = if self.chance.percent(50) { 1u8 << self.chance.below(5) } else { 0 };
        let keyword = self.chance.percent(30).then(|| *self.chance.pick(&KEYWORDS));
        self.mails += 1;
        let mail = format!("Subject: {}\r\n\r\nhello\r\n", self.mails).into_bytes();
        let named = format!("{} {}", names(flags), keyword.unwrap_or_default());
        self.story.push(format!("{at}: APPEND {named}"));
        let name = self.name.clone();
        let appended = [Appended { flags: named.trim(), date: "", mail: &mail }];
        let answer = self.sessions[at].imap.append_all(&name, &appended);
        self.sessions[at].hear(&answer);
        let message = Message {
            guid: format!("{:032x}", self.mails),
            flags,
            keywords: keyword.into_iter().map(str::to_owned).collect(),
            received_date: 0,
            save_date: 0,
            body: mail,
        };
        self.commit(vec![Act::Save(0, message)]);
    }

    /// One that the session sees: its number there, and its UID.
    fn pick(&mut self, at: usize) -> Option<(usize, u32)> {
        let length = self.sessions[at].view.len();
        let picked = self.chance.below(length as u64) as usize;
        self.sessions[at].view.get(picked).map(|uid| (picked + 1, *uid))
    }

    fn command(&mut self, at: usize, command: &str, uid: u32) -> bool {
        let answer = self.sessions[at].imap.command(command);
        self.story.push(format!("{at}: {command} (UID {uid}): {}", answer.result));
        self.sessions[at].hear(&answer);
        answer.is_ok()
    }

    fn change_flags(&mut self, at: usize) {
        let Some((number, uid)) = self.pick(at) else { return };
        let flag = 1u8 << *self.chance.pick(&[0u64, 1, 3, 4]);
        let is_added = self.chance.percent(60);
        self.store(at, number, uid, flag, is_added);
    }

    fn store(&mut self, at: usize, number: usize, uid: u32, flag: u8, is_added: bool) {
        let sign = if is_added { '+' } else { '-' };
        self.command(at, &format!("STORE {number} {sign}FLAGS.SILENT ({})", names(flag)), uid);
        let (add, remove) = if is_added { (flag, 0) } else { (0, flag) };
        self.commit(vec![Act::Flags { uid, add, remove }]);
    }

    fn change_keyword(&mut self, at: usize) {
        let Some((number, uid)) = self.pick(at) else { return };
        let name = *self.chance.pick(&KEYWORDS);
        let add = self.chance.percent(60);
        let sign = if add { '+' } else { '-' };
        self.command(at, &format!("STORE {number} {sign}FLAGS.SILENT ({name})"), uid);
        self.commit(vec![Act::Keyword { uid, name: name.into(), add }]);
    }

    fn expunge(&mut self, at: usize) {
        let Some((number, uid)) = self.pick(at) else { return };
        self.store(at, number, uid, DELETED, true);
        self.command(at, &format!("UID EXPUNGE {uid}"), uid);
        self.commit(vec![Act::Expunge(uid)]);
        self.sessions[at].look();
    }

    /// Into the same mailbox.
    fn copy(&mut self, at: usize) {
        let Some((number, uid)) = self.pick(at) else { return };
        let name = self.name.clone();
        let message = self.mailbox().messages.get(&uid).cloned();
        let is_done = self.command(at, &format!("COPY {number} {name}"), uid);
        assert_eq!(is_done, message.is_some(), "{}", self.story.join("\n"));
        if let Some(message) = message {
            self.commit(vec![Act::Save(0, message)]);
        }
    }

    fn compare(mut self) {
        self.sessions.clear();
        let story = self.story.join("\n");
        let (user, name) = (self.user.clone(), self.name.clone());
        let listed = self.server.doveadm(&["-f", "tab", "fetch", "-u", &user, "uid guid flags", "mailbox", &name]);
        let mut guids = Guids::default();
        let real: BTreeMap<u32, (String, BTreeSet<String>)> = table(&listed)
            .map(|row| {
                let flags = row["flags"].split_whitespace().filter(|flag| *flag != "\\Recent").map(str::to_owned);
                (row["uid"].parse().expect("a UID"), (row["guid"].clone(), flags.collect()))
            })
            .collect();
        let model: BTreeMap<u32, (String, BTreeSet<String>)> = self
            .mailbox()
            .messages
            .iter()
            .map(|(uid, message)| {
                let flags = names(message.flags);
                let flags = flags.split_whitespace().map(str::to_owned).chain(message.keywords.iter().cloned());
                (*uid, (message.guid.clone(), flags.collect()))
            })
            .collect();
        assert_eq!(real.keys().collect::<Vec<_>>(), model.keys().collect::<Vec<_>>(), "{story}");
        for (uid, (guid, flags)) in &real {
            assert_eq!(*flags, model[uid].1, "flags of UID {uid}\n{story}");
            guids.are_one(guid, &model[uid].0, &story);
        }
        let status = self.server.doveadm(&["-f", "tab", "mailbox", "status", "-u", &user, "uidnext", &name]);
        let uid_next = table(&status).next().map(|row| row["uidnext"].clone());
        assert_eq!(uid_next, Some(self.mailbox().uid_next.to_string()), "{story}");
        let folder = self.server.outside(&format!("/home/{user}/sdbox/mailboxes/{name}/dbox-Mails"));
        let logs = ["dovecot.index.log.2", "dovecot.index.log"].map(|file| std::fs::read(folder.join(file)));
        let logs: Vec<Vec<u8>> = logs.into_iter().flatten().collect();
        let logs_of_model = self.mailbox().log_files();
        let (really, asked) = (asked_for(&logs), asked_for(&logs_of_model));
        assert_eq!(really.len(), asked.len(), "expunges that were asked for: {really:?}, {asked:?}\n{story}");
        for ((uid, guid), (uid_of_model, guid_of_model)) in really.iter().zip(&asked) {
            assert_eq!(uid, uid_of_model, "expunges that were asked for\n{story}");
            guids.are_one(guid, guid_of_model, &story);
        }
        let (said_really, said) = (deltas(&logs), deltas(&logs_of_model));
        for (at, (real, model)) in said_really.iter().zip(&said).enumerate() {
            let same = match (real, model) {
                (Delta::Expunge { guid: Some(real), .. }, Delta::Expunge { guid: Some(model), .. }) => {
                    guids.are_one(&hex(real), &hex(model), &story);
                    true
                }
                _ => real == model,
            };
            assert!(same, "log, {at}: really {real:?}, in the model {model:?}\n{story}");
        }
        assert_eq!(said_really.len(), said.len(), "{story}");
    }
}

/// Which GUID here is which there.
#[derive(Default)]
struct Guids(HashMap<String, String>, HashMap<String, String>);

impl Guids {
    fn are_one(&mut self, real: &str, model: &str, story: &str) {
        let known = self.0.entry(real.into()).or_insert_with(|| model.into());
        assert_eq!(known, model, "GUID {real}\n{story}");
        let known = self.1.entry(model.into()).or_insert_with(|| real.into());
        assert_eq!(known, real, "GUID {model} of the model\n{story}");
    }
}

fn hex(guid: &[u8; 16]) -> String {
    guid.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn names(flags: u8) -> String {
    let set = FLAGS.iter().enumerate().filter(|(bit, _)| flags & 1 << bit != 0);
    set.map(|(_, name)| *name).collect::<Vec<_>>().join(" ")
}

/// Of logs, the oldest first.
fn commits(logs: &[Vec<u8>]) -> impl Iterator<Item = Commit> + '_ {
    logs.iter().flat_map(|log| {
        let header = Header::parse(log).expect("a log");
        let first = usize::from(header.hdr_size);
        let commits: Result<Vec<_>, _> = Commits::new(&header, &log[first..], first as u64).collect();
        commits.expect("a log that can be read")
    })
}

/// Expunges that clients asked for, also of what was gone: UIDs and GUIDs.
fn asked_for(logs: &[Vec<u8>]) -> Vec<(u32, String)> {
    let requests = commits(logs).flat_map(|commit| commit.records).filter(|record| !record.external);
    let expunges = requests.filter_map(|record| match record.what {
        What::ExpungeGuid(expunges) => Some(expunges),
        _ => None,
    });
    expunges.flatten().map(|expunge| (expunge.uid, hex(&expunge.guid_128))).collect()
}

/// What logs say that was done to messages.
fn deltas(logs: &[Vec<u8>]) -> Vec<Delta> {
    let mut deltas = fold(commits(logs), |_| false);
    deltas.retain(|delta| !matches!(delta, Delta::UidValidity(_) | Delta::NextUid(_)));
    deltas
}

/// Mailboxes that come, go and are renamed.
struct Lists<'a> {
    server: &'a Server,
    user: String,
    chance: Chance,
    model: User,
}

impl Lists<'_> {
    fn play(&mut self) {
        let mut imap = self.server.imap(&self.user);
        let mut story = Vec::new();
        for guid in 0..STEPS {
            let names = ["one", "two", "one/below", "two/below"];
            let (name, other) = (*self.chance.pick(&names), *self.chance.pick(&names));
            // A folder without a mailbox, which a dbox of Dovecot 2.3 keeps, is none in the model.
            let is_there = self.model.mailboxes.contains_key(name);
            let (command, is_done) = match self.chance.below(4) {
                0 | 1 => {
                    let mut id = [2; 16];
                    id[..8].copy_from_slice(&guid.to_be_bytes());
                    let created = self.model.create(&self.user, name, id, 0, 1_700_000_000);
                    (format!("CREATE {name}"), created.is_some())
                }
                _ if !is_there => continue,
                2 => (format!("RENAME {name} {other}"), self.model.rename(name, other)),
                _ => (format!("DELETE {name}"), self.model.delete(name).is_some()),
            };
            let answer = imap.command(&command);
            story.push(format!("{command}: {}", answer.result));
            assert_eq!(answer.is_ok(), is_done, "{}", story.join("\n"));
            let listed = imap.ok("LIST \"\" *");
            let is_ours = |name: &&str| name.starts_with("one") || name.starts_with("two");
            let lines = listed.lines();
            // Folders without a mailbox are none.
            let mailboxes = lines.iter().filter(|line| !line.contains("\\Noselect") && !line.contains("\\NonExistent"));
            let mailboxes = mailboxes.filter_map(|line| line.split_whitespace().last()).filter(is_ours);
            let has: BTreeSet<&str> = mailboxes.collect();
            assert_eq!(has, self.model.mailboxes.keys().map(String::as_str).collect(), "{}", story.join("\n"));
        }
    }
}
