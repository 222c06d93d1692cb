"""Draw an image with the Python client, and show its progress.

python draw.py 127.0.0.1:50051 "a red apple" apple.jpg
"""

import sys

from text_to_image_client import ImageReady, Progress, TextToImage, TextToImageError

target, prompt, file = sys.argv[1:]

try:
    with TextToImage(target) as client:
        for event in client.stream(prompt, seed=7, timeout=60):
            if isinstance(event, Progress):
                print(f"{event.stage} {event.step} of {event.steps}")
            elif isinstance(event, ImageReady):
                event.image.save(file)
                print(f"wrote {file}")
except TextToImageError as error:
    sys.exit(f"{error.code.name}: {error}")
