//! Reads a request's JSON object field by field, so that every error names the parameter. Unknown fields are ignored.
//!
//! Fields stay raw text until they are asked for: a large array of token ids never becomes a tree of JSON values.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::error::ApiError;

/// JSON values (and commas in strings) that a field may have when it is read as a tree, which takes about a hundred
/// bytes for each.
const MAX_VALUES: usize = 1 << 20;

/// The top level of a request. `null` counts as absent.
#[derive(Debug)]
pub(crate) struct Fields<'a> {
    fields: HashMap<String, &'a RawValue>,
}

impl<'a> Fields<'a> {
    /// Reads the request body.
    pub(crate) fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body)
            .map_err(|error| ApiError::invalid(format!("The request body is not valid UTF-8: {error}")))?;
        Self::parse_text(text, "The request body")
    }

    fn parse_text(text: &'a str, what: &str) -> Result<Self, ApiError> {
        let mut fields: HashMap<String, &'a RawValue> = serde_json::from_str(text).map_err(|error| {
            let problem = if error.is_data() { "must be a JSON object" } else { "is not valid JSON" };
            ApiError::invalid(format!("{what} {problem}: {error}"))
        })?;
        fields.retain(|_, value| value.get() != "null");
        Ok(Fields { fields })
    }

    /// A field's JSON text.
    pub(crate) fn raw(&self, name: &str) -> Option<&'a str> {
        self.fields.get(name).map(|value| value.get())
    }

    /// A field of a given type; `expected` completes "must be".
    pub(crate) fn get<T: Deserialize<'a>>(&self, name: &str, expected: &str) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        match serde_json::from_str(raw) {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(ApiError::param(name, format!("'{name}' must be {expected}"))),
        }
    }

    /// Like [`Fields::get`] for a tree of JSON values, of bounded size.
    pub(crate) fn tree<T: Deserialize<'a>>(&self, name: &str, expected: &str) -> Result<Option<T>, ApiError> {
        let values = self.raw(name).map_or(0, |raw| raw.bytes().filter(|byte| b",[{".contains(byte)).count());
        if values > MAX_VALUES {
            return Err(ApiError::param(name, format!("'{name}' has more than {MAX_VALUES} elements")));
        }
        self.get(name, expected)
    }

    /// An object.
    pub(crate) fn object(&self, name: &str) -> Result<Option<Fields<'a>>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        match Self::parse_text(raw, name) {
            Ok(fields) => Ok(Some(fields)),
            Err(_) => Err(ApiError::param(name, format!("'{name}' must be an object"))),
        }
    }

    /// A string.
    pub(crate) fn string(&self, name: &str) -> Result<Option<String>, ApiError> {
        self.get(name, "a string")
    }

    /// `true` or `false`; absent is `default`.
    pub(crate) fn boolean(&self, name: &str, default: bool) -> Result<bool, ApiError> {
        Ok(self.get(name, "true or false")?.unwrap_or(default))
    }

    /// A finite number within a range.
    pub(crate) fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.get::<f64>(name, "a number")? else { return Ok(None) };
        if value.is_finite() && range.contains(&value) {
            return Ok(Some(value as f32));
        }
        Err(out_of_range(name, &range, value))
    }

    /// An integer within a range; 5.0 counts as one.
    pub(crate) fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        let value = match serde_json::from_str::<i64>(raw) {
            Ok(value) => value,
            Err(_) => match serde_json::from_str::<f64>(raw) {
                // Beyond the range of i64 the cast saturates and the range check answers.
                Ok(value) if value.fract() == 0.0 => value as i64,
                _ => return Err(ApiError::param(name, format!("'{name}' must be an integer"))),
            },
        };
        if range.contains(&value) { Ok(Some(value)) } else { Err(out_of_range(name, &range, value)) }
    }
}

fn out_of_range<T: std::fmt::Display>(name: &str, range: &RangeInclusive<T>, value: T) -> ApiError {
    let (low, high) = (range.start(), range.end());
    ApiError::param(name, format!("'{name}' must be between {low} and {high}, got {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(error: Result<impl std::fmt::Debug, ApiError>, param: &str, message: &str) {
        let body = error.unwrap_err().body();
        assert_eq!(body["error"]["param"], param);
        assert!(body["error"]["message"].as_str().unwrap().contains(message), "{body}");
    }

    #[test]
    fn malformed_bodies_are_refused() {
        for body in
            [&b"{"[..], b"", b"[]", b"nul", b"\"x\"", b"{\"a\": NaN}", b"{\"a\": \xFF}", b"{} {}", b"\xFF"]
        {
            let error = Fields::parse(body).unwrap_err();
            assert_eq!(error.status, 400, "{body:?}");
        }
    }

    #[test]
    fn numbers_are_checked() {
        let text =
            r#"{"t": 2.5, "u": "1", "big": 1e999, "i": 3.0, "j": 3.5, "n": null, "x": -1, "h": 1e300}"#;
        let fields = Fields::parse(text.as_bytes()).unwrap();
        fails(fields.number("t", 0.0..=2.0), "t", "must be between 0 and 2, got 2.5");
        fails(fields.number("u", 0.0..=2.0), "u", "must be a number");
        fails(fields.number("big", 0.0..=2.0), "big", "must be a number");
        assert_eq!(fields.number("n", 0.0..=2.0).unwrap(), None);
        assert_eq!(fields.integer("i", 0..=9).unwrap(), Some(3));
        fails(fields.integer("j", 0..=9), "j", "must be an integer");
        fails(fields.integer("x", 0..=9), "x", "between 0 and 9, got -1");
        fails(fields.integer("h", 0..=9), "h", "between 0 and 9");
    }

    #[test]
    fn types_are_checked() {
        let fields =
            Fields::parse(br#"{"s": 1, "b": "true", "o": [], "ids": [1, -2], "deep": {"a": 1}}"#).unwrap();
        fails(fields.string("s"), "s", "must be a string");
        fails(fields.boolean("b", true), "b", "must be true or false");
        fails(fields.object("o"), "o", "must be an object");
        fails(fields.get::<Vec<u32>>("ids", "a list of token ids"), "ids", "must be a list of token ids");
        assert_eq!(fields.object("deep").unwrap().unwrap().raw("a"), Some("1"));
    }

    #[test]
    fn trees_are_bounded() {
        let text = format!("{{\"messages\": [{}0]}}", "0,".repeat(MAX_VALUES));
        let fields = Fields::parse(text.as_bytes()).unwrap();
        fails(fields.tree::<Vec<serde_json::Value>>("messages", "a list"), "messages", "more than");
        assert_eq!(fields.get::<Vec<u32>>("messages", "a list").unwrap().unwrap().len(), MAX_VALUES + 1);
    }
}
