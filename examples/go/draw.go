// Draw an image from Go. The contract comes from server reflection: no proto file, no generated code.
//
//	go run draw.go 127.0.0.1:50051 "a red apple" apple.jpg
//
// It builds with the gRPC packages of Debian (golang-google-grpc-dev) and with newer ones.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"
	reflection "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

const service = "text_to_image.v1.TextToImageService"

func main() {
	target, prompt, file := os.Args[1], os.Args[2], os.Args[3]
	connection, err := grpc.Dial(target, grpc.WithInsecure())
	check(err)
	defer connection.Close()
	method := describe(connection).Methods().ByName("StreamGenerate")

	// The request as JSON; `raw` asks for the file's bytes instead of a data URI.
	request := dynamicpb.NewMessage(method.Input())
	check(protojson.Unmarshal([]byte(`{"parameter": {"seed": 7}, "output": {"raw": true}}`), request))
	data := request.Mutable(field(request, "data")).Message()
	data.Set(field(data, "prompt"), protoreflect.ValueOfString(prompt))

	// Cancelling the context stops the drawing.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	call, err := connection.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/"+service+"/StreamGenerate")
	check(err)
	check(call.SendMsg(request))
	check(call.CloseSend())
	for {
		event := dynamicpb.NewMessage(method.Output())
		if err := call.RecvMsg(event); err == io.EOF {
			return
		} else if err != nil {
			log.Fatal(err)
		}
		if progress := field(event, "progress"); event.Has(progress) {
			step := event.Get(progress).Message()
			fmt.Println("step", step.Get(field(step, "step")), "of", step.Get(field(step, "steps")))
		}
		if choice := field(event, "choice"); event.Has(choice) {
			image := event.Get(choice).Message()
			image = image.Get(field(image, "choice")).Message()
			check(os.WriteFile(file, image.Get(field(image, "raw")).Bytes(), 0o644))
			fmt.Println("wrote", file)
		}
	}
}

// describe asks the server for the descriptor of the service.
func describe(connection *grpc.ClientConn) protoreflect.ServiceDescriptor {
	stream, err := reflection.NewServerReflectionClient(connection).ServerReflectionInfo(context.Background())
	check(err)
	check(stream.Send(&reflection.ServerReflectionRequest{
		MessageRequest: &reflection.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: service},
	}))
	answer, err := stream.Recv()
	check(err)
	files := &descriptorpb.FileDescriptorSet{}
	for _, bytes := range answer.GetFileDescriptorResponse().GetFileDescriptorProto() {
		file := &descriptorpb.FileDescriptorProto{}
		check(proto.Unmarshal(bytes, file))
		files.File = append(files.File, file)
	}
	registry, err := protodesc.NewFiles(files)
	check(err)
	found, err := registry.FindDescriptorByName(service)
	check(err)
	return found.(protoreflect.ServiceDescriptor)
}

func field(message protoreflect.Message, name protoreflect.Name) protoreflect.FieldDescriptor {
	return message.Descriptor().Fields().ByName(name)
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
