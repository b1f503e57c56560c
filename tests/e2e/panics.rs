//! A panic of ours ends no session and loses no change.
//!
//! These servers have a build of the plugin that panics where it is told to (feature `panics`); what is installed does not.

use std::time::Duration;

use crate::cluster::imap::Imap;
use crate::cluster::{wait_until, Cluster, Format, Server, Setup};
use crate::scene::{mail, Scene, SOON};

/// For what was lost to be looked for and sent; a relay is started again after five seconds.
const DEADLINE: Duration = Duration::from_secs(60);

fn pair(user: &str) -> Scene {
    let server = |name| Setup::new(name, Format::Sdbox).that_can_panic();
    let t = Scene::on(Cluster::start(vec![server("a"), server("b")]), user);
    for text in ["dovetail: Panic at src/guard.rs", ": provoked - mail goes on"] {
        t.expects_in_log(text);
    }
    t.a().deliver(&t.user, &mail("first"));
    t.converged_within(DEADLINE, &t.user);
    t
}

/// Does it while somebody panics there, and the log says so once.
fn panicking(server: &Server, place: &str, act: impl FnOnce()) {
    server.provoke(place);
    act();
    wait_until(SOON, &format!("a panic in {place}"), || server.has_panicked(place));
    let line = format!("Internal error in {place}: provoked");
    wait_until(SOON, "the log says so", || server.log().contains(&line));
    assert_eq!(server.log().matches(&line).count(), 1, "{place}:\n{}", server.log());
}

#[test]
fn what_is_installed_has_no_panics_to_provoke() {
    let t = pair("story-no-panics");
    let name = b"DOVETAIL_PANICS";
    assert!(!t.a().installed_plugin().windows(name.len()).any(|window| window == name));
}

#[test]
fn an_imap_session_goes_on_and_its_changes_arrive() {
    let t = pair("story-imap-panics");
    let mut imap: Imap = t.a().imap(&t.user).select("INBOX");
    let steps = [
        ("transaction_begin", "STORE 1 +FLAGS (\\Flagged)"),
        ("flags", "STORE 1 -FLAGS (\\Flagged)"),
        ("span", "STORE 1 +FLAGS (\\Answered)"),
        ("commit", "STORE 1 +FLAGS (\\Seen)"),
        ("keywords", "STORE 1 +FLAGS (keyword)"),
        ("name", "STORE 1 -FLAGS (\\Seen)"),
        ("follow", "STORE 1 -FLAGS (\\Answered)"),
        ("flush", "STORE 1 +FLAGS (\\Draft)"),
        ("intend", "CREATE One"),
        ("mailbox_op", "CREATE Two"),
        ("save", "COPY 1 One"),
    ];
    for (place, command) in steps {
        panicking(t.a(), place, || drop(imap.ok(command)));
        // Neither what was done then nor what comes after it is missing.
        imap.ok("STORE 1 +FLAGS (later)");
        t.converged_within(DEADLINE, &t.user);
        imap.ok("STORE 1 -FLAGS (later)");
    }
    for place in ["save", "commit", "span"] {
        // Once each in a process.
        let mut imap = t.a().imap(&t.user);
        t.a().provoke(place);
        imap.append("INBOX", &mail(&format!("with a panic in {place}")));
        imap.append("INBOX", &mail(&format!("after a panic in {place}")));
        wait_until(SOON, "the panic", || t.a().has_panicked(place));
        t.converged_within(DEADLINE, &t.user);
    }
    imap.ok("NOOP");
    panicking(t.a(), "expunge", || {
        imap.ok("STORE 2 +FLAGS (\\Deleted)");
        imap.ok("EXPUNGE");
    });
    imap.ok("NOOP");
    let snapshot = t.converged_within(DEADLINE, &t.user);
    assert_eq!((snapshot.messages("INBOX").len(), snapshot.messages("One").len()), (6, 1));
}

#[test]
fn an_lmtp_session_goes_on_and_its_mails_arrive() {
    let t = pair("story-lmtp-panics");
    let mut lmtp = t.a().lmtp();
    for place in ["inline_body_size", "transaction_begin", "save", "span", "commit", "flush"] {
        panicking(t.a(), place, || lmtp.deliver(&[&t.user], &mail(&format!("with a panic in {place}"))));
        lmtp.deliver(&[&t.user], &mail(&format!("after a panic in {place}")));
    }
    assert_eq!(t.converged_within(DEADLINE, &t.user).messages("INBOX").len(), 13);
}

/// What it had taken and not written down is looked for when it runs again.
#[test]
fn a_relay_is_started_again() {
    let t = pair("story-relay-panics");
    for text in ["The relay ends because of a panic", "could not be handed to the relay"] {
        t.expects_in_log(text);
    }
    let old = t.a().pids("dovetail");
    t.a().provoke("relay");
    t.a().deliver(&t.user, &mail("with a panic"));
    wait_until(SOON, "a panic in the relay", || t.a().has_panicked("relay"));
    t.a().deliver(&t.user, &mail("while there is no relay"));
    t.a().wait_for_log("The relay ends because of a panic");
    wait_until(DEADLINE, "the relay runs again", || t.a().pids("dovetail").iter().any(|pid| !old.contains(pid)));
    assert_eq!(t.converged_within(DEADLINE, &t.user).messages("INBOX").len(), 3);
}

/// It had saved the mail, and nobody was told.
#[test]
fn a_worker_ends_and_another_one_has_the_job() {
    let t = pair("story-worker-panics");
    for text in ["the worker that applied it went away", "a worker went away in mid-job"] {
        t.expects_in_log(text);
    }
    let old = t.b().pids("dovetail-worker");
    t.b().provoke("worker");
    t.a().deliver(&t.user, &mail("with a panic"));
    wait_until(SOON, "a panic in a worker", || t.b().has_panicked("worker"));
    t.b().wait_for_log("Internal error in worker_input: provoked");
    assert_eq!(t.converged_within(DEADLINE, &t.user).messages("INBOX").len(), 2);
    wait_until(SOON, "the worker has ended", || {
        let now = t.b().pids("dovetail-worker");
        old.iter().any(|pid| !now.contains(pid))
    });
}
