//! The seam between the model and a device: weights once, then per step a fixed sequence of fused operations.
//!
//! Calls enqueue on one stream, in order, and never wait; only [`Backend::download`] waits. Buffers live on the
//! device and keep their addresses, so that a recorded step can be replayed; the metadata of a step (positions,
//! slots, block tables) lies in resident memory that [`Backend::upload`] overwrites in stream order. What a backend
//! cannot do is an error when the model is loaded or the step uploaded, never a silent difference.
//!
//! `T`: input tokens (rows) of the step, in the order of its entries. All matrices are row-major, a linear layer with
//! stored weight `W[N][K]` maps `x[K]` to `y[n] = Σ_k x[k] · W[n][k]`; nothing in this family has a bias.

use crate::{
    DeviceMemory, EntryOutput, Error, GateRule, GraphKey, MlaTensors, MlpTensors, Random, Shape, StepInput,
    Tensor,
};
use kv::{BlockId, Digest, KvError, KvLayout, Payload, Region, Reply};

/// What is uploaded once. Tensors are borrowed from the checkpoint and converted one by one.
pub trait Weights: Send + Sized + 'static {
    /// Rows that are looked up or multiplied element by element: embedding, norm weights, selection bias.
    type Table: Send + Sync;
    type Linear: Send + Sync;
    type Mla: Send + Sync;
    type Experts: Send + Sync;
    /// Activations, `[rows][width]`.
    type Buffer: Send + Sync;

    /// Reserves the KV pool, the slots and the memory of a step's metadata. Called once, before anything else. Scratch
    /// memory may be reserved by the first steps: its sizes depend on the shape alone, so that a step that attends to a
    /// long prompt and one that decodes bring all of it.
    fn prepare(&mut self, shape: Shape) -> Result<(), Error>;

    /// The memory of a device with its own; `None` where the pool lies in the host's.
    fn memory(&self) -> Result<Option<DeviceMemory>, Error>;

    /// Replaces the pool by one of `blocks` blocks and forgets every slot. No step may be on its way.
    fn resize_pool(&mut self, blocks: u32) -> Result<(), Error>;

    /// Fills the whole pool with random rows, as if contexts had been read: for measuring.
    fn randomize_pool(&mut self, random: Random) -> Result<(), Error>;

    /// Activations, in the backend's own type.
    fn alloc(&mut self, rows: usize, width: usize) -> Result<Self::Buffer, Error>;

    /// Logits of the head: f32 on every backend.
    fn alloc_logits(&mut self, rows: usize, width: usize) -> Result<Self::Buffer, Error>;

    fn load_table(&mut self, tensor: Tensor<'_>) -> Result<Self::Table, Error>;

    /// The rows of `parts` one after the other, as one matrix. f32, bf16, f16, or FP8 with block scales; blocks at the
    /// edges may be partial in either direction.
    fn load_linear(&mut self, parts: &[Tensor<'_>]) -> Result<Self::Linear, Error>;

    fn load_mla(&mut self, tensors: &MlaTensors<'_>) -> Result<Self::Mla, Error>;

    /// `count` experts in the order of their ids. Each is taken from the iterator when the one before it has been converted.
    fn load_experts(
        &mut self,
        count: usize,
        experts: &mut dyn Iterator<Item = MlpTensors<'_>>,
    ) -> Result<Self::Experts, Error>;
}

/// What is launched.
pub trait Backend: Weights {
    /// A step whose metadata is on the device. Holds what `sample` and `logits` found until it is downloaded.
    type Step: Send + Sync;
    /// Chosen experts and their weights, `[T][top_k]`.
    type Routing: Send + Sync;
    /// A point in the order of what is enqueued.
    type Mark: Send;

    /// The bytes of a KV block on this backend.
    fn layout(&self) -> KvLayout;

    /// Checks a step, sets the slots it initialises and makes its metadata resident. `Input::Sampled` is resolved on
    /// the device when the step runs: it may have been sampled by a step still in flight.
    fn upload(&mut self, step: &StepInput) -> Result<Self::Step, Error>;

    /// `residual[t] = table[token[t]]`, `[T][hidden]`.
    fn embed(
        &mut self,
        step: &Self::Step,
        table: &Self::Table,
        residual: &mut Self::Buffer,
    ) -> Result<(), Error>;

    /// `residual += delta` (if given), then `out = weight ⊙ residual · rsqrt(mean(residual²) + eps)`.
    fn rms_norm(
        &mut self,
        step: &Self::Step,
        residual: &mut Self::Buffer,
        delta: Option<&Self::Buffer>,
        weight: &Self::Table,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<(), Error>;

    /// Queries and cache rows of one layer.
    /// `q = W_q x`, or `W_qb · norm(W_qa x)`: `query[t][head] = nope | rope`, the rope part rotated by the position;
    /// `W_kva x = a | r`: the cache row of the token becomes `norm(a) | rotate(r)`.
    /// Rotation of adjacent pairs: `(x cos − y sin, x sin + y cos)`, angle `position · frequency[j]`.
    fn mla_project(
        &mut self,
        step: &Self::Step,
        layer: usize,
        x: &Self::Buffer,
        weights: &Self::Mla,
        query: &mut Self::Buffer,
    ) -> Result<(), Error>;

    /// Causal attention of every query over the cache rows `c | kr` of its sequence, out: `[T][heads × value]`.
    /// Absorbed: `s_j = scale · ((W_UK[h]ᵀ q_nope) · c_j + q_rope · kr_j)`, `o = W_UV[h] · Σ_j softmax(s)_j c_j`;
    /// direct, equal up to rounding: `s_j = scale · (q_nope · (W_UK[h] c_j) + q_rope · kr_j)`, `o = Σ_j softmax(s)_j · W_UV[h] c_j`.
    /// Which form a row takes is the backend's choice; the CPU serves every row by the absorbed one.
    fn mla_attend(
        &mut self,
        step: &Self::Step,
        layer: usize,
        query: &Self::Buffer,
        weights: &Self::Mla,
        out: &mut Self::Buffer,
    ) -> Result<(), Error>;

    /// `out[t] = W x[t]`.
    fn linear(
        &mut self,
        step: &Self::Step,
        x: &Self::Buffer,
        weight: &Self::Linear,
        out: &mut Self::Buffer,
    ) -> Result<(), Error>;

    /// `out[t] = down · (silu(gate · x) ⊙ (up · x))`; `gate_up` is gate's rows, then up's.
    fn mlp(
        &mut self,
        step: &Self::Step,
        x: &Self::Buffer,
        gate_up: &Self::Linear,
        down: &Self::Linear,
        out: &mut Self::Buffer,
    ) -> Result<(), Error>;

    /// Router logits `W x[t]` in f32 and the choice that `rule` makes of them.
    fn gate(
        &mut self,
        step: &Self::Step,
        x: &Self::Buffer,
        weight: &Self::Linear,
        bias: Option<&Self::Table>,
        rule: &GateRule,
    ) -> Result<Self::Routing, Error>;

    /// `out[t] = Σ_slot weight · expert(x[t]) + shared(x[t])`: summed in f32, slots in the gate's order (best
    /// first), the shared expert last, unscaled.
    fn experts(
        &mut self,
        step: &Self::Step,
        x: &Self::Buffer,
        routing: &Self::Routing,
        experts: &Self::Experts,
        shared: Option<(&Self::Linear, &Self::Linear)>,
        out: &mut Self::Buffer,
    ) -> Result<(), Error>;

    /// `logits[i] = head · x[row of the i-th entry that samples]`, f32. Prompt logprobs that the step asks for are taken
    /// here too, some rows at a time, and kept in the step.
    fn logits(
        &mut self,
        step: &mut Self::Step,
        x: &Self::Buffer,
        head: &Self::Linear,
        logits: &mut Self::Buffer,
    ) -> Result<(), Error>;

    /// The next token of every entry that samples, in the order that [`crate::Sampling`] documents; it becomes the slot's last.
    fn sample(&mut self, step: &mut Self::Step, logits: &Self::Buffer) -> Result<(), Error>;

    /// Whether the step has run, so that [`Self::download`] would not wait.
    fn is_done(&mut self, step: &Self::Step) -> bool;

    /// Waits for the step and gives its results, in the order of its entries.
    fn download(&mut self, step: Self::Step) -> Result<Vec<EntryOutput>, Error>;

    /// Sums `buffer` over the ranks of the worker; the identity for one rank.
    fn all_reduce(&mut self, step: &Self::Step, buffer: &mut Self::Buffer) -> Result<(), Error>;

    /// Launches what `run` launches. A backend may record it under `key` and replay the record instead of calling `run`.
    fn graphed<F>(&mut self, key: GraphKey, run: F) -> Result<(), Error>
    where
        F: FnOnce(&mut Self) -> Result<(), Error> + Send;

    /// Marks where enqueueing stands, for measuring.
    fn mark(&mut self) -> Result<Self::Mark, Error>;

    /// Milliseconds from one mark to a later one, waiting for both.
    fn between(&mut self, from: &Self::Mark, to: &Self::Mark) -> Result<f32, Error>;

    /// Copies out the first `rows` tokens of every layer of a block, after everything enqueued so far, with the digest that
    /// the device finds there. What is wrong with this block alone is said in the reply; an error returned, here and below,
    /// means that the device is lost.
    fn kv_read(&mut self, block: BlockId, rows: u32, reply: Reply<Payload>) -> Result<(), Error>;

    /// Copies `payload` into a block, after everything enqueued so far and before what is enqueued later. Replies with
    /// [`kv::KvError::Damaged`] if the device finds another digest where it landed.
    fn kv_write(
        &mut self,
        block: BlockId,
        rows: u32,
        payload: Payload,
        reply: Reply<()>,
    ) -> Result<(), Error>;

    /// The digest of what lies in the first `rows` tokens of every layer of a block, after everything enqueued so far.
    fn kv_digest(&mut self, _block: BlockId, _rows: u32, reply: Reply<Digest>) -> Result<(), Error> {
        let _ = reply.send(Err(KvError::NoRegion("this backend gives digests only with the bytes")));
        Ok(())
    }

    /// Where the pool lies, if transports may reach it without the backend; it stays there once its size is set.
    fn kv_region(&self) -> Option<Region> {
        None
    }

    /// Breaks the device as a wild access of a kernel would, for tests of what follows: it fails here or at the latest when
    /// the next step is downloaded, and nothing can be asked of it afterwards.
    fn fail(&mut self) -> Result<(), Error>;
}
