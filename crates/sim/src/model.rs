//! Models as the simulator knows them: a list of tensor groups with content ids, in the order of the forward pass.

use std::collections::HashMap;

/// Every group starts at a multiple of this many bytes and fills whole multiples of it.
pub const ALIGNMENT: u64 = 256;

/// Tensors that are loaded and evicted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Identity of the bytes: equal content is one group, whichever model has it.
    pub content: u64,
    /// Size, a multiple of [`ALIGNMENT`].
    pub bytes: u64,
    /// Stage of the forward pass that needs it first.
    pub stage: u32,
}

/// How long passes of a model compute, as measured on one machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Pace {
    /// Prompt lengths in tokens, ascending, and the seconds that their prefill computes. At least one.
    pub prompts: Vec<(u64, f64)>,
    /// Seconds of each stage of a pass; only their ratios count.
    pub stages: Vec<f64>,
}

impl Pace {
    /// Seconds that the prefill of so many tokens computes: interpolated between the lengths that are known, and in
    /// proportion beyond the longest.
    pub fn prefill_seconds(&self, tokens: u64) -> f64 {
        let next = self.prompts.partition_point(|&(known, _)| known < tokens);
        let at = |index: usize| self.prompts.get(index).map(|&(tokens, seconds)| (tokens as f64, seconds));
        match (next.checked_sub(1).and_then(at), at(next)) {
            (Some((t0, s0)), Some((t1, s1))) => s0 + (s1 - s0) * (tokens as f64 - t0) / (t1 - t0),
            (None, Some((_, seconds))) => seconds,
            (Some((longest, seconds)), None) => seconds * tokens as f64 / longest,
            (None, None) => 0.0,
        }
    }
}

/// A model.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// Its name.
    pub name: String,
    /// Its tensor groups in the order of the forward pass. No content twice.
    pub groups: Vec<Group>,
    /// KV bytes per token.
    pub kv_bytes_per_token: u64,
    /// Longest prompt, in tokens; longer ones are cut.
    pub max_prompt: u64,
    /// How long it computes; `None` leaves that to the machine's profile.
    pub pace: Option<Pace>,
}

impl Model {
    /// Bytes of all groups.
    pub fn weight_bytes(&self) -> u64 {
        self.groups.iter().map(|group| group.bytes).sum()
    }

    /// For each group, the share of the pass that computes when it and everything before it is there: a stage's share
    /// belongs to its last group. Without a measured pace stages compute in proportion to their bytes, but looking up
    /// an embedding (stage 0) takes nothing.
    pub fn compute_shares(&self) -> Vec<f64> {
        if let Some(pace) = &self.pace {
            return self.measured_shares(&pace.stages);
        }
        let computing = |group: &&Group| group.stage > 0;
        let total: u64 = self.groups.iter().filter(computing).map(|group| group.bytes).sum();
        let mut shares = vec![0.0; self.groups.len()];
        let mut stage_bytes = 0;
        for (index, group) in self.groups.iter().enumerate() {
            stage_bytes += if group.stage > 0 { group.bytes } else { 0 };
            if self.groups.get(index + 1).is_none_or(|next| next.stage != group.stage) {
                shares[index] = stage_bytes as f64 / total.max(1) as f64;
                stage_bytes = 0;
            }
        }
        if total == 0
            && let Some(last) = shares.last_mut()
        {
            *last = 1.0;
        }
        shares
    }

    fn measured_shares(&self, stages: &[f64]) -> Vec<f64> {
        let total: f64 = stages.iter().sum();
        let mut taken = 0;
        let share = |(index, group): (usize, &Group)| {
            // What has no tensors of its own (the head of a model that reuses its embedding) computes with the last.
            let end = match self.groups.get(index + 1) {
                Some(next) if next.stage == group.stage => return 0.0,
                Some(_) => (group.stage as usize + 1).min(stages.len()),
                None => stages.len(),
            };
            let share = stages[taken.min(end)..end].iter().sum::<f64>() / total.max(f64::MIN_POSITIVE);
            taken = end;
            share
        };
        self.groups.iter().enumerate().map(share).collect()
    }

    /// The same model with neighbouring groups merged until each has at least 1/`parts` of the bytes, as the published
    /// system does. A merged group's content is that of its parts together, so partial sharing is lost, as there.
    pub fn merged(&self, parts: u64) -> Model {
        let least = self.weight_bytes() / parts.max(1);
        let mut groups: Vec<Group> = Vec::new();
        let mut open = false;
        for group in &self.groups {
            match groups.last_mut() {
                Some(last) if open => {
                    last.bytes += group.bytes;
                    last.content = mix(last.content, group.content);
                    // The pass may start on a merged group when all of it is there, so its last stage counts.
                    last.stage = group.stage;
                }
                _ => groups.push(*group),
            }
            open = groups.last().is_some_and(|last| last.bytes < least);
        }
        Model { groups, ..self.clone() }
    }

    /// The same model with contents that no other has: identity by model.
    pub fn unshared(&self, salt: u64) -> Model {
        let groups = self.groups.iter().map(|group| Group { content: mix(salt, group.content), ..*group });
        Model { groups: groups.collect(), ..self.clone() }
    }
}

/// Mixes two numbers into a content id (the finaliser of SplitMix64).
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.rotate_left(32) ^ b.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Shape of a decoder: sizes in bytes.
struct Shape {
    name: &'static str,
    bytes: u64,
    layers: u32,
    embedding: u64,
    head: u64,
    kv_bytes_per_token: u64,
    max_prompt: u64,
}

/// Groups are about this large; layers are cut into equal parts of it.
const GROUP_BYTES: u64 = 160 << 20;

impl Shape {
    fn model(&self, id: u64, group_bytes: u64) -> Model {
        let layer = (self.bytes - self.embedding - self.head) / u64::from(self.layers);
        let mut groups = Vec::new();
        let mut push = |stage: u32, bytes: u64| {
            let parts = (bytes / group_bytes).max(1);
            for part in 0..parts {
                let content = mix(id, u64::from(stage) << 32 | part);
                groups.push(Group { content, bytes: (bytes / parts).next_multiple_of(ALIGNMENT), stage });
            }
        };
        push(0, self.embedding);
        (1..=self.layers).for_each(|stage| push(stage, layer));
        if self.head > 0 {
            push(self.layers + 1, self.head);
        }
        Model {
            name: self.name.to_owned(),
            groups,
            kv_bytes_per_token: self.kv_bytes_per_token,
            max_prompt: self.max_prompt,
            pace: None,
        }
    }
}

/// The eight models of the Tangram authors' later evaluation, in the order of their ids in the trace: packed bytes as
/// measured by them, layers and vocabularies of the public checkpoints, KV of FP16, and their prompt limits.
pub fn reference_models() -> Vec<Model> {
    let shape = |name, bytes, layers, embedding, head, kv_bytes_per_token, max_prompt| Shape {
        name,
        bytes,
        layers,
        embedding,
        head,
        kv_bytes_per_token,
        max_prompt,
    };
    let shapes = [
        shape("qwen2-3b", 6_171_877_376, 36, 622_329_856, 0, 36_864, 12_921),
        shape("phi3-mini", 7_642_159_104, 32, 197_001_216, 197_001_216, 393_216, 4_095),
        shape("llama3-8b", 16_060_522_496, 32, 1_050_673_152, 1_050_673_152, 131_072, 8_967),
        shape("yi-9b", 17_658_814_464, 48, 524_288_000, 524_288_000, 98_304, 7_483),
        shape("qwen2-14b", 29_540_067_328, 48, 1_557_135_360, 1_557_135_360, 196_608, 8_596),
        shape("gpt-20b", 41_109_135_360, 44, 619_708_416, 619_708_416, 1_081_344, 1_344),
        shape("llava-7b", 14_126_854_144, 32, 876_000_000, 262_668_288, 524_288, 4_095),
        shape("r1-14b", 29_540_067_328, 48, 1_557_135_360, 1_557_135_360, 196_608, 8_596),
    ];
    shapes.iter().zip(1..).map(|(shape, id)| shape.model(id, GROUP_BYTES)).collect()
}

/// One 8B base, `tunes` fine-tunes that share between 60 and 95 % of its bytes, and `adapters` adapters on it: the
/// fine-tunes replace whole groups, spread evenly over the layers; an adapter adds 0.5 % in groups of its own.
pub fn family(tunes: usize, adapters: usize) -> Vec<Model> {
    let mut models = reference_models();
    let base = models.swap_remove(2);
    let mut family = vec![Model { name: "base".to_owned(), ..base.clone() }];
    for tune in 0..tunes {
        let shared = 0.60 + 0.35 * (tune as f64 + 0.5) / tunes as f64;
        let mut owed = 0.0;
        let groups = base.groups.iter().map(|group| {
            // Error diffusion: a group is the fine-tune's own whenever the bytes owed reach half of it.
            owed += (1.0 - shared) * group.bytes as f64;
            if owed < group.bytes as f64 / 2.0 {
                return *group;
            }
            owed -= group.bytes as f64;
            Group { content: mix(1000 + tune as u64, group.content), ..*group }
        });
        family.push(Model { name: format!("tune-{tune}"), groups: groups.collect(), ..base.clone() });
    }
    for adapter in 0..adapters {
        let mut groups = Vec::new();
        for group in &base.groups {
            groups.push(*group);
            if group.stage > 0 {
                let bytes = (group.bytes / 200).next_multiple_of(ALIGNMENT);
                groups.push(Group { content: mix(2000 + adapter as u64, group.content), bytes, ..*group });
            }
        }
        family.push(Model { name: format!("adapter-{adapter}"), groups, ..base.clone() });
    }
    family
}

/// `count` models of 16 groups for runs with very many of them: sizes of the small reference models in turn.
pub fn fleet(count: usize) -> Vec<Model> {
    let sizes = [6_171_877_376u64, 7_642_159_104, 14_126_854_144, 16_060_522_496, 17_658_814_464];
    let model = |index: usize| {
        let bytes = sizes[index % sizes.len()];
        let group = |stage: u32| Group {
            content: mix(10_000 + index as u64, u64::from(stage)),
            bytes: (bytes / 16).next_multiple_of(ALIGNMENT),
            stage,
        };
        let groups = (0..16).map(group).collect();
        Model {
            name: format!("m{index}"),
            groups,
            kv_bytes_per_token: 131_072,
            max_prompt: 8_192,
            pace: None,
        }
    };
    (0..count).map(model).collect()
}

/// Contents numbered densely, and each model's groups by number.
pub(crate) fn number_contents(models: &[Model]) -> (Vec<Vec<u32>>, usize) {
    let mut numbers: HashMap<u64, u32> = HashMap::new();
    let numbered = models.iter().map(|model| {
        let number = |group: &Group| {
            let next = numbers.len() as u32;
            *numbers.entry(group.content).or_insert(next)
        };
        model.groups.iter().map(number).collect()
    });
    let numbered: Vec<Vec<u32>> = numbered.collect();
    (numbered, numbers.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measured_pace_is_interpolated_and_shared_out() {
        let pace = Pace { prompts: vec![(1, 0.1), (100, 1.0), (200, 3.0)], stages: vec![0.0, 1.0, 2.0, 1.0] };
        for (tokens, seconds) in [(1, 0.1), (100, 1.0), (150, 2.0), (400, 6.0)] {
            assert!((pace.prefill_seconds(tokens) - seconds).abs() < 1e-12, "{tokens}");
        }
        let group = |content, stage| Group { content, bytes: ALIGNMENT, stage };
        let groups = vec![group(1, 0), group(2, 1), group(3, 1), group(4, 2)];
        let name = "m".to_owned();
        let model = Model { name, groups, kv_bytes_per_token: 1, max_prompt: 9, pace: Some(pace) };
        assert_eq!(model.compute_shares(), [0.0, 0.0, 0.25, 0.75]);
    }
    use std::collections::HashSet;

    #[test]
    fn reference_models_have_their_sizes() {
        let models = reference_models();
        assert_eq!(models.len(), 8);
        assert!(models[5].weight_bytes().abs_diff(41_109_135_360) < 100_000);
        let groups: usize = models.iter().map(|model| model.groups.len()).sum();
        assert!((700..1000).contains(&groups), "{groups} groups; the authors have 834");
        for model in &models {
            assert!((model.compute_shares().iter().sum::<f64>() - 1.0).abs() < 1e-9);
            let contents: HashSet<u64> = model.groups.iter().map(|group| group.content).collect();
            assert_eq!(contents.len(), model.groups.len());
            let merged = model.merged(40);
            assert_eq!(merged.weight_bytes(), model.weight_bytes());
            assert!((20..=40).contains(&merged.groups.len()), "{}", merged.groups.len());
            assert!((merged.compute_shares().iter().sum::<f64>() - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn a_family_shares_what_it_says() {
        let models = family(15, 16);
        let base: HashSet<u64> = models[0].groups.iter().map(|group| group.content).collect();
        let shared = |model: &Model| {
            let bytes =
                model.groups.iter().filter(|group| base.contains(&group.content)).map(|group| group.bytes);
            bytes.sum::<u64>() as f64 / model.weight_bytes() as f64
        };
        for model in &models[1..16] {
            assert!((0.58..0.97).contains(&shared(model)), "{}: {}", model.name, shared(model));
        }
        assert!(models[16..].iter().all(|model| shared(model) > 0.99));
        let unshared: Vec<Model> = models.iter().zip(0..).map(|(model, salt)| model.unshared(salt)).collect();
        let (_, contents) = number_contents(&unshared);
        assert_eq!(contents, models.iter().map(|model| model.groups.len()).sum::<usize>());
    }
}
