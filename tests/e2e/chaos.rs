//! A seed's schedule against two real Dovecots: clients write while processes are killed, paused and restarted. Then both
//! servers must be the same, and every mail there as often as its client knows.
//!
//! In half of the seeds one server is written to at a time, and the other one has its turn when both are the same; in the others
//! both are at once. A seed gives the same schedule each time; the threads of a schedule race as they like. From 1000 on
//! something befalls a whole server once in each, and what must hold afterwards is what docs/OPERATIONS.md says.

mod client;
mod dice;
mod faults;
mod great;
mod ledger;
mod plan;
mod reader;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Duration;

use self::client::{literal, Imap};
use self::faults::{Faults, Progress};
use self::great::{Great, Procedure};
use self::ledger::Ledger;
use self::plan::{Phase, Plan};
use self::reader::Reader;
use self::writer::{has_lost_uids, loses_save_dates, resync_what_is_corrupted, token, was_rebuilt, Writer};
use crate::cluster::{holds_within_slowly, wait_until, Cluster, Server, Setup};
use crate::scene::Scene;

/// For what was cut and killed to be found and sent: the pauses between attempts, of a minute at most, the locks that a killed
/// process leaves, which Dovecot respects for three, and mailboxes that were half deleted, which it brings back after five.
const DEADLINE: Duration = Duration::from_secs(420);

#[test]
fn a_dozen_seeds_converge() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let first = number("DOVETAIL_CHAOS_FIRST").unwrap_or(1);
    let seeds = number("DOVETAIL_CHAOS_SEEDS").unwrap_or(12);
    // Only schedules in which one server is written to at a time, or only the others.
    let two_writers = match std::env::var("DOVETAIL_CHAOS_WRITERS").unwrap_or_default().as_str() {
        "" => None,
        "one" => Some(false),
        "two" => Some(true),
        other => panic!("DOVETAIL_CHAOS_WRITERS: {other}?"),
    };
    let is_played = |seed: &u64| two_writers.is_none_or(|two| Plan::has_two_writers(*seed) == two);
    let seeds: Vec<u64> = (first..).filter(is_played).take(seeds as usize).collect();
    let next = Mutex::new(seeds.iter());
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..number("DOVETAIL_CHAOS_JOBS").unwrap_or(2) {
            scope.spawn(|| loop {
                let Some(&seed) = next.lock().expect("a list").next() else {
                    return;
                };
                if std::panic::catch_unwind(|| play(seed)).is_err() {
                    failed.lock().expect("a list").push(seed);
                }
            });
        }
    });
    let failed = failed.into_inner().expect("a list");
    let commands: Vec<String> = failed.iter().map(|seed| format!("make chaos SEED={seed}")).collect();
    assert!(failed.is_empty(), "{} of {} seeds failed: {}", failed.len(), seeds.len(), commands.join("; "));
}

/// Says at a panic what was played.
struct Story<'a>(&'a Plan, &'a Scene);

impl Drop for Story<'_> {
    fn drop(&mut self) {
        let Story(plan, scene) = self;
        if !std::thread::panicking() {
            return;
        }
        for server in scene.servers() {
            let status = server.try_status();
            eprintln!("{}: {status:?}", server.name());
            // It may be stopped, and cannot be asked then.
            if status.is_none() {
                continue;
            }
            for service in ["dovetail", "dovetail-worker", "imap", "lmtp"] {
                for pid in server.pids(service) {
                    let of = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
                    eprintln!("  {service} {pid} waits in {}, {}", of("wchan"), of("syscall").trim());
                }
            }
        }
        eprintln!("---- {plan}again: make chaos SEED={}", plan.seed);
    }
}

/// Panics of a plain Dovecot. Of any two processes that create a new user's INBOX at once: they may lock the list's index and
/// mailboxes.lock in different orders (mailbox_list_index_sync_name() opens INBOX; mailbox_create() refreshes the list). And of
/// one in 2.3 that closes an sdbox to whose index it could not write: sdbox_sync_finish() has left a view open. And of one that
/// lists users while auth is not there, as doveadm -A does: auth_master_user_list_deinit() does once more what a failed connect()
/// has done.
/// And of one that saves into a maildir on a full disk: its sync finds another file, cannot write the UID of that to dovecot-uidlist,
/// and forgets the list (maildir_uidlist_sync_finish()). Or the index's log cannot be written, and a message with keywords goes again
/// when nobody knows the letters of those any more (maildir_transaction_save_rollback()).
fn is_dovecots(panic: &str) -> bool {
    let is_deadlock = panic.contains("/dovecot.list.index.log, ") && panic.contains("Resource deadlock avoided");
    let is_leak = panic.contains("Panic: Leaked view for index ") && panic.contains("Opened in mail-index-sync.c:");
    let is_listing = panic.contains("(auth_master_unset_io): assertion failed: (conn->to == NULL)");
    let is_unlisted = panic.contains("(maildir_save_sync_index): assertion failed: (first_uid != 0)");
    let is_letterless =
        panic.contains("(maildir_get_dest_filename): assertion failed: (ctx->keywords_sync_ctx != NULL");
    is_deadlock || is_leak || is_listing || is_unlisted || is_letterless
}

fn play(seed: u64) {
    let plan = Plan::of(seed);
    let users: Vec<String> = (0..plan.users).map(|n| format!("chaos{seed}-{n}")).collect();
    let mut setups = vec![Setup::new("a", plan.formats.0), Setup::new("b", plan.formats.1).over_a_line()];
    for (side, setup) in setups.iter_mut().enumerate() {
        setup.small_disks = plan.fills(side);
    }
    if let Some(great) = plan.great {
        great.set_up(seed, &mut setups);
    }
    let mut cluster = if plan.apart { Cluster::start_apart(setups) } else { Cluster::start(setups) };
    if plan.great.is_some_and(Great::mixes_save_dates) {
        cluster = cluster.without_save_dates();
    }
    let scene = Scene::on(cluster.ignoring_empty_folders().without_save_dates_where(loses_save_dates), &users[0]);
    let _story = Story(&plan, &scene);
    // Dovecot's own words about killed processes and what they left. A panic is one of ours, or of Dovecot's.
    [
        "killed with signal 9",
        "Error:",
        "Error reading configuration",
        "Failed to read configuration",
        "run/config) failed",
    ]
    .iter()
    .for_each(|text| scene.expects_in_log(text));
    let ledger = Mutex::new(Ledger::default());
    let mut procedure = Procedure::new(plan.great, &scene, &users);
    let mut gone = BTreeSet::new();
    for (number, phase) in plan.phases.iter().enumerate().map(|(n, phase)| (n + 1, phase)) {
        procedure.before(number, |server| fill(server, &users, &ledger));
        let brings_back = plan.great.and_then(Great::brings_mailboxes_back);
        if brings_back == Some(number) {
            gone = ledger.lock().expect("a ledger").gone();
        }
        play_phase(&scene, phase, &users, &ledger);
        if number == 3 && brings_back.is_some() {
            ledger.lock().expect("a ledger").brings_back(&gone);
        }
        procedure.after(number);
        if procedure.is_checked(number) {
            check(&scene, &users, &ledger);
        }
    }
    procedure.check_repaired();
    for server in scene.servers() {
        let log = server.log();
        let is_panic = |line: &&str| line.contains("Panic:") || line.contains("panicked");
        let panics: Vec<&str> = log.lines().filter(is_panic).filter(|line| !is_dovecots(line)).collect();
        assert!(panics.is_empty(), "{}: {panics:#?}", server.name());
    }
    // All that there are were Dovecot's.
    ["Panic:", "killed with signal 6"].iter().for_each(|text| scene.expects_in_log(text));
}

/// Brings a mail of the size that fills a small journal with a few.
fn fill(server: &Server, users: &[String], ledger: &Mutex<Ledger>) {
    let (progress, connections) = (Progress::default(), BTreeMap::new());
    let mut writer = Writer {
        server,
        servers: std::slice::from_ref(server),
        users,
        ledger,
        progress: &progress,
        number: 0,
        side: 0,
        both: false,
        connections,
    };
    writer.deliver(0, 25_000);
}

fn play_phase(scene: &Scene, phase: &Phase, users: &[String], ledger: &Mutex<Ledger>) {
    let progress = Progress::default();
    let writer = |number| Writer {
        server: &scene.servers()[phase.side_of(number)],
        servers: scene.servers(),
        users,
        ledger,
        progress: &progress,
        number,
        side: phase.side_of(number),
        both: phase.both,
        connections: BTreeMap::new(),
    };
    ledger.lock().expect("a ledger").share_out(phase.clients.len());
    for user in 0..users.len() {
        for number in 0..if phase.both { 2 } else { 1 } {
            let mut first = writer(number);
            first.deliver(user, 0);
            let mut imap = Imap::login(first.server, &users[user]);
            for mailbox in &plan::MAILBOXES[1..] {
                // From the second phase on they are there.
                imap.command(&format!("CREATE {mailbox}")).expect("no fault yet");
            }
        }
    }
    progress.expect_clients(phase.clients.len());
    std::thread::scope(|scope| {
        for (number, steps) in phase.clients.iter().enumerate() {
            let writer = writer(number);
            scope.spawn(move || writer.play(steps));
        }
        let read = 1 - phase.writer;
        if phase.down != Some(read) {
            let reader = Reader::on(&scene.servers()[read], users);
            scope.spawn(|| reader.look_at_everything(&progress));
        }
        Faults::on(scene, phase.down).play(&phase.events, &progress);
    });
}

fn check(scene: &Scene, users: &[String], ledger: &Mutex<Ledger>) {
    let is_rebuilt = |user: &String| scene.members().iter().any(|server| was_rebuilt(server, user));
    for server in scene.members() {
        // Dovecot may make an mdbox's indexes anew each time that it is opened, and so has something to tell each time.
        wait_until(DEADLINE, &format!("nothing is pending on {}", server.name()), || {
            server.has_nothing_pending() || users.iter().any(is_rebuilt)
        });
    }
    let is_any_rebuilt = users.iter().any(is_rebuilt);
    for (number, user) in users.iter().enumerate() {
        if is_rebuilt(user) {
            scene.members().iter().for_each(|server| resync_what_is_corrupted(server, user));
            scene.members().iter().for_each(|server| wait_until_nothing_is_lost(server, user, number, ledger));
            scene.members()[0].try_doveadm(&["dovetail", "resync", "-u", user]);
        }
        match is_any_rebuilt {
            true => scene.converged_while_busy(DEADLINE, user),
            false => scene.converged_within(DEADLINE, user),
        };
        // Dovecot finds expunged mails again when it makes an mdbox's indexes anew.
        let may_be_more = scene.members().iter().any(|server| was_rebuilt(server, user) || has_lost_uids(server, user));
        for server in scene.members() {
            let found = everything(server, user).unwrap_or_else(|error| panic!("{error}"));
            let ledger = ledger.lock().expect("a ledger");
            if may_be_more {
                let lost = ledger.lost(number, &found);
                assert!(lost.is_empty(), "{user} on {} lost:\n{}", server.name(), lost.join("\n"));
            } else {
                ledger.check(server.name(), number, &found);
            }
        }
    }
}

/// While Dovecot makes the indexes anew, sessions may break, and what is pending comes later.
fn wait_until_nothing_is_lost(server: &Server, user: &str, number: usize, ledger: &Mutex<Ledger>) {
    let mut wrong = String::new();
    holds_within_slowly(DEADLINE, || {
        wrong = match everything(server, user) {
            Ok(found) => ledger.lock().expect("a ledger").lost(number, &found).join("\n"),
            Err(error) => error,
        };
        wrong.is_empty()
    });
    assert!(wrong.is_empty(), "{user} on {} lost:\n{wrong}", server.name());
}

/// All mails of a user as a client sees them: (mailbox, token, text).
fn everything(server: &Server, user: &str) -> Result<Vec<(String, String, Vec<u8>)>, String> {
    let mut imap = Imap::login(server, user);
    let mut ok = |command: &str| {
        let what = format!("{}: {user}: {command}", server.name());
        let answer = imap.command(command).map_err(|_| format!("{what}: connection lost"))?;
        match answer.is_ok() {
            true => Ok(answer.untagged),
            false => Err(format!("{what} was answered {}", answer.result)),
        }
    };
    let mut found = Vec::new();
    for line in ok("LIST \"\" *")? {
        let line = String::from_utf8_lossy(&line).into_owned();
        if line.contains("\\Noselect") {
            continue;
        }
        let mailbox = line.rsplit(' ').next().unwrap_or_default().trim_matches('"').to_owned();
        ok(&format!("EXAMINE {mailbox}"))?;
        for line in ok("UID FETCH 1:* (BODY.PEEK[])")? {
            if let Some(text) = literal(&line) {
                found.push((mailbox.clone(), token(text), text.to_vec()));
            }
        }
    }
    Ok(found)
}
