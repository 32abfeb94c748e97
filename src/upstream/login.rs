//! Opens a session at a server as a client's user: connect, TLS, authentication, up to the first
//! ReadyForQuery. What the server says on the way is kept as raw frames for the client.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use md5::{Digest, Md5};
use pgwire::messages::Message;
use pgwire::messages::startup::{Password, SASLInitialResponse, SASLResponse};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use super::stream::{self, Stream};
use super::tls;
use crate::config::{Secret, SslMode, Target};
use crate::wire::error::{SqlError, sqlstate};
use crate::wire::frame::{HEADER_LEN, Header};
use crate::wire::startup::{Parameters, Version};
use crate::wire::{backend, scram, split_cstr, startup};

/// Whom to open a session as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    pub user: String,
    pub proof: Proof,
    /// The client's startup parameters; user and database inside are ignored.
    pub parameters: Parameters,
    /// The newest protocol version that the client can be spoken to in.
    pub version: Version,
}

/// What the proxy can prove to a server on behalf of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    Password(Secret),
    /// Recovered from the client's own SCRAM proof.
    Keys(Box<scram::Keys>),
    /// The client was trusted, and no password is listed for it.
    Nothing,
}

/// A session at a server, idle.
#[derive(Debug)]
pub struct Backend {
    pub stream: Stream,
    pub pid: i32,
    pub key: Box<[u8]>,
    /// What the server said of itself: ParameterStatus, BackendKeyData, notices, and the
    /// ReadyForQuery at the end, as it sent them.
    pub greeting: Vec<u8>,
    /// What was read behind the ReadyForQuery.
    pub leftover: Vec<u8>,
}

impl Backend {
    /// The parameters that the server reported, in its order.
    pub fn parameters(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        frames(&self.greeting)
            .filter(|(kind, _)| *kind == b'S')
            .filter_map(|(_, body)| backend::parameter(body))
    }

    /// The major version that the server reported.
    pub fn major(&self) -> Option<u32> {
        let (_, version) = self.parameters().find(|(name, _)| *name == b"server_version")?;
        let digits = version.iter().take_while(|byte| byte.is_ascii_digit()).count();
        std::str::from_utf8(&version[..digits]).ok()?.parse().ok()
    }
}

/// The whole frames in `bytes`, as kind and body.
pub fn frames(bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let header = Header::backend(rest).ok()??;
        let frame = rest.get(..header.total)?;
        rest = &rest[header.total..];
        Some((header.kind, &frame[HEADER_LEN..]))
    })
}

/// Why a session could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    #[error("{target}: {cause}")]
    Unreachable { target: String, cause: String },
    /// The server gave an error: its whole frame, for the client.
    #[error("{target}: {}", backend::error_text(frame.get(HEADER_LEN..).unwrap_or_default()))]
    Refused { target: String, frame: Vec<u8> },
    /// The server asks for what the proxy does not have.
    #[error("{target}: {cause}")]
    Unproven { target: String, cause: String },
}

impl LoginError {
    pub(crate) fn unreachable(target: &Target, cause: impl Into<String>) -> Self {
        Self::Unreachable {
            target: target.describe(),
            cause: cause.into(),
        }
    }

    /// What the client is told: the server's own words where it gave some.
    pub fn to_frame(&self) -> Vec<u8> {
        match self {
            Self::Refused { frame, .. } => frame.clone(),
            Self::Unreachable { .. } => {
                SqlError::fatal(sqlstate::CONNECTION_FAILURE, format!("no connection to {self}")).to_frame()
            }
            Self::Unproven { .. } => {
                SqlError::fatal(sqlstate::INVALID_AUTHORIZATION, format!("no login at {self}")).to_frame()
            }
        }
    }
}

/// Opens a session. The caller bounds the time it may take.
pub async fn login(target: &Target, login: &Login) -> Result<Backend, LoginError> {
    let stream = open(target).await?;
    let mut conversation = Conversation {
        target,
        stream,
        buffer: Vec::new(),
    };
    let packet = startup::packet(login.version, &login.user, target.dbname(), &login.parameters);
    conversation.send(&packet).await?;
    conversation.authenticate(login).await?;
    conversation.greeting().await
}

/// The protocol version that a server speaks at most. It says so before it asks who is there, so
/// no login is needed.
pub async fn newest_version(target: &Target, user: &str) -> Result<Version, LoginError> {
    let stream = open(target).await?;
    let mut conversation = Conversation {
        target,
        stream,
        buffer: Vec::new(),
    };
    let packet = startup::packet(Version::V3_2, user, target.dbname(), &Parameters::default());
    conversation.send(&packet).await?;
    let (kind, body) = conversation.frame().await?;
    Ok(match (kind, body.first_chunk::<4>()) {
        (b'v', Some(version)) => {
            let version = u32::from_be_bytes(*version);
            // Some servers give the minor version alone.
            Version(if version < Version::V3_0.0 {
                version + Version::V3_0.0
            } else {
                version
            })
        }
        (b'R', _) => Version::V3_2,
        // An error (too many connections, starting up) tells nothing: the oldest is safe.
        _ => Version::V3_0,
    })
}

/// Connects and, as `sslmode` says, encrypts.
pub(super) async fn open(target: &Target) -> Result<Stream, LoginError> {
    let tcp = connect(target).await?;
    if target.ssl_mode == SslMode::Disable {
        return Ok(Stream::Plain(tcp));
    }
    let mut stream = Stream::Plain(tcp);
    let failed = |error: io::Error| LoginError::unreachable(target, error.to_string());
    stream.write_all(&startup::ssl_packet()).await.map_err(failed)?;
    let mut answer = [0];
    stream.read_exact(&mut answer).await.map_err(failed)?;
    match (answer[0], stream, target.ssl_mode) {
        (b'S', Stream::Plain(tcp), mode) => match encrypt(target, tcp).await {
            Ok(stream) => Ok(stream),
            // As libpq: where encryption is only preferred, its failure is no obstacle.
            Err(_) if mode == SslMode::Prefer => Ok(Stream::Plain(connect(target).await?)),
            Err(error) => Err(failed(error)),
        },
        (b'N', stream, SslMode::Prefer) => Ok(stream),
        (b'N', ..) => Err(LoginError::unreachable(
            target,
            "the server does not support TLS, but sslmode asks for it",
        )),
        // A server that is out of processes answers with an error before anything else.
        (b'E', ..) => Err(LoginError::unreachable(
            target,
            "the server refused the connection before TLS was negotiated",
        )),
        (other, ..) => Err(LoginError::unreachable(
            target,
            format!("this is not a Postgres server: it answered {other:#04x} to a request for TLS"),
        )),
    }
}

async fn connect(target: &Target) -> Result<TcpStream, LoginError> {
    let connected = TcpStream::connect((target.host.as_str(), target.port)).await;
    connected
        .and_then(|tcp| stream::tune(&tcp).map(|()| tcp))
        .map_err(|error| LoginError::unreachable(target, error.to_string()))
}

async fn encrypt(target: &Target, tcp: TcpStream) -> io::Result<Stream> {
    let connector = tls::connector(target)?.ok_or_else(|| io::Error::other("sslmode is disable"))?;
    let name = tls::server_name(&target.host)?;
    let encrypted = connector.connect(name, tcp).await?;
    Ok(Stream::Tls(Box::new(TlsStream::Client(encrypted))))
}

/// Frames of a greeting are short; a longer one is not Postgres.
const MAX_GREETING_FRAME: usize = 1 << 20;

/// Both ends of a login, frame by frame.
struct Conversation<'a> {
    target: &'a Target,
    stream: Stream,
    buffer: Vec<u8>,
}

impl Conversation<'_> {
    async fn send(&mut self, bytes: &[u8]) -> Result<(), LoginError> {
        let sent = self.stream.write_all(bytes).await;
        sent.map_err(|error| self.failed(error.to_string()))
    }

    async fn send_message(&mut self, message: impl Message) -> Result<(), LoginError> {
        let mut out = BytesMut::new();
        message
            .encode(&mut out)
            .map_err(|error| self.unproven(error.to_string()))?;
        self.send(&out).await
    }

    async fn frame(&mut self) -> Result<(u8, Vec<u8>), LoginError> {
        loop {
            let header = Header::backend(&self.buffer).map_err(|error| self.failed(error.to_string()))?;
            if let Some(header) = header {
                if header.total > MAX_GREETING_FRAME {
                    return Err(self.failed("this is not a Postgres server"));
                }
                if self.buffer.len() >= header.total {
                    let rest = self.buffer.split_off(header.total);
                    let mut frame = std::mem::replace(&mut self.buffer, rest);
                    frame.drain(..HEADER_LEN);
                    return Ok((header.kind, frame));
                }
            }
            match self.stream.read_some(&mut self.buffer).await {
                Ok(0) => return Err(self.failed("the server closed the connection during the login")),
                Ok(_) => {}
                Err(error) => return Err(self.failed(error.to_string())),
            }
        }
    }

    /// The next frame of an authentication, as its code and data.
    async fn authentication(&mut self) -> Result<(u32, Vec<u8>), LoginError> {
        loop {
            match self.frame().await? {
                (b'R', mut body) => {
                    let Some(&code) = body.first_chunk::<4>() else {
                        return Err(self.failed("malformed authentication request"));
                    };
                    body.drain(..4);
                    return Ok((u32::from_be_bytes(code), body));
                }
                (b'E', body) => return Err(self.refused(&body)),
                // NegotiateProtocolVersion: the server's lower version serves the client as well;
                // notices before the login mean nothing to it.
                (b'v' | b'N', _) => {}
                (kind, _) => return Err(self.failed(format!("unexpected message {kind:#04x} during the login"))),
            }
        }
    }

    async fn authenticate(&mut self, login: &Login) -> Result<(), LoginError> {
        loop {
            match self.authentication().await? {
                (0, _) => return Ok(()),
                (3, _) => {
                    let password = self.password(login)?.to_owned();
                    self.send_message(Password::new(password)).await?;
                }
                (5, salt) => {
                    let password = md5_password(self.password(login)?, &login.user, &salt);
                    self.send_message(Password::new(password)).await?;
                }
                (10, mechanisms) => self.scram(login, &mechanisms).await?,
                (code, _) => {
                    let method = match code {
                        2 => "Kerberos".to_owned(),
                        7 => "GSSAPI".to_owned(),
                        9 => "SSPI".to_owned(),
                        other => format!("number {other}"),
                    };
                    return Err(self.unproven(format!(
                        "the server asks for authentication method {method}, which is not supported"
                    )));
                }
            }
        }
    }

    fn password<'l>(&self, login: &'l Login) -> Result<&'l str, LoginError> {
        match &login.proof {
            Proof::Password(password) => Ok(password.expose()),
            Proof::Keys(_) => Err(self.unproven(format!(
                "the server asks for the password of \"{user}\", of which only a SCRAM verifier is known \
                 (list the password under auth.users, or let the server ask for scram-sha-256)",
                user = login.user
            ))),
            Proof::Nothing => Err(self.unproven(format!(
                "the server asks for the password of \"{user}\", which is not listed under auth.users",
                user = login.user
            ))),
        }
    }

    async fn scram(&mut self, login: &Login, mechanisms: &[u8]) -> Result<(), LoginError> {
        let mut rest = mechanisms;
        let mut offered = std::iter::from_fn(|| {
            let (name, after) = split_cstr(rest)?;
            rest = after;
            (!name.is_empty()).then_some(name)
        });
        if !offered.any(|name| name == scram::SCRAM_SHA_256.as_bytes()) {
            return Err(self.unproven("the server offers no SASL mechanism that the proxy knows"));
        }
        let proof = match &login.proof {
            Proof::Password(password) => scram::Proof::Password(password.expose()),
            Proof::Keys(keys) => scram::Proof::Keys(keys),
            Proof::Nothing => {
                self.password(login)?;
                return Ok(());
            }
        };
        let exchange = scram::ExpectChallenge::new(scram::nonce());
        let first = exchange.message().into_bytes().into();
        self.send_message(SASLInitialResponse::new(scram::SCRAM_SHA_256.to_owned(), Some(first)))
            .await?;
        let (11, challenge) = self.authentication().await? else {
            return Err(self.failed("unexpected answer during SCRAM"));
        };
        let unproven = |error: scram::ScramError| LoginError::Unproven {
            target: self.target.describe(),
            cause: error.to_string(),
        };
        let (answer, exchange) = exchange.answer(&challenge, proof).map_err(unproven)?;
        self.send_message(SASLResponse::new(answer.into_bytes().into())).await?;
        let (12, signature) = self.authentication().await? else {
            return Err(self.failed("unexpected answer during SCRAM"));
        };
        exchange.finish(&signature).map_err(|error| LoginError::Unproven {
            target: self.target.describe(),
            cause: error.to_string(),
        })
    }

    async fn greeting(mut self) -> Result<Backend, LoginError> {
        let mut greeting = Vec::new();
        let mut key_data = None;
        loop {
            let (kind, body) = self.frame().await?;
            match kind {
                b'E' => return Err(self.refused(&body)),
                b'v' => continue,
                b'K' => {
                    key_data = backend::key_data(&body).map(|(pid, key)| (pid, Box::from(key)));
                }
                _ => {}
            }
            crate::wire::put_frame(&mut greeting, kind, |out| out.extend_from_slice(&body));
            if kind == b'Z' {
                break;
            }
        }
        // A server behind a pooler may give none; then there is nothing to cancel with.
        let (pid, key) = key_data.unwrap_or_else(|| (0, Box::from([0; 4])));
        Ok(Backend {
            stream: self.stream,
            pid,
            key,
            greeting,
            leftover: self.buffer,
        })
    }

    fn failed(&self, cause: impl Into<String>) -> LoginError {
        LoginError::unreachable(self.target, cause)
    }

    fn unproven(&self, cause: impl Into<String>) -> LoginError {
        LoginError::Unproven {
            target: self.target.describe(),
            cause: cause.into(),
        }
    }

    fn refused(&self, body: &[u8]) -> LoginError {
        let mut frame = Vec::new();
        crate::wire::put_frame(&mut frame, b'E', |out| out.extend_from_slice(body));
        LoginError::Refused {
            target: self.target.describe(),
            frame,
        }
    }
}

/// `md5` and the hash of (hash of password and user) and salt.
fn md5_password(password: &str, user: &str, salt: &[u8]) -> String {
    let hex = |digest: &[u8]| digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let inner = Md5::new().chain_update(password).chain_update(user).finalize();
    let outer = Md5::new().chain_update(hex(&inner)).chain_update(salt).finalize();
    format!("md5{}", hex(&outer))
}

/// How long a server may take from connect to ReadyForQuery, around [`login`].
pub async fn within(limit: Duration, target: &Target, wanted: &Login) -> Result<Backend, LoginError> {
    tokio::time::timeout(limit, login(target, wanted))
        .await
        .unwrap_or_else(|_| {
            Err(LoginError::unreachable(
                target,
                format!("no answer within {} ms", limit.as_millis()),
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn md5_as_the_server_computes_it() {
        // postgres-protocol's own vector.
        assert_eq!(
            md5_password("password", "md5_user", &[0x2a, 0x3d, 0x8f, 0xe0]),
            "md562af4dd09bbb41884907a838a3233294"
        );
    }
}
