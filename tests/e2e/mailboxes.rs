//! Mailboxes and subscriptions.

use crate::cluster::imap::Imap;
use crate::scene::{mail, stories, Scene};

/// A user with a mail in INBOX, logged in.
fn given_a_user(t: &Scene) -> Imap {
    t.here().deliver(&t.user, &mail("welcome"));
    t.here().imap(&t.user)
}

stories! {
    fn create_makes_a_mailbox(t) {
        given_a_user(t).ok("CREATE Work");
        assert!(t.settled().mailboxes.contains_key("Work"));
    }

    fn create_makes_a_child_and_its_parents(t) {
        given_a_user(t).ok("CREATE Work/2024/June");
        assert!(t.settled().mailboxes.contains_key("Work/2024/June"));
    }

    fn create_takes_names_that_are_not_ascii(t) {
        // "Entwürfe" in modified UTF-7.
        let mut imap = given_a_user(t);
        imap.ok("CREATE \"Entw&APw-rfe\"");
        imap.ok("CREATE \"two words & more\"".replace(" & ", " &- ").as_str());
        imap.append("\"Entw&APw-rfe\"", &mail("draft"));
        let snapshot = t.settled();
        assert_eq!(snapshot.messages("Entwürfe").len(), 1, "{:?}", snapshot.names);
    }

    fn delete_removes_a_mailbox_with_its_mails(t) {
        let mut imap = given_a_user(t);
        imap.ok("CREATE Old");
        imap.append("Old", &mail("old"));
        t.settled();
        imap.ok("DELETE Old");
        assert!(!t.settled().names.contains(&"Old".to_owned()));
    }

    fn a_mailbox_deleted_and_made_again_is_a_new_one(t) {
        let mut imap = given_a_user(t);
        imap.ok("CREATE Again");
        imap.append("Again", &mail("first life"));
        let first = t.settled().mailboxes["Again"].guid.clone();
        imap.ok("DELETE Again");
        imap.ok("CREATE Again");
        imap.append("Again", &mail("second life"));
        let snapshot = t.settled();
        assert_ne!(snapshot.mailboxes["Again"].guid, first);
        assert_eq!(snapshot.messages("Again").len(), 1);
    }

    fn rename_takes_mails_along(t) {
        let mut imap = given_a_user(t);
        imap.ok("CREATE Before");
        imap.append("Before", &mail("kept"));
        let guid = t.settled().mailboxes["Before"].guid.clone();
        imap.ok("RENAME Before After");
        let snapshot = t.settled();
        assert_eq!(snapshot.messages("After").len(), 1);
        assert_eq!(snapshot.mailboxes["After"].guid, guid);
        assert!(!snapshot.names.contains(&"Before".to_owned()));
    }

    fn rename_takes_children_along(t) {
        let mut imap = given_a_user(t);
        imap.ok("CREATE Family");
        imap.ok("CREATE Family/Child");
        imap.ok("CREATE Family/Child/Grandchild");
        imap.append("Family/Child", &mail("child"));
        imap.append("Family/Child/Grandchild", &mail("grandchild"));
        t.settled();
        imap.ok("RENAME Family Clan");
        imap.append("Clan/Child", &mail("after"));
        let snapshot = t.settled();
        assert_eq!(snapshot.messages("Clan/Child").len(), 2);
        assert_eq!(snapshot.messages("Clan/Child/Grandchild").len(), 1);
    }

    fn rename_moves_a_mailbox_below_another(t) {
        let mut imap = given_a_user(t);
        imap.ok("CREATE Archive");
        imap.ok("CREATE Loose");
        imap.append("Loose", &mail("kept"));
        imap.ok("RENAME Loose Archive/Loose");
        assert_eq!(t.settled().messages("Archive/Loose").len(), 1);
    }

    fn of_subscriptions_that_two_sessions_change_at_once_the_last_one_holds(t) {
        t.here().deliver(&t.user, &mail("one"));
        let mut imap = t.here().imap(&t.user);
        for n in 0..4 {
            imap.ok(&format!("CREATE Box{n}"));
        }
        t.settled();
        std::thread::scope(|scope| {
            for verb in ["SUBSCRIBE", "UNSUBSCRIBE"] {
                scope.spawn(move || {
                    let mut imap = t.here().imap(&t.user);
                    for n in 0..40 {
                        imap.ok(&format!("{verb} Box{}", n % 4));
                    }
                });
            }
        });
        t.settled();
    }

    fn subscribe_and_unsubscribe(t) {
        let mut imap = given_a_user(t);
        imap.ok("CREATE News");
        imap.ok("CREATE Lists");
        imap.ok("SUBSCRIBE News");
        imap.ok("SUBSCRIBE Lists");
        assert_eq!(t.settled().subscriptions, ["Lists", "News"]);
        imap.ok("UNSUBSCRIBE News");
        assert_eq!(t.settled().subscriptions, ["Lists"]);
    }

    fn the_peer_renames_and_deletes_mailboxes_made_here(t) {
        let mut imap = given_a_user(t);
        imap.ok("CREATE One");
        imap.ok("CREATE Two");
        imap.append("One", &mail("one"));
        t.settled();
        let mut imap = t.there().imap(&t.user);
        imap.ok("DELETE Two");
        imap.ok("RENAME One Uno");
        imap.ok("SUBSCRIBE Uno");
        let snapshot = t.settled();
        assert_eq!(snapshot.messages("Uno").len(), 1);
        assert_eq!(snapshot.subscriptions, ["Uno"]);
        assert!(!snapshot.names.contains(&"Two".to_owned()));
    }

    fn a_worker_meets_mailboxes_that_are_just_renamed_and_deleted(t) {
        // Of a mailbox that is deleted and made again while a session has the old one's index.
        t.expects_in_log("duplicate transaction log sequence");
        t.expects_in_log("indexid changed");
        let mut imap = given_a_user(t);
        imap.ok("CREATE Moving");
        imap.append("Moving", &mail("moved"));
        t.settled();
        std::thread::scope(|scope| {
            // For each of these, a worker there goes through all mailboxes.
            scope.spawn(move || {
                for n in 0..20 {
                    imap.ok(&format!("CREATE Made{n}"));
                }
            });
            let mut imap = t.there().imap(&t.user);
            for _ in 0..15 {
                imap.ok("RENAME Moving Moved");
                imap.ok("CREATE Short");
                imap.ok("DELETE Short");
                imap.ok("RENAME Moved Moving");
            }
        });
        let snapshot = t.settled();
        assert_eq!(snapshot.messages("Moving").len(), 1);
        assert_eq!(snapshot.names.len(), 22, "{:?}", snapshot.names);
    }

    fn doveadm_makes_renames_subscribes_and_deletes(t) {
        drop(given_a_user(t));
        let doveadm = |args: &[&str]| t.here().doveadm(&[&["mailbox"], &args[..1], &["-u", &t.user], &args[1..]].concat());
        doveadm(&["create", "-s", "Admin"]);
        doveadm(&["create", "Doomed"]);
        t.settled();
        doveadm(&["rename", "Admin", "Kept"]);
        doveadm(&["delete", "Doomed"]);
        let snapshot = t.settled();
        assert!(snapshot.mailboxes.contains_key("Kept"), "{:?}", snapshot.names);
        assert!(!snapshot.names.contains(&"Doomed".to_owned()));
    }
}
