"""What needs a GPU, in one command: parity of every operation with the CPU backend, then the demo model served by `baton up
--backend cuda`, every golden question, prefill and decode in two processes. Nothing is compiled here.

    python3 tests/gpu.py BATON PARITY_TEST_BINARY RESULT.json
"""

import concurrent.futures
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

baton, parity, result_path = sys.argv[1:4]
here = os.path.dirname(os.path.abspath(__file__))
result = {"date": datetime.date.today().isoformat()}
gpu = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True)
result["gpu"], result["driver"] = (part.strip() for part in gpu.stdout.strip().splitlines()[0].split(","))


def run_parity():
    began = time.monotonic()
    tests = subprocess.run([parity, "--test-threads", "1", "--nocapture"], capture_output=True, text=True)
    output = tests.stdout + tests.stderr
    passed = re.search(r"test result: \w+\. (\d+) passed; (\d+) failed", output)
    if tests.returncode:
        print(output[-6000:])
    return {
        "passed": int(passed[1]) if passed else 0,
        "failed": int(passed[2]) if passed else None,
        "seconds": round(time.monotonic() - began, 1),
        "relative_errors": dict(re.findall(r"parity (\S.*): (\S+)$", output, re.M)),
    }


# Small shapes of every family: a checked kernel runs a hundred times slower.
SMALL = ["elementwise::", "gate::", "moe::", "linear::linear_batched", "transfer::", "attention::a_gathered",
         "attention::direct", "attention::absorbed_with_few", "sample::sampled"]


def sanitize(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", parity, "--test-threads", "1", *SMALL]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=150)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not run: {error}"[:200]
    if run.returncode:
        print(run.stdout[-4000:])
    found = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*|test result: .*? failed", run.stdout)
    return {"status": run.returncode, "found": found}


class Cluster:
    """`baton up`, stopped when left."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __enter__(self):
        began = time.monotonic()
        command = [baton, "up", "--port", "0", "--json", *self.arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(command)} ended before it was ready")
        self.url = json.loads(line)["gateway"]["http"]
        self.seconds_to_ready = round(time.monotonic() - began, 2)
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=30)

    def post(self, path, body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def bench(self, **options):
        arguments = [str(word) for key, value in options.items() for word in ("--" + key.replace("_", "-"), value)]
        run = subprocess.run([baton, "bench", "--url", self.url, "--json", *arguments], capture_output=True, text=True)
        return json.loads(run.stdout) if run.returncode == 0 else {"error": run.stderr[-500:]}


def golden(cluster, at_once):
    with open(os.path.join(here, "../deploy/demo/golden.jsonl"), encoding="utf-8") as lines:
        items = [json.loads(line) for line in lines]

    def ask(item):
        messages = [{"role": "user", "content": item["question"]}]
        try:
            body = {"model": "baton-demo", "messages": messages, "temperature": 0}
            said = cluster.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
        except Exception as error:
            said = repr(error)
        if said != item["answer"]:
            print("wrong:", item["question"], "->", said)
        return said == item["answer"]

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        return f"{sum(pool.map(ask, items))} of {len(items)}"


def conversation(cluster):
    """Thirty golden questions in one prompt of over 800 tokens, the last to be answered: long chunks, the second behind a context."""
    with open(os.path.join(here, "../deploy/demo/golden.jsonl"), encoding="utf-8") as lines:
        items = [json.loads(line) for line in lines][:60:2]
    messages = []
    for item in items:
        messages += [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": item["answer"]}]
    answer = cluster.post("/v1/chat/completions", {"model": "baton-demo", "messages": messages[:-1], "temperature": 0})
    exact = answer["choices"][0]["message"]["content"] == items[-1]["answer"]
    return {"exact": exact, "prompt_tokens": answer["usage"]["prompt_tokens"]}


def references(cluster):
    """Logprobs of the long reference texts against those in f32, and continuations while margins are sure."""
    with open(os.path.join(here, "../deploy/demo/reference.json"), encoding="utf-8") as file:
        prompts = [prompt for prompt in json.load(file)["prompts"] if len(prompt["ids"]) > 100]
    compared = {}
    for prompt in prompts:
        body = {"model": "baton-demo", "prompt": prompt["ids"], "max_tokens": 48, "temperature": 0, "ignore_eos": True,
                "echo": True, "logprobs": 5, "return_tokens_as_token_ids": True}
        logprobs = cluster.post("/v1/completions", body)["choices"][0]["logprobs"]
        number = lambda token: int(token.removeprefix("token_id:"))
        errors, same = [], 0
        for position, expected in enumerate(prompt["positions"][:-1]):
            found = {number(token): value for token, value in logprobs["top_logprobs"][position + 1].items()}
            top = {token: logit - expected["lse"] for token, logit in expected["top"]}
            errors += [abs(value - top[token]) for token, value in found.items() if token in top]
            same += max(found, key=found.get) == expected["top"][0][0]
        said = [number(token) for token in logprobs["tokens"][len(prompt["ids"]):]]
        sure = next((i for i, margin in enumerate(prompt["margins"]) if margin < 0.3), 48)
        compared[f"{len(prompt['ids'])} tokens"] = {
            "mean_error": round(sum(errors) / len(errors), 4),
            "largest_error": round(max(errors), 3),
            "same_best": f"{same} of {len(prompt['positions']) - 1}",
            "sure_continuation_equal": said[:sure] == prompt["greedy"][:sure],
            "sure_tokens": sure,
        }
    return compared


result["parity"] = run_parity()
result["sanitizer"] = {tool: sanitize(tool) for tool in ("memcheck", "racecheck")}
for name, arguments in {
    "split": ("--backend", "cuda"),
    "whole": ("--backend", "cuda", "--prefill", "0", "--decode", "0", "--both", "1"),
}.items():
    try:
        with Cluster(*arguments) as cluster:
            result[name] = {
                "seconds_to_ready": cluster.seconds_to_ready,
                "conversation": conversation(cluster),
                "references": references(cluster),
                "golden_one_at_a_time": golden(cluster, 1),
                "golden_32_at_once": golden(cluster, 32),
                "decode_one_stream": cluster.bench(prompt_tokens=16, output_tokens=256, requests=4),
                "decode_16_streams": cluster.bench(prompt_tokens=64, output_tokens=128, requests=64, concurrency=16),
            }
    except (SystemExit, urllib.error.HTTPError) as error:
        result[name] = {"error": str(error)}
with open(result_path, "w", encoding="utf-8") as out:
    json.dump(result, out, indent=2)
    out.write("\n")

rate = "completion_tokens_per_second"
for name in ("split", "whole"):
    of = result[name]
    shown = {key: value.get(rate, value) if isinstance(value, dict) else value for key, value in of.items()}
    print(name, json.dumps(shown))
print("parity:", {k: v for k, v in result["parity"].items() if k != "relative_errors"}, "sanitizer:", result["sanitizer"])
