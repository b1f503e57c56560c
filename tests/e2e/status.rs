//! `doveadm dovetail status`, and that applied changes are not sent back.

use crate::cluster::{wait_until, Cluster, Format, Server};
use crate::scene::{mail, Scene, SOON};

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
    for column in ["peer", "state", "pending", "behind_secs", "dropped", "failed", "conflicts", "last_error"] {
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
