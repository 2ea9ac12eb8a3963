//! What can go wrong on a device.

/// Every variant but [`Error::Step`] means that the backend must not be used any further.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("this backend cannot do what the model needs: {0}")]
    Unsupported(String),
    /// There is no device, or none that this binary can use.
    #[error("{0}")]
    Unavailable(String),
    #[error("tensor {name}: {what}")]
    Tensor { name: String, what: String },
    /// The step asks for something impossible and was not run.
    #[error("invalid step: {0}")]
    Step(String),
    #[error("logits of slot {slot} at position {position} are not finite: weights or cache are corrupt")]
    NotFinite { slot: u32, position: u32 },
    #[error("device: {0}")]
    Device(String),
}
