"""The input of `t2i run -i` is parsed strictly, and all errors are reported at once."""

import pytest

from text_to_image_client import InvalidRequest
from text_to_image_client.cli._instill import parse_input


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ('{"prompt": "cat napping"}', {}),
        ('{"data": {"prompt": "cat napping"}}', {}),
        ('{"data": {"prompt": "cat napping", "model": "mini"}, "parameter": {}}', {"model": "mini"}),
        (
            '{"data": {"prompt": "cat napping"}, '
            '"parameter": {"aspect-ratio": "16:9", "negative-prompt": "dog", "n": 2, "seed": 0}}',
            {"aspect_ratio": "16:9", "negative_prompt": "dog", "n": 2, "seed": 0},
        ),
        ('{"data": {"prompt": "cat napping"}, "parameter": {"n": 2.0}}', {"n": 2}),
        (
            '{"data": {"prompt": "cat napping"}, "parameter": {"aspect_ratio": "16:9", "negative_prompt": "dog"}}',
            {"aspect_ratio": "16:9", "negative_prompt": "dog"},
        ),
    ],
)
def test_the_short_and_the_full_form_are_accepted(text: str, options: dict[str, object]):
    assert parse_input(text) == ("cat napping", options)


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        ("cat napping", {"the input is not JSON: Expecting value: line 1 column 1 (char 0)"}),
        ('["cat"]', {'not ["cat"]'}),
        ("{}", {"data: is missing"}),
        ('{"prompt": 3}', {"prompt: must be a string, not 3"}),
        ('{"prompt": "cat", "seed": 1}', {"seed: is unknown; the known fields are prompt"}),
        ('{"data": "cat"}', {'data: must be an object, not "cat"'}),
        ('{"data": {}}', {"data.prompt: is missing"}),
        ('{"data": {"prompt": "cat"}, "prompt": "cat"}', {"prompt: is unknown; the known fields are data, parameter"}),
        (
            '{"data": {"promt": "cat"}, "parameter": {"n": "2", "seed": 1.5, "steps": 3, "aspect-ratio": true}}',
            {
                "data.promt: is unknown; the known fields are prompt, model",
                "data.prompt: is missing",
                'parameter.n: must be a whole number, not "2"',
                "parameter.seed: must be a whole number, not 1.5",
                "parameter.steps: is unknown; the known fields are aspect-ratio, negative-prompt, n, seed",
                "parameter.aspect-ratio: must be a string, not true",
            },
        ),
        ('{"data": {"prompt": "cat"}, "parameter": {"n": NaN}}', {"parameter.n: must be a whole number, not NaN"}),
        ('{"data": {"prompt": "cat"}, "parameter": {"n": 1e999}}', {"must be a whole number, not Infinity"}),
        (
            '{"data": {"prompt": "cat"}, "parameter": {"aspect-ratio": "1:1", "aspect_ratio": "16:9"}}',
            {"parameter.aspect-ratio: has different values as aspect-ratio and as aspect_ratio"},
        ),
        ('{"data": {"prompt": "cat"}, "parameter": null}', {"parameter: must be an object, not null"}),
    ],
)
def test_other_input_is_rejected_with_all_errors(text: str, complaints: set[str]):
    with pytest.raises(InvalidRequest) as caught:
        parse_input(text)
    for complaint in complaints:
        assert complaint in str(caught.value)
