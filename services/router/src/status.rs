//! What a router tells of the cluster, to whoever looks at it.

use crate::{Shared, config::Pools};
use proto::{Pool, QueueDepth, Role, Source, StatusReply};
use std::{collections::BTreeMap, time::Duration};

pub fn status(shared: &Shared) -> StatusReply {
    let (cluster, admission) = (&shared.cluster, &shared.admission);
    let queue = admission.depths().into_iter().map(|(priority, depth)| QueueDepth { priority, depth });
    let (members, conditions) = cluster.members().into_iter().unzip();
    let pools = pools(&cluster.census(), shared.config.pools);
    StatusReply {
        members,
        conditions,
        lost: cluster.lost(|role| missing(&pools, role)),
        pools,
        queue: queue.collect(),
        running: count(admission.running()),
        queue_limit: count(admission.queue_limit()),
        migrations: totals(shared.metrics.migrations()),
        placements: totals(shared.metrics.placements()),
        source: Some(source(shared)),
    }
}

/// Every role that has members or should have some.
fn pools(census: &BTreeMap<(Role, &'static str), u32>, desired: Pools) -> Vec<Pool> {
    let roles = [Role::Prefill, Role::Decode, Role::Both];
    let pool = |role: Role| {
        let count = |state| census.get(&(role, state)).copied().unwrap_or(0);
        let (ready, draining, desired) = (count("ready"), count("draining"), desired.desired(role));
        let populated = census.keys().any(|(of, _)| *of == role);
        (populated || desired.is_some_and(|desired| desired > 0)).then(|| Pool {
            role: role.into(),
            desired,
            ready,
            draining,
        })
    };
    roles.into_iter().filter_map(pool).collect()
}

/// How many of this role there should be besides those that are here and stay.
fn missing(pools: &[Pool], role: i32) -> Option<u32> {
    let pool = pools.iter().find(|pool| pool.role == role)?;
    pool.desired.map(|desired| desired.saturating_sub(pool.ready))
}

fn source(shared: &Shared) -> Source {
    let kind = if shared.config.etcd.is_empty() { "registry" } else { "etcd" };
    let stale = shared.cluster.stale();
    let stale_ms = stale.map_or(0, |stale: Duration| stale.as_millis() as u64);
    Source { kind: kind.into(), connected: stale.is_none(), stale_ms }
}

fn totals<const N: usize>(counts: [(&str, u64); N]) -> std::collections::HashMap<String, u64> {
    counts.into_iter().map(|(name, count)| (name.to_owned(), count)).collect()
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_without_members_is_told_if_there_should_be_some() {
        let census = BTreeMap::from([((Role::Prefill, "draining"), 1), ((Role::Prefill, "ready"), 2)]);
        let desired = Pools { prefill: None, decode: Some(2), both: Some(0) };
        let told = pools(&census, desired);
        let roles: Vec<Role> = told.iter().map(Pool::role).collect();
        assert_eq!(roles, [Role::Prefill, Role::Decode]);
        assert_eq!((told[0].desired, told[0].ready, told[0].draining), (None, 2, 1));
        assert_eq!((told[1].desired, told[1].ready), (Some(2), 0));
        assert_eq!(missing(&told, Role::Decode.into()), Some(2));
        assert_eq!(missing(&told, Role::Prefill.into()), None);
    }
}
