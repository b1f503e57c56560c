//! `doveadm dovetail status`, the events of conflicts, and that applied changes are not sent back.

use std::collections::{BTreeMap, BTreeSet};
use std::time::UNIX_EPOCH;

use crate::cluster::server::signal;
use crate::cluster::snapshot::table;
use crate::cluster::{wait_until, Cluster, Format, Server, Setup};
use crate::scene::{mail, mail_of_size, Scene, SOON};

fn wait_for_acknowledgement(server: &Server) {
    wait_until(SOON, &format!("{}'s peers have acknowledged everything", server.name()), || {
        server.status().iter().all(|peer| peer["pending"] == "0")
    });
}

#[test]
fn status_has_a_row_for_each_peer_in_every_output_format() {
    let t = Scene::on(Cluster::pair(Format::Sdbox, Format::Sdbox), "story-status");
    t.here().deliver(&t.user, &mail("one"));
    t.settled();
    wait_for_acknowledgement(t.here());

    let rows = t.here().status();
    assert_eq!(rows.len(), 1, "{rows:?}");
    assert_eq!((rows[0]["peer"].as_str(), rows[0]["state"].as_str()), ("b", "connected"), "{rows:?}");

    let status = |format| t.here().doveadm(&["-f", format, "dovetail", "status"]);
    let (flow, table, json) = (status("flow"), status("table"), status("json"));
    let columns = ["peer", "state", "pending", "behind_secs", "dropped", "process_dropped", "unacknowledged", "failed"];
    for column in columns.into_iter().chain(["conflicts", "last_error"]) {
        assert!(rows[0].contains_key(column), "{rows:?}");
        assert!(flow.contains(&format!("{column}=")) && table.contains(column), "{flow}{table}");
        assert!(json.contains(&format!("\"{column}\":")), "{json}");
    }
    assert!(flow.contains("peer=b ") && flow.contains("state=connected"), "{flow}");
    assert!(table.lines().count() == 2 && table.contains("connected"), "{table}");
    assert!(
        json.starts_with("[{") && json.contains("\"peer\":\"b\"") && json.contains("\"state\":\"connected\""),
        "{json}"
    );
}

#[test]
fn status_says_how_far_a_peer_is_behind() {
    let t = Scene::on(Cluster::pair(Format::Sdbox, Format::Sdbox), "story-behind");
    t.expects_in_log("dovetail");
    t.a().deliver(&t.user, &mail("one"));
    t.settled();
    t.b().stop();
    t.a().deliver(&t.user, &mail("two"));
    wait_until(SOON, "B is behind", || {
        t.a().status()[0]["behind_secs"].parse::<u64>().is_ok_and(|secs| (1..60).contains(&secs))
    });
    let of_user = |user: &str| {
        let rows = t.a().doveadm(&["-f", "tab", "dovetail", "status", "-u", user]);
        let row = table(&rows).next().expect("a row");
        (row["pending"].parse::<u64>().expect("a number"), row["behind_secs"] != "0")
    };
    assert_eq!((of_user(&t.user).1, of_user("story-behind-other")), (true, (0, false)));
    assert!(of_user(&t.user).0 > 0);
    t.b().start();
    t.settled();
    wait_until(SOON, "B is not behind", || t.a().status()[0]["behind_secs"] == "0");
}

const SMALL_QUEUE_23: &str = "plugin {\n  dovetail_process_queue_size = 128k\n}\n";
const SMALL_QUEUE_24: &str = "dovetail_process_queue_size = 128k\n";

/// It is counted when the relay takes records again, whether the process does anything more or has ended meanwhile.
#[test]
fn what_a_mail_process_had_to_drop_is_counted_and_read_from_the_logs() {
    let a = Setup::new("a", Format::Sdbox).extra(SMALL_QUEUE_23, SMALL_QUEUE_24);
    let t = Scene::on(Cluster::start(vec![a, Setup::new("b", Format::Sdbox)]), "story-dropped-by-process");
    t.expects_in_log("dovetail_process_queue_size");
    t.expects_in_log("changes could not be handed to the relay before this process ended");
    let dropped = || t.a().status()[0]["process_dropped"].parse::<u64>().expect("a number");
    t.a().deliver(&t.user, &mail("first"));
    t.settled();
    assert_eq!(dropped(), 0);
    let relay = t.a().pids("dovetail")[0];
    // More than the relay's socket and the queue take.
    let body = mail_of_size(20_000);
    let append_while_it_hangs = || {
        signal(relay, "STOP");
        let mut imap = t.a().imap(&t.user);
        (0..60).for_each(|_| drop(imap.append("INBOX", &body)));
        imap
    };

    let idle = append_while_it_hangs();
    signal(relay, "CONT");
    wait_until(SOON, "it is counted while the session does nothing", || dropped() > 0);
    assert_eq!(t.settled().messages("INBOX").len(), 61);
    drop(idle);
    wait_until(SOON, "no session is left", || t.a().pids("imap").is_empty());

    let before = dropped();
    append_while_it_hangs().ok("LOGOUT");
    wait_until(SOON, "the session has ended", || t.a().pids("imap").is_empty());
    signal(relay, "CONT");
    wait_until(SOON, "it is counted after the session has ended", || dropped() > before);
    assert_eq!(t.settled().messages("INBOX").len(), 121);
}

#[test]
fn applied_changes_are_not_sent_back_sdbox() {
    applied_changes_are_not_sent_back(Format::Sdbox);
}

#[test]
fn applied_changes_are_not_sent_back_mdbox() {
    applied_changes_are_not_sent_back(Format::Mdbox);
}

#[test]
fn applied_changes_are_not_sent_back_maildir() {
    applied_changes_are_not_sent_back(Format::Maildir);
}

fn applied_changes_are_not_sent_back(format: Format) {
    let t = Scene::on(Cluster::pair(format, format), "story-echo");
    // Given how many changes one delivery on B is.
    let made_on_b = || t.b().counters().changes;
    t.b().deliver("story-echo-probe", &mail("first"));
    t.converged("story-echo-probe");
    let before = made_on_b();
    t.b().deliver("story-echo-probe", &mail("second"));
    t.converged("story-echo-probe");
    let of_one_delivery = made_on_b() - before;
    assert!(of_one_delivery > 0);

    // When A makes many changes of all kinds, which B applies.
    let mut imap = t.a().imap(&t.user);
    for _ in 0..5 {
        imap.append("INBOX", &mail("echo"));
    }
    imap.ok("CREATE Echo");
    imap.ok("SUBSCRIBE Echo");
    let mut imap = imap.select("INBOX");
    imap.ok("COPY 1:2 Echo");
    imap.ok("STORE 1:3 +FLAGS (\\Seen \\Deleted echo)");
    imap.ok("EXPUNGE");
    imap.ok("RENAME Echo Narcissus");
    let settled = t.settled();

    // Then B sent nothing but what it does next, and nothing has come back to A. Changes travel in order: an echo would
    // arrive before that.
    t.b().deliver("story-echo-probe", &mail("third"));
    t.converged("story-echo-probe");
    assert_eq!(made_on_b() - before, 2 * of_one_delivery, "B's processes reported changes that it had only applied");
    let now = t.settled();
    for (name, mailbox) in &settled.mailboxes {
        assert_eq!(mailbox.highest_modseq, now.mailboxes[name].highest_modseq, "HIGHESTMODSEQ of {name} moved");
    }
}

/// As an admin may count them: by the fields of the event. Each: kind, rule, mailbox.
const CONFLICTS: [(&str, &str, &str); 8] = [
    ("uid", "uid_taken", "INBOX"),
    ("flags", "later_flag", "INBOX"),
    ("rename", "later_name", "Work"),
    ("rename", "name_taken", "Taken"),
    ("subscription", "later_subscription", "News"),
    ("delete", "mail_stays", "Kept"),
    ("mailbox", "one_name", "Twice"),
    ("uidvalidity", "higher_uidvalidity", "Twice"),
];

fn metrics(user: &str) -> String {
    let mut text = "log_debug = event=dovetail_conflict_resolved\n".to_owned();
    for (kind, rule, mailbox) in CONFLICTS {
        let fields = format!("user={user} and kind={kind} and rule={rule} and mailbox={mailbox}");
        text += &format!("metric {rule} {{\n  filter = event=dovetail_conflict_resolved and {fields}\n}}\n");
    }
    for kind in BTreeSet::from(CONFLICTS.map(|(kind, ..)| kind)) {
        text += &format!("metric kind_{kind} {{\n  filter = event=dovetail_conflict_resolved and kind={kind}\n}}\n");
    }
    text
}

/// By the metrics' names.
fn counted(server: &Server) -> BTreeMap<String, u64> {
    let rows = server.doveadm(&["-f", "tab", "stats", "dump"]);
    let rows = table(&rows).filter(|row| row["field"] == "duration");
    rows.map(|row| (row["metric_name"].clone(), row["count"].parse().expect("a number"))).collect()
}

#[test]
fn conflicts_are_counted_by_kind_and_each_is_an_event_with_its_rule() {
    let user = "story-conflicts";
    let setup = |name| Setup::new(name, Format::Sdbox).over_a_line().extra(&metrics(user), &metrics(user));
    let t = Scene::on(Cluster::start(vec![setup("a"), setup("b")]), user);
    t.expects_in_log("Peer ");
    t.a().deliver(user, &mail("welcome"));
    let mut a = t.a().imap(user);
    for mailbox in ["Work", "Play", "News", "Kept"] {
        a.ok(&format!("CREATE {mailbox}"));
        a.append(mailbox, &mail(mailbox));
    }
    t.settled();

    // Given all kinds of conflicts.
    t.lines.iter().for_each(|line| line.hang(true));
    let mut a = t.a().imap(user).select("INBOX");
    a.ok("STORE 1 +FLAGS (\\Flagged)");
    a.ok("RENAME Work Job");
    a.ok("RENAME Play Taken");
    a.ok("SUBSCRIBE News");
    a.ok("DELETE Kept");
    a.ok("CREATE Twice");
    a.append("Twice", &mail("a"));
    t.a().deliver(user, &mail("a"));
    wait_until(SOON, "what a did is told", || t.a().status()[0]["pending"].parse::<u64>().is_ok_and(|n| n >= 8));
    // A UIDVALIDITY is the time of its CREATE, or one more than the last: b's is another one than a's from now on.
    let status = a.ok("STATUS Twice (UIDVALIDITY)").lines().join("");
    let digits = |c: char| !c.is_ascii_digit();
    let uid_validity: u64 = status.rsplit(digits).find_map(|number| number.parse().ok()).expect("a UIDVALIDITY");
    let now = || UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
    wait_until(SOON, "the clock is beyond it", || now() > uid_validity);
    let mut b = t.b().imap(user).select("INBOX");
    b.ok("STORE 1 +FLAGS (\\Flagged)");
    b.ok("STORE 1 -FLAGS (\\Flagged)");
    b.ok("RENAME Work Toil");
    b.ok("CREATE Taken");
    b.append("Taken", &mail("b"));
    b.ok("SUBSCRIBE News");
    b.ok("UNSUBSCRIBE News");
    b.append("Kept", &mail("b"));
    b.ok("CREATE Twice");
    b.append("Twice", &mail("b"));
    t.b().deliver(user, &mail("b"));
    t.lines.iter().for_each(|line| line.hang(false));
    t.settled();
    wait_until(SOON, "nothing is pending", || t.servers().iter().all(Server::has_nothing_pending));

    // Then each is an event, with user and mailbox, and those of a kind are as many as the status says.
    let of = |name: &str| -> u64 { t.servers().iter().filter_map(|server| counted(server).get(name).copied()).sum() };
    for (_, rule, mailbox) in CONFLICTS {
        wait_until(SOON, &format!("an event says {rule} of {mailbox}"), || of(rule) > 0);
    }
    for server in t.servers() {
        let kinds = server.status()[0]["conflicts"].clone();
        for (kind, count) in kinds.split(',').filter_map(|kind| kind.split_once(':')) {
            let what = format!("{} counts {count} events of kind {kind} of {kinds}", server.name());
            wait_until(SOON, &what, || counted(server)[&format!("kind_{kind}")].to_string() == count);
        }
    }
    t.a().wait_for_log("mailbox INBOX: a conflict was resolved: uid: uid_taken");
}
