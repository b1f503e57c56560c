//! How often somebody may begin to be a peer: each costs a handshake.
//!
//! Guarantees that one address gets no more than its share, whatever others do, and that what is remembered is bounded. Pure.

use std::collections::HashMap;
use std::net::IpAddr;

/// Connections at once that nobody is turned away for: more than the peers behind one address begin after a reload.
const BURST: u64 = 100;
/// And then one in so many milliseconds.
const EACH_MS: u64 = 100;
/// Addresses that are remembered. With more of them, all others share what one has.
const ADDRESSES_MAX: usize = 1_000;

/// See the module.
#[derive(Default)]
pub struct Strangers {
    /// When each has all of its share again.
    full_at_ms: HashMap<IpAddr, u64>,
    /// When those who have were last forgotten.
    swept_at_ms: u64,
}

impl Strangers {
    /// Whether one more connection from there may be begun.
    pub fn may_begin(&mut self, from: IpAddr, now_ms: u64) -> bool {
        let mut from = network(from);
        if self.full_at_ms.len() >= ADDRESSES_MAX && !self.full_at_ms.contains_key(&from) {
            if self.swept_at_ms + EACH_MS <= now_ms {
                self.swept_at_ms = now_ms;
                self.full_at_ms.retain(|_, full_at_ms| *full_at_ms > now_ms);
            }
            if self.full_at_ms.len() >= ADDRESSES_MAX {
                from = IpAddr::from([0; 4]);
            }
        }
        let full_at_ms = self.full_at_ms.entry(from).or_default();
        let next_ms = (*full_at_ms).max(now_ms) + EACH_MS;
        let may = next_ms <= now_ms + BURST * EACH_MS;
        if may {
            *full_at_ms = next_ms;
        }
        may
    }
}

/// Who has one address of IPv6 has the 2^64 beside it.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::from((u128::from(address) >> 64 << 64).to_be_bytes()),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun(strangers: &mut Strangers, from: &str, count: usize, now_ms: u64) -> usize {
        (0..count).filter(|_| strangers.may_begin(from.parse().unwrap(), now_ms)).count()
    }

    #[test]
    fn a_flood_from_one_address_is_slowed_down_and_no_other() {
        let mut strangers = Strangers::default();
        assert_eq!(begun(&mut strangers, "192.0.2.1", 1_000, 5), 100);
        assert_eq!(begun(&mut strangers, "192.0.2.1", 1_000, 1_005), 10);
        assert_eq!(begun(&mut strangers, "192.0.2.2", 50, 1_005), 50);
        assert_eq!(begun(&mut strangers, "::ffff:192.0.2.1", 1_000, 1_005), 0, "it is the same");
        assert_eq!(begun(&mut strangers, "192.0.2.1", 1_000, 60_000), 100);
    }

    #[test]
    fn neighbours_in_ipv6_are_one() {
        let mut strangers = Strangers::default();
        assert_eq!(begun(&mut strangers, "2001:db8::1", 1_000, 0), 100);
        assert_eq!(begun(&mut strangers, "2001:db8::2:3", 1, 0), 0);
        assert_eq!(begun(&mut strangers, "2001:db8:0:1::1", 1, 0), 1);
    }

    #[test]
    fn many_addresses_share_what_one_has_and_are_forgotten() {
        let mut strangers = Strangers::default();
        let begun = |strangers: &mut Strangers, now_ms| {
            (0..5_000u32).filter(|n| strangers.may_begin(IpAddr::from((n + (1 << 30)).to_be_bytes()), now_ms)).count()
        };
        assert_eq!(begun(&mut strangers, 100), ADDRESSES_MAX + BURST as usize);
        assert!(strangers.full_at_ms.len() <= ADDRESSES_MAX + 1);
        assert!(strangers.may_begin(IpAddr::from([192, 0, 2, 1]), 200 + BURST * EACH_MS), "the others are forgotten");
        assert_eq!(strangers.full_at_ms.len(), 1);
    }
}
