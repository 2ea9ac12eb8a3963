//! Whether members answer from here, and whether prefill workers reach decode workers, how fast: the latter is asked of the
//! prefill worker itself, which sends some MiB to the other's gRPC port (`POST /probe` on its admin port).

use super::{
    clock::{self, Skew},
    finding::Finding,
    members::Member,
};
use crate::http::Client;
use bytes::Bytes;
use futures::{StreamExt, future::join_all, stream};
use http_body_util::BodyExt;
use hyper::{Method, StatusCode, header::DATE};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout, timeout_at},
};
use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

const REACH: &str = "reach";
const PAIRS: &str = "pairs";
const TOKEN: &str = "the prefill worker probes only for who has its admin token; give it with --token-file";
/// No round of probes begins once so many pairs have been probed.
const MOST_PAIRS: usize = 256;
/// All probes end within this time.
pub const ALL_PROBES: Duration = Duration::from_secs(60);
/// What a worker may take for a probe, beyond the wait for its answer.
const PROBING: Duration = Duration::from_secs(10);
/// Members asked at the same time.
const AT_ONCE: usize = 16;

/// What one service answered.
pub struct Answer {
    /// Time of a health check over gRPC, and whether it says that it serves.
    pub grpc: Result<(Duration, bool), String>,
    pub admin: Result<Option<Skew>, String>,
}

impl Answer {
    /// A decode worker is reached by gRPC, a prefill worker is asked on its admin port.
    pub fn can_be_probed(&self, member: &Member) -> bool {
        self.grpc.is_ok() && (member.role == "decode" || self.admin.is_ok())
    }
}

pub async fn gather(members: &[Member], patience: Duration) -> Vec<Answer> {
    stream::iter(members.iter().map(|member| ask(member, patience))).buffered(AT_ONCE).collect().await
}

async fn ask(member: &Member, patience: Duration) -> Answer {
    let (grpc, admin) =
        tokio::join!(health(&member.address, patience), date(&member.admin, "/health", patience));
    Answer { grpc, admin }
}

/// The standard health check of all services of a gRPC port; the second one, on a connection that stands, is timed.
pub async fn health(address: &str, patience: Duration) -> Result<(Duration, bool), String> {
    if let Some(secured) = address.strip_prefix("https://") {
        return opens(secured, patience).await;
    }
    let asking = async {
        let endpoint = Endpoint::from_shared(address.to_owned()).map_err(|error| error.to_string())?;
        let channel = endpoint.connect().await.map_err(|error| cause(&error))?;
        let mut client = HealthClient::new(channel);
        let mut check = async || {
            let began = Instant::now();
            let answer = client.check(HealthCheckRequest::default()).await;
            answer.map(|answer| (began.elapsed(), answer.into_inner().status()))
        };
        check().await.map_err(|status| status.message().to_owned())?;
        let (took, status) = check().await.map_err(|status| status.message().to_owned())?;
        Ok((took, status == ServingStatus::Serving))
    };
    timeout(patience, asking)
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {} s", patience.as_secs_f32())))
}

/// A port that asks for a certificate takes a connection, which is all that can be seen without one.
async fn opens(address: &str, patience: Duration) -> Result<(Duration, bool), String> {
    let began = Instant::now();
    match timeout(patience, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Ok((began.elapsed(), true)),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", patience.as_secs_f32())),
    }
}

fn cause(error: &dyn std::error::Error) -> String {
    let mut deepest = error;
    while let Some(deeper) = deepest.source() {
        deepest = deeper;
    }
    deepest.to_string()
}

/// The skew of the clock that stamped the answer.
pub async fn date(service: &str, path: &str, patience: Duration) -> Result<Option<Skew>, String> {
    let client = Client::new(service).map_err(|error| format!("{error:#}"))?;
    // The first answer pays for the connection.
    for timed in [false, true] {
        let (asked, began) = (SystemTime::now(), Instant::now());
        let answer = timeout(patience, client.open(Method::GET, path, Bytes::new())).await;
        let response = match answer {
            Ok(answer) => answer.map_err(|error| format!("{error:#}"))?,
            Err(_) => return Err(format!("no answer within {} s", patience.as_secs_f32())),
        };
        let round_trip = began.elapsed();
        let date = response.headers().get(DATE).and_then(|date| date.to_str().ok().map(str::to_owned));
        let _ = timeout(patience, response.into_body().collect()).await;
        if timed {
            return Ok(date.and_then(|date| clock::skew(asked, round_trip, &date)));
        }
    }
    Ok(None)
}

/// Of each member: whether it answers, and its clock.
pub fn judge(members: &[Member], answers: &[Answer]) -> Vec<Finding> {
    members.iter().zip(answers).flat_map(|(member, answer)| one(member, answer)).collect()
}

fn one(member: &Member, answer: &Answer) -> Vec<Finding> {
    let (address, admin) = (&member.address, &member.admin);
    let clock = |skew: &Option<Skew>| clock::judge(&member.id, *skew);
    match (&answer.grpc, &answer.admin) {
        (Ok((took, true)), Ok(skew)) => {
            let says = if address.starts_with("https:") { "takes connections" } else { "serves" };
            let found = format!("{says} on {address}, {:.1} ms", took.as_secs_f64() * 1e3);
            vec![Finding::ok(REACH, &member.id, found), clock(skew)]
        }
        (Ok((_, false)), Ok(skew)) => vec![stuck(member), clock(skew)],
        (Ok((_, true)), Err(why)) => vec![
            Finding::warning(REACH, &member.id, format!("its admin port {admin} does not answer: {why}"))
                .expected("health and metrics on the admin port")
                .remedy("correct advertise_admin, and let this machine and Prometheus through to that port"),
        ],
        (Ok((_, false)), Err(_)) => vec![stuck(member)],
        (Err(why), Ok(skew)) => vec![
            Finding::error(REACH, &member.id, format!("its gRPC port {address} does not answer: {why}"))
                .expected("routers and prefill workers reach it there")
                .remedy("correct `advertise`, and let routers and prefill workers through to that port (networkPolicy)"),
            clock(skew),
        ],
        (Err(why), Err(_)) => vec![
            Finding::error(REACH, &member.id, format!("is registered, but its process does not answer on {address}: {why}"))
                .expected("a process that answers as long as its lease lives")
                .remedy(format!(
                    "look at process {} on its machine: stopped (kill -CONT), hung (kill -9; its lease then ends), or cut \
                     off from here by the network",
                    member.pid
                )),
        ],
    }
}

fn stuck(member: &Member) -> Finding {
    Finding::error(REACH, &member.id, "says NOT_SERVING: its engine has work and takes no step")
        .expected("steps while there is work")
        .remedy("look at its log and its device, then start it again; requests go on elsewhere")
}

/// What a prefill worker says of one decode worker.
#[derive(Debug, Deserialize)]
pub struct Probed {
    /// Who answered there.
    pub member: String,
    pub round_trip_ms: f64,
    pub gigabytes_per_second: f64,
}

pub struct Pair<'a> {
    pub prefill: &'a Member,
    pub decode: &'a Member,
    pub probed: Result<Probed, Unprobed>,
}

/// Why there is no measure.
#[derive(Debug)]
pub enum Unprobed {
    /// The prefill worker did not try, which says nothing of the way between the two.
    NotTried(String),
    Cut(String),
}

impl From<String> for Unprobed {
    fn from(why: String) -> Self {
        Unprobed::Cut(why)
    }
}

/// What became of all pairs.
#[derive(Default)]
pub struct Probes<'a> {
    pub pairs: Vec<Pair<'a>>,
    /// For want of time.
    pub left_out: Vec<(&'a Member, &'a Member)>,
}

/// What a connection between workers must reach.
#[derive(Clone, Copy, Debug)]
pub struct Least {
    pub gigabytes_per_second: f64,
    pub round_trip_ms: f64,
}

/// In rounds in which no member is in two pairs, so that probes do not slow each other down; for so many pairs, and so long, as
/// can be waited for.
pub async fn probe<'a>(
    members: &[&'a Member],
    mib: u32,
    token: Option<&str>,
    patience: Duration,
    all: Duration,
) -> Probes<'a> {
    let deadline = Instant::now() + all;
    let of = |role: &str| members.iter().copied().filter(|member| member.role == role).collect();
    let (prefill, decode): (Vec<&Member>, Vec<&Member>) = (of("prefill"), of("decode"));
    let mut probes = Probes::default();
    for round in rounds(prefill.len(), decode.len()) {
        let round = round.into_iter().map(|(p, d)| (prefill[p], decode[d]));
        if probes.pairs.len() >= MOST_PAIRS || Instant::now() >= deadline {
            probes.left_out.extend(round);
            continue;
        }
        let asked = round.map(|(prefill, decode)| async move {
            let asking = ask_for(prefill, decode, mib, token, patience);
            (prefill, decode, timeout_at(deadline, asking).await)
        });
        for (prefill, decode, probed) in join_all(asked).await {
            match probed {
                Ok(probed) => probes.pairs.push(Pair { prefill, decode, probed }),
                Err(_) => probes.left_out.push((prefill, decode)),
            }
        }
    }
    probes
}

fn rounds(prefill: usize, decode: usize) -> impl Iterator<Item = Vec<(usize, usize)>> {
    let turns = if prefill == 0 || decode == 0 { 0 } else { prefill.max(decode) };
    (0..turns).map(move |turn| {
        let pair = |p: usize| (p, (p + turn) % turns);
        (0..prefill).map(pair).filter(|(_, d)| *d < decode).collect()
    })
}

/// One question at a time is answered: what is refused as busy is asked again.
async fn ask_for(
    prefill: &Member,
    decode: &Member,
    mib: u32,
    token: Option<&str>,
    patience: Duration,
) -> Result<Probed, Unprobed> {
    let client = Client::new(&prefill.admin).map_err(|error| format!("{error:#}"))?;
    let client = client.with_bearer(token.map(str::to_owned));
    let path = format!("/probe?to={}&mib={mib}", decode.address);
    let asking = async {
        loop {
            let response =
                client.open(Method::POST, &path, Bytes::new()).await.map_err(|error| format!("{error:#}"))?;
            let status = response.status();
            let body = response.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
            match status {
                StatusCode::TOO_MANY_REQUESTS => sleep(Duration::from_millis(100)).await,
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    return Err(Unprobed::NotTried(TOKEN.into()));
                }
                // It does not know who is a member, or knows that the other is none.
                StatusCode::SERVICE_UNAVAILABLE | StatusCode::NOT_FOUND => {
                    return Err(Unprobed::NotTried(error_in(status, &body)));
                }
                StatusCode::OK => {
                    return Ok(serde_json::from_slice(&body).map_err(|error| error.to_string())?);
                }
                _ => return Err(error_in(status, &body).into()),
            }
        }
    };
    timeout(patience + PROBING, asking)
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {} s", (patience + PROBING).as_secs_f32()).into()))
}

fn error_in(status: StatusCode, body: &[u8]) -> String {
    let said = serde_json::from_slice::<serde_json::Value>(body).ok();
    let error = said.as_ref().and_then(|said| said["error"].as_str());
    error.map_or_else(|| format!("the admin port answered {status}"), str::to_owned)
}

pub fn judge_pairs(probes: &Probes<'_>, least: Least) -> Vec<Finding> {
    let judged = probes.pairs.iter().filter_map(|pair| judge_pair(pair, least));
    judged.chain(not_tried(&probes.pairs)).chain(left_out(&probes.left_out)).collect()
}

fn not_tried(pairs: &[Pair<'_>]) -> Vec<Finding> {
    let why = |pair: &Pair<'_>| match &pair.probed {
        Err(Unprobed::NotTried(why)) => Some(why.clone()),
        _ => None,
    };
    by_prefill(pairs.iter().filter_map(|pair| Some((pair.prefill, pair.decode, why(pair)?))))
}

fn left_out(pairs: &[(&Member, &Member)]) -> Vec<Finding> {
    let why =
        format!("{MOST_PAIRS} pairs, or {} s, are what all probes together may take", ALL_PROBES.as_secs());
    by_prefill(pairs.iter().map(|(prefill, decode)| (*prefill, *decode, why.clone())))
}

/// One finding for each prefill worker, of all pairs that were not checked and why.
fn by_prefill<'a>(pairs: impl Iterator<Item = (&'a Member, &'a Member, String)>) -> Vec<Finding> {
    let mut of = BTreeMap::<&str, (Vec<&str>, BTreeSet<String>)>::new();
    for (prefill, decode, why) in pairs {
        let (decodes, whys) = of.entry(&prefill.id).or_default();
        decodes.push(&decode.id);
        whys.insert(why);
    }
    let told = of.into_iter().map(|(prefill, (decodes, whys))| {
        let whys: Vec<String> = whys.into_iter().collect();
        Finding::not_checked(PAIRS, format!("{prefill} -> {}", decodes.join(", ")), whys.join("; "))
    });
    told.collect()
}

/// `None`: it was not tried.
fn judge_pair(Pair { prefill, decode, probed }: &Pair<'_>, least: Least) -> Option<Finding> {
    let subject = format!("{} -> {}", prefill.id, decode.id);
    match probed {
        Ok(probed) => Some(judge_probed(subject, decode, probed, least)),
        Err(Unprobed::NotTried(_)) => None,
        Err(Unprobed::Cut(why)) => Some(
            Finding::error(PAIRS, subject, format!("does not get through: {why}"))
                .expected(format!("prefill workers reach {}", decode.address))
                .remedy("let prefill workers through to decode workers' gRPC port (networkPolicy, firewall), or correct `advertise`"),
        ),
    }
}

fn judge_probed(subject: String, decode: &Member, probed: &Probed, least: Least) -> Finding {
    let Probed { member, round_trip_ms, gigabytes_per_second } = probed;
    let found = format!("{gigabytes_per_second:.2} GB/s, {round_trip_ms:.2} ms");
    if *member != decode.id {
        return Finding::error(PAIRS, subject, format!("{member} answers at {}", decode.address))
            .expected(format!("{} answers at its address", decode.id))
            .remedy("give each worker an `advertise` of its own; an incarnation that has ended goes with its lease");
    }
    if *gigabytes_per_second < least.gigabytes_per_second || *round_trip_ms > least.round_trip_ms {
        return Finding::warning(PAIRS, subject, found)
            .expected(format!("at least {} GB/s and at most {} ms", least.gigabytes_per_second, least.round_trip_ms))
            .remedy("see which way the packets take (MTU, overlay, another zone) and what else uses it and the processors");
    }
    Finding::ok(PAIRS, subject, found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Severity;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn member(id: &str) -> Member {
        Member { id: id.into(), address: format!("http://{id}:1"), ..Member::default() }
    }

    fn answer(grpc: Option<bool>, admin: bool) -> Answer {
        Answer {
            grpc: grpc.map(|serves| (Duration::from_millis(1), serves)).ok_or_else(|| "refused".to_owned()),
            admin: if admin {
                Ok(Some(Skew { seconds: 0.0, error: 0.5 }))
            } else {
                Err("refused".to_owned())
            },
        }
    }

    #[test]
    fn each_fault_is_one_finding() {
        for (given, severity, part) in [
            (answer(Some(true), true), None, ""),
            (answer(Some(false), true), Some(Severity::Error), "NOT_SERVING"),
            (answer(Some(true), false), Some(Severity::Warning), "admin port"),
            (answer(None, true), Some(Severity::Error), "gRPC port"),
            (answer(None, false), Some(Severity::Error), "does not answer"),
        ] {
            let mut found = one(&member("d1"), &given);
            found.retain(|finding| finding.severity > Severity::Ok);
            assert_eq!(found.first().map(|finding| finding.severity), severity);
            assert!(
                found.len() <= 1 && found.iter().all(|finding| finding.found.contains(part)),
                "{found:#?}"
            );
        }
    }

    #[test]
    fn rounds_make_every_pair_once_and_use_nobody_twice() {
        for (prefill, decode) in [(1, 1), (2, 3), (5, 2), (4, 4), (0, 3)] {
            let mut all = BTreeSet::new();
            for round in rounds(prefill, decode) {
                let distinct: BTreeSet<usize> = round.iter().map(|(_, d)| *d).collect();
                assert_eq!(distinct.len(), round.len());
                all.extend(round);
            }
            assert_eq!(all.len(), prefill * decode);
        }
    }

    #[test]
    fn pairs_left_out_are_named() {
        let (p1, p2, d1, d2) = (member("p1"), member("p2"), member("d1"), member("d2"));
        let probes = Probes { pairs: Vec::new(), left_out: vec![(&p1, &d2), (&p2, &d1), (&p1, &d1)] };
        let found = judge_pairs(&probes, Least { gigabytes_per_second: 0.1, round_trip_ms: 20.0 });
        let told: Vec<&str> = found.iter().map(|finding| finding.subject.as_str()).collect();
        assert_eq!(told, ["p1 -> d2, d1", "p2 -> d1"]);
        assert!(found.iter().all(|finding| finding.severity == Severity::NotChecked));
    }

    /// Workers that take each probe and never answer it cost what all probes may take, and not that for each pair.
    #[tokio::test]
    async fn all_probes_together_end_in_time() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = format!("http://{}", silent.local_addr().unwrap());
        let of = |role: &str, n: usize| {
            let one = |n| Member { role: role.into(), admin: admin.clone(), ..member(&format!("{role}{n}")) };
            (0..n).map(one).collect::<Vec<_>>()
        };
        let members = [of("prefill", 1), of("decode", 8)].concat();
        let (began, all) = (Instant::now(), Duration::from_millis(300));
        let probes = probe(&members.iter().collect::<Vec<_>>(), 4, None, Duration::from_secs(5), all).await;
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        assert_eq!((probes.pairs.len(), probes.left_out.len()), (0, 8));
    }

    #[test]
    fn pairs_must_get_through_to_the_one_that_is_meant_and_fast_enough() {
        let (prefill, decode) = (member("p1"), member("d1"));
        let least = Least { gigabytes_per_second: 0.1, round_trip_ms: 20.0 };
        let probed = |member: &str, rate, trip| {
            Ok(Probed { member: member.into(), round_trip_ms: trip, gigabytes_per_second: rate })
        };
        for (probed, severity) in [
            (probed("d1", 1.0, 0.3), Severity::Ok),
            (probed("d1", 0.05, 0.3), Severity::Warning),
            (probed("d1", 1.0, 50.0), Severity::Warning),
            (probed("d2", 1.0, 0.3), Severity::Error),
            (Err(Unprobed::Cut("refused".to_owned())), Severity::Error),
        ] {
            let pair = Pair { prefill: &prefill, decode: &decode, probed };
            assert_eq!(judge_pair(&pair, least).unwrap().severity, severity, "{:?}", pair.probed);
        }
    }

    /// A prefill worker that says with this status why it does not probe.
    async fn unwilling(status: &str, body: &str) -> Member {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = format!("http://{}", listener.local_addr().unwrap());
        let head =
            format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        let answer = head + body;
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        Member { role: "prefill".into(), admin, ..member("p1") }
    }

    /// Whoever does not try says nothing of the network, and once of all pairs.
    #[tokio::test]
    async fn who_does_not_try_is_passed_on_in_its_words() {
        let decodes = ["d1", "d2"].map(|id| Member { role: "decode".into(), ..member(id) });
        let least = Least { gigabytes_per_second: 0.1, round_trip_ms: 20.0 };
        for (status, severity, found) in [
            ("503 Service Unavailable", Severity::NotChecked, 1),
            ("404 Not Found", Severity::NotChecked, 1),
            ("403 Forbidden", Severity::NotChecked, 1),
            ("502 Bad Gateway", Severity::Error, 2),
        ] {
            let prefill = unwilling(status, r#"{"error": "the source is away"}"#).await;
            let members = [&prefill, &decodes[0], &decodes[1]];
            let probes = probe(&members, 4, None, Duration::from_secs(5), ALL_PROBES).await;
            let told = judge_pairs(&probes, least);
            assert_eq!((told.len(), told[0].severity), (found, severity), "{told:#?}");
            let words = if status.starts_with("403") { "--token-file" } else { "the source is away" };
            assert!(told[0].found.contains(words), "{told:#?}");
        }
    }
}
