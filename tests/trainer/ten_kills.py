"""The reference run, killed at ten random moments with kill -9 and resumed each time.

    python tests/trainer/ten_kills.py OUT [KILLS] [SEED]

Ten minutes on two cores, so no part of `make test`; what it gave is in docs/log.md. Compare the
outcome with that of an undisturbed run (`kimisys train --rollouts whole`).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

FIRST, LAST = 5.0, 90.0  # seconds from a start to a kill


def main(out: Path, kills: int, seed: int) -> None:
    moments = random.Random(seed)
    base = [sys.executable, "-m", "kimisys.trainer.cli", "train"]
    for life in range(kills + 1):
        new = not (out / "config.json").exists()
        begun = ["--out", str(out), "--rollouts", "whole"] if new else ["--resume", str(out)]
        command = [*base, *begun]
        with open(out.with_suffix(".log"), "a", encoding="utf-8") as log:
            run = subprocess.Popen(command, stdout=log, stderr=log)
        if life == kills:
            break
        seconds = moments.uniform(FIRST, LAST)
        time.sleep(seconds)
        if run.poll() is not None:
            print("the run has ended before all kills", flush=True)
            break
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        time.sleep(3)  # for the keeper
        newest = sorted(path.name for path in (out / "checkpoints").glob("*-??????"))
        print(
            f"life {life + 1}: killed after {seconds:.0f} s; {newest or 'no checkpoint'}",
            flush=True,
        )
    assert run.wait() == 0, f"the last life failed; see {out.with_suffix('.log')}"
    summary = json.loads((out / "summary.json").read_text())
    for name in ("pass_rate_after", "greedy_after", "length_after", "resumed_at", "steps"):
        print(f"{name}: {summary[name]}")


if __name__ == "__main__":
    folder, kills, seed = [*sys.argv[1:], *("10", "1")[len(sys.argv) - 2 :]]
    main(Path(folder), int(kills), int(seed))
