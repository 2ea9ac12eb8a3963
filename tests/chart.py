"""The Helm chart, rendered by Helm's own engine: every value set against its golden file, the schemas of three Kubernetes versions and the
rules that hold between objects; bad values against the message they must get; documentation and queries against what they speak of.

    python3 tests/chart.py            compare and check everything
    python3 tests/chart.py --write    write the golden files and the table of values, to be reviewed as a diff

What stands in the golden files' configuration files is parsed by the services' own code in tests/scenarios/chart.rs.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import helm_python as helm
import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm"
GOLDEN = ROOT / "tests/chart/golden"
# The oldest that the chart takes, one between, the newest known.
VERSIONS = ["1.31", "1.34", "1.37"]
CRDS = yaml.safe_load((ROOT / "tests/chart/crds.yaml").read_text())
failures = []


def check(condition, message):
    if not condition:
        failures.append(message)


def value_sets():
    """The defaults, every example, and the set that uses every key."""
    files = sorted((CHART / "examples").glob("*.yaml")) + [ROOT / "tests/chart/every-key.yaml"]
    return {"defaults": {}} | {file.stem: yaml.safe_load(file.read_text()) for file in files}


def render(chart, values):
    manifests = chart.render(values, name="baton", namespace="inference")
    parts = [(path, text.strip()) for path, text in sorted(manifests.items()) if path.endswith(".yaml")]
    text = "".join(f"---\n# Source: {path}\n{text}\n" for path, text in parts if text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def golden(name, text, write):
    file = GOLDEN / f"{name}.yaml"
    if write:
        file.write_text(text)
    else:
        same = file.exists() and file.read_text() == text
        check(same, f"{name}: differs from {file.relative_to(ROOT)}; look at the difference with --write and git diff")


def objects(text):
    return [document for document in yaml.safe_load_all(text) if document]


def schemas(name, documents, seen=set()):
    """Strictly: a field that a version does not know is an error. Kinds of operators have a schema of their own in crds.yaml."""
    for document in documents:
        # Value sets have many objects in common.
        if (text := json.dumps(document, sort_keys=True)) in seen:
            continue
        seen.add(text)
        where = f"{name}: {document['kind']}/{document['metadata']['name']}"
        if document["kind"] in CRDS:
            try:
                jsonschema.validate(document, CRDS[document["kind"]])
            except jsonschema.ValidationError as error:
                check(False, f"{where}: {error.json_path}: {error.message}")
            continue
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except (kubernetes_validate.ValidationError, kubernetes_validate.InvalidSchemaError) as error:
                check(False, f"{where}: Kubernetes {version}: {error}")


def pods(documents):
    """Name, labels and specification of every pod."""
    for document in documents:
        if document["kind"] in ("Deployment", "StatefulSet"):
            template = document["spec"]["template"]
            yield document["metadata"]["name"], template["metadata"]["labels"], template["spec"]
        elif document["kind"] == "Pod":
            yield document["metadata"]["name"], document["metadata"]["labels"], document["spec"]


def selects(selector, labels):
    """Whether a label selector takes these labels."""
    equal = selector.get("matchLabels", {}).items() <= labels.items()
    return equal and all(labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", []))


def between_objects(name, documents):
    """What no schema can see: that objects find each other, and that a pod has the time and the rights it needs."""
    all_pods = list(pods(documents))
    names = {(document["kind"], document["metadata"]["name"]) for document in documents}
    check(len(names) == len(documents), f"{name}: two objects of one name")
    for document in documents:
        where, spec = f"{name}: {document['kind']}/{document['metadata']['name']}", document.get("spec", {})
        check(document["metadata"]["namespace"] == "inference", f"{where} is not in the release's namespace")
        if document["kind"] == "Service":
            found = [pod for _, labels, pod in all_pods if selects({"matchLabels": spec["selector"]}, labels)]
            ports = {port["name"] for pod in found for port in pod["containers"][0].get("ports", [])}
            check(found and all(port["targetPort"] in ports for port in spec["ports"]), f"{where} reaches no pod")
        if document["kind"] in ("Deployment", "StatefulSet"):
            check(selects(spec["selector"], spec["template"]["metadata"]["labels"]), f"{where} does not select its own pods")
        if document["kind"] == "PodDisruptionBudget":
            check(any(selects(spec["selector"], labels) for _, labels, _ in all_pods), f"{where} selects no pod")
        if document["kind"] == "NetworkPolicy":
            policy(where, spec, all_pods)
        target = spec.get("scaleTargetRef")
        check(not target or ("Deployment", target["name"]) in names, f"{where} scales nothing")
    for pod, labels, spec in all_pods:
        hardened(f"{name}: {pod}", spec)
        for volume in spec.get("volumes", []):
            config = volume.get("configMap")
            check(not config or ("ConfigMap", config["name"]) in names, f"{name}: {pod} mounts an absent ConfigMap")
        for constraint in spec.get("topologySpreadConstraints", []):
            check(selects(constraint["labelSelector"], labels), f"{name}: {pod} spreads other pods")
    drains(name, documents, {pod: spec for pod, _, spec in all_pods})


def policy(where, spec, all_pods):
    check(any(selects(spec["podSelector"], labels) for _, labels, _ in all_pods), f"{where} protects no pod")
    guarded = [pod for _, labels, pod in all_pods if selects(spec["podSelector"], labels)]
    ports = {port["name"] for pod in guarded for port in pod["containers"][0].get("ports", [])}
    for rule in spec["ingress"]:
        check(all(port["port"] in ports for port in rule["ports"]), f"{where} opens a port that no pod has")
        open_to_all = "from" not in rule
        public = where.endswith("-gateway") and rule["ports"] == [{"port": "http"}]
        check(not open_to_all or public, f"{where}: {rule['ports']} is open to everyone")


def hardened(where, spec):
    check(spec["automountServiceAccountToken"] is False, f"{where} carries a token")
    check(spec["securityContext"]["runAsNonRoot"], f"{where} may run as root")
    for container in spec["containers"] + spec.get("initContainers", []):
        security = container["securityContext"]
        check(security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"], f"{where} may write or escalate")
        check(security["capabilities"]["drop"] == ["ALL"], f"{where} keeps capabilities")


def drains(name, documents, specs):
    """A pod is not killed before its service has drained."""
    for document in documents:
        for key, text in document.get("data", {}).items() if document["kind"] == "ConfigMap" else ():
            drain, handover = (re.search(rf"^{name}_ms = (\d+)$", text, re.M) for name in ("drain", "handover"))
            if not key.endswith(".toml"):
                continue
            grace = specs[document["metadata"]["name"]]["terminationGracePeriodSeconds"]
            needed = (int(drain[1]) + int(handover[1] if handover else 2000)) / 1000 if drain else float("inf")
            check(grace >= needed + 5, f"{name}: {key} drains for longer than its pod may take")


def refusals(chart):
    for case in yaml.safe_load((ROOT / "tests/chart/refused.yaml").read_text()):
        try:
            render(chart, case["values"])
            check(False, f"accepted: {case['values']}")
        except helm.HelmError as error:
            check(case["message"] in str(error), f"{case['values']}: {case['message']!r} is not in the message: {error}")


def documentation(chart, write):
    """Every value has a description, every default is in the schema, and the table in README.md is made of both."""
    schema, rows, told = chart.schema, [], set()

    def resolve(entry):
        """What an entry refers to, but for what the table has told already."""
        for reference in [entry.get("$ref")] + [part.get("$ref") for part in entry.get("allOf", [])]:
            if reference:
                target = schema
                for step in reference.removeprefix("#/").split("/"):
                    target = target[step]
                again = {"properties": {}} if reference in told else {}
                told.add(reference)
                entry = resolve(target) | again | {"description": entry.get("description", target["description"])}
        return entry

    def walk(path, entry, default, known):
        entry = resolve(entry)
        check(entry.get("description"), f"values.schema.json: {path} has no description")
        inner = entry.get("properties", {}) if path != "pools" else {}
        shown = json.dumps(default) if known and not (isinstance(default, dict) and inner) else ""
        rows.append(f"| `{path}` | {shown and f'`{shown}`'} | {entry.get('description', '').replace('|', '/')} |")
        for key, child in inner.items():
            held = default if isinstance(default, dict) else {}
            walk(f"{path}.{key}", child, held.get(key), key in held)

    for key, entry in schema["properties"].items():
        if key != "global":
            walk(key, entry, chart.values.get(key), key in chart.values)
    readme = CHART / "README.md"
    before, rest = readme.read_text().split("<!-- values -->\n", 1)
    _, after = rest.split("<!-- end of values -->\n", 1)
    table = "\n".join(["| value | default | what it is |", "| --- | --- | --- |", *rows]) + "\n"
    text = f"{before}<!-- values -->\n{table}<!-- end of values -->\n{after}"
    if write:
        readme.write_text(text)
    check(readme.read_text() == text, "helm/README.md: the table of values is not what schema and defaults say; --write makes it")


def exported():
    """Names of every sample that the services export, from where they are registered."""
    names = set()
    for source in (ROOT / "crates/telemetry/src").glob("*.rs"):
        names |= set(re.findall(r'register\(\s*"(baton_\w+)"', source.read_text()))
    return {name + suffix for name in names for suffix in ("", "_total", "_bucket", "_sum", "_count")}


def queries(texts):
    """Every metric that alerts, dashboard and signals ask for exists; and each alert names its remedy."""
    known = exported()
    for where, text in texts.items():
        used = set(re.findall(r"\bbaton_[a-z_]+\b(?=[{\[])", text))
        check(used, f"{where} asks for no metric")
        check(used <= known, f"{where} asks for metrics that no service exports: {sorted(used - known)}")
    for group in yaml.safe_load((CHART / "files/alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            check(len(rule["annotations"].get("remedy", "")) > 40, f"alert {rule['alert']} names no remedy")


def promtool(documents_of):
    tool = shutil.which("promtool")
    if not tool:
        print("promtool is absent: rules are checked as text only (tests/install brings it)")
        return
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "rules.yaml"
        for name, documents in documents_of.items():
            for rule in (document for document in documents if document["kind"] == "PrometheusRule"):
                rules.write_text(yaml.safe_dump(rule["spec"]))
                run([tool, "check", "rules", rules], f"{name}: PrometheusRule")
    run([tool, "check", "config", "--syntax-only", ROOT / "deploy/prometheus/prometheus.yaml"], "deploy/prometheus/prometheus.yaml")
    run([tool, "test", "rules", ROOT / "tests/chart/alerts.yaml"], "tests/chart/alerts.yaml")


def run(command, what):
    done = subprocess.run(command, capture_output=True, text=True)
    check(done.returncode == 0, f"{what}: {done.stdout}{done.stderr}")


def main():
    write = "--write" in sys.argv[1:]
    report = helm.lint(CHART, strict=True)
    check(not report["errors"] and all(message["severity"] < 2 for message in report["messages"]), f"helm lint: {report}")
    documents_of = {}
    with helm.Chart.load(CHART) as chart:
        for name, values in value_sets().items():
            text = render(chart, values)
            golden(name, text, write)
            documents_of[name] = objects(text)
            schemas(name, documents_of[name])
            between_objects(name, documents_of[name])
        refusals(chart)
        documentation(chart, write)
    files = [CHART / "files/alerts.yaml", CHART / "files/dashboard.json", CHART / "templates/_signals.tpl"]
    queries({file.name: file.read_text() for file in files})
    promtool(documents_of)
    count = sum(map(len, documents_of.values()))
    print(f"{len(documents_of)} value sets, {count} objects, Kubernetes {', '.join(VERSIONS)}, Helm {helm.helm_sdk_version()}")
    for failure in failures:
        print("FAILED:", failure)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
