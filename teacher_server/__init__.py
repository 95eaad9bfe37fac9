"""The teacher service: one loaded model that scores and generates, over gRPC and HTTP from one process."""
