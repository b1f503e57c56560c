//! Mails that go away.

use crate::cluster::imap::Imap;
use crate::cluster::wait_until;
use crate::scene::{mail, stories, Scene, SOON};

/// Four mails in INBOX that the peer has too; INBOX selected.
fn given_four_settled_mails(t: &Scene) -> Imap {
    for subject in ["one", "two", "three", "four"] {
        t.here().deliver(&t.user, &mail(subject));
    }
    t.settled();
    t.here().imap(&t.user).select("INBOX")
}

fn uids(t: &Scene) -> Vec<u32> {
    t.settled().mailboxes["INBOX"].messages.keys().copied().collect()
}

stories! {
    fn expunge_removes_what_is_marked_deleted(t) {
        let mut imap = given_four_settled_mails(t);
        imap.ok("STORE 1,3 +FLAGS (\\Deleted)");
        imap.ok("EXPUNGE");
        assert_eq!(uids(t), [2, 4]);
    }

    fn uid_expunge_removes_only_what_it_names(t) {
        let mut imap = given_four_settled_mails(t);
        imap.ok("STORE 1:3 +FLAGS.SILENT (\\Deleted)");
        imap.ok("UID EXPUNGE 2:3");
        assert_eq!(uids(t), [1, 4]);
    }

    fn close_expunges(t) {
        let mut imap = given_four_settled_mails(t);
        imap.ok("STORE 4 +FLAGS (\\Deleted)");
        imap.ok("CLOSE");
        assert_eq!(uids(t), [1, 2, 3]);
    }

    fn unselect_does_not_expunge(t) {
        let mut imap = given_four_settled_mails(t);
        imap.ok("STORE 4 +FLAGS (\\Deleted)");
        imap.ok("UNSELECT");
        assert_eq!(uids(t), [1, 2, 3, 4]);
    }

    fn pop3_dele_expunges_at_quit(t) {
        drop(given_four_settled_mails(t));
        let mut pop3 = t.here().pop3(&t.user);
        pop3.command_lines("RETR 1");
        pop3.command("DELE 1");
        pop3.command("DELE 3");
        pop3.command("QUIT");
        assert_eq!(uids(t), [2, 4]);
    }

    fn doveadm_expunges(t) {
        drop(given_four_settled_mails(t));
        t.here().doveadm(&["expunge", "-u", &t.user, "mailbox", "INBOX", "uid", "2"]);
        assert_eq!(uids(t), [1, 3, 4]);
    }

    fn autoexpunge_removes_the_oldest_at_logout(t) {
        t.here().deliver(&t.user, &mail("stays"));
        let mut imap = t.here().imap(&t.user);
        imap.ok("CREATE Short");
        for subject in ["one", "two", "three", "four"] {
            imap.append("Short", &mail(subject));
        }
        imap.ok("LOGOUT");
        wait_until(SOON, "autoexpunge leaves two mails", || {
            t.here().doveadm(&["search", "-u", &t.user, "mailbox", "Short", "all"]).lines().count() == 2
        });
        assert_eq!(t.settled().messages("Short").len(), 2);
    }

    fn the_peer_expunges_a_mail_that_came_from_here(t) {
        drop(given_four_settled_mails(t));
        let mut imap = t.there().imap(&t.user).select("INBOX");
        imap.ok("STORE 2 +FLAGS (\\Deleted)");
        imap.ok("EXPUNGE");
        assert_eq!(uids(t), [1, 3, 4]);
    }

    fn an_expunged_uid_is_not_used_again(t) {
        let mut imap = given_four_settled_mails(t);
        imap.ok("STORE 4 +FLAGS (\\Deleted)");
        imap.ok("EXPUNGE");
        t.settled();
        t.there().deliver(&t.user, &mail("five"));
        assert_eq!(uids(t), [1, 2, 3, 5]);
    }

    fn a_mail_gone_before_the_peer_had_it_leaves_no_trace_but_its_uid(t) {
        let mut imap = t.here().imap(&t.user).select("INBOX");
        for _ in 0..5 {
            imap.append("INBOX", &mail("short-lived"));
            imap.ok("STORE 1 +FLAGS.SILENT (\\Deleted)");
            imap.ok("EXPUNGE");
        }
        imap.append("INBOX", &mail("stays"));
        assert_eq!(uids(t), [6]);
    }
}
