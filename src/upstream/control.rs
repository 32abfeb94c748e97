//! The proxy's own connections (catalog, applier, fence), through tokio-postgres and as the
//! proxy's own role. Clients' sessions never go this way.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio_postgres::config::SslMode as PgSslMode;
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};
use tokio_postgres::{AsyncMessage, Client};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

use crate::config::{SslMode, Target};
use crate::upstream::tls;

/// For all of it, the login included: a stopped server accepts and says nothing.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A peer that is gone without a goodbye is noticed after about this long: by probes where
/// nothing is under way, by missing acknowledgements where something is.
const PEER_SILENCE_MAX: Duration = Duration::from_secs(30);

/// What a server's configuration, a database's or the role's may say otherwise, and the proxy's own
/// statements rely on: no time limits but those that they set themselves (an idle lease must not
/// be ended), transactions that write and see what others commit, SQL that means what it says.
/// Settings that an old server does not know are left alone there; the names are all qualified
/// because the search path is among what may be hostile.
const OWN_SETTINGS: &str = "\
    SET ROLE NONE; SET search_path = pg_catalog; SET standard_conforming_strings = on; SET exit_on_error = off; \
    SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; \
    SET default_transaction_read_only = off; SET default_transaction_isolation = 'read committed'; \
    SET default_transaction_deferrable = off; SET transform_null_equals = off; SET array_nulls = on; \
    SET quote_all_identifiers = off; SET check_function_bodies = on; SET client_min_messages = notice; \
    SET plpgsql.extra_errors = none; SET plpgsql.extra_warnings = none; \
    SELECT pg_catalog.set_config('idle_session_timeout', '0', false) WHERE pg_catalog.current_setting('idle_session_timeout', true) IS NOT NULL; \
    SELECT pg_catalog.set_config('transaction_timeout', '0', false) WHERE pg_catalog.current_setting('transaction_timeout', true) IS NOT NULL";

/// A connection of the proxy's own role. Its driver task ends with it.
pub struct Control {
    client: Client,
    _driver: AbortOnDropHandle<()>,
}

impl std::ops::Deref for Control {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl std::ops::DerefMut for Control {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

/// Why a control connection could not be had; says which server.
#[derive(Debug, thiserror::Error)]
#[error("{target}: {cause}")]
pub struct ConnectError {
    pub target: String,
    pub cause: String,
    /// The server's own answer, where it gave one.
    pub sqlstate: Option<String>,
}

impl ConnectError {
    /// The server is there, and has no such database.
    pub fn is_missing_database(&self) -> bool {
        self.sqlstate.as_deref() == Some(SqlState::INVALID_CATALOG_NAME.code())
    }
}

/// Connects as the proxy's own role. `purpose` becomes part of `application_name`, so that a
/// DBA sees in `pg_stat_activity` what each connection is for.
pub async fn connect(target: &Target, purpose: &str) -> Result<Control, ConnectError> {
    connect_hearing(target, purpose, Arc::default()).await
}

/// The same, and every notification (of what the connection is told to LISTEN to) is passed on.
pub async fn connect_hearing(target: &Target, purpose: &str, heard: Arc<Notify>) -> Result<Control, ConnectError> {
    let failed = |cause: String, sqlstate: Option<String>| ConnectError {
        target: target.describe(),
        cause,
        sqlstate,
    };
    let connector = tls::connector(target).map_err(|error| failed(error.to_string(), None))?;
    let mut config = tokio_postgres::Config::new();
    config
        .host(&target.host)
        .port(target.port)
        .user(&target.user)
        .dbname(target.dbname())
        .application_name(format!("pgtandem {purpose}"))
        .connect_timeout(CONNECT_TIMEOUT)
        .keepalives_idle(PEER_SILENCE_MAX / 3)
        .keepalives_interval(PEER_SILENCE_MAX / 6)
        .keepalives_retries(4)
        .tcp_user_timeout(PEER_SILENCE_MAX)
        .ssl_mode(match target.ssl_mode {
            SslMode::Disable => PgSslMode::Disable,
            SslMode::Prefer => PgSslMode::Prefer,
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => PgSslMode::Require,
        });
    if let Some(password) = &target.password {
        config.password(password.expose());
    }
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, config.connect(MakeTls(connector)))
        .await
        .map_err(|_elapsed| failed(format!("no answer within {CONNECT_TIMEOUT:?}"), None))?;
    let (client, mut connection) = connected.map_err(|error| {
        let sqlstate = error.code().map(|code| code.code().to_owned());
        failed(error_chain(&error), sqlstate)
    })?;
    let described = target.describe();
    let driver = tokio::spawn(async move {
        loop {
            match poll_fn(|cx| connection.poll_message(cx)).await {
                Some(Ok(AsyncMessage::Notification(_))) => heard.notify_one(),
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    let error = error_chain(&error);
                    tracing::debug!(target = described, error, "control connection ended");
                    break;
                }
                None => break,
            }
        }
        // Whoever waits for a notification finds out that none will come.
        heard.notify_one();
    });
    let control = Control {
        client,
        _driver: AbortOnDropHandle::new(driver),
    };
    tokio::time::timeout(CONNECT_TIMEOUT, control.batch_execute(OWN_SETTINGS))
        .await
        .map_err(|_elapsed| failed(format!("no answer within {CONNECT_TIMEOUT:?}"), None))?
        .map_err(|error| {
            let sqlstate = error.code().map(|code| code.code().to_owned());
            failed(error_chain(&error), sqlstate)
        })?;
    Ok(control)
}

/// An error with its causes on one line: tokio-postgres keeps the server's words one level down,
/// under words of its own that say nothing.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut links = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        next = error.source();
        let text = error.to_string();
        if next.is_none() || text != "db error" {
            links.push(text);
        }
    }
    links.join(": ")
}

#[derive(Clone)]
struct MakeTls(Option<TlsConnector>);

impl MakeTlsConnect<TcpStreamOrUnix> for MakeTls {
    type Stream = Encrypted;
    type TlsConnect = Handshake;
    type Error = io::Error;

    fn make_tls_connect(&mut self, host: &str) -> Result<Handshake, io::Error> {
        Ok(Handshake {
            connector: self.0.clone(),
            host: host.to_owned(),
        })
    }
}

type TcpStreamOrUnix = tokio_postgres::Socket;

struct Handshake {
    connector: Option<TlsConnector>,
    host: String,
}

impl TlsConnect<TcpStreamOrUnix> for Handshake {
    type Stream = Encrypted;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Encrypted>> + Send>>;

    fn connect(self, stream: TcpStreamOrUnix) -> Self::Future {
        Box::pin(async move {
            let connector = self
                .connector
                .ok_or_else(|| io::Error::other("the server asks for TLS, sslmode is disable"))?;
            let name = tls::server_name(&self.host)?;
            Ok(Encrypted(Box::new(connector.connect(name, stream).await?)))
        })
    }
}

struct Encrypted(Box<tokio_rustls::client::TlsStream<TcpStreamOrUnix>>);

impl TlsStream for Encrypted {
    fn channel_binding(&self) -> ChannelBinding {
        // Plain SCRAM-SHA-256: servers accept it with and without TLS.
        ChannelBinding::none()
    }
}

impl AsyncRead for Encrypted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Encrypted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_shutdown(cx)
    }
}
