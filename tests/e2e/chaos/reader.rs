//! A client that only looks, on the server that the first one does not write to, while changes are applied there.

use std::collections::BTreeMap;

use super::client::{Imap, Lost};
use super::faults::Progress;
use super::ledger::TOKEN_HEADER;
use super::plan::MAILBOXES;
use super::writer::{uid_and_token, was_rebuilt};
use crate::cluster::Server;

pub struct Reader<'a> {
    server: &'a Server,
    users: &'a [String],
    /// What (user, mailbox, UIDVALIDITY, UID) names.
    named: BTreeMap<(usize, &'static str, String, u32), String>,
    looks: usize,
}

impl<'a> Reader<'a> {
    pub fn on(server: &'a Server, users: &'a [String]) -> Reader<'a> {
        Reader { server, users, named: BTreeMap::new(), looks: 0 }
    }

    /// At one mailbox after the other, in a session for each user: from step to step of the clients, to their end.
    pub fn look_at_everything(mut self, progress: &Progress) {
        let mut steps = 0;
        'all: loop {
            for user in 0..self.users.len() {
                let mut session = None;
                for mailbox in MAILBOXES.iter().chain(&MAILBOXES) {
                    let Some(now) = progress.next(steps) else { break 'all };
                    steps = now;
                    // A login would create what is about to come.
                    if !self.server.has_inbox(&self.users[user]) {
                        continue;
                    }
                    let imap = session.get_or_insert_with(|| Imap::login(self.server, &self.users[user]));
                    if let Err(Lost) = self.look(imap, user, mailbox) {
                        session = None;
                    }
                }
            }
        }
        eprintln!("{}: a reader looked {} times at {} mails", self.server.name(), self.looks, self.named.len());
    }

    fn look(&mut self, imap: &mut Imap, user: usize, mailbox: &'static str) -> Result<(), Lost> {
        let selected = imap.command(&format!("SELECT {mailbox}"))?;
        let lines = selected.untagged.iter().map(|line| String::from_utf8_lossy(line));
        let validity =
            lines.filter_map(|line| Some(line.split_once("[UIDVALIDITY ")?.1.split(']').next()?.to_owned())).last();
        // It may not be there yet.
        let Some(validity) = validity.filter(|_| selected.is_ok()) else { return Ok(()) };
        self.fetch(imap, user, mailbox, &validity)?;
        // What is applied while it is open comes with a NOOP.
        imap.command("NOOP")?;
        self.fetch(imap, user, mailbox, &validity)?;
        self.looks += 1;
        Ok(())
    }

    /// On one server a UID never names a second mail.
    fn fetch(&mut self, imap: &mut Imap, user: usize, mailbox: &'static str, validity: &str) -> Result<(), Lost> {
        let fields = format!("FETCH 1:* (UID FLAGS BODY.PEEK[HEADER.FIELDS ({TOKEN_HEADER})])");
        for line in imap.command(&fields)?.untagged {
            // One that was expunged meanwhile has no token.
            let Some((uid, token)) = uid_and_token(&line).filter(|(_, token)| token.starts_with("token-")) else {
                continue;
            };
            let name = (user, mailbox, validity.to_owned(), uid);
            let named = self.named.entry(name.clone()).or_insert_with(|| token.clone());
            assert!(
                *named == token || was_rebuilt(self.server, &self.users[user]),
                "{}: {name:?} named {named}, and now {token}",
                self.server.name()
            );
        }
        Ok(())
    }
}
