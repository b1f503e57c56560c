//! What two servers remember of having talked, by which each notices that the other one, or itself, has gone back to an earlier
//! state: restored from a backup, or a copy of a machine that goes on by itself.
//!
//! Of two servers the one that connects makes a new [`Bond`] when a session begins, and now and then while something happens. It
//! counts once it is on the disk of the other one. So who is shown one that is older than his own talks to an earlier state,
//! whatever a power failure took. A server that knows that it was lost or set back begins a new epoch, without bonds.
//!
//! Pure.
#![forbid(unsafe_code)]

use crate::wire::proto::{Bond, Bonds};

/// Of a bond's nonce.
pub const NONCE_BYTES_MAX: usize = 32;

/// What one of two servers says when a session begins.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// Its own.
    pub epoch: u64,
    /// The other's, as it knows it; 0: it knows none.
    pub knows: u64,
    /// None: its version knows nothing of them.
    pub bonds: Option<&'a Bonds>,
}

/// What comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on where it was, or one of them begins anew and knows it.
    Follows,
    TheyAreSetBack,
    WeAreSetBack,
}

/// The other one comes to the mirrored verdict.
pub fn compare(ours: &Side, theirs: &Side) -> Verdict {
    if theirs.knows > ours.epoch {
        return Verdict::WeAreSetBack;
    }
    if ours.knows > theirs.epoch {
        return Verdict::TheyAreSetBack;
    }
    let (Some(our), Some(their)) = (ours.bonds, theirs.bonds) else { return Verdict::Follows };
    match (newest(our), newest(their)) {
        (None, None) => Verdict::Follows,
        // Who has none is new to the other one, or was not yet there when the copy was made.
        (None, Some(_)) if their.agreed.is_some() && theirs.knows == ours.epoch => Verdict::WeAreSetBack,
        (Some(_), None) if our.agreed.is_some() && ours.knows == theirs.epoch => Verdict::TheyAreSetBack,
        (None, _) | (_, None) => Verdict::Follows,
        _ if all(our).any(|one| all(their).any(|other| one == other)) => Verdict::Follows,
        (our, their) if our < their => Verdict::WeAreSetBack,
        _ => Verdict::TheyAreSetBack,
    }
}

/// The next one that is offered.
pub fn next(bonds: &Bonds, now_us: u64, nonce: &[u8]) -> Bond {
    let after = bonds.agreed.as_ref().map_or(0, |bond| bond.at_us.saturating_add(1));
    Bond { at_us: now_us.max(after), nonce: nonce.to_vec() }
}

fn all(bonds: &Bonds) -> impl Iterator<Item = &Bond> {
    bonds.agreed.iter().chain(&bonds.offered)
}

fn newest(bonds: &Bonds) -> Option<(u64, &[u8])> {
    all(bonds).map(|bond| (bond.at_us, &bond.nonce[..])).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bond(at_us: u64) -> Option<Bond> {
        (at_us != 0).then(|| Bond { at_us, nonce: vec![at_us as u8; 16] })
    }

    fn bonds(agreed: u64, offered: u64) -> Bonds {
        Bonds { agreed: bond(agreed), offered: bond(offered) }
    }

    /// Ours, theirs, the epochs as they are known, and the other way round.
    fn verdict(our: &Bonds, their: &Bonds) -> Verdict {
        let ours = Side { epoch: 10, knows: 20, bonds: Some(our) };
        let theirs = Side { epoch: 20, knows: 10, bonds: Some(their) };
        let (one, other) = (compare(&ours, &theirs), compare(&theirs, &ours));
        let mirrored = match one {
            Verdict::Follows => Verdict::Follows,
            Verdict::TheyAreSetBack => Verdict::WeAreSetBack,
            Verdict::WeAreSetBack => Verdict::TheyAreSetBack,
        };
        assert_eq!(other, mirrored);
        one
    }

    #[test]
    fn what_was_cut_off_in_between_follows() {
        assert_eq!(verdict(&bonds(0, 0), &bonds(0, 0)), Verdict::Follows);
        assert_eq!(verdict(&bonds(0, 1), &bonds(0, 0)), Verdict::Follows, "it did not arrive");
        assert_eq!(verdict(&bonds(0, 1), &bonds(1, 0)), Verdict::Follows, "the answer did not");
        assert_eq!(verdict(&bonds(1, 2), &bonds(1, 0)), Verdict::Follows);
        assert_eq!(verdict(&bonds(1, 2), &bonds(2, 0)), Verdict::Follows);
        assert_eq!(verdict(&bonds(2, 0), &bonds(2, 0)), Verdict::Follows);
    }

    #[test]
    fn an_earlier_state_of_either_is_noticed_by_both() {
        assert_eq!(verdict(&bonds(9, 0), &bonds(5, 0)), Verdict::TheyAreSetBack);
        assert_eq!(verdict(&bonds(8, 9), &bonds(5, 0)), Verdict::TheyAreSetBack);
        assert_eq!(verdict(&bonds(5, 6), &bonds(9, 0)), Verdict::WeAreSetBack);
        assert_eq!(verdict(&bonds(5, 0), &bonds(0, 0)), Verdict::TheyAreSetBack, "of before they had ever talked");
    }

    #[test]
    fn who_begins_a_new_epoch_is_set_back_no_more() {
        let (nothing, something) = (bonds(0, 0), bonds(9, 0));
        let anew = Side { epoch: 11, knows: 20, bonds: Some(&nothing) };
        let other = Side { epoch: 20, knows: 10, bonds: Some(&something) };
        assert_eq!((compare(&anew, &other), compare(&other, &anew)), (Verdict::Follows, Verdict::Follows));
        // Also where it knows nothing of the other one.
        let lost = Side { epoch: 11, knows: 0, bonds: Some(&nothing) };
        assert_eq!((compare(&lost, &other), compare(&other, &lost)), (Verdict::Follows, Verdict::Follows));
    }

    #[test]
    fn a_state_of_before_the_present_epoch_is_an_earlier_one() {
        let (new, old) = (bonds(12, 0), bonds(99, 0));
        let other = Side { epoch: 20, knows: 11, bonds: Some(&new) };
        let clone = Side { epoch: 10, knows: 20, bonds: Some(&old) };
        assert_eq!(compare(&other, &clone), Verdict::TheyAreSetBack);
        assert_eq!(compare(&clone, &other), Verdict::WeAreSetBack);
    }

    #[test]
    fn a_version_without_bonds_follows_unless_its_epoch_does_not() {
        let something = bonds(9, 0);
        let ours = Side { epoch: 10, knows: 20, bonds: Some(&something) };
        assert_eq!(compare(&ours, &Side { epoch: 20, knows: 10, bonds: None }), Verdict::Follows);
        assert_eq!(compare(&ours, &Side { epoch: 19, knows: 10, bonds: None }), Verdict::TheyAreSetBack);
    }

    #[test]
    fn bonds_get_later_also_if_the_clock_does_not() {
        assert_eq!(next(&bonds(9, 0), 5, &[1]).at_us, 10);
        assert_eq!(next(&bonds(9, 0), 50, &[1]).at_us, 50);
    }
}
