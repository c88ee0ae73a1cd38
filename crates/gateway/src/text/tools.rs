//! Finds tool calls in generated text that arrives in pieces, in the formats of the common chat templates.
//!
//! Text that might still become a call is held back; text that turns out to be none is given out as it was. Arguments
//! in JSON are passed on as the model wrote them, valid or not: the client has to check them anyway.

mod markup;
mod object;

use std::sync::Arc;

use serde_json::Value as Json;

use markup::{FUNCTION, MarkupScanner};
use object::ObjectScanner;

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
    /// Mistral since 2025: `[TOOL_CALLS]name[ARGS]{...}`, any number of them, perhaps with `[CALL_ID]` and an id
    /// before the arguments.
    Named,
    /// Qwen3-Coder: `<tool_call><function=name><parameter=key>value</parameter>...</function></tool_call>`, any number
    /// of them, of which the model sometimes leaves out the outermost tags.
    Markup,
}

impl ToolFormat {
    /// The format of a chat template, if it has one of these.
    pub(crate) fn of(template: &str) -> Option<Self> {
        let has = |text: &str| template.contains(text);
        // A template that puts something else between the same tags.
        if has("<arg_key>") {
            return None;
        }
        if has("<function=") {
            return has("<parameter=").then_some(ToolFormat::Markup);
        }
        if has("[TOOL_CALLS]") {
            return Some(if has("[ARGS]") { ToolFormat::Named } else { ToolFormat::List });
        }
        if has("<tool_call>") && has("arguments") {
            return Some(ToolFormat::Tagged);
        }
        (has("<|python_tag|>") || has("\"parameters\": dictionary")).then_some(ToolFormat::Bare)
    }

    /// What announces a call.
    pub(crate) const fn marker(self) -> &'static str {
        match self {
            ToolFormat::Tagged | ToolFormat::Markup => "<tool_call>",
            ToolFormat::Bare => "<|python_tag|>",
            ToolFormat::List | ToolFormat::Named => "[TOOL_CALLS]",
        }
    }

    /// What may end a call; empty if nothing does.
    pub(crate) const fn end_marker(self) -> &'static str {
        match self {
            ToolFormat::Tagged | ToolFormat::Markup => "</tool_call>",
            ToolFormat::Bare | ToolFormat::List | ToolFormat::Named => "",
        }
    }

    /// Texts that are tokens of their own in some vocabularies and must not be left out of the answer.
    pub(crate) const fn special(self) -> &'static [&'static str] {
        match self {
            ToolFormat::Tagged | ToolFormat::Markup => &["<tool_call>", "</tool_call>"],
            ToolFormat::Bare => &["<|python_tag|>"],
            ToolFormat::List => &["[TOOL_CALLS]"],
            ToolFormat::Named => &["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"],
        }
    }

    /// The key under which a call has its arguments.
    pub(crate) const fn arguments_key(self) -> &'static str {
        match self {
            ToolFormat::Bare => "parameters",
            _ => "arguments",
        }
    }
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Function {
    /// What it is called.
    pub(crate) name: String,
    /// JSON schema of its arguments.
    pub(crate) parameters: Json,
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
    functions: Arc<[Function]>,
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
    Call { scanner: Box<dyn Scan>, raw: String },
    /// After the call's object.
    Closed,
}

/// Reads one call character by character.
trait Scan: std::fmt::Debug + Send {
    /// Takes the next character. None follow after [`Progress::End`] or [`Progress::Bad`].
    fn feed(&mut self, c: char);

    /// What is known of the call.
    fn call(&mut self) -> &mut Call;
}

/// What is known of a call while it is read.
#[derive(Debug, Default)]
struct Call {
    progress: Progress,
    name: Option<String>,
    /// The name was given out.
    announced: bool,
    /// Arguments read and not taken yet.
    arguments: String,
    has_arguments: bool,
}

/// How far a call is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Progress {
    #[default]
    Going,
    /// It is complete and has a name.
    End,
    /// It is no call.
    Bad,
}

impl ToolParser {
    /// A parser for answers in `format`, which may call these functions.
    pub(crate) fn new(format: ToolFormat, functions: Vec<Function>, single: bool) -> Self {
        let (held, state) = (String::new(), State::Start);
        ToolParser { format, functions: functions.into(), single, held, state, calls: 0 }
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
                    self.state = self.object(String::new());
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
                let markup = self.format == ToolFormat::Markup;
                if text.is_empty() || (markup && text.len() < FUNCTION.len() && FUNCTION.starts_with(text)) {
                    return false;
                }
                // The marker is given back with what follows it if that is no call.
                let raw = self.held.len() - text.len();
                let raw = self.format.marker().to_owned() + &self.held[..raw];
                let text = text.to_owned();
                if markup && text.starts_with(FUNCTION) {
                    self.state = self.markup(raw);
                } else if text.starts_with('{') && self.format != ToolFormat::Named {
                    self.state = self.object(raw);
                } else if self.format == ToolFormat::Named {
                    self.state = State::Call { scanner: Box::new(ObjectScanner::named()), raw };
                } else {
                    emit(pieces, self.format.marker().to_owned());
                    self.state = State::Content;
                    return true;
                }
                self.held = text;
                true
            }
            State::Call { .. } => {
                self.call(pieces);
                true
            }
            State::Closed => self.closed(),
        }
    }

    fn object(&self, raw: String) -> State {
        State::Call { scanner: Box::<ObjectScanner>::default(), raw }
    }

    fn markup(&self, raw: String) -> State {
        State::Call { scanner: Box::new(MarkupScanner::new(self.functions.clone())), raw }
    }

    /// Gives out text up to the next marker, less the white space before it.
    fn content(&mut self, pieces: &mut Vec<ToolPiece>) -> bool {
        let marker = self.format.marker();
        let function = Some(FUNCTION).filter(|_| self.format == ToolFormat::Markup);
        let at = self.held.find(marker);
        let bare = function.and_then(|function| self.held.find(function));
        if let Some(bare) = bare.filter(|&bare| at.is_none_or(|at| bare < at)) {
            emit(pieces, self.held[..bare].trim_end().to_owned());
            self.held.drain(..bare);
            self.state = self.markup(String::new());
            return true;
        }
        if let Some(at) = at {
            emit(pieces, self.held[..at].trim_end().to_owned());
            self.held.drain(..at + marker.len());
            self.state = State::Opened;
            return true;
        }
        let begun =
            |marker: &str| (1..marker.len()).rev().find(|&length| self.held.ends_with(&marker[..length]));
        let begun = begun(marker).max(function.and_then(begun));
        let text = &self.held[..self.held.len() - begun.unwrap_or(0)];
        let rest = self.held.split_off(text.trim_end().len());
        emit(pieces, std::mem::replace(&mut self.held, rest));
        false
    }

    /// Reads on in a call.
    fn call(&mut self, pieces: &mut Vec<ToolPiece>) {
        let State::Call { scanner, raw } = &mut self.state else { return };
        let mut used = self.held.len();
        for (at, character) in self.held.char_indices() {
            scanner.feed(character);
            let call = scanner.call();
            // What follows the name, or is no call any more, is looked at anew: how the text was cut must not matter.
            let named = call.name.is_some() && !call.announced;
            if named || call.progress != Progress::Going {
                let bad = call.progress == Progress::Bad && call.announced;
                used = if bad { at } else { at + character.len_utf8() };
                break;
            }
        }
        let text: String = self.held.drain(..used).collect();
        let call = scanner.call();
        if !call.announced {
            raw.push_str(&text);
        }
        let functions = &self.functions;
        let known = |name: &String| functions.iter().any(|function| function.name == *name);
        let unknown = |name: &String| self.format == ToolFormat::Bare && !known(name);
        let bad = call.progress == Progress::Bad || call.name.as_ref().is_some_and(unknown);
        if bad && !call.announced {
            let raw = std::mem::take(raw);
            self.state = State::Content;
            emit(pieces, raw);
            return;
        }
        let Some(name) = &call.name else { return };
        let announce = !std::mem::replace(&mut call.announced, true);
        self.calls += usize::from(announce);
        if call.progress == Progress::End && !call.has_arguments {
            call.arguments.push_str("{}");
        }
        let arguments = std::mem::take(&mut call.arguments);
        if !self.single || self.calls == 1 {
            pieces.extend(announce.then(|| ToolPiece::Call(name.clone())));
            pieces.extend(Some(arguments).filter(|text| !text.is_empty()).map(ToolPiece::Arguments));
        }
        raw.clear();
        if call.progress != Progress::Going {
            self.state = State::Closed;
        }
    }

    /// Passes over what separates calls.
    fn closed(&mut self) -> bool {
        let text = match self.format {
            ToolFormat::Tagged | ToolFormat::Markup | ToolFormat::Named => self.held.trim_start(),
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
        if matches!(self.format, ToolFormat::Bare | ToolFormat::List) && text.starts_with('{') {
            self.held = text.to_owned();
            self.state = self.object(String::new());
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn functions() -> Vec<Function> {
        let properties = serde_json::json!({
            "text": {"type": "string"}, "n": {"type": "integer"}, "on": {"type": "boolean"},
            "list": {"type": "array"}, "either": {"type": ["string", "null"]}, "unit": {"enum": ["C", "F"]},
            "any": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        });
        let function = |name: &str, parameters| Function { name: name.into(), parameters };
        vec![function("f", serde_json::json!({"properties": properties})), function("get \"it\"", Json::Null)]
    }

    fn parser(format: ToolFormat) -> ToolParser {
        ToolParser::new(format, functions(), false)
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

    const NAMED: &str =
        "Well.\n[TOOL_CALLS]f[ARGS]{\"a\": \"}[ARGS]{\"}\n[TOOL_CALLS] g [CALL_ID]x1y2z3[ARGS]{\"b\": [{}]}";
    const MARKUP: &str = "Now.\n\n<tool_call>\n<function=f>\n<parameter=text>\nline \"1\"\n\n</param>\n</parameter>\n\
                          <parameter=n>\n5\n</parameter>\n<parameter=on>True</parameter>\n</function>\n</tool_call>\n\
                          <tool_call>\n<function=g>\n<parameter=x>\n1é\n</parameter>\n</function>\n</tool_call>";

    /// All formats with an answer.
    const ANSWERS: [(ToolFormat, &str); 5] = [
        (ToolFormat::Tagged, TAGGED),
        (ToolFormat::Bare, BARE),
        (ToolFormat::List, LIST),
        (ToolFormat::Named, NAMED),
        (ToolFormat::Markup, MARKUP),
    ];

    fn expected(format: ToolFormat) -> (String, Vec<(String, String)>) {
        match format {
            ToolFormat::Named => {
                ("Well.".into(), vec![call("f", "{\"a\": \"}[ARGS]{\"}"), call("g", "{\"b\": [{}]}")])
            }
            ToolFormat::Markup => (
                "Now.".into(),
                vec![
                    call("f", "{\"text\": \"line \\\"1\\\"\\n\\n</param>\", \"n\": 5, \"on\": true}"),
                    call("g", "{\"x\": \"1é\"}"),
                ],
            ),
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
        for (format, text) in ANSWERS {
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
            (ToolFormat::Named, "[TOOL_CALLS] two words{}"),
            (ToolFormat::Named, "[TOOL_CALLS]{}"),
            (ToolFormat::Named, "[TOOL_CALLS]f[ARGS]"),
            (ToolFormat::Markup, "<tool_call>f(1)</tool_call>"),
            (ToolFormat::Markup, "<tool_call>\n<function=>\n</function>"),
            (ToolFormat::Markup, "a <function b <funct"),
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
    fn values_in_tags_have_the_types_of_the_schema() {
        let value = |key: &str, value: &str| {
            let text = format!("<function=f>\n<parameter={key}>\n{value}\n</parameter>\n</function>");
            let (content, calls) = whole(ToolFormat::Markup, &text);
            assert_eq!((content.as_str(), calls.len()), ("", 1));
            let arguments: Json = serde_json::from_str(&calls[0].1).unwrap();
            arguments[key].clone()
        };
        use serde_json::json;
        assert_eq!(value("text", "5"), json!("5"));
        assert_eq!(value("text", "\n  a\n"), json!("\n  a\n"));
        assert_eq!(value("n", " -7 "), json!(-7));
        assert_eq!(value("n", "seven"), json!("seven"));
        assert_eq!(value("on", "False"), json!(false));
        assert_eq!(value("list", "[1, {\"a\": \"</p>\"}]"), json!([1, {"a": "</p>"}]));
        assert_eq!(value("either", "5"), json!("5"));
        assert_eq!(value("either", "None"), json!(null));
        assert_eq!(value("unit", "C"), json!("C"));
        assert_eq!(value("any", "5"), json!(5));
        assert_eq!(value("not in the schema", "{}"), json!("{}"));
        // No parameters, and JSON in the tags of the other format.
        assert_eq!(
            whole(ToolFormat::Markup, "<tool_call><function=f></function></tool_call>").1,
            [call("f", "{}")]
        );
        let json = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
        assert_eq!(whole(ToolFormat::Markup, json), (String::new(), vec![call("f", "{}")]));
    }

    #[test]
    fn text_in_tags_is_given_out_as_it_comes() {
        let mut parser = parser(ToolFormat::Markup);
        parser.push("<tool_call><function=f><parameter=text>\none\n");
        assert_eq!(parser.push("two </para"), [ToolPiece::Arguments("\\ntwo ".into())]);
        assert_eq!(parser.push("meter>"), [ToolPiece::Arguments("\"".into())]);
    }

    #[test]
    fn further_calls_can_be_left_out() {
        let single = ToolParser::new(ToolFormat::Tagged, functions(), true);
        let (content, calls) = run(single, [TAGGED]);
        assert_eq!((content.as_str(), calls.len()), ("I'll look.", 1));
    }

    #[test]
    fn formats_are_known_by_their_templates() {
        assert_eq!(ToolFormat::of("...<tool_call>{{ tool.arguments }}"), Some(ToolFormat::Tagged));
        assert_eq!(ToolFormat::of("<tool_call><function=f>{{ arguments }}"), None);
        assert_eq!(
            ToolFormat::of("<tool_call>\n<function=' ~ n ~ '>\n<parameter="),
            Some(ToolFormat::Markup)
        );
        assert_eq!(ToolFormat::of("'[TOOL_CALLS] ['"), Some(ToolFormat::List));
        assert_eq!(ToolFormat::of("'[TOOL_CALLS]' + name + '[ARGS]'"), Some(ToolFormat::Named));
        assert_eq!(ToolFormat::of("<|python_tag|>"), Some(ToolFormat::Bare));
        assert_eq!(ToolFormat::of("{{ messages }}"), None);
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_text_is_cut(cuts in prop::collection::vec(0usize..260, 0..12)) {
            for (format, text) in ANSWERS {
                let mut at: Vec<usize> = cuts.iter().copied().filter(|&cut| text.is_char_boundary(cut)).collect();
                at.extend([0, text.len()]);
                at.sort_unstable();
                let pieces = at.windows(2).map(|pair| &text[pair[0]..pair[1]]);
                prop_assert_eq!(run(parser(format), pieces), expected(format));
            }
        }

        /// Whatever a model writes: no panic, and without a call nothing is lost.
        #[test]
        fn any_text(pieces in prop::collection::vec("(<tool_call>|</tool_call>|<function=f>|<parameter=text>|</parameter>|</function>|\\[ARGS\\]|\\[TOOL_CALLS\\]|<\\|python_tag\\|>|\\{\"name\": \"f\"|, \"arguments\": |[{}\\[\\]\",:; \\n\\\\a-cé])", 0..30)) {
            let text = pieces.concat();
            for (format, _) in ANSWERS {
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
