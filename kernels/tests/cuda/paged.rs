//! Steps and caches for tests of single kernels: metadata as a step leaves it on the device, blocks in shuffled order.

use super::support;
use kernels::cuda::{
    device::{Address, Device, Memory},
    step::{Extent, StepAddresses},
};

pub const BLOCK_TOKENS: u32 = 64;

/// (cos, sin) of a position's pair; any angles do.
pub fn angle(position: u32, pair: u32) -> (f32, f32) {
    let angle = f64::from(position) * 0.37f64.powf(f64::from(pair) * 0.2);
    (angle.cos() as f32, angle.sin() as f32)
}

/// Entries as (position of the first row, rows), and the tables of their blocks in a pool.
pub struct Paged {
    pub entries: Vec<(u32, u32)>,
    pub tables: Vec<Vec<u32>>,
    pub blocks: u32,
    pub max_blocks: u32,
    rope: u32,
}

impl Paged {
    pub fn new(entries: &[(u32, u32)], rope: u32, seed: u64) -> Paged {
        let counts = entries.iter().map(|(start, rows)| (start + rows).div_ceil(BLOCK_TOKENS));
        let blocks = counts.clone().sum::<u32>() + 2;
        let mut free = shuffled(blocks, seed);
        let tables: Vec<Vec<u32>> =
            counts.map(|count| (0..count).map(|_| free.pop().expect("enough blocks")).collect()).collect();
        let max_blocks = tables.iter().map(Vec::len).max().unwrap_or(0) as u32 + 1;
        Paged { entries: entries.to_vec(), tables, blocks, max_blocks, rope }
    }

    /// A step of one of the entries, its blocks where they are.
    pub fn only(&self, entry: usize) -> Paged {
        Paged {
            entries: vec![self.entries[entry]],
            tables: vec![self.tables[entry].clone()],
            blocks: self.blocks,
            max_blocks: self.max_blocks,
            rope: self.rope,
        }
    }

    /// (entry, position) of every row.
    pub fn rows(&self) -> Vec<(usize, u32)> {
        let rows = |(entry, (start, rows)): (usize, &(u32, u32))| {
            (*start..start + rows).map(move |position| (entry, position)).collect::<Vec<_>>()
        };
        self.entries.iter().enumerate().flat_map(rows).collect()
    }

    /// Index of a cache row among those of all layers.
    pub fn place(&self, entry: usize, position: u32, layers: u32, layer: u32) -> usize {
        let block = self.tables[entry][(position / BLOCK_TOKENS) as usize];
        ((block * layers + layer) * BLOCK_TOKENS + position % BLOCK_TOKENS) as usize
    }

    /// The step on the device; launches cover `padding` rows that it does not have.
    pub fn upload(&self, device: &Device, tokens: &[u32], padding: u32) -> Resident {
        let rows = self.rows();
        let count = rows.len() as u32;
        let positions: Vec<u32> = rows.iter().map(|(_, position)| *position).collect();
        let entry_of_row: Vec<u32> = rows.iter().map(|(entry, _)| *entry as u32).collect();
        let tables: Vec<u32> = self
            .tables
            .iter()
            .flat_map(|table| (0..self.max_blocks).map(|i| *table.get(i as usize).unwrap_or(&u32::MAX)))
            .collect();
        let longest = positions.iter().max().map_or(0, |position| position + 1);
        let angles: Vec<f32> = (0..longest)
            .flat_map(|position| (0..self.rope / 2).map(move |pair| angle(position, pair)))
            .flat_map(|(cos, sin)| [cos, sin])
            .collect();
        let memory = [
            support::upload_u32(device, &[count, self.entries.len() as u32, 0, 0]),
            support::upload_u32(device, tokens),
            support::upload_u32(device, &positions),
            support::upload_u32(device, &entry_of_row),
            support::upload_u32(device, &tables),
            support::upload_f32(device, &angles),
        ];
        let at = |index: usize| memory[index].address();
        let unused: Address = 0;
        let addresses = StepAddresses {
            counts: at(0),
            tokens: at(1),
            positions: at(2),
            entry_of_row: at(3),
            first_row: unused,
            row_count: unused,
            start: unused,
            context: unused,
            slot: unused,
            block_table: at(4),
            max_blocks: self.max_blocks,
            sample_entry: unused,
            sample_row: unused,
            angles: at(5),
        };
        let extent =
            Extent { rows: count + padding, entries: self.entries.len() as u32, samples: 0, decode: false };
        Resident { addresses, extent, _memory: memory }
    }
}

/// A step on the device, for as long as this lives.
pub struct Resident {
    pub addresses: StepAddresses,
    pub extent: Extent,
    _memory: [Memory; 6],
}

pub fn shuffled(count: u32, seed: u64) -> Vec<u32> {
    let (mut order, mut below): (Vec<u32>, _) = ((0..count).collect(), support::dice(seed));
    for last in (1..order.len()).rev() {
        order.swap(last, below(last + 1));
    }
    order
}
