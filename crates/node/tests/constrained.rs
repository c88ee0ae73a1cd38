//! Constrained sequences in a pool that is too small for all of them: a preempted one goes on where its grammar was.

#![allow(clippy::unwrap_used)]

mod common;

use common::{deploy, eventually, finish, open, request, run};
use tangram_node::{GenerateRequest, Grammar, SamplingParams, TokenText, Vocabulary};
use tangram_testkit::{Family, RandomModel, write_hf_model};

#[test]
fn preemption_does_not_forget_the_grammar() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_hf_model(
        sources.path(),
        &RandomModel { seed: 11, context: 256, ..RandomModel::tiny(Family::Llama) },
    );
    let tokens: Vec<TokenText> = (0u8..=255).map(|byte| TokenText::Bytes(vec![byte])).collect();
    let grammar =
        Vocabulary::new(&tokens).unwrap().compile(&Grammar::Regex("([a-f]{3}-){40}z".into())).unwrap();
    let ask = |model, index: u32| {
        let prompt: Vec<u32> = (0..8).map(|j| 3 + index * 7 + j).collect();
        let sampling = SamplingParams { seed: Some(u64::from(index)), ..SamplingParams::default() };
        // Every other one is free.
        let grammar = index.is_multiple_of(2).then(|| grammar.clone());
        GenerateRequest { sampling, grammar, ..request(model, &prompt, 200) }
    };
    let roomy = open(data.path(), 64 << 20);
    let model = deploy(&roomy, "m", sources.path());
    let alone: Vec<_> = (0..12).map(|index| run(&roomy, ask(&model, index)).tokens).collect();
    for tokens in alone.iter().step_by(2) {
        assert_eq!(tokens.len(), 161);
        let groups: Vec<&[u32]> = tokens[..160].chunks(4).collect();
        assert!(groups.iter().all(|g| g[..3].iter().all(|t| (97..103).contains(t)) && g[3] == 45));
        assert_eq!(tokens[160], u32::from(b'z'));
    }
    drop(roomy);
    let kv_of_one = 208 * model.kv_bytes_per_token;
    let tight = open(data.path(), (model.weight_bytes + 3 * kv_of_one + (256 << 10)).max(1 << 20));
    let model = tight.model("m").unwrap();
    let running: Vec<_> = (0..12).map(|index| tight.generate(ask(&model, index)).unwrap()).collect();
    for (generation, expected) in running.into_iter().zip(&alone) {
        assert_eq!(&finish(generation).unwrap().tokens, expected);
    }
    // The status may be a little old while there is work.
    eventually("somebody was preempted", || tight.status().preemptions_total > 0);
}
