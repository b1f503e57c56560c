//! Waiting for a condition with a deadline: the only place where a test sleeps.

use std::time::{Duration, Instant};

use super::checker::Checker;

/// Polls `condition` until it holds; panics with `what` when the deadline passes first.
pub fn wait_until(deadline: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    if !holds_within(deadline, &mut condition) {
        panic!("waited {:.1} s in vain until {what}", deadline.as_secs_f32());
    }
}

/// Polls `condition` until it holds (true) or the deadline passes (false).
pub fn holds_within(deadline: Duration, condition: impl FnMut() -> bool) -> bool {
    poll(deadline, Duration::from_millis(50), condition)
}

/// The same for a condition that costs the machine something: it is polled less often the longer it takes.
pub fn holds_within_slowly(deadline: Duration, condition: impl FnMut() -> bool) -> bool {
    poll(deadline, Duration::from_millis(1000), condition)
}

fn poll(deadline: Duration, pause_max: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + deadline * Checker::get().map_or(1, Checker::slowness);
    let mut pause = Duration::from_millis(2);
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(pause);
        pause = (pause * 3 / 2).min(pause_max);
    }
}
