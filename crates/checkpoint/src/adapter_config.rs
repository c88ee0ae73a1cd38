//! Reads `adapter_config.json` as PEFT writes it. A setting that changes what is computed and is not known here is
//! refused with its name.

use regex::Regex;
use serde_json::{Map, Value};

/// Settings that say nothing about what an adapter computes once it is trained, or that the tensors say as well.
const HARMLESS: [&str; 19] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Settings that are read below.
const READ: [&str; 9] = [
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "init_lora_weights",
];

/// Largest compiled form of a pattern from outside, in bytes.
const MAX_PATTERN_BYTES: usize = 1 << 20;

/// Which modules are adapted, with which rank and which scale.
#[derive(Debug)]
pub(crate) struct AdapterConfig {
    rank: u64,
    alpha: f64,
    /// The scale is alpha / √rank instead of alpha / rank.
    root: bool,
    targets: Targets,
    ranks: Vec<(Regex, u64)>,
    alphas: Vec<(Regex, f64)>,
}

#[derive(Debug)]
enum Targets {
    /// All matrices of layers.
    All,
    /// Modules of these names, with anything before a dot in front.
    Names(Vec<String>),
    /// Modules whose whole name matches.
    Pattern(Regex),
}

impl AdapterConfig {
    /// Reads the settings. The error says which one cannot be used.
    pub(crate) fn parse(config: &Value) -> Result<AdapterConfig, String> {
        let config = config.as_object().ok_or("is not an object of settings")?;
        match config.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            other => {
                return Err(format!("peft_type {} is not supported; LORA is", other.unwrap_or("(none)")));
            }
        }
        match config.get("bias") {
            None | Some(Value::Null) => {}
            Some(Value::String(bias)) if bias == "none" => {}
            Some(other) => return Err(format!("bias {other} is not supported; \"none\" is")),
        }
        match config.get("init_lora_weights") {
            None | Some(Value::Null | Value::Bool(_)) => {}
            Some(Value::String(way)) if ["gaussian", "eva", "orthogonal"].contains(&way.as_str()) => {}
            Some(way) => {
                return Err(format!(
                    "init_lora_weights {way} changes the base's weights, which is not supported; \
                     convert the adapter to a plain one"
                ));
            }
        }
        for (name, value) in config {
            let known = READ.contains(&name.as_str()) || HARMLESS.contains(&name.as_str());
            if !known && !is_off(value) {
                return Err(match name.as_str() {
                    "use_dora" => "DoRA (use_dora) is not supported; plain LoRA is".to_owned(),
                    "modules_to_save" => format!(
                        "modules_to_save {value} is not supported: an adapter can only add low-rank updates"
                    ),
                    _ => format!("the setting {name} = {value} is not supported"),
                });
            }
        }
        let rank = config.get("r").ok_or("r is missing").and_then(|r| rank(r).ok_or("r is not a rank"))?;
        let alpha = config
            .get("lora_alpha")
            .ok_or("lora_alpha is missing")
            .and_then(|alpha| alpha.as_f64().ok_or("lora_alpha is not a number"))?;
        Ok(AdapterConfig {
            rank,
            alpha,
            root: config.get("use_rslora").and_then(Value::as_bool) == Some(true),
            targets: targets(config.get("target_modules"))?,
            ranks: patterns(config, "rank_pattern", self::rank)?,
            alphas: patterns(config, "alpha_pattern", Value::as_f64)?,
        })
    }

    /// The rank of a module's update and what its product is multiplied with.
    pub(crate) fn rank_and_scale(&self, module: &str) -> Result<(u64, f32), String> {
        let rank = first_match(&self.ranks, module).unwrap_or(self.rank);
        let alpha = first_match(&self.alphas, module).unwrap_or(self.alpha);
        let scale = alpha / if self.root { (rank as f64).sqrt() } else { rank as f64 };
        let narrow = scale as f32;
        if narrow.is_finite() {
            Ok((rank, narrow))
        } else {
            Err(format!("the scale of module {module} is {scale}, which is no usable number"))
        }
    }

    /// Checks that the modules with tensors are those that the config names.
    pub(crate) fn check_modules<'a>(
        &self,
        modules: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<(), String> {
        let named = |name: &str, module: &str| {
            module.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
        };
        let strange = modules.clone().find(|module| match &self.targets {
            Targets::All => false,
            Targets::Names(names) => !names.iter().any(|name| named(name, module)),
            Targets::Pattern(pattern) => !pattern.is_match(module),
        });
        if let Some(module) = strange {
            return Err(format!("has tensors for module {module}, which target_modules does not name"));
        }
        if let Targets::Names(names) = &self.targets
            && let Some(name) = names.iter().find(|name| !modules.clone().any(|module| named(name, module)))
        {
            return Err(format!(
                "target_modules names {name}, but there is no tensor for it; is the download complete?"
            ));
        }
        Ok(())
    }
}

/// Whether a setting is switched off.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
        _ => false,
    }
}

fn rank(value: &Value) -> Option<u64> {
    value.as_u64().filter(|&rank| rank > 0)
}

fn targets(value: Option<&Value>) -> Result<Targets, String> {
    match value {
        None | Some(Value::Null) => Ok(Targets::All),
        Some(Value::String(text)) if text == "all-linear" => Ok(Targets::All),
        Some(Value::String(text)) => {
            Ok(Targets::Pattern(pattern(&format!("^(?:{text})$"), "target_modules")?))
        }
        Some(Value::Array(names)) => {
            let name = |name: &Value| name.as_str().filter(|name| !name.is_empty()).map(str::to_owned);
            let names: Option<Vec<String>> = names.iter().map(name).collect();
            names.map(Targets::Names).ok_or_else(|| "target_modules is not a list of names".to_owned())
        }
        Some(other) => Err(format!("target_modules {other} is neither a list of names nor a pattern")),
    }
}

/// The entries of `rank_pattern` or `alpha_pattern` in their order; each is a pattern for the end of a module's name.
fn patterns<T>(
    config: &Map<String, Value>,
    setting: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<(Regex, T)>, String> {
    let entries = match config.get(setting) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(format!("{setting} {other} is not an object")),
    };
    let entry = |(text, value): (&String, &Value)| {
        let value = read(value).ok_or_else(|| format!("{setting} gives {text} the value {value}"))?;
        Ok((pattern(&format!(r"^(?:.*\.)?(?:{text})$"), setting)?, value))
    };
    entries.iter().map(entry).collect()
}

fn pattern(text: &str, setting: &str) -> Result<Regex, String> {
    regex::RegexBuilder::new(text).size_limit(MAX_PATTERN_BYTES).build().map_err(|error| {
        format!("{setting} has a pattern that is not supported ({error}); list the modules by name instead")
    })
}

fn first_match<T: Copy>(patterns: &[(Regex, T)], module: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(module)).map(|&(_, value)| value)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(change: &str, value: Value) -> Result<AdapterConfig, String> {
        let mut config = json!({
            "peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "use_dora": false,
            "target_modules": ["q_proj", "v_proj"], "modules_to_save": null, "megatron_core": "megatron.core",
        });
        config[change] = value;
        AdapterConfig::parse(&config)
    }

    #[test]
    fn scales_follow_rank_and_alpha() {
        let module = "model.layers.1.self_attn.q_proj";
        assert_eq!(config("r", json!(8)).unwrap().rank_and_scale(module), Ok((8, 2.0)));
        let root = config("use_rslora", json!(true)).unwrap().rank_and_scale(module);
        assert_eq!(root, Ok((8, (16.0 / 8f64.sqrt()) as f32)));
        let pattern = json!({"layers.1.self_attn.q_proj": 4, "q_proj": 2});
        let ranks = config("rank_pattern", pattern).unwrap();
        assert_eq!(ranks.rank_and_scale(module), Ok((4, 4.0)));
        assert_eq!(ranks.rank_and_scale("model.layers.2.self_attn.q_proj"), Ok((2, 8.0)));
        assert_eq!(ranks.rank_and_scale("model.layers.2.self_attn.xq_proj"), Ok((8, 2.0)));
        let alphas = config("alpha_pattern", json!({r"layers\.[01]\..*": 1.0})).unwrap();
        assert_eq!(alphas.rank_and_scale(module), Ok((8, 0.125)));
    }

    #[test]
    fn what_cannot_be_computed_is_refused_by_name() {
        for (name, value) in [
            ("peft_type", json!("IA3")),
            ("use_dora", json!(true)),
            ("modules_to_save", json!(["lm_head"])),
            ("bias", json!("all")),
            ("lora_bias", json!(true)),
            ("layer_replication", json!([[0, 4]])),
            ("init_lora_weights", json!("pissa_niter_4")),
            ("trainable_token_indices", json!([1])),
            ("r", json!(0)),
            ("r", json!(-1)),
            ("lora_alpha", json!("a")),
            ("target_modules", json!([1])),
            ("target_modules", json!("(?=x)y")),
            ("rank_pattern", json!({"q": 0})),
            ("rank_pattern", json!({"(((a{900}){900}){900})": 1})),
        ] {
            let error = config(name, value.clone()).unwrap_err();
            assert!(error.contains(name) || error.contains("DoRA"), "{name} {value}: {error}");
        }
        assert!(AdapterConfig::parse(&json!([])).is_err());
        let endless = config("lora_alpha", json!(1e300)).unwrap();
        assert!(endless.rank_and_scale("q_proj").is_err());
    }

    #[test]
    fn modules_must_be_those_that_the_config_names() {
        let check = |targets: Value, modules: &[&str]| {
            config("target_modules", targets).unwrap().check_modules(modules.iter().copied())
        };
        let both = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"];
        assert_eq!(check(json!(["q_proj", "v_proj"]), &both), Ok(()));
        assert_eq!(check(json!("all-linear"), &both), Ok(()));
        assert_eq!(check(json!(r".*\.(q|v)_proj"), &both), Ok(()));
        assert!(check(json!(r".*\.(q|v)"), &both).unwrap_err().contains("does not name"));
        assert!(check(json!(["q_proj"]), &both).unwrap_err().contains("v_proj"));
        assert!(check(json!(["q_proj", "v_proj", "o_proj"]), &both).unwrap_err().contains("o_proj"));
        assert!(check(json!(["roj"]), &both).is_err());
    }
}
