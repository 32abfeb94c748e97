//! TLS towards clients: the certificate as rustls wants it, and its hash for SCRAM's channel
//! binding.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest, Sha256, Sha384, Sha512};
use tokio_rustls::TlsAcceptor;

use crate::config::ClientTls;
use crate::wire::scram::Binding;

/// Why TLS towards clients cannot be offered.
#[derive(Debug, thiserror::Error)]
#[error("{}: {cause}", path.display())]
pub struct ClientTlsError {
    pub path: PathBuf,
    pub cause: String,
}

#[derive(Clone)]
pub(super) struct ServerTls {
    pub acceptor: TlsAcceptor,
    pub required: bool,
    pub binding: Binding,
}

impl ServerTls {
    pub(super) fn load(config: &ClientTls) -> Result<Self, ClientTlsError> {
        let failed = |path: &PathBuf, cause: String| ClientTlsError {
            path: path.clone(),
            cause,
        };
        let certificates: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(&config.certificate)
            .and_then(Iterator::collect)
            .map_err(|error| failed(&config.certificate, error.to_string()))?;
        let binding = certificates
            .first()
            .and_then(|certificate| end_point_hash(certificate))
            .map_or(Binding::None, Binding::EndPoint);
        let key = PrivateKeyDer::from_pem_file(&config.key).map_err(|error| failed(&config.key, error.to_string()))?;
        let mut server = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| failed(&config.certificate, error.to_string()))?
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .map_err(|error| failed(&config.certificate, error.to_string()))?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(server)),
            required: config.required,
            binding,
        })
    }
}

/// What a client that begins with TLS at once (Postgres 17) must ask for.
pub(super) const ALPN: &[u8] = b"postgresql";

/// `tls-server-end-point` (RFC 5929): the certificate's hash, by the hash function of its
/// signature; `None` where that names none, and then channel binding is not offered.
fn end_point_hash(certificate: &[u8]) -> Option<Vec<u8>> {
    // The last arc of sha*WithRSAEncryption (1.2.840.113549.1.1.x) and of ecdsa-with-SHA*
    // (1.2.840.10045.4.x).
    const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
    const ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04];
    let oid = signature_oid(certificate)?;
    let hash = |bits| match bits {
        256 => Sha256::digest(certificate).to_vec(),
        384 => Sha384::digest(certificate).to_vec(),
        _ => Sha512::digest(certificate).to_vec(),
    };
    // MD5 and SHA-1 are replaced by SHA-256.
    match (oid.strip_prefix(RSA), oid.strip_prefix(ECDSA)) {
        (Some([4 | 5 | 11]), _) => Some(hash(256)),
        (Some([12]), _) => Some(hash(384)),
        (Some([13]), _) => Some(hash(512)),
        (_, Some([1] | [3, 2])) => Some(hash(256)),
        (_, Some([3, 3])) => Some(hash(384)),
        (_, Some([3, 4])) => Some(hash(512)),
        _ => None,
    }
}

/// Certificate ::= SEQUENCE { tbsCertificate SEQUENCE, signatureAlgorithm SEQUENCE { OID … }, … }
fn signature_oid(certificate: &[u8]) -> Option<&[u8]> {
    let (certificate, _) = element(certificate, 0x30)?;
    let (_, rest) = element(certificate, 0x30)?;
    let (algorithm, _) = element(rest, 0x30)?;
    let (oid, _) = element(algorithm, 0x06)?;
    Some(oid)
}

/// One DER element of the given tag: its content, and what follows it.
fn element(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let count = usize::from(first & 0x7f);
        let digits = rest.get(..count).filter(|digits| digits.len() <= 4)?;
        let length = digits.iter().fold(0, |sum, &digit| sum << 8 | usize::from(digit));
        (length, &rest[count..])
    };
    (found == tag && rest.len() >= length).then(|| rest.split_at(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_follows_the_certificates_signature() {
        for (algorithm, expected) in [
            (&rcgen::PKCS_ECDSA_P256_SHA256, Some(32)),
            (&rcgen::PKCS_ECDSA_P384_SHA384, Some(48)),
            (&rcgen::PKCS_ED25519, None),
        ] {
            let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
            let certificate = rcgen::CertificateParams::new(vec!["localhost".into()])
                .unwrap()
                .self_signed(&key)
                .unwrap();
            assert_eq!(end_point_hash(certificate.der()).map(|hash| hash.len()), expected);
        }
        for garbage in [&b""[..], b"\x30", b"\x30\x84\xff\xff\xff\xff", b"\x30\x80"] {
            assert_eq!(end_point_hash(garbage), None);
        }
    }
}
