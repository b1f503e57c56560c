//! The hybrid logical clock: microseconds since 1970 that never go back and never repeat, not even when the machine's
//! clock does, and that stand behind every clock value seen so far.

/// A value this far in the future is no clock's: a hundred years.
const AHEAD_US_MAX: u64 = 100 * 365 * 86_400 * 1_000_000;

/// See the module.
#[derive(Default)]
pub struct Clock {
    last: u64,
}

impl Clock {
    /// Goes on where an earlier one was.
    pub fn resume(last: u64) -> Clock {
        Clock { last }
    }

    /// All that comes is later.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// The clock of a change that was made here at `given` (0: not known).
    pub fn stamp(&mut self, given: u64, now_us: u64) -> u64 {
        let made = if given == 0 || given > now_us { now_us } else { given };
        self.last = made.max(self.last.saturating_add(1));
        self.last
    }

    /// A clock of another server was heard of: ours is behind it from now on, however far ahead it is; the order of changes
    /// is what matters. False if it cannot be one.
    pub fn observe(&mut self, clock: u64, now_us: u64) -> bool {
        if clock > now_us.saturating_add(AHEAD_US_MAX) {
            return false;
        }
        self.last = self.last.max(clock);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_rise_whatever_the_clocks_say() {
        let mut clock = Clock::default();
        assert_eq!(clock.stamp(1_000, 1_005), 1_000);
        assert_eq!(clock.stamp(900, 1_010), 1_001, "given earlier than one already given away");
        assert_eq!(clock.stamp(0, 2_000), 2_000);
        assert!(clock.observe(5_000, 2_001));
        assert_eq!(clock.stamp(2_002, 2_002), 5_001, "behind everything seen");
    }

    #[test]
    fn a_clock_hours_ahead_is_followed_and_one_that_cannot_be_is_not() {
        let mut clock = Clock::default();
        assert!(!clock.observe(u64::MAX, 1_000));
        assert_eq!(clock.stamp(u64::MAX, 1_000), 1_000);
        let ahead = 5 * 3_600 * 1_000_000;
        assert!(clock.observe(ahead, 2_000));
        assert_eq!(Clock::resume(clock.last()).stamp(2_001, 2_001), ahead + 1);
    }
}
