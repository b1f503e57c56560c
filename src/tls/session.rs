//! One connection's TLS: between its socket, which does not block, and its frames.

use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::sync::Arc;

use rustls::{AlertDescription, CertificateError, Connection, Error, InvalidMessage, PeerIncompatible};

use super::trust::{Trust, TrustError};

/// What may wait in here to be encrypted, and to be sent: at most so many bytes each.
const BUFFER_BYTES_MAX: usize = 64 << 10;

/// See the module.
pub struct Session {
    tls: Connection,
    trust: Arc<Trust>,
    /// The other side has said that nothing more comes.
    ended: bool,
    /// Bytes that the socket took.
    sent: u64,
}

impl Session {
    pub fn new(mut tls: Connection, trust: Arc<Trust>) -> Session {
        tls.set_buffer_limit(Some(BUFFER_BYTES_MAX));
        Session { tls, trust, ended: false, sent: 0 }
    }

    /// Bytes that the socket took so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Whether the other side has proven to be this server. The error: why not.
    pub fn proves(&self, server: &str) -> Result<(), String> {
        let (own, intermediates) =
            self.tls.peer_certificates().and_then(<[_]>::split_first).ok_or("it has shown no certificate")?;
        self.trust.check(server, own, intermediates).map_err(|error| error.to_string())
    }

    /// Reads from the socket once, by way of the buffer; `take` gets what was in it. False at the end.
    ///
    /// # Errors
    ///
    /// As the socket's; [`ErrorKind::InvalidData`] with a sentence about the other side if it is not to be talked to.
    pub fn read(
        &mut self,
        socket: &mut (impl Read + Write),
        buffer: &mut [u8],
        mut take: impl FnMut(&[u8]),
    ) -> io::Result<bool> {
        if self.ended {
            return Ok(false);
        }
        let length = socket.read(buffer)?;
        if length == 0 {
            return match self.tls.is_handshaking() {
                true => {
                    Err(refused("it closed the connection in the TLS handshake: is dovetail_cert set there?".into()))
                }
                false => Ok(false),
            };
        }
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            self.tls.read_tls(&mut rest)?;
            let state = self.tls.process_new_packets().map_err(|error| {
                // The alert, if there is room for it.
                let _ = self.tls.write_tls(socket);
                refused(explain(&error))
            })?;
            self.hand_on(&mut take)?;
            if state.peer_has_closed() {
                // What came with it is to be looked at before.
                self.ended = true;
                return Ok(true);
            }
        }
        self.flush(socket)?;
        Ok(true)
    }

    fn hand_on(&mut self, take: &mut impl FnMut(&[u8])) -> io::Result<()> {
        let mut reader = self.tls.reader();
        loop {
            let length = match reader.fill_buf() {
                Ok([]) => return Ok(()),
                Ok(bytes) => {
                    take(bytes);
                    bytes.len()
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            reader.consume(length);
        }
    }

    /// Takes bytes and sends what the socket takes; how many it took. Before the handshake they wait here.
    pub fn write(&mut self, socket: &mut impl Write, bytes: &[u8]) -> io::Result<usize> {
        let length = self.tls.writer().write(bytes)?;
        self.flush(socket)?;
        match length {
            0 => Err(ErrorKind::WouldBlock.into()),
            length => Ok(length),
        }
    }

    /// Sends what the socket takes. True if nothing is left.
    pub fn flush(&mut self, socket: &mut impl Write) -> io::Result<bool> {
        while self.tls.wants_write() {
            match self.tls.write_tls(socket) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(length) => self.sent += length as u64,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Whether something waits for the socket.
    pub fn is_waiting(&self) -> bool {
        self.tls.wants_write()
    }

    /// Tells the other side, if its socket takes it, that this is the end and no accident.
    pub fn say_end(&mut self, socket: &mut impl Write) {
        self.tls.send_close_notify();
        let _ = self.flush(socket);
    }
}

fn refused(why: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

/// What is wrong with the other side, for people.
fn explain(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(CertificateError::Other(other)) => other.to_string(),
        Error::InvalidCertificate(error) => TrustError::of_alert(error).to_string(),
        Error::NoCertificatesPresented => "it has shown no certificate".into(),
        Error::InvalidMessage(
            InvalidMessage::InvalidContentType
            | InvalidMessage::UnknownProtocolVersion
            | InvalidMessage::MessageTooLarge,
        ) => "it does not speak TLS".into(),
        Error::PeerIncompatible(
            PeerIncompatible::SupportedVersionsExtensionRequired
            | PeerIncompatible::ServerDoesNotSupportTls12Or13
            | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
            | PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled,
        )
        | Error::AlertReceived(AlertDescription::ProtocolVersion) => "it does not speak TLS 1.3".into(),
        Error::AlertReceived(alert) => {
            format!("it refuses this server or its certificate, and its log says why (TLS alert {alert:?})")
        }
        error => format!("TLS failed: {error}"),
    }
}
