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
    collections::{BTreeMap, HashSet},
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
    pub permit: Option<OwnedSemaphorePermit>,
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

    pub fn busy(&self) -> bool {
        self.running() > 0 || !self.lock().is_empty()
    }

    fn offer_places(&self) {
        let mut queue = self.lock();
        let mut passed = Passed::default();
        while let Some((id, waiting)) = queue.first(Instant::now(), |id, waiting| !passed.over(id, waiting)) {
            let permit = match self.permit(waiting) {
                Ok(permit) => permit,
                Err(()) => {
                    passed.newcomers = true;
                    continue;
                }
            };
            let answer = match self.cluster.place(&waiting.wanted, &waiting.prompt) {
                Ok(grant) => Ok(Offer { grant, permit }),
                Err(denied) => match verdict(&denied, &waiting.wanted) {
                    Some(error) => Err(error),
                    None => {
                        passed.by(id, waiting);
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

    fn permit(&self, waiting: &Waiting) -> Result<Option<OwnedSemaphorePermit>, ()> {
        if waiting.runs {
            return Ok(None);
        }
        self.running.clone().try_acquire_owned().map(Some).map_err(|_| ())
    }

    fn lock(&self) -> MutexGuard<'_, Queue<Waiting>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who is passed over in this round. A request that waits holds up all behind it that could go to the same
/// members: taking turns by size would starve the large ones.
#[derive(Default)]
struct Passed {
    models: HashSet<String>,
    ids: HashSet<Id>,
    /// All that hold no permit to run.
    newcomers: bool,
}

impl Passed {
    /// A request whose decode member is settled waits for itself alone.
    fn by(&mut self, id: Id, waiting: &Waiting) {
        match waiting.wanted.pinned {
            Some(_) => self.ids.insert(id),
            None => self.models.insert(waiting.wanted.model.clone()),
        };
    }

    fn over(&self, id: Id, waiting: &Waiting) -> bool {
        let model = &waiting.wanted.model;
        let any = !self.models.is_empty() && (model.is_empty() || self.models.contains(""));
        self.ids.contains(&id) || self.newcomers && !waiting.runs || any || self.models.contains(model)
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
            Some(Decision::Wait(Lack::DecodeRoom)) => {
                Error::new(ErrorCode::Deadline, format!("{waited}: every decode worker is full"))
            }
            _ => Error::new(ErrorCode::Deadline, format!("{waited}: every prefill worker is busy")),
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
