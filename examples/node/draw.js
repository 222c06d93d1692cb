// Draw an image from Node.js. The contract comes from server reflection: no proto file, no generated code.
//
//     npm install
//     node draw.js 127.0.0.1:50051 "a red apple" apple.jpg
const fs = require("fs");
const grpc = require("@grpc/grpc-js");
const { GrpcReflection } = require("grpc-js-reflection-client");

const [target, prompt, file] = process.argv.slice(2);

async function main() {
  const credentials = grpc.credentials.createInsecure();
  const reflection = new GrpcReflection(target, credentials);
  const service = await reflection.getDescriptorBySymbol("text_to_image.v1.TextToImageService");
  const { TextToImageService } = service.getPackageObject({ keepCase: true, enums: String }).text_to_image.v1;
  const client = new TextToImageService(target, credentials);

  // `raw` asks for the file's bytes; without it the image is a data URI.
  const request = { data: { prompt }, parameter: { seed: 7 }, output: { raw: true } };
  const call = client.StreamGenerate(request, { deadline: Date.now() + 60_000 });
  call.on("data", ({ progress, choice }) => {
    if (progress) console.log(`${progress.stage} ${progress.step} of ${progress.steps}`);
    if (choice) fs.writeFileSync(file, choice.choice.raw);
  });
  call.on("error", (error) => {
    console.error(`${grpc.status[error.code]}: ${error.details}`);
    process.exitCode = 1;
  });
  call.on("end", () => client.close());
}

main();
