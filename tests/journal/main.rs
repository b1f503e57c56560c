//! The journal after a crash: its process is killed at each of its writes, or the power fails there. It must open, with all
//! that was committed, and of the commit that was under way all or nothing; a power failure may take the last commits.

#[allow(dead_code)]
#[path = "../sim/chance.rs"]
mod chance;
mod crash;
mod disk;
mod syscalls;
mod workload;

mod killed;
mod power;
