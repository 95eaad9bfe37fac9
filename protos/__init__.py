"""The contract that the teacher server and the student trainers share: messages, domain types, codec, errors.

Needs numpy and protobuf alone; knows neither side.
"""
