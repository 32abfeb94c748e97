//! From a client that has proved who it is to a session: a place, a database, a login at the
//! primary.

use std::net::SocketAddr;
use std::sync::Arc;

use super::auth::Authenticated;
use super::context::Context;
use super::known::Statements;
use super::observe::Shadowing;
use super::registry::{BackendKey, Registered, State};
use super::relay::{Direction, Session};
use super::reported::Reported;
use super::say_goodbye;
use crate::control::Control;
use crate::routing::Pair;
use crate::upstream::{Backend, Login, LoginError, Stream, within};
use crate::wire::error::{SqlError, sqlstate};
use crate::wire::tracker::Tracker;

/// Opens the session at the primary and passes on the server's greeting. `None`: the client has
/// been told why not.
pub(super) async fn open(
    context: Arc<Context>,
    authenticated: Authenticated,
    peer: SocketAddr,
) -> Option<Box<Session>> {
    let (mut client, login, database) = authenticated.into_parts();
    let opened = admit(&context, &login, &database, peer).await;
    let (mut registered, pair, backend) = match opened {
        Ok(opened) => opened,
        Err(frame) => {
            say_goodbye(Box::new(client), &frame).await;
            return None;
        }
    };
    if client.write_all(&backend.greeting).await.is_err() {
        return None;
    }
    registered.set_cancel_key(backend.pid, &backend.key);
    Some(Box::new(assemble(context, registered, pair, login, client, backend)))
}

/// Postgres' own templates are never mirrored.
fn is_template(database: &str) -> bool {
    matches!(database, "template0" | "template1")
}

/// Capture passes over what the proxy's own role writes, since that is how rounds are applied. So
/// while writes are mirrored no client may be that role: its writes would be lost in silence.
pub(super) fn refuse_own_role(pair: &Pair, control: Control, user: &str) -> Option<SqlError> {
    (control.phase.mirrors() && pair.primary(control).user == user).then(|| {
        SqlError::fatal(
            sqlstate::INVALID_AUTHORIZATION,
            format!("role \"{user}\" is pgtandem's own here: what it writes is not mirrored; connect as another role"),
        )
    })
}

type Admitted = (Registered, Arc<Pair>, Backend);

async fn admit(context: &Context, login: &Login, database: &str, peer: SocketAddr) -> Result<Admitted, Vec<u8>> {
    let settings = context.settings.load_full();
    let application = login.parameters.get(b"application_name").unwrap_or_default();
    let registered = context
        .registry
        .enter(&login.user, database, &String::from_utf8_lossy(application), peer);
    if context.registry.len() > settings.limits.max_connections {
        return Err(refuse(
            peer,
            &SqlError::fatal(sqlstate::TOO_MANY_CONNECTIONS, "sorry, too many clients already"),
        ));
    }
    let Some(pair) = settings.databases.find(database) else {
        let error = SqlError::fatal(
            sqlstate::INVALID_CATALOG_NAME,
            format!("database \"{database}\" does not exist"),
        );
        return Err(refuse(peer, &error));
    };
    wait_for_release(&registered).await;
    if context.registry.draining() {
        let error = SqlError::fatal(sqlstate::ADMIN_SHUTDOWN, "the proxy is shutting down");
        return Err(refuse(peer, &error));
    }
    // The primary cannot change from here on: this session counts as busy until it is open.
    let control = context.control_now();
    if let Some(error) = refuse_own_role(&pair, control, &login.user) {
        return Err(refuse(peer, &error));
    }
    let target = pair.primary(control);
    let backend = within(settings.limits.connect_timeout, target, login)
        .await
        .map_err(|error| {
            match &error {
                LoginError::Refused { .. } => tracing::info!(%peer, user = login.user, %error, "login refused"),
                LoginError::Unreachable { .. } | LoginError::Unproven { .. } => {
                    tracing::warn!(%peer, user = login.user, %error, "login failed");
                }
            }
            error.to_frame()
        })?;
    context.learn_version(target, backend.major());
    if control.phase.mirrors()
        && let Some(mirrored) = &context.hooks.mirrored
        && !is_template(database)
        && !mirrored.wait_for(database, settings.limits.connect_timeout).await
    {
        let error = SqlError::fatal(
            sqlstate::CANNOT_CONNECT_NOW,
            format!("writes of database \"{database}\" are not captured yet; try again, or see \"pgtandem status\""),
        );
        return Err(refuse(peer, &error));
    }
    registered.shared.set_backend(BackendKey {
        target: target.clone(),
        pid: backend.pid,
        key: backend.key.clone(),
    });
    Ok((registered, pair, backend))
}

fn refuse(peer: SocketAddr, error: &SqlError) -> Vec<u8> {
    tracing::info!(%peer, %error, "client refused");
    error.to_frame()
}

/// During a hold nobody connects: it is not decided yet where to.
async fn wait_for_release(registered: &Registered) {
    let (registry, shared) = (&registered.registry, &registered.shared);
    // First said, then looked: see the registry.
    shared.publish(State::Opening);
    while registry.held() {
        shared.publish(State::Waiting);
        registry.came_to_rest();
        registry.until_released().await;
        shared.publish(State::Opening);
    }
}

fn assemble(
    context: Arc<Context>,
    registered: Registered,
    pair: Arc<Pair>,
    login: Login,
    client: Stream,
    backend: Backend,
) -> Session {
    let mut updates = context.control.clone();
    let control = *updates.borrow_and_update();
    let reported = Reported::new(backend.parameters());
    registered.shared.publish(State::Idle);
    if registered.registry.held() {
        registered.registry.came_to_rest();
    }
    Session {
        side: registered
            .shared
            .backend()
            .map_or(control.primary, |backend| backend.target.side),
        registered,
        pair,
        login: Arc::new(login),
        updates,
        control,
        client,
        server: backend.stream,
        up: Direction::default(),
        down: Direction::beginning_with(backend.leftover),
        tracker: Tracker::default(),
        active: false,
        transactions: 0,
        statements: Statements::default(),
        lex: reported.lex(),
        reported,
        attention: None,
        acknowledging: None,
        shadowing: Shadowing::default(),
        rehearsing: None,
        begun_at_round: None,
        changes_schema: false,
        access: None,
        reading: false,
        client_done: false,
        terminated: false,
        server_fatal: false,
        server_deaf: false,
        shut: false,
        waker: None,
        standby: None,
        footprinted: false,
        opening: None,
        canary: None,
        preparing: None,
        context,
    }
}
