//! Mailboxes that servers made, named or took away before they had talked.
//!
//! One name is one mailbox: where two meet under it they become one, with all messages of both. Which GUID and UIDVALIDITY it
//! has is a maximum, so it does not matter in which order servers hear of what. Names are registers: the later naming holds.

/// A mailbox's.
pub type Guid = [u8; 16];
/// Not known.
pub const NO_GUID: Guid = [0; 16];

/// By what clients and servers know a mailbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub guid: Guid,
    /// 0: not known.
    pub uid_validity: u32,
    /// Messages were put into it, on any server, whether they are still there or not.
    pub had_mail: bool,
}

/// What becomes of two mailboxes that meet under one name. `born`: the GUID that a mailbox of this name is born with
/// everywhere (INBOX).
///
/// What had messages stays, so that nobody who reads mail has to begin anew for an empty mailbox. Otherwise the one with the higher
/// UIDVALIDITY, which may only rise for clients: who reads mail there sees no change. (If each were chosen by itself, both sides could see one.)
pub fn merge(ours: Identity, theirs: Identity, born: Option<Guid>) -> Identity {
    let of_guid =
        |one: &Identity| (one.guid != NO_GUID, Some(one.guid) == born, one.had_mail, one.uid_validity, one.guid);
    let of_uid_validity = |one: &Identity| (one.uid_validity != 0, one.had_mail, one.uid_validity);
    let higher_guid = if of_guid(&theirs) > of_guid(&ours) { theirs } else { ours };
    let higher_uid_validity = if of_uid_validity(&theirs) > of_uid_validity(&ours) { theirs } else { ours };
    Identity {
        guid: higher_guid.guid,
        uid_validity: higher_uid_validity.uid_validity,
        had_mail: ours.had_mail || theirs.had_mail,
    }
}

/// When a mailbox got its name, or a name its subscription, and on which server.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Named {
    /// Hybrid logical clock: who knew the last one is later.
    pub clock: u64,
    pub origin: String,
}

/// What becomes of a mailbox below one that a peer has renamed, and which moves along with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Along {
    /// It was named later: it goes back.
    Back,
    /// The peer knew it there: it has moved there as well.
    Moves,
    /// The peer did not know it there, and must be told.
    Tell,
}

/// `named`: when the mailbox was named last. `is_unheard`: that was here, and the peer had not heard of it.
pub fn along(named: &Named, is_unheard: bool, rename: &Named) -> Along {
    match named > rename {
        true => Along::Back,
        false if is_unheard => Along::Tell,
        false => Along::Moves,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn identity(guid: u8, uid_validity: u32, had_mail: bool) -> Identity {
        Identity { guid: [guid; 16], uid_validity, had_mail }
    }

    fn identities() -> impl Strategy<Value = Identity> {
        (1..5u8, 1..5u32, any::<bool>()).prop_map(|(guid, validity, had_mail)| identity(guid, validity, had_mail))
    }

    proptest! {
        #[test]
        fn it_does_not_matter_who_hears_of_what_when(
            a in identities(), b in identities(), c in identities(), born in proptest::option::of(0..4u8),
        ) {
            let born = born.map(|guid| [guid; 16]);
            let merge = |a, b| merge(a, b, born);
            prop_assert_eq!(merge(a, a), a);
            prop_assert_eq!(merge(a, b), merge(b, a));
            prop_assert_eq!(merge(merge(a, b), b), merge(a, b));
            prop_assert_eq!(merge(merge(a, b), c), merge(a, merge(b, c)));
        }
    }

    #[test]
    fn what_had_mail_stays_whatever_the_numbers() {
        let (mail, empty) = (identity(1, 10, true), identity(2, 20, false));
        assert_eq!(merge(mail, empty, None), mail);
        assert_eq!(merge(empty, mail, None), mail);
    }

    #[test]
    fn of_two_with_mail_the_one_with_the_higher_uidvalidity_stays() {
        let (ours, theirs) = (identity(1, 20, true), identity(2, 10, true));
        assert_eq!(merge(ours, theirs, None), ours);
        let same = identity(2, 20, true);
        assert_eq!(merge(ours, same, None), same, "or the higher GUID");
    }

    #[test]
    fn inbox_keeps_the_guid_it_is_born_with() {
        let (ours, theirs) = (identity(1, 10, false), identity(2, 20, true));
        assert_eq!(merge(ours, theirs, Some([1; 16])), identity(1, 20, true));
    }

    #[test]
    fn a_mailbox_moves_along_unless_it_was_named_later() {
        let named = |clock, origin: &str| Named { clock, origin: origin.into() };
        assert_eq!(along(&named(5, "b"), true, &named(4, "a")), Along::Back);
        assert_eq!(along(&named(4, "b"), true, &named(4, "a")), Along::Back);
        assert_eq!(along(&named(3, "b"), true, &named(4, "a")), Along::Tell);
        assert_eq!(along(&named(3, "b"), false, &named(4, "a")), Along::Moves);
    }
}
