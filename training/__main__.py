"""Rebuild the embedded ensemble: art, text encoders, autoencoder, base, refiner, and the folders in weights/.

Each stage leaves its result in training/runs/ and is passed over where that is there, so that a run goes on where it
was cut off; delete a result to make its stage anew. Seconds are those of the device: the defaults are what the weights
in this repository had, the text encoders on two CPU cores and the rest on one H100. Run: python -m training
"""

import argparse
import copy
import logging

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from server.settings import EMBEDDED
from training import architecture, art, autoencoder, captions, denoisers, export, text, vocabulary
from training.art import RUNS

log = logging.getLogger("training")

_VOCABULARY = 8500  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", type=float, default=720, metavar="SECONDS")
    parser.add_argument("--autoencoder", type=float, default=65, metavar="SECONDS")
    parser.add_argument("--base", type=float, default=132, metavar="SECONDS")
    parser.add_argument("--refiner", type=float, default=25, metavar="SECONDS")
    parser.add_argument("--batch", type=int, default=256, help="pictures in a step of the experts (default: 256)")
    parser.add_argument(
        "--further", nargs="+", default=(), choices=EXPERTS, help="train these experts on, from where they are"
    )
    parser.add_argument("--plain", action="store_true", help="train the experts on whole square pictures alone")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    device = torch.device(options.device)
    RUNS.mkdir(exist_ok=True)
    everything = art.everything()

    tokenizer, narrow, wide = _text_encoders(everything, options.text)
    pictures = torch.from_numpy(everything.pixels()).to(device).permute(0, 3, 1, 2).contiguous()
    held_out = torch.from_numpy(everything.held_out()).to(device)
    vae = _autoencoder(pictures, held_out, options.autoencoder)

    seconds = {"base": options.base, "refiner": options.refiner}
    wanted = {name: seconds[name] for name in EXPERTS if name in options.further or not (RUNS / name).is_dir()}
    if wanted:
        encoder = copy.deepcopy(vae).to(autoencoder.WORKING_DTYPE)
        data = denoisers.buckets(everything, encoder, pictures, (~held_out).nonzero()[:, 0], options.plain)
        encoded = denoisers.encode_captions(everything, tokenizer, narrow, wide, device)
        log.info("%d captions and all latents are encoded", len(encoded.hidden))
    for name in wanted:
        make, trainer = EXPERTS[name]
        unet = UNet2DConditionModel.from_pretrained(RUNS / name) if (RUNS / name).is_dir() else make()
        unet = unet.to(device, autoencoder.WORKING_DTYPE)
        training = trainer(unet, encoded, data, options.batch)
        log.info("%s: %d steps", name, training.run(wanted[name]))
        training.averaged()
        unet.half().save_pretrained(RUNS / name)

    base, refiner = (UNet2DConditionModel.from_pretrained(RUNS / name) for name in EXPERTS)
    export.save(EMBEDDED, tokenizer, narrow.cpu(), wide.cpu(), vae.cpu(), base, refiner)


EXPERTS = {
    "base": (architecture.base_unet, denoisers.base_trainer),
    "refiner": (architecture.refiner_unet, denoisers.refiner_trainer),
}


def _text_encoders(
    everything: art.Art, seconds: float
) -> tuple[CLIPTokenizer, CLIPTextModel, CLIPTextModelWithProjection]:
    if not (RUNS / "text").is_dir():
        tokenizer = vocabulary.prune(captions.words(everything.concepts), _VOCABULARY, RUNS / "vocabulary")
        narrow, wide = text.train(everything, tokenizer, seconds)
        for name, part in (("tokenizer", tokenizer), ("narrow", narrow), ("wide", wide)):
            part.save_pretrained(RUNS / "text" / name)
    return (
        CLIPTokenizer.from_pretrained(RUNS / "text" / "tokenizer"),
        CLIPTextModel.from_pretrained(RUNS / "text" / "narrow"),
        CLIPTextModelWithProjection.from_pretrained(RUNS / "text" / "wide"),
    )


def _autoencoder(pictures: torch.Tensor, held_out: torch.Tensor, seconds: float) -> AutoencoderKL:
    if not (RUNS / "autoencoder").is_dir():
        vae = autoencoder.train(pictures[~held_out], seconds)
        log.info("autoencoder: %.2f dB on held-out pictures", autoencoder.psnr(vae, pictures[held_out]))
        vae.save_pretrained(RUNS / "autoencoder")
    return AutoencoderKL.from_pretrained(RUNS / "autoencoder").to(pictures.device)


if __name__ == "__main__":
    main()
