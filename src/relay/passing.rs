//! Changes of other servers are passed on to those that they may not reach otherwise.
//!
//! What is applied here is put among our own changes, under a number of ours, for each peer of the user that is not known to
//! have it; so what the user does here next comes behind it. A peer to which its sender sends it as well gets it only if
//! the two are not connected, or if it does not come for a while, and without its bodies, which it asks us for then. Mostly
//! the peer says meanwhile that it has it, and it is dropped.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use prost::Message;

use super::engine::{Close, Engine};
use super::peers::PeerState;
use crate::change::{self, CHANGE_BYTES_MAX, VECTOR_MAX};
use crate::journal::{JournalError, PassedOn, Seen};
use crate::wire::frame;
use crate::wire::proto::frame::Kind;
use crate::wire::proto::op::What;
use crate::wire::proto::{Change, Known, Linked, Reach, SeqOf};

/// Changes that peers have and we do not, yet.
const TOLD_MAX: usize = 16_384;
/// Changes that a peer is told of when it connects.
const APPLIED_MAX: usize = 4_096;
/// Servers that are reached through others, that are said at once.
const REACH_MAX: usize = 2 * VECTOR_MAX;
/// A peer is told so often at once with whom this server is connected, as when many come up,
const LINKED_BURST: u64 = 16;
/// and then once in so long.
const LINKED_EVERY_MS: u64 = 1_000;
/// Between two servers that a peer names although there are enough; it sends again what is refused, each minute at least.
const NAME_EVERY_MS: u64 = 30_000;
/// Connections that a server is away, at most. What was reached once, and is told in circles, is forgotten beyond.
const HOPS_MAX: u32 = 8;

/// What peers said to have before it was applied here. Forgetting it costs sending that to them.
#[derive(Default)]
pub struct Told {
    /// Bits of the peers.
    peers: HashMap<OfUser, u64>,
    order: VecDeque<OfUser>,
    /// What was last applied here and who was given it, for those who connect later.
    applied: VecDeque<(Arc<str>, SeqOf, Vec<String>)>,
    hashes: RandomState,
}

/// A hash of the user's name, and his change's origin, epoch and number.
type OfUser = (u64, String, u64, u64);

impl Told {
    fn is_applied(&mut self, user: &Arc<str>, change: &SeqOf, given: &[String]) {
        if self.applied.len() >= APPLIED_MAX {
            self.applied.pop_front();
        }
        self.applied.push_back((user.clone(), change.clone(), given.to_vec()));
    }

    fn add(&mut self, peer: usize, user: &str, change: Seen) {
        let change = (self.hashes.hash_one(user), change.origin, change.epoch, change.seq);
        if let Some(peers) = self.peers.get_mut(&change) {
            *peers |= 1 << peer;
            return;
        }
        self.peers.insert(change.clone(), 1 << peer);
        self.order.push_back(change);
        if self.order.len() > TOLD_MAX {
            self.order.pop_front().and_then(|oldest| self.peers.remove(&oldest));
        }
    }

    /// Who has it; it is applied here now.
    fn take(&mut self, user: &str, change: &SeqOf) -> u64 {
        let change = (self.hashes.hash_one(user), change.origin.clone(), change.epoch, change.seq);
        self.peers.remove(&change).unwrap_or(0)
    }
}

/// Takes the bodies out: who gets it asks for them.
pub fn without_bodies(mut change: Change) -> Change {
    for op in &mut change.ops {
        if let Some(What::Save(save)) = &mut op.what {
            save.body_inline = false;
            save.body = Vec::new();
        }
    }
    change
}

impl Engine {
    /// What of the change from a peer may have to be passed on once it is applied.
    pub fn to_pass_on(&self, via: usize, change: &Change) -> Option<Box<Change>> {
        let origin = change.stamp.as_ref().map(|stamp| stamp.origin.as_str()).unwrap_or_default();
        let (mut is_any, mut is_new) = (false, false);
        for peer in self.peers_of(&change.user).filter(|peer| *peer != via && self.peers[*peer].name != origin) {
            is_any = true;
            is_new |= !change.given.contains(&self.peers[peer].name);
        }
        let kept = Change { spans: Vec::new(), ..change.clone() };
        is_any.then(|| Box::new(if is_new { kept } else { without_bodies(kept) }))
    }

    /// The change is applied: it is journaled for the peers that are not known to have it. `via`: who sent it.
    pub fn pass_on(&mut self, user: &Arc<str>, mut change: Change, via: Option<usize>) -> Result<(), JournalError> {
        let Some(stamp) = change.stamp.clone() else { return Ok(()) };
        let seen = SeqOf { origin: stamp.origin.clone(), epoch: stamp.epoch, seq: stamp.seq };
        let told = self.told.take(user, &seen);
        if self.journal.has_newer_epoch(user, &seen.origin, seen.epoch)? {
            // Nobody could tell whether it came before, and it would go round and round.
            let mailbox = change.mailbox.as_ref().map(|mailbox| mailbox.guid.clone()).unwrap_or_default();
            self.fail_to_tell(user, mailbox, &format!("server {} has lost its journal since it made it", seen.origin));
            return Ok(());
        }
        let needs =
            |peer: &usize| Some(*peer) != via && self.peers[*peer].name != stamp.origin && told & (1 << *peer) == 0;
        let peers: Vec<usize> = self.peers_of(user).filter(needs).collect();
        if peers.is_empty() {
            return Ok(());
        }
        let via: Option<Arc<str>> = via.map(|via| self.peers[via].name.as_str().into());
        let is_given = |peer: &usize| via.is_some() && change.given.contains(&self.peers[*peer].name);
        let (given, new): (Vec<usize>, Vec<usize>) = peers.iter().copied().partition(is_given);
        let seq = self.journal.next_seq()?;
        change.carrier = seq;
        change.given.extend(new.iter().map(|peer| self.peers[*peer].name.clone()));
        change.given.push(self.me.server.clone());
        change.given.sort();
        change.given.dedup();
        change.given.truncate(VECTOR_MAX);
        if new.is_empty() || change.encoded_len() > CHANGE_BYTES_MAX {
            change = without_bodies(change);
        }
        let encoded: Arc<[u8]> = match frame::encode(&Kind::Change(change).into()) {
            Ok(bytes) => bytes.into(),
            Err(error) => {
                self.fail_to_tell(user, Vec::new(), &error.to_string());
                return Ok(());
            }
        };
        let now_us = self.outside.now_us();
        let name = |peer: &usize| self.peers[*peer].name.as_str();
        let (names, of_given): (Vec<&str>, Vec<&str>) =
            (peers.iter().map(name).collect(), given.iter().map(name).collect());
        let SeqOf { origin, epoch, seq: origin_seq } = seen;
        let passed_on = PassedOn {
            change: &Seen { origin, epoch, seq: origin_seq },
            via: via.as_deref().unwrap_or_default(),
            given: &of_given,
        };
        self.journal.pass_on(user, now_us, &encoded, &names, &passed_on)?;
        for peer in peers {
            self.peers[peer].last_passed_on = seq;
            let expected = via.clone().filter(|_| given.contains(&peer));
            self.peers[peer].outbox.append_expected(user, seq, encoded.clone(), now_us, expected);
        }
        Ok(())
    }

    /// Says to all that may pass it on to us, and to its origin, that it is applied here. `via`: to whom it is acknowledged.
    pub fn tell_known(&mut self, user: &Arc<str>, change: &SeqOf, given: &[String], via: usize) {
        if !self.is_mesh() {
            return;
        }
        self.told.is_applied(user, change, given);
        for (index, peer) in self.peers.iter_mut().enumerate() {
            let may_ask = index != via && (peer.name == change.origin || given.contains(&peer.name));
            if let Some(link) = peer.link.as_mut().filter(|link| may_ask && link.session.is_up()) {
                link.session.tell_known(user.clone(), change.clone());
            }
        }
    }

    /// A peer is connected again: it may wait for us to say what came through others meanwhile.
    pub fn tell_last_known(&mut self, index: usize) {
        let PeerState { name, link: Some(link), .. } = &mut self.peers[index] else { return };
        for (user, change, given) in &self.told.applied {
            if change.origin == *name || given.contains(name) {
                link.session.tell_known(user.clone(), change.clone());
            }
        }
    }

    /// A peer has changes that are another server's, or ours and came to it through others.
    pub fn peer_knows(&mut self, index: usize, known: Known) -> Result<(), Close> {
        if !change::is_server(&known.origin) {
            return Err(Close::Malformed("it has changes of a server that has no name".into()));
        }
        for seq in known.seqs {
            let change = Seen { origin: known.origin.clone(), epoch: known.epoch, seq };
            if let Err(error) = self.try_peer_knows(index, &known.user, change) {
                self.fail(error);
                break;
            }
        }
        Ok(())
    }

    fn try_peer_knows(&mut self, index: usize, user: &str, change: Seen) -> Result<(), JournalError> {
        let name = &self.peers[index].name;
        let is_ours = change.origin == self.me.server;
        let seq = match is_ours && change.epoch == self.me.epoch {
            true => {
                let is_his = self.journal.pending_of(name, change.seq)?.is_some_and(|of| of == user);
                is_his.then_some(change.seq)
            }
            false => self.journal.pending_of_other(name, user, &change)?,
        };
        let Some(seq) = seq else {
            let origin = self.peers.iter().find(|peer| peer.name == change.origin);
            let is_applied = origin.is_some_and(|origin| origin.inbox.is_applied(change.epoch, change.seq));
            if !is_ours && !is_applied {
                self.told.add(index, user, change);
            }
            return Ok(());
        };
        if is_ours {
            self.acks.applied(index, seq);
        }
        if self.peers[index].outbox.take_back(&user.into(), seq) {
            self.journal.acknowledge(&self.peers[index].name, seq)?;
        }
        Ok(())
    }

    /// With whom this server is connected.
    pub fn linked(&self) -> Vec<String> {
        self.peers.iter().filter(|peer| peer.is_up()).map(|peer| peer.name.clone()).collect()
    }

    /// A connection came or went, here or elsewhere: those for whom it is news are to be told.
    pub fn tell_linked(&mut self) {
        if !self.is_mesh() {
            return;
        }
        for link in self.peers.iter_mut().filter_map(|peer| peer.link.as_mut()).filter(|link| link.session.is_up()) {
            let full_ms = (LINKED_BURST - 1) * LINKED_EVERY_MS;
            link.tell_linked_at_ms = Some(self.now_ms.max(link.told_until_ms.saturating_sub(full_ms)));
        }
    }

    /// Tells it with whom this server is connected, if it is time to and it has not heard of it. Not too often: one that says all the
    /// time that its connections come and go is not to fill the others' lanes.
    pub fn tell_linked_if_due(&mut self, index: usize) {
        let due_ms = self.peers[index].link.as_ref().and_then(|link| link.tell_linked_at_ms);
        if due_ms.is_none_or(|due_ms| due_ms > self.now_ms) {
            return;
        }
        let mut reach: Vec<Reach> =
            self.reach_without(Some(index)).into_iter().map(|(server, hops)| Reach { server, hops }).collect();
        // The nearest ones, as more are not taken.
        reach.sort_by_key(|reach| reach.hops);
        reach.truncate(REACH_MAX);
        let linked = Linked { servers: self.linked(), reach };
        let Some(link) = &mut self.peers[index].link else { return };
        link.tell_linked_at_ms = None;
        if link.told_linked.as_ref() != Some(&linked) {
            link.session.control(Kind::Linked(linked.clone()));
            link.told_linked = Some(linked);
            link.told_until_ms = self.now_ms.max(link.told_until_ms) + LINKED_EVERY_MS;
        }
    }

    /// Whom this server reaches, and over how many connections. What the peer says does not count: it may be what it heard
    /// from us.
    pub fn reach_without(&self, peer: Option<usize>) -> BTreeMap<String, u32> {
        let mut reach = BTreeMap::new();
        for (_, peer) in self.peers.iter().enumerate().filter(|(index, other)| Some(*index) != peer && other.is_up()) {
            let through = peer.reach.iter().map(|(server, hops)| (server, hops + 1));
            for (server, hops) in [(&peer.name, 1)].into_iter().chain(through) {
                if *server != self.me.server && hops <= HOPS_MAX {
                    reach.entry(server.clone()).and_modify(|known: &mut u32| *known = hops.min(*known)).or_insert(hops);
                }
            }
        }
        reach
    }

    /// With whom the peer is connected.
    pub fn take_linked(&mut self, index: usize, linked: Linked) -> Result<(), Close> {
        let Linked { servers, reach } = linked;
        let mut names = servers.iter().chain(reach.iter().map(|reach| &reach.server));
        if servers.len() > VECTOR_MAX || reach.len() > REACH_MAX || !names.all(|server| change::is_server(server)) {
            return Err(Close::Malformed("it is connected with too many servers, or with one that has no name".into()));
        }
        self.peers[index].outbox.set_linked(servers.iter().map(|server| server.as_str().into()));
        self.peers[index].reach =
            reach.into_iter().map(|Reach { server, hops }| (server, hops.min(HOPS_MAX))).collect();
        self.tell_linked();
        Ok(())
    }

    /// The peer passes on a change of this server. False: there are too many. A peer can make up names: of those that are more
    /// than can be known, those are forgotten that were not named for longest, and each peer may bring that about now and then only.
    pub fn note_far_origin(&mut self, via: usize, origin: &str) -> Result<bool, JournalError> {
        if self.peers.iter().any(|peer| peer.name == origin) {
            return Ok(true);
        }
        if let Some(at) = self.far.iter().position(|far| far == origin) {
            self.far[at..].rotate_left(1);
            return Ok(true);
        }
        if self.far.len() >= VECTOR_MAX {
            let may_name_ms = &mut self.peers[via].may_name_ms;
            if *may_name_ms > self.now_ms {
                return Ok(false);
            }
            *may_name_ms = self.now_ms + NAME_EVERY_MS;
            let forgotten = self.far.remove(0);
            self.journal.forget_origin(&forgotten)?;
        }
        self.journal.note_origin(origin)?;
        self.far.push(origin.to_owned());
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_peers_have_is_remembered_for_a_while() {
        let mut told = Told::default();
        let seen = |seq| Seen { origin: "a".into(), epoch: 1, seq };
        let seq_of = |seq| SeqOf { origin: "a".into(), epoch: 1, seq };
        told.add(0, "jane", seen(1));
        told.add(2, "jane", seen(1));
        assert_eq!(told.take("joe", &seq_of(1)), 0);
        assert_eq!((told.take("jane", &seq_of(1)), told.take("jane", &seq_of(1))), (0b101, 0));
        (0..2 * TOLD_MAX as u64).for_each(|seq| told.add(1, "jane", seen(seq)));
        assert_eq!((told.peers.len(), told.order.len()), (TOLD_MAX, TOLD_MAX));
        assert_eq!((told.take("jane", &seq_of(5)), told.take("jane", &seq_of(TOLD_MAX as u64 + 5))), (0, 2));
    }
}
