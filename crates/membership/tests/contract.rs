//! The membership contract, one suite for all sources: the registry over gRPC, real etcd, and the one in
//! the process. What only
//! one of them can show (fail-over between etcd servers, silent registry streams) follows in own files.

#[path = "contract/etcd.rs"]
mod etcd;
#[path = "etcd_cluster/mod.rs"]
mod etcd_cluster;
#[path = "contract/late_write.rs"]
mod late_write;
#[path = "contract/memory.rs"]
mod memory;
#[path = "contract/registry.rs"]
mod registry;
#[path = "contract/suite.rs"]
mod suite;
#[path = "contract/tls.rs"]
mod tls;

/// Each part of the suite is a test of its own, on a source of its own.
macro_rules! contract {
    ($name:ident, $source:expr) => {
        mod $name {
            use super::*;

            #[tokio::test(flavor = "multi_thread")]
            async fn members_appear_change_and_leave() {
                suite::members_appear_change_and_leave(&mut $source).await;
            }
            #[tokio::test(flavor = "multi_thread")]
            async fn every_view_is_whole() {
                suite::every_view_is_whole(&mut $source).await;
            }
            #[tokio::test(flavor = "multi_thread")]
            async fn a_killed_member_goes_within_its_lease() {
                suite::a_killed_member_goes_within_its_lease(&mut $source).await;
            }
            #[tokio::test(flavor = "multi_thread")]
            async fn the_later_join_with_an_id_wins() {
                suite::the_later_join_with_an_id_wins(&mut $source).await;
            }
            #[tokio::test(flavor = "multi_thread")]
            async fn an_outage_changes_nothing_but_joins_wait() {
                suite::an_outage_changes_nothing_but_joins_wait(&mut $source).await;
            }
        }
    };
}

contract!(on_the_registry, registry::Registry::start());
contract!(in_process, memory::InProcess::start());
contract!(on_etcd, etcd::Etcd::start(false));

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_comes_back_empty_is_filled_again() {
    suite::an_outage_changes_nothing_but_joins_wait(&mut etcd::Etcd::start(true)).await;
}
