//! The membership: whether somebody prefills and somebody decodes, and whether the members can be paired at all.

use super::finding::Finding;
use proto::Role;
use serde::Deserialize;
use std::collections::BTreeMap;

const MEMBERSHIP: &str = "membership";
const SKEW: &str = "skew";

/// A member as the gateway's `/status` or its record in etcd tells it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Member {
    pub id: String,
    pub role: String,
    pub draining: bool,
    pub address: String,
    pub admin: String,
    pub pid: u32,
    pub model: String,
    pub backend: String,
    pub version: String,
    /// Fingerprints, hexadecimal.
    pub weights: String,
    pub layout: String,
    pub block_tokens: u32,
}

impl From<proto::Member> for Member {
    fn from(member: proto::Member) -> Self {
        let role = match member.role() {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
            Role::Both => "both",
            Role::Unspecified => "unknown",
        };
        Member {
            id: member.id,
            role: role.to_owned(),
            draining: member.draining,
            address: member.address,
            admin: member.admin_address,
            pid: member.pid,
            model: member.model,
            backend: member.backend,
            version: member.version,
            weights: format!("{:016x}", member.weights_fingerprint),
            layout: format!("{:016x}", member.layout_fingerprint),
            block_tokens: member.block_tokens,
        }
    }
}

impl Member {
    pub fn prefills(&self) -> bool {
        self.role != "decode"
    }

    pub fn decodes(&self) -> bool {
        self.role != "prefill"
    }

    /// Whether a router may place a request on `self` for prefill and on `decode`.
    pub fn pairs_with(&self, decode: &Member) -> bool {
        let same = |key: fn(&Member) -> String| key(self) == key(decode);
        self.prefills()
            && decode.decodes()
            && self.model == decode.model
            && ATTRIBUTES.iter().all(|a| same(a.of))
    }
}

pub fn judge(members: &[Member]) -> Vec<Finding> {
    [presence(members), draining(members), addresses(members), skew(members)].concat()
}

fn presence(members: &[Member]) -> Vec<Finding> {
    let count = |role: &str| members.iter().filter(|member| member.role == role).count();
    let takes = |able: fn(&Member) -> bool| members.iter().any(|member| able(member) && !member.draining);
    let missing: Vec<&str> = [("prefill", takes(Member::prefills)), ("decode", takes(Member::decodes))]
        .into_iter()
        .filter_map(|(role, there)| (!there).then_some(role))
        .collect();
    let found = format!("{} prefill, {} decode, {} both", count("prefill"), count("decode"), count("both"));
    if missing.is_empty() {
        return vec![Finding::ok(MEMBERSHIP, "roles", found)];
    }
    missing
        .into_iter()
        .map(|role| {
            Finding::error(MEMBERSHIP, "roles", format!("no {role} member takes work ({found})"))
                .expected("at least one member of each role, or of role both: requests wait in the queue")
                .remedy(format!(
                    "start one (`baton worker --role {role}`, or scale its pool); if one runs, see in its log whether \
                     it has joined: membership.etcd and membership.prefix, or membership.registry, must be the router's"
                ))
        })
        .collect()
}

fn draining(members: &[Member]) -> Vec<Finding> {
    let draining = members.iter().filter(|member| member.draining);
    let told = draining.map(|member| {
        Finding::warning(MEMBERSHIP, &member.id, "is draining and takes nothing new")
            .expected("gone after its drain_ms and handover_ms (7 s unless configured)")
            .remedy("wait for it; if it stays, look at its log, then end its process")
    });
    told.collect()
}

fn addresses(members: &[Member]) -> Vec<Finding> {
    let mut by_address: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for member in members {
        by_address.entry(&member.address).or_default().push(&member.id);
    }
    let shared = by_address.into_iter().filter(|(_, ids)| ids.len() > 1);
    let told = shared.map(|(address, ids)| {
        Finding::error(MEMBERSHIP, address, format!("is the address of {}", ids.join(" and ")))
            .expected("an address for each member: calls that name one of them are refused by the other")
            .remedy("give each worker its own `advertise`; an incarnation that has ended goes with its lease")
    });
    told.collect()
}

/// What must be equal for two members to be paired.
struct Attribute {
    name: &'static str,
    of: fn(&Member) -> String,
    remedy: &'static str,
}

/// In order: what comes first explains what comes later.
const ATTRIBUTES: [Attribute; 5] = [
    Attribute {
        name: "version",
        of: |member| member.version.clone(),
        remedy: "run the same version of Baton on all workers; finish the upgrade or take it back",
    },
    Attribute {
        name: "backend",
        of: |member| member.backend.clone(),
        remedy: "run all workers of a model on the same --backend",
    },
    Attribute {
        name: "block_tokens",
        of: |member| member.block_tokens.to_string(),
        remedy: "set the same block_tokens on all workers",
    },
    Attribute {
        name: "weights",
        of: |member| member.weights.clone(),
        remedy: "give all workers the same checkpoint (or, of random weights, the same seed)",
    },
    Attribute {
        name: "layout",
        of: |member| member.layout.clone(),
        remedy: "start all workers with the same --transport and the same version",
    },
];

fn skew(members: &[Member]) -> Vec<Finding> {
    let mut by_model: BTreeMap<&str, Vec<&Member>> = BTreeMap::new();
    for member in members {
        by_model.entry(&member.model).or_default().push(member);
    }
    by_model.into_iter().map(|(model, members)| of_model(model, &members)).collect()
}

fn of_model(model: &str, members: &[&Member]) -> Finding {
    let differing = ATTRIBUTES.iter().map(|attribute| (attribute, values(attribute, members)));
    let Some((attribute, values)) = differing.into_iter().find(|(_, values)| values.len() > 1) else {
        let found =
            format!("{} members agree in version, backend, block_tokens, weights and layout", members.len());
        return Finding::ok(SKEW, model, found);
    };
    let told: Vec<String> =
        values.iter().map(|(value, ids)| format!("{value} ({})", ids.join(", "))).collect();
    let found = format!("{} differs: {}", attribute.name, told.join(", "));
    // With a partner each, they are clusters of their own, as during an upgrade.
    let alone: Vec<&str> =
        members.iter().filter(|m| !has_partner(m, members)).map(|m| m.id.as_str()).collect();
    let finding = match alone.is_empty() {
        true => Finding::warning(SKEW, model, found),
        false => Finding::error(SKEW, model, format!("{found}; without a partner: {}", alone.join(", "))),
    };
    finding.expected("equal in all of them: others are never paired").remedy(attribute.remedy)
}

fn values(attribute: &Attribute, members: &[&Member]) -> BTreeMap<String, Vec<String>> {
    let mut values: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for member in members {
        values.entry((attribute.of)(member)).or_default().push(member.id.clone());
    }
    values
}

fn has_partner(member: &Member, members: &[&Member]) -> bool {
    members.iter().any(|other| member.pairs_with(other) || other.pairs_with(member))
}

/// Routers that the gateway lists and does not reach, of its `/status`.
pub fn silent_routers(status: &serde_json::Value) -> Vec<Finding> {
    let routers = status["routers"].as_array().map(Vec::as_slice).unwrap_or_default();
    let silent = routers.iter().filter(|router| router["answers"] == false);
    let told = silent.map(|router| {
        let text = |key: &str| router[key].as_str().unwrap_or("?").to_owned();
        Finding::warning("reach", text("address"), format!("the gateway does not reach this router: {}", text("problem")))
            .expected("every router that the gateway lists: without this one, the next loss stops new requests")
            .remedy("start it again, let gateways through to its gRPC port, or take it out of the gateway's `routers`")
    });
    told.collect()
}

/// Members that one source knows and the other does not.
pub fn compare(router: &[Member], etcd: &[Member]) -> Vec<Finding> {
    let unknown = |here: &[Member], there: &[Member]| -> Vec<String> {
        let known = |id: &str| there.iter().any(|member| member.id == id);
        here.iter().filter(|member| !known(&member.id)).map(|member| member.id.clone()).collect()
    };
    let (only_router, only_etcd) = (unknown(router, etcd), unknown(etcd, router));
    if only_router.is_empty() && only_etcd.is_empty() {
        return vec![Finding::ok(MEMBERSHIP, "etcd", format!("the router knows its {} members", etcd.len()))];
    }
    let mut found = Vec::new();
    for (where_, ids) in [("the router", only_router), ("etcd", only_etcd)] {
        if !ids.is_empty() {
            found.push(format!("only {where_} knows {}", ids.join(", ")));
        }
    }
    vec![
        Finding::warning(MEMBERSHIP, "etcd", found.join("; ")).expected("the same members in both").remedy(
            "ask again after a lease; if it stays, let routers and workers use the same etcd and prefix",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Severity;

    fn member(id: &str, role: &str) -> Member {
        Member {
            id: id.into(),
            role: role.into(),
            address: format!("http://{id}:1"),
            version: "1".into(),
            weights: "aa".into(),
            layout: "bb".into(),
            block_tokens: 64,
            ..Member::default()
        }
    }

    fn pair(change: impl Fn(&mut Member)) -> Vec<Finding> {
        let mut decode = member("d1", "decode");
        change(&mut decode);
        problems(&[member("p1", "prefill"), decode])
    }

    fn problems(members: &[Member]) -> Vec<Finding> {
        judge(members).into_iter().filter(|finding| finding.severity > Severity::NotChecked).collect()
    }

    fn only(findings: Vec<Finding>, check: &str, severity: Severity, part: &str) {
        let [finding] = findings.as_slice() else { panic!("{part}: {findings:#?}") };
        assert_eq!((finding.check, finding.severity), (check, severity), "{finding:#?}");
        assert!(finding.found.contains(part) && !finding.remedy.is_empty(), "{finding:#?}");
    }

    #[test]
    fn each_fault_is_one_finding() {
        assert_eq!(pair(|_| {}), []);
        only(pair(|d| d.weights = "ff".into()), SKEW, Severity::Error, "weights differs");
        only(pair(|d| d.layout = "ff".into()), SKEW, Severity::Error, "layout differs");
        only(pair(|d| d.version = "2".into()), SKEW, Severity::Error, "version differs");
        only(
            pair(|d| d.address = "http://p1:1".into()),
            MEMBERSHIP,
            Severity::Error,
            "d1 and p1".split(' ').next().unwrap(),
        );
        only(problems(&[member("p1", "prefill")]), MEMBERSHIP, Severity::Error, "no decode member");
        assert_eq!(problems(&[]).len(), 2);
    }

    #[test]
    fn what_explains_another_difference_is_told_instead_of_it() {
        let changed = pair(|d| (d.block_tokens, d.layout) = (16, "ff".into()));
        only(changed, SKEW, Severity::Error, "block_tokens differs: 16 (d1), 64 (p1)");
    }

    #[test]
    fn two_halves_with_partners_are_a_warning() {
        let newer = |id, role| Member { version: "2".into(), ..member(id, role) };
        let members =
            [member("p1", "prefill"), member("d1", "decode"), newer("p2", "prefill"), newer("d2", "decode")];
        only(problems(&members), SKEW, Severity::Warning, "version differs");
        let lonely = &members[..3];
        only(problems(lonely), SKEW, Severity::Error, "without a partner: p2");
    }

    #[test]
    fn a_role_that_only_drains_is_missing() {
        let found = pair(|d| d.draining = true);
        let severities: Vec<Severity> = found.iter().map(|finding| finding.severity).collect();
        assert_eq!(severities, [Severity::Error, Severity::Warning]);
    }

    #[test]
    fn role_both_is_enough() {
        assert_eq!(problems(&[member("b", "both")]), []);
    }

    #[test]
    fn a_router_that_does_not_answer_is_told() {
        let status = serde_json::json!({"routers": [
            {"address": "http://r1:1", "answers": true},
            {"address": "http://r2:1", "answers": false, "problem": "refused"},
        ]});
        let found = silent_routers(&status);
        assert_eq!((found.len(), found[0].subject.as_str()), (1, "http://r2:1"));
        assert!(found[0].found.ends_with("refused"));
        assert_eq!(silent_routers(&serde_json::json!({})), []);
    }

    #[test]
    fn sources_that_disagree_are_told() {
        let (p, d) = (member("p1", "prefill"), member("d1", "decode"));
        assert_eq!(compare(&[p.clone(), d.clone()], &[d.clone(), p.clone()])[0].severity, Severity::Ok);
        let found = &compare(&[p], &[d])[0];
        assert_eq!(found.found, "only the router knows p1; only etcd knows d1");
    }
}
