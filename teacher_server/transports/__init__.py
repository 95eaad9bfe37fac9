"""gRPC and HTTP faces of one service; they turn bytes into domain objects and errors into statuses, nothing more."""
