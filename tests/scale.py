"""Scaling that loses nothing: the containers of deploy/compose.yaml under load, decode 2 -> 4 -> 1 and prefill 2 -> 0 -> 2. Every request
must end with the exact answer; the figures go to a file, by phase. Then two tenants, one of whom floods: what the other one sees of it; with the
demo model, which shares two cores with everything else, and with workers that compute nothing and take the time that DeepSeek-V3 would.

    tests/contained tests/scale.py RESULT.json
"""

import datetime
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time

from containers import BATON, PREBUILT, ROOT, URL, Engine, get, until

CLIENTS = 8
STEADY = 15
EMPTY = 10
# Of one tenant alone, and of the same beside a flood, in turn: so many times, and seconds each.
ROUNDS = 3
TENANT = 30
DECODE_CORE = os.cpu_count() - 1
# CPU that helm/values.yaml requests for each, in thousandths of a core; Prometheus and the collector have less than any.
REQUESTS = {"prefill": 1000, "decode": 1000, "gateway": 500, "router": 500, "etcd": 250}
LEAST = 100
FIRST = ("gateway", "router", "prefill")
# What one tenant may see of another where the engine does not share its processor with clients and services: TTFT p99 beside a flood over
# the one alone, median of the rounds.
FAIR = 1.5
# Of a step: what the backend `sim` has from nine layers of DeepSeek-V3, measured on an H200, for all 61 of them.
DEEPSEEK_V3 = {"launch_us": 17_000, "sequence_us": 1_000, "context_ns": 88, "prompt_us": 136}
REFUSED = "refused by a limit"
LONG = {"max_tokens": 300, "ignore_eos": True}
# Where an answer has no end of its own that is known.
SHORT = {"max_tokens": 8}
STEADY_PHASE = "steady, 2 prefill and 2 decode"


class Load:
    """Clients that ask one question after the other, streaming, and never try again. Three of four have a golden answer; the fourth is asked
    for 300 tokens whatever it says, and must say what it said the first time: on CPUs an answer does not depend on who computes it."""

    def __init__(self, phase, clients=CLIENTS, key=None, address="127.0.0.1:8000", flood=False, known=True):
        self.golden = [json.loads(line) for line in (ROOT / "deploy/demo/golden.jsonl").read_text().splitlines()]
        self.key, self.address, self.flood, self.known = key, address, flood, known
        self.phase, self.records, self.stopping, self.turn, self.long = phase, [], False, iter(range(10**9)), {}
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.client) for _ in range(clients)]
        for thread in self.threads:
            thread.start()

    def client(self):
        while not self.stopping:
            with self.lock:
                number = next(self.turn)
            long = self.flood or number % 4 == 3 and not self.key
            question, answer = self.question(number, long)
            began, phase = time.monotonic(), self.phase
            first, said, problem = self.ask(question, began, LONG if long else {} if self.known else SHORT)
            if not problem and said != (answer or self.long.setdefault(question, said)):
                problem = f"said {said!r} to {question!r}"
            record = {"phase": phase, "first": first, "whole": time.monotonic() - began, "problem": problem}
            with self.lock:
                self.records.append(record)

    def question(self, number, long):
        """And its answer, if that is known beforehand."""
        item = self.golden[number // 4 % 8] if long else self.golden[number % len(self.golden)]
        return item["question"], item["answer"] if self.known and not long else None

    def ask(self, question, began, fields):
        """Time of the first token, the text, and what went wrong."""
        body = {"model": "baton-demo", "messages": [{"role": "user", "content": question}], "temperature": 0, "stream": True, **fields}
        first, said = None, ""
        try:
            connection = http.client.HTTPConnection(self.address, timeout=120)
            headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self.key}"} if self.key else {})
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            if answer.status == 429 and self.flood:
                time.sleep(0.05)
                return first, said, REFUSED
            if answer.status != 200:
                return first, said, f"{answer.status}: {answer.read().decode()}"
            for line in answer:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return first, said, str(event["error"])
                    text = event["choices"][0]["delta"].get("content") or ""
                    first = first or (text and time.monotonic() - began) or None
                    said += text
                if line.startswith(b"data: [DONE]"):
                    return first, said, None
            return first, said, "the stream ended before [DONE]"
        except (OSError, http.client.HTTPException, ValueError) as error:
            return first, said, f"{type(error).__name__}: {error}"

    def stop(self):
        self.stopping = True
        for thread in self.threads:
            thread.join()


def members(role):
    """Ready members of a role, as the gateway tells."""
    status = json.loads(get(f"{URL}/status")[1])
    return [m["address"].split("//")[1].split(":")[0] for m in status["members"] if m["role"] == role and not m["draining"]]


def worker(engine, name, *more):
    """Starts a worker's container: the compose file's own, or one more with the arguments of the first, and more."""
    if engine.docker("start", f"baton_{name}_1", check=False).returncode == 0:
        return
    role = name.split("-")[0]
    first = engine.inspect(engine.container(f"{role}-1"))
    arguments = [argument.replace(f"{role}-1", name) for argument in first["Config"]["Cmd"]]
    flags = [*mounts(first), "--read-only", "--cap-drop=ALL", "--network=baton_default", f"--network-alias={name}", f"--name=baton_{name}_1"]
    engine.docker("run", "-d", *flags, BATON, *arguments, *more)


def mounts(container):
    return [f"--volume={mount['Source']}:{mount['Destination']}:ro" for mount in container["Mounts"]]


def stop(engine, names):
    """SIGTERM to all of them at once, and how long until the last had drained; each must leave with 0."""
    began = time.monotonic()
    engine.docker("stop", "-t", "75", *(f"baton_{name}_1" for name in names))
    took = time.monotonic() - began
    for name in names:
        code = engine.inspect(f"baton_{name}_1")["State"]["ExitCode"]
        assert code == 0, f"{name} ended with {code}"
    return took


def scaled(role, count, change, load, phase, notes):
    """One step of the scale under load: the change, the view that follows, and a steady while."""
    load.phase = phase
    began = time.monotonic()
    took = change()
    until(f"{count} {role} workers", lambda: len(members(role)) == count)
    notes[phase] = {"seconds_to_view": round(time.monotonic() - began, 1)} | ({"seconds_to_drain": round(took, 1)} if took else {})
    print(f"{phase}: {notes[phase]}", flush=True)
    time.sleep(STEADY)


def empty(engine, load, notes):
    """Prefill goes to nothing, and comes back: what was asked meanwhile waits in the router's queue."""
    load.phase = "prefill 2 -> 0 -> 2"
    began = time.monotonic()
    took = stop(engine, ["prefill-1", "prefill-2"])
    until("no prefill workers", lambda: not members("prefill"))
    time.sleep(EMPTY)
    waiting = sum(queue["depth"] for queue in json.loads(get(f"{URL}/status")[1])["queue"])
    assert waiting == CLIENTS, f"{waiting} of {CLIENTS} requests wait"
    for name in ("prefill-1", "prefill-2"):
        worker(engine, name)
    until("2 prefill workers", lambda: len(members("prefill")) == 2)
    notes[load.phase] = {"seconds_to_drain": round(took, 1), "waited_in_queue": waiting, "seconds_in_all": round(time.monotonic() - began, 1)}
    print(f"{load.phase}: {notes[load.phase]}", flush=True)
    time.sleep(STEADY)


def keyed_gateway(engine):
    """One more gateway, which asks for keys: one for each of two tenants, of whom the second has limits. Its own address as well: behind
    the engine's proxy, which carries what is published, one connection waits for all others."""
    limits = {"steady": [], "flood": ["--tokens-per-minute", "100000", "--concurrency", "2"]}
    made = {name: subprocess.run([PREBUILT, "key", "new", name, *flags], capture_output=True, text=True, check=True) for name, flags in limits.items()}
    keys = {name: re.search(r"sk-\S+", done.stderr).group() for name, done in made.items()}
    folder = engine.folder / "keys"
    folder.mkdir()
    (folder / "keys.toml").write_text("\n".join(done.stdout for done in made.values()))
    first = engine.inspect(engine.container("gateway"))
    flags = [*mounts(first), "--read-only", "--cap-drop=ALL", "--network=baton_default", "--name=baton_gateway-keys_1"]
    mount = f"--volume={folder}:/keys:ro"
    started = engine.docker("run", "-d", *flags, mount, BATON, *first["Config"]["Cmd"], "--set", "keys.file=/keys/keys.toml")
    address = engine.inspect(started.strip())["NetworkSettings"]["Networks"]["baton_default"]["IPAddress"] + ":8000"
    until("the gateway with keys", lambda: get(f"http://{address}/ready")[0] == 200)
    return keys, address


def apart(engine):
    """Decode on the last core, all others on the first: pools stand on machines of their own, and the time of a first token is not decode's.
    Each with the share of its core that the chart requests for it."""
    names = engine.docker("ps", "--format", "{{.Names}}").split()
    for name in names:
        core = 0 if any(part in name for part in FIRST) else DECODE_CORE
        thousandths = next((cpu for part, cpu in REQUESTS.items() if part in name), LEAST)
        engine.docker("update", f"--cpuset-cpus={core}", f"--cpu-shares={thousandths * 1024 // 1000}", name)


def flooding(key, address):
    """A tenant with sixteen clients that ask again when they are refused, in a process of its own, beside decode."""
    command = [sys.executable, __file__, "--flood", key, address]
    beside = lambda: os.sched_setaffinity(0, {DECODE_CORE})
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=beside)


def flood(key, address):
    """Until standard input ends; then what came of it, on standard output."""
    load = Load("flood", clients=16, key=key, address=address, flood=True)
    sys.stdin.read()
    load.stop()
    print(json.dumps(load.records))


def simulated(engine):
    """Workers that take the times of DeepSeek-V3 on GPUs of their own, in the place of all others."""
    stop(engine, members("prefill") + members("decode"))
    times = [f"--set=simulated.{name}={value}" for name, value in DEEPSEEK_V3.items()]
    for name in ("prefill-sim", "decode-sim"):
        worker(engine, name, "--backend=sim", *times)
    until("simulated workers", lambda: len(members("prefill")) == 1 == len(members("decode")))


def tenants(engine, keys, address, known):
    """One tenant asks, one question after the other; then another one floods beside it; and again."""
    apart(engine)

    def asked(phase):
        load = Load(phase, clients=1, key=keys["steady"], address=address, known=known)
        time.sleep(TENANT)
        load.stop()
        return load.records
    asked("warm")
    alone, beside, flooded, ratios = [], [], [], []
    for _ in range(ROUNDS):
        alone.append(asked("alone"))
        other = flooding(keys["flood"], address)
        beside.append(asked("beside a flood"))
        flooded += json.loads(other.communicate("")[0])
        ratios.append(round(quantiles(beside[-1])["ttft_p99_ms"] / quantiles(alone[-1])["ttft_p99_ms"], 2))
    alone, beside = sum(alone, []), sum(beside, [])
    refused = sum(record["problem"] == REFUSED for record in flooded)
    wrong = [record for record in alone + beside + flooded if record["problem"] not in (None, REFUSED)]
    figures = {phase: quantiles(records) for phase, records in (("alone", alone), ("beside_a_flood", beside))}
    figures |= {"flood_asked": len(flooded), "flood_refused": refused, "wrong": len(wrong)}
    figures |= {"ttft_p99_ratios": ratios, "ttft_p99_ratio": statistics.median(ratios)}
    for record in wrong[:5]:
        print("lost or wrong:", record)
    return figures


def quantiles(records):
    firsts = sorted(record["first"] for record in records if record["first"])
    return {"requests": len(records)} | {f"ttft_p{percent}_ms": round(firsts[int(len(firsts) * percent / 100)] * 1000, 1) for percent in (50, 99)}


def summary(records, notes):
    phases = {}
    for phase in dict.fromkeys(record["phase"] for record in records):
        rows = [record for record in records if record["phase"] == phase]
        firsts = sorted(record["first"] for record in rows if record["first"])
        phases[phase] = {
            "requests": len(rows),
            "lost_or_wrong": sum(record["problem"] is not None for record in rows),
            "ttft_p50_ms": round(statistics.median(firsts) * 1000, 1),
            "ttft_p99_ms": round(firsts[int(len(firsts) * 0.99)] * 1000, 1),
            "longest_s": round(max(record["whole"] for record in rows), 2),
        } | notes.get(phase, {})
    return phases


def main():
    notes, busy = {}, os.getloadavg()[0]
    with Engine() as engine:
        engine.build()
        engine.start()
        until("four workers", lambda: len(members("prefill")) == 2 == len(members("decode")))
        load = Load(STEADY_PHASE)
        try:
            time.sleep(STEADY)
            scaled("decode", 4, lambda: [worker(engine, name) for name in ("decode-3", "decode-4")] and 0, load, "decode 2 -> 4", notes)
            scaled("decode", 1, lambda: stop(engine, ["decode-1", "decode-2", "decode-3"]), load, "decode 4 -> 1", notes)
            empty(engine, load, notes)
        finally:
            load.stop()
        for name in ("decode-1", "decode-2"):
            worker(engine, name)
        until("two decode workers and more", lambda: len(members("decode")) >= 2)
        keyed = keyed_gateway(engine)
        two_tenants = {"demo_model": tenants(engine, *keyed, known=True)}
        simulated(engine)
        two_tenants["times_of_deepseek_v3"] = tenants(engine, *keyed, known=False)
        print(f"two tenants: {two_tenants}", flush=True)
    phases = summary(load.records, notes)
    result = {"date": datetime.date.today().isoformat(), "clients": CLIENTS, "machine_load_before": round(busy, 1), "phases": phases, "tenants": two_tenants}
    if sys.argv[1:]:
        (ROOT / sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    for record in [record for record in load.records if record["problem"]][:10]:
        print("lost or wrong:", record)
    lost = sum(phase["lost_or_wrong"] for phase in phases.values()) + sum(figures["wrong"] for figures in two_tenants.values())
    print(f"{sum(phase['requests'] for phase in phases.values()) - lost} passed, {lost} failed")
    ratio = two_tenants["times_of_deepseek_v3"]["ttft_p99_ratio"]
    unfair = ratio > FAIR
    if unfair:
        print(f"TTFT p99 beside a flood is {ratio} times what it is alone: more than {FAIR}")
    sys.exit(bool(lost) or unfair)


if __name__ == "__main__":
    flood(*sys.argv[2:]) if sys.argv[1:2] == ["--flood"] else main()
