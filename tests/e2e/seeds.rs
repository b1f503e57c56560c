//! `make chaos`: random schedules against real Dovecots, for as many seeds as wanted. Not part of `make test`: it is for a
//! machine of its own, and what it still finds is in docs/PERFORMANCE.md.
#![allow(dead_code, unused_imports, unused_macros)]

mod chaos;
mod cluster;
mod scene;
