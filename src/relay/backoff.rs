//! Growing pauses between attempts.

/// Pauses that double from `min` to `max` milliseconds.
pub struct Backoff {
    min_ms: u64,
    max_ms: u64,
    next_ms: u64,
}

impl Backoff {
    pub fn new(min_ms: u64, max_ms: u64) -> Backoff {
        Backoff { min_ms, max_ms, next_ms: min_ms }
    }

    /// The pause before the next attempt.
    pub fn pause_ms(&mut self) -> u64 {
        let pause = self.next_ms;
        self.next_ms = (pause * 2).min(self.max_ms);
        pause
    }

    /// An attempt succeeded.
    pub fn reset(&mut self) {
        self.next_ms = self.min_ms;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_again() {
        let mut backoff = Backoff::new(50, 180);
        assert_eq!([(); 4].map(|()| backoff.pause_ms()), [50, 100, 180, 180]);
        backoff.reset();
        assert_eq!(backoff.pause_ms(), 50);
    }
}
