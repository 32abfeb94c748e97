//! The proxy in front of real servers (15 as legacy, 18 as new), spoken to in raw frames where the
//! exact frames matter, and by tokio-postgres elsewhere.

// A test that cannot go on says where it stands.
#![allow(clippy::unwrap_used)]

mod common;

#[path = "proxy/ddl.rs"]
mod ddl;
#[path = "proxy/flip.rs"]
mod flip;
#[path = "proxy/relay.rs"]
mod relay;
#[path = "proxy/shadow.rs"]
mod shadow;
#[path = "proxy/startup.rs"]
mod startup;
#[path = "proxy/tls.rs"]
mod tls;
