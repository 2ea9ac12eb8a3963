"""Asks a running Baton every golden question through the official OpenAI client, whole and streaming, and demands the exact answers.

    python3 golden.py http://127.0.0.1:8000/v1 MODEL golden.jsonl
"""

import json
import sys

from openai import OpenAI

base_url, model, path = sys.argv[1:4]
client = OpenAI(base_url=base_url, api_key="none", max_retries=0)
golden = [json.loads(line) for line in open(path, encoding="utf-8")]
wrong = []
for item in golden:
    messages = [{"role": "user", "content": item["question"]}]
    whole = client.chat.completions.create(model=model, messages=messages, temperature=0)
    stream = client.chat.completions.create(
        model=model, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True})
    text, finish, usage = "", None, None
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
    counts = (len(item["prompt_ids"]), len(item["answer_ids"]))
    for how, said, reason, used in (
        ("whole", whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage),
        ("stream", text, finish, usage),
    ):
        if (said, reason, (used.prompt_tokens, used.completion_tokens)) != (item["answer"], "stop", counts):
            wrong.append((how, item["question"], said, reason, used))
print(f"{2 * len(golden) - len(wrong)} of {2 * len(golden)} exact")
for row in wrong[:10]:
    print("wrong:", row)
sys.exit(bool(wrong))
