//! `doveadm dovetail status`, and that applied changes are not sent back.

use crate::cluster::server::signal;
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
    for column in
        ["peer", "state", "pending", "behind_secs", "dropped", "process_dropped", "failed", "conflicts", "last_error"]
    {
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
