//! How often the log says what somebody makes it say whom nobody has asked to come: he may come again as often as he likes.
//!
//! Guarantees a line for each of the first ones of a kind, and then one in a while with the number of those left out. Pure.

/// Lines that are all said.
const BURST: u64 = 20;
/// And then one in so many milliseconds.
const EACH_MS: u64 = 10_000;

/// Lines of one kind.
#[derive(Default)]
pub struct Lines {
    /// When all of them may be said again.
    full_at_ms: u64,
    left_out: u64,
}

/// Of which kinds there are too many if somebody wants it.
#[derive(Default)]
pub struct Floods {
    /// Connections that were turned away.
    pub strangers: Lines,
    /// What local processes say that they must not.
    pub locals: Lines,
    /// And those that ended without a goodbye.
    pub unclean_ends: Lines,
    /// Changes that cannot be sent.
    pub bad_changes: Lines,
}

impl Lines {
    /// The line, if it is to be said.
    pub fn take(&mut self, line: impl FnOnce() -> String, now_ms: u64) -> Option<String> {
        let next_ms = self.full_at_ms.max(now_ms) + EACH_MS;
        if next_ms > now_ms + BURST * EACH_MS {
            self.left_out += 1;
            return None;
        }
        self.full_at_ms = next_ms;
        match std::mem::take(&mut self.left_out) {
            0 => Some(line()),
            count => Some(format!("{} ({count} lines like this were left out)", line())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_lines_is_said_in_few() {
        let mut lines = Lines::default();
        let mut said = |from_ms: u64| -> Vec<String> {
            (from_ms..from_ms + 5_000).filter_map(|now_ms| lines.take(|| "away".to_owned(), now_ms)).collect()
        };
        assert_eq!(said(7), vec!["away"; BURST as usize]);
        assert_eq!(said(10_007), ["away (4980 lines like this were left out)"]);
        assert_eq!(said(1_000_000).len(), BURST as usize);
    }
}
