//! `doveadm dovetail wait`: the answer comes when every peer has applied what was done on this server until it was asked for.
//!
//! Three steps. What processes had written to their sockets is read. What they may not have told yet comes to light: of one user,
//! a worker reads the logs of the mailboxes that processes who are still there write to; of all, that would be half a start, so
//! what is told within the time counts for which the order waits for it as well. Then each peer's first change that it has not acknowledged
//! is watched, as one after the other is. Nobody who waits costs more than a look into the journal now and then.

use std::sync::Arc;

use mio::Token;

use super::engine::{Close, Engine, Role, Socket};
use super::local::Intents;
use super::order::HOLD_MS_MAX;
use crate::change;
use crate::journal::JournalError;
use crate::wire::proto::{frame::Kind, Lack, WaitRequest, Waited};

/// Who may wait at the same time.
const GATES_MAX: usize = 256;
/// Between two looks whether it is true now.
const POLL_MS: u64 = 50;
/// Looks at all sockets after which what was in them when it was asked for is read.
const ROUNDS: u32 = 3;

#[derive(Clone)]
enum Step {
    /// What is in the sockets, for so many more rounds.
    Read(u32),
    /// What was not told, not before.
    Tell(u64),
    /// All up to this number; of each peer, the first that it may lack.
    Apply(u64, Vec<(usize, u64)>),
}

struct Gate {
    token: Token,
    /// None: of all.
    user: Option<Arc<str>>,
    step: Step,
    due_ms: u64,
    until_ms: u64,
}

/// See the module.
#[derive(Default)]
pub struct Gates {
    gates: Vec<Gate>,
}

impl Gates {
    pub fn wake_up_ms(&self) -> Option<u64> {
        self.gates.iter().map(|gate| gate.due_ms.min(gate.until_ms)).min()
    }
}

impl Engine {
    /// doveadm wants to wait.
    pub fn open_gate(&mut self, token: Token, request: &WaitRequest) -> Result<(), Close> {
        if !request.all {
            change::check_user(&request.user).map_err(|error| Close::Malformed(error.to_string()))?;
        }
        if self.gates.gates.len() >= GATES_MAX {
            let lacks = vec![Lack { reason: format!("more than {GATES_MAX} wait already"), ..Default::default() }];
            self.send(token, &Kind::Waited(Waited { lacks }).into());
            return Ok(());
        }
        let until_ms = self.now_ms.saturating_add(request.timeout_ms);
        let user = (!request.all).then(|| request.user.as_str().into());
        self.gates.gates.push(Gate { token, user, step: Step::Read(ROUNDS), due_ms: self.now_ms, until_ms });
        Ok(())
    }

    /// Answers those for whom it is true, and those whose time is over.
    pub fn tick_gates(&mut self) {
        for mut gate in std::mem::take(&mut self.gates.gates) {
            let is_there = self.sockets.get(&gate.token).is_some_and(|socket| matches!(socket.role, Role::Local(_)));
            let is_over = gate.until_ms <= self.now_ms && !matches!(gate.step, Step::Read(_));
            let is_due = gate.due_ms <= self.now_ms || is_over;
            if !is_there || !is_due {
                self.gates.gates.extend(is_there.then_some(gate));
                continue;
            }
            let lacks = match self.pass_gate(&mut gate) {
                Ok(true) => Some(Vec::new()),
                Ok(false) if is_over => self.lacks(&gate).map_err(|error| self.fail(error)).ok(),
                Ok(false) => None,
                Err(error) => return self.fail(error),
            };
            match lacks {
                Some(lacks) => self.send(gate.token, &Kind::Waited(Waited { lacks }).into()),
                None => self.gates.gates.push(gate),
            }
        }
    }

    /// Goes on with it; true: it is true.
    fn pass_gate(&mut self, gate: &mut Gate) -> Result<bool, JournalError> {
        gate.due_ms = self.now_ms + POLL_MS;
        if let Step::Read(rounds) = &mut gate.step {
            if *rounds > 0 {
                *rounds -= u32::from(self.has_read_all());
                gate.due_ms = self.now_ms;
                return Ok(false);
            }
            gate.step = Step::Tell(self.bring_to_light(gate.user.as_ref()));
        }
        let user = gate.user.clone();
        if let Step::Tell(from_ms) = gate.step {
            if self.now_ms < from_ms || self.is_to_be_told(user.as_deref())?.is_some() {
                return Ok(false);
            }
            let peers: Vec<usize> = match &user {
                Some(user) => self.peers_of(user).collect(),
                None => (0..self.peers.len()).collect(),
            };
            gate.step = Step::Apply(self.journal.seq(), peers.into_iter().map(|peer| (peer, 0)).collect());
        }
        let Step::Apply(up_to, peers) = &mut gate.step else { return Ok(false) };
        while let Some((peer, first)) = peers.last_mut() {
            match self.journal.first_pending_of(&self.peers[*peer].name, user.as_deref(), *first, *up_to)? {
                Some(pending) => {
                    *first = pending;
                    return Ok(false);
                }
                None => drop(peers.pop()),
            }
        }
        // What had no room in the journal meanwhile is listed.
        Ok(self.journal.to_compare(user.as_deref(), None)? == 0)
    }

    /// Has looked for what processes may not have told; when it is time to see what came of it.
    fn bring_to_light(&mut self, user: Option<&Arc<str>>) -> u64 {
        let locals = self.sockets.values().filter_map(|socket| match socket {
            Socket { role: Role::Local(local), .. } => Some(local.intents()),
            _ => None,
        });
        let Some(user) = user else {
            let is_any = locals.into_iter().any(|intents| !intents.is_empty());
            return self.now_ms + if is_any { HOLD_MS_MAX } else { 0 };
        };
        let of_user = locals.filter_map(|intents| Some((user.clone(), intents.get(user)?.clone())));
        let of_user: Vec<Intents> = of_user.map(|one| Intents::from([one])).collect();
        of_user.iter().for_each(|intents| self.look_into_intents(intents));
        self.now_ms
    }

    /// Why not all that was done here is in the journal, or not all of that can be.
    fn is_to_be_told(&self, user: Option<&str>) -> Result<Option<String>, JournalError> {
        let looking = match user {
            Some(user) => usize::from(self.heals.has(user)) + self.sweeping(),
            None => self.heals.pending() + self.lists.to_be_looked_at() + self.sweeping(),
        };
        let is_held = user.map_or(self.order.held() > 0, |user| self.order.holds(user));
        let to_compare = self.journal.to_compare(user, None)?;
        Ok(match (looking, to_compare) {
            (0, 0) if !is_held => None,
            (0, 0) => Some("not all that was done here has been told yet".to_owned()),
            (0, count) => {
                let mut why = format!("{count} entries are to be compared first (doveadm dovetail failed)");
                for peer in self.peers.iter().filter(|peer| !peer.is_up()) {
                    match self.journal.to_compare(user, Some(&peer.name))? {
                        0 => {}
                        count => why += &format!(", {count} with server {}, which is not connected", peer.name),
                    }
                }
                Some(why)
            }
            _ => Some(match self.heals.error() {
                Some((user, error)) => {
                    let error = change::printable(error);
                    format!("mailboxes are still to be looked at here: user {}: {error}", user.escape_debug())
                }
                None => "mailboxes are still to be looked at here".to_owned(),
            }),
        })
    }

    /// Who lacks what.
    fn lacks(&self, gate: &Gate) -> Result<Vec<Lack>, JournalError> {
        let user = gate.user.as_deref();
        let (up_to, peers): (u64, Vec<usize>) = match &gate.step {
            Step::Apply(up_to, peers) => (*up_to, peers.iter().map(|(peer, _)| *peer).collect()),
            _ => (self.journal.seq(), (0..self.peers.len()).collect()),
        };
        let mut lacks = Vec::new();
        for peer in peers {
            let changes = self.journal.count_pending(&self.peers[peer].name, user, up_to)?;
            if changes > 0 {
                lacks.push(Lack { peer: self.peers[peer].name.clone(), changes, reason: self.why_behind(peer) });
            }
        }
        let here = self.is_to_be_told(user)?;
        lacks.extend(here.map(|reason| Lack { reason, ..Default::default() }));
        if lacks.is_empty() {
            // It was about to be true.
            let reason = "not all that was done here has been told yet".to_owned();
            lacks.push(Lack { reason, ..Default::default() });
        }
        Ok(lacks)
    }

    /// Why the peer does not go on, if that is known.
    pub fn why_behind(&self, peer: usize) -> String {
        let waiting = super::waiting::in_short(self.waiting_for(peer).iter());
        let peer = &self.peers[peer];
        let reasons = [change::printable(&peer.last_error), waiting];
        let reason = reasons.into_iter().find(|reason| !reason.is_empty());
        reason.unwrap_or_else(|| if peer.is_up() { String::new() } else { peer.state().to_owned() })
    }
}
