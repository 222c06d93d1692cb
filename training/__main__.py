"""Train the embedded ensemble: art, text encoders, autoencoder, base, refiner, and the folders in weights/.

Each stage writes its result to training/runs/ and is skipped if the result exists, so an interrupted run continues; to
repeat a stage, delete its result. An expert that is not finished when a session ends continues in the next session.
Seconds are device time; the defaults are for two H100s.
Run: python -m training, or, on several GPUs, torchrun --nproc-per-node gpu -m training
"""

import argparse
import contextlib
import copy
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import distributed, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training import (
    architecture,
    art,
    autoencoder,
    captions,
    colours,
    denoisers,
    export,
    synonyms,
    text,
    vocabulary,
    words,
)
from training.art import RUNS, WEIGHTS
from training.captions import Captioner
from training.denoisers import Bucket, Encoders
from training.optimisation import Trainer, agreed
from training.scenes import Director

log = logging.getLogger("training")

_VOCABULARY = 8500  # tokens
_LEAST = 90  # seconds of a session that an expert needs to start, since compiling it can take as long


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", type=float, default=120, metavar="SECONDS")
    parser.add_argument("--autoencoder", type=float, default=240, metavar="SECONDS")
    parser.add_argument("--base", type=float, default=850, metavar="SECONDS")
    parser.add_argument("--refiner", type=float, default=340, metavar="SECONDS")
    parser.add_argument("--session", type=float, default=math.inf, metavar="SECONDS", help="stop after this time")
    parser.add_argument("--batch", type=int, default=256, help="scenes in a training step of the experts, for each GPU")
    parser.add_argument("--seed", type=int, default=0, help="change it for other scenes in another session")
    parser.add_argument(
        "--compile", action="store_true", help="compile the experts for square images; takes minutes, on CUDA"
    )
    options = parser.parse_args()
    began = time.monotonic()
    with _processes(options.device) as (device, rank):
        logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(0)
        RUNS.mkdir(exist_ok=True)
        everything = art.everything()
        known = synonyms.everything(everything.concepts).seen
        common = words.everything(everything.concepts, known)
        tokenizer, encoders = _text_encoders(everything, known, common, options.text, device, rank)
        pictures = torch.from_numpy(everything.pixels()).to(device).permute(0, 3, 1, 2).contiguous()
        held_out = torch.from_numpy(everything.held_out()).to(device)
        vae = _autoencoder(pictures, held_out, options.autoencoder, rank)

        seconds = {"base": options.base, "refiner": options.refiner}
        todo = [name for name in seconds if not (RUNS / name).is_dir()]
        if todo:
            seed = 1000 * options.seed + rank
            data, caption_ids = _data(
                everything, Captioner(everything, known, common, seed), pictures, held_out, vae, tokenizer, seed
            )
            scenes = (caption_ids, data, options.batch, options.compile)
        for name in todo:
            if (left := agreed(options.session - (time.monotonic() - began), device)) < _LEAST:
                log.info("no time is left for the %s: run this again to continue", name)
                return
            if name == "base":
                unet, encoders = _unfinished("base", architecture.base_unet(), encoders, device)
                texts, targets = (
                    denoisers.tokens(tokenizer, some, text.LENGTH).to(device)
                    for some in text.meaning_pairs(everything, known, common)
                )
                training = denoisers.base_trainer(unet, encoders, texts, targets, *scenes)
                parts = {"unet": unet, "narrow": encoders.narrow, "wide": encoders.wide}
            else:
                unet, encoders = _unfinished("refiner", architecture.refiner_unet(), _encoders(RUNS / "base"), device)
                training = denoisers.refiner_trainer(unet, encoders, *scenes)
                parts = {"unet": unet}
            if not _trained(name, training, parts, seconds[name], left, rank):
                log.info("%s is not finished: run this again to continue", name)
                return
        if rank == 0:
            encoders = _encoders(RUNS / "base")
            base, refiner = (UNet2DConditionModel.from_pretrained(RUNS / name / "unet") for name in ("base", "refiner"))
            export.save(WEIGHTS, tokenizer, encoders.narrow, encoders.wide, vae.cpu(), base, refiner)


def _trained(
    name: str, training: Trainer, parts: Mapping[str, nn.Module], seconds: float, session: float, rank: int
) -> bool:
    """Train an expert until this session ends, and write its weights. Returns whether it is finished."""
    checkpoint = RUNS / f"{name}.pt"
    if checkpoint.is_file():
        training.load(checkpoint)
    done = training.run(seconds, session)
    training.averaged()
    if rank == 0:
        for part, network in parts.items():
            network.half().save_pretrained(  # type: ignore[operator]
                RUNS / (name if done else f"{name}-so-far") / part
            )
        if not done:
            training.save(checkpoint)
    _wait()
    return done


def _wait() -> None:
    """Wait for all processes: the next stage reads files of the first one."""
    if distributed.is_initialized():
        distributed.barrier()


def _unfinished(
    name: str, unet: UNet2DConditionModel, encoders: Encoders, device: torch.device
) -> tuple[UNet2DConditionModel, Encoders]:
    """Return the networks of an earlier session, even without its checkpoint, or the given ones."""
    so_far = RUNS / f"{name}-so-far"
    if so_far.is_dir():
        unet = UNet2DConditionModel.from_pretrained(so_far / "unet")
    if (so_far / "wide").is_dir():
        encoders = _encoders(so_far)
    return unet.to(device, autoencoder.WORKING_DTYPE), encoders.to(device, autoencoder.WORKING_DTYPE)


def _encoders(folder: Path) -> Encoders:
    narrow = CLIPTextModel.from_pretrained(folder / "narrow").float()
    return Encoders(narrow, CLIPTextModelWithProjection.from_pretrained(folder / "wide").float())


def _data(
    everything: art.Art,
    captioner: Captioner,
    pictures: torch.Tensor,
    held_out: torch.Tensor,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    seed: int,
) -> tuple[dict[str, Bucket], torch.Tensor]:
    of = colours.traits(pictures)
    director = Director(everything, captioner, of, (~held_out).nonzero()[:, 0].tolist(), seed)
    data, texts = denoisers.prepared(
        director, of, pictures, copy.deepcopy(vae).to(autoencoder.WORKING_DTYPE), tokenizer
    )
    log.info("%d scenes are encoded, and %d captions", sum(len(bucket.latents) for bucket in data.values()), len(texts))
    return data, texts


@contextlib.contextmanager
def _processes(device: str) -> Iterator[tuple[torch.device, int]]:
    """Yield this process's device and rank, and join the other processes if torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield torch.device(device), 0
        return
    local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(local)
    distributed.init_process_group("nccl", device_id=local)
    yield local, distributed.get_rank()
    distributed.destroy_process_group()  # not after an error: it would wait for the other processes


def _text_encoders(
    everything: art.Art,
    known: Sequence[Sequence[str]],
    common: Sequence[Sequence[str]],
    seconds: float,
    device: torch.device,
    rank: int,
) -> tuple[CLIPTokenizer, Encoders]:
    folder = RUNS / "text"
    if rank == 0 and not folder.is_dir():
        needed = captions.words(everything.concepts, known)
        tokenizer = vocabulary.prune(needed, _VOCABULARY, RUNS / "vocabulary")
        captioner = Captioner(everything, known, common, seed=0)
        narrow, wide = text.train(everything, captioner, tokenizer, seconds, device)
        for name, part in (("tokenizer", tokenizer), ("narrow", narrow.half()), ("wide", wide.half())):
            part.save_pretrained(folder / name)
    _wait()
    return CLIPTokenizer.from_pretrained(folder / "tokenizer"), _encoders(folder)


def _autoencoder(pictures: torch.Tensor, held_out: torch.Tensor, seconds: float, rank: int) -> AutoencoderKL:
    if (RUNS / "autoencoder").is_dir():
        return AutoencoderKL.from_pretrained(RUNS / "autoencoder").to(pictures.device)
    vae = autoencoder.train(pictures[~held_out], seconds)
    if rank == 0:
        ratio = autoencoder.psnr(vae, autoencoder.on_white(pictures[held_out]))
        log.info("autoencoder: %.2f dB on held-out pictures", ratio)
        vae.save_pretrained(RUNS / "autoencoder")
    return vae


if __name__ == "__main__":
    main()
