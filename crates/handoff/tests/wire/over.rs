//! The transports that every test runs over: gRPC, reads within this process that can be made to hang, and NIXL where it was
//! built in and is installed.

use crate::memory::Memory;
use handoff::{
    direct::{Direct, Piece, Pool},
    nixl,
};
use kv::{KvError, Reply, Transfer};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    Grpc,
    /// Simulated: both workers live in this process.
    Copies,
    Nixl,
}

impl Over {
    /// Says why a test is left out.
    pub fn is_there(self) -> bool {
        if self != Over::Nixl {
            return true;
        }
        let opened = nixl::open("probe", &Memory::new());
        if let Err(error) = &opened {
            assert!(std::env::var_os("BATON_NIXL_REQUIRED").is_none(), "{error}");
            println!("left out: {error}");
        }
        opened.is_ok()
    }

    /// How long a block may take to land. NIXL's first read from a peer connects to it.
    pub fn landing(self) -> Duration {
        match self {
            Over::Grpc => Duration::from_secs(2),
            Over::Nixl => crate::slowed(Duration::from_secs(5)),
            Over::Copies => Duration::from_secs(1),
        }
    }

    pub fn pool(self, memory: Arc<Memory>) -> Pool {
        static NAMES: AtomicU32 = AtomicU32::new(0);
        let name = format!("worker-{}-{}", std::process::id(), NAMES.fetch_add(1, Relaxed));
        let direct = match self {
            Over::Grpc => return memory.into(),
            Over::Copies => Copies::new(name),
            Over::Nixl => nixl::open(&name, &*memory).unwrap(),
        };
        Pool::direct(memory, direct).unwrap()
    }
}

/// The same test over each.
#[macro_export]
macro_rules! over_each {
    ($($name:ident),* $(,)?) => {
        $crate::over_each!(@ grpc, Grpc, $($name)*);
        $crate::over_each!(@ copies, Copies, $($name)*);
        $crate::over_each!(@ nixl, Nixl, $($name)*);
    };
    (@ $module:ident, $over:ident, $($name:ident)*) => {
        mod $module {
            $(
                #[tokio::test]
                async fn $name() {
                    let over = $crate::over::Over::$over;
                    if over.is_there() {
                        super::$name(over).await;
                    }
                }
            )*
        }
    };
}

/// Reads memory of this process. Nothing stops a read, as with what it stands for.
pub struct Copies {
    name: String,
    /// Reads that will not end by themselves.
    pub hang: AtomicU32,
    pub severed: AtomicU32,
    hanging: Mutex<Vec<(Vec<Piece>, Reply<()>)>>,
}

impl Copies {
    pub fn new(name: String) -> Arc<Copies> {
        Arc::new(Copies {
            name,
            hang: AtomicU32::new(0),
            severed: AtomicU32::new(0),
            hanging: Mutex::default(),
        })
    }

    /// What hangs writes after all.
    pub fn land(&self) {
        for (pieces, reply) in self.hanging.lock().unwrap().drain(..) {
            pieces.iter().for_each(copy);
            let _ = reply.send(Ok(()));
        }
    }

    /// Of what hangs nothing will be known any more.
    pub fn lose(&self) {
        for (_, reply) in self.hanging.lock().unwrap().drain(..) {
            let _ = reply.send(Err(KvError::Lost("as a test wants it".into())));
        }
    }

    pub fn hanging(&self) -> usize {
        self.hanging.lock().unwrap().len()
    }
}

impl Direct for Copies {
    fn name(&self) -> &'static str {
        "copies"
    }

    fn origin(&self) -> proto::Origin {
        proto::Origin { name: self.name.clone(), ..Default::default() }
    }

    fn read(&self, _: &proto::Origin, pieces: Vec<Piece>) -> Transfer<()> {
        let (reply, transfer) = kv::transfer();
        if self.hang.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
            self.hanging.lock().unwrap().push((pieces, reply));
            return transfer;
        }
        if self.severed.load(Relaxed) > 0 && self.hanging() > 0 {
            let _ = reply.send(Err(KvError::Unreachable("severed".into())));
            return transfer;
        }
        pieces.iter().for_each(copy);
        let _ = reply.send(Ok(()));
        transfer
    }

    fn sever(&self, _: &proto::Origin) {
        self.severed.fetch_add(1, Relaxed);
    }
}

fn copy(piece: &Piece) {
    // SAFETY: both are cells of pools that a test keeps until its delivery has ended.
    let cells = |at: usize| unsafe { std::slice::from_raw_parts(at as *const AtomicU8, piece.bytes) };
    cells(piece.from)
        .iter()
        .zip(cells(piece.to))
        .for_each(|(from, to)| to.store(from.load(Relaxed), Relaxed));
}
