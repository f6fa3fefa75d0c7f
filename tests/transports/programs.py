"""Small programs that are sent to a device and run there."""

from __future__ import annotations

# What it was given and where it is, as JSON.
TELL = """
import json, os, platform, sys
import numpy
files = sorted(os.path.relpath(os.path.join(folder, name)) for folder, _, names in os.walk(".") for name in names)
size = os.path.getsize("data/zeros.bin") if os.path.exists("data/zeros.bin") else None
print(json.dumps({"arguments": sys.argv[1:], "stdin": sys.stdin.read(), "files": files, "cwd": os.getcwd(),
                  "machine": platform.machine(), "sum": int(numpy.arange(5).sum()), "size": size}))
print("to the other stream", file=sys.stderr)
sys.exit(7)
"""

# Starts a child, writes both process ids into a file beside it and never ends.
HANG = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"])
pathlib.Path("pids.part").write_text(f"{os.getpid()} {child.pid}")
os.rename("pids.part", sys.argv[1])
time.sleep(600)
"""

HANG_SHELL = """
sleep 600 &
echo "$$ $!" > pids.part
mv pids.part "$1"
wait
"""

KILL_ITSELF = "import os; os.kill(os.getpid(), 9)"
