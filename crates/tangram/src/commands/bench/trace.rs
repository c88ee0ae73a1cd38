//! Request traces: reading them, and deciding which deployed model answers for which model of the trace. Pure.

use std::collections::BTreeMap;

use anyhow::{Context, anyhow, bail};

/// One request of a trace.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TraceRequest {
    /// Seconds since the start of the trace.
    pub(super) arrival_s: f64,
    /// The trace's own id of the model.
    pub(super) model: String,
    /// Prompt length in tokens.
    pub(super) input_tokens: usize,
    /// Answer length in tokens.
    pub(super) output_tokens: usize,
}

const COLUMNS: [&str; 4] = ["arrival_s", "model", "input_tokens", "output_tokens"];

/// Reads a CSV whose header names the columns `arrival_s,model,input_tokens,output_tokens`, in any order and possibly
/// among others. The requests come back in order of arrival.
///
/// # Errors
/// Names the line and what is wrong with it.
pub(super) fn parse(text: &str) -> anyhow::Result<Vec<TraceRequest>> {
    let mut lines = (1..).zip(text.lines());
    let (_, header) = lines.next().context("the file is empty")?;
    let header: Vec<&str> = header.split(',').map(str::trim).collect();
    let mut columns = [0; COLUMNS.len()];
    for (column, name) in columns.iter_mut().zip(COLUMNS) {
        *column = header.iter().position(|title| *title == name).with_context(|| {
            format!("line 1: the header has no column '{name}' (it needs {})", COLUMNS.join(","))
        })?;
    }
    let mut requests = Vec::new();
    for (number, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
        let cells: Vec<&str> = line.split(',').map(str::trim).collect();
        requests.push(request(&cells, columns).with_context(|| format!("line {number}"))?);
    }
    requests.sort_by(|a, b| a.arrival_s.total_cmp(&b.arrival_s));
    Ok(requests)
}

fn request(cells: &[&str], columns: [usize; 4]) -> anyhow::Result<TraceRequest> {
    let cell = |index: usize| {
        let cell = columns.get(index).and_then(|&column| cells.get(column)).copied();
        cell.filter(|cell| !cell.is_empty()).with_context(|| format!("no value for '{}'", COLUMNS[index]))
    };
    let arrival = cell(0)?;
    let arrival_s = arrival.parse().ok().filter(|seconds: &f64| seconds.is_finite() && *seconds >= 0.0);
    let tokens = |index: usize| {
        let text = cell(index)?;
        text.parse().map_err(|_| anyhow!("'{}' is {text:?}, not a number of tokens", COLUMNS[index]))
    };
    Ok(TraceRequest {
        arrival_s: arrival_s
            .with_context(|| format!("'arrival_s' is {arrival:?}, not a number of seconds"))?,
        model: cell(1)?.to_owned(),
        input_tokens: tokens(2)?,
        output_tokens: tokens(3)?,
    })
}

/// Reads one `ID=NAME` of `--map`.
pub(super) fn parse_mapping(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((id, name)) if !id.is_empty() && !name.is_empty() => Ok((id.to_owned(), name.to_owned())),
        _ => Err(format!("{text:?} is not of the form ID=NAME")),
    }
}

/// Says which deployed model stands for each model id of the requests: as `mapping` says, or, if that is empty, the
/// ids in order of first appearance take the models in order of their names.
///
/// # Errors
/// When there are too few models, an id has no model, or a mapped name is not among `deployed`.
pub(super) fn assign(
    requests: &[TraceRequest],
    mapping: &[(String, String)],
    deployed: &[&str],
) -> anyhow::Result<BTreeMap<String, String>> {
    let mut ids: Vec<&str> = Vec::new();
    for request in requests {
        if !ids.contains(&request.model.as_str()) {
            ids.push(&request.model);
        }
    }
    if mapping.is_empty() {
        let mut names = deployed.to_vec();
        names.sort_unstable();
        if names.len() < ids.len() {
            bail!(
                "the trace has {} models but {} that generate text are deployed ({}); deploy more, \
                 or map several ids to one model with --map ID=NAME,...",
                ids.len(),
                names.len(),
                names.join(", ")
            );
        }
        return Ok(ids.iter().zip(names).map(|(id, name)| ((*id).to_owned(), name.to_owned())).collect());
    }
    let mapping: BTreeMap<&str, &str> =
        mapping.iter().map(|(id, name)| (id.as_str(), name.as_str())).collect();
    let of_id = |id: &str| {
        let name =
            *mapping.get(id).with_context(|| format!("--map says nothing for the trace's model '{id}'"))?;
        if !deployed.contains(&name) {
            bail!("--map {id}={name}: no model '{name}' that generates text is deployed");
        }
        Ok((id.to_owned(), name.to_owned()))
    };
    ids.into_iter().map(of_id).collect()
}

/// Prompt and answer lengths that fit into a model's context: at least one token each; the prompt gives way first.
pub(super) fn fit(input_tokens: usize, output_tokens: usize, context: usize) -> (usize, usize) {
    let output = output_tokens.clamp(1, context.saturating_sub(1).max(1));
    let input = input_tokens.clamp(1, context.saturating_sub(output).max(1));
    (input, output)
}

/// A prompt of token ids 3 to 249, which every vocabulary worth measuring has, the same for the same `seed`. The
/// generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
pub(super) fn prompt(seed: u64, tokens: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0xD134_2543_DE82_EF95);
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    (0..tokens).map(|_| 3 + (next() % 247) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(arrival_s: f64, model: &str, input_tokens: usize, output_tokens: usize) -> TraceRequest {
        TraceRequest { arrival_s, model: model.to_owned(), input_tokens, output_tokens }
    }

    #[test]
    fn columns_are_found_by_name_and_requests_sorted() {
        let text = "arrival_s,model,input_tokens,output_tokens\n0.5,6,50,16\r\n\n0.25,a,7,0\n";
        assert_eq!(parse(text).unwrap(), [request(0.25, "a", 7, 0), request(0.5, "6", 50, 16)]);
        let text = "model,x,output_tokens,arrival_s,input_tokens\n6,?,16,0.5,50";
        assert_eq!(parse(text).unwrap(), [request(0.5, "6", 50, 16)]);
    }

    #[test]
    fn mistakes_name_their_line() {
        for (text, words) in [
            ("", "empty"),
            ("arrival_s,model,input_tokens\n", "line 1: the header has no column 'output_tokens'"),
            (
                "arrival_s,model,input_tokens,output_tokens\n0,1,2,3\n0,1,2\n",
                "line 3: no value for 'output_tokens'",
            ),
            (
                "arrival_s,model,input_tokens,output_tokens\n0,1,2,3\n\n0,1,x,3\n",
                "line 4: 'input_tokens' is \"x\"",
            ),
            ("arrival_s,model,input_tokens,output_tokens\n0,1,-2,3\n", "line 2: 'input_tokens'"),
            ("arrival_s,model,input_tokens,output_tokens\nNaN,1,2,3\n", "line 2: 'arrival_s' is \"NaN\""),
            ("arrival_s,model,input_tokens,output_tokens\n-1,1,2,3\n", "line 2: 'arrival_s'"),
            ("arrival_s,model,input_tokens,output_tokens\n1,,2,3\n", "line 2: no value for 'model'"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn ids_take_models_in_order_or_as_mapped() {
        let requests = [request(0.0, "7", 1, 1), request(0.0, "3", 1, 1), request(0.0, "7", 1, 1)];
        let of = |mapping: &[(String, String)], deployed: &[&str]| {
            assign(&requests, mapping, deployed).map_err(|error| error.to_string())
        };
        let pairs = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            pairs.iter().map(|(id, name)| ((*id).to_owned(), (*name).to_owned())).collect()
        };
        assert_eq!(
            of(&[], &["b", "c", "a"]).unwrap(),
            pairs(&[("7", "a"), ("3", "b")]).into_iter().collect()
        );
        assert!(of(&[], &["a"]).unwrap_err().contains("the trace has 2 models but 1"));
        let both = pairs(&[("3", "a"), ("7", "a"), ("9", "gone")]);
        assert_eq!(of(&both, &["a"]).unwrap(), pairs(&[("3", "a"), ("7", "a")]).into_iter().collect());
        assert!(of(&both, &["b"]).unwrap_err().contains("no model 'a'"));
        assert!(of(&pairs(&[("3", "a")]), &["a"]).unwrap_err().contains("model '7'"));
    }

    #[test]
    fn mappings() {
        assert_eq!(parse_mapping("0=org/name:1").unwrap(), ("0".to_owned(), "org/name:1".to_owned()));
        for wrong in ["0", "=a", "0=", ""] {
            assert!(parse_mapping(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn lengths_fit_the_context() {
        assert_eq!(fit(10, 20, 100), (10, 20));
        assert_eq!(fit(90, 20, 100), (80, 20));
        assert_eq!(fit(90, 200, 100), (1, 99));
        assert_eq!(fit(0, 0, 100), (1, 1));
    }

    #[test]
    fn prompts_repeat_and_stay_in_range() {
        let long = prompt(7, 10_000);
        assert_eq!(long, prompt(7, 10_000));
        assert_ne!(prompt(8, 100), long[..100]);
        assert_eq!((long.iter().min(), long.iter().max()), (Some(&3), Some(&249)));
    }
}
