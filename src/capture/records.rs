//! What a mail process noted becomes records for the relay: a transaction's changes together with the spans that they
//! explain.

use super::transaction::RANGES_PER_OP_MAX;
use super::{known, Commit, Guid, Place, Transaction, Untold, Written};
use crate::change;
use crate::wire::proto;
use std::collections::BTreeMap;

/// Most spans that wait for their change: a transaction that writes more is told in pieces.
const PENDING_SPANS_MAX: usize = 256;

/// Records in the order in which they are to be sent.
pub struct Records {
    /// Per mailbox: open transactions that have something to tell, and the spans that belong to their changes.
    open: BTreeMap<Guid, OpenMailbox>,
    ready: Vec<proto::Record>,
    birth_guid: fn(&str) -> Vec<u8>,
}

#[derive(Default)]
struct OpenMailbox {
    transactions: usize,
    spans: Vec<proto::Span>,
    /// Messages that these spans added.
    appends: u64,
}

impl Records {
    pub fn new(birth_guid: fn(&str) -> Vec<u8>) -> Records {
        Records { open: BTreeMap::new(), ready: Vec::new(), birth_guid }
    }

    /// What is ready to be sent.
    pub fn take(&mut self) -> Vec<proto::Record> {
        std::mem::take(&mut self.ready)
    }

    /// A transaction on this mailbox is about to write.
    pub fn begin(&mut self, mailbox: Guid) {
        self.open.entry(mailbox).or_default().transactions += 1;
    }

    /// The transaction that `begin` announced was committed. What cannot be told is to be read from the log.
    pub fn commit(&mut self, place: &Place, transaction: Transaction, commit: &Commit) {
        let mailbox = proto::Mailbox {
            guid: known(commit.guid),
            uid_validity: commit.uid_validity,
            uid_next: commit.uid_next,
            highest_modseq: commit.highest_modseq,
            ..place.mailbox()
        };
        let told = transaction.into_changes(&place.user, &mailbox, &commit.saved, commit.clock, self.birth_guid);
        let appended = self.open.get(&place.guid).filter(|open| open.transactions == 1).map_or(0, |open| open.appends);
        let mut spans = self.end(place.guid);
        // Maildir's sync, which a save begins with, finds files of a process that was killed.
        let found = appended.saturating_sub(commit.saved.len() as u64);
        match told.and_then(|changes| if found > 0 { Err(Untold::Found(found)) } else { Ok(changes) }) {
            Ok(changes) => {
                let count = changes.len();
                for (i, change) in changes.into_iter().enumerate() {
                    // The last part completes what the spans cover.
                    let spans = if i + 1 == count { std::mem::take(&mut spans) } else { Vec::new() };
                    let ack = commit.ack.filter(|_| i + 1 == count);
                    self.ready.push(proto::Record { change: Some(change), spans, ack, ..Default::default() });
                }
            }
            Err(error) => {
                log::warn!(
                    "user {}: mailbox {}: a transaction can't be told to the peers: {error} - \
                     what it did is read from the mailbox's log",
                    place.user,
                    place.path.join("/")
                );
                spans.iter_mut().for_each(|span| span.untold = true);
            }
        }
        self.keep_spans(spans);
    }

    /// The transaction that `begin` announced was committed where nothing lasts: what it did is to be looked for. Only that somebody
    /// asked for an expunge could not be seen then.
    pub fn commit_in_memory(&mut self, place: &Place, transaction: Transaction, uid_next: u32) {
        self.rollback(place.guid);
        let mut expunges = transaction.into_named_expunges(self.birth_guid).into_iter().peekable();
        let mut ops = Vec::new();
        while expunges.peek().is_some() {
            let messages = expunges.by_ref().take(RANGES_PER_OP_MAX).collect();
            ops.push(proto::op::What::Expunge(proto::Expunge { messages }));
        }
        let mut expunged = change::split(ops, &place.user, &place.mailbox(), 0);
        expunged
            .iter_mut()
            .filter_map(|change| change.mailbox.as_mut())
            .for_each(|mailbox| mailbox.uid_next = uid_next);
        self.ready.extend(
            expunged
                .into_iter()
                .map(|expunged| proto::Record { expunged_in_memory: Some(expunged), ..Default::default() }),
        );
        self.ready.push(proto::Record { dropped: 1, ..Default::default() });
    }

    /// The transaction that `begin` announced did not happen. What was written meanwhile it does not tell: a maildir's sync may have
    /// found messages.
    pub fn rollback(&mut self, mailbox: Guid) {
        let mut spans = self.end(mailbox);
        spans.iter_mut().for_each(|span| span.untold = span.touches);
        self.keep_spans(spans);
    }

    /// A change without a transaction: of a mailbox itself.
    pub fn mailbox(&mut self, change: proto::Change) {
        self.ready.push(proto::Record { change: Some(change), ..Default::default() });
    }

    /// A commit wrote this. It belongs to the mailbox's open transactions; without any, nobody will tell what it did.
    pub fn written(&mut self, written: &Written) {
        let mut span = written.to_span();
        match self.open.get_mut(&written.mailbox_guid) {
            Some(open) if open.spans.len() < PENDING_SPANS_MAX => {
                open.appends += u64::from(written.appends);
                span.untold = written.expunges;
                return open.spans.push(span);
            }
            Some(_) => span.untold = written.expunges,
            None => span.untold = written.adds_or_changes || written.expunges,
        }
        self.keep_spans(vec![span]);
    }

    /// Whatever was announced or is ready, it is to be looked for.
    pub fn forget(&mut self) {
        self.open.clear();
        self.ready = vec![proto::Record { dropped: 1, ..Default::default() }];
    }

    /// Spans whose transactions are still open are told without them.
    pub fn give_up_waiting(&mut self) {
        let spans: Vec<_> = std::mem::take(&mut self.open).into_values().flat_map(|open| open.spans).collect();
        self.keep_spans(spans);
    }

    /// Spans of the mailbox, if no other transaction is open that may claim the later ones.
    fn end(&mut self, mailbox: Guid) -> Vec<proto::Span> {
        let Some(open) = self.open.get_mut(&mailbox) else { return Vec::new() };
        open.transactions = open.transactions.saturating_sub(1);
        let spans = std::mem::take(&mut open.spans);
        open.appends = 0;
        if open.transactions == 0 {
            self.open.remove(&mailbox);
        }
        spans
    }

    /// Spans without a change wait, one record for each user's in a row.
    fn keep_spans(&mut self, spans: Vec<proto::Span>) {
        for span in spans {
            match self.ready.last_mut() {
                Some(proto::Record { change: None, spans, expunged_in_memory: None, .. })
                    if spans.len() < PENDING_SPANS_MAX && spans.last().is_some_and(|last| last.user == span.user) =>
                {
                    spans.push(span);
                }
                _ => self.ready.push(proto::Record { spans: vec![span], ..Default::default() }),
            }
        }
    }
}

impl Written {
    /// Not yet decided: whether a change tells of it.
    pub fn to_span(&self) -> proto::Span {
        proto::Span {
            user: self.user.to_string(),
            mailbox_guid: self.mailbox_guid.to_vec(),
            private_user: self.private_user.as_deref().unwrap_or_default().to_owned(),
            index_id: self.index_id,
            log_seq: self.log_seq,
            begin: self.begin,
            end: self.end,
            prev_log_seq: self.prev_log_seq,
            prev_log_end: self.prev_log_end,
            applied: Vec::new(),
            tail: self.tail[..self.tail_size.min(self.tail.len())].to_vec(),
            untold: false,
            touches: self.adds_or_changes || self.expunges,
            old_mailbox_guid: known(self.old_mailbox_guid),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::TAIL_MAX;
    use super::*;

    const MAILBOX: Guid = [1; 16];

    fn written(begin: u64, appends: u32) -> Written {
        Written {
            user: "jane".into(),
            private_user: None,
            mailbox_guid: MAILBOX,
            old_mailbox_guid: Guid::default(),
            index_id: 7,
            log_seq: 2,
            begin,
            end: begin + 100,
            prev_log_seq: 0,
            prev_log_end: 0,
            tail: [0; TAIL_MAX],
            tail_size: 0,
            appends,
            adds_or_changes: appends > 0,
            expunges: false,
        }
    }

    #[test]
    fn what_was_expunged_in_memory_is_named_for_the_look() {
        let mut records = Records::new(|guid| guid.as_bytes().to_vec());
        let mut transaction = Transaction::new(1 << 20);
        transaction.expunge(5, Some("five".into()));
        transaction.expunge(6, None);
        let place = Place { user: "jane".into(), guid: MAILBOX, path: vec!["INBOX".into()] };
        records.begin(MAILBOX);
        records.commit_in_memory(&place, transaction, 9);
        let [first, last] = &records.take()[..] else { panic!() };
        let expunged = first.expunged_in_memory.as_ref().expect("it is told");
        let Some(proto::op::What::Expunge(expunge)) = &expunged.ops[0].what else { panic!() };
        let named: Vec<_> = expunge.messages.iter().map(|m| (m.first_uid, &m.guid[..], &m.guid_128[..])).collect();
        assert_eq!(named, [(5, "five", &b"five"[..])]);
        assert_eq!((expunged.user.as_str(), expunged.mailbox.as_ref().unwrap().uid_next, last.dropped), ("jane", 9, 1));
    }

    #[test]
    fn what_was_found_during_a_transaction_that_is_rolled_back_is_told_by_nobody() {
        let mut records = Records::new(|_| Vec::new());
        records.begin(MAILBOX);
        records.written(&written(100, 1));
        records.written(&written(200, 0));
        records.rollback(MAILBOX);
        let spans: Vec<_> = records.take().into_iter().flat_map(|record| record.spans).collect();
        assert_eq!(spans.iter().map(|span| (span.begin, span.untold)).collect::<Vec<_>>(), [(100, true), (200, false)]);
    }
}
