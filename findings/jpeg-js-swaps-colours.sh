#!/usr/bin/env bash
# Guess: a JPEG that holds red, green and blue, marked so by Adobe's marker with transform 0, has its colours in every
#   decoder, as it has in browsers and in libjpeg's family.
# Seen: jpeg-js takes it for YCbCr, and everything built on it does, Jimp for one: a red apple is green and pink. No
#   error, no warning; decode(data, {colorTransform: false}) shows it right. The same picture as YCbCr is right without
#   it.
# With: jpeg-js 0.4.4, jimp 1.6.1; the pictures made by Pillow 13.0.0 (keep_rgb=True).
# Why it matters: RGB keeps flat colours exact at 4:4:4, so a service is tempted to send it by default.
# Output seen: mean difference of 255: RGB in jpeg-js 93.5, in Jimp 93.5, with colorTransform false 0.0; YCbCr 0.6
set -euo pipefail
for program in node npm; do
    command -v "$program" > /dev/null || { echo "needs node and npm; node 20 was tried" >&2; exit 2; }
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages pillow==13.0.0
npm install --silent --no-audit --no-fund --prefix . jpeg-js@0.4.4 jimp@1.6.1
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
from PIL import Image

pixels = bytes(value for y in range(64) for x in range(64) for value in (4 * x, 4 * y, 60))
picture = Image.frombytes("RGB", (64, 64), pixels)
picture.save("rgb.jpg", quality=95, subsampling=0, keep_rgb=True)
picture.save("ycbcr.jpg", quality=95, subsampling=0)
open("pixels", "wb").write(pixels)
PYTHON
cat > compare.js <<'JAVASCRIPT'
const fs = require("fs");
const jpeg = require("jpeg-js");
const { Jimp } = require("jimp");
const pixels = fs.readFileSync("pixels");
const difference = (decoded) => {
  let sum = 0;
  for (let i = 0; i < pixels.length; i++) sum += Math.abs(decoded[4 * Math.floor(i / 3) + (i % 3)] - pixels[i]);
  return sum / pixels.length;
};
(async () => {
  const rgb = fs.readFileSync("rgb.jpg");
  const seen = {
    "RGB in jpeg-js": difference(jpeg.decode(rgb).data),
    "RGB in Jimp": difference((await Jimp.read(rgb)).bitmap.data),
    "RGB with colorTransform false": difference(jpeg.decode(rgb, { colorTransform: false }).data),
    "YCbCr in jpeg-js": difference(jpeg.decode(fs.readFileSync("ycbcr.jpg")).data),
  };
  for (const [name, value] of Object.entries(seen)) console.log(`${name}: ${value.toFixed(1)} of 255`);
  const [plain, jimp, untransformed, ycbcr] = Object.values(seen);
  if (plain < 50 || jimp < 50 || untransformed > 3 || ycbcr > 3) {
    console.error("changed: the colours of an RGB JPEG are others");
    process.exit(1);
  }
})();
JAVASCRIPT
timeout 120 node compare.js
