//! Wires every part and lists every task.
//!
//! | task | where it runs | ends |
//! | --- | --- | --- |
//! | accepting and relaying clients | the listener's own threads | when drained |
//! | one applier for each mirrored database | control runtime | with mirroring |
//! | shadow workers and the mismatch log's writer | control runtime | with the process |
//! | beating and taking part in switchovers | control runtime | with the process |
//! | watching both servers of each database | control runtime | with the process |
//! | recording phases and statistics in the mismatch log | control runtime | with the process |
//! | publishing the gauges, looking for new databases under `"*"` | control runtime | with the process |
//! | the admin server | control runtime | with the process |
//! | signals (SIGHUP, SIGTERM, SIGINT) | control runtime | with the process |

mod acknowledge;
mod canaries;
mod flips;
mod gauges;
mod leaving;
mod operations;
mod phases;
mod rehearsals;
mod shadows;
mod world;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use self::world::World;
use crate::config::Config;
use crate::listener::Listener;
use crate::{admin, telemetry};

/// What `serve` may be told besides its configuration.
#[derive(Debug, Clone, Copy, Default)]
pub struct ServeOptions {
    /// Stop when stdin ends: whoever started us and died cannot leave us behind.
    pub until_stdin_closes: bool,
}

/// How long a stopping proxy waits for open transactions before it ends them.
const STOPPING_MAX: Duration = Duration::from_secs(10);

/// Runs the proxy until a signal ends it.
///
/// # Errors
/// An address cannot be bound, a certificate not be read, or what the databases record
/// contradicts proxy.yaml.
pub fn serve(config: Config, options: ServeOptions) -> anyhow::Result<()> {
    telemetry::init_logs();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("pgtandem-control")
        .enable_all()
        .build()
        .context("start the control runtime")?;
    let outcome = runtime.block_on(run(config, options));
    // A thread may still be reading stdin; nobody waits for it.
    runtime.shutdown_background();
    outcome
}

async fn run(config: Config, options: ServeOptions) -> anyhow::Result<()> {
    let metrics = telemetry::init_metrics().context("set up metrics")?;
    let listen = config.listen.clone();
    let admin_listener = TcpListener::bind(config.admin.address)
        .await
        .with_context(|| format!("admin: cannot listen on {}", config.admin.address))?;
    let token = config.admin.token.clone();
    let world = World::new(config)?;
    let stop = CancellationToken::new();
    let admin = tokio::spawn(admin::serve(
        admin_listener,
        world.clone(),
        metrics,
        token,
        stop.clone(),
    ));

    // Nobody is served before it is known which side is primary; the admin server says why.
    let asked_to_stop = until_stopped(options, &world);
    tokio::pin!(asked_to_stop);
    tokio::select! {
        begun = world.begin() => begun?,
        () = &mut asked_to_stop => {
            stop.cancel();
            return Ok(());
        }
    }
    let gauges = AbortOnDropHandle::new(tokio::spawn(gauges::publish(world.clone())));
    let statistics = AbortOnDropHandle::new(tokio::spawn(world.clone().keep_statistics()));
    let canaries = AbortOnDropHandle::new(tokio::spawn(world.canaries.clone().watch()));
    let part = world.participant.clone();
    let beating = AbortOnDropHandle::new(tokio::spawn(part.clone().beat(world.clone())));
    let taking_part = AbortOnDropHandle::new(tokio::spawn(part.clone().take_part(world.clone())));
    let listener = Listener::start(world.sessions(), &listen)?;
    world.serving();
    asked_to_stop.await;

    tracing::info!("stopping: sessions end as soon as they have no transaction open");
    let cut_off = listener.drain(Instant::now() + STOPPING_MAX).await;
    if cut_off > 0 {
        tracing::warn!(cut_off, "transactions were still open and were ended");
    }
    drop(statistics);
    drop(canaries);
    drop(beating);
    drop(taking_part);
    part.leave(&world.tandems()).await;
    world.end().await;
    drop(gauges);
    stop.cancel();
    admin.await.context("the admin server")?.context("the admin server")?;
    Ok(())
}

/// Returns at SIGTERM, SIGINT, or the end of stdin where that was asked for; reloads at SIGHUP.
async fn until_stopped(options: ServeOptions, world: &Arc<World>) {
    let (Ok(mut hangup), Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::hangup()),
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        tracing::error!("signals cannot be received; stop the proxy with SIGKILL, nothing is lost by it");
        return std::future::pending().await;
    };
    let stdin_closed = async {
        if options.until_stdin_closes {
            let mut ignored = Vec::new();
            tokio::io::stdin().read_to_end(&mut ignored).await.ok();
        } else {
            std::future::pending::<()>().await;
        }
    };
    tokio::pin!(stdin_closed);
    loop {
        tokio::select! {
            _ = terminate.recv() => return,
            _ = interrupt.recv() => return,
            () = &mut stdin_closed => return,
            _ = hangup.recv() => {
                let world = world.clone();
                tokio::spawn(async move {
                    match world.reload_config(false).await {
                        Ok(answer) => tracing::info!(phase = %answer.phase, changed = ?answer.changed, "reloaded"),
                        Err(why) => tracing::error!(why, "not reloaded; nothing was changed"),
                    }
                });
            }
        }
    }
}
