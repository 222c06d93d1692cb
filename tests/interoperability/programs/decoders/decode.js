// What Node's image libraries make of files: node decode.js LIBRARY FILE...
//
// Writes the pixels of each file, RGB of eight bits, to FILE.rgb, and prints [[width, height], ...] as JSON.
'use strict';
const fs = require('fs');

const libraries = {
  'jpeg-js': async (file) => require('jpeg-js').decode(fs.readFileSync(file), { useTArray: true }),
  jimp: async (file) => (await require('jimp').Jimp.read(fs.readFileSync(file))).bitmap,
  sharp: async (file) => {
    const { data, info } = await require('sharp')(file).ensureAlpha().raw().toBuffer({ resolveWithObject: true });
    return { data, width: info.width, height: info.height };
  },
};

async function main() {
  const [library, ...files] = process.argv.slice(2);
  const sizes = [];
  for (const file of files) {
    const { data, width, height } = await libraries[library](file);
    fs.writeFileSync(`${file}.rgb`, Buffer.from(data).filter((_, place) => place % 4 !== 3));
    sizes.push([width, height]);
  }
  console.log(JSON.stringify(sizes));
}

main();
