//! What must outlive this process: each change with its number and its place in the log, what of others is applied.
//!
//! Guarantees that a change is in the journal before a peer hears of it (until then nothing is written to peers), and that
//! a log counts as known up to a place only together with the changes before it.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};
use prost::Message;

use super::clock::Clock;
use super::engine::{Command, Engine, Fatal};
use super::order::Release;
use super::spans::Need;
use super::Config;
use crate::change::{self, CHANGE_BYTES_MAX, GUID_BYTES, USER_BYTES_MAX};
use crate::journal::{Failed, Journal, JournalError, KnownLog, Lock, Options, Start};
use crate::peer::Loaded;
use crate::time::Time;
use crate::wire::frame;
use crate::wire::proto::op::What;
use crate::wire::proto::{frame::Kind, Change, Frame, Mailbox, MailboxCreate, Op, Span, Stamp};

/// Bytes that one look into the journal brings.
const LOAD_BYTES: usize = 1 << 20;
/// Between two looks for changes that are too old.
const TRIM_EVERY_MS: u64 = 60_000;
/// Of the journal's size, one part in so many is for changes of flags that peers may not have heard of.
const FLAGS_SHARE: u64 = 8;
/// Between two commits that peers wait for: what a busy server does meanwhile shares one.
const COMMIT_EVERY: Duration = Duration::from_millis(2);
/// What nobody waits for is committed after so long at the latest.
const COMMIT_SOMETIME: Duration = Duration::from_millis(100);
/// Between two attempts to get the lock of a relay that is ending.
const LOCK_EVERY_MS: u64 = 10;
/// Mailboxes of one user that are to be compared because something of them could not be told; with more, all of his are.
const LISTED_PER_USER_MAX: u64 = 100;

/// The journal, if this relay is not to stop as well, and what was asked for meanwhile.
pub struct Opened {
    pub journal: Option<(Journal, Start)>,
    pub waiting: Vec<Command>,
}

/// Opens the journal when the relay before this one has closed it.
pub fn open(config: &Config, commands: &Receiver<Command>, time: &(impl Time + ?Sized)) -> Result<Opened, Fatal> {
    let mut waiting = Vec::new();
    let failed = |error| JournalError::Sqlite { path: config.journal.clone(), error };
    let lock = loop {
        match Lock::try_take(&config.journal).map_err(failed)? {
            Some(lock) => break lock,
            None => match commands.recv_timeout(Duration::from_millis(LOCK_EVERY_MS)) {
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => {
                    return Ok(Opened { journal: None, waiting })
                }
                Ok(command) => waiting.push(command),
                Err(RecvTimeoutError::Timeout) => {}
            },
        }
    };
    let peers: Vec<String> = config.peers.iter().map(|peer| peer.name.clone()).collect();
    let options = Options {
        folder: &config.journal,
        server: &config.server,
        peers: &peers,
        boot: &config.boot,
        now_us: time.now_us(),
    };
    Ok(Opened { journal: Some(Journal::open(&options, lock)?), waiting })
}

/// The change in a frame of the journal.
pub fn sent_change(bytes: &[u8]) -> Option<Change> {
    match Frame::decode(bytes.get(frame::HEADER_BYTES..)?).ok()?.kind {
        Some(Kind::Change(change)) => Some(change),
        _ => None,
    }
}

impl Engine {
    /// Takes over what the journal has of the last start.
    pub fn resume(&mut self) -> Result<(), Fatal> {
        for peer in &mut self.peers {
            let (pending, _) = self.journal.pending(&peer.name)?;
            peer.outbox.resume(pending, self.journal.dropped(&peer.name)?);
            peer.last_passed_on = self.journal.last_passed_on(&peer.name)?;
            let (epoch, runs) = self.journal.applied(&peer.name)?;
            peer.inbox.resume(epoch, runs);
            peer.disputed = self.journal.disputed(&peer.name)?;
        }
        self.resume_bonds()?;
        self.far = self.journal.origins()?;
        self.far.retain(|origin| self.peers.iter().all(|peer| peer.name != *origin));
        self.user_peers =
            self.journal.user_peers()?.into_iter().map(|(user, servers)| (user.into(), servers)).collect();
        self.counts.counters.failed = self.journal.failed_count()?;
        self.flags_clocks =
            self.journal.users_with_flags()?.into_iter().map(|(user, clock)| (user.into(), clock)).collect();
        self.clock = Clock::resume(self.journal.clock()?);
        self.lists.set_aliases(self.journal.aliases()?);
        self.resume_redos()?;
        self.users_elsewhere = self.journal.users_elsewhere()?.into_iter().map(Arc::from).collect();
        Ok(())
    }

    /// Stamps and journals what the order released; it leaves with the next writing.
    pub fn ship_all(&mut self, released: Vec<Release>) {
        for release in released {
            if let Err(error) = self.ship(release) {
                self.fail(error);
            }
            self.tell_of_list();
        }
    }

    /// The journal cannot be used: the engine ends at its next round.
    pub fn fail(&mut self, error: JournalError) {
        self.failed.get_or_insert(error);
    }

    fn ship(&mut self, release: Release) -> Result<(), JournalError> {
        let Release { user, change, spans, ack } = release;
        if change.is_some() {
            // It may have to commit, which must not be between the change and its place in the log.
            self.journal.next_seq()?;
        }
        let path = change.as_ref().and_then(|change| change.mailbox.as_ref());
        // A log that is gone may be called as the one that has come in its place.
        for span in spans.iter().filter(|span| !self.lists.is_log_gone(span)) {
            let path = path.filter(|mailbox| mailbox.guid == span.mailbox_guid).map(|mailbox| mailbox.path.clone());
            let known = self.known_log(span);
            // It may have got another GUID while this was held.
            let mailbox = self.lists.canonical(&user, &known.mailbox).to_vec();
            self.journal.advance_log(&KnownLog { mailbox, path: path.unwrap_or_default(), ..known })?;
        }
        match change {
            Some(change) if self.lists.has_gone_with_mailbox(&user, &change) => {
                self.counts.note("told_late", 1);
                ack.into_iter().for_each(|id| self.acks.settle(id, ""));
                Ok(())
            }
            Some(change) if !self.peers.is_empty() => {
                // What a look tells has no spans, and may be of that index.
                if !spans.is_empty() {
                    self.look_again_if_anew(&user, &change);
                }
                if let Some(creation) = self.untold_creation(&user, &change)? {
                    self.ship_change(&user, creation)?;
                }
                let before = self.journal.seq();
                self.ship_change(&user, change)?;
                match ack {
                    Some(id) if self.journal.seq() > before => self.acks.shipped(id, self.journal.seq()),
                    Some(id) => self.acks.settle(id, "the change cannot be sent to the peers"),
                    None => {}
                }
                Ok(())
            }
            // A worker told of it while it was held.
            None => {
                ack.into_iter().for_each(|id| self.acks.found(id, self.journal.seq()));
                Ok(())
            }
            Some(_) => {
                ack.into_iter().for_each(|id| self.acks.settle(id, ""));
                Ok(())
            }
        }
    }

    /// Of a mailbox that is renamed before anybody told of it: Dovecot says that a CREATE failed when another process has just
    /// come upon the new mailbox. Or all that came into it is gone: no peer makes a mailbox for that, and its UIDs are not free.
    fn untold_creation(&self, user: &str, change: &Change) -> Result<Option<Change>, JournalError> {
        let Some(mailbox) = change.mailbox.as_ref().filter(|mailbox| !mailbox.guid.is_empty()) else { return Ok(None) };
        let path = change.ops.iter().find_map(|op| match &op.what {
            Some(What::Rename(rename)) => Some(rename.new_path.clone()),
            Some(What::Rebuilt(rebuilt)) if rebuilt.present.is_empty() => Some(mailbox.path.clone()),
            _ => None,
        });
        let Some(path) = path.filter(|path| !path.is_empty()) else { return Ok(None) };
        let known = self.journal.log(user, self.lists.canonical(user, &mailbox.guid), "")?;
        if known.is_some_and(|log| !log.path.is_empty()) {
            return Ok(None);
        }
        let what = Some(What::Create(MailboxCreate::default()));
        let mailbox = Some(Mailbox { path, ..mailbox.clone() });
        Ok(Some(Change { mailbox, ops: vec![Op { what }], spans: vec![], ..change.clone() }))
    }

    /// That the log is known up to the span's end.
    pub fn known_log(&self, span: &Span) -> KnownLog {
        KnownLog {
            user: span.user.clone(),
            mailbox: span.mailbox_guid.clone(),
            private_user: span.private_user.clone(),
            index_id: span.index_id,
            log_seq: span.log_seq,
            end: span.end,
            tail: span.tail.clone(),
            path: Vec::new(),
            healed: self.spans.healed(&Need::of(span)),
            was_told: false,
        }
    }

    /// Journals the change and puts it into every peer's outbox, encoded once for all.
    pub fn ship_change(&mut self, user: &Arc<str>, mut change: Change) -> Result<(), JournalError> {
        let now_us = self.outside.now_us();
        let given = change.stamp.take().map_or(0, |stamp| stamp.clock);
        let seq = self.journal.next_seq()?;
        change.stamp = Some(Stamp {
            origin: self.me.server.clone(),
            epoch: self.me.epoch,
            seq,
            clock: self.clock.stamp(given, now_us),
            vector: self.vector_of(user, &change, given)?,
        });
        // What a worker has found gone has no time of its own.
        self.lists.note_deleted(user, &change, if given == 0 { now_us } else { given });
        let peers: Vec<usize> = self.peers_of(user).collect();
        change.given = peers.iter().map(|peer| self.peers[*peer].name.clone()).collect();
        if change.encoded_len() > CHANGE_BYTES_MAX {
            change.spans.clear();
        }
        if change::is_of_list(&change) || change::has_saves(&change) {
            self.note_list(user, &change)?;
        }
        let mailbox = change.mailbox.as_ref().map(|mailbox| mailbox.guid.clone()).unwrap_or_default();
        let flags = change::flags_of(&change);
        if change.encoded_len() > CHANGE_BYTES_MAX {
            self.counts.note("bad_change", 1);
            self.fail_to_tell(user, mailbox, "it is too long with its stamp");
            return Ok(());
        }
        let encoded: Arc<[u8]> = match frame::encode(&Kind::Change(change).into()) {
            Ok(bytes) => bytes.into(),
            Err(error) => {
                self.fail_to_tell(user, mailbox, &error.to_string());
                return Ok(());
            }
        };
        let names: Vec<&str> = peers.iter().map(|peer| self.peers[*peer].name.as_str()).collect();
        self.journal.append(user, now_us, &encoded, &names)?;
        self.note_seen(user, &self.me.server.clone(), self.me.epoch, seq);
        self.questions.note_change(user);
        for peer in peers {
            self.peers[peer].outbox.append(user, seq, encoded.clone(), now_us);
        }
        match flags {
            Some(flags) => self.note_own_flags(user, &flags),
            None => Ok(()),
        }
    }

    /// With what it gave a time to, or what was heard: one that goes back would let older changes win.
    fn note_clock(&mut self) -> Result<(), JournalError> {
        if self.journal.is_writing() && self.clock_noted != self.clock.last() {
            self.clock_noted = self.clock.last();
            self.journal.note_clock(self.clock_noted)?;
        }
        Ok(())
    }

    /// A change that no peer will ever get.
    pub fn fail_to_tell(&mut self, user: &str, mailbox: Vec<u8>, why: &str) {
        let user: String = user.escape_debug().take(USER_BYTES_MAX).collect();
        // Of a user with many of them, all mailboxes are listed.
        let mailbox = match self.journal.to_compare(Some(&user), None) {
            Ok(listed) if listed < LISTED_PER_USER_MAX && mailbox.len() == GUID_BYTES => mailbox,
            Ok(_) => Vec::new(),
            Err(error) => return self.fail(error),
        };
        let line =
            || format!("User {user}: a change cannot be sent to the peers: {why}; it must be compared with them.");
        if let Some(line) = self.floods.bad_changes.take(line, self.now_ms) {
            log::error!("{line}");
        }
        self.remember_failed(&Failed {
            user,
            mailbox,
            at_us: self.outside.now_us(),
            error: format!("a change could not be sent to the peers: {why}"),
            ..Default::default()
        });
    }

    /// Commits what the last rounds brought if it is time to, and loads what there is room for.
    pub fn keep_journal(&mut self) -> Result<(), Fatal> {
        for peer in &mut self.peers {
            for (first, last) in peer.inbox.take_changed() {
                self.journal.set_applied(&peer.name, first, last)?;
            }
        }
        self.note_clock()?;
        self.settle_flags()?;
        if self.trim_at_ms <= self.now_ms || self.journal.bytes() > self.config.journal_bytes_max {
            self.trim()?;
        }
        if let Some(error) = self.failed.take() {
            return Err(error.into());
        }
        if self.commit_due().is_some_and(|due| due <= self.outside.elapsed()) {
            self.journal.commit()?;
            self.committed = self.outside.elapsed();
        }
        self.load_outboxes()?;
        Ok(())
    }

    /// When the journal is to be committed, after this engine's beginning.
    pub fn commit_due(&self) -> Option<Duration> {
        let pause = match self.journal.is_urgent() {
            _ if self.is_stopping() => Duration::ZERO,
            true => COMMIT_EVERY,
            false => COMMIT_SOMETIME,
        };
        self.journal.is_writing().then(|| self.committed + pause)
    }

    fn load_outboxes(&mut self) -> Result<(), JournalError> {
        for peer in self.peers.iter_mut().filter(|peer| peer.is_up()) {
            // One in each round: others have their turn.
            if let Some(want) = peer.outbox.wants() {
                let stored = self.journal.unacknowledged(&peer.name, want.user.as_deref(), want.after, LOAD_BYTES)?;
                let is_all = stored.iter().map(|stored| stored.frame.len()).sum::<usize>() < LOAD_BYTES;
                let loaded = stored.into_iter().map(|stored| Loaded {
                    user: stored.user.as_str().into(),
                    seq: stored.seq,
                    frame: stored.frame.into(),
                    at_us: stored.at_us,
                    expected: stored.expected.map(Arc::from),
                });
                peer.outbox.load(&want, loaded.collect(), is_all);
            }
        }
        Ok(())
    }

    /// Drops what the journal has no room for.
    fn trim(&mut self) -> Result<(), JournalError> {
        self.trim_at_ms = self.now_ms + TRIM_EVERY_MS;
        let oldest_us = self.outside.now_us().saturating_sub(self.config.journal_age_us_max);
        self.journal.forget_elsewhere(oldest_us)?;
        if self.journal.forget_aliases(oldest_us)? {
            self.lists.set_aliases(self.journal.aliases()?);
        }
        self.journal.trim_flags(self.config.journal_bytes_max / FLAGS_SHARE, oldest_us)?;
        while let Some((name, trimmed)) = self.journal.trim(self.config.journal_bytes_max, oldest_us)? {
            if trimmed.missing > 0 {
                log::error!(
                    "Peer {name}: {} changes did not fit into the journal any more (dovetail_journal_size, \
                     dovetail_journal_days) and will be missing there: it must be compared with this server.",
                    trimmed.missing
                );
            }
            for user in trimmed.users {
                self.remember_failed(&Failed {
                    peer: name.clone(),
                    user,
                    at_us: self.outside.now_us(),
                    error: "changes did not fit into the journal (dovetail_journal_size, dovetail_journal_days)"
                        .to_owned(),
                    ..Default::default()
                });
            }
            let Some(index) = self.peers.iter().position(|peer| peer.name == name) else { continue };
            self.peers[index].outbox.note_dropped(trimmed.missing);
            self.peers[index].outbox.restart();
            self.peers[index].outbox.skip_up_to(trimmed.up_to, trimmed.changes);
        }
        Ok(())
    }
}
