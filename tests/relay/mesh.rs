//! More than two servers.

use std::time::{Duration, Instant};

use dovetail::wire::proto::frame::Kind;
use dovetail::wire::proto::op::What;
use dovetail::wire::proto::{
    Ack, Applied, Apply, BodyChunk, BodyRequest, Bond, Change, Elsewhere, FlagUpdate, Intent, Known, Linked, Looked,
    Mailbox, MessageRange, Nack, Op, Ping, Question, Reach, Record, Save, SeqOf, Stamp, Survey, Surveyed, Tell, TellOf,
    UserPeers,
};

use super::house::*;

/// What the job's changes are, by origin and number.
fn names(apply: &Apply) -> Vec<(String, u64)> {
    let stamps = apply.changes.iter().map(|change| change.stamp.clone().unwrap());
    stamps.map(|stamp| (stamp.origin, stamp.seq)).collect()
}

/// The next job is these changes; a worker applies it.
fn applies(server: &Server, origin: &str, seqs: &[u64]) -> Apply {
    let (worker, apply) = server.next_job();
    assert_eq!(names(&apply), seqs.iter().map(|seq| (origin.to_owned(), *seq)).collect::<Vec<_>>());
    worker.applied(&apply);
    apply
}

/// Server c, which a and b connect to.
fn third(house: &House) -> Server {
    house.server("c", &[("a", "127.0.0.1:9".into()), ("b", "127.0.0.1:9".into())])
}

#[test]
fn a_change_names_the_users_changes_that_it_comes_after_and_no_others() {
    let house = House::new();
    let [a, b, c] = house.mesh(["a", "b", "c"]);
    let mut imap = a.process("imap");
    imap.save("joe", 1);
    imap.save("jane", 1);
    for server in [&b, &c, &b, &c] {
        let (worker, apply) = server.next_job();
        worker.applied(&apply);
    }
    until("both are acknowledged", || a.peer("b").acked == 2 && a.peer("c").acked == 2);
    b.process("imap").save("jane", 2);
    b.process("imap").save("jim", 1);
    let mut of_b = 0;
    for server in [&a, &a, &c, &c] {
        let (worker, apply) = server.next_job();
        let vector = &apply.changes[0].stamp.as_ref().unwrap().vector;
        let vector: Vec<_> = vector.iter().map(|seen| (seen.origin.as_str(), seen.seq)).collect();
        match apply.user.as_str() {
            "jane" => {
                of_b = apply.changes[0].stamp.as_ref().unwrap().seq;
                assert_eq!(vector, [("a", 2)]);
            }
            _ => assert_eq!(vector, []),
        }
        worker.applied(&apply);
    }
    until("both are acknowledged", || b.peer("a").acked == 2 && b.peer("c").acked == 2);
    b.process("imap").save("jane", 3);
    let (_, apply) = c.next_job();
    let vector = &apply.changes[0].stamp.as_ref().unwrap().vector;
    assert!(
        vector.iter().any(|seen| (seen.origin.as_str(), seen.seq) == ("b", of_b)),
        "its own one before: {vector:?}"
    );
}

#[test]
fn what_comes_before_its_cause_waits_for_it_and_holds_up_nobody_else() {
    let house = House::new();
    let c = third(&house);
    let (mut a, mut b) = (c.connect_as_peer("a"), c.connect_as_peer("b"));
    b.send_change_after("b", "jane", 1, &[("a", 7)]);
    b.send_change_after("b", "jane", 2, &[("a", 7), ("b", 1)]);
    b.send_change_of("b", "joe", 3);
    applies(&c, "b", &[3]);
    until("it is said why", || {
        c.peer("b").last_error == "user jane: change 1 waits for change 7 of server a, which has not come"
    });
    a.send_change_of("a", "jane", 4);
    applies(&c, "a", &[4]);
    assert!(c.try_next_job(Duration::from_millis(50)).is_none(), "that was another one");
    a.send_change_of("a", "jane", 7);
    applies(&c, "a", &[7]);
    applies(&c, "b", &[1, 2]);
    until("nothing waits", || c.peer("b").last_error.is_empty());
}

#[test]
fn parts_of_what_one_peer_wants_to_be_told_do_not_count_for_another() {
    let house = House::new();
    let c = third(&house);
    let (mut a, mut b) = (c.connect_as_peer("a"), c.connect_as_peer("b"));
    let mailbox = Mailbox { guid: vec![1; 16], path: vec!["INBOX".into()], ..Default::default() };
    let part = |id, more| {
        let mailboxes = vec![TellOf { mailbox: Some(mailbox.clone()), ..Default::default() }];
        let tell = Tell { user: "jane".into(), mailboxes, more, ..Default::default() };
        Kind::Question(Question { id, tell: Some(tell), survey: None })
    };
    (1..=64).for_each(|id| a.send(part(id, true)));
    a.send(part(64, false));
    let (worker, tell) = c.next_tell();
    assert_eq!((tell.asker.as_str(), tell.mailboxes.len()), ("a", 2));
    worker.finish(Kind::Looked(Looked { job: tell.job, ..Default::default() }));
    a.send(part(64, true));
    b.send(part(1, true));
    b.send(part(1, false));
    let (_, tell) = c.next_tell();
    assert_eq!((tell.asker.as_str(), tell.mailboxes.len()), ("b", 2));
}

#[test]
fn a_cause_that_will_never_come_is_not_waited_for() {
    let house = House::new();
    let c = third(&house);
    let mut b = c.connect_as_peer("b");
    b.send_change_after("b", "jane", 1, &[("a", 7), ("x", 9)]);
    until("it waits", || c.peer("b").last_error.contains("change 7 of server a"));
    c.connect().greet_without("a", 8);
    applies(&c, "b", &[1]);
}

#[test]
fn after_a_restart_it_is_known_what_has_come() {
    let house = House::new();
    let c = third(&house);
    let mut a = c.connect_as_peer("a");
    // Number 6 is somebody's who is not replicated here.
    a.send_change_of("a", "jane", 7);
    applies(&c, "a", &[7]);
    a.next_ack(7);
    drop((a, c));

    let c = third(&house);
    let mut b = c.connect_as_peer("b");
    b.send_change_after("b", "jane", 1, &[("a", 7)]);
    applies(&c, "b", &[1]);
    b.send_change_after("b", "jane", 2, &[("a", 8)]);
    until("it waits", || c.peer("b").last_error.contains("change 8 of server a"));
}

#[test]
fn the_part_of_a_change_that_is_seen_counts_as_a_cause() {
    let house = House::new();
    let [a, b, _c] = house.mesh(["a", "b", "c"]);
    a.process("imap").save("jane", 1);
    let (mut worker, apply) = b.next_job();
    let stamp = apply.changes[0].stamp.clone().unwrap();
    let applied = vec![dovetail::wire::proto::SeqOf { origin: "a".into(), epoch: stamp.epoch, seq: stamp.seq }];
    let span = dovetail::wire::proto::Span {
        user: "jane".into(),
        mailbox_guid: vec![1; 16],
        log_seq: 2,
        begin: 100,
        end: 200,
        applied,
        ..Default::default()
    };
    let answer = Applied { job: apply.job, more: true, spans: vec![span], ..Default::default() };
    worker.send(Kind::Applied(answer));
    b.process("imap").save_with_span("jane", 2, (200, 300));
    let (_, apply) = a.next_job();
    let vector = &apply.changes[0].stamp.as_ref().unwrap().vector;
    assert_eq!(vector.iter().map(|seen| (seen.origin.as_str(), seen.seq)).collect::<Vec<_>>(), [("a", 1)]);
}

fn stamped(change: &Change) -> (String, u64) {
    let stamp = change.stamp.as_ref().unwrap();
    (stamp.origin.clone(), stamp.seq)
}

fn has_body(change: &Change) -> bool {
    matches!(&change.ops[0].what, Some(What::Save(save)) if save.body_inline)
}

#[test]
fn in_a_chain_changes_are_passed_on_and_bodies_asked_of_who_passed_them_on() {
    let house = House::new();
    let [a, b, c] = house.connected(["a", "b", "c"], [vec!["b"], vec!["a", "c"], vec!["b"]]);
    a.process("lmtp").save("jane", 1);
    applies(&b, "a", &[1]);
    let (mut worker, apply) = c.next_job();
    assert_eq!((names(&apply), has_body(&apply.changes[0])), (vec![("a".into(), 1)], true));
    let request = BodyRequest { id: 1, origin: "a".into(), user: "jane".into(), window: 1, ..Default::default() };
    worker.send(Kind::BodyRequest(request));
    let (_, request) = b.next_read();
    assert_eq!(request.origin, "b");
    worker.applied(&apply);
    until("it is acknowledged", || a.peer("b").pending == 0 && b.peer("c").pending == 0);

    c.process("imap").save("jane", 2);
    applies(&b, "c", &[1]);
    applies(&a, "c", &[1]);
    until("nothing is pending", || {
        [&a, &b, &c].iter().all(|server| server.status().peers.iter().all(|p| p.pending == 0))
    });
    let applied = [&a, &b, &c].map(|server| server.status().counters.unwrap().applied);
    assert_eq!(applied, [1, 2, 1]);
}

#[test]
fn in_a_mesh_nothing_comes_twice() {
    let house = House::new();
    let all = house.mesh(["a", "b", "c"]);
    let mut imap = all[0].process("imap");
    for uid in 1..=5 {
        imap.save("jane", uid);
    }
    std::thread::scope(|scope| {
        for server in &all[1..] {
            scope.spawn(|| {
                let mut applied = 0;
                while applied < 5 {
                    let (worker, apply) = server.next_job();
                    applied += apply.changes.len();
                    worker.applied(&apply);
                }
            });
        }
    });
    until("nothing is pending", || all.iter().all(|server| server.status().peers.iter().all(|p| p.pending == 0)));
    assert!(all[1..].iter().all(|server| server.status().counters.unwrap().applied == 5));
    let acked: u64 = all.iter().flat_map(|server| server.status().peers).map(|peer| peer.acked).sum();
    assert_eq!(acked, 10, "each was sent by a to both, and by nobody else");
}

/// Server b, with a that connects to it and c that it connects to; both are played, and say so.
fn second(house: &House) -> (Server, Wire, Wire) {
    let listener = house.listener();
    let b = house.server("b", &[("a", "127.0.0.1:9".into()), ("c", address(&listener))]);
    let mut a = b.connect();
    a.greet_linked("a", &["b", "c"]);
    let mut c = Wire::accept(&listener);
    c.greet_linked("c", &["a", "b"]);
    until("both are connected", || b.status().peers.iter().all(|peer| peer.state == "connected"));
    (b, a, c)
}

#[test]
fn what_a_peer_says_to_have_is_not_passed_on_to_it() {
    let house = House::new();
    let (b, mut a, mut c) = second(&house);
    let known = |seq| Kind::Known(Known { origin: "a".into(), epoch: 5, seqs: vec![seq], user: "jane".into() });
    a.send_given("a", "jane", 7, &["b", "c"], 0);
    let (worker, apply) = b.next_job();
    // It was faster.
    c.send(known(7));
    until("it was heard", || b.peer("c").pending == 0);
    worker.applied(&apply);
    a.send_given("a", "jane", 8, &["b", "c"], 0);
    applies(&b, "a", &[8]);
    until("it is kept", || b.peer("c").pending == 1);
    b.process("imap").save("jane", 9);
    until("both are kept", || b.peer("c").pending == 2);
    c.send(known(8));
    let change = c.next_whole_change();
    assert_eq!(stamped(&change).0, "b");
    let vector: Vec<_> = change.stamp.unwrap().vector.iter().map(|seen| (seen.origin.clone(), seen.seq)).collect();
    assert_eq!(vector, [("a".to_owned(), 8)]);
}

#[test]
fn what_a_worker_tells_comes_behind_the_change_of_its_job_that_gave_rise_to_it() {
    let house = House::new();
    let (b, mut a, mut c) = second(&house);
    a.send_given("a", "jane", 7, &["b", "c"], 0);
    let (worker, apply) = b.next_job();
    [8, 9].into_iter().for_each(|seq| a.send_given("a", "jane", seq, &["b", "c"], 0));
    // Behind them.
    a.send_given("a", "joe", 10, &["b", "c"], 0);
    let (other, of_joe) = b.next_job();
    worker.applied(&apply);
    other.applied(&of_joe);
    let (mut worker, apply) = b.next_job();
    assert_eq!(apply.changes.len(), 2);
    let stamp = Stamp { vector: vec![SeqOf { origin: "a".into(), epoch: 5, seq: 9 }], ..Default::default() };
    let inbox = Mailbox { guid: vec![1; 16], path: vec!["INBOX".into()], ..Default::default() };
    let nack = What::Nack(Nack { guid: "m".into(), uid: 5, stands: 6, next: 7, of: "a".into(), ..Default::default() });
    let told = Change { stamp: Some(stamp), ..change("jane", inbox, nack) };
    worker.send(Kind::Applied(Applied { job: apply.job, more: true, changes: vec![told], ..Default::default() }));
    worker.applied(&apply);
    // Behind those that are passed on to it.
    let change = std::iter::repeat_with(|| c.next_whole_change()).find(|change| stamped(change).0 == "b").unwrap();
    let vector: Vec<_> = change.stamp.unwrap().vector.iter().map(|seen| (seen.origin.clone(), seen.seq)).collect();
    assert_eq!(vector, [("a".to_owned(), 9)]);
}

#[test]
fn a_peer_that_is_cut_from_the_origin_gets_what_it_lacks_in_order() {
    let house = House::new();
    let (b, mut a, mut c) = second(&house);
    a.send_given("a", "jane", 7, &["b", "c"], 0);
    applies(&b, "a", &[7]);
    b.process("imap").save("jane", 9);
    until("both are kept", || b.peer("c").pending == 2);
    c.send(Kind::Linked(Linked { servers: vec!["b".into()], reach: vec![] }));
    let change = c.next_whole_change();
    assert_eq!((stamped(&change), has_body(&change)), (("a".into(), 7), false));
    assert_eq!(change.given, ["b", "c"]);
    let epoch = b.status().epoch;
    c.send(Kind::Ack(Ack { epoch, seqs: vec![change.carrier], heard_clock: 0 }));
    let change = c.next_whole_change();
    assert_eq!((stamped(&change).0.as_str(), change.carrier), ("b", 0));
    c.send(Kind::Ack(Ack { epoch, seqs: vec![change.stamp.unwrap().seq], heard_clock: 0 }));
    until("nothing is pending", || b.peer("c").pending == 0);
}

#[test]
fn what_is_to_be_passed_on_survives_a_restart() {
    let house = House::new();
    let (b, mut a, c) = second(&house);
    a.send_given("a", "jane", 7, &["b", "c"], 0);
    applies(&b, "a", &[7]);
    a.next_ack(7);
    drop((a, c, b));
    let listener = house.listener();
    let b = house.server("b", &[("a", "127.0.0.1:9".into()), ("c", address(&listener))]);
    assert_eq!(b.peer("c").pending, 1);
    let mut c = Wire::accept(&listener);
    c.greet_linked("c", &["b"]);
    assert_eq!(stamped(&c.next_whole_change()), ("a".into(), 7));
}

#[test]
fn what_comes_from_two_is_applied_once_and_acknowledged_to_both() {
    let house = House::new();
    let c = third(&house);
    let (mut a, mut b) = (c.connect_as_peer("a"), c.connect_as_peer("b"));
    b.send_given("a", "jane", 7, &["b", "c"], 31);
    b.send_given("x", "jane", 2, &["a", "b"], 32);
    applies(&c, "a", &[7]);
    b.next_ack(31);
    applies(&c, "x", &[2]);
    b.next_ack(32);
    a.send_given("a", "jane", 7, &["b", "c"], 0);
    a.send_given("a", "jane", 8, &["b", "c"], 0);
    applies(&c, "a", &[8]);
    a.send_given("x", "jane", 2, &["a", "b"], 9);
    b.send_given("a", "jane", 8, &["b", "c"], 33);
    loop {
        match b.next() {
            Kind::Ack(ack) if ack.seqs == [33] => break,
            // It may be passed on to it before it has said to have it.
            Kind::Known(_) | Kind::Linked(_) | Kind::Ack(_) | Kind::Change(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(c.status().counters.unwrap().applied, 3);
}

#[test]
fn what_a_peer_says_of_others_numbers_counts_for_the_users_that_it_may_write_only() {
    let house = House::new();
    let c = third(&house);
    let (a, mut b) = (c.connect_as_peer("a"), c.connect_as_peer("b"));
    for seq in 1..=3 {
        b.send_given("a", "mallory", seq, &["b", "c"], 30 + seq);
        applies(&c, "a", &[seq]);
        b.next_ack(30 + seq);
    }
    // Nobody is asked whether a change that no worker can be given is of a user of its sender.
    let stamp = Some(Stamp { origin: "a".into(), epoch: 5, seq: 9, clock: 1, vector: vec![] });
    let malformed = Change { stamp, ops: vec![], carrier: 40, ..save("jane", 9) };
    for _ in 0..2 {
        b.send(Kind::Change(malformed.clone()));
        assert_eq!(b.next_refusal().seq, 40);
    }
    b.send(Kind::Change(malformed));
    b.next_ack(40);
    drop(a);
    until("it is gone", || c.peer("a").state != "connected");
    let mut a = c.connect();
    assert_eq!(a.greet("a").applied_seq, 0, "it would forget them");
    for seq in 1..=3 {
        a.send_change_of("a", "jane", seq);
        applies(&c, "a", &[seq]);
        until("it is acknowledged", || c.status().counters.unwrap().applied == 3 + seq);
    }
}

#[test]
fn what_a_peer_says_to_have_is_what_it_has_of_the_user_that_it_names() {
    let house = House::new();
    let (b, mut a, mut c) = second(&house);
    // Held back, as it is said that it comes to c from a; and what is behind it.
    a.send_given("a", "jane", 7, &["b", "c"], 0);
    applies(&b, "a", &[7]);
    b.process("imap").save("jane", 1);
    until("both are kept for c", || b.peer("c").pending == 2);
    let (epoch, seq) = (b.status().epoch, 2);
    // As who was told so by somebody who may write only this user's mail.
    let known = |origin: &str, epoch, seq, user: &str| {
        Kind::Known(Known { origin: origin.into(), epoch, seqs: vec![seq], user: user.into() })
    };
    for user in ["mallory", ""] {
        c.send(known("b", epoch, seq, user));
        c.send(known("a", 5, 7, user));
        c.send(known("a", 5, 8, user));
    }
    hears_until_answered(&mut c, 9);
    assert_eq!(b.peer("c").pending, 2);
    a.send_given("a", "jane", 8, &["b", "c"], 0);
    applies(&b, "a", &[8]);
    until("it is kept as well", || b.peer("c").pending == 3);
    c.send(known("b", epoch, seq, "jane"));
    c.send(known("a", 5, 8, "jane"));
    c.send(known("a", 5, 7, "jane"));
    until("it has all", || b.peer("c").pending == 0);
}

/// All that it says up to the answer to this question.
fn hears_until_answered(peer: &mut Wire, id: u64) -> Vec<Kind> {
    peer.send(Kind::Ping(Ping { id, heard_clock: 0 }));
    let said = std::iter::repeat_with(|| peer.next());
    said.take_while(|kind| !matches!(kind, Kind::Pong(pong) if pong.id == id)).collect()
}

#[test]
fn servers_that_a_peer_makes_up_keep_out_no_others() {
    let house = House::new();
    let c = third(&house);
    let (mut a, mut b) = (c.connect_as_peer("a"), c.connect_as_peer("b"));
    for at in 1..=65 {
        let origin = format!("made-up-{at}");
        b.send_given(&origin, "mallory", 1, &[], at);
        applies(&c, &origin, &[1]);
        b.next_ack(at);
    }
    b.send_given("made-up-66", "mallory", 1, &[], 66);
    assert!(b.next_refusal().error.contains("more servers than can be known"));
    a.send_given("far", "jane", 1, &[], 1);
    applies(&c, "far", &[1]);
    until("it is applied", || c.status().counters.unwrap().applied == 66);
    drop((a, b, c));
    let c = third(&house);
    let mut a = c.connect_as_peer("a");
    a.send_given("far", "jane", 2, &[], 2);
    applies(&c, "far", &[2]);
}

#[test]
fn a_peer_whose_connections_come_and_go_all_the_time_fills_nobodys_lane() {
    let house = House::new();
    let (b, mut a, mut c) = second(&house);
    let began = Instant::now();
    let reach = |name: &str, count: usize| {
        let reach = (0..count).map(|n| Reach { server: format!("{name}-{n}"), hops: 1 }).collect();
        Kind::Linked(Linked { servers: vec!["b".into()], reach })
    };
    for count in 0..60 {
        a.send(reach("far", count % 2));
        hears_until_answered(&mut a, count as u64 + 10);
    }
    let is_linked = |kind: &Kind| matches!(kind, Kind::Linked(_));
    let said = hears_until_answered(&mut c, 2).into_iter().filter(is_linked).count();
    assert!(said as u64 <= 20 + began.elapsed().as_secs(), "{said}");
    // The last one comes in the end; and what they make of it together is not more than is taken.
    a.send(reach("last", 128));
    let is_whole = |kind: &Kind| matches!(kind, Kind::Linked(linked) if linked.reach.len() == 128);
    let whole = std::iter::repeat_with(|| c.next()).find(is_whole).unwrap();
    assert!(matches!(whole, Kind::Linked(linked) if linked.reach.iter().any(|reach| reach.server == "a")));
    assert_eq!(b.peer("a").state, "connected");
}

#[test]
fn a_peer_that_does_not_take_the_bodies_that_it_asks_for_holds_up_no_other() {
    let house = House::new();
    let peers = [("a", "127.0.0.1:9".to_owned()), ("b", "127.0.0.1:9".to_owned())];
    let c = house.server("c", &peers);
    let (mut a, mut b) = (c.connect_as_peer("a"), c.connect_as_peer("b"));
    let request = |id| BodyRequest { id, origin: "c".into(), user: "jane".into(), window: 1, ..Default::default() };
    (1..=64).for_each(|id| a.send(Kind::BodyRequest(request(id))));
    let (_of_a, asked) = c.next_read();
    assert_eq!(asked.asker, "a");
    b.send(Kind::BodyRequest(request(1)));
    let (of_b, asked) = c.next_read();
    assert_eq!(asked.asker, "b");
    b.send_change_of("b", "jane", 1);
    // The last worker that is no reader.
    of_b.finish(Kind::BodyChunk(BodyChunk { id: asked.id, last: true, ..Default::default() }));
    applies(&c, "b", &[1]);
}

#[test]
fn bodies_are_not_read_for_a_peer_that_does_not_take_those_before() {
    const CHUNK: usize = 48 << 10;
    let house = House::new();
    let c = third(&house);
    let mut a = c.connect_as_peer("a");
    let request =
        |id| BodyRequest { id, origin: "c".into(), user: "jane".into(), window: 1 << 20, ..Default::default() };
    (1..=64).for_each(|id| a.send(Kind::BodyRequest(request(id))));
    let mut read = 0;
    while let Some((mut worker, asked)) = c.try_next_read(Duration::from_millis(100)) {
        for _ in 0..(1 << 20) / CHUNK {
            let chunk = BodyChunk { id: asked.id, data: vec![0; CHUNK], ..Default::default() };
            worker.send(Kind::BodyChunk(chunk));
        }
        worker.finish(Kind::BodyChunk(BodyChunk { id: asked.id, last: true, ..Default::default() }));
        read += 1;
    }
    assert!(read < 40, "more than sockets hold");
    // When it reads, it goes on.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while read < 64 {
                let (worker, asked) = c.next_read();
                worker.finish(Kind::BodyChunk(BodyChunk { id: asked.id, last: true, ..Default::default() }));
                read += 1;
            }
        });
        let ends =
            std::iter::repeat_with(|| a.next()).filter(|kind| matches!(kind, Kind::BodyChunk(chunk) if chunk.last));
        assert_eq!(ends.take(64).count(), 64);
    });
}

#[test]
fn bonds_that_come_faster_than_they_are_made_are_not_taken() {
    let house = House::new();
    let c = third(&house);
    let mut a = c.connect_as_peer("a");
    let said = |a: &mut Wire, at_us, id| {
        a.send(Kind::Bond(Bond { at_us, nonce: vec![1] }));
        hears_until_answered(a, id).iter().any(|kind| matches!(kind, Kind::Bond(bond) if bond.at_us == at_us))
    };
    assert!(said(&mut a, 1, 1));
    let began = Instant::now();
    let taken = (2..200).filter(|at_us| said(&mut a, *at_us, *at_us)).count();
    assert!(taken as u64 <= 1 + began.elapsed().as_secs(), "{taken}");
    let mut last = 200;
    until("one is taken again", || {
        last += 1;
        said(&mut a, last, last)
    });
}

#[test]
fn a_change_of_the_receiver_itself_or_without_its_number_is_malformed() {
    let house = House::new();
    let c = third(&house);
    for (origin, carrier) in [("c", 9), ("x", 0), ("b", 9), ("", 9)] {
        let mut b = c.connect_as_peer("b");
        b.send_given(origin, "jane", 7, &[], carrier);
        assert!(b.is_closed());
    }
}

fn intent(user: &str, peers: Option<&[&str]>) -> Kind {
    let servers = peers.unwrap_or_default().iter().map(|server| (*server).to_owned()).collect();
    let peers = Some(UserPeers { all: peers.is_none(), servers, uid: None });
    Kind::Intent(Intent { user: user.into(), mailbox: None, peers })
}

#[test]
fn a_users_changes_are_kept_for_his_peers_only() {
    let house = House::new();
    let peers = [("b", "127.0.0.1:9".to_owned()), ("c", "127.0.0.1:9".to_owned())];
    let a = house.server("a", &peers);
    let pending = |a: &Server| [a.peer("b").pending, a.peer("c").pending];
    let mut imap = a.process("imap");
    imap.save("jane", 1);
    until("it is for both", || pending(&a) == [1, 1]);
    imap.send(intent("jane", Some(&["b", "x"])));
    until("it is for b alone", || pending(&a) == [1, 0]);
    imap.save("jane", 2);
    imap.save("joe", 1);
    until("each is for whom it is", || pending(&a) == [3, 1]);
    drop((imap, a));

    let a = house.server("a", &peers);
    let mut imap = a.process("imap");
    imap.save("jane", 3);
    until("it is remembered", || pending(&a) == [4, 1]);
    imap.send(intent("jane", None));
    imap.save("jane", 4);
    until("it is for both again", || pending(&a) == [5, 2]);
    let failed = a.failed();
    assert_eq!((failed[0].user.as_str(), failed[0].peer.as_str()), ("jane", "c"), "what it lacks is to be compared");
}

#[test]
fn a_worker_that_opens_a_user_says_with_whom_he_is_replicated() {
    let house = House::new();
    let (b, mut a, mut c) = second(&house);
    a.send_given("a", "jane", 7, &["b"], 0);
    let (mut worker, apply) = b.next_job();
    assert_eq!(apply.from, "a");
    let peers = Some(UserPeers { all: false, servers: vec!["a".into()], uid: None });
    worker.send(Kind::Applied(Applied { job: apply.job, more: true, peers, ..Default::default() }));
    worker.applied(&apply);
    a.next_ack(7);
    assert_eq!(b.peer("c").pending, 0, "it is not passed on to who is no peer of his");
    let request = BodyRequest { id: 1, user: "jane".into(), origin: "b".into(), ..Default::default() };
    c.send(Kind::BodyRequest(request));
    loop {
        match c.next() {
            Kind::BodyChunk(chunk) => break assert!(chunk.error.contains("not among the user's peers"), "{chunk:?}"),
            Kind::Linked(_) => {}
            other => panic!("{other:?}"),
        }
    }
    // So does a worker, where it is news, of whatever is asked for.
    let foreign =
        || b.status().counters.unwrap().notes.iter().find(|n| n.name == "foreign_user").map_or(0, |n| n.count);
    assert_eq!(foreign(), 1);
    c.send(Kind::Question(Question {
        id: 2,
        survey: Some(Survey { user: "joe".into(), ..Default::default() }),
        tell: None,
    }));
    let (worker, survey) = b.next_survey();
    let error = "server c is not among the user's peers here (dovetail_peers of the userdb)".to_owned();
    worker.finish(Kind::Surveyed(Surveyed { job: survey.job, error: error.clone(), ..Default::default() }));
    c.send_change_of("c", "jim", 1);
    let (worker, apply) = b.next_job();
    worker.finish(Kind::Applied(Applied { job: apply.job, error, ..Default::default() }));
    until("they are counted", || foreign() == 3);
}

#[test]
fn a_flag_of_another_message_that_has_its_uid_here_decides_nothing() {
    let house = House::new();
    let c = third(&house);
    let mailbox = || Mailbox { guid: vec![1; 16], path: vec!["INBOX".into()], ..Default::default() };
    let flags = |first_uid: u32, last_uid: u32, guid: &str| {
        let messages = vec![MessageRange { first_uid, last_uid, guid: guid.into(), ..Default::default() }];
        What::Flags(FlagUpdate { messages, add: 8, ..Default::default() })
    };
    c.process("imap").send(Kind::Record(Record {
        change: Some(change("jane", mailbox(), flags(12, 13, ""))),
        ..Default::default()
    }));
    until("it is told", || c.peer("b").pending == 1);
    let mut b = c.connect_as_peer("b");
    let mut send = |seq, ops: Vec<What>| {
        let ops = ops.into_iter().map(|what| Op { what: Some(what) }).collect();
        let stamp = Some(Stamp { origin: "b".into(), epoch: 5, seq, clock: 1, vector: vec![] });
        b.send(Kind::Change(Change { stamp, ops, ..change("jane", mailbox(), flags(12, 12, "m")) }));
    };
    let is_flagged = |apply: &Apply| apply.changes[0].ops.iter().any(|op| matches!(op.what, Some(What::Flags(_))));
    // It is saved with a UID that another message has here.
    send(1, vec![What::Save(Save { guid: "m".into(), ..Default::default() }), flags(12, 12, "m")]);
    let (mut worker, apply) = c.next_job();
    assert!(is_flagged(&apply));
    let elsewhere = vec![Elsewhere { mailbox_guid: vec![1; 16], uid: 12, guid: "m".into(), ..Default::default() }];
    worker.send(Kind::Applied(Applied { job: apply.job, more: true, elsewhere, ..Default::default() }));
    worker.applied(&apply);
    send(2, vec![flags(12, 12, "m")]);
    let (worker, apply) = c.next_job();
    assert!(is_flagged(&apply));
    worker.applied(&apply);
    send(3, vec![flags(13, 13, "n")]);
    let (_, apply) = c.next_job();
    assert!(!is_flagged(&apply), "a later change here has decided");
}
