"""Measure the embedded ensemble: prompt alignment, image quality, and the effect of the refiner.

Prints one table: measure, threshold, result. Prompts and seeds are fixed. reading.py reads the pictures. Where it errs
on real art, too, the table has the accuracy on real pictures next to that on drawings. bench/overhead.py measures speed
through gRPC. Run: python -m training.evaluate
"""

import argparse
import functools
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from bench import plotting
from server import model
from server.domain import ASPECT_RATIOS, ImageRequest, default_request, size_of
from server.ensemble import checkpoint
from training import art, autoencoder, captions, colours, reading, scenes, synonyms, words
from training.art import SIDE, STYLES
from training.colours import PAINTS
from training.prompts import COLOURED, OPEN, USUAL_COLOURS
from training.reading import Gallery
from training.scenes import Scene, Thing
from training.synonyms import Synonyms

PROMPTS = 300  # concepts drawn by name; the other rows draw fractions of it
SEEDS = (0, 1, 2, 3)  # rows that do not compare seeds use the first
# A seed for each random choice, so that rows do not depend on each other.
_CONCEPTS, _COLOURS, _STYLES, _PAIRS, _REAL = range(5)
_SHOWN = 12  # prompts on the sheet
_NOISE = 2.0  # standard errors that a difference must exceed


@dataclass(frozen=True)
class Row:
    """A line of the table. `met` is None for a measure without a threshold."""

    what: str
    bar: str
    measured: str
    met: bool | None


@dataclass(frozen=True)
class Subject:
    """The ensemble to measure, the references, and the number of prompts."""

    weights: Path
    ensemble: model.Ensemble
    other: model.Ensemble | None  # the same weights in another precision
    gallery: Gallery
    synonyms: Synonyms
    prompts: int
    sheet: Path | None

    def part(self, share: float) -> int:
        """Return a share of the number of prompts, at least two."""
        return max(2, round(self.prompts * share))

    def asked(self, count: int) -> list[int]:
        """Return the first `count` concepts that are drawn by name."""
        concepts = len(self.gallery.art.concepts)
        return random.Random(_CONCEPTS).sample(range(concepts), concepts)[:count]

    def names(self, concepts: Iterable[int]) -> list[str]:
        return [self.gallery.art.concepts[at].name for at in concepts]

    def drawn(
        self,
        prompts: Sequence[str],
        seed: int = SEEDS[0],
        ratio: str = "1:1",
        negative_prompt: str = "",
        guidance_scale: float | None = None,
        high_noise_frac: float | None = None,
    ) -> torch.Tensor:
        """Draw one picture of each prompt, uint8 of shape (n, 3, height, width). None means the service's default."""
        info = self.ensemble.info
        width, height = size_of(ratio, info.native_side, info.side_multiple)
        request = replace(
            default_request(info, "", seed),
            negative_prompt=negative_prompt,
            guidance_scale=guidance_scale or info.default_guidance_scale,
            high_noise_frac=high_noise_frac or info.default_high_noise_frac,
            width=width,
            height=height,
        )
        pictures = []
        for number, prompt in enumerate(prompts, 1):
            pictures.append(_picture(self.ensemble, replace(request, prompt=prompt)))
            if number % 20 == 0:
                _progress(f"    {number} of {len(prompts)}")
        return torch.stack(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", type=Path, default=art.WEIGHTS, help="folder with base and refiner")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16, fp16 or fp8")
    parser.add_argument(
        "--compare", metavar="PRECISION", help="draw things in this precision, too, for the row `precisions`"
    )
    parser.add_argument("--compile", default="off", help="off or blocks; on a GPU blocks is ten times faster")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help=f"number of prompts (default: {PROMPTS})")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=[], metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--sheet", type=Path, help="write a PNG of samples, each with the nearest training picture")
    options = parser.parse_args()
    if "precisions" in options.only and not options.compare:
        parser.error("the row precisions needs --compare PRECISION")

    everything = art.everything()
    of = (art.RUNS / "art.npz").stat()
    gallery = reading.gallery(everything, art.RUNS / f"features-{of.st_size}-{of.st_mtime_ns}.npy")
    sizes = [size[::-1] for size in scenes.sizes().values()]
    experts = checkpoint.inspect(options.weights / "base", options.weights / "refiner")
    load = functools.partial(model.load, experts, options.device, compile=options.compile, compile_sizes=sizes)
    subject = Subject(
        options.weights,
        load(options.precision),
        load(options.compare) if options.compare else None,
        gallery,
        synonyms.everything(everything.concepts),
        options.prompts,
        options.sheet,
    )
    table: list[Row] = []
    for name in options.only or ROWS:
        began = time.monotonic()
        for row in ROWS[name](subject):
            table.append(row)
            _progress(f"{row.what}: {row.measured}")
        _progress(f"    {name} took {time.monotonic() - began:.0f} s")
    print("| measure | threshold | result | met |\n| --- | --- | --- | --- |")
    for row in table:
        print(f"| {row.what} | {row.bar} | {row.measured} | {({True: 'yes', False: 'no', None: '-'})[row.met]} |")


def weights(it: Subject) -> Iterator[Row]:
    """Measure the size of all files, in units of 10^6 bytes, and the resolution."""
    sizes = [file.stat().st_size / 1e6 for file in it.weights.rglob("*") if file.is_file()]
    yield Row("size of the weights", "<= 64 MB", f"{sum(sizes):.1f} MB", sum(sizes) <= 64)
    yield Row("largest file", "< 16 MB", f"{max(sizes):.1f} MB", max(sizes) < 16)
    side = it.ensemble.info.native_side
    yield Row("resolution", ">= 128 px", f"{side} px", side >= 128)


def reconstruction(it: Subject) -> Iterator[Row]:
    """Measure the autoencoder on held-out art."""
    vae = AutoencoderKL.from_pretrained(it.weights / "base" / "vae", variant="fp16").float()
    rows = it.gallery.held_out.nonzero()[:, 0].tolist()[: it.prompts]
    ratio = autoencoder.psnr(vae, autoencoder.on_white(it.gallery.pictures(rows)))
    yield Row(f"autoencoder, {len(rows)} held-out pictures", ">= 30 dB", f"{ratio:.2f} dB", ratio >= 30)


def things(it: Subject) -> Iterator[Row]:
    """Measure how often concepts drawn by name are recognized, compared with held-out real renderings."""
    asked = it.asked(it.prompts)
    drawn = _ranks(it, it.drawn(it.names(asked)), asked)
    real = it.gallery.reference
    usual = it.gallery.ranks(it.gallery.features[real], it.gallery.concepts[real, None].tolist())
    for top, bar in ((1, 0.8), (5, 0.9)):
        share, reference = _share(drawn < top), _share(usual < top)
        measured = f"{share:.0%} of {len(asked)}, real {reference:.0%}: {share / reference:.2f} x"
        yield Row(f"draws the thing, top-{top}", f">= {bar} x real", measured, share >= bar * reference)


def precisions(it: Subject) -> Iterator[Row]:
    """Compare two precisions on concepts drawn by name with the same seeds. The error is over pictures."""
    if it.other is None:
        return
    asked = it.asked(it.prompts)
    names, labels = it.names(asked), [each.info.precision for each in (it.other, it.ensemble)]
    ranks = [
        torch.cat([_ranks(some, some.drawn(names, seed), asked) for seed in SEEDS[:2]])
        for some in (replace(it, ensemble=it.other), it)
    ]
    for top in (1, 5):
        other, usual = ((each < top).float() for each in ranks)
        mean, error = _mean_and_error(other - usual)
        measured = f"{_share(other):.1%} and {_share(usual):.1%} of {len(usual)}: {mean:+.1%} +- {error:.1%}"
        what = f"{labels[0]} compared with {labels[1]}, draws the thing, top-{top}"
        yield Row(what, f"no fewer, by {_NOISE:g} errors", measured, mean >= -_NOISE * error)


def colour_words(it: Subject) -> Iterator[Row]:
    """Measure how often a requested colour is drawn, and how often the colour of painted real art is recognized."""
    asked = _coloured(it.part(0.2))
    drawn = _in_colour(it, asked)
    choose = random.Random(_REAL)
    rows = [choose.choice(_renderings(it, it.gallery.named[COLOURED[thing]])) for _, thing in asked]
    real = reading.colour_names(
        _staged(
            it.gallery,
            (SIDE, SIDE),
            [(Thing(row, SIDE / 2, SIDE / 2, SIDE, colour),) for row, (colour, _) in zip(rows, asked, strict=True)],
        )
    )
    ceiling = _share(name == colour for name, (colour, _) in zip(real, asked, strict=True))
    measured = f"{drawn:.0%} of {len(asked)}, real art painted {ceiling:.0%}"
    yield Row('colour words ("a red car")', "> 50 %", measured, drawn > 0.5)


def style_words(it: Subject) -> Iterator[Row]:
    """Measure how often a requested style is drawn, and how often that of held-out art is recognized."""
    words = [names[0] for names in STYLES.values()]
    concepts = random.Random(_STYLES).sample(_nameable(it), it.part(0.16 / len(words)))
    asked = [(style, concept) for concept in concepts for style in range(len(words))]
    features = reading.features(it.drawn([f"{words[style]} {it.names([concept])[0]}" for style, concept in asked]))
    styles, subjects = torch.tensor(asked).unbind(1)
    right = it.gallery.style(features, subjects) == styles
    real = it.gallery.held_out
    read = it.gallery.style(it.gallery.features[real], it.gallery.concepts[real])
    ceiling = _share(read == it.gallery.styles[real])
    each = ", ".join(f"{word} {_share(right[at :: len(words)]):.0%}" for at, word in enumerate(words))
    measured = f"{_share(right):.0%} of {len(asked)}, real {ceiling:.0%} ({each})"
    yield Row('style words ("flat cat")', "> 50 %", measured, _share(right) > 0.5)


def pairs(it: Subject) -> Iterator[Row]:
    """Measure two things in a prompt: each in the top 10 of one half. Real composites have two renderings."""
    chosen = random.Random(_PAIRS).sample(_nameable(it), 2 * it.part(0.2))
    asked = list(zip(chosen[::2], chosen[1::2], strict=True))
    drawn = _both(it, it.drawn(["a {} and a {}".format(*it.names(pair)) for pair in asked]), asked)
    choose = random.Random(_REAL)
    rows = [[choose.choice(_renderings(it, concept)) for concept in pair] for pair in asked]
    real = _both(
        it,
        _staged(
            it.gallery,
            (SIDE, SIDE),
            [
                tuple(Thing(row, (0.25 + 0.5 * at) * SIDE, SIDE / 2, SIDE / 2) for at, row in enumerate(pair))
                for pair in rows
            ],
        ),
        asked,
    )
    measured = f"{drawn:.0%} of {len(asked)}, real composites {real:.0%}"
    yield Row('two things ("a cat and a pizza")', "> 50 %", measured, drawn > 0.5)


def open_vocabulary(it: Subject) -> Iterator[Row]:
    """Measure plain English, with an accepted concept in the top 5, and single words held out from training."""
    accepted = {prompt: [it.gallery.named[name] for name in names] for prompt, names in OPEN.items()}
    asked = random.Random(_CONCEPTS).sample(list(accepted), min(len(accepted), it.part(0.2)))
    right = it.gallery.ranks(reading.features(it.drawn(asked)), [accepted[prompt] for prompt in asked]) < 5
    concepts = it.gallery.art.concepts
    known = set(" ".join(captions.words(concepts, it.synonyms.seen)).split())
    known |= {word for some in words.everything(concepts, it.synonyms.seen) for word in some}
    new = torch.tensor([bool(set(prompt.split()) - known) for prompt in asked])
    measured = f"{_share(right):.0%} of {len(asked)}, {_share(right[new]):.0%} of {int(new.sum())} with unseen words"
    yield Row('plain English ("a doggo sleeping")', "> 50 %", measured, _share(right) > 0.5)

    concepts_of: dict[str, list[int]] = {}
    for concept, unseen in enumerate(it.synonyms.unseen):
        for word in unseen:
            if not set(word.split()) & known:
                concepts_of.setdefault(word, []).append(concept)
    asked = random.Random(_CONCEPTS).sample(sorted(concepts_of), it.part(0.2))
    right = it.gallery.ranks(reading.features(it.drawn(asked)), [concepts_of[word] for word in asked]) < 5
    yield Row("words held out from training", "", f"{_share(right):.0%} of {len(asked)}", None)


def refiner(it: Subject) -> Iterator[Row]:
    """Compare both experts with the base alone at the same steps and seeds. The error is over prompts.

    Sharpness is compared with that of the concept's renderings, in even areas and at edges.
    """
    asked = it.asked(it.part(0.1))
    real = [reading.sharpness(autoencoder.on_white(it.gallery.pictures(_renderings(it, each)))) for each in asked]
    distances, blurs, sharpnesses = [], [], []
    for share in (it.ensemble.info.default_high_noise_frac, 1.0):
        drawn = [it.drawn(it.names(asked), seed=seed, high_noise_frac=share) for seed in SEEDS]
        distances.append(torch.stack([it.gallery.distance(reading.features(each), asked) for each in drawn]).mean(0))
        sharp = torch.stack([torch.stack([reading.sharpness(one[None]) for one in each]) for each in drawn])
        blurs.append((sharp - torch.stack(real)).abs().mean((0, 2)))
        sharpnesses.append(float(sharp.mean()))
    for what, (both, alone), places in (("feature distance", distances, 3), ("sharpness", blurs, 4)):
        mean, error = _mean_and_error(both - alone)
        means = f"{both.mean():.{places}f}, base alone {alone.mean():.{places}f}"
        measured = f"{means}: {mean:+.{places + 1}f} +- {error:.{places + 1}f}"
        yield Row(f"refiner: {what}", f"nearer to real, by {_NOISE:g} errors", measured, mean < -_NOISE * error)
    means = f"{sharpnesses[0]:.4f}, base alone {sharpnesses[1]:.4f}, real {torch.stack(real).mean():.4f}"
    yield Row("refiner: mean response to a Laplacian", "", means, None)


def variety(it: Subject) -> Iterator[Row]:
    """Measure the distance between seeds of a prompt, and to the nearest training picture, compared with real art."""
    asked = it.asked(it.part(0.06))
    drawn = torch.stack([it.drawn(it.names(asked), seed=seed) for seed in SEEDS], dim=1)
    features = torch.stack([reading.features(each) for each in drawn])
    seeds = _mean(_apart(each) for each in features)
    real = _mean(_apart(it.gallery.features[it.gallery.concepts == concept]) for concept in asked)
    yield Row("variety: feature distance of seeds", "> 0", f"{seeds:.3f}, of real renderings {real:.3f}", seeds > 0)
    nearest = it.gallery.nearest(features.flatten(0, 1))
    copied = 1 - (features.flatten(0, 1) * it.gallery.features[nearest]).sum(1).mean()
    yield Row("variety: to the nearest training picture", "shown in a sheet", f"{copied:.3f}", None)
    if it.sheet:
        training = autoencoder.on_white(it.gallery.pictures(nearest.tolist())).unflatten(0, drawn.shape[:2])
        pairs = torch.stack([drawn, training], dim=2)[:_SHOWN].flatten(1, 2)  # (prompts, 2 x seeds, 3, height, width)
        names = it.names(asked)[:_SHOWN]
        rows = [(name, list(each.permute(0, 2, 3, 1).numpy())) for name, each in zip(names, pairs, strict=True)]
        columns = [label for seed in SEEDS for label in (f"seed {seed}", "nearest")]
        plotting.sheet(rows, columns, side=112, path=it.sheet)


def aspect_ratios(it: Subject) -> Iterator[Row]:
    """Compare drawings of each size, cut out, with squares, and measure how often both halves show the whole thing.

    The squares are all concepts drawn by name. The threshold is a share of their result.
    """
    asked, squares = it.asked(it.part(0.1)), it.asked(it.prompts)
    choose = random.Random(_REAL)
    rows = [choose.choice(_renderings(it, concept)) for concept in asked]
    right: dict[str, float] = {}
    doubled: list[bool] = []
    usual: list[bool] = []
    for ratio in ASPECT_RATIOS:
        if ratio == "1:1":
            continue
        drawn = it.drawn(it.names(asked), ratio=ratio)
        right[ratio] = _share(_ranks(it, reading.squares(drawn), asked) < 5)
        height, width = drawn.shape[-2:]
        placed = [(Thing(row, width / 2, height / 2, min(width, height)),) for row in rows]
        doubled += _doubled(it, drawn, asked)
        usual += _doubled(it, _staged(it.gallery, (height, width), placed), asked)
    square = _share(_ranks(it, it.drawn(it.names(squares)), squares) < 5)
    mean, worst = _mean(right.values()), min(right, key=lambda ratio: right[ratio])
    measured = (
        f"{mean:.0%} of {len(asked)} each (least: {worst} {right[worst]:.0%}), 1:1 {square:.0%} of {len(squares)}"
    )
    yield Row("aspect ratios: top-5", ">= 0.9 x of 1:1", measured, mean >= 0.9 * square)
    twice, naturally = _share(doubled), _share(usual)
    measured = f"{twice:.0%} doubled, real {naturally:.0%}"
    yield Row("aspect ratios: whole in both halves", "<= real + 5 %", measured, twice <= naturally + 0.05)


def negative_prompt(it: Subject) -> Iterator[Row]:
    """Measure the share of a thing's usual colour, without and with that colour as the negative prompt."""
    asked = list(USUAL_COLOURS.items())[: it.part(0.04)]
    shares: list[list[float]] = [[], []]
    for thing, colour in asked:
        for into, negative in zip(shares, ("", colour), strict=True):
            drawn = torch.cat([it.drawn([thing], seed=seed, negative_prompt=negative) for seed in SEEDS])
            into.append(float(reading.colour_share(drawn, colour).mean()))
    mean, error = _mean_and_error(torch.tensor(shares[1]) - torch.tensor(shares[0]))
    measured = f"{_mean(shares[0]):.0%} to {_mean(shares[1]):.0%} of the pixels: {mean:+.1%} +- {error:.1%}"
    yield Row("negative prompt: its colour", f"falls, by {_NOISE:g} errors", measured, mean < -_NOISE * error)


def guidance(it: Subject) -> Iterator[Row]:
    """Measure concepts by name and things in a colour without guidance, at the default, and at twice the default."""
    asked, coloured = it.asked(it.part(0.12)), _coloured(it.part(0.12))
    default = it.ensemble.info.default_guidance_scale
    named, painted = {}, {}
    for scale in (1.0, default, 2 * default):
        named[scale] = _share(_ranks(it, it.drawn(it.names(asked), guidance_scale=scale), asked) < 5)
        painted[scale] = _in_colour(it, coloured, guidance_scale=scale)
    for what, shares in (("top-5", named), ("colour words", painted)):
        measured = ", ".join(f"{share:.0%} at {scale:g}" for scale, share in shares.items())
        yield Row(f"guidance: {what}", "rises from 1 to the default", measured, shares[default] > shares[1.0])


ROWS: dict[str, Callable[[Subject], Iterator[Row]]] = {
    "weights": weights,
    "autoencoder": reconstruction,
    "things": things,
    "precisions": precisions,
    "colours": colour_words,
    "styles": style_words,
    "pairs": pairs,
    "open": open_vocabulary,
    "refiner": refiner,
    "variety": variety,
    "ratios": aspect_ratios,
    "negative": negative_prompt,
    "guidance": guidance,
}


@functools.cache  # rows share many pictures
def _picture(ensemble: model.Ensemble, request: ImageRequest) -> torch.Tensor:
    trajectory = ensemble.plan(request, ensemble.encode(request), request.seeds[0])
    for _ in trajectory.stages:
        ensemble.step([trajectory])
    return torch.from_numpy(ensemble.decode(trajectory)).permute(2, 0, 1)


def _coloured(count: int) -> list[tuple[str, str]]:
    everything = [(colour, thing) for thing in COLOURED for colour in PAINTS]
    return random.Random(_COLOURS).sample(everything, len(everything))[:count]


def _in_colour(it: Subject, asked: Sequence[tuple[str, str]], guidance_scale: float | None = None) -> float:
    names = reading.colour_names(
        it.drawn([f"a {colour} {thing}" for colour, thing in asked], guidance_scale=guidance_scale)
    )
    return _share(name == colour for name, (colour, _) in zip(names, asked, strict=True))


def _nameable(it: Subject) -> list[int]:
    """Return the concepts with a name of one word, without people and faces."""
    return [
        at
        for at, each in enumerate(it.gallery.art.concepts)
        if each.name.isalpha() and each.group not in ("people-body", "smileys-emotion")
    ]


def _renderings(it: Subject, concept: int) -> list[int]:
    """Return the pictures of a concept, without its outlines."""
    return ((it.gallery.concepts == concept) & ~it.gallery.outlined).nonzero()[:, 0].tolist()


def _staged(gallery: Gallery, size: tuple[int, int], things: Sequence[tuple[Thing, ...]]) -> torch.Tensor:
    """Render scenes of real pictures, as training does."""
    rows = sorted({thing.picture for some in things for thing in some})
    pictures = gallery.pictures(rows)
    staged = [
        Scene(size, tuple(replace(thing, picture=rows.index(thing.picture)) for thing in some), (), share=0)
        for some in things
    ]
    return torch.cat(list(scenes.rendered(staged, pictures, colours.traits(pictures))))


def _halves(pictures: torch.Tensor, across: bool) -> list[torch.Tensor]:
    """Return the features of the two halves of each picture, cut out."""
    parts = zip(*(reading.halves(each, across) for each in pictures), strict=True)
    return [reading.features(reading.squares(part)) for part in parts]


def _ranks(it: Subject, pictures: torch.Tensor, asked: Sequence[int]) -> torch.Tensor:
    """Return the number of concepts that are nearer to each picture than the requested one, (n,)."""
    return it.gallery.ranks(reading.features(pictures), [[each] for each in asked])


def _doubled(it: Subject, pictures: torch.Tensor, asked: Sequence[int]) -> list[bool]:
    """Return whether both halves of an oblong picture show the requested concept."""
    height, width = pictures.shape[-2:]
    accepted = [[each] for each in asked]
    one, other = (it.gallery.ranks(half, accepted) for half in _halves(pictures, width > height))
    return (torch.maximum(one, other) < 5).tolist()


def _both(it: Subject, pictures: torch.Tensor, asked: Sequence[tuple[int, int]]) -> float:
    """Return how often each of two concepts is in the top 10 of its own half, for either cut."""
    accepted = [[[each] for each in column] for column in zip(*asked, strict=True)]
    right = torch.zeros(len(asked), dtype=torch.bool)
    for across in (True, False):
        one, other = _halves(pictures, across)
        for parts in ((one, other), (other, one)):
            first, second = (it.gallery.ranks(*each) for each in zip(parts, accepted, strict=True))
            right |= torch.maximum(first, second) < 10
    return _share(right)


def _apart(features: torch.Tensor) -> float:
    """Return the mean of 1 - cosine over all pairs."""
    one, other = torch.triu_indices(len(features), len(features), offset=1)
    return float(1 - (features[one] * features[other]).sum(1).mean())


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def _mean(values: Iterable[float]) -> float:
    every = list(values)
    return sum(every) / len(every) if every else 0.0


def _share(right: Iterable[bool] | torch.Tensor) -> float:
    return _mean(float(each) for each in right)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
