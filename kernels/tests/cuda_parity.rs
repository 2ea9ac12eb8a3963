//! Every CUDA kernel against the CPU backend or its definition, on identical rounded inputs, outputs poisoned beforehand.
//! Without a GPU, or built without the feature `cuda`, the tests say so.

#[path = "cuda/support.rs"]
mod support;

#[path = "cuda/attention.rs"]
mod attention;
#[path = "cuda/digest.rs"]
mod digest;
#[path = "cuda/elementwise.rs"]
mod elementwise;
#[path = "cuda/gate.rs"]
mod gate;
#[path = "cuda/linear.rs"]
mod linear;
#[path = "cuda/moe.rs"]
mod moe;
#[path = "cuda/operations.rs"]
mod operations;
#[path = "cuda/paged.rs"]
mod paged;
#[path = "cuda/random.rs"]
mod random;
#[path = "cuda/sample.rs"]
mod sample;
#[path = "cuda/transfer.rs"]
mod transfer;
