//! `doveadm dovetail wait`: what was acknowledged before it was called is on the peers when it returns.

use crate::cluster::{Cluster, Format, Server, Setup};
use crate::scene::{mail, Scene};

/// Of the user's INBOX, as it is now.
fn mails(server: &Server, user: &str) -> usize {
    server.doveadm(&["search", "-u", user, "mailbox", "INBOX", "all"]).lines().count()
}

/// Its exit status, and what it says.
fn wait(server: &Server, args: &[&str]) -> (i32, String) {
    let all: Vec<&str> = ["dovetail", "wait"].iter().chain(args).copied().collect();
    let output = server.try_doveadm(&all);
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn waits(server: &Server, args: &[&str]) {
    assert_eq!(wait(server, args), (0, String::new()), "doveadm dovetail wait {args:?}");
}

fn when_it_returns_the_peers_have_all_that_was_acknowledged(a: Format, b: Format) {
    let user = format!("story-gate-{a:?}-{b:?}").to_lowercase();
    let t = Scene::on(Cluster::pair(a, b), &user);
    t.a().deliver(&user, &mail("first"));
    waits(t.a(), &[]);
    assert_eq!(mails(t.b(), &user), 1);
    let mut imap = t.a().imap(&user).select("INBOX");
    for n in 1..=5 {
        imap.append("INBOX", &mail(&format!("mail {n}")));
        waits(t.a(), &["-u", &user]);
        assert_eq!(mails(t.b(), &user), 1 + n);
    }
    // Of all, while the session is there.
    imap.ok("STORE 1:* +FLAGS (\\Deleted)");
    imap.ok("EXPUNGE");
    waits(t.a(), &["--timeout", "30"]);
    assert_eq!(mails(t.b(), &user), 0);
    // Nobody has told of it. Who writes to the mailbox might have.
    t.a().untold(&["save", "-u", &user, "-m", "INBOX"], &mail("untold"));
    waits(t.a(), &["-u", &user, "-t", "30"]);
    assert_eq!(mails(t.b(), &user), 1);
    waits(t.b(), &[]);
    waits(t.a(), &["-u", "nobody-has-this-name", "-t", "0"]);
    drop(imap);
    t.settled();
}

#[test]
fn when_wait_returns_the_peers_have_all_that_was_acknowledged_sdbox() {
    when_it_returns_the_peers_have_all_that_was_acknowledged(Format::Sdbox, Format::Sdbox);
}

#[test]
fn when_wait_returns_the_peers_have_all_that_was_acknowledged_mdbox() {
    when_it_returns_the_peers_have_all_that_was_acknowledged(Format::Mdbox, Format::Maildir);
}

#[test]
fn when_wait_returns_the_peers_have_all_that_was_acknowledged_maildir() {
    when_it_returns_the_peers_have_all_that_was_acknowledged(Format::Maildir, Format::Sdbox);
}

#[test]
fn wait_says_at_its_end_which_peer_lacks_how_many_changes() {
    let names = ["a", "b", "c"];
    let t = Scene::on(Cluster::start(names.map(|name| Setup::new(name, Format::Sdbox)).into()), "story-gate-end");
    t.expects_in_log("Peer ");
    t.a().deliver(&t.user, &mail("first"));
    t.settled();
    t.b().stop();
    t.a().deliver(&t.user, &mail("second"));
    t.a().deliver(&t.user, &mail("third"));
    // More, if the saves of a delivery were told apart from the mailbox's state.
    let says = |said: &(i32, String)| said.1.contains("Peer b lacks ") && said.1.contains(" changes (");
    for args in [&["-t", "1"][..], &["-t", "0", "-u", &t.user]] {
        let said = wait(t.a(), args);
        assert!(said.0 == 75 && says(&said) && !said.1.contains("Peer c"), "{said:?}");
    }
    // Of others nothing is missing.
    waits(t.a(), &["-u", "story-gate-other", "-t", "0"]);
    assert_eq!(wait(t.a(), &["-t", "soon"]).0, 64, "a time-out that is no number");

    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| wait(t.a(), &["-t", "120"]));
        t.b().start();
        assert_eq!(waiting.join().expect("it returns"), (0, String::new()));
    });
    assert_eq!(mails(t.b(), &t.user), 3);
    t.settled();
}
