//! SCRAM-SHA-256, both ends (RFC 5802, RFC 7677), as Postgres speaks it.
//!
//! The end towards clients checks a proof against a [`Verifier`] and hands out the ClientKey that
//! the proof contains; the end towards servers proves a password, or with [`Keys`] what a client
//! has proved. So the proxy can log in as a client of which it knows only the verifier.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

pub const SCRAM_SHA_256: &str = "SCRAM-SHA-256";
pub const SCRAM_SHA_256_PLUS: &str = "SCRAM-SHA-256-PLUS";

/// What Postgres uses for new passwords.
pub const DEFAULT_ITERATIONS: u32 = 4096;
/// More would let a server make the proxy compute for as long as it likes.
const MAX_ITERATIONS: u32 = 1_000_000;

type Key = [u8; 32];

/// Why an exchange ended without agreement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ScramError {
    #[error("malformed SCRAM message")]
    Malformed,
    #[error("SCRAM channel binding does not fit")]
    ChannelBinding,
    #[error("the client requires a SCRAM authorization identity, which is not supported")]
    AuthorizationIdentity,
    #[error("the password does not match")]
    Proof,
    #[error("the server could not prove that it knows the password's verifier")]
    Server,
    #[error("the server's verifier has another salt or iteration count than the one the client proved to know")]
    OtherVerifier,
    #[error("the server asks for {0} SCRAM iterations")]
    Iterations(u32),
}

/// What a server keeps of a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    stored_key: Key,
    server_key: Key,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Verifier(…)")
    }
}

impl Verifier {
    /// Reads `SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey`.
    pub fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("SCRAM-SHA-256$")?;
        let (head, keys) = rest.split_once('$')?;
        let (iterations, salt) = head.split_once(':')?;
        let (stored_key, server_key) = keys.split_once(':')?;
        let iterations = iterations.parse().ok().filter(|&count| count > 0)?;
        Some(Self {
            iterations,
            salt: STANDARD.decode(salt).ok()?,
            stored_key: STANDARD.decode(stored_key).ok()?.try_into().ok()?,
            server_key: STANDARD.decode(server_key).ok()?.try_into().ok()?,
        })
    }

    /// Makes a verifier for a password that is known.
    pub fn derive(password: &str, salt: &[u8], iterations: u32) -> Self {
        let keys = Keys::derive(password, salt, iterations);
        Self {
            iterations,
            salt: salt.to_vec(),
            stored_key: Sha256::digest(keys.client_key).into(),
            server_key: keys.server_key,
        }
    }

    /// A verifier for a user that there is not: the same one each time it is asked for, so that
    /// the exchange does not tell, and one that no password fits.
    pub fn mock(user: &str, secret: &[u8; 32]) -> Self {
        let salt = hmac(secret, &[b"salt ", user.as_bytes()])[..16].to_vec();
        Self {
            iterations: DEFAULT_ITERATIONS,
            salt,
            stored_key: hmac(secret, &[b"stored ", user.as_bytes()]),
            server_key: hmac(secret, &[b"server ", user.as_bytes()]),
        }
    }
}

/// What proves a password without being it. Usable only with the salt and iteration count that
/// the client's proof was made for.
#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    client_key: Key,
    server_key: Key,
    iterations: u32,
    salt: Vec<u8>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys(…)")
    }
}

impl Keys {
    fn derive(password: &str, salt: &[u8], iterations: u32) -> Self {
        // Postgres takes a password as it is where SASLprep cannot be applied to it.
        let prepared = stringprep::saslprep(password).unwrap_or_else(|_| password.into());
        let mut salted = [0; 32];
        pbkdf2::pbkdf2_hmac::<Sha256>(prepared.as_bytes(), salt, iterations, &mut salted);
        Self {
            client_key: hmac(&salted, &[b"Client Key"]),
            server_key: hmac(&salted, &[b"Server Key"]),
            iterations,
            salt: salt.to_vec(),
        }
    }
}

/// What the TLS layer below offers for channel binding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Binding {
    /// SCRAM-SHA-256-PLUS was not offered.
    None,
    /// The hash of the certificate that the client saw (`tls-server-end-point`).
    EndPoint(Vec<u8>),
}

/// The end towards a client, after its first message.
pub struct ExpectProof {
    verifier: Verifier,
    nonce: String,
    /// `c=` of the final message must repeat this.
    channel: Vec<u8>,
    client_first_bare: String,
    server_first: String,
}

impl ExpectProof {
    /// Answers the client's first message; `mechanism` is the one the client chose, `nonce` the
    /// server's own part.
    pub fn begin(
        verifier: Verifier,
        mechanism: &str,
        client_first: &[u8],
        binding: &Binding,
        nonce: &str,
    ) -> Result<Self, ScramError> {
        let text = std::str::from_utf8(client_first).map_err(|_| ScramError::Malformed)?;
        let (flag, rest) = text.split_once(',').ok_or(ScramError::Malformed)?;
        let (identity, bare) = rest.split_once(',').ok_or(ScramError::Malformed)?;
        if !identity.is_empty() {
            return Err(ScramError::AuthorizationIdentity);
        }
        let mut channel = text.as_bytes()[..text.len() - bare.len()].to_vec();
        match (flag, mechanism, binding) {
            ("n", SCRAM_SHA_256, _) | ("y", SCRAM_SHA_256, Binding::None) => {}
            ("p=tls-server-end-point", SCRAM_SHA_256_PLUS, Binding::EndPoint(hash)) => channel.extend_from_slice(hash),
            // "y" though we offered it: somebody removed the offer on its way.
            _ => return Err(ScramError::ChannelBinding),
        }
        let mut attributes = bare.split(',');
        // Postgres takes the user from the startup packet; the name here is ignored.
        attributes
            .next()
            .filter(|name| name.starts_with("n="))
            .ok_or(ScramError::Malformed)?;
        let client_nonce = attributes
            .next()
            .and_then(|attribute| attribute.strip_prefix("r="))
            .filter(|nonce| !nonce.is_empty() && nonce.bytes().all(|byte| byte.is_ascii_graphic()))
            .ok_or(ScramError::Malformed)?;
        let nonce = format!("{client_nonce}{nonce}");
        let server_first = format!(
            "r={nonce},s={},i={}",
            STANDARD.encode(&verifier.salt),
            verifier.iterations
        );
        Ok(Self {
            verifier,
            nonce,
            channel,
            client_first_bare: bare.to_owned(),
            server_first,
        })
    }

    /// What to send now.
    pub fn message(&self) -> &str {
        &self.server_first
    }

    /// Checks the client's proof.
    pub fn finish(self, client_final: &[u8]) -> Result<Proven, ScramError> {
        let text = std::str::from_utf8(client_final).map_err(|_| ScramError::Malformed)?;
        let (without_proof, proof) = text.rsplit_once(",p=").ok_or(ScramError::Malformed)?;
        let mut attributes = without_proof.split(',');
        let channel = attributes.next().and_then(|attribute| attribute.strip_prefix("c="));
        let nonce = attributes.next().and_then(|attribute| attribute.strip_prefix("r="));
        let (Some(channel), Some(nonce)) = (channel, nonce) else {
            return Err(ScramError::Malformed);
        };
        if STANDARD.decode(channel).ok().as_deref() != Some(&self.channel[..]) {
            return Err(ScramError::ChannelBinding);
        }
        if nonce != self.nonce {
            return Err(ScramError::Malformed);
        }
        let proof: Key = STANDARD
            .decode(proof)
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or(ScramError::Malformed)?;
        let message = [&self.client_first_bare, ",", &self.server_first, ",", without_proof].concat();
        let signature = hmac(&self.verifier.stored_key, &[message.as_bytes()]);
        let client_key = xor(proof, signature);
        let stored_key: Key = Sha256::digest(client_key).into();
        if !bool::from(stored_key.ct_eq(&self.verifier.stored_key)) {
            return Err(ScramError::Proof);
        }
        let server_signature = hmac(&self.verifier.server_key, &[message.as_bytes()]);
        Ok(Proven {
            message: format!("v={}", STANDARD.encode(server_signature)),
            keys: Keys {
                client_key,
                server_key: self.verifier.server_key,
                iterations: self.verifier.iterations,
                salt: self.verifier.salt,
            },
        })
    }
}

/// A client that has proved to know the password.
pub struct Proven {
    /// The server's final message.
    pub message: String,
    pub keys: Keys,
}

/// What the end towards a server proves with.
#[derive(Clone, Copy)]
pub enum Proof<'a> {
    Password(&'a str),
    Keys(&'a Keys),
}

/// The end towards a server, after its own first message.
pub struct ExpectChallenge {
    nonce: String,
}

/// RFC 5802's "n,,": no channel binding asked for.
const GS2_HEADER: &str = "n,,";

impl ExpectChallenge {
    pub const fn new(nonce: String) -> Self {
        Self { nonce }
    }

    /// The first message. The user name stays empty: Postgres takes it from the startup packet.
    pub fn message(&self) -> String {
        format!("{GS2_HEADER}n=,r={}", self.nonce)
    }

    /// Answers the server's challenge.
    pub fn answer(self, server_first: &[u8], proof: Proof<'_>) -> Result<(String, ExpectSignature), ScramError> {
        let text = std::str::from_utf8(server_first).map_err(|_| ScramError::Malformed)?;
        let mut attributes = text.split(',');
        let mut attribute = |prefix: &str| {
            attributes
                .next()
                .and_then(|attribute| attribute.strip_prefix(prefix))
                .ok_or(ScramError::Malformed)
        };
        let nonce = attribute("r=")?;
        let salt = STANDARD.decode(attribute("s=")?).map_err(|_| ScramError::Malformed)?;
        let iterations: u32 = attribute("i=")?.parse().map_err(|_| ScramError::Malformed)?;
        if !nonce.starts_with(&self.nonce) || nonce.len() == self.nonce.len() {
            return Err(ScramError::Malformed);
        }
        if iterations == 0 || iterations > MAX_ITERATIONS {
            return Err(ScramError::Iterations(iterations));
        }
        let derived;
        let keys = match proof {
            Proof::Password(password) => {
                derived = Keys::derive(password, &salt, iterations);
                &derived
            }
            Proof::Keys(keys) if keys.salt == salt && keys.iterations == iterations => keys,
            Proof::Keys(_) => return Err(ScramError::OtherVerifier),
        };
        let without_proof = format!("c={},r={nonce}", STANDARD.encode(GS2_HEADER));
        let message = format!("n=,r={},{text},{without_proof}", self.nonce);
        let stored_key: Key = Sha256::digest(keys.client_key).into();
        let proof = xor(keys.client_key, hmac(&stored_key, &[message.as_bytes()]));
        let answer = format!("{without_proof},p={}", STANDARD.encode(proof));
        let expected = hmac(&keys.server_key, &[message.as_bytes()]);
        Ok((answer, ExpectSignature { expected }))
    }
}

/// The end towards a server, after its proof.
pub struct ExpectSignature {
    expected: Key,
}

impl ExpectSignature {
    /// Checks that the server knows the verifier too.
    pub fn finish(self, server_final: &[u8]) -> Result<(), ScramError> {
        let signature: Key = server_final
            .strip_prefix(b"v=")
            .and_then(|encoded| STANDARD.decode(encoded).ok())
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or(ScramError::Server)?;
        if bool::from(signature.ct_eq(&self.expected)) {
            Ok(())
        } else {
            Err(ScramError::Server)
        }
    }
}

/// A nonce of eighteen random bytes, printable.
pub fn nonce() -> String {
    STANDARD.encode(rand::random::<[u8; 18]>())
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> Key {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

fn xor(mut a: Key, b: Key) -> Key {
    for (a, b) in a.iter_mut().zip(b) {
        *a ^= b;
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    // RFC 7677, section 3: user "user", password "pencil".
    const SALT: &str = "W22ZaJ0SNY7soEsUEjb6gQ==";
    const SERVER_NONCE: &str = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
    const CLIENT_FIRST: &str = "n,,n=user,r=rOprNGfwEbeRWgbNEkqO";
    const SERVER_FIRST: &str = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
    const CLIENT_FINAL: &str = "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
         p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
    const SERVER_FINAL: &str = "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=";

    fn pencil() -> Verifier {
        Verifier::derive("pencil", &STANDARD.decode(SALT).unwrap(), 4096)
    }

    fn exchange(verifier: Verifier, proof: Proof<'_>) -> Result<Proven, ScramError> {
        let client = ExpectChallenge::new("abc".into());
        let server = ExpectProof::begin(
            verifier,
            SCRAM_SHA_256,
            client.message().as_bytes(),
            &Binding::None,
            "xyz",
        )?;
        let (answer, client) = client.answer(server.message().as_bytes(), proof)?;
        let proven = server.finish(answer.as_bytes())?;
        client.finish(proven.message.as_bytes())?;
        Ok(proven)
    }

    #[test]
    fn the_exchange_of_rfc_7677() {
        let server = ExpectProof::begin(
            pencil(),
            SCRAM_SHA_256,
            CLIENT_FIRST.as_bytes(),
            &Binding::None,
            SERVER_NONCE,
        )
        .unwrap();
        assert_eq!(server.message(), SERVER_FIRST);
        let proven = server.finish(CLIENT_FINAL.as_bytes()).unwrap();
        assert_eq!(proven.message, SERVER_FINAL);
        assert_eq!(
            proven.keys,
            Keys::derive("pencil", &STANDARD.decode(SALT).unwrap(), 4096)
        );
    }

    #[test]
    fn keys_recovered_from_a_proof_log_in_as_the_password_does() {
        let proven = exchange(pencil(), Proof::Password("pencil")).unwrap();
        exchange(pencil(), Proof::Keys(&proven.keys)).unwrap();
        let other = Verifier::derive("pencil", b"another salt", 4096);
        assert_eq!(
            exchange(other, Proof::Keys(&proven.keys)).err(),
            Some(ScramError::OtherVerifier)
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert_eq!(
            exchange(pencil(), Proof::Password("pen")).err(),
            Some(ScramError::Proof)
        );
        let mock = Verifier::mock("nobody", &[7; 32]);
        assert_eq!(mock, Verifier::mock("nobody", &[7; 32]));
        assert_eq!(exchange(mock, Proof::Password("")).err(), Some(ScramError::Proof));
        let begin = |mechanism, first: &str, binding| {
            ExpectProof::begin(pencil(), mechanism, first.as_bytes(), &binding, "s").err()
        };
        let end_point = || Binding::EndPoint(vec![1]);
        use ScramError::{AuthorizationIdentity, ChannelBinding, Malformed};
        for (mechanism, first, binding, expected) in [
            (SCRAM_SHA_256, "y,,n=,r=a", Binding::None, None),
            (SCRAM_SHA_256, "y,,n=,r=a", end_point(), Some(ChannelBinding)),
            (SCRAM_SHA_256, "n,,n=,r=a", end_point(), None),
            (SCRAM_SHA_256_PLUS, "n,,n=,r=a", end_point(), Some(ChannelBinding)),
            (SCRAM_SHA_256_PLUS, "p=tls-server-end-point,,n=,r=a", end_point(), None),
            (
                SCRAM_SHA_256_PLUS,
                "p=tls-unique,,n=,r=a",
                end_point(),
                Some(ChannelBinding),
            ),
            (
                SCRAM_SHA_256_PLUS,
                "p=tls-server-end-point,,n=,r=a",
                Binding::None,
                Some(ChannelBinding),
            ),
            (
                SCRAM_SHA_256,
                "n,a=x,n=,r=a",
                Binding::None,
                Some(AuthorizationIdentity),
            ),
            (SCRAM_SHA_256, "n,,n=", Binding::None, Some(Malformed)),
            (SCRAM_SHA_256, "n,,n=,r=", Binding::None, Some(Malformed)),
            (SCRAM_SHA_256, "", Binding::None, Some(Malformed)),
        ] {
            assert_eq!(begin(mechanism, first, binding), expected, "{mechanism} {first}");
        }
    }

    #[test]
    fn verifiers_as_pg_authid_has_them() {
        let text = postgres_protocol::password::scram_sha_256(b"secret");
        exchange(Verifier::parse(&text).unwrap(), Proof::Password("secret")).unwrap();
        for bad in ["md5abc", "SCRAM-SHA-256$0:YQ==$a:b", "SCRAM-SHA-256$4096:YQ==$a", ""] {
            assert_eq!(Verifier::parse(bad), None, "{bad}");
        }
    }
}
