"""Another process that knows configurations alone: reads [[config, train, infer], ...] as JSON, and
prints for each the fingerprints of both layouts and of the plan."""

from __future__ import annotations

import json
import sys

from chain_worlds import sides

from kimisys.reshard import symbolic_plan


def main() -> None:
    found = []
    for config, train, infer in json.load(sys.stdin):
        source, destination = sides(config, train, infer)
        made = symbolic_plan(source, destination)
        found.append([source.fingerprint, destination.fingerprint, made.fingerprint])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
