//! Connections of local processes: what they did becomes changes for the peers; doveadm asks for the status.

use std::sync::Arc;

use mio::Token;
use prost::Message;

use super::engine::{wall_clock_us, Close, Engine, Role};
use super::order::{Arrival, Release};
use crate::change::{self, ChangeError, CHANGE_BYTES_MAX};
use crate::peer::Append;
use crate::wire::frame;
use crate::wire::proto::{frame::Kind, Change, Frame, Record, SeqOf, Stamp};

/// Answers that may wait for a process that does not read them.
const OUT_BYTES_MAX: usize = 1 << 20;

/// One local process.
#[derive(Default)]
pub struct Local {
    is_attached: bool,
    process: String,
    pid: u32,
    /// It was about to write, and has not said goodbye since.
    has_intent: bool,
    /// A change of its was bad; said once.
    has_bad_change: bool,
}

impl Local {
    fn name(&self) -> String {
        match self.is_attached {
            true => format!("{}({})", self.process.escape_debug(), self.pid),
            false => "unknown".into(),
        }
    }
}

impl Engine {
    pub fn local_frame(&mut self, token: Token, frame: Frame) -> Result<(), Close> {
        let Some(kind) = frame.kind else { return Ok(()) };
        if let Kind::StatusRequest(_) = kind {
            return self.answer_status(token);
        }
        let Some(Role::Local(local)) = self.sockets.get_mut(&token).map(|socket| &mut socket.role) else {
            return Ok(());
        };
        match kind {
            Kind::Attach(attach) if !local.is_attached => {
                local.is_attached = true;
                local.process = attach.process.chars().take(64).collect();
                local.pid = attach.pid;
            }
            _ if !local.is_attached => {
                return Err(Close::Malformed("its first frame does not say which process it is".into()))
            }
            Kind::Intent(intent) => {
                change::check_user(&intent.user).map_err(|error| Close::Malformed(error.to_string()))?;
                local.has_intent = true;
            }
            Kind::Goodbye(_) => local.has_intent = false,
            Kind::Record(record) => return self.take_record(token, record),
            _ => return Err(Close::Malformed("it sent a frame that a local process may not send".into())),
        }
        Ok(())
    }

    pub fn local_closed(&mut self, local: Local, why: &Close) {
        match why {
            // It is us who ended it.
            Close::Ended(_) if self.is_stopping() => return,
            Close::Malformed(reason) => {
                log::error!("Local process {}: {reason} - closing its connection.", local.name());
            }
            Close::Ended(reason) | Close::Refused { reason, .. } if local.has_intent => {
                log::info!(
                    "Local process {} ended without a goodbye after it was about to write: {reason}. \
                     What it wrote last may be missing on the peers.",
                    local.name()
                );
            }
            _ => {}
        }
        if local.has_intent {
            self.counts.counters.unclean_ends += 1;
        }
    }

    fn answer_status(&mut self, token: Token) -> Result<(), Close> {
        let status = self.status();
        self.send(token, &Kind::Status(status).into());
        match self.sockets.get(&token).map_or(0, |socket| socket.connection.waiting()) {
            waiting if waiting > OUT_BYTES_MAX => Err(Close::Malformed("it does not read its answers".into())),
            _ => Ok(()),
        }
    }

    fn take_record(&mut self, token: Token, record: Record) -> Result<(), Close> {
        change::check_spans(&record.spans).map_err(|error| Close::Malformed(error.to_string()))?;
        self.counts.counters.records += 1;
        self.counts.counters.spans += record.spans.len() as u64;
        self.counts.counters.dropped_by_processes =
            self.counts.counters.dropped_by_processes.saturating_add(record.dropped);
        let mut change = record.change;
        if let Some(error) = change.as_ref().and_then(|change| change::check_change(change).err()) {
            self.skip_bad_change(token, &change.take().unwrap_or_default(), &error);
        }
        let user = match (&change, record.spans.first()) {
            (Some(change), _) => change.user.as_str().into(),
            (None, Some(span)) => span.user.as_str().into(),
            (None, None) => return Ok(()),
        };
        if let Some(change) = &mut change {
            self.counts.counters.changes += 1;
            change.spans.clone_from(&record.spans);
        }
        let arrival = Arrival { connection: token.0, user, change };
        let mut released = Vec::new();
        self.counts.counters.gaps +=
            self.order.arrive(arrival, &record.spans, self.now_ms, &mut self.spans, &mut released);
        self.ship_all(released);
        Ok(())
    }

    /// One bad change does not cost the process its connection: the others on it are other people's mail.
    fn skip_bad_change(&mut self, token: Token, change: &Change, error: &ChangeError) {
        self.counts.note("bad_change", 1);
        let Some(Role::Local(local)) = self.sockets.get_mut(&token).map(|socket| &mut socket.role) else {
            return;
        };
        if !std::mem::replace(&mut local.has_bad_change, true) {
            log::error!(
                "Local process {}, user {}: a change cannot be sent to the peers: {error}.",
                local.name(),
                change.user.escape_debug()
            );
        }
    }

    /// Stamps the change and puts it into every peer's outbox, encoded once for all.
    pub fn ship(&mut self, release: Release) {
        let Release { user, mut change } = release;
        if self.peers.is_empty() {
            return;
        }
        let given = change.stamp.take().map_or(0, |stamp| stamp.clock);
        change.stamp = Some(Stamp {
            origin: self.me.server.clone(),
            epoch: self.me.epoch,
            seq: self.seq + 1,
            clock: self.clock.stamp(given, wall_clock_us()),
            vector: self.applied_of_others(),
        });
        if change.encoded_len() > CHANGE_BYTES_MAX {
            change.spans.clear();
        }
        if change.encoded_len() > CHANGE_BYTES_MAX {
            self.counts.note("bad_change", 1);
            log::error!("User {user}: a change cannot be sent to the peers: it is too long with its stamp.");
            return;
        }
        let encoded: Arc<[u8]> = match frame::encode(&Kind::Change(change).into()) {
            Ok(bytes) => bytes.into(),
            Err(error) => return log::error!("User {user}: a change cannot be sent to the peers: {error}."),
        };
        self.seq += 1;
        for index in 0..self.peers.len() {
            let outcome = self.peers[index].outbox.append(&user, self.seq, encoded.clone(), self.now_ms);
            if outcome == Append::FirstDropped {
                self.log_full(index);
            }
        }
    }

    fn applied_of_others(&self) -> Vec<SeqOf> {
        let applied = self.peers.iter().map(|peer| SeqOf {
            origin: peer.name.clone(),
            epoch: peer.inbox.epoch(),
            seq: peer.inbox.applied_up_to(),
        });
        applied.filter(|applied| applied.seq > 0).collect()
    }

    fn log_full(&self, index: usize) {
        let peer = &self.peers[index];
        let stats = peer.outbox.stats();
        log::error!(
            "Peer {}: its queue is full: {} changes of {} bytes wait for it (dovetail_relay_queue_size = {} for {} peers). \
             Further changes are dropped until some are acknowledged; they will be missing there.",
            peer.name,
            stats.pending,
            stats.pending_bytes,
            self.config.queue_bytes_max,
            self.peers.len()
        );
    }
}
