//! What every proxy does for flips, also its own: it beats, looks at what the two databases
//! record, and does what [`machine::participate`] says. No proxy speaks to another but through
//! the databases, over connections that each of them holds to both: notifications wake it, and a
//! look once a second finds what got lost.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{Notify, OwnedMutexGuard};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::machine::{self, Act, FlipId, FlipSeen, Seen, Standing, Step};
use super::records::{self, FlipRow, Look, Member, ProxyRow};
use super::recover::Recorded;
use super::resolve::{restore_others, seat, take_over};
use super::sessions::{Survey, Surveys};
use super::tandem::Tandem;
use crate::config::Switchover;
use crate::control::{Control, Phase, Side};
use crate::journal;
use crate::session::{Hold, Registry};
use crate::upstream::control::{Control as Connection, connect, connect_hearing, error_chain};

/// Between two beats: a quarter of a second's delay counts for nothing against
/// [`records::SILENCE_MAX`].
const BEAT: Duration = Duration::from_millis(500);
/// Between two questions to the sessions whether they could be carried over.
const SURVEY: Duration = Duration::from_secs(2);
/// Between two looks while nothing is heard, and while clients wait.
pub(super) const TICK: Duration = Duration::from_secs(1);
const TICK_HELD: Duration = Duration::from_millis(50);
/// A server that takes longer for a look is as good as away.
const LOOK_MAX: Duration = Duration::from_secs(5);
/// For what is only told.
pub(super) const COPY_MAX: Duration = Duration::from_secs(1);
/// Between two looks at the other databases after a flip that was given up.
const RESTORE_AGAIN: Duration = Duration::from_secs(5);

/// The proxy that takes part.
pub trait Host: Send + Sync + 'static {
    fn control(&self) -> Control;
    fn registry(&self) -> &Registry;
    fn tandems(&self) -> Arc<Vec<Arc<Tandem>>>;
    fn policy(&self) -> Switchover;
    /// `phase:` of proxy.yaml.
    fn wish(&self) -> Phase;
    /// Keeps other changes of the phase away, if none is under way.
    fn try_exclude(&self) -> Option<OwnedMutexGuard<()>>;
    /// Another proxy has completed the migration.
    fn completed(&self) -> impl Future<Output = ()> + Send;
    /// Clients belong there from now on; appliers of the new direction are started.
    fn adopt(&self, control: Control) -> impl Future<Output = ()> + Send;
}

/// What was last seen, for the status.
#[derive(Debug, Clone, Default)]
pub struct Sight {
    pub proxies: Vec<ProxyRow>,
    pub flip: Option<FlipRow>,
}

/// This proxy's part in flips.
pub struct Participant {
    pub me: Member,
    sight: Mutex<Sight>,
    survey: Mutex<Survey>,
    surveys: tokio::sync::Mutex<Surveys>,
}

impl Participant {
    pub fn new(me: Member) -> Arc<Self> {
        Arc::new(Self {
            me,
            sight: Mutex::default(),
            survey: Mutex::default(),
            surveys: tokio::sync::Mutex::default(),
        })
    }

    /// This proxy's own sessions, as last surveyed.
    pub fn surveyed(&self) -> Survey {
        self.survey.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks this proxy's sessions anew.
    pub async fn survey(&self, registry: &Registry) {
        let survey = self.surveys.lock().await.survey(registry).await;
        *self.survey.lock().unwrap_or_else(PoisonError::into_inner) = survey;
    }

    async fn survey_over_and_over(&self, host: &impl Host) {
        loop {
            // Nobody flips where nothing is mirrored.
            if host.control().phase.mirrors() {
                self.survey(host.registry()).await;
            }
            tokio::time::sleep(SURVEY).await;
        }
    }

    pub fn sight(&self) -> Sight {
        self.sight.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn saw(&self, sight: Sight) {
        *self.sight.lock().unwrap_or_else(PoisonError::into_inner) = sight;
    }

    /// Registers and beats, on both sides, as long as it is polled.
    pub async fn beat(self: Arc<Self>, host: Arc<impl Host>) {
        tokio::join!(
            self.beat_on(Side::Legacy, &*host),
            self.beat_on(Side::New, &*host),
            self.survey_over_and_over(&*host)
        );
    }

    async fn beat_on(&self, side: Side, host: &impl Host) {
        let mut connection: Option<(String, Connection)> = None;
        loop {
            let control = host.control();
            let tandems = host.tandems();
            if let (true, Some(seat)) = (control.phase.mirrors(), seat(&tandems)) {
                let beaten = timeout(LOOK_MAX, async {
                    let (_, client) = match connection.take().filter(|(name, _)| name == seat.name()) {
                        Some(open) => connection.insert(open),
                        None => {
                            let opened = connect(seat.targets().target(side), "registration").await;
                            connection.insert((seat.name().to_owned(), opened.map_err(|error| error.to_string())?))
                        }
                    };
                    records::beat(client, &self.me, control, &self.surveyed())
                        .await
                        .map_err(|error| error_chain(&error))
                });
                if let Err(cause) = beaten.await.unwrap_or_else(|_| Err("no answer".into())) {
                    tracing::debug!(%side, cause, "not registered for a moment");
                    connection = None;
                }
            } else {
                connection = None;
            }
            tokio::time::sleep(BEAT).await;
        }
    }

    /// A proxy that stops says so, and is not waited for.
    pub async fn leave(&self, tandems: &[Arc<Tandem>]) {
        let Some(seat) = seat(tandems) else { return };
        for side in [Side::Legacy, Side::New] {
            let left = timeout(Duration::from_secs(1), async {
                if let Ok(client) = connect(seat.targets().target(side), "registration").await {
                    records::leave(&client, &self.me).await.ok();
                }
            });
            left.await.ok();
        }
    }

    /// Takes part in every flip, as long as it is polled.
    pub async fn take_part(self: Arc<Self>, host: Arc<impl Host>) {
        let mut part = Part {
            participant: &self,
            host: &*host,
            heard: Arc::new(Notify::new()),
            links: Default::default(),
            standing: Standing::Serving,
            hold: None,
            exclusive: None,
            restored: None,
            settling: None,
        };
        loop {
            let tick = if part.hold.is_some() { TICK_HELD } else { TICK };
            timeout(tick, part.heard.notified()).await.ok();
            part.turn().await;
        }
    }
}

pub(super) struct Part<'a, H> {
    pub(super) participant: &'a Participant,
    pub(super) host: &'a H,
    heard: Arc<Notify>,
    /// To the deciding database, on either side; with its name, which may change.
    links: [Option<(String, Connection)>; 2],
    pub(super) standing: Standing<FlipId>,
    pub(super) hold: Option<(Hold, Instant)>,
    pub(super) exclusive: Option<OwnedMutexGuard<()>>,
    /// The last flip that was given up, since when other databases are looked at for what it left.
    restored: Option<(FlipId, Instant, AbortOnDropHandle<()>)>,
    /// What follows a flip without hurry.
    pub(super) settling: Option<AbortOnDropHandle<()>>,
}

/// What was found, and what it was found by.
struct Found {
    /// Where clients are, schema pgtandem is not.
    uninstalled: bool,
    seen: Seen<u8>,
    flip: Option<FlipRow>,
}

/// A side that could not be asked says nothing; one that was may have nothing to say.
type Asked = Option<Look>;

impl<H: Host> Part<'_, H> {
    async fn turn(&mut self) {
        let control = self.host.control();
        if !control.phase.mirrors() {
            self.links = Default::default();
            return;
        }
        self.leave_other_seats();
        let Some(found) = self.look(control).await else { return };
        if found.uninstalled && self.hold.is_none() && self.is_completed(control).await {
            self.host.completed().await;
            return;
        }
        if let Some(flip) = &found.flip
            && flip.step == Step::Aborted
            && flip.to.epoch == control.epoch.next()
        {
            self.restore_others(flip);
        }
        let standing = self.numbered(found.flip.as_ref());
        let act = machine::participate(control.epoch, standing, &found.seen);
        match (act, found.flip) {
            (Act::Wait, _) | (Act::Prepare | Act::Hold | Act::TakeOver, None) => {}
            (Act::Prepare, Some(flip)) => self.prepare(&flip).await,
            (Act::Hold, Some(flip)) => self.hold(&flip).await,
            (Act::Release, _) => self.release().await,
            (Act::Adopt(side, epoch), flip) => {
                let led = flip.filter(|flip| flip.to.epoch == epoch && flip.to.primary == side);
                let phase = led.as_ref().map_or_else(|| self.phase_for(side), |flip| flip.to.phase);
                self.adopt(Control {
                    phase,
                    primary: side,
                    epoch,
                })
                .await;
            }
            (Act::TakeOver, Some(flip)) => self.take_over(&flip).await,
        }
    }

    /// Another database may decide by now, as the former one has been dropped: where it has not gone
    /// yet, a connection to it would stand in the way, though nobody asks there.
    fn leave_other_seats(&mut self) {
        let tandems = self.host.tandems();
        let seat = seat(&tandems).map(|tandem| tandem.name());
        for link in &mut self.links {
            if link.as_ref().is_some_and(|(name, _)| Some(name.as_str()) != seat) {
                *link = None;
            }
        }
    }

    /// Whoever gave the flip up may have died before it had turned the other databases back; so may its
    /// leader have turned one after that, having stood still.
    fn restore_others(&mut self, flip: &FlipRow) {
        let lately = |(id, at, _): &(FlipId, Instant, _)| *id == flip.id && at.elapsed() < RESTORE_AGAIN;
        let tandems = self.host.tandems();
        if tandems.len() < 2 || self.restored.as_ref().is_some_and(lately) {
            return;
        }
        let (id, flip) = (flip.id.clone(), flip.clone());
        let task = tokio::spawn(async move {
            if let Err(cause) = restore_others(&tandems, &flip).await {
                tracing::warn!(
                    flip = flip.id,
                    cause,
                    "a database may not be back from a switchover that was given up"
                );
            }
        });
        self.restored = Some((id, Instant::now(), AbortOnDropHandle::new(task)));
    }

    /// Legacy carries the marker of a migration that is over.
    async fn is_completed(&mut self, control: Control) -> bool {
        if control.primary != Side::New {
            return false;
        }
        match self.link(Side::Legacy).await {
            Ok(legacy) => journal::is_completed(legacy).await.unwrap_or(false),
            Err(_) => false,
        }
    }

    /// The machine compares flips, which here have names.
    fn numbered(&self, flip: Option<&FlipRow>) -> Standing<u8> {
        let number = |id: &FlipId| u8::from(flip.is_none_or(|flip| flip.id != *id));
        match &self.standing {
            Standing::Serving => Standing::Serving,
            Standing::Prepared(id) => Standing::Prepared(number(id)),
            Standing::Held(id) => Standing::Held(number(id)),
        }
    }

    fn phase_for(&self, side: Side) -> Phase {
        let wish = self.host.wish();
        match side {
            _ if wish.primary() == side && wish.mirrors() => wish,
            Side::New => Phase::Switchover,
            Side::Legacy => Phase::DualWrite,
        }
    }

    /// Asks the side that this proxy takes for the primary, and the other one where that does not
    /// settle it. `None`: nothing could be found out.
    async fn look(&mut self, control: Control) -> Option<Found> {
        let here = self.ask(control.primary, true).await;
        let settled = here.as_ref().is_some_and(|look| {
            look.role == Some(Recorded::Primary(control.epoch))
                && look
                    .flip
                    .as_ref()
                    .is_none_or(|flip| flip.step.is_open() || flip.step == Step::Aborted)
        });
        let there = if settled {
            None
        } else {
            self.ask(control.primary.other(), false).await
        };
        let primary_by = |look: &Asked, side: Side| match look.as_ref().and_then(|look| look.role) {
            Some(Recorded::Primary(epoch)) => Some((side, epoch)),
            _ => None,
        };
        let newest = primary_by(&here, control.primary)
            .into_iter()
            .chain(primary_by(&there, control.primary.other()))
            .max_by_key(|(_, epoch)| *epoch);
        let uninstalled = here.as_ref().is_some_and(|look| look.role.is_none());
        let flip = match (here, there) {
            (Some(here), there) => match here.flip {
                // What it says of itself may be old where others have gone on twice.
                Some(flip) => Some(flip),
                None => there.and_then(|there| there.flip),
            },
            // Its copy tells less, and only what has happened.
            (None, Some(there)) if newest.is_some() => there.flip,
            (None, _) => return None,
        };
        Some(Found {
            uninstalled,
            seen: Seen {
                flip: flip.as_ref().map(|flip| FlipSeen {
                    id: 0,
                    step: flip.step,
                    epoch: flip.to.epoch,
                    orphaned: flip.orphaned,
                }),
                primary: newest,
            },
            flip,
        })
    }

    pub(super) async fn ask(&mut self, side: Side, tell: bool) -> Asked {
        let holds = self.hold.is_some();
        let asked = timeout(LOOK_MAX, async {
            let client = self.link(side).await?;
            let told = async || match tell {
                true => records::proxies(client).await.map(Some),
                false => Ok(None),
            };
            let found = if holds {
                // Both at once: clients wait.
                tokio::try_join!(records::look_at(client), told())
            } else {
                match records::look(client).await {
                    Ok(look) if look.role.is_none() => Ok((look, None)),
                    Ok(look) => told().await.map(|proxies| (look, proxies)),
                    Err(error) => Err(error),
                }
            };
            found.map_err(|error| error_chain(&error))
        })
        .await
        .unwrap_or_else(|_| Err("no answer".into()));
        match asked {
            Ok((look, proxies)) => {
                if let Some(proxies) = proxies {
                    let flip = look.flip.clone();
                    self.participant.saw(Sight { proxies, flip });
                }
                Some(look)
            }
            Err(cause) => {
                tracing::debug!(%side, cause, "cannot be asked");
                self.links[side as usize] = None;
                None
            }
        }
    }

    pub(super) async fn link(&mut self, side: Side) -> Result<&Connection, String> {
        let tandems = self.host.tandems();
        let seat = seat(&tandems).ok_or("there is no database")?;
        let slot = &mut self.links[side as usize];
        if slot
            .as_ref()
            .is_none_or(|(name, client)| name != seat.name() || client.is_closed())
        {
            let client = connect_hearing(seat.targets().target(side), "switchover", self.heard.clone())
                .await
                .map_err(|error| error.to_string())?;
            client
                .batch_execute(&format!("SET synchronous_commit = off; LISTEN {}", records::CHANNEL))
                .await
                .map_err(|error| error_chain(&error))?;
            *slot = Some((seat.name().to_owned(), client));
        }
        slot.as_ref()
            .map(|(_, client)| client)
            .ok_or_else(|| "no connection".into())
    }

    /// Says something on the side that decides; its coordinator reads it there.
    pub(super) async fn answer(&mut self, flip: &FlipRow, word: &str, detail: Value) {
        let me = self.participant.me.clone();
        for side in [flip.from, flip.to.primary] {
            // A copy for the history is not worth the time of clients that wait.
            let patience = if side == flip.from { LOOK_MAX } else { COPY_MAX };
            if let Err(cause) = self.say(side, patience, &me, &flip.id, word, &detail).await {
                tracing::warn!(%side, word, cause, "not answered");
            }
        }
    }

    /// Over a connection that may be dead without anybody having been told: it is given up then.
    pub(super) async fn say(
        &mut self,
        side: Side,
        patience: Duration,
        me: &Member,
        flip: &FlipId,
        word: &str,
        detail: &Value,
    ) -> Result<(), String> {
        let said = timeout(patience, async {
            let client = self.link(side).await?;
            let answered = records::answer(client, me, flip, word, detail).await;
            answered.map_err(|error| error_chain(&error))
        });
        let said = said.await.unwrap_or_else(|_| Err("no answer".into()));
        if said.is_err() {
            self.links[side as usize] = None;
        }
        said
    }

    async fn take_over(&self, flip: &FlipRow) {
        let why = format!("its coordinator, {}, was lost", flip.coordinator);
        match take_over(&self.host.tandems(), flip, &self.participant.me.name, &why).await {
            Ok(step) => tracing::warn!(flip = flip.id, %step, why, "took over a switchover"),
            Err(cause) => tracing::debug!(flip = flip.id, cause, "a switchover cannot be taken over yet"),
        }
        self.heard.notify_one();
    }
}
