//! A session with a peer as a state machine: frames in, frames out.
//!
//! [`Session`] speaks the protocol between two relays: greeting, lanes, liveness. [`Outbox`] holds the changes that a
//! peer has not acknowledged yet, across sessions. [`Inbox`] knows what came from a peer and what of it was applied. By [`bond`] it
//! is noticed that one of them went back to an earlier state.
//! All are pure: they know no sockets, files, threads or clocks; the time is an argument, in milliseconds of any
//! clock that does not go backwards.
#![forbid(unsafe_code)]

pub mod bond;
mod inbox;
mod outbox;
mod session;

pub use inbox::{Inbox, InboxError, Verdict};
pub use outbox::{Loaded, Outbox, OutboxStats, RefusedUser, Want};
pub use session::{Admits, Event, Identity, Session, SessionError, BODY_WINDOW_BYTES_MAX};

/// Changes that may be on their way to a peer without an acknowledgement.
pub const WINDOW_CHANGES: usize = 4096;
/// The same in bytes.
pub const WINDOW_BYTES: usize = 8 << 20;
/// Share of one user in the window, so that a user who is stuck holds up nobody else.
pub const USER_WINDOW_CHANGES: usize = 256;
/// The same in bytes.
pub const USER_WINDOW_BYTES: usize = 1 << 20;
