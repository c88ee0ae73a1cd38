//! stub
use crate::{CheckpointError, Source};
pub(crate) fn open(path: &std::path::Path) -> Result<Source, CheckpointError> {
    Err(CheckpointError::unsupported(path, "not yet"))
}
