//! The order in which the parts of several loads are read: a pure state machine, one for each disk.
//!
//! What is more urgent goes first; within the same urgency the loads take turns, one part each, so that neither a large
//! load nor one that came first holds up another. The parts of one load keep their order. It never looks into a part.

use std::collections::VecDeque;

/// Who waits for a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Urgency {
    /// A request.
    Request,
    /// Nobody yet.
    Prefetch,
}

/// How many urgencies there are.
pub(crate) const URGENCIES: usize = 2;

/// Names a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LoadId(pub(crate) u64);

struct Turn<T> {
    load: LoadId,
    parts: VecDeque<T>,
}

/// Parts that wait for being read.
pub(crate) struct Schedule<T> {
    /// By urgency, the next load in front.
    turns: [VecDeque<Turn<T>>; URGENCIES],
}

impl<T> Default for Schedule<T> {
    fn default() -> Self {
        Schedule { turns: [VecDeque::new(), VecDeque::new()] }
    }
}

impl<T> Schedule<T> {
    /// Adds a load behind those of its urgency. A load that has parts here already is the caller's mistake: it then has
    /// two turns.
    pub(crate) fn push(&mut self, load: LoadId, urgency: Urgency, parts: VecDeque<T>) {
        if !parts.is_empty() {
            self.turns[urgency as usize].push_back(Turn { load, parts });
        }
    }

    /// Puts a part that was taken before in front of the others of its load, or of everything of its urgency.
    pub(crate) fn put_back(&mut self, load: LoadId, urgency: Urgency, part: T) {
        // It may have been taken before its load was hastened.
        match self.turns.iter_mut().flatten().find(|turn| turn.load == load) {
            Some(turn) => turn.parts.push_front(part),
            None => self.turns[urgency as usize].push_front(Turn { load, parts: [part].into() }),
        }
    }

    /// Takes the next part.
    pub(crate) fn next(&mut self) -> Option<(LoadId, Urgency, T)> {
        for (turns, urgency) in self.turns.iter_mut().zip([Urgency::Request, Urgency::Prefetch]) {
            let Some(mut turn) = turns.pop_front() else { continue };
            let part = turn.parts.pop_front();
            let load = turn.load;
            if !turn.parts.is_empty() {
                turns.push_back(turn);
            }
            if let Some(part) = part {
                return Some((load, urgency, part));
            }
        }
        None
    }

    /// How many reads may be under way on a disk that takes `depth` of them: half as many for prefetches alone, because a
    /// request waits behind what is under way when it comes.
    pub(crate) fn most_under_way(&self, depth: usize) -> usize {
        match self.turns[Urgency::Request as usize].is_empty() {
            true => depth.div_ceil(2),
            false => depth,
        }
    }

    /// What is left of a load is wanted by a request from now on.
    pub(crate) fn hasten(&mut self, load: LoadId) {
        let [request, prefetch] = &mut self.turns;
        let (hastened, others) = prefetch.drain(..).partition(|turn: &Turn<T>| turn.load == load);
        *prefetch = others;
        let hastened: VecDeque<Turn<T>> = hastened;
        request.extend(hastened);
    }

    /// Takes everything out.
    pub(crate) fn drain(&mut self) -> Vec<T> {
        self.turns.iter_mut().flat_map(|turns| turns.drain(..)).flat_map(|turn| turn.parts).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// A part: its load and its number in it.
    type Numbered = (u64, usize);

    #[derive(Clone, Debug)]
    enum Step {
        Push { parts: usize, prefetch: bool },
        Next,
        PutBack,
        Hasten(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            2 => (0usize..12, any::<bool>()).prop_map(|(parts, prefetch)| Step::Push { parts, prefetch }),
            8 => Just(Step::Next),
            1 => Just(Step::PutBack),
            1 => (0u64..10).prop_map(Step::Hasten),
        ];
        proptest::collection::vec(step, 1..150)
    }

    /// What is waiting, by load: its urgency and the numbers of its parts.
    #[derive(Default)]
    struct Model {
        waiting: HashMap<u64, (Urgency, VecDeque<usize>)>,
        /// Parts given to a load while each other one of the same urgency waited, since both were there.
        since: HashMap<(u64, u64), i64>,
    }

    impl Model {
        fn contenders(&self, urgency: Urgency) -> Vec<u64> {
            let of = |(&load, (u, parts)): (&u64, &(Urgency, VecDeque<usize>))| {
                (*u == urgency && !parts.is_empty()).then_some(load)
            };
            self.waiting.iter().filter_map(of).collect()
        }
    }

    proptest! {
        #[test]
        fn urgent_first_in_turn_and_in_order(steps in steps()) {
            let mut schedule = Schedule::<Numbered>::default();
            let mut model = Model::default();
            let mut loads = 0;
            let mut last = None;
            for step in steps {
                match step {
                    Step::Push { parts, prefetch } => {
                        let urgency = if prefetch { Urgency::Prefetch } else { Urgency::Request };
                        schedule.push(LoadId(loads), urgency, (0..parts).map(|part| (loads, part)).collect());
                        model.waiting.insert(loads, (urgency, (0..parts).collect()));
                        loads += 1;
                        last = None;
                    }
                    Step::Hasten(load) => {
                        schedule.hasten(LoadId(load));
                        if let Some((urgency, _)) = model.waiting.get_mut(&load) {
                            *urgency = Urgency::Request;
                        }
                        // Its turns among its new rivals are counted from here.
                        model.since.retain(|&(a, b), _| a != load && b != load);
                    }
                    Step::PutBack => {
                        if let Some((load, urgency, part)) = last.take() {
                            schedule.put_back(LoadId(load), urgency, (load, part));
                            let (now, parts) = model.waiting.get_mut(&load).unwrap();
                            if parts.is_empty() {
                                *now = urgency;
                            }
                            parts.push_front(part);
                            model.since.retain(|&(a, b), _| a != load && b != load);
                        }
                    }
                    Step::Next => {
                        let request = model.contenders(Urgency::Request);
                        let expected = if request.is_empty() { Urgency::Prefetch } else { Urgency::Request };
                        let contenders = model.contenders(expected);
                        let Some((LoadId(load), urgency, (of, part))) = schedule.next() else {
                            prop_assert!(contenders.is_empty(), "nothing that waits is forgotten");
                            continue;
                        };
                        prop_assert_eq!(urgency, expected, "the more urgent goes first");
                        prop_assert_eq!(load, of);
                        let front = model.waiting.get_mut(&load).and_then(|(_, parts)| parts.pop_front());
                        prop_assert_eq!(front, Some(part), "a load's parts keep their order");
                        for other in contenders.into_iter().filter(|&other| other != load) {
                            let ahead = model.since.entry((load, other)).or_insert(0);
                            *ahead += 1;
                            prop_assert!(*ahead <= 2, "{} was passed over", other);
                            model.since.insert((other, load), 0);
                        }
                        last = Some((load, urgency, part));
                    }
                }
            }
            let left: usize = model.waiting.values().map(|(_, parts)| parts.len()).sum();
            prop_assert_eq!(schedule.drain().len(), left, "no part is lost or doubled");
        }
    }

    #[test]
    fn prefetches_alone_keep_half_as_much_under_way() {
        let mut schedule = Schedule::default();
        schedule.push(LoadId(1), Urgency::Prefetch, [0, 1].into());
        assert_eq!((schedule.most_under_way(8), schedule.most_under_way(1)), (4, 1));
        schedule.push(LoadId(2), Urgency::Request, [0].into());
        assert_eq!(schedule.most_under_way(8), 8);
        assert_eq!(schedule.next().map(|(load, ..)| load), Some(LoadId(2)));
        assert_eq!(schedule.most_under_way(8), 4);
        schedule.hasten(LoadId(1));
        assert_eq!(schedule.most_under_way(8), 8);
    }

    #[test]
    fn loads_of_one_urgency_share_evenly() {
        let mut schedule = Schedule::default();
        for load in 0..16 {
            schedule.push(LoadId(load), Urgency::Prefetch, (0..8).collect());
        }
        schedule.push(LoadId(16), Urgency::Request, (0..3).collect());
        let order: Vec<u64> = std::iter::from_fn(|| schedule.next()).map(|(LoadId(load), ..)| load).collect();
        assert_eq!(order[..3], [16, 16, 16], "a request overtakes all prefetching");
        for round in order[3..].chunks(16) {
            let mut round = round.to_vec();
            round.sort_unstable();
            assert_eq!(round, (0..16).collect::<Vec<_>>());
        }
    }
}
