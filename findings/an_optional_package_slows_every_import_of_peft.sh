#!/usr/bin/env bash
# PEFT 0.21.2 and bitsandbytes 0.50.2: once bitsandbytes is installed, `import peft` takes several times as long, used or not.
#
# Expected: an optional package costs nothing until a model is quantised with it.
# Seen:     PEFT imports bitsandbytes wherever it finds it, bitsandbytes decorates its functions for torch's compiler, and that loads torch's
#           compiler: more than 2 seconds of processor time on top in each process that imports peft, trl or a model with an adapter.
# Hurts:    whoever starts many short processes (tests, ranks, data workers by spawn, command lines) in an environment with bitsandbytes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "peft==0.21.2" "transformers==5.24.0" "torch==2.13.0" "accelerate==1.15.0"
measure() {
    "$folder/venv/bin/python" - 2> "$folder/log" <<'PY' || { tail -20 "$folder/log"; exit 1; }
import statistics
import subprocess
import sys

code = "import time; t = time.process_time(); import torch; u = time.process_time(); import peft; print(time.process_time() - u)"
seconds = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(4)]
print(statistics.median(seconds[1:]))
PY
}
without=$(measure)
"$folder/venv/bin/pip" install --quiet --no-deps "bitsandbytes==0.50.2"
with=$(measure)
echo "import peft after torch, processor seconds: $without without bitsandbytes, $with with it"
"$folder/venv/bin/python" - "$without" "$with" <<'PY'
import sys

import torch  # noqa: F401

without, beside = map(float, sys.argv[1:])
before = "torch._inductor" in sys.modules
import peft  # noqa: E402, F401

print("torch's compiler was loaded by it:", not before and "torch._inductor" in sys.modules)
assert not before and "torch._inductor" in sys.modules and beside > without, "changed: this finding is out of date"
PY
