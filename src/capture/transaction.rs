//! Collects what one mailbox transaction does and turns it into changes at its commit.
//!
//! Pure: knows nothing of Dovecot, sockets or threads. What it guarantees: the changes of one transaction, applied in
//! order, do what the transaction did; each fits into one frame.

use crate::change;
use crate::wire::proto;
use prost::Message as _;

/// What a range without its GUID takes in a record, at most.
const RANGE_BYTES: usize = 16;

/// Most messages that one flag change names: their ranges must fit into a frame.
pub const RANGES_PER_OP_MAX: usize = 512;

/// Flag updates of one transaction that may name the message by its GUID, too: worth opening some files, but not thousands.
const NAMED_UPDATES_MAX: usize = 100;

/// What one mailbox transaction has done so far.
#[derive(Debug, Default)]
pub struct Transaction {
    /// The only update so far; here it needs no memory of its own.
    single: Option<Single>,
    saves: Vec<proto::Save>,
    flags: Vec<proto::FlagUpdate>,
    /// Messages in them.
    updates: usize,
    /// UIDs of those that were expunged before anybody asked for their GUIDs.
    gone: Vec<u32>,
    expunges: Vec<proto::MessageRange>,
    bytes: usize,
    body_bytes: usize,
    bytes_max: usize,
    overflowed: bool,
}

/// What is known of a message whose flags were changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// Its GUID.
    As(String),
    /// It was expunged, or has another UID since.
    Gone,
    /// Nothing: its UID must do.
    Nothing,
}

/// What most transactions do: system flags of one message change.
#[derive(Debug, Clone, Copy)]
struct Single {
    uid: u32,
    add: u32,
    remove: u32,
}

/// A message that got its UID at the commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// Its UID.
    pub uid: u32,
    /// Its GUID, where the storage knows it only now (maildir).
    pub guid: Option<String>,
}

/// Why a transaction cannot be told to the peers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Untold {
    #[error("it has {0} bytes, more than dovetail_process_queue_size")]
    TooLarge(usize),
    #[error("{0} messages more were found in the mailbox")]
    Found(u64),
    #[error("it saved {saves} messages, and {uids} of them have a UID")]
    Uids { saves: usize, uids: usize },
}

impl Transaction {
    /// It may take up to `bytes_max` as it would be sent, a quarter of it for bodies.
    pub fn new(bytes_max: usize) -> Transaction {
        Transaction { bytes_max, ..Default::default() }
    }

    /// Bytes that it takes as records, about.
    pub fn size(&self) -> usize {
        self.bytes + self.body_bytes
    }

    /// A message was saved or copied; its UID comes with the commit.
    pub fn save(&mut self, save: proto::Save) {
        if !self.take(save.encoded_len() - save.body.len()) {
            return;
        }
        self.body_bytes += save.body.len();
        self.saves.push(save);
        if self.body_bytes > self.bytes_max / 4 {
            self.drop_bodies();
        }
    }

    /// Counts what is added. False if it is too much.
    fn take(&mut self, bytes: usize) -> bool {
        self.bytes += bytes;
        if self.bytes > self.bytes_max {
            *self = Transaction { overflowed: true, bytes: self.bytes, ..Default::default() };
        }
        !self.overflowed
    }

    /// Gives up the bodies that were to ride along: they are read from the mailbox later.
    fn drop_bodies(&mut self) {
        for save in &mut self.saves {
            save.body = Vec::new();
            save.body_inline = false;
        }
        self.body_bytes = 0;
    }

    /// Flags and keywords of one message changed. Its GUID, if it must be known now: see [`Transaction::name`].
    pub fn flags(&mut self, uid: u32, guid: Option<String>, delta: proto::FlagUpdate) {
        let guid = guid.unwrap_or_default();
        if !self.take(guid.len() + RANGE_BYTES) {
            return;
        }
        self.updates += 1;
        if self.updates == 1 && guid.is_empty() && delta.add_keywords.is_empty() && delta.remove_keywords.is_empty() {
            self.single = Some(Single { uid, add: delta.add, remove: delta.remove });
            return;
        }
        self.list_single();
        // The first ones stand for themselves: they may get a GUID.
        let apart = self.updates <= NAMED_UPDATES_MAX + 1 || !guid.is_empty();
        match self.flags.last_mut() {
            Some(last) if same_delta(last, &delta) && last.messages.len() < RANGES_PER_OP_MAX => {
                push_message(&mut last.messages, uid, guid, apart);
            }
            _ => {
                let mut update = delta;
                push_message(&mut update.messages, uid, guid, true);
                self.flags.push(update);
            }
        }
    }

    /// The single update becomes one like any other.
    fn list_single(&mut self) {
        if let Some(Single { uid, add, remove }) = self.single.take() {
            let message = proto::MessageRange { first_uid: uid, last_uid: uid, ..Default::default() };
            self.flags.push(proto::FlagUpdate { messages: vec![message], add, remove, ..Default::default() });
        }
    }

    /// Asks for the GUIDs of messages whose flags were changed, so that the peer finds them even if it gave them another UID.
    pub fn name(&mut self, mut known: impl FnMut(u32) -> Known) {
        self.list_single();
        let messages = self.flags.iter_mut().flat_map(|update| &mut update.messages);
        for message in messages.take(NAMED_UPDATES_MAX).filter(|message| message.guid.is_empty()) {
            match known(message.first_uid) {
                Known::As(guid) => {
                    message.guid = guid;
                    self.bytes += message.guid.len();
                }
                Known::Gone => self.gone.push(message.first_uid),
                Known::Nothing => {}
            }
        }
    }

    /// What is gone, and did not only move, needs no flags. A peer may have another message with its UID: if it never heard of this one.
    fn forget_gone(&mut self) {
        let gone = std::mem::take(&mut self.gone);
        let is_gone = |range: &proto::MessageRange| {
            range.guid.is_empty() && range.first_uid == range.last_uid && gone.contains(&range.first_uid)
        };
        self.flags.iter_mut().for_each(|update| update.messages.retain(|range| !is_gone(range)));
        self.flags.retain(|update| !update.messages.is_empty());
    }

    /// Calls `follow` with what is done to which messages that were there before. It returns the message's GUID if its UID
    /// names it no more; None otherwise.
    pub fn follow(&mut self, mut follow: impl FnMut(&proto::MessageRange, Done) -> Option<String>) {
        self.list_single();
        for update in &mut self.flags {
            let mut messages = std::mem::take(&mut update.messages);
            name_moved(&mut messages, |range| follow(range, Done::Flags(update)));
            update.messages = messages;
        }
        name_moved(&mut self.expunges, |range| follow(range, Done::Expunge));
        self.forget_gone();
    }

    /// One message was expunged.
    pub fn expunge(&mut self, uid: u32, guid: Option<String>) {
        if self.take(guid.as_ref().map_or(0, String::len) + RANGE_BYTES) {
            match guid {
                None => push_message(&mut self.expunges, uid, String::new(), false),
                Some(guid) => self.expunges.push(proto::MessageRange {
                    first_uid: uid,
                    last_uid: uid,
                    guid,
                    ..Default::default()
                }),
            }
        }
    }

    /// Of what it expunged, what has a GUID, with that and its hash.
    pub fn into_named_expunges(self, generate_birth_guid: impl Fn(&str) -> Vec<u8>) -> Vec<proto::MessageRange> {
        let named = self.expunges.into_iter().filter(|range| !range.guid.is_empty());
        named.map(|range| proto::MessageRange { guid_128: generate_birth_guid(&range.guid), ..range }).collect()
    }

    /// The changes, in the order in which they have to be applied. `saved` are the UIDs (and GUIDs) in the order of
    /// the saves.
    ///
    /// # Errors
    ///
    /// Why it cannot be told.
    pub fn into_changes(
        mut self,
        user: &str,
        mailbox: &proto::Mailbox,
        saved: &[Saved],
        clock: u64,
        generate_birth_guid: impl Fn(&str) -> Vec<u8>,
    ) -> Result<Vec<proto::Change>, Untold> {
        if self.overflowed {
            return Err(Untold::TooLarge(self.bytes));
        }
        if self.saves.len() != saved.len() {
            return Err(Untold::Uids { saves: self.saves.len(), uids: saved.len() });
        }
        self.list_single();
        let mut ops = Vec::new();
        ops.extend(self.flags.into_iter().map(proto::op::What::Flags));
        for (mut save, saved) in self.saves.into_iter().zip(saved) {
            if let Some(guid) = &saved.guid {
                save.guid.clone_from(guid);
            }
            save.birth =
                Some(proto::Birth { guid: generate_birth_guid(&save.guid), origin: String::new(), uid: saved.uid });
            ops.push(proto::op::What::Save(save));
        }
        let mut expunges = self.expunges.into_iter().peekable();
        while expunges.peek().is_some() {
            let messages = expunges.by_ref().take(RANGES_PER_OP_MAX).collect();
            ops.push(proto::op::What::Expunge(proto::Expunge { messages }));
        }
        Ok(change::split(ops, user, mailbox, clock))
    }
}

/// A change of a mailbox itself.
pub fn mailbox_change(user: &str, mailbox: proto::Mailbox, what: proto::op::What, clock: u64) -> proto::Change {
    proto::Change {
        stamp: Some(proto::Stamp { clock, ..Default::default() }),
        user: user.to_owned(),
        mailbox: Some(mailbox),
        ops: vec![proto::Op { what: Some(what) }],
        ..Default::default()
    }
}

/// What is done to messages, see [`Transaction::follow`].
#[derive(Clone, Copy, Debug)]
pub enum Done<'a> {
    Flags(&'a proto::FlagUpdate),
    Expunge,
}

fn name_moved(messages: &mut [proto::MessageRange], mut follow: impl FnMut(&proto::MessageRange) -> Option<String>) {
    for range in messages {
        match follow(range) {
            Some(guid) if range.guid.is_empty() && range.first_uid == range.last_uid => range.guid = guid,
            _ => {}
        }
    }
}

fn same_delta(a: &proto::FlagUpdate, b: &proto::FlagUpdate) -> bool {
    a.add == b.add && a.remove == b.remove && a.add_keywords == b.add_keywords && a.remove_keywords == b.remove_keywords
}

/// Continues the last range, unless the message is to stand apart.
fn push_message(messages: &mut Vec<proto::MessageRange>, uid: u32, guid: String, apart: bool) {
    match messages.last_mut() {
        Some(last) if !apart && last.guid.is_empty() && last.last_uid == uid.wrapping_sub(1) => last.last_uid = uid,
        _ => messages.push(proto::MessageRange { first_uid: uid, last_uid: uid, guid, ..Default::default() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(add: u32) -> proto::FlagUpdate {
        proto::FlagUpdate { add, ..Default::default() }
    }

    fn mailbox() -> proto::Mailbox {
        proto::Mailbox { guid: vec![1; 16], path: vec!["INBOX".into()], uid_next: 9, ..Default::default() }
    }

    fn changes(transaction: Transaction, saved: &[Saved]) -> Vec<proto::Change> {
        untold(transaction, saved).unwrap()
    }

    fn untold(transaction: Transaction, saved: &[Saved]) -> Result<Vec<proto::Change>, Untold> {
        transaction.into_changes("u", &mailbox(), saved, 1, |guid| guid.as_bytes().to_vec())
    }

    #[test]
    fn the_same_flag_on_a_run_of_messages_is_one_range_behind_the_first_hundred() {
        let mut transaction = Transaction::new(64 << 20);
        for uid in 1..=100_000 {
            transaction.flags(uid, None, delta(2));
        }
        transaction.name(|uid| if uid == 7 { Known::Nothing } else { Known::As(format!("guid {uid}")) });
        let changes = changes(transaction, &[]);
        assert_eq!(changes.len(), 1);
        let Some(proto::op::What::Flags(flags)) = &changes[0].ops[0].what else { panic!() };
        let range = |first_uid, last_uid, guid: &str| proto::MessageRange {
            first_uid,
            last_uid,
            guid: guid.into(),
            ..Default::default()
        };
        let mut expected: Vec<_> = (1..=100).map(|uid| range(uid, uid, &format!("guid {uid}"))).collect();
        expected[6].guid.clear();
        expected.push(range(101, 100_000, ""));
        assert_eq!(flags.messages, expected);
    }

    #[test]
    fn a_single_update_is_named_and_told_like_any_other() {
        let mut transaction = Transaction::new(64 << 20);
        transaction.flags(7, None, proto::FlagUpdate { add: 2, remove: 4, ..Default::default() });
        transaction.name(|uid| Known::As(format!("guid {uid}")));
        let changes = changes(transaction, &[]);
        let message = proto::MessageRange { first_uid: 7, last_uid: 7, guid: "guid 7".into(), ..Default::default() };
        let expected = proto::FlagUpdate { messages: vec![message], add: 2, remove: 4, ..Default::default() };
        assert_eq!(changes[0].ops[0].what, Some(proto::op::What::Flags(expected)));
    }

    #[test]
    fn a_message_that_is_gone_before_it_is_told_needs_no_flags() {
        let mut transaction = Transaction::new(64 << 20);
        (7..=9).for_each(|uid| transaction.flags(uid, None, delta(4)));
        transaction.expunge(7, Some("guid 7".into()));
        transaction.name(|uid| if uid == 9 { Known::Nothing } else { Known::Gone });
        // 8 has moved.
        transaction.follow(|range, _| (range.first_uid == 8).then(|| "guid 8".into()));
        let changes = changes(transaction, &[]);
        let ops: Vec<_> = changes[0].ops.iter().map(|op| op.what.as_ref().unwrap()).collect();
        let [proto::op::What::Flags(flags), proto::op::What::Expunge(_)] = ops[..] else { panic!("{ops:?}") };
        let named: Vec<_> = flags.messages.iter().map(|range| (range.first_uid, range.guid.as_str())).collect();
        assert_eq!(named, [(8, "guid 8"), (9, "")]);
    }

    #[test]
    fn what_is_too_large_is_given_up_whole() {
        let mut transaction = Transaction::new(10_000);
        for uid in 1..=100 {
            transaction.expunge(uid, Some("0123456789abcdef0123456789abcdef".into()));
        }
        assert!(!transaction.overflowed);
        for uid in 101..=1_000_000 {
            transaction.expunge(uid, Some("0123456789abcdef0123456789abcdef".into()));
        }
        assert_eq!(transaction.expunges.len(), 0);
        assert!(matches!(untold(transaction, &[]), Err(Untold::TooLarge(bytes)) if bytes > 10_000));
    }

    #[test]
    fn bodies_are_given_up_before_the_rest() {
        let mut transaction = Transaction::new(100_000);
        let save = || proto::Save { body: vec![b'x'; 9_000], body_inline: true, ..Default::default() };
        for _ in 0..10 {
            transaction.save(save());
        }
        assert!(transaction.saves.iter().map(|save| save.body.len()).sum::<usize>() <= 25_000);
        assert_eq!(transaction.saves.len(), 10);
    }

    #[test]
    fn saves_that_nobody_can_tell_apart_are_not_told() {
        let mut transaction = Transaction::new(100_000);
        transaction.save(proto::Save::default());
        transaction.save(proto::Save::default());
        assert_eq!(untold(transaction, &[Saved { uid: 7, guid: None }]), Err(Untold::Uids { saves: 2, uids: 1 }));
    }

    #[test]
    fn saves_get_their_uids_in_order_and_come_before_expunges() {
        let mut transaction = Transaction::new(64 << 20);
        transaction.expunge(3, None);
        transaction.save(proto::Save { guid: "x".into(), ..Default::default() });
        transaction.save(proto::Save::default());
        let saved = [Saved { uid: 7, guid: None }, Saved { uid: 8, guid: Some("late".into()) }];
        let changes = changes(transaction, &saved);
        let kinds: Vec<_> = changes[0].ops.iter().map(|op| op.what.clone().unwrap()).collect();
        let proto::op::What::Save(first) = &kinds[0] else { panic!() };
        let proto::op::What::Save(second) = &kinds[1] else { panic!() };
        assert_eq!((first.birth.as_ref().unwrap().uid, first.guid.as_str()), (7, "x"));
        assert_eq!((second.birth.as_ref().unwrap().uid, second.guid.as_str()), (8, "late"));
        assert!(matches!(kinds[2], proto::op::What::Expunge(_)));
    }

    #[test]
    fn each_of_a_run_of_expunged_messages_keeps_its_guid() {
        let mut transaction = Transaction::new(64 << 20);
        transaction.expunge(1, Some("a".into()));
        transaction.expunge(2, Some("b".into()));
        let changes = changes(transaction, &[]);
        let Some(proto::op::What::Expunge(expunge)) = &changes[0].ops[0].what else { panic!() };
        let named: Vec<_> = expunge.messages.iter().map(|m| (m.first_uid, m.last_uid, m.guid.as_str())).collect();
        assert_eq!(named, [(1, 1, "a"), (2, 2, "b")]);
    }

    #[test]
    fn a_large_transaction_becomes_changes_that_fit_into_frames() {
        let mut transaction = Transaction::new(64 << 20);
        let mut saved = Vec::new();
        for uid in 1..=20 {
            transaction.save(proto::Save { body: vec![b'x'; 30_000], body_inline: true, ..Default::default() });
            saved.push(Saved { uid, guid: None });
        }
        for uid in (1..200_000).step_by(2) {
            transaction.flags(uid, None, delta(1));
        }
        let changes = changes(transaction, &saved);
        assert!(changes.iter().all(|change| change.encoded_len() < 60 << 10));
        let (last, others) = changes.split_last().unwrap();
        assert_eq!(last.mailbox.as_ref().unwrap().uid_next, 9);
        assert!(others.iter().all(|change| change.mailbox.as_ref().unwrap().uid_next == 0));
    }
}
