//! What every proxy tells of its sessions, in its row of `pgtandem.proxy`: how many connections they
//! would need on the other side, which of them could not be carried over, and which server processes
//! are theirs; any other is a client past the proxies.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::admin::api::SessionInTheWay;
use crate::control::Side;
use crate::session::{Registry, SessionInfo, State};

/// A session that does not answer in this time tells what it last knew.
const ANSWER_MAX: Duration = Duration::from_secs(1);
/// Sessions that are named; the rest are counted.
const NAMED_MAX: usize = 50;

/// One proxy's sessions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Survey {
    /// By the databases' names for clients.
    pub databases: BTreeMap<String, OfDatabase>,
    pub in_the_way: Vec<SessionInTheWay>,
    /// With those that are not named.
    pub in_the_way_count: usize,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OfDatabase {
    /// Sessions by user.
    pub users: BTreeMap<String, usize>,
    /// Server processes of the sessions, also of those that have ended a moment ago.
    pub legacy: BTreeSet<i32>,
    pub new: BTreeSet<i32>,
}

impl OfDatabase {
    pub const fn pids(&self, side: Side) -> &BTreeSet<i32> {
        match side {
            Side::Legacy => &self.legacy,
            Side::New => &self.new,
        }
    }
}

impl Survey {
    pub fn sessions(&self) -> usize {
        let databases = self.databases.values();
        databases.flat_map(|database| database.users.values()).sum()
    }
}

/// Surveys, of which each knows the one before.
#[derive(Default)]
pub(super) struct Surveys {
    last: Vec<SessionInfo>,
}

impl Surveys {
    /// Asks the sessions and tells of them.
    pub(super) async fn survey(&mut self, registry: &Registry) -> Survey {
        registry.look(ANSWER_MAX).await;
        let now = registry.sessions();
        let survey = told(&now, &self.last);
        self.last = now;
        survey
    }
}

fn told(now: &[SessionInfo], before: &[SessionInfo]) -> Survey {
    let mut survey = Survey::default();
    for session in now.iter().chain(before) {
        let database = survey.databases.entry(session.database.clone()).or_default();
        match session.side {
            Some(Side::Legacy) => database.legacy.insert(session.pid),
            Some(Side::New) => database.new.insert(session.pid),
            None => false,
        };
    }
    for session in now.iter().filter(|session| session.state != State::Ended) {
        let database = survey.databases.entry(session.database.clone()).or_default();
        *database.users.entry(session.user.clone()).or_default() += 1;
        if let Some(reason) = &session.uncarriable {
            survey.in_the_way_count += 1;
            if survey.in_the_way.len() < NAMED_MAX {
                survey.in_the_way.push(SessionInTheWay {
                    user: session.user.clone(),
                    application: session.application.clone(),
                    address: session.peer.to_string(),
                    database: session.database.clone(),
                    reason: reason.clone(),
                });
            }
        }
    }
    survey
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::SessionId;

    fn session(user: &str, pid: i32, uncarriable: Option<&str>) -> SessionInfo {
        SessionInfo {
            id: SessionId(1),
            user: user.into(),
            database: "shop".into(),
            application: "reports".into(),
            peer: "10.0.0.7:5000".parse().unwrap(),
            state: State::Idle,
            pid,
            side: Some(Side::Legacy),
            age_seconds: 3,
            uncarriable: uncarriable.map(str::to_owned),
        }
    }

    #[test]
    fn a_process_is_known_for_one_survey_longer_and_a_session_is_not() {
        let survey = told(
            &[
                session("app", 7, None),
                session("app", 8, Some("it has temporary tables")),
            ],
            &[session("batch", 6, Some("it has temporary tables"))],
        );
        let shop = &survey.databases["shop"];
        assert_eq!(shop.legacy, [6, 7, 8].into());
        assert_eq!(shop.users, [("app".to_owned(), 2)].into());
        assert_eq!((survey.sessions(), survey.in_the_way_count), (2, 1));
        let named = &survey.in_the_way[0];
        assert_eq!((named.user.as_str(), named.address.as_str()), ("app", "10.0.0.7:5000"));
    }

    #[test]
    fn those_beyond_the_bound_are_counted() {
        let many: Vec<SessionInfo> = (0..70).map(|pid| session("app", pid, Some("so"))).collect();
        let survey = told(&many, &[]);
        assert_eq!((survey.in_the_way.len(), survey.in_the_way_count), (NAMED_MAX, 70));
    }

    #[test]
    fn what_another_version_wrote_is_read() {
        let read: Survey = serde_json::from_str(r#"{"later": 1}"#).unwrap();
        assert_eq!(read, Survey::default());
    }
}
