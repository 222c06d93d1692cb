"""Rebuild the embedded ensemble: art, text encoders, autoencoder, base, refiner, and the folders in weights/.

Each stage leaves its result in training/runs/ and is passed over where that is there, so that a run goes on where it
was cut off; delete a result to make its stage anew. An expert that is not done when a sitting ends goes on in the next.
Seconds are those of the device: the defaults are what the weights in this repository had, the text encoders on two CPU
cores and the rest on H100s. Run: python -m training, or, on several GPUs, torchrun --nproc-per-node gpu -m training
"""

import argparse
import contextlib
import copy
import logging
import math
import os
import time
from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import distributed
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training import architecture, art, autoencoder, captions, colours, denoisers, export, text, vocabulary
from training.art import RUNS, WEIGHTS
from training.scenes import Director

log = logging.getLogger("training")

_VOCABULARY = 8500  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", type=float, default=1500, metavar="SECONDS")
    parser.add_argument("--autoencoder", type=float, default=240, metavar="SECONDS")
    parser.add_argument("--base", type=float, default=900, metavar="SECONDS")
    parser.add_argument("--refiner", type=float, default=120, metavar="SECONDS")
    parser.add_argument("--sitting", type=float, default=math.inf, metavar="SECONDS", help="stop after so long")
    parser.add_argument("--batch", type=int, default=256, help="scenes in a step of the experts, for each GPU")
    parser.add_argument("--compile", action="store_true", help="compile the experts for squares: minutes, on CUDA")
    options = parser.parse_args()
    began = time.monotonic()
    with _processes(options.device) as (device, rank):
        logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(0)
        RUNS.mkdir(exist_ok=True)
        everything = art.everything()
        tokenizer, narrow, wide = _text_encoders(everything, options.text)
        pictures = torch.from_numpy(everything.pixels()).to(device).permute(0, 3, 1, 2).contiguous()
        held_out = torch.from_numpy(everything.held_out()).to(device)
        vae = _autoencoder(pictures, held_out, options.autoencoder, rank)

        wanted = {name: seconds for name, seconds in (("base", options.base), ("refiner", options.refiner)) if seconds}
        wanted = {name: seconds for name, seconds in wanted.items() if not (RUNS / name).is_dir()}
        if wanted:
            encoder = copy.deepcopy(vae).to(autoencoder.WORKING_DTYPE)
            of = colours.traits(pictures)
            director = Director(everything, of, (~held_out).nonzero()[:, 0].tolist(), seed=rank)
            data, encoded = denoisers.prepared(director, of, pictures, encoder, tokenizer, (narrow, wide))
            count = sum(len(bucket.latents) for bucket in data.values())
            log.info("%d scenes and %d captions are encoded", count, len(encoded.hidden))
        for name, seconds in wanted.items():
            make, trainer = EXPERTS[name]
            so_far = RUNS / f"{name}-so-far"  # where its checkpoint is not, as on another machine, a start all the same
            unet = UNet2DConditionModel.from_pretrained(so_far) if so_far.is_dir() else make()
            unet = unet.to(device, autoencoder.WORKING_DTYPE)
            training = trainer(unet, encoded, data, options.batch, options.compile)
            checkpoint = RUNS / f"{name}.pt"
            if checkpoint.is_file():
                training.load(checkpoint)
            done = training.run(seconds, options.sitting - (time.monotonic() - began))
            training.averaged()
            if rank == 0:
                unet.half().save_pretrained(RUNS / name if done else so_far)
                if not done:
                    training.save(checkpoint)
            if not done:
                log.info("%s is not done: run this again to go on", name)
                return
        if rank == 0:
            base, refiner = (UNet2DConditionModel.from_pretrained(RUNS / name) for name in EXPERTS)
            export.save(WEIGHTS, tokenizer, narrow.cpu(), wide.cpu(), vae.cpu(), base, refiner)


EXPERTS = {
    "base": (architecture.base_unet, denoisers.base_trainer),
    "refiner": (architecture.refiner_unet, denoisers.refiner_trainer),
}


@contextlib.contextmanager
def _processes(device: str) -> Iterator[tuple[torch.device, int]]:
    """This process's device and number, joined to the others if torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield torch.device(device), 0
        return
    local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(local)
    distributed.init_process_group("nccl", device_id=local)
    try:
        yield local, distributed.get_rank()
    finally:
        distributed.destroy_process_group()


def _text_encoders(
    everything: art.Art, seconds: float
) -> tuple[CLIPTokenizer, CLIPTextModel, CLIPTextModelWithProjection]:
    if not (RUNS / "text").is_dir():
        tokenizer = vocabulary.prune(captions.words(everything.concepts), _VOCABULARY, RUNS / "vocabulary")
        narrow, wide = text.train(everything, tokenizer, seconds)
        for name, part in (("tokenizer", tokenizer), ("narrow", narrow.half()), ("wide", wide.half())):
            part.save_pretrained(RUNS / "text" / name)
    return (
        CLIPTokenizer.from_pretrained(RUNS / "text" / "tokenizer"),
        CLIPTextModel.from_pretrained(RUNS / "text" / "narrow").float(),
        CLIPTextModelWithProjection.from_pretrained(RUNS / "text" / "wide").float(),
    )


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
