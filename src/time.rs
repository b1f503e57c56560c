//! Where time comes from. The simulator (tests/sim) has clocks of its own.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A process's clocks.
pub trait Time {
    /// Since the process began, or something in it. Never goes back.
    fn elapsed(&self) -> Duration;
    /// What the machine's clock says: microseconds since 1970. It may be set.
    fn now_us(&self) -> u64;
}

/// The machine's.
pub struct Clocks {
    began: Instant,
}

impl Default for Clocks {
    fn default() -> Clocks {
        Clocks { began: Instant::now() }
    }
}

impl Time for Clocks {
    fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    fn now_us(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
    }
}
