//! More than two servers.

use std::time::Duration;

use dovetail::wire::proto::frame::Kind;
use dovetail::wire::proto::{Applied, Apply};

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
    for server in [&a, &a, &c, &c] {
        let (worker, apply) = server.next_job();
        let vector = &apply.changes[0].stamp.as_ref().unwrap().vector;
        let vector: Vec<_> = vector.iter().map(|seen| (seen.origin.as_str(), seen.seq)).collect();
        match apply.user.as_str() {
            "jane" => assert_eq!(vector, [("a", 2)]),
            _ => assert_eq!(vector, []),
        }
        worker.applied(&apply);
    }
    until("both are acknowledged", || b.peer("a").acked == 2 && b.peer("c").acked == 2);
    b.process("imap").save("jane", 3);
    let (_, apply) = c.next_job();
    let vector = &apply.changes[0].stamp.as_ref().unwrap().vector;
    assert!(vector.iter().any(|seen| (seen.origin.as_str(), seen.seq) == ("b", 1)), "its own one before: {vector:?}");
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
