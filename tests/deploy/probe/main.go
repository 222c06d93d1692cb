// Probes as the kubelet does with a container's `grpc` probe: a connection in plaintext to a numeric port, one
// grpc.health.v1 Check of a service, a second in all. Prints the status or what went wrong. Exit codes: 0 SERVING,
// 1 another status, 2 no answer. Made with Debian's golang-google-grpc-dev, so it needs no download.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: probe HOST:PORT SERVICE")
		os.Exit(3)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	status, err := check(ctx, os.Args[1], os.Args[2])
	switch {
	case err != nil:
		fmt.Println(err)
		os.Exit(2)
	case status != healthpb.HealthCheckResponse_SERVING:
		fmt.Println(status)
		os.Exit(1)
	}
	fmt.Println(status)
}

func check(ctx context.Context, target, service string) (healthpb.HealthCheckResponse_ServingStatus, error) {
	connection, err := grpc.DialContext(ctx, target, grpc.WithInsecure(), grpc.WithBlock(),
		grpc.FailOnNonTempDialError(true), grpc.WithUserAgent("kube-probe/1.37"))
	if err != nil {
		return 0, fmt.Errorf("cannot connect: %w", err)
	}
	defer connection.Close()
	answer, err := healthpb.NewHealthClient(connection).Check(ctx, &healthpb.HealthCheckRequest{Service: service})
	if err != nil {
		return 0, err
	}
	return answer.Status, nil
}
