//! Simulated time and connections: what is written at one end comes out at the other later, in order; connections overtake
//! each other, are cut in mid-frame, and do not get through where the network is parted.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::io::{self, ErrorKind};
use std::rc::Rc;

use dovetail::relay::connection::Pipe;
use mio::Token;

use super::chance::Chance;

/// Bytes that may be on their way in one direction.
const PIPE_BYTES_MAX: usize = 256 << 10;

/// Who holds an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// The engine of a server.
    Relay(usize),
    /// A worker or a mail process of a server, by its number.
    Worker(usize, u64),
    Process(usize, u64),
}

impl Owner {
    pub fn server(self) -> usize {
        match self {
            Owner::Relay(server) | Owner::Worker(server, _) | Owner::Process(server, _) => server,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// Something arrives at this end.
    Arrive(usize),
    /// The engine of this server has something to do; the number tells a wake-up that was called off.
    Round(usize, u64),
    /// This worker has something to read.
    Work(usize, u64),
    /// This mail process has its client's answer out, or may try to connect again.
    Flush(usize, u64),
    /// Of the schedule.
    Step(usize),
    /// The engine of this server is started again.
    Start(usize),
}

enum Packet {
    Bytes(Vec<u8>),
    End,
    /// To a listening relay.
    Connect,
    Connected,
    Refused,
}

struct End {
    owner: Owner,
    other: usize,
    token: Option<Token>,
    /// On its way here; each not before its time.
    coming: VecDeque<(u64, Packet)>,
    coming_bytes: usize,
    here: VecDeque<u8>,
    is_connected: bool,
    is_refused: bool,
    /// Nothing more will come.
    is_over: bool,
    is_reset: bool,
    /// Its owner has dropped it.
    is_closed: bool,
    /// The other end could not write, and is to be told when it can.
    is_full: bool,
}

/// See the module.
pub struct Net {
    pub now_us: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    count: u64,
    ends: Vec<End>,
    chance: Chance,
    /// From server to server.
    blocked: Vec<Vec<bool>>,
    /// Relays that listen.
    pub is_listening: Vec<bool>,
    /// Connections to accept: server and end.
    pub accepting: Vec<(usize, usize)>,
    /// Ends at which something happened.
    happened: Vec<usize>,
}

pub type Network = Rc<RefCell<Net>>;

impl Net {
    pub fn new(servers: usize, seed: u64) -> Net {
        Net {
            now_us: 0,
            events: BinaryHeap::new(),
            count: 0,
            ends: Vec::new(),
            chance: Chance::new(seed, 1),
            blocked: vec![vec![false; servers]; servers],
            is_listening: vec![false; servers],
            accepting: Vec::new(),
            happened: Vec::new(),
        }
    }

    pub fn at(&mut self, at_us: u64, event: Event) {
        self.count += 1;
        self.events.push(Reverse((at_us.max(self.now_us), self.count, event)));
    }

    pub fn after(&mut self, us: u64, event: Event) {
        self.at(self.now_us + us, event);
    }

    pub fn next_event(&mut self) -> Option<Event> {
        let Reverse((at_us, _, event)) = self.events.pop()?;
        self.now_us = at_us;
        Some(event)
    }

    /// Events so far: a run is known by them.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Both ends of a new connection.
    pub fn pair(&mut self, left: Owner, right: Owner, is_connected: bool) -> (usize, usize) {
        let first = self.ends.len();
        for (owner, other) in [(left, first + 1), (right, first)] {
            self.ends.push(End {
                owner,
                other,
                token: None,
                coming: VecDeque::new(),
                coming_bytes: 0,
                here: VecDeque::new(),
                is_connected,
                is_refused: false,
                is_over: false,
                is_reset: false,
                is_closed: false,
                is_full: false,
            });
        }
        (first, first + 1)
    }

    /// A connect from one relay to another begins.
    pub fn connect(&mut self, from: usize, to: usize) -> usize {
        let (here, there) = self.pair(Owner::Relay(from), Owner::Relay(to), false);
        self.send(there, Packet::Connect);
        here
    }

    /// Inside of one server.
    pub fn is_local(&self, end: usize) -> bool {
        self.ends[end].owner.server() == self.ends[self.ends[end].other].owner.server()
    }

    fn is_blocked(&self, end: usize) -> bool {
        match (self.ends[self.ends[end].other].owner, self.ends[end].owner) {
            (Owner::Relay(from), Owner::Relay(to)) => self.blocked[from][to],
            _ => false,
        }
    }

    fn send(&mut self, to: usize, packet: Packet) {
        let usual = if self.is_local(to) { 30 } else { 2_000 };
        let delay = self.chance.delay_us(usual);
        let last = self.ends[to].coming.back().map_or(0, |(at, _)| *at);
        let at = last.max(self.now_us + delay);
        self.ends[to].coming.push_back((at, packet));
        self.at(at, Event::Arrive(to));
    }

    /// What is due comes out.
    pub fn arrive(&mut self, end: usize) {
        if self.is_blocked(end) {
            return;
        }
        while self.ends[end].coming.front().is_some_and(|(at, _)| *at <= self.now_us) {
            let Some((_, packet)) = self.ends[end].coming.pop_front() else { return };
            self.take(end, packet);
        }
    }

    fn take(&mut self, end: usize, packet: Packet) {
        let other = self.ends[end].other;
        match packet {
            Packet::Bytes(bytes) => {
                self.ends[end].coming_bytes -= bytes.len();
                if !self.ends[end].is_closed && !self.ends[end].is_over {
                    self.ends[end].here.extend(bytes);
                }
            }
            Packet::End => self.ends[end].is_over = true,
            Packet::Connect => {
                let Owner::Relay(server) = self.ends[end].owner else { return };
                if self.ends[other].is_closed {
                    return;
                }
                if !self.is_listening[server] {
                    return self.send(other, Packet::Refused);
                }
                self.ends[end].is_connected = true;
                self.accepting.push((server, end));
                self.send(other, Packet::Connected);
            }
            Packet::Connected => self.ends[end].is_connected = true,
            Packet::Refused => self.ends[end].is_refused = true,
        }
        self.happened.push(end);
    }

    /// Owners to whom something happened, and which connection of theirs.
    pub fn take_happened(&mut self) -> Vec<(Owner, Option<Token>)> {
        let ends = std::mem::take(&mut self.happened);
        ends.into_iter()
            .filter(|end| !self.ends[*end].is_closed)
            .map(|end| (self.ends[end].owner, self.ends[end].token))
            .collect()
    }

    /// Whether something can be read: bytes, or the end.
    pub fn is_readable(&self, end: usize) -> bool {
        let end = &self.ends[end];
        !end.here.is_empty() || end.is_over || end.is_reset
    }

    /// Whether the other end is gone, noticed or not.
    pub fn is_lost(&self, end: usize) -> bool {
        self.is_broken(end) || self.ends[self.ends[end].other].is_closed
    }

    pub fn is_broken(&self, end: usize) -> bool {
        let end = &self.ends[end];
        end.is_over || end.is_reset || end.is_closed
    }

    fn read(&mut self, end: usize, bytes: &mut [u8]) -> io::Result<usize> {
        let other = self.ends[end].other;
        let it = &mut self.ends[end];
        if it.is_refused {
            return Err(ErrorKind::ConnectionRefused.into());
        }
        if !it.is_connected {
            return Err(ErrorKind::NotConnected.into());
        }
        if it.here.is_empty() {
            return match (it.is_reset, it.is_over) {
                (true, _) => Err(ErrorKind::ConnectionReset.into()),
                (_, true) => Ok(0),
                _ => Err(ErrorKind::WouldBlock.into()),
            };
        }
        let length = bytes.len().min(it.here.len());
        for (to, from) in bytes.iter_mut().zip(it.here.drain(..length)) {
            *to = from;
        }
        if std::mem::take(&mut it.is_full) {
            self.happened.push(other);
        }
        Ok(length)
    }

    fn write(&mut self, end: usize, bytes: &[u8]) -> io::Result<usize> {
        let other = self.ends[end].other;
        let is_local = self.is_local(end);
        if self.ends[end].is_reset || self.ends[other].is_closed && is_local {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let to = &mut self.ends[other];
        let room = match is_local {
            true => bytes.len(),
            false => PIPE_BYTES_MAX.saturating_sub(to.coming_bytes + to.here.len()),
        };
        if room == 0 {
            to.is_full = true;
            return Err(ErrorKind::WouldBlock.into());
        }
        // A network carries it in pieces.
        let mut length = bytes.len().min(room);
        if length > 1 && self.chance.percent(10) {
            length = 1 + self.chance.below(length as u64) as usize;
        }
        self.ends[other].coming_bytes += length;
        self.send(other, Packet::Bytes(bytes[..length].to_vec()));
        Ok(length)
    }

    fn close(&mut self, end: usize) {
        if std::mem::replace(&mut self.ends[end].is_closed, true) {
            return;
        }
        let other = self.ends[end].other;
        self.send(other, Packet::End);
    }

    /// Its process has ended. (Its own order would be by chance.)
    pub fn close_all_of(&mut self, owner: Owner) {
        for end in 0..self.ends.len() {
            if self.ends[end].owner == owner {
                self.close(end);
            }
        }
    }

    /// Breaks the connections between two relays: of what is on its way some bytes still come.
    pub fn cut(&mut self, one: usize, two: usize) {
        for end in 0..self.ends.len() {
            let other = self.ends[end].other;
            let owners = (self.ends[end].owner, self.ends[other].owner);
            let is_it =
                owners == (Owner::Relay(one), Owner::Relay(two)) || owners == (Owner::Relay(two), Owner::Relay(one));
            if !is_it || self.ends[end].is_closed || self.ends[end].is_reset {
                continue;
            }
            let coming: Vec<u8> = std::mem::take(&mut self.ends[end].coming)
                .into_iter()
                .filter_map(|(_, packet)| match packet {
                    Packet::Bytes(bytes) => Some(bytes),
                    _ => None,
                })
                .flatten()
                .collect();
            self.ends[end].coming_bytes = 0;
            let kept = self.chance.below(coming.len() as u64 + 1) as usize;
            self.ends[end].here.extend(&coming[..kept]);
            self.ends[end].is_reset = true;
            self.happened.push(end);
        }
    }

    pub fn set_blocked(&mut self, from: usize, to: usize, blocked: bool) {
        if std::mem::replace(&mut self.blocked[from][to], blocked) && !blocked {
            // It comes now, or is sent again.
            for end in 0..self.ends.len() {
                if !self.ends[end].coming.is_empty() {
                    self.after(1_000, Event::Arrive(end));
                }
            }
        }
    }

    /// Whether a packet gets through both ways.
    pub fn is_joined(&self, one: usize, two: usize) -> bool {
        !self.blocked[one][two] && !self.blocked[two][one]
    }
}

/// One end of a connection.
pub struct PipeEnd {
    pub network: Network,
    pub end: usize,
}

impl Drop for PipeEnd {
    fn drop(&mut self) {
        self.network.borrow_mut().close(self.end);
    }
}

impl Pipe for PipeEnd {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.network.borrow_mut().read(self.end, bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.network.borrow_mut().write(self.end, bytes)
    }

    fn connected(&self) -> Option<io::Result<()>> {
        let net = self.network.borrow();
        let end = &net.ends[self.end];
        match end.is_refused || end.is_reset {
            true => Some(Err(ErrorKind::ConnectionRefused.into())),
            false => end.is_connected.then_some(Ok(())),
        }
    }

    fn stop_reading(&self) -> io::Result<()> {
        self.network.borrow_mut().ends[self.end].is_over = true;
        Ok(())
    }

    fn register(&mut self, token: Token) {
        let mut net = self.network.borrow_mut();
        net.ends[self.end].token = Some(token);
        // What is there already happens to it now.
        net.happened.push(self.end);
    }
}
