//! A cluster of real processes for a test to ask, watch and break.

mod binary;
#[path = "../../crates/credentials/tests/certificates/mod.rs"]
pub mod certificates;
mod cluster;
mod collector;
pub mod deployment;
#[path = "../../crates/membership/tests/etcd_cluster/mod.rs"]
pub mod etcd_cluster;
pub mod golden;
#[path = "../../services/baton/src/http.rs"]
pub mod http;
pub mod load;
pub mod network;
mod pool;
mod request;
pub mod table;

pub use binary::{baton, baton_failpoints, has_nixl, root};
pub use cluster::{Cluster, Worker};
pub use collector::Collector;
pub use pool::Pool;
pub use request::{Answer, Ask};

/// For addresses that are not a whole cluster's: of one service, or of none.
pub fn client(url: &str) -> http::Client {
    http::Client::new(url).unwrap()
}

/// Whether the long version of a scenario is asked for: `make proof-…` sets it.
pub fn is_proof(name: &str) -> bool {
    std::env::var("BATON_PROOF").is_ok_and(|asked| asked == name)
}

/// What a program of tests/ says, which must end well.
pub fn python(program: &str, arguments: &[&str]) -> String {
    let python = root().join("target/tools/venv/bin/python");
    assert!(python.exists(), "{} is missing: run `make test`, or `bash tests/install`", python.display());
    let ran = std::process::Command::new(python)
        .arg(root().join("tests").join(program))
        .args(arguments)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert!(ran.status.success(), "{said}{}", String::from_utf8_lossy(&ran.stderr));
    said
}

/// Runs a scenario on a runtime of its own.
pub fn block_on<T>(scenario: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(scenario)
}

/// One cluster at a time: two would measure and disturb each other on a small machine.
pub fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
