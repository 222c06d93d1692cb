"""`python -m text_to_image_client` is `t2i`."""

from .cli import main

main(prog_name="t2i")
