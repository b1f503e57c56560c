//! Other people's mail: a fixed number of LMTP deliveries per second, beside what is measured.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::cluster::Server;
use crate::variant::mail;

const CLIENTS: usize = 4;
const USERS: usize = 48;

/// Paces an open loop: the next time comes whether or not the last one was late.
pub struct Pace {
    next: Instant,
    period: Duration,
}

impl Pace {
    pub fn per_sec(rate: f64) -> Pace {
        Pace { next: Instant::now(), period: Duration::from_secs_f64(1.0 / rate) }
    }

    pub fn wait(&mut self) {
        std::thread::sleep(self.next.saturating_duration_since(Instant::now()));
        self.next += self.period;
    }
}

pub struct Load {
    stop: Arc<AtomicBool>,
    delivered: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<()>>,
    start: Instant,
}

impl Load {
    pub fn start(server: &Server, mails_per_sec: f64) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let delivered = Arc::new(AtomicUsize::new(0));
        let clients = (0..CLIENTS)
            .map(|client| {
                let (stop, delivered) = (stop.clone(), delivered.clone());
                let mut lmtp = server.lmtp();
                std::thread::spawn(move || {
                    let mut pace = Pace::per_sec(mails_per_sec / CLIENTS as f64);
                    for number in 0.. {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        pace.wait();
                        let user = load_user(number * CLIENTS + client);
                        lmtp.deliver(&[&user], &mail(number));
                        delivered.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        Load { stop, delivered, clients, start: Instant::now() }
    }

    /// Ends it; returns how many mails per second were really delivered.
    pub fn end(self) -> f64 {
        self.stop.store(true, Ordering::Relaxed);
        let rate = self.delivered.load(Ordering::Relaxed) as f64 / self.start.elapsed().as_secs_f64();
        for client in self.clients {
            client.join().expect("the load's client");
        }
        rate
    }
}

fn load_user(number: usize) -> String {
    format!("load-{}", number % USERS)
}

pub fn load_users() -> Vec<String> {
    (0..USERS).map(load_user).collect()
}
