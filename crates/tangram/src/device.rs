//! Which device models run on, and what to tell somebody who has no GPU.

use std::str::FromStr;

use anyhow::bail;
use tangram_device::cuda::Driver;

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
    /// Makes sure that the device can be used; gives what its user should know.
    pub(crate) fn check(self) -> anyhow::Result<Option<String>> {
        // The pool has a device for GPUs; the executor runs models on the processor.
        const NO_EXECUTOR: &str = "this build runs models on the CPU only";
        match self {
            Choice::Cpu => Ok(None),
            Choice::Auto => Ok(Some(match Driver::load() {
                Err(reason) => format!("models run on the CPU: {reason}"),
                Ok(driver) => {
                    let name = driver.gpu_name(0).unwrap_or_else(|problem| problem.to_string());
                    format!("models run on the CPU: there is a GPU ({name}), but {NO_EXECUTOR}")
                }
            })),
            Choice::Cuda(ordinal) => {
                let found = Driver::load().and_then(|driver| driver.gpu_name(ordinal));
                let reason = found.map_or_else(
                    |reason| reason.to_string(),
                    |name| format!("{NO_EXECUTOR} ({name} was found)"),
                );
                bail!("device 'cuda:{ordinal}' cannot be used: {reason}; --device cpu serves without a GPU")
            }
        }
    }
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
