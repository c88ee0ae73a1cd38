//! Requests, and reading them from the traces that are in use: our CSV, Azure's CSV, Mooncake's JSON lines.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::rng::{Rng, Weighted};

/// Nanoseconds of simulated time.
pub type Nanos = u64;

/// One second.
pub const SECOND: Nanos = 1_000_000_000;

/// Simulated time from seconds.
pub(crate) fn nanos(seconds: f64) -> Nanos {
    (seconds * SECOND as f64).round() as Nanos
}

/// Seconds from simulated time.
pub(crate) fn seconds(nanos: Nanos) -> f64 {
    nanos as f64 / SECOND as f64
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// When it arrives.
    pub arrival: Nanos,
    /// Index of its model.
    pub model: u32,
    /// Prompt length in tokens.
    pub prompt: u64,
    /// Answer length in tokens, at least 1.
    pub output: u64,
}

/// Why a trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// A line is not what it should be.
    #[error("line {line}: {what}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
    /// The trace names more models than there are.
    #[error("the trace has {found} models, but only {known} are simulated")]
    Models {
        /// Models in the trace.
        found: usize,
        /// Models of the run.
        known: usize,
    },
    /// There is nothing in it.
    #[error("the trace has no requests")]
    Empty,
}

/// Reads a trace in whichever of the formats its first line shows, at most `limit` requests, in order of arrival; the
/// first arrives at 0. `scale` multiplies the times. Formats without a model column draw models from a Zipf
/// distribution (exponent 1) with `seed`. Model ids that are numbers below `models` are taken as they are; if any is
/// not, all ids are numbered in order of first appearance.
///
/// # Errors
/// [`TraceError`].
pub fn parse(
    text: &str,
    models: usize,
    limit: usize,
    scale: f64,
    seed: u64,
) -> Result<Vec<Request>, TraceError> {
    let first = text.lines().next().unwrap_or("").trim();
    let mut lines = if first.starts_with('{') {
        mooncake(text)?
    } else if first.starts_with("TIMESTAMP") {
        azure(text)?
    } else {
        csv(text, first)?
    };
    lines.sort_by(|a, b| a.arrival.total_cmp(&b.arrival));
    lines.truncate(limit);
    let start = lines.first().ok_or(TraceError::Empty)?.arrival;
    let number = numbering(&lines, models)?;
    let (mut rng, zipf) = (Rng::new(seed), Weighted::zipf(models, 1.0));
    let request = |line: &Line| Request {
        arrival: nanos((line.arrival - start) * scale),
        model: match &line.model {
            Some(id) => number.get(id.as_str()).copied().unwrap_or(0),
            None => zipf.draw(&mut rng) as u32,
        },
        prompt: line.prompt.max(1),
        output: line.output.max(1),
    };
    Ok(lines.iter().map(request).collect())
}

struct Line {
    arrival: f64,
    model: Option<String>,
    prompt: u64,
    output: u64,
}

fn numbering(lines: &[Line], models: usize) -> Result<BTreeMap<&str, u32>, TraceError> {
    let ids = || lines.iter().filter_map(|line| line.model.as_deref());
    let as_number = |id: &str| id.parse().ok().filter(|&number: &u32| (number as usize) < models);
    if ids().all(|id| as_number(id).is_some()) {
        return Ok(ids().filter_map(|id| Some((id, as_number(id)?))).collect());
    }
    let mut number = BTreeMap::new();
    for id in ids() {
        let next = number.len() as u32;
        number.entry(id).or_insert(next);
    }
    if number.len() > models {
        return Err(TraceError::Models { found: number.len(), known: models });
    }
    Ok(number)
}

fn wrong(line: usize, what: impl Into<String>) -> TraceError {
    TraceError::Line { line, what: what.into() }
}

fn csv(text: &str, header: &str) -> Result<Vec<Line>, TraceError> {
    let titles: Vec<&str> = header.split(',').map(str::trim).collect();
    let column = |name: &str| {
        let found = titles.iter().position(|title| *title == name);
        found.ok_or_else(|| wrong(1, format!("the header has no column '{name}'")))
    };
    let columns = [column("arrival_s")?, column("model")?, column("input_tokens")?, column("output_tokens")?];
    let mut lines = Vec::new();
    for (number, row) in (2..).zip(text.lines().skip(1)).filter(|(_, row)| !row.trim().is_empty()) {
        let cells: Vec<&str> = row.split(',').map(str::trim).collect();
        let cell = |index: usize| {
            cells
                .get(columns[index])
                .copied()
                .ok_or_else(|| wrong(number, format!("only {} columns", cells.len())))
        };
        let arrival = cell(0)?.parse().ok().filter(|at: &f64| at.is_finite() && *at >= 0.0);
        let tokens = |index: usize| {
            let text = cell(index)?;
            text.parse().map_err(|_| wrong(number, format!("{text:?} is not a number of tokens")))
        };
        lines.push(Line {
            arrival: arrival.ok_or_else(|| wrong(number, "the arrival is not a number of seconds"))?,
            model: Some(cell(1)?.to_owned()),
            prompt: tokens(2)?,
            output: tokens(3)?,
        });
    }
    Ok(lines)
}

fn azure(text: &str) -> Result<Vec<Line>, TraceError> {
    let mut lines = Vec::new();
    for (number, row) in (2..).zip(text.lines().skip(1)).filter(|(_, row)| !row.trim().is_empty()) {
        let mut cells = row.split(',').map(str::trim);
        let arrival = cells.next().and_then(instant).ok_or_else(|| wrong(number, "no time stamp"))?;
        let mut tokens = || {
            let cell = cells.next().and_then(|cell| cell.parse().ok());
            cell.ok_or_else(|| wrong(number, "not a number of tokens"))
        };
        lines.push(Line { arrival, model: None, prompt: tokens()?, output: tokens()? });
    }
    Ok(lines)
}

/// Seconds since some moment of `2023-11-16 18:17:03.9799600`.
fn instant(text: &str) -> Option<f64> {
    let (date, time) = text.split_once(' ')?;
    let numbers = |text: &str, by: char| -> Option<[f64; 3]> {
        let parsed: Option<Vec<f64>> = text.split(by).map(|part| part.parse().ok()).collect();
        parsed?.try_into().ok()
    };
    let [year, month, day] = numbers(date, '-')?;
    let [hour, minute, second] = numbers(time, ':')?;
    // Days since March of year 0 (Hinnant's days_from_civil, without the eras).
    let (year, month) = if month <= 2.0 { (year - 1.0, month + 9.0) } else { (year, month - 3.0) };
    let leap = (year / 4.0).floor() - (year / 100.0).floor() + (year / 400.0).floor();
    let days = year * 365.0 + leap + ((153.0 * month + 2.0) / 5.0).floor() + day;
    Some(((days * 24.0 + hour) * 60.0 + minute) * 60.0 + second)
}

fn mooncake(text: &str) -> Result<Vec<Line>, TraceError> {
    /// A line of the file; times are in milliseconds.
    #[derive(Deserialize)]
    struct Row {
        timestamp: f64,
        input_length: u64,
        output_length: u64,
    }
    let mut lines = Vec::new();
    for (number, row) in (1..).zip(text.lines()).filter(|(_, row)| !row.trim().is_empty()) {
        let row: Row = serde_json::from_str(row).map_err(|error| wrong(number, error.to_string()))?;
        lines.push(Line {
            arrival: row.timestamp / 1000.0,
            model: None,
            prompt: row.input_length,
            output: row.output_length,
        });
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_csv() {
        let text = "arrival_s,model,input_tokens,output_tokens\n0.5,6,50,16\n\n0.25,1,7,0\n";
        let requests = parse(text, 8, 10, 100.0, 0).unwrap();
        assert_eq!(requests[0], Request { arrival: 0, model: 1, prompt: 7, output: 1 });
        assert_eq!(requests[1], Request { arrival: 25 * SECOND, model: 6, prompt: 50, output: 16 });
        assert_eq!(
            parse(text, 2, 10, 1.0, 0).unwrap()[1].model,
            1,
            "ids too large are numbered by appearance"
        );
        assert_eq!(parse(text, 8, 1, 1.0, 0).unwrap().len(), 1);
        let message = |text, models| parse(text, models, 10, 1.0, 0).unwrap_err().to_string();
        assert!(message(text, 1).contains("2 models"));
        assert!(message("", 1).contains("arrival_s"));
        assert!(message("arrival_s,model,input_tokens,output_tokens\n", 1).contains("no requests"));
        assert!(message("arrival_s,model,input_tokens,output_tokens\n0,1,2", 1).contains("line 2"));
        assert!(message("arrival_s,model,input_tokens,output_tokens\nNaN,1,2,3", 1).contains("line 2"));
    }

    #[test]
    fn azure_and_mooncake() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-30 23:59:59.5000000,48,10\n\
                    2023-12-01 00:00:01.0000000,31,8\n";
        let requests = parse(text, 4, 10, 1.0, 3).unwrap();
        assert_eq!((requests[1].arrival, requests[1].prompt, requests[1].output), (SECOND * 3 / 2, 31, 8));
        let text = "{\"timestamp\": 100, \"input_length\": 6, \"output_length\": 5, \"hash_ids\": [0]}\n\
                    {\"timestamp\": 350, \"input_length\": 7, \"output_length\": 4}\n";
        let requests = parse(text, 4, 10, 1.0, 3).unwrap();
        assert_eq!((requests[1].arrival, requests[1].prompt), (SECOND / 4, 7));
        assert!(parse("{\"timestamp\": 1}", 4, 10, 1.0, 3).unwrap_err().to_string().contains("line 1"));
    }

    #[test]
    fn the_shared_traces() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/traces");
        if !folder.exists() {
            println!("skipped: the traces are not here");
            return;
        }
        for (file, count) in [
            ("servegen8.csv", 20_000),
            ("AzureLLMInferenceTrace_code.csv", 8_818),
            ("AzureLLMInferenceTrace_conv.csv", 19_365),
            ("mooncake_conversation_4000.jsonl", 4_000),
        ] {
            let text = std::fs::read_to_string(folder.join(file)).unwrap();
            let found = parse(&text, 8, usize::MAX, 1.0, 1).unwrap().len();
            assert!(found.abs_diff(count) <= 1, "{file}: {found}");
        }
    }
}
