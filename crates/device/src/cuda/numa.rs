//! Host memory near a GPU: on machines with several nodes of memory, a copy from the far one is slower.

use rustix::thread::{CpuSet, sched_setaffinity};

/// Runs `allocate` on a thread that the system keeps on the processors of a node of memory, so that what it takes lies
/// there. Without a node, or where the system refuses, it runs anywhere.
pub(super) fn near<T: Send>(node: Option<u32>, allocate: impl FnOnce() -> T + Send) -> T {
    let list = node.and_then(|node| {
        std::fs::read_to_string(format!("/sys/devices/system/node/node{node}/cpulist")).ok()
    });
    let Some(processors) = list.as_deref().and_then(processors) else { return allocate() };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut set = CpuSet::new();
            processors.iter().filter(|&&cpu| cpu < CpuSet::MAX_CPU).for_each(|&cpu| set.set(cpu));
            // Slower copies are no reason to fail.
            let _ = sched_setaffinity(None, &set);
            allocate()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The processors of a list such as `0-3,8,10-11`. `None` for an empty or unreadable one.
fn processors(list: &str) -> Option<Vec<usize>> {
    let mut all = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        all.extend(first..=last.min(first + CpuSet::MAX_CPU));
    }
    (!all.is_empty()).then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_read() {
        assert_eq!(processors("0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(processors("5"), Some(vec![5]));
        for bad in ["", "\n", "a", "1-", "0-3,,4"] {
            assert_eq!(processors(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn what_runs_near_a_node_runs_whether_or_not_there_is_one() {
        assert_eq!([None, Some(0), Some(u32::MAX)].map(|node| near(node, || 7)), [7; 3]);
    }
}
