//! Connections to the two servers: TLS, the proxy's own control connections, and the clients'
//! sessions as raw frames ([`login`]).

pub mod cancel;
pub mod control;
mod login;
pub mod stream;
pub mod tls;

pub use login::{Backend, Login, LoginError, Proof, frames, login, newest_version, within};
pub use stream::Stream;
