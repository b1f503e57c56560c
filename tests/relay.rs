//! The relay's engine with real sockets on loopback: two engines, scripted mail processes, workers and peers.
//! No Dovecot is needed.

mod relay {
    mod compare;
    pub mod house;
    mod local;
    mod mesh;
    mod tls;
}

use std::net::TcpListener;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::Message;

use dovetail::relay::client;
use dovetail::wire::frame;
use dovetail::wire::proto::frame::Kind;
use dovetail::wire::proto::op::What;
use dovetail::wire::proto::{
    Ack, AckWanted, Acked, Alias, Answer, Applied, Apply, Birth, BodyChunk, BodyMore, BodyRequest, Change, Doubt,
    Elsewhere, Expunge, FlagUpdate, Goodbye, Hello, Intent, Looked, Mailbox, MailboxCreate, MailboxDelete,
    MailboxRebuilt, MailboxRename, MessageRange, Op, Ping, Pong, Record, Refused, Save, SeqOf, Span, Stamp,
    Subscription, Surveyed,
};
use relay::house::*;

#[test]
fn a_change_goes_from_a_process_on_a_to_a_worker_on_b_and_its_acknowledgement_back() {
    let house = House::new();
    let (a, b) = house.pair();
    let mut imap = a.process("imap");

    imap.save("jane", 1);
    imap.save("jane", 2);
    let (worker, apply) = b.next_job();
    assert_eq!(apply.user, "jane");
    let stamp = apply.changes[0].stamp.clone().unwrap();
    assert_eq!((stamp.origin.as_str(), stamp.seq), ("a", 1));
    assert!(stamp.epoch > 0 && stamp.clock > 0);
    assert_eq!(a.peer("b").acked, 0);
    worker.applied(&apply);
    if apply.changes.len() == 1 {
        let (worker, apply) = b.next_job();
        worker.applied(&apply);
    }

    until("both are acknowledged", || a.peer("b").acked == 2);
    let status = a.status();
    assert_eq!((status.peers[0].pending, status.peers[0].state.as_str()), (0, "connected"));
    let counters = status.counters.unwrap();
    assert_eq!((counters.records, counters.changes, counters.gaps), (2, 2, 0));
    assert_eq!(b.status().counters.unwrap().applied, 2);
}

#[test]
fn changes_go_both_ways() {
    let house = House::new();
    let (a, b) = house.pair();
    a.process("imap").save("jane", 1);
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    until("it is acknowledged", || a.peer("b").acked == 1);

    b.process("lmtp").save("joe", 1);
    let (_, apply) = a.next_job();
    let stamp = apply.changes[0].stamp.clone().unwrap();
    assert_eq!((stamp.origin.as_str(), stamp.vector), ("b", vec![]));
}

#[test]
fn a_refused_user_waits_and_holds_up_nobody_else() {
    let house = House::new();
    let (a, b) = house.pair();
    let mut lmtp = a.process("lmtp");
    lmtp.save("jane", 1);
    let (worker, apply) = b.next_job();
    worker.finish(Kind::Applied(Applied { job: apply.job, done: 0, error: "disk full".into(), ..Default::default() }));
    until("the refusal is known", || a.peer("b").last_error == "user jane: disk full");

    lmtp.save("jane", 2);
    lmtp.save("joe", 1);
    let (worker, apply) = b.next_job();
    assert_eq!(apply.user, "joe");
    worker.applied(&apply);
    until("joe's is acknowledged", || a.peer("b").acked == 1);

    let mut seqs = Vec::new();
    while seqs.len() < 2 {
        let (worker, apply) = b.next_job();
        seqs.extend(apply.changes.iter().map(|change| (change.user.clone(), change.stamp.as_ref().unwrap().seq)));
        worker.applied(&apply);
    }
    assert_eq!(seqs, [("jane".to_string(), 1), ("jane".to_string(), 2)], "again, in order");
    until("nothing is pending", || a.peer("b").pending == 0);
    assert_eq!(b.status().counters.unwrap().refused, 1);
}

/// It ends then: Dovecot may have left a lock in the name of its process.
#[test]
fn a_worker_whose_job_failed_is_given_nothing_more() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut a = b.connect_as_peer("a");
    a.send_change("ann", 1);
    let (other, of_ann) = b.next_job();
    a.send_change("jane", 2);
    let (mut worker, apply) = b.next_job();
    a.send_change("joe", 3);
    worker.send(Kind::Applied(Applied { job: apply.job, error: "disk full".into(), ..Default::default() }));
    assert!(worker.is_closed());
    let (worker, apply) = b.next_job();
    assert_eq!(apply.user, "joe");
    worker.applied(&apply);
    other.applied(&of_ann);
    assert_eq!(a.next_refusal().seq, 2);
    assert_eq!(b.status().counters.unwrap().refused, 1, "joe's was not lost with the worker");

    let mut lmtp = b.process("lmtp");
    lmtp.send(Kind::Intent(Intent { user: "jim".into(), mailbox: None, peers: None }));
    drop(lmtp);
    let (mut worker, look) = b.next_look();
    worker.send(Kind::Looked(Looked { job: look.job, error: "locked".into(), ..Default::default() }));
    assert!(worker.is_closed());
}

#[test]
fn a_worker_that_dies_in_mid_job_costs_nothing() {
    let house = House::new();
    let (a, b) = house.pair();
    a.process("imap").save("jane", 1);
    let (worker, _) = b.next_job();
    drop(worker);
    let (worker, apply) = b.next_job();
    assert_eq!(apply.changes[0].stamp.as_ref().unwrap().seq, 1);
    worker.applied(&apply);
    until("it is acknowledged", || a.peer("b").acked == 1);
}

#[test]
fn a_peer_that_is_cut_in_mid_frame_gets_everything_again() {
    let house = House::new();
    let listener = house.listener();
    let a = house.server("a", &[("b", address(&listener))]);
    let mut lmtp = a.process("lmtp");

    let mut b = Wire::accept(&listener);
    b.greet("b");
    lmtp.save("jane", 1);
    lmtp.save("jane", 2);
    let first = b.next_change();
    b.send(Kind::Ack(Ack { epoch: first.epoch, seqs: vec![first.seq], heard_clock: 0 }));
    until("the first is acknowledged", || a.peer("b").acked == 1);
    b.send_bytes(&[1, 0, 0, 50, 1, 2]);
    drop(b);
    until("the cut is noticed", || a.peer("b").state != "connected");
    assert!(a.peer("b").last_error.contains("closed") || a.peer("b").last_error.contains("reset"));
    lmtp.save("joe", 1);

    let mut b = Wire::accept(&listener);
    b.greet("b");
    let seqs = [b.next_change().seq, b.next_change().seq];
    assert_eq!(seqs, [2, 3], "what was not acknowledged, and what came since");
    b.send(Kind::Ack(Ack { epoch: first.epoch, seqs: seqs.to_vec(), heard_clock: 0 }));
    until("nothing is pending", || a.peer("b").pending == 0);
    assert_eq!(a.peer("b").dropped, 0);
}

#[test]
fn what_was_applied_is_acknowledged_again_and_not_applied_again() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut a = b.connect_as_peer("a");
    a.send_change("jane", 1);
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    a.next_ack(1);
    drop(a);

    let mut a = b.connect_as_peer("a");
    a.send_change("jane", 1);
    a.next_ack(1);
    assert_eq!(b.status().counters.unwrap().applied, 1);
}

/// Its peers have forgotten what it had applied, and lost with the log.
#[test]
fn after_a_power_failure_all_users_are_to_be_compared_and_after_an_orderly_boot_nobody() {
    let house = House::new();
    let start = |boot: &str| house.server_with("b", &[("a", "127.0.0.1:9".into())], |config| config.boot = boot.into());
    let b = start("first");
    let mut a = b.connect_as_peer("a");
    a.send_change("jane", 1);
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    a.next_ack(1);
    drop((a, b));
    let b = start("second");
    assert_eq!((b.failed().len(), b.status().counters.unwrap().failed), (0, 0));
    drop(b);

    let journal = rusqlite::Connection::open(house.path("b-journal/journal.sqlite")).unwrap();
    assert_eq!(journal.execute("UPDATE meta SET value = 0 WHERE key = 'clean'", []).unwrap(), 1);
    drop(journal);
    let b = start("third");
    let failed = b.failed();
    assert_eq!((failed.len(), failed[0].peer.as_str(), failed[0].user.as_str(), failed[0].seq), (1, "a", "jane", 0));
    assert!(failed[0].error.contains("the power of this server failed"), "{failed:?}");
    assert_eq!(b.status().counters.unwrap().failed, 1);
}

#[test]
fn a_refusal_names_nothing_that_was_sent_again_and_is_applied() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut a = b.connect_as_peer("a");
    a.send_change("jane", 1);
    let (worker, apply) = b.next_job();
    a.send_change("jane", 2);
    a.send_change("jane", 3);
    a.send_change("joe", 4);
    let (other, of_joe) = b.next_job();
    other.applied(&of_joe);
    worker.applied(&apply);
    let (mut worker, apply) = b.next_job();
    assert_eq!(apply.changes.len(), 2);
    drop(a);

    // Both are sent again while they are being applied.
    let mut a = b.connect_as_peer("a");
    a.send_change("jane", 2);
    a.send_change("jane", 3);
    a.send_change("joe", 5);
    let (other, of_joe) = b.next_job();
    other.applied(&of_joe);
    worker.send(Kind::Applied(Applied { job: apply.job, done: 1, more: true, ..Default::default() }));
    drop(worker);
    let refused = loop {
        match a.next() {
            Kind::Refused(refused) => break refused.seq,
            Kind::Ack(_) | Kind::Ping(_) | Kind::Linked(_) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused, 3);
    a.send_change("jane", 3);
    let (_worker, apply) = b.next_job();
    assert_eq!(apply.changes[0].stamp.as_ref().unwrap().seq, 3);
}

#[test]
fn bad_frames_close_the_connection_and_are_counted() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);

    let mut garbage = b.process("imap");
    garbage.send_bytes(b"GET / HTTP/1.0\r\n\r\n");
    assert!(garbage.is_closed());

    let mut too_long = b.process("imap");
    too_long.send_bytes(&[1, 1, 0, 1]);
    assert!(too_long.is_closed());

    let mut as_worker = b.process("imap");
    as_worker.send(Kind::Applied(Applied::default()));
    assert!(as_worker.is_closed());

    for (bytes, reason) in [
        ([9, 0, 0, 1, 0], "the frame is of version 9"),
        ([1, 1, 0, 1, 0], "the frame is 65537 bytes long"),
        ([1, 0, 0, 1, 0xff], "the frame cannot be decoded"),
    ] {
        let mut peer = b.connect_as_peer("a");
        peer.send_bytes(&bytes);
        assert!(peer.is_closed());
        until(reason, || b.peer("a").last_error.contains(reason));
    }

    let mut foreign = b.connect_as_peer("a");
    foreign.send_change_of("c", "jane", 1);
    assert!(foreign.is_closed());

    assert_eq!(b.status().counters.unwrap().malformed, 7);
    until("all were said to be closed", || b.closed() >= 7);
}

#[test]
fn strangers_are_told_why_they_are_turned_away() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into()), ("c", "127.0.0.1:9".into())]);
    for (name, reason) in [("x", "not in dovetail_peers"), ("c", "lower name connects"), ("b", "name of its own")] {
        let mut stranger = b.connect();
        stranger.say_hello(name);
        match stranger.next() {
            Kind::Refused(Refused { error, .. }) => assert!(error.contains(reason), "{error}"),
            other => panic!("{other:?}"),
        }
        assert!(stranger.is_closed());
    }
}

#[test]
fn of_two_relays_of_one_server_the_newer_one_is_talked_to() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut old = b.connect_as_peer("a");
    let mut new = b.connect();
    new.say_hello_of("a", 6);
    assert!(matches!(new.next(), Kind::Hello(_)));
    assert!(old.is_closed());

    let mut old = b.connect();
    old.say_hello_of("a", 5);
    is_there(&mut old);
    assert!(matches!(old.next(), Kind::Refused(Refused { error, .. }) if error.contains("a later state of server a")));
    assert_eq!(b.peer("a").state, "connected");
    // If that one is still there, there are two.
    is_there(&mut new);
    assert!(matches!(new.next(), Kind::Refused(Refused { error, .. }) if error.contains("two servers")));
    assert!(new.is_closed());
    for epoch in [5, 6] {
        let mut again = b.connect();
        again.say_hello_of("a", epoch);
        assert!(matches!(again.next(), Kind::Refused(Refused { set_back: false, .. })));
    }
    assert_eq!(b.peer("a").state, "disputed");
}

/// It is asked, and answers.
fn is_there(peer: &mut Wire) {
    let probe = loop {
        match peer.next() {
            Kind::Ping(ping) => break ping,
            Kind::Linked(_) => {}
            other => panic!("{other:?}"),
        }
    };
    peer.send(Kind::Pong(Pong { id: probe.id }));
}

#[test]
fn what_a_killed_relay_had_said_is_no_second_server() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut a = b.connect();
    a.say_hello_of("a", 6);
    assert!(matches!(a.next(), Kind::Hello(_)));
    // Its connection was made by a relay that is gone, and is accepted only now.
    let mut killed = b.connect();
    killed.say_hello_of("a", 5);
    drop(killed);
    until("it is gone", || b.noted("turned_away") == 1);
    a.send(Kind::Ping(Ping { id: 1, heard_clock: 0 }));
    loop {
        match a.next() {
            Kind::Pong(_) => break,
            Kind::Linked(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(b.peer("a").state, "connected");
}

#[test]
fn who_comes_in_an_earlier_epoch_is_told_to_begin_a_new_one_behind_the_later() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut a = b.connect();
    a.say_hello_of("a", 6);
    assert!(matches!(a.next(), Kind::Hello(_)));
    drop(a);
    until("it is gone", || b.peer("a").state != "connected");
    let mut a = b.connect();
    a.say_hello_of("a", 5);
    assert!(matches!(a.next(), Kind::Refused(Refused { set_back: true, epoch: 6, .. })));
    assert!(a.is_closed());
    let mut a = b.connect();
    a.say_hello_of("a", 7);
    assert!(matches!(a.next(), Kind::Hello(_)));
}

#[test]
fn what_does_not_fit_into_memory_comes_from_the_journal() {
    let house = House::new();
    let listener = house.listener();
    let a = house.server_with("a", &[("b", address(&listener))], |config| config.queue_bytes_max = 4000);
    let mut lmtp = a.process("lmtp");
    for uid in 1..=100 {
        lmtp.save(if uid % 3 == 0 { "joe" } else { "jane" }, uid);
    }
    until("all were taken", || a.status().counters.unwrap().changes == 100);
    assert!(a.peer("b").pending_bytes <= 4000, "{:?}", a.peer("b"));
    assert_eq!((a.peer("b").pending, a.peer("b").dropped), (100, 0));

    let mut b = Wire::accept(&listener);
    b.greet("b");
    let mut seqs = Vec::new();
    while seqs.len() < 100 {
        let change = b.next_change();
        b.send(Kind::Ack(Ack { epoch: change.epoch, seqs: vec![change.seq], heard_clock: 0 }));
        seqs.push(change.seq);
    }
    assert!(seqs.iter().filter(|seq| *seq % 3 == 0).is_sorted(), "{seqs:?}");
    assert!(seqs.iter().filter(|seq| *seq % 3 != 0).is_sorted(), "{seqs:?}");
    seqs.sort();
    assert_eq!(seqs, (1..=100).collect::<Vec<u64>>());
    until("nothing is pending", || a.peer("b").pending == 0);
}

#[test]
fn after_a_restart_the_stream_goes_on_where_it_was() {
    let house = House::new();
    let listener = house.listener();
    let a = house.server("a", &[("b", address(&listener))]);
    let mut b = Wire::accept(&listener);
    b.greet("b");
    let mut lmtp = a.process("lmtp");
    (1..=3).for_each(|uid| lmtp.save("jane", uid));
    let first = b.next_change();
    b.send(Kind::Ack(Ack { epoch: first.epoch, seqs: vec![first.seq], heard_clock: 0 }));
    until("the first is acknowledged", || a.peer("b").acked == 1);
    drop(a);

    let a = house.server("a", &[("b", address(&listener))]);
    assert_eq!(a.peer("b").pending, 2);
    let mut b = Wire::accept(&listener);
    b.greet("b");
    a.process("lmtp").save("jane", 4);
    for expected in 2..=4 {
        let change = b.next_change();
        assert_eq!((change.epoch, change.seq), (first.epoch, expected));
    }
}

#[test]
fn what_was_applied_before_a_restart_is_not_applied_again() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut a = b.connect_as_peer("a");
    a.send_change("jane", 1);
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    a.next_ack(1);
    drop((a, b));

    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut a = b.connect_as_peer("a");
    a.send_change("jane", 1);
    a.next_ack(1);
    a.send_change("jane", 2);
    let (_, apply) = b.next_job();
    assert_eq!(apply.changes[0].stamp.as_ref().unwrap().seq, 2);
}

#[test]
fn what_the_journal_has_no_room_for_is_dropped_for_the_slow_peer_and_said() {
    let house = House::new();
    let listener = house.listener();
    let a = house.server_with("a", &[("b", address(&listener))], |config| config.journal_bytes_max = 4000);
    let mut lmtp = a.process("lmtp");
    (1..=200).for_each(|uid| lmtp.save("jane", uid));
    until("all were taken", || a.status().counters.unwrap().changes == 200);
    let dropped = a.peer("b").dropped;
    assert!(dropped > 50 && a.peer("b").pending + dropped == 200, "{:?}", a.peer("b"));
    let needs_a_person =
        format!("{dropped} changes did not fit into the journal: compare it (doveadm dovetail failed)");
    assert_eq!(a.peer("b").last_error, needs_a_person);
    let failed = a.failed();
    assert_eq!((failed.len(), failed[0].peer.as_str(), failed[0].user.as_str()), (1, "b", "jane"));

    let mut b = Wire::accept(&listener);
    b.greet("b");
    assert_eq!(b.next_change().seq, dropped + 1);

    // Compared by a person.
    assert_eq!(a.clear_failed(None), 1);
    assert_eq!((a.peer("b").dropped, a.peer("b").last_error.as_str()), (0, ""));
}

#[test]
fn nothing_but_loopback_is_connected_to() {
    let house = House::new();
    let a = house.server("a", &[("b", "192.0.2.1:4190".into())]);
    until("it is refused", || a.peer("b").state == "refused");
    assert!(a.peer("b").last_error.contains("dovetail_insecure_plaintext"), "{:?}", a.peer("b"));
}

#[test]
fn stragglers_are_put_in_order_and_holes_are_read_from_the_log() {
    let house = House::new();
    let (a, b) = house.pair();
    let (mut first, mut second) = (a.process("lmtp"), a.process("imap"));
    first.save_with_span("jane", 1, (100, 200));
    until("the log's end is known", || a.status().counters.unwrap().changes == 1);
    second.save_with_span("jane", 3, (300, 400));
    until("it arrived", || a.status().counters.unwrap().changes == 2);
    first.save_with_span("jane", 2, (200, 300));
    let mut uids = Vec::new();
    while uids.len() < 3 {
        let (worker, apply) = b.next_job();
        uids.extend(apply.changes.iter().map(uid_of));
        worker.applied(&apply);
    }
    assert_eq!(uids, [1, 2, 3]);
    assert_eq!(a.status().counters.unwrap().gaps, 0);

    second.save_with_span("jane", 4, (500, 600));
    let (worker, look) = a.next_look();
    let wanted = &look.mailboxes[0];
    assert_eq!((wanted.log_seq, wanted.end, wanted.until_seq, wanted.until), (2, 400, 2, 500));
    worker.found(look.job, vec![save("jane", 44)], Some(((2, 400), (2, 500))));
    let mut uids = Vec::new();
    while uids.len() < 2 {
        let (worker, apply) = b.next_job();
        uids.extend(apply.changes.iter().map(uid_of));
        worker.applied(&apply);
    }
    assert_eq!(uids, [44, 4], "what was found in the hole leaves first");
    let counters = a.status().counters.unwrap();
    assert_eq!((counters.gaps, counters.healed), (1, 1));

    // What is told of a part that was read is known.
    first.save_with_span("jane", 5, (400, 500));
    first.save_with_span("jane", 6, (600, 700));
    let (_, apply) = b.next_job();
    assert_eq!(uid_of(&apply.changes[0]), 6);
}

#[test]
fn what_was_done_to_a_mailbox_before_a_worker_found_it_deleted_is_not_told_behind_that() {
    let house = House::new();
    let (a, b) = house.pair();
    let mut imap = a.process("imap");
    let mailbox = Mailbox { guid: vec![1; 16], path: vec!["INBOX".into()], ..Default::default() };
    imap.send(Kind::Intent(Intent { user: "jane".into(), mailbox: Some(mailbox.clone()), peers: None }));
    imap.save_with_span("jane", 1, (100, 200));
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    drop(imap);
    let (worker, look) = a.next_look();
    worker.found(look.job, vec![change("jane", mailbox.clone(), What::Delete(Default::default()))], None);
    let (worker, apply) = b.next_job();
    assert!(matches!(apply.changes[0].ops[0].what, Some(What::Delete(_))));
    worker.applied(&apply);

    let rename = MailboxRename { new_path: vec!["News".into()], ..Default::default() };
    let new = Mailbox { guid: vec![2; 16], ..mailbox.clone() };
    let late = [
        save("jane", 2),
        change("jane", mailbox.clone(), What::Rename(rename)),
        change("jane", mailbox, What::Delete(Default::default())),
        change("jane", new, What::Create(Default::default())),
    ];
    let mut lmtp = a.process("lmtp");
    for change in late {
        let stamp = Some(Stamp { clock: 1, ..Default::default() });
        lmtp.send(Kind::Record(Record { change: Some(Change { stamp, ..change }), ..Default::default() }));
    }
    let (_, apply) = b.next_job();
    let told = &apply.changes[0];
    assert_eq!((apply.changes.len(), &told.mailbox.as_ref().unwrap().guid[..]), (1, &[2; 16][..]), "{told:?}");
}

#[test]
fn a_process_that_ends_without_a_goodbye_makes_its_mailboxes_be_looked_at() {
    let house = House::new();
    let (a, b) = house.pair();
    let mut imap = a.process("imap");
    let mailbox = Mailbox { guid: vec![1; 16], path: vec!["INBOX".into()], ..Default::default() };
    imap.send(Kind::Intent(Intent { user: "jane".into(), mailbox: Some(mailbox), peers: None }));
    imap.save_with_span("jane", 1, (100, 200));
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    drop(imap);
    let (worker, look) = a.next_look();
    assert_eq!((look.user.as_str(), look.whole), ("jane", false));
    let wanted = &look.mailboxes[0];
    assert_eq!((wanted.end, wanted.until_seq, wanted.path.clone()), (200, 0, vec!["INBOX".to_string()]));
    worker.found(look.job, vec![save("jane", 2)], Some(((2, 200), (2, 250))));
    let (_, apply) = b.next_job();
    assert_eq!(uid_of(&apply.changes[0]), 2);
}

#[test]
fn after_a_start_every_user_is_looked_at_from_where_the_logs_were_known() {
    let house = House::new();
    let a = house.server("a", &[("b", "127.0.0.1:9".into())]);
    let mut lmtp = a.process("lmtp");
    lmtp.save_with_span("jane", 1, (100, 200));
    lmtp.save_with_span("jane", 2, (200, 300));
    lmtp.save_with_span("joe", 1, (100, 150));
    // Held, because what is before it is missing: not known, so that the next relay finds it.
    lmtp.save_with_span("joe", 3, (170, 180));
    until("all were taken", || a.status().counters.unwrap().changes == 4);
    drop((lmtp, a));

    let a = house.server("a", &[("b", "127.0.0.1:9".into())]);
    let mut ends = Vec::new();
    for _ in 0..2 {
        let (worker, look) = a.next_look();
        assert!(look.whole);
        ends.push((look.user.clone(), look.mailboxes[0].end));
        worker.finish(Kind::Looked(Looked { job: look.job, looked_at: 1, ..Default::default() }));
    }
    assert_eq!(ends, [("jane".to_string(), 300), ("joe".to_string(), 150)]);

    // And of those whom it does not know, who had mail since it was killed. A worker that goes away is no answer.
    let (mut worker, look) = a.next_look();
    assert!(look.users);
    worker.send(Kind::Looked(Looked { job: look.job, more: true, users: vec!["gone".into()], ..Default::default() }));
    drop(worker);
    let (mut worker, look) = a.next_look();
    assert!(look.users);
    let users = vec!["jane".to_string(), "newcomer".to_string(), "joe".to_string()];
    worker.send(Kind::Looked(Looked { job: look.job, more: true, users, ..Default::default() }));
    worker.finish(Kind::Looked(Looked { job: look.job, ..Default::default() }));
    let (worker, look) = a.next_look();
    assert_eq!((look.user.as_str(), look.whole, look.written_since > 0), ("newcomer", true, true));
    worker.finish(Kind::Looked(Looked { job: look.job, ..Default::default() }));
    until("nobody is left", || a.status().counters.unwrap().looking == 0);
}

#[test]
fn a_log_that_is_read_from_its_beginning_may_hold_what_was_told_before_the_relay_was_killed() {
    let house = House::new();
    let a = house.server("a", &[("b", "127.0.0.1:9".into())]);
    let mut imap = a.process("imap");
    imap.save_with_span("jane", 1, (100, 200));
    let work = Mailbox { guid: vec![7; 16], path: vec!["Work".into()], ..Default::default() };
    let created = change("jane", work.clone(), What::Create(MailboxCreate::default()));
    let saved = Change { mailbox: Some(work), ..save("jane", 1) };
    for change in [created, saved] {
        imap.send(Kind::Record(Record { change: Some(change), ..Default::default() }));
    }
    until("all were taken", || a.status().counters.unwrap().changes == 3);
    drop((imap, a));

    let a = house.server("a", &[("b", "127.0.0.1:9".into())]);
    let (_, look) = a.next_look();
    let mut known: Vec<_> = look.mailboxes.iter().map(|at| (at.path.concat(), at.log_seq, at.was_told)).collect();
    known.sort();
    assert_eq!(known, [("INBOX".to_string(), 2, false), ("Work".to_string(), 0, true)]);
}

#[test]
fn what_a_look_has_told_before_the_relay_was_killed_may_be_gone_when_it_is_found_again() {
    let house = House::new();
    let a = house.server("a", &[("b", "127.0.0.1:9".into())]);
    let mut imap = a.process("imap");
    let mailbox = Mailbox { guid: vec![1; 16], path: vec!["INBOX".into()], ..Default::default() };
    imap.send(Kind::Intent(Intent { user: "jane".into(), mailbox: Some(mailbox), peers: None }));
    imap.save_with_span("jane", 1, (100, 200));
    until("it is taken", || a.status().counters.unwrap().changes == 1);
    drop(imap);
    let (mut worker, look) = a.next_look();
    assert_eq!((look.mailboxes[0].end, look.mailboxes[0].was_told), (200, false));
    let found = Some(save("jane", 2));
    worker.send(Kind::Looked(Looked { job: look.job, more: true, change: found, ..Default::default() }));
    until("it is told", || a.status().counters.unwrap().healed == 1);
    drop(a);

    // Else the next look would say nothing of a message that came and went.
    let a = house.server("a", &[("b", "127.0.0.1:9".into())]);
    let (_, look) = a.next_look();
    assert_eq!((look.mailboxes[0].end, look.mailboxes[0].was_told), (200, true));
}

#[test]
fn a_name_is_told_again_to_who_finds_the_mailbox_under_an_older_one() {
    let house = House::new();
    let (a, b) = house.pair();
    let at = |name: &str| Mailbox { guid: vec![7; 16], path: vec![name.into()], ..Default::default() };
    let create = || Record {
        change: Some(change("jane", at("Work"), What::Create(MailboxCreate::default()))),
        ..Default::default()
    };
    let (mut on_a, mut on_b) = (a.process("imap"), b.process("imap"));
    on_a.send(Kind::Record(create()));
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    until("it is made", || a.peer("b").pending == 0);
    let renamed = What::Rename(MailboxRename { new_path: at("Play").path, back: vec![] });
    on_b.send(Kind::Record(Record { change: Some(change("jane", at("Work"), renamed.clone())), ..Default::default() }));
    let (worker, apply) = a.next_job();
    worker.applied(&apply);
    until("it is renamed", || b.peer("a").pending == 0);

    on_a.send(Kind::Record(create()));
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    let (_, told) = a.next_job();
    assert_eq!(told.changes[0].ops[0].what, Some(renamed));
}

#[test]
fn what_a_killed_worker_put_into_a_maildir_is_not_told_back() {
    let house = House::new();
    let (a, b) = house.pair();
    let with_guid = |guid: &str, uid| {
        let mut change = save("jane", uid);
        let Some(What::Save(save)) = &mut change.ops[0].what else { panic!() };
        save.guid = guid.into();
        save.birth = Some(Birth { guid: vec![1; 16], uid, ..Default::default() });
        change
    };
    let saves = |apply: &Apply| -> Vec<String> {
        let ops = apply.changes.iter().flat_map(|change| &change.ops);
        let guid = |op: &dovetail::wire::proto::Op| match &op.what {
            Some(What::Save(save)) => Some(save.guid.clone()),
            _ => None,
        };
        ops.filter_map(guid).collect()
    };
    let one = with_guid("one", 1);
    a.process("lmtp").send(Kind::Record(Record { change: Some(one.clone()), ..Default::default() }));
    let (worker, _) = b.next_job();
    drop(worker);
    let (worker, look) = b.next_look();
    worker.found(look.job, vec![one.clone(), with_guid("two", 2)], None);
    let mut told = Vec::new();
    while told.is_empty() {
        let (worker, apply) = a.next_job();
        told.extend(saves(&apply));
        worker.applied(&apply);
    }
    assert_eq!(told, ["two"], "only what nobody else did");
    let (worker, apply) = b.next_job();
    assert_eq!(saves(&apply), ["one"]);
    // It has got another UID.
    let stands = Elsewhere { mailbox_guid: vec![1; 16], uid: 1, guid: "one".into(), here: 4, ..Default::default() };
    worker.finish(Kind::Applied(Applied { job: apply.job, done: 1, elsewhere: vec![stands], ..Default::default() }));
    until("it is applied", || a.peer("b").pending == 0);

    // What its sync has found is looked at when the job is done. A copy is none of it.
    let mut imap = b.process("imap");
    imap.save_with_span("jane", 8, (400, 500));
    let (worker, look) = b.next_look();
    let found = vec![with_guid("one", 4), with_guid("three", 3), with_guid("one", 5)];
    worker.found(look.job, found, Some(((2, 0), (2, 400))));
    let mut told = Vec::new();
    while told.len() < 2 {
        let (worker, apply) = a.next_job();
        told.extend(saves(&apply));
        worker.applied(&apply);
    }
    assert_eq!(told[..2], ["three", "one"]);
}

#[test]
fn what_a_killed_worker_did_to_the_list_of_mailboxes_is_not_told_back() {
    let house = House::new();
    let (a, b) = house.pair();
    let mut imap = a.process("imap");
    let at = |path: &[&str]| Mailbox {
        guid: vec![7; 16],
        path: path.iter().map(|part| part.to_string()).collect(),
        ..Default::default()
    };
    let renamed = |to: &[&str]| What::Rename(MailboxRename { new_path: at(to).path, back: vec![] });
    let subscribed = |subscribed| What::Subscription(Subscription { subscribed });
    let create = || What::Create(MailboxCreate::default());
    for (number, (told, found)) in [
        (change("jane", at(&["Work"]), create()), change("jane", at(&["Work"]), create())),
        (change("jane", at(&["Work"]), subscribed(true)), change("jane", at(&["Work"]), subscribed(true))),
        // A rename takes what is below along.
        (
            change("jane", at(&["Work"]), renamed(&["Play"])),
            change("jane", Mailbox { guid: vec![8; 16], ..at(&["Work", "Now"]) }, renamed(&["Play", "Now"])),
        ),
    ]
    .into_iter()
    .enumerate()
    {
        imap.send(Kind::Record(Record { change: Some(told), ..Default::default() }));
        until("it is given to a worker", || {
            // A look at the new mailbox holds it up.
            assert!(a.try_next_job(Duration::from_millis(20)).is_none());
            b.try_next_job(Duration::from_millis(50)).is_some()
        });
        // Which is gone with it.
        let (worker, look) = b.next_look();
        assert!(look.whole);
        let news = Mailbox { guid: vec![20 + number as u8; 16], ..at(&["News", &number.to_string()]) };
        worker.found(look.job, vec![found, change("jane", news.clone(), create())], None);
        let (worker, apply) = a.next_job();
        let told: Vec<_> = apply.changes.iter().map(|change| change.mailbox.clone().unwrap().path).collect();
        assert_eq!(told, [news.path], "only what nobody else did");
        worker.applied(&apply);
        until("it is applied", || {
            // Each alone.
            if let Some((worker, apply)) = b.try_next_job(Duration::from_millis(50)) {
                worker.applied(&apply);
            }
            a.peer("b").pending == 0
        });
    }
}

/// What is in the logs is on its way: told by a look, copies would come without their sources, and behind what was done next.
#[test]
fn of_who_changed_a_subscription_while_the_relay_started_only_the_list_is_looked_at() {
    let house = House::new();
    let a = house.server("a", &[("b", "127.0.0.1:9".into())]);
    let mut imap = a.process("imap");
    let subscribed = What::Subscription(Subscription { subscribed: true });
    let told = change("jane", named(1, &["Work"]), subscribed);
    imap.send(Kind::Record(Record { change: Some(told), ..Default::default() }));
    let (_worker, look) = a.next_look();
    assert!(look.whole && look.list_only);
}

/// A change of a peer that had applied ours up to `heard`.
fn theirs(seq: u64, clock: u64, heard: Option<(u64, u64)>, mailbox: Mailbox, what: What) -> Change {
    let vector = heard.map(|(epoch, seq)| SeqOf { origin: "b".into(), epoch, seq });
    let stamp = Stamp { origin: "a".into(), epoch: 5, seq, clock, vector: vector.into_iter().collect() };
    Change { stamp: Some(stamp), ..change("jane", mailbox, what) }
}

fn named(guid: u8, path: &[&str]) -> Mailbox {
    let path = path.iter().map(|part| part.to_string()).collect();
    Mailbox { guid: vec![guid; 16], path, ..Default::default() }
}

fn rename_to(path: &[&str]) -> What {
    What::Rename(MailboxRename { new_path: named(1, path).path, back: vec![] })
}

fn only_op(apply: &Apply) -> What {
    apply.changes[0].ops[0].what.clone().unwrap()
}

const FAR_AHEAD: u64 = 4_000_000_000_000_000;

#[test]
fn of_two_names_the_later_holds_and_what_was_named_later_goes_back() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut imap = b.process("imap");
    let tell = |imap: &mut Wire, mailbox, what| {
        imap.send(Kind::Record(Record { change: Some(change("jane", mailbox, what)), ..Default::default() }));
    };
    tell(&mut imap, named(1, &["Work"]), What::Create(MailboxCreate::default()));
    tell(&mut imap, named(1, &["Work"]), rename_to(&["Play"]));
    tell(&mut imap, named(2, &["Family", "New"]), What::Create(MailboxCreate::default()));
    tell(&mut imap, named(1, &["News"]), What::Subscription(Subscription { subscribed: true }));
    until("they are told", || b.status().counters.unwrap().changes == 4);

    let mut a = b.connect_as_peer("a");
    let ask = |a: &mut Wire, change: Change| {
        a.send(Kind::Change(change));
        let (worker, apply) = b.next_job();
        worker.applied(&apply);
        only_op(&apply)
    };
    let family = named(3, &["Family"]);
    assert_eq!(ask(&mut a, theirs(1, 1, None, named(1, &["Work"]), rename_to(&["Job"]))), rename_to(&["Play"]));
    let back = vec![named(2, &["Family", "New"])];
    let clan = What::Rename(MailboxRename { new_path: vec!["Clan".into()], back });
    assert_eq!(ask(&mut a, theirs(2, 2, None, family.clone(), rename_to(&["Clan"]))), clan);
    let unsubscribed = What::Subscription(Subscription { subscribed: false });
    let subscribed = What::Subscription(Subscription { subscribed: true });
    assert_eq!(ask(&mut a, theirs(3, 3, None, named(1, &["News"]), unsubscribed.clone())), subscribed);

    // And the other way round.
    assert_eq!(ask(&mut a, theirs(4, FAR_AHEAD, None, named(1, &["Work"]), rename_to(&["Job"]))), rename_to(&["Job"]));
    assert_eq!(ask(&mut a, theirs(5, FAR_AHEAD, None, named(1, &["News"]), unsubscribed.clone())), unsubscribed);
    let counters = b.status().counters.unwrap();
    let count = |kind: &str| counters.notes.iter().find(|note| note.name == kind).map_or(0, |note| note.count);
    assert_eq!((count("rename_conflict"), count("subscription_conflict")), (2, 1));
}

/// Whichever comes first: here b's own.
#[test]
fn of_changes_with_one_clock_that_of_the_server_whose_name_sorts_last_holds() {
    let house = House::new();
    let for_c = house.listener();
    let b = house.server("b", &[("a", "127.0.0.1:9".into()), ("c", address(&for_c))]);
    let mailbox = || named(1, &["Work"]);
    let subscription = |subscribed| What::Subscription(Subscription { subscribed });
    let flags = |is_set, first_uid, last_uid| {
        let messages = vec![MessageRange { first_uid, last_uid, ..Default::default() }];
        let (add, remove) = if is_set { (8, 0) } else { (0, 8) };
        What::Flags(FlagUpdate { messages, add, remove, ..Default::default() })
    };
    let ours = [rename_to(&["Play"]), subscription(true), flags(true, 1, 1)];
    let theirs = [rename_to(&["Job"]), subscription(false), flags(false, 1, 2)];
    let mut imap = b.process("imap");
    for what in [What::Create(MailboxCreate::default())].into_iter().chain(ours.clone()) {
        imap.send(Kind::Record(Record { change: Some(change("jane", mailbox(), what)), ..Default::default() }));
    }
    until("they are told", || b.status().counters.unwrap().changes == 4);

    let [rename, subscribed, _] = ours;
    let mut c = Wire::accept(&for_c);
    c.greet("c");
    c.next_whole_change();
    let clocks = theirs.clone().map(|_| c.next_whole_change().stamp.unwrap().clock);
    let ours_hold = [rename, subscribed, flags(false, 2, 2)];
    for (origin, mut peer, holds) in [("a", b.connect_as_peer("a"), ours_hold), ("c", c, theirs.clone())] {
        for (((seq, clock), what), holds) in (1..).zip(clocks).zip(&theirs).zip(holds) {
            let stamp = Some(Stamp { origin: origin.into(), epoch: 5, seq, clock, vector: vec![] });
            peer.send(Kind::Change(Change { stamp, ..change("jane", mailbox(), what.clone()) }));
            let (worker, apply) = b.next_job();
            assert_eq!(only_op(&apply), holds, "of {origin}");
            worker.applied(&apply);
        }
    }
}

/// The peer's message, which has its UID here, and a copy of it that comes with its flags.
#[test]
fn what_was_done_to_a_message_later_was_not_done_to_its_copy_that_comes_now() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let flags = |uid| {
        let messages = vec![MessageRange { first_uid: uid, last_uid: uid, guid: "m".into(), ..Default::default() }];
        What::Flags(FlagUpdate { messages, add: 8, ..Default::default() })
    };
    let mut imap = b.process("imap");
    imap.send(Kind::Record(Record {
        change: Some(change("jane", named(1, &["Work"]), flags(2))),
        ..Default::default()
    }));
    until("it is told", || b.status().counters.unwrap().changes == 1);

    let mut a = b.connect_as_peer("a");
    let mut is_flagged = |seq, save: Save, uid| {
        let birth = Some(Birth { guid: vec![1; 16], uid, ..Default::default() });
        let save = What::Save(Save { birth, guid: "m".into(), ..save });
        let ops = [save, flags(uid)].map(|what| Op { what: Some(what) }).to_vec();
        a.send(Kind::Change(Change { ops, ..theirs(seq, 1, None, named(1, &["Work"]), flags(uid)) }));
        let (worker, apply) = b.next_job();
        worker.applied(&apply);
        apply.changes[0].ops.iter().any(|op| matches!(op.what, Some(What::Flags(_))))
    };
    assert!(is_flagged(1, Save::default(), 3), "nobody has it below the UID with which it was saved");
    assert!(!is_flagged(2, Save { found: true, ..Default::default() }, 4), "it may be the one that is here");
    assert!(!is_flagged(3, Save::default(), 1), "it may have got another UID here");
}

#[test]
fn a_mailbox_that_is_renamed_before_anybody_told_of_it_is_created() {
    let house = House::new();
    let (a, b) = house.pair();
    let mut imap = a.process("imap");
    let mut send = |name: &str, what| {
        imap.send(Kind::Record(Record { change: Some(change("jane", named(7, &[name]), what)), ..Default::default() }));
    };
    let mut all = Vec::new();
    let mut come = |count| {
        while all.len() < count {
            let (worker, apply) = b.next_job();
            worker.applied(&apply);
            all.extend(apply.changes);
        }
    };
    send("Old", rename_to(&["New"]));
    come(2);
    send("New", rename_to(&["Newer"]));
    come(3);
    let told: Vec<_> =
        all.iter().map(|change| (&change.mailbox.as_ref().unwrap().path[0][..], &change.ops[0].what)).collect();
    assert!(
        matches!(
            told[..],
            [("New", Some(What::Create(_))), ("Old", Some(What::Rename(_))), ("New", Some(What::Rename(_)))]
        ),
        "{told:?}"
    );
}

#[test]
fn a_renamed_directory_tells_what_is_below_with_numbers_of_its_own() {
    let house = House::new();
    let (a, b) = house.pair();
    let mut imap = a.process("imap");
    let directory = Mailbox { guid: vec![], ..named(1, &["Family"]) };
    for (mailbox, what) in
        [(named(2, &["Family", "New"]), What::Create(MailboxCreate::default())), (directory, rename_to(&["Clan"]))]
    {
        imap.send(Kind::Record(Record { change: Some(change("jane", mailbox, what)), ..Default::default() }));
    }
    let mut told = Vec::new();
    while told.len() < 3 {
        let (worker, apply) = b.next_job();
        told.extend(apply.changes.iter().map(|change| (change.stamp.clone().unwrap().seq, change.ops[0].what.clone())));
        worker.applied(&apply);
    }
    let expected = [What::Create(MailboxCreate::default()), rename_to(&["Clan"]), rename_to(&["Clan", "New"])];
    assert_eq!(told, expected.into_iter().enumerate().map(|(n, what)| (n as u64 + 1, Some(what))).collect::<Vec<_>>());
}

#[test]
fn a_mailbox_is_deleted_only_by_who_had_heard_of_what_was_put_into_it() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut imap = b.process("imap");
    let create = change("jane", named(1, &["Work"]), What::Create(MailboxCreate::default()));
    imap.send(Kind::Record(Record { change: Some(create), ..Default::default() }));
    until("it is told", || b.status().counters.unwrap().changes == 1);
    let epoch = b.status().epoch;

    let mut a = b.connect_as_peer("a");
    let delete = || What::Delete(MailboxDelete::default());
    for (seq, heard, keeps) in [(1, None, true), (2, Some((epoch + 1, 9)), true), (3, Some((epoch, 1)), false)] {
        a.send(Kind::Change(theirs(seq, 1, heard, named(1, &["Work"]), delete())));
        let (worker, apply) = b.next_job();
        let What::Delete(given) = only_op(&apply) else { panic!("{apply:?}") };
        assert_eq!(given.keeps, keeps);
        worker.applied(&apply);
    }
}

#[test]
fn what_a_mailbox_became_is_remembered() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut a = b.connect_as_peer("a");
    a.send(Kind::Change(theirs(1, 1, None, named(1, &["Work"]), What::Create(MailboxCreate::default()))));
    let (mut worker, apply) = b.next_job();
    let aliases = vec![Alias { guid: vec![1; 16], is: vec![2; 16], index_id: 0 }];
    worker.send(Kind::Applied(Applied { job: apply.job, more: true, aliases: aliases.clone(), ..Default::default() }));
    worker.applied(&apply);
    a.next_ack(1);

    a.send(Kind::Change(theirs(2, 2, None, named(1, &["Work"]), What::Delete(MailboxDelete::default()))));
    let (worker, apply) = b.next_job();
    assert_eq!(apply.aliases, aliases);
    worker.applied(&apply);
}

#[test]
fn a_look_that_fails_is_tried_again_and_the_reason_is_in_the_status() {
    let house = House::new();
    let (a, _b) = house.pair();
    let mut imap = a.process("imap");
    imap.send(Kind::Intent(Intent { user: "jane".into(), mailbox: None, peers: None }));
    drop(imap);
    let (worker, look) = a.next_look();
    worker.finish(Kind::Looked(Looked { job: look.job, error: "permission denied".into(), ..Default::default() }));
    until("it is said", || a.status().counters.unwrap().look_error == "user jane: permission denied");
    let (worker, look) = a.next_look();
    assert!(look.whole);
    worker.finish(Kind::Looked(Looked { job: look.job, ..Default::default() }));
    until("it is over", || a.status().counters.unwrap().looking == 0);
}

/// Of several userdbs, one may list nobody.
#[test]
fn a_user_whom_the_userdb_did_not_list_is_looked_for_at_the_next_start() {
    let house = House::new();
    let start = || house.server("a", &[("b", "127.0.0.1:9".into())]);
    drop(start());
    let journal = rusqlite::Connection::open(house.path("a-journal/journal.sqlite")).unwrap();
    journal.execute("INSERT OR REPLACE INTO meta (key, value) VALUES ('unheard_since', 5)", []).unwrap();
    drop(journal);
    let a = start();
    let (mut worker, look) = a.next_look();
    assert!(look.users);
    let listed = |job, users: &[&str]| Looked {
        job,
        more: true,
        users: users.iter().map(|user| user.to_string()).collect(),
        ..Default::default()
    };
    worker.send(Kind::Looked(listed(look.job, &["jane"])));
    worker.finish(Kind::Looked(Looked { job: look.job, ..Default::default() }));
    let (worker, look) = a.next_look();
    assert_eq!((look.user.as_str(), look.written_since), ("jane", 5));
    worker.finish(Kind::Looked(Looked { job: look.job, looked_at: 100, ..Default::default() }));
    until("the search is over", || a.status().counters.unwrap().looking == 0);
    drop(a);

    let a = start();
    let (worker, look) = a.next_look();
    assert_eq!((look.user.as_str(), look.users), ("jane", false), "she is known now");
    worker.finish(Kind::Looked(Looked { job: look.job, looked_at: 200, ..Default::default() }));
    let (mut worker, look) = a.next_look();
    assert!(look.users);
    worker.send(Kind::Looked(listed(look.job, &["jane", "joe"])));
    worker.finish(Kind::Looked(Looked { job: look.job, ..Default::default() }));
    let (_, look) = a.next_look();
    assert_eq!((look.user.as_str(), look.written_since), ("joe", 5));
}

#[test]
fn a_mailbox_whose_log_does_not_tell_is_remembered() {
    let house = House::new();
    let a = house.server("a", &[("b", "127.0.0.1:9".into())]);
    let mut imap = a.process("imap");
    imap.send(Kind::Intent(Intent { user: "jane".into(), mailbox: None, peers: None }));
    drop(imap);
    let (mut worker, look) = a.next_look();
    let doubt =
        Doubt { guid: vec![1; 16], path: vec!["INBOX".into()], reason: "its log is gone".into(), ..Default::default() };
    worker.send(Kind::Looked(Looked { job: look.job, more: true, doubt: Some(doubt), ..Default::default() }));
    worker.finish(Kind::Looked(Looked { job: look.job, ..Default::default() }));
    until("it is counted", || a.status().counters.unwrap().failed == 1);
    drop(a);
    let a = house.server("a", &[("b", "127.0.0.1:9".into())]);
    assert_eq!(a.status().counters.unwrap().failed, 1);
}

#[test]
fn processes_that_end_without_a_goodbye_and_what_processes_dropped_are_counted() {
    let house = House::new();
    let a = house.server("a", &[]);
    let intent = || Kind::Intent(Intent { user: "jane".into(), mailbox: None, peers: None });
    let mut killed = a.process("imap");
    killed.send(intent());
    let mut ended = a.process("imap");
    ended.send(intent());
    ended.send(Kind::Record(Record { dropped: 4, ..Default::default() }));
    ended.send(Kind::Goodbye(Goodbye { dropped: 3 }));
    drop((killed, ended));
    until("both ends are noticed", || a.closed() >= 2);
    let counters = a.status().counters.unwrap();
    assert_eq!((counters.unclean_ends, counters.dropped_by_processes), (1, 7));
}

#[test]
fn a_body_is_pulled_through_both_relays_window_by_window() {
    let house = House::new();
    let (a, b) = house.pair();
    a.process("lmtp").save("jane", 1);
    let (mut applying, apply) = b.next_job();
    const CHUNK: usize = 40_000;
    let request = BodyRequest {
        id: 77,
        origin: "a".into(),
        user: "jane".into(),
        uid: 1,
        window: CHUNK as u32,
        ..Default::default()
    };
    applying.send(Kind::BodyRequest(request));

    let (mut reading, request) = a.next_read();
    assert_eq!((request.user.as_str(), request.uid, request.window), ("jane", 1, CHUNK as u32));
    for round in 0..5_u8 {
        reading.send(Kind::BodyChunk(BodyChunk { id: request.id, data: vec![round; CHUNK], ..Default::default() }));
        match applying.next() {
            Kind::BodyChunk(chunk) => assert_eq!((chunk.id, chunk.data), (77, vec![round; CHUNK])),
            other => panic!("{other:?}"),
        }
        applying.send(Kind::BodyMore(BodyMore { id: 77, bytes: CHUNK as u32 }));
        match reading.next() {
            Kind::BodyMore(more) => assert_eq!((more.id, more.bytes), (request.id, CHUNK as u32)),
            other => panic!("{other:?}"),
        }
    }
    reading.finish(Kind::BodyChunk(BodyChunk { id: request.id, last: true, ..Default::default() }));
    assert!(matches!(applying.next(), Kind::BodyChunk(BodyChunk { id: 77, last: true, .. })));
    applying.applied(&apply);
    until("it is acknowledged", || a.peer("b").acked == 1);

    // The reading worker is free again; this time it sends more than it may.
    a.process("lmtp").save("jane", 2);
    let (mut applying, _) = b.next_job();
    let request =
        BodyRequest { id: 78, origin: "a".into(), user: "jane".into(), uid: 2, window: 10, ..Default::default() };
    applying.send(Kind::BodyRequest(request));
    let (mut reading, request) = a.next_read();
    reading.send(Kind::BodyChunk(BodyChunk { id: request.id, data: vec![0; 11], ..Default::default() }));
    match applying.next() {
        Kind::BodyChunk(chunk) => assert!(chunk.last && chunk.error.contains("worker"), "{chunk:?}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_body_whose_end_is_gone_is_given_up_at_the_other() {
    let house = House::new();
    let (a, b) = house.pair();
    a.process("lmtp").save("jane", 1);
    let (mut applying, _) = b.next_job();
    let request =
        BodyRequest { id: 1, origin: "a".into(), user: "jane".into(), uid: 1, window: 1 << 20, ..Default::default() };
    applying.send(Kind::BodyRequest(request));
    let (mut reading, asked) = a.next_read();
    drop(applying);
    match reading.next() {
        Kind::BodyCancel(cancel) => assert_eq!(cancel.id, asked.id),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_orderly_end_waits_for_the_last_acknowledgements() {
    let house = House::new();
    let (a, b) = house.pair();
    let mut lmtp = a.process("lmtp");
    lmtp.save("jane", 1);
    until("it arrived", || a.status().counters.unwrap().changes == 1);
    let stopping = std::thread::spawn(move || drop(a));
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    stopping.join().unwrap();
    assert!(lmtp.is_closed());
}

#[test]
fn what_a_process_could_send_before_the_end_is_not_lost() {
    let house = House::new();
    let (a, b) = house.pair();
    let mut lmtp = a.process("lmtp");
    let sending = std::thread::spawn(move || (1..=200).take_while(|uid| lmtp.try_save("jane", *uid)).count());
    until("some arrived", || a.status().counters.unwrap().changes >= 50);
    let stopping = std::thread::spawn(move || drop(a));
    let mut applied = 0;
    while let Some((worker, apply)) = b.try_next_job(Duration::from_secs(1)) {
        applied += apply.changes.len();
        worker.applied(&apply);
    }
    stopping.join().unwrap();
    assert_eq!(applied, sending.join().unwrap());
}

#[test]
fn a_name_is_resolved() {
    // Not an address as written, and no name that only a DNS server or a hosts file knows.
    let house = House::new();
    let listener = house.listener();
    let port = listener.local_addr().unwrap().port();
    let a = house.server("a", &[("b", format!("127.1:{port}"))]);
    let mut b = Wire::accept(&listener);
    b.greet("b");
    until("it is connected", || a.peer("b").state == "connected");
}

#[test]
fn a_peer_whose_clock_is_wrong_is_reported_until_it_is_right() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let now_us = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64;
    let hour_us = 3_600_000_000;
    for (clock, now_us, reported) in [
        (0, now_us + hour_us, " seconds ahead of this server's"),
        (0, now_us - hour_us, " seconds behind this server's"),
        (u64::MAX, now_us, "its clock is years ahead of this server's"),
        (0, now_us, ""),
    ] {
        let mut a = b.connect();
        let (server, instance) = ("a".to_owned(), b"a5".to_vec());
        a.send(Kind::Hello(Hello { server, instance, epoch: 5, clock, now_us, ..Default::default() }));
        assert!(matches!(a.next(), Kind::Hello(_)));
        let peer = b.peer("a");
        assert_eq!(peer.state, "connected");
        assert!(peer.last_error.ends_with(reported) && peer.last_error.is_empty() == reported.is_empty(), "{peer:?}");
    }
}

#[test]
fn who_asks_for_the_status_of_nothing_is_told_so() {
    let house = House::new();
    let error = client::status(&house.path("nothing"), None, Duration::from_secs(1)).unwrap_err();
    assert!(error.starts_with("connect("), "{error}");
}

#[test]
fn a_change_that_can_never_be_applied_is_set_aside_after_some_tries() {
    let house = House::new();
    let (a, b) = house.pair();
    let mut lmtp = a.process("lmtp");
    lmtp.save("jane", 1);
    for _ in 0..3 {
        let (worker, apply) = b.next_job();
        assert_eq!(apply.changes[0].stamp.as_ref().unwrap().seq, 1);
        lmtp.save("jane", 2);
        let error = "mailbox x: malformed change: no".to_owned();
        worker.finish(Kind::Applied(Applied { job: apply.job, error, never: true, ..Default::default() }));
    }
    let mut seqs = Vec::new();
    while seqs.len() < 3 {
        let (worker, apply) = b.next_job();
        seqs.extend(apply.changes.iter().map(|change| change.stamp.as_ref().unwrap().seq));
        worker.applied(&apply);
    }
    assert_eq!(seqs, [2, 3, 4], "the user's others go on");
    until("all is acknowledged", || a.peer("b").pending == 0);
    let failed = b.failed();
    assert_eq!((failed.len(), failed[0].peer.as_str(), failed[0].user.as_str(), failed[0].seq), (1, "a", "jane", 1));
    assert!(failed[0].error.contains("malformed"), "{failed:?}");
    assert_eq!(b.status().counters.unwrap().failed, 1);
}

/// What is kept of the only change that was set aside.
fn set_aside(house: &House) -> Change {
    let journal = rusqlite::Connection::open(house.path("b-journal/journal.sqlite")).unwrap();
    let bytes: Vec<u8> = journal.query_row("SELECT frame FROM failed", [], |row| row.get(0)).unwrap();
    Change::decode(&bytes[..]).unwrap()
}

#[test]
fn a_change_on_which_workers_die_is_set_aside_after_some_tries_and_kept() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut a = b.connect_as_peer("a");
    a.send_change("jane", 1);
    for tries in 1.. {
        let (worker, apply) = b.next_job();
        assert_eq!((apply.changes.len(), apply.changes[0].stamp.as_ref().unwrap().seq), (1, 1));
        drop(worker);
        // Workers do other things.
        let (worker, look) = b.next_look();
        worker.finish(Kind::Looked(Looked { job: look.job, ..Default::default() }));
        if tries == 8 {
            break;
        }
        assert_eq!(a.next_refusal().seq, 1);
        a.send_change("jane", 1);
    }
    a.next_ack(1);
    let failed = b.failed();
    assert_eq!((failed.len(), failed[0].peer.as_str(), failed[0].user.as_str(), failed[0].seq), (1, "a", "jane", 1));
    assert!(failed[0].mailbox_guid == [1; 16] && failed[0].error.contains("went away"), "{failed:?}");
    assert_eq!(set_aside(&house).ops, save("jane", 1).ops);
    a.send_change("jane", 2);
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    a.next_ack(2);
}

/// A change of user jane with number 1 that does not decode.
fn broken_change() -> Vec<u8> {
    let stamp = Some(Stamp { origin: "a".into(), epoch: 5, seq: 1, clock: 1, vector: vec![] });
    let path = vec!["not a text".to_owned()];
    let change = Change {
        stamp,
        ..change("jane", Mailbox { path, ..Default::default() }, What::Create(MailboxCreate::default()))
    };
    let mut broken = frame::encode(&Kind::Change(change).into()).unwrap();
    let at = broken.windows(3).position(|bytes| bytes == b"not").unwrap();
    broken[at] = 0xff;
    broken
}

#[test]
fn a_change_that_does_not_decode_is_set_aside_and_others_go_on() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut a = b.connect_as_peer("a");
    let broken = broken_change();
    for _ in 0..2 {
        a.send_bytes(&broken);
        assert_eq!(a.next_refusal().user, "jane");
    }
    a.send_change("joe", 2);
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    a.next_ack(2);
    a.send_bytes(&broken);
    a.next_ack(1);
    let failed = b.failed();
    assert_eq!((failed.len(), failed[0].peer.as_str(), failed[0].user.as_str(), failed[0].seq), (1, "a", "jane", 1));
    assert_eq!(set_aside(&house).user, "jane");
}

/// What it would have brought, the comparison finds, if it is missing.
#[test]
fn the_user_of_a_change_that_was_set_aside_is_compared_and_what_was_listed_is_over_if_both_have_the_same() {
    let house = House::new();
    let edit = |config: &mut dovetail::relay::Config| config.compare_listed_after_us = Some(0);
    let b = house.server_with("b", &[("a", "127.0.0.1:9".into())], edit);
    let mut a = b.connect_as_peer("a");
    for _ in 0..2 {
        a.send_bytes(&broken_change());
        assert_eq!(a.next_refusal().user, "jane");
    }
    a.send_bytes(&broken_change());
    a.next_ack(1);
    assert_eq!(b.failed()[0].seq, 1);

    let question = a.next_question();
    assert_eq!(question.survey.map(|survey| survey.user).unwrap_or_default(), "jane");
    let (worker, survey) = b.next_survey();
    worker.finish(Kind::Surveyed(Surveyed { job: survey.job, ..Default::default() }));
    a.send(Kind::Answer(Answer { id: question.id, ..Default::default() }));
    until("nothing is listed any more", || b.status().counters.unwrap().failed == 0);
    assert!(b.failed().is_empty());
}

#[test]
fn what_failed_is_cleared_of_one_user_or_of_all() {
    let house = House::new();
    let a = house.server("a", &[("b", "127.0.0.1:9".into())]);
    let mut imap = a.process("imap");
    for user in ["jane", "joe", "jim"] {
        imap.send(Kind::Record(Record { change: Some(Change { ops: vec![], ..save(user, 1) }), ..Default::default() }));
    }
    until("they are listed", || a.failed().len() == 3);
    assert_eq!(a.clear_failed(Some("nobody")), 0);
    assert_eq!(a.clear_failed(Some("joe")), 1);
    assert!(a.failed().iter().all(|entry| entry.user != "joe"));
    assert_eq!(a.status().counters.unwrap().failed, 2);
    assert_eq!(a.clear_failed(None), 2);
    assert_eq!((a.failed().len(), a.status().counters.unwrap().failed), (0, 0));
    drop(a);
    let a = house.server("a", &[("b", "127.0.0.1:9".into())]);
    assert_eq!(a.status().counters.unwrap().failed, 0);
}

#[test]
fn all_users_who_wait_are_listed_and_the_status_counts_them() {
    let house = House::new();
    let (a, b) = house.pair();
    let mut lmtp = a.process("lmtp");
    for user in ["jane", "joe", "jim"] {
        lmtp.save(user, 1);
    }
    let sent = || a.waiting().into_iter().filter(|entry| entry.what == "send").collect::<Vec<_>>();
    while sent().len() < 3 {
        let (worker, apply) = b.next_job();
        let error = format!("no mail for {}", apply.user);
        worker.finish(Kind::Applied(Applied { job: apply.job, error, ..Default::default() }));
    }
    for entry in sent() {
        assert_eq!((entry.peer.as_str(), entry.reason), ("b", format!("no mail for {}", entry.user)));
        assert!(entry.since_us > 0 && (entry.next_us == 0 || entry.next_us > entry.since_us));
    }
    assert_eq!(a.peer("b").last_error, "user jane: no mail for jane (and 2 other users wait)");

    lmtp.send(Kind::Intent(Intent { user: "ann".into(), mailbox: None, peers: None }));
    drop(lmtp);
    let (worker, look) = a.next_look();
    let error = "locked".to_owned();
    worker.finish(Kind::Looked(Looked { job: look.job, error, ..Default::default() }));
    until("the look is listed", || a.waiting().len() == 4);
    let look = a.waiting().into_iter().find(|entry| entry.what == "look").unwrap();
    assert_eq!((look.user.as_str(), look.peer.as_str(), look.reason.as_str()), ("ann", "", "locked"));
    assert!(a.peer("b").last_error.ends_with("(and 3 other users wait)"));
}

/// Each try may take as long as Dovecot waits for a lock.
#[test]
fn users_for_whom_something_failed_hold_a_part_of_the_workers_only() {
    let house = House::new();
    let b = house.server_with("b", &[("a", "127.0.0.1:9".into())], |config| config.workers = 3);
    let mut a = b.connect_as_peer("a");
    let waiting = ["jane", "joe", "jim"];
    for (user, seq) in waiting.iter().zip(1..) {
        a.send_change(user, seq);
        let (worker, apply) = b.next_job();
        worker.finish(Kind::Applied(Applied { job: apply.job, error: "locked".into(), ..Default::default() }));
        a.next_refusal();
    }
    for (user, seq) in waiting.iter().zip(1..) {
        a.send_change(user, seq);
    }
    let (held, first) = b.next_job();
    assert_eq!(first.user, "jane");
    let others = ["ann", "bob"].map(|user| {
        a.send_change(user, 10 + user.len() as u64 + u64::from(user == "ann"));
        let (worker, apply) = b.next_job();
        assert_eq!(apply.user, user);
        (worker, apply)
    });
    for (worker, apply) in others {
        worker.applied(&apply);
    }
    held.applied(&first);
    for user in &waiting[1..] {
        let (worker, apply) = b.next_job();
        assert_eq!(apply.user, *user);
        worker.applied(&apply);
    }
}

#[test]
fn a_malformed_change_is_set_aside_after_some_tries() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mut a = b.connect_as_peer("a");
    let malformed = |seq| {
        let stamp = Some(Stamp { origin: "a".into(), epoch: 5, seq, clock: 1, vector: vec![] });
        Kind::Change(Change { stamp, ops: vec![], ..save("jane", 1) })
    };
    for _ in 0..2 {
        a.send(malformed(1));
        assert!(matches!(a.next(), Kind::Refused(refused) if refused.seq == 1));
    }
    a.send(malformed(1));
    a.next_ack(1);
    a.send_change("jane", 2);
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    a.next_ack(2);
    let failed = b.failed();
    assert_eq!((failed.len(), failed[0].peer.as_str(), failed[0].user.as_str(), failed[0].seq), (1, "a", "jane", 1));
    assert_eq!(failed[0].mailbox_guid, [1; 16]);
    assert!(failed[0].error.contains("malformed"), "{failed:?}");
}

#[test]
fn a_journal_that_was_set_back_is_noticed_and_no_change_is_taken_for_an_old_one() {
    let house = House::new();
    let listener = house.listener();
    let a = house.server("a", &[("b", address(&listener))]);
    let mut b = Wire::accept(&listener);
    let epoch = b.greet("b").epoch;
    a.process("lmtp").save("jane", 1);
    assert_eq!(b.next_change().seq, 1);
    drop((a, b));

    // The peer has applied changes up to 500, of which the journal knows nothing.
    let a = house.server("a", &[("b", address(&listener))]);
    a.process("lmtp").save("jane", 2);
    until("it was taken", || a.status().counters.unwrap().changes == 1);
    until("it begins anew", || {
        if let Some(mut b) = Wire::try_accept(&listener) {
            b.say_hello_knowing("b", epoch, 500);
            assert!(b.is_closed());
        }
        a.has_failed()
    });
    drop(a);

    let a = house.server("a", &[("b", address(&listener))]);
    let mut b = Wire::accept(&listener);
    b.greet_knowing("b", epoch, 500);
    let change = b.next_change();
    assert!(change.epoch > epoch && change.seq > 500);
    drop(a);
}

#[test]
fn a_change_of_flags_that_an_earlier_one_of_a_peer_undid_is_made_again_before_all_else() {
    let house = House::new();
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let mailbox = || Mailbox { guid: vec![1; 16], path: vec!["INBOX".into()], ..Default::default() };
    let flags = |is_set: bool, uids: (u32, u32)| {
        let messages = vec![MessageRange { first_uid: uids.0, last_uid: uids.1, ..Default::default() }];
        let (add, remove) = if is_set { (8, 0) } else { (0, 8) };
        What::Flags(FlagUpdate { messages, add, remove, ..Default::default() })
    };
    let span = |begin, end, applied| {
        let touches = true;
        Span {
            user: "jane".into(),
            mailbox_guid: vec![1; 16],
            log_seq: 2,
            begin,
            end,
            applied,
            touches,
            ..Default::default()
        }
    };
    let mut a = b.connect_as_peer("a");
    let mut send = |seq, is_set, uids| {
        let stamp = Some(Stamp { origin: "a".into(), epoch: 5, seq, clock: seq, vector: vec![] });
        a.send(Kind::Change(Change { stamp, ..change("jane", mailbox(), flags(is_set, uids)) }));
    };
    send(1, false, (1, 2));
    let (mut worker, apply) = b.next_job();
    // A client's STORE is told while the peer's change is being applied, which stands behind it in the log.
    let own = Change { spans: vec![span(40, 60, vec![])], ..change("jane", mailbox(), flags(true, (2, 3))) };
    let spans = own.spans.clone();
    b.process("imap").send(Kind::Record(Record { change: Some(own), spans, ..Default::default() }));
    until("it is told", || b.peer("a").pending == 1);
    send(2, true, (1, 3));
    let applied = vec![SeqOf { origin: "a".into(), epoch: 5, seq: 1 }];
    let spans = vec![span(60, 100, applied)];
    worker.send(Kind::Applied(Applied { job: apply.job, more: true, spans, ..Default::default() }));
    worker.applied(&apply);

    let redone = |apply: &Apply| {
        let change = &apply.changes[0];
        assert_eq!(change.stamp.as_ref().unwrap().origin, "b");
        assert_eq!(change.ops[0].what, Some(flags(true, (2, 2))));
    };
    let (worker, apply) = b.next_job();
    redone(&apply);
    drop(worker);
    // Also by the relay that comes next.
    drop(b);
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    let (worker, apply) = b.next_job();
    redone(&apply);
    let mut a = b.connect_as_peer("a");
    let stamp = Some(Stamp { origin: "a".into(), epoch: 5, seq: 2, clock: 2, vector: vec![] });
    a.send(Kind::Change(Change { stamp, ..change("jane", mailbox(), flags(true, (1, 3))) }));
    assert!(b.try_next_job(Duration::from_millis(50)).is_none(), "it waits");
    worker.applied(&apply);
    let (worker, apply) = b.next_job();
    assert_eq!(
        apply.changes[0].ops[0].what,
        Some(flags(true, (1, 1))),
        "what our later one has decided is not applied"
    );
    worker.applied(&apply);
    while !matches!(a.next(), Kind::Ack(ack) if ack.seqs == [2]) {}
    drop((a, b));
    let b = house.server("b", &[("a", "127.0.0.1:9".into())]);
    assert!(b.try_next_job(Duration::from_millis(50)).is_none(), "it is made");
}

/// B, which knows the mailbox's log up to 200, is told by its worker that the mailbox had another GUID up to `place`, and has its own
/// again.
fn gets_its_guid_back(house: &House, index_id: u32, place: u64) -> (Server, Server) {
    let (a, b) = house.pair();
    b.process("lmtp").save_with_span("jane", 1, (100, 200));
    let (worker, apply) = a.next_job();
    worker.applied(&apply);
    until("b's log is known", || b.peer("a").pending == 0);

    a.process("lmtp").save("jane", 2);
    let (mut worker, apply) = b.next_job();
    let span = |guid: u8, begin, end| {
        let user = "jane".into();
        Span { user, mailbox_guid: vec![guid; 16], index_id, log_seq: 2, begin, end, ..Default::default() }
    };
    let spans = vec![
        span(9, place - 10, place),
        Span { old_mailbox_guid: vec![9; 16], untold: true, ..span(1, place, place) },
        span(1, place, place + 100),
    ];
    worker.send(Kind::Applied(Applied { job: apply.job, more: true, spans, ..Default::default() }));
    worker.applied(&apply);
    (a, b)
}

/// Dovecot has made its index anew, with another GUID, and the worker was the first to see it. In the second test that was in the
/// second in which it had made the one before, and both have the same id.
fn is_listed_and_looked_at(index_id: u32, place: u64) {
    let house = House::new();
    let (_a, b) = gets_its_guid_back(&house, index_id, place);
    let (worker, look) = b.next_look();
    assert_eq!((look.mailboxes[0].guid.clone(), look.mailboxes[0].index_id), (vec![1; 16], u32::MAX), "all of it anew");
    worker.found(look.job, vec![], Some(((2, 100), (2, place + 100))));
    let failed = b.failed();
    assert_eq!((failed.len(), failed[0].user.as_str(), failed[0].mailbox_guid.clone()), (1, "jane", vec![1; 16]));
    assert!(failed[0].error.starts_with("mailbox INBOX: its index was made anew"), "{}", failed[0].error);
}

#[test]
fn a_mailbox_that_gets_its_guid_back_is_listed_as_one_to_be_compared_and_looked_at() {
    is_listed_and_looked_at(7, 210);
}

#[test]
fn a_mailbox_that_gets_its_guid_back_in_the_same_second_is_listed_and_looked_at() {
    is_listed_and_looked_at(0, 190);
}

/// A session that came upon a new maildir had given it another GUID.
#[test]
fn a_mailbox_that_gets_its_guid_back_and_whose_log_goes_on_is_not_listed() {
    let house = House::new();
    let (a, b) = gets_its_guid_back(&house, 0, 210);
    until("it is applied", || a.peer("b").pending == 0);
    assert!(b.failed().is_empty());
}

/// A process that saves, and waits for so many peers for that long.
fn save_and_wait(process: &mut Wire, user: &str, uid: u32, peers: u32, timeout_ms: u64) {
    let ack = Some(AckWanted { id: u64::from(uid), peers, timeout_ms });
    process.send(Kind::Record(Record { change: Some(save(user, uid)), ack, ..Default::default() }));
}

fn acked(process: &mut Wire) -> Acked {
    match process.next() {
        Kind::Acked(acked) => acked,
        other => panic!("{other:?}"),
    }
}

fn is_acked(process: &mut Wire, id: u64) {
    assert_eq!(acked(process), Acked { id, error: String::new() });
}

const LONG_MS: u64 = 60_000;

#[test]
fn a_process_that_waits_for_a_peer_hears_when_the_change_is_applied_there() {
    let house = House::new();
    let (a, b) = house.pair();
    let mut lmtp = a.process("lmtp");
    save_and_wait(&mut lmtp, "jane", 1, 0, LONG_MS);
    is_acked(&mut lmtp, 1);
    let (worker, apply) = b.next_job();
    assert_eq!(a.peer("b").acked, 0, "the relay alone was waited for");
    worker.applied(&apply);

    save_and_wait(&mut lmtp, "jane", 2, 1, LONG_MS);
    let (worker, apply) = b.next_job();
    // Whoever comes in between is answered before.
    save_and_wait(&mut lmtp, "joe", 3, 0, LONG_MS);
    is_acked(&mut lmtp, 3);
    worker.applied(&apply);
    is_acked(&mut lmtp, 2);
    // There are not so many.
    save_and_wait(&mut lmtp, "jane", 4, 7, LONG_MS);
    for _ in 0..2 {
        let (worker, apply) = b.next_job();
        worker.applied(&apply);
    }
    is_acked(&mut lmtp, 4);
}

#[test]
fn who_waits_for_a_peer_that_refuses_or_is_away_hears_why_at_once() {
    let house = House::new();
    let (a, b) = house.pair();
    let mut lmtp = a.process("lmtp");
    save_and_wait(&mut lmtp, "jane", 1, 1, LONG_MS);
    let (worker, apply) = b.next_job();
    worker.finish(Kind::Applied(Applied { job: apply.job, error: "disk full".into(), ..Default::default() }));
    let refused = acked(&mut lmtp);
    assert_eq!(refused.error, "0 peers of 1 have applied it, and these have not: b (user jane: disk full)");
    // Also for what he does next, and nobody else.
    save_and_wait(&mut lmtp, "jane", 2, 1, LONG_MS);
    assert!(acked(&mut lmtp).error.contains("disk full"));
    save_and_wait(&mut lmtp, "joe", 3, 1, LONG_MS);
    let (worker, apply) = b.next_job();
    assert_eq!(apply.user, "joe");
    worker.applied(&apply);
    is_acked(&mut lmtp, 3);

    drop(b);
    until("b is away", || a.peer("b").state != "connected");
    save_and_wait(&mut lmtp, "joe", 4, 1, 50);
    assert!(acked(&mut lmtp).error.starts_with("0 peers of 1 have applied it, and these have not: b ("));
    // It has been away for longer than this by now.
    save_and_wait(&mut lmtp, "joe", 5, 1, 49);
    assert!(acked(&mut lmtp).error.starts_with("0 peers of 1"));
    assert_eq!(a.status().counters.unwrap().unacknowledged, 0, "processes tell");
    lmtp.send(Kind::Record(Record { unacknowledged: 2, ..Default::default() }));
    until("they are counted", || a.status().counters.unwrap().unacknowledged == 2);
}

#[test]
fn of_three_servers_as_many_are_waited_for_as_wanted() {
    let house = House::new();
    let [a, b, c] = house.mesh(["a", "b", "c"]);
    let mut lmtp = a.process("lmtp");
    save_and_wait(&mut lmtp, "jane", 1, 1, LONG_MS);
    let (at_b, apply) = b.next_job();
    at_b.applied(&apply);
    is_acked(&mut lmtp, 1);
    let (at_c, apply) = c.next_job();
    at_c.applied(&apply);
    until("both have it", || a.peer("b").acked == 1 && a.peer("c").acked == 1);

    save_and_wait(&mut lmtp, "jane", 2, 2, LONG_MS);
    let (at_b, apply) = b.next_job();
    at_b.applied(&apply);
    until("b has it", || a.peer("b").acked == 2);
    save_and_wait(&mut lmtp, "joe", 3, 0, LONG_MS);
    is_acked(&mut lmtp, 3);
    let (at_c, apply) = c.next_job();
    at_c.applied(&apply);
    is_acked(&mut lmtp, 2);
}

/// Dovecot went on with the index in memory; the look that finds it anew began before the client expunged.
#[test]
fn what_a_client_expunges_while_a_look_is_under_way_does_not_come_back() {
    let house = House::new();
    let (a, b) = house.pair();
    let mut imap = a.process("imap");
    imap.save("jane", 1);
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    let inbox = Mailbox { guid: vec![1; 16], path: vec!["INBOX".into()], uid_next: 9, ..Default::default() };
    imap.send(Kind::Intent(Intent { user: "jane".into(), mailbox: Some(inbox.clone()), ..Default::default() }));
    imap.send(Kind::Record(Record { dropped: 1, ..Default::default() }));
    let (worker, look) = a.next_look();
    let one = |uid| MessageRange { first_uid: uid, last_uid: uid, ..Default::default() };
    let named = MessageRange { guid: "two".into(), guid_128: vec![2; 16], ..one(2) };
    let expunge = What::Expunge(Expunge { messages: vec![named] });
    let expunged = Some(change("jane", inbox.clone(), expunge));
    imap.send(Kind::Record(Record { expunged_in_memory: expunged, ..Default::default() }));
    until("it is heard", || a.status().counters.unwrap().records == 3);
    let rebuilt = What::Rebuilt(MailboxRebuilt { present: vec![one(1)], uid_next: 3 });
    worker.found(look.job, vec![change("jane", inbox, rebuilt)], None);
    let (worker, apply) = b.next_job();
    let Some(What::Rebuilt(told)) = &apply.changes[0].ops[0].what else { panic!("{apply:?}") };
    assert_eq!(told.present, [one(1), one(2)]);
    worker.applied(&apply);
    let (worker, look) = a.next_look();
    assert_eq!(look.mailboxes[0].expunged_in_memory.len(), 1, "the next look is told");
    worker.found(look.job, vec![], None);
}

/// Server a, to which b says that; whether a is to begin anew over it.
fn is_said_to_be_set_back(house: &House, listener: &TcpListener, begins_anew: bool, say: impl Fn(&mut Wire, u64)) {
    let a = house.server("a", &[("b", address(listener))]);
    let epoch = a.status().epoch;
    until("it is heard, when the relay has run for a while", || {
        if let Some(mut b) = Wire::try_accept(listener) {
            say(&mut b, epoch);
            assert!(b.is_closed());
        }
        match begins_anew {
            true => a.has_failed(),
            false => a.peer("b").state == "disputed" || a.status().counters.unwrap().malformed > 0,
        }
    });
    drop(a);
    let a = house.server("a", &[("b", "127.0.0.1:9".into())]);
    assert_eq!(a.status().epoch > epoch, begins_anew);
}

#[test]
fn no_peer_can_make_a_server_begin_an_epoch_that_others_do_not_take_for_one() {
    let house = House::new();
    let listener = house.listener();
    let far = (1 << 62) - 1;
    is_said_to_be_set_back(&house, &listener, false, |b, _| b.say_hello_knowing("b", far, 1));
    let set_back = |epoch| Kind::Refused(Refused { set_back: true, epoch, ..Default::default() });
    is_said_to_be_set_back(&house, &listener, false, |b, _| b.send(set_back(u64::MAX)));
    // A number that cannot be is not counted on from.
    is_said_to_be_set_back(&house, &listener, true, |b, epoch| b.say_hello_knowing("b", epoch, u64::MAX));
    let a = house.server("a", &[("b", address(&listener))]);
    let mut b = Wire::accept(&listener);
    b.greet("b");
    a.process("lmtp").save("jane", 1);
    let seq = b.next_change().seq;
    assert!(seq > 500 && seq < 1 << 50, "{seq}");
}

#[test]
fn a_peer_by_whose_word_a_server_begins_anew_is_heard_so_once_in_an_hour() {
    let house = House::new();
    let listener = house.listener();
    is_said_to_be_set_back(&house, &listener, true, |b, epoch| b.say_hello_knowing("b", epoch, 500));
    is_said_to_be_set_back(&house, &listener, false, |b, epoch| b.say_hello_knowing("b", epoch, 5_000));
    let a = house.server("a", &[("b", address(&listener))]);
    assert_eq!(a.peer("b").state, "disputed");
    a.accept_peer("b");
    drop(a);
    is_said_to_be_set_back(&house, &listener, true, |b, epoch| b.say_hello_knowing("b", epoch, 50_000));
}
