//! Three servers, all of which are written to.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::cluster::{Cluster, Format, Server, Setup, Snapshot};
use crate::scene::{mail, Scene};

/// Long enough for connections that were lost to be noticed and made again.
const CUT_DEADLINE: Duration = Duration::from_secs(90);

fn setups(formats: [Format; 3]) -> Vec<Setup> {
    ["a", "b", "c"].into_iter().zip(formats).map(|(name, format)| Setup::new(name, format)).collect()
}

/// Delivers mails, flags and expunges on one server, while others do the same.
fn write(server: &Server, user: &str, mails: usize) {
    let name = server.name();
    let mut lmtp = server.lmtp();
    let mut imap = server.imap(user).select("INBOX");
    for n in 0..mails {
        lmtp.deliver(&[user], &mail(&format!("{name} {n}")));
        // Whichever it is: perhaps another server's, which a third one does not have yet.
        imap.ok("STORE * +FLAGS (\\Seen)");
        imap.ok(&format!("STORE * {}FLAGS ($Important)", ["+", "-"][n % 2]));
    }
}

fn write_on_all(servers: &[Server], user: &str, mails: usize) {
    std::thread::scope(|scope| {
        for server in servers {
            scope.spawn(|| write(server, user, mails));
        }
    });
}

fn assert_each_once(snapshot: &Snapshot, count: usize) {
    let guids: BTreeSet<_> = snapshot.messages("INBOX").iter().map(|message| message.guid.clone()).collect();
    assert_eq!((snapshot.messages("INBOX").len(), guids.len()), (count, count));
}

fn three_that_are_written_to_at_once_converge(formats: [Format; 3], user: &str) {
    let t = Scene::on(Cluster::start(setups(formats)), user);
    t.a().deliver(user, &mail("first"));
    t.settled();
    write_on_all(t.servers(), user, 12);
    assert_each_once(&t.converged_within(CUT_DEADLINE, user), 37);
    // One after the other, each on the next server, as soon as it shows.
    let flags = ["\\Flagged", "\\Answered", "\\Draft"];
    for (n, server) in t.servers().iter().cycle().take(9).enumerate() {
        server.imap(user).select("INBOX").ok(&format!("STORE 1:* {}FLAGS ({})", ["+", "-"][n / 3 % 2], flags[n % 3]));
    }
    t.settled();
}

#[test]
fn three_that_are_written_to_at_once_converge_sdbox() {
    three_that_are_written_to_at_once_converge([Format::Sdbox; 3], "story-three-sdbox");
}

#[test]
fn three_that_are_written_to_at_once_converge_of_three_formats() {
    three_that_are_written_to_at_once_converge([Format::Maildir, Format::Sdbox, Format::Mdbox], "story-three-mixed");
}

#[test]
fn one_that_was_down_gets_what_the_other_two_did() {
    let user = "story-three-down";
    let t = Scene::on(Cluster::start(setups([Format::Sdbox; 3])), user);
    t.expects_in_log("dovetail");
    t.a().deliver(user, &mail("first"));
    t.settled();
    let c = &t.servers()[2];
    c.stop();
    write_on_all(&t.servers()[..2], user, 6);
    t.b().imap(user).select("INBOX").ok("STORE 1:3 +FLAGS (\\Answered)");
    c.start();
    write(c, user, 3);
    assert_each_once(&t.converged_within(CUT_DEADLINE, user), 16);
}

#[test]
fn two_that_are_cut_from_each_other_only_converge_when_the_line_is_back() {
    let user = "story-three-cut";
    let t = Scene::on(Cluster::start_apart(setups([Format::Sdbox; 3])), user);
    t.expects_in_log("dovetail");
    t.a().deliver(user, &mail("first"));
    t.settled();
    // b and c.
    t.lines[2].hang(true);
    write_on_all(t.servers(), user, 6);
    t.lines[2].hang(false);
    assert_each_once(&t.converged_within(CUT_DEADLINE, user), 19);
}
