//! Finds tool calls in generated text that arrives in pieces, in the formats of the common chat templates.
//!
//! Text that might still become a call is held back; text that turns out to be none is given out as it was. The
//! arguments are passed on as the model wrote them, valid JSON or not: the client has to check them anyway.

/// How a model writes tool calls, by what its chat template contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ToolFormat {
    /// Hermes and Qwen: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, any number of them.
    Tagged,
    /// Llama 3: the whole answer is `{"name": ..., "parameters": ...}`, perhaps after `<|python_tag|>`; further calls
    /// follow after `;`.
    Bare,
    /// Mistral: `[TOOL_CALLS][{"name": ..., "arguments": ...}, ...]`.
    List,
}

impl ToolFormat {
    /// The format of a chat template, if it has one of these.
    pub(crate) fn of(template: &str) -> Option<Self> {
        let has = |text: &str| template.contains(text);
        // Templates that put other things than JSON between the same tags.
        if has("<function=") || has("<arg_key>") || has("[ARGS]") {
            return None;
        }
        if has("[TOOL_CALLS]") {
            return Some(ToolFormat::List);
        }
        if has("<tool_call>") && has("arguments") {
            return Some(ToolFormat::Tagged);
        }
        (has("<|python_tag|>") || has("\"parameters\": dictionary")).then_some(ToolFormat::Bare)
    }

    /// What announces a call.
    pub(crate) const fn marker(self) -> &'static str {
        match self {
            ToolFormat::Tagged => "<tool_call>",
            ToolFormat::Bare => "<|python_tag|>",
            ToolFormat::List => "[TOOL_CALLS]",
        }
    }

    /// What may end a call; empty if nothing does.
    pub(crate) const fn end_marker(self) -> &'static str {
        match self {
            ToolFormat::Tagged => "</tool_call>",
            ToolFormat::Bare | ToolFormat::List => "",
        }
    }

    /// The key under which a call has its arguments.
    pub(crate) const fn arguments_key(self) -> &'static str {
        match self {
            ToolFormat::Tagged | ToolFormat::List => "arguments",
            ToolFormat::Bare => "parameters",
        }
    }
}

/// What a piece of text turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ToolPiece {
    /// Text of the answer.
    Content(String),
    /// The next call begins; this is the function's name.
    Call(String),
    /// More of the JSON text of the latest call's arguments.
    Arguments(String),
}

/// Takes apart the text of one answer.
#[derive(Debug)]
pub(crate) struct ToolParser {
    format: ToolFormat,
    /// Functions that exist: without tags, only a call of one of them is a call.
    names: Vec<String>,
    /// Leave out all calls but the first.
    single: bool,
    /// Text not looked at yet.
    held: String,
    state: State,
    calls: usize,
}

#[derive(Debug)]
enum State {
    /// Nothing but white space so far.
    Start,
    /// In the answer's text.
    Content,
    /// After the marker, before the call's object.
    Opened,
    /// In the call's object. `raw` is what to give out if it is none; empty once the call was announced.
    Call { scanner: Box<CallScanner>, raw: String },
    /// After the call's object.
    Closed,
}

impl ToolParser {
    /// A parser for answers in `format`, which may call the functions with these names.
    pub(crate) fn new(format: ToolFormat, names: Vec<String>, single: bool) -> Self {
        ToolParser { format, names, single, held: String::new(), state: State::Start, calls: 0 }
    }

    /// Calls found so far.
    pub(crate) fn calls(&self) -> usize {
        if self.single { self.calls.min(1) } else { self.calls }
    }

    /// Takes the next piece of text.
    pub(crate) fn push(&mut self, text: &str) -> Vec<ToolPiece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        while !self.held.is_empty() && self.step(&mut pieces) {}
        pieces
    }

    /// The rest at the end of the answer.
    pub(crate) fn finish(&mut self) -> Vec<ToolPiece> {
        let mut pieces = Vec::new();
        let held = std::mem::take(&mut self.held);
        let rest = match std::mem::replace(&mut self.state, State::Content) {
            State::Call { raw, .. } => raw + &held,
            State::Opened => self.format.marker().to_owned() + &held,
            State::Start | State::Content | State::Closed => held,
        };
        // Line breaks around calls are no answer.
        if self.calls == 0 || !rest.trim().is_empty() {
            emit(&mut pieces, rest);
        }
        pieces
    }

    /// Looks at some of the held text; `false` if more text is needed.
    fn step(&mut self, pieces: &mut Vec<ToolPiece>) -> bool {
        match &mut self.state {
            State::Start => {
                let text = self.held.trim_start();
                let bare = self.format == ToolFormat::Bare && text.starts_with('{');
                if bare {
                    self.state = State::Call { scanner: Box::default(), raw: String::new() };
                } else if text.is_empty() {
                    return false;
                } else {
                    self.state = State::Content;
                }
                true
            }
            State::Content => self.content(pieces),
            State::Opened => {
                let list = self.format == ToolFormat::List;
                let text = self.held.trim_start_matches(|c: char| c.is_whitespace() || (list && c == '['));
                if text.is_empty() {
                    return false;
                }
                if text.starts_with('{') {
                    // The marker is given back with what follows it if that is no call.
                    let raw = self.held.len() - text.len();
                    let raw = self.format.marker().to_owned() + &self.held[..raw];
                    self.held = text.to_owned();
                    self.state = State::Call { scanner: Box::default(), raw };
                } else {
                    emit(pieces, self.format.marker().to_owned());
                    self.state = State::Content;
                }
                true
            }
            State::Call { .. } => {
                self.call(pieces);
                true
            }
            State::Closed => self.closed(),
        }
    }

    /// Gives out text up to the next marker, less the white space before it.
    fn content(&mut self, pieces: &mut Vec<ToolPiece>) -> bool {
        let marker = self.format.marker();
        if let Some(at) = self.held.find(marker) {
            emit(pieces, self.held[..at].trim_end().to_owned());
            self.held.drain(..at + marker.len());
            self.state = State::Opened;
            return true;
        }
        let begun = (1..marker.len()).rev().find(|&length| self.held.ends_with(&marker[..length]));
        let text = &self.held[..self.held.len() - begun.unwrap_or(0)];
        let rest = self.held.split_off(text.trim_end().len());
        emit(pieces, std::mem::replace(&mut self.held, rest));
        false
    }

    /// Reads on in a call's object.
    fn call(&mut self, pieces: &mut Vec<ToolPiece>) {
        let State::Call { scanner, raw } = &mut self.state else { return };
        let mut used = self.held.len();
        for (at, character) in self.held.char_indices() {
            scanner.feed(character);
            // What follows the name, or is no call any more, is looked at anew: how the text was cut must not matter.
            let named = scanner.name.is_some() && !scanner.announced;
            if named || matches!(scanner.at, At::End | At::Bad) {
                let bad = scanner.at == At::Bad && scanner.announced;
                used = if bad { at } else { at + character.len_utf8() };
                break;
            }
        }
        let text: String = self.held.drain(..used).collect();
        if !scanner.announced {
            raw.push_str(&text);
        }
        let unknown = |name: &String| self.format == ToolFormat::Bare && !self.names.contains(name);
        let bad = scanner.at == At::Bad || scanner.name.as_ref().is_some_and(unknown);
        if bad && !scanner.announced {
            emit(pieces, std::mem::take(raw));
            self.state = State::Content;
            return;
        }
        let Some(name) = &scanner.name else { return };
        let announce = !std::mem::replace(&mut scanner.announced, true);
        self.calls += usize::from(announce);
        if scanner.at == At::End && !scanner.has_arguments {
            scanner.arguments.push_str("{}");
        }
        let arguments = std::mem::take(&mut scanner.arguments);
        if !self.single || self.calls == 1 {
            pieces.extend(announce.then(|| ToolPiece::Call(name.clone())));
            pieces.extend(Some(arguments).filter(|text| !text.is_empty()).map(ToolPiece::Arguments));
        }
        raw.clear();
        if matches!(scanner.at, At::End | At::Bad) {
            self.state = State::Closed;
        }
    }

    /// Passes over what separates calls.
    fn closed(&mut self) -> bool {
        let text = match self.format {
            ToolFormat::Tagged => self.held.trim_start(),
            ToolFormat::Bare => self.held.trim_start_matches(|c: char| c.is_whitespace() || c == ';'),
            ToolFormat::List => self.held.trim_start_matches(|c: char| c.is_whitespace() || c == ','),
        };
        let end = match self.format {
            ToolFormat::List => "]",
            format => format.end_marker(),
        };
        if text.is_empty() {
            return false;
        }
        if !end.is_empty() && text.len() < end.len() && end.starts_with(text) {
            return false;
        }
        if let Some(rest) = text.strip_prefix(end).filter(|_| !end.is_empty()) {
            self.held = rest.to_owned();
            self.state = State::Content;
            return true;
        }
        if self.format != ToolFormat::Tagged && text.starts_with('{') {
            self.held = text.to_owned();
            self.state = State::Call { scanner: Box::default(), raw: String::new() };
            return true;
        }
        self.state = State::Content;
        true
    }
}

fn emit(pieces: &mut Vec<ToolPiece>, text: String) {
    if !text.is_empty() {
        pieces.push(ToolPiece::Content(text));
    }
}

/// Where a scanner is in a call's object.
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
    /// The object is complete and has a name.
    End,
    /// It is no call.
    Bad,
}

/// Reads `{"name": ..., "arguments": ...}` character by character; other keys are passed over.
#[derive(Debug, Default)]
struct CallScanner {
    at: At,
    /// JSON text of the string being read, a key or the name.
    string: String,
    /// The key of the value being read.
    key: String,
    name: Option<String>,
    /// The name was given out.
    announced: bool,
    /// Arguments read and not taken yet.
    arguments: String,
    has_arguments: bool,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl CallScanner {
    fn feed(&mut self, c: char) {
        let space = c.is_ascii_whitespace();
        self.at = match (self.at, c) {
            (At::Start | At::KeyOrEnd | At::Colon | At::Value | At::CommaOrEnd, _) if space => self.at,
            (At::Start, '{') | (At::CommaOrEnd, ',') => At::KeyOrEnd,
            (At::KeyOrEnd, '"') => self.begin_string(At::Key),
            (At::KeyOrEnd | At::CommaOrEnd, '}') if self.name.is_some() => At::End,
            (At::Key | At::Name, _) => self.string(c),
            (At::Colon, ':') => At::Value,
            (At::Value, '"') if self.key == "name" && self.name.is_none() => self.begin_string(At::Name),
            (At::Value, _) if self.key == "name" => At::Bad,
            (At::Value, _) => {
                let arguments =
                    matches!(self.key.as_str(), "arguments" | "parameters") && !self.has_arguments;
                self.has_arguments |= arguments;
                let at = if arguments { At::Arguments } else { At::Other };
                self.value(at, c)
            }
            (At::Arguments | At::Other, _) => self.value(self.at, c),
            _ => At::Bad,
        };
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
                self.name = Some(name);
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
            self.feed(c);
            return self.at;
        }
        if at == At::Arguments {
            self.arguments.push(c);
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parser(format: ToolFormat) -> ToolParser {
        ToolParser::new(format, vec!["f".into(), "get \"it\"".into()], false)
    }

    /// Content and calls, from pieces.
    fn run<'a>(
        mut parser: ToolParser,
        pieces: impl IntoIterator<Item = &'a str>,
    ) -> (String, Vec<(String, String)>) {
        let mut found = Vec::new();
        for piece in pieces {
            found.extend(parser.push(piece));
        }
        found.extend(parser.finish());
        let (mut content, mut calls) = (String::new(), Vec::<(String, String)>::new());
        for piece in found {
            match piece {
                ToolPiece::Content(text) => content.push_str(&text),
                ToolPiece::Call(name) => calls.push((name, String::new())),
                ToolPiece::Arguments(text) => calls.last_mut().unwrap().1.push_str(&text),
            }
        }
        assert_eq!(parser.calls(), calls.len());
        (content, calls)
    }

    fn whole(format: ToolFormat, text: &str) -> (String, Vec<(String, String)>) {
        run(parser(format), [text])
    }

    fn call(name: &str, arguments: &str) -> (String, String) {
        (name.to_owned(), arguments.to_owned())
    }

    const TAGGED: &str = "I'll look.\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"}\\\"</tool_call>é\", \"y\": [1, {}]}}\n\
                          </tool_call>\n<tool_call>{\"arguments\": 5 , \"name\": \"g\"}</tool_call>\n";
    const BARE: &str = " {\"name\": \"f\", \"parameters\": {\"q\": \"a;b\"}}; {\"type\": \"function\", \"name\": \"get \\\"it\\\"\"}";
    const LIST: &str = "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": []}}, {\"name\": \"g\", \"arguments\": {}, \"id\": \"x\"}]";

    fn expected(format: ToolFormat) -> (String, Vec<(String, String)>) {
        match format {
            ToolFormat::Tagged => (
                "I'll look.".into(),
                vec![call("f", "{\"x\": \"}\\\"</tool_call>é\", \"y\": [1, {}]}"), call("g", "5")],
            ),
            ToolFormat::Bare => {
                (String::new(), vec![call("f", "{\"q\": \"a;b\"}"), call("get \"it\"", "{}")])
            }
            ToolFormat::List => (String::new(), vec![call("f", "{\"a\": []}"), call("g", "{}")]),
        }
    }

    #[test]
    fn calls_in_every_format() {
        for (format, text) in
            [(ToolFormat::Tagged, TAGGED), (ToolFormat::Bare, BARE), (ToolFormat::List, LIST)]
        {
            assert_eq!(whole(format, text), expected(format));
        }
        assert_eq!(
            whole(ToolFormat::Bare, "Well. <|python_tag|>{\"name\": \"f\", \"parameters\": {}}").1.len(),
            1
        );
        // A missing closing tag, and text after the calls.
        let (content, calls) = whole(
            ToolFormat::Tagged,
            "<tool_call>{\"name\": \"f\"}<tool_call>{\"name\": \"f\"}</tool_call> Done.",
        );
        assert_eq!((content.as_str(), calls.len()), (" Done.", 2));
    }

    #[test]
    fn what_is_no_call_comes_out_as_it_was() {
        for (format, text) in [
            (ToolFormat::Tagged, "a <tool_cal> b <tool"),
            (ToolFormat::Tagged, "<tool_call>{\"nam\": \"f\"}</tool_call>"),
            (ToolFormat::Tagged, "<tool_call>f(1)</tool_call>"),
            (ToolFormat::Tagged, "<tool_call>"),
            (ToolFormat::Bare, "{\"answer\": 1}"),
            (ToolFormat::Bare, "{\"name\": \"unknown\", \"parameters\": {}}"),
            (ToolFormat::Bare, "{\"name\": 5}"),
            (ToolFormat::Bare, "The set {1, 2}; and so on.\n"),
            (ToolFormat::Bare, "  \n"),
            (ToolFormat::List, "[TOOL_CALL] [{\"name\": \"f\"}]"),
            (ToolFormat::List, "[TOOL_CALLS]f{}"),
        ] {
            assert_eq!(whole(format, text), (text.to_owned(), vec![]), "{format:?}");
        }
    }

    #[test]
    fn a_cut_call_keeps_what_there_is() {
        let text = "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": \"lo";
        assert_eq!(whole(ToolFormat::Tagged, text), (String::new(), vec![call("f", "{\"x\": \"lo")]));
        let text = "<tool_call>{\"name\": \"f";
        assert_eq!(whole(ToolFormat::Tagged, text), (text.to_owned(), vec![]));
    }

    #[test]
    fn further_calls_can_be_left_out() {
        let single = ToolParser::new(ToolFormat::Tagged, vec!["f".into()], true);
        let (content, calls) = run(single, [TAGGED]);
        assert_eq!((content.as_str(), calls.len()), ("I'll look.", 1));
    }

    #[test]
    fn formats_are_known_by_their_templates() {
        assert_eq!(ToolFormat::of("...<tool_call>{{ tool.arguments }}"), Some(ToolFormat::Tagged));
        assert_eq!(ToolFormat::of("<tool_call><function=f>{{ arguments }}"), None);
        assert_eq!(ToolFormat::of("'[TOOL_CALLS] ['"), Some(ToolFormat::List));
        assert_eq!(ToolFormat::of("'[TOOL_CALLS]' + name + '[ARGS]'"), None);
        assert_eq!(ToolFormat::of("<|python_tag|>"), Some(ToolFormat::Bare));
        assert_eq!(ToolFormat::of("{{ messages }}"), None);
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_text_is_cut(cuts in prop::collection::vec(0usize..260, 0..12)) {
            for (format, text) in
                [(ToolFormat::Tagged, TAGGED), (ToolFormat::Bare, BARE), (ToolFormat::List, LIST)]
            {
                let mut at: Vec<usize> = cuts.iter().copied().filter(|&cut| text.is_char_boundary(cut)).collect();
                at.extend([0, text.len()]);
                at.sort_unstable();
                let pieces = at.windows(2).map(|pair| &text[pair[0]..pair[1]]);
                prop_assert_eq!(run(parser(format), pieces), expected(format));
            }
        }

        /// Whatever a model writes: no panic, and without a call nothing is lost.
        #[test]
        fn any_text(pieces in prop::collection::vec("(<tool_call>|</tool_call>|\\[TOOL_CALLS\\]|<\\|python_tag\\|>|\\{\"name\": \"f\"|, \"arguments\": |[{}\\[\\]\",:; \\n\\\\a-cé])", 0..30)) {
            let text = pieces.concat();
            for format in [ToolFormat::Tagged, ToolFormat::Bare, ToolFormat::List] {
                let (content, calls) = run(parser(format), pieces.iter().map(String::as_str));
                prop_assert_eq!(whole(format, &text), (content.clone(), calls.clone()));
                let bare = |text: &str| text.split_whitespace().collect::<String>();
                if calls.is_empty() {
                    prop_assert_eq!(bare(&content), bare(&text));
                }
            }
        }
    }
}
