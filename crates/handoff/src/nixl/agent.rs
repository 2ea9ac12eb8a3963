//! NIXL's agent and the thread that owns it. Reads are posted in the order of asking and complete in any; a peer's
//! metadata is loaded with the first read from it and forgotten when others have taken its place.
//!
//! A read has ended when NIXL says of each piece that it has succeeded, and at no other time. NIXL cannot stop one: what it
//! calls cancelling leaves the copy under way, closing a connection waits for nothing, and of a read whose peer it was told to
//! forget it says that it is not found without having looked. So a peer is forgotten only while nothing is being asked for that
//! is read from it, a piece that has not ended is asked for as long as it takes, and one that failed is lost: it may still be written.

use crate::{
    Error,
    direct::{Direct, Piece},
};
use kv::{KvError, KvMemory, Region, Reply, Transfer};
use nixl_sys::{
    Agent, AgentConfig, MemType, MemoryRegion, NixlDescriptor, NixlError, OptArgs, RegistrationHandle,
    XferDescList, XferOp, XferRequest, XferStatus,
};
use std::{
    collections::{HashMap, HashSet, VecDeque},
    ffi::{c_int, c_void},
    mem,
    sync::{
        Arc, Once,
        mpsc::{self, Receiver, SendError, SyncSender, TryRecvError},
    },
    thread,
    time::{Duration, Instant},
};

/// Reads that wait for the thread. More than the windows of all deliveries that a worker takes at once; then asking waits.
const COMMANDS: usize = 1024;
/// Peers whose metadata is kept.
const PEERS: usize = 64;
/// Between looks at reads that are under way. A block of 4.5 MB takes about a millisecond.
const PAUSE: Duration = Duration::from_micros(20);
/// The library's own thread waits so long for a connection to have something for it, then looks by itself. By default it does
/// not wait at all, and takes a whole core for as long as the agent lives.
const DOZE: Duration = Duration::from_millis(1);
/// Nothing is read from a peer for so long after a read was lost: every one that fails costs a block for good.
const AFTER_LOSS: Duration = Duration::from_secs(60);
const PLUGIN: &str = "UCX";
const INSTALL: &str = "install NIXL (pip install --no-deps nixl==1.5.1 nixl-cu12==1.5.1) and start with \
    LD_LIBRARY_PATH=SITE/.nixl_cu12.mesonpy.libs:SITE/nixl_cu12.libs NIXL_PLUGIN_DIR=SITE/nixl_cu12.libs/nixl, SITE \
    being pip's site-packages, or use --transport grpc";

const STANDS_STILL: &str = "reads from it that took too long have not ended, and before they have no other begins; does that worker \
    stand still, or the way to it?";

const FAILED: &str = "a read from it failed in the last minute, and each that fails costs a block";

pub struct Nixl {
    origin: proto::Origin,
    commands: SyncSender<Command>,
}

enum Command {
    Read(proto::Origin, Vec<Piece>, Reply<()>),
    Sever(String),
}

/// Loads the library.
pub fn check() -> Result<(), Error> {
    match nixl_sys::is_stub() {
        true => Err(Error::Nixl(format!("libnixl_capi.so was not found; {INSTALL}"))),
        false => Ok(()),
    }
}

impl Nixl {
    pub fn open(member: &str, memory: &dyn KvMemory) -> Result<Arc<dyn Direct>, Error> {
        let region = memory.region().ok_or_else(|| {
            Error::Nixl(
                "the KV pool of this backend is not in host memory, and memory of a device is not registered yet; use \
                 --transport grpc"
                    .to_owned(),
            )
        })?;
        check()?;
        skip_finalisers();
        let (commands, received) = mpsc::sync_channel(COMMANDS);
        let (opened, outcome) = mpsc::channel();
        let name = member.to_owned();
        let run = move || match Watch::open(&name, region) {
            Ok((watch, origin)) => {
                let _ = opened.send(Ok(origin));
                watch.run(&received);
            }
            Err(error) => drop(opened.send(Err(error))),
        };
        thread::Builder::new()
            .name("nixl".to_owned())
            .spawn(run)
            .map_err(|error| failed("thread", &error))?;
        let origin = outcome.recv().map_err(|error| failed("thread", &error))??;
        Ok(Arc::new(Nixl { origin, commands }))
    }
}

impl Direct for Nixl {
    fn name(&self) -> &'static str {
        "nixl"
    }

    fn origin(&self) -> proto::Origin {
        self.origin.clone()
    }

    fn read(&self, origin: &proto::Origin, pieces: Vec<Piece>) -> Transfer<()> {
        let (reply, transfer) = kv::transfer();
        let command = Command::Read(origin.clone(), pieces, reply);
        if let Err(SendError(Command::Read(_, _, reply))) = self.commands.send(command) {
            let _ = reply.send(Err(KvError::Unreachable("NIXL's thread has ended".to_owned())));
        }
        transfer
    }

    fn sever(&self, origin: &proto::Origin) {
        let _ = self.commands.send(Command::Sever(origin.name.clone()));
    }
}

/// A library that UCX brings along (libnl-route) crashes in its finaliser when the process ends. By then all work is done, and
/// nothing that runs later is of use: the process ends before, with the status it was to have.
fn skip_finalisers() {
    unsafe extern "C" {
        fn on_exit(function: extern "C" fn(c_int, *mut c_void), argument: *mut c_void) -> c_int;
        fn _exit(status: c_int) -> !;
    }
    extern "C" fn end(status: c_int, _: *mut c_void) {
        // SAFETY: ends the process.
        unsafe { _exit(status) }
    }
    static ONCE: Once = Once::new();
    // SAFETY: glibc's, and the function lives as long as the process.
    ONCE.call_once(|| {
        let _ = unsafe { on_exit(end, std::ptr::null_mut()) };
    });
}

fn failed(what: &str, error: &dyn std::fmt::Display) -> Error {
    Error::Nixl(format!("{what}: {error}"))
}

/// What NIXL may reach of this process.
#[derive(Debug)]
struct Registered(Region);

impl MemoryRegion for Registered {
    unsafe fn as_ptr(&self) -> *const u8 {
        self.0.address as *const u8
    }

    fn size(&self) -> usize {
        self.0.bytes
    }
}

impl NixlDescriptor for Registered {
    fn mem_type(&self) -> MemType {
        MemType::Dram
    }

    fn device_id(&self) -> u64 {
        0
    }
}

/// The thread's own. Fields are dropped in order: reads, then the registration, then the agent, then what was registered. None
/// is once a read was lost: it may use them all.
struct Watch {
    flying: Vec<Flying>,
    _registration: RegistrationHandle,
    agent: Agent,
    options: OptArgs,
    /// Least recently used first.
    peers: VecDeque<String>,
    /// Nothing more is read from these before they are forgotten, which waits for what is being read from them.
    severed: HashSet<String>,
    /// When a read from whom was lost the last time.
    lost: HashMap<String, Instant>,
    _region: Arc<Registered>,
}

struct Flying {
    /// A request for each piece that has not ended: of one for several NIXL keeps the last only.
    pieces: Vec<XferRequest>,
    /// Why the end of a piece will never be known.
    lost: Option<NixlError>,
    peer: String,
    reply: Reply<()>,
}

impl Watch {
    fn open(name: &str, region: Region) -> Result<(Watch, proto::Origin), Error> {
        let config = AgentConfig { pthr_delay_us: DOZE.as_micros() as u64, ..AgentConfig::default() };
        let agent = Agent::new_configured(name, &config).map_err(|error| failed("agent", &error))?;
        let unusable =
            |error: NixlError| failed(&format!("its plugin {PLUGIN} cannot be used; {INSTALL}"), &error);
        let (_, parameters) = agent.get_plugin_params(PLUGIN).map_err(unusable)?;
        let backend = agent.create_backend(PLUGIN, &parameters).map_err(|error| {
            failed(
                "UCX finds no transport with error handling; set UCX_TLS, for example tcp,cma,self",
                &error,
            )
        })?;
        let mut options = OptArgs::new().map_err(unusable)?;
        options.add_backend(&backend).map_err(unusable)?;
        let region = Arc::new(Registered(region));
        let registration = agent.register_memory(&*region, Some(&options)).map_err(|error| {
            failed("the KV pool cannot be registered; is the limit of locked memory too low?", &error)
        })?;
        let metadata = agent.get_local_md().map_err(|error| failed("metadata", &error))?;
        let origin = proto::Origin { name: name.to_owned(), metadata: metadata.into() };
        let watch = Watch {
            flying: Vec::new(),
            _registration: registration,
            agent,
            options,
            peers: VecDeque::new(),
            severed: HashSet::new(),
            lost: HashMap::new(),
            _region: region,
        };
        Ok((watch, origin))
    }

    /// Until nobody can ask any more and every read has ended.
    fn run(mut self, commands: &Receiver<Command>) {
        loop {
            let command = match self.flying.is_empty() {
                true => commands.recv().map_err(|_| TryRecvError::Disconnected),
                false => commands.try_recv(),
            };
            match command {
                Ok(Command::Read(origin, pieces, reply)) => self.begin(&origin, &pieces, reply),
                Ok(Command::Sever(peer)) => drop(self.severed.insert(peer)),
                Err(TryRecvError::Disconnected) if self.flying.is_empty() => return self.end(),
                Err(_) => self.look(),
            }
            self.forget_severed();
        }
    }

    fn end(self) {
        if !self.lost.is_empty() {
            mem::forget(self);
        }
    }

    fn begin(&mut self, origin: &proto::Origin, pieces: &[Piece], reply: Reply<()>) {
        let peer = origin.name.clone();
        if let Some(why) = self.refuses(&peer) {
            let _ = reply.send(Err(unreachable(&peer, &why)));
            return;
        }
        match self.prepare(origin, pieces) {
            Ok(requests) => self.post(requests, Flying { pieces: Vec::new(), lost: None, peer, reply }),
            Err(error) => {
                let _ = reply.send(Err(unreachable(&peer, &error)));
                // Whatever is wrong with what is known of it: a later read loads it anew.
                self.severed.insert(peer);
            }
        }
    }

    fn refuses(&self, peer: &str) -> Option<&'static str> {
        let failed = self.lost.get(peer).is_some_and(|at| at.elapsed() < AFTER_LOSS);
        let stands_still = self.severed.contains(peer);
        stands_still.then_some(STANDS_STILL).or(failed.then_some(FAILED))
    }

    /// An error does not say whether something was begun.
    fn post(&mut self, requests: Vec<XferRequest>, mut flying: Flying) {
        for request in requests {
            match self.agent.post_xfer_req(&request, None) {
                Ok(_) => flying.pieces.push(request),
                Err(error) => {
                    flying.lose(request, error);
                    break;
                }
            }
        }
        self.flying.push(flying);
    }

    /// Nothing is read yet.
    fn prepare(&mut self, origin: &proto::Origin, pieces: &[Piece]) -> Result<Vec<XferRequest>, NixlError> {
        self.know(origin)?;
        pieces.iter().map(|piece| self.request(&origin.name, piece)).collect()
    }

    fn request(&self, peer: &str, piece: &Piece) -> Result<XferRequest, NixlError> {
        let (mut from, mut to) = (XferDescList::new(MemType::Dram)?, XferDescList::new(MemType::Dram)?);
        from.add_desc(piece.from, piece.bytes, 0);
        to.add_desc(piece.to, piece.bytes, 0);
        self.agent.create_xfer_req(XferOp::Read, &to, &from, peer, Some(&self.options))
    }

    /// Makes the peer the one used last.
    fn know(&mut self, origin: &proto::Origin) -> Result<(), NixlError> {
        match self.peers.iter().position(|peer| *peer == origin.name) {
            Some(at) => drop(self.peers.remove(at)),
            None => {
                self.agent.load_remote_md(&origin.metadata)?;
                self.make_room();
            }
        }
        self.peers.push_back(origin.name.clone());
        Ok(())
    }

    /// Peers from which something is being read stay.
    fn make_room(&mut self) {
        if self.peers.len() >= PEERS
            && let Some(oldest) = self.peers.iter().find(|peer| !self.reads_from(peer)).cloned()
        {
            self.forget(&oldest);
        }
    }

    fn reads_from(&self, peer: &str) -> bool {
        self.flying.iter().any(|flying| flying.peer == *peer)
    }

    /// The next read from each loads it anew.
    fn forget_severed(&mut self) {
        let idle: Vec<String> = self.severed.iter().filter(|peer| !self.reads_from(peer)).cloned().collect();
        for peer in idle {
            self.severed.remove(&peer);
            self.forget(&peer);
        }
    }

    /// Closes the connection. To be called only while nothing is being read from the peer.
    fn forget(&mut self, peer: &str) {
        self.peers.retain(|known| known != peer);
        if let Err(error) = self.agent.invalidate_remote_md(peer) {
            tracing::debug!(peer, %error, "NIXL did not know this peer");
        }
    }

    /// Answers every read that has ended, and waits a little if none has.
    fn look(&mut self) {
        let before = self.flying.len();
        for mut flying in mem::take(&mut self.flying) {
            flying.look(&self.agent);
            match flying.pieces.is_empty() {
                true => self.tell(flying),
                false => self.flying.push(flying),
            }
        }
        if self.flying.len() == before {
            thread::sleep(self.pause());
        }
    }

    /// What has taken too long already may take hours.
    fn pause(&self) -> Duration {
        let hurried = self.flying.iter().any(|flying| !self.severed.contains(&flying.peer));
        if hurried { PAUSE } else { DOZE }
    }

    fn tell(&mut self, Flying { lost, peer, reply, .. }: Flying) {
        let ended = lost.map_or(Ok(()), |error| Err(KvError::Lost(format!("NIXL, from {peer}: {error}"))));
        if ended.is_err() {
            self.lost.insert(peer.clone(), Instant::now());
            // NIXL wants the connection made anew after an error.
            self.severed.insert(peer);
        }
        let _ = reply.send(ended);
    }
}

impl Flying {
    /// What has ended is released before anybody is told, who may use the memory.
    fn look(&mut self, agent: &Agent) {
        for request in mem::take(&mut self.pieces) {
            match agent.get_xfer_status(&request) {
                Ok(XferStatus::InProgress) => self.pieces.push(request),
                Ok(XferStatus::Success) => drop(request),
                Err(error) => self.lose(request, error),
            }
        }
    }

    /// After an error NIXL looks no more at what it has not seen end, and may use the request for it. So it is kept.
    fn lose(&mut self, request: XferRequest, error: NixlError) {
        mem::forget(request);
        self.lost = Some(error);
    }
}

fn unreachable(peer: &str, error: &dyn std::fmt::Display) -> KvError {
    KvError::Unreachable(format!("NIXL, from {peer}: {error}"))
}
