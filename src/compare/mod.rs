//! What differs between two servers, and what each of them must tell the other.
//!
//! Digests top-down: of all messages of a mailbox, then of ranges of UIDs, then the messages themselves; only what differs is
//! descended. Nothing is ever taken away because of what is decided here: without history a message, flag, mailbox or
//! subscription that one side has is missing on the other. History has its say where it is kept: what is on its way is waited
//! for before anything is compared, and who is told of a message that its own log knows as expunged says so
//! (`src/worker/apply.rs`, `Save.found`).
//!
//! Pure: no clock, no files, no sockets.
#![forbid(unsafe_code)]

use crate::merge::mailbox::Named;

pub mod descent;
pub mod digest;
pub mod list;
pub mod repair;

/// 16 bytes, of a mailbox.
pub type Guid = Vec<u8>;

/// SHA-256, see [`digest::Contents`].
pub type BodyHash = [u8; 32];

/// A mailbox, as one side has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mailbox {
    pub guid: Guid,
    pub path: Vec<String>,
    pub uid_validity: u32,
    pub uid_next: u32,
    pub messages: u32,
    /// Of all its messages.
    pub digest: u64,
    /// What its relay knows of it.
    pub named: Named,
}

/// A message, as one side has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    pub uid: u32,
    pub guid: String,
    /// System flags, enum mail_flags without MAIL_RECENT.
    pub flags: u32,
    pub keywords: Vec<String>,
    /// Of its contents; None: they were not read.
    pub body: Option<BodyHash>,
}

/// UIDs, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    pub first: u32,
    pub last: u32,
}

/// What is in a range on one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InRange {
    pub range: Range,
    pub messages: u32,
    pub digest: u64,
}
