//! [`Backend`] on a GPU: each operation is a few launches of the kernels of this folder over the rows of the step.

use super::{
    CudaBackend,
    activate::{self, Rows, Source},
    device::{Address, Device},
    digest, elementwise,
    elementwise::LowQuery,
    gate,
    graphs::{self, Next},
    linear::{self, Batch, Output, Runs},
    memory::{Buffer, Prepared},
    mla::Attend,
    random::{self, View},
    rows::{self, Launch, bf16},
    sample::{self, SampleResult},
    step::Step,
    weights::{Experts, Linear, Mla, Query, Table},
};
use crate::{
    Backend, DeviceMemory, EntryOutput, Error, GateRule, GraphKey, MlaTensors, MlpTensors, Random, Shape,
    StepInput, Tensor, Weights, check::check,
};
use cudarc::driver::CudaEvent;
use kv::{BlockId, Digest, KvDtype, KvLayout, Payload, Reply};

/// Rows of prompt logprobs whose logits are held at once.
pub(super) const LOGPROB_ROWS: usize = 32;

/// Chosen experts and their weights, until the next gate.
pub struct Routing {
    pub(super) chosen: Address,
    pub(super) weights: Address,
    pub(super) top_k: u32,
}

impl Weights for CudaBackend {
    type Table = Table;
    type Linear = Linear;
    type Mla = Mla;
    type Experts = Experts;
    type Buffer = Buffer;

    fn prepare(&mut self, shape: Shape) -> Result<(), Error> {
        self.prepared = Some(Prepared::new(&self.device, shape)?);
        Ok(())
    }

    fn memory(&self) -> Result<Option<DeviceMemory>, Error> {
        self.device.memory().map(Some)
    }

    fn resize_pool(&mut self, blocks: u32) -> Result<(), Error> {
        let (device, prepared) = self.parts()?;
        prepared.resize_pool(device, blocks)
    }

    fn randomize_pool(&mut self, random: Random) -> Result<(), Error> {
        let (device, prepared) = self.parts()?;
        let elements = prepared.pool.layout().block_bytes() / 2;
        let view = View::whole(prepared.shape.blocks as usize, elements);
        random::bf16(device, random, false, view, prepared.pool.address())
    }

    fn alloc(&mut self, rows: usize, width: usize) -> Result<Buffer, Error> {
        Buffer::new(&self.device, rows, width, 2)
    }

    fn alloc_logits(&mut self, rows: usize, width: usize) -> Result<Buffer, Error> {
        Buffer::new(&self.device, rows, width, 4)
    }

    fn load_table(&mut self, tensor: Tensor<'_>) -> Result<Table, Error> {
        Table::load(&self.device, tensor)
    }

    fn load_linear(&mut self, parts: &[Tensor<'_>]) -> Result<Linear, Error> {
        Linear::load(&self.device, parts)
    }

    fn load_mla(&mut self, tensors: &MlaTensors<'_>) -> Result<Mla, Error> {
        let (device, prepared) = self.parts()?;
        Mla::load(device, &prepared.shape, tensors)
    }

    fn load_experts(
        &mut self,
        count: usize,
        experts: &mut dyn Iterator<Item = MlpTensors<'_>>,
    ) -> Result<Experts, Error> {
        Experts::load(&self.device, count, experts)
    }
}

impl Backend for CudaBackend {
    type Step = Step;
    type Routing = Routing;
    type Mark = CudaEvent;

    fn layout(&self) -> KvLayout {
        self.prepared.as_ref().map_or(EMPTY, |prepared| prepared.pool.layout())
    }

    fn upload(&mut self, step: &StepInput) -> Result<Step, Error> {
        let (device, prepared) = self.parts()?;
        device.bind()?;
        check(step, &prepared.shape)?;
        prepared.known.accept(step)?;
        for init in &step.init {
            prepared.slots.init_slot(device, init)?;
        }
        prepared.upload(device, step)
    }

    fn embed(&mut self, step: &Step, table: &Table, residual: &mut Buffer) -> Result<(), Error> {
        let (device, Prepared { step: at, shape, .. }) = self.parts()?;
        let (from, to) = (table.address(), residual.address());
        elementwise::embed(device, &at.addresses, &step.extent, from, shape.vocab, table.width, to)
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
        let (device, Prepared { step: at, .. }) = self.parts()?;
        let delta = delta.map(Buffer::address);
        let (from, to, width) = (residual.address(), out.address(), residual.width);
        elementwise::rms_norm(
            device,
            &at.addresses,
            &step.extent,
            from,
            delta,
            weight.address(),
            eps,
            width,
            to,
        )
    }

    fn mla_project(
        &mut self,
        step: &Step,
        layer: usize,
        x: &Buffer,
        weights: &Mla,
        query: &mut Buffer,
    ) -> Result<(), Error> {
        let (device, prepared) = self.parts()?;
        let (rows, stride, rank) = (prepared.max_rows(), weights.low.n, weights.rank());
        let low = prepared.room(device, "low", 2 * rows * stride as usize)?;
        let normed = prepared.room(device, "normed query", 2 * rows * rank as usize)?;
        let launch = Launch::rows(prepared, step);
        launch.linear(device, prepared, x.address(), &weights.low, low)?;
        let low_query = match &weights.query {
            Query::Direct(q) => {
                launch.linear(device, prepared, x.address(), q, query.address())?;
                None
            }
            Query::LowRank { norm, .. } => Some(LowQuery { rank, norm: norm.address(), normed }),
        };
        let (at, to) = (prepared.step.addresses, prepared.layer(layer));
        let norm = weights.kv_norm.address();
        elementwise::cache_write(device, &at, &step.extent, low, stride, low_query, norm, weights.eps, &to)?;
        if let Query::LowRank { b, .. } = &weights.query {
            launch.linear(device, prepared, normed, b, query.address())?;
        }
        let Shape { heads, nope, rope, .. } = prepared.shape;
        elementwise::rotate_query(device, &at, &step.extent, query.address(), heads, nope, rope)
    }

    fn mla_attend(
        &mut self,
        step: &Step,
        layer: usize,
        query: &Buffer,
        weights: &Mla,
        out: &mut Buffer,
    ) -> Result<(), Error> {
        let (device, prepared) = self.parts()?;
        let attend = Attend { launch: Launch::rows(prepared, step), step, layer, weights };
        match step.is_direct() {
            true => attend.direct(device, prepared, query.address(), out.address()),
            false => attend.absorbed(device, prepared, query.address(), out.address()),
        }
    }

    fn linear(&mut self, step: &Step, x: &Buffer, weight: &Linear, out: &mut Buffer) -> Result<(), Error> {
        let (device, prepared) = self.parts()?;
        Launch::rows(prepared, step).linear(device, prepared, x.address(), weight, out.address())
    }

    fn mlp(
        &mut self,
        step: &Step,
        x: &Buffer,
        gate_up: &Linear,
        down: &Linear,
        out: &mut Buffer,
    ) -> Result<(), Error> {
        let (device, prepared) = self.parts()?;
        Launch::rows(prepared, step).mlp(device, prepared, x.address(), gate_up, down, out.address())
    }

    fn gate(
        &mut self,
        step: &Step,
        x: &Buffer,
        weight: &Linear,
        bias: Option<&Table>,
        rule: &GateRule,
    ) -> Result<Routing, Error> {
        let (device, prepared) = self.parts()?;
        let (rows, experts) = (prepared.max_rows(), weight.n);
        let choices = 4 * rows * rule.top_k as usize;
        let logits = prepared.room(device, "gate", 4 * rows * experts as usize)?;
        let chosen = prepared.room(device, "chosen", choices)?;
        let weights = prepared.room(device, "routing weights", choices)?;
        let launch = Launch::rows(prepared, step);
        let output = Output { values: logits, stride: experts, f32: true };
        linear::linear(
            device,
            weight.matrix(),
            bf16(x.address(), weight.k),
            output,
            launch.runs(),
            Batch::ONE,
        )?;
        let bias = bias.map(Table::address);
        let at = prepared.step.addresses;
        gate::route(device, &at, &step.extent, logits, experts, bias, rule, chosen, weights)?;
        Ok(Routing { chosen, weights, top_k: rule.top_k })
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
        let (device, prepared) = self.parts()?;
        let launch = Launch::rows(prepared, step);
        let shared = match shared {
            Some((gate_up, down)) => {
                let room = prepared.room(device, "shared", 2 * prepared.max_rows() * down.n as usize)?;
                launch.mlp(device, prepared, x.address(), gate_up, down, room)?;
                Some(room)
            }
            None => None,
        };
        launch.experts(device, prepared, x.address(), routing, experts, shared, out.address())
    }

    fn logits(
        &mut self,
        step: &mut Step,
        x: &Buffer,
        head: &Linear,
        logits: &mut Buffer,
    ) -> Result<(), Error> {
        let (device, prepared) = self.parts()?;
        prompt_logprobs(device, prepared, step, x.address(), head)?;
        if step.extent.samples == 0 {
            return Ok(());
        }
        let at = prepared.step.addresses;
        let rows = Rows { count: at.counts + 8, per: 1, most: step.extent.samples };
        let source = Source { row_at: Some(at.sample_row), ..rows::rows(x.address(), head.k) };
        let most = prepared.shape.max_sequences as usize;
        let sampled = prepared.room(device, "sampled rows", 2 * most * head.k as usize)?;
        activate::gather(device, rows, source, head.k, sampled)?;
        let input = bf16(sampled, head.k);
        let output = Output { values: logits.address(), stride: head.n, f32: true };
        let runs = Runs::Count { count: at.counts + 8, most: step.extent.samples };
        linear::linear(device, head.matrix(), input, output, runs, Batch::ONE)
    }

    fn sample(&mut self, step: &mut Step, logits: &Buffer) -> Result<(), Error> {
        let (device, prepared) = self.parts()?;
        let Shape { max_sequences, vocab, tokenizer_size, .. } = prepared.shape;
        let scratch = prepared.room(device, "sampler", sample::sample_scratch_bytes(max_sequences, vocab))?;
        let (at, results) = (prepared.step.addresses, prepared.results.address());
        let slots = &prepared.slots;
        let values = logits.address();
        sample::sample(device, &at, &step.extent, slots, values, tokenizer_size, scratch, results)
    }

    /// An error shows when the step is downloaded.
    fn is_done(&mut self, step: &Step) -> bool {
        self.prepared.as_mut().is_none_or(|prepared| prepared.ring.place(step.ring).done.is_complete())
    }

    fn download(&mut self, step: Step) -> Result<Vec<EntryOutput>, Error> {
        let (device, prepared) = self.parts()?;
        device.bind()?;
        let prompts_at = prepared.shape.max_sequences as usize;
        let bytes = prepared.ring.results(step.ring)?;
        let result =
            |index: usize| SampleResult::read(&bytes[index * sample::RESULT_BYTES..][..sample::RESULT_BYTES]);
        step.outputs(result, |index| result(prompts_at + index))
    }

    fn all_reduce(&mut self, _: &Step, _: &mut Buffer) -> Result<(), Error> {
        Ok(())
    }

    /// Decode steps are recorded; prefill steps differ too much to come again.
    fn graphed<F>(&mut self, key: GraphKey, run: F) -> Result<(), Error>
    where
        F: FnOnce(&mut Self) -> Result<(), Error> + Send,
    {
        if !key.decode {
            run(self)?;
            return self.collect();
        }
        let (_, prepared) = self.parts()?;
        let bucket = prepared.step.padded(key.entries);
        match prepared.graphs.next(bucket)? {
            Next::Replayed => {}
            Next::Run => run(self)?,
            Next::Record => self.record(bucket, run)?,
        }
        self.collect()
    }

    fn mark(&mut self) -> Result<CudaEvent, Error> {
        self.device.mark()
    }

    fn between(&mut self, from: &CudaEvent, to: &CudaEvent) -> Result<f32, Error> {
        from.elapsed_ms(to).map_err(super::device::device)
    }

    fn kv_read(&mut self, block: BlockId, rows: u32, reply: Reply<Payload>) -> Result<(), Error> {
        let (device, prepared) = self.parts()?;
        prepared.pool.read(device, block, rows, reply)
    }

    fn kv_write(
        &mut self,
        block: BlockId,
        rows: u32,
        payload: Payload,
        reply: Reply<()>,
    ) -> Result<(), Error> {
        let (device, prepared) = self.parts()?;
        prepared.pool.write(device, block, rows, payload, reply)
    }

    /// Reads where no memory is.
    fn fail(&mut self) -> Result<(), Error> {
        let nowhere = digest::Rows { block: 8, width: Digest::LEAF, stride: Digest::LEAF, layers: 1 };
        digest::leaves(&self.device, &self.device.stream, nowhere, 8)
    }
}

/// Before `prepare`.
const EMPTY: KvLayout = KvLayout { dtype: KvDtype::Bf16, layers: 0, block_tokens: 1, row: 0 };

impl CudaBackend {
    fn record<F>(&mut self, bucket: u32, run: F) -> Result<(), Error>
    where
        F: FnOnce(&mut Self) -> Result<(), Error>,
    {
        graphs::begin(&self.device)?;
        self.parts()?.1.scratch.recording = true;
        let ran = run(self);
        let (device, prepared) = self.parts()?;
        prepared.scratch.recording = false;
        let graph = graphs::end(device);
        ran?;
        prepared.graphs.keep(bucket, graph?)
    }

    /// Sends the results of the step that was uploaded last on their way.
    fn collect(&mut self) -> Result<(), Error> {
        let (device, prepared) = self.parts()?;
        prepared.collect(device)
    }
}

/// Logits of prompt rows, some at a time, and what was asked of them.
fn prompt_logprobs(
    device: &Device,
    prepared: &mut Prepared,
    step: &Step,
    x: Address,
    head: &Linear,
) -> Result<(), Error> {
    let total = step.wanted.len();
    if total == 0 {
        return Ok(());
    }
    let logits = prepared.room(device, "prompt logits", 4 * LOGPROB_ROWS * head.n as usize)?;
    let gathered = prepared.room(device, "prompt rows", 2 * LOGPROB_ROWS * head.k as usize)?;
    let tokenizer_size = prepared.shape.tokenizer_size;
    let column = |index: usize| step.wanted_at + 4 * (index * total) as u64;
    for (chunk, first) in (0..total).step_by(LOGPROB_ROWS).enumerate() {
        let (rows, at) = ((total - first).min(LOGPROB_ROWS) as u32, 4 * first as u64);
        let count = column(3) + 4 * chunk as u64;
        let source = Source { row_at: Some(column(0) + at), ..rows::rows(x, head.k) };
        activate::gather(device, Rows { count, per: 1, most: rows }, source, head.k, gathered)?;
        let input = bf16(gathered, head.k);
        let output = Output { values: logits, stride: head.n, f32: true };
        linear::linear(device, head.matrix(), input, output, Runs::Count { count, most: rows }, Batch::ONE)?;
        let results = prepared.prompt_results() + (first * sample::RESULT_BYTES) as u64;
        let (targets, tops) = (column(1) + at, column(2) + at);
        sample::logprobs(device, rows, logits, head.n, tokenizer_size, targets, tops, results)?;
    }
    Ok(())
}
