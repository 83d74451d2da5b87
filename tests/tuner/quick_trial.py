"""A trial that takes no time: answers what tune/measure asks with a made-up worth of the config. Behaviour by environment variables.

QUICK_SECONDS: how long it takes. QUICK_LOG: a file that gets a line for each trial begun.
"""

from __future__ import annotations

import json
import os
import sys
import time

NAMES = ("tile", "wide", "group")


def main() -> None:
    """Answers one request."""
    request = json.loads(sys.stdin.readline())
    config = request["config"]
    if "QUICK_LOG" in os.environ:
        with open(os.environ["QUICK_LOG"], "a") as file:
            file.write(json.dumps(config, sort_keys=True) + "\n")
    time.sleep(float(os.environ.get("QUICK_SECONDS", "0")))
    tile, wide, group = (config[f"forward {n}"] for n in NAMES)
    if (tile, wide) == (64, 4):
        os.abort()
    ratio = worth(config)
    rival = ratio / worth(request["incumbent"])
    print(
        json.dumps({"ratio": ratio, "rival": rival, "noise": 0.01, "time": 100 * ratio, "default": 100.0, "code": f"{tile} {wide} {group}"})
    )


def worth(config: dict[str, int]) -> float:
    """Returns the made-up time of a config over that of the defaults."""
    tile, wide, group = (config[f"forward {n}"] for n in NAMES)
    return 1.0 - 0.1 * (tile == 32) - 0.05 * (wide == 1) + 0.02 * abs(group - 2)


if __name__ == "__main__":
    main()
