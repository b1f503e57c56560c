//! What a change is: limits and checks for changes that come from outside, and questions about them.
//!
//! Guarantees that a change which passed [`check_change`] names a user and a mailbox in bounds, has GUIDs of the right
//! length and UID ranges that are not empty. Whether the storage can represent a name is the worker's to find out.
//! Knows nothing of sockets, files, clocks or Dovecot.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use prost::Message;

use crate::wire::proto::{op::What, Change, FlagUpdate, Mailbox, MailboxRebuilt, MessageRange, Op, Save, Span, Stamp};

/// Most messages that are elsewhere in one frame between relay and worker: with GUIDs of 255 bytes they fit.
pub const ELSEWHERE_MAX: usize = 128;
/// Longest user name.
pub const USER_BYTES_MAX: usize = 512;
/// Longest name of a server.
pub const SERVER_BYTES_MAX: usize = 64;
/// Bytes of a mailbox's GUID and of a message's hashed one.
pub const GUID_BYTES: usize = 16;
/// Longest GUID of a message as the storage keeps it (a maildir file name, at most).
pub const MESSAGE_GUID_BYTES_MAX: usize = 255;
/// Hierarchy levels of a mailbox name.
pub const PATH_PARTS_MAX: usize = 64;
/// One hierarchy part of a mailbox name.
pub const PATH_PART_BYTES_MAX: usize = 1024;
/// All parts of a mailbox name.
pub const PATH_BYTES_MAX: usize = 4096;
/// Operations in one change.
pub const OPS_MAX: usize = 4096;
/// UID ranges in one operation.
pub const RANGES_MAX: usize = 8192;
/// UIDs that a message had before: each time that it clashes it gets another one.
pub const WAS_MAX: usize = 8192;
/// Mailboxes in one operation.
pub const MAILBOXES_MAX: usize = 256;
/// Keywords on one message, or in one update.
pub const KEYWORDS_MAX: usize = 1024;
/// One keyword.
pub const KEYWORD_BYTES_MAX: usize = 1024;
/// Spans with one change or record.
pub const SPANS_MAX: usize = 1024;
/// Servers in a stamp's vector.
pub const VECTOR_MAX: usize = 64;
/// Characters of an error's text that are passed on.
pub const ERROR_CHARS_MAX: usize = 400;
/// Longest encoded change, stamp included: leaves room for what stands around it in a frame.
pub const CHANGE_BYTES_MAX: usize = 64_000;

/// What is said, behind a server's name, where it wants something of a user with whom it has nothing to do.
pub const NO_PEER: &str = "is not among the user's peers here";

/// Aim for the encoded size of a change: a frame holds 64 KiB, and spans and stamp are added later.
const CHANGE_SIZE_AIM: usize = 48 << 10;

/// What is wrong with a change from outside.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ChangeError {
    #[error("the user's name is empty")]
    NoUser,
    #[error("the user's name has {0} bytes, and at most {USER_BYTES_MAX} are allowed")]
    UserTooLong(usize),
    #[error("the user's name has a control character")]
    UserControl,
    #[error("the user's name has a part that is '.' or '..'")]
    UserDots,
    #[error("the change names no mailbox")]
    NoMailbox,
    #[error("the {what} has {bytes} bytes instead of {GUID_BYTES}")]
    Guid { what: &'static str, bytes: usize },
    #[error("the mailbox name has {0} parts, and 1 to {PATH_PARTS_MAX} are allowed")]
    PathParts(usize),
    #[error("the mailbox name has an empty part")]
    PathEmptyPart,
    #[error(
        "the mailbox name is too long: a part may have {PATH_PART_BYTES_MAX} bytes and all together {PATH_BYTES_MAX}"
    )]
    PathTooLong,
    #[error("the mailbox name has a NUL character")]
    PathNul,
    #[error("the change has {count} {what}, and 1 to {max} are allowed")]
    Count { what: &'static str, count: usize, max: usize },
    #[error("an operation of the change is of a kind that is not known here")]
    UnknownOperation,
    #[error("the UID range {0}:{1} is not one")]
    Range(u32, u32),
    #[error(
        "a message's GUID has {0} bytes, which is none or more than the {MESSAGE_GUID_BYTES_MAX} that are allowed"
    )]
    MessageGuid(usize),
    #[error("a keyword is empty or has more than {KEYWORD_BYTES_MAX} bytes")]
    Keyword,
    #[error("a saved message has a body of {bytes} bytes in the change, but its size is given as {size}")]
    BodySize { bytes: usize, size: u64 },
    #[error("a server that is sent the change has no name")]
    Server,
    #[error("the span {0}..{1} is not one")]
    Span(u64, u64),
    #[error("the change has {0} bytes, and at most {CHANGE_BYTES_MAX} are allowed")]
    TooLong(usize),
}

/// Checks everything about a change that can be known without looking at a mailbox.
pub fn check_change(change: &Change) -> Result<(), ChangeError> {
    let bytes = change.encoded_len();
    if bytes > CHANGE_BYTES_MAX {
        return Err(ChangeError::TooLong(bytes));
    }
    check_user(&change.user)?;
    let mailbox = change.mailbox.as_ref().ok_or(ChangeError::NoMailbox)?;
    check_guid_or_none("mailbox's GUID", &mailbox.guid)?;
    check_path(&mailbox.path)?;
    check_count("operations", change.ops.len(), 1, OPS_MAX)?;
    for op in &change.ops {
        check_op(op, mailbox)?;
    }
    check_spans(&change.spans)?;
    let vector = change.stamp.as_ref().map_or(0, |stamp| stamp.vector.len());
    check_count("servers in its vector", vector, 0, VECTOR_MAX)?;
    check_count("servers that are sent it", change.given.len(), 0, VECTOR_MAX)?;
    match change.given.iter().all(|server| is_server(server)) {
        true => Ok(()),
        false => Err(ChangeError::Server),
    }
}

/// The memory that a change takes, roughly: an operation of four bytes in a frame has hundreds here.
pub fn memory_of(change: &Change) -> usize {
    let of_op = |op: &Op| match &op.what {
        Some(What::Save(save)) => size_of_val(save.keywords.as_slice()) + size_of_val(save.was.as_slice()),
        Some(What::Claim(claim)) => size_of_val(claim.was.as_slice()),
        Some(What::Flags(flags)) => {
            size_of_val(flags.messages.as_slice())
                + (flags.add_keywords.len() + flags.remove_keywords.len()) * size_of::<String>()
        }
        Some(What::Expunge(expunge)) => size_of_val(expunge.messages.as_slice()),
        Some(What::Apart(apart)) => size_of_val(apart.messages.as_slice()),
        Some(What::Rebuilt(rebuilt)) => size_of_val(rebuilt.present.as_slice()),
        _ => 0,
    };
    let vector = change.stamp.as_ref().map_or(0, |stamp| size_of_val(stamp.vector.as_slice()));
    let lists = size_of_val(change.ops.as_slice())
        + size_of_val(change.spans.as_slice())
        + size_of_val(change.given.as_slice())
        + vector;
    size_of::<Change>() + change.encoded_len() + lists + change.ops.iter().map(of_op).sum::<usize>()
}

/// Whether it can be a server's name.
pub fn is_server(name: &str) -> bool {
    (1..=SERVER_BYTES_MAX).contains(&name.len()) && !name.chars().any(char::is_control)
}

/// A user's name as it may come from outside.
pub fn check_user(user: &str) -> Result<(), ChangeError> {
    if user.is_empty() {
        return Err(ChangeError::NoUser);
    }
    if user.len() > USER_BYTES_MAX {
        return Err(ChangeError::UserTooLong(user.len()));
    }
    if user.chars().any(char::is_control) {
        return Err(ChangeError::UserControl);
    }
    // Of the parts of a name paths are made: mail_home = /mail/%d/%n.
    if user.split(['/', '@']).any(|part| part == "." || part == "..") {
        return Err(ChangeError::UserDots);
    }
    Ok(())
}

/// The parts of a mailbox's name. A part may hold any separator: whether the storage can escape it is not known here.
pub fn check_path(path: &[String]) -> Result<(), ChangeError> {
    if path.is_empty() || path.len() > PATH_PARTS_MAX {
        return Err(ChangeError::PathParts(path.len()));
    }
    if path.iter().any(String::is_empty) {
        return Err(ChangeError::PathEmptyPart);
    }
    let too_long = path.iter().any(|part| part.len() > PATH_PART_BYTES_MAX);
    if too_long || path.iter().map(String::len).sum::<usize>() > PATH_BYTES_MAX {
        return Err(ChangeError::PathTooLong);
    }
    if path.iter().any(|part| part.contains('\0')) {
        return Err(ChangeError::PathNul);
    }
    Ok(())
}

/// The UIDs by which the change's origin names messages, as ranges.
pub fn uids_of(change: &Change) -> Vec<(u32, u32)> {
    let one = |uid: &u32| (*uid, *uid);
    let of_op = |op: &Op| match &op.what {
        Some(What::Save(save)) => save.was.iter().chain(save.birth.iter().map(|birth| &birth.uid)).map(one).collect(),
        Some(What::Claim(claim)) => claim.was.iter().chain([&claim.uid]).map(one).collect(),
        Some(What::Nack(nack)) => vec![one(&nack.stands)],
        _ => ranges_of(op).iter().map(|range| (range.first_uid, range.last_uid)).collect::<Vec<_>>(),
    };
    change.ops.iter().flat_map(of_op).filter(|(_, last)| *last != 0).collect()
}

/// The GUIDs by which it names messages, each once.
pub fn guids_of(change: &Change) -> BTreeSet<&str> {
    fn of_op(op: &Op) -> Vec<&str> {
        match &op.what {
            Some(What::Save(save)) => vec![save.guid.as_str()],
            Some(What::Claim(claim)) => vec![claim.guid.as_str()],
            Some(What::Nack(nack)) => vec![nack.guid.as_str()],
            _ => ranges_of(op).iter().map(|range| range.guid.as_str()).collect(),
        }
    }
    change.ops.iter().flat_map(of_op).filter(|guid| !guid.is_empty()).collect()
}

fn ranges_of(op: &Op) -> &[MessageRange] {
    match &op.what {
        Some(What::Flags(update)) => &update.messages,
        Some(What::Expunge(expunge)) => &expunge.messages,
        Some(What::Apart(apart)) => &apart.messages,
        _ => &[],
    }
}

/// The spans of one record or change.
pub fn check_spans(spans: &[Span]) -> Result<(), ChangeError> {
    check_count("spans", spans.len(), 0, SPANS_MAX)?;
    for span in spans {
        check_user(&span.user)?;
        check_guid("GUID of a span's mailbox", &span.mailbox_guid)?;
        check_guid_or_none("former GUID of a span's mailbox", &span.old_mailbox_guid)?;
        if !span.private_user.is_empty() {
            check_user(&span.private_user)?;
        }
        if span.begin > span.end {
            return Err(ChangeError::Span(span.begin, span.end));
        }
    }
    Ok(())
}

/// An error's text from outside, fit for a log line.
pub fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(ERROR_CHARS_MAX).collect()
}

/// Whether some operation takes messages or names away, so that earlier saves must not be behind it.
pub fn is_destructive(change: &Change) -> bool {
    change.ops.iter().any(|op| {
        matches!(
            op.what,
            Some(
                What::Expunge(_)
                    | What::Apart(_)
                    | What::Create(_)
                    | What::Rename(_)
                    | What::Delete(_)
                    | What::Subscription(_)
            )
        )
    })
}

/// Whether the change is one of the mailboxes themselves: which there are, and their names.
pub fn is_of_list(change: &Change) -> bool {
    change
        .ops
        .iter()
        .any(|op| matches!(op.what, Some(What::Create(_) | What::Rename(_) | What::Delete(_) | What::Subscription(_))))
}

/// Whether the change is of messages alone.
pub fn is_of_messages(change: &Change) -> bool {
    let of_messages =
        |op: &Op| matches!(op.what, Some(What::Save(_) | What::Flags(_) | What::Expunge(_) | What::Apart(_)));
    change.ops.iter().all(of_messages)
}

/// What of the change is about flags; None: nothing.
pub fn flags_of(change: &Change) -> Option<Change> {
    let is_of_flags = |op: &&Op| matches!(op.what, Some(What::Flags(_)));
    let ops: Vec<Op> = change.ops.iter().filter(is_of_flags).cloned().collect();
    if ops.is_empty() {
        return None;
    }
    let Change { stamp, user, mailbox, spans, .. } = change;
    let (stamp, user, mailbox, spans) = (stamp.clone(), user.clone(), mailbox.clone(), spans.clone());
    Some(Change { stamp, user, mailbox, spans, ops, ..Default::default() })
}

/// An operation that does nothing: of the messages before the first one, all are there.
pub fn nothing() -> What {
    What::Rebuilt(MailboxRebuilt { present: vec![], uid_next: 1 })
}

/// Whether the change puts something into its mailbox, or names it: who has not heard of that must not delete it.
pub fn keeps_mailbox(change: &Change) -> bool {
    let keeps = |op: &Op| match &op.what {
        Some(What::Save(_) | What::Rename(_)) => true,
        Some(What::Create(create)) => !create.directory && !create.again,
        _ => false,
    };
    change.ops.iter().any(keeps)
}

/// Whether the change gives a mailbox another name.
pub fn is_rename(change: &Change) -> bool {
    change.ops.iter().any(|op| matches!(op.what, Some(What::Rename(_))))
}

/// Whether the change brings messages.
pub fn has_saves(change: &Change) -> bool {
    change.ops.iter().any(|op| matches!(op.what, Some(What::Save(_))))
}

/// Of how many messages that the change brings the bodies are elsewhere.
pub fn bodies_to_fetch(change: &Change) -> usize {
    let is_elsewhere = |op: &&Op| matches!(&op.what, Some(What::Save(save)) if !save.body_inline);
    change.ops.iter().filter(is_elsewhere).count()
}

/// As many changes as it takes for each to fit into a frame. Only the last one tells the mailbox's state behind all.
pub fn split(ops: Vec<What>, user: &str, mailbox: &Mailbox, clock: u64) -> Vec<Change> {
    let mut changes: Vec<Change> = Vec::new();
    let mut size = usize::MAX;
    for what in ops {
        let op = Op { what: Some(what) };
        let op_size = op.encoded_len() + 8;
        if size.saturating_add(op_size) > CHANGE_SIZE_AIM {
            changes.push(Change {
                stamp: Some(Stamp { clock, ..Default::default() }),
                user: user.to_owned(),
                mailbox: Some(Mailbox { uid_next: 0, highest_modseq: 0, ..mailbox.clone() }),
                ..Default::default()
            });
            size = 0;
        }
        size += op_size;
        if let Some(change) = changes.last_mut() {
            change.ops.push(op);
        }
    }
    if let Some(change) = changes.last_mut() {
        change.mailbox = Some(mailbox.clone());
    }
    changes
}

fn check_op(op: &Op, mailbox: &Mailbox) -> Result<(), ChangeError> {
    match op.what.as_ref().ok_or(ChangeError::UnknownOperation)? {
        What::Save(save) => {
            check_guid("mailbox's GUID", &mailbox.guid)?;
            check_save(save)
        }
        What::Flags(flags) => {
            check_guid("mailbox's GUID", &mailbox.guid)?;
            check_flags(flags)
        }
        What::Expunge(expunge) => {
            check_guid("mailbox's GUID", &mailbox.guid)?;
            check_ranges(&expunge.messages)
        }
        What::Apart(apart) => {
            check_guid("mailbox's GUID", &mailbox.guid)?;
            check_ranges(&apart.messages)?;
            // One by one, and by what they are.
            apart.messages.iter().try_for_each(|message| check_renumbered(&message.guid, message.first_uid))
        }
        What::Rebuilt(rebuilt) => {
            check_guid("mailbox's GUID", &mailbox.guid)?;
            match rebuilt.present.is_empty() {
                true => Ok(()),
                false => check_ranges(&rebuilt.present),
            }
        }
        What::Claim(claim) => {
            check_guid("mailbox's GUID", &mailbox.guid)?;
            check_count("former UIDs of a message", claim.was.len(), 0, WAS_MAX)?;
            check_renumbered(&claim.guid, claim.uid)
        }
        What::Nack(nack) => {
            check_guid("mailbox's GUID", &mailbox.guid)?;
            check_renumbered(&nack.guid, nack.uid)
        }
        What::Rename(rename) => {
            check_count("mailboxes that go back", rename.back.len(), 0, MAILBOXES_MAX)?;
            rename.back.iter().try_for_each(|mailbox| {
                check_guid("mailbox's GUID", &mailbox.guid)?;
                check_path(&mailbox.path)
            })?;
            check_path(&rename.new_path)
        }
        What::Create(create) => {
            check_count("mailboxes that have become one", create.was.len(), 0, MAILBOXES_MAX)?;
            create.was.iter().try_for_each(|guid| check_guid("mailbox's former GUID", guid))
        }
        What::Delete(_) | What::Subscription(_) => Ok(()),
    }
}

fn check_save(save: &Save) -> Result<(), ChangeError> {
    if let Some(birth) = &save.birth {
        check_guid("birth's GUID", &birth.guid)?;
    }
    if save.guid.len() > MESSAGE_GUID_BYTES_MAX {
        return Err(ChangeError::MessageGuid(save.guid.len()));
    }
    check_count("former UIDs of a message", save.was.len(), 0, WAS_MAX)?;
    check_keywords(&save.keywords)?;
    let body_fits = if save.body_inline { save.body.len() as u64 == save.size } else { save.body.is_empty() };
    if !body_fits {
        return Err(ChangeError::BodySize { bytes: save.body.len(), size: save.size });
    }
    match save.copied_from.as_ref().and_then(|from| from.mailbox.as_ref()) {
        Some(mailbox) => check_guid_or_none("GUID of the copy's source", &mailbox.guid),
        None => Ok(()),
    }
}

/// A message that must be named by its GUID.
fn check_renumbered(guid: &str, uid: u32) -> Result<(), ChangeError> {
    if guid.is_empty() || guid.len() > MESSAGE_GUID_BYTES_MAX {
        return Err(ChangeError::MessageGuid(guid.len()));
    }
    if uid == 0 || uid == u32::MAX {
        return Err(ChangeError::Range(uid, uid));
    }
    Ok(())
}

fn check_flags(update: &FlagUpdate) -> Result<(), ChangeError> {
    check_keywords(&update.add_keywords)?;
    check_keywords(&update.remove_keywords)?;
    check_ranges(&update.messages)
}

fn check_keywords(keywords: &[String]) -> Result<(), ChangeError> {
    check_count("keywords", keywords.len(), 0, KEYWORDS_MAX)?;
    if keywords.iter().any(|keyword| keyword.is_empty() || keyword.len() > KEYWORD_BYTES_MAX) {
        return Err(ChangeError::Keyword);
    }
    Ok(())
}

fn check_ranges(ranges: &[MessageRange]) -> Result<(), ChangeError> {
    check_count("UID ranges", ranges.len(), 1, RANGES_MAX)?;
    for range in ranges {
        if range.first_uid == 0 || range.first_uid > range.last_uid {
            return Err(ChangeError::Range(range.first_uid, range.last_uid));
        }
        if range.guid.len() > MESSAGE_GUID_BYTES_MAX {
            return Err(ChangeError::MessageGuid(range.guid.len()));
        }
        check_guid_or_none("hashed GUID of a message", &range.guid_128)?;
    }
    Ok(())
}

fn check_guid(what: &'static str, guid: &[u8]) -> Result<(), ChangeError> {
    if guid.len() == GUID_BYTES {
        return Ok(());
    }
    Err(ChangeError::Guid { what, bytes: guid.len() })
}

/// A mailbox that exists only by name (a directory, a subscription to nothing) has no GUID.
fn check_guid_or_none(what: &'static str, guid: &[u8]) -> Result<(), ChangeError> {
    if guid.is_empty() {
        return Ok(());
    }
    check_guid(what, guid)
}

fn check_count(what: &'static str, count: usize, min: usize, max: usize) -> Result<(), ChangeError> {
    if (min..=max).contains(&count) {
        return Ok(());
    }
    Err(ChangeError::Count { what, count, max })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::proto::{Apart, Birth, Expunge, MailboxRename, Subscription};

    fn change(what: What) -> Change {
        Change {
            user: "jane".into(),
            mailbox: Some(Mailbox { guid: vec![1; 16], path: vec!["INBOX".into()], ..Default::default() }),
            ops: vec![Op { what: Some(what) }],
            ..Default::default()
        }
    }

    fn expunge(first_uid: u32, last_uid: u32) -> What {
        What::Expunge(Expunge { messages: vec![MessageRange { first_uid, last_uid, ..Default::default() }] })
    }

    #[test]
    fn good_changes_pass() {
        let saved = Save { body_inline: true, body: b"hi".to_vec(), size: 2, ..Default::default() };
        assert_eq!(check_change(&change(What::Save(saved))), Ok(()));
        assert_eq!(check_change(&change(expunge(1, 7))), Ok(()));
        let mut by_name_only = change(What::Subscription(Subscription { subscribed: true }));
        by_name_only.mailbox.as_mut().unwrap().guid.clear();
        assert_eq!(check_change(&by_name_only), Ok(()));
    }

    #[test]
    fn the_uids_that_a_message_had_before_are_bounded_and_name_it() {
        let birth = Some(Birth { uid: 9, guid: vec![1; 16], ..Default::default() });
        let save = |was: Vec<u32>| change(What::Save(Save { was, birth: birth.clone(), ..Default::default() }));
        assert_eq!(check_change(&save(vec![1; WAS_MAX])), Ok(()));
        assert!(check_change(&save(vec![1; WAS_MAX + 1])).is_err());
        assert_eq!(uids_of(&save(vec![4, 2])), [(4, 4), (2, 2), (9, 9)]);
    }

    #[test]
    fn small_operations_count_with_the_memory_that_they_take() {
        let nothing = || Op { what: Some(What::Delete(Default::default())) };
        let many = Change { ops: (0..1_000).map(|_| nothing()).collect(), ..change(expunge(1, 1)) };
        assert!(memory_of(&many) >= 1_000 * size_of::<Op>());
        let range = MessageRange { first_uid: 1, last_uid: 1, ..Default::default() };
        let ranges = change(What::Expunge(Expunge { messages: vec![range; 1_000] }));
        assert!(memory_of(&ranges) >= 1_000 * size_of::<MessageRange>());
        let body = Save { body: vec![0; 30_000], ..Default::default() };
        assert!(memory_of(&change(What::Save(body))) < 33_000, "a mail costs what it has");
    }

    #[test]
    fn bad_names_are_refused() {
        let with = |edit: fn(&mut Change)| {
            let mut change = change(expunge(1, 1));
            edit(&mut change);
            check_change(&change).unwrap_err()
        };
        assert_eq!(with(|c| c.user.clear()), ChangeError::NoUser);
        assert_eq!(with(|c| c.user = "x".repeat(513)), ChangeError::UserTooLong(513));
        assert_eq!(with(|c| c.user = "a\nb".into()), ChangeError::UserControl);
        for user in ["..", "a/../b", "..@example.org", "jane@.", "."] {
            assert_eq!(check_user(user), Err(ChangeError::UserDots));
        }
        assert_eq!(check_user("j..d.@example.org"), Ok(()));
        assert_eq!(with(|c| c.mailbox = None), ChangeError::NoMailbox);
        assert_eq!(with(|c| c.mailbox.as_mut().unwrap().path.clear()), ChangeError::PathParts(0));
        assert_eq!(with(|c| c.mailbox.as_mut().unwrap().path = vec!["a".into(); 65]), ChangeError::PathParts(65));
        assert_eq!(with(|c| c.mailbox.as_mut().unwrap().path.push(String::new())), ChangeError::PathEmptyPart);
        assert_eq!(with(|c| c.mailbox.as_mut().unwrap().path = vec!["a".repeat(1025)]), ChangeError::PathTooLong);
        assert_eq!(with(|c| c.mailbox.as_mut().unwrap().path = vec!["a".repeat(1000); 5]), ChangeError::PathTooLong);
        assert_eq!(with(|c| c.mailbox.as_mut().unwrap().path = vec!["a\0".into()]), ChangeError::PathNul);
        assert_eq!(
            with(|c| c.mailbox.as_mut().unwrap().guid = vec![1; 15]),
            ChangeError::Guid { what: "mailbox's GUID", bytes: 15 }
        );
    }

    #[test]
    fn bad_operations_are_refused() {
        let check = |what: What| check_change(&change(what)).unwrap_err();
        assert_eq!(check(expunge(0, 1)), ChangeError::Range(0, 1));
        assert_eq!(check(expunge(3, 2)), ChangeError::Range(3, 2));
        assert!(matches!(check(What::Expunge(Expunge::default())), ChangeError::Count { what: "UID ranges", .. }));
        let nameless = MessageRange { first_uid: 1, last_uid: 1, ..Default::default() };
        assert_eq!(check(What::Apart(Apart { messages: vec![nameless] })), ChangeError::MessageGuid(0));
        assert_eq!(check(What::Rename(MailboxRename::default())), ChangeError::PathParts(0));
        let truncated = Save { body_inline: true, body: b"hi".to_vec(), size: 3, ..Default::default() };
        assert_eq!(check(What::Save(truncated)), ChangeError::BodySize { bytes: 2, size: 3 });
        let large = Save { body_inline: true, body: vec![0; 64_000], size: 64_000, ..Default::default() };
        assert!(matches!(check(What::Save(large)), ChangeError::TooLong(_)));
        let mut unknown = change(expunge(1, 1));
        unknown.ops[0].what = None;
        assert_eq!(check_change(&unknown), Err(ChangeError::UnknownOperation));
        unknown.ops.clear();
        assert!(matches!(check_change(&unknown), Err(ChangeError::Count { what: "operations", .. })));
    }

    #[test]
    fn spans_are_checked() {
        let span = Span { user: "jane".into(), mailbox_guid: vec![1; 16], begin: 5, end: 9, ..Default::default() };
        assert_eq!(check_spans(std::slice::from_ref(&span)), Ok(()));
        assert_eq!(check_spans(&[Span { begin: 10, ..span.clone() }]), Err(ChangeError::Span(10, 9)));
        assert!(check_spans(&[Span { mailbox_guid: vec![], ..span }]).is_err());
    }

    #[test]
    fn what_a_change_does_is_known() {
        assert!(is_destructive(&change(expunge(1, 1))) && !has_saves(&change(expunge(1, 1))));
        assert!(
            has_saves(&change(What::Save(Save::default()))) && !is_destructive(&change(What::Save(Save::default())))
        );
        assert!(!is_destructive(&change(What::Flags(FlagUpdate::default()))));
    }
}
