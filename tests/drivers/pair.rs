//! The two servers of a test, an older and a newer one, each with the clients' role and the
//! proxy's, and no database of its own yet.

use std::path::PathBuf;

use pgtandem::servers::{Binaries, Options, PASSWORD, SUPERUSER, Server, ServerTls};
use tempfile::TempDir;

/// The role that every driver logs in as.
pub(crate) const CLIENT: &str = "app";
/// The proxy's own role.
pub(crate) const PROXY: &str = "pgtandem";

pub(crate) struct Pair {
    pub(crate) older: Server,
    pub(crate) newer: Server,
    files: TempDir,
}

/// The database that a session moves on to from the one it began with.
pub(crate) fn other_database(database: &str) -> String {
    format!("{database}_other")
}

/// Where a driver connects to.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    pub(crate) port: u16,
    pub(crate) database: String,
    /// The certificate authority's file, where the behaviours about TLS are to be run.
    pub(crate) tls_root: Option<PathBuf>,
}

impl Endpoint {
    pub(crate) const HOST: &str = "127.0.0.1";

    pub(crate) fn url(&self) -> String {
        format!(
            "postgresql://{CLIENT}:{PASSWORD}@{}:{}/{}",
            Self::HOST,
            self.port,
            self.database
        )
    }
}

/// The server itself.
pub(crate) fn endpoint(server: &Server, database: &str) -> Endpoint {
    Endpoint {
        port: server.port,
        database: database.to_owned(),
        tls_root: None,
    }
}

impl Pair {
    /// Only the older one can speak TLS: the newer one's binaries are built without.
    pub(crate) fn start(certificate: &ServerTls) -> Self {
        let options = Options {
            tls: Some(certificate.clone()),
            ..Options::default()
        };
        let older = Server::start_with(&Binaries::legacy().expect("the legacy binaries"), &options);
        let newer = Server::start(&Binaries::new_side().expect("the new binaries"), &[]);
        let pair = Self {
            older: older.expect("start the older server"),
            newer: newer.expect("start the newer server"),
            files: tempfile::tempdir().expect("a temporary directory"),
        };
        for server in [&pair.older, &pair.newer] {
            server.create_role(CLIENT, "LOGIN").expect("create the clients' role");
            server
                .create_role(PROXY, "LOGIN SUPERUSER")
                .expect("create the proxy's role");
            assert_eq!(
                server.sql("postgres", "SELECT current_user").ok().as_deref(),
                Some(SUPERUSER)
            );
        }
        pair
    }

    /// Creates a database and its [`other_database`] on both servers. Each proxy of a test needs
    /// databases of its own: which side is primary is recorded in them.
    pub(crate) fn create_databases(&self, database: &str) {
        for server in [&self.older, &self.newer] {
            for name in [database, &other_database(database)] {
                server.create_database(name, CLIENT).expect("create a database");
            }
        }
    }

    /// A file that lives as long as the pair.
    pub(crate) fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.files.path().join(name);
        std::fs::write(&path, content).expect("write a file");
        path
    }
}

/// An authority's certificate as PEM, and one signed by it for the name `localhost` alone: a
/// client that verifies the host must refuse 127.0.0.1.
pub(crate) fn authority_and_certificate() -> (String, ServerTls) {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

    let authority_key = KeyPair::generate().expect("a key");
    let mut authority = CertificateParams::new(Vec::new()).expect("no names");
    authority.distinguished_name.push(DnType::CommonName, "test authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let authority_certificate = authority
        .self_signed(&authority_key)
        .expect("sign the authority's certificate");
    let issuer = Issuer::new(authority, authority_key);

    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(["localhost".to_owned()]).expect("one name");
    params.distinguished_name.push(DnType::CommonName, "localhost");
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, &issuer).expect("sign the server's certificate");
    (
        authority_certificate.pem(),
        ServerTls {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        },
    )
}
