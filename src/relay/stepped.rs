//! The engine one round at a time, in a world that is given: for the simulator (tests/sim).

use mio::Token;

use super::connection::{Pipe, Stream};
use super::engine::{Engine, Fatal};
use super::outside::Outside;
use super::{check, durable, Config, Connection};
use crate::journal::Failed;
use crate::wire::proto::Status;
use std::time::Duration;

/// See the module. Dropped, it is an engine that was killed.
pub struct Stepped(Engine);

impl Stepped {
    /// Opens the journal, which nobody has.
    pub fn begin(config: Config, outside: Box<dyn Outside>) -> Result<Stepped, String> {
        check(&config)?;
        let text = |fatal: Fatal| fatal.to_string();
        let (_, commands) = crossbeam_channel::bounded(1);
        let opened = durable::open(&config, &commands, &*outside).map_err(text)?;
        let journal = opened.journal.ok_or("another relay has the journal")?;
        Engine::new(config, outside, commands, Box::new(|| {}), journal).map(Stepped).map_err(text)
    }

    /// Takes what happened and does what is to be done; how long the next round may be waited for. The error: why it ends.
    pub fn round(&mut self, mut happened: Vec<Token>) -> Result<Option<Duration>, String> {
        self.0.take(&mut happened);
        self.0.round().map_err(|fatal| fatal.to_string())
    }

    /// It has been asked to end, for the next one to begin, and that is the time now.
    pub fn is_at_end(&self) -> bool {
        self.0.is_at_end()
    }

    pub fn accept(&mut self, pipe: Box<dyn Pipe>, kind: Connection) -> Result<(), String> {
        // It is now that it comes.
        self.0.take(&mut Vec::new());
        match kind {
            Connection::Local { uid } => self.0.take_local(Stream::Pipe(pipe), uid),
            Connection::Peer => self.0.take_stranger(Stream::Pipe(pipe), None),
        }
    }

    pub fn status(&self) -> Status {
        self.0.status()
    }

    /// Has the user compared with the peers, as when it is his turn in the background.
    pub fn compare(&mut self, user: &str) {
        self.0.comparisons.want_in_background(&user.into(), self.0.now_ms);
    }

    pub fn is_comparing(&self) -> bool {
        !self.0.comparisons.is_idle(self.0.now_ms)
    }

    /// What needs a comparison or a person.
    pub fn failed(&self) -> Result<Vec<Failed>, String> {
        self.0.journal.failed(usize::MAX >> 1).map_err(|error| error.to_string())
    }
}
