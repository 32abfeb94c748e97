//! Asks a server to cancel what one of its sessions is running.

use std::time::Duration;

use crate::config::Target;
use crate::upstream::login::{self, LoginError};
use crate::wire::startup;

/// A request that cannot be delivered in this time is of no use to anybody.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Sends the request and waits until the server has taken it (it closes the connection then).
pub async fn cancel(target: &Target, pid: i32, key: &[u8]) -> Result<(), LoginError> {
    let send = async {
        let mut stream = login::open(target).await?;
        let failed = |error: std::io::Error| LoginError::unreachable(target, error.to_string());
        stream
            .write_all(&startup::cancel_packet(pid, key))
            .await
            .map_err(failed)?;
        let mut nothing = Vec::new();
        stream.read_some(&mut nothing).await.map_err(failed)?;
        Ok(())
    };
    tokio::time::timeout(TIMEOUT, send)
        .await
        .unwrap_or_else(|_| Err(LoginError::unreachable(target, "no answer to a cancel request")))
}
