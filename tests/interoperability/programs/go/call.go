// Make a call from Go, with the contract from reflection: no proto file, no generated code.
//
//	call TARGET SERVICE/METHOD REQUEST [--cancel]
//
// Prints each message as one line of JSON, then {"code": ..., "message": ...}. With --cancel, the call is cancelled
// after its first step. It needs only Debian's packages, which date from 2020 to 2022.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"os"
	"strings"

	"google.golang.org/grpc"
	rpb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

func main() {
	target, path, request := os.Args[1], os.Args[2], os.Args[3]
	cancels := len(os.Args) > 4
	connection, err := grpc.Dial(target, grpc.WithInsecure())
	fatal(err)
	defer connection.Close()

	at := strings.LastIndex(path, "/")
	method := reflected(connection, path[:at]).Methods().ByName(protoreflect.Name(path[at+1:]))
	asked := dynamicpb.NewMessage(method.Input())
	fatal(protojson.Unmarshal([]byte(request), asked))

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	call, err := connection.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/"+path)
	fatal(err)
	fatal(call.SendMsg(asked))
	fatal(call.CloseSend())
	for {
		answer := dynamicpb.NewMessage(method.Output())
		if err = call.RecvMsg(answer); err != nil {
			break
		}
		line, err := protojson.Marshal(answer)
		fatal(err)
		fmt.Println(string(line))
		if progress := method.Output().Fields().ByName("progress"); cancels && answer.Has(progress) {
			cancel()
		}
	}
	if err == io.EOF {
		err = nil
	}
	ended := status.Convert(err)
	line, err := json.Marshal(map[string]string{"code": ended.Code().String(), "message": ended.Message()})
	fatal(err)
	fmt.Println(string(line))
}

// reflected asks the server for what describes a service.
func reflected(connection *grpc.ClientConn, service string) protoreflect.ServiceDescriptor {
	stream, err := rpb.NewServerReflectionClient(connection).ServerReflectionInfo(context.Background())
	fatal(err)
	fatal(stream.Send(&rpb.ServerReflectionRequest{
		MessageRequest: &rpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: service},
	}))
	answer, err := stream.Recv()
	fatal(err)
	fatal(stream.CloseSend())
	described := &descriptorpb.FileDescriptorSet{}
	for _, each := range answer.GetFileDescriptorResponse().GetFileDescriptorProto() {
		file := &descriptorpb.FileDescriptorProto{}
		fatal(proto.Unmarshal(each, file))
		described.File = append(described.File, file)
	}
	files, err := protodesc.NewFiles(described)
	fatal(err)
	found, err := files.FindDescriptorByName(protoreflect.FullName(service))
	fatal(err)
	return found.(protoreflect.ServiceDescriptor)
}

func fatal(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
