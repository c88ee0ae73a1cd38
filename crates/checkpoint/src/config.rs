//! Turns a Hugging Face `config.json` into a [`ModelSpec`]. Refuses whatever the executor would compute differently.

use serde_json::{Map, Value};

use crate::{
    Attention, LayerRole, Mlp, ModelSpec, Norm, NormPlacement, Output, Pooling, Rope, RopeScaling, layout,
};

/// Model types that this build can run.
const SUPPORTED: &str = "llama, qwen2, qwen3, bert";

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
    if let Some(quantisation) = config.get("quantization_config") {
        let method = quantisation.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        return Err(Unsupported(format!(
            "weights quantised by {method} are not supported; use the unquantised model or a GGUF file"
        )));
    }
    match family {
        "llama" | "qwen2" | "qwen3" => config.decoder(family),
        "bert" => config.bert(),
        other => Err(Unsupported(format!("model type {other} is not supported; supported are {SUPPORTED}"))),
    }
}

impl Config<'_> {
    /// A key's value; JSON null counts as absent.
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn text(&self, key: &str) -> Result<Option<&str>, ConfigError> {
        self.get(key)
            .map(|value| value.as_str().ok_or_else(|| Invalid(format!("{key} is {value}, not a string"))))
            .transpose()
    }

    fn flag(&self, key: &str) -> Result<bool, ConfigError> {
        self.get(key).map_or(Ok(false), |value| {
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

    fn head_dim(&self, hidden: usize, heads: usize) -> Result<usize, ConfigError> {
        match self.optional_count("head_dim")? {
            Some(head_dim) => Ok(head_dim),
            None if heads > 0 && hidden.is_multiple_of(heads) => Ok(hidden / heads),
            None => Err(Invalid(format!(
                "hidden_size {hidden} does not divide into {heads} heads; head_dim is missing"
            ))),
        }
    }

    fn decoder(&self, family: &str) -> Result<Parsed, ConfigError> {
        let activation = self.text("hidden_act")?.unwrap_or("silu");
        if activation != "silu" {
            return Err(Unsupported(format!(
                "hidden_act {activation} is not supported in a {family} model (only silu)"
            )));
        }
        let hidden = self.count("hidden_size")?;
        let heads = self.count("num_attention_heads")?;
        let layers = self.count("num_hidden_layers")?;
        let context = self.count("max_position_embeddings")?;
        self.refuse_sliding_window(layers, context)?;
        // Qwen3 alone has a head size of its own as the default, 128.
        let head_dim = match (family, self.optional_count("head_dim")?) {
            ("qwen3", None) => 128,
            _ => self.head_dim(hidden, heads)?,
        };
        let spec = ModelSpec {
            family: family.into(),
            vocab: self.count("vocab_size")?,
            hidden,
            intermediate: self.count("intermediate_size")?,
            layers,
            heads,
            kv_heads: self.optional_count("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            context,
            norm: Norm::Rms { epsilon: self.number("rms_norm_eps")?.unwrap_or(1e-6) as f32 },
            norm_placement: NormPlacement::Pre,
            qk_norm: family == "qwen3",
            rope: Some(self.rope(head_dim)?),
            learned_positions: None,
            token_types: None,
            mlp: Mlp::GatedSilu,
            attention: Attention::Causal,
            output: Output::Logits { tied: self.flag("tie_word_embeddings")? },
        };
        layout::check_spec(&spec).map_err(Invalid)?;
        let biases = layout::family_biases(&spec, self.flag("attention_bias")?, self.flag("mlp_bias")?);
        Ok(Parsed { spec, biases })
    }

    fn bert(&self) -> Result<Parsed, ConfigError> {
        if let Some(architectures) = self.get("architectures").and_then(Value::as_array) {
            let known = ["BertModel", "BertForMaskedLM", "BertForPreTraining"];
            if let Some(other) =
                architectures.iter().find(|name| !name.as_str().is_some_and(|name| known.contains(&name)))
            {
                return Err(Unsupported(format!("architecture {other} is not supported; BertModel is")));
            }
        }
        let activation = self.text("hidden_act")?.unwrap_or("gelu");
        if activation != "gelu" {
            return Err(Unsupported(format!(
                "hidden_act {activation} is not supported in a bert model (only gelu)"
            )));
        }
        let positions = self.text("position_embedding_type")?.unwrap_or("absolute");
        if positions != "absolute" {
            return Err(Unsupported(format!(
                "position_embedding_type {positions} is not supported (only absolute)"
            )));
        }
        if self.flag("is_decoder")? {
            return Err(Unsupported("a bert model as decoder (is_decoder) is not supported".into()));
        }
        let hidden = self.count("hidden_size")?;
        let heads = self.count("num_attention_heads")?;
        let positions = self.count("max_position_embeddings")?;
        let spec = ModelSpec {
            family: "bert".into(),
            vocab: self.count("vocab_size")?,
            hidden,
            intermediate: self.count("intermediate_size")?,
            layers: self.count("num_hidden_layers")?,
            heads,
            kv_heads: heads,
            head_dim: self.head_dim(hidden, heads)?,
            context: positions,
            norm: Norm::Layer { epsilon: self.number("layer_norm_eps")?.unwrap_or(1e-12) as f32 },
            norm_placement: NormPlacement::Post,
            qk_norm: false,
            rope: None,
            learned_positions: Some(positions),
            token_types: Some(self.count("type_vocab_size")?),
            mlp: Mlp::Gelu,
            attention: Attention::Bidirectional,
            output: Output::Embedding { pooling: Pooling::Mean, normalise: false },
        };
        layout::check_spec(&spec).map_err(Invalid)?;
        let biases = layout::family_biases(&spec, true, true);
        Ok(Parsed { spec, biases })
    }

    /// Windows that would hide tokens are refused; ones that are switched off or cover the whole context are not.
    fn refuse_sliding_window(&self, layers: usize, context: usize) -> Result<(), ConfigError> {
        let window = self.optional_count("sliding_window")?;
        if window.is_some_and(|window| window >= context) {
            return Ok(());
        }
        let in_use = match self.get("layer_types") {
            Some(Value::Array(types)) => {
                match types.iter().find(|kind| kind.as_str() != Some("full_attention")) {
                    Some(kind) if kind.as_str() == Some("sliding_attention") => true,
                    Some(kind) => {
                        return Err(Unsupported(format!(
                            "layer type {kind} is not supported (only full_attention)"
                        )));
                    }
                    None => false,
                }
            }
            Some(other) => return Err(Invalid(format!("layer_types is {other}, not a list"))),
            None => {
                let full_layers = self.optional_count("max_window_layers")?.unwrap_or(28);
                window.is_some() && self.flag("use_sliding_window")? && full_layers < layers
            }
        };
        if in_use {
            return Err(Unsupported("sliding window attention is not supported".into()));
        }
        Ok(())
    }

    /// Rotary settings from the new `rope_parameters` or the old `rope_theta` with `rope_scaling`.
    fn rope(&self, head_dim: usize) -> Result<Rope, ConfigError> {
        let object = |key: &str| match self.get(key) {
            Some(Value::Object(map)) => Ok(Some(Config(map))),
            Some(other) => Err(Invalid(format!("{key} is {other}, not an object"))),
            None => Ok(None),
        };
        let parameters = object("rope_parameters")?;
        let scaling = match &parameters {
            Some(parameters) => Some(Config(parameters.0)),
            None => object("rope_scaling")?,
        };
        let theta = match &parameters {
            Some(parameters) => parameters.number("rope_theta")?,
            None => None,
        };
        let theta = match theta {
            Some(theta) => theta,
            None => self.number("rope_theta")?.unwrap_or(10_000.0),
        };
        for holder in [Some(self), parameters.as_ref()].into_iter().flatten() {
            if holder.number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
                return Err(Unsupported("a partial_rotary_factor other than 1 is not supported".into()));
            }
        }
        let scaling = match scaling {
            None => RopeScaling::None,
            Some(scaling) => {
                if scaling.0.values().any(Value::is_object) {
                    return Err(Unsupported(
                        "rotary parameters that differ by layer type are not supported".into(),
                    ));
                }
                let kind = match scaling.text("rope_type")? {
                    Some(kind) => Some(kind),
                    None => scaling.text("type")?,
                };
                match kind.unwrap_or("default") {
                    "default" => RopeScaling::None,
                    "linear" => RopeScaling::Linear { factor: scaling.required_number("factor")? },
                    "llama3" => RopeScaling::Llama3 {
                        factor: scaling.required_number("factor")?,
                        low_freq_factor: scaling.required_number("low_freq_factor")?,
                        high_freq_factor: scaling.required_number("high_freq_factor")?,
                        original_context: match scaling.number("original_max_position_embeddings")? {
                            Some(length) => length,
                            None => self.required_number("original_max_position_embeddings")?,
                        },
                    },
                    other => {
                        return Err(Unsupported(format!(
                            "rotary scaling {other} is not supported; supported are default, linear, llama3"
                        )));
                    }
                }
            }
        };
        Ok(Rope { theta, dims: head_dim, scaling })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn llama() -> Value {
        json!({
            "model_type": "llama", "vocab_size": 320, "hidden_size": 48, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        })
    }

    fn bert() -> Value {
        json!({
            "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 320, "hidden_size": 48,
            "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "max_position_embeddings": 256, "type_vocab_size": 2, "hidden_act": "gelu",
        })
    }

    fn with(mut config: Value, changes: Value) -> Value {
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    fn rope(changes: Value) -> Rope {
        parse(&with(llama(), changes)).unwrap().spec.rope.unwrap()
    }

    #[test]
    fn old_and_new_rotary_keys_say_the_same() {
        let llama3 = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        });
        let old = rope(json!({"rope_theta": 500000.0, "rope_scaling": llama3}));
        let new = rope(json!({"rope_parameters": with(llama3, json!({"rope_theta": 500000.0}))}));
        assert_eq!(old, new);
        assert_eq!(old.theta, 500000.0);
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 64.0,
        };
        assert_eq!(old.scaling, scaling);
        let linear = RopeScaling::Linear { factor: 2.0 };
        assert_eq!(rope(json!({"rope_scaling": {"type": "linear", "factor": 2.0}})).scaling, linear);
        let plain = rope(json!({"rope_scaling": null}));
        assert_eq!(plain, Rope { theta: 10_000.0, dims: 12, scaling: RopeScaling::None });
        assert_eq!(rope(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})), plain);
    }

    #[test]
    fn optional_keys_have_the_defaults_of_the_family() {
        let mut config = llama();
        config.as_object_mut().unwrap().shift_remove("num_key_value_heads");
        let spec = parse(&config).unwrap().spec;
        assert_eq!((spec.kv_heads, spec.head_dim, spec.output), (4, 12, Output::Logits { tied: false }));
        assert_eq!(parse(&with(llama(), json!({"model_type": "qwen3"}))).unwrap().spec.head_dim, 128);
        let biases = parse(&with(llama(), json!({"model_type": "qwen2"}))).unwrap().biases;
        assert_eq!(biases, [LayerRole::QueryBias, LayerRole::KeyBias, LayerRole::ValueBias]);
    }

    #[test]
    fn windows_that_hide_nothing_are_accepted() {
        for changes in [
            json!({"use_sliding_window": false, "sliding_window": 16}),
            json!({"use_sliding_window": true, "sliding_window": 256, "max_window_layers": 0}),
            json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 3}),
            json!({"sliding_window": null, "layer_types": ["full_attention", "full_attention", "full_attention"]}),
        ] {
            parse(&with(with(llama(), json!({"model_type": "qwen2"})), changes)).unwrap();
        }
    }

    #[test]
    fn what_would_be_computed_differently_is_refused_by_name() {
        for (changes, word) in [
            (json!({"model_type": "mamba"}), "supported are llama"),
            (json!({"hidden_act": "gelu"}), "gelu"),
            (json!({"quantization_config": {"quant_method": "gptq"}}), "gptq"),
            (json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), "yarn"),
            (json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}}), "dynamic"),
            (json!({"rope_parameters": {"rope_type": "longrope"}}), "longrope"),
            (json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}), "layer type"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            (json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "partial_rotary_factor"),
            (
                json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1}),
                "sliding window",
            ),
            (json!({"layer_types": ["full_attention", "sliding_attention"]}), "sliding window"),
            (json!({"layer_types": ["linear_attention"]}), "linear_attention"),
        ] {
            match parse(&with(llama(), changes)) {
                Err(Unsupported(message)) => assert!(message.contains(word), "{message}"),
                other => panic!("{word}: {other:?}"),
            }
        }
        for (changes, word) in [
            (json!({"architectures": ["BertForSequenceClassification"]}), "BertForSequenceClassification"),
            (json!({"hidden_act": "gelu_new"}), "gelu_new"),
            (json!({"position_embedding_type": "relative_key"}), "relative_key"),
            (json!({"is_decoder": true}), "is_decoder"),
        ] {
            match parse(&with(bert(), changes)) {
                Err(Unsupported(message)) => assert!(message.contains(word), "{message}"),
                other => panic!("{word}: {other:?}"),
            }
        }
        parse(&bert()).unwrap();
    }

    #[test]
    fn absurd_numbers_are_refused() {
        for changes in [
            json!({"hidden_size": 0}),
            json!({"hidden_size": -48}),
            json!({"hidden_size": 48.5}),
            json!({"hidden_size": "48"}),
            json!({"hidden_size": 50}),
            json!({"vocab_size": u64::MAX}),
            json!({"num_hidden_layers": 1u64 << 40}),
            json!({"num_attention_heads": 0}),
            json!({"num_key_value_heads": 3}),
            json!({"num_key_value_heads": 0}),
            json!({"head_dim": 11}),
            json!({"head_dim": 1u64 << 62}),
            json!({"max_position_embeddings": 0}),
            json!({"rms_norm_eps": -1.0}),
            json!({"rms_norm_eps": "small"}),
            json!({"rope_theta": 0.0}),
            json!({"rope_scaling": "linear"}),
            json!({"rope_scaling": {"type": "linear"}}),
            json!({"rope_scaling": {"type": "linear", "factor": -2.0}}),
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
            json!({"layer_types": "full_attention"}),
            json!({"tie_word_embeddings": "yes"}),
        ] {
            assert!(matches!(parse(&with(llama(), changes.clone())), Err(Invalid(_))), "{changes}");
        }
        for config in
            [json!(null), json!([]), json!({}), json!({"model_type": 3}), json!({"model_type": "llama"})]
        {
            assert!(matches!(parse(&config), Err(Invalid(_))), "{config}");
        }
    }
}
