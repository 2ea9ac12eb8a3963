//! One GPU: context, stream, the embedded kernels, memory. Everything is enqueued on one stream; nothing here waits but
//! [`Device::synchronize`] and the constructors.

pub(crate) use super::fault::device;
use super::fault::text;
use crate::{DeviceMemory, Error};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaStream, DriverError, result, sys};
use std::{
    collections::{BTreeSet, HashMap},
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
    /// Blocks next to each other that run together and read each other's shared memory.
    pub cluster: u32,
}

impl Grid {
    pub fn new(blocks: impl Into<[u32; 3]>, threads: u32) -> Grid {
        Grid { blocks: blocks.into(), threads, shared: 0, cluster: 1 }
    }

    pub fn shared(self, shared: u32) -> Grid {
        Grid { shared, ..self }
    }

    pub fn clusters_of(self, cluster: u32) -> Grid {
        Grid { cluster, ..self }
    }
}

/// Arguments of a kernel, in the order of its parameters. Each begins at a word of its own.
#[derive(Default)]
pub struct Args {
    words: Vec<u64>,
    begins: Vec<usize>,
}

impl Args {
    fn push(mut self, words: &[u64]) -> Args {
        self.begins.push(self.words.len());
        self.words.extend_from_slice(words);
        self
    }

    pub fn ptr(self, address: Address) -> Args {
        self.push(&[address])
    }

    pub fn u32(self, value: u32) -> Args {
        self.push(&[u64::from(value)])
    }

    pub fn map(self, map: &TensorMap) -> Args {
        self.push(&map.0.opaque)
    }

    pub fn f32(self, value: f32) -> Args {
        self.push(&[u64::from(value.to_bits())])
    }

    pub fn u64(self, value: u64) -> Args {
        self.ptr(value)
    }
}

/// Whether this binary has kernels.
pub fn is_built() -> bool {
    !CUBINS.is_empty()
}

/// Whether the driver's library can be loaded here.
pub fn is_driver_present() -> bool {
    // SAFETY: only asks whether the library is there.
    unsafe { sys::is_culib_present() }
}

impl Device {
    pub fn new(ordinal: usize) -> Result<Device, Error> {
        if !is_built() {
            return Err(Error::Unavailable(
                "this binary was built without CUDA kernels; build it with --features cuda".to_string(),
            ));
        }
        if !is_driver_present() {
            return Err(Error::Unavailable(
                "libcuda.so was not found: install the NVIDIA driver, in a container start it with --gpus all or ask for \
                 nvidia.com/gpu, or use --backend cpu"
                    .to_string(),
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
        self.launch_on(&self.stream, name, grid, args)
    }

    /// The same on another stream of this device.
    pub fn launch_on(&self, stream: &CudaStream, name: &str, grid: Grid, args: Args) -> Result<(), Error> {
        let function = self.functions.get(name);
        let function = function.ok_or_else(|| Error::Device(format!("no kernel is called {name}")))?;
        let Args { mut words, begins } = args;
        let mut pointers: Vec<*mut c_void> =
            begins.iter().map(|begin| std::ptr::from_mut(&mut words[*begin]).cast()).collect();
        let mut cluster = cluster_attribute(grid.cluster);
        let config = config(stream, grid, &mut cluster);
        // SAFETY: the launcher in the twin file passes what the kernel declares.
        let launched = unsafe {
            sys::cuLaunchKernelEx(
                &config,
                function.cu_function(),
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
            .result()
        };
        launched.map_err(|error| Error::Device(format!("kernel {name} {grid:?}: {}", text(error))))
    }

    pub fn alloc(&self, bytes: usize) -> Result<Memory, Error> {
        self.context.bind_to_thread().map_err(device)?;
        // SAFETY: freed once, by Memory.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|error| {
            let (free, total) = self.context.mem_get_info().unwrap_or((0, 0));
            Error::Device(format!(
                "{bytes} bytes of device memory: {}; {free} of {total} are free. Lower kv_cache_mb, \
                 kv_blocks or max_step_tokens, or choose a larger GPU",
                text(error)
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

fn config(stream: &CudaStream, grid: Grid, cluster: &mut sys::CUlaunchAttribute) -> sys::CUlaunchConfig {
    let [x, y, z] = grid.blocks;
    sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: grid.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: grid.shared,
        hStream: stream.cu_stream(),
        attrs: cluster,
        numAttrs: u32::from(grid.cluster > 1),
    }
}

fn cluster_attribute(x: u32) -> sys::CUlaunchAttribute {
    let dimension = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y: 1, z: 1 };
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { clusterDim: dimension },
    }
}

/// A matrix in device memory as the tensor copy engine fetches it, box by box; zeros outside.
#[derive(Clone, Copy)]
pub struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// Rows of `bytes` bytes each, `stride` bytes apart, fetched 128 bytes of `at_once` rows at a time, swizzled by 128 bytes.
    pub fn rows(
        address: Address,
        [rows, bytes]: [u32; 2],
        stride: u32,
        at_once: u32,
    ) -> Result<TensorMap, Error> {
        let element = sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8;
        let swizzle = sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B;
        TensorMap::new(address, [bytes, rows], stride, [128, at_once], element, swizzle)
    }

    /// f32 `[rows][columns]`, rows `pitch` elements apart, fetched `at_once` columns of a row at a time.
    pub fn floats(
        address: Address,
        [rows, columns]: [u32; 2],
        pitch: u32,
        at_once: u32,
    ) -> Result<TensorMap, Error> {
        let element = sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
        let swizzle = sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE;
        TensorMap::new(address, [columns, rows], 4 * pitch, [at_once, 1], element, swizzle)
    }

    fn new(
        address: Address,
        size: [u32; 2],
        stride: u32,
        at_once: [u32; 2],
        element: sys::CUtensorMapDataType,
        swizzle: sys::CUtensorMapSwizzle,
    ) -> Result<TensorMap, Error> {
        let mut map = std::mem::MaybeUninit::uninit();
        // SAFETY: two dimensions, one stride between them; the driver writes the map or says why not.
        let made = unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                element,
                2,
                address as *mut c_void,
                size.map(u64::from).as_ptr(),
                [u64::from(stride)].as_ptr(),
                at_once.as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
        };
        let what = || format!("boxes {at_once:?} of {size:?}, rows {stride} bytes apart, at {address:#x}");
        made.map_err(|error| Error::Device(format!("tensor map of {}: {error}", what())))?;
        // SAFETY: written above.
        Ok(TensorMap(unsafe { map.assume_init() }))
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

fn unusable(ordinal: usize, error: DriverError) -> Error {
    Error::Unavailable(format!("GPU {ordinal} cannot be used: {}", text(error)))
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
        let built: BTreeSet<_> = CUBINS.iter().map(|(_, arch, _)| *arch).collect();
        return Err(Error::Unavailable(wrong_architecture(&arch, &built)));
    }
    let mut named = super::FAMILIES.iter().flat_map(|(_, names)| *names);
    match named.find(|name| !functions.contains_key(*name)) {
        Some(name) => Err(Error::Device(format!("kernel {name} is not in the binary"))),
        None => Ok(functions),
    }
}

fn wrong_architecture(found: &str, built: &BTreeSet<&str>) -> String {
    let built: Vec<_> = built.iter().map(|arch| format!("sm_{arch}")).collect();
    let found = found.trim_end_matches('a');
    format!(
        "the GPU is sm_{found}, and this binary has kernels for {}: run the worker on a Hopper GPU (H100, H200), or use \
         --backend cpu",
        built.join(", ")
    )
}

/// Shared memory that one block may have on Hopper: 227 KiB.
const LARGEST_SHARED: i32 = 227 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_of_another_architecture_is_named_beside_those_that_would_do() {
        let said = wrong_architecture("80a", &["90a"].into());
        assert!(
            said.contains("is sm_80,") && said.contains("for sm_90a:") && said.contains("H100"),
            "{said}"
        );
    }
}
