//! Which device models run on, and what to tell somebody who has no GPU.

use std::str::FromStr;

use anyhow::{anyhow, bail};
use tangram_device::cuda::Driver;
use tangram_node::Device;

/// The device that a user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Choice {
    /// A GPU if there is one that can be used, else the processor.
    #[default]
    Auto,
    /// The processor and its memory.
    Cpu,
    /// The NVIDIA GPU of this number.
    Cuda(i32),
}

impl FromStr for Choice {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Choice> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(Choice::Auto),
            ("cpu", _) => Ok(Choice::Cpu),
            (_, Some(Ok(ordinal))) if ordinal >= 0 => Ok(Choice::Cuda(ordinal)),
            _ => bail!("device '{text}' is none of auto, cpu and cuda:N, where N counts GPUs from 0"),
        }
    }
}

impl Choice {
    /// The device to set up; for `auto`, why it is the processor if it is.
    ///
    /// # Errors
    /// When there is no such GPU.
    pub(crate) fn device(self) -> anyhow::Result<(Device, Option<String>)> {
        match self {
            Choice::Cpu => Ok((Device::Cpu, None)),
            Choice::Auto => Ok(match Driver::load() {
                Err(reason) => (Device::Cpu, Some(on_cpu(&reason))),
                Ok(driver) => (Device::Cuda { driver, ordinal: 0 }, None),
            }),
            Choice::Cuda(ordinal) => {
                let found = Driver::load().and_then(|driver| driver.gpu_name(ordinal).map(|_| driver));
                let driver = found.map_err(|reason| {
                    anyhow!(
                        "device 'cuda:{ordinal}' cannot be used: {reason}; --device cpu serves without a GPU"
                    )
                })?;
                Ok((Device::Cuda { driver, ordinal }, None))
            }
        }
    }
}

/// What is said where the processor is used for want of a GPU.
pub(crate) fn on_cpu(reason: &dyn std::fmt::Display) -> String {
    format!("models run on the CPU: {reason}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_and_others_refused() {
        let choice = |text: &str| text.parse::<Choice>().ok();
        assert_eq!(choice("auto"), Some(Choice::Auto));
        assert_eq!(choice("cpu"), Some(Choice::Cpu));
        assert_eq!([choice("cuda:0"), choice("cuda:12")], [Some(Choice::Cuda(0)), Some(Choice::Cuda(12))]);
        for bad in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            assert_eq!(choice(bad), None, "{bad:?}");
        }
    }
}
