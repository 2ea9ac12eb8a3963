"""The images of deploy/Dockerfile and the cluster of deploy/compose.yaml, built and run: a question answered through gateway, router, prefill
and decode containers, an answer that outlives the order to stop, every query of dashboard and alerts asked of a real Prometheus, and the
spans of every service at a real collector.

    tests/contained tests/images.py
"""

import http.client
import json
import threading
import time
import urllib.parse
import urllib.request

import yaml
from containers import BATON, ROOT, SERVICES, URL, Engine, get, until

MODEL = "baton-demo"
WORKERS = ["prefill-1", "prefill-2", "decode-1", "decode-2"]


def ask(question, **fields):
    """Status, headers and body of one chat request."""
    connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=120)
    messages = [{"role": "user", "content": question}]
    body = json.dumps({"model": MODEL, "messages": messages, "temperature": 0, **fields})
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), json.loads(answer.read())


def image(engine):
    found = engine.inspect(BATON)
    config = found["Config"]
    assert config["User"] == "65532:65532", config
    assert config["Entrypoint"] == ["/usr/local/bin/baton"], config
    version = engine.docker("run", "--rm", "--read-only", "--network=none", BATON, "--version")
    shell = engine.docker("run", "--rm", "--entrypoint=/bin/sh", BATON, "-c", "true", check=False)
    assert shell.returncode != 0 and "no such file" in shell.stderr, shell
    print(f"{version.strip()}: {found['Size'] >> 20} MiB, runs as 65532 on a read-only file system, has no shell")


def questions(engine):
    golden = [json.loads(line) for line in (ROOT / "deploy/demo/golden.jsonl").read_text().splitlines()[:20]]
    pairs = set()
    for item in golden:
        status, headers, body = ask(item["question"])
        assert status == 200, body
        assert body["choices"][0]["message"]["content"] == item["answer"], (item, body)
        pairs.add((headers["x-baton-prefill"], headers["x-baton-decode"]))
    prefills, decodes = ({pair[index] for pair in pairs} for index in (0, 1))
    assert len(prefills) == 2 and len(decodes) == 2, f"not every worker had a part: {pairs}"
    print(f"{len(golden)} of {len(golden)} answers exact, through {len(prefills)} prefill and {len(decodes)} decode containers")


def hardening(engine):
    for service in ["gateway", "router", *WORKERS]:
        found = engine.inspect(engine.container(service))
        assert found["HostConfig"]["ReadonlyRootfs"] and found["HostConfig"]["CapDrop"] == ["ALL"], service
        # A secret that is mounted makes itself a place.
        written = [line.split(maxsplit=1)[1] for line in engine.docker("diff", engine.container(service)).splitlines()]
        changes = [path for path in written if not "/run/secrets/admin-token".startswith(path)]
        assert not changes, f"{service} wrote: {changes}"
    health = lambda: engine.inspect(engine.container("gateway"))["State"]["Health"]["Status"]
    until("the gateway's own check says healthy", lambda: health() == "healthy", 120)


def orders(engine):
    """Who has no admin token has no worker leave, neither from within the network nor through the gateway."""
    member = json.loads(get(f"{URL}/status")[1])["members"][0]["id"]
    order = ["exec", engine.container("gateway"), "/usr/local/bin/baton", "drain", member, "--no-wait", "--url=http://127.0.0.1:8001"]
    refused = engine.docker(*order, check=False)
    assert refused.returncode != 0 and "--token-file" in refused.stderr, refused
    code, body = get(urllib.request.Request(f"{URL}/status/members/{member}/drain", method="POST"))
    assert code == 401, body
    assert member in get(f"{URL}/status")[1].decode()
    print("without the admin token no worker is told to leave")


def drain(engine):
    """A decode container told to stop in the middle of answers ends them first, and leaves with 0."""
    answers = []
    long = {"max_tokens": 1500, "ignore_eos": True}
    threads = [threading.Thread(target=lambda: answers.append(ask("What is `Vec`?", **long))) for _ in range(4)]
    for thread in threads:
        thread.start()
    status = lambda: json.loads(get(f"{URL}/status")[1])
    busy = lambda: [m for m in status()["members"] if m["role"] == "decode" and m["load"]["running"] > 0]
    service = until("a decode worker runs an answer", busy)[0]["address"].split("//")[1].split(":")[0]
    container = engine.container(service)
    told = time.monotonic()
    engine.docker("stop", "-t", "75", container)
    stopped = time.monotonic() - told
    for thread in threads:
        thread.join()
    assert len(answers) == 4, f"{len(answers)} of 4 answers came"
    for code, _, body in answers:
        assert code == 200 and body["usage"]["completion_tokens"] == 1500, body
    state = engine.inspect(container)["State"]
    assert state["ExitCode"] == 0, state
    until(f"{service} is no member any more", lambda: service not in get(f"{URL}/status")[1].decode())
    engine.docker("start", container)
    until(f"{service} is back", lambda: service in get(f"{URL}/status")[1].decode())
    print(f"{service} told to stop among 4 answers of 1500 tokens: gone after {stopped:.1f} s with 0, all 4 answers whole")


def prometheus(query, starting=False):
    """What it finds; nothing while it is starting."""
    status, body = get("http://127.0.0.1:9090/api/v1/query?" + urllib.parse.urlencode({"query": query}))
    if starting and status != 200:
        return []
    assert status == 200, f"{query}: {body.decode()}"
    return json.loads(body)["data"]["result"]


def monitoring(engine):
    """Every target is scraped, every query of the dashboard has an answer, every alert is understood and none that should not fires."""
    until("Prometheus scrapes all", lambda: len(prometheus('up{release="compose"} == 1', starting=True)) == 9, 120)
    # The load before may be longer ago than a rate looks back.
    status, _, body = ask("What is `Vec`?")
    assert status == 200, body
    until("two scrapes after the load", lambda: prometheus("rate(baton_gateway_requests_total[30s]) > 0", starting=True), 120)
    time.sleep(6)
    panels = json.loads((ROOT / "helm/files/dashboard.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    values = {"$namespace": ".*", "$release": "compose", "$__rate_interval": "1m"}
    empty = []
    for query in queries:
        for name, value in values.items():
            query = query.replace(name, value)
        if not prometheus(query):
            empty.append(query)
    assert not empty, "no answer to: " + "\n".join(empty)
    alerts = [rule for group in yaml.safe_load((ROOT / "helm/files/alerts.yaml").read_text())["groups"] for rule in group["rules"]]
    loaded = json.loads(get("http://127.0.0.1:9090/api/v1/rules")[1])["data"]["groups"]
    health = {rule["name"]: rule["health"] for group in loaded for rule in group["rules"]}
    assert set(health.values()) == {"ok"} and len(health) == len(alerts), health
    firing = {found["metric"]["alertname"] for found in prometheus('ALERTS{alertstate="firing"}')}
    assert not firing, f"firing in a sound cluster: {firing}"
    print(f"{len(queries)} queries of the dashboard answered, {len(alerts)} alerts evaluated, none fires")


def traces(engine):
    """The collector of the compose file takes the spans of every service."""
    services = ("baton-gateway", "baton-router", "baton-prefill", "baton-decode")
    missing = lambda: [name for name in services if f"service.name={name}" not in engine.compose("logs", "otel")]
    until("spans of every service at the collector", lambda: not missing())
    assert engine.inspect(engine.container("otel"))["RestartCount"] == 0
    print(f"the collector took spans of {', '.join(services)}")


def restarts(engine):
    """The compose file has no setting that a service refuses: nothing has ended and come again."""
    for service in ["gateway", "router", *WORKERS]:
        found = engine.inspect(engine.container(service))
        assert found["RestartCount"] == 0, f"{service} restarted {found['RestartCount']} times"


def main():
    with Engine() as engine:
        engine.build()
        image(engine)
        began = time.monotonic()
        engine.start()
        print(f"ready {time.monotonic() - began:.1f} s after compose up")
        proofs = [questions, hardening, orders, drain]
        if "prometheus" in SERVICES:
            proofs.append(monitoring)
        else:
            print("there is no Prometheus here: dashboard and alerts are not tried")
        if "otel" in SERVICES:
            proofs.append(traces)
        else:
            print("there is no collector here: spans are not tried")
        proofs.append(restarts)
        for proof in proofs:
            proof(engine)
        engine.compose("down", "-v")
    print(f"{len(proofs)} passed, 0 failed")


if __name__ == "__main__":
    main()
