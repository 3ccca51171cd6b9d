"""Print where every Python process below this step is: what a step that takes too long waits for."""

import subprocess
import sys
from pathlib import Path

import psutil

if __name__ == "__main__":
    py_spy = str(Path(sys.executable).with_name("py-spy"))
    for process in psutil.Process(int(sys.argv[1])).children(recursive=True):
        try:
            print(f"\n--- {process.pid}, child of {process.ppid()}: {' '.join(process.cmdline())[:300]}", flush=True)
            if "python" in process.exe():
                command = [py_spy, "dump", "--pid", str(process.pid)]
                subprocess.run(command, check=False, timeout=30, stderr=subprocess.STDOUT)
        except (psutil.Error, OSError, subprocess.TimeoutExpired) as error:
            print(error, flush=True)
