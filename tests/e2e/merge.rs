//! Two servers that are written to at the same time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::cluster::imap::Imap;
use crate::cluster::pop3::Pop3;
use crate::cluster::server::signal;
use crate::cluster::{wait_until, Cluster, Format, Server, Setup, Snapshot};
use crate::scene::{mail, stories, Scene, SOON};

/// For what was lost with a killed process to be looked for and sent.
const KILLED_DEADLINE: Duration = Duration::from_secs(60);

/// Every mail is there once, on both servers, at UIDs that no other ever had.
fn assert_each_once(t: &Scene, snapshot: &Snapshot, count: usize) {
    assert_eq!(snapshot.messages("INBOX").len(), count);
    let guids: BTreeSet<_> = snapshot.messages("INBOX").iter().map(|message| message.guid.clone()).collect();
    assert_eq!(guids.len(), count, "{}: a mail is there twice", t.user);
}

fn deliver(server: &Server, user: &str, subjects: impl Iterator<Item = usize>) {
    let mut lmtp = server.lmtp();
    for n in subjects {
        lmtp.deliver(&[user], &mail(&format!("{} {n}", server.name())));
    }
}

stories! {
    fn mails_that_come_to_both_at_once_are_on_both_with_one_uid_each(t) {
        t.here().deliver(&t.user, &mail("first"));
        t.settled();
        std::thread::scope(|scope| {
            for server in [t.here(), t.there()] {
                scope.spawn(|| deliver(server, &t.user, 0..25));
            }
        });
        assert_each_once(t, &t.settled(), 51);
    }

    fn flags_that_both_flip_at_once_end_equal(t) {
        (0..3).for_each(|n| t.here().deliver(&t.user, &mail(&format!("mail {n}"))));
        t.settled();
        std::thread::scope(|scope| {
            for server in [t.here(), t.there()] {
                scope.spawn(|| {
                    let mut imap = server.imap(&t.user).select("INBOX");
                    for n in 0..60 {
                        let sign = ["+", "-"][n / 3 % 2];
                        imap.ok(&format!("STORE {} {sign}FLAGS.SILENT (\\Flagged $Important)", ["1", "2", "1:3"][n % 3]));
                    }
                });
            }
        });
        t.settled();
    }

    fn flags_and_expunges_follow_mails_that_are_given_other_uids(t) {
        // Dovecot's maildir, of \Recent alone, which it counts in each handle: of a message that came and went while it was open.
        t.expects_in_log("Recent flags state corrupted");
        t.here().deliver(&t.user, &mail("first"));
        t.settled();
        std::thread::scope(|scope| {
            scope.spawn(|| deliver(t.there(), &t.user, 0..20));
            scope.spawn(|| {
                for n in 0..10 {
                    t.here().deliver(&t.user, &mail(&format!("here {n}")));
                    let mut imap = t.here().imap(&t.user).select("INBOX");
                    // Whichever it is, it may move at any moment.
                    imap.ok("STORE * +FLAGS (\\Seen $Important)");
                    if n % 3 == 2 {
                        imap.ok("STORE * +FLAGS (\\Deleted)");
                        imap.ok("EXPUNGE");
                    }
                }
            });
        });
        assert_each_once(t, &t.settled(), 28);
    }
}

/// A pair whose relays are connected over lines.
fn pair_over_lines(format_a: Format, format_b: Format, user: &str) -> Scene {
    let setups = vec![Setup::new("a", format_a).over_a_line(), Setup::new("b", format_b).over_a_line()];
    Scene::on(Cluster::start(setups), user)
}

/// The same, cut from each other when both have one mail.
fn cut_pair(format_a: Format, format_b: Format, user: &str) -> Scene {
    let t = pair_over_lines(format_a, format_b, user);
    t.expects_in_log("dovetail");
    t.a().deliver(&t.user, &mail("before"));
    t.settled();
    t.lines.iter().for_each(|line| line.hang(true));
    t
}

fn both_accept_mail_while_they_are_cut(format_a: Format, format_b: Format, user: &str) {
    let t = cut_pair(format_a, format_b, user);
    for server in [t.a(), t.b()] {
        deliver(server, &t.user, 0..10);
        server.imap(&t.user).select("INBOX").ok("STORE 3 +FLAGS (\\Flagged)");
    }
    // Each says to the other what it has when the line is back.
    t.lines.iter().for_each(|line| line.hang(false));
    let snapshot = t.settled();
    assert_each_once(&t, &snapshot, 21);
    let flagged = snapshot.messages("INBOX").iter().filter(|m| m.flags.contains(&"\\Flagged".to_owned())).count();
    assert_eq!(flagged, 2);
    wait_until(SOON, "nothing is pending", || t.servers().iter().all(Server::has_nothing_pending));
    assert!(counts_conflicts(&t, "uid"));
}

/// Whether `doveadm dovetail status` of some server has conflicts of this kind.
fn counts_conflicts(t: &Scene, kind: &str) -> bool {
    let counts = t.servers().iter().map(|server| server.status()[0]["conflicts"].clone());
    let mut kinds = counts.flat_map(|counts| counts.split(',').map(str::to_owned).collect::<Vec<_>>());
    kinds.any(|counted| counted.starts_with(&format!("{kind}:")))
}

#[test]
fn both_accept_mail_while_they_are_cut_sdbox() {
    both_accept_mail_while_they_are_cut(Format::Sdbox, Format::Sdbox, "story-cut-sdbox");
}

#[test]
fn both_accept_mail_while_they_are_cut_mdbox() {
    both_accept_mail_while_they_are_cut(Format::Mdbox, Format::Mdbox, "story-cut-mdbox");
}

#[test]
fn both_accept_mail_while_they_are_cut_maildir() {
    both_accept_mail_while_they_are_cut(Format::Maildir, Format::Maildir, "story-cut-maildir");
}

fn of_one_flag_the_later_change_holds(format_a: Format, format_b: Format, user: &str) {
    let t = pair_over_lines(format_a, format_b, user);
    t.expects_in_log("dovetail");
    (0..4).for_each(|n| t.a().deliver(&t.user, &mail(&format!("mail {n}"))));
    t.a().imap(&t.user).select("INBOX").ok("STORE 1:4 FLAGS (\\Flagged $Important)");
    t.settled();
    t.lines.iter().for_each(|line| line.hang(true));
    let store = |server: &Server, what: &str| {
        server.imap(&t.user).select("INBOX").ok(&format!("STORE {what}"));
    };
    // One after the other, each time on the other server.
    store(t.a(), "1:2 -FLAGS (\\Flagged $Important)");
    store(t.b(), "1:3 -FLAGS (\\Flagged $Important)");
    store(t.b(), "1:2 +FLAGS (\\Flagged $Important)");
    store(t.b(), "4 +FLAGS (\\Answered)");
    store(t.a(), "2 +FLAGS (\\Seen $Work)");
    store(t.a(), "1 -FLAGS (\\Flagged $Important)");
    store(t.a(), "4 +FLAGS (\\Draft)");
    store(t.a(), "1 +FLAGS (\\Flagged)");
    t.lines.iter().for_each(|line| line.hang(false));
    let snapshot = t.settled();
    let flags: Vec<Vec<String>> = snapshot.messages("INBOX").iter().map(|message| message.flags.clone()).collect();
    assert_eq!(
        flags,
        [
            // Taking away what is not there any more is no change.
            vec!["$Important", "\\Flagged"],
            vec!["$Important", "$Work", "\\Flagged", "\\Seen"],
            vec![],
            vec!["$Important", "\\Answered", "\\Draft", "\\Flagged"],
        ]
    );
    wait_until(SOON, "nothing is pending", || t.servers().iter().all(Server::has_nothing_pending));
    assert!(counts_conflicts(&t, "flags"));
}

#[test]
fn of_one_flag_the_later_change_holds_sdbox() {
    of_one_flag_the_later_change_holds(Format::Sdbox, Format::Sdbox, "story-flag-sdbox");
}

#[test]
fn of_one_flag_the_later_change_holds_maildir_and_mdbox() {
    of_one_flag_the_later_change_holds(Format::Maildir, Format::Mdbox, "story-flag-maildir");
}

/// Which were saved while the servers were cut, and are named by their UIDs alone where there are many.
fn flags_of_different_mails_with_one_uid_all_hold(format_a: Format, format_b: Format, user: &str) {
    const MAILS: usize = 105;
    let t = cut_pair(format_a, format_b, user);
    for server in [t.a(), t.b()] {
        deliver(server, &t.user, 0..MAILS);
    }
    let store = |server: &Server, flag: &str| {
        server.imap(&t.user).select("INBOX").ok(&format!("STORE 1:* +FLAGS ({flag})"));
    };
    // Either is the earlier one once.
    store(t.b(), "\\Flagged");
    store(t.a(), "\\Flagged $Work");
    store(t.b(), "$Work");
    t.lines.iter().for_each(|line| line.hang(false));
    let snapshot = t.settled();
    assert_each_once(&t, &snapshot, 2 * MAILS + 1);
    let flags = snapshot.messages("INBOX").into_iter().map(|message| message.flags.join(" "));
    assert_eq!(flags.filter(|flags| flags != "$Work \\Flagged").collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn flags_of_different_mails_with_one_uid_all_hold_sdbox() {
    flags_of_different_mails_with_one_uid_all_hold(Format::Sdbox, Format::Sdbox, "story-one-uid-sdbox");
}

#[test]
fn flags_of_different_mails_with_one_uid_all_hold_mdbox_and_maildir() {
    flags_of_different_mails_with_one_uid_all_hold(Format::Mdbox, Format::Maildir, "story-one-uid-maildir");
}

/// By a client that does not wait for answers, to a mail that the peer never had: it has another one with that UID.
fn flags_of_a_mail_that_is_gone_are_not_set_on_another(format_a: Format, format_b: Format, user: &str) {
    let t = cut_pair(format_a, format_b, user);
    t.a().deliver(&t.user, &mail("ours"));
    t.b().untold(&["save", "-u", &t.user], &mail("theirs"));
    let mut imap = t.b().imap(&t.user).select("INBOX");
    imap.ok("STORE 2 +FLAGS (\\Deleted)\r\nx EXPUNGE");
    assert_eq!(imap.uids(), [1]);
    t.lines.iter().for_each(|line| line.hang(false));
    let snapshot = t.settled();
    assert_each_once(&t, &snapshot, 2);
    let flags = snapshot.messages("INBOX").into_iter().map(|message| message.flags.join(" "));
    assert_eq!(flags.collect::<Vec<_>>(), ["", ""]);
}

#[test]
fn flags_of_a_mail_that_is_gone_are_not_set_on_another_sdbox() {
    flags_of_a_mail_that_is_gone_are_not_set_on_another(Format::Sdbox, Format::Sdbox, "story-gone-sdbox");
}

#[test]
fn flags_of_a_mail_that_is_gone_are_not_set_on_another_mdbox_and_maildir() {
    flags_of_a_mail_that_is_gone_are_not_set_on_another(Format::Mdbox, Format::Maildir, "story-gone-maildir");
}

/// A change holds over those that its maker had seen, whatever the clocks say.
#[test]
fn clocks_hours_apart_lose_no_change() {
    let setup = |name| Setup::new(name, Format::Sdbox).over_a_line();
    let setups = vec![setup("a").with_a_clock_off_by(-7), setup("b").with_a_clock_off_by(5)];
    let t = Scene::on(Cluster::start(setups), "story-clocks");
    t.expects_in_log("dovetail");
    let user = &t.user;
    (0..2).for_each(|n| t.a().deliver(user, &mail(&format!("mail {n}"))));
    t.a().imap(user).ok("CREATE Name");
    t.settled();
    wait_until(SOON, "it is reported", || {
        t.a().status()[0]["last_error"].contains("seconds ahead") && t.b().status()[0]["last_error"].contains("behind")
    });
    let hang = |is_hung| t.lines.iter().for_each(|line| line.hang(is_hung));
    let is_told = |server: &Server| server.status().iter().all(|peer| peer["pending"] != "0");
    for is_cut in [false, true] {
        for (first, second) in [(t.a(), t.b()), (t.b(), t.a())] {
            let mut imap = first.imap(user).select("INBOX");
            for command in ["STORE 1 +FLAGS (\\Flagged $Work)", "RENAME Name First", "SUBSCRIBE INBOX"] {
                imap.ok(command);
            }
            assert_eq!(t.settled().messages("INBOX")[0].flags, ["$Work", "\\Flagged"]);
            // Which the first hears of at once, or after it has done something else.
            hang(is_cut);
            let mut theirs = second.imap(user).select("INBOX");
            for command in ["STORE 1 -FLAGS (\\Flagged $Work)", "RENAME First Name", "UNSUBSCRIBE INBOX"] {
                theirs.ok(command);
            }
            imap.ok("STORE 1:2 +FLAGS (\\Answered)");
            theirs.ok("STORE 1:2 +FLAGS (\\Seen)");
            wait_until(SOON, "what both did is told", || !is_cut || t.servers().iter().all(is_told));
            hang(false);
            wait_until(SOON, "all is heard", || t.servers().iter().all(Server::has_nothing_pending));
            let snapshot = t.settled();
            let flags: Vec<&[String]> = snapshot.messages("INBOX").iter().map(|message| &message.flags[..]).collect();
            assert_eq!(flags, [["\\Answered", "\\Seen"]; 2]);
            assert_eq!(snapshot.mailboxes.keys().collect::<Vec<_>>(), ["INBOX", "Name"]);
            assert!(snapshot.subscriptions.is_empty());
            first.imap(user).select("INBOX").ok("STORE 1:2 FLAGS ()");
            t.settled();
        }
    }
}

/// What a look finds in a log names messages by their UIDs, while the other server has its own at these.
fn what_is_found_in_the_log_follows_mails_that_are_given_other_uids(writer: usize, user: &str) {
    let t = pair_over_lines(Format::Sdbox, Format::Sdbox, user);
    t.expects_in_log("dovetail");
    t.expects_in_log("killed with signal 9");
    t.a().deliver(&t.user, &mail("before"));
    t.settled();
    t.lines.iter().for_each(|line| line.hang(true));
    t.servers().iter().for_each(|server| deliver(server, &t.user, 0..3));
    let server = &t.servers()[writer];
    // The mails are told, what is done to them is not.
    wait_until(SOON, "the deliveries are journaled", || server.status().iter().all(|peer| peer["pending"] == "3"));
    server.pids("dovetail").iter().for_each(|pid| signal(*pid, "STOP"));
    let mut imap = server.imap(&t.user).select("INBOX");
    imap.ok("STORE 2:4 +FLAGS (\\Flagged $Important)");
    imap.ok("STORE 3 +FLAGS.SILENT (\\Deleted)");
    imap.ok("EXPUNGE");
    let killed = server.kill("imap") + server.kill("dovetail");
    assert!(killed >= 2);
    t.lines.iter().for_each(|line| line.hang(false));
    let snapshot = t.converged_within(KILLED_DEADLINE, &t.user);
    assert_each_once(&t, &snapshot, 6);
    let flagged = snapshot.messages("INBOX").iter().filter(|m| m.flags == ["$Important", "\\Flagged"]).count();
    assert_eq!(flagged, 2);
}

#[test]
fn what_is_found_in_the_log_of_a_follows_mails_that_are_given_other_uids() {
    what_is_found_in_the_log_follows_mails_that_are_given_other_uids(0, "story-found-a");
}

#[test]
fn what_is_found_in_the_log_of_b_follows_mails_that_are_given_other_uids() {
    what_is_found_in_the_log_follows_mails_that_are_given_other_uids(1, "story-found-b");
}

/// A session that has listed its mails does not hear that they were given other UIDs until it ends.
fn what_a_pop3_session_deletes_follows_mails_that_are_given_other_uids(format: Format, user: &str) {
    let t = pair_over_lines(format, format, user);
    t.expects_in_log("dovetail");
    t.expects_in_log("Recent flags state corrupted");
    t.a().deliver(user, &mail("before"));
    t.settled();
    t.lines.iter().for_each(|line| line.hang(true));
    t.servers().iter().for_each(|server| deliver(server, user, 0..3));
    let mut sessions: Vec<Pop3> = t.servers().iter().map(|server| server.pop3(user)).collect();
    for session in &mut sessions {
        assert_eq!(session.command_lines("UIDL").len(), 4);
        session.command("DELE 3");
    }
    t.lines.iter().for_each(|line| line.hang(false));
    wait_until(KILLED_DEADLINE, "all is heard", || t.servers().iter().all(Server::has_nothing_pending));
    assert_each_once(&t, &t.settled(), 7);
    sessions.iter_mut().for_each(|session| drop(session.command("QUIT")));
    wait_until(KILLED_DEADLINE, "both are gone", || t.settled().messages("INBOX").len() == 5);
}

#[test]
fn what_a_pop3_session_deletes_follows_mails_that_are_given_other_uids_sdbox() {
    what_a_pop3_session_deletes_follows_mails_that_are_given_other_uids(Format::Sdbox, "story-pop3-sdbox");
}

#[test]
fn what_a_pop3_session_deletes_follows_mails_that_are_given_other_uids_maildir() {
    what_a_pop3_session_deletes_follows_mails_that_are_given_other_uids(Format::Maildir, "story-pop3-maildir");
}

/// Nor does an IMAP session that gives no command which may tell it of expunges (RFC 3501, 7.4.1).
fn what_a_stale_imap_session_does_follows_mails_that_are_given_other_uids(format: Format, user: &str) {
    let t = pair_over_lines(format, format, user);
    t.expects_in_log("dovetail");
    t.expects_in_log("Recent flags state corrupted");
    t.a().deliver(user, &mail("before"));
    t.settled();
    t.lines.iter().for_each(|line| line.hang(true));
    t.servers().iter().for_each(|server| deliver(server, user, 0..3));
    let guid = |snapshot: &Snapshot, uid: u32| snapshot.mailboxes["INBOX"].messages[&uid].guid.clone();
    let apart: Vec<Snapshot> = t.servers().iter().map(|server| Snapshot::take(server, user, false)).collect();
    let mut sessions: Vec<Imap> = t.servers().iter().map(|server| server.imap(user).select("INBOX")).collect();
    for session in &mut sessions {
        assert_eq!(session.uids(), [1, 2, 3, 4]);
        session.ok("STORE 2 +FLAGS.SILENT (\\Deleted)");
    }
    t.lines.iter().for_each(|line| line.hang(false));
    wait_until(KILLED_DEADLINE, "all is heard", || t.servers().iter().all(Server::has_nothing_pending));
    let moved = t.settled();
    assert_each_once(&t, &moved, 7);
    assert!((2..=4).all(|uid| !moved.mailboxes["INBOX"].messages.contains_key(&uid)), "{moved:?}");
    for session in &mut sessions {
        session.ok("STORE 3 +FLAGS (\\Flagged $Important)");
        session.ok("STORE 4 +FLAGS.SILENT (\\Deleted)");
        session.ok("UID EXPUNGE 2:4");
    }
    wait_until(KILLED_DEADLINE, "all four are gone", || t.settled().messages("INBOX").len() == 3);
    wait_until(KILLED_DEADLINE, "all is heard", || t.servers().iter().all(Server::has_nothing_pending));
    let flags: BTreeMap<String, Vec<String>> =
        t.settled().messages("INBOX").iter().map(|m| (m.guid.clone(), m.flags.clone())).collect();
    let flagged = vec!["$Important".to_owned(), "\\Flagged".to_owned()];
    let expected = apart.iter().map(|one| (guid(one, 3), flagged.clone())).chain([(guid(&apart[0], 1), vec![])]);
    assert_eq!(flags, expected.collect());
}

#[test]
fn what_a_stale_imap_session_does_follows_mails_that_are_given_other_uids_sdbox() {
    what_a_stale_imap_session_does_follows_mails_that_are_given_other_uids(Format::Sdbox, "story-stale-sdbox");
}

#[test]
fn what_a_stale_imap_session_does_follows_mails_that_are_given_other_uids_mdbox() {
    what_a_stale_imap_session_does_follows_mails_that_are_given_other_uids(Format::Mdbox, "story-stale-mdbox");
}

#[test]
fn what_a_stale_imap_session_does_follows_mails_that_are_given_other_uids_maildir() {
    what_a_stale_imap_session_does_follows_mails_that_are_given_other_uids(Format::Maildir, "story-stale-maildir");
}
