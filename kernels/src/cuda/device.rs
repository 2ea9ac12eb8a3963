//! One GPU: context, stream, the embedded kernels, memory. Everything is enqueued on one stream; nothing here waits but
//! [`Device::synchronize`] and the constructors.

use crate::{DeviceMemory, Error};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaStream, DriverError, result, sys};
use std::{
    collections::HashMap,
    ffi::c_void,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

/// (family, architecture, cubin), made by build.rs; empty without the feature `cuda`.
static CUBINS: &[(&str, &str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/cubins.rs"));

/// Address in device memory.
pub type Address = u64;

pub struct Device {
    pub context: Arc<CudaContext>,
    pub stream: Arc<CudaStream>,
    functions: HashMap<&'static str, CudaFunction>,
    pub multiprocessors: u32,
    /// Bytes of every [`Memory`] there is.
    held: Arc<AtomicUsize>,
}

/// Blocks and threads of a launch, and dynamic shared memory of a block in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    pub blocks: [u32; 3],
    pub threads: u32,
    pub shared: u32,
}

impl Grid {
    pub fn new(blocks: impl Into<[u32; 3]>, threads: u32) -> Grid {
        Grid { blocks: blocks.into(), threads, shared: 0 }
    }

    pub fn shared(self, shared: u32) -> Grid {
        Grid { shared, ..self }
    }
}

/// Arguments of a kernel, in the order of its parameters. Each lies in eight bytes of its own.
#[derive(Default)]
pub struct Args(Vec<u64>);

impl Args {
    pub fn ptr(mut self, address: Address) -> Args {
        self.0.push(address);
        self
    }

    pub fn u32(mut self, value: u32) -> Args {
        self.0.push(u64::from(value));
        self
    }

    pub fn f32(mut self, value: f32) -> Args {
        self.0.push(u64::from(value.to_bits()));
        self
    }

    pub fn u64(self, value: u64) -> Args {
        self.ptr(value)
    }
}

impl Device {
    pub fn new(ordinal: usize) -> Result<Device, Error> {
        if CUBINS.is_empty() {
            return Err(Error::Unavailable(
                "this binary was built without CUDA kernels; build it with --features cuda".to_string(),
            ));
        }
        // SAFETY: only asks whether the library is there.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Unavailable(
                "libcuda.so was not found: install the NVIDIA driver, or use --backend cpu".to_string(),
            ));
        }
        let context = CudaContext::new(ordinal).map_err(|error| unusable(ordinal, error))?;
        // SAFETY: one thread uses one stream, and memory is freed after it has been waited for.
        unsafe { context.disable_event_tracking() };
        let arch = context.compute_capability().map_err(device)?;
        let stream = context.new_stream().map_err(device)?;
        let multiprocessors = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(device)? as u32;
        let functions = load(&context, arch)?;
        Ok(Device { context, stream, functions, multiprocessors, held: Arc::default() })
    }

    /// Makes this thread one that may talk to the device.
    pub fn bind(&self) -> Result<(), Error> {
        self.context.bind_to_thread().map_err(device)
    }

    /// Enqueues a kernel; `name` is its `extern "C"` name, which is unique among all families.
    pub fn launch(&self, name: &str, grid: Grid, args: Args) -> Result<(), Error> {
        let function = self.functions.get(name);
        let function = function.ok_or_else(|| Error::Device(format!("no kernel is called {name}")))?;
        let Args(mut values) = args;
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        let [x, y, z] = grid.blocks;
        // SAFETY: the launcher in the twin file passes what the kernel declares.
        let launched = unsafe {
            result::launch_kernel(
                function.cu_function(),
                (x, y, z),
                (grid.threads, 1, 1),
                grid.shared,
                self.stream.cu_stream(),
                &mut pointers,
            )
        };
        launched.map_err(|error| Error::Device(format!("{name} {grid:?}: {error}")))
    }

    pub fn alloc(&self, bytes: usize) -> Result<Memory, Error> {
        self.context.bind_to_thread().map_err(device)?;
        // SAFETY: freed once, by Memory.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|error| {
            let (free, total) = self.context.mem_get_info().unwrap_or((0, 0));
            Error::Device(format!(
                "{bytes} bytes of device memory: {error}; {free} of {total} are free. Lower kv_cache_mb, \
                 kv_blocks or max_step_tokens, or choose a larger GPU"
            ))
        })?;
        self.held.fetch_add(bytes, Relaxed);
        Ok(Memory { address, bytes, context: self.context.clone(), held: self.held.clone() })
    }

    pub fn memory(&self) -> Result<DeviceMemory, Error> {
        let (free, total) = self.context.mem_get_info().map_err(device)?;
        Ok(DeviceMemory { total, free, held: self.held.load(Relaxed) })
    }

    /// Copies host bytes to `to`. The bytes may be reused when the call returns.
    pub fn upload(&self, bytes: &[u8], to: Address) -> Result<(), Error> {
        // SAFETY: pageable host memory is staged by the driver before the call returns; the caller owns `to`.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) }.map_err(device)
    }

    /// Waits for everything enqueued, then copies out.
    pub fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), Error> {
        // SAFETY: the stream is waited for before the bytes are looked at; the caller owns `from`.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.stream.cu_stream()) }.map_err(device)?;
        self.synchronize()
    }

    pub fn fill(&self, memory: &Memory, byte: u8) -> Result<(), Error> {
        // SAFETY: within the allocation.
        unsafe { result::memset_d8_async(memory.address, byte, memory.bytes, self.stream.cu_stream()) }
            .map_err(device)
    }

    /// An event with a time, behind everything enqueued.
    pub fn mark(&self) -> Result<CudaEvent, Error> {
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let event = self.context.new_event(Some(flags)).map_err(device)?;
        event.record(&self.stream).map_err(device)?;
        Ok(event)
    }

    pub fn synchronize(&self) -> Result<(), Error> {
        self.stream.synchronize().map_err(device)
    }
}

/// An allocation of device memory, freed when dropped.
pub struct Memory {
    address: Address,
    bytes: usize,
    context: Arc<CudaContext>,
    held: Arc<AtomicUsize>,
}

impl Memory {
    pub fn address(&self) -> Address {
        self.address
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes, Relaxed);
        let _ = self.context.bind_to_thread();
        // SAFETY: cuMemFree waits for whatever uses the memory. An error here means that the context is lost.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

pub(crate) fn device(error: DriverError) -> Error {
    Error::Device(error.to_string())
}

fn unusable(ordinal: usize, error: DriverError) -> Error {
    Error::Unavailable(format!("GPU {ordinal} cannot be used ({error}); nvidia-smi lists those that can"))
}

fn load(
    context: &Arc<CudaContext>,
    (major, minor): (i32, i32),
) -> Result<HashMap<&'static str, CudaFunction>, Error> {
    let arch = format!("{major}{minor}a");
    let mut functions = HashMap::new();
    for (family, _, cubin) in CUBINS.iter().filter(|(_, built_for, _)| *built_for == arch) {
        let image = cudarc::nvrtc::Ptx::from_binary(cubin.to_vec());
        let module = context.load_module(image).map_err(device)?;
        let names =
            super::FAMILIES.iter().find(|(name, _)| name == family).map_or(&[][..], |(_, names)| names);
        for name in names {
            let function = module.load_function(name).map_err(device)?;
            let largest = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let fixed = function.shared_size_bytes().map_err(device)?;
            function.set_attribute(largest, LARGEST_SHARED - fixed).map_err(device)?;
            functions.insert(*name, function);
        }
    }
    if functions.is_empty() {
        let built: Vec<_> = CUBINS.iter().map(|(_, arch, _)| format!("sm_{arch}")).collect();
        return Err(Error::Unavailable(format!(
            "the GPU is sm_{major}{minor}; this binary has kernels for {}. Baton needs Hopper (H100, H200)",
            built.first().map_or("nothing", String::as_str)
        )));
    }
    let mut named = super::FAMILIES.iter().flat_map(|(_, names)| *names);
    match named.find(|name| !functions.contains_key(*name)) {
        Some(name) => Err(Error::Device(format!("kernel {name} is not in the binary"))),
        None => Ok(functions),
    }
}

/// Shared memory that one block may have on Hopper: 227 KiB.
const LARGEST_SHARED: i32 = 227 << 10;
