//! Which devices models run on, and what to tell somebody who has no GPU.

use std::str::FromStr;
use std::sync::Arc;

use anyhow::{anyhow, bail};
use tangram_device::cuda::Driver;
use tangram_node::Device;

/// The devices that a user asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Choice {
    /// All GPUs that can be used, in the driver's order; the processor if there is none.
    #[default]
    Auto,
    /// The first GPU if it can be used, else the processor: for what is shown of one pool. Nobody names it.
    AutoOne,
    /// The processor and its memory.
    Cpu,
    /// The NVIDIA GPUs of these numbers, at least one, none twice.
    Cuda(Vec<i32>),
}

impl FromStr for Choice {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Choice> {
        match text {
            "auto" => return Ok(Choice::Auto),
            "cpu" => return Ok(Choice::Cpu),
            _ => {}
        }
        let mut ordinals = Vec::new();
        for name in text.split(',').map(str::trim) {
            match name.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(ordinal)) if ordinal >= 0 && !ordinals.contains(&ordinal) => ordinals.push(ordinal),
                Some(Ok(ordinal)) if ordinal >= 0 => bail!("device '{text}' names GPU {ordinal} twice"),
                _ => bail!(
                    "device '{text}' is none of auto, cpu and cuda:N (or several, cuda:N,cuda:M), where N counts GPUs from 0"
                ),
            }
        }
        Ok(Choice::Cuda(ordinals))
    }
}

impl Choice {
    /// The devices to set up, at least one; for `auto`, why it is the processor if it is.
    ///
    /// # Errors
    /// When there is no such GPU.
    pub(crate) fn devices(&self) -> anyhow::Result<(Vec<Device>, Option<String>)> {
        let gpus = |driver: Arc<Driver>, ordinals: &[i32]| {
            let gpu = |&ordinal: &i32| Device::Cuda { driver: driver.clone(), ordinal };
            ordinals.iter().map(gpu).collect::<Vec<Device>>()
        };
        match self {
            Choice::Cpu => Ok((vec![Device::Cpu], None)),
            Choice::Auto | Choice::AutoOne => Ok(match Driver::load() {
                Err(reason) => (vec![Device::Cpu], Some(on_cpu(&reason))),
                Ok(driver) => {
                    let count = if *self == Choice::AutoOne { 1 } else { driver.gpus().max(1) };
                    (gpus(driver, &(0..count).collect::<Vec<i32>>()), None)
                }
            }),
            Choice::Cuda(ordinals) => {
                let unusable = |ordinal: i32, reason: &dyn std::fmt::Display| {
                    anyhow!(
                        "device 'cuda:{ordinal}' cannot be used: {reason}; --device cpu serves without a GPU"
                    )
                };
                let first = ordinals.first().copied().unwrap_or(0);
                let driver = Driver::load().map_err(|reason| unusable(first, &reason))?;
                for &ordinal in ordinals {
                    driver.gpu_name(ordinal).map_err(|reason| unusable(ordinal, &reason))?;
                }
                Ok((gpus(driver, ordinals), None))
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
        let gpus = |ordinals: &[i32]| Some(Choice::Cuda(ordinals.to_vec()));
        assert_eq!([choice("cuda:0"), choice("cuda:12")], [gpus(&[0]), gpus(&[12])]);
        assert_eq!(choice("cuda:2,cuda:0"), gpus(&[2, 0]), "in the order in which they are named");
        assert_eq!(choice("cuda:0, cuda:1"), gpus(&[0, 1]));
        for bad in [
            "",
            "gpu",
            "cuda",
            "cuda:",
            "cuda:-1",
            "cuda:x",
            "CPU",
            "cuda:0,",
            "cuda:0,1",
            "cpu,cuda:0",
            "auto,cpu",
            "cuda:1,cuda:1",
        ] {
            assert_eq!(choice(bad), None, "{bad:?}");
        }
    }
}
