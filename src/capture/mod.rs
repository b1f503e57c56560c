//! From a mailbox transaction in a mail process to a record on its way to the relay.
//!
//! [`transaction`] collects what a transaction does, [`Capture`] is the process's own end: it keeps the spans until
//! their change is known and hands records to [`link`]'s thread through a bounded queue. Nothing here waits: what does
//! not fit is dropped and counted, and the spans' gap tells the relay where.

mod link;
pub mod transaction;

pub use link::{Link, LinkConfig};
pub use transaction::{mailbox_change, Saved, Transaction};

use crate::wire::proto;
use prost::Message as _;
use std::collections::{HashMap, HashSet};

/// Most spans that wait for their change: a transaction that writes more is told in pieces.
const PENDING_SPANS_MAX: usize = 256;

/// Records that wait for the client's answer, at most, and their encoded bytes.
const WAITING_MAX: usize = 64;
const WAITING_BYTES_MAX: usize = 1 << 20;

/// Mailboxes that the relay was told of, at most: then they are told again.
const INTENTS_MAX: usize = 10_000;

/// The transactions and spans of one mail process.
pub struct Capture {
    link: Link,
    /// (user, mailbox GUID) that the relay knows we write to.
    intents: HashSet<(String, Vec<u8>)>,
    /// Per mailbox: open transactions that have something to tell, and the spans that belong to their changes.
    open: HashMap<Vec<u8>, OpenMailbox>,
    /// What leaves when the client has its answer.
    waiting: Vec<proto::Record>,
    /// Encoded bytes of the changes in it.
    waiting_bytes: usize,
}

#[derive(Default)]
struct OpenMailbox {
    transactions: usize,
    spans: Vec<proto::Span>,
}

impl Capture {
    /// Nothing is connected before the first write.
    pub fn new(config: LinkConfig) -> Capture {
        Capture {
            link: Link::new(config),
            intents: HashSet::new(),
            open: HashMap::new(),
            waiting: Vec::new(),
            waiting_bytes: 0,
        }
    }

    /// A transaction on this mailbox is about to write. The first one tells the relay, before anything is committed.
    pub fn begin(&mut self, user: &str, mailbox: &proto::Mailbox) {
        self.intend(user, mailbox);
        self.open.entry(mailbox.guid.clone()).or_default().transactions += 1;
    }

    /// Says that this process may write to this mailbox, once.
    pub fn intend(&mut self, user: &str, mailbox: &proto::Mailbox) {
        if self.intents.len() >= INTENTS_MAX {
            self.intents.clear();
        }
        if self.intents.insert((user.to_owned(), mailbox.guid.clone())) {
            self.link.intent(proto::Intent { user: user.to_owned(), mailbox: Some(mailbox.clone()) });
        }
    }

    /// The transaction that `begin` announced was committed as these changes. True: the caller is to call
    /// [`Capture::flush`] as soon as its client has its answer.
    pub fn commit(&mut self, mailbox_guid: &[u8], changes: Vec<proto::Change>) -> bool {
        let mut spans = self.end(mailbox_guid);
        let count = changes.len();
        for (i, change) in changes.into_iter().enumerate() {
            // The last part completes what the spans cover.
            let spans = if i + 1 == count { std::mem::take(&mut spans) } else { Vec::new() };
            self.waiting_bytes += change.encoded_len();
            self.waiting.push(proto::Record { change: Some(change), spans, dropped: 0 });
        }
        self.keep_spans(spans);
        self.is_to_flush()
    }

    /// The transaction that `begin` announced was committed, but cannot be told: it is to be read from the log.
    pub fn lose(&mut self, mailbox_guid: &[u8]) {
        let mut spans = self.end(mailbox_guid);
        spans.iter_mut().for_each(|span| span.untold = true);
        self.keep_spans(spans);
        self.flush();
    }

    /// The transaction that `begin` announced did not happen.
    pub fn rollback(&mut self, mailbox_guid: &[u8]) {
        let spans = self.end(mailbox_guid);
        self.keep_spans(spans);
        self.flush();
    }

    /// A change without a transaction: of a mailbox itself.
    pub fn mailbox(&mut self, change: proto::Change) {
        self.waiting.push(proto::Record { change: Some(change), spans: Vec::new(), dropped: 0 });
        self.flush();
    }

    /// A commit wrote this, which added messages or changed flags, or expunged messages that nobody spoke of. It belongs to
    /// the mailbox's open transactions; without any, nobody will tell what it did. True: the caller is to call
    /// [`Capture::flush`] as soon as its client has its answer.
    pub fn span(&mut self, mut span: proto::Span, touches: bool, expunges: bool) -> bool {
        match self.open.get_mut(&span.mailbox_guid) {
            Some(open) if open.spans.len() < PENDING_SPANS_MAX => {
                span.untold = expunges;
                open.spans.push(span);
                return false;
            }
            Some(_) => span.untold = expunges,
            None => span.untold = touches || expunges,
        }
        self.keep_spans(vec![span]);
        self.is_to_flush()
    }

    /// Sends at once what is too much to wait. True: something waits.
    fn is_to_flush(&mut self) -> bool {
        if self.waiting.len() >= WAITING_MAX || self.waiting_bytes >= WAITING_BYTES_MAX {
            self.flush();
        }
        !self.waiting.is_empty()
    }

    /// Sends what could wait.
    pub fn flush(&mut self) {
        self.waiting_bytes = 0;
        if !self.waiting.is_empty() {
            self.link.send(std::mem::take(&mut self.waiting));
        }
    }

    /// Sends what is left within the link's deadline, says goodbye and ends the thread.
    pub fn finish(mut self) {
        let spans: Vec<_> = self.open.drain().flat_map(|(_, open)| open.spans).collect();
        self.keep_spans(spans);
        self.flush();
        self.link.finish();
    }

    /// Spans of the mailbox, if no other transaction is open that may claim the later ones.
    fn end(&mut self, mailbox_guid: &[u8]) -> Vec<proto::Span> {
        let Some(open) = self.open.get_mut(mailbox_guid) else { return Vec::new() };
        open.transactions = open.transactions.saturating_sub(1);
        let spans = std::mem::take(&mut open.spans);
        if open.transactions == 0 {
            self.open.remove(mailbox_guid);
        }
        spans
    }

    /// Spans without a change wait, one record for each user's in a row.
    fn keep_spans(&mut self, spans: Vec<proto::Span>) {
        for span in spans {
            match self.waiting.last_mut() {
                Some(proto::Record { change: None, spans, .. })
                    if spans.len() < PENDING_SPANS_MAX && spans.last().is_some_and(|last| last.user == span.user) =>
                {
                    spans.push(span);
                }
                _ => self.waiting.push(proto::Record { change: None, spans: vec![span], dropped: 0 }),
            }
        }
    }
}
