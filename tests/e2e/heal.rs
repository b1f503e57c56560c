//! What nobody told the relay of is found in the mailboxes: changes without the plugin, files put beside Dovecot's back,
//! records that were lost with their process.

use std::fs;
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use crate::cluster::server::signal;
use crate::cluster::{wait_until, Cluster, Format, Server, Snapshot, CONVERGE_DEADLINE};
use crate::scene::{mail, Scene, SOON};

fn pair(format: Format, user: &str) -> Scene {
    let t = Scene::on(Cluster::pair(format, format), user);
    t.expects_in_log("killed with signal 9");
    t
}

fn untold(server: &Server, args: &[&str]) {
    server.untold(args, b"");
}

fn untold_mail(server: &Server, user: &str, mailbox: &str, subject: &str) {
    server.untold(&["save", "-u", user, "-m", mailbox], &mail(subject));
}

/// Kills the relay; the next one looks at all users.
fn restart_relay(server: &Server) {
    let old = server.pids("dovetail");
    old.iter().for_each(|pid| signal(*pid, "KILL"));
    wait_until(SOON, "the relay runs again", || server.pids("dovetail").iter().any(|pid| !old.contains(pid)));
    wait_until(SOON, "the relay has looked at all users", || server.has_looked());
}

fn in_all_formats(name: &str, story: fn(&Scene)) {
    for format in [Format::Sdbox, Format::Mdbox, Format::Maildir] {
        let t = pair(format, &format!("story-{name}-{format:?}").to_lowercase());
        t.a().deliver(&t.user, &mail("first"));
        t.a().deliver(&t.user, &mail("second"));
        t.settled();
        story(&t);
    }
}

#[test]
fn what_was_done_without_the_plugin_is_found_by_the_hole_it_leaves() {
    in_all_formats("untold", |t| {
        untold_mail(t.a(), &t.user, "INBOX", "untold");
        untold(t.a(), &["flags", "add", "-u", &t.user, "\\Flagged $Label", "mailbox", "INBOX", "uid", "1"]);
        untold(t.a(), &["expunge", "-u", &t.user, "mailbox", "INBOX", "uid", "2"]);
        t.a().deliver(&t.user, &mail("told"));
        let snapshot = t.settled();
        assert_eq!(snapshot.messages("INBOX").len(), 3);
        assert!(t.a().counters().healed > 0, "nothing was healed: {:?}", t.a().counters());
    });
}

#[test]
fn what_was_done_without_the_plugin_is_found_at_the_relays_start() {
    in_all_formats("sweep", |t| {
        untold_mail(t.a(), &t.user, "INBOX", "untold");
        untold(t.a(), &["flags", "add", "-u", &t.user, "\\Seen", "mailbox", "INBOX", "uid", "1"]);
        restart_relay(t.a());
        assert_eq!(t.settled().messages("INBOX").len(), 3);
    });
}

#[test]
fn what_came_into_a_new_mailbox_before_anybody_told_of_it_is_found() {
    in_all_formats("untold-first", |t| {
        untold(t.a(), &["mailbox", "create", "-u", &t.user, "Fresh"]);
        untold_mail(t.a(), &t.user, "Fresh", "untold");
        t.a().imap(&t.user).append("Fresh", &mail("told"));
        let snapshot = t.settled();
        assert_eq!(snapshot.messages("Fresh").len(), 2);
    });
}

#[test]
fn a_move_that_nobody_told_of_loses_no_mail() {
    in_all_formats("move", |t| {
        t.a().imap(&t.user).ok("CREATE Archive");
        t.settled();
        untold(t.a(), &["move", "-u", &t.user, "Archive", "mailbox", "INBOX", "uid", "1"]);
        restart_relay(t.a());
        let snapshot = t.settled();
        assert_eq!((snapshot.messages("INBOX").len(), snapshot.messages("Archive").len()), (1, 1));
    });
}

#[test]
fn mailboxes_that_came_went_and_were_renamed_without_the_plugin() {
    in_all_formats("list", |t| {
        let mut imap = t.a().imap(&t.user);
        for mailbox in ["Old", "Old/Child", "Gone"] {
            imap.ok(&format!("CREATE {mailbox}"));
            imap.append(mailbox, &mail(mailbox));
        }
        drop(imap);
        t.settled();
        untold(t.a(), &["mailbox", "rename", "-u", &t.user, "Old", "New"]);
        untold(t.a(), &["mailbox", "delete", "-u", &t.user, "Gone"]);
        untold(t.a(), &["mailbox", "create", "-u", &t.user, "-s", "Fresh"]);
        untold_mail(t.a(), &t.user, "Fresh", "fresh");
        restart_relay(t.a());
        let snapshot = t.settled();
        for mailbox in ["New", "New/Child", "Fresh"] {
            assert_eq!(snapshot.messages(mailbox).len(), 1, "{mailbox}");
        }
        assert_eq!(snapshot.messages("Gone").len(), 0);
    });
}

#[test]
fn subscriptions_that_nobody_told_of_are_found_whether_there_is_a_mailbox_or_not() {
    in_all_formats("subscriptions", |t| {
        let mut imap = t.a().imap(&t.user);
        for mailbox in ["Was", "Comes", "Goes", "Gone"] {
            imap.ok(&format!("CREATE {mailbox}"));
        }
        imap.ok("SUBSCRIBE Goes");
        imap.ok("SUBSCRIBE Gone");
        imap.ok("DELETE Gone");
        drop(imap);
        t.settled();
        let change = |verb, mailbox| untold(t.a(), &["mailbox", verb, "-u", &t.user, mailbox]);
        change("subscribe", "Was");
        change("subscribe", "Comes");
        change("unsubscribe", "Goes");
        change("unsubscribe", "Gone");
        untold(t.a(), &["mailbox", "rename", "-u", &t.user, "Was", "Is"]);
        restart_relay(t.a());
        t.settled();
        let answer = t.b().imap(&t.user).ok("LSUB \"\" *");
        let has = |mailbox: &str| answer.lines().iter().any(|line| line.ends_with(&format!(" {mailbox}")));
        let found = ["Was", "Comes", "Goes", "Gone"].map(|mailbox| (mailbox, has(mailbox)));
        assert_eq!(found, [("Was", true), ("Comes", true), ("Goes", false), ("Gone", false)], "{:?}", answer.lines());
    });
}

#[test]
fn a_resync_changes_nothing_on_the_peer() {
    in_all_formats("resync", |t| {
        t.a().doveadm(&["force-resync", "-u", &t.user, "INBOX"]);
        t.a().deliver(&t.user, &mail("after"));
        assert_eq!(t.settled().messages("INBOX").len(), 3);
    });
}

/// Dovecot makes it anew from the mails' files, for a dbox with another GUID. (What stands in the index alone is lost there.)
#[test]
fn an_index_that_was_deleted_is_made_anew() {
    in_all_formats("index", |t| {
        t.expects_in_log("dovecot.index");
        t.expects_in_log("its index was made anew");
        let folder = match t.a().format() {
            Format::Sdbox => "sdbox/mailboxes/INBOX/dbox-Mails",
            Format::Mdbox => "mdbox/mailboxes/INBOX/dbox-Mails",
            Format::Maildir => "Maildir",
        };
        let folder = t.a().outside(&format!("/home/{}/{folder}", t.user));
        // An index is known by the second in which it was made (mail_transaction_log_header.indexid).
        let log = fs::read(folder.join("dovecot.index.log")).expect("its log");
        let made_at = u32::from_le_bytes(log[4..8].try_into().expect("four bytes"));
        let is_later = || UNIX_EPOCH.elapsed().is_ok_and(|now| now.as_secs() > u64::from(made_at));
        wait_until(SOON, "another index has another number", is_later);
        for entry in fs::read_dir(&folder).expect("its folder").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("dovecot.index") {
                fs::remove_file(entry.path()).expect("remove");
            }
        }
        t.a().doveadm(&["force-resync", "-u", &t.user, "INBOX"]);
        t.a().deliver(&t.user, &mail("after"));
        // Their save dates were in the index's cache.
        wait_until(CONVERGE_DEADLINE, "both are the same", || {
            let take = |server| Snapshot::try_take(server, &t.user, false);
            match (take(t.a()), take(t.b())) {
                (Ok(a), Ok(b)) => a.difference(&b).is_empty() && a.messages("INBOX").len() == 3,
                _ => false,
            }
        });
    });
}

fn maildir(server: &Server, user: &str, folder: &str) -> PathBuf {
    server.outside(&format!("/home/{user}/Maildir/{folder}"))
}

fn drop_file(server: &Server, user: &str, name: &str) {
    let path = maildir(server, user, "new").join(name);
    // With the line ends that Dovecot itself gives to files.
    let text = String::from_utf8_lossy(&mail(name)).replace("\r\n", "\n");
    fs::write(&path, text).expect("a file in the maildir");
    chown(&path, Some(8), Some(8)).expect("chown");
}

#[test]
fn a_file_dropped_into_a_maildir_is_a_mail_on_the_peer() {
    let t = pair(Format::Maildir, "story-dropped");
    t.a().deliver(&t.user, &mail("first"));
    t.settled();
    drop_file(t.a(), &t.user, "1700000000.M1P1.dropped");
    // Seen at the next opening.
    t.a().imap(&t.user).select("INBOX");
    assert_eq!(t.settled().messages("INBOX").len(), 2);

    // And by the relay's start, without anybody's opening.
    drop_file(t.a(), &t.user, "1700000000.M2P1.dropped");
    restart_relay(t.a());
    assert_eq!(t.settled().messages("INBOX").len(), 3);
}

#[test]
fn a_file_removed_from_a_maildir_is_gone_on_the_peer() {
    let t = pair(Format::Maildir, "story-removed");
    (1..=3).for_each(|n| t.a().deliver(&t.user, &mail(&format!("mail {n}"))));
    t.settled();
    t.a().imap(&t.user).select("INBOX");
    let cur = maildir(t.a(), &t.user, "cur");
    let files: Vec<PathBuf> = fs::read_dir(cur).expect("cur").map(|entry| entry.expect("a file").path()).collect();
    fs::remove_file(&files[0]).expect("remove");
    t.a().imap(&t.user).select("INBOX");
    assert_eq!(t.settled().messages("INBOX").len(), 2);
}

#[test]
fn what_a_killed_process_had_not_sent_is_found_when_the_relay_is_back() {
    let t = pair(Format::Sdbox, "story-killed-sender");
    t.expects_in_log("dovetail");
    t.a().deliver(&t.user, &mail("first"));
    t.settled();
    let relay = t.a().pids("dovetail")[0];
    signal(relay, "STOP");
    // More than the relay's socket takes.
    let body = crate::scene::mail_of_size(20_000);
    let mut imap = t.a().imap(&t.user);
    (0..60).for_each(|_| drop(imap.append("INBOX", &body)));
    let before = t.a().pids("imap");
    before.iter().for_each(|pid| signal(*pid, "KILL"));
    signal(relay, "KILL");
    wait_until(SOON, "the relay runs again", || t.a().pids("dovetail").iter().any(|pid| *pid != relay));
    assert_eq!(t.settled().messages("INBOX").len(), 61);
}

/// Dovecot 2.4 loads the plugin into the worker as well, where it once took the worker's spans.
#[test]
fn what_a_worker_writes_is_told_and_leaves_no_hole() {
    let t = pair(Format::Sdbox, "story-workers-spans");
    t.a().deliver(&t.user, &mail("first"));
    t.a().deliver(&t.user, &mail("second"));
    wait_until(SOON, "B's relay knows what its worker wrote", || t.b().counters().spans >= 3);
    t.settled();
    t.b().imap(&t.user).select("INBOX").ok("STORE 1 +FLAGS (\\Seen)");
    t.settled();
    assert_eq!(t.b().counters().gaps, 0);
}
