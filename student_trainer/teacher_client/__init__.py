"""The client of a teacher service: score and generate over gRPC or HTTP, with retries, failover and calls in flight.

Public for notebooks and other trainers; needs no torch. See `connect` and `TeacherClient`.
"""

from student_trainer.teacher_client.client import TeacherClient, connect
from student_trainer.teacher_client.credentials import Credentials
from student_trainer.teacher_client.openai_model import StockModel
from student_trainer.teacher_client.replicas import ReplicaStatus

__all__ = ["Credentials", "ReplicaStatus", "StockModel", "TeacherClient", "connect"]
