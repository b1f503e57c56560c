//! The other servers: connecting to them, being connected to, and what their relays say.
//!
//! Of two servers the one with the lower name connects, so that there is one connection and no doubt which. What fails
//! is logged once, when the reason changes, and tried again after growing pauses.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use mio::Token;

use super::backoff::Backoff;
use super::bodies::Party;
use super::bonds::{Bonding, NUMBER_MAX};
use super::connection::Connection;
use super::engine::{Close, Engine, Role};
use super::work::Received;
use super::Config;
use crate::change::{self, USER_BYTES_MAX, VECTOR_MAX};
use crate::peer::{Admits, Event, Inbox, Outbox, Session, SessionError, Verdict};
use crate::wire::frame;
use crate::wire::proto::frame::Kind;
use crate::wire::proto::{Ack, Bonds, Change, Frame, Hello, Linked, PeerRemoved, Refused};

/// Pauses between attempts to connect. A peer that is back is found within the longest.
const RETRY_MS_MIN: u64 = 50;
const RETRY_MS_MAX: u64 = 5_000;
/// Clocks that differ more are reported.
const CLOCK_SECS_MAX: u128 = 60;
/// A session that was up for this long was a good one: the pauses begin again.
const GOOD_SESSION_MS: u64 = 2_000;

/// A connection with a known peer.
pub struct Link {
    pub token: Token,
    pub session: Session,
    up_since_ms: Option<u64>,
    /// What it was last told of our connections.
    pub told_linked: Option<Linked>,
    /// When it is to be told again, if it is.
    pub tell_linked_at_ms: Option<u64>,
    /// If it had been told as often as it may on average, the last time was then.
    pub told_until_ms: u64,
}

impl Link {
    fn new(token: Token, session: Session) -> Link {
        Link { token, session, up_since_ms: None, told_linked: None, tell_linked_at_ms: None, told_until_ms: 0 }
    }
}

/// One peer, connected or not.
pub struct PeerState {
    pub name: String,
    address: String,
    we_connect: bool,
    pub outbox: Outbox,
    pub inbox: Inbox,
    pub link: Option<Link>,
    /// Since when there is no connection, if there is none.
    pub down_since_ms: u64,
    pub last_error: String,
    /// For people; empty: its clock is right.
    pub clock_error: String,
    /// It had acknowledged to us what it knows of us up to this clock; see [`Session::peers_heard_clock`].
    pub heard_clock: u64,
    /// The number of the last change of another server that was to be passed on to it.
    pub last_passed_on: u64,
    /// Whom it reaches without us, and over how many connections.
    pub reach: Vec<(String, u32)>,
    /// When it may name a server that nobody has named before, if there are enough of those.
    pub may_name_ms: u64,
    is_resolving: bool,
    is_refused: bool,
    /// By what it is known again.
    pub bonds: Bonds,
    pub bonding: Bonding,
    /// Who greeted by its name last though a later state of it is connected; see [`Engine::doubt`].
    pub doubted: Option<Token>,
    /// Why nobody is let in by its name until a person decides.
    pub disputed: Option<String>,
    retry_at_ms: u64,
    backoff: Backoff,
    attempts: usize,
}

impl PeerState {
    pub fn all(config: &Config) -> Vec<PeerState> {
        let share = config.queue_bytes_max / config.peers.len().max(1);
        let state = |peer: &super::Peer| PeerState {
            name: peer.name.clone(),
            address: peer.address.clone(),
            we_connect: config.server < peer.name,
            outbox: Outbox::new(share),
            inbox: Inbox::default(),
            link: None,
            down_since_ms: 0,
            last_error: String::new(),
            clock_error: String::new(),
            heard_clock: 0,
            last_passed_on: 0,
            reach: Vec::new(),
            may_name_ms: 0,
            is_resolving: false,
            is_refused: false,
            bonds: Bonds::default(),
            bonding: Bonding::default(),
            doubted: None,
            disputed: None,
            retry_at_ms: 0,
            backoff: Backoff::new(RETRY_MS_MIN, RETRY_MS_MAX),
            attempts: 0,
        };
        config.peers.iter().map(state).collect()
    }

    pub fn is_up(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.session.is_up())
    }

    /// For people.
    pub fn state(&self) -> &'static str {
        match &self.link {
            Some(link) if link.session.is_up() => "connected",
            Some(_) => "connecting",
            None if self.is_resolving => "connecting",
            None if self.disputed.is_some() => "disputed",
            None if self.is_refused => "refused",
            None => "waiting",
        }
    }

    pub fn wake_up_ms(&self) -> Option<u64> {
        match &self.link {
            Some(link) => {
                let others = self.outbox.wake_up_ms().into_iter().chain(link.tell_linked_at_ms);
                Some(others.fold(link.session.wake_up_ms(), u64::min))
            }
            None => (self.may_connect() && !self.is_resolving).then_some(self.retry_at_ms),
        }
    }

    fn may_connect(&self) -> bool {
        self.we_connect && self.disputed.is_none()
    }

    /// It was greeted, and let in.
    pub fn is_let_in(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.up_since_ms.is_some())
    }

    pub fn we_connect(&self) -> bool {
        self.we_connect
    }

    /// A person has decided.
    pub fn connect_soon(&mut self) {
        self.disputed = None;
        self.last_error.clear();
        self.retry_at_ms = 0;
        self.backoff.reset();
    }

    /// True if nothing is left that this peer could still take or acknowledge.
    pub fn is_settled(&self) -> bool {
        !self.is_up() || self.outbox.is_settled() && self.link.as_ref().is_some_and(|link| link.session.is_quiet())
    }
}

impl Engine {
    /// A person says that this peer is gone for good. Peers are numbers in all that is remembered, so it is the next start that is without it.
    pub fn remove_peer(&mut self, token: Token, name: &str) {
        let Some(peer) = self.peers.iter().find(|peer| peer.name == name) else {
            let error = format!("There is no peer '{}' (dovetail_peers)", change::printable(name));
            return self.send(token, &Kind::PeerRemoved(PeerRemoved { error, changes: 0 }).into());
        };
        let changes = peer.outbox.stats().pending;
        log::warn!(
            "Peer {name}: it is removed, as doveadm was asked to: {changes} changes that it has not acknowledged are forgotten. The relay \
             starts again."
        );
        if let Err(error) = self.journal.remove_peer(name).and_then(|()| self.journal.commit()) {
            return self.fail(error);
        }
        self.send(token, &Kind::PeerRemoved(PeerRemoved { error: String::new(), changes }).into());
        self.begins_anew = !self.is_stopping();
    }

    /// Connects if it is time to; looks whether the peer is still there.
    pub fn peer_tick(&mut self, index: usize) {
        let now_ms = self.now_ms;
        let peer = &mut self.peers[index];
        if let Some(link) = &mut peer.link {
            if let Err(error) = link.session.tick(now_ms) {
                let token = link.token;
                return self.close(token, Close::Ended(error.to_string()));
            }
            peer.outbox.end_pauses(now_ms);
            self.tell_linked_if_due(index);
            self.bond_again(index);
            return;
        }
        if peer.may_connect() && !peer.is_resolving && peer.retry_at_ms <= now_ms && !self.is_stopping() {
            self.connect(index);
        }
    }

    pub fn peer_resolved(&mut self, index: usize, outcome: io::Result<Vec<SocketAddr>>) {
        let peer = &mut self.peers[index];
        peer.is_resolving = false;
        let address = match &outcome {
            Ok(addresses) if !addresses.is_empty() => Ok(addresses[peer.attempts % addresses.len()]),
            Ok(_) => Err(format!("'{}' has no address", peer.address)),
            Err(error) => Err(format!("resolving '{}' failed: {error}", peer.address)),
        };
        match address {
            _ if peer.link.is_some() => {}
            Ok(address) => self.connect_to(index, address),
            Err(error) => self.retry(index, error, false),
        }
    }

    pub fn session_with_stranger(&self) -> Session {
        let names = |we_connect: bool| {
            self.peers.iter().filter(|peer| peer.we_connect == we_connect).map(|peer| peer.name.clone()).collect()
        };
        let admits = Admits::OneOf { connecting: names(false), others: names(true) };
        Session::new(self.me.clone(), admits, self.now_ms)
    }

    /// What someone said who connected to us and is not let in yet.
    pub fn stranger_event(&mut self, token: Token, event: Result<Option<Event>, SessionError>) -> Result<(), Close> {
        let hello = match event.map_err(refusal)? {
            Some(Event::Hello(hello)) => hello,
            Some(Event::IsThere) => return self.doubted_is_there(token),
            _ => return Ok(()),
        };
        let Some(index) = self.peers.iter().position(|peer| peer.name == hello.server) else {
            return Ok(());
        };
        if let Some(Err(reason)) = self.sockets.get(&token).map(|socket| socket.connection.proves(&hello.server)) {
            return Err(Close::Refused {
                reason: format!("it calls itself '{}', and {reason}", hello.server),
                tell: true,
            });
        }
        if !self.judge(index, &hello)? {
            self.doubt(index, token);
            return Ok(());
        }
        if let Some(link) = &self.peers[index].link {
            let old = link.token;
            self.close(old, Close::Ended("it connected again".into()));
        }
        let Some(socket) = self.sockets.get_mut(&token) else {
            return Ok(());
        };
        let Role::Stranger(session) = std::mem::replace(&mut socket.role, Role::Peer(index)) else {
            return Ok(());
        };
        self.peers[index].link = Some(Link::new(token, *session));
        self.take_hello(index, &hello)
    }

    pub fn stranger_closed(&mut self, mut connection: Connection, why: &Close) {
        tell_why(&mut connection, why);
        self.counts.note("turned_away", 1);
        let (from, why) = (connection.from(), why.reason());
        self.say_of_stranger(format!("A server that connected as a peer from {from} is turned away: {why}."));
    }

    pub fn peer_frame(&mut self, index: usize, frame: Frame) -> Result<(), Close> {
        let Some(link) = &mut self.peers[index].link else {
            return Ok(());
        };
        let event = match link.session.receive(frame, self.now_ms) {
            Err(SessionError::SetBack { epoch, reason }) => {
                self.check_epoch(epoch)?;
                return Err(self.begin_new_epoch(index, (epoch, 0), &reason));
            }
            event => event.map_err(refusal)?,
        };
        let from = Party::Peer(index);
        match event {
            Some(Event::Hello(hello)) => match self.judge(index, &hello)? {
                true => self.take_hello(index, &hello),
                false => Ok(()),
            },
            Some(Event::Bond(bond)) => self.take_bond(index, bond),
            Some(Event::IsThere) => Err(self.dispute(index)),
            Some(Event::Change(change)) => self.take_change(index, change),
            Some(Event::Ack(ack)) => {
                self.take_acks(index, &ack);
                Ok(())
            }
            Some(Event::Refused(refused)) => {
                self.take_refusal(index, &refused);
                Ok(())
            }
            Some(Event::BodyRequest(request)) => self.body_request(from, request),
            Some(Event::BodyChunk(chunk)) => self.body_chunk(from, chunk),
            Some(Event::BodyMore(more)) => self.body_more(from, more),
            Some(Event::BodyCancel(cancel)) => {
                self.body_cancel(from, &cancel);
                Ok(())
            }
            Some(Event::Known(known)) => self.peer_knows(index, known),
            Some(Event::Linked(linked)) => self.take_linked(index, linked),
            Some(Event::Question(question)) => self.take_question(index, question),
            Some(Event::Answer(answer)) => {
                self.take_answer(index, answer);
                Ok(())
            }
            None => Ok(()),
        }
    }

    pub fn peer_closed(&mut self, index: usize, token: Token, mut connection: Connection, why: &Close) {
        if self.peers[index].link.as_ref().is_none_or(|link| link.token != token) {
            return;
        }
        tell_why(&mut connection, why);
        let link = self.peers[index].link.take();
        self.peers[index].reach.clear();
        let up_ms = link.and_then(|link| link.up_since_ms).map(|since| self.now_ms - since);
        if up_ms.is_some_and(|up| up >= GOOD_SESSION_MS) {
            self.peers[index].backoff.reset();
        }
        // It will send again what was not acknowledged.
        for dropped in self.work.drop_peer(index) {
            self.peers[index].inbox.finish(dropped.bytes);
        }
        self.questions_without(index);
        self.comparisons_without(index);
        let reason = why.reason().to_owned();
        self.bodies_without(
            Party::Peer(index),
            &format!("the connection to server '{}' broke", self.peers[index].name),
        );
        self.retry(index, reason, matches!(why, Close::Refused { .. } | Close::SetBack { .. }));
        if up_ms.is_some() {
            self.peers[index].down_since_ms = self.now_ms;
            self.tell_linked();
        }
    }

    fn connect(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        peer.attempts += 1;
        if let Ok(address) = peer.address.parse() {
            return self.connect_to(index, address);
        }
        peer.is_resolving = true;
        let address = peer.address.clone();
        if let Err(error) = self.outside.resolve(index, address) {
            self.peers[index].is_resolving = false;
            self.retry(index, format!("no thread can be started to resolve its address: {error}"), false);
        }
    }

    fn connect_to(&mut self, index: usize, address: SocketAddr) {
        if let Err(error) = self.config.check_address(address.ip()) {
            return self.retry(index, error, true);
        }
        let tls = self.config.tls.as_ref().map(|tls| tls.connect(&self.peers[index].name)).transpose();
        let tls = match tls {
            Ok(tls) => tls,
            Err(error) => return self.retry(index, error, true),
        };
        let stream = self.outside.connect_peer(address);
        match stream.and_then(|stream| self.add(Connection::new(stream, tls, true), Role::Peer(index))) {
            Ok(token) => {
                let first_pending = self.first_pending(index);
                let (clock, linked) = (self.clock.last(), self.linked());
                let peer = &mut self.peers[index];
                let mut session = Session::new(self.me.clone(), Admits::Only(peer.name.clone()), self.now_ms);
                let applied = (peer.inbox.epoch(), peer.inbox.applied_up_to());
                let bonds = peer.bonds.clone();
                session.greet(applied, first_pending, clock, self.outside.now_us(), linked, bonds);
                peer.link = Some(Link::new(token, session));
            }
            Err(error) => self.retry(index, format!("connect({address}) failed: {error}"), false),
        }
    }

    /// The connection failed or ended: says so once, and tries again later if it is ours to connect.
    fn retry(&mut self, index: usize, error: String, is_refused: bool) {
        let peer = &mut self.peers[index];
        peer.is_refused = is_refused;
        let next = if peer.disputed.is_some() {
            "waiting for a person".to_owned()
        } else if peer.we_connect {
            let pause_ms = peer.backoff.pause_ms();
            peer.retry_at_ms = self.now_ms + pause_ms;
            format!("trying again in {pause_ms} msecs")
        } else {
            "waiting for it to connect".to_owned()
        };
        if peer.last_error != error {
            let held = peer.outbox.stats().pending;
            log::warn!("Peer {} ({}): {error} - {next}, {held} changes held.", peer.name, peer.address);
            peer.last_error = error;
        }
    }

    /// The first of our changes that we will send.
    fn first_pending(&mut self, index: usize) -> u64 {
        match self.journal.first_pending(&self.peers[index].name) {
            Ok(first) => first.unwrap_or(self.journal.seq() + 1),
            Err(error) => {
                self.fail(error);
                0
            }
        }
    }

    fn take_hello(&mut self, index: usize, hello: &Hello) -> Result<(), Close> {
        let now_ms = self.now_ms;
        self.look_at_clock(index, hello);
        let linked = hello.linked.iter().filter(|server| change::is_server(server)).take(VECTOR_MAX);
        self.peers[index].outbox.set_linked(linked.map(|server| server.as_str().into()));
        self.note_new_epoch(index, hello);
        let (first_pending, linked) = (self.first_pending(index), self.linked());
        let peer = &mut self.peers[index];
        let Some(link) = &mut peer.link else { return Ok(()) };
        link.up_since_ms = Some(now_ms);
        if peer.inbox.begin(hello.epoch, hello.first_pending) {
            if let Err(error) = self.journal.begin_epoch(&peer.name, hello.epoch) {
                self.failed.get_or_insert(error);
            }
        }
        if !link.session.is_up() {
            let applied = (peer.inbox.epoch(), peer.inbox.applied_up_to());
            let (clock, now_us, bonds) = (self.clock.last(), self.outside.now_us(), peer.bonds.clone());
            link.session.greet(applied, first_pending, clock, now_us, linked, bonds);
        }
        peer.outbox.restart();
        if hello.applied_epoch == self.me.epoch {
            match self.journal.acknowledge_up_to(&peer.name, hello.applied_seq) {
                Ok(count) => {
                    peer.outbox.skip_up_to(hello.applied_seq, count);
                    self.acks.applied_up_to(index, hello.applied_seq);
                }
                Err(error) => drop(self.failed.get_or_insert(error)),
            }
        }
        peer.is_refused = false;
        peer.last_error.clear();
        self.causes.hope_again(&peer.name);
        self.work.look_at_all_again();
        let software = change::printable(&hello.software);
        let held = peer.outbox.stats().pending;
        log::info!("Peer {} ({}): connected to its relay ({software}), {held} changes held.", peer.name, peer.address);
        self.tell_linked();
        self.tell_last_known(index);
        self.begin_bonding(index, hello);
        Ok(())
    }

    /// Its clock may be wrong. Nothing depends on that but which of two changes counts as the later one.
    fn look_at_clock(&mut self, index: usize, hello: &Hello) {
        let now_us = self.outside.now_us();
        let is_clock = self.clock.observe(hello.clock, now_us);
        let seconds = (i128::from(hello.now_us) - i128::from(now_us)) / 1_000_000;
        let peer = &mut self.peers[index];
        peer.clock_error = match seconds.unsigned_abs() >= CLOCK_SECS_MAX && hello.now_us != 0 {
            true if seconds > 0 => format!("its clock is {seconds} seconds ahead of this server's"),
            true => format!("its clock is {} seconds behind this server's", -seconds),
            false if !is_clock => "its clock is years ahead of this server's".into(),
            false => String::new(),
        };
        if !peer.clock_error.is_empty() {
            log::warn!(
                "Peer {}: {}; where both change the same, the wrong one may count as later.",
                peer.name,
                peer.clock_error
            );
        }
    }

    fn take_change(&mut self, index: usize, change: Change) -> Result<(), Close> {
        let peer = &mut self.peers[index];
        let (epoch, seq, clock) = match &change.stamp {
            Some(stamp) if stamp.origin == peer.name && stamp.seq > 0 && change.carrier == 0 => {
                (stamp.epoch, stamp.seq, stamp.clock)
            }
            // Another server's, which it passes on.
            Some(stamp)
                if stamp.seq > 0
                    && change.carrier > 0
                    && may_be_passed_on(&stamp.origin, &peer.name, &self.me.server) =>
            {
                (peer.inbox.epoch(), change.carrier, stamp.clock)
            }
            Some(stamp) => {
                let (origin, seq) = (stamp.origin.escape_debug(), stamp.seq);
                return Err(Close::Malformed(format!("it sent change {seq} of server '{origin}'")));
            }
            None => return Err(Close::Malformed("it sent a change without a stamp".into())),
        };
        if seq > NUMBER_MAX {
            return Err(Close::Malformed(format!("it sent a change with number {seq}")));
        }
        if change.user.len() > USER_BYTES_MAX {
            // Much is remembered by users' names.
            return Err(Close::Malformed(format!(
                "it sent a change of a user whose name has {} bytes",
                change.user.len()
            )));
        }
        let bytes = change::memory_of(&change);
        let verdict = peer.inbox.receive(epoch, seq, &change.user, bytes);
        match verdict.map_err(|error| Close::Malformed(error.to_string()))? {
            Verdict::Ignore => return Ok(()),
            Verdict::Later => {
                let user = change.user.as_str().into();
                self.refuse(index, epoch, seq, &user, "too many of its server's changes wait here already");
                return Ok(());
            }
            Verdict::Acknowledge => {
                self.forget_coming(&change);
                self.acknowledge(index, epoch, seq);
                return Ok(());
            }
            Verdict::Apply => {}
        }
        let user: Arc<str> = change.user.as_str().into();
        if let Err(error) = change::check_change(&change) {
            self.peers[index].inbox.finish(bytes);
            let received = Received { peer: index, epoch, seq, bytes, change, waits_since_ms: None };
            match self.poison.refuse(&received.tried()) {
                true => self.set_aside_malformed(received, &error.to_string()),
                false => self.refuse(index, epoch, seq, &user, &error.to_string()),
            }
            return Ok(());
        }
        let checked = match self.clock.observe(clock, self.outside.now_us()) {
            true => Ok(()),
            false => Err("its clock is years ahead of this server's".to_owned()),
        };
        let checked = checked.and_then(|()| match self.take_origin(index, &change) {
            true => Ok(()),
            false => Err("it is passed on from more servers than can be known".to_owned()),
        });
        if let Err(error) = checked {
            self.peers[index].inbox.finish(bytes);
            self.refuse(index, epoch, seq, &user, &error);
            return Ok(());
        }
        self.work.push(&user, Received { peer: index, epoch, seq, bytes, change, waits_since_ms: None });
        Ok(())
    }

    fn take_origin(&mut self, via: usize, change: &Change) -> bool {
        let origin = change.stamp.as_ref().map(|stamp| stamp.origin.as_str()).unwrap_or_default();
        self.note_far_origin(via, origin).unwrap_or_else(|error| {
            self.fail(error);
            false
        })
    }

    fn take_acks(&mut self, index: usize, ack: &Ack) {
        if ack.epoch != self.me.epoch {
            return;
        }
        let peer = &mut self.peers[index];
        for seq in &ack.seqs {
            if !peer.outbox.ack(*seq) {
                continue;
            }
            self.acks.applied(index, *seq);
            if let Err(error) = self.journal.acknowledge(&peer.name, *seq) {
                self.failed.get_or_insert(error);
            }
        }
    }

    fn take_refusal(&mut self, index: usize, refused: &Refused) {
        if refused.epoch != self.me.epoch {
            return;
        }
        let error = change::printable(&refused.error);
        self.acks.refused(index, &refused.user);
        let peer = &mut self.peers[index];
        if let Some(pause_ms) = peer.outbox.refuse(refused.seq, &error, self.now_ms) {
            log::warn!(
                "Peer {}, user {}: change {} could not be applied there: {error} - sending it again in {pause_ms} msecs; \
                 the user's later changes wait.",
                peer.name,
                refused.user.escape_debug(),
                refused.seq
            );
        }
    }
}

fn may_be_passed_on(origin: &str, by: &str, to: &str) -> bool {
    change::is_server(origin) && origin != by && origin != to
}

fn refusal(error: SessionError) -> Close {
    match error {
        SessionError::NoGreeting
        | SessionError::SecondGreeting
        | SessionError::NotForPeers
        | SessionError::TooManyNumbers(_)
        | SessionError::NotReading => Close::Malformed(error.to_string()),
        error => Close::Refused { tell: error.is_refusal(), reason: error.to_string() },
    }
}

/// Tells the other side why, if its socket takes it at once.
fn tell_why(connection: &mut Connection, why: &Close) {
    let refused = match why.clone() {
        Close::Refused { reason, tell: true } => Refused { error: reason, ..Default::default() },
        Close::SetBack { reason, epoch } => Refused { error: reason, epoch, set_back: true, ..Default::default() },
        _ => return,
    };
    let refused = Kind::Refused(refused);
    if frame::append(&refused.into(), connection.out()).is_ok() {
        let _ = connection.write();
    }
}
