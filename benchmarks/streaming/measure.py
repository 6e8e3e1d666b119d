"""What a command takes: seconds, and the peak resident memory of its process as the kernel counts it (ru_maxrss).

python measure.py -- phasequant quantize MODEL -r quarot -o OUT --stream
"""

import json
import resource
import subprocess
import sys
import time


def measure(command: list[str]) -> dict[str, float]:
    """Run a command to its end; raises where it fails."""
    start = time.monotonic()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": round(seconds, 1), "peak_bytes": peak, "peak_gib": round(peak / 2**30, 3)}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[sys.argv.index("--") + 1 :])))
