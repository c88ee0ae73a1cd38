//! Reads `quantization_config`: how a checkpoint's matrices are quantised. What is not known is refused by its name.

use serde_json::Value;

use super::ConfigError::{Invalid, Unsupported};
use super::{Config, ConfigError};

/// How the quantised matrices of a checkpoint are stored. A matrix that is there in plain form stays plain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Quantisation {
    /// OCP e4m3 with scales that say by their shape what they are for; `block` holds the rows and columns of a block
    /// where every block has a scale.
    Fp8 { block: Option<[u64; 2]> },
    /// 4 bits and a scale and a zero point for `group` inputs of an output, or for all of them. With `act_order` a
    /// tensor must say which inputs are in which group.
    Int4 { packing: Packing, group: Option<u64>, zero: ZeroPoint, act_order: bool },
}

/// How eight values of 4 bits lie in a 32-bit word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// GPTQ: eight inputs of an output, the first in the lowest bits; zero points of eight outputs alike.
    Gptq,
    /// AWQ's "gemm": eight outputs of an input, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits.
    Awq,
}

/// What the stored zero points mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ZeroPoint {
    /// All are 8. Stored is 7 or 8: some tools write what the next version of the format has under the first one's name.
    Symmetric,
    /// As stored.
    Stored,
    /// One more than stored, modulo 16 (the first version of GPTQ's format).
    OneMore,
}

const SUPPORTED: &str = "supported are fp8 (e4m3), compressed-tensors (float-quantized), gptq and awq with 4 bits; \
                         else use the unquantised model or a GGUF file";

impl Config<'_> {
    /// How the model is quantised, if it is.
    pub(super) fn quantisation(&self) -> Result<Option<Quantisation>, ConfigError> {
        let Some(config) = self.object("quantization_config")? else { return Ok(None) };
        match config.text("quant_method")?.unwrap_or("unknown") {
            "fp8" => config.fp8(),
            "compressed-tensors" => config.compressed_tensors(),
            "gptq" => config.gptq(),
            "awq" => config.awq(),
            method => {
                Err(Unsupported(format!("weights quantised by {method} are not supported; {SUPPORTED}")))
            }
        }
        .map(Some)
    }

    fn fp8(&self) -> Result<Quantisation, ConfigError> {
        self.only("fp8", "fmt", "e4m3")?;
        Ok(Quantisation::Fp8 { block: self.block("weight_block_size")? })
    }

    /// Rows and columns that share a scale.
    fn block(&self, key: &str) -> Result<Option<[u64; 2]>, ConfigError> {
        let Some(sizes) = self.list(key)? else { return Ok(None) };
        let size = |value: &Value| value.as_u64().filter(|size| (1..=1 << 20).contains(size));
        match sizes {
            [rows, columns] => size(rows).zip(size(columns)).map(|(rows, columns)| Some([rows, columns])),
            _ => None,
        }
        .ok_or_else(|| Invalid(format!("{key} is {sizes:?}, not the rows and columns of a block")))
    }

    fn compressed_tensors(&self) -> Result<Quantisation, ConfigError> {
        let float = ["float-quantized", "naive-quantized"];
        let known = |format: &str| {
            if float.contains(&format) {
                return Ok(());
            }
            Err(Unsupported(format!("compressed-tensors of format {format} are not supported; {SUPPORTED}")))
        };
        known(self.text("format")?.unwrap_or("unknown"))?;
        if self
            .object("sparsity_config")?
            .is_some_and(|sparsity| !matches!(sparsity.text("format"), Ok(None | Some("dense"))))
        {
            return Err(Unsupported("sparse compressed-tensors are not supported".into()));
        }
        if self.object("transform_config")?.is_some_and(|transforms| !transforms.0.is_empty()) {
            return Err(Unsupported("compressed-tensors with transforms are not supported".into()));
        }
        let Some(groups) = self.object("config_groups")? else {
            return Err(Invalid("quantization_config has no config_groups".into()));
        };
        let mut block = None;
        for name in groups.0.keys() {
            let Some(group) = groups.object(name)? else { continue };
            if let Some(format) = group.text("format")? {
                known(format)?;
            }
            let Some(weights) = group.object("weights")? else { continue };
            let (bits, kind) = (weights.optional_count("num_bits")?.unwrap_or(8), weights.text("type")?);
            let kind = kind.unwrap_or("int");
            if (bits, kind) != (8, "float") {
                return Err(Unsupported(format!(
                    "compressed-tensors with weights of {bits} bits and type {kind} are not supported; {SUPPORTED}"
                )));
            }
            match weights.text("strategy")?.unwrap_or("tensor") {
                "tensor" | "channel" => {}
                "block" => block = weights.block("block_structure")?,
                strategy => {
                    return Err(Unsupported(format!(
                        "compressed-tensors with scales by {strategy} are not supported (by tensor, channel and block \
                         are)"
                    )));
                }
            }
        }
        Ok(Quantisation::Fp8 { block })
    }

    fn gptq(&self) -> Result<Quantisation, ConfigError> {
        self.four_bits("gptq", "bits")?;
        self.only("gptq", "pack_dtype", "int32")?;
        self.refuse("is_marlin_format", true)?;
        if let Some(modules) = self.object("dynamic")?
            && let Some(module) = modules.0.keys().find(|module| !module.starts_with("-:"))
        {
            return Err(Unsupported(format!(
                "gptq with settings of its own for the modules {module} (dynamic) is not supported"
            )));
        }
        let zero = match (self.flag_or("sym", true)?, self.text("checkpoint_format")?.unwrap_or("gptq")) {
            (true, "gptq" | "gptq_v2") => ZeroPoint::Symmetric,
            (false, "gptq") => ZeroPoint::OneMore,
            (false, "gptq_v2") => ZeroPoint::Stored,
            (_, format) => {
                return Err(Unsupported(format!(
                    "gptq in the format {format} is not supported (gptq and gptq_v2 are)"
                )));
            }
        };
        let (group, act_order) = (self.group("group_size")?, self.flag("desc_act")?);
        Ok(Quantisation::Int4 { packing: Packing::Gptq, group, zero, act_order })
    }

    fn awq(&self) -> Result<Quantisation, ConfigError> {
        self.four_bits("awq", if self.get("bits").is_some() { "bits" } else { "w_bit" })?;
        self.only("awq", "version", "gemm")?;
        self.refuse("zero_point", false)?;
        let key = if self.get("group_size").is_some() { "group_size" } else { "q_group_size" };
        let (packing, group, zero) = (Packing::Awq, self.group(key)?, ZeroPoint::Stored);
        Ok(Quantisation::Int4 { packing, group, zero, act_order: false })
    }

    /// Refuses any other value of `key` than the one that is known, in whatever case it is written.
    fn only(&self, method: &str, key: &str, known: &str) -> Result<(), ConfigError> {
        match self.text(key)? {
            Some(other) if !other.eq_ignore_ascii_case(known) => {
                Err(Unsupported(format!("{method} with {key} {other} is not supported (only {known})")))
            }
            _ => Ok(()),
        }
    }

    fn four_bits(&self, method: &str, key: &str) -> Result<(), ConfigError> {
        match self.count(key)? {
            4 => Ok(()),
            bits => Err(Unsupported(format!(
                "weights quantised by {method} to {bits} bits are not supported; {SUPPORTED}"
            ))),
        }
    }

    /// Inputs that share a scale; `None` (written -1) if all of an output do.
    fn group(&self, key: &str) -> Result<Option<u64>, ConfigError> {
        match self.get(key).map(|size| (size.as_i64(), size)) {
            None => Ok(Some(128)),
            Some((Some(-1), _)) => Ok(None),
            Some((Some(size @ 1..), _)) => Ok(Some(size.unsigned_abs())),
            Some((_, size)) => Err(Invalid(format!("{key} is {size}, neither a count nor -1"))),
        }
    }
}
