"""Messages and stubs of the gRPC calls, generated from ``scoring.proto``; see there for the command."""
