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
        (json!({"quantization_config": {"quant_method": "bitsandbytes"}}), "bitsandbytes"),
        (json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}}), "dynamic"),
        (json!({"rope_parameters": {"rope_type": "proportional"}}), "proportional"),
        (json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}), "layer type"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "partial_rotary_factor"),
        (
            json!({"layer_types": ["full_attention", "linear_attention", "linear_attention"]}),
            "linear_attention",
        ),
        (json!({"model_type": "gemma2", "use_bidirectional_attention": true}), "use_bidirectional_attention"),
        (json!({"model_type": "gemma2", "hidden_activation": "relu"}), "relu"),
        (json!({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": true}), "inverse_layer"),
        (json!({"model_type": "gpt_neox", "hidden_act": "quick_gelu"}), "quick_gelu"),
        (json!({"model_type": "opt", "do_layer_norm_before": false}), "do_layer_norm_before"),
        (json!({"model_type": "opt", "word_embed_proj_dim": 24}), "project_in"),
    ] {
        match parse(&with(llama(), changes)) {
            Err(Unsupported(message)) => assert!(message.contains(word), "{message}"),
            other => panic!("{word}: {other:?}"),
        }
    }
    for (changes, word) in [
        (json!({"architectures": ["BertForTokenClassification"]}), "BertForTokenClassification"),
        (json!({"architectures": ["BertForSequenceClassification"]}), "2 labels"),
        (
            json!({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "L"},
                   "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}),
            "Tanh",
        ),
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
        json!({"layer_types": ["full_attention"]}),
        json!({"model_type": "mixtral", "num_experts_per_tok": 9}),
        json!({"model_type": "mixtral", "num_local_experts": 0}),
        json!({"model_type": "qwen3_moe"}),
        json!({"model_type": "qwen3_moe", "moe_intermediate_size": 8, "decoder_sparse_step": 0}),
        json!({"model_type": "mistral", "sliding_window": 0}),
        json!({"model_type": "gemma2", "query_pre_attn_scalar": 0}),
        json!({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}}),
        json!({"model_type": "gpt_neox", "rotary_pct": -1.0}),
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

#[test]
fn windows_are_where_the_family_has_them() {
    let local = |changes: Value| parse(&with(llama(), changes)).unwrap().spec.local;
    let of = |window, layers: &[u32]| Some(LocalLayers { window, layers: layers.to_vec(), rope: None });
    assert_eq!(local(json!({"sliding_window": 16})), None);
    assert_eq!(local(json!({"model_type": "mistral", "sliding_window": 16})), of(16, &[0, 1, 2]));
    assert_eq!(local(json!({"model_type": "mistral"})), None);
    assert_eq!(local(json!({"model_type": "phi3", "sliding_window": 256})), None);
    let qwen = json!({"model_type": "qwen2", "use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1});
    assert_eq!(local(qwen.clone()), of(16, &[1, 2]));
    let types = json!({"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]});
    assert_eq!(local(with(qwen.clone(), types.clone())), of(16, &[0, 2]));
    assert_eq!(local(with(types, json!({"model_type": "qwen2", "sliding_window": 16}))), None);
    let gemma = json!({"model_type": "gemma3_text", "sliding_window": 16, "sliding_window_pattern": 2});
    let rope = Rope { theta: 10_000.0, dims: 256, scaling: RopeScaling::None };
    assert_eq!(local(gemma), Some(LocalLayers { window: 16, layers: vec![0, 2], rope: Some(rope) }));
}

#[test]
fn gemma3_has_two_rotations_in_both_forms() {
    let old = json!({
        "model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 5000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    });
    let new = json!({"model_type": "gemma3_text", "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    }});
    let [old, new] = [old, new].map(|changes| parse(&with(llama(), changes)).unwrap().spec);
    assert_eq!(old, new);
    assert_eq!(old.rope.unwrap().scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(old.local.unwrap().rope.unwrap().theta, 5000.0);
}

#[test]
fn a_part_of_a_head_can_be_rotated() {
    let neox = |changes| rope(with(json!({"model_type": "gpt_neox", "hidden_act": "gelu"}), changes));
    let half = Rope { theta: 500.0, dims: 6, scaling: RopeScaling::None };
    assert_eq!(neox(json!({"rotary_pct": 0.5, "rotary_emb_base": 500.0})), half);
    assert_eq!(neox(json!({"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 500.0}})), half);
    // A quarter of 12 are 3 elements, whose second pair turns by theta^(-2/3).
    let quarter = neox(json!({}));
    assert_eq!(quarter.dims, 4);
    assert!((quarter.theta.powf(-2.0 / 4.0) - 10_000f64.powf(-2.0 / 3.0)).abs() < 1e-12);
    assert_eq!(rope(json!({"model_type": "phi3", "partial_rotary_factor": 0.5})).dims, 6);
}

#[test]
fn yarn_and_longrope_are_read() {
    let yarn = rope(json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 64}}));
    let expected = RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_context: 64.0,
        truncate: true,
        magnitude: 0.1 * 4f64.ln() + 1.0,
    };
    assert_eq!(yarn.scaling, expected);
    let factors = vec![1.0f32, 1.5, 2.0, 2.5, 3.0, 3.5];
    let changes = json!({"model_type": "phi3", "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "su", "short_factor": factors, "long_factor": factors}});
    let Parsed { spec, .. } = parse(&with(llama(), changes)).unwrap();
    let magnitude = (1.0 + 4f64.ln() / 64f64.ln()).sqrt();
    let expected =
        RopeScaling::LongRope { short: factors.clone(), long: factors, original_context: 64.0, magnitude };
    assert_eq!(spec.rope.unwrap().scaling, expected);
    assert_eq!(spec.context, 256);
}

#[test]
fn a_classifier_with_one_label_gives_scores() {
    let score = |changes: Value| {
        let one = json!({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}});
        parse(&with(with(bert(), one), changes)).unwrap().spec.output
    };
    let identity = "torch.nn.modules.linear.Identity";
    assert_eq!(score(json!({})), Output::Score { activation: ScoreActivation::Sigmoid });
    for changes in [
        json!({"sentence_transformers": {"activation_fn": identity}}),
        json!({"sbert_ce_default_activation_function": identity}),
    ] {
        assert_eq!(score(changes), Output::Score { activation: ScoreActivation::Identity });
    }
    // RoBERTa's positions begin behind the one of padding.
    let roberta =
        json!({"model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"], "pad_token_id": 1});
    let spec = parse(&with(bert(), roberta)).unwrap().spec;
    assert_eq!((spec.context, spec.learned_positions, spec.position_offset), (254, Some(256), 2));
}
