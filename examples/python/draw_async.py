"""Draw several prompts at once with the asyncio client.

python draw_async.py 127.0.0.1:50051 FOLDER "a red apple" "a blue heart"
"""

import asyncio
import sys
from pathlib import Path

from text_to_image_client import AsyncTextToImage


async def main(target: str, folder: Path, prompts: list[str]) -> None:
    async with AsyncTextToImage(target) as client, asyncio.TaskGroup() as group:
        # If one call fails, the group cancels the others, and the server stops drawing them.
        for number, prompt in enumerate(prompts):
            group.create_task(draw(client, prompt, folder / f"{number}.png"))


async def draw(client: AsyncTextToImage, prompt: str, file: Path) -> None:
    result = await client.generate(prompt, seed=7, format="png", timeout=60)
    result.images[0].save(file)
    print(f"wrote {file}: {prompt}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
