//! Replication measured: Dovetail beside Dovecot 2.3's own replication and beside no replication at all, in one run.
//!
//! `make bench` prints a table, and the same as JSON. All servers run on this machine and share its clock and its cores, so
//! the ratios of one run mean more than its absolute times. docs/PERFORMANCE.md tells what is measured and how.

#[path = "../../tests/e2e/cluster/mod.rs"]
mod cluster;

mod burst;
mod cost;
mod instructions;
mod journal;
mod lag;
mod load;
mod mesh;
mod outage;
mod processes;
mod report;
mod seeding;
mod variant;

use std::time::Instant;

use crate::report::Report;
use crate::variant::Variant;

/// How much is measured.
pub struct Plan {
    /// Samples of each verb, without and with other traffic beside it.
    pub lag_samples: usize,
    /// The same for a replication that takes seconds for each.
    pub lag_samples_slow: usize,
    pub lag_rate_per_sec: f64,
    pub lag_rate_per_sec_slow: f64,
    pub lag_rate_per_sec_under_load: f64,
    /// Mails by LMTP to other users beside the samples.
    pub load_mails_per_sec: f64,
    pub burst_users: usize,
    /// Rounds in which each variant has its turn.
    pub cost_rounds: usize,
    pub cost_operations_per_round: usize,
    pub speed_rounds: usize,
    pub speed_round_secs: f64,
    /// Mails delivered while the peer is away.
    pub outage_mails: usize,
    /// Users that a restarted relay has to look at.
    pub sweep_users: usize,
    pub seed_users: usize,
    /// Of each of them.
    pub seed_mails: usize,
    /// Mails of the one large mailbox that is compared.
    pub seed_big: usize,
    /// Users of two equal servers with very many mails, and how many each has.
    pub million_users: usize,
    pub million_mails: usize,
    pub ack_mails: usize,
    /// How long two servers are cut from each other.
    pub partition_secs: u32,
    /// Mails to one of several servers.
    pub mesh_mails: usize,
}

const FULL: Plan = Plan {
    lag_samples: 200,
    lag_samples_slow: 24,
    lag_rate_per_sec: 10.0,
    lag_rate_per_sec_slow: 2.0,
    lag_rate_per_sec_under_load: 20.0,
    load_mails_per_sec: 200.0,
    burst_users: 500,
    cost_rounds: 16,
    cost_operations_per_round: 25,
    speed_rounds: 3,
    speed_round_secs: 4.0,
    outage_mails: 5_000,
    sweep_users: 10_000,
    seed_users: 100,
    seed_mails: 1_000,
    seed_big: 100_000,
    million_users: 100,
    million_mails: 10_000,
    ack_mails: 500,
    partition_secs: 30,
    mesh_mails: 1_000,
};

const QUICK: Plan = Plan {
    lag_samples: 30,
    lag_samples_slow: 8,
    lag_rate_per_sec: 10.0,
    lag_rate_per_sec_slow: 2.0,
    lag_rate_per_sec_under_load: 20.0,
    load_mails_per_sec: 200.0,
    burst_users: 100,
    cost_rounds: 6,
    cost_operations_per_round: 25,
    speed_rounds: 1,
    speed_round_secs: 2.0,
    outage_mails: 1_000,
    sweep_users: 500,
    seed_users: 20,
    seed_mails: 100,
    seed_big: 5_000,
    million_users: 10,
    million_mails: 500,
    ack_mails: 100,
    partition_secs: 5,
    mesh_mails: 200,
};

fn main() {
    // `cargo test --benches` and the like only want to know that it is there.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty() && value != "0");
    let plan = if set("DOVETAIL_BENCH_QUICK").is_some() { &QUICK } else { &FULL };
    let wanted = set("DOVETAIL_BENCH_VARIANTS").unwrap_or_else(|| "plain dsync dovetail".into());
    let parts = set("DOVETAIL_BENCH_PARTS")
        .unwrap_or_else(|| "lag load burst cost speed outage partition mesh seed million ack journal".into());
    let variants = Variant::wanted(&wanted);
    let in_memory = set("DOVETAIL_BENCH_MAILS").is_some_and(|value| value == "memory");
    let measures = |part: &str| parts.split_whitespace().any(|p| p == part);

    let start = Instant::now();
    let mut report = Report::new(&variants);
    report.note(machine());
    for variant in &variants {
        if measures("lag") || measures("load") {
            let cluster = variant.start(in_memory);
            if measures("lag") {
                lag::measure(*variant, &cluster, plan, None, &mut report);
            }
            if measures("load") {
                lag::measure(*variant, &cluster, plan, Some(plan.load_mails_per_sec), &mut report);
            }
            report_complaints(*variant, &cluster, &mut report);
        }
        if measures("burst") && variant.replicates() {
            let cluster = variant.start(in_memory);
            burst::measure(*variant, &cluster, plan, &mut report);
            report_complaints(*variant, &cluster, &mut report);
        }
    }
    if measures("instructions") {
        for variant in variants.iter().filter(|variant| **variant != Variant::Dsync) {
            instructions::measure(*variant, &mut report);
        }
    }
    if measures("outage") && variants.contains(&Variant::Dovetail) {
        let cluster = Variant::Dovetail.start(in_memory);
        outage::measure(Variant::Dovetail, &cluster, plan, &mut report);
        report_complaints(Variant::Dovetail, &cluster, &mut report);
    }
    if measures("partition") && variants.contains(&Variant::Dovetail) {
        mesh::measure_partition(plan, &mut report);
    }
    if measures("mesh") && variants.contains(&Variant::Dovetail) {
        mesh::measure_mesh(plan, &mut report);
    }
    if measures("seed") && variants.contains(&Variant::Dovetail) {
        seeding::measure(plan, &mut report);
    }
    if measures("million") && variants.contains(&Variant::Dovetail) {
        seeding::measure_million(plan, &mut report);
    }
    if measures("ack") && variants.contains(&Variant::Dovetail) {
        seeding::measure_acks(plan, &mut report);
    }
    if measures("journal") && variants.contains(&Variant::Dovetail) {
        journal::measure(&mut report);
    }
    if measures("cost") || measures("speed") {
        let clusters: Vec<_> = variants.iter().map(|variant| (*variant, variant.start(in_memory))).collect();
        if measures("cost") {
            cost::measure(&clusters, plan, &mut report);
        }
        if measures("speed") {
            cost::measure_speed(&clusters, plan, &mut report);
        }
        for (variant, cluster) in &clusters {
            report_complaints(*variant, cluster, &mut report);
        }
    }
    report.note(format!("at the end: {}", machine()));
    report.note(format!("the whole run took {:.0} s", start.elapsed().as_secs_f64()));

    println!("\n{}", report.table());
    let json = report.json();
    println!("{json}");
    if let Some(path) = set("DOVETAIL_BENCH_JSON") {
        std::fs::write(&path, json).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}

/// Numbers of servers that were in trouble are worth less.
fn report_complaints(variant: Variant, cluster: &variant::Running, report: &mut Report) {
    for server in cluster.servers() {
        let complaints = server.new_complaints(variant.expected_complaints());
        if let Some(first) = complaints.first() {
            report.note(format!("{}: {} errors in the log, the first: {first}", variant.name(), complaints.len()));
        }
        if variant == Variant::Dovetail {
            let counters = server.counters();
            let notes: Vec<String> =
                counters.notes.iter().map(|note| format!("{} {}", note.count, note.name)).collect();
            let server = server.name();
            report.note(format!("dovetail: {server} counted {} gaps, notes: {}", counters.gaps, notes.join(", ")));
        }
    }
}

/// What else slows everything down, for who compares runs.
fn machine() -> String {
    use std::io::Write;
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let path = std::env::temp_dir().join(format!("dovetail-bench-sync-{}", std::process::id()));
    let mut times: Vec<_> = (0..30)
        .map(|_| {
            let mut file = std::fs::File::create(&path).expect("a temporary file");
            file.write_all(&variant::mail(0)).expect("a temporary file");
            let start = Instant::now();
            file.sync_data().expect("a temporary file");
            start.elapsed()
        })
        .collect();
    let _ = std::fs::remove_file(&path);
    times.sort();
    format!(
        "{} cores, load average {}, one fdatasync of 4 kB takes {:.2} ms (p50)",
        std::thread::available_parallelism().map_or(0, usize::from),
        load.split_whitespace().next().unwrap_or("?"),
        times[times.len() / 2].as_secs_f64() * 1000.0
    )
}
