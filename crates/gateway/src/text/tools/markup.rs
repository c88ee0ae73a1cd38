//! Reads a tool call in tags, `<function=NAME><parameter=KEY>VALUE</parameter></function>`, character by character and
//! writes its arguments as JSON. A value is text unless the function's schema says that it is something else.

use std::sync::Arc;

use serde_json::Value as Json;

use super::{Call, Function, Progress, Scan};

/// What a call begins with.
pub(super) const FUNCTION: &str = "<function=";
const PARAMETER: &str = "<parameter=";
const END_FUNCTION: &str = "</function>";
/// What ends a value; the line break is none of it.
const END_PARAMETER: &str = "\n</parameter>";
/// Longest tag in bytes.
const LONGEST_TAG: usize = 256;

/// Where a scanner is in a call.
#[derive(Debug)]
enum At {
    /// In a tag, or in white space before it.
    Tag,
    /// In a value.
    Value {
        /// Whether the value is text as it stands.
        text: bool,
        /// Whether anything has been looked at: a line break at the start is none of it.
        begun: bool,
    },
}

/// Reads a call from its `<function=` on.
#[derive(Debug)]
pub(super) struct MarkupScanner {
    functions: Arc<[Function]>,
    at: At,
    /// Read and not dealt with.
    held: String,
    key: String,
    parameters: usize,
    call: Call,
}

impl MarkupScanner {
    pub(super) fn new(functions: Arc<[Function]>) -> MarkupScanner {
        let (held, key) = (String::new(), String::new());
        MarkupScanner { functions, at: At::Tag, held, key, parameters: 0, call: Call::default() }
    }

    /// A tag is complete.
    fn tag(&mut self) {
        let tag = std::mem::take(&mut self.held);
        let tag = tag.trim_start();
        let inside = |before: &str| {
            let name = tag.strip_prefix(before)?.strip_suffix('>')?.trim();
            (!name.is_empty() && !name.contains(['<', '\n'])).then(|| name.to_owned())
        };
        if self.call.name.is_none() {
            self.call.name = inside(FUNCTION);
            if self.call.name.is_some() {
                self.call.has_arguments = true;
                self.call.arguments.push('{');
                return;
            }
        } else if let Some(key) = inside(PARAMETER) {
            let separator = if self.parameters > 0 { ", " } else { "" };
            let text = self.schema(&key).is_none_or(is_text);
            self.call.arguments += &format!("{separator}{}: ", Json::from(key.as_str()));
            if text {
                self.call.arguments.push('"');
            }
            self.parameters += 1;
            self.key = key;
            self.at = At::Value { text, begun: false };
            return;
        } else if tag == END_FUNCTION {
            self.call.arguments.push('}');
            self.call.progress = Progress::End;
            return;
        }
        self.call.progress = Progress::Bad;
    }

    /// The schema of a parameter of the function that is called.
    fn schema(&self, key: &str) -> Option<&Json> {
        let function =
            self.functions.iter().find(|function| Some(&function.name) == self.call.name.as_ref())?;
        function.parameters.get("properties")?.get(key)
    }

    /// Looks at what is held of a value.
    fn value(&mut self, text: bool, begun: bool) {
        if !begun {
            if self.held == "\n" {
                self.held.clear();
            }
            self.at = At::Value { text, begun: true };
        }
        let end = END_PARAMETER.trim_start();
        if let Some(value) = self.held.strip_suffix(end) {
            let value = value.strip_suffix('\n').unwrap_or(value);
            if text {
                self.call.arguments += &escaped(value);
                self.call.arguments.push('"');
            } else {
                let value = typed(value, self.schema(&self.key));
                self.call.arguments += &value.to_string();
            }
            self.held.clear();
            self.at = At::Tag;
        } else if text {
            // What may still become the end is kept.
            let kept = (1..END_PARAMETER.len()).rev().find(|&length| {
                let whole = self.held.ends_with(&END_PARAMETER[..length]);
                whole || (length < end.len() && self.held.ends_with(&end[..length]))
            });
            let rest = self.held.split_off(self.held.len() - kept.unwrap_or(0));
            self.call.arguments += &escaped(&std::mem::replace(&mut self.held, rest));
        }
    }
}

impl Scan for MarkupScanner {
    fn feed(&mut self, c: char) {
        self.held.push(c);
        match self.at {
            At::Value { text, begun } => self.value(text, begun),
            At::Tag if c == '>' => self.tag(),
            At::Tag => {
                let tag = self.held.trim_start();
                if tag.len() > LONGEST_TAG || !(tag.is_empty() || tag.starts_with('<')) {
                    self.call.progress = Progress::Bad;
                }
            }
        }
    }

    fn call(&mut self) -> &mut Call {
        &mut self.call
    }
}

/// Text as it stands in a JSON string.
fn escaped(text: &str) -> String {
    let quoted = Json::from(text).to_string();
    quoted.get(1..quoted.len() - 1).unwrap_or_default().to_owned()
}

/// Whether values of this schema are text.
fn is_text(schema: &Json) -> bool {
    match schema.get("type") {
        Some(kind) => kind == "string",
        None => {
            let mut choices = schema.get("enum").and_then(Json::as_array).into_iter().flatten().peekable();
            choices.peek().is_some() && choices.all(Json::is_string)
        }
    }
}

/// A value that is not only text: JSON if it can be read as that, with Python's way of writing constants.
fn typed(text: &str, schema: Option<&Json>) -> Json {
    let trimmed = text.trim();
    let constant = match trimmed {
        "True" => Some(Json::Bool(true)),
        "False" => Some(Json::Bool(false)),
        "None" => Some(Json::Null),
        _ => None,
    };
    let nearly_text = |schema: &Json| {
        let kinds = schema.get("type").and_then(Json::as_array);
        kinds.is_some_and(|kinds| kinds.iter().any(|kind| kind == "string"))
    };
    let value = constant.or_else(|| serde_json::from_str(trimmed).ok());
    match value {
        // "5" may be meant as text where text is allowed; that cannot be told, and null is what such types are for.
        Some(value) if !schema.is_some_and(nearly_text) || value.is_null() => value,
        _ => Json::from(text),
    }
}
