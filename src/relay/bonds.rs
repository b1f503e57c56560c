//! Whether a peer, or this server, is an earlier state of what it was: restored from a backup, or a copy of it that goes on by itself.
//!
//! [`crate::peer::bond`] says how that is noticed. Whoever was set back begins a new epoch, as nobody can know what its numbers mean,
//! and both sides compare all users. Two that have one name at the same time are let in no more until a person decides.

use mio::Token;
use prost::Message as _;

use super::durable::sent_change;
use super::engine::{Close, Engine, Role};
use crate::change;
use crate::journal::JournalError;
use crate::peer::bond::{self, Side, Verdict, NONCE_BYTES_MAX};
use crate::wire::proto::frame::Kind;
use crate::wire::proto::{AcceptPeer, Bond, Bonds, Hello, PeerAccepted};

/// Between two bonds while something happens: what is set back by less may not be noticed.
const BOND_EVERY_MS: u64 = 60_000;
/// A relay runs at least for so long before it begins a new epoch: whoever says that it must can do so only now and then.
const RUNS_MS_MIN: u64 = 2_000;

/// One that is offered sooner after the last is not taken: each waits for the disk. Who offers them does so each minute.
const TAKEN_EVERY_MS: u64 = 1_000;
/// For one peer a new epoch is begun once in so long: it costs everybody.
const ANEW_EVERY_US: u64 = 3_600_000_000;
/// An epoch is the time when it began. One that is ten years ahead is nobody's: a later one would have to be begun behind it, which
/// others could not take for one.
const EPOCH_AHEAD_US_MAX: u64 = 10 * 365 * 86_400 * 1_000_000;
/// No clock that is right is before 2026.
const NOW_US_MIN: u64 = 1_767_225_600_000_000;
/// Numbers that are left out for those that a peer has heard of; far more than are ever given.
const SEQS_AHEAD_MAX: u64 = 1 << 40;
/// Numbers of changes, and of epochs, are below: they are counted on from.
pub const NUMBER_MAX: u64 = 1 << 62;

/// When the next bond is due; see [`Engine::bond_again`].
#[derive(Default)]
pub struct Bonding {
    at_ms: u64,
    /// What had been journaled and applied at the last one.
    after: (u64, u64),
    /// The peer's version has bonds.
    is_known: bool,
    /// When the peer's next one is taken.
    take_at_ms: u64,
}

impl Engine {
    pub fn resume_bonds(&mut self) -> Result<(), JournalError> {
        for peer in &mut self.peers {
            // What cannot be read is none, which the peer notices.
            peer.bonds = Bonds::decode(&self.journal.bonds(&peer.name)?[..]).unwrap_or_default();
        }
        Ok(())
    }

    /// Before a greeting is taken: whether it is the peer that we knew, and we are whom it knew. False if an earlier state of one that
    /// is connected has greeted.
    pub fn judge(&mut self, index: usize, hello: &Hello) -> Result<bool, Close> {
        let peer = &self.peers[index];
        if let Some(reason) = &peer.disputed {
            return Err(Close::Refused { reason: reason.clone(), tell: true });
        }
        self.check_epoch(hello.epoch.max(hello.applied_epoch))?;
        if hello.first_pending > NUMBER_MAX {
            return Err(Close::Malformed(format!("it says number {}", hello.first_pending)));
        }
        let theirs = Side { epoch: hello.epoch, knows: hello.applied_epoch, bonds: hello.bonds.as_ref() };
        let ours = Side { epoch: self.me.epoch, knows: peer.inbox.epoch(), bonds: Some(&peer.bonds) };
        let knows_more = hello.applied_epoch == self.me.epoch && hello.applied_seq > self.journal.seq();
        match bond::compare(&ours, &theirs) {
            Verdict::WeAreSetBack => {}
            _ if knows_more => {}
            Verdict::Follows => return Ok(true),
            Verdict::TheyAreSetBack if self.peers[index].is_let_in() => return Ok(false),
            Verdict::TheyAreSetBack => return Err(self.refuse_earlier(index)),
        }
        let reason = "it knows a later state of this server";
        Err(self.begin_new_epoch(index, (hello.applied_epoch, hello.applied_seq), reason))
    }

    pub fn check_epoch(&self, epoch: u64) -> Result<(), Close> {
        let now_us = self.outside.now_us().max(NOW_US_MIN);
        match epoch <= now_us.saturating_add(EPOCH_AHEAD_US_MAX) {
            true => Ok(()),
            false => {
                Err(Close::Malformed(format!("it says epoch {epoch}, which is years ahead of this server's clock")))
            }
        }
    }

    /// An earlier state of a peer that is connected has greeted. It may be gone since: a relay that is killed leaves connections behind
    /// that are accepted later than those of the next one.
    pub fn doubt(&mut self, index: usize, token: Token) {
        let now_ms = self.now_ms;
        let Some(Role::Stranger(session)) = self.sockets.get_mut(&token).map(|socket| &mut socket.role) else { return };
        let ping = session.probe(now_ms);
        self.peers[index].doubted = Some(token);
        self.send(token, &ping.into());
    }

    /// It is there.
    pub fn doubted_is_there(&mut self, token: Token) -> Result<(), Close> {
        match self.peers.iter().position(|peer| peer.doubted == Some(token)) {
            Some(index) => Err(self.refuse_earlier(index)),
            None => Ok(()),
        }
    }

    /// If the one that is connected answers, too, there are two.
    fn refuse_earlier(&mut self, index: usize) -> Close {
        let now_ms = self.now_ms;
        let peer = &mut self.peers[index];
        let is_let_in = peer.is_let_in();
        if let Some(link) = peer.link.as_mut().filter(|_| is_let_in) {
            let ping = link.session.probe(now_ms);
            link.session.control(ping);
            let reason = format!("a later state of server {} is connected here", peer.name);
            return Close::Refused { reason, tell: true };
        }
        let reason =
            format!("its state is an earlier one than it had when it was last connected with {}", self.me.server);
        Close::SetBack { reason, epoch: peer.inbox.epoch() }
    }

    /// This server was set back. Why the connection is closed; the relay begins again.
    pub fn begin_new_epoch(&mut self, index: usize, after: (u64, u64), reason: &str) -> Close {
        let name = self.peers[index].name.clone();
        let now_us = self.outside.now_us();
        if self.begins_anew || self.now_ms < RUNS_MS_MIN {
            return Close::Ended(reason.to_owned());
        }
        match self.journal.begun_anew_us(&name) {
            Ok(Some(at_us)) if (at_us..at_us.saturating_add(ANEW_EVERY_US)).contains(&now_us) => {
                return self.dispute_new_epoch(index, reason);
            }
            Ok(_) => {}
            Err(error) => self.fail(error),
        }
        log::error!(
            "Peer {name}: {reason}: the mail or the journal of this server was set back (restored from a backup, or a copy of the \
             machine). What it had not told its peers before is dropped, and all users are compared with them; the relay starts again."
        );
        if let Err(error) = self.try_begin_new_epoch(&name, after, now_us) {
            self.fail(error);
        }
        Close::Ended("this server was set back".into())
    }

    fn try_begin_new_epoch(&mut self, peer: &str, (epoch, seq): (u64, u64), now_us: u64) -> Result<(), JournalError> {
        let why = "this server was set back (restored from a backup?)";
        let seq = seq.min(self.journal.seq() + SEQS_AHEAD_MAX);
        let (epoch, again) = self.journal.begin_anew((epoch.max(self.me.epoch), seq), now_us, why)?;
        self.journal.note_begun_anew(peer, Some(now_us))?;
        self.me = std::sync::Arc::new(crate::peer::Identity { epoch, ..(*self.me).clone() });
        for stored in again {
            let Some(change) = sent_change(&stored.frame) else { continue };
            let user = stored.user.as_str().into();
            match change.carrier {
                0 => self.ship_change(&user, change)?,
                _ => self.pass_on(&user, change, None)?,
            }
        }
        self.journal.commit()?;
        // They know the old one.
        let links: Vec<_> = self.peers.iter().filter_map(|peer| Some(peer.link.as_ref()?.token)).collect();
        links.into_iter().for_each(|token| self.close(token, Close::Ended("this server was set back".into())));
        self.begins_anew = !self.is_stopping();
        Ok(())
    }

    /// A peer that has lost what it knew begins anew, and is to be compared.
    pub fn note_new_epoch(&mut self, index: usize, hello: &Hello) {
        let peer = &mut self.peers[index];
        let known = peer.inbox.epoch();
        if known == 0 || known == hello.epoch {
            return;
        }
        log::warn!(
            "Peer {}: it has lost its state, or was set back (restored from a backup?): all users are compared with it.",
            peer.name
        );
        peer.bonds = Bonds::default();
        let (name, now_us) = (peer.name.clone(), self.outside.now_us());
        let outcome = self
            .journal
            .compare_all_with(&name, now_us, "it has lost its state, or was set back (restored from a backup?)")
            .and_then(|()| self.journal.keep_bonds(&name, &[]))
            .and_then(|()| self.journal.failed_count());
        match outcome {
            Ok(count) => self.counts.counters.failed = count,
            Err(error) => self.fail(error),
        }
    }

    pub fn begin_bonding(&mut self, index: usize, hello: &Hello) {
        let peer = &mut self.peers[index];
        peer.bonding.take_at_ms = 0;
        peer.bonding.is_known = hello.bonds.is_some();
        let theirs = hello.bonds.as_ref().and_then(|bonds| bonds.agreed.as_ref());
        if peer.we_connect() && theirs.is_some() && peer.bonds.offered.as_ref() == theirs {
            // Only the answer was lost.
            peer.bonds = Bonds { agreed: peer.bonds.offered.take(), offered: None };
        }
        self.offer_bond(index);
    }

    /// While something happens.
    pub fn bond_again(&mut self, index: usize) {
        let Bonding { at_ms, after, .. } = self.peers[index].bonding;
        if at_ms <= self.now_ms && after != self.done() && self.peers[index].is_up() {
            self.offer_bond(index);
        }
    }

    /// What a state that is set back lacks.
    fn done(&self) -> (u64, u64) {
        (self.journal.seq(), self.counts.counters.applied)
    }

    fn offer_bond(&mut self, index: usize) {
        let (after, now_us) = (self.done(), self.outside.now_us());
        let peer = &mut self.peers[index];
        if !peer.we_connect() || !peer.bonding.is_known {
            return;
        }
        peer.bonding.at_ms = self.now_ms + BOND_EVERY_MS;
        peer.bonding.after = after;
        // One that is not answered is offered again, so there are never more than two.
        let is_new = peer.bonds.offered.is_none();
        let offered = peer.bonds.offered.take().unwrap_or_else(|| bond::next(&peer.bonds, now_us, &self.me.instance));
        peer.bonds.offered = Some(offered.clone());
        if is_new {
            self.keep_bonds(index);
        }
        if let Some(link) = &mut self.peers[index].link {
            link.session.control(Kind::Bond(offered));
        }
    }

    /// Offered by who connected to us, or said back.
    pub fn take_bond(&mut self, index: usize, bond: Bond) -> Result<(), Close> {
        if bond.nonce.len() > NONCE_BYTES_MAX {
            return Err(Close::Malformed("it sent a bond that is too long".into()));
        }
        let peer = &mut self.peers[index];
        if peer.we_connect() {
            if peer.bonds.offered.as_ref() == Some(&bond) {
                peer.bonds = Bonds { agreed: peer.bonds.offered.take(), offered: None };
            }
            return Ok(());
        }
        if peer.bonds.agreed.as_ref().is_none_or(|agreed| agreed.at_us < bond.at_us) {
            if peer.bonding.take_at_ms > self.now_ms {
                return Ok(());
            }
            peer.bonding.take_at_ms = self.now_ms + TAKEN_EVERY_MS;
            peer.bonds.agreed = Some(bond.clone());
            self.keep_bonds(index);
        }
        if let Some(link) = &mut self.peers[index].link {
            link.session.control(Kind::Bond(bond));
        }
        Ok(())
    }

    fn keep_bonds(&mut self, index: usize) {
        let peer = &self.peers[index];
        if let Err(error) = self.journal.keep_bonds(&peer.name, &peer.bonds.encode_to_vec()) {
            self.fail(error);
        }
    }

    /// Two servers have the peer's name. Why the connection is closed.
    pub fn dispute(&mut self, index: usize) -> Close {
        let name = &self.peers[index].name;
        let reason = format!(
            "two servers call themselves {name}, and one is an earlier state of the other (a copy of the machine?): stop one of them, \
             then say so here, on {}: doveadm dovetail peer accept {name}",
            self.me.server
        );
        self.wait_for_a_person(index, reason)
    }

    /// It makes this server begin anew again and again.
    fn dispute_new_epoch(&mut self, index: usize, why: &str) -> Close {
        let (name, me) = (&self.peers[index].name, &self.me.server);
        let reason = format!(
            "{name} says for the second time within an hour that {me} was set back ({why}): if {me} was restored from a backup again, \
             say so there: doveadm dovetail peer accept {name}"
        );
        self.wait_for_a_person(index, reason)
    }

    fn wait_for_a_person(&mut self, index: usize, reason: String) -> Close {
        let peer = &mut self.peers[index];
        let name = &peer.name;
        log::error!("Peer {name}: {reason}. Until then nothing is replicated with either.");
        peer.disputed = Some(reason.clone());
        let name = name.clone();
        if let Err(error) = self.journal.set_disputed(&name, Some(&reason)) {
            self.fail(error);
        }
        Close::Refused { reason, tell: true }
    }

    /// A person says that there is one only.
    pub fn accept_peer(&mut self, token: Token, request: &AcceptPeer) {
        let Some(peer) = self.peers.iter_mut().find(|peer| peer.name == request.peer) else {
            let error = format!("There is no peer '{}' (dovetail_peers)", change::printable(&request.peer));
            return self.send(token, &Kind::PeerAccepted(PeerAccepted { error }).into());
        };
        let name = peer.name.clone();
        let error = match peer.disputed {
            Some(_) => String::new(),
            None => format!("Nothing is to be decided about peer '{name}'"),
        };
        peer.connect_soon();
        let accepted = self.journal.set_disputed(&name, None).and_then(|()| self.journal.note_begun_anew(&name, None));
        if let Err(error) = accepted.and_then(|()| self.journal.commit()) {
            return self.fail(error);
        }
        self.send(token, &Kind::PeerAccepted(PeerAccepted { error }).into());
    }
}
