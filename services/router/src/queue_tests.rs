//! Order, bounds, fairness and ageing of the queue.

use super::*;
use proptest::prelude::*;

const AGEING: Duration = Duration::from_secs(10);

fn queue(limit: usize) -> Queue<u32> {
    Queue::new(Bounds { limit, ageing: AGEING })
}

fn place(tenant: &str, priority: i32, arrival: Instant) -> Place {
    Place { tenant: tenant.into(), priority, arrival, resumed: false }
}

/// Takes the first request out at a cost of 100 tokens.
fn serve(queue: &mut Queue<u32>, now: Instant) -> Option<u32> {
    serve_if(queue, now, 100, |_| true)
}

/// Takes the first request that may go out at this cost.
fn serve_if(queue: &mut Queue<u32>, now: Instant, cost: u64, may: impl Fn(u32) -> bool) -> Option<u32> {
    let (id, item) = queue.first(now, |_, item| may(*item))?;
    let item = *item;
    queue.offer(id, cost);
    queue.admit(id, now);
    Some(item)
}

#[test]
fn lower_priority_goes_first_then_arrival() {
    let (mut queue, now) = (queue(8), Instant::now());
    for (item, priority) in [(0, 1), (1, 0), (2, 0), (3, -1)] {
        queue.push(place("a", priority, now + Duration::from_millis(item)), item as u32).unwrap();
    }
    let order: Vec<_> = std::iter::from_fn(|| serve(&mut queue, now)).collect();
    assert_eq!(order, [3, 1, 2, 0]);
}

/// Full with two, after three departures, one a second.
fn full_of_two(now: Instant) -> Queue<u32> {
    let mut queue = queue(2);
    queue.push(place("a", 0, now), 0).unwrap();
    for second in 0..3 {
        queue.push(place("a", 0, now), 0).unwrap();
        serve(&mut queue, now + Duration::from_secs(second));
    }
    queue.push(place("a", 0, now), 1).unwrap();
    queue
}

#[test]
fn a_full_queue_says_how_long_it_would_take() {
    let now = Instant::now();
    let mut queue = full_of_two(now);
    let full = queue.push(place("a", 0, now), 2).unwrap_err();
    assert_eq!(full, Full { limit: 2, predicted_wait: Some(Duration::from_secs(2)) });
    let resumed = Place { resumed: true, ..place("a", 0, now + AGEING / 2) };
    queue.push(resumed, 3).expect("what was placed before is never refused");
    assert_eq!(serve(&mut queue, now + AGEING / 2), Some(3), "and goes first in its class");
}

#[test]
fn a_departure_that_is_overdue_counts_in_the_rate() {
    let now = Instant::now();
    let mut queue = full_of_two(now);
    let mut predicted = |second| {
        let place = place("a", 0, now + Duration::from_secs(second));
        queue.push(place, 2).unwrap_err().predicted_wait
    };
    assert_eq!(predicted(3), Some(Duration::from_secs(2)), "the next is due now");
    assert_eq!(predicted(9), Some(Duration::from_secs(6)), "three gaps in nine seconds");
}

#[test]
fn a_quiet_hour_is_not_in_the_rate() {
    let now = Instant::now();
    let (mut queue, later) = (full_of_two(now), now + Duration::from_secs(3600));
    while serve(&mut queue, now + Duration::from_secs(3)).is_some() {}
    for _ in 0..2 {
        queue.push(place("a", 0, later), 0).unwrap();
    }
    let full = queue.push(place("a", 0, later), 0).unwrap_err();
    assert_eq!(full.predicted_wait, None, "nothing has left since");
    for millis in 0..2 {
        serve(&mut queue, later + Duration::from_millis(millis));
        queue.push(place("a", 0, later), 0).unwrap();
    }
    let full = queue.push(place("a", 0, later), 0).unwrap_err();
    assert_eq!(full.predicted_wait, Some(Duration::from_millis(2)));
}

#[test]
fn a_full_queue_makes_room_for_a_tenant_that_has_less_of_it() {
    let (mut queue, now) = (queue(7), Instant::now());
    let at = |priority, millis| place("flood", priority, now + Duration::from_millis(millis));
    for (item, priority) in [(0, 1), (1, 1), (2, 0), (3, 0), (4, 0)] {
        queue.push(at(priority, item), item as u32).unwrap();
    }
    queue.push(Place { resumed: true, ..at(1, 8) }, 5).unwrap();
    let under_trial = queue.push(at(1, 9), 6).unwrap().id;
    queue.offer(under_trial, 100);
    let full = Full { limit: 7, predicted_wait: None };
    let mut push = |tenant| Ok(queue.push(place(tenant, 0, now + AGEING / 2), 10)?.displaced);
    assert_eq!(push("flood"), Err(full.clone()), "nobody displaces himself");
    assert_eq!(push("quiet"), Ok(Some((1, full.clone()))), "the last of the lowest class");
    assert_eq!(push("quiet"), Ok(Some((0, full.clone()))));
    assert_eq!(push("quiet"), Err(full.clone()), "two and three: another would only turn them round");
    assert_eq!(push("third"), Ok(Some((4, full))));
    assert_eq!(queue.entries.len(), 7);
}

#[test]
fn a_refused_placement_keeps_its_place_and_its_tenant_pays_nothing() {
    let (mut queue, now) = (queue(8), Instant::now());
    let first = queue.push(place("a", 0, now), 0).unwrap().id;
    queue.push(place("a", 0, now + Duration::from_millis(1)), 1).unwrap();
    queue.push(place("b", 0, now + Duration::from_millis(2)), 2).unwrap();
    queue.offer(first, 1_000_000);
    assert_eq!(
        queue.first(now, |_, _| true).map(|(_, item)| *item),
        Some(2),
        "offered ones are out of the order"
    );
    queue.put_back(first, 0);
    assert_eq!(serve(&mut queue, now), Some(0));
}

#[test]
fn who_leaves_while_a_placement_is_tried_owes_nothing() {
    let (mut queue, now) = (queue(8), Instant::now());
    let first = queue.push(place("a", 0, now), 0).unwrap().id;
    queue.offer(first, 1_000_000);
    queue.remove(first);
    queue.push(place("b", 0, now + Duration::from_millis(1)), 2).unwrap();
    queue.push(place("a", 0, now), 1).unwrap();
    assert_eq!(serve(&mut queue, now), Some(1), "equal accounts: by arrival");
}

#[test]
fn refused_placements_do_not_set_newcomers_back() {
    let (mut queue, now) = (queue(8), Instant::now());
    let first = queue.push(place("a", 0, now), 0).unwrap().id;
    queue.push(place("a", 0, now), 1).unwrap();
    for _ in 0..100 {
        queue.offer(first, 1000);
        queue.put_back(first, 0);
    }
    queue.push(place("b", 0, now + Duration::from_millis(1)), 2).unwrap();
    assert_eq!(serve(&mut queue, now), Some(0));
    assert_eq!(serve(&mut queue, now), Some(2), "b pays for what a was refused");
}

#[test]
fn a_flood_of_one_tenant_does_not_hold_up_another() {
    let (mut queue, start) = (queue(200), Instant::now());
    for item in 0..100 {
        queue.push(place("flood", 0, start), item).unwrap();
    }
    let later = start + 5 * AGEING;
    queue.push(place("quiet", 0, later), 1000).unwrap();
    serve(&mut queue, later);
    let second = serve(&mut queue, later);
    let third = serve(&mut queue, later);
    assert!([second, third].contains(&Some(1000)), "{second:?} {third:?}");
}

#[test]
fn equal_tenants_get_equal_tokens() {
    let (mut queue, now) = (queue(400), Instant::now());
    for item in 0..100 {
        queue.push(place("long", 0, now), item).unwrap();
        queue.push(place("short", 0, now), 1000 + item).unwrap();
    }
    let (mut long, mut short) = (0u64, 0u64);
    for _ in 0..110 {
        let (id, item) = queue.first(now, |_, _| true).unwrap();
        let (taken, cost) = if *item < 1000 { (&mut long, 1000) } else { (&mut short, 100) };
        *taken += cost;
        queue.offer(id, cost);
        queue.admit(id, now);
    }
    assert!(long.abs_diff(short) <= 1000, "{long} {short}");
}

/// Serves `rounds` times at `cost` while a tenant never seen before joins each time; whether `old` was served.
fn outlasts_newcomers(queue: &mut Queue<u32>, rounds: u32, cost: u64, now: Instant) -> bool {
    (0..rounds).any(|round| {
        queue.push(place(&format!("new{round}"), 0, now + Duration::from_secs(1)), round).unwrap();
        serve_if(queue, now + Duration::from_secs(2), cost, |_| true) == Some(u32::MAX)
    })
}

#[test]
fn what_a_tenant_had_is_forgiven_in_time_and_idleness_earns_nothing() {
    let (mut queue, now) = (queue(64), Instant::now());
    for _ in 0..5 {
        queue.push(place("idle", 0, now), 0).unwrap();
        queue.push(place("old", 0, now), 1).unwrap();
        serve(&mut queue, now);
        serve(&mut queue, now);
    }
    queue.push(place("idle", 0, now), 0).unwrap();
    queue.push(place("old", 0, now), u32::MAX).unwrap();
    assert!(outlasts_newcomers(&mut queue, 20, 100, now), "newcomers go first for ever");
    let fresh = place("late", 0, now + AGEING / 2);
    queue.push(fresh, 7).unwrap();
    assert!(queue.shares[&0].account("late") > 0, "a newcomer does not catch up on the past");
}

/// How many of the next eight served are of a tenant that joins now. Odd items cannot be served.
fn newcomer_of_eight(queue: &mut Queue<u32>, cost: u64, now: Instant) -> usize {
    for _ in 0..8 {
        queue.push(place("new", 0, now), 1000).unwrap();
    }
    let served = (0..8).filter_map(|_| serve_if(queue, now, cost, |item| item.is_multiple_of(2)));
    served.filter(|item| *item == 1000).count()
}

#[test]
fn a_newcomer_starts_where_its_class_is_served_whoever_waits_in_another() {
    let (mut queue, now) = (queue(64), Instant::now());
    for tenant in 0..9 {
        queue.push(place(&tenant.to_string(), 10, now), 1).unwrap();
    }
    for _ in 0..30 {
        queue.push(place("busy", 0, now), 2).unwrap();
    }
    for _ in 0..20 {
        assert_eq!(serve(&mut queue, now), Some(2));
    }
    let share = newcomer_of_eight(&mut queue, 100, now);
    assert!((3..=5).contains(&share), "{share} of 8");
}

#[test]
fn a_flood_that_waits_behind_another_class_does_not_hold_up_who_comes_later() {
    let (mut queue, now) = (queue(400), Instant::now());
    for _ in 0..100 {
        queue.push(place("flood", 10, now), 1).unwrap();
        queue.push(place("busy", 0, now), 0).unwrap();
        assert_eq!(serve(&mut queue, now), Some(0));
    }
    queue.push(place("quiet", 10, now), 1000).unwrap();
    assert!([serve(&mut queue, now), serve(&mut queue, now)].contains(&Some(1000)));
}

#[test]
fn a_newcomer_starts_where_others_are_served_whoever_cannot_be() {
    let (mut queue, now) = (queue(64), Instant::now());
    for tenant in 0..9 {
        queue.push(place(&tenant.to_string(), 0, now), 1).unwrap();
    }
    for _ in 0..30 {
        queue.push(place("busy", 0, now), 2).unwrap();
    }
    for _ in 0..20 {
        assert_eq!(serve_if(&mut queue, now, 100, |item| item == 2), Some(2));
    }
    let share = newcomer_of_eight(&mut queue, 100, now);
    assert!((3..=5).contains(&share), "{share} of 8");
}

#[test]
fn costs_below_the_number_of_tenants_count_too() {
    let (mut queue, now) = (queue(400), Instant::now());
    for tenant in (0..10).cycle().take(300) {
        queue.push(place(&tenant.to_string(), 0, now), 2).unwrap();
    }
    for _ in 0..200 {
        serve_if(&mut queue, now, 1, |_| true);
    }
    let share = newcomer_of_eight(&mut queue, 1, now);
    assert!(share <= 2, "{share} of 8 for one of eleven");
}

#[test]
fn newcomers_at_almost_no_cost_do_not_go_first_for_ever() {
    let (mut queue, now) = (queue(64), Instant::now());
    queue.push(place("old", 0, now), 0).unwrap();
    queue.push(place("other", 0, now), 1).unwrap();
    assert_eq!(serve(&mut queue, now), Some(0));
    queue.push(place("old", 0, now), u32::MAX).unwrap();
    assert!(outlasts_newcomers(&mut queue, 200, 1, now), "newcomers go first for ever");
}

#[test]
fn accounts_of_tenants_that_left_are_forgotten() {
    let (mut queue, now) = (queue(4), Instant::now());
    for tenant in 0..1000 {
        queue.push(place(&tenant.to_string(), tenant % 40, now), 0).unwrap();
        serve(&mut queue, now);
    }
    assert!(queue.accounts() <= 16, "{}", queue.accounts());
}

proptest! {
    /// A steady stream of more urgent requests, from tenants never seen before, at exactly the rate of
    /// service: a request of the least class is still served once it has aged past them.
    #[test]
    fn nothing_starves(priority in 1..6i32, gap_ms in 50u64..2000, tenants in 1..50u64) {
        let (mut queue, start) = (queue(64), Instant::now());
        queue.push(place("patient", priority, start), u32::MAX).unwrap();
        let bound = AGEING * (priority as u32 + 2);
        let mut now = start;
        for round in 0.. {
            now += Duration::from_millis(gap_ms);
            queue.push(place(&(round % tenants).to_string(), 0, now), 0).unwrap();
            if serve(&mut queue, now) == Some(u32::MAX) {
                break;
            }
            prop_assert!(now - start < bound, "waits {:?} with {} in the queue", now - start, queue.entries.len());
        }
    }

    /// Whatever happens, the bound holds, and every request leaves exactly once.
    #[test]
    fn bounded_and_complete(steps in prop::collection::vec((0..4u8, 0..5i32, 0..4u8), 1..200)) {
        let (mut queue, now) = (queue(10), Instant::now());
        let (mut entered, mut left, mut offered) = (0u32, 0u32, Vec::new());
        for (what, priority, tenant) in steps {
            match what {
                0 | 1 => match queue.push(place(&tenant.to_string(), priority, now), entered) {
                    Ok(joined) => {
                        entered += 1;
                        left += u32::from(joined.displaced.is_some());
                    },
                    Err(full) => prop_assert_eq!((queue.entries.len(), full.limit), (10, 10)),
                },
                2 => if let Some((id, _)) = queue.first(now, |_, _| true) {
                    prop_assert!(!offered.contains(&id), "offered twice");
                    queue.offer(id, 10);
                    offered.push(id);
                },
                _ => if let Some(id) = offered.pop() {
                    if priority == 0 { queue.put_back(id, 0) } else { queue.admit(id, now); left += 1 }
                },
            }
            prop_assert!(queue.entries.len() <= 10);
            prop_assert!(offered.iter().all(|id| queue.entries.contains_key(id)), "displaced under trial");
            prop_assert_eq!(queue.entries.len() as u32, entered - left);
            prop_assert_eq!(queue.depths().values().sum::<u32>() as usize, queue.entries.len());
        }
    }
}
