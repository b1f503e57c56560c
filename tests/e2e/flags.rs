//! Flags and keywords.

use crate::cluster::imap::{Appended, Imap};
use crate::scene::{mail, stories, Scene};

/// Three mails in INBOX that the peer has too: plain, with flags, with keywords. INBOX is selected.
fn given_three_settled_mails(t: &Scene) -> Imap {
    let mut imap = t.here().imap(&t.user);
    let (one, two, three) = (mail("one"), mail("two"), mail("three"));
    imap.append_all(
        "INBOX",
        &[
            Appended { flags: "", date: "", mail: &one },
            Appended { flags: "\\Seen \\Flagged", date: "", mail: &two },
            Appended { flags: "$Work holiday", date: "", mail: &three },
        ],
    );
    t.settled();
    imap.select("INBOX")
}

fn flags(t: &Scene) -> Vec<String> {
    t.settled().messages("INBOX").iter().map(|m| m.flags.join(" ")).collect()
}

stories! {
    fn store_adds_flags(t) {
        given_three_settled_mails(t).ok("STORE 1:2 +FLAGS (\\Answered \\Draft)");
        assert_eq!(flags(t), ["\\Answered \\Draft", "\\Answered \\Draft \\Flagged \\Seen", "$Work holiday"]);
    }

    fn store_removes_flags(t) {
        given_three_settled_mails(t).ok("STORE 1:3 -FLAGS (\\Seen)");
        assert_eq!(flags(t), ["", "\\Flagged", "$Work holiday"]);
    }

    fn store_replaces_flags_and_keywords(t) {
        given_three_settled_mails(t).ok("STORE 1:3 FLAGS (\\Deleted urgent)");
        assert_eq!(flags(t), ["\\Deleted urgent", "\\Deleted urgent", "\\Deleted urgent"]);
    }

    fn store_adds_keywords(t) {
        given_three_settled_mails(t).ok("STORE 2:3 +FLAGS (urgent $Work)");
        assert_eq!(flags(t), ["", "$Work \\Flagged \\Seen urgent", "$Work holiday urgent"]);
    }

    fn store_removes_keywords(t) {
        given_three_settled_mails(t).ok("STORE 1:3 -FLAGS (holiday)");
        assert_eq!(flags(t), ["", "\\Flagged \\Seen", "$Work"]);
    }

    fn store_silent_and_uid_store(t) {
        let mut imap = given_three_settled_mails(t);
        imap.ok("STORE 1 +FLAGS.SILENT (\\Flagged)");
        imap.ok("UID STORE 2 -FLAGS.SILENT (\\Flagged)");
        imap.ok("UID STORE 3 FLAGS.SILENT ()");
        assert_eq!(flags(t), ["\\Flagged", "\\Seen", ""]);
    }

    fn a_flag_set_and_removed_at_once_stays_removed(t) {
        let mut imap = given_three_settled_mails(t);
        for _ in 0..10 {
            imap.ok("STORE 1 +FLAGS (\\Flagged)");
            imap.ok("STORE 1 -FLAGS (\\Flagged)");
        }
        imap.ok("STORE 1 +FLAGS (done)");
        assert_eq!(flags(t)[0], "done");
    }

    fn reading_a_mail_marks_it_seen(t) {
        given_three_settled_mails(t).ok("FETCH 1 BODY[]");
        assert_eq!(flags(t)[0], "\\Seen");
    }

    fn the_peer_flags_a_mail_that_came_from_here(t) {
        given_three_settled_mails(t);
        t.there().imap(&t.user).select("INBOX").ok("STORE 1 +FLAGS (\\Seen replied)");
        assert_eq!(flags(t)[0], "\\Seen replied");
    }

    fn flags_of_a_mail_that_has_just_come_in(t) {
        t.here().deliver(&t.user, &mail("new"));
        t.here().imap(&t.user).select("INBOX").ok("STORE 1 +FLAGS (\\Seen new)");
        assert_eq!(flags(t), ["\\Seen new"]);
    }

    fn doveadm_changes_flags(t) {
        given_three_settled_mails(t);
        t.here().doveadm(&["flags", "add", "-u", &t.user, "\\Answered byadmin", "mailbox", "INBOX", "uid", "1"]);
        t.here().doveadm(&["flags", "remove", "-u", &t.user, "\\Seen", "mailbox", "INBOX", "all"]);
        assert_eq!(flags(t)[..2], ["\\Answered byadmin", "\\Flagged"]);
    }
}
