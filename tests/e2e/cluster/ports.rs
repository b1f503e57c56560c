//! Port numbers for servers under test, without races between threads, processes and Dovecot itself.
//!
//! A block of ports below the kernel's range for outgoing connections is held by a listener on its first port for as
//! long as the block lives; its other ports are for Dovecot.

use std::net::{Ipv4Addr, TcpListener};

pub const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;

const FIRST: u16 = 21_000;
const LAST: u16 = 31_000;
const BLOCK: u16 = 10;

pub struct PortBlock {
    _held: TcpListener,
    first: u16,
    used: u16,
}

impl PortBlock {
    pub fn reserve() -> PortBlock {
        let blocks = (LAST - FIRST) / BLOCK;
        let start = (std::process::id() % u32::from(blocks)) as u16;
        for i in 0..blocks {
            let first = FIRST + (start + i) % blocks * BLOCK;
            let Ok(held) = TcpListener::bind((LOOPBACK, first)) else {
                continue;
            };
            let free = (first + 1..first + BLOCK).all(|port| TcpListener::bind((LOOPBACK, port)).is_ok());
            if free {
                return PortBlock { _held: held, first, used: 0 };
            }
        }
        panic!("no {BLOCK} free ports in a row between {FIRST} and {LAST} on {LOOPBACK}");
    }

    pub fn take(&mut self) -> u16 {
        self.used += 1;
        assert!(self.used < BLOCK, "a server needs more than {} ports", BLOCK - 1);
        self.first + self.used
    }
}
