//! Logs and metrics of the process. Set up once by `serve` and `demo`; nothing here steers
//! behaviour.

use std::io::IsTerminal;

use metrics_exporter_prometheus::{BuildError, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

/// Logs go to stderr: for a person on a terminal, as JSON lines otherwise. `RUST_LOG` chooses
/// what is said; without it, `info` and above.
pub fn init_logs() {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,tokio_postgres=warn,pgwire=warn"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let installed = if std::io::stderr().is_terminal() {
        builder.with_target(false).try_init()
    } else {
        builder.json().flatten_event(true).try_init()
    };
    // Already set up (several proxies in one test process): the first one's stays.
    installed.ok();
}

/// Collects what `metrics::…!` records; [`PrometheusHandle::render`] gives `/metrics`' text.
///
/// # Errors
/// A recorder was installed before.
pub fn init_metrics() -> Result<PrometheusHandle, BuildError> {
    PrometheusBuilder::new().install_recorder()
}
