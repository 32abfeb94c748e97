//! A client's first packet: what it asks for, before there are frames.
//!
//! Parameters stay bytes: a client may name its user or application in any encoding. (`pgwire`
//! would read them as lossy text and lose their order.)

use super::{put_cstr, split_cstr};

/// Postgres' `MAX_STARTUP_PACKET_LENGTH`.
pub const MAX_STARTUP_LEN: usize = 10_000;

const SSL_REQUEST: u32 = 80_877_103;
const GSS_ENC_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST: u32 = 80_877_102;

/// A protocol version as the packet has it: major in the upper half, minor in the lower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32);

impl Version {
    pub const V3_0: Self = Self(3 << 16);
    /// Cancel keys of up to 256 bytes; from Postgres 18 on.
    pub const V3_2: Self = Self((3 << 16) + 2);

    pub const fn major(self) -> u32 {
        self.0 >> 16
    }

    pub const fn minor(self) -> u32 {
        self.0 & 0xffff
    }
}

/// What a first packet asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    Ssl,
    GssEnc,
    Cancel { pid: i32, key: Vec<u8> },
    Session { version: Version, parameters: Parameters },
}

/// Why a first packet is refused; the texts are Postgres' own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StartupError {
    #[error("invalid length of startup packet")]
    Length,
    #[error("unsupported frontend protocol {}.{}: server supports 3.0 to 3.2", .0.major(), .0.minor())]
    Version(Version),
    #[error("invalid startup packet layout: expected terminator as last byte")]
    Layout,
}

/// The length that the packet's first four bytes give, checked.
pub fn packet_length(first: [u8; 4]) -> Result<usize, StartupError> {
    let length = u32::from_be_bytes(first) as usize;
    if (8..=MAX_STARTUP_LEN).contains(&length) {
        Ok(length)
    } else {
        Err(StartupError::Length)
    }
}

impl Request {
    /// Reads a packet's body: what follows its length.
    pub fn read(body: &[u8]) -> Result<Self, StartupError> {
        let (code, rest) = body.split_first_chunk::<4>().ok_or(StartupError::Length)?;
        match u32::from_be_bytes(*code) {
            SSL_REQUEST => Ok(Self::Ssl),
            GSS_ENC_REQUEST => Ok(Self::GssEnc),
            CANCEL_REQUEST => {
                let (pid, key) = super::backend::key_data(rest).ok_or(StartupError::Length)?;
                Ok(Self::Cancel { pid, key: key.to_vec() })
            }
            code if code >> 16 == 3 => Ok(Self::Session {
                version: Version(code),
                parameters: Parameters::read(rest)?,
            }),
            code => Err(StartupError::Version(Version(code))),
        }
    }
}

/// The parameters of a startup packet, in the client's order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Parameters(Box<[u8]>);

impl Parameters {
    fn read(bytes: &[u8]) -> Result<Self, StartupError> {
        let mut rest = bytes;
        loop {
            let (name, after) = split_cstr(rest).ok_or(StartupError::Layout)?;
            if name.is_empty() {
                return if after.is_empty() {
                    Ok(Self(bytes[..bytes.len() - 1].into()))
                } else {
                    Err(StartupError::Layout)
                };
            }
            let (_, after) = split_cstr(after).ok_or(StartupError::Layout)?;
            rest = after;
        }
    }

    /// Makes parameters out of pairs; a name or value with a zero byte cannot be one.
    pub fn new<'a>(pairs: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Self {
        let mut out = Vec::new();
        for (name, value) in pairs {
            put_cstr(&mut out, name);
            put_cstr(&mut out, value);
        }
        Self(out.into())
    }

    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut rest = &self.0[..];
        std::iter::from_fn(move || {
            let (name, after) = split_cstr(rest)?;
            let (value, after) = split_cstr(after)?;
            rest = after;
            Some((name, value))
        })
    }

    /// The value of `name`; given twice, the last counts, as in Postgres.
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.iter()
            .filter(|(key, _)| *key == name)
            .last()
            .map(|(_, value)| value)
    }

    /// Protocol options (`_pq_.…`), which are negotiated and not settings.
    pub fn protocol_options(&self) -> impl Iterator<Item = &[u8]> {
        self.iter()
            .map(|(name, _)| name)
            .filter(|name| name.starts_with(b"_pq_."))
    }
}

/// The packet that opens a session at a server. `settings` go along as they are, apart from
/// those that say who and where.
pub fn packet(version: Version, user: &str, database: &str, settings: &Parameters) -> Vec<u8> {
    let mut out = vec![0; 4];
    out.extend_from_slice(&version.0.to_be_bytes());
    for (name, value) in [("user", user), ("database", database)] {
        put_cstr(&mut out, name.as_bytes());
        put_cstr(&mut out, value.as_bytes());
    }
    for (name, value) in settings.iter() {
        if name != b"user" && name != b"database" && !name.starts_with(b"_pq_.") {
            put_cstr(&mut out, name);
            put_cstr(&mut out, value);
        }
    }
    out.push(0);
    set_length(&mut out);
    out
}

/// The packet that asks a server to cancel what `pid` is running.
pub fn cancel_packet(pid: i32, key: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 4];
    out.extend_from_slice(&CANCEL_REQUEST.to_be_bytes());
    out.extend_from_slice(&pid.to_be_bytes());
    out.extend_from_slice(key);
    set_length(&mut out);
    out
}

/// The packet that asks a server for TLS.
pub fn ssl_packet() -> [u8; 8] {
    let mut out = [0, 0, 0, 8, 0, 0, 0, 0];
    out[4..].copy_from_slice(&SSL_REQUEST.to_be_bytes());
    out
}

fn set_length(packet: &mut [u8]) {
    let length = u32::try_from(packet.len()).unwrap_or(u32::MAX);
    packet[..4].copy_from_slice(&length.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn session(parameters: &[u8]) -> Result<Request, StartupError> {
        let mut body = Version::V3_0.0.to_be_bytes().to_vec();
        body.extend_from_slice(parameters);
        Request::read(&body)
    }

    #[test]
    fn first_packets() {
        assert_eq!(Request::read(&ssl_packet()[4..]), Ok(Request::Ssl));
        assert_eq!(Request::read(&GSS_ENC_REQUEST.to_be_bytes()), Ok(Request::GssEnc));
        let cancel = cancel_packet(7, &[1; 32]);
        assert_eq!(packet_length(cancel[..4].try_into().unwrap()), Ok(44));
        assert_eq!(
            Request::read(&cancel[4..]),
            Ok(Request::Cancel {
                pid: 7,
                key: vec![1; 32]
            })
        );
        assert_eq!(
            Request::read(&cancel_packet(7, &[1; 3])[4..]),
            Err(StartupError::Length)
        );
        assert_eq!(
            Request::read(&cancel_packet(7, &[1; 257])[4..]),
            Err(StartupError::Length)
        );
        let v2 = Version(2 << 16);
        assert_eq!(Request::read(&v2.0.to_be_bytes()), Err(StartupError::Version(v2)));
        assert_eq!(Request::read(b"GET "), Err(StartupError::Version(Version(0x4745_5420))));
    }

    #[test]
    fn layouts_that_postgres_refuses() {
        assert!(session(b"user\0x\0\0").is_ok());
        for bad in [&b""[..], b"user\0x\0", b"user\0x", b"user\0", b"user\0x\0\0more\0"] {
            assert_eq!(session(bad), Err(StartupError::Layout), "{bad:?}");
        }
        for (length, valid) in [
            (7, false),
            (8, true),
            (10_000, true),
            (10_001, false),
            (u32::MAX, false),
        ] {
            assert_eq!(packet_length(u32::to_be_bytes(length)).is_ok(), valid, "{length}");
        }
    }

    #[test]
    fn parameters_keep_bytes_and_order() {
        let Ok(Request::Session { parameters, .. }) =
            session(b"user\0a\xe9\0_pq_.x\x00on\0application_name\0one\0application_name\0two\0\0")
        else {
            panic!("refused");
        };
        assert_eq!(parameters.get(b"user"), Some(&b"a\xe9"[..]));
        assert_eq!(parameters.get(b"application_name"), Some(&b"two"[..]));
        assert_eq!(parameters.protocol_options().collect::<Vec<_>>(), [b"_pq_.x"]);
        let sent = packet(Version::V3_2, "u", "d", &parameters);
        assert_eq!(
            &sent[8..],
            b"user\0u\0database\0d\0application_name\0one\0application_name\0two\0\0"
        );
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            Request::read(&bytes).ok();
            session(&bytes).ok();
        }
    }
}
