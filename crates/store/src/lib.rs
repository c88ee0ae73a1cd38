//! Moves tensor bytes from disk to the device, verified, in execution order.
