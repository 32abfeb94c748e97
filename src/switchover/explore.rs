//! Every interleaving of two proxies, two databases, writers and crashes, up to a bound, under the
//! transitions of [`super::machine`]: at most one side accepts writes, no acknowledged commit is
//! lost, and whatever happened, both proxies end on the side that is primary. A transition that
//! is broken on purpose must be found out, or this proves nothing.
//!
//! Modelled: each side's role (a sequence, so outside transactions), its fence and who holds it,
//! the coordinator's lock, the recorded flip; rows as how many acknowledged commits a side holds.
//! One move is one transaction, or one other effect, on one server. A connection may end at any
//! time without its proxy's noticing (a cut network, a restarted server); a proxy may be killed and
//! started again. Being late is being scheduled late.

use std::collections::{HashMap, VecDeque};

use super::machine::{Act, FlipSeen, Kind, Outcome, Seen, Standing, Step, next, participate, resolve, turn};
use super::recover::Recorded;
use crate::control::{Epoch, Side};

const SIDES: [Side; 2] = [Side::Legacy, Side::New];
const FLIPS_MAX: u8 = 2;
const WRITES_MAX: u8 = 1;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Flip {
    id: u8,
    step: Step,
    epoch: Epoch,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Database {
    role: Recorded,
    /// The last one begun from this side.
    flip: Option<Flip>,
    fence: Option<u8>,
    lock: Option<u8>,
    /// A transaction that has written and not ended.
    open: bool,
    /// Of the acknowledged commits, how many are here.
    rows: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Lead {
    flip: Flip,
    from: Side,
    /// The old side's sequence has been turned, its transaction not been committed.
    turning: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Proxy {
    alive: bool,
    primary: Side,
    epoch: Epoch,
    standing: Standing<u8>,
    leads: Option<Lead>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct World {
    databases: [Database; 2],
    proxies: [Proxy; 2],
    acknowledged: u8,
    flips: u8,
    faults: u8,
}

/// The transitions, so that one of them can be broken.
#[derive(Clone, Copy)]
struct Rules {
    next: fn(Kind, Step, Outcome) -> Step,
    resolve: fn(Step, Recorded, Epoch) -> (Step, Recorded),
    turn: fn(Recorded, Epoch) -> Recorded,
    participate: fn(Epoch, Standing<u8>, &Seen<u8>) -> Act,
    /// Whether the fence waits for open transactions.
    fence_waits: bool,
    /// Whether a round is what it says, or a stalled one is taken for caught up.
    rounds_apply: bool,
    /// Whether the decision is the fence's own transaction.
    decides_under_fence: bool,
}

const RULES: Rules = Rules {
    next,
    resolve,
    turn,
    participate,
    fence_waits: true,
    rounds_apply: true,
    decides_under_fence: true,
};

impl World {
    fn beginning() -> Self {
        let database = |role| Database {
            role,
            flip: None,
            fence: None,
            lock: None,
            open: false,
            rows: 0,
        };
        let proxy = Proxy {
            alive: true,
            primary: Side::Legacy,
            epoch: Epoch(1),
            standing: Standing::Serving,
            leads: None,
        };
        Self {
            databases: [
                database(Recorded::Primary(Epoch(1))),
                database(Recorded::Secondary(Epoch(1))),
            ],
            proxies: [proxy; 2],
            acknowledged: 0,
            flips: 0,
            faults: 0,
        }
    }

    fn at(&mut self, side: Side) -> &mut Database {
        &mut self.databases[side as usize]
    }

    fn database(&self, side: Side) -> &Database {
        &self.databases[side as usize]
    }

    fn accepts(&self, side: Side) -> bool {
        let database = self.database(side);
        matches!(database.role, Recorded::Primary(_)) && database.fence.is_none()
    }

    fn primary(&self) -> Option<(Side, Epoch)> {
        SIDES.into_iter().find_map(|side| match self.database(side).role {
            Recorded::Primary(epoch) => Some((side, epoch)),
            Recorded::Secondary(_) => None,
        })
    }

    /// What must never be.
    fn violation(&self) -> Option<&'static str> {
        let roles = SIDES.map(|side| matches!(self.database(side).role, Recorded::Primary(_)));
        if roles == [true, true] {
            return Some("two sides are primary");
        }
        // A fenced primary may still lack nothing: its own commits are all there are.
        let lacks = |side| roles[side as usize] && self.database(side).rows < self.acknowledged;
        if SIDES.into_iter().any(lacks) {
            return Some("an acknowledged commit is lost");
        }
        None
    }

    /// Where nothing is left to do: both serve, on the side that is primary.
    fn is_settled(&self) -> bool {
        let Some((side, epoch)) = self.primary() else {
            return false;
        };
        self.proxies.iter().all(|proxy| {
            proxy.alive && proxy.standing == Standing::Serving && (proxy.primary, proxy.epoch) == (side, epoch)
        })
    }

    fn seen(&self, proxy: &Proxy) -> Seen<u8> {
        let database = self.database(proxy.primary);
        Seen {
            flip: database.flip.map(|flip| FlipSeen {
                id: flip.id,
                step: flip.step,
                epoch: flip.epoch,
                orphaned: database.lock.is_none(),
            }),
            primary: self.primary(),
        }
    }

    /// A step is recorded only over the one it starts from: false where somebody else went on.
    fn record(&mut self, lead: &Lead, step: Step) -> bool {
        match &mut self.at(lead.from).flip {
            Some(flip) if *flip == lead.flip => {
                flip.step = step;
                true
            }
            _ => false,
        }
    }

    /// Everything that may happen next.
    fn moves(&self, rules: &Rules) -> Vec<(String, Self)> {
        let mut moves = Vec::new();
        self.writers(&mut moves);
        for index in 0..2 {
            if self.proxies[index].alive {
                self.begin_flip(index, &mut moves);
                self.lead(index, rules, &mut moves);
                self.take_part(index, rules, &mut moves);
            }
        }
        moves
    }

    fn writers(&self, moves: &mut Vec<(String, Self)>) {
        for side in SIDES {
            if self.acknowledged < WRITES_MAX && self.accepts(side) && !self.database(side).open {
                let mut begun = *self;
                begun.at(side).open = true;
                moves.push((format!("a transaction writes on {side}"), begun));
            }
            if self.database(side).open {
                let mut over = *self;
                over.at(side).open = false;
                moves.push((format!("it rolls back on {side}"), over));
                let mut committed = over;
                committed.at(side).rows += 1;
                committed.acknowledged += 1;
                moves.push((format!("it commits on {side}"), committed));
            }
        }
    }

    fn begin_flip(&self, index: usize, moves: &mut Vec<(String, Self)>) {
        let proxy = &self.proxies[index];
        let database = self.database(proxy.primary);
        if self.flips == FLIPS_MAX
            || proxy.leads.is_some()
            || proxy.standing != Standing::Serving
            || database.lock.is_some()
            || database.role != Recorded::Primary(proxy.epoch)
            || database.flip.is_some_and(|flip| flip.step.is_open())
        {
            return;
        }
        let mut begun = *self;
        begun.flips += 1;
        let flip = Flip {
            id: begun.flips,
            step: Step::Preparing,
            epoch: proxy.epoch.next(),
        };
        let from = proxy.primary;
        begun.at(from).flip = Some(flip);
        begun.at(from).lock = Some(index as u8);
        begun.proxies[index].leads = Some(Lead {
            flip,
            from,
            turning: false,
        });
        moves.push((format!("proxy {index} begins flip {}", flip.id), begun));
    }

    /// The coordinator's next transaction.
    fn lead(&self, index: usize, rules: &Rules, moves: &mut Vec<(String, Self)>) {
        let Some(lead) = self.proxies[index].leads else {
            return;
        };
        let me = Some(index as u8);
        let mut push = |what: &str, world: Self| moves.push((format!("proxy {index}: {what}"), world));
        let step = lead.flip.step;
        if step.is_open() {
            // It may fail at any step.
            let mut given_up = *self;
            given_up.resolve(index, lead, rules, &mut push, "gives up");
        }
        match step {
            Step::Preparing | Step::Probing | Step::Holding => self.advance(index, lead, rules, &mut push),
            Step::Fencing => {
                let database = self.database(lead.from);
                if database.fence.is_none() && (!database.open || !rules.fence_waits) {
                    let mut fenced = *self;
                    fenced.at(lead.from).fence = me;
                    fenced.advance(index, lead, rules, &mut push);
                }
            }
            Step::Draining if !lead.turning => {
                let mut drained = *self;
                if rules.rounds_apply {
                    drained.at(lead.from.other()).rows = self.database(lead.from).rows;
                }
                if drained.database(lead.from).fence == me || !rules.decides_under_fence {
                    // Not a transaction's doing, this.
                    drained.at(lead.from).role = Recorded::Secondary(lead.flip.epoch);
                    drained.proxies[index].leads = Some(Lead { turning: true, ..lead });
                    push("turns the old side's sequence", drained);
                }
            }
            Step::Draining => {
                let held = self.database(lead.from).fence == me || !rules.decides_under_fence;
                let mut decided = *self;
                if held && decided.record(&lead, (rules.next)(Kind::Flip, step, Outcome::Succeeded)) {
                    decided.at(lead.from).fence = None;
                    decided.go_on_at(index, lead, Step::Decided);
                    push("decides", decided);
                }
            }
            Step::Decided => {
                let to = lead.from.other();
                let mut turned = *self;
                turned.at(to).role = (rules.turn)(self.database(to).role, lead.flip.epoch);
                turned.record(&lead, Step::Turned);
                turned.go_on_at(index, lead, Step::Turned);
                push("turns the new side", turned);
            }
            Step::Turned | Step::Done | Step::Aborted => {
                let mut over = *self;
                over.record(&lead, Step::Done);
                over.stop_leading(index, lead.from);
                push("is done", over);
            }
        }
    }

    fn advance(&self, index: usize, lead: Lead, rules: &Rules, push: &mut impl FnMut(&str, Self)) {
        let mut world = *self;
        let step = (rules.next)(Kind::Flip, lead.flip.step, Outcome::Succeeded);
        if world.record(&lead, step) {
            world.go_on_at(index, lead, step);
            push(&format!("records {step}"), world);
        }
    }

    fn go_on_at(&mut self, index: usize, lead: Lead, step: Step) {
        self.proxies[index].leads = Some(Lead {
            flip: Flip { step, ..lead.flip },
            turning: false,
            ..lead
        });
    }

    fn stop_leading(&mut self, index: usize, from: Side) {
        self.proxies[index].leads = None;
        if self.database(from).lock == Some(index as u8) {
            self.at(from).lock = None;
        }
        if self.database(from).fence == Some(index as u8) {
            self.at(from).fence = None;
        }
    }

    /// One transaction on the old side that excludes the fence of others.
    fn resolve(&mut self, index: usize, lead: Lead, rules: &Rules, push: &mut impl FnMut(&str, Self), what: &str) {
        if self.database(lead.from).fence == Some(index as u8) {
            self.at(lead.from).fence = None;
        }
        let database = *self.database(lead.from);
        let Some(flip) = database.flip.filter(|flip| flip.id == lead.flip.id) else {
            // Others have gone on without it.
            self.stop_leading(index, lead.from);
            push("finds itself overtaken", *self);
            return;
        };
        if database.fence.is_some() {
            return;
        }
        let (step, role) = (rules.resolve)(flip.step, database.role, flip.epoch);
        self.at(lead.from).role = role;
        self.at(lead.from).flip = Some(Flip { step, ..flip });
        if matches!(step, Step::Decided | Step::Turned) {
            let lead = Lead {
                flip: Flip { step, ..flip },
                ..lead
            };
            self.at(lead.from).lock = Some(index as u8);
            self.go_on_at(index, lead, step);
        } else {
            self.stop_leading(index, lead.from);
        }
        push(what, *self);
    }

    fn take_part(&self, index: usize, rules: &Rules, moves: &mut Vec<(String, Self)>) {
        let proxy = self.proxies[index];
        let act = (rules.participate)(proxy.epoch, proxy.standing, &self.seen(&proxy));
        let mut world = *self;
        let me = &mut world.proxies[index];
        let flip = self.database(proxy.primary).flip;
        match (act, flip) {
            (Act::Wait, _) => return,
            (Act::Prepare, Some(flip)) => me.standing = Standing::Prepared(flip.id),
            (Act::Hold, Some(flip)) => me.standing = Standing::Held(flip.id),
            (Act::Prepare | Act::Hold, None) => unreachable!("there is no flip to take part in"),
            (Act::Release, _) => me.standing = Standing::Serving,
            (Act::Adopt(side, epoch), _) => {
                me.standing = Standing::Serving;
                (me.primary, me.epoch) = (side, epoch);
            }
            (Act::TakeOver, flip) => {
                let lead = Lead {
                    flip: flip.unwrap(),
                    from: proxy.primary,
                    turning: false,
                };
                if proxy.leads.is_none() {
                    let mut push = |what: &str, world: Self| moves.push((format!("proxy {index}: {what}"), world));
                    world.resolve(index, lead, rules, &mut push, "takes over");
                }
                return;
            }
        }
        moves.push((format!("proxy {index}: {act:?}"), world));
    }

    /// What may befall them.
    fn faults(&self, at_most: u8, moves: &mut Vec<(String, Self)>) {
        for index in 0..2 {
            let proxy = self.proxies[index];
            if !proxy.alive {
                let Some((primary, epoch)) = self.primary().or_else(|| self.left_half_way()) else {
                    continue;
                };
                let mut started = *self;
                started.proxies[index] = Proxy {
                    alive: true,
                    primary,
                    epoch,
                    standing: Standing::Serving,
                    leads: None,
                };
                moves.push((format!("proxy {index} is started"), started));
            } else if self.faults < at_most {
                let mut killed = *self;
                killed.faults += 1;
                for side in SIDES {
                    killed.stop_leading(index, side);
                }
                killed.proxies[index].alive = false;
                moves.push((format!("proxy {index} is killed"), killed));
            }
        }
        if self.faults == at_most {
            return;
        }
        for side in SIDES {
            let database = self.database(side);
            if database.fence.is_none() && database.lock.is_none() {
                continue;
            }
            let mut cut = *self;
            cut.faults += 1;
            cut.at(side).fence = None;
            cut.at(side).lock = None;
            moves.push((format!("{side} loses its connections"), cut));
            // Its server is restarted: a sequence that no commit has flushed may be as before.
            if let (Some(flip), Recorded::Secondary(epoch)) = (database.flip, database.role)
                && flip.step.is_open()
                && epoch == flip.epoch
            {
                cut.at(side).role = Recorded::Primary(epoch.previous());
                cut.at(side).open = false;
                moves.push((format!("{side} is restarted"), cut));
            }
        }
    }

    /// Both say secondary: the one that was turned last was the primary, and its record tells.
    fn left_half_way(&self) -> Option<(Side, Epoch)> {
        SIDES.into_iter().find_map(|side| {
            let Recorded::Secondary(epoch) = self.database(side).role else {
                return None;
            };
            let newer = matches!(self.database(side.other()).role, Recorded::Secondary(other) if other < epoch);
            newer.then(|| (side, epoch.previous()))
        })
    }
}

/// Visits everything that can happen; the first thing that must not, with what led there.
fn explore(rules: &Rules, faults: u8) -> Result<usize, String> {
    let beginning = World::beginning();
    let mut came_from: HashMap<World, Option<(World, String)>> = HashMap::from([(beginning, None)]);
    let mut to_visit = VecDeque::from([beginning]);
    while let Some(world) = to_visit.pop_front() {
        let story = |what: &str, came_from: &HashMap<World, Option<(World, String)>>| {
            let mut steps = vec![format!("{what}: {world:#?}")];
            let mut at = world;
            while let Some(Some((before, step))) = came_from.get(&at) {
                steps.push(step.clone());
                at = *before;
            }
            steps.reverse();
            steps.join("\n")
        };
        if let Some(what) = world.violation() {
            return Err(story(what, &came_from));
        }
        let mut moves = world.moves(rules);
        let writers_only = moves.iter().all(|(_, after)| {
            after.proxies == world.proxies && {
                let flips = |world: &World| {
                    world
                        .databases
                        .map(|database| (database.flip, database.role, database.lock))
                };
                flips(after) == flips(&world)
            }
        });
        let before = moves.len();
        world.faults(faults, &mut moves);
        let nobody_down = world.proxies.iter().all(|proxy| proxy.alive);
        // Nobody can do anything any more, and nobody will be started: it must be over.
        if writers_only && nobody_down && !world.is_settled() {
            return Err(story(&format!("stuck ({before} moves)"), &came_from));
        }
        for (step, after) in moves {
            came_from.entry(after).or_insert_with(|| {
                to_visit.push_back(after);
                Some((world, step))
            });
        }
    }
    Ok(came_from.len())
}

#[test]
fn whatever_happens_one_side_is_primary_and_nothing_is_lost() {
    let visited = explore(&RULES, 2).unwrap_or_else(|story| panic!("{story}"));
    // Far fewer would mean that it does not get to the interesting ones.
    assert!(visited > 100_000, "{visited}");
}

#[test]
fn a_broken_transition_is_found() {
    let (two, lost, stuck) = ("two sides are primary", "an acknowledged commit is lost", "stuck");
    let broken: [(&str, &str, Rules); 7] = [
        (
            "late to turn, it turns a side that has gone on",
            two,
            Rules {
                turn: |_, epoch| Recorded::Primary(epoch),
                ..RULES
            },
        ),
        (
            "a decision is taken back",
            two,
            Rules {
                resolve: |step, role, epoch| match step {
                    Step::Decided => (Step::Aborted, Recorded::Primary(epoch.previous())),
                    step => resolve(step, role, epoch),
                },
                ..RULES
            },
        ),
        (
            "a half turned side is left so",
            stuck,
            Rules {
                resolve: |step, role, _| (if step.is_open() { Step::Aborted } else { step }, role),
                ..RULES
            },
        ),
        (
            "the fence does not wait for open transactions",
            lost,
            Rules {
                fence_waits: false,
                ..RULES
            },
        ),
        (
            "a stalled stream is taken for caught up",
            lost,
            Rules {
                rounds_apply: false,
                ..RULES
            },
        ),
        (
            "it is decided without the fence",
            two,
            Rules {
                decides_under_fence: false,
                ..RULES
            },
        ),
        (
            "a proxy does not come back from a flip that was given up",
            stuck,
            Rules {
                participate: |own, standing, seen| match participate(own, standing, seen) {
                    Act::Release => Act::Wait,
                    act => act,
                },
                ..RULES
            },
        ),
    ];
    for (what, becomes, rules) in broken {
        let story = explore(&rules, 2).map(|_| ()).unwrap_err();
        assert!(story.contains(becomes), "{what}: {story}");
    }
}
