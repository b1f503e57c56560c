//! The worker: applies other servers' changes to the mailboxes of this one, reads bodies for others, and says what is there.
//!
//! It gets one job at a time from the relay and answers it. It guarantees that a change that it reports as done is
//! durable, that doing it again does nothing, that a mail is never dropped to solve a conflict, and that nothing that a
//! relay sends makes it panic or keep more than a body's window in memory. What is open of a user when a job fails is
//! closed before the answer.
//!
//! It must not know Dovecot: storage is the trait [`storage::Storage`], whose implementation is `host::worker`.
#![forbid(unsafe_code)]

pub mod apart;
pub mod apply;
pub mod body;
pub mod compare;
pub mod connection;
pub mod elsewhere;
#[cfg(test)]
mod fake;
mod guids;
pub mod job;
pub mod look;
pub mod mark;
pub mod name;
pub mod storage;
pub mod tell;
