"""Run `t2i` as `python -m text_to_image_client`."""

from .cli import main

main(prog_name="t2i")
