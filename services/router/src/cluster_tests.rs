//! What the cluster view promises: credits come back, suspicion heals, prefixes are remembered within bounds.

use super::*;
use crate::policy::Lack;

fn settings() -> Settings {
    let credits = Credits { tokens: 1000, requests: 2 };
    Settings { credits, refusal: Duration::from_secs(1), prefix_blocks: 100 }
}

fn member(id: &str, role: Role, free: u32) -> Member {
    Member {
        id: id.into(),
        role: role as i32,
        block_tokens: 4,
        max_context: 400,
        max_sequences: 8,
        load: Some(Load { blocks_total: 10, blocks_free: free, ..Load::default() }),
        ..Member::default()
    }
}

fn view(members: &[Member]) -> View {
    View { members: members.to_vec(), revision: 1, connected: true, ..View::default() }
}

fn place(cluster: &Arc<Cluster>, tokens: u32) -> Result<Grant, Denied> {
    let prompt: Vec<u32> = (0..tokens).collect();
    let wanted = Wanted { tokens, total: tokens + 1, ..Wanted::default() };
    cluster.place(&wanted, &Prompt::new(&prompt), &HashSet::new())
}

#[tokio::test(start_paused = true)]
async fn what_is_placed_counts_until_it_is_reported_and_comes_back_when_it_ends() {
    let cluster = Cluster::new(settings());
    let [p, d] = [member("p", Role::Prefill, 10), member("d", Role::Decode, 10)];
    cluster.update(&view(&[p.clone(), d]));
    let mut first = place(&cluster, 20).unwrap();
    assert_eq!(
        place(&cluster, 20).err(),
        Some(Decision::Wait(Lack::DecodeRoom(vec!["d".into()]))),
        "6 of 10 blocks are taken"
    );
    first.decode.confirm();
    cluster.update(&view(&[p.clone(), member("d", Role::Decode, 4)]));
    assert!(place(&cluster, 12).is_ok(), "counted once, not twice");
    drop(first);
    assert!(place(&cluster, 35).is_ok(), "freed before the next report says so");
}

#[tokio::test(start_paused = true)]
async fn credits_come_back() {
    let cluster = Cluster::new(settings());
    cluster.update(&view(&[member("b", Role::Both, 10)]));
    let held: Vec<_> = (0..2).map(|_| place(&cluster, 2).unwrap()).collect();
    assert!(matches!(place(&cluster, 2), Err(Decision::Wait(_))));
    drop(held);
    assert!(place(&cluster, 2).is_ok());
}

#[tokio::test(start_paused = true)]
async fn suspicion_passes_with_an_answer_and_refusal_with_time_or_a_report() {
    let cluster = Cluster::new(settings());
    cluster.update(&view(&[member("b", Role::Both, 10)]));
    cluster.suspect("b");
    assert_eq!(place(&cluster, 2).err(), Some(Decision::NoMembers(Role::Prefill)));
    assert!(cluster.readiness().is_err());
    cluster.update(&view(&[member("b", Role::Both, 9)]));
    tokio::time::advance(Duration::from_secs(100)).await;
    assert!(place(&cluster, 2).is_err(), "membership hears of it, we do not");
    assert_eq!(cluster.suspects()[0].id, "b");
    cluster.trust("b");
    assert!(place(&cluster, 2).is_ok() && cluster.suspects().is_empty());
    cluster.refused("b");
    assert!(place(&cluster, 2).is_err());
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(place(&cluster, 2).is_ok());
    cluster.refused("b");
    cluster.update(&view(&[member("b", Role::Both, 10)]));
    assert!(place(&cluster, 2).is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_member_that_failed_a_request_is_shunned_by_it_for_a_pause() {
    let cluster = Cluster::new(settings());
    cluster.update(&view(&[member("b", Role::Both, 10)]));
    let wanted = Wanted {
        tokens: 2,
        total: 3,
        avoid: vec!["b".into()],
        shun_until: Some(Instant::now() + Duration::from_secs(1)),
        ..Wanted::default()
    };
    let again = || cluster.place(&wanted, &Prompt::new(&[1, 2]), &HashSet::new());
    assert!(again().is_err());
    assert!(place(&cluster, 2).is_ok(), "others go there");
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(again().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_member_that_left_gets_nothing_new_and_keeps_its_account() {
    let cluster = Cluster::new(settings());
    let both = member("b", Role::Both, 10);
    cluster.update(&view(std::slice::from_ref(&both)));
    let grant = place(&cluster, 20).unwrap();
    cluster.update(&view(&[]));
    assert!(matches!(place(&cluster, 2), Err(Decision::NoMembers(_))));
    assert!(cluster.members().is_empty());
    cluster.update(&view(&[both]));
    assert!(matches!(place(&cluster, 20), Err(Decision::Wait(_))), "what runs there still counts");
    drop(grant);
    cluster.update(&view(&[]));
    assert!(cluster.lock().members.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_repeated_prompt_returns_to_the_member_that_has_it() {
    let cluster = Cluster::new(settings());
    let members = ["a", "b", "c"].map(|id| member(id, Role::Both, 10));
    cluster.update(&view(&members));
    let first = place(&cluster, 16).unwrap().decode.member.id.clone();
    let again = place(&cluster, 16).unwrap();
    assert_eq!(again.decode.member.id, first);
    assert_eq!(again.uncached, 1, "one token is computed to sample the next from");
}

#[tokio::test(start_paused = true)]
async fn who_goes_without_leave_is_lost_and_a_silent_source_is_told() {
    let cluster = Cluster::new(settings());
    let [a, b, d] = ["a", "b", "d"].map(|id| member(id, Role::Decode, 10));
    let d = Member { draining: true, ..d };
    cluster.update(&view(&[a, b, d]));
    cluster.update(&View { left: ["a".into()].into(), ..view(&[]) });
    let lost: Vec<String> = cluster.lost(|_| None).into_iter().map(|lost| lost.member.unwrap().id).collect();
    assert_eq!(lost, ["b"], "a has left in good order, though nobody here saw it draining; d was seen");
    assert_eq!(cluster.stale(), None);
    cluster.update(&View { connected: false, ..view(&[]) });
    tokio::time::advance(Duration::from_secs(3)).await;
    cluster.update(&View { connected: false, ..view(&[]) });
    assert_eq!(cluster.stale(), Some(Duration::from_secs(3)));
    cluster.update(&view(&[member("c", Role::Decode, 10)]));
    assert_eq!((cluster.lost(|_| None).len(), cluster.stale()), (0, None), "c is in the place of b");
}
