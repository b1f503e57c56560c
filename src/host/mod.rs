//! The Rust half of the boundary to Dovecot: the only module with `unsafe` code.
//!
//! C structs and strings become owned values here, every entry from C is guarded against panics, and nothing behind
//! this module knows that Dovecot exists.

mod capture;
mod doveadm;
mod ffi;
mod log;
mod plugin;
mod service;
mod settings;
mod thread;
mod worker;
