//! NIXL's agent and the thread that owns it. Reads are posted in the order of asking and complete in any; a peer's
//! metadata is loaded with the first read from it and forgotten when others have taken its place.

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
    collections::VecDeque,
    ffi::{c_int, c_void},
    sync::{
        Arc, Once,
        mpsc::{self, Receiver, SyncSender, TryRecvError},
    },
    thread,
    time::Duration,
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
const PLUGIN: &str = "UCX";
const INSTALL: &str = "install NIXL (pip install --no-deps nixl==1.5.1 nixl-cu12==1.5.1) and start with \
    LD_LIBRARY_PATH=SITE/.nixl_cu12.mesonpy.libs:SITE/nixl_cu12.libs NIXL_PLUGIN_DIR=SITE/nixl_cu12.libs/nixl, SITE \
    being pip's site-packages, or use --transport grpc";

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
        let _ = self.commands.send(Command::Read(origin.clone(), pieces, reply));
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

/// The thread's own. Fields are dropped in order: reads, then the registration, then the agent, then what was registered.
struct Watch {
    flying: Vec<Flying>,
    _registration: RegistrationHandle,
    agent: Agent,
    options: OptArgs,
    /// Least recently used first.
    peers: VecDeque<String>,
    _region: Arc<Registered>,
}

struct Flying {
    request: XferRequest,
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
        let (flying, peers) = (Vec::new(), VecDeque::new());
        let watch = Watch { flying, _registration: registration, agent, options, peers, _region: region };
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
                Ok(Command::Sever(peer)) => self.forget(&peer),
                Err(TryRecvError::Disconnected) if self.flying.is_empty() => return,
                Err(_) => self.look(),
            }
        }
    }

    fn begin(&mut self, origin: &proto::Origin, pieces: &[Piece], reply: Reply<()>) {
        match self.post(origin, pieces) {
            Ok(request) => self.flying.push(Flying { request, peer: origin.name.clone(), reply }),
            Err(error) => {
                // Whatever is wrong with what is known of it: the next read loads it anew.
                self.forget(&origin.name);
                let _ = reply.send(Err(unreachable(&origin.name, &error)));
            }
        }
    }

    fn post(&mut self, origin: &proto::Origin, pieces: &[Piece]) -> Result<XferRequest, NixlError> {
        self.know(origin)?;
        let (mut from, mut to) = (XferDescList::new(MemType::Dram)?, XferDescList::new(MemType::Dram)?);
        for piece in pieces {
            from.add_desc(piece.from, piece.bytes, 0);
            to.add_desc(piece.to, piece.bytes, 0);
        }
        let options = Some(&self.options);
        let request = self.agent.create_xfer_req(XferOp::Read, &to, &from, &origin.name, options)?;
        self.agent.post_xfer_req(&request, None)?;
        Ok(request)
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
        let busy = |peer: &String| self.flying.iter().any(|flying| flying.peer == *peer);
        if self.peers.len() >= PEERS
            && let Some(oldest) = self.peers.iter().find(|peer| !busy(peer)).cloned()
        {
            self.forget(&oldest);
        }
    }

    /// Closes the connection; reads under way through it then end.
    fn forget(&mut self, peer: &str) {
        self.peers.retain(|known| known != peer);
        if let Err(error) = self.agent.invalidate_remote_md(peer) {
            tracing::debug!(peer, %error, "NIXL did not know this peer");
        }
    }

    /// Answers every read that has ended, and waits a little if none has.
    fn look(&mut self) {
        let before = self.flying.len();
        let (agent, mut still) = (&self.agent, Vec::with_capacity(before));
        for flying in self.flying.drain(..) {
            match agent.get_xfer_status(&flying.request) {
                Ok(XferStatus::InProgress) => still.push(flying),
                Ok(XferStatus::Success) => flying.end(Ok(())),
                Err(error) => {
                    let error = unreachable(&flying.peer, &error);
                    flying.end(Err(error));
                }
            }
        }
        self.flying = still;
        if self.flying.len() == before {
            thread::sleep(PAUSE);
        }
    }
}

impl Flying {
    /// Released first: whoever is told may use the memory.
    fn end(self, outcome: Result<(), KvError>) {
        let Flying { request, reply, .. } = self;
        drop(request);
        let _ = reply.send(outcome);
    }
}

fn unreachable(peer: &str, error: &NixlError) -> KvError {
    KvError::Unreachable(format!("NIXL, from {peer}: {error}"))
}
