//! Memory foretold against memory held, within 2 %: weights, KV, activations, and what fits into a pool. Times are
//! measured by the example of the same name, not tested.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{deploy, eventually, request, run};
use tangram_node::{GenerateEvent, Node, NodeConfig, PassShape};
use tangram_testkit::{Family, Float, RandomModel, mutate_layer, write_hf_model};

/// One thread: with more, what each of them holds depends on which took part.
fn open(data: &Path, device_memory: u64) -> Arc<Node> {
    let config = NodeConfig { threads: Some(1), ..NodeConfig::new(data.to_path_buf(), device_memory) };
    Node::open(config).unwrap()
}

fn close(foretold: u64, held: u64) -> bool {
    foretold.abs_diff(held) as f64 <= 0.02 * held as f64
}

fn model(family: Family) -> RandomModel {
    let base = RandomModel::tiny(family);
    RandomModel { hidden: 128, intermediate: 256, head_dim: 32, vocab: 600, context: 512, ..base }
}

#[test]
fn weights_kv_and_activations_are_as_foretold() {
    let families =
        [Family::Llama, Family::Qwen2, Family::Qwen3, Family::Gemma2, Family::Gpt2, Family::Mixtral];
    // One data directory, so that the machine is measured once.
    let data = tempfile::tempdir().unwrap();
    for (seed, family) in families.into_iter().enumerate() {
        let source = tempfile::tempdir().unwrap();
        let dtype = [Float::F32, Float::BF16, Float::F16][seed % 3];
        write_hf_model(source.path(), &RandomModel { seed: seed as u64, dtype, ..model(family) });
        let node = open(data.path(), 32 << 20);
        let deployed = deploy(&node, "m", source.path());
        let forecast = deployed.forecast();
        assert_eq!(node.status().resident_bytes, 0, "nothing is loaded yet");

        let (prompt, output) = (300, 40);
        let tokens: Vec<u32> = (0..prompt).map(|i| 3 + (i * 7) % 500).collect();
        let mut generation = node.generate(request(&deployed, &tokens, output)).unwrap();
        let mut generated = 0;
        let mut kv_seen = 0;
        while let Some(event) = generation.next_blocking() {
            assert!(!matches!(event, GenerateEvent::Failed(_)), "{event:?}");
            generated += usize::from(matches!(event, GenerateEvent::Token(_)));
            kv_seen = kv_seen.max(node.status().kv_bytes);
        }
        assert_eq!(generated, output);
        // Cached or in use: every full block that the sequence had is still there.
        let last = prompt as u64 + output as u64 - 1;
        let full = last / 16 * 16;
        eventually("its KV is given back", || {
            node.status().kv_bytes == 0 && node.status().kv_cached_bytes > 0
        });
        let status = node.status();
        let weights: u64 = forecast.bytes_by_stage().iter().sum();
        assert_eq!(weights, status.resident_bytes, "{family:?}");
        assert_eq!(forecast.footprint().kv_bytes(full), status.kv_cached_bytes, "{family:?}");
        assert!(kv_seen <= forecast.footprint().kv_bytes(last), "{family:?}: {kv_seen}");
        let pages = (status.pool_bytes - status.free_bytes) / forecast.footprint().page_bytes;
        let kv_pages = forecast.footprint().kv_pages(full / 16);
        assert_eq!(forecast.footprint().weight_pages + kv_pages, pages, "{family:?}");
        // The prompt went in two steps, of 256 and 44 tokens.
        let shape = PassShape { tokens: 256, output_rows: 1, longest: prompt as usize + output };
        let (foretold, held) = (forecast.scratch_bytes(shape), status.scratch_bytes);
        match family {
            // An expert seldom gets every row.
            Family::Mixtral => assert!(held <= foretold, "{family:?}: {held} of {foretold}"),
            _ => assert!(close(foretold, held), "{family:?}: {held} of {foretold}"),
        }
        let listed = node.list().remove(0).forecast;
        assert!(listed.scratch_bytes >= held);
        assert!(listed.cold_first_token_seconds > listed.resident_first_token_seconds);
        assert!(listed.resident_first_token_seconds > Some(0.0));
        node.remove("m").unwrap();
    }
}

#[test]
fn what_is_here_already_counts_as_here() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (base, tuned) = (sources.path().join("base"), sources.path().join("tuned"));
    write_hf_model(&base, &model(Family::Llama));
    mutate_layer(&base, &tuned, 1);
    let node = open(data.path(), 32 << 20);
    let base = deploy(&node, "base", &base);
    let tuned = deploy(&node, "tuned", &tuned);
    let loaded = run(&node, request(&base, &[5, 6, 7], 4)).timing.bytes_loaded;
    assert_eq!(loaded, base.forecast().bytes_by_stage().iter().sum::<u64>());
    eventually("the listing shows it", || {
        let listed = node.list().into_iter().find(|status| status.name == "tuned").unwrap();
        listed.resident_bytes == listed.shared_bytes && listed.shared_bytes > 0
    });
    let listed = node.list().into_iter().find(|status| status.name == "tuned").unwrap();
    let missing = run(&node, request(&tuned, &[5, 6, 7], 4)).timing.bytes_loaded;
    assert_eq!(missing, listed.weight_bytes - listed.resident_bytes);
}

/// As many tokens as were foretold to fit beside the weights do fit, all at once; and one block more would not.
#[test]
fn as_many_tokens_fit_as_was_foretold() {
    let (source, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_hf_model(source.path(), &RandomModel { context: 4096, ..RandomModel::tiny(Family::Llama) });
    let node = open(data.path(), 2 << 20);
    let deployed = deploy(&node, "m", source.path());
    let foretold = node.list().remove(0).forecast.tokens_beside_weights.unwrap() as usize;
    assert_eq!(foretold, deployed.context, "the pool is the limit here, not the model");
    assert!(foretold > 500 && foretold < 4096, "{foretold}");
    let prompt: Vec<u32> = (0..foretold as u32 - 8).map(|i| 3 + i % 300).collect();
    let outcome = run(&node, request(&deployed, &prompt, 8));
    assert_eq!(outcome.tokens.len(), 8);
    assert_eq!(node.status().preemptions_total, 0);
    assert!(node.generate(request(&deployed, &prompt, 9)).is_err());
    eventually("only what was foretold is taken", || {
        let status = node.status();
        status.kv_bytes == 0 && status.free_bytes < deployed.forecast().footprint().kv_bytes(17)
    });
}

/// A model that can never run is refused before its bytes are read.
#[test]
fn what_never_fits_is_refused_at_once() {
    let (source, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let wide = RandomModel {
        layers: 8,
        heads: 32,
        kv_heads: 32,
        head_dim: 128,
        context: 64,
        ..RandomModel::tiny(Family::Llama)
    };
    write_hf_model(source.path(), &wide);
    let weights = tangram_checkpoint::open(source.path()).unwrap().weight_bytes();
    // Room for the weights, but not for a single block of KV beside them.
    let node = open(data.path(), weights + (256 << 10));
    let mut asked = false;
    let error = node.deploy("m", source.path(), &mut |_| {
        asked = true;
        std::ops::ControlFlow::Continue(())
    });
    let error = error.err().unwrap().to_string();
    assert!(error.contains("does not fit") && error.contains("KV per token"), "{error}");
    assert!(!asked, "its tensors were imported first");
}
