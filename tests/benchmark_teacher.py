"""How many answers a second the teacher takes in, next to what the concurrency allows. A benchmark, not a test.

    python tests/benchmark_teacher.py --concurrency 32 --seconds 1 --trajectories 640

The server of the tests takes `--seconds` for each answer, so that `--concurrency` / `--seconds` answers a second are
the most there can be. Counted from the first question to the last answer, trajectories being at hand.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from openai_server import Server
from test_teacher import House, trajectories

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--concurrency", type=int, default=32)
parser.add_argument("--seconds", type=float, default=1.0)
parser.add_argument("--trajectories", type=int, default=640)
args = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    house, server = House(Path(folder)), Server(seconds=args.seconds)
    episodes = trajectories(house.input, args.trajectories)
    house.annotate(server, "--concurrency", args.concurrency)
    house.check(episodes)
    moments = [moment for _, moment in server.times]
    rate = args.trajectories / (server.last_answer - min(moments))
    most = args.concurrency / args.seconds
    print(f"{rate:.1f} answers a second of at most {most:.1f}: ratio {rate / most:.3f} "
          f"({args.trajectories} trajectories, all labelled, {sum(server.paid.values())} paid calls)")
