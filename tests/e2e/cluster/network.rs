//! A network of its own for each server, and a cable between each two: real TCP over links that go down without a word.
//!
//! The namespaces have no names. Each lives as long as a process that waits for the end of its input, which comes with
//! the end of the test, whatever that was.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::ports::LOOPBACK;

/// What takes so long as is said, as on a [`super::line::Proxy`].
const CHUNK_BITS: u64 = 4096 * 8;

pub struct Namespace {
    holder: Child,
}

impl Namespace {
    pub fn new() -> Namespace {
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "ip link set lo up && echo && exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare");
        let mut line = String::new();
        let out = holder.stdout.as_mut().expect("piped");
        BufReader::new(out).read_line(&mut line).expect("a pipe");
        assert_eq!(line, "\n", "no network namespace can be made");
        Namespace { holder }
    }

    /// For `nsenter` and `ip`.
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    pub fn connect(&self, port: u16) -> io::Result<TcpStream> {
        let namespace = File::open(format!("/proc/{}/ns/net", self.pid()))?;
        // A thread that ends in the other namespace; the socket stays there, too.
        let connect = move || {
            // SAFETY: the file is open; only this thread changes.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            TcpStream::connect((LOOPBACK, port))
        };
        std::thread::spawn(connect).join().expect("no panic")
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

/// In the network of process `pid`.
fn run(pid: u32, program: &str, args: &[&str]) {
    let mut command = Command::new("nsenter");
    let output = command.args(["--net", "--target", &pid.to_string(), program]).args(args).output().expect("nsenter");
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Between two servers' networks. What happens to it happens at the first one's end.
pub struct Cable {
    pid: u32,
    device: String,
    /// Of both ends.
    pub addresses: [String; 2],
}

impl Cable {
    pub fn between(one: &Namespace, other: &Namespace) -> Cable {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let device = format!("dovetail{number}");
        let peer = other.pid().to_string();
        run(one.pid(), "ip", &["link", "add", &device, "type", "veth", "peer", "name", &device, "netns", &peer]);
        let addresses = [1, 2].map(|end| format!("10.{}.{}.{end}", number / 256 % 256, number % 256));
        for (namespace, address) in [one, other].into_iter().zip(&addresses) {
            run(namespace.pid(), "ip", &["address", "add", &format!("{address}/24"), "dev", &device]);
            run(namespace.pid(), "ip", &["link", "set", &device, "up"]);
        }
        Cable { pid: one.pid(), device, addresses }
    }

    /// Nothing passes any more, and nobody is told.
    pub fn unplug(&self, unplugged: bool) {
        run(self.pid, "ip", &["link", "set", &self.device, if unplugged { "down" } else { "up" }]);
    }

    /// A few kilobytes take so much longer. (Not every kernel has netem, which delays; all have tbf.)
    pub fn delay(&self, delay: Duration) {
        // Without delay, without limits, as at first.
        let rate = CHUNK_BITS.checked_div(delay.as_millis() as u64).unwrap_or(10_000_000);
        let limits = ["rate", &format!("{rate}kbit"), "burst", "32kb", "latency", "10s"];
        run(self.pid, "tc", &[&["qdisc", "replace", "dev", &self.device, "root", "tbf"][..], &limits].concat());
    }
}
