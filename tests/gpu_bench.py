"""The whole model on a GPU, in one command: `baton bench-engine` on both configurations of deploy/bench, every case, a long run and
the time of each operation; and the hand-off between two processes on one GPU (`baton bench-handoff`), in one JSON file. Nothing is
compiled here.

    python3 tests/gpu_bench.py BATON RESULT.json [slice9|ep32|handoff ...]
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time

baton, result_path, *chosen = sys.argv[1:]
here = os.path.dirname(os.path.abspath(__file__))
ALL = ["decode:1x4096", "decode:8x4096", "decode:32x4096", "decode:64x4096", "decode:128x4096", "decode:256x4096",
       "decode:128x1024", "decode:32x16384", "prefill:1x4096", "prefill:4x4096", "prefill:1x16384"]
FEW = ["decode:1x4096x4", "decode:32x4096x4", "decode:128x4096x4", "decode:256x4096x4", "prefill:4x4096x2", "prefill:1x16384x2"]
# (name, what is chosen by, arguments): a run loads the model once.
RUNS = [
    ("slice9", "slice9", ALL + ["decode:256x4096x500"]),
    ("slice9 by operation", "slice9", ["--kernels", *FEW]),
    ("ep32", "ep32", ALL),
    ("ep32 by operation", "ep32", ["--kernels", *FEW]),
    ("handoff", "handoff", []),
]
# A run that hangs must not take the time of the others.
SECONDS = 150


def run(model, arguments):
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        path = os.path.join(here, "../deploy/bench", model)
        of_model = ["bench-engine", "--model", path, "--seed", "1"]
        command = [baton, *(["bench-handoff"] if model == "handoff" else of_model), "--backend", "cuda", "--json", out.name, *arguments]
        began = time.monotonic()
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired as error:
            said = (error.stderr or b"").decode(errors="replace")
            return {"error": f"not done after {SECONDS} s", "log": said[-3000:]}
        print(ended.stdout, end="", flush=True)
        if ended.returncode:
            return {"error": ended.stderr[-3000:]}
        measured = json.load(out)
        measured["seconds"] = round(time.monotonic() - began, 1)
        return measured


result = {"date": datetime.date.today().isoformat(), "runs": {}}
for name, model, arguments in RUNS:
    if chosen and model not in chosen:
        continue
    print(f"== {name}", flush=True)
    result["runs"][name] = run(model, arguments)
    if "error" in result["runs"][name]:
        print(result["runs"][name]["error"], result["runs"][name].get("log", ""), flush=True)
    # After every run, so that a machine which is taken away leaves what was measured.
    with open(result_path, "w", encoding="utf-8") as out:
        json.dump(result, out, indent=1)
        out.write("\n")
sys.exit(any("error" in measured for measured in result["runs"].values()))
