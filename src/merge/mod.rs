//! Decisions where servers were written to at the same time.
//!
//! Pure: no clock, no files, no sockets. What is here decides the same on every server, whatever order things come in.
#![forbid(unsafe_code)]

pub mod flags;
pub mod mailbox;
pub mod rule;
pub mod uid;
