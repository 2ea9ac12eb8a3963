//! Weights in device memory. FP8 matrices keep their bytes and scales; everything else becomes bf16 (matrices) or f32
//! (vectors). Bytes go from the checkpoint's pages to the device, one tensor at a time; random matrices are made where they lie.

use super::{
    device::{Address, Device, Memory},
    random::{self, View},
};
use crate::{Data, Dtype, Error, MlaTensors, MlpTensors, QueryTensors, Random, Shape, Tensor};

/// Rows and columns that share a weight scale.
pub const BLOCK: usize = 128;

/// Embedding rows in bf16, or a vector in f32.
pub struct Table {
    memory: Memory,
    pub width: u32,
}

impl Table {
    pub fn address(&self) -> Address {
        self.memory.address()
    }

    pub fn load(device: &Device, tensor: Tensor<'_>) -> Result<Table, Error> {
        let memory = match tensor.rows {
            1 => put(device, &f32_bytes(&tensor.to_f32()?))?,
            _ => {
                let memory = device.alloc(2 * tensor.rows * tensor.cols)?;
                fill_bf16(device, &tensor, memory.address())?;
                memory
            }
        };
        Ok(Table { memory, width: tensor.cols as u32 })
    }
}

/// `[n][k]`, as the checkpoint has it.
pub struct Linear {
    weights: Memory,
    /// `[ceil(n / 128)][ceil(k / 128)]` f32, if the weights are FP8.
    scales: Option<Memory>,
    pub n: u32,
    pub k: u32,
}

impl Linear {
    pub fn load(device: &Device, parts: &[Tensor<'_>]) -> Result<Linear, Error> {
        let (n, k) = (parts.iter().map(|part| part.rows).sum::<usize>(), parts[0].cols);
        let fp8 = parts.iter().all(|part| part.dtype == Dtype::F8E4m3);
        let room = Matrices::new(device, 1, n, k, fp8)?;
        room.fill(device, 0, parts)?;
        Ok(Linear { weights: room.weights, scales: room.scales, n: n as u32, k: k as u32 })
    }

    pub fn weights(&self) -> Address {
        self.weights.address()
    }

    pub fn scales(&self) -> Option<Address> {
        self.scales.as_ref().map(Memory::address)
    }
}

/// `count` matrices `[n][k]` one after the other.
pub struct Matrices {
    weights: Memory,
    scales: Option<Memory>,
    pub count: usize,
    pub n: usize,
    pub k: usize,
}

impl Matrices {
    fn new(device: &Device, count: usize, n: usize, k: usize, fp8: bool) -> Result<Matrices, Error> {
        let bytes = count * n * k * if fp8 { 1 } else { 2 };
        let scales = 4 * count * n.div_ceil(BLOCK) * k.div_ceil(BLOCK);
        Ok(Matrices {
            weights: device.alloc(bytes)?,
            scales: fp8.then(|| device.alloc(scales)).transpose()?,
            count,
            n,
            k,
        })
    }

    pub fn weights(&self) -> Address {
        self.weights.address()
    }

    pub fn scales(&self) -> Option<Address> {
        self.scales.as_ref().map(Memory::address)
    }

    /// Puts the rows of `parts`, one part after the other, where matrix `index` lies.
    fn fill(&self, device: &Device, index: usize, parts: &[Tensor<'_>]) -> Result<(), Error> {
        let (mut row, fp8) = (0, self.scales.is_some());
        for part in parts {
            if part.cols != self.k || (fp8 && part.dtype != Dtype::F8E4m3) {
                return Err(refuse(part, "differs in width or type from the matrix that it is joined with"));
            }
            let first = index * self.n + row;
            match &self.scales {
                Some(scales) => self.fill_fp8(device, part, index, row, scales)?,
                None => fill_bf16(device, part, self.weights.address() + (2 * first * self.k) as u64)?,
            }
            row += part.rows;
        }
        Ok(())
    }

    fn fill_fp8(
        &self,
        device: &Device,
        part: &Tensor<'_>,
        index: usize,
        row: usize,
        scales: &Memory,
    ) -> Result<(), Error> {
        if !row.is_multiple_of(BLOCK) {
            return Err(refuse(part, "follows rows that do not fill a block of 128; their scales would mix"));
        }
        let to = self.weights.address() + ((index * self.n + row) * self.k) as u64;
        let (per_matrix, per_row) = (self.n.div_ceil(BLOCK), self.k.div_ceil(BLOCK));
        let first = (index * per_matrix + row / BLOCK) * per_row;
        let scales_to = scales.address() + 4 * first as u64;
        match part.data {
            Data::Bytes(bytes) => upload_fp8(device, part, bytes, to, scales_to),
            Data::Random(random) => {
                random::e4m3(device, random, part.rows * part.cols, to)?;
                let blocks = part.rows.div_ceil(BLOCK) * per_row;
                device.upload(&f32_bytes(&vec![random.scale(); blocks]), scales_to)
            }
            Data::Constant(_) => Err(refuse(part, "is FP8 and constant, which no model has")),
        }
    }
}

fn upload_fp8(
    device: &Device,
    part: &Tensor<'_>,
    bytes: &[u8],
    to: Address,
    scales_to: Address,
) -> Result<(), Error> {
    let Some(scales) = part.scales.filter(|scales| scales.block == [BLOCK, BLOCK]) else {
        return Err(refuse(part, "is FP8 without scales of 128 × 128 blocks; the CUDA backend has no other"));
    };
    if bytes.iter().any(|byte| byte & 0x7f == 0x7f) {
        return Err(refuse(part, "contains NaN; the file is corrupt"));
    }
    device.upload(bytes, to)?;
    device.upload(scales.bytes, scales_to)
}

/// The experts of a layer in the order of their ids.
pub struct Experts {
    /// Gate rows over up rows: `[2 × width][hidden]` each.
    pub gate_up: Matrices,
    /// `[hidden][width]` each.
    pub down: Matrices,
    pub count: u32,
}

impl Experts {
    pub fn load(
        device: &Device,
        count: usize,
        experts: &mut dyn Iterator<Item = MlpTensors<'_>>,
    ) -> Result<Experts, Error> {
        let mut room: Option<(Matrices, Matrices)> = None;
        let mut loaded = 0;
        for MlpTensors { gate, up, down } in experts {
            let (gate_up_room, down_room) = match &mut room {
                Some(room) => room,
                None => {
                    let fp8 = gate.dtype == Dtype::F8E4m3;
                    let gate_up = Matrices::new(device, count, gate.rows + up.rows, gate.cols, fp8)?;
                    let down = Matrices::new(device, count, down.rows, down.cols, fp8)?;
                    room.insert((gate_up, down))
                }
            };
            gate_up_room.fill(device, loaded, &[gate, up])?;
            down_room.fill(device, loaded, &[down])?;
            loaded += 1;
        }
        match room {
            Some((gate_up, down)) if loaded == count => Ok(Experts { gate_up, down, count: count as u32 }),
            // The loader knows why the others are missing.
            _ => Err(Error::Device(format!("{loaded} of {count} experts were loaded"))),
        }
    }
}

/// The weights of one layer's attention, but the output projection.
pub struct Mla {
    pub query: Query,
    /// Rows: (low-rank query,) latent, rope.
    pub low: Linear,
    pub kv_norm: Table,
    pub eps: f32,
    /// W_UK transposed: `[heads][latent][nope]` bf16, from queries into the latent space.
    key: Memory,
    /// W_UK: `[heads][nope][latent]` bf16, from the latent space to keys.
    key_rows: Memory,
    /// W_UV: `[heads][value][latent]` bf16.
    value: Memory,
}

pub enum Query {
    Direct(Linear),
    LowRank { norm: Table, b: Linear },
}

impl Mla {
    pub fn load(device: &Device, shape: &Shape, tensors: &MlaTensors<'_>) -> Result<Mla, Error> {
        let (query, low) = match &tensors.query {
            QueryTensors::Direct(q) => {
                (Query::Direct(Linear::load(device, &[*q])?), Linear::load(device, &[tensors.kv_a])?)
            }
            QueryTensors::LowRank { a, norm, b } => (
                Query::LowRank { norm: Table::load(device, *norm)?, b: Linear::load(device, &[*b])? },
                Linear::load(device, &[*a, tensors.kv_a])?,
            ),
        };
        let UpProjection { key, key_rows, value } = UpProjection::load(device, shape, &tensors.kv_b)?;
        Ok(Mla {
            query,
            low,
            kv_norm: Table::load(device, tensors.kv_norm)?,
            eps: tensors.eps,
            key,
            key_rows,
            value,
        })
    }

    /// Columns of the low-rank query; 0: none.
    pub fn rank(&self) -> u32 {
        match &self.query {
            Query::Direct(_) => 0,
            Query::LowRank { norm, .. } => norm.width,
        }
    }

    pub fn key(&self) -> Address {
        self.key.address()
    }

    pub fn key_rows(&self) -> Address {
        self.key_rows.address()
    }

    pub fn value(&self) -> Address {
        self.value.address()
    }
}

/// Both halves of `kv_b` in bf16, keys in two orders. Rows of a head in `kv_b`: keys, then values.
struct UpProjection {
    key: Memory,
    key_rows: Memory,
    value: Memory,
}

impl UpProjection {
    fn load(device: &Device, shape: &Shape, kv_b: &Tensor<'_>) -> Result<UpProjection, Error> {
        match kv_b.data {
            Data::Random(random) => UpProjection::random(device, shape, random, kv_b.dtype == Dtype::F8E4m3),
            _ => UpProjection::split(device, shape, kv_b),
        }
    }

    fn random(device: &Device, shape: &Shape, random: Random, fp8: bool) -> Result<UpProjection, Error> {
        let [heads, nope, value, latent] =
            [shape.heads, shape.nope, shape.value, shape.latent].map(|size| size as usize);
        let head = (nope + value) * latent;
        let make = |[n, k]: [usize; 2], first: usize, [row, column]: [usize; 2]| {
            let memory = device.alloc(2 * heads * n * k)?;
            let view = View { sizes: [heads, n, k], first, strides: [head, row, column] };
            random::bf16(device, random, fp8, view, memory.address())?;
            Ok(memory)
        };
        Ok(UpProjection {
            key: make([latent, nope], 0, [1, latent])?,
            key_rows: make([nope, latent], 0, [latent, 1])?,
            value: make([value, latent], nope * latent, [latent, 1])?,
        })
    }

    fn split(device: &Device, shape: &Shape, kv_b: &Tensor<'_>) -> Result<UpProjection, Error> {
        let (nope, value, latent) = (shape.nope as usize, shape.value as usize, shape.latent as usize);
        let heads = shape.heads as usize;
        let mut key = vec![0; 2 * heads * latent * nope];
        let mut key_rows = Vec::with_capacity(2 * heads * nope * latent);
        let mut values = Vec::with_capacity(2 * heads * value * latent);
        let mut row = vec![0.0; latent];
        for head in 0..heads {
            let key = &mut key[2 * head * latent * nope..][..2 * latent * nope];
            for d in 0..nope {
                kv_b.read_row(head * (nope + value) + d, &mut row)?;
                for (c, x) in row.iter().enumerate() {
                    key[2 * (c * nope + d)..][..2].copy_from_slice(&bf16(*x));
                }
                key_rows.extend(row.iter().flat_map(|x| bf16(*x)));
            }
            for d in nope..nope + value {
                kv_b.read_row(head * (nope + value) + d, &mut row)?;
                values.extend(row.iter().flat_map(|x| bf16(*x)));
            }
        }
        Ok(UpProjection {
            key: put(device, &key)?,
            key_rows: put(device, &key_rows)?,
            value: put(device, &values)?,
        })
    }
}

/// A tensor in bf16 at `to`.
fn fill_bf16(device: &Device, tensor: &Tensor<'_>, to: Address) -> Result<(), Error> {
    match tensor.data {
        Data::Random(random) => {
            let view = View::whole(tensor.rows, tensor.cols);
            random::bf16(device, random, tensor.dtype == Dtype::F8E4m3, view, to)
        }
        _ => device.upload(&bf16_rows(tensor)?, to),
    }
}

fn bf16(x: f32) -> [u8; 2] {
    half::bf16::from_f32(x).to_le_bytes()
}

fn bf16_rows(tensor: &Tensor<'_>) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::with_capacity(2 * tensor.rows * tensor.cols);
    let mut row = vec![0.0; tensor.cols];
    for index in 0..tensor.rows {
        tensor.read_row(index, &mut row)?;
        bytes.extend(row.iter().flat_map(|x| bf16(*x)));
    }
    Ok(bytes)
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn put(device: &Device, bytes: &[u8]) -> Result<Memory, Error> {
    let memory = device.alloc(bytes.len())?;
    device.upload(bytes, memory.address())?;
    Ok(memory)
}

fn refuse(tensor: &Tensor<'_>, what: &str) -> Error {
    Error::Tensor { name: tensor.name.to_string(), what: what.to_string() }
}
