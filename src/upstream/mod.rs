//! Connections to the two servers: TLS, the proxy's own control connections, and (later) the
//! clients' sessions as raw frames.

pub mod control;
pub mod tls;
