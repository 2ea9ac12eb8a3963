//! [`Backend`] on the CPU: each operation is one call of a kernel of this folder over the rows of the step.

use super::{
    Buffer, CpuBackend, Experts, Linear, Mla, MlaForm, Prepared, Query, Routing, Step, Table, Tapped,
    attention::{Attention, Span},
    direct,
    elementwise::rms_norm,
    feed_forward::{FeedForward, Mlp},
    gate::route,
    grow,
    matrix::{Out, Packed, Product, Rows, multiply},
    mla::{Projection, absorb, values},
    pool::KvPool,
    sample,
    step::Slots,
};
use crate::{
    Backend, DeviceMemory, Dtype, EntryOutput, Error, GateRule, GraphKey, MlaTensors, MlpTensors,
    QueryTensors, Random, Shape, StepInput, Tensor, Weights,
};
use kv::{BlockId, Digest, KvDtype, KvError, KvLayout, Payload, Region, Reply};
use rayon::prelude::*;
use std::time::Instant;

/// Rows of prompt logprobs whose logits are held at once.
const LOGPROB_ROWS: usize = 32;
/// Elements below which rows are not worth handing out.
const SMALL: usize = 1 << 14;

impl Weights for CpuBackend {
    type Table = Table;
    type Linear = Linear;
    type Mla = Mla;
    type Experts = Experts;
    type Buffer = Buffer;

    fn prepare(&mut self, shape: Shape) -> Result<(), Error> {
        let pool = KvPool::new(shape.layout(KvDtype::F32), shape.blocks)?;
        let slots = Slots::new(shape.max_sequences);
        self.prepared = Some(Prepared { shape, pool, slots, scratch: Default::default() });
        Ok(())
    }

    fn memory(&self) -> Result<Option<DeviceMemory>, Error> {
        Ok(None)
    }

    fn resize_pool(&mut self, blocks: u32) -> Result<(), Error> {
        let Prepared { shape, pool, slots, .. } = self.prepared()?;
        *pool = KvPool::new(shape.layout(KvDtype::F32), blocks)?;
        *slots = Slots::new(shape.max_sequences);
        shape.blocks = blocks;
        Ok(())
    }

    fn randomize_pool(&mut self, random: Random) -> Result<(), Error> {
        let threads = self.threads.clone();
        let pool = &mut self.prepared()?.pool;
        threads.install(|| pool.fill(|index| half::bf16::from_f32(random.uniform(index)).to_f32()));
        Ok(())
    }

    fn alloc(&mut self, rows: usize, width: usize) -> Result<Buffer, Error> {
        Ok(Buffer { values: vec![0.0; rows * width], width })
    }

    fn alloc_logits(&mut self, rows: usize, width: usize) -> Result<Buffer, Error> {
        self.alloc(rows, width)
    }

    fn load_table(&mut self, tensor: Tensor<'_>) -> Result<Table, Error> {
        Ok(Table { values: tensor.to_f32()?, width: tensor.cols })
    }

    fn load_linear(&mut self, parts: &[Tensor<'_>]) -> Result<Linear, Error> {
        let fp8 = parts.iter().any(|part| part.dtype == Dtype::F8E4m3);
        self.threads.install(|| Ok(Linear { packed: Packed::from_parts(parts)?, fp8 }))
    }

    fn load_mla(&mut self, tensors: &MlaTensors<'_>) -> Result<Mla, Error> {
        let shape = &self.prepared()?.shape;
        let (heads, nope, value) = (shape.heads as usize, shape.nope as usize, shape.value as usize);
        let start = |head: usize| head * (nope + value);
        let kv_b = &tensors.kv_b;
        let key = (0..heads)
            .map(|h| Packed::from_columns(kv_b, start(h)..start(h) + nope))
            .collect::<Result<_, _>>()?;
        let value = (0..heads)
            .map(|h| Packed::from_rows(kv_b, start(h) + nope..start(h + 1)))
            .collect::<Result<_, _>>()?;
        let (query, low) = match &tensors.query {
            QueryTensors::Direct(q) => {
                (Query::Direct(self.load_linear(&[*q])?), self.load_linear(&[tensors.kv_a])?)
            }
            QueryTensors::LowRank { a, norm, b } => (
                Query::LowRank { norm: norm.to_f32()?, b: self.load_linear(&[*b])? },
                self.load_linear(&[*a, tensors.kv_a])?,
            ),
        };
        Ok(Mla { query, low, kv_norm: tensors.kv_norm.to_f32()?, eps: tensors.eps, key, value })
    }

    fn load_experts(
        &mut self,
        _: usize,
        experts: &mut dyn Iterator<Item = MlpTensors<'_>>,
    ) -> Result<Experts, Error> {
        let load = |mlp: MlpTensors<'_>| {
            Ok((self.load_linear(&[mlp.gate, mlp.up])?, self.load_linear(&[mlp.down])?))
        };
        experts.map(load).collect::<Result<_, _>>().map(Experts)
    }
}

impl Backend for CpuBackend {
    type Step = Step;
    type Routing = Routing;
    type Mark = Instant;

    fn layout(&self) -> KvLayout {
        self.prepared.as_ref().map_or(EMPTY, |prepared| prepared.pool.layout())
    }

    fn upload(&mut self, step: &StepInput) -> Result<Step, Error> {
        let Prepared { shape, slots, .. } = self.prepared()?;
        slots.accept(step, shape)
    }

    fn embed(&mut self, step: &Step, table: &Table, residual: &mut Buffer) -> Result<(), Error> {
        let width = table.width;
        for (out, token) in residual.rows_mut(step.rows()).chunks_exact_mut(width).zip(&step.tokens) {
            out.copy_from_slice(&table.values[*token as usize * width..][..width]);
        }
        Ok(())
    }

    fn rms_norm(
        &mut self,
        step: &Step,
        residual: &mut Buffer,
        delta: Option<&Buffer>,
        weight: &Table,
        eps: f32,
        out: &mut Buffer,
    ) -> Result<(), Error> {
        let (rows, width, level, rounding) = (step.rows(), residual.width, self.level, self.options.rounding);
        let row = |(index, (residual, out)): (usize, (&mut [f32], &mut [f32]))| {
            if let Some(delta) = delta {
                let delta = &delta.values[index * width..][..width];
                residual.iter_mut().zip(delta).for_each(|(residual, delta)| *residual += delta);
                rounding.results(residual);
            }
            // SAFETY: the level was detected; all slices have the width.
            unsafe { rms_norm(level, residual, &weight.values, eps, out) }
            rounding.results(out);
        };
        let (residual, out) = (residual.rows_mut(rows), out.rows_mut(rows));
        self.threads.install(|| {
            let pairs = residual.par_chunks_exact_mut(width).zip(out.par_chunks_exact_mut(width));
            pairs.enumerate().with_min_len(1 + SMALL / width).for_each(row);
        });
        Ok(())
    }

    fn mla_project(
        &mut self,
        step: &Step,
        layer: usize,
        x: &Buffer,
        weights: &Mla,
        query: &mut Buffer,
    ) -> Result<(), Error> {
        let (threads, level, rounding) = (self.threads.clone(), self.level, self.options.rounding);
        let Prepared { shape, pool, scratch, .. } = self.prepared()?;
        let rows = step.rows();
        let projection = Projection { level, rounding, shape, weights, step };
        threads.install(|| {
            let low = grow(&mut scratch.low, rows * weights.low.packed.n);
            projection.first(x, low, query);
            projection.second(low, grow(&mut scratch.normed, rows * weights.rank()), query);
            projection.rotate_queries(query);
        });
        projection.write_cache(layer, &scratch.low, pool);
        Ok(())
    }

    fn mla_attend(
        &mut self,
        step: &Step,
        layer: usize,
        query: &Buffer,
        weights: &Mla,
        out: &mut Buffer,
    ) -> Result<(), Error> {
        let (threads, level, rounding, form) =
            (self.threads.clone(), self.level, self.options.rounding, self.options.form);
        let Prepared { shape, pool, scratch, .. } = self.prepared()?;
        let rows = step.rows();
        let spans: Vec<Span<'_>> = step
            .entries
            .iter()
            .map(|entry| Span {
                rows: entry.rows.clone(),
                start: entry.start as usize,
                table: &entry.block_table,
            })
            .collect();
        if form == MlaForm::Direct {
            direct::attend(shape, pool, layer, weights, query.rows(rows), &spans, out.rows_mut(rows));
            rounding.results(out.rows_mut(rows));
            return Ok(());
        }
        threads.install(|| {
            let heads = shape.heads as usize;
            let absorbed = grow(&mut scratch.absorbed, rows * heads * shape.row());
            absorb(level, shape, weights, query.rows(rows), absorbed);
            rounding.results(absorbed);
            let latent = shape.latent as usize;
            let summed = grow(&mut scratch.summed, rows * heads * latent);
            let scale = shape.softmax_scale;
            let target = Out::new(summed, latent);
            Attention { level, rounding, pool, layer, heads, latent, scale, query: absorbed, out: target }
                .run(&spans);
            values(level, shape, weights, summed, out.rows_mut(rows));
            rounding.results(out.rows_mut(rows));
        });
        Ok(())
    }

    fn linear(&mut self, step: &Step, x: &Buffer, weight: &Linear, out: &mut Buffer) -> Result<(), Error> {
        let rows = step.rows();
        let (x, out) = (x.rows(rows), out.rows_mut(rows));
        self.threads.install(|| self.apply(x, weight, out));
        self.options.rounding.results(out);
        Ok(())
    }

    fn mlp(
        &mut self,
        step: &Step,
        x: &Buffer,
        gate_up: &Linear,
        down: &Linear,
        out: &mut Buffer,
    ) -> Result<(), Error> {
        let (rows, feed_forward) = (step.rows(), self.feed_forward(x.width));
        self.threads.install(|| feed_forward.dense(x.rows(rows), Mlp { gate_up, down }, out.rows_mut(rows)));
        Ok(())
    }

    fn gate(
        &mut self,
        step: &Step,
        x: &Buffer,
        weight: &Linear,
        bias: Option<&Table>,
        rule: &GateRule,
    ) -> Result<Routing, Error> {
        let experts = weight.packed.n;
        let mut logits = vec![0.0; step.rows() * experts];
        self.threads.install(|| self.apply(x.rows(step.rows()), weight, &mut logits));
        let routing = route(&logits, experts, bias.map(|bias| bias.values.as_slice()), rule);
        if let Some(tap) = &self.options.tap {
            tap(Tapped::Routing(&routing));
        }
        Ok(routing)
    }

    fn experts(
        &mut self,
        step: &Step,
        x: &Buffer,
        routing: &Routing,
        experts: &Experts,
        shared: Option<(&Linear, &Linear)>,
        out: &mut Buffer,
    ) -> Result<(), Error> {
        let (rows, feed_forward) = (step.rows(), self.feed_forward(x.width));
        let shared = shared.map(|(gate_up, down)| Mlp { gate_up, down });
        self.threads
            .install(|| feed_forward.sparse(x.rows(rows), routing, &experts.0, shared, out.rows_mut(rows)));
        Ok(())
    }

    fn logits(
        &mut self,
        step: &mut Step,
        x: &Buffer,
        head: &Linear,
        logits: &mut Buffer,
    ) -> Result<(), Error> {
        self.prompt_logprobs(step, x, head)?;
        let rows: Vec<usize> = step.sampling().map(|(_, entry)| entry.rows.end - 1).collect();
        let out = logits.rows_mut(rows.len());
        self.threads.install(|| self.apply(&gather(x, &rows), head, out));
        if let Some(tap) = &self.options.tap {
            for ((_, entry), logits) in step.sampling().zip(out.chunks_exact(head.packed.n)) {
                tap(Tapped::Logits { slot: entry.slot, position: entry.next_position() - 1, logits });
            }
        }
        Ok(())
    }

    fn sample(&mut self, step: &mut Step, logits: &Buffer) -> Result<(), Error> {
        let threads = self.threads.clone();
        let Prepared { shape, slots, .. } = self.prepared()?;
        let tokenizer_size = shape.tokenizer_size as usize;
        let rows = logits.values.chunks_exact(logits.width);
        let rows: Vec<_> = step
            .sampling()
            .zip(rows)
            .map(|((index, entry), logits)| Ok((index, slots.row(entry, logits, tokenizer_size)?)))
            .collect::<Result<_, Error>>()?;
        let sampled: Vec<_> = match rows.as_slice() {
            [(index, row)] => vec![(*index, sample::sample(row))],
            rows => threads
                .install(|| rows.par_iter().map(|(index, row)| (*index, sample::sample(row))).collect()),
        };
        for (index, token) in sampled {
            let entry = &step.entries[index];
            let (slot, position) = (entry.slot, entry.next_position());
            let token = token.ok_or(Error::NotFinite { slot, position })?;
            slots.sampled(slot, &token);
            step.outputs[index].sampled = Some(token);
        }
        Ok(())
    }

    /// Calls compute where they are made.
    fn is_done(&mut self, _: &Step) -> bool {
        true
    }

    fn download(&mut self, step: Step) -> Result<Vec<EntryOutput>, Error> {
        Ok(step.outputs)
    }

    fn all_reduce(&mut self, _: &Step, _: &mut Buffer) -> Result<(), Error> {
        Ok(())
    }

    /// Enters the thread pool once for the whole step.
    fn graphed<F>(&mut self, _: GraphKey, run: F) -> Result<(), Error>
    where
        F: FnOnce(&mut Self) -> Result<(), Error> + Send,
    {
        self.threads.clone().install(|| run(self))
    }

    fn mark(&mut self) -> Result<Instant, Error> {
        Ok(Instant::now())
    }

    fn between(&mut self, from: &Instant, to: &Instant) -> Result<f32, Error> {
        Ok(to.duration_since(*from).as_secs_f32() * 1e3)
    }

    fn kv_read(&mut self, block: BlockId, rows: u32, reply: Reply<Payload>) -> Result<(), Error> {
        self.transfer(reply, |pool| pool.read(block, rows));
        Ok(())
    }

    fn kv_write(
        &mut self,
        block: BlockId,
        rows: u32,
        payload: Payload,
        reply: Reply<()>,
    ) -> Result<(), Error> {
        self.transfer(reply, |pool| pool.write(block, rows, &payload.bytes)?.expect(payload.digest));
        Ok(())
    }

    fn kv_digest(&mut self, block: BlockId, rows: u32, reply: Reply<Digest>) -> Result<(), Error> {
        self.transfer(reply, |pool| pool.digest(block, rows));
        Ok(())
    }

    fn kv_region(&self) -> Option<Region> {
        self.prepared.as_ref().map(|prepared| prepared.pool.region())
    }

    fn fail(&mut self) -> Result<(), Error> {
        Err(Error::Device("it was told to fail".to_string()))
    }
}

/// Before `prepare`.
const EMPTY: KvLayout = KvLayout { dtype: KvDtype::F32, layers: 0, block_tokens: 1, row: 0 };

impl CpuBackend {
    fn apply(&self, x: &[f32], weight: &Linear, out: &mut [f32]) {
        let Packed { n, k, .. } = weight.packed;
        let rounded = self.options.rounding.inputs(x, k, weight.fp8);
        let values = rounded.as_deref().unwrap_or(x);
        let product = Product {
            rows: x.len() / k,
            x: Rows { values, stride: k },
            w: &weight.packed,
            y: Out::new(out, n),
        };
        // SAFETY: one product, out is its own.
        unsafe { multiply(self.level, &[product]) }
    }

    fn feed_forward(&self, hidden: usize) -> FeedForward {
        FeedForward { level: self.level, rounding: self.options.rounding, hidden }
    }

    fn prompt_logprobs(&mut self, step: &mut Step, x: &Buffer, head: &Linear) -> Result<(), Error> {
        let tokenizer_size = self.prepared()?.shape.tokenizer_size as usize;
        for wanted in step.wanted.chunks(LOGPROB_ROWS) {
            let rows: Vec<usize> = wanted.iter().map(|wanted| wanted.row as usize).collect();
            let mut logits = vec![0.0; rows.len() * head.packed.n];
            self.threads.install(|| self.apply(&gather(x, &rows), head, &mut logits));
            for (wanted, logits) in wanted.iter().zip(logits.chunks_exact(head.packed.n)) {
                let (slot, position) = (step.entries[wanted.entry].slot, wanted.position);
                if let Some(tap) = &self.options.tap {
                    tap(Tapped::Logits { slot, position, logits });
                }
                if !logits[wanted.target as usize].is_finite() {
                    return Err(Error::NotFinite { slot, position });
                }
                let logprobs = sample::logprobs(logits, tokenizer_size, wanted.target, wanted.top);
                step.outputs[wanted.entry].prompt_logprobs.push((position + 1, logprobs));
            }
        }
        Ok(())
    }

    fn transfer<T>(&mut self, reply: Reply<T>, copy: impl FnOnce(&mut KvPool) -> Result<T, KvError>) {
        let result = match &mut self.prepared {
            Some(prepared) => copy(&mut prepared.pool),
            None => Err(KvError::Stopped("no model is loaded".to_string())),
        };
        // Whoever asked may have stopped waiting.
        let _ = reply.send(result);
    }
}

fn gather(x: &Buffer, rows: &[usize]) -> Vec<f32> {
    rows.iter().flat_map(|row| &x.values[row * x.width..][..x.width]).copied().collect()
}
