//! A database that a tool migrates through the proxy while an application writes to it.

use pgtandem::admin::api::ShadowReads;
use pgtandem::control::Phase;

use crate::application::{Application, Statements};
use crate::rig::Rig;
use crate::tool::Tool;

/// Repeats a run that failed.
const SEED: u64 = 4;

/// A shop that is migrated while it is open.
pub(crate) struct Shop {
    rig: Rig,
    pub(crate) tool: Tool,
    application: Application,
}

impl Shop {
    pub(crate) async fn open(tool: &'static str, phase: Phase, statements: Statements) -> Self {
        let mut rig = Rig::new();
        rig.extra = "reads: { shadow_percent: 100 }".to_owned();
        rig.serve(phase).await;
        let application = Application::begin(&rig.url(), statements, SEED, 3).await;
        Self {
            tool: Tool::start(tool, &rig.url()),
            rig,
            application,
        }
    }

    /// A command while the application writes, before, meanwhile and after; then both sides are
    /// compared.
    pub(crate) async fn migrate(&mut self, line: &str) -> String {
        self.application.rage(10).await;
        let output = tokio::task::block_in_place(|| self.tool.run(line));
        self.application.rage(20).await;
        let _paused = self.application.paused().await;
        self.rig.assert_identical_after(line).await;
        output
    }

    pub(crate) async fn close(self) -> ShadowReads {
        let written = self.application.end().await;
        assert!(written > 100, "the application wrote {written} times only");
        self.rig.assert_identical_after("all").await;
        self.rig.status().await.unwrap().databases.remove(0).shadow_reads
    }
}
