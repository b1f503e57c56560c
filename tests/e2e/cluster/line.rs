//! The line between two relays: it can be slow, hang, and be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::network::Cable;
use super::ports::LOOPBACK;

/// Bytes that are passed on at once.
const CHUNK: usize = 4096;

#[derive(Default)]
struct State {
    hangs: bool,
    delay: Duration,
    /// A connection that is older than the last one passes on half a chunk, and ends.
    cuts: u64,
    /// Bytes that were passed on, both ways.
    passed: u64,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.notify_all();
    }
}

pub enum Line {
    Proxy(Proxy),
    Cable(Cable),
}

impl Line {
    /// Nothing passes any more, and nobody is told.
    pub fn hang(&self, hangs: bool) {
        match self {
            Line::Proxy(proxy) => proxy.shared.change(|state| state.hangs = hangs),
            Line::Cable(cable) => cable.unplug(hangs),
        }
    }

    /// Each few kilobytes take so much longer.
    pub fn delay(&self, delay: Duration) {
        match self {
            Line::Proxy(proxy) => proxy.shared.change(|state| state.delay = delay),
            Line::Cable(cable) => cable.delay(delay),
        }
    }

    /// The connections end with whatever comes next, in the middle of it. A cable only loses packets.
    pub fn cut(&self) {
        match self {
            Line::Proxy(proxy) => proxy.shared.change(|state| state.cuts += 1),
            Line::Cable(cable) => [true, false].into_iter().for_each(|unplugged| cable.unplug(unplugged)),
        }
    }
}

/// Who connects to `port` is connected to the relay behind it, for as long as the test process lives.
pub struct Proxy {
    pub port: u16,
    shared: Arc<Shared>,
}

impl Proxy {
    pub fn to(relay_port: u16) -> Proxy {
        let listener = TcpListener::bind((LOOPBACK, 0)).expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let shared = Arc::new(Shared::default());
        let proxy = Proxy { port, shared: shared.clone() };
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                // While the relay is away, so is the connection.
                let Ok(far) = TcpStream::connect((LOOPBACK, relay_port)) else { continue };
                for stream in [&near, &far] {
                    stream.set_nodelay(true).expect("an option");
                }
                let back = (far.try_clone().expect("a clone"), near.try_clone().expect("a clone"));
                for (from, to) in [(near, far), back] {
                    let shared = shared.clone();
                    std::thread::spawn(move || pump(from, to, &shared));
                }
            }
        });
        proxy
    }

    /// Bytes that were passed on so far, both ways.
    #[allow(dead_code, reason = "for the bench")]
    pub fn passed(&self) -> u64 {
        self.shared.state().passed
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, shared: &Shared) {
    let cuts = shared.state().cuts;
    let mut chunk = [0; CHUNK];
    while let Ok(length @ 1..) = from.read(&mut chunk) {
        let mut state = shared.state();
        let delay = state.delay;
        if !delay.is_zero() {
            let is_as_slow = |state: &mut State| state.delay == delay;
            state = shared.changed.wait_timeout_while(state, delay, is_as_slow).unwrap_or_else(|e| e.into_inner()).0;
        }
        state = shared.changed.wait_while(state, |state| state.hangs).unwrap_or_else(|e| e.into_inner());
        let is_cut = state.cuts != cuts;
        let passed = if is_cut { length / 2 } else { length };
        state.passed += passed as u64;
        drop(state);
        if to.write_all(&chunk[..passed]).is_err() || is_cut {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
