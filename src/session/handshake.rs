//! A client's first packets: encryption, cancel requests, the startup packet.

use std::borrow::Cow;

use bytes::BytesMut;
use pgwire::messages::Message;
use pgwire::messages::startup::NegotiateProtocolVersion;
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use super::Refused;
use super::context::Context;
use super::tls::{ALPN, ServerTls};
use crate::upstream::{Stream, cancel, newest_version};
use crate::wire::error::{SqlError, sqlstate};
use crate::wire::scram::Binding;
use crate::wire::startup::{Parameters, Request, StartupError, Version, packet_length};

/// A client that has said what it wants, and nothing yet of who it is.
pub(super) struct Greeted {
    pub stream: Stream,
    pub user: String,
    pub database: String,
    pub parameters: Parameters,
    /// What the client and the proxy speak.
    pub version: Version,
    /// What SCRAM may bind to.
    pub binding: Binding,
}

/// Reads up to the startup packet, and answers what comes before it.
pub(super) async fn greet(context: &Context, tcp: TcpStream) -> Result<Greeted, Refused> {
    let tls = context.settings.load().tls.clone();
    let mut first = [0];
    let peeked = tcp.peek(&mut first).await.map_err(|_| Refused::Quietly)?;
    if peeked == 0 {
        return Err(Refused::Quietly);
    }
    // 0x16 begins a TLS handshake; as the length of a startup packet it would be far too long.
    let mut stream = if first[0] == 0x16 {
        let tls = tls.as_ref().ok_or(Refused::Quietly)?;
        encrypt(tls, tcp, true).await?
    } else {
        Stream::Plain(tcp)
    };
    let (mut asked_tls, mut asked_gss) = (matches!(stream, Stream::Tls(_)), false);
    loop {
        let (request, after) = read_request(stream).await?;
        stream = after;
        match request {
            Request::Ssl if !asked_tls => {
                asked_tls = true;
                stream = answer_ssl(tls.as_ref(), stream).await?;
            }
            Request::GssEnc if !asked_gss => {
                asked_gss = true;
                stream.write_all(b"N").await.map_err(|_| Refused::Quietly)?;
            }
            Request::Ssl | Request::GssEnc => {
                let error = SqlError::fatal(
                    sqlstate::PROTOCOL_VIOLATION,
                    "unsupported frontend protocol: encryption was asked for twice",
                );
                return Err(Refused::With(Box::new(stream), error));
            }
            Request::Cancel { pid, key } => {
                deliver_cancel(context, pid, &key).await;
                return Err(Refused::Quietly);
            }
            Request::Session { version, parameters } => {
                let encrypted = matches!(stream, Stream::Tls(_));
                if let Some(tls) = &tls
                    && tls.required
                    && !encrypted
                {
                    let error = SqlError::fatal(sqlstate::INVALID_AUTHORIZATION, "this proxy requires TLS")
                        .with_hint("Connect with sslmode=require or stronger.");
                    return Err(Refused::With(Box::new(stream), error));
                }
                let binding = match tls {
                    Some(tls) if encrypted => tls.binding,
                    _ => Binding::None,
                };
                return begin_session(context, stream, version, parameters, binding).await;
            }
        }
    }
}

async fn read_request(mut stream: Stream) -> Result<(Request, Stream), Refused> {
    let refused = |error: StartupError, stream: Stream| {
        let error = match error {
            StartupError::Version(_) => SqlError::fatal(sqlstate::FEATURE_NOT_SUPPORTED, error.to_string()),
            StartupError::Length | StartupError::Layout => {
                SqlError::fatal(sqlstate::PROTOCOL_VIOLATION, error.to_string())
            }
        };
        Refused::With(Box::new(stream), error)
    };
    let mut first = [0; 4];
    stream.read_exact(&mut first).await.map_err(|_| Refused::Quietly)?;
    let length = match packet_length(first) {
        Ok(length) => length,
        Err(error) => return Err(refused(error, stream)),
    };
    let mut body = vec![0; length - 4];
    stream.read_exact(&mut body).await.map_err(|_| Refused::Quietly)?;
    match Request::read(&body) {
        Ok(request) => Ok((request, stream)),
        Err(error) => Err(refused(error, stream)),
    }
}

async fn answer_ssl(tls: Option<&ServerTls>, mut stream: Stream) -> Result<Stream, Refused> {
    let Some(tls) = tls else {
        stream.write_all(b"N").await.map_err(|_| Refused::Quietly)?;
        return Ok(stream);
    };
    let Stream::Plain(mut tcp) = stream else {
        return Err(Refused::Quietly);
    };
    // Bytes sent before the answer were sent unencrypted, perhaps by somebody in between, and
    // must not be taken for the client's (CVE-2021-23214).
    let mut early = [0];
    let now = std::future::poll_fn(|cx| {
        let mut early = tokio::io::ReadBuf::new(&mut early);
        let peeked = tcp.poll_peek(cx, &mut early);
        std::task::Poll::Ready(matches!(peeked, std::task::Poll::Ready(Ok(count)) if count > 0))
    });
    if now.await {
        let error = SqlError::fatal(
            sqlstate::PROTOCOL_VIOLATION,
            "received unencrypted data after SSL request",
        )
        .with_hint("This could be either a client-software bug or evidence of an attempted man-in-the-middle attack.");
        return Err(Refused::With(Box::new(Stream::Plain(tcp)), error));
    }
    tokio::io::AsyncWriteExt::write_all(&mut tcp, b"S")
        .await
        .map_err(|_| Refused::Quietly)?;
    encrypt(tls, tcp, false).await
}

async fn encrypt(tls: &ServerTls, tcp: TcpStream, direct: bool) -> Result<Stream, Refused> {
    let encrypted = tls.acceptor.accept(tcp).await.map_err(|error| {
        tracing::debug!(%error, "TLS handshake with a client");
        Refused::Quietly
    })?;
    // Without ALPN, a browser or another protocol's client could be made to speak Postgres.
    if direct && encrypted.get_ref().1.alpn_protocol() != Some(ALPN) {
        return Err(Refused::Quietly);
    }
    Ok(Stream::Tls(Box::new(TlsStream::Server(encrypted))))
}

/// Postgres answers nothing to a cancel request, whatever became of it; the connection closes
/// when it has been delivered.
async fn deliver_cancel(context: &Context, pid: i32, key: &[u8]) {
    let Some(backend) = context.registry.cancel_target(pid, key) else {
        tracing::debug!(pid, "cancel request for no session of this proxy");
        return;
    };
    if let Err(error) = cancel::cancel(&backend.target, backend.pid, &backend.key).await {
        tracing::warn!(%error, "deliver a cancel request");
    }
}

async fn begin_session(
    context: &Context,
    stream: Stream,
    requested: Version,
    parameters: Parameters,
    binding: Binding,
) -> Result<Greeted, Refused> {
    let text = |name: &[u8]| parameters.get(name).map(String::from_utf8_lossy);
    let user = text(b"user").filter(|user| !user.is_empty());
    let refusal = if wants_replication(parameters.get(b"replication")) {
        Some(
            SqlError::fatal(
                sqlstate::FEATURE_NOT_SUPPORTED,
                "replication connections do not go through this proxy",
            )
            .with_hint("Connect to the server itself."),
        )
    } else if user.is_none() {
        Some(SqlError::fatal(
            sqlstate::INVALID_AUTHORIZATION,
            "no PostgreSQL user name specified in startup packet",
        ))
    } else {
        let readable = |name: &[u8]| !matches!(text(name), Some(Cow::Owned(_)));
        (!readable(b"user") || !readable(b"database")).then(|| {
            SqlError::fatal(
                sqlstate::INVALID_AUTHORIZATION,
                "the names of user and database must be UTF-8",
            )
        })
    };
    if let Some(error) = refusal {
        return Err(Refused::With(Box::new(stream), error));
    }
    let user = cut(user.unwrap_or_default().into_owned());
    let database = text(b"database")
        .filter(|database| !database.is_empty())
        .map_or_else(|| user.clone(), |database| cut(database.into_owned()));
    let mut greeted = Greeted {
        stream,
        user,
        database,
        parameters,
        version: requested,
        binding,
    };
    negotiate(context, &mut greeted).await?;
    Ok(greeted)
}

/// As Postgres: a name may have 63 bytes, and what is longer is cut, not refused.
fn cut(mut name: String) -> String {
    while name.len() > 63 {
        name.pop();
    }
    name
}

/// Tells a client that asks for more than the primary can do what it gets instead.
async fn negotiate(context: &Context, greeted: &mut Greeted) -> Result<(), Refused> {
    let supported = if greeted.version > Version::V3_0 {
        newest_of_primary(context, greeted).await
    } else {
        Version::V3_0
    };
    let unknown: Vec<String> = greeted
        .parameters
        .protocol_options()
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect();
    if greeted.version > supported || !unknown.is_empty() {
        greeted.version = greeted.version.min(supported);
        let version = i32::try_from(greeted.version.0).unwrap_or_default();
        let mut out = BytesMut::new();
        NegotiateProtocolVersion::new(version, unknown)
            .encode(&mut out)
            .map_err(|_| Refused::Quietly)?;
        greeted.stream.write_all(&out).await.map_err(|_| Refused::Quietly)?;
    }
    Ok(())
}

async fn newest_of_primary(context: &Context, greeted: &Greeted) -> Version {
    let databases = &context.settings.load_full().databases;
    let Some(pair) = databases.for_roles(&greeted.database) else {
        return Version::V3_0;
    };
    let target = pair.primary(context.control_now());
    let server = (target.host.clone(), target.port);
    if let Some(known) = context.versions.get(&server) {
        return *known;
    }
    match newest_version(target, &greeted.user).await {
        Ok(version) => {
            context.versions.insert(server, version);
            version
        }
        // The login will say why; until then the oldest is what every client understands.
        Err(_) => Version::V3_0,
    }
}

/// Postgres' `replication`: a boolean, or "database".
fn wants_replication(value: Option<&[u8]>) -> bool {
    let Some(value) = value else { return false };
    let value = value.to_ascii_lowercase();
    // Booleans may be abbreviated.
    let is_off = [&b"false"[..], b"no", b"off"]
        .iter()
        .any(|off| off.starts_with(&value) && !value.is_empty() && value != b"o");
    !(is_off || value == b"0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_are_cut() {
        for (name, expected) in [
            ("a".repeat(63), "a".repeat(63)),
            ("a".repeat(64), "a".repeat(63)),
            ("é".repeat(40), "é".repeat(31)),
        ] {
            assert_eq!(cut(name), expected);
        }
    }

    #[test]
    fn which_connections_are_for_replication() {
        for (value, wants) in [
            (None, false),
            (Some("database"), true),
            (Some("true"), true),
            (Some("1"), true),
            (Some("ON"), true),
            (Some("false"), false),
            (Some("f"), false),
            (Some("0"), false),
            (Some("off"), false),
        ] {
            assert_eq!(wants_replication(value.map(str::as_bytes)), wants, "{value:?}");
        }
    }
}
