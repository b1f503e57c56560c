//! Who is at the other end of a connection between two servers: TLS 1.3 with certificates on both sides.
//!
//! [`Credentials`] is what a relay has of its own and whom it trusts; a [`Session`] is one connection's TLS, between any
//! socket and the frames; [`Trust`] is the one rule for both sides. [`authority`] makes certificates for those who have none.
//! Guarantees that no byte of a peer is handed on before the handshake has proven that it has the key of a certificate that
//! is trusted, and that a private key is read once and never shown.
#![forbid(unsafe_code)]

pub mod authority;
mod certificate;
mod files;
mod session;
mod trust;

use std::fmt;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::{ring, CryptoProvider};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};

use crate::settings::Tls;
use crate::time::{Clocks, Time};
pub use session::Session;
pub use trust::{Fingerprint, Trust};

/// From so many days before its end on, each start says that a certificate will expire.
const DAYS_TO_WARN: u64 = 30;

/// See the module. For one server and its peers; it does not change: who has new files makes new ones.
pub struct Credentials {
    trust: Arc<Trust>,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

impl Credentials {
    /// Reads the files. What is odd, but not wrong, is logged.
    ///
    /// # Errors
    ///
    /// A full sentence that names the setting.
    pub fn load(settings: &Tls, server: &str, peers: &[&str]) -> Result<Credentials, String> {
        let roots = settings.ca.as_deref().map_or(Ok(Vec::new()), files::roots)?;
        let chain = files::chain(&settings.cert)?;
        let key = files::key(&settings.key)?;
        check_names(server, peers)?;
        let own = &chain[0];
        let cert = settings.cert.display();
        if !certificate::is_of(own, server) {
            let names = certificate::names(own).join(", ");
            return Err(format!("dovetail_cert: {cert}: it is a certificate of '{names}', not of '{server}', which this server is (dovetail_server)"));
        }
        let provider = Arc::new(ring::default_provider());
        let trust = Trust::new(roots, settings.fingerprints.clone(), peers, &provider);
        if let Err(error) = trust.check_chain(own, &chain[1..]) {
            log::warn!(
                "dovetail_cert: {cert}: peers that trust the same dovetail_ca will refuse this server: {error}."
            );
        }
        warn_before_the_end(own, &cert.to_string());
        let key = CertifiedKey::from_der(chain, key, &provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                format!(
                    "dovetail_key: {}: it is not the key of the certificate in dovetail_cert",
                    settings.key.display()
                )
            }
            error => format!("dovetail_key: {}: it cannot be used: {error}", settings.key.display()),
        })?;
        Credentials::new(trust, key, provider).map_err(|error| format!("dovetail_cert: {cert}: {error}"))
    }

    fn new(trust: Trust, key: CertifiedKey, provider: Arc<CryptoProvider>) -> Result<Credentials, rustls::Error> {
        let (trust, key) = (Arc::new(trust), Arc::new(SingleCertAndKey::from(key)));
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(trust.clone())
            .with_client_cert_resolver(key.clone());
        // Nobody on the way needs to know who is asked for, and each connection proves everything anew.
        client.enable_sni = false;
        client.resumption = Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(trust.clone())
            .with_cert_resolver(key);
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Credentials { trust, client: Arc::new(client), server: Arc::new(server) })
    }

    /// The TLS of a connection to this peer.
    pub fn connect(&self, peer: &str) -> Result<Session, String> {
        let name = ServerName::try_from(peer.to_owned()).map_err(|error| error.to_string())?;
        let tls = ClientConnection::new(self.client.clone(), name).map_err(|error| error.to_string())?;
        Ok(Session::new(tls.into(), self.trust.clone()))
    }

    /// The TLS of a connection from one of the peers.
    pub fn accept(&self) -> Result<Session, String> {
        let tls = ServerConnection::new(self.server.clone()).map_err(|error| error.to_string())?;
        Ok(Session::new(tls.into(), self.trust.clone()))
    }
}

/// It may be looked at only once in ten years.
fn warn_before_the_end(own: &CertificateDer<'_>, cert: &str) {
    let Some(not_after) = certificate::not_after(own) else { return };
    let days = not_after.saturating_sub(Clocks::default().now_us() / 1_000_000) / 86_400;
    if days < DAYS_TO_WARN {
        log::warn!("dovetail_cert: {cert}: it expires in {days} days.");
    }
}

/// Certificates have names of hosts, where no case is told apart.
fn check_names(server: &str, peers: &[&str]) -> Result<(), String> {
    let mut known = vec![server];
    check_name(server).map_err(|error| format!("dovetail_server: {error}"))?;
    for peer in peers {
        check_name(peer).map_err(|error| format!("dovetail_peers: {error}"))?;
        if let Some(other) = known.iter().find(|other| other.eq_ignore_ascii_case(peer)) {
            return Err(format!("dovetail_peers: '{peer}' and '{other}' are one name in a certificate"));
        }
        known.push(peer);
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), String> {
    match ServerName::try_from(name) {
        Ok(ServerName::DnsName(_)) => Ok(()),
        _ => Err(format!("'{name}' cannot stand in a certificate: it is no name of a host")),
    }
}
