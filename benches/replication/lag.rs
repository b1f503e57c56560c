//! Lag: from the OK that A's client got until a client of B, which sends NOOP after NOOP, is told of the change.
//! Without replication that client polls A itself: the floor of this measurement on this machine.

use std::time::{Duration, Instant};

use crate::cluster::holds_within;
use crate::cluster::imap::{Appended, Imap};
use crate::load::{load_users, Load, Pace};
use crate::report::{Report, Value};
use crate::variant::{mail, stored, Running, Variant};
use crate::Plan;

/// How long after the last sample B may still show them.
const PATIENCE: Duration = Duration::from_secs(10);
const PATIENCE_UNDER_LOAD: Duration = Duration::from_secs(25);
/// How long a replication may take to bring B what a measurement needs there first.
const PREPARE_DEADLINE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, PartialEq)]
enum Verb {
    Lmtp,
    Append,
    Flag,
    Expunge,
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Verb::Lmtp => "LMTP",
            Verb::Append => "APPEND",
            Verb::Flag => "STORE",
            Verb::Expunge => "EXPUNGE",
        }
    }
}

const VERBS: [Verb; 4] = [Verb::Lmtp, Verb::Append, Verb::Flag, Verb::Expunge];

/// Measures all verbs, one after the other; with `load` beside that many LMTP deliveries per second to other users.
pub fn measure(variant: Variant, cluster: &Running, plan: &Plan, load: Option<f64>, report: &mut Report) {
    let slow = variant == Variant::Dsync;
    let (samples, rate) = match (slow, load) {
        (true, _) => (plan.lag_samples_slow, plan.lag_rate_per_sec_slow),
        (false, None) => (plan.lag_samples, plan.lag_rate_per_sec),
        (false, Some(_)) => (plan.lag_samples, plan.lag_rate_per_sec_under_load),
    };
    let patience = if load.is_some() { PATIENCE_UNDER_LOAD } else { PATIENCE };
    let circumstances = if load.is_some() { "under load" } else { "low rate" };

    let prepared = VERBS.map(|verb| prepare(cluster, verb, samples, circumstances));
    let running = load.map(|rate| Load::start(cluster.a(), rate));
    for (verb, user) in VERBS.iter().zip(&prepared) {
        println!("{}: lag of {}, {circumstances}, {samples} samples", variant.name(), verb.name());
        let Some(user) = user else {
            report.note(format!(
                "{}: {} {circumstances}: not measured, its mails never reached b",
                variant.name(),
                verb.name()
            ));
            continue;
        };
        let lags = sample(cluster, *verb, user, samples, rate, patience);
        let name = |percentile| format!("lag {} {percentile}, {circumstances}", verb.name());
        report.add(&name("p50"), "ms", variant, Value::percentile(&lags, 50.0, patience));
        report.add(&name("p99"), "ms", variant, Value::percentile(&lags, 99.0, patience));
        let unseen = lags.iter().filter(|lag| lag.is_none()).count();
        if unseen > 0 {
            report.note(format!(
                "{}: {} {circumstances}: {unseen} of {samples} were not on b {} s after the last",
                variant.name(),
                verb.name(),
                patience.as_secs()
            ));
        }
    }
    if let (Some(running), Some(wanted)) = (running, load) {
        let rate = running.end();
        report.note(format!("{}: load beside it: {rate:.0} of {wanted:.0} mails/s", variant.name()));
        if !variant.replicates() {
            return;
        }
        let start = Instant::now();
        let users = load_users();
        let count = |server| users.iter().map(|user| stored(server, user)).sum::<usize>();
        let caught_up = holds_within(PATIENCE_UNDER_LOAD, || count(cluster.a()) == count(cluster.peer()));
        let after = match caught_up {
            true => format!("{:.1} s", start.elapsed().as_secs_f64()),
            false => format!("more than {} s", PATIENCE_UNDER_LOAD.as_secs()),
        };
        report.note(format!("{}: b had all of the load {after} after its end", variant.name()));
    }
}

/// Of one verb alone, at the low rate, until a client of the last server is told of it.
pub fn measure_lmtp(variant: Variant, cluster: &Running, plan: &Plan, circumstances: &str, report: &mut Report) {
    let user = prepare(cluster, Verb::Lmtp, 0, circumstances).expect("the first mail reaches every server");
    let lags = sample(cluster, Verb::Lmtp, &user, plan.lag_samples, plan.lag_rate_per_sec, PATIENCE);
    for percentile in [50.0, 99.0] {
        let name = format!("lag LMTP p{percentile}, {circumstances}");
        report.add(&name, "ms", variant, Value::percentile(&lags, percentile, PATIENCE));
    }
}

/// Makes a user with all the mails that the verb needs, on both servers. None if B never got them.
fn prepare(cluster: &Running, verb: Verb, samples: usize, circumstances: &str) -> Option<String> {
    let user = format!("lag-{}-{}", verb.name().to_lowercase(), circumstances.replace(' ', "-"));
    let mails: Vec<Vec<u8>> = (0..samples.max(1)).map(mail).collect();
    let flags = if verb == Verb::Expunge { "\\Deleted" } else { "" };
    let count = match verb {
        Verb::Lmtp | Verb::Append => 1,
        Verb::Flag | Verb::Expunge => samples,
    };
    let messages: Vec<Appended> = mails[..count].iter().map(|mail| Appended { flags, date: "", mail }).collect();
    cluster.a().imap(&user).append_all("INBOX", &messages);
    holds_within(PREPARE_DEADLINE, || stored(cluster.peer(), &user) == count).then_some(user)
}

/// Lag of each sample; None: not seen.
fn sample(
    cluster: &Running,
    verb: Verb,
    user: &str,
    samples: usize,
    rate: f64,
    patience: Duration,
) -> Vec<Option<Duration>> {
    let mut poller = Poller::new(cluster.peer().imap(user), verb, samples);
    let mut writer = Writer::new(cluster, verb, user);
    let (done, all_done) = std::sync::mpsc::channel();
    let poller = std::thread::spawn(move || {
        poller.run(&all_done, patience);
        poller.seen
    });
    let mut pace = Pace::per_sec(rate);
    let mut written = Vec::with_capacity(samples);
    for number in 0..samples {
        pace.wait();
        writer.write(number);
        written.push(Instant::now());
    }
    // A poller that has seen all has ended already.
    let _ = done.send(Instant::now());
    let seen = poller.join().expect("the poller");
    written.iter().zip(seen).map(|(written, seen)| seen.map(|seen| seen.saturating_duration_since(*written))).collect()
}

/// The client of A.
enum Writer {
    Lmtp(crate::cluster::lmtp::Lmtp, String),
    Append(Imap),
    Flag(Imap),
    Expunge(Imap, Vec<u32>),
}

impl Writer {
    fn new(cluster: &Running, verb: Verb, user: &str) -> Writer {
        let imap = || cluster.a().imap(user).select("INBOX");
        match verb {
            Verb::Lmtp => Writer::Lmtp(cluster.a().lmtp(), user.into()),
            Verb::Append => Writer::Append(imap()),
            Verb::Flag => Writer::Flag(imap()),
            Verb::Expunge => {
                let mut imap = imap();
                let uids = imap.uids();
                Writer::Expunge(imap, uids)
            }
        }
    }

    fn write(&mut self, number: usize) {
        match self {
            Writer::Lmtp(lmtp, user) => lmtp.deliver(&[user], &mail(number)),
            Writer::Append(imap) => drop(imap.append("INBOX", &mail(number))),
            Writer::Flag(imap) => drop(imap.ok(&format!("STORE {} +FLAGS (\\Flagged)", number + 1))),
            Writer::Expunge(imap, uids) => drop(imap.ok(&format!("UID EXPUNGE {}", uids[number]))),
        }
    }
}

/// The client of B.
struct Poller {
    imap: Imap,
    verb: Verb,
    /// When each sample was first seen; saves and expunges come in order.
    seen: Vec<Option<Instant>>,
    exists: usize,
    count: usize,
}

impl Poller {
    fn new(mut imap: Imap, verb: Verb, samples: usize) -> Poller {
        let exists = imap.ok("SELECT INBOX").exists().unwrap_or(0) as usize;
        Poller { imap, verb, seen: vec![None; samples], exists, count: 0 }
    }

    fn run(&mut self, all_done: &std::sync::mpsc::Receiver<Instant>, patience: Duration) {
        let mut end = None;
        while self.count < self.seen.len() && end.is_none_or(|end| Instant::now() < end) {
            let answer = self.imap.ok("NOOP");
            let now = Instant::now();
            for line in answer.lines() {
                self.note(&line, now);
            }
            if let Ok(done) = all_done.try_recv() {
                end = Some(done + patience);
            }
        }
    }

    fn note(&mut self, line: &str, now: Instant) {
        let mut words = line.splitn(3, ' ');
        let number: usize = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        match (self.verb, words.next().unwrap_or(""), words.next().unwrap_or("")) {
            (Verb::Lmtp | Verb::Append, "EXISTS", _) => {
                for _ in self.exists..number {
                    self.saw(self.count, now);
                }
                self.exists = number;
            }
            (Verb::Flag, "FETCH", items) if items.contains("\\Flagged") && number > 0 => self.saw(number - 1, now),
            (Verb::Expunge, "EXPUNGE", _) => self.saw(self.count, now),
            _ => {}
        }
    }

    fn saw(&mut self, sample: usize, now: Instant) {
        if let Some(seen @ None) = self.seen.get_mut(sample) {
            *seen = Some(now);
            self.count += 1;
        }
    }
}
