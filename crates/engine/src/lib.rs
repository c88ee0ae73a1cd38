//! Executes models from pooled memory: kernels, paged attention, batching, sampling.
