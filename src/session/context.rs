//! What all sessions share: settings (replaced by a reload), the registry, the control watch.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use dashmap::DashMap;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::hooks::Hooks;
use super::registry::Registry;
use super::tls::{ClientTlsError, ServerTls};
use super::verifiers::VerifierCache;
use crate::config::{Auth, AuthMethod, ClientTls, Config, Credential, Limits, Secret, Target};
use crate::control::Control;
use crate::routing::Databases;
use crate::wire::scram::{DEFAULT_ITERATIONS, Verifier};
use crate::wire::startup::Version;

/// What a reload replaces. Sessions that are open keep what they began with.
pub struct Settings {
    pub databases: Databases,
    pub users: Users,
    pub limits: Limits,
    pub(super) tls: Option<ServerTls>,
}

impl Settings {
    /// Takes the sessions' part of the configuration; reads the certificate.
    ///
    /// # Errors
    /// The certificate or key cannot be read or do not belong together.
    pub fn from_config(config: &Config) -> Result<Self, ClientTlsError> {
        Self::new(
            Databases::new(&config.databases),
            Users::new(&config.auth),
            config.limits.clone(),
            config.tls.as_ref(),
        )
    }

    /// The same from its parts.
    pub fn new(
        databases: Databases,
        users: Users,
        limits: Limits,
        tls: Option<&ClientTls>,
    ) -> Result<Self, ClientTlsError> {
        Ok(Self {
            databases,
            users,
            limits,
            tls: tls.map(ServerTls::load).transpose()?,
        })
    }
}

/// Who may connect, as far as proxy.yaml says.
pub struct Users {
    pub(super) method: AuthMethod,
    listed: BTreeMap<String, Listed>,
}

/// A user of proxy.yaml.
pub(super) struct Listed {
    pub password: Option<Secret>,
    /// `None` where the listed verifier cannot be read; nothing fits it then.
    pub verifier: Option<Verifier>,
}

impl Users {
    pub fn new(auth: &Auth) -> Self {
        let listed = auth.users.iter().map(|(user, credential)| {
            let listed = match credential {
                Credential::Password(password) => Listed {
                    password: Some(password.clone()),
                    verifier: Some(Verifier::derive(
                        password.expose(),
                        &rand::random::<[u8; 16]>(),
                        DEFAULT_ITERATIONS,
                    )),
                },
                Credential::Verifier(text) => Listed {
                    password: None,
                    verifier: Verifier::parse(text.expose()),
                },
            };
            (user.clone(), listed)
        });
        Self {
            method: auth.method,
            listed: listed.collect(),
        }
    }

    pub(super) fn listed(&self, user: &str) -> Option<&Listed> {
        self.listed.get(user)
    }
}

/// One for the whole process, shared by all worker threads.
pub struct Context {
    pub settings: ArcSwap<Settings>,
    pub registry: Registry,
    /// Where the migration stands; a session looks at it when a transaction begins.
    pub control: watch::Receiver<Control>,
    /// What mirroring and shadow reads ask of a session.
    pub hooks: Hooks,
    /// Cancelled when no more clients are let in.
    pub shutdown: CancellationToken,
    pub(super) verifiers: VerifierCache,
    /// The newest protocol version each server was found to speak, by host and port. As many
    /// entries as there are servers in proxy.yaml.
    pub(super) versions: DashMap<(String, u16), Version>,
    /// Makes the verifiers of users that there are not.
    pub(super) mock_secret: [u8; 32],
}

impl Context {
    pub fn new(settings: Settings, control: watch::Receiver<Control>, hooks: Hooks) -> Arc<Self> {
        Arc::new(Self {
            settings: ArcSwap::from_pointee(settings),
            registry: Registry::default(),
            control,
            hooks,
            shutdown: CancellationToken::new(),
            verifiers: VerifierCache::default(),
            versions: DashMap::new(),
            mock_secret: rand::random(),
        })
    }

    /// New clients get these settings.
    pub fn reload(&self, settings: Settings) {
        self.settings.store(Arc::new(settings));
    }

    pub(super) fn control_now(&self) -> Control {
        *self.control.borrow()
    }

    pub(super) fn learn_version(&self, target: &Target, major: Option<u32>) {
        if let Some(major) = major {
            let version = if major >= 18 { Version::V3_2 } else { Version::V3_0 };
            self.versions.insert((target.host.clone(), target.port), version);
        }
    }
}
