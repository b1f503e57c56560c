//! Bodies on their way: who asked whom for which message, and how much may still be sent.
//!
//! A body comes as chunks from where it lies (a worker, or the peer whose worker reads it) to who asked for it (the
//! peer, or the worker that applies). Each hop has its own number for it. Guarantees that no more than a window of one
//! body is held here, and that when one end goes the other is told.

use std::collections::{HashMap, VecDeque};

use super::engine::{Close, Engine};
use super::workers::{Task, Worker};
use crate::change::{self, NO_PEER};
use crate::peer::BODY_WINDOW_BYTES_MAX;
use crate::wire::proto::frame::Kind;
use crate::wire::proto::{BodyCancel, BodyChunk, BodyMore, BodyRequest};

/// Bodies that one peer may ask for at once.
const REQUESTS_PER_PEER_MAX: usize = 64;

/// One end of a body's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Party {
    Worker(usize),
    Peer(usize),
}

struct Route {
    asker: Party,
    /// The asker's number for it.
    asker_id: u64,
    /// Who sends the chunks; not known while the request waits for a worker.
    answerer: Option<Party>,
    /// Bytes that may still come.
    credit: u64,
    request: BodyRequest,
}

/// See the module.
#[derive(Default)]
pub struct Bodies {
    /// By our number, which the answerer uses.
    routes: HashMap<u64, Route>,
    by_asker: HashMap<(Party, u64), u64>,
    /// Requests of peers that wait for a worker.
    unread: VecDeque<u64>,
    last_id: u64,
}

impl Bodies {
    fn add(&mut self, asker: Party, answerer: Option<Party>, request: BodyRequest) -> u64 {
        self.last_id += 1;
        self.by_asker.insert((asker, request.id), self.last_id);
        let route = Route { asker, asker_id: request.id, answerer, credit: request.window.into(), request };
        self.routes.insert(self.last_id, route);
        self.last_id
    }

    fn remove(&mut self, id: u64) -> Option<Route> {
        let route = self.routes.remove(&id)?;
        self.by_asker.remove(&(route.asker, route.asker_id));
        if route.answerer.is_none() {
            self.unread.retain(|unread| *unread != id);
        }
        Some(route)
    }

    fn of_party(&self, party: Party) -> Vec<u64> {
        let concerns = |route: &Route| route.asker == party || route.answerer == Some(party);
        self.routes.iter().filter(|(_, route)| concerns(route)).map(|(id, _)| *id).collect()
    }

    fn asked_by(&self, party: Party) -> usize {
        self.routes.values().filter(|route| route.asker == party).count()
    }
}

impl Engine {
    pub fn body_request(&mut self, from: Party, mut request: BodyRequest) -> Result<(), Close> {
        if self.bodies.by_asker.contains_key(&(from, request.id)) {
            return Err(Close::Malformed(format!("it asked for two bodies as number {}", request.id)));
        }
        request.window = request.window.clamp(1, BODY_WINDOW_BYTES_MAX);
        let outcome = match from {
            Party::Worker(_) => self.ask_peer(from, &request),
            Party::Peer(_) => {
                self.canonical_request(&mut request);
                self.ask_worker(from, &request)
            }
        };
        let Err(error) = outcome else { return Ok(()) };
        self.count_if_foreign(&error);
        let failed = Kind::BodyChunk(failed(request.id, error));
        match from {
            Party::Worker(_) => self.tell(from, failed),
            // Not in the lane of bodies, whose length nobody limits but by not reading any.
            Party::Peer(index) => {
                if let Some(link) = &mut self.peers[index].link {
                    link.session.control(failed);
                }
            }
        }
        Ok(())
    }

    pub fn body_chunk(&mut self, from: Party, chunk: BodyChunk) -> Result<(), Close> {
        let Some(route) = self.bodies.routes.get_mut(&chunk.id).filter(|route| route.answerer == Some(from)) else {
            // The asker went or cancelled while it was on its way.
            return Ok(());
        };
        let length = chunk.data.len() as u64;
        let Some(credit) = route.credit.checked_sub(length) else {
            return Err(Close::Malformed(format!(
                "it sent {length} bytes of a body, but only {} were asked for",
                route.credit
            )));
        };
        route.credit = credit;
        let (asker, asker_id, id) = (route.asker, route.asker_id, chunk.id);
        if chunk.last {
            self.bodies.remove(id);
            self.reading_ended(from, id);
        }
        if matches!(asker, Party::Peer(_)) {
            self.count_if_foreign(&chunk.error);
        }
        self.tell(asker, Kind::BodyChunk(BodyChunk { id: asker_id, ..chunk }));
        Ok(())
    }

    pub fn body_more(&mut self, from: Party, more: BodyMore) -> Result<(), Close> {
        let Some(id) = self.bodies.by_asker.get(&(from, more.id)).copied() else {
            return Ok(());
        };
        let Some(route) = self.bodies.routes.get_mut(&id) else {
            return Ok(());
        };
        route.credit += u64::from(more.bytes);
        if route.credit > BODY_WINDOW_BYTES_MAX.into() {
            let credit = route.credit;
            return Err(Close::Malformed(format!("it asked for {credit} bytes of a body at once")));
        }
        match route.answerer {
            Some(answerer) => self.tell(answerer, Kind::BodyMore(BodyMore { id, bytes: more.bytes })),
            None => route.request.window += more.bytes,
        }
        Ok(())
    }

    pub fn body_cancel(&mut self, from: Party, cancel: &BodyCancel) {
        if let Some(id) = self.bodies.by_asker.get(&(from, cancel.id)).copied() {
            self.cancel_body(id);
        }
    }

    /// A worker or a peer is gone: whoever is at the other end of its bodies is told.
    pub fn bodies_without(&mut self, party: Party, reason: &str) {
        for id in self.bodies.of_party(party) {
            let Some(route) = self.bodies.routes.get(&id) else {
                continue;
            };
            if route.asker == party {
                self.cancel_body(id);
                continue;
            }
            let (asker, asker_id) = (route.asker, route.asker_id);
            self.bodies.remove(id);
            self.tell(asker, Kind::BodyChunk(failed(asker_id, reason.to_owned())));
        }
    }

    /// Hands waiting requests to idle workers.
    pub fn dispatch_reads(&mut self) {
        while let Some(at) = self.bodies.unread.iter().position(|id| self.may_be_read(*id)) {
            let Some(worker) = self.idle_reader() else { return };
            let Some(id) = self.bodies.unread.remove(at) else { return };
            let Some(route) = self.bodies.routes.get_mut(&id) else {
                continue;
            };
            route.answerer = Some(Party::Worker(worker));
            let request = BodyRequest { id, ..route.request.clone() };
            self.workers[worker].task = Task::Read(id);
            self.tell(Party::Worker(worker), Kind::BodyRequest(request));
        }
    }

    /// Its asker takes what it asked for, and has not more than its share of the workers.
    fn may_be_read(&self, id: u64) -> bool {
        let asker = |id: &u64| self.bodies.routes.get(id).map(|route| route.asker);
        let Some(Party::Peer(peer)) = asker(&id) else { return true };
        let reading = self.workers.iter().filter_map(Worker::reads).filter(|id| asker(id) == Some(Party::Peer(peer)));
        reading.count() < self.reading_max_of_peer() && !self.is_loaded(peer)
    }

    /// A peer asked for something of a user whose mail is none of its business.
    pub fn count_if_foreign(&mut self, error: &str) {
        if error.contains(NO_PEER) {
            self.counts.note("foreign_user", 1);
        }
    }

    /// So much waits for the peer to read it that nothing more is asked of workers for it.
    pub fn is_loaded(&self, peer: usize) -> bool {
        self.peers[peer].link.as_ref().is_some_and(|link| link.session.is_loaded())
    }

    /// Who sent the change has the message, whoever made it.
    fn ask_peer(&mut self, from: Party, request: &BodyRequest) -> Result<(), String> {
        let peer = match from {
            Party::Worker(index) => self.workers[index].applies_from(),
            Party::Peer(index) => Some(index),
        };
        let peer = peer.ok_or_else(|| "it is asked for by a worker that applies nothing".to_owned())?;
        if !self.peers[peer].is_up() {
            return Err(format!("peer {} is not connected", self.peers[peer].name));
        }
        let id = self.bodies.add(from, Some(Party::Peer(peer)), request.clone());
        let origin = self.peers[peer].name.clone();
        self.tell(Party::Peer(peer), Kind::BodyRequest(BodyRequest { id, origin, ..request.clone() }));
        Ok(())
    }

    fn ask_worker(&mut self, from: Party, request: &BodyRequest) -> Result<(), String> {
        if request.origin != self.me.server {
            return Err(format!("this is server '{}'", self.me.server));
        }
        if self.bodies.asked_by(from) >= REQUESTS_PER_PEER_MAX {
            return Err(format!("{REQUESTS_PER_PEER_MAX} bodies are asked for already"));
        }
        change::check_user(&request.user).map_err(|error| error.to_string())?;
        let mut request = request.clone();
        if let Party::Peer(peer) = from {
            let name = &self.peers[peer].name;
            if self.peers_of(&request.user).all(|allowed| allowed != peer) {
                return Err(format!("server {name} {NO_PEER}"));
            }
            request.asker.clone_from(name);
        }
        let id = self.bodies.add(from, None, request);
        self.bodies.unread.push_back(id);
        Ok(())
    }

    fn cancel_body(&mut self, id: u64) {
        let Some(Route { answerer: Some(answerer), .. }) = self.bodies.remove(id) else {
            return;
        };
        self.tell(answerer, Kind::BodyCancel(BodyCancel { id }));
        // What the worker sends of it after this is ignored, and it ignores the end of what it has ended itself.
        self.reading_ended(answerer, id);
    }

    fn reading_ended(&mut self, answerer: Party, id: u64) {
        let Party::Worker(index) = answerer else { return };
        if matches!(self.workers[index].task, Task::Read(reading) if reading == id) {
            self.workers[index].task = Task::Idle;
        }
    }

    fn tell(&mut self, party: Party, kind: Kind) {
        match party {
            Party::Worker(index) => {
                if let Some(token) = self.workers[index].token {
                    self.send(token, &kind.into());
                }
            }
            Party::Peer(index) => {
                let Some(link) = &mut self.peers[index].link else {
                    return;
                };
                match kind {
                    chunk @ Kind::BodyChunk(_) => link.session.bulk(chunk),
                    kind => link.session.control(kind),
                }
            }
        }
    }
}

fn failed(id: u64, error: String) -> BodyChunk {
    BodyChunk { id, last: true, error, ..Default::default() }
}
