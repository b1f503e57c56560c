//! What replication costs on the server where the change is made: latency of a client alone, and throughput of four.

use std::time::{Duration, Instant};

use crate::cluster::imap::{Appended, Imap};
use crate::cluster::lmtp::Lmtp;
use crate::cluster::{holds_within, Cluster};
use crate::processes::{Held, Processes};
use crate::report::{Report, Value};
use crate::variant::{mail, stored, Running, Variant};
use crate::Plan;

const SPEED_CLIENTS: usize = 4;
/// How long the peers may take to catch up before the next variant has its turn.
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);
const MAILS_FOR_STORE: usize = 50;
/// A STORE takes a twentieth of the others' time: a turn of it has more.
const STORES_PER_OPERATION: usize = 4;
/// Operations at the begin of a turn that do not count: what ran before it has taken the caches.
const WARM_UP: usize = 5;

/// p50 of APPEND, STORE and LMTP, one client at a time. The variants take turns, in one order and then the other, so that
/// the machine's noise falls on all; each turn starts when the last one's replication is through.
///
/// B does its work on the cores that A uses, which the two would not share in earnest. So Dovetail has a second turn in
/// which B's replication is stopped until the turn is over: what then is left is the cost on A.
pub fn measure(clusters: &[(Variant, Running)], plan: &Plan, report: &mut Report) {
    for operation in ["APPEND", "STORE", "LMTP"] {
        println!("cost: {operation}, {} rounds of {}", plan.cost_rounds, plan.cost_operations_per_round);
        let mut turns = Vec::new();
        for (variant, cluster) in clusters {
            turns.push(Turn::new(*variant, cluster, operation, false));
            if *variant == Variant::Dovetail {
                turns.push(Turn::new(*variant, cluster, operation, true));
            }
        }
        for round in 0..plan.cost_rounds {
            let mut order: Vec<usize> = (0..turns.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for index in order {
                let factor = if operation == "STORE" { STORES_PER_OPERATION } else { 1 };
                turns[index].take(plan.cost_operations_per_round * factor);
            }
        }
        for turn in &turns {
            let value = Value::percentile(&turn.times, 50.0, Duration::MAX);
            report.add(&format!("{operation} p50 on a{}", turn.circumstances()), "ms", turn.variant, value);
        }
        let Some(plain) = turns.iter().find(|turn| turn.variant == Variant::Plain) else { continue };
        for turn in turns.iter().filter(|turn| turn.variant != Variant::Plain) {
            let ratio = median(turn.rounds.iter().zip(&plain.rounds).map(|(with, without)| with / without));
            let name = format!("  {operation} over plain{}, median of rounds", turn.circumstances());
            report.add(&name, "", turn.variant, Value::exact(ratio));
        }
    }
}

fn median(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = numbers.collect();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

struct Turn<'a> {
    variant: Variant,
    cluster: &'a Cluster,
    /// B's replication stands still while A works.
    held: bool,
    user: String,
    client: Client,
    count: usize,
    times: Vec<Option<Duration>>,
    /// p50 of each round, in seconds.
    rounds: Vec<f64>,
}

enum Client {
    Append(Imap),
    Store(Imap),
    Lmtp(Lmtp),
}

impl Turn<'_> {
    fn new<'a>(variant: Variant, cluster: &'a Cluster, operation: &str, held: bool) -> Turn<'a> {
        let server = cluster.a();
        let user = format!("cost-{}-{held}", operation.to_lowercase());
        let client = match operation {
            "APPEND" => Client::Append(server.imap(&user).select("INBOX")),
            "STORE" => {
                let mails: Vec<Vec<u8>> = (0..MAILS_FOR_STORE).map(mail).collect();
                let messages: Vec<_> = mails.iter().map(|mail| Appended { flags: "", date: "", mail }).collect();
                let mut imap = server.imap(&user);
                imap.append_all("INBOX", &messages);
                Client::Store(imap.select("INBOX"))
            }
            _ => Client::Lmtp(server.lmtp()),
        };
        let mut turn = Turn { variant, cluster, held, user, client, count: 0, times: Vec::new(), rounds: Vec::new() };
        // The first ones read programs from the disk and make mailboxes.
        turn.take(1);
        turn.times.clear();
        turn.rounds.clear();
        turn
    }

    fn circumstances(&self) -> &'static str {
        if self.held {
            ", b held"
        } else {
            ""
        }
    }

    fn take(&mut self, operations: usize) {
        let held = self.held.then(|| Held::hold(Processes::of(self.cluster.b(), self.variant).list()));
        // So many A's relay has heard of when all is told.
        let dovetail = self.variant == Variant::Dovetail;
        let changes = dovetail.then(|| self.cluster.a().counters().changes + (WARM_UP + operations) as u64);
        for number in 0..WARM_UP + operations {
            let mail = mail(self.count);
            let start = Instant::now();
            match &mut self.client {
                Client::Append(imap) => drop(imap.append("INBOX", &mail)),
                Client::Store(imap) => {
                    let sign = if (self.count / MAILS_FOR_STORE) % 2 == 0 { '+' } else { '-' };
                    drop(imap.ok(&format!("STORE {} {sign}FLAGS (\\Flagged)", self.count % MAILS_FOR_STORE + 1)));
                }
                Client::Lmtp(lmtp) => lmtp.deliver(&[&self.user], &mail),
            }
            if number >= WARM_UP {
                self.times.push(Some(start.elapsed()));
            }
            self.count += 1;
        }
        self.rounds
            .push(median(self.times[self.times.len() - operations..].iter().flatten().map(Duration::as_secs_f64)));
        drop(held);
        drain(self.variant, self.cluster, std::slice::from_ref(&self.user));
        // Flags leave no file to look for.
        if let Some(changes) = changes {
            let a = self.cluster.a();
            holds_within(DRAIN_DEADLINE, || a.counters().changes >= changes && a.has_nothing_pending());
        }
    }
}

/// APPEND by four clients, each as fast as it is answered.
pub fn measure_speed(clusters: &[(Variant, Running)], plan: &Plan, report: &mut Report) {
    let users: Vec<String> = (0..SPEED_CLIENTS).map(|n| format!("speed-{n}")).collect();
    let mut rates: Vec<Vec<f64>> = vec![Vec::new(); clusters.len()];
    let mut drained: Vec<Option<Duration>> = vec![Some(Duration::ZERO); clusters.len()];
    for round in 0..plan.speed_rounds {
        for (index, (variant, cluster)) in clusters.iter().enumerate() {
            println!("{}: APPEND at full speed, {SPEED_CLIENTS} clients, round {}", variant.name(), round + 1);
            let rate = append_at_full_speed(cluster, &users, Duration::from_secs_f64(plan.speed_round_secs));
            rates[index].push(rate);
            let took = drain(*variant, cluster, &users);
            drained[index] = drained[index].zip(took).map(|(a, b)| a.max(b));
        }
    }
    for (((variant, _), rates), drained) in clusters.iter().zip(&rates).zip(&drained) {
        let rate = median(rates.iter().copied());
        report.add("APPEND at full speed, 4 clients", "/s", *variant, Value::exact(rate));
        if variant.replicates() {
            let value = match drained {
                Some(time) => Value::exact(time.as_secs_f64()),
                None => Value::more_than(DRAIN_DEADLINE.as_secs_f64()),
            };
            report.add("  then b has all after", "s", *variant, value);
        }
    }
}

fn append_at_full_speed(cluster: &Cluster, users: &[String], duration: Duration) -> f64 {
    let clients: Vec<Imap> = users.iter().map(|user| cluster.a().imap(user)).collect();
    let start = Instant::now();
    let count: usize = std::thread::scope(|scope| {
        let clients: Vec<_> = clients
            .into_iter()
            .map(|mut imap| {
                scope.spawn(move || {
                    let mut count = 0;
                    while start.elapsed() < duration {
                        imap.append("INBOX", &mail(count));
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().expect("an IMAP client")).sum()
    });
    count as f64 / start.elapsed().as_secs_f64()
}

/// Waits until B has all mails that A has; returns how long that took, None if it never happened.
fn drain(variant: Variant, cluster: &Cluster, users: &[String]) -> Option<Duration> {
    let start = Instant::now();
    if !variant.replicates() {
        return Some(Duration::ZERO);
    }
    let same = || users.iter().all(|user| stored(cluster.a(), user) == stored(cluster.b(), user));
    holds_within(DRAIN_DEADLINE, same).then(|| start.elapsed())
}
