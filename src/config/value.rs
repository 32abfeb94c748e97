//! Single values of proxy.yaml, parsed where they stand, with `${NAME}` replaced.

use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer, Error as _};

#[derive(serde::Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    pub(super) fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// Text in which `${NAME}` has been replaced from the environment.
pub(super) struct Text(pub(super) String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = String::deserialize(deserializer)?;
        substitute(&written, |name| std::env::var(name).ok())
            .map(Self)
            .map_err(D::Error::custom)
    }
}

fn substitute(text: &str, variable: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        let Some(length) = rest[start..].find('}') else {
            return Err("\"${\" is not closed by \"}\"".into());
        };
        let name = &rest[start + 2..start + length];
        let value = variable(name).ok_or_else(|| format!("the environment variable {name} is not set"))?;
        result.push_str(&rest[..start]);
        result.push_str(&value);
        rest = &rest[start + length + 1..];
    }
    result.push_str(rest);
    Ok(result)
}

/// A value written as text and parsed where it stands.
pub(super) fn parsed<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Result<T, D::Error> {
    parse(&Text::deserialize(deserializer)?.0).map_err(D::Error::custom)
}

pub(super) struct Address(pub(super) SocketAddr);

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parsed(deserializer, |text| {
            let text = text.replacen("localhost:", "127.0.0.1:", 1);
            SocketAddr::from_str(&text)
                .map(Self)
                .map_err(|_| "expected an address and a port, such as 127.0.0.1:6432".into())
        })
    }
}

/// `500ms`, `5s`, `2min`, `1h`.
pub(super) struct Seconds(pub(super) Duration);

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parsed(deserializer, |text| super::parse_duration(text).map(Self))
    }
}

/// `1024`, `64kB`, `16MiB`, `10GiB`; kB, MB and GB count in 1024s as Postgres' own settings do.
pub(super) struct Bytes(pub(super) u64);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parsed(deserializer, |text| {
            let digits = text.bytes().take_while(u8::is_ascii_digit).count();
            let (number, unit) = text.split_at(digits);
            let shift = match unit.trim() {
                "" | "B" => 0,
                "kB" | "KB" | "KiB" => 10,
                "MB" | "MiB" => 20,
                "GB" | "GiB" => 30,
                "TB" | "TiB" => 40,
                _ => return Err("expected a size such as 64MiB or 10GiB".into()),
            };
            let number: u64 = number.parse().map_err(|_| "expected a size such as 10GiB".to_owned())?;
            number
                .checked_mul(1 << shift)
                .map(Self)
                .ok_or_else(|| "is too large".into())
        })
    }
}

pub(super) struct Percent(pub(super) f64);

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = f64::deserialize(deserializer)?;
        if (0.0..=100.0).contains(&value) {
            Ok(Self(value))
        } else {
            Err(D::Error::invalid_value(
                de::Unexpected::Float(value),
                &"a percentage from 0 to 100",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_replaced_inside_values() {
        let variable = |name: &str| (name == "A").then(|| "x${B}".to_owned());
        assert_eq!(substitute("1${A}2${A}", variable).unwrap(), "1x${B}2x${B}");
        assert!(substitute("${B}", variable).unwrap_err().contains('B'));
        assert!(substitute("${A", variable).is_err());
    }
}
