#!/usr/bin/env python3
"""Runs the stock `openai` client against a server and checks what comes back.

Needs `pip install openai`. Exits with 0 if everything is as OpenAI's API (and vLLM's extensions of it) have it, with 1
and one line per mismatch otherwise.

    openai_client_check.py --base-url http://127.0.0.1:8000/v1 --model CHAT --embedding-model EMBED [--api-key KEY]
"""

import argparse
import base64
import math
import struct
import sys
import traceback

import openai

FAILURES: list[str] = []
SECTION = ""


def check(condition: bool, what: str) -> None:
    """Notes a mismatch and goes on, so that one run shows all of them."""
    if not condition:
        FAILURES.append(f"{SECTION}: {what}")


def same(left: object, right: object, what: str) -> None:
    check(left == right, f"{what}: {left!r} is not {right!r}")


def expect_error(kind: type, param: str | None, what: str, call) -> None:
    try:
        call()
    except kind as error:
        body = error.body
        good = isinstance(body, dict) and {"message", "type", "param", "code"} <= body.keys()
        check(good, f"{what}: the error object is {body!r}")
        if good:
            check(bool(body["message"]), f"{what}: the message is empty")
            if param is not None:
                same(body["param"], param, f"{what}: param")
    except Exception as error:  # any other outcome is a mismatch, whatever it is
        check(False, f"{what}: expected {kind.__name__}, got {type(error).__name__}: {error}")
    else:
        check(False, f"{what}: expected {kind.__name__}, got an answer")


def models(client: openai.OpenAI, args: argparse.Namespace) -> None:
    names = [model.id for model in client.models.list()]
    for name in (args.model, args.embedding_model):
        check(name in names, f"{name} is not among {names}")
        same(client.models.retrieve(name).id, name, "retrieved model")
    expect_error(openai.NotFoundError, None, "unknown model", lambda: client.models.retrieve("no-such-model"))


def chat(client: openai.OpenAI, args: argparse.Namespace) -> None:
    request = dict(
        model=args.model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=24,
        temperature=0,
    )
    raw = client.chat.completions.with_raw_response.create(**request, logprobs=True, top_logprobs=2)
    for header in ("server-timing", "x-tangram-bytes-loaded", "x-tangram-bytes-reused", "x-request-id"):
        check(header in raw.headers, f"the header {header} is missing")
    whole = raw.parse()
    same(whole.object, "chat.completion", "object")
    same(whole.model, args.model, "model")
    same(len(whole.choices), 1, "number of choices")
    choice = whole.choices[0]
    same(choice.message.role, "assistant", "role")
    check(choice.finish_reason in ("stop", "length"), f"finish_reason {choice.finish_reason!r}")
    check(isinstance(choice.message.content, str), f"content {choice.message.content!r}")
    usage = whole.usage
    same(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens, "total_tokens")
    check(0 < usage.completion_tokens <= 24, f"completion_tokens {usage.completion_tokens}")
    check("load_ms" in (usage.model_extra or {}).get("tangram", {}), "usage has no tangram.load_ms")
    entries = choice.logprobs.content
    same(len(entries), usage.completion_tokens, "number of logprobs")
    for entry in entries:
        check(entry.logprob <= 0 and len(entry.top_logprobs) == 2, f"logprob entry {entry!r}")
        same(entry.top_logprobs[0].token, entry.token, "the most likely token with temperature 0")

    # The same as a stream.
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    same(chunks[0].choices[0].delta.role, "assistant", "role of the first chunk")
    same(chunks[-1].choices, [], "choices of the last chunk")
    same(chunks[-1].usage.completion_tokens, usage.completion_tokens, "completion_tokens of the stream")
    check(all(chunk.usage is None for chunk in chunks[:-1]), "usage before the last chunk")
    same(len({chunk.id for chunk in chunks}), 1, "number of ids in a stream")
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    same("".join(delta.delta.content or "" for delta in deltas), choice.message.content, "streamed text")
    same([delta.finish_reason for delta in deltas if delta.finish_reason], [choice.finish_reason], "finish reasons")
    same(deltas[-1].finish_reason, choice.finish_reason, "finish_reason of the last delta")
    check(len(deltas) > 2, "the stream came in one piece")
    without_usage = list(client.chat.completions.create(**request, stream=True))
    check(all(chunk.usage is None and chunk.choices for chunk in without_usage), "usage nobody asked for")

    # Several choices, a stop string, content in parts.
    several = client.chat.completions.create(**{**request, "temperature": 1}, n=2, seed=1)
    same([choice.index for choice in several.choices], [0, 1], "indexes with n=2")
    text = choice.message.content
    if len(text) > 6:
        stop = text[3:5]
        stopped = client.chat.completions.create(**request, stop=[stop])
        same(stopped.choices[0].message.content, text[: text.find(stop)], "text before the stop string")
        same(stopped.choices[0].finish_reason, "stop", "finish_reason after a stop string")
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    in_parts = client.chat.completions.create(**{**request, "messages": parts})
    same(in_parts.choices[0].message.content, text, "text for content in parts")


def completions(client: openai.OpenAI, args: argparse.Namespace) -> None:
    request = dict(model=args.model, max_tokens=8, temperature=0, extra_body={"return_token_ids": True, "ignore_eos": True})
    by_text = client.completions.create(prompt="Once upon a time", **request)
    same(by_text.object, "text_completion", "object")
    choice = by_text.choices[0]
    prompt_ids, token_ids = choice.model_extra["prompt_token_ids"], choice.model_extra["token_ids"]
    same(len(prompt_ids), by_text.usage.prompt_tokens, "number of prompt token ids")
    same(len(token_ids), 8, "number of token ids")
    same(choice.finish_reason, "length", "finish_reason")
    by_ids = client.completions.create(prompt=prompt_ids, **request)
    same(by_ids.choices[0].model_extra["token_ids"], token_ids, "token ids for a prompt of token ids")
    same(by_ids.choices[0].text, choice.text, "text for a prompt of token ids")
    several = client.completions.create(prompt=[prompt_ids, prompt_ids[:1]], **request)
    same(len(several.choices), 2, "number of choices for two prompts")
    same(several.choices[0].model_extra["token_ids"], token_ids, "token ids in company")
    chunks = list(client.completions.create(prompt="Once upon a time", stream=True, **request))
    same("".join(chunk.choices[0].text for chunk in chunks), choice.text, "streamed text")
    streamed = [token for chunk in chunks for token in chunk.choices[0].model_extra.get("token_ids") or []]
    same(streamed, token_ids, "streamed token ids")
    echoed = client.completions.create(prompt="Once upon a time", echo=True, **request)
    same(echoed.choices[0].text, "Once upon a time" + choice.text, "echoed text")
    logprobs = client.completions.create(prompt="Once upon a time", logprobs=1, **request).choices[0].logprobs
    same([len(logprobs.tokens), len(logprobs.token_logprobs), len(logprobs.text_offset)], [8, 8, 8], "logprobs")


def embeddings(client: openai.OpenAI, args: argparse.Namespace) -> None:
    texts = ["A cat sits on the mat.", "A kitten is on a rug.", "Interest rates rose."]
    answer = client.embeddings.create(model=args.embedding_model, input=texts, encoding_format="float")
    same([item.index for item in answer.data], [0, 1, 2], "indexes")
    vectors = [item.embedding for item in answer.data]
    check(all(math.isfinite(value) for vector in vectors for value in vector), "values are not finite")
    same(answer.usage.total_tokens, answer.usage.prompt_tokens, "total_tokens")
    # Without a format the client asks for base64 and decodes it.
    default = client.embeddings.create(model=args.embedding_model, input=texts[1])
    check(len(default.data[0].embedding) == len(vectors[1]), "length of the decoded vector")
    close = all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(default.data[0].embedding, vectors[1]))
    check(close, "base64 and float differ")
    raw = client.embeddings.with_raw_response.create(model=args.embedding_model, input=texts[1], encoding_format="base64")
    encoded = raw.http_response.json()["data"][0]["embedding"]
    same(len(base64.b64decode(encoded)), len(vectors[1]) * struct.calcsize("<f"), "bytes in base64")


def errors(client: openai.OpenAI, args: argparse.Namespace) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    create = client.chat.completions.create

    def bad(param: str, **fields) -> None:
        request = {"model": args.model, "messages": messages, "max_tokens": 1, **fields}
        expect_error(openai.BadRequestError, param, f"{fields}", lambda: create(**request))

    bad("temperature", temperature=3)
    bad("temperature", temperature=-1)
    bad("top_p", top_p=0)
    bad("n", n=0)
    bad("max_tokens", max_tokens=-1)
    bad("max_tokens", max_tokens=10**9)
    bad("logit_bias", logit_bias={"0": 1000})
    bad("messages", messages=[])
    bad("messages[0].role", messages=[{"content": "Hi"}])
    bad("model", model=args.embedding_model)
    bad("response_format", response_format={"type": "yaml"})
    expect_error(openai.BadRequestError, "temperature", "a stream", lambda: create(
        model=args.model, messages=messages, temperature=3, stream=True))
    expect_error(openai.NotFoundError, "model", "unknown model", lambda: create(model="no-such-model", messages=messages))
    expect_error(openai.BadRequestError, "model", "embedding with a chat model", lambda: client.embeddings.create(
        model=args.model, input="x"))
    expect_error(openai.BadRequestError, "input", "a long input", lambda: client.embeddings.create(
        model=args.embedding_model, input="word " * 100_000))
    expect_error(openai.BadRequestError, "prompt", "negative token ids", lambda: client.completions.create(
        model=args.model, prompt=[-1]))
    if args.api_key:
        stranger = openai.OpenAI(base_url=args.base_url, api_key="wrong", max_retries=0)
        expect_error(openai.AuthenticationError, None, "a wrong key", lambda: stranger.models.list())
    # After all of this the server still answers.
    same(len(create(model=args.model, messages=messages, max_tokens=1).choices), 1, "an answer afterwards")


def main() -> int:
    global SECTION
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", required=True, help="with /v1 at its end")
    parser.add_argument("--model", required=True, help="deployed model that generates and has a chat template")
    parser.add_argument("--embedding-model", required=True, help="deployed embedding model")
    parser.add_argument("--api-key", help="key that the server was started with")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.base_url, api_key=args.api_key or "none", max_retries=0, timeout=300)
    for section in (models, chat, completions, embeddings, errors):
        SECTION = section.__name__
        before = len(FAILURES)
        try:
            section(client, args)
        except Exception:
            check(False, traceback.format_exc())
        print(f"{SECTION}: {'ok' if len(FAILURES) == before else 'FAILED'}")
    for failure in FAILURES:
        print(f"MISMATCH {failure}", file=sys.stderr)
    return 1 if FAILURES else 0


if __name__ == "__main__":
    sys.exit(main())
