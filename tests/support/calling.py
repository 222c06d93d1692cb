"""Call the servers at TARGET from WORKERS threads until standard input ends; then print the outcomes as JSON.

It is a process of its own: a client under load must not share an interpreter with the test that watches it.
"""

import json
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from text_to_image_client import TextToImage, TextToImageError

PAUSE_SECONDS = 0.05  # between the calls of a worker, which leaves the processor to servers that start at the same time
stopping = threading.Event()


def call(client: TextToImage, worker: int) -> Counter[str]:
    """Make unary and streaming calls in turn; count their outcomes."""
    outcomes: Counter[str] = Counter()
    while not stopping.wait(PAUSE_SECONDS):
        try:
            if worker % 2:
                client.generate("a cat", steps=2)
            else:
                for _ in client.stream("a cat", steps=2):
                    pass
            outcomes["ok"] += 1
        except TextToImageError as error:
            outcomes[f"{type(error).__name__}: {error}"] += 1
    return outcomes


target, workers = sys.argv[1], int(sys.argv[2])
with TextToImage(target, round_robin=True) as client, ThreadPoolExecutor(workers) as pool:
    calls = [pool.submit(call, client, worker) for worker in range(workers)]
    sys.stdin.read()
    stopping.set()
    print(json.dumps(sum((each.result() for each in calls), Counter())))  # noqa: T201
