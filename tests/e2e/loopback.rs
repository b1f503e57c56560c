//! Without certificates, relays listen on and connect to loopback addresses only, unless the setting with `insecure` in
//! its name allows more. Each server has a network of its own here, and its relay listens on all of its addresses.

use crate::cluster::{wait_until, Cluster, Format, Server, Setup};
use crate::scene::{mail, Scene, SOON};

const SECURE_23: &str = "plugin {\n  dovetail_insecure_plaintext = no\n}\n";
const SECURE_24: &str = "dovetail_insecure_plaintext = no\n";

/// What the relay says at each start when more than loopback is allowed.
const WARNING: &str = "Warning: dovetail: dovetail_insecure_plaintext is set: mail goes over the network unencrypted";

fn insecure(name: &str) -> Setup {
    Setup::new(name, Format::Sdbox).insecure()
}

fn secure(name: &str) -> Setup {
    insecure(name).extra(SECURE_23, SECURE_24)
}

fn count(server: &Server, text: &str) -> usize {
    server.log().lines().filter(|line| line.contains(text)).count()
}

#[test]
fn a_relay_refuses_to_listen_outside_of_loopback_and_says_so_once() {
    let t = Scene::on(Cluster::start_apart(vec![insecure("a"), secure("b")]), "story-not-listening");
    t.expects_in_log("dovetail");
    let refusal = "The relay refuses to listen on 0.0.0.0:";
    t.b().wait_for_log(refusal);
    t.b().wait_for_log("dovetail_insecure_plaintext = yes would allow it");
    assert_eq!(count(t.b(), WARNING), 0);

    // Whoever connects is turned away; mail goes on.
    wait_until(SOON, "A was turned away", || {
        let why = &t.a().status()[0]["last_error"];
        why.contains("the connection was closed") || why.contains("Connection reset")
    });
    t.a().deliver(&t.user, &mail("stays here"));
    t.b().deliver(&t.user, &mail("stays there"));
    wait_until(SOON, "the mail waits", || t.a().status()[0]["pending"] != "0");
    assert_ne!(t.a().status()[0]["state"], "connected");
    for server in t.servers() {
        assert_eq!(server.imap(&t.user).select("INBOX").uids().len(), 1, "on {}", server.name());
    }
    assert_eq!(count(t.b(), refusal), 1, "once for a start, not for each connection:\n{}", t.b().log());
}

#[test]
fn a_relay_refuses_to_connect_outside_of_loopback_and_says_so_once() {
    let t = Scene::on(Cluster::start_apart(vec![secure("a"), insecure("b")]), "story-not-connecting");
    t.expects_in_log("dovetail");
    wait_until(SOON, "A's status says why", || {
        let peer = &t.a().status()[0];
        let why = &peer["last_error"];
        peer["state"] == "refused"
            && why.contains("is not a loopback address")
            && why.contains("dovetail_insecure_plaintext")
    });
    t.a().deliver(&t.user, &mail("stays here"));
    assert_eq!(t.a().imap(&t.user).select("INBOX").uids().len(), 1);
    assert!(!t.b().has_inbox(&t.user));
    assert_eq!(count(t.a(), "Peer b (10."), 1, "one line for all tries:\n{}", t.a().log());
}

#[test]
fn where_it_is_allowed_relays_talk_over_a_network_and_warn_at_each_start() {
    let t = Scene::on(Cluster::start_apart(vec![insecure("a"), insecure("b")]), "story-insecure");
    t.expects_in_log("killed with signal 9");
    t.a().deliver(&t.user, &mail("over the network"));
    assert_eq!(t.settled().messages("INBOX").len(), 1);
    for server in t.servers() {
        assert_eq!(count(server, WARNING), 1, "{}", server.log());
        assert_eq!(count(server, "refuses to listen"), 0, "{}", server.log());
    }
    t.b().kill("dovetail");
    wait_until(SOON, "B's relay warns again", || count(t.b(), WARNING) == 2);
    t.b().deliver(&t.user, &mail("and back"));
    assert_eq!(t.settled().messages("INBOX").len(), 2);
}
