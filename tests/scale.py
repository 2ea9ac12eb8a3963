"""Scaling that loses nothing: the containers of deploy/compose.yaml under load, decode 2 -> 4 -> 1 and prefill 2 -> 0 -> 2. Every request
must end with the exact answer; the figures go to a file, by phase.

    tests/contained tests/scale.py RESULT.json
"""

import datetime
import http.client
import json
import os
import statistics
import sys
import threading
import time

from containers import BATON, ROOT, URL, Engine, get, until

CLIENTS = 8
STEADY = 15
EMPTY = 10
STEADY_PHASE = "steady, 2 prefill and 2 decode"


class Load:
    """Clients that ask one question after the other, streaming, and never try again. Three of four have a golden answer; the fourth is asked
    for 300 tokens whatever it says, and must say what it said the first time: on CPUs an answer does not depend on who computes it."""

    def __init__(self, phase):
        self.golden = [json.loads(line) for line in (ROOT / "deploy/demo/golden.jsonl").read_text().splitlines()]
        self.phase, self.records, self.stopping, self.turn, self.long = phase, [], False, iter(range(10**9)), {}
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.client) for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def client(self):
        while not self.stopping:
            with self.lock:
                number = next(self.turn)
            long = number % 4 == 3
            question, answer = self.question(number, long)
            began, phase = time.monotonic(), self.phase
            first, said, problem = self.ask(question, began, {"max_tokens": 300, "ignore_eos": True} if long else {})
            if not problem and said != (answer or self.long.setdefault(question, said)):
                problem = f"said {said!r} to {question!r}"
            record = {"phase": phase, "first": first, "whole": time.monotonic() - began, "problem": problem}
            with self.lock:
                self.records.append(record)

    def question(self, number, long):
        """And its answer, if that is known beforehand."""
        item = self.golden[number // 4 % 8] if long else self.golden[number % len(self.golden)]
        return item["question"], None if long else item["answer"]

    def ask(self, question, began, fields):
        """Time of the first token, the text, and what went wrong."""
        body = {"model": "baton-demo", "messages": [{"role": "user", "content": question}], "temperature": 0, "stream": True, **fields}
        first, said = None, ""
        try:
            connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=120)
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
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


def worker(engine, name):
    """Starts a worker's container: the compose file's own, or one more with the arguments of the first."""
    if engine.docker("start", f"baton_{name}_1", check=False).returncode == 0:
        return
    role = name.split("-")[0]
    first = engine.inspect(engine.container(f"{role}-1"))
    arguments = [argument.replace(f"{role}-1", name) for argument in first["Config"]["Cmd"]]
    flags = ["--read-only", "--cap-drop=ALL", "--network=baton_default", f"--network-alias={name}", f"--name=baton_{name}_1"]
    engine.docker("run", "-d", *flags, BATON, *arguments)


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
    phases = summary(load.records, notes)
    result = {"date": datetime.date.today().isoformat(), "clients": CLIENTS, "machine_load_before": round(busy, 1), "phases": phases}
    if sys.argv[1:]:
        (ROOT / sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    for record in [record for record in load.records if record["problem"]][:10]:
        print("lost or wrong:", record)
    lost = sum(phase["lost_or_wrong"] for phase in phases.values())
    print(f"{sum(phase['requests'] for phase in phases.values()) - lost} passed, {lost} failed")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
