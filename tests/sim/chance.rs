//! Chance that a seed decides: SplitMix64.

/// See the module.
#[derive(Clone)]
pub struct Chance(u64);

impl Chance {
    /// Two with different purposes have nothing to do with each other.
    pub fn new(seed: u64, purpose: u64) -> Chance {
        let mut chance = Chance(seed ^ purpose.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        chance.next();
        chance
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// True in `percent` of all cases.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }

    /// Mostly short, now and then long: microseconds.
    pub fn delay_us(&mut self, usual: u64) -> u64 {
        match self.below(100) {
            0 => self.below(usual * 200),
            1..=9 => self.below(usual * 20),
            _ => usual / 2 + self.below(usual),
        }
    }
}
