"""Tests of the teacher service."""
