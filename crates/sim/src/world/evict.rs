//! What goes when room is needed: the baselines' orders, and ours by asking the economy.

use std::rc::Rc;

use tangram_policy::stall::{Stage, suffix_stalls};

use super::{HALF_LIFE_SECONDS, World};
use crate::mckp::{Choice, cover};
use crate::system::{Keep, System};
use crate::trace::seconds;

impl System {
    /// Order of last uses within one forward pass.
    pub(super) fn order_in_pass(&self, index: u64) -> u64 {
        match self.keep {
            Keep::Groups { tail_first: true } => 0xFFFF - index,
            _ => index,
        }
    }
}

impl World<'_> {
    /// Frees `needed` bytes on device `d` for `model`, whose own groups are held. Gives the bytes evicted.
    pub(super) fn make_room(&mut self, d: usize, model: u32, needed: u64) -> u64 {
        let shortage = needed.saturating_sub(self.devices[d].free_bytes());
        if shortage == 0 {
            return 0;
        }
        match self.system.keep {
            Keep::Nothing | Keep::LastModel => 0,
            Keep::Worth(_) => {
                let victims = self.economies[d].victims(&self.devices[d], shortage);
                self.evict_all(d, &victims)
            }
            Keep::WholeModels => self.evict_whole_models(d, model, shortage),
            Keep::Groups { .. } => self.evict_by(d, shortage, |world, slot| {
                (world.devices[d].slots[slot as usize].last_use as f64, slot)
            }),
            Keep::PublishedValue => {
                let total: u64 = self.models.iter().map(|known| known.uses).sum();
                self.evict_by(d, shortage, |world, slot| {
                    let entry = &world.devices[d].slots[slot as usize];
                    let probability = world.models[entry.loader as usize].uses as f64 / total.max(1) as f64;
                    (entry.bytes as f64 / world.scenario.profile.link.bytes_per_second * probability, slot)
                })
            }
            Keep::PrefixMckp => {
                let victims = match self.cheapest_suffixes(d, model, shortage) {
                    Some((victims, _)) => victims,
                    None => self.devices[d].idle_slots().collect(),
                };
                self.evict_all(d, &victims)
            }
        }
    }

    /// Everything that is not of `model` goes, and for a system that keeps nothing that too.
    pub(super) fn clear(&mut self, d: usize, model: u32) {
        let keep = self.system.keep == Keep::LastModel;
        let own: Vec<u32> =
            if keep { self.devices[d].slots_of(model).unwrap_or_default().to_vec() } else { Vec::new() };
        let victims: Vec<u32> = self.devices[d].idle_slots().filter(|slot| !own.contains(slot)).collect();
        self.totals.evicted_bytes += self.evict_all(d, &victims);
    }

    pub(super) fn evict_all(&mut self, d: usize, victims: &[u32]) -> u64 {
        let mut bytes = 0;
        for &victim in victims {
            bytes += self.devices[d].evict(victim);
            self.leave(d, victim);
            if let Some(economy) = self.economies.get_mut(d) {
                economy.evicted(victim);
            }
        }
        bytes
    }

    fn evict_by(&mut self, d: usize, shortage: u64, value: impl Fn(&World<'_>, u32) -> (f64, u32)) -> u64 {
        let mut order: Vec<(f64, u32)> = self.devices[d].idle_slots().map(|slot| value(self, slot)).collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mut freed = 0;
        for (_, slot) in order {
            if freed >= shortage {
                break;
            }
            freed += self.devices[d].evict(slot);
        }
        freed
    }

    fn evict_whole_models(&mut self, d: usize, model: u32, shortage: u64) -> u64 {
        let mut freed = 0;
        let others: Vec<u32> = self.devices[d].models().filter(|&other| other != model).collect();
        for other in others {
            if freed >= shortage {
                break;
            }
            let slots = self.devices[d].slots_of(other).unwrap_or_default().iter().copied();
            let victims: Vec<u32> = slots
                .filter(|&slot| {
                    let slot = &self.devices[d].slots[slot as usize];
                    slot.resident && slot.holders == 0
                })
                .collect();
            freed += self.evict_all(d, &victims);
        }
        freed
    }

    /// LayerWeave's choice of suffixes to give up on device `d`, and its cost in expected seconds of stall; `None` if
    /// everything is too little.
    pub(super) fn cheapest_suffixes(
        &mut self,
        d: usize,
        model: u32,
        shortage: u64,
    ) -> Option<(Vec<u32>, f64)> {
        let now = seconds(self.now);
        let demand = |world: &World<'_>, model: u32| {
            let known = &world.models[model as usize];
            known.demand * ((known.demand_at - now) / HALF_LIFE_SECONDS).exp2()
        };
        let total: f64 = (0..self.models.len() as u32).map(|model| demand(self, model)).sum();
        let others: Vec<u32> = self.devices[d].models().filter(|&other| other != model).collect();
        let mut classes = Vec::new();
        let mut prefixes = Vec::new();
        for other in others {
            let resident: Vec<u32> = {
                let device = &self.devices[d];
                let slots = device.slots_of(other).unwrap_or_default().iter().copied();
                slots.take_while(|&slot| device.slots[slot as usize].resident).collect()
            };
            if resident.is_empty() {
                continue;
            }
            let probability = demand(self, other) / total.max(f64::MIN_POSITIVE);
            let stalls = self.stalls_of(other);
            let mut freed = 0;
            let mut class = vec![Choice { freed: 0, cost: 0.0 }];
            for left in (0..resident.len()).rev() {
                freed += self.devices[d].slots[resident[left] as usize].bytes;
                class.push(Choice { freed, cost: probability * (stalls[left] - stalls[resident.len()]) });
            }
            classes.push(class);
            prefixes.push(resident);
        }
        let (picks, cost) = cover(&classes, shortage)?;
        let victims =
            prefixes.iter().zip(picks).flat_map(|(prefix, pick)| prefix[prefix.len() - pick..].to_vec());
        Some((victims.collect(), cost))
    }

    /// Stall of each resident prefix of the model for its median prompt of late.
    fn stalls_of(&mut self, model: u32) -> Rc<Vec<f64>> {
        let known = &self.models[model as usize];
        let mut lengths: Vec<u64> = known.lengths.iter().copied().collect();
        lengths.sort_unstable();
        let median = lengths.get(lengths.len() / 2).copied().unwrap_or(1);
        // Four buckets per doubling.
        let bucket = ((median.max(1) as f64).log2() * 4.0).round() as u32;
        let profile = &self.scenario.profile;
        let table = self.stalls.entry((model, bucket)).or_insert_with(|| {
            let compute = known.prefill_seconds(profile, (f64::from(bucket) / 4.0).exp2() as u64);
            let stage = |(&(_, bytes), share): (&(u32, u64), &f64)| Stage {
                load_seconds: profile.link.seconds(bytes, 1),
                compute_seconds: share * compute,
            };
            let stages: Vec<Stage> = known.groups.iter().zip(&known.shares).map(stage).collect();
            Rc::new(suffix_stalls(&stages))
        });
        table.clone()
    }
}
