//! Maps tensor names of foreign formats to roles. A name that means nothing here is refused by the caller, because
//! leaving out a weight would give wrong answers.

use crate::{ExpertRole, LayerRole, Role};

/// What a foreign tensor name means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    /// A tensor that the model needs.
    Role(Role),
    /// A matrix that the model needs, stored as `[in_features, out_features]`.
    Transposed(Role),
    /// Several tensors of a layer in one.
    Fused(u32, Fused),
    /// A buffer that the executor computes itself, or a head that it does not use.
    Ignored,
    /// Nothing that this build knows.
    Unknown,
}

/// Tensors of a layer that are stored as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fused {
    /// Rows of query, then key, then value.
    QueryKeyValue,
    /// Their biases.
    QueryKeyValueBias,
    /// The same, stored as `[in_features, out_features]`.
    QueryKeyValueTransposed,
    /// For every head its rows of query, key and value.
    QueryKeyValueByHead,
    /// Their biases.
    QueryKeyValueByHeadBias,
    /// Rows of the gate, then of up.
    GateUp,
    /// For every expert its matrix.
    Experts(ExpertRole),
    /// For every expert rows of the gate, then of up.
    ExpertsGateUp,
}

/// What the tensors of a Hugging Face family are called. `tied` says that the output matrix is the token embedding,
/// `scores` that the model scores pairs.
pub(crate) fn hugging_face(family: &str, name: &str, tied: bool, scores: bool) -> Name {
    match family {
        "bert" | "roberta" | "xlm-roberta" => hugging_face_bert(name, scores),
        "gpt2" => gpt2(name, tied),
        "gpt_neox" => gpt_neox(name, tied),
        "opt" => opt(name, tied),
        _ => hugging_face_decoder(family, name, tied),
    }
}

/// Splits `N.rest` into the layer number and the rest.
fn layer(text: &str) -> Option<(u32, &str)> {
    let (number, rest) = text.split_once('.')?;
    if number.is_empty()
        || (number.len() > 1 && number.starts_with('0'))
        || !number.bytes().all(|b| b.is_ascii_digit())
    {
        return None;
    }
    Some((number.parse().ok()?, rest))
}

/// A tensor outside or inside of a layer, else a buffer or a stranger.
fn name(whole: &str, found: Option<Name>) -> Name {
    match found {
        Some(name) => name,
        None if is_buffer(whole) => Name::Ignored,
        None => Name::Unknown,
    }
}

/// The output matrix, which tied models may save along.
fn output(tied: bool) -> Name {
    if tied { Name::Ignored } else { Name::Role(Role::Output) }
}

/// Names of Hugging Face families with llama's names, with or without the `model.` prefix.
fn hugging_face_decoder(family: &str, whole: &str, tied: bool) -> Name {
    if whole == "lm_head.weight" {
        return output(tied);
    }
    let short = whole.strip_prefix("model.").unwrap_or(whole);
    let found = match short {
        "embed_tokens.weight" => Some(Name::Role(Role::TokenEmbedding)),
        "norm.weight" => Some(Name::Role(Role::FinalNorm)),
        _ => short.strip_prefix("layers.").and_then(layer).and_then(|(number, rest)| {
            let gemma = family.starts_with("gemma");
            let role = match rest {
                "input_layernorm.weight" => LayerRole::AttnNorm,
                "self_attn.q_proj.weight" => LayerRole::Query,
                "self_attn.q_proj.bias" => LayerRole::QueryBias,
                "self_attn.k_proj.weight" => LayerRole::Key,
                "self_attn.k_proj.bias" => LayerRole::KeyBias,
                "self_attn.v_proj.weight" => LayerRole::Value,
                "self_attn.v_proj.bias" => LayerRole::ValueBias,
                "self_attn.q_norm.weight" => LayerRole::QueryNorm,
                "self_attn.k_norm.weight" => LayerRole::KeyNorm,
                "self_attn.o_proj.weight" => LayerRole::AttnOut,
                "self_attn.o_proj.bias" => LayerRole::AttnOutBias,
                // The same name for two places: Gemma has four norms in a layer.
                "post_attention_layernorm.weight" if gemma => LayerRole::AttnPostNorm,
                "pre_feedforward_layernorm.weight" if gemma => LayerRole::MlpNorm,
                "post_feedforward_layernorm.weight" if gemma => LayerRole::MlpPostNorm,
                "post_attention_layernorm.weight" => LayerRole::MlpNorm,
                "mlp.gate_proj.weight" => LayerRole::Gate,
                "mlp.gate_proj.bias" => LayerRole::GateBias,
                "mlp.up_proj.weight" => LayerRole::Up,
                "mlp.up_proj.bias" => LayerRole::UpBias,
                "mlp.down_proj.weight" => LayerRole::Down,
                "mlp.down_proj.bias" => LayerRole::DownBias,
                "self_attn.qkv_proj.weight" => return Some(Name::Fused(number, Fused::QueryKeyValue)),
                "mlp.gate_up_proj.weight" => return Some(Name::Fused(number, Fused::GateUp)),
                _ => return experts(rest).map(|name| name.in_layer(number)),
            };
            Some(Name::Role(Role::Layer(number, role)))
        }),
    };
    name(whole, found)
}

/// A tensor of a feed-forward block with experts.
enum ExpertName {
    Role(LayerRole),
    Fused(Fused),
}

impl ExpertName {
    fn in_layer(self, layer: u32) -> Name {
        match self {
            ExpertName::Role(role) => Name::Role(Role::Layer(layer, role)),
            ExpertName::Fused(fused) => Name::Fused(layer, fused),
        }
    }
}

/// Experts one by one (Mixtral's names and Qwen's) or stacked.
fn experts(rest: &str) -> Option<ExpertName> {
    let rest = rest.strip_prefix("block_sparse_moe.").or_else(|| rest.strip_prefix("mlp."))?;
    Some(match rest {
        "gate.weight" => ExpertName::Role(LayerRole::Router),
        "experts.gate_up_proj" => ExpertName::Fused(Fused::ExpertsGateUp),
        "experts.down_proj" => ExpertName::Fused(Fused::Experts(ExpertRole::Down)),
        _ => {
            let (expert, rest) = layer(rest.strip_prefix("experts.")?)?;
            let role = match rest {
                "w1.weight" | "gate_proj.weight" => ExpertRole::Gate,
                "w3.weight" | "up_proj.weight" => ExpertRole::Up,
                "w2.weight" | "down_proj.weight" => ExpertRole::Down,
                _ => return None,
            };
            ExpertName::Role(LayerRole::Expert(expert, role))
        }
    })
}

/// Names of Hugging Face GPT-2, with or without the `transformer.` prefix. Its matrices are stored transposed.
fn gpt2(whole: &str, tied: bool) -> Name {
    if whole == "lm_head.weight" {
        return output(tied);
    }
    let short = whole.strip_prefix("transformer.").unwrap_or(whole);
    let found = match short {
        "wte.weight" => Some(Name::Role(Role::TokenEmbedding)),
        "wpe.weight" => Some(Name::Role(Role::PositionEmbedding)),
        "ln_f.weight" => Some(Name::Role(Role::FinalNorm)),
        "ln_f.bias" => Some(Name::Role(Role::FinalNormBias)),
        _ => short.strip_prefix("h.").and_then(layer).and_then(|(number, rest)| {
            let plain = |role| Some(Name::Role(Role::Layer(number, role)));
            let transposed = |role| Some(Name::Transposed(Role::Layer(number, role)));
            match rest {
                "ln_1.weight" => plain(LayerRole::AttnNorm),
                "ln_1.bias" => plain(LayerRole::AttnNormBias),
                "attn.c_attn.weight" => Some(Name::Fused(number, Fused::QueryKeyValueTransposed)),
                "attn.c_attn.bias" => Some(Name::Fused(number, Fused::QueryKeyValueBias)),
                "attn.c_proj.weight" => transposed(LayerRole::AttnOut),
                "attn.c_proj.bias" => plain(LayerRole::AttnOutBias),
                "ln_2.weight" => plain(LayerRole::MlpNorm),
                "ln_2.bias" => plain(LayerRole::MlpNormBias),
                "mlp.c_fc.weight" => transposed(LayerRole::Up),
                "mlp.c_fc.bias" => plain(LayerRole::UpBias),
                "mlp.c_proj.weight" => transposed(LayerRole::Down),
                "mlp.c_proj.bias" => plain(LayerRole::DownBias),
                _ => None,
            }
        }),
    };
    name(whole, found)
}

/// Names of Hugging Face GPT-NeoX, with or without the `gpt_neox.` prefix.
fn gpt_neox(whole: &str, tied: bool) -> Name {
    if whole == "embed_out.weight" || whole == "lm_head.weight" {
        return output(tied);
    }
    let short = whole.strip_prefix("gpt_neox.").unwrap_or(whole);
    let found = match short {
        "embed_in.weight" => Some(Name::Role(Role::TokenEmbedding)),
        "final_layer_norm.weight" => Some(Name::Role(Role::FinalNorm)),
        "final_layer_norm.bias" => Some(Name::Role(Role::FinalNormBias)),
        _ => short.strip_prefix("layers.").and_then(layer).and_then(|(number, rest)| {
            let role = match rest {
                "input_layernorm.weight" => LayerRole::AttnNorm,
                "input_layernorm.bias" => LayerRole::AttnNormBias,
                "attention.query_key_value.weight" => {
                    return Some(Name::Fused(number, Fused::QueryKeyValueByHead));
                }
                "attention.query_key_value.bias" => {
                    return Some(Name::Fused(number, Fused::QueryKeyValueByHeadBias));
                }
                // Buffers of old versions: the causal mask.
                "attention.bias" | "attention.masked_bias" => return Some(Name::Ignored),
                "attention.dense.weight" => LayerRole::AttnOut,
                "attention.dense.bias" => LayerRole::AttnOutBias,
                "post_attention_layernorm.weight" => LayerRole::MlpNorm,
                "post_attention_layernorm.bias" => LayerRole::MlpNormBias,
                "mlp.dense_h_to_4h.weight" => LayerRole::Up,
                "mlp.dense_h_to_4h.bias" => LayerRole::UpBias,
                "mlp.dense_4h_to_h.weight" => LayerRole::Down,
                "mlp.dense_4h_to_h.bias" => LayerRole::DownBias,
                _ => return None,
            };
            Some(Name::Role(Role::Layer(number, role)))
        }),
    };
    name(whole, found)
}

/// Names of Hugging Face OPT, with or without the `model.` prefix.
fn opt(whole: &str, tied: bool) -> Name {
    if whole == "lm_head.weight" {
        return output(tied);
    }
    let short = whole.strip_prefix("model.").unwrap_or(whole);
    let Some(short) = short.strip_prefix("decoder.") else { return Name::Unknown };
    let found = match short {
        "embed_tokens.weight" => Some(Name::Role(Role::TokenEmbedding)),
        "embed_positions.weight" => Some(Name::Role(Role::PositionEmbedding)),
        "final_layer_norm.weight" => Some(Name::Role(Role::FinalNorm)),
        "final_layer_norm.bias" => Some(Name::Role(Role::FinalNormBias)),
        _ => short.strip_prefix("layers.").and_then(layer).and_then(|(number, rest)| {
            let role = match rest {
                "self_attn_layer_norm.weight" => LayerRole::AttnNorm,
                "self_attn_layer_norm.bias" => LayerRole::AttnNormBias,
                "self_attn.q_proj.weight" => LayerRole::Query,
                "self_attn.q_proj.bias" => LayerRole::QueryBias,
                "self_attn.k_proj.weight" => LayerRole::Key,
                "self_attn.k_proj.bias" => LayerRole::KeyBias,
                "self_attn.v_proj.weight" => LayerRole::Value,
                "self_attn.v_proj.bias" => LayerRole::ValueBias,
                "self_attn.out_proj.weight" => LayerRole::AttnOut,
                "self_attn.out_proj.bias" => LayerRole::AttnOutBias,
                "final_layer_norm.weight" => LayerRole::MlpNorm,
                "final_layer_norm.bias" => LayerRole::MlpNormBias,
                "fc1.weight" => LayerRole::Up,
                "fc1.bias" => LayerRole::UpBias,
                "fc2.weight" => LayerRole::Down,
                "fc2.bias" => LayerRole::DownBias,
                _ => return None,
            };
            Some(Name::Role(Role::Layer(number, role)))
        }),
    };
    name(whole, found)
}

/// Names of Hugging Face BERT and RoBERTa checkpoints, with or without the `bert.` or `roberta.` prefix, norms in the
/// old spelling or the new. A model that scores has BERT's pooler with a classifier, or RoBERTa's classifier, which is
/// both.
fn hugging_face_bert(name: &str, scores: bool) -> Name {
    if let Some(head) = name.strip_prefix("classifier.").filter(|_| scores) {
        return match head {
            "weight" | "out_proj.weight" => Name::Role(Role::Classifier),
            "bias" | "out_proj.bias" => Name::Role(Role::ClassifierBias),
            "dense.weight" => Name::Role(Role::Pooler),
            "dense.bias" => Name::Role(Role::PoolerBias),
            _ => Name::Unknown,
        };
    }
    let name = name.strip_prefix("bert.").or_else(|| name.strip_prefix("roberta.")).unwrap_or(name);
    let current =
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias");
    let role = match current.as_str() {
        "embeddings.word_embeddings.weight" => Some(Role::TokenEmbedding),
        "embeddings.position_embeddings.weight" => Some(Role::PositionEmbedding),
        "embeddings.token_type_embeddings.weight" => Some(Role::TypeEmbedding),
        "embeddings.LayerNorm.weight" => Some(Role::EmbeddingNorm),
        "embeddings.LayerNorm.bias" => Some(Role::EmbeddingNormBias),
        "pooler.dense.weight" if scores => Some(Role::Pooler),
        "pooler.dense.bias" if scores => Some(Role::PoolerBias),
        _ => current.strip_prefix("encoder.layer.").and_then(layer).and_then(|(number, rest)| {
            let role = match rest {
                "attention.self.query.weight" => LayerRole::Query,
                "attention.self.query.bias" => LayerRole::QueryBias,
                "attention.self.key.weight" => LayerRole::Key,
                "attention.self.key.bias" => LayerRole::KeyBias,
                "attention.self.value.weight" => LayerRole::Value,
                "attention.self.value.bias" => LayerRole::ValueBias,
                "attention.output.dense.weight" => LayerRole::AttnOut,
                "attention.output.dense.bias" => LayerRole::AttnOutBias,
                "attention.output.LayerNorm.weight" => LayerRole::AttnNorm,
                "attention.output.LayerNorm.bias" => LayerRole::AttnNormBias,
                "intermediate.dense.weight" => LayerRole::Up,
                "intermediate.dense.bias" => LayerRole::UpBias,
                "output.dense.weight" => LayerRole::Down,
                "output.dense.bias" => LayerRole::DownBias,
                "output.LayerNorm.weight" => LayerRole::MlpNorm,
                "output.LayerNorm.bias" => LayerRole::MlpNormBias,
                _ => return None,
            };
            Some(Role::Layer(number, role))
        }),
    };
    match role {
        Some(role) => Name::Role(role),
        // The pooler and the pre-training heads come after the states that an embedding is made of.
        None if is_buffer(name)
            || ["pooler.", "cls.", "lm_head."].iter().any(|head| name.starts_with(head)) =>
        {
            Name::Ignored
        }
        None => Name::Unknown,
    }
}

/// Buffers that old versions of the reference implementation saved along with the weights.
fn is_buffer(name: &str) -> bool {
    ["rotary_emb.inv_freq", "position_ids", "attn.bias", "attn.masked_bias"].iter().any(|buffer| {
        name.strip_suffix(buffer).is_some_and(|before| before.is_empty() || before.ends_with(['.', '_']))
    })
}

/// Names of GGUF decoders. `family` is the architecture.
pub(crate) fn gguf(family: &str, name: &str) -> Name {
    let role = match name {
        "token_embd.weight" => Some(Name::Role(Role::TokenEmbedding)),
        "position_embd.weight" => Some(Name::Role(Role::PositionEmbedding)),
        "output_norm.weight" => Some(Name::Role(Role::FinalNorm)),
        "output_norm.bias" => Some(Name::Role(Role::FinalNormBias)),
        "output.weight" => Some(Name::Role(Role::Output)),
        _ => name
            .strip_prefix("blk.")
            .and_then(layer)
            .and_then(|(number, rest)| gguf_layer(family, rest).map(|name| name.in_layer(number))),
    };
    role.unwrap_or(Name::Unknown)
}

fn gguf_layer(family: &str, rest: &str) -> Option<ExpertName> {
    let role = match rest {
        "attn_norm.weight" => LayerRole::AttnNorm,
        "attn_norm.bias" => LayerRole::AttnNormBias,
        "attn_qkv.weight" => return Some(ExpertName::Fused(Fused::QueryKeyValue)),
        "attn_qkv.bias" => return Some(ExpertName::Fused(Fused::QueryKeyValueBias)),
        "attn_q.weight" => LayerRole::Query,
        "attn_q.bias" => LayerRole::QueryBias,
        "attn_k.weight" => LayerRole::Key,
        "attn_k.bias" => LayerRole::KeyBias,
        "attn_v.weight" => LayerRole::Value,
        "attn_v.bias" => LayerRole::ValueBias,
        "attn_q_norm.weight" => LayerRole::QueryNorm,
        "attn_k_norm.weight" => LayerRole::KeyNorm,
        "attn_output.weight" => LayerRole::AttnOut,
        "attn_output.bias" => LayerRole::AttnOutBias,
        "post_attention_norm.weight" => LayerRole::AttnPostNorm,
        "ffn_norm.weight" => LayerRole::MlpNorm,
        "ffn_norm.bias" => LayerRole::MlpNormBias,
        "ffn_gate_inp.weight" => LayerRole::Router,
        "ffn_gate_exps.weight" => return Some(ExpertName::Fused(Fused::Experts(ExpertRole::Gate))),
        "ffn_up_exps.weight" => return Some(ExpertName::Fused(Fused::Experts(ExpertRole::Up))),
        "ffn_down_exps.weight" => return Some(ExpertName::Fused(Fused::Experts(ExpertRole::Down))),
        "ffn_gate.weight" => LayerRole::Gate,
        "ffn_gate.bias" => LayerRole::GateBias,
        // Phi-3 has both in one.
        "ffn_up.weight" if family == "phi3" => return Some(ExpertName::Fused(Fused::GateUp)),
        "ffn_up.weight" => LayerRole::Up,
        "ffn_up.bias" => LayerRole::UpBias,
        "ffn_down.weight" => LayerRole::Down,
        "ffn_down.bias" => LayerRole::DownBias,
        "post_ffw_norm.weight" => LayerRole::MlpPostNorm,
        _ => {
            // The first files of mixtures of experts have a matrix per expert.
            let (role, rest) = [
                ("ffn_gate.", ExpertRole::Gate),
                ("ffn_up.", ExpertRole::Up),
                ("ffn_down.", ExpertRole::Down),
            ]
            .into_iter()
            .find_map(|(prefix, role)| Some((role, rest.strip_prefix(prefix)?)))?;
            match layer(rest)? {
                (expert, "weight") => LayerRole::Expert(expert, role),
                _ => return None,
            }
        }
    };
    Some(ExpertName::Role(role))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoder_names_with_and_without_prefix() {
        let query = Name::Role(Role::Layer(31, LayerRole::Query));
        assert_eq!(hugging_face_decoder("llama", "model.layers.31.self_attn.q_proj.weight", false), query);
        assert_eq!(hugging_face_decoder("llama", "layers.31.self_attn.q_proj.weight", false), query);
        assert_eq!(gguf("llama", "blk.31.attn_q.weight"), query);
        assert_eq!(hugging_face_decoder("llama", "lm_head.weight", true), Name::Ignored);
        assert_eq!(hugging_face_decoder("llama", "lm_head.weight", false), Name::Role(Role::Output));
    }

    #[test]
    fn buffers_are_ignored_and_strangers_are_not() {
        let ignored = "model.layers.0.self_attn.rotary_emb.inv_freq";
        assert_eq!(hugging_face_decoder("llama", ignored, false), Name::Ignored);
        assert_eq!(hugging_face_bert("embeddings.position_ids", false), Name::Ignored);
        assert_eq!(hugging_face_bert("bert.pooler.dense.weight", false), Name::Ignored);
        assert_eq!(hugging_face_bert("bert.pooler.dense.weight", true), Name::Role(Role::Pooler));
        assert_eq!(hugging_face_bert("classifier.weight", true), Name::Role(Role::Classifier));
        assert_eq!(hugging_face_bert("classifier.out_proj.bias", true), Name::Role(Role::ClassifierBias));
        assert_eq!(hugging_face_bert("classifier.dense.weight", true), Name::Role(Role::Pooler));
        for strange in [
            "model.layers.0.mlp.experts.0.side_proj.weight",
            "score.weight",
            "model.layers.00.norm.weight",
            "",
        ] {
            assert_eq!(hugging_face_decoder("llama", strange, false), Name::Unknown, "{strange}");
        }
        assert_eq!(gguf("llama", "blk.99999999999.attn_q.weight"), Name::Unknown);
        assert_eq!(hugging_face_bert("classifier.weight", false), Name::Unknown);
    }

    #[test]
    fn families_with_names_of_their_own() {
        let role = |role| Name::Role(Role::Layer(3, role));
        for (family, name, meaning) in [
            ("gemma2", "model.layers.3.post_attention_layernorm.weight", role(LayerRole::AttnPostNorm)),
            ("llama", "model.layers.3.post_attention_layernorm.weight", role(LayerRole::MlpNorm)),
            (
                "mixtral",
                "model.layers.3.block_sparse_moe.experts.7.w2.weight",
                role(LayerRole::Expert(7, ExpertRole::Down)),
            ),
            ("qwen3_moe", "model.layers.3.mlp.gate.weight", role(LayerRole::Router)),
            ("qwen3_moe", "model.layers.3.mlp.experts.gate_up_proj", Name::Fused(3, Fused::ExpertsGateUp)),
            ("phi3", "model.layers.3.self_attn.qkv_proj.weight", Name::Fused(3, Fused::QueryKeyValue)),
            ("gpt2", "h.3.attn.c_proj.weight", Name::Transposed(Role::Layer(3, LayerRole::AttnOut))),
            ("gpt2", "transformer.h.3.attn.bias", Name::Ignored),
            ("gpt2", "transformer.h.3.crossattention.c_attn.weight", Name::Unknown),
            ("gpt_neox", "gpt_neox.layers.3.attention.bias", Name::Ignored),
            ("gpt_neox", "embed_out.weight", Name::Role(Role::Output)),
            ("opt", "decoder.layers.3.final_layer_norm.bias", role(LayerRole::MlpNormBias)),
            ("opt", "model.decoder.project_in.weight", Name::Unknown),
        ] {
            assert_eq!(hugging_face(family, name, false, false), meaning, "{name}");
        }
        assert_eq!(gguf("llama", "blk.3.ffn_up.5.weight"), role(LayerRole::Expert(5, ExpertRole::Up)));
        assert_eq!(gguf("phi3", "blk.3.ffn_up.weight"), Name::Fused(3, Fused::GateUp));
        assert_eq!(gguf("llama", "blk.3.ffn_up.5.bias"), Name::Unknown);
    }

    #[test]
    fn bert_names_in_both_spellings() {
        let norm = Name::Role(Role::Layer(2, LayerRole::AttnNorm));
        assert_eq!(hugging_face_bert("encoder.layer.2.attention.output.LayerNorm.weight", false), norm);
        assert_eq!(hugging_face_bert("bert.encoder.layer.2.attention.output.LayerNorm.gamma", false), norm);
    }
}
