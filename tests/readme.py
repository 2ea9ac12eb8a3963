"""README's commands, each as it stands there. Those that ask are asked of a running cluster; those that install are rendered by Helm's own
engine; those that build or test must exist where they point. A command of a kind that is not known here fails: nothing is promised unproved.

    python3 tests/readme.py BATON URL
"""

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import helm_python as helm
import yaml

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
THERE = "http://127.0.0.1:8000"
GOLDEN = "Appends an element to the back of a collection."


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def run(command, folder, **options):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, **options)
    return done.returncode, done.stdout + done.stderr


class Commands:
    def __init__(self, baton, url, folder):
        self.binary, self.url, self.folder, self.tried = baton, url, folder, []
        self.objects = []

    def try_block(self, block):
        """A command may go over several lines: in quotes, or with a backslash at the end."""
        lines = block.replace("\\\n", " ").strip().split("\n")
        command = ""
        for line in lines:
            command += line + "\n"
            if command.count("'") % 2 == 0:
                self.try_command(command.strip())
                command = ""
        assert not command, f"unbalanced quotes: {command}"

    def try_command(self, command):
        kind = command.split()[0]
        trier = getattr(self, kind, None)
        assert trier, f"README has a command that nothing here tries: {command}"
        trier(command)
        self.tried.append(command.split("\n")[0])

    def curl(self, command):
        assert THERE in command, command
        code, said = run(["bash", "-c", command.replace(THERE, self.url)], self.folder)
        assert code == 0 and GOLDEN in said, said

    def make(self, command):
        code, said = run([*shlex.split(command), "--dry-run", "--no-print-directory"], ROOT)
        assert code == 0 and said.strip(), f"{command}: {said}"

    def baton(self, command):
        """Every subcommand and flag is in its own help."""
        words = shlex.split(command.split(">>")[0].split("#")[0])[1:]
        words = words[: words.index("|")] if "|" in words else words
        subcommand = words[0]
        code, said = run([self.binary, subcommand, "--help"], self.folder)
        assert code == 0, f"{command}: {said}"
        for flag in [word.split("=")[0] for word in words if word.startswith("--")]:
            deeper = said if flag in said else run([self.binary, *words[:2], "--help"], self.folder)[1]
            assert flag in deeper, f"{command}: {flag} is not in the help of `baton {subcommand}`"

    def openssl(self, command):
        """Makes a file, here in a folder of the test's own."""
        file = self.folder / command.split("> ")[1]
        file.parent.mkdir(parents=True)
        code, said = run(["bash", "-c", command], self.folder)
        assert code == 0 and len(file.read_text().strip()) >= 32, f"{command}: {said}"

    def docker(self, command):
        words = shlex.split(command)
        if words[1] in ("tag", "push"):
            version = yaml.safe_load((ROOT / "helm/Chart.yaml").read_text())["appVersion"]
            assert words[-1] == f"REGISTRY/baton:{version}", f"{command}: the chart takes {version}"
            return
        file = ROOT / words[words.index("-f") + 1]
        if words[1] == "build":
            target = words[words.index("--target") + 1]
            assert re.search(rf"^FROM .* AS {target}$", file.read_text(), re.M | re.I), f"{file} has no target {target}"
        else:
            assert yaml.safe_load(file.read_text())["services"], command

    def helm(self, command):
        words = shlex.split(command)
        if words[1] == "test":
            return
        values = {}
        for setting in [word for flag, word in zip(words, words[1:]) if flag == "--set"]:
            key, value = setting.split("=", 1)
            place = values
            for part in key.split(".")[:-1]:
                place = place.setdefault(part, {})
            place[key.split(".")[-1]] = yaml.safe_load(value)
        with helm.Chart.load(ROOT / "helm") as chart:
            manifests = chart.render(values, name=words[2], namespace="inference")
        texts = [text for path, text in manifests.items() if path.endswith(".yaml")]
        self.objects = [thing for text in texts for thing in yaml.safe_load_all(text) if thing]
        assert any(thing["kind"] == "Deployment" for thing in self.objects), command

    def kubectl(self, command):
        names = {f"{thing['kind'].lower()}/{thing['metadata']['name']}" for thing in self.objects}
        for thing in re.findall(r"(?:deployment|statefulset|service|svc)/\S+", command):
            assert thing.replace("svc/", "service/") in names, f"{command}: the chart makes no {thing}"


def keys(commands, block):
    """The gateway with keys, run as it stands there but for its ports: it asks for the key that was made."""
    make, serve = block.strip().split("\n")
    code, key = run(["bash", "-c", make.replace("baton ", f"{commands.binary} ", 1)], commands.folder)
    assert code == 0, key
    (commands.folder / "gateway.toml").write_text('listen = "127.0.0.1:0"\nadmin = "127.0.0.1:0"\nrouters = ["http://127.0.0.1:1"]\n')
    words = [commands.binary, *shlex.split(serve)[1:]]
    gateway = subprocess.Popen(words, cwd=commands.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        line = next(line for line in gateway.stdout if "listening" in line)
        address = re.search(r"http://127\.0\.0\.1:\d+", line).group()
        code, said = run(["curl", "-s", f"{address}/v1/models"], commands.folder)
        assert "api key" in said.lower(), said
    finally:
        gateway.kill()
    commands.tried += [make, serve]


def main(baton, url):
    with tempfile.TemporaryDirectory() as folder:
        commands = Commands(baton, url, Path(folder))
        for block in blocks("sh"):
            keys(commands, block) if block.startswith("baton key new") else commands.try_block(block)
        for program in blocks("python"):
            code, said = run([sys.executable, "-c", program.replace(THERE, url)], folder)
            assert code == 0 and GOLDEN in said, said
        inline = {command for command in re.findall(r"`((?:baton|make) [^`\n]+)`", README)}
        for command in sorted(inline):
            command = command.replace("\\|", "|")
            commands.baton(command) if command.startswith("baton") else commands.make(re.sub(r"[A-Z]+=\S*\.\.\S*", "", command))
            commands.tried.append(command)
    print(f"{len(commands.tried)} commands of README were tried")


if __name__ == "__main__":
    main(*sys.argv[1:])
