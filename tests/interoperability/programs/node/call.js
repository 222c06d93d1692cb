// Make a call from Node.js, with the contract from reflection: no proto file, no generated code.
//
//     node call.js TARGET SERVICE/METHOD REQUEST [--cancel]
//
// Prints each message as one line of JSON, then {"code": ..., "message": ...}. With --cancel, the call is cancelled
// after its first step.
const grpc = require("@grpc/grpc-js");
const { GrpcReflection } = require("grpc-js-reflection-client");

const NAMES = { keepCase: true, enums: String, longs: String, bytes: String };

function say(what) {
  process.stdout.write(JSON.stringify(what) + "\n");
}

function end(error) {
  say({ code: grpc.status[error ? error.code : grpc.status.OK], message: error ? error.details : "" });
}

async function main(target, path, request, flag) {
  const credentials = grpc.ChannelCredentials.createInsecure();
  const [service, method] = path.split("/");
  const reflection = new GrpcReflection(target, credentials);
  const found = await reflection.getDescriptorBySymbol(service);
  const Client = service.split(".").reduce((inside, name) => inside[name], found.getPackageObject(NAMES));
  const client = new Client(target, credentials);
  if (!Client.service[method].responseStream) {
    client[method](JSON.parse(request), (error, answer) => {
      if (!error) say(answer);
      end(error);
    });
    return;
  }
  const call = client[method](JSON.parse(request));
  call.on("data", (event) => {
    say(event);
    if (flag === "--cancel" && event.progress) call.cancel();
  });
  let failure = null;
  call.on("error", (error) => (failure = error));
  call.on("end", () => end(failure)); // which comes last, whether the call failed or not
}

main(...process.argv.slice(2));
