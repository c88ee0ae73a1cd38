//! Configs of every family in their old and new forms, and what is refused.

use serde_json::json;

use super::*;
use crate::{LocalLayers, Rope, RopeScaling};

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
        (json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1}), "sliding window"),
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
