//! What all requests share: the model, the routers, the bounds, the places.

use crate::answer::{Bounds, Upstream};
use crate::cluster::{self, Seen};
use crate::config::ms;
use crate::history::{History, INTERVAL};
use crate::keys::{Caller, KeyRing};
use crate::looks::{Found, Looks};
use crate::model::Model;
use crate::record::Records;
use crate::{Config, Error};
use credentials::TokenFile;
use openai::Code;
use proto::StatusReply;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use telemetry::gateway::Metrics;
use telemetry::{Readiness, Spans};
use tokio::sync::{Semaphore, watch};
use tokio::time::{MissedTickBehavior, interval, timeout};

pub struct Gateway {
    pub config: Config,
    pub model: Arc<Model>,
    /// Names by which clients know the model.
    pub names: Vec<String>,
    pub upstream: Arc<Upstream>,
    pub metrics: Metrics,
    pub spans: Spans,
    /// Of the requests that ended last.
    pub records: Arc<Records>,
    /// `None`: everybody may ask.
    pub keys: Option<KeyRing>,
    /// `None`: nobody may give orders to workers here.
    pub admin_token: Option<TokenFile>,
    /// Places for requests.
    pub places: Arc<Semaphore>,
    /// Places for parsing and tokenising large bodies.
    pub tokenizers: Arc<Semaphore>,
    /// Turns true when running answers must end.
    pub closing: watch::Receiver<bool>,
    /// No new requests.
    draining: AtomicBool,
    /// Seconds since the epoch.
    pub started: u64,
    /// What the routers say.
    pub looks: Looks,
    ready: watch::Sender<Readiness>,
    history: Mutex<History>,
    /// Why nothing may be served, if workers have other files of the model.
    other_files: watch::Sender<Option<String>>,
    /// The workers' bound; 0 while unknown.
    cluster_context: watch::Sender<u32>,
}

/// For who asks whether this gateway is ready to hear how it is just now, and not how it was a moment ago.
const JUST_NOW: Duration = Duration::from_secs(1);

impl Gateway {
    pub fn new(
        config: Config,
        dial: &proto::Dial,
        (metrics, spans): (Metrics, Spans),
        closing: watch::Receiver<bool>,
    ) -> Result<Self, Error> {
        config.check().map_err(Error::Config)?;
        let model = Arc::new(Model::load(&config.model_dir, config.max_context)?);
        let upstream =
            Arc::new(Upstream::new(&config.routers, &config.timeouts, dial, metrics.resumed.clone())?);
        let keys = config.keys.file.as_deref().map(KeyRing::open).transpose()?;
        let admin_token = config.admin_token_file.clone().map(TokenFile::open).transpose();
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Ok(Gateway {
            names: names(&config),
            model,
            upstream,
            metrics,
            spans,
            records: Arc::default(),
            keys,
            admin_token: admin_token.map_err(Error::AdminToken)?,
            places: Arc::new(Semaphore::new(config.limits.concurrent_requests.min(Semaphore::MAX_PERMITS))),
            tokenizers: Arc::new(Semaphore::new(tokenizers(&config))),
            closing,
            draining: AtomicBool::new(false),
            started: since.as_secs(),
            looks: Looks::default(),
            ready: watch::Sender::new(Readiness::not("the router has not been asked yet")),
            other_files: watch::Sender::new(None),
            cluster_context: watch::Sender::new(0),
            history: Mutex::default(),
            config,
        })
    }

    pub fn readiness(&self) -> watch::Receiver<Readiness> {
        self.ready.subscribe()
    }

    /// Not ready from now on, whatever the routers say.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        self.tell(Readiness::default());
    }

    fn tell(&self, state: Readiness) {
        let draining = self.draining.load(Ordering::Relaxed);
        self.ready.send_replace(if draining { Readiness::not("draining") } else { state });
    }

    /// Lets what [`Self::readiness`] says be fresh, if the routers answer soon.
    pub async fn look_first(&self) {
        let _ = timeout(JUST_NOW, self.looks.fresh()).await;
    }

    async fn look(&self) -> Found {
        let found = self.upstream.statuses().await.map(Arc::new);
        self.judge(found.as_deref());
        found
    }

    /// Whether a request would succeed now.
    fn judge(&self, found: Result<&Seen, &proto::Error>) {
        let usable = match found {
            Ok(Seen { status, .. }) => {
                self.other_files.send_replace(self.find_other_files(status));
                self.check_files()
                    .map_err(|error| error.message)
                    .and_then(|()| cluster::usable(status, &self.config.worker_model))
            }
            Err(error) => Err(error.message.clone()),
        };
        let state = match usable {
            Ok(context) => {
                self.cluster_context.send_replace(context);
                Readiness::ready()
            }
            Err(reason) => Readiness::not(reason),
        };
        self.tell(state);
    }

    fn find_other_files(&self, status: &StatusReply) -> Option<String> {
        let Config { match_files, worker_model, model_dir, .. } = &self.config;
        let found = || cluster::other_files(status, worker_model, self.model.files, model_dir);
        match_files.then(found).flatten()
    }

    /// An error if token ids may mean other text to a worker.
    pub fn check_files(&self) -> Result<(), openai::Error> {
        match &*self.other_files.borrow() {
            Some(reason) => Err(self.overloaded(reason)),
            None => Ok(()),
        }
    }

    pub async fn keep_looking(&self) {
        self.looks.keep(|| self.look()).await;
    }

    pub fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub async fn keep_history(&self) {
        let mut pace = interval(INTERVAL);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            pace.tick().await;
            let seen = self.looks.fresh().await.ok();
            self.history().sample(&self.metrics, seen.as_deref());
        }
    }

    /// What holds for requests of `caller`.
    pub fn bounds(&self, caller: Option<&Caller>) -> Bounds {
        let limits = &self.config.limits;
        let own = caller.and_then(|caller| caller.priority_min).unwrap_or(limits.priority_min);
        Bounds {
            priorities: (own.clamp(limits.priority_min, limits.priority_max), limits.priority_max),
            max_context: self.max_context(),
            prompt_tokens: limits.prompt_tokens,
            sequences: limits.sequences,
            default_completion_tokens: self.config.default_completion_tokens,
        }
    }

    /// Of model and workers, the smaller.
    pub fn max_context(&self) -> u32 {
        match *self.cluster_context.borrow() {
            0 => self.model.max_context,
            context => context.min(self.model.max_context),
        }
    }

    pub fn check_model(&self, name: &str) -> Result<(), openai::Error> {
        if self.names.iter().any(|known| known == name) {
            return Ok(());
        }
        let message = format!(
            "The model {:?} does not exist; served here: {}",
            openai::shorten(name),
            self.names.join(", ")
        );
        Err(openai::Error::at(Code::ModelNotFound, "model", message))
    }

    pub fn overloaded(&self, message: &str) -> openai::Error {
        openai::Error::new(Code::Overloaded, message).retry_after(ms(self.config.timeouts.retry_after_ms))
    }
}

fn names(config: &Config) -> Vec<String> {
    if !config.served_model_name.is_empty() {
        return config.served_model_name.clone();
    }
    let absolute = std::fs::canonicalize(&config.model_dir).unwrap_or_else(|_| config.model_dir.clone());
    vec![absolute.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())]
}

fn tokenizers(config: &Config) -> usize {
    match config.limits.tokenizers {
        0 => std::thread::available_parallelism().map_or(1, |cores| cores.get()),
        some => some,
    }
}
