//! What distinguishes the two endpoints: how a request is read and how its choices look.

use crate::answer::{Bounds, Finish, Plan, Step};
use crate::model::Model;
use openai::{Error, Parameters};
use serde::Serialize;

pub trait Shape: Send + Sync + Sized + 'static {
    /// Path, for metrics.
    const ENDPOINT: &'static str;
    /// `object` of a whole answer and of a chunk.
    const OBJECT: &'static str;
    const CHUNK: &'static str;
    /// What ids begin with.
    const ID: &'static str;
    type Request: Send;
    type Choice: Serialize + Send;
    type Chunk: Serialize + Send;

    fn read(body: &[u8], limits: &openai::Limits) -> Result<Self::Request, Error>;
    fn parameters(request: &Self::Request) -> &Parameters;
    fn plan(request: &Self::Request, model: &Model, bounds: &Bounds) -> Result<Plan, Error>;
    fn new(request: &Self::Request) -> Self;

    /// Sent for each choice as soon as it is placed.
    fn opening(&self, index: u32) -> Option<Self::Chunk>;
    /// Text and tokens of a step.
    fn chunk(&self, model: &Model, index: u32, step: Step) -> Self::Chunk;
    fn ending(&self, index: u32, finish: Finish) -> Self::Chunk;
    /// All steps of a choice together.
    fn choice(&self, model: &Model, index: u32, step: Step, finish: Finish) -> Self::Choice;
}
