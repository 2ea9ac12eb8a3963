//! The forward pass: embedding, layers of attention and feed-forward, head, sampler. Written once; nothing here
//! depends on which backend runs it.

use kernels::{Backend, Error, GateRule, Shape};

pub(crate) struct Network<B: Backend> {
    pub embedding: B::Table,
    pub layers: Vec<Layer<B>>,
    pub norm: B::Table,
    pub head: B::Linear,
    pub eps: f32,
}

pub(crate) struct Layer<B: Backend> {
    pub input_norm: B::Table,
    pub mla: B::Mla,
    pub output: B::Linear,
    pub post_norm: B::Table,
    pub feed_forward: FeedForward<B>,
}

pub(crate) enum FeedForward<B: Backend> {
    Dense {
        gate_up: B::Linear,
        down: B::Linear,
    },
    Sparse {
        gate: B::Linear,
        bias: Option<B::Table>,
        rule: GateRule,
        experts: B::Experts,
        shared: Option<(B::Linear, B::Linear)>,
    },
}

/// What lives from one operation to the next. Allocated once.
pub(crate) struct Activations<B: Backend> {
    residual: B::Buffer,
    /// What the next operation adds to the residual.
    delta: B::Buffer,
    /// Normed residual, input of projections.
    hidden: B::Buffer,
    query: B::Buffer,
    attended: B::Buffer,
    logits: B::Buffer,
}

impl<B: Backend> Activations<B> {
    pub fn alloc(backend: &mut B, shape: &Shape) -> Result<Self, Error> {
        let rows = shape.max_step_tokens as usize;
        let hidden = shape.hidden as usize;
        let heads = shape.heads as usize;
        Ok(Activations {
            residual: backend.alloc(rows, hidden)?,
            delta: backend.alloc(rows, hidden)?,
            hidden: backend.alloc(rows, hidden)?,
            query: backend.alloc(rows, heads * shape.query())?,
            attended: backend.alloc(rows, heads * shape.value as usize)?,
            logits: backend.alloc_logits(shape.max_sequences as usize, shape.vocab as usize)?,
        })
    }
}

impl<B: Backend> Network<B> {
    pub fn forward(
        &self,
        backend: &mut B,
        step: &mut B::Step,
        act: &mut Activations<B>,
    ) -> Result<(), Error> {
        backend.embed(step, &self.embedding, &mut act.residual)?;
        let mut pending = false;
        for (index, layer) in self.layers.iter().enumerate() {
            let delta = pending.then_some(&act.delta);
            backend.rms_norm(step, &mut act.residual, delta, &layer.input_norm, self.eps, &mut act.hidden)?;
            layer.attend(backend, step, index, act)?;
            backend.rms_norm(
                step,
                &mut act.residual,
                Some(&act.delta),
                &layer.post_norm,
                self.eps,
                &mut act.hidden,
            )?;
            layer.feed_forward.run(backend, step, act)?;
            pending = true;
        }
        let delta = pending.then_some(&act.delta);
        backend.rms_norm(step, &mut act.residual, delta, &self.norm, self.eps, &mut act.hidden)?;
        backend.logits(step, &act.hidden, &self.head, &mut act.logits)?;
        backend.sample(step, &act.logits)
    }
}

impl<B: Backend> Layer<B> {
    fn attend(
        &self,
        backend: &mut B,
        step: &B::Step,
        index: usize,
        act: &mut Activations<B>,
    ) -> Result<(), Error> {
        backend.mla_project(step, index, &act.hidden, &self.mla, &mut act.query)?;
        backend.mla_attend(step, index, &act.query, &self.mla, &mut act.attended)?;
        backend.linear(step, &act.attended, &self.output, &mut act.delta)?;
        backend.all_reduce(step, &mut act.delta)
    }
}

impl<B: Backend> FeedForward<B> {
    fn run(&self, backend: &mut B, step: &B::Step, act: &mut Activations<B>) -> Result<(), Error> {
        match self {
            FeedForward::Dense { gate_up, down } => {
                backend.mlp(step, &act.hidden, gate_up, down, &mut act.delta)?;
            }
            FeedForward::Sparse { gate, bias, rule, experts, shared } => {
                let routing = backend.gate(step, &act.hidden, gate, bias.as_ref(), rule)?;
                let shared = shared.as_ref().map(|(gate_up, down)| (gate_up, down));
                backend.experts(step, &act.hidden, &routing, experts, shared, &mut act.delta)?;
            }
        }
        backend.all_reduce(step, &mut act.delta)
    }
}
