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
        now_us()
    }
}

/// What the machine's clock says: microseconds since 1970.
pub fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
    since.saturating_add_signed(offset_us())
}

/// By which the tests want the clock to be wrong, see [`crate::guard::provoke`].
#[cfg(not(feature = "panics"))]
fn offset_us() -> i64 {
    0
}

/// DOVETAIL_CLOCK_OFFSET_SECS.
#[cfg(feature = "panics")]
fn offset_us() -> i64 {
    let secs = std::env::var("DOVETAIL_CLOCK_OFFSET_SECS").ok().and_then(|secs| secs.parse::<i64>().ok());
    secs.unwrap_or(0) * 1_000_000
}
