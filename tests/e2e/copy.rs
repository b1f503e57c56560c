//! COPY and MOVE, inside a mailbox and between mailboxes.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::cluster::imap::{Appended, Imap};
use crate::cluster::server::signal;
use crate::cluster::{wait_until, Cluster, Format};
use crate::scene::{mail, stories, Scene, SOON};

/// Three mails in INBOX, the second with flags, and a mailbox `Archive`; INBOX selected.
fn given_three_mails(t: &Scene) -> Imap {
    let mut imap = t.here().imap(&t.user);
    imap.ok("CREATE Archive");
    let (one, two, three) = (mail("one"), mail("two"), mail("three"));
    let date = " 1-Jan-2020 12:00:00 +0000";
    imap.append_all(
        "INBOX",
        &[
            Appended { flags: "", date, mail: &one },
            Appended { flags: "\\Seen \\Flagged $Work", date, mail: &two },
            Appended { flags: "", date, mail: &three },
        ],
    );
    imap.select("INBOX")
}

stories! {
    fn copy_to_another_mailbox(t) {
        given_three_mails(t).ok("COPY 1:2 Archive");
        let snapshot = t.settled();
        assert_eq!((snapshot.messages("INBOX").len(), snapshot.messages("Archive").len()), (3, 2));
        assert_eq!(snapshot.messages("Archive")[1].flags, ["$Work", "\\Flagged", "\\Seen"]);
    }

    fn uid_copy_to_another_mailbox(t) {
        given_three_mails(t).ok("UID COPY 3 Archive");
        assert_eq!(t.settled().messages("Archive").len(), 1);
    }

    fn doveadm_copies_and_moves(t) {
        drop(given_three_mails(t));
        let of_inbox = |verb: &str, uid: &str| {
            t.here().doveadm(&[verb, "-u", &t.user, "Archive", "mailbox", "INBOX", "uid", uid]);
        };
        of_inbox("copy", "2");
        of_inbox("move", "1");
        let snapshot = t.settled();
        assert_eq!((snapshot.messages("INBOX").len(), snapshot.messages("Archive").len()), (2, 2));
    }

    fn copy_inside_a_mailbox(t) {
        given_three_mails(t).ok("COPY 2 INBOX");
        assert_eq!(t.settled().messages("INBOX").len(), 4);
    }

    fn copy_of_what_the_peer_has_had_for_a_while(t) {
        let mut imap = given_three_mails(t);
        t.settled();
        imap.ok("COPY 1:3 Archive");
        assert_eq!(t.settled().messages("Archive").len(), 3);
    }

    fn move_to_another_mailbox(t) {
        given_three_mails(t).ok("MOVE 1:2 Archive");
        let snapshot = t.settled();
        assert_eq!((snapshot.messages("INBOX").len(), snapshot.messages("Archive").len()), (1, 2));
    }

    fn uid_move_to_another_mailbox_after_a_while(t) {
        let mut imap = given_three_mails(t);
        t.settled();
        imap.ok("UID MOVE 2 Archive");
        let snapshot = t.settled();
        assert_eq!((snapshot.messages("INBOX").len(), snapshot.messages("Archive").len()), (2, 1));
    }

    fn move_inside_a_mailbox(t) {
        given_three_mails(t).ok("MOVE 1 INBOX");
        let uids: Vec<u32> = t.settled().mailboxes["INBOX"].messages.keys().copied().collect();
        assert_eq!(uids, [2, 3, 4]);
    }

    fn uid_copy_and_uid_move_inside_a_mailbox(t) {
        let mut imap = given_three_mails(t);
        imap.ok("UID COPY 2 INBOX");
        imap.ok("UID MOVE 1 INBOX");
        let snapshot = t.settled();
        let uids: Vec<u32> = snapshot.mailboxes["INBOX"].messages.keys().copied().collect();
        assert_eq!(uids, [2, 3, 4, 5]);
        assert_eq!(snapshot.messages("INBOX")[2].flags, ["$Work", "\\Flagged", "\\Seen"]);
    }

    fn move_there_and_back_again(t) {
        let mut imap = given_three_mails(t);
        imap.ok("MOVE 1:3 Archive");
        imap.select("Archive").ok("MOVE 1:3 INBOX");
        let uids: Vec<u32> = t.settled().mailboxes["INBOX"].messages.keys().copied().collect();
        assert_eq!(uids, [4, 5, 6]);
    }
}

/// When the peer copies it is another second.
fn a_copy_keeps_its_save_date(a: Format, b: Format) {
    let cluster = Cluster::pair(a, b).with_save_dates();
    let t = Scene::on(cluster, &format!("story-save-date-{a:?}-{b:?}").to_lowercase());
    let mut imap = given_three_mails(&t);
    t.settled();
    let second = || SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    let workers = t.b().pids("dovetail-worker");
    workers.iter().for_each(|pid| signal(*pid, "STOP"));
    imap.ok("COPY 1:2 Archive");
    imap.ok("MOVE 3 Archive");
    let copied = second();
    wait_until(SOON, "the next second but one", || second() > copied + 1);
    workers.iter().for_each(|pid| signal(*pid, "CONT"));
    assert_eq!(t.settled().messages("Archive").len(), 3);
}

#[test]
fn a_copy_keeps_its_save_date_sdbox() {
    a_copy_keeps_its_save_date(Format::Sdbox, Format::Sdbox);
}

#[test]
fn a_copy_keeps_its_save_date_mdbox() {
    a_copy_keeps_its_save_date(Format::Mdbox, Format::Mdbox);
}

#[test]
fn a_copy_keeps_its_save_date_maildir() {
    a_copy_keeps_its_save_date(Format::Maildir, Format::Maildir);
}

#[test]
fn a_copy_keeps_its_save_date_sdbox_to_maildir() {
    a_copy_keeps_its_save_date(Format::Sdbox, Format::Maildir);
}

#[test]
fn a_copy_keeps_its_save_date_maildir_to_mdbox() {
    a_copy_keeps_its_save_date(Format::Maildir, Format::Mdbox);
}
