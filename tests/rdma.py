"""The hand-off over verbs: a virtual machine with Debian's kernel and a software RDMA device (soft-RoCE) runs the protocol's tests, the
bench, and golden questions to a prefill and a decode worker, over NIXL with no other transport to fall back on. The machine is emulated
and the device is software: what it shows is that it works, never how fast.

    tests/nixl python3 tests/rdma.py BATON WIRE RESULT.json

BATON is built with the feature rdma; WIRE is the test binary `wire` of the crate handoff, built with it too.
"""

import datetime
import gzip
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULES = ["crc32_generic", "udp_tunnel", "ip6_udp_tunnel", "ib_core", "ib_uverbs", "rdma_rxe", "veth"]
PROVIDER = pathlib.Path("/usr/lib/x86_64-linux-gnu/libibverbs/librxe-rdmav34.so")
TOOLS = ["/usr/bin/rdma", "/usr/bin/ip", "/usr/bin/curl", "/bin/busybox"]
QUESTIONS = 12
LIMIT = 3000


def main(baton, wire, result):
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        kernel, modules = fetch_kernel(work)
        image = pack(fill(work / "image", baton, wire, modules), work / "initrd.gz")
        print(f"starting the guest: kernel {kernel.name}, {image.stat().st_size >> 20} MiB of programs", flush=True)
        lines, console = boot(kernel, image)
    figures = understand(lines) | {"kernel": kernel.name, "emulated_on": platform.processor() or platform.machine()}
    path = pathlib.Path(result)
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nwritten to {path}")
    failed = [step["name"] for step in figures["steps"] if step["exit"] != 0 or not step["packets"]]
    if failed or not figures["ended"]:
        sys.exit(f"the proof failed: {', '.join(failed) or 'the guest did not come to its end'}; the last it said:\n" + "\n".join(console[-30:]))


def fetch_kernel(work):
    """Debian's own kernel, unpacked and never installed."""
    depends = subprocess.run(["apt-cache", "depends", "linux-image-amd64"], check=True, capture_output=True, text=True).stdout
    package = re.search(r"linux-image-\d\S*-amd64", depends).group()
    subprocess.run(["apt-get", "download", "-q", package], cwd=work, check=True, capture_output=True)
    subprocess.run(["dpkg", "-x", next(work.glob("linux-image*.deb")), work / "kernel"], check=True)
    return next((work / "kernel/boot").glob("vmlinuz-*")), next((work / "kernel/lib/modules").iterdir())


def fill(image, baton, wire, modules):
    """The guest's whole file system."""
    for folder in ["bin", "sbin", "lib/nixl", "lib64", "proc", "sys", "dev", "tmp", "modules", "etc/libibverbs.d", "usr/lib/x86_64-linux-gnu/libibverbs"]:
        (image / folder).mkdir(parents=True)
    for name, program in [("baton", baton), ("wire", wire)]:
        subprocess.run(["strip", "-o", image / name, program], check=True)
    for name in MODULES:
        shutil.copy(next(modules.rglob(f"{name}.ko")), image / "modules")
    (image / "modules/order").write_text("\n".join(MODULES))
    shutil.copy(ROOT / "tests/rdma/init", image / "init")
    (image / "init").chmod(0o755)
    tools = [pathlib.Path(tool) for tool in TOOLS if pathlib.Path(tool).exists()]
    for tool in tools:
        shutil.copy(tool, image / "bin")
    for applet in subprocess.run(["/bin/busybox", "--list"], check=True, capture_output=True, text=True).stdout.split():
        if not (image / "bin" / applet).exists():
            (image / "bin" / applet).symlink_to("busybox")
    nixl = [library for folder in os.environ["LD_LIBRARY_PATH"].split(":") if folder for library in pathlib.Path(folder).glob("*.so*")]
    plugins = [library for library in pathlib.Path(os.environ["NIXL_PLUGIN_DIR"]).glob("*UCX*")]
    ucx = [library for folder in os.environ["LD_LIBRARY_PATH"].split(":") if folder for library in pathlib.Path(folder).glob("ucx/*.so*")]
    lay(image / "lib/nixl", plugins)
    lay(image / "lib", nixl)
    (image / "lib/ucx").mkdir()
    lay(image / "lib/ucx", [library for library in ucx if not re.search("cuda|rocm|ze|gdr", library.name)])
    lay(image / "lib", needed([image / "baton", image / "wire", *tools, *nixl, *plugins, *ucx, PROVIDER]))
    verbs(image)
    write_questions(image)
    return image


def lay(folder, libraries):
    for library in libraries:
        if not (folder / library.name).exists():
            shutil.copy(library, folder / library.name)


def needed(programs):
    """Shared libraries of this machine that they load."""
    found = set()
    for program in programs:
        told = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
        found |= {pathlib.Path(path) for path in re.findall(r"(?:=> |^\s)(/\S+)", told, re.MULTILINE)}
    return sorted(found | {pathlib.Path("/lib/x86_64-linux-gnu/libgcc_s.so.1"), pathlib.Path("/lib/x86_64-linux-gnu/libibverbs.so.1")})


def verbs(image):
    """The wheel's own libibverbs looks for providers elsewhere and does not find soft-RoCE: Debian's takes its place."""
    shutil.copy(PROVIDER, image / "usr/lib/x86_64-linux-gnu/libibverbs")
    (image / "etc/libibverbs.d/rxe.driver").write_text("driver rxe\n")
    loader = pathlib.Path("/lib64/ld-linux-x86-64.so.2")
    shutil.copy(loader, image / "lib64")
    for private in (image / "lib").glob("libibverbs-*.so*"):
        shutil.copy("/lib/x86_64-linux-gnu/libibverbs.so.1", private)


def write_questions(image):
    golden = [json.loads(line) for line in (ROOT / "deploy/demo/golden.jsonl").read_text().splitlines()][:QUESTIONS]
    ask = lambda item: {"model": "baton-demo", "messages": [{"role": "user", "content": item["question"]}], "temperature": 0}
    (image / "questions").write_text("".join(json.dumps(ask(item)) + "\n" for item in golden))
    (image / "answers").write_text("".join(json.dumps(item["answer"], ensure_ascii=False) + "\n" for item in golden))


def pack(image, to):
    names = subprocess.run(["find", "."], cwd=image, check=True, capture_output=True).stdout
    archive = subprocess.run(["cpio", "-o", "-H", "newc", "--quiet", "-R", "0:0"], cwd=image, input=names, check=True, capture_output=True).stdout
    to.write_bytes(gzip.compress(archive, 1))
    return to


def boot(kernel, image):
    """Whatever the guest says, as it says it."""
    command = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "6144", "-nodefaults", "-nographic", "-no-reboot",
               "-serial", "stdio", "-kernel", str(kernel), "-initrd", str(image), "-append", "console=ttyS0 quiet panic=1"]
    lines, console = [], []
    guest = subprocess.Popen(["timeout", str(LIMIT), *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    for line in guest.stdout:
        line = line.rstrip()
        print("  |", line, flush=True)
        console.append(line)
        lines += [line.split("RESULT ", 1)[1]] if "RESULT " in line else []
    guest.wait()
    return lines, console


def understand(lines):
    figures = {"date": datetime.date.today().isoformat(), "device": None, "steps": [], "bench": None, "answers": None, "metrics": [], "failed": [], "ended": False}
    for line in lines:
        kind, _, rest = line.partition(" ")
        if kind == "step":
            name, code, packets, began, ended = rest.split()
            figures["steps"].append({"name": name, "exit": int(code), "packets": int(packets), "seconds": round(float(ended) - float(began), 1)})
        elif kind == "bench":
            figures["bench"] = json.loads(rest)
        elif kind == "answers":
            asked, right = map(int, rest.split())
            figures["answers"] = {"asked": asked, "right": right}
        elif kind == "metric":
            figures["metrics"].append(rest)
        elif kind == "end":
            figures["ended"] = True
        elif kind in ("device", "failed"):
            figures[kind] = rest if kind == "device" else figures["failed"] + [rest]
    return figures


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
