//! Every endpoint of etcd: whether it answers and how fast, its leader, its alarms, its size against its quota.

use super::finding::Finding;
use crate::http::Client;
use membership::{Endpoint, EtcdTls};
use std::{collections::BTreeSet, time::Duration};
use tokio::time::timeout;

const CHECK: &str = "etcd";
/// A tenth of the default lease: several calls must fit into one.
const SLOW: Duration = Duration::from_millis(500);
/// So often a slow one is asked: one slow answer is noise, of the network or of this machine.
const ASKED: usize = 3;
/// Share of the quota from which it is time to act.
const FULL: f64 = 0.8;
/// etcd's own, if it is not told another.
const DEFAULT_QUOTA: u64 = 2 << 30;

pub type Answers = Vec<(String, Result<Endpoint, String>)>;

pub async fn gather(urls: &[String], tls: Option<&EtcdTls>, patience: Duration) -> Answers {
    let mut answers = quickest(async || survey(urls, tls, patience).await).await;
    for (url, answer) in &mut answers {
        if let Ok(endpoint) = answer
            && endpoint.quota_bytes.is_none()
        {
            endpoint.quota_bytes = quota(url, patience).await;
        }
    }
    answers
}

async fn survey(urls: &[String], tls: Option<&EtcdTls>, patience: Duration) -> Answers {
    let answers = membership::survey(urls, tls, patience).await.into_iter();
    answers.map(|(url, answer)| (url, answer.map_err(|error| error.to_string()))).collect()
}

/// The first answers, with the least latency of those that are asked for while one is slow.
async fn quickest(survey: impl AsyncFn() -> Answers) -> Answers {
    let mut answers = survey().await;
    for _ in 1..ASKED {
        if !answers.iter().any(|(_, answer)| answer.as_ref().is_ok_and(is_slow)) {
            break;
        }
        for ((_, kept), (_, again)) in answers.iter_mut().zip(survey().await) {
            if let (Ok(kept), Ok(again)) = (kept, again) {
                kept.latency = kept.latency.min(again.latency);
            }
        }
    }
    answers
}

fn is_slow(endpoint: &Endpoint) -> bool {
    endpoint.latency > SLOW
}

/// From its metrics, where they are shown without TLS.
async fn quota(url: &str, patience: Duration) -> Option<u64> {
    let client = Client::new(url).ok()?;
    let (_, body) = timeout(patience, client.get("/metrics")).await.ok()?.ok()?;
    let text = String::from_utf8_lossy(&body);
    let line = text.lines().find(|line| line.starts_with("etcd_server_quota_backend_bytes "))?;
    line.rsplit(' ').next()?.parse::<f64>().ok().map(|bytes| bytes as u64)
}

pub fn judge(answers: &Answers) -> Vec<Finding> {
    let all = answers.len();
    let alive: Vec<(&str, &Endpoint)> =
        answers.iter().filter_map(|(url, answer)| Some((url.as_str(), answer.as_ref().ok()?))).collect();
    let mut findings: Vec<Finding> = alive.iter().map(|(url, endpoint)| one(url, endpoint)).collect();
    findings.extend(whole(&alive));
    let dead = answers.iter().filter_map(|(url, answer)| Some((url, answer.as_ref().err()?)));
    if alive.len() > all / 2 {
        findings.extend(dead.map(|(url, why)| lost(url, why)));
    } else if all > 0 {
        let causes: Vec<String> = dead.map(|(url, why)| format!("{url}: {why}")).collect();
        findings.push(no_quorum(alive.len(), all, &causes));
    }
    findings
}

fn lost(url: &str, why: &str) -> Finding {
    Finding::warning(CHECK, url, format!("no answer: {why}"))
        .expected("every endpoint answers: without this one, the next loss may cost the quorum")
        .remedy("start this etcd server again or correct its URL; if its data are lost, `etcdctl member remove` and `member add`")
}

fn no_quorum(alive: usize, all: usize, causes: &[String]) -> Finding {
    Finding::error(CHECK, "the cluster", format!("{alive} of {all} endpoints answer ({})", causes.join("; ")))
        .expected(format!("at least {} of {all}: serving goes on with the last view, but nobody can join", all / 2 + 1))
        .remedy("start etcd, correct its URLs, and let routers and workers through to its client port (networkPolicy)")
}

fn one(url: &str, endpoint: &Endpoint) -> Finding {
    let quota = endpoint.quota_bytes.unwrap_or(DEFAULT_QUOTA);
    let Endpoint { db_bytes, latency, version, leader, member, .. } = endpoint;
    if *leader == 0 {
        return Finding::error(CHECK, url, "knows no leader")
            .expected("a leader: without one nothing can be read or written here")
            .remedy("see that a majority of etcd's servers run and reach each other on their peer ports");
    }
    if is_slow(endpoint) {
        let found = format!("answers after {} ms, at best of {ASKED} times", latency.as_millis());
        return Finding::warning(CHECK, url, found)
            .expected(format!("at most {} ms: leases of members must be renewed in time", SLOW.as_millis()))
            .remedy(
                "give etcd a fast disk and processor time of its own, or set a longer membership.lease_ms",
            );
    }
    if *db_bytes as f64 > FULL * quota as f64 {
        return Finding::warning(CHECK, url, format!("{} of {} are full", mib(*db_bytes), mib(quota)))
            .expected(format!("less than {} % of the quota", FULL * 100.0))
            .remedy("run etcd with --auto-compaction-retention=10m; now: `etcdctl compact REVISION`, `etcdctl defrag`");
    }
    let rank = if leader == member { "leads" } else { "follows" };
    let latency = latency.as_secs_f64() * 1e3;
    Finding::ok(
        CHECK,
        url,
        format!("{version} {rank}, {latency:.1} ms, {} of {}", mib(*db_bytes), mib(quota)),
    )
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// What the endpoints say together.
fn whole(alive: &[(&str, &Endpoint)]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let clusters: BTreeSet<u64> = alive.iter().map(|(_, endpoint)| endpoint.cluster).collect();
    let leaders: BTreeSet<u64> =
        alive.iter().map(|(_, endpoint)| endpoint.leader).filter(|id| *id != 0).collect();
    if clusters.len() > 1 {
        let found = Finding::error(
            CHECK,
            "the cluster",
            format!("the endpoints are of {} etcd clusters", clusters.len()),
        );
        let found = found.expected("endpoints of one etcd cluster: members would be seen here and not there");
        findings.push(
            found.remedy("list the endpoints of one etcd cluster only, the same for routers and workers"),
        );
    } else if leaders.len() > 1 {
        let found = Finding::error(CHECK, "the cluster", "the endpoints name different leaders");
        let found = found.expected("one leader");
        findings.push(
            found.remedy(
                "let etcd's servers reach each other on their peer ports; ask again after an election",
            ),
        );
    }
    let alarms: BTreeSet<&str> =
        alive.iter().flat_map(|(_, endpoint)| &endpoint.errors).filter_map(|error| alarm(error)).collect();
    findings.extend(alarms.into_iter().map(alarmed));
    findings
}

/// "memberID:… alarm:NOSPACE", as etcd words it.
fn alarm(error: &str) -> Option<&str> {
    error.split_once("alarm:").map(|(_, name)| name.trim().trim_end_matches([',', '>', ' ']))
}

fn alarmed(name: &str) -> Finding {
    let found = Finding::error(CHECK, "the cluster", format!("the alarm {name} is set"));
    match name {
        "NOSPACE" => found.expected("no alarm: etcd takes no writes, so members cannot join or renew").remedy(
            "`etcdctl compact REVISION`, `etcdctl defrag`, then `etcdctl alarm disarm`; run etcd with \
             --auto-compaction-retention=10m, or a larger --quota-backend-bytes",
        ),
        _ => found.expected("no alarm").remedy(
            "see etcd's log; a corrupt member is removed with `etcdctl member remove` and added again on an empty volume",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Severity;
    use std::cell::Cell;

    fn sound(member: u64) -> Endpoint {
        Endpoint { cluster: 1, member, leader: 1, latency: Duration::from_millis(2), ..Endpoint::default() }
    }

    fn three(change: impl Fn(usize, &mut Endpoint) -> bool) -> Vec<Finding> {
        let answers = (0..3).map(|n| {
            let mut endpoint = sound(n as u64 + 1);
            let lives = change(n, &mut endpoint);
            (format!("http://e{n}:2379"), if lives { Ok(endpoint) } else { Err("refused".to_owned()) })
        });
        judge(&answers.collect()).into_iter().filter(|finding| finding.severity > Severity::Ok).collect()
    }

    fn only(findings: Vec<Finding>, severity: Severity, part: &str) {
        assert!(
            findings.len() == 1 && findings[0].severity == severity && findings[0].found.contains(part),
            "{part}: {findings:#?}"
        );
        assert!(!findings[0].remedy.is_empty());
    }

    #[test]
    fn each_fault_is_one_finding() {
        assert_eq!(three(|_, _| true), []);
        only(three(|n, _| n != 1), Severity::Warning, "no answer: refused");
        only(three(|n, _| n == 1), Severity::Error, "1 of 3 endpoints answer");
        only(three(|_, _| false), Severity::Error, "0 of 3 endpoints answer");
        let alarm = |_, e: &mut Endpoint| {
            e.errors = vec!["memberID:10276657743932975437 alarm:NOSPACE ".into()];
            true
        };
        only(three(alarm), Severity::Error, "NOSPACE");
        let leaderless = |n, e: &mut Endpoint| {
            e.leader = u64::from(n != 2);
            true
        };
        only(three(leaderless), Severity::Error, "knows no leader");
        let split = |n, e: &mut Endpoint| {
            e.leader = if n == 2 { 3 } else { 1 };
            true
        };
        only(three(split), Severity::Error, "different leaders");
        let foreign = |n, e: &mut Endpoint| {
            e.cluster = if n == 2 { 7 } else { 1 };
            true
        };
        only(three(foreign), Severity::Error, "2 etcd clusters");
        let full = |n, e: &mut Endpoint| {
            (e.db_bytes, e.quota_bytes) = (if n == 0 { 90 } else { 10 } << 20, Some(100 << 20));
            true
        };
        only(three(full), Severity::Warning, "90.0 MiB of 100.0 MiB");
        let slow = |n, e: &mut Endpoint| {
            e.latency = Duration::from_millis(if n == 0 { 900 } else { 1 });
            true
        };
        only(three(slow), Severity::Warning, "900 ms");
    }

    /// What is known after etcd has answered so fast, one survey after another, and how often it was asked. 0: not at all.
    async fn asked(latencies: &[u64]) -> (Option<Duration>, usize) {
        let asked = Cell::new(0);
        let answers = quickest(async || {
            let latency = Duration::from_millis(latencies[asked.replace(asked.get() + 1)]);
            let answer = Ok(Endpoint { latency, ..sound(1) });
            vec![("http://e:2379".into(), if latency.is_zero() { Err("refused".into()) } else { answer })]
        });
        (answers.await[0].1.as_ref().ok().map(|endpoint| endpoint.latency), asked.get())
    }

    #[tokio::test]
    async fn one_slow_answer_is_noise_and_three_are_not() {
        let ms = |ms| Some(Duration::from_millis(ms));
        assert_eq!(asked(&[2]).await, (ms(2), 1));
        assert_eq!(asked(&[0]).await, (None, 1), "only who is slow is asked again");
        assert_eq!(asked(&[900, 3]).await, (ms(3), 2));
        assert_eq!(asked(&[900, 0, 700]).await, (ms(700), 3));
        assert_eq!(asked(&[700, 900, 4]).await, (ms(4), 3));
    }
}
