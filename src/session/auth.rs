//! Who is there. [`Authenticated`] is the proof that a session may be opened; nothing else in the
//! proxy can make one.

use bytes::BytesMut;
use pgwire::messages::Message;
use pgwire::messages::startup::Authentication;

use super::Refused;
use super::context::Context;
use super::handshake::Greeted;
use crate::config::{AuthMethod, Target};
use crate::upstream::{Login, Proof, Stream};
use crate::wire::error::{SqlError, sqlstate};
use crate::wire::frame::HEADER_LEN;
use crate::wire::scram::{self, Binding, ExpectProof, Keys, ScramError, Verifier};
use crate::wire::split_cstr;

/// A client that has proved who it is.
pub(super) struct Authenticated {
    stream: Stream,
    login: Login,
    database: String,
}

impl Authenticated {
    pub(super) fn into_parts(self) -> (Stream, Login, String) {
        (self.stream, self.login, self.database)
    }
}

/// Asks the client for its proof, as `auth.method` says.
pub(super) async fn authenticate(context: &Context, greeted: Greeted) -> Result<Authenticated, Refused> {
    let settings = context.settings.load_full();
    let listed = settings.users.listed(&greeted.user);
    let password = listed.and_then(|listed| listed.password.clone());
    let mut client = Client { stream: greeted.stream };
    let proof = match settings.users.method {
        AuthMethod::Trust => Ok(password.map_or(Proof::Nothing, Proof::Password)),
        AuthMethod::Scram => {
            let (verifier, asked) = match listed {
                Some(listed) => (listed.verifier.clone(), None),
                None => look_up(context, &settings.databases, &greeted.user, &greeted.database).await,
            };
            let known = verifier.is_some();
            // A user that there is not goes the same way, to the same end as a wrong password.
            let verifier = verifier.unwrap_or_else(|| Verifier::mock(&greeted.user, &context.mock_secret));
            match client.scram(verifier, &greeted.binding).await {
                Ok(keys) if known => Ok(password.map_or_else(|| Proof::Keys(Box::new(keys)), Proof::Password)),
                Ok(_) => Err(wrong_password(&greeted.user)),
                Err(Failed::Gone) => return Err(Refused::Quietly),
                Err(Failed::Refused(error)) => Err(error),
                Err(Failed::Wrong) => {
                    if let Some(target) = asked {
                        context.verifiers.forget(&target, &greeted.user);
                    }
                    Err(wrong_password(&greeted.user))
                }
            }
        }
    };
    let proof = match proof {
        Ok(proof) => proof,
        Err(error) => return Err(Refused::With(Box::new(client.stream), error)),
    };
    client.send(Authentication::Ok).await?;
    Ok(Authenticated {
        stream: client.stream,
        login: Login {
            user: greeted.user,
            proof,
            parameters: greeted.parameters,
            version: greeted.version,
        },
        database: greeted.database,
    })
}

fn wrong_password(user: &str) -> SqlError {
    SqlError::fatal(
        sqlstate::INVALID_PASSWORD,
        format!("password authentication failed for user \"{user}\""),
    )
}

/// The verifier that the primary has of a user, and where it was asked.
async fn look_up(
    context: &Context,
    databases: &crate::routing::Databases,
    user: &str,
    database: &str,
) -> (Option<Verifier>, Option<Target>) {
    // That a database is unknown is said after the password was right, as Postgres does.
    let Some(pair) = databases.for_roles(database) else {
        return (None, None);
    };
    let target = pair.primary(context.control_now()).clone();
    match context.verifiers.look_up(&target, user).await {
        Ok(verifier) => (verifier, Some(target)),
        Err(error) => {
            tracing::warn!(%error, user, "look up a user's verifier");
            (None, Some(target))
        }
    }
}

/// How an exchange fails.
enum Failed {
    Gone,
    Wrong,
    Refused(SqlError),
}

/// What an answer may have: Postgres' `PG_MAX_AUTH_TOKEN_LENGTH` is 65535, for Kerberos; SCRAM
/// needs far less.
const MAX_ANSWER: usize = 4096;

struct Client {
    stream: Stream,
}

impl Client {
    async fn send(&mut self, message: Authentication) -> Result<(), Refused> {
        let mut out = BytesMut::new();
        message.encode(&mut out).map_err(|_| Refused::Quietly)?;
        self.stream.write_all(&out).await.map_err(|_| Refused::Quietly)
    }

    async fn ask(&mut self, message: Authentication) -> Result<Vec<u8>, Failed> {
        self.send(message).await.map_err(|_| Failed::Gone)?;
        let mut header = [0; HEADER_LEN];
        self.stream.read_exact(&mut header).await.map_err(|_| Failed::Gone)?;
        let violation = |message: &str| Failed::Refused(SqlError::fatal(sqlstate::PROTOCOL_VIOLATION, message));
        let [kind, length @ ..] = header;
        if kind != b'p' {
            return Err(violation(&format!("expected SASL response, got message type {kind}")));
        }
        let length = u32::from_be_bytes(length) as usize;
        if !(4..=MAX_ANSWER).contains(&length) {
            return Err(violation("invalid message length"));
        }
        let mut body = vec![0; length - 4];
        self.stream.read_exact(&mut body).await.map_err(|_| Failed::Gone)?;
        Ok(body)
    }

    async fn scram(&mut self, verifier: Verifier, binding: &Binding) -> Result<Keys, Failed> {
        let mut mechanisms = vec![scram::SCRAM_SHA_256.to_owned()];
        if matches!(binding, Binding::EndPoint(_)) {
            mechanisms.insert(0, scram::SCRAM_SHA_256_PLUS.to_owned());
        }
        let initial = self.ask(Authentication::SASL(mechanisms)).await?;
        let malformed = || {
            Failed::Refused(SqlError::fatal(
                sqlstate::PROTOCOL_VIOLATION,
                ScramError::Malformed.to_string(),
            ))
        };
        let (mechanism, first) = initial_response(&initial).ok_or_else(malformed)?;
        let failed = |error: ScramError| match error {
            ScramError::Proof => Failed::Wrong,
            ScramError::AuthorizationIdentity => {
                Failed::Refused(SqlError::fatal(sqlstate::FEATURE_NOT_SUPPORTED, error.to_string()))
            }
            ScramError::Malformed
            | ScramError::ChannelBinding
            | ScramError::Server
            | ScramError::OtherVerifier
            | ScramError::Iterations(_) => {
                Failed::Refused(SqlError::fatal(sqlstate::PROTOCOL_VIOLATION, error.to_string()))
            }
        };
        let exchange = ExpectProof::begin(verifier, mechanism, first, binding, &scram::nonce()).map_err(failed)?;
        let challenge = exchange.message().as_bytes().to_vec().into();
        let answer = self.ask(Authentication::SASLContinue(challenge)).await?;
        let proven = exchange.finish(&answer).map_err(failed)?;
        let signature = proven.message.into_bytes().into();
        self.send(Authentication::SASLFinal(signature))
            .await
            .map_err(|_| Failed::Gone)?;
        Ok(proven.keys)
    }
}

/// Mechanism and data of a SASLInitialResponse's body, lengths checked.
fn initial_response(body: &[u8]) -> Option<(&str, &[u8])> {
    let (mechanism, rest) = split_cstr(body)?;
    let (length, data) = rest.split_first_chunk::<4>()?;
    let length = usize::try_from(i32::from_be_bytes(*length)).ok()?;
    (data.len() == length)
        .then(|| std::str::from_utf8(mechanism).ok())
        .flatten()
        .map(|mechanism| (mechanism, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_responses() {
        for (body, expected) in [
            (
                &b"SCRAM-SHA-256\0\0\0\0\x03abc"[..],
                Some(("SCRAM-SHA-256", &b"abc"[..])),
            ),
            (b"SCRAM-SHA-256\0\xff\xff\xff\xff", None),
            (b"SCRAM-SHA-256\0\0\0\0\x04abc", None),
            (b"SCRAM-SHA-256\0\0\0", None),
            (b"SCRAM-SHA-256", None),
            (b"\xff\0\0\0\0\0", None),
        ] {
            assert_eq!(initial_response(body), expected, "{body:?}");
        }
    }
}
