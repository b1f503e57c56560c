//! One session with a peer, from the greeting to the end of the connection.
//!
//! Guarantees that nothing is taken from a peer before it said who it is and is admitted, that frames leave by lane
//! (control before changes before bodies, where bodies keep a small share), and that a silent peer is noticed.

use std::collections::VecDeque;
use std::sync::Arc;

use prost::Message as _;

use super::Outbox;
use crate::change::{self, SERVER_BYTES_MAX};
use crate::wire::frame::{self, FrameError};
use crate::wire::proto::frame::Kind;
use crate::wire::proto::{
    Ack, Answer, BodyCancel, BodyChunk, BodyMore, BodyRequest, Bond, Bonds, Change, Frame, Hello, Known, Linked, Ping,
    Pong, Question, Refused, SeqOf,
};

/// A peer that says nothing for this long is asked whether it is there.
const PING_MS: u64 = 5_000;
/// A peer that says nothing for this long is gone.
const SILENCE_MS_MAX: u64 = 15_000;
/// Time for the greeting.
const GREETING_MS_MAX: u64 = 5_000;
/// Acknowledgements in one frame.
const ACKS_PER_FRAME: usize = 1_000;
/// Frames and acknowledgements that may wait for a peer, but for its changes: far more than windows allow of those who read.
const WAITING_MAX: usize = 65_536;
/// Memory of what waits in the control lane.
const CONTROL_BYTES_MAX: usize = 8 << 20;
/// While so much waits in the lane of bodies, nothing is begun that would add to it.
const BULK_BYTES_HIGH: usize = 1 << 20;
/// A peer that takes no byte of what waits for it for so long does not read.
const STUCK_MS_MAX: u64 = 30_000;
/// While bodies wait, one of them leaves after this many other frames.
const FRAMES_PER_BODY: u32 = 8;
/// Tells a probe from other pings.
const PROBE: u64 = 1 << 63;
/// Most bytes of one body that may be on their way.
pub const BODY_WINDOW_BYTES_MAX: u32 = 1 << 20;

/// Who we are.
#[derive(Clone, Debug)]
pub struct Identity {
    pub server: String,
    pub instance: Vec<u8>,
    pub epoch: u64,
    pub software: String,
}

/// Who may be at the other end.
#[derive(Clone, Debug)]
pub enum Admits {
    /// The one that we connected to.
    Only(String),
    /// One of those who connect to us. The others are the ones that we connect to.
    OneOf { connecting: Vec<String>, others: Vec<String> },
}

/// What a frame from the peer means for the engine.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Hello(Hello),
    Change(Change),
    Ack(Ack),
    Refused(Refused),
    BodyRequest(BodyRequest),
    BodyChunk(BodyChunk),
    BodyMore(BodyMore),
    BodyCancel(BodyCancel),
    Known(Known),
    Linked(Linked),
    Question(Question),
    Answer(Answer),
    Bond(Bond),
    /// It has answered a [`Session::probe`].
    IsThere,
}

/// Why a session must end.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SessionError {
    #[error("its first frame is not a greeting")]
    NoGreeting,
    #[error("it did not say who it is within {} secs", GREETING_MS_MAX / 1000)]
    GreetingTimeout,
    #[error("it refuses us: {0}")]
    RefusedByPeer(String),
    #[error("it says that this server was set back: {reason}")]
    SetBack {
        /// A later one of ours that it knows.
        epoch: u64,
        reason: String,
    },
    #[error("it calls itself '{0}' as we do: every server needs a name of its own in dovetail_server")]
    OurName(String),
    #[error("it is this relay itself: the address in dovetail_peers is our own")]
    Ourselves,
    #[error("it calls itself '{found}', but '{expected}' was expected at this address in dovetail_peers")]
    OtherName { found: String, expected: String },
    #[error("it calls itself '{0}', which is not in dovetail_peers here")]
    UnknownName(String),
    #[error("'{0}' should not connect to us but be connected to: of two servers the one with the lower name connects")]
    WrongDirection(String),
    #[error("its name is empty, has control characters or more than {SERVER_BYTES_MAX} bytes")]
    BadName,
    #[error("it greeted twice")]
    SecondGreeting,
    #[error("it sent a frame that only a local process or a worker may send")]
    NotForPeers,
    #[error("it asks for more and more and does not read the answers")]
    NotReading,
    #[error("it said {0} numbers in one frame, and at most {ACKS_PER_FRAME} are allowed")]
    TooManyNumbers(usize),
    #[error("it said nothing for {} secs", SILENCE_MS_MAX / 1000)]
    Silent,
    #[error("it has taken nothing of what is sent to it for {} secs", STUCK_MS_MAX / 1000)]
    Stuck,
}

impl SessionError {
    /// Whether the peer should be told before the connection is closed.
    pub fn is_refusal(&self) -> bool {
        !matches!(
            self,
            SessionError::RefusedByPeer(_)
                | SessionError::SetBack { .. }
                | SessionError::GreetingTimeout
                | SessionError::Silent
                | SessionError::Stuck
        )
    }
}

/// Frames that wait, and their memory.
#[derive(Default)]
struct Lane {
    frames: VecDeque<Frame>,
    bytes: usize,
}

impl Lane {
    fn bytes_of(frame: &Frame) -> usize {
        size_of::<Frame>() + frame.encoded_len()
    }

    fn push(&mut self, frame: Frame) {
        self.bytes += Lane::bytes_of(&frame);
        self.frames.push_back(frame);
    }

    fn pop(&mut self) -> Option<Frame> {
        let frame = self.frames.pop_front()?;
        self.bytes -= Lane::bytes_of(&frame);
        Some(frame)
    }

    fn drop_pongs(&mut self) {
        self.frames.retain(|frame| {
            let is_pong = matches!(frame.kind, Some(Kind::Pong(_)));
            self.bytes -= if is_pong { Lane::bytes_of(frame) } else { 0 };
            !is_pong
        });
    }
}

/// See the module.
pub struct Session {
    me: Arc<Identity>,
    admits: Admits,
    greeted: bool,
    heard_from: bool,
    began_ms: u64,
    heard_ms: u64,
    pinged_ms: u64,
    /// Since when nothing was taken of what waits to go out.
    stuck_since_ms: Option<u64>,
    control: Lane,
    ack_epoch: u64,
    acks: Vec<u64>,
    known: Vec<(Arc<str>, SeqOf)>,
    /// Bodies, and what two servers ask each other when they compare.
    bulk: Lane,
    frames_since_body: u32,
    heard_clock: u64,
    peers_heard_clock: u64,
    /// The ping by which it is asked whether it is there.
    probe: Option<u64>,
}

impl Session {
    pub fn new(me: Arc<Identity>, admits: Admits, now_ms: u64) -> Session {
        Session {
            me,
            admits,
            greeted: false,
            heard_from: false,
            began_ms: now_ms,
            heard_ms: now_ms,
            pinged_ms: now_ms,
            stuck_since_ms: None,
            control: Lane::default(),
            ack_epoch: 0,
            acks: Vec::new(),
            known: Vec::new(),
            bulk: Lane::default(),
            frames_since_body: 0,
            heard_clock: 0,
            peers_heard_clock: 0,
            probe: None,
        }
    }

    /// The peer has acknowledged all of our changes up to this clock.
    pub fn set_heard_clock(&mut self, clock: u64) {
        self.heard_clock = clock;
    }

    /// All changes of the peer up to this clock are acknowledged; those to come have later ones.
    pub fn peers_heard_clock(&self) -> u64 {
        self.peers_heard_clock
    }

    /// Says who we are, how far we have applied the peer's changes, from which of ours on we will send, with whom we are
    /// connected, and by what we know it.
    pub fn greet(
        &mut self,
        applied: (u64, u64),
        first_pending: u64,
        clock: u64,
        now_us: u64,
        linked: Vec<String>,
        bonds: Bonds,
    ) {
        self.greeted = true;
        let (applied_epoch, applied_seq) = applied;
        let hello = Hello {
            server: self.me.server.clone(),
            instance: self.me.instance.clone(),
            epoch: self.me.epoch,
            software: self.me.software.clone(),
            applied_epoch,
            applied_seq,
            first_pending,
            clock,
            now_us,
            linked,
            bonds: Some(bonds),
        };
        self.control.push(Kind::Hello(hello).into());
    }

    /// Both have greeted.
    pub fn is_up(&self) -> bool {
        self.greeted && self.heard_from
    }

    /// Takes a frame from the peer.
    pub fn receive(&mut self, frame: Frame, now_ms: u64) -> Result<Option<Event>, SessionError> {
        self.heard_ms = now_ms;
        let Some(kind) = frame.kind else {
            return Err(SessionError::NotForPeers);
        };
        if !self.heard_from {
            return match kind {
                // It doubts that we are still there.
                Kind::Ping(ping) if self.greeted => {
                    self.answer(ping);
                    Ok(None)
                }
                kind => self.receive_greeting(kind).map(Some),
            };
        }
        let frames = self.control.frames.len() + self.bulk.frames.len() + self.acks.len();
        if frames > WAITING_MAX || self.control.bytes > CONTROL_BYTES_MAX {
            return Err(SessionError::NotReading);
        }
        Ok(Some(match kind {
            Kind::Change(change) => Event::Change(change),
            Kind::Ack(Ack { seqs, .. }) | Kind::Known(Known { seqs, .. }) if seqs.len() > ACKS_PER_FRAME => {
                return Err(SessionError::TooManyNumbers(seqs.len()))
            }
            Kind::Ack(ack) => {
                self.peers_heard_clock = self.peers_heard_clock.max(ack.heard_clock);
                Event::Ack(ack)
            }
            Kind::Refused(refused) => Event::Refused(refused),
            Kind::BodyRequest(request) => Event::BodyRequest(request),
            Kind::BodyChunk(chunk) => Event::BodyChunk(chunk),
            Kind::BodyMore(more) => Event::BodyMore(more),
            Kind::BodyCancel(cancel) => Event::BodyCancel(cancel),
            Kind::Known(known) => Event::Known(known),
            Kind::Linked(linked) => Event::Linked(linked),
            Kind::Question(question) => Event::Question(question),
            Kind::Answer(answer) => Event::Answer(answer),
            Kind::Bond(bond) => Event::Bond(bond),
            Kind::Ping(ping) => {
                self.peers_heard_clock = self.peers_heard_clock.max(ping.heard_clock);
                self.answer(ping);
                return Ok(None);
            }
            Kind::Pong(pong) if self.probe == Some(pong.id) => {
                self.probe = None;
                Event::IsThere
            }
            Kind::Pong(_) => return Ok(None),
            Kind::Hello(_) => return Err(SessionError::SecondGreeting),
            _ => return Err(SessionError::NotForPeers),
        }))
    }

    /// What is to be sent to it to ask whether it is there: [`Event::IsThere`].
    pub fn probe(&mut self, now_ms: u64) -> Kind {
        let id = PROBE | now_ms;
        self.probe = Some(id);
        Kind::Ping(Ping { id, heard_clock: self.heard_clock })
    }

    /// To be called when [`Session::wake_up_ms`] has come.
    pub fn tick(&mut self, now_ms: u64) -> Result<(), SessionError> {
        if !self.heard_from && now_ms >= self.began_ms + GREETING_MS_MAX {
            return Err(SessionError::GreetingTimeout);
        }
        if now_ms >= self.heard_ms + SILENCE_MS_MAX {
            return Err(SessionError::Silent);
        }
        if self.stuck_since_ms.is_some_and(|since_ms| now_ms >= since_ms + STUCK_MS_MAX) {
            return Err(SessionError::Stuck);
        }
        if self.is_up() && now_ms >= self.heard_ms.max(self.pinged_ms) + PING_MS {
            self.pinged_ms = now_ms;
            self.control.push(Kind::Ping(Ping { id: now_ms, heard_clock: self.heard_clock }).into());
        }
        Ok(())
    }

    pub fn wake_up_ms(&self) -> u64 {
        if !self.heard_from {
            return self.began_ms + GREETING_MS_MAX;
        }
        let stuck_ms = self.stuck_since_ms.map_or(u64::MAX, |since_ms| since_ms + STUCK_MS_MAX);
        (self.heard_ms.max(self.pinged_ms) + PING_MS).min(self.heard_ms + SILENCE_MS_MAX).min(stuck_ms)
    }

    /// The peer's socket was written to: whether it took something, and whether something still waits.
    pub fn wrote(&mut self, took_some: bool, is_waiting: bool, now_ms: u64) {
        self.stuck_since_ms = match self.stuck_since_ms {
            _ if !is_waiting => None,
            Some(since_ms) if !took_some => Some(since_ms),
            _ => Some(now_ms),
        };
    }

    /// So much waits in the lane of bodies that nothing is to be begun that would add to it.
    pub fn is_loaded(&self) -> bool {
        self.bulk.bytes >= BULK_BYTES_HIGH
    }

    /// Acknowledges a change of the peer.
    pub fn ack(&mut self, epoch: u64, seq: u64) {
        if self.ack_epoch != epoch {
            self.acks.clear();
            self.ack_epoch = epoch;
        }
        self.acks.push(seq);
    }

    /// Says that another server's change is applied here. To who does not read for long it is not said, which costs sending
    /// it once more.
    pub fn tell_known(&mut self, user: Arc<str>, change: SeqOf) {
        if self.known.len() < WAITING_MAX {
            self.known.push((user, change));
        }
    }

    /// Puts a frame into the control lane, behind the acknowledgements so far.
    pub fn control(&mut self, kind: Kind) {
        self.flush_acks();
        self.control.push(kind.into());
    }

    /// Puts a frame into the lane of bodies.
    pub fn bulk(&mut self, kind: Kind) {
        self.bulk.push(kind.into());
    }

    /// Appends the next frame to `out`; false if there is none. A frame of ours that does not fit is an error.
    pub fn next_frame(&mut self, outbox: &mut Outbox, now_ms: u64, out: &mut Vec<u8>) -> Result<bool, FrameError> {
        if self.control.frames.is_empty() {
            self.flush_acks();
        }
        if let Some(frame) = self.control.pop() {
            frame::append(&frame, out)?;
            return Ok(true);
        }
        if !self.is_up() {
            return Ok(false);
        }
        let body_is_due = !self.bulk.frames.is_empty() && self.frames_since_body >= FRAMES_PER_BODY;
        if !body_is_due {
            if let Some(change) = outbox.next(now_ms) {
                self.frames_since_body = self.frames_since_body.saturating_add(1);
                out.extend_from_slice(&change);
                return Ok(true);
            }
        }
        let Some(frame) = self.bulk.pop() else {
            return Ok(false);
        };
        self.frames_since_body = 0;
        frame::append(&frame, out)?;
        Ok(true)
    }

    /// True if nothing is left to be sent but changes.
    pub fn is_quiet(&self) -> bool {
        self.control.frames.is_empty() && self.acks.is_empty() && self.known.is_empty() && self.bulk.frames.is_empty()
    }

    fn receive_greeting(&mut self, kind: Kind) -> Result<Event, SessionError> {
        let hello = match kind {
            Kind::Hello(hello) => hello,
            Kind::Refused(Refused { error, epoch, set_back: true, .. }) => {
                return Err(SessionError::SetBack { epoch, reason: change::printable(&error) })
            }
            Kind::Refused(refused) => return Err(SessionError::RefusedByPeer(change::printable(&refused.error))),
            _ => return Err(SessionError::NoGreeting),
        };
        self.admit(&hello)?;
        self.heard_from = true;
        Ok(Event::Hello(hello))
    }

    fn admit(&self, hello: &Hello) -> Result<(), SessionError> {
        let name = &hello.server;
        if name.is_empty() || name.len() > SERVER_BYTES_MAX || name.chars().any(char::is_control) {
            return Err(SessionError::BadName);
        }
        if hello.instance == self.me.instance {
            return Err(SessionError::Ourselves);
        }
        if *name == self.me.server {
            return Err(SessionError::OurName(name.clone()));
        }
        match &self.admits {
            Admits::Only(expected) if name == expected => Ok(()),
            Admits::Only(expected) => Err(SessionError::OtherName { found: name.clone(), expected: expected.clone() }),
            Admits::OneOf { connecting, .. } if connecting.contains(name) => Ok(()),
            Admits::OneOf { others, .. } if others.contains(name) => Err(SessionError::WrongDirection(name.clone())),
            Admits::OneOf { .. } => Err(SessionError::UnknownName(name.clone())),
        }
    }

    /// One answer is enough, however many questions a peer piles up.
    fn answer(&mut self, ping: Ping) {
        self.control.drop_pongs();
        self.control.push(Kind::Pong(Pong { id: ping.id }).into());
    }

    fn flush_acks(&mut self) {
        for seqs in self.acks.chunks(ACKS_PER_FRAME) {
            let ack = Ack { epoch: self.ack_epoch, seqs: seqs.to_vec(), heard_clock: self.heard_clock };
            self.control.push(Kind::Ack(ack).into());
        }
        self.acks.clear();
        fn of((user, change): &(Arc<str>, SeqOf)) -> (&str, &str, u64) {
            (&**user, change.origin.as_str(), change.epoch)
        }
        self.known.sort_by(|one, other| (of(one), one.1.seq).cmp(&(of(other), other.1.seq)));
        let same = |one: &(Arc<str>, SeqOf), other: &(Arc<str>, SeqOf)| of(one) == of(other);
        for known in self.known.chunk_by(same).flat_map(|known| known.chunks(ACKS_PER_FRAME)) {
            let seqs = known.iter().map(|(_, known)| known.seq).collect();
            let (user, origin, epoch) = of(&known[0]);
            let (user, origin) = (user.to_owned(), origin.to_owned());
            self.control.push(Kind::Known(Known { user, origin, epoch, seqs }).into());
        }
        self.known.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(server: &str) -> Arc<Identity> {
        let instance = server.as_bytes().to_vec();
        Arc::new(Identity { server: server.into(), instance, epoch: 1, software: "test".into() })
    }

    fn hello(server: &str) -> Frame {
        Kind::Hello(Hello { server: server.into(), instance: vec![9], epoch: 7, ..Default::default() }).into()
    }

    fn connecting_to_b() -> Session {
        let mut session = Session::new(identity("a"), Admits::Only("b".into()), 0);
        session.greet((0, 0), 1, 0, 0, vec![], Bonds::default());
        session
    }

    fn listening_as_b() -> Session {
        let admits = Admits::OneOf { connecting: vec!["a".into()], others: vec!["c".into()] };
        Session::new(identity("b"), admits, 0)
    }

    fn up() -> Session {
        let mut session = connecting_to_b();
        session.receive(hello("b"), 0).unwrap();
        sent(&mut session, &mut Outbox::new(0), 0);
        session
    }

    fn sent(session: &mut Session, outbox: &mut Outbox, now_ms: u64) -> Vec<Kind> {
        let mut bytes = Vec::new();
        while session.next_frame(outbox, now_ms, &mut bytes).unwrap() {}
        let mut decoder = frame::Decoder::new();
        decoder.push(&bytes);
        let mut kinds = Vec::new();
        while let Some(frame) = decoder.next().unwrap() {
            kinds.extend(frame.kind);
        }
        kinds
    }

    fn outbox_with(changes: u64) -> Outbox {
        let mut outbox = Outbox::new(1 << 20);
        for seq in 1..=changes {
            let frame = frame::encode(&Kind::Change(Change::default()).into()).unwrap();
            outbox.append(&format!("user{seq}").as_str().into(), seq, frame.into(), 0);
        }
        outbox
    }

    #[test]
    fn who_is_doubted_answers_before_it_is_let_in() {
        let mut session = connecting_to_b();
        sent(&mut session, &mut Outbox::new(0), 0);
        let ping = || Frame::from(Kind::Ping(Ping { id: 7, heard_clock: 9 }));
        assert_eq!(session.receive(ping(), 0), Ok(None));
        assert_eq!(sent(&mut session, &mut Outbox::new(0), 0), [Kind::Pong(Pong { id: 7 })]);
        assert_eq!(session.peers_heard_clock(), 0);
        assert!(!session.is_up());
        session.receive(hello("b"), 0).unwrap();
        assert!(session.is_up());
    }

    #[test]
    fn two_sessions_greet_each_other() {
        let (mut a, mut b) = (connecting_to_b(), listening_as_b());
        let from_a = sent(&mut a, &mut outbox_with(1), 0);
        assert!(matches!(&from_a[..], [Kind::Hello(_)]), "no change before the peer greeted");
        b.receive(from_a[0].clone().into(), 0).unwrap();
        b.greet((1, 5), 1, 0, 0, vec![], Bonds::default());
        let from_b = sent(&mut b, &mut Outbox::new(0), 0);
        let event = a.receive(from_b[0].clone().into(), 0).unwrap();
        assert!(matches!(event, Some(Event::Hello(Hello { applied_seq: 5, .. }))));
        assert!(a.is_up() && b.is_up());
    }

    #[test]
    fn only_those_whom_we_expect_are_admitted() {
        let connect = |frame: Frame| connecting_to_b().receive(frame, 0).unwrap_err();
        let listen = |frame: Frame| listening_as_b().receive(frame, 0).unwrap_err();
        assert_eq!(connect(hello("x")), SessionError::OtherName { found: "x".into(), expected: "b".into() });
        assert_eq!(connect(hello("a")), SessionError::OurName("a".into()));
        assert_eq!(connect(hello("")), SessionError::BadName);
        assert_eq!(listen(hello("a\nb")), SessionError::BadName);
        assert_eq!(listen(hello("x")), SessionError::UnknownName("x".into()));
        assert_eq!(listen(hello("c")), SessionError::WrongDirection("c".into()));
        assert_eq!(connect(Kind::Pong(Pong { id: 1 }).into()), SessionError::NoGreeting);
        assert_eq!(listen(Kind::Ping(Ping { id: 1, heard_clock: 0 }).into()), SessionError::NoGreeting);
        let refused = Kind::Refused(Refused { error: "no".into(), ..Default::default() });
        assert_eq!(connect(refused.into()), SessionError::RefusedByPeer("no".into()));
        let me = Kind::Hello(Hello { server: "b".into(), instance: b"a".to_vec(), ..Default::default() });
        assert_eq!(connect(me.into()), SessionError::Ourselves);
    }

    #[test]
    fn a_session_that_is_up_takes_no_frames_of_others() {
        assert_eq!(up().receive(hello("b"), 0), Err(SessionError::SecondGreeting));
        assert_eq!(up().receive(Kind::Goodbye(Default::default()).into(), 0), Err(SessionError::NotForPeers));
    }

    #[test]
    fn control_leaves_before_changes_and_changes_before_bodies() {
        let mut session = up();
        for _ in 0..3 {
            session.bulk(Kind::BodyChunk(BodyChunk::default()));
        }
        session.ack(7, 1);
        session.ack(7, 2);
        session.control(Kind::BodyMore(BodyMore::default()));
        session.ack(7, 3);
        let lanes: String = sent(&mut session, &mut outbox_with(18), 0)
            .iter()
            .map(|kind| match kind {
                Kind::Ack(ack) => char::from_digit(ack.seqs.len() as u32, 10).unwrap(),
                Kind::BodyMore(_) => 'm',
                Kind::Change(_) => 'c',
                Kind::BodyChunk(_) => 'b',
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(lanes, "2m1ccccccccbccccccccbccb");
    }

    #[test]
    fn a_silent_peer_is_asked_and_then_given_up() {
        let mut session = up();
        assert_eq!(session.wake_up_ms(), PING_MS);
        session.tick(PING_MS).unwrap();
        assert!(matches!(&sent(&mut session, &mut Outbox::new(0), PING_MS)[..], [Kind::Ping(_)]));
        session.tick(PING_MS + 1).unwrap();
        assert!(sent(&mut session, &mut Outbox::new(0), PING_MS).is_empty());
        assert_eq!(session.tick(SILENCE_MS_MAX), Err(SessionError::Silent));
        session.receive(Kind::Pong(Pong { id: 1 }).into(), SILENCE_MS_MAX).unwrap();
        session.tick(SILENCE_MS_MAX + 1).unwrap();
    }

    #[test]
    fn questions_are_answered_once() {
        let mut session = up();
        for id in 1..=1000 {
            session.receive(Kind::Ping(Ping { id, heard_clock: 0 }).into(), 0).unwrap();
        }
        assert_eq!(sent(&mut session, &mut Outbox::new(0), 0), [Kind::Pong(Pong { id: 1000 })]);
    }

    #[test]
    fn what_waits_for_a_peer_that_does_not_read_is_bounded() {
        let mut session = up();
        (0..WAITING_MAX + 9).for_each(|_| session.tell_known("jane".into(), SeqOf::default()));
        assert_eq!(session.known.len(), WAITING_MAX);
        session.receive(Kind::Pong(Pong::default()).into(), 0).unwrap();
        (0..=WAITING_MAX).for_each(|_| session.bulk(Kind::BodyChunk(BodyChunk::default())));
        let outcome = session.receive(Kind::Pong(Pong::default()).into(), 0);
        assert_eq!(outcome, Err(SessionError::NotReading));
    }

    #[test]
    fn a_peer_that_takes_nothing_is_given_up_and_a_slow_one_stays() {
        let mut session = up();
        let mut now_ms = 0;
        let hears = |session: &mut Session, now_ms| {
            session.receive(Kind::Pong(Pong { id: 1 }).into(), now_ms).unwrap();
            session.tick(now_ms)
        };
        for _ in 0..20 {
            now_ms += STUCK_MS_MAX / 2;
            session.wrote(now_ms % STUCK_MS_MAX == 0, true, now_ms);
            assert_eq!(hears(&mut session, now_ms), Ok(()), "it takes a little now and then");
        }
        session.wrote(false, false, now_ms);
        now_ms += 2 * STUCK_MS_MAX;
        assert_eq!(hears(&mut session, now_ms), Ok(()), "nothing waits for it");
        session.wrote(false, true, now_ms);
        assert_eq!(hears(&mut session, now_ms + STUCK_MS_MAX - 1), Ok(()));
        session.wrote(false, true, now_ms + STUCK_MS_MAX - 1);
        assert!(session.wake_up_ms() <= now_ms + STUCK_MS_MAX);
        assert_eq!(hears(&mut session, now_ms + STUCK_MS_MAX), Err(SessionError::Stuck));
    }

    #[test]
    fn memory_of_what_waits_is_bounded() {
        let mut session = up();
        let refused = || Kind::Refused(Refused { error: "x".repeat(60_000), ..Default::default() });
        (0..CONTROL_BYTES_MAX / 60_000 + 1).for_each(|_| session.control(refused()));
        let ping = || Frame::from(Kind::Ping(Ping::default()));
        assert_eq!(session.receive(ping(), 0), Err(SessionError::NotReading));
        sent(&mut session, &mut Outbox::new(0), 0);
        session.receive(ping(), 0).unwrap();
        session.receive(ping(), 0).unwrap();
        sent(&mut session, &mut Outbox::new(0), 0);
        assert_eq!((session.control.bytes, session.is_loaded()), (0, false));
        let chunk = || Kind::BodyChunk(BodyChunk { data: vec![0; 48 << 10], ..Default::default() });
        (0..BULK_BYTES_HIGH / (48 << 10) + 1).for_each(|_| session.bulk(chunk()));
        assert!(session.is_loaded());
        sent(&mut session, &mut Outbox::new(0), 0);
        assert!(!session.is_loaded());
    }

    #[test]
    fn numbers_in_one_frame_are_bounded_and_ours_keep_to_it() {
        let mut session = up();
        let count = ACKS_PER_FRAME as u64 + 1;
        let acks = Kind::Ack(Ack { seqs: (0..count).collect(), ..Default::default() });
        let known = Kind::Known(Known { seqs: (0..count).collect(), ..Default::default() });
        for kind in [acks, known] {
            assert_eq!(session.receive(kind.into(), 0), Err(SessionError::TooManyNumbers(count as usize)));
        }
        let mut other = up();
        for seq in 0..3 * count {
            session.ack(1, seq);
            session.tell_known("jane".into(), SeqOf { origin: "c".into(), epoch: 1, seq });
        }
        for kind in sent(&mut session, &mut Outbox::new(0), 0) {
            other.receive(kind.into(), 0).unwrap();
        }
    }

    #[test]
    fn who_does_not_greet_is_given_up() {
        let mut session = listening_as_b();
        assert_eq!(session.wake_up_ms(), GREETING_MS_MAX);
        session.tick(GREETING_MS_MAX - 1).unwrap();
        assert_eq!(session.tick(GREETING_MS_MAX), Err(SessionError::GreetingTimeout));
    }
}
