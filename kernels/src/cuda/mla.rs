//! Attention of a layer in its two forms, in and out of the latent space.

use super::{
    absorb, attention,
    device::{Address, Device},
    direct::{self, Heads},
    memory::Prepared,
    rows::Launch,
    step::Step,
    weights::Mla,
};
use crate::Error;

/// Attention of one layer over the rows of a step.
pub struct Attend<'a> {
    pub launch: Launch,
    pub step: &'a Step,
    pub layer: usize,
    pub weights: &'a Mla,
}

/// Keys and values that the direct form makes at once take at most so many bytes each.
const DIRECT_BYTES: usize = 512 << 20;

impl Attend<'_> {
    /// Queries into the latent space, attention over the cache rows as they are, the sums out of it.
    pub fn absorbed(
        &self,
        device: &Device,
        prepared: &mut Prepared,
        query: Address,
        out: Address,
    ) -> Result<(), Error> {
        let shape = prepared.shape.clone();
        let (rows, heads) = (prepared.max_rows(), shape.heads as usize);
        let absorbed = prepared.room(device, "absorbed", 2 * rows * heads * shape.row())?;
        let summed = prepared.room(device, "summed", 2 * rows * heads * shape.latent as usize)?;
        let scratch =
            attention::absorbed_scratch_bytes(shape.heads, shape.max_context, shape.max_step_tokens);
        let scratch = prepared.room(device, "partial sums", scratch)?;
        let (at, to) = (prepared.step.addresses, prepared.layer(self.layer));
        self.launch.heads(
            device,
            &shape,
            (self.weights.key(), shape.nope, shape.query()),
            query,
            (shape.latent, shape.row()),
            absorbed,
        )?;
        absorb::absorb_rope(device, at.counts, self.step.extent.rows, &shape, query, absorbed)?;
        attention::attend_absorbed(
            device,
            &at,
            &self.step.extent,
            absorbed,
            &to,
            shape.heads,
            shape.max_context,
            shape.softmax_scale,
            scratch,
            summed,
        )?;
        self.launch.heads(
            device,
            &shape,
            (self.weights.value(), shape.latent, shape.latent as usize),
            summed,
            (shape.value, shape.value as usize),
            out,
        )
    }

    /// Keys and values of an entry's whole context out of the latent space, attention over those; entry by entry, and of
    /// a long context some heads at a time.
    pub fn direct(
        &self,
        device: &Device,
        prepared: &mut Prepared,
        query: Address,
        out: Address,
    ) -> Result<(), Error> {
        let shape = prepared.shape.clone();
        direct::check_direct(shape.nope, shape.value)?;
        let (context, per_head) = (shape.max_context as usize, 2 * shape.nope as usize);
        let room = (shape.heads as usize * context * per_head).min(DIRECT_BYTES.max(context * per_head));
        let latent = prepared.room(device, "context", 2 * context * shape.latent as usize)?;
        let rope = prepared.room(device, "rotary keys", 2 * context * shape.rope as usize)?;
        let [k, v] = [prepared.room(device, "keys", room)?, prepared.room(device, "values", room)?];
        let (at, pool) = (prepared.step.addresses, prepared.layer(self.layer));
        for (index, entry) in self.step.entries.iter().enumerate() {
            let (index, context) = (index as u32, entry.context());
            attention::gather_context(device, &at, index, context, &pool, latent, rope)?;
            let count = at.context + 4 * u64::from(index);
            let launch = Launch { count, most: context, ..self.launch };
            let at_once = ((room / (context as usize * per_head)) as u32).min(shape.heads);
            for first in (0..shape.heads).step_by(at_once as usize) {
                let heads = Heads { first, count: at_once.min(shape.heads - first), all: shape.heads };
                let [w_k, w_v] = [self.weights.key_rows(), self.weights.value()];
                launch.up(device, &shape, &heads, w_k, shape.nope, latent, k)?;
                launch.up(device, &shape, &heads, w_v, shape.value, latent, v)?;
                let (span, scale) = (entry.span, shape.softmax_scale);
                direct::attend_direct(device, span, heads, query, k, v, rope, scale, out)?;
            }
        }
        Ok(())
    }
}
