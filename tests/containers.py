"""A container engine of a test's own, and Baton's compose file run on it.

The engine lives and dies with the test: tests/contained starts the test in network, mount and process namespaces of its own, so that nothing
here meets the machine's engine, its firewall or its networks, and nothing is left behind. There is no way out of that network either:
images are made of what this machine has.
"""

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PREBUILT = ROOT / "target/image/baton"
BATON = "baton:test"
# Other programs of the compose file, and the settings that name their images. Grafana is not among Debian's packages.
OTHERS = {"etcd": "ETCD_IMAGE"}
SERVICES = ["etcd-1", "etcd-2", "etcd-3", "router", "gateway", "prefill-1", "prefill-2", "decode-1", "decode-2"]
# Where tests/install could not have them, tests do without and say so.
if shutil.which("prometheus"):
    OTHERS["prometheus"] = "PROMETHEUS_IMAGE"
    SERVICES.append("prometheus")
if shutil.which("otelcol"):
    OTHERS["otelcol"] = "OTEL_IMAGE"
    SERVICES.append("otel")
URL = "http://127.0.0.1:8000"


def run(command, **options):
    """Runs a command and returns what it printed; says both if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\nended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def until(what, condition, patience=60):
    """Waits until a condition holds, and returns what it found."""
    deadline = time.monotonic() + patience
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"not after {patience} s: {what}")
        time.sleep(0.1)
    return found


def get(url):
    """Status and body."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError as error:
        return 0, str(error).encode()


class Engine:
    """dockerd, with its images and containers, for as long as the test runs."""

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="baton-containers-"))
        socket = self.folder / "engine.sock"
        self.environment = os.environ | {"DOCKER_HOST": f"unix://{socket}", "DOCKER_BUILDKIT": "1", "COMPOSE_PROJECT_NAME": "baton"}
        self.environment |= {"BATON_IMAGE": BATON} | {variable: f"{name}:test" for name, variable in OTHERS.items()}
        token = self.folder / "admin-token"
        token.write_text("0123456789-0123456789")
        token.chmod(0o644)
        self.folder.chmod(0o755)
        self.environment["BATON_ADMIN_TOKEN_FILE"] = str(token)
        run(["ip", "link", "set", "lo", "up"])
        flags = ["--data-root", self.folder / "data", "--exec-root", self.folder / "exec", "--pidfile", self.folder / "pid", "-H", f"unix://{socket}"]
        with open(self.folder / "log", "w") as log:
            self.process = subprocess.Popen(["dockerd", *map(str, flags)], stdout=log, stderr=log)
        until("dockerd answers", lambda: self.docker("info", check=False).returncode == 0, 120)
        return self

    def __exit__(self, *_):
        containers = self.docker("ps", "-aq").split()
        if containers:
            self.docker("rm", "-f", *containers)
        self.process.terminate()
        self.process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)

    # Debian's client has BuildKit in it; newer ones need a plugin for it.
    CLIENT = next((path for path in ("/usr/bin/docker", "docker") if shutil.which(path)), "docker")

    def docker(self, *arguments, check=True, **options):
        command = [self.CLIENT, *map(str, arguments)]
        if check:
            return run(command, env=self.environment, **options)
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, **options)

    def compose(self, *arguments):
        return run(["docker-compose", "-f", ROOT / "deploy/compose.yaml", *arguments], env=self.environment)

    def build(self):
        """Every image, from this machine's own programs and the libraries that they link."""
        programs = {name: Path(shutil.which(name) or raise_absent(name)).resolve() for name in OTHERS}
        self.base(programs.values())
        deploy = ["build", "-q", "-f", ROOT / "deploy/Dockerfile", "--build-arg", "BINARY=prebuilt", "--build-arg", "BASE_IMAGE=base:test"]
        self.docker(*deploy, "--target", "baton", "-t", BATON, ROOT)
        for name in OTHERS:
            context = self.folder / name
            context.mkdir()
            shutil.copy(programs[name], context / name)
            lines = ["FROM base:test", f"COPY {name} /usr/local/bin/{name}"]
            lines += [f'ENTRYPOINT ["/usr/local/bin/{name}"]'] if name != "etcd" else []
            (context / "Dockerfile").write_text("\n".join(lines))
            self.docker("build", "-q", "-t", f"{name}:test", context)

    def base(self, others):
        """A base image as small as the published one: the C library, libgcc, and who is who."""
        libraries = set()
        for program in [PREBUILT, *others]:
            listed = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
            libraries |= {word for word in listed.split() if word.startswith("/")}
        with tarfile.open(self.folder / "base.tar", "w") as tar:
            for library in sorted(libraries):
                tar.add(os.path.realpath(library), arcname=library)
            for name, text in (("etc/passwd", "nonroot:x:65532:65532::/:/none\n"), ("etc/nsswitch.conf", "hosts: files dns\n")):
                (self.folder / "file").write_text(text)
                tar.add(self.folder / "file", arcname=name)
        self.docker("import", "--change", "ENV PATH=/usr/local/bin", self.folder / "base.tar", "base:test")

    def start(self):
        """The compose file's cluster, ready."""
        self.compose("up", "-d", *SERVICES)
        try:
            until("the gateway is ready", lambda: get(f"{URL}/ready")[0] == 200, 300)
        except SystemExit as error:
            raise SystemExit(f"{error}\n{get(f'{URL}/ready')[1].decode()}\n{self.compose('logs', '--tail=20')}")

    def container(self, service):
        return self.compose("ps", "-q", service).strip()

    def inspect(self, container):
        return json.loads(self.docker("inspect", container))[0]


def raise_absent(name):
    raise SystemExit(f"{name} is absent; tests/install brings it")
