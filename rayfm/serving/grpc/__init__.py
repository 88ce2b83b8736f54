"""The gRPC side of the endpoints; its messages are `rayfm.client.proto`."""
