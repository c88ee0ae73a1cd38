//! Turns a Hugging Face `config.json` into a [`ModelSpec`]. Refuses whatever the executor would compute differently.
//!
//! Here: access to the keys and the choice of the family. `families` says what each family's keys mean and which
//! defaults it has, `rope` reads rotary settings, `quantisation` how matrices are stored.

use serde_json::{Map, Value};

use crate::{Attention, LayerRole, ModelSpec, Norm, NormPlacement, Output, Pooling, ScoreActivation, layout};

mod families;
mod quantisation;
mod rope;

pub(crate) use quantisation::{Packing, Quantisation, ZeroPoint};
#[cfg(test)]
mod tests;

/// Model types that this build can run.
const SUPPORTED: &str = "llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma2, gemma3_text, phi3, gpt2, gpt_neox, opt, bert, roberta, xlm-roberta";

/// Why a config was not accepted; the caller adds the file.
#[derive(Debug, PartialEq)]
pub(crate) enum ConfigError {
    /// Wrong or missing values.
    Invalid(String),
    /// A sound config that needs something this build cannot do.
    Unsupported(String),
}

use ConfigError::{Invalid, Unsupported};

/// A config with typed access to its keys.
struct Config<'a>(&'a Map<String, Value>);

/// What a config says.
#[derive(Debug, PartialEq)]
pub(crate) struct Parsed {
    pub(crate) spec: ModelSpec,
    /// Biases that the config promises.
    pub(crate) biases: Vec<LayerRole>,
    /// How its matrices are stored, if not as plain numbers.
    pub(crate) quantisation: Option<Quantisation>,
}

/// Parses a config. Embedding models start with mean pooling and no normalisation; their directory says more.
pub(crate) fn parse(config: &Value) -> Result<Parsed, ConfigError> {
    let Value::Object(map) = config else {
        return Err(Invalid("is not a JSON object".into()));
    };
    let config = Config(map);
    let Some(family) = config.text("model_type")? else {
        return Err(Invalid(format!("has no model_type; supported are {SUPPORTED}")));
    };
    let quantisation = config.quantisation()?;
    let (mut spec, biases) = match family {
        "llama" => config.llama(),
        "mistral" => config.mistral(),
        "mixtral" => config.mixtral(),
        "qwen2" => config.qwen2(),
        "qwen3" => config.qwen3(),
        "qwen3_moe" => config.qwen3_moe(),
        "gemma2" => config.gemma2(),
        "gemma3_text" => config.gemma3(),
        "phi3" => config.phi3(),
        "gpt2" => config.gpt2(),
        "gpt_neox" => config.gpt_neox(),
        "opt" => config.opt(),
        "bert" | "roberta" | "xlm-roberta" => config.bert(),
        other => Err(Unsupported(format!("model type {other} is not supported; supported are {SUPPORTED}"))),
    }?;
    family.clone_into(&mut spec.family);
    layout::check_spec(&spec).map_err(Invalid)?;
    Ok(Parsed { spec, biases, quantisation })
}

/// A family's spec, and the biases that it must have.
type Family = Result<(ModelSpec, Vec<LayerRole>), ConfigError>;

impl<'a> Config<'a> {
    /// A key's value; JSON null counts as absent.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.get(key)
            .map(|value| value.as_str().ok_or_else(|| Invalid(format!("{key} is {value}, not a string"))))
            .transpose()
    }

    /// A switch that is off where the key is absent.
    fn flag(&self, key: &str) -> Result<bool, ConfigError> {
        self.flag_or(key, false)
    }

    fn flag_or(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        self.get(key).map_or(Ok(default), |value| {
            value.as_bool().ok_or_else(|| Invalid(format!("{key} is {value}, not a boolean")))
        })
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.get(key)
            .map(|value| value.as_f64().ok_or_else(|| Invalid(format!("{key} is {value}, not a number"))))
            .transpose()
    }

    fn required_number(&self, key: &str) -> Result<f64, ConfigError> {
        self.number(key)?.ok_or_else(|| Invalid(format!("{key} is missing")))
    }

    fn optional_count(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        self.get(key)
            .map(|value| {
                value
                    .as_u64()
                    .and_then(|count| usize::try_from(count).ok())
                    .ok_or_else(|| Invalid(format!("{key} is {value}, not a count")))
            })
            .transpose()
    }

    fn count(&self, key: &str) -> Result<usize, ConfigError> {
        self.optional_count(key)?.ok_or_else(|| Invalid(format!("{key} is missing")))
    }

    /// A count that goes by several names.
    fn count_of(&self, keys: [&str; 2]) -> Result<usize, ConfigError> {
        match self.optional_count(keys[0])? {
            Some(count) => Ok(count),
            None => self.count(keys[1]),
        }
    }

    fn list(&self, key: &str) -> Result<Option<&'a [Value]>, ConfigError> {
        self.get(key)
            .map(|value| match value {
                Value::Array(values) => Ok(values.as_slice()),
                other => Err(Invalid(format!("{key} is {other}, not a list"))),
            })
            .transpose()
    }

    fn object(&self, key: &str) -> Result<Option<Config<'a>>, ConfigError> {
        self.get(key)
            .map(|value| match value {
                Value::Object(map) => Ok(Config(map)),
                other => Err(Invalid(format!("{key} is {other}, not an object"))),
            })
            .transpose()
    }

    /// Refuses a switch whose effect the executor does not have.
    fn refuse(&self, key: &str, unwanted: bool) -> Result<(), ConfigError> {
        if self.flag_or(key, !unwanted)? == unwanted {
            return Err(Unsupported(format!("{key} = {unwanted} is not supported")));
        }
        Ok(())
    }

    fn head_dim(&self, hidden: usize, heads: usize) -> Result<usize, ConfigError> {
        match self.optional_count("head_dim")? {
            Some(head_dim) => Ok(head_dim),
            None if heads > 0 && hidden.is_multiple_of(heads) => Ok(hidden / heads),
            None => Err(Invalid(format!(
                "hidden_size {hidden} does not divide into {heads} heads; head_dim is missing"
            ))),
        }
    }

    fn bert(&self) -> Family {
        let family = self.text("model_type")?.unwrap_or_default();
        let mut output = Output::Embedding { pooling: Pooling::Mean, normalise: false };
        for architecture in self.get("architectures").and_then(Value::as_array).into_iter().flatten() {
            let name = architecture.as_str().unwrap_or_default();
            let task = ["Bert", "Roberta", "XLMRoberta"].iter().find_map(|prefix| name.strip_prefix(prefix));
            match task {
                Some("Model" | "ForMaskedLM" | "ForPreTraining") => {}
                Some("ForSequenceClassification") => output = self.score()?,
                _ => {
                    return Err(Unsupported(format!(
                        "architecture {architecture} is not supported in a {family} model (only Model, ForMaskedLM, \
                         and ForSequenceClassification with one label)"
                    )));
                }
            }
        }
        let activation = self.text("hidden_act")?.unwrap_or("gelu");
        if activation != "gelu" {
            return Err(Unsupported(format!(
                "hidden_act {activation} is not supported in a {family} model (only gelu)"
            )));
        }
        let positions = self.text("position_embedding_type")?.unwrap_or("absolute");
        if positions != "absolute" {
            return Err(Unsupported(format!(
                "position_embedding_type {positions} is not supported (only absolute)"
            )));
        }
        if self.flag("is_decoder")? {
            return Err(Unsupported(format!("a {family} model as decoder (is_decoder) is not supported")));
        }
        let hidden = self.count("hidden_size")?;
        let heads = self.count("num_attention_heads")?;
        let positions = self.count("max_position_embeddings")?;
        // RoBERTa counts positions from behind the one of padding.
        let position_offset = match family {
            "bert" => 0,
            _ => self.optional_count("pad_token_id")?.unwrap_or(1).saturating_add(1),
        };
        let spec = ModelSpec {
            vocab: self.count("vocab_size")?,
            hidden,
            intermediate: self.count("intermediate_size")?,
            layers: self.count("num_hidden_layers")?,
            heads,
            kv_heads: heads,
            head_dim: self.head_dim(hidden, heads)?,
            context: positions.saturating_sub(position_offset),
            norm: Norm::Layer { epsilon: self.number("layer_norm_eps")?.unwrap_or(1e-12) as f32 },
            norm_placement: NormPlacement::Post,
            learned_positions: Some(positions),
            position_offset,
            token_types: Some(self.count("type_vocab_size")?),
            mlp: crate::Mlp::Gelu,
            attention: Attention::Bidirectional,
            output,
            ..ModelSpec::default()
        };
        Ok((spec, layout::UNGATED_BIASES.to_vec()))
    }

    /// The output of a model for classification: one score, with the activation that sentence-transformers would use.
    fn score(&self) -> Result<Output, ConfigError> {
        let labels = match (self.object("id2label")?, self.optional_count("num_labels")?) {
            (Some(labels), _) => labels.0.len(),
            (None, count) => count.unwrap_or(2),
        };
        if labels != 1 {
            return Err(Unsupported(format!(
                "sequence classification with {labels} labels is not supported (with one, for reranking, it is)"
            )));
        }
        let named = match self.object("sentence_transformers")? {
            Some(settings) => settings.text("activation_fn")?,
            None => None,
        };
        let named = match named {
            Some(name) => Some(name),
            None => self.text("sbert_ce_default_activation_function")?,
        };
        let activation = match named.map(|name| name.rsplit('.').next().unwrap_or_default()) {
            None | Some("Sigmoid") => ScoreActivation::Sigmoid,
            Some("Identity") => ScoreActivation::Identity,
            Some(other) => {
                return Err(Unsupported(format!(
                    "the activation {other} of scores is not supported (Sigmoid and Identity are)"
                )));
            }
        };
        Ok(Output::Score { activation })
    }
}
