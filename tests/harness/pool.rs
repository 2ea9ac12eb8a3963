//! What a worker says of its block pool at `/debug/pool`.

use super::http::Client;
use serde::Deserialize;

#[derive(Clone, Debug, Deserialize)]
pub struct Pool {
    pub pid: u32,
    pub role: String,
    /// "ok", or the first broken invariant.
    pub check: String,
    pub blocks: Blocks,
    pub running: u32,
    pub waiting: u32,
    pub reserved: u32,
    pub reservations: u32,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Blocks {
    pub total: u32,
    pub free: u32,
    pub cached: u32,
    pub held: u32,
    pub quarantined: u32,
}

impl Pool {
    pub async fn of(admin: &str) -> Pool {
        let (status, body) = Client::new(admin).unwrap().get("/debug/pool").await.expect("a worker answers");
        assert!(status.is_success());
        serde_json::from_slice(&body).unwrap_or_else(|error| panic!("{error}: {body:?}"))
    }

    pub fn is_idle(&self) -> bool {
        let held = self.blocks.held + self.blocks.quarantined + self.running + self.waiting + self.reserved;
        assert!(
            self.blocks.free + self.blocks.cached + self.blocks.held + self.blocks.quarantined
                == self.blocks.total
        );
        self.check == "ok" && held + self.reservations == 0
    }
}
