//! The way from the queue to a placement: offers each free place to the first request in order, and takes
//! it back if the worker refuses. A request leaves the queue only when it holds a prefill credit and a
//! decode worker has reserved for it. Knows no sockets.

use crate::{
    cluster::{Cluster, Denied, Grant, Prompt},
    config,
    policy::{Decision, Lack, Wanted, no_members},
    queue::{Bounds, Full, Id, Joined, Place, Queue},
};
use proto::{Error, ErrorCode};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, timeout_at},
};

/// Suspicions and refusals end with time and tell nobody; a waiting queue looks again this often.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

pub struct Admission {
    pub cluster: Arc<Cluster>,
    queue: Mutex<Queue<Waiting>>,
    running: Arc<Semaphore>,
    running_limit: usize,
    queue_limit: usize,
}

/// What a request has to say when it joins the queue.
pub struct Ask {
    pub wanted: Wanted,
    pub prompt: Arc<Prompt>,
    pub place: Place,
    pub timeout: Duration,
    /// It holds a permit to run already.
    pub runs: bool,
}

/// A place, to be tried.
pub struct Offer {
    pub grant: Grant,
    /// Absent if the request held one already.
    pub permit: Option<Permit>,
}

/// A place among the running. When it is given back, the queue looks again.
pub struct Permit {
    place: Option<OwnedSemaphorePermit>,
    cluster: Arc<Cluster>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.place = None;
        self.cluster.wake();
    }
}

type Answer = Result<Offer, Error>;

struct Waiting {
    wanted: Wanted,
    prompt: Arc<Prompt>,
    runs: bool,
    answer: Option<oneshot::Sender<Answer>>,
}

/// A request's place in the queue; dropping it leaves.
pub struct Ticket {
    admission: Arc<Admission>,
    id: Id,
    wanted: Wanted,
    prompt: Arc<Prompt>,
    runs: bool,
    answer: oneshot::Receiver<Answer>,
    waits_since: Instant,
    pub deadline: Instant,
}

impl Admission {
    pub fn new(cluster: Arc<Cluster>, config: &config::Config) -> Arc<Self> {
        let bounds = Bounds { limit: config.queue.limit, ageing: config::ms(config.queue.ageing_ms) };
        Arc::new(Admission {
            cluster,
            queue: Mutex::new(Queue::new(bounds)),
            running: Arc::new(Semaphore::new(config.running)),
            running_limit: config.running,
            queue_limit: config.queue.limit,
        })
    }

    /// Offers places until cancelled.
    pub async fn run(&self) {
        loop {
            self.offer_places();
            let idle = self.lock().is_empty();
            let pause = if idle { Duration::from_secs(1) } else { LOOK_AGAIN };
            let _ = tokio::time::timeout(pause, self.cluster.changed()).await;
        }
    }

    pub fn join(self: &Arc<Self>, ask: Ask) -> Result<Ticket, Error> {
        let (sender, answer) = oneshot::channel();
        let Ask { wanted, prompt, place, timeout, runs } = ask;
        let waiting = Waiting { wanted: wanted.clone(), prompt: prompt.clone(), runs, answer: Some(sender) };
        let Joined { id, displaced } = self.lock().push(place, waiting).map_err(queue_full)?;
        if let Some((Waiting { answer: Some(sender), .. }, full)) = displaced {
            let _ = sender.send(Err(queue_full(full)));
        }
        self.cluster.wake();
        let now = Instant::now();
        let (admission, deadline) = (self.clone(), now + timeout);
        Ok(Ticket { admission, id, wanted, prompt, runs, answer, waits_since: now, deadline })
    }

    pub fn depths(&self) -> BTreeMap<i32, u32> {
        self.lock().depths()
    }

    pub fn queue_limit(&self) -> usize {
        self.queue_limit
    }

    /// Requests that are placed and not ended.
    pub fn running(&self) -> usize {
        self.running_limit - self.running.available_permits()
    }

    #[cfg(test)]
    pub fn busy(&self) -> bool {
        self.running() > 0 || !self.lock().is_empty()
    }

    fn offer_places(&self) {
        let mut queue = self.lock();
        let mut passed = Passed::default();
        while let Some((id, waiting)) = queue.first(Instant::now(), |id, waiting| !passed.over(id, waiting)) {
            let place = if waiting.runs { None } else { self.running.clone().try_acquire_owned().ok() };
            if place.is_none() && !waiting.runs {
                passed.newcomers = true;
                continue;
            }
            let answer = match self.cluster.place(&waiting.wanted, &waiting.prompt, &passed.held) {
                Ok(grant) => Ok(Offer { grant, permit: place.map(|place| self.permit(place)) }),
                Err(denied) => match verdict(&denied, &waiting.wanted) {
                    Some(error) => Err(error),
                    None => {
                        passed.by(id, &waiting.wanted, denied);
                        continue;
                    }
                },
            };
            let cost = answer.as_ref().map_or(0, |offer: &Offer| offer.grant.uncached.into());
            if let Some(sender) = queue.offer(id, cost).and_then(|waiting| waiting.answer.take()) {
                let _ = sender.send(answer);
            }
        }
    }

    fn permit(&self, place: OwnedSemaphorePermit) -> Permit {
        Permit { place: Some(place), cluster: self.cluster.clone() }
    }

    /// A place among the running without a placement.
    #[cfg(test)]
    pub fn run_unplaced(&self) -> Permit {
        self.permit(self.running.clone().try_acquire_owned().expect("a free place"))
    }

    fn lock(&self) -> MutexGuard<'_, Queue<Waiting>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who is passed over in this round. A request that waits keeps the members that could take it from all
/// behind it: taking turns by size would starve the large ones.
#[derive(Default)]
struct Passed {
    /// Members that one waits for.
    held: HashSet<String>,
    /// By model, tokens and total of those for which there was no place: whatever needs as much of both finds none.
    least: HashMap<String, Vec<(u32, u32)>>,
    ids: HashSet<Id>,
    /// All that hold no permit to run.
    newcomers: bool,
}

impl Passed {
    fn by(&mut self, id: Id, wanted: &Wanted, denied: Denied) {
        // Where its decode member is settled, or a failure a moment ago keeps it from others, it says nothing of others.
        if wanted.pinned.is_some() || wanted.is_shunning(Instant::now()) {
            self.ids.insert(id);
        } else {
            self.least.entry(wanted.model.clone()).or_default().push((wanted.tokens, wanted.total));
        }
        if let (None, Decision::Wait(Lack::DecodeRoom(members) | Lack::PrefillCredit(members))) =
            (&wanted.pinned, denied)
        {
            self.held.extend(members);
        }
    }

    fn over(&self, id: Id, waiting: &Waiting) -> bool {
        let Wanted { model, tokens, total, pinned, .. } = &waiting.wanted;
        let as_large = |(least, least_total): &(u32, u32)| tokens >= least && total >= least_total;
        let hopeless = pinned.is_none() && self.least.get(model).is_some_and(|of| of.iter().any(as_large));
        self.ids.contains(&id) || self.newcomers && !waiting.runs || hopeless
    }
}

impl Ticket {
    /// Waits for the next offer, or for the reason why there will be none.
    pub async fn offer(&mut self) -> Result<Offer, Error> {
        match timeout_at(self.deadline, &mut self.answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Error::new(ErrorCode::Internal, "the router's queue has stopped")),
            Err(_) => Err(self.expired()),
        }
    }

    /// Goes back to its place, with the offer that was refused given back.
    pub fn put_back(&mut self, refused: Offer, wanted: Wanted) {
        drop(refused);
        let (sender, answer) = oneshot::channel();
        self.answer = answer;
        self.wanted = wanted;
        let (wanted, prompt) = (self.wanted.clone(), self.prompt.clone());
        let waiting = Waiting { wanted, prompt, runs: self.runs, answer: Some(sender) };
        self.admission.lock().put_back(self.id, waiting);
        self.admission.cluster.wake();
    }

    /// Leaves the queue, placed. Returns how long it took.
    pub fn admit(self) -> Duration {
        self.admission.lock().admit(self.id, Instant::now());
        self.waits_since.elapsed()
    }

    /// The error for a wait that took too long.
    pub fn expired(&self) -> Error {
        let waited =
            format!("waited {:.1} s in the router's queue", self.waits_since.elapsed().as_secs_f32());
        match self.admission.cluster.lack(&self.wanted, &self.prompt) {
            Some(Decision::NoMembers(role)) => {
                Error::new(ErrorCode::NoMembers, format!("{} ({waited})", no_members(role)))
            }
            Some(Decision::Wait(Lack::DecodeRoom(_))) => {
                Error::new(ErrorCode::Deadline, format!("{waited}: every decode worker is full"))
            }
            Some(Decision::Wait(Lack::Absent)) => Error::new(
                ErrorCode::NoMembers,
                format!(
                    "{waited}: every worker that could hold its {} tokens is draining, does not answer or has too many blocks in quarantine",
                    self.wanted.total
                ),
            ),
            Some(_) => Error::new(ErrorCode::Deadline, format!("{waited}: every prefill worker is busy")),
            None => Error::new(ErrorCode::Deadline, format!("{waited}: its turn did not come")),
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.admission.lock().remove(self.id);
    }
}

/// The error for a request that waiting cannot help.
fn verdict(denied: &Denied, wanted: &Wanted) -> Option<Error> {
    match denied {
        // It holds a reservation that nobody can fill now; without it there may be a place for both.
        Decision::NoMembers(role) if wanted.pinned.is_some() => {
            Some(Error::new(ErrorCode::NoMembers, no_members(*role)))
        }
        Decision::TooLong { tokens, limit } => Some(Error::new(
            ErrorCode::ContextLength,
            format!(
                "prompt and max_tokens come to {tokens} tokens, but no worker can hold more than {limit}; shorten either"
            ),
        )),
        Decision::ModelNotFound => Some(Error::new(ErrorCode::ModelNotFound, "no worker serves this model")),
        Decision::Mismatch(reason) => Some(Error::new(
            ErrorCode::Mismatch,
            format!(
                "no prefill and decode workers match: {reason}; start them from the same model and version, on the same backend, with the same block_tokens and --transport"
            ),
        )),
        Decision::Place { .. } | Decision::Wait(_) | Decision::NoMembers(_) => None,
    }
}

fn queue_full(full: Full) -> Error {
    let wait = match full.predicted_wait {
        Some(wait) => format!("the predicted wait is {:.1} s", wait.as_secs_f32()),
        None => "nothing has left it yet".into(),
    };
    let message =
        format!("the router's queue is full: {0} of {0} requests wait, {wait}; try again later", full.limit);
    let error = Error::new(ErrorCode::QueueFull, message);
    full.predicted_wait.map_or(error.clone(), |wait| error.retry_after(wait))
}
