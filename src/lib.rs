//! Dovetail: real-time replication for Dovecot.
//!
//! The map (docs/ARCHITECTURE.md tells the story):
//!
//! | module | what it is for | may use |
//! |---|---|---|
//! | [`wire`] | the protocol: protobuf records, frames | nothing outside |
//! | [`change`] | what a change is: limits, checks, helpers on the records | `wire` |
//! | [`compare`] | what differs between two servers, and what each must tell the other | nothing outside |
//! | [`settings`] | the table of settings and their checks | nothing outside |
//! | [`time`] | where time comes from: the machine, or a simulator | nothing outside |
//! | [`indexlog`] | what Dovecot wrote to a mailbox's index, read back from its log | nothing outside |
//! | [`journal`] | the relay's memory on disk | files, SQLite |
//! | [`peer`] | a session with a peer as a state machine: frames in, frames out | `change`, `wire` |
//! | [`tls`] | who is at the other end of a connection between servers | `settings`, `time`, files |
//! | [`relay`] | the hub between local processes, workers and peers | all above, sockets, threads |
//! | [`capture`] | a transaction becomes a change; the thread that sends it to the relay | all above, sockets, threads |
//! | [`guard`] | the panic boundary | nothing outside |
//! | [`worker`] | applies changes and reads bodies | all above |
//! | `host` | the Rust half of the boundary to Dovecot; the only `unsafe` | all above, src/shim |

pub mod capture;
pub mod change;
pub mod compare;
pub mod guard;
#[cfg(feature = "host")]
mod host;
pub mod indexlog;
pub mod journal;
pub mod merge;
pub mod peer;
pub mod relay;
pub mod settings;
pub mod time;
pub mod tls;
pub mod wire;
pub mod worker;
