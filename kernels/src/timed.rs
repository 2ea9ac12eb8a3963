//! A backend that measures another one: what each operation of a step takes, on the device. Nothing is recorded or replayed,
//! so launches are not hidden: where the device outruns the host, times include waiting for it.

use crate::{
    Backend, DeviceMemory, EntryOutput, Error, GateRule, GraphKey, MlaTensors, MlpTensors, Random, Shape,
    StepInput, Tensor, Weights,
};
use kv::{BlockId, KvLayout, Payload, Reply};

pub struct Timed<B: Backend> {
    inner: B,
    /// Operations in the order of their launch.
    operations: Vec<Operation<B::Mark>>,
}

struct Operation<M> {
    name: &'static str,
    before: M,
    after: M,
}

/// All calls of one operation in a step.
#[derive(Clone, Debug, PartialEq)]
pub struct OperationTime {
    pub name: &'static str,
    pub calls: u32,
    pub milliseconds: f32,
}

impl<B: Backend> Timed<B> {
    pub fn new(inner: B) -> Timed<B> {
        Timed { inner, operations: Vec::new() }
    }

    /// What ran since the last call, in the order of the first of each. Its steps must have been downloaded.
    pub fn take(&mut self) -> Result<Vec<OperationTime>, Error> {
        let mut times: Vec<OperationTime> = Vec::new();
        for operation in std::mem::take(&mut self.operations) {
            let milliseconds = self.inner.between(&operation.before, &operation.after)?;
            match times.iter_mut().find(|time| time.name == operation.name) {
                Some(time) => {
                    time.calls += 1;
                    time.milliseconds += milliseconds;
                }
                None => times.push(OperationTime { name: operation.name, calls: 1, milliseconds }),
            }
        }
        Ok(times)
    }

    fn time<T>(
        &mut self,
        name: &'static str,
        run: impl FnOnce(&mut B) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let before = self.inner.mark()?;
        let result = run(&mut self.inner)?;
        let after = self.inner.mark()?;
        self.operations.push(Operation { name, before, after });
        Ok(result)
    }
}

impl<B: Backend> Weights for Timed<B> {
    type Table = B::Table;
    type Linear = B::Linear;
    type Mla = B::Mla;
    type Experts = B::Experts;
    type Buffer = B::Buffer;

    fn prepare(&mut self, shape: Shape) -> Result<(), Error> {
        self.inner.prepare(shape)
    }

    fn memory(&self) -> Result<Option<DeviceMemory>, Error> {
        self.inner.memory()
    }

    fn resize_pool(&mut self, blocks: u32) -> Result<(), Error> {
        self.inner.resize_pool(blocks)
    }

    fn randomize_pool(&mut self, random: Random) -> Result<(), Error> {
        self.inner.randomize_pool(random)
    }

    fn alloc(&mut self, rows: usize, width: usize) -> Result<B::Buffer, Error> {
        self.inner.alloc(rows, width)
    }

    fn alloc_logits(&mut self, rows: usize, width: usize) -> Result<B::Buffer, Error> {
        self.inner.alloc_logits(rows, width)
    }

    fn load_table(&mut self, tensor: Tensor<'_>) -> Result<B::Table, Error> {
        self.inner.load_table(tensor)
    }

    fn load_linear(&mut self, parts: &[Tensor<'_>]) -> Result<B::Linear, Error> {
        self.inner.load_linear(parts)
    }

    fn load_mla(&mut self, tensors: &MlaTensors<'_>) -> Result<B::Mla, Error> {
        self.inner.load_mla(tensors)
    }

    fn load_experts(
        &mut self,
        count: usize,
        experts: &mut dyn Iterator<Item = MlpTensors<'_>>,
    ) -> Result<B::Experts, Error> {
        self.inner.load_experts(count, experts)
    }
}

impl<B: Backend> Backend for Timed<B> {
    type Step = B::Step;
    type Routing = B::Routing;
    type Mark = B::Mark;

    fn layout(&self) -> KvLayout {
        self.inner.layout()
    }

    fn upload(&mut self, step: &StepInput) -> Result<B::Step, Error> {
        self.time("upload", |inner| inner.upload(step))
    }

    fn embed(&mut self, step: &B::Step, table: &B::Table, residual: &mut B::Buffer) -> Result<(), Error> {
        self.time("embed", |inner| inner.embed(step, table, residual))
    }

    fn rms_norm(
        &mut self,
        step: &B::Step,
        residual: &mut B::Buffer,
        delta: Option<&B::Buffer>,
        weight: &B::Table,
        eps: f32,
        out: &mut B::Buffer,
    ) -> Result<(), Error> {
        self.time("rms_norm", |inner| inner.rms_norm(step, residual, delta, weight, eps, out))
    }

    fn mla_project(
        &mut self,
        step: &B::Step,
        layer: usize,
        x: &B::Buffer,
        weights: &B::Mla,
        query: &mut B::Buffer,
    ) -> Result<(), Error> {
        self.time("mla_project", |inner| inner.mla_project(step, layer, x, weights, query))
    }

    fn mla_attend(
        &mut self,
        step: &B::Step,
        layer: usize,
        query: &B::Buffer,
        weights: &B::Mla,
        out: &mut B::Buffer,
    ) -> Result<(), Error> {
        self.time("mla_attend", |inner| inner.mla_attend(step, layer, query, weights, out))
    }

    fn linear(
        &mut self,
        step: &B::Step,
        x: &B::Buffer,
        weight: &B::Linear,
        out: &mut B::Buffer,
    ) -> Result<(), Error> {
        self.time("linear (o_proj)", |inner| inner.linear(step, x, weight, out))
    }

    fn mlp(
        &mut self,
        step: &B::Step,
        x: &B::Buffer,
        gate_up: &B::Linear,
        down: &B::Linear,
        out: &mut B::Buffer,
    ) -> Result<(), Error> {
        self.time("mlp (dense layers)", |inner| inner.mlp(step, x, gate_up, down, out))
    }

    fn gate(
        &mut self,
        step: &B::Step,
        x: &B::Buffer,
        weight: &B::Linear,
        bias: Option<&B::Table>,
        rule: &GateRule,
    ) -> Result<B::Routing, Error> {
        self.time("gate", |inner| inner.gate(step, x, weight, bias, rule))
    }

    fn experts(
        &mut self,
        step: &B::Step,
        x: &B::Buffer,
        routing: &B::Routing,
        experts: &B::Experts,
        shared: Option<(&B::Linear, &B::Linear)>,
        out: &mut B::Buffer,
    ) -> Result<(), Error> {
        self.time("experts (routed and shared)", |inner| {
            inner.experts(step, x, routing, experts, shared, out)
        })
    }

    fn logits(
        &mut self,
        step: &mut B::Step,
        x: &B::Buffer,
        head: &B::Linear,
        logits: &mut B::Buffer,
    ) -> Result<(), Error> {
        self.time("logits", |inner| inner.logits(step, x, head, logits))
    }

    fn sample(&mut self, step: &mut B::Step, logits: &B::Buffer) -> Result<(), Error> {
        self.time("sample", |inner| inner.sample(step, logits))
    }

    fn is_done(&mut self, step: &B::Step) -> bool {
        self.inner.is_done(step)
    }

    fn download(&mut self, step: B::Step) -> Result<Vec<EntryOutput>, Error> {
        self.inner.download(step)
    }

    fn all_reduce(&mut self, step: &B::Step, buffer: &mut B::Buffer) -> Result<(), Error> {
        self.inner.all_reduce(step, buffer)
    }

    /// Launched one by one; then the backend is told that a step which is never recorded has been.
    fn graphed<F>(&mut self, key: GraphKey, run: F) -> Result<(), Error>
    where
        F: FnOnce(&mut Self) -> Result<(), Error> + Send,
    {
        run(self)?;
        self.inner.graphed(GraphKey { decode: false, ..key }, |_| Ok(()))
    }

    fn mark(&mut self) -> Result<B::Mark, Error> {
        self.inner.mark()
    }

    fn between(&mut self, from: &B::Mark, to: &B::Mark) -> Result<f32, Error> {
        self.inner.between(from, to)
    }

    fn kv_read(&mut self, block: BlockId, rows: u32, reply: Reply<Payload>) -> Result<(), Error> {
        self.inner.kv_read(block, rows, reply)
    }

    fn kv_write(
        &mut self,
        block: BlockId,
        rows: u32,
        payload: Payload,
        reply: Reply<()>,
    ) -> Result<(), Error> {
        self.inner.kv_write(block, rows, payload, reply)
    }

    fn fail(&mut self) -> Result<(), Error> {
        self.inner.fail()
    }
}
