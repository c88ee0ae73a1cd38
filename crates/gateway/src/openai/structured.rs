//! What a request says about the form of its output: OpenAI's `response_format`, vLLM's `structured_outputs` and its
//! older `guided_*` fields.

use std::sync::Arc;

use serde_json::Value as Json;
use tangram_node::{CompiledGrammar, DeployedModel, Grammar};

use super::error::ApiError;
use super::fields::Fields;
use crate::text::TextTokenizer;

/// Most texts that a choice may be between.
const MAX_CHOICES: usize = 10_000;

/// A grammar and the parameter that it came with, for errors.
#[derive(Debug, PartialEq)]
pub(crate) struct Wanted {
    pub(crate) grammar: Grammar,
    pub(crate) param: String,
}

impl Wanted {
    pub(crate) fn new(param: &str, grammar: Grammar) -> Self {
        Wanted { grammar, param: param.to_owned() }
    }

    /// Reads the request; `None` if the output is free.
    pub(crate) fn read(fields: &Fields<'_>) -> Result<Option<Self>, ApiError> {
        let mut wanted = Vec::new();
        if let Some(format) = fields.object("response_format")? {
            wanted.extend(read_response_format(&format)?);
        }
        if let Some(structured) = fields.object("structured_outputs")? {
            let path = |name: &str| format!("structured_outputs.{name}");
            for kind in ["json", "regex", "choice", "grammar"] {
                wanted.extend(read_kind(&structured, kind, kind, &path(kind))?);
            }
            if structured.boolean("json_object", false)? {
                wanted.push(Wanted::new(&path("json_object"), Grammar::json_object()));
            }
            if structured.raw("structural_tag").is_some() {
                let message = "'structured_outputs.structural_tag' is not supported";
                return Err(ApiError::unsupported("structured_outputs", message));
            }
        }
        for kind in ["json", "regex", "choice", "grammar"] {
            let name = format!("guided_{kind}");
            wanted.extend(read_kind(fields, kind, &name, &name)?);
        }
        if let [first, second, ..] = wanted.as_slice() {
            let message = format!("'{}' and '{}' cannot both be given", first.param, second.param);
            return Err(ApiError::param(&second.param, message));
        }
        Ok(wanted.pop())
    }

    /// Compiles the grammar over the model's vocabulary, on a thread that may block.
    pub(crate) async fn compile(
        self,
        model: &DeployedModel,
        tokenizer: Option<&Arc<TextTokenizer>>,
    ) -> Result<CompiledGrammar, ApiError> {
        let Wanted { grammar, param } = self;
        let Some(tokenizer) = tokenizer.cloned() else {
            let message = format!("The model `{}` has no tokenizer, so '{param}' has no meaning", model.name);
            return Err(ApiError::param(&param, message));
        };
        let compile = move || tokenizer.vocabulary()?.compile(&grammar);
        let compiled = tokio::task::spawn_blocking(compile).await;
        let compiled = compiled.map_err(|_| ApiError::internal("compiling the grammar failed"))?;
        compiled.map_err(|error| ApiError::param(&param, format!("'{param}' cannot be used: {error}")))
    }
}

fn read_response_format(format: &Fields<'_>) -> Result<Option<Wanted>, ApiError> {
    const NAME: &str = "response_format";
    let kind = format.string("type").ok().flatten();
    match kind.as_deref() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Wanted::new(NAME, Grammar::json_object()))),
        Some("json_schema") => {
            let missing =
                || ApiError::param(NAME, "'response_format.json_schema.schema' must be a JSON schema");
            let object = format.object("json_schema")?.ok_or_else(missing)?;
            let schema: Json = object.tree("schema", "a JSON schema")?.ok_or_else(missing)?;
            Ok(Some(Wanted::new(NAME, Grammar::JsonSchema(schema))))
        }
        Some(kind) => {
            let message = format!(
                "'response_format' of type '{kind}' is not supported; use 'text', 'json_object' or 'json_schema'"
            );
            Err(ApiError::unsupported(NAME, message))
        }
        None => Err(ApiError::param(NAME, "'response_format' needs a 'type'")),
    }
}

/// Reads a field of vLLM's: `name` within `fields`, called `path` in errors.
fn read_kind(fields: &Fields<'_>, kind: &str, name: &str, path: &str) -> Result<Option<Wanted>, ApiError> {
    let wanted = |grammar| Some(Wanted::new(path, grammar));
    Ok(match kind {
        "json" => {
            let schema: Option<Json> = fields.tree(name, "a JSON schema")?;
            match schema {
                // A schema may come as text.
                Some(Json::String(text)) => {
                    let schema = serde_json::from_str(&text).map_err(|error| {
                        ApiError::param(path, format!("'{path}' must be a JSON schema: {error}"))
                    })?;
                    wanted(Grammar::JsonSchema(schema))
                }
                schema => schema.and_then(|schema| wanted(Grammar::JsonSchema(schema))),
            }
        }
        "regex" => fields.string(name)?.and_then(|regex| wanted(Grammar::Regex(regex))),
        "grammar" => fields.string(name)?.and_then(|grammar| wanted(Grammar::Lark(grammar))),
        _ => {
            let choices: Option<Vec<String>> = fields.get(name, "a list of strings")?;
            if choices.as_ref().is_some_and(|choices| choices.is_empty() || choices.len() > MAX_CHOICES) {
                let message = format!("'{path}' must have 1 to {MAX_CHOICES} strings");
                return Err(ApiError::param(path, message));
            }
            choices.and_then(|choices| wanted(Grammar::choice(&choices)))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: Json) -> Result<Option<Grammar>, Json> {
        let text = body.to_string();
        let wanted = Wanted::read(&Fields::parse(text.as_bytes()).unwrap());
        wanted
            .map(|wanted| wanted.map(|wanted| wanted.grammar))
            .map_err(|error| error.body()["error"]["param"].clone())
    }

    #[test]
    fn every_way_to_ask() {
        let schema = json!({"type": "integer"});
        let by_schema = Ok(Some(Grammar::JsonSchema(schema.clone())));
        assert_eq!(read(json!({"response_format": {"type": "text"}})), Ok(None));
        assert_eq!(read(json!({"guided_json": null})), Ok(None));
        for body in [
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}),
            json!({"structured_outputs": {"json": schema}}),
            json!({"guided_json": schema}),
            json!({"guided_json": schema.to_string()}),
        ] {
            assert_eq!(read(body), by_schema);
        }
        let object = Ok(Some(Grammar::json_object()));
        assert_eq!(read(json!({"response_format": {"type": "json_object"}})), object);
        assert_eq!(read(json!({"structured_outputs": {"json_object": true}})), object);
        assert_eq!(read(json!({"guided_regex": "a+"})), Ok(Some(Grammar::Regex("a+".into()))));
        assert_eq!(
            read(json!({"guided_grammar": "start: \"a\""})),
            Ok(Some(Grammar::Lark("start: \"a\"".into())))
        );
        let choice = Ok(Some(Grammar::Lark("start: \"a\\\"\" | \"b\"".into())));
        assert_eq!(read(json!({"guided_choice": ["a\"", "b"]})), choice);
        assert_eq!(read(json!({"structured_outputs": {"choice": ["a\"", "b"]}})), choice);
    }

    #[test]
    fn bad_wishes_are_named() {
        for (body, param) in [
            (json!({"response_format": "text"}), "response_format"),
            (json!({"response_format": {"type": "yaml"}}), "response_format"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
                "response_format",
            ),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"guided_regex": 5}), "guided_regex"),
            (json!({"guided_choice": []}), "guided_choice"),
            (json!({"structured_outputs": {"structural_tag": {}}}), "structured_outputs"),
            (json!({"guided_regex": "a", "guided_grammar": "b"}), "guided_grammar"),
            (json!({"response_format": {"type": "json_object"}, "guided_regex": "b"}), "guided_regex"),
        ] {
            assert_eq!(read(body.clone()), Err(json!(param)), "{body}");
        }
    }
}
