//! Launchers of `kernels/cuda/random.cu`.

use super::device::{Address, Args, Device, Grid};
use crate::{Error, Random};

pub(super) const KERNELS: &[&str] = &["random_e4m3", "random_bf16"];

/// Elements of a tensor in another order: `[count][n][k]`, of which element `[b][i][j]` is number
/// `first + b · strides[0] + i · strides[1] + j · strides[2]` of the tensor.
#[derive(Clone, Copy, Debug)]
pub struct View {
    pub sizes: [usize; 3],
    pub first: usize,
    pub strides: [usize; 3],
}

impl View {
    /// `rows` rows of `cols`, as they are.
    pub fn whole(rows: usize, cols: usize) -> View {
        View { sizes: [1, rows, cols], first: 0, strides: [0, cols, 1] }
    }

    fn count(&self) -> usize {
        self.sizes.iter().product()
    }
}

/// The bytes of a tensor of `count` elements.
pub fn e4m3(device: &Device, random: Random, count: usize, out: Address) -> Result<(), Error> {
    let args = Args::default().u64(random.key).u64(count as u64).ptr(out);
    device.launch("random_e4m3", grid(device, count.div_ceil(16)), args)
}

/// A view of a tensor in bf16. `fp8`: of a tensor that is FP8, its values times its scale.
pub fn bf16(device: &Device, random: Random, fp8: bool, view: View, out: Address) -> Result<(), Error> {
    let unit = if fp8 { random.scale() } else { random.unit() };
    let [_, n, k] = view.sizes.map(|size| size as u32);
    let args = Args::default().u64(random.key).u32(u32::from(fp8)).f32(unit);
    let args = args.u64(view.count() as u64).u32(n).u32(k).u64(view.first as u64);
    let args = view.strides.into_iter().fold(args, |args, stride| args.u64(stride as u64));
    device.launch("random_bf16", grid(device, view.count()), args.ptr(out))
}

fn grid(device: &Device, threads: usize) -> Grid {
    let blocks = threads.div_ceil(256).clamp(1, 32 * device.multiprocessors as usize);
    Grid::new([blocks as u32, 1, 1], 256)
}
