//! The rule, for both sides: a server is who its certificate says, if that was issued by the authority or is pinned.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{verify_tls13_signature, CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme};
use webpki::{EndEntityCert, KeyUsage};

use super::certificate;

/// SHA-256 of a certificate.
pub type Fingerprint = [u8; 32];

/// Why a certificate does not prove a server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    #[error("its certificate cannot be read: {0}")]
    Unreadable(String),
    #[error("its certificate was not issued by dovetail_ca")]
    UnknownIssuer,
    #[error("its certificate has expired")]
    Expired,
    #[error("its certificate is not valid yet: which clock is wrong?")]
    NotValidYet,
    #[error("its certificate is not trusted: {0}")]
    Untrusted(String),
    #[error("its certificate is not the one whose fingerprint dovetail_peer_fingerprints names, but {0}")]
    OtherFingerprint(String),
    #[error("its certificate is of '{found}', not of '{expected}'")]
    OtherName { found: String, expected: String },
    #[error("its certificate is of '{0}', which is not in dovetail_peers here")]
    NoPeer(String),
}

impl TrustError {
    fn of_chain(error: &webpki::Error) -> TrustError {
        match error {
            webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => TrustError::UnknownIssuer,
            webpki::Error::CertExpired { .. } => TrustError::Expired,
            webpki::Error::CertNotValidYet { .. } => TrustError::NotValidYet,
            error => TrustError::Untrusted(error.to_string()),
        }
    }

    /// The alert says more than that there was an error, where it can.
    fn alert(self) -> Error {
        Error::InvalidCertificate(match self {
            TrustError::Expired => CertificateError::Expired,
            TrustError::UnknownIssuer => CertificateError::UnknownIssuer,
            TrustError::NotValidYet => CertificateError::NotValidYet,
            error => CertificateError::Other(OtherError(Arc::new(error))),
        })
    }

    pub fn of_alert(error: &CertificateError) -> TrustError {
        match error {
            CertificateError::Expired => TrustError::Expired,
            CertificateError::UnknownIssuer => TrustError::UnknownIssuer,
            CertificateError::NotValidYet => TrustError::NotValidYet,
            error => TrustError::Untrusted(error.to_string()),
        }
    }
}

/// See the module.
pub struct Trust {
    roots: Vec<TrustAnchor<'static>>,
    /// Of these peers only these certificates are theirs, whoever issued them, and however old they are.
    pinned: Vec<(String, Fingerprint)>,
    peers: Vec<String>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Trust")
    }
}

impl Trust {
    pub fn new(
        roots: Vec<TrustAnchor<'static>>,
        pinned: Vec<(String, Fingerprint)>,
        peers: &[&str],
        provider: &CryptoProvider,
    ) -> Trust {
        let peers = peers.iter().map(|peer| (*peer).to_owned()).collect();
        Trust { roots, pinned, peers, algorithms: provider.signature_verification_algorithms }
    }

    /// Whether the certificate is this server's.
    pub fn check(
        &self,
        server: &str,
        own: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<(), TrustError> {
        let names = certificate::read_names(own)?;
        if !certificate::has(&names, server) {
            return Err(TrustError::OtherName { found: names.join(", "), expected: server.into() });
        }
        let mut pinned = self.pinned.iter().filter(|(name, _)| name.eq_ignore_ascii_case(server)).peekable();
        if pinned.peek().is_none() {
            return self.check_chain(own, intermediates);
        }
        let fingerprint = certificate::fingerprint(own);
        match pinned.any(|(_, known)| *known == fingerprint) {
            true => Ok(()),
            false => Err(TrustError::OtherFingerprint(certificate::hex(&fingerprint))),
        }
    }

    /// Whether the authority has issued it, and it can be used on both sides of a connection now.
    pub fn check_chain(
        &self,
        own: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<(), TrustError> {
        let certificate = EndEntityCert::try_from(own).map_err(|error| TrustError::Unreadable(error.to_string()))?;
        for usage in [KeyUsage::server_auth(), KeyUsage::client_auth()] {
            certificate
                .verify_for_usage(self.algorithms.all, &self.roots, intermediates, UnixTime::now(), usage, None, None)
                .map_err(|error| TrustError::of_chain(&error))?;
        }
        Ok(())
    }

    /// Whether it is of one of the peers; which one it is, its greeting must say.
    fn check_any(&self, own: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> Result<(), TrustError> {
        let names = certificate::read_names(own)?;
        let mut error = None;
        for peer in self.peers.iter().filter(|peer| certificate::has(&names, peer)) {
            match self.check(peer, own, intermediates) {
                Ok(()) => return Ok(()),
                Err(of_peer) => error = Some(of_peer),
            }
        }
        // That of a stranger is not read aloud.
        Err(match error {
            Some(error) => error,
            None => self.check_chain(own, intermediates).err().unwrap_or(TrustError::NoPeer(names.join(", "))),
        })
    }
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let ServerName::DnsName(name) = server else {
            return Err(Error::InvalidCertificate(CertificateError::NotValidForName));
        };
        self.check(name.as_ref(), own, intermediates).map_err(TrustError::alert)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Trust {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        own: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check_any(own, intermediates).map_err(TrustError::alert)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
