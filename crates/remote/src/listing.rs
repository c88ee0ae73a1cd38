//! Which files of a source make up a checkpoint: chosen from a listing, or asked for by name where there is none. Pure.

use std::collections::BTreeSet;

use serde_json::Value;

/// The index of a checkpoint in several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// A checkpoint in one file.
pub(crate) const WHOLE: &str = "model.safetensors";
/// The one file that every checkpoint in the Hugging Face layout has.
pub(crate) const CONFIG: &str = "config.json";

/// Files beside the weights that say more about a model. Where there is no listing all of them are asked for.
pub(crate) const ASSETS: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "quantize_config.json",
];

/// What a listing holds.
#[derive(Debug, PartialEq)]
pub(crate) enum Chosen {
    /// These files; weights last.
    Files(Vec<String>),
    /// The index has to be read to know which files; these beside them.
    Indexed(Vec<String>),
}

/// Chooses from the names in a source (relative, `/` between folders). The error says what to do.
pub(crate) fn choose<'a>(names: impl Iterator<Item = &'a str>) -> Result<Chosen, String> {
    let names: BTreeSet<&str> = names.filter(|name| is_plain(name)).collect();
    let top = |extension: &'static str| {
        names.iter().copied().filter(move |name| !name.contains('/') && name.ends_with(extension))
    };
    if !names.contains(CONFIG) {
        let found: Vec<&str> = top(".gguf").collect();
        return match found.as_slice() {
            [file] => Ok(Chosen::Files(vec![(*file).to_owned()])),
            [] => Err("holds neither a config.json with safetensors nor a .gguf file".to_owned()),
            many => Err(format!(
                "holds {} .gguf files; name the one that you want: {}",
                many.len(),
                many.join(", ")
            )),
        };
    }
    let mut files = vec![CONFIG.to_owned()];
    files.extend(ASSETS.iter().filter(|asset| names.contains(*asset)).map(|asset| (*asset).to_owned()));
    if names.contains(WHOLE) {
        files.push(WHOLE.to_owned());
    } else if names.contains(INDEX) {
        files.push(INDEX.to_owned());
        return Ok(Chosen::Indexed(files));
    } else {
        let before = files.len();
        files.extend(top(".safetensors").map(str::to_owned));
        if files.len() == before {
            return Err("has a config.json but no .safetensors file".to_owned());
        }
    }
    Ok(Chosen::Files(files))
}

/// The files that an index names. The error is about the index.
pub(crate) fn shards(index: &[u8]) -> Result<Vec<String>, String> {
    let index: Value = serde_json::from_slice(index).map_err(|_| format!("{INDEX} is not valid JSON"))?;
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| format!("{INDEX} has no weight_map object"))?;
    let mut files = BTreeSet::new();
    for file in map.values() {
        let name = file.as_str().filter(|name| is_plain(name) && !name.contains('/'));
        files.insert(name.ok_or_else(|| format!("{INDEX} names something that is not a file beside it"))?);
    }
    if files.is_empty() {
        return Err(format!("{INDEX} names no file"));
    }
    Ok(files.into_iter().map(str::to_owned).collect())
}

/// Whether a name from outside can be used below a directory of ours.
pub(crate) fn is_plain(name: &str) -> bool {
    let usable = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && part.len() <= 200
            && !part.contains(['\\', ':'])
            && !part.contains(char::is_control)
    };
    name.split('/').count() <= 2 && name.split('/').all(usable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str]) -> Vec<String> {
        match choose(names.iter().copied()) {
            Ok(Chosen::Files(files)) => files,
            Ok(Chosen::Indexed(mut files)) => {
                files.push("...".into());
                files
            }
            Err(problem) => vec![problem],
        }
    }

    #[test]
    fn weights_that_are_there_in_two_forms_come_once() {
        assert_eq!(
            chosen(&[
                "README.md",
                "config.json",
                "model.safetensors",
                "pytorch_model.bin",
                "onnx/model.onnx"
            ]),
            ["config.json", "model.safetensors"]
        );
        assert_eq!(
            chosen(&[
                "config.json",
                "consolidated.safetensors",
                "model.safetensors.index.json",
                "tokenizer.json"
            ]),
            ["config.json", "tokenizer.json", "model.safetensors.index.json", "..."]
        );
        assert_eq!(chosen(&["a-Q4.gguf", "README.md"]), ["a-Q4.gguf"]);
        assert!(chosen(&["a.gguf", "b.gguf"])[0].contains("a.gguf, b.gguf"));
        assert!(chosen(&["config.json", "x.bin"])[0].contains("no .safetensors"));
        assert!(chosen(&[])[0].contains("neither"));
    }

    #[test]
    fn an_index_leads_nowhere_else() {
        let index =
            |file: &str| format!(r#"{{"weight_map": {{"a": "{file}", "b": "{file}"}}}}"#).into_bytes();
        assert_eq!(shards(&index("model-00001-of-00002.safetensors")).unwrap().len(), 1);
        for file in ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", "C:x", "a\\\\b"] {
            assert!(shards(&index(file)).is_err(), "{file}");
        }
        assert!(shards(b"{}").is_err() && shards(b"x").is_err() && shards(br#"{"weight_map":{}}"#).is_err());
    }
}
