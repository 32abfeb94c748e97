use super::*;
use crate::chain::Fsync;
use crate::config::{Capacity, Gates, Rehearse, Writes};

const MINIMAL: &str = "
phase: dual_write
databases:
  shop:
    legacy: postgresql://pgtandem@legacy.internal:5432/shop
    new: postgresql://pgtandem@new.internal:5432/shop
";

fn check(text: &str) -> Result<Config, String> {
    parse(Path::new("/etc/proxy.yaml"), text).map_err(|error| error.to_string())
}

#[test]
fn a_minimal_file_gets_the_documented_defaults() {
    let config = check(MINIMAL).unwrap();
    assert_eq!(config.listen, ["127.0.0.1:6432".parse().unwrap()]);
    assert_eq!(config.admin.address, "127.0.0.1:6433".parse().unwrap());
    assert_eq!(config.phase, Phase::DualWrite);
    assert_eq!(config.journal.max_bytes, 10 << 30);
    assert_eq!(config.reads.shadow_percent, 10.0);
    assert_eq!(config.mismatch_log.path, Path::new("/etc/mismatches.jsonl"));
    assert_eq!(config.mismatch_log.key_file, Path::new("/etc/mismatches.key"));
    assert_eq!(config.mismatch_log.fsync, Fsync::Every(Duration::from_secs(1)));
    assert_eq!(config.switchover.drain_timeout, Duration::from_secs(5));
    assert_eq!(config.switchover.stragglers, Stragglers::Wait);
    assert_eq!(config.switchover.gates, Gates::default());
    assert_eq!(config.auth.method, AuthMethod::Scram);
    assert_eq!(config.writes, Writes::default());
    assert_eq!(config.verify, Verify::default());
}

#[test]
fn thresholds_of_the_gates() {
    let gates = "{ lag: 500ms, verified_within: 24h, shadow_match_rate: 99.9, no_strays_for: 1h, \
                 spare_connections: 5, direct_sessions: 0, disk: { new: 200GiB } }";
    let config = check(&format!("{MINIMAL}switchover: {{ gates: {gates} }}\n")).unwrap();
    let expected = Gates {
        lag: Duration::from_millis(500),
        verified_within: Some(Duration::from_secs(86_400)),
        shadow_match_rate: Some(99.9),
        no_strays_for: Some(Duration::from_secs(3600)),
        spare_connections: 5,
        direct_sessions: Some(0),
        disk: Capacity {
            new: Some(200 << 30),
            ..Capacity::default()
        },
        ..Gates::default()
    };
    assert_eq!(config.switchover.gates, expected);
}

#[test]
fn which_writes_are_rehearsed() {
    assert_eq!(check(MINIMAL).unwrap().rehearse, Rehearse::default());
    assert!(!Rehearse::default().any());
    let text = format!(
        "{MINIMAL}writes: {{ rehearse_percent: 5, rehearse_key: user, rehearse_rules: [{{ table: orders, percent: 100 }}], \
         rehearse_max_concurrency: 3, rehearse_queue: 7, rehearse_timeout: 2s }}\n"
    );
    let found = check(&text).unwrap().rehearse;
    assert!(found.any());
    assert_eq!((found.percent, found.rules.len()), (5.0, 1));
    assert_eq!((found.max_concurrency, found.queue), (3, 7));
    assert_eq!(found.timeout, Duration::from_secs(2));
    assert_eq!(found.rules[0].which.table.as_deref(), Some("orders"));
    assert_eq!(found.rules[0].key, found.key);
}

#[test]
fn the_file_in_the_repository_is_right() {
    let text = include_str!("../../../proxy.yaml").replace("${APP_PASSWORD}", "x");
    check(&text).unwrap();
}

#[test]
fn errors_say_file_line_key_and_what_would_be_right() {
    for (text, says) in [
        (MINIMAL.replace("dual_write", "dual"), "/etc/proxy.yaml:2:8: phase: "),
        (MINIMAL.replace("dual_write", "dual"), "dual_read"),
        (format!("{MINIMAL}lissten: 1\n"), "/etc/proxy.yaml:7:1: lissten: "),
        (format!("{MINIMAL}lissten: 1\n"), "expected one of listen, admin"),
        (format!("{MINIMAL}listen: here\n"), ":7:9: listen: "),
        (format!("{MINIMAL}journal: {{ max_bytes: lots }}\n"), "10GiB"),
        (format!("{MINIMAL}reads: {{ shadow_percent: 101 }}\n"), "0 to 100"),
        (format!("{MINIMAL}writes: {{ error_threshold: 101 }}\n"), "0 to 100"),
        (format!("{MINIMAL}writes: {{ retry_attempts: -1 }}\n"), ":7:27: "),
        (format!("{MINIMAL}writes: {{ rehearse_percent: 101 }}\n"), "0 to 100"),
        (format!("{MINIMAL}writes: {{ rehearse: 1 }}\n"), "unknown field"),
        (
            format!("{MINIMAL}writes: {{ rehearse_max_concurrency: 0 }}\n"),
            "at least 1",
        ),
        (
            format!("{MINIMAL}writes: {{ rehearse_rules: [{{ percent: 5 }}] }}\n"),
            "writes: rehearse_rules: entry 1: names no",
        ),
        (
            format!("{MINIMAL}writes: {{ rehearse_key: tenant }}\n"),
            "writes: rehearse_key: ",
        ),
        (format!("{MINIMAL}switchover: {{ drain_timeout: 5 }}\n"), "500ms"),
        (format!("{MINIMAL}switchover: {{ gates: {{ lag: 2 }} }}\n"), "500ms"),
        (
            format!("{MINIMAL}switchover: {{ gates: {{ disk: {{ old: 1GiB }} }} }}\n"),
            "expected one of legacy, new",
        ),
        (
            format!("{MINIMAL}switchover: {{ gates: {{ shadow_coverage: 101 }} }}\n"),
            "0 to 100",
        ),
        (
            format!("{MINIMAL}switchover: {{ gates: {{ canaries: 1 }} }}\n"),
            "unknown field",
        ),
        (
            format!("{MINIMAL}switchover: {{ stragglers: kill }}\n"),
            "unknown variant",
        ),
        (
            MINIMAL.replace("postgresql://pgtandem@new", "mysql://pgtandem@new"),
            ":6:10: new: ",
        ),
        (
            MINIMAL.replace("new.internal:5432/shop", "new.internal"),
            "databases: shop: new: names no database",
        ),
        (MINIMAL.replace("new.internal", "legacy.internal"), "the same database"),
        (
            format!("{MINIMAL}listen: 0.0.0.0:6432\nauth: {{ method: trust }}\n"),
            "loopback",
        ),
        (
            format!("{MINIMAL}writes: {{ acknowledge: both, when_late: shrug }}\n"),
            "shrug",
        ),
        (format!("{MINIMAL}reads: {{ canary_percent: 500 }}\n"), "0 to 100"),
        (
            format!("{MINIMAL}mismatch_log: {{ rotate: 1 }}\n"),
            "expected one of path, values",
        ),
        (format!("{MINIMAL}mismatch_log: {{ values: some }}\n"), "hashed"),
        (
            format!("{MINIMAL}mismatch_log: {{ columns: {{ email: secret }} }}\n"),
            "hashed",
        ),
        (
            format!("{MINIMAL}mismatch_log: {{ max_size: 1kB }}\n"),
            "at least 64KiB",
        ),
        (format!("{MINIMAL}mismatch_log: {{ max_age: 0s }}\n"), "more than 0s"),
        (format!("{MINIMAL}mismatch_log: {{ mac_key: short }}\n"), "at least 16"),
        (format!("{MINIMAL}mismatch_log: {{ fsync: often }}\n"), "always, never"),
        (
            format!("{MINIMAL}mismatch_log: {{ path: a, key_file: a }}\n"),
            "the log itself",
        ),
        (format!("{MINIMAL}admin: 0.0.0.0:6433\n"), "admin_token"),
        (
            format!("{MINIMAL}admin_token: \"${{PGTANDEM_NOT_SET}}\"\n"),
            "PGTANDEM_NOT_SET is not set",
        ),
    ] {
        let error = check(&text).unwrap_err();
        assert!(error.contains(says), "{error}\n  does not say {says}");
    }
}

#[test]
fn an_error_beside_a_password_does_not_show_it() {
    let error = check(&format!(
        "{MINIMAL}auth:\n  users: {{ app: hunter2, wrong: [hunter2] }}\n"
    ))
    .unwrap_err();
    assert!(!error.contains("hunter2"), "{error}");
    let error = check(&MINIMAL.replace("pgtandem@new.internal:5432", "p:hunter2@new.internal:x")).unwrap_err();
    assert!(!error.contains("hunter2"), "{error}");
}

#[test]
fn a_verifier_is_told_from_a_password() {
    let config = check(&format!(
        "{MINIMAL}auth: {{ users: {{ a: pw, b: \"SCRAM-SHA-256$4096:c2FsdA==$aGFzaA==:aGFzaA==\" }} }}\n"
    ))
    .unwrap();
    assert!(matches!(config.auth.users["a"], Credential::Password(_)));
    assert!(matches!(config.auth.users["b"], Credential::Verifier(_)));
}
