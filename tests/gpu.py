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
        "relative_errors": worst(re.findall(r"parity (\S.*): (\S+)$", output, re.M)),
    }


def worst(errors):
    """Of each operation: over how many cases and rows, and the largest relative error."""
    found = {}
    for case, error in errors:
        of = found.setdefault(case.split(", ")[0], {"compared": 0, "largest": 0.0})
        of["compared"] += 1
        of["largest"] = max(of["largest"], float(error))
    return found


# Small shapes of every family: a checked kernel runs a hundred times slower.
SMALL = ["elementwise::", "gate::", "moe::", "linear::linear_batched", "transfer::", "attention::a_gathered",
         "attention::direct", "attention::absorbed_with_few",
         "attention::absorbed_with_heads", "sample::sampled"]


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
        ready = json.loads(line)
        self.url, self.router = ready["gateway"]["http"], ready["router"]["grpc"]
        self.seconds_to_ready = round(time.monotonic() - began, 2)
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=30)

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

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


def continuations(cluster):
    """Sixty tokens after each of forty prompts, past the end of the answers, with the margin of each over the second best."""
    with open(os.path.join(here, "../deploy/demo/golden.jsonl"), encoding="utf-8") as lines:
        items = [json.loads(line) for line in lines][:40]

    def ask(item):
        body = {"model": "baton-demo", "prompt": item["prompt_ids"], "max_tokens": 60, "temperature": 0, "ignore_eos": True,
                "logprobs": 2, "return_tokens_as_token_ids": True}
        logprobs = cluster.post("/v1/completions", body)["choices"][0]["logprobs"]
        margins = [max(top.values()) - min(top.values()) for top in logprobs["top_logprobs"]]
        return list(zip(logprobs["tokens"], margins))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, items))


def compare(split, whole, margin=0.3):
    """Tokens that are the same up to the first that is not sure, and all others."""
    sure = equal = unsure = 0
    for one, other in zip(split, whole):
        for (a, margin_a), (b, margin_b) in zip(one, other):
            if min(margin_a, margin_b) <= margin:
                unsure += a != b
            else:
                sure, equal = sure + 1, equal + (a == b)
            if a != b:
                break
    return {"margin": margin, "sure_tokens_equal": f"{equal} of {sure}", "unsure_tokens_that_differ": unsure}


def start(*arguments):
    """A service, and its addresses once it listens."""
    process = subprocess.Popen([baton, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, json.loads(process.stdout.readline())["listening"]


def worker(role, backend, router, *more):
    settings = [f"membership.registry={json.dumps(router)}", "gpu_memory_utilization=0.2", *more]
    return start("worker", "--role", role, "--backend", backend, *(word for of in settings for word in ("--set", of)))[0]


def device_error():
    """A decode worker whose GPU meets a wild access in its 40th step, beside one that lives: every answer is right all the same."""
    with Cluster("--backend", "cuda", "--worker-set", "gpu_memory_utilization=0.2") as cluster:
        victim = worker("decode", "cuda", cluster.router, "debug.fail_step=40")
        deadline = time.monotonic() + 60
        while sum(member["role"] == "decode" for member in cluster.get("/status")["members"]) < 2:
            if time.monotonic() > deadline:
                return {"error": "the second decode worker did not join"}
            time.sleep(0.1)
        answers = golden(cluster, 32)
        try:
            said = victim.communicate(timeout=30)[1].strip().splitlines()[-1]
        except subprocess.TimeoutExpired:
            victim.kill()
            said = "it lives"
        return {"golden_32_at_once": answers, "exit": victim.returncode, "said": said}


def mixed_pair():
    """Prefill on the CPU beside decode on the GPU: refused, with the reason."""
    router, at = start("router", "--set", 'listen="127.0.0.1:0"', "--set", 'admin="127.0.0.1:0"')
    workers = [worker("prefill", "cpu", at["grpc"]), worker("decode", "cuda", at["grpc"])]
    settings = [f'routers={json.dumps([at["grpc"]])}', 'listen="127.0.0.1:0"', 'admin="127.0.0.1:0"']
    gateway, web = start("gateway", *(word for of in settings for word in ("--set", of)))
    cluster = Cluster()
    cluster.url = web["http"]
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and len(cluster.get("/status")["members"]) < 2:
            time.sleep(0.1)
        body = {"model": "baton-demo", "messages": [{"role": "user", "content": "What does `Vec::push` do?"}]}
        return {"answered": cluster.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]}
    except urllib.error.HTTPError as error:
        return {"status": error.code, "said": json.load(error)["error"]["message"]}
    finally:
        for process in (gateway, *workers, router):
            process.terminate()
        for process in (gateway, *workers, router):
            process.wait(timeout=30)


result["parity"] = run_parity()
result["sanitizer"] = {tool: sanitize(tool) for tool in ("memcheck", "racecheck")}
said = {}
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
            said[name] = continuations(cluster)
    except (SystemExit, urllib.error.HTTPError) as error:
        result[name] = {"error": str(error)}
if len(said) == 2:
    result["split_equals_whole"] = compare(said["split"], said["whole"])
result["device_error"] = device_error()
result["mixed_pair"] = mixed_pair()
with open(result_path, "w", encoding="utf-8") as out:
    json.dump(result, out, indent=2)
    out.write("\n")

rate = "completion_tokens_per_second"
for name in ("split", "whole"):
    of = result[name]
    shown = {key: value.get(rate, value) if isinstance(value, dict) else value for key, value in of.items()}
    print(name, json.dumps(shown))
for name in ("split_equals_whole", "device_error", "mixed_pair"):
    print(name, json.dumps(result.get(name)))
print("parity:", {k: v for k, v in result["parity"].items() if k != "relative_errors"}, "sanitizer:", result["sanitizer"])
