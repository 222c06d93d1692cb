"""Calls the servers at TARGET, as many at once as WORKERS, until its input ends; then tells how it went, as JSON.

A process of its own, since a client under load is not to share an interpreter with the test that watches it.
"""

import json
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from text_to_image_client import TextToImage, TextToImageError

PAUSE_SECONDS = 0.05  # of each worker between its calls, or servers that start beside it get no processor
stopping = threading.Event()


def call(client: TextToImage, worker: int) -> Counter[str]:
    """Whole answers and streams in turn; how they ended, by outcome."""
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
