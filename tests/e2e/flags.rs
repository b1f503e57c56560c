//! Flags and keywords.

use std::path::Path;

use crate::cluster::imap::{Appended, Imap};
use crate::cluster::{wait_until, Cluster, Format};
use crate::scene::{mail, stories, Scene, SOON};

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

/// Each server has a mail that came while the other one was away: both have had another UID.
fn given_mails_with_new_uids(format: Format, user: &str) -> Scene {
    let t = Scene::on(Cluster::pair(format, format), user);
    t.expects_in_log("dovetail");
    t.b().stop();
    t.a().deliver(&t.user, &mail("from a"));
    t.a().stop();
    t.b().start();
    t.b().deliver(&t.user, &mail("from b"));
    t.a().start();
    wait_until(SOON * 3, "both are connected", || t.servers().iter().all(|s| s.status()[0]["state"] == "connected"));
    let snapshot = t.settled();
    let uids: Vec<u32> = snapshot.mailboxes["INBOX"].messages.keys().copied().collect();
    assert!(uids.len() == 2 && !uids.contains(&1), "{uids:?}: UID 1 named two messages");
    t
}

fn remove_caches(folder: &Path) {
    for entry in std::fs::read_dir(folder).expect("readable").flatten() {
        if entry.file_type().expect("known").is_dir() {
            remove_caches(&entry.path());
        } else if entry.file_name() == "dovecot.index.cache" {
            std::fs::remove_file(entry.path()).expect("removable");
        }
    }
}

/// Where messages got other UIDs, a flag change names its mail by the GUID, which is looked up only when the client has its
/// answer: also if it has to be read from the mail's file, and if the mailbox is closed or the session over before that.
fn flags_follow_the_mail_to_its_other_uid(format: Format, user: &str) {
    let t = given_mails_with_new_uids(format, user);
    for (keyword, then) in [("alone", ""), ("closed", "\r\nnext CLOSE"), ("gone", "\r\nnext LOGOUT")] {
        remove_caches(&t.a().outside(&format!("/home/{user}")));
        t.a().imap(user).select("INBOX").ok(&format!("STORE 1 +FLAGS ({keyword}){then}"));
    }
    let has = |sequence: u32, keyword: &str| {
        t.b().imap(user).select("INBOX").ok(&format!("FETCH {sequence} (FLAGS)")).contains(keyword)
    };
    for keyword in ["alone", "closed", "gone"] {
        wait_until(SOON, keyword, || has(1, keyword));
        assert!(!has(2, keyword), "{keyword}: set on the other mail");
    }
}

#[test]
fn flags_follow_a_mail_of_sdbox_to_its_other_uid() {
    flags_follow_the_mail_to_its_other_uid(Format::Sdbox, "story-other-uid-sdbox");
}

#[test]
fn flags_follow_a_mail_of_mdbox_to_its_other_uid() {
    flags_follow_the_mail_to_its_other_uid(Format::Mdbox, "story-other-uid-mdbox");
}

#[test]
fn flags_follow_a_mail_of_maildir_to_its_other_uid() {
    flags_follow_the_mail_to_its_other_uid(Format::Maildir, "story-other-uid-maildir");
}
