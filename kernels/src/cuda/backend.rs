//! [`Backend`] on a GPU: each operation is a few launches of the kernels of this folder over the rows of the step.

use super::{
    CudaBackend, absorb,
    attention::{self, Heads},
    device::{Address, Device},
    elementwise,
    elementwise::LowQuery,
    gate,
    graphs::{self, Next},
    linear::{self, Batch, Input, Matrix, Output, Runs},
    memory::{Buffer, Prepared},
    moe,
    sample::{self, SampleResult},
    step::Step,
    weights::{Experts, Linear, Matrices, Mla, Query, Table},
};
use crate::{
    Backend, EntryOutput, Error, GateRule, GraphKey, MlaTensors, MlpTensors, Shape, StepInput, Tensor,
    Weights, check::check,
};
use bytes::Bytes;
use kv::{BlockId, KvDtype, KvError, KvLayout, Reply};

/// Rows of prompt logprobs whose logits are held at once.
pub(super) const LOGPROB_ROWS: usize = 32;

/// Chosen experts and their weights, until the next gate.
pub struct Routing {
    chosen: Address,
    weights: Address,
    top_k: u32,
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

    fn layout(&self) -> KvLayout {
        self.prepared.as_ref().map_or(EMPTY, |prepared| prepared.pool.layout())
    }

    fn upload(&mut self, step: &StepInput) -> Result<Step, Error> {
        let (device, prepared) = self.parts()?;
        device.bind()?;
        check(step, &prepared.shape)?;
        step.init.iter().try_for_each(|init| prepared.slots.check(init))?;
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
        let input = Input { gather: Some(at.sample_row), ..bf16(x.address(), head.k) };
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

    fn kv_read(&mut self, block: BlockId, rows: u32, reply: Reply<Bytes>) {
        match &self.prepared {
            Some(prepared) => prepared.pool.read(&self.device, block, rows, reply),
            None => drop(reply.send(Err(KvError::Stopped("no model is loaded".to_string())))),
        }
    }

    fn kv_write(&mut self, block: BlockId, rows: u32, payload: Bytes, reply: Reply<()>) {
        match &self.prepared {
            Some(prepared) => prepared.pool.write(&self.device, block, rows, &payload, reply),
            None => drop(reply.send(Err(KvError::Stopped("no model is loaded".to_string())))),
        }
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

impl Linear {
    fn matrix(&self) -> Matrix {
        Matrix { weights: self.weights(), scales: self.scales(), n: self.n, k: self.k }
    }
}

impl Matrices {
    fn matrix(&self) -> Matrix {
        Matrix { weights: self.weights(), scales: self.scales(), n: self.n as u32, k: self.k as u32 }
    }
}

/// Dense rows of width `k`.
fn bf16(values: Address, k: u32) -> Input {
    Input { values, scales: None, stride: k, gather: None }
}

/// Attention of one layer over the rows of a step.
struct Attend<'a> {
    launch: Launch,
    step: &'a Step,
    layer: usize,
    weights: &'a Mla,
}

/// Keys and values that the direct form makes at once take at most so many bytes each.
const DIRECT_BYTES: usize = 512 << 20;

impl Attend<'_> {
    /// Queries into the latent space, attention over the cache rows as they are, the sums out of it.
    fn absorbed(
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
    fn direct(
        &self,
        device: &Device,
        prepared: &mut Prepared,
        query: Address,
        out: Address,
    ) -> Result<(), Error> {
        let shape = prepared.shape.clone();
        attention::check_direct(shape.nope, shape.value)?;
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
                attention::attend_direct(device, span, heads, query, k, v, rope, scale, out)?;
            }
        }
        Ok(())
    }
}

/// Rows of a step: how many a launch covers, and where the device finds how many there are.
#[derive(Clone, Copy)]
struct Launch {
    count: Address,
    most: u32,
    max: usize,
}

impl Launch {
    fn rows(prepared: &Prepared, step: &Step) -> Launch {
        Launch { count: prepared.step.addresses.counts, most: step.extent.rows, max: prepared.max_rows() }
    }

    fn runs(&self) -> Runs {
        Runs::Count { count: self.count, most: self.most }
    }

    /// As `matrix` takes its input: quantised, if it is FP8. There are `per` rows for each of the step's.
    fn input(
        &self,
        device: &Device,
        prepared: &mut Prepared,
        x: Address,
        matrix: Matrix,
        per: u32,
    ) -> Result<Input, Error> {
        let k = matrix.k;
        if matrix.scales.is_none() {
            return Ok(bf16(x, k));
        }
        let rows = self.max * per as usize;
        let values = prepared.room(device, "e4m3", rows * k as usize)?;
        let scales = prepared.room(device, "e4m3 scales", 4 * rows * k.div_ceil(128) as usize)?;
        linear::quantize(device, self.count, per, self.most * per, x, k, k, values, scales)?;
        Ok(Input { values, scales: Some(scales), stride: k, gather: None })
    }

    fn linear(
        &self,
        device: &Device,
        prepared: &mut Prepared,
        x: Address,
        weight: &Linear,
        out: Address,
    ) -> Result<(), Error> {
        let input = self.input(device, prepared, x, weight.matrix(), 1)?;
        let output = Output { values: out, stride: weight.n, f32: false };
        linear::linear(device, weight.matrix(), input, output, self.runs(), Batch::ONE)
    }

    /// A bf16 matrix for each head: (weights, columns in, their stride), then (columns out, their stride).
    fn heads(
        &self,
        device: &Device,
        shape: &Shape,
        (weights, k, from): (Address, u32, usize),
        x: Address,
        (n, to): (u32, usize),
        out: Address,
    ) -> Result<(), Error> {
        let (heads, from, to) = (shape.heads, from as u32, to as u32);
        let matrix = Matrix { weights, scales: None, n, k };
        let input = Input { stride: heads * from, ..bf16(x, k) };
        let output = Output { values: out, stride: heads * to, f32: false };
        let batch = Batch { count: heads, weights: 2 * n * k, input: 2 * from, output: to };
        linear::linear(device, matrix, input, output, self.runs(), batch)
    }

    /// Latent rows to rows of some heads: `[rows][heads.count][n]`, by matrices `[heads.all][n][latent]`.
    #[allow(clippy::too_many_arguments)]
    fn up(
        &self,
        device: &Device,
        shape: &Shape,
        heads: &Heads,
        weights: Address,
        n: u32,
        x: Address,
        out: Address,
    ) -> Result<(), Error> {
        let bytes = 2 * n * shape.latent;
        let weights = weights + u64::from(heads.first) * u64::from(bytes);
        let matrix = Matrix { weights, scales: None, n, k: shape.latent };
        let output = Output { values: out, stride: heads.count * n, f32: false };
        let batch = Batch { count: heads.count, weights: bytes, input: 0, output: n };
        linear::linear(device, matrix, bf16(x, shape.latent), output, self.runs(), batch)
    }

    fn mlp(
        &self,
        device: &Device,
        prepared: &mut Prepared,
        x: Address,
        gate_up: &Linear,
        down: &Linear,
        out: Address,
    ) -> Result<(), Error> {
        let width = down.k;
        let both = prepared.room(device, "gate and up", 4 * self.max * width as usize)?;
        let inner = prepared.room(device, "activated", 2 * self.max * width as usize)?;
        self.linear(device, prepared, x, gate_up, both)?;
        moe::silu_mul(device, self.count, 1, self.most, both, width, inner)?;
        self.linear(device, prepared, inner, down, out)
    }

    #[allow(clippy::too_many_arguments)]
    fn experts(
        &self,
        device: &Device,
        prepared: &mut Prepared,
        x: Address,
        routing: &Routing,
        experts: &Experts,
        shared: Option<Address>,
        out: Address,
    ) -> Result<(), Error> {
        let (top_k, count) = (routing.top_k, experts.count);
        let (gate_up, down) = (experts.gate_up.matrix(), experts.down.matrix());
        let (hidden, width) = (down.n, down.k);
        let slots = self.max * top_k as usize;
        let places = prepared.room(device, "places", moe::scratch_bytes(self.max as u32, top_k, count))?;
        let both = prepared.room(device, "experts' gate and up", 4 * slots * width as usize)?;
        let inner = prepared.room(device, "experts' activated", 2 * slots * width as usize)?;
        let results = prepared.room(device, "experts' results", 2 * slots * hidden as usize)?;
        // Twice the mean, so that few experts spill into a second tile and have their weights read again.
        let tokens = linear::tile(2 * self.most * top_k / count);
        let places = moe::place(device, self.count, self.most, top_k, count, tokens, routing.chosen, places)?;
        let input = self.input(device, prepared, x, gate_up, 1)?;
        let input = Input { gather: Some(places.row_at), ..input };
        let output = Output { values: both, stride: 2 * width, f32: false };
        linear::linear(device, gate_up, input, output, places.runs, Batch::ONE)?;
        moe::silu_mul(device, self.count, top_k, self.most * top_k, both, width, inner)?;
        let input = self.input(device, prepared, inner, down, top_k)?;
        let output = Output { values: results, stride: hidden, f32: false };
        linear::linear(device, down, input, output, places.runs, Batch::ONE)?;
        let (count, rows, weights) = (self.count, self.most, routing.weights);
        moe::combine(device, count, rows, top_k, results, &places, weights, shared, hidden, out)
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
    let tokenizer_size = prepared.shape.tokenizer_size;
    let column = |index: usize| step.wanted_at + 4 * (index * total) as u64;
    for (chunk, first) in (0..total).step_by(LOGPROB_ROWS).enumerate() {
        let (rows, at) = ((total - first).min(LOGPROB_ROWS) as u32, 4 * first as u64);
        let count = column(3) + 4 * chunk as u64;
        let input = Input { gather: Some(column(0) + at), ..bf16(x, head.k) };
        let output = Output { values: logits, stride: head.n, f32: true };
        linear::linear(device, head.matrix(), input, output, Runs::Count { count, most: rows }, Batch::ONE)?;
        let results = prepared.prompt_results() + (first * sample::RESULT_BYTES) as u64;
        let (targets, tops) = (column(1) + at, column(2) + at);
        sample::logprobs(device, rows, logits, head.n, tokenizer_size, targets, tops, results)?;
    }
    Ok(())
}
