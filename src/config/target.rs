//! One server's connection string, parsed once: where, as whom, and how far its certificate
//! is checked.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::percent_decode_str;

use crate::control::Side;

/// A password or other value that must never reach a log, an error text or `--json`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself. Whoever calls this hands it to a server and to nobody else.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// libpq's `sslmode` (PostgreSQL manual, "SSL Support", table 34.1), without `allow`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SslMode {
    Disable,
    #[default]
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl FromStr for SslMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "disable" => Ok(Self::Disable),
            "prefer" => Ok(Self::Prefer),
            "require" => Ok(Self::Require),
            "verify-ca" => Ok(Self::VerifyCa),
            "verify-full" => Ok(Self::VerifyFull),
            other => Err(format!(
                "sslmode \"{other}\" is not one of disable, prefer, require, verify-ca, verify-full"
            )),
        }
    }
}

/// One database on one server, and the proxy's own role there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub side: Side,
    pub host: String,
    pub port: u16,
    /// `None` only under the entry `"*"`, where the client's database name stands in.
    pub dbname: Option<String>,
    /// The proxy's own role on this side (clients' sessions use the client's).
    pub user: String,
    pub password: Option<Secret>,
    pub ssl_mode: SslMode,
    /// PEM file with the authorities to trust; without it, the public web's.
    pub ssl_root_cert: Option<PathBuf>,
}

impl Target {
    /// Parses `postgresql://user[:password]@host[:port][/dbname][?sslmode=…&sslrootcert=…]`.
    pub fn parse(side: Side, url: &str) -> Result<Self, String> {
        let rest = url
            .strip_prefix("postgresql://")
            .or_else(|| url.strip_prefix("postgres://"))
            .ok_or("a connection string begins with postgresql://")?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (userinfo, hostport) = authority
            .rsplit_once('@')
            .ok_or("the connection string names no role (postgresql://ROLE@host/database)")?;
        let (user, password) = match userinfo.split_once(':') {
            Some((user, password)) => (user, Some(Secret::new(decode(password)?))),
            None => (userinfo, None),
        };
        let (host, port) = split_host_port(hostport)?;
        let mut target = Self {
            side,
            host,
            port,
            dbname: (!path.is_empty()).then(|| decode(path)).transpose()?,
            user: decode(user)?,
            password,
            ssl_mode: SslMode::default(),
            ssl_root_cert: None,
        };
        if target.user.is_empty() {
            return Err("the connection string names no role".into());
        }
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode(value)?;
            match key {
                "sslmode" => target.ssl_mode = value.parse()?,
                "sslrootcert" => target.ssl_root_cert = Some(PathBuf::from(value)),
                "password" => target.password = Some(Secret::new(value)),
                other => {
                    return Err(format!(
                        "unknown parameter \"{other}\" in the connection string; known are sslmode, sslrootcert, password"
                    ));
                }
            }
        }
        Ok(target)
    }

    /// The same server, another database on it.
    pub fn with_dbname(&self, dbname: &str) -> Self {
        Self {
            dbname: Some(dbname.to_owned()),
            ..self.clone()
        }
    }

    /// The database's name; under `"*"` before a name stands in, Postgres' own maintenance
    /// database.
    pub fn dbname(&self) -> &str {
        self.dbname.as_deref().unwrap_or("postgres")
    }

    /// `legacy (host:port/dbname)`, for messages.
    pub fn describe(&self) -> String {
        format!("{} ({}:{}/{})", self.side, self.host, self.port, self.dbname())
    }
}

fn decode(text: &str) -> Result<String, String> {
    percent_decode_str(text)
        .decode_utf8()
        .map(std::borrow::Cow::into_owned)
        .map_err(|_| "the connection string is not UTF-8 after percent-decoding".to_owned())
}

fn split_host_port(text: &str) -> Result<(String, u16), String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']').ok_or("unclosed [ in the host")?;
            (host, after.strip_prefix(':'))
        }
        None => match text.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    if host.is_empty() {
        return Err("the connection string names no host".into());
    }
    let port = match port {
        Some(port) => port.parse().map_err(|_| format!("\"{port}\" is not a port number"))?,
        None => 5432,
    };
    Ok((host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<Target, String> {
        Target::parse(Side::Legacy, url)
    }

    #[test]
    fn a_full_connection_string() {
        let target =
            parse("postgresql://own%40er:p%3Aw@[::1]:5433/sh%20op?sslmode=verify-full&sslrootcert=/ca.pem").unwrap();
        assert_eq!(target.user, "own@er");
        assert_eq!(target.password.as_ref().unwrap().expose(), "p:w");
        assert_eq!((target.host.as_str(), target.port), ("::1", 5433));
        assert_eq!(target.dbname(), "sh op");
        assert_eq!(target.ssl_mode, SslMode::VerifyFull);
        assert!(!format!("{target:?}").contains("p:w"));
    }

    #[test]
    fn what_is_missing_is_said() {
        for (url, says) in [
            ("mysql://x", "postgresql://"),
            ("postgresql://host/db", "no role"),
            ("postgresql://u@/db", "no host"),
            ("postgresql://u@h:x/db", "port"),
            ("postgresql://u@h/db?sslmode=allow", "sslmode"),
            ("postgresql://u@h/db?foo=1", "foo"),
        ] {
            let error = parse(url).unwrap_err();
            assert!(error.contains(says), "{url}: {error}");
        }
    }
}
