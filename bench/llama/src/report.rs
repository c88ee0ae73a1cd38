//! Collects measurements and prints them: medians, spread, ratios.

use serde_json::{Value, json};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// A prompt of so many tokens.
    Prefill(usize),
    /// A step of so many sequences.
    Decode(usize),
}

struct Row {
    file: String,
    cell: Cell,
    /// Tokens per second of every turn.
    ours: Vec<f64>,
    theirs: Vec<f64>,
    /// Bytes of weights that a step reads, and what the machine read per second between the turns.
    bandwidth: Option<(usize, Vec<f64>)>,
}

/// All measurements.
pub struct Report {
    threads: usize,
    rounds: usize,
    busy: usize,
    rows: Vec<Row>,
    perplexities: Vec<(String, Losses)>,
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The median over the turns of the ratio of the two neighbours, which a noisy machine disturbs alike.
fn ratio(a: &[f64], b: &[f64]) -> f64 {
    median(&a.iter().zip(b).map(|(a, b)| a / b).collect::<Vec<_>>())
}

fn extremes(values: &[f64]) -> (f64, f64) {
    values.iter().fold((f64::INFINITY, 0.0), |(low, high), &x| (low.min(x), high.max(x)))
}

/// What both engines make of a text: sums of −ln of the probabilities of its tokens.
#[derive(Clone, Debug, Default)]
pub struct Losses {
    tokens: usize,
    ours: f64,
    theirs: f64,
}

impl Losses {
    /// Adds the mean losses over `tokens` tokens.
    pub fn add(&mut self, tokens: usize, ours: f64, theirs: f64) {
        self.tokens += tokens;
        self.ours += ours * tokens as f64;
        self.theirs += theirs * tokens as f64;
    }

    /// Adds those of another text.
    pub fn merge(&mut self, other: &Losses) {
        self.tokens += other.tokens;
        self.ours += other.ours;
        self.theirs += other.theirs;
    }

    /// Ours and llama.cpp's.
    fn perplexities(&self) -> (f64, f64) {
        let tokens = self.tokens as f64;
        ((self.ours / tokens).exp(), (self.theirs / tokens).exp())
    }

    fn line(&self, what: &str) -> String {
        let (ours, theirs) = self.perplexities();
        let percent = (ours / theirs - 1.0) * 100.0;
        format!(
            "perplexity of {what}: {ours:.4}, llama.cpp {theirs:.4}, {percent:+.3} %, {} tokens",
            self.tokens
        )
    }
}

impl Report {
    /// An empty report.
    pub fn new(threads: usize, rounds: usize, busy: usize) -> Report {
        Report { threads, rounds, busy, rows: Vec::new(), perplexities: Vec::new() }
    }

    /// Adds the turns of a cell.
    pub fn cell(
        &mut self,
        file: &str,
        cell: Cell,
        ours: Vec<f64>,
        theirs: Vec<f64>,
        bandwidth: Option<(usize, Vec<f64>)>,
    ) {
        let row = Row { file: file.into(), cell, ours, theirs, bandwidth };
        eprintln!("{}", row.line());
        self.rows.push(row);
    }

    /// Adds the perplexities of a text.
    pub fn perplexity(&mut self, what: String, losses: Losses) {
        eprintln!("{}", losses.line(&what));
        self.perplexities.push((what, losses));
    }

    /// As a Markdown table.
    pub fn table(&self) -> String {
        let mut lines = vec![
            format!("{} threads, {} turns each, {} busy loops beside", self.threads, self.rounds, self.busy),
            String::new(),
            "| file | what | Tangram, tokens/s | llama.cpp, tokens/s | ratio | of the read bandwidth |"
                .into(),
            "|---|---|---|---|---|---|".into(),
        ];
        lines.extend(self.rows.iter().map(Row::line));
        lines.extend(self.perplexities.iter().map(|(what, losses)| format!("\n{}", losses.line(what))));
        lines.join("\n")
    }

    /// As JSON, every turn included.
    pub fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                json!({
                    "file": row.file,
                    "cell": row.name(),
                    "tangram_tokens_per_second": row.ours,
                    "llama_cpp_tokens_per_second": row.theirs,
                    "ratio": ratio(&row.ours, &row.theirs),
                    "step_bytes": row.bandwidth.as_ref().map(|(bytes, _)| bytes),
                    "read_bytes_per_second": row.bandwidth.as_ref().map(|(_, read)| read),
                })
            })
            .collect();
        let perplexities: Vec<Value> = self
            .perplexities
            .iter()
            .map(|(what, losses)| {
                let (ours, theirs) = losses.perplexities();
                json!({ "what": what, "tokens": losses.tokens, "tangram": ours, "llama_cpp": theirs })
            })
            .collect();
        json!({
            "threads": self.threads,
            "turns": self.rounds,
            "busy_loops": self.busy,
            "cells": rows,
            "perplexities": perplexities,
        })
    }
}

impl Row {
    fn name(&self) -> String {
        match self.cell {
            Cell::Prefill(tokens) => format!("prefill {tokens}"),
            Cell::Decode(batch) => format!("decode, batch {batch}"),
        }
    }

    fn line(&self) -> String {
        let spread = |values: &[f64]| {
            let (low, high) = extremes(values);
            format!("{:.1} ({low:.1}–{high:.1})", median(values))
        };
        let share = match &self.bandwidth {
            Some((bytes, read)) => {
                let used = *bytes as f64 * median(&self.ours);
                format!("{:.0} % of {:.1} GB/s", used / median(read) * 100.0, median(read) / 1e9)
            }
            None => String::new(),
        };
        let (ours, theirs) = (spread(&self.ours), spread(&self.theirs));
        let ratio = ratio(&self.ours, &self.theirs);
        format!("| {} | {} | {ours} | {theirs} | {ratio:.2} | {share} |", self.file, self.name())
    }
}
