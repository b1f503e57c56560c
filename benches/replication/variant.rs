//! What is compared, and how its servers are set up. sdbox everywhere.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::cluster::janitor::Janitor;
use crate::cluster::ports::PortBlock;
use crate::cluster::{holds_within, Cluster, Format, Server, Setup, Version};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// One Dovecot without any replication.
    Plain,
    /// Two, with the replication that came with Dovecot 2.3: dsync on every change.
    Dsync,
    /// Two, with ours.
    Dovetail,
}

/// Servers of a variant, and what must live as long as they do.
pub struct Running {
    cluster: Cluster,
    _ports: Option<PortBlock>,
    _janitor: Option<Janitor>,
}

impl Running {
    /// Where the changes of `a` must show: on itself, if nothing is replicated.
    pub fn peer(&self) -> &Server {
        self.cluster.servers().last().expect("a cluster has servers")
    }
}

impl std::ops::Deref for Running {
    type Target = Cluster;
    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl Variant {
    /// Those of `names` (space-separated) that this machine's Dovecot can run, in the order of the table.
    pub fn wanted(names: &str) -> Vec<Variant> {
        let mut variants: Vec<Variant> = names
            .split_whitespace()
            .map(|name| {
                [Variant::Plain, Variant::Dsync, Variant::Dovetail]
                    .into_iter()
                    .find(|variant| variant.name() == name)
                    .unwrap_or_else(|| panic!("{name:?} is none of plain, dsync, dovetail"))
            })
            .collect();
        if variants.contains(&Variant::Dsync) && installed_version() != Version::V23 {
            println!("dsync: skipped: this Dovecot has no replication of its own any more (2.3 was the last that had)");
            variants.retain(|variant| *variant != Variant::Dsync);
        }
        variants
    }

    pub fn name(self) -> &'static str {
        match self {
            Variant::Plain => "plain",
            Variant::Dsync => "dsync",
            Variant::Dovetail => "dovetail",
        }
    }

    pub fn replicates(self) -> bool {
        self != Variant::Plain
    }

    /// Errors that say nothing about the numbers: dsync's replicator asks at its start for all users, which a static userdb
    /// cannot list; it learns of each by his first change.
    pub fn expected_complaints(self) -> &'static [&'static str] {
        match self {
            Variant::Dsync => &["iterate users", "listing users failed", "User listing returned failure"],
            _ => &[],
        }
    }

    /// Processes that do the replication, as the kernel names them.
    pub fn is_replication_process(self, name: &str) -> bool {
        match self {
            Variant::Plain => false,
            Variant::Dsync => ["doveadm-server", "replicator", "aggregator"].contains(&name),
            Variant::Dovetail => name.starts_with("dovetail"),
        }
    }

    /// Starts its servers and waits until a mail came through. `in_memory`: mails lie on a tmpfs, which leaves the disk out.
    pub fn start(self, in_memory: bool) -> Running {
        self.start_with(in_memory, &|setup| setup)
    }

    /// The same, with servers that `change` has set up otherwise.
    pub fn start_with(self, in_memory: bool, change: &dyn Fn(Setup) -> Setup) -> Running {
        let mut ports = None;
        let setups: Vec<Setup> = match self {
            Variant::Plain => vec![quiet(Setup::new("a", Format::Sdbox)).without_plugin()],
            Variant::Dovetail => ["a", "b"].map(|name| quiet(Setup::new(name, Format::Sdbox))).into(),
            Variant::Dsync => {
                let mut block = PortBlock::reserve();
                let (a, b) = (block.take(), block.take());
                ports = Some(block);
                [("a", a, b), ("b", b, a)]
                    .map(|(name, own, peer)| {
                        quiet(Setup::new(name, Format::Sdbox))
                            .without_plugin()
                            .extra(&dsync_configuration(own, peer), "")
                    })
                    .into()
            }
        };
        self.start_those(setups.into_iter().map(change).collect(), ports, in_memory)
    }

    /// Servers with these names, each a peer of every other.
    pub fn start_all(self, names: &[&str]) -> Running {
        self.start_those(names.iter().map(|name| quiet(Setup::new(name, Format::Sdbox))).collect(), None, false)
    }

    fn start_those(self, setups: Vec<Setup>, ports: Option<PortBlock>, in_memory: bool) -> Running {
        let cluster = Cluster::start(setups);
        let janitor = in_memory.then(|| move_homes_to_memory(&cluster));
        let running = Running { cluster, _ports: ports, _janitor: janitor };
        running.a().deliver("warm-up", &mail(0));
        let came = holds_within(Duration::from_secs(30), || stored(running.peer(), "warm-up") == 1);
        assert!(came, "{}: the first mail did not reach b\n{}", self.name(), running.peer().log());
        running
    }
}

fn move_homes_to_memory(cluster: &Cluster) -> Janitor {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let id = format!("dovetail-bench-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let folder = Path::new("/dev/shm").join(id);
    let janitor = Janitor::watch(std::slice::from_ref(&folder));
    for server in cluster.servers() {
        let (home, in_memory) = (server.outside("/home"), folder.join(server.name()));
        let moved = std::fs::create_dir_all(&in_memory)
            .and_then(|()| std::os::unix::fs::chown(&in_memory, Some(MAIL_ID), Some(MAIL_ID)))
            .and_then(|()| std::fs::remove_dir(&home))
            .and_then(|()| std::os::unix::fs::symlink(&in_memory, &home));
        moved.unwrap_or_else(|error| panic!("{} -> {}: {error}", home.display(), in_memory.display()));
    }
    janitor
}

/// Debian's user and group `mail`, whose the homes are.
const MAIL_ID: u32 = 8;

fn quiet(setup: Setup) -> Setup {
    setup.extra(PROCESS_LIMITS, PROCESS_LIMITS)
}

/// So that no variant runs into the defaults, which are for small servers.
const PROCESS_LIMITS: &str = "
default_process_limit = 1000
default_client_limit = 4000
";

/// As Dovecot's manual has it (Replication with dsync), with all that it needs on one machine.
fn dsync_configuration(own_port: u16, peer_port: u16) -> String {
    format!(
        "
mail_plugins = $mail_plugins notify replication
doveadm_password = secret
service doveadm {{
  inet_listener {{
    port = {own_port}
  }}
}}
service replicator {{
  process_min_avail = 1
}}
service aggregator {{
  fifo_listener replication-notify-fifo {{
    user = mail
    mode = 0666
  }}
  unix_listener replication-notify {{
    user = mail
    mode = 0666
  }}
}}
plugin {{
  mail_replica = tcp:127.0.0.1:{peer_port}
}}
"
    )
}

fn installed_version() -> Version {
    let output = std::process::Command::new("dovecot").arg("--version").output().expect("dovecot --version");
    match output.stdout.starts_with(b"2.3.") {
        true => Version::V23,
        false => Version::V24,
    }
}

/// A mail of 4 kB; `number` makes it unlike the others.
pub fn mail(number: usize) -> Vec<u8> {
    let mut text = format!(
        "From: sender@client.test\r\nTo: you@client.test\r\nSubject: {number}\r\nMessage-ID: <{number}@client.test>\r\n\r\n"
    )
    .into_bytes();
    while text.len() < 4096 {
        text.extend_from_slice(b"All work and no play makes mail a dull thing to replicate, line by line.\r\n");
    }
    text.truncate(4094);
    text.extend_from_slice(b"\r\n");
    text
}

/// Number of mails in a user's INBOX, counted in the file system: dbox writes the file just before the index entry.
pub fn stored(server: &Server, user: &str) -> usize {
    let folder = server.outside(&format!("/home/{user}/sdbox/mailboxes/INBOX/dbox-Mails"));
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("u.")).count()
}
