//! What lies on disk and is wrong, a manifest that is well-formed or a bit of the data: requests are told, nobody waits for
//! what will never be, and no wrong byte is computed with.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;

use common::{deploy, eventually, finish, open, request, run};
use tangram_node::RequestError;
use tangram_testkit::{Family, RandomModel, write_hf_model};

const MEMORY: u64 = 16 << 20;

/// Two tensors at one place of the data file cannot both have it: the device refuses that, however much room there is. It
/// used to count as a shortage of memory, for which the request waited for ever.
#[test]
fn a_request_for_which_the_device_refuses_a_place_ends_with_an_error() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let manifest = {
        let node = open(data.path(), MEMORY);
        for (seed, name) in [(1, "damaged"), (2, "sound")] {
            let dir = sources.path().join(name);
            write_hf_model(&dir, &RandomModel { seed, ..RandomModel::tiny(Family::Llama) });
            deploy(&node, name, &dir);
        }
        node.model("damaged").unwrap().directory.join("manifest.json")
    };
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    let tensors = json["tensors"].as_array_mut().unwrap();
    let last = tensors.len() - 1;
    tensors[last]["offset"] = tensors[last - 1]["offset"].clone();
    fs::write(&manifest, serde_json::to_vec(&json).unwrap()).unwrap();

    let node = open(data.path(), MEMORY);
    let model = node.model("damaged").unwrap();
    for _ in 0..2 {
        let error = finish(node.generate(request(&model, &[5, 6, 7], 4)).unwrap()).err().unwrap();
        let RequestError::LoadFailed { model, reason } = error else { panic!("{error}") };
        assert_eq!(model, "damaged");
        assert!(reason.contains("already taken"), "{reason}");
    }
    let sound = node.model("sound").unwrap();
    assert_eq!(run(&node, request(&sound, &[5, 6, 7], 4)).tokens.len(), 4);
    eventually("nothing is left behind", || {
        let status = node.status();
        (status.leased_bytes, status.waiting, status.kv_blocks) == (0, 0, 0)
    });
    node.remove("damaged").unwrap();
}

/// A flipped bit fails the request by the tensor's name; the next start refuses the model, and no other; deploying it again
/// repairs it.
#[test]
fn damaged_data_is_refused_until_it_is_deployed_again() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let dirs = ["damaged", "sound"].map(|name| sources.path().join(name));
    let (expected, file) = {
        let node = open(data.path(), MEMORY);
        for (dir, seed) in dirs.iter().zip([3, 4]) {
            write_hf_model(dir, &RandomModel { seed, ..RandomModel::tiny(Family::Llama) });
            deploy(&node, dir.file_name().unwrap().to_str().unwrap(), dir);
        }
        let model = node.model("damaged").unwrap();
        let tokens = run(&node, request(&model, &[5, 6, 7], 4)).tokens;
        (tokens, model.directory.join("data.bin"))
    };
    let mut bytes = fs::read(&file).unwrap();
    bytes[100] ^= 1;
    fs::write(&file, &bytes).unwrap();
    {
        let node = open(data.path(), MEMORY);
        let model = node.model("damaged").unwrap();
        let error = finish(node.generate(request(&model, &[5, 6, 7], 4)).unwrap()).err().unwrap();
        let RequestError::LoadFailed { reason, .. } = error else { panic!("{error}") };
        assert!(reason.contains("checksum") && reason.contains("data.bin"), "{reason}");
    }
    {
        let node = open(data.path(), MEMORY);
        assert!(node.model("damaged").is_none(), "refused by name at the start");
        let sound = node.model("sound").unwrap();
        assert_eq!(run(&node, request(&sound, &[5, 6, 7], 4)).tokens.len(), 4);
        let model = deploy(&node, "damaged", &dirs[0]);
        assert_eq!(run(&node, request(&model, &[5, 6, 7], 4)).tokens, expected);
    }
    let node = open(data.path(), MEMORY);
    let model = node.model("damaged").expect("whole again");
    assert_eq!(run(&node, request(&model, &[5, 6, 7], 4)).tokens, expected);
}
