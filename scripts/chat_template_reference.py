"""Renders chat templates with Jinja2 as transformers' apply_chat_template does, as a reference for ours.

    python3 scripts/chat_template_reference.py TEMPLATES > reference.json
    TANGRAM_TEMPLATE_REFERENCE=reference.json cargo test -p tangram-gateway --lib reference -- --nocapture

TEMPLATES is a folder of *.jinja files, such as vendor/llama.cpp/models/templates in the source package of
llama-cpp-python. Needs the jinja2 package.
"""

import datetime
import json
import pathlib
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox

CALL = {"id": "abcdef123", "type": "function",
        "function": {"name": "weather", "arguments": {"place": "Zürich", "days": 2}}}
TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "Tells the <weather>.",
    "parameters": {"type": "object", "required": ["place"], "properties": {
        "place": {"type": "string", "description": "Where"}, "days": {"type": "integer"}}}}}]
USER = {"role": "user", "content": "What's the weather?  "}
CASES = {
    "user": ([USER], None),
    "turns": ([{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Dry."},
               {"role": "user", "content": "And <now> & é?"}], None),
    "tools": ([{"role": "system", "content": "Be brief."}, USER], TOOLS),
    "called": ([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "abcdef123", "name": "weather", "content": "{\"sun\": true}"}], TOOLS),
}


class Generation(jinja2.ext.Extension):
    """{% generation %} only marks the assistant's part."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller):
        return caller()


class Raised(jinja2.exceptions.TemplateError):
    """The template refuses its input."""


def raise_exception(message):
    raise Raised(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = raise_exception
    # In UTC, as ours.
    env.globals["strftime_now"] = lambda f: datetime.datetime.now(datetime.timezone.utc).strftime(f)
    return env


def main():
    reference = []
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        for name, (messages, tools) in CASES.items():
            case = {"template": path.stem, "case": name, "source": source, "messages": messages, "tools": tools}
            try:
                case["text"] = environment().from_string(source).render(
                    messages=messages, tools=tools, documents=None, add_generation_prompt=True,
                    bos_token="<s>", eos_token="</s>")
            except Exception as error:  # The template refuses the case, or Jinja2 cannot render it.
                case["error"] = str(error)
                case["raised"] = isinstance(error, Raised)
            reference.append(case)
    json.dump(reference, sys.stdout, ensure_ascii=False)


if __name__ == "__main__":
    main()
