//! Forms that an answer may be asked to have, and how to tell whether it has them.

use serde_json::{Map, Value, json};

/// A constraint on the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// A JSON schema with a bounded string, number and list.
    Schema,
    /// Any JSON object.
    Object,
    /// One of some texts.
    Choice,
    /// A regular expression.
    Regex,
}

/// All of them.
pub(super) const FORMS: [Form; 4] = [Form::Schema, Form::Object, Form::Choice, Form::Regex];

const CHOICES: [&str; 3] = ["yes", "no", "perhaps"];

impl Form {
    /// Adds the constraint to a request.
    pub(super) fn ask(self, body: &mut Value) {
        match self {
            Form::Schema => {
                let schema = json!({
                    "type": "object",
                    "properties": {
                        "name": { "type": "string", "maxLength": 8 },
                        "level": { "type": "integer", "minimum": 0, "maximum": 9 },
                        "tags": { "type": "array", "items": { "enum": ["a", "b"] }, "minItems": 1, "maxItems": 3 },
                    },
                    "required": ["name", "level", "tags"],
                    "additionalProperties": false,
                });
                body["response_format"] =
                    json!({ "type": "json_schema", "json_schema": { "name": "soak", "schema": schema } });
            }
            Form::Object => body["response_format"] = json!({ "type": "json_object" }),
            Form::Choice => body["guided_choice"] = json!(CHOICES),
            Form::Regex => body["guided_regex"] = "[a-f]{2}-[0-9]{3}".into(),
        }
    }

    /// Whether a finished text has the form.
    pub(super) fn fits(self, text: &str) -> bool {
        let object = || serde_json::from_str::<Map<String, Value>>(text).ok();
        match self {
            Form::Schema => object().is_some_and(|object| fits_schema(&object)),
            Form::Object => object().is_some(),
            Form::Choice => CHOICES.contains(&text),
            Form::Regex => match text.as_bytes() {
                [letters @ .., b'-', a, b, c] if letters.len() == 2 => {
                    letters.iter().all(|letter| (b'a'..=b'f').contains(letter))
                        && [a, b, c].into_iter().all(u8::is_ascii_digit)
                }
                _ => false,
            },
        }
    }
}

fn fits_schema(object: &Map<String, Value>) -> bool {
    let name = object.get("name").and_then(Value::as_str).is_some_and(|name| name.chars().count() <= 8);
    let level = object.get("level").and_then(Value::as_f64);
    let level = level.is_some_and(|level| level.fract() == 0.0 && (0.0..=9.0).contains(&level));
    let tags = object
        .get("tags")
        .and_then(Value::as_array)
        .is_some_and(|tags| (1..=3).contains(&tags.len()) && tags.iter().all(|tag| tag == "a" || tag == "b"));
    object.len() == 3 && name && level && tags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_and_what_does_not() {
        for (form, fits, others) in [
            (
                Form::Schema,
                &[
                    r#"{"name": "ab", "level": 3, "tags": ["a", "b"]}"#,
                    r#" {"name":"","level":0,"tags":["a"]}"#,
                ][..],
                &[
                    r#"{"name": "ab", "level": 10, "tags": ["a"]}"#,
                    r#"{"name": "ab", "level": 1.5, "tags": ["a"]}"#,
                    r#"{"name": "ab", "level": 1, "tags": []}"#,
                    r#"{"name": "ab", "level": 1, "tags": ["c"]}"#,
                    r#"{"name": "123456789", "level": 1, "tags": ["a"]}"#,
                    r#"{"name": "ab", "level": 1, "tags": ["a"], "more": 1}"#,
                    r#"{"name": "ab", "level": 1}"#,
                    r#"{"name": "ab""#,
                ][..],
            ),
            (Form::Object, &["{}", r#"{"a": [1]}"#], &["[]", "{", ""]),
            (Form::Choice, &["yes", "perhaps"], &["Yes", "yes ", ""]),
            (Form::Regex, &["af-019"], &["ag-019", "af-01", "af019", "aaf-019", ""]),
        ] {
            for text in fits {
                assert!(form.fits(text), "{form:?} {text}");
            }
            for text in others {
                assert!(!form.fits(text), "{form:?} {text}");
            }
        }
    }
}
