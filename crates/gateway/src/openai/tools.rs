//! The tools of a chat request: which functions there are, whether one must be called, and the calls as OpenAI's
//! responses have them.

use serde::Serialize;
use serde_json::{Map, Value as Json, json};
use tangram_node::{DeployedModel, Grammar};

use super::error::ApiError;
use super::fields::Fields;
use super::structured::Wanted;
use crate::text::{Function, TextTokenizer, ToolFormat, ToolParser, ToolPiece};

/// Whether functions are called.
#[derive(Debug, PartialEq)]
enum ToolChoice {
    None,
    Auto,
    Required,
    Named(String),
}

/// What a request says about tools.
#[derive(Debug)]
pub(crate) struct ToolUse {
    tools: Vec<Function>,
    choice: ToolChoice,
    /// More than one call per answer is welcome.
    parallel: bool,
    /// As the request has them, for the template.
    raw: Option<Json>,
    format: Option<ToolFormat>,
}

impl ToolUse {
    /// Reads `tools`, `tool_choice` and `parallel_tool_calls`.
    pub(crate) fn read(fields: &Fields<'_>, model: &DeployedModel) -> Result<Self, ApiError> {
        let raw: Option<Json> = fields.tree("tools", "a list of tools")?;
        let tools = match &raw {
            None => Vec::new(),
            Some(Json::Array(tools)) => tools
                .iter()
                .enumerate()
                .map(|(index, tool)| read_tool(index, tool))
                .collect::<Result<_, _>>()?,
            Some(_) => return Err(ApiError::param("tools", "'tools' must be a list of tools")),
        };
        let choice = read_choice(fields, &tools)?;
        let parallel = fields.boolean("parallel_tool_calls", true)?;
        let format = model.chat_template.as_deref().and_then(ToolFormat::of);
        Ok(ToolUse { tools, choice, parallel, raw, format })
    }

    /// The tools that the template shows to the model.
    pub(crate) fn shown(&self) -> Option<&Json> {
        self.raw.as_ref().filter(|_| self.calls_possible())
    }

    fn calls_possible(&self) -> bool {
        !self.tools.is_empty() && self.choice != ToolChoice::None
    }

    /// How calls are written: as the template has it; where it has no form that is known, a call that is required is
    /// bare JSON, and others are not looked for. So are required calls where the template has tags: only JSON can be
    /// held to a schema.
    fn format(&self) -> Option<ToolFormat> {
        let forced = matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_));
        let format = self.format.filter(|&format| !forced || format != ToolFormat::Markup);
        format.or(forced.then_some(ToolFormat::Bare)).filter(|_| self.calls_possible())
    }

    /// What to take an answer apart with, if it may have calls.
    pub(crate) fn parser(&self) -> Option<ToolParser> {
        self.format().map(|format| ToolParser::new(format, self.tools.clone(), !self.parallel))
    }

    /// Special tokens that announce calls, which decoding would leave out.
    pub(crate) fn special_tokens(&self, tokenizer: &TextTokenizer) -> Vec<(u32, String)> {
        self.format().map(|format| tokenizer.special_tokens(format.special())).unwrap_or_default()
    }

    /// The grammar of an answer that has to call a function, in the model's own format.
    pub(crate) fn required(&self, tokenizer: &TextTokenizer) -> Option<Wanted> {
        let (tools, single): (Vec<&Function>, bool) = match &self.choice {
            ToolChoice::None | ToolChoice::Auto => return None,
            ToolChoice::Required => (self.tools.iter().collect(), !self.parallel),
            ToolChoice::Named(name) => (self.tools.iter().filter(|tool| tool.name == *name).collect(), true),
        };
        let format = self.format()?;
        let literal = |text: &str| match tokenizer.special_tokens(&[text]).first() {
            Some((id, _)) => format!("<[{id}]>"),
            None => json!(text).to_string(),
        };
        let (open, close) = (literal(format.marker()), literal(format.end_marker()));
        let call = |path: &str| any_call(&tools, format.arguments_key(), path);
        let lark = match format {
            ToolFormat::Tagged => {
                let more = if single { "" } else { " (\"\\n\" call)*" };
                let body = Grammar::lark_json(call("#"));
                format!("start: call{more}\ncall: {open} \"\\n\" body \"\\n\" {close}\nbody: {body}")
            }
            ToolFormat::Bare => {
                let more = if single { "" } else { " (\"; \" call)*" };
                format!("start: call{more}\ncall: {}", Grammar::lark_json(call("#")))
            }
            ToolFormat::List => {
                let mut list = json!({"type": "array", "items": call("#/items"), "minItems": 1});
                if single {
                    list["maxItems"] = json!(1);
                }
                format!("start: {open} calls\ncalls: {}", Grammar::lark_json(list))
            }
            ToolFormat::Named => {
                let more = if single { "" } else { " call*" };
                let choices: Vec<String> = (0..tools.len()).map(|index| format!("call{index}")).collect();
                let mut lark = format!("start: call{more}\ncall: {}", choices.join(" | "));
                for (index, tool) in tools.iter().enumerate() {
                    let (name, arguments) = (json!(tool.name), Grammar::lark_json(tool.parameters.clone()));
                    let args = literal("[ARGS]");
                    lark +=
                        &format!("\ncall{index}: {open} {name} {args} args{index}\nargs{index}: {arguments}");
                }
                lark
            }
            // Never asked for: `format`.
            ToolFormat::Markup => return None,
        };
        Some(Wanted::new("tools", Grammar::Lark(lark)))
    }
}

fn read_tool(index: usize, tool: &Json) -> Result<Function, ApiError> {
    let name = |rest: &str| format!("tools[{index}]{rest}");
    let bad = |name: &str, what: &str| ApiError::param(name, format!("'{name}' must be {what}"));
    if tool.get("type").and_then(Json::as_str) != Some("function") {
        let name = name(".type");
        return Err(bad(&name, "\"function\"; this server knows no other tools"));
    }
    let function = tool.get("function").and_then(Json::as_object);
    let function = function.ok_or_else(|| bad(&name(".function"), "an object with a 'name'"))?;
    let called = function.get("name").and_then(Json::as_str).filter(|called| !called.is_empty());
    let called = called.ok_or_else(|| bad(&name(".function.name"), "the function's name"))?;
    let parameters = match function.get("parameters") {
        None | Some(Json::Null) => json!({"type": "object", "properties": {}, "additionalProperties": false}),
        Some(Json::Object(schema)) if schema.is_empty() => json!({"type": "object"}),
        Some(Json::Object(schema)) => Json::Object(schema.clone()),
        Some(_) => return Err(bad(&name(".function.parameters"), "a JSON schema")),
    };
    Ok(Function { name: called.to_owned(), parameters })
}

fn read_choice(fields: &Fields<'_>, tools: &[Function]) -> Result<ToolChoice, ApiError> {
    const NAME: &str = "tool_choice";
    let choice: Option<Json> = fields.tree(NAME, "a string or an object")?;
    let choice = match choice {
        None => return Ok(ToolChoice::Auto),
        Some(Json::String(choice)) => match choice.as_str() {
            "none" => return Ok(ToolChoice::None),
            "auto" => return Ok(ToolChoice::Auto),
            "required" => ToolChoice::Required,
            _ => {
                let message = "'tool_choice' must be 'none', 'auto', 'required' or name a function";
                return Err(ApiError::param(NAME, message));
            }
        },
        Some(choice) => {
            let name = choice.pointer("/function/name").and_then(Json::as_str);
            match name {
                Some(name) if tools.iter().any(|tool| tool.name == name) => {
                    ToolChoice::Named(name.to_owned())
                }
                Some(name) => {
                    let message = format!("'tool_choice' names '{name}', which is not among the 'tools'");
                    return Err(ApiError::param(NAME, message));
                }
                None => {
                    let message = "'tool_choice' must have the form {\"type\": \"function\", \"function\": {\"name\": ...}}";
                    return Err(ApiError::param(NAME, message));
                }
            }
        }
    };
    if tools.is_empty() {
        return Err(ApiError::param(NAME, "'tool_choice' needs 'tools' to choose from"));
    }
    Ok(choice)
}

/// The schema of a call of one of these functions; `path` is where in the document's schema it will stand.
fn any_call(tools: &[&Function], arguments_key: &str, path: &str) -> Json {
    let call = |(index, tool): (usize, &&Function)| {
        let mut parameters = tool.parameters.clone();
        let place = format!("{path}/anyOf/{index}/properties/{arguments_key}");
        move_references(&mut parameters, &place);
        let mut properties = Map::new();
        properties.insert("name".to_owned(), json!({"const": tool.name}));
        properties.insert(arguments_key.to_owned(), parameters);
        json!({"type": "object", "properties": properties, "required": ["name", arguments_key],
               "additionalProperties": false})
    };
    json!({"anyOf": tools.iter().enumerate().map(call).collect::<Vec<Json>>()})
}

/// Makes the references within a schema right again after it was put at `place` in another.
fn move_references(schema: &mut Json, place: &str) {
    match schema {
        Json::Object(map) => {
            for (key, value) in map {
                match value {
                    Json::String(reference) if key == "$ref" && reference.starts_with('#') => {
                        reference.replace_range(..1, place);
                    }
                    value => move_references(value, place),
                }
            }
        }
        Json::Array(items) => items.iter_mut().for_each(|item| move_references(item, place)),
        _ => {}
    }
}

/// A call in a message, or what a chunk adds to one.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct ToolCall {
    /// Chunks only: which call of the message.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionCall,
}

#[derive(Debug, PartialEq, Serialize)]
struct FunctionCall {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

/// What a piece of an answer adds to a message.
#[derive(Debug, PartialEq)]
pub(crate) enum MessagePart {
    Content(String),
    Call(ToolCall),
}

/// The text of one choice, taken apart into content and calls.
#[derive(Debug)]
pub(crate) struct ChoiceText {
    /// `None` if there are no calls to look for.
    parser: Option<ToolParser>,
    /// What ids of calls begin with.
    id: String,
    calls: usize,
}

impl ChoiceText {
    /// For choice `index` of the request `id`.
    pub(crate) fn new(tools: &ToolUse, id: &str, index: usize) -> Self {
        let last = |count: usize| id.get(id.len().saturating_sub(count)..).unwrap_or_default();
        let id = match tools.format() {
            // Mistral's templates insist on nine letters and digits, of which the call's number is two.
            Some(ToolFormat::List | ToolFormat::Named) => format!("{}{:02x}", last(5), index % 256),
            _ => format!("call_{}{:02x}", last(20), index % 256),
        };
        ChoiceText { parser: tools.parser(), id, calls: 0 }
    }

    /// Whether the answer has called a function.
    pub(crate) fn has_calls(&self) -> bool {
        self.parser.as_ref().is_some_and(|parser| parser.calls() > 0)
    }

    /// The parts of a message that the next piece of text makes; `last` if no more follows.
    pub(crate) fn push(&mut self, text: String, last: bool) -> Vec<MessagePart> {
        let Some(parser) = &mut self.parser else {
            return if text.is_empty() { Vec::new() } else { vec![MessagePart::Content(text)] };
        };
        let mut pieces = parser.push(&text);
        if last {
            pieces.extend(parser.finish());
        }
        pieces
            .into_iter()
            .map(|piece| match piece {
                ToolPiece::Content(text) => MessagePart::Content(text),
                ToolPiece::Call(name) => {
                    self.calls += 1;
                    let id = format!("{}{:02x}", self.id, self.calls % 256);
                    let function = FunctionCall { name: Some(name), arguments: String::new() };
                    MessagePart::Call(ToolCall {
                        index: Some(self.calls - 1),
                        id: Some(id),
                        kind: Some("function"),
                        function,
                    })
                }
                ToolPiece::Arguments(arguments) => MessagePart::Call(ToolCall {
                    index: Some(self.calls.saturating_sub(1)),
                    id: None,
                    kind: None,
                    function: FunctionCall { name: None, arguments },
                }),
            })
            .collect()
    }

    /// Content and calls of an answer that is complete.
    pub(crate) fn whole(mut self, text: String) -> (String, Vec<ToolCall>, bool) {
        let (mut content, mut calls) = (String::new(), Vec::<ToolCall>::new());
        for part in self.push(text, true) {
            match part {
                MessagePart::Content(text) => content.push_str(&text),
                MessagePart::Call(call) if call.id.is_some() => calls.push(ToolCall { index: None, ..call }),
                MessagePart::Call(call) => {
                    if let Some(last) = calls.last_mut() {
                        last.function.arguments.push_str(&call.function.arguments);
                    }
                }
            }
        }
        let called = self.has_calls();
        (content, calls, called)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn weather() -> Json {
        json!([{"type": "function", "function": {"name": "weather", "parameters": {
            "type": "object", "required": ["place"], "properties": {"place": {"$ref": "#/$defs/place"}},
            "additionalProperties": false, "$defs": {"place": {"enum": ["Oslo", "Rome"]}}}}},
               {"type": "function", "function": {"name": "time"}}])
    }

    fn tool_use(body: Json, format: Option<ToolFormat>) -> Result<ToolUse, Json> {
        let text = body.to_string();
        let fields = Fields::parse(text.as_bytes()).unwrap();
        let read = || {
            let raw: Option<Json> = fields.tree("tools", "a list of tools")?;
            let list = raw.as_ref().and_then(Json::as_array).cloned().unwrap_or_default();
            let tools = list.iter().enumerate().map(|(index, tool)| read_tool(index, tool));
            let tools = tools.collect::<Result<Vec<Function>, ApiError>>()?;
            let choice = read_choice(&fields, &tools)?;
            Ok(ToolUse { tools, choice, parallel: fields.boolean("parallel_tool_calls", true)?, raw, format })
        };
        read().map_err(|error: ApiError| error.body()["error"]["param"].clone())
    }

    fn with_choice(choice: Json) -> Json {
        json!({"tools": weather(), "tool_choice": choice})
    }

    #[test]
    fn choices_are_checked() {
        let choice = |body| tool_use(body, None).map(|tools| tools.choice);
        let named = json!({"type": "function", "function": {"name": "time"}});
        assert_eq!(choice(json!({"tools": weather()})), Ok(ToolChoice::Auto));
        assert_eq!(choice(with_choice(json!("none"))), Ok(ToolChoice::None));
        assert_eq!(choice(with_choice(json!("required"))), Ok(ToolChoice::Required));
        assert_eq!(choice(with_choice(named)), Ok(ToolChoice::Named("time".into())));
        let unknown = json!({"type": "function", "function": {"name": "x"}});
        for (body, param) in [
            (with_choice(json!("any")), "tool_choice"),
            (with_choice(unknown), "tool_choice"),
            (with_choice(json!({})), "tool_choice"),
            (with_choice(json!(5)), "tool_choice"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": [{"type": "retrieval"}]}), "tools[0].type"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
            (json!({"tools": [{"type": "function", "function": {}}]}), "tools[0].function.name"),
            (
                json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}),
                "tools[0].function.parameters",
            ),
        ] {
            assert_eq!(choice(body.clone()), Err(json!(param)), "{body}");
        }
    }

    #[test]
    fn tools_are_shown_unless_none_may_be_called() {
        assert!(tool_use(json!({"tools": weather()}), None).unwrap().shown().is_some());
        assert!(tool_use(with_choice(json!("none")), None).unwrap().shown().is_none());
        assert!(tool_use(json!({"tools": []}), None).unwrap().shown().is_none());
        assert!(tool_use(json!({"tools": weather()}), None).unwrap().parser().is_none());
        assert!(tool_use(with_choice(json!("required")), None).unwrap().parser().is_some());
    }

    /// Whether a required call lets this answer through, and what the parser makes of it.
    fn required(body: Json, format: Option<ToolFormat>, answer: &str) -> Option<Vec<(String, String)>> {
        let tools = tool_use(body, format).unwrap();
        let tokenizer: Arc<TextTokenizer> = crate::text::test_tokenizer();
        let wanted = tools.required(&tokenizer).unwrap();
        let grammar = tokenizer.vocabulary().unwrap().compile(&wanted.grammar).unwrap();
        let mut constraint = grammar.start(&[256]);
        for token in tokenizer.encode(answer, false).unwrap() {
            let mut logits = [0.0; 257];
            constraint.restrict(&mut logits).ok()?;
            (logits[token as usize] == 0.0).then_some(())?;
            constraint.accept(token).ok()?;
        }
        let mut logits = [0.0; 257];
        let ends = constraint.restrict(&mut logits).is_err() || logits[256] == 0.0;
        ends.then_some(())?;
        let (content, calls, _) =
            ChoiceText::new(&tools, "chatcmpl-0123456789abcdef0123456789abcdef", 0).whole(answer.to_owned());
        assert_eq!(content, "");
        let mistral = matches!(format, Some(ToolFormat::List | ToolFormat::Named));
        let length = if mistral { 9 } else { 29 };
        assert!(calls.iter().all(|call| call.id.as_ref().unwrap().len() == length));
        Some(calls.into_iter().map(|call| (call.function.name.unwrap(), call.function.arguments)).collect())
    }

    #[test]
    fn a_required_call_is_a_call_in_every_format() {
        let time = r#"{"name": "time", "KEY": {}}"#;
        let rome = r#"{"name": "weather", "KEY": {"place": "Rome"}}"#;
        let bonn = r#"{"name": "weather", "KEY": {"place": "Bonn"}}"#;
        let calls = |names: &[&str]| {
            let arguments = |name: &str| if name == "time" { "{}" } else { r#"{"place": "Rome"}"# };
            Some(names.iter().map(|&name| (name.to_owned(), arguments(name).to_owned())).collect::<Vec<_>>())
        };
        use ToolFormat::{Bare, List, Markup, Named, Tagged};
        for format in [None, Some(Tagged), Some(Bare), Some(List), Some(Named), Some(Markup)] {
            let write = |answers: &[&str]| {
                let bare = matches!(format, None | Some(Bare | Markup));
                let key = if bare { "parameters" } else { "arguments" };
                let text = match format {
                    Some(ToolFormat::Tagged) => answers
                        .iter()
                        .map(|a| format!("<tool_call>\n{a}\n</tool_call>"))
                        .collect::<Vec<_>>()
                        .join("\n"),
                    Some(ToolFormat::List) => format!("[TOOL_CALLS][{}]", answers.join(", ")),
                    Some(ToolFormat::Named) => answers
                        .iter()
                        .map(|answer| {
                            let call: Json = serde_json::from_str(answer).unwrap();
                            let (name, arguments) = (
                                call["name"].as_str().unwrap(),
                                &answer[answer.find(r#""KEY": "#).unwrap() + 7..],
                            );
                            format!("[TOOL_CALLS]{name}[ARGS]{}", arguments.strip_suffix('}').unwrap())
                        })
                        .collect(),
                    _ => answers.join("; "),
                };
                text.replace("KEY", key)
            };
            let any = with_choice(json!("required"));
            assert_eq!(required(any.clone(), format, &write(&[rome])), calls(&["weather"]), "{format:?}");
            assert_eq!(required(any.clone(), format, &write(&[time, rome])), calls(&["time", "weather"]));
            assert_eq!(required(any.clone(), format, &write(&[bonn])), None);
            assert_eq!(required(any.clone(), format, "It rains."), None);
            let mut one = any;
            one["parallel_tool_calls"] = json!(false);
            assert_eq!(required(one.clone(), format, &write(&[time])), calls(&["time"]));
            assert_eq!(required(one, format, &write(&[time, rome])), None);
            let named = with_choice(json!({"type": "function", "function": {"name": "weather"}}));
            assert_eq!(required(named.clone(), format, &write(&[rome])), calls(&["weather"]));
            assert_eq!(required(named.clone(), format, &write(&[time])), None);
            assert_eq!(required(named, format, &write(&[rome, rome])), None);
        }
    }
}
