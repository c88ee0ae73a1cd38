//! Graphs of kernels: their descriptions, and what was made of them to be launched.
//!
//! Stricter than the driver: each node must wait for the one added before it and for no other, so that there is one order.

use std::collections::BTreeMap;

use crate::streams::Work;

/// A node's name, and what it does.
type Node = (usize, Work);

/// The graphs of a context, by names that are no others.
#[derive(Default)]
pub(crate) struct Graphs {
    descriptions: BTreeMap<usize, Vec<Node>>,
    made: BTreeMap<usize, Vec<Node>>,
    next: usize,
}

impl Graphs {
    pub(crate) fn count(&self) -> usize {
        self.descriptions.len() + self.made.len()
    }

    fn new_name(&mut self) -> usize {
        self.next += 1;
        self.next
    }

    pub(crate) fn create(&mut self) -> usize {
        let name = self.new_name();
        self.descriptions.insert(name, Vec::new());
        name
    }

    /// Adds a node that waits for the nodes `before`, and gives its name; or what is wrong.
    pub(crate) fn add(&mut self, graph: usize, before: &[usize], work: Work) -> Result<usize, String> {
        let name = self.new_name();
        let Some(nodes) = self.descriptions.get_mut(&graph) else {
            return Err("a node is added to a graph that there is not".to_owned());
        };
        let expected: Vec<usize> = nodes.last().iter().map(|node| node.0).collect();
        if before != expected {
            return Err(format!("a node waits for {before:?} and not for the one before it, {expected:?}"));
        }
        nodes.push((name, work));
        Ok(name)
    }

    /// Makes what can be launched of a graph, which it does not need any more. `None` if there is no such graph.
    pub(crate) fn instantiate(&mut self, graph: usize) -> Option<usize> {
        let nodes = self.descriptions.get(&graph)?.clone();
        let name = self.new_name();
        self.made.insert(name, nodes);
        Some(name)
    }

    /// What a launch of it does, in order.
    pub(crate) fn launches(&self, exec: usize) -> Option<Vec<Work>> {
        let of_graph = |(_, work): &Node| match work.clone() {
            Work::Kernel { kernel, blocks, shared_bytes, arguments, .. } => {
                Work::Kernel { kernel, blocks, shared_bytes, arguments, graph: Some(exec) }
            }
            other => other,
        };
        Some(self.made.get(&exec)?.iter().map(of_graph).collect())
    }

    pub(crate) fn destroy(&mut self, graph: usize) -> bool {
        self.descriptions.remove(&graph).is_some()
    }

    pub(crate) fn destroy_exec(&mut self, exec: usize) -> bool {
        self.made.remove(&exec).is_some()
    }
}
