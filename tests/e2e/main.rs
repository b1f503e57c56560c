//! End-to-end tests: real Dovecots, driven as users and admins do.
//!
//! Each story runs for every pair of mail formats, both ways; `cargo test --test e2e sdbox_to_mdbox` runs one pair,
//! `cargo test --test e2e flags::` one chapter. They need root and the files of `make stage` and `make stage-panics`.

mod cluster;
mod scene;

mod acks;
mod bodies;
mod clashes;
mod compare;
mod copy;
mod deliver;
mod demo;
mod effects;
mod expunge;
mod flags;
mod gates;
mod heal;
mod killed;
mod local;
mod loopback;
mod mailboxes;
mod merge;
mod mesh;
mod model;
mod names;
mod panics;
mod plain;
mod qresync;
mod receiver;
mod restores;
mod servers;
mod split;
mod status;
mod tls;
mod trouble;
