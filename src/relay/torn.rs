//! What a worker that failed or went away may have put into a mailbox without saying so.
//!
//! In a maildir a message's file is there before Dovecot's index says whose commit brought it: whoever syncs next finds it, and a
//! look at the log takes it for a message that nobody told of. Told as such it would be there twice in the end, as the peer
//! sends its change again. Guarantees bounded memory: beyond it, what is oldest is forgotten. Pure.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::wire::proto::op::What;
use crate::wire::proto::{Change, Mailbox};

/// Messages that are remembered. A job has no more.
const TORN_MAX: usize = 4_096;

/// A change of a peer: its epoch and number.
pub type Sent = (usize, u64, u64);

struct Message {
    user: Arc<str>,
    sent: Sent,
    mailbox: Vec<u8>,
    guid: String,
}

/// See the module.
#[derive(Default)]
pub struct Torn {
    messages: VecDeque<Message>,
}

impl Torn {
    /// A worker was to save these messages, and went away. They come again.
    pub fn note(&mut self, user: &Arc<str>, sent: Sent, mailbox: &[u8], guids: Vec<String>) {
        for guid in guids {
            if self.messages.len() >= TORN_MAX {
                self.messages.pop_front();
            }
            self.messages.push_back(Message { user: user.clone(), sent, mailbox: mailbox.to_vec(), guid });
        }
    }

    /// The change is applied, or never will be.
    pub fn is_over(&mut self, sent: Sent) {
        self.messages.retain(|message| message.sent != sent);
    }

    /// Takes out of what was found in a log the messages that such a worker put there.
    pub fn take_from(&self, user: &str, found: &mut Change, is_same: impl Fn(&[u8], &[u8]) -> bool) {
        let Change { mailbox: Some(Mailbox { guid: mailbox, .. }), ops, .. } = found else { return };
        let is_it = |message: &Message, guid: &str| {
            *message.user == *user && message.guid == guid && is_same(&message.mailbox, mailbox)
        };
        ops.retain(|op| match &op.what {
            Some(What::Save(save)) => !self.messages.iter().any(|message| is_it(message, &save.guid)),
            _ => true,
        });
    }
}

/// The GUIDs of the messages that the change saves.
pub fn saved(change: &Change) -> Vec<String> {
    let saves = change.ops.iter().filter_map(|op| match &op.what {
        Some(What::Save(save)) => Some(save.guid.clone()),
        _ => None,
    });
    saves.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::proto::{Op, Save};

    fn found(mailbox: u8, guids: &[&str]) -> Change {
        let save = |guid: &&str| Op { what: Some(What::Save(Save { guid: guid.to_string(), ..Default::default() })) };
        let mailbox = Some(Mailbox { guid: vec![mailbox; 16], ..Default::default() });
        Change { mailbox, ops: guids.iter().map(save).collect(), ..Default::default() }
    }

    fn left(torn: &Torn, user: &str, mut found: Change) -> Vec<String> {
        torn.take_from(user, &mut found, |a, b| a == b);
        saved(&found)
    }

    #[test]
    fn what_comes_again_is_not_found() {
        let mut torn = Torn::default();
        let jane: Arc<str> = "jane".into();
        torn.note(&jane, (0, 1, 5), &[1; 16], vec!["one".into(), "two".into()]);
        torn.note(&jane, (0, 1, 6), &[1; 16], vec!["three".into()]);
        assert_eq!(left(&torn, "jane", found(1, &["one", "other", "three"])), ["other"]);
        assert_eq!(left(&torn, "joe", found(1, &["one"])), ["one"]);
        assert_eq!(left(&torn, "jane", found(2, &["one"])), ["one"], "a copy in another mailbox");
        torn.is_over((0, 1, 5));
        assert_eq!(left(&torn, "jane", found(1, &["one", "three"])), ["one"]);
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let mut torn = Torn::default();
        (0..2 * TORN_MAX as u64).for_each(|n| torn.note(&"jane".into(), (0, 1, n), &[1; 16], vec![n.to_string()]));
        assert_eq!(torn.messages.len(), TORN_MAX);
        assert_eq!(left(&torn, "jane", found(1, &["0", "8191"])), ["0"]);
    }
}
