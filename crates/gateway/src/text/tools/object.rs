//! Reads a tool call whose arguments are JSON, character by character. Never changes what the model wrote between the
//! braces.

use super::{Call, Progress, Scan};

/// Where a scanner is in a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    Start,
    KeyOrEnd,
    Key,
    Colon,
    Value,
    Name,
    Arguments,
    Other,
    CommaOrEnd,
    /// In the name before the object.
    PlainName,
    /// In the object behind the name.
    OnlyArguments,
    End,
    Bad,
}

/// Longest name before an object, with what stands between the two, in bytes.
const LONGEST_NAME: usize = 256;

/// Reads `{"name": ..., "arguments": ...}`, whose other keys are passed over; or `name[ARGS]{...}`.
#[derive(Debug, Default)]
pub(super) struct ObjectScanner {
    at: At,
    /// JSON text of the string being read, a key or the name; or the name before the object.
    string: String,
    /// The key of the value being read.
    key: String,
    call: Call,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Scan for ObjectScanner {
    fn feed(&mut self, c: char) {
        self.at = self.next(c);
        match self.at {
            At::End => self.call.progress = Progress::End,
            At::Bad => self.call.progress = Progress::Bad,
            _ => {}
        }
    }

    fn call(&mut self) -> &mut Call {
        &mut self.call
    }
}

impl ObjectScanner {
    /// For calls whose name stands before their arguments.
    pub(super) fn named() -> ObjectScanner {
        ObjectScanner { at: At::PlainName, ..ObjectScanner::default() }
    }

    fn next(&mut self, c: char) -> At {
        let space = c.is_ascii_whitespace();
        match (self.at, c) {
            (At::Start | At::KeyOrEnd | At::Colon | At::Value | At::CommaOrEnd, _) if space => self.at,
            (At::Start, '{') | (At::CommaOrEnd, ',') => At::KeyOrEnd,
            (At::KeyOrEnd, '"') => self.begin_string(At::Key),
            (At::KeyOrEnd | At::CommaOrEnd, '}') if self.call.name.is_some() => At::End,
            (At::Key | At::Name, _) => self.string(c),
            (At::Colon, ':') => At::Value,
            (At::Value, '"') if self.key == "name" && self.call.name.is_none() => self.begin_string(At::Name),
            (At::Value, _) if self.key == "name" => At::Bad,
            (At::Value, _) => {
                let arguments =
                    matches!(self.key.as_str(), "arguments" | "parameters") && !self.call.has_arguments;
                self.call.has_arguments |= arguments;
                let at = if arguments { At::Arguments } else { At::Other };
                self.value(at, c)
            }
            (At::Arguments | At::Other, _) => self.value(self.at, c),
            (At::PlainName, '{') => self.begin_arguments(),
            (At::PlainName, _) if self.string.len() < LONGEST_NAME => {
                self.string.push(c);
                At::PlainName
            }
            (At::OnlyArguments, _) => match self.value(At::Arguments, c) {
                At::Arguments => At::OnlyArguments,
                _ => At::End,
            },
            _ => At::Bad,
        }
    }

    /// The object behind the name begins. Between the two may stand `[ARGS]`, and `[CALL_ID]` with an id before it.
    fn begin_arguments(&mut self) -> At {
        let text = self.string.trim();
        let text = text.strip_suffix("[ARGS]").unwrap_or(text);
        let name = text.split_once("[CALL_ID]").map_or(text, |(name, _)| name).trim();
        if name.is_empty() || name.contains(|c: char| c.is_whitespace() || "[]\"".contains(c)) {
            return At::Bad;
        }
        self.call.name = Some(name.to_owned());
        self.call.has_arguments = true;
        self.value(At::Arguments, '{');
        At::OnlyArguments
    }

    fn begin_string(&mut self, at: At) -> At {
        self.string.clear();
        self.string.push('"');
        at
    }

    /// One more character of a key or the name.
    fn string(&mut self, c: char) -> At {
        self.string.push(c);
        if !self.closes_string(c) {
            return self.at;
        }
        match (serde_json::from_str::<String>(&self.string), self.at) {
            (Ok(key), At::Key) => {
                self.key = key;
                At::Colon
            }
            (Ok(name), _) => {
                self.call.name = Some(name);
                At::CommaOrEnd
            }
            (Err(_), _) => At::Bad,
        }
    }

    /// Whether this character of a string is its closing quote.
    fn closes_string(&mut self, c: char) -> bool {
        let escaped = std::mem::take(&mut self.escaped);
        self.escaped = c == '\\' && !escaped;
        c == '"' && !escaped
    }

    /// One more character of a value of any kind.
    fn value(&mut self, at: At, c: char) -> At {
        let scalar = self.depth == 0 && !self.in_string;
        if scalar && (matches!(c, ',' | '}') || c.is_ascii_whitespace()) {
            self.at = At::CommaOrEnd;
            return self.next(c);
        }
        if at == At::Arguments {
            self.call.arguments.push(c);
        }
        if self.in_string {
            self.in_string = !self.closes_string(c);
        } else {
            match c {
                '"' => self.in_string = true,
                '{' | '[' => self.depth += 1,
                '}' | ']' => self.depth = self.depth.saturating_sub(1),
                _ => return at,
            }
        }
        if self.depth == 0 && !self.in_string { At::CommaOrEnd } else { at }
    }
}
