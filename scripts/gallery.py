"""Draw docs/gallery.png with the running service at T2I_TARGET, from fixed prompts and seeds without any selection.

The images are scaled down, so that the sheet fits the width of a page.
"""

import io
import os
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from text_to_image_client import TextToImage

PROMPTS = (
    "cat napping",
    "pizza",
    "red apple",
    "rocket",
    "3d dog face",
    "birthday cake",
    "a green apple",
    "a blue car",
    "outline of a house",
    "octopus",
    "a cat and a pizza",
    "someone laughing",
)
SEEDS = (0, 1)
COLUMNS = 6
SIDE = 160  # pixels of an image on the sheet
LABEL = 22  # pixels of height


def main() -> None:
    """Draw all images, paste them into one sheet and save it."""
    with TextToImage(os.environ["T2I_TARGET"]) as client:
        drawn = {prompt: [_draw(client, prompt, seed) for seed in SEEDS] for prompt in PROMPTS}
    rows = -(-len(PROMPTS) // COLUMNS)
    band = LABEL + len(SEEDS) * SIDE
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * band), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, (prompt, images) in enumerate(drawn.items()):
        row, column = divmod(index, COLUMNS)
        left, top = column * SIDE, row * band
        pen.text((left + SIDE / 2, top + LABEL / 2), prompt, "black", font, anchor="mm")
        for number, image in enumerate(images):
            sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top + LABEL + number * SIDE))
    path = Path("docs/gallery.png")
    path.parent.mkdir(exist_ok=True)
    sheet.save(path, optimize=True)
    print(path)


def _draw(client: TextToImage, prompt: str, seed: int) -> Image.Image:
    result = client.generate(prompt, seed=seed, format="png")
    return Image.open(io.BytesIO(result.images[0].data))


if __name__ == "__main__":
    main()
