//! Random requests: every kind that a server meets, and what must come of each.

use std::rc::Rc;
use std::time::Duration;

use rand::RngExt;
use rand::rngs::Xoshiro256PlusPlus;
use serde_json::{Value, json};

use super::answer::{Answer, Body, Leave, Reply, Request};
use super::forms::{FORMS, Form};
use super::subject::{Recorded, Subject, message};
use super::trace;

/// Bounds of random requests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Prompt tokens.
    pub(super) input: usize,
    /// Tokens of an answer.
    pub(super) output: usize,
}

/// A request and what must come of it.
#[derive(Debug)]
pub(super) struct Planned {
    /// What it is called in the report.
    pub(super) kind: &'static str,
    pub(super) request: Request,
    expected: Expected,
}

#[derive(Debug)]
enum Expected {
    /// A recorded answer.
    Same(Rc<Recorded>),
    /// Choices within these bounds.
    Choices(Choices),
    /// So many vectors.
    Vectors(usize),
    /// An error object with this status.
    Refusal(u16),
    /// The client leaves, or has its answer before.
    Nothing,
}

#[derive(Debug)]
struct Choices {
    count: usize,
    /// Where it is known.
    prompt_tokens: Option<usize>,
    most_tokens: usize,
    /// Nothing but `most_tokens` may end it.
    exact: bool,
    stop: Option<&'static str>,
    form: Option<Form>,
}

/// Beginnings that prompts share, so that their KV can be shared.
const PREFIXES: u64 = 4;
const PREFIX_TOKENS: usize = 64;

const STOPS: [&str; 4] = ["e", " the", ".", "t1"];

/// Draws a request for a model.
pub(super) fn draw(subject: &Subject, limits: Limits, random: &mut Xoshiro256PlusPlus) -> Planned {
    if random.random_ratio(1, 12) {
        return invalid(subject, random);
    }
    if random.random_ratio(3, 10)
        && let Some(recorded) = pick(&subject.recorded, random)
    {
        let mut request = recorded.request.clone();
        if subject.generates && random.random() {
            request = request.streamed();
        }
        return Planned { kind: "recorded", request, expected: Expected::Same(recorded.clone()) };
    }
    if !subject.generates {
        return embedding(subject, limits, random);
    }
    match random.random_range(0..10) {
        0..2 => leaving(subject, limits, random),
        2..4 if subject.text => formed(subject, random),
        4..6 if subject.chat => chat(subject, limits, random),
        _ => completion(subject, limits, random),
    }
}

pub(super) fn pick<'a, T>(from: &'a [T], random: &mut Xoshiro256PlusPlus) -> Option<&'a T> {
    if from.is_empty() { None } else { from.get(random.random_range(0..from.len())) }
}

/// A length between 1 and `most`; every order of magnitude is as likely.
fn length(most: usize, random: &mut Xoshiro256PlusPlus) -> usize {
    let exponent = random.random_range(0.0..=(most.max(1) as f64).ln());
    (exponent.exp() as usize).clamp(1, most.max(1))
}

/// A prompt, often with a beginning that others have too.
fn prompt(subject: &Subject, tokens: usize, random: &mut Xoshiro256PlusPlus) -> Vec<u32> {
    let seed = random.random_range(1 << 32..u64::MAX);
    let mut prompt = subject.prompt(seed, tokens);
    if tokens > PREFIX_TOKENS && random.random() {
        let prefix = subject.prompt(1000 + random.random_range(0..PREFIXES), PREFIX_TOKENS);
        prompt.splice(..PREFIX_TOKENS, prefix);
    }
    prompt
}

/// Options that change what is sampled.
fn sampling(body: &mut Value, random: &mut Xoshiro256PlusPlus) {
    if random.random() {
        return;
    }
    body["temperature"] = json!(random.random_range(0.1..1.5));
    for (name, value) in [
        ("top_p", json!(random.random_range(0.5..1.0))),
        ("top_k", json!(random.random_range(1..50))),
        ("min_p", json!(random.random_range(0.0..0.2))),
        ("frequency_penalty", json!(random.random_range(-1.0..1.0))),
        ("repetition_penalty", json!(random.random_range(0.8..1.3))),
        ("seed", json!(random.random::<u32>())),
    ] {
        if random.random_ratio(1, 3) {
            body[name] = value;
        }
    }
}

/// Choices, streaming: what generating requests share.
fn generating(
    kind: &'static str,
    mut request: Request,
    mut choices: Choices,
    random: &mut Xoshiro256PlusPlus,
) -> Planned {
    if let Body::Json(body) = &mut request.body {
        if choices.form.is_none() {
            sampling(body, random);
        }
        if random.random_ratio(1, 4) {
            choices.count = random.random_range(2..=3);
            body["n"] = choices.count.into();
        }
    }
    if random.random() {
        request = request.streamed();
    }
    Planned { kind, request, expected: Expected::Choices(choices) }
}

fn completion(subject: &Subject, limits: Limits, random: &mut Xoshiro256PlusPlus) -> Planned {
    let wanted = (length(limits.input, random), length(limits.output, random));
    let (input, output) = trace::fit(wanted.0, wanted.1, subject.context);
    let mut body = subject.completion(json!(prompt(subject, input, random)), output);
    let mut choices = Choices {
        count: 1,
        prompt_tokens: Some(input),
        most_tokens: output,
        exact: false,
        stop: None,
        form: None,
    };
    if random.random() {
        body["ignore_eos"] = true.into();
        choices.exact = true;
    }
    if random.random_ratio(1, 4) {
        body["logprobs"] = 2.into();
    }
    if subject.text && random.random_ratio(1, 4) {
        choices.stop = pick(&STOPS, random).copied();
        choices.exact = false;
        body["stop"] = json!(choices.stop);
    }
    generating("completion", Request::new("/v1/completions", body), choices, random)
}

fn chat(subject: &Subject, limits: Limits, random: &mut Xoshiro256PlusPlus) -> Planned {
    // Words that are a few tokens at most in any vocabulary; a quarter of the context leaves room for the template.
    let words = length((limits.input / 8).min(subject.context / 32), random);
    let text = (0..words).map(|_| format!("{:x}", random.random::<u16>())).collect::<Vec<_>>().join(" ");
    let output = length(limits.output.min(subject.context / 4), random);
    let body = json!({
        "model": subject.name, "messages": message(&text), "max_tokens": output, "return_token_ids": true,
    });
    let choices =
        Choices { count: 1, prompt_tokens: None, most_tokens: output, exact: false, stop: None, form: None };
    generating("chat", Request::new("/v1/chat/completions", body), choices, random)
}

fn formed(subject: &Subject, random: &mut Xoshiro256PlusPlus) -> Planned {
    let (input, output) = trace::fit(length(32, random), 80, subject.context);
    let mut body = subject.completion(json!(prompt(subject, input, random)), output);
    body["temperature"] = 1.into();
    let form = pick(&FORMS, random).copied().unwrap_or(Form::Object);
    form.ask(&mut body);
    let choices = Choices {
        count: 1,
        prompt_tokens: Some(input),
        most_tokens: output,
        exact: false,
        stop: None,
        form: Some(form),
    };
    generating("constrained", Request::new("/v1/completions", body), choices, random)
}

fn leaving(subject: &Subject, limits: Limits, random: &mut Xoshiro256PlusPlus) -> Planned {
    let (input, output) = trace::fit(length(limits.input, random), 8 * limits.output, subject.context);
    let mut body = subject.completion(json!(prompt(subject, input, random)), output);
    body["ignore_eos"] = true.into();
    body["n"] = random.random_range(1..=2).into();
    let mut request = Request::new("/v1/completions", body);
    if random.random() {
        request = request.streamed();
        request.leave = Some(Leave::Events(length(limits.output, random)));
    } else {
        request.leave = Some(Leave::After(Duration::from_millis(length(500, random) as u64)));
    }
    Planned { kind: "cancelled", request, expected: Expected::Nothing }
}

fn embedding(subject: &Subject, limits: Limits, random: &mut Xoshiro256PlusPlus) -> Planned {
    let count = random.random_range(1..=4);
    let most = limits.input.min(subject.context);
    let inputs: Vec<Vec<u32>> =
        (0..count).map(|_| subject.prompt(random.random(), length(most, random))).collect();
    let mut body = json!({ "model": subject.name, "input": inputs });
    if random.random_ratio(1, 4) {
        body["encoding_format"] = "base64".into();
    }
    let mut request = Request::new("/v1/embeddings", body);
    if random.random_ratio(1, 8) {
        request.leave = Some(Leave::After(Duration::from_millis(length(50, random) as u64)));
        return Planned { kind: "cancelled", request, expected: Expected::Nothing };
    }
    Planned { kind: "embedding", request, expected: Expected::Vectors(count) }
}

fn invalid(subject: &Subject, random: &mut Xoshiro256PlusPlus) -> Planned {
    let name = &subject.name;
    let wrong_task = if subject.generates {
        Request::new("/v1/embeddings", json!({ "model": name, "input": [5] }))
    } else {
        Request::new("/v1/completions", json!({ "model": name, "prompt": [5] }))
    };
    let completion = |body: Value| Request::new("/v1/completions", body);
    let broken = Request { body: Body::Text("{\"model\": \"a\", \"prompt\": "), ..completion(Value::Null) };
    let cases = [
        (completion(json!({ "model": "nobody deployed this", "prompt": [5] })), 404),
        (completion(json!({ "model": name, "prompt": [5], "temperature": -1 })), 400),
        (completion(json!({ "model": name, "prompt": vec![5; subject.context + 1] })), 400),
        (completion(json!({ "model": name, "prompt": [] })), 400),
        (completion(json!({ "model": name, "prompt": [4_000_000_000u32] })), 400),
        (Request::new("/v1/chat/completions", json!({ "model": name, "messages": "hello" })), 400),
        (Request::new("/v1/nothing", json!({})), 404),
        (wrong_task, 400),
        (broken, 400),
    ];
    let (request, status) = cases[random.random_range(0..cases.len())].clone();
    Planned { kind: "invalid", request, expected: Expected::Refusal(status) }
}

impl Planned {
    /// What is wrong with the reply; `None` if it is as it must be.
    pub(super) fn judge(&self, reply: &Reply) -> Option<String> {
        let problem = match (&self.expected, reply) {
            (Expected::Refusal(status), Reply::Refused(got, Some(_))) if got == status => return None,
            (Expected::Nothing, Reply::Left | Reply::Answer(_)) => return None,
            (Expected::Same(recorded), Reply::Answer(answer)) if answer.same(&recorded.answer) => {
                return None;
            }
            (Expected::Same(_), Reply::Answer(_)) => "not the answer that it had alone".to_owned(),
            (Expected::Choices(choices), Reply::Answer(answer)) => choices.judge(answer)?,
            (Expected::Vectors(count), Reply::Answer(answer)) if answer.vectors.len() == *count => {
                return None;
            }
            (_, Reply::Refused(status, message)) => {
                format!("status {status}: {}", message.as_deref().unwrap_or("no error object"))
            }
            (_, Reply::Answer(_)) => "an answer to something else".to_owned(),
            (_, Reply::Left) => "left before its answer".to_owned(),
        };
        Some(problem)
    }
}

impl Choices {
    fn judge(&self, answer: &Answer) -> Option<String> {
        if answer.choices.len() != self.count {
            return Some(format!("{} choices instead of {}", answer.choices.len(), self.count));
        }
        if let Some(tokens) = self.prompt_tokens
            && answer.usage["prompt_tokens"] != tokens
        {
            return Some(format!("the usage is {} for {tokens} prompt tokens", answer.usage));
        }
        answer.choices.iter().find_map(|choice| {
            let tokens = choice.tokens.len();
            let reason = choice.reason.as_deref();
            match reason {
                Some("length") if tokens == self.most_tokens => {}
                Some("stop") if !self.exact && tokens <= self.most_tokens => {}
                _ => return Some(format!("{tokens} of {} tokens, ended by {reason:?}", self.most_tokens)),
            }
            if let Some(stop) = self.stop.filter(|stop| choice.text.contains(stop)) {
                return Some(format!("{:?} holds the stop string {stop:?}", choice.text));
            }
            let form = self.form.filter(|form| reason == Some("stop") && !form.fits(&choice.text))?;
            Some(format!("{:?} is not of the form {form:?}", choice.text))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::SeedableRng;

    use super::super::answer::Choice;
    use super::*;

    const LIMITS: Limits = Limits { input: 200, output: 20 };

    fn subject(generates: bool, text: bool) -> Subject {
        let request = Request::new("/v1/completions", json!({ "model": "m" }));
        Subject {
            name: "m".to_owned(),
            context: 128,
            generates,
            text,
            chat: text,
            vocabulary: 100,
            recorded: vec![Rc::new(Recorded { request, answer: Answer::default() })],
        }
    }

    fn drawn(subject: &Subject) -> BTreeMap<&'static str, Vec<Planned>> {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(1);
        let mut kinds: BTreeMap<_, Vec<Planned>> = BTreeMap::new();
        for _ in 0..1000 {
            let planned = draw(subject, LIMITS, &mut random);
            kinds.entry(planned.kind).or_default().push(planned);
        }
        kinds
    }

    #[test]
    fn each_model_gets_every_kind_that_it_can_answer() {
        let kinds = |subject| drawn(&subject).into_keys().collect::<Vec<_>>();
        let all = ["cancelled", "chat", "completion", "constrained", "invalid", "recorded"];
        assert_eq!(kinds(subject(true, true)), all);
        assert_eq!(kinds(subject(true, false)), ["cancelled", "completion", "invalid", "recorded"]);
        assert_eq!(kinds(subject(false, true)), ["cancelled", "embedding", "invalid", "recorded"]);
    }

    #[test]
    fn prompts_fit_the_model_and_often_begin_alike() {
        let mut beginnings: BTreeMap<Vec<u64>, usize> = BTreeMap::new();
        for planned in &drawn(&subject(true, true))["completion"] {
            let Body::Json(body) = &planned.request.body else { panic!("{planned:?}") };
            let prompt: Vec<u64> = serde_json::from_value(body["prompt"].clone()).unwrap();
            let output = body["max_tokens"].as_u64().unwrap() as usize;
            assert!((1..=LIMITS.output).contains(&output) && prompt.len() + output <= 128, "{body}");
            assert!(prompt.iter().all(|id| (3..100).contains(id)));
            if prompt.len() > PREFIX_TOKENS {
                *beginnings.entry(prompt[..PREFIX_TOKENS].to_vec()).or_default() += 1;
            }
        }
        let shared: Vec<&usize> = beginnings.values().filter(|count| **count > 1).collect();
        assert_eq!(shared.len() as u64, PREFIXES, "{shared:?}");
    }

    #[test]
    fn answers_are_judged_by_what_was_asked_for() {
        let answer = |tokens: usize, reason: &str, text: &str| {
            let choice = Choice { text: text.into(), tokens: vec![5; tokens], reason: Some(reason.into()) };
            Answer { choices: vec![choice], vectors: vec![], usage: json!({ "prompt_tokens": 9 }) }
        };
        let planned = |exact, stop, form| Planned {
            kind: "completion",
            request: Request::new("/v1/completions", Value::Null),
            expected: Expected::Choices(Choices {
                count: 1,
                prompt_tokens: Some(9),
                most_tokens: 4,
                exact,
                stop,
                form,
            }),
        };
        let judge = |planned: &Planned, answer: Answer| planned.judge(&Reply::Answer(answer));
        let free = planned(false, Some("x"), Some(Form::Choice));
        assert_eq!(judge(&free, answer(2, "stop", "yes")), None);
        assert_eq!(judge(&free, answer(4, "length", "ye")), None);
        for (wrong, word) in [
            (answer(5, "length", ""), "5 of 4 tokens"),
            (answer(3, "length", ""), "3 of 4 tokens"),
            (answer(4, "length", "a x"), "stop string"),
            (answer(2, "stop", "ye"), "Choice"),
            (Answer { choices: vec![], ..answer(4, "length", "") }, "0 choices"),
            (Answer { usage: Value::Null, ..answer(4, "length", "") }, "usage"),
        ] {
            let problem = judge(&free, wrong).unwrap();
            assert!(problem.contains(word), "{word}: {problem}");
        }
        let exact = planned(true, None, None);
        assert_eq!(judge(&exact, answer(4, "length", "")), None);
        assert!(judge(&exact, answer(2, "stop", "")).is_some());
        let refused = |status, message: Option<&str>| Reply::Refused(status, message.map(str::to_owned));
        assert!(exact.judge(&refused(503, Some("busy"))).unwrap().contains("503: busy"));
        assert!(exact.judge(&Reply::Left).is_some());
        let invalid = Planned { expected: Expected::Refusal(404), ..exact };
        assert_eq!(invalid.judge(&refused(404, Some("no such model"))), None);
        assert!(invalid.judge(&refused(404, None)).is_some(), "without an error object");
        assert!(invalid.judge(&refused(400, Some("no such model"))).is_some());
        assert!(judge(&invalid, answer(4, "length", "")).is_some());
    }
}
