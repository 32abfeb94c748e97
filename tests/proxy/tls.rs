//! Encryption on both ends, with libpq's own psql as the client.

use std::path::Path;
use std::process::Command;

use pgtandem::config::{ClientTls, DatabaseConfig, SslMode, Target};
use pgtandem::control::Side;
use pgtandem::routing::Databases;
use pgtandem::servers::{Binaries, PASSWORD, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::{APP, Options, Proxy, Raw, settings};

/// A certificate for 127.0.0.1 that signs itself.
fn certificate(directory: &Path) -> ClientTls {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["127.0.0.1".into(), "localhost".into()])
        .unwrap()
        .self_signed(&key)
        .unwrap();
    let tls = ClientTls {
        certificate: directory.join("server.crt"),
        key: directory.join("server.key"),
        required: true,
    };
    std::fs::write(&tls.certificate, certificate.pem()).unwrap();
    std::fs::write(&tls.key, key.serialize_pem()).unwrap();
    tls
}

fn psql(proxy: &Proxy, parameters: &str, text: &str) -> String {
    let output = Command::new(proxy.servers.legacy.binaries().program("psql"))
        .arg(format!(
            "host=127.0.0.1 port={} user={APP} password={PASSWORD} dbname={} {parameters}",
            proxy.address.port(),
            proxy.database
        ))
        .args(["-XAtc", text])
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_by_tls_in_every_way_that_libpq_knows() {
    let directory = tempfile::tempdir().unwrap();
    let tls = certificate(directory.path());
    let ca = tls.certificate.display().to_string();
    let options = Options {
        tls: Some(tls.clone()),
        ..Options::default()
    };
    let proxy = Proxy::start("by_tls", options).await;
    for (parameters, expected) in [
        ("sslmode=require", "1"),
        (&format!("sslmode=verify-full sslrootcert={ca}"), "1"),
        ("sslmode=require channel_binding=require", "1"),
        ("sslmode=require channel_binding=disable", "1"),
        ("sslmode=disable", "requires TLS"),
    ] {
        let answer = tokio::task::block_in_place(|| psql(&proxy, parameters, "select 1"));
        assert!(answer.contains(expected), "{parameters}: {answer}");
    }
    // TLS at once, as libpq 17 can.
    let target = Target {
        ssl_mode: SslMode::VerifyFull,
        ssl_root_cert: Some(tls.certificate.clone()),
        ..Target::parse(Side::Legacy, "postgresql://x@127.0.0.1/x").unwrap()
    };
    let connector = pgtandem::upstream::tls::connector(&target).unwrap().unwrap();
    let tcp = tokio::net::TcpStream::connect(proxy.address).await.unwrap();
    let name = pgtandem::upstream::tls::server_name("127.0.0.1").unwrap();
    let mut direct = connector.connect(name, tcp).await.unwrap();
    let packet = pgtandem::wire::startup::packet(
        pgtandem::wire::startup::Version::V3_0,
        APP,
        &proxy.database,
        &crate::common::no_parameters(),
    );
    direct.write_all(&packet).await.unwrap();
    let mut answer = [0; 9];
    direct.read_exact(&mut answer).await.unwrap();
    assert_eq!((answer[0], answer[8]), (b'R', 10));
    // Large both ways, through the TLS layer's own buffers.
    let answer = tokio::task::block_in_place(|| {
        psql(
            &proxy,
            "sslmode=require",
            "select sum(length(repeat('x', 1000) || g)) from generate_series(1, 9) g; \
             select repeat('y', 3000000)",
        )
    });
    assert!(answer.len() > 3_000_000, "{}", answer.len());
    // A new certificate counts for those who come next.
    let other = certificate(tempfile::tempdir().unwrap().keep().as_path());
    let options = Options {
        tls: Some(other.clone()),
        ..Options::default()
    };
    proxy.context.reload(settings(&proxy.database, &options));
    let verify = |ca: &Path| format!("sslmode=verify-full sslrootcert={}", ca.display());
    let old = tokio::task::block_in_place(|| psql(&proxy, &verify(&tls.certificate), "select 1"));
    assert!(old.contains("certificate"), "{old}");
    let new = tokio::task::block_in_place(|| psql(&proxy, &verify(&other.certificate), "select 1"));
    assert_eq!(new, "1");
    std::fs::remove_dir_all(other.key.parent().unwrap()).unwrap();
}

#[tokio::test]
async fn bytes_before_the_answer_to_an_ssl_request_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let options = Options {
        tls: Some(certificate(directory.path())),
        ..Options::default()
    };
    let proxy = Proxy::start("too_early", options).await;
    let mut raw = Raw::connect(proxy.address).await;
    let request = [&8_u32.to_be_bytes()[..], &80_877_103_u32.to_be_bytes()].concat();
    raw.send(&[&request[..], b"\0\0\0\x10\0\x03\0\0user\0x\0\0"].concat())
        .await;
    let error = raw.fatal().await;
    assert_eq!(error.sqlstate(), "08P01");
    assert!(error.message().contains("unencrypted"), "{}", error.message());
    // TLS at once, but without asking for this protocol.
    let mut raw = Raw::connect(proxy.address).await;
    raw.stream.write_all(&[0x16, 3, 1, 0, 2, 0, 0]).await.unwrap();
    let mut rest = Vec::new();
    raw.stream.read_to_end(&mut rest).await.ok();
    assert!(!rest.starts_with(b"E"));
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_by_tls_and_by_every_way_to_prove_a_password() {
    let directory = tempfile::Builder::new().prefix("pgtandem-tls-").tempdir().unwrap();
    let tls = certificate(directory.path());
    let mut server = Server::start(&Binaries::legacy().unwrap(), &[]).unwrap();
    // The server's own copy, readable by itself alone.
    let data = server.data_directory();
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    let owner = std::fs::metadata(&data).unwrap();
    for (from, name) in [(&tls.certificate, "server.crt"), (&tls.key, "server.key")] {
        let to = data.join(name);
        std::fs::copy(from, &to).unwrap();
        std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o600)).unwrap();
        chown(&to, Some(owner.uid()), Some(owner.gid())).unwrap();
    }
    std::fs::write(
        data.join("pg_hba.conf"),
        "hostssl all by_scram all scram-sha-256\nhostssl all by_md5 all md5\nhostssl all by_text all password\n\
         hostnossl all by_nossl all scram-sha-256\nhostssl all by_trust all trust\nhostssl all postgres all scram-sha-256\n",
    )
    .unwrap();
    tokio::task::block_in_place(|| server.stop("fast").unwrap());
    let conf = data.join("postgresql.conf");
    let text = std::fs::read_to_string(&conf).unwrap();
    std::fs::write(&conf, text + "\nssl = on\n").unwrap();
    tokio::task::block_in_place(|| server.start_again().unwrap());

    let proxy = Proxy::start("to_tls", Options::default()).await;
    let target = |mode: SslMode| Target {
        ssl_mode: mode,
        ssl_root_cert: Some(tls.certificate.clone()),
        ..Target::parse(Side::Legacy, &server.url("postgres", "postgres")).unwrap()
    };
    let own = pgtandem::upstream::control::connect(&target(SslMode::Require), "test")
        .await
        .unwrap();
    own.batch_execute(&format!(
        "set password_encryption = 'md5'; create role by_md5 login password '{PASSWORD}'; reset password_encryption; \
         create role by_scram login password '{PASSWORD}'; create role by_text login password '{PASSWORD}'; \
         create role by_trust login password '{PASSWORD}'; create role by_nossl login password '{PASSWORD}'"
    ))
    .await
    .unwrap();
    let listed = |user: &str| {
        let password = pgtandem::config::Credential::Password(pgtandem::config::Secret::new(PASSWORD));
        (user.to_owned(), password)
    };
    for (mode, user, is_listed, expected) in [
        (SslMode::Require, "by_scram", true, "t"),
        (SslMode::Require, "by_scram", false, "t"),
        (SslMode::VerifyCa, "by_scram", false, "t"),
        (SslMode::VerifyFull, "by_scram", false, "t"),
        (SslMode::Prefer, "by_scram", false, "t"),
        (SslMode::Require, "by_md5", true, "t"),
        (SslMode::Require, "by_text", true, "t"),
        (SslMode::Require, "by_trust", true, "t"),
        // Only a verifier is known, and the server wants the password itself.
        (SslMode::Require, "by_text", false, "28000"),
        (SslMode::Disable, "by_nossl", true, "f"),
        (SslMode::Disable, "by_scram", true, "28000"),
    ] {
        let options = Options {
            users: is_listed.then(|| listed(user)).into_iter().collect(),
            ..Options::default()
        };
        let mut settings = settings(&proxy.database, &options);
        let config = DatabaseConfig {
            legacy: target(mode),
            new: target(mode),
            transform: Default::default(),
        };
        settings.databases = Databases::new(&[("to_tls".to_owned(), config)].into());
        proxy.context.reload(settings);
        let mut raw = Raw::connect(proxy.address).await;
        raw.startup(
            pgtandem::wire::startup::Version::V3_0,
            &[("user", user), ("database", "to_tls")],
        )
        .await;
        let ok = raw.scram(PASSWORD).await;
        assert_eq!(ok.kind, b'R', "{user}: {}", ok.message());
        let answer = if expected.len() > 1 {
            raw.fatal().await.sqlstate()
        } else {
            raw.greeting().await;
            raw.value("select ssl from pg_stat_ssl where pid = pg_backend_pid()")
                .await
        };
        assert_eq!(answer, expected, "{mode:?} {user} {is_listed}");
    }
    let wrong = Target {
        host: "localhost".into(),
        ssl_root_cert: None,
        ..target(SslMode::VerifyFull)
    };
    let refused = pgtandem::upstream::control::connect(&wrong, "test").await;
    assert!(refused.is_err());
}
