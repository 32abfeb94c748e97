//! The flip: a list of steps, each of which either succeeds or leaves everything as it was, up
//! to the point of no return; after that it goes forward.
//!
//! ```text
//! prepare ─ hold ─ drain ─ carry over ─ fence ─ last round ─ turn ═ release
//!    └────────┴───────┴─────────┴─────────┴─────────┘        ║
//!         abandoned: sessions back, fence released            point of no return
//! ```
//!
//! The roles can be swapped only with a [`Drained`], which nothing but the last round under the
//! fence returns: forgetting the fence does not compile.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::tandem::{Drained, Fenced, Tandem, Turning};
use crate::admin::api::FlipStep;
use crate::control::Control;
use crate::session::{Hold, Registry, Straggler, Uncarried};

/// What a flip works on.
pub struct Flip<'a> {
    pub registry: &'a Registry,
    pub tandems: &'a [Arc<Tandem>],
    pub from: Control,
    pub to: Control,
    pub drain_timeout: Duration,
    /// Closed gates are passed, also those that close meanwhile.
    pub forced: bool,
}

/// What a flip that happened did.
#[derive(Debug, Default)]
pub struct Flipped {
    pub steps: Vec<FlipStep>,
    pub held: Duration,
    pub sessions_carried: usize,
}

/// Why a flip did not happen; everything goes on as before.
#[derive(Debug, thiserror::Error)]
pub enum Abandoned {
    #[error("{} sessions have no connection to the other side, the first: {}", .0.len(), first(.0))]
    NotPrepared(Vec<Uncarried>),
    #[error("{} sessions cannot be carried over, the first: {}", .0.len(), first(.0))]
    NotCarried(Vec<Uncarried>),
    #[error("{} sessions still had a transaction open after {waited:?}, the first: {}", .stragglers.len(), first_straggler(.stragglers))]
    NotDrained {
        stragglers: Vec<Straggler>,
        waited: Duration,
    },
    #[error("database {database}: {step}: {cause}")]
    Side {
        database: String,
        step: &'static str,
        cause: String,
    },
}

impl Flip<'_> {
    /// Carries the flip out. `publish` is called between the point of no return and the release
    /// of the clients; whoever is released sees what it published.
    pub async fn run(&self, publish: impl AsyncFnOnce()) -> Result<Flipped, Abandoned> {
        let mut clock = Clock::start();
        self.prepare().await?;
        clock.step("connections to the other side opened");

        let held_from = Instant::now();
        let hold = self.registry.hold();
        let outcome = self.under_hold(&hold, &mut clock, publish).await;
        drop(hold);
        self.registry.settle();
        let sessions_carried = outcome?;
        Ok(Flipped {
            steps: clock.steps,
            held: held_from.elapsed(),
            sessions_carried,
        })
    }

    async fn prepare(&self) -> Result<(), Abandoned> {
        let prepared = self.registry.prepare(self.to.primary).await;
        let refused = if !prepared.failed.is_empty() {
            Some(Abandoned::NotPrepared(prepared.failed))
        } else if !prepared.uncarriable.is_empty() {
            Some(Abandoned::NotCarried(prepared.uncarriable))
        } else {
            None
        };
        match refused {
            Some(refused) => {
                self.registry.settle();
                Err(refused)
            }
            None => Ok(()),
        }
    }

    async fn under_hold(
        &self,
        hold: &Hold,
        clock: &mut Clock,
        publish: impl AsyncFnOnce(),
    ) -> Result<usize, Abandoned> {
        let deadline = Instant::now() + self.drain_timeout;
        self.registry
            .drained(hold, deadline)
            .await
            .map_err(|stragglers| Abandoned::NotDrained {
                stragglers,
                waited: self.drain_timeout,
            })?;
        clock.step("open transactions finished");

        let stay = self.registry.carry_over(hold, self.to.primary).await;
        if !stay.is_empty() {
            self.carry_back(hold).await;
            return Err(Abandoned::NotCarried(stay));
        }
        clock.step("sessions brought to the other side");

        let drained = match self.fence_and_drain(deadline, clock).await {
            Ok(drained) => drained,
            Err(abandoned) => {
                self.carry_back(hold).await;
                return Err(abandoned);
            }
        };
        if let Err(abandoned) = self.turn(drained, clock).await {
            self.carry_back(hold).await;
            return Err(abandoned);
        }
        publish().await;
        clock.step("reverse mirroring armed, clients released");
        Ok(self.registry.len())
    }

    /// Every database is fenced before any is turned: what can fail, fails while all of them can
    /// still go back.
    async fn fence_and_drain(
        &self,
        deadline: Instant,
        clock: &mut Clock,
    ) -> Result<Vec<(Arc<Tandem>, Drained)>, Abandoned> {
        let mut fenced: Vec<(Arc<Tandem>, Fenced)> = Vec::new();
        for tandem in self.tandems {
            let fence = tandem
                .fence(self.from.primary, deadline)
                .await
                .map_err(|cause| failed(tandem, "fence the old primary", cause))?;
            fenced.push((tandem.clone(), fence));
        }
        clock.step("writers fenced off the old primary");
        let mut drained = Vec::new();
        for (tandem, fence) in fenced {
            let last = tandem
                .last_round(fence, deadline, self.forced)
                .await
                .map_err(|cause| failed(&tandem, "apply the last round", cause))?;
            drained.push((tandem, last));
        }
        clock.step("last round and sequences applied");
        Ok(drained)
    }

    /// The point of no return is the first database's turn; those after it must follow.
    async fn turn(&self, drained: Vec<(Arc<Tandem>, Drained)>, clock: &mut Clock) -> Result<(), Abandoned> {
        let mut mode = Turning::MayGoBack;
        for (tandem, drained) in drained {
            tandem
                .turn(drained, self.from, self.to, mode)
                .await
                .map_err(|cause| failed(&tandem, "turn the roles", cause))?;
            mode = Turning::MustFollow;
        }
        clock.step("roles turned");
        Ok(())
    }

    async fn carry_back(&self, hold: &Hold) {
        for session in self.registry.carry_over(hold, self.from.primary).await {
            tracing::error!(
                user = session.user,
                reason = session.reason,
                "a session could not be brought back and is ended"
            );
            self.registry
                .end(&[session.id], "the session was lost while a switchover was abandoned");
        }
    }
}

fn failed(tandem: &Tandem, step: &'static str, cause: String) -> Abandoned {
    Abandoned::Side {
        database: tandem.name().to_owned(),
        step,
        cause,
    }
}

fn first(sessions: &[Uncarried]) -> String {
    sessions.first().map_or_else(String::new, |session| {
        format!("{} ({}): {}", session.user, session.application, session.reason)
    })
}

fn first_straggler(sessions: &[Straggler]) -> String {
    sessions.first().map_or_else(String::new, |session| {
        format!("{} ({}), process {}", session.user, session.application, session.pid)
    })
}

/// Times the steps, each from the end of the one before.
struct Clock {
    last: Instant,
    steps: Vec<FlipStep>,
}

impl Clock {
    fn start() -> Self {
        Self {
            last: Instant::now(),
            steps: Vec::new(),
        }
    }

    fn step(&mut self, name: &str) {
        let now = Instant::now();
        let ms = (now - self.last).as_secs_f64() * 1000.0;
        tracing::info!(step = name, ms, "switchover");
        self.steps.push(FlipStep {
            name: name.to_owned(),
            ms,
        });
        self.last = now;
    }
}
