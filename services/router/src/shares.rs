//! What each tenant has had of one class: start-time fair queueing. A tenant's account grows by what it takes,
//! and one that comes back starts no lower than the virtual time. That grows by service divided by the tenants
//! that compete for it, and never stays behind the account at which a tenant is served: else whoever comes new
//! would be served alone until it had caught up with the others.

use std::collections::HashMap;

/// Of an account to a token, so that a token among many tenants still moves virtual time.
const UNITS: u64 = 1 << 16;

#[derive(Default)]
pub struct Shares {
    /// In [`UNITS`]; entries below `virtual_time` may be forgotten.
    accounts: HashMap<String, u64>,
    virtual_time: u64,
}

/// To be returned if the placement is refused.
#[derive(Clone, Copy, Default)]
pub struct Charge {
    tenant: u64,
    /// By how much virtual time grew.
    virtual_time: u64,
}

impl Shares {
    pub fn account(&self, tenant: &str) -> u64 {
        self.accounts.get(tenant).copied().unwrap_or(0)
    }

    /// How many accounts are kept.
    pub fn len(&self) -> usize {
        self.accounts.len()
    }

    /// A request of this tenant begins to wait.
    pub fn join(&mut self, tenant: &str) {
        let account = self.accounts.entry(tenant.to_owned()).or_default();
        *account = (*account).max(self.virtual_time);
    }

    /// The tenant takes `cost` tokens, one of so many that would.
    pub fn charge(&mut self, tenant: &str, cost: u64, competing: usize) -> Charge {
        let cost = cost.max(1).saturating_mul(UNITS);
        let account = self.accounts.entry(tenant.to_owned()).or_default();
        let behind = account.saturating_sub(self.virtual_time);
        let grown = behind.max(cost / competing.max(1) as u64);
        *account += cost;
        self.virtual_time += grown;
        Charge { tenant: cost, virtual_time: grown }
    }

    pub fn refund(&mut self, tenant: &str, charge: Charge) {
        self.virtual_time = self.virtual_time.saturating_sub(charge.virtual_time);
        if let Some(account) = self.accounts.get_mut(tenant) {
            *account = account.saturating_sub(charge.tenant);
        }
    }

    /// Forgets tenants that are not `present`: all, or those that would be lifted above what they had anyway.
    pub fn forget(&mut self, all: bool, present: impl Fn(&str) -> bool) {
        let floor = self.virtual_time;
        self.accounts.retain(|tenant, account| present(tenant) || !all && *account > floor);
    }
}
