//! Maps tensor names of foreign formats to roles. A name that means nothing here is refused by the caller, because
//! leaving out a weight would give wrong answers.

use crate::{LayerRole, Role};

/// What a foreign tensor name means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    /// A tensor that the model needs.
    Role(Role),
    /// A buffer that the executor computes itself, or a head that it does not use.
    Ignored,
    /// Nothing that this build knows.
    Unknown,
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

/// Names of Hugging Face llama, qwen2 and qwen3 checkpoints, with or without the `model.` prefix.
pub(crate) fn hugging_face_decoder(name: &str, tied: bool) -> Name {
    if name == "lm_head.weight" {
        return if tied { Name::Ignored } else { Name::Role(Role::Output) };
    }
    let name = name.strip_prefix("model.").unwrap_or(name);
    let role = match name {
        "embed_tokens.weight" => Some(Role::TokenEmbedding),
        "norm.weight" => Some(Role::FinalNorm),
        _ => name.strip_prefix("layers.").and_then(layer).and_then(|(number, rest)| {
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
                "post_attention_layernorm.weight" => LayerRole::MlpNorm,
                "mlp.gate_proj.weight" => LayerRole::Gate,
                "mlp.gate_proj.bias" => LayerRole::GateBias,
                "mlp.up_proj.weight" => LayerRole::Up,
                "mlp.up_proj.bias" => LayerRole::UpBias,
                "mlp.down_proj.weight" => LayerRole::Down,
                "mlp.down_proj.bias" => LayerRole::DownBias,
                _ => return None,
            };
            Some(Role::Layer(number, role))
        }),
    };
    match role {
        Some(role) => Name::Role(role),
        None if is_buffer(name) => Name::Ignored,
        None => Name::Unknown,
    }
}

/// Names of Hugging Face BERT checkpoints, with or without the `bert.` prefix, norms in the old spelling or the new.
pub(crate) fn hugging_face_bert(name: &str) -> Name {
    let name = name.strip_prefix("bert.").unwrap_or(name);
    let current =
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias");
    let role = match current.as_str() {
        "embeddings.word_embeddings.weight" => Some(Role::TokenEmbedding),
        "embeddings.position_embeddings.weight" => Some(Role::PositionEmbedding),
        "embeddings.token_type_embeddings.weight" => Some(Role::TypeEmbedding),
        "embeddings.LayerNorm.weight" => Some(Role::EmbeddingNorm),
        "embeddings.LayerNorm.bias" => Some(Role::EmbeddingNormBias),
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
        None if name.starts_with("pooler.") || name.starts_with("cls.") || is_buffer(name) => Name::Ignored,
        None => Name::Unknown,
    }
}

/// Buffers that old versions of the reference implementation saved along with the weights.
fn is_buffer(name: &str) -> bool {
    ["rotary_emb.inv_freq", "position_ids", "attn.bias", "attn.masked_bias"].iter().any(|buffer| {
        name.strip_suffix(buffer).is_some_and(|before| before.is_empty() || before.ends_with(['.', '_']))
    })
}

/// Names of GGUF llama, qwen2 and qwen3 files.
pub(crate) fn gguf_decoder(name: &str) -> Name {
    let role = match name {
        "token_embd.weight" => Some(Role::TokenEmbedding),
        "output_norm.weight" => Some(Role::FinalNorm),
        "output.weight" => Some(Role::Output),
        _ => name.strip_prefix("blk.").and_then(layer).and_then(|(number, rest)| {
            let role = match rest {
                "attn_norm.weight" => LayerRole::AttnNorm,
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
                "ffn_norm.weight" => LayerRole::MlpNorm,
                "ffn_gate.weight" => LayerRole::Gate,
                "ffn_gate.bias" => LayerRole::GateBias,
                "ffn_up.weight" => LayerRole::Up,
                "ffn_up.bias" => LayerRole::UpBias,
                "ffn_down.weight" => LayerRole::Down,
                "ffn_down.bias" => LayerRole::DownBias,
                _ => return None,
            };
            Some(Role::Layer(number, role))
        }),
    };
    role.map_or(Name::Unknown, Name::Role)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoder_names_with_and_without_prefix() {
        let query = Name::Role(Role::Layer(31, LayerRole::Query));
        assert_eq!(hugging_face_decoder("model.layers.31.self_attn.q_proj.weight", false), query);
        assert_eq!(hugging_face_decoder("layers.31.self_attn.q_proj.weight", false), query);
        assert_eq!(gguf_decoder("blk.31.attn_q.weight"), query);
        assert_eq!(hugging_face_decoder("lm_head.weight", true), Name::Ignored);
        assert_eq!(hugging_face_decoder("lm_head.weight", false), Name::Role(Role::Output));
    }

    #[test]
    fn buffers_are_ignored_and_strangers_are_not() {
        let ignored = "model.layers.0.self_attn.rotary_emb.inv_freq";
        assert_eq!(hugging_face_decoder(ignored, false), Name::Ignored);
        assert_eq!(hugging_face_bert("embeddings.position_ids"), Name::Ignored);
        assert_eq!(hugging_face_bert("bert.pooler.dense.weight"), Name::Ignored);
        for strange in
            ["model.layers.0.mlp.experts.0.up_proj.weight", "score.weight", "model.layers.00.norm.weight", ""]
        {
            assert_eq!(hugging_face_decoder(strange, false), Name::Unknown, "{strange}");
        }
        assert_eq!(gguf_decoder("blk.99999999999.attn_q.weight"), Name::Unknown);
        assert_eq!(hugging_face_bert("classifier.weight"), Name::Unknown);
    }

    #[test]
    fn bert_names_in_both_spellings() {
        let norm = Name::Role(Role::Layer(2, LayerRole::AttnNorm));
        assert_eq!(hugging_face_bert("encoder.layer.2.attention.output.LayerNorm.weight"), norm);
        assert_eq!(hugging_face_bert("bert.encoder.layer.2.attention.output.LayerNorm.gamma"), norm);
    }
}
