//! STUB until the engine lands; never committed.
use crate::config::*;
use crate::control::*;
use tokio::sync::watch;
mod status;
pub use status::*;
pub struct ApplierConfig;
pub struct Applier;
pub struct Cut {
    pub round: u64,
}
pub struct HeldCut {
    pub cut: Cut,
    pub primary_snapshot: String,
}
impl ApplierConfig {
    pub fn new(_: Target, _: Target, _: Epoch, _: Journal, _: StrayWriters) -> Self {
        Self
    }
}
pub fn spawn(_: ApplierConfig) -> Applier {
    Applier
}
impl Applier {
    pub fn status(&self) -> watch::Receiver<ApplierStatus> {
        watch::channel(ApplierStatus::new(Side::Legacy, Epoch(1))).1
    }
    pub async fn catch_up(&self) -> Result<Cut, String> {
        Err("x".into())
    }
    pub async fn cut(&self) -> Result<HeldCut, String> {
        Err("x".into())
    }
    pub async fn stop(&self) {}
}
pub async fn prepare_primary(_: &Target, _: Epoch) -> Result<(), String> {
    Ok(())
}
pub async fn begin_direction(_: &tokio_postgres::Client, _: &tokio_postgres::Client, _: Epoch) -> Result<(), String> {
    Ok(())
}
