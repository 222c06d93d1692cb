"""Progress is a live display on a terminal and plain lines elsewhere."""

import io

from rich.console import Console

from text_to_image_client import Progress, Queued, Stage
from text_to_image_client.cli._progress import display_for


def show(images: int | None, *events: Queued | Progress, terminal: bool) -> str:
    """Returns the output of a display of `events`."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    with display_for(console, images) as display:
        for event in events:
            display.show(event)
        display.finish(0, "cat.jpg")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def steps(stage: Stage, count: int, choice_index: int = 0) -> list[Progress]:
    return [Progress(choice_index, stage, step + 1, count, 2.0 * (count - step)) for step in range(count)]


def test_plain_lines_show_the_queue_each_stages_end_and_the_file():
    events = (Queued(2, 75.0), *steps(Stage.BASE, 16), *steps(Stage.REFINER, 4))
    assert show(1, *events, terminal=False).splitlines() == [
        "queued, 2 ahead, 1 min 15 s left",
        "base 16/16, 2.0 s left",
        "refiner 4/4, 2.0 s left",
        "cat.jpg",
    ]


def test_plain_lines_name_the_image_when_there_are_several():
    events = (*steps(Stage.ENCODE, 1), *steps(Stage.BASE, 2, choice_index=1))
    assert show(3, *events, terminal=False).splitlines()[:2] == [
        "encode 1/1, 2.0 s left",
        "image 2 of 3 base 2/2, 2.0 s left",
    ]


def test_plain_lines_number_the_image_of_an_unknown_total():
    assert show(None, *steps(Stage.BASE, 2, choice_index=1), terminal=False).startswith("image 2 base 2/2")


def test_on_a_terminal_every_stage_keeps_its_row_above_the_file():
    events = (Queued(0, None), *steps(Stage.ENCODE, 1), *steps(Stage.BASE, 16), *steps(Stage.REFINER, 4))
    last = show(1, *events, terminal=True).rsplit("encode", 1)[1]
    assert [name for name in ("1/1", "base", "16/16", "refiner", "4/4", "cat.jpg") if name in last] == [
        *("1/1", "base", "16/16", "refiner", "4/4", "cat.jpg"),
    ]
    assert "left" not in last


def test_on_a_terminal_a_finished_image_of_several_leaves_one_line():
    events = (*steps(Stage.BASE, 4), *steps(Stage.BASE, 4, choice_index=1)[:2])
    last = show(2, *events, terminal=True).rsplit("cat.jpg", 1)[1]
    assert "image 1 of 2" not in last
    assert "image 2 of 2 base" in last


def test_on_a_terminal_a_heartbeat_of_a_finished_image_changes_nothing():
    first = steps(Stage.DECODE, 1)
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with display_for(console, 2) as display:
        display.show(first[0])
        display.finish(0, "cat.jpg")
        display.show(first[0])  # a heartbeat
    assert isinstance(console.file, io.StringIO)
    assert "decode" not in console.file.getvalue().rsplit("cat.jpg", 1)[1]
