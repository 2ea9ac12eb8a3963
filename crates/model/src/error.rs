//! What can be wrong with a model directory. Every message names the file, what was expected and what was found.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: {cause}", path.display())]
    Io { path: PathBuf, cause: std::io::Error },
    /// The file is not what its name says.
    #[error("{}: {what}", path.display())]
    Malformed { path: PathBuf, what: String },
    /// A sound model that Baton cannot run.
    #[error("{}: unsupported model: {what}", path.display())]
    Unsupported { path: PathBuf, what: String },
    #[error("{}: tensor {tensor}: expected {expected}, found {found}", path.display())]
    Tensor { path: PathBuf, tensor: String, expected: String, found: String },
    #[error("{}: {cause}", path.display())]
    Weights { path: PathBuf, cause: kernels::Error },
    #[error("option {option}: {what}")]
    Option { option: &'static str, what: String },
    #[error(transparent)]
    Backend(#[from] kernels::Error),
}

impl Error {
    pub(crate) fn malformed(path: &std::path::Path, what: impl Into<String>) -> Error {
        Error::Malformed { path: path.to_path_buf(), what: what.into() }
    }

    pub(crate) fn unsupported(path: &std::path::Path, what: impl Into<String>) -> Error {
        Error::Unsupported { path: path.to_path_buf(), what: what.into() }
    }
}
