//! Rotary settings: the new `rope_parameters` (one set, or one per layer type), the old `rope_theta` with
//! `rope_scaling`, and the names that single families use.

use serde_json::Value;

use super::ConfigError::{Invalid, Unsupported};
use super::{Config, ConfigError};
use crate::{Rope, RopeScaling};

const SUPPORTED: &str = "default, linear, llama3, yarn, longrope";

impl Config<'_> {
    /// The rotation of the model's layers (of those that see everything, where they differ). `partial` says whether
    /// this family can rotate only the first elements of a head.
    pub(super) fn rope(&self, head_dim: usize, partial: bool) -> Result<Rope, ConfigError> {
        let parameters = match self.object("rope_parameters")? {
            Some(parameters) if parameters.0.values().any(Value::is_object) => {
                if self.text("model_type")? != Some("gemma3_text") {
                    return Err(Unsupported(
                        "rotary parameters that differ by layer type are not supported".into(),
                    ));
                }
                match parameters.object("full_attention")? {
                    None => return Err(Invalid("rope_parameters has no full_attention".into())),
                    some => some,
                }
            }
            parameters => parameters,
        };
        let scaling = match &parameters {
            Some(parameters) => Some(Config(parameters.0)),
            None => self.object("rope_scaling")?,
        };
        let theta = match &parameters {
            Some(parameters) => parameters.number("rope_theta")?,
            None => None,
        };
        let theta = match (theta, self.number("rope_theta")?, self.number("rotary_emb_base")?) {
            (Some(theta), _, _) | (None, Some(theta), _) | (None, None, Some(theta)) => theta,
            (None, None, None) if self.text("model_type")? == Some("gemma3_text") => 1_000_000.0,
            (None, None, None) => 10_000.0,
        };
        let (theta, dims) = self.rotated(parameters.as_ref(), theta, head_dim, partial)?;
        let scaling = match scaling {
            Some(scaling) => self.rope_scaling(&scaling)?,
            None => RopeScaling::None,
        };
        Ok(Rope { theta, dims, scaling })
    }

    /// The rotation of Gemma 3's local layers: a base of their own, unscaled.
    pub(super) fn local_rope(&self, head_dim: usize) -> Result<Rope, ConfigError> {
        let parameters = match self.object("rope_parameters")? {
            Some(parameters) => parameters.object("sliding_attention")?,
            None => None,
        };
        let mut theta = None;
        let mut scaling = RopeScaling::None;
        if let Some(parameters) = parameters {
            theta = parameters.number("rope_theta")?;
            scaling = self.rope_scaling(&parameters)?;
        }
        let theta = match theta {
            Some(theta) => theta,
            None => self.number("rope_local_base_freq")?.unwrap_or(10_000.0),
        };
        Ok(Rope { theta, dims: head_dim, scaling })
    }

    /// How many elements of a head are rotated, and the base that gives their frequencies.
    fn rotated(
        &self,
        parameters: Option<&Config<'_>>,
        theta: f64,
        head_dim: usize,
        partial: bool,
    ) -> Result<(f64, usize), ConfigError> {
        let mut factor = None;
        for (holder, key) in [
            (parameters, "partial_rotary_factor"),
            (Some(self), "partial_rotary_factor"),
            (Some(self), "rotary_pct"),
        ] {
            if let (None, Some(holder)) = (factor, holder) {
                factor = holder.number(key)?;
            }
        }
        let neox = self.text("model_type")? == Some("gpt_neox");
        let factor = factor.unwrap_or(if neox { 0.25 } else { 1.0 });
        if factor == 1.0 {
            return Ok((theta, head_dim));
        }
        if !partial {
            return Err(Unsupported("a partial_rotary_factor other than 1 is not supported".into()));
        }
        if !(factor > 0.0 && factor < 1.0) {
            return Err(Invalid(format!("partial_rotary_factor is {factor}, which is not between 0 and 1")));
        }
        let dims = (head_dim as f64 * factor) as usize;
        // An odd number makes one pair more, and its exponents still count by the odd number: the same as another
        // base with the even one.
        let even = dims.next_multiple_of(2);
        let theta = if even == dims { theta } else { theta.powf(even as f64 / dims as f64) };
        Ok((theta, even))
    }

    fn rope_scaling(&self, scaling: &Config<'_>) -> Result<RopeScaling, ConfigError> {
        let kind = match scaling.text("rope_type")? {
            Some(kind) => kind,
            None => scaling.text("type")?.unwrap_or("default"),
        };
        let phi3 = self.text("model_type")? == Some("phi3");
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: scaling.required_number("factor")? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: scaling.required_number("factor")?,
                low_freq_factor: scaling.required_number("low_freq_factor")?,
                high_freq_factor: scaling.required_number("high_freq_factor")?,
                original_context: match self.original_context(scaling)? {
                    Some(length) => length,
                    None => return Err(Invalid("original_max_position_embeddings is missing".into())),
                },
            }),
            // Phi-3's first files call its scaling by these names.
            "su" | "yarn" if phi3 => self.longrope(scaling),
            "longrope" => self.longrope(scaling),
            "yarn" => self.yarn(scaling),
            other => Err(Unsupported(format!(
                "rotary scaling {other} is not supported; supported are {SUPPORTED}"
            ))),
        }
    }

    fn original_context(&self, scaling: &Config<'_>) -> Result<Option<f64>, ConfigError> {
        match scaling.number("original_max_position_embeddings")? {
            Some(length) => Ok(Some(length)),
            None => self.number("original_max_position_embeddings"),
        }
    }

    fn yarn(&self, scaling: &Config<'_>) -> Result<RopeScaling, ConfigError> {
        let context = self.required_number("max_position_embeddings")?;
        let original_context = self.original_context(scaling)?.unwrap_or(context);
        let factor = match scaling.number("factor")? {
            Some(factor) => factor,
            None => context / original_context,
        };
        let strength = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        // Zero counts as absent in the reference implementation.
        let given = |key: &str| scaling.number(key).map(|value| value.filter(|&value| value != 0.0));
        let magnitude =
            match (scaling.number("attention_factor")?, given("mscale")?, given("mscale_all_dim")?) {
                (Some(factor), _, _) => factor,
                (None, Some(scale), Some(all)) => strength(scale) / strength(all),
                (None, _, _) => strength(1.0),
            };
        Ok(RopeScaling::Yarn {
            factor,
            beta_fast: given("beta_fast")?.unwrap_or(32.0),
            beta_slow: given("beta_slow")?.unwrap_or(1.0),
            original_context,
            truncate: scaling.flag_or("truncate", true)?,
            magnitude,
        })
    }

    fn longrope(&self, scaling: &Config<'_>) -> Result<RopeScaling, ConfigError> {
        let factors = |key: &str| -> Result<Vec<f32>, ConfigError> {
            let list = scaling.list(key)?.ok_or_else(|| Invalid(format!("{key} is missing")))?;
            let factor = |value: &Value| value.as_f64().map(|factor| factor as f32);
            list.iter()
                .map(|value| {
                    factor(value).ok_or_else(|| Invalid(format!("{key} holds {value}, not a number")))
                })
                .collect()
        };
        let context = self.required_number("max_position_embeddings")?;
        let original_context = match self.original_context(scaling)? {
            Some(length) => length,
            None if self.text("model_type")? == Some("phi3") => 4096.0,
            None => context,
        };
        let factor = scaling.number("factor")?.unwrap_or(context / original_context);
        let magnitude = match scaling.number("attention_factor")? {
            Some(factor) => factor,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / original_context.ln()).sqrt(),
        };
        let (short, long) = (factors("short_factor")?, factors("long_factor")?);
        Ok(RopeScaling::LongRope { short, long, original_context, magnitude })
    }
}
